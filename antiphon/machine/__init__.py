"""Facts about this machine, found by probes. Entry: `probe.examine_machine`."""

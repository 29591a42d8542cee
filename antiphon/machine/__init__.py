"""What this machine is and has, as plain facts found by probes. Entry: `examine_machine`."""

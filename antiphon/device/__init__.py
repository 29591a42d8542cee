"""What the rest of Antiphon knows of a device: its capabilities, streams, timers and memory.

`device.Device` is the contract, `table.DEVICES` the one table of kinds; each kind has a file of its own.
"""

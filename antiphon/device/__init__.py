"""The device of a rank: its capabilities, streams, timers and memory.

`device.Device` is the contract and `table.find_device` looks a device up by its kind. Each kind has its own file.
"""

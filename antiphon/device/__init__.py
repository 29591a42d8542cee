"""What the rest of Antiphon knows of a device: its streams, events, timers and memory."""

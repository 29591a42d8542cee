"""Where weights come from: files, the hub, quantised formats, and dummies."""

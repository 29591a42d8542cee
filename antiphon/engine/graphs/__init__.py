"""Padded steps: fixed sizes, inputs at fixed addresses, and whole steps captured to be replayed by one launch."""

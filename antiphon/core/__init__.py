"""Data and errors that all rooms share: batches, plans, policies, sampling parameters. It imports no other room."""

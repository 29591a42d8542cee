"""Decides what a rank runs next: `Scheduler` batches the tokens of `Request`s and takes in what was sampled."""

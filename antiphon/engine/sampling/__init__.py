"""Turns hidden states into tokens and their log probabilities: `Sampler`, called once a step."""

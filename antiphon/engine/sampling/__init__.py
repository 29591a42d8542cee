"""Turns hidden states into tokens and their log probabilities: `Sampler`, called once per step."""

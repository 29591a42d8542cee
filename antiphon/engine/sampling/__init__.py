"""From hidden states to tokens and their log probabilities."""

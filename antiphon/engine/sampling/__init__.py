"""From hidden states to tokens and their log probabilities: `Sampler`, called once a step."""

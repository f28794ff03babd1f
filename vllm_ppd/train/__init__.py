"""Training of prompt tokens for a frozen language model."""

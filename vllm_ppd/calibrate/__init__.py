"""Acceptance probabilities, bigram table and tree menu from held-out text."""

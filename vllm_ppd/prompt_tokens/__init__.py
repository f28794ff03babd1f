"""Prompt tokens on disk, and the model they belong to."""

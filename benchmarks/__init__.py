"""Measuring scripts; run them from the repository's root."""

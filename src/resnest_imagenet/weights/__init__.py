"""Weights: where they are published, how others name them, and how they get into a network."""

"""Weights: where they are published, how others name them, how they get into a network and out of it."""

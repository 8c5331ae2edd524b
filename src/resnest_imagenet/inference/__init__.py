"""Trained networks on pictures: their predictions, where they disagree, and explanations."""

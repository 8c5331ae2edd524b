"""Trained networks and pictures: what they predict, where they differ, and why."""

"""What a run trains a network for."""

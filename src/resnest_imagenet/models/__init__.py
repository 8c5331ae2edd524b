"""Split attention, the ResNeSt family, and every network of table 3 by name."""

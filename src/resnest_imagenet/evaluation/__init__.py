"""Exact accuracy under a stated protocol."""

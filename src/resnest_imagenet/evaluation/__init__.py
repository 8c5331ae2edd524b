"""Measures networks: accuracy, box and mask AP and mIoU under a stated protocol, their mistakes, their latency."""

"""What is measured: exact accuracy under a stated protocol, mistakes, latency."""

"""The run: its steps, state, loop and records."""

"""The fault test: `make fault-test`."""

"""Benchmarks of the ops and of whole steps, on a GPU: `python -m bench list`."""

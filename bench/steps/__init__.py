"""Benchmarks of whole steps of a model."""

"""Judges of kernels, for tests, benchmarks and `check`: cases, oracle, launches, absent GPUs."""

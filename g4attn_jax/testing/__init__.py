"""What tests, benchmarks and `check` judge kernels by."""

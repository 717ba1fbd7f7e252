"""A benchmark for each op that is measured by itself."""

"""Tests that need an NVIDIA GPU, the command that runs them, and the evidence of what passed."""

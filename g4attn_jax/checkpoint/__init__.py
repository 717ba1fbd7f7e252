"""Checkpoints: Hugging Face directories to and from the device, DeepMind's parameter trees."""

from g4attn_jax.checkpoint.assistant import load_assistant
from g4attn_jax.checkpoint.deepmind import load_deepmind
from g4attn_jax.checkpoint.errors import CheckpointError
from g4attn_jax.checkpoint.hf import load_hf, save_hf
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar

__all__ = [
    "CheckpointError",
    "LoadReport",
    "load_assistant",
    "load_deepmind",
    "load_hf",
    "save_hf",
    "terminal_bar",
]

"""Checkpoints: Hugging Face directories to and from the device, DeepMind's parameter trees."""

from g4attn_jax.checkpoint.assistant import load_assistant_into
from g4attn_jax.checkpoint.deepmind import load_deepmind_into
from g4attn_jax.checkpoint.errors import CheckpointError
from g4attn_jax.checkpoint.hf import load_hf_into, save_hf
from g4attn_jax.checkpoint.models import load_assistant, load_deepmind, load_hf
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar

__all__ = [
    "CheckpointError",
    "LoadReport",
    "load_assistant",
    "load_assistant_into",
    "load_deepmind",
    "load_deepmind_into",
    "load_hf",
    "load_hf_into",
    "save_hf",
    "terminal_bar",
]

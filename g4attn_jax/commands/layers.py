"""The layers that `decode` is to run, found without importing JAX."""

import dataclasses
import os
from collections.abc import Sequence

from g4attn_jax.commands.model_config import load_config
from g4attn_jax.config import Gemma4Config


@dataclasses.dataclass(frozen=True)
class Job:
    """Layers of one model to decode."""

    name: str
    config: Gemma4Config
    layers: tuple[int, ...]


def jobs_of(names: Sequence[str], layers: Sequence[int] | None) -> list[Job]:
    """A job a config; `layers` None is the first of each kind.

    Raises:
        ValueError: there is no such config, or it has no such layer.
    """
    jobs = []
    for name in names:
        config = load_config(name)
        chosen = first_of_each_kind(config) if layers is None else layers
        for layer in chosen:
            config.attention_spec(layer)
        jobs.append(Job(os.path.basename(name), config, tuple(chosen)))
    return jobs


def first_of_each_kind(config: Gemma4Config) -> list[int]:
    """The first layer of every kind the model has."""
    kinds = {}
    for layer in range(config.num_hidden_layers):
        kinds.setdefault(dataclasses.replace(config.attention_spec(layer), kv_layer=-1), layer)
    return list(kinds.values())

"""Config, structure and weights of a model from a checkpoint, in one call."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.checkpoint.assistant import load_assistant_into
from g4attn_jax.checkpoint.deepmind import load_deepmind_into
from g4attn_jax.checkpoint.errors import CheckpointError
from g4attn_jax.checkpoint.files import read_json
from g4attn_jax.checkpoint.hf import load_hf_into
from g4attn_jax.checkpoint.loading import Progress
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar
from g4attn_jax.config import Gemma4Config
from g4attn_jax.model.assistant import Gemma4Assistant
from g4attn_jax.model.decoder import Gemma4Decoder

OnReport = Callable[[LoadReport], Any]
Config = TypeVar("Config", Gemma4Config, AssistantConfig)
_DTYPES = ("bfloat16", "float16", "float32")


def load_hf(
    directory: str | PathLike,
    *surplus: Any,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    on_report: OnReport | None = None,
    progress: Progress | None = terminal_bar,
) -> Gemma4Decoder:
    """A decoder with config and weights of a Hugging Face directory.

        decoder = load_hf("DIR")

    Args:
        directory: has `config.json` and `model.safetensors`, or several files and
            `model.safetensors.index.json`; see `load_hf_into`, which also loads models that are
            sharded or have a structure of the caller's.
        surplus: none is accepted.
        dtype: of weights, activations and caches: bfloat16, float16 or float32.
        implementation: of the kernels, see `Gemma4Attention`.
        on_report: called at the end with what was loaded and skipped.
        progress: called with (bytes done, bytes in all) after each parameter. As it is, a bar on a
            terminal and nothing elsewhere; None is quiet.

    Raises:
        TypeError: another argument without a name is given.
        ValueError: an argument is none that is accepted.
        CheckpointError: as `load_hf_into`.
        NotImplementedError: as `Gemma4Decoder` raises.
    """
    _check_alone("load_hf(directory, dtype=...)", surplus)
    config = config_of(directory, Gemma4Config)
    model = abstract_model(Gemma4Decoder, config, dtype, implementation)
    return _reported(load_hf_into(directory, model, progress=progress), on_report)


def load_assistant(
    directory: str | PathLike,
    *surplus: Any,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    on_report: OnReport | None = None,
    progress: Progress | None = terminal_bar,
) -> Gemma4Assistant:
    """An assistant with config and weights of a Hugging Face directory; arguments as `load_hf`.

    assistant = load_assistant("ASSISTANT_DIR")
    """
    _check_alone("load_assistant(directory, dtype=...)", surplus)
    config = config_of(directory, AssistantConfig)
    model = abstract_model(Gemma4Assistant, config, dtype, implementation)
    return _reported(load_assistant_into(directory, model, progress=progress), on_report)


def load_deepmind(
    params: Mapping[str, Any],
    config: Gemma4Config,
    *surplus: Any,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    on_report: OnReport | None = None,
    progress: Progress | None = terminal_bar,
) -> Gemma4Decoder:
    """A decoder with the parameters of DeepMind's `gemma` package, which have no config.

        params = gm.ckpts.load_params(gm.ckpts.CheckpointPath.GEMMA4_E2B_IT, text_only=True)
        decoder = load_deepmind(params, Gemma4Config.preset("gemma-4-e2b"))

    Args:
        params: see `load_deepmind_into`.
        config: of the model.
        surplus, dtype, implementation, on_report, progress: as of `load_hf`.

    Raises:
        TypeError, ValueError, CheckpointError, NotImplementedError: as `load_hf`.
    """
    _check_alone("load_deepmind(params, config, dtype=...)", surplus)
    if not isinstance(config, Gemma4Config):
        raise ValueError(f"config is a {type(config).__name__}; accepted: Gemma4Config")
    model = abstract_model(Gemma4Decoder, config, dtype, implementation)
    return _reported(load_deepmind_into(params, model, progress=progress), on_report)


def _check_alone(accepted, surplus):
    if surplus:
        given = ", ".join(type(argument).__name__ for argument in surplus)
        raise TypeError(
            f"{given} given without a name; accepted: {accepted}. Config and structure are read "
            "from the checkpoint; load_hf_into and the like fill a model that there is"
        )


def config_of(directory: str | PathLike, config_class: type[Config]) -> Config:
    """The config of a Hugging Face directory.

    Raises:
        ValueError: directory is no path.
        CheckpointError: there is no such directory, or its `config.json` is none of this class.
    """
    if not isinstance(directory, (str, PathLike)):
        raise ValueError(f"directory is a {type(directory).__name__}; accepted: a path")
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    try:
        return config_class.from_hf(read_json(directory / "config.json"))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def abstract_model(model_class, config, dtype, implementation):
    """Structure of a model, without weights.

    Raises:
        ValueError: the dtype is none that is accepted, or as the model's class raises.
        NotImplementedError: as the model's class raises.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(_DTYPES)}") from error
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; accepted: {', '.join(_DTYPES)}")
    options = {"dtype": dtype, "param_dtype": dtype, "implementation": implementation}
    return nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0), **options))


def _reported(loaded, on_report):
    model, report = loaded
    if on_report is not None:
        on_report(report)
    return model

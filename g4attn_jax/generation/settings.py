"""Sampling and stop tokens that a checkpoint's directory asks for."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from g4attn_jax.generation.prompts import check_tokens
from g4attn_jax.json_file import read_object
from g4attn_jax.model.sampling import Sampling

# What `generate` of transformers 5.24 takes for a field of sampling that is absent or null.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}

# Fields that change what `generate` of transformers 5.24 makes and are not followed here, with the
# value beside null that changes nothing.
_NOT_FOLLOWED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation in the files of a checkpoint.

    Attributes:
        sampling: greedy unless `do_sample` is true, as in transformers; `suppress_tokens` with it.
            Greedy ones hold the file's top_k and top_p too, for who sets a temperature.
        stop_tokens: of `eos_token_id`.
        taken: field and value, of those that made the two; a default of transformers too.
        not_followed: field and value, of those that change what transformers generates and have no
            counterpart here.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    taken: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    not_followed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_hf(cls, directory: str | PathLike, vocab_size: int) -> Self:
        """Reads `generation_config.json`, and `config.json` for an `eos_token_id` missing there.

        Where `do_sample` is true, a temperature, top_k or top_p that is absent or null is that of
        `generate` in Hugging Face transformers 5.24: 1, 50 and 1. Files that are not there say
        nothing.

        Args:
            directory: of a checkpoint.
            vocab_size: of its model.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no JSON object, or a field has a value that is not accepted. The
                message names file, field, value and what is accepted.
        """
        path = Path(directory) / "generation_config.json"
        fields = read_object(path) if path.is_file() else {}
        sampling, taken = _sampling(fields, path)
        sampling = dataclasses.replace(
            sampling, suppress_tokens=_suppressed(fields, path, vocab_size)
        )
        stop_tokens = _stop_tokens(Path(directory), vocab_size)
        if sampling.suppress_tokens:
            taken["suppress_tokens"] = list(sampling.suppress_tokens)
        if stop_tokens:
            taken["eos_token_id"] = list(stop_tokens)
        not_followed = {
            name: fields[name]
            for name, neutral in _NOT_FOLLOWED.items()
            if fields.get(name) not in (None, [], neutral)
        }
        return cls(sampling, stop_tokens, taken, not_followed)


def _sampling(fields, path):
    """(`Sampling` without suppressed tokens, the fields that it was made of)."""
    do_sample = fields.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ValueError(f"do_sample of {path} is {do_sample!r}; accepted: true, false or null")
    given = {name: fields[name] for name in _DEFAULTS if fields.get(name) is not None}
    values = _DEFAULTS | given if do_sample else given
    # There 0 is off, as None is here.
    is_off = type(values.get("top_k")) is int and values["top_k"] == 0
    try:
        sampling = Sampling(**values | ({"top_k": None} if is_off else {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if do_sample:
        return sampling, {"do_sample": True} | values
    taken = {name: value for name, value in values.items() if name != "temperature"}
    if do_sample is not None:
        taken = {"do_sample": False} | taken
    return dataclasses.replace(sampling, temperature=0.0), taken


def _suppressed(fields, path, vocab_size):
    found = fields.get("suppress_tokens")
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ValueError(
            f"suppress_tokens of {path} is {found!r}; accepted: a list of tokens, or null"
        )
    return check_tokens(f"suppress_tokens of {path}", found, vocab_size)


def _stop_tokens(directory, vocab_size):
    """`eos_token_id` of the first file that has one; of `config.json` also the text model's."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        fields = read_object(path)
        text = fields.get("text_config", {})
        if not isinstance(text, dict):
            raise ValueError(f"text_config of {path} is {text!r}; accepted: an object")
        for found in (fields.get("eos_token_id"), text.get("eos_token_id")):
            if found is not None:
                tokens = found if isinstance(found, list) else [found]
                return tuple(check_tokens(f"eos_token_id of {path}", tokens, vocab_size).tolist())
    return ()

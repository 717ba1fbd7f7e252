"""Tensors of a Hugging Face directory, sorted into those to load and those to skip.

Tools write more than the model needs: buffers, norm scales that are all ones, a second copy of a
weight; or they write other names. Tensors that say nothing are skipped and counted. Tensors that
would change the model are refused.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from g4attn_jax.checkpoint.errors import CheckpointError, listed
from g4attn_jax.checkpoint.files import StoredTensor
from g4attn_jax.checkpoint.packing import Shape
from g4attn_jax.config import Gemma4Config, ProjectionMode

HEAD = "lm_head.weight"
# Of the language model's tensors: in files of the multimodal model and of the text model, each with
# and without its head.
_PREFIXES = (
    "model.language_model.",
    "model.",
    "language_model.model.",
    "language_model.",
    "",
)
_OTHER_TOWERS = re.compile(
    r"(model\.)?(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio)\."
)
# Of `torch.compile`, anywhere in a name, and of PEFT.
_COMPILED, _PEFT = "_orig_mod.", "base_model.model."
_HEAD = re.compile(r"(model\.)?(language_model\.)?lm_head\.weight")
# Published files hold them for KV-shared layers as well; transformers ignores them there
# (`_keys_to_ignore_on_load_unexpected`), since these layers use the K and V of another one.
_UNUSED_IF_SHARED = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_BUFFER = re.compile(r"(.*\.)?rotary_emb\.\w+")
# V is normalised without a learned scale. Scales of a cache matter to float8 caches alone.
_ONES = re.compile(
    r"layers\.\d+\.self_attn\.(v_norm\.weight|(attn\.)?([qkv]_proj\.)?(q|k|v|kv|prob)_scale)"
)
_EMBED_SCALE = re.compile(r"embed_tokens(_per_layer)?\.embed_scale")
_VALUE = re.compile(r"layers\.(\d+)\.self_attn\.v_proj\.weight")
_EXPERT = re.compile(r"(layers\.\d+\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
# bfloat16 rounds by up to 2^-9; a scale that is meant otherwise is off by more.
_ROUNDING = 2**-7
_COMPARED_AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class HFTensors:
    """Tensors of a directory by their fate, without wrappers such as `_orig_mod.` in names.

    Attributes:
        prefix: of the language model's names.
        tensors: to be loaded; `loading.check` refuses those that the model has no place for.
        skipped: numbers of tensors that are not loaded, by what they have in common.
        num_joined: tensors that the files have beyond `tensors`, which joins experts one by one.
        head: `lm_head.weight` beside a table that the config calls the head; None if there is none.
        constants: skipped if they are this number throughout, by name.
        copies: skipped if they equal another tensor, by name and the name of the other.
    """

    prefix: str
    tensors: dict[str, Any]
    skipped: collections.Counter[str]
    num_joined: int
    head: StoredTensor | None
    constants: dict[str, tuple[StoredTensor, float]]
    copies: dict[str, tuple[StoredTensor, str]]

    def check_values(self) -> None:
        """Reads the tensors that are skipped on a condition.

        Raises:
            CheckpointError: the model would be another one with one of these tensors.
        """
        for name, (tensor, value) in self.constants.items():
            if not tensor.is_float:
                raise CheckpointError(
                    f"{name} has dtype {tensor.dtype}; accepted: bfloat16, float16 and float32"
                )
            if not np.allclose(tensor.read().astype(np.float32), value, rtol=_ROUNDING, atol=0):
                raise CheckpointError(
                    f"{name} is not {value:g} throughout; accepted: {value:g}, with which the "
                    "model is the same as without"
                )
        for name, (tensor, other) in self.copies.items():
            if not same_values(tensor, self.tensors[other]):
                raise CheckpointError(
                    f"{name} differs from {other}; accepted: equal ones, as attention_k_eq_v makes "
                    "one projection of both"
                )


def sorted_tensors(stored: Mapping[str, StoredTensor], config: Gemma4Config) -> HFTensors:
    """Sorts tensors into those to load and those to skip; reads none.

    Args:
        stored: all tensors of a directory.
        config: of the model that they are for.

    Raises:
        CheckpointError: a tensor is there under two names, there is no language model or there are
            two, or experts one by one are incomplete or misshapen.
    """
    stored = _unwrapped(stored)
    prefix = _prefix(stored)
    found = HFTensors(prefix, {}, collections.Counter(), 0, stored.get(HEAD), {}, {})
    if not config.tie_word_embeddings:
        found = dataclasses.replace(found, head=None)
    experts = {}
    for name, tensor in stored.items():
        short = name.removeprefix(prefix)
        if reason := _why_skipped(name, short, config):
            found.skipped[reason] += 1
        elif value := _constant(short, config):
            found.constants[name] = tensor, value
            found.skipped[f"{_any_layer(name)} ({value:g} throughout)"] += 1
        elif other := _original(name, short, config):
            found.copies[name] = tensor, other
            found.skipped[f"{_any_layer(name)} (equals k_proj)"] += 1
        elif expert := _EXPERT.fullmatch(short):
            experts.setdefault(prefix + expert[1], {})[int(expert[2]), expert[3]] = tensor
        elif name != HEAD or found.head is None:
            found.tensors[name] = _with_axis(tensor) if short.endswith("layer_scalar") else tensor
    joined = {
        name: one for at, parts in experts.items() for name, one in _joined(at, parts, config)
    }
    if twice := joined.keys() & found.tensors.keys():
        raise CheckpointError(f"the checkpoint has {listed(twice)} twice, once expert by expert")
    found.tensors.update(joined)
    return dataclasses.replace(found, num_joined=sum(map(len, experts.values())) - len(joined))


def same_values(tensor: StoredTensor, other: StoredTensor) -> bool:
    """Whether two floating-point tensors are equal; a part of each is in memory at a time."""
    if tensor.shape != other.shape or not (tensor.is_float and other.is_float):
        return False
    a, b = tensor.read().ravel(), other.read().ravel()
    # Bits are compared several times as fast as bfloat16 numbers.
    as_read = f"u{a.itemsize}" if a.dtype == b.dtype else None
    for start in range(0, a.size, _COMPARED_AT_ONCE):
        parts = [x[start : start + _COMPARED_AT_ONCE] for x in (a, b)]
        parts = [x.view(as_read) if as_read else x.astype(np.float32) for x in parts]
        if not np.array_equal(*parts):
            return False
    return True


def _unwrapped(stored):
    """Tensors by their names without what `torch.compile` and PEFT put into them."""
    tensors = {}
    for name, tensor in stored.items():
        short = name.replace(_COMPILED, "").removeprefix(_PEFT)
        short = HEAD if _HEAD.fullmatch(short) else short
        if short in tensors:
            raise CheckpointError(f"the checkpoint has {short} twice, once as {name}")
        tensors[short] = tensor
    return tensors


def _prefix(names: Iterable[str]) -> str:
    """Prefix of the names of the language model's tensors."""
    found = [prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in names]
    if not found:
        raise CheckpointError(
            "the checkpoint lacks embed_tokens.weight, under any of the prefixes "
            + ", ".join(repr(prefix) for prefix in _PREFIXES)
        )
    if len(found) > 1:
        twice = listed(f"{prefix}embed_tokens.weight" for prefix in found)
        raise CheckpointError(f"the checkpoint has two language models: {twice}")
    return found[0]


def _why_skipped(name, short, config):
    """Heading under which the report counts a tensor that is skipped whatever it holds, or None."""
    if tower := _OTHER_TOWERS.match(name):
        return tower[0]
    if _BUFFER.fullmatch(short):
        return _any_layer(name)
    unused = _UNUSED_IF_SHARED.match(short)
    if unused and _mode(unused[1], config) is ProjectionMode.Q_ONLY:
        return f"{name.removesuffix(short)}layers.*.self_attn.{unused[2]} (KV-shared)"
    return None


def _constant(short, config):
    """Number that a tensor must be throughout to be skipped; None if no number would do."""
    if _ONES.fullmatch(short):
        return 1.0
    if of_table := _EMBED_SCALE.fullmatch(short):
        width = config.hidden_size_per_layer_input if of_table[1] else config.hidden_size
        return math.sqrt(width)
    return None


def _original(name, short, config):
    """Name of the projection that this one must equal to be skipped; None if it is needed."""
    value = _VALUE.fullmatch(short)
    if value and _mode(value[1], config) is ProjectionMode.QK_ONLY:
        return name.replace("v_proj", "k_proj")
    return None


def _mode(layer, config):
    layer = int(layer)
    return config.attention_spec(layer).mode if layer < config.num_hidden_layers else None


def _any_layer(name):
    return re.sub(r"\.\d+\.", ".*.", name)


def _with_axis(tensor):
    """A scalar as the [1] that transformers writes."""
    return dataclasses.replace(tensor, shape=tensor.shape or (1,))


def _joined(at, parts, config):
    """(name, tensor) of `experts.gate_up_proj` and `experts.down_proj`, from experts one by one."""
    embed, width = config.hidden_size, config.moe_intermediate_size
    shapes = {"gate": (width, embed), "up": (width, embed), "down": (embed, width)}
    wanted = {(i, which) for i in range(config.num_experts or 0) for which in shapes}
    for problem, those in (("lacks", wanted - parts.keys()), ("has", parts.keys() - wanted)):
        if those:
            names = listed(f"{at}{expert}.{which}_proj.weight" for expert, which in those)
            rest = "" if problem == "lacks" else f"; num_experts is {config.num_experts}"
            raise CheckpointError(f"the checkpoint {problem} {names}{rest}")
    for (expert, which), tensor in parts.items():
        if tensor.shape != shapes[which]:
            raise CheckpointError(
                f"{at}{expert}.{which}_proj.weight has shape {tensor.shape}; this model needs "
                f"{shapes[which]}"
            )
    for name, which in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        rows = tuple(tuple(parts[i, w] for w in which) for i in range(config.num_experts))
        yield at + name, _Experts(rows)


@dataclasses.dataclass(frozen=True)
class _Experts:
    """Tensors of experts as one [X, rows, columns], as `loading.Tensor`; rows follow each other."""

    parts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> Shape:
        first = self.parts[0]
        return len(self.parts), sum(part.shape[0] for part in first), first[0].shape[1]

    @property
    def dtype(self) -> str:
        return next((part.dtype for part in self._all() if not part.is_float), self._first.dtype)

    @property
    def is_float(self) -> bool:
        return all(part.is_float for part in self._all())

    def read(self) -> np.ndarray:
        """All experts, in host memory; float32 where their dtypes differ."""
        same = len({part.dtype for part in self._all()}) == 1
        whole = np.empty(self.shape, self._first.read().dtype if same else np.float32)
        for expert, of_expert in zip(whole, self.parts, strict=True):
            np.concatenate([part.read().astype(whole.dtype) for part in of_expert], out=expert)
        return whole

    @property
    def _first(self):
        return self.parts[0][0]

    def _all(self):
        return (part for of_expert in self.parts for part in of_expert)

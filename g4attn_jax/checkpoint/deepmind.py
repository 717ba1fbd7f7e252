"""The parameter tree of DeepMind's `gemma` package, read into our model.

Source of names and shapes: `gemma.gm.nn.gemma4` of the package `gemma` 4.0.1.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from g4attn_jax.checkpoint.errors import CheckpointError
from g4attn_jax.checkpoint.loading import Model, Progress, load
from g4attn_jax.checkpoint.packing import Packed, Shape
from g4attn_jax.checkpoint.report import LoadReport, terminal_bar
from g4attn_jax.config import AttentionSpec, Gemma4Config, ProjectionMode

_OTHER_TOWERS = re.compile(r"vision_encoder/|audio_encoder/|embedder/mm_|embedder/audio_")
# Every layer has them; KV-shared ones compute with them and drop the result.
_UNUSED_IF_SHARED = re.compile(r"layer_(\d+)/attn/(kv_einsum|k_einsum|key_norm/scale)$")

_MODEL = {
    "embed_tokens.weight": Packed({"embedder/input_embedding": "vocab, embed"}),
    "per_layer_inputs.embed_tokens.weight": Packed(
        {"embedder/per_layer_embeddings": "vocab, layers, per_layer"}
    ),
    "per_layer_inputs.projection.weight": Packed(
        {"embedder/per_layer_model_projection": "embed, layers, per_layer"}
    ),
    "per_layer_inputs.norm": Packed({"embedder/per_layer_projection_norm/scale": "per_layer"}),
    "norm": Packed({"final_norm/scale": "embed"}),
}
_ATTENTION = {
    "attention.o_proj.weight": Packed({"attn/attn_vec_einsum": "heads, head_dim, embed"}),
    "attention.q_norm": Packed({"attn/query_norm/scale": "head_dim"}),
    "attention.k_norm": Packed({"attn/key_norm/scale": "head_dim"}),
    "input_norm": Packed({"pre_attention_norm/scale": "embed"}),
    "post_attention_norm": Packed({"post_attention_norm/scale": "embed"}),
    "post_feedforward_norm": Packed({"post_ffw_norm/scale": "embed"}),
    "per_layer_gate.weight": Packed({"per_layer_input_gate": "embed, per_layer"}),
    "per_layer_projection.weight": Packed({"per_layer_projection": "per_layer, embed"}),
    "post_per_layer_norm": Packed({"post_per_layer_input_norm/scale": "embed"}),
    "layer_scalar": Packed({"skip_scale": "1"}),
}
_DENSE = {
    "pre_feedforward_norm": Packed({"pre_ffw_norm/scale": "embed"}),
    "mlp.gate_up_proj.weight": Packed({"mlp/gating_einsum": "gate_up, mlp, embed"}),
    "mlp.down_proj.weight": Packed({"mlp/linear": "mlp, embed"}),
}
# With experts, `mlp` and the norms around it are theirs, and the dense MLP is the second.
_MOE = {
    "pre_feedforward_norm": Packed({"pre_ffw2_norm/scale": "embed"}),
    "mlp.gate_up_proj.weight": Packed({"mlp2/gating_einsum": "gate_up, mlp, embed"}),
    "mlp.down_proj.weight": Packed({"mlp2/linear": "mlp, embed"}),
    "post_feedforward_norm_1": Packed({"post_ffw2_norm/scale": "embed"}),
    "pre_feedforward_norm_2": Packed({"pre_ffw_norm/scale": "embed"}),
    "moe.router_scale": Packed({"mlp/router_scale": "embed"}),
    "moe.router_proj.weight": Packed({"mlp/router_logits": "embed, experts"}),
    "moe.per_expert_scale": Packed({"mlp/per_expert_scale": "experts"}),
    "moe.gate_up_proj.weight": Packed({"mlp/gating_einsum": "experts, gate_up, expert_mlp, embed"}),
    "moe.down_proj.weight": Packed({"mlp/linear": "experts, expert_mlp, embed"}),
    "post_feedforward_norm_2": Packed({"post_ffw1_norm/scale": "embed"}),
}


def _qkv(spec: AttentionSpec) -> Packed:
    q = {"attn/q_einsum": "kv_heads heads_per_group, embed, head_dim"}
    match spec.mode:
        case ProjectionMode.Q_ONLY:
            return Packed(q)
        case ProjectionMode.QK_ONLY:
            k = {"attn/k_einsum": "kv_heads heads_per_group, embed, head_dim"}
            return Packed(q | k, "heads_per_group", (spec.group_size, 1))
        case ProjectionMode.QKV_FULL:
            kv = {"attn/kv_einsum": "heads_per_group, kv_heads, embed, head_dim"}
            return Packed(q | kv, "heads_per_group", (spec.group_size, 2))


def _table(config: Gemma4Config) -> dict[str, Packed]:
    """Arrays of every parameter that a Gemma 4 model can have, by the parameter's path."""
    table = dict(_MODEL)
    for layer in range(config.num_hidden_layers):
        rows = _ATTENTION | (_MOE if config.enable_moe_block else _DENSE)
        rows |= {"attention.qkv_proj.weight": _qkv(config.attention_spec(layer))}
        table |= {f"layers.{layer}.{n}": row.under(f"layer_{layer}/") for n, row in rows.items()}
    return table


def load_deepmind_into(
    params: Mapping[str, Any], model: Model, *, progress: Progress | None = terminal_bar
) -> tuple[Model, LoadReport]:
    """Loads the parameters of a Gemma 4 transformer of DeepMind's `gemma` package.

        params = gm.ckpts.load_params(gm.ckpts.CheckpointPath.GEMMA4_E2B_IT, text_only=True)
        model = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
        model, report = load_deepmind_into(params, model)

    With experts (26B-A4B) the logits are not those of DeepMind's package: its router sees what the
    experts see, scaled by `pre_ffw_norm`. The router of transformers, which our model follows, sees
    the residual stream without that scale.

    Args:
        params: nested dicts of arrays, as `gm.ckpts.load_params` returns them or under the names
            with slashes that the files have. They stay, beside the new parameters.
        model: as for `load_hf_into`.
        progress: as for `load_hf_into`.

    Returns:
        (model, report): a new model, and what was loaded and skipped.

    Raises:
        CheckpointError: an array is missing, surplus, misshapen, not floating point, there twice
            or in a node that is no dict; the message names it.
    """
    tensors, skipped = {}, collections.Counter()
    for name, array in _named_arrays(params):
        if reason := _why_skipped(name, model.config):
            skipped[reason] += 1
        elif name in tensors:
            raise CheckpointError(f"params has {name} twice")
        elif not isinstance(array, jax.Array | np.ndarray):
            raise CheckpointError(f"{name} is a {type(array).__name__}; accepted: an array")
        else:
            tensors[name] = _Array(array)
    return load(model, _table(model.config), tensors, skipped, progress)


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the tree, as `loading.Tensor`."""

    array: jax.Array | np.ndarray

    @property
    def shape(self) -> Shape:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.floating)

    def read(self) -> jax.Array | np.ndarray:
        return self.array


def _named_arrays(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arrays by one name each: the two forms of the tree differ in `transformer/` and some `/w`."""
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise CheckpointError(f"params has {name} in a node that is no dict; accepted: dicts")
        name = "/".join(str(key.key) for key in path)
        yield name.removeprefix("transformer/").removesuffix("/w"), array


def _why_skipped(name, config):
    """Heading under which the report counts an array that is skipped; None if it is loaded."""
    if tower := _OTHER_TOWERS.match(name):
        return tower[0]
    unused = _UNUSED_IF_SHARED.match(name)
    if unused is None or int(unused[1]) >= config.num_hidden_layers:
        return None
    is_shared = config.attention_spec(int(unused[1])).mode is ProjectionMode.Q_ONLY
    return f"layer_*/attn/{unused[2]} (KV-shared)" if is_shared else None

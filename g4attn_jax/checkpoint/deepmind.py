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
    "embed_tokens.weight": Packed("VE", {"embedder/input_embedding": "V,E"}),
    "per_layer_inputs.embed_tokens.weight": Packed(
        "VLP", {"embedder/per_layer_embeddings": "V,L,P"}
    ),
    "per_layer_inputs.projection.weight": Packed(
        "ELP", {"embedder/per_layer_model_projection": "E,L,P"}
    ),
    "per_layer_inputs.norm": Packed("P", {"embedder/per_layer_projection_norm/scale": "P"}),
    "norm": Packed("E", {"final_norm/scale": "E"}),
}
_ATTENTION = {
    "attention.o_proj.weight": Packed("NDE", {"attn/attn_vec_einsum": "N,D,E"}),
    "attention.q_norm": Packed("D", {"attn/query_norm/scale": "D"}),
    "attention.k_norm": Packed("D", {"attn/key_norm/scale": "D"}),
    "input_norm": Packed("E", {"pre_attention_norm/scale": "E"}),
    "post_attention_norm": Packed("E", {"post_attention_norm/scale": "E"}),
    "post_feedforward_norm": Packed("E", {"post_ffw_norm/scale": "E"}),
    "per_layer_gate.weight": Packed("EP", {"per_layer_input_gate": "E,P"}),
    "per_layer_projection.weight": Packed("PE", {"per_layer_projection": "P,E"}),
    "post_per_layer_norm": Packed("E", {"post_per_layer_input_norm/scale": "E"}),
    "layer_scalar": Packed("", {"skip_scale": "1"}),
}
_DENSE = {
    "pre_feedforward_norm": Packed("E", {"pre_ffw_norm/scale": "E"}),
    "mlp.gate_up_proj.weight": Packed("ECF", {"mlp/gating_einsum": "C,F,E"}),
    "mlp.down_proj.weight": Packed("FE", {"mlp/linear": "F,E"}),
}
# With experts, `mlp` and the norms around it are theirs, and the dense MLP is the second.
_MOE = {
    "pre_feedforward_norm": Packed("E", {"pre_ffw2_norm/scale": "E"}),
    "mlp.gate_up_proj.weight": Packed("ECF", {"mlp2/gating_einsum": "C,F,E"}),
    "mlp.down_proj.weight": Packed("FE", {"mlp2/linear": "F,E"}),
    "post_feedforward_norm_1": Packed("E", {"post_ffw2_norm/scale": "E"}),
    "pre_feedforward_norm_2": Packed("E", {"pre_ffw_norm/scale": "E"}),
    "moe.router_scale": Packed("E", {"mlp/router_scale": "E"}),
    "moe.router_proj.weight": Packed("EX", {"mlp/router_logits": "E,X"}),
    "moe.per_expert_scale": Packed("X", {"mlp/per_expert_scale": "X"}),
    "moe.gate_up_proj.weight": Packed("XECF", {"mlp/gating_einsum": "X,C,F,E"}),
    "moe.down_proj.weight": Packed("XFE", {"mlp/linear": "X,F,E"}),
    "post_feedforward_norm_2": Packed("E", {"post_ffw1_norm/scale": "E"}),
}


def _qkv(spec: AttentionSpec) -> Packed:
    q = {"attn/q_einsum": "KG,E,D"}
    match spec.mode:
        case ProjectionMode.Q_ONLY:
            return Packed("EKGD", q)
        case ProjectionMode.QK_ONLY:
            return Packed("EKGD", q | {"attn/k_einsum": "KG,E,D"}, "G", (spec.group_size, 1))
        case ProjectionMode.QKV_FULL:
            return Packed("EKGD", q | {"attn/kv_einsum": "G,K,E,D"}, "G", (spec.group_size, 2))


def _table(config: Gemma4Config) -> dict[str, Packed]:
    """From paths of our parameters to what they are made of, for all a Gemma 4 model can have."""
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
    """Under which heading the report counts this array; None if it is to be loaded."""
    if tower := _OTHER_TOWERS.match(name):
        return tower[0]
    unused = _UNUSED_IF_SHARED.match(name)
    if unused is None or int(unused[1]) >= config.num_hidden_layers:
        return None
    is_shared = config.attention_spec(int(unused[1])).mode is ProjectionMode.Q_ONLY
    return f"layer_*/attn/{unused[2]} (KV-shared)" if is_shared else None

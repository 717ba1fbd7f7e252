"""Names of the axes of every weight: for checkpoints that pack, and meshes that shard it.

The names are the same in all models and sizes:

| axis | what it counts |
|---|---|
| `embed` | the residual stream, E |
| `kv_heads`, `heads_per_group` | KV heads; of each its query heads, then K, then V |
| `heads`, `head_dim` | query heads; numbers of a head, D |
| `gate_up`, `mlp` | the gate and the value it is multiplied with; width of an MLP, F |
| `experts`, `expert_mlp` | experts, X; width of one |
| `vocab` | tokens, V |
| `layers`, `per_layer` | layers, L; width of the per-layer inputs, P |
| `target_embed`, `centroids` | of an assistant: its target's residual stream; groups of tokens |
"""

from flax import nnx

from g4attn_jax.model.linear import Weight


def weight_axes(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Names of the axes of every weight, by its path such as "layers.0.mlp.down_proj.weight"."""
    return {
        ".".join(map(str, (*path, "weight"))): module.axes
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Weight)
    }

"""Makes the fixtures beside this file: DeepMind's Gemma 4 transformer, tiny, with random weights.

Run in an environment of its own, the project's tests only read the result:

    pip install gemma==4.0.1 jax==0.10.2
    python tests/golden_deepmind/make_golden.py

For each of two models, one folder:

    config.json    the same model as a config of Hugging Face
    golden.npz     `params/...`: the arrays of the parameter tree by path, bfloat16 as uint16
                   `tokens`: int32 [B, T], random
                   `logits`: float32 [B, T, V], computed in float32
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gemma.gm.nn.gemma4 import _config, _modules, _transformer

BATCH, TOKENS = 2, 20
S, F = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
TYPES = {S: "sliding_attention", F: "full_attention"}
COMMON = {
    "num_embed": 64,
    "head_dim": 8,
    "global_key_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "final_logit_softcap": 30.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 6,
    "global_rope_proportion": 0.25,
    "local_rope_proportion": 1.0,
    "local_base_frequency": 10_000,
    "global_base_frequency": 1_000_000,
}
MODELS = {
    # Per-layer embeddings, a KV-shared tail with MLPs of double width.
    "gemma-4-e2b": {
        "embed_dim": 24,
        "hidden_dim": 32,
        "attention_types": (S, S, F, S, S, F),
        "per_layer_input_dim": 8,
        "kv_cache_sharing_config": _config.KVCacheSharingConfig(0.5, True, True),
        "override_kv_shared_ffw_hidden": 64,
    },
    # K = V on full layers, experts beside the MLP.
    "gemma-4-26b-a4b": {
        "embed_dim": 16,
        "hidden_dim": 24,
        "attention_types": (S, F, S, F),
        "k_eq_v_global": True,
        "num_global_kv_heads": 1,
        "enable_moe": True,
        "num_experts": 8,
        "expert_dim": 12,
        "top_k_experts": 3,
        "moe_dense_hidden_dim": 24,
    },
}


def main():
    for name, changes in MODELS.items():
        config = _config.TransformerConfig(**COMMON | changes)
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
        model = _transformer.Transformer(config=config, dtype=jnp.float32)
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, config.num_embed, (BATCH, TOKENS), dtype=np.int32)
        shapes = jax.eval_shape(lambda m=model, t=tokens: m.init(jax.random.key(0), t))["params"]
        params = jax.tree_util.tree_map_with_path(lambda p, x, r=rng: weight(p, x.shape, r), shapes)
        if config.enable_moe:
            # DeepMind's router sees its input times this scale, and that of transformers, which our
            # model follows, the input alone. With a scale of 1 they agree.
            for layer in range(config.num_layers):
                scale = params[f"layer_{layer}"]["pre_ffw_norm"]["scale"]
                params[f"layer_{layer}"]["pre_ffw_norm"]["scale"] = np.ones_like(scale)
        params32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        logits = model.apply({"params": params32}, tokens).logits
        arrays = {
            "params/" + "/".join(key.key for key in path): x.view(np.uint16)
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        }
        np.savez_compressed(folder / "golden.npz", tokens=tokens, logits=logits, **arrays)


def weight(path, shape, rng):
    """Scales near 1, matrices that keep activations near 1, in numbers that bfloat16 has."""
    if path[-1].key.endswith("scale"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.normal(size=shape) * (shape[-1] if len(shape) > 1 else 1) ** -0.5
    return value.astype(jnp.bfloat16)


def hf_config(config):
    """The fields of Hugging Face's text config that say the same."""
    sharing = config.kv_cache_sharing_config
    shared = int(sharing.frac_shared_layers * config.num_layers) if sharing else 0
    return {
        "model_type": "gemma4_text",
        "vocab_size": config.num_embed,
        "vocab_size_per_layer_input": config.num_embed,
        "hidden_size": config.embed_dim,
        "hidden_size_per_layer_input": config.per_layer_input_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": config.hidden_dim,
        "use_double_wide_mlp": config.override_kv_shared_ffw_hidden is not None,
        "num_hidden_layers": config.num_layers,
        "layer_types": [TYPES[layer] for layer in config.attention_types],
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_global_key_value_heads": config.num_global_kv_heads,
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": config.k_eq_v_global,
        "attention_bias": False,
        "head_dim": config.head_dim,
        "global_head_dim": config.global_key_size,
        "sliding_window": config.sliding_window_size,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": config.final_logit_softcap,
        "tie_word_embeddings": True,
        "enable_moe_block": config.enable_moe,
        "num_experts": config.num_experts or None,
        "top_k_experts": config.top_k_experts if config.enable_moe else None,
        "moe_intermediate_size": config.expert_dim or None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": float(config.global_base_frequency),
                "partial_rotary_factor": config.global_rope_proportion,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(config.local_base_frequency),
            },
        },
    }


if __name__ == "__main__":
    main()

"""Makes the fixtures beside this file: outputs of Hugging Face's Gemma 4 attention.

Run in an environment of its own, the project's tests only read the result:

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_golden.py

For each model below it builds every layer's `Gemma4TextAttention` with random weights, prefills
PROMPT tokens of random hidden states, then decodes STEPS more one by one, past the sliding window,
through transformers' own cache. Written per model: `<name>.json`, the config, and `<name>.npz`:

    <layer>/<HF name>       weights; bfloat16 bits as uint16
    <layer>/x               hidden states [B, PROMPT + STEPS, E]; bfloat16 bits as uint16
    <layer>/y_float32       the layer's output [B, PROMPT + STEPS, E], computed in float32
    <layer>/y_bfloat16      the same in bfloat16; bits as uint16

The weights and inputs are bfloat16 numbers, so both computations have the same exact answer.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Gemma4TextConfig
from transformers.cache_utils import DynamicCache, KVSharingDict
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextAttention,
    Gemma4TextRotaryEmbedding,
)

BATCH, PROMPT, STEPS = 2, 12, 10
COMMON = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
MODELS = {
    # As 12B, 26B-A4B and 31B: full layers have K = V and fewer KV heads.
    "k_eq_v": COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
    },
    # As E2B and E4B: K and V of their own, and a tail of layers that share the last ones.
    "kv_shared": COMMON
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 2,
    },
}


def main():
    assert transformers.__version__ == "5.23.0", transformers.__version__
    assert torch.__version__.startswith("2.13.0"), torch.__version__
    for seed, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        here = Path(__file__).parent
        (here / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")
        np.savez_compressed(here / f"{name}.npz", **outputs(Gemma4TextConfig(**config)))


def outputs(config):
    config._attn_implementation = "eager"
    layers = [Gemma4TextAttention(config, i) for i in range(config.num_hidden_layers)]
    xs = torch.randn(len(layers), BATCH, PROMPT + STEPS, config.hidden_size).bfloat16()
    arrays = {}
    for i, layer in enumerate(layers):
        for key, weight in layer.state_dict().items():
            # Norm scales around 1, as trained ones are; projections that keep the variance.
            std = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_((weight.ndim == 1) + std * torch.randn(weight.shape)).copy_(
                weight.bfloat16()
            )
            arrays[f"{i}/{key}"] = bits(weight.bfloat16())
        arrays[f"{i}/x"] = bits(xs[i])
    for dtype in (torch.float32, torch.bfloat16):
        ys = run(config, [layer.to(dtype) for layer in layers], xs.to(dtype))
        for i, y in enumerate(ys):
            name = str(dtype).removeprefix("torch.")
            arrays[f"{i}/y_{name}"] = bits(y) if dtype == torch.bfloat16 else y.numpy()
    return arrays


@torch.no_grad()
def run(config, layers, xs):
    """Prefill, then single steps, as `Gemma4TextModel.forward` calls its layers."""
    cache = DynamicCache(config=config)
    rotary = Gemma4TextRotaryEmbedding(config)
    chunks = [(0, PROMPT)] + [(t, t + 1) for t in range(PROMPT, PROMPT + STEPS)]
    ys = [[] for _ in layers]
    for start, stop in chunks:
        positions = torch.arange(start, stop)[None].expand(BATCH, -1)
        masks = {
            "config": config,
            "inputs_embeds": xs[0, :, start:stop],
            "attention_mask": None,
            "past_key_values": cache,
            "position_ids": positions,
        }
        masks = {
            "full_attention": create_causal_mask(**masks),
            "sliding_attention": create_sliding_window_causal_mask(**masks),
        }
        shared = KVSharingDict()
        for i, layer in enumerate(layers):
            x, layer_type = xs[i, :, start:stop], config.layer_types[i]
            y, _ = layer(
                hidden_states=x,
                position_embeddings=rotary(x, positions, layer_type),
                attention_mask=masks[layer_type],
                shared_kv_states=shared,
                past_key_values=cache,
            )
            ys[i].append(y)
    return [torch.cat(y, dim=1) for y in ys]


def bits(tensor):
    return tensor.contiguous().view(torch.uint16).numpy()


if __name__ == "__main__":
    main()

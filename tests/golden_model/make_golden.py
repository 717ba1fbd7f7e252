"""Makes the fixtures beside this file: Hugging Face's Gemma 4 text models, tiny and random.

Run in an environment of its own, the project's tests only read the result:

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/golden_model/make_golden.py

For each of the five published models below, one folder with its structure in small:

    config.json          of the text model
    model.safetensors    weights in bfloat16 under the names of the text model (`model.layers...`)
    golden.npz           tokens int32 [B, PROMPT + STEPS]: a random prompt and what `generate`
                         appends to it greedily
                         logits float32 [B, PROMPT + STEPS, V], of one pass over all tokens
                         logits_bfloat16 [B, PROMPT, V], of a bfloat16 pass over the prompt; bits as
                         uint16

The first two are computed in float32. The weights are bfloat16 numbers, so nothing is lost in
storing them.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

BATCH, PROMPT, STEPS = 2, 24, 64
# The two best tokens of every step differ by more, so that rounding cannot change the choice.
MIN_MARGIN = 5e-3
S, F = "sliding_attention", "full_attention"
COMMON = {
    "model_type": "gemma4_text",
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 48,
    "hidden_size_per_layer_input": 0,
    "hidden_activation": "gelu_pytorch_tanh",
    "intermediate_size": 96,
    "use_double_wide_mlp": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": None,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": False,
    "attention_bias": False,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "rope_parameters": {
        F: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        S: {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
K_EQ_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MODELS = {
    # Per-layer embeddings, one KV head, a shared tail that is longer than half the model, with MLPs
    # of double width. The last producers are not the last two layers before the tail.
    "gemma-4-e2b": {
        "layer_types": [F, S, S, S, F, S, S, F],
        "num_kv_shared_layers": 5,
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 136,
        "use_double_wide_mlp": True,
    },
    # The same with two KV heads and MLPs of one width.
    "gemma-4-e4b": {
        "layer_types": [S, S, F, S, S, F],
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 16,
    },
    # K = V on full layers, which have fewer KV heads.
    "gemma-4-12b": K_EQ_V | {"model_type": "gemma4_unified_text", "layer_types": [S, F] * 3},
    # And experts beside the MLP.
    "gemma-4-26b-a4b": K_EQ_V
    | {
        "layer_types": [S, F] * 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "enable_moe_block": True,
        "num_experts": 16,
        "top_k_experts": 3,
        "moe_intermediate_size": 24,
    },
    "gemma-4-31b": K_EQ_V
    | {
        "layer_types": [S, S, F, S, S, F],
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
    },
}


def main():
    assert transformers.__version__ == "5.23.0", transformers.__version__
    assert torch.__version__.startswith("2.13.0"), torch.__version__
    for name, changes in MODELS.items():
        config = COMMON | changes | {"num_hidden_layers": len(changes["layer_types"])}
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        model, tokens, logits = next(filter(has_margins, map(sample(config), range(100))))
        weights = model.state_dict()
        del weights["lm_head.weight"]  # the embedding, which published checkpoints hold once
        weights = {key: weight.bfloat16() for key, weight in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with torch.no_grad():
            rounded = model.bfloat16()(tokens[:, :PROMPT]).logits
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens.int().numpy(),
            logits=logits.numpy(),
            logits_bfloat16=rounded.view(torch.uint16).numpy(),
        )


def sample(config):
    """From a seed to (model, tokens, logits)."""

    @torch.no_grad()
    def of(seed):
        torch.manual_seed(seed)
        # Without transformers' default end of text, for there to be STEPS tokens.
        generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=STEPS)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model.generation_config = generation
        for key, weight in model.state_dict().items():
            weight.copy_(random_weight(key, weight.shape).bfloat16())
        prompt = torch.randint(3, config["vocab_size"], (BATCH, PROMPT))
        mask = torch.ones_like(prompt)
        tokens = model.generate(prompt, attention_mask=mask, pad_token_id=0)
        assert tokens.shape == (BATCH, PROMPT + STEPS), tokens.shape
        return model, tokens, model(tokens).logits

    return of


def random_weight(key, shape):
    """Weight that keeps activations near 1 and makes every term matter, as trained weights do."""
    normal = torch.randn(shape)
    if key == "model.norm.weight":
        return 4 + normal  # logits of a few units, where the soft cap bends them
    if key.endswith(("q_norm.weight", "k_norm.weight")):
        # Scores of about 2: the attention scale being 1, trained scales make up for sqrt(D) too.
        return 2**0.5 * shape[0] ** -0.25 * (1 + 0.25 * normal)
    if len(shape) == 1:
        return 1 + 0.25 * normal  # norm scales, per-expert scales and layer scalars
    if key.endswith("router.proj.weight"):
        return normal  # its input has norm 1, not sqrt(E)
    return normal * shape[-1] ** -0.5


def has_margins(sampled):
    _, tokens, logits = sampled
    steps = logits[:, PROMPT - 1 : -1]
    assert torch.equal(steps.argmax(-1), tokens[:, PROMPT:])
    best = steps.topk(2).values
    distinct = min(len(set(row)) for row in tokens[:, PROMPT:].tolist())
    # And a text that says something: models of random weights often repeat one token.
    return (best[..., 0] - best[..., 1]).min() > MIN_MARGIN and distinct > STEPS // 4


if __name__ == "__main__":
    main()

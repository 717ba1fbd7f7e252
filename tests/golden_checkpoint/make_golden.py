"""Makes the fixtures beside this file: directories that `save_pretrained` of transformers wrote.

Run in an environment of its own, the project's tests only read the result:

    pip install torch==2.13.0 transformers==5.24.0 safetensors numpy
    python tests/golden_checkpoint/make_golden.py

The models are tiny, odd and random. For each one folder:

    what `save_pretrained` writes, in bfloat16, in one file or several
    old_config.json      the config in the form of transformers before 5.15, which this release
                         reads as the same config
    golden.npz           of a model, tokens int32 [B, PROMPT + STEPS]: a random prompt and what
                         `generate` appends to it greedily
                         of an assistant, tokens int32 [B, DRAFTS]: what it drafts greedily after
                         the first LENGTH + 1 tokens of its target's fixture, of which the first
                         LENGTH are in the target's caches

All is computed in float32. The weights are bfloat16 numbers, so nothing is lost in storing them.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, DynamicCache, GenerationConfig

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "golden_model"))
from make_golden import F, S, random_weight  # noqa: E402

BATCH, PROMPT, STEPS = 2, 11, 24
LENGTH, DRAFTS = 13, 4
# The two best tokens of every step differ by more, so that rounding cannot change the choice.
MIN_MARGIN = 5e-3
SHARDED = "30KB"
ROPE = {
    S: {"rope_type": "default", "rope_theta": 1e4},
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
TEXT = {
    "vocab_size": 131,
    "hidden_size": 24,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 131,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 7,
    "max_position_embeddings": 64,
    "final_logit_softcapping": 30.0,
    "rope_parameters": ROPE,
}
UNIFIED = {k: v for k, v in TEXT.items() if not k.endswith("per_layer_input")}
K_EQ_V = {"attention_k_eq_v": True, "num_global_key_value_heads": 2}
SHARING = {
    "layer_types": [S, F, S, S, F],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 6,
    "use_double_wide_mlp": True,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 8,
}
UNIFIED_VISION = {
    "patch_size": 1,
    "pooling_kernel_size": 1,
    "mm_embed_dim": 8,
    "mm_posemb_size": 4,
    "output_proj_dims": 24,
}
OF_ASSISTANT = {
    "layer_types": [S, F],
    "num_kv_shared_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
}
# By the name of the folder: the class, the config, and the size of files.
MODELS = {
    "text": ("Gemma4ForCausalLM", TEXT | SHARING, None),
    # More than ten layers: numbers of layers have two digits.
    "text-experts": (
        "Gemma4ForCausalLM",
        TEXT
        | K_EQ_V
        | {
            "layer_types": ([S] * 3 + [F]) * 2 + [S, S, F],
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
            "intermediate_size": 16,
        },
        SHARDED,
    ),
    "text-untied": (
        "Gemma4ForCausalLM",
        TEXT | {"layer_types": [S, F, F], "tie_word_embeddings": False},
        None,
    ),
    "multimodal": (
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4",
            "text_config": {"model_type": "gemma4_text"} | TEXT | SHARING,
            "vision_config": {"model_type": "gemma4_vision"} | VISION,
        },
        SHARDED,
    ),
    "unified-text": (
        "Gemma4UnifiedForCausalLM",
        UNIFIED | K_EQ_V | {"layer_types": [S, F, S, F]},
        None,
    ),
    "unified": (
        "Gemma4UnifiedForConditionalGeneration",
        {
            "model_type": "gemma4_unified",
            "text_config": {"model_type": "gemma4_unified_text"}
            | UNIFIED
            | K_EQ_V
            | {"layer_types": [S, F, S, F]},
            "vision_config": {"model_type": "gemma4_unified_vision"} | UNIFIED_VISION,
        },
        SHARDED,
    ),
}
# By the name of the folder: the class, the target's folder and the text config.
ASSISTANTS = {
    "assistant": (
        "Gemma4AssistantForCausalLM",
        "text",
        {"model_type": "gemma4_text", **TEXT, **OF_ASSISTANT, "vocab_size_per_layer_input": 0},
    ),
    "unified-assistant": (
        "Gemma4UnifiedAssistantForCausalLM",
        "unified-text",
        {"model_type": "gemma4_unified_text", **UNIFIED, **OF_ASSISTANT, **K_EQ_V},
    ),
}


def main():
    assert transformers.__version__ == "5.24.0", transformers.__version__
    assert torch.__version__.startswith("2.13.0"), torch.__version__
    targets = {}
    for name, (model_class, config, shards) in MODELS.items():
        text = config.get("text_config", config)
        text["num_hidden_layers"] = len(text["layer_types"])
        model, tokens = first(sample_model(model_class, config))
        save(name, model, config, shards, tokens)
        targets[name] = model, tokens
    for name, (model_class, target, text) in ASSISTANTS.items():
        text["num_hidden_layers"] = len(text["layer_types"])
        config = {"text_config": text, "backbone_hidden_size": TEXT["hidden_size"]}
        model, tokens = first(sample_assistant(model_class, config, *targets[target]))
        save(name, model, config, None, tokens)


def save(name, model, config, shards, tokens):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    size = {} if shards is None else {"max_shard_size": shards}
    # A copy: buffers such as rotary frequencies would stay rounded.
    copy.deepcopy(model).bfloat16().save_pretrained(folder, **size)
    new = json.loads((folder / "config.json").read_text())
    old = json.loads((folder / "config.json").read_text())
    given = config.get("text_config", config)
    in_old = old.get("text_config", old)
    del in_old["per_layer_config"]
    in_old["global_head_dim"] = given["global_head_dim"]
    in_old["num_global_key_value_heads"] = given.get("num_global_key_value_heads")
    for said in (new, old):
        said.pop("transformers_version", None)
    as_read, expected = (AutoConfig.for_model(**said).to_dict() for said in (old, new))
    assert as_read == expected, name
    (folder / "old_config.json").write_text(json.dumps(old, indent=2) + "\n")
    np.savez_compressed(folder / "golden.npz", tokens=tokens.int().numpy())


def first(sample):
    """The first of many seeds that has margins."""
    return next(found for found in map(sample, range(1000)) if found is not None)


def built(model_class, config):
    model_class = getattr(transformers, model_class)
    config = model_class.config_class(**config)
    model = model_class._from_config(config, dtype=torch.float32, attn_implementation="eager")
    for key, weight in model.state_dict().items():
        if weight.is_floating_point():
            key = key.replace("model.language_model.", "model.")
            weight.copy_(random_weight(key, weight.shape).bfloat16())
    return model.eval()


def sample_model(model_class, config):
    """From a seed to (model, tokens), None if a choice is too close."""

    @torch.no_grad()
    def of(seed):
        torch.manual_seed(seed)
        model = built(model_class, config)
        # Without transformers' default end of text, for there to be STEPS tokens.
        generation, model.generation_config = (
            model.generation_config,
            GenerationConfig(do_sample=False, max_new_tokens=STEPS),
        )
        prompt = torch.randint(3, TEXT["vocab_size"], (BATCH, PROMPT))
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0)
        model.generation_config = generation
        steps = model(tokens).logits[:, PROMPT - 1 : -1]
        best = steps.topk(2).values
        distinct = min(len(set(row)) for row in tokens[:, PROMPT:].tolist())
        good = (best[..., 0] - best[..., 1]).min() > MIN_MARGIN and distinct > STEPS // 4
        return (
            (model, tokens) if good and torch.equal(steps.argmax(-1), tokens[:, PROMPT:]) else None
        )

    return of


def sample_assistant(model_class, config, target, tokens):
    """From a seed to (assistant, tokens [B, DRAFTS]), None if a choice is too close."""

    @torch.no_grad()
    def of(seed):
        torch.manual_seed(seed)
        model = built(model_class, config)
        drafts = [draft(model, target, row[None, : LENGTH + 1]) for row in tokens]
        if min(margin for _, margin in drafts) < MIN_MARGIN:
            return None
        return model, torch.stack([drafted for drafted, _ in drafts])

    return of


def draft(model, target, tokens):
    """(tokens [DRAFTS], the least margin) of one sequence."""
    cache = DynamicCache()  # without a config it drops nothing that left the window
    passed = target(tokens[:, :-1], past_key_values=cache, output_hidden_states=True)
    hidden, config = passed.hidden_states[-1][:, -1:], target.config
    shared = {
        layer_type: (layer.keys, layer.values)
        for layer_type, layer in zip(config.layer_types, cache.layers, strict=False)
    }
    token, drafted, margins = tokens[:, -1:], [], []
    for _ in range(DRAFTS):
        passed = model(
            inputs_embeds=torch.cat([target.get_input_embeddings()(token), hidden], dim=-1),
            position_ids=torch.tensor([[LENGTH]]),
            shared_kv_states=shared,
            use_cache=False,
        )
        token, hidden = passed.logits.argmax(-1), passed.last_hidden_state
        best = passed.logits[0, 0].topk(2).values
        drafted.append(token[0, 0])
        margins.append((best[0] - best[1]).item())
    return torch.stack(drafted), min(margins)


if __name__ == "__main__":
    main()

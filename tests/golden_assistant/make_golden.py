"""Makes the fixtures beside this file: Hugging Face's Gemma 4 assistants, tiny and random.

Run in an environment of its own, the project's tests only read the result:

    pip install torch==2.15.0 transformers==5.23.0 safetensors numpy
    python tests/golden_assistant/make_golden.py

Each assistant drafts for a model of `tests/golden_model`, which is run here for its keys, values
and hidden states. For each of the two, one folder, named as its target is:

    config.json          of the assistant
    model.safetensors    weights in bfloat16
    golden.npz           target_hidden float32 [B, E]: of the last token that is in the caches
                         logits float32 [B, DRAFTS, V]
                         hidden float32 [B, DRAFTS, E], projected back to the target's width
                         tokens int32 [B, DRAFTS], the likeliest

Sequence b has the first LENGTHS[b] tokens of the target's fixture in the caches, and the next one
is the first that the assistant reads. It drafts as transformers does: each of its tokens and hidden
states goes into the next pass, at the same position. All is computed in float32, one sequence at a
time. The weights are bfloat16 numbers, so nothing is lost in storing them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, Gemma4AssistantForCausalLM
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

TARGETS = Path(__file__).parents[1] / "golden_model"
sys.path.insert(0, str(TARGETS))
from make_golden import COMMON, K_EQ_V, F, S, random_weight  # noqa: E402

LENGTHS, DRAFTS = (5, 80), 4  # shorter than the window of 8, and longer than a ring of 64
# Rounding cannot change which token is the best or which centroids are.
MIN_MARGIN = 5e-3
TEXT = COMMON | {
    "hidden_size": 24,
    "intermediate_size": 32,
    "vocab_size_per_layer_input": 0,
}
ASSISTANTS = {
    # Keys and values of projections of their own. Two KV heads in layers of both types.
    "gemma-4-e4b": {
        "layer_types": [S, S, S, F],
        "backbone_hidden_size": 48,
        "use_ordered_embeddings": True,
        "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
    },
    # K = V on the target's full layers, and as many heads as it has there.
    "gemma-4-31b": K_EQ_V
    | {
        "layer_types": [S, F, S, F],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "backbone_hidden_size": 64,
        "use_ordered_embeddings": False,
        "num_centroids": 16,
        "centroid_intermediate_top_k": 4,
    },
}
OF_ASSISTANT = (
    "backbone_hidden_size",
    "use_ordered_embeddings",
    "num_centroids",
    "centroid_intermediate_top_k",
)
# 5.23.0 builds no assistant: this property looks for producers among the model's own layers, and
# refuses a model that has none. In the modules that use it, "reuse" is what is meant.
_sharing_modes = Gemma4TextConfig.kv_sharing_modes
Gemma4TextConfig.kv_sharing_modes = property(
    lambda config: (
        ["reuse"] * config.num_hidden_layers
        if config.num_kv_shared_layers == config.num_hidden_layers
        else _sharing_modes.fget(config)
    )
)


def main():
    assert transformers.__version__ == "5.23.0", transformers.__version__
    assert torch.__version__.startswith("2.15.0"), torch.__version__
    for name, changes in ASSISTANTS.items():
        layers = len(changes["layer_types"])
        text = TEXT | {key: value for key, value in changes.items() if key not in OF_ASSISTANT}
        text |= {"num_hidden_layers": layers, "num_kv_shared_layers": layers}
        config = {"model_type": "gemma4_assistant", "tie_word_embeddings": True}
        config |= {key: changes[key] for key in OF_ASSISTANT} | {"text_config": text}
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        target = AutoModelForCausalLM.from_pretrained(
            TARGETS / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        seeds = map(sample(config, target, np.load(TARGETS / name / "golden.npz")), range(100))
        model, golden = next(sampled for sampled in seeds if sampled is not None)
        weights = model.state_dict()
        del weights["lm_head.weight"]  # the embedding, which published checkpoints hold once
        weights = {
            key: weight.bfloat16() if weight.is_floating_point() else weight
            for key, weight in weights.items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        np.savez_compressed(folder / "golden.npz", **golden)


def sample(config, target, fixture):
    """From a seed to (model, golden), None if a choice is too close."""

    @torch.no_grad()
    def of(seed):
        torch.manual_seed(seed)
        assistant_config = transformers.Gemma4AssistantConfig(**config)
        model = Gemma4AssistantForCausalLM._from_config(
            assistant_config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for key, weight in model.state_dict().items():
            if key == "masked_embedding.token_ordering":
                weight.copy_(torch.randperm(len(weight)))
            else:
                weight.copy_(random_weight(key, weight.shape).bfloat16())
        margins, sequences = [], []
        for tokens, length in zip(torch.tensor(fixture["tokens"]).long(), LENGTHS, strict=True):
            sequences.append(draft(model, target, tokens[None, : length + 1], margins))
        if min(margins) < MIN_MARGIN:
            return None
        return model, {
            key: np.stack([sequence[key] for sequence in sequences]) for key in sequences[0]
        }

    return of


def draft(model, target, tokens, margins):
    """Arrays of one sequence in golden.npz."""
    length = tokens.shape[1] - 1
    cache = DynamicCache()  # without a config it drops nothing that left the window
    passed = target(tokens[:, :-1], past_key_values=cache, output_hidden_states=True)
    hidden = passed.hidden_states[-1][:, -1:]
    config = target.config
    producers = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    shared = {}
    for index, layer_type in enumerate(producers):
        shared[layer_type] = cache.layers[index].keys, cache.layers[index].values
    assert all(k.shape[2] == length for k, _ in shared.values())
    out = {"target_hidden": hidden[0, 0].numpy()}
    token, drafts = tokens[:, -1:], []
    for _ in range(DRAFTS):
        passed = model(
            inputs_embeds=torch.cat([target.get_input_embeddings()(token), hidden], dim=-1),
            position_ids=torch.tensor([[length]]),
            shared_kv_states=shared,
            use_cache=False,
            output_hidden_states=True,
        )
        token, hidden = passed.logits.argmax(-1), passed.last_hidden_state
        drafts.append((passed.logits[0, 0], hidden[0, 0], token[0, 0].int()))
        best = passed.logits[0, 0].topk(2).values
        margins.append((best[0] - best[1]).item())
        if model.masked_embedding is not None:
            top = model.config.centroid_intermediate_top_k
            scores = model.masked_embedding.centroids(passed.hidden_states[-1])[0, 0]
            best = scores.topk(top + 1).values
            margins.append((best[-2] - best[-1]).item())
    for key, values in zip(("logits", "hidden", "tokens"), zip(*drafts, strict=True), strict=True):
        out[key] = torch.stack(values).numpy()
    return out


if __name__ == "__main__":
    main()

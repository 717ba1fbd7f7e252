"""Time of a group of speculative decoding, of its parts, and of plain decoding.

    python -m bench.speculative [--out DIR]

Writes speculative.json and speculative.png: 31B and the assistant of `assistant_of`, random
bfloat16 weights, k = 4 drafts a group, caches as the command `decode_step` has them, filled to 8192
tokens with random numbers. Random weights agree on nothing, so the rule that accepts drafts is
`Forced`: it does the work of the greedy one, and accepts as many as it is told. By the host's clock
over chained, donated steps:

    plain     one token of every sequence, the likeliest
    verify    the target's step of k + 1 tokens, and acceptance
    draft     one of k passes of the assistant, chained as in a group
    group     k drafts, verify, and what goes to the next group, by the share that is accepted

The limit of a step is the bytes that must move over the rate of a float32 sum in the same run. The
weights and what tokens see of the caches, at the context that the steps start from, are counted
once for all tokens of a step.
"""

import dataclasses
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bench.ablated_attention import Variant
from bench.decode_step import Case, random_like, step_ms
from bench.measure import machine, output_folder, profile_step, read_gbps, write_json
from g4attn_jax import Gemma4Config
from g4attn_jax.assistant_config import AssistantConfig, AssistantTextConfig
from g4attn_jax.cache import KVCache, bytes_per_token
from g4attn_jax.model import Gemma4Assistant
from g4attn_jax.model.acceptance import Greedy
from g4attn_jax.speculative import Drafts, LastTokens, draft, verify

MODEL = "gemma-4-31b"
CONTEXT = 8192
BATCHES = (1, 8, 32)
DRAFTS = 4
ACCEPTED = (0, 2, 4)  # of them, in every group
MAX_VERIFY, MAX_VERIFY_BATCH = 1.15, 8  # of a plain step, up to so many sequences


class Forced(NamedTuple):
    """The likeliest tokens, as `Greedy`, but so many drafts stay, whatever they are."""

    accepted: jax.Array

    def draft(self, logits, position):
        return Greedy().draft(logits, position)

    def accept(self, logits, drafts, draft_probs, num_drafts, position):
        # Which row is the last is not known when compiling: the best of all of them are computed.
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        num_accepted = jnp.full_like(num_drafts, self.accepted)
        return num_accepted, jnp.take_along_axis(best, num_accepted[:, None], axis=1)[:, 0]


def assistant_of(target: Gemma4Config) -> AssistantConfig:
    """Four layers of 1024 numbers a token, with the target's heads: the shapes of 31B's assistant.

    Source: defaults of `Gemma4AssistantConfig` in Modular's MAX
    (https://docs.modular.com/max/api/python/pipelines.architectures.gemma4_assistant/). They leave
    the types of the layers open: here three sliding ones and a full one.
    """
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}
    fields |= {
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": ("sliding_attention",) * 3 + ("full_attention",),
        "enable_moe_block": False,
    }
    return AssistantConfig(
        text=AssistantTextConfig(**fields),
        backbone_hidden_size=target.hidden_size,
        use_ordered_embeddings=False,
    )


class Group(Case):
    """The programs of a group for a number of sequences.

    All but the plain step are compiled as (what stays, state) to the next state.
    """

    def __init__(self, target, assistant, batch, context):
        capacity = context + 512  # the most that all steps of a measurement add is 5 * 65
        super().__init__(target, Variant.COMPACT, batch, capacity, max_new_tokens=DRAFTS + 1)
        self.context, self.assistant = context, assistant
        abstract = nnx.eval_shape(lambda: Gemma4Assistant(assistant, rngs=nnx.Rngs(0)))
        self.assistant_graph, self.assistant_params = nnx.split(abstract)

    def compile_all(self):
        """The programs by name: first those of 1 and k + 1 tokens, each in peace."""
        token = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        drafts = jax.ShapeDtypeStruct((self.batch, DRAFTS), jnp.int32)
        hidden = jax.ShapeDtypeStruct((self.batch, self.config.hidden_size), jnp.bfloat16)
        rule, caches = Forced(jax.ShapeDtypeStruct((), jnp.int32)), self.caches()
        models = self.params, self.assistant_params
        programs = {
            "verify": (self._verify, (self.params, drafts, rule), (token, token, caches)),
            "draft": (self._draft, (*models, caches), (token, token, hidden)),
            "group": (self._group, (*models, rule), (token, token, hidden, caches)),
        }

        def compiled(name):
            f, *arguments = programs[name]
            return name, jax.jit(f, donate_argnums=1).lower(*arguments).compile()

        alone = {"plain": self.step()} | dict([compiled("verify")])
        with ThreadPoolExecutor() as pool:
            return alone | dict(pool.map(compiled, ("draft", "group")))

    def start(self):
        """(tokens, positions, hidden states), all sequences at the context's end."""
        token, position = (x[:, 0] for x in self.tokens(self.context))
        shape = self.batch, self.config.hidden_size
        return token, position, jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)

    def draft_bytes(self):
        """That one draft must move."""
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.assistant_params))
        for layer_type in self.assistant.text.layer_types:
            producer = self.config.attention_spec(self.config.layer_types.index(layer_type))
            seen = min(self.context, producer.sliding_window or self.context)
            form = self.forms.get(layer_type, KVCache)
            total += self.batch * seen * bytes_per_token(producer, form)
        return total

    def _verify(self, stays, state):
        (params, drafts, rule), (token, position, caches) = stays, state
        drafts = Drafts(drafts, None, jnp.full(self.batch, DRAFTS, jnp.int32))
        verified = self._verified(params, LastTokens(token, position), drafts, caches, rule)
        return verified.tokens[:, 0], position + 1, verified.cache

    def _draft(self, stays, state):
        (*models, caches), (token, position, hidden) = stays, state
        last = LastTokens(token, position, hidden)
        return self._drafted(models, last, caches, Greedy()).tokens[:, -1], position, hidden

    def _group(self, stays, state):
        (*models, rule), (token, position, hidden, caches) = stays, state
        last = LastTokens(token, position, hidden)
        drafts = self._drafted(models, last, caches, rule)
        verified = self._verified(models[0], last, drafts, caches, rule)
        newest = verified.num_accepted[:, None]
        token = jnp.take_along_axis(verified.tokens, newest, axis=1)[:, 0]
        position += verified.num_accepted + 1
        return token, position, verified.hidden, verified.cache

    def _drafted(self, models, last, caches, rule):
        graphs = self.graph, self.assistant_graph
        decoder, assistant = map(nnx.merge, graphs, models)
        return draft(decoder, assistant, last, caches, rule, draft_tokens=DRAFTS)

    def _verified(self, params, last, drafts, caches, rule):
        decoder = nnx.merge(self.graph, params)
        return verify(decoder, last, drafts, caches, rule)


def measure_batch(case, params, of_assistant, gbps):
    """(plain step, verify and draft; a row for each number of accepted drafts) of one batch."""
    programs, caches = case.compile_all(), random_like(case.caches())
    models = params, of_assistant
    token, position, _ = case.start()
    state = token[:, None], position[:, None], caches
    plain, (*_, caches) = _measure(programs["plain"], params, state)
    drafts = jnp.broadcast_to(jnp.arange(DRAFTS, dtype=jnp.int32), (case.batch, DRAFTS))
    stays = params, drafts, Forced(jnp.int32(0))
    verifying, (*_, caches) = _measure(programs["verify"], stays, (*case.start()[:2], caches))
    drafting, _ = _measure(programs["draft"], (*models, caches), case.start(), steps=DRAFTS)
    step_limit, draft_limit = (
        total / gbps / 1e6 for total in (case.bytes(case.context), case.draft_bytes())
    )
    head = {"batch": case.batch, "context": case.context}
    parts = head | {
        "plain": plain,
        "verify": verifying,
        "draft": drafting,
        "limit_ms": {"plain": round(step_limit, 3), "draft": round(draft_limit, 3)},
        "verify_over_plain": round(verifying["ms"] / plain["ms"], 3),
    }
    print(parts, flush=True)
    rows = []
    for accepted in ACCEPTED:
        stays = *models, Forced(jnp.int32(accepted))
        group, (*_, caches) = _measure(programs["group"], stays, (*case.start(), caches))
        tokens = 1 + accepted
        rows.append(
            head
            | {"drafts": DRAFTS, "acceptance": accepted / DRAFTS, "tokens_per_group": tokens}
            | {f"group_{key}": value for key, value in group.items()}
            | {
                "limit_ms": round(step_limit + DRAFTS * draft_limit, 3),
                "tokens_per_s": round(1e3 * case.batch * tokens / group["ms"], 1),
                "plain_tokens_per_s": round(1e3 * case.batch / plain["ms"], 1),
                "speedup": round(tokens * plain["ms"] / group["ms"], 3),
            }
        )
        print(rows[-1], flush=True)
    return parts, rows


def _measure(program, stays, state, steps=1):
    """(time and launches of one of `steps` in each call, the state after all calls)."""
    times, state = step_ms(program, stays, state)
    kernels, state = profile_step(program, stays, state)
    measured = {
        "ms": round(statistics.median(times) / steps, 3),
        "min_max_ms": [round(min(times) / steps, 3), round(max(times) / steps, 3)],
        "launches": len(kernels) / steps,
        "kernels_ms": round(sum(ms for _, ms in kernels) / steps, 3),
    }
    return measured, state


def missed_bar(parts):
    """What the project's sixth issue asks of verify and is not reached; empty if nothing is."""
    ratio = parts["verify_over_plain"]
    if parts["batch"] > MAX_VERIFY_BATCH or ratio <= MAX_VERIFY:
        return ""
    return f"verify/plain {ratio:.3f} > {MAX_VERIFY}"


def plot(head, rows, path):
    """What a group's time goes to, beside a plain step; and tokens/s by acceptance."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    steps = head["steps"]
    at = range(len(steps))
    plain, verify_ms, draft_ms = (
        [parts[name]["ms"] for parts in steps] for name in ("plain", "verify", "draft")
    )
    drafts_ms = [DRAFTS * ms for ms in draft_ms]
    left.bar([x - 0.2 for x in at], plain, 0.38, label="plain step", color="tab:gray")
    left.bar([x + 0.2 for x in at], verify_ms, 0.38, label="verify", color="tab:blue")
    left.bar(
        [x + 0.2 for x in at],
        drafts_ms,
        0.38,
        verify_ms,
        label=f"{DRAFTS} drafts",
        color="tab:cyan",
    )
    left.set_xticks(at, [f"B = {parts['batch']}" for parts in steps])
    left.set(title="a group and a plain step", ylabel="ms")
    left.legend()
    for parts, color in zip(steps, ("tab:green", "tab:orange", "tab:red"), strict=False):
        of_batch = [row for row in rows if row["batch"] == parts["batch"]]
        shares = [row["acceptance"] for row in of_batch]
        label = f"B = {parts['batch']}"
        right.plot(shares, [r["speedup"] for r in of_batch], "o-", color=color, label=label)
    right.axhline(1, color="k", ls="--", lw=1, label="plain decoding")
    right.set(title="speedup", xlabel="share of drafts accepted", ylabel="tokens/s over plain's")
    right.legend()
    figure.suptitle(
        f"31B, {DRAFTS} drafts, context {steps[0]['context']}, bfloat16, {head['gpu']}, "
        f"JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def main():
    """Measures, prints, writes."""
    folder = output_folder(__doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    gbps = read_gbps()
    head = machine() | {
        "read_gbps": round(gbps, 1),
        "command": "python -m bench.speculative",
        "model": MODEL,
        "steps": [],
    }
    measure(Gemma4Config.preset(MODEL), BATCHES, CONTEXT, gbps, head, folder)


def measure(target, batches, context, gbps, head, folder):
    """All of a target, written to `folder`."""
    cases = [Group(target, assistant_of(target), batch, context) for batch in batches]
    params, of_assistant = (
        random_like(structs) for structs in (cases[0].params, cases[0].assistant_params)
    )
    rows = []
    for case in cases:
        parts, of_batch = measure_batch(case, params, of_assistant, gbps)
        head["steps"].append(parts)
        rows += of_batch
        write_json(folder / "speculative.json", head, rows)  # so far
    for parts in head["steps"]:
        times = "  ".join(
            f"{name} {parts[name]['ms']:.3f} ms" for name in ("plain", "verify", "draft")
        )
        print(f"B={parts['batch']:<3} {times}", missed_bar(parts))
    plain = {parts["batch"]: parts["plain"]["launches"] for parts in head["steps"]}
    for row in rows:
        print(
            f"B={row['batch']:<3} {row['acceptance']:.2f} accepted: {row['group_ms']:.3f} ms, "
            f"{row['group_launches']:.0f} launches, {row['tokens_per_s']} tokens/s, "
            f"{row['speedup']:.2f} of plain, whose step is {plain[row['batch']]:.0f} launches"
        )
    plot(head, rows, folder / "speculative.png")
    print("batches that miss the bar:", sum(map(bool, map(missed_bar, head["steps"]))))


if __name__ == "__main__":
    main()

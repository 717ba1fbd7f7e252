"""Time of a group of speculative decoding, of its parts, and of plain decoding.

31B and the assistant of `assistant_of`, random bfloat16 weights, 4 drafts a group, caches as in
`decode_step`, filled to 8192 tokens with random numbers. Random weights agree on nothing, so the
rule that accepts drafts is `Forced`: it does the work of the greedy one, and accepts as many as it
is told. Times are by the host's clock over chained, donated steps.

The limit of a step is the bytes that must move over the rate of a float32 sum in the same run. The
weights and what tokens see of the caches, at the context that the steps start from, are counted
once for all tokens of a step.
"""

import dataclasses
import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bench import measure
from bench.benchmark import Bar, Benchmark, Point
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, random_like
from g4attn_jax import Gemma4Config, split_weights
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
PROGRAMS = {
    "plain": "one token of every sequence, the likeliest",
    "verify": "the target's step of 4 drafts and the token before them, and acceptance",
    "draft": "one of 4 passes of the assistant, chained as in a group",
    "group": "4 drafts, their verification, and what goes to the next group",
}


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


class Group(StepCase):
    """The programs of a group for a number of sequences."""

    def __init__(self, target, batch):
        capacity = CONTEXT + 512  # the most that all steps of a measurement add is 5 * 65
        super().__init__(target, Variant.COMPACT, batch, capacity, max_new_tokens=DRAFTS + 1)
        self.assistant = assistant_of(target)
        abstract = nnx.eval_shape(lambda: Gemma4Assistant(self.assistant, rngs=nnx.Rngs(0)))
        self.merge_assistant, self.assistant_weights = split_weights(abstract)

    def programs(self):
        """Compiled programs by name, (what stays, state) to the next state.

        Plain steps and verifications are compiled by themselves, to choose their matmuls in peace.
        """
        alone = {"plain": self.step(), "verify": self._compiled("verify")}
        names = "draft", "group"
        with ThreadPoolExecutor() as pool:
            return alone | dict(zip(names, pool.map(self._compiled, names), strict=True))

    def draft_step(self):
        """The compiled program "draft": `DRAFTS` passes of the assistant."""
        return self._compiled("draft")

    def _compiled(self, name):
        token = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        drafts = jax.ShapeDtypeStruct((self.batch, DRAFTS), jnp.int32)
        hidden = jax.ShapeDtypeStruct((self.batch, self.config.hidden_size), jnp.bfloat16)
        rule, cache = Forced(jax.ShapeDtypeStruct((), jnp.int32)), self.cache()
        models = self.weights, self.assistant_weights
        f, *arguments = {
            "verify": (self._verify, (self.weights, drafts, rule), (token, token, cache)),
            "draft": (self._draft, (*models, cache), (token, token, hidden)),
            "group": (self._group, (*models, rule), (token, token, hidden, cache)),
        }[name]
        return jax.jit(f, donate_argnums=1).lower(*arguments).compile()

    def start(self):
        """(tokens, positions, hidden states), all sequences at the context's end."""
        token, position = (x[:, 0] for x in self.tokens(CONTEXT))
        shape = self.batch, self.config.hidden_size
        return token, position, jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)

    def draft_bytes(self):
        """Bytes that one draft must move."""
        total = sum(x.size * x.dtype.itemsize for x in self.assistant_weights)
        for layer_type in self.assistant.text.layer_types:
            producer = self.config.attention_spec(self.config.layer_types.index(layer_type))
            seen = min(CONTEXT, producer.sliding_window or CONTEXT)
            form = self.forms.get(layer_type, KVCache)
            total += self.batch * seen * bytes_per_token(producer, form)
        return total

    def _verify(self, stays, state):
        (weights, drafts, rule), (token, position, cache) = stays, state
        drafts = Drafts(drafts, None, jnp.full(self.batch, DRAFTS, jnp.int32))
        last = LastTokens(token, position)
        verified = verify(self.merge(weights), last, drafts, cache, rule)
        return verified.tokens[:, 0], position + 1, verified.cache

    def _draft(self, stays, state):
        (*models, cache), (token, position, hidden) = stays, state
        drafts = self._drafted(*models, LastTokens(token, position, hidden), cache, Greedy())
        return drafts.tokens[:, -1], position, hidden

    def _group(self, stays, state):
        (*models, rule), (token, position, hidden, cache) = stays, state
        last = LastTokens(token, position, hidden)
        drafts = self._drafted(*models, last, cache, rule)
        verified = verify(self.merge(models[0]), last, drafts, cache, rule)
        newest = verified.num_accepted[:, None]
        token = jnp.take_along_axis(verified.tokens, newest, axis=1)[:, 0]
        return token, position + verified.num_accepted + 1, verified.hidden, verified.cache

    def _drafted(self, weights, assistant_weights, last, cache, rule):
        models = self.merge(weights), self.merge_assistant(assistant_weights)
        return draft(*models, last, cache, rule, draft_tokens=DRAFTS)


def points():
    """A number of sequences and a program; groups by the number of accepted drafts."""
    of_batch = [(name, None) for name in PROGRAMS if name != "group"]
    of_batch += [("group", accepted) for accepted in ACCEPTED]
    return [
        Point({"batch": batch, "context": CONTEXT, "program": program, "accepted": accepted})
        for batch in BATCHES
        for program, accepted in of_batch
    ]


def rows(points, gbps):
    """A row for each point."""
    config = Gemma4Config.preset(MODEL)
    first = Group(config, 1)
    weights, assistant_weights = map(random_like, (first.weights, first.assistant_weights))
    for batch, of_batch in itertools.groupby(points, lambda point: point.fields["batch"]):
        case = Group(config, batch)
        programs, cache = case.programs(), random_like(case.cache())
        limits = _limits(case, gbps)
        for point in of_batch:
            program, accepted = point.fields["program"], point.fields["accepted"]
            models = weights, assistant_weights
            stays, state = _arguments(case, program, accepted, models, cache)
            measured, state = _measure(programs[program], stays, state, program)
            if program != "draft":  # the draft only reads the cache
                cache = state[-1]
            del stays, state
            tokens = {"plain": 1, "group": 1 + (accepted or 0)}.get(program)
            yield (
                point.fields
                | measured
                | {
                    "limit_ms": round(limits[program], 3),
                    "tokens_per_s": tokens and round(1e3 * batch * tokens / measured["ms"], 1),
                }
            )


def _limits(case, gbps):
    """Milliseconds of the bytes that each program must move."""
    step, one = (total / gbps / 1e6 for total in (case.bytes(CONTEXT), case.draft_bytes()))
    return {"plain": step, "verify": step, "draft": one, "group": step + DRAFTS * one}


def _arguments(case, program, accepted, models, cache):
    """(what stays, first state) of a program."""
    token, position, hidden = case.start()
    if program == "plain":
        return models[0], (token[:, None], position[:, None], cache)
    if program == "draft":
        return (*models, cache), (token, position, hidden)
    if program == "group":
        return (*models, Forced(jnp.int32(accepted))), (token, position, hidden, cache)
    drafts = jnp.broadcast_to(jnp.arange(DRAFTS, dtype=jnp.int32), (case.batch, DRAFTS))
    return (models[0], drafts, Forced(jnp.int32(0))), (token, position, cache)


def _measure(compiled, stays, state, program):
    """(fields of a program's row, the state after all calls); a call drafts several times."""
    passes = DRAFTS if program == "draft" else 1
    times, state = measure.step_ms(compiled, stays, state)
    kernels, state = measure.profile_step(compiled, stays, state)
    fields = {
        "ms": round(statistics.median(times) / passes, 3),
        "min_max_ms": [round(min(times) / passes, 3), round(max(times) / passes, 3)],
        "launches": len(kernels) / passes,
        "kernels_ms": round(sum(ms for _, ms in kernels) / passes, 3),
        "kernels": measure.kernel_table(kernels, passes),
    }
    return fields, state


def plot(rows, head, path):
    """Bars of the parts of a group's time, beside a plain step; lines of tokens/s by acceptance."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    ms = {(row["batch"], row["program"]): row["ms"] for row in rows if row["program"] != "group"}
    at = range(len(BATCHES))
    plain, verifying, drafting = (
        [ms[batch, name] for batch in BATCHES] for name in ("plain", "verify", "draft")
    )
    drafting = [DRAFTS * one for one in drafting]
    right_half = [x + 0.2 for x in at]
    left.bar([x - 0.2 for x in at], plain, 0.38, label="plain step", color="tab:gray")
    left.bar(right_half, verifying, 0.38, label="verify", color="tab:blue")
    left.bar(right_half, drafting, 0.38, verifying, label=f"{DRAFTS} drafts", color="tab:cyan")
    left.set_xticks(at, [f"B = {batch}" for batch in BATCHES])
    left.set(title="a group and a plain step", ylabel="ms")
    left.legend()
    for batch, color in zip(BATCHES, ("tab:green", "tab:orange", "tab:red"), strict=True):
        groups = [r for r in rows if r["batch"] == batch and r["program"] == "group"]
        shares = [row["accepted"] / DRAFTS for row in groups]
        plain_rate = 1e3 * batch / ms[batch, "plain"]
        speedups = [row["tokens_per_s"] / plain_rate for row in groups]
        right.plot(shares, speedups, "o-", color=color, label=f"B = {batch}")
    right.axhline(1, color="k", ls="--", lw=1, label="plain decoding")
    right.set(title="speedup", xlabel="share of drafts accepted", ylabel="tokens/s over plain's")
    right.legend()
    figure.suptitle(
        f"31B, {DRAFTS} drafts, context {CONTEXT}, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


BENCHMARK = Benchmark(
    name="speculative",
    about="a group of drafts and their verification on 31B, beside plain decoding",
    variants=PROGRAMS,
    identity=("batch", "context", "program", "accepted"),
    fields=(
        "ms",
        "min_max_ms",
        "launches",
        "kernels_ms",
        "kernels",
        "limit_ms",
        "tokens_per_s",
    ),
    points=points,
    measure=rows,
    watched={"ms": "min_max_ms", "launches": None},
    rate="read_gbps",
    head=lambda: {"model": MODEL, "drafts": DRAFTS},
    plot=plot,
    memory_fraction=0.94,
    bars=(
        Bar(
            of="ms",
            over="ms",
            beside={"program": "plain"},
            where={"program": "verify", "batch": (1, 8)},
            most=1.15,
            why="five tokens read the weights that one reads; otherwise drafting would not pay",
        ),
    ),
)

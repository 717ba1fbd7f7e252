"""Time of a whole decode step, with more and more of the kernels, and of a workload.

    python -m bench.decode_step [--out DIR] [--models NAME ...]

Writes decode_step.json and decode_step.png, where what was measured of other models before stays,
each row with the read rate of its run: 31B with every `Variant`, other sizes with the first
and the last, random bfloat16 weights, caches filled to 8192 tokens with random numbers, sliding
layers in rings. A step goes from tokens to the likeliest next ones; the next step takes them, each
sequence's shifted by a number of its own, so that sequences stay different and all experts have
work. Times are by the host's clock over chained, donated steps. The limit is the bytes that must
move (weights, of experts those that so many tokens choose if all are as likely; what each layer's
tokens see of the caches) over the rate of a float32 sum measured in the same run.

The workload is that of the original change: 32 prompts of 10 240 tokens, 800 new tokens each. A
prompt is prefilled by itself, in chunks, 32 times one that was measured; then all decode together,
800 times the mean of the measured steps in the first and last hundred of them.
"""

import collections
import functools
import json
import math
import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx

from bench.ablated_attention import Variant, ablate
from bench.measure import argument_parser, machine, profile_step, read_gbps, write_json
from g4attn_jax import CompactKVCache, Contiguous, Gemma4Config, Gemma4Decoder, KVCache, Ring
from g4attn_jax.cache import bytes_per_token

CONTEXT = 8192
BATCHES = (1, 8, 32)
STEPS, REPEATS = 20, 3
SHIPPED = Variant.COMPACT
MODELS = {
    "gemma-4-31b": tuple(Variant),
    "gemma-4-12b": (Variant.XLA, SHIPPED),
    "gemma-4-26b-a4b": (Variant.XLA, SHIPPED),
    "gemma-4-e4b": (Variant.XLA, SHIPPED),
}
WORKLOAD_MODEL = "gemma-4-31b"
WORKLOAD_VARIANTS = (Variant.XLA, Variant.K_EQ_V_NORM, Variant.QKV_NORM, Variant.COMPACT)
PROMPT, NEW_TOKENS, CHUNK = 10240, 800, 2048


class Case:
    """A model's step as a variant has it, for a number of sequences of `capacity` slots."""

    def __init__(self, config, variant, batch, capacity, max_new_tokens=1):
        self.config, self.batch, self.capacity = config, batch, capacity
        decoder = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
        self.graph, self.params = nnx.split(ablate(decoder, variant))
        self.layouts = {
            "full_attention": Contiguous(batch, capacity),
            "sliding_attention": Ring(batch, config.sliding_window, max_new_tokens),
        }
        compact = variant.has(Variant.COMPACT) and config.attention_k_eq_v
        self.forms = {"full_attention": CompactKVCache if compact else KVCache}

    def compiled(self, f, *arguments):
        """f(decoder, *arguments), the last one donated, compiled for structs of arguments."""

        def program(params, *arguments):
            return f(nnx.merge(self.graph, params), *arguments)

        jitted = jax.jit(program, donate_argnums=len(arguments))
        return jitted.lower(self.params, *arguments).compile()

    def caches(self):
        """Structs of the caches."""
        return nnx.eval_shape(
            lambda params: nnx.merge(self.graph, params).init_cache(self.layouts, self.forms),
            self.params,
        )

    def step(self):
        """The compiled step: (params, (tokens, positions, caches)) to the next of the latter."""

        def step(decoder, state):
            tokens, positions, caches = state
            logits, caches = decoder(tokens, decoder.plan(positions, caches), caches)
            likeliest = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            shift = 7919 * jnp.arange(1, self.batch + 1, dtype=jnp.int32)
            tokens = (likeliest + shift + positions[:, 0]) % self.config.vocab_size
            return tokens[:, None], positions + 1, caches

        token = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)
        return self.compiled(step, (token, token, self.caches()))

    def chunk(self, tokens):
        """The compiled prefill of a chunk: (params, tokens, positions, caches) to caches."""

        def prefill(decoder, tokens, positions, caches):
            at = jnp.zeros((self.batch, 0), jnp.int32)
            return decoder(tokens, decoder.plan(positions, caches), caches, logits_at=at)[1]

        token = jax.ShapeDtypeStruct((self.batch, tokens), jnp.int32)
        return self.compiled(prefill, token, token, self.caches())

    def tokens(self, position):
        """Random tokens, all at one position."""
        tokens = jax.random.randint(jax.random.key(1), (self.batch, 1), 0, self.config.vocab_size)
        return tokens, jnp.full((self.batch, 1), position, jnp.int32)

    def bytes(self, context):
        """That a step must move with `context` tokens in the caches."""
        config, total = self.config, 0
        for path, leaf in jax.tree.leaves_with_path(self.params):
            name = jax.tree_util.keystr(path)
            size = leaf.size * leaf.dtype.itemsize
            if "['per_layer_inputs']['embed_tokens']" in name:
                size *= self.batch / config.vocab_size_per_layer_input
            elif "['moe']" in name and leaf.ndim > 2:
                chosen = config.top_k_experts / config.num_experts
                size *= 1 - (1 - chosen) ** self.batch
            total += size
        for layer in range(config.num_hidden_layers):
            spec = config.attention_spec(layer)
            producer = config.attention_spec(spec.kv_layer)
            seen = min(context, spec.sliding_window or context)
            form = self.forms.get(config.layer_types[layer], KVCache)
            total += self.batch * seen * bytes_per_token(producer, form)
        return total


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return 0.02 * jax.random.normal(key, shape, dtype)


def random_like(structs):
    """Random numbers of deviation 0.02 for matrices and caches, ones for scales."""
    leaves, tree = jax.tree.flatten(structs)
    arrays = [
        _normal(jax.random.key(i), x.shape, x.dtype) if x.ndim > 1 else jnp.ones(x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, arrays)


def compile_all(cases):
    """Steps of several cases: one first, to choose matmuls in peace, the others side by side."""
    first = cases[0].step()
    with ThreadPoolExecutor(8) as pool:
        return [first, *pool.map(Case.step, cases[1:])]


def step_ms(step, params, state):
    """(ms of a step in each of the repeats, the state after them)."""
    times = []
    for steps in (3, *[STEPS] * REPEATS):
        start = time.perf_counter()
        for _ in range(steps):
            state = step(params, state)
        jax.block_until_ready(state)
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return times[1:], state  # without the first, which warmed up


def measure_batch(model, config, params, batch, gbps):
    """Rows of one model and batch."""
    cases = {v: Case(config, v, batch, CONTEXT + 256) for v in MODELS[model]}
    programs = dict(zip(cases, compile_all(list(cases.values())), strict=True))
    rows, caches, form = [], None, None
    for variant, case in cases.items():
        if case.forms != form:
            caches = None  # before there are others
            form, caches = case.forms, random_like(case.caches())
        times, state = step_ms(programs[variant], params, (*case.tokens(CONTEXT), caches))
        kernels, (_, _, caches) = profile_step(programs[variant], params, state)
        del state  # caches of another form need its memory
        rows.append(
            {
                "model": model,
                "variant": variant.letter,
                "batch": batch,
                "context": CONTEXT,
                "step_ms": round(statistics.median(times), 3),
                "min_max_ms": [round(min(times), 3), round(max(times), 3)],
                "limit_ms": round(case.bytes(CONTEXT) / gbps / 1e6, 3),
                "read_gbps": round(gbps, 1),
                "launches": len(kernels),
                "kernels_ms": round(sum(ms for _, ms in kernels), 3),
            }
        )
        print(rows[-1], *_longest(kernels), sep="\n    ", flush=True)
    return rows


def _longest(kernels):
    """The kernels that take most of a step, those that differ in a number alone together."""
    times, counts = collections.Counter(), collections.Counter()
    for name, ms in kernels:
        name = re.sub(r"[_.]?\d+", "", name)[:60]
        times[name] += ms
        counts[name] += 1
    return [f"{ms:7.3f} ms {counts[name]:4} {name}" for name, ms in times.most_common(14)]


def measure_workload(model, config, params, variant):
    """The original change's workload."""
    one = Case(config, variant, 1, PROMPT + NEW_TOKENS, CHUNK)
    chunk, caches = one.chunk(CHUNK), random_like(one.caches())
    tokens = jax.random.randint(jax.random.key(2), (1, PROMPT), 0, config.vocab_size)
    for end in (CHUNK, PROMPT):  # first a chunk, to warm up
        start = time.perf_counter()
        for first in range(0, end, CHUNK):
            positions = first + jnp.arange(CHUNK, dtype=jnp.int32)[None]
            caches = chunk(params, tokens[:, first : first + CHUNK], positions, caches)
        jax.block_until_ready(caches)
        prefill = 32 * (time.perf_counter() - start)
    del caches
    case = Case(config, variant, 32, PROMPT + NEW_TOKENS)
    step, caches, times = case.step(), random_like(case.caches()), []
    for position in (PROMPT, PROMPT + NEW_TOKENS - 100):
        more, (_, _, caches) = step_ms(step, params, (*case.tokens(position), caches))
        times += more
    decode = 1e-3 * NEW_TOKENS * statistics.mean(times)
    tokens_per_s = 32 / (prefill + decode)
    row = {
        "model": model,
        "variant": variant.letter,
        "prompts": 32,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "prefill_s": round(prefill, 2),
        "decode_s": round(decode, 2),
        "total_tokens_per_s": round(tokens_per_s * (PROMPT + NEW_TOKENS), 1),
        "output_tokens_per_s": round(tokens_per_s * NEW_TOKENS, 1),
        "mean_tpot_ms": round(statistics.mean(times), 3),
        "median_tpot_ms": round(statistics.median(times), 3),
    }
    print(row, flush=True)
    return row


def missed_bars(row, rows):
    """The bars of the project's fifth issue that a row does not reach, next to the others."""
    missed, same = [], {r["variant"]: r for r in rows if _place(r) == _place(row)}
    letters = [variant.letter for variant in Variant if variant.letter in same]
    index = letters.index(row["variant"])
    if row["model"] == "gemma-4-31b":
        before = same[letters[index - 1]]["min_max_ms"] if index else [math.inf] * 2
        if row["min_max_ms"][0] > before[1]:
            missed.append(f"slower than {letters[index - 1]}, {before} ms")
    if row["model"] == "gemma-4-31b" and row["variant"] == SHIPPED.letter:
        share, minimum = row["limit_ms"] / row["step_ms"], 0.90 if row["batch"] == 32 else 0.91
        if share < minimum:
            missed.append(f"limit/step {share:.3f} < {minimum}")
        speedup = same[Variant.XLA.letter]["step_ms"] / row["step_ms"]
        if row["batch"] == 32 and speedup < 1.15:
            missed.append(f"a/f {speedup:.3f} < 1.15")
    return missed


def _place(row):
    return row["model"], row["batch"]


def plot(rows, head, path):
    """Steps of 31B as shares of their limit, and first against last of the other models."""
    import matplotlib.pyplot as plt

    places = list(dict.fromkeys(map(_place, rows)))
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    names = {variant.letter: variant.value for variant in Variant}
    largest = [row for row in rows if row["model"] == "gemma-4-31b"]
    for i, (letter, name) in enumerate(names.items()):
        times = [row["step_ms"] for row in largest if row["variant"] == letter]
        at = [j + 0.12 * (i - 3) for j in range(len(times))]
        axes[0].bar(at, times, 0.11, label=name, color=plt.cm.viridis(i / 6))
    for j, batch in enumerate(BATCHES):
        limits = {r["limit_ms"] for r in largest if r["batch"] == batch}
        for limit in sorted(limits):
            label = "memory limit of a and of f" if j == 0 and limit == max(limits) else None
            axes[0].plot([j - 0.45, j + 0.45], [limit] * 2, "k--", lw=1, label=label)
    axes[0].set_xticks(range(len(BATCHES)), [f"B = {batch}" for batch in BATCHES])
    axes[0].set(title="31B, a step", ylabel="ms")
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    ends = (Variant.XLA.letter, SHIPPED.letter)
    for i, letter in enumerate(ends):
        shares = [
            next(
                (
                    r["limit_ms"] / r["step_ms"]
                    for r in rows
                    if _place(r) == place and r["variant"] == letter
                ),
                0,
            )
            for place in places
        ]
        at = [j + 0.4 * (i - 0.5) for j in range(len(places))]
        bars = axes[1].bar(at, shares, 0.38, label=names[letter], color=plt.cm.viridis(i * 0.99))
        axes[1].bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=7)
    labels = [f"{model.removeprefix('gemma-4-')}\n{batch}" for model, batch in places]
    axes[1].set_xticks(range(len(places)), labels, fontsize=7)
    axes[1].set(title="other sizes too, by B", ylabel="memory limit / step", ylim=(0, 1.1))
    axes[1].legend(fontsize=8, loc="upper right", ncols=2)
    figure.suptitle(
        f"A decode step at context {CONTEXT}, bfloat16, {head['gpu']}, JAX {head['jax']}"
    )
    figure.savefig(path, dpi=110)


def earlier(path, models, head):
    """(workload, rows) that a file has of models that are not measured now.

    Raises:
        ValueError: they are of another machine.
    """
    if not path.exists() or set(models) == set(MODELS):
        return [], []
    old = json.loads(path.read_text())
    different = [name for name, value in head.items() if old[name] != value]
    if different:
        raise ValueError(f"{path} has rows of another {', '.join(different)}; measure all models")
    return (
        [row for row in old[name] if row["model"] not in models] for name in ("workload", "rows")
    )


def main():
    """Measures, prints, writes."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="all if left out"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "decode_step.json"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    head = machine()
    workload, rows = earlier(path, args.models, head)
    gbps = read_gbps()
    head |= {
        "command": "python -m bench.decode_step",
        "variants": {variant.letter: variant.value for variant in Variant},
        "workload": workload,
    }

    def write():
        rows.sort(key=lambda row: (list(MODELS).index(row["model"]), row["batch"]))
        write_json(path, head, rows)

    for model in args.models:
        config = Gemma4Config.preset(model)
        params = random_like(Case(config, Variant.XLA, 1, CONTEXT).params)
        for batch in BATCHES:
            rows += measure_batch(model, config, params, batch, gbps)
            write()  # so far
        del params
    if WORKLOAD_MODEL in args.models:
        config = Gemma4Config.preset(WORKLOAD_MODEL)
        params = random_like(Case(config, Variant.XLA, 1, CONTEXT).params)
        for variant in reversed(WORKLOAD_VARIANTS):
            workload.insert(0, measure_workload(WORKLOAD_MODEL, config, params, variant))
            write()
    num_missed = 0
    for row in rows:
        missed = missed_bars(row, rows)
        num_missed += bool(missed)
        share = row["limit_ms"] / row["step_ms"]
        print(
            f"{row['model']:<16} B={row['batch']:<3} {row['variant']:<3} {row['step_ms']:8.3f} ms "
            f"limit {row['limit_ms']:8.3f} {share:.3f} {row['launches']} launches",
            ", ".join(missed),
        )
    plot(rows, head, path.with_suffix(".png"))
    print("rows that miss a bar:", num_missed)


if __name__ == "__main__":
    main()

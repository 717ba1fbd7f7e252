"""`generate`: tokens after a prompt, from a checkpoint or from random weights."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from g4attn_jax.assistant_config import AssistantConfig
from g4attn_jax.cache import model_bytes
from g4attn_jax.chat import ChatTemplate
from g4attn_jax.checkpoint import CheckpointError, load_assistant, load_hf
from g4attn_jax.checkpoint.models import abstract_model
from g4attn_jax.checks import check_integer
from g4attn_jax.commands import memory
from g4attn_jax.commands.answers import Answers
from g4attn_jax.config import Gemma4Config
from g4attn_jax.generation import Generator
from g4attn_jax.generation.checks import check_choices
from g4attn_jax.generation.programs import MAX_SLOTS
from g4attn_jax.generation.prompts import check_embedded, check_tokens
from g4attn_jax.generation.settings import GenerationSettings
from g4attn_jax.model import Gemma4Assistant, Gemma4Decoder
from g4attn_jax.model.embedding import num_embedded_tokens
from g4attn_jax.model.sampling import Sampling
from g4attn_jax.ops.op import XLA, check_implementation
from g4attn_jax.speculative import MAX_DRAFT_TOKENS, DraftStatistics

# The kernels read caches in whole tiles.
_CAPACITY_TILE = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """Request for generation, all of it checked but the weights.

    Attributes:
        config: of the model.
        checkpoint: where its weights are; None: random.
        assistant: where the assistant is, its weights too unless they are random; None: there is
            none.
        draft_tokens: the most drafts in a step; None: the generator's.
        tokenizer: a `tokenizers.Tokenizer`, or None.
        prompts: tokens of each.
        max_new_tokens: the most that follow a prompt.
        capacity: slots of each sequence.
        sampling: of the tokens.
        stop_tokens: that end a sequence.
        taken: what the checkpoint's files said of the last two, in words; empty if nothing.
        seed: of random weights and of sampling.
        implementation: of the kernels; None: what is fastest.
    """

    config: Gemma4Config
    checkpoint: Path | None
    assistant: Path | None
    draft_tokens: int | None
    tokenizer: Any | None
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    capacity: int
    sampling: Sampling
    stop_tokens: Sequence[int]
    taken: str
    seed: int
    implementation: str | None


def job_of(args: argparse.Namespace, config: Gemma4Config) -> Job:
    """The job that the arguments of the command describe; reads no weights.

    Standard error has a warning if a model that is tuned for chats is to read a prompt as it is.

    Raises:
        ValueError: arguments contradict each other, or what they name is not there or none that is
            accepted.
        NotImplementedError: the implementation cannot run here, or not this model.
    """
    check_implementation(args.implementation)
    tokenizer = None if args.checkpoint is None else _tokenizer(args)
    prompts = _prompts(args, config, tokenizer)
    settings = GenerationSettings()
    if args.checkpoint is not None:
        settings = GenerationSettings.from_hf(args.checkpoint, config.vocab_size)
    sampling = _sampling(args, settings, config)
    job = Job(
        config=config,
        checkpoint=args.checkpoint,
        assistant=args.assistant,
        draft_tokens=args.draft_tokens,
        tokenizer=tokenizer,
        prompts=prompts,
        max_new_tokens=args.max_new_tokens,
        capacity=_capacity(prompts, args.max_new_tokens),
        sampling=sampling,
        stop_tokens=_stop_tokens(args, settings, config.vocab_size),
        taken=_taken(args, settings, sampling),
        seed=args.seed,
        implementation=args.implementation,
    )
    _check_assistant(job)
    _check_kernels(job)
    return job


def generate(job: Job) -> None:
    """Loads or draws the weights, generates, and prints.

    Standard output has for each prompt in turn the text that follows it, if there is a tokenizer,
    as it is made, and the tokens. Standard error has what it took. Generation runs once for a token
    beforehand, so that no time is one of compiling.

    Raises:
        CheckpointError: weights cannot be read.
        OutOfMemory: the device has too little.
    """
    if job.taken:
        print(job.taken, file=sys.stderr)
    needs = _needs(job)
    memory.check_fits(needs)
    with memory.explained(needs):
        _generate(job)


def _generate(job):
    # The smaller model first: what is wrong with it is said soon.
    assistant = _assistant(job)
    generator = Generator(
        _decoder(job), capacity=job.capacity, assistant=assistant, draft_tokens=job.draft_tokens
    )
    arguments = {
        "sampling": job.sampling,
        "stop_tokens": job.stop_tokens,
        "key": jax.random.key(job.seed, impl="threefry2x32"),
    }
    start = time.perf_counter()
    generator(job.prompts, 1, **arguments)
    compiling = time.perf_counter() - start
    answers, clock = Answers(job), _Clock()

    def on_tokens(new):
        clock.count(new)
        answers.add(new)

    statistics = []
    if job.assistant is not None:
        arguments["on_drafts"] = statistics.append
    made = generator(job.prompts, job.max_new_tokens, on_tokens=on_tokens, **arguments)
    prompt_tokens, new_tokens = sum(map(len, job.prompts)), sum(map(len, made))
    print(
        f"{prompt_tokens} prompt tokens, {new_tokens} new tokens; compiled in {compiling:.1f} s, "
        f"first after {clock.first:.3f} s, then {clock.rate}",
        file=sys.stderr,
    )
    for of_call in statistics:
        print(_drafts(of_call), file=sys.stderr)


def _needs(job):
    """Bytes of weights and caches."""
    weights = [nnx.eval_shape(lambda: Gemma4Decoder(job.config, rngs=nnx.Rngs(0)))]
    if job.assistant is not None:
        config = _assistant_config(job.assistant)
        weights.append(nnx.eval_shape(lambda: Gemma4Assistant(config, rngs=nnx.Rngs(0))))
    leaves = jax.tree.leaves([nnx.state(model) for model in weights])
    # At the least: the generator's rings hold a window and a chunk, in whole tiles.
    ring = min(job.config.sliding_window, job.capacity)
    caches = model_bytes(job.config, job.capacity, compact=True, ring_capacity=ring)
    return {
        "weights take": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "caches": len(job.prompts) * caches,
    }


def _drafts(statistics: DraftStatistics) -> str:
    drafted, accepted = int(statistics.drafted.sum()), int(statistics.accepted.sum())
    rate = f" ({statistics.acceptance_rate:.1%})" if drafted else ""
    return (
        f"{accepted} of {drafted} drafts accepted{rate}, {statistics.tokens_per_step:.2f} tokens a "
        "target step"
    )


class _Clock:
    """Times at which tokens came."""

    def __init__(self):
        self._start = time.perf_counter()
        self.first, self._rest, self._last = 0.0, 0, 0.0

    def count(self, new: list[list[int]]) -> None:
        self._last = time.perf_counter() - self._start
        if self.first:
            self._rest += sum(map(len, new))
        else:
            self.first = self._last

    @property
    def rate(self) -> str:
        if not self._rest:
            return "none"
        return f"{self._rest / (self._last - self.first):.2f} tokens/s"


def _decoder(job):
    if job.checkpoint is not None:
        return _loaded("--checkpoint", load_hf, job.checkpoint, job.implementation)
    return Gemma4Decoder(job.config, rngs=_rngs(job.seed), implementation=job.implementation)


def _assistant(job):
    if job.assistant is None:
        return None
    config = _assistant_config(job.assistant)
    if job.checkpoint is not None:
        return _loaded("--assistant", load_assistant, job.assistant, job.implementation)
    return Gemma4Assistant(config, rngs=_rngs(job.seed + 1), implementation=job.implementation)


def _loaded(option, load, directory, implementation):
    try:
        return load(directory, implementation=implementation)
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error


def _rngs(seed):
    # The default generator of random bits needs, on a CPU, eight times the memory of the weight
    # that is drawn; this one none.
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))


def _check_assistant(job):
    if job.assistant is None:
        return
    if job.draft_tokens is not None:
        check_integer("draft_tokens", job.draft_tokens, most=MAX_DRAFT_TOKENS)
    try:
        _assistant_config(job.assistant).check_target(job.config)
    except ValueError as error:
        raise ValueError(f"--assistant: {error}") from error


def _check_kernels(job):
    """Refuses a demanded kernel that cannot run this model, before its weights are loaded."""
    if job.implementation in (None, XLA):
        return
    options = jnp.bfloat16, job.implementation
    assistant = None
    if job.assistant is not None:
        assistant = abstract_model(Gemma4Assistant, _assistant_config(job.assistant), *options)
    decoder = abstract_model(Gemma4Decoder, job.config, *options)
    Generator(decoder, capacity=job.capacity, assistant=assistant, draft_tokens=job.draft_tokens)


def _assistant_config(directory):
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    return AssistantConfig.from_hf(path)


def _sampling(args, settings, config):
    """The checkpoint's, with what is given instead."""
    names = ("temperature", "top_k", "top_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.suppress_token_ids is not None:
        name = "--suppress-token-ids"
        given["suppress_tokens"] = check_tokens(name, args.suppress_token_ids, config.vocab_size)
    sampling = dataclasses.replace(settings.sampling, **given)
    filters = [name for name in ("top_k", "top_p") if name in given]
    if filters and not sampling.temperature:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in filters)
        raise ValueError(f"{names} without a --temperature above 0 would change nothing")
    try:
        check_choices(sampling, config)
    except ValueError as error:
        raise ValueError(f"--suppress-token-ids: {error}") from error
    return sampling


def _taken(args, settings, sampling):
    """Lines on settings taken from the checkpoint's files, and on those not followed."""
    overridden = {
        "do_sample": args.temperature is not None,
        "temperature": args.temperature is not None,
        "top_k": args.top_k is not None or not sampling.temperature,
        "top_p": args.top_p is not None or not sampling.temperature,
        "suppress_tokens": args.suppress_token_ids is not None,
        "eos_token_id": args.stop_token_ids is not None,
    }
    taken = {name: value for name, value in settings.taken.items() if not overridden[name]}
    lines = []
    for words, fields in (("taken from", taken), ("not followed of", settings.not_followed)):
        if fields:
            listed = ", ".join(f"{name} {json.dumps(value)}" for name, value in fields.items())
            lines.append(f"{words} {args.checkpoint}: {listed}")
    return "\n".join(lines)


def _capacity(prompts, max_new_tokens):
    """Whole tiles for the longest prompt and what follows it."""
    longest = max(map(len, prompts))
    most = MAX_SLOTS // len(prompts) // _CAPACITY_TILE * _CAPACITY_TILE - longest
    if max_new_tokens > most:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}; accepted with these prompts: up to {most}"
        )
    return -(-(longest + max_new_tokens) // _CAPACITY_TILE) * _CAPACITY_TILE


def _tokenizer(args):
    """Tokenizer of the checkpoint; None if it cannot be had and is not needed."""
    path = args.checkpoint / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        problem = "the package tokenizers: pip install 'g4attn-jax[generate]'"
    else:
        if path.is_file():
            return _read_tokenizer(Tokenizer, path)
        problem = f"{path}, which is not there"
    for prompt in args.prompts:
        if prompt.option != "--token-ids":
            raise ValueError(f"{prompt.option} needs {problem}")
    return None


def _read_tokenizer(tokenizer_class, path):
    try:
        tokenizer = tokenizer_class.from_file(str(path))
    except Exception as error:  # the package raises no class of its own
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    # The file may ask for either, as it was set in training; a prompt is read as it is.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stop_tokens(args, settings, vocab_size):
    if args.stop_token_ids is not None:
        return check_tokens("--stop-token-ids", args.stop_token_ids, vocab_size)
    return settings.stop_tokens


def _prompts(args, config, tokenizer):
    if args.prompts:
        return _given_prompts(args, config, tokenizer)
    length = 16
    if args.prompt_len is not None:
        length = args.prompt_len
        if length + args.max_new_tokens > MAX_SLOTS:
            raise ValueError(
                f"--prompt-len is {length} and --max-new-tokens {args.max_new_tokens}; accepted: "
                f"{MAX_SLOTS} together"
            )
    return [np.random.default_rng(args.seed).integers(num_embedded_tokens(config), size=length)]


def _given_prompts(args, config, tokenizer):
    template, prompts = _chat_template(args), []
    for option, value in args.prompts:
        tokens = value
        if option == "--messages":
            tokens = _chat_tokens(option, template, tokenizer, value)
        elif option != "--token-ids" and args.chat:
            tokens = _chat_tokens(option, template, tokenizer, _messages(args.system, value))
        elif option != "--token-ids":
            tokens = tokenizer.encode(value).ids
            if not tokens:
                raise ValueError(f"{option} is {value!r}, which has no tokens")
        prompts.append(check_tokens(option, tokens, config.vocab_size))
    check_embedded(prompts, num_embedded_tokens(config))
    return prompts


def _chat_template(args):
    """The template that prompts need; None if none does."""
    options = {prompt.option for prompt in args.prompts} - {"--token-ids"}
    if args.chat or "--messages" in options:
        template = ChatTemplate.from_hf(args.checkpoint)
        if template is None:
            option = "--chat" if args.chat else "--messages"
            raise ValueError(
                f"{option} needs a chat template; {args.checkpoint} has no chat_template.jinja "
                "and no chat_template in tokenizer_config.json"
            )
        return template
    if options and _is_tuned_for_chat(args.checkpoint):
        print(
            f"warning: {args.checkpoint} has a chat template, and {' and '.join(sorted(options))} "
            "is read without it; --chat applies it",
            file=sys.stderr,
        )
    return None


def _is_tuned_for_chat(checkpoint):
    try:
        return ChatTemplate.from_hf(checkpoint) is not None
    except ValueError:  # a prompt that is read as it is needs no such file
        return False


def _messages(system, text):
    """Arguments of `ChatTemplate.render` for one question."""
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = [*first, {"role": "user", "content": text}]
    return {"messages": messages, "add_generation_prompt": True}


def _chat_tokens(option, template, tokenizer, given):
    try:
        text = template.render(**given)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error
    # The template has written the first token.
    return tokenizer.encode(text, add_special_tokens=False).ids

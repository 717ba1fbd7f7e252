"""Gemma 4 on a terminal: generate from prompts, run real layers, check the kernels."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Nothing here imports JAX, which takes seconds: `--help` and wrong arguments are to answer at once.
from g4attn_jax.commands import compilation_cache
from g4attn_jax.commands.layers import jobs_of
from g4attn_jax.commands.memory import OutOfMemory, explained
from g4attn_jax.commands.model_config import generate_config
from g4attn_jax.commands.prompts import prompt_type, read_messages, read_text
from g4attn_jax.config import Gemma4Config

_INTERRUPTED = 130  # as a shell reports a command that Ctrl-C has ended


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 if all passed, 1 if something failed or memory ran out, 130 after Ctrl-C.

    Raises:
        SystemExit: with 2, after the usage of the command and what is wrong with the arguments or
            with what they name; with 0 after help.
    """
    try:
        parser, args = _parse(argv)
        try:
            run = _RUNNERS[args.command](args)
        except (ValueError, NotImplementedError, OSError) as error:
            _refuse(parser, error)
        return _run(parser, run)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def command() -> NoReturn:
    """Ends the process with what `main` returns; after Ctrl-C at once."""
    status = main()
    if status == _INTERRUPTED:
        # A usual exit would wait for what the device is computing, half a minute for large weights.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _run(parser: argparse.ArgumentParser, run: Callable[[], int]) -> int:
    # It imports JAX, as everything does that has come this far.
    from g4attn_jax.checkpoint import CheckpointError
    from g4attn_jax.ops.op import KernelRefusal

    try:
        with explained():
            return run()
    except OutOfMemory as error:
        print(f"{parser.prog}: error: out of memory: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Who reads the output has had enough; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, KernelRefusal, OSError) as error:
        _refuse(parser, error)


def _refuse(parser: argparse.ArgumentParser, error: Exception) -> NoReturn:
    """Ends with status 2; the last line of standard error is the reason."""
    parser.error(" ".join(str(error).split()))


def _parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """(parser of the command, arguments)."""
    parser = argparse.ArgumentParser(prog="g4attn-jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generating = commands.add_parser(
        "generate", help="continue prompts with a checkpoint, or with random weights"
    )
    _add_generate_arguments(generating)
    decoding = commands.add_parser(
        "decode",
        help="prefill and decode real layers, check every step, print a row a layer",
    )
    _add_decode_arguments(decoding)
    checking = commands.add_parser(
        "check",
        help="compare kernels with a float64 oracle, on this device; without a GPU in interpreters",
    )
    checking.add_argument(
        "--all",
        action="store_true",
        help="the whole equivalence sweep published with the original kernel; if left out, one "
        "case of every op, mode, form of cache and head dim, and of interpreters Triton's alone",
    )
    for command in (generating, decoding):
        command.add_argument(
            "--implementation",
            metavar="NAME",
            help="demands the kernel of that name, such as triton or xla, of every op that has "
            "one; if left out, each op runs what is fastest",
        )
    for command in commands.choices.values():
        command.add_argument(
            "--no-compilation-cache",
            action="store_true",
            help="compile everything again; if left out, compiled programs are kept in "
            "$XDG_CACHE_HOME/g4attn-jax or ~/.cache/g4attn-jax",
        )
    args, unknown = parser.parse_known_args(argv)
    command = commands.choices[args.command]
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return command, args


def _start_jax(args: argparse.Namespace) -> None:
    if not args.no_compilation_cache:
        compilation_cache.use()


def _check(args: argparse.Namespace) -> Callable[[], int]:
    _start_jax(args)
    from g4attn_jax.commands.check import check

    return lambda: 1 if check(args.all) else 0


def _decode(args: argparse.Namespace) -> Callable[[], int]:
    jobs = jobs_of(args.config, args.layers)
    _start_jax(args)
    from g4attn_jax.commands.decode import decode
    from g4attn_jax.ops.op import check_implementation

    check_implementation(args.implementation)
    names = "batch", "prompt_len", "steps", "implementation"
    options = {name: getattr(args, name) for name in names}
    return lambda: 1 if decode(jobs, **options) else 0


def _generate(args: argparse.Namespace) -> Callable[[], int]:
    _check_generate_arguments(args)
    config = generate_config(args)
    _start_jax(args)
    from g4attn_jax.commands import generate

    job = generate.job_of(args, config)

    def run():
        generate.generate(job)
        return 0

    return run


_RUNNERS = {"check": _check, "decode": _decode, "generate": _generate}


def _check_generate_arguments(args: argparse.Namespace) -> None:
    """Refuses options that need another one, which is not given."""
    if args.assistant is None and args.draft_tokens is not None:
        raise ValueError("--draft-tokens needs --assistant")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    if args.chat and not any(p.option in ("--prompt", "--prompt-file") for p in args.prompts):
        raise ValueError("--chat needs --prompt or --prompt-file")


def _add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        nargs="+",
        default=["gemma-4-e2b", "gemma-4-12b"],
        metavar="PATH_OR_PRESET",
        help="config.json files, their directories, or names of published models, which are "
        f"{', '.join(Gemma4Config.preset_names())} (default: gemma-4-e2b gemma-4-12b)",
    )
    parser.add_argument(
        "--layers",
        type=_int_list,
        metavar="I,J,...",
        help="layer indices, separated by commas; the first of every kind if left out",
    )
    parser.add_argument(
        "--batch", type=_positive, default=2, help="sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-len",
        type=_positive,
        default=32,
        help="tokens of the prefill (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=_positive, default=16, help="decode steps (default: %(default)s)"
    )


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_weight_arguments(parser)
    _add_prompt_arguments(parser)
    _add_sampling_arguments(parser)
    _add_draft_arguments(parser)


def _add_weight_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    weights = group.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a directory of Hugging Face's format"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="of a model's shapes, see --config"
    )
    group.add_argument(
        "--config",
        metavar="PATH_OR_PRESET",
        help="with random weights: a config.json, its directory, or the name of a published model: "
        f"{', '.join(Gemma4Config.preset_names())}",
    )
    group.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="with random weights: the first N layers of the model alone",
    )


def _add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        dest="prompts",
        type=prompt_type("--prompt", str),
        action="append",
        default=[],
        metavar="TEXT",
        help="as it is unless --chat is given; needs tokenizer.json; may be repeated",
    )
    group.add_argument(
        "--prompt-file",
        dest="prompts",
        type=prompt_type("--prompt-file", read_text),
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt in a text file, without the line break at its end; may be repeated",
    )
    group.add_argument(
        "--messages",
        dest="prompts",
        type=prompt_type("--messages", read_messages),
        action="append",
        default=[],
        metavar="FILE.json",
        help="a chat through the checkpoint's template: a list of messages with role and content, "
        "or an object with messages, tools and other variables of the template; may be repeated",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts in text are what a user says, put through the checkpoint's chat template",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="with --chat: what the model is told before each prompt"
    )
    group.add_argument(
        "--token-ids",
        dest="prompts",
        type=prompt_type("--token-ids", _token_list),
        action="append",
        default=[],
        metavar="I,J,...",
        help="a prompt in tokens; may be repeated",
    )
    group.add_argument(
        "--prompt-len",
        type=_positive,
        metavar="N",
        help="with random weights and without --token-ids: tokens of a random prompt (default: 16)",
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling and length")
    group.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=64,
        metavar="N",
        help="the most tokens that follow a prompt (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        help="0 takes the most likely token, more draws one; if this, --top-k, --top-p or "
        "--suppress-token-ids is left out, it is that of the checkpoint's generation_config.json, "
        "else 0 or none",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="with a temperature above 0: draw among the K most likely tokens alone",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="with a temperature above 0: draw among the most likely tokens alone, as many as "
        "have a probability of P together",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of random weights, a random prompt and sampling, below 2^32 (default: %(default)s)",
    )
    group.add_argument(
        "--suppress-token-ids",
        type=_stop_list,
        metavar="I,J,...",
        help="tokens that are never chosen; '' is none",
    )
    group.add_argument(
        "--stop-token-ids",
        type=_stop_list,
        metavar="I,J,...",
        help="tokens that end what follows a prompt; '' is none; if left out, eos_token_id of the "
        "checkpoint's generation_config.json or config.json",
    )


def _add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drafts")
    group.add_argument(
        "--assistant",
        type=Path,
        metavar="DIR",
        help="drafts tokens; of Hugging Face's format, with random weights its config.json alone",
    )
    group.add_argument(
        "--draft-tokens",
        type=_positive,
        metavar="K",
        help="with --assistant: the most drafts in a step, 1 to 8 (default: 4)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, not {text!r}")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of 0 or more, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    # What keys of JAX take of a number.
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer of 0 to {2**32 - 1}, not {text!r}")
    return int(text)


def _token_list(text: str) -> list[int]:
    try:
        return [_not_negative(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be tokens separated by commas, not {text!r}"
        ) from None


def _stop_list(text: str) -> list[int]:
    return _token_list(text) if text.strip() else []


def _int_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be layer indices separated by commas, not {text!r}"
        ) from None


if __name__ == "__main__":
    command()

"""`python -m g4attn_jax generate`, `decode` and `check`."""

import argparse
import sys
from pathlib import Path

from g4attn_jax.checkpoint import CheckpointError
from g4attn_jax.commands import generate as generation
from g4attn_jax.commands.check import check
from g4attn_jax.commands.decode import decode, plan


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 if all passed, 1 if something failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m g4attn_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decoding = commands.add_parser(
        "decode",
        help="prefill and decode real layers, check every step, print a row a layer",
    )
    decoding.add_argument(
        "--config",
        nargs="+",
        default=["gemma-4-e2b", "gemma-4-12b"],
        metavar="PATH_OR_PRESET",
        help="config.json files, their directories, or names of published models (default: "
        "gemma-4-e2b gemma-4-12b)",
    )
    decoding.add_argument(
        "--layers",
        type=_int_list,
        metavar="I,J,...",
        help="layer indices, separated by commas; the first of every kind if left out",
    )
    decoding.add_argument(
        "--batch", type=_positive, default=2, help="sequences (default: %(default)s)"
    )
    decoding.add_argument(
        "--prompt-len",
        type=_positive,
        default=32,
        help="tokens of the prefill (default: %(default)s)",
    )
    decoding.add_argument(
        "--steps", type=_positive, default=16, help="decode steps (default: %(default)s)"
    )
    commands.add_parser("check", help="run the published equivalence sweep on this device")
    generating = commands.add_parser(
        "generate", help="continue prompts with a checkpoint, or with random weights"
    )
    _add_generate_arguments(generating)
    args = parser.parse_args(argv)
    if args.command == "check":
        return 1 if check() else 0
    if args.command == "generate":
        try:
            job = generation.plan(args)
        except ValueError as error:
            generating.error(str(error))
        try:
            generation.generate(job)
        except CheckpointError as error:
            generating.error(str(error))
        return 0
    try:
        jobs = plan(args.config, args.layers)
    except ValueError as error:
        parser.error(str(error))
    failures = decode(jobs, batch=args.batch, prompt_len=args.prompt_len, steps=args.steps)
    return 1 if failures else 0


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a directory of Hugging Face's format"
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="of a model's shapes, see --config"
    )
    parser.add_argument(
        "--config",
        metavar="PATH_OR_PRESET",
        help="with random weights: a config.json, its directory, or the name of a published model",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="with random weights: the first N layers of the model alone",
    )
    parser.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        default=[],
        metavar="TEXT",
        help="as it is, without a chat template; needs tokenizer.json; may be repeated",
    )
    parser.add_argument(
        "--token-ids",
        dest="prompts",
        type=_token_list,
        action="append",
        default=[],
        metavar="I,J,...",
        help="a prompt in tokens; may be repeated",
    )
    parser.add_argument(
        "--prompt-len",
        type=_positive,
        metavar="N",
        help="with random weights and without --token-ids: tokens of a random prompt (default: 16)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=64,
        metavar="N",
        help="the most tokens that follow a prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 takes the most likely token, more draws one; if this, --top-k, --top-p or "
        "--suppress-token-ids is left out, it is that of the checkpoint's generation_config.json, "
        "else 0 or none",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="with a temperature above 0: draw among the K most likely tokens alone",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="with a temperature above 0: draw among the most likely tokens alone, as many as "
        "have a probability of P together",
    )
    parser.add_argument(
        "--assistant",
        type=Path,
        metavar="DIR",
        help="drafts tokens; of Hugging Face's format, with random weights its config.json alone",
    )
    parser.add_argument(
        "--draft-tokens",
        type=_positive,
        metavar="K",
        help="with --assistant: the most drafts in a step, 1 to 8 (default: 4)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of random weights, a random prompt and sampling, below 2^32 (default: %(default)s)",
    )
    parser.add_argument(
        "--suppress-token-ids",
        type=_stop_list,
        metavar="I,J,...",
        help="tokens that are never chosen; '' is none",
    )
    parser.add_argument(
        "--stop-token-ids",
        type=_stop_list,
        metavar="I,J,...",
        help="tokens that end what follows a prompt; '' is none; if left out, eos_token_id of the "
        "checkpoint's generation_config.json or config.json",
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
    sys.exit(main())

"""`python -m g4attn_jax decode` and `python -m g4attn_jax check`."""

import argparse
import sys

from g4attn_jax.commands.check import check
from g4attn_jax.commands.decode import decode, plan


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 if all passed, 1 if something failed, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m g4attn_jax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    decoding = commands.add_parser(
        "decode",
        help="prefill and decode real layers, check every step, print a row a layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    decoding.add_argument(
        "--config",
        nargs="+",
        default=["gemma-4-e2b", "gemma-4-12b"],
        metavar="PATH_OR_PRESET",
        help="config.json files or names of published models",
    )
    decoding.add_argument(
        "--layers",
        type=_int_list,
        metavar="I,J,...",
        help="layer indices, separated by commas; the first of every kind if left out",
    )
    decoding.add_argument("--batch", type=_positive, default=2, help="sequences")
    decoding.add_argument("--prompt-len", type=_positive, default=32, help="tokens of the prefill")
    decoding.add_argument("--steps", type=_positive, default=16, help="decode steps")
    commands.add_parser("check", help="run the published equivalence sweep on this device")
    args = parser.parse_args(argv)
    if args.command == "check":
        return 1 if check() else 0
    try:
        jobs = plan(args.config, args.layers)
    except ValueError as error:
        parser.error(str(error))
    failures = decode(jobs, batch=args.batch, prompt_len=args.prompt_len, steps=args.steps)
    return 1 if failures else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, not {text!r}")
    return int(text)


def _int_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be layer indices separated by commas, not {text!r}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())

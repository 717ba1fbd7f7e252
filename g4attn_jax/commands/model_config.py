"""The config of the model that a command is to run, read without importing JAX."""

import argparse
import os

from g4attn_jax.config import Gemma4Config


def load_config(name: str) -> Gemma4Config:
    """A preset by its name, or a `config.json` by its path or that of its directory.

    Raises:
        ValueError: it is neither, or not a config this package takes.
    """
    is_directory = os.path.isdir(name)
    path = os.path.join(name, "config.json") if is_directory else name
    if os.path.isfile(path):
        return Gemma4Config.from_hf(path)
    if not is_directory and (os.path.sep in name or name.endswith(".json")):
        raise ValueError(f"config is {name!r}; there is no such file")
    try:
        return Gemma4Config.preset(name)
    except ValueError as error:
        if is_directory:
            raise ValueError(f"config is {name!r}; there is no {path}") from error
        raise


def generate_config(args: argparse.Namespace) -> Gemma4Config:
    """The config of the model of `generate`: that of its checkpoint, or with random weights any.

    Raises:
        ValueError: there is none, or an argument is for the other of the two kinds of weights.
    """
    return _random_config(args) if args.checkpoint is None else _checkpoint_config(args)


def _random_config(args):
    if args.config is None:
        raise ValueError("--random-weights needs --config")
    for prompt in args.prompts:
        if prompt.option != "--token-ids":
            raise ValueError(
                f"{prompt.option} needs --checkpoint, for its tokenizer; or use --token-ids"
            )
    if args.prompt_len is not None and args.prompts:
        raise ValueError("--prompt-len is for a random prompt, without --token-ids")
    config = load_config(args.config)
    config.check_decoder()
    return config if args.layers is None else config.truncated(args.layers)


def _checkpoint_config(args):
    for name in ("config", "layers", "prompt_len"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --random-weights alone")
    path = args.checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(f"--checkpoint is {args.checkpoint}; there is no {path}")
    if not args.prompts:
        raise ValueError("--checkpoint needs --prompt, --prompt-file, --messages or --token-ids")
    try:
        config = Gemma4Config.from_hf(path)
        config.check_decoder()
    except ValueError as error:
        raise ValueError(f"--checkpoint: {error}") from error
    return config

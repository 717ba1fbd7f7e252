"""Prompts of a command line, read from files but not yet tokenized."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """A prompt, and the option it is from, which messages name.

    Attributes:
        option: "--prompt", "--prompt-file", "--messages" or "--token-ids".
        value: text of the first two, arguments of `ChatTemplate.render` of the third, tokens of the
            last.
    """

    option: str
    value: str | Mapping[str, Any] | Sequence[int]


def prompt_type(option: str, read: Callable[[str], Any]) -> Callable[[str], Prompt]:
    """The `type` of an argument of argparse: what `read` makes of it, with the option's name."""
    return lambda text: Prompt(option, read(text))


def read_text(path: str) -> str:
    """The text of a file, without the line break that ends its last line.

    Raises:
        argparse.ArgumentTypeError: it cannot be read, or is no UTF-8.
    """
    try:
        return Path(path).read_text("utf-8").removesuffix("\n")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{path} is not UTF-8: {error}") from error


def read_messages(path: str) -> dict[str, Any]:
    """Arguments of `ChatTemplate.render` from a JSON file.

    The file has a list of messages, or an object with `messages`, and `tools`, `documents` and
    further variables of the template where they are wanted.

    Raises:
        argparse.ArgumentTypeError: it cannot be read, or has something else.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path} is not JSON: {error}") from error
    content = {"messages": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise argparse.ArgumentTypeError(
            f"{path} is neither a list of messages nor an object with such a list under messages"
        )
    # The model's turn is what is asked for.
    return content | {"add_generation_prompt": True}

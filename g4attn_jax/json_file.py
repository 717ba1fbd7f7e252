"""JSON objects, read strictly: what is wrong with one is said with the name of its file."""

import collections
import json
from os import PathLike
from pathlib import Path
from typing import Any


def read_object(path: str | PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as of `parse_object`; the message names the file.
    """
    return parse_object(Path(path).read_bytes(), path)


def parse_object(text: bytes, source: str | PathLike) -> dict[str, Any]:
    """The JSON object that a text is.

    Args:
        text: as bytes of a file.
        source: where the text is from, which messages begin with.

    Raises:
        ValueError: it is no JSON, no object, or has a name twice in one object.
    """
    twice = []

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            twice.append(counts.most_common(1)[0][0])
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if twice:
        raise ValueError(f"{source} has {twice[0]} more than once")
    if not isinstance(value, dict):
        raise ValueError(f"{source} is not a JSON object")
    return value

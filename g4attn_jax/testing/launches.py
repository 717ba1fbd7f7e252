"""Kernel launches of a compiled program, counted in its text."""

import collections
import re

import jax

# Of instructions that launch nothing.
FREE_OPCODES = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant"}


def launches_by_backend(compiled_text: str, kernel: str) -> collections.Counter[str]:
    """Launches of a kernel, under "triton" and "mosaic_gpu"."""
    counts = collections.Counter()
    for line in compiled_text.splitlines():
        counts["triton"] += "__gpu$xla.gpu.triton" in line and f'name = "{kernel}"' in line
        counts["mosaic_gpu"] += '"mosaic_gpu' in line and f"/{kernel}/mpmd_map" in line
    return +counts


def count_launches(compiled_text: str, kernel: str) -> int:
    """Launches of a kernel, by Triton or by Mosaic GPU."""
    return launches_by_backend(compiled_text, kernel).total()


def entry_opcodes(compiled: jax.stages.Compiled) -> collections.Counter:
    """Count of every opcode in the entry computation; each but the free ones is a launch."""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    return collections.Counter(
        re.match(r"\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line).group(1)
        for line in entry.splitlines()[2:]
        if " = " in line
    )

"""Files of results: a head, and a row a line; the machine that they were measured on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jax

from bench.benchmark import Row

# Results that the README cites, all measured on an H200.
COMMITTED = Path(__file__).parent / "results" / "h200"


def machine() -> dict[str, str]:
    """GPU, driver and JAX of this process; where it has no GPU "cpu" and "none"."""
    device = jax.devices()[0]
    return {
        "gpu": device.device_kind,
        "driver": _driver_version() if device.platform == "gpu" else "none",
        "jax": jax.__version__,
    }


def _driver_version():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def write(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """Writes the head's entries and "rows", a row a line."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text("\n".join(["{", *lines, ' "rows": [', body, " ]", "}"]) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The head and the rows of a file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        head = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(head, dict) or not isinstance(head.get("rows"), list):
        raise ValueError(f"{path} has no list of rows")
    return head, head.pop("rows")

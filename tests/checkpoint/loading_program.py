"""Run by test_memory.py in a process of its own: `python loading_program.py DIRECTORY`.

Prints, in bytes, the model's size and how much more host memory the process had at its peak than
before the model was loaded.
"""

import gc
import sys
from pathlib import Path

from flax import nnx

from g4attn_jax import Gemma4Config
from g4attn_jax.checkpoint import load_hf_into
from g4attn_jax.model.decoder import Gemma4Decoder


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(directory):
    config = Gemma4Config.from_hf(directory / "config.json")
    model = nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0)))
    # Programs are compiled, and what JAX keeps for good is there.
    load_hf_into(directory, model)
    gc.collect()
    # The peak starts again from here (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loaded, report = load_hf_into(directory, model)
    print(report.bytes, status("VmHWM") - before)
    del loaded


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Compiled programs, kept from one run of a command to the next."""

import hashlib
import os
import platform
import sys
from pathlib import Path


def use() -> None:
    """Turns JAX's persistent compilation cache on, unless the environment has set one.

    The directory is `compiled/HOST` of `$XDG_CACHE_HOME/g4attn-jax`, or of `~/.cache/g4attn-jax`
    where that is not set. If there can be none, a line on standard error says so.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        print(f"warning: no compilation cache: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX leaves out what compiled in less than a second; commands compile many small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def cache_directory() -> Path:
    """The directory of `use`, one for each kind of host: a CPU's programs run on its like alone."""
    # A relative path is to be ignored, as the XDG Base Directory Specification says.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else Path.home() / ".cache"
    return home / "g4attn-jax" / "compiled" / _host()


def _host():
    text, info = f"{platform.machine()} {platform.processor()}", Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
        described = ("flags", "Features", "model name")
        text += "\n".join(sorted({line for line in lines if line.startswith(described)}))
    return hashlib.sha256(text.encode()).hexdigest()[:12]

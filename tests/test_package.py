"""The names of the package, which are imported when they are first used."""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import g4attn_jax


def test_names_for_type_checkers_are_those_of_the_package():
    """Names imported at run time are those a type checker reads, each from the same module."""
    tree = ast.parse(Path(g4attn_jax.__file__).read_text())
    [typed] = [node.body for node in tree.body if isinstance(node, ast.If)]
    modules = {name.name: node.module for node in typed for name in node.names}
    assert modules.pop("ops") == "g4attn_jax"
    assert modules == {name: f"g4attn_jax.{m}" for name, m in g4attn_jax._MODULES.items()}
    assert sorted([*modules, "ops"]) == sorted(g4attn_jax.__all__)


@pytest.mark.parametrize("name", g4attn_jax.__all__)
def test_every_name_is_that_of_its_module(name):
    assert name in dir(g4attn_jax)
    module = import_module(f"g4attn_jax.{g4attn_jax._MODULES.get(name, name)}")
    assert getattr(g4attn_jax, name) is (module if name == "ops" else getattr(module, name))


def test_importing_the_package_imports_no_jax_until_a_name_is_used():
    code = (
        "import sys, g4attn_jax\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "from g4attn_jax import *\n"
        "assert Gemma4Config.preset('31b') and 'jax' in sys.modules\n"
        "assert ops.qkv_rms_norm and plan_step"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_argument_checks_of_configs_import_no_jax():
    code = (
        "import sys\n"
        "from g4attn_jax import checks, config\n"
        "checks.check_integer('n', config.Gemma4Config.preset('31b').num_hidden_layers)\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'g4attn_jax' has no attribute 'Gemma5'"):
        g4attn_jax.Gemma5  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Gemma5'"):
        from g4attn_jax import Gemma5  # noqa: F401


def test_the_console_script_is_a_function_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    [(name, target)] = tomllib.loads(text)["project"]["scripts"].items()
    module, function = target.split(":")
    assert name == "g4attn-jax" and callable(getattr(import_module(module), function))

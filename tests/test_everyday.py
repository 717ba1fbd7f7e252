"""Kinds that tests of every day cover: ops, modes, forms, layouts, sizes, checkpoints, commands."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bench import __main__ as bench_command
from g4attn_jax import Gemma4Config
from g4attn_jax.__main__ import _RUNNERS
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.config import ProjectionMode
from g4attn_jax.layout import Contiguous, Paged, Ring
from g4attn_jax.ops.op import implementations
from tests.everyday import is_everyday
from tests.gpu import evidence

ROOT = Path(__file__).parents[1]
WHOLE = (ROOT, ROOT / "tests")  # arguments that name all tests
INTERPRETED = r".*-(triton_interpret|interpreter)\]"


def of_op(op):
    """Numbers of the op's kernel in the interpreter, in a test of all ops or in one of its own."""
    judged = rf"tests/ops/.*::test_(against_float64|published_sweep|sweep)\[{op}-{INTERPRETED}"
    return [rf"{judged}|tests/ops/test_{op}\.py::.*_against_float64\[{INTERPRETED}"]


def of_implementation(name):
    """Numbers; of cuDNN, which no interpreter has, the choice."""
    return {
        "xla": [r"tests/ops/.*::test_against_float64\[.*-xla\]"],
        "triton": [r"tests/ops/.*::test_against_float64\[.*-triton_interpret\]"],
        # JAX 0.10 has no kernel of ours for it.
        "mosaic_gpu": [r"test_decode_attention_mosaic\.py::test_against_float64\["]
        if jax.__version_info__ >= (0, 11)
        else [],
        "cudnn": [r"test_when_cudnn_is_chosen"],
    }[name]


def of_mode(mode):
    """Norm, prologue and layer."""
    return [
        rf"test_published_sweep\[qkv_rms_norm-{mode}-",
        rf"test_qkv_norm_rope_write\.py::test_sweep\[qkv_norm_rope_write-{mode}-",
        rf"test_attention\.py::test_\w+_against_float64\[.*{mode}-",
    ]


def of_form(form):
    """Prologue, layer and model."""
    return [
        rf"test_qkv_norm_rope_write\.py::test_sweep\[.*-{form}-",
        rf"test_golden\.py::test_float32_matches_hugging_face\[.*-{form}\]",
        rf"test_model\.py::test_every_position_of_a_prompt\[.*-{form}\]",
    ]


def of_layout(layout):
    """Layer and model."""
    return [
        rf"test_golden\.py::test_float32_matches_hugging_face\[.*-{layout.lower()}-",
        rf"test_model\.py::test_every_position_of_a_prompt\[.*-{layout.lower()}-",
    ]


def of_size(preset):
    """The model's logits, and the layers of its config."""
    size = preset.removeprefix("gemma-4-")
    return [
        rf"test_model\.py::test_every_position_of_a_prompt\[{preset}-",
        rf"test_config\.py::test_every_layer_of_every_size\[{size}\]",
    ]


GREEDY = r"test_current_transformers\.py::test_the_same_greedy_tokens"
CHECKPOINTS = {
    "text": [rf"{GREEDY}\[text"],
    "multimodal": [rf"{GREEDY}\[multimodal-"],
    "unified": [rf"{GREEDY}\[unified-"],
    "a config of today": [rf"{GREEDY}\[.*-new\]"],
    "a config of before transformers 5.15": [rf"{GREEDY}\[.*-old\]"],
    "an untied head": [rf"{GREEDY}\[text-untied-"],
    "experts": [r"test_current_transformers\.py::test_saved_as_\w+\[text-experts\]"],
    "several files": [r"test_hf\.py::test_round_trip_in_shards\["],
    "DeepMind's, nested": [r"test_deepmind\.py::test_logits_are_deepminds\[.*-nested\]"],
    "DeepMind's, flat": [r"test_deepmind\.py::test_logits_are_deepminds\[.*-flat\]"],
    "an assistant": [r"test_current_transformers\.py::test_the_same_drafts\["],
    "quantised, refused": [r"test_tolerated\.py::test_quantised_files_are_refused_as_such\["],
}
COMMANDS = {
    "decode": [r"test_commands\.py::test_decode_of_a_shared_layer_runs_its_producer"],
    "generate": [
        r"test_generate_command\.py::test_text_after_text",
        r"test_generate_command\.py::test_an_assistant_says_how_its_drafts_did",
    ],
    "check": [r"test_commands\.py::test_check_passes"],
}
BENCHMARKS = {
    "run": [r"test_bench\.py::test_run_writes_rows_and_head"],
    "tune": [r"test_bench\.py::test_refusals\[arguments1-"],
    "compare": [r"test_bench\.py::test_compare_says_what_changed\["],
    "list": [r"test_bench\.py::test_list"],
    "memory": [r"test_bench\.py::test_the_readme_has_the_table_of_memory"],
}


def kernels():
    """Names of implementations without those of interpreters, which run the same kernels."""
    return [name for name in implementations() if name and not name.endswith("_interpret")]


def names(*types):
    return [kind.__name__ for kind in types]


KINDS = {
    "op": {op: of_op(op) for op in evidence.op_names()},
    "implementation": {name: of_implementation(name) for name in kernels()},
    "mode": {mode.name: of_mode(mode.name) for mode in ProjectionMode},
    "form": {form: of_form(form) for form in names(KVCache, CompactKVCache)},
    "layout": {layout: of_layout(layout) for layout in names(Contiguous, Ring, Paged)},
    "size": {preset: of_size(preset) for preset in Gemma4Config.preset_names()},
    "checkpoint": CHECKPOINTS,
    "command": COMMANDS,
    "benchmark": BENCHMARKS,
}


@pytest.fixture(scope="module")
def tests_of_every_day(request):
    """Names of all of them: of this session's, or if it has not collected all, of another one."""
    config = request.config
    option, folder = config.option, config.invocation_params.dir
    chosen = option.keyword or option.markexpr or option.deselect or option.lf or option.ignore
    if not chosen and any((folder / name).resolve() in WHOLE for name in config.args):
        on_cpu = [item for item in request.session.items if "gpu" not in item.keywords]
        return [item.nodeid for item in on_cpu if is_everyday(item)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tested_every_day(kind, tests_of_every_day):
    missing = [
        (value, pattern)
        for value, patterns in KINDS[kind].items()
        for pattern in patterns
        if not any(re.search(pattern, name) for name in tests_of_every_day)
    ]
    assert missing == []


def test_every_command_is_listed():
    assert COMMANDS.keys() == _RUNNERS.keys()
    usage = bench_command._parser().format_usage()
    assert set(re.search(r"{(.*)}", usage)[1].split(",")) == BENCHMARKS.keys()

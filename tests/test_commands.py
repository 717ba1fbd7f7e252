import collections
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from g4attn_jax.__main__ import main
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.commands import check, compilation_cache, decode
from g4attn_jax.commands.layers import first_of_each_kind
from g4attn_jax.commands.model_config import load_config
from g4attn_jax.config import _CONFIGS, Gemma4Config, ProjectionMode
from g4attn_jax.ops.decode_attention import mosaic_limits
from g4attn_jax.ops.decode_attention.cases import DecodeAttentionCase
from g4attn_jax.ops.prefill_attention.cases import PrefillAttentionCase
from g4attn_jax.ops.q_keqv_rms_norm.cases import QKeqvRmsNormCase
from g4attn_jax.ops.qkv_norm_rope_write.cases import QkvNormRopeWriteCase
from g4attn_jax.ops.qkv_rms_norm.cases import QkvRmsNormCase
from g4attn_jax.testing.case import PUBLISHED_HEADS
from tests.everyday import everyday
from tests.test_attention import COMMON

MODES = [mode.name for mode in ProjectionMode]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """The process of the tests compiles without it, and leaves none in the user's directory."""
    monkeypatch.setattr(compilation_cache, "use", lambda: None)


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    config = COMMON | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
    }
    path.write_text(json.dumps(config))
    return str(path)


def rows_of(output):
    return [line.split() for line in output.splitlines() if line.endswith(("pass", "FAIL"))]


@everyday()
def test_decode_prints_a_row_a_layer_and_form(tiny_config, capsys):
    code = main(
        ["decode", "--config", tiny_config, "--batch", "2", "--prompt-len", "9", "--steps", "4"]
    )
    output = capsys.readouterr().out
    assert code == 0
    rows = rows_of(output)
    assert [row[1:3] for row in rows] == [
        *(["0", "QKV_FULL"], ["1", "QK_ONLY"], ["1", "QK_ONLY"]),
        *(["2", "Q_ONLY"], ["3", "Q_ONLY"], ["3", "Q_ONLY"]),
    ]
    forms = ["KVCache", "KVCache", "CompactKVCache"]
    assert [row[5] for row in rows] == 2 * forms
    assert [row[6] for row in rows] == ["128", "128", "80", "0", "0", "0"]
    assert all(row[-1] == "pass" for row in rows)
    assert "all passed" in output


def test_decode_of_a_shared_layer_runs_its_producer(tiny_config, capsys):
    assert main(["decode", "--config", tiny_config, "--layers", "3", "--steps", "2"]) == 0
    assert [row[1] for row in rows_of(capsys.readouterr().out)] == ["3", "3"]


def test_decode_with_a_kernel_that_cannot_run_a_layer_ends_with_a_line(tiny_config, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["decode", "--config", tiny_config, "--implementation", "mosaic_gpu_interpret"])
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("g4attn-jax decode: error: implementation 'mosaic_gpu_interpret'")


@everyday()
def test_decode_fails_where_a_step_is_wrong(tiny_config, capsys, monkeypatch):
    """A step that is 10 % off the float32 reference path must show as a failed layer."""
    original = decode._LayerRun._reference
    monkeypatch.setattr(decode._LayerRun, "_reference", lambda self: 1.1 * original(self))
    assert main(["decode", "--config", tiny_config, "--prompt-len", "13", "--steps", "3"]) == 1
    assert all(row[-1] == "FAIL" for row in rows_of(capsys.readouterr().out))


def test_defaults_show_all_three_modes():
    kinds = [
        Gemma4Config.preset(name).attention_spec(layer).mode.name
        for name in ("gemma-4-e2b", "gemma-4-12b")
        for layer in first_of_each_kind(Gemma4Config.preset(name))
    ]
    assert sorted(set(kinds)) == sorted(MODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gemma-5"], "unknown preset 'gemma-5'"),
        (["--config", "nowhere/config.json"], "there is no such file"),
        (["--config", str(_CONFIGS)], f"there is no {_CONFIGS / 'config.json'}"),
        (
            ["--config", "gemma-4-e2b", "--layers", "99"],
            "layer is 99",
        ),
        (["--steps", "0"], "must be an integer of 1 or more, not '0'"),
        (["--layers", "a"], "must be layer indices separated by commas, not 'a'"),
        (["--batch", "two"], "must be an integer of 1 or more, not 'two'"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["decode", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_presets_and_paths_are_the_same(tmp_path):
    path = tmp_path / "config.json"
    path.write_text((_CONFIGS / "gemma-4-12b.json").read_text())
    assert load_config(str(path)) == load_config("gemma-4-12b")
    assert load_config(str(tmp_path)) == load_config("gemma-4-12b")


def test_a_preset_is_one_beside_a_directory_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "gemma-4-12b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("gemma-4-12b") == Gemma4Config.preset("gemma-4-12b")


@pytest.mark.parametrize(
    ("command", "defaults"),
    [("decode", [2, 32, 16]), ("generate", [16, 64, 0, 4])],
)
def test_help_says_the_defaults_that_there_are(command, defaults, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "None" not in output and "[]" not in output
    assert list(map(float, re.findall(r"default: ([\d.]+)\)", output))) == defaults


def test_check_covers_the_published_sweep():
    sweep = check.sweep()
    norms = [case for case in sweep if case.op in ("q_keqv_rms_norm", "qkv_rms_norm")]
    assert len(norms) == len(set(norms)) == 4 * 3 * 2 * 4
    assert {case.head_dim for case in norms} == {128, 256, 512}
    assert {(case.num_q_heads, case.num_kv_heads) for case in norms} == {(32, 16), (16, 8)}
    assert max(case.tokens for case in norms) == 1024
    prologues = [case for case in sweep if case.op == "qkv_norm_rope_write"]
    assert len(prologues) == len(set(prologues)) == 5 * 3 * 4
    assert len({(case.mode, case.form) for case in prologues}) == 5
    attentions = [case for case in sweep if case.op in ("decode_attention", "prefill_attention")]
    assert len(attentions) == len(set(attentions)) == 3 * 2 * 3 * 3
    assert {*norms, *prologues, *attentions} == set(sweep)


@pytest.fixture
def short_sweep(monkeypatch):
    norms = [QkvRmsNormCase(mode, 4, 2, 128, 3) for mode in ProjectionMode]
    norms.append(QKeqvRmsNormCase(4, 2, 128, 3))
    prologues = [
        QkvNormRopeWriteCase(ProjectionMode.QK_ONLY, form, 4, 2, 128, 32, 3)
        for form in (KVCache, CompactKVCache)
    ]
    attentions = [
        DecodeAttentionCase(KVCache, 4, 2, 128, 1, (39, 12, -1), 40, rotary_dim=32),
        PrefillAttentionCase(CompactKVCache, 4, 2, 128, 17, (39, 17, -1), 40, rotary_dim=32),
    ]
    monkeypatch.setattr(check, "sweep", lambda: [*norms, *prologues, *attentions])


def test_check_passes(short_sweep, capsys):
    assert main(["check"]) == 0
    output, error = capsys.readouterr()
    assert error == ""  # no terminal, no bar
    rows = rows_of(output)
    assert len(rows) == 16
    assert all(row[-1] == "pass" for row in rows)


def test_check_fails_with_exit_status_1(short_sweep, capsys, monkeypatch):
    """A norm that is 1.6 % off is inside the limits' order of magnitude, and must still fail."""

    def slightly_off(original):
        def run(case, arguments, implementation):
            outputs = original(case, arguments, implementation)
            return jax.tree.map(lambda x: x * jnp.asarray(1.0157, x.dtype), outputs)

        return run

    for case in {type(case) for case in check.sweep()}:
        monkeypatch.setattr(case, "run", slightly_off(case.run))
    assert main(["check"]) == 1
    assert all(row[-1] == "FAIL" for row in rows_of(capsys.readouterr().out))


def python(code, *arguments, environment=None):
    """The standard output of a program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["nothing"],
        ["decode", "--steps", "0"],
        ["decode", "--config", "gemma-5"],
        ["decode", "--layers", "99"],
        ["check", "--some"],
        ["generate", "--checkpoint", "nowhere", "--prompt", "x"],
        ["generate", "--random-weights", "--config", "gemma-4-e2b", "--layers", "99"],
    ],
)
def test_help_and_wrong_arguments_import_no_jax(arguments):
    """Modules are counted, and not seconds, which another process may take."""
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('g4attn_jax', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as error:\n"
        "    slow = {'jax', 'flax', 'numpy', 'jinja2', 'tokenizers'} & set(sys.modules)\n"
        "    print('exit', error.code, *slow)"
    )
    status = 0 if "--help" in arguments else 2
    assert python(code, *arguments).splitlines()[-1] == f"exit {status}"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["decode", "--config", "gemma-5"], "decode"),
        (["decode", "--nothing"], "decode"),
        (["check", "decode"], "check"),
        (["generate", "--random-weights"], "generate"),
        (["generate", "--random-weights", "--config", "31b", "--top-k", "0"], "generate"),
    ],
)
def test_the_reason_is_last_after_the_usage_of_the_command(arguments, command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"usage: g4attn-jax {command} ")
    assert lines[-1].startswith(f"g4attn-jax {command}: error: ")
    assert not any(line.startswith("g4attn-jax") for line in lines[:-1])


def test_ctrl_c_ends_with_a_line(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt  # pytest-xdist's processes ignore the signal

    monkeypatch.setattr(check, "check", interrupted)
    assert main(["check"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_want_of_memory_ends_with_a_line(monkeypatch, capsys):
    """XLA's reason is printed, and how much there is; any other error keeps its traceback."""
    reason = "RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes."

    def exhausted(*arguments):
        raise jax.errors.JaxRuntimeError(f"{reason}\nfurther lines")

    monkeypatch.setattr(check, "check", exhausted)
    assert main(["check"]) == 1
    device = re.escape(jax.devices()[0].device_kind)
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        f"g4attn-jax check: error: out of memory: {reason[:-1]}; {device} has [\\d.]+ GiB", line
    )
    reason = "INTERNAL: a fault"
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["check"])


def test_a_reader_that_has_gone_ends_a_command():
    code = (
        "import os, sys\n"
        "from g4attn_jax.commands import check\n"
        "from g4attn_jax.__main__ import main\n"
        "check.check = lambda whole_sweep: print('x' * 10**6, flush=True)\n"
        "ours, theirs = os.pipe()\n"
        "os.close(ours)\n"
        "kept = os.dup(1)\n"
        "os.dup2(theirs, 1)\n"
        "status = main(['check', '--no-compilation-cache'])\n"
        "os.write(kept, f'exit {status}'.encode())"
    )
    assert python(code) == "exit 1"


def test_check_takes_a_case_of_every_op_mode_form_and_head_dim():
    every, some = check.sweep(), check.sample(check.sweep())
    assert len(some) == len(set(some)) < 40 and set(some) < set(every)

    def kinds(cases):
        return {(case.label.partition(" window")[0], case.head_dim) for case in cases}

    assert kinds(some) == kinds(every)
    # Every op at all; heads, windows and tokens that the interpreter takes.
    assert {case.label for case in some} == {case.label for case in every}
    assert {(c.num_q_heads, c.num_kv_heads) for c in some} == set(PUBLISHED_HEADS)
    tokens = {case.tokens for case in every if case.tokens <= check.MAX_INTERPRETED_TOKENS}
    assert {case.tokens for case in some} == tokens


def test_check_runs_the_whole_sweep_on_demand(monkeypatch, capsys):
    norms = [QKeqvRmsNormCase(4, 2, 128, tokens) for tokens in (1, 3)]
    monkeypatch.setattr(check, "sweep", lambda: norms)
    monkeypatch.setattr(check, "mosaic_cases", lambda: [])
    assert main(["check"]) == 0
    assert {row[3] for row in rows_of(capsys.readouterr().out)} == {"1"}
    assert main(["check", "--all"]) == 0
    assert {row[3] for row in rows_of(capsys.readouterr().out)} == {"1", "3"}


@pytest.mark.parametrize("whole_sweep", [False, True])
def test_check_runs_every_kernel_of_an_op(whole_sweep, monkeypatch):
    attention = DecodeAttentionCase(KVCache, 4, 2, 128, 6, (39,), 40, rotary_dim=32)
    prefill = PrefillAttentionCase(KVCache, 4, 2, 128, 17, (39,), 40, rotary_dim=32)
    mosaic = ["mosaic_gpu_interpret"] if whole_sweep else []
    names = check.implementations(attention, whole_sweep)
    assert names == [*mosaic, "triton_interpret", "xla"]
    assert check.implementations(prefill, whole_sweep) == ["triton_interpret", "xla"]
    monkeypatch.setattr(check, "gpu_refusal", lambda: None)
    names = check.implementations(attention, whole_sweep)
    assert names == ["mosaic_gpu", "triton", "xla"]
    assert check.implementations(prefill, whole_sweep) == ["cudnn", "triton", "xla"]


def test_check_has_cases_that_mosaic_takes():
    cases = check.mosaic_cases()
    assert {case.form for case in cases} == {KVCache, CompactKVCache}
    for case in cases:
        options = {"sliding_window": None, "interpret": True}
        assert mosaic_limits.refusal(*case.structs(), **options) is None


def test_check_skips_what_a_kernel_refuses(monkeypatch, capsys):
    case = DecodeAttentionCase(KVCache, 4, 2, 128, 6, (39,), 40, rotary_dim=32)
    monkeypatch.setattr(check, "sweep", lambda: [case])
    monkeypatch.setattr(check, "mosaic_cases", lambda: [])
    assert main(["check", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [skipped] = [line for line in lines if "skipped: " in line]
    assert " mosaic_gpu_interpret " in skipped
    assert len(rows_of("\n".join(lines))) == 2


@pytest.mark.parametrize(
    ("prologue", "attention", "demanded", "ran", "launches"),
    [
        ({"triton": 1}, {"triton": 2}, None, "triton", "1 + 2"),
        ({"triton": 1}, {"mosaic_gpu": 1, "triton": 1}, None, "triton and mosaic_gpu", "1 + 2"),
        ({}, {}, "triton_interpret", "triton_interpret", "interpreted"),
        ({}, {}, None, "xla", "fused by XLA"),
        ({}, {}, "triton", "xla", "fused by XLA"),
    ],
)
def test_a_row_of_decode_says_what_ran(prologue, attention, demanded, ran, launches):
    counters = collections.Counter(prologue), collections.Counter(attention)
    row = decode.Row(0, None, KVCache, demanded, *counters, 0.0, 0.0, 1.0)
    assert (row.implementation, row.launches) == (ran, launches)


@everyday()
def test_check_draws_a_bar_on_a_terminal(short_sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["check"]) == 0
    error = capsys.readouterr().err
    assert f"checking [{'.' * 30}] 0 of 8" in error
    assert error.endswith("\r\033[K")  # the bar is gone where a row or the end is printed


@everyday()
def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    code = (
        "import jax, sys\n"
        "from g4attn_jax.commands import check\n"
        "from g4attn_jax.__main__ import main\n"
        "check.check = lambda whole_sweep: jax.jit(lambda x: x + 1)(1) == 0\n"
        "sys.exit(main(['check', *sys.argv[1:]]))"
    )
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    python(code, "--no-compilation-cache", environment=home)
    assert list(tmp_path.iterdir()) == []
    python(code, environment=home)
    [host] = (tmp_path / "cache" / "g4attn-jax" / "compiled").iterdir()
    assert any(host.iterdir())
    python(code, environment=home | {"XDG_CACHE_HOME": ""})
    assert (tmp_path / ".cache" / "g4attn-jax" / "compiled" / host.name).is_dir()
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    python(code, environment=home | own | {"XDG_CACHE_HOME": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("has_home", [True, False])
def test_a_cache_that_cannot_be_made_is_a_warning(has_home, tmp_path, monkeypatch, capsys):
    """Under a file; of a user who has no home directory."""
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    if not has_home:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    compilation_cache.use()
    assert capsys.readouterr().err.startswith("warning: no compilation cache: ")
    assert jax.config.jax_compilation_cache_dir is None


def test_ctrl_c_does_not_wait_for_the_device():
    """Functions for the exit of a process do not run; no printed text is lost."""
    code = (
        "import atexit, os, signal, sys, time\n"
        "from g4attn_jax import __main__ as command\n"
        "atexit.register(print, 'waited')\n"
        "def interrupted(args):\n"
        "    print('before')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "command._RUNNERS['check'] = interrupted\n"
        "command.command()"
    )
    done = subprocess.run([sys.executable, "-c", code, "check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "before\n", "interrupted\n")

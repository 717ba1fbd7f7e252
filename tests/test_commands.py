import json
import re

import jax
import jax.numpy as jnp
import pytest

from g4attn_jax.__main__ import main
from g4attn_jax.cache import CompactKVCache, KVCache
from g4attn_jax.commands import cases, check, decode
from g4attn_jax.config import _CONFIGS, Gemma4Config, ProjectionMode
from tests.test_attention import COMMON

MODES = [mode.name for mode in ProjectionMode]


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
        for layer in decode.first_of_each_kind(Gemma4Config.preset(name))
    ]
    assert sorted(set(kinds)) == sorted(MODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gemma-5"], "unknown preset 'gemma-5'; accepted: gemma-4-12b"),
        (["--config", "nowhere/config.json"], "there is no such file"),
        (["--config", str(_CONFIGS)], f"there is no {_CONFIGS / 'config.json'}"),
        (
            ["--config", "gemma-4-e2b", "--layers", "99"],
            "layer is 99; this model has layers 0 to 34",
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
    assert decode.load_config(str(path)) == decode.load_config("gemma-4-12b")
    assert decode.load_config(str(tmp_path)) == decode.load_config("gemma-4-12b")


def test_a_preset_is_one_beside_a_directory_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "gemma-4-12b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert decode.load_config("gemma-4-12b") == Gemma4Config.preset("gemma-4-12b")


@pytest.mark.parametrize(
    ("command", "defaults"),
    [("decode", [2, 32, 16]), ("generate", [16, 64, 0, 4, 0])],
)
def test_help_says_the_defaults_that_there_are(command, defaults, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "None" not in output and "[]" not in output
    assert list(map(float, re.findall(r"default: ([\d.]+)\)", output))) == defaults


def test_check_covers_the_published_sweep():
    norms = list(cases.norm_sweep())
    assert len(norms) == len(set(norms)) == 4 * 3 * 2 * 4
    assert {case.head_dim for case in norms} == {128, 256, 512}
    assert {(case.num_q_heads, case.num_kv_heads) for case in norms} == {(32, 16), (16, 8)}
    assert max(case.tokens for case in norms) == 1024


def test_check_covers_every_mode_and_form_of_the_prologue():
    prologues = list(cases.prologue_sweep())
    assert len(prologues) == len(set(prologues)) == 5 * 3 * 4
    assert len({(case.mode, case.form) for case in prologues}) == 5
    attentions = list(cases.attention_sweep())
    assert len(attentions) == len(set(attentions)) == 3 * 2 * 3 * 3
    assert {case.op.split()[0] for case in attentions} == {"decode_attention", "prefill_attention"}
    assert set(check.sweep()) == {*prologues, *cases.norm_sweep(), *attentions}


@pytest.fixture
def short_sweep(monkeypatch):
    norms = [cases.NormCase(mode, 4, 2, 128, 3) for mode in (None, *ProjectionMode)]
    prologues = [
        cases.PrologueCase(ProjectionMode.QK_ONLY, form, 4, 2, 128, 32, 3)
        for form in (KVCache, CompactKVCache)
    ]
    attentions = [
        cases.AttentionCase(form, 4, 2, 128, 32, None, tokens, context=40)
        for form, tokens in ((KVCache, 1), (CompactKVCache, 17))
    ]
    monkeypatch.setattr(check, "sweep", lambda: [*norms, *prologues, *attentions])


def test_check_passes(short_sweep, capsys):
    assert main(["check"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 16
    assert all(row[-1] == "pass" for row in rows)


def test_check_fails_with_exit_status_1(short_sweep, capsys, monkeypatch):
    """A norm that is 1.6 % off is inside the limits' order of magnitude, and must still fail."""

    def slightly_off(original):
        def run(case, arguments, implementation):
            outputs = original(case, arguments, implementation)
            return jax.tree.map(lambda x: x * jnp.asarray(1.0157, x.dtype), outputs)

        return run

    for case in (cases.NormCase, cases.PrologueCase, cases.AttentionCase):
        monkeypatch.setattr(case, "run", slightly_off(case.run))
    assert main(["check"]) == 1
    assert all(row[-1] == "FAIL" for row in rows_of(capsys.readouterr().out))

"""The settings of a checkpoint's directory."""

import json
import shutil
from pathlib import Path

import pytest

from g4attn_jax import Sampling
from g4attn_jax.generation.settings import GenerationSettings

CONFIG = Path(__file__).parent / "golden_model" / "gemma-4-31b" / "config.json"
VOCAB = 128


def settings_of(directory, fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return GenerationSettings.from_hf(directory, VOCAB)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, Sampling()),
        ({"do_sample": None, "temperature": 0.7}, Sampling()),
        # Who sets a temperature gets the file's filters.
        ({"do_sample": False, "temperature": 0.7, "top_k": 9}, Sampling(0.0, 9)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95},
            Sampling(0.7, 64, 0.95),
        ),
        ({"do_sample": True}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "top_k": None, "top_p": None}, Sampling(1.0, 50, 1.0)),
        ({"do_sample": True, "top_k": 0, "temperature": 2}, Sampling(2, None, 1.0)),
        ({"suppress_tokens": [5, 127]}, Sampling(suppress_tokens=(5, 127))),
        ({"suppress_tokens": None}, Sampling()),
        ({"suppress_tokens": []}, Sampling()),
    ],
)
def test_sampling(fields, sampling, tmp_path):
    assert settings_of(tmp_path, fields).sampling == sampling


def test_what_was_taken_is_listed(tmp_path):
    fields = {"do_sample": True, "top_p": 0.9, "eos_token_id": 1, "suppress_tokens": [4]}
    assert settings_of(tmp_path, fields).taken == {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "suppress_tokens": [4],
        "eos_token_id": [1],
    }
    assert settings_of(tmp_path, {"do_sample": False, "temperature": 3}).taken == {
        "do_sample": False
    }


def test_what_is_not_followed_is_listed(tmp_path):
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "bad_words_ids": None, "min_length": 0}
    assert settings_of(tmp_path, neutral | {"begin_suppress_tokens": []}).not_followed == {}
    fields = {"num_beams": 4, "min_p": 0.1, "bad_words_ids": [[1]]}
    assert settings_of(tmp_path, fields).not_followed == fields


def test_where_a_checkpoint_says_how_text_ends(tmp_path):
    def stops():
        return GenerationSettings.from_hf(tmp_path, VOCAB).stop_tokens

    assert stops() == ()
    shutil.copy(CONFIG, tmp_path)
    assert stops() == (1,)
    assert settings_of(tmp_path, {"eos_token_id": [1, 126]}).stop_tokens == (1, 126)
    assert settings_of(tmp_path, {"eos_token_id": None}).stop_tokens == (1,)
    assert settings_of(tmp_path, {"eos_token_id": []}).stop_tokens == ()
    (tmp_path / "generation_config.json").unlink()
    text = json.loads(CONFIG.read_text())
    for fields in ({"text_config": text}, {"text_config": text, "eos_token_id": None}):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert stops() == (1,)
    (tmp_path / "config.json").write_text("{}")
    assert stops() == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "{} is not a JSON object"),
        ({"do_sample": 1}, "do_sample of {} is 1"),
        ({"do_sample": "true"}, "do_sample of {} is 'true'"),
        ({"temperature": "1"}, "{}: temperature is '1'"),
        ({"temperature": -1}, "{}: temperature is -1"),
        ({"top_k": 2.5}, "{}: top_k is 2.5"),
        ({"top_k": False}, "{}: top_k is False"),
        ({"do_sample": True, "top_p": 2}, "{}: top_p is 2"),
        ({"suppress_tokens": 5}, "suppress_tokens of {} is 5"),
        ({"suppress_tokens": [128]}, "suppress_tokens of {} has 128"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens of {} is ['a']"),
        ({"eos_token_id": True}, "eos_token_id of {} is [True]"),
        ({"eos_token_id": 500}, "eos_token_id of {} has 500"),
    ],
)
def test_wrong_values_are_refused_by_file_and_field(fields, message, tmp_path):
    with pytest.raises(ValueError) as error:
        settings_of(tmp_path, fields)
    assert str(error.value).startswith(message.format(tmp_path / "generation_config.json"))

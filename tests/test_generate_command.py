"""The command `generate`, on the fixtures of the model."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from g4attn_jax import Gemma4Config, Gemma4Decoder, Generator, Sampling
from g4attn_jax import chat as chats
from g4attn_jax.__main__ import main
from g4attn_jax.checkpoint import load_hf_into
from g4attn_jax.commands import compilation_cache, memory
from g4attn_jax.commands import generate as generation
from g4attn_jax.commands.answers import Answers, Text
from tests.everyday import everyday

GOLDEN = Path(__file__).parent / "golden_model"
ASSISTANTS = Path(__file__).parent / "golden_assistant"
NAME = "gemma-4-31b"
TOKENS = np.load(GOLDEN / NAME / "golden.npz")["tokens"]
PROMPT = 24


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """The process of the tests compiles without it, and leaves none in the user's directory."""
    monkeypatch.setattr(compilation_cache, "use", lambda: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A fixture with a tokenizer whose word for token 7 is "w7", and which begins with token 2."""
    directory = tmp_path_factory.mktemp("checkpoint")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / NAME / file, directory)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 126]}))
    return directory


@pytest.fixture(scope="module")
def follows(checkpoint):
    """The tokens that the generator makes after both prompts, in bfloat16 as the command."""
    config = Gemma4Config.from_hf(checkpoint / "config.json")
    decoder, _ = load_hf_into(
        checkpoint,
        nnx.eval_shape(lambda: Gemma4Decoder(config, rngs=nnx.Rngs(0))),
        progress=None,
    )
    generator = Generator(decoder, capacity=PROMPT + 3)
    return generator(TOKENS[:, :PROMPT].tolist(), 3)


def joined(tokens):
    return ",".join(map(str, tokens))


def generate(capsys, *arguments):
    """(standard output, standard error) of the command."""
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr()


def tokens_of(output):
    """The tokens printed for each prompt."""
    lines = [line for line in output.splitlines() if line.startswith("tokens: ")]
    return [[int(token) for token in line.split()[1].split(",")] for line in lines]


def refusal(capsys, *arguments):
    """The last line of standard error of a command that ends with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", *map(str, arguments)])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def planned(monkeypatch):
    """The job of a command that is not run."""
    jobs = []
    monkeypatch.setattr(generation, "generate", jobs.append)

    def plan(*arguments):
        assert main(["generate", *map(str, arguments)]) == 0
        return jobs.pop()

    return plan


@everyday()
def test_tokens_after_tokens(checkpoint, follows, capsys):
    given = [joined(row[:PROMPT]) for row in TOKENS]
    output, error = generate(
        capsys,
        *("--checkpoint", checkpoint, "--token-ids", given[0], "--token-ids", given[1]),
        *("--max-new-tokens", 3),
    )
    assert tokens_of(output) == follows
    assert output.splitlines()[:2] == ["prompt 0:", " ".join(f"w{t}" for t in follows[0])]
    assert re.search(
        r"48 prompt tokens, 6 new tokens; .* first after \d+\.\d+ s, then \d+\.\d+ tokens/s", error
    )


def test_text_after_text(checkpoint, capsys):
    """The tokenizer's own first token is added, and the text is that of the tokens."""
    words = TOKENS[0, :6]
    output, _ = generate(
        capsys,
        *("--checkpoint", checkpoint, "--prompt", " ".join(f"w{t}" for t in words)),
        *("--max-new-tokens", 5),
    )
    text, line = output.splitlines()
    [tokens] = tokens_of(line)
    assert text == " ".join(f"w{token}" for token in tokens)
    output, _ = generate(
        capsys,
        *("--checkpoint", checkpoint, "--token-ids", joined([2, *words]), "--max-new-tokens", 5),
    )
    assert tokens_of(output) == [tokens]


def test_characters_of_several_tokens_are_printed_whole(checkpoint):
    """One token a byte: what is printed is what all of them say, and never half a character."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    word = "é".encode()
    vocab = {f"<0x{[*word, 0xE3][i]:02X}>" if i < 3 else f"w{i}": i for i in range(128)}
    tokenizer.model = WordLevel(vocab, unk_token="w3")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = Text(tokenizer)
    assert [text.after([0]), text.after([1]), text.after([0, 1, 5])] == ["", "é", "éw5"]
    # A byte that is no character is left out: `DecodeStream` fails at what follows it.
    assert [text.after([0, 1, 2]), text.after([5, 6])] == ["é", "w5w6"]
    with pytest.raises(TypeError):
        Text("no tokenizer").after([5])


def test_prompts_are_read_as_they_are(checkpoint, planned, tmp_path):
    """In the order of the command line, whole, whatever the tokenizer was set to in training."""
    directory = shutil.copytree(checkpoint, tmp_path / "settings")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    arguments = ("--prompt", "w5 w6 w7", "--token-ids", "8,9", "--prompt", "w4")
    job = planned("--checkpoint", directory, *arguments)
    assert [list(prompt) for prompt in job.prompts] == [[2, 5, 6, 7], [8, 9], [2, 4]]


@everyday()
def test_stop_tokens_are_those_of_the_checkpoint_unless_given(
    checkpoint, follows, tmp_path, capsys
):
    directory = shutil.copytree(checkpoint, tmp_path / "stops")
    follow = follows[0]
    assert follow[1] != follow[0]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": follow[1]}))
    arguments = ("--checkpoint", directory, "--token-ids", joined(TOKENS[0, :PROMPT]))
    arguments += ("--max-new-tokens", 3)
    assert tokens_of(generate(capsys, *arguments).out) == [follow[:2]]
    assert tokens_of(generate(capsys, *arguments, "--stop-token-ids", 127).out) == [follow]


def test_no_token_stops_if_none_is_given(checkpoint, planned):
    arguments = ("--checkpoint", checkpoint, "--token-ids", "1,2")
    assert list(planned(*arguments).stop_tokens) == [1, 126]
    assert list(planned(*arguments, "--stop-token-ids", "").stop_tokens) == []


PUBLISHED = {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95}
PUBLISHED |= {"suppress_tokens": [5, 6], "eos_token_id": [1, 106]}


@pytest.mark.parametrize(
    ("flags", "sampling", "stops", "taken"),
    [
        (
            (),
            Sampling(0.7, 64, 0.95, (5, 6)),
            [1, 106],
            "do_sample true, temperature 0.7, top_k 64, top_p 0.95, suppress_tokens [5, 6], "
            "eos_token_id [1, 106]",
        ),
        (
            ("--temperature", 0),
            Sampling(0, 64, 0.95, (5, 6)),
            [1, 106],
            "suppress_tokens [5, 6], eos_token_id [1, 106]",
        ),
        (
            ("--top-k", 3, "--stop-token-ids", ""),
            Sampling(0.7, 3, 0.95, (5, 6)),
            [],
            "do_sample true, temperature 0.7, top_p 0.95, suppress_tokens [5, 6]",
        ),
        (
            ("--temperature", 2, "--top-p", 1, "--suppress-token-ids", "7"),
            Sampling(2, 64, 1, (7,)),
            [1, 106],
            "top_k 64, eos_token_id [1, 106]",
        ),
        (
            ("--suppress-token-ids", ""),
            Sampling(0.7, 64, 0.95),
            [1, 106],
            "do_sample true, temperature 0.7, top_k 64, top_p 0.95, eos_token_id [1, 106]",
        ),
    ],
)
def test_a_checkpoints_settings_unless_flags_override(
    flags, sampling, stops, taken, checkpoint, tmp_path, planned
):
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED))
    job = planned("--checkpoint", tmp_path, "--token-ids", "1,2", *flags)
    assert (job.sampling, list(job.stop_tokens)) == (sampling, stops)
    assert job.taken == f"taken from {tmp_path}: {taken}"


@everyday()
def test_what_is_taken_and_what_is_not_followed_is_said(checkpoint, follows, tmp_path, capsys):
    """A suppressed token is not made: without it the answer begins with that one."""
    directory = shutil.copytree(checkpoint, tmp_path / "settings")
    first = follows[0][0]
    fields = {"suppress_tokens": [first], "repetition_penalty": 1.2, "num_beams": 1}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    arguments = ("--checkpoint", directory, "--token-ids", joined(TOKENS[0, :PROMPT]))
    output, error = generate(capsys, *arguments, "--max-new-tokens", 3)
    assert first not in tokens_of(output)[0]
    assert error.splitlines()[:2] == [
        f"taken from {directory}: suppress_tokens [{first}], eos_token_id [1]",
        f"not followed of {directory}: repetition_penalty 1.2",
    ]


def test_tokens_without_a_per_layer_embedding(checkpoint, tmp_path, capsys, planned):
    config = json.loads((GOLDEN / "gemma-4-e2b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size_per_layer_input": 100}))
    given = ("--random-weights", "--config", tmp_path / "config.json")
    assert "--suppress-token-ids: sampling could choose 100, which" in refusal(capsys, *given)
    given += ("--suppress-token-ids", joined(range(100, 128)))
    assert "prompts[0] has 120, which has no per-layer" in refusal(
        capsys, *given, "--token-ids", "5,120"
    )
    assert max(planned(*given, "--prompt-len", 500).prompts[0]) == 99


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "generation_config.json is not a JSON object"),
        ({"text_config": None}, "text_config of {} is None"),
        ({"eos_token_id": "<eos>"}, "eos_token_id of {} is ['<eos>']"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id of {} is [1, 'x']"),
        ({"eos_token_id": 500}, "eos_token_id of {} has 500"),
    ],
)
def test_stop_tokens_of_a_checkpoint_that_are_none(fields, message, checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint / "config.json", tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(fields))
    given = ("--checkpoint", tmp_path, "--token-ids", "1,2")
    assert message.format(path) in refusal(capsys, *given)


@everyday()
def test_random_weights(capsys):
    arguments = ("--random-weights", "--config", GOLDEN / "gemma-4-e2b" / "config.json")
    arguments += ("--layers", 2, "--prompt-len", 20, "--max-new-tokens", 6, "--seed", 5)
    arguments += ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95)
    output, error = generate(capsys, *arguments)
    [tokens] = tokens_of(output)
    assert len(tokens) == 6 and "20 prompt tokens, 6 new tokens" in error
    assert generate(capsys, *arguments).out == output


def test_an_implementation_is_demanded_of_the_models(planned):
    arguments = ("--random-weights", "--config", GOLDEN / "gemma-4-e2b" / "config.json")
    job = planned(*arguments, "--layers", 1, "--implementation", "xla")
    assert generation._decoder(job).layers[0].attention.implementation == "xla"


DRAFTS = re.compile(r"(\d+) of (\d+) drafts accepted \(\d+\.\d%\), (\d\.\d\d) tokens a target step")


def test_an_assistant_says_how_its_drafts_did(checkpoint, follows, capsys):
    given = [joined(row[:PROMPT]) for row in TOKENS]
    output, error = generate(
        capsys,
        *("--checkpoint", checkpoint, "--token-ids", given[0], "--token-ids", given[1]),
        *("--max-new-tokens", 3, "--assistant", ASSISTANTS / NAME, "--draft-tokens", 2),
    )
    assert tokens_of(output) == follows
    accepted, drafted, tokens_per_step = map(float, DRAFTS.search(error).groups())
    # Of three tokens the first has no draft, and the last no room for one after it.
    assert drafted == 2
    assert tokens_per_step == pytest.approx(6 / (6 - accepted), abs=0.01)


@everyday()
def test_random_weights_of_an_assistant_too(capsys):
    arguments = ("--random-weights", "--config", GOLDEN / NAME / "config.json", "--layers", 3)
    arguments += ("--max-new-tokens", 6, "--assistant", ASSISTANTS / NAME)
    output, error = generate(capsys, *arguments)
    [tokens] = tokens_of(output)
    assert len(tokens) == 6 and DRAFTS.search(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft-tokens", "3"], "--draft-tokens needs --assistant"),
        (["--assistant", "nowhere"], "--assistant: there is no nowhere"),
        (["--assistant", str(GOLDEN / NAME)], "--assistant: model_type is 'gemma4_text'; an assis"),
        (
            ["--assistant", str(ASSISTANTS / "gemma-4-e4b")],
            "--assistant: backbone_hidden_size is 48",
        ),
        (
            ["--assistant", str(ASSISTANTS / NAME), "--draft-tokens", "9"],
            "draft_tokens is 9",
        ),
    ],
)
def test_bad_assistants_are_explained(arguments, message, checkpoint, capsys):
    given = ("--checkpoint", checkpoint, "--token-ids", "1,2")
    assert message in refusal(capsys, *given, *arguments)


def test_a_bad_checkpoint_of_an_assistant_is_explained(checkpoint, tmp_path, capsys):
    directory = shutil.copytree(ASSISTANTS / NAME, tmp_path / "changed")
    (directory / "model.safetensors").write_bytes(b"no tensors")
    # Before the model that it drafts for is read, which is larger, and here is bad too.
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(checkpoint / "config.json", target)
    given = ("--checkpoint", target, "--token-ids", "1,2", "--assistant", directory)
    message = refusal(capsys, *given)
    assert "--assistant: " in message and "model.safetensors is not a safetensors" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --checkpoint --random-weights is required"),
        (["--random-weights"], "--random-weights needs --config"),
        (["--random-weights", "--config", "gemma-5"], "unknown preset 'gemma-5'"),
        (["--random-weights", "--config", "31b", "--prompt", "x"], "--prompt needs --checkpoint"),
        (["--random-weights", "--config", "31b", "--layers", "61"], "layers is 61"),
        (
            ["--random-weights", "--config", "31b", "--token-ids", "5,262144"],
            "--token-ids has 262144",
        ),
        (
            ["--random-weights", "--config", "31b", "--token-ids", "5", "--prompt-len", "3"],
            "--prompt-len is for a random prompt",
        ),
        (
            ["--random-weights", "--config", "31b", "--stop-token-ids", "262144"],
            "--stop-token-ids has 262144",
        ),
        (
            ["--random-weights", "--config", "31b", "--suppress-token-ids", "262144"],
            "--suppress-token-ids has 262144",
        ),
        (
            ["--random-weights", "--config", "31b", "--temperature", "-1"],
            "temperature is -1.0",
        ),
        (["--random-weights", "--config", "31b", "--top-k", "0"], "top_k is 0"),
        (
            ["--random-weights", "--config", "31b", "--top-k", "5", "--top-p", "0.9"],
            "--top-k and --top-p without a --temperature above 0 would change nothing",
        ),
        (
            ["--random-weights", "--config", "31b", "--max-new-tokens", "100000000000"],
            "--max-new-tokens is 100000000000",
        ),
        (["--random-weights", "--token-ids", "1,b"], "must be tokens separated by commas, not"),
        (["--random-weights", "--seed", "-1"], "must be an integer of 0 to 4294967295, not '-1'"),
        (["--random-weights", "--seed", str(2**63)], "must be an integer of 0 to 4294967295, not"),
        (["--random-weights", "--max-new-tokens", "0"], "must be an integer of 1 or more"),
        (
            ["--random-weights", "--config", "31b", "--prompt-len", str(10**15)],
            "--prompt-len is 1000000000000000 and --max-new-tokens 64",
        ),
        (["--checkpoint", "nowhere", "--prompt", "x"], "--checkpoint is nowhere; there is no"),
        (["--checkpoint", "x", "--random-weights"], "not allowed with argument --checkpoint"),
        (
            ["--random-weights", "--config", "31b", "--implementation", "cuda"],
            "implementation is 'cuda'",
        ),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    assert message in refusal(capsys, *arguments)


def test_a_kernel_that_cannot_run_the_model_is_explained(capsys, monkeypatch):
    monkeypatch.setattr(generation, "generate", None)  # it is not begun
    config = GOLDEN / "gemma-4-12b" / "config.json"
    message = refusal(
        capsys, "--random-weights", "--config", config, "--implementation", "mosaic_gpu_interpret"
    )
    assert "error: implementation 'mosaic_gpu_interpret' does not run" in message


def test_bad_checkpoints_are_explained(checkpoint, tmp_path, capsys, monkeypatch):
    given = ("--token-ids", "1,2")
    assert "--checkpoint needs --prompt, --prompt-file, --messages or --token-ids" in refusal(
        capsys, "--checkpoint", checkpoint
    )
    for option in ("--config", "--layers", "--prompt-len"):
        assert f"{option} is for --random-weights alone" in refusal(
            capsys, "--checkpoint", checkpoint, *given, option, 2
        )
    directory = shutil.copytree(checkpoint, tmp_path / "changed")
    (directory / "model.safetensors").write_bytes(b"no tensors")
    message = refusal(capsys, "--checkpoint", directory, *given)
    assert "--checkpoint: " in message and "model.safetensors is not a safetensors" in message
    (directory / "tokenizer.json").write_text("{}")
    message = refusal(capsys, "--checkpoint", directory, *given)
    assert "tokenizer.json is no tokenizer" in message
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": None}))
    assert "--checkpoint: vocab_size is missing" in refusal(
        capsys, "--checkpoint", directory, *given
    )
    shutil.copy(checkpoint / "config.json", directory)
    (directory / "tokenizer.json").unlink()
    message = refusal(capsys, "--checkpoint", directory, "--prompt", "w5")
    assert "--prompt needs" in message and "tokenizer.json, which is not there" in message
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = refusal(capsys, "--checkpoint", checkpoint, "--prompt", "w5")
    assert "--prompt needs the package tokenizers: pip install 'g4attn-jax[generate]'" in message


@everyday()
def test_a_checkpoint_needs_no_tokenizer(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    arguments = ("--checkpoint", checkpoint, "--token-ids", "2,7", "--max-new-tokens", 2)
    lines = generate(capsys, *arguments).out.splitlines()
    assert len(lines) == 1 and len(tokens_of(lines[0])[0]) == 2


CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}w9"


@pytest.fixture
def chat(checkpoint, tmp_path):
    """A checkpoint whose template writes a token for each role, and the first token."""
    directory = shutil.copytree(checkpoint, tmp_path / "chat")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"user": 100, "system": 101}
    for word in ("w100", "w101"):
        del tokenizer["model"]["vocab"][word]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "w2 "}))
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def prompts_of(job):
    return [list(prompt) for prompt in job.prompts]


def test_chats_go_through_the_template_of_the_checkpoint(chat, planned, tmp_path, capsys):
    """The template writes the first token, and the tokenizer none before it."""
    given = ("--checkpoint", chat, "--chat", "--prompt", "w5", "--token-ids", "7", "--prompt", "w6")
    assert prompts_of(planned(*given)) == [[2, 100, 5, 9], [7], [2, 100, 6, 9]]
    told = planned(*given, "--system", "w8")
    assert prompts_of(told) == [[2, 101, 8, 100, 5, 9], [7], [2, 101, 8, 100, 6, 9]]
    messages = [{"role": "system", "content": "w4"}, {"role": "user", "content": "w5"}]
    for content in (messages, {"messages": messages}):
        (tmp_path / "chat.json").write_text(json.dumps(content))
        job = planned("--checkpoint", chat, "--messages", tmp_path / "chat.json")
        assert prompts_of(job) == [[2, 101, 4, 100, 5, 9]]
    assert capsys.readouterr().err == ""


def test_variables_of_a_template_stand_beside_the_messages(chat, planned, tmp_path):
    (chat / "chat_template.jinja").write_text("{{ thought }} {{ tools[0] }} w9")
    content = {"messages": [{"role": "user"}], "tools": ["w5"], "thought": "w6"}
    (tmp_path / "chat.json").write_text(json.dumps(content))
    job = planned("--checkpoint", chat, "--messages", tmp_path / "chat.json")
    assert prompts_of(job) == [[6, 5, 9]]


def test_a_prompt_without_the_template_is_warned_of(chat, checkpoint, planned, capsys):
    assert prompts_of(planned("--checkpoint", chat, "--prompt", "w5")) == [[2, 5]]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {chat} has a chat template, and --prompt is read without it")
    planned("--checkpoint", chat, "--token-ids", "5")
    planned("--checkpoint", checkpoint, "--prompt", "w5")
    (chat / "chat_template.jinja").unlink()
    (chat / "tokenizer_config.json").write_text("not JSON")
    planned("--checkpoint", chat, "--prompt", "w5")
    assert capsys.readouterr().err == ""


def test_prompts_in_files(checkpoint, chat, planned, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("w5\nw6\n")
    job = planned("--checkpoint", checkpoint, "--prompt-file", path, "--prompt", "w7")
    assert prompts_of(job) == [[2, 5, 6], [2, 7]]
    job = planned("--checkpoint", chat, "--chat", "--prompt-file", path)
    assert prompts_of(job) == [[2, 100, 5, 6, 9]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--token-ids", "1"], "--chat needs --prompt or --prompt-file"),
        (["--system", "x", "--prompt", "w5"], "--system needs --chat"),
        (["--prompt-file", "{}/none"], "argument --prompt-file: {}/none cannot be read: No such"),
        (["--prompt-file", "{}/bytes"], "argument --prompt-file: {}/bytes is not UTF-8: "),
        (["--messages", "{}/text"], "argument --messages: {}/text is not JSON: "),
        (["--messages", "{}/object"], "{}/object is neither a list of messages nor an object with"),
        (["--messages", "{}/empty"], "--messages: messages is []"),
        (
            ["--messages", "{}/refused"],
            "--messages: the chat template does not take these mess",
        ),
    ],
)
def test_bad_chats_are_explained(arguments, message, chat, tmp_path, capsys):
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "text").write_text("w5")
    (tmp_path / "object").write_text('{"message": []}')
    (tmp_path / "empty").write_text("[]")
    (tmp_path / "refused").write_text('[{"role": "user", "content": "w5"}]')
    (chat / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert message.format(tmp_path) in refusal(capsys, "--checkpoint", chat, *arguments)


@pytest.mark.parametrize("stage", ["job_of", "generate"])
def test_files_that_cannot_be_read_are_explained(stage, checkpoint, capsys, monkeypatch):
    def refused(*arguments):
        raise PermissionError(13, "Permission denied", "a file")

    monkeypatch.setattr(generation, stage, refused)
    message = refusal(capsys, "--checkpoint", checkpoint, "--token-ids", "1")
    assert message == "g4attn-jax generate: error: [Errno 13] Permission denied: 'a file'"


def test_what_chats_need(chat, checkpoint, tmp_path, capsys, monkeypatch):
    given = ("--prompt", "w5", "--chat")
    message = refusal(capsys, "--checkpoint", checkpoint, *given)
    assert f"--chat needs a chat template; {checkpoint} has no chat_template.jinja" in message
    message = refusal(capsys, "--random-weights", "--config", "31b", *given)
    assert "--prompt needs --checkpoint, for its tokenizer" in message
    chats._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    message = refusal(capsys, "--checkpoint", chat, *given)
    assert "--prompt: chat templates need the package jinja2: pip install 'g4attn-jax[" in message


def test_several_answers_are_printed_in_turn_as_they_are_made(checkpoint, capsys):
    """The second prompt's text waits for the end of the first, and is not lost."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    job = SimpleNamespace(
        prompts=[[1], [1], [1]], tokenizer=tokenizer, max_new_tokens=3, stop_tokens=[9]
    )
    answers = Answers(job)
    printed = []
    for new in ([[5], [6], [9]], [[5, 7], [9], []], [[], [], []]):
        answers.add(new)
        printed.append(capsys.readouterr().out)
    assert printed == [
        "prompt 0:\nw5",
        " w5 w7\ntokens: 5,5,7\nprompt 1:\nw6 w9\ntokens: 6,9\nprompt 2:\nw9\ntokens: 9\n",
        "",
    ]


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_bytes", lambda: 2**20)
    arguments = ["--random-weights", "--config", str(GOLDEN / NAME / "config.json")]
    assert main(["generate", *arguments, "--max-new-tokens", "100000"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"g4attn-jax generate: error: out of memory: weights take [\d.]+ GiB, caches [\d.]+ GiB, "
        r"besides activations; .* has 0\.00 GiB",
        line,
    )


def test_what_is_said_to_be_needed_is_what_there_is(planned):
    job = planned("--random-weights", "--config", GOLDEN / NAME / "config.json")
    decoder = Gemma4Decoder(job.config, rngs=nnx.Rngs(0))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(decoder)))
    needs = generation._needs(job)
    assert needs["weights take"] == weights and 0 < needs["caches"] < weights

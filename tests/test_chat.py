"""Chat templates against what transformers renders (tests/golden_chat/make_golden.py)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from g4attn_jax import chat
from g4attn_jax.chat import ChatTemplate

GOLDEN = Path(__file__).parent / "golden_chat"
CASES = json.loads((GOLDEN / "golden.json").read_text("utf-8"))
USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.from_hf(GOLDEN)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "text" in case])
def test_text_and_tokens_are_those_of_transformers(name, template):
    case = CASES[name]
    text = template.render(**case["arguments"])
    assert text == case["text"]
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens == case["tokens"]
    # The tokenizer would put the first token, which the template has written, before it again.
    if text.startswith("<bos>"):
        assert tokens.count(0) == 1 and tokenizer.encode(text).ids == [0, *tokens]


def test_what_a_template_refuses(template):
    case = CASES["refused"]
    with pytest.raises(ValueError, match="does not take these messages: two turns of user") as info:
        template.render(**case["arguments"])
    assert str(info.value).endswith(case["error"])


def test_a_variable_may_have_any_name():
    assert (
        ChatTemplate({"default": "{{ self_ }}{{ template }}"}).render(
            USER, **{"self_": 1, "template": 2, "self": 3}
        )
        == "12"
    )


def test_objects_of_a_template():
    source = "{{ dict(a=1).a }}{{ dict.fromkeys('bc', 2) | dictsort }}{{ namespace({'x': 3}).x }}"
    assert ChatTemplate({"default": source}).render(USER) == "1[('b', 2), ('c', 2)]3"


def test_the_form_of_today_is_that_of_the_clock():
    [year] = {ChatTemplate({"default": "{{ strftime_now('%Y') }}"}).render(USER)}
    assert len(year) == 4 and year.isdecimal()


def test_messages_are_left_as_they_are(template):
    messages = [{"role": "assistant", "content": None, "thinking": "hm"}]
    before = json.dumps(messages)
    template.render(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ dict.update(messages[0], x=1) }}",
        "{% set ns = namespace(__init__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ '{0.__class__.x}'.format(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source):
    """Attributes of Python's own are refused, and nothing that it is given changes."""
    with pytest.raises(ValueError, match="the chat template does not take these messages: "):
        ChatTemplate({"default": source}).render(USER)


def test_templates_are_files_before_entries_of_the_tokenizer(tmp_path):
    assert ChatTemplate.from_hf(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}one", "bos_token": "<b>"}))
    assert ChatTemplate.from_hf(tmp_path).render(USER) == "<b>one"
    named = [
        {"name": "default", "template": "{{ eos_token }}default"},
        {"name": "tool_use", "template": "tools"},
    ]
    eos = {"content": "<e>", "lstrip": False}
    config.write_text(json.dumps({"chat_template": named, "eos_token": eos}))
    several = ChatTemplate.from_hf(tmp_path)
    assert several.render(USER) == "<e>default"
    assert several.render(USER, tools=[]) == "tools"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<map>"}))
    assert ChatTemplate.from_hf(tmp_path).render(USER) == "<map>default"
    config.write_text(config.read_text()[:-1] + ', "added_tokens_decoder": {}}')
    assert ChatTemplate.from_hf(tmp_path).render(USER) == "<e>default"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_hf(tmp_path).templates == {"default": "file"}
    shutil.copytree(GOLDEN, tmp_path / "additional_chat_templates")  # has one, chat_template.jinja
    assert set(ChatTemplate.from_hf(tmp_path).templates) == {"default", "chat_template"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"default": "x"}, "chat_template of .*tokenizer_config.json is .*"),
        ([{"name": "default"}], "accepted: text, or a list of objects with name and template"),
        ([{"name": "default", "template": 1}], "accepted: text, or a list of objects with name"),
        (5, "accepted: text, or a list of objects with name and template"),
    ],
)
def test_other_forms_of_templates_are_refused(given, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(ValueError, match=message):
        ChatTemplate.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": "hello"}, "messages is 'hello'"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            r"messages\[0\] has a part of type 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": object()}]}]},
            r"messages\[0\].content\[0\].text is a object",
        ),
        ({"messages": [{1: 2}]}, r"messages\[0\] has the key 1"),
        ({"messages": USER, "tools": [print]}, r"tools\[0\] is a builtin_function_or_method; acc"),
    ],
)
def test_other_messages_are_refused(arguments, message, template):
    with pytest.raises(ValueError, match=message):
        template.render(**arguments)


def test_templates_that_are_none():
    with pytest.raises(ValueError, match="the chat template is none, in line 2: "):
        ChatTemplate({"default": "x\n{% if %}"}).render(USER)
    with pytest.raises(ValueError, match="the chat template is none: 'break' outside loop"):
        ChatTemplate({"default": "{% break %}"}).render(USER)
    with pytest.raises(
        ValueError, match="the chat templates are rag, x; needed: one named default"
    ):
        ChatTemplate({"x": "", "rag": ""}).render(USER)


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8: "):
        ChatTemplate.from_hf(tmp_path)


def test_the_package_that_it_needs_is_named(monkeypatch):
    chat._compiled.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "jinja2", None)
        with pytest.raises(ImportError, match=r"pip install 'g4attn-jax\[generate\]'"):
            ChatTemplate({"default": "none yet"}).render(USER)
    monkeypatch.setattr("jinja2.__version__", "3.1.5")
    with pytest.raises(ImportError, match=r"jinja2 is 3\.1\.5; chat templates need 3\.1\.6"):
        ChatTemplate({"default": "none yet"}).render(USER)

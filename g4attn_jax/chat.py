"""Messages of a chat to the text that a model reads, by the template that its checkpoint has.

A checkpoint was tuned on turns written in one form, which its directory describes in the language
of Jinja2. A template is code from elsewhere, so it runs in Jinja2's immutable sandbox, on copies of
plain JSON values. Needs the package jinja2, of the extra `generate`.

Source: `apply_chat_template` of Hugging Face transformers 5.24, whose text this reproduces.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

from g4attn_jax.json_file import read_object

Message = Mapping[str, Any]

# Variables of a template that hold the text of a special token.
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Names that one thing, the reasoning before an answer, has in messages; the first found is taken.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Parts of a message that are no text; the decoder has no tower to read them with.
_MEDIA = ("image", "image_url", "audio", "input_audio", "video", "video_url")
# Older ones let a template out of the sandbox (CVE-2025-27516).
_OLDEST_JINJA = (3, 1, 6)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a checkpoint.

    Attributes:
        templates: source by name. "default" is the usual one; "tool_use", where there is one, is
            for messages with tools.
        special_tokens: the text of tokens that templates write, such as "<bos>" under "bos_token".
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_hf(cls, directory: str | PathLike) -> Self | None:
        """The templates of a directory of Hugging Face's format.

        Those are `chat_template.jinja` and `additional_chat_templates/NAME.jinja`; if there are
        none, `chat_template` of `tokenizer_config.json`, which is one template or a list of
        {"name": ..., "template": ...}.

        Returns:
            The templates; None if the directory has none.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file has another form; the message names it.
        """
        directory = Path(directory)
        path = directory / "tokenizer_config.json"
        fields = read_object(path) if path.is_file() else {}
        templates = _files(directory) or _listed(fields.get("chat_template"), path)
        if not templates:
            return None
        return cls(templates, _special_tokens(directory, fields))

    def render(
        self,
        /,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a chat.

        The text has the special tokens that the model expects, the first token included: it is to
        be encoded without adding any (`tokenizer.encode(text, add_special_tokens=False)`).

        Args:
            messages: one or more, each with a "role" and mostly a "content". Fields that are None
                count as absent.
            tools: JSON schemas of functions that the model may call.
            documents: that the model may refer to.
            add_generation_prompt: whether the beginning of the model's turn follows.
            variables: further ones that the template knows, such as `enable_thinking`.

        Raises:
            ImportError: the package jinja2 is not installed, or is too old.
            ValueError: messages is empty, or an argument has what JSON has not or a part that is no
                text; there is no template for it; or the template is none, fails, or refuses.
        """
        plain = {
            "messages": _with_reasoning(_messages(messages)),
            "tools": _plain("tools", tools),
            "documents": _plain("documents", documents),
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **{name: _plain(name, value) for name, value in variables.items()},
        }
        template = _compiled(self._source(tools))
        try:
            return template.render(plain)
        except Exception as error:  # templates raise what Python does, and Jinja2's errors
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def _source(self, tools):
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            names = ", ".join(sorted(self.templates))
            raise ValueError(f"the chat templates are {names}; needed: one named default")
        return self.templates["default"]


def _files(directory):
    paths = {"default": directory / "chat_template.jinja"}
    for path in sorted(directory.glob("additional_chat_templates/*.jinja")):
        paths[path.stem] = path
    return {name: _source_text(path) for name, path in paths.items() if path.is_file()}


def _source_text(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _listed(given, path):
    """The templates under `chat_template` of a tokenizer_config.json."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    try:
        templates = {entry["name"]: entry["template"] for entry in given}
    except (KeyError, TypeError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise ValueError(
            f"chat_template of {path} is {given!r}; accepted: text, or a list of objects with name "
            "and template"
        )
    return templates


def _special_tokens(directory, fields):
    path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in fields and path.is_file():
        fields = fields | read_object(path)
    tokens = {}
    for name in (f"{name}_token" for name in _SPECIAL_TOKENS):
        token = fields.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _messages(messages):
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages is {messages!r}; accepted: a list of one message or more")
    checked = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name} is {message!r}; accepted: an object with role and content")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, Mapping) and part.get("type") in _MEDIA:
                raise ValueError(f"{name} has a part of type {part['type']!r}; accepted: text")
        checked.append(_plain(name, message))
    return checked


def _with_reasoning(messages):
    """Messages whose reasoning templates find under each of its two usual names."""
    named = []
    for message in messages:
        found = [message[name] for name in _REASONING if message.get(name) is not None]
        if found:
            message = {"thinking": found[0], **message, "reasoning_content": found[0]}
        named.append(message)
    return named


def _plain(name, value):
    """A copy, of the types of JSON alone: templates may call the methods of others."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_key(name, key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
    raise ValueError(f"{name} is a {type(value).__name__}; accepted: what JSON has")


def _key(name, key):
    if type(key) is not str:
        raise ValueError(f"{name} has the key {key!r}; accepted: text")
    return key


@functools.lru_cache(maxsize=16)
def _compiled(source):
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is none, in line {error.lineno}: {error.message}"
        ) from error
    except SyntaxError as error:  # of the Python that Jinja2 made of it, as a break outside a loop
        raise ValueError(f"the chat template is none: {error.msg}") from error


def _environment():
    """Environment that transformers gives a template: whitespace, tags, filters, functions."""
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(
            "chat templates need the package jinja2: pip install 'g4attn-jax[generate]'"
        ) from error
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdecimal())
    if version < _OLDEST_JINJA:
        raise ImportError(
            f"jinja2 is {jinja2.__version__}; chat templates need 3.1.6 or later: "
            "pip install 'g4attn-jax[generate]'"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["namespace"] = _namespace_class()
    environment.globals["dict"] = _Dict()
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as it is: Jinja2's own filter writes <, > and & in another way, for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message):
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form):
    return datetime.datetime.now().strftime(form)


class _Dict:
    """`dict` in a template: makes objects, and has no methods that would change others."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def _generation_tag():
    """The extension for `{% generation %}` ... `{% endgeneration %}`: what a model is to say.

    Training masks use the mark; the text is what stands between.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _namespace_class():
    """Jinja2's `namespace`, without names that begin with an underscore, as Python's own do."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class SafeNamespace(Namespace):
        def __init__(*args, **kwargs):
            # Without a name for the first, so that "self" may be one of the namespace.
            self, *rest = args
            Namespace.__init__(self)
            for name, value in dict(*rest, **kwargs).items():
                self[name] = value

        def __setitem__(self, name, value):
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace has no name {name!r}; accepted: without _ first")
            super().__setitem__(name, value)

    return SafeNamespace

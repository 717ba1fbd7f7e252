"""Writes golden.json: what transformers 5.24.0 makes of chats, with the template beside this file.

    pip install transformers==5.24.0 jinja2==3.1.6
    python tests/golden_chat/make_golden.py

Each entry has the arguments of `apply_chat_template` and the text that it rendered, or the error of
a template that refuses them, and the tokens of the text.
"""

import json
import tempfile
from pathlib import Path

import transformers
from jinja2 import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

HERE = Path(__file__).parent
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it is like at a <place>, in °C & mm",
            "parameters": {
                "type": "object",
                "properties": {
                    "unit": {"type": "string", "enum": ["°C", "K"]},
                    "place": {"type": "string"},
                },
                "required": ["place"],
            },
        },
    }
]
USER = {"role": "user", "content": "  What is <2> & 2?\n"}
SYSTEM = {"role": "system", "content": "Answer briefly. "}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Köln", "a": 1}},
        }
    ],
}
RESULT = {"role": "tool", "name": "weather", "content": "21 °C"}
ANSWER = {"role": "assistant", "content": "Four."}
THOUGHT = {"role": "assistant", "content": "Four.", "thinking": "2 + 2 = 4"}
REASONED = {"role": "assistant", "content": "Four.", "reasoning": "easy", "thinking": None}
PARTS = {
    "role": "user",
    "content": [
        {"type": "text", "text": " one "},
        {"type": "other"},
        {"type": "text", "text": "two"},
    ],
}
CASES = {
    "one turn": {"messages": [USER], "add_generation_prompt": True},
    "no generation prompt": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    "thinking": {"messages": [USER], "add_generation_prompt": True, "enable_thinking": True},
    "not thinking": {"messages": [USER], "add_generation_prompt": True, "enable_thinking": False},
    "several turns": {"messages": [SYSTEM, USER, ANSWER, PARTS, THOUGHT, USER, REASONED]},
    "tools": {"messages": [USER], "tools": TOOLS, "add_generation_prompt": True},
    "tool call": {
        "messages": [SYSTEM, USER, CALL, RESULT],
        "tools": TOOLS,
        "add_generation_prompt": True,
    },
    "documents": {"messages": [USER], "documents": [{"title": "A", "text": "a"}, {"title": "B"}]},
    "break": {"messages": [USER, {"role": "stop"}, USER], "add_generation_prompt": True},
    "refused": {"messages": [USER, USER]},
    "a special token of the caller": {"messages": [USER], "bos_token": "<first>"},
}


def main() -> None:
    """Writes the file."""
    template = (HERE / "chat_template.jinja").read_text("utf-8")
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = _tokenizer(Path(directory), template)
        golden = {name: _rendered(tokenizer, case) for name, case in CASES.items()}
    text = json.dumps(golden, indent=1, ensure_ascii=False)
    (HERE / "golden.json").write_text(text + "\n", "utf-8")


def _rendered(tokenizer, case):
    arguments = dict(case)
    messages = arguments.pop("messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except TemplateError as error:
        return {"arguments": case, "error": str(error)}
    tokens = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
    return {"arguments": case, "text": text, "tokens": tokens}


def _tokenizer(directory, template):
    """Words of the template, and a first token "<bos>" that the tokenizer too would add."""
    words = ["<bos>", "<unk>", "<turn>user", "<turn>model", "<turn>system", "<end>", "What", "is"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(HERE / "tokenizer.json"))
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), bos_token="<bos>", unk_token="<unk>"
    )
    loaded.chat_template = template
    loaded.save_pretrained(directory)
    (HERE / "tokenizer_config.json").write_text((directory / "tokenizer_config.json").read_text())
    return transformers.AutoTokenizer.from_pretrained(directory)


if __name__ == "__main__":
    main()

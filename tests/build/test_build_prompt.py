"""The chat template as literal pieces: what the published tokenizer itself makes of a text, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.build.prompt import ChatTemplate, compile_chat_template
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.diagnostics import CosmosExportError

pytestmark = pytest.mark.xdist_group("components")

# The published kind: a template of Jinja expressions, with other roles and conditions that a prompt does not meet.
CHATML = """\
{%- if tools %}{{- 'tools: ' + (tools | tojson) }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' or message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}{{- message.content }}{%- else %}{{- message.content[0].text }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture
def folder(tmp_path: Path, omni: Path) -> Path:
    """The tokenizer of a checkpoint that a test may change."""
    return harness.copy_checkpoint(omni, tmp_path / "checkpoint") / "text_tokenizer"


def template(folder: Path, text: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text)
    return compile_chat_template(open_checkpoint(folder.parent))


def refusal(folder: Path, code: str) -> str:
    with pytest.raises(CosmosExportError) as caught:
        compile_chat_template(open_checkpoint(folder.parent))
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value.message


def test_the_pieces(folder: Path) -> None:
    found = template(folder, CHATML)
    assert found.plain == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert found.system == (
        "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
    )  # fmt: skip
    assert found.suffix_ids == (258, 259)


def test_pieces_that_are_empty(folder: Path) -> None:
    found = template(folder, "{% for message in messages %}{{ message.content }}{% endfor %}")
    assert (found.plain, found.system) == (("", ""), ("", "", ""))


@pytest.fixture(scope="module")
def compiled(omni: Path) -> tuple[ChatTemplate, Any, Any]:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = omni / "text_tokenizer"
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return compile_chat_template(open_checkpoint(omni)), AutoTokenizer.from_pretrained(folder), own


_TEXTS = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from(["<|im_end|>", "<|vision_start|>", "\r\n", " ", "{%", "}}"]))
).map("".join)


@settings(deadline=None, max_examples=60)
@given(user=_TEXTS, system=st.none() | _TEXTS)
def test_any_text(compiled: tuple[ChatTemplate, Any, Any], user: str, system: str | None) -> None:
    pieces, published, own = compiled
    messages = [{"role": "user", "content": user}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = pieces.text(user, system)
    assert text == published.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = published.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert own.encode(text, add_special_tokens=False).ids == expected["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# What is not text between two others


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("message.content | trim", "changes the texts of [{'role': 'user', 'content': ' '}]"),
        ("message.content | upper", "has the text of a message 0 times"),
        ("message.content + message.content", "has the text of a message 2 times"),
        ("message.content.replace('{', '(')", "changes the texts of"),
        ("message.content.split('<|im_end|>')[0]", "changes the texts of"),
        ("message.content | replace('\\n', ' ')", "changes the texts of"),
        ("message.content or 'nothing'", "changes the texts of [{'role': 'user', 'content': ''}]"),
        ("message.content | e", "changes the texts of"),
        ("message.content[:20000]", "changes the texts of"),
        ("raise_exception('no')", "cannot be applied to"),
        ("message.missing.missing", "cannot be applied to"),
    ],
)
def test_a_template_that_changes_texts_is_refused(folder: Path, content: str, said: str) -> None:
    text = "{% for message in messages %}<u>{{ CONTENT }}</u>{% endfor %}".replace("CONTENT", content)
    (folder / "chat_template.jinja").write_text(text)
    assert said in refusal(folder, "CX227")


def test_a_template_that_moves_the_system_message_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    assert "out of order" in refusal(folder, "CX227")


def test_a_template_that_looks_at_the_text_is_refused(folder: Path) -> None:
    looks = "{% for m in messages %}{% if '🤖' in m.content %}!{% endif %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(looks)
    assert "changes the texts" in refusal(folder, "CX227")


def test_no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "cannot be applied" in refusal(folder, "CX227")


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not say the same


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_limit_in_the_tokenizer_file_is_refused(folder: Path) -> None:
    """transformers does not heed it, other readers do."""
    limit = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    edited(folder / "tokenizer.json", lambda document: document.update(truncation=limit))
    assert "gives other ids than the published pipeline for" in refusal(folder, "CX228")


def test_tokens_that_the_tokenizer_file_does_not_have_are_refused(folder: Path) -> None:
    more = ["<|vision_start|>", "<|new|>"]
    edited(folder / "tokenizer_config.json", lambda document: document.update(additional_special_tokens=more))
    assert "<|new|>" in refusal(folder, "CX228")


def test_a_tokenizer_without_the_start_of_generation(folder: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        for token in document["added_tokens"]:
            token["content"] = token["content"].replace("vision_start", "elsewhere")

    edited(folder / "tokenizer.json", rename)
    edited(folder / "tokenizer_config.json", lambda document: document.pop("additional_special_tokens"))
    assert "has no <|vision_start|>" in refusal(folder, "CX229")


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    edited(folder / "tokenizer_config.json", lambda document: document.pop("eos_token"))
    assert "has no end-of-text token" in refusal(folder, "CX229")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_file_that_is_none(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "cannot be loaded as" in refusal(folder, "CX229")


@pytest.mark.parametrize("stated", [["os", "system"], ["transformers", "AutoModel"], ["transformers", "Nothing"], "x"])
def test_a_class_that_is_no_tokenizer(folder: Path, stated: Any) -> None:
    edited(folder.parent / "model_index.json", lambda document: document.update(text_tokenizer=stated))
    assert "is no tokenizer that transformers reads" in refusal(folder, "CX229")


def test_remote_code_is_not_run(folder: Path) -> None:
    """Nothing of the folder is imported, whatever its configuration asks for."""
    (folder / "tokenization_mine.py").write_text("raise SystemExit('remote code ran')\n")
    mine = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
    edited(folder / "tokenizer_config.json", lambda document: document.update(auto_map=mine, tokenizer_class="Mine"))
    assert compile_chat_template(open_checkpoint(folder.parent)).plain[0] == "<|im_start|>user\n"

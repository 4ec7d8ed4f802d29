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

from cosmos_export.bundle import PromptRecord
from cosmos_export.checkpoint import open_checkpoint
from cosmos_export.compiler import prompt
from cosmos_export.compiler.bounded import ProcessLimits
from cosmos_export.compiler.prompt import ChatTemplate, compile_chat_template
from cosmos_export.diagnostics import CosmosExportError, UserError
from cosmos_export.runtime.tokenize import PromptTokenizer

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


def proven_here(module: str, asked: Any, limits: ProcessLimits) -> Any:
    return prompt.answer(asked, lambda name: None)


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The proof runs in this process, in a hundredth of the time; this is what runs it in another one."""
    real = prompt.run_bounded
    monkeypatch.setattr(prompt, "run_bounded", proven_here)
    return real


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
        ("1 / 0", "cannot be applied to"),
        ("messages + 1", "cannot be applied to"),
        ("'a' * 10 ** 30", "cannot be applied to"),
        ("messages()", "cannot be applied to"),
        ("message.content.encode('rot13')", "cannot be applied to"),
        ("strftime_now('%Y')", "a bundle must not depend on the day on which it is built"),
    ],
)
def test_a_template_that_changes_texts_is_refused(folder: Path, content: str, said: str) -> None:
    text = "{% for message in messages %}<u>{{ CONTENT }}</u>{% endfor %}".replace("CONTENT", content)
    (folder / "chat_template.jinja").write_text(text)
    assert said in refusal(folder, "CX227")


@pytest.mark.parametrize(
    "text",
    [
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in",
        "{{ 1 | nothing }}",
        "{{ " + "(" * 500 + ")" * 500 + " }}",
    ],
)
def test_a_template_that_cannot_be_run_is_refused(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)
    assert "cannot be applied" in refusal(folder, "CX227")


BOMBS = {
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "one large string": "{{ 'a' * 3000000000 }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_without_bounds_is_stopped(
    folder: Path, name: str, bounded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "run_bounded", bounded)
    monkeypatch.setattr(prompt, "_LIMITS", ProcessLimits(cpu_s=3, memory_bytes=1 << 29))
    (folder / "chat_template.jinja").write_text(BOMBS[name])
    said = refusal(folder, "CX227")
    assert ("takes more than 3 s" if name == "loops" else "takes more than 512 MiB of memory") in said


def test_the_process_with_limits_finds_the_same(
    folder: Path, bounded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = template(folder, CHATML)
    monkeypatch.setattr(prompt, "run_bounded", bounded)
    assert found == template(folder, CHATML)
    (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert "division by zero" in refusal(folder, "CX227")


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


@pytest.mark.parametrize("text", ["{", "{}", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_file_that_is_none(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "is no tokenizer" in refusal(folder, "CX229")


def test_a_tokenizer_file_that_is_empty(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("")
    assert "is an empty file" in refusal(folder, "CX134")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}}, "normalizer `Replace`"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10_000_000}}, "normalizer `Prepend`"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": True}},
         "pre_tokenizer `Metaspace`"),
        ({"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "x"}}, "it pads every text"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "model `WordLevel`"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_texts_longer_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    file = folder / "tokenizer.json"
    edited(file, lambda document: document.update(change))
    assert said in refusal(folder, "CX229")
    record = PromptRecord("tokenizer.json", ("", ""), ("", "", ""), True, (0, 1))
    with pytest.raises(UserError, match="CX603") as caught:
        PromptTokenizer(record, file.read_bytes())
    assert said in caught.value.message


def test_a_tokenizer_of_the_published_parts_is_accepted(folder: Path) -> None:
    def parts(document: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}|\s+(?!\S)|\s+"}, "behavior": "Isolated",
                 "invert": False}  # fmt: skip
        document["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, {**document["pre_tokenizer"], "use_regex": False}],
        }
        document["normalizer"] = {"type": "NFC"}

    edited(folder / "tokenizer.json", parts)
    assert template(folder, CHATML).plain[0] == "<|im_start|>user\n"


def test_a_tokenizer_file_of_any_size_is_not_read(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with (folder / "tokenizer.json").open("wb") as file:
        file.write(b"{}")
        file.truncate(20_000_000_000)
    assert "20,000,000,000 bytes; allowed: 67,108,864" in refusal(folder, "CX229")


@pytest.mark.parametrize("length", [[], "long", True, 0, {}])
def test_settings_of_another_type_are_refused(folder: Path, length: Any) -> None:
    edited(folder / "tokenizer_config.json", lambda document: document.update(model_max_length=length))
    assert "model_max_length = " in refusal(folder, "CX103")


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

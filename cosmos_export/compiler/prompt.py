"""The checkpoint's chat template, applied when the bundle is built: what stands before and after the texts of a prompt.

transformers renders it here, once; a reader of the bundle joins strings and tokenizes them, and needs neither a
template language nor transformers. That this is the same is shown on texts chosen to break it, or the build ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.config_fields import AnyOf, Fields, Flag, Nullable, Number, Only, Record, Text, checked
from cosmos_export.checkpoint.strict_json import read_object, require_file
from cosmos_export.compiler.bounded import LimitError, ProcessLimits, run_bounded
from cosmos_export.compiler.selection import TOKENIZER_FILE
from cosmos_export.diagnostics import UnsupportedError, UserError, shown
from cosmos_export.runtime.tokenize import load_tokenizer

START_OF_GENERATION = "<|vision_start|>"
"""The token that, after the end of text, closes every prompt."""
_USER, _SYSTEM = "sentinel-of-the-user", "sentinel-of-the-system"
_LONG = 5000
"""Words of a text longer than any limit a tokenizer file may set."""

_LIMITS = ProcessLimits(cpu_s=8, memory_bytes=1 << 30)
"""A tokenizer with 151,000 tokens and merges and a published template take 3 s and 0.3 GiB."""
_TOKEN = Nullable(None, AnyOf(None, (Text("", 1024), Record({}, {}))))
_SETTINGS: Fields = {
    "model_max_length": Nullable(None, Number(None, 1, 1e31)),
    "tokenizer_class": Nullable(None, Text("")),
    "padding_side": Nullable(None, Only(None, ("left", "right"))),
    "truncation_side": Nullable(None, Only(None, ("left", "right"))),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens"), Nullable(None, Flag(False))),
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"), _TOKEN
    ),
}
"""Fields of ``tokenizer_config.json`` that transformers reads without looking at their type."""

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class ChatTemplate:
    """The pieces of `cosmos_export.bundle.PromptRecord`."""

    plain: tuple[str, str]
    system: tuple[str, str, str]
    suffix_ids: tuple[int, int]

    def text(self, user: str, system: str | None = None) -> str:
        """The text that is tokenized for a request."""
        if system is None:
            return self.plain[0] + user + self.plain[1]
        return self.system[0] + system + self.system[1] + user + self.system[2]


def compile_chat_template(checkpoint: Checkpoint) -> ChatTemplate:
    """The template of ``checkpoint`` in pieces, proven on `probes`.

    Templates and tokenizers are the checkpoint's own programs, so they run in a process with limits (`_LIMITS`). CX227:
    the template does more with a text than to put it between two others, or takes too long; CX228: ``tokenizer.json``
    by itself gives other ids than the published pipeline's call; CX229: the tokenizer cannot be loaded, takes too long,
    or lacks a token.
    """
    folder = checkpoint.components["text_tokenizer"]
    for file in (TOKENIZER_FILE, "tokenizer_config.json"):
        require_file(folder / file)
    checked(read_object(folder / "tokenizer_config.json"), _SETTINGS, folder / "tokenizer_config.json")
    request = {"folder": str(folder), "stated": checkpoint.model_index.get("text_tokenizer")}
    try:
        found = run_bounded(__name__, request, _LIMITS)
    except LimitError as error:
        if error.phase == "template":
            what = f"the chat template of {folder} {error}"
            raise UnsupportedError("CX227", what, _TEMPLATE_HINT) from error
        what = f"the tokenizer of {folder} {error}"
        raise UserError("CX229", what, "restore the published text_tokenizer/") from error
    plain, system, suffix = (tuple(part) for part in found)
    return ChatTemplate(plain, system, suffix)


def answer(request: Mapping[str, Any], begin: Callable[[str], None]) -> list[Sequence[Any]]:
    """The three parts of the `ChatTemplate`, found in the process with limits."""
    begin("tokenizer")
    folder = Path(request["folder"])
    own = _own_tokenizer(folder / TOKENIZER_FILE)
    tokenizer = _published_tokenizer(request["stated"], folder)

    def render(messages: Sequence[Message]) -> str:
        begin("template")
        text = str(_applied(tokenizer, messages, tokenize=False))
        begin("tokenizer")
        return text

    suffix = _suffix_ids(tokenizer)
    plain = _pieces(render([_message("user", _USER)]), [_USER])
    both = [_message("system", _SYSTEM), _message("user", _USER)]
    system = _pieces(render(both), [_SYSTEM, _USER])
    template = ChatTemplate((plain[0], plain[1]), (system[0], system[1], system[2]), suffix)
    texts = probes(sorted({*tokenizer.all_special_tokens, START_OF_GENERATION}))
    requests: list[tuple[str, str | None]] = [(text, None) for text in texts]
    requests += zip(texts, reversed(texts), strict=True)
    _prove_text(template, render, requests)
    _prove_ids(template, tokenizer, own, requests)
    return [template.plain, template.system, template.suffix_ids]


def probes(special_tokens: Sequence[str]) -> list[str]:
    """Texts that show what a template or a tokenizer does to them, each token of ``special_tokens`` among them."""
    return [
        "",
        " ",
        "\n",
        "A robot arm picks up the red cube.",
        "  two spaces before and after  ",
        "\n\ta line break and a tab before and after\t\n",
        "{{ braces }} {% and %} {# all that #} {0} %s \\n",
        "\"quotes\" and 'quotes' and <b>&amp;</b> \\ backslashes",
        "naïve façade, e\u0301 as two characters, 視頻, عربي, 🤖👩🏽‍🔬, \u00a0\u200b\u2028",
        '{"actions": [{"time": "0:00-0:02", "description": "Pour."}], "fps": 15.0}',
        *(f"before {token} after{token}" for token in special_tokens),
        "word " * _LONG,
    ]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _own_tokenizer(file: Path) -> Any:
    """``tokenizer.json`` as a bundle's reader loads it."""
    try:
        return load_tokenizer(file)
    except ValueError as error:
        raise UserError("CX229", f"{file} is no tokenizer: {error}", "restore the published text_tokenizer/") from error


def _published_tokenizer(stated: Any, folder: Path) -> Any:
    """The tokenizer as the published pipeline loads it: of the class that the model index names.

    One that reads ``tokenizer.json`` and nothing that could be code.
    """
    import transformers

    stated = ["transformers", "PreTrainedTokenizerFast"] if stated is None else stated
    name = stated[1] if isinstance(stated, list) and len(stated) > 1 and stated[0] == "transformers" else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedTokenizerFast):
        raise UserError(
            "CX229",
            f"model_index.json: text_tokenizer = {shown(stated)} is no tokenizer that transformers reads from "
            f"{TOKENIZER_FILE}",
            "restore the published file",
        )
    try:
        tokenizer: Any = found
        return tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # of many kinds: the file is parsed in Rust, whose errors have no class of their own
        raise UserError(
            "CX229", f"{folder} cannot be loaded as {found.__name__}: {shown(str(error), 300)}", "download it again"
        ) from error


def _applied(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    """The published call, except for the date: a template that writes it makes another bundle each day."""
    template = {**_TEMPLATE_OPTIONS, **options}
    try:
        return tokenizer.apply_chat_template(list(messages), **template)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and fails as one: division by zero, recursion, other types
        what = f"the chat template cannot be applied to {shown(messages, 200)}: {shown(str(error), 200)}"
        if _CLOCK in str(getattr(tokenizer, "chat_template", "")):
            what += f"; it uses `{_CLOCK}`, and a bundle must not depend on the day on which it is built"
        raise UnsupportedError("CX227", what, _TEMPLATE_HINT) from error


_CLOCK = "strftime_now"
_TEMPLATE_OPTIONS: Mapping[str, Any] = {
    "add_generation_prompt": True, "add_vision_id": False, _CLOCK: "not a function: the date is not known",
}  # fmt: skip
_TEMPLATE_HINT = "restore the published text_tokenizer/, or leave `tokenizer` out of --components"


def _suffix_ids(tokenizer: Any) -> tuple[int, int]:
    """End of text and start of generation, which the published pipeline puts after every prompt."""
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(START_OF_GENERATION)
    if end is None or START_OF_GENERATION not in tokenizer.get_vocab():
        missing = "end-of-text token" if end is None else START_OF_GENERATION
        raise UserError("CX229", f"text_tokenizer/ has no {missing}", "restore the published text_tokenizer/")
    return int(end), int(start)


def _pieces(rendered: str, sentinels: Sequence[str]) -> list[str]:
    """``rendered`` without ``sentinels``, which stand in it once each and in their order."""
    pieces, rest = [], rendered
    for sentinel in sentinels:
        piece, found, rest = rest.partition(sentinel)
        if not found or sentinel in rest:
            times = rendered.count(sentinel)
            what = f"the chat template has the text of a message {times} times, or out of order"
            raise UnsupportedError("CX227", f"{what}: {shown(rendered, 200)}", _TEMPLATE_HINT)
        pieces.append(piece)
    return [*pieces, rest]


def _prove_text(template: ChatTemplate, render: Render, requests: Sequence[tuple[str, str | None]]) -> None:
    for user, system in requests:
        messages = [_message("user", user)]
        if system is not None:
            messages.insert(0, _message("system", system))
        rendered, joined = render(messages), template.text(user, system)
        if rendered != joined:
            raise UnsupportedError(
                "CX227",
                f"the chat template changes the texts of {shown(messages, 160)}: {_difference(rendered, joined)}",
                _TEMPLATE_HINT,
            )


def _prove_ids(template: ChatTemplate, tokenizer: Any, own: Any, requests: Sequence[tuple[str, str | None]]) -> None:
    for user, system in requests:
        messages = [_message("user", user)]
        if system is not None:
            messages.insert(0, _message("system", system))
        published = _applied(tokenizer, messages, tokenize=True, return_dict=True)["input_ids"]
        found = own.encode(template.text(user, system), add_special_tokens=False).ids
        if found != list(published):
            raise UnsupportedError(
                "CX228",
                f"{TOKENIZER_FILE} alone gives other ids than the published pipeline for {shown(messages, 160)}: "
                f"{_difference(list(published), found)}",
                _TEMPLATE_HINT,
            )


def _difference(published: Sequence[Any], found: Sequence[Any]) -> str:
    """Where two sequences part, and how they go on."""
    pairs = zip(published, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(published), len(found)))
    return f"from {at} on {shown(published[at : at + 12])}, joined {shown(found[at : at + 12])}"

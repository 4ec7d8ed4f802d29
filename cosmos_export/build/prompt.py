"""The checkpoint's chat template, applied when the bundle is built: what stands before and after the texts of a prompt.

transformers renders it here, once; a reader of the bundle joins strings and tokenizes them, and needs neither a
template language nor transformers. That this is the same is shown on texts chosen to break it, or the build ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_export.build.selection import TOKENIZER_FILE
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint.strict_json import require_file, shown
from cosmos_export.diagnostics import UnsupportedError, UserError

START_OF_GENERATION = "<|vision_start|>"
"""The token that, after the end of text, closes every prompt."""
_USER, _SYSTEM = "sentinel-of-the-user", "sentinel-of-the-system"
_LONG = 5000
"""Words of a text longer than any limit a tokenizer file may set."""

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class ChatTemplate:
    """The pieces of `cosmos_export.bundle.PromptRecord`."""

    plain: tuple[str, str]
    system: tuple[str, str, str]
    suffix_ids: tuple[int, int]

    def text(self, user: str, system: str | None = None) -> str:
        """What is tokenized for a request."""
        if system is None:
            return self.plain[0] + user + self.plain[1]
        return self.system[0] + system + self.system[1] + user + self.system[2]


def compile_chat_template(checkpoint: Checkpoint) -> ChatTemplate:
    """The template of ``checkpoint`` in pieces, proven on `probes`.

    CX227: the template does more with a text than to put it between two others; CX228: ``tokenizer.json`` by itself
    gives other ids than the published pipeline's call; CX229: the tokenizer cannot be loaded, or lacks a token.
    """
    folder = checkpoint.components["text_tokenizer"]
    tokenizer = _published_tokenizer(checkpoint, folder)

    def render(messages: Sequence[Message]) -> str:
        return str(_applied(tokenizer, messages, tokenize=False))

    suffix = _suffix_ids(tokenizer)
    plain = _pieces(render([_message("user", _USER)]), [_USER])
    both = [_message("system", _SYSTEM), _message("user", _USER)]
    system = _pieces(render(both), [_SYSTEM, _USER])
    template = ChatTemplate((plain[0], plain[1]), (system[0], system[1], system[2]), suffix)
    texts = probes(sorted({*tokenizer.all_special_tokens, START_OF_GENERATION}))
    requests: list[tuple[str, str | None]] = [(text, None) for text in texts]
    requests += zip(texts, reversed(texts), strict=True)
    _prove_text(template, render, requests)
    _prove_ids(template, tokenizer, folder / TOKENIZER_FILE, requests)
    return template


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


def _published_tokenizer(checkpoint: Checkpoint, folder: Path) -> Any:
    """The tokenizer as the published pipeline loads it: of the class that the model index names.

    One that reads ``tokenizer.json`` and nothing that could be code.
    """
    import transformers

    stated = checkpoint.model_index.get("text_tokenizer", ["transformers", "PreTrainedTokenizerFast"])
    name = stated[1] if isinstance(stated, list) and len(stated) > 1 and stated[0] == "transformers" else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedTokenizerFast):
        raise UserError(
            "CX229",
            f"model_index.json: text_tokenizer = {shown(stated)} is no tokenizer that transformers reads from "
            f"{TOKENIZER_FILE}",
            "restore the published file",
        )
    for file in (TOKENIZER_FILE, "tokenizer_config.json"):
        require_file(folder / file)
    try:
        tokenizer: Any = found
        return tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: the file is parsed in Rust, whose errors have no class of their own
        raise UserError(
            "CX229", f"{folder} cannot be loaded as {found.__name__}: {shown(str(error), 300)}", "download it again"
        ) from error


def _applied(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, add_vision_id=False, **options)
    except (TemplateError, ValueError) as error:
        what = f"the chat template cannot be applied to {shown(messages, 200)}: {shown(str(error), 200)}"
        raise UnsupportedError("CX227", what, _TEMPLATE_HINT) from error


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


def _prove_ids(template: ChatTemplate, tokenizer: Any, file: Path, requests: Sequence[tuple[str, str | None]]) -> None:
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises `Exception` itself
        raise UserError("CX229", f"{file} is no tokenizer: {shown(str(error), 300)}", "download it again") from error
    for user, system in requests:
        messages = [_message("user", user)]
        if system is not None:
            messages.insert(0, _message("system", system))
        published = _applied(tokenizer, messages, tokenize=True, return_dict=True)["input_ids"]
        found = own.encode(template.text(user, system), add_special_tokens=False).ids
        if found != list(published):
            raise UnsupportedError(
                "CX228",
                f"{file.name} alone gives other ids than the published pipeline for {shown(messages, 160)}: "
                f"{_difference(list(published), found)}",
                _TEMPLATE_HINT,
            )


def _difference(published: Sequence[Any], found: Sequence[Any]) -> str:
    """Where two sequences part, and how they go on."""
    pairs = zip(published, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(published), len(found)))
    return f"from {at} on {shown(published[at : at + 12])}, joined {shown(found[at : at + 12])}"

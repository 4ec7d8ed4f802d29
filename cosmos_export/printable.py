"""Text of files on a terminal: what would move the cursor, hide text or answer for the user is written as an escape.

Everything that a command prints passes here once, so no verb needs to know where its words come from.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
    from rich.segment import Segment

# Controls except tab and line feed, both ways of ending a line that terminals know besides, what turns the direction
# of text around, and halves of characters, which have no encoding.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with escapes in place of what a terminal would act on."""
    return _HARMFUL.sub(lambda found: repr(found[0])[1:-1], text)


def in_json(text: str) -> str:
    """A JSON document whose strings have escapes in place of the same."""
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def render_hook() -> RenderHook:
    """Makes a console print text as `printable` has it; its own colours and movements stay."""
    from rich.console import RenderHook
    from rich.segment import Segment

    class Plain:
        def __init__(self, inner: ConsoleRenderable) -> None:
            self.inner = inner

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
            return escaped(console.render(self.inner, options))

    def escaped(segments: Iterable[Segment]) -> Iterator[Segment]:
        for segment in segments:
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    class Hook(RenderHook):
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [Plain(one) for one in renderables]

    return Hook()

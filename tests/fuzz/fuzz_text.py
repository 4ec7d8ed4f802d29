"""Mutations of TOML, of plain text and of chat templates."""

from __future__ import annotations

import json
from random import Random

from fuzz_bytes import mutate_bytes
from fuzz_values import MAX_BYTES, PATHS, TEXTS

_TOKENS = (
    *(json.dumps(text, ensure_ascii=True) for text in (*TEXTS[:24], *PATHS[:12])),
    "0", "-1", "1e400", "nan", "inf", "true", "[]", "{}", "[[]]", "1979-05-27", "9" * 40, "'''x'''", '"unclosed',
    "[1, 'a']", "{a = 1}", "[" * 3000,
)  # fmt: skip


def mutate_toml(random: Random, data: bytes) -> tuple[bytes, str]:
    """A value or a line of a TOML file."""
    lines = data.decode("utf-8", "replace").splitlines()
    places = [n for n, line in enumerate(lines) if "=" in line]
    if not places or random.random() < 0.3:
        return mutate_text(random, data)
    at = random.choice(places)
    key, _, value = lines[at].partition("=")
    match random.randrange(4):
        case 0:
            lines[at] = f"{random.choice((key.upper(), 'x', '', 'a.b', key + key, '[[x]]'))} = {value}"
        case 1:
            lines.insert(at, lines[random.choice(places)])
        case _:
            lines[at] = f"{key}= {random.choice(_TOKENS)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n", f"line {at + 1}: {lines[at][:60]}"


def mutate_text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Lines of a text."""
    lines = data.splitlines()
    if len(lines) < 2 or random.random() < 0.4:
        text = random.choice((*TEXTS, *PATHS)).encode("utf-8", "surrogatepass")
        at = random.randrange(len(data) + 1)
        options = [(text, "replaced"), (data[:at] + text + data[at:], "inserted")]
        if len(data) * 3000 <= MAX_BYTES:
            options.append((data * 3000, "3000 times"))
        changed, what = random.choice(options)
        return changed, f"text {what}: {text[:40]!r}"
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(3):
        case 0:
            del lines[one]
            return b"\n".join(lines) + b"\n", f"line {one + 1} removed"
        case 1:
            lines[one], lines[other] = lines[other], lines[one]
            return b"\n".join(lines) + b"\n", f"lines {one + 1} and {other + 1} exchanged"
        case _:
            lines.insert(one, lines[other])
            return b"\n".join(lines) + b"\n", f"line {other + 1} twice"


def mutate_template(random: Random, data: bytes) -> tuple[bytes, str]:
    """A chat template, which is a program."""
    text = random.choice(_TEMPLATES).encode()
    at = random.randrange(len(data) + 1)
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    return (
        (text, f"is {text[:50]!r}") if random.random() < 0.5 else (data[:at] + text + data[at:], f"with {text[:50]!r}")
    )


_TEMPLATES = (
    *(text for text in TEXTS if "{" in text),
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ messages }}",
    "{% set x = 'a' %}{% for i in range(40) %}{% set x = x + x %}{% endfor %}{{ x }}",
    "{{ 'a' * 10**30 }}",
    "{{",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ raise_exception('x') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0]['content'] | upper }}",
    "{% import 'x' as y %}",
    "{{ range(10**10) | list }}",
    "{{ cycler.__init__ }}",
    "{% for i in range(10**7) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ (1, 2)[5] }}",
    "{{ 9**9**9 }}",
    "{{ messages | tojson }}",
    "{{ 'x'.format(**{}) }}",
    "{{ '%s' % (messages,) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ lipsum(n=10000) }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ messages[0].content | indent(100000000) }}",
    "\ud7ff",
    "",
    " ",
)

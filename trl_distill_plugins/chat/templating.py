"""Chat templates, compiled once: the text of a conversation and which of its characters the assistant generates.

The environment is that of transformers (sandbox, trimmed blocks, `raise_exception`, `tojson`, `strftime_now`), without
its copying of every message, and with `{% generation %}` blocks found as pieces in place of by their length.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generated(str):
    """A piece of a rendering that stood between `{% generation %}` tags."""

    __slots__ = ()


class _GenerationTag(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return _Generated(caller())


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation. `spans`: (start, end) of the characters that each assistant message generates."""

    text: str
    spans: list[tuple[int, int]]


@lru_cache(maxsize=64)
def compiled(template: str) -> Template:
    """The compiled template. Raises jinja's `TemplateError` if it is none."""
    return _environment().from_string(template)


def render(template: Template, variables: dict[str, Any]) -> Rendering:
    """Render with `messages` and the like. Raises jinja's `TemplateError` if the template does."""
    pieces = list(template.generate(variables))
    if len(pieces) == 1 and not isinstance(pieces[0], _Generated):
        return Rendering(pieces[0], [])
    ends = list(accumulate(map(len, pieces)))
    spans = [(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True) if isinstance(piece, _Generated)]
    return Rendering("".join(pieces), spans)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)

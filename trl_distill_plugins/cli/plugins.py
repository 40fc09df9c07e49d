"""`trl-distill plugins`: everything installed, whose it is and what options it takes; and what failed to load."""

import argparse
import dataclasses
import json
import logging
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from trl_distill_plugins import plugins
from trl_distill_plugins.plugin_checks import KINDS
from trl_distill_plugins.plugins import Broken, Installed


def run(argv: list[str]) -> int:
    """Print the plugins as tables, or as one JSON object with `--json`. A broken plugin does not fail the command."""
    parser = argparse.ArgumentParser(prog="trl-distill plugins", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object: installed and broken plugins")
    arguments = parser.parse_args(argv)
    logging.getLogger(plugins.__name__).setLevel(logging.ERROR)  # what it warns about is part of this report
    rows = [(kind.noun, record) for name, kind in KINDS.items() for record in plugins.installed(name)]
    if arguments.json:
        report = {"installed": [_entry(*row) for row in rows], "broken": [_failure(b) for b in plugins.broken()]}
        print(json.dumps(report, indent=2))
        return 0
    _print_tables(rows, plugins.broken())
    return 0


def _options(cls: type[Any]) -> dict[str, Any]:
    """Return option: default of a plugin class; `...` stands for an option that has no default."""
    options = getattr(cls, "Options", None)
    if options is None:
        return {}
    return {field.name: _default(field) for field in dataclasses.fields(options)}


def _default(field: "dataclasses.Field[Any]") -> Any:
    from trl_distill_plugins.losses.schedules import Schedule  # imports torch, which the help text does without

    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, Schedule):
        return field.default.config
    return ... if field.default is dataclasses.MISSING else field.default


def _entry(noun: str, record: Installed) -> dict[str, Any]:
    options = {name: "required" if value is ... else value for name, value in _options(record.cls).items()}
    return {
        "kind": noun,
        "name": record.name,
        "class": f"{record.cls.__module__}.{record.cls.__qualname__}",
        "plugin": record.owner.plugin,
        "distribution": record.owner.distribution,
        "version": record.owner.version,
        "options": json.loads(json.dumps(options, default=repr)),
        "conflict": record.conflict,
    }


def _failure(record: Broken) -> dict[str, str]:
    return dataclasses.asdict(record.owner) | {"hook": record.hook, "reason": record.reason}


def _print_tables(rows: list[tuple[str, Installed]], broken: list[Broken]) -> None:
    console = Console()
    distribution = Column("distribution", max_width=20)
    table = Table("kind", "name", distribution, Column("options", overflow="fold"), leading=1)
    for noun, record in rows:
        options = ", ".join(f"{name}={_shown(value)}" for name, value in _options(record.cls).items())
        name = f"[red]{escape(record.name)}[/red]" if record.conflict else escape(record.name)
        table.add_row(noun, name, escape(f"{record.owner.distribution} {record.owner.version}"), escape(options))
    console.print(table)
    for problem in [record.conflict for _, record in rows if record.conflict] + [str(record) for record in broken]:
        console.print(escape(problem), style="red", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return "required" if value is ... else repr(value)

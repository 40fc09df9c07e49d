"""`trl-distill cache`: build, inspect and verify what a teacher says about a dataset, kept on disk."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trl_distill_plugins.errors import ConfigError, did_you_mean

_HELP = """usage: trl-distill cache build --config FILE --cache_dir DIR [--top_k K] [--top_mass M] [--samples N] [--repair]
       trl-distill cache inspect DIR [--json]
       trl-distill cache verify DIR

build    ask the teacher of a training config about its rows, once; the same command resumes, and adds new rows
inspect  whose word a cache holds, of how many texts and tokens, and in how many bytes
verify   read everything and check it; `build --repair` makes damaged parts again

Train with `teacher_model_name_or_path: cache:DIR`. `trl-distill cache build --help` lists every option."""


def run(argv: list[str]) -> int:
    """Run a subcommand; return the exit code."""
    commands = {"build": _build, "inspect": _inspect, "verify": _verify}
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if argv else 2
    if argv[0] not in commands:
        hint = did_you_mean(argv[0], commands) or "."
        raise ConfigError(f"no subcommand {argv[0]!r}{hint} Subcommands: {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def _build(argv: list[str]) -> int:
    from trl_distill_plugins.cli.train import run_workers

    worker = "trl_distill_plugins.cli.cache_build"
    return run_workers(worker, worker, argv)

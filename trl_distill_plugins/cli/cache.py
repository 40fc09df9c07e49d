"""`trl-distill cache`: build, inspect, verify and share what a teacher says about a dataset, kept on disk."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_distill_plugins.cli import cache_dataset
from trl_distill_plugins.errors import ConfigError, DataError, did_you_mean

_HELP = """usage: trl-distill cache build --config FILE --cache_dir DIR [--top_k K]
                               [--min_prob P] [--samples N] [--repair] ...
       trl-distill cache inspect DIR [--json]
       trl-distill cache verify DIR
       trl-distill cache export DIR FOLDER
       trl-distill cache import FOLDER DIR
       trl-distill cache push DIR REPO
       trl-distill cache pull REPO DIR

build    ask the teacher of a training config about its rows, once; the same
         command resumes, and adds new rows
inspect  whose word a cache holds, of how many texts and tokens, and in how
         many bytes
verify   read everything and check it; `build --repair` makes damaged parts
         again
export   write a cache as a Hugging Face dataset; import makes the cache of it
         again
push     the same to a dataset on the hub, private if it is new; pull gets it
         from there

Train with `teacher_model_name_or_path: cache:DIR`.
`trl-distill cache build --help` lists every option."""


def run(argv: list[str]) -> int:
    """Run a subcommand; return the exit code."""
    commands = {
        "build": _build,
        "inspect": _inspect,
        "verify": _verify,
        "export": cache_dataset.export_cache,
        "import": cache_dataset.import_cache,
        "push": cache_dataset.push_cache,
        "pull": cache_dataset.pull_cache,
    }
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


def _inspect(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trl-distill cache inspect", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    figures = summary(options.folder)
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, json.dumps(value) if isinstance(value, list) else f"{value}")
    Console().print(table)
    return 0


def summary(folder: Path) -> dict[str, Any]:
    """What a cache holds: its header, and how many texts and trained tokens in how many bytes."""
    from trl_distill_plugins.teachers.cache.codec import decode
    from trl_distill_plugins.teachers.cache.store import CacheStore

    store = CacheStore(folder)
    positions = named = 0
    for signal in map(decode, store.blobs()):
        positions += len(signal)
        named += int((signal.log_probs > -float("inf")).sum())
    size = sum(shard.path.stat().st_size for shard in store.shards())
    return {
        **store.header,
        "texts": len(store),
        "trained tokens": positions,
        "tokens named at each": round(named / max(1, positions), 2),
        "shards": len(store.shards()),
        "bytes": size,
        "bytes a trained token": round(size / max(1, positions), 2),
    }


def _verify(argv: list[str]) -> int:
    from tqdm.auto import tqdm

    from trl_distill_plugins.teachers.cache.store import CacheStore

    parser = argparse.ArgumentParser(prog="trl-distill cache verify", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    store = CacheStore(folder)
    with tqdm(unit="B", unit_scale=True, desc="Reading") as progress:
        problems = store.verify(progress.update)
    if problems:
        listed = "; ".join(map(str, problems))
        raise DataError(
            f"{listed}. `trl-distill cache build --repair` with the options it was built with makes them again"
        )
    print(f"{folder}: {len(store)} texts in {len(store.shards())} shards, all as they were written")
    return 0

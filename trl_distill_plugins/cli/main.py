"""`trl-distill`: choose a subcommand and run it. A subcommand's module is imported only when it is chosen."""

import argparse
import importlib
import os
import sys

from trl_distill_plugins import __version__
from trl_distill_plugins.cli.guard import DEBUG_VARIABLE, guarded
from trl_distill_plugins.errors import ConfigError, did_you_mean

COMMANDS = {  # name: (module with `run(argv: list[str]) -> int`, help)
    "demo": ("trl_distill_plugins.cli.demo", "distil a prompted teacher into an unprompted student, small and offline"),
    "train": ("trl_distill_plugins.cli.train", "train a student: SFT or GKD with any teacher and any losses"),
    "cache": ("trl_distill_plugins.cli.cache", "keep what a teacher says about a dataset on disk, to train from it"),
    "generate": ("trl_distill_plugins.cli.generate", "have a teacher write completions to a JSONL file to train on"),
    "plugins": ("trl_distill_plugins.cli.plugins", "list every plugin installed, its owner and its options"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `trl-distill` with `argv`, by default the process's arguments, and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        _parser().print_help(sys.stderr)
        return 2
    if arguments[0].startswith("-"):
        _parser().parse_args(arguments)  # exits: --help and --version print, anything else is an error
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return guarded("trl-distill", lambda: _unknown(command))
    if "--debug" in rest:
        os.environ[DEBUG_VARIABLE] = "1"
        rest = [argument for argument in rest if argument != "--debug"]
    return guarded(f"trl-distill {command}", lambda: _run(command, rest))


def _run(command: str, arguments: list[str]) -> int:
    code: int = importlib.import_module(COMMANDS[command][0]).run(arguments)
    return code


def _unknown(command: str) -> int:
    hint = did_you_mean(command, COMMANDS) or "."
    raise ConfigError(f"no command {command!r}{hint} Commands: {', '.join(COMMANDS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-distill",
        description="Distil language models with TRL.",
        epilog="`trl-distill COMMAND --help` describes a command. Every command takes --debug: show tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"trl-distill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())

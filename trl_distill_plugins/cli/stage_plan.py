"""What each stage of `trl-distill train` runs with: what all stages share, what the one before left, and its own."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_distill_plugins.errors import ConfigError, did_you_mean

COMMANDS = ("train", "generate")
MERGED = "merged"
_KEYS = ("name", "command")
_INHERITED = ("model_name_or_path", "dataset_name")
_SECRET = ("hub_token", "env")
_NAME = re.compile(r"(?!checkpoint-)[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Stage:
    """One run.

    Args:
        name: what messages, its folder and the record call it.
        command: the subcommand, `train` or `generate`.
        folder: where it writes.
        options: all of its options, as its config file holds them.
    """

    name: str
    command: str
    folder: Path
    options: dict[str, Any]

    @property
    def student(self) -> Path:
        """What the next stage's student starts from; with adapters, the model they are merged into."""
        return self.folder / MERGED if self.has_adapter else self.folder

    @property
    def has_adapter(self) -> bool:
        """Whether it trains an adapter."""
        return str(self.options.get("use_peft")).lower() in ("true", "yes", "t", "y", "1")


def plan_stages(config: dict[str, Any], argv: list[str]) -> list[Stage]:
    """The stages of `config`. A stage's own options win over those all share, flags in `argv` over both; but a student
    or dataset given to all is what the first stage starts from.

    Raises:
        ConfigError: `stages` is no list of stages, `output_dir` is missing, or an option holds a secret.
    """
    flags = _flags(argv)
    root = output_folder(config, argv)
    first = {name: flags.pop(name) for name in _INHERITED if name in flags}
    common = {name: value for name, value in config.items() if name not in ("stages", "output_dir")} | first
    flags.pop("output_dir", None)
    stages: list[Stage] = []
    listed = _checked(config["stages"])
    _check_secrets([common, flags, *listed])
    last = next((given for given in reversed(listed) if given["command"] == "train"), None)
    for given in listed:
        name, command = given["name"], given["command"]
        own = {option: value for option, value in given.items() if option not in _KEYS}
        if command == "generate":
            folder = root / name
            place = {"output_file": str(folder / "completions.jsonl")}
        else:
            folder = root if given is last else root / name
            place = {"output_dir": str(folder)}
        stages.append(Stage(name, command, folder, common | _left_by(stages, command) | place | own | flags))
    return stages


def output_folder(config: dict[str, Any], argv: list[str]) -> Path:
    """Where a run in stages writes. Raise `ConfigError` if nobody says."""
    folder = _flags(argv).get("output_dir", config.get("output_dir"))
    if folder is True or not folder:
        raise ConfigError("output_dir is missing: name the folder the student goes to")
    return Path(str(folder))


def _left_by(stages: list[Stage], command: str) -> dict[str, Any]:
    """The student and the dataset that earlier stages made for a run of `command`; a dataset of completions is not one
    to generate from."""
    left = {}
    for stage in stages:
        if stage.command == "train":
            left["model_name_or_path"] = str(stage.student)
        elif command == "train":
            left["dataset_name"] = stage.options["output_file"]
    return left


def _checked(stages: Any) -> list[dict[str, Any]]:
    """The stages with their names and commands, or `ConfigError`."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("stages must be a list of mappings, each with the options of one run")
    named = [{"name": f"stage-{n}", "command": "train"} | stage for n, stage in enumerate(stages, start=1)]
    names = [stage["name"] for stage in named]
    for stage in named:
        name, command = stage["name"], stage["command"]
        if not isinstance(name, str) or not _NAME.fullmatch(name) or names.count(name) > 1:
            raise ConfigError(
                "the name of a stage is a folder's: letters, digits, - and _, once each, and no checkpoint's; got "
                f"{name!r}"
            )
        if command not in COMMANDS:
            hint = did_you_mean(str(command), COMMANDS) or "."
            raise ConfigError(f"stage {name}: no command {command!r}{hint} Commands: {', '.join(COMMANDS)}")
        for option in ("stages", "output_dir", "config"):
            if option in stage:
                raise ConfigError(f"stage {name}: {option} is not for a stage; leave it to the whole run")
    return named


def _check_secrets(given: list[dict[str, Any]]) -> None:
    for option in _SECRET:
        if any(option in options for options in given):
            raise ConfigError(
                f"{option} is not for a run in stages, which keeps the options of each in files; leave it out, and set "
                "environment variables, HF_TOKEN for the hub"
            )


def _flags(argv: list[str]) -> dict[str, Any]:
    """The flags of a command line, `--no-bf16` and `--no_bf16` among them, as a config file would hold them; without
    `--config`."""
    flags: dict[str, Any] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            flags[name] = [value] if equals else []
        elif not name:
            raise ConfigError(f"unexpected argument {word!r}; options are written --name value")
        else:
            flags[name].append(word)
    flags.pop("config", None)
    return dict(_option(name, words) for name, words in flags.items())


def _option(name: str, words: list[str]) -> tuple[str, Any]:
    if not words:
        return name.removeprefix("no_"), not name.startswith("no_")
    return name, words[0] if len(words) == 1 else words

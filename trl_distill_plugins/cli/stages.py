"""`trl-distill train` with a list of `stages`: one run after the other, each on the student of the one before.

    output_dir: out
    model_name_or_path: student          # what every stage has in common, and what the first one starts from
    dataset_name: questions.jsonl
    stages:
      - {name: imitate, teacher_model_name_or_path: big, losses: [cross_entropy], num_train_epochs: 1}
      - {teacher_model_name_or_path: bigger, losses: [forward_kl], num_train_epochs: 3}

The last student goes to `output_dir`, those before to folders of their own in it. `stages.json` there says what is
finished; the same command goes on behind it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trl_distill_plugins.cli import generate
from trl_distill_plugins.cli.launch import exit_code
from trl_distill_plugins.cli.stage_plan import Stage, output_folder, plan_stages
from trl_distill_plugins.cli.train import LAUNCH_OPTIONS
from trl_distill_plugins.errors import ConfigError

RECORD = "stages.json"


def run_stages(config: dict[str, Any], argv: list[str], train: Callable[[list[str]], int]) -> int:
    """Run what is not finished of the stages of `config`; return the exit code of the first that fails, or 0.

    Args:
        config: the whole `--config` file; flags in `argv` win over it and over every stage.
        argv: the arguments of `trl-distill train`.
        train: runs one stage, given its arguments.
    """
    stages = plan_stages(config, argv)
    root = output_folder(config, argv)
    record = _Record(root / RECORD)
    todo = [stage for stage in stages if not record.has(stage)]
    code = _check(todo) if todo else 0
    for number, stage in enumerate(stages, start=1):
        if code:
            break
        what = f"Stage {number} of {len(stages)}, {stage.name}"
        if stage not in todo:
            print(f"{what}: finished before, in {stage.folder}", flush=True)
            continue
        print(f"{what}: {stage.command}, into {stage.folder}", flush=True)
        code = _run(stage, train, is_handed_on=stage.folder != root)
        if not code:
            record.add(stage)
    return code


def _check(stages: list[Stage]) -> int:
    """Have the options of stages read before the first of them starts; in a folder that goes again, for nothing that is
    refused, a key for one, is to stay in a file."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [_write(stage, Path(scratch)) for stage in stages]
        parts = [
            part for stage, file in zip(stages, files, strict=True) for part in (stage.name, stage.command, str(file))
        ]
        return _work("check", *parts)


def _run(stage: Stage, train: Callable[[list[str]], int], *, is_handed_on: bool) -> int:
    arguments = ["--config", str(_write(stage, stage.folder))]
    if stage.command == "generate":
        return generate.run(arguments)
    code = train([*arguments, "--resume_from_checkpoint", "true"])
    return code or (_work("merge", str(stage.folder), str(stage.student)) if stage.has_adapter and is_handed_on else 0)


def _work(*arguments: str) -> int:
    """Run `stage_worker` in a process of its own: what it imports is not for the one that starts the stages."""
    command = [sys.executable, "-m", "trl_distill_plugins.cli.stage_worker", *arguments]
    return exit_code(subprocess.run(command, check=False).returncode)


def _write(stage: Stage, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{stage.name}.yaml"
    file.write_text(yaml.safe_dump(stage.options, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


class _Record:
    """The finished stages, with their options."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._finished: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError:
            raise ConfigError(f"{path} is not valid JSON; remove it, and every stage runs again") from None

    def has(self, stage: Stage) -> bool:
        """Whether this stage is finished. Raise `ConfigError` if it ran with other options."""
        if stage.name not in self._finished:
            return False
        before, now = self._finished[stage.name], _as_json(stage)
        different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if different:
            raise ConfigError(
                f"stage {stage.name} is finished, and ran with {different[0]}: {before.get(different[0])!r}, not "
                f"{now.get(different[0])!r}; set it back, or choose another output_dir"
            )
        return True

    def add(self, stage: Stage) -> None:
        """Note down that `stage` is finished; on the disk when this returns."""
        self._finished[stage.name] = _as_json(stage)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._finished, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _as_json(stage: Stage) -> dict[str, Any]:
    """The options that make a stage what it is: not on how many processes it ran."""
    own = {name: value for name, value in stage.options.items() if name not in LAUNCH_OPTIONS}
    options: dict[str, Any] = json.loads(json.dumps({"command": stage.command, **own}, default=str))
    return options

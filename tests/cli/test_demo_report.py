"""The demo's report, its files and its resuming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from trl_distill_plugins.cli.demo import distill, files, teacher
from trl_distill_plugins.cli.demo.report import Report
from trl_distill_plugins.cli.demo.task import Handbook, Ticket
from trl_distill_plugins.errors import DistillError

REPORT = Report(
    teacher_accuracy=0.98,
    teacher_accuracy_without_prompt=0.03,
    student_accuracy_before=0.0,
    student_accuracy_after=0.97,
    chance_accuracy=0.06,
    kl_before=5.7,
    kl_after=0.07,
    prompt_tokens_teacher=224.5,
    prompt_tokens_student=21.5,
    speedup=15.2,
    held_out_inputs=400,
    train_inputs=3000,
    teacher_parameters=137088,
    student_parameters=62640,
    seed=0,
    seconds={"teacher": 60.0},
)
PROMISED = (
    *("teacher_accuracy", "teacher_accuracy_without_prompt", "student_accuracy_before", "student_accuracy_after"),
    *("chance_accuracy", "kl_before", "kl_after", "prompt_tokens_teacher", "prompt_tokens_student", "speedup"),
)


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    REPORT.write_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert all(isinstance(saved[key], float) for key in PROMISED)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_table_and_verdict_show_the_figures() -> None:
    console = Console(record=True, width=100)
    console.print(REPORT.table())
    text = console.export_text()
    assert all(figure in text for figure in ("98.0%", "3.0%", "97.0%", "224 tokens", "137,088", "0.070"))
    assert "99%" in REPORT.verdict()
    assert "15.2x" in REPORT.verdict()


def test_figure_is_a_png(tmp_path: Path) -> None:
    REPORT.write_png(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_config_names_what_the_demo_wrote(tmp_path: Path) -> None:
    handbook = Handbook(dict.fromkeys(["parcels"], "amber"))
    config = yaml.safe_load(distill.write_config(tmp_path, handbook, seed=3).read_text())
    assert config["teacher_prompt_template"] == handbook.teacher_template()
    assert config["dataset_name"] == str(tmp_path / "train.jsonl")
    assert config["seed"] == 3
    assert config["learning_rate"] == 4e-3


def test_training_inputs_carry_no_answers(tmp_path: Path) -> None:
    distill.write_inputs(tmp_path / "train.jsonl", [Ticket("my parcel is late.", "parcels")])
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows == [{"input": "my parcel is late."}]


def test_an_interrupted_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "model") as partial:
        (partial / "weights").write_text("whole")

    def interrupted() -> None:
        with files.new_directory(tmp_path / "model") as partial:
            (partial / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_a_teacher_is_trained_once_for_each_recipe(tmp_path: Path) -> None:
    recipe = teacher.Recipe(seed=0, hidden=16, lookup_steps=1, ticket_steps=1, lookup_shape=(2, 2), ticket_shape=(2, 2))
    assert teacher.prepare_teacher(tmp_path / "teacher", recipe)
    assert not teacher.prepare_teacher(tmp_path / "teacher", recipe)
    (tmp_path / "teacher" / teacher.RECORD).write_text(json.dumps({"seed": 9}))
    assert teacher.prepare_teacher(tmp_path / "teacher", recipe)


def test_a_failed_training_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, check, env: subprocess.CompletedProcess(command, 2))
    with pytest.raises(DistillError, match="exit code 2"):
        distill.train_student(tmp_path / "distill.yaml")


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from trl_distill_plugins.cli.demo import run\n"
        "try: run(['--help'])\n"
        "except SystemExit: sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0

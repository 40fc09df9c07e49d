"""examples/loss_plugin in an environment of its own: installed, listed, tested, and trained with by name."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import trl_distill_plugins

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "loss_plugin"
COMMAND = ["-m", "trl_distill_plugins.cli.main"]
STEPS = 4
SCRIPT = """
import json
import sys

from datasets import Dataset
from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

student, teacher, rows, settings = map(json.loads, sys.argv[1:])
trainer = DistillSFTTrainer(
    student,
    teacher_model=teacher,
    args=DistillSFTConfig(losses=["squared_hellinger"], **settings),
    train_dataset=Dataset.from_list(rows),
)
trainer.train()
trainer.save_state()
"""


class Environment:
    """A fresh virtual environment that sees what is installed here, and whatever is installed into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        checkout = Path(trl_distill_plugins.__file__).parents[1]
        shared = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        lines = [str(checkout), *(f"import site; site.addsitedir({path!r})" for path in sorted(shared))]
        Path(own, "shared.pth").write_text("\n".join(lines) + "\n")

    def run(self, *arguments: object, cwd: Path) -> str:
        """Run its Python; return what it printed. A failure shows all of it."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, source: Path) -> None:
        """Install a source tree, with the setuptools that is here and without the network."""
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", *offline, str(source)]
        subprocess.run(pip, check=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the package's folder: building it writes beside the sources."""
    leave_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    return shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "loss_plugin", ignore=leave_out)


@pytest.fixture(scope="module")
def environment(tmp_path_factory, source):
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install(source)
    return environment


@pytest.fixture
def rows():
    prompts = ["what is the capital of france ?", "red or blue ?", "the lazy dog", "yes or no ?"]
    completions = [" paris .", " red", " quick brown fox .", " no"]
    return [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture
def settings(tmp_path):
    """Every step sees all rows, so that the loss can be compared between steps."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def logged(state: Path) -> list[float]:
    """The loss at each step; it is the whole objective, lies between 0 and 1, and falls."""
    steps = [line for line in json.loads(state.read_text())["log_history"] if "loss" in line]
    values = [line["loss/squared_hellinger"] for line in steps]
    assert len(values) == STEPS
    assert [line["loss"] for line in steps] == pytest.approx(values, rel=1e-4)
    assert 0 < values[-1] < values[0] < 1
    return values


def test_the_module_is_short():
    assert len((EXAMPLE / "hellinger_loss.py").read_text().splitlines()) <= 15


def test_it_is_listed_with_its_distribution(environment, tmp_path):
    report = json.loads(environment.run(*COMMAND, "plugins", "--json", cwd=tmp_path))
    (entry,) = [entry for entry in report["installed"] if entry["name"] == "squared_hellinger"]
    assert (entry["kind"], entry["plugin"], entry["distribution"], entry["version"], entry["conflict"]) == (
        "loss", "hellinger", "trl-distill-hellinger", "0.1.0", "",
    )  # fmt: skip
    assert report["broken"] == []


def test_its_own_tests_pass(environment, source, tmp_path):
    copy = shutil.copytree(source / "tests", tmp_path / "tests")
    shutil.copy(source / "pyproject.toml", tmp_path)
    assert "passed" in environment.run("-m", "pytest", "-q", copy, cwd=tmp_path)


def test_command_and_script_train_with_it_by_name(environment, saved_models, rows, settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = settings | {
        "model_name_or_path": str(saved_models["student"]),
        "teacher_model_name_or_path": str(saved_models["teacher"]),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "save_steps": STEPS,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(options))
    environment.run(*COMMAND, "train", "--config", "run.yaml", "--losses", '["squared_hellinger"]', cwd=tmp_path)
    by_command = logged(tmp_path / "out" / f"checkpoint-{STEPS}" / "trainer_state.json")

    settings |= {"output_dir": str(tmp_path / "script"), "save_strategy": "no"}
    models = (str(saved_models[name]) for name in ("student", "teacher"))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment.run("script.py", *map(json.dumps, (*models, rows, settings)), cwd=tmp_path)
    assert logged(tmp_path / "script" / "trainer_state.json") == pytest.approx(by_command, rel=1e-3)

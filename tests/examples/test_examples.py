"""Every script of examples/by_feature runs offline as it stands, and every config of examples/configs parses."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from trl_distill_plugins.cli.generate import arguments as generate_arguments
from trl_distill_plugins.cli.stage_plan import plan_stages
from trl_distill_plugins.cli.train_worker import parse_arguments
from trl_distill_plugins.trainers.configs import DistillGKDConfig, DistillSFTConfig

ROOT = Path(__file__).resolve().parents[2]
BY_FEATURE = ROOT / "examples" / "by_feature"
NEEDS_DATA = {"real_text.py"}
HELPERS = {"tiny.py"}
SCRIPTS = sorted(path.name for path in BY_FEATURE.glob("*.py") if path.name not in NEEDS_DATA | HELPERS)
CONFIGS = sorted(path.name for path in (ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.fixture
def run_example(monkeypatch, tmp_path):
    """`run_example(name)`: run the script in this process, in an empty folder; return its globals."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(BY_FEATURE)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(BY_FEATURE / name), run_name="__main__")

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_trains_three_steps_offline(name, run_example):
    history = run_example(name)["trainer"].state.log_history
    steps = [line for line in history if "loss" in line]
    assert len(steps) == 3
    assert all(line["trained_tokens"] > 0 for line in steps)
    assert any("teacher_kl" in line for line in steps)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_and_says_how_to_run_it(name):
    source = (BY_FEATURE / name).read_text(encoding="utf-8")
    assert f"python examples/by_feature/{name}" in source.split('"""')[1]
    assert len(source.splitlines()) < 40


@pytest.mark.parametrize("name", CONFIGS)
def test_config_parses_and_spells_out_an_objective(name, tmp_path):
    path = ROOT / "examples" / "configs" / name
    last = _last_stage(path, tmp_path)
    arguments, training, model = parse_arguments(["--config", str(last), "--bf16", "false"])
    assert isinstance(training, {"sft": DistillSFTConfig, "gkd": DistillGKDConfig}[arguments.trainer])
    assert training.objective().needs_teacher
    assert training.teacher_model_name_or_path
    assert model.model_name_or_path
    assert f"examples/configs/{name}" in path.read_text(encoding="utf-8")


def _last_stage(path, folder):
    """The config, or that of its last stage, once the others have parsed."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "stages" not in config:
        return path
    files = []
    for stage in plan_stages(config, []):
        files.append(folder / f"{stage.name}.yaml")
        files[-1].write_text(yaml.safe_dump(stage.options), encoding="utf-8")
        if stage.command == "generate":
            assert generate_arguments.parse(["--config", str(files[-1])]).teacher_name
        else:
            parse_arguments(["--config", str(files[-1]), "--bf16", "false"])
    return files[-1]


@pytest.fixture
def problems(tmp_path):
    """A folder that looks like GSM8K's."""
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."} for a in range(20) for b in range(20)]
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_real_text_reports_all_three_models(problems, monkeypatch):
    main = runpy.run_path(str(BY_FEATURE / "real_text.py"))["main"]
    shape = {"num_hidden_layers": 1, "intermediate_size": 32}
    teacher_shape, student_shape = {"hidden_size": 32} | shape, {"hidden_size": 16} | shape
    small = {"VOCABULARY": 300, "TEACHER": teacher_shape, "STUDENT": student_shape}
    main.__globals__.update(TEACHER_STEPS=100, STUDENT_STEPS=40, TEST_ROWS=40, **small)
    report = problems / "report.json"
    monkeypatch.setattr(sys, "argv", ["real_text.py", "--data", str(problems), "--quick", "--json", str(report)])
    main()
    teacher, plain, distilled = json.loads(report.read_text(encoding="utf-8")).values()
    assert teacher["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["tokens"] > plain["tokens"] == distilled["tokens"] > 0
    assert plain["cross_entropy"] != distilled["cross_entropy"]
    assert plain["teacher_kl"] > 0

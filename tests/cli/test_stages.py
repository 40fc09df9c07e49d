"""`trl-distill train` with stages: what each hands on, what is not done twice, and what is refused before the first."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_distill_plugins.cli import worker
from trl_distill_plugins.cli.stages import run_stages
from trl_distill_plugins.errors import ConfigError

IMITATE = {"name": "imitate", "losses": ["cross_entropy"]}
COMPARE = {"name": "compare", "losses": ["forward_kl"], "max_steps": 3}


@pytest.fixture
def run(write_config, capsys):
    """`run(options, train=worker.run)`: the stages in this process; returns the exit code and the lines it printed."""

    def stages(options, train=worker.run):
        path = write_config(options)
        code = run_stages(json.loads(path.read_text()), ["--config", str(path)], train)
        return code, [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stage")]

    return stages


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_stages_are_two_runs_one_after_the_other(run, options, train_here, tmp_path):
    code, lines = run(options | {"stages": [IMITATE, COMPARE]})
    out = Path(options["output_dir"])
    assert code == 0
    assert lines == [
        f"Stage 1 of 2, imitate: train, into {out / 'imitate'}",
        f"Stage 2 of 2, compare: train, into {out}",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(options | {"losses": IMITATE["losses"], "output_dir": str(first)}) == 0
    given = {"losses": COMPARE["losses"], "max_steps": 3, "model_name_or_path": str(first), "output_dir": str(second)}
    assert train_here(options | given) == 0
    assert same_weights(out / "imitate", first)
    assert same_weights(out, second)
    assert not same_weights(first, second)


def test_finished_stages_are_not_run_again(run, options):
    stages = options | {"stages": [IMITATE, COMPARE]}
    ran = []

    def interrupted(argv):
        ran.append(argv[1])
        return worker.run(argv) if len(ran) == 1 else 130

    code, _ = run(stages, interrupted)
    assert code == 130
    out = Path(options["output_dir"])
    code, lines = run(stages)
    assert code == 0
    assert lines[0] == f"Stage 1 of 2, imitate: finished before, in {out / 'imitate'}"
    code, lines = run(stages, lambda argv: pytest.fail("nothing is left to do"))
    assert code == 0
    assert [line.partition(": ")[2].split(",")[0] for line in lines] == ["finished before"] * 2
    assert run(stages | {"num_processes": 1, "accelerate_config": "cpu"})[0] == 0
    with pytest.raises(ConfigError, match=r"stage imitate is finished, and ran with learning_rate: 0\.01, not 0\.5"):
        run(stages | {"learning_rate": 0.5})


def test_an_adapter_is_in_the_weights_of_the_next_student(run, options):
    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_r": 2, "learning_rate": 0.1}
    seen = {}

    def train(argv):
        stage = json.dumps(argv)
        if "compare" in stage:
            seen["student"] = weights(Path(options["output_dir"], "imitate", "merged"))
        return worker.run(argv)

    code, _ = run(options | {"stages": [IMITATE | lora, COMPARE]}, train)
    assert code == 0
    base = weights(options["model_name_or_path"])
    assert seen["student"].keys() == base.keys()
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], seen["student"][name])}
    assert changed == {"q_proj", "v_proj"}


def test_a_mistake_in_a_later_stage_is_found_before_the_first_starts(train, options):
    code, out, err = train(options | {"stages": [IMITATE, COMPARE | {"max_stepz": 3}]})
    assert code == 2
    assert err.strip().splitlines()[-1] == (
        "trl-distill train: error: stage compare: no option 'max_stepz'; did you mean 'max_steps'?"
    )
    assert "Stage 1" not in out
    assert not Path(options["output_dir"], "imitate", "model.safetensors").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_model_init_kwargs": {"api_key": "sk-secret"}}, "stage compare: .*: api_key is not taken"),
        ({"teacher_model_name_or_path": "openai:http://me:sk-secret@localhost/v1#tiny"}, "stage compare: .* no user"),
    ],
)
def test_a_key_among_the_options_is_refused_and_in_no_file(train, options, given, message):
    served = {"teacher_model_name_or_path": "openai:http://localhost:1/v1#tiny"} | given
    code, out, err = train(options | {"stages": [IMITATE, COMPARE | served]})
    assert code == 2
    assert re.search(message, err)
    assert "Stage 1" not in out
    out = Path(options["output_dir"])
    assert [path for path in out.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()] == []


def test_a_record_that_cannot_be_read_is_named(run, options):
    out = Path(options["output_dir"])
    out.mkdir()
    (out / "stages.json").write_text("{")
    with pytest.raises(ConfigError, match=r"stages.json is not valid JSON; remove it, and every stage runs again"):
        run(options | {"stages": [IMITATE]})
    shutil.rmtree(out)


def test_processes_that_were_launched_do_not_run_stages(train_here, options, capsys):
    assert train_here(options | {"stages": [IMITATE]}) == 2
    assert (
        "error: stages run one after the other, each launched anew: use `trl-distill train`" in capsys.readouterr().err
    )

"""A student and a teacher sharded over two processes follow one process's curve. Minutes: `make test-distributed`."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import ADAPTER, NEAR_ZERO, greatest_difference
from trl_distill_plugins.trainers.projectors import PROJECTORS_FILE

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("ninja") is None,
    reason="DeepSpeed or ninja, with which it compiles on first use, is not installed",
)

TEMPLATES = {"teacher_prompt_template": "the quick brown fox {input}", "student_prompt_template": "{input}"}
# accelerate's own device and back end: with use_cpu, DeepSpeed and FSDP would be off without a word.
SHARDED = {"use_cpu": False, "ddp_backend": "gloo"}
TRAINERS = {
    "sft": {"distill_alpha": 0.7},
    "sft, teacher's completions": {"distill_alpha": 0.7, "max_new_tokens": 4, "generation_batch_size": 1},
    "sft, hidden states": {"losses": [{"name": "hidden_mse"}, {"name": "forward_kl", "weight": 0.5}]},
    "gkd, dataset's completions": {"trainer": "gkd", "lmbda": 0.0},
    "gkd, student's completions": {"trainer": "gkd", "lmbda": 1.0, "temperature": 1e-7, "max_new_tokens": 6},
}
LAUNCHER = """
import sys
from trl_distill_plugins.cli.launch import launch, resolve_launch_args
sys.exit(launch("tests.distributed.sharded_worker", *resolve_launch_args(sys.argv[1:])))
"""
COMMAND = [sys.executable, "-c", LAUNCHER]
TOLERANCE = 1e-4  # sums over shards come in another order


@pytest.fixture(scope="module", params=TRAINERS)
def case(request, run_on, paired_rows, bare_rows):
    """The options of a run, its rows, and what one process makes of them."""
    options = TEMPLATES | TRAINERS[request.param]
    rows = bare_rows if "teacher" in request.param else paired_rows
    return options, rows, run_on(1, rows, **options)


@pytest.fixture
def shard(run_on, monkeypatch):
    """`shard(config, sharding, rows, **options)`: the `Run` on two processes."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))))

    def run(config, sharding, rows, **options):
        monkeypatch.setenv("SHARDING", sharding)
        return run_on(2, rows, ["--accelerate_config", config], COMMAND, **options, **SHARDED)

    return run


@pytest.fixture
def run_sharded(case, shard):
    """`run_sharded(config, sharding)`: how far the run on two processes is from one process's."""

    def run(config, sharding):
        options, rows, one = case
        return greatest_difference(shard(config, sharding, rows, **options), one)

    return run


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, run_sharded):
    assert max(run_sharded(f"deepspeed_zero{stage}", "DEEPSPEED").values()) < TOLERANCE


def test_fsdp2(run_sharded):
    assert max(run_sharded("fsdp2", "FSDP").values()) < TOLERANCE


SHARDINGS = pytest.mark.parametrize(
    ("config", "sharding"),
    [
        pytest.param("deepspeed_zero2", "DEEPSPEED", marks=needs_deepspeed),
        pytest.param("deepspeed_zero3", "DEEPSPEED", marks=needs_deepspeed),
        ("fsdp2", "FSDP"),
    ],
)


@SHARDINGS
def test_projectors_are_saved_whole_and_resumed(config, sharding, shard, run_on, paired_rows):
    options = {"losses": ["hidden_mse"], "save_strategy": "steps", "save_steps": 1}
    one, two = run_on(1, paired_rows, **options), shard(config, sharding, paired_rows, **options)
    resumed = shard(
        config, sharding, paired_rows, **options, resume_from_checkpoint=str(two.folder / "checkpoint-2")
    )  # fmt: skip
    assert (resumed.weights() - one.weights()).abs().max() < TOLERANCE
    for run in (two, resumed):
        ours, expected = (load_file(r.folder / "checkpoint-3" / PROJECTORS_FILE) for r in (run, one))
        assert ours.keys() == expected.keys()
        assert max((ours[name] - weight).abs().max().item() for name, weight in expected.items()) < TOLERANCE


@SHARDINGS
@pytest.mark.parametrize("rows", ["paired_rows", "bare_rows"])
def test_a_student_is_taught_by_its_own_base(rows, config, sharding, shard, run_on, request):
    options = {**TEMPLATES, **ADAPTER, "teacher_model_name_or_path": "self:base", "distill_alpha": 0.5}
    options |= {"max_new_tokens": 4, "generation_batch_size": 1}
    file = request.getfixturevalue(rows)
    differences = greatest_difference(shard(config, sharding, file, **options), run_on(1, file, **options))
    assert differences.pop("teacher_kl") < NEAR_ZERO
    assert max(differences.values()) < TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize("adapter", [{}, ADAPTER], ids=["all weights", "adapter"])
def test_zero2_averages_the_student(adapter, shard, run_on, paired_rows):
    options = {**TEMPLATES, **adapter, "teacher_model_name_or_path": "self:ema", "distill_alpha": 0.5}
    options |= {"teacher_model_init_kwargs": {"decay": 0.5}, "save_strategy": "steps", "save_steps": 2}
    one, two = run_on(1, paired_rows, **options), shard("deepspeed_zero2", "DEEPSPEED", paired_rows, **options)
    checkpoint = str(two.folder / "checkpoint-2")
    resumed = shard("deepspeed_zero2", "DEEPSPEED", paired_rows, **options, resume_from_checkpoint=checkpoint)
    differences = greatest_difference(two, one)
    assert differences.pop("teacher_kl") < NEAR_ZERO
    assert max(differences.values()) < TOLERANCE
    assert torch.equal(resumed.weights(), two.weights())


@pytest.mark.parametrize(
    ("config", "sharding"), [pytest.param("deepspeed_zero3", "DEEPSPEED", marks=needs_deepspeed), ("fsdp2", "FSDP")]
)
def test_an_average_of_split_weights_is_refused(config, sharding, shard, paired_rows):
    with pytest.raises(AssertionError, match="self:ema averages whole weights, which ZeRO-3 and FSDP split"):
        shard(config, sharding, paired_rows, teacher_model_name_or_path="self:ema")

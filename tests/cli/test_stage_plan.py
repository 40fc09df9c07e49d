"""Which options each stage runs with."""

import pytest

from trl_distill_plugins.cli.stage_plan import plan_stages
from trl_distill_plugins.errors import ConfigError

COMMON = {"output_dir": "out", "model_name_or_path": "student", "dataset_name": "rows.jsonl", "learning_rate": 0.1}


def plan(*stages, flags=()):
    return plan_stages(COMMON | {"stages": list(stages)}, list(flags))


def test_each_stage_trains_the_student_of_the_one_before():
    first, second, third = plan({}, {"name": "middle"}, {})
    students = [stage.options["model_name_or_path"] for stage in (first, second, third)]
    assert students == ["student", "out/stage-1", "out/middle"]
    assert [stage.options["output_dir"] for stage in (first, second, third)] == ["out/stage-1", "out/middle", "out"]


def test_an_adapter_is_merged_for_the_next_stage():
    _, second = plan({"use_peft": True}, {})
    assert second.options["model_name_or_path"] == "out/stage-1/merged"


def test_training_stages_read_what_was_generated_before():
    generate, *trains = plan({"command": "generate", "name": "ask"}, {}, {"dataset_name": "other.jsonl"}, {})
    assert generate.options["output_file"] == "out/ask/completions.jsonl"
    assert "output_dir" not in generate.options
    datasets = [stage.options["dataset_name"] for stage in (generate, *trains)]
    assert datasets == ["rows.jsonl", "out/ask/completions.jsonl", "other.jsonl", "out/ask/completions.jsonl"]


def test_no_stage_generates_from_completions():
    _, again = plan({"command": "generate", "name": "ask"}, {"command": "generate", "name": "again"})
    assert again.options["dataset_name"] == "rows.jsonl"


def test_the_last_training_stage_writes_to_the_folder_of_the_run():
    first, last, _ = plan({}, {}, {"command": "generate", "name": "ask"})
    assert [str(stage.folder) for stage in (first, last)] == ["out/stage-1", "out"]


@pytest.mark.parametrize("said", [True, "yes", "TRUE", "1"])
def test_an_adapter_is_known_by_every_way_to_say_yes(said):
    first, _ = plan({"use_peft": said}, {})
    assert first.has_adapter


def test_a_stage_wins_over_what_is_common_and_a_flag_over_both():
    first, second = plan({"learning_rate": 0.2, "seed": 1}, {}, flags=["--seed", "3", "--bf16", "--config", "x.yaml"])
    assert (first.options["learning_rate"], second.options["learning_rate"]) == (0.2, 0.1)
    assert (first.options["seed"], second.options["seed"]) == ("3", "3")
    assert first.options["bf16"] is True
    assert "config" not in first.options


def test_flags_are_read_as_training_reads_them():
    (stage,) = plan({}, flags=["--max-steps", "3", "--no_bf16", "--no-tf32", "--lora_target_modules", "a", "b"])
    given = {"max_steps": "3", "bf16": False, "tf32": False, "lora_target_modules": ["a", "b"]}
    assert given.items() <= stage.options.items()


def test_a_student_and_a_folder_given_as_flags_are_those_of_the_whole_run():
    first, second = plan({}, {}, flags=["--model_name_or_path=big", "--output_dir", "elsewhere"])
    assert first.options["model_name_or_path"] == "big"
    assert second.options["model_name_or_path"] == "elsewhere/stage-1"
    assert second.options["output_dir"] == "elsewhere"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must be a list of mappings"),
        ({"a": {}}, "stages must be a list of mappings"),
        ([{}, "train"], "stages must be a list of mappings"),
        ([{"name": "a/b"}], "the name of a stage is a folder's: .*; got 'a/b'"),
        ([{"name": "a"}, {"name": "a"}], "once each, .*; got 'a'"),
        ([{}, {"name": "stage-1"}], "once each, .*; got 'stage-1'"),
        ([{"command": "generat"}], "stage stage-1: no command 'generat'; did you mean 'generate'"),
        ([{"output_dir": "x"}], "stage stage-1: output_dir is not for a stage"),
        ([{"name": "checkpoint-1"}, {}], "no checkpoint's; got 'checkpoint-1'"),
        ([{"hub_token": "x"}], "hub_token is not for a run in stages, which keeps the options of each in files"),
        ([{"env": {"OPENAI_API_KEY": "x"}}], "env is not for a run in stages"),
        ([{"stages": []}], "stage stage-1: stages is not for a stage"),
    ],
)
def test_what_is_no_list_of_stages_is_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        plan_stages(COMMON | {"stages": stages}, [])


def test_a_run_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="output_dir is missing"):
        plan_stages({"stages": [{}]}, [])
    with pytest.raises(ConfigError, match="output_dir is missing"):
        plan_stages({"stages": [{}]}, ["--output_dir"])

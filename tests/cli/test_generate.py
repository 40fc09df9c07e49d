"""`trl-distill generate`: what the teacher says, once a prompt, resumed, in a file that `trl-distill train` takes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import write_rows
from trl_distill_plugins import DistillSFTConfig, plugins
from trl_distill_plugins.cli import worker
from trl_distill_plugins.cli.generate.arguments import COMMAND, GenerateArguments
from trl_distill_plugins.cli.generate.worker import MODULE
from trl_distill_plugins.cli.train_worker import make_trainer, parse_arguments
from trl_distill_plugins.hookspecs import PROJECT

TEMPLATE = "the quick brown fox {input}"
QUESTIONS = [{"input": f"red or blue {n} ?", "topic": "abc"[n % 3]} for n in range(9)]


@pytest.fixture(scope="module")
def teacher(saved_models, tmp_path_factory):
    """A folder with a teacher that ends some completions of `QUESTIONS` under `TEMPLATE` early, and cuts others off."""
    folder = tmp_path_factory.mktemp("ending") / "teacher"
    shutil.copytree(saved_models["teacher"], folder)
    ids = continuation(folder, TEMPLATE.format(**QUESTIONS[0]), 4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [1, next(token for token in ids[1:] if token != ids[0])]
    model.save_pretrained(folder)
    return folder


def continuation(folder, text, length):
    """The ids that the model of `folder` writes after `text`, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(text, return_tensors="pt")
    return model.generate(**prompt, max_new_tokens=length, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()


@pytest.fixture
def settings(teacher, tmp_path):
    """The options of a run that works. One prompt a batch: padding changes the last bits of a random model's logits."""
    return {
        "teacher_model_name_or_path": str(teacher),
        "dataset_name": str(write_rows(tmp_path / "questions.jsonl", QUESTIONS)),
        "output_file": str(tmp_path / "out.jsonl"),
        "max_new_tokens": 6,
        "generation_batch_size": 1,
        "use_cpu": True,
    }


@pytest.fixture
def generate(settings, write_config):
    """`generate(*flags, **changes)`: what a worker does, in this process; returns the exit code."""

    def run(*flags, **changes):
        config = write_config(settings | changes)
        return worker.run(["--config", str(config), *map(str, flags)], COMMAND, MODULE)

    return run


@pytest.fixture
def records(settings):
    """`records()`: what the output file holds."""

    def read():
        return [json.loads(line) for line in Path(settings["output_file"]).read_text().splitlines()]

    return read


def test_the_file_holds_what_the_teacher_says_in_the_order_of_the_rows(generate, records, teacher):
    assert generate(teacher_prompt_template=TEMPLATE) == 0
    written = records()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ends = AutoModelForCausalLM.from_pretrained(teacher).generation_config.eos_token_id
    for record, question in zip(written, QUESTIONS, strict=True):
        ids = continuation(teacher, TEMPLATE.format(**question), 6)
        finished = ids[-1] in ends
        assert record["completion"] == tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        assert record["finish_reason"] == ("stop" if finished else "length")
        assert record["completion_truncated"] is not finished
        assert {name: record[name] for name in question} == question
        assert record["prompt"] == question["input"]
        assert (record["teacher"], record["max_new_tokens"], record["temperature"]) == (str(teacher), 6, 0.0)
        assert record["teacher_prompt_template"].startswith("sha256:")
    assert {record["finish_reason"] for record in written} == {"stop", "length"}


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_training_takes_exactly_these_completions(chat, generate, records, settings, options, train_here, teacher):
    """Sequence-level distillation: generate, then cross-entropy, is what a run with the teacher in it does."""
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }} : {{ m.content }}{{ eos_token if m.role == 'assistant' else ' . ' }}"
            "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
        )
        folders = [Path(settings["output_file"]).parent / name for name in ("chat_student", "chat_teacher")]
        for folder, source in zip(folders, (options["model_name_or_path"], teacher), strict=True):
            shutil.copytree(source, folder)
            tokenizer.save_pretrained(folder)
        rows = [{"messages": [{"role": "user", "content": row["input"]}]} for row in QUESTIONS]
        write_rows(Path(settings["dataset_name"]), rows)
        settings["teacher_model_name_or_path"] = str(folders[1])
        options["model_name_or_path"] = str(folders[0])
    assert generate() == 0
    run = options | {"losses": ["cross_entropy"], "shuffle_dataset": False}
    same = {name: settings[name] for name in ("teacher_model_name_or_path", "max_new_tokens", "generation_batch_size")}
    out = Path(options["output_dir"])
    online = run | same | {"dataset_name": settings["dataset_name"], "output_dir": str(out / "online")}
    offline = run | {"teacher_model_name_or_path": None, "dataset_name": settings["output_file"]}
    assert train_here(online) == train_here(offline | {"output_dir": str(out / "offline")}) == 0
    curves = [json.loads((out / name / "trainer_state.json").read_text()) for name in ("online", "offline")]
    losses = [[line["loss"] for line in curve["log_history"] if "loss" in line] for curve in curves]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    config = out / "offline.json"
    config.write_text(json.dumps({k: v for k, v in offline.items() if v is not None}))
    trainer = make_trainer(*parse_arguments(["--config", str(config)]))
    for row, record in zip(trainer.train_dataset, records(), strict=True):
        trained = [token for token in row["labels"] if token != -100]
        assert trainer.processing_class.decode(trained, skip_special_tokens=True) == record["completion"]
        assert (trained[-1] == trainer.processing_class.eos_token_id) is not record["completion_truncated"]
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels"}


def test_a_training_config_is_usable_as_it_is(generate, options, settings):
    """Options of training, of its trainers and of the launcher are passed over; what training does not know is not."""
    training = options | {"lmbda": 0.5, "num_processes": 1, "losses": ["forward_kl"], "use_peft": True}
    assert generate(**(training | settings)) == 0


def test_options_that_training_has_too_are_the_same_there():
    of_training = {option.name: option.default for option in fields(DistillSFTConfig)}
    shared = {o.name: o.default for o in fields(GenerateArguments) if o.name in of_training}
    assert {"max_new_tokens", "generation_temperature", "generation_batch_size", "input_column", "seed"} <= set(shared)
    assert shared == {name: of_training[name] for name in shared}


def test_equal_prompts_are_asked_and_written_once(generate, records, settings, capsys):
    write_rows(Path(settings["dataset_name"]), [*QUESTIONS[:3], {"input": QUESTIONS[0]["input"], "topic": "z"}] * 2)
    assert generate() == 0
    assert [record["input"] for record in records()] == [row["input"] for row in QUESTIONS[:3]]
    assert records()[0]["topic"] == "a"
    out = capsys.readouterr().out
    assert "holds 3 completions of 8 rows (5 duplicate rows asked once" in out


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["own prompt", "template"])
def test_a_dry_run_counts_the_tokens_of_the_prompts_and_needs_no_weights(template, generate, settings, teacher, capsys):
    bare = Path(settings["output_file"]).parent / "bare"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [*QUESTIONS, QUESTIONS[0]]
    write_rows(Path(settings["dataset_name"]), rows)
    changes = {"teacher_model_name_or_path": str(bare), "teacher_prompt_template": template}
    prices = {"price_per_million_prompt_tokens": 2.5, "price_per_million_completion_tokens": 10}
    capsys.readouterr()
    sampled = {"num_generations": 2, "generation_temperature": 0.7, "category_column": "topic"}
    assert generate("--dry_run", "--json", **changes, **prices, **sampled) == 0
    figures = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokens = sum(len(tokenizer((template or "{input}").format(**row)).input_ids) for row in QUESTIONS)
    assert figures["rows"] == 10
    assert figures["duplicates"] == 1
    assert figures["completions"] == 18
    assert figures["prompt_tokens"] == 2 * tokens
    assert figures["prompt_tokens_are_exact"]
    assert figures["completion_tokens_at_most"] == 2 * 9 * 6
    assert figures["categories"] == {"a": 3, "b": 3, "c": 3}
    assert figures["cost_at_most"] == pytest.approx((2 * tokens * 2.5 + 108 * 10) / 1e6)
    assert not Path(settings["output_file"]).exists()


def test_a_dry_run_of_a_half_finished_file_is_about_the_rest(generate, capsys):
    assert generate(max_rows=4) == 0
    capsys.readouterr()
    assert generate("--dry_run", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["completions"], figures["completions_written_already"]) == (9, 4)
    assert figures["completion_tokens_at_most"] == 5 * 6
    assert generate("--dry_run") == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 80
    assert "prompt tokens (exact)" in table


PLUGIN = """
from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.teachers.base import Completion, Teacher

class Echo(Teacher):
    '''Knows no tokens: it repeats the text it is given, and has nothing to say to a "hush".'''
    name = "echo"
    def __init__(self, address, **init_kwargs): self.address = address
    def check_student(self, tokenizer): raise AssertionError("there is no tokenizer")
    def prepare(self, place): pass
    def move_to(self, device): pass
    def signal(self, inputs, trained): raise NotImplementedError
    def generate(self, prompts, generation, batch_size):
        for index, prompt in reversed(list(enumerate(prompts))):
            assert prompt.token_ids == []
            text = prompt.source if isinstance(prompt.source, str) else prompt.source[-1]["content"]
            yield index, Completion("" if "hush" in text else self.address + text, finished=True)

@hookimpl
def register_teachers():
    return [Echo]
"""


@pytest.fixture
def echo(tmp_path_factory, monkeypatch):
    """A teacher plugin `echo:` that takes text, installed as a distribution of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "echo_teacher.py").write_text(PLUGIN)
    info = folder / "echo_teacher-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-teacher\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{PROJECT}]\necho = echo_teacher\n")
    monkeypatch.syspath_prepend(folder)
    plugins._registry.cache_clear()
    yield
    sys.modules.pop("echo_teacher", None)
    plugins._registry.cache_clear()


@pytest.mark.usefixtures("echo")
def test_categories_are_drawn_nested_and_apart(generate, records, settings, capsys):
    rows = [{"input": f"{n} plus {n}", "topic": "many" if n % 4 else "few"} for n in range(20)]
    random.Random(0).shuffle(rows)
    write_rows(Path(settings["dataset_name"]), rows)

    def drawn(**changes):
        changes |= {"teacher_model_name_or_path": "echo:", "category_column": "topic"}
        Path(settings["output_file"]).unlink(missing_ok=True)
        assert generate(**changes) == 0
        return [record["input"] for record in records()]

    few = drawn(rows_per_category=3)
    more = drawn(rows_per_category=6)
    assert [len(few), len(more)] == [6, 11]
    assert set(few) < set(more)
    assert few == [row["input"] for row in rows if row["input"] in few]  # in the order of the dataset
    assert drawn(rows_per_category=3) == few
    assert drawn(rows_per_category=3, seed=1) != few
    counts = capsys.readouterr().out.splitlines()
    assert {"topic few: 5 of 5 prompts", "topic many: 6 of 15 prompts"} < set(counts)
    write_rows(Path(settings["dataset_name"]), [row for row in rows if row["topic"] == "many"])
    assert drawn(rows_per_category=3) == [text for text in few if {"input": text, "topic": "many"} in rows]


@pytest.mark.usefixtures("echo")
def test_a_teacher_without_a_tokenizer_is_given_text_and_its_tokens_are_estimated(generate, records, settings, capsys):
    template = [{"role": "system", "content": "é"}, {"role": "user", "content": "{input}"}]
    changes = {"teacher_model_name_or_path": "echo:say ", "teacher_prompt_template": template}
    assert generate("--dry_run", "--json", **changes) == 0
    figures = json.loads(capsys.readouterr().out)
    assert not figures["prompt_tokens_are_exact"]
    sources = [[template[0], {"role": "user", "content": row["input"]}] for row in QUESTIONS]
    sizes = [len(json.dumps(source, ensure_ascii=False).encode()) for source in sources]
    assert figures["prompt_tokens"] == sum((size + 3) // 4 for size in sizes)
    assert generate("--dry_run", **changes) == 0
    assert "estimate: bytes / 4" in capsys.readouterr().out
    assert generate(**changes) == 0
    assert [record["completion"] for record in records()] == [f"say {row['input']}" for row in QUESTIONS]


@pytest.mark.usefixtures("echo")
def test_empty_completions_are_left_out_and_counted(generate, records, settings, capsys):
    write_rows(Path(settings["dataset_name"]), [*QUESTIONS[:2], {"input": "hush"}])
    assert generate(teacher_model_name_or_path="echo:") == 0
    assert [record["input"] for record in records()] == [row["input"] for row in QUESTIONS[:2]]
    assert "2 completions of 3 rows (1 empty and left out)" in capsys.readouterr().out
    write_rows(Path(settings["dataset_name"]), [{"input": "hush"}])
    Path(settings["output_file"]).unlink()
    assert generate(teacher_model_name_or_path="echo:") == 2
    assert "the teacher completed every row with nothing" in capsys.readouterr().err
    assert records() == []


def test_several_completions_of_a_prompt_differ_also_after_a_stop(generate, records, settings):
    sampled = {"num_generations": 4, "generation_temperature": 5.0}
    assert generate(**sampled, max_rows=2) == 0
    first = records()
    assert [record["input"] for record in first] == [row["input"] for row in QUESTIONS[:2] for _ in range(4)]
    assert len({record["completion"] for record in first}) == 8
    lines = Path(settings["output_file"]).read_text().splitlines(keepends=True)
    Path(settings["output_file"]).write_text("".join(lines[:1] + lines[4:5]))  # one of each prompt
    assert generate(**sampled, max_rows=2) == 0
    resumed = records()
    assert [resumed[0], resumed[4]] == [first[0], first[4]]
    assert len({record["completion"] for record in resumed}) == 8
    assert {record["key"] for record in resumed} == {record["key"] for record in first}


def test_a_cached_teacher_gives_the_completions_it_stored(generate, records, settings, options, write_config, teacher):
    folder = Path(settings["output_file"]).parent / "cache"
    build = options | {"output_dir": None, "cache_dir": str(folder), "top_k": 4}
    build |= {name: settings[name] for name in ("teacher_model_name_or_path", "dataset_name", "max_new_tokens")}
    arguments = ["--config", str(write_config(build | {"generation_batch_size": 1}))]
    assert worker.run(arguments, "trl-distill cache build", "trl_distill_plugins.cli.cache_build") == 0
    assert generate() == 0
    own = records()
    Path(settings["output_file"]).unlink()
    assert generate(teacher_model_name_or_path=f"cache:{folder}") == 0
    assert [record["completion"] for record in records()] == [record["completion"] for record in own]
    assert generate(teacher_model_name_or_path=f"cache:{folder}", max_new_tokens=5, output_file=f"{folder}.jsonl") == 2


def test_a_killed_run_goes_on_and_ends_as_one_that_never_stopped(generate, settings, write_config, tmp_path):
    write_rows(Path(settings["dataset_name"]), [{"input": f"red or blue {n} ?"} for n in range(16)])
    long = {"max_new_tokens": 64}
    whole = tmp_path / "whole.jsonl"
    assert generate(**long, output_file=str(whole)) == 0
    output = Path(settings["output_file"])
    config = write_config(settings | long)
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--config", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= output.read_bytes().count(b"\n") < 16
    with output.open("a") as file:
        file.write('{"input": "torn')  # as a crash in the middle of a line leaves it
    assert generate(**long) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_two_processes_of_the_command_share_the_work(generate, settings, write_config, tmp_path):
    assert generate() == 0
    output = Path(settings["output_file"])
    alone = output.read_bytes()
    output.unlink()
    command = [
        sys.executable,
        "-m",
        "trl_distill_plugins.cli.main",
        "generate",
        "--config",
        str(write_config(settings)),
    ]
    done = subprocess.run([*command, "--num_processes", "2"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Completions: 5 of 5 rows\n" in done.stderr
    assert done.stdout.count("holds 9 completions of 9 rows") == 1
    assert output.read_bytes() == alone
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


OTHER_RUNS = {
    "max_new_tokens": ({"max_new_tokens": 7}, "max_new_tokens 6, and this run has 7"),
    "temperature": ({"generation_temperature": 0.5}, "temperature 0.0, and this run has 0.5"),
    "teacher": ({"teacher_model_name_or_path": "STUDENT"}, "with teacher '"),
    "template": ({"teacher_prompt_template": TEMPLATE}, "teacher_prompt_template None, and this run has 'sha256:"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_file_is_of_one_teacher_template_and_way_of_sampling(name, generate, settings, saved_models, capfd):
    assert generate(max_rows=2) == 0
    before = Path(settings["output_file"]).read_bytes()
    changes, message = json.loads(json.dumps(OTHER_RUNS[name]).replace("STUDENT", str(saved_models["student"])))
    capfd.readouterr()
    assert generate(**changes) == 2
    line = refusal(capfd)
    assert line.startswith(f"{settings['output_file']} holds completions with ")
    assert message in line
    assert Path(settings["output_file"]).read_bytes() == before


def test_other_rows_of_the_same_run_stay_behind_its_own(generate, records, settings, capsys):
    assert generate() == 0
    everything = records()
    write_rows(Path(settings["dataset_name"]), [QUESTIONS[5] | {"topic": "new"}, {"input": "yes or no"}])
    assert generate() == 0
    assert "2 completions of 2 rows" in (out := capsys.readouterr().out)
    assert "8 of other rows kept as they were" in out
    assert [record["input"] for record in records()[:2]] == [QUESTIONS[5]["input"], "yes or no"]
    assert records()[0] == everything[5] | {"topic": "new"}
    assert records()[2:] == everything[:5] + everything[6:]


def refusal(capfd):
    """The one line a refused run prints."""
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("trl-distill")]
    assert line.startswith("trl-distill generate: error: ")
    return line.removeprefix("trl-distill generate: error: ")


REFUSED = {
    "no teacher": ({"teacher_model_name_or_path": None}, "teacher_model_name_or_path is missing"),
    "no data": ({"dataset_name": None}, "dataset_name is missing"),
    "no output": ({"output_file": None}, "output_file is missing: name the .jsonl file"),
    "option": ({"rows_per_categroy": 2}, "no option 'rows_per_categroy'; did you mean 'rows_per_category'?"),
    "option of neither": ({"frobnicate": 2}, "no option 'frobnicate'; `trl-distill generate --help` lists them"),
    "temperature": ({"generation_temperature": -1}, "generation_temperature must be a number at least 0, got -1"),
    "type": ({"max_new_tokens": "many"}, "argument --max_new_tokens: invalid int value: 'many'"),
    "several of the same": ({"num_generations": 2}, "num_generations is 2 at generation_temperature 0"),
    "category column": (
        {"category_column": "topik"},
        "questions.jsonl, row 1: there is no category_column 'topik'; did you mean 'topic'? Columns: input, topic",
    ),
    "rows of no category": ({"rows_per_category": 2}, "rows_per_category needs category_column"),
    "template column": (
        {"teacher_prompt_template": "{context} {input}"},
        "questions.jsonl, row 1: teacher_prompt_template uses {context}, which no column fills",
    ),
    "folder": ({"output_file": "DIR"}, "output_file DIR is a folder; name a file in it"),
    "suffix": ({"output_file": "DIR/out.csv"}, "output_file DIR/out.csv must end in .jsonl"),
    "folder that is a file": (
        {"output_file": "DIR/questions.jsonl/out.jsonl"},
        "cannot write to output_file DIR/questions.jsonl/out.jsonl: ",
    ),
    "output is the data": (
        {"output_file": "DIR/questions.jsonl"}, "DIR/questions.jsonl, line 1: not a completion written here",
    ),
    "teacher": ({"teacher_model_name_or_path": "DIR/none"}, "of the teacher 'DIR/none': there is no such folder"),
    "teacher's options": ({"teacher_model_init_kwargs": "[1]"}, "teacher_model_init_kwargs must be a mapping"),
    "price": ({"price_per_million_prompt_tokens": -1}, "price_per_million_prompt_tokens must be a number at least 0"),
    "one price": ({"price_per_million_prompt_tokens": 1}, "price_per_million_completion_tokens is missing beside"),
    "json": ({"json": True}, "json prints what a dry run found; add dry_run"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_a_line(name, generate, settings, tmp_path, capfd):
    changes, message = json.loads(json.dumps(REFUSED[name]).replace("DIR", str(tmp_path)))
    before = Path(settings["dataset_name"]).read_bytes()
    assert generate(**changes) == 2
    assert message in refusal(capfd)
    assert Path(settings["dataset_name"]).read_bytes() == before
    assert not list(tmp_path.glob("out*"))


def test_a_flag_of_training_is_refused_where_it_would_do_nothing(generate, capfd):
    assert generate("--learning_rate", 1) == 2
    assert "no option 'learning_rate'" in refusal(capfd)


ROWS = {
    "field null in one row": (
        [{"input": "a", "context": "x"}, {"input": "b"}], "row 2: teacher_prompt_template uses {context}, but column"
    ),
    "completions": (
        [{"input": "a", "context": "x", "completion": "b"}],
        "row 1: column 'completion' has a value, and the output has its own there; rename or drop it",
    ),
    "keys": ([{"input": "a", "context": "x", "key": 7}], "row 1: column 'key' has a value"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_are_named(name, generate, settings, capfd):
    rows, message = ROWS[name]
    write_rows(Path(settings["dataset_name"]), rows)
    assert generate(teacher_prompt_template="{context} {input}") == 2
    assert f"questions.jsonl, {message}" in refusal(capfd)


def test_what_json_cannot_hold_is_named(generate, settings, tmp_path, capfd):
    from datetime import date

    from datasets import Dataset

    Dataset.from_dict({"input": ["a"], "day": [date(2026, 1, 2)]}).to_parquet(tmp_path / "rows.parquet")
    assert generate(dataset_name=str(tmp_path / "rows.parquet")) == 2
    assert "rows.parquet, row 1: column 'day' holds a date, which JSON cannot" in refusal(capfd)


def test_null_completions_are_written(generate, records, settings):
    write_rows(Path(settings["dataset_name"]), [{"input": "red ?", "completion": None, "note": None}])
    assert generate() == 0
    assert records()[0]["completion"]
    assert "note" not in records()[0]


def test_a_prompt_column_stays_whatever_the_input_column_is(generate, records, settings):
    write_rows(Path(settings["dataset_name"]), [{"question": "red ?", "prompt": "yes or no ?"}])
    assert generate(input_column="question", max_new_tokens=1) == 0
    assert (records()[0]["question"], records()[0]["prompt"]) == ("red ?", "yes or no ?")

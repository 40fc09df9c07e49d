"""`trl-distill train` on bad input: one line naming what is wrong and what would work, exit code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import write_rows
from trl_distill_plugins.cli import main, worker

GOOD = {"prompt": "red ?", "completion": " blue"}


def files_in(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def rejected(capfd, options, code):
    """Check what every refusal has in common; return its one line."""
    assert code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    *noise, line = error.splitlines()
    assert noise == []
    assert line.startswith("trl-distill train: error: ")
    assert not options["output_dir"] or files_in(options["output_dir"]) == []
    return line.removeprefix("trl-distill train: error: ")


DATA = {
    "empty file": ("", {}, "rows.jsonl: the file is empty; put one row on each line"),
    "malformed line": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a" "completion"}\n', {},
        "rows.jsonl, line 2, column 16: not valid JSON: Expecting ',' delimiter, at \"completion\"}; correct or",
    ),
    "missing column": (
        [GOOD], {"input_column": "promt"},
        "rows.jsonl, line 1: there is no column 'promt'; did you mean 'prompt'? Columns: prompt, completion",
    ),
    "unfilled field": (
        [GOOD, GOOD], {"teacher_prompt_template": "{context} {input}"},
        "rows.jsonl, row 1: teacher_prompt_template uses {context}, which no column fills. Columns: prompt, completion",
    ),
    "field null in one row": (
        [GOOD | {"context": "x"}, GOOD], {"teacher_prompt_template": "{context} {input}"},
        "rows.jsonl, row 2: teacher_prompt_template uses {context}, but column 'context' is null; fill it in or",
    ),
    "empty completion": (
        [GOOD, GOOD | {"completion": ""}], {},
        "rows.jsonl, line 2: the completion in column 'completion' is empty; remove the row or set completion to null",
    ),
    "empty completion under a template": (
        [GOOD, GOOD | {"completion": ""}], {"teacher_prompt_template": "the {input}"},
        "rows.jsonl, line 2: the completion in column 'completion' is empty; remove the row or set completion to null",
    ),
    "no completion and no teacher": (
        [{"input": "red ?"}], {"teacher_model_name_or_path": None},
        "rows.jsonl: 1 of 1 rows have no completion, the first is row 1; set teacher_model_name_or_path",
    ),
    "no column of a known name": (
        [{"question": "red ?", "answer": "blue"}], {},
        "rows.jsonl, row 1: this row has no prompt; name the column that holds it, for example --input_column question",
    ),
    "no column of a known name under a template": (
        [{"question": "red ?", "answer": "blue"}], {"teacher_prompt_template": "the {input}"},
        "rows.jsonl, row 1: teacher_prompt_template uses {input}, but this row has none; name the column that holds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name, options, rows_file, train_here, capfd):
    rows, changes, message = DATA[name]
    rows_file.write_text(rows) if isinstance(rows, str) else write_rows(rows_file, rows)
    options |= changes
    assert message in rejected(capfd, options, train_here(options))


OPTIONS = {
    "missing file": ({"dataset_name": "DIR/row.jsonl"}, "row.jsonl: no such file; did you mean 'rows.jsonl'?"),
    "no dataset of that name": ({"dataset_name": "no/such-data"}, "cannot load the dataset 'no/such-data': "),
    "alpha": ({"distill_alpha": 1.5}, "distill_alpha must be a number at least 0 and at most 1, got 1.5"),
    "temperature": ({"distill_temperature": 0}, "distill_temperature must be a number above 0, got 0"),
    "loss": ({"losses": ["forward-kl"]}, "no loss named 'forward-kl'; did you mean 'forward_kl'?"),
    "option of a loss": (
        {"losses": [{"name": "forward_kl", "temprature": 2}]},
        "loss 'forward_kl' has no option 'temprature'; did you mean 'temperature'?",
    ),
    "mapping of losses": (
        {"losses": {"forward_kl": {"weight": 2}}},
        "losses must be a list of names or of {name: ..., weight: ..., ...}, got {'forward_kl': {'weight': 2}}",
    ),
    "number of losses": ({"losses": 2}, "losses must be a list of names or of {name: ..., weight: ..., ...}, got 2"),
    "number that YAML reads as text": (
        {"losses": [{"name": "taid", "alpha": "1e-4"}]},
        "alpha must be a number at least 0, got '1e-4', which is text: leave out quotes, and in YAML write 1.0e-4",
    ),
    "schedule of no kind": (
        {"losses": [{"name": "jsd", "beta": {"schedule": ["linear"], "start": 0, "end": 1}}]},
        "loss 'jsd': beta: a schedule is written {schedule: linear | cosine | step, ...}, got {'schedule': ['linear']",
    ),
    "option": ({"learning_rat": 1}, "no option 'learning_rat'; did you mean 'learning_rate'?"),
    "type in YAML": ({"learning_rate": "abc"}, "argument --learning_rate: invalid float value: 'abc'"),
    "list for a number": ({"max_steps": [3]}, "argument --max_steps: invalid int value: '[3]'"),
    "fraction for a count": ({"max_steps": 2.5}, "argument --max_steps: invalid int value: '2.5'"),
    "batch of nothing": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a number at least 1"),
    "loading option of the teacher": (
        {"teacher_model_init_kwargs": {"dtype": "float99"}},
        "models0/teacher': module 'torch' has no attribute 'float99'",
    ),
    "student": ({"model_name_or_path": "DIR/none"}, "cannot load the student 'DIR/none': there is no such folder"),
    "teacher": (
        {"teacher_model_name_or_path": "DIR/none"}, "cannot load the teacher 'DIR/none': there is no such folder"
    ),
    "no student": ({"model_name_or_path": None}, "model_name_or_path is missing"),
    "no output": ({"output_dir": None}, "output_dir is missing"),
    "no data": ({"dataset_name": None}, "dataset_name is missing"),
    "trainer": ({"trainer": "stf"}, "no trainer named 'stf'; did you mean 'sft'? Trainers: sft, gkd"),
    "evaluation without data": ({"eval_strategy": "steps"}, "name held-out rows in eval_dataset_name"),
    "output is a file": ({"output_dir": "DIR/rows.jsonl"}, "output_dir DIR/rows.jsonl is a file; name a folder"),
    "checkpoint": ({"resume_from_checkpoint": "DIR/none"}, "resume_from_checkpoint DIR/none is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, options, tmp_path, train_here, capfd):
    changes, message = json.loads(json.dumps(OPTIONS[name]).replace("DIR", str(tmp_path)))
    options |= changes
    assert message in rejected(capfd, options, train_here(options))


FLAGS = {
    "unknown": (["--learning_rat", "1"], "no option 'learning_rat'; did you mean 'learning_rate'?"),
    "unknown after an equals sign": (["--max_stepz=3"], "no option 'max_stepz'; did you mean 'max_steps'?"),
    "type": (["--learning_rate", "abc"], "argument --learning_rate: invalid float value: 'abc'"),
    "value missing": (["--max_steps"], "argument --max_steps: expected one argument"),
    "config without a value": (["--config"], "argument --config: expected one argument"),
    "not a flag": (["max_steps", "3"], "unexpected argument 'max_steps'; options are written --name value"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_bad_flags(name, options, train_here, capfd):
    flags, message = FLAGS[name]
    assert message in rejected(capfd, options, train_here(options, *flags))


def test_a_teacher_with_another_tokenizer(options, saved_models, tmp_path, train_here, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(saved_models["teacher"]).save_pretrained(other)
    AutoTokenizer.from_pretrained(saved_models["teacher"]).save_pretrained(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    capfd.readouterr()
    options |= {"teacher_model_name_or_path": str(other), "losses": ["logit_mse"]}
    line = rejected(capfd, options, train_here(options))
    assert f"the teacher '{other}' has another tokenizer: 2 of the student's 370 tokens differ, e.g. 'q' is" in line
    assert (
        "forward_kl or universal_logit, a teacher with the student's tokenizer, or train on the teacher's text" in line
    )
    options |= {"losses": ["forward_kl"], "max_steps": 1}
    assert train_here(options) == 0
    state = json.loads(Path(options["output_dir"], "trainer_state.json").read_text())
    assert state["log_history"][0]["aligned"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the config file"),
        ("a: [", "is not valid YAML"),
        ("- a\n- b", "must be a mapping of options to values"),
    ],
)
def test_bad_config_file(text, message, options, tmp_path, capfd):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    line = rejected(capfd, options, worker.run(["--config", str(path)]))
    assert message in line
    assert str(path) in line


def test_debug_adds_the_traceback(options, train_here, monkeypatch, capfd):
    options |= {"distill_alpha": 2}
    monkeypatch.setenv("TRL_DISTILL_DEBUG", "1")
    assert train_here(options) == 2
    error = capfd.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("trl-distill train: error: distill_alpha must be")


@pytest.mark.parametrize("missing", ["tokenizer", "weights"])
def test_a_student_folder_without_a_part(missing, options, saved_models, tmp_path, train_here, capfd):
    student = tmp_path / "student"
    shutil.copytree(saved_models["student"], student)
    for file in student.glob({"tokenizer": "tokenizer*", "weights": "*.safetensors"}[missing]):
        file.unlink()
    options |= {"model_name_or_path": str(student)}
    line = rejected(capfd, options, train_here(options))
    assert str(student) in line
    assert missing in line.replace("no file named model.safetensors", "weights")


def test_what_works_says_so(options, train_here, capfd):
    assert train_here(options) == 0
    assert f"Saved the student to {options['output_dir']}" in capfd.readouterr().out
    assert (Path(options["output_dir"]) / "model.safetensors").is_file()


def test_config_may_be_given_with_an_equals_sign(options, write_config):
    assert worker.run([f"--config={write_config(options)}"]) == 0


def of_ours(text):
    """The lines that this project prints; libraries may say something on their import."""
    return [line for line in text.splitlines() if "trl-distill" in line or "Traceback" in line]


def test_two_processes_say_it_once(options, rows_file, train):
    rows_file.write_text("{}\n")
    code, out, err = train(options, "--num_processes", 2)
    assert (code, of_ours(out)) == (2, [])
    problem = "line 1: the row has no values; remove it or fill it in"
    assert of_ours(err) == [f"trl-distill train: error: {rows_file}, {problem}"]
    assert not Path(options["output_dir"]).exists()


def test_the_command_shows_where_with_debug(options, train):
    code, _, err = train(options, "--loss_chunk_size", 0, "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert of_ours(err)[-1] == "trl-distill train: error: loss_chunk_size must be a number at least 1, got 0"


def test_the_command_reads_its_config_before_it_starts_anything(tmp_path, capfd):
    assert main.main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    problem = f"cannot read the config file {tmp_path}/no.yaml: No such file or directory"
    assert capfd.readouterr() == ("", f"trl-distill train: error: {problem}\n")

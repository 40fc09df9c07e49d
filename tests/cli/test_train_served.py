"""The command with a teacher behind a server: a real one that only writes, one with log-probs, and its key."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import PROMPTS, write_rows
from trl_distill_plugins.cli import guard, worker
from trl_distill_plugins.cli.main import main
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import check_form
from trl_distill_plugins.teachers import make_teacher

KEY = "sk-test-4b1d0f6a97c2"


@pytest.fixture(scope="module")
def transformers_serve(saved_models, tmp_path_factory):
    """The address of the tiny teacher behind `transformers serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    model = str(saved_models["teacher"])
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", "--port", str(port)], stdout=out, stderr=out
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"openai:http://127.0.0.1:{port}/v1#{model}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def bare_file(tmp_path):
    """Four different inputs without completions."""
    return write_rows(tmp_path / "inputs.jsonl", [{"input": text} for text in PROMPTS[:4]])


def test_a_teacher_that_only_writes(transformers_serve, train, train_here, options, bare_file, tmp_path, capsys):
    """Its completions are what the student learns; asking for its probabilities is one line."""
    options |= {
        "teacher_model_name_or_path": transformers_serve,
        "dataset_name": str(bare_file),
        "max_new_tokens": 6,
        "losses": ["cross_entropy"],
    }
    code, _, err = train(options)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "out" / "teacher_completions.jsonl").read_text().splitlines()]
    assert sorted(record["prompt"] for record in records) == sorted(PROMPTS[:4])
    assert any(record["completion"] for record in records)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert train_here(options | {"losses": ["forward_kl"]}) == 2
    assert "this teacher gives text only, no probabilities; train on its completions" in capsys.readouterr().err


def test_transformers_serve_writes_what_its_model_writes(transformers_serve, saved_models, tiny_tokenizer):
    from trl_distill_plugins.teachers.base import Generation, TeacherPrompt

    prompts = [TeacherPrompt(text, tiny_tokenizer(text)["input_ids"]) for text in PROMPTS[:4]]
    written = []
    for spec in (transformers_serve, str(saved_models["teacher"])):
        teacher = make_teacher(spec)
        teacher.check_student(tiny_tokenizer)
        written.append(dict(teacher.generate(prompts, Generation(max_new_tokens=6), 2)))
    assert written[0] == written[1]
    served = make_teacher(transformers_serve)
    served.check_student(tiny_tokenizer)
    with pytest.raises(ConfigError, match="gives text only"):
        check_form(served.form, [term.loss for term in Objective.from_config(["forward_kl"]).tokens])


@pytest.fixture
def stand(saved_models, tiny_tokenizer, monkeypatch):
    """A server of the tiny teacher with log-probs, which wants a key."""
    from transformers import AutoModelForCausalLM

    from tests.teachers.served_app import Stand, serving

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Stand(AutoModelForCausalLM.from_pretrained(saved_models["teacher"]), tiny_tokenizer)) as stand:
        stand.key = KEY
        yield stand


def files_with(text, folder):
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_key_is_in_nothing_a_run_leaves(stand, train, train_here, options, bare_file, tmp_path, monkeypatch, capfd):
    options |= {
        "teacher_model_name_or_path": f"openai:{stand.url}#tiny",
        "teacher_model_init_kwargs": {"top_logprobs": 10, "max_retries": 0},
        "dataset_name": str(bare_file),
        "max_new_tokens": 6,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    talkative = {"OPENAI_LOG": "debug", "TRANSFORMERS_VERBOSITY": "debug", "ACCELERATE_LOG_LEVEL": "debug"}
    code, out, err = train(options, "--debug", **talkative)
    assert code == 0, err
    assert "openai._base_client" in err  # it did log
    assert stand.answered
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.bin").exists()
    assert KEY not in out + err
    stand.key = "sk-another"  # the server repeats the key it was sent
    monkeypatch.setenv(guard.DEBUG_VARIABLE, "1")  # what --debug sets: a traceback
    assert train_here(options | {"output_dir": str(tmp_path / "refused")}) == 2
    out, err = capfd.readouterr()
    assert "Traceback" in err
    assert "Incorrect API key provided" in err
    assert KEY not in out + err
    assert files_with(KEY, tmp_path) == []
    assert tmp_path / "out" / "teacher_completions.jsonl" in files_with("red or blue", tmp_path)


def test_a_cache_of_a_served_teacher_is_trained_from(stand, options, write_config, train_here, tmp_path, capsys):
    options |= {"teacher_model_name_or_path": f"openai:{stand.url}#tiny"}
    build = {**options, "output_dir": None, "cache_dir": str(tmp_path / "cache"), "top_k": 10}
    arguments = ["--config", str(write_config(build))]
    command = ("trl-distill cache build", "trl_distill_plugins.cli.cache_build")
    assert worker.run(arguments, *command) == 0
    asked = stand.asked
    assert worker.run(arguments, *command) == 0
    assert stand.asked == asked + 1  # the probe: every text is there
    header = json.loads((tmp_path / "cache" / "header.json").read_text())
    assert (header["weights"], header["form"], header["k"]) == ("served:tiny", "top_k", 10)
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert train_here(options | {"teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}"}) == 0
    assert stand.asked == asked + 1
    capsys.readouterr()
    write_config(build)
    assert worker.run([*arguments, "--samples", "4", "--cache_dir", str(tmp_path / "drawn")], *command) == 2
    assert "samples are drawn from whole distributions" in capsys.readouterr().err
    stand.scoring = "none"
    write_config(build)
    assert worker.run([*arguments, "--losses", '["cross_entropy"]'], *command) == 2
    assert "this teacher gives text only, no probabilities; train on its completions" in capsys.readouterr().err


def test_ctrl_c_does_not_wait_for_the_server(stand, start_train, options, bare_file):
    stand.fault = lambda body, number: time.sleep(30)
    options |= {
        "teacher_model_name_or_path": f"openai:{stand.url}#tiny",
        "dataset_name": str(bare_file),
        "losses": ["cross_entropy"],
    }
    process = start_train(options)
    while stand.busy < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, 2)
    process.communicate(timeout=25)
    assert time.monotonic() - began < 20  # a request takes 30 s
    assert process.returncode == 130

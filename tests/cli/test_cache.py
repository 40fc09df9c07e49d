"""`trl-distill cache`: build, resume, train from it, inspect, verify, repair; and what is refused."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import write_rows
from trl_distill_plugins.cli import worker
from trl_distill_plugins.cli.main import main
from trl_distill_plugins.teachers.cache.store import CacheStore

TEMPLATES = {"teacher_prompt_template": "the quick brown fox {input}", "student_prompt_template": "{input}"}
BUILD = [sys.executable, "-m", "trl_distill_plugins.cli.cache_build"]  # what the command starts, without the launcher


@pytest.fixture
def build(options, write_config, monkeypatch):
    """`build(folder, *flags, **changes)`: what a worker of `cache build` does, in this process; the exit code."""

    def run(folder, *flags, **changes):
        config = write_config({**options, "output_dir": None, "cache_dir": str(folder), "top_k": 20, **changes})
        arguments = ["--config", str(config), *map(str, flags)]
        return worker.run(arguments, "trl-distill cache build", "trl_distill_plugins.cli.cache_build")

    return run


def curve(folder, name):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line[name] for line in state["log_history"] if name in line]


def test_training_from_a_cache_follows_the_teacher_itself(
    build, train_here, options, tiny_causal_lm, tiny_tokenizer, tmp_path
):
    """All tokens are kept, so only the rounding of the stored log-probs is between the two."""
    teacher = tiny_causal_lm(1, hidden=48, vocab=len(tiny_tokenizer))
    teacher.lm_head.weight.data *= 10
    for part in (teacher, tiny_tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    options = options | {"teacher_model_name_or_path": str(tmp_path / "teacher"), "max_steps": 4}
    assert (
        build(tmp_path / "cache", top_k=len(tiny_tokenizer), teacher_model_name_or_path=str(tmp_path / "teacher")) == 0
    )
    assert train_here({**options, "output_dir": str(tmp_path / "online")}) == 0
    cached = {"teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}", "output_dir": str(tmp_path / "cached")}
    assert train_here(options | cached) == 0
    online, from_cache = (curve(tmp_path / name, "loss/forward_kl") for name in ("online", "cached"))
    assert from_cache == pytest.approx(online, rel=0.01)


def test_a_cache_of_rows_with_weights_is_found_with_any_weights_above_0(build, train_here, options, tmp_path):
    """Which tokens are trained is part of a text's name; what they weigh is not."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

    def write(name, weights):
        pairs = zip(numbers, weights, strict=True)
        return write_rows(tmp_path / name, [{"prompt": f"{n} :", "completion": " fox", "weight": w} for n, w in pairs])

    first, second = write("first.jsonl", [0.5, 0, 2, 1] * 2), write("second.jsonl", [1, 0, 0.25, 4] * 2)
    zero = write("zero.jsonl", [1, 1, 1, 1] * 2)
    assert build(tmp_path / "cache", top_k=300, dataset_name=str(first)) == 0
    assert len(CacheStore(tmp_path / "cache")) == 6
    cached = {**options, "teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}"}
    assert train_here(cached | {"dataset_name": str(second), "packing": True, "padding_free": False}) == 0
    assert train_here(cached | {"dataset_name": str(zero)}) == 2


@pytest.mark.parametrize(
    "changes", [{"packing": True, "padding_free": False}, {"shuffle_dataset": True, "seed": 7}], ids=str
)
def test_packing_and_shuffling_find_the_same_texts(changes, build, train_here, options, tmp_path):
    assert build(tmp_path / "cache", samples=20, top_k=None) == 0
    cached = {"teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}", "attn_implementation": "eager"}
    assert train_here(options | cached | changes) == 0


def test_a_config_that_says_how_to_load_its_teacher_trains_from_the_cache(build, train_here, options, tmp_path):
    loading = {"teacher_model_init_kwargs": {"dtype": "float32"}, "trust_remote_code": True}
    assert build(tmp_path / "cache", **loading) == 0
    flags = ["--teacher_model_name_or_path", f"cache:{tmp_path / 'cache'}"]
    assert train_here(options | loading, *flags) == 0


def test_bare_inputs_are_completed_while_building_and_not_again(build, train_here, options, tmp_path):
    bare = write_rows(tmp_path / "bare.jsonl", [{"input": text} for text in ("red or blue", "yes or no", "the dog")])
    rows = {"dataset_name": str(bare), "max_new_tokens": 5, **TEMPLATES}
    assert build(tmp_path / "cache", **rows) == 0
    written = (tmp_path / "cache" / "teacher_completions.jsonl").read_text()
    cached = {"teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}"}
    assert train_here(options | rows | cached) == 0
    texts = [[json.loads(line)["completion"] for line in text.splitlines()] for text in (
        written, (tmp_path / "out" / "teacher_completions.jsonl").read_text())]  # fmt: skip
    assert sorted(texts[0]) == sorted(texts[1])
    assert train_here(options | rows | cached | {"max_new_tokens": 6, "output_dir": str(tmp_path / "other")}) == 2


def test_other_rows_and_another_template_are_explained(build, train_here, options, tmp_path, capsys):
    assert build(tmp_path / "cache") == 0
    cached = {"teacher_model_name_or_path": f"cache:{tmp_path / 'cache'}"}
    assert train_here(options | cached | TEMPLATES) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was built with teacher_prompt_template None; this run has the quick brown fox {input}" in message
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a new row", "completion": " no"}] * 4)
    assert train_here(options | cached | {"dataset_name": str(other)}) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks 4 of the 4 texts of a batch" in message
    assert "begins 'a new row no" in message


def test_inspect_and_verify(build, tmp_path, capsys):
    assert build(tmp_path) == 0
    capsys.readouterr()
    assert main(["cache", "inspect", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["form"] == "top_k"
    assert figures["k"] == figures["tokens named at each"] == 20
    assert figures["texts"] == 4
    assert figures["bytes a trained token"] == pytest.approx(figures["bytes"] / figures["trained tokens"], abs=0.01)
    assert main(["cache", "inspect", str(tmp_path)]) == 0
    assert "bytes a trained token" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path)]) == 0
    assert "4 texts in 1 shards, all as they were written" in capsys.readouterr().out


def test_a_flipped_bit_is_named_and_repaired(build, train_here, options, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert build(folder) == 0
    digest = CacheStore(folder).content_digest()
    (shard,) = folder.glob("*.shard")
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.unlink()
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["cache", "verify", str(folder)]) == 2
    assert f"{shard}: 1 of 4 records fail their checksum; 4 records are lost" in capsys.readouterr().err
    assert train_here(options | {"teacher_model_name_or_path": f"cache:{folder}"}) == 2
    assert "--repair" in capsys.readouterr().err
    assert build(folder, "--repair") == 0
    assert CacheStore(folder).content_digest() == digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dir": None}, "cache_dir is missing: name the folder of the cache"),
        ({"top_k": 0}, "top_k must be a number at least 1, got 0"),
        ({"top_k": 371}, "top_k is 371, and the teacher's vocabulary has 370 tokens"),
        ({"top_mass": 1.5}, "top_mass must be a number above 0 and at most 1, got 1.5"),
        ({"min_prob": -0.1}, "min_prob must be a number at least 0 and at most 1, got -0.1"),
        ({"samples": 0}, "samples must be a number at least 1"),
        ({"trainer": "gkd"}, "a cache holds what a teacher says of texts that are there before training"),
        ({"teacher_model_name_or_path": "self:base"}, "is the student in training; what it says before that is cached"),
        ({"teacher_model_name_or_path": None}, "a cache is built from a teacher in memory or on a server"),
        ({"top_q": 3}, "no option 'top_q'; did you mean 'top_k'?"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_said_in_a_line(changes, message, build, tmp_path, capsys):
    assert build(tmp_path / "cache", **changes) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-distill")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("cache/*.shard"))


def test_a_teacher_with_another_tokenizer_is_refused(build, wide_tokenizer, tiny_causal_lm, tmp_path, capsys):
    for part in (tiny_causal_lm(1, vocab=len(wide_tokenizer)), wide_tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    assert build(tmp_path / "cache", teacher_model_name_or_path=str(tmp_path / "teacher")) == 2
    assert "has another tokenizer than the student, and a cache holds log-probabilities" in capsys.readouterr().err


def test_a_cache_of_another_selection_is_refused(build, tmp_path, capsys):
    assert build(tmp_path) == 0
    assert build(tmp_path, top_k=21) == 2
    assert "was built with k 20; this run has 21" in capsys.readouterr().err


def test_a_killed_builder_goes_on_where_it_was(saved_models, options, write_config, build, tmp_path):
    rows = write_rows(tmp_path / "many.jsonl", [{"prompt": f"{n} plus", "completion": f" {n}"} for n in range(700)])
    many = {"dataset_name": str(rows), "per_device_eval_batch_size": 2}
    assert build(tmp_path / "whole", **many) == 0
    torn = tmp_path / "torn"
    config = write_config({**options, "output_dir": None, "cache_dir": str(torn), "top_k": 20, **many})
    process = subprocess.Popen([*BUILD, "--config", str(config)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(torn.glob("*.shard")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = CacheStore(tmp_path / "whole")
    assert 0 < len(CacheStore(torn)) < len(whole) == 700
    assert build(torn, **many) == 0
    assert CacheStore(torn).content_digest() == whole.content_digest()


def test_the_command_lists_its_subcommands(capsys):
    assert main(["cache", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "trl-distill cache verify DIR" in listed
    assert max(map(len, listed.splitlines())) <= 80
    assert main(["cache", "bild"]) == 2
    assert (
        "did you mean 'build'? Subcommands: build, inspect, verify, export, import, push, pull"
        in capsys.readouterr().err
    )

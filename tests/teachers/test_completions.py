"""Teacher completions on disk: resumed, never lost or doubled, shared by several ranks."""

import json

import pytest

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.completions import CompletionStore, Ranks, make_request, write_completions

GENERATION = Generation(max_new_tokens=8)


class Scribe(Teacher):
    """Answers each prompt with its ids doubled, and stops working after `strength` batches."""

    name = "scribe"

    def __init__(self, strength=10**9):
        self.strength, self.batches = strength, []

    def check_student(self, tokenizer):
        pass

    def move_to(self, device):
        pass

    def prepare(self, place):
        pass

    def signal(self, inputs, trained):
        raise NotImplementedError

    def generate(self, prompts, generation, batch_size):
        for start in range(0, len(prompts), batch_size):
            if len(self.batches) >= self.strength:
                raise KeyboardInterrupt
            batch = [prompt.token_ids for prompt in prompts[start : start + batch_size]]
            self.batches.append(batch)
            for index, ids in reversed(list(enumerate(batch, start))):  # any order will do
                yield index, Completion(" ".join(str(2 * token) for token in ids), finished=len(ids) < 4)


def requests(*prompts, generation=GENERATION):
    return [make_request(prompt_of(*prompt), f"row {prompt}", "t", generation) for prompt in prompts]


def prompt_of(*ids):
    return TeacherPrompt(f"text of {ids}", list(ids))


def write(store, wanted, teacher, batch_size=2):
    return write_completions(wanted, teacher, GENERATION, store, batch_size=batch_size, description="test")


PROMPTS = [(1,), (2, 3), (4, 5, 6, 7), (8,), (9, 9)]


def test_records_come_back_in_order_and_say_how_they_ended(tmp_path):
    records = write(CompletionStore(tmp_path, Ranks()), requests(*PROMPTS), Scribe())
    assert [record["completion"] for record in records] == ["2", "4 6", "8 10 12 14", "16", "18 18"]
    assert [record["finish_reason"] for record in records] == ["stop", "stop", "length", "stop", "stop"]
    assert records[2]["prompt"] == "row (4, 5, 6, 7)"
    assert records[0]["max_new_tokens"] == 8


def test_longest_prompts_go_first(tmp_path):
    teacher = Scribe()
    write(CompletionStore(tmp_path, Ranks()), requests(*PROMPTS), teacher)
    lengths = [len(prompt) for batch in teacher.batches for prompt in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    store = CompletionStore(tmp_path, Ranks())
    with pytest.raises(KeyboardInterrupt):
        write(store, requests(*PROMPTS), Scribe(strength=1))
    assert len(store.path.read_text().splitlines()) == 2
    teacher = Scribe()
    resumed = write(store, requests(*PROMPTS), teacher)
    assert sum(map(len, teacher.batches)) == 3
    whole = write(CompletionStore(tmp_path / "whole", Ranks()), requests(*PROMPTS), Scribe())
    assert resumed == whole
    assert len(store.path.read_text().splitlines()) == len(PROMPTS)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_torn_by_a_crash_is_written_again(tmp_path, cut):
    store = CompletionStore(tmp_path, Ranks())
    whole = write(store, requests(*PROMPTS), Scribe())
    store.path.write_bytes(store.path.read_bytes()[:-cut])
    teacher = Scribe()
    assert write(store, requests(*PROMPTS), teacher) == whole
    assert sum(map(len, teacher.batches)) == 1
    assert all(json.loads(line) for line in store.path.read_text().splitlines())


def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path):
    store = CompletionStore(tmp_path, Ranks())
    write(store, requests(*PROMPTS), Scribe())
    lines = store.path.read_text().splitlines(keepends=True)
    store.path.write_text("".join([*lines[:1], "{oops\n", *lines[1:]]))
    with pytest.raises(DataError, match=r"teacher_completions.jsonl, line 2: not valid JSON; remove that line"):
        write(store, requests(*PROMPTS), Scribe())
    assert store.path.read_text().count("\n") == len(PROMPTS) + 1


def test_another_teacher_or_other_sampling_writes_again():
    changed = {
        make_request(prompt_of(1), "x", "t", GENERATION).key,
        make_request(prompt_of(1), "x", "other", GENERATION).key,
        make_request(prompt_of(1), "x", "t", Generation(max_new_tokens=9)).key,
        make_request(prompt_of(1), "x", "t", Generation(max_new_tokens=8, temperature=1.0)).key,
        make_request(prompt_of(1), "x", "t", GENERATION, repeat=1).key,
        make_request(prompt_of(2), "x", "t", GENERATION).key,
    }
    assert len(changed) == 6
    assert make_request(prompt_of(1), "shown otherwise", "t", GENERATION).key in changed


def test_equal_prompts_are_completed_once(tmp_path):
    teacher = Scribe()
    records = write(CompletionStore(tmp_path, Ranks()), requests((1,), (1,), (1,)), teacher)
    assert sum(map(len, teacher.batches)) == 1
    assert [record["completion"] for record in records] == ["2", "2", "2"]


def test_what_other_ranks_wrote_is_joined_into_one_file(tmp_path):
    """Rank 1 died after its share: rank 0 alone finds its records, writes the rest and joins both files."""
    wanted = requests(*PROMPTS)
    other = CompletionStore(tmp_path, Ranks(1, 2))
    other.append([{"key": wanted[0].key, "completion": "from rank 1", "finish_reason": "stop"}])
    store, teacher = CompletionStore(tmp_path, Ranks()), Scribe()
    records = write(store, wanted, teacher)
    assert records[0]["completion"] == "from rank 1"
    assert sum(map(len, teacher.batches)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["teacher_completions.jsonl"]
    assert len(store.path.read_text().splitlines()) == 5

"""`CompletionStore`: what its file holds after a stop at a bad moment."""

import json

from trl_distill_plugins.teachers.completions import FILE_NAME, CompletionStore, Ranks


def keys(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_merge_that_was_cut_short_is_finished_and_not_repeated(tmp_path):
    first, second = (CompletionStore(tmp_path / FILE_NAME, Ranks(rank, 2)) for rank in (0, 1))
    first.append([{"key": "a"}])
    second.append([{"key": "b"}, {"key": "c"}])
    first.append([{"key": "b"}])  # the merge got that far
    first.merge()
    assert keys(first.path) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher_completions.jsonl"]


def test_a_torn_line_of_another_rank_is_left_out_of_the_merge(tmp_path):
    first, second = (CompletionStore(tmp_path / FILE_NAME, Ranks(rank, 2)) for rank in (0, 1))
    second.append([{"key": "b"}])
    with (tmp_path / "teacher_completions.rank1.jsonl").open("a") as file:
        file.write('{"key": "c')
    first.merge()
    assert keys(first.path) == ["b"]

"""pack_views and ViewCollator, with TRL's own packing and collator."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.collator import ViewCollator
from trl_distill_plugins.prompts.packing import pack_views

WINDOW = 12
LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=12)


def pack(dataset, max_length):
    from trl import pack_dataset

    return pack_dataset(dataset, max_length, "bfd")


def trl_collator(**options):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0, **options)


def rows_of(lengths):
    """Rows whose ids tell the document and the role: student prompt 1, teacher prompt 2, completion 100 n + k."""
    rows = []
    for n, (student, teacher, completion) in enumerate(lengths, start=1):
        ids = [100 * n + k for k in range(completion)]
        rows.append(
            {
                "input_ids": [1] * student + ids,
                "labels": [-100] * student + ids,
                "teacher_input_ids": [2] * teacher + ids,
                "teacher_labels": [-100] * teacher + ids,
            }
        )
    return rows


def documents(row, prefix=""):
    """The documents of a packed row, as pairs of ids and labels."""
    ids, labels = iter(row[prefix + "input_ids"]), iter(row[prefix + "labels"])
    found = [([next(ids) for _ in range(n)], [next(labels) for _ in range(n)]) for n in row[prefix + "seq_lengths"]]
    assert next(ids, None) is next(labels, None) is None
    return found


@settings(deadline=None, max_examples=20)
@given(LENGTHS, st.booleans())
def test_packed_views_hold_the_same_documents_in_the_same_order(lengths, stream):
    rows = rows_of(lengths)
    dataset = Dataset.from_list(rows)
    packed = list(pack_views(dataset.to_iterable_dataset() if stream else dataset, pack, WINDOW))
    pairs = []
    for row in packed:
        assert len(row["input_ids"]) <= WINDOW
        pairs += zip(documents(row), documents(row, "teacher_"), strict=True)
    assert sorted(pairs) == sorted(
        ((row["input_ids"], row["labels"]), (row["teacher_input_ids"], row["teacher_labels"])) for row in rows
    )


def test_rows_with_one_view_are_packed_as_trl_packs_them():
    dataset = Dataset.from_list(rows_of([(2, 1, 3), (1, 1, 4), (3, 1, 1)])).select_columns(["input_ids", "labels"])
    assert pack_views(dataset, pack, WINDOW).to_list() == pack(dataset, WINDOW).to_list()


def test_packing_that_would_cut_documents_is_refused():
    from trl import pack_dataset

    dataset = Dataset.from_list(rows_of([(2, 5, 3)]))
    with pytest.raises(ConfigError, match=r"a row of 5 tokens would be cut by packing to 4.*max_length=4"):
        pack_views(dataset, pack, 4)
    with pytest.raises(ConfigError, match="packing_strategy cuts documents"):
        pack_views(dataset, lambda data, length: pack_dataset(data, length, "wrapped"), WINDOW)


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.sampled_from([{}, {"padding_free": True}, {"pad_to_multiple_of": 8}]))
def test_a_batch_holds_both_views_aligned(lengths, options):
    rows = rows_of(lengths)
    base = trl_collator(**options)
    batch = ViewCollator(base)(rows)
    student = base([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    assert {key for key in batch if not key.startswith("teacher_")} == set(student)
    assert {key.removeprefix("teacher_") for key in batch if key.startswith("teacher_")} == set(student)
    assert torch.equal(batch["input_ids"], student["input_ids"])
    ids = [token for row in rows for token in row["labels"] if token != -100]
    for prefix in ("", "teacher_"):
        labels = batch[prefix + "labels"]
        assert labels[labels != -100].tolist() == ids
        assert batch[prefix + "input_ids"][labels != -100].tolist() == ids


def test_packed_rows_stay_aligned_through_the_collator():
    lengths = [(2, 7, 3), (1, 1, 4), (3, 2, 0), (4, 9, 2), (1, 3, 5)]
    packed = pack_views(Dataset.from_list(rows_of(lengths)), pack, WINDOW)
    batch = ViewCollator(trl_collator(padding_free=True))(packed.to_list())
    for prefix, column in (("", 0), ("teacher_", 1)):
        starts = (batch[prefix + "position_ids"] == 0).sum().item()
        assert starts == len(lengths)
        assert batch[prefix + "input_ids"].shape == (1, sum(row[column] + row[2] for row in lengths))
    assert torch.equal(*(batch[p + "labels"][batch[p + "labels"] != -100] for p in ("", "teacher_")))


def test_one_view_gives_the_batch_of_the_base_without_a_label_at_the_start():
    batch = ViewCollator(trl_collator())([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_views_that_train_different_tokens_are_refused():
    (row,) = rows_of([(2, 3, 2)])
    row["teacher_labels"] = [-100] * 4 + row["teacher_labels"][4:]
    with pytest.raises(DataError, match=r"train different tokens \(2 and 1\); make both from one completion"):
        ViewCollator(trl_collator())([row])

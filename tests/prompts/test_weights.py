"""Token weights from dataset to batch: where they come from, which tokens get them, and that they stay in step."""

import json
import re
from itertools import groupby

import pytest
import torch
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.collator import ViewCollator
from trl_distill_plugins.prompts.packing import pack_views
from trl_distill_plugins.prompts.panel import PanelTemplates
from trl_distill_plugins.prompts.preparing import prepare_views
from trl_distill_plugins.prompts.row_weights import WeightedViews
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.views import ViewBuilder
from trl_distill_plugins.prompts.weights import weights_in

EXPERT = PromptTemplate.parse("You are an expert. {input}")
SYSTEM, USER = {"role": "system", "content": "e"}, {"role": "user", "content": "12 plus 30?"}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1, max_size=8)
ROLES = st.sampled_from(["user", "assistant", "tool", "system"])


def answer(content="It is 42.", **more):
    return {"role": "assistant", "content": content, **more}


def prepared(builder, *rows, stream=False, name="train", **options):
    dataset = Dataset.from_list(list(rows))
    return list(prepare_views(dataset.to_iterable_dataset() if stream else dataset, builder, name, **options))


def parts(tokenizer, view):
    """The texts and weights of the runs of equal weight above 0."""
    triples = zip(view["input_ids"], view["labels"], view["loss_weights"], strict=True)
    runs = [(weight, [token for token, _, _ in run]) for weight, run in groupby(triples, lambda triple: triple[2])]
    return [(tokenizer.decode(ids), weight) for weight, ids in runs if weight]


def check_step(view):
    """Ids, labels and weights are as many, and what weighs something is what is trained."""
    assert len(view["input_ids"]) == len(view["labels"]) == len(view["loss_weights"])
    expected = [i if weight else -100 for i, weight in zip(view["input_ids"], view["loss_weights"], strict=True)]
    assert view["labels"] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_the_weight_of_an_answer_is_that_of_its_tokens(stream, chat_tokenizer):
    builder = ViewBuilder(chat_tokenizer)
    rows = [{"messages": [USER, answer(weight=weight)]} for weight in (0.25, None, 3)]
    views = prepared(builder, *rows, stream=stream)
    text = "It is 42.<|im_end|>\n"
    assert [parts(chat_tokenizer, view) for view in views] == [[(text, 0.25)], [(text, 1.0)], [(text, 3.0)]]
    for view in views:
        check_step(view)
        assert view["input_ids"] == builder({"messages": [USER, answer()]})["input_ids"]


def test_a_rows_weight_multiplies_those_of_its_completions_messages(chat_tokenizer, plain_tokenizer):
    (view,) = prepared(ViewBuilder(plain_tokenizer), {"prompt": "a", "completion": "b", "weight": 0.5})
    assert parts(plain_tokenizer, view) == [("b<eos>", 0.5)]
    row = {"prompt": [USER], "completion": [answer(weight=0.5)], "weight": 3}
    (view,) = prepared(ViewBuilder(chat_tokenizer), row)
    assert parts(chat_tokenizer, view) == [("It is 42.<|im_end|>\n", 1.5)]


def test_each_message_of_a_completion_has_its_own_tokens(chat_tokenizer):
    completion = [answer("Let me see.", weight=0.5), {"role": "tool", "content": "42", "weight": 0}, answer(weight=2.0)]
    for builder in (ViewBuilder(chat_tokenizer), ViewBuilder(chat_tokenizer, teacher_template=EXPERT)):
        if builder.has_teacher_view:
            builder.teacher_template = PromptTemplate.parse([SYSTEM, {"role": "user", "content": "{input}"}])
        (view,) = prepared(builder, {"prompt": [USER], "completion": completion})
        check_step(view)
        assert parts(chat_tokenizer, view) == [
            ("Let me see.<|im_end|>\n", 0.5),
            ("<|im_start|>assistant\nIt is 42.<|im_end|>\n", 2.0),
        ]
        if builder.has_teacher_view:
            assert [i for i in view["teacher_labels"] if i != -100] == [i for i in view["labels"] if i != -100]


def test_messages_of_the_prompt_are_trained_where_they_have_a_weight(chat_tokenizer):
    turns = [{**SYSTEM, "weight": 0.5}, USER, answer("e", weight=0.25), {**USER, "weight": 0}, answer("m", weight=0)]
    asked = [*turns, {"role": "user", "content": "<|im"}, answer()]
    (view,) = prepared(ViewBuilder(chat_tokenizer), {"messages": asked})
    check_step(view)
    expected = [("e<|im_end|>\n", 0.5), ("e<|im_end|>\n", 0.25), ("It is 42.<|im_end|>\n", 1.0)]
    assert parts(chat_tokenizer, view) == expected


def test_prompt_weights_where_the_generation_prompt_is_no_prefix(chat_tokenizer, thinking_template, tokenizer_of):
    tokenizer = tokenizer_of()
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", thinking_template
    (view,) = prepared(ViewBuilder(tokenizer), {"messages": [USER, answer("a", weight=0.5), USER, answer("b")]})
    assert parts(tokenizer, view) == [("a<|im_end|>\n", 0.5), ("b<|im_end|>\n", 1.0)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(ROLES, TEXTS, st.sampled_from([0, 0.5, 1, 2.5])), min_size=2, max_size=6), st.data())
def test_every_message_of_any_conversation_has_its_content_and_end(chat_tokenizer, turns, data):
    turns = [("user", "?", 0), *turns]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in turns]
    at = data.draw(st.integers(1, len(messages) - 1))
    messages[at] |= {"role": "assistant", "weight": 1.5}
    row = {"prompt": messages[:at], "completion": messages[at:]}
    view = WeightedViews(ViewBuilder(chat_tokenizer))(row, 0, "train")
    check_step(view)
    pieces = []
    for index, message in enumerate(messages):
        header = f"<|im_start|>{message['role']}\n"
        own = f"{message['content']}<|im_end|>\n"
        pieces += [(header, 0), (own, message["weight"])] if index <= at else [(header + own, message["weight"])]
    runs = groupby(pieces, lambda piece: piece[1])
    expected = [("".join(text for text, _ in run), weight) for weight, run in runs if weight]
    assert parts(chat_tokenizer, view) == expected


def test_weight_0_is_no_label_in_the_view_of_every_teacher(chat_tokenizer, wide_tokenizer):
    completion = [answer("Let me see."), {"role": "tool", "content": "42", "weight": 0}, answer("Yes.")]
    row = {"prompt": [USER], "completion": completion}
    chat = PromptTemplate.parse([SYSTEM, {"role": "user", "content": "{input}"}])
    panel = ViewBuilder(chat_tokenizer, teacher_template=PanelTemplates((None, chat)))
    (view,) = prepared(panel, row)
    trained = [label for label in view["labels"] if label != -100]
    assert [label for label in view["teacher_labels"] if label != -100] == trained * 2
    (view,) = prepared(ViewBuilder(chat_tokenizer, teacher_tokenizer=wide_tokenizer), row)
    ids = [label for label in view["teacher_labels"] if label != -100]
    assert wide_tokenizer.decode(ids) == "Let me see.<turn>assistant: Yes.<turn>"


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 60), st.booleans(), st.sampled_from([0, 0.5]))
def test_truncation_keeps_weights_in_step(bos_tokenizer, window, has_bos, weight):
    tokenizer = bos_tokenizer
    start = "{{ bos_token }}" if has_bos else ""
    tokenizer.chat_template = (
        start
        + "{% for m in messages %}{{ m.role + ':' + m.content + '<eos>' }}{% endfor %}"
        + ("{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    )
    second = {"role": "tool", "content": "12 plus 30 is 42", "weight": 2.0}
    row = {
        "prompt": [USER, answer("What?", weight=weight), USER],
        "completion": [answer("Answer: 12", weight=0), second],
    }
    whole, view = (
        WeightedViews(ViewBuilder(tokenizer, max_length=length))(row, 0, "train") for length in (None, window)
    )
    check_step(view)
    assert len(view["input_ids"]) <= window
    assert view["stays"] == any(view["loss_weights"])
    pairs = list(zip(whole["input_ids"], whole["loss_weights"], strict=True))
    left = list(zip(view["input_ids"], view["loss_weights"], strict=True))
    rest = left[1:] if has_bos and len(left) > 2 else left
    assert any(pairs[i : i + len(rest)] == rest for i in range(len(pairs)))


TOKENISED = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "loss_weights": [1.0, 1.0, 0.5, 0.0, 2.0]}


@pytest.mark.parametrize("stream", [False, True])
def test_tokenised_rows_are_brought_in_step_and_cut_as_trl_cuts_them(stream, plain_tokenizer):
    builder = ViewBuilder(plain_tokenizer)
    silent = {**TOKENISED, "loss_weights": [1.0, 1.0, 0.0, 0.0, 0.0]}
    (view,) = prepared(builder, TOKENISED, silent, stream=stream)
    assert view == {**TOKENISED, "labels": [-100, -100, 7, -100, 9], "loss_weights": [0.0, 0.0, 0.5, 0.0, 2.0]}
    assert prepared(builder, view, stream=stream) == [view]
    (view,) = prepared(builder, TOKENISED, stream=stream, cut=slice(-2, None))
    assert view == {"input_ids": [8, 9], "labels": [-100, 9], "loss_weights": [0.0, 2.0]}
    (view,) = prepared(builder, {**TOKENISED, "weight": 4}, stream=stream, cut=slice(3))
    assert view == {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "loss_weights": [0.0, 0.0, 2.0]}


def test_tokenised_rows_with_two_views_lose_the_same_labels(plain_tokenizer, wide_tokenizer):
    ids = {"teacher_input_ids": [1, 7, 8, 9], "teacher_labels": [-100, 7, 8, 9]}
    (view,) = prepared(ViewBuilder(plain_tokenizer, teacher_template=EXPERT), {**TOKENISED, **ids}, cut=slice(2))
    assert view["teacher_labels"] == [-100, 7, -100, 9]
    assert len(view["input_ids"]) == 5
    foreign = ViewBuilder(plain_tokenizer, teacher_tokenizer=wide_tokenizer)
    with pytest.raises(DataError, match=r"train, row 1: column 'loss_weights' has weight 0 inside a completion"):
        prepared(foreign, {**TOKENISED, **ids})
    two = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "loss_weights": [1.0, 0.0, 1.0, 2.0]}
    theirs = {"teacher_input_ids": [1, 2, 2, 3, 4, 4], "teacher_labels": [-100, 2, 2, -100, 4, 4]}
    (view,) = prepared(foreign, {**two, **theirs})
    assert view["labels"] == [-100, -100, -100, 4]
    assert view["teacher_labels"] == [-100, -100, -100, -100, 4, 4]


def test_rows_of_weight_0_are_left_out_and_counted(plain_tokenizer, caplog):
    rows = [{"prompt": "a", "completion": "b", "weight": weight} for weight in (0, 1, 0.0)]
    with caplog.at_level("WARNING", "trl_distill_plugins"):
        assert len(prepared(ViewBuilder(plain_tokenizer), *rows)) == 1
    assert caplog.messages == ["train: 2 of 3 rows have weight 0 and are left out"]
    with pytest.raises(DataError, match="train: all tokens of all rows have weight 0"):
        prepared(ViewBuilder(plain_tokenizer), rows[0])


def test_rows_the_student_completes_stay_though_they_train_nothing_yet(plain_tokenizer):
    builder = ViewBuilder(plain_tokenizer, completion_required=False)
    rows = [{"prompt": "a", "completion": None, "weight": 0.5}, {"prompt": "a", "completion": "b", "weight": 0.5}]
    views = prepared(builder, *rows)
    assert [sum(view["loss_weights"]) for view in views] == [0.0, 1.0]


WEIGHED = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.sampled_from([0, 0.5, 1, 2]), max_size=6)), min_size=1, max_size=9
)


def weighed_rows(shapes, *, two_views):
    rows = []
    for n, (prompt, weights) in enumerate(shapes, start=1):
        ids = [10 * n + k for k in range(len(weights) + 1)]
        row = {"input_ids": [1] * prompt + ids, "labels": [-100] * prompt + ids}
        row["loss_weights"] = [0.0] * prompt + [*map(float, weights), 1.0]
        if two_views:
            row |= {"teacher_input_ids": [2, 2, *ids], "teacher_labels": [-100, -100, *ids]}
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=25)
@given(WEIGHED, st.booleans(), st.booleans(), st.sampled_from([{}, {"padding_free": True}, {"pad_to_multiple_of": 8}]))
def test_each_token_keeps_its_weight_through_packing_and_collating(plain_tokenizer, shapes, two_views, packs, options):
    """Each completion token is in one row alone, so that it names its weight."""
    rows = weighed_rows(shapes, two_views=two_views)
    builder = ViewBuilder(plain_tokenizer, teacher_template=EXPERT if two_views else None)
    views = prepare_views(Dataset.from_list(rows), builder, "train")
    if packs:
        views = pack_views(views, lambda data, length: pack_dataset(data, length, "bfd"), 16)
    batch = ViewCollator(DataCollatorForLanguageModeling(pad_token_id=3, **options))(views.to_list())
    expected = {}
    for row in rows:
        for token, label, weight in zip(row["input_ids"], row["labels"], row["loss_weights"], strict=True):
            if label != -100 and weight:
                expected[token] = weight
    trained = batch["labels"] != -100
    weights = batch["loss_weights"]
    assert weights.shape == batch["labels"].shape
    assert weights.dtype == torch.float32
    assert dict(zip(batch["input_ids"][trained].tolist(), weights[trained].tolist(), strict=True)) == expected
    assert weights[~trained].count_nonzero() == 0
    if two_views:
        theirs = batch["teacher_labels"]
        assert theirs[theirs != -100].tolist() == batch["labels"][trained].tolist()


def test_rows_without_weights_have_no_column_of_them(plain_tokenizer, chat_tokenizer, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "weight": None}, {"prompt": "c", "completion": "d", "weight": None}]
    dataset = Dataset.from_list(rows)
    views = prepare_views(dataset, ViewBuilder(plain_tokenizer), "train")
    assert views.column_names == ["input_ids", "labels"]
    assert prepare_views(views, ViewBuilder(plain_tokenizer), "train") is views
    messages = [{"messages": [USER, answer(weight=None)]}, {"messages": [USER, answer()]}]
    assert not weights_in(Dataset.from_list(messages))


@pytest.mark.parametrize("stream", [False, True])
def test_a_weight_is_found_in_any_row_of_any_file(stream, tmp_path):
    file = tmp_path / "rows.jsonl"
    tools = {"role": "tool", "content": '{"weight": 70}', "data": {"weight": 70}}
    rows = [{"messages": [USER, tools, answer()]}] * 5
    file.write_text("\n".join(map(json.dumps, rows)))
    assert weights_in(load_dataset("json", data_files=str(file), split="train", streaming=stream)) == ""
    file.write_text("\n".join(map(json.dumps, [*rows, {"messages": [USER, answer(weight=0.5)]}])))
    found = weights_in(load_dataset("json", data_files=str(file), split="train", streaming=stream))
    assert found == "key 'weight' of a message in column 'messages'"


BAD = [-1, -0.5, float("nan"), float("inf"), "heavy", True]


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_weight_is_named_with_its_row(value, plain_tokenizer, chat_tokenizer):
    good = {"messages": [USER, answer(weight=1)]}
    bad = {"messages": [USER, answer(weight=value)]}
    rows = [{"prompt": "a", "completion": "b", "weight": 1}, {"prompt": "a", "completion": "b", "weight": value}]

    def stream(*rows):
        from datasets import IterableDataset

        return IterableDataset.from_generator(lambda: iter(rows))

    where = re.escape("train, row 2: ")
    with pytest.raises(DataError, match=where + r"message 2 of column 'messages' has the weight") as caught:
        list(prepare_views(stream(good, bad), ViewBuilder(chat_tokenizer), "train"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=where + r"column 'weight' has the weight"):
        list(prepare_views(stream(*rows), ViewBuilder(plain_tokenizer), "train"))
    tokenised = {**TOKENISED, "loss_weights": [1.0, 1.0, 0.5, value, 2.0]}
    with pytest.raises(DataError, match=where + r"token 4 of column 'loss_weights' has the weight"):
        list(prepare_views(stream(TOKENISED, tokenised), ViewBuilder(plain_tokenizer), "train"))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({**TOKENISED, "loss_weights": [1.0, 2.0]}, {}, r"row 1: column 'loss_weights' must hold a number for each"),
        (
            {"messages": [{**USER, "weight": 1}, answer()]},
            {"teacher_template": EXPERT},
            r"row 1: message 1 of the prompt has a weight above 0, but student and teacher see prompts of their own",
        ),
        (
            {"messages": [{**USER, "weight": 1}, answer()]},
            {"completion_required": False},
            r"row 1: message 1 of the prompt has a weight above 0, but the student writes completions of these rows",
        ),
        (
            {"prompt": "a", "completion": "b", "weight": 2},
            {"student_template": PromptTemplate.parse("{prompt} of {weight} kg")},
            r"row 1: column 'weight' weighs the row, and a prompt template has it as \{weight\}",
        ),
        ({"input_ids": [1, 2], "loss_weights": [1.0, 1.0]}, {}, r"the rows are tokenised already"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(row, options, message, chat_tokenizer):
    with pytest.raises(DataError, match=message) as caught:
        prepared(ViewBuilder(chat_tokenizer, **options), row)
    assert "\n" not in str(caught.value)


def test_a_stream_must_show_its_weights_early(plain_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 200 + [{"prompt": "a", "completion": "b", "weight": 2}]
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(
        DataError, match=r"row 201: column 'weight' weighs tokens, and the first rows of the dataset have"
    ):
        list(prepare_views(stream, ViewBuilder(plain_tokenizer), "train"))


def test_a_template_that_renders_a_message_otherwise_later_is_refused(tokenizer_of):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last or m.role == 'user' else '' }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = {"messages": [USER, answer("gone", weight=1), USER, answer()]}
    with pytest.raises(DataError, match=r"train, row 1: message 2 of the prompt has a weight of its own, but the chat"):
        prepared(ViewBuilder(tokenizer), row)


def test_weights_are_kept_out_of_the_prompts_that_models_see(chat_tokenizer):
    row = {"messages": [{**USER, "weight": 0}, answer(weight=0.5)]}
    prompt, ids, _ = ViewBuilder(chat_tokenizer).teacher_prompt(row)
    assert prompt == [USER]
    assert ids == ViewBuilder(chat_tokenizer).teacher_prompt({"messages": [USER, answer()]})[1]

"""ViewBuilder: the two views of a row pair up, whatever the prompts, the completion and the windows."""

import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.prompts.truncation import Truncation
from trl_distill_plugins.prompts.views import ViewBuilder

TEXTS = st.text(max_size=30)
WINDOWS = st.none() | st.integers(2, 40)
TEMPLATES = st.sampled_from(
    [
        None,
        "{input}",
        "You are an expert.\n{input}\nAnswer: ",
        [{"role": "system", "content": "You are an expert."}],
        [{"role": "user", "content": "What is {input}?"}],
    ]
)


def trained(ids, labels):
    return [token for token, label in zip(ids, labels, strict=True) if label != -100]


def check_view(ids, labels, prompt, window):
    """A prompt that is the tail of `prompt`, then labels that repeat the ids; at most `window` tokens."""
    start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
    assert start >= 1
    assert labels[start:] == ids[start:]
    assert ids[:start] == prompt[len(prompt) - start :]
    assert window is None or len(ids) <= window


@settings(deadline=None, max_examples=200)
@given(TEMPLATES, TEMPLATES, TEXTS, st.text(min_size=1, max_size=30), WINDOWS, WINDOWS, st.booleans())
def test_both_views_train_the_same_tokens_in_the_same_order(
    chat_tokenizer, student, teacher, prompt, completion, window, teacher_window, cut_off
):
    builder = ViewBuilder(
        chat_tokenizer,
        student_template=PromptTemplate.parse(student),
        teacher_template=PromptTemplate.parse(teacher),
        max_length=window,
        max_teacher_length=teacher_window,
    )
    row = {"prompt": prompt, "completion": completion, "completion_truncated": cut_off}
    view = builder(row)
    assert set(view) == {*builder.columns, "truncation"}
    ids = trained(view["input_ids"], view["labels"])
    assert ids
    check_view(view["input_ids"], view["labels"], builder.student_prompt_ids(row), window)
    if student != teacher:
        assert trained(view["teacher_input_ids"], view["teacher_labels"]) == ids
        check_view(view["teacher_input_ids"], view["teacher_labels"], builder.teacher_prompt(row)[1], teacher_window)
    if not view["truncation"] & Truncation.COMPLETION:
        text = chat_tokenizer.decode(ids)
        is_chat = isinstance(student, list)
        assert text == completion + ("" if cut_off else "<|im_end|>\n" if is_chat else "<|im_end|>")


def test_equal_templates_give_one_view_that_fits_both_windows(plain_tokenizer):
    template = PromptTemplate.parse("{input}", "a"), PromptTemplate.parse("{input}", "b")
    builder = ViewBuilder(
        plain_tokenizer,
        student_template=template[0],
        teacher_template=template[1],
        max_length=50,
        max_teacher_length=8,
    )
    view = builder({"input": "a" * 60, "completion": "xyz" * 20})
    assert set(view) == {"input_ids", "labels", "truncation"}
    assert len(view["input_ids"]) == 8
    assert view["truncation"] == Truncation.STUDENT_PROMPT | Truncation.COMPLETION


def test_the_completion_is_written_as_the_student_needs_it(chat_tokenizer):
    chat, text = PromptTemplate.parse([{"role": "user", "content": "{input}"}]), PromptTemplate.parse("Q: {input}")

    def end(student, teacher):
        row = {"input": "12?", "messages": None, "completion": "42"}
        view = ViewBuilder(chat_tokenizer, student_template=student, teacher_template=teacher)(row)
        ids = trained(view["teacher_input_ids"], view["teacher_labels"])
        assert ids == trained(view["input_ids"], view["labels"])
        return chat_tokenizer.decode(ids)

    assert end(text, chat) == "42<|im_end|>"
    assert end(chat, text) == "42<|im_end|>\n"


def test_a_row_of_messages_under_text_templates(plain_tokenizer):
    builder = ViewBuilder(
        plain_tokenizer,
        student_template=PromptTemplate.parse("{input}"),
        teacher_template=PromptTemplate.parse("You are an expert. {input}"),
    )
    row = {"messages": [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "42"}]}
    view = builder(row)
    assert plain_tokenizer.decode(view["input_ids"]) == "12?42<eos>"
    assert plain_tokenizer.decode(view["teacher_input_ids"]) == "You are an expert. 12?42<eos>"


def test_rows_without_a_completion(plain_tokenizer):
    template = PromptTemplate.parse("You are an expert. {input}")
    builder = ViewBuilder(plain_tokenizer, teacher_template=template, completion_required=False, max_length=4)
    row = {"input": "What is the capital of France?", "completion": None}
    view = builder(row)
    assert set(view["labels"] + view["teacher_labels"]) == {-100}
    assert view["input_ids"] == builder.student_prompt_ids(row)[-4:]
    assert view["teacher_input_ids"] == builder.teacher_prompt(row)[1]
    assert not builder.has_completion(row)
    assert builder.has_completion({"input": "a", "completion": "b"})
    strict = ViewBuilder(plain_tokenizer, teacher_template=template)
    with pytest.raises(DataError, match=r"train, row 5: there is no completion; fill in column 'completion'"):
        strict(row, 4, "train")


def test_the_input_column(plain_tokenizer):
    builder = ViewBuilder(plain_tokenizer, teacher_template=PromptTemplate.parse("Q: {input}"), input_column="question")
    view = builder({"question": "12?", "completion": "42"})
    assert plain_tokenizer.decode(view["input_ids"]) == "12?42<eos>"
    assert plain_tokenizer.decode(view["teacher_input_ids"]) == "Q: 12?42<eos>"


@pytest.mark.parametrize("option", ["max_length", "max_teacher_length"])
def test_a_window_without_room_is_refused(plain_tokenizer, option):
    with pytest.raises(ConfigError, match=re.escape(f"{option} must be 2 or more")):
        ViewBuilder(plain_tokenizer, **{option: 1})


def test_a_builder_can_be_pickled(chat_tokenizer):
    builder = ViewBuilder(chat_tokenizer, teacher_template=PromptTemplate.parse("Q: {input}"), max_length=9)
    row = {"prompt": "12?", "completion": "42"}
    assert pickle.loads(pickle.dumps(builder))(row) == builder(row)

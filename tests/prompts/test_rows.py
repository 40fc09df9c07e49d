"""SourceRow: one view of every row format."""

import re

import pytest

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.rows import SourceRow

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def source(input_column=None, **columns):
    return SourceRow(columns, "data.jsonl, row 7", input_column)


@pytest.mark.parametrize(
    ("columns", "prompt", "completion", "text"),
    [
        ({"prompt": "p", "completion": "c"}, "p", "c", "p"),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER], [ANSWER], "Hi"),
        ({"messages": [USER, ANSWER]}, [USER], [ANSWER], "Hi"),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None, "Hi"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            [USER],
            [ANSWER],
            "Hi",
        ),
        ({"messages": [{**USER, "tool_calls": None}], "completion": None}, [USER], None, "Hi"),
        ({"messages": [USER, ANSWER], "completion": "c"}, [USER], "c", "Hi"),
        ({"prompt": [USER, ANSWER], "messages": [USER, ANSWER]}, [USER, ANSWER], None, "Hi"),
        ({"prompt": "p", "messages": None}, "p", None, "p"),
        ({"input": "i"}, "i", None, "i"),
        ({"input": "i", "prompt": "p"}, "p", None, "i"),
        ({"input": None, "prompt": "p"}, "p", None, "p"),
        ({"input": 12, "completion": "c"}, "12", "c", "12"),
        ({"prompt": "", "completion": "c"}, "", "c", ""),
    ],
)
def test_every_format_has_a_prompt_a_completion_and_an_input(columns, prompt, completion, text):
    row = source(**columns)
    assert row.own_prompt() == prompt
    assert row.completion() == completion
    assert row.input_text("t") == text


def test_an_input_column_wins():
    row = source("question", question="q", prompt="p", input="i")
    assert row.own_prompt() == row.input_text("t") == "q"


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"prompt": "p", "completion": ""}, "completion"),
        ({"prompt": [USER], "completion": []}, "completion"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}, "completion"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages"),
    ],
)
def test_an_empty_completion_names_file_row_column_and_remedy(columns, column):
    message = f"data.jsonl, row 7: the completion in column '{column}' is empty; remove the row or"
    with pytest.raises(DataError, match=re.escape(message)):
        source(**columns).completion()


def test_a_tool_call_is_a_completion():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert source(messages=[USER, call]).completion() == [call]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (source(), "data.jsonl, row 7: this row has no prompt; add 'input'. Columns: none"),
        (source(question="q", completion="c"), "for example --input_column question. Columns: question, completion"),
        (source("qustion", question="q"), "there is no column 'qustion'; did you mean 'question'? Columns: question"),
        (source("question", question=None), "column 'question' is null; fill it in or remove the row"),
        (source(prompt=3), "column 'prompt' must be text or a non-empty list of messages"),
        (source(prompt=["Hi"]), "message 1 of column 'prompt' is not an object with role and content"),
        (source(messages=[USER, {"content": "x"}]), "message 2 of column 'messages' has no role"),
    ],
)
def test_a_row_without_a_usable_prompt_says_why(row, message):
    with pytest.raises(DataError, match=re.escape(message)):
        row.own_prompt()


def test_other_faults():
    with pytest.raises(DataError, match="column 'completion' must be text or messages, got 3"):
        source(prompt="p", completion=3).completion()
    with pytest.raises(DataError, match="the last user message is not plain text"):
        source(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]).input_text("t")

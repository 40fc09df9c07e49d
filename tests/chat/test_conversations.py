"""Messages and conversations: what they refuse, and that dictionaries lose nothing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_distill_plugins.chat import Conversation, Message
from trl_distill_plugins.errors import DataError

scalars = st.booleans() | st.integers() | st.text(max_size=5)
extras = st.dictionaries(st.sampled_from(["name", "id", "reasoning_content"]), scalars, max_size=2)
metadata = st.dictionaries(st.text(max_size=3), scalars, max_size=2)
weights = st.none() | st.floats(0, 10)
messages = st.builds(
    Message, st.text(min_size=1, max_size=9), st.text(), weights, metadata, st.none() | st.just([{"id": 1}]), extras
)
rows = st.builds(Conversation, st.lists(messages, min_size=1, max_size=4), st.none() | st.just([{}]), metadata, extras)


@given(conversation=rows)
def test_dictionaries_lose_nothing(conversation):
    row = conversation.to_dict()
    assert Conversation.from_dict(row) == conversation
    assert Conversation.from_dict(json.loads(json.dumps(row))) == conversation
    assert Conversation.from_dict(row).to_dict() == row


def test_a_row_of_a_dataset_becomes_a_conversation_without_its_nulls():
    row = {
        "messages": [
            {"role": "user", "content": "Hi", "weight": None, "tool_calls": None, "name": "Ann"},
            {"role": "assistant", "content": None, "weight": 0.5, "tool_calls": [{"function": {"name": "f"}}]},
        ],
        "tools": None,
        "source": "web",
    }
    conversation = Conversation.from_dict(row)
    assert conversation.messages[0] == Message("user", "Hi", extra={"name": "Ann"})
    assert conversation.messages[1].tool_calls == [{"function": {"name": "f"}}]
    assert (conversation.tools, conversation.extra) == (None, {"source": "web"})


@pytest.mark.parametrize("weight", [-1, -1e-9, float("nan"), float("inf"), "1", True])
def test_a_bad_weight_names_the_message(weight):
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\): weight must be a finite number that is not negative"
    ):
        Conversation([Message("user", "Hi"), Message("assistant", "Yo", weight=weight)])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "a conversation needs at least one message"),
        ({"text": "x"}, "a conversation needs a list 'messages'; it has text"),
        ({"messages": ["Hi"]}, "message 1 is not an object with role and content, but 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(user\) has no content"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"message 1 \(user\): content must be text, got list"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row, problem):
    with pytest.raises(DataError, match=problem):
        Conversation.from_dict(row)


def test_weights_default_to_the_role():
    assert [Message(role, "").loss_weight for role in ("system", "user", "assistant", "tool")] == [0, 0, 1, 0]
    assert Message("assistant", "", weight=0).loss_weight == 0

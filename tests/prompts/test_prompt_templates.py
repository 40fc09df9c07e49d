"""PromptTemplate: what is a field, what is text, and what an error says."""

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.rows import SourceRow
from trl_distill_plugins.prompts.templates import PromptTemplate

NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=5).filter(str.isidentifier)
TEXTS = st.text(max_size=20)
SYSTEM = {"role": "system", "content": "Be brief."}


def source(**columns):
    return SourceRow(columns, "train, row 3")


def escape(text):
    return text.replace("{", "{{").replace("}", "}}")


@given(st.lists(st.tuples(TEXTS, NAMES.filter(lambda name: name != "input")), min_size=1), TEXTS, st.data())
def test_fields_are_filled_and_everything_else_is_literal(parts, tail, data):
    values = {name: data.draw(TEXTS) for _, name in parts}
    text = "".join(escape(literal) + "{" + name + "}" for literal, name in parts) + escape(tail)
    template = PromptTemplate.parse("." + text)
    assert template.fields == tuple(values)
    assert template.render(source(**values)) == "." + "".join(t + values[n] for t, n in parts) + tail


def test_a_value_with_braces_is_inserted_as_it_is():
    template = PromptTemplate.parse("{a}|{input}")
    assert template.render(source(a="{input} {{", input="}{0}")) == "{input} {{|}{0}"


def test_numbers_become_text():
    assert PromptTemplate.parse("{n} {input}").render(source(n=3, input="x")) == "3 x"


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("ab {0}", 4, "'{0}' is not a field"),
        ("{a.b}", 1, "'{a.b}' is not a field"),
        ("{a!r}", 1, "'{a!r}' is not a field"),
        ("{a:>3}", 1, "'{a:>3}' is not a field"),
        ("x{}", 2, "'{}' is not a field"),
        ("{input} {", 9, "'{' has no partner"),
        ("{input}}", 8, "'}' has no partner"),
    ],
)
def test_anything_but_a_plain_name_is_refused_with_its_position(text, position, problem):
    with pytest.raises(ConfigError, match=re.escape(f"teacher_prompt_template, character {position}: {problem}")):
        PromptTemplate.parse(text, "teacher_prompt_template")


def test_a_text_without_a_field_is_refused():
    with pytest.raises(ConfigError, match=r"student_prompt_template has no field.*put \{input\} in it"):
        PromptTemplate.parse("Hello {{input}}", "student_prompt_template")


def test_no_template_stays_none():
    assert PromptTemplate.parse(None) is None


def test_messages_as_a_list_and_as_json_are_the_same_template():
    messages = [SYSTEM, {"role": "user", "content": "{input}"}]
    template = PromptTemplate.parse(messages, "a")
    assert template == PromptTemplate.parse(json.dumps(messages, indent=1), "b")
    assert hash(template) == hash(PromptTemplate.parse(json.dumps(messages), "b"))
    assert template.is_chat
    assert template.render(source(input="Hi")) == [SYSTEM, {"role": "user", "content": "Hi"}]


def test_equality_is_of_what_is_rendered():
    assert PromptTemplate.parse("{{{input}", "a") == PromptTemplate.parse("{{{input}", "b")
    assert PromptTemplate.parse("{input}") != PromptTemplate.parse([{"role": "user", "content": "{input}"}])


def test_text_that_begins_with_a_bracket_is_text():
    assert PromptTemplate.parse("[INST] {input} [/INST]").render(source(input="Hi")) == "[INST] Hi [/INST]"
    assert PromptTemplate.parse("[{input}]").render(source(input="Hi")) == "[Hi]"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('[{"role": "user", "content"', "not valid JSON: .*column"),
        ([], "non-empty list of messages"),
        ([{"role": "user"}], "t, message 1: a message is"),
        ([SYSTEM, "Hi"], "t, message 2: a message is"),
        ([{"role": "", "content": "x"}], "role and content must be text"),
        ([{"role": "user", "content": None}], "role and content must be text"),
        ([SYSTEM, {"role": "user", "content": "a {b"}], "t, message 2, character 3: '{' has no partner"),
    ],
)
def test_faulty_messages_are_refused_with_their_place(value, problem):
    with pytest.raises(ConfigError, match=problem):
        PromptTemplate.parse(value, "t")


OWN = [{"role": "system", "content": "Old."}, {"role": "user", "content": "Hi"}]


def test_messages_without_input_go_before_the_rows_own_conversation():
    shot = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    assert PromptTemplate.parse(shot).render(source(prompt=OWN)) == shot + OWN
    assert PromptTemplate.parse([SYSTEM]).render(source(prompt=OWN)) == [SYSTEM, OWN[1]]
    assert PromptTemplate.parse([SYSTEM]).render(source(prompt="Hi")) == [SYSTEM, OWN[1]]
    answered = [*OWN, {"role": "assistant", "content": "Hello"}]
    assert PromptTemplate.parse([SYSTEM]).render(source(messages=answered)) == [SYSTEM, OWN[1]]


def test_rendering_leaves_the_row_alone():
    own = [dict(message) for message in OWN]
    PromptTemplate.parse([SYSTEM]).render(source(prompt=own))
    assert own == OWN


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"context": "c", "input": "i"},
            "train, row 3: teacher uses {contxt}, which no column fills; did you mean 'context'? "
            "Columns: context, input",
        ),
        (
            {"contxt": None, "input": "i"},
            "train, row 3: teacher uses {contxt}, but column 'contxt' is null; fill it in",
        ),
        ({"contxt": ["a"], "input": "i"}, "teacher uses {contxt}, but column 'contxt' holds a list, not text"),
        (
            {"contxt": "c", "question": "q"},
            "train, row 3: teacher uses {input}, but this row has none; name the column that holds it, for example "
            "--input_column contxt. Columns: contxt, question",
        ),
    ],
)
def test_a_field_that_nothing_fills_names_template_field_and_columns(columns, message):
    with pytest.raises(DataError, match=re.escape(message)):
        PromptTemplate.parse("{contxt} {input}", "teacher").render(source(**columns))

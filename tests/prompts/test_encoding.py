"""Encoder: special tokens, end tokens, chat templates."""

import re

import pytest

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.rows import SourceRow

USER = [{"role": "user", "content": "12 plus 30?"}]
ROW = SourceRow({}, "train, row 3")
CUT_ROW = SourceRow({"completion_truncated": True}, "train, row 3")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_is_tokenised_apart_and_ends_with_eos_once(plain_tokenizer):
    encoder = Encoder(plain_tokenizer)
    prompt, completion = encoder.encode("Answer: 12 plus", " 30", ROW)
    assert prompt == ids_of(plain_tokenizer, "Answer: 12 plus")
    assert completion == [*ids_of(plain_tokenizer, " 30"), plain_tokenizer.eos_token_id]
    assert encoder.encode("Answer: 12 plus", " 30<eos>", ROW)[1] == completion
    assert encoder.encode("Answer: 12 plus", " 30", CUT_ROW)[1] == completion[:-1]


def test_bos_stands_once_before_a_prompt_and_never_before_a_completion(bos_tokenizer):
    encoder = Encoder(bos_tokenizer)
    prompt, completion = encoder.encode("What", "Paris", ROW)
    assert prompt == bos_tokenizer("What")["input_ids"]
    assert prompt == encoder.generation_ids("<bos>What", ROW)
    assert bos_tokenizer.bos_token_id not in completion
    assert encoder.generation_ids("", ROW) == [bos_tokenizer.bos_token_id]


def test_an_end_token_of_the_tokenizer_does_not_close_the_prompt(tokenizer_of):
    tokenizer = tokenizer_of(bos=True, end=True)
    prompt, completion = Encoder(tokenizer).encode("What", "Paris", ROW)
    assert prompt == tokenizer("What")["input_ids"][:-1]
    assert completion[-1] == tokenizer.eos_token_id
    assert completion.count(tokenizer.eos_token_id) == 1


def test_an_empty_prompt_becomes_eos_where_there_is_no_bos(plain_tokenizer):
    assert Encoder(plain_tokenizer).generation_ids("", ROW) == [plain_tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["Paris", " Paris", "\nParis", "\n\n42 ", "€"])
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_a_completion(tokenizer_of, text):
    tokenizer = tokenizer_of(space=True)
    assert tokenizer.decode(ids_of(tokenizer, "Paris")) == " Paris"
    assert tokenizer.decode(Encoder(tokenizer).encode("What", text, CUT_ROW)[1]) == text


def test_a_chat_prompt_and_its_completion_are_the_rendered_conversation(chat_tokenizer):
    prompt, completion = Encoder(chat_tokenizer).encode(USER, "It is 42.", ROW)
    both = chat_tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "It is 42."}], return_dict=False)
    assert prompt == chat_tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert prompt + completion == both
    assert Encoder(chat_tokenizer).encode(USER, [{"role": "assistant", "content": "It is 42."}], ROW)[1] == completion


@pytest.mark.parametrize("text", ["It is 42.", "It", "<|im_start|>"])
def test_a_completion_that_was_cut_off_has_no_end_of_turn(chat_tokenizer, text):
    assert Encoder(chat_tokenizer).encode(USER, text, CUT_ROW)[1] == ids_of(chat_tokenizer, text)


def test_where_the_generation_prompt_is_no_prefix_the_prompt_ends_where_they_part(tokenizer_of, thinking_template):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = thinking_template
    encoder = Encoder(tokenizer)
    prompt, completion = encoder.encode(USER, "It is 42.", ROW)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == "It is 42.<|im_end|>\n"
    assert tokenizer.decode(encoder.generation_ids(USER, ROW)).endswith("assistant\n<think>")
    assert tokenizer.decode(encoder.encode(USER, "It is 42.", CUT_ROW)[1]) == "It is 42."


def test_tools_and_arguments_of_the_chat_template_come_from_the_row(tokenizer_of):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = "{{ tools[0].name }} {{ style }} {% if other is defined %}x{% endif %}"
    columns = {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"style": "terse", "other": None}}
    ids = Encoder(tokenizer).generation_ids(USER, SourceRow(columns, "here"))
    assert tokenizer.decode(ids) == "add terse "
    with pytest.raises(DataError, match="here: column 'tools' is not valid JSON"):
        Encoder(tokenizer).generation_ids(USER, SourceRow({"tools": "["}, "here"))


def with_template(tokenizer_of, template):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = template
    return tokenizer


def test_what_cannot_be_encoded_says_why(tokenizer_of, plain_tokenizer, chat_tokenizer):
    def fails(tokenizer, prompt, completion, error, message, row=ROW):
        with pytest.raises(error, match=re.escape(message)):
            Encoder(tokenizer).encode(prompt, completion, row)

    fails(plain_tokenizer, USER, "x", ConfigError, "the tokenizer has no chat template; set tokenizer.chat_template")
    fails(chat_tokenizer, [], "x", DataError, "train, row 3: there is no message before the completion")
    turns = [{"role": "assistant", "content": "a"}] * 2
    fails(chat_tokenizer, "p", turns, DataError, "a completion of several messages or with tool calls needs a chat")
    raising = with_template(tokenizer_of, "{{ raise_exception('no system role') }}")
    fails(raising, USER, "x", DataError, "row 3: the chat template cannot render this conversation: no system role")
    counting = with_template(tokenizer_of, "{{ messages | length }}")
    fails(counting, USER, "x", DataError, "the chat template renders the prompt differently when a completion follows")
    upper = with_template(tokenizer_of, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    fails(upper, USER, "x", DataError, "where it was cut off cannot be found", CUT_ROW)
    silent = with_template(tokenizer_of, "same")
    fails(silent, USER, "x", DataError, "row 3: the tokenizer makes no token of the completion")


def test_a_tokenizer_without_eos_is_refused(tokenizer_of):
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token"):
        Encoder(tokenizer)

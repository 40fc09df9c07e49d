"""Bytes of tokens, and where two tokenizations of one text align, against a plain search over all pairs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.prompts.alignment import END, TokenAlignment, align, shared_classes
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.rows import SourceRow
from trl_distill_plugins.prompts.token_bytes import token_bytes

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the quick fox 是é\n ")), max_size=30
)
KINDS = ("tiny", "wide", "piece")


@pytest.fixture(scope="session")
def encoders(tiny_tokenizer, wide_tokenizer, piece_tokenizer):
    return dict(zip(KINDS, map(Encoder, (tiny_tokenizer, wide_tokenizer, piece_tokenizer)), strict=True))


def pieces(encoder, text):
    table = token_bytes(encoder.tokenizer)
    return [table[token] for token in encoder.continuation_ids(text)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind, text, encoders):
    assert b"".join(pieces(encoders[kind], text)) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes_and_added_ones_their_text(kind, encoders):
    tokenizer = encoders[kind].tokenizer
    table = token_bytes(tokenizer)
    assert [table[index] for index in tokenizer.all_special_ids] == [None] * len(tokenizer.all_special_ids)
    assert sum(piece is None for piece in table) == len(tokenizer.all_special_ids)


def test_an_added_token_stands_for_its_text(tokenizer_of):
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["  é"])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("  é")] == "  é".encode()


def searched(student, teacher):
    """Pairs of positions with equal bytes before them and an equal byte to come, by comparing every pair."""
    at = [
        [(b"".join(tokens[:index]), tokens[index][:1]) for index in range(len(tokens))] for tokens in (student, teacher)
    ]
    return [at[1].index(place) if place in at[1] else -1 for place in at[0]]


@pytest.mark.parametrize(("own", "theirs"), [(a, b) for a in KINDS for b in KINDS])
@settings(max_examples=40, deadline=None)
@given(text=TEXT.filter(bool))
def test_the_positions_of_one_text_that_align(own, theirs, text, encoders):
    student, teacher = pieces(encoders[own], text), pieces(encoders[theirs], text)
    found = align(student, teacher)
    assert found == searched(student, teacher)
    assert found[0] == 0
    back = align(teacher, student)
    assert [(i, j) for i, j in enumerate(found) if j >= 0] == [(i, j) for j, i in enumerate(back) if i >= 0]
    if own == theirs:
        assert found == list(range(len(student)))


@settings(max_examples=200, deadline=None)
@given(
    student=st.lists(st.sampled_from([b"a", b"ab", b"b", b"ba", b"aab"]), min_size=1, max_size=8),
    teacher=st.lists(st.sampled_from([b"a", b"ab", b"b", b"ba", b"aab"]), min_size=1, max_size=8),
)
def test_texts_that_differ_align_up_to_the_difference(student, teacher):
    assert align(student, teacher) == searched(student, teacher)


def test_a_special_token_ends_the_text():
    assert align([b"ab", END, b"\n"], [b"a", b"b", END]) == [0, 2, -1]
    assert align([b"ab", b"c", END], [b"a", b"b", END, b"c"]) == [0, -1, -1]
    assert align([END], [END, b"a"]) == [0]
    assert align([b"ab", b"c"], [b"ab", END]) == [0, -1]
    assert align([b"ab", END], [b"ab", "special <call>"]) == [0, -1]


def test_what_only_one_chat_template_opens_with_is_left_alone():
    assert align([b"<think>", b"yes", END], [b"yes", END]) == [-1, -1, -1]
    assert align(["special <channel>", b"yes", END], [b"yes", END]) == [-1, -1, -1]


def test_white_space_that_only_one_template_opens_with_is_not_counted():
    assert align([b"yes", b" no", END], [b" yes", b" no", END]) == [-1, 1, 2]
    assert align([b"yes", b" no", END], [b"\n", b"yes", b" no", END]) == [1, 2, 3]
    assert align([b" ", b"yes", b" no"], [b" yes", b" no"]) == [0, -1, 1]


def test_what_a_chat_template_opens_an_answer_with_is_not_counted():
    thinking = (b"<think></think>\n", b" ")
    student = [b"<think>", b"</think>", b"\n", b"yes", b" no", END]
    assert align(student, [b" yes", b" ", b"no", END], thinking) == [-1, -1, -1, -1, 1, 3]
    assert align(student, student, (b"<think></think>\n", b"")) == [0, 1, 2, 3, 4, 5]
    assert align(student[:5], [b"yes", b" no", b" way"], thinking) == [-1, -1, -1, 0, 1]


def test_the_opening_of_a_template_is_found(tokenizer_of, wide_tokenizer):
    tokenizer = tokenizer_of()
    assert Encoder(tokenizer).opening == ""
    assert Encoder(wide_tokenizer).opening == ""
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{%- if m['role'] == 'assistant' %}{{ '<b>\n</b> ' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert Encoder(tokenizer).opening == "<b>\n</b> "
    assert Encoder(tokenizer).end_ids == tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    alignment = TokenAlignment(Encoder(tokenizer), Encoder(wide_tokenizer))
    row = SourceRow({}, "row 1")
    own, theirs = (
        Encoder(t).encode([{"role": "user", "content": "?"}], "yes no", row)[1] for t in (tokenizer, wide_tokenizer)
    )
    found = alignment.pairs(own, theirs)
    assert found[: len(own) - 1].count(-1) >= len(tokenizer("<b>\n</b>", add_special_tokens=False)["input_ids"])
    assert found[-1] == len(theirs) - 1
    assert 0 in found


def test_how_far_a_cut_completion_reaches(encoders):
    own, theirs = encoders["tiny"], encoders["wide"]
    text = "the lazy dog . what is the capital of france ?"
    student, teacher = own.continuation_ids(text), [*theirs.continuation_ids(text), theirs.eos_token_id]
    alignment = TokenAlignment(own, theirs)
    assert alignment.reach([*student, own.eos_token_id], teacher) == len(teacher)
    for length in range(1, len(student) + 1):
        reach = alignment.reach(student[:length], teacher)
        assert alignment.pairs(student[:length], teacher[:reach]) == alignment.pairs(student, teacher)[:length]
        ends = [len(own.tokenizer.decode(student[: length - 1])), len(theirs.tokenizer.decode(teacher[: reach - 1]))]
        assert ends[1] <= ends[0]


def test_shared_classes_are_tokens_of_the_same_bytes_and_the_ends(encoders):
    classes = shared_classes(encoders["piece"], encoders["wide"])
    piece, wide = encoders["piece"].tokenizer, encoders["wide"].tokenizer
    ends = ([piece.convert_tokens_to_ids("</s>")], wide.convert_tokens_to_ids(["<end>", "<turn>"]))
    assert ends in classes
    classes.remove(ends)
    assert (piece.convert_tokens_to_ids(["<0x71>", "q"]), [wide.convert_tokens_to_ids("q")]) in classes
    tables = token_bytes(piece), token_bytes(wide)
    meanings = [{tables[side][token] for token in ids} for pair in classes for side, ids in enumerate(pair)]
    assert all(len(meaning) == 1 for meaning in meanings)
    assert meanings[::2] == meanings[1::2]
    assert {next(iter(meaning)) for meaning in meanings} == set(tables[0]) & set(tables[1]) - {None}


def test_special_tokens_of_one_name_are_shared(tokenizer_of):
    tokenizers = tokenizer_of(), tokenizer_of(space=True)
    classes = shared_classes(*map(Encoder, tokenizers))
    for name in ("<eos>", "<pad>", "<bos>", "<|im_start|>"):
        assert tuple([tokenizer.convert_tokens_to_ids(name)] for tokenizer in tokenizers) in classes


def test_a_tokenizer_without_bytes_is_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="neither a byte-level BPE nor sentencepiece's"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", eos_token="[UNK]"))

"""Tokenizers of several kinds to install chat formats on, each test with its own copy."""

import copy
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is 2 + 2? It is 4.\n\nAnd 3 + 3?",
    "Response:\n\n- one\n- two :-)",
    "assistant\n\n    code] [x",
    "user: USER:",
]


def byte_tokenizer(use_regex: bool) -> "PreTrainedTokenizerFast":
    """A byte-level BPE with `<s>`, `</s>` and `<pad>`; without the regex its tokens go over words, lines and colons."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def _originals(piece_tokenizer: "PreTrainedTokenizerFast") -> "dict[str, PreTrainedTokenizerFast]":
    return {"bytes": byte_tokenizer(True), "merging": byte_tokenizer(False), "pieces": piece_tokenizer}


@pytest.fixture(scope="session")
def make_tokenizer(
    _originals: "dict[str, PreTrainedTokenizerFast]",
) -> "Callable[[str], PreTrainedTokenizerFast]":
    """A tokenizer of a kind (bytes, merging, pieces) that may be changed."""
    return lambda kind="bytes": copy.deepcopy(_originals[kind])


@pytest.fixture
def tokenizer(make_tokenizer: "Callable[[str], PreTrainedTokenizerFast]") -> "PreTrainedTokenizerFast":
    return make_tokenizer("bytes")

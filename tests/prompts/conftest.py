"""Tokenizers of several kinds, made here: plain, with BOS, with a chat template, with a space put before a text."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCES = ["What is the capital of France? It is Paris.", "You are an expert. Answer: 12 plus 30 is 42.\n\n"] * 3
SPECIALS = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>"]
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{%- endif", "assistant\n<think>' }}{%- endif")


def make_tokenizer(bos: bool = False, end: bool = False, space: bool = False) -> "PreTrainedTokenizerFast":
    """A BPE of about 330 tokens. `bos`, `end`: special tokens before and after a text; `space`: one before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos or end:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if end else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", SPECIALS.index("<bos>")), ("<eos>", SPECIALS.index("<eos>"))]
        )
    specials = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


@pytest.fixture(scope="session")
def plain_tokenizer() -> "PreTrainedTokenizerFast":
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> "PreTrainedTokenizerFast":
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer() -> "PreTrainedTokenizerFast":
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """`make_tokenizer`, for kinds that one test needs."""
    return make_tokenizer


@pytest.fixture(scope="session")
def thinking_template() -> str:
    """ChatML whose generation prompt opens a thinking block that a finished conversation does not show."""
    return THINKING

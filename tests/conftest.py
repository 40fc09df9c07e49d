"""Fixtures for the whole suite: a tokenizer and causal models made here, so that no test needs the network."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "the quick brown fox jumps over the lazy dog .",
    "what is the capital of france ? the capital is paris .",
    "translate the word to german : yes no good bad red blue .",
    "0 1 2 3 4 5 6 7 8 9 plus minus times equals",
]


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[None]":
    """Keep what `datasets` caches out of the home folder, in this process and in those it starts."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        if "datasets" in sys.modules:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of 384 tokens that encodes any text without loss. It has no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="session")
def permuted_tokenizer(tiny_tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """The tokens of `tiny_tokenizer` under other ids."""
    return _rebuilt(tiny_tokenizer, lambda index, size: (index * 7 + 5) % size)


@pytest.fixture(scope="session")
def wide_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of other merges than `tiny_tokenizer`, with a chat template whose turns end with `<turn>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # merges over words
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=["<end>", "<turn>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([part for text in SENTENCES for part in text.split(" . ")], trainer)
    wide = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    wide.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    wide.chat_template = (
        "{%- for m in messages %}{{ m['role'] + ': ' + m['content'] + '<turn>' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return wide


@pytest.fixture(scope="session")
def piece_tokenizer() -> "PreTrainedTokenizerFast":
    """Sentencepiece's ways: `▁` for a space, one before a text, and byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = spaces
    learnt.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(
        {token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _rebuilt(tokenizer: "PreTrainedTokenizerFast", place: "Callable[[int, int], int]") -> "PreTrainedTokenizerFast":
    """`tokenizer` with the token of id i at `place(i, number of tokens)`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["model"]["vocab"] = {token: place(index, len(vocab)) for token, index in vocab.items()}
    for added in state["added_tokens"]:
        added["id"] = place(added["id"], len(vocab))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokenizer.special_tokens_map
    )


@pytest.fixture(scope="session")
def tiny_causal_lm() -> "Callable[..., LlamaForCausalLM]":
    """A factory of small Llama models with random weights: `tiny_causal_lm(seed, hidden=64, layers=2, vocab=384)`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, hidden: int = 64, layers: int = 2, vocab: int = 384) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)

    return make


@pytest.fixture(scope="session")
def saved_models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: "PreTrainedTokenizerFast",
    tiny_causal_lm: "Callable[..., LlamaForCausalLM]",
) -> "dict[str, Path]":
    """Folders with a model and its tokenizer: `student`, and the wider `teacher` of the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("student", tiny_causal_lm(0, hidden=32)), ("teacher", tiny_causal_lm(1, hidden=48))):
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("student", "teacher")}

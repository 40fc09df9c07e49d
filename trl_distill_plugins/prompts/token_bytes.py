"""The bytes each token of a tokenizer stands for, from how its decoder spells them.

- Byte-level BPE (GPT-2, Llama 3, Qwen): a character of a token is a byte, in GPT-2's alphabet.
- Sentencepiece (Llama 2, Gemma, Mistral): `▁` is a space, and with byte fallback `<0x0A>` is the byte 10.
- An added token that is no special one stands for its own text.
- A special token (the end, a turn, padding) stands for no bytes.

Other decoders, WordPiece's for one, lose what was between two words, and are refused.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenBytes = tuple[bytes | None, ...]

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_METASPACE_PARTS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
# Bytes that stand for themselves in GPT-2's alphabet; the others take the characters from 256 on, in their order.
_VISIBLE = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + at): byte for at, byte in enumerate(_HIDDEN)}


@lru_cache(maxsize=8)
def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> TokenBytes:
    """The bytes of each token by its id; None for special tokens and ids without a token.

    Raises `ConfigError` for a tokenizer whose tokens have no bytes of their own.
    """
    read = _reader(_decoders(tokenizer))
    if read is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} is neither a byte-level BPE nor "
            "sentencepiece's, so the bytes of its tokens are not known, by which two tokenizers are aligned; use a "
            "teacher with the student's tokenizer, or train on the teacher's text alone (losses: [cross_entropy])"
        )
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        table[index] = read(token) or None
    for index, added in tokenizer.added_tokens_decoder.items():
        table[index] = None if added.special else added.content.encode()
    for index in tokenizer.all_special_ids:
        table[index] = None
    return tuple(table)


def _decoders(tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """The steps of the decoder as `tokenizer.json` spells them; none for a tokenizer without such a file."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _reader(decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
    kinds = {step["type"] for step in decoders}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return _read_byte_level
    marks = {_space_mark(step) for step in decoders if step["type"] in ("Replace", "Metaspace")}
    if len(marks) != 1 or None in marks or not kinds <= _METASPACE_PARTS:
        return None
    return partial(_read_metaspace, mark=str(marks.pop()), has_fallback="ByteFallback" in kinds)


def _space_mark(step: dict[str, Any]) -> str | None:
    """The character that a decoder turns into a space; None for one that does something else."""
    if step["type"] == "Metaspace":
        return str(step["replacement"])
    return step["pattern"].get("String") if step["content"] == " " else None


def _read_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # not in the alphabet: the decoder takes the token as it is
        return token.encode()


def _read_metaspace(token: str, mark: str, has_fallback: bool) -> bytes:
    byte = _FALLBACK.fullmatch(token) if has_fallback else None
    return bytes([int(byte[1], 16)]) if byte else token.replace(mark, " ").encode()

"""Rendered text to token ids, with the characters that each token is made of.

Where a text must be cut, because a token would reach over the beginning of an answer or a control token was typed by a
user, its parts are tokenised apart, each as the continuation of the one before.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", ":")
_PROBE = "a"

Span = tuple[int, int]


class Tokens:
    """Token ids of a text that was tokenised whole. Asking for the characters of single tokens is fast."""

    def __init__(self, encoding: Any) -> None:
        self.ids: list[int] = encoding.ids
        self._encoding = encoding

    @property
    def offsets(self) -> list[Span]:
        """(start, end) of the characters of each token."""
        return list(self._encoding.offsets)

    def range_of(self, span: Span) -> range:
        """The indices of the tokens that have characters of `span`."""
        find = self._encoding.char_to_token
        first = next((token for place in range(*span) if (token := find(place)) is not None), None)
        if first is None:
            return range(0)
        last = next(token for place in range(span[1] - 1, span[0] - 1, -1) if (token := find(place)) is not None)
        while last + 1 < len(self.ids) and self._encoding.token_to_chars(last + 1)[0] < span[1]:
            last += 1  # one of several tokens of the last character
        return range(first, last + 1)

    def reaches_over(self, position: int) -> bool:
        """Whether a token has characters on both sides of `position`."""
        token = self._encoding.char_to_token(position)
        return token is not None and self._encoding.token_to_chars(token)[0] < position


@dataclass(frozen=True)
class JoinedTokens:
    """The same of a text whose parts were tokenised apart; no token reaches over a place where it was cut."""

    ids: list[int]
    offsets: list[Span]

    def range_of(self, span: Span) -> range:
        """The indices of the tokens that have characters of `span`."""
        start, end = span
        return range(bisect_right(self.offsets, start, key=_end), bisect_left(self.offsets, end, key=_start))


def _start(offset: Span) -> int:
    return offset[0]


def _end(offset: Span) -> int:
    return offset[1]


class TextTokenizer:
    """Tokenises rendered text with a fast tokenizer, adding no special tokens.

    Changes one thing of the tokenizer: that its offsets leave out the spaces tokens begin with, as Llama 3's do. An
    answer that begins with a space would be masked as a whole by transformers. No token id depends on it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"chat formats need a fast tokenizer, which knows the characters of its tokens; "
                f"{type(tokenizer).__name__} is none"
            )
        self._tokenizer = tokenizer
        _count_spaces(tokenizer.backend_tokenizer)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches any special token."""
        added = self._tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special and not token.content.isspace()}
        tokens.update(token for token in self._tokenizer.all_special_tokens if token)
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise each text whole."""
        return [Tokens(encoding) for encoding in self._encodings(list(texts))]

    def tokenize_parts(self, text: str, cuts: Iterable[int]) -> JoinedTokens:
        """Tokenise the parts of `text` between `cuts` apart."""
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in pairwise(sorted({0, *cuts, len(text)})):
            part = self._continued(text[start:end]) if start else self._alone(text[:end])
            ids += part.ids
            offsets += [(start + first, start + last) for first, last in part.offsets]
        return JoinedTokens(ids, offsets)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of ids that follow others: some tokenizers drop the space at the beginning of a text."""
        before = self._tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        text = self._tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False)
        return str(text)[len(self._tokenizer.decode(before)) :]

    @cached_property
    def _adds_space(self) -> bool:
        joined, first, second = (encoding.ids for encoding in self._encodings(["\n" + _PROBE, "\n", _PROBE]))
        return bool(joined != first + second)

    def _continued(self, text: str) -> JoinedTokens:
        """Tokens of `text` without the space that some tokenizers put before a text."""
        for anchor in _ANCHORS if self._adds_space else ():
            before, both = self.tokenize([anchor, anchor + text])
            if both.ids[: len(before.ids)] == before.ids:  # else anchor and text have merged
                offsets = [(start - len(anchor), end - len(anchor)) for start, end in both.offsets[len(before.ids) :]]
                return JoinedTokens(both.ids[len(before.ids) :], offsets)
        return self._alone(text)

    def _alone(self, text: str) -> JoinedTokens:
        (tokens,) = self.tokenize([text])
        return JoinedTokens(tokens.ids, tokens.offsets)

    def _encodings(self, texts: list[str]) -> list[Any]:
        """By the Rust tokenizer itself: the lists that transformers makes of its result take as long as the rest."""
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return list(backend.encode_batch(texts, add_special_tokens=False))


def _count_spaces(backend: Any) -> None:
    """Make offsets include the spaces that tokens begin with."""
    processor = backend.post_processor
    if processor is None:
        return
    state = processor.__getstate__()  # JSON; that of the whole tokenizer holds its vocabulary, too
    changed = re.sub(rb'("trim_offsets"\s*:\s*)true', rb"\1false", state)
    if changed != state:
        processor.__setstate__(changed)
        backend.post_processor = processor

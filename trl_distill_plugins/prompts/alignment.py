"""Where two tokenizations of one completion begin a token at the same byte, and which tokens two vocabularies share.

Two positions align if the tokens they predict begin at the same byte of the completion, and all bytes before it are
equal. The first positions align, and no position behind a special token does: that is no text. White space with which
one of two chat templates opens an answer and the other does not is left out of the count.
"""

from collections.abc import Sequence

from trl_distill_plugins.prompts.encoding import Encoder, common_length
from trl_distill_plugins.prompts.token_bytes import TokenBytes, token_bytes

# The tokens of the student and those of the teacher that mean the same.
SharedClass = tuple[list[int], list[int]]


class TokenAlignment:
    """Aligns completions in tokens of the student with the same in tokens of the teacher.

    Raises `ConfigError` for a tokenizer whose tokens have no bytes of their own, see `token_bytes`.
    """

    def __init__(self, student: Encoder, teacher: Encoder) -> None:
        self._student, self._teacher = token_bytes(student.tokenizer), token_bytes(teacher.tokenizer)
        self._encoder = teacher

    def pairs(self, student: Sequence[int], teacher: Sequence[int]) -> list[int]:
        """For each token of the student's completion the index of the teacher's token that aligns, or -1."""
        return align(_spell(self._student, student), _spell(self._teacher, teacher))

    def teacher_ids(self, student: Sequence[int]) -> list[int]:
        """A completion the student wrote in the teacher's tokens; with an end where the student's has one."""
        tokens = _spell(self._student, student)
        ids = self._encoder.continuation_ids(_text(tokens).decode(errors="replace"))
        return [*ids, self._encoder.eos_token_id] if None in tokens else ids

    def reach(self, student: Sequence[int], teacher: Sequence[int]) -> int:
        """How many of the teacher's tokens, 1 or more, begin before the student's completion ends."""
        own, theirs = _from_one_origin(_spell(self._student, student), _spell(self._teacher, teacher))
        last = _starts(*own)[-1]
        return max(1, sum(start <= last for start in _starts(*theirs)))


def align(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> list[int]:
    """`TokenAlignment.pairs` of tokens given as their bytes, None being a special token."""
    own, theirs = _from_one_origin(student, teacher)
    common = common_length(_text(*own), _text(*theirs))
    at = {start: index for index, start in enumerate(_starts(*theirs)) if 0 <= start <= common}
    found = [at.get(start, -1) if start >= 0 else -1 for start in _starts(*own)]
    return found + [-1] * (len(student) - len(found))


def shared_classes(student: Encoder, teacher: Encoder) -> list[SharedClass]:
    """Tokens of the two vocabularies that mean the same: the same bytes, an end, or a special token of one name.

    Several tokens of one tokenizer may have the same bytes (`A` and `<0x41>`), and there may be several ends.
    """
    ends = (student.end_ids, teacher.end_ids)
    own, theirs = (_meanings(side, end) for side, end in zip((student, teacher), ends, strict=True))
    return [ends, *((ids, theirs[meaning]) for meaning, ids in own.items() if meaning in theirs)]


_Tokens = tuple[Sequence[bytes | None], int]


def _spell(table: TokenBytes, ids: Sequence[int]) -> list[bytes | None]:
    return [table[token] if token < len(table) else None for token in ids]


def _from_one_origin(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> tuple[_Tokens, _Tokens]:
    """Both with the byte at which their common text begins: 0, or behind white space in which they differ."""
    spaces = [text[: len(text) - len(text.lstrip())] for text in (_text(student), _text(teacher))]
    origins = (0, 0) if spaces[0] == spaces[1] else (len(spaces[0]), len(spaces[1]))
    return (student, origins[0]), (teacher, origins[1])


def _plain(tokens: Sequence[bytes | None]) -> list[bytes]:
    """The tokens before the first special one."""
    end = next((index for index, token in enumerate(tokens) if token is None), len(tokens))
    return [token for token in tokens[:end] if token is not None]


def _text(tokens: Sequence[bytes | None], origin: int = 0) -> bytes:
    return b"".join(_plain(tokens))[origin:]


def _starts(tokens: Sequence[bytes | None], origin: int) -> list[int]:
    """The byte at which each token begins, counted from `origin`, up to and with the first special token."""
    plain = _plain(tokens)
    starts, at = [], -origin
    for token in plain:
        starts.append(at)
        at += len(token)
    return starts if len(plain) == len(tokens) else [*starts, at]


def _meanings(encoder: Encoder, ends: list[int]) -> dict[bytes | str, list[int]]:
    """The ids of each meaning: bytes for text, a name for a special token that is no end."""
    names = {index: added.content for index, added in encoder.tokenizer.added_tokens_decoder.items() if added.special}
    meanings: dict[bytes | str, list[int]] = {}
    for index, piece in enumerate(token_bytes(encoder.tokenizer)):
        meaning = names.get(index) if piece is None else piece
        if meaning is not None and index not in ends:
            meanings.setdefault(meaning, []).append(index)
    return meanings

"""Where two tokenizations of one completion begin a token at the same byte, and which tokens two vocabularies share.

Two positions align if the tokens they predict begin at the same byte of the completion, all bytes before it are equal,
and so is the byte itself; or if both predict the end. So a position at which one side has text or a special token that
the other has not is left alone, and so is all behind it. What a chat template opens an answer with, and white space,
are left out of the count where the two texts have more in common without.
"""

from collections.abc import Sequence
from functools import lru_cache

from trl_distill_plugins.prompts.encoding import Encoder, common_length
from trl_distill_plugins.prompts.token_bytes import token_bytes

# What a token stands for: text, or the name of a special token. All ends have one name.
Meaning = bytes | str
# The tokens of the student and those of the teacher that mean the same.
SharedClass = tuple[list[int], list[int]]

END = "end"
_NO_TOKEN = ""


class TokenAlignment:
    """Aligns completions in tokens of the student with the same in tokens of the teacher.

    Raises `ConfigError` for a tokenizer whose tokens have no bytes of their own, see `token_bytes`.
    """

    def __init__(self, student: Encoder, teacher: Encoder) -> None:
        self._student, self._teacher = _meanings(student), _meanings(teacher)
        self._openings = student.opening.encode(), teacher.opening.encode()
        self._encoder = teacher

    def pairs(self, student: Sequence[int], teacher: Sequence[int]) -> list[int]:
        """For each token of the student's completion the index of the teacher's token that aligns, or -1."""
        return align(_spell(self._student, student), _spell(self._teacher, teacher), self._openings)

    def teacher_ids(self, student: Sequence[int]) -> list[int]:
        """A completion the student wrote in the teacher's tokens; with an end where the student's has one."""
        tokens = _spell(self._student, student)
        ids = self._encoder.continuation_ids(_text(tokens).decode(errors="replace"))
        return ids if _special(tokens) is None else [*ids, self._encoder.eos_token_id]

    def reach(self, student: Sequence[int], teacher: Sequence[int]) -> int:
        """How many of the teacher's tokens, 1 or more, begin before the student's completion ends."""
        own, theirs = _spell(self._student, student), _spell(self._teacher, teacher)
        origins, _ = _origins((_text(own), _text(theirs)), self._openings)
        last = _starts(own, origins[0])[-1]
        return max(1, sum(start <= last for start in _starts(theirs, origins[1])))


def align(
    student: Sequence[Meaning], teacher: Sequence[Meaning], openings: tuple[bytes, bytes] = (b"", b"")
) -> list[int]:
    """`TokenAlignment.pairs` of tokens given as what they stand for; `openings` are those of the two chat templates."""
    texts = _text(student), _text(teacher)
    origins, common = _origins(texts, openings)
    if texts[0][origins[0] :] == texts[1][origins[1] :] and _special(student) == _special(teacher):
        common += 1  # the special token behind the text
    at = {start: index for index, start in enumerate(_starts(teacher, origins[1])) if 0 <= start < common}
    found = [at.get(start, -1) for start in _starts(student, origins[0])]
    return found + [-1] * (len(student) - len(found))


def shared_classes(student: Encoder, teacher: Encoder) -> list[SharedClass]:
    """Tokens of the two vocabularies that mean the same: the same bytes, an end, or a special token of one name.

    Several tokens of one tokenizer may have the same bytes (`A` and `<0x41>`), and there may be several ends.
    """
    own, theirs = (_ids_of(_meanings(side)) for side in (student, teacher))
    return [(ids, theirs[meaning]) for meaning, ids in own.items() if meaning in theirs]


@lru_cache(maxsize=8)
def _meanings(encoder: Encoder) -> tuple[Meaning, ...]:
    """What each token stands for, by its id."""
    names = dict.fromkeys(encoder.end_ids, END)
    for index, added in encoder.tokenizer.added_tokens_decoder.items():
        names.setdefault(index, f"special {added.content}")
    table = token_bytes(encoder.tokenizer)
    return tuple(names.get(index, _NO_TOKEN) if piece is None else piece for index, piece in enumerate(table))


def _ids_of(meanings: Sequence[Meaning]) -> dict[Meaning, list[int]]:
    ids: dict[Meaning, list[int]] = {}
    for index, meaning in enumerate(meanings):
        if meaning != _NO_TOKEN:
            ids.setdefault(meaning, []).append(index)
    return ids


def _spell(meanings: Sequence[Meaning], ids: Sequence[int]) -> list[Meaning]:
    return [meanings[token] if token < len(meanings) else _NO_TOKEN for token in ids]


def _origins(texts: tuple[bytes, bytes], openings: tuple[bytes, bytes]) -> tuple[tuple[int, int], int]:
    """The bytes from which both texts are counted, and how many they have in common from there, as many as can be: 0,
    or behind white space, or behind the openings and white space."""
    best, most = (0, 0), _common_bytes(*texts)
    if most < min(map(len, texts)):
        behind = tuple(text.removeprefix(opening) for text, opening in zip(texts, openings, strict=True))
        for rests in (texts, behind):
            own, theirs = (rest.lstrip() for rest in rests)
            common = _common_bytes(own, theirs)
            if common > most:
                best, most = (len(texts[0]) - len(own), len(texts[1]) - len(theirs)), common
    return best, most


def _common_bytes(one: bytes, other: bytes) -> int:
    shorter = min(len(one), len(other))
    return shorter if one[:shorter] == other[:shorter] else common_length(one, other)


def _plain(tokens: Sequence[Meaning]) -> list[bytes]:
    """The tokens before the first special one."""
    plain: list[bytes] = []
    for token in tokens:
        if isinstance(token, str):
            break
        plain.append(token)
    return plain


def _special(tokens: Sequence[Meaning]) -> str | None:
    """The first special token."""
    return next((token for token in tokens if isinstance(token, str)), None)


def _text(tokens: Sequence[Meaning]) -> bytes:
    return b"".join(_plain(tokens))


def _starts(tokens: Sequence[Meaning], origin: int) -> list[int]:
    """The byte at which each token begins, counted from `origin`, up to and with the first special token."""
    plain = _plain(tokens)
    starts, at = [], -origin
    for token in plain:
        starts.append(at)
        at += len(token)
    return starts if len(plain) == len(tokens) else [*starts, at]

"""Tokens as servers write them, and their ids for the student's tokenizer."""

from functools import cached_property
from typing import Any

_ANCHOR = "a"
_PREFIX = "token_id:"


class TokenNames:
    """Finds the id of a token a server named by its id, by `token_id:123`, or by its text.

    Args:
        tokenizer: the student's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.count = len(tokenizer)

    def text_of(self, token: int) -> str:
        """The text of a token inside a longer text; U+FFFD where it is a part of a character."""
        return self._texts[token]

    def id_of(self, name: str) -> int | None:
        """The id, or None where no token, or more than one, is written so."""
        if name.startswith(_PREFIX) and name[len(_PREFIX) :].isdecimal():
            token = int(name[len(_PREFIX) :])
            return token if token < self.count else None
        return self._ids.get(name)

    @cached_property
    def _texts(self) -> list[str]:
        # Behind an anchor, because some tokenizers drop the space of the first token of a text.
        anchor = list(self._tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"])
        rows = [anchor, *([*anchor, token] for token in range(self.count))]
        start, *texts = self._tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return [text.removeprefix(start) for text in texts]

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        shared = {""}
        for token, text in enumerate(self._texts):
            if text in ids:
                shared.add(text)
            ids[text] = token
        return {text: token for text, token in ids.items() if text not in shared and "\ufffd" not in text}

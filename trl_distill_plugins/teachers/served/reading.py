"""Log-probabilities in the answers of servers, in the three shapes there are.

prompt_logprobs     vLLM: for each token of the prompt {id: {"logprob": ..., "decoded_token": ...}}
logprobs.tokens     the completions API: lists by position, `top_logprobs` being {token: log-prob}
logprobs.content    the chat API's shape, which llama.cpp gives for completions, too: tokens with text and often id
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trl_distill_plugins.teachers.served.tokens import TokenNames

Named = dict[int, float]


@dataclass
class Evidence:
    """Whether the server's tokens are the student's: of the tokens `seen`, how many `agree`."""

    seen: int = 0
    agree: int = 0

    def add(self, *, agrees: bool) -> None:
        """Count one more."""
        self.seen += 1
        self.agree += agrees


@dataclass
class Position:
    """What the server says of one position.

    Args:
        token: the id of the token that stands there, None where it is not known.
        named: log-probs by id, all that could be mapped.
    """

    token: int | None
    named: Named = field(default_factory=dict)


def prompt_positions(choice: dict[str, Any], names: TokenNames, evidence: Evidence) -> list[Position] | None:
    """Positions of the prompt's tokens, the first without log-probs; None where the answer has no `prompt_logprobs`."""
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list):
        return None
    return [
        Position(None, _named(((key, entry) for key, entry in (row or {}).items()), names, evidence)) for row in rows
    ]


def positions(choice: dict[str, Any], names: TokenNames, evidence: Evidence) -> list[Position] | None:
    """Positions of `choice["logprobs"]`: written tokens, behind those of the prompt if it was echoed. None where the
    answer has none."""
    said = choice.get("logprobs")
    if not isinstance(said, dict):
        return None
    if isinstance(said.get("content"), list):
        return [_from_content(entry, names, evidence) for entry in said["content"]]
    tokens, tops = said.get("tokens"), said.get("top_logprobs")
    if not isinstance(tokens, list) or not isinstance(tops, list) or len(tokens) != len(tops):
        return None
    return [
        Position(names.id_of(token), _named((top or {}).items(), names, evidence))
        for token, top in zip(tokens, tops, strict=True)
    ]


def _from_content(entry: dict[str, Any], names: TokenNames, evidence: Evidence) -> Position:
    pairs = [(str(each["id"]) if "id" in each else each["token"], each) for each in entry.get("top_logprobs") or ()]
    written = entry["id"] if "id" in entry else names.id_of(entry["token"])
    return Position(written, _named(pairs, names, evidence))


def _named(pairs: Iterable[tuple[str, Any]], names: TokenNames, evidence: Evidence) -> Named:
    """Log-probs by id; an entry is a number under the token's name, or an object under its id."""
    named: Named = {}
    for name, entry in pairs:
        if isinstance(entry, dict) and ("decoded_token" in entry or "id" in entry):
            token, log_prob = int(name), entry.get("logprob")
            text = entry.get("decoded_token", entry.get("token"))
            in_range = 0 <= token < names.count
            if isinstance(text, str) and text:
                evidence.add(agrees=in_range and names.text_of(token) == text)
        else:
            found, log_prob = names.id_of(name), entry.get("logprob") if isinstance(entry, dict) else entry
            token, in_range = (-1, False) if found is None else (found, True)
            if name and "\ufffd" not in name:
                evidence.add(agrees=in_range)
        if in_range and isinstance(log_prob, int | float) and math.isfinite(log_prob):
            named[token] = float(log_prob)
    return named

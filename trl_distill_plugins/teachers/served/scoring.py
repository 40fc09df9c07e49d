"""What a server says of a text that is there already: all at once, or by replaying it."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.served.client import Client
from trl_distill_plugins.teachers.served.reading import Evidence, Named, Position, positions
from trl_distill_plugins.teachers.served.tokens import TokenNames

logger = logging.getLogger(__name__)

Reader = Callable[[dict[str, Any], TokenNames, Evidence], list[Position] | None]
# Given token ids `[T]` and where the next token is trained, `[T - 1]`: log-probs by id at the trained positions.
Scorer = Callable[[Sequence[int], Sequence[bool]], list[Named]]

_ALMOST_NOTHING = -87.0


class WholePrompt:
    """Sends the text as a prompt, and reads the log-probs of the prompt's tokens.

    Args:
        client: asks.
        names: maps tokens.
        read: finds the prompt's positions in an answer.
        options: of the request, those that make the server give log-probs of a prompt.
    """

    def __init__(self, client: Client, names: TokenNames, read: Reader, options: dict[str, Any]) -> None:
        self._client, self._names, self._read, self._options = client, names, read, options

    def __call__(self, ids: Sequence[int], trained: Sequence[bool]) -> list[Named]:
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, **self._options}
        said = self._read(self._client.ask("/completions", body), self._names, Evidence()) or []
        others = any(position.token not in (None, own) for position, own in zip(said, ids, strict=False))
        if others or not len(ids) <= len(said) <= len(ids) + 1:
            raise TeacherError(
                f"{self._client.server} gave log-probs of {len(said)} tokens that are not the {len(ids)} of a text; it "
                "may cut prompts: allow longer ones there, or lower max_teacher_length"
            )
        return [said[index + 1].named for index, wanted in enumerate(trained) if wanted]


class Replay:
    """Has the server write on greedily from inside the text. What it says of a position holds for the text as long as
    all it wrote before is the text's own, so a text the teacher wrote itself costs one request, and any other one more
    for each token at which it parts from what the teacher would write.

    Args:
        client: asks.
        names: maps tokens.
        end: the id of the end token, which some servers leave out of what they wrote.
        options: of the request, those that make the server give log-probs.
    """

    def __init__(self, client: Client, names: TokenNames, end: int, options: dict[str, Any]) -> None:
        self._client, self._names, self._end, self._options = client, names, end, options
        self._warned = False

    def __call__(self, ids: Sequence[int], trained: Sequence[bool]) -> list[Named]:
        wanted = [index for index, is_trained in enumerate(trained) if is_trained]
        found: dict[int, Named] = {}
        limit = len(ids)
        for start in wanted:
            if start in found:
                continue
            said = self._written(ids[: start + 1], min(limit, wanted[-1] + 1 - start))
            valid = said[: _common_length(said, ids[start + 1 :]) + 1]
            found |= {start + offset: position.named for offset, position in enumerate(valid)}
            # Where the text is not what the teacher would write, little of what it writes is of use.
            limit = 2 * len(valid)
        return [found[index] for index in wanted]

    def _written(self, prompt: Sequence[int], count: int) -> list[Position]:
        body = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, **self._options}
        choice = self._client.ask("/completions", body)
        said = positions(choice, self._names, Evidence())
        if said:
            return said
        if choice.get("finish_reason") != "stop":
            raise TeacherError(
                f"{self._client.server} gave no log-probs of what it wrote; train on its text alone "
                "(losses: [cross_entropy] on its completions)"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s gives no log-probs of the end token; where it ends a text, that is taken as certain",
                self._client.server,
            )
        return [Position(self._end, {self._end: 0.0})]


def _common_length(said: Sequence[Position], ids: Sequence[int]) -> int:
    """How many tokens from the first on are known to be the text's own."""
    pairs = enumerate(zip(said, ids, strict=False))
    return next((i for i, (position, own) in pairs if position.token != own), min(len(said), len(ids)))


def as_signal(rows: Sequence[Named], top: int, vocabulary: int) -> SparseSignal:
    """The `top` likeliest tokens of each position; probabilities that rounding made sum to a bit more than 1 are
    scaled down."""
    chosen = [sorted(named.items(), key=lambda item: -item[1])[:top] or _nothing(vocabulary) for named in rows]
    width = max(map(len, chosen), default=1)
    ids = torch.tensor([[*(i for i, _ in row), *[0] * (width - len(row))] for row in chosen], dtype=torch.long)
    log_probs = torch.tensor([[*(p for _, p in row), *[-math.inf] * (width - len(row))] for row in chosen])
    ids, log_probs = ids.reshape(-1, width), log_probs.reshape(-1, width)
    return SparseSignal(ids, log_probs - log_probs.logsumexp(-1, keepdim=True).clamp(0.0, 0.05))


def _nothing(vocabulary: int) -> list[tuple[int, float]]:
    """A position of which no named token could be mapped: all mass is with the others. A position must name one."""
    return [(vocabulary - 1, _ALMOST_NOTHING)]

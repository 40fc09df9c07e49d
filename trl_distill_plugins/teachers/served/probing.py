"""Finds out, by asking, what log-probs a server gives of a text."""

import logging
from collections.abc import Sequence
from typing import Any

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.teachers.served.client import Client
from trl_distill_plugins.teachers.served.problems import RefusalError
from trl_distill_plugins.teachers.served.reading import Evidence, Position, positions, prompt_positions
from trl_distill_plugins.teachers.served.scoring import Replay, Scorer, WholePrompt
from trl_distill_plugins.teachers.served.tokens import TokenNames

logger = logging.getLogger(__name__)

_TEXT = "The first three letters of the alphabet are a, b and"
_USUAL_LIMITS = (20, 5)  # many servers refuse to name more tokens: vLLM and OpenAI, in this order


def find_scorer(client: Client, tokenizer: Any, top_logprobs: int) -> Scorer | None:
    """How the server scores texts: by `prompt_logprobs`, by echoed log-probs, by replay, or None if it gives none.

    Strict servers refuse options they do not know, and any server more tokens than it names, so it is asked for less
    and less.

    Raises:
        TeacherError: the server's tokens are not those of `tokenizer`, or it does not answer.
    """
    ids = list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    limits = [top_logprobs, *(limit for limit in _USUAL_LIMITS if limit < top_logprobs)]
    for options in ("prompt_logprobs", "echo"), ("echo",), ():
        for limit in limits:
            body = {"logprobs": limit} | {name: limit if name == "prompt_logprobs" else True for name in options}
            try:
                choice = client.ask("/completions", {"prompt": ids, "max_tokens": 1, "temperature": 0, **body})
            except RefusalError as refusal:
                if refusal.is_absence:
                    return None
                if refusal.status not in (400, 422):
                    raise
                continue
            scorer = _scorer(client, tokenizer, ids, choice, top_logprobs, body)
            if scorer is not None:
                return scorer
            break  # it answers, without log-probs
    return None


def _scorer(
    client: Client, tokenizer: Any, ids: list[int], choice: dict[str, Any], top_logprobs: int, body: dict[str, Any]
) -> Scorer | None:
    """What reads answers such as `choice`, which the server gave to the options in `body`."""
    names, evidence, limit = TokenNames(tokenizer), Evidence(), body["logprobs"]
    # A server that did not mind one unknown option minds no other. Ids are exact, texts of tokens sometimes not.
    lenient = {"return_tokens_as_token_ids": True} if "prompt_logprobs" in body else {}
    said = prompt_positions(choice, names, evidence)
    scorer: Scorer
    if said is not None:
        scorer = WholePrompt(client, names, prompt_positions, {"prompt_logprobs": limit})
        _compare(said, ids, evidence)
    else:
        said = positions(choice, names, evidence)
        if not said:
            return None
        if "echo" in body and len(said) >= len(ids):
            scorer = WholePrompt(client, names, positions, {"logprobs": limit, "echo": True, **lenient})
            _compare(said, ids, evidence)
        else:
            scorer = Replay(client, names, tokenizer.eos_token_id, {"logprobs": limit, **lenient})
    if 2 * evidence.agree < evidence.seen:
        raise TeacherError(
            f"{client.server} has another tokenizer than the student: {evidence.seen - evidence.agree} of "
            f"{evidence.seen} tokens it named differ, so its log-probs say nothing of the student's tokens. Train on "
            "its text alone (losses: [cross_entropy] on its completions)"
        )
    named = max(len(position.named) for position in said)
    if not named:
        return None
    if named < top_logprobs:
        logger.warning("%s names %d tokens of each position, %d were asked for", client.server, named, top_logprobs)
    return scorer


def _compare(said: Sequence[Position], ids: Sequence[int], evidence: Evidence) -> None:
    """Whether the prompt's positions are those of the ids that were sent."""
    if not len(ids) <= len(said) <= len(ids) + 1:
        evidence.seen += 2 * len(ids)
    for position, own in zip(said, ids, strict=False):
        if position.token is not None:
            evidence.add(agrees=position.token == own)

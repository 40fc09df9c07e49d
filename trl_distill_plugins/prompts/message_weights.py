"""Which tokens of a conversation belong to which of its messages, and so what they weigh.

Of a prompt's message the tokens of its content and of its end of turn count; of an assistant's, all behind the
generation prompt. A completion belongs to its messages from end to end, the headers within it included. A token belongs
to the message in which its last character stands.
"""

from collections.abc import Sequence

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.rows import Completion, Message, Prompt, SourceRow

# Begin and end of the characters, and what they weigh.
Span = tuple[int, int, float]

_PROBE = "xyzzy"


def token_weights(
    encoder: Encoder,
    prompt: Prompt,
    completion: Completion,
    weights: tuple[list[float], list[float]],
    row: SourceRow,
) -> tuple[list[float], list[float]]:
    """What the tokens that `encoder.encode` makes of prompt and completion weigh.

    Args:
        encoder: made the tokens.
        prompt: as the encoder was given it.
        completion: likewise.
        weights: of each message of the two; none for text, whose completion weighs 1.
        row: where they come from, for errors.
    """
    prompt_ids, ids = encoder.encode(prompt, completion, row)
    of_prompt, of_completion = weights[0], weights[1] or [1.0]
    found = [0.0] * len(prompt_ids), [of_completion[0]] * len(ids)
    if isinstance(prompt, str):
        return found
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    text = encoder.render(prompt + answer, row, add_generation_prompt=False)
    ends = _token_ends(encoder, text, prompt, row)
    if any(of_prompt):
        spans = _prompt_spans(encoder, text, prompt, answer, of_prompt, row)
        found = _spread(spans, ends[: len(prompt_ids)]), found[1]
    if len(set(of_completion)) > 1:
        spans = _completion_spans(encoder, text, prompt, answer, of_completion, row)
        found = found[0], _spread(spans, ends[-len(ids) :])
    if (len(found[0]), len(found[1])) != (len(prompt_ids), len(ids)):
        raise DataError(f"{row.where}: the tokens of single messages cannot be found; weigh the whole row instead")
    return found


def _token_ends(encoder: Encoder, text: str, prompt: list[Message], row: SourceRow) -> list[int]:
    """Where the tokens of a conversation end, cut between prompt and completion as the encoder does."""
    opened = encoder.render(prompt, row, add_generation_prompt=True)
    if not text.startswith(opened):
        return encoder.token_ends(text)
    answer = encoder.continuation_ends(text[len(opened) :])
    return encoder.token_ends(opened) + [len(opened) + end for end in answer]


def _prompt_spans(
    encoder: Encoder, text: str, prompt: list[Message], answer: list[Message], weights: list[float], row: SourceRow
) -> list[Span]:
    spans = []
    for number, (message, weight) in enumerate(zip(prompt, weights, strict=True), start=1):
        if weight == 0:
            continue
        probed = [*prompt[: number - 1], {**message, "content": _PROBE}, *prompt[number:], *answer]
        header = encoder.render(probed, row, add_generation_prompt=False).partition(_PROBE)[0]
        if message["role"] == "assistant" and number > 1:
            opened = encoder.render(prompt[: number - 1], row, add_generation_prompt=True)
            header = opened if header.startswith(opened) else header
        end = _end_of_turn(encoder, text, prompt[:number], row)
        if not text.startswith(header):
            end = 0
        spans.append((_checked(text, len(header), end, message, f"message {number} of the prompt", row), end, weight))
    return spans


def _completion_spans(
    encoder: Encoder, text: str, prompt: list[Message], answer: list[Message], weights: list[float], row: SourceRow
) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for number, (message, weight) in enumerate(zip(answer, weights, strict=True), start=1):
        is_last = number == len(answer)
        end = len(text) if is_last else _end_of_turn(encoder, text, prompt + answer[:number], row)
        spans.append((_checked(text, start, end, message, f"message {number} of the completion", row), end, weight))
        start = end
    return spans


def _end_of_turn(encoder: Encoder, text: str, messages: list[Message], row: SourceRow) -> int:
    """Where the last of `messages` ends in `text`, the rendering of these and more."""
    alone = encoder.render(messages, row, add_generation_prompt=False)
    if text.startswith(alone):
        return len(alone)
    return next(i for i, (one, other) in enumerate(zip(alone, text + "\0", strict=False)) if one != other)


def _checked(text: str, start: int, end: int, message: Message, who: str, row: SourceRow) -> int:
    """Return `start`, if the message's text stands between it and `end`."""
    content = message.get("content")
    if start > end or (isinstance(content, str) and content.strip() not in text[start:end]):
        raise DataError(
            f"{row.where}: {who} has a weight of its own, but the chat template renders it otherwise when more "
            "messages follow, so its tokens cannot be found; set a chat template that renders it alike"
        )
    return start


def _spread(spans: Sequence[Span], ends: list[int]) -> list[float]:
    """The weight of each token, by where it ends; 0 outside the spans."""
    return [next((w for first, last, w in spans if first < end <= last), 0.0) for end in ends]

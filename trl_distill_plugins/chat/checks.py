"""Whether a chat template can be trained on with `assistant_only_loss`, found out by rendering."""

from typing import Any

from jinja2 import TemplateError

from trl_distill_plugins.chat.templating import Rendering, compiled, render

Messages = list[dict[str, Any]]

QUESTION, ANSWER = "quizzy", "xyzzy"
_TURNS: Messages = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "and\nthen?"},
    {"role": "assistant", "content": "plugh\n\nplover"},
]


def rendered(
    source: str, messages: Messages, variables: dict[str, str], *, add_generation_prompt: bool = False
) -> Rendering:
    """Render plain dictionaries. `variables` are the special tokens by name."""
    return render(compiled(source), {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt})


def template_problem(source: str, variables: dict[str, str], end: str, original: str | None = None) -> str:
    """What keeps assistant-only loss from working with the template `source`; nothing if it works.

    Args:
        source: the template, with generation tags.
        variables: the special tokens by name.
        end: the token that ends a turn.
        original: another template that must render the same text.
    """
    for messages in (_TURNS[1:3], _TURNS[1:], _TURNS):
        if messages is _TURNS and not _renders(original or source, messages, variables):
            continue  # there are formats without system messages
        try:
            problem = _problem(source, messages, variables, end, original)
        except TemplateError as error:
            problem = str(error)
        if problem:
            return problem
    return ""


def _renders(source: str, messages: Messages, variables: dict[str, str]) -> bool:
    try:
        rendered(source, messages, variables)
    except TemplateError:
        return False
    return True


def _problem(source: str, messages: Messages, variables: dict[str, str], end: str, original: str | None) -> str:
    whole = rendered(source, messages, variables)
    if original is not None and whole.text != rendered(original, messages, variables).text:
        return "it renders a turn differently when others follow"
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(whole.spans) != len(answers):
        return f"it marks {len(whole.spans)} generated parts in a conversation of {len(answers)} answers"
    for index, (start, stop) in zip(answers, whole.spans, strict=True):
        prompt = rendered(source, messages[:index], variables, add_generation_prompt=True).text
        if whole.text[:start] != prompt:
            return "the generation prompt is not what stands before an answer"
        generated = whole.text[start:stop]
        if not generated.endswith(end):
            return f"the generated part {generated!r} does not end with the end of turn {end!r}"
        if generated.removesuffix(end).strip() != messages[index]["content"]:
            return f"the generated part {generated!r} is not the answer {messages[index]['content']!r} alone"
    return ""

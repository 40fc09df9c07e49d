"""What a run would take, before anything is asked."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trl_distill_plugins.cli.generate.arguments import PRICES, GenerateArguments
from trl_distill_plugins.cli.generate.asking import Asking
from trl_distill_plugins.prompts.rows import Prompt
from trl_distill_plugins.teachers.base import TeacherPrompt
from trl_distill_plugins.teachers.completions import Request

BYTES_PER_TOKEN = 4  # of English text, about, with the vocabularies of today


def estimate(
    asking: Asking, requests: Sequence[Request], there: Collection[str], arguments: GenerateArguments, *, is_exact: bool
) -> dict[str, Any]:
    """Figures of a run, those of tokens about what is still to be written.

    Args:
        asking: the prompts.
        requests: the completions asked.
        there: keys of the completions that the output file holds already.
        arguments: of the run.
        is_exact: whether the prompts are encoded; else their tokens are estimated from their bytes.
    """
    missing = [request for request in requests if request.key not in there]
    prompt_tokens = sum(_tokens(request.prompt, is_exact=is_exact) for request in missing)
    completion_tokens = len(missing) * arguments.max_new_tokens
    figures: dict[str, Any] = {
        "teacher": arguments.teacher_name,
        "rows": asking.rows,
        "duplicates": asking.duplicates,
        "prompts": len(asking.asked),
        "completions": len(requests),
        "completions_written_already": len(requests) - len(missing),
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_are_exact": is_exact,
        "completion_tokens_at_most": completion_tokens,
    }
    if arguments.category_column is not None:
        figures["categories"] = asking.categories
        figures["categories_available"] = dict(asking.available)
    of_prompts, of_completions = (getattr(arguments, price) for price in PRICES)
    if of_prompts is not None:
        figures["cost_at_most"] = (prompt_tokens * of_prompts + completion_tokens * of_completions) / 1e6
    return figures


def _tokens(prompt: TeacherPrompt, *, is_exact: bool) -> int:
    return len(prompt.token_ids) if is_exact else -(-len(_text_of(prompt.source).encode()) // BYTES_PER_TOKEN)


def _text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def show(figures: dict[str, Any], *, as_json: bool) -> None:
    """Print the figures: one JSON object, or a table."""
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    table = Table(title=escape(figures["teacher"]), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for name, value in _lines(figures):
        table.add_row(escape(name), escape(f"{value:,}" if isinstance(value, int) else str(value)))
    Console().print(table)


def _lines(figures: dict[str, Any]) -> list[tuple[str, Any]]:
    how = "exact" if figures["prompt_tokens_are_exact"] else f"estimate: bytes / {BYTES_PER_TOKEN}"
    lines = [
        ("rows", figures["rows"]),
        ("duplicate prompts, asked once", figures["duplicates"]),
        ("prompts", figures["prompts"]),
    ]
    available = figures.get("categories_available", {})
    for category, count in figures.get("categories", {}).items():
        of = f" of {available[category]:,}" if count < available[category] else ""
        lines.append((f"  {category}", f"{count:,}{of}"))
    lines += [
        ("completions", figures["completions"]),
        ("  written already", figures["completions_written_already"]),
        (f"prompt tokens ({how})", figures["prompt_tokens"]),
        ("completion tokens, at most", figures["completion_tokens_at_most"]),
    ]
    if "cost_at_most" in figures:
        lines.append(("cost, at most", f"{figures['cost_at_most']:,.4f}"))
    return lines

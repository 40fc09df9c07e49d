"""How fast conversations become tokens, mask, labels and weights, on one core.

    python benchmarks/chat.py [--conversations 4000] [--repeats 5] [--json FILE]

Conversations of a question and an answer, and of three such pairs with a system message, are tokenised with a fast
byte-level BPE that is made here. In the table, per format, conversations a second of CPU time, and how much longer than
`tokenizer(texts)` alone on the rendered texts it takes:

- ours: `ChatRenderer.tokenize_conversations`;
- TRL's: `apply_chat_template(return_assistant_tokens_mask=True)`, one conversation after the other, as SFTTrainer does,
  which gives ids and mask.
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_distill_plugins.chat import Conversation, Message, get_renderer, install_chat_format

FORMATS = ("chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral")
PAIRS = {"short": 1, "long": 3}
WANTED = 10_000


@dataclass
class Figure:
    """One row: conversations a second, of one format and length."""

    format: str
    length: str
    tokens: float
    ours: float
    trl: float
    tokenizer: float


def words() -> list[str]:
    """The words of this repository's documents."""
    folder = Path(__file__).parents[1] / "docs"
    return " ".join(path.read_text() for path in sorted(folder.glob("*.md"))).split()


def make_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_conversations(text: list[str], count: int, pairs: int) -> list[Conversation]:
    """Questions of 8 to 16 words and answers of 12 to 40."""
    draw = random.Random(0)

    def message(role: str, low: int, high: int) -> Message:
        start, size = draw.randrange(len(text) - high), draw.randint(low, high)
        return Message(role, " ".join(text[start : start + size]))

    made = []
    for _ in range(count):
        turns = [message("system", 8, 16)] if pairs > 1 else []
        for _ in range(pairs):
            turns += [message("user", 8, 16), message("assistant", 12, 40)]
        made.append(Conversation(turns))
    return made


def rate(count: int, repeats: int, function: Callable[[], Any]) -> float:
    """Conversations a second of CPU time, the best of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return count / best


def measure(name: str, length: str, text: list[str], count: int, repeats: int) -> Figure:
    tokenizer = make_tokenizer(text)
    install_chat_format(tokenizer, None, name)
    renderer = get_renderer(name, tokenizer)
    conversations = make_conversations(text, count, PAIRS[length])
    rows = [conversation.to_dict()["messages"] for conversation in conversations]
    texts = [renderer.render_conversation(conversation) for conversation in conversations]
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def by_trl() -> None:
        for row in rows:
            tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)

    return Figure(
        name,
        length,
        tokens / count,
        rate(count, repeats, lambda: renderer.tokenize_conversations(conversations)),
        rate(count, repeats, by_trl),
        rate(count, repeats, lambda: tokenizer(texts, add_special_tokens=False)),
    )


def show(figures: list[Figure]) -> None:
    table = Table("format", "length", "tokens", "ours/s", "of tokenizer", "TRL's/s", "of tokenizer", "ours of TRL's")
    for f in figures:
        table.add_row(
            *(f.format, f.length, f"{f.tokens:.0f}"),
            *(f"{f.ours:,.0f}", f"{f.tokenizer / f.ours:.2f}x", f"{f.trl:,.0f}", f"{f.tokenizer / f.trl:.2f}x"),
            f"{f.ours / f.trl:.1f}x",
        )
    console = Console(width=110)
    console.print(table)
    slowest = min((f for f in figures if f.length == "short"), key=lambda f: f.ours)
    console.print(f"wanted: {WANTED:,} conversations/s; the slowest short one has {slowest.ours:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4000, help="of each length")
    parser.add_argument("--repeats", type=int, default=5, help="of which the best counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    text = words()
    figures = [
        measure(name, length, text, arguments.conversations, arguments.repeats) for name in FORMATS for length in PAIRS
    ]
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2))


if __name__ == "__main__":
    main()

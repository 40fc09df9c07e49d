"""What a cached teacher takes on disk and what it loses, on held-out text of a teacher trained on real text.

    python benchmarks/teacher_cache.py --data DIR [--steps 2000] [--json FILE]

DIR holds train.jsonl and test.jsonl with the columns `question` and `answer`, as GSM8K's. The teacher, that of
examples/by_feature/real_text.py (3.9M, V 2048), is trained first, on one thread. Then 200 held-out texts are written
and read with each choice of tokens:

- bytes a trained token, the record's key and checksum included; for "plain", 16-bit ids and fp16 log-probs;
- KL over the named tokens and all others as one: what rounding loses;
- KL over the whole vocabulary, the tail taken as even: what naming so few loses, too;
- trained tokens read a second, and how often that is what the student of that script trains (20 times is wanted).
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "by_feature"))

import torch
from datasets import disable_progress_bars
from real_text import LENGTH, STUDENT, TEACHER, TEACHER_STEPS, TEST_ROWS, VOCABULARY, Run
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.cache.codec import decode, encode
from trl_distill_plugins.teachers.cache.selection import Samples, Selection, TopK

RECORD_BYTES = 28  # key, end and checksum in the index of a shard
CHOICES: list[Selection] = [
    *(TopK(128), TopK(64), TopK(50), TopK(32), TopK(16)),
    *(TopK(256, mass=0.9), TopK(256, mass=0.75)),
    *(TopK(256, min_prob=0.002), TopK(256, min_prob=0.0028), TopK(256, min_prob=0.004), TopK(256, min_prob=0.01)),
    *(Samples(50), Samples(20)),
]
PUBLISHED = "for comparison, the published settings of DistillKit: k = 50 in 114 bytes, k = 128 in 300"


@dataclass
class Figure:
    """One row of the table."""

    kept: str
    tokens: float
    bytes: float
    kl_classes: float | None
    kl_whole: float | None
    read: float | None


def distributions(model: Any, run: Run) -> list[Tensor]:
    """`log p` of each held-out text, `[T - 1, V]`."""
    model.eval()
    texts = run.tokenizer([row["text"] for row in run.test], truncation=True, max_length=LENGTH)["input_ids"]
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in texts]


def errors(log_p: Tensor, signal: SparseSignal) -> tuple[float, float]:
    """Sums over the positions of KL(p || p as read), over the k + 1 classes and over the whole vocabulary."""
    named = signal.log_probs > -torch.inf
    read, exact = signal.log_probs.double(), log_p.double().gather(1, signal.ids).masked_fill(~named, -torch.inf)
    tails = [(-torch.expm1(part.logsumexp(-1).clamp_max(-1e-12))).log() for part in (exact, read)]
    inside = (exact.exp() * (exact - read).masked_fill(~named, 0)).sum(-1)
    even = tails[1] - (log_p.shape[1] - named.sum(-1)).log()
    is_named = torch.zeros_like(log_p).scatter_add(1, signal.ids, named.float()) > 0  # rows repeat an id that fills up
    outside = log_p.double().masked_fill(is_named, -torch.inf)
    spread = (outside.exp() * (outside - even.unsqueeze(1)).masked_fill(outside == -torch.inf, 0)).sum(-1)
    classes = inside + tails[0].exp() * (tails[0] - tails[1])
    return classes.sum().item(), (inside + spread).sum().item()


def measure(choice: Selection, texts: list[Tensor]) -> Figure:
    """Write and read all texts."""
    generator = torch.Generator().manual_seed(0)
    blobs = [encode(choice(log_p, generator), VOCABULARY, draws=choice.draws) for log_p in texts]
    start = time.process_time()
    signals = [decode(blob) for blob in blobs]
    seconds = time.process_time() - start
    positions = sum(map(len, texts))
    named = sum(int((signal.log_probs > -torch.inf).sum()) for signal in signals) / positions
    size = sum(len(blob) + RECORD_BYTES for blob in blobs) / positions
    if isinstance(choice, Samples):
        return Figure(f"{choice.draws} draws", named, size, None, None, positions / seconds)
    kls = [sum(column) / positions for column in zip(*map(errors, texts, signals), strict=True)]
    label = f"top {choice.k}" if not choice.min_prob else f"p above {choice.min_prob:g}"
    label += f", mass {choice.mass}" if choice.mass < 1 else ""
    return Figure(label, named, size, *kls, positions / seconds)


def plain(k: int, texts: list[Tensor]) -> Figure:
    """The k likeliest tokens with log-probs in fp16."""
    top = [log_p.topk(k) for log_p in texts]
    signals = [SparseSignal(ids, values.half().float()) for values, ids in top]
    kls = [sum(column) / sum(map(len, texts)) for column in zip(*map(errors, texts, signals), strict=True)]
    return Figure(f"top {k}, plain", k, 4.0 * k, *kls, None)


def student_speed(run: Run) -> float:
    """Tokens a second of CPU time that the student trains on its own text."""
    _, cost = run.fit(STUDENT, 30)
    return cost["tokens"] / cost["seconds"]


def show(figures: list[Figure], speed: float) -> None:
    table = Table("kept", "tokens", "bytes", "KL, classes", "KL, vocabulary", "read/s", "of the student")
    for f in figures:
        kls = ["" if kl is None else f"{kl:.2g}" for kl in (f.kl_classes, f.kl_whole)]
        read = ("", "") if f.read is None else (f"{f.read:,.0f}", f"{f.read / speed:.0f}x")
        table.add_row(f.kept, f"{f.tokens:.1f}", f"{f.bytes:.1f}", *kls, *read)
    Console(width=100).print(table)
    print(PUBLISHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=TEACHER_STEPS, help="steps the teacher is trained")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.data, folder, TEST_ROWS)
        teacher, _ = run.fit(TEACHER, options.steps)
        speed = student_speed(run)
        texts = distributions(teacher, run)
    entropy = sum(-(p.exp() * p).sum().item() for p in texts) / sum(map(len, texts))
    figures = [plain(50, texts), *(measure(choice, texts) for choice in CHOICES)]
    print(f"{sum(map(len, texts)):,} trained tokens; the teacher's entropy is {entropy:.2f} nats a token")
    show(figures, speed)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    main()

"""Train the demo's teacher: a small GPT-2 that answers by the handbook in its prompt, whatever that says.

Every training example has another handbook, so the only way to be right is to read it. Two lessons: first
the tickets are bare names of topics and many handbooks use few desks, which teaches to look a desk up
within some hundred steps; then come the real tickets, with a new handbook of twenty different desks each time.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trl_distill_plugins.cli.demo import files, world
from trl_distill_plugins.cli.demo.task import Handbook, Ticket, build_tokenizer, sample_tickets
from trl_distill_plugins.prompts.weights import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RECORD = "demo.json"


@dataclass(frozen=True)
class Recipe:
    """How the teacher is made. A saved teacher is used again only if it was made exactly so."""

    seed: int
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    lookup_steps: int = 200
    lookup_shape: tuple[int, int] = (16, 8)  # handbooks a step, tickets asked about each
    ticket_steps: int = 240
    ticket_shape: tuple[int, int] = (8, 24)
    learning_rate: float = 3e-3
    desks_in_first_lesson: tuple[int, ...] = (1, 2, 3, 5, 8, len(world.TOPICS))

    def record(self, tokenizer: "PreTrainedTokenizerFast") -> dict[str, object]:
        """Return the recipe and the words it speaks, as JSON reads them back."""
        record: dict[str, object] = json.loads(json.dumps({**asdict(self), "vocabulary": tokenizer.get_vocab()}))
        return record


def prepare_teacher(directory: Path, recipe: Recipe) -> bool:
    """Make sure `directory` holds the teacher of `recipe`; return whether it had to be trained."""
    saved = directory / RECORD
    tokenizer = build_tokenizer()
    record = recipe.record(tokenizer)
    if saved.is_file() and json.loads(saved.read_text(encoding="utf-8")) == record:
        return False
    model = train(recipe, tokenizer)
    with files.new_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return True


def new_model(
    tokenizer: "PreTrainedTokenizerFast", *, hidden: int, layers: int, heads: int, seed: int
) -> "PreTrainedModel":
    """Return a GPT-2 with fresh random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_inner=2 * hidden,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def train(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """Return a trained teacher."""
    import torch
    from rich.progress import track

    model = new_model(tokenizer, hidden=recipe.hidden, layers=recipe.layers, heads=recipe.heads, seed=recipe.seed)
    steps = recipe.lookup_steps + recipe.ticket_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, 2.5 * (1 - step / steps) + 0.01)
    )
    lessons = _lessons(recipe)
    for _ in track(range(steps), description="training the teacher"):
        loss = _loss(model, tokenizer, *next(lessons))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


Lesson = tuple[list[Handbook], list[list[Ticket]]]


def _lessons(recipe: Recipe) -> Iterator[Lesson]:
    """Yield the handbooks of each step and the tickets asked about each."""
    rng = random.Random(recipe.seed)
    tickets = sample_tickets(rng, held_out=False)
    topics = list(world.TOPICS)
    for _ in range(recipe.lookup_steps):
        books, asked = recipe.lookup_shape
        desks = rng.choices(recipe.desks_in_first_lesson, k=books)
        names = [[_bare_ticket(rng, topic) for topic in rng.choices(topics, k=asked)] for _ in desks]
        yield [Handbook.sample(rng, desks=count) for count in desks], names
    for _ in range(recipe.ticket_steps):
        books, asked = recipe.ticket_shape
        yield [Handbook.sample(rng) for _ in range(books)], [list(islice(tickets, asked)) for _ in range(books)]


def _bare_ticket(rng: random.Random, topic: str) -> Ticket:
    """Return the topic's own name, or one of the names that customers have for it."""
    return Ticket(topic if rng.random() < 0.5 else rng.choice(world.TOPICS[topic]), topic)


def _loss(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", handbooks: list[Handbook], asked: list[list[Ticket]]
) -> "torch.Tensor":
    """Return the cross-entropy of the answers; each handbook is read once and shared by its tickets."""
    import torch
    from torch.nn import functional as F

    prompts = torch.tensor(tokenizer([handbook.text() for handbook in handbooks])["input_ids"])
    cache = model.base_model(prompts, attention_mask=torch.ones_like(prompts), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(asked[0]))
    ids, labels = _rows(tokenizer, handbooks, asked)
    mask = torch.ones(len(ids), prompts.shape[1] + ids.shape[1], dtype=torch.long)
    hidden = model.base_model(ids, attention_mask=mask, past_key_values=cache).last_hidden_state
    trained = labels[:, 1:] != IGNORE_INDEX
    logits = model.get_output_embeddings()(hidden[:, :-1][trained])
    return F.cross_entropy(logits, labels[:, 1:][trained])


def _rows(
    tokenizer: "PreTrainedTokenizerFast", handbooks: list[Handbook], asked: list[list[Ticket]]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return `[B, T]` ids of ticket + answer, padded on the right, and labels on the answers alone."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    pairs = [(ticket, book) for book, tickets in zip(handbooks, asked, strict=True) for ticket in tickets]
    questions = tokenizer([world.TICKET.replace("{input}", ticket.text) for ticket, _ in pairs])["input_ids"]
    answers = tokenizer([book.answer(ticket.topic) + tokenizer.eos_token for ticket, book in pairs])["input_ids"]
    rows = list(zip(questions, answers, strict=True))
    ids = pad_sequence([torch.tensor(q + a) for q, a in rows], batch_first=True)
    labels = [torch.tensor([IGNORE_INDEX] * len(q) + a) for q, a in rows]
    return ids, pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)

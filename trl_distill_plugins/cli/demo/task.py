"""The demo's task: route a customer's ticket by the rules of a handbook that stands in the prompt.

The handbook is the expensive prompt: one rule for each topic, in plain words. Which words belong to which
topic is general knowledge; which desk takes a topic is in the handbook and nowhere else, so a model
without it can only guess.
"""

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_distill_plugins.cli.demo import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT_SHARE = 8  # one ticket text in eight is never trained on, by nobody


@dataclass(frozen=True)
class Ticket:
    """A customer's message and the topic it is about."""

    text: str
    topic: str


@dataclass(frozen=True)
class Handbook:
    """The desk that takes each topic, in the order in which the handbook names them."""

    desks: dict[str, str]

    @classmethod
    def sample(cls, rng: random.Random, desks: int = len(world.TOPICS)) -> "Handbook":
        """Hand the topics out among `desks` desks: one each, or, when there are fewer desks than topics, at random."""
        names = rng.sample(world.DESKS, desks)
        takers = names if desks == len(world.TOPICS) else rng.choices(names, k=len(world.TOPICS))
        return cls(dict(zip(world.TOPICS, takers, strict=True)))

    def text(self) -> str:
        """Return the prompt: the instruction and one sentence for each topic."""
        rules = (world.RULE.format(topic=topic, desk=desk) for topic, desk in self.desks.items())
        return " ".join([world.PREAMBLE, *rules])

    def answer(self, topic: str) -> str:
        """Return the one right answer to a ticket about `topic`: the topic and its desk."""
        return world.ANSWER.format(topic=topic, desk=self.desks[topic])

    def teacher_template(self) -> str:
        """Return the template of the long prompt, with `{input}` for the ticket."""
        return f"{self.text()} {world.TICKET}"


STUDENT_TEMPLATE = world.TICKET


def is_held_out(text: str) -> bool:
    """Say whether a ticket text is kept for evaluation: a function of the text alone, so the two sides never meet."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def sample_tickets(rng: random.Random, *, held_out: bool) -> Iterator[Ticket]:
    """Yield tickets of one side of the split without end."""
    topics = list(world.TOPICS)
    while True:
        topic, other = rng.sample(topics, 2)
        words = {
            "greeting": rng.choice(world.GREETINGS),
            "owner": rng.choice(world.OWNERS),
            "it": rng.choice(world.TOPICS[topic]),
            "other": rng.choice(world.TOPICS[other]),
            "when": rng.choice(world.WHENS),
            "closing": rng.choice(world.CLOSINGS),
        }
        text = " ".join(rng.choice(world.SHAPES).format(**words).split()).replace(" ,", ",").replace(" .", ".")
        if is_held_out(text) == held_out:
            yield Ticket(text, topic)


def distinct_tickets(count: int, rng: random.Random, *, held_out: bool) -> list[Ticket]:
    """Return `count` tickets with different texts from one side of the split."""
    found: dict[str, Ticket] = {}
    for ticket in sample_tickets(rng, held_out=held_out):
        found.setdefault(ticket.text, ticket)
        if len(found) == count:
            break
    return list(found.values())


def chance_accuracy(answers: Sequence[str]) -> float:
    """Return what the best constant answer would score: the share of the most frequent right answer."""
    return max(Counter(answers).values()) / len(answers)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Make a word-level tokenizer of everything the demo's world can say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Split(Regex(r"#?\w+|[^\w\s]"), behavior="removed", invert=True)
    texts = [world.PREAMBLE, world.RULE, world.ANSWER, world.TICKET, *world.TOPICS]
    texts += [f"#{desk}" for desk in world.DESKS]
    texts += [name for names in world.TOPICS.values() for name in names]
    texts += [*world.GREETINGS, *world.OWNERS, *world.WHENS, *world.CLOSINGS, *world.SHAPES]
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())}
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

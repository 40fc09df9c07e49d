"""The demo's task: gold answers follow the handbook, held-out means held out, nothing is lost in tokenising."""

import random
from itertools import islice

import pytest
from transformers import PreTrainedTokenizerFast

from trl_distill_plugins.cli.demo import world
from trl_distill_plugins.cli.demo.task import (
    STUDENT_TEMPLATE,
    Handbook,
    Ticket,
    build_tokenizer,
    chance_accuracy,
    distinct_tickets,
    is_held_out,
    sample_tickets,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def handbook() -> Handbook:
    return Handbook.sample(random.Random(3))


def test_gold_answers_follow_the_handbook(handbook: Handbook) -> None:
    for topic, desk in handbook.desks.items():
        assert f"all tickets about {topic} go to #{desk}." in handbook.text()
        assert handbook.answer(topic) == f"{topic} #{desk}"


def test_a_handbook_gives_every_topic_a_desk_of_its_own(handbook: Handbook) -> None:
    assert list(handbook.desks) == list(world.TOPICS)
    assert len(set(handbook.desks.values())) == len(world.TOPICS)


@pytest.mark.parametrize("desks", [1, 3])
def test_a_simple_handbook_uses_few_desks(desks: int) -> None:
    assert len(set(Handbook.sample(random.Random(0), desks=desks).desks.values())) <= desks


def test_held_out_tickets_are_never_trained_on() -> None:
    rng = random.Random(0)
    train = {ticket.text for ticket in islice(sample_tickets(rng, held_out=False), 5000)}
    held_out = {ticket.text for ticket in distinct_tickets(300, rng, held_out=True)}
    assert len(held_out) == 300
    assert not train & held_out
    assert all(is_held_out(text) for text in held_out)


def test_a_ticket_names_its_topic_in_the_topics_own_words() -> None:
    for ticket in islice(sample_tickets(random.Random(1), held_out=False), 200):
        assert any(name in ticket.text for name in world.TOPICS[ticket.topic])


def test_the_same_seed_gives_the_same_tickets() -> None:
    first, second = (distinct_tickets(20, random.Random(5), held_out=False) for _ in range(2))
    assert first == second


def test_no_name_belongs_to_two_topics() -> None:
    names = [name for names in world.TOPICS.values() for name in names]
    assert len(names) == len(set(names))


def test_every_word_is_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast, handbook: Handbook) -> None:
    tickets: list[Ticket] = distinct_tickets(500, random.Random(2), held_out=False)
    for text in [handbook.teacher_template(), *(ticket.text for ticket in tickets)]:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_answers_survive_decoding_and_encoding(tokenizer: PreTrainedTokenizerFast, handbook: Handbook) -> None:
    for topic in world.TOPICS:
        ids = tokenizer(handbook.answer(topic))["input_ids"]
        assert tokenizer.decode(ids) == handbook.answer(topic)
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_templates_differ_by_the_handbook_alone(tokenizer: PreTrainedTokenizerFast, handbook: Handbook) -> None:
    assert handbook.teacher_template() == f"{handbook.text()} {STUDENT_TEMPLATE}"
    assert STUDENT_TEMPLATE.count("{input}") == 1
    assert not any(desk in STUDENT_TEMPLATE for desk in world.DESKS)
    assert len(tokenizer(handbook.text())["input_ids"]) > 10 * len(tokenizer(STUDENT_TEMPLATE)["input_ids"])


def test_chance_is_the_best_constant_answer() -> None:
    assert chance_accuracy(["a", "b", "a", "c"]) == 0.5

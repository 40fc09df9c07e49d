"""The demo's measurements, on models whose results are known in advance."""

import random
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trl_distill_plugins.cli.demo.measure import Prompted, accuracy, mean_kl, speedup
from trl_distill_plugins.cli.demo.task import STUDENT_TEMPLATE, Handbook, build_tokenizer
from trl_distill_plugins.cli.demo.teacher import new_model

INPUTS = ["the parcel is not right.", "I have a question about the lift, thanks."]
HANDBOOK = Handbook.sample(random.Random(0))
ANSWERS = [HANDBOOK.answer("parcels"), HANDBOOK.answer("elevators")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def sides(tokenizer: PreTrainedTokenizerFast) -> tuple[Prompted, Prompted]:
    models = [new_model(tokenizer, hidden=16, layers=1, heads=2, seed=seed) for seed in (0, 1)]
    return Prompted(models[0], tokenizer, HANDBOOK.teacher_template()), Prompted(models[1], tokenizer, STUDENT_TEMPLATE)


@pytest.fixture
def always_right(tokenizer: PreTrainedTokenizerFast) -> Prompted:
    """A model that says ANSWERS[0] whatever it reads: each of its tokens leads to the next by construction."""
    model = new_model(tokenizer, hidden=16, layers=1, heads=2, seed=0)
    start = tokenizer(STUDENT_TEMPLATE)["input_ids"][-1]
    chain = [start, *tokenizer(ANSWERS[0])["input_ids"], tokenizer.eos_token_id]
    head = torch.nn.Linear(16, len(tokenizer), bias=False)
    codes = torch.eye(16) * 10
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        head.weight.zero_()
        for code, (token, following) in zip(codes, pairwise(chain), strict=False):
            model.transformer.wte.weight[token] = code
            head.weight[following] = code
    model.lm_head = head
    return Prompted(model, tokenizer, STUDENT_TEMPLATE)


def test_a_model_that_is_right_by_construction_scores_one(always_right: Prompted) -> None:
    answers = always_right.answers(INPUTS, max_new_tokens=6, batch_size=1)
    assert answers == [ANSWERS[0]] * 2
    assert accuracy(answers, [ANSWERS[0]] * 2) == 1.0
    assert accuracy(answers, ANSWERS) == 0.5


def test_batches_of_different_lengths_answer_as_one_by_one(sides: tuple[Prompted, Prompted]) -> None:
    together = sides[1].answers(INPUTS, max_new_tokens=6)
    assert together == sides[1].answers(INPUTS, max_new_tokens=6, batch_size=1)


def test_kl_of_a_model_with_itself_is_zero(sides: tuple[Prompted, Prompted]) -> None:
    assert mean_kl(sides[0], sides[0], INPUTS, ANSWERS) == pytest.approx(0.0, abs=1e-6)


def test_kl_equals_the_naive_computation(sides: tuple[Prompted, Prompted]) -> None:
    terms: list[torch.Tensor] = []
    for text, answer in zip(INPUTS, ANSWERS, strict=True):
        p, q = (_naive_log_probs(side, text, answer) for side in sides)
        terms.append((p.exp() * (p - q)).sum(-1))
    naive = torch.cat(terms).mean().item()
    assert naive > 0.01
    assert mean_kl(*sides, INPUTS, ANSWERS) == pytest.approx(naive, rel=1e-4)
    assert mean_kl(*sides, INPUTS, ANSWERS, batch_size=1) == pytest.approx(naive, rel=1e-4)


def _naive_log_probs(side: Prompted, text: str, answer: str) -> torch.Tensor:
    """Read one token more at a time."""
    prompt = side.tokenizer(side.template.format(input=text))["input_ids"]
    completion = [*side.tokenizer(answer)["input_ids"], side.tokenizer.eos_token_id]
    rows = []
    for end in range(len(completion)):
        with torch.no_grad():
            rows.append(side.model(torch.tensor([prompt + completion[:end]])).logits[0, -1].double().log_softmax(-1))
    return torch.stack(rows)


def test_prompt_tokens_count_the_whole_prompt(
    tokenizer: PreTrainedTokenizerFast, sides: tuple[Prompted, Prompted]
) -> None:
    handbook = len(tokenizer(HANDBOOK.text())["input_ids"])
    assert sides[0].prompt_tokens(INPUTS) == sides[1].prompt_tokens(INPUTS) + handbook


def test_speedup_is_a_ratio_of_times(sides: tuple[Prompted, Prompted]) -> None:
    assert speedup(*sides, INPUTS, max_new_tokens=2, rounds=1) > 0

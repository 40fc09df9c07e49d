"""check_loss passes what keeps the contract, and names what a broken loss breaks."""

import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from trl_distill_plugins import Loss, plugins
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import DivergenceOptions, TemperatureOptions
from trl_distill_plugins.losses.divergences import ForwardKL
from trl_distill_plugins.losses.logit_matching import LogitMSEOptions
from trl_distill_plugins.losses.schedules import Ramp
from trl_distill_plugins.losses.total_variation import TotalVariation
from trl_distill_plugins.testing import check_loss

BUILT_IN = {r.name: r.cls for r in plugins.installed("losses") if r.owner.is_builtin and issubclass(r.cls, Loss)}
OPTIONS = [
    ("adaptive_kl", {"mu": 1.0}),
    ("alpha_beta", {"alpha": 1.5, "beta": -0.5}),
    ("alpha_beta", {"alpha": 2.0, "beta": 0.5}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
    ("contrastive", {"lam": 1.0}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("decoupled_kd", {"alpha": 0.3, "beta": 4.0, "temperature": 2.0}),
    ("forward_kl", {"tail": "renormalise", "temperature": 3.0}),
    ("jsd", {"beta": {"schedule": "linear", "start": 0.1, "end": 1.0}}),
    ("skew_kl", {"lam": 0.0}),
    ("skew_kl", {"lam": 1.0}),
    ("skew_reverse_kl", {"lam": 0.0}),
    ("skew_reverse_kl", {"lam": 1.0}),
    ("total_variation", {"temperature": 2.5}),
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_losses_keep_the_contract(name):
    outcomes = check_loss(BUILT_IN[name])
    assert list(outcomes.values()).count("holds") >= 8


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_built_in_losses_keep_it_with_other_options(name, options):
    check_loss(BUILT_IN[name], **options)


def kl(student, teacher):
    """KL(teacher || student) of two sets of log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


class Honest(Loss):
    """Forward KL, from which the broken ones depart."""

    name = "honest"
    is_divergence = True

    def per_token(self, tile):
        return kl(tile.student.log_softmax(-1), tile.teacher.log_probs())


class OtherDtype(Honest):
    def per_token(self, tile):
        return super().per_token(tile).float()


class Mean(Honest):
    def per_token(self, tile):
        return super().per_token(tile).mean()


class OverwritesTheStudent(Honest):
    def per_token(self, tile):
        return kl(tile.student.sub_(tile.student.logsumexp(-1, keepdim=True)), tile.teacher.log_probs())


class OverwritesTheTeacher(Honest):
    def per_token(self, tile):
        return kl(tile.student.log_softmax(-1), tile.teacher.logits.mul_(2).div_(2 + 1e-9).log_softmax(-1))


class LendsTheTeacher(Honest):
    def per_token_and_grad(self, tile):
        return self.per_token(tile), tile.teacher.logits


class NaNWithoutMass(Honest):
    def per_token(self, tile):
        return kl(tile.student.log_softmax(-1), tile.teacher.logits.log_softmax(-1))


class Cancels(Honest):
    def per_token(self, tile):
        return (super().per_token(tile) + 1e5) - 1e5


class DetachesUnsaid(Honest):
    def per_token(self, tile):
        log_q, log_p = tile.student.log_softmax(-1), tile.teacher.log_probs()
        return (log_q.exp().detach() * (log_q - log_p)).sum(-1)


class WrongSign(Honest):
    def per_token_and_grad(self, tile):
        return self.per_token(tile), tile.teacher.probs() - tile.student.softmax(-1)


class WrongValue(Honest):
    def per_token_and_grad(self, tile):
        values, gradient = super().per_token_and_grad(tile)
        return 2 * values, gradient


class DividesByTheTile(Honest):
    def per_token(self, tile):
        return super().per_token(tile) / len(tile.labels)


class ReadsNeighbours(Honest):
    def per_token(self, tile):
        return super().per_token(tile) + super().per_token(tile).roll(1) * torch.arange(len(tile.labels)).sign()


class ReadsLabels(Honest):
    def per_token(self, tile):
        return super().per_token(tile) * (1 + tile.labels)


class Negative(Honest):
    is_divergence, is_nonnegative = False, True

    def per_token(self, tile):
        return -super().per_token(tile)


class IsCrossEntropy(Honest):
    def per_token(self, tile):
        return -(tile.teacher.probs() * tile.student.log_softmax(-1)).sum(-1)


class WeighsColumns(Honest):
    def per_token(self, tile):
        gap = (tile.student.softmax(-1) - tile.teacher.probs()).square()
        return (gap * torch.linspace(1, 2, gap.shape[-1], dtype=gap.dtype)).sum(-1)


class NeedsSixTokens(Honest):
    def per_token(self, tile):
        p, ids = tile.teacher.probs().topk(6)
        return (p - tile.student.softmax(-1).gather(-1, ids)).square().sum(-1)


class NotLinear(TotalVariation):
    teacher_forms = ("dense", "top_k", "sampled")


class OverwritesTheDraws(ForwardKL):
    def per_token_and_grad(self, tile):
        log_q, p = tile.student.log_softmax(-1), tile.teacher.probs()
        values = (p * (tile.teacher.log_probs() - log_q)).sum(-1)
        return values, p.neg_().add_(log_q.exp())


class DividesAgain(Honest):
    def per_token(self, tile):
        return kl((tile.student / self.temperature).log_softmax(-1), tile.teacher.log_probs())


class Forgets(Honest):
    def __init__(self, **options):
        super().__init__(**options)
        self.seen = 0.0

    def advance(self, value, progress):
        self.seen += value

    def state_dict(self):
        return {"seen": self.seen}


class MovesUnseen(Honest):
    def advance(self, value, progress):
        self.seen = value


class CannotMove(Forgets):
    def advance(self, value, progress):
        raise ZeroDivisionError("by hand")


class WorseWithTime(Honest):
    @dataclass(frozen=True)
    class Options(DivergenceOptions):
        sign: float = Ramp(1.0, -1.0)

    def per_token(self, tile):
        return self.options.sign * super().per_token(tile)


BROKEN = {
    OtherDtype: {"output": "per_token: got torch.float32, expected the logits' torch.float64"},
    Mean: {"output": r"per_token: got shape \[\], expected \[6\]"},
    OverwritesTheStudent: {
        "inputs": "ordinary logits, per_token: tile.student, got after the call, expected as before",
        "output": "it raised RuntimeError: a leaf Variable that requires grad is being used in an in-place operation",
    },
    OverwritesTheTeacher: {"inputs": "tile.teacher.logits, got after the call"},
    LendsTheTeacher: {"inputs": "per_token_and_grad: tile.teacher.logits, got after the call, expected as before"},
    NaNWithoutMass: {
        "finite": r"teacher padded with -inf in torch.float32: the value of per_token by autograd is nan at \[0\]",
        "gradient": "teacher padded with -inf: the gradient, got by autograd of per_token, expected by finite",
        "chunking": "teacher of a narrower vocabulary, 6 tokens in chunks of 1: the sum, got in chunks, expected on",
        "non-negative": "the value is nan",
        "merging": "one-hot teacher, 4 of 11 tokens named, tail bucket: the value of per_token by autograd is nan",
    },
    Cancels: {"precision": "ordinary logits: the value, got in fp32, expected in fp64\n *largest difference 0.00"},
    DetachesUnsaid: {
        "gradient": "ordinary logits: the gradient, got by autograd of per_token, expected by finite differences",
    },
    WrongSign: {
        "closed form": "ordinary logits: the gradient, got by per_token_and_grad, expected by autograd of per_token",
        "chunking": "",
    },
    WrongValue: {"closed form": "the value, got by per_token_and_grad, expected by per_token", "chunking": ""},
    DividesByTheTile: {
        "chunking": "ordinary logits, 6 tokens in chunks of 1: the sum, got in chunks, expected on whole logits",
        "masking": r"weight 0 at \[0, 3, 5\]: the sum, got with weights, expected without the tokens",
    },
    ReadsNeighbours: {
        "chunking": "",
        "order": "ordinary logits, tokens in reverse: the value, got in reverse, expected in order",
        "masking": "",
    },
    ReadsLabels: {"labels": "ordinary logits, other labels: the value, got with other labels"},
    Negative: {"non-negative": r"ordinary logits: the value is -\d", "merging": r"the value is -\d"},
    IsCrossEntropy: {"zero at p = q": r"p = q: the value, expected 0", "merging": "p = q, 4 of 11 tokens named"},
    WeighsColumns: {"top_k": "all 11 tokens named in a random order: the value, got with a sparse teacher"},
    NeedsSixTokens: {"merging": "4 of 11 tokens named, tail bucket: it raised RuntimeError: "},
    NotLinear: {"sampled": "one token drawn, weighted by p over all tokens that can be: the gradient"},
    OverwritesTheDraws: {"sampled": "the weights of the draws, got after per_token_and_grad, expected as before"},
    DividesAgain: {"temperature": "the value, got at T = 0.5, expected 0.25 times what it is at 1 for logits / 0.5"},
    MovesUnseen: {
        "state": "the loss defines advance, and its state_dict is empty: nothing of it would move or be saved"
    },
    CannotMove: {"state": "it raised ZeroDivisionError: by hand"},
    Forgets: {"state": r"after three steps: the state, got {'seen': 0.0}, expected {'seen': 4.75}"},
    WorseWithTime: {"non-negative": "", "merging": ""},
}


def broken_properties(message):
    """Property: what is said of it, from the message of a failed check."""
    sections = message.split("\n\n")[1:]
    return {name: rest for name, _, rest in (section.partition(": ") for section in sections)}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_loss_is_caught_and_every_property_it_breaks_is_named(cls):
    with pytest.raises(AssertionError) as caught:
        check_loss(cls)
    said = broken_properties(str(caught.value))
    assert set(said) == set(BROKEN[cls])
    for name, text in BROKEN[cls].items():
        assert re.search(text, said[name]), said[name]


def test_every_property_has_a_loss_that_breaks_it():
    assert set().union(*BROKEN.values()) == set(check_loss(ForwardKL))


def test_the_message_shows_loss_property_case_and_numbers():
    with pytest.raises(AssertionError) as caught:
        check_loss(WrongValue(temperature=1.0))
    header, *_ = lines = str(caught.value).splitlines()
    assert header.startswith(f"loss 'honest' ({__name__}.WrongValue, DivergenceOptions(temperature=1.0,")
    assert header.endswith("breaks 2 properties:")
    assert lines[1:3] == [
        "",
        "closed form: `per_token_and_grad` gives the values of `per_token` and the gradient autograd takes from it.",
    ]
    assert lines[3] == "    ordinary logits: the value, got by per_token_and_grad, expected by per_token"
    got, expected = ([float(cell) for cell in line.split()[1:]] for line in lines[5:7])
    assert got == pytest.approx([2 * value for value in expected], rel=1e-4)
    where = re.search(r"largest difference ([\d.]+) at \[(\d)\], allowed \d", lines[4])
    assert float(where[1]) == pytest.approx(max(expected), rel=1e-4)
    assert int(where[2]) == expected.index(max(expected))


def test_an_exception_of_the_loss_is_the_cause():
    with pytest.raises(AssertionError, match="it raised RuntimeError") as caught:
        check_loss(NeedsSixTokens)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_scheduled_loss_is_tried_at_both_ends():
    with pytest.raises(AssertionError, match=r"sign=-1\.0\)\) at progress 1 breaks 2 properties"):
        check_loss(WorseWithTime)


def test_what_does_not_apply_is_said_in_words():
    class Detaches(DetachesUnsaid):
        detaches, is_divergence = True, False

    outcomes = check_loss(Detaches)
    assert outcomes["gradient"] == "detaches = True: part of the value gets no gradient, on purpose"
    assert outcomes["non-negative"] == "neither is_divergence nor is_nonnegative is declared"
    assert outcomes["temperature"] == "holds"


def test_a_loss_without_teacher_gets_none():
    class Entropy(Loss):
        name, Options = "entropy", TemperatureOptions
        needs_teacher, is_nonnegative = False, True

        def per_token(self, tile):
            assert tile.teacher is None
            log_q = tile.student.log_softmax(-1)
            return -(log_q.exp() * log_q).sum(-1)

    assert check_loss(Entropy)["top_k"] == "the loss needs no teacher"


def test_a_gradient_that_is_one_number_for_all_logits_will_do():
    class SumOfLogits(Loss):
        name, Options, needs_teacher = "sum_of_logits", LogitMSEOptions, False

        def per_token(self, tile):
            return tile.student.sum(-1)

    assert check_loss(SumOfLogits)["chunking"] == "holds"


def test_nothing_is_left_behind_and_nothing_is_random():
    before = torch.random.get_rng_state()
    with torch.no_grad():
        outcomes = check_loss(Honest, temperature=0.7)
    assert torch.equal(torch.random.get_rng_state(), before)
    messages = set()
    for _ in range(2):
        with pytest.raises(AssertionError) as caught:
            check_loss(NotLinear)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert outcomes == check_loss(Honest)


@pytest.mark.parametrize("given", ["forward_kl", int, None])
def test_what_is_no_loss_is_refused(given):
    with pytest.raises(TypeError, match="takes a subclass of Loss and its options, or an instance alone; got "):
        check_loss(given)


def test_bad_options_are_named():
    with pytest.raises(ConfigError, match="loss 'honest' has no option 'temprature'; did you mean 'temperature'"):
        check_loss(Honest, temprature=2.0)
    with pytest.raises(TypeError, match="with options"):
        check_loss(Honest(), temperature=2.0)


def test_it_needs_none_of_the_test_tools():
    code = (
        "import sys\nfrom trl_distill_plugins.testing import check_loss\n"
        "from trl_distill_plugins.losses.divergences import ForwardKL\n"
        "check_loss(ForwardKL)\nprint(sorted({'pytest', 'hypothesis', 'trl', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"

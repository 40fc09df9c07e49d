"""Losses on what happens inside the two models: hidden states and attention maps of paired layers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import BaseLoss
from trl_distill_plugins.losses.layers import (
    LayerKind,
    LayerMap,
    LayerPair,
    ModelShape,
    map_layers,
    parse_layer_map,
)
from trl_distill_plugins.losses.tiles import at_least_float32


@dataclass(frozen=True)
class HiddenOptions:
    """Options every hidden loss has.

    Args:
        layers: which layers are compared: "uniform" spreads the student's over the teacher's, "last" takes the last of
            both, and `[[student, teacher], ...]` names them. The loss is the mean over the pairs.
    """

    layers: LayerMap = "uniform"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", parse_layer_map(self.layers))


class HiddenLoss(BaseLoss):
    """A loss on a pair of layers, a number for each trained token. Subclass it, name it, write `per_token`; register
    the class with `register_losses`, as a `Loss`.

    Layer maps, projectors, normalisation, accumulation and logging are the trainer's work.

    Class attributes:
        reads: "hidden_states", or "attentions", which take `attn_implementation: eager` and one prompt for both models.
        needs_equal_widths: whether hidden states of different widths need a trained projector from the student's to
            the teacher's.
    """

    Options: ClassVar[type[Any]] = HiddenOptions
    reads: ClassVar[LayerKind] = "hidden_states"
    needs_equal_widths: ClassVar[bool] = True

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of each token, `[N]`, differentiable in `student`, for one pair of layers.

        Args:
            student: hidden states `[N, H]` or attention rows `[N, T]`, fp32 (fp64 from fp64).
            teacher: the teacher's at the same positions; of another width if `needs_equal_widths` is off.
        """
        raise NotImplementedError(f"loss {self.name!r} defines no per_token(self, student, teacher)")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of each position, `[...]`, from outputs of two layers, `[..., H]`, in fp32 or fp64."""
        if student.shape[:-1] != teacher.shape[:-1] or (self.needs_equal_widths and student.shape != teacher.shape):
            raise ValueError(f"loss {self.name!r} cannot compare {[*student.shape]} with {[*teacher.shape]}")
        dtype = at_least_float32(student.dtype)
        with torch.autocast(student.device.type, enabled=False):
            values = self.per_token(student.flatten(0, -2).to(dtype), teacher.flatten(0, -2).to(dtype))
        return values.view(student.shape[:-1])

    def pairs(self, student: ModelShape, teacher: ModelShape) -> tuple[LayerPair, ...]:
        """The `(student, teacher)` layers it compares in such models; a `ConfigError` where one has no such layer."""
        try:
            return map_layers(self.options.layers, student.depth, teacher.depth, self.reads)
        except ConfigError as error:
            raise ConfigError(f"loss {self.name!r}: {error}") from None


class HiddenMSE(HiddenLoss):
    """`mean_h (s_h - t_h)^2` (FitNets, 1412.6550)."""

    name = "hidden_mse"

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean squared difference over the width."""
        return (student - teacher).square().mean(-1)


class HiddenCosine(HiddenLoss):
    """`1 - cos(s, t)` (DistilBERT, 1910.01108): directions are compared, lengths are not."""

    name = "hidden_cosine"

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """0 for equal directions, 2 for opposite ones."""
        return 1 - F.cosine_similarity(student, teacher, dim=-1)


class HiddenCKA(HiddenLoss):
    """`1 - |T'S|_F^2 / (|S'S|_F |T'T|_F)`, S and T centred over the tokens: linear CKA (1905.00414).

    It compares how tokens lie to one another, so widths may differ. It is a property of the micro-batch, given to each
    of its tokens: unlike the other losses it changes when a batch is split over accumulation steps or ranks.
    """

    name = "hidden_cka"
    needs_equal_widths = False

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The same number for all tokens, 0 to 1; a single token has no others to lie to, and counts 0."""
        if len(student) < 2:
            return student.sum(-1) * 0
        s, t = student - student.mean(0), teacher - teacher.mean(0)
        s, t = _to_size_one(s), _to_size_one(t)
        own = torch.linalg.matrix_norm(s.t() @ s) * torch.linalg.matrix_norm(t.t() @ t)
        alike = (t.t() @ s).square().sum() / own.clamp_min(1)  # less than 1 only where all tokens are equal: 0
        return (1 - alike).expand(len(student))


def _to_size_one(states: Tensor) -> Tensor:
    """The same up to a constant factor, the greatest entry 1 or -1; zeros stay zeros."""
    greatest = states.detach().abs().amax()
    return states / torch.where(greatest > 0, greatest, 1)


class AttentionKL(HiddenLoss):
    """`KL(p || q)` of each token's attention over the positions of its row, p the teacher's, q the student's.

    TinyBERT (1909.10351) compares attention maps head by head; here the mean over the heads is compared, whose numbers
    may differ.
    """

    name = "attention_kl"
    reads = "attentions"

    def per_token(self, student: Tensor, teacher: Tensor) -> Tensor:
        """In nats. Positions without attention count as if they had the smallest normal fp32 number's."""
        log_q = student.clamp_min(torch.finfo(torch.float32).tiny).log()
        return (torch.xlogy(teacher, teacher) - teacher * log_q).sum(-1)

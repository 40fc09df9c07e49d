"""The last step of a causal language model: hidden states to logits."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Names under which model configs keep a factor on the logits (Cohere, Muse, Falcon-H1).
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


@dataclass(frozen=True)
class LMHead:
    """`logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; without softcap, `scale * (...)`.

    Args:
        weight: `[V, H]`.
        bias: `[V]` or None.
        scale: Cohere's and Granite's factor on the logits.
        softcap: Gemma's final soft cap, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "LMHead":
        """Read the head off a transformers causal language model."""
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, getattr(head, "bias", None), _scale_of(config), softcap)

    def with_tensors(self, weight: Tensor, bias: Tensor | None) -> "LMHead":
        """The same head over other tensors: gathered, cast or cut ones."""
        return replace(self, weight=weight, bias=bias)

    def shape_logits(self, raw: Tensor) -> Tensor:
        """Apply scale and soft cap to `hidden @ weight.T + bias`; any shape. A raw -inf, no such token, stays -inf."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        if self.softcap is None:
            return scaled
        return (self.softcap * torch.tanh(scaled / self.softcap)).masked_fill(raw == -torch.inf, -torch.inf)

    def shape_gradient(self, raw: Tensor, gradient: Tensor) -> Tensor:
        """Turn, in place, the gradient by the shaped logits into the gradient by the `raw` ones."""
        if self.softcap is not None:
            gradient *= 1 - torch.tanh(raw * (self.scale / self.softcap)) ** 2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project `[..., H]` to logits `[..., V]`."""
        return self.shape_logits(torch.nn.functional.linear(hidden, self.weight, self.bias))


def _scale_of(config: Any) -> float:
    for name in _MULTIPLIERS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)

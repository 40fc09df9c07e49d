"""The last step of a causal language model: hidden states to logits."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError

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
        """Read the head off a transformers causal language model, with the LoRA on it added to its weight.

        Raises:
            ConfigError: another kind of adapter is on the head.
        """
        head = model.get_output_embeddings()
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(_weight_of(head), getattr(head, "bias", None), _scale_of(config), softcap)

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


def _weight_of(head: Any) -> Tensor:
    """The weight of a head that may carry an adapter (PEFT) which is in use."""
    weight: Tensor = head.weight
    if getattr(head, "disable_adapters", True) or hasattr(head, "modules_to_save"):
        return weight  # a head of `modules_to_save` gives the weight that is in use
    adapters = [name for name in head.active_adapters if name in getattr(head, "lora_A", ())]
    plain = adapters and not any(name in head.lora_variant or head.lora_bias[name] for name in adapters)
    if not plain:
        raise ConfigError(
            f"an adapter of {type(head).__name__} is on the head, where only plain LoRA can be (no use_dora, "
            "lora_bias or trainable_token_indices); leave the head out, or train all of it (modules_to_save)"
        )
    return weight if head.merged else weight + sum(head.get_delta_weight(name) for name in adapters)


def _scale_of(config: Any) -> float:
    for name in _MULTIPLIERS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)

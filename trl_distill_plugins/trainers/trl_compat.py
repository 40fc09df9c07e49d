"""Every private or experimental name of TRL this package uses. A new TRL release is a change of this file alone."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.import_utils import TRLExperimentalWarning
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.models.utils import _ForwardRedirection
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_config_model_id, maybe_gather_lm_head_ctx

from trl_distill_plugins.losses.head import LMHead

with warnings.catch_warnings():
    # It says that experimental names may change: this module is where that is dealt with.
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.gkd import GKDConfig, GKDTrainer

__all__ = [
    "GKDConfig",
    "GKDTrainer",
    "TeacherStandIn",
    "causal_collator",
    "get_config_model_id",
    "place_teacher",
    "run_inside_forward",
    "unwrap_model_for_generation",
    "whole_head",
    "whole_model",
    "whole_tensor",
]


def run_inside_forward(wrapper: nn.Module, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` as the forward of `model` inside `wrapper`, so that DDP, FSDP and DeepSpeed see it."""
    return _ForwardRedirection()(wrapper, model, function, *args)


@contextmanager
def whole_model(model: nn.Module | None) -> Iterator[None]:
    """Gather the weights that ZeRO-3 partitioned when it loaded `model`, for the time of the context. Collective."""
    if model is None or not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def causal_collator(pad_token_id: int) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """`SFTTrainer`'s collator: right-padded ids, labels and attention mask, `[B, T]`."""
    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id)


def place_teacher(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a frozen teacher as the run shards its student (DeepSpeed, FSDP), or move it to the device."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def whole_head(head: LMHead) -> Iterator[LMHead]:
    """The head with its whole weight, gathered for the time of the context from ZeRO-3 or FSDP2 shards."""
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        yield head.with_tensors(whole_tensor(head.weight), None if head.bias is None else whole_tensor(head.bias))


def whole_tensor(parameter: Tensor) -> Tensor:
    """Gather a weight from FSDP2 shards. Collective."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        return parameter.full_tensor()
    return parameter


class TeacherStandIn(nn.Module):
    """What `GKDTrainer.__init__` is given for a teacher: it insists on a model of the student's vocabulary and shards
    it, while here the teacher is a plugin that may be no model at all. Holds one number and is never called."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.config = SimpleNamespace(get_text_config=lambda: trainer.model.config.get_text_config())

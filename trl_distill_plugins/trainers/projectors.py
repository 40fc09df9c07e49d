"""Trained linear maps from the student's width to the teacher's.

They are a submodule of the student that trains, so that optimizer, DDP, FSDP and DeepSpeed treat them as the rest of
it. No saved model has them: a checkpoint keeps them in a file of their own.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.layers import LayerPair
from trl_distill_plugins.trainers import trl_compat

PROJECTORS_FILE = "distillation_projectors.safetensors"
_ATTRIBUTE = "distillation_projectors"


def projector_name(label: str, pair: LayerPair) -> str:
    """What the projector of a loss and a pair of layers is called; module names have no dots."""
    return f"{label.replace('.', '_')}_{pair[0]}_{pair[1]}"


def attach_projectors(student: Any, widths: Mapping[str, tuple[int, int]], seed: int) -> nn.ModuleDict:
    """Give `student` a projector for each name in `widths`, from the first width to the second.

    They start as `nn.Linear` does, from `seed` alone: the same on every rank, and whatever else draws random numbers.
    """
    trainable = next((weight.dtype for weight in student.parameters() if weight.requires_grad), torch.float32)
    device = student.get_output_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    projectors = nn.ModuleDict()
    for name, (width_in, width_out) in widths.items():
        linear = nn.utils.skip_init(nn.Linear, width_in, width_out, bias=False)
        nn.init.uniform_(linear.weight, -1 / math.sqrt(width_in), 1 / math.sqrt(width_in), generator)
        projectors[name] = linear
    projectors.to(device, trainable)
    if widths:
        student.add_module(_ATTRIBUTE, projectors)
        _leave_out_of_saved_models(student, projectors)
    return projectors


def detach_projectors(student: Any) -> None:
    """Take away the projectors that an earlier run left on `student`."""
    if hasattr(student, _ATTRIBUTE):
        delattr(student, _ATTRIBUTE)


def _leave_out_of_saved_models(student: Any, projectors: nn.ModuleDict) -> None:
    """Have `save_pretrained` pass them over. A PEFT adapter is saved by its own names anyway."""
    if isinstance(student, PreTrainedModel):
        names = {f"{_ATTRIBUTE}.{name}" for name, _ in projectors.named_parameters()}
        student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *names}


def project(projector: nn.Module, hidden: Tensor) -> Tensor:
    """Map `[N, H_s]` to `[N, H_t]`, in the dtype of the projector where autocast has no other."""
    return projector(hidden.to(next(projector.parameters()).dtype))


def save_projectors(projectors: nn.ModuleDict, folder: Path, *, is_writer: bool) -> None:
    """Write them to `folder`, which is made if need be. Collective: every rank calls it, one writes."""
    with trl_compat.whole_model(projectors):
        whole = {name: trl_compat.whole_tensor(weight.detach()) for name, weight in projectors.named_parameters()}
        if is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.cpu().contiguous() for name, weight in whole.items()}, folder / PROJECTORS_FILE)


def load_projectors(projectors: nn.ModuleDict, folder: Path) -> None:
    """Take over what `save_projectors` wrote. A `ConfigError` says that the checkpoint is of another objective."""
    path = folder / PROJECTORS_FILE
    saved = load_file(path) if path.is_file() else {}
    own = {name: list(weight.shape) for name, weight in projectors.named_parameters()}
    if {name: list(weight.shape) for name, weight in saved.items()} != own:
        raise ConfigError(
            f"{path} has the projectors {', '.join(saved) or 'none'}, and the losses of this run need those of "
            f"{', '.join(own)} in the models' widths; resume with the losses and models the checkpoint was made with"
        )
    projectors.load_state_dict(saved)

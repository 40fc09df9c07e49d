"""An exponential moving average of the weights of a model that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trl_distill_plugins.errors import TeacherError

AVERAGE_FILE = "distillation_average.safetensors"


class WeightAverage:
    """`average = decay * average + (1 - decay) * weights`, in fp32 for weights in half precision.

    It is kept apart from the model, which neither saves, synchronises nor optimises it. Only weights that train are
    averaged: of a model with LoRA the adapter's.

    Args:
        decay: 0 to 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._tensors: dict[str, Tensor] = {}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The average by the name of the weight; empty before `start`."""
        return self._tensors

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are, unless there is an average already."""
        if not self._tensors:
            self._tensors = {name: _copy(weight) for name, weight in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move it towards the present weights."""
        self.start(model)
        for name, weight in _trained(model).items():
            average = self._tensors[name]
            average.lerp_(weight.to(average.dtype), 1 - self.decay)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """The model with the average for its weights, for the time of the context; before `start` it stays itself."""
        weights = _trained(model) if self._tensors else {}
        own = {name: weight.data for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self._tensors[name].to(weight.dtype)
            yield
        finally:
            for name, weight in weights.items():
                weight.data = own[name]

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write it to `folder`, which is made if need be."""
        self.start(model)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in self._tensors.items()}, folder / AVERAGE_FILE)

    @torch.no_grad()
    def load(self, model: nn.Module, folder: Path) -> None:
        """Take over what `save` wrote of the same weights."""
        path, weights = folder / AVERAGE_FILE, _trained(model)
        if not path.is_file():
            raise TeacherError(f"{folder} has no {AVERAGE_FILE}: self:ema resumes from checkpoints of self:ema alone")
        saved = load_file(path)
        if {name: tensor.shape for name, tensor in saved.items()} != {n: w.shape for n, w in weights.items()}:
            raise TeacherError(f"{path} is the average of other weights than train now; resume with the same student")
        self._tensors = {name: saved[name].to(weight.device) for name, weight in weights.items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _copy(weight: Tensor) -> Tensor:
    is_half = weight.dtype in (torch.float16, torch.bfloat16)
    return weight.detach().to(torch.float32 if is_half else weight.dtype, copy=True)

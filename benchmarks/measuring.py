"""How the benchmarks of the loss engine measure: inputs, the bare matrix products, CPU time in turns, errors.

Time is CPU time of one thread; the runs take turns and the median over the rounds counts. 1.0 is nothing but the matrix
products that no method can avoid - student logits, teacher logits where the teacher is a model, grad hidden, grad
weight - into buffers that are there already: whole, or in tiles of 256 tokens, whichever is cheaper.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TILE = 256

Shape = tuple[int, int, int]
Gradients = tuple[Tensor, Tensor]


@dataclass
class Inputs:
    """Leaves of the student and tensors of the teacher; logits have a standard deviation of about 2."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    on_policy: Tensor

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype) -> "Inputs":
        n, vocab, width = shape
        gen = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=gen).mul_(scale).to(dtype)

        heads = [draw(vocab, width, scale=2 / width**0.5) for _ in range(2)]
        labels = torch.randint(0, vocab, (n,), generator=gen)
        hidden = draw(n, width).requires_grad_()
        return cls(hidden, heads[0].requires_grad_(), draw(n, width), heads[1], labels, torch.arange(n) % 2 == 0)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same in another dtype, with leaves of its own."""
        hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in (self.hidden, self.weight))
        teacher = self.teacher_hidden.to(dtype), self.teacher_weight.to(dtype)
        return Inputs(hidden, weight, *teacher, self.labels, self.on_policy)

    def __getitem__(self, rows: slice) -> "Inputs":
        hidden, teacher = self.hidden.detach()[rows].requires_grad_(), self.teacher_hidden[rows]
        return Inputs(hidden, self.weight, teacher, self.teacher_weight, self.labels[rows], self.on_policy[rows])

    def backward(self, loss: Tensor) -> Gradients:
        """Run backward and take the gradients out of the leaves."""
        loss.backward()
        hidden, weight = self.hidden.grad, self.weight.grad
        assert hidden is not None
        assert weight is not None
        self.hidden.grad = self.weight.grad = None
        return hidden, weight


class BareProducts:
    """The matrix products and nothing else, `rows` tokens at a time, into buffers allocated once."""

    def __init__(self, inputs: Inputs, rows: int, *, with_teacher: bool) -> None:
        self.rows, self.with_teacher = min(rows, len(inputs.hidden)), with_teacher
        self.student = inputs.hidden.new_zeros(self.rows, len(inputs.weight))
        self.teacher = torch.zeros_like(self.student)
        self.hidden, self.weight = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> None:
        for start in range(0, len(inputs.hidden), self.rows):
            tokens = slice(start, start + self.rows)
            student, teacher = (buffer[: len(inputs.hidden[tokens])] for buffer in (self.student, self.teacher))
            torch.mm(inputs.hidden[tokens], inputs.weight.t(), out=student)
            if self.with_teacher:
                torch.mm(inputs.teacher_hidden[tokens], inputs.teacher_weight.t(), out=teacher)
            torch.mm(student, inputs.weight, out=self.hidden[tokens])
            beta = 0 if start == 0 else 1
            torch.addmm(self.weight, student.t(), inputs.hidden[tokens], beta=beta, out=self.weight)


def cheaper_products(inputs: Inputs, *, with_teacher: bool) -> BareProducts:
    """The bare products in the one of two ways that is cheaper for these inputs."""
    ways = [BareProducts(inputs, rows, with_teacher=with_teacher) for rows in {TILE, len(inputs.hidden)}]
    seconds = take_turns({str(way.rows): partial(way, inputs) for way in ways}, rounds=3)
    return min(ways, key=lambda way: seconds[str(way.rows)])


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each run, the median over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def error_of(gradients: Gradients, exact: Gradients) -> float:
    """The larger of the relative errors (Frobenius norm) of the two gradients."""
    return max(((g.to(e.dtype) - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True))

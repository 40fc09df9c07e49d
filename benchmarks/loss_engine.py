"""What the loss engine costs next to its floor and its peers: CPU time and memory, forward and backward.

Every method gets the student's hidden states and head, the teacher's, and returns the gradients by the student's hidden
states and head weight. Time is CPU time of one thread; the methods take turns, and the median over the rounds counts.
1.0 is the cheaper of two ways to do nothing but the four matrix products that no method can avoid (student logits,
teacher logits, grad hidden, grad weight), into buffers that are there already: whole, or in tiles of 256 tokens.

Memory is measured in a process of its own. The baseline is the resident size while the inputs AND one set of gradients
exist; then the gradients are freed, the method runs once, and its peak (VmHWM, reset before) minus the baseline is what
it needs beyond its result. The error is the larger of the relative errors (Frobenius norm) of the two gradients,
against full logits in fp32 of the same inputs.

    python benchmarks/loss_engine.py [--quick] [--json FILE]
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = [(512, 32000, 1024), (2048, 32000, 512), (512, 151936, 512)]
MEMORY_SHAPE = (2048, 32000, 1024)
LOSSES = {"forward_kl": 0.0, "jsd": 0.5}  # name here and beta of the peers, in which 0 means forward KL
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TILE = 256

Gradients = tuple[Tensor, Tensor]


@dataclass
class Inputs:
    """Leaves of the student and tensors of the teacher; logits have a standard deviation of about 2."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int], dtype: torch.dtype) -> "Inputs":
        n, vocab, width = shape
        gen = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=gen).mul_(scale).to(dtype)

        heads = [draw(vocab, width, scale=2 / width**0.5) for _ in range(2)]
        labels = torch.randint(0, vocab, (n,), generator=gen)
        return cls(draw(n, width).requires_grad_(), heads[0].requires_grad_(), draw(n, width), heads[1], labels)

    def backward(self, loss: Tensor) -> Gradients:
        """Run backward and take the gradients out of the leaves."""
        loss.backward()
        hidden, weight = self.hidden.grad, self.weight.grad
        assert hidden is not None
        assert weight is not None
        self.hidden.grad = self.weight.grad = None
        return hidden, weight


class BareProducts:
    """The four matrix products and nothing else, `rows` tokens at a time, into buffers allocated once."""

    def __init__(self, inputs: Inputs, rows: int) -> None:
        self.rows = rows
        self.student = inputs.hidden.new_zeros(rows, len(inputs.weight))
        self.teacher = torch.zeros_like(self.student)
        self.hidden, self.weight = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> None:
        for start in range(0, len(inputs.hidden), self.rows):
            tokens = slice(start, start + self.rows)
            torch.mm(inputs.hidden[tokens], inputs.weight.t(), out=self.student)
            torch.mm(inputs.teacher_hidden[tokens], inputs.teacher_weight.t(), out=self.teacher)
            torch.mm(self.student, inputs.weight, out=self.hidden[tokens])
            beta = 0 if start == 0 else 1
            torch.addmm(self.weight, self.student.t(), inputs.hidden[tokens], beta=beta, out=self.weight)


def ours(inputs: Inputs, loss: str) -> Gradients:
    from trl_distill_plugins.losses.chunked import chunked_objective
    from trl_distill_plugins.losses.head import LMHead
    from trl_distill_plugins.losses.objective import Objective
    from trl_distill_plugins.losses.signals import DenseSignal

    teacher = DenseSignal(inputs.teacher_hidden, LMHead(inputs.teacher_weight))
    output = chunked_objective(
        Objective.from_config([loss]), inputs.hidden, LMHead(inputs.weight), inputs.labels, teacher,
        normalizer=len(inputs.labels),
    )  # fmt: skip
    return inputs.backward(output.loss)


def trl_full_logits(inputs: Inputs, loss: str) -> Gradients:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = inputs.hidden @ inputs.weight.t(), inputs.teacher_hidden @ inputs.teacher_weight.t()
    return inputs.backward(GKDTrainer.generalized_jsd_loss(student, teacher, beta=LOSSES[loss]))


def trl_chunked(inputs: Inputs, loss: str) -> Gradients:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.teacher_weight, None, LOSSES[loss]
    )
    return inputs.backward(divergence.mean())


def liger(inputs: Inputs, loss: str) -> Gradients:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=LOSSES[loss], compiled=False)
    head = inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    return inputs.backward(function(inputs.hidden, *head, inputs.labels))


Method = Callable[[Inputs, str], Gradients]
METHODS: dict[str, Method] = {
    "ours": ours,
    "TRL GKD, full logits": trl_full_logits,
    "TRL chunked": trl_chunked,
    "Liger chunked": liger,
}


def installed_methods(console: Console) -> dict[str, Method]:
    """The methods at hand: Liger is no dependency of this project, and is left out, in words, where it is missing."""
    if importlib.util.find_spec("liger_kernel") is not None:
        return METHODS
    console.print("Liger is left out: `pip install liger-kernel` brings it in")
    return {name: method for name, method in METHODS.items() if method is not liger}


def reference_gradients(inputs: Inputs, loss: str) -> Gradients:
    """Full logits in fp32, tile by tile only to bound this script's own memory."""
    hidden, weight = (t.detach().float().requires_grad_() for t in (inputs.hidden, inputs.weight))
    teacher_hidden, teacher_weight = inputs.teacher_hidden.float(), inputs.teacher_weight.float()
    for start in range(0, len(hidden), 64):
        tokens = slice(start, start + 64)
        log_q = (hidden[tokens] @ weight.t()).log_softmax(-1)
        log_p = (teacher_hidden[tokens] @ teacher_weight.t()).log_softmax(-1)
        if loss == "forward_kl":
            total = (log_p.exp() * (log_p - log_q)).sum()
        else:
            log_m = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
            total = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum()
        (total / len(hidden)).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def error_of(gradients: Gradients, exact: Gradients) -> float:
    return max(((g.float() - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True))


@dataclass
class Figure:
    shape: tuple[int, int, int]
    dtype: str
    loss: str
    method: str
    seconds: float
    ratio: float
    error: float | None


def measure_time(
    shape: tuple[int, int, int], dtype: str, loss: str, methods: dict[str, Method], rounds: int
) -> list[Figure]:
    """Let the bare products and all methods take turns."""
    inputs = Inputs.make(shape, DTYPES[dtype])
    exact = reference_gradients(inputs, loss)
    errors = {name: error_of(method(inputs, loss), exact) for name, method in methods.items()}
    del exact
    runs: dict[str, Callable[[], object]] = {
        "bare products, whole": partial(BareProducts(inputs, shape[0]), inputs),
        "bare products, tiles": partial(BareProducts(inputs, TILE), inputs),
        **{name: partial(method, inputs, loss) for name, method in methods.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    floor = min(taken for name, taken in medians.items() if name.startswith("bare"))
    return [Figure(shape, dtype, loss, n, t, t / floor, errors.get(n)) for n, t in medians.items()]


def memory_status(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measure_memory(method: str, dtype: str, loss: str) -> float:
    """MB above the gradients; run in a process of its own."""
    METHODS[method](Inputs.make((8, 64, 8), DTYPES[dtype]), loss)
    inputs = Inputs.make(MEMORY_SHAPE, DTYPES[dtype])
    gradients = [torch.ones_like(inputs.hidden), torch.ones_like(inputs.weight)]
    baseline = memory_status("VmRSS")
    gradients.clear()
    Path("/proc/self/clear_refs").write_text("5")
    METHODS[method](inputs, loss)
    return memory_status("VmHWM") - baseline


def memory_in_subprocess(method: str, dtype: str, loss: str) -> float:
    command = [sys.executable, __file__, "--memory-of", method, dtype, loss]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table_of(figures: list[Figure]) -> Table:
    first = figures[0]
    table = Table("method", "CPU s", "ratio", "gradient error", title=f"{first.shape} {first.dtype} {first.loss}")
    for f in figures:
        table.add_row(f.method, f"{f.seconds:.2f}", f"{f.ratio:.2f}", "" if f.error is None else f"{f.error:.2g}")
    return table


def memory_table(memory: dict[str, list[float]], variants: list[tuple[str, str]]) -> Table:
    table = Table("method", *map(" ".join, variants), title=f"MB above the gradients, {MEMORY_SHAPE}")
    for method, row in memory.items():
        table.add_row(method, *(f"{mb:.0f}" for mb in row))
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time and memory of the loss engine and its peers.")
    parser.add_argument("--quick", action="store_true", help="time the first shape, memory of fp32 forward KL only")
    parser.add_argument("--rounds", type=int, default=5, help="how often each method is timed")
    parser.add_argument("--only-ours", action="store_true", help="leave the peers out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--memory-of", nargs=3, metavar=("METHOD", "DTYPE", "LOSS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(measure_memory(*args.memory_of))
        return
    console = Console()
    methods: dict[str, Method] = {"ours": ours} if args.only_ours else installed_methods(console)
    figures: list[Figure] = []
    for shape, dtype, loss in itertools.product(SHAPES[:1] if args.quick else SHAPES, DTYPES, LOSSES):
        measured = measure_time(shape, dtype, loss, methods, args.rounds)
        console.print(table_of(measured))
        figures += measured
    variants = list(itertools.product(DTYPES, LOSSES))[: 1 if args.quick else None]
    memory = {method: [memory_in_subprocess(method, *variant) for variant in variants] for method in methods}
    console.print(memory_table(memory, variants))
    if args.json:
        args.json.write_text(json.dumps({"time": [asdict(f) for f in figures], "memory_mb": memory}, indent=1))


if __name__ == "__main__":
    main()

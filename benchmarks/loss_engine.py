"""What the loss engine costs next to its floor, to plain torch and to its peers, forward and backward.

Two parts. `losses`: every installed token loss with its default options, a third party's loss without and with a closed
form of its gradient, and sparse teachers, in fp32 at one shape. `peers`: forward KL and JSD over shapes, in fp32 and
bf16, against all that others have. How times and memory are taken is told in measuring.py and memory.py, what is
compared in contestants.py.

Ratios are to the bare matrix products: four, or three where the teacher is no model. "naive" is the loss's formula on
full logits with autograd. The error is the larger relative error of the two gradients against `naive` of the same
inputs: in `losses` that of ours, against fp64, in `peers` against fp32. Memory is in MB above inputs and gradients, in
`peers` at (2048, 32000, 1024). In `losses` errors and memory are taken at a hidden width of 128, where the products are
short and the logits as large as at any other. TRL's kernels run in torch on a CPU, and so does Liger's.

    python benchmarks/loss_engine.py [losses] [peers] [--quick] [--json FILE]
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import HAS_LIGER, METHODS, Case, dense_cases, peers_of, reference_gradients, signal_of, sparse_cases
from measuring import DTYPES, BareProducts, Inputs, Shape, cheaper_products, error_of, take_turns
from memory import memory_above_gradients
from rich.console import Console
from rich.table import Table

SHAPES: list[Shape] = [(512, 32000, 1024), (2048, 32000, 512), (512, 151936, 512)]
NARROW = 128  # hidden width where only the logits matter
LOSSES_MEMORY_SHAPE: Shape = (2048, 32000, NARROW)
PEERS_MEMORY_SHAPE: Shape = (2048, 32000, 1024)
PEER_LOSSES = ("forward_kl", "jsd")
KERNELS = ("TRL chunked", "Liger chunked")

Figures = dict[str, Any]


def measure_time(inputs: Inputs, case: Case, methods: Sequence[str], rounds: int, products: BareProducts) -> Figures:
    """CPU seconds of the bare products and of all methods, in turns, and their ratios."""
    signal, small = signal_of(inputs, case), Inputs.make((8, 64, 8), inputs.hidden.dtype)
    for name in methods:  # imports and compiles what it needs
        METHODS[name](small, case, signal_of(small, case))
    runs = {name: partial(METHODS[name], inputs, case, signal) for name in methods}
    seconds = take_turns({"bare products": partial(products, inputs), **runs}, rounds)
    ratios = {name: taken / seconds["bare products"] for name, taken in seconds.items()}
    return {"loss": case.title, "seconds": seconds, "ratios": ratios}


def measure_errors(inputs: Inputs, case: Case, methods: Sequence[str], dtype: torch.dtype) -> dict[str, float]:
    """Errors of the gradients against `naive` in `dtype`."""
    exact, signal = reference_gradients(inputs, case, dtype), signal_of(inputs, case)
    return {name: error_of(METHODS[name](inputs, case, signal), exact) for name in methods}


def note(what: str) -> None:
    """Say on stderr what is being measured."""
    print(what, file=sys.stderr, flush=True)


def run_losses(options: argparse.Namespace, console: Console) -> list[Figures]:
    """One row a loss."""
    shape, figures = options.shape or SHAPES[0], []
    inputs, narrow = (Inputs.make(size, torch.float32) for size in (shape, (*shape[:2], NARROW)))
    products = {dense: cheaper_products(inputs, with_teacher=dense) for dense in (True, False)}
    for case in chosen_cases(options.losses):
        methods = (
            ["ours"] if options.only_ours else ["ours", "naive", *(peer for peer in peers_of(case) if peer in KERNELS)]
        )
        note(f"{case.title}: {', '.join(methods)}")
        figure = measure_time(inputs, case, methods, options.rounds, products[case.has_teacher_product])
        figure["errors"] = measure_errors(narrow, case, ["ours"], torch.float64)
        memory = {name: memory_above_gradients(name, case, LOSSES_MEMORY_SHAPE, "fp32") for name in methods[:2]}
        figures.append({**figure, "memory_mb": memory})
    console.print(losses_table(figures, shape))
    return figures


def chosen_cases(names: list[str] | None) -> list[Case]:
    """All rows, or those of the losses named."""
    cases = dense_cases() + sparse_cases()
    if not names:
        return cases
    chosen = [case for case in cases if case.title.split(",")[0] in names]
    missing = set(names) - {case.title.split(",")[0] for case in chosen}
    if missing:
        raise SystemExit(f"no row of {', '.join(sorted(missing))}; there are {', '.join(c.title for c in cases)}")
    return chosen


def losses_table(figures: list[Figures], shape: Shape) -> Table:
    others = ["naive", *(name for name in METHODS if name in KERNELS)]
    headings = ["loss", "products", "ours", *others, "error", "ours, MB", "naive, MB", "share"]
    table = Table(*headings, title=f"{shape} fp32, ratio to the bare products; memory at {LOSSES_MEMORY_SHAPE}")
    for figure in figures:
        ratios, memory = figure["ratios"], figure["memory_mb"]
        ours, naive = memory["ours"], memory.get("naive")
        table.add_row(
            figure["loss"], f"{figure['seconds']['bare products']:.2f} s", f"{ratios['ours']:.2f}",
            *(f"{ratios[name]:.2f}" if name in ratios else "" for name in others),
            f"{figure['errors']['ours']:.1e}", f"{ours:.0f}",
            "" if naive is None else f"{naive:.0f}", "" if naive is None else f"{ours / naive:.3f}",
        )  # fmt: skip
    return table


def run_peers(options: argparse.Namespace, console: Console) -> Figures:
    """Forward KL and JSD over shapes and dtypes; then their memory."""
    shapes = [options.shape] if options.shape else SHAPES[: 1 if options.quick else None]
    cases = [case for case in chosen_cases(options.losses) if case.title in PEER_LOSSES]
    methods = {case.title: ["ours"] if options.only_ours else ["ours", *peers_of(case)] for case in cases}
    figures = []
    for shape, dtype, case in itertools.product(shapes, DTYPES, cases):
        note(f"{shape} {dtype} {case.title}: time")
        inputs = Inputs.make(shape, DTYPES[dtype])
        products = cheaper_products(inputs, with_teacher=True)
        figure = measure_time(inputs, case, methods[case.title], options.rounds, products)
        figure["errors"] = measure_errors(inputs, case, methods[case.title], torch.float32)
        console.print(peers_table(figure, f"{shape} {dtype} {case.title}"))
        figures.append({"shape": shape, "dtype": dtype, **figure})
    variants = list(itertools.product(DTYPES, cases))[: 1 if options.quick else None]
    memory = [memory_of_peers(dtype, case, methods[case.title]) for dtype, case in variants]
    headings = [f"{dtype} {case.title}" for dtype, case in variants]
    console.print(memory_table(dict(zip(headings, memory, strict=True))))
    return {"time": figures, "memory_mb": dict(zip(headings, memory, strict=True))}


def memory_of_peers(dtype: str, case: Case, methods: Sequence[str]) -> dict[str, float]:
    note(f"{PEERS_MEMORY_SHAPE} {dtype} {case.title}: memory")
    return {name: memory_above_gradients(name, case, PEERS_MEMORY_SHAPE, dtype) for name in methods}


def peers_table(figure: Figures, title: str) -> Table:
    table = Table("method", "CPU s", "ratio", "gradient error", title=title)
    for name, seconds in figure["seconds"].items():
        error = f"{figure['errors'][name]:.2g}" if name in figure["errors"] else ""
        table.add_row(name, f"{seconds:.2f}", f"{figure['ratios'][name]:.2f}", error)
    return table


def memory_table(memory: dict[str, dict[str, float]]) -> Table:
    table = Table("method", *memory, title=f"MB above the gradients, {PEERS_MEMORY_SHAPE}")
    for method in next(iter(memory.values()), {}):
        table.add_row(method, *(f"{column[method]:.0f}" for column in memory.values()))
    return table


def shape_argument(text: str) -> Shape:
    n, vocabulary, width = (int(part) for part in text.split(","))
    return n, vocabulary, width


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="losses, peers (default: both)")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="only the rows of these losses")
    parser.add_argument("--shape", type=shape_argument, metavar="N,V,H", help="time this shape only")
    parser.add_argument("--rounds", type=int, default=3, help="how often each method is timed (default 3)")
    parser.add_argument("--only-ours", action="store_true", help="leave naive and the peers out")
    parser.add_argument("--quick", action="store_true", help="one round; of `peers` the first shape, and one memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if unknown := set(options.parts) - {"losses", "peers"}:
        parser.error(f"no part {', '.join(unknown)}; there are losses and peers")
    if options.quick:
        options.rounds = 1
    return options


def main() -> None:
    options = parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if not HAS_LIGER:
        note("Liger is left out: `pip install liger-kernel` brings it in")
    parts = options.parts or ["losses", "peers"]
    report: Figures = {}
    if "losses" in parts:
        report["losses"] = run_losses(options, console)
    if "peers" in parts:
        report["peers"] = run_peers(options, console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

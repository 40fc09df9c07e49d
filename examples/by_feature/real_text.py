"""Distil on real text, and compare with plain supervised training of the same student for the same number of steps.

    python examples/by_feature/real_text.py --data DIR [--quick] [--json FILE]

DIR holds train.jsonl and test.jsonl with the columns `question` and `answer`; GSM8K is made that way. The script trains
a BPE tokenizer and a teacher (hidden 256, 4 layers) on the text of both columns, then the same student (hidden 128, 3
layers) twice from the same weights on the same batches: on the text itself (cross-entropy), and on the teacher's
distribution (forward KL). All three are evaluated on the first 200 rows of test.jsonl. Some 10 minutes on one core
(OMP_NUM_THREADS=1), one with --quick.
"""

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

VOCABULARY, LENGTH = 2048, 256
TEACHER = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768}
STUDENT = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 384}
TEACHER_STEPS, STUDENT_STEPS, TEST_ROWS = 2000, 500, 200
TEACHER_BATCH, STUDENT_BATCH = 1, 2  # rows of LENGTH tokens: with so little text, many small steps learn the most
FIGURES = {
    "cross_entropy": ("held-out cross-entropy, nats a token", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "mean_token_accuracy": ("next-token accuracy", "{:.1%}"),
    "teacher_kl": ("KL to the teacher, nats a token", "{:.3f}"),
    "teacher_top1_agreement": ("top-1 agreement with the teacher", "{:.1%}"),
    "steps": ("steps", "{:.0f}"),
    "tokens": ("tokens trained", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def load_texts(file: Path) -> Dataset:
    """One `text` a problem: the question, then the answer."""
    rows = load_dataset("json", data_files=str(file), split="train")
    return rows.map(lambda row: {"text": f"Question: {row['question']}\nAnswer: {row['answer']}"}).select_columns(
        "text"
    )


def train_tokenizer(texts: Dataset) -> PreTrainedTokenizerFast:
    """A byte-level BPE made from these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts["text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", model_max_length=LENGTH)


def make_model(shape: dict[str, int]) -> LlamaForCausalLM:
    """A Llama with random weights, the same ones each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Run:
    """What the trainings share: data, tokenizer and a folder."""

    def __init__(self, data: Path, folder: str, test_rows: int) -> None:
        self.train, self.test = load_texts(data / "train.jsonl"), load_texts(data / "test.jsonl")
        self.test = self.test.select(range(min(test_rows, len(self.test))))
        self.tokenizer, self.folder = train_tokenizer(self.train), folder

    def trainer(self, model: Any, teacher: Any, losses: list[str], **options: Any) -> DistillSFTTrainer:
        """The trainer for `model`; cross-entropy is one of the losses, so plain training needs no other class."""
        args = DistillSFTConfig(
            output_dir=self.folder, losses=losses, max_length=LENGTH,
            packing=True, packing_strategy="wrapped", eval_packing=False, gradient_checkpointing=False, bf16=False,
            use_cpu=True, lr_scheduler_type="cosine", report_to="none", save_strategy="no", logging_steps=100,
            **options,
        )  # fmt: skip
        return DistillSFTTrainer(
            model, teacher_model=teacher, args=args, processing_class=self.tokenizer,
            train_dataset=self.train, eval_dataset=self.test,
        )  # fmt: skip

    def fit(self, shape: dict[str, int], steps: int, teacher: Any = None) -> tuple[Any, dict[str, float]]:
        """Train a new model: on the teacher's distribution if there is one, else on the text."""
        losses = ["cross_entropy"] if teacher is None else ["forward_kl"]
        batch = TEACHER_BATCH if shape is TEACHER else STUDENT_BATCH
        trainer = self.trainer(
            make_model(shape), teacher, losses, max_steps=steps, per_device_train_batch_size=batch,
            learning_rate=2e-3, warmup_steps=20, adam_beta2=0.98,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        seconds, lines = time.perf_counter() - start, trainer.state.log_history
        trained = sum(line.get("trained_tokens", 0) for line in lines)
        return trainer.model, {"steps": steps, "tokens": trained, "seconds": seconds}

    def evaluate(self, model: Any, teacher: Any) -> dict[str, float]:
        """Held-out figures per token: cross-entropy with the text, and how far the model is from the teacher."""
        figures = self.trainer(model, teacher, ["cross_entropy", "forward_kl"]).evaluate()
        entropy = figures["eval_loss/cross_entropy"]
        kept = {name: figures[f"eval_{name}"] for name in FIGURES if f"eval_{name}" in figures}
        return {"cross_entropy": entropy, "perplexity": math.exp(entropy), **kept}


def main() -> None:
    """Train the three, evaluate, show, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    share = 0.1 if options.quick else 1.0
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.data, folder, int(share * TEST_ROWS))
        teacher, cost = run.fit(TEACHER, int(share * TEACHER_STEPS))
        results = {"teacher": run.evaluate(deepcopy(teacher), teacher) | cost}
        for name, guide in (("student, cross-entropy", None), ("student, forward KL", teacher)):
            student, cost = run.fit(STUDENT, int(share * STUDENT_STEPS), guide)
            results[name] = run.evaluate(student, teacher) | cost
    table = Table("", *results)
    for key, (title, form) in FIGURES.items():
        table.add_row(title, *(form.format(figures[key]) for figures in results.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()
    main()

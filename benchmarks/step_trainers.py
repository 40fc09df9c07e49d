"""The trainers whose steps `training_step.py` measures: ours, TRL's, transformers'."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer

BATCH, LENGTH, VOCABULARY = 4, 512, 32000
STUDENT = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024}
TEACHER = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1664}


def make_model(shape: dict[str, int]) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(shape["hidden_size"])
    heads = shape["hidden_size"] // 64
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=heads, tie_word_embeddings=True, pad_token_id=0, **shape)
    )


def make_rows(steps: int) -> Dataset:
    """Rows of random tokens, enough for `steps` steps."""
    ids = torch.randint(3, VOCABULARY, (BATCH * steps, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The trainers ask for one; the rows are tokens already."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_trainer(variant: str, steps: int, output_dir: str) -> Trainer:
    """The trainer of `variant`, ready to `train()` for `steps` steps in silence."""
    trainer = _make_trainer(variant, steps, output_dir)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_trainer(variant: str, steps: int, output_dir: str) -> Trainer:
    from transformers import TrainingArguments
    from trl import SFTConfig, SFTTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer

    args = {
        "output_dir": output_dir, "per_device_train_batch_size": BATCH, "max_steps": steps, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    common = {"model": make_model(STUDENT), "train_dataset": make_rows(steps)}
    common["data_collator"] = DataCollatorForLanguageModeling(pad_token_id=0)
    if variant == "transformers CE":
        return Trainer(args=TrainingArguments(**args), **common)
    common["processing_class"] = make_tokenizer()
    if variant == "TRL SFT":
        return SFTTrainer(args=SFTConfig(**args), **common)
    if variant.startswith("TRL GKD"):
        beta = 0.5 if "JSD" in variant else 0.0
        return GKDTrainer(args=GKDConfig(lmbda=0.0, beta=beta, **args), teacher_model=make_model(TEACHER), **common)
    losses = [{"name": "jsd", "beta": 0.5}] if "JSD" in variant else ["forward_kl"]
    config = DistillSFTConfig(losses=losses, **args)
    if "cached" not in variant:
        return DistillSFTTrainer(args=config, teacher_model=make_model(TEACHER), **common)
    folder = Path(output_dir, "cache")
    # In a process of its own, so that the teacher does not count in this one's memory.
    subprocess.run([sys.executable, __file__, str(folder), str(steps)], check=True, capture_output=True)
    return DistillSFTTrainer(args=config, teacher_model=f"cache:{folder}", **common)


def build_cache(folder: Path, steps: int) -> None:
    """What the teacher says about the rows of so many steps: its 64 likeliest tokens of each position."""
    from trl_distill_plugins.teachers.cache.building import fill_cache
    from trl_distill_plugins.teachers.cache.documents import documents_of
    from trl_distill_plugins.teachers.cache.header import make_header
    from trl_distill_plugins.teachers.cache.selection import TopK
    from trl_distill_plugins.teachers.cache.store import CacheStore
    from trl_distill_plugins.teachers.completions import Ranks
    from trl_distill_plugins.teachers.local import LocalTeacher

    model, selection = make_model(TEACHER), TopK(64)
    header = make_header(
        teacher="random", model=model, tokenizer=make_tokenizer(), prompt_template=None, selection=selection
    )
    ids = torch.tensor(make_rows(steps)["input_ids"])
    documents = list(documents_of({"input_ids": ids}, torch.ones(len(ids), LENGTH - 1, dtype=torch.bool)))
    fill_cache(
        CacheStore.create(folder, header), LocalTeacher(model), documents, selection,
        vocabulary=VOCABULARY, batch_size=BATCH, device=torch.device("cpu"), ranks=Ranks(),
    )  # fmt: skip


if __name__ == "__main__":
    build_cache(Path(sys.argv[1]), int(sys.argv[2]))

"""What the examples share: their command line, and models and rows small enough to run offline in seconds.

Not part of the package. Give --student and --teacher (paths or hub names) to run an example on real models.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUMS = Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)])


def parse(description: str | None) -> argparse.Namespace:
    """The options every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="path or hub name (default: a tiny model with random weights)")
    parser.add_argument("--teacher", help="path or hub name (default: a tiny model with random weights)")
    parser.add_argument("--output_dir", default="runs/example")
    parser.add_argument("--max_steps", type=int, default=3)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Training arguments that have nothing to do with distillation."""
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": options.output_dir,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": has_gpu,
        "use_cpu": not has_gpu,
    }


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Student, teacher and their tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(options.student) if options.student else _tokenizer()
    return _model(options.student, 32, tokenizer), _model(options.teacher, 64, tokenizer), tokenizer


def _model(name: str | None, hidden: int, tokenizer: Any) -> Any:
    if name:
        return AutoModelForCausalLM.from_pretrained(name)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SUMS["prompt"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast

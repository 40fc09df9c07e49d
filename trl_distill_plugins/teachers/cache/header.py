"""What a cache says of itself, so that it is not used where it does not fit."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

from trl_distill_plugins.teachers.cache.selection import Selection

# Of records and of what they are found by. A cache of another format is built anew.
FORMAT = 2
_SAMPLE = 1024


def make_header(
    *, teacher: str, model: Any, tokenizer: Any, prompt_template: Any, selection: Selection
) -> dict[str, Any]:
    """The fields of a cache's header.

    Args:
        teacher: the name it was asked for by.
        model: the teacher's module, whose weights are its revision; or the revision of one whose module is elsewhere.
        tokenizer: the student's, which is the teacher's.
        prompt_template: `teacher_prompt_template` as the config has it; None where the teacher sees the row's prompt.
        selection: which tokens are kept.
    """
    return {
        "format": FORMAT,
        "teacher": teacher,
        "weights": model if isinstance(model, str) else weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": len(tokenizer),
        "teacher_prompt_template": prompt_template,
        "form": selection.form,
        **asdict(selection),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the tokens and their ids."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1])
    return _digest([json.dumps(tokens).encode()])


def weights_fingerprint(model: Any) -> str:
    """A digest of names, shapes and evenly spread numbers of a model's weights."""
    parts = []
    for name, weight in model.state_dict().items():
        if isinstance(weight, torch.Tensor):
            flat = weight.detach().flatten()
            spread = flat[:: max(1, len(flat) // _SAMPLE)].to("cpu", torch.float32)
            parts += [f"{name} {tuple(weight.shape)} {weight.dtype}".encode(), spread.numpy().tobytes()]
    return _digest(parts)


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return f"blake2b:{digest.hexdigest()}"

"""A teacher with another tokenizer: what it says at its own positions, brought to those of the student that align."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.vocabulary import SharedVocabulary
from trl_distill_plugins.prompts.alignment import TokenAlignment, shared_classes
from trl_distill_plugins.prompts.collator import completions_of
from trl_distill_plugins.prompts.encoding import Encoder


class TeacherAlignment:
    """Turns a signal about the teacher's tokens into one about the student's; `tokens` aligns a single completion.

    Raises `ConfigError` for a tokenizer whose tokens have no bytes of their own.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        student, teacher = Encoder(student_tokenizer), Encoder(teacher_tokenizer, "teacher")
        self.tokens = TokenAlignment(student, teacher)
        self._vocabulary = SharedVocabulary.of(shared_classes(student, teacher))

    def __call__(self, signal: DenseSignal, labels: Tensor, teacher_labels: Tensor) -> DenseSignal:
        """The signal at the student's trained positions; it covers those that align.

        Args:
            signal: about the teacher's trained positions.
            labels: the student's, `[B, T]`.
            teacher_labels: the teacher's, `[B, T_t]`.
        """
        rows = torch.tensor(self.rows(labels, teacher_labels), dtype=torch.long, device=signal.hidden.device)
        self._vocabulary = self._vocabulary.on(signal.hidden.device)
        covered = rows >= 0
        return replace(signal, hidden=signal.hidden[rows.clamp_min(0)], vocabulary=self._vocabulary, covered=covered)

    def rows(self, labels: Tensor, teacher_labels: Tensor) -> list[int]:
        """For each trained position of the student the index of the teacher's that aligns, or -1."""
        found: list[int] = []
        start = 0
        for row, own_row in zip(completions_of(labels), completions_of(teacher_labels), strict=True):
            for completion, own in zip(row, own_row, strict=True):
                found += [index + start if index >= 0 else -1 for index in self.tokens.pairs(completion, own)]
                start += len(own)
        return found

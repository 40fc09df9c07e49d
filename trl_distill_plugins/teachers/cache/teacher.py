"""A teacher that was asked before: its signals come from a cache on disk."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import DataError, TeacherError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers import load_tokenizer
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.cache.codec import decode
from trl_distill_plugins.teachers.cache.documents import Document, documents_of
from trl_distill_plugins.teachers.cache.header import FORMAT, tokenizer_fingerprint
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.completions import FILE_NAME, CompletionStore, Ranks, completion_in, make_request


class CachedTeacher(Teacher):
    """`teacher_model_name_or_path: "cache:DIR"`, DIR being what `trl-distill cache build` made.

    Its signals are sparse. Completions it wrote while the cache was built are given again, others it cannot write.

    Args:
        address: the folder.
        init_kwargs: not used. They load a model, and the config that built the cache has them.
    """

    name = "cache"

    def __init__(self, address: str, **init_kwargs: Any) -> None:
        try:
            self._store = CacheStore(Path(address))
        except DataError as error:
            raise TeacherError(str(error)) from error
        self._check({"format": FORMAT})
        self.form = self._store.header["form"]
        self._tokenizer: Any = None

    @classmethod
    def load_tokenizer(cls, address: str, **init_kwargs: Any) -> Any:
        """The tokenizer of the teacher whose word the cache holds."""
        cached = cls(address, **init_kwargs)
        tokenizer = load_tokenizer(cached._store.header["teacher"])
        if tokenizer is None:
            raise TeacherError(
                f"{cached} finds completions by token ids, and its teacher has no tokenizer here; take those of the "
                f"build from {cached._store.folder / FILE_NAME}, or ask that teacher"
            )
        return tokenizer

    def __str__(self) -> str:
        """The folder, and whose word is in it."""
        return f"cache:{self._store.folder} (of {self._store.header['teacher']})"

    def check_student(self, tokenizer: Any) -> None:
        """Raise `TeacherError` unless the cache was built with this tokenizer."""
        self._tokenizer = tokenizer
        self._check({"vocabulary": len(tokenizer), "tokenizer": tokenizer_fingerprint(tokenizer)})

    def check_prompt(self, template: Any) -> None:
        """Raise `TeacherError` unless the teacher saw prompts of this template."""
        self._check({"teacher_prompt_template": template})

    def _check(self, fields: dict[str, Any]) -> None:
        try:
            self._store.check({**self._store.header, **fields})
        except DataError as error:
            raise TeacherError(str(error)) from error

    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """There is no model to place."""

    def move_to(self, device: Any) -> None:
        """There is no model to move."""

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> SparseSignal:
        """Look up what the teacher said of each document of the batch.

        Raises:
            TeacherError: some of them are not in the cache.
        """
        documents = list(documents_of(inputs, trained))
        blobs = [self._store.get(document.key) for document in documents]
        missing = [document for document, blob in zip(documents, blobs, strict=True) if blob is None]
        if missing:
            raise TeacherError(self._explain(missing, len(documents)))
        return _joined([decode(blob) for blob in blobs if blob is not None]).on(trained.device)

    def _explain(self, missing: list[Document], count: int) -> str:
        first = missing[0].ids
        text = "" if self._tokenizer is None else f", which begins {self._tokenizer.decode(first[:12])!r}"
        return (
            f"{self} lacks {len(missing)} of the {count} texts of a batch; the first has {len(first)} tokens{text}. "
            "Rows, templates, max_length and max_teacher_length must be those it was built with; `trl-distill cache "
            "build` with this run's options adds what is missing"
        )

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Give the completions again that were written while the cache was built."""
        name = self._store.header["teacher"]
        found = [self._records.get(make_request(prompt, {}, name, generation).key) for prompt in prompts]
        lost = sum(record is None for record in found)
        if lost:
            raise TeacherError(
                f"{self} holds no completion for {lost} of {len(prompts)} prompts with {generation}; build it with the "
                "same rows, template and generation options, or give the rows their completions"
            )
        for index, record in enumerate(found):
            if record is not None:
                yield index, completion_in(record)

    @cached_property
    def _records(self) -> dict[str, dict[str, Any]]:
        return CompletionStore(self._store.folder / FILE_NAME, Ranks()).read()


def _joined(signals: list[SparseSignal]) -> SparseSignal:
    """The signals one after the other, padded to the most tokens any names."""
    if not signals:
        return SparseSignal(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1))
    width = max(signal.ids.shape[1] for signal in signals)

    def padded(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    ids = torch.cat([padded(signal.ids, 0) for signal in signals])
    log_probs = torch.cat([padded(signal.log_probs, -torch.inf) for signal in signals])
    weights = [padded(signal.weights, 0.0) for signal in signals if signal.weights is not None]
    return SparseSignal(ids, log_probs, torch.cat(weights) if weights else None)

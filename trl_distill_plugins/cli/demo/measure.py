"""What the report says about a model: exact answers, distance to the teacher, prompt length, time to answer."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trl_distill_plugins.prompts.weights import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompted:
    """A model together with the prompt it is given: `template` holds `{input}`."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    template: str

    def prompts(self, inputs: Sequence[str]) -> list[str]:
        """Return the whole prompt of each input."""
        return [self.template.replace("{input}", text) for text in inputs]

    def prompt_tokens(self, inputs: Sequence[str]) -> float:
        """Return the mean number of tokens the model reads before it answers."""
        return statistics.fmean(len(ids) for ids in self.tokenizer(self.prompts(inputs))["input_ids"])

    def answers(self, inputs: Sequence[str], *, max_new_tokens: int, batch_size: int = 64) -> list[str]:
        """Return the greedy answer to each input, up to the end-of-sequence token."""
        import torch

        found: list[str] = []
        self.model.eval()
        for batch in _batches(inputs, batch_size):
            encoded = self.tokenizer(self.prompts(batch), padding=True, padding_side="left", return_tensors="pt")
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            with torch.inference_mode():
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
                )
            found += self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return found

    def completion_log_probs(self, inputs: Sequence[str], completions: Sequence[str]) -> "torch.Tensor":
        """Return `[N, V]` log-probabilities at the N tokens of the completions, each with its end-of-sequence token."""
        import torch

        ids, labels = self._rows(inputs, completions)
        self.model.eval()
        with torch.inference_mode():
            # Rows are padded on the right: causal attention hides the padding from every token before it.
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        kept: torch.Tensor = logits[:, :-1][labels[:, 1:] != IGNORE_INDEX]
        return kept.float().log_softmax(-1)

    def _rows(self, inputs: Sequence[str], completions: Sequence[str]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return `[B, T]` ids of prompt + completion and their labels, `IGNORE_INDEX` outside the completions."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        prompts = self.tokenizer(self.prompts(inputs))["input_ids"]
        answers = [[*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer(list(completions))["input_ids"]]
        pairs = list(zip(prompts, answers, strict=True))
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + answer) for prompt, answer in pairs]
        return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)


def accuracy(answers: Sequence[str], right: Sequence[str]) -> float:
    """Return the share of answers that equal the right one, character by character."""
    return sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)


def mean_kl(
    teacher: Prompted, student: Prompted, inputs: Sequence[str], completions: Sequence[str], *, batch_size: int = 64
) -> float:
    """Return KL(teacher || student) in nats, averaged over the completion tokens; each reads its own prompt."""
    total, tokens = 0.0, 0
    for rows in _batches(list(zip(inputs, completions, strict=True)), batch_size):
        texts, answers = [text for text, _ in rows], [answer for _, answer in rows]
        p = teacher.completion_log_probs(texts, answers)
        q = student.completion_log_probs(texts, answers)
        total += float((p.exp() * (p - q)).sum(dtype=p.dtype))
        tokens += len(p)
    return total / tokens


def speedup(
    teacher: Prompted, student: Prompted, inputs: Sequence[str], *, max_new_tokens: int, rounds: int = 5
) -> float:
    """Return how many times faster the student answers `inputs`: the median ratio over interleaved rounds."""

    def seconds(side: Prompted) -> float:
        start = time.perf_counter()
        side.answers(inputs, max_new_tokens=max_new_tokens)
        return time.perf_counter() - start

    seconds(teacher), seconds(student)  # the first call pays for allocations
    return statistics.median(seconds(teacher) / seconds(student) for _ in range(rounds))


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

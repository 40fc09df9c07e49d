"""On-policy distillation: the student learns on completions it wrote itself."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import IGNORE_INDEX
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.prompts.collator import PREFIX
from trl_distill_plugins.prompts.panel import PanelTemplates
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.local import left_pad
from trl_distill_plugins.trainers import trl_compat
from trl_distill_plugins.trainers.mixin import ON_POLICY, DistillationMixin
from trl_distill_plugins.trainers.trl_compat import GKDTrainer


class OnPolicyDistillationMixin(DistillationMixin):
    """`DistillationMixin` for `GKDTrainer` and its subclasses.

    Completions are written when a step's batches are fetched, so the divisor of the loss counts the tokens that are
    trained. A batch with a row that has no completion is always written by the student; of the others the share
    `lmbda` is, chosen by seed and step alike on all ranks. With `seq_kd`, the teacher writes the rest.
    """

    _student_completes: ClassVar[bool] = True

    def _default_objective(self, args: Any, has_teacher: bool) -> Objective | None:
        return Objective.from_config([{"name": "jsd", "beta": args.beta}])

    def _init_parent(self, arguments: dict[str, Any]) -> None:
        args = arguments["args"]
        if args.packing or args.padding_free:
            raise ConfigError(
                "on-policy completions are written behind padded rows; set packing and padding_free: false"
            )
        init_kwargs, args.teacher_model_init_kwargs = args.teacher_model_init_kwargs, None
        super()._init_parent({**arguments, "teacher_model": trl_compat.TeacherStandIn(self)})
        args.teacher_model_init_kwargs = init_kwargs

    def _finish_init(self: Any, objective: Objective | None, teacher: Teacher | None, builds_views: bool) -> None:
        if self.seq_kd and not hasattr(teacher, "module"):
            raise ConfigError(
                "with seq_kd the teacher writes completions during training, which takes a model in memory; set "
                "teacher_model_name_or_path to one, or seq_kd: false"
            )
        if self.seq_kd and getattr(teacher, "tokenizer", None) is not None:
            raise ConfigError(
                f"with seq_kd the teacher writes in the student's tokens, and {teacher} has another tokenizer; set "
                "seq_kd: false, or trainer: sft, which has completions that rows lack written before training"
            )
        if teacher is not None and isinstance(teacher.prompts(self.args.template("teacher")), PanelTemplates):
            raise ConfigError(
                f"the {teacher} have prompts of their own, behind which completions of the student cannot be put "
                "yet; set trainer: sft, or give all the teachers of an ensemble the same prompt"
            )
        tokenizer = self.processing_class
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.data_collator = trl_compat.causal_collator(tokenizer.pad_token_id)
        self.generation_config.pad_token_id = tokenizer.pad_token_id
        # GKDTrainer turns the cache off under gradient checkpointing; TRL disables checkpointing while it generates.
        self.generation_config.use_cache = True
        self._teacher_writes = self.seq_kd
        del self.teacher_model  # the stand-in
        super()._finish_init(objective, teacher, builds_views)

    def get_batch_samples(
        self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch a step's batches, let the policy write completions, and count what is trained then."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        draws = random.Random(f"{self.args.seed}/{self.state.global_step}")
        with _randomness(draws.getrandbits(63), device):
            batches = [self._with_completions(batch, draws.random()) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """`SFTTrainer`'s step: `GKDTrainer`'s would write completions again, after the tokens were counted."""
        return super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def _with_completions(self: Any, batch: dict[str, Any], draw: float) -> dict[str, Any]:
        has_completion = (batch["labels"] != IGNORE_INDEX).any(dim=1)
        # All ranks must agree: sharded models generate together.
        incomplete = self.accelerator.reduce((~has_completion).any().float(), "sum").item() > 0
        if incomplete or draw < self.lmbda:
            return self._rewrite(batch, *self._sample(self.model_wrapped, batch, "")) | {ON_POLICY: True}
        if self.seq_kd:
            prefix = PREFIX if PREFIX + "input_ids" in batch else ""
            return self._rewrite(batch, *self._sample(self.teacher.module, batch, prefix))
        return batch

    def _sample(self: Any, module: nn.Module, batch: dict[str, Any], prefix: str) -> tuple[Tensor, Tensor]:
        """Continue the prompts of the view `prefix`; return the completions and their mask, both `[B, C]`."""
        prompts = _prompts(batch, prefix)
        ids, mask = left_pad(prompts, self.processing_class.pad_token_id, batch["input_ids"].device)
        inputs = {"prompts": ids, "prompt_attention_mask": mask}
        with trl_compat.unwrap_model_for_generation(
            module, self.accelerator, gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs
        ) as unwrapped:
            if getattr(self.accelerator.state, "fsdp_plugin", None) is not None:
                # A rank whose rows have all ended must go on calling forward, or the others wait for its shards.
                unwrapped = SimpleNamespace(generate=partial(unwrapped.generate, synced_gpus=True))
            generated, attention, _ = self.generate_on_policy_outputs(unwrapped, inputs, self.generation_config)
        return generated[:, ids.shape[1] :], attention[:, ids.shape[1] :].bool()

    def _rewrite(self: Any, batch: dict[str, Any], completions: Tensor, mask: Tensor) -> dict[str, Any]:
        """The batch with `completions` after its prompts, in both views."""
        written = [row[keep].tolist() for row, keep in zip(completions, mask, strict=True)]
        rows: list[dict[str, Any]] = [{} for _ in written]
        for prefix in ("", PREFIX):
            if prefix + "input_ids" not in batch:
                continue
            answers = written
            if prefix and self._alignment is not None:
                answers = [self._alignment.tokens.teacher_ids(completion) for completion in written]
            for row, prompt, completion in zip(rows, _prompts(batch, prefix), answers, strict=True):
                row[prefix + "input_ids"] = prompt + completion
                row[prefix + "labels"] = [IGNORE_INDEX] * len(prompt) + completion
        device = batch["input_ids"].device
        return {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in self.data_collator(rows).items()
        }


@contextmanager
def _randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Sample from `seed`, and leave torch's own state alone: a resumed run restores it only after the batches are
    fetched, and would sample other completions than an uninterrupted one."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def _prompts(batch: dict[str, Any], prefix: str) -> list[list[int]]:
    """The prompts of a padded batch: what stands before the first trained token, or all of a row that has none."""
    ids, labels, mask = (batch[prefix + key] for key in ("input_ids", "labels", "attention_mask"))
    trained = labels != IGNORE_INDEX
    lengths = torch.where(trained.any(1), trained.int().argmax(1), mask.sum(1))
    return [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]

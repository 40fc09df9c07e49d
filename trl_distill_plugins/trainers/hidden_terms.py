"""The hidden losses of one run: the layers they compare in its two models, and what they add to the loss."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.chunked import ObjectiveOutput
from trl_distill_plugins.losses.hidden import HiddenLoss
from trl_distill_plugins.losses.joint import TeacherSignal
from trl_distill_plugins.losses.layers import LayerKind, LayerPair, LayerRequest, LayerStates, ModelShape
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.prompts.collator import PREFIX
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.trainers.projectors import (
    attach_projectors,
    detach_projectors,
    load_projectors,
    project,
    projector_name,
    save_projectors,
)


class HiddenTerms:
    """What the trainer knows of its hidden losses. With an objective that has none, it does nothing.

    Args:
        objective: the run's.
        teacher: is asked to show its layers.
        trainer: its model, which is about to be trained, gets the projectors.

    Raises:
        ConfigError: a layer map points past a model, or attention maps are not to be had from one.
        TeacherError: the teacher is no model whose layers can be seen.
    """

    def __init__(self, objective: Objective, teacher: Teacher | None, trainer: Any) -> None:
        self._pairs: dict[str, tuple[LayerPair, ...]] = {}
        self.request = LayerRequest()
        self.projectors = nn.ModuleDict()
        detach_projectors(trainer.model)
        if not objective.hidden or teacher is None:
            return
        shapes = ModelShape.of(trainer.model), teacher.shape()
        for term in objective.hidden:
            self._pairs[term.label] = term.loss.pairs(*shapes)
            if term.loss.reads == "attentions":
                _check_attention(term.label, shapes, trainer)
        self.request, theirs = (self._layers_of(objective, side, shape.depth) for side, shape in enumerate(shapes))
        teacher.show_layers(theirs)
        projected = [term.label for term in objective.hidden if _is_projected(term.loss, shapes)]
        names = [projector_name(label, pair) for label in projected for pair in self._pairs[label]]
        widths = shapes[0].width, shapes[1].width
        self.projectors = attach_projectors(trainer.model, dict.fromkeys(names, widths), trainer.args.seed)

    def _layers_of(self, objective: Objective, side: int, depth: int) -> LayerRequest:
        """The layers of one side, 0 the student's and 1 the teacher's."""

        def layers(kind: LayerKind) -> tuple[int, ...]:
            terms = (term for term in objective.hidden if term.loss.reads == kind)
            return tuple(sorted({pair[side] for term in terms for pair in self._pairs[term.label]}))

        return LayerRequest(depth, layers("hidden_states"), layers("attentions"))

    def add(
        self,
        output: ObjectiveOutput,
        objective: Objective,
        backbone: Any,
        trained: Tensor,
        teacher: TeacherSignal | None,
        normalizer: Tensor,
        weights: Tensor | None,
    ) -> ObjectiveOutput:
        """Return `output` with the hidden losses of `objective` in its loss and behind its terms.

        Args:
            output: what the chunked engine made of the losses on logits.
            objective: the run's, with the weights of the moment.
            backbone: the output of the student's backbone, with the layers of `request`.
            trained: `[B, T - 1]`, True where the next token is trained.
            teacher: the teacher's layers at these positions; only a dense signal has any.
            normalizer: the divisor of the loss.
            weights: what the tokens weigh, `[N]`; None where each weighs 1.
        """
        if not objective.hidden or not isinstance(teacher, DenseSignal):
            return output
        device = output.loss.device
        layers = LayerStates.of(backbone, trained, self.request).on(device), teacher.layers.on(device)
        values = (self._of_tokens(term, *layers) for term in objective.hidden)
        sums = torch.stack([(each if weights is None else each * weights).sum() for each in values])
        shares = sums.new_tensor([term.weight for term in objective.hidden])
        loss = output.loss + (sums * shares).sum() / normalizer.to(device)
        return output._replace(loss=loss, terms=torch.cat([output.terms, sums.detach()]))

    def _of_tokens(self, term: Term[HiddenLoss], student: LayerStates, teacher: LayerStates) -> Tensor:
        """The loss of each token, `[N]`: the mean over the pairs of layers."""
        values = []
        for pair in self._pairs[term.label]:
            own, theirs = getattr(student, term.loss.reads)[pair[0]], getattr(teacher, term.loss.reads)[pair[1]]
            name = projector_name(term.label, pair)
            if name in self.projectors:
                own = project(self.projectors[name], own)
            values.append(term.loss(own, theirs))
        return torch.stack(values).mean(0)

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the projectors, if there are any, to a checkpoint. Collective."""
        if self.projectors:
            save_projectors(self.projectors, folder, is_writer=is_writer)

    def load(self, folder: Path) -> None:
        """Read the projectors, if there are any, from a checkpoint."""
        if self.projectors:
            load_projectors(self.projectors, folder)


def _is_projected(loss: HiddenLoss, shapes: tuple[ModelShape, ModelShape]) -> bool:
    own, theirs = (shape.width for shape in shapes)
    return loss.reads == "hidden_states" and loss.needs_equal_widths and own != theirs


def _check_attention(label: str, shapes: tuple[ModelShape, ModelShape], trainer: Any) -> None:
    for shape, who, option in zip(shapes, ("student", "teacher"), ("model", "teacher_model"), strict=True):
        if shape.attention != "eager":
            raise ConfigError(
                f"the loss {label} reads attention maps, which the {who}'s {shape.attention!r} does not give; set "
                f"{option}_init_kwargs: {{attn_implementation: eager}}, or load the model so"
            )
    if _has_two_views(trainer.args, trainer.train_dataset):
        raise ConfigError(
            f"the loss {label} compares attention over the same tokens, and the teacher sees a prompt of its own; drop "
            "the prompt templates, or use hidden_mse, hidden_cosine or hidden_cka"
        )
    args = trainer.args
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigError(
            f"the loss {label} gets no gradient through reentrant checkpointing; set gradient_checkpointing_kwargs: "
            "{use_reentrant: false}, or gradient_checkpointing: false"
        )


def _has_two_views(args: Any, dataset: Any) -> bool:
    columns = getattr(dataset, "column_names", None) or next(iter(dataset), ())
    return args.template("student") != args.template("teacher") or PREFIX + "input_ids" in columns

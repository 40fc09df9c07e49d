"""What a distillation run needs before it can start, and what it cannot do."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_distill_plugins.errors import ConfigError, DataError, TeacherError, load_failure
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import check_form
from trl_distill_plugins.losses.vocabulary import copes
from trl_distill_plugins.prompts.files import name_of
from trl_distill_plugins.prompts.weights import weights_in
from trl_distill_plugins.teachers import make_teacher
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.local import difference_of
from trl_distill_plugins.trainers import trl_compat
from trl_distill_plugins.trainers.views import ViewPreparation

logger = logging.getLogger(__name__)


def set_up(
    args: Any, objective: Objective | None, teacher_model: Any, arguments: dict[str, Any], *, student_completes: bool
) -> tuple[Teacher | None, bool] | None:
    """Load the teacher and the student's tokenizer, which is put into the trainer's `arguments`.

    Returns the teacher, if one is needed, and whether the datasets are prepared here; None where the run is its
    parent's alone.
    """
    _check_teacher_given(args, objective, teacher_model, arguments.get("model"))
    names = () if arguments.get("formatting_func") is not None else ("train_dataset", "eval_dataset")
    datasets = [arguments.get(name) for name in names]
    is_asked = student_completes or objective is None or objective.needs_teacher
    if teacher_model is not None and not is_asked and ViewPreparation.all_complete(datasets):
        logger.warning("No loss compares with the teacher, and every row has its completion: it is not loaded")
        teacher_model = None
    builds_views = student_completes or ViewPreparation.needed(args, datasets, teacher_model is not None)
    _check_row_format(arguments, builds_views=builds_views)
    refuse_ignored_weights(arguments, objective)
    if objective is None and not builds_views:
        return None
    tokenizer = arguments.get("processing_class") or _load_tokenizer(arguments.get("model"), args)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError("vision-language models are not supported; pass a text tokenizer as processing_class")
    arguments["processing_class"] = tokenizer
    teacher = None if teacher_model is None else _load_teacher(args, objective, teacher_model, tokenizer)
    builds_views = builds_views or aligns(objective, teacher) or _has_prompts(args, teacher)
    _check_row_format(arguments, builds_views=builds_views)
    if builds_views:
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    return teacher, builds_views


def _check_teacher_given(args: Any, objective: Objective | None, teacher_model: Any, model: Any) -> None:
    """Raise `ConfigError` unless there is a teacher exactly where one is needed, and it is not the student."""
    if teacher_model is not None and teacher_model is model:
        raise ConfigError(
            "model and teacher_model are the same object, and a teacher is frozen; pass a path or a copy.deepcopy"
        )
    if teacher_model is not None:
        return
    if objective is not None and objective.needs_teacher:
        names = ", ".join(term.label for term in objective.terms if term.loss.needs_teacher)
        raise ConfigError(f"the loss {names} compares with a teacher; set teacher_model_name_or_path")
    if args.teacher_prompt_template is not None:
        raise ConfigError("teacher_prompt_template is set, but no teacher; set teacher_model_name_or_path")


def _check_row_format(arguments: dict[str, Any], *, builds_views: bool) -> None:
    """Raise `ConfigError` if the rows are texts of one piece where prompt and completion are needed."""
    if builds_views and arguments.get("formatting_func") is not None:
        raise ConfigError(
            "formatting_func makes one text of a row, in which no prompt can be told from its completion; leave it "
            "out and give the rows prompts and completions"
        )


def refuse_ignored_weights(arguments: dict[str, Any], objective: Objective | None) -> None:
    """Raise `DataError` if rows in a trainer's `arguments` have token weights that its loss would ignore."""
    datasets = {name: arguments.get(f"{name}_dataset") for name in ("train", "eval")}
    if objective is None:
        refuse_weights(datasets, "TRL's own loss ignores; set losses: [cross_entropy], the same loss with weights")
    elif arguments.get("formatting_func") is not None:
        refuse_weights(datasets, "formatting_func makes one text of; give prompts and completions")


def refuse_weights(datasets: Mapping[str, Any], why: str) -> None:
    """Raise `DataError` if there are token weights where they would be ignored.

    Args:
        datasets: by the names errors call them: a dataset, several by name, or None.
        why: says who ignores them, and what would work.
    """
    parts = {
        name if key is None else key: part
        for name, data in datasets.items()
        for key, part in (data.items() if isinstance(data, dict) else [(None, data)])
    }
    for name, part in parts.items():
        what = weights_in(part) if part else ""
        if what:
            raise DataError(f"{name_of(part, name)}: {what} weighs tokens, which {why}, or remove it")


def _load_teacher(args: Any, objective: Objective | None, teacher_model: Any, tokenizer: Any) -> Teacher:
    """The teacher of a run, which says what the losses need of the tokens of the student's `tokenizer`, or of those
    that its own has in common with it."""
    init_kwargs = args.teacher_model_init_kwargs or {}
    teacher = make_teacher(teacher_model, init_kwargs, trust_remote_code=args.trust_remote_code)
    teacher.check_student(tokenizer)
    teacher.check_prompt(args.teacher_prompt_template)
    if objective is not None and objective.needs_teacher:  # to ask a served teacher for its form is a request
        check_form(teacher.form, [term.loss.at(turn) for term in objective.tokens for turn in term.loss.turns])
        if objective.hidden and teacher.form != "dense":
            names = ", ".join(term.label for term in objective.hidden)
            raise ConfigError(f"the loss {names} compares layers, and a {teacher.form} teacher shows none")
        if teacher.tokenizer is not None:
            _check_copes(objective, teacher, tokenizer)
    return teacher


def aligns(objective: Objective | None, teacher: Teacher | None) -> bool:
    """Whether losses compare student and teacher over two tokenizers."""
    foreign = teacher is not None and teacher.tokenizer is not None
    return foreign and objective is not None and objective.needs_teacher


def _has_prompts(args: Any, teacher: Teacher | None) -> bool:
    """Whether the teacher has prompts of its own, beside `teacher_prompt_template`."""
    return teacher is not None and teacher.prompts(args.template("teacher")) != args.template("teacher")


def _check_copes(objective: Objective, teacher: Teacher, tokenizer: Any) -> None:
    """Raise `TeacherError` if a loss compares what only teachers with the student's tokenizer have."""
    names = [term.label for term in objective.tokens if not copes(term.loss)] + [t.label for t in objective.hidden]
    if names:
        raise TeacherError(
            f"the loss {', '.join(names)} compares token by token, and the teacher {teacher} has another tokenizer: "
            f"{difference_of(tokenizer, teacher.tokenizer)}. Use a loss that compares what two tokenizers share, such "
            "as forward_kl or universal_logit, a teacher with the student's tokenizer, or train on the teacher's text "
            "alone (losses: [cross_entropy] on its completions)"
        )


def _load_tokenizer(model: Any, args: Any) -> Any:
    """The student's tokenizer, found as `SFTTrainer` finds it."""
    name = model if isinstance(model, str) else trl_compat.get_config_model_id(model.config)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of the student {name!r}: {load_failure(name, error)}") from error


def refuse_unsupported(trainer: Any) -> None:
    """Name what the objective would get wrong rather than train on it."""
    if trainer.aux_loss_enabled:
        raise ConfigError(
            "the student is a mixture of experts with a load-balancing loss, which distillation does not add yet; "
            "set router_aux_loss_coef: 0"
        )
    if trainer.args.loss_type == "dft" or trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        raise ConfigError(
            "loss_type: dft, label_smoothing_factor and compute_loss_func are other losses than the objective; smooth "
            "labels with losses: [{name: cross_entropy, label_smoothing: ...}], and write your own loss as a Loss"
        )
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        raise ConfigError("prompt-learning adapters shift the student's positions; use LoRA or another weight adapter")
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ConfigError("context and sequence parallelism split a row over ranks, which distillation cannot pair yet")

"""A teacher in this process's memory: any transformers causal language model."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_distill_plugins.errors import TeacherError, load_failure
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.layers import LayerRequest, LayerStates, ModelShape
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt


class LocalTeacher(Teacher):
    """A model in memory, in its own dtype and quantisation; never trained, never in training mode.

    Args:
        address: a path or hub name, or a model object.
        init_kwargs: for `AutoModelForCausalLM.from_pretrained` when `address` is a name: dtype, revision,
            quantization_config, device_map, attn_implementation, ...
    """

    name = "local"

    def __init__(self, address: str | nn.Module, **init_kwargs: Any) -> None:
        self._hub_kwargs = _hub_kwargs(init_kwargs)
        if isinstance(address, str):
            self.model: Any = _load(address, init_kwargs)
        elif init_kwargs:
            raise TeacherError(
                "teacher_model_init_kwargs are for loading a teacher by name, and this one is already a model; "
                "drop them, or pass the name"
            )
        else:
            self.model = _without_peft_wrapper(address)
        self.model.eval().requires_grad_(False)
        self._module: Any = self.model
        self._request = LayerRequest()
        self._tokenizer: Any = None
        self._is_foreign = False

    @classmethod
    def load_tokenizer(cls, address: str, **init_kwargs: Any) -> Any:
        """The tokenizer that is saved with the model."""
        try:
            return AutoTokenizer.from_pretrained(address, **_hub_kwargs(init_kwargs))
        except (OSError, ValueError) as error:
            reason = load_failure(address, error)
            raise TeacherError(f"cannot load the tokenizer of the teacher {address!r}: {reason}") from error

    @property
    def module(self) -> nn.Module:
        """The model in the wrapper that `prepare` put it in."""
        return self._module

    def __str__(self) -> str:
        """The path, or the class of a model made in memory."""
        return repr(self.path or type(self.model).__name__)

    @property
    def path(self) -> str:
        """Where the teacher's weights came from; empty for a model made in memory."""
        return str(getattr(self.model.config, "_name_or_path", "") or "")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that came with the weights, if it is another than the student's; else None."""
        return self._tokenizer if self._is_foreign else None

    def check_student(self, tokenizer: Any) -> None:
        """Find the teacher's tokenizer. Raise `TeacherError` if the model lacks tokens of it, or, where there is none,
        of the student's."""
        own = self._own_tokenizer()
        self._is_foreign = own is not None and difference_of(tokenizer, own) is not None
        self._tokenizer = own if self._is_foreign else tokenizer
        width = self.model.config.get_text_config().vocab_size
        if self._is_foreign:
            if len(own) > width:
                raise TeacherError(
                    f"the tokenizer of the teacher {self} has {len(own)} tokens and its model only {width}; resize the "
                    "model's embeddings, or give it its own tokenizer"
                )
            return
        if len(tokenizer) > width:
            raise TeacherError(
                f"the student's tokenizer has {len(tokenizer)} tokens and the teacher's vocabulary only {width}: they "
                "do not share a tokenizer. Name the teacher by a path that has its tokenizer beside the weights"
            )

    def _own_tokenizer(self) -> Any:
        """The tokenizer that belongs to the teacher's weights, or None where none can be found to compare."""
        try:
            return self.load_tokenizer(self.path, **self._hub_kwargs) if self.path else None
        except TeacherError:
            return None

    def move_to(self, device: Any) -> None:
        """Move the model, unless it was loaded with a placement of its own."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)

    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """Move or shard the model through `place`."""
        self._module = place(self.model)
        self._module.eval()

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> DenseSignal:
        """Run the backbone; the head is applied tile by tile by the engine."""
        with torch.no_grad():
            output = backbone_output(self._module, self.model, inputs, **self._request.options)
            hidden = output.last_hidden_state[:, :-1]
            hidden = hidden[trained.to(hidden.device)]
            layers = LayerStates.of(output, trained, self._request)
        return DenseSignal(hidden, LMHead.of(self.model), layers)

    def shape(self) -> ModelShape:
        """The shape of the model."""
        return ModelShape.of(self.model)

    def show_layers(self, request: LayerRequest) -> None:
        """Keep the outputs of these layers whenever the backbone runs."""
        self._request = request

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Continue the prompts in left-padded batches."""
        return complete(partial(generate_ids, self.model), self._tokenizer, prompts, generation, batch_size)


def backbone_output(module: nn.Module, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Return what the backbone of `model` puts out, `last_hidden_state` `[B, T, H]`; `module` is its wrapper.

    The wrapper (FSDP, DeepSpeed, accelerate's autocast) must see a call of its own forward, so the output is taken
    from the backbone on the way, and the head projects a single position. `options` go to the forward.
    """
    caught: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda *call: caught.append(call[-1]))
    try:
        module(**inputs, use_cache=False, logits_to_keep=1, **options)
    finally:
        hook.remove()
    return caught[0]


WriteIds: TypeAlias = Callable[[list[list[int]], Generation], list[tuple[list[int], bool]]]


def complete(
    write: WriteIds, tokenizer: Any, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
) -> Iterator[tuple[int, Completion]]:
    """`Teacher.generate` of a model in memory: `write` is `generate_ids` of it."""
    for start in range(0, len(prompts), batch_size):
        batch = [prompt.token_ids for prompt in prompts[start : start + batch_size]]
        for index, (ids, finished) in enumerate(write(batch, generation), start):
            yield index, Completion(tokenizer.decode(ids, skip_special_tokens=True), finished)


def generate_ids(model: Any, prompts: Sequence[list[int]], generation: Generation) -> list[tuple[list[int], bool]]:
    """Continue `prompts` (token ids) with `model.generate`, in one left-padded batch, order kept; return the ids of
    each completion, without the end token, and whether there was one."""
    eos = _eos_ids(model)
    pad = eos[0] if eos else 0
    ids, mask = left_pad(prompts, pad, model.get_input_embeddings().weight.device)
    sampling = {"do_sample": True, "temperature": generation.temperature} if generation.temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
        **({"top_k": 0, "top_p": 1.0} | sampling if sampling else {"do_sample": False}),
    )
    with torch.no_grad():
        # Ranks have batches of their own, so none may wait for the others at each token (ZeRO-3's default).
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
    return [_cut(row, eos) for row in sequences[:, ids.shape[1] :].tolist()]


def left_pad(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of `rows` to generate from, both `[B, T]`, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _eos_ids(model: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def _cut(row: list[int], eos: list[int]) -> tuple[list[int], bool]:
    """Cut a generated row before its first end token; say whether there was one."""
    ends = [position for position, token in enumerate(row) if token in eos]
    return row[: ends[0]] if ends else row, bool(ends)


def _without_peft_wrapper(model: Any) -> Any:
    """The transformers model in a `PeftModel`, its adapter still in place."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise TeacherError("a teacher cannot have a prompt-learning adapter; use LoRA or another weight adapter")
    return model.get_base_model()


def _hub_kwargs(init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the options for loading that are about where the files come from."""
    return {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if key in init_kwargs}


def _load(name: str, init_kwargs: dict[str, Any]) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(name, **init_kwargs)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two for a wrong init_kwarg
        raise TeacherError(f"cannot load the teacher {name!r}: {load_failure(name, error)}") from error


def difference_of(student: Any, teacher: Any) -> str | None:
    """Say in which tokens two tokenizers differ; None if each token of both has the same id in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    moved = [token for token, index in ours.items() if token in theirs and theirs[token] != index]
    taken = set(theirs.values())
    alone = [token for token, index in ours.items() if token not in theirs and index in taken]
    if not moved and not alone:
        return None
    token = min(moved or alone, key=ours.__getitem__)
    return (
        f"{len(moved) + len(alone)} of the student's {len(ours)} tokens differ, e.g. {token!r} is {ours[token]} for "
        f"the student and {theirs.get(token, 'unknown')} for the teacher"
    )

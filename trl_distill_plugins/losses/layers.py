"""Layers of two models: which of the student's is compared with which of the teacher's, and what they put out.

Hidden states are counted 1 to L in the order of the layers, 0 being the embeddings; attention maps 1 to L. The hidden
states of layer L are the backbone's output, after its final norm.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError, did_you_mean
from trl_distill_plugins.losses.tiles import at_least_float32

LayerKind = Literal["hidden_states", "attentions"]
LayerPair = tuple[int, int]
LayerMap = Literal["uniform", "last"] | tuple[LayerPair, ...]

_MAPS = ("uniform", "last")


@dataclass(frozen=True)
class ModelShape:
    """What a layer map must know of a model: layers, width of the hidden states, `attn_implementation`."""

    depth: int
    width: int
    attention: str

    @classmethod
    def of(cls, model: Any) -> Self:
        """Read it off a transformers model."""
        config = model.config.get_text_config()
        return cls(config.num_hidden_layers, config.hidden_size, str(config._attn_implementation))


def parse_layer_map(value: Any) -> LayerMap:
    """Check the option `layers`: "uniform", "last" or a list of `[student, teacher]` pairs, returned as tuples."""
    if isinstance(value, str):
        if value not in _MAPS:
            hint = did_you_mean(value, _MAPS) or "."
            raise ConfigError(f"layers: no layer map {value!r}{hint} Maps: uniform, last, or [[student, teacher], ...]")
        return value  # type: ignore[return-value]  # mypy does not narrow by `in`
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not (is_list and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)):
        raise ConfigError(f"layers must be uniform, last or a list of [student, teacher] pairs, got {value!r}")
    for layer in (layer for pair in value for layer in pair):
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise ConfigError(f"layers are counted from 0, the embeddings; got {layer!r} in {value!r}")
    pairs = tuple((student, teacher) for student, teacher in value)
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"layers names a pair twice: {value!r}")
    return pairs


def map_layers(layers: LayerMap, student: int, teacher: int, kind: LayerKind) -> tuple[LayerPair, ...]:
    """Return the `(student, teacher)` pairs of layers that `layers` means for models of these depths.

    "uniform" pairs each student layer l with the teacher's layer `l * teacher / student`, rounded half up, at least 1
    (TinyBERT, 1909.10351, where the depths divide); "last" pairs the last layers alone.

    Raises:
        ConfigError: a pair points past one of the models, or to the attention map of the embeddings.
    """
    if layers == "last":
        return ((student, teacher),)
    if layers == "uniform":
        return tuple((at, max(1, (2 * at * teacher + student) // (2 * student))) for at in range(1, student + 1))
    first = 0 if kind == "hidden_states" else 1
    for pair in layers:
        for layer, depth, who in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if not first <= layer <= depth:
                raise ConfigError(
                    f"layers: {list(pair)} points past the {who}, which has {depth} layers; its {kind} are counted "
                    f"{first} to {depth}"
                )
    return layers


@dataclass(frozen=True)
class LayerRequest:
    """Layers of one model whose outputs are wanted; `depth` is how many it has."""

    depth: int = 0
    hidden_states: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments with which a model's forward returns them."""
        options: dict[str, Any] = {}
        if self.hidden_states:
            options["output_hidden_states"] = list(self.hidden_states)  # a model that knows only yes and no keeps all
        if self.attentions:
            options["output_attentions"] = True
        return options


@dataclass(frozen=True)
class LayerStates:
    """What layers put out at the N trained positions.

    Args:
        hidden_states: `[N, H]` by layer.
        attentions: `[N, T]` by layer: each position's attention over the T positions of its row, the mean of the heads.
    """

    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    attentions: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Any, trained: Tensor, request: LayerRequest) -> Self:
        """Pick them from a backbone's `output`; `trained` `[B, T - 1]` is True where the next token is trained."""
        hidden = _outputs(output, "hidden_states", request.depth + 1) if request.hidden_states else ()
        maps = _outputs(output, "attentions", request.depth) if request.attentions else ()
        return cls(
            {layer: _rows(hidden[layer], trained) for layer in request.hidden_states},
            {layer: _mean_of_heads(maps[layer - 1], trained) for layer in request.attentions},
        )

    def on(self, device: torch.device) -> Self:
        """The same states on another device."""
        parts = (self.hidden_states, self.attentions)
        return type(self)(*({layer: states.to(device) for layer, states in part.items()} for part in parts))


def _outputs(output: Any, kind: LayerKind, count: int) -> tuple[Tensor, ...]:
    found = getattr(output, kind, None) or ()
    if len(found) != count:
        raise ConfigError(
            f"the model returns {len(found)} {kind} where a map of its layers needs {count}: not every layer has them; "
            "use a loss on logits"
        )
    return found


def _rows(states: Tensor, trained: Tensor) -> Tensor:
    return states[:, :-1][trained.to(states.device)]


def _mean_of_heads(attention: Tensor, trained: Tensor) -> Tensor:
    """`[B, heads, T, T]` to `[N, T]`."""
    return _rows(attention.transpose(1, 2), trained).mean(1, dtype=at_least_float32(attention.dtype))

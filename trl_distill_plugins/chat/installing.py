"""Setting a chat format on a tokenizer and its model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.chat.base import ChatFormat, get_chat_format
from trl_distill_plugins.chat.tokenizing import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RECORD = "chat_format_added_tokens"  # saved with the tokenizer


@dataclass(frozen=True)
class InstalledChatFormat:
    """What `install_chat_format` did.

    Attributes:
        name: of the format.
        added_tokens: the ids of the tokens it brought to the tokenizer, now or when it was installed before.
    """

    name: str
    added_tokens: list[int]

    @property
    def trainable_token_indices(self) -> dict[str, list[int]] | None:
        """The option of a `LoraConfig` that trains the embeddings of the added tokens."""
        return {"embed_tokens": self.added_tokens} if self.added_tokens else None

    @property
    def lora_options(self) -> dict[str, Any]:
        """All options of a `LoraConfig` that the added tokens need: `LoraConfig(**installed.lora_options, ...)`."""
        if not self.added_tokens:
            return {}
        return {"trainable_token_indices": self.trainable_token_indices, "modules_to_save": ["lm_head"]}


def install_chat_format(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel | None", chat_format: str | ChatFormat
) -> InstalledChatFormat:
    """Set template, special tokens, EOS and response template of a format; saving the two keeps them.

    Missing special tokens are added to the tokenizer and, at the end, to the model's embeddings. The token that ends a
    turn becomes EOS of tokenizer, config and generation config. Installing twice is installing once.

    Args:
        tokenizer: a fast one; changed in place.
        model: changed in place; None to change the tokenizer alone.
        chat_format: a name, an alias or a `ChatFormat`.

    Raises:
        UnknownPluginError: no installed plugin has a format of that name.
        ConfigError: the tokenizer is not a fast one, or has no EOS or chat template that the format needs.
    """
    form = get_chat_format(chat_format)
    TextTokenizer(tokenizer)  # raises for a slow one
    template, end = form.template(tokenizer), form.end_token(tokenizer)
    added = _add_tokens(tokenizer, form.special_tokens)
    response_template = form.response_template(tokenizer)
    tokenizer.chat_template = template
    tokenizer.eos_token = end
    tokenizer.response_template = response_template
    if model is not None:
        _fit(model, tokenizer)
    return InstalledChatFormat(form.name, added)


def _add_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: tuple[str, ...]) -> list[int]:
    """Make `tokens` special; return those that this or an earlier installation brought."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special],
        special_tokens=True,
    )
    brought = dict.fromkeys([*tokenizer.init_kwargs.get(_RECORD, []), *new])
    if brought:
        tokenizer.init_kwargs[_RECORD] = list(brought)
    ids = tokenizer.get_vocab()
    return [ids[token] for token in brought if token in tokens]


def _fit(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    config = model.config.get_text_config()
    config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    embeddings: Any = model.get_input_embeddings().weight
    if len(tokenizer) > len(embeddings):  # never shrinks a padded vocabulary
        model.resize_token_embeddings(len(tokenizer))

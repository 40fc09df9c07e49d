"""Conversations to text and tokens in one chat format, and answers back to messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trl_distill_plugins.chat.base import ChatFormat, get_chat_format
from trl_distill_plugins.chat.marking import broken, changed, framed, has_match, unused_character
from trl_distill_plugins.chat.messages import Conversation, Message
from trl_distill_plugins.chat.templating import Rendering, compiled, render
from trl_distill_plugins.chat.tokenizing import JoinedTokens, Span, TextTokenizer, Tokens
from trl_distill_plugins.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_BATCH = 128  # conversations that are in work at a time


@dataclass(frozen=True)
class TokenizedConversation:
    """What a model trains on, T tokens in each list.

    Attributes:
        input_ids: the tokens.
        assistant_mask: 1 where the assistant's content and end of turn are, whatever their weights.
        labels: the token where its weight is above 0, else -100.
        loss_weights: the weight of the message the token is of; 0 where it is not trained.
    """

    input_ids: list[int]
    assistant_mask: list[int]
    labels: list[int]
    loss_weights: list[float]


class ChatRenderer:
    """One chat format for one tokenizer. Tokenising needs the format's special tokens, see `install_chat_format`.

    A special token in the text of a message is tokenised as the text it is, never as the token. No token reaches over
    the beginning of an answer, so that the tokens of a generation prompt begin those of the conversation. Else the
    tokens are those of the rendered text.
    """

    def __init__(self, chat_format: ChatFormat, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.format = chat_format
        self.tokenizer = tokenizer
        self._stops = chat_format.stop_strings(tokenizer)
        self._template = compiled(chat_format.template(tokenizer))
        self._variables = dict(tokenizer.special_tokens_map)

    def render_conversation(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises `DataError` if the format has no place for a message, naming it."""
        return self._render(conversation, add_generation_prompt).text

    def tokenize_conversation(self, conversation: Conversation) -> TokenizedConversation:
        """Ids, mask, labels and weights of a conversation."""
        return self.tokenize_conversations([conversation])[0]

    def tokenize_conversations(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation]:
        """The same for many, which is faster than one by one."""
        tokenized: list[TokenizedConversation] = []
        for start in range(0, len(conversations), _BATCH):
            batch = conversations[start : start + _BATCH]
            renderings = [self._render(conversation) for conversation in batch]
            tokens = self._text.tokenize([rendering.text for rendering in renderings])
            tokenized += [self._weighted(*parts) for parts in zip(batch, renderings, tokens, strict=True)]
        return tokenized

    def build_generation_prompt(self, conversation: Conversation) -> list[int]:
        """Ids to generate the assistant's next message from."""
        rendering = self._render(conversation, add_generation_prompt=True)
        (tokens,) = self._text.tokenize([rendering.text])
        return self._safe(conversation, rendering, tokens, add_generation_prompt=True).ids

    def build_supervised_example(self, conversation: Conversation) -> dict[str, list[Any]]:
        """The columns `input_ids`, `labels` and `loss_weights`. Raises `DataError` if there is nothing to train on."""
        tokenized = self.tokenize_conversation(conversation)
        if not any(tokenized.loss_weights):
            raise DataError("no message is trained on: there is no assistant message, or all weights are 0")
        return {
            "input_ids": tokenized.input_ids,
            "labels": tokenized.labels,
            "loss_weights": tokenized.loss_weights,
        }

    def get_stop_sequences(self) -> list[str]:
        """The strings that end an answer."""
        return list(self._stops)

    def parse_response(self, response: str | Sequence[int]) -> Message:
        """The assistant's message of what was generated behind a generation prompt, cut at the first stop string.

        Give token ids where there are some: in text, a stop string that a model spelt out ends the answer, too.
        """
        stops = self._stops
        if not isinstance(response, str):
            ids = [int(token) for token in response]
            end = next((index for index, token in enumerate(ids) if token in self._stop_ids), len(ids))
            response = self._text.decode_continuation(ids[:end])
            stops = [stop for stop in stops if stop not in self.tokenizer.added_tokens_encoder]
        cut = min((response.find(stop) for stop in stops if stop in response), default=len(response))
        return self.format.parse(response[:cut], self.tokenizer)

    @cached_property
    def _stop_ids(self) -> set[int]:
        known = self.tokenizer.added_tokens_encoder
        return {known[stop] for stop in self._stops if stop in known}

    @cached_property
    def _text(self) -> TextTokenizer:
        known = self.tokenizer.added_tokens_encoder
        missing = [token for token in self.format.special_tokens if token not in known]
        if missing:
            raise ConfigError(
                f"the {self.format.name} format needs the tokens {' and '.join(missing)}, which this tokenizer lacks; "
                f"call install_chat_format(tokenizer, model, {self.format.name!r}) first"
            )
        return TextTokenizer(self.tokenizer)

    def _render(
        self,
        conversation: Conversation,
        add_generation_prompt: bool = False,
        change: Callable[[int, str], str] | None = None,
    ) -> Rendering:
        """Render; `change` takes the number of a message (-1: the tools) and each of its strings, and replaces it."""
        messages: list[Any] = [message.for_template() for message in conversation.messages]
        tools = conversation.tools
        if change is not None:
            messages = [changed(message, change, index) for index, message in enumerate(messages)]
            tools = changed(tools, change, -1)
        variables = {**self._variables, "messages": messages, "tools": tools}
        try:
            return render(self._template, variables | {"add_generation_prompt": add_generation_prompt})
        except (TemplateError, TypeError) as error:
            raise DataError(f"cannot render this conversation as {self.format.name}: {error}") from error

    def _safe(
        self, conversation: Conversation, rendering: Rendering, tokens: Tokens, add_generation_prompt: bool = False
    ) -> Tokens | JoinedTokens:
        """The tokens, made anew if one reaches over the beginning of an answer or a message has a special token."""
        begins = [start for start, _ in rendering.spans] + [len(rendering.text)] * add_generation_prompt
        cuts = [start for start in begins if tokens.reaches_over(start)]
        control = self._text.control_tokens
        if has_match(control, conversation):
            cuts += self._marked(
                conversation,
                rendering,
                lambda mark: lambda _, text: broken(text, control, mark),
                add_generation_prompt,
            )
        return self._text.tokenize_parts(rendering.text, cuts) if cuts else tokens

    def _marked(
        self,
        conversation: Conversation,
        rendering: Rendering,
        marking: Callable[[str], Callable[[int, str], str]],
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """Where in the rendered text the marks are that `marking(mark)` puts into the messages."""
        mark = unused_character(rendering.text)
        parts = self._render(conversation, add_generation_prompt, marking(mark)).text.split(mark)
        if "".join(parts) != rendering.text:
            raise DataError(
                f"the {self.format.name} format changes the text of a message, so its tokens cannot be told"
            )
        return list(accumulate(map(len, parts[:-1])))

    def _weighted(self, conversation: Conversation, rendering: Rendering, tokens: Tokens) -> TokenizedConversation:
        safe = self._safe(conversation, rendering, tokens)
        ids, size = safe.ids, len(safe.ids)
        mask, weights, labels = [0] * size, [0.0] * size, [IGNORED] * size
        for index, span in self._spans(conversation, rendering):
            message, places = conversation.messages[index], safe.range_of(span)
            weight = message.loss_weight
            if message.role == "assistant":
                mask[places.start : places.stop] = [1] * len(places)
            if weight > 0:
                weights[places.start : places.stop] = [weight] * len(places)
                labels[places.start : places.stop] = ids[places.start : places.stop]
        return TokenizedConversation(ids, mask, labels, weights)

    def _spans(self, conversation: Conversation, rendering: Rendering) -> list[tuple[int, Span]]:
        """(message, its characters): what assistants generate, and the content of others that are trained on."""
        messages = conversation.messages
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if len(answers) != len(rendering.spans):
            raise DataError(
                f"the {self.format.name} format renders {len(rendering.spans)} of {len(answers)} assistant messages"
            )
        spans = list(zip(answers, rendering.spans, strict=True))
        for index, message in enumerate(messages):
            if message.role != "assistant" and message.loss_weight > 0 and (message.content or "").strip():
                spans.append((index, self._content_span(conversation, rendering, index)))
        return spans

    def _content_span(self, conversation: Conversation, rendering: Rendering, number: int) -> Span:
        content = conversation.messages[number].content

        def marking(mark: str) -> Callable[[int, str], str]:
            return lambda index, text: framed(text, mark) if index == number and text == content else text

        places = self._marked(conversation, rendering, marking)
        if len(places) != 2:
            raise DataError(f"message {number + 1}: the {self.format.name} format does not render its content once")
        return places[0], places[1]


def get_renderer(chat_format: str | ChatFormat, tokenizer: "PreTrainedTokenizerBase") -> ChatRenderer:
    """The renderer of an installed format, by name or alias, or of a `ChatFormat`.

    Raises:
        UnknownPluginError: no installed plugin has a format of that name.
        ConfigError: the tokenizer has no eos_token that the format needs, or no template that can be trained on.
    """
    return ChatRenderer(get_chat_format(chat_format), tokenizer)

"""Weights of messages become weights of tokens; answers with tool calls are read back."""

import pytest

from trl_distill_plugins.chat import Conversation, Message, get_renderer, install_chat_format
from trl_distill_plugins.errors import ConfigError, DataError

NAMES = ("chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral")


@pytest.fixture(params=NAMES)
def renderer(request, tokenizer):
    install_chat_format(tokenizer, None, request.param)
    return get_renderer(request.param, tokenizer)


def conversation(*weights):
    texts = (("system", "Be brief"), ("user", " sum of 2, 3?"), ("assistant", "5"), ("user", "sum"), ("assistant", "é"))
    return Conversation(Message(*text, weight) for text, weight in zip(texts, weights, strict=True))


def trained(renderer, tokens):
    """(weight, text of its tokens) of each run of equal weights above 0."""
    runs = []
    for label, token, weight in zip(tokens.labels, tokens.input_ids, tokens.loss_weights, strict=True):
        assert label == (token if weight > 0 else -100)
        if weight and runs and runs[-1][0] == weight:
            runs[-1][1].append(token)
        elif weight:
            runs.append((weight, [token]))
    return [(weight, renderer.tokenizer.decode(ids)) for weight, ids in runs]


def test_assistants_weigh_one_and_others_nothing(renderer):
    tokens = renderer.tokenize_conversation(conversation(None, None, None, None, None))
    assert tokens.loss_weights == [float(inside) for inside in tokens.assistant_mask]
    assert all(isinstance(weight, float) for weight in tokens.loss_weights)
    assert sum(tokens.assistant_mask) > 2


def test_each_message_gets_its_own_weight(renderer):
    tokens = renderer.tokenize_conversation(conversation(0.25, None, 0.5, 2, 0))
    runs = trained(renderer, tokens)
    assert [weight for weight, _ in runs] == [0.25, 0.5, 2]
    assert [text.strip() for _, text in runs] == ["Be brief", renderer_end(renderer, "5"), "sum"]
    assert sum(tokens.assistant_mask) > sum(weight == 0.5 for weight in tokens.loss_weights)


def renderer_end(renderer, content):
    question = Conversation([Message("user", "x")])
    prompt = renderer.render_conversation(question, add_generation_prompt=True)
    whole = renderer.render_conversation(Conversation([*question.messages, Message("assistant", content)]))
    return whole[len(prompt) :].strip()


def test_weighing_does_not_change_the_tokens(renderer):
    plain, weighted = conversation(None, None, None, None, None), conversation(1, 1, 0.5, 1, 1)
    assert renderer.tokenize_conversation(plain).input_ids == renderer.tokenize_conversation(weighted).input_ids


def test_a_supervised_example_needs_something_to_train_on(renderer):
    example = renderer.build_supervised_example(conversation(None, None, None, None, 0))
    assert list(example) == ["input_ids", "labels", "loss_weights"]
    for weights in ((None, None, 0, None, 0),):
        with pytest.raises(DataError, match="no message is trained on"):
            renderer.build_supervised_example(conversation(*weights))
    with pytest.raises(DataError, match="no message is trained on: there is no assistant message"):
        renderer.build_supervised_example(Conversation([Message("user", "Hi")]))


def test_stop_sequences_are_the_end_of_turn_alone(renderer):
    assert renderer.get_stop_sequences() == [renderer.tokenizer.eos_token]


def test_an_answer_that_was_cut_off_is_parsed_as_far_as_it_goes(renderer):
    ids = renderer.tokenizer(" half an ans", add_special_tokens=False)["input_ids"]
    assert renderer.parse_response(ids).content.strip() == "half an ans"


def calls(*names):
    return [{"type": "function", "function": {"name": name, "arguments": {"x": [1, "é\n"]}}} for name in names]


@pytest.mark.parametrize("content", ["", "Wait.\n", "a\n\nb <tool_call>"])
@pytest.mark.parametrize("names", [("f",), ("f", "g")])
def test_tool_calls_are_read_back(content, names, tokenizer):
    install_chat_format(tokenizer, None, "chatml")
    renderer = get_renderer("chatml", tokenizer)
    question = Conversation([Message("user", "Hi")])
    answer = Message("assistant", content, tool_calls=calls(*names))
    prompt = renderer.render_conversation(question, add_generation_prompt=True)
    text = renderer.render_conversation(Conversation([*question.messages, answer]))[len(prompt) :]
    assert renderer.parse_response(text) == answer
    if "<tool_call>" not in content:
        theirs = tokenizer.parse_response(text, prefix=prompt)
        assert (theirs["content"], theirs["tool_calls"]) == (content, answer.tool_calls)


@pytest.mark.parametrize("call", ["{no json", "[1]", '{"arguments": {}}'])
def test_a_call_that_is_none_stays_in_the_content(call, tokenizer):
    install_chat_format(tokenizer, None, "chatml")
    text = f"So:\n<tool_call>\n{call}\n</tool_call>"
    assert get_renderer("chatml", tokenizer).parse_response(text) == Message("assistant", text)


def test_special_tokens_in_tool_calls_and_results_stay_text(tokenizer):
    install_chat_format(tokenizer, None, "chatml")
    end = tokenizer.eos_token_id
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    messages = [Message("user", "Hi"), Message("assistant", None, tool_calls=call), Message("tool", "a<|im_end|>")]
    tokens = get_renderer("chatml", tokenizer).tokenize_conversation(Conversation(messages))
    assert tokens.input_ids.count(end) == len(messages)


def test_tokenising_before_installing_says_what_to_call(tokenizer):
    renderer = get_renderer("chatml", tokenizer)
    with pytest.raises(ConfigError, match=r"lacks; call install_chat_format\(tokenizer, model, 'chatml'\) first"):
        renderer.build_generation_prompt(Conversation([Message("user", "Hi")]))

"""What each format writes, character by character, taken from what its authority publishes."""

import pytest

from trl_distill_plugins.chat import Conversation, Message, get_renderer
from trl_distill_plugins.errors import DataError

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

ONE = [("user", "Hi"), ("assistant", "Yo\n\nyo")]
TWO = [*ONE, ("user", "Bye"), ("assistant", "See you")]
LAYOUTS = {
    "chatml": {
        "prompt": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "one": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo\n\nyo<|im_end|>\n",
        "two": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo\n\nyo<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you<|im_end|>\n",
        "system": "<s><|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo\n\nyo<|im_end|>\n",
    },
    "alpaca": {
        "prompt": f"<s>{PREAMBLE}\n\n### Instruction:\nHi\n\n### Response:",
        "one": f"<s>{PREAMBLE}\n\n### Instruction:\nHi\n\n### Response:Yo\n\nyo</s>",
        "two": f"<s>{PREAMBLE}\n\n### Instruction:\nHi\n\n### Response:Yo\n\nyo</s>"
        "\n\n### Instruction:\nBye\n\n### Response:See you</s>",
        "system": "<s>Be brief\n\n### Instruction:\nHi\n\n### Response:Yo\n\nyo</s>",
    },
    "llama2": {
        "prompt": "<s>[INST] Hi [/INST]",
        "one": "<s>[INST] Hi [/INST] Yo\n\nyo </s>",
        "two": "<s>[INST] Hi [/INST] Yo\n\nyo </s><s>[INST] Bye [/INST] See you </s>",
        "system": "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST] Yo\n\nyo </s>",
    },
    "vicuna": {
        "prompt": "<s>USER: Hi ASSISTANT:",
        "one": "<s>USER: Hi ASSISTANT: Yo\n\nyo</s>",
        "two": "<s>USER: Hi ASSISTANT: Yo\n\nyo</s>USER: Bye ASSISTANT: See you</s>",
        "system": "<s>Be brief USER: Hi ASSISTANT: Yo\n\nyo</s>",
    },
    "zephyr": {
        "prompt": "<s><|user|>\nHi</s>\n<|assistant|>\n",
        "one": "<s><|user|>\nHi</s>\n<|assistant|>\nYo\n\nyo</s>\n",
        "two": "<s><|user|>\nHi</s>\n<|assistant|>\nYo\n\nyo</s>\n<|user|>\nBye</s>\n<|assistant|>\nSee you</s>\n",
        "system": "<s><|system|>\nBe brief</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo\n\nyo</s>\n",
    },
    "mistral": {
        "prompt": "<s> [INST] Hi [/INST]",
        "one": "<s> [INST] Hi [/INST] Yo\n\nyo</s>",
        "two": "<s> [INST] Hi [/INST] Yo\n\nyo</s> [INST] Bye [/INST] See you</s>",
        "system": "<s> [INST] Be brief\n\nHi [/INST] Yo\n\nyo</s>",
    },
}
CONVERSATIONS = {"prompt": ONE[:1], "one": ONE, "two": TWO, "system": [("system", "Be brief"), *ONE]}
TURN_TAKING = ("llama2", "mistral")
CALLING = [
    Message("user", "Weather?"),
    Message(
        "assistant", "Wait.", tool_calls=[{"type": "function", "function": {"name": "w", "arguments": {"c": "é"}}}]
    ),
    Message("tool", "sun"),
    Message("tool", "rain"),
    Message("assistant", "Mixed."),
]


def conversation(*turns):
    return Conversation(Message(role, content) for role, content in turns)


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_that_of_the_authority(name, case, tokenizer):
    renderer = get_renderer(name, tokenizer)
    text = renderer.render_conversation(conversation(*CONVERSATIONS[case]), add_generation_prompt=case == "prompt")
    assert text == LAYOUTS[name][case]


def test_llama2_strips_turns_and_the_others_keep_their_whitespace(tokenizer):
    turns = [("user", " Hi\n"), ("assistant", "\tYo ")]
    for name in LAYOUTS:
        text = get_renderer(name, tokenizer).render_conversation(conversation(*turns))
        assert (" Hi\n" in text and "\tYo " in text) == (name != "llama2")
    assert get_renderer("llama", tokenizer).render_conversation(conversation(*turns)) == "<s>[INST] Hi [/INST] Yo </s>"


def test_a_tokenizer_without_bos_gets_none(tiny_tokenizer):
    for name in LAYOUTS:
        text = get_renderer(name, tiny_tokenizer).render_conversation(conversation(*ONE))
        assert text == LAYOUTS[name]["one"].replace("<s>", "").replace("</s>", "<eos>")


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_answer_is_no_generation_prompt(name, tokenizer):
    renderer = get_renderer(name, tokenizer)
    prompt = renderer.render_conversation(conversation(("user", "Hi")), add_generation_prompt=True)
    text = renderer.render_conversation(conversation(("user", "Hi"), ("assistant", "")))
    assert text.startswith(prompt)
    assert text[len(prompt) :].strip() == renderer.format.end_token(tokenizer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_user_messages_in_a_row(name, tokenizer):
    renderer = get_renderer(name, tokenizer)
    twice = conversation(("user", "One"), ("user", "Two"))
    if name not in TURN_TAKING:
        text = renderer.render_conversation(twice, add_generation_prompt=True)
        assert text.index("One") < text.index("Two")
        return
    with pytest.raises(DataError, match=rf"as {name}: message 2: in the {name} format user and assistant take turns"):
        renderer.render_conversation(twice)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_unknown_role_is_named(name, tokenizer):
    with pytest.raises(DataError, match=rf'message 2: the {name} format has no role "judge"; use system, user'):
        get_renderer(name, tokenizer).render_conversation(conversation(("user", "Hi"), ("judge", "Guilty")))


@pytest.mark.parametrize("name", ["alpaca", "llama2", "vicuna", "mistral"])
def test_a_system_message_in_the_middle_is_refused_where_there_is_no_place_for_it(name, tokenizer):
    late = conversation(*ONE, ("system", "Be long"), ("user", "Hi"))
    with pytest.raises(DataError, match=rf"message 3: the {name} format has a system message only at the beginning"):
        get_renderer(name, tokenizer).render_conversation(late)


@pytest.mark.parametrize("name", TURN_TAKING)
def test_a_system_message_alone_is_refused_where_it_goes_into_the_user_message(name, tokenizer):
    with pytest.raises(DataError, match=r"message 1: .* puts a system message into the user message after it"):
        get_renderer(name, tokenizer).render_conversation(conversation(("system", "Be brief")))


def test_chatml_renders_tools_calls_and_results_as_qwen_does(tokenizer):
    tools = [{"type": "function", "function": {"name": "w", "parameters": {}}}]
    text = get_renderer("chatml", tokenizer).render_conversation(Conversation(CALLING, tools=tools))
    assert text == (
        "<s><|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "w", "parameters": {}}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\nWait.\n<tool_call>\n{"name": "w", "arguments": {"c": "é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nMixed.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "chatml"])
def test_tools_are_refused_where_the_format_has_none(name, tokenizer):
    renderer = get_renderer(name, tokenizer)
    for messages, number in ((CALLING[:2], 2), ((CALLING[0], Message("assistant", "a"), CALLING[2]), 3)):
        with pytest.raises(DataError, match=rf"message {number}: the {name} format has no tool calls and results"):
            renderer.render_conversation(Conversation(messages))
    with pytest.raises(DataError, match=f"the {name} format has no tools; use chatml"):
        renderer.render_conversation(Conversation(CALLING[:1], tools=[{"name": "w"}]))


def test_only_the_assistant_calls_tools(tokenizer):
    calling = Message("user", "x", tool_calls=CALLING[1].tool_calls)
    with pytest.raises(DataError, match="message 1: in the chatml format only the assistant calls tools, not user"):
        get_renderer("chatml", tokenizer).render_conversation(Conversation([calling]))

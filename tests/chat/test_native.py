"""`native` on the chat templates that TRL ships, role templates, and which format a tokenizer has."""

from pathlib import Path

import pytest
import trl

from trl_distill_plugins.chat import (
    Conversation,
    Message,
    RoleTemplatesFormat,
    detect_chat_format,
    get_renderer,
    install_chat_format,
)
from trl_distill_plugins.errors import ConfigError

SHIPPED = Path(trl.__file__).parent / "chat_templates"
ENDS = {
    "qwen2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "lfm2": "<|im_end|>",
}
MARKERS = {
    "qwen2_5": ["<|im_start|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<start_of_turn>"],
    "lfm2": ["<|im_start|>"],
}
TALK = Conversation(
    [Message("user", "Hi"), Message("assistant", "Yo\n\nyo"), Message("user", "Bye"), Message("assistant", "See you")]
)


@pytest.fixture(params=ENDS)
def native(request, tokenizer):
    name = request.param
    tokenizer.add_tokens([*MARKERS[name], ENDS[name]], special_tokens=True)
    tokenizer.eos_token = ENDS[name]
    tokenizer.chat_template = (SHIPPED / f"{name}.jinja").read_text()
    return name, tokenizer


def test_a_template_is_made_trainable_and_renders_the_same(native):
    name, tokenizer = native
    messages = TALK.to_dict()["messages"]
    before = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    install_chat_format(tokenizer, None, "native")
    assert tokenizer.eos_token == ENDS[name]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == before
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == prompt


def test_the_mask_is_the_answers_with_their_end_and_within_that_of_trl(native):
    name, tokenizer = native
    messages = TALK.to_dict()["messages"]
    patched = (SHIPPED / f"{name}_training.jinja").read_text()
    install_chat_format(tokenizer, None, "native")
    mask = {"return_dict": True, "return_assistant_tokens_mask": True}
    ours = tokenizer.apply_chat_template(messages, **mask)
    theirs = tokenizer.apply_chat_template(messages, chat_template=patched, **mask)
    assert ours["input_ids"] == theirs["input_ids"]
    pairs = list(zip(ours["assistant_masks"], theirs["assistant_masks"], strict=True))
    assert (1, 0) not in pairs  # TRL's may take a newline more at either end
    answers = [token for token, inside in zip(ours["input_ids"], ours["assistant_masks"], strict=True) if inside]
    assert tokenizer.decode(answers) == f"Yo\n\nyo{ENDS[name]}See you{ENDS[name]}"
    tokenized = get_renderer("native", tokenizer).tokenize_conversation(TALK)
    assert (tokenized.input_ids, tokenized.assistant_mask) == (ours["input_ids"], ours["assistant_masks"])


def test_installing_native_twice_changes_nothing(native):
    _, tokenizer = native
    install_chat_format(tokenizer, None, "native")
    template = tokenizer.chat_template
    install_chat_format(tokenizer, None, "native")
    assert tokenizer.chat_template == template


CASES = {
    "": "the tokenizer has no chat template of its own",
    "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}": "ends an answer with no special token",
    "{% for m in messages %}{{ loop.revindex ~ m.content + eos_token }}{% endfor %}": "stands before an answer",
    "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{{ 'A:' if add_generation_prompt }}": "stands",
    "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}": "marks 2",
}


@pytest.mark.parametrize("template", CASES)
def test_a_template_that_cannot_be_trained_on_says_why(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=f"{CASES[template]}.*; install a(nother)? chat format, for example chatml"):
        install_chat_format(tokenizer, None, "native")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("qwen3", "the generated part '<think>.*xyzzy<|im_end|>' is not the answer 'xyzzy' alone"),
        ("phi3", "message 4: the generation prompt is not what stands before an answer"),  # it ends a text with EOS
    ],
)
def test_a_template_that_changes_earlier_turns_is_refused(name, problem, tokenizer):
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = (SHIPPED / f"{name}.jinja").read_text()
    with pytest.raises(ConfigError, match=f"the tokenizer's own chat template cannot be trained on: .*{problem}"):
        install_chat_format(tokenizer, None, "native")


def test_role_templates_make_a_format(tokenizer):
    form = RoleTemplatesFormat(
        "qa", system="# {content}\n", user="Q: {content}\n", assistant="A: {content}{eos_token}\n"
    )
    install_chat_format(tokenizer, None, form)
    renderer = get_renderer(form, tokenizer)
    conversation = Conversation([Message("system", "Be brief"), Message("user", "Hi"), Message("assistant", "Yo")])
    assert renderer.render_conversation(conversation) == "<s># Be brief\nQ: Hi\nA: Yo</s>\n"
    start = Conversation(conversation.messages[:2])
    assert renderer.render_conversation(start, add_generation_prompt=True) == "<s># Be brief\nQ: Hi\nA:"
    assert renderer.parse_response(" Yo</s>") == Message("assistant", "Yo")


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        ({"user": "Q:"}, "the user template needs {content} exactly once, got 'Q:'"),
        ({"system": "{content}{content}"}, "the system template needs {content} exactly once"),
        ({"assistant": "A:{content}\n"}, "the assistant template needs {eos_token} behind {content}"),
    ],
)
def test_role_templates_that_make_none_say_why(templates, problem):
    fine = {"system": "{content}", "user": "{content}", "assistant": "{content}{eos_token}"}
    with pytest.raises(ConfigError) as caught:
        RoleTemplatesFormat("x", **(fine | templates))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral"])
def test_an_installed_format_is_detected(name, tokenizer):
    install_chat_format(tokenizer, None, name)
    assert detect_chat_format(tokenizer) == name


def test_templates_are_detected_by_what_they_render(tokenizer):
    tokenizer.chat_template = (  # that of zephyr-7b-beta, which leaves BOS to the tokenizer
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    assert detect_chat_format(tokenizer) == "zephyr"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert detect_chat_format(tokenizer) == "native"
    tokenizer.chat_template = None
    assert detect_chat_format(tokenizer) is None
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    assert detect_chat_format(tokenizer) == "chatml"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "chatml"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("lmsys/vicuna-7b-v1.5", "vicuna"),
        ("HuggingFaceH4/zephyr-7b-beta", "zephyr"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("tatsu-lab/alpaca-7b-wdiff", "alpaca"),
        ("openai-community/gpt2", None),
    ],
)
def test_a_format_is_detected_by_the_name_of_the_model(model, name):
    assert detect_chat_format(model) == name

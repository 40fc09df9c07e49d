"""Properties of every format and kind of tokenizer, on random conversations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.chat import Conversation, Message, RoleTemplatesFormat, get_renderer, install_chat_format

NAMES = ("chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral", "native", "qa")
KINDS = ("bytes", "merging", "pieces")
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTROL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>", "<unk>", "<</s>", "[INST]", "### Response:", "USER:")
TRICKY = ("\n", "\n\n", " ", "\t", ":", "-)", "]", "assistant", "\ufdd0", "\u2028", "é", "🙂", "code")

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12)
clean = st.lists(plain | st.sampled_from(TRICKY), max_size=4).map("".join)
texts = st.lists(plain | st.sampled_from(TRICKY) | st.sampled_from(CONTROL), max_size=5).map("".join)
every = pytest.mark.parametrize("kind", KINDS)
formats = pytest.mark.parametrize("name", NAMES)
quick = settings(max_examples=15, deadline=None)


def conversations(content):
    """Turns of user and assistant, which every format allows; some with a system message."""

    def build(system, turns):
        start = [] if system is None else [Message("system", system)]
        pairs = [(Message("user", user), Message("assistant", answer)) for user, answer in turns]
        return Conversation([*start, *(message for pair in pairs for message in pair)])

    turns = st.lists(st.tuples(content, content), min_size=1, max_size=3)
    return st.builds(build, st.none() | content, turns)


@pytest.fixture(scope="session")
def renderer_of(make_tokenizer):
    """An installed renderer, made once of each kind."""
    made = {}

    def make(name, kind):
        if (name, kind) not in made:
            tokenizer = make_tokenizer(kind)
            tokenizer.chat_template = OWN if name == "native" else None
            chosen = question_answer() if name == "qa" else name
            install_chat_format(tokenizer, None, chosen)
            made[name, kind] = get_renderer(chosen, tokenizer)
        return made[name, kind]

    return make


def question_answer():
    return RoleTemplatesFormat(
        "qa", system="{content}\n", user="Q'{{:\\ {content}\n", assistant="A: {content}{eos_token}\n"
    )


def theirs(renderer, conversation):
    """Ids and mask by transformers."""
    messages = conversation.to_dict()["messages"]
    return renderer.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)


def before_each_answer(conversation):
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            yield Conversation(conversation.messages[:index]), Conversation(conversation.messages[: index + 1])


def expected(renderer, content):
    return content.strip() if renderer.format.name == "llama2" else content


@formats
@every
@quick
@given(data=st.data())
def test_a_generation_prompt_is_a_prefix_and_the_answer_starts_there(name, kind, renderer_of, data):
    renderer = renderer_of(name, kind)
    conversation = data.draw(conversations(texts))
    whole = renderer.render_conversation(conversation)
    ids = renderer.tokenize_conversation(conversation)
    for prompt, answered in before_each_answer(conversation):
        text = renderer.render_conversation(prompt, add_generation_prompt=True)
        assert whole.startswith(text)
        assert whole.startswith(renderer.render_conversation(answered).rstrip("\n"))
        prompt_ids = renderer.build_generation_prompt(prompt)
        assert ids.input_ids[: len(prompt_ids)] == prompt_ids
        assert ids.assistant_mask[len(prompt_ids) - 1 : len(prompt_ids) + 1] == [0, 1]


@formats
@every
@quick
@given(data=st.data())
def test_the_mask_is_the_answers_and_their_end_of_turn(name, kind, renderer_of, data):
    renderer = renderer_of(name, kind)
    conversation = data.draw(conversations(texts))
    tokens = renderer.tokenize_conversation(conversation)
    end = renderer.tokenizer.convert_tokens_to_ids(renderer.format.end_token(renderer.tokenizer))
    answers, generated = [], []
    for token, inside in zip(tokens.input_ids, tokens.assistant_mask, strict=True):
        if inside:
            generated.append(token)
            if token == end:
                answers.append(renderer.parse_response(generated).content)
                generated = []
    assert generated == []
    wanted = [message.content for message in conversation.messages if message.role == "assistant"]
    assert answers == [expected(renderer, content) for content in wanted]


@formats
@every
@quick
@given(data=st.data())
def test_clean_text_is_tokenised_and_masked_as_by_transformers(name, kind, renderer_of, data):
    renderer = renderer_of(name, kind)
    conversation = data.draw(conversations(clean))
    tokens, own = renderer.tokenize_conversation(conversation), theirs(renderer, conversation)
    whole = renderer.render_conversation(conversation)
    assert whole == renderer.tokenizer.apply_chat_template(conversation.to_dict()["messages"], tokenize=False)
    offsets = renderer.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    starts = [
        len(renderer.render_conversation(prompt, add_generation_prompt=True))
        for prompt, _ in before_each_answer(conversation)
    ]
    if any(
        first < start < last for start in starts for first, last in offsets
    ):  # a token over the beginning of an answer
        assert renderer.tokenizer.decode(tokens.input_ids) == renderer.tokenizer.decode(own["input_ids"])
        return
    assert tokens.input_ids == own["input_ids"]
    assert tokens.assistant_mask == own["assistant_masks"]


@formats
@every
@quick
@given(data=st.data())
def test_special_tokens_in_messages_stay_text(name, kind, renderer_of, data):
    renderer = renderer_of(name, kind)
    special = set(renderer.tokenizer.all_special_ids) | set(renderer.tokenizer.added_tokens_decoder)
    conversation = data.draw(conversations(texts))
    empty = Conversation(Message(message.role, "") for message in conversation.messages)
    found, markup = (
        [token for token in renderer.tokenize_conversation(each).input_ids if token in special]
        for each in (conversation, empty)
    )
    assert found == markup


@formats
@every
@quick
@given(data=st.data())
def test_bos_begins_a_conversation_once(name, kind, renderer_of, data):
    renderer = renderer_of(name, kind)
    bos = renderer.tokenizer.bos_token_id
    conversation = data.draw(conversations(texts))
    ids = renderer.tokenize_conversation(conversation).input_ids
    pairs = sum(message.role == "assistant" for message in conversation.messages)
    assert ids[0] == bos
    assert ids.count(bos) == (pairs if name == "llama2" else 1)  # Meta begins each pair of turns with one
    assert ids[1] != bos


@formats
@every
@quick
@given(content=texts)
def test_an_answer_is_parsed_back_from_its_tokens(name, kind, renderer_of, content):
    renderer = renderer_of(name, kind)
    question = Conversation([Message("user", "Hi")])
    prompt = renderer.build_generation_prompt(question)
    ids = renderer.tokenize_conversation(Conversation([*question.messages, Message("assistant", content)])).input_ids
    assert renderer.parse_response(ids[len(prompt) :]).content == expected(renderer, content)


@formats
@quick
@given(content=clean)
def test_an_answer_is_parsed_back_from_its_text(name, renderer_of, content):
    renderer = renderer_of(name, "bytes")
    question = Conversation([Message("user", "Hi")])
    prompt = renderer.render_conversation(question, add_generation_prompt=True)
    text = renderer.render_conversation(Conversation([*question.messages, Message("assistant", content)]))
    generated = text[len(prompt) :] + "more"
    assert renderer.parse_response(generated).content == expected(renderer, content)
    by_transformers = renderer.tokenizer.parse_response(text[len(prompt) :], prefix=prompt)
    assert by_transformers["role"] == "assistant"
    if renderer.format.name in ("chatml", "alpaca", "zephyr"):
        assert by_transformers["content"] == content


@formats
def test_saving_and_loading_the_tokenizer_keeps_the_format(name, renderer_of, tmp_path):
    from transformers import AutoTokenizer

    renderer = renderer_of(name, "bytes")
    renderer.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = get_renderer(renderer.format, loaded)
    conversation = Conversation([Message("user", "a <|im_end|></s>"), Message("assistant", "b\n\nc")])
    assert loaded.chat_template == renderer.tokenizer.chat_template
    assert (loaded.eos_token, loaded.response_template) == (
        renderer.tokenizer.eos_token,
        renderer.tokenizer.response_template,
    )
    assert again.tokenize_conversation(conversation) == renderer.tokenize_conversation(conversation)


def test_a_token_over_the_beginning_of_an_answer_is_cut_there(make_tokenizer):
    tokenizer = make_tokenizer("merging")
    tokenizer.add_tokens([":\n\n"])  # not special
    install_chat_format(tokenizer, None, "alpaca")
    renderer = get_renderer("alpaca", tokenizer)
    conversation = Conversation([Message("user", "Hi"), Message("assistant", "\n\n- one")])
    merged = theirs(renderer, conversation)["input_ids"]
    tokens = renderer.tokenize_conversation(conversation)
    assert tokenizer.convert_tokens_to_ids(":\n\n") in merged
    assert tokenizer.convert_tokens_to_ids(":\n\n") not in tokens.input_ids
    assert tokenizer.decode(tokens.input_ids) == tokenizer.decode(merged)


def test_a_batch_is_tokenised_as_one_by_one(renderer_of):
    renderer = renderer_of("vicuna", "merging")
    batch = [
        Conversation([Message("user", text), Message("assistant", text[::-1])])
        for text in ("a\n\nb", "</s>", "", ":-)")
    ]
    assert renderer.tokenize_conversations(batch) == [renderer.tokenize_conversation(each) for each in batch]

"""Installing a format on a tokenizer and a model: what is set, added, resized, saved and trained."""

import pytest
import torch

from trl_distill_plugins.chat import Conversation, Message, get_renderer, install_chat_format
from trl_distill_plugins.errors import ConfigError, UnknownPluginError

NAMES = ("chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral")


@pytest.mark.parametrize("name", NAMES)
def test_template_eos_and_response_template_are_set_everywhere_and_survive_saving(
    name, tokenizer, tiny_causal_lm, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_causal_lm(vocab=len(tokenizer))
    installed = install_chat_format(tokenizer, model, name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    for each, its_model in ((tokenizer, model), (loaded, loaded_model)):
        end = "<|im_end|>" if name == "chatml" else "</s>"
        assert each.eos_token == end
        assert each.response_template["fields"]["content"]
        assert each.chat_template == get_renderer(name, each).format.template(each)
        assert its_model.config.eos_token_id == its_model.generation_config.eos_token_id == each.eos_token_id
        assert its_model.get_input_embeddings().num_embeddings == len(each)
    assert install_chat_format(loaded, loaded_model, name) == installed
    assert len(loaded) == len(tokenizer)


def test_missing_tokens_are_added_resized_and_trainable_under_lora(tokenizer, tiny_causal_lm):
    from peft import LoraConfig, get_peft_model

    before = len(tokenizer)
    model = tiny_causal_lm(vocab=before)
    old = model.get_input_embeddings().weight.detach().clone()
    installed = install_chat_format(tokenizer, model, "chatml")
    assert installed.added_tokens == [before, before + 1]
    assert torch.equal(model.get_input_embeddings().weight[:before], old)
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [before]

    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **installed.lora_options))
    ids = torch.tensor(
        [get_renderer("chatml", tokenizer).build_generation_prompt(Conversation([Message("user", "a")]))]
    )
    tuned(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, weight in tuned.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any("trainable_tokens_delta" in name for name in trained)
    assert any("lm_head.modules_to_save" in name for name in trained)


def test_installing_twice_is_installing_once(tokenizer, tiny_causal_lm):
    model = tiny_causal_lm(vocab=len(tokenizer))
    first = install_chat_format(tokenizer, model, "chatml")
    size, template = len(tokenizer), tokenizer.chat_template
    assert install_chat_format(tokenizer, model, "chatml") == first
    assert (len(tokenizer), tokenizer.chat_template) == (size, template)
    assert model.get_input_embeddings().num_embeddings == size


def test_a_format_without_tokens_of_its_own_needs_nothing_trained(tokenizer):
    installed = install_chat_format(tokenizer, None, "vicuna")
    assert (installed.added_tokens, installed.trainable_token_indices, installed.lora_options) == ([], None, {})


def test_a_padded_vocabulary_is_never_shrunk(tokenizer, tiny_causal_lm):
    model = tiny_causal_lm(vocab=512)
    install_chat_format(tokenizer, model, "chatml")
    assert model.get_input_embeddings().num_embeddings == 512


def test_tokens_a_tokenizer_has_become_special_and_keep_their_ids(tokenizer):
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert install_chat_format(tokenizer, None, "chatml").added_tokens == []
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == ids
    assert all(tokenizer.added_tokens_decoder[token].special for token in ids)


def test_an_unknown_format_gets_a_suggestion(tokenizer):
    with pytest.raises(UnknownPluginError, match=r"no chat format named 'chatm1'; did you mean 'chatml'\? Installed: "):
        install_chat_format(tokenizer, None, "chatm1")


def test_a_tokenizer_without_eos_is_refused_where_the_format_ends_turns_with_it(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="the vicuna format ends a turn with eos_token, which this tokenizer lacks"):
        install_chat_format(tokenizer, None, "vicuna")
    assert tokenizer.chat_template is None
    assert install_chat_format(tokenizer, None, "chatml").name == "chatml"


@pytest.mark.parametrize("name", ["vicuna", "mistral", "llama2"])
def test_an_answer_that_begins_with_a_space_is_masked_where_offsets_leave_spaces_out(name, tokenizer, tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    conversation = Conversation([Message("user", "Hi"), Message("assistant", "What x")])
    single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    plain = get_renderer(name, tokenizer).tokenize_conversation(conversation)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), single])
    install_chat_format(tokenizer, None, name)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        theirs = each.apply_chat_template(
            conversation.to_dict()["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert theirs["assistant_masks"] == plain.assistant_mask
        assert get_renderer(name, each).tokenize_conversation(conversation) == plain
        assert each("Hi")["input_ids"][0] == tokenizer.bos_token_id

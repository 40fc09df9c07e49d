"""`LMHead.of` reads the logits' last step off real model families exactly as their own forward does it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.head import LMHead

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 7.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_own_logits(family):
    torch.manual_seed(0)
    options = {**SMALL, **FAMILIES[family]}
    if family == "gpt2":
        options = {
            k: v for k, v in options.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
    ids = torch.randint(3, 61, (2, 5))
    with torch.no_grad():
        for parameter in (getattr(model.get_output_embeddings(), "bias", None), model.get_output_embeddings().weight):
            if parameter is not None:
                parameter.normal_()
        expected = model(ids).logits
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(LMHead.of(model)(hidden), expected)


@pytest.fixture
def with_adapter(tiny_causal_lm):
    """`with_adapter(**options)`: a model with an adapter on its head that is of effect."""

    def make(**options):
        torch.manual_seed(0)
        model = tiny_causal_lm(0).double()
        model.lm_head.bias = torch.nn.Parameter(torch.randn(384, dtype=torch.float64))
        return get_peft_model(model, LoraConfig(**{"r": 4, "init_lora_weights": False} | options))

    return make


def test_lora_on_the_head_is_part_of_it_and_gets_its_gradient(with_adapter):
    model = with_adapter(target_modules=["lm_head", "q_proj"])
    causal_lm, ids = model.get_base_model(), torch.randint(3, 380, (2, 5))
    adapter = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def logits_and_gradient(logits):
        logits.square().sum().backward()
        gradient = {name: weight.grad for name, weight in adapter.items()}
        model.zero_grad()
        return [logits, *gradient.values()]

    expected = logits_and_gradient(model(ids).logits)
    ours = logits_and_gradient(LMHead.of(causal_lm)(causal_lm.base_model(ids).last_hidden_state))
    torch.testing.assert_close(ours, expected)
    with model.disable_adapter():
        assert LMHead.of(causal_lm).weight is causal_lm.lm_head.base_layer.weight
    model.merge_adapter()
    torch.testing.assert_close(LMHead.of(causal_lm)(causal_lm.base_model(ids).last_hidden_state), expected[0])


def test_a_head_that_trains_as_a_whole_is_read_as_it_is(with_adapter):
    model = with_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]).get_base_model()
    assert LMHead.of(model).weight is model.lm_head.modules_to_save["default"].weight


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["lm_head"], "lora_bias": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=["dora", "bias", "tokens"],
)
def test_other_adapters_on_the_head_are_refused(options, with_adapter):
    with pytest.raises(ConfigError, match="is on the head, where only plain LoRA can be"):
        LMHead.of(with_adapter(**options).get_base_model())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shape_gradient_is_the_chain_rule(softcap):
    head = LMHead(torch.zeros(1, 1), scale=0.7, softcap=softcap)
    raw = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(head.shape_logits(raw), raw, upstream)
    torch.testing.assert_close(head.shape_gradient(raw.detach(), upstream.clone()), expected)

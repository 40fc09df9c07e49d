"""`LMHead.of` reads the logits' last step off real model families exactly as their own forward does it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_shape_gradient_is_the_chain_rule(softcap):
    head = LMHead(torch.zeros(1, 1), scale=0.7, softcap=softcap)
    raw = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(head.shape_logits(raw), raw, upstream)
    torch.testing.assert_close(head.shape_gradient(raw.detach(), upstream.clone()), expected)

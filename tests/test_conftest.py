"""The fixtures other tests stand on."""

import torch


def test_the_tokenizer_encodes_any_text_without_loss(tiny_tokenizer):
    text = "Straße 42 → café, the quick brown fox.\n"
    ids = tiny_tokenizer(text)["input_ids"]
    assert tiny_tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # it has learnt merges
    assert len(tiny_tokenizer) <= 384
    assert tiny_tokenizer.chat_template is None
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id, tiny_tokenizer.unk_token_id) == (0, 1, 2)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(tiny_causal_lm):
    before = torch.random.get_rng_state()
    one, same, other = tiny_causal_lm(1), tiny_causal_lm(1), tiny_causal_lm(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 384)

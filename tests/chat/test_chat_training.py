"""TRL's SFTTrainer with assistant_only_loss trains on a format as it stands."""

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from trl_distill_plugins.chat import Conversation, get_renderer, install_chat_format

ROWS = [
    [{"role": "user", "content": f"what is {n} ?"}, {"role": "assistant", "content": f"{n} !\n\nit is {n} ."}]
    for n in range(4)
]


@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama2", "vicuna", "zephyr", "mistral"])
def test_assistant_only_loss_trains_the_answers(name, tokenizer, tiny_causal_lm, tmp_path):
    model = tiny_causal_lm(vocab=len(tokenizer), hidden=16, layers=1)
    install_chat_format(tokenizer, model, name)
    renderer = get_renderer(name, tokenizer)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=True,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    data = Dataset.from_dict({"messages": ROWS})
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    for row, messages in zip(trainer.train_dataset, ROWS, strict=True):
        ours = renderer.tokenize_conversation(Conversation.from_dict({"messages": messages}))
        assert row["input_ids"] == ours.input_ids
        assert row["labels"] == ours.labels
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)

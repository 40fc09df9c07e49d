"""Training with a teacher behind a server is training with the same model's likeliest tokens."""

import pytest
import torch

from tests.teachers.served_app import MODEL, Stand, serving
from trl_distill_plugins import DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import IGNORE_INDEX
from trl_distill_plugins.teachers.cache.building import fill_cache, unique
from trl_distill_plugins.teachers.cache.documents import documents_of
from trl_distill_plugins.teachers.cache.header import make_header
from trl_distill_plugins.teachers.cache.selection import TopK
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.completions import Ranks
from trl_distill_plugins.teachers.local import LocalTeacher


@pytest.fixture
def stand(tiny_causal_lm, tiny_tokenizer, monkeypatch):
    """The running server of a tiny teacher, which has no more columns than there are tokens."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = tiny_causal_lm(1, hidden=48, vocab=len(tiny_tokenizer))
    model.lm_head.weight.data *= 30
    with serving(Stand(model, tiny_tokenizer)) as stand:
        yield stand


@pytest.fixture
def make(stand, quiet, saved_models, tiny_tokenizer, rows):
    """`make(teacher, **config)`: a trainer on the rows."""

    def trainer(teacher=None, dataset=rows, **config):
        return DistillSFTTrainer(
            model=str(saved_models["student"]),
            teacher_model=teacher or f"openai:{stand.url}#{MODEL}",
            args=DistillSFTConfig(**quiet | {"losses": ["forward_kl"]} | config),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
        )

    return trainer


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "content"])
def test_a_run_is_the_one_with_a_cache_of_the_same_model(scoring, stand, make, tiny_tokenizer, tmp_path, logged):
    stand.scoring = scoring
    trainer = make()
    trainer.train()
    documents = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        documents += documents_of(batch, batch["labels"][:, 1:] != IGNORE_INDEX)
    curves = [logged(trainer, "loss")]
    for teacher in (LocalTeacher(stand.model), trainer.teacher):
        folder = tmp_path / type(teacher).__name__
        header = make_header(
            teacher="tiny", model="served:tiny", tokenizer=tiny_tokenizer, prompt_template=None, selection=TopK(20)
        )
        fill_cache(
            CacheStore.create(folder, header), teacher, unique(documents), TopK(20),
            vocabulary=len(tiny_tokenizer), batch_size=8, device=torch.device("cpu"), ranks=Ranks(),
        )  # fmt: skip
        cached = make(f"cache:{folder}")
        cached.train()
        curves.append(logged(cached, "loss"))
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[2], rel=2e-2)
    assert curves[0] == pytest.approx(curves[2], rel=2e-2)  # a cache rounds log-probs to 1/16 nat


def test_a_run_that_needs_no_probabilities_asks_for_none(stand, make, bare):
    trainer = make(dataset=bare, losses=["cross_entropy"], max_new_tokens=4)
    trainer.train()
    assert sorted(stand.answered) == sorted(set(bare["input"]))
    assert stand.asked == len(set(bare["input"]))
    assert not any("logprobs" in body or "prompt_logprobs" in body for body in stand.bodies)


def test_a_given_completion_needs_no_server_at_all(make, stand):
    make(losses=["cross_entropy"], trust_remote_code=True).train()  # trusts the student's code: no option of a server
    assert stand.asked == 0


def test_a_text_only_teacher_is_told_from_the_loss_before_anything_is_written(stand, make, bare):
    stand.scoring = "none"
    with pytest.raises(ConfigError, match=r"this teacher gives text only, no probabilities.*\[cross_entropy\]"):
        make(dataset=bare)
    assert all(body["max_tokens"] == 1 for body in stand.bodies)

"""A teacher's word kept on disk: the same texts found again in any batch, and the same losses from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.errors import DataError, TeacherError
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import merged_tile
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.teachers.cache import building
from trl_distill_plugins.teachers.cache.building import fill_cache, unique
from trl_distill_plugins.teachers.cache.codec import DEFAULT_VALUE_BITS
from trl_distill_plugins.teachers.cache.documents import documents_of
from trl_distill_plugins.teachers.cache.header import make_header
from trl_distill_plugins.teachers.cache.selection import Samples, TopK
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.cache.teacher import CachedTeacher
from trl_distill_plugins.teachers.completions import Ranks
from trl_distill_plugins.teachers.local import LocalTeacher

CPU = torch.device("cpu")
STEP = 2.0**-DEFAULT_VALUE_BITS  # log-probs are kept to so many nats


def padded(rows):
    """A batch of `(ids, trained)` padded on the right."""
    width = max(len(ids) for ids, _ in rows)
    inputs = {key: torch.zeros(len(rows), width, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    trained = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (ids, mask) in enumerate(rows):
        inputs["input_ids"][row, : len(ids)] = torch.tensor(ids)
        inputs["attention_mask"][row, : len(ids)] = 1
        trained[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
    return inputs, trained


def packed(rows, padding):
    """The same rows end to end, with `padding` zeros behind."""
    ids = [token for row, _ in rows for token in row] + [0] * padding
    positions = [position for row, _ in rows for position in range(len(row))] + [0] * padding
    trained = [flag for _, mask in rows for flag in [*mask, False]] + [False] * padding
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}, torch.tensor([trained[:-1]])


texts = st.lists(st.integers(0, 383), min_size=2, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(texts, min_size=1, max_size=5), padding=st.integers(0, 3))
def test_padding_and_packing_do_not_change_what_a_text_is_called(rows, padding):
    alone = [doc for row in rows for doc in documents_of(*padded([row]))]
    together, end_to_end = (list(documents_of(*batch)) for batch in (padded(rows), packed(rows, padding)))
    assert [doc.key for doc in together] == [doc.key for doc in end_to_end] == [doc.key for doc in alone]
    assert [doc.ids.tolist() for doc in end_to_end] == [ids for ids, mask in rows if any(mask)]
    different = {(tuple(ids), tuple(mask)) for ids, mask in rows if any(mask)}
    assert len({doc.key for doc in alone}) == len(different)


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 14, (40,), generator=draw).tolist()
    return [
        (torch.randint(2, 384, (n,), generator=draw).tolist(), (torch.rand(n - 1, generator=draw) < 0.7).tolist())
        for n in lengths
    ]


@pytest.fixture(scope="module")
def model(tiny_causal_lm):
    model = tiny_causal_lm(1)
    model.lm_head.weight.data *= 30  # a teacher that knows something
    return model


@pytest.fixture(scope="module")
def build(rows, model, tiny_tokenizer):
    """`build(folder, selection, rows=..., ranks=...)`: a cache of the rows, and the teacher that filled it."""

    def run(folder, selection, rows=rows, ranks=None, batch_size=4):
        header = make_header(
            teacher="tiny", model=model, tokenizer=tiny_tokenizer, prompt_template="x {input}", selection=selection
        )
        store, documents = CacheStore.create(folder, header), unique(documents_of(*padded(rows)))
        for rank in ranks or [Ranks()]:
            fill_cache(
                store, LocalTeacher(model), documents, selection,
                vocabulary=384, batch_size=batch_size, device=CPU, ranks=rank,
            )  # fmt: skip
        return store

    return run


def loss_and_gradient(teacher, batch, loss="forward_kl"):
    inputs, trained = batch
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(int(trained.sum()), 8, generator=draw).requires_grad_()
    head = LMHead(torch.randn(384, 8, generator=draw))
    labels = inputs["input_ids"][:, 1:][trained]
    out = chunked_objective(Objective.from_config([loss]), hidden, head, labels, teacher.signal(inputs, trained))
    out.loss.backward()
    return out.loss.detach() / len(labels), hidden.grad


@pytest.mark.parametrize("loss", ["forward_kl", {"name": "reverse_kl", "temperature": 2.0}, "total_variation"])
def test_all_tokens_kept_is_the_teacher_itself(loss, build, rows, model, tmp_path):
    build(tmp_path, TopK(384))
    value, gradient = loss_and_gradient(CachedTeacher(str(tmp_path)), padded(rows), loss)
    expected, expected_gradient = loss_and_gradient(LocalTeacher(model), padded(rows), loss)
    assert value.item() == pytest.approx(expected.item(), rel=2e-3)
    assert (gradient - expected_gradient).norm() < 0.6 * STEP * expected_gradient.norm()


@pytest.mark.parametrize("selection", [TopK(10), TopK(64, 0.9), TopK(64, min_prob=0.01), Samples(20)], ids=str)
def test_what_is_read_is_what_the_teacher_said(selection, build, rows, model, tmp_path):
    """Within the rounding of stored log-probs; in any order and packing of the batch."""
    build(tmp_path, selection)
    batch = packed(rows[5:15][::-1], 2)
    signal = CachedTeacher(str(tmp_path)).signal(*batch)
    dense = torch.cat([LocalTeacher(model).signal(*padded([row])).hidden for row in rows[5:15][::-1]])
    log_p = LMHead.of(model)(dense).log_softmax(-1)
    named = signal.log_probs > -torch.inf
    assert signal.form == selection.form
    assert named.any(-1).all()
    exact = log_p.gather(-1, signal.ids)
    assert (signal.log_probs - exact)[named].abs().max() < 1.5 * STEP
    if isinstance(selection, TopK):
        mass = log_p.exp().gather(-1, signal.ids).masked_fill(~named, 0).sum(-1)
        full = named.sum(-1) == selection.k
        if selection.min_prob:
            assert (named.sum(-1) == (log_p.exp() >= selection.min_prob).sum(-1).clamp(1, selection.k)).all()
        else:
            assert (full | (mass >= selection.mass - 1e-6)).all()
        smallest = exact.masked_fill(~named, torch.inf).min(-1, keepdim=True).values
        assert ((log_p > smallest + 1e-5).sum(-1) < named.sum(-1)).all(), "they are the likeliest ones"
    else:
        counts = signal.weights * selection.draws
        torch.testing.assert_close(counts.sum(-1), torch.full((len(counts),), 20.0))
        torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)


def test_draws_follow_the_teachers_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).expand(400, 4)
    signal = Samples(50)(logits, torch.Generator().manual_seed(0))
    shares = torch.zeros(400, 4).scatter_add(-1, signal.ids, signal.weights).mean(0)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.01, rtol=0)


def test_a_tail_bucket_keeps_the_mass_of_what_is_left_out(build, rows, model, tmp_path):
    build(tmp_path, TopK(5))
    batch = padded(rows)
    signal, log_p = (
        CachedTeacher(str(tmp_path)).signal(*batch),
        LMHead.of(model)(LocalTeacher(model).signal(*batch).hidden).log_softmax(-1),
    )
    tile = merged_tile(LogitsTile(torch.zeros_like(log_p), None, signal.ids[:, 0]), signal).tile
    tail = 1 - log_p.exp().topk(5).values.sum(-1)
    torch.testing.assert_close(tile.teacher.probs()[:, -1], tail, atol=0.01, rtol=0.05)


def test_the_same_cache_whatever_the_interruptions_and_processes(build, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_DOCUMENTS", 7)
    whole = build(tmp_path / "whole", TopK(10)).content_digest()
    two = build(tmp_path / "two", TopK(10), ranks=[Ranks(0, 2), Ranks(1, 2)])
    assert two.content_digest() == whole

    seen = []

    def interrupt(teacher, batch, *rest):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(batch)
        return records(teacher, batch, *rest)

    records = building._records
    with monkeypatch.context() as patch:
        patch.setattr(building, "_records", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "torn", TopK(10))
    partly = len(CacheStore(tmp_path / "torn"))
    assert 0 < partly < len(two)
    assert build(tmp_path / "torn", TopK(10)).content_digest() == whole


def test_new_rows_are_added_and_old_ones_not_asked_again(build, rows, tmp_path, monkeypatch):
    build(tmp_path, TopK(10), rows=rows[:30])
    asked = []
    records = building._records
    monkeypatch.setattr(building, "_records", lambda t, batch, *rest: asked.extend(batch) or records(t, batch, *rest))
    store = build(tmp_path, TopK(10))
    assert len(asked) == len(list(documents_of(*padded(rows[30:]))))
    assert len(store) == len(list(documents_of(*padded(rows))))


def test_a_text_that_is_not_there_is_shown(build, rows, tiny_tokenizer, tmp_path):
    build(tmp_path, TopK(10))
    teacher = CachedTeacher(str(tmp_path))
    teacher.check_student(tiny_tokenizer)
    ids = tiny_tokenizer("the quick brown fox")["input_ids"]
    with pytest.raises(TeacherError) as caught:
        teacher.signal(*padded([rows[0], (ids, [True] * (len(ids) - 1))]))
    message = str(caught.value)
    assert f"cache:{tmp_path} (of tiny) lacks 1 of the 2 texts of a batch" in message
    assert f"the first has {len(ids)} tokens, which begins 'the quick brown fox'" in message


def test_another_tokenizer_or_template_is_refused_by_its_field(build, tiny_tokenizer, tmp_path):
    from copy import deepcopy

    build(tmp_path, TopK(10))
    teacher, other = CachedTeacher(str(tmp_path)), deepcopy(tiny_tokenizer)
    teacher.check_student(tiny_tokenizer)
    teacher.check_prompt("x {input}")
    other.add_tokens(["<new>"])
    with pytest.raises(TeacherError, match=r"was built with tokenizer blake2b:.*; this run has blake2b:"):
        teacher.check_student(other)
    with pytest.raises(TeacherError, match=r"was built with teacher_prompt_template x \{input\}; this run has None"):
        teacher.check_prompt(None)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"selection": TopK(11)}, "k"), ({"model": 2}, "weights"), ({"prompt_template": "y"}, "teacher_prompt_template")],
    ids=str,
)
def test_adding_to_a_cache_made_otherwise_is_refused(
    change, field, build, model, tiny_causal_lm, tiny_tokenizer, tmp_path
):
    build(tmp_path, TopK(10))
    fields = {"model": model, "prompt_template": "x {input}", "selection": TopK(10), **change}
    if "model" in change:
        fields["model"] = tiny_causal_lm(2)
    with pytest.raises(DataError, match=f"was built with {field} "):
        CacheStore.create(tmp_path, make_header(teacher="tiny", tokenizer=tiny_tokenizer, **fields))


def test_no_cache_there():
    with pytest.raises(TeacherError, match="holds no teacher cache; `trl-distill cache build` makes one"):
        CachedTeacher("/nowhere/at/all")


def test_completions_of_a_served_teacher_are_not_found_without_its_tokenizer(tmp_path, tiny_tokenizer):
    teacher = "openai:http://localhost:1/v1#tiny"
    header = make_header(
        teacher=teacher, model="served:tiny", tokenizer=tiny_tokenizer, prompt_template=None, selection=TopK(8)
    )
    CacheStore.create(tmp_path, header)
    with pytest.raises(
        TeacherError, match=r"its teacher has no tokenizer here; take those .*teacher_completions\.jsonl"
    ):
        CachedTeacher.load_tokenizer(str(tmp_path))

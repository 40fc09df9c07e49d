"""What a served teacher says of given texts is what the same model says in memory."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import check_form, check_signal
from trl_distill_plugins.teachers.local import LocalTeacher
from trl_distill_plugins.teachers.served.scoring import as_signal

TOP = 20


@pytest.fixture(scope="module")
def batch(knowing, tiny_tokenizer):
    """Texts of other people's, one the teacher wrote itself, and one it began; padded, partly trained."""
    own = knowing.generate(torch.tensor([[5, 6]]), max_new_tokens=12, do_sample=False)[0].tolist()
    texts = ["the quick brown fox jumps", "0 1 2 3 4 5 é plus", "what is the capital of france ?"]
    rows = [*(tiny_tokenizer(text)["input_ids"] for text in texts), own, [*own[:8], 100, 101, 102]]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    trained = mask[:, 1:].bool()
    trained[:, 0] = False
    trained[0, 3] = trained[2, 5] = False
    return {"input_ids": ids, "attention_mask": mask}, trained


@pytest.fixture(scope="module")
def exact(batch, knowing):
    """The teacher's log-probs at the trained positions, `[N, V]`."""
    teacher = LocalTeacher(knowing)
    return LMHead.of(knowing)(teacher.signal(*batch).hidden).log_softmax(-1)


def mappable(tokenizer):
    """Tokens that are whole characters: the others all have the text U+FFFD."""
    return torch.tensor(["\ufffd" not in tokenizer.decode([token]) for token in range(len(tokenizer))])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("scoring", "says_ids"),
    [("prompt_logprobs", False), ("echo", False), ("echo", True), ("written", False), ("written", True),
     ("content", False)],
)  # fmt: skip
def test_signals_are_those_of_the_model_in_memory(
    scoring, says_ids, strict, stand, served, batch, exact, tiny_tokenizer
):
    stand.scoring, stand.says_ids, stand.strict = scoring, says_ids, strict
    teacher = served(top_logprobs=TOP)
    assert teacher.form == "top_k"
    signal = teacher.signal(*batch)
    best = exact.topk(TOP)
    expected = torch.full_like(exact, -torch.inf).scatter(1, best.indices, best.values)
    if scoring in ("echo", "written") and not (says_ids and not strict):
        expected[:, ~mappable(tiny_tokenizer)] = -torch.inf
    empty = signal.log_probs == -torch.inf
    got = torch.full_like(exact, -torch.inf)
    for row in range(len(got)):
        got[row, signal.ids[row][~empty[row]]] = signal.log_probs[row][~empty[row]]
    assert (got.isfinite() == expected.isfinite()).all()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    check_signal(signal, [term.loss for term in Objective.from_config(["forward_kl"]).tokens], exact.shape[1])


def test_columns_without_a_token_are_left_to_the_others(stand, served, batch, tiny_causal_lm, tiny_tokenizer):
    """A vocabulary padded to a round width, as most are."""
    stand.model = tiny_causal_lm(1, vocab=len(tiny_tokenizer) + 40).eval()
    stand.most = len(tiny_tokenizer) + 40
    signal = served(top_logprobs=stand.most).signal(*batch)
    assert signal.ids.max() == len(tiny_tokenizer) - 1
    mass = signal.log_probs.exp().sum(1)
    assert ((mass > 0.5) & (mass < 0.99)).all()


def test_packed_texts_get_the_same_signal(served, batch, tiny_tokenizer):
    inputs, trained = batch
    lengths = inputs["attention_mask"].sum(1).tolist()
    flat = torch.cat([inputs["input_ids"][row, :n] for row, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    flags = torch.cat([torch.cat([trained[row, : n - 1], torch.tensor([False])]) for row, n in enumerate(lengths)])
    teacher = served()
    packed = teacher.signal({"input_ids": flat, "position_ids": positions}, flags[None, :-1])
    padded = teacher.signal(*batch)
    assert packed.ids.tolist() == padded.ids.tolist()


def test_a_text_the_teacher_wrote_costs_one_request(stand, served, batch):
    stand.scoring = "content"
    inputs, trained = batch
    teacher = served()
    assert teacher.form == "top_k"
    for row, parts in ((3, False), (4, True)):
        before = stand.asked
        teacher.signal({key: value[[row]] for key, value in inputs.items()}, trained[[row]])
        assert (stand.asked - before > 1) == parts
        assert stand.asked - before <= (4 if parts else 1)  # of its last three tokens, each may part


def test_replay_does_not_write_more_than_three_texts_per_text(stand, served):
    stand.scoring = "content"
    teacher = served()
    teacher.form  # noqa: B018 - probes
    stand.bodies.clear()
    ids = torch.randint(2, len(stand.tokenizer), (1, 60), generator=torch.Generator().manual_seed(0))
    teacher.signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.ones(1, 59).bool())
    assert sum(body["max_tokens"] for body in stand.bodies) <= 3 * 59


def test_an_end_the_server_does_not_show_is_taken_as_certain(stand, served, knowing, caplog):
    stand.scoring, stand.says_end = "content", False
    prompt, teacher = [5, 6], served()
    assert teacher.form == "top_k"
    stand.write = ending(stand.write, stand.tokenizer.eos_token_id, after=4)
    written, _, _ = stand.write(prompt, 9, 0)
    ids = torch.tensor([[*prompt, *written]])
    trained = torch.ones(1, ids.shape[1] - 1).bool()
    trained[0, 0] = False
    for _ in range(2):
        signal = teacher.signal({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, trained)
    assert signal.ids[-1, 0] == stand.tokenizer.eos_token_id
    assert signal.log_probs[-1, 0] == 0
    assert [r.message for r in caplog.records].count(
        f"{teacher} gives no log-probs of the end token; where it ends a text, that is taken as certain"
    ) == 1


def ending(write, end, after):
    """`write` of a model that ends a text of `after` tokens."""

    def short(ids, count, temperature):
        left = max(after + 2 - len(ids), 0)
        written, said, reason = write(ids, min(count, left + 1), temperature)
        if len(written) <= left:
            return written, said, reason
        return [*written[:-1], end], said, "stop"

    return short


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "echo", "written", "content"])
def test_a_server_with_other_tokens_is_refused(scoring, stand, served, batch):
    stand.scoring, stand.name_of = scoring, lambda token: f"<{7 * token}>"
    with pytest.raises(TeacherError, match=r"another tokenizer than the student.*losses: \[cross_entropy\]"):
        served().signal(*batch)


@pytest.mark.parametrize("scoring", ["prompt_logprobs", "echo", "content"])
@pytest.mark.parametrize("refuses", [False, True])
def test_fewer_log_probs_than_asked_are_taken_with_one_warning(refuses, scoring, stand, served, batch, caplog):
    stand.scoring, stand.most, stand.refuses_more = scoring, 5, refuses
    teacher = served(top_logprobs=20)
    with caplog.at_level(logging.WARNING):
        signals = [teacher.signal(*batch) for _ in range(2)]
    named = (signals[0].log_probs > -torch.inf).sum(1)
    assert 1 <= named.max() <= 6
    (warning,) = [record.message for record in caplog.records if "names" in record.message]
    assert warning.endswith("tokens of each position, 20 were asked for")


@pytest.mark.parametrize("mode", ["none", "chat_only"])
def test_a_teacher_without_log_probs_only_writes(mode, stand, served, batch):
    stand.scoring, stand.chat_only = "none", mode == "chat_only"
    teacher = served()
    assert teacher.form == "text"
    losses = [term.loss for term in Objective.from_config(["cross_entropy", "reverse_kl"]).tokens]
    with pytest.raises(
        ConfigError, match=r"'reverse_kl' compares probabilities, and this teacher gives text only.*\[cross_entropy\]"
    ):
        check_form(teacher.form, losses)
    check_form(teacher.form, losses[:1])
    with pytest.raises(TeacherError, match="gives text only, no log-probs"):
        teacher.signal(*batch)


def test_the_server_is_asked_for_log_probs_only_once(stand, served, batch):
    teacher = served()
    assert stand.asked == 0
    assert teacher.form == teacher.form == "top_k"
    assert stand.asked == 1
    teacher.signal(*batch)
    assert stand.asked == 6


def test_texts_are_scored_together(stand, served, batch):
    teacher = served(max_concurrency=4)
    teacher.form  # noqa: B018 - probes
    stand.delay = 0.2
    teacher.signal(*batch)
    assert stand.busiest == 4


def test_a_prompt_the_server_cuts_is_refused(stand, served, batch):
    stand.scoring = "prompt_logprobs"
    teacher = served()
    assert teacher.form == "top_k"
    whole = stand.ids_of
    stand.ids_of = lambda prompt: whole(prompt)[-4:]
    with pytest.raises(TeacherError, match="gave log-probs of 4 tokens that are not the"):
        teacher.signal(*batch)


@given(
    rows=st.lists(
        st.dictionaries(st.integers(0, 30), st.floats(-30, 0), max_size=8).map(
            lambda named: {token: value - 3.4 for token, value in named.items()}  # 31 tokens: no more than 1 together
        ),
        min_size=1,
        max_size=5,
    ),
    top=st.integers(1, 6),
    excess=st.floats(0, 0.04),
)
def test_a_signal_holds_the_likeliest_and_no_more_than_one(rows, top, excess):
    rows[0] = {1: excess}
    signal = as_signal(rows, top, 40)
    check_signal(signal, [term.loss for term in Objective.from_config(["forward_kl"]).tokens], 40)
    assert (signal.log_probs.logsumexp(-1) <= 1e-6).all()
    for row, named in enumerate(rows):
        kept = signal.ids[row][signal.log_probs[row] > -torch.inf].tolist()
        assert len(set(kept)) == len(kept)
        likeliest = sorted(named.values(), reverse=True)[:top]
        assert sorted((named[token] for token in kept), reverse=True) == likeliest if named else kept == [39]


def test_no_texts_give_no_signal(served):
    ids = torch.ones(2, 4, dtype=torch.long)
    signal = served().signal({"input_ids": ids, "attention_mask": ids}, torch.zeros(2, 3).bool())
    assert len(signal) == 0

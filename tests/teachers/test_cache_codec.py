"""The cache's codec: ids and draws come back exactly, log-probs to 1.5 steps, and masses stay masses."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.cache import bits, layout, postings
from trl_distill_plugins.teachers.cache.codec import DEFAULT_VALUE_BITS, decode, encode

thorough = settings(deadline=None, max_examples=100)


def signal_of(rows):
    """A top-k signal of `{token: log_prob}` a position; positions that name fewer are filled with token 0 at -inf."""
    k = max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), k, dtype=torch.int64)
    log_probs = torch.full((len(rows), k), -math.inf)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row))
        log_probs[i, : len(row)] = torch.tensor(list(row.values()))
    return SparseSignal(ids, log_probs)


def drawn_signal(rng, n, vocabulary, draws):
    """What a teacher of random log-probs gives when each position is sampled `draws` times."""
    p = rng.dirichlet(np.full(vocabulary, 0.2), n)
    counts = torch.from_numpy(np.stack([rng.multinomial(draws, row) for row in p]))
    weights, ids = (counts / draws).float().topk(min(draws, vocabulary))
    log_probs = torch.from_numpy(p).log().clamp_min(-90).float().gather(1, ids).masked_fill(weights == 0, -math.inf)
    return SparseSignal(ids, log_probs, weights), counts


def rows_of(signal):
    """`{token: (log_prob, weight)}` of each position, without the filling."""
    weights = torch.ones_like(signal.log_probs) if signal.weights is None else signal.weights
    columns = zip(signal.ids.tolist(), signal.log_probs.tolist(), weights.tolist(), strict=True)
    return [{i: (p, w) for i, p, w in zip(*row, strict=True) if p > -math.inf} for row in columns]


@st.composite
def documents(draw):
    """Vocabulary and positions: any number of tokens each, ties, log-probs of 0 to -100, masses of up to 1."""
    vocabulary = draw(st.integers(2, 2**20))
    n, rows = draw(st.integers(0, 6)), []
    for _ in range(n):
        tokens = draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=20, unique=True))
        logits = draw(st.lists(st.sampled_from([0.0, -1.0, -1.0, -7.3, -40.0]), min_size=len(tokens)))
        rest = draw(st.sampled_from([0.0, 1e-9, 1e-4, 0.05, 0.5, 1 - 1e-6]))
        level = torch.tensor(logits[: len(tokens)], dtype=torch.float64).log_softmax(0) + math.log1p(-rest)
        lowered = level - draw(st.sampled_from([0.0, 0.0, 45.0]))
        rows.append(dict(zip(tokens, lowered.tolist(), strict=True)))
    return vocabulary, signal_of(rows)


@thorough
@given(documents(), st.integers(0, 12))
def test_a_document_comes_back(document, value_bits):
    vocabulary, signal = document
    decoded = decode(encode(signal, vocabulary, value_bits))
    bound = 1.5 * 2.0**-value_bits + 1e-4
    assert decoded.weights is None
    assert (decoded.ids.dtype, decoded.log_probs.dtype) == (torch.int64, torch.float32)
    for row, again in zip(rows_of(signal), rows_of(decoded), strict=True):
        assert again.keys() == row.keys()
        assert all(abs(again[token][0] - row[token][0]) <= bound for token in row)
    assert (decoded.log_probs.double().exp().sum(1) <= 1).all()


@thorough
@given(documents(), st.integers(0, 12))
def test_the_mass_of_all_other_tokens_comes_back(document, value_bits):
    vocabulary, signal = document
    decoded = decode(encode(signal, vocabulary, value_bits))
    before, after = (1 - s.log_probs.double().exp().sum(1) for s in (signal, decoded))
    shift = (after.log() - before.clamp_min(1e-38).log()).abs()
    assert (shift[before > 1e-5] <= 0.5 * 2.0**-value_bits + 0.02).all()
    assert (after[before < 1e-7] < 1e-6).all()


@thorough
@given(st.integers(0, 2**32), st.integers(2, 300), st.integers(1, 60), st.booleans())
def test_draws_come_back_exactly(seed, vocabulary, draws, knows_log_probs):
    signal, counts = drawn_signal(np.random.default_rng(seed), 5, vocabulary, draws)
    if not knows_log_probs:
        signal = SparseSignal(signal.ids, signal.weights.log(), signal.weights)
    decoded = decode(encode(signal, vocabulary, draws=draws))
    again = torch.zeros(counts.shape).scatter_add_(1, decoded.ids, decoded.weights)
    assert torch.equal(again, (counts / draws).float())
    before, after = rows_of(signal), rows_of(decoded)
    bound = 1.5 * 2.0**-DEFAULT_VALUE_BITS + 1e-4 if knows_log_probs else 0
    assert all(abs(a[t][0] - b[t][0]) <= bound for a, b in zip(after, before, strict=True) for t in b)
    assert (decoded.log_probs.double().exp().sum(1) <= 1 + 1e-6 * (not knows_log_probs)).all()


def test_rounding_to_fp32_never_makes_more_mass_than_one():
    """Equal log-probs are rounded alike, so that their errors add up."""
    for k in range(1, 600):
        even = SparseSignal(torch.arange(k)[None], torch.full((1, k), -math.log(k)))
        assert decode(encode(even, k)).log_probs.double().exp().sum() <= 1


def test_more_value_bits_are_closer():
    log_probs = torch.randn(200, 5000).mul(3).log_softmax(-1)
    top, ids = log_probs.topk(64)
    order = ids.sort(1)
    errors = []
    for value_bits in (3, 5, 7):
        decoded = decode(encode(SparseSignal(ids, top), 5000, value_bits))
        errors.append((decoded.log_probs - top.gather(1, order.indices)).pow(2).mean().sqrt().item())
    # A rounding error is even between half a step up and half a step down.
    assert errors == pytest.approx([2.0**-bits / math.sqrt(12) for bits in (3, 5, 7)], rel=0.1)


def test_a_document_without_positions():
    empty = SparseSignal(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4))
    assert len(decode(encode(empty, 100))) == 0


def test_what_a_position_does_not_use_repeats_its_last_token():
    decoded = decode(encode(signal_of([{7: -1.0, 3: -2.0}, {5: -0.5}]), 9))
    assert decoded.ids.tolist() == [[3, 7], [5, 5]]
    assert decoded.log_probs[1, 1] == -math.inf


BAD = {
    "no token at position 1": [{1: -1.0}, {2: -math.inf}],
    "names token 9, and its vocabulary has 9": [{9: -1.0}],
    "names token -1": [{-1: -1.0}],
    "must be -100000 to 0": [{1: 0.5}],
    "named tokens must be -100000": [{1: math.nan, 2: -1.0}],
    "sum to 1.2": [{1: math.log(0.6), 2: math.log(0.6)}],
}


@pytest.mark.parametrize("message", BAD)
def test_what_no_teacher_says_is_refused(message):
    with pytest.raises(DataError, match=message):
        encode(signal_of(BAD[message]), 9)


def test_a_token_named_twice_is_refused():
    with pytest.raises(DataError, match="twice"):
        encode(SparseSignal(torch.tensor([[4, 4]]), torch.tensor([[-1.0, -2.0]])), 9)


def test_weights_that_are_no_shares_of_the_draws_are_refused():
    weights = torch.tensor([[0.5, 0.5]])
    with pytest.raises(DataError, match="shares of 5 draws"):
        encode(SparseSignal(torch.tensor([[4, 5]]), weights.log(), weights), 9, draws=5)


def test_draws_go_with_samples():
    with pytest.raises(ValueError, match="draws"):
        encode(signal_of([{1: -1.0}]), 9, draws=5)


def test_a_step_that_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="value_bits is 13"):
        encode(signal_of([{1: -1.0}]), 9, value_bits=13)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_document_cut_short_is_refused_at_every_length(sampled):
    signal, _ = drawn_signal(np.random.default_rng(0), 6, 500, 20)
    top = SparseSignal(signal.ids, signal.log_probs)
    blob = encode(signal, 500, draws=20) if sampled else encode(top, 500)
    for length in range(len(blob)):
        with pytest.raises(DataError, match="damaged"):
            decode(blob[:length])


@thorough
@given(documents(), st.data())
def test_a_changed_document_is_refused_or_is_another_document(document, data):
    """The shard's checksum finds changes; the codec only has to stay within its bytes."""
    vocabulary, signal = document
    blob = bytearray(encode(signal, vocabulary))
    for _ in range(data.draw(st.integers(1, 4))):
        last = data.draw(st.sampled_from([31, len(blob) - 1]))  # often the header
        blob[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(blob))
    except DataError:
        return
    assert len(decoded) == 0 or 0 <= decoded.ids.min() <= decoded.ids.max() < 2**32


def patched(blob, place, value):
    return blob[:place] + bytes([value]) + blob[place + 1 :]


def test_a_header_that_no_document_has_is_refused():
    signal, _ = drawn_signal(np.random.default_rng(0), 6, 500, 20)
    blob = encode(signal, 500, draws=20)
    assert blob[24:28] == bytes([20, 0, 0, 0])
    for place, value in ((0, 0), (6, 0), (6, 4), (8, 33), (9, 255), (24, 0)):
        with pytest.raises(DataError, match=r"damaged: it(s header is out of range| does not start like one)"):
            decode(patched(blob, place, value))


OUTSIDE = {
    "outside the vocabulary": ([0, 0], [3, 5], [0, 1]),
    "at positions it does not have": ([0, 0], [3, 0], [0, 3]),
    "no token at some position": ([0, 0], [3, 0], [0, 0]),
}


@pytest.mark.parametrize("message", OUTSIDE)
def test_a_record_that_no_encoder_wrote_is_refused(message):
    """Three positions; two tokens, each named once."""
    counts, table, gaps = OUTSIDE[message]
    kinds = [counts, [5, 5, 5], table, gaps, [0, 3], []]
    codes = layout.Codes(*(np.array(kind, np.int64) for kind in kinds))
    with pytest.raises(DataError, match=message):
        decode(layout.write(codes, layout.WITH_LOG_PROBS, 4, 3, 9, 0))


@thorough
@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.sets(st.integers(0, n - 1), min_size=1)).map(lambda s: (n, s))))
def test_positions_of_tokens_come_back_and_the_fewer_are_listed(lists):
    total, sets = lists
    counts = np.array([len(each) for each in sets], np.int64)
    positions = np.array([place for each in sets for place in sorted(each)], np.int64)
    gaps = postings.pack_positions(positions, counts, total)
    assert len(gaps) == sum(min(len(each), total - len(each)) for each in sets)
    assert gaps.min(initial=0) >= 0
    assert postings.unpack_positions(gaps, counts, total).tolist() == positions.tolist()


@thorough
@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage):
    with pytest.raises(DataError):
        decode(garbage)


def test_a_later_format_is_named():
    blob = bytearray(encode(signal_of([{1: -1.0}]), 9))
    blob[4] = 7
    with pytest.raises(DataError, match="format 7; this version reads 2"):
        decode(bytes(blob))


@thorough
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, bits.MAX_WIDTH)), max_size=50))
def test_fields_of_any_width_come_back(fields):
    widths = np.array([width for _, width in fields], np.int64)
    values = np.array([value & ((1 << width) - 1) for value, width in fields], np.int64)
    packed = bits.pack_fields(values, widths)
    assert len(packed) == (int(widths.sum()) + 7) // 8
    assert bits.unpack_fields(memoryview(packed), widths).tolist() == values.tolist()


def test_decoding_keeps_up_with_training():
    """At k = 64, far above the 50,000 positions a second that the fastest students take; CPU time, best of five."""
    top, ids = torch.randn(1000, 32000).mul(2.5).log_softmax(-1).topk(64)
    blob = encode(SparseSignal(ids, top), 32000)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        decode(blob)
        seconds.append(time.process_time() - start)
    assert 1000 / min(seconds) > 50_000

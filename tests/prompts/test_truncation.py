"""The rules of truncation, for every length."""

from hypothesis import given
from hypothesis import strategies as st

from trl_distill_plugins.prompts.truncation import Truncation, Windows, cut_beginning

BOS = 0
IDS = st.lists(st.integers(1, 9), max_size=30)
PROMPTS = st.lists(st.integers(1, 9), min_size=1, max_size=30) | IDS.map(lambda ids: [BOS, *ids])
WINDOWS = st.none() | st.integers(2, 40)


@given(PROMPTS, PROMPTS, IDS, WINDOWS, WINDOWS)
def test_what_is_kept_fits_and_is_as_much_as_the_rules_allow(student, teacher, completion, window_s, window_t):
    kept_s, kept_t, kept_c, cut = Windows(window_s, window_t).fit(student, teacher, completion, BOS)
    rooms = [len(completion)]
    for prompt, kept, window, flag in (
        (student, kept_s, window_s, Truncation.STUDENT_PROMPT),
        (teacher, kept_t, window_t, Truncation.TEACHER_PROMPT),
    ):
        allowed = len(prompt) if window is None else window - min(len(completion), window // 2)
        assert len(kept) == min(len(prompt), allowed) >= 1
        assert bool(cut & flag) == (len(kept) < len(prompt))
        has_bos = prompt[0] == BOS and len(kept) > 1
        assert kept[has_bos:] == prompt[len(prompt) - len(kept) + has_bos :]
        assert kept[0] == BOS or not has_bos
        if window is not None:
            assert len(kept) + len(kept_c) <= window
            rooms.append(window - len(kept))
    assert kept_c == completion[: min(rooms)]
    assert len(kept_c) >= min(1, len(completion))
    assert bool(cut & Truncation.COMPLETION) == (kept_c != completion)


def test_a_short_completion_leaves_its_room_to_the_prompt():
    student, _, completion, cut = Windows(10, None).fit([*range(1, 21)], [1], [7, 8], None)
    assert (student, completion, cut) == ([*range(13, 21)], [7, 8], Truncation.STUDENT_PROMPT)


def test_a_leading_bos_stays_unless_only_one_token_does():
    assert cut_beginning([0, 1, 2, 3], 2, 0) == [0, 3]
    assert cut_beginning([0, 1, 2, 3], 1, 0) == [3]
    assert cut_beginning([0, 1, 2, 3], 2, None) == [2, 3]


def test_the_description_counts_and_names_the_options():
    text = Windows(512, 1024).describe({Truncation.STUDENT_PROMPT: 3, Truncation.COMPLETION: 7})
    assert text == (
        "3 student prompts lost their beginning, 7 completions lost their end; "
        "raise max_length (512) or max_teacher_length (1024)"
    )
    assert Windows(512, None).describe({Truncation.COMPLETION: 1}).endswith("; raise max_length (512)")
    assert Windows(512, None).describe({}) == ""

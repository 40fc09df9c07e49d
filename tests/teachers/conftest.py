"""A server of a tiny model, and the teacher behind it."""

import pytest


@pytest.fixture(scope="session")
def knowing(tiny_causal_lm, tiny_tokenizer):
    """A tiny model with pronounced opinions, to be a teacher; it has no more columns than there are tokens."""
    model = tiny_causal_lm(1, vocab=len(tiny_tokenizer))
    model.lm_head.weight.data *= 30
    return model


@pytest.fixture
def stand(knowing, tiny_tokenizer, monkeypatch):
    """The running server of `knowing`, with nothing wrong."""
    from tests.teachers.served_app import Stand, serving

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(Stand(knowing, tiny_tokenizer)) as stand:
        yield stand


@pytest.fixture
def served(stand, tiny_tokenizer):
    """`served(model="tiny", **options)`: a teacher behind the server, for the tiny tokenizer."""
    from tests.teachers.served_app import MODEL
    from trl_distill_plugins.teachers import make_teacher

    def make(model=MODEL, **options):
        teacher = make_teacher(f"openai:{stand.url}#{model}", options)
        teacher.check_student(tiny_tokenizer)
        return teacher

    return make

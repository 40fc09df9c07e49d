"""Completions from a server, with everything that goes wrong on the way: none is lost, none is there twice."""

import json
import logging
import sys
import threading
import time

import pytest

from tests.teachers.served_app import chosen, cut_body, error, torn_body
from trl_distill_plugins.errors import ConfigError, TeacherError
from trl_distill_plugins.teachers import make_teacher
from trl_distill_plugins.teachers.base import Generation, TeacherPrompt
from trl_distill_plugins.teachers.completions import CompletionStore, Ranks, make_request, write_completions
from trl_distill_plugins.teachers.local import LocalTeacher

TEXTS = [f"the quick brown fox {number} plus {number * 7}" for number in range(12)]
GENERATION = Generation(max_new_tokens=6)


@pytest.fixture
def write(tmp_path, tiny_tokenizer):
    """`write(teacher, texts, batch_size)`: `write_completions` into `tmp_path`, as a run does."""

    def run(teacher, texts=TEXTS, batch_size=4, chat=False):
        requests = [
            make_request(
                TeacherPrompt(
                    [{"role": "user", "content": text}] if chat else text, tiny_tokenizer(text)["input_ids"]
                ),
                {"prompt": text}, str(teacher), GENERATION,
            )
            for text in texts
        ]  # fmt: skip
        store = CompletionStore(tmp_path / "teacher_completions.jsonl", Ranks())
        return write_completions(requests, teacher, GENERATION, store, batch_size=batch_size, description="test")

    return run


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "teacher_completions.jsonl").read_text().splitlines()]


def prompts_in(tmp_path):
    return sorted(line["prompt"] for line in lines(tmp_path))


@pytest.mark.parametrize("chat", [False, True])
def test_completions_are_those_of_the_model_in_memory(chat, stand, served, write, knowing, tiny_tokenizer):
    teacher = LocalTeacher(knowing)
    teacher.check_student(tiny_tokenizer)
    prompts = [TeacherPrompt(text, tiny_tokenizer(text)["input_ids"]) for text in TEXTS]
    expected = dict(teacher.generate(prompts, GENERATION, 4))
    records = write(served(), chat=chat)
    assert [record["completion"] for record in records] == [expected[i].text for i in range(len(TEXTS))]
    assert [record["finish_reason"] == "stop" for record in records] == [
        expected[i].finished for i in range(len(TEXTS))
    ]
    assert sorted(stand.answered) == sorted(TEXTS)


def test_requests_are_in_flight_together(stand, served, write):
    stand.delay = 0.2
    write(served(), batch_size=6)
    assert stand.busiest == 6


@pytest.mark.parametrize(
    "faults",
    [
        [error(429, "slow down", retry_after="0.2")],
        [error(500, "oops"), error(503, "not yet")],
        [error(408, "late"), error(409, "locked")],
        [cut_body()],
        [torn_body()],
    ],
    ids=["429", "500", "408", "cut", "torn"],
)
def test_a_passing_fault_costs_a_repetition(faults, stand, served, write, tmp_path):
    stand.faults = list(faults)
    write(served(max_retries=3))
    assert prompts_in(tmp_path) == sorted(TEXTS)
    assert sorted(stand.answered) == sorted(TEXTS)
    assert stand.asked == len(TEXTS) + len(faults)


def test_retry_after_is_honoured(stand, served, write):
    stand.faults = [error(429, "slow down", retry_after="1.5")]
    began = time.monotonic()
    write(served(max_retries=1), TEXTS[:1])
    assert time.monotonic() - began >= 1.5  # its own first pause is half a second at most


@pytest.mark.parametrize(
    ("status", "advice"),
    [(500, r"failed, asked up to 2 times \(status 500: .*oops"), (429, "generation_batch_size")],
)
def test_a_lasting_fault_keeps_what_was_written_and_is_resumed(status, advice, stand, served, write, tmp_path):
    stand.fault = lambda body, number: error(status, "oops") if len(stand.answered) >= 5 else None
    with pytest.raises(TeacherError, match=advice) as caught:
        write(served(max_retries=1), batch_size=3)
    assert "the same command goes on there" in str(caught.value)
    assert f"{stand.url}#tiny" in str(caught.value)
    assert prompts_in(tmp_path) == sorted(stand.answered)
    assert 5 <= len(stand.answered) <= 7
    stand.fault = None
    write(served(max_retries=1), batch_size=3)
    assert prompts_in(tmp_path) == sorted(TEXTS) == sorted(stand.answered)


def test_a_server_that_is_not_there_is_named(stand, write, served, tmp_path):
    teacher = make_teacher("openai:http://127.0.0.1:9/v1#tiny", {"max_retries": 1})
    teacher.check_student(None)
    with pytest.raises(TeacherError, match=r"127.0.0.1:9/v1#tiny could not be reached, asked up to 2 times .*start"):
        write(teacher, batch_size=2)
    assert not (tmp_path / "teacher_completions.jsonl").exists()


def test_a_slow_server_is_named_and_its_finished_completions_are_kept(stand, served, write, tmp_path):
    slow = TEXTS[-1]
    stand.fault = lambda body, number: time.sleep(4) if body["prompt"] == slow else None
    with pytest.raises(TeacherError, match=r"did not answer within 2 s, asked once; lower generation_batch_size"):
        write(served(timeout=2, max_retries=0), batch_size=12)
    assert prompts_in(tmp_path) == sorted(TEXTS[:-1])


@pytest.mark.parametrize("response", [cut_body(), torn_body(), error(200, "no choices")], ids=["cut", "torn", "empty"])
def test_an_answer_that_stays_unreadable_is_not_half_kept(response, stand, served, write, tmp_path):
    stand.fault = lambda body, number: response
    with pytest.raises(TeacherError, match=r"gave no answer of this API|could not be reached"):
        write(served(max_retries=1), TEXTS[:1])
    assert not (tmp_path / "teacher_completions.jsonl").exists()
    assert stand.asked == 2


def test_a_page_that_is_not_json_is_named(stand, served, write):
    from fastapi.responses import HTMLResponse

    stand.fault = lambda body, number: HTMLResponse("<html>Welcome to nginx!</html>")
    with pytest.raises(TeacherError, match=r"gave no answer of this API, asked once \(.*nginx.*usually ends in /v1"):
        write(served(max_retries=0), TEXTS[:1])


def test_an_unknown_model_is_answered_with_those_there_are(stand, served, write):
    with pytest.raises(TeacherError, match=r"no model 'tinny'; did you mean 'tiny'\? It offers: tiny, other"):
        write(served("tinny"), batch_size=1)
    assert stand.asked == 1
    with pytest.raises(TeacherError, match="did you mean 'tiny'"):
        _ = served("tinny").form


def test_a_server_without_the_endpoint_gets_advice(stand, served, write):
    stand.chat_only = True
    with pytest.raises(TeacherError, match=r"has no /completions .*chat messages, or set .*\{api: chat\}"):
        write(served(), batch_size=1)
    assert stand.asked == 1
    records = write(served(api="chat"))
    assert len(records) == len(TEXTS)


def test_messages_do_not_go_to_the_completions_endpoint(served, write):
    with pytest.raises(TeacherError, match=r"leave out teacher_model_init_kwargs: \{api: completions\}"):
        write(served(api="completions"), chat=True)


def test_a_refused_request_stops_at_once_and_keeps_the_others(stand, served, write, tmp_path):
    long = TEXTS[3]
    stand.fault = lambda body, number: error(400, "prompt too long") if body["prompt"] == long else None
    with pytest.raises(TeacherError, match=r"refused a request to /completions \(status 400: .*prompt too long"):
        write(served(), batch_size=2)
    assert [body["prompt"] for body in stand.bodies].count(long) == 1
    assert prompts_in(tmp_path) == sorted(stand.answered)


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        (chosen("half of a sec", "content_filter"), "", "stop"),
        (chosen(None), "", "stop"),
        (chosen(""), "", "stop"),
        (chosen(" cut", "length"), " cut", "length"),
        (chosen(None, "length", chat=True), "", "length"),
        (chosen(None, "tool_calls", chat=True), "", "stop"),
    ],
    ids=["filtered", "none", "empty", "length", "thought too long", "tool call"],
)
def test_how_an_answer_ended(answer, text, reason, stand, served, write, tmp_path):
    stand.fault = lambda body, number: answer
    (record,) = write(served(), TEXTS[:1], chat=b"message" in answer.body)
    assert (record["completion"], record["finish_reason"]) == (text, reason)


def test_a_caller_who_stops_is_not_waited_for(stand, served, tiny_tokenizer):
    """As Ctrl-C does: what is in flight is left, and nothing else is begun."""
    prompts = [TeacherPrompt(text, []) for text in TEXTS]
    stand.fault = lambda body, number: time.sleep(1.0) if number > 1 else None
    answers = served().generate(prompts, GENERATION, 3)
    next(answers)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 0.5
    time.sleep(1.5)
    assert stand.asked <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(loop)")]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://user:hunter2@localhost/v1#m", "the key comes from the environment, OPENAI_API_KEY"),
        ("http://user:1#hunter2@localhost/v1#m", "the key comes from the environment, OPENAI_API_KEY"),
        ("http://user:hun#ter2@localhost/v1#m", "the key comes from the environment, OPENAI_API_KEY"),
        ("http://localhost/v1?api_key=hunter2#m", "the key comes from the environment, OPENAI_API_KEY"),
        ("localhost:8000/v1#m", "no http or https URL"),
        ("http://localhost:8000/v1", "nothing stands behind #"),
    ],
)
def test_an_address_that_cannot_be_is_not_repeated(address, message):
    with pytest.raises(TeacherError, match=message) as caught:
        make_teacher(f"openai:{address}")
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"api_key": "hunter2"}, TeacherError, "api_key is not taken.*OPENAI_API_KEY"),
        ({"default_headers": {"x": "hunter2"}}, TeacherError, "default_headers is not taken"),
        ({"top_logprob": 3}, ConfigError, "no option 'top_logprob'; did you mean 'top_logprobs'"),
        ({"dtype": "hunter2"}, ConfigError, "no option 'dtype'. Options: api, top_logprobs, max_concurrency, timeout"),
        ({"api": "responses"}, ConfigError, "api must be 'chat' or 'completions'"),
        ({"top_logprobs": 0}, ConfigError, "top_logprobs must be a number at least 1"),
        ({"timeout": 0}, ConfigError, "timeout must be a number above 0"),
    ],
)
def test_options_are_checked_by_name(options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make_teacher("openai:http://localhost:8000/v1#m", options)
    assert "hunter2" not in str(caught.value)


def test_without_the_sdk_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"pip install 'trl-distill-plugins\[openai\]'"):
        make_teacher("openai:http://localhost:8000/v1#m")


def test_openai_itself_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(TeacherError, match=r"api\.openai\.com/v1#gpt-x needs a key; set .* OPENAI_API_KEY"):
        make_teacher("openai:#gpt-x")


@pytest.mark.parametrize("key", ["sk-wrong-0123456789", None])
def test_a_refused_key_is_not_repeated(key, stand, served, write, monkeypatch, caplog):
    stand.key = "sk-right"
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(TeacherError, match=r"status 401.*Incorrect API key.* OPENAI_API_KEY") as caught:
        write(served(), TEXTS[:1])
    assert stand.asked == 1
    shown = [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__), caplog.text]
    assert key is None or not any(key in text for text in shown)
    assert ("none was sent" in str(caught.value)) == (key is None)

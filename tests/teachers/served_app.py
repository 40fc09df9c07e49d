"""An OpenAI-compatible server of a tiny local model, with the log-probs and the faults a test asks for.

`Stand` holds what the test switches and what the server counted; `serving(stand)` runs it on a free port of localhost.
"""

import contextlib
import socket
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

MODEL = "tiny"


class Stand:
    """What the server does, and what it saw.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.scoring = "prompt_logprobs"  # or echo, written, content, none
        self.strict = False  # refuse options the scoring does not know
        self.most = 100  # log-probs a position, at most
        self.refuses_more = False  # ... or give fewer without a word
        self.says_end = True  # whether the end token is among what was written
        self.says_ids = False  # whether return_tokens_as_token_ids is known
        self.name_of = lambda token: tokenizer.decode([token])
        self.chat_only = False
        self.key = None
        self.delay = 0.0
        self.faults = []  # responses, each to one request
        self.fault = None  # a function of (body, number) that returns a response, or None to answer
        self.answered = []  # prompts that got a whole answer
        self.asked = 0
        self.bodies = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = None

    def enter(self, body):
        with self.lock:
            self.asked += 1
            self.bodies.append(body)
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
            fault = self.faults.pop(0) if self.faults else None
            return fault, self.asked

    def ids_of(self, prompt):
        return prompt if isinstance(prompt, list) else self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def log_probs(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def write(self, ids, count, temperature):
        """The ids written, the log-probs at each, and whether the end came."""
        ids, written, said = list(ids), [], []
        for _ in range(count):
            said.append(self.log_probs(ids)[-1])
            token = int(said[-1].argmax() if temperature == 0 else (said[-1] / temperature).exp().multinomial(1))
            written.append(token)
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                return written, said, "stop"
        return written, said, "length"

    def top(self, row, count, own=None):
        count = min(count, self.most)
        best = row.topk(count)
        pairs = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return pairs if own is None else pairs | {own: row[own].item()}


def make_app(stand):
    app = FastAPI()

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "other", "object": "model"}]}

    @app.post("/v1/completions")
    def completions(body: dict, request: Request):
        return attend(stand, body, request, complete)

    @app.post("/v1/chat/completions")
    def chat(body: dict, request: Request):
        return attend(stand, body, request, converse)

    return app


def attend(stand, body, request, work):
    fault, number = stand.enter(body)
    try:
        time.sleep(stand.delay)
        if stand.key is not None and request.headers.get("authorization") != f"Bearer {stand.key}":
            said = request.headers.get("authorization")
            return error(401, f"Incorrect API key provided: {said}")
        if body.get("model") != MODEL:
            return error(404, f"The model `{body.get('model')}` does not exist.")
        if fault is None and stand.fault is not None:
            fault = stand.fault(body, number)
        if fault is not None:
            return fault
        answer = work(stand, body)
        if not isinstance(answer, Response):
            with stand.lock:
                stand.answered.append(body.get("prompt") or body["messages"][-1]["content"])
            answer = JSONResponse({"id": "1", "object": "text_completion", "model": MODEL, "choices": [answer]})
        return answer
    finally:
        with stand.lock:
            stand.busy -= 1


def error(status, message, **headers):
    body = {"error": {"message": message, "type": "error", "code": status}}
    return JSONResponse(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


def cut_body():
    """Half of a JSON object, whose length is that of the half."""
    return Response('{"id": "1", "choices": [{"index": 0, "text": " the qui', media_type="application/json")


def torn_body():
    """A connection that ends before the announced length."""
    half = '{"id": "1", "choices": [{"index": 0, "text": " the qui'
    return Response(half, media_type="application/json", headers={"content-length": str(len(half) + 100)})


def chosen(text, reason="stop", chat=False):
    """A whole answer with this text."""
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return JSONResponse({"choices": [{"index": 0, "finish_reason": reason, **content}]})


def converse(stand, body):
    prompt = " ".join(message["content"] for message in body["messages"])
    written, _, reason = stand.write(stand.ids_of(prompt), body["max_tokens"], body["temperature"])
    text = stand.tokenizer.decode(written, skip_special_tokens=True)
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}


KNOWN = {"model", "prompt", "max_tokens", "temperature"}
BY_SCORING = {
    "prompt_logprobs": {"prompt_logprobs", "logprobs", "echo", "return_tokens_as_token_ids"},
    "echo": {"logprobs", "echo"},
    "written": {"logprobs"},
    "content": {"logprobs"},
    "none": set(),
}


def complete(stand, body):
    if stand.chat_only:
        return error(404, "Not Found")
    unknown = set(body) - KNOWN - BY_SCORING[stand.scoring]
    if stand.strict and unknown:
        return error(400, f"Unrecognized request argument supplied: {sorted(unknown)[0]}")
    wanted = max(body.get("logprobs") or 0, body.get("prompt_logprobs") or 0)
    if wanted > stand.most and stand.refuses_more:
        return error(400, f"Requested {wanted} log-probs, at most {stand.most} are allowed")
    ids = stand.ids_of(body["prompt"])
    written, said, reason = stand.write(ids, body["max_tokens"], body["temperature"])
    choice = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice["text"] = stand.tokenizer.decode(written, skip_special_tokens=True)
    if reason == "stop" and not stand.says_end:
        written, said = written[:-1], said[:-1]
    as_id = stand.says_ids and body.get("return_tokens_as_token_ids")
    name = (lambda token: f"token_id:{token}") if as_id else stand.name_of
    if stand.scoring == "prompt_logprobs" and body.get("prompt_logprobs"):
        choice["prompt_logprobs"] = in_vllm_shape(stand, ids, body["prompt_logprobs"])
    if body.get("logprobs") and stand.scoring in ("echo", "written", "prompt_logprobs"):
        rows = []
        tokens = list(written)
        if body.get("echo") and stand.scoring == "echo":
            before = stand.log_probs(ids)
            rows, tokens = [None, *before[:-1]], [*ids, *written]
        tops = [None if row is None else stand.top(row, body["logprobs"]) for row in [*rows, *said]]
        named = [None if top is None else {name(token): value for token, value in top.items()} for top in tops]
        choice["logprobs"] = {"tokens": [name(token) for token in tokens], "top_logprobs": named}
    if body.get("logprobs") and stand.scoring == "content":
        choice["logprobs"] = {
            "content": [
                entry(stand, token, row[token].item())
                | {"top_logprobs": [entry(stand, *pair) for pair in stand.top(row, body["logprobs"]).items()]}
                for token, row in zip(written, said, strict=True)
            ]
        }
    return choice


def entry(stand, token, value):
    return {"id": token, "token": stand.name_of(token), "logprob": value}


def in_vllm_shape(stand, ids, count):
    rows = stand.log_probs(ids)[:-1]
    said = [stand.top(row, count, own) for row, own in zip(rows, ids[1:], strict=True)]
    return [
        None,
        *(
            {
                str(token): {"logprob": value, "rank": 1, "decoded_token": stand.name_of(token)}
                for token, value in top.items()
            }
            for top in said
        ),
    ]


@contextlib.contextmanager
def serving(stand):
    """Run the server until the block ends; `stand.url` is what a teacher's address begins with."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(stand), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    stand.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        while not server.started:
            time.sleep(0.01)
        yield stand
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()

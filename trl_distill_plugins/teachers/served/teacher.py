"""A teacher behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, OpenAI."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import TeacherForm
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.cache.documents import Document, documents_of
from trl_distill_plugins.teachers.served.address import Options, Server
from trl_distill_plugins.teachers.served.client import Client
from trl_distill_plugins.teachers.served.flight import as_finished
from trl_distill_plugins.teachers.served.probing import find_scorer
from trl_distill_plugins.teachers.served.reading import Named
from trl_distill_plugins.teachers.served.scoring import Scorer, as_signal
from trl_distill_plugins.teachers.served.writing import write_completion


class ServedTeacher(Teacher):
    """`teacher_model_name_or_path: "openai:http://localhost:8000/v1#MODEL"`; `openai:#MODEL` is OpenAI's own API.

    Its signals are the likeliest tokens, where the server gives log-probs; else it only writes. The key comes from the
    environment, `OPENAI_API_KEY`.

    Args:
        address: URL, `#` and the model's name there.
        init_kwargs: see `Options`.
    """

    name = "openai"

    def __init__(self, address: str, **init_kwargs: Any) -> None:
        self._server, self._options = Server.parse(address), Options.parse(init_kwargs)
        self._client = Client(self._server, self._options)
        self._tokenizer: Any = None

    @classmethod
    def check_address(cls, address: str, **init_kwargs: Any) -> None:
        """Raise `DistillError` for an address or options that are none, or hold a key."""
        Server.parse(address)
        Options.parse(init_kwargs)

    def __str__(self) -> str:
        """The address."""
        return str(self._server)

    @property
    def form(self) -> TeacherForm:  # type: ignore[override]  # the class attribute of others is asked for here
        """`top_k`, or `text` where the server gives no log-probs; the first look asks it."""
        return "text" if self._scorer is None else "top_k"

    @cached_property
    def _scorer(self) -> Scorer | None:
        return find_scorer(self._client, self._tokenizer, int(self._options.top_logprobs))

    def revision(self) -> str:
        """The model's name: the weights are out of sight."""
        return f"served:{self._server.model}"

    def check_student(self, tokenizer: Any) -> None:
        """Keep the tokenizer, which log-probs are compared by once they are asked for; text is for any student."""
        self._tokenizer = tokenizer

    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """There is no model to place."""

    def move_to(self, device: Any) -> None:
        """There is no model to move."""

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> SparseSignal:
        """Have the server score the texts of the batch, `max_concurrency` at a time.

        Raises:
            TeacherError: the server gives no log-probs, or none at all any more.
        """
        scorer = self._scorer
        if scorer is None:
            raise TeacherError(
                f"{self} gives text only, no log-probs; train on its text alone (losses: [cross_entropy])"
            )
        documents = list(documents_of(inputs, trained))
        said: dict[int, list[Named]] = dict(
            as_finished(partial(_score, scorer), documents, int(self._options.max_concurrency))
        )
        rows = [named for index in range(len(documents)) for named in said[index]]
        return as_signal(rows, int(self._options.top_logprobs), len(self._tokenizer)).on(trained.device)

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Have the server complete the prompts, `batch_size` at a time, each yielded when it is there.

        Raises:
            TeacherError: the server does not answer, or refuses; what it wrote until then has been yielded.
        """
        self._client.connect()
        write = partial(write_completion, self._client, generation, self._options.api)
        return as_finished(write, prompts, batch_size)


def _score(scorer: Scorer, document: Document) -> list[Named]:
    return scorer(document.ids.tolist(), document.trained.tolist())

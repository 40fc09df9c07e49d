"""The documents say what is true: hooks with their signatures, Python that runs, paths that exist."""

import inspect
import json
import re
from pathlib import Path

import pytest

from trl_distill_plugins import Loss, hookspecs
from trl_distill_plugins.testing import check_loss
from trl_distill_plugins.testing.loss import FORM, MEANING

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M), start=1)
]


def hooks():
    return [function for _, function in inspect.getmembers(hookspecs, inspect.isfunction) if is_hook(function)]


def is_hook(function):
    return hasattr(function, f"{hookspecs.PROJECT}_spec")


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook.__name__)
def test_every_hook_is_documented_with_its_signature(hook):
    signature = f"{hook.__name__}{inspect.signature(hook)}".replace("'", "")
    assert f"## `{signature}`" in (ROOT / "docs" / "plugins.md").read_text()


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_causal_lm, tiny_tokenizer):
    """A folder in which the models the documents name are tiny ones, and their data files exist."""
    for seed, name in enumerate(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B")):
        tiny_causal_lm(seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    row = {"prompt": "what is red ?", "completion": " yes"}
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("workplace")
def test_python_in_the_documents_runs(block):
    names = {}
    exec(compile(block, "document", "exec"), names)
    for loss in names.get("register_losses", list)():
        if issubclass(loss, Loss):
            assert check_loss(loss)["zero at p = q"] == "holds"


def test_every_property_of_a_loss_is_documented():
    table = (ROOT / "docs" / "plugins.md").read_text().split("| property | what must hold |")[1].split("\n\n")[0]
    assert re.findall(r"^\| ([a-z][^|]*?) \|", table, re.M) == [promise.name for promise in (*FORM, *MEANING)]


def test_the_file_map_names_paths_that_exist():
    paths = re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!http)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []

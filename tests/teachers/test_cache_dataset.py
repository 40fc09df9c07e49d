"""A cache as a dataset that `datasets` reads, and back with equal content; what is damaged or foreign is refused."""

import json
import os

import pytest

from trl_distill_plugins.cli.main import main
from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache import dataset
from trl_distill_plugins.teachers.cache.dataset import export_dataset, import_dataset
from trl_distill_plugins.teachers.cache.header import FORMAT
from trl_distill_plugins.teachers.cache.store import CacheStore

HEADER = {"format": FORMAT, "teacher": "big", "vocabulary": 32000, "teacher_prompt_template": None}
ROWS = 25


@pytest.fixture
def store(tmp_path):
    """Records of random bytes in two shards, one of them in both, and what the teacher wrote."""
    store = CacheStore.create(tmp_path / "cache", HEADER)
    records = [(os.urandom(16), os.urandom(50)) for _ in range(ROWS)]
    store.add_shard("a", records[:15])
    store.add_shard("b", records[14:])
    (tmp_path / "cache" / "teacher_completions.jsonl").write_text('{"completion": "yes"}\n')
    return store


@pytest.fixture
def small_groups(monkeypatch):
    """Several row groups a file, and several files."""
    monkeypatch.setattr(dataset, "_GROUP_ROWS", 4)
    monkeypatch.setattr(dataset, "_FILE_GROUPS", 3)


@pytest.mark.usefixtures("small_groups")
def test_a_cache_comes_back_with_equal_content(store, tmp_path):
    export_dataset(store, tmp_path / "folder")
    assert len(list((tmp_path / "folder").glob("data/*.parquet"))) == 3
    (tmp_path / "back").mkdir()  # an empty folder is as good as none
    back = import_dataset(tmp_path / "folder", tmp_path / "back")
    assert back.folder == tmp_path / "back"
    assert back.content_digest() == store.content_digest()
    assert (back.header, back.verify()) == (HEADER, [])
    assert (tmp_path / "back" / "teacher_completions.jsonl").read_text() == '{"completion": "yes"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cache", "folder"]


@pytest.mark.usefixtures("small_groups")
def test_datasets_reads_it_as_any_other(store, tmp_path):
    from datasets import load_dataset

    export_dataset(store, tmp_path / "folder")
    rows = load_dataset(str(tmp_path / "folder"), split="train")
    assert rows.column_names == ["key", "record"]
    read = {bytes.fromhex(row["key"]): row["record"] for row in rows}
    assert (len(rows), read) == (ROWS, dict(zip(store.keys(), map(bytes, store.blobs()), strict=True)))


def test_a_cache_without_texts(tmp_path):
    empty = CacheStore.create(tmp_path / "cache", HEADER)
    export_dataset(empty, tmp_path / "folder")
    assert len(import_dataset(tmp_path / "folder", tmp_path / "back")) == 0


def without(name):
    return lambda folder: (folder / name).unlink()


def change(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def change_a_record(folder):
    (record, *_) = CacheStore(folder.parent / "cache").blobs()
    change(folder / PARQUET, (folder / PARQUET).read_bytes().index(bytes(record)))


def rewritten(fields):
    def rewrite(folder):
        manifest = json.loads((folder / "cache.json").read_text())
        (folder / "cache.json").write_text(json.dumps(manifest | fields))

    return rewrite


PARQUET = "data/train-00000.parquet"
DAMAGES = {
    "cache.json is missing; `cache export` writes it": without("cache.json"),
    f"is a cache of format 1; this version reads {FORMAT}": rewritten({"header": HEADER | {"format": 1}}),
    "cache.json is damaged; fetch it again": rewritten({"header": []}),
    "it has 0 of 25 texts": without(PARQUET),
    "train-00000.parquet is damaged: ": lambda folder: change(folder / PARQUET, -1),
    "a record differs from what was exported; fetch it again": change_a_record,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused_in_a_line(message, store, tmp_path, capsys):
    export_dataset(store, tmp_path / "folder")
    DAMAGES[message](tmp_path / "folder")
    assert main(["cache", "import", str(tmp_path / "folder"), str(tmp_path / "back")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"trl-distill cache: error: {tmp_path / 'folder'}")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "folder"], "nothing is left of it"


def test_no_changed_byte_of_the_rows_goes_unseen(store, tmp_path):
    """What a changed byte does not change, a statistic of parquet's for one, may pass: then the content is the same."""
    export_dataset(store, tmp_path / "folder")
    path, refused = tmp_path / "folder" / PARQUET, 0
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole)
        change(path, place)
        back = tmp_path / f"back{place}"
        try:
            digest = import_dataset(tmp_path / "folder", back).content_digest()
        except DataError:
            assert not back.exists()
            refused += 1
        else:
            assert digest == store.content_digest(), place
    assert refused > len(whole) // 37 // 2


def test_the_commands_take_a_cache_there_and_back(store, tmp_path, capsys):
    folder, back = str(tmp_path / "folder"), str(tmp_path / "back")
    assert main(["cache", "export", str(store.folder), folder]) == 0
    assert f"{folder}: 25 texts; datasets.load_dataset('{folder}') reads it" in capsys.readouterr().out
    assert main(["cache", "import", folder, back]) == 0
    assert f"{back}: 25 texts; train with cache:{back}" in capsys.readouterr().out
    assert CacheStore(tmp_path / "back").content_digest() == store.content_digest()
    assert main(["cache", "export", str(store.folder), folder]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    assert main(["cache", "import", folder, back]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_hub_that_is_not_there_is_said_in_a_line(command, store, tmp_path, capsys):
    """The suite runs offline."""
    there = [str(store.folder), "me/cache"] if command == "push" else ["me/cache", str(tmp_path / "back")]
    assert main(["cache", command, *there]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-distill")]
    assert f"cannot {'push to' if command == 'push' else 'pull'} me/cache: " in line
    assert not (tmp_path / "back").exists()

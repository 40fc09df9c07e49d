"""load_rows: every kind of file, and an error that names file, place and remedy for every fault."""

import json
import re

import pytest

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.files import is_data_file, load_rows


@pytest.fixture(autouse=True)
def cache_in(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def parquet(rows):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


ROWS = [{"input": "a", "completion": "b"}, {"input": "ü", "completion": None}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", LINES),
        ("data.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\n").rstrip()),
        ("data.json", LINES),
        ("data.json", "\n " + json.dumps(ROWS, indent=2)),
        ("data.CSV", 'input,completion\r\na,b\r\n"ü",\r\n'),
        ("data.parquet", parquet(ROWS)),
    ],
)
def test_every_kind_of_file(write, name, content):
    path = write(name, content)
    assert load_rows(path).to_list() == ROWS
    assert load_rows(str(path), "input").to_list() == ROWS
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache", name]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '"x"\n"y"'), ("a.json", '["x", "y"]')])
def test_bare_strings_become_the_input(write, name, content):
    assert load_rows(write(name, content)).to_list() == [{"input": "x"}, {"input": "y"}]
    assert load_rows(write(name, content), "question").to_list() == [{"question": "x"}, {"question": "y"}]


def test_csv_values_stay_text(write):
    rows = load_rows(write("a.csv", 'input,completion\n007,"1,5\nand ""more"""\n\n1.0,NA\n')).to_list()
    assert rows == [{"input": "007", "completion": '1,5\nand "more"'}, {"input": "1.0", "completion": "NA"}]


def test_columns_may_differ_from_row_to_row(write):
    user = {"role": "user", "content": "Hi"}
    rows = [{"messages": [user], "n": 1}] * 1500 + [{"prompt": "p", "n": 0.5}, {"messages": [{**user, "name": "A"}]}]
    loaded = load_rows(write("a.jsonl", "\n".join(map(json.dumps, rows)))).to_list()
    assert loaded[0] == {"messages": [{**user, "name": None}], "n": 1.0, "prompt": None}
    assert loaded[1500] == {"messages": None, "n": 0.5, "prompt": "p"}
    assert loaded[1501] == {"messages": [{**user, "name": "A"}], "n": None, "prompt": None}


def test_a_changed_file_is_read_again(write):
    assert len(load_rows(write("a.jsonl", LINES))) == 2
    assert load_rows(write("a.jsonl", '{"input": "new"}\n')).to_list() == [{"input": "new"}]


BAD_COLUMN = '{"a": 1}\n{"a": 2}\n{"a": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", ": the file is empty; put one row on each line"),
        ("a.jsonl", "\n \n", ": the file has no rows; give it at least one"),
        ("a.json", "[]", ": the file has no rows"),
        ("a.csv", "input\n", ": the file has no rows"),
        ("a.parquet", parquet([{"a": 1}])[:-8], ": not a readable Parquet file ("),
        ("a.parquet", "PAR1", ": not a readable Parquet file ("),
        (
            "a.jsonl",
            LINES + '\n{"input": "a" "b"}\n',
            ", line 4, column 15: not valid JSON: Expecting ',' delimiter, at \"b\"}; correct or remove it",
        ),
        ("a.jsonl", '{"input": "a', ", line 1, column 11: not valid JSON: Unterminated string"),
        ("a.jsonl", '{"input":', ", line 1, column 10: not valid JSON: Expecting value, at its end"),
        ("a.json", '[{"input": "a"},\n x]', ", line 2, column 2: not valid JSON: Expecting value, at x]"),
        (
            "a.json",
            '{\n "data": []\n}',
            ", line 2, column 1: not valid JSON: Expecting property name enclosed in double quotes, "
            "at its end; a .json file is a list, or one object a line",
        ),
        ("a.jsonl", "[" * 100_000, ", line 1: not usable JSON: "),
        ("a.jsonl", LINES + "[1, 2]\n", ", line 3: must be an object or a string, got [1, 2]"),
        ("a.json", '["x", 3]', ", element 2: must be an object or a string, got 3"),
        ("a.jsonl", LINES + "{}\n", ", line 3: the row has no values; remove it or fill it in"),
        ("a.jsonl", '{"input": null}\n', ", line 1: the row has no values"),
        (
            "a.jsonl",
            LINES.encode() + b'{"input": "\xfc"}',
            ": not UTF-8 at byte 85 (invalid start byte); save the file",
        ),
        ("a.csv", "input\nä".encode("utf-16"), ": not UTF-8 at byte 0 (invalid start byte)"),
        ("a.jsonl", BAD_COLUMN, ", line 3: column 'a' holds 'x', but earlier values are int64; give all the same type"),
        ("a.jsonl", '{"a": [1, "x"]}', ", line 1: column 'a' holds [1, 'x'], but earlier values are of another type"),
        ("a.jsonl", '{"a": "\\ud800"}', ", line 1: column 'a' holds half of a surrogate pair"),
        ("a.jsonl", '{"a": 99999999999999999999}', ", line 1: column 'a' holds a number of more than 64 bits"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, but the header has 2 (a, b); put cells that hold commas"),
        ("a.csv", "a,b\n1\n", ", line 2: 1 cells, but the header has 2 (a, b)"),
        ("a.csv", 'a,b\n1,"2"3\n', ", line 2: not valid CSV: "),
        ("a.csv", 'a,b\n1,"2\n', ", line 2: not valid CSV: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", ", line 1: the header needs one distinct name for each column, got a, a"),
        ("a.txt", "x", ": cannot read .txt; use .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_faulty_file_names_place_and_remedy(write, name, content, message):
    path = write(name, content)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")) as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_missing_input_column(write, name):
    rows = [{"question": "a", "completion": "b"}]
    contents = {"a.jsonl": json.dumps(rows[0]), "a.csv": "question,completion\na,b", "a.parquet": parquet(rows)}
    place = "" if name == "a.parquet" else ", line 2" if name == "a.csv" else ", line 1"
    path = write(name, contents[name])
    message = f"{path}{place}: there is no column 'qestion'; did you mean 'question'? Columns: question, completion"
    with pytest.raises(DataError, match=re.escape(message)):
        load_rows(path, "qestion")


def test_a_null_in_the_input_column(write):
    path = write("a.jsonl", '{"q": "a", "b": 1}\n{"q": null, "b": 2}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: column 'q' is null; fill it in or remove the row"):
        load_rows(path, "q")


def test_files_that_are_not_there(write, tmp_path):
    write("train.jsonl", LINES)
    with pytest.raises(DataError, match=r"trian.jsonl: no such file; did you mean 'train.jsonl'\?"):
        load_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="no such file; check the path"):
        load_rows(tmp_path / "nowhere" / "x.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        load_rows(tmp_path / "folder.jsonl")


def test_a_cache_that_cannot_be_written(write, tmp_path, monkeypatch):
    import datasets

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    with pytest.raises(DataError, match=r"a.jsonl: cannot be written to .*cache .*No space left on device"):
        load_rows(write("a.jsonl", LINES))


def test_what_is_a_data_file(write, tmp_path):
    assert is_data_file("missing.jsonl")
    assert is_data_file("a.Parquet")
    assert is_data_file(str(write("notes.txt", "x")))
    assert not is_data_file("trl-lib/tldr")
    assert not is_data_file(str(tmp_path))

"""A folder of shards under everything that goes wrong: damage, kills, full disks, other processes."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.teachers import cache_writer
from tests.teachers.cache_writer import RECORDS, blob_of, record
from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.shards import Shard, write_shard
from trl_distill_plugins.teachers.cache.store import CacheStore

HEADER = {"teacher": "big", "tokenizer": "sha256:ab", "vocabulary": 32000}


def filled(folder, numbers=range(6), shards=2, size=30):
    """A cache of these records, dealt out to that many shards."""
    store = CacheStore.create(folder, HEADER)
    for shard in range(shards):
        store.add_shard(f"s{shard}", [record(number, size) for number in list(numbers)[shard::shards]])
    return store


def writer(folder, name, first, shards, size, header=HEADER, *limit, launcher=()):
    """A process that adds shards."""
    arguments = [cache_writer.__file__, folder, name, first, shards, size, json.dumps(header), *limit]
    command = [*launcher, sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_whole(store, size):
    """Every record that the cache shows is the one its key stands for."""
    assert store.verify() == []
    keys = list(store.keys())
    assert all(store.get(key) == blob_of(key, size) for key in keys)


# Reading what was written


def test_records_are_found_in_all_shards(tmp_path):
    store = filled(tmp_path / "cache")
    assert len(store) == 6
    assert all(store.get(key) == blob for key, blob in (record(i, 30) for i in range(6)))
    assert list(store.keys()) == sorted(record(i, 30)[0] for i in range(6))
    missing, _ = record(6, 30)
    assert (store.get(missing), missing in store, record(0, 30)[0] in store) == (None, False, True)


def test_keys_are_bytes_whatever_they_are(tmp_path):
    keys = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1", b"\xff" * 16, b"ab" + bytes(14), b"ab\0a" + bytes(12)]
    store = CacheStore.create(tmp_path, HEADER)
    store.add_shard("s", [(key, bytes([i]) * i) for i, key in enumerate(keys)])
    assert list(store.keys()) == sorted(keys)
    assert [bytes(store.get(key)) for key in keys] == [bytes([i]) * i for i in range(len(keys))]
    assert b"ab" + bytes(13) + b"\1" not in store


def test_a_cache_without_records(tmp_path):
    store = CacheStore.create(tmp_path, HEADER)
    store.add_shard("s", [])
    assert (len(store), list(store.keys()), store.get(bytes(16)), store.verify()) == (0, [], None, [])


def test_of_records_with_one_key_the_first_wins(tmp_path):
    store = CacheStore.create(tmp_path, HEADER)
    store.add_shard("b", [(bytes(16), b"second")])
    store.add_shard("a", [(bytes(16), b"first")])
    assert (len(store), store.get(bytes(16))) == (1, b"first")


def test_a_reader_sees_what_others_add_when_it_refreshes(tmp_path):
    reader = filled(tmp_path)
    assert len(reader) == 6
    CacheStore(tmp_path).add_shard("more", [record(7, 30)])
    assert len(reader) == 6
    reader.refresh()
    assert len(reader) == 7
    assert [shard.path.name for shard in reader.shards()] == ["more.shard", "s0.shard", "s1.shard"]


def test_a_shard_is_never_replaced(tmp_path):
    store = filled(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "s0.shard"))):
        store.add_shard("s0", [record(9, 30)])
    assert (len(store), files(tmp_path)) == (6, ["header.json", "s0.shard", "s1.shard"])


def test_a_key_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="key has 3 bytes"):
        write_shard(tmp_path / "x.shard", [(b"abc", b"")])
    assert files(tmp_path) == []


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = filled(tmp_path)
    assert_whole(store, 30)
    with pytest.raises(OSError, match="not permitted"):
        store.add_shard("s0", [record(9, 30)])
    assert files(tmp_path) == ["header.json", "s0.shard", "s1.shard"]


def test_the_digest_tells_contents_apart_and_nothing_else(tmp_path):
    digests = {
        filled(tmp_path / "a").content_digest(),
        filled(tmp_path / "b", range(5, -1, -1), shards=3).content_digest(),
        filled(tmp_path / "c", [0, 1, 2, 3, 4, 5, 5, 0], shards=2).content_digest(),
    }
    assert len(digests) == 1
    assert filled(tmp_path / "d", range(5)).content_digest() not in digests
    assert filled(tmp_path / "e", size=31).content_digest() not in digests


def test_many_records_open_fast(tmp_path):
    store = CacheStore.create(tmp_path, HEADER)
    for shard in range(4):
        store.add_shard(f"{shard}", ((os.urandom(16), b"x") for _ in range(25_000)))
    start = time.perf_counter()
    assert len(CacheStore(tmp_path)) == 100_000
    assert time.perf_counter() - start < 0.5  # a million took 0.5 s


def test_an_open_cache_goes_to_other_processes(tmp_path):
    store = filled(tmp_path)
    key, blob = record(3, 30)
    assert store.get(key) == blob
    assert pickle.loads(pickle.dumps(store)).get(key) == blob
    assert len(pickle.dumps(store)) < 1000
    (shard, *_) = store.shards()
    assert pickle.loads(pickle.dumps(shard)).blob(0) == shard.blob(0)


FORK = """
import os, sys
from pathlib import Path
from trl_distill_plugins.teachers.cache.store import CacheStore
store = CacheStore(Path(sys.argv[1]))
before = store.content_digest()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os._exit(0 if store.content_digest() == before and len(store) == 600 else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert store.content_digest() == before
"""


def test_forked_processes_read_the_same(tmp_path):
    filled(tmp_path, range(600), shards=5, size=5000)
    done = subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The header


def test_the_header_is_kept(tmp_path):
    filled(tmp_path)
    assert CacheStore(tmp_path).header == HEADER
    CacheStore.create(tmp_path, HEADER | {"vocabulary": 32000})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": "sha256:cd", "vocabulary": 7}, "tokenizer sha256:ab; this run has sha256:cd"),
        ({"vocabulary": 7}, "vocabulary 32000; this run has 7"),
        ({"codec": 2}, "codec none; this run has 2"),
    ],
)
def test_the_first_field_that_differs_is_named(tmp_path, change, said):
    filled(tmp_path)
    with pytest.raises(DataError, match=f"^the cache {re.escape(str(tmp_path))} was built with {said}; undo"):
        CacheStore.create(tmp_path, HEADER | change)


def test_a_field_this_run_lacks_is_named(tmp_path):
    with pytest.raises(DataError, match="vocabulary 32000; this run has none"):
        filled(tmp_path).check({"teacher": "big", "tokenizer": "sha256:ab"})


def test_values_are_compared_as_json_keeps_them(tmp_path):
    store = CacheStore.create(tmp_path, {"sizes": (1, 2)})
    store.check({"sizes": (1, 2)})
    assert store.header == {"sizes": [1, 2]}
    with pytest.raises(DataError, match=r"was built with sizes \[1, 2\]; this run has \[1, 3\]"):
        store.check({"sizes": (1, 3)})


def test_a_folder_without_a_cache_is_said(tmp_path):
    with pytest.raises(DataError, match="holds no teacher cache; `trl-distill cache build` makes one"):
        CacheStore(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"teacher": '])
def test_a_damaged_header_is_said(tmp_path, text):
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(DataError, match=r"header\.json is damaged"):
        CacheStore(tmp_path)


# Damage


@pytest.mark.parametrize("flip", [1, 0x80, 0xFF])
def test_every_changed_byte_is_found(tmp_path, flip):
    store = filled(tmp_path, shards=1)
    path, whole = tmp_path / "s0.shard", (tmp_path / "s0.shard").read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        (problem,) = store.verify()
        in_a_blob = 8 <= place < 8 + 6 * 30
        assert (problem.path, problem.lost) == (path, 6 if in_a_blob else None), place


def test_a_file_cut_short_is_found_at_every_length(tmp_path):
    store = filled(tmp_path, shards=1)
    path, whole = tmp_path / "s0.shard", (tmp_path / "s0.shard").read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        (problem,) = store.verify()
        assert problem.path == path
        with pytest.raises(DataError, match=r"s0\.shard: it .*; `trl-distill cache build --repair`"):
            Shard.open(path)


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_damaged_record_is_refused_and_all_others_are_read(tmp_path):
    filled(tmp_path)
    damage(tmp_path / "s1.shard", 8 + 35)  # its second record, number 3
    store = CacheStore(tmp_path)
    with pytest.raises(DataError, match=r"s1\.shard: record 1 of 3 fails its checksum; `trl-distill cache build --rep"):
        store.get(record(3, 30)[0])
    assert all(store.get(record(i, 30)[0]) == record(i, 30)[1] for i in (0, 1, 2, 4, 5))


def test_a_repair_keeps_the_good_shards(tmp_path):
    filled(tmp_path, range(9), shards=3)
    damage(tmp_path / "s1.shard", 8 + 35)
    damage(tmp_path / "s2.shard", -1)
    store, sizes = CacheStore(tmp_path), []
    with pytest.raises(DataError, match=r"s2\.shard: it is cut short, or its end is damaged"):
        len(store)
    problems = store.verify(sizes.append)
    assert sizes == [path.stat().st_size for path in sorted(tmp_path.glob("*.shard"))]
    assert [str(problem) for problem in problems] == [
        f"{tmp_path}/s1.shard: 1 of 3 records fail their checksum; 3 records are lost",
        f"{tmp_path}/s2.shard: it is cut short, or its end is damaged; unknown records are lost",
    ]
    store.remove(problems)
    assert (files(tmp_path), len(store), store.verify()) == (["header.json", "s0.shard"], 3, [])
    store.add_shard("s1", [record(i, 30) for i in range(9) if record(i, 30)[0] not in store])
    assert len(store) == 9
    assert_whole(store, 30)


def test_a_shard_of_a_later_version_is_named(tmp_path):
    filled(tmp_path, shards=1)
    damage(tmp_path / "s0.shard", -16)
    with pytest.raises(DataError, match="it has format 5; this version reads 1"):
        len(CacheStore(tmp_path))


# Writers that stop, and writers at once


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, OSError("elsewhere")])
def test_a_writer_that_fails_leaves_nothing(tmp_path, stop):
    def records():
        yield record(100, 10_000)
        raise stop

    store = filled(tmp_path)
    with pytest.raises(stop if isinstance(stop, type) else OSError):
        store.add_shard("new", records())
    assert (files(tmp_path), len(store)) == (["header.json", "s0.shard", "s1.shard"], 6)


def test_a_killed_writer_loses_only_what_it_was_writing(tmp_path):
    rng, added = random.Random(0), []
    for turn in range(12):
        process = writer(tmp_path, f"w{turn}", 10_000 * turn, 1000, 20_000)
        added.append(process.stdout.readline().strip())
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        rest, _ = process.communicate()
        added.extend(rest.split())
    store = CacheStore(tmp_path)
    names = {shard.path.stem for shard in store.shards()}
    assert names >= set(added)
    assert len(names) <= len(added) + 12
    assert len(store) == RECORDS * len(names)
    assert_whole(store, 20_000)


def test_what_killed_writers_leave_goes_when_it_is_old(tmp_path):
    filled(tmp_path)
    for name, age in (("old", 3700), ("new", 3500)):
        path = tmp_path / f"{name}.shard.0123.partial"
        path.write_bytes(b"TDPshard")
        os.utime(path, (time.time() - age,) * 2)
    assert len(CacheStore(tmp_path)) == 6
    assert len(files(tmp_path)) == 5
    CacheStore.create(tmp_path, HEADER)
    assert files(tmp_path) == ["header.json", "new.shard.0123.partial", "s0.shard", "s1.shard"]


def test_two_writers_at_once_make_one_cache(tmp_path):
    """Their records overlap."""
    both = [writer(tmp_path / "cache", name, first, 20, 500) for name, first in (("a", 0), ("b", 200))]
    assert [len(process.communicate()[0].split()) for process in both] == [20, 20]
    store = CacheStore(tmp_path / "cache")
    assert (len(store), len(store.shards()), len(files(tmp_path / "cache"))) == (600, 40, 41)
    assert_whole(store, 500)
    assert store.content_digest() == filled(tmp_path / "alone", range(600), size=500).content_digest()


def test_of_two_writers_that_disagree_one_builds(tmp_path):
    headers = [HEADER | {"teacher": name} for name in ("a", "b")]
    both = [writer(tmp_path / "cache", header["teacher"], 0, 3, 500, header) for header in headers]
    said = [process.communicate()[0] for process in both]
    winner = CacheStore(tmp_path / "cache").header["teacher"]
    assert [process.returncode for process in both] == ([0, 3] if winner == "a" else [3, 0])
    loser = "b" if winner == "a" else "a"
    assert f"was built with teacher {winner}; this run has {loser}" in said["ab".index(loser)]


# A disk that fills up

_CAN_MOUNT = shutil.which("unshare") is not None and (
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True).returncode == 0
)
ON_A_SMALL_DISK = """
import subprocess, sys
disk, copy, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=True)
code = subprocess.run(command).returncode
subprocess.run(["cp", "-r", disk, copy], check=True)
sys.exit(code)
"""


@pytest.mark.skipif(not _CAN_MOUNT, reason="user namespaces are off here, so no small disk can be mounted")
def test_a_full_disk_keeps_the_shards_before_it(tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    launcher = ["unshare", "-rm", sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(copy)]
    process = writer(disk, "w", 0, 10, 1200, launcher=launcher)
    *added, said = process.communicate()[0].splitlines()
    assert added == ["w-0", "w-1", "w-2"]
    assert (process.returncode, json.loads(said)[:2]) == (3, [errno.ENOSPC, str(disk / "w-3.shard")])
    assert files(copy) == ["header.json", "w-0.shard", "w-1.shard", "w-2.shard"]
    assert_whole(CacheStore(copy), 1200)


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path):
    process = writer(tmp_path, "w", 0, 1, 1200, HEADER, 20_000)
    said = json.loads(process.communicate()[0])
    assert said[:2] == [errno.EFBIG, str(tmp_path / "w-0.shard")]
    assert files(tmp_path) == ["header.json"]

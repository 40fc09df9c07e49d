"""`trl-distill cache build` killed again and again: the finished cache is that of an uninterrupted build."""

import random
import shutil
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import write_rows
from trl_distill_plugins.teachers.cache.store import CacheStore

KILLS = 50
START_UP = 8.0  # seconds, about: one kill in five comes before the teacher is asked
BUILDING = 3.0  # seconds after the first question in which all others come, some shards long
BUILD = [sys.executable, "-m", "trl_distill_plugins.cli.cache_build"]  # what the command starts, without the launcher


class Builder:
    """One run of the same command."""

    def __init__(self, config, log):
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen([*BUILD, "--config", str(config)], stdout=file, stderr=file)

    def is_asking(self):
        return b"Teacher cache" in self.log.read_bytes()

    def killed(self, rng):
        """Kill it at a random moment; False if it was done before."""
        early = rng.random() < 0.2
        while not early and not self.is_asking() and self.process.poll() is None:
            time.sleep(0.01)
        try:
            self.process.wait(rng.uniform(0, START_UP if early else BUILDING))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return True
        assert self.process.returncode == 0, self.log.read_text()[-2000:]
        return False


@pytest.mark.heavy
def test_a_builder_killed_at_50_moments_makes_the_cache_of_one_that_was_not(options, write_config, tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [{"prompt": f"{n} plus", "completion": " ".join(words[: n % 10 + 1])} for n in range(256 * 24)]
    rows = write_rows(tmp_path / "many.jsonl", texts)
    many = {**options, "output_dir": None, "dataset_name": str(rows), "per_device_eval_batch_size": 16, "top_k": 20}

    def config(folder):
        return write_config({**many, "cache_dir": str(folder)})

    assert Builder(config(tmp_path / "whole"), tmp_path / "log").process.wait() == 0
    whole, torn = CacheStore(tmp_path / "whole"), tmp_path / "torn"
    assert len(whole) == len(texts)
    rng, kills, partly, finished = random.Random(0), 0, set(), 0
    while kills < KILLS:
        if Builder(config(torn), tmp_path / "log").killed(rng):
            kills += 1
            partly.add(len(CacheStore(torn)) if (torn / "header.json").exists() else 0)
            print(f"kill {kills}, {max(partly)} texts", flush=True)
        else:
            assert CacheStore(torn).content_digest() == whole.content_digest()
            finished += 1
            shutil.rmtree(torn)
    assert Builder(config(torn), tmp_path / "log").process.wait() == 0
    store = CacheStore(torn)
    assert store.verify() == []
    assert store.content_digest() == whole.content_digest()
    assert len(partly) > KILLS // 5, "most kills found another part of the cache"
    print(f"{kills} kills at {len(partly)} sizes of the cache, {finished + 1} caches finished, all alike")

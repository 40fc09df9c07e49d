"""Saving leaves the whole model or nothing new."""

import errno

import pytest

from trl_distill_plugins.trainers.saving import whole_or_nothing


def test_a_failed_write_leaves_no_folder(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(RuntimeError, match="power cut"), whole_or_nothing(folder):
        raise RuntimeError("power cut")
    assert not folder.exists()


def test_a_full_disk_is_told_by_its_number_whoever_noticed(tmp_path):
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(OSError, match="No space left") as caught, whole_or_nothing(folder):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(folder)


def test_a_whole_write_stays(tmp_path):
    folder = tmp_path / "checkpoint-3"
    with whole_or_nothing(folder):
        folder.mkdir()
    assert folder.is_dir()


def test_a_checkpoint_survives_what_fails_after_it_was_written(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ConnectionError), whole_or_nothing(folder):
        raise ConnectionError("the hub is away")
    assert folder.is_dir()

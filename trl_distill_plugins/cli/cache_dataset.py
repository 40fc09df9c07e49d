"""`trl-distill cache export | import | push | pull`: a cache as a Hugging Face dataset, in a folder or on the hub."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl_distill_plugins.errors import DataError, disk_full_in


def export_cache(argv: list[str]) -> int:
    """`cache export DIR FOLDER`."""
    cache, folder = _two(argv, "export", "DIR", "FOLDER")
    print(f"{folder}: {_export(cache, Path(folder))} texts; datasets.load_dataset({folder!r}) reads it")
    return 0


def import_cache(argv: list[str]) -> int:
    """`cache import FOLDER DIR`."""
    folder, cache = _two(argv, "import", "FOLDER", "DIR")
    return _import(Path(folder), cache)


def push_cache(argv: list[str]) -> int:
    """`cache push DIR REPO`."""
    cache, repo = _two(argv, "push", "DIR", "REPO")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        texts = _export(cache, Path(scratch))
        with _hub(f"push to {repo}"):
            HfApi().create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=scratch, repo_type="dataset", delete_patterns="data/*")
    print(f"{repo}: {texts} texts; `trl-distill cache pull {repo} DIR` gets them")
    return 0


def pull_cache(argv: list[str]) -> int:
    """`cache pull REPO DIR`."""
    repo, cache = _two(argv, "pull", "REPO", "DIR")
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory() as scratch:
        with _hub(f"pull {repo}"):
            snapshot_download(repo, repo_type="dataset", local_dir=scratch)
        return _import(Path(scratch), cache)


def _two(argv: list[str], command: str, first: str, second: str) -> tuple[str, str]:
    parser = argparse.ArgumentParser(prog=f"trl-distill cache {command}", allow_abbrev=False)
    parser.add_argument("source", metavar=first)
    parser.add_argument("target", metavar=second)
    options = parser.parse_args(argv)
    return options.source, options.target


def _export(cache: str, folder: Path) -> int:
    from trl_distill_plugins.teachers.cache.dataset import export_dataset
    from trl_distill_plugins.teachers.cache.store import CacheStore

    store = CacheStore(Path(cache))
    export_dataset(store, folder)
    return len(store)


def _import(folder: Path, cache: str) -> int:
    from trl_distill_plugins.teachers.cache.dataset import import_dataset

    print(f"{cache}: {len(import_dataset(folder, Path(cache)))} texts; train with cache:{cache}")
    return 0


@contextmanager
def _hub(what: str) -> Iterator[None]:
    """Say in one line what the hub or the way to it refused."""
    try:
        yield
    except Exception as error:  # of huggingface_hub and of the HTTP library under it
        if disk_full_in(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot {what}: {reason}; `hf auth login` and the name of the dataset must be right"
        ) from error

"""Compiles the native kernels once per source, compiler and CPU."""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_SOURCES = [
    Path(__file__).with_name(name)
    for name in (
        "tile.cpp", "sort.cpp", "sparse.cpp", "row.hpp", "sparse.hpp", "logits.hpp", "simd.hpp", "threads.hpp",
    )
]  # fmt: skip
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL | None:
    """Return the kernels, built on first use; None, after one logged warning, where they cannot be built."""
    path = build_library()
    return None if path is None else ctypes.CDLL(str(path))


def build_library() -> Path | None:
    """Return the compiled library, from the cache if it is there; None, after one logged warning, if that fails."""
    try:
        compiler = _find_compiler()
        path = _cache_folder() / f"tile-{_fingerprint(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        _logger.warning("the native loss kernel cannot be built, eager torch is used (slower): %s", reason)
        return None
    return path


def _find_compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX` if set, else the first of the usual names."""
    chosen = os.environ.get("CXX")
    candidates = [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates)
    raise FileNotFoundError(f"no C++ compiler found (looked for {names}; set CXX)")


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "trl_distill_plugins"


def _fingerprint(compiler: list[str]) -> str:
    """A hash of everything the library depends on. The compiler's predefined macros name its version and the CPU's
    instruction sets, so that machines that share a home folder do not share a library they cannot run."""
    macros = subprocess.run(
        [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True, timeout=60
    )
    digest = hashlib.sha256(macros.stdout)
    for source in _SOURCES:
        digest.update(source.read_bytes())
    digest.update(" ".join((*compiler, *_FLAGS)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: list[str], path: Path) -> None:
    """Compile beside `path` and move the result there: other processes see the whole library or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        sources = [str(source) for source in _SOURCES if source.suffix == ".cpp"]
        command = [*compiler, *_FLAGS, "-o", str(built), *sources]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        os.replace(built, path)

"""The direction of imports, proved on the syntax trees.

Imports go downwards only, never sideways. What stands under `if TYPE_CHECKING:` does not run and does not count. Only
`trainers` and the training worker import trl, and what is private or experimental there comes through one module.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "trl_distill_plugins"

LAYERS = [
    {"entrypoints"},
    {"cli"},
    {"sweeps", "trainers", "evaluation", "testing"},
    {"teachers", "completers", "sampling"},
    {"prompts", "losses", "chat"},
    {"plugins"},
    {"hookspecs", "hardware", "plugin_checks"},
    {"errors", "lazy"},
]
DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (PACKAGE, "entrypoints")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / PACKAGE / "__init__.py"
)


def imported_names(source: str, path: str) -> Iterator[str]:
    """Yield the dotted name of everything a module imports at run time, `from a import b` as `a.b`."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):  # breadth first: a parent comes before its children
        if node in skipped:
            skipped.update(ast.iter_child_nodes(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(node.body)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str | None:
    """Return the layer's part that a dotted name or path of this project belongs to, None for anything else."""
    top, _, rest = dotted.partition(".")
    part = top if top == "entrypoints" else rest.split(".")[0] if top == PACKAGE else ""
    return part if part in DEPTH else None


def violations(source: str, path: str) -> list[str]:
    own = part_of(path.removesuffix(".py").replace("/", "."))
    found = []
    for name in imported_names(source, path):
        part = part_of(name)
        if own and part and part != own and DEPTH[part] <= DEPTH[own]:
            found.append(f"{path} imports {name}, which is not below {own}")
        if name.split(".")[0] == "trl":
            found += trl_violations(name, path)
    return found


def trl_violations(name: str, path: str) -> list[str]:
    if not (path.startswith(f"{PACKAGE}/trainers/") or path == f"{PACKAGE}/cli/train_worker.py"):
        return [f"{path} imports {name}; only trainers/ and cli/train_worker.py may import trl"]
    hidden = any(part == "experimental" or part.startswith("_") for part in name.split("."))
    if hidden and path != f"{PACKAGE}/trainers/trl_compat.py":
        return [f"{path} imports {name}; what is private or experimental in trl belongs into trainers/trl_compat.py"]
    return []


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_downwards(path):
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_every_top_level_module_has_a_layer():
    parts = {
        path.stem for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"
    }
    assert parts - {"__init__"} <= set(DEPTH)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trl_distill_plugins/losses/base.py", "from trl_distill_plugins.trainers.mixin import DistillationMixin"),
        ("trl_distill_plugins/losses/base.py", "import trl_distill_plugins.prompts.views"),
        ("trl_distill_plugins/losses/base.py", "from trl_distill_plugins import teachers"),
        ("trl_distill_plugins/losses/base.py", "from ..teachers import base"),
        ("trl_distill_plugins/losses/__init__.py", "from ..cli.main import main"),
        ("trl_distill_plugins/errors.py", "def late():\n    from trl_distill_plugins.plugins import installed"),
        ("trl_distill_plugins/cli/train.py", "import entrypoints.distill_sft"),
        ("trl_distill_plugins/cli/train.py", "from trl import TrlParser"),
        ("trl_distill_plugins/losses/base.py", "import trl"),
        ("trl_distill_plugins/trainers/gkd.py", "from trl.experimental.gkd import GKDTrainer"),
        ("trl_distill_plugins/trainers/sft.py", "from trl.trainer.sft_trainer import _private"),
        ("trl_distill_plugins/cli/train.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import trl"),
    ],
)
def test_the_proof_sees_a_violation(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trl_distill_plugins/losses/base.py", "from trl_distill_plugins.errors import ConfigError"),
        ("trl_distill_plugins/losses/base.py", "from .chunked import engine"),
        ("trl_distill_plugins/plugins.py", "from trl_distill_plugins import __version__, hookspecs"),
        ("trl_distill_plugins/losses/base.py", "if TYPE_CHECKING:\n    from trl_distill_plugins.trainers import mixin"),
        ("trl_distill_plugins/trainers/trl_compat.py", "from trl.experimental.gkd import GKDTrainer"),
        ("trl_distill_plugins/cli/train_worker.py", "from trl import TrlParser"),
    ],
)
def test_the_proof_lets_pass_what_is_allowed(path, source):
    assert violations(source, path) == []

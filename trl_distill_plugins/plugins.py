"""The plugin manager: what is installed, lookup by name, and what failed to load.

Built-ins and third parties come in through the same hooks. Each third-party plugin is loaded by itself: one that cannot
be imported, misspells a hook, or returns nonsense is disabled as a whole, warned about once, listed by `broken()`, and
named in the error of whoever asks for a name that is not installed. A broken built-in raises.
"""

import dataclasses
import importlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from trl_distill_plugins import __version__, hookspecs
from trl_distill_plugins.errors import PluginError, UnknownPluginError, did_you_mean
from trl_distill_plugins.plugin_checks import KINDS, Fault, KindName, call_hook, checked_classes, describe, hooks_of

if TYPE_CHECKING:
    from trl_distill_plugins.chat.base import ChatFormat
    from trl_distill_plugins.losses.base import Loss
    from trl_distill_plugins.losses.hidden import HiddenLoss
    from trl_distill_plugins.teachers.base import Teacher

BUILTINS = (
    "trl_distill_plugins.losses.builtin",
    "trl_distill_plugins.teachers.builtin",
    "trl_distill_plugins.chat.builtin",
)
DISTRIBUTION = "trl-distill-plugins"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who brought a class: the entry point's name (the module's, for a built-in) and the distribution it is from."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.distribution} {self.version})"

    @property
    def is_builtin(self) -> bool:
        """Whether this package itself is the owner."""
        return self.plugin in BUILTINS


@dataclass(frozen=True)
class Installed:
    """A registered class. `conflict` says why its name does not lead to it; it is empty for a usable one."""

    name: str
    cls: type[Any]
    owner: Owner
    conflict: str = ""


@dataclass(frozen=True)
class Broken:
    """A disabled plugin. `hook` is empty when the reason is not about one of its hooks."""

    owner: Owner
    hook: str
    reason: str
    error: BaseException

    def __str__(self) -> str:
        where = f"hook {self.hook!r}: " if self.hook else ""
        remedy = f"fix or update {self.owner.distribution}, or `pip uninstall {self.owner.distribution}`"
        return f"{self.owner} is disabled: {where}{self.reason}; {remedy}"


class _Registry:
    """The pluggy manager together with what its plugins returned."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.installed: dict[KindName, list[Installed]] = {kind: [] for kind in KINDS}
        self.broken: list[Broken] = []

    def add(self, plugin: object, owner: Owner) -> None:
        """Register `plugin` and its classes, or raise and leave everything as it was."""
        if self.manager.has_plugin(owner.plugin):
            raise Fault("", f"another distribution announces a plugin {owner.plugin!r} too; rename the entry point")
        if self.manager.is_registered(plugin):
            raise Fault("", f"the same object is announced as plugin {self.manager.get_name(plugin)!r} already")
        records: list[tuple[KindName, Installed]] = []
        for attribute, hook in hooks_of(self.manager, plugin):
            result = call_hook(self.manager, hook, getattr(plugin, attribute))
            records += [(kind, Installed(cls.name, cls, owner)) for kind, cls in checked_classes(hook, result)]
        self.manager.register(plugin, owner.plugin)
        for kind, record in records:
            self.installed[kind].append(record)

    def add_entry_point(self, entry_point: EntryPoint) -> None:
        """Load and register a third party's plugin. Whatever goes wrong in it disables it alone."""
        owner = _owner(entry_point)
        try:
            self.add(_load(entry_point), owner)
        except Fault as fault:
            self.broken.append(Broken(owner, fault.hook, fault.reason, fault.__cause__ or fault))
        except Exception as error:
            self.broken.append(Broken(owner, "", describe(error), error))

    def mark_conflicts(self) -> None:
        """Fill in `conflict` for names that several plugins registered. A built-in keeps its name."""
        for kind, records in self.installed.items():
            self.installed[kind] = [dataclasses.replace(r, conflict=_conflict(kind, r, records)) for r in records]

    def warn(self) -> None:
        """Log a warning for each disabled plugin and each class whose name leads elsewhere."""
        conflicts = [record.conflict for records in self.installed.values() for record in records if record.conflict]
        for problem in (*self.broken, *conflicts):
            logger.warning("%s", problem)


def _owner(entry_point: EntryPoint) -> Owner:
    distribution = entry_point.dist
    assert distribution is not None, "entry_points() sets it"
    return Owner(entry_point.name, distribution.name, distribution.version)


def _load(entry_point: EntryPoint) -> object:
    try:
        return entry_point.load()
    except (Exception, SystemExit) as error:  # a plugin that exits on import must not end the program either
        raise Fault("", f"loading {entry_point.value!r} raised {describe(error)}") from error


def _conflict(kind: KindName, record: Installed, records: list[Installed]) -> str:
    rivals = [other.owner for other in records if other.name == record.name and other.owner != record.owner]
    if not rivals or record.owner.is_builtin:
        return ""
    what = f"{KINDS[kind].noun} {record.name!r}"
    if any(rival.is_builtin for rival in rivals):
        return f"{what} of {record.owner} is ignored: the built-in keeps that name; give the class another `name`"
    names = " and ".join(str(owner) for owner in sorted((record.owner, *rivals), key=str))
    return f"{what} is registered by {names}; uninstall one, or give its class another `name`"


@lru_cache(maxsize=1)
def _registry() -> _Registry:
    registry = _Registry()
    for module in BUILTINS:
        registry.add(importlib.import_module(module), Owner(module, DISTRIBUTION, __version__))
    for entry_point in sorted(entry_points(group=hookspecs.PROJECT), key=lambda e: (_owner(e).distribution, e.name)):
        registry.add_entry_point(entry_point)
    registry.mark_conflicts()
    registry.warn()
    return registry


def plugin_manager() -> pluggy.PluginManager:
    """Return the one pluggy manager, with built-ins and entry points registered. The first call loads them all."""
    return _registry().manager


def installed(kind: KindName) -> list[Installed]:
    """Return every registered class of a kind, built-ins first."""
    return list(_registry().installed[kind])


def broken() -> list[Broken]:
    """Return the third-party plugins that are disabled, with the reason."""
    return list(_registry().broken)


def get_loss_class(name: str) -> "type[Loss] | type[HiddenLoss]":
    """Return the loss class of that name. Raise `UnknownPluginError` or `PluginError` when there is none to use."""
    return _get_class("losses", name)


def get_teacher_class(name: str) -> "type[Teacher]":
    """Return the teacher class of that name. Raise `UnknownPluginError` or `PluginError` when there is none to use."""
    return _get_class("teachers", name)


def get_chat_format_class(name: str) -> "type[ChatFormat]":
    """Return the chat format of that name or alias. Raise `UnknownPluginError` or `PluginError` when there is none."""
    records = installed("chat_formats")
    if all(record.name != name for record in records):
        name = next((record.name for record in records if name in record.cls.aliases), name)
    return _get_class("chat_formats", name)


def _get_class(kind: KindName, name: str) -> type[Any]:
    registry = _registry()
    candidates = [record for record in registry.installed[kind] if record.name == name]
    for record in candidates:
        if not record.conflict:
            return record.cls
    if candidates:
        raise PluginError(candidates[0].conflict)
    for failed in registry.broken:
        if failed.owner.plugin == name:
            raise PluginError(str(failed)) from failed.error
    known = sorted({record.name for record in registry.installed[kind]})
    hint = did_you_mean(name, known) or "."
    failures = "".join(f". Not loaded: {failed}" for failed in registry.broken)
    noun = KINDS[kind].noun
    raise UnknownPluginError(f"no {noun} named {name!r}{hint} Installed: {', '.join(known) or 'none'}{failures}")

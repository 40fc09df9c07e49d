"""What a plugin must be: its hooks exist, ask for nothing they cannot have, and return classes of the right kind."""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pluggy

from trl_distill_plugins.errors import did_you_mean

KindName = Literal["losses", "teachers", "chat_formats"]


@dataclass(frozen=True)
class Kind:
    """One kind of plugin class: how messages call it, the hook that returns it, and what it must inherit from."""

    noun: str
    hook: str
    base_module: str
    base_class: str


KINDS: dict[KindName, Kind] = {
    "losses": Kind("loss", "register_losses", "trl_distill_plugins.losses.base", "BaseLoss"),
    "teachers": Kind("teacher", "register_teachers", "trl_distill_plugins.teachers.base", "Teacher"),
    "chat_formats": Kind("chat format", "register_chat_formats", "trl_distill_plugins.chat.base", "ChatFormat"),
}


class Fault(Exception):  # noqa: N818 - the manager turns it into a record; it never reaches a caller
    """What is wrong with a plugin. `hook` is empty when it is not about one of its hooks."""

    def __init__(self, hook: str, reason: str) -> None:
        super().__init__(f"hook {hook!r}: {reason}" if hook else reason)
        self.hook = hook
        self.reason = reason


def hooks_of(manager: pluggy.PluginManager, plugin: object) -> list[tuple[str, str]]:
    """Return (attribute, hook) for every function of `plugin` that carries `@hookimpl`."""
    known = sorted(name for name, caller in vars(manager.hook).items() if caller.has_spec())
    found = []
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        hook = options.get("specname") or attribute
        if hook in known:
            found.append((attribute, hook))
        elif not options.get("optionalhook"):
            hint = did_you_mean(hook, known) or "."
            raise Fault(hook, f"there is no such hook{hint} Hooks: {', '.join(known)}")
    if not found:
        raise Fault("", f"it has no hook; mark its functions with @hookimpl. Hooks: {', '.join(known)}")
    return found


def call_hook(manager: pluggy.PluginManager, hook: str, function: Any) -> Any:
    """Call one plugin's implementation of a hook, after checking that it asks for nothing the hook does not have."""
    accepted = getattr(manager.hook, hook).spec.argnames
    extra = [name for name in inspect.signature(function).parameters if name not in accepted]
    if extra:
        takes = f"the arguments {', '.join(accepted)}" if accepted else "no arguments"
        raise Fault(hook, f"the hook takes {takes}, but the plugin's function asks for {', '.join(extra)}")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise Fault(hook, f"it raised {describe(error)}") from error


def checked_classes(hook: str, result: Any) -> Iterator[tuple[KindName, type[Any]]]:
    """Yield what a hook returned, checked: a list of subclasses of the kind's base, each with a name of its own."""
    kind_name, kind = next((name, kind) for name, kind in KINDS.items() if kind.hook == hook)
    wanted = f"the hook returns a list of {kind.base_class} subclasses"
    if not isinstance(result, list):
        raise Fault(hook, f"{wanted}, got {type(result).__name__}")
    seen: set[str] = set()
    for cls in result:
        base = getattr(importlib.import_module(kind.base_module), kind.base_class)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise Fault(hook, f"{wanted}, got {cls!r} in it")
        name = getattr(cls, "name", None)
        if not (isinstance(name, str) and name):
            raise Fault(hook, f'class {cls.__name__} has no name; give it a class attribute `name = "..."`')
        if name in seen:
            raise Fault(hook, f"two of its classes are named {name!r}; rename one")
        seen.add(name)
        yield kind_name, cls


def describe(error: BaseException) -> str:
    """Return type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())

"""The teachers that come with the package."""

from typing import Any

from trl_distill_plugins.hookspecs import hookimpl


@hookimpl
def register_teachers() -> list[type[Any]]:
    """Return the built-in teachers."""
    return []

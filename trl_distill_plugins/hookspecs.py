"""Every extension point, on one screen.

A plugin is any module or object whose functions carry `@hookimpl` and the names below. A distribution announces it in
its pyproject.toml:

    [project.entry-points.trl_distill_plugins]
    my_plugin = "my_package.my_module"

The built-in losses, teachers and chat formats come in through the same hooks.
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from trl_distill_plugins.chat.base import ChatFormat
    from trl_distill_plugins.losses.base import BaseLoss
    from trl_distill_plugins.teachers.base import Teacher

PROJECT = "trl_distill_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_losses() -> "list[type[BaseLoss]]":  # type: ignore[empty-body]
    """Return subclasses of `Loss` and `HiddenLoss`. A config names them: `losses: [{name: my_loss, weight: 0.5}]`."""


@hookspec
def register_teachers() -> "list[type[Teacher]]":  # type: ignore[empty-body]
    """Return teacher classes. `teacher_model_name_or_path: "scheme:rest"` makes `MyTeacher("rest", ...)`."""


@hookspec
def register_chat_formats() -> "list[type[ChatFormat]]":  # type: ignore[empty-body]
    """Return subclasses of `ChatFormat`. `install_chat_format(tokenizer, model, "my_format")` sets one."""

"""Teachers: where the signal of a distillation comes from. See `base.py` for what a teacher is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_distill_plugins.teachers.base import Teacher


def make_teacher(spec: Any, init_kwargs: dict[str, Any] | None = None, *, trust_remote_code: bool = False) -> "Teacher":
    """Make a teacher of `spec`: a `Teacher` (returned as it is), a model, `"name:address"`, or a path or hub name,
    which alone may bring code to trust.

    Raises:
        TeacherError: the teacher cannot be loaded.
    """
    from trl_distill_plugins.plugins import get_teacher_class, installed
    from trl_distill_plugins.teachers.base import Teacher

    if isinstance(spec, Teacher):
        return spec
    if isinstance(spec, str) and ":" in spec:
        name, address = spec.split(":", 1)
        if name in {record.name for record in installed("teachers")}:
            return get_teacher_class(name)(address, **(init_kwargs or {}))
    trust = {"trust_remote_code": True} if trust_remote_code and isinstance(spec, str) else {}
    return get_teacher_class("local")(spec, **{**trust, **(init_kwargs or {})})

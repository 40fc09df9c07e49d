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
    from trl_distill_plugins.teachers.base import Teacher

    if isinstance(spec, Teacher):
        return spec
    teacher_class, address = _find_teacher(spec)
    return teacher_class(address, **_loading(teacher_class, spec, init_kwargs, trust_remote_code))


def load_tokenizer(spec: Any, init_kwargs: dict[str, Any] | None = None, *, trust_remote_code: bool = False) -> Any:
    """What `Teacher.load_tokenizer` gives for the teacher that `make_teacher` would make of the same."""
    teacher_class, address = _find_teacher(spec)
    return teacher_class.load_tokenizer(address, **_loading(teacher_class, spec, init_kwargs, trust_remote_code))


def check_teacher(spec: Any, init_kwargs: dict[str, Any] | None = None) -> None:
    """Raise `DistillError` for what `make_teacher` would refuse without loading or asking anything."""
    teacher_class, address = _find_teacher(spec)
    teacher_class.check_address(address, **(init_kwargs or {}))


def _loading(cls: type["Teacher"], spec: Any, init_kwargs: dict[str, Any] | None, trusts: bool) -> dict[str, Any]:
    trust = {"trust_remote_code": True} if trusts and cls.name == "local" and isinstance(spec, str) else {}
    return trust | (init_kwargs or {})


def _find_teacher(spec: Any) -> tuple[type["Teacher"], Any]:
    """The class and the address that `spec`, anything but a `Teacher`, stands for."""
    from trl_distill_plugins.plugins import get_teacher_class, installed

    if isinstance(spec, str) and ":" in spec:
        name, address = spec.split(":", 1)
        if name in {record.name for record in installed("teachers")}:
            return get_teacher_class(name), address
    return get_teacher_class("local"), spec

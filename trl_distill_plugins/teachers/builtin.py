"""The built-in teachers, registered as any other plugin's are."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.cache.teacher import CachedTeacher
from trl_distill_plugins.teachers.local import LocalTeacher
from trl_distill_plugins.teachers.served.teacher import ServedTeacher


@hookimpl
def register_teachers() -> list[type[Teacher]]:
    return [LocalTeacher, CachedTeacher, ServedTeacher]

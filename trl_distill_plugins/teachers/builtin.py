"""The built-in teachers, registered as any other plugin's are."""

from trl_distill_plugins.hookspecs import hookimpl
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.cache.teacher import CachedTeacher
from trl_distill_plugins.teachers.local import LocalTeacher
from trl_distill_plugins.teachers.self_teacher import SelfTeacher
from trl_distill_plugins.teachers.served.teacher import ServedTeacher
from trl_distill_plugins.teachers.several import EnsembleTeacher, RoutedTeacher


@hookimpl
def register_teachers() -> list[type[Teacher]]:
    return [LocalTeacher, CachedTeacher, ServedTeacher, EnsembleTeacher, RoutedTeacher, SelfTeacher]

"""Third-party plugins, each a real distribution on sys.path: a module, METADATA and entry_points.txt."""

import importlib
import logging
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

from trl_distill_plugins import plugins
from trl_distill_plugins.errors import PluginError, UnknownPluginError
from trl_distill_plugins.hookspecs import PROJECT

GOOD = """
    from trl_distill_plugins import Loss, hookimpl

    class Mine(Loss):
        name = "mine"

    @hookimpl
    def register_losses():
        return [Mine]
"""


class Site:
    """A folder on sys.path that fake distributions are installed into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: list[str] = []

    def install(self, module: str, source: str, *, plugin: str | None = None, dist: str | None = None) -> None:
        dist = dist or f"{module.replace('_', '-')}-dist"
        (self.path / f"{module}.py").write_text(dedent(source))
        info = self.path / f"{dist.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{PROJECT}]\n{plugin or module} = {module}\n")
        self.modules.append(module)
        importlib.invalidate_caches()
        plugins._registry.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    site = Site(tmp_path)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)
    plugins._registry.cache_clear()


def names(kind="losses"):
    return [record.name for record in plugins.installed(kind)]


def only_broken():
    (record,) = plugins.broken()
    return record


def test_builtins_come_through_the_hooks_and_have_an_owner():
    record = next(r for r in plugins.installed("losses") if r.name == "forward_kl")
    assert record.cls is plugins.get_loss_class("forward_kl")
    assert record.owner.plugin == "trl_distill_plugins.losses.builtin"
    assert record.owner.distribution == "trl-distill-plugins"
    assert plugins.plugin_manager().get_plugin(record.owner.plugin).__name__ == record.owner.plugin


def test_the_manager_is_built_once():
    assert plugins.plugin_manager() is plugins.plugin_manager()


def test_a_third_party_loss_is_found_by_its_entry_point(site):
    site.install("good_one", GOOD, plugin="good", dist="good-dist")
    assert plugins.get_loss_class("mine").__module__ == "good_one"
    record = next(r for r in plugins.installed("losses") if r.name == "mine")
    assert str(record.owner) == "plugin 'good' (good-dist 1.5)"
    assert plugins.plugin_manager().has_plugin("good")
    assert plugins.broken() == []


FORMAT = """
    from trl_distill_plugins import hookimpl
    from trl_distill_plugins.chat import ChatFormat

    class Mine(ChatFormat):
        name = "mine"
        aliases = ("my_own", "llama", "vicuna")

    @hookimpl
    def register_chat_formats():
        return [Mine]
"""


def test_a_third_party_chat_format_is_found_by_name_and_alias_and_takes_no_other(site):
    site.install("my_format", FORMAT)
    assert "mine" in names("chat_formats")
    assert plugins.get_chat_format_class("my_own") is plugins.get_chat_format_class("mine")
    assert [plugins.get_chat_format_class(name).name for name in ("llama", "vicuna")] == ["llama2", "vicuna"]


def test_an_object_can_be_a_plugin(site):
    source = GOOD.replace("@hookimpl", "class Plugin:\n        @hookimpl").replace(
        "def register_losses():\n        return", "    def register_losses(self):\n            return"
    )
    site.install("as_object", source + "\n    plugin = Plugin()\n")
    (site.path / "as_object_dist-1.5.dist-info" / "entry_points.txt").write_text(
        f"[{PROJECT}]\nobj = as_object:plugin\n"
    )
    assert "mine" in names(), plugins.broken()


@pytest.mark.parametrize("lookup", [plugins.get_loss_class, plugins.get_teacher_class, plugins.get_chat_format_class])
def test_an_unknown_name_is_an_unknown_plugin_error(lookup):
    with pytest.raises(UnknownPluginError, match=r"named 'no_such_thing'\. Installed: "):
        lookup("no_such_thing")


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(
        UnknownPluginError, match=r"no loss named 'forward-kl'; did you mean 'forward_kl'\? Installed: "
    ):
        plugins.get_loss_class("forward-kl")


BROKEN = {
    "import_error": ("import no_such_module_anywhere", "", "ModuleNotFoundError: No module named 'no_such_module_any"),
    "syntax_error": ("def (", "", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "", "SystemExit: 3"),
    "misspelt_hook": (
        GOOD.replace("register_losses", "register_loses"),
        "register_loses",
        "there is no such hook; did you mean 'register_losses'? "
        "Hooks: register_chat_formats, register_losses, register_teachers",
    ),
    "forgot_the_mark": (GOOD.replace("@hookimpl", ""), "", "it has no hook; mark its functions with @hookimpl"),
    "wrong_argument": (
        GOOD.replace("register_losses()", "register_losses(config)"),
        "register_losses",
        "the hook takes no arguments, but the plugin's function asks for config",
    ),
    "hook_raises": (
        GOOD.replace("return [Mine]", "raise OSError('gone')"),
        "register_losses",
        "it raised OSError: gone",
    ),
    "wrong_wrapper": (
        GOOD.replace("@hookimpl", "@hookimpl(hookwrapper=True)"),
        "",
        "PluginValidationError: ",
    ),
    "not_a_list": (
        GOOD.replace("return [Mine]", "return Mine"),
        "register_losses",
        "the hook returns a list of BaseLoss subclasses, got type",
    ),
    "not_a_class": (
        GOOD.replace("return [Mine]", "return [Mine()]"),
        "register_losses",
        "the hook returns a list of BaseLoss subclasses, got <not_a_class.Mine object",
    ),
    "not_a_loss": (
        GOOD.replace("Mine(Loss)", "Mine"),
        "register_losses",
        "the hook returns a list of BaseLoss subclasses, got <class 'not_a_loss.Mine'>",
    ),
    "nameless": (
        GOOD.replace('name = "mine"', "pass"),
        "register_losses",
        'class Mine has no name; give it a class attribute `name = "..."`',
    ),
    "same_name_twice": (
        GOOD.replace("[Mine]", "[Mine, type('Other', (Mine,), {})]"),
        "register_losses",
        "two of its classes are named 'mine'; rename one",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_disabled_alone_and_remembered(case, site, caplog):
    source, hook, reason = BROKEN[case]
    site.install(case, source)
    site.install("good_one", GOOD.replace('"mine"', '"fine"'))
    assert "forward_kl" in names()
    assert "fine" in names()
    assert "mine" not in names()
    record = only_broken()
    assert (record.owner.plugin, record.hook) == (case, hook)
    assert reason in record.reason
    assert not plugins.plugin_manager().has_plugin(case)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [str(record)]


def test_the_warning_comes_once(site, caplog):
    site.install("import_error", "import no_such_module_anywhere")
    names()
    names("teachers")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("case", BROKEN)
def test_asking_for_a_broken_plugin_names_plugin_distribution_hook_and_remedy(case, site):
    source, hook, reason = BROKEN[case]
    site.install(case, source, dist="their-dist")
    with pytest.raises(PluginError) as caught:
        plugins.get_loss_class(case)
    message = str(caught.value)
    assert f"plugin '{case}' (their-dist 1.5) is disabled: " in message
    assert hook in message
    assert reason in message
    assert "`pip uninstall their-dist`" in message
    assert "\n" not in message


def test_a_name_that_is_missing_says_which_plugins_failed_and_why(site):
    site.install("import_error", "import no_such_module_anywhere")
    with pytest.raises(UnknownPluginError) as caught:
        plugins.get_loss_class("mine")
    message = str(caught.value)
    assert message.startswith("no loss named 'mine'")
    assert "Not loaded: plugin 'import_error' (import-error-dist 1.5)" in message
    assert "No module named 'no_such_module_anywhere'" in message


def test_an_installed_name_works_although_a_broken_plugin_has_it_too(site):
    site.install("broken_kl", "import no_such_module_anywhere", plugin="forward_kl")
    assert plugins.get_loss_class("forward_kl").name == "forward_kl"


def test_a_third_party_cannot_take_the_name_of_a_builtin(site, caplog):
    site.install("taker", GOOD.replace('"mine"', '"forward_kl"'))
    assert plugins.get_loss_class("forward_kl").__module__ != "taker"
    builtin, theirs = (record for record in plugins.installed("losses") if record.name == "forward_kl")
    assert builtin.conflict == ""
    assert "loss 'forward_kl' of plugin 'taker' (taker-dist 1.5) is ignored" in theirs.conflict
    assert [record.getMessage() for record in caplog.records] == [theirs.conflict]


def test_two_plugins_with_one_name_are_both_named_and_neither_is_used(site):
    site.install("first", GOOD)
    site.install("second", GOOD)
    with pytest.raises(PluginError) as caught:
        plugins.get_loss_class("mine")
    assert not isinstance(caught.value, UnknownPluginError)
    assert str(caught.value) == (
        "loss 'mine' is registered by plugin 'first' (first-dist 1.5) and plugin 'second' (second-dist 1.5); "
        "uninstall one, or give its class another `name`"
    )
    assert plugins.broken() == []


def test_two_distributions_with_one_entry_point_name(site):
    site.install("first", GOOD, plugin="same")
    site.install("second", GOOD.replace('"mine"', '"other"'), plugin="same")
    assert only_broken().owner.distribution == "second-dist"
    assert "another distribution announces a plugin 'same' too" in only_broken().reason
    assert "mine" in names()


def test_two_entry_points_for_one_module(site):
    site.install("first", GOOD)
    site.install("second", "")
    (site.path / "second_dist-1.5.dist-info" / "entry_points.txt").write_text(f"[{PROJECT}]\nagain = first\n")
    assert only_broken().owner.plugin == "again"
    assert "announced as plugin 'first' already" in only_broken().reason


def test_an_optional_hook_of_a_later_release_is_no_fault(site):
    later = "\n    @hookimpl(optionalhook=True)\n    def register_future(): ...\n"
    site.install("modern", GOOD + later)
    assert "mine" in names()
    assert plugins.broken() == []


def test_the_fakes_are_real_entry_points(site):
    site.install("good_one", GOOD)
    assert "good_one" in {entry_point.name for entry_point in entry_points(group=PROJECT)}

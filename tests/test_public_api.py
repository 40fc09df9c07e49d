"""The public surface, and what importing it costs."""

import subprocess
import sys

import trl_distill_plugins

PUBLIC = {
    "DistillGKDConfig",
    "DistillGKDTrainer",
    "DistillSFTConfig",
    "DistillSFTTrainer",
    "DistillationMixin",
    "HiddenLoss",
    "Loss",
    "OnPolicyDistillationMixin",
    "get_loss",
    "hookimpl",
    "plugin_manager",
}


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.strip()


def test_the_public_names_are_exactly_these():
    assert set(trl_distill_plugins.__all__) == PUBLIC
    assert set(dir(trl_distill_plugins)) == PUBLIC | {"__version__"}


def test_every_public_name_resolves_to_the_thing_of_that_name():
    for name in PUBLIC - {"hookimpl"}:  # a marker object, not a class or function
        assert getattr(trl_distill_plugins, name).__name__ == name
    assert trl_distill_plugins.hookimpl.project_name == "trl_distill_plugins"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(trl_distill_plugins, "DistillPPOTrainer")


def test_importing_the_package_and_the_manager_takes_neither_torch_nor_trl():
    heavy = python(
        "import sys, trl_distill_plugins, trl_distill_plugins.plugins, trl_distill_plugins.cli.main\n"
        "print(sorted({'torch', 'trl', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_the_hook_names_come_without_torch():
    assert python(
        "from trl_distill_plugins import hookimpl, plugin_manager; import sys; print('torch' in sys.modules)"
    ) == ("False")

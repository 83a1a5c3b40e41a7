"""Where the cells of a sweep run: the choices of `launch`, and what each needs to be installed.

Knows neither Ray nor submitit; the launchers themselves are in hydra_plugins/hcache_launchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins

from runners.config import ConfigError
from runners.overrides import values

PACKAGES = {
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher"),
    "slurm": ("submitit", "hydra_plugins.hydra_submitit_launcher"),
}
"""Modules that a choice of `launch` needs; the extra of pyproject.toml has its name."""
_CLASSES = {"ray": ("RayLauncher",), "slurm": ("SlurmLauncher", "LocalLauncher")}


def check(overrides: Sequence[Override], multirun: bool) -> None:
    """Raise ConfigError for a launcher that isn't installed, or that would have nothing to launch."""
    named = [str(name) for o in overrides if o.key_or_group == "launch" for name in values(o)]
    for name in [name for name in named if name in PACKAGES]:
        if missing := _missing(name):
            raise ConfigError(
                f"launch={name} needs {' and '.join(missing)}: pip install 'hcache[{name}]', "
                "or leave it out to run cells one after another"
            )
        if not multirun:
            raise ConfigError(
                f"launch={name} spreads the cells of a sweep, and without -m there is one: "
                f"add -m (python run.py -m ...), or leave launch={name} out"
            )


def register() -> None:
    """Make known to Hydra what is installed."""
    for name, classes in _CLASSES.items():
        if not _missing(name):
            module = import_module(f"hydra_plugins.hcache_launchers._{name}")
            for each in classes:
                Plugins.instance().register(getattr(module, each))


def _missing(name: str) -> list[str]:
    return [
        module.removeprefix("hydra_plugins.").replace("_", "-")
        for module in PACKAGES[name]
        if find_spec(module) is None
    ]

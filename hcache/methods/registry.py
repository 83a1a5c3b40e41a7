"""The methods by name, those of third parties included."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hcache.methods.base import Method
from hcache.registry import Registry, unknown_name

log = logging.getLogger(__name__)

METHODS: Registry[Method] = Registry("method")
register = METHODS.register

ENTRY_POINT_GROUP = "hcache.methods"


def make(method: str | Method, **hyper: Any) -> Method:
    """A method from its name and hyper-parameters, or the given one.

    Settings that are a group of their own may be a mapping: roles={"fit_budget": True}.

    Raises:
        ValueError: unknown name or hyper-parameter, or hyper-parameters for a method that is made already.
    """
    if isinstance(method, Method):
        if hyper:
            raise ValueError(
                f"{', '.join(hyper)}: give hyper-parameters with a method's name, not with an object"
            )
        return method
    cls = METHODS.get(method)
    options = {field.name: field for field in fields(cls)}
    for key in hyper:
        if key not in options:
            raise ValueError(unknown_name(f"option of method {method}", key, options))
    return cls(**{key: _grouped(options[key], value) for key, value in hyper.items()})


def _grouped(option: Field[Any], value: Any) -> Any:
    """The value; of a mapping for an option that is a dataclass, that dataclass. Raises ValueError."""
    kind: Any = option.default_factory
    groups = is_dataclass(kind)
    if not isinstance(value, Mapping) or not groups:
        return value
    known = [field.name for field in fields(kind)]
    for key in value:
        if key not in known:
            raise ValueError(unknown_name(f"option of method.{option.name}", str(key), known))
    return kind(**value)


def load_entry_points() -> None:
    """Import what other packages offer in the entry point group `hcache.methods`.

    One that fails to import is logged by name and skipped: it must not take the others with it.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception:
            log.exception(
                "the method plug-in %s (%s) could not be imported and is left out", entry.name, entry.value
            )


def load_file(path: str) -> None:
    """Import a Python file that registers methods.

    Raises:
        ValueError: no such file.
    """
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(
            f"plugins: {path} is not a Python file; give the path of a .py file that registers a method"
        )
    name = f"hcache_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

"""What is typed on the command line, looked at before anything is composed or imported: answers a typo at
once.

Checks names of groups, choices and options against the files in conf/ and the plain sections of the schema,
and the budget against its range. Knows no torch: what it can't decide (a plug-in's options) it leaves to
composing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from hcache.budget import Budget
from hcache.registry import unknown_name
from runners import COMPARING
from runners.config import CONF, ConfigError, RunConfig

_SECTIONS = {field.name: field for field in fields(RunConfig)}
# Sections filled by a class of their own for each choice.
_NAMED = ("method", "benchmark")
# Sections with the settings of one runner, and its name.
_OF_A_RUNNER = {"profile": "profile", "budget_table": "budget", "latency": "latency", "score": "score"}
_GLOBAL_GROUPS = ("experiment", "debug", "launch", "local")


def parse(arguments: Sequence[str]) -> list[Override]:
    """The overrides of a command line. Raises ConfigError naming the one that isn't key=value."""
    parser = OverridesParser.create()
    parsed = []
    for argument in arguments:
        try:
            parsed += parser.parse_overrides([argument])
        except OverrideParseException as error:
            raise ConfigError(
                f"can't read {argument!r} as key=value (quote values with commas or brackets)"
            ) from error
    return parsed


def values(override: Override) -> list[Any]:
    """Every value an override stands for: one, or those of a sweep (a glob by its options)."""
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(choices(override.key_or_group))
    if override.is_discrete_sweep():
        return [_bare(item) for item in override.sweep_iterator(transformer=lambda element: element)]
    return [_bare(value)]


def _bare(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def check_single(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for several values of one key in a command that runs one cell."""
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line} asks for several cells: add -m (python run.py -m ...)")


def compares(overrides: Sequence[Override]) -> bool:
    """Whether the command asks for a runner that takes all its cells at once."""
    named = [values(o) for o in overrides if o.key_or_group == "runner"]
    return bool(named) and all(name in COMPARING for name in named[-1])


def plugins(overrides: Sequence[Override]) -> list[str]:
    """The plug-in files named by `plugins=[...]`."""
    named = [values(o)[0] for o in overrides if o.key_or_group == "plugins"]
    listed = named[-1] if named else []
    if not isinstance(listed, list):
        raise ConfigError(f"plugins={listed} must be a list: plugins=[{listed}]")
    return [str(_bare(item)) for item in listed]


def groups() -> list[str]:
    """The config groups: directories of conf/."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())


def choices(group: str) -> list[str]:
    """The options of a group: files, what is registered by now, entry points of other packages."""
    found = {path.stem for path in (CONF / group).glob("*.yaml")}
    stored = ConfigStore.instance().repo.get(group, {})
    found |= {name.removesuffix(".yaml") for name in stored if name.endswith(".yaml")}
    if group == "method":
        found |= set(entry_points(group="hcache.methods").names)
    return sorted(found)


def check(overrides: Sequence[Override]) -> None:
    """Raise ConfigError, with the nearest known name, for what can be seen to be wrong without composing.

    Before plug-ins and benchmarks are registered it lets their names and options pass; afterwards it knows
    them as well.
    """
    for override in overrides:
        key = override.key_or_group
        if override.is_hydra_override() or override.is_delete():
            continue
        if key in groups():
            _check_choice(override, overrides)
        elif key.split(".")[0] not in (*_SECTIONS, *groups()):
            raise ConfigError(unknown_name("key", key, {*_SECTIONS, *groups()}))
        elif "." in key:
            _check_option(key, overrides)
    _check_budget(overrides)


def _check_choice(override: Override, overrides: Sequence[Override]) -> None:
    group = override.key_or_group
    if group == "method" and plugins(overrides) and not _registered(group):
        return
    for name in values(override):
        if name is not None and str(name) not in choices(group):
            raise ConfigError(unknown_name(group, str(name), choices(group)))


def _check_option(key: str, overrides: Sequence[Override]) -> None:
    section, *path = key.split(".")
    if section in _NAMED:
        for name in _chosen(section, overrides):
            _walk(f"option of {section} {name}", _options(section, name), path)
    elif section in _OF_A_RUNNER:
        for name in _chosen("runner", overrides):
            options = (_yaml_options("runner", name) or {}).get(section)
            if options is None:
                raise ConfigError(
                    f"{key} has no effect with runner={name}; it belongs to runner={_OF_A_RUNNER[section]}"
                )
            _walk(f"option of {section}", options, path)
    else:
        kind = _SECTIONS[section].default_factory if section in _SECTIONS else None
        if is_dataclass(kind):
            _walk(f"option of {section}", {field.name: None for field in fields(kind)}, path[:1])


def _walk(kind: str, options: Mapping[str, Any] | None, path: Sequence[str]) -> None:
    """Follow `path` through nested options as far as they are known."""
    for depth, name in enumerate(path):
        if not isinstance(options, Mapping):
            return
        if name not in options:
            inside = f" in {'.'.join(path[:depth])}" if depth else ""
            raise ConfigError(unknown_name(kind + inside, name, options))
        options = options[name]


def _chosen(group: str, overrides: Sequence[Override]) -> Iterator[str]:
    """The choices of `group` in this command; none where something else (an experiment) may choose."""
    named = [o for o in overrides if o.key_or_group == group]
    if named:
        yield from (str(name) for name in values(named[-1]))
    elif not any(o.key_or_group in _GLOBAL_GROUPS for o in overrides):
        yield default_choice(group)


def default_choice(group: str) -> str:
    """What conf/config.yaml chooses for `group`."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return str(next(entry[group] for entry in entries if isinstance(entry, dict) and group in entry))


def _registered(group: str) -> Mapping[str, Any]:
    """The schemas of a group in Hydra's store, by file name; empty before registration."""
    found: Mapping[str, Any] = ConfigStore.instance().repo.get("schema", {}).get(group, {})
    return found


def _options(group: str, name: str) -> Mapping[str, Any] | None:
    """The options of a method or benchmark: its schema's once registered, before that a method's file's."""
    schema = _registered(group).get(f"{name}.yaml")
    if schema is None:
        return _yaml_options(group, name) if group == "method" else None
    options: Any = OmegaConf.to_container(schema.node)
    return options


def _yaml_options(group: str, name: str) -> Mapping[str, Any] | None:
    """The options that a group's file lists; None where there is no file. Methods' files list all."""
    path = CONF / group / f"{name}.yaml"
    if not path.exists():
        return None
    listed = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {key: value for key, value in listed.items() if key != "defaults"}


def _check_budget(overrides: Sequence[Override]) -> None:
    given = {o.key_or_group: values(o) for o in overrides if o.key_or_group.startswith("budget.")}
    asked = {key.split(".")[1]: [v for v in found if v is not None] for key, found in given.items()}
    if asked.get("kept_fraction") and asked.get("kept_tokens"):
        raise ConfigError("set budget.kept_fraction or budget.kept_tokens, not both")
    for option, found in asked.items():
        for value in found:
            try:
                Budget(**{option: value})
            except ValueError as error:
                raise ConfigError(str(error)) from error

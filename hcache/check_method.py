"""`python -m hcache.check_method ./mine.py`: is a method of your own right? Runs the contract tests on it.

    python -m hcache.check_method ./mine.py                  every method that the file registers
    python -m hcache.check_method ./mine.py window=4         with settings that suit prompts of 40 tokens
    python -m hcache.check_method ./mine.py -- -k padded -x  what follows two dashes goes to pytest
    python -m hcache.check_method snapkv window=4            a method that is registered already

A test that can't hold by your method's own rules is left out with `-- --deselect` or `-- -k "not ..."`.

The tests are those that the project's own methods are held to (hcache/contract): with a budget for everything
the output is the full cache's, whatever the model family, batch and padding; `kept()` explains the output;
bytes are those planned and are freed; a sequence gives the same alone and in a batch. Needs pytest.

Exit code: 0 if all passed, 1 if a test failed, 2 if the method can't be checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from hcache.budget import Budget, InfeasibleBudget
from hcache.methods import METHODS, load_file, make

TESTED = (0.5, 50), (0.43, 700)
"""Fractions and lengths of prompts under which the tests run a method."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hcache.check_method",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", help="a .py file that registers methods, or the name of a registered one")
    parser.add_argument("setting", nargs="*", help="name=value, a hyper-parameter of the method")
    ours, for_pytest = split(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(ours)
    try:
        if importlib.util.find_spec("pytest") is None:
            raise ValueError("the checks need pytest: pip install 'hcache[check]'")
        cases = [case_of(name, settings(asked.setting)) for name in named(asked.method)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run(cases, for_pytest)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what follows `--`."""
    given = list(arguments)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


def named(method: str) -> list[str]:
    """The methods that a file registers, or the one of this name. Raises ValueError for neither."""
    if not method.endswith(".py"):
        return [METHODS.get(method).name]
    known = set(METHODS.names())
    load_file(method)
    found = sorted(set(METHODS.names()) - known)
    if not found:
        raise ValueError(f"{method} registers no method: decorate its class with @hcache.register('name')")
    return found


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Hyper-parameters from `name=value`, values read as YAML. Raises ValueError for another form."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{pair!r} is no setting: write name=value")
    return {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def case_of(name: str, hyper: dict[str, Any]) -> Any:
    """The method as a case of the contract, once it is known to run on prompts as short as the tests'.

    Raises:
        ValueError: unknown settings, or none of the tests' budgets is feasible.
    """
    from hcache.contract import cases as contract  # imports the models of the tests
    from hcache.contract.cases import Case, profile_of
    from hcache.models.identity import model_geometry

    profiled = "profile" in METHODS.get(name).__dataclass_fields__
    ours = [case for case in contract.CASES if case.method == name]
    case = replace(ours[0], hyper={**ours[0].hyper, **hyper}) if ours else Case(name, hyper, profiled)
    model = case.model()
    method = make(name, **case.hyper, **({"profile": profile_of(model)} if profiled else {}))
    for fraction, tokens in TESTED:
        try:
            method.layers(model_geometry(model), Budget(kept_fraction=fraction), [tokens])
        except InfeasibleBudget as error:
            raise ValueError(
                f"{error}. The checks use a budget of {fraction} on prompts of {tokens} tokens: give "
                "settings that suit them as name=value, a small window for example"
            ) from error
    return case


def run(cases: Sequence[Any], for_pytest: Sequence[str]) -> int:
    """Run the contract on these cases; returns 0 if all passed, 1 otherwise."""
    import pytest

    from hcache.contract import cases as contract

    contract.CASES[:] = cases
    # No configuration file: the settings of the project around are not meant for these tests.
    plain = ["-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider", "-q"]
    # transformers 5.24 calls it `cache`; the older name works with all versions that are supported.
    quiet = ["-W", "ignore:`past_key_values` is deprecated:FutureWarning"]
    options = [*plain, *quiet, "--pyargs", "hcache.contract"]
    return int(pytest.main([*options, *for_pytest]) != pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())

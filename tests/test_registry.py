"""Methods of other packages: entry points are loaded, and a broken one takes no other with it; options that
are groups."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from hcache.methods import make, registry
from hcache.methods.heterocache import OffloadSettings
from hcache.role_weights import RoleSettings


class Entry:
    """What importlib.metadata hands out, as far as it is used."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.value, self.error, self.loaded = name, f"package:{name}", error, False

    def load(self) -> None:
        if self.error:
            raise self.error
        self.loaded = True


def test_entry_points_are_loaded_and_a_broken_one_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [Entry("broken", ImportError("no such module")), Entry("fine")]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or entries)
    with caplog.at_level(logging.ERROR):
        registry.load_entry_points()
    assert asked == ["hcache.methods"]
    assert [entry.loaded for entry in entries] == [False, True]
    assert "broken" in caplog.text


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'snapkv' is already registered"):

        @registry.register("snapkv")
        class Other:
            pass


def test_a_group_of_options_may_be_a_mapping() -> None:
    roles: dict[str, Any] = {"fit_budget": True, "graph": "prefill"}
    made = make("heterocache", roles=roles, offload={"enabled": False})
    assert made == make("heterocache", roles=RoleSettings(**roles), offload=OffloadSettings(enabled=False))
    with pytest.raises(
        ValueError, match=r"option of method.roles 'fit_budgets'; did you mean 'fit_budget'\?"
    ):
        make("heterocache", roles={"fit_budgets": True})


def test_a_mapping_for_an_option_that_is_no_group_stays_one() -> None:
    allocation = {"name": "adaptive", "floor": 0.2}
    assert make("snapkv", allocation=allocation).allocation == allocation

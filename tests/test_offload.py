"""Host memory: what is checked before a run, buffers that serve several prompts, filling beside others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from hcache.cache import offload
from hcache.cache.offload import GIB, HostMemoryError, HostRows, check_host_memory
from hcache.cache.room import StickyRoom, tensors_of

MEMINFO = "MemTotal:       4194304 kB\nMemFree:  1024 kB\nMemAvailable:    3145728 kB\n"


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(MEMINFO)
    monkeypatch.setattr(offload, "MEMINFO", path)
    return path


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_the_figures(meminfo: Path) -> None:
    check_host_memory(0)
    check_host_memory(3 * GIB)
    with pytest.raises(HostMemoryError, match=r"needs 3\.5 GiB .* 3\.0 GiB are available") as caught:
        check_host_memory(3 * GIB + GIB // 2)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", [None, "MemTotal: 12 kB\n"], ids=["no file", "no figure"])
def test_where_it_cannot_be_checked_the_log_says_so(
    text: str | None, meminfo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meminfo.unlink() if text is None else meminfo.write_text(text)
    with caplog.at_level(logging.INFO, "hcache.cache.offload"):
        check_host_memory(2**60)
    assert "no MemAvailable" in caplog.text
    assert "1073741824.0 GiB" in caplog.text


@pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
def test_the_buffers_of_a_room_serve_the_next_prompt_and_say_what_is_unused(enabled: bool) -> None:
    room, like = StickyRoom(), torch.empty(1, 8)
    side = "host" if enabled else "device"
    first = HostRows([30, 0, 10], like, enabled=enabled, room=room)
    second = HostRows([5, 6, 0], like, enabled=enabled, room=room)
    assert second.values is first.values
    assert second.keys is first.keys
    for rows, used in ((first, 40), (second, 11)):
        measured = rows.nbytes()[side]
        assert measured["payload"] == used * 2 * 8 * 4
        buffers = (rows.keys, rows.values)
        assert measured["payload"] + measured["reserved"] == sum(
            x.untyped_storage().nbytes() for x in buffers
        )
    third = HostRows([50, 0, 0], like, enabled=enabled, room=room)
    assert third.values.shape[0] >= 50


def test_a_room_takes_over_everything_that_a_load_reads() -> None:
    """A load that was captured with the first prompt's rows finds the second prompt's."""
    room, like = StickyRoom(), torch.empty(1, 4)
    first, second = (HostRows(lengths, like, room=room) for lengths in ([3, 7], [6, 2]))
    room.adopt(first)
    for segment, n in enumerate((6, 2)):
        second.write(segment, torch.full((n, 4), 1.0 + segment), torch.full((n, 4), 3.0 + segment))
    second.settle()
    room.adopt(second)
    assert {path for path, *_ in tensors_of(second)} == {("values",), ("keys",), ("_loaded",), ("first",)}
    target = HostRows([4, 0], like)
    slots, rows = torch.tensor([0, 2]), first.first + 1
    first.load(rows, target, slots)  # type: ignore[arg-type]
    assert target.values[slots, 0].tolist() == [3.0, 4.0]
    assert target.keys is not None
    assert target.keys[slots, 0].tolist() == [1.0, 2.0]
    assert second.loaded_rows == 2


def test_a_layer_without_rows_asks_for_no_room() -> None:
    room = StickyRoom()
    rows = HostRows([0, 0], torch.empty(1, 4), room=room)
    assert rows.nbytes()["host"] == {"payload": 0, "metadata": 0, "reserved": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_filling_waits_for_what_it_copies_and_settling_for_the_copies() -> None:
    """The source is made by slow work, and let go of at once; strided ones too."""
    like = torch.empty(1, 128, device="cuda")
    rows = HostRows([2**16] * 4, like)
    expected = []
    for segment in range(4):
        slow = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            slow = slow @ slow / 45
        wide = torch.full((2**16, 2, 128), float(segment), device="cuda") + 0 * slow[0, 0].nan_to_num()
        rows.write(segment, wide[:, 0], wide[:, 1] + 0.5)
        expected.append(float(segment))
        del wide, slow
        torch.full((2**16, 2, 128), -1.0, device="cuda")  # would take the place of what was let go of
    rows.settle()
    torch.cuda.synchronize()
    assert rows.keys is not None
    for segment, value in enumerate(expected):
        span = slice(segment * 2**16, (segment + 1) * 2**16)
        assert (rows.keys[span] == value).all()
        assert (rows.values[span] == value + 0.5).all()

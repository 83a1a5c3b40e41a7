"""The model of the latest cell, kept so that consecutive cells of a sweep load it once; and where it runs."""

from __future__ import annotations

import gc
import logging
import platform
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from hcache.models import LoadedModel, load
from runners.config import RunConfig

log = logging.getLogger(__name__)
_latest: list[tuple[Any, LoadedModel]] = []
"""The latest model with what it was loaded for; empty before the first."""


def loaded(run: RunConfig) -> LoadedModel:
    """The model of the latest cell if it is the same; otherwise that one is freed first."""
    key = (run.model, run.runtime.device)
    if not _latest or _latest[0][0] != key:
        _latest.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.info("loading %s", run.model.name)
        disable_progress_bar()  # transformers' own, of the weights: it would tear the cell's
        _latest.append((key, load(run.model, run.runtime.device)))
    return _latest[0][1]


def device_name(model: LoadedModel) -> str:
    """The model's device in words."""
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()} (CPU)"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )

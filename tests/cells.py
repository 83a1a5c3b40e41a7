"""Small real runs for tests of the run layer: a checkpoint, configurations, results without timings."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hcache.benchmarks import BENCHMARKS
from hcache.methods import METHODS
from hcache.models import ModelSpec
from hcache.tiny.tokenizer import write_tokenizer
from runners.config import BudgetConfig, RunConfig, RuntimeConfig

LENGTH = 800
"""Tokens of a prompt: enough for the facts, few enough for a test."""


def write_checkpoint(directory: Path) -> Path:
    """A random byte-level Llama that writes varied text, and its tokenizer."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=259,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=258,
        bos_token_id=257,
        pad_token_id=256,
    )
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def cell(checkpoint: Path, outputs: Path, method: str = "snapkv", **settings: Any) -> RunConfig:
    """A cell of `retrieval` on the checkpoint.

    Settings: those of the method as a dict `hyper`, of the benchmark as `benchmark`, else of budget and
    runtime.
    """
    defaults = {"tasks": ("single", "multi"), "lengths": (LENGTH,), "examples_per_task": 3, "distractors": 4}
    benchmark = BENCHMARKS.get("retrieval")(**{**defaults, **settings.pop("benchmark", {})})
    hyper = settings.pop("hyper", {})
    budget = {key: settings.pop(key) for key in ("kept_fraction", "kept_tokens") if key in settings}
    return RunConfig(
        model=ModelSpec(name="random", path=str(checkpoint)),
        method=METHODS.get(method)(**hyper),
        benchmark=benchmark,
        budget=BudgetConfig(**budget),
        runtime=RuntimeConfig(device="cpu", **settings),
        outputs=str(outputs),
        tag="test",
    )


def limited(run: RunConfig, limit: int | None) -> RunConfig:
    """The same cell with another limit."""
    return replace(run, benchmark=replace(run.benchmark, limit=limit))


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one cell must have in common."""
    kept = copy.deepcopy(result)
    moved = kept["latency"]["host_to_device_bytes_per_token"]
    kept["latency"] = {"host_to_device_bytes_per_token": moved}
    for key in ("started", "seconds", "dirty", "git"):
        del kept["provenance"][key]
    return kept


def line_without_timings(line: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one example must have in common."""
    return {k: v for k, v in line.items() if k not in ("prefill_ms", "decode_ms", "started", "seconds")}

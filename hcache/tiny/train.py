"""Train the embedded model: `python -m hcache.tiny.train --out DIR`, 12 minutes on one H100.

Training may be spread over several calls: each saves DIR/state.pt before its limit and the next goes on with
`--resume`. Needs torch, transformers, safetensors and numpy only. The shipped files are model.safetensors
(bfloat16), config.json, generation_config.json, the tokenizer, training_log.jsonl and scores.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hcache.tiny.batches import Batch, code_text, make_batch, make_items, prose_text
from hcache.tiny.model import Score, new_model, next_byte_logits, rounded_copy, score_items
from hcache.tiny.schedule import Ladder, language_weight, learning_rate
from hcache.tiny.text import KINDS
from hcache.tiny.tokenizer import write_tokenizer

RESERVE_SECONDS = 35.0  # of each call, for the last save and the held-out table
SAVE_SECONDS = 120.0
LOG_STEPS = 100
TABLE_LENGTHS = (512, 1024, 2048, 4096, 8192)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hcache.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the state, weights, log and scores"
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="wall-clock limit of this call")
    parser.add_argument("--total-minutes", type=float, default=12.0, help="planned minutes of all calls")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/state.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=131072, help="bytes of one step, at any length")
    parser.add_argument("--workers", type=int, default=8, help="processes that build rows")
    parser.add_argument(
        "--table-items", type=int, default=128, help="held-out prompts of each cell and source"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--max-steps", type=int, default=None, help="stop after this step (for trials)")
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU: tiny batches, short table")
    return parser.parse_args(argv)


class Feed:
    """Batches from worker processes, a fixed number ahead, so that the same seed gives the same batches.

    Args:
        ladder: read when a batch is ordered, `ahead` steps before it is used.
    """

    def __init__(self, args: argparse.Namespace, ladder: Ladder, first_step: int) -> None:
        code_text(False), prose_text(False)  # before the fork: the workers share them
        self._pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork"))
        self._args, self._ladder, self._next = args, ladder, first_step
        self._orders: deque[Future[Batch]] = deque()
        for _ in range(2 * args.workers):
            self._order()

    def _order(self) -> None:
        seed = f"train-{self._args.seed}-{self._next}"
        length = self._ladder.length(Random(seed))
        rows = max(1, self._ladder.batch_tokens(self._args.batch_tokens) // length)
        kinds = self._ladder.kinds(length)
        self._orders.append(self._pool.submit(make_batch, seed, length, rows, kinds))
        self._next += 1

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._order()
            yield self._orders.popleft().result()

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Clock:
    """Seconds of this call and of all calls; the schedule follows the latter."""

    started: float
    before: float
    total: float

    @property
    def call(self) -> float:
        return time.monotonic() - self.started

    @property
    def seconds(self) -> float:
        return self.before + self.call

    @property
    def progress(self) -> float:
        """Share of the planned training that is over, 0 to 1."""
        return min(1.0, self.seconds / self.total)


class Trainer:
    """Weights, optimiser and ladder, one step at a time."""

    def __init__(self, args: argparse.Namespace, ladder: Ladder, device: torch.device) -> None:
        self.args, self.ladder, self.device = args, ladder, device
        self.model = new_model(args.seed, device).train()
        self.shipped = rounded_copy(self.model)
        self.optimizer = self._optimizer()
        self.step = 0

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)

    def loss(self, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats a byte) of the answers plus the weighted one of the text; and the former."""
        tokens_BT = self._load(batch.tokens).long()
        answers, language = self._load(batch.answers), self._load(batch.language)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = next_byte_logits(self.model, tokens_BT, torch.cat([answers, language]))
        targets = tokens_BT.flatten().index_select(0, torch.cat([answers, language]) + 1)
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        recall = losses[: len(answers)].mean()
        return recall + weight * losses[len(answers) :].mean(), recall.detach()

    def _load(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def train_step(self, batch: Batch, progress: float) -> Tensor:
        """One optimiser step; the answers' loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, progress)
        loss, recall = self.loss(batch, language_weight(progress))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return recall

    def compile(self, *batches: Batch) -> None:
        """Compile the decoder layers, all with the same code; if that fails here, say so and go without."""
        torch._dynamo.config.recompile_limit = 64
        for layer in self.model.model.layers:
            layer.compile()
        try:
            for batch in batches:
                self.loss(batch, 0.1)[0].backward()
        except Exception:
            traceback.print_exc()
            print("torch.compile failed (above): training goes on without it, more slowly", flush=True)
            for layer in self.model.model.layers:
                layer._compiled_call_impl = None
        self.optimizer.zero_grad(set_to_none=True)

    def rounded(self) -> LlamaForCausalLM:
        """The model as it would be shipped now: bfloat16."""
        with torch.no_grad():
            for target, source in zip(self.shipped.parameters(), self.model.parameters(), strict=True):
                target.copy_(source)
        return self.shipped

    def held_out(self, cells: dict[str, int], count: int = 32) -> dict[str, float]:
        """Share of right values of each kind at its length, over prose and code."""
        model = self.rounded()
        scores = {
            kind: [
                score_items(model, make_items(kind, length, count, s))["values"] for s in ("prose", "code")
            ]
            for kind, length in cells.items()
        }
        return {kind: sum(pair) / 2 for kind, pair in scores.items()}

    def state(self) -> dict[str, Any]:
        """Everything a later call needs, moments in bfloat16 (38 MB in all)."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {  # new dicts: the old ones are the optimiser's own
            index: {**moments, **{name: moments[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}}
            for index, moments in optimizer["state"].items()
        }
        weights = dict(self.model.named_parameters())
        return {"weights": weights, "optimizer": optimizer, "step": self.step, "levels": self.ladder.levels}

    def load(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def save_state(out: Path, trainer: Trainer, clock: Clock) -> None:
    """Write DIR/state.pt, whole or not at all."""
    temporary = out / "state.pt.tmp"
    torch.save({**trainer.state(), "seconds": clock.seconds, "seed": trainer.args.seed}, temporary)
    temporary.replace(out / "state.pt")


def load_state(args: argparse.Namespace) -> dict[str, Any] | None:
    """DIR/state.pt if this call resumes. Raises ValueError if it is missing, unasked for or foreign."""
    path = args.out / "state.pt"
    if args.resume != path.exists():
        wish = (
            "--resume was given, but there is no"
            if args.resume
            else "give --resume or another --out: there is a"
        )
        raise ValueError(f"{wish} {path}")
    if not args.resume:
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["seed"] != args.seed:
        raise ValueError(f"--seed {args.seed} differs from the {state['seed']} that {path} was trained with")
    return state


def train(args: argparse.Namespace, trainer: Trainer, feed: Feed, clock: Clock) -> None:
    """Steps until the limit of this call, with the log and a checkpoint now and then."""
    saved, mark, since, losses = clock.call, clock.call, trainer.step, []
    for batch in feed:
        losses.append(trainer.train_step(batch, clock.progress))
        if trainer.step % LOG_STEPS == 0:
            mean = torch.stack(losses).mean().item()
            pace = (
                (trainer.step - since) * trainer.ladder.batch_tokens(args.batch_tokens) / (clock.call - mark)
            )
            log(args.out, trainer, clock, mean, pace)
            mark, since, losses = clock.call, trainer.step, []
        if clock.call - saved > SAVE_SECONDS:
            save_state(args.out, trainer, clock)
            saved = clock.call
        if clock.call > args.minutes * 60 - args.reserve or trainer.step == args.max_steps:
            return


def log(out: Path, trainer: Trainer, clock: Clock, loss: float, pace: float) -> None:
    """Score what the ladder asks for, climb, and add a line to training_log.jsonl. Raises on a lost model."""
    if not loss < 50:
        raise FloatingPointError(f"training diverged at step {trainer.step}: loss {loss}")
    cells = trainer.ladder.tested()
    if trainer.ladder.done and trainer.step % (5 * LOG_STEPS) == 0:
        cells = dict.fromkeys(KINDS, (8192, 4096)[trainer.step // (5 * LOG_STEPS) % 2])
    accuracy = trainer.held_out(cells)
    climbed = trainer.ladder.climb(accuracy, clock.progress) if not trainer.ladder.done else []
    row = {
        "step": trainer.step,
        "seconds": round(clock.seconds, 1),
        "loss": round(loss, 4),
        "rate": round(learning_rate(trainer.step, clock.progress), 6),
        "tokens_per_s": round(pace),
        "held_out": {kind: [cells[kind], round(share, 3)] for kind, share in accuracy.items()},
        "levels": dict(trainer.ladder.levels),
        "climbed": climbed,
    }
    print(json.dumps(row), flush=True)
    with (out / "training_log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def score_table(model: LlamaForCausalLM, count: int, lengths: tuple[int, ...]) -> dict[str, dict[str, Score]]:
    """{"prose single": {"512": score, ...}, ...} on held-out items."""
    return {
        f"{source} {kind}": {str(n): score_items(model, make_items(kind, n, count, source)) for n in lengths}
        for source in ("prose", "code")
        for kind in KINDS
    }


def markdown_table(scores: dict[str, dict[str, Score]]) -> str:
    """The held-out scores for the model card: exact answers, and in brackets keys answered right."""
    lengths = list(next(iter(scores.values())))
    lines = [f"| text, question | {' | '.join(lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    for name, row in scores.items():
        cells = [
            f"{s['exact']:.3f}" + (f" ({s['values']:.3f})" if "multi" in name else "") for s in row.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ship(out: Path, trainer: Trainer, clock: Clock, lengths: tuple[int, ...]) -> None:
    """Write the bfloat16 weights and their configs, then scores.json, and print the table."""
    model = trainer.rounded()
    model.config.use_cache = model.generation_config.use_cache = True
    model.save_pretrained(out)
    write_tokenizer(out)
    scores = score_table(model, trainer.args.table_items, lengths)
    record = {
        "step": trainer.step,
        "seconds": round(clock.seconds, 1),
        "seed": trainer.args.seed,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "scores": scores,
    }
    (out / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
    print(markdown_table(scores), flush=True)


def _smoke(args: argparse.Namespace) -> None:
    """Shrink every size so that the whole way takes seconds."""
    args.batch_tokens, args.workers, args.table_items = 512, 2, 2
    args.max_steps = args.max_steps or LOG_STEPS


def main(argv: list[str] | None = None) -> None:
    """One call of training."""
    started = time.monotonic()
    args = parse(argv)
    args.reserve = min(RESERVE_SECONDS, 0.3 * args.minutes * 60)
    if args.smoke:
        _smoke(args)
    args.out.mkdir(parents=True, exist_ok=True)
    state = load_state(args)
    ladder = Ladder(state["levels"]) if state else Ladder()
    feed = Feed(args, ladder, state["step"] if state else 0)  # forks, so before the GPU is touched
    try:
        _run(
            args,
            ladder,
            feed,
            state,
            Clock(started, state["seconds"] if state else 0.0, args.total_minutes * 60),
        )
    finally:
        feed.close()


def _run(
    args: argparse.Namespace, ladder: Ladder, feed: Feed, state: dict[str, Any] | None, clock: Clock
) -> None:
    """Set up the device, train, save, ship."""
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(args, ladder, device)
    if state:
        trainer.load(state)
    print(f"{device}, step {trainer.step}, {clock.seconds:.0f} s of {clock.total:.0f} s planned", flush=True)
    if args.compile:
        size = ladder.batch_tokens(args.batch_tokens)
        trainer.compile(*(make_batch("probe", n, max(1, size // n), ("single",)) for n in (256, 512)))
        print(f"compiled after {clock.call:.0f} s", flush=True)
    train(args, trainer, feed, clock)
    save_state(args.out, trainer, clock)
    print(f"step {trainer.step} saved after {clock.call:.0f} s", flush=True)
    ship(args.out, trainer, clock, TABLE_LENGTHS[:1] if args.smoke else TABLE_LENGTHS)


if __name__ == "__main__":
    main()

"""The loop that every training script here shares: one that is seeded by its step, saves itself and continues where it
was.

All randomness of step N follows from (seed, N), so a run that was stopped and continued gives the weights of one that
was not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Schedule:
    """A learning rate that rises linearly, holds, and falls to zero by a cosine over the last part."""

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.5
    """The share of steps over which the rate falls."""

    def at(self, step: int) -> float:
        """The rate of a step."""
        begin = self.steps * (1 - self.decay)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (step - begin) / (self.steps - begin)))))
        return self.rate * min(1.0, (step + 1) / self.warmup) * fall


def randomness(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The sources of randomness of one step."""
    drawn = np.random.SeedSequence([seed, step]).generate_state(2)
    return np.random.default_rng(int(drawn[0])), torch.Generator().manual_seed(int(drawn[1]))


@dataclass
class Training:
    """A model in training: its weights, their running average, the optimizer and the log."""

    folder: Path
    weights: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    average: float = 0.998
    """The share of the running average that each step keeps."""
    step: int = 0
    seconds: float = 0.0
    """CPU seconds spent in steps."""
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.averaged = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def resume(self) -> None:
        """Continues from the last save, if there is one."""
        if not (self.folder / "progress.json").is_file():
            return
        progress = json.loads((self.folder / "progress.json").read_text())
        self.step, self.seconds, self.log = progress["step"], progress["seconds"], progress["log"]
        stored = load_file(self.folder / f"state-{self.step}.safetensors")
        keys = list(self.weights)
        with torch.no_grad():
            for name in keys:
                self.weights[name].copy_(stored[f"weight.{name}"])
                self.averaged[name].copy_(stored[f"average.{name}"])
        state = self.optimizer.state_dict()
        state["state"] = {
            index: {
                "step": torch.tensor(float(progress["updates"])),
                "exp_avg": stored[f"first.{name}"],
                "exp_avg_sq": stored[f"second.{name}"],
            }
            for index, name in enumerate(self._order())
            if f"first.{name}" in stored
        }
        self.optimizer.load_state_dict(state)

    def save(self) -> None:
        """Writes everything that continuing needs; an interrupted save leaves the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        tensors |= {f"average.{name}": value for name, value in self.averaged.items()}
        updates = 0.0
        state = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self._order()):
            if index in state:
                tensors[f"first.{name}"] = state[index]["exp_avg"]
                tensors[f"second.{name}"] = state[index]["exp_avg_sq"]
                updates = max(updates, float(state[index]["step"]))
        path = self.folder / f"state-{self.step}.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        progress = {"step": self.step, "updates": updates, "seconds": self.seconds, "log": self.log}
        temporary = self.folder / "progress.tmp"
        temporary.write_text(json.dumps(progress))
        temporary.replace(self.folder / "progress.json")
        for other in self.folder.glob("state-*.safetensors"):
            if other != path:
                other.unlink()

    def _order(self) -> list[str]:
        names = {id(weight): name for name, weight in self.weights.items()}
        return [names[id(weight)] for group in self.optimizer.param_groups for weight in group["params"]]

    def run(
        self,
        loss_of: Callable[[int], tuple[torch.Tensor, Mapping[str, float]]],
        save_every: int = 200,
        until: int | None = None,
    ) -> None:
        """Trains to the end of the schedule, or to step ``until``, and saves. ``loss_of`` gives the loss of a step and
        figures to log."""
        sums: dict[str, list[float]] = {}
        end = self.schedule.steps if until is None else until
        while self.step < end:
            begin = time.process_time()
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.at(self.step) * group.get("scale", 1.0)
            loss, figures = loss_of(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
            self.optimizer.step()
            keep = min(self.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                names = list(self.weights)
                torch._foreach_lerp_([self.averaged[n] for n in names], [self.weights[n] for n in names], 1 - keep)
            self.step += 1
            self.seconds += time.process_time() - begin
            for name, value in {**figures, "norm": float(norm)}.items():
                sums.setdefault(name, []).append(value)
            if self.step % 50 == 0:
                means = {name: round(float(np.mean(values)), 5) for name, values in sums.items()}
                self.log.append({"step": self.step, "seconds": round(self.seconds, 1), **means})
                print(json.dumps(self.log[-1]), flush=True)
                sums = {}
            if self.step % save_every == 0 or self.step == end:
                self.save()


def adamw(weights: Mapping[str, torch.nn.Parameter], rate: float, decay: float = 0.02) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone."""
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    others = [weight for weight in weights.values() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), fused=True)


def command(train: Callable[[Path, int, int], object], about: str | None, steps: int) -> None:
    """The command line of a training script: ``train`` of the folder, the number of steps and the seed."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(given.folder, given.steps, given.seed)

"""What every training here shares: a clock, a schedule, averaged weights, validation, checkpoints.

The learning rate follows the elapsed share of the time given, so a slow machine makes fewer steps but always
ends with a finished schedule. Random choices depend on the seed and the step's number only, so a training
that was killed continues from its checkpoint as if nothing had happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from daskcell.errors import WeightsError
from daskcell.models.loading import has_bfloat16
from daskcell.storage.atomic import atomic_path, refuse_impossible, remove, temporaries

# Settings that may differ between the parts of an interrupted training.
_FREE = ("minutes", "steps", "save_minutes", "patience")
# What a checkpoint holds beside the weights.
_STATE = ("step", "elapsed", "loss", "best", "since")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings of any training."""

    minutes: float = 60.0
    """Training time; preparing the images comes on top."""
    steps: int | None = None
    """Number of steps instead of a time."""
    rate: float = 2e-3
    decay: float = 0.02
    """Weight decay of kernels; biases and batch statistics have none."""
    warmup: int = 100
    clip: float = 5.0
    average: float = 0.998
    """Momentum of the averaged weights, which are the ones kept."""
    seed: int = 0
    save_minutes: float = 3.0
    """Time between checkpoints."""
    validate_steps: int = 100
    """Steps between validations, where there is anything to validate with."""
    patience: int = 10
    """Validations without gain after which the training stops."""
    bfloat16: bool | None = None
    """Whether most is computed in bfloat16; None: where the device does so itself."""

    def autocast(self, device: str = "cpu") -> torch.autocast:
        """Context in which the network computes."""
        wanted = has_bfloat16(device) if self.bfloat16 is None else self.bfloat16
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=wanted)


@dataclass(frozen=True)
class Trained:
    """What a training gave."""

    path: Path
    """The weights (``.npz``)."""
    steps: int
    loss: float
    """Running mean over about the last 100 steps."""


class Trainer:
    """A training under way: network, its average, optimizer, clock; kept in ``out/checkpoint.pt``.

    Parameters
    ----------
    recipe
        Settings; a checkpoint of other settings is refused.
    out
        Folder of the checkpoint and of ``log.csv``.
    net
        The network; ``mean.module`` becomes the average of its weights over the last steps.
    weights
        File of usable weights.
    export
        Called with the averaged network and a note; writes `weights`. Called before every checkpoint; with
        validation, after every gain.
    """

    def __init__(
        self,
        recipe: Schedule,
        out: Path,
        net: nn.Module,
        weights: Path,
        export: Callable[[nn.Module, str], object],
    ):
        self.recipe, self.out, self.net = recipe, out, net
        self.weights, self.export = weights, export

        def averaged(kept: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
            # A short memory at first: the average must not keep the random start.
            momentum = min(recipe.average, float((1 + count) / (10 + count)))
            return kept + (1 - momentum) * (new - kept)

        self.mean = AveragedModel(net, avg_fn=averaged, use_buffers=True)
        self.optimizer = _optimizer(net, recipe)
        self.step, self.elapsed, self.loss = 0, 0.0, float("nan")
        self.best, self.since = float("inf"), 0
        self.checkpoint = out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()
        else:
            # Written at once: where it is, the files beside it are this training's.
            _refuse_existing(out)
            out.mkdir(parents=True, exist_ok=True)
            self.save(export=False)
        remove(*temporaries(out))  # of a training that was killed while it wrote

    def left(self) -> float:
        """Share of the training still to do; 0 once validation has shown no gain for too long."""
        if self.since >= self.recipe.patience:
            return 0.0
        if self.recipe.steps is not None:
            return 1 - self.step / self.recipe.steps if self.recipe.steps else 0.0
        return 1 - self.elapsed / (60 * self.recipe.minutes) if self.recipe.minutes > 0 else 0.0

    def run(
        self,
        loss_of: Callable[[nn.Module, int], Tensor],
        report: Callable[[str], None],
        validate: Callable[[nn.Module], float] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Trained:
        """Train to the end.

        Parameters
        ----------
        loss_of
            The loss of a step, by its number.
        validate
            What is to become small, of the averaged network in evaluation mode; the weights where it is
            smallest are the ones kept.
        progress
            Called with the share that is done.
        """
        last, lined = time.monotonic(), time.monotonic()
        while (left := self.left()) > 0:
            start = time.monotonic()
            self._learn(loss_of, 1 - left)
            now = time.monotonic()
            self.elapsed += now - start
            if progress is not None:
                progress(1 - max(0.0, self.left()))
            if now - lined > 30:
                lined = now
                done = f"{100 * (1 - left):.0f} %"
                report(f"step {self.step}  loss {self.loss:.4f}  {self.elapsed / 60:.1f} min  {done}")
                self._log(float("nan"))
            due = self.step % self.recipe.validate_steps == 0 or self.left() <= 0
            if validate is not None and due:
                self._validate(validate, report)
            if now - last > 60 * self.recipe.save_minutes:
                self.save(export=validate is None)
                last = time.monotonic()
        self.save(export=validate is None)
        return self.result()

    def _validate(self, validate: Callable[[nn.Module], float], report: Callable[[str], None]) -> None:
        value = validate(self.mean.module.eval())
        gained = value < self.best
        self.best, self.since = (value, 0) if gained else (self.best, self.since + 1)
        report(f"step {self.step}  validation {value:.4f}{', the best so far' if gained else ''}")
        self._log(value)
        self.save(export=gained)

    def _log(self, validation: float) -> None:
        with open(self.out / "log.csv", "a", encoding="utf-8") as log:
            log.write(f"{self.step},{self.elapsed:.0f},{self.loss:.5f},{validation:.5f}\n")

    def save(self, *, export: bool = True) -> None:
        """Write the checkpoint, whole or not at all, and usable weights unless `export` is off."""
        if export:
            self.export(self.mean.module, f"step {self.step}, loss {self.loss:.4f}")
        state = {
            "recipe": _plain(self.recipe),
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in _STATE},
        }
        with atomic_path(self.checkpoint) as part, open(part, "wb") as file:
            torch.save(state, file)

    def result(self) -> Trained:
        """What there is so far."""
        if not self.weights.exists():  # no step was asked for
            self.save()
        return Trained(self.weights, self.step, self.loss)

    def _resume(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            found = {k: v for k, v in state["recipe"].items() if k not in _FREE}
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)[:120]
            raise WeightsError(
                f"The checkpoint {self.checkpoint} cannot be read ({first}). Please remove it to start anew."
            ) from error
        wanted = {k: v for k, v in _plain(self.recipe).items() if k not in _FREE}
        if found != wanted:
            changed = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise WeightsError(
                f"The checkpoint {self.checkpoint} belongs to a training with another "
                f"{' and '.join(changed)}. Please choose another folder, or remove it to start anew."
            )
        self.net.load_state_dict(state["net"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in _STATE:
            setattr(self, name, state[name])

    def _learn(self, loss_of: Callable[[nn.Module, int], Tensor], done: float) -> None:
        recipe = self.recipe
        warm = min(1.0, (self.step + 1) / max(1, recipe.warmup))
        rate = recipe.rate * warm * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.net.train()
        # Of layers that drop at random.
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, self.step]).generate_state(1)[0]))
        loss = loss_of(self.net, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.optimizer.step()
        value = float(loss.detach())
        weight = max(0.01, 1 / (self.step + 1))
        self.loss = (1 - weight) * self.loss + weight * value if self.step else value
        self.mean.update_parameters(self.net)
        self.step += 1


def _refuse_existing(out: Path) -> None:
    """Raise `WeightsError` if a new training would replace a file in `out`."""
    refuse_impossible(out)
    for name in ("log.csv", "encoder.npz", "segmenter.npz", "segmenter.pt"):
        if os.path.lexists(out / name):
            raise WeightsError(
                f"{out / name} is not of a training that can be continued (there is no checkpoint.pt), and "
                "would be replaced. Please choose another folder, or move it."
            )


def _plain(recipe: Schedule) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}


def _optimizer(net: nn.Module, recipe: Schedule) -> torch.optim.Optimizer:
    kernels = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate)

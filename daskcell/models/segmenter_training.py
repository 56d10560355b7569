"""Training the embedded segmenter, by the clock, and able to stop at any moment.

The learning rate follows the elapsed share of the time given, so a slow machine makes fewer steps but always
ends with a finished schedule. Every random choice depends on the seed and the step's number only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daskcell.errors import InputError, WeightsError
from daskcell.models.arrays import save_arrays
from daskcell.models.segmenter_augment import tile
from daskcell.models.segmenter_data import Sample, draw_samples, read_folder
from daskcell.models.unet import TinyUNet

KIND = "daskcell-tiny-segmenter-1"


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults made the embedded weights."""

    minutes: float = 60.0
    """Training time; reading and drawing the pictures comes on top."""
    steps: int | None = None
    """Number of steps instead of a time."""
    batch: int = 8
    side: int = 224
    """Side of a tile in pixels."""
    rate: float = 2e-3
    decay: float = 0.02
    warmup: int = 100
    clip: float = 5.0
    average: float = 0.998
    """Momentum of the averaged weights, which are the ones kept."""
    generated: int = 40
    """Generated fields beside the pictures given."""
    generated_share: float = 0.28
    seed: int = 0
    save_minutes: float = 3.0
    """Time between checkpoints."""
    bfloat16: bool = True
    widths: tuple[int, ...] = (16, 32, 64, 128, 192)
    blocks: tuple[int, ...] = (1, 2, 2, 1)


@dataclass(frozen=True)
class Trained:
    """What a training gave."""

    path: Path
    """The weights (``.npz``), usable as ``model=``."""
    steps: int
    loss: float
    """Running mean over about the last 100 steps."""


def train_segmenter(
    folders: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    validate: Sequence[str | Path] = (),
    report: Callable[[str], None] = print,
) -> Trained:
    """Train a network for `daskcell.segment` from pictures with masks.

    Continues from ``out/checkpoint.pt`` where there is one of the same recipe: kill it at any moment and call
    it again.

    Parameters
    ----------
    folders
        Folders with ``images/`` and ``masks/`` (label images of the same names); may be empty: generated
        pictures only.
    out
        Folder for ``segmenter.npz`` (refreshed with every checkpoint), ``checkpoint.pt`` and ``log.csv``.
    validate
        Folders scored at the end and with every fifth checkpoint.
    report
        Called with one line of progress at a time.

    Raises
    ------
    InputError
        If there is nothing to train on.
    WeightsError
        If the checkpoint in `out` is damaged or belongs to another recipe.
    """
    recipe = recipe or Recipe()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(recipe, out)
    if run.left() <= 0:
        return run.finish()
    samples = [s for folder in folders for s in read_folder(folder, report=report)]
    if recipe.generated:
        report(f"drawing {recipe.generated} fields")
        samples += list(draw_samples(recipe.generated, recipe.seed))
    if not samples:
        raise InputError(
            "There is nothing to train on. Please give a folder of pictures or ask for generated ones."
        )
    weights = picture_weights(samples, recipe.generated_share)
    report(f"{len(samples)} pictures, {sum(len(s.centres) for s in samples)} cells; from step {run.step}")

    def check() -> None:
        for folder in validate:
            from daskcell.models.segmenter_scores import score_table

            report(score_table(run.averaged_network(), read_folder(folder)))

    run.loop(samples, weights, report, check)
    check()
    return run.finish()


def picture_weights(samples: Sequence[Sample], generated_share: float) -> np.ndarray:
    """Chance of each picture to be drawn: 1 / sqrt(pictures of its group), generated ones a fixed share."""
    groups, index, counts = np.unique([s.group for s in samples], return_inverse=True, return_counts=True)
    weights = 1 / np.sqrt(counts[index])
    drawn = groups[index] == "generated"
    if drawn.any() and not drawn.all():
        weights[drawn] *= generated_share / weights[drawn].sum()
        weights[~drawn] *= (1 - generated_share) / weights[~drawn].sum()
    return weights / weights.sum()


def segmenter_loss(y: Tensor, truth: Tensor) -> Tensor:
    """Cellpose's: half the squared error of the flows (5 x unit length) plus cross entropy of the foreground."""
    flows = F.mse_loss(y[:, :2], 5 * truth[:, :2]) / 2
    return flows + F.binary_cross_entropy_with_logits(y[:, 2], truth[:, 2])


class _Run:
    """A training under way: network, average, optimiser, clock."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        torch.manual_seed(recipe.seed)
        self.net = TinyUNet(recipe.widths, recipe.blocks)
        self.mean = TinyUNet(recipe.widths, recipe.blocks)
        self.mean.load_state_dict(self.net.state_dict())
        self.optimizer = _optimizer(self.net, recipe)
        self.step, self.elapsed, self.loss = 0, 0.0, float("nan")
        self.checkpoint = out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            same = {**state["recipe"], "minutes": 0, "steps": 0, "save_minutes": 0} == {
                **_plain(self.recipe), "minutes": 0, "steps": 0, "save_minutes": 0
            }  # fmt: skip
        except Exception as error:
            raise WeightsError(
                f"The checkpoint {self.checkpoint} cannot be read ({error}). Please remove it to start anew."
            ) from error
        if not same:
            raise WeightsError(
                f"The checkpoint {self.checkpoint} belongs to a training with other settings. "
                "Please choose another folder, or remove it to start anew."
            )
        self.net.load_state_dict(state["net"])
        self.mean.load_state_dict(state["mean"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed, self.loss = state["step"], state["elapsed"], state["loss"]

    def save(self) -> None:
        """Checkpoint and usable weights, each written whole or not at all."""
        state = {
            "recipe": _plain(self.recipe),
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "loss": self.loss,
        }
        part = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}")
        torch.save(state, part)
        os.replace(part, self.checkpoint)
        self._export()

    def _export(self) -> Path:
        note = f"step {self.step}, loss {self.loss:.4f}"
        return save_arrays(self.out / "segmenter.npz", self.mean.state_dict(), KIND, note)

    def left(self) -> float:
        """Share of the training still to do."""
        if self.recipe.steps is not None:
            return 1 - self.step / max(1, self.recipe.steps)
        return 1 - self.elapsed / (60 * self.recipe.minutes) if self.recipe.minutes > 0 else 0.0

    def averaged_network(self) -> nn.Module:
        return self.mean.eval()

    def loop(
        self, samples: Sequence[Sample], weights: np.ndarray, report: Callable[[str], None], check: Callable
    ) -> None:
        recipe, saves = self.recipe, 0
        cumulative = np.cumsum(weights)
        last = lined = time.monotonic()
        while (left := self.left()) > 0:
            start = time.monotonic()
            batch = _batch(samples, cumulative, recipe, self.step)
            self._learn(*batch, rate=recipe.rate * _schedule(self.step, 1 - left, recipe.warmup))
            now = time.monotonic()
            self.elapsed += now - start
            if now - lined > 30:
                lined = now
                report(
                    f"step {self.step}  loss {self.loss:.4f}  {self.elapsed / 60:.1f} min  {100 * (1 - left):.0f} %"
                )
                with open(self.out / "log.csv", "a", encoding="utf-8") as log:
                    log.write(f"{self.step},{self.elapsed:.0f},{self.loss:.5f}\n")
            if now - last > 60 * recipe.save_minutes:
                self.save()
                saves += 1
                if saves % 5 == 0:
                    check()
                last = time.monotonic()

    def _learn(self, x: Tensor, truth: Tensor, rate: float) -> None:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            y, _ = self.net(x)
        loss = segmenter_loss(y.float(), truth)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.optimizer.step()
        value = float(loss.detach())
        self.loss = value if not np.isfinite(self.loss) else 0.99 * self.loss + 0.01 * value
        # A short memory at first: the average must not keep the random start.
        momentum = min(recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, new in zip(
                self.mean.state_dict().values(), self.net.state_dict().values(), strict=True
            ):
                if kept.is_floating_point():
                    kept.lerp_(new, 1 - momentum)
                else:
                    kept.copy_(new)
        self.step += 1

    def finish(self) -> Trained:
        self.save()
        return Trained(self.out / "segmenter.npz", self.step, self.loss)


def _plain(recipe: Recipe) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}


def _optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    kernels = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate)


def _schedule(step: int, done: float, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))


def _batch(
    samples: Sequence[Sample], cumulative: np.ndarray, recipe: Recipe, step: int
) -> tuple[Tensor, Tensor]:
    tiles = []
    for i in range(recipe.batch):
        rng = np.random.default_rng([recipe.seed, step, i])
        chosen = min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(samples) - 1)
        tiles.append(tile(samples[chosen], rng, recipe.side))
    x, y = (torch.from_numpy(np.stack(part)) for part in zip(*tiles, strict=True))
    return x.contiguous(memory_format=torch.channels_last), y

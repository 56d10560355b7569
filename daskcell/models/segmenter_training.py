"""Training a segmenter from pictures with masks; made the embedded weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daskcell.errors import InputError
from daskcell.models.arrays import save_arrays
from daskcell.models.segmenter_augment import tile
from daskcell.models.segmenter_data import Sample, draw_samples, read_folder
from daskcell.models.training import Schedule, Trained, Trainer
from daskcell.models.unet import KIND, TinyUNet


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """How to train a segmenter. The defaults made the embedded weights."""

    batch: int = 8
    side: int = 224
    """Side of a tile in pixels."""
    generated: int = 40
    """Generated fields beside the pictures given."""
    generated_side: int = 512
    generated_share: float = 0.28
    """Chance of a tile to come from them."""
    widths: tuple[int, ...] = (16, 32, 64, 128, 192)
    blocks: tuple[int, ...] = (1, 2, 2, 1)


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
        Folder for ``segmenter.npz`` (usable as ``model=``, refreshed with every checkpoint),
        ``checkpoint.pt`` and ``log.csv``.
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
    torch.manual_seed(recipe.seed)
    net, mean = (TinyUNet(recipe.widths, recipe.blocks) for _ in range(2))
    trainer = Trainer(
        recipe, out, net, mean, lambda n, note: save_arrays(out / "segmenter.npz", n.state_dict(), KIND, note)
    )
    if trainer.left() <= 0:
        return Trained(trainer.save(), trainer.step, trainer.loss)
    samples = [s for folder in folders for s in read_folder(folder, report=report)]
    if recipe.generated:
        report(f"drawing {recipe.generated} fields")
        samples += list(draw_samples(recipe.generated, recipe.seed, recipe.generated_side))
    if not samples:
        raise InputError("There is nothing to train on. Please give pictures, or ask for generated ones.")
    cumulative = np.cumsum(picture_weights(samples, recipe.generated_share))
    report(f"{len(samples)} pictures, {sum(len(s.centres) for s in samples)} cells; from step {trainer.step}")

    def loss_of(net: nn.Module, step: int) -> Tensor:
        x, truth = _batch(samples, cumulative, recipe, step)
        with recipe.autocast():
            y, _ = net(x)
        return segmenter_loss(y.float(), truth)

    def check() -> None:
        from daskcell.models.segmenter_scores import score_table

        for folder in validate:
            report(score_table(mean.eval(), read_folder(folder)))

    trained = trainer.run(loss_of, report, check)
    check()
    return trained


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
    """Cellpose's: half the squared error of flows (5 x unit length) plus cross entropy of the foreground."""
    flows = F.mse_loss(y[:, :2], 5 * truth[:, :2]) / 2
    return flows + F.binary_cross_entropy_with_logits(y[:, 2], truth[:, 2])


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

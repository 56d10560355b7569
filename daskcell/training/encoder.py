"""Training an encoder on crops of cells, without labels.

Contrastive (InfoNCE; van den Oord et al., arXiv:1807.03748), but a cell's partner is not another view of
itself: it is an altered view of one of its nearest neighbours by `crop_measurements`. Views of
one cell teach what an augmentation changes; neighbours teach what may differ between cells of one type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daskcell.errors import ComputeError, InputError
from daskcell.models.crop_measurements import measure_signal
from daskcell.models.crop_signal import as_input, signal_of
from daskcell.models.encoder import DIMENSIONS, KIND, TinyEncoder, fit_projection
from daskcell.models.weights_file import save_weights
from daskcell.training.trainer import Schedule, Trained, Trainer


class Rows(Protocol):
    """Crops that are read when rows are asked for, such as an array."""

    shape: tuple[int, ...]
    ndim: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe(Schedule):
    """How to train an encoder. The defaults made the embedded weights."""

    minutes: float = 20.0
    rate: float = 1e-3
    average: float = 0.98
    warmup: int = 30
    batch: int = 64
    """Pairs of cells a step, all from one data set."""
    neighbours: int = 4
    """Cells a partner is chosen from: low keeps fine differences, high blurs them."""
    itself: float = 0.25
    """Chance that a cell's partner is the cell itself."""
    temperature: float = 0.2
    cells: str = ""
    """Which cells are learnt from, in a few letters; a checkpoint of others is refused."""
    widths: tuple[int, ...] = (32, 64, 112, 176)
    dim: int = DIMENSIONS


class _Student(nn.Module):
    """The encoder with a head that is thrown away after training."""

    def __init__(self, encoder: TinyEncoder):
        super().__init__()
        self.encoder = encoder
        pooled = len(encoder.maps.centre)
        self.head = nn.Sequential(
            nn.BatchNorm1d(pooled),
            nn.Linear(pooled, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 128),
        )

    def forward(self, signal: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder.pooled(signal).float()), dim=1)


def train_encoder(
    crops: Rows | Sequence[Rows],
    out: str | Path,
    recipe: EncoderRecipe | None = None,
    *,
    device: str = "cpu",
    report: Callable[[str], None] = print,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Train an encoder on crops of single cells.

    Continues from ``out/checkpoint.pt`` where there is one of the same recipe: kill it at any moment and call
    it again.

    Parameters
    ----------
    crops
        ``(n, 3, H, W)`` uint8 or float 0..1, as the encoder wants them (`daskcell.models.encoder`), or one
        such array for each data set. A step compares cells of one data set only. They need not be in memory:
        whatever has a shape and gives rows (memory-mapped arrays, `daskcell.training.Joined`) is read a batch
        at a time.
    out
        Folder for ``encoder.npz`` (usable as ``encoder=``), ``checkpoint.pt`` and ``log.csv``.
    device
        ``cpu``, where a recipe gives the same weights bit for bit, interrupted or not (with a number of
        `steps`, and one thread); or ``cuda``.
    report, progress
        Called with a line now and then, and with the share that is done after every step.

    Raises
    ------
    InputError
        If the crops are of a wrong shape or fewer than 16.
    WeightsError
        If the checkpoint in `out` is damaged or belongs to another recipe.
    ComputeError
        If a GPU is asked for that is not there.
    """
    recipe = recipe or EncoderRecipe()
    sets: list[Rows] = list(crops) if isinstance(crops, list | tuple) else [crops]  # type: ignore[list-item]
    if device != "cpu" and not torch.cuda.is_available():
        raise ComputeError(f"There is no GPU for device={device!r} here. Please take device='cpu'.")
    for one in sets:
        if one.ndim != 4 or one.shape[1] != 3 or len(one) < 16:
            raise InputError(f"Crops must be (n, 3, H, W) with n of at least 16, but are {one.shape}.")
    if not sets:
        raise InputError("There are no crops to train on.")
    out = Path(out)
    torch.manual_seed(recipe.seed)
    net = _Student(TinyEncoder(recipe.widths, recipe.dim)).to(device)
    sample = _mixture(sets, 4096, recipe.seed)

    weights = out / "encoder.npz"

    def export(student: nn.Module, note: str) -> None:
        encoder = student.encoder
        assert isinstance(encoder, TinyEncoder)
        fit_projection(encoder, sample, recipe.seed)
        save_weights(weights, encoder.state_dict(), KIND, note)

    trainer = Trainer(recipe, out, net, weights, export)
    if trainer.left() <= 0:
        return trainer.result()
    near = [neighbours(measure_crops(one), recipe.neighbours) for one in sets]
    home = torch.device(device)
    report(f"{sum(map(len, sets))} cells of {len(sets)} data sets; from step {trainer.step}")
    # Large sets rule little more than small ones.
    share = np.array([len(one) for one in sets]) ** 0.25
    share = share / share.sum()

    def loss_of(net: nn.Module, step: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, step])
        which = int(rng.choice(len(sets), p=share))
        chosen = rng.choice(len(sets[which]), min(recipe.batch, len(sets[which])), replace=False)
        partners = near[which][chosen, rng.integers(0, near[which].shape[1], len(chosen))]
        partners = np.where(rng.random(len(chosen)) < recipe.itself, chosen, partners)
        # Sorted reading: memory-mapped crops are read in order.
        pair = np.concatenate([chosen, partners])
        rows, back = np.unique(pair, return_inverse=True)
        signal = signal_of(as_input(np.asarray(sets[which][rows])).to(home))[torch.from_numpy(back)]
        view = alter(signal, rng)
        with recipe.autocast(device):
            z = net(view)
        return _contrast(z.float(), torch.from_numpy(pair).to(home), recipe.temperature)

    return trainer.run(loss_of, report, progress=progress)


@torch.no_grad()
def measure_crops(crops: Rows) -> np.ndarray:
    """`measure_signal` of crops, read a batch at a time: ``(n, MEASUREMENTS)`` float32."""
    batches = (as_input(crops[i : i + 256]) for i in range(0, len(crops), 256))
    parts = [measure_signal(signal_of(x)) for x in batches]
    return torch.cat(parts).numpy()


def neighbours(features: np.ndarray, count: int, components: int = 24) -> np.ndarray:
    """Nearest cells of each cell, ``(n, count)``, after standardising, principal axes and unit length."""
    x = features - features.mean(0)
    deviation = x.std(0)
    x = np.clip(x / np.where(deviation > 1e-6, deviation, np.inf), -5, 5)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    x = x @ axes[: min(components, len(axes))].T
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    count = min(count, len(x) - 1)
    near = np.empty((len(x), count), np.int64)
    for start in range(0, len(x), 1024):
        similar = x[start : start + 1024] @ x.T
        similar[np.arange(len(similar)), np.arange(start, start + len(similar))] = -np.inf
        near[start : start + 1024] = np.argpartition(-similar, max(0, count - 1), axis=1)[:, :count]
    return near


def alter(signal: Tensor, rng: np.random.Generator) -> Tensor:
    """Views that keep a cell's type: turned, mirrored, moved, a little larger, brighter, noisier.

    Size and the ratio of the stains change little: types may differ in them.
    """
    n = len(signal)
    angle, zoom = rng.uniform(0, 2 * np.pi, n), np.exp(rng.normal(0, 0.06, n))
    mirror = rng.choice([-1.0, 1.0], n)
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.stack(
        [
            np.stack([cosine, -sine * mirror, rng.normal(0, 0.04, n)], 1),
            np.stack([sine, cosine * mirror, rng.normal(0, 0.04, n)], 1),
        ],
        1,
    ).astype(np.float32)
    grid = F.affine_grid(torch.from_numpy(turn).to(signal.device), list(signal.shape), align_corners=False)
    view = F.grid_sample(signal, grid, align_corners=False)
    inside = (view.abs().amax(1, keepdim=True) > 0.004).float()
    gain = np.exp(rng.normal(0, 0.18, (n, 1, 1, 1)) + rng.normal(0, 0.06, (n, 3, 1, 1))).astype(np.float32)
    noise = rng.standard_normal(tuple(view.shape), dtype=np.float32) * rng.uniform(0, 0.05, (n, 1, 1, 1))
    light, grain = (torch.from_numpy(part.astype(np.float32)).to(signal.device) for part in (gain, noise))
    return (view * light + inside * grain).clamp(-0.5, 1.5)


def _contrast(z: Tensor, cells: Tensor, temperature: float) -> Tensor:
    """InfoNCE both ways; a pair's own cells seen again in the batch are no counterexamples."""
    n = len(z) // 2
    similar = z @ z.T / temperature
    same = cells[:, None] == cells[None, :]
    both = torch.arange(2 * n, device=z.device)
    partner = both.roll(-n)
    same[both, partner] = False
    return F.cross_entropy(similar.masked_fill(same, -1e4), partner)


def _mixture(sets: Sequence[Rows], count: int, seed: int) -> np.ndarray:
    """Up to `count` crops as bytes, the same number of each data set where it has them."""
    rng, each = np.random.default_rng(seed), max(1, count // len(sets))
    parts = []
    for one in sets:
        rows = np.sort(rng.choice(len(one), min(each, len(one)), replace=False))
        part = np.asarray(one[rows])
        parts.append(
            part if part.dtype == np.uint8 else np.clip(np.rint(part * 255), 0, 255).astype(np.uint8)
        )
    return np.concatenate(parts)

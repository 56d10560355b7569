"""From an image with truth to one training tile: colours, place, scale, angle, light, noise.

All randomness comes from the generator handed in, so that a tile depends on its seed only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from daskcell.training.segmenter_data import Sample

DIAMETER = 30.0
"""Cell diameter in pixels the network is made for (Cellpose's)."""

# Colours a stain may be shown in, as weights of red, green and blue.
_COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], np.float32)
# Density of two stains in red, green and blue, a row a stain (Ruifrok & Johnston, Anal. Quant. Cytol. Histol.
# 23, 2001): haematoxylin and eosin; Giemsa and eosin.
_STAINS = {
    "colour": np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]]),
    "smear": np.array([[0.834, 0.514, 0.196], [0.093, 0.954, 0.283]]),
}

Change = Callable[[np.ndarray], np.ndarray]
"""Of pixels ``(C, Y, X)``, each by itself."""


def tile(sample: Sample, rng: np.random.Generator, side: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """One augmented tile.

    Returns
    -------
    x : ndarray
        ``(3, side, side)`` float32, normalized as Cellpose does; zeros outside the image.
    y : ndarray
        ``(3, side, side)`` float32: flow y, flow x (unit length), foreground 0 or 1.
    """
    step = -(-min(sample.labels.shape) // 128)
    seen = sample.channels[:, ::step, ::step].astype(np.float32)
    mix = _mixture(sample, rng)
    exposure = _density(seen, sample.kind, rng) if sample.kind in _STAINS else _camera(seen, rng)
    raw, flows, inside, present = _warp(sample, rng, side)

    def shown(pixels: np.ndarray) -> np.ndarray:
        return np.tensordot(mix, exposure(pixels), axes=1)

    # Percentiles of the whole image, whatever part of it the tile shows.
    low, high = np.percentile(shown(seen), [1, 99], axis=(1, 2))
    span = np.where(high - low > 1e-6, high - low, np.inf)
    sparse = sample.kind not in _STAINS and rng.random() < 0.12
    if sparse:  # few cells: the percentiles see background only, cells are far above 1
        span = span * np.exp(rng.uniform(np.log(0.08), 0))
    x = (shown(raw) - low[:, None, None]) / span[:, None, None]
    x = _other_stains(x.astype(np.float32), mix, sample.kind, rng)
    if sparse:
        x = x + rng.uniform(0, 0.25) * _noise(rng, x.shape)
    x = _light(x, sample.kind, rng) * present
    return np.ascontiguousarray(x, np.float32), np.concatenate([flows, inside[None]]).astype(np.float32)


def _density(seen: np.ndarray, kind: str, rng: np.random.Generator) -> Change:
    """Another laboratory's staining: strengths, hues and glass change, in optical density."""
    if rng.random() < 0.25:
        return lambda pixels: pixels
    glass = np.percentile(seen, 99, axis=(1, 2)) + 1
    stains = _STAINS[kind] / np.linalg.norm(_STAINS[kind], axis=1, keepdims=True)
    rest = np.cross(*stains)
    basis = np.vstack([stains, rest / np.linalg.norm(rest)])
    other = basis + rng.normal(0, 0.07, (3, 3))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    strengths = np.exp(rng.normal(0, [0.35, 0.35, 0.2]))
    turn = (np.linalg.inv(basis) * strengths) @ other
    bright = np.minimum(255, 255 * rng.uniform(0.7, 1.0) * rng.normal(1, 0.05, 3))

    def change(pixels: np.ndarray) -> np.ndarray:
        density = -np.log10((np.maximum(pixels, 0) + 1) / glass[:, None, None])
        density = np.einsum("ij,iyx->jyx", turn, density)
        return np.clip(bright[:, None, None] * 10.0**-density, 0, 255)

    return change


def _camera(seen: np.ndarray, rng: np.random.Generator) -> Change:
    """Dim and saturated: few grey levels, or the brightest cells beyond the camera's range."""
    choice = rng.random()
    if choice > 0.4:
        return lambda pixels: pixels
    low, high = np.percentile(seen, [0.5, 99.9], axis=(1, 2))[..., None, None]
    span = np.maximum(high - low, 1e-6)
    if choice < 0.2:
        most = rng.uniform(0.35, 0.9)
        return lambda pixels: np.minimum(pixels, low + most * span)
    levels = np.exp(rng.uniform(np.log(5), np.log(60)))
    return lambda pixels: low + span * np.floor((pixels - low) / span * levels + 0.5) / levels


def _mixture(sample: Sample, rng: np.random.Generator) -> np.ndarray:
    """Weights ``(3, C)`` of the stored channels in red, green and blue."""
    count = len(sample.channels)
    if sample.kind == "grey":
        if rng.random() < 0.5:
            return np.ones((3, 1), np.float32)
        return _COLOURS[rng.integers(6)][:, None].copy()
    if sample.kind in _STAINS:
        choice = rng.random()
        if choice < 0.15:
            return np.tile(np.array([0.299, 0.587, 0.114], np.float32), (3, 1))
        mix = np.eye(3, dtype=np.float32)
        return mix[rng.permutation(3)] if choice < 0.25 else mix
    if count == 4 and rng.random() < 0.4:
        # The usual colour image: cyan adds to green and blue.
        return np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1]], np.float32) * rng.uniform(
            0.6, 1.4, (1, count)
        )
    shown = np.ones(count)
    if rng.random() < 0.4:
        # Cytoplasm always, other stains sometimes: whole cells must be visible to be whole cells.
        shown = (rng.random(count) < 0.5).astype(float)
        shown[1] = 1
    weights = shown * rng.uniform(0.5, 1.5, count)
    if rng.random() < 0.15:
        return np.tile(weights, (3, 1)).astype(np.float32)
    colours = _COLOURS[rng.permutation(6)[:count]] if count <= 6 else _COLOURS[rng.integers(0, 6, count)]
    return (colours * weights[:, None]).T.astype(np.float32)


def _warp(
    sample: Sample, rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rotate, flip, scale and cut; vectors turn with the image."""
    height, width = sample.labels.shape
    choice = rng.random()
    if choice < 0.45:
        scale = np.exp(np.clip(rng.normal(0, 0.18), -0.6, 0.5))
    else:
        low, high = (0.4, 1.7) if choice < 0.85 else (0.3, 3.0)
        scale = np.exp(rng.uniform(np.log(low), np.log(high)))
    zoom = float(scale * DIAMETER / sample.diameter)
    if rng.random() < 0.6:
        centre = sample.centres[rng.integers(len(sample.centres))] + rng.uniform(-0.3, 0.3, 2) * side / zoom
    else:
        # Far enough inside that the tile is filled where the image is large enough.
        room = np.minimum(side / 2 / zoom, 0.5 * np.array([height, width]))
        centre = rng.uniform(room * 0.8, np.array([height, width]) - room * 0.8 + 1e-6)
    angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * [1.0, mirror]

    reach = int(np.ceil(side / zoom * np.sqrt(0.5))) + 3
    y0, x0 = (max(0, int(c) - reach) for c in centre)
    y1, x1 = (min(length, int(c) + reach + 1) for c, length in zip(centre, (height, width), strict=True))
    if y1 - y0 < 2 or x1 - x0 < 2:
        y0, x0, y1, x1 = 0, 0, height, width
    cut = np.s_[:, y0:y1, x0:x1]
    labels = sample.labels[cut[1:]]
    stack = np.concatenate(
        [
            sample.channels[cut].astype(np.float32),
            sample.flows[cut].astype(np.float32),
            (labels > 0)[None].astype(np.float32),
            np.ones((1, *labels.shape), np.float32),
        ]
    )
    source = torch.from_numpy(stack)[None]
    shrink = 2 if zoom < 0.6 else 1
    if shrink > 1:
        source = F.avg_pool2d(source, shrink, ceil_mode=True)
    offsets = (np.arange(side, dtype=np.float32) + 0.5 - side / 2) / zoom
    dy, dx = np.meshgrid(offsets, offsets, indexing="ij")
    y = (turn[0, 0] * dy + turn[0, 1] * dx + centre[0] - y0) / shrink
    x = (turn[1, 0] * dy + turn[1, 1] * dx + centre[1] - x0) / shrink
    rows, columns = source.shape[-2:]
    grid = torch.from_numpy(np.stack([2 * x / columns - 1, 2 * y / rows - 1], -1).astype(np.float32))[None]
    warped = F.grid_sample(source, grid, align_corners=False, padding_mode="zeros")[0].numpy()
    present = warped[-1]
    count = len(sample.channels)
    # Divided by the share of the image under each pixel: no dark seam along the border.
    raw = warped[:count] / np.maximum(present, 1e-3)
    flows = np.einsum("ij,ihw->jhw", turn.astype(np.float32), warped[count : count + 2])
    inside = (warped[-2] > 0.5).astype(np.float32)
    return raw, flows * inside, inside, (present > 0.5).astype(np.float32)


def _other_stains(x: np.ndarray, mix: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Fill colours that carry nothing: sometimes camera noise (normalised up by the percentiles) or haze."""
    if kind in _STAINS:
        return x
    for channel in np.flatnonzero(np.abs(mix).sum(1) == 0):
        choice = rng.random()
        if choice < 0.25:
            x[channel] = 0.5 + rng.uniform(0.1, 0.22) * _noise(rng, x[channel].shape)
        elif choice < 0.45 and kind == "grey":
            source = x[int(np.argmax(np.abs(mix).sum(1)))]
            x[channel] = rng.uniform(0.2, 0.7) * ndimage.gaussian_filter(source, rng.uniform(8, 20))
            x[channel] += 0.05 * _noise(rng, source.shape)
    return x


def _light(x: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind in _STAINS and rng.random() < 0.45:
        x = x * rng.uniform(0.8, 1.2, (3, 1, 1))
    if rng.random() < (0.12 if kind == "stains" else 0.25):
        x = 1 - x
    if rng.random() < 0.7:
        # Powers of values outside 0..1 would be wild or undefined: the part outside is kept as it is.
        core = np.clip(x, 0, 1)
        x = core ** np.exp(rng.uniform(np.log(0.6), np.log(1.6))) + (x - core)
    if rng.random() < 0.2:
        sigma = np.exp(rng.uniform(np.log(0.5), np.log(3.0)))
        x = ndimage.gaussian_filter(x, (0, sigma, sigma))
    if rng.random() < 0.2:
        slope = rng.uniform(-0.4, 0.4, 2)
        ramp = np.linspace(-1, 1, x.shape[-1])
        x = x * (1 + slope[0] * ramp[:, None] + slope[1] * ramp)
    x = (x - 0.5) * rng.uniform(0.7, 1.3) + 0.5 if rng.random() < 0.5 else x
    x = x + rng.uniform(-0.15, 0.15) if rng.random() < 0.5 else x
    if rng.random() < 0.5:
        x = x + rng.uniform(0, 0.08) * _noise(rng, x.shape)
    return x


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)

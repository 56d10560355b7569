"""What will be done to one image, with every number known: the `Plan`, and `apply_block`.

`fit` makes plans; nothing here reads a whole image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.background import Background, FlatFile
from daskcell.preprocess.clahe import Clahe
from daskcell.preprocess.dtypes import working_dtype
from daskcell.preprocess.stains import Stains
from daskcell.preprocess.steps import Curve, Floor, Gaussian, Mix, Step, Stretch
from daskcell.storage.atomic import write_json

_KINDS: dict[str, Any] = {
    step.kind: step for step in (FlatFile, Background, Stains, Floor, Mix, Stretch, Curve, Clahe, Gaussian)
}
_LARGE = 20_000
"""Characters of JSON from which on a plan goes to workers by a file."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The preprocessing of one image: steps with all their numbers."""

    shape: tuple[int, int]
    """Height and width of the whole image in pixels."""
    in_channels: int
    in_dtype: np.dtype
    steps: tuple[Step, ...] = ()
    file: str = ""
    """Where the plan can be read again; see `kept_in`."""

    @property
    def halo(self) -> int:
        """Pixels to read around a block so that its core comes out as from the whole image."""
        return halo_of(self.steps)

    @property
    def out_channels(self) -> int:
        count = self.in_channels
        for step in self.steps:
            count = step.channels(count)
        return count

    @property
    def out_dtype(self) -> np.dtype:
        dtype = working_dtype(self.in_dtype)
        for step in self.steps:
            dtype = step.dtype(dtype)
        return dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the numbers were found. Of a plan that was just fitted only."""
        return tuple(note for step in self.steps if isinstance(step, Stretch) for note in step.notes)

    @cached_property
    def key(self) -> str:
        """Hash of all that decides the result (sha256)."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.key)

    def kept_in(self, folder: str | Path) -> Plan:
        """The same plan; if it is large, tasks get the name of a file in `folder` in its place.

        Curves of 16-bit images have 65536 points a channel. Every task that is given a `PreparedImage` would
        carry them. The folder is one that all workers see, and is there as long as their tasks are.
        """
        values = self.to_json()
        if len(json.dumps(values)) < _LARGE:
            return self
        file = Path(folder, f"plan-{self.key[:16]}.json")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, values)
        return replace(self, file=str(file))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file:
            return _read_plan, (self.file, self.key)
        return Plan, (self.shape, self.in_channels, self.in_dtype, self.steps)

    def at_level(self, level: int, shape: tuple[int, int]) -> Plan:
        """The plan for a level of the image's pyramid, of `shape` ``(Y, X)``; level 0 is the image."""
        if not level:
            return self
        coarse = (step.at_level(level, shape) for step in self.steps)
        return replace(self, shape=shape, steps=tuple(step for step in coarse if step is not None), file="")

    def to_json(self) -> dict[str, Any]:
        """The plan as values that `json` writes; floats and arrays come back bit for bit."""
        return {
            "shape": list(self.shape),
            "channels": self.in_channels,
            "dtype": np.dtype(self.in_dtype).name,
            "steps": [{"kind": step.kind, **step.to_json()} for step in self.steps],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any] | str) -> Plan:
        """Back from `to_json` (or its text)."""
        if isinstance(values, str):
            values = json.loads(values)
        assert isinstance(values, dict)
        steps = tuple(_KINDS[step["kind"]].from_json(step) for step in values["steps"])
        return cls(tuple(values["shape"]), values["channels"], np.dtype(values["dtype"]), steps)


@lru_cache(maxsize=4)
def _read_plan(file: str, key: str) -> Plan:
    plan = Plan.from_json(Path(file).read_text(encoding="utf-8"))
    if plan.key != key:
        raise InputError(f"{file} holds the plan of another image.")
    return replace(plan, file=file)


def apply_block(block: np.ndarray, plan: Plan, box: Box | None = None) -> np.ndarray:
    """Carry a plan out on a part of its image.

    Parameters
    ----------
    block : array ``(C, h, w)``
        Raw pixels: a core and `Plan.halo` pixels around it, cut at the image's border. The caller trims.
    box : Box, optional
        Where the block lies in the whole image. May be left out for the whole image, and for plans in which
        no step is `placed`.

    Returns
    -------
    array ``(Plan.out_channels, h, w)`` of `Plan.out_dtype`
    """
    if block.ndim != 3 or block.shape[0] != plan.in_channels:
        raise InputError(
            f"The plan is for {plan.in_channels} channel(s), but the block has shape {block.shape}."
        )
    if box is None:
        placed = [step.kind for step in plan.steps if step.placed]
        if placed and block.shape[1:] != plan.shape:
            raise InputError(f"What {placed[0]!r} does depends on where a block lies: give its box.")
        box = Box(0, 0, *block.shape[1:])
    elif box.shape != block.shape[1:]:
        raise InputError(f"A block of {block.shape[1:]} pixels cannot lie at a box of {box.shape} pixels.")
    return apply_steps(block, plan.steps, box)


def halo_of(steps: Sequence[Step]) -> int:
    """Pixels that steps together need around a block."""
    return sum(step.halo for step in steps)


def apply_steps(block: np.ndarray, steps: Sequence[Step], box: Box) -> np.ndarray:
    """The steps one after another, from raw pixels."""
    block = block.astype(working_dtype(block.dtype), copy=False)
    for step in steps:
        block = step.apply(block, box)
    return block

"""Warnings point at the line of the user's program that they are about."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

import daskcell as dc
from daskcell.errors import InputWarning
from daskcell.images import find_images
from daskcell.preprocess import estimate_flat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose channels come last, and masks beside them."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 250, (40, 50, 3), np.uint8)
    for name in ("a", "b", "c"):
        np.save(folder / f"{name}.npy", pixels)
    tifffile.imwrite(folder / "a_cp_masks.tif", np.zeros((40, 50), np.uint16))
    return folder


CALLS: dict[str, Callable[[Path, Path], object]] = {
    "open_image": lambda folder, out: dc.open_image(folder / "a.npy"),
    "convert": lambda folder, out: dc.convert(folder / "a.npy", out / "a.zarr"),
    "find_images": lambda folder, out: find_images(folder),
    "gaussian": lambda folder, out: dc.gaussian(np.load(folder / "a.npy"), sigma=1),
    "segment": lambda folder, out: dc.segment(np.load(folder / "a.npy"), method="watershed"),
    "estimate_flat": lambda folder, out: estimate_flat(np.load(folder / f"{n}.npy") for n in "abc"),
}


@pytest.mark.parametrize("verb", CALLS)
def test_a_warning_names_the_callers_line(folder: Path, tmp_path: Path, verb: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[verb](folder, tmp_path)
    found = {(Path(one.filename).name, one.lineno) for one in caught if one.category is InputWarning}
    code = CALLS[verb].__code__
    lines, first = inspect.getsourcelines(code)
    assert found
    assert all(name == Path(__file__).name for name, _ in found)
    assert all(first <= line < first + len(lines) for _, line in found)

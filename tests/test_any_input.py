"""Every public function with every kind of input that users have: a result, or one sentence."""

from __future__ import annotations

import inspect
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import daskcell as dc

BASE = (np.arange(40 * 40, dtype=np.float32).reshape(40, 40) * 7) % 50
LABELS = np.zeros((40, 40), np.uint32)
LABELS[4:12, 4:12], LABELS[20:30, 20:30] = 1, 2


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


KINDS = {
    "unknown chunks": lambda: da.from_array(BASE)[da.from_array(BASE[:, 0]) > 3],
    "an empty chunk": lambda: da.concatenate([da.from_array(BASE), da.zeros((0, 40), dtype=np.float32)]),
    "sparse": lambda: scipy.sparse.csr_matrix(BASE),
    "unequal lists": lambda: [[1, 2, 3], [4, 5]],
    "lists": BASE.tolist,
    "None": lambda: None,
    "text": lambda: "no such thing",
    "a path": lambda: Path("/nowhere/image.tif"),
    "empty": lambda: np.zeros((0, 40), np.float32),
    "0-d": lambda: np.float32(3),
    "1-d": lambda: BASE[0],
    "4-d": lambda: np.zeros((2, 3, 4, 5), np.uint8),
    "all NaN": lambda: np.full((40, 40), np.nan, np.float32),
    "inf": lambda: np.where(BASE > 48, np.inf, BASE),
    "bool": lambda: BASE > 20,
    "complex": lambda: BASE + 1j,
    "object": lambda: BASE.astype(object),
    "dates": lambda: BASE.astype("datetime64[s]"),
    "huge": lambda: np.full((40, 40), 2**62, np.int64) + BASE.astype(np.int64),
    "negative": lambda: BASE.astype(np.int32) - 20,
    "read-only": lambda: read_only(BASE),
    "strided": lambda: np.repeat(BASE, 2, 1)[:, ::2],
    "backwards": lambda: BASE[::-1, ::-1],
    "big-endian": lambda: BASE.astype(">f4"),
    "labels": lambda: LABELS,
    "far labels": lambda: np.where(LABELS == 2, 2_200_000_000, LABELS * 5).astype(np.uint32),
    "a table": lambda: pd.DataFrame(BASE),
    "a tensor": lambda: pytest.importorskip("torch").from_numpy(BASE.copy()),
}

CALLS = {
    "adjust_histogram": lambda x, path: dc.adjust_histogram(x),
    "adjust_stains": lambda x, path: dc.adjust_stains(x),
    "assign": lambda x, path: dc.assign(x, path / "out", model=path / "model"),
    "convert": lambda x, path: dc.convert(x, path / "a.zarr"),
    "correct_background": lambda x, path: dc.correct_background(x),
    "embed image": lambda x, path: dc.embed(x, LABELS),
    "embed labels": lambda x, path: dc.embed(BASE, x),
    "estimate_flat": lambda x, path: dc.estimate_flat(x),
    "expand": lambda x, path: dc.expand(x, 2),
    "export_crops": lambda x, path: dc.export_crops(x, path / "crops"),
    "fit_clusters": lambda x, path: dc.fit_clusters(x, k=2),
    "gaussian": lambda x, path: dc.gaussian(x, 1.0),
    "load_clusters": lambda x, path: dc.load_clusters(x),
    "load_config": lambda x, path: dc.load_config(x),
    "load_encoder": lambda x, path: dc.load_encoder(x),
    "load_network": lambda x, path: dc.load_network(x),
    "measure image": lambda x, path: dc.measure(LABELS, x),
    "measure labels": lambda x, path: dc.measure(x, BASE),
    "neighbours labels": lambda x, path: dc.neighbours(x, [0, 1], radius=9),
    "neighbours types": lambda x, path: dc.neighbours(LABELS, x, radius=9),
    "open_image": lambda x, path: dc.open_image(x),
    "open_study": lambda x, path: dc.open_study(x),
    "pair cells": lambda x, path: dc.pair(LABELS, x),
    "pair nuclei": lambda x, path: dc.pair(x, LABELS),
    "prepare": lambda x, path: dc.prepare(x),
    "overlay image": lambda x, path: dc.overlay(x, LABELS, np.array([0, 1])),
    "overlay labels": lambda x, path: dc.overlay(BASE, x, np.array([0, 1])),
    "overlay clusters": lambda x, path: dc.overlay(BASE, LABELS, x),
    "reconstruct": lambda x, path: dc.reconstruct(x, colors=("red",) * 40),
    "run": lambda x, path: dc.run(x, path / "out", {"compute": {"kind": "inline"}}),
    "segment": lambda x, path: dc.segment(x, method="watershed"),
}  # fmt: skip
PATHS = {
    "assign",
    "convert",
    "export_crops",
    "load_clusters",
    "load_config",
    "load_encoder",
    "load_network",
    "open_image",
    "open_study",
    "run",
}
"""Functions of paths, for which an array is a TypeError (or what Dask says of looking through it)."""
NO_FUNCTIONS = {"ClusterModel", "Config", "DaskcellError", "Image", "__version__"}


def test_every_public_function_is_in_the_table():
    assert {name.split()[0] for name in CALLS} == {
        name for name in dc.__all__ if name not in NO_FUNCTIONS and callable(getattr(dc, name))
        and not inspect.isclass(getattr(dc, name))
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_any_input_gives_a_result_or_one_sentence(name, tmp_path):
    wrong = []
    for kind, make in KINDS.items():
        try:
            found = CALLS[name](make(), tmp_path)
            for part in found if isinstance(found, tuple) else (found,):
                if hasattr(part, "compute"):
                    part.compute(scheduler="synchronous")
        except (dc.DaskcellError, TypeError, ValueError) as error:
            own = isinstance(error, dc.DaskcellError) or (
                name in PATHS and type(error) in (TypeError, ValueError)
            )
            if not str(error) or "should not happen" in str(error) or not own:
                wrong.append(f"{kind}: {error!r}")
        except Exception as error:
            wrong.append(f"{kind}: {error!r}")
    assert not wrong, "\n".join(wrong)


def test_labels_far_beyond_their_number_say_how_to_number_them_anew():
    """They made a table of 2 200 000 000 rows; of small gaps there are rows without pixels."""
    far = KINDS["far labels"]()
    for call in (
        lambda: dc.measure(far),
        lambda: dc.embed(BASE, far),
        lambda: dc.overlay(BASE, far, np.array([0, 1])),
    ):
        with pytest.raises(dc.DaskcellError, match="relabel_sequential"):
            call()
    gaps = dc.measure(LABELS * 7)
    assert list(gaps["label"]) == list(range(1, 15))
    assert list(gaps.loc[gaps["area"] > 0, "label"]) == [7, 14]

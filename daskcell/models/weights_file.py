"""Weights as plain arrays in an ``.npz`` file: no pickle, fingerprinted, kernels in half precision."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from daskcell.errors import WeightsError
from daskcell.storage.atomic import save_npz

_KIND = "__kind__"
_NOTE = "__note__"


def save_weights(path: str | Path, weights: dict, kind: str, note: str = "") -> Path:
    """Write tensors or arrays with the `kind` of network they are for; the file appears whole or not at all.

    Matrices and kernels are stored as float16, vectors (biases, batch statistics) as they are.
    """
    arrays = {_KIND: np.array(kind), _NOTE: np.array(note)}
    for name, value in weights.items():
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
        arrays[name] = array.astype(np.float16) if array.ndim > 1 and array.dtype == np.float32 else array
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_npz(path, **arrays)
    return path


def load_weights(path: str | Path, kind: str | None = None) -> tuple[dict[str, np.ndarray], str, str]:
    """Arrays of a file, its kind and its note.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, not one of daskcell's, or of another kind than asked for.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise WeightsError(f"The weights {path} do not exist. Please check the path.") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is not a readable file of weights ({error}).") from error
    if _KIND not in arrays:
        raise WeightsError(
            f"{path} does not say which network its weights are for. Please use a file daskcell wrote."
        )
    found, note = str(arrays.pop(_KIND)), str(arrays.pop(_NOTE, ""))
    if kind is not None and found != kind:
        raise WeightsError(f"{path} holds weights of '{found}', not of '{kind}'. Please give another file.")
    return arrays, found, note


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over names, types, shapes and values; the same for the same weights in any file."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

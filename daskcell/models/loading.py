"""Networks by name: built once per process, checked, fingerprinted.

The cache is keyed by the weights' hash and the device, so a file that changed is loaded anew and two names of
one file share a network.
"""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.errors import ComputeError, WeightsError
from daskcell.models import weights_file
from daskcell.models.registry import find_network

if TYPE_CHECKING:
    import torch

    from daskcell.models.unet import TinyUNet

_LIMIT = 4
"""Networks kept per process; Cellpose-SAM alone takes 0.6 to 1.2 GB."""
_cache: OrderedDict[tuple, Any] = OrderedDict()
_lock = threading.RLock()


def load_network(
    name_or_path: str | Path = "tiny", device: str = "cpu", dtype: Any = None
) -> torch.nn.Module:
    """A segmentation network that `cellpose.core.run_net` accepts.

    Parameters
    ----------
    name_or_path : str or path
        ``tiny`` (embedded), ``cpsam_v2`` or ``cpsam`` (fetched before), or a file: weights of
        `train_segmenter` (``.npz``) or a Cellpose-SAM checkpoint.
    device : str
        ``cpu``, ``cuda`` or ``cuda:<n>``.
    dtype : torch.dtype, optional
        torch number type of the weights; None: float32, and bfloat16 for Cellpose-SAM as cellpose runs it.

    Returns
    -------
    torch.nn.Module
        In evaluation mode, with ``device`` and ``dtype``; ``forward`` takes ``(N, 3, H, W)`` and returns
        ``(N, 3, H, W)`` (flow y, flow x, cell probability) and a style ``(N, 256)``. Shared within the
        process: do not train it.

    Raises
    ------
    WeightsError
        If the weights are missing, damaged, or another network's.
    ComputeError
        If the device is not there.

    References
    ----------
    Stringer, Wang, Michaelos, Pachitariu, "Cellpose", Nature Methods 18, 2021.

    Examples
    --------
    >>> import torch
    >>> flows, style = load_network("tiny")(torch.zeros(1, 3, 64, 64))
    >>> flows.shape, style.shape
    (torch.Size([1, 3, 64, 64]), torch.Size([1, 256]))
    """
    path = find_network(name_or_path)
    check_device(device)
    key = ("network", file_fingerprint(path), str(device), str(dtype))
    return cached(key, lambda: _build_network(path, device, dtype))


def network_fingerprint(name_or_path: str | Path = "tiny") -> str:
    """sha256 of a segmentation network's weights: of their values for ``.npz``, else of the file."""
    return file_fingerprint(find_network(name_or_path))


def clear_networks() -> None:
    """Forget all networks kept by this process."""
    with _lock:
        _cache.clear()


def cached(key: tuple, build: Callable[[], Any]) -> Any:
    with _lock:
        if key not in _cache:
            _cache[key] = build()
            while len(_cache) > _LIMIT:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]


def file_fingerprint(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        raise WeightsError(f"Cannot read the weights {path}: {error.strerror}.") from None
    return _hashed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _hashed(path: Path, _changed: int, _size: int) -> str:
    if zipfile.is_zipfile(path) and path.suffix == ".npz":
        return weights_file.fingerprint(weights_file.load_weights(path)[0])
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ComputeError(
            f"There is no device '{device}'. Please give 'cpu', 'cuda' or 'cuda:<number>'."
        ) from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ComputeError(
            "A CUDA device was asked for, but torch finds none. Please use 'cpu', or check the driver."
        )


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself. Others emulate it, some ten times slower than float32."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _build_network(path: Path, device: str, dtype: Any) -> torch.nn.Module:
    import torch

    if path.suffix == ".npz":
        from daskcell.models.unet import fold_batch_norms

        net = fold_batch_norms(read_unet(path))
        return net.to(device=device, dtype=dtype or torch.float32).requires_grad_(False)
    from daskcell.models.cpsam import load_cpsam, looks_like_cpsam, read_checkpoint

    names = read_checkpoint(path).keys()
    if not looks_like_cpsam(names) and not any("encoder.cls_token" in name for name in names):
        raise WeightsError(
            f"{path} is neither a Cellpose-SAM checkpoint nor weights of daskcell's own (.npz); "
            f"its first tensor is '{next(iter(names))}'."
        )
    return load_cpsam(path, device, dtype)


def read_unet(path: Path) -> TinyUNet:
    """The network of a file of weights as it was trained, to use or to train on.

    Raises
    ------
    WeightsError
        If the weights are damaged or another network's.
    """
    from daskcell.models.unet import KIND, TinyUNet

    weights, _, _ = weights_file.load_weights(path, KIND)
    net = TinyUNet(*_unet_sizes(weights, path))
    fill(net, weights, path)
    return net


def _unet_sizes(weights: dict, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths and blocks of a `TinyUNet`, read off its tensors' names and shapes."""
    try:
        levels = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("down."))
        widths = [len(weights["stem.0.weight"])]
        widths += [len(weights[f"down.{i}.0.first.0.weight"]) for i in range(levels)]
        blocks = [
            1 + max(int(k.split(".")[2]) for k in weights if k.startswith(f"down.{i}."))
            for i in range(levels)
        ]
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"{path} does not hold a whole segmentation network.") from error
    return tuple(widths), tuple(blocks)


def fill(net: torch.nn.Module, weights: dict, path: Path) -> None:
    """Load arrays strictly; half-precision ones become float32."""
    import torch

    state = {
        k: torch.from_numpy(v.astype("float32") if v.dtype.kind == "f" else v) for k, v in weights.items()
    }
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{path} does not fit the network it claims to be for ({reason}).") from error
    if not all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point()):
        raise WeightsError(f"{path} holds weights that are not finite. Please train or fetch it anew.")

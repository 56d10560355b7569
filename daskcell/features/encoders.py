"""Networks that turn an image of a cell into a vector.

Loading is the business of `daskcell.models`; here is how a loaded network is fed.

A network's answer changes in the last bits with the number of crops in a batch. So a batch always has the
same number, the last filled up with zeros; then a cell's vector does not depend on the cells beside it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from daskcell.errors import InputError
from daskcell.models.encoder_loading import check_layer, encoder_fingerprint, load_encoder
from daskcell.models.registry import encoder_kind

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EncoderSpec:
    """What to load; small and picklable, so that a task can carry it."""

    name: str
    layer: Literal["output", "pool"] = "output"
    size: int | None = None
    batch_size: int = 32
    device: str = "cpu"
    precision: Precision = "float32"
    fingerprint: str = ""
    """Hash of the weights; keeps a process from using a model of other weights it loaded before."""


@dataclass
class Encoder:
    """A loaded network with what it wants of its input.

    Attributes
    ----------
    name : str
    size : int
        Side of the crops in pixels.
    batch_size : int
        Crops per call, always.
    mean, std : tuple of float or None
        Normalisation of the three inputs.
    fingerprint : str
        Hash of the weights.
    device : str
        Where the network is; anywhere but on ``cpu``, `function` gets tensors that are there already.
    """

    name: str
    function: Callable[[Any], np.ndarray]
    size: int
    batch_size: int = 32
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fingerprint: str = ""
    device: str = "cpu"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        """Vectors ``(n, d)`` float32 of crops ``(n, 3, size, size)`` with values from 0 to 1."""
        parts = list(self.stream(crops))
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)

    def stream(self, crops: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Vectors of crops ``(3, size, size)``, a batch at a time; the last one is filled up.

        On a GPU crops may be of any side: they are resized there. While the network works on a batch, a
        thread takes the next crops from the iterator.
        """
        batches = Batches(self)
        yield from batches.add(crops)
        yield from batches.finish()

    @property
    def width(self) -> int:
        """Numbers per cell, found by a call with blank crops the first time."""
        if not hasattr(self, "_width"):
            self._width: int = self._batch([np.zeros((3, self.size, self.size), np.float32)]).shape[1]
        return self._width

    def _batch(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        n = len(crops)
        full: Any
        if self.device == "cpu":
            full = np.zeros((self.batch_size, *crops[0].shape), np.float32)
            np.stack(crops, out=full[:n])
            if self.mean is not None and self.std is not None:
                mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
                full[:n] -= mean
                full[:n] /= std
        else:
            full = self._on_device(crops)
        with self._lock:  # threads of one process share the model, and the cores
            out = np.asarray(self.function(full))
        if out.ndim != 2 or len(out) != self.batch_size:
            raise InputError(
                f"The encoder {self.name} must give one vector per crop, (n, d), but gave {out.shape} for "
                f"{self.batch_size} crops."
            )
        if out.dtype.kind not in "fiu":
            raise InputError(f"The encoder {self.name} must give real numbers, but gave {out.dtype}.")
        self._width = out.shape[1]
        return out[:n].astype(np.float32)

    def _on_device(self, crops: Sequence[np.ndarray]) -> torch.Tensor:
        import torch

        from daskcell.features.crops import resize_together

        full = torch.zeros((self.batch_size, 3, self.size, self.size), device=self.device)
        full[: len(crops)] = resize_together(crops, self.size, self.device)
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (self.mean, self.std))
            full = (full - mean) / std
        return full


class Batches:
    """Fills an encoder's batches with crops that come in portions."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self._rest: list[np.ndarray] = []

    def add(self, crops: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Vectors of the batches that these crops complete; a thread takes the next crops meanwhile."""
        rest, self._rest = self._rest, []
        for batch in ahead(_batched(chain(rest, crops), self.encoder.batch_size)):
            if len(batch) < self.encoder.batch_size:
                self._rest = batch
            else:
                yield self.encoder._batch(batch)

    def finish(self) -> Iterator[np.ndarray]:
        """Vectors of the crops that are left, in a batch filled up with zeros."""
        if self._rest:
            yield self.encoder._batch(self._rest)
            self._rest = []


def _batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, count)):
        yield batch


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one made by a thread while the last is in use."""
    end: Any = object()
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, source, end)
        while (item := waiting.result()) is not end:
            waiting = thread.submit(next, source, end)
            yield item


def encoder_spec(
    name: str | Path,
    *,
    layer: Literal["output", "pool"] = "output",
    size: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    precision: Precision = "float32",
    pooling: Literal["crop", "mask"] = "crop",
) -> EncoderSpec:
    """Check that an encoder can be had, without building it: before any work.

    Raises
    ------
    WeightsError
        No encoder has this name, or its weights are not on this machine; says how to fetch them.
    """
    name = os.fspath(name)
    fingerprint = encoder_fingerprint(name)
    check_layer(name, layer)
    if pooling == "mask":
        if not has_feature_maps(name):
            raise InputError(
                f"pooling='mask' needs a network with accessible feature maps, and the encoder {name} has "
                "none. Please choose 'tiny' or a ResNet of torchvision, or pooling='crop'."
            )
        if layer == "pool" or size is not None:
            raise InputError("layer and size are for pooling='crop'; with pooling='mask', leave them out.")
    return EncoderSpec(name, layer, size, batch_size, device, precision, fingerprint)


def has_feature_maps(name: str) -> bool:
    """Whether the feature maps of an encoder are accessible: the embedded kind's and torchvision ResNets'."""
    bare = name.partition("@")[0]
    kind = encoder_kind(name)
    return kind == "own" or (kind == "torchvision" and bare.startswith(("resnet", "resnext", "wide_resnet")))


def load(spec: EncoderSpec) -> Encoder:
    """The encoder of a spec; built once per process."""
    with _loading:
        return _load(spec)


_loading = threading.Lock()


@lru_cache(maxsize=2)
def _load(spec: EncoderSpec) -> Encoder:
    encoder = as_encoder(
        load_encoder(spec.name, spec.device, layer=spec.layer),
        size=spec.size,
        batch_size=spec.batch_size,
        device=spec.device,
        precision=spec.precision,
    )
    encoder.name, encoder.fingerprint = spec.name, spec.fingerprint
    return encoder


def as_encoder(
    encoder: Any,
    *,
    size: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    precision: Precision = "float32",
) -> Encoder:
    """`Encoder` of a torch module or a function of crops from 0 to 1.

    The module or function may have the attributes ``size`` (else 224), ``mean`` and ``std``.
    """
    if isinstance(encoder, Encoder):
        return encoder
    if not callable(encoder):
        raise InputError(f"encoder must be a name, a file or a callable, not {encoder!r}.")
    import torch

    function = encoder
    if isinstance(encoder, torch.nn.Module):
        function = _module_function(encoder, device, precision)
    elif precision != "float32":
        raise InputError("precision is for networks; a function computes as it likes.")
    name = getattr(encoder, "__name__", type(encoder).__name__)
    return Encoder(
        name=name,
        function=function,
        size=size or getattr(encoder, "size", None) or 224,
        batch_size=batch_size,
        mean=getattr(encoder, "mean", None),
        std=getattr(encoder, "std", None),
        device=device if isinstance(encoder, torch.nn.Module) else "cpu",
    )


def autocast(device: str, precision: Precision) -> torch.autocast:
    """Context in which a network computes as asked: in bfloat16 where it may, or as it is."""
    import torch

    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def _module_function(
    module: torch.nn.Module, device: str, precision: Precision = "float32"
) -> Callable[[Any], np.ndarray]:
    import torch

    module = module.to(device).eval()

    def function(crops: np.ndarray | torch.Tensor) -> np.ndarray:
        with torch.inference_mode(), autocast(device, precision):
            out = module(torch.as_tensor(crops).to(device))
        if not isinstance(out, torch.Tensor):
            raise InputError(f"The network must give one tensor, but gave a {type(out).__name__}.")
        return out.float().cpu().numpy()

    return function

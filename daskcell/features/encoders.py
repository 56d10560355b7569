"""Networks that turn an image of a cell into a vector.

An encoder is named ``tiny`` (embedded), by a torchvision classification model (``resnet152``), by one of timm
(``timm:NAME``), or by a file: TorchScript, or ``torch.export`` (``.pt2``). In Python it may also be a torch
module or any callable from ``(n, 3, size, size)`` float32 to ``(n, d)``.

A network's answer changes in the last bits with the number of crops in a batch. So a batch always has the
same number, the last filled up with zeros; then a cell's vector does not depend on the cells beside it.

A file cannot bring along code that is run (see `archives`). Such a network still computes whatever it was
made to.
"""

from __future__ import annotations

import inspect
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

from daskcell.errors import ComputeError, InputError, WeightsError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    from daskcell.models import encoder_fingerprint

    name = os.fspath(name)
    fingerprint = encoder_fingerprint(name)
    if layer == "pool" and kind_of(name) not in {"torchvision", "timm"}:
        raise InputError(
            f"layer='pool' is for torchvision's and timm's networks; the encoder {name} has one output only."
        )
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
    kind = kind_of(name)
    return kind == "own" or (kind == "torchvision" and bare.startswith(("resnet", "resnext", "wide_resnet")))


def load(spec: EncoderSpec) -> Encoder:
    """The encoder of a spec; built once per process."""
    with _loading:
        return _load(spec)


_loading = threading.Lock()


@lru_cache(maxsize=2)
def _load(spec: EncoderSpec) -> Encoder:
    module, size, mean, std = build(spec)
    return Encoder(
        name=spec.name,
        function=_module_function(module, spec.device, spec.precision),
        size=spec.size or size,
        batch_size=spec.batch_size,
        mean=mean,
        std=std,
        fingerprint=spec.fingerprint,
        device=spec.device,
    )


def build(spec: EncoderSpec) -> tuple[Any, int, tuple[float, ...] | None, tuple[float, ...] | None]:
    """The torch module of a spec, the side of its crops, and the mean and deviation of its inputs."""
    import torch

    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise ComputeError(f"The device {spec.device} was asked for, but torch finds no CUDA GPU here.")
    kind = kind_of(spec.name)
    if kind == "own":
        from daskcell.models import load_encoder

        own: Any = load_encoder(spec.name, spec.device)
        return own, own.size, own.mean, own.std
    if kind == "archive":
        from daskcell.features.safe_load import open_archive

        return open_archive(spec.name), 224, IMAGENET_MEAN, IMAGENET_STD
    return _timm(spec) if kind == "timm" else _torchvision(spec)


def as_encoder(
    encoder: Any,
    *,
    layer: Literal["output", "pool"] = "output",
    size: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    precision: Precision = "float32",
) -> Encoder:
    """Encoder from a name, a file, a torch module or a callable (given raw crops from 0 to 1, 224 pixels)."""
    if isinstance(encoder, Encoder):
        return encoder
    if isinstance(encoder, str | Path):
        return load(
            encoder_spec(
                encoder, layer=layer, size=size, batch_size=batch_size, device=device, precision=precision
            )
        )
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

    module = module.to(device)
    if not isinstance(module, torch.fx.GraphModule):  # an exported graph has one mode only
        module.eval()

    def function(crops: np.ndarray | torch.Tensor) -> np.ndarray:
        with torch.inference_mode(), autocast(device, precision):
            out = module(torch.as_tensor(crops).to(device))
        if not isinstance(out, torch.Tensor):
            raise InputError(f"The network must give one tensor, but gave a {type(out).__name__}.")
        return out.float().cpu().numpy()

    return function


def kind_of(name: str) -> Literal["own", "archive", "torchvision", "timm"]:
    """Where an encoder of this name comes from."""
    if name.startswith("timm:"):
        return "timm"
    suffix = Path(name).suffix.lower()
    if name == "tiny" or suffix == ".npz":
        return "own"
    return "archive" if suffix or Path(name).is_file() else "torchvision"


def _torchvision(
    spec: EncoderSpec,
) -> tuple[torch.nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    import torch
    import torchvision

    from daskcell.models import find_encoder
    from daskcell.models.registry import torchvision_release

    path = find_encoder(spec.name)
    name, release, _ = torchvision_release(spec.name)
    recipe = torchvision.models.get_model_weights(name)[release].transforms()
    builder = torchvision.models.get_model_builder(name)
    options = {}
    if "init_weights" in inspect.signature(builder).parameters or name in {"googlenet", "inception_v3"}:
        options = {"init_weights": False, "aux_logits": True}  # random numbers nobody needs take a minute
    model = builder(weights=None, **options)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=True)
    except Exception as error:
        raise WeightsError(
            f"{path} does not hold the weights of {spec.name} ({str(error).splitlines()[0]}). "
            f"Remove it and run 'daskcell weights fetch {spec.name}'."
        ) from error
    if spec.layer == "pool":
        last = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)][-1:]
        if not last or last[0].split(".")[0] not in {"fc", "classifier", "heads", "head"}:
            raise InputError(f"layer='pool' cannot be had from {spec.name}: it has no last linear layer.")
        model.set_submodule(last[0], torch.nn.Identity())
    return model, int(recipe.crop_size[0]), tuple(recipe.mean), tuple(recipe.std)


def _timm(spec: EncoderSpec) -> tuple[torch.nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    import torch

    from daskcell.models import find_encoder

    path = find_encoder(spec.name)
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise WeightsError(
            f"{spec.name} needs timm, which is not installed. Please run: pip install 'daskcell[timm]'"
        ) from None
    try:
        model: Any = timm.create_model(spec.name.removeprefix("timm:"), pretrained=False)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=True)
    except Exception as error:
        raise WeightsError(
            f"{path} does not hold the weights of {spec.name} ({str(error).splitlines()[0]}). "
            "Please check the name and the file."
        ) from error
    if spec.layer == "pool":
        model.reset_classifier(0)
    recipe = resolve_model_data_config(model)
    return model, int(recipe["input_size"][1]), tuple(recipe["mean"]), tuple(recipe["std"])

"""Networks as sources of feature maps: the output of every stage for an image, before any pooling.

Works with torchvision's ResNets (and ResNeXt, Wide ResNet: stem and four stages) and with networks that have
a method ``stages(x)``, such as the embedded encoder. A plain function of crops has no accessible feature
maps and is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError

if TYPE_CHECKING:
    import torch

    from daskcell.features.encoders import EncoderSpec, Precision

WIDTH = 64
"""Numbers kept of each stage's channels, see `_fold`."""
_LAYERS = ("layer1", "layer2", "layer3", "layer4")


@dataclass
class FeatureMaps:
    """A network that gives the feature maps of its stages.

    Attributes
    ----------
    name : str
    function : callable
        Images ``(n, 3, h, w)`` float32 from 0 to 1 and the background's colour ``(3,)`` to one array
        ``(n, h / stride, w / stride, channels)`` float32 a stage; h and w are multiples of 32.
    cell : float
        Diameter in network pixels at which cells are shown, unless a scale is given.
    batch_size : int
        Images per call, always: bits depend on it.
    """

    name: str
    function: Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
    cell: float
    batch_size: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(self, images: Sequence[np.ndarray], background: np.ndarray) -> list[list[np.ndarray]]:
        """Maps ``(H, W, channels)`` of every stage for up to `batch_size` images ``(3, h, w)``."""
        full = np.zeros((self.batch_size, *images[0].shape), np.float32)
        full[: len(images)] = images
        with self._lock:  # threads of one process share the network, and the cores
            maps = self.function(full, background)
        return [[stage[i] for stage in maps] for i in range(len(images))]

    @property
    def width(self) -> int:
        """Channels of all stages together, found by a call with a blank image the first time."""
        if not hasattr(self, "_width"):
            maps = self([np.zeros((3, 64, 64), np.float32)], np.zeros(3, np.float32))[0]
            self._width: int = sum(stage.shape[2] for stage in maps)
        return self._width


def load_feature_maps(spec: EncoderSpec) -> FeatureMaps:
    """The network of a spec; built once per process."""
    with _loading:
        return _load(spec)


_loading = threading.Lock()


@lru_cache(maxsize=2)
def _load(spec: EncoderSpec) -> FeatureMaps:
    from daskcell.models import load_encoder

    module = load_encoder(spec.name, spec.device)
    return _wrap(module, spec.name, module.mean, module.std, spec.device, spec.batch_size, spec.precision)


def as_feature_maps(
    encoder: Any, *, batch_size: int = 32, device: str = "cpu", precision: Precision = "float32"
) -> FeatureMaps:
    """`FeatureMaps` of a torch module; raises `InputError` where its feature maps are not accessible."""
    name = getattr(encoder, "__name__", type(encoder).__name__)
    is_resnet = all(hasattr(encoder, layer) for layer in ("conv1", *_LAYERS))
    if not (hasattr(encoder, "stages") or is_resnet):
        raise InputError(
            f"pooling='mask' needs a network with accessible feature maps, and {name} has none. "
            "Please give 'tiny', a ResNet of torchvision or a torch module with a method stages(x); or use "
            "pooling='crop'."
        )
    mean, std = getattr(encoder, "mean", None), getattr(encoder, "std", None)
    return _wrap(encoder, name, mean, std, device, batch_size, precision)


def _wrap(
    module: Any, name: str, mean: Any, std: Any, device: str, batch_size: int, precision: Precision
) -> FeatureMaps:
    import torch

    from daskcell.features.encoders import autocast

    module = module.to(device).eval()
    own = hasattr(module, "stages")
    # A tile is as large as five crops: on a CPU one a call fills the cores, and the cache.
    batch = 1 if device == "cpu" else max(1, batch_size // 4)

    def function(images: np.ndarray, background: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device)
            if own:
                x = _signal(module, x, background)
            if mean is not None and std is not None:
                middle, spread = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
                x = (x - middle) / spread
            with autocast(device, precision):
                maps = module.stages(x) if own else _resnet_maps(module, x)
            return [_fold(stage.float()).permute(0, 2, 3, 1).contiguous().cpu().numpy() for stage in maps]

    return FeatureMaps(name, function, cell=48.0 if own else 32.0, batch_size=batch)


def _signal(module: Any, x: torch.Tensor, background: np.ndarray) -> torch.Tensor:
    """What the embedded encoder sees: signal above the background; other networks see the image."""
    import torch

    from daskcell.models.crop_signal import signal_above
    from daskcell.models.encoder import TinyEncoder

    if not isinstance(module, TinyEncoder):
        return x
    ground = torch.from_numpy(np.asarray(background, np.float32)).to(x.device)
    return signal_above(x, ground[None, :, None, None])


def _resnet_maps(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = module.relu(module.bn1(module.conv1(x)))
    maps = [x]
    x = module.maxpool(x)
    for layer in _LAYERS:
        x = getattr(module, layer)(x)
        maps.append(x)
    return maps


def _fold(maps: torch.Tensor) -> torch.Tensor:
    """At most `WIDTH` numbers a pixel: sums of disjoint sets of channels with fixed random signs.

    It roughly keeps the distances between cells (a count sketch: Charikar, Chen, Farach-Colton, ICALP
    2002), gives all stages about the same weight, and keeps wide networks from producing tens of thousands of
    numbers a cell: 23 424 for resnet152, of which 1 920 are left.
    """
    import torch

    channels = maps.shape[1]
    if channels <= WIDTH:
        return maps
    return torch.nn.functional.conv2d(maps, torch.from_numpy(_signs(channels)).to(maps.device))


@lru_cache
def _signs(channels: int) -> np.ndarray:
    random = np.random.RandomState(channels)
    matrix = np.zeros((WIDTH, channels, 1, 1), np.float32)
    signs = random.choice([-1.0, 1.0], channels)
    matrix[np.arange(channels) % WIDTH, np.arange(channels), 0, 0] = signs
    return matrix

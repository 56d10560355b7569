"""Real Cellpose-SAM weights into cellpose's own network, or a clear refusal.

cellpose loads a checkpoint with ``strict=False`` and looks for one key only, so a file of another network
loads silently and finds nothing. Here every name and shape must agree, and nothing is unpickled but tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.errors import WeightsError

if TYPE_CHECKING:
    import torch

# Records of the training set, not weights; files of some cellpose versions lack them.
_OPTIONAL = {"diam_labels", "diam_mean"}


def looks_like_cpsam(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of a Cellpose 4 network with a SAM backbone."""
    bare = {name.removeprefix("module.") for name in names}
    return "W2" in bare and "encoder.patch_embed.proj.weight" in bare and "encoder.cls_token" not in bare


def read_checkpoint(path: str | Path) -> dict:
    """Tensors of a PyTorch checkpoint, memory-mapped where the file allows it.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, or holds anything but a dictionary of tensors.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"The weights {path} do not exist. Please check the path.")
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files in the format of before torch 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path} is not a readable file of weights ({first[:120]}).") from error
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(v, torch.Tensor) for v in state.values())
    ):
        raise WeightsError(f"{path} does not hold the weights of a network. Please give a file of tensors.")
    return state


def load_cpsam(path: str | Path, device: str = "cpu", dtype: Any = None) -> torch.nn.Module:
    """Cellpose-SAM with a file's weights, on `device`, in `dtype` (None: bfloat16, as cellpose runs it).

    Raises
    ------
    WeightsError
        If any tensor is missing, unknown or of another shape.
    """
    import torch

    state = {name.removeprefix("module."): value for name, value in read_checkpoint(path).items()}
    if "encoder.cls_token" in state:
        raise WeightsError(
            f"{path} holds a Cellpose network with a DINO backbone, which daskcell lacks. Use cpsam_v2."
        )
    net = _build()
    _compare(path, {k: tuple(v.shape) for k, v in net.state_dict().items()}, state)
    missing = {name: torch.tensor([30.0]) for name in _OPTIONAL - state.keys()}
    net.load_state_dict({**state, **missing}, strict=True, assign=True)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    # The setter converts the weights; the attribute alone tells run_net which type to send.
    net.to(device)
    net.dtype = dtype or torch.bfloat16
    return net.eval()


def _build() -> Any:
    """Cellpose's network without memory for its weights, which come from the file."""
    import torch
    from cellpose.vit import CPSAM

    with torch.device("meta"):
        return CPSAM()


def _compare(path: str | Path, expected: dict, state: dict) -> None:
    missing = sorted(expected.keys() - state.keys() - _OPTIONAL)
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {len(missing)} tensors such as '{missing[0]}'"] if missing else []
        parts += [f"has {len(unknown)} unknown ones such as '{unknown[0]}'"] if unknown else []
        raise WeightsError(
            f"{path} is no Cellpose-SAM checkpoint: it {' and '.join(parts)}. Please check the file, "
            "or fetch it with 'daskcell weights fetch cpsam_v2'."
        )
    wrong = [k for k, shape in expected.items() if k in state and tuple(state[k].shape) != shape]
    if wrong:
        raise WeightsError(
            f"{path} is no Cellpose-SAM checkpoint: '{wrong[0]}' has shape {tuple(state[wrong[0]].shape)} "
            f"instead of {expected[wrong[0]]}. Please check the file."
        )

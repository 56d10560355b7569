"""Networks from files of TorchScript and `torch.export`, without running code that a file brings along.

TorchScript is read by torch's own unpickler, which knows tensors and the network's operations only.
`torch.export.load` is not as careful: it unpickles sample inputs and constants with Python's pickle where its
restricted reader fails, loads compiled libraries, and evaluates sizes given as text. So an archive is looked
through first, and whatever the export of an ordinary network does not hold is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from daskcell.errors import WeightsError

if TYPE_CHECKING:
    import torch

_MEMBERS = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/\w+\.json"
    r"|data/(weights|constants)/(weight_\d+|tensor_\d+|\w+_config\.json)|data/sample_inputs/\w+\.pt)"
)
_OPERATIONS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision)\.\w+(\.\w+)?"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
)
_SYMBOL = re.compile(r"Symbol\('[A-Za-z]+\d*'(, \w+=(True|False))*\)")
_SIZE = re.compile(r"([A-Z][A-Za-z]*|True|False|\d+|[-(), ])*")
_environment = threading.Lock()


def open_archive(name: str) -> torch.nn.Module:
    """The network in a file: `torch.export` (``.pt2``), else TorchScript.

    Raises
    ------
    WeightsError
        The file is neither, or holds something that could run code.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls TorchScript deprecated; people have such files
            if name.lower().endswith(".pt2"):
                _look_through(name)
                with _arrays_only():
                    return torch.export.load(name).module()
            return torch.jit.load(name, map_location="cpu")
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{name} is neither a TorchScript nor a torch.export file ({str(error).splitlines()[0]}). "
            "Save the network with torch.export.save or torch.jit.save; weights alone are not enough."
        ) from error


def _look_through(name: str) -> None:
    """Refuse an archive with anything but arrays and known operations."""
    with zipfile.ZipFile(name) as archive:
        for member in archive.namelist():
            if not _MEMBERS.fullmatch(member):
                raise _refusal(name, f"the file {member!r}")
            if member.endswith(".json"):
                _look_at(json.loads(archive.read(member)), name)


def _look_at(value: Any, name: str) -> None:
    if isinstance(value, list):
        for inner in value:
            _look_at(inner, name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "use_pickle" and inner:
                raise _refusal(name, "a pickle")
            if key == "target" and isinstance(inner, str) and not _OPERATIONS.fullmatch(inner):
                raise _refusal(name, f"the operation {inner!r}")
            if key == "expr_str" and not _SIZE.fullmatch(_SYMBOL.sub("", str(inner))):
                raise _refusal(name, f"the size {inner!r}")
            _look_at(inner, name)


def _refusal(name: str, what: str) -> WeightsError:
    return WeightsError(
        f"{name} holds {what}, which could run code, and which the export of an ordinary network does not "
        "hold. Please export the plain network with torch.export.save."
    )


@contextlib.contextmanager
def _arrays_only() -> Iterator[None]:
    """torch.load reads arrays and nothing else, whatever its caller asks for."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _environment:
        before = os.environ.get(variable)
        os.environ[variable] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before

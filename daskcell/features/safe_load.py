"""Networks from files of TorchScript and `torch.export`, without running code that a file brings along.

TorchScript is read by torch's own unpickler, which knows tensors and the network's operations only; but some
operations write files or call other machines, and methods ``__setstate__`` run while a file is being loaded.
`torch.export.load` unpickles sample inputs and constants with Python's pickle where its restricted reader
fails, loads compiled libraries, and evaluates sizes given as text. So an archive is looked through first, and
whatever an ordinary network does not hold is refused. Torch then reads a copy of what was looked at: two
readers of one zip file can be made to see different files.
"""

from __future__ import annotations

import contextlib
import io
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

_EXPORT = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/\w+\.json"
    r"|data/(weights|constants)/(weight_\d+|tensor_\d+|\w+_config\.json)|data/sample_inputs/\w+\.pt)"
)
_SCRIPT = re.compile(
    r"[^/]+/(version|byteorder|\.\w+|\.data/\w+|code/.+\.py(\.debug_pkl)?|extra/.+"
    r"|(data|constants|traced_inputs|attributes|bytecode)(\.pkl|/[^/]+))"
)
_OPERATIONS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision)\.((?!from_file\b|__)\w+|__(and|or|xor)__)"
    r"(\.[A-Za-z]\w*)?"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
)
_SYMBOL = re.compile(r"Symbol\('[A-Za-z]+\d*'(, \w+=(True|False))*\)")
_SIZE = re.compile(r"([A-Z][A-Za-z]*|True|False|\d+|[-(), ])*")
# Wherever in the text: a function can be given another name before it is called, or asked for by a name in
# quotes, which is plain where torch wrote it.
_REACHES_OUT = re.compile(
    rb"\b(save|from_file|read_file|write_file|rpc_\w+|getattr(?!\(\w+, \"\w+\"\))"
    rb"|torch\.classes(?!\.quantized\b)|(?<!\.)ops(?!\.(aten|prims?|torchvision|_?quantized)\b))\b"
)
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
            archive = _looked_through(name)
            if _is_export(name):
                with _arrays_only():
                    return torch.export.load(archive).module()
            return torch.jit.load(archive, map_location="cpu")
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{name} is neither a TorchScript nor a torch.export file ({str(error).splitlines()[0]}). "
            "Save the network with torch.export.save or torch.jit.save; weights alone are not enough."
        ) from error


def _is_export(name: str) -> bool:
    return name.lower().endswith(".pt2")


def _looked_through(name: str) -> io.BytesIO:
    """A copy of an archive, in memory; refused with anything but arrays and known operations."""
    members, look = (_EXPORT, _look_at_export) if _is_export(name) else (_SCRIPT, _look_at_script)
    copy = io.BytesIO()
    with zipfile.ZipFile(name) as archive, zipfile.ZipFile(copy, "w") as looked_at:
        for member in dict.fromkeys(archive.namelist()):
            if not members.fullmatch(member):
                raise _refusal(name, f"the file {member!r}")
            data = archive.read(member)
            look(member, data, name)
            looked_at.writestr(member, data)
    copy.seek(0)
    return copy


def _look_at_script(member: str, data: bytes, name: str) -> None:
    if member.endswith(".py") and (found := _REACHES_OUT.search(data)):
        raise _refusal(name, f"the operation {found.group().decode()!r}")


def _look_at_export(member: str, data: bytes, name: str) -> None:
    if member.endswith(".json"):
        _look_at(json.loads(data), name)


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
        f"{name} holds {what}, which could run code, and which an ordinary network does not hold. "
        "Please save the plain network with torch.export.save."
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

"""Names that people give to groups, and groups that they join.

Kept beside a model's arrays in a small file of their own: the fitted groups and their numbers stay, so that
anything said here can be taken back. A joined group goes by the number of its largest part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from daskcell.errors import InputError
from daskcell.storage.atomic import write_json

FILE = "names.json"


@dataclass(frozen=True)
class Naming:
    """What the groups 0 to k - 1 of a model are called, and which count as one.

    Every change gives a new `Naming`, and the same change twice is the same as once.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    """Names by fitted group; a joined group goes by that of its first."""
    joined: Mapping[int, int] = field(default_factory=dict)
    """For each group that was joined to a lower one: the lowest of its company."""

    def __bool__(self) -> bool:
        return bool(self.names or self.joined)

    def shown(self, k: int) -> np.ndarray:
        """``(k,)`` int32: the number under which each fitted group is shown."""
        return np.array([self.joined.get(i, i) for i in range(k)], np.int32)

    def titles(self, k: int) -> list[str | None]:
        """Name of each group, ``cluster 3`` for one without; None for one that is shown as another."""
        return [None if i in self.joined else self.names.get(i, f"cluster {i}") for i in range(k)]

    def find(self, group: int | str, k: int) -> int:
        """The fitted group that a number or a name means; raises `InputError` for neither."""
        named = [i for i, name in self.names.items() if name == str(group) and i not in self.joined]
        if named:
            return named[0]
        if str(group).isdecimal() and int(group) < k:
            return int(group)
        known = "".join(f", {self.names[i]!r}" for i in sorted(self.names) if i not in self.joined)
        raise InputError(f"There is no group {group!r}: groups are numbered 0 to {k - 1}{known}.")

    def rename(self, group: int | str, name: str, k: int) -> Naming:
        """Give a group a name; an empty one takes it away."""
        i = self.find(group, k)
        i = self.joined.get(i, i)
        name = " ".join(name.split())
        others = {j: other for j, other in self.names.items() if j != i}
        same = [j for j, other in others.items() if other == name and j not in self.joined]
        if same:
            raise InputError(
                f"Group {same[0]} is called {name!r} already. Please merge {same[0]} and {i}, or choose "
                "another name."
            )
        if name.isdecimal():
            raise InputError(f"A name cannot be a number, such as {name}: groups have their own.")
        return replace(self, names=others | ({i: name} if name else {}))

    def merge(self, groups: Iterable[int | str], k: int, name: str | None = None) -> Naming:
        """Let groups, with all that were joined to them before, count as one: the lowest."""
        shown = self.shown(k)
        wanted = {int(shown[self.find(group, k)]) for group in groups}
        company = [i for i in range(k) if int(shown[i]) in wanted]
        if len(company) < 2:
            raise InputError("Please name at least two groups to merge.")
        merged = replace(self, joined=dict(self.joined) | dict.fromkeys(company[1:], company[0]))
        if name is None and company[0] not in self.names:
            # One part's name is that of the whole; between several a person has to choose.
            names = {self.names[i] for i in wanted if i in self.names}
            name = names.pop() if len(names) == 1 else None
        return merged if name is None else merged.rename(company[0], name, k)

    def split(self, group: int | str, k: int) -> Naming:
        """Take a group out of its company; the one that the company is shown as, and all go their ways."""
        i = self.find(group, k)
        return replace(self, joined={j: first for j, first in self.joined.items() if i not in (j, first)})

    def save(self, folder: str | Path) -> None:
        """Write ``names.json`` into a model's folder, or remove it if nothing is named or joined."""
        path = Path(folder) / FILE
        if not self:
            path.unlink(missing_ok=True)
            return
        values = {
            "names": {str(i): name for i, name in self.names.items()},
            "joined": {str(i): first for i, first in self.joined.items()},
        }
        write_json(path, values)

    @classmethod
    def load(cls, folder: str | Path) -> Naming:
        """What `save` wrote; nothing if there is no file."""
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = {int(i): str(name) for i, name in values["names"].items()}
            return cls(names, {int(i): int(first) for i, first in values["joined"].items()})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no names of groups ({type(error).__name__}: {error}).") from None

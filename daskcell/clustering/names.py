"""Names that users give to clusters, and clusters merged by hand.

Kept in a small file beside the model's arrays. The fitted clusters and their numbers stay as they are, so
every change can be undone. Merged clusters are shown under the lowest of their numbers: that of the largest.
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
class ClusterNames:
    """Names of the clusters 0 to k - 1 of a model, and which of them are shown as one.

    Immutable: every change returns a new `ClusterNames`; repeating a change has no further effect.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    """Name by number of the fitted cluster; merged clusters use the name of the one they are shown as."""
    merged_with: Mapping[int, int] = field(default_factory=dict)
    """For each cluster that is shown as a lower one: the number of that one."""

    def __bool__(self) -> bool:
        return bool(self.names or self.merged_with)

    def display_ids(self, k: int) -> np.ndarray:
        """``(k,)`` int32: the number under which each fitted cluster is shown."""
        return np.array([self.merged_with.get(i, i) for i in range(k)], np.int32)

    def titles(self, k: int) -> list[str | None]:
        """Name of each cluster, ``cluster 3`` if it has none; None for one that is shown as another."""
        return [None if i in self.merged_with else self.names.get(i, f"cluster {i}") for i in range(k)]

    def find(self, cluster: int | str, k: int) -> int:
        """Number of the fitted cluster with this number or name.

        Raises
        ------
        InputError
            There is no such cluster.
        """
        named = [i for i, name in self.names.items() if name == str(cluster) and i not in self.merged_with]
        if named:
            return named[0]
        if str(cluster).isdecimal() and int(cluster) < k:
            return int(cluster)
        known = "".join(f", {self.names[i]!r}" for i in sorted(self.names) if i not in self.merged_with)
        raise InputError(f"There is no cluster {cluster!r}: clusters are numbered 0 to {k - 1}{known}.")

    def rename(self, cluster: int | str, name: str, k: int) -> ClusterNames:
        """Name a cluster; an empty name removes the one it has.

        Raises
        ------
        InputError
            There is no such cluster, another one has the name, or the name is a number.
        """
        i = self.find(cluster, k)
        i = self.merged_with.get(i, i)
        name = " ".join(name.split())
        others = {j: other for j, other in self.names.items() if j != i}
        same = [j for j, other in others.items() if other == name and j not in self.merged_with]
        if same:
            raise InputError(
                f"Cluster {same[0]} is called {name!r} already. Please merge {same[0]} and {i}, or choose "
                "another name."
            )
        if name.isdecimal():
            raise InputError(f"A name cannot be a number, such as {name}: clusters are numbered already.")
        return replace(self, names=others | ({i: name} if name else {}))

    def merge(self, clusters: Iterable[int | str], k: int, name: str | None = None) -> ClusterNames:
        """Show clusters, and all that were merged with them before, as one: the lowest of them.

        Raises
        ------
        InputError
            Fewer than two clusters, one that does not exist, or a name that `rename` refuses.
        """
        display_ids = self.display_ids(k)
        wanted = {int(display_ids[self.find(cluster, k)]) for cluster in clusters}
        members = [i for i in range(k) if int(display_ids[i]) in wanted]
        if len(members) < 2:
            raise InputError("Please name at least two clusters to merge.")
        first = members[0]
        merged = replace(self, merged_with=dict(self.merged_with) | dict.fromkeys(members[1:], first))
        if name is None and first not in self.names:
            # The only name among the parts becomes that of the whole; of several the user has to choose.
            names = {self.names[i] for i in wanted if i in self.names}
            name = names.pop() if len(names) == 1 else None
        return merged if name is None else merged.rename(first, name, k)

    def split(self, cluster: int | str, k: int) -> ClusterNames:
        """Undo a merge: take one cluster out of it or, given the cluster it is shown as, dissolve it."""
        i = self.find(cluster, k)
        kept = {j: first for j, first in self.merged_with.items() if i not in (j, first)}
        return replace(self, merged_with=kept)

    def save(self, folder: str | Path) -> None:
        """Write ``names.json`` into a model's folder; remove it if there are no names and no merges."""
        path = Path(folder) / FILE
        if not self:
            path.unlink(missing_ok=True)
            return
        values = {
            "names": {str(i): name for i, name in self.names.items()},
            "joined": {str(i): first for i, first in self.merged_with.items()},
        }
        write_json(path, values)

    @classmethod
    def load(cls, folder: str | Path) -> ClusterNames:
        """Read the file that `save` wrote; without one, there are no names and no merges."""
        path = Path(folder) / FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            names = {int(i): str(name) for i, name in values["names"].items()}
            return cls(names, {int(i): int(first) for i, first in values["joined"].items()})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} holds no cluster names ({type(error).__name__}: {error}).") from None

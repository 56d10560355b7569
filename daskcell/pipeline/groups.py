"""The groups of all slides' cells: whether they are there, their fit, or a given model in its place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from daskcell.clustering import naming
from daskcell.compute import Workers
from daskcell.config import Config
from daskcell.disk import remove, write_atomic
from daskcell.errors import InputError
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.team import LazyWorkers
from daskcell.pipeline.transfer import Given, origin, set_named_aside
from daskcell.study import CLUSTERS, Study
from daskcell.study.checksums import damaged, sums
from daskcell.study.keys import cluster_key


class Groups:
    """The stage that is one for all slides of a study."""

    def __init__(self, study: Study, config: Config, progress: Progress, given: Given | None, verify: bool):
        self.study, self.config, self.progress = study, config, progress
        self.given, self.verify = given, verify
        self.failures: list[dict[str, Any]] = []
        """Why there are none, as entries of ``failures.jsonl``."""

    def are_there(self, slides: list[str]) -> bool:
        """Whether the groups of all slides are there, whole, and need no fit."""
        ledger = self.study.ledger(CLUSTERS)
        entry = ledger.entry("cluster")
        team = Workers() if self.verify else None
        files = damaged(self.study.out, entry.get("files", {}), team) if entry else []
        if files:
            self.progress.say(f"{files[0]} is damaged or missing; the groups are fitted again.")
            ledger.lose("cluster")
        if entry is None or files:
            return False
        if self.given is not None:
            return entry["key"] == self.given.key
        described = [self.study.ledger(name).entry("describe") for name in slides]
        keys = {name: found["key"] for name, found in zip(slides, described, strict=True) if found}
        return entry["key"] == cluster_key(self.config, keys)

    def make(self, described: list[str], workers: LazyWorkers) -> str | None:
        """Fit the clusters of all described slides, unless they are; their key, None if there are none."""
        study, config = self.study, self.config
        if not described:
            return None
        if self.given is not None:
            return self._take_over(self.given)
        keys = {name: study.ledger(name).stages["describe"]["key"] for name in described}
        key = cluster_key(config, keys)
        ledger = study.ledger(CLUSTERS)
        if ledger.is_done("cluster", key) and study.clusters.is_dir():
            return key
        counts = {name: study.ledger(name).result("segment").get("cells", 0) for name in described}
        full = [name for name in described if counts[name]]
        cells = sum(counts.values())
        needed = 2 if config.cluster.k == "auto" else config.cluster.k
        if cells < needed:
            found = (
                f"{cells} cell{'s were' if cells != 1 else ' was'} found" if cells else "no cell was found"
            )
            self._fail(
                f"The cells could not be grouped, since {found} in all and cluster.k is {config.cluster.k}. "
                "Please set cluster.k lower, or look at the segmentation; everything before is kept."
            )
            return None
        self.progress.working("cluster")
        names = b""
        if ledger.held.get("cluster", {}).get("key") == key and (study.clusters / naming.FILE).exists():
            names = (study.clusters / naming.FILE).read_bytes()  # the damaged groups come back as they were
            remove(study.clusters / naming.FILE)
        ledger.begin("cluster")
        set_named_aside(study, self.progress)
        try:
            team = workers.get().metered(partial(self.progress.step, "", "cluster"))
            result = fit(full, study, config, team)
            self.progress.finished("", "cluster")
        except InputError as error:
            self._fail(str(error))
            return None
        if names:
            write_atomic(study.clusters / naming.FILE, names)
        ledger.finish("cluster", key, result, files=self._model_files())
        return key

    def _take_over(self, given: Given) -> str:
        """Copy a given model into the study, unless it is there; its key."""
        study, ledger = self.study, self.study.ledger(CLUSTERS)
        if ledger.is_done("cluster", given.key) and study.clusters.is_dir():
            return given.key
        ledger.begin("cluster")
        set_named_aside(study, self.progress)
        given.model.save(study.clusters)
        result = {"k": given.model.k, "counts": given.model.counts_.tolist(), "given": True}
        ledger.finish("cluster", given.key, result, files=self._model_files())
        return given.key

    def _model_files(self) -> dict[str, Any]:
        """Checksums of the fitted groups; not of their names, which people change."""
        folder = self.study.clusters
        return sums(
            self.study.out, (path for path in folder.iterdir() if path.name != naming.FILE), Workers()
        )

    def _fail(self, text: str) -> None:
        self.failures.append({"slide": None, "stage": "cluster", "error": text, "tries": 1})
        self.progress.say(text)


def fit(slides: Sequence[str], study: Study, config: Config, workers: Workers) -> dict[str, Any]:
    """Fit the clusters over all cells of `slides`, and save the model."""
    from daskcell.clustering import fit_features

    model = fit_features(
        [study.features(name) for name in slides],
        config.cluster,
        workers,
        study.out / "scratch",
        [study.table(name) for name in slides],
    )
    model.origin = origin(config, study.record.get("weights", {}))
    model.save(study.clusters)
    return {"k": model.k, "counts": model.counts_.tolist()}

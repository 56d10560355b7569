"""The stage that clusters the cells of all slides together, or takes a pretrained model instead."""

from __future__ import annotations

from functools import partial
from typing import Any

from daskcell.compute import Workers
from daskcell.config import Config
from daskcell.errors import InputError
from daskcell.pipeline.progress import Progress
from daskcell.pipeline.reuse_model import PretrainedModel
from daskcell.pipeline.slide import counts, damage
from daskcell.pipeline.stage import Context, run_stage
from daskcell.pipeline.stages import STAGES
from daskcell.pipeline.worker_pool import WorkerPool
from daskcell.study import CLUSTERS, Study

_NAME = "cluster"


class ClusterStage:
    """Runs the stage ``cluster``, once for all slides of a study."""

    def __init__(
        self, study: Study, config: Config, progress: Progress, given: PretrainedModel | None, verify: bool
    ):
        self.study, self.config, self.progress = study, config, progress
        self.given, self.verify = given, verify
        self.failures: list[dict[str, Any]] = []
        """Why there are no clusters, as entries of ``failures.jsonl``."""

    def key(self, slides: list[str]) -> str:
        """Content key of the clusters of all described slides among `slides`."""
        if self.given is not None:
            return self.given.key
        entries = ((name, self.study.record.ledger(name).entry("describe")) for name in slides)
        described = sorted((name, entry["key"]) for name, entry in entries if entry)
        return STAGES[_NAME].key(described, self.config)

    def are_there(self, slides: list[str]) -> bool:
        """Whether the clusters of all slides are up to date and undamaged."""
        ledger = self.study.record.ledger(CLUSTERS)
        verify = {_NAME} if self.verify else set()
        files = damage(ledger, self.study, Workers(), verify).get(_NAME)
        if files:
            self.progress.say(f"{files[0]} is damaged or missing; the clusters are fitted again.")
            ledger.invalidate(_NAME)
        return ledger.is_done(_NAME, self.key(slides))

    def make(self, described: list[str], workers: WorkerPool) -> bool:
        """Fit the clusters of the described slides unless they are up to date; whether there are any."""
        if not described:
            return False
        ledger, key = self.study.record.ledger(CLUSTERS), self.key(described)
        if ledger.is_done(_NAME, key):
            return True
        cells = {name: counts(self.study.record.ledger(name))[1] for name in described}
        if self.given is None and not self._enough(sum(cells.values())):
            return False
        self.progress.working(_NAME)
        team = workers.get() if self.given is None else Workers()
        context = Context(
            self.study,
            self.config,
            ledger,
            team.metered(partial(self.progress.step, "", _NAME)),
            slides=tuple(name for name in described if cells[name]),
            model=self.given,
            say=self.progress.say,
        )
        try:
            run_stage(STAGES[_NAME], context, key)
            self.progress.finished("", _NAME)
        except InputError as error:
            self._fail(str(error))
            return False
        return True

    def _enough(self, cells: int) -> bool:
        k = self.config.cluster.k
        if cells >= (2 if k == "auto" else k):
            return True
        found = f"{cells} cell{'s were' if cells != 1 else ' was'} found" if cells else "no cell was found"
        self._fail(
            f"The cells could not be clustered, since {found} in all and cluster.k is {k}. "
            "Please set cluster.k lower, or look at the segmentation; everything before is kept."
        )
        return False

    def _fail(self, text: str) -> None:
        self.failures.append({"slide": None, "stage": _NAME, "error": text, "tries": 1})
        self.progress.say(text)

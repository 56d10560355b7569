"""Reuse of a fitted model for new slides, whose cells are found and described like those of the fit.

model ──> settings, weights, code ──> new slides: convert ... describe ──> clusters of the model
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcell.config import Config, parse_config
from daskcell.errors import ConfigError, InputError
from daskcell.pipeline.stages import CLUSTER, STAGES
from daskcell.storage.atomic import digest
from daskcell.study import Study, versions
from daskcell.study.format1 import NAMES
from daskcell.study.keys import content_key

if TYPE_CHECKING:
    from daskcell.clustering import ClusterModel

_BINDING = ("preprocess", "segment", "features", "cluster")
"""Sections of the settings that the features of a model depend on."""


def _made_by() -> dict[str, int]:
    """Versions of the stages that find and describe cells."""
    found: dict[str, int] = {}
    waiting = list(CLUSTER.needs)
    while waiting:
        stage = waiting.pop()
        found[stage.name] = STAGES[stage.name].version
        waiting += stage.needs
    return found


def origin(config: Config, weights: Mapping[str, str]) -> dict[str, Any]:
    """How the cells of a fit are found and described, for `ClusterModel.origin`."""
    values = config.model_dump(mode="json")
    return {
        "config": {name: values[name] for name in ("input", *_BINDING)},
        "weights": dict(weights),
        "stages": _made_by(),
        "versions": versions(),
    }


def find_model(path: str | os.PathLike[str]) -> Path:
    """Folder of a model, given that folder or a study."""
    path = Path(path)
    for folder in (path / "clusters", path):
        if (folder / "model.json").exists():
            return folder
    raise InputError(f"{path} is neither a study with clusters nor a saved model. Please name one of them.")


@dataclass(frozen=True)
class PretrainedModel:
    """A fitted model to whose clusters the cells of new slides are assigned."""

    folder: Path
    model: ClusterModel
    key: str
    """Content key of the clusters: a hash of the model's files, names included."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PretrainedModel:
        """Load the model of a folder or study; raises `InputError` if there is none."""
        from daskcell.clustering import load_clusters

        folder = find_model(path)
        return cls(
            folder, load_clusters(folder), content_key(CLUSTER.name, CLUSTER.version, "given", digest(folder))
        )

    def settings(self, config: Config) -> Config:
        """`config`, completed by the settings of the model.

        Raises
        ------
        ConfigError
            `config` sets something that the features depend on to another value than the model's.
        """
        known = self.model.origin.get("config")
        if known is None:  # fitted in Python, on features of unknown origin
            return config
        source = f"the model {self.folder}"
        made = parse_config(known, source).model_dump(mode="json")
        asked = config.model_dump(mode="json", exclude_unset=True)
        keep_flows = asked.get("segment", {}).pop("keep_flows", False)
        for section in set(_BINDING) & set(asked):
            for name, here, there in _differing(asked[section], made[section], section):
                raise ConfigError(
                    f"{name} cannot be {here!r}, since {source} was fitted with {there!r}. Please leave it "
                    "out: new cells are found and described as the model's were."
                )
        asked["input"] = made["input"] | asked.get("input", {})
        values = asked | {section: made[section] for section in _BINDING}
        values["segment"]["keep_flows"] = keep_flows
        return parse_config(values, source)

    def check(self, config: Config, weights: Mapping[str, str]) -> None:
        """Raise `InputError` unless the networks are those that made the model's features."""
        fitted = {
            NAMES.get(name, name): known for name, known in self.model.origin.get("weights", {}).items()
        }
        if "fingerprint" in self.model.info:
            fitted.setdefault("describe", self.model.info["fingerprint"])
        for stage, known in fitted.items():
            here = weights.get(stage, "")
            if here != known:
                files = STAGES[stage].files(config) if stage in STAGES else None
                what, name = (files.what, files.name) if files else (f"files of the stage {stage}", "")
                before = self.model.info.get("encoder", name) if stage == "describe" else name
                raise InputError(
                    f"The model {self.folder} was fitted with the {what}{before and f' {before}'} (hash "
                    f"{known[:12]}), but here is {name or 'another'} ({here[:12] or 'none'}). Please use the "
                    "same, or fit a new model."
                )

    def outdated(self) -> str | None:
        """A sentence if a version of daskcell with different results made the model's cells, else None."""
        origin = self.model.origin.get("stages", {})
        made = {NAMES.get(name, name): version for name, version in origin.items()}
        changed = [name for name, version in _made_by().items() if made.get(name, version) != version]
        if not changed:
            return None
        before = self.model.origin["versions"].get("daskcell")
        return (
            f"The model {self.folder} was fitted by daskcell {before}, whose stage {' and '.join(changed)} "
            "gave other results than this version's: look at the drift, or fit a new model."
        )


def set_named_aside(study: Study, say: Callable[[str], None]) -> None:
    """Keep a model whose clusters have names before it is replaced by one with different clusters."""
    if (study.paths.clusters / "names.json").exists():
        name, number = "clusters-before", 2
        while os.path.lexists(study.out / name):  # taken by earlier clusters, or by a file of the user
            name, number = f"clusters-before-{number}", number + 1
        before = study.record.own(name)
        study.paths.clusters.rename(before)
        say(
            f"The clusters are fitted again; those with names are kept in {before}. Please name the new ones."
        )


def _differing(asked: Any, made: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, requested value and value of the model, of every setting that differs."""
    if isinstance(asked, Mapping) and isinstance(made, Mapping):
        for key, value in asked.items():
            yield from _differing(value, made.get(key), f"{name}.{key}")
    elif asked != made:
        yield name, asked, made

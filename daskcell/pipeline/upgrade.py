"""Brings a study of format 1 to format 2, and keeps its results.

Cluster columns of the cells tables move into tables of their own. Every result that was made from the
present input under the study's settings is entered under its new content key. A stage whose results have
changed since format 1 is done again, with the stages that depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daskcell.compute import Workers
from daskcell.errors import ConfigError
from daskcell.pipeline.stages import CLUSTER, EARLY, LATE, STAGES, slide_keys
from daskcell.storage.atomic import atomic_path
from daskcell.study import CLUSTERS, Ledger, Study, read_record
from daskcell.study.checksums import checksum, verify
from daskcell.study.format1 import NAMES
from daskcell.study.keys import content_key, identity
from daskcell.study.ledger import FORMAT

_VERSIONS = {
    "convert": 2,
    "freeze": 1,
    "export": 1,
    "segment": 2,
    "describe": 2,
    "assign": 2,
    "paint": 1,
    "cluster": 2,
}
"""Versions of the stages at the end of format 1."""
_CLUSTER_COLUMNS = ["cluster", "cluster_name", "distance"]
_ROWS = 8192


def upgrade(out: Path) -> None:
    """Bring the study in `out`, whose lock the caller holds, to the present format; others stay as they are.

    It may be killed at any moment and called again.
    """
    record = read_record(out)
    if record is None or record["format"] != 1:
        return
    study = Study(out)
    try:
        old, config = record["config"], study.config
    except ConfigError:  # a setting no longer exists: everything is done again
        return
    weights = record.get("weights", {})
    new_weights = {NAMES.get(name, name): digest for name, digest in weights.items()}
    before: dict[str, str] = {}
    now: dict[str, str] = {}
    for name in study.slides:
        ledger = study.record.ledger(name)
        keys, new = _slide_keys(old, ledger.files, weights), slide_keys(config, ledger.files, new_weights)
        if "describe" in _translated(ledger, keys, new, EARLY):
            before[name], now[name] = keys["describe"], new["describe"]
    shared = study.record.ledger(CLUSTERS)
    fitted = shared.entry(CLUSTER.name)
    clusters: tuple[str, str] | None = None
    """Keys of the clusters, then and now."""
    if fitted is not None and CLUSTER.version == _VERSIONS["cluster"]:
        if fitted["key"] == _key("cluster", sorted(before.items()), old["cluster"]):
            clusters = fitted["key"], CLUSTER.key(sorted(now.items()), config)
        elif fitted["result"].get("given"):
            clusters = fitted["key"], fitted["key"]
    for name in study.slides:
        ledger = study.record.ledger(name)
        if ledger.format == 1:
            keys = _slide_keys(old, ledger.files, weights)
            new = slide_keys(config, ledger.files, new_weights)
            if clusters is not None:
                keys["assign"] = _key("assign", keys["describe"], study.record.named_key(clusters[0]))
                overlays = old["output"]["overlays"], old["output"]["overlay_side"]
                keys["paint"] = _key("paint", keys["assign"], *overlays)
                new = slide_keys(config, ledger.files, new_weights, study.record.named_key(clusters[1]))
            _split_table(study, name, ledger)
            for stage, key in _translated(ledger, keys, new, (*EARLY, *LATE)).items():
                ledger.stages[stage]["key"] = key
            _save(ledger)
    if shared.format == 1:
        if clusters is not None:
            shared.stages[CLUSTER.name]["key"] = clusters[1]
        _save(shared)


def _save(ledger: Ledger) -> None:
    ledger.format = FORMAT
    ledger.save()


def _key(stage: str, *parts: Any) -> str:
    return content_key(stage, _VERSIONS[stage], *parts)


def _slide_keys(
    config: Mapping[str, Any], files: Iterable[Mapping[str, Any]], weights: Mapping[str, str]
) -> dict[str, str]:
    """Content keys as they were in format 1, of recorded settings, by today's names of the stages."""
    segment = {name: value for name, value in config["segment"].items() if name != "keep_flows"}
    others = ["watershed"]
    if segment["method"] != "cellpose":
        others = ["model", "cellprob_threshold", "flow_threshold", "niter", "batch_size"]
    segment = {name: value for name, value in segment.items() if name not in others}
    written = {name: config["output"][name] for name in ("channels", "preprocessed")}
    keys = {"convert": _key("convert", identity(files), config["input"])}
    keys["fit"] = _key("freeze", keys["convert"], config["preprocess"], weights.get("freeze", ""))
    keys["export"] = _key("export", keys["fit"], written)
    keys["segment"] = _key("segment", keys["fit"], segment, weights.get("segment", ""))
    keys["describe"] = _key("describe", keys["segment"], config["features"], weights.get("describe", ""))
    return keys


def _translated(
    ledger: Ledger, old: Mapping[str, str], new: Mapping[str, str], stages: Iterable[str]
) -> dict[str, str]:
    """New keys of the stages that are done under the old ones (or already under the new), and whose code
    gives the same results as it did, as that of all stages before does."""
    versions = {NAMES.get(name, name): version for name, version in _VERSIONS.items()}
    found: dict[str, str] = {}
    for name in stages:
        stage, entry = STAGES[name], ledger.entry(name)
        needs = [need.name for need in stage.needs if need.scope == "slide"]
        if entry is None or name not in old or name not in new or stage.version != versions[name]:
            continue
        if entry["key"] in (old[name], new[name]) and all(need in found for need in needs):
            found[name] = new[name]
    return found


def _split_table(study: Study, slide: str, ledger: Ledger) -> None:
    """Move the cluster columns of a cells table into a table of their own, and enter both files.

    Where the table is not what its entry says, it is left alone: it is made again.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    described, table = ledger.entry("describe"), study.paths.table(slide)
    if described is None or verify(study.out, described["files"], Workers()):
        ledger.stages.pop("assign", None)
        return
    with pq.ParquetFile(table) as file:
        names = file.schema_arrow.names
        if "cluster" not in names:
            return
        columns = [name for name in names if name not in _CLUSTER_COLUMNS]
        clusters = study.paths.clusters_table(slide)
        clusters.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(clusters) as temporary:
            moved = [name for name in _CLUSTER_COLUMNS if name in names]
            pq.write_table(file.read(columns=moved), temporary)
        with atomic_path(table) as temporary:
            empty = file.schema_arrow.empty_table().select(columns).to_pandas()
            schema = pa.Schema.from_pandas(empty, preserve_index=False)
            with pq.ParquetWriter(temporary, schema) as writer:
                for batch in file.iter_batches(_ROWS, columns=columns):
                    writer.write_table(pa.Table.from_batches([batch]).cast(schema))
    described["files"] |= checksum(study.out, [table], Workers())
    if "assign" in ledger.stages:
        ledger.stages["assign"]["files"] = checksum(study.out, [clusters], Workers())

"""The page itself, ``report.html``: one self-contained file, without scripts or network access."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from daskcell.clustering.names import ClusterNames
from daskcell.errors import InputError
from daskcell.render.paint import colors
from daskcell.render.thumbnails import Thumbnails, common_side
from daskcell.report.facts import Cell, Cluster, Facts, SlideRow, best_of, gather, points
from daskcell.storage.atomic import refuse_impossible, write_atomic
from daskcell.study import CLUSTERS, Study
from daskcell.study.results import Clustered

_MARK = b'<meta name="generator" content="daskcell">'
_MAX_ROWS = 200
_MAX_SLIDES = 24
_MAX_CLUSTERS = 64
"""Clusters whose cells are shown; each adds some 70 KB to the page."""


def write_report(study: Study, path: str | Path | None = None, warnings: Sequence[str] = ()) -> Path:
    """Write the results of a study as one HTML page.

    Parameters
    ----------
    study : Study
        Need not be finished: missing results are left out.
    path : path, optional
        None: ``report.html`` in the study.
    warnings : sequence of str
        Sentences shown at the top.

    Returns
    -------
    Path
        The file. Equal results give equal bytes, wherever and whenever they were made.

    Raises
    ------
    InputError
        `path` exists and is not a report.
    """
    import jinja2

    facts = gather(study)
    thumbnails = Thumbnails(study.prepared)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("daskcell.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "many": lambda n: f"{n:,}", "percent": _percent}
    config = study.record["config"]
    page = environment.get_template("report.html.jinja").render(
        name=_title(study),
        facts=facts,
        warnings=list(warnings),
        cards=_cards(facts, thumbnails),
        slides=[(row, _uri(drawn)) for row, drawn in _slides(study, facts, thumbnails)],
        rows=facts.slides[:_MAX_ROWS],
        scores=_scores(study),
        curve=_curve(facts),
        failures=_failures(study),
        versions=study.record.get("versions", {}),
        # Without the section compute, which differs between machines and changes no result.
        settings=_yaml({section: values for section, values in config.items() if section != "compute"}),
        model=study.record.get("model"),
        left=study.left,
    )
    if path is None:
        target = study.record.own(study.paths.report.name)
    else:
        target = Path(path)
        _refuse_other(target)
    write_atomic(target, page.encode(errors="backslashreplace"))
    return target


def _refuse_other(path: Path) -> None:
    """Raise `InputError` if `path` exists and is not a report of daskcell."""
    refuse_impossible(path)
    if path.is_dir() or (os.path.lexists(path) and _MARK not in path.read_bytes()[:1000]):
        raise InputError(
            f"{path} exists and is not a report of daskcell. Please remove it or choose another name."
        )


def page_inputs(study: Study, warnings: Sequence[str] = ()) -> list[Any]:
    """Everything the page of a study depends on, as JSON-able values, from its small files alone."""
    keys = {  # one ledger at a time: thousands of them fill the memory
        name: [entry["key"] for entry in study.record.ledger(name).stages.values()] for name in study.slides
    }
    aside = ("config", "inputs", "owned", "arrays")
    said = {name: value for name, value in study.record.items() if name not in aside}
    config = {name: value for name, value in study.record["config"].items() if name != "compute"}
    parts = [_title(study), keys, study.record.clusters_key, said, config]
    return [*parts, study.scores, _failures(study), list(warnings)]


def _title(study: Study) -> str:
    """Names of the study's inputs, without folders: the same wherever the study is."""
    names = [PurePath(path).name for path in study.record["inputs"]]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _failures(study: Study) -> list[dict[str, Any]]:
    """Why slides were set aside, without the number of tries."""
    return [{name: one[name] for name in ("slide", "stage", "error")} for one in study.failures]


# -- parts -------------------------------------------------------------------------------------------------
def _cards(
    facts: Facts, thumbnails: Thumbnails
) -> list[tuple[Cluster, list[tuple[Cell, str]], list[tuple[Cell, str]]]]:
    """Each cluster with images of its typical and its farthest cells."""
    clusters = facts.clusters[:_MAX_CLUSTERS]
    side = common_side([cell.side for cluster in clusters for cell in cluster.typical])

    def drawn(cells: Sequence[Cell], color: str) -> list[tuple[Cell, str]]:
        draw = thumbnails.cell
        return [(cell, _uri(draw(cell.slide, cell.label, cell.centre, side, color))) for cell in cells]

    return [(one, drawn(one.typical, one.color), drawn(one.far, one.color)) for one in clusters]


def _slides(study: Study, facts: Facts, thumbnails: Thumbnails) -> list[tuple[SlideRow, bytes]]:
    """The first slides whose cells have clusters, with an image of each."""
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    k = clustered.k if clustered else 0
    palette = colors(k)
    done = ((row, table) for row in facts.slides if (table := study.record.assigned_table(row.name)))
    return [(row, thumbnails.slide(row.name, table, palette)) for row, table in islice(done, _MAX_SLIDES)]


def _scores(study: Study) -> dict[str, Any] | None:
    """The table of known types by clusters, each entry with its share of the row."""
    scores = study.scores
    if scores is None or scores["ari"] is None:
        return None
    rows = []
    for kind, counts in zip(scores["types"], scores["contingency"], strict=True):
        total = max(sum(counts), 1)
        rows.append((kind, sum(counts), [(count, count / total) for count in counts]))
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    assert clustered is not None
    shown = ClusterNames.load(study.paths.clusters).titles(clustered.k)
    palette = colors(len(shown))
    heads = [(title, "#" + bytes(palette[shown.index(title)]).hex()) for title in scores["groups"]]
    return scores | {"rows": rows, "heads": heads, "truth": Path(scores["truth"]).name}


_CHART = (420.0, 140.0)


def _curve(facts: Facts) -> dict[str, Any] | None:
    if not facts.curve:
        return None
    lines = {name: points(facts.curve, name, *_CHART) for name in ("silhouette", "stability", "score")}
    best = best_of(facts.curve)
    ks = [int(one["k"]) for one in facts.curve]
    return {
        "best": best,
        "width": _CHART[0],
        "height": _CHART[1],
        "lines": {name: " ".join(f"{x},{y}" for x, y in line) for name, line in lines.items()},
        "ticks": [(k, x) for k, (x, _) in zip(ks, lines["score"], strict=True)],
        "mark": lines["score"][ks.index(best)] if best in ks else (0.0, 0.0),
    }


def _words(name: str) -> str:
    """Name of a column in words: "intensity mean, red" for ``intensity_mean-red``."""
    what, _, channel = name.partition("-")
    return what.replace("_", " ") + (f", {channel}" if channel else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.1f} %"


def _uri(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False)


__all__ = ["page_inputs", "write_report"]

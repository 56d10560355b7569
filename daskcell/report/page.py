"""The page itself: `report.html`, complete in one file, with no script and nothing from the network."""

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
from daskcell.report.facts import Cell, Facts, Group, SlideRow, best_of, gather, points
from daskcell.report.pictures import Pictures, common_side
from daskcell.storage.atomic import refuse_impossible, write_atomic
from daskcell.study import CLUSTERS, Study
from daskcell.study.results import Clustered

_MARK = b'<meta name="generator" content="daskcell">'
_MOST_ROWS = 200
_MOST_SLIDES = 24
_MOST_GROUPS = 64
"""Groups whose cells are shown; the page grows by some 70 KB with each."""


def write_report(study: Study, path: str | Path | None = None, warnings: Sequence[str] = ()) -> Path:
    """Write what a study found as one HTML page.

    Parameters
    ----------
    study : Study
        Finished or not: what is not there yet is left out.
    path : path
        None: ``report.html`` in the study.
    warnings : sequence of str
        Sentences that stand on top.

    Returns
    -------
    Path
        The file. The same results give the same bytes, wherever and whenever they were made.
    """
    import jinja2

    facts = gather(study)
    pictures = Pictures(study)
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
        cards=_cards(facts, pictures),
        slides=[(row, _uri(drawn)) for row, drawn in _slides(study, facts, pictures)],
        rows=facts.slides[:_MOST_ROWS],
        scores=_scores(study),
        curve=_curve(facts),
        failures=_failures(study),
        versions=study.record.get("versions", {}),
        # Where it ran changes no result, and would make two pages of one result differ.
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
    """Raise `InputError` if there is something at `path` that is no page of daskcell's."""
    refuse_impossible(path)
    if path.is_dir() or (os.path.lexists(path) and _MARK not in path.read_bytes()[:1000]):
        raise InputError(
            f"{path} exists, and is no report of daskcell's. Please remove it or choose another name."
        )


def page_inputs(study: Study, warnings: Sequence[str] = ()) -> list[Any]:
    """All that the page of a study depends on (JSON-able), told by its small files alone."""
    keys = {  # one ledger at a time: thousands of them fill the memory
        name: [entry["key"] for entry in study.record.ledger(name).stages.values()] for name in study.slides
    }
    aside = ("config", "inputs", "owned", "arrays")
    said = {name: value for name, value in study.record.items() if name not in aside}
    config = {name: value for name, value in study.record["config"].items() if name != "compute"}
    parts = [_title(study), keys, study.record.clusters_key, said, config]
    return [*parts, study.scores, _failures(study), list(warnings)]


def _title(study: Study) -> str:
    """What the study is of: its inputs' names, which are the same wherever it was written."""
    names = [PurePath(path).name for path in study.record["inputs"]]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _failures(study: Study) -> list[dict[str, Any]]:
    """Why slides were set aside, without how often that was tried."""
    return [{name: one[name] for name in ("slide", "stage", "error")} for one in study.failures]


# -- parts -------------------------------------------------------------------------------------------------
def _cards(
    facts: Facts, pictures: Pictures
) -> list[tuple[Group, list[tuple[Cell, str]], list[tuple[Cell, str]]]]:
    """Each group with the pictures of its typical and its farthest cells."""
    groups = facts.groups[:_MOST_GROUPS]
    side = common_side([cell for group in groups for cell in group.typical])

    def drawn(cells: Sequence[Cell], color: str) -> list[tuple[Cell, str]]:
        return [(cell, _uri(pictures.cell(cell, side, color))) for cell in cells]

    return [(g, drawn(g.typical, g.color), drawn(g.far, g.color)) for g in groups]


def _slides(study: Study, facts: Facts, pictures: Pictures) -> list[tuple[SlideRow, bytes]]:
    """The first slides that are grouped, and their pictures."""
    clustered = study.record.ledger(CLUSTERS).read(Clustered)
    k = clustered.k if clustered else 0
    palette = colors(k)
    done = (row for row in facts.slides if study.record.assigned_table(row.name))
    return [(row, pictures.slide(row.name, palette)) for row in islice(done, _MOST_SLIDES)] if k else []


def _scores(study: Study) -> dict[str, Any] | None:
    """The groups against known types, each cell of the table with its share of its row."""
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
    """A measurement's column as words: ``intensity_mean-red`` is "intensity mean, red"."""
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

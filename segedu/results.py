"""Recorded runs: one JSON file each in results/, written by tools/record.py. Every measured number in the text is here."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from html import escape
from pathlib import Path

ROOTS = (Path(__file__).parents[1] / "results", Path(__file__).parent / "recorded")  # a checkout, an installed wheel


def load(chapter: str | None = None, **match: object) -> list[dict]:
    """All recorded runs of a chapter whose fields equal `match`, by file name.

    `load("02_fcn", experiment="skips", scale="mini")`. No run that matches gives an empty list.
    """
    root = next((root for root in ROOTS if root.is_dir()), None)
    runs = [] if root is None else [json.loads(file.read_text()) for file in sorted(root.glob("*.json"))]
    wanted = match | ({} if chapter is None else {"chapter": chapter})
    return [run for run in runs if all(run.get(key) == value for key, value in wanted.items())]


def seeds(chapter: str, name: str, data: str = "toytown", scale: str = "mini") -> list[dict]:
    """The runs of one setting, by seed: `seeds("02_fcn", "fcn8s")`. An empty list where it was not run."""
    runs = load(chapter, data=data, scale=scale)
    return [run for run in runs if run["name"] == f"{name}-{data}-{scale}-seed{run['seed']}"]


def gaps(runs: Sequence[dict], others: Sequence[dict], path: str = "scores.miou") -> list[float]:
    """By how much `runs` are above `others`, for each seed that both have; of several runs of a seed, their means.

    `path` is that of `value`.
    """
    ours, theirs = (
        {seed: [value(run, path) for run in group if run["seed"] == seed] for seed in {run["seed"] for run in group}}
        for group in (runs, others)
    )
    return [statistics.fmean(ours[seed]) - statistics.fmean(theirs[seed]) for seed in sorted(ours.keys() & theirs)]


def verdict(runs: Sequence[dict], others: Sequence[dict], path: str = "scores.miou") -> str:
    """`gaps` in words: "ahead at 2 of 3 seeds, +0.013 ± 0.020"; "not run" where no seed has both."""
    found = gaps(runs, others, path)
    if not found:
        return "not run"
    spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"ahead at {sum(gap > 0 for gap in found)} of {len(found)} seeds, {statistics.fmean(found):+.3f}{spread}"


def value(run: dict, path: str) -> float:
    """A number inside a run: `value(run, "scores.by_size.small")`. nan where the run has None."""
    found = reduce(lambda part, key: part[key], path.split("."), run)
    return float("nan") if found is None else found


@dataclass(frozen=True)
class Table:
    """Rows of text, one per group of runs. Prints as text and renders as HTML."""

    head: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n".join(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        )

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.head)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table(groups: Mapping[str, Sequence[dict]], columns: Mapping[str, str], digits: int = 3) -> Table:
    """Mean ± standard deviation over the runs of each group; "not run" for an empty group, no ± for a single run, "-" where no
    run has the number.

    Args:
        groups: row name -> runs (seeds of one setting).
        columns: column name -> path, as for `value`.
    """
    rows = []
    for name, runs in groups.items():
        if not runs:
            rows.append([name, "0", *["not run"] * len(columns)])
            continue
        cells = []
        for path in columns.values():
            numbers = [number for run in runs if not math.isnan(number := value(run, path))]
            if not numbers:
                cells.append("-")
                continue
            spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.fmean(numbers):.{digits}f}{spread}")
        rows.append([name, str(len(runs)), *cells])
    return Table(["setting", "runs", *columns], rows)

"""Recorded runs: what a file must hold, and the tables made of them."""

import json
from statistics import fmean, stdev

import pytest
from conftest import ROOT

from segedu import metrics, results

FILES = sorted((ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recorded_run_is_whole_and_agrees_with_itself(file):
    run = json.loads(file.read_text())
    assert file.stem == run["name"] and run["name"].endswith(f"{run['data']}-{run['scale']}-seed{run['seed']}")
    assert len(run["loss"]) == run["recipe"]["steps"] and run["seconds"] > 0 and run["git"] and run["versions"]["torch"]
    matrix = metrics.Scores(run["scores"]["matrix"])
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"):
        assert run["scores"][name] == pytest.approx(getattr(matrix, name))


def test_skips_help_at_every_seed():
    """Chapter 02: 8s above 16s above 32s in mean IU and boundary F1, over three seeds."""
    runs = results.load("02_fcn", experiment="skips", scale="mini")
    by = {(run["arguments"]["stride"], run["seed"]): run for run in runs}
    for seed in (0, 1, 2):
        for path in ("scores.miou", "scores.boundary_f1"):
            fine, middle, coarse = (results.value(by[stride, seed], path) for stride in (8, 16, 32))
            assert fine > middle > coarse, (seed, path)


def by_seed(path, **match):
    return {run["seed"]: results.value(run, path) for run in results.load(scale="mini", **match)}


def test_without_skips_unet_loses_its_outlines_at_every_seed():
    """Chapter 04: no skip is far below both ways to join, in mean IU and boundary F1."""
    for path in ("scores.miou", "scores.boundary_f1"):
        none, total, concat = (
            by_seed(path, chapter="04_unet", experiment="skips", model=name)
            for name in ("UNetAlone", "UNetSum", "UNet")
        )
        assert len(none) == 3 and all(none[seed] < 0.8 * min(total[seed], concat[seed]) for seed in none)


def test_border_weights_keep_cells_apart_at_every_seed():
    """Chapter 04: fewer cells are joined with the weight map, with and without elastic deformation."""
    runs = results.load("04_unet", experiment="cells")
    merged = {(run["name"].split("-cells")[0], run["seed"]): run["merged"] for run in runs}
    for seed in (0, 1, 2):
        assert merged["unet-border", seed] < merged["unet-plain", seed]
        assert merged["unet-border-elastic", seed] < merged["unet-elastic", seed]


def test_table_by_hand():
    runs = [{"a": {"b": 0.1}}, {"a": {"b": 0.2}}, {"a": {"b": None}}]
    table = results.table({"both": runs, "one": runs[:1], "empty": [], "none": runs[2:]}, {"b": "a.b"}, digits=2)
    mean, spread = fmean([0.1, 0.2]), stdev([0.1, 0.2])
    assert table.rows == [["both", "3", f"{mean:.2f} ± {spread:.2f}"], ["one", "1", "0.10"], ["empty", "0", "not run"],
                          ["none", "1", "-"]]  # fmt: skip
    assert str(table).splitlines()[0].split() == ["setting", "runs", "b"]
    assert table._repr_html_().count('<th scope="row">') == 4


def test_seeds_of_one_setting():
    runs = results.seeds("02_fcn", "fcn8s")
    assert [run["seed"] for run in runs] == [0, 1, 2] and {run["arguments"]["stride"] for run in runs} == {8}
    assert results.seeds("02_fcn", "fcn") == []


def test_verdict_by_hand():
    ours, theirs = ([{"seed": s, "scores": {"miou": v}} for s, v in pairs] for pairs in (
        [(0, 0.5), (1, 0.4), (2, 0.3), (3, 0.9)], [(2, 0.2), (1, 0.5), (0, 0.2)],
    ))  # fmt: skip
    assert results.gaps(ours, theirs) == pytest.approx([0.3, -0.1, 0.1])
    twice = [*theirs, {"seed": 2, "scores": {"miou": 0.6}}]  # their mean at seed 2 is 0.4
    assert results.gaps(ours, twice) == pytest.approx([0.3, -0.1, -0.1])
    assert results.verdict(ours, theirs) == "ahead at 2 of 3 seeds, +0.100 ± 0.200"
    assert results.verdict(ours[:1], theirs) == "ahead at 1 of 1 seeds, +0.300"
    assert results.verdict(ours[3:], theirs) == "not run"

"""The three commands of the README, on Toytown; and on CamVid where it is at hand."""

import json

import numpy as np
import pytest
from PIL import Image

from segedu import cli, metrics
from segedu.data import Toytown


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "fcn.safetensors"
    cli.main(["train", "fcn", "--scale", "mini", "--steps", "5", "--out", str(path)])
    return path


def test_train_evaluate_predict(checkpoint, tmp_path, capsys):
    cli.main(["evaluate", str(checkpoint), "--split", "val", "--json", str(tmp_path / "scores.json")])
    text = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert all(name in text for name in ("mean IU", "pixel accuracy", "boundary F1", *Toytown.classes))
    assert np.sum(scores["matrix"]) == sum((Toytown("val")[i][1] != metrics.VOID).sum().item() for i in range(200))

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    cli.main(["predict", str(checkpoint), str(tmp_path / "photo.png"), "--out", str(tmp_path)])
    mask, overlay = (np.array(Image.open(tmp_path / f"photo-{kind}.png")) for kind in ("mask", "overlay"))
    assert mask.shape == (50, 70) and mask.max() < 11 and overlay.shape == (50, 70, 3)
    expected = (pixels * 0.5 + Toytown.palette.numpy()[mask] * 0.5).astype(int)
    assert np.abs(overlay.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere.safetensors"], "no checkpoint at nowhere.safetensors"),
        (["train", "fcn", "--data", "camvid", "--scale", "mini"], "download=True"),
    ],
)
def test_errors_are_one_line_without_a_trace(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("SEGEDU_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert str(stopped.value).startswith("segedu: ") and message in str(stopped.value)


def test_predict_names_what_is_missing(checkpoint):
    with pytest.raises(SystemExit, match=r"no picture at nowhere\.jpg"):
        cli.main(["predict", str(checkpoint), "nowhere.jpg"])

"""The three commands of the README, on Toytown; and on CamVid where it is at hand."""

import json

import numpy as np
import pytest
import torch
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


@pytest.mark.parametrize("model", [name for name in cli.MODELS if name != "fcn"])
def test_other_models_train_too(model, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    cli.main(["train", model, "--scale", "mini", "--steps", "2", "--out", str(path)])
    assert "mean IU" in capsys.readouterr().out and path.exists()


@torch.no_grad()
def test_paper_scale_takes_the_papers_loss_and_recipe():
    pictures, width = Toytown("train", size=3), {"width": 1 / 8}
    image, target = pictures[0]
    for name in cli.MODELS:
        arguments, recipe, _ = cli.setting(name, "toytown", "paper")
        model = cli.MODELS[name](11, **arguments, **width).eval()
        loss = cli.loss_of(name, "paper", pictures)(model, image[None], target[None])
        plain = torch.nn.functional.cross_entropy(model(image[None]), target[None], ignore_index=metrics.VOID)
        assert recipe.source
        if name == "fcn":  # summed over the pixels
            assert loss == pytest.approx((plain * (target != metrics.VOID).sum()).item(), rel=1e-4)
        elif name in ("dilation", "deeplab-v1"):  # on the map of stride 8, every eighth label
            coarse = torch.nn.functional.cross_entropy(
                model.scores(image[None]), target[None, ::8, ::8], ignore_index=metrics.VOID
            )
            assert loss == pytest.approx(coarse.item(), rel=1e-5)
        elif name == "deeplab-v2":  # on four maps, the scales 1, 0.5, 0.75 and their maximum
            assert 2 * plain < loss < 8 * plain
        elif name == "refinenet":  # on the map of stride 4, every fourth label
            quarter = torch.nn.functional.cross_entropy(
                model.scores(image[None]), target[None, ::4, ::4], ignore_index=metrics.VOID
            )
            assert loss == pytest.approx(quarter.item(), rel=1e-5)
        elif name == "pspnet":
            side = torch.nn.functional.cross_entropy(
                model.both(image[None])[1], target[None], ignore_index=metrics.VOID
            )
            assert loss == pytest.approx((plain + 0.4 * side).item(), rel=1e-5)
        elif name in ("unet", "gcn", "deeplab-v3", "deeplab-v3plus", "autodeeplab"):
            assert loss == pytest.approx(plain.item(), rel=1e-5)
        else:  # balanced: rare classes weigh more
            assert loss != pytest.approx(plain.item(), rel=1e-3) and loss.isfinite()

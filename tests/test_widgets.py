"""What the widgets hand to a page, to JupyterLab and to Colab; the live controls."""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import segedu as sg
from segedu import widgets
from segedu.crf import DenseCRF
from segedu.models import autodeeplab
from segedu.models.deeplab_v3 import default_rates, valid_weights

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = sg.FCN(11, stride=8, pad=1, width=1 / 8)
    torch.nn.init.normal_(model.score_pool3.weight)
    return model


@pytest.fixture(scope="module")
def val():
    return sg.Toytown("val")


def state_of(html: str) -> dict:
    import html as entities

    return json.loads(entities.unescape(re.search(r"state='([^']*)'", html)[1]))


def test_html_is_the_same_at_every_run_and_carries_the_state():
    first, second = widgets.metric_lab(), widgets.metric_lab()
    assert first.to_html() == second.to_html()
    assert state_of(first.to_html()) == first.state
    assert len(first.to_html()) < 40_000


def test_state_survives_quotes_and_tags_in_names():
    names = ["a'b", '<i>"c"', "d & e", "f", "</seg-figure>"]
    figure = widgets.metric_lab(classes=names)
    assert state_of(figure.to_html())["classes"] == names
    assert figure.to_html().count("</seg-figure>") == 1


def test_bundle_has_html_and_a_widget_view():
    figure = widgets.metric_lab()
    bundle = figure._repr_mimebundle_()
    assert bundle["text/html"] == figure.to_html()
    assert bundle[VIEW]["model_id"] == figure._repr_mimebundle_()[VIEW]["model_id"]
    assert figure._widget.state == figure.state and figure.value == {}
    assert "export default" in figure._widget._esm


def test_bundle_brings_its_script_in_colab(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    bundle = widgets.metric_lab()._repr_mimebundle_()
    assert VIEW not in bundle
    assert bundle["text/html"].endswith("</script>") and bundle["text/html"].count("</script>") == 1
    assert 'customElements.define("seg-figure"' in bundle["text/html"]


def test_bundle_without_anywidget_is_html(monkeypatch):
    widgets._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)  # import anywidget: ImportError
    assert set(widgets.metric_lab()._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_mixer_is_small_and_leaves_the_model_alone(model, val):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    figure = widgets.skip_mixer(model, val)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(json.dumps(figure.state)) < 150_000
    assert [step["crop"] for step in figure.state["steps"]] == [1, 1, 4]
    assert widgets.skip_mixer(model, val).to_html() == figure.to_html()


def test_mix_with_all_weights_one_is_the_model(model, val):
    image, _ = val[0]
    names = ["score_fr", "score_pool4", "score_pool3"]
    model.eval()
    with sg.record(model, names) as maps, torch.no_grad():
        logits = model(image[None])[0]
    torch.testing.assert_close(widgets.mix(model, [maps[name] for name in names], (1, 1, 1), image), logits)


def test_mixer_needs_an_fcn_8s_for_small_pictures(val):
    with pytest.raises(ValueError, match="got stride=16"):
        widgets.skip_mixer(sg.FCN(11, stride=16, pad=1, width=1 / 8), val)
    with pytest.raises(ValueError, match="frozen upsampling"):
        widgets.skip_mixer(sg.FCN(11, pad=1, learn_upsampling=True, width=1 / 8), val)


def test_lab_opens_on_a_checkerboard_and_is_small():
    figure = widgets.upsampling_lab()
    assert figure.to_html() == widgets.upsampling_lab().to_html() and len(figure.to_html()) < 30_000
    opening = figure.state["presets"][0]
    assert (opening["kernel"], opening["stride"], opening["padding"]) == ([1] * 9, 2, 1)
    values = torch.tensor(widgets.SWITCHED).float()
    pooled, switches = torch.nn.functional.max_pool2d(values[None], 2, return_indices=True)
    assert pooled.flatten().tolist() == [6, 8, 3, 4]
    assert switches.flatten().tolist() == [5, 7, 8, 15]  # (1, 1), (1, 3), (2, 0), (3, 3)


def test_field_lab_shows_the_holes_of_gridding_and_is_small():
    figure = widgets.field_lab()
    assert figure.to_html() == widgets.field_lab().to_html() and len(figure.to_html()) < 30_000
    paths = {name: widgets._paths(layers) for name, layers in widgets.STACKS.items()}
    assert paths["3, 3, 3"][3].tolist() == [7 * n for n in (1, 3, 6, 7, 6, 3, 1)]
    assert {name: (len(of), int((of > 0).sum())) for name, of in paths.items()} == {
        "3, 3, 3": (7, 49),
        "Doubling 1, 2, 4": (15, 225),
        "Gridding 2, 2, 2": (13, 49),
        "1, 2, 5": (17, 289),
        "Context module": (67, 67**2),
        "Pools (VGG)": (24, 24**2),
    }
    assert Image.open(io.BytesIO(figure.still)).width > 600 and "49 of 13 × 13 pixels" in figure.alt


def test_playground_sharpens_only_with_colour_and_is_small():
    figure = widgets.crf_playground()
    assert figure.to_html() == widgets.crf_playground().to_html() and len(figure.to_html()) < 60_000
    image, unary, target = widgets._astronaut()
    assert image.shape == unary.shape == (3, *target.shape) == (3, 36, 42) and image.max() > 1
    torch.testing.assert_close((-unary).exp().sum(0), torch.ones(36, 42))
    state = figure.state
    assert base64.b64decode(state["photo"]) == image.byte().permute(1, 2, 0).numpy().tobytes()
    runs = np.array(state["network"]).reshape(-1, 2)
    network = torch.from_numpy(np.repeat(runs[:, 0], runs[:, 1])).view(36, 42)
    assert torch.equal(network, (-unary).argmax(0))
    assert (network.view(6, 6, 7, 6) == network[::6, ::6].view(6, 1, 7, 1)).all()  # blocks of 6 x 6
    lone = network[6:12, 36:]
    assert (lone == 2).all() and (target[6:12, 36:] == 0).all()

    wrong, kept = {}, {}
    for preset in state["presets"]:
        name, labels = preset["name"], DenseCRF(**preset["set"], backend="exact")(image / 255, unary=unary).argmax(0)
        wrong[name], kept[name] = int((labels != target).sum()), int((labels[6:12, 36:] == 2).sum())
    assert wrong["No CRF"] == 302 and kept["No CRF"] == 36
    assert wrong["Colour and place"] < 50 and kept["Colour and place"] == 0
    assert 0 < kept["Place only, short range"] < 36 and 270 < wrong["Place only, short range"] < 302
    assert 200 < wrong["Place only, long range"] < 302 and kept["Place only, long range"] == 0
    assert str(wrong["Colour and place"]) in figure.alt and Image.open(io.BytesIO(figure.still)).width > 600


def test_aspp_lab_counts_as_valid_weights_and_is_small():
    figure = widgets.aspp_lab()
    assert figure.to_html() == widgets.aspp_lab().to_html() and len(figure.to_html()) < 40_000
    presets = {preset["name"]: preset for preset in figure.state["presets"]}
    rates = [preset["rates"] for preset in presets.values()]
    assert rates == [[12], [2, 4, 8, 12], [6, 12, 18, 24], [6, 12, 18], [12, 24, 36], [2, 4, 6]]
    for stride in 16, 8:  # of the paper's net
        preset = presets[f"v3: {', '.join(map(str, default_rates(stride)))}"]
        assert preset["stride"] == stride and preset["one"] and preset["pooling"]
    for area in figure.state["maps"][:4]:
        pixels = int(area["text"].split()[3])
        assert area["rows"] == area["cols"] == (pixels - 1) // area["stride"] + 1
    with torch.device("meta"):
        model = sg.DeepLabV3(11, depth=14, output_stride=8, rates=(2, 4, 6), width=1 / 4).eval()
        assert model.cells(torch.empty(1, 3, 96, 128)).shape[-2:] == (13, 17)
    toytown = figure.state["maps"][4]
    assert (toytown["rows"], toytown["cols"]) == (13, 17) and sg.Toytown("val")[0][0].shape == (3, 96, 128)
    counts = {
        n for rate in range(1, 73) for size in (65, (13, 17)) for n in valid_weights(rate, size).unique().tolist()
    }
    assert counts == set(widgets.TAPS) and len(widgets.TAPS_PALETTE) == len(set(widgets.TAPS_PALETTE)) == len(
        widgets.TAPS
    )
    assert "7.93 at rate 6" in figure.alt and "1.00 at rate 65" in figure.alt  # 0.881 and 1/9 of nine
    assert Image.open(io.BytesIO(figure.still)).width > 600


def test_pyramid_lab_shows_one_hull_in_two_places_and_is_small():
    figure = widgets.pyramid_lab()
    assert figure.to_html() == widgets.pyramid_lab().to_html() and len(figure.to_html()) < 250_000
    (water, on_water), (road, on_road) = widgets._same_hull()
    same = (water == road).all(0)
    assert 1000 < same.sum() < 1500 and same[60, 70]  # the hull, and by chance few others
    for target, k, other in (on_water, 1, 2), (on_road, 2, 1):
        below = target[78:, 30:95]  # what it lies on
        assert (below == k).float().mean() > 0.85 and (below != other).all()
        assert not target[same & (torch.arange(96)[:, None] > 50)].any()
    (split, index, _), _ = widgets.PYRAMID_SCENES
    image, target = sg.Toytown(split)[index]
    assert torch.equal(water, image) and sg.Toytown(split).classes[target[60, 70]] == "boat"
    state = figure.state
    for area in state["maps"][:4]:  # those that PSPNet makes: 8 m + 1 pixels
        assert (area["height"], area["width"]) == (8 * area["rows"] - 7, 8 * area["cols"] - 7)
    with torch.device("meta"):
        model = sg.PSPNet(11, depth=14, width=1 / 4).eval()
        assert model.cells(torch.empty(1, 3, 96, 128))[0].shape[-2:] == (13, 17)
    assert state["presets"][0]["bins"] == (1, 2, 3, 6)
    row, col = state["cell"]
    assert same[int((row + 0.5) / 60 * 96), state["left"] + int((col + 0.5) / 60 * 96)]
    assert Image.open(io.BytesIO(figure.still)).width > 600


def test_trellis_is_small_and_keeps_networks_that_are_paths():
    history = torch.stack([autodeeplab.transitions(torch.randn(12, 4, 3)) for _ in range(500)])
    figure = widgets.trellis(history, path=autodeeplab.PUBLISHED_PATH, steps=range(0, 5000, 10))
    assert len(figure.to_html()) < 250_000 and len(widgets.trellis().to_html()) < 150_000
    assert figure.to_html() == widgets.trellis(history, autodeeplab.PUBLISHED_PATH, range(0, 5000, 10)).to_html()
    state = figure.state
    assert len(state["steps"]) == 60 and (state["steps"][0], state["steps"][-1]) == (0, 4990)
    kept = np.frombuffer(base64.b64decode(state["history"]), "<f4").reshape(60, 12, 4, 3)
    assert (kept[[0, -1]] == history[[0, -1]].numpy()).all()
    assert "strides 4, 4, 4, 8, 16, 8, 16, 16, 32, 32, 16, 8" in figure.alt and "at step 4990" in figure.alt
    assert Image.open(io.BytesIO(figure.still)).width > 600

    for layers in range(1, 25):
        networks = widgets._networks(layers)
        for levels, _ in networks.values():
            autodeeplab.check_path(levels)
            assert len(levels) == layers
        assert ("Published" in networks) == (layers == 12)
    twelve = {name: levels for name, (levels, _) in widgets._networks(12).items()}
    assert twelve["DeepLab v3"] == (0, 1, *10 * (2,))
    assert twelve["U-Net, DeconvNet"] == (0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1, 0)
    assert twelve["Stacked hourglass"] == 2 * (1, 2, 3, 2, 1, 0)


def test_trellis_names_what_is_no_history():
    good = autodeeplab.transitions(torch.zeros(5, 4, 3))
    with pytest.raises(ValueError, match=r"\(moments, layers, 4, 3\), got \(5, 4, 3\)"):
        widgets.trellis(good)
    with pytest.raises(ValueError, match=r"steps must be 2, one for each moment, got 3"):
        widgets.trellis(torch.stack([good, good]), steps=[0, 1, 2])
    for wrong in (float("nan"), 0.7, -0.5):
        bad = torch.stack([good, good])
        bad[1, 2, 0, 1] = wrong
        with pytest.raises(ValueError, match=r"sum to 1.*moment 1, layer 2, level 0 has"):
            widgets.trellis(bad)
    outside = good[None].clone()
    outside[0, 0, 3, 1] = 1  # nothing starts at stride 32 in the stem
    with pytest.raises(ValueError, match="moment 0, layer 0, level 3"):
        widgets.trellis(outside)
    with pytest.raises(ValueError, match="path must have one level for each of 5 layers, got 4"):
        widgets.trellis(good[None], path=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="leaves the trellis at layer 2"):
        widgets.trellis(good[None], path=(0, 2, 1, 1, 0))


def decoded(url: str) -> torch.Tensor:
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as picture:
        return torch.from_numpy(np.array(picture))


class Pyramid(torch.nn.Sequential):
    """Maps known by heart: channel c is c + 1 times the red of the picture, then minus 0.5; scores as they are."""

    def __init__(self) -> None:
        red, shift = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            red.weight.zero_()[:, 0, 0, 0] = torch.tensor([1.0, 2, 3, 4])
            shift.weight.copy_(torch.eye(4)[..., None, None])
            shift.bias.fill_(-0.5)
        super().__init__(red, torch.nn.MaxPool2d(2), shift, torch.nn.Upsample(scale_factor=2))


def test_scrubber_keeps_the_strongest_channels_and_their_values(val):
    image = torch.zeros(3, 8, 12)
    image[0, :4] = torch.linspace(0, 1, 12)
    model = Pyramid().train()
    state = widgets.layer_scrubber(model, [image], ["0", "2"], ["red", "shifted"], channels=2, data=val).state
    assert model.training
    assert [(layer["title"], layer["rows"], layer["cols"], layer["channels"]) for layer in state["layers"]] == [
        ("red", 8, 12, 4),
        ("shifted", 4, 6, 4),
    ]
    red, shifted = state["scenes"][0]["maps"]
    assert [one["channel"] for one in red] == [one["channel"] for one in shifted] == [3, 2]
    assert (red[0]["low"], red[0]["high"]) == (0, 2) and (shifted[0]["low"], shifted[0]["high"]) == pytest.approx(
        (-(0.5**0.5), 3.5**0.5), abs=1e-5
    )
    assert red[0]["zeros"] == pytest.approx((48 + 4) / 96, abs=1e-6) and shifted[0]["zeros"] == 0
    grey = decoded(red[0]["grey"])
    root = red[0]["low"] + grey / 255 * (red[0]["high"] - red[0]["low"])
    torch.testing.assert_close(root**2, 4 * image[0], atol=2 * 2 * 2 / 255, rtol=0)
    assert decoded(state["scenes"][0]["labels"]).unique().tolist() == [0, 3]


def test_scrubber_of_two_large_pictures_fits_a_notebook(val):
    torch.manual_seed(0)
    images = [torch.nn.functional.interpolate(val[i][0][None], (224, 224), mode="bilinear")[0] for i in range(2)]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 11, 3, padding=1), torch.nn.ReLU())
    figure = widgets.layer_scrubber(model, images, ["0", "1"])
    assert figure.state["classes"] == [] and [layer["title"] for layer in figure.state["layers"]] == ["0", "1"]
    assert len(figure.to_html()) <= widgets.MAX_HTML < 400_000
    assert figure.to_html() == widgets.layer_scrubber(model, images, ["0", "1"]).to_html()
    with pytest.raises(ValueError, match=r"over 390000; show fewer"):
        widgets.layer_scrubber(model, [torch.rand(3, 640, 640)], ["0"], channels=1)


def test_scrubber_says_what_it_needs(model, val):
    images = [val[0][0], val[1][0][:, :64]]
    with pytest.raises(ValueError, match=r"one size, got \[\(3, 96, 128\), \(3, 64, 128\)\]"):
        widgets.layer_scrubber(model, images, ["stage1"])
    with pytest.raises(ValueError, match=r"titles must be 1.*got 2"):
        widgets.layer_scrubber(model, images[:1], ["stage1"], ["a", "b"])
    flat = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.Unflatten(1, (2, 96, 128)))
    with pytest.raises(ValueError, match="1 gives no maps"):
        widgets.layer_scrubber(flat, images[:1], ["1"])


def test_explore_answers(model, val):
    box = widgets.explore(model, val, ["stage2", "score_pool3"])
    (picture, layer), shown = box.children[0].children, box.children[1]
    assert picture.max == len(val) - 1 and list(layer.options) == ["stage2", "score_pool3"]
    seen = [bytes(shown.value)]
    layer.value = "score_pool3"
    seen.append(bytes(shown.value))
    picture.value = 3
    seen.append(bytes(shown.value))
    assert len(set(seen)) == 3 and all(bytes(png[:4]) == b"\x89PNG" for png in seen)
    assert "dropout" not in widgets.explore(model, val).children[0].children[1].options


def test_compare_answers(model, val):
    other = sg.FCN(11, stride=32, pad=1, width=1 / 8)
    box = widgets.compare({"FCN-8s": model, "FCN-32s": other}, val)
    (_, choice), shown = box.children[0].children, box.children[1]
    before = bytes(shown.value)
    choice.value = "FCN-32s"
    assert bytes(shown.value) != before

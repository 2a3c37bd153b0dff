"""What the widgets hand to a page, to JupyterLab and to Colab; the live controls."""

import json
import re
import sys

import pytest
import torch

import segedu as sg
from segedu import widgets

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

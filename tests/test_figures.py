"""The interactive figures in a browser: as a module over http and as the book's plain script from a file."""

import base64
import contextlib
import functools
import http.server
import importlib.util
import io
import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segedu as sg
from segedu import widgets
from segedu.crf import exact
from segedu.metrics import VOID, Scores, class_boundary_f1, confusion_matrix
from segedu.models import autodeeplab
from segedu.models.deeplab_v3 import valid_weights
from segedu.models.pspnet import PyramidPooling
from segedu.receptive import receptive_fields

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"light": ("#ffffff", "#222832", "#0a7d91"), "dark": ("#14181e", "#ced6dd", "#3fb1c5")}  # the book's theme
CLASSES = len(widgets.LAB_CLASSES)
FIGURES = ["metric-lab", "skip-mixer", "upsampling-lab", "layer-scrubber", "field-lab", "crf-playground", "aspp-lab"]
FIGURES += ["pyramid-lab", "trellis"]
LAYERS, TITLES = ["stage1", "stage3", "score_pool3"], ["stage 1", "stage 3", "scores of pool 3"]


@functools.cache
def model() -> sg.FCN:
    torch.manual_seed(0)
    model = sg.FCN(11, stride=8, pad=1, width=1 / 8)
    names = ["score_fr", "score_pool4", "score_pool3"]
    for name in names:  # they start at zero
        torch.nn.init.normal_(getattr(model, name).weight)
    with sg.record(model, names) as maps:
        sg.predict(model, sg.Toytown("val")[0][0])
    for name in names:  # no class is ahead everywhere
        getattr(model, name).bias.data = -maps[name].mean((0, 2, 3))
    return model.eval()


@functools.cache
def figures() -> dict[str, widgets.Figure]:
    val = sg.Toytown("val")
    return {
        "metric-lab": widgets.metric_lab(),
        "skip-mixer": widgets.skip_mixer(model(), val, (0, 1)),
        "upsampling-lab": widgets.upsampling_lab(),
        "layer-scrubber": widgets.layer_scrubber(model(), [val[0][0], val[1][0]], LAYERS, TITLES, channels=2, data=val),
        "field-lab": widgets.field_lab(),
        "crf-playground": widgets.crf_playground(),
        "aspp-lab": widgets.aspp_lab(),
        "pyramid-lab": widgets.pyramid_lab(),
        "trellis": widgets.trellis(searched(), steps=SEARCH_STEPS),
        "trellis-uniform": widgets.trellis(),
        "trellis-decoded": widgets.trellis(searched(5), path=(0, 1, 1, 2, 1)),
    }


SEARCH_STEPS = (0, 10, 30, 60, 100)


@functools.cache
def searched(layers: int = 12) -> torch.Tensor:
    """Transitions that part more and more, as in a search."""
    beta = torch.randn(layers, 4, 3, generator=torch.manual_seed(0)).double()
    return torch.stack([autodeeplab.transitions(beta * step / 50) for step in SEARCH_STEPS])


def page_html(figure: widgets.Figure, mode: str, script: str) -> str:
    paper, ink, accent = COLOURS[mode]
    return f"""<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{figure.name}</title><link rel="icon" href="data:,">
<style>:root {{ color-scheme: {mode}; --pst-color-text-base: {ink}; --pst-color-primary: {accent} }}
body {{ background: {paper}; color: {ink}; margin: 8px }}</style>
{script}<main><h1>{figure.name}</h1>{figure._repr_mimebundle_()["text/html"]}</main></html>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder and address of pages NAME-MODE.html (module) and NAME-MODE-classic.html (the book's plain script)."""
    spec = importlib.util.spec_from_file_location("segedu_book", ROOT / "book/_ext/segedu_book.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)

    folder = tmp_path_factory.mktemp("figures")
    module = widgets.MODULE.read_text()
    (folder / "segedu.js").write_text(module)
    (folder / "segedu.classic.js").write_text(extension.classic(module))
    for name, figure in figures().items():
        for mode in COLOURS:
            html = page_html(figure, mode, '<script type="module" src="segedu.js"></script>')
            (folder / f"{name}-{mode}.html").write_text(html)
            html = page_html(figure, mode, '<script defer src="segedu.classic.js"></script>')
            (folder / f"{name}-{mode}-classic.html").write_text(html)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def show(browser, site):
    """show(name, mode, classic, width) -> a page. At the end: no console message, no request off the page's own site."""
    folder, address = site
    noise, contexts = [], []

    def show(name: str, mode: str = "light", classic: bool = False, width: int = 800, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: own(request.url) or noise.append(request.url))
        page.goto((folder / f"{name}-{mode}-classic.html").as_uri() if classic else f"{address}/{name}-{mode}.html")
        return page

    def own(url: str) -> bool:
        return url.startswith((address, folder.as_uri(), "data:"))

    yield show
    for context in contexts:
        context.close()
    assert noise == []


def value(page) -> dict:
    return page.evaluate("document.querySelector('seg-figure').value")


def labels_of(page, height: int, width: int) -> torch.Tensor:
    runs = np.array(value(page)["labels"]).reshape(-1, 2)
    return torch.from_numpy(np.repeat(runs[:, 0], runs[:, 1])).reshape(height, width)


def numbers(page, caption: str) -> dict[str, float]:
    """The visible rows of a table, as the reader sees them."""
    rows = page.get_by_role("table", name=caption).locator("tbody tr:visible").all()
    texts = {row.locator("th").inner_text().strip(): row.locator("td.value").inner_text() for row in rows}
    return {name: math.nan if text == "–" else float(text) for name, text in texts.items()}


def expected_lab_scores(page) -> tuple[Scores, float]:
    target = widgets._street_corner()
    labels = labels_of(page, *target.shape)
    classes = [*widgets.LAB_CLASSES]
    if value(page)["count_void"]:
        target = target.where(target != VOID, CLASSES)
        classes.append("void")
    scores = Scores(confusion_matrix(labels, target, len(classes)), classes=classes)
    return scores, class_boundary_f1(labels, target, len(classes), tolerance=0.025).nanmean().item()


def check_lab(page) -> Scores:
    """All numbers of the lab, computed and shown, are those of segedu.metrics on the same cells."""
    scores, boundary = expected_lab_scores(page)
    got = value(page)
    assert got["matrix"] == scores.matrix.flatten().tolist()
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "fw_iou"):
        assert got[key] == pytest.approx(getattr(scores, key), abs=1e-12), key
    assert got["boundary_f1"] == pytest.approx(boundary, abs=1e-12)
    np.testing.assert_allclose(np.array(got["iou"], float), scores.iou.numpy(), atol=1e-12)
    shown = numbers(page, "Scores")
    wanted = {
        "mean IU": scores.miou,
        "pixel accuracy": scores.pixel_accuracy,
        "mean accuracy": scores.mean_accuracy,
        "frequency weighted IU": scores.fw_iou,
        "boundary F1": boundary,
    }
    assert shown == pytest.approx(wanted, abs=6e-4)
    per_class = dict(zip(scores.classes, scores.iou.tolist(), strict=True))
    assert numbers(page, "IU of each class") == pytest.approx(per_class, abs=6e-4, nan_ok=True)
    return scores


def at_cell(page, row: float, col: float) -> tuple[float, float]:
    """Where on the page the middle of a cell of the painted picture is."""
    box = page.get_by_role("application").bounding_box()
    return box["x"] + (col + 0.5) / 32 * box["width"], box["y"] + (row + 0.5) / 24 * box["height"]


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_lab_opens_on_the_baseline_and_every_start_agrees_with_the_metrics(show, classic):
    page = show("metric-lab", classic=classic)
    scores = check_lab(page)
    assert scores.pixel_accuracy > 0.6 and scores.miou < 0.2
    seen = {}
    for void in (False, True):
        page.get_by_role("checkbox", name="Count void").set_checked(void)
        for preset in figures()["metric-lab"].state["presets"]:
            page.get_by_role("button", name=preset["name"], exact=True).click()
            seen[preset["name"], void] = check_lab(page).miou
    assert seen["Perfect", False] == seen["Rim as background", False] == 1
    assert seen["Perfect", True] < 0.9 and seen["Rim as background", True] < 0.9


def test_lab_paints_by_mouse(show):
    page = show("metric-lab", classic=True)
    before = check_lab(page).miou
    page.get_by_role("radio", name="pole").check(force=True)
    x, y = at_cell(page, 3, 12)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(*at_cell(page, 20, 12), steps=3)  # the cells between two pointer events are painted too
    page.mouse.up()
    scores = check_lab(page)
    assert scores.iou[4] == 1 and scores.miou > before
    page.get_by_role("radio", name="3 × 3").check(force=True)
    page.mouse.click(*at_cell(page, 0, 31))
    assert check_lab(page).matrix[0, 4] == 4  # a corner of the brush


def test_lab_paints_by_touch(show):
    page = show("metric-lab", width=390, has_touch=True)
    page.get_by_role("radio", name="pole").check(force=True)
    page.touchscreen.tap(*at_cell(page, 10, 12))
    assert check_lab(page).matrix[4, 4] == 1


def test_lab_paints_by_keyboard(show):
    page = show("metric-lab")
    paper = page.get_by_role("application")
    page.get_by_role("button", name="All background").focus()
    for _ in range(12):  # no more stops than this from the first button to the picture
        page.keyboard.press("Tab")
        if page.evaluate("document.querySelector('seg-figure').shadowRoot.activeElement?.tagName") == "CANVAS":
            break
    assert paper.evaluate("element => element.matches(':focus-visible')")
    page.keyboard.press("5")
    assert page.get_by_role("radio", name="pole").is_checked()
    page.keyboard.press("Shift+ArrowLeft")  # from row 12, column 16 to column 12, the pole
    for _ in range(3):
        page.keyboard.press("Space")
        page.keyboard.press("ArrowDown")
    assert check_lab(page).matrix[4].tolist() == [15, 0, 0, 0, 3]
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")


def test_mixer_is_the_model(show):
    page = show("skip-mixer", classic=True)
    val = sg.Toytown("val")
    for scene in (0, 1):
        image, target = val[scene]
        page.get_by_role("radio", name=str(scene + 1)).check(force=True)
        names = ["score_fr", "score_pool4", "score_pool3"]
        with sg.record(model(), names) as maps:
            sg.predict(model(), image)
        for button, weights in ("32 only", (1, 0, 0)), ("32 + 16", (1, 1, 0)), ("32 + 16 + 8", (1, 1, 1)):
            page.get_by_role("button", name=button, exact=True).click()
            mixed = widgets.mix(model(), [maps[name] for name in names], weights, image).argmax(0)
            labels = labels_of(page, *target.shape)
            assert labels.unique().numel() > 2
            assert (labels == mixed).float().mean() >= 0.999
            scores = Scores.of(labels, target, 11)
            for key in ("miou", "pixel_accuracy", "fw_iou", "boundary_f1"):
                assert value(page)[key] == pytest.approx(getattr(scores, key), abs=1e-12), key
            assert numbers(page, "Scores of this picture")["mean IU"] == pytest.approx(scores.miou, abs=6e-4)
        assert (labels == sg.predict(model(), image)).float().mean() >= 0.999  # weights 1, 1, 1: FCN-8s itself


def test_mixer_moves_by_keyboard_and_mouse(show):
    page = show("skip-mixer")
    before = value(page)
    middle = page.get_by_role("slider", name="Weight of the stride 16 scores")
    middle.focus()
    page.keyboard.press("ArrowRight")
    assert value(page)["weights"] == [1, 0.05, 0]
    page.keyboard.press("End")
    assert value(page)["weights"] == [1, 1, 0]
    assert page.get_by_role("button", name="32 + 16", exact=True).get_attribute("aria-pressed") == "true"
    fine = page.get_by_role("slider", name="Weight of the stride 8 scores")
    box = fine.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert value(page)["weights"] == [1, 1, pytest.approx(0.5, abs=0.06)]
    assert value(page)["miou"] != before["miou"] and value(page)["labels"] != before["labels"]


def test_mixer_looks_into_a_pixel(show):
    page = show("skip-mixer")
    page.get_by_role("button", name="32 + 16 + 8").click()
    page.get_by_role("application").focus()
    page.keyboard.press("Shift+ArrowUp")
    table = page.get_by_role("table", name="Pixel in row 41, column 65")
    image, _ = sg.Toytown("val")[0]
    with torch.no_grad():
        probabilities = model()(image[None])[0, :, 40, 64].softmax(0)
    name = sg.Toytown("val").classes[probabilities.argmax()]
    row = table.get_by_role("row", name=name)
    assert float(row.locator("td").last.inner_text()) == pytest.approx(probabilities.max().item(), abs=0.006)


def check_upsampling(page) -> dict:
    """The output of the lab is torch's for the same input and settings; so are the counts and the flat range."""
    got = value(page)
    method = ("nearest", "bilinear", "unpooling", "transposed convolution")[got["method"]]
    x = torch.tensor(got["input"], dtype=torch.float64).reshape(1, 1, 4, 4)
    ones = torch.ones_like(x)
    if method == "unpooling":
        pooled, switches = F.max_pool2d(x, 2, return_indices=True)
        assert got["switches"] == switches.flatten().tolist()
        places = torch.tensor([0, 2, 8, 10]).reshape(1, 1, 2, 2) if got["corner"] else switches
        output, counts = F.max_unpool2d(pooled, places, 2), F.max_unpool2d(torch.ones_like(pooled), places, 2)
        assert got["right"] == (places == switches).sum() and got["kept"] == 0.25
    elif method == "transposed convolution":
        kernel = torch.tensor(got["kernel"], dtype=torch.float64)
        kernel = kernel.reshape(1, 1, round(len(kernel) ** 0.5), -1)
        arguments = {"stride": got["stride"], "padding": got["padding"]}
        output = F.conv_transpose2d(x, kernel, **arguments)
        counts = F.conv_transpose2d(ones, torch.ones_like(kernel), **arguments)
        flat = F.conv_transpose2d(torch.ones(1, 1, 12, 12).double(), kernel, stride=got["stride"])[..., 5:-5, 5:-5]
        assert got["flat"] == pytest.approx([flat.min().item(), flat.max().item()], abs=1e-12)
        assert got["cut"] == pytest.approx(1 - counts.sum().item() / (16 * kernel.numel()), abs=1e-12)
    else:
        options = {} if method == "nearest" else {"align_corners": False}
        output = F.interpolate(x, scale_factor=2, mode=method, **options)
        each = torch.eye(16, dtype=torch.float64).reshape(1, 16, 4, 4)
        counts = (F.interpolate(each, scale_factor=2, mode=method, **options) > 0).sum(1)
    assert got["size"] == output.shape[-1] == output.shape[-2]
    np.testing.assert_allclose(got["output"], output.flatten().numpy(), atol=1e-12)
    assert got["counts"] == counts.flatten().tolist()
    return got


def pick(page, group: str, option: str) -> None:
    page.get_by_role("group", name=group).get_by_role("radio", name=option, exact=True).check(force=True)


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_upsampling_is_that_of_torch(show, classic):
    page = show("upsampling-lab", classic=classic)
    opening = check_upsampling(page)
    assert opening["size"] == 7 and set(opening["counts"]) == {1, 2, 4}  # kernel 3, stride 2: a checkerboard
    for preset in figures()["upsampling-lab"].state["presets"]:
        page.get_by_role("button", name=preset["name"]).click()
        for values in figures()["upsampling-lab"].state["maps"]:
            page.get_by_role("button", name=f"input: {values['name']}").click()
            assert check_upsampling(page)["input"] == values["values"]
    page.get_by_role("button", name="input: 6, 8, 3, 4").click()
    page.get_by_role("button", name="kernel: bilinear" if classic else "kernel: all 1").click()
    for kernel in (4, 3, 2):
        pick(page, "Kernel size", str(kernel))
        assert page.get_by_role("group", name="Padding").get_by_role("radio").count() == kernel
        for stride in (1, 2, 3):
            pick(page, "Stride", str(stride))
            for padding in (0, kernel - 1):
                pick(page, "Padding", str(padding))
                got = check_upsampling(page)
                assert got["size"] == 3 * stride - 2 * padding + kernel
                assert page.get_by_text(f"· {padding} + {kernel} = {got['size']}.").first.is_visible()
    for method in "nearest", "bilinear", "unpooling":
        pick(page, "Method", method)
        check_upsampling(page)
    assert value(page)["places"] == [5, 7, 8, 15] and value(page)["right"] == 4
    page.get_by_role("checkbox", name="Put values in the corner").check()
    assert check_upsampling(page)["right"] == 1  # the maximum 3 stands in its corner


def test_even_and_uneven_kernels_are_told_apart(show):
    page = show("upsampling-lab")
    assert page.get_by_text("as 1 to 4: a checkerboard").first.is_visible()
    page.get_by_role("button", name="kernel: bilinear").click()
    assert (
        value(page)["flat"] == [1, 1] and page.get_by_text("flat, at 1.").first.is_visible()
    )  # uneven counts, repaired
    page.get_by_role("button", name="Even 4/2").click()
    size, counts = value(page)["size"], value(page)["counts"]
    assert set(np.array(counts).reshape(size, size)[1:-1, 1:-1].flat) == {4}


def test_upsampling_is_edited_by_keyboard_and_mouse(show):
    page = show("upsampling-lab")
    page.get_by_role("button", name="input: all 1").focus()
    page.keyboard.press("Shift+Tab")  # the picture before the buttons
    assert page.get_by_role("application", name="Kernel").evaluate("element => element.matches(':focus-visible')")
    for key in ("ArrowRight", "-", "-", "-", "-", "-", "ArrowUp", "5"):
        page.keyboard.press(key)
    assert check_upsampling(page)["kernel"] == [1, 1, 5, 1, 1, -0.25, 1, 1, 1]
    box = page.get_by_role("application", name="Input").bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    assert page.get_by_text("Chosen: input (0, 3): 1, its stamp covers 4 cells").first.is_visible()
    page.get_by_role("button", name="more").click()
    assert check_upsampling(page)["input"][:4] == [1, 1, 1, 2]
    page.get_by_role("application", name="Output map").focus()
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert page.get_by_text("Chosen: output (0, 0): 1 = 1 × 1.").first.is_visible()
    assert page.get_by_role("button", name="more").is_disabled()
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")


def test_switches_move_with_the_maximum(show):
    page = show("upsampling-lab")
    pick(page, "Method", "unpooling")
    page.get_by_role("button", name="input: 6, 8, 3, 4").click()
    page.get_by_role("application", name="Input").focus()
    for key in ("ArrowLeft", "ArrowUp", "9"):
        page.keyboard.press(key)
    assert check_upsampling(page)["switches"] == [0, 7, 8, 15]


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_scrubber_shows_the_maps_of_the_model(show, classic):
    page = show("layer-scrubber", classic=classic)
    val = sg.Toytown("val")
    for scene in (0, 1):
        pick(page, "Picture", str(scene + 1))
        with sg.record(model(), LAYERS) as maps:
            labels = sg.predict(model(), val[scene][0])
        page.get_by_role("slider", name="Layer").focus()
        page.keyboard.press("Home")
        assert (value(page)["title"], value(page)["size"]) == ("input", [96, 128])
        for stop, (name, title) in enumerate(zip(LAYERS, TITLES, strict=True), 1):
            page.get_by_role("slider", name="Layer").focus()
            page.keyboard.press("ArrowRight")
            order = maps[name][0].amax((1, 2)).argsort(descending=True)
            for rank, chip in enumerate(["strongest", "2nd"]):
                pick(page, "Channel", chip)
                page.wait_for_function("!Number.isNaN(document.querySelector('seg-figure').value.value)")
                got, wanted = value(page), maps[name][0, order[rank]]
                assert (got["stop"], got["title"], got["size"]) == (stop, title, list(wanted.shape))
                assert got["channel"] == order[rank] and got["maximum"] == pytest.approx(wanted.max().item(), rel=1e-4)
                assert got["zeros"] == pytest.approx((wanted == 0).float().mean().item(), abs=1e-5)
                y, x = got["cell"]
                reach = wanted.abs().max().sqrt().item()  # a grey level is 1/255 of twice this, of the root
                root = math.copysign(abs(got["value"]) ** 0.5, got["value"])
                exact = wanted[y, x].sign().item() * wanted[y, x].abs().sqrt().item()
                assert root == pytest.approx(exact, abs=1.01 * reach / 255)
        assert got["value"] < 0 or wanted.min() < 0  # scores have both signs
        page.get_by_role("slider", name="Layer").focus()
        page.keyboard.press("End")
        y, x = value(page)["cell"]
        page.get_by_text(f"Row {y}, column {x}: {val.classes[labels[y, x]]}.").first.wait_for()


def test_scrubber_marks_the_same_place_in_every_layer(show):
    page = show("layer-scrubber")
    image = page.get_by_role("img", name="Picture 1").bounding_box()
    page.mouse.move(image["x"] + 0.76 * image["width"], image["y"] + 0.26 * image["height"])
    assert value(page)["cell"] == [24, 97]
    page.get_by_role("application").focus()
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert (value(page)["title"], value(page)["cell"]) == ("stage 3", [24 // 4, 97 // 4])
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("-")
    assert (value(page)["title"], value(page)["cell"]) == ("stage 1", [26, 94])  # the middle of the coarse cell
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")


def test_scrubber_plays_to_the_end_and_stops(show):
    page = show("layer-scrubber")
    page.clock.install()
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(2000)
    assert value(page)["stop"] == 2
    page.clock.run_for(5000)
    assert value(page)["title"] == "answer" and page.get_by_role("button", name="Play").is_visible()
    still = show("layer-scrubber", reduced_motion="reduce")
    assert still.get_by_role("slider", name="Layer").is_visible()
    assert still.get_by_role("button", name="Play").count() == 0


def check_stack(page) -> dict:
    """Fields, strides and paths of the lab are those of the code that it shows: by segedu and by torch's gradient."""
    got = value(page)
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(page.locator("textarea").input_value(), namespace)
    stack, chosen = namespace["stack"], got["chosen"]
    assert len(stack) == len(got["layers"])
    assert printed.getvalue().startswith(f"Field(size={got['fields'][-1]}, stride={got['jumps'][-1]}, ")
    if got["fields"][-1] < 1000:
        known = receptive_fields(stack, [str(i) for i in range(len(stack))]).values()
        assert got["fields"] == [field.size for field in known] and got["jumps"] == [field.stride for field in known]

    size, used = got["fields"][chosen], got["used"][chosen]
    assert got["total"] == [n**2 for n in got["fields"]] and got["drawn"] == (size <= 161)
    rows = page.get_by_role("table").locator("tbody tr").all()
    for i, (row, module) in enumerate(zip(rows, stack, strict=True)):
        kernel, _, rate = geometry(module)
        if isinstance(module, torch.nn.Conv2d):  # the map keeps its size at stride 1, or loses 1
            assert module.padding == 2 * (rate * (kernel - 1) // 2,)
        shown = [rate * (kernel - 1) + 1, got["fields"][i], got["jumps"][i]]
        cells = row.locator("td").all_inner_texts()
        assert cells == [*map(str, shown), f"{got['used'][i]} of {got['fields'][i] ** 2}"]
        assert got["extents"][i] == shown[0] and (row.get_attribute("aria-current") == "true") == (i == chosen)
    if got["drawn"]:
        image = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
        cell = image
        for module in stack[: chosen + 1]:  # a window counts as a kernel of ones
            kernel, stride, rate = geometry(module)
            ones = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
            cell = F.conv2d(cell, ones, stride=stride, dilation=rate)
        assert cell.numel() == 1
        (paths,) = torch.autograd.grad(cell.sum(), image)
        assert torch.equal(paths[0, 0], torch.outer(*2 * [torch.tensor(got["counts"], dtype=torch.float64)]))
        assert used == (paths > 0).sum() and got["paths"] == paths[0, 0][tuple(got["cell"])]
    holes = f"{size**2 - used} are holes." if used < size**2 else "there are no holes."
    layer = "The last layer" if chosen == len(stack) - 1 else f"Layer {chosen + 1}"
    sentence = f"{layer} sees {size} × {size} pixels; {used} of {size**2} are used, {holes}"
    assert page.locator("p.note", has_text=sentence).count() == 1
    return got


def geometry(module) -> tuple[int, int, int]:
    """Kernel, stride and dilation of a convolution or pooling, the same along both axes."""
    values = (module.kernel_size, module.stride, module.dilation)
    assert all(isinstance(v, int) or v[0] == v[1] for v in values)
    return tuple(v if isinstance(v, int) else v[0] for v in values)


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_stacks_see_what_their_code_sees(show, classic):
    page = show("field-lab", classic=classic)
    assert check_stack(page)["fields"] == [3, 5, 7]
    seen = {}
    for preset in figures()["field-lab"].state["presets"]:
        button = page.get_by_role("button", name=preset["name"], exact=True)
        button.click()
        got = seen[preset["name"]] = check_stack(page)
        assert button.get_attribute("aria-pressed") == "true" and got["layers"] == preset["layers"]
        pick(page, "Layer", "2")
        assert check_stack(page)["chosen"] == 1
    assert seen["Doubling 1, 2, 4"]["fields"] == [3, 7, 15]
    assert (seen["Doubling 1, 2, 4"]["used"][-1], seen["Doubling 1, 2, 4"]["total"][-1]) == (225, 225)
    gridding = seen["Gridding 2, 2, 2"]
    assert gridding["extents"] == [5, 5, 5] and gridding["fields"] == [5, 9, 13]
    assert (gridding["used"][-1], gridding["total"][-1]) == (49, 169)
    assert gridding["counts"] == [1, 0, 3, 0, 6, 0, 7, 0, 6, 0, 3, 0, 1]
    assert seen["1, 2, 5"]["fields"][-1] == 17 and min(seen["1, 2, 5"]["counts"]) == 1
    context = seen["Context module"]  # Yu and Koltun, Table 1
    assert context["fields"] == [3, 5, 9, 17, 33, 65, 67, 67] and context["used"] == context["total"]
    assert seen["Pools (VGG)"]["fields"] == [3, 5, 6, 10, 14, 16, 24]
    assert seen["Pools (VGG)"]["jumps"] == [1, 1, 2, 2, 2, 4, 4]


def test_stack_is_built_by_keyboard(show):
    page = show("field-lab")

    def key(group: str, *keys: str) -> None:
        page.get_by_role("group", name=group, exact=True).locator("input:checked").focus()
        for one in keys:
            page.keyboard.press(one)

    page.get_by_role("button", name="Add a layer").press("Enter")
    assert check_stack(page)["fields"] == [3, 5, 7, 9]
    key("Kind", "ArrowRight")
    key("Stride", "ArrowRight")
    got = check_stack(page)
    assert got["layers"][-1] == {"kind": "pooling", "kernel": 3, "stride": 2, "rate": 1} and got["jumps"][-1] == 2
    key("Window", "ArrowLeft")
    assert check_stack(page)["fields"][-1] == 8
    page.get_by_role("button", name="Add a layer").press("Enter")
    assert check_stack(page)["fields"][-1] == 12  # 8 + 2 · 2
    key("Kernel", "ArrowLeft", "ArrowLeft")
    assert check_stack(page)["fields"][-1] == 8
    key("Kind", "ArrowRight")  # no 1 × 1 window: 2 × 2
    key("Rate", "ArrowRight")
    got = check_stack(page)
    assert got["layers"][-1] == {"kind": "pooling", "kernel": 2, "stride": 1, "rate": 2} and got["fields"][-1] == 12
    key("Layer", *4 * ["ArrowLeft"])
    key("Stride", "ArrowRight")
    key("Kernel", "ArrowLeft", "ArrowLeft")  # a 1 × 1 kernel with stride 2: holes
    got = check_stack(page)
    assert got["chosen"] == 0 and got["fields"][:2] == [1, 5] and got["used"][:2] == [1, 9]
    for left in range(4, 0, -1):
        page.get_by_role("button", name="Remove the last").press("Enter")
        assert len(check_stack(page)["layers"]) == left
    assert page.get_by_role("button", name="Remove the last").is_disabled()
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")


def test_pixels_tell_their_paths(show):
    page = show("field-lab")
    page.get_by_role("button", name="Gridding").click()
    box = page.get_by_role("application").bounding_box()
    page.mouse.move(box["x"] + 4.5 / 13 * box["width"], box["y"] + 2.5 / 13 * box["height"])
    assert page.get_by_text("Row 2, column 4: 18 paths, 3 × 6.").first.is_visible()
    page.get_by_role("application").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_text("Row 3, column 4: no path, a hole.").first.is_visible()
    page.keyboard.press("Shift+ArrowUp")
    assert (value(page)["cell"], value(page)["paths"]) == ([0, 4], 6)
    assert page.get_by_text("All taps lie multiples of 2 pixels apart").first.is_visible()
    page.get_by_role("button", name="3, 3, 3", exact=True).click()
    pick(page, "Rate", "6")
    got = check_stack(page)
    assert got["counts"] == [1, 2, 3, 2, 1, 0] * 2 + [1, 2, 3, 2, 1]
    assert page.get_by_text("Some taps are so far apart").first.is_visible()


def test_field_too_large_to_draw_is_told(show):
    page = show("field-lab")
    page.get_by_role("button", name="Context module").click()
    assert page.get_by_role("button", name="Add a layer").is_disabled()
    pick(page, "Kernel", "7")
    pick(page, "Rate", "12")
    assert check_stack(page)["fields"][-1] == 67 + 72 and page.get_by_role("application").is_visible()
    pick(page, "Rate", "16")
    assert check_stack(page)["fields"][-1] == 67 + 96 and page.get_by_role("application").count() == 0
    assert page.get_by_text("Not drawn: 163 × 163 pixels are too many").first.is_visible()
    for layer in range(1, 9):
        for group, option in ("Layer", layer), ("Kernel", 7), ("Stride", 2), ("Rate", 16):
            pick(page, group, str(option))
    got = check_stack(page)  # the largest stack that there is
    assert (got["fields"][-1], got["jumps"][-1]) == (1 + 96 * 255, 256)
    pick(page, "Layer", "1")
    assert check_stack(page)["drawn"] and page.get_by_role("application").is_visible()


def test_code_is_copied(show):
    page = show("field-lab", permissions=["clipboard-read", "clipboard-write"])
    page.locator("summary").press("Enter")
    page.get_by_role("button", name="Copy").click()
    assert page.get_by_text("Copied.").is_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("textarea").input_value()


KNOBS = ("w", "sxy", "srgb", "w_smooth", "sxy_smooth")


def check_crf(page) -> dict:
    """Q, messages and free energy of the playground are those of segedu.crf.exact with the same settings and steps."""
    got = value(page)
    image, unary, target = widgets._astronaut()
    w, sxy, srgb, w_smooth, sxy_smooth = (got[name] for name in KNOBS)
    unary = unary.flatten(1).T
    kernels = [
        (w, exact.kernel(exact.features(image, sxy, srgb))),
        (w_smooth, exact.kernel(exact.features(image, sxy_smooth))),
    ]
    steps = got["steps"]
    q = exact.mean_field(unary, kernels, steps)
    np.testing.assert_allclose(np.array(got["q"]).reshape(3, -1), q.T, atol=1e-4)

    at = got["cell"][0] * target.shape[1] + got["cell"][1]
    score = -unary[at]
    assert got["unary"] == pytest.approx(score.tolist(), abs=1e-6)
    if steps:
        before = exact.mean_field(unary, kernels, steps - 1)
        for name, (weight, kernel) in zip(("colour", "place"), kernels, strict=True):
            assert got[name] == pytest.approx((weight * kernel[at] @ before).tolist(), abs=1e-3)
            score = score + torch.tensor(got[name])
    np.testing.assert_allclose(np.array(got["q"]).reshape(3, -1)[:, at], score.softmax(0), atol=1e-4)  # by hand

    weights = sum(weight * kernel[at] for weight, kernel in kernels)
    assert got["weight"] == pytest.approx(weights.sum().item(), abs=1e-4)
    if weights.sum() > 0:
        same = weights[target.flatten() == target.flatten()[at]].sum() / weights.sum()
        assert got["same"] == pytest.approx(same.item(), abs=1e-5)
        loudest = weights.sort(descending=True).values.cumsum(0) / weights.sum()
        assert loudest[got["most"] - 1] >= 0.5 - 1e-6 and (got["most"] == 1 or loudest[got["most"] - 2] < 0.5 + 1e-6)

    labels = np.array(got["q"]).reshape(3, -1).argmax(0)
    assert len(got["trail"]) == steps + 1 and got["trail"][-1]["wrong"] == (labels != target.flatten().numpy()).sum()
    in_double = [(weight, kernel.double()) for weight, kernel in kernels]
    energies = [one["energy"] for one in got["trail"]]
    assert energies[-1] == pytest.approx(exact.free_energy(q.double(), unary, in_double), abs=0.02)
    assert (np.diff(energies) < 1e-3).all()  # the kernels are positive definite, so every step goes down
    return got


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_mean_field_in_the_page_is_exact(show, classic):
    page = show("crf-playground", classic=classic)
    opening = check_crf(page)
    assert (opening["steps"], opening["trail"][0]["wrong"]) == (0, 302)
    wrong, same = {}, {}
    for preset in figures()["crf-playground"].state["presets"]:
        button = page.get_by_role("button", name=preset["name"], exact=True)
        button.click()
        got = check_crf(page)
        assert button.get_attribute("aria-pressed") == "true" and got["steps"] == 10
        assert {name: got[name] for name in KNOBS} == preset["set"]
        wrong[preset["name"]], same[preset["name"]] = got["trail"][-1]["wrong"], got["same"]
        page.get_by_role("button", name="Restart").click()
        page.get_by_role("button", name="Step", exact=True).click()
        assert check_crf(page)["steps"] == 1
    assert wrong["No CRF"] == 302 and wrong["Colour and place"] < 50
    assert all(wrong[name] > 150 for name in wrong if name != "Colour and place")
    assert same["Colour and place"] > 0.9 > 0.7 > same["Place only, short range"] > same["Place only, long range"]


def test_playground_follows_its_sliders(show):
    page = show("crf-playground")
    page.get_by_role("button", name="10 steps").click()
    moves = {
        "w: weight": ("w", 6.5),
        "sxy: its": ("sxy", 13),
        "srgb: its": ("srgb", 25),
        "w_smooth: weight": ("w_smooth", 2.5),
        "sxy_smooth: its": ("sxy_smooth", 1.5),
    }
    for label, (name, moved) in moves.items():
        page.get_by_role("slider", name=label).press("ArrowRight")
        got = check_crf(page)
        assert got[name] == moved and got["steps"] == 10
    assert page.get_by_text("Settings of your own.").is_visible()
    page.get_by_role("slider", name="srgb: its").press("Home")  # the narrowest: a pixel hears its like only
    page.get_by_role("slider", name="sxy_smooth: its").press("Home")
    assert (check_crf(page)["srgb"], got["w"]) == (5, 6.5)
    page.get_by_role("button", name="10 steps").click()
    assert value(page)["steps"] == 20 and page.get_by_role("button", name="10 steps").is_disabled()
    page.get_by_role("slider", name="w: weight").press("Home")
    page.get_by_role("slider", name="w_smooth").press("Home")
    got = check_crf(page)
    assert (got["steps"], got["weight"], got["trail"][-1]["wrong"]) == (20, 0, 302)
    assert page.get_by_text("Both weights are 0: it hears nobody.").first.is_visible()


def test_playground_shows_the_five_steps_at_a_pixel(show):
    page = show("crf-playground")
    page.get_by_role("application").focus()
    for key in ("ArrowUp", "Shift+ArrowRight", "+", "+"):
        page.keyboard.press(key)
    got = check_crf(page)
    assert (got["cell"], got["steps"]) == ([10, 14], 2)
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")
    rows = page.get_by_role("table", name="The five steps at (10, 14)").locator("tbody tr").all()
    cells = [[float(text.replace("−", "-")) for text in row.locator("td").all_inner_texts()] for row in rows]
    colour, place, weighted, weighted_place, penalty, unary, total, q = np.array(cells)
    close = {"atol": 0.002 * (got["w"] + got["w_smooth"])}
    np.testing.assert_allclose(weighted, got["w"] * colour, **close)
    np.testing.assert_allclose(weighted_place, got["w_smooth"] * place, **close)
    both = weighted + weighted_place
    np.testing.assert_allclose(penalty, both - both.sum(), **close)
    np.testing.assert_allclose(unary, np.log([0.175, 0.65, 0.175]), atol=6e-4)  # the network says head
    np.testing.assert_allclose(total, penalty + unary, **close)
    np.testing.assert_allclose(q, np.exp(total) / np.exp(total).sum(), atol=0.002)

    box = page.get_by_role("img", name="Labels after step 2").bounding_box()
    page.mouse.move(box["x"] + 39.5 / 42 * box["width"], box["y"] + 8.5 / 36 * box["height"])
    assert check_crf(page)["cell"] == [8, 39]
    assert page.get_by_text("Row 8, column 39 is wall and labelled").first.is_visible()
    pick(page, "Third picture", "Q of suit")
    assert page.get_by_role("application", name="Q of suit").is_visible()
    trail = page.get_by_role("table", name="Labels that changed").locator("tbody tr").all()
    shown = [row.locator("td").all_inner_texts()[:2] for row in trail]
    assert shown == [["–", "302"], *([str(one["changed"]), str(one["wrong"])] for one in got["trail"][1:])]


COUNTS = (9, 6, 4, 3, 2, 1)


def check_aspp(page) -> dict:
    """Taps, counts, shares and means are those of `valid_weights` and of convolutions of ones; the tables show them."""
    got = value(page)
    size, rates, chosen = tuple(got["map"]), got["rates"], got["chosen"]
    row, col = got["cell"]
    for i, rate in enumerate(rates):
        kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
        seen = F.conv2d(torch.ones(1, 1, *size).double(), kernel, padding=rate, dilation=rate)[0, 0]
        assert torch.equal(seen.long(), valid_weights(rate, size))
        assert got["here"][i] == seen[row, col] == sum(tap["valid"] for tap in got["taps"][i])
        padded = F.pad(torch.ones(size), (rate,) * 4)
        for tap, (dy, dx) in zip(got["taps"][i], itertools.product((-rate, 0, rate), repeat=2), strict=True):
            assert (tap["row"], tap["col"]) == (row + dy, col + dx)
            assert tap["valid"] == (padded[row + dy + rate, col + dx + rate] == 1)
        assert got["means"][i] == pytest.approx(seen.mean().item())
        assert got["means"][i] == pytest.approx(math.prod((n + 2 * max(n - rate, 0)) / n for n in size))
        assert got["kernels"][i] == [3 if rate < n else 1 for n in size]
    assert got["counts"] == valid_weights(rates[chosen], size).flatten().tolist()
    for rate, cells in enumerate(got["curve"], 1):
        assert cells == [(valid_weights(rate, size) == n).sum() for n in COUNTS] and sum(cells) == math.prod(size)
    assert len(got["curve"]) == 72

    table = page.get_by_role("table", name="% of the cells")
    kinds = [int(text) for text in table.locator("thead th").all_inner_texts()[1:-1]]
    assert kinds == [n for k, n in enumerate(COUNTS) if any(cells[k] for cells in got["curve"])]
    rows = table.locator("tbody tr").all()
    assert len(rows) == len(rates)
    for i, line in enumerate(rows):
        *shares, mean = line.locator("td").all_inner_texts()
        expected = [(valid_weights(rates[i], size) == n).double().mean().item() for n in kinds]
        texts = ["–" if share == 0 else "< 0.1" if share < 0.001 else share for share in expected]
        for text, share in zip(shares, texts, strict=True):
            assert text == share if isinstance(share, str) else float(text) == pytest.approx(100 * share, abs=0.051)
        assert float(mean) == pytest.approx(got["means"][i], abs=0.0051)
        assert (line.get_attribute("aria-current") == "true") == (i == chosen)
    sentence = f"Taps on the map at row {row}, column {col}: {got['here'][0]} of 9 at rate {rates[0]}"
    assert page.locator("p.note", has_text=sentence).count() == 1
    return got


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_valid_taps_are_those_of_a_convolution_of_ones(show, classic):
    page = show("aspp-lab", classic=classic)
    opening = check_aspp(page)
    assert (opening["map"], opening["rates"], opening["here"]) == ([33, 33], [6, 12, 18], [9, 6, 4])
    state = figures()["aspp-lab"].state
    for area in state["maps"]:
        pick(page, "Map", area["text"])
        for preset in state["presets"]:
            button = page.get_by_role("button", name=preset["name"], exact=True)
            button.click()
            got = check_aspp(page)
            assert button.get_attribute("aria-pressed") == "true" and got["map"] == [area["rows"], area["cols"]]
            assert all(got[name] == preset[name] for name in ("rates", "one", "pooling"))
            warned = page.get_by_text(f"The map chosen above has stride {area['stride']}.").count()
            assert warned == (preset["stride"] != area["stride"])
    pick(page, "Map", state["maps"][0]["text"])
    cells = check_aspp(page)["curve"][23]  # v3, Fig. 4, at rate 24
    assert [round(n / 65**2, 3) for n in cells] == [0.068, 0.386, 0.545, 0, 0, 0]


def test_fields_are_those_of_deeplab_v3(show):
    page = show("aspp-lab")
    for area, preset, stride in ("33 × 33: 513 px, stride 16", "v3: 6", 16), ("65 × 65: 513 px, stride 8", "v3: 12", 8):
        pick(page, "Map", area)
        page.get_by_role("button", name=preset).click()
        got = check_aspp(page)
        with torch.device("meta"):
            model = sg.DeepLabV3(21, depth=101, output_stride=stride)
        names = ["backbone.layer4", *(f"aspp.convs.{i}" for i in (1, 2, 3))]
        fields = receptive_fields(model, names)
        assert [2 * [fields[name].size] for name in names] == [2 * [got["trunk"]], *got["pixels"]]
        assert got["fields"] == [2 * [2 * rate + 1] for rate in got["rates"]] and got["rates"] == list(model.aspp.rates)
        rows = page.get_by_role("table", name="Each branch").locator("tbody tr").all()
        shown = [row.locator("td").all_inner_texts() for row in rows]
        assert shown[:3] == [
            ["3 × 3", str(cells[0]), str(px[0])] for cells, px in zip(got["fields"], got["pixels"], strict=True)
        ]
        assert shown[3:] == [["1 × 1", "1", str(got["trunk"])], ["mean", str(got["map"][0]), "all"]]


def test_lab_says_when_a_branch_is_a_1x1(show):
    page = show("aspp-lab")
    pick(page, "Map", "13 × 17: Toytown, stride 8")
    page.get_by_role("button", name="One rate").click()
    rate = page.get_by_role("slider", name="Rate of this branch")
    said = {}
    for _ in range(6):
        rate.press("ArrowRight")
        got = check_aspp(page)
        said[got["rates"][0]] = page.locator("p.note").nth(1).inner_text()
    assert list(said) == [13, 14, 15, 16, 17, 18] and got["kernels"] == [[1, 1]] and got["fields"] == [[1, 1]]
    for now, words in said.items():
        convolution = "1 × 1" if now >= 17 else "1 × 3"
        assert f"This branch has become a {convolution} convolution." in words
        x, weight = torch.rand(1, 1, 13, 17).double(), torch.rand(1, 1, 3, 3).double()
        kept = weight[..., 1:2, 1:2] if now >= 17 else weight[..., 1:2, :]
        padding = 0 if now >= 17 else (0, now)
        torch.testing.assert_close(
            F.conv2d(x, weight, padding=now, dilation=now), F.conv2d(x, kept, padding=padding, dilation=now)
        )
    rate.press("Home")
    assert check_aspp(page)["rates"] == [1] and page.get_by_text("Rate 1: 165 cells of 221 have all nine").count()
    pick(page, "Map", "33 × 33: 513 px, stride 16")
    page.get_by_role("button", name="v3: 12").click()
    pick(page, "Branch", "1")
    words = page.locator("p.note").nth(1).inner_text()
    assert words.startswith("Rate 12: 81 cells of 1089 have all nine") and "Rate 36 is not below" in words
    rate.press("End")
    assert page.get_by_text("Rates 72 and 36 are not below the sides of this map, 33 cells").first.is_visible()
    assert page.get_by_text("Branches of your own.").is_visible() and check_aspp(page)["rates"] == [72, 24, 36]


def test_cells_and_rates_are_chosen_by_keyboard_and_pointer(show):
    page = show("aspp-lab")
    page.get_by_role("application").focus()
    for key in ("ArrowUp", "Shift+ArrowRight", "+", "+", "-"):
        page.keyboard.press(key)
    got = check_aspp(page)
    assert (got["cell"], got["rates"]) == ([7, 18], [6, 12, 19])
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Shift+ArrowUp")
    assert check_aspp(page)["cell"] == [0, 18]  # the border holds

    def point(view, row: float, col: float, rows: int, cols: int, act) -> None:
        view.scroll_into_view_if_needed()
        box = view.bounding_box()
        act(box["x"] + (col + 0.5) / cols * box["width"], box["y"] + (row + 0.5) / rows * box["height"])

    point(page.get_by_role("application"), 30, 2, 33, 33, page.mouse.move)
    assert check_aspp(page)["cell"] == [30, 2]
    taps = page.get_by_role("img", name="Taps of 3 branches")
    point(taps, 19 + 5, 19 + 7, 71, 71, page.mouse.move)
    assert check_aspp(page)["cell"] == [5, 7]
    point(taps, 2, 70, 71, 71, page.mouse.move)  # in the padding: the nearest cell
    assert check_aspp(page)["cell"] == [0, 32]
    pick(page, "Branch", "2")
    point(page.get_by_role("img", name="Curve"), 0, 39, 1, 72, page.mouse.click)
    assert check_aspp(page)["rates"] == [6, 40, 19]
    for name in "1 × 1", "Image pooling":
        page.get_by_role("checkbox", name=name).press("Space")
    got = check_aspp(page)
    assert not got["one"] and not got["pooling"]
    assert page.get_by_role("table", name="Each branch").locator("tbody tr").count() == 3


SOURCES = ("colour", "brightness", "blue", "water (labels)", "road (labels)")


@functools.cache
def pyramid_sources() -> list[list[torch.Tensor]]:
    """Of both pictures each of SOURCES as (channels, 96, 128)."""
    kept = []
    for image, target in widgets._same_hull():
        rgb = (image * 255).round().double()
        kept.append([rgb, rgb.mean(0, keepdim=True), rgb[2:], *((target == k)[None].double() for k in (1, 2))])
    return kept


def check_pyramid(page) -> dict:
    """Bins, means and enlarged values are those of torch for both pictures; the tables show them."""
    got = value(page)
    size, (row, col) = tuple(got["map"]), got["cell"]
    side = figures()["pyramid-lab"].state["left"]
    maps, enlarged = [], []
    for source, means in zip((of[got["channel"]] for of in pyramid_sources()), got["means"], strict=True):
        cells = F.adaptive_avg_pool2d(source[..., side : side + 96] if size[0] == size[1] else source, size)
        maps.append(cells)
        enlarged.append([cells])
        for n, channels in zip(got["levels"], means, strict=True):
            pooled = F.adaptive_avg_pool2d(cells, n)
            torch.testing.assert_close(torch.tensor(channels, dtype=pooled.dtype).view(pooled.shape), pooled)
            enlarged[-1].append(F.interpolate(pooled[None], size, mode="bilinear", align_corners=True)[0])
    values = [[of[:, row, col] for of in one] for one in enlarged]
    for of, expected in zip(got["values"], values, strict=True):
        for one, other in zip(of, expected, strict=True):
            assert one == pytest.approx(other.tolist(), abs=1e-9)
    apart = [(a - b).abs().mean().item() for a, b in zip(*values, strict=True)]
    assert got["apart"] == pytest.approx(apart, abs=1e-9)

    lone = torch.zeros(1, *size)
    lone[0, row, col] = 1
    for n, cuts, (down, across) in zip(got["levels"], got["cuts"], got["bins"], strict=True):
        for length, found in zip(size, cuts, strict=True):
            shares = F.adaptive_avg_pool1d(torch.eye(length)[None], n)[0].T  # row i: what bin i takes
            assert [[int(x.nonzero().min()), int(x.nonzero().max()) + 1] for x in shares] == found
        bins = F.adaptive_avg_pool2d(lone, n)[0].nonzero().tolist()
        assert list(itertools.product(down, across)) == [tuple(at) for at in bins]
    with torch.device("meta"):
        assert got["total"] == PyramidPooling(2048, got["levels"]).c_out == 2048 + len(got["levels"]) * got["width"]

    digits = 2 if "labels" in SOURCES[got["channel"]] else 0
    rows = page.get_by_role("table", name="What the head is given").locator("tbody tr").all()
    shown = [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in rows]
    assert [cells[0] for cells in shown] == ["2048"] + [str(got["width"])] * len(got["levels"])
    for k, (_, water, road, difference) in enumerate(shown):
        for text, expected in zip((water, road), (values[0][k], values[1][k]), strict=True):
            assert [float(one) for one in text.split()] == pytest.approx(expected.tolist(), abs=0.501 * 10**-digits)
        assert float(difference) == pytest.approx(apart[k], abs=0.501 * 10**-digits)
    current = [row.get_attribute("aria-current") == "true" for row in rows]
    assert current == [False] + [n == got["level"] for n in got["levels"]]
    rows = page.get_by_role("table", name="The bins that the cell lies in").locator("tbody tr")
    assert rows.count() == sum(len(down) * len(across) for down, across in got["bins"])
    return got


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_bins_means_and_enlarged_maps_are_those_of_torch(show, classic):
    page = show("pyramid-lab", classic=classic)
    opening = check_pyramid(page)
    assert (opening["map"], opening["levels"], opening["level"], opening["total"]) == ([60, 60], [1, 2, 3, 6], 6, 4096)
    assert opening["apart"][0] == 0  # the same hull
    state = figures()["pyramid-lab"].state
    for area in state["maps"]:
        pick(page, "Map", area["text"])
        for preset in state["presets"]:
            button = page.get_by_role("button", name=preset["name"], exact=True)
            button.click()
            got = check_pyramid(page)
            assert button.get_attribute("aria-pressed") == "true" and got["levels"] == list(preset["bins"])
            assert got["map"] == [area["rows"], area["cols"]] and got["pixels"] == [area["height"], area["width"]]
    for source in SOURCES:
        pick(page, "Channel", source)
        assert SOURCES[check_pyramid(page)["channel"]] == source


def test_lab_says_where_bins_overlap(show):
    page = show("pyramid-lab")
    said = {
        "60 × 60: 473 px": "6 × 6 bins. 60 rows and columns: 6 bins of 10, none overlap.",
        "90 × 90: 713 px": "6 × 6 bins. 90 rows and columns: 6 bins of 15, none overlap.",
        "65 × 65: 513 px": "6 × 6 bins. 65 rows and columns do not divide by 6: the bins are 0–10, 10–21, 21–32, 32–43, "
        "43–54, 54–64. In two bins: 10, 21, 32, 43, 54.",
        "13 × 17: Toytown": "6 × 6 bins. 13 rows do not divide by 6: the bins are 0–2, 2–4, 4–6, 6–8, 8–10, 10–12. In two "
        "bins: 2, 4, 6, 8, 10. 17 columns do not divide by 6: the bins are 0–2, 2–5, 5–8, 8–11, 11–14, 14–16. In "
        "two bins: 2, 5, 8, 11, 14.",
        "12 × 16: Toytown, unpadded": "6 × 6 bins. 12 rows: 6 bins of 2, none overlap. 16 columns do not divide by 6: the bins "
        "are 0–2, 2–5, 5–7, 8–10, 10–13, 13–15. In two bins: 2, 5, 10, 13.",
    }
    for area, words in said.items():
        pick(page, "Map", area)
        assert page.get_by_text(words, exact=True).is_visible(), area
    page.get_by_role("application").focus()
    page.keyboard.press("1")
    assert page.get_by_text("1 bin: the whole map of 12 × 16 cells.", exact=True).is_visible()


def test_levels_share_the_channels_and_one_stays(show):
    page = show("pyramid-lab")
    page.get_by_role("checkbox", name="6", exact=True).press("Space")
    got = check_pyramid(page)
    assert (got["levels"], got["level"], got["width"], got["total"]) == ([1, 2, 3], 3, 682, 4094)
    words = "A pyramid of your own. Channels: 2048 + 3 × 2048/3 = 2048 + 3 × 682 = 4094 (rounded down)."
    assert page.get_by_text(words).first.is_visible()
    offered = page.get_by_role("group", name="Drawn over the picture").get_by_role("radio")
    assert offered.count() == 3  # of the visible
    page.get_by_role("checkbox", name="8", exact=True).press("Space")
    assert (check_pyramid(page)["levels"], value(page)["level"]) == ([1, 2, 3, 8], 8)
    page.get_by_role("button", name="Global").click()
    got = check_pyramid(page)
    assert (got["levels"], got["width"], got["total"]) == ([1], 2048, 4096)
    last = page.get_by_role("checkbox", name="1", exact=True)
    last.press("Space")
    assert last.is_checked() and check_pyramid(page)["levels"] == [1]
    assert page.get_by_text("One level has to stay").first.is_visible()
    assert page.get_by_text("1 bin is furthest apart").first.is_visible()


def test_the_same_hull_differs_in_its_surroundings_only(show):
    page = show("pyramid-lab")
    page.get_by_role("button", name="1 to 8").click()
    for source, coarse, fine in ("water (labels)", 0.2, 0.01), ("road (labels)", 0.15, 0.05):
        pick(page, "Channel", source)
        apart = check_pyramid(page)["apart"]
        assert apart[0] == 0 and min(apart[1:4]) > coarse and apart[8] < fine  # 8 x 8 bins lie within the hull
    assert page.get_by_text("the cell itself is the same: alone it cannot tell them apart").first.is_visible()
    page.get_by_role("application").focus()
    for _ in range(10):
        page.keyboard.press("Shift+ArrowDown")
    got = check_pyramid(page)
    assert got["cell"] == [59, 30] and got["apart"][0] == 1  # all road, no road


def test_enlarged_maps_are_drawn_as_computed(show):
    page = show("pyramid-lab")
    pick(page, "Map", "13 × 17: Toytown")
    page.get_by_role("application").focus()
    for _ in range(5):
        page.keyboard.press("Shift+ArrowUp")
        page.keyboard.press("Shift+ArrowLeft")
    assert check_pyramid(page)["cell"] == [0, 0]
    canvas = page.get_by_role("img", name="colour, means of 3 × 3 bins, enlarged")
    read = """canvas => [canvas.height, canvas.width,
        [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]]"""
    height, width, pixels = canvas.evaluate(read)
    rows, columns = ((torch.arange(n) + 0.5) / n * side for n, side in ((13, height), (17, width)))
    drawn = torch.tensor(pixels).view(height, width, 4)[rows.long()][:, columns.long(), :3].permute(2, 0, 1)
    pooled = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(pyramid_sources()[0][0], (13, 17)), 3)
    expected = F.interpolate(pooled[None], (13, 17), mode="bilinear", align_corners=True)[0].round().long()
    away = torch.ones(13, 17, dtype=torch.bool)
    away[:2, :2] = False  # under the frame of the cell
    assert ((drawn - expected).abs()[:, away] <= 1).all()


def test_a_cell_is_chosen_by_keyboard_and_pointer(show):
    page = show("pyramid-lab")
    page.get_by_role("application").focus()
    for key in ("ArrowUp", "Shift+ArrowRight", "3", "4", " "):
        page.keyboard.press(key)
    got = check_pyramid(page)
    assert (got["cell"], got["level"], got["scene"]) == ([40, 34], 3, 1)  # there is no level 4
    page.wait_for_function("document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent")
    assert page.get_by_role("radio", name="hull on road").is_checked()
    assert page.get_by_text("Row 40, column 34 lies in bin (2, 1) of 3 × 3.").first.is_visible()
    for view in page.get_by_role("application"), page.get_by_role("img", name="Map of 60 by 60 cells"):
        view.scroll_into_view_if_needed()
        box = view.bounding_box()
        page.mouse.move(box["x"] + 0.5 / 60 * box["width"], box["y"] + 59.5 / 60 * box["height"])
        assert check_pyramid(page)["cell"] == [59, 0]
        page.mouse.move(box["x"] + 20.5 / 60 * box["width"], box["y"] + 19.5 / 60 * box["height"])
        assert check_pyramid(page)["cell"] == [19, 20] and value(page)["bins"][2] == [[0], [1]]
    pick(page, "Map", "13 × 17: Toytown")
    got = check_pyramid(page)  # the same place of the picture: the square map begins at column 15 of 128
    assert got["cell"] == [int(19.5 / 60 * 13), int((15 + 20.5 / 60 * 96) / 128 * 17)]
    page.get_by_role("application").focus()
    page.keyboard.press("6")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Shift+ArrowUp")
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    got = check_pyramid(page)
    assert got["cell"] == [2, 6] and got["bins"][3] == [[0, 1], [2]]
    assert page.get_by_text("Row 2, column 6 lies in bins (0, 2), (1, 2) of 6 × 6.").first.is_visible()


@functools.cache
def all_paths(layers: int) -> np.ndarray:
    """Every path through the trellis, found by walking: (paths, layers + 1) levels, the stem's first."""
    walks = [(0,)]
    for _ in range(layers):
        walks = [(*walk, to) for walk in walks for to in (walk[-1] - 1, walk[-1], walk[-1] + 1) if 0 <= to <= 3]
    return np.array(walks)


def check_trellis(page, name: str) -> dict:
    """Paths, probabilities and counts are those of enumerating all paths, and of `autodeeplab`; the table shows them."""
    got, state = value(page), figures()[name].state
    layers = got["layers"]
    betas = (
        np.frombuffer(base64.b64decode(state["history"]), "<f4").reshape(-1, layers, 4, 3)[got["moment"]].astype(float)
    )
    assert got["step"] == state["steps"][got["moment"]] and got["edges"] == autodeeplab.trellis(layers).sum()
    paths = all_paths(layers)
    taken = betas[np.arange(layers), paths[:, :-1], np.diff(paths) + 1]
    chances = taken.prod(1)
    assert chances.sum() == pytest.approx(1, abs=1e-6)
    best = chances.argmax()
    assert got["viterbi"] == paths[best, 1:].tolist() == list(autodeeplab.viterbi(torch.tensor(betas)))
    assert got["most"] == pytest.approx(chances[best])
    assert got["counts"] == [len(all_paths(n)) for n in range(1, layers + 1)]

    layer, start, end = got["edge"]
    assert got["beta"] == pytest.approx(betas[layer, start, end - start + 1])
    through = (paths[:, layer] == start) & (paths[:, layer + 1] == end)
    assert got["through"] == through.sum() and got["chance"] == pytest.approx(chances[through].sum())

    networks = {"Most probable": got["viterbi"]} | {one["name"]: one["levels"] for one in state["paths"]}
    networks["Your own"] = got["own"]
    assert got["levels"] == networks[got["shown"]]
    rows = page.get_by_role("table", name="Probability of each path").locator("tbody tr").all()
    for row, (path, levels) in zip(rows, networks.items(), strict=True):
        assert row.locator("th").inner_text() == path
        assert (row.get_attribute("aria-current") == "true") == (path == got["shown"])
        shown, times = (text.replace(",", "") for text in row.locator("td").all_inner_texts())
        if len(levels) < layers:
            assert (shown, times, got["probabilities"][path]) == ("not complete", "–", None)
            continue
        chance = autodeeplab.path_probability(torch.tensor(betas), levels)
        assert got["probabilities"][path] == pytest.approx(chance) and chance == pytest.approx(
            chances[(paths[:, 1:] == levels).all(1)].item()
        )
        if "%" in shown:
            assert chance >= 0.01 and float(shown[:-1]) == pytest.approx(100 * chance, abs=0.051)
        else:
            assert float(shown.removeprefix("1 in ")) == pytest.approx(1 / chance, abs=0.51)
        relative = chance * len(paths)
        assert times == "< 0.01" if relative < 0.01 else float(times) == pytest.approx(relative, rel=0.006, abs=0.0051)
    return got


@pytest.mark.parametrize("classic", [False, True], ids=["module", "classic"])
def test_paths_are_those_of_enumeration_at_every_moment(show, classic):
    page = show("trellis", classic=classic)
    got = check_trellis(page, "trellis")
    assert (got["moment"], got["step"], got["shown"], got["edges"]) == (4, 100, "Most probable", 105)
    assert got["counts"][-2:] == [28657, 75025]
    last = got["viterbi"]
    when = page.get_by_role("slider", name="Moment of the search")
    when.press("Home")
    got = check_trellis(page, "trellis")
    assert got["viterbi"] == [0] * 12 != last and got["most"] == pytest.approx(2**-12)  # uniform: along the border
    for step in SEARCH_STEPS[1:]:
        when.press("ArrowRight")
        assert check_trellis(page, "trellis")["step"] == step
    assert value(page)["viterbi"] == last
    for name in "Published", "DeepLab v3", "U-Net, DeconvNet", "Stacked hourglass":
        pick(page, "Path", name)
        assert check_trellis(page, "trellis")["shown"] == name
    assert page.get_by_text("Strides: 8 16 32 16 8 4 8 16 32 16 8 4.").first.is_visible()


def test_a_short_trellis_opens_on_what_was_decoded(show):
    page = show("trellis-decoded")
    got = check_trellis(page, "trellis-decoded")
    assert (got["shown"], got["levels"], got["counts"]) == ("Decoded", [0, 1, 1, 2, 1], [2, 5, 13, 34, 89])
    page = show("trellis-uniform")
    got = check_trellis(page, "trellis-uniform")
    assert (got["shown"], got["levels"]) == ("Published", [0, 0, 0, 1, 2, 1, 2, 2, 3, 3, 2, 1])
    assert page.get_by_role("slider").count() == page.get_by_role("button", name="Play").count() == 0
    pick(page, "Path", "Most probable")
    assert page.get_by_text("a path along the border is ahead before any search").first.is_visible()


def test_trellis_plays(show):
    page = show("trellis", classic=True)
    page.get_by_role("button", name="Play").click()
    assert page.get_by_role("button", name="Pause").is_visible() and value(page)["moment"] < 4
    page.get_by_role("button", name="Pause").click()
    before = value(page)
    page.wait_for_timeout(800)
    assert value(page) == before and not check_trellis(page, "trellis")["playing"]
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('seg-figure').value.moment === 4")
    page.get_by_role("button", name="Play").wait_for()
    still = show("trellis", reduced_motion="reduce")
    assert still.get_by_role("button", name="Play").count() == 0
    still.get_by_role("slider").press("ArrowLeft")
    assert check_trellis(still, "trellis")["moment"] == 3


def test_a_path_is_drawn_by_keys_and_a_wide_step_refused(show):
    page = show("trellis")
    page.get_by_role("application").focus()
    for key in "1233":
        page.keyboard.press(key)
    got = check_trellis(page, "trellis")
    assert (got["own"], got["shown"], got["edge"], got["refused"]) == ([0, 1, 2, 2], "Your own", [3, 2, 2], "")
    page.keyboard.press("1")
    got = check_trellis(page, "trellis")
    assert got["own"] == [0, 1, 2, 2] and got["refused"].startswith(
        "Refused: from stride 16 to stride 4 is more than one level."
    )
    assert page.get_by_text(got["refused"]).first.is_visible()
    page.wait_for_function(
        "document.querySelector('seg-figure').shadowRoot.querySelector('[aria-live]').textContent.startsWith('Refused')"
    )
    page.keyboard.press("Backspace")
    assert check_trellis(page, "trellis")["own"] == [0, 1, 2] and value(page)["refused"] == ""
    for key in ("ArrowRight", "Enter"):  # the step next to the last one taken
        page.keyboard.press(key)
    got = check_trellis(page, "trellis")
    assert (got["edge"], got["own"]) == ([3, 1, 2], [0, 1, 2])
    assert got["refused"] == "Refused: this step starts at stride 8, and your path is at stride 16 after layer 3."
    seen = []
    for _ in range(4):
        page.keyboard.press("ArrowDown")
        seen.append(check_trellis(page, "trellis")["edge"])
    assert seen == [[3, 2, 1], [3, 2, 2], [3, 2, 3], [3, 3, 2]]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert check_trellis(page, "trellis")["own"] == [0, 1, 2, 3]
    for key in "44333221":
        page.keyboard.press(key)
    got = check_trellis(page, "trellis")
    assert got["own"] == [0, 1, 2, 3, 3, 3, 2, 2, 2, 1, 1, 0] and got["probabilities"]["Your own"] > 0
    page.keyboard.press("1")
    assert value(page)["refused"] == "Your path is complete: 12 layers."
    page.get_by_role("button", name="Draw your own anew").click()
    assert check_trellis(page, "trellis")["own"] == []


def test_a_path_is_drawn_by_clicks(show):
    page = show("trellis", width=390)
    view = page.get_by_role("application")

    def at(layer: float, level: float) -> tuple[float, float]:
        box = view.bounding_box()
        x, y = 150 + layer * 1090 / 12, 60 + level * 540 / 3
        return box["x"] + x / 1300 * box["width"], box["y"] + y / 720 * box["height"]

    view.scroll_into_view_if_needed()
    page.mouse.move(*at(4.5, 1.5))
    assert check_trellis(page, "trellis")["edge"] in ([4, 1, 2], [4, 2, 1])
    page.mouse.move(*at(7.7, 2.7))
    assert check_trellis(page, "trellis")["edge"] == [7, 2, 3] and value(page)["shown"] == "Most probable"
    for layer, level in enumerate((0, 1, 2, 1), start=1):
        page.mouse.click(*at(layer, level))
    assert check_trellis(page, "trellis")["own"] == [0, 1, 2, 1]
    for (layer, level), words in {
        (5, 3): "Refused: from stride 8 to stride 32 is more than one level.",
        (9, 1): "Refused: your path has 4 layers, so layer 5 is next.",
    }.items():
        page.mouse.click(*at(layer, level))
        assert value(page)["refused"].startswith(words) and check_trellis(page, "trellis")["own"] == [0, 1, 2, 1]
    page.mouse.click(*at(2, 0))  # an earlier layer: the path goes on from there
    assert check_trellis(page, "trellis")["own"] == [0, 0] and value(page)["refused"] == ""
    page.mouse.click(*at(0, 0))
    assert check_trellis(page, "trellis")["own"] == []


@pytest.mark.parametrize("mode", COLOURS)
@pytest.mark.parametrize("name", FIGURES)
def test_accessible(show, name, mode):
    from axe_playwright_python.sync_playwright import Axe

    page = show(name, mode)
    if name == "layer-scrubber":
        page.get_by_role("slider").press("End")
    else:
        page.get_by_role("button").nth(1).click()
    if name == "field-lab":
        page.locator("summary").click()
    results = Axe().run(page, options={"resultTypes": ["violations", "passes", "incomplete"]})
    assert results.violations_count == 0, results.generate_report()
    contrast = {kind: [] for kind in ("passes", "incomplete")}
    for kind, nodes in contrast.items():
        nodes += [n for rule in results.response[kind] if rule["id"] == "color-contrast" for n in rule["nodes"]]
    assert len(contrast["passes"]) > 20 and contrast["incomplete"] == []  # the figure's own text was looked at


@pytest.mark.parametrize("width", [320, 390, 800])
@pytest.mark.parametrize("name", FIGURES)
def test_fits(show, name, width):
    page = show(name, width=width)
    if name == "aspp-lab":  # at its widest
        pick(page, "Map", "13 × 17: Toytown, stride 8")
        page.get_by_role("button", name="ASPP-L").click()
        for _ in range(9):
            page.get_by_role("slider").press("ArrowLeft")
    if name == "pyramid-lab":  # at its longest
        pick(page, "Map", "13 × 17: Toytown")
        page.get_by_role("button", name="1 to 8").click()
    if name == "trellis":  # at its widest
        page.get_by_role("application").focus()
        for key in "1234444444441":
            page.keyboard.press(key)
    if name == "field-lab":  # at its longest
        page.get_by_role("button", name="Context module").click()
        page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    scrolled = """[...document.querySelector('seg-figure').shadowRoot.querySelectorAll('*')]
        .filter(e => e.clientWidth > 2 && e.scrollWidth > e.clientWidth + 1).map(e => e.className)"""
    assert page.evaluate(scrolled) == []


def test_still_picture_without_javascript(show):
    page = show("metric-lab", java_script_enabled=False)
    still = page.get_by_role("img", name="Truth and three predictions")
    assert still.bounding_box()["width"] > 300

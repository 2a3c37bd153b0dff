"""Figures from tensors: what is drawn, in which numbers, and that nothing global is touched."""

import io

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import segedu as sg
from segedu import plots
from segedu.models import autodeeplab

PALETTE = torch.tensor([[200, 200, 200], [0, 0, 255], [255, 0, 0]], dtype=torch.uint8)
CLASSES = ["road", "car", "person"]


@pytest.fixture
def scene():
    target = torch.zeros(24, 32, dtype=torch.long)
    target[8:16, 8:16], target[4:20, 24] = 1, 2
    target[7, 8:16] = 255
    return torch.rand(3, 24, 32, generator=torch.manual_seed(0)), target


def three_corners():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5], [1.5, 0.75**0.5]])
    return corners, torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.5, 0.4, 0.4, 0.1])


def every_figure(scene):
    image, target = scene
    labels = target.clamp(max=1)
    return {
        "masks": plots.masks(image, {"truth": target, "FCN": labels}, PALETTE, CLASSES),
        "errors": plots.errors(labels, target),
        "answer": plots.answer(image, target, labels, PALETTE, CLASSES),
        "maps": plots.maps(image),
        "layers": plots.layers([image, image[0, ::4, ::4], image[1] - 0.5], ["input", "6 x 8", "scores"]),
        "curves": plots.curves({"32s": [[3, 2, 1], [4, 2, 1.5]], "8s": torch.tensor([3.0, 1, 0.5])}),
        "bins": plots.bins(image),
        "trellis": plots.trellis(autodeeplab.transitions(torch.zeros(5, 4, 3)), (0, 1, 2, 2, 1)),
        "bars": plots.bars({"32s": [0.5, 0.6], "8s": [0.7, 0.8]}),
        "field": plots.field(image, sg.receptive.Field(10, 8, 3.5), image[0], (1, 2)),
        "lattice": plots.lattice(*three_corners(), torch.rand(9, 9, generator=torch.manual_seed(0)), 2.0),
        "matrix": plots.matrix(torch.tensor([[9, 1, 0], [2, 6, 2], [0, 0, 0]]), CLASSES),
    }


def test_same_bytes_every_time_and_at_most_the_text_width(scene):
    first, second = every_figure(scene), every_figure(scene)
    for name, figure in first.items():
        png = figure._repr_png_()
        assert png == second[name]._repr_png_(), name
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.width <= 1.05 * plots.WIDTH * 120, name
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255), name


def test_the_style_of_the_notebook_is_neither_used_nor_changed():
    plain = plots.bars({"8s": [0.5, 0.6]})._repr_png_()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "axes.spines.top": True}):
        assert plots.bars({"8s": [0.5, 0.6]})._repr_png_() == plain
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.slow
def test_a_notebook_shows_a_figure_once_with_and_without_pyplot():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = [
        "import sys, torch\nfrom segedu import plots\nassert 'matplotlib.pyplot' not in sys.modules\nplots.maps(torch.ones(2, 4, 4))",
        "import matplotlib.pyplot as plt\nplots.maps(torch.ones(2, 4, 4))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [[sorted(output.data) for output in shown] for shown in outputs] == 2 * [[["image/png", "text/plain"]]]
    assert outputs[0][0].data["image/png"] == outputs[1][0].data["image/png"]


def test_masks_draw_the_palette_and_stripe_void(scene):
    image, target = scene
    figure = plots.masks(image, {"truth": target}, PALETTE, CLASSES)
    assert [ax.get_title() for ax in figure.axes] == ["image", "truth"]
    drawn = figure.axes[1].images[0].get_array()
    zoom = drawn.shape[0] // 24
    assert drawn.shape == (24 * zoom, 32 * zoom, 3)
    assert tuple(drawn[0, 0]) == (200, 200, 200) and tuple(drawn[10 * zoom, 10 * zoom]) == (0, 0, 255)
    assert set(np.unique(drawn[7 * zoom : 8 * zoom, 8 * zoom : 16 * zoom])) == {120, 255}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*CLASSES, "void"]


def test_masks_name_a_label_without_colour(scene):
    with pytest.raises(ValueError, match=r"below 3.*got 7"):
        plots.masks(None, {"FCN": torch.full((4, 4), 7)}, PALETTE)


def test_errors_count_labelled_pixels_only(scene):
    _, target = scene
    figure = plots.errors(torch.zeros_like(target), target)
    assert figure.axes[0].get_title() == f"{(64 + 16) / (24 * 32 - 8):.1%} of the pixels wrong"


def test_maps_share_a_scale_and_say_what_is_wrong():
    figure = plots.maps(torch.arange(20.0).reshape(20, 1, 1).expand(20, 3, 4), limit=6)
    panels = [ax for ax in figure.axes if ax.images and ax.get_title().startswith("map")]
    assert len(panels) == 6 and len({ax.images[0].get_clim() for ax in panels}) == 1
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        plots.maps(torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="names must be 3"):
        plots.maps(torch.ones(3, 4, 4), ["a"])


def test_layers_stand_five_in_a_row_at_one_size_each_on_its_scale(scene):
    image, _ = scene
    maps = [image[0, :6, :8] * 9 for _ in range(9)]
    maps[4] = -maps[4]
    figure = plots.layers([image, *maps], ["input", *map(str, range(9))])
    assert len({round(ax.get_position().y0, 3) for ax in figure.axes}) == 2
    drawn = [ax.images[0] for ax in figure.axes]
    assert {tuple(picture.get_extent()) for picture in drawn[1:]} == {(0, 32, 24, 0)}
    top = maps[0].max().sqrt().item()
    assert drawn[1].get_clim() == pytest.approx((0, top)) and drawn[5].get_clim() == pytest.approx((-top, top))
    with pytest.raises(ValueError, match="titles must be 10"):
        plots.layers([image, *maps], ["input"])


def test_curves_are_the_mean_with_a_band_from_least_to_most():
    figure = plots.curves({"8s": [[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]]}, smooth=2)
    ax = figure.axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 2.5, 4.0])  # means of 2; the first has one value
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1.0 and band[:, 1].max() == 5.5


def test_bars_show_every_seed():
    flat = plots.bars({"32s": [0.4, 0.6], "8s": [0.7]}).axes[0]
    assert [bar.get_height() for bar in flat.patches] == pytest.approx([0.5, 0.7])
    assert [line.get_ydata().tolist() for line in flat.lines] == [[0.4, 0.6], [0.7]]
    grouped = plots.bars({"32s": {"small": [0.1], "large": [0.9]}, "8s": {"small": [0.3], "large": [0.8]}}).axes[0]
    assert [label.get_text() for label in grouped.get_xticklabels()] == ["small", "large"]
    assert [text.get_text() for text in grouped.get_legend().get_texts()] == ["32s", "8s"]


def test_field_box_is_where_the_model_sees():
    """The box of a plain 3x3 stride 2 convolution with padding 1: cell (2, 3) sees rows 3 to 5, columns 5 to 7."""
    conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    model = torch.nn.Sequential(conv)
    field = sg.receptive_field(model, "0")
    image = torch.rand(3, 9, 13, generator=torch.manual_seed(0))
    effective = torch.zeros(9, 13)
    effective[3:6, 5:8] = 1
    box = plots.field(image, field, effective, (2, 3)).axes[0].patches[0]
    rows, columns = np.nonzero(effective.numpy())
    assert (box.get_y(), box.get_x()) == (rows.min() - 0.5, columns.min() - 0.5)
    assert (box.get_height(), box.get_width()) == (3, 3)


def test_bins_have_the_borders_and_means_of_adaptive_pooling(scene):
    image, _ = scene
    figure = plots.bins(image, (1, 5))
    over, means = figure.axes[1], figure.axes[3]
    drawn = {(box.get_y(), box.get_x(), box.get_height(), box.get_width()) for box in over.patches}
    ranges = [
        [
            (row.nonzero()[0].item(), len(row.nonzero()))
            for row in torch.nn.functional.adaptive_avg_pool1d(torch.eye(side), 5).T
        ]
        for side in (24, 32)
    ]
    assert drawn == {(y, x, height, width) for y, height in ranges[0] for x, width in ranges[1]} and len(drawn) == 25
    pooled = torch.nn.functional.adaptive_avg_pool2d(image, 5).permute(1, 2, 0)
    np.testing.assert_allclose(means.images[0].get_array(), pooled, atol=1e-6)


def test_trellis_draws_every_step_and_the_path():
    steps = autodeeplab.transitions(torch.zeros(5, 4, 3))
    *lines, path, nodes = plots.trellis(steps, (0, 1, 2, 2, 1)).axes[0].lines
    drawn = {(line.get_xdata()[0], *line.get_ydata()) for line in lines}
    assert drawn == {(at, level, level + way - 1) for at, level, way in autodeeplab.trellis(5).nonzero().tolist()}
    widths = {line.get_linewidth() for line in lines}
    assert len(widths) == 2  # two or three steps leave a node
    assert path.get_ydata().tolist() == [0, 0, 1, 2, 2, 1] and len(nodes.get_xdata()) == 1 + 2 + 3 + 4 * 3


def test_matrix_shows_shares_of_the_rows():
    figure = plots.matrix(torch.tensor([[9, 1, 0], [2, 6, 2], [0, 0, 0]]), CLASSES)
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "10", "20", "60", "20"]
    with pytest.raises(ValueError, match="for 2 classes"):
        plots.matrix(torch.zeros(3, 3), CLASSES[:2])


def test_lattice_has_its_edges_its_point_and_its_weights():
    """Two triangles of side 1 have five edges; the point is the weighted mean of its corners."""
    first, _, last = plots.lattice(*three_corners(), torch.ones(9, 9), 2.0).axes
    *edges, point = first.lines
    assert len(edges) == 5
    for edge in edges:
        assert np.hypot(*np.diff(edge.get_data())) == pytest.approx(1, rel=1e-5)
    assert np.ravel(point.get_data()) == pytest.approx([0.375, 0.25 * 0.75**0.5])
    assert [text.get_text() for text in first.texts] == ["0.50", "0.25", "0.25"]
    assert last.images[0].get_array().shape == (9, 9)

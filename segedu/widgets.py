"""Interactive figures. `Figure` needs no kernel once it is in a page; `explore` and `compare` ask a live model.

They move by `static/segedu.js`: in the built book as the element <seg-figure>, in JupyterLab through an anywidget, in
Colab as a page of its own. All numbers come with the figure, so nothing is fetched and no widget state is stored.
anywidget and ipywidgets are imported when a figure is shown, not with this module.
"""

import base64
import functools
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segedu.layers import BilinearUpsampling, crop
from segedu.metrics import VOID

MODULE = Path(__file__).parent / "static" / "segedu.js"
MAX_HTML = 390_000  # bytes of a figure; tools/freeze.py refuses outputs over 400 kB


class Figure:
    """The figure `name` of segedu.js with the data it shows.

    Args:
        name: "metric-lab", "skip-mixer", "upsampling-lab", "layer-scrubber", "field-lab", "crf-playground", "aspp-lab",
            "pyramid-lab" or "trellis".
        state: what segedu.js needs for it, ready for JSON.
        still: PNG bytes of the picture that stands in its place without JavaScript and in print.
        alt: the still in words.
    """

    def __init__(self, name: str, state: dict, still: bytes, alt: str) -> None:
        self.name, self.state, self.still, self.alt = name, state, still, alt

    @property
    def value(self) -> dict:
        """The numbers that a live figure shows now (JupyterLab); empty before it is shown."""
        return dict(self._widget.value)

    def to_html(self) -> str:
        """The element for a page that loads segedu.js, with the still picture inside. The same at every run."""
        state = json.dumps(self.state, separators=(",", ":"), sort_keys=True, allow_nan=False)
        for character, entity in ("&", "&amp;"), ("'", "&#39;"), ("<", "&lt;"):
            state = state.replace(character, entity)
        picture = f'<img src="{_data_url(self.still)}" alt="{html.escape(self.alt)}" style="max-width: 100%">'
        return f"<seg-figure name=\"{self.name}\" state='{state}'>{picture}</seg-figure>"

    def __repr__(self) -> str:
        return f"Figure({self.name!r})"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = {"text/plain": repr(self), "text/html": self.to_html()}
        if "google.colab" in sys.modules:  # each output is a page of its own there, so it brings the script
            bundle["text/html"] += f'<script type="module">\n{MODULE.read_text()}</script>'
            return bundle
        try:
            model_id = self._widget.model_id
        except ImportError:  # without anywidget the element still is in the page
            return bundle
        view = {"model_id": model_id, "version_major": 2, "version_minor": 0}
        return bundle | {"application/vnd.jupyter.widget-view+json": view}

    @functools.cached_property
    def _widget(self):
        return _widget_class()(name=self.name, state=self.state)


@functools.cache
def _widget_class() -> type:
    import anywidget
    import traitlets

    class LiveFigure(anywidget.AnyWidget):
        _esm = MODULE.read_text()
        name = traitlets.Unicode().tag(sync=True)
        state = traitlets.Dict().tag(sync=True)
        value = traitlets.Dict().tag(sync=True)

    return LiveFigure


# A street corner of 24 x 32 cells: mostly background, a tree, a pole one cell wide, a car, a person.
LAB_CLASSES = ("background", "car", "person", "tree", "pole")
LAB_PALETTE = ((222, 214, 200), (30, 95, 170), (213, 94, 0), (15, 105, 70), (20, 20, 20))
LAB = """
................................
................................
...ttttt........................
..ttttttt...|...................
.ttttttttt..|...................
.ttttttttt..|...................
.ttttttttt..|...................
.ttttttttt..|...............pp..
.ttttttttt..|...............pp..
..ttttttt...|..............pppp.
...ttttt....|..............pppp.
....ttt.....|..............pppp.
....ttt.....|..............pppp.
....ttt.....|....ccccc.....pppp.
....ttt.....|....ccccc.....pppp.
....ttt.....|...ccccccc.....pp..
....ttt.....|.ccccccccccc...pp..
....ttt.....|.ccccccccccc...pp..
....ttt.....|.ccccccccccc...pp..
....ttt.....|..ccc...ccc....pp..
....ttt.....|..ccc...ccc....pp..
................................
................................
................................
"""


def _street_corner() -> Tensor:
    from scipy import ndimage

    target = torch.tensor([[".cpt|".index(cell) for cell in row] for row in LAB.split()])
    things = ((target > 0) & (target < 4)).numpy()  # the pole has no rim, which would hide it
    target[torch.from_numpy(ndimage.binary_dilation(things) & ~things)] = VOID
    return target


def metric_lab(
    target: Tensor | None = None,
    classes: Sequence[str] = LAB_CLASSES,
    palette: Sequence = LAB_PALETTE,
    tolerance: float = 0.025,
) -> Figure:
    """Paint a prediction of a small picture and watch the scores move; void counted as a class or left out.

    Opens on a prediction that is the commonest class everywhere.

    Args:
        target: (H, W) labels with 255 = void, about 24 x 32 cells; a drawn street corner if left out.
        classes, palette: K names and K colours (r, g, b) of 0-255.
        tolerance: of the boundary score, in shares of the diagonal (0.025 is 1 cell at 24 x 32).
    """
    from segedu import plots
    from segedu.metrics import Scores

    target = _street_corner() if target is None else torch.as_tensor(target)
    palette = torch.as_tensor(palette)
    common = int(torch.bincount(target[target != VOID], minlength=len(classes)).argmax())
    perfect = _grown(target, common)
    everywhere = torch.full_like(target, common)
    presets = [
        (f"All {classes[common]}", everywhere, "Nothing is found. Pixel accuracy is the share of the commonest class."),
        ("Perfect", perfect, "Right in every labelled cell. In void it says the nearest thing."),
        (
            f"Rim as {classes[common]}",
            target.where(target != VOID, common),
            f"Right in every labelled cell too. In void it says {classes[common]}. Void is left out, so the scores are "
            "those of Perfect. Count void as a class, and both lose.",
        ),
        (
            "Shifted by 1 cell",
            torch.cat([perfect[:, :1], perfect[:, :-1]], dim=1),
            "Every shape is right and one cell too far to the right. Wide things lose little, thin things all.",
        ),
        (
            "Blurred",
            _blurred(perfect, len(classes)),
            "Each cell says what is commonest in the 5 × 5 cells around it. Thin things are gone, and pixel accuracy "
            "hardly notices.",
        ),
    ]
    scores = [Scores.of(labels, target, len(classes)) for _, labels, _ in presets]
    opening = f"pixel accuracy is {scores[0].pixel_accuracy:.2f}, mean IU {scores[0].miou:.2f}"
    state = {
        "title": "Metric lab",
        "lead": f"The prediction starts as “{classes[common]}” everywhere: {opening}. "
        "Paint what is missing and watch which score moves.",
        "rows": target.shape[0],
        "cols": target.shape[1],
        "classes": list(classes),
        "palette": palette.tolist(),
        "target": _runs(target),
        "presets": [{"name": name, "labels": _runs(labels), "note": note} for name, labels, note in presets],
        "brush": next(k for k in range(len(classes)) if k != common),
        "tolerance": tolerance,
    }
    shown = {"truth": target}
    for i in (0, 3, 4):  # the other two look like the truth
        numbers = f"pixel accuracy {scores[i].pixel_accuracy:.2f}\nmean IU {scores[i].miou:.2f}"
        shown[f"{presets[i][0]}\n{numbers}"] = presets[i][1]
    still = plots.masks(None, shown, palette, classes)
    return Figure("metric-lab", state, still._repr_png_(), f"Truth and three predictions. {presets[0][0]}: {opening}.")


def _grown(target: Tensor, common: int) -> Tensor:
    """Void cells get the label of the nearest cell that is neither void nor the commonest class."""
    from scipy import ndimage

    labels = target.numpy()
    row, column = ndimage.distance_transform_edt(
        (labels == VOID) | (labels == common), return_distances=False, return_indices=True
    )
    return target.where(target != VOID, torch.from_numpy(labels[row, column]))


def _blurred(labels: Tensor, num_classes: int) -> Tensor:
    """The commonest label of each 5 x 5 window: thin things are gone."""
    votes = nn.functional.one_hot(labels, num_classes).permute(2, 0, 1)[None].float()
    return nn.functional.avg_pool2d(votes, 5, 1, 2, count_include_pad=False)[0].argmax(0)


def skip_mixer(model: nn.Module, data, indices: Sequence[int] = (0, 1, 2)) -> Figure:
    """Mix the three score maps of a trained FCN-8s by hand and watch edges and small things come and go.

    Args:
        model: `FCN(K, stride=8, pad=1)` with frozen upsampling.
        data: items (image (3, H, W) in [0, 1], target (H, W)), `.classes`, `.palette`; H and W are multiples of 32.
        indices: which pictures.
    """
    from segedu import plots
    from segedu.features import record
    from segedu.training import predict

    if model.stride != 8 or model.pad != 1 or not isinstance(model.upscore2, BilinearUpsampling):
        raise ValueError(
            "the skip mixer needs FCN(stride=8, pad=1) with frozen upsampling, "
            f"got stride={model.stride}, pad={model.pad}, {type(model.upscore2).__name__}"
        )
    names = ["score_fr", "score_pool4", "score_pool3"]
    scenes, stills = [], []
    for i in indices:
        image, target = data[i]
        if image.shape[1] % 32 or image.shape[2] % 32:
            raise ValueError(
                f"height and width must be multiples of 32, got {tuple(image.shape[1:])}; crop the picture"
            )
        with record(model, names) as maps:
            predict(model, image)
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        scores = [_quantised(maps[name][0]) for name in names]
        scenes.append({"name": i, "image": _data_url(_encoded(pixels)), "target": _runs(target), "scores": scores})
        stills.append((image, target, [maps[name] for name in names]))
    layers = [(model.upscore2, "pool4"), (model.upscore_pool4, "pool3"), (model.upscore8, "8s")]
    image, target, maps = stills[0]
    state = {
        "title": "Skip mixer",
        "lead": "The three score maps of one trained FCN-8s. It opens with the coarsest alone, of stride 32. "
        "Add the finer ones and watch the outlines.",
        "rows": image.shape[1],
        "cols": image.shape[2],
        "classes": list(data.classes),
        "palette": torch.as_tensor(data.palette).tolist(),
        "steps": [
            {"kernel": layer.weight.shape[-1], "stride": layer.stride, "crop": model.offsets[name]}
            for layer, name in layers
        ],
        "scenes": scenes,
        "tolerance": 0.0075,
    }
    mixes = {"32 only": (1, 0, 0), "32 + 16": (1, 1, 0), "32 + 16 + 8": (1, 1, 1)}
    shown = {name: mix(model, maps, weights, image).argmax(0) for name, weights in mixes.items()}
    still = plots.masks(None, {"truth": target} | shown, data.palette, data.classes)
    alt = "The truth, and what FCN-8s says with one, two and all three of its score maps in the sum."
    return Figure("skip-mixer", state, still._repr_png_(), alt)


@torch.no_grad()
def mix(model: nn.Module, maps: Sequence[Tensor], weights: Sequence[float], image: Tensor) -> Tensor:
    """FCN-8s with its three score maps (1, K, h, w), coarsest first, times `weights` -> logits (K, H, W)."""
    coarse, middle, fine = (weight * scores for weight, scores in zip(weights, maps, strict=True))
    scores = model.fuse(model.upscore2(coarse), middle, model.offsets["pool4"])
    scores = model.fuse(model.upscore_pool4(scores), fine, model.offsets["pool3"])
    return crop(model.upscore8(scores), model.offsets["8s"], like=image)[0]


# 4 x 4 values whose maxima of 2 x 2 are 6, 8, 3, 4, at (1, 1), (1, 3), (2, 0), (3, 3).
SWITCHED = ((1, 2, 5, 3), (4, 6, 1, 8), (3, 2, 0, 1), (1, 0, 2, 4))


def upsampling_lab() -> Figure:
    """Nearest, bilinear, unpooling with switches and transposed convolution of an editable 4 x 4 map.

    Shows which cells of the output each value reaches, how many values reach each cell, and what is kept. Opens on the
    checkerboard of a transposed convolution with a 3 x 3 kernel and stride 2.
    """
    from segedu import plots
    from segedu.layers import bilinear_kernel

    maps = {"all 1": torch.ones(4, 4), "6, 8, 3, 4": torch.tensor(SWITCHED).float(), "one 1": torch.zeros(4, 4)}
    maps["one 1"][1, 1] = 1
    presets = [  # name, kernel, stride, padding, which map
        ("Checkerboard 3/2", torch.ones(3, 3), 2, 1, 0),
        ("Even 4/2 bilinear", bilinear_kernel(4), 2, 1, 0),
        ("Up-convolution 2/2 (U-Net)", torch.tensor([[1.0, 0.5], [0.5, 0.25]]), 2, 0, 1),
        ("Same size 3/1 (DeconvNet)", torch.tensor([[0.0, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 0]]), 1, 1, 2),
    ]
    state = {
        "title": "Upsampling lab",
        "lead": "Every input value puts a stamp into the output: the kernel times the value. Stamps that overlap are "
        "added. Choose a method, change values, and count the stamps.",
        "maps": [{"name": name, "values": _numbers(values)} for name, values in maps.items()],
        "presets": [
            {"name": name, "kernel": _numbers(kernel), "stride": stride, "padding": padding, "map": i}
            for name, kernel, stride, padding, i in presets
        ],
    }
    flat, shown = maps["all 1"], {}
    for name, kernel, stride, padding, _ in presets[:2]:
        for what, weights in ("stamps on each cell", torch.ones_like(kernel)), ("output of a map of 1", kernel):
            shown[f"{name}\n{what}"] = nn.functional.conv_transpose2d(
                flat[None, None], weights[None, None], stride=stride, padding=padding
            )[0, 0]
    still = plots.layers(list(shown.values()), list(shown))
    alt = (
        "Transposed convolution of a map of ones, stride 2. A 3 × 3 kernel of ones puts 1, 2 or 4 stamps on a cell: "
        "a checkerboard. A 4 × 4 bilinear kernel puts 4 on every inner cell, and the output is even there."
    )
    return Figure("upsampling-lab", state, still._repr_png_(), alt)


def layer_scrubber(
    model: nn.Module,
    images: Sequence[Tensor],
    names: Sequence[str],
    titles: Sequence[str] | None = None,
    channels: int = 3,
    data=None,
) -> Figure:
    """Go through the layers of a model and see what each makes of a picture, the map beside the picture.

    Of every layer and picture it keeps the channels with the highest single value, the highest first. Maps are stored
    in up to 256 grey levels, in fewer if the figure would be larger than a notebook may store.

    Args:
        images: each (3, H, W) in [0, 1], all of one size that the model takes.
        names: of the layers, as in `record`, in the order to show. They give maps (1, C, h, w).
        titles: of the layers, as "28 x 28 unpooling"; the names if left out.
        channels: how many of each layer.
        data: `.classes` and `.palette` for the model's answer as the last step; left out without it.

    Raises:
        ValueError: pictures of several sizes, not one title for each layer, a layer without maps, or a figure over
            `MAX_HTML` bytes even in few grey levels.
    """
    from segedu import plots
    from segedu.features import record
    from segedu.training import predict

    titles = list(names if titles is None else titles)
    if len(titles) != len(names):
        raise ValueError(f"titles must be {len(names)}, one for each layer, got {len(titles)}")
    if len({tuple(image.shape) for image in images}) != 1:
        raise ValueError(f"the pictures must be of one size, got {[tuple(image.shape) for image in images]}")
    scenes, kept = [], []
    for image in images:
        with record(model, names) as maps:
            labels = predict(model, image)
        for name in names:
            if not isinstance(maps[name], Tensor) or maps[name].ndim != 4:
                raise ValueError(f"{name} gives no maps (1, C, h, w); choose another layer")
        kept.append([_strongest(maps[name][0].cpu(), channels) for name in names])
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        picture = _data_url(_encoded(pixels, format="jpeg", quality=85), "jpeg")
        answer = None if data is None else _data_url(_encoded(labels.byte().numpy()))
        scenes.append({"image": picture, "labels": answer})
    state = {
        "title": "Layer scrubber",
        "lead": "One picture on its way through the network. Move the slider from the input to the last layer and watch "
        "how coarse each map is, and how many of its cells are not 0.",
        "rows": images[0].shape[1],
        "cols": images[0].shape[2],
        "layers": [
            {"title": title, "rows": maps[name].shape[2], "cols": maps[name].shape[3], "channels": maps[name].shape[1]}
            for title, name in zip(titles, names, strict=True)
        ],
        "classes": [] if data is None else list(data.classes),
        "palette": [] if data is None else torch.as_tensor(data.palette).tolist(),
        "scenes": scenes,
    }
    still = plots.layers([images[0], *(layer[0][1] for layer in kept[0])], ["input", *titles])
    still = _few_colours(still._repr_png_())
    alt = f"The input and the strongest channel of each layer: {', '.join(titles)}."
    for levels in 256, 52, 16, 6:  # 255 is a multiple of levels - 1
        for scene, layers in zip(scenes, kept, strict=True):
            scene["maps"] = [[_grey(channel, values, levels) for channel, values in layer] for layer in layers]
        figure = Figure("layer-scrubber", state, still, alt)
        size = len(figure.to_html())
        if size <= MAX_HTML:
            return figure
    raise ValueError(f"the figure has {size} bytes, over {MAX_HTML}; show fewer pictures, layers or channels")


def _strongest(maps: Tensor, channels: int) -> list[tuple[int, Tensor]]:
    """Of (C, h, w) the channels with the highest value: (channel, (h, w)), the highest first, of equals the first."""
    order = maps.amax((1, 2)).argsort(descending=True, stable=True)[:channels]
    return [(channel, maps[channel]) for channel in order.tolist()]


def _grey(channel: int, values: Tensor, levels: int) -> dict:
    """The roots of a map, with their signs, as grey: black is the lowest, at most 0, white the highest."""
    roots = values.sign() * values.abs().sqrt()
    low, high = min(0.0, roots.min().item()), max(0.0, roots.max().item())
    share = (roots - low) / ((high - low) or 1)
    pixels = (share * (levels - 1)).round() * (255 // (levels - 1))
    return {
        "channel": channel,
        "low": float(f"{low:.6g}"),
        "high": float(f"{high:.6g}"),
        "zeros": round((values == 0).float().mean().item(), 6),
        "grey": _data_url(_encoded(pixels.byte().numpy())),
    }


# name: layers, each (kind, kernel, stride, rate); the context module is Table 1 of Yu and Koltun (ICLR 2016).
STACKS = {
    "3, 3, 3": [("convolution", 3, 1, 1)] * 3,
    "Doubling 1, 2, 4": [("convolution", 3, 1, rate) for rate in (1, 2, 4)],
    "Gridding 2, 2, 2": [("convolution", 3, 1, 2)] * 3,
    "1, 2, 5": [("convolution", 3, 1, rate) for rate in (1, 2, 5)],
    "Context module": [("convolution", 3, 1, rate) for rate in (1, 1, 2, 4, 8, 16, 1)] + [("convolution", 1, 1, 1)],
    "Pools (VGG)": ([("convolution", 3, 1, 1)] * 2 + [("pooling", 2, 2, 1)]) * 2 + [("convolution", 3, 1, 1)],
}


def field_lab() -> Figure:
    """Build a stack of 1 to 8 convolutions and poolings and see which pixels one cell depends on.

    Shows for each layer what its kernel spans (rate (kernel - 1) + 1), field, stride and the pixels used, in a picture
    the number of paths from each pixel to the cell, with the holes, and the stack as code for `receptive_field`. Fields
    of up to 161 x 161 pixels are drawn. Opens on three plain 3 x 3 convolutions.
    """
    from segedu import plots

    keys = "kind", "kernel", "stride", "rate"
    state = {
        "title": "Receptive field and gridding lab",
        "lead": "Each layer looks at the layer before it through a kernel. Build a stack and see which pixels one of its "
        "cells depends on, and how many paths lead there from each. A pixel without a path is a hole.",
        "names": [str(i) for i in range(1, 9)],
        "presets": [
            {"name": name, "layers": [dict(zip(keys, layer, strict=True)) for layer in layers]}
            for name, layers in STACKS.items()
        ],
    }
    shown = {}
    for name in list(STACKS)[:4]:
        paths = _paths(STACKS[name])
        shown[f"{name}\n{len(paths)} x {len(paths)}: {int((paths > 0).sum())} of {paths.numel()} used"] = paths
    still = plots.layers(list(shown.values()), list(shown))
    alt = (
        "The pixels that one cell sees through three 3 × 3 convolutions, darker where more paths lead from. Rates 1, 1, 1 "
        "see 7 × 7, rates 1, 2, 4 see 15 × 15, rates 1, 2, 5 see 17 × 17, all without holes. Rates 2, 2, 2 use 49 of "
        "13 × 13 pixels: every second row and column is empty."
    )
    return Figure("field-lab", state, still._repr_png_(), alt)


def _paths(layers: Sequence[tuple[str, int, int, int]]) -> Tensor:
    """How many paths lead from each pixel of the field to one cell of the last layer: (size, size)."""
    row, jump = np.ones(1), 1
    for _, kernel, stride, rate in layers:
        taps = np.zeros((kernel - 1) * rate * jump + 1)
        taps[:: rate * jump] = 1
        row, jump = np.convolve(row, taps), jump * stride
    return torch.from_numpy(np.outer(row, row))


# A photo of 42 x 36 pixels, static/astronaut.png: Eileen Collins by NASA, public domain, cut and shrunk from
# scikit-image's data.astronaut(). What it shows: traced on it (what stands out from the wall, looked over by eye), and
# what a coarse network might say of it: drawn by hand in blocks of 6 x 6 pixels, one block in the wall being wrong.
CRF_CLASSES = ("wall", "head", "suit")
CRF_PALETTE = ((86, 180, 233), (230, 159, 0), (0, 125, 90))
CRF_TARGET = """
..........................................
..........................................
..........................................
....................hhhhhhh...............
.................hhhhhhhhhhhh.............
................hhhhhhhhhhhhhhh...........
...............hhhhhhhhhhhhhhhhh..........
.............hhhhhhhhhhhhhhhhhhhh.........
............hhhhhhhhhhhhhhhhhhhhhh........
...........hhhhhhhhhhhhhhhhhhhhhhh........
..........hhhhhhhhhhhhhhhhhhhhhhhhh.......
.........hhhhhhhhhhhhhhhhhhhhhhhhhh.......
.........hhhhhhhhhhhhhhhhhhhhhhhhhh.......
.........hhhhhhhhhhhhhhhhhhhhhhhhhh.......
.........hhhhhhhhhhhhhhhhhhhhhhhhhhh......
.........hhhhhhhhhhhhhhhhhhhhhhhhhhh......
.........hhhhhhhhhhhhhhhhhhhhhhhhhhh......
..........hhhhhhhhhhhhhhhhhhhhhhhhh.......
..........hhhhhhhhhhhhhhhhhhhhhhhhh.......
...........hhhhhhhhhhhhhhhhhhhhhhhh.......
............hhhhhhhhhhhhhhhhhhhhhh........
.............hhhhhhhhhhhhhhhhhhhh.........
.............hhhhhhhhhhhhhhhhhhh..........
..............hhhhhhhhhhhhhhhhh...........
...............hhhhhhhhhhhhhhh............
...............hhhhhhhhhhhhhh.............
............sshhhhhhhhhhhhhhh.............
........sssssshhhhhhhhhhhhhh..............
.......ssssssshhhhhhhhhhhhhh..............
......sssssssshhhhhhhhhhhhhh..............
.....ssssssssshhhhhhhhhhhhh...............
.....ssssssssshhhhhhhhhhhhhh..............
....sssssssssssshhhhhhhhhhhsss............
...ssssssssssssssssssssssssssss...........
...sssssssssssssssssssssssssssss..........
..sssssssssssssssssssssssssssssss.........
"""
CRF_NETWORK = """
.......
..hhh.s
.hhhhh.
.hhhhh.
..hhh..
.sssss.
"""
CRF_CONFIDENCE = 0.65  # of the network in its class; the other two share the rest
# name: (w, sxy, srgb, w_smooth, sxy_smooth), what to see
CRF_SETTINGS = {
    "Colour and place": (
        (6, 12, 20, 2, 1),
        "A pixel hears far pixels too, but only of its own colour: those on its side of the edge. So labels stop where the "
        "colour stops, and the wall outvotes the lone block. Colour misleads at the pale collar.",
    ),
    "Place only, short range": (
        (0, 12, 20, 6, 2),
        "A pixel hears only its nearest. At an edge they are of both sides, whatever their colour. So corners "
        "get round, straight edges stay where the network drew them, and inside the lone block all say the same wrong thing.",
    ),
    "Place only, long range": (
        (0, 12, 20, 6, 5),
        "A longer range outvotes the lone block. But it still asks both sides of every edge: shapes melt towards blobs. "
        "Take sxy_smooth to 8, and what is common swallows the rest.",
    ),
    "Too blind to colour": (
        (6, 12, 200, 2, 1),
        "srgb is so large that the wall and the face count as one colour. The kernel is then almost one of place only with a "
        "long range. Take 10 steps more.",
    ),
    "No CRF": ((0, 12, 20, 0, 1), "Both weights are 0: every step gives the network's answer again."),
}


def crf_playground() -> Figure:
    """Exact mean field of a fully connected CRF on a small photo, step by step, with its five parameters.

    Shows the labels after each step, which pixels one pixel hears and how loud, and at that pixel the five steps of
    mean field in numbers. The page computes what `segedu.crf.exact` computes. Opens before the first step.
    """
    from segedu import plots
    from segedu.crf import DenseCRF

    image, unary, target = _astronaut()
    rows, cols = target.shape
    keys = "w", "sxy", "srgb", "w_smooth", "sxy_smooth"
    settings = {name: dict(zip(keys, values, strict=True)) for name, (values, _) in CRF_SETTINGS.items()}
    shown = {}
    for name in "No CRF", "Place only, short range", "Colour and place":
        labels = DenseCRF(**settings[name], backend="exact")(image / 255, unary=unary).argmax(0)
        title = "network (drawn)" if name == "No CRF" else name.replace(", ", ",\n")
        shown[title] = labels, int((labels != target).sum())
    network, short, full = (wrong for _, wrong in shown.values())
    state = {
        "title": "Dense-CRF playground",
        "lead": f"A fully connected CRF on a photo of {cols} × {rows} pixels. What a coarse network would say is drawn by hand: "
        f"blocks of 6 × 6 pixels, each {CRF_CONFIDENCE} sure of its class, one of them wrong. In each step of mean field "
        "every pixel hears all pixels. Press Step: which kernel finds the outline?",
        "hint": "White lines are the outline, traced on the photo: the CRF does not know it. Colours run from 0 to 255. "
        f"On a photo 500 pixels wide the same look needs sxy about {500 / cols:.0f} times as large. Photo: NASA.",
        "alt": "a woman with short brown hair in a black suit before a pale wall",
        "rows": rows,
        "cols": cols,
        "classes": list(CRF_CLASSES),
        "palette": CRF_PALETTE,
        "photo": base64.b64encode(image.byte().permute(1, 2, 0).numpy().tobytes()).decode(),
        "network": _runs(unary.argmin(0)),
        "p": CRF_CONFIDENCE,
        "target": _runs(target),
        "presets": [{"name": name, "set": settings[name], "note": note} for name, (_, note) in CRF_SETTINGS.items()],
        "pixel": [11, 10],
    }
    panels = {f"{title}\n{wrong} px wrong": labels for title, (labels, wrong) in shown.items()}
    still = plots.masks(image / 255, panels, CRF_PALETTE, CRF_CLASSES)
    alt = (
        f"A small photo; the blocks that stand for a network's answer, {network} pixels wrong; after mean field with a kernel "
        f"of place only and a short range, {short} wrong, the blocks with round corners; with a kernel of colour and "
        f"place, {full} wrong, the outline of the head and the suit."
    )
    return Figure("crf-playground", state, still._repr_png_(), alt)


def _astronaut() -> tuple[Tensor, Tensor, Tensor]:
    """The playground's photo (3, 36, 42) of 0-255, unary (3, 36, 42) and target (36, 42)."""
    from PIL import Image

    with Image.open(MODULE.with_name("astronaut.png")) as photo:
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()
    target, network = (
        torch.tensor([[".hs".index(at) for at in row] for row in text.split()]) for text in (CRF_TARGET, CRF_NETWORK)
    )
    network = network.repeat_interleave(6, 0).repeat_interleave(6, 1)
    sure = nn.functional.one_hot(network, 3).permute(2, 0, 1).bool()
    return image, -torch.where(sure, CRF_CONFIDENCE, (1 - CRF_CONFIDENCE) / 2).log(), target


# name: stride it is made for, rates of the 3x3 branches, 1x1, image pooling, what it is
ASPP_SETS = {
    "One rate: 12": (
        8,
        (12,),
        False,
        False,
        "One dilated kernel, as in LargeFOV (DeepLab v1 and v2, stride 8). Move its rate from 1 to 72.",
    ),
    "ASPP-S 2, 4, 8, 12": (
        8,
        (2, 4, 8, 12),
        False,
        False,
        "The small set of DeepLab v2, for stride 8. The scores of the four branches are added.",
    ),
    "ASPP-L 6, 12, 18, 24": (
        8,
        (6, 12, 18, 24),
        False,
        False,
        "The large set of DeepLab v2, for stride 8. The scores of the four branches are added.",
    ),
    "v3: 6, 12, 18": (
        16,
        (6, 12, 18),
        True,
        True,
        "DeepLab v3 at stride 16. The features of all five branches lie side by side. Image pooling sees the whole "
        "map, which a rate wide enough for it cannot.",
    ),
    "v3: 12, 24, 36": (
        8,
        (12, 24, 36),
        True,
        True,
        "The same net at stride 8: twice the cells a side, twice the rates, as many pixels. Compare the shares with 6, 12, 18 on "
        "the map of stride 16.",
    ),
    "Ours: 2, 4, 6": (
        8,
        (2, 4, 6),
        True,
        True,
        "For this book's small pictures (Toytown) at stride 8. 6, 12, 18 would be too wide for their map: try them.",
    ),
}
TAPS = (9, 6, 4, 3, 2, 1)  # so many of nine can lie on a map, and a colour for each
TAPS_PALETTE = ((0, 78, 130), (80, 155, 205), (205, 225, 238), (235, 225, 170), (246, 190, 120), (200, 80, 0))


def aspp_lab() -> Figure:
    """Choose a map and the rates of an ASPP and see which taps of its kernels fall on the padding.

    Shows the taps at one cell, how many of nine are valid at every cell, their shares for all rates of 1 to 72 (DeepLab
    v3, Fig. 4), and the field of each branch. The page counts what `deeplab_v3.valid_weights` counts. Opens on v3's
    rates at stride 16.
    """
    from segedu import plots
    from segedu.models.deeplab_v3 import valid_weights

    maps = {"513 px, stride 8": (65, 65, 8), "513 px, stride 16": (33, 33, 16), "321 px, stride 8": (41, 41, 8),
            "321 px, stride 16": (21, 21, 16), "Toytown, stride 8": (13, 17, 8)}  # fmt: skip
    state = {
        "title": "ASPP lab",
        "lead": "A 3 × 3 kernel of rate r looks r cells to each side. Taps beyond the map meet padded zeros, so their "
        "weights do nothing there. Predict first: as the rate grows, which cells lose taps, and what is left in the end?",
        "maps": [
            {"text": f"{rows} × {cols}: {name}", "rows": rows, "cols": cols, "stride": stride}
            for name, (rows, cols, stride) in maps.items()
        ],
        "presets": [
            {"name": name, "stride": stride, "rates": list(rates), "one": one, "pooling": pooling, "note": note}
            for name, (stride, rates, one, pooling, note) in ASPP_SETS.items()
        ],
        "map": 1,
        "cell": [8, 14],
        "set": list(ASPP_SETS).index("v3: 6, 12, 18"),
        "palette": TAPS_PALETTE,
        "colours": ((0, 125, 90), (190, 50, 130), (95, 70, 180), (120, 75, 20)),
    }
    shown, spoken = {}, []
    for rate in 6, 24, 36, 65:
        taps = valid_weights(rate, 65)
        mean = taps.double().mean().item()
        shown[f"rate {rate}\nmean {mean:.2f} of 9"] = torch.tensor([TAPS.index(n) for n in taps.flatten()]).view(65, 65)
        spoken.append(f"{mean:.2f} at rate {rate}")
    still = plots.masks(None, shown, TAPS_PALETTE, [f"{n} tap{'s' * (n > 1)}" for n in TAPS])
    alt = (
        "Maps of 65 × 65 cells, coloured by how many of a dilated kernel's nine taps lie on the map. "
        f"The mean is {', '.join(spoken)}. Small rates lose taps along the border only, a rate of 36 most of all in the "
        "middle, and at 65 the kernel is a 1 × 1."
    )
    return Figure("aspp-lab", state, still._repr_png_(), alt)


# name: bins a side of the levels, what it is
PYRAMIDS = {
    "PSPNet: 1, 2, 3, 6": ((1, 2, 3, 6), "The pyramid of the paper: 1 + 4 + 9 + 36 = 50 means."),
    "Global: 1": ((1,), "One mean of the whole map, which is the same for every cell."),
    "Fine only: 6": ((6,), "36 means and none of a wider area."),
    "1 to 8": (tuple(range(1, 9)), "More levels, and fewer channels for each."),
}
PYRAMID_SCENES = ("val", 45, (60, 70)), ("test", 112)  # a boat, one of its pixels; a road at the same place


def pyramid_lab() -> Figure:
    """Choose a map and the levels of a pyramid and see the bins, their means, and what one cell is given of them.

    The same hull, pixel for pixel, lies on water and on a road: a switch shows in which levels the two differ. The page
    computes what `AdaptiveAvgPool2d` and `interpolate(mode="bilinear", align_corners=True)` compute, of colours and of
    what the labels say. Opens on the pyramid of PSPNet and its map for 473 x 473 pixels.
    """
    from segedu import plots

    (water, on_water), (road, on_road) = _same_hull()
    maps = {"473 px": (60, 60, 473, 473), "713 px": (90, 90, 713, 713), "513 px": (65, 65, 513, 513),
            "Toytown": (13, 17, 97, 129), "Toytown, unpadded": (12, 16, 96, 128)}  # fmt: skip
    rows, cols = on_water.shape
    state = {
        "title": "Pyramid lab",
        "lead": "PSPNet cuts its last map into bins, takes the mean of each, and gives every cell the means of its "
        "surroundings at several sizes. The same hull lies on water and on a road. Predict first: on the hull, which level "
        "differs most between the two pictures, the coarse ones or the fine?",
        "rows": rows,
        "cols": cols,
        "left": 15,  # of the square part
        "names": ["hull on water", "hull on road"],
        "scenes": [
            {
                "rgb": base64.b64encode((image * 255).round().byte().permute(1, 2, 0).numpy().tobytes()).decode(),
                "labels": _runs(target),
            }
            for image, target in ((water, on_water), (road, on_road))
        ],
        "maps": [
            {"text": f"{down} × {across}: {name}", "rows": down, "cols": across, "height": height, "width": width}
            for name, (down, across, height, width) in maps.items()
        ],
        "presets": [{"name": name, "bins": bins, "note": note} for name, (bins, note) in PYRAMIDS.items()],
        "map": 0,
        "cell": [41, 30],
    }
    still = plots.bins(water, PYRAMIDS["PSPNet: 1, 2, 3, 6"][0])
    alt = (
        "A picture of a boat on a river, cut into 1, 4, 9 and 36 bins, and the mean colour of each bin: one grey for the "
        "whole picture, then blocks in which sky, houses and water begin to show."
    )
    return Figure("pyramid-lab", state, still._repr_png_(), alt)


def _same_hull() -> list[tuple[Tensor, Tensor]]:
    """Two Toytown pictures (3, 96, 128) with the same hull at the same place, and labels: 1 water, 2 road, else 0."""
    from scipy import ndimage

    from segedu.data.toytown import ROAD, WATER, Toytown

    (split, index, at), (other, on_road) = PYRAMID_SCENES
    boats = Toytown(split)
    parts, _ = ndimage.label(boats.hulls(index).numpy())
    hull = torch.from_numpy(parts == parts[at])
    scenes = [boats[index], Toytown(other)[on_road]]
    return [
        (image.where(~hull, scenes[0][0]), ((target == WATER) + 2 * (target == ROAD)).masked_fill(hull, 0))
        for image, target in scenes
    ]


MOMENTS = 60  # of a search are kept, evenly spaced


def trellis(
    history: Tensor | None = None, path: Sequence[int] | None = None, steps: Sequence[int] | None = None
) -> Figure:
    """The network-level search space of Auto-DeepLab: the steps' probabilities over a search, and networks as paths.

    Shows at each moment the most probable path (Viterbi) and how probable each path is; the reader can draw one. The page
    computes what `autodeeplab.viterbi` and `path_probability` compute. Opens at the last moment, on `path` if given.

    Args:
        history: (T, L, 4, 3), T moments of a search, each as `autodeeplab.transitions`: the step from level s after layer l
            (0 is the stem) to the finer level, the same, the coarser one, 0 where no edge is. Every step equally probable
            and no search if left out. Of more than 60 moments 60 are kept, with the first and the last.
        path: what the search decoded, the level of each layer.
        steps: T numbers for the moments; 0 to T - 1 if left out.

    Raises:
        ValueError: another shape, outgoing probabilities that do not sum to 1, not one step for each moment, a path that
            leaves the trellis or is of another length.
    """
    from segedu import plots
    from segedu.models import autodeeplab

    uniform = history is None
    if uniform:
        layers = len(autodeeplab.PUBLISHED_PATH if path is None else path)
        history = autodeeplab.transitions(torch.zeros(layers, autodeeplab.LEVELS, 3))[None]
    history = torch.as_tensor(history).detach().cpu().double()
    if history.ndim != 4 or history.shape[2:] != (autodeeplab.LEVELS, 3) or not history.numel():
        raise ValueError(f"history must be (moments, layers, 4, 3), got {tuple(history.shape)}")
    layers = history.shape[1]
    edges = autodeeplab.trellis(layers)
    wrong = (
        (history < 0) | (history > 0) & ~edges | ((history.sum(-1) - edges.any(-1).double()).abs() > 1e-3)[..., None]
    )
    if wrong.any() or history.isnan().any():
        at = (wrong | history.isnan()).nonzero()[0].tolist()
        raise ValueError(
            "history must hold probabilities that sum to 1 over the steps out of each node and are 0 where no edge is; "
            f"moment {at[0]}, layer {at[1]}, level {at[2]} has {[round(p, 4) for p in history[*at[:3]].tolist()]}"
        )
    steps = list(range(len(history)) if steps is None else steps)
    if len(steps) != len(history):
        raise ValueError(f"steps must be {len(history)}, one for each moment, got {len(steps)}")
    if path is not None:
        autodeeplab.check_path(path)
        if len(path) != layers:
            raise ValueError(f"path must have one level for each of {layers} layers, got {len(path)}")
    kept = torch.linspace(0, len(history) - 1, min(len(history), MOMENTS)).round().long()
    paths = _networks(layers)
    if path is not None:
        paths = {"Decoded": (tuple(path), "What this search decoded at its end.")} | paths
    searched = len(history) > 1
    state = {
        "title": "Trellis",
        "lead": f"A network is a path: after each of {layers} layers it is at stride 4, 8, 16 or 32, and a step is one level at most. "
        + (
            "The search learns beta, the probability of each step. Predict first: will the most probable path look like a "
            "network drawn by hand? Then play the search."
            if searched
            else "Here all steps out of a node are equally probable, as before a search. Which networks do you know as paths? "
            "Draw one."
        ),
        "layers": layers,
        "history": base64.b64encode(history[kept].numpy().astype("<f4").tobytes()).decode(),
        "steps": [int(steps[i]) for i in kept],
        "paths": [{"name": name, "levels": list(levels), "note": note} for name, (levels, note) in paths.items()],
        "shown": 0 if path is None and searched else 1,
        "most": "The path with the highest product of betas, found by Viterbi."
        + (
            " Nodes at the border have two steps on, inner ones three. So a path along the border is ahead before any search."
            if uniform
            else ""
        ),
    }
    shown, drawn = (autodeeplab.viterbi(history[-1]), "most probable") if path is None else (tuple(path), "decoded")
    if path is None and not searched:
        drawn, (shown, _) = next(iter(paths.items()))
    strides = ", ".join(str(4 * 2**level) for level in shown)
    still = plots.trellis(history[-1], shown)
    when = f" at step {steps[-1]} of a search" if searched else ""
    alt = (
        f"A trellis of {layers} layers and the strides 4, 8, 16 and 32, its steps the wider the more probable{when}. "
        f"A path stands out ({drawn}): strides {strides}."
    )
    return Figure("trellis", state, still._repr_png_(), alt)


def _networks(layers: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Networks as paths of so many layers: name -> (levels, what it is). Auto-DeepLab, Fig. 2, and its released path."""
    from segedu.models.autodeeplab import PUBLISHED_PATH

    def down_and_up(length: int) -> list[int]:
        pace = max(1, length // 6)  # layers on a level
        return [min(3, layer // pace, (length + pace - 1 - layer) // pace) for layer in range(1, length + 1)]

    flat = [min(2, layer) for layer in range(layers)]
    twice = (2 * down_and_up(layers // 2) + [0])[:layers]
    networks = {
        "DeepLab v3": (flat, "Down to stride 16, then flat: dilation keeps it there."),
        "U-Net, DeconvNet": (
            down_and_up(layers),
            "Down and up again. The trellis has no edges for U-Net's skip connections.",
        ),
        "Stacked hourglass": (twice, "Down and up, twice."),
    }
    if layers == len(PUBLISHED_PATH):
        found = (
            "Found on Cityscapes by the paper: it stays fine for three layers, goes down and up, and ends at stride 8."
        )
        networks = {"Published": (PUBLISHED_PATH, found)} | networks
    return {name: (tuple(levels), note) for name, (levels, note) in networks.items()}


def explore(model: nn.Module, data, names: Sequence[str] | None = None):
    """Pick a picture and a layer and see what the model makes of it. Live: needs a kernel.

    Args:
        data: items (image (3, H, W) in [0, 1], target).
        names: of the layers, as in `record`; the model's parts if left out. They give maps (N, C, h, w).
    """
    from segedu import plots
    from segedu.features import record
    from segedu.training import predict

    names = (
        [name for name, part in model.named_children() if not isinstance(part, nn.Dropout)] if names is None else names
    )

    def figure(picture: int, layer: str) -> "plots.Figure":
        image, _ = data[picture]
        with record(model, [layer]) as maps:
            predict(model, image)
        features = maps[layer][0]
        classes = getattr(data, "classes", ())
        return plots.maps(features, classes if len(features) == len(classes) else None)

    return _controls(figure, picture=len(data), layer=list(names))


def compare(models: Mapping[str, nn.Module], data):
    """Pick a picture and a model: image, truth, what the model says, and its errors. Live: needs a kernel.

    Args:
        models: {"FCN-32s": model, ...}.
        data: items (image (3, H, W) in [0, 1], target (H, W)), `.classes`, `.palette`.
    """
    from segedu import plots
    from segedu.training import predict

    def figure(picture: int, model: str) -> "plots.Figure":
        image, target = data[picture]
        return plots.answer(image, target, predict(models[model], image), data.palette, data.classes)

    return _controls(figure, picture=len(data), model=list(models))


def _controls(figure, **options):
    """A control for each argument of `figure` (a number: 0 to n - 1, a list: one of it) above the figure it gives."""
    import ipywidgets

    controls = {
        name: ipywidgets.IntSlider(0, 0, option - 1, description=name, continuous_update=False)
        if isinstance(option, int)
        else ipywidgets.Dropdown(options=option, description=name)
        for name, option in options.items()
    }
    shown = ipywidgets.Image(format="png", layout={"max_width": "100%"})

    def update(change=None) -> None:
        shown.value = figure(**{name: control.value for name, control in controls.items()})._repr_png_()

    for control in controls.values():
        control.observe(update, "value")
    update()
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), shown])


def _numbers(values: Tensor) -> list[float]:
    """Row by row, whole numbers without a point."""
    return [int(value) if value == int(value) else value for value in values.flatten().tolist()]


def _runs(labels: Tensor) -> list[int]:
    """Labels row by row as [value, count, value, count, ...]."""
    values, counts = torch.unique_consecutive(labels.flatten(), return_counts=True)
    return torch.stack([values, counts], dim=1).flatten().tolist()


def _quantised(scores: Tensor) -> dict:
    """(K, h, w) as 16-bit integers times a scale: four digits, in a third of the text."""
    scores = scores.cpu().numpy().astype(np.float64)
    scale = float(f"{(abs(scores).max() or 1) / 32767:.6g}")
    return {
        "shape": list(scores.shape),
        "scale": scale,
        "data": base64.b64encode(np.round(scores / scale).astype("<i2").tobytes()).decode(),
    }


def _encoded(pixels: np.ndarray, format: str = "png", **options) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=format, optimize=True, **options)
    return out.getvalue()


def _few_colours(png: bytes) -> bytes:
    """The same picture in 128 colours: a third of the bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def _data_url(picture: bytes, format: str = "png") -> str:
    return f"data:image/{format};base64," + base64.b64encode(picture).decode()

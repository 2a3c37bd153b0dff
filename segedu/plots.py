"""Figures of the book, one function for each kind: tensors in, a matplotlib figure out, never shown here.

No global state of pyplot is read or changed. The face is white, so figures read the same on light and dark pages.
Written 7 inches wide, for a text column of about 700 px.
"""

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from segedu.metrics import VOID
from segedu.receptive import Field

WIDTH = 7.0  # inches
STYLE = {
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "#1a1a1a",
    "axes.labelcolor": "#1a1a1a",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
}
# Okabe and Ito's colours, which stay apart for colour-blind readers; every series also has a marker of its own.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
RIGHT, WRONG = (238, 238, 238), (176, 24, 40)
COLUMNS = 4


@contextlib.contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows by itself, also where pyplot was never imported, in the style of this module."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        with _style():
            self.savefig(out, format="png", dpi=self.dpi, bbox_inches="tight", metadata={"Software": None})
        return out.getvalue()

    def draw(self, renderer) -> None:
        with _style():  # ticks are made when drawn
            super().draw(renderer)


def _styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """The same style for every figure, whatever the notebook has set."""

    @functools.wraps(plot)
    def wrapper(*args, **kwargs) -> Figure:
        with _style():
            return plot(*args, **kwargs)

    return wrapper


@_styled
def masks(
    image: Tensor | None, labelings: Mapping[str, Tensor], palette: Tensor, classes: Sequence[str] | None = None
) -> Figure:
    """A picture and labelings of it in a row: image (3, H, W) in [0, 1], each labeling (H, W), palette (K, 3) uint8.

    Void (255) is striped. With class names, a legend of the classes that occur. `image=None` shows the labelings alone.
    """
    panels = {} if image is None else {"image": _pixels(image)}
    panels |= {name: _painted(labels, palette) for name, labels in labelings.items()}
    return _panels(panels, _legend(labelings.values(), palette, classes))


@_styled
def errors(labels: Tensor, target: Tensor) -> Figure:
    """Where a prediction is wrong: (H, W) and (H, W) -> wrong dark red, right light grey, void striped."""
    panels = {f"{_wrong(labels, target):.1%} of the pixels wrong": _error_pixels(labels, target)}
    return _panels(panels, [], width=WIDTH / 2)


@_styled
def answer(
    image: Tensor, target: Tensor, labels: Tensor, palette: Tensor, classes: Sequence[str] | None = None
) -> Figure:
    """What a model says of one picture: image, truth, prediction and errors. Shapes as in `masks` and `errors`."""
    panels = {
        "image": _pixels(image),
        "truth": _painted(target, palette),
        "prediction": _painted(labels, palette),
        f"{_wrong(labels, target):.1%} wrong": _error_pixels(labels, target),
    }
    return _panels(panels, _legend([target, labels], palette, classes))


@_styled
def maps(features: Tensor, names: Sequence[str] | None = None, limit: int = 16) -> Figure:
    """The first `limit` of C feature maps (C, H, W), all on one colour scale; `names` are C titles."""
    features = _array(features)
    if features.ndim != 3:
        raise ValueError(f"feature maps must be (C, H, W), got {features.shape}; take one picture with maps[name][0]")
    if names is not None and len(names) != len(features):
        raise ValueError(f"names must be {len(features)}, one for each map, got {len(names)}")
    shown = features[:limit]
    top = float(np.quantile(np.abs(shown), 0.995)) or 1.0
    signed = shown.min() < 0
    figure, axes = _grid(len(shown), shown.shape[1] / shown.shape[2])
    for i, (ax, feature) in enumerate(zip(axes, shown, strict=True)):
        picture = ax.imshow(feature, cmap="RdBu_r" if signed else "viridis", vmin=-top if signed else 0, vmax=top)
        ax.set_title(names[i] if names is not None else f"map {i}", fontsize=9)
    figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    return figure


@_styled
def layers(pictures: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """A picture and the maps that a model makes of it, five in a row, all of one height, each on its own scale.

    Args:
        pictures: (3, H, W) in [0, 1] as a picture, (h, w) as a map: 0 is white, the largest value dark, and the colour
            follows the square root, as most values of a map are far below its largest.
    """
    if len(titles) != len(pictures):
        raise ValueError(f"titles must be {len(pictures)}, one for each picture, got {len(titles)}")
    height, width = pictures[0].shape[-2:]
    figure, axes = _grid(len(pictures), height / width, columns=5)
    for ax, picture, title in zip(axes, pictures, titles, strict=True):
        if picture.ndim == 3:
            ax.imshow(_pixels(picture))
        else:
            values = _array(picture)
            values = np.sign(values) * np.sqrt(np.abs(values))
            top = float(np.abs(values).max()) or 1.0
            signed = values.min() < 0
            ax.imshow(
                values,
                cmap="PuOr" if signed else "Blues",
                vmin=-top if signed else 0,
                vmax=top,
                interpolation="nearest",
                extent=(0, width, height, 0),
            )
        ax.set_title(title, fontsize=9)
    return figure


@_styled
def bins(image: Tensor, levels: Sequence[int] = (1, 2, 3, 6)) -> Figure:
    """The bins of pyramid pooling over a picture (3, H, W) in [0, 1], one column for each level, and their mean colours.

    Args:
        levels: bins a side; the borders are those of `AdaptiveAvgPool2d`.
    """
    height, width = image.shape[1:]
    figure, axes = _grid(2 * len(levels), height / width, columns=len(levels))
    for i, level in enumerate(levels):
        over, means = axes[i], axes[len(levels) + i]
        over.imshow(_pixels(image), extent=(0, width, height, 0))
        cuts = [(k * side // level, -(-(k + 1) * side // level)) for side in (height, width) for k in range(level)]
        for top, bottom in cuts[:level]:
            for left, right in cuts[level:]:
                for colour, line in ("black", 2.2), ("white", 0.8):
                    over.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=line))
        over.set_title(f"{level} × {level}")
        pooled = adaptive_avg_pool2d(image[None], level)[0]
        means.imshow(_pixels(pooled), extent=(0, width, height, 0), interpolation="nearest")
        means.set_title("mean colours" if level > 1 else "mean colour")
    return figure


@_styled
def field(image: Tensor, field: Field, effective: Tensor, cell: tuple[int, int]) -> Figure:
    """The theoretical field of one cell as a box and its effective field as a heat map, over the picture.

    Args:
        image: (3, H, W) in [0, 1].
        field: of the map, as from `receptive_field`.
        effective: (H, W), as from `effective_field`.
        cell: (row, column) of the cell in its map; `effective_field` takes (h // 2, w // 2).
    """
    height, width = effective.shape
    sizes, strides, centres = (value if isinstance(value, tuple) else (value, value) for value in field)
    middle = [centre + stride * i for centre, stride, i in zip(centres, strides, cell, strict=True)]
    top, left = (m - size / 2 for m, size in zip(middle, sizes, strict=True))
    figure, (ax,) = _grid(1, height / width)
    ax.imshow(_pixels(image).mean(2), cmap="gray", vmin=-0.3, vmax=1.3)
    strength = _array(effective) / max(float(effective.max()), 1e-30)
    heat = ax.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=np.sqrt(strength).clip(0, 0.9))
    for colour, line in ("white", 3.5), ("#0072b2", 1.8):
        ax.add_patch(Rectangle((left, top), sizes[1], sizes[0], fill=False, ec=colour, lw=line, clip_on=True))
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    ax.set_title(f"theoretical field {sizes[0]:g} x {sizes[1]:g} px (box, cut by the picture), effective field (heat)")
    figure.colorbar(heat, ax=ax, shrink=0.8, aspect=30, pad=0.02, label="share of the strongest gradient")
    return figure


@_styled
def lattice(corners: Tensor, splat: Tensor, blurred: Tensor, read: Tensor, reach: float) -> Figure:
    """Splat, blur and slice of one point's value 1, in two dimensions, from -reach to reach along both.

    Args:
        corners: (M, 2), where the lattice points lie.
        splat, blurred: (M,), their values before and after the blur, as discs; of the first also in numbers.
        read: (n, n), what a point at each place reads, rows = second feature. Broken lines: the Gaussian about the point,
            where it is 3/4, 1/2 and 1/4 of its height.
    """
    corners, splat, blurred, read = (_array(values) for values in (corners, splat, blurred, read))
    point = splat @ corners  # the weighted mean of its corners
    edges = np.linalg.norm(corners[:, None] - corners, axis=2)
    a, b = np.nonzero(np.triu((edges > 0) & (edges < 1.01 * edges[edges > 1e-6].min())))
    figure = Figure(figsize=(WIDTH, WIDTH / 3 + 0.3), layout="constrained")
    for i, title in enumerate(("splat: to three corners", "blur: along three axes", "slice: what each place reads")):
        ax = figure.add_subplot(1, 3, i + 1, title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
        ax.plot(*corners[[a, b]].transpose(2, 0, 1), color="#999" if i < 2 else "white", lw=0.6, alpha=0.7)
        ax.set_axis_off()
        if i < 2:
            ax.scatter(*corners.T, s=600 * (splat, blurred)[i], color=COLOURS[0], alpha=0.6, lw=0)
        else:
            ax.imshow(
                read, cmap="viridis", extent=(-reach, reach, -reach, reach), origin="lower", interpolation="bilinear"
            )
            side = np.linspace(-reach, reach, len(read))
            squares = (side - point[0]) ** 2 + (side[:, None] - point[1]) ** 2
            ax.contour(side, side, np.exp(-squares / 2), [0.25, 0.5, 0.75], colors="white", linestyles="dashed")
        ax.plot(*point, "x", color=COLOURS[1], ms=8, mew=2)
    for at, value in zip(corners, splat, strict=True):
        if value > 0:
            figure.axes[0].annotate(
                f"{value:.2f}", at, (26, 0), textcoords="offset points", ha="center", va="center", fontsize=9
            )
    return figure


@_styled
def trellis(steps: Tensor, path: Sequence[int]) -> Figure:
    """The trellis of Auto-DeepLab with a path through it; steps the wider the more probable.

    Args:
        steps: (L, 4, 3), as `autodeeplab.transitions`.
        path: the level of each layer.
    """
    steps = _array(steps)
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    ax = figure.add_subplot(xlabel="layer", ylabel="stride")
    for layer, level, way in np.argwhere(steps > 0):
        share = steps[layer, level, way]
        ends = (layer, layer + 1), (level, level + way - 1)
        ax.plot(*ends, color=COLOURS[0], lw=0.6 + 7 * share, alpha=0.12 + 0.88 * share, solid_capstyle="round")
    ax.plot(range(len(path) + 1), [0, *path], color=COLOURS[1], lw=3, marker="o", ms=9, mec="black", zorder=3)
    nodes = [(layer, level) for layer in range(len(path) + 1) for level in range(min(layer, 3) + 1)]
    ax.plot(*zip(*nodes, strict=True), "o", color="white", mec="black", ms=6, zorder=2.5)
    ax.set_xticks(range(len(path) + 1), ["stem", *range(1, len(path) + 1)])
    ax.set_yticks(range(4), [4, 8, 16, 32])
    ax.invert_yaxis()
    return figure


@_styled
def curves(runs: Mapping[str, Sequence], ylabel: str = "loss", xlabel: str = "step", smooth: int = 1) -> Figure:
    """A line for each name: values (steps,) of one run, or (seeds, steps): their mean, and a band from least to most.

    Args:
        smooth: each point is the mean of so many steps before it (fewer at the start).
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    ax = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for i, (name, values) in enumerate(runs.items()):
        values = np.stack([_running_mean(_array(run), smooth) for run in _seeds(values)])
        steps = np.arange(1, values.shape[1] + 1)
        colour, every = COLOURS[i % len(COLOURS)], max(1, len(steps) // 8)
        ax.plot(
            steps, values.mean(0), color=colour, marker=MARKERS[i % len(MARKERS)], markevery=every, ms=5, label=name
        )
        if len(values) > 1:
            ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


@_styled
def bars(values: Mapping[str, Sequence | Mapping[str, Sequence]], ylabel: str = "mean IU") -> Figure:
    """A bar for each name at the mean over seeds, and a point for each seed.

    Values are {name: seeds}, or {name: {group: seeds}} for bars side by side in groups.
    """
    grouped = all(isinstance(value, Mapping) for value in values.values())
    series = values if grouped else {"": values}
    groups = list(dict.fromkeys(group for of in series.values() for group in of))
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    ax = figure.add_subplot(ylabel=ylabel)
    width = 0.8 / len(series) if grouped else 0.6
    for i, (name, of) in enumerate(series.items()):
        for j, group in enumerate(groups):
            if group not in of:
                continue
            seeds = np.atleast_1d(_array(of[group]))
            x = j + (i - (len(series) - 1) / 2) * width
            label = name if grouped and group == next(iter(of)) else None
            ax.bar(x, seeds.mean(), 0.92 * width, color=COLOURS[i % len(COLOURS)], alpha=0.65, label=label)
            spread = np.linspace(-0.2, 0.2, len(seeds)) * width if len(seeds) > 1 else np.zeros(1)
            ax.plot(x + spread, seeds, "o", ms=4.5, color="white", mec="black", mew=1.1)
            ax.annotate(
                f"{seeds.mean():.3f}", (x, seeds.max()), (0, 5), textcoords="offset points", ha="center", fontsize=9
            )
    ax.set_xticks(range(len(groups)), groups)
    ax.margins(y=0.12)
    if grouped:
        ax.legend(frameon=False, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


@_styled
def matrix(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """A confusion matrix (K, K), rows = target, as shares of each row in per cent; a row without pixels is empty."""
    counts = _array(confusion).astype(float)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion must be (K, K) for {len(classes)} classes, got {counts.shape}")
    total = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    side = min(WIDTH, 2.2 + 0.45 * len(classes))
    figure = Figure(figsize=(side, 0.88 * side), layout="constrained")
    ax = figure.add_subplot(xlabel="prediction", ylabel="truth")
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(share):
        if value >= 0.5:
            ax.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color="white" if value > 55 else "black"
            )
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(classes)), classes)
    ax.spines[:].set_visible(False)
    ax.set_title("% of the pixels of each class", loc="left")
    return figure


def _painted(labels: Tensor, palette: Tensor) -> np.ndarray:
    """Labels (H, W) as colours (h, w, 3), void striped."""
    labels, palette = _array(labels), _array(palette)
    void = labels == VOID
    if (labels[~void] >= len(palette)).any():
        raise ValueError(f"labels must be below {len(palette)}, the colours in the palette, got {labels[~void].max()}")
    return _striped(palette[np.where(void, 0, labels)], void)


def _error_pixels(labels: Tensor, target: Tensor) -> np.ndarray:
    labels, target = _array(labels), _array(target)
    return _striped(np.where((labels == target)[..., None], RIGHT, WRONG), target == VOID)


def _striped(colours: np.ndarray, void: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) with grey stripes on white where void (H, W), enlarged to at least 512 px so that they show."""
    zoom = -(-512 // void.shape[1])
    colours, void = (pixels.repeat(zoom, 0).repeat(zoom, 1) for pixels in (colours, void))
    row, column = np.indices(void.shape)
    stripe = np.where((row + column) % 20 < 5, 120, 255)
    return np.where(void[..., None], stripe[..., None], colours).astype(np.uint8)


def _wrong(labels: Tensor, target: Tensor) -> float:
    labels, target = _array(labels), _array(target)
    return float((labels != target)[target != VOID].mean())


def _panels(panels: Mapping[str, np.ndarray], handles: Sequence[Patch], width: float = WIDTH) -> Figure:
    height, across = next(iter(panels.values())).shape[:2]
    figure, axes = _grid(len(panels), height / across, width, below=0.28 * math.ceil(len(handles) / 7))
    for ax, (name, pixels) in zip(axes, panels.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_title(name)
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False, handlelength=1.1
        )
    return figure


def _grid(
    n: int, aspect: float, width: float = WIDTH, below: float = 0.0, columns: int = COLUMNS
) -> tuple[Figure, list[Axes]]:
    """n axes for pictures of height / width `aspect`, at most `columns` in a row, the rows as even as can be."""
    rows = math.ceil(n / columns)
    columns = math.ceil(n / rows)
    figure = Figure(figsize=(width, rows * (width / columns * aspect + 0.3) + below), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    for ax in axes:
        ax.set_axis_off()
    return figure, axes


def _legend(labelings, palette: Tensor, classes: Sequence[str] | None) -> list[Patch]:
    if classes is None:
        return []
    used = sorted(set().union(*(np.unique(_array(labels)).tolist() for labels in labelings)))
    colours = _array(palette) / 255
    handles = [Patch(facecolor=colours[k], edgecolor="#777", lw=0.5, label=classes[k]) for k in used if k != VOID]
    return handles + [Patch(facecolor="white", edgecolor="#777", hatch="////", label="void")] * (VOID in used)


def _pixels(image: Tensor) -> np.ndarray:
    return _array(image).transpose(1, 2, 0).clip(0, 1)


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _seeds(values: Sequence) -> Sequence:
    return [values] if np.ndim(values[0]) == 0 else values


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(values, dtype=float)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)

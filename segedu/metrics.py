"""Scores of a semantic segmentation, all taken from one confusion matrix, plus boundary F1 and recall by object size.

Sources: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, Sec. 5 (the four
scores). Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013, and Badrinarayanan et
al., "SegNet", PAMI 2017, Sec. 4.2 (boundary F1, tolerance 0.75 % of the picture's diagonal).
Chapter: chapters/01_measuring.ipynb
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOID = 255
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (0.005, 0.05)  # share of the picture: small < 0.5 %, medium 0.5 to 5 %, large > 5 %
MIN_OBJECT = 4  # pixels; smaller components are specks of the annotation, not objects
BANDS = (1, 2, 4, 8)  # pixels from a border of the target

# Pixels counted at once: temporary arrays stay in the processor's cache, and torch, which shares larger ones out among
# threads that then wait for each other, keeps to one.
_CHUNK = 32_000


def confusion_matrix(labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts of (true class, predicted class): integers of any equal shape -> long (K, K), rows = target.

    Pixels whose target is 255 (void) are left out. On the device of the inputs.

    Raises:
        ValueError: a value outside 0..K-1, other than void in the target; unequal shapes; a dtype that is no integer.
    """
    labels, target = _check(labels, target, num_classes)
    labels, target = labels.reshape(-1), target.reshape(-1)
    counts = torch.zeros(256 * 256, dtype=torch.long, device=target.device)
    for start in range(0, target.numel(), _CHUNK):
        x, y = _wide(labels[start : start + _CHUNK]), _wide(target[start : start + _CHUNK])
        low, high = torch.aminmax(x | y)  # a negative or large value in either shows in their bitwise or
        if low < 0 or high > 255:
            raise _out_of_range(x, y, num_classes)
        found = torch.bincount(torch.add(y, x, alpha=256))
        counts[: len(found)] += found
    counts = counts.view(256, 256).T  # void, 255, is the fast index above, so that `found` is short
    matrix = counts[:num_classes, :num_classes]
    allowed = matrix.sum() + counts[VOID, :num_classes].sum() + counts[VOID, VOID]
    if allowed != target.numel():
        raise _out_of_range(labels, target, num_classes)
    return matrix.clone()


def boundary_f1(labels: Tensor, target: Tensor, num_classes: int, tolerance: float = 0.0075) -> float:
    """Boundary F1 of one picture: (H, W) and (H, W) -> mean of `class_boundary_f1` over the classes in the target.

    nan for a picture that is all void. The score of a data set is the mean over its pictures.
    """
    return class_boundary_f1(labels, target, num_classes, tolerance).nanmean().item()


def class_boundary_f1(labels: Tensor, target: Tensor, num_classes: int, tolerance: float = 0.0075) -> Tensor:
    """Boundary F1 of each class in one picture: (H, W) and (H, W) -> float64 (K,) on the CPU, nan for a class not there.

    The boundary of a class is its pixels that have a 4-neighbour of another class; void counts as another class, the
    edge of the picture does not. The prediction is void where the target is void. Precision is the share of predicted
    boundary pixels with a true boundary pixel of that class at most `tolerance` diagonals away (Euclidean, between
    pixel centres; 0.0075 is 4.5 px at 360x480), recall the reverse, F1 their harmonic mean.

    Where it is not defined: a class that no boundary pixel is predicted for scores 0. A class that fills the whole
    picture has no boundary: it scores 1 if the prediction also fills the picture with it, else 0.
    """
    present = confusion_matrix(labels, target, num_classes).sum(1).nonzero()[:, 0]
    target = _one_picture(target)
    labels = _one_picture(labels).where(target != VOID, VOID)
    true, predicted = _boundary(target, present), _boundary(labels, present)
    radius = tolerance * math.hypot(*target.shape)
    precision = _share(predicted & _spread(true, radius), predicted)
    recall = _share(true & _spread(predicted, radius), true)
    f1 = (2 * precision * recall / (precision + recall)).nan_to_num(0.0)
    filled = ~true.flatten(1).any(1).cpu()
    f1[filled] = float((labels == target).all())
    scores = torch.full((num_classes,), math.nan, dtype=f1.dtype)
    scores[present.cpu()] = f1
    return scores


def size_recall(labels: Tensor, target: Tensor) -> Tensor:
    """Recall of the objects of one picture by size: (H, W) and (H, W) -> float64 (3, 2).

    An object is a 4-connected component of one class of the target; its recall is the share of its pixels that are
    labelled right. Row i holds, for `SIZES[i]`, the sum over objects of their recall and their number. Sizes are shares
    of the picture's area (`SIZE_LIMITS`); components under `MIN_OBJECT` pixels are left out.
    """
    import numpy as np
    from scipy import ndimage

    labels, target = _one_picture(labels).cpu().numpy(), _one_picture(target).cpu().numpy()
    height, width = target.shape
    # A grid of pixels and, between neighbours, of links that are there if both are of one class: one run finds the
    # components of all classes.
    grid = np.zeros((2 * height - 1, 2 * width - 1), dtype=bool)
    grid[::2, ::2] = target != VOID
    grid[1::2, ::2] = target[1:] == target[:-1]
    grid[::2, 1::2] = target[:, 1:] == target[:, :-1]
    objects = ndimage.label(grid)[0][::2, ::2].ravel()
    pixels = np.bincount(objects)
    right = np.bincount(objects, weights=(labels == target).ravel())
    pixels[0] = 0  # void
    is_object = pixels >= MIN_OBJECT
    recall = right[is_object] / pixels[is_object]
    share = pixels[is_object] / target.size
    size = (share >= SIZE_LIMITS[0]).astype(int) + (share > SIZE_LIMITS[1])
    sums = np.bincount(size, weights=recall, minlength=3)
    return torch.from_numpy(np.stack([sums, np.bincount(size, minlength=3)], axis=1))


def band_accuracy(labels: Tensor, target: Tensor) -> Tensor:
    """Right and all pixels of one picture by their distance to a border: (H, W) and (H, W) -> float64 (5, 2).

    Row i counts the pixels at most `BANDS[i]` px from a border of the target and farther than `BANDS[i - 1]`; the last
    row those farther than every band. A border is where the target changes, to void as well; the pixels on both sides
    of it are at distance 1. Void is not counted. The narrow bands together are the trimap of Kohli et al. 2009.
    """
    import numpy as np
    from scipy import ndimage

    labels, target = _one_picture(labels).cpu().numpy(), _one_picture(target).cpu().numpy()
    edge = np.zeros(target.shape, dtype=bool)
    down, right = target[1:] != target[:-1], target[:, 1:] != target[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    distance = ndimage.distance_transform_edt(~edge) + 1 if edge.any() else np.full(target.shape, np.inf)
    ring = np.searchsorted(BANDS, distance)[target != VOID]
    correct = (labels == target)[target != VOID]
    n = len(BANDS) + 1
    counts = np.bincount(ring, weights=correct, minlength=n), np.bincount(ring, minlength=n)
    return torch.from_numpy(np.stack(counts, axis=1).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one picture or of many: `a + b` is the score of both together.

    Args:
        matrix: (K, K) counts, rows = target, as from `confusion_matrix`.
        boundary: (2,) sum of the pictures' boundary F1, and their number; none if left out.
        sizes: (3, 2) as from `size_recall`; none if left out.
        classes: K names.
        bands: (5, 2) as from `band_accuracy`; none if left out.

    A class that is in neither target nor prediction has IU nan and is left out of the mean; one that is predicted but
    never there counts 0. A class that is not in the target has accuracy nan and is left out of the mean accuracy.
    """

    matrix: Tensor
    boundary: Tensor | None = None
    sizes: Tensor | None = None
    classes: Sequence[str] | None = None
    bands: Tensor | None = None

    def __post_init__(self) -> None:
        matrix = torch.as_tensor(self.matrix)
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be (K, K), rows = target, got shape {tuple(matrix.shape)}")
        if not _is_integer(matrix):
            raise ValueError(f"matrix must hold counts (integers), got {matrix.dtype}; use confusion_matrix")
        if (matrix < 0).any():
            raise ValueError(f"matrix must hold counts, got {matrix.min().item()}; use confusion_matrix")
        names = [str(k) for k in range(len(matrix))] if self.classes is None else list(self.classes)
        if len(names) != len(matrix):
            raise ValueError(f"classes must be {len(matrix)} names, one for each row of matrix, got {len(names)}")
        boundary = torch.zeros(2) if self.boundary is None else torch.as_tensor(self.boundary)
        sizes = torch.zeros(3, 2) if self.sizes is None else torch.as_tensor(self.sizes)
        object.__setattr__(self, "matrix", matrix.to("cpu", torch.long))
        object.__setattr__(self, "boundary", boundary.to("cpu", torch.float64))
        object.__setattr__(self, "sizes", sizes.to("cpu", torch.float64))
        object.__setattr__(self, "classes", names)
        bands = torch.zeros(len(BANDS) + 1, 2) if self.bands is None else torch.as_tensor(self.bands)
        object.__setattr__(self, "bands", bands.to("cpu", torch.float64))

    @classmethod
    def of(cls, labels: Tensor, target: Tensor, num_classes: int, classes: Sequence[str] | None = None) -> "Scores":
        """The scores of one picture: labels (H, W), target (H, W) with 255 = void."""
        matrix = confusion_matrix(labels, target, num_classes)
        boundary = boundary_f1(labels, target, num_classes)
        boundary = torch.tensor([0.0, 0.0] if math.isnan(boundary) else [boundary, 1.0], dtype=torch.float64)
        return cls(matrix, boundary, size_recall(labels, target), classes, band_accuracy(labels, target))

    def __add__(self, other: "Scores") -> "Scores":
        if not isinstance(other, Scores):
            return NotImplemented
        if self.classes != other.classes:
            raise ValueError(f"scores must be of the same classes, got {self.classes} and {other.classes}")
        return Scores(
            self.matrix + other.matrix,
            self.boundary + other.boundary,
            self.sizes + other.sizes,
            self.classes,
            self.bands + other.bands,
        )

    def __radd__(self, other: int) -> "Scores":
        return self if other == 0 else NotImplemented  # sum(scores) starts from 0

    @property
    def iou(self) -> Tensor:
        """(K,) intersection over union, nan for a class in neither target nor prediction."""
        right = self.matrix.diagonal().double()
        return right / (self.matrix.sum(0) + self.matrix.sum(1) - right)

    @property
    def accuracy(self) -> Tensor:
        """(K,) share of the pixels of each class that are labelled right, nan for a class not in the target."""
        return self.matrix.diagonal().double() / self.matrix.sum(1)

    @property
    def miou(self) -> float:
        """Mean IU over classes."""
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        """Share of all pixels that are labelled right."""
        return (self.matrix.diagonal().sum().double() / self.matrix.sum()).item()

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over classes."""
        return self.accuracy.nanmean().item()

    @property
    def fw_iou(self) -> float:
        """Frequency weighted IU: mean IU with each class weighted by its share of the target's pixels."""
        pixels = self.matrix.sum(1)
        return ((pixels * self.iou)[pixels > 0].sum() / pixels.sum()).item()

    @property
    def boundary_f1(self) -> float:
        """Mean over pictures of `boundary_f1`; nan if it was not measured."""
        return (self.boundary[0] / self.boundary[1]).item()

    @property
    def by_size(self) -> dict[str, float]:
        """Mean recall of small, medium and large objects (see `size_recall`); nan where there is none."""
        return dict(zip(SIZES, (self.sizes[:, 0] / self.sizes[:, 1]).tolist(), strict=True))

    @property
    def by_band(self) -> dict[str, float]:
        """Pixel accuracy within 1, 2, 4 and 8 px of a border, and beyond them (see `band_accuracy`); nan where no pixel is."""
        within = self.bands[:-1].cumsum(0)
        counts = torch.cat([within, self.bands[-1:]])
        names = [*(f"{width} px" for width in BANDS), "beyond"]
        return dict(zip(names, (counts[:, 0] / counts[:, 1]).tolist(), strict=True))

    def to_dict(self) -> dict:
        """Everything as plain lists, numbers and None (for nan), ready for JSON."""
        return {
            "miou": _plain(self.miou),
            "pixel_accuracy": _plain(self.pixel_accuracy),
            "mean_accuracy": _plain(self.mean_accuracy),
            "fw_iou": _plain(self.fw_iou),
            "boundary_f1": _plain(self.boundary_f1),
            "by_size": {size: _plain(recall) for size, recall in self.by_size.items()},
            "by_band": {band: _plain(accuracy) for band, accuracy in self.by_band.items()},
            "classes": list(self.classes),
            "iou": [_plain(value) for value in self.iou.tolist()],
            "accuracy": [_plain(value) for value in self.accuracy.tolist()],
            "matrix": self.matrix.tolist(),
        }

    def _overall(self) -> list[tuple[str, float]]:
        return [
            ("mean IU", self.miou),
            ("pixel accuracy", self.pixel_accuracy),
            ("mean accuracy", self.mean_accuracy),
            ("frequency weighted IU", self.fw_iou),
            ("boundary F1", self.boundary_f1),
            *((f"recall, {size} objects", recall) for size, recall in self.by_size.items()),
        ]

    def _per_class(self) -> list[tuple[str, float, float]]:
        return list(zip(self.classes, self.iou.tolist(), self.accuracy.tolist(), strict=True))

    def __str__(self) -> str:
        wide = max(22, *(len(name) for name in self.classes))
        lines = [f"{name:<{wide}}  {_text(value):>8}" for name, value in self._overall()]
        lines += ["", f"{'class':<{wide}}  {'IU':>8}  {'accuracy':>8}"]
        lines += [f"{name:<{wide}}  {_text(iou):>8}  {_text(acc):>8}" for name, iou, acc in self._per_class()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        overall = "".join(_row(name, value) for name, value in self._overall())
        per_class = "".join(_row(*row) for row in self._per_class())
        return (
            '<table><caption>Scores</caption><thead><tr><th scope="col">score</th><th scope="col">value</th></tr>'
            f"</thead><tbody>{overall}</tbody></table>"
            '<table><caption>Scores per class</caption><thead><tr><th scope="col">class</th><th scope="col">IU</th>'
            f'<th scope="col">accuracy</th></tr></thead><tbody>{per_class}</tbody></table>'
        )


def _check(labels: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    labels, target = torch.as_tensor(labels), torch.as_tensor(target)
    if not 1 <= num_classes <= VOID:
        raise ValueError(f"num_classes must be 1 to {VOID} ({VOID} itself is void), got {num_classes}")
    if not (_is_integer(labels) and _is_integer(target)):
        raise ValueError(f"labels must be integers, got {labels.dtype} and {target.dtype}; use logits.argmax(1)")
    if labels.shape != target.shape:
        raise ValueError(
            f"labels and target must have one shape, got {tuple(labels.shape)} and {tuple(target.shape)}; "
            "resize the logits to the target's size, then take argmax over the classes"
        )
    return labels, target


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _one_picture(x: Tensor) -> Tensor:
    x = _wide(torch.as_tensor(x))
    if x.dim() != 2:
        raise ValueError(f"one picture (H, W) is needed, got shape {tuple(x.shape)}; score pictures one at a time")
    return x


def _wide(x: Tensor) -> Tensor:
    return x.int() if x.element_size() < 4 else x.long()


def _out_of_range(labels: Tensor, target: Tensor, num_classes: int) -> ValueError:
    labels, target = _wide(labels), _wide(target)
    wrong = ((target < 0) | (target >= num_classes)) & (target != VOID)
    where, value = "the target", target[wrong]
    if not wrong.any():
        wrong = ((labels < 0) | (labels >= num_classes)) & ((labels != VOID) | (target != VOID))
        where, value = "the prediction", labels[wrong]
    return ValueError(
        f"labels must be 0 to {num_classes - 1}, got {value[0].item()} in {where} ({len(value)} pixels); "
        f"check num_classes={num_classes}, or set pixels of no class to {VOID} (void) in the target"
    )


def _boundary(labels: Tensor, classes: Tensor) -> Tensor:
    """(H, W) -> bool (C, H, W): pixels of each of the C classes that have a 4-neighbour of another class."""
    edge = torch.zeros_like(labels, dtype=torch.bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return (labels == classes.to(labels.dtype)[:, None, None]) & edge


def _spread(mask: Tensor, radius: float) -> Tensor:
    """bool (C, H, W) -> bool (C, H, W): pixels at most `radius` px from a pixel of the mask (dilation by a disc)."""
    height = mask.shape[1]
    near, row, half = torch.zeros_like(mask), mask.clone(), 0
    for dy in range(min(math.floor(radius + 1e-9), height - 1), -1, -1):  # rows of the disc, top to middle
        while half < math.floor(math.sqrt(max(radius**2 - dy**2, 0)) + 1e-9):  # half the disc's width at dy
            half += 1
            row[..., half:] |= mask[..., :-half]
            row[..., :-half] |= mask[..., half:]
        near[:, dy:] |= row[:, : height - dy]
        near[:, : height - dy] |= row[:, dy:]
    return near


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.flatten(1).sum(1).cpu().double() / whole.flatten(1).sum(1).cpu()


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _row(name: str, *values: float) -> str:
    cells = "".join(f"<td>{_text(value)}</td>" for value in values)
    return f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'

"""Learning Deconvolution Network for Semantic Segmentation. Noh, Hong, Han; ICCV 2015.

Paper: https://arxiv.org/abs/1505.04366 (Fig. 2 and Sec. 3 to 5).  Code: https://github.com/HyeonwooNoh/DeconvNet
Chapter: chapters/06_deconvnet.ipynb

A box is a row (top, left, bottom, right) of pixels; bottom and right lie just outside, so that
`image[:, top:bottom, left:right]` is its part of the picture.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from segedu.backbones import he_init
from segedu.layers import batch_norm as norm
from segedu.layers import normalize, pool_with_switches, scale, unpool

Proposals = Callable[[Tensor], Tensor]  # image (3, H, W) -> boxes (N, 4), long, the most promising first


class DeconvNet(nn.Module):
    """VGG16 down to one vector, and its mirror image up again: unpooling by the switches, then deconvolutions.

    Shape: images (N, 3, size, size) in [0, 1] -> logits (N, K, size, size). `OverProposals` takes pictures of any size.

    Args:
        num_classes: K.
        size: side of the picture in pixels, a multiple of 32.
        batch_norm: normalise after every convolution and deconvolution but `score`. The paper needs it (Sec. 4.1).
        width: channel counts as a multiple of the paper's.

    Differences from the paper: the trunk is normalised and initialised as torchvision's VGG16, not Caffe's. In
    evaluation batch norm uses running averages; the release takes the statistics of 500 more forward passes.
    """

    def __init__(self, num_classes: int, *, size: int = 224, batch_norm: bool = True, width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if size < 32 or size % 32:
            raise ValueError(f"size must be a multiple of 32 (five poolings halve it), got {size}")
        self.num_classes, self.size = num_classes, size
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)
        (c6,) = scale((4096,), width)

        self.stage1 = convolutions([3, c1, c1], batch_norm)
        self.stage2 = convolutions([c1, c2, c2], batch_norm)
        self.stage3 = convolutions([c2, c3, c3, c3], batch_norm)
        self.stage4 = convolutions([c3, c4, c4, c4], batch_norm)
        self.stage5 = convolutions([c4, c5, c5, c5], batch_norm)
        self.fc6 = he_init(nn.Conv2d(c5, c6, size // 32))
        self.norm6 = norm(c6) if batch_norm else nn.Identity()
        self.fc7 = he_init(nn.Conv2d(c6, c6, 1))
        self.norm7 = norm(c6) if batch_norm else nn.Identity()

        self.fc6_deconv = chain([nn.ConvTranspose2d(c6, c5, size // 32)], batch_norm)
        self.unpool5 = Unpool()
        self.deconv5 = deconvolutions([c5, c5, c5, c5], batch_norm)
        self.unpool4 = Unpool()
        self.deconv4 = deconvolutions([c5, c5, c5, c3], batch_norm)
        self.unpool3 = Unpool()
        self.deconv3 = deconvolutions([c3, c3, c3, c2], batch_norm)
        self.unpool2 = Unpool()
        self.deconv2 = deconvolutions([c2, c2, c1], batch_norm)
        self.unpool1 = Unpool()
        self.deconv1 = deconvolutions([c1, c1, c1], batch_norm)
        self.score = nn.Conv2d(c1, num_classes, 1)
        for layer in (m for m in self.modules() if isinstance(m, nn.ConvTranspose2d) or m is self.score):
            nn.init.normal_(layer.weight, std=0.01 / width**0.5)  # the paper's 0.01, and its variances in narrow nets
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(*self.encode(images))

    # fmt: off
    def encode(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """images (N, 3, size, size) -> code (N, 4096, 1, 1) and the five switches, of `stage1` first.

        Raises ValueError for pictures of another size.
        """
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"this DeconvNet takes pictures of {self.size} x {self.size}, got {images.shape[-2]} x "
                f"{images.shape[-1]}; crop or resize them, or use OverProposals(model), which takes any size"
            )
        x, switches1 = pool_with_switches(self.stage1(normalize(images)))  # 1/2
        x, switches2 = pool_with_switches(self.stage2(x))                  # 1/4
        x, switches3 = pool_with_switches(self.stage3(x))                  # 1/8
        x, switches4 = pool_with_switches(self.stage4(x))                  # 1/16
        x, switches5 = pool_with_switches(self.stage5(x))                  # 1/32
        x = F.relu(self.norm6(self.fc6(x)))                                # 1 x 1
        x = F.relu(self.norm7(self.fc7(x)))                                # 1 x 1
        return x, (switches1, switches2, switches3, switches4, switches5)

    def decode(self, code: Tensor, switches: Sequence[Tensor]) -> Tensor:
        """What `encode` gives -> logits (N, K, size, size). Code and switches may come from different pictures."""
        switches1, switches2, switches3, switches4, switches5 = switches
        x = self.fc6_deconv(code)                                          # 1/32
        x = self.deconv5(self.unpool5(x, switches5))                       # 1/16
        x = self.deconv4(self.unpool4(x, switches4))                       # 1/8
        x = self.deconv3(self.unpool3(x, switches3))                       # 1/4
        x = self.deconv2(self.unpool2(x, switches2))                       # 1/2
        x = self.deconv1(self.unpool1(x, switches1))                       # 1
        return self.score(x)                                               # 1
    # fmt: on


class Unpool(nn.Module):
    """2x2 unpooling as a box of its own, so that its output can be recorded. Nothing to learn."""

    def forward(self, x: Tensor, switches: Tensor) -> Tensor:
        """x and switches (N, C, h, w) -> (N, C, 2h, 2w)."""
        height, width = x.shape[-2:]
        return unpool(x, switches, like=torch.empty(2 * height, 2 * width, device="meta"))


def convolutions(channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next. They keep the size."""
    return chain([he_init(nn.Conv2d(a, b, 3, padding=1)) for a, b in pairwise(channels)], batch_norm)


def deconvolutions(channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """3x3 transposed convolutions of stride 1. They keep the size too: unpooling enlarges, not they."""
    return chain([nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in pairwise(channels)], batch_norm)


def chain(layers: Sequence[nn.Module], batch_norm: bool) -> nn.Sequential:
    """Each layer, then batch norm, then ReLU."""
    boxes = []
    for layer in layers:
        boxes += [layer, norm(layer.out_channels), nn.ReLU()] if batch_norm else [layer, nn.ReLU()]
    return nn.Sequential(*boxes)


# ---- inference: over proposals


def grid_boxes(image: Tensor, levels: int = 5) -> Tensor:
    """Boxes without looking at the picture: the whole of it, then ever smaller windows that overlap by half.

    Level n has n x n windows of 2 / (n + 1) of the height and width: 1, 5, 14, 30, 55 boxes up to level 1, 2, 3, 4, 5.
    Within a level those near the centre come first.

    The paper takes Edge Boxes, which need a trained forest of edge detectors. A grid needs nothing to download and no
    further library, and gives the same boxes on every machine. It knows nothing of objects, so more boxes are wasted;
    any other source fits the same call, for example selective search or the regions of scikit-image's felzenszwalb.

    Args:
        image: (3, H, W); only its size matters.
        levels: how many, at least 1.

    Returns: (N, 4) long, coarse to fine.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    height, width = image.shape[-2:]
    boxes = []
    for n in range(1, levels + 1):
        cells = sorted(
            ((row, column) for row in range(n) for column in range(n)),
            key=lambda cell: math.dist(cell, ((n - 1) / 2, (n - 1) / 2)),
        )
        for row, column in cells:
            top, left = height * row // (n + 1), width * column // (n + 1)
            boxes.append((top, left, -(-height * (row + 2) // (n + 1)), -(-width * (column + 2) // (n + 1))))
    return torch.tensor(boxes)


class OverProposals(nn.Module):
    """Segments every proposal by itself and puts the score maps together (Sec. 5.1, Eq. 1 and 2).

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. With `crf`, log probabilities.

    Args:
        model: a DeconvNet, or any model with `size`, the side of the square pictures it takes.
        proposals: image (3, H, W) -> boxes (N, 4), the most promising first.
        limit: how many of them to use. The paper takes 50 of about 2000.
        aggregate: "max" or "sum" over the boxes at each pixel. Outside its box a map is 0, as in the release, so "max"
            never falls below 0, and a pixel in no box gets class 0, the background of VOC.
        crf: (image (3, H, W), logits (K, H, W)) -> marginals (K, H, W), applied last.

    Differences from the paper: the boxes come from a grid, not from Edge Boxes. The release skips boxes with a side
    below 112 pixels.

    Raises ValueError, at forward, if there is no proposal, or one is empty or reaches outside the picture.
    """

    def __init__(
        self,
        model: nn.Module,
        proposals: Proposals = grid_boxes,
        *,
        limit: int = 50,
        aggregate: str = "max",
        crf: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if limit < 1:
            raise ValueError(f"limit must be at least 1 box, got {limit}")
        if aggregate not in ("max", "sum"):
            raise ValueError(f'aggregate must be "max" or "sum", got {aggregate!r}')
        self.model, self.proposals, self.limit, self.aggregate, self.crf = model, proposals, limit, aggregate, crf

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.segment(image) for image in images])

    def segment(self, image: Tensor) -> Tensor:
        """One picture (3, H, W) -> logits (K, H, W)."""
        boxes = checked(self.proposals(image), image)[: self.limit]
        height, width = image.shape[1:]
        combine = torch.maximum if self.aggregate == "max" else torch.add
        total = image.new_zeros(1)
        for some in boxes.split(10):
            crops = torch.stack([resized(image, box, self.model.size) for box in some.tolist()])
            for (top, left, bottom, right), scores in zip(some.tolist(), self.model(crops), strict=True):
                scores = F.interpolate(scores[None], (bottom - top, right - left), mode="bilinear", antialias=True)[0]
                total = combine(total, F.pad(scores, (left, width - right, top, height - bottom)))
        if self.crf is None:
            return total
        return self.crf(image, total).clamp_min(torch.finfo(total.dtype).tiny).log()


def checked(boxes: Tensor, image: Tensor) -> Tensor:
    """The boxes as they came; ValueError if there are none or one is not a part of the picture."""
    height, width = image.shape[-2:]
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.is_floating_point():
        what = f"{boxes.dtype} {tuple(boxes.shape)}" if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ValueError(f"proposals must be whole numbers (N, 4): top, left, bottom, right; got {what}")
    if len(boxes) == 0:
        raise ValueError("no proposals for this picture, at least 1 is needed; begin with the whole picture's box")
    top, left, bottom, right = boxes.unbind(1)
    inside = (top >= 0) & (left >= 0) & (bottom <= height) & (right <= width) & (top < bottom) & (left < right)
    if not inside.all():
        raise ValueError(
            f"box {boxes[~inside][0].tolist()} (top, left, bottom, right) is empty or reaches outside the picture of "
            f"{height} x {width}; cut boxes at the border and leave out empty ones"
        )
    return boxes


def resized(image: Tensor, box: Sequence[int], size: int) -> Tensor:
    """The part of an image (3, H, W) in a box -> (3, size, size), bilinear."""
    top, left, bottom, right = box
    part = image[None, :, top:bottom, left:right]
    return F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


class Ensemble(nn.Module):
    """The mean of two models' probabilities, as log probabilities: EDeconvNet, with an FCN-8s (Sec. 5.2).

    Shape: images (N, 3, H, W) in [0, 1] -> log probabilities (N, K, H, W).

    Differences from the paper: none. The release does another thing: it multiplies DeconvNet's scores with FCN-8s's
    scores, negative ones set to 0 (generate_EDeconvNet_CRF_results.m).
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images: Tensor) -> Tensor:
        first, second = F.log_softmax(self.first(images), 1), F.log_softmax(self.second(images), 1)
        return torch.logaddexp(first, second) - math.log(2)


# ---- training in two stages


class ObjectCrops(Dataset):
    """Stage 1, the easy pictures: one object in the middle of each, the others void (Sec. 4.2).

    An object is a connected part of a class in `things`. Its box, enlarged, is cut out and resized.
    Item: image float (3, size, size), target long (size, size). Reads every target of `data` once at the start.

    Args:
        data: items (image (3, H, W), target (H, W)), with `.classes` and `.palette`.
        things: names of the classes that come as objects.
        size: side of the items in pixels.
        enlarge: side of the square box, as a multiple of the object's longer side. It is cut at the picture's border.
        smallest: objects of fewer pixels are left out.
        others: label of the pixels of other objects.

    Differences from the paper: the other objects become void, not background, as our sets have no background class.
    The boxes are square, so that a pole keeps its shape. The paper's random 224 x 224 window of a 250 x 250 picture
    is a recipe with scale=(250 / 224, 250 / 224).

    Raises ValueError for an unknown class, or if there is no object.
    """

    def __init__(
        self, data: Dataset, things: Sequence[str], *, size: int = 224, enlarge: float = 1.2, smallest: int = 50,
        others: int = 255,
    ) -> None:  # fmt: skip
        self.data, self.size, self.enlarge, self.others = data, size, enlarge, others
        self.classes, self.palette = data.classes, data.palette
        self.things = numbers(data, things)
        self.found = [
            (i, thing, part, box)
            for i in range(len(data))
            for thing, part, box in objects(data[i][1], self.things, smallest)
        ]
        if not self.found:
            raise ValueError(f"no object of {', '.join(things)} with at least {smallest} pixels; lower `smallest`")

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        i, thing, part, box = self.found[index]
        image, target = self.data[i]
        is_thing = torch.isin(target, torch.tensor(self.things))
        own = torch.from_numpy(parts(target, thing) == part)
        target = torch.where(is_thing & ~own, self.others, target)
        return cut(image, target, enlarged(box, self.enlarge, *target.shape), self.size)


class ProposalCrops(Dataset):
    """Stage 2, the hard pictures: proposals that overlap an object, with all that is in them (Sec. 4.2).

    A proposal counts for the class of the object it overlaps most. Those of rarer classes are repeated, so that all
    classes come equally often. Item: image float (3, size, size), target long (size, size). Reads every item of `data`
    once at the start.

    Args:
        data, things, size, smallest: as of `ObjectCrops`.
        proposals: image (3, H, W) -> boxes (N, 4).
        overlap: least intersection over union of a proposal with an object's own box.

    Differences from the paper: an object is a connected part of a class, as our targets do not tell objects apart.

    Raises ValueError for an unknown class, for boxes outside the picture, or if no proposal overlaps an object.
    """

    def __init__(
        self, data: Dataset, proposals: Proposals, things: Sequence[str], *, size: int = 224, overlap: float = 0.5,
        smallest: int = 50,
    ) -> None:  # fmt: skip
        self.data, self.size = data, size
        self.classes, self.palette = data.classes, data.palette
        found: dict[int, list[tuple[int, list[int]]]] = {}
        for i in range(len(data)):
            image, target = data[i]
            there = objects(target, numbers(data, things), smallest)
            if not there:
                continue
            boxes = checked(proposals(image), image)
            best, which = overlaps(boxes, torch.tensor([box for _, _, box in there])).max(1)
            for box, iou, k in zip(boxes.tolist(), best.tolist(), which.tolist(), strict=True):
                if iou >= overlap:
                    found.setdefault(there[k][0], []).append((i, box))
        if not found:
            raise ValueError(
                f"no proposal overlaps an object of {', '.join(things)} by {overlap}; lower it, or propose more boxes"
            )
        most = max(map(len, found.values()))
        self.found = [crops[k % len(crops)] for _, crops in sorted(found.items()) for k in range(most)]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        i, box = self.found[index]
        return cut(*self.data[i], box, self.size)


def numbers(data: Dataset, things: Sequence[str]) -> list[int]:
    """The numbers of the classes of these names."""
    unknown = [name for name in things if name not in data.classes]
    if unknown or not things:
        raise ValueError(f"things must be some of {', '.join(data.classes)}; got {', '.join(unknown) or 'none'}")
    return [data.classes.index(name) for name in things]


def parts(target: Tensor, thing: int):
    """(H, W) array: the connected parts of one class, numbered from 1; 0 elsewhere. Corners do not connect."""
    from scipy import ndimage

    return ndimage.label((target == thing).numpy())[0]


def objects(target: Tensor, things: Sequence[int], smallest: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """(class, number of its part, tight box) of every connected part of at least `smallest` pixels."""
    from scipy import ndimage

    found = []
    for thing in things:
        numbered = parts(target, thing)
        for part, (rows, columns) in enumerate(ndimage.find_objects(numbered), start=1):
            if (numbered[rows, columns] == part).sum() >= smallest:
                found.append((thing, part, (rows.start, columns.start, rows.stop, columns.stop)))
    return found


def enlarged(box: Sequence[int], factor: float, height: int, width: int) -> tuple[int, ...]:
    """A square around the box's centre, `factor` times its longer side, cut at the border of the picture."""
    top, left, bottom, right = box
    half = factor * max(bottom - top, right - left) / 2
    y, x = (top + bottom) / 2, (left + right) / 2
    return max(round(y - half), 0), max(round(x - half), 0), min(round(y + half), height), min(round(x + half), width)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of a (N, 4) with every box of b (M, 4): (N, M)."""
    sides = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    both = sides.clamp(min=0).prod(2)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b))
    return both / (area_a[:, None] + area_b - both)


def cut(image: Tensor, target: Tensor, box: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """The part of an item in a box, resized: the image bilinear, the target by its nearest pixel."""
    top, left, bottom, right = box
    part = target[None, None, top:bottom, left:right].float()
    return resized(image, box, size), F.interpolate(part, (size, size), mode="nearest-exact")[0, 0].long()

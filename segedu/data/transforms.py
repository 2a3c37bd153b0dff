"""Random changes to an image and its target together, with torchvision's v2 transforms."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from segedu.metrics import VOID

GREY = 0.5  # near the mean that the models subtract, so that padding is near 0 for them


def augment(
    crop: int | tuple[int, int] | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    elastic: float = 0.0,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function (image (3, H, W), target (H, W)) -> the same two as float32 (3, h, w) and long (h, w).

    In this order: bend as `bend` does, by `elastic` pixels (0: not at all); resize by a factor drawn evenly from
    `scale`; take a random window of `crop` pixels, an int or (h, w), by default the size that came in, with grey and
    void where the picture is too small; mirror every second time if `flip`. Targets are never interpolated. Random
    numbers come from torch's global generator.

    Raises ValueError for a crop or a scale that is not positive, or a negative elastic.
    """
    size = (crop, crop) if isinstance(crop, int) else crop
    if size is not None and min(size) < 1:
        raise ValueError(f"crop must be at least 1 pixel, got {crop}")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}")
    if elastic < 0:
        raise ValueError(f"elastic must be a number of pixels and not negative, got {elastic}")
    return partial(_augment, size=size, scale=scale, flip=flip, elastic=elastic)


def bend(image: Tensor, target: Tensor, sigma: float = 10.0) -> tuple[Tensor, Tensor]:
    """Elastic deformation: image (3, H, W) and target (H, W) seen through a random smooth field of displacements.

    Each point of a 3 x 3 grid over the picture is moved by a draw from a normal distribution with a standard deviation
    of `sigma` pixels, in x and in y; bicubic interpolation gives the move of every pixel. The image is sampled
    bilinearly, with grey outside; the target by the nearest pixel, with void outside.
    Source: Ronneberger et al. 2015, Sec. 3.1, where sigma is 10.
    """
    height, width = target.shape
    coarse = sigma * torch.randn(1, 2, 3, 3)
    moves = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
    x, y = torch.arange(width) + moves[0], torch.arange(height)[:, None] + moves[1]
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)[None]  # -1 to 1, edge to edge
    image = F.grid_sample((image.float() - GREY)[None], places, align_corners=False)[0] + GREY  # outside is 0 + GREY
    labels = (target - VOID).float()[None, None]
    target = F.grid_sample(labels, places, mode="nearest", align_corners=False)[0, 0].to(target.dtype) + VOID
    return image, target


def _augment(image: Tensor, target: Tensor, *, size, scale, flip, elastic) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = size or tuple(target.shape)
    if elastic:
        image, target = bend(image, target, elastic)
    factor = scale[0] + (scale[1] - scale[0]) * torch.rand(()).item()
    scaled = [max(round(side * factor), 1) for side in target.shape]
    target = target[None]
    if scaled != list(target.shape[1:]):
        image = v2.functional.resize(image, scaled, antialias=True)
        # v2's own choice for masks, NEAREST, lies up to half a pixel beside the resized image; NEAREST_EXACT does not
        target = v2.functional.resize(target, scaled, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    pair = tv_tensors.Image(image), tv_tensors.Mask(target)
    fill = {tv_tensors.Image: GREY, tv_tensors.Mask: VOID}
    pair = v2.RandomCrop(size, pad_if_needed=True, fill=fill)(*pair)
    image, target = v2.RandomHorizontalFlip(0.5 if flip else 0.0)(*pair)
    return image.as_subclass(Tensor).float(), target.as_subclass(Tensor)[0].long()

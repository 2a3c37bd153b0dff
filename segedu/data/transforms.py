"""Random changes to an image and its target together, with torchvision's v2 transforms."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from segedu.metrics import VOID

GREY = 0.5  # near the mean that the models subtract, so that padding is near 0 for them


def augment(
    crop: int | tuple[int, int] | None = None, scale: tuple[float, float] = (1.0, 1.0), flip: bool = False
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function (image (3, H, W), target (H, W)) -> the same two as float32 (3, h, w) and long (h, w).

    In this order: resize by a factor drawn evenly from `scale`; take a random window of `crop` pixels, an int or (h, w),
    by default the size that came in, with grey and void where the picture is too small; mirror every second time if `flip`.
    Targets are never interpolated. Random numbers come from torch's global generator.

    Raises ValueError for a crop or a scale that is not positive.
    """
    size = (crop, crop) if isinstance(crop, int) else crop
    if size is not None and min(size) < 1:
        raise ValueError(f"crop must be at least 1 pixel, got {crop}")
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be (low, high) with 0 < low <= high, got {scale}")
    return partial(_augment, size=size, scale=scale, flip=flip)


def _augment(image: Tensor, target: Tensor, *, size, scale, flip) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = size or tuple(target.shape)
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

"""U-Net: Convolutional Networks for Biomedical Image Segmentation. Ronneberger, Fischer, Brox; MICCAI 2015.

Paper: https://arxiv.org/abs/1505.04597 (Fig. 1 to 3 and Sec. 2, 3).
Code: https://lmb.informatik.uni-freiburg.de/people/ronneber/u-net
Chapter: chapters/04_unet.ipynb
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import he_init
from segedu.layers import crop, normalize, scale

MARGIN = 92  # pixels that valid convolutions cost on each side: 572 -> 388
PERIOD = 16  # pixels from one cell of the lowest map to the next; a tile must begin on one of them


class UNet(nn.Module):
    """A contracting path, an expanding path of the same depth, and each level's feature maps carried across.

    Shape: images (N, C, H, W) -> logits (N, K, H, W), any H and W.
        With padding=0, H and W must be 188 + 16 m, and the logits are 184 smaller: 572 -> 388 (Fig. 1).
        Three channels are taken as RGB in [0, 1] and normalised; any other number goes in as it is.

    Args:
        num_classes: K.
        in_channels: C; the paper has 1.
        padding: 1 pads all 3x3 convolutions; 0 is the paper, valid convolutions and skips cut to their middle.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: same padding by default, with pools that round up, so that any size comes out as it
    went in. Dropout 0.5 stands after the last two stages, where the authors' release has it; the paper gives neither
    the rate nor the exact place.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, padding: int = 1, width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1 or in_channels < 1:
            raise ValueError(
                f"num_classes and in_channels must be at least 1, got num_classes={num_classes}, "
                f"in_channels={in_channels}"
            )
        if padding not in (0, 1):
            raise ValueError(f"padding must be 1 (size kept) or 0 (the paper, 572 -> 388), got {padding}")
        self.num_classes, self.in_channels, self.padding = num_classes, in_channels, padding
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 1024), width)  # Fig. 1, left to bottom

        self.stage1 = two_convolutions(in_channels, c1, padding)
        self.stage2 = two_convolutions(c1, c2, padding)
        self.stage3 = two_convolutions(c2, c3, padding)
        self.stage4 = two_convolutions(c3, c4, padding)
        self.stage5 = two_convolutions(c4, c5, padding)
        self.dropout = nn.Dropout(0.5)

        self.up4 = up_convolution(c5, c4)
        self.merge4 = two_convolutions(2 * c4, c4, padding)
        self.up3 = up_convolution(c4, c3)
        self.merge3 = two_convolutions(2 * c3, c3, padding)
        self.up2 = up_convolution(c3, c2)
        self.merge2 = two_convolutions(2 * c2, c2, padding)
        self.up1 = up_convolution(c2, c1)
        self.merge1 = two_convolutions(2 * c1, c1, padding)
        self.score = he_init(nn.Conv2d(c1, num_classes, 1))

    # fmt: off
    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        x = normalize(images) if self.in_channels == 3 else images
        x1 = self.stage1(x)                                  # 1
        x2 = self.stage2(pool(x1))                           # 1/2
        x3 = self.stage3(pool(x2))                           # 1/4
        x4 = self.dropout(self.stage4(pool(x3)))             # 1/8
        x = self.dropout(self.stage5(pool(x4)))              # 1/16
        x = self.merge4(self.beside(self.up4(x), x4))        # 1/8
        x = self.merge3(self.beside(self.up3(x), x3))        # 1/4
        x = self.merge2(self.beside(self.up2(x), x2))        # 1/2
        x = self.merge1(self.beside(self.up1(x), x1))        # 1
        return self.score(x)                                 # 1
    # fmt: on

    def beside(self, up: Tensor, skip: Tensor) -> Tensor:
        """Cut the larger of the two maps to the other's place, then join them.

        Valid convolutions make the upsampled map the smaller one: the skip loses 4, 16, 40, 88 cells on each side,
        deep to shallow. With padding it is the larger one, by the row or column that a pool rounded up.
        """
        if self.padding == 0:
            return self.join(up, crop(skip, (skip.shape[-1] - up.shape[-1]) // 2, like=up))
        return self.join(crop(up, 0, like=skip), skip)

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        """Two maps (N, C, h, w) -> (N, 2C, h, w). A subclass that joins them in another way is an ablation."""
        return torch.cat([up, skip], dim=1)

    def check(self, images: Tensor) -> None:
        """Raise ValueError where the net cannot take images of this shape."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images must be (N, {self.in_channels}, H, W), got {tuple(images.shape)}; "
                "add the batch axis with image[None]"
            )
        if self.padding == 0 and any(side < 188 or side % 16 != 12 for side in images.shape[-2:]):
            near = [188 + 16 * max(round((side - 188) / 16), 0) for side in images.shape[-2:]]
            raise ValueError(
                f"with padding=0, H and W must be 188 + 16 m, so that every pool gets an even map; got "
                f"{images.shape[-2]} x {images.shape[-1]}, the nearest is {near[0]} x {near[1]}. "
                "Crop or mirror the picture, or wrap the net in OverlapTile"
            )


def two_convolutions(c_in: int, c_out: int, padding: int) -> nn.Sequential:
    """Twice (3x3 convolution, ReLU): (N, c_in, h, w) -> (N, c_out, h', w'), h' = h + 4 (padding - 1)."""
    first = he_init(nn.Conv2d(c_in, c_out, 3, padding=padding))
    second = he_init(nn.Conv2d(c_out, c_out, 3, padding=padding))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


def up_convolution(c_in: int, c_out: int) -> nn.ConvTranspose2d:
    """2x2 up-convolution: (N, c_in, h, w) -> (N, c_out, 2h, 2w). Each cell is spread over its own 2 x 2 pixels."""
    up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
    nn.init.normal_(up.weight, std=math.sqrt(2 / c_in))  # c_in values meet in a pixel: kernels do not overlap
    nn.init.zeros_(up.bias)
    return up


def pool(x: Tensor) -> Tensor:
    """2x2 max pooling that rounds sizes up: (N, C, h, w) -> (N, C, ceil(h / 2), ceil(w / 2))."""
    return F.max_pool2d(x, 2, ceil_mode=True)


class OverlapTile(nn.Module):
    """Whole pictures from a net with valid convolutions: the border mirrored, the picture done tile by tile (Fig. 2).

    Shape: images (N, C, H, W) -> logits (N, K, H, W), any H and W, also smaller than the 92 pixels of margin.

    The logits do not depend on `tile`, up to rounding: tiles start at multiples of 16, so that all of them pool the
    same groups of pixels. Each has four rows and columns in common with the next.

    Args:
        model: a `UNet` with padding=0.
        tile: size of one tile's output, 4 + 16 m and at least 20 (388 is the paper's). The model sees 184 pixels more.
            A smaller tile needs less memory and more work. None: one tile for the whole picture.
    """

    def __init__(self, model: UNet, tile: int | None = None) -> None:
        super().__init__()
        if not isinstance(model, UNet) or model.padding != 0:
            raise ValueError("OverlapTile needs a UNet with padding=0; with padding=1 sizes are kept already")
        if tile is not None and (tile < 20 or tile % PERIOD != 4):
            raise ValueError(f"tile must be 4 + 16 m and at least 20 (20, 36, ..., 388, ...), got {tile}")
        self.model, self.tile = model, tile

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        high, wide = (self.tile or covering(side) for side in (height, width))
        strips = []
        for y in range(0, max(height - 4, 1), high - 4):
            rows = mirrored(y - MARGIN, y + high + MARGIN, height)
            tiles = []
            for x in range(0, max(width - 4, 1), wide - 4):
                columns = mirrored(x - MARGIN, x + wide + MARGIN, width)
                logits = self.model(images[..., rows, :][..., columns])
                tiles.append(logits[..., 4:] if x else logits)
            strip = torch.cat(tiles, dim=-1)
            strips.append(strip[..., 4:, :] if y else strip)
        return crop(torch.cat(strips, dim=-2), 0, like=images)


def covering(side: int) -> int:
    """The smallest tile, 4 + 16 m and at least 20, that covers `side` pixels."""
    return 4 + PERIOD * max(math.ceil((side - 4) / PERIOD), 1)


def mirrored(start: int, stop: int, side: int) -> Tensor:
    """For each of the places start .. stop - 1, the pixel of 0 .. side - 1 that lies there in a hall of mirrors.

    Mirrors stand on the first and last pixel: side 4 gives ... 2 1 0 1 2 3 2 1 0 1 ...
    """
    place = torch.arange(start, stop).abs() % max(2 * (side - 1), 1)
    return torch.minimum(place, (2 * (side - 1) - place).abs())


def border_weights(target: Tensor, *, w0: float = 10.0, sigma: float = 5.0) -> Tensor:
    """The paper's weight map: classes balanced, and the background between two cells made heavy.

    target (H, W) or (N, H, W), long, 0 = background, 255 = void, anything else a cell -> weights of the same shape,
    float32:

        w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))        (Eq. 2)

    d1 and d2 are the distances, in pixels, to the nearest and to the second nearest cell. Cells are the connected
    components of what is not background (4 neighbours). The second term is for background alone and is 0 where there
    are fewer than two cells. Void weighs 0.

    w_c, which the paper does not spell out, balances background against cells over all of `target`: each of the two
    weighs as much in sum, and the mean over pixels is 1.
    """
    if target.ndim == 2:
        return border_weights(target[None], w0=w0, sigma=sigma)[0]
    if target.ndim != 3 or target.is_floating_point():
        raise ValueError(f"target must be integers (H, W) or (N, H, W), got {target.dtype} {tuple(target.shape)}")
    if w0 < 0 or sigma <= 0:
        raise ValueError(f"w0 must not be negative and sigma must be above 0 pixels, got w0={w0}, sigma={sigma}")
    background, known = target == 0, target != 255
    parts = [background, known & ~background]
    sides = max(sum(part.any() for part in parts), 1)
    weights = torch.zeros(target.shape, device=target.device)
    for part in parts:
        weights[part] = known.sum() / (sides * part.sum())
    between = np.stack([np.exp(-(two_distances(t) ** 2) / (2 * sigma**2)) for t in (parts[1]).cpu().numpy()])
    return weights + w0 * torch.from_numpy(between).float().to(target.device) * background


def two_distances(cells: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W): d1 + d2, the distances to the two nearest components; infinite if there are not two."""
    from scipy import ndimage

    numbers, count = ndimage.label(cells)
    nearest = np.full(cells.shape, np.inf)
    second = nearest.copy()
    for number in range(1, count + 1):
        distance = ndimage.distance_transform_edt(numbers != number)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    return nearest + second


def border_loss(w0: float = 10.0, sigma: float = 5.0) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The paper's energy (Eq. 1), as a loss (model, images (N, 3, H, W), target (N, H, W)) -> scalar for `fit`.

    Cross-entropy times `border_weights`, summed and divided by the number of pixels that are not void. The printed
    energy lacks the minus sign.
    """

    def loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        weights = border_weights(target, w0=w0, sigma=sigma)
        each = F.cross_entropy(model(images).float(), target, ignore_index=255, reduction="none")
        return (weights * each).sum() / (target != 255).sum().clamp(min=1)

    return loss

"""Multi-Scale Context Aggregation by Dilated Convolutions. Yu, Koltun; ICLR 2016.

Paper: https://arxiv.org/abs/1511.07122 (Sec. 3 the context module, Sec. 4 the front end).
Code: https://github.com/fyu/dilation
Chapter: chapters/07_dilation.ipynb
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import he_init, vgg_stage
from segedu.layers import mirror_pad, normalize, scale

DILATIONS = (1, 1, 2, 4, 8, 16, 1)  # Table 1; a last 1x1 layer follows
LARGE = (2, 2, 4, 8, 16, 32, 32)  # channels as multiples of the classes; the last layer has one each


class Dilation(nn.Module):
    """VGG16 at stride 8, its last two pools removed and what follows them dilated; then a context module.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 8.

    Args:
        num_classes: K.
        context: None (the front end alone), "basic" (K channels) or "large" (up to 32 K channels). It starts as the
            identity, so a trained front end goes on as it was: `load_front_end`.
        pad: 186 as released: the picture is mirror_pad once, no convolution of the front end pads, and the context
            module pads its map by 33 once. 0 for small pictures: every convolution pads itself.
        width: channel counts of the front end as a multiple of the paper's.

    Differences from the paper: scores become pixels by bilinear interpolation between the centres of their cells, which
    lie at 8 i + 3.5; the release takes them as if they lay at 8 i. The trunk is normalised and initialised as
    torchvision's VGG16. The released CamVid net has a context module that pads itself, as with pad=0.

    Raises ValueError for other values, and for pictures that are not (N, 3, H, W).
    """

    def __init__(self, num_classes: int, *, context: str | None = None, pad: int = 186, width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if context not in (None, "basic", "large"):
            raise ValueError(f'context must be None, "basic" or "large", got {context!r}')
        if pad not in (0, 186):
            raise ValueError(f"pad must be 186 (as released) or 0 (small pictures), got {pad}")
        self.num_classes, self.pad = num_classes, pad
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)
        (c6,) = scale((4096,), width)

        self.stage1 = vgg_stage(3, c1, 2)
        self.stage2 = vgg_stage(c1, c2, 2)
        self.stage3 = vgg_stage(c2, c3, 3)
        self.stage4 = vgg_stage(c3, c4, 3)
        self.stage5 = vgg_stage(c4, c5, 3, dilation=2)
        self.fc6 = he_init(nn.Conv2d(c5, c6, 7, padding=12, dilation=4))
        self.fc7 = he_init(nn.Conv2d(c6, c6, 1))
        self.dropout = nn.Dropout(0.5)
        self.score = nn.Conv2d(c6, num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.001)
        nn.init.zeros_(self.score.bias)
        if pad:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.padding = (0, 0)
        self.context = Context(num_classes, large=context == "large", pad_once=bool(pad)) if context else None

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        pixels = F.interpolate(self.scores(images), scale_factor=8, mode="bilinear")
        return pixels[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of every eighth pixel (N, K, ceil(H / 8), ceil(W / 8))."""
        x = normalize(images)
        height, width = x.shape[-2:]
        x = mirror_pad(x, self.pad, self.pad + -width % 8, self.pad, self.pad + -height % 8)  # multiples of 8
        scores = self.front_end(x)
        return scores if self.context is None else self.context(scores)

    # fmt: off
    def front_end(self, x: Tensor) -> Tensor:
        """Normalised pictures (N, 3, S, T) -> logits (N, K, (S - 372) / 8, (T - 372) / 8); with pad=0 (S / 8, T / 8).

        Raises ValueError if S or T is too small or gives an odd map somewhere: they must be 372 + 8 m, m >= 1.
        """
        self.check(x)
        x = F.max_pool2d(self.stage1(x), 2)                  # 1/2
        x = F.max_pool2d(self.stage2(x), 2)                  # 1/4
        x = F.max_pool2d(self.stage3(x), 2)                  # 1/8
        x = self.stage4(x)                                   # 1/8, no pool4
        x = self.stage5(x)                                   # 1/8, no pool5; rate 2 for pool4
        x = self.dropout(F.relu(self.fc6(x)))                # 1/8, rate 4 for pool4 and pool5
        x = self.dropout(F.relu(self.fc7(x)))                # 1/8
        return self.score(x)                                 # 1/8
    # fmt: on

    def check(self, x: Tensor) -> None:
        lost = 2 * self.pad
        if any(side < lost + 8 or (side - lost) % 8 for side in x.shape[-2:]):
            near = [lost + 8 * max(1, -(-(side - lost) // 8)) for side in x.shape[-2:]]
            raise ValueError(
                f"the front end takes sides of {lost} + 8 m pixels, m at least 1; got {x.shape[-2]} x {x.shape[-1]}, the "
                f"next is {near[0]} x {near[1]}. Mirror or pad the picture, or call the model, which does it"
            )


class Context(nn.Module):
    """The context module: 3x3 convolutions of growing dilation on score maps, each with ReLU, then a 1x1 (Table 1).

    Shape: scores (N, K, h, w) -> (N, K, h, w).

    Args:
        num_classes: K.
        large: 2K, 2K, 4K, 8K, 16K, 32K, 32K channels instead of K.
        dilations: of the 3x3 layers. The release has (1, 1, 2, 4, 8, 1) for KITTI and (1, 1, 2, 4, 8, 16, 32, 64, 1)
            for Cityscapes, both basic.
        pad_once: all the padding at the first layer, as in the released VOC net; else each layer pads itself.

    Differences from the paper: none. Weights start as the identity (Sec. 3), in the large module with noise of 0.01 as
    released; the release itself builds the basic module only.

    Raises ValueError if the map has not one channel for each class.
    """

    def __init__(
        self, num_classes: int, *, large: bool = False, dilations: Sequence[int] = DILATIONS, pad_once: bool = False
    ) -> None:
        super().__init__()
        if large and len(dilations) != len(LARGE):
            raise ValueError(f"the large module has {len(LARGE)} dilations, got {len(dilations)}")
        self.num_classes = num_classes
        times = (1, *(LARGE if large else (1,) * len(dilations)), 1)
        channels = [num_classes * t for t in times]
        pads = [sum(dilations)] + [0] * (len(dilations) - 1) if pad_once else dilations
        self.layers = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, padding=pad, dilation=d)
            for i, (d, pad) in enumerate(zip(dilations, pads, strict=True))
        )
        self.last = nn.Conv2d(channels[-2], channels[-1], 1)
        for conv in (*self.layers, self.last):
            identity_init(conv, num_classes, noise=0.01 if large else 0.0)

    def forward(self, scores: Tensor) -> Tensor:
        if scores.ndim != 4 or scores.shape[1] != self.num_classes:
            raise ValueError(
                f"the context module takes score maps, one channel for each of {self.num_classes} classes: "
                f"(N, {self.num_classes}, h, w); got {tuple(scores.shape)}"
            )
        for conv in self.layers:
            scores = F.relu(conv(scores))
        return self.last(scores)


@torch.no_grad()
def identity_init(conv: nn.Conv2d, num_classes: int, noise: float = 0.0) -> nn.Conv2d:
    """Weights that pass each class on: C / c_out at the centre where both channels belong to the same class (Sec. 3).

    Channel a of c belongs to class floor(a C / c). All other weights are normal with deviation `noise`; biases are 0.
    A stack of such layers from C to C channels is the identity for values that are not negative, if noise is 0.
    """
    c_out, c_in = conv.weight.shape[:2]
    if c_out % num_classes or c_in % num_classes:
        raise ValueError(f"channels must be multiples of the {num_classes} classes, got {c_in} -> {c_out}")
    same = torch.arange(c_out)[:, None] * num_classes // c_out == torch.arange(c_in) * num_classes // c_in
    centre = conv.weight.shape[-1] // 2
    conv.weight.normal_(std=noise) if noise else conv.weight.zero_()
    middle = conv.weight[:, :, centre, centre]
    middle[same.to(middle.device)] = num_classes / c_out
    conv.bias.zero_()
    return conv


def load_front_end(model: Dilation, front: Dilation) -> None:
    """Start a model with context from a trained front end; its context module stays the identity (Sec. 4)."""
    if front.context is not None or front.pad != model.pad:
        raise ValueError(
            f"needs a front end alone (context=None) with pad={model.pad}, got pad={front.pad}"
            f"{'' if front.context is None else ' and a context module'}"
        )
    missing, unexpected = model.load_state_dict(front.state_dict(), strict=False)
    if unexpected or any(not name.startswith("context.") for name in missing):
        raise ValueError(f"the front end has other layers: missing {missing}, unexpected {unexpected}")

"""DeepLab: Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs. Chen et al.; TPAMI 2018.

Paper: https://arxiv.org/abs/1606.00915 (Fig. 4 and 7 ASPP, Sec. 4.1 poly and VGG16, Sec. 4.1.2 ResNet-101 and scales).
Code: the authors' Caffe models; https://github.com/kazuto1011/deeplab-pytorch converts their ResNet-101.
Chapter: chapters/09_deeplab_v1_v2.ipynb
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import BLOCKS, ResNet, dilate, he_init, vgg_stage
from segedu.layers import enlarged, grid_pad, normalize, scale, score_layer, warn_wide_rates
from segedu.models.deeplab_v1 import pool

BACKBONES = ["vgg16", *(f"resnet{depth}" for depth in BLOCKS)]
SCALES = (1, 0.5, 0.75)  # of the picture (Sec. 4.1.2), in the order of kazuto's code


class DeepLabV2(nn.Module):
    """A trunk at stride 8, then atrous convolutions of several rates side by side: their scores are summed (ASPP).

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 8.

    Args:
        num_classes: K.
        backbone: "resnet101" (50, 152; "resnet14" for a laptop) or "vgg16".
        rates: one branch each, in cells. (6, 12, 18, 24) is ASPP-L, (2, 4, 8, 12) ASPP-S, (12,) LargeFOV.
        stride_on: of the ResNet, as in `sg.ResNet`: "1x1" as in Caffe; "3x3" takes torchvision's ImageNet weights.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: VGG16's trunk as in `DeepLabV1`. Batch norm learns; the paper keeps ImageNet's:
    `layers.freeze_batch_norm`. Pictures are padded to 8 m + 1 pixels, where Caffe's pools, which round up, give the same
    sizes. Several scales of the picture are `MultiScale`, the CRF is a step of its own after the net.

    Raises ValueError for other values.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet101",
        rates: Sequence[int] = (6, 12, 18, 24),
        stride_on: str = "1x1",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        if not rates or min(rates) < 1:
            raise ValueError(f"rates must be one or more numbers of at least 1, got {tuple(rates)}")
        self.num_classes, self.rates = num_classes, tuple(rates)
        if backbone == "vgg16":
            self.backbone = VGG16(width)
            c5, c6 = scale((512, 1024), width)
            branches = [vgg_branch(c5, c6, num_classes, rate) for rate in rates]
        else:
            depth = int(backbone.removeprefix("resnet"))
            self.backbone = dilate(ResNet(depth, stride_on=stride_on, width=width), 8)
            c5 = 4 * scale((512,), width)[0]
            branches = [resnet_branch(c5, num_classes, rate) for rate in rates]
        self.aspp = nn.ModuleList(branches)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = grid_pad(normalize(images), 8)
        return enlarged(self.cells(x), 8)[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of every eighth pixel (N, K, ceil(H / 8), ceil(W / 8))."""
        height, width = (-(-side // 8) for side in images.shape[-2:])
        return self.cells(grid_pad(normalize(images), 8))[..., :height, :width]

    # fmt: off
    def cells(self, x: Tensor) -> Tensor:
        """Normalised pictures (N, 3, 8 m + 1, 8 n + 1) -> logits (N, K, m + 1, n + 1)."""
        x = self.backbone(x)                                 # 1/8
        x = x[-1] if isinstance(x, list) else x
        warn_wide_rates(self, self.rates, x.shape[-2:])
        return sum(branch(x) for branch in self.aspp)        # 1/8
    # fmt: on


def resnet_branch(c_in: int, num_classes: int, rate: int) -> nn.Sequential:
    """Scores by one 3x3 convolution. (N, c_in, h, w) -> (N, K, h, w)."""
    return nn.Sequential(OrderedDict(score=score_layer(c_in, num_classes, 3, dilation=rate)))


def vgg_branch(c_in: int, between: int, num_classes: int, rate: int) -> nn.Sequential:
    """fc6 of this rate, fc7, scores (Fig. 7b). (N, c_in, h, w) -> (N, K, h, w)."""
    return nn.Sequential(
        OrderedDict(
            fc6=he_init(nn.Conv2d(c_in, between, 3, padding=rate, dilation=rate)),
            relu6=nn.ReLU(),
            dropout6=nn.Dropout(0.5),
            fc7=he_init(nn.Conv2d(between, between, 1)),
            relu7=nn.ReLU(),
            dropout7=nn.Dropout(0.5),
            score=score_layer(between, num_classes),
        )
    )


class VGG16(nn.Module):
    """LargeFOV's trunk up to pool5a: (N, 3, 8 m + 1, 8 n + 1) -> (N, 512, m + 1, n + 1)."""

    def __init__(self, width: float) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)
        self.stage1 = vgg_stage(3, c1, 2)
        self.stage2 = vgg_stage(c1, c2, 2)
        self.stage3 = vgg_stage(c2, c3, 3)
        self.stage4 = vgg_stage(c3, c4, 3)
        self.stage5 = vgg_stage(c4, c5, 3, dilation=2)

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.stage1(x), 2)                          # 1/2
        x = pool(self.stage2(x), 2)                          # 1/4
        x = pool(self.stage3(x), 2)                          # 1/8
        x = pool(self.stage4(x), 1)                          # 1/8
        x = pool(self.stage5(x), 1)                          # 1/8, rate 2
        return F.avg_pool2d(x, 3, stride=1, padding=1)       # 1/8, pool5a
    # fmt: on


class MultiScale(nn.Module):
    """The same net on the picture at scales 1, 0.5 and 0.75; the largest score of the three is taken (Sec. 4.1.2, MSC).

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. It adds no parameter and 0.81 times the work.

    Args:
        net: a `DeepLabV2`, or another model with its `cells`.

    Differences from the paper: scores are compared on the map of stride 8, as in kazuto's code, not on pixels. Pictures are
    padded to 32 m + 1 pixels, and then all three maps have cells at the same places.
    """

    def __init__(self, net: DeepLabV2) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return enlarged(self.maps(images)[-1], 8)[..., :height, :width]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Logits at stride 8 of the scales 1, 0.5, 0.75 of the padded picture, and their maximum on the first one's map."""
        x = grid_pad(normalize(images), 32)
        maps = []
        for factor in SCALES:
            size = [int((side - 1) * factor) + 1 for side in x.shape[-2:]]
            maps.append(self.net.cells(F.interpolate(x, size, mode="bilinear", align_corners=True)))
        size = maps[0].shape[-2:]
        same = [F.interpolate(scores, size, mode="bilinear", align_corners=True) for scores in maps]
        return [*maps, torch.stack(same).amax(0)]


def multiscale_loss(model: MultiScale, images: Tensor, target: Tensor) -> Tensor:
    """Sum of the cross-entropies of all four maps, each against the labels at its cells; void (255) left out.

    images (N, 3, H, W), target (N, H, W) -> scalar. Source: Sec. 4.1.2 and kazuto's code. Where a map has no label that is
    not void, it adds 0.
    """
    target = F.pad(target, (0, -(target.shape[-1] - 1) % 32, 0, -(target.shape[-2] - 1) % 32), value=255)
    total = images.new_zeros(())
    for scores, factor in zip(model.maps(images), (*SCALES, 1), strict=True):
        rows, columns = ((torch.arange(n, device=target.device) * 8 / factor).round().long() for n in scores.shape[-2:])
        labels = target[:, rows][:, :, columns]
        loss = F.cross_entropy(scores.float(), labels, ignore_index=255, reduction="sum")
        total = total + loss / (labels != 255).sum().clamp(min=1)
    return total

"""Pyramid Scene Parsing Network. Zhao, Shi, Qi, Wang, Jia; CVPR 2017.

Paper: https://arxiv.org/abs/1612.01105 (Fig. 3 the network, Sec. 3.2 the pyramid, Fig. 4 and Sec. 3.3 the auxiliary loss).
Code: https://github.com/hszhao/semseg, https://github.com/hszhao/PSPNet
Chapter: chapters/11_pspnet.ipynb
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import ResNet, dilate
from segedu.layers import conv_bn_relu, enlarged, grid_pad, normalize, scale, score_layer

POOLS = {"average": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}


class PSPNet(nn.Module):
    """ResNet at stride 8, then the means of the whole map, of its quarters, ninths and thirty-sixths beside every cell.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W from 8 (largest of `bins` - 1) + 1 pixels on.
    `scores` gives them at stride 8, `both` those of the auxiliary branch too.

    Args:
        num_classes: K.
        depth: of the ResNet: 50, 101 or 152; 14 for a laptop.
        stem: "deep", three 3x3 as published, or "7x7", which torchvision's ImageNet weights fit.
        bins: the pyramid's grids, b x b cells each; () leaves the pyramid out.
        pool: "average" or "max" over a grid cell (Table 1).
        auxiliary: with the branch that `auxiliary_loss` trains beside the net. `forward` never uses it.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: dilation, stem and order of the maps are those of the authors' releases, as the text leaves
    them open. Pictures are padded with the mean colour to 8 m + 1 pixels, where the release refuses other sizes. Batch norm
    is of each process by itself, not synchronised.

    Raises ValueError for other values, for pictures too small for the bins, and in training for a single picture where
    the bins have 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 101,
        stem: str = "deep",
        bins: Sequence[int] = (1, 2, 3, 6),
        pool: str = "average",
        auxiliary: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.arguments = {"depth": depth, "stem": stem, "bins": bins, "pool": pool, "width": width}
        c256, c512 = scale((256, 512), width)

        self.backbone = dilate(ResNet(depth, stem=stem, width=width), 8)
        for stage, rate in ((self.backbone.layer3, 2), (self.backbone.layer4, 4)):  # the first bottlenecks too
            stage[0].conv2.dilation = stage[0].conv2.padding = (rate, rate)
        self.pyramid = PyramidPooling(4 * c512, bins, pool=pool)
        self.head = nn.Sequential(*conv_bn_relu(self.pyramid.c_out, c512, 3), nn.Dropout2d(0.1))
        self.score = score_layer(c512, num_classes)
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                *conv_bn_relu(4 * c256, c256, 3), nn.Dropout2d(0.1), score_layer(c256, num_classes)
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.full_size(self.cells(images)[0], images)

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits at stride 8, (N, K, ceil(H / 8), ceil(W / 8)): before enlarging."""
        height, width = (-(-side // 8) for side in images.shape[-2:])
        return self.cells(images)[0][..., :height, :width]

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> logits, and logits of the auxiliary branch on layer3, both (N, K, H, W).

        Raises ValueError if the model was built without it.
        """
        if self.auxiliary is None:
            raise ValueError("the auxiliary loss needs the auxiliary branch; build PSPNet(..., auxiliary=True)")
        main, layer3 = self.cells(images)
        return self.full_size(main, images), self.full_size(self.auxiliary(layer3), images)

    # fmt: off
    def cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all cells, one more a side than `scores` has where pictures were padded; and layer3's map."""
        x = grid_pad(normalize(images), 8)
        _, _, layer3, x = self.backbone(x)                   # 1/8
        x = self.head(self.pyramid(x))                       # 1/8
        return self.score(x), layer3                         # 1/8
    # fmt: on

    @staticmethod
    def full_size(x: Tensor, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return enlarged(x, 8)[..., :height, :width]

    def without_auxiliary(self) -> "PSPNet":
        """A copy with the same weights and no auxiliary branch: what is kept for testing (Sec. 3.3)."""
        other = PSPNet(self.num_classes, **self.arguments).to(next(self.parameters()))
        own = other.state_dict()
        other.load_state_dict({name: p for name, p in self.state_dict().items() if name in own})
        return other.train(self.training)


class PyramidPooling(nn.Module):
    """The map, and beside it the means over b x b parts of it for each b of `bins`, brought to its size (Fig. 3c).

    Shape: (N, c_in, h, w) -> (N, c_in + len(bins) (c_in // len(bins)), h, w); first the map as it was, then the bins in
    order. A part's mean passes a 1x1 convolution to c_in / len(bins) channels, batch norm and ReLU, and is interpolated
    bilinearly between the parts.

    Args:
        pool: "average" or "max".

    Raises ValueError for a map with fewer rows or columns than the largest bin, and in training for a batch of one with a
    bin of 1.
    """

    def __init__(self, c_in: int, bins: Sequence[int] = (1, 2, 3, 6), *, pool: str = "average") -> None:
        super().__init__()
        if any(b < 1 for b in bins) or len(set(bins)) < len(bins) or len(bins) > c_in:
            raise ValueError(
                f"bins must be different whole numbers from 1 on, at most {c_in} of them, got {tuple(bins)}"
            )
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.bins, self.pool = tuple(bins), pool
        c = c_in // max(len(self.bins), 1)
        self.branches = nn.ModuleList(conv_bn_relu(c_in, c) for _ in self.bins)
        self.c_in, self.c_out = c_in, c_in + len(self.bins) * c

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        maps = [x]
        for b, branch in zip(self.bins, self.branches, strict=True):
            parts = branch(self.pooled(x, b))
            maps.append(F.interpolate(parts, x.shape[-2:], mode="bilinear", align_corners=True))
        return torch.cat(maps, dim=1)

    def pooled(self, x: Tensor, b: int) -> Tensor:
        """(N, C, h, w) -> (N, C, b, b). Part i has rows floor(i h / b) to ceil((i + 1) h / b), and so has it columns."""
        return POOLS[self.pool](x, b)

    def check(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        largest = max(self.bins, default=1)
        if min(height, width) < largest:
            raise ValueError(
                f"bins {self.bins} need a map of at least {largest} x {largest} cells, got {height} x {width}; give "
                f"pictures of at least {8 * (largest - 1) + 1} pixels a side at stride 8, or smaller bins"
            )
        norms = any(isinstance(m, nn.BatchNorm2d) for m in self.modules())
        if self.training and len(x) < 2 and 1 in self.bins and norms:
            raise ValueError(
                "a bin of 1 leaves one value per picture and channel, too few for batch norm in training; got a batch of "
                f"{len(x)}. Give at least 2 pictures, layers.freeze_batch_norm(model), or bins without 1"
            )


def auxiliary_loss(weight: float = 0.4) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Loss for `fit`: cross-entropy of the logits plus `weight` times that of the auxiliary branch (Sec. 3.3; 0.4: Table 2).

    Both at full resolution, mean over pixels that are not void (255), and both reach all layers up to layer3.
    model(images) must have `both`. Raises ValueError for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"weight must not be negative, got {weight}")

    def loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        seen = (target != 255).sum().clamp(min=1)
        main, side = (
            F.cross_entropy(logits.float(), target, ignore_index=255, reduction="sum") / seen
            for logits in model.both(images)
        )
        return main + weight * side

    return loss

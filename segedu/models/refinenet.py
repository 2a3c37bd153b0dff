"""RefineNet: Multi-Path Refinement Networks for High-Resolution Semantic Segmentation. Lin, Milan, Shen, Reid; CVPR 2017.

Paper: https://arxiv.org/abs/1611.06612 (Fig. 2 the cascade, Fig. 3 the block, Fig. 7 smaller cascades).
Code: https://github.com/guosheng/refinenet (MATLAB), https://github.com/DrSleep/refinenet-pytorch (its port).
Chapter: chapters/13_refinenet.ipynb
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import ResNet
from segedu.layers import enlarged, grid_pad, normalize, scale, score_layer

CASCADES = {4: ((4,), (3,), (2,), (1,)), 2: ((3, 4), (1, 2)), 1: ((1, 2, 3, 4),)}  # stages that enter each block


class RefineNet(nn.Module):
    """ResNet without dilation; its four maps, coarse to fine, are refined and summed up to stride 4.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 4.

    Args:
        num_classes: K.
        depth: of the ResNet: 50, 101 or 152; 14 for a laptop.
        cascades: 4, a block for each map of the ResNet (Fig. 2); 2, a block for the two coarse maps and one for the two
            fine ones; 1, a single block for all four (Fig. 7).
        pools: stages of a chained residual pooling; 0 leaves its ReLU.
        units: residual convolution units on each path into a block, at a block's output, and before the score layer;
            (0, 0, 0) leaves them out.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: four pooling stages, as the release has, where the paper's figure shows two. Dropout of 0.5
    on the maps of layer3 and layer4 and before the score layer is the release's. ResNet has torchvision's strides, so its
    ImageNet weights fit. The release keeps the trunk's batch norm as ImageNet left it: for that, and for batches of one
    picture, call `layers.freeze_batch_norm(model)` after `load_imagenet`; without pretrained weights it has to learn.
    Pictures are padded with the mean colour to 32 m + 1 pixels, where the port's enlarging (corners aligned) is exact.

    Raises ValueError for other values, and in `refine` for maps in another order than fine to coarse.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 101,
        cascades: int = 4,
        pools: int = 4,
        units: tuple[int, int, int] = (2, 1, 2),
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if cascades not in CASCADES:
            raise ValueError(f"cascades must be 4, 2 or 1 (number of RefineNet blocks), got {cascades}")
        if pools < 0 or len(units) != 3 or min(units) < 0:
            raise ValueError(f"pools must be at least 0 and units three such numbers, got {pools} and {units}")
        on_path, at_output, at_end = units
        c_in = [4 * c for c in scale((64, 128, 256, 512), width)]
        c = scale((256, 256, 256, 512), width)

        self.groups = CASCADES[cascades]
        self.backbone = ResNet(depth, width=width)
        self.reduce = nn.ModuleList(conv3x3(a, b) for a, b in zip(c_in, c, strict=True))
        self.blocks, before = nn.ModuleList(), []  # RefineNet-4 to RefineNet-1
        for stages in self.groups:
            block = RefineNetBlock([c[i - 1] for i in stages] + before, pools=pools, units=(on_path, at_output))
            self.blocks.append(block)
            before = [block.channels]
        self.last = residual_units(block.channels, at_end)
        self.score = score_layer(block.channels, num_classes, 3)
        for part in (self.reduce, self.blocks, self.last):
            for name, p in part.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(
                        p, std=0.01 / width**0.5
                    )  # the release's 0.01; a twin has its gain with fewer channels

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return enlarged(self.cells(images), 4)[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits at stride 4, (N, K, ceil(H / 4), ceil(W / 4)): before enlarging."""
        height, width = (-(-side // 4) for side in images.shape[-2:])
        return self.cells(images)[..., :height, :width]

    def cells(self, images: Tensor) -> Tensor:
        """Logits of all cells, the padding's too."""
        x = grid_pad(normalize(images), 32)
        return self.score(self.drop(self.refine(self.backbone(x))))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    # fmt: off
    def refine(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of layer1 to layer4, fine to coarse -> (N, 256 width, h, w) as large as the first."""
        check_order(maps, [conv.in_channels for conv in self.reduce])
        c1, c2, c3, c4 = maps
        c3, c4 = self.drop(c3), self.drop(c4)                # 1/16, 1/32
        paths = [reduce(c) for reduce, c in zip(self.reduce, (c1, c2, c3, c4), strict=True)]
        before: list[Tensor] = []
        for stages, block in zip(self.groups, self.blocks, strict=True):
            x = block(*(paths[i - 1] for i in stages), *before)
            before = [x]                                     # 1/32, 1/16, 1/8, 1/4
        return self.last(x)                                  # 1/4
    # fmt: on


class RefineNetBlock(nn.Module):
    """Units on each path, fusion to the finest map, chained residual pooling, units at the output (Fig. 3).

    Shape: one map per path, fine to coarse, of `widths` channels each -> (N, min(widths), h, w) as large as the first.

    Raises ValueError for maps in another order.
    """

    def __init__(self, widths: Sequence[int], *, pools: int = 4, units: tuple[int, int] = (2, 1)) -> None:
        super().__init__()
        self.widths, self.channels = tuple(widths), min(widths)
        self.adapt = nn.ModuleList(residual_units(c, units[0]) for c in widths)
        self.fusion = Fusion(widths)
        self.pooling = ChainedResidualPooling(self.channels, pools)
        self.output = residual_units(self.channels, units[1])

    def forward(self, *maps: Tensor) -> Tensor:
        check_order(maps, self.widths)
        x = self.fusion(*(adapt(x) for adapt, x in zip(self.adapt, maps, strict=True)))
        return self.output(self.pooling(x))


class ResidualConvUnit(nn.Module):
    """x + conv(ReLU(conv(ReLU(x)))), both 3x3, the first with bias; no batch norm. Keeps its shape (Fig. 3b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """3x3 convolution of each map to the least number of channels, enlarged to the first map's size, sum (Fig. 3c).

    (N, widths[i], h_i, w_i) -> (N, min(widths), h_0, w_0). A single map stays as it is.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(c, min(widths)) for c in widths if len(widths) > 1)

    def forward(self, *maps: Tensor) -> Tensor:
        if not self.convs:
            return maps[0]
        size = maps[0].shape[-2:]
        paths = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return sum(F.interpolate(x, size, mode="bilinear", align_corners=True) for x in paths[1:]) + paths[0]


class ChainedResidualPooling(nn.Module):
    """ReLU, then `pools` times (5x5 max pool of stride 1, 3x3 convolution), each on the one before; sum of all (Fig. 3d).

    Keeps its shape. A stage widens what a cell sees by 6 cells.
    """

    def __init__(self, channels: int, pools: int = 4) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(5, stride=1, padding=2), conv3x3(channels, channels)) for _ in range(pools)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = total = F.relu(x)
        for stage in self.stages:
            x = stage(x)
            total = total + x
        return total


def quarter_loss(model: RefineNet, images: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy on the map of stride 4, against every fourth label; void (255) left out.

    images (N, 3, H, W), target (N, H, W) -> scalar. Source: the release, whose labels shrink to the size of the scores.
    """
    return F.cross_entropy(model.scores(images), target[:, ::4, ::4], ignore_index=255)


def conv3x3(c_in: int, c_out: int, bias: bool = False) -> nn.Conv2d:
    """3x3 convolution that keeps the size; a bias starts at 0."""
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


def residual_units(channels: int, n: int) -> nn.Sequential:
    """n residual convolution units one after the other; of none, the identity."""
    return nn.Sequential(*(ResidualConvUnit(channels) for _ in range(n)))


def check_order(maps: Sequence[Tensor], channels: Sequence[int]) -> None:
    """Raise ValueError unless there is a map of each of these numbers of channels, none larger than the one before."""
    sizes = [tuple(x.shape[1:]) for x in maps]
    fine_to_coarse = all(a[1] >= b[1] and a[2] >= b[2] for a, b in pairwise(sizes))
    if [size[0] for size in sizes] != list(channels) or not fine_to_coarse:
        raise ValueError(
            f"maps must come from fine to coarse with {', '.join(map(str, channels))} channels (layer1 first), got "
            f"{', '.join(' x '.join(map(str, size)) for size in sizes)} (channels x height x width)"
        )

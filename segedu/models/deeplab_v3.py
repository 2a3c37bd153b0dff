"""Rethinking Atrous Convolution for Semantic Image Segmentation. Chen, Papandreou, Schroff, Adam; 2017.

Paper: https://arxiv.org/abs/1706.05587 (Fig. 3 the cascade, Fig. 4 valid weights, Fig. 5 ASPP, Sec. 4.1 batch norm).
Code: https://github.com/tensorflow/models/tree/master/research/deeplab
Chapter: chapters/10_deeplab_v3.ipynb
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import BLOCKS, Bottleneck, ResNet, dilate
from segedu.layers import (
    conv_bn_relu,
    enlarged,
    freeze_batch_norm,
    grid_pad,
    normalize,
    scale,
    score_layer,
    warn_wide_rates,
)

HEADS = {"paper": (16, (1, 2, 4)), "torchvision": (8, None), "cascade": (16, (1, 2, 1))}  # output stride, multi-grid
MOMENTUM = 0.0003  # of batch norm: TensorFlow's decay of 0.9997 as torch counts it


class DeepLabV3(nn.Module):
    """ResNet at stride 16 or 8, its last stage dilated three times over, then atrous convolutions of several rates (ASPP).

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at the output stride.

    Args:
        num_classes: K.
        depth: of the ResNet: 50 or 101; 14 for a laptop.
        output_stride: 8, 16 or 32; None: as published, 16, and 8 for torchvision's.
        multi_grid: three factors for the rates of layer4's three bottlenecks (Sec. 3.2.1; depth 14 has one and takes the
            first). None: (1, 2, 4), in the cascade (1, 2, 1) (Tables 3 and 5); torchvision's has none.
        head: "paper" (Sec. 3.3); "torchvision", what `load_pretrained` has weights for; "cascade": block5 to block7, copies
            of layer4 at growing rates, in place of the ASPP (Sec. 3.2, Fig. 3).
        rates: of the ASPP's 3x3 branches, in cells; () leaves the 1x1. None: 6, 12, 18 at stride 16, twice that at 8,
            half at 32.
        image_pooling: the branch of one mean over the whole map.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: ResNet has torchvision's stem and strides, so its ImageNet weights fit; the release has a
    stem of three 3x3 and the stride at a stage's end. The first bottleneck of layer3 keeps its rate at stride 8, so the
    map of stride 16 is its every second cell. Batch norm has torch's momentum until `first_phase`. Pictures are padded
    with the mean colour to 16 m + 1 pixels (8 m + 1), as the release's crops are. A dropout of 0.1 is the release's.
    torchvision's head has stride 8 and no multi-grid, one more 3x3 layer, a dropout of 0.5, and pads no picture.

    Raises ValueError for other values; in training also for a single picture where there is image pooling.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 101,
        output_stride: int | None = None,
        multi_grid: Sequence[int] | None = None,
        head: str = "paper",
        rates: Sequence[int] | None = None,
        image_pooling: bool = True,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if head == "cascade" and (rates is not None or not image_pooling):
            raise ValueError('rates and image_pooling belong to the ASPP, which head="cascade" does not have')
        self.arguments = {"depth": depth, "output_stride": output_stride, "multi_grid": multi_grid, "head": head,
                          "rates": rates, "image_pooling": image_pooling, "width": width}  # fmt: skip
        stride, grid = HEADS[head]
        stride, grid = output_stride if output_stride is not None else stride, multi_grid or grid
        check(num_classes, stride, rates)
        self.num_classes, self.output_stride, self.head = num_classes, stride, head
        c_in, middle, c = (4 * scale((512,), width)[0], *scale((512, 256), width))

        self.backbone = atrous_resnet(depth, stride, grid, width)
        if head == "cascade":
            self.blocks = nn.Sequential(
                OrderedDict(
                    (f"block{i}", block(c_in, middle, BLOCKS[depth][3], 2 ** (i + 1) // stride, grid))
                    for i in (5, 6, 7)
                )
            )
            self.score = score_layer(c_in, num_classes)
            return
        rates = default_rates(stride) if rates is None else rates
        self.aspp = ASPP(c_in, c, rates, image_pooling=image_pooling, dropout=0.1 if head == "paper" else 0.5)
        if head == "torchvision":
            self.between = conv_bn_relu(c, c, 3)
        self.score = score_layer(c, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = self.cells(images)
        if self.head == "torchvision":
            return F.interpolate(x, (height, width), mode="bilinear")
        return enlarged(x, self.output_stride)[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits at the output stride s, (N, K, ceil(H / s), ceil(W / s)): before enlarging."""
        height, width = (-(-side // self.output_stride) for side in images.shape[-2:])
        return self.cells(images)[..., :height, :width]

    # fmt: off
    def cells(self, images: Tensor) -> Tensor:
        """Logits of all cells, one more a side than `scores` has where pictures were padded."""
        x = normalize(images)
        if self.head != "torchvision":
            x = grid_pad(x, self.output_stride)
        x = self.backbone(x)[-1]                             # 1/16
        x = self.blocks(x) if self.head == "cascade" else self.aspp(x)
        if self.head == "torchvision":
            x = self.between(x)                              # 1/16
        return self.score(x)                                 # 1/16
    # fmt: on

    def at_stride(self, output_stride: int) -> "DeepLabV3":
        """A copy with the same weights at another output stride, its rates in proportion; batch norm is not frozen.

        Raises ValueError if a rate would be no whole number.
        """
        return copied(self, output_stride)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, 3x3 of each rate, mean of the map; side by side, then 1x1 (Fig. 5).

    Shape: (N, c_in, h, w) -> (N, c, h, w).

    Args:
        conv: makes the 3x3 branches; v3+ takes `separable_conv` beside Xception.

    Rates that are not below the map's side bring a warning. Names are torchvision's.
    """

    def __init__(
        self,
        c_in: int,
        c: int,
        rates: Sequence[int],
        *,
        image_pooling: bool = True,
        conv: Callable[..., nn.Module] = conv_bn_relu,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.rates = tuple(rates)
        branches = [conv_bn_relu(c_in, c), *(conv(c_in, c, 3, dilation=rate) for rate in rates)]
        if image_pooling:
            branches.append(ImagePooling(c_in, c))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*conv_bn_relu(len(branches) * c, c), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        warn_wide_rates(self, self.rates, x.shape[-2:])
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))


class ImagePooling(nn.Sequential):
    """Mean over the map, 1x1, batch norm, ReLU, the same value at every cell. (N, c_in, h, w) -> (N, c, h, w)."""

    def __init__(self, c_in: int, c: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(c_in, c))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2 and self.training and isinstance(self[2], nn.BatchNorm2d):
            raise ValueError(
                "image pooling leaves one value per picture and channel, too few for batch norm in training; got a batch "
                f"of {len(x)}. Give at least 2 pictures, layers.freeze_batch_norm(model), or image_pooling=False"
            )
        return super().forward(x).expand(-1, -1, *x.shape[-2:])


def check(num_classes: int, output_stride: int, rates: Sequence[int] | None) -> None:
    """Raise ValueError for what DeepLab v3 and v3+ cannot be built with."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride must be 8, 16 or 32 (pixels of the picture for a cell), got {output_stride}")
    if any(rate < 1 for rate in rates or ()):
        raise ValueError(f"rates must be at least 1, got {tuple(rates)}")


def default_rates(output_stride: int) -> tuple[int, ...]:
    """6, 12, 18 cells at stride 16, and as many pixels at another one (Sec. 3.3)."""
    return tuple(rate * 16 // output_stride for rate in (6, 12, 18))


def atrous_resnet(depth: int, output_stride: int, multi_grid: Sequence[int] | None, width: float) -> ResNet:
    """A ResNet of this output stride; multi_grid times layer4's rate (1, 2, 4 at 32, 16, 8) is that of its bottlenecks.

    Without multi-grid, layer4's first bottleneck keeps the rate of the stage before, as `dilate` has it.
    """
    net = dilate(ResNet(depth, width=width), output_stride)
    if multi_grid is not None:
        set_rates(net.layer4, 32 // output_stride, multi_grid)
    return net


def block(channels: int, middle: int, units: int, rate: int, multi_grid: Sequence[int]) -> nn.Sequential:
    """One more copy of layer4, without stride. (N, channels, h, w) -> the same."""
    stage = nn.Sequential(*(Bottleneck(channels, middle) for _ in range(units)))
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    set_rates(stage, rate, multi_grid)
    return stage


def set_rates(stage: nn.Sequential, rate: int, multi_grid: Sequence[int]) -> None:
    """The 3x3 of bottleneck i gets rate * multi_grid[i] (Sec. 3.2.1). Raises ValueError unless there are three factors."""
    if len(multi_grid) != 3 or min(multi_grid) < 1:
        raise ValueError(
            f"multi_grid must be three factors, one for each bottleneck of layer4, got {tuple(multi_grid)}"
        )
    for bottleneck, factor in zip(stage, multi_grid, strict=False):
        bottleneck.conv2.dilation = bottleneck.conv2.padding = (rate * factor, rate * factor)


def copied(model: nn.Module, output_stride: int) -> nn.Module:
    """What `at_stride` says, for v3 and v3+."""
    arguments = {**model.arguments, "output_stride": output_stride}
    if arguments["rates"] is not None and output_stride in (8, 16, 32):
        pixels = [rate * model.output_stride for rate in arguments["rates"]]
        if any(p % output_stride for p in pixels):
            raise ValueError(
                f"rates {tuple(arguments['rates'])} at stride {model.output_stride} are no whole numbers at {output_stride}; "
                "build the model anew with rates of your choice and load the state dict"
            )
        arguments["rates"] = [p // output_stride for p in pixels]
    other = type(model)(model.num_classes, **arguments).to(next(model.parameters()))
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def first_phase(model: nn.Module) -> nn.Module:
    """Batch norm learns with the paper's slow statistics, in place (Sec. 4.1: 30,000 steps at output stride 16).

    Only for long trainings from ImageNet weights: within a few hundred steps these statistics hardly move.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = MOMENTUM
    return model


def second_phase(model: DeepLabV3) -> DeepLabV3:
    """The model for the next 30,000 steps of lr 0.001: a copy at output stride 8, batch norm frozen (Sec. 4.1).

    The paper does so on VOC's trainval, for the test server; its scores on val are of the first phase.
    """
    return freeze_batch_norm(model.at_stride(8))


def valid_weights(rate: int, size: int | tuple[int, int]) -> Tensor:
    """How many of a 3x3 kernel's nine taps lie on the map and not in its padding, at each cell: (h, w), long.

    Args:
        size: of the map, (h, w), or one number for both.

    From a rate of the map's side on, it is 1 everywhere: the kernel is a 1x1 of its middle. Source: Sec. 3.3 and Fig. 4.
    """
    sides = (size, size) if isinstance(size, int) else size
    if rate < 1 or min(sides) < 1:
        raise ValueError(f"rate and size must be at least 1, got {rate} and {size}")
    places = [torch.arange(n) for n in sides]
    rows, columns = (1 + (i >= rate).long() + (i + rate < n).long() for i, n in zip(places, sides, strict=True))
    return rows[:, None] * columns

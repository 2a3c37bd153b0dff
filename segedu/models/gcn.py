"""Large Kernel Matters: Improve Semantic Segmentation by Global Convolutional Network. Peng et al., CVPR 2017.

Paper: https://arxiv.org/abs/1703.02719 (Fig. 2 the net, the global convolution and the boundary refinement).
Code: none by the authors; a port to PyTorch: https://github.com/zijundeng/pytorch-semantic-segmentation (models/gcn.py)
Chapter: chapters/12_gcn.ipynb
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import ResNet, he_init
from segedu.layers import enlarged, grid_pad, normalize, scale

STRIDES = (4, 8, 16, 32)  # of ResNet's four maps


class GCN(nn.Module):
    """Scores from each of ResNet's four maps by a large separable kernel, summed from coarse to fine, rims refined.

    This is no graph convolution: "global" says that the kernel is about as large as its map.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W.

    Args:
        num_classes: K, and the channels of everything after the ResNet.
        depth: of the ResNet: 152 as published, 101 or 50; 14 for a laptop.
        k: side of the kernels in cells, odd; or four of them, for the maps of stride 4, 8, 16, 32 in this order.
        block: what stands in the kernel's place (Sec. 4.1): "gcn", `GlobalConv`; "trivial", one free k x k convolution,
            with k=1 the paper's baseline; "stack", `Stacked3x3` of the same span.
        refine: a `BoundaryRefinement` after each kernel, each sum and each of the last two enlargements: nine.
        width: channel counts of the ResNet as a multiple of the paper's.

    Differences from the paper: maps are enlarged by bilinear interpolation, as in the port; the paper has transposed
    convolutions. Pictures are padded with the mean colour to 32 m + 1 pixels, so that the maps that are summed have their
    cells on the same pixels; 512 become 513, and the coarsest map 17 x 17, not 16 x 16. k is the same at all four maps;
    the paper gives it for the coarsest (15 for pictures of 512, 25 for crops of 800), and the port takes the side of each
    map less one, made odd. ResNet has the stride on the 3x3, so torchvision's ImageNet weights fit. How the new layers
    start is ours.

    Raises ValueError for other values. Kernels with taps that no cell of their map can reach bring a warning.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 152,
        k: int | Sequence[int] = 15,
        block: str = "gcn",
        refine: bool = True,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        blocks = {"gcn": GlobalConv, "trivial": last_conv, "stack": Stacked3x3}
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if block not in blocks:
            raise ValueError(f"block must be one of {', '.join(blocks)}, got {block!r}")
        kernels = (k,) * 4 if isinstance(k, int) else tuple(k)
        if len(kernels) != 4:
            raise ValueError(
                f"k must be one number or four, for the maps of stride 4, 8, 16 and 32, got {len(kernels)}"
            )
        self.kernels, self.channels = kernels, [4 * c for c in scale((64, 128, 256, 512), width)]

        def refinement() -> nn.Module:
            return BoundaryRefinement(num_classes) if refine else nn.Identity()

        self.backbone = ResNet(depth, width=width)
        for i, c_in, side in zip((2, 3, 4, 5), self.channels, kernels, strict=True):  # res2 to res5
            setattr(self, f"score{i}", blocks[block](c_in, num_classes, side))
            setattr(self, f"refine{i}", refinement())
        self.refine_sum2, self.refine_sum3, self.refine_sum4 = refinement(), refinement(), refinement()
        self.refine_half, self.refine_full = refinement(), refinement()

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.backbone(grid_pad(normalize(images), 32)), images.shape[-2:])

    # fmt: off
    def decode(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The maps of the padded picture, stride 4 first -> logits (N, K, H, W); `size` is the picture's own (H, W).

        Raises ValueError for maps in another order, of other channels or sizes.
        """
        self.check(maps, size)
        c2, c3, c4, c5 = maps
        x = self.refine5(self.score5(c5))                                              # 1/32
        x = self.refine_sum4(self.refine4(self.score4(c4)) + enlarged(x, 2))           # 1/16
        x = self.refine_sum3(self.refine3(self.score3(c3)) + enlarged(x, 2))           # 1/8
        x = self.refine_sum2(self.refine2(self.score2(c2)) + enlarged(x, 2))           # 1/4
        x = self.refine_half(enlarged(x, 2))                                           # 1/2
        return self.refine_full(enlarged(x, 2))[..., :size[0], :size[1]]               # 1
    # fmt: on

    def check(self, maps: Sequence[Tensor], size: Sequence[int]) -> None:
        """What `decode` raises; and a warning, once, for kernels that reach beyond their map from every cell."""
        cells = [[-(-(side - 1) // 32) * 32 // s + 1 for side in size] for s in STRIDES]  # of the padded picture
        wanted = [(c, h, w) for c, (h, w) in zip(self.channels, cells, strict=True)]
        got = [tuple(x.shape[1:]) for x in maps]
        if got != wanted:
            raise ValueError(
                f"decode needs the four maps of stride 4, 8, 16, 32 in this order, (channels, height, width) {wanted} "
                f"for a picture of {size[0]} x {size[1]}, got {got}; give the backbone's list as it is"
            )
        idle = [
            (k, s, h, w) for k, s, (_, h, w) in zip(self.kernels, STRIDES, wanted, strict=True) if k // 2 >= max(h, w)
        ]
        if idle and not getattr(self, "warned", False):
            self.warned = True
            k, stride, h, w = idle[-1]
            warnings.warn(
                f"k={k} is too long for the map of stride {stride}, {h} x {w} cells: taps that lie {max(h, w)} or more cells "
                f"from the kernel's middle never touch the map and learn nothing. k={2 * max(h, w) - 1} reaches from each "
                "cell to all others; give that or less, or a larger picture",
                stacklevel=2,
            )


class GlobalConv(nn.Module):
    """k x 1 then 1 x k, beside it 1 x k then k x 1, summed; nothing nonlinear inside (Fig. 2 B).

    (N, c_in, h, w) -> (N, c, h, w), with 2 k (c_in c + c^2) weights where a free k x k kernel has k^2 c_in c.
    `composed_kernel` gives the k x k kernel that it is. Raises ValueError for an even k.
    """

    def __init__(self, c_in: int, c: int, k: int) -> None:
        super().__init__()
        self.down_then_across = nn.Sequential(linear_conv(c_in, c, (k, 1)), last_conv(c, c, (1, k)))
        self.across_then_down = nn.Sequential(linear_conv(c_in, c, (1, k)), last_conv(c, c, (k, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_then_across(x) + self.across_then_down(x)


def composed_kernel(block: GlobalConv) -> Tensor:
    """The one kernel (c, c_in, k, k) whose convolution is the `GlobalConv` without its biases, borders included."""
    (a1, b1), (a2, b2) = (
        [conv.weight.flatten(2) for conv in branch] for branch in (block.down_then_across, block.across_then_down)
    )
    return torch.einsum("mcu,omv->ocuv", a1, b1) + torch.einsum("mcv,omu->ocuv", a2, b2)


class Stacked3x3(nn.Sequential):
    """(k - 1) / 2 convolutions of 3x3, which together span k x k; nothing nonlinear between them (Sec. 4.1).

    (N, c_in, h, w) -> (N, c, h, w). `middle` channels between the layers; None: c_in, the paper's 2048. k=1 is one 1x1.
    Raises ValueError for an even k.
    """

    def __init__(self, c_in: int, c: int, k: int, middle: int | None = None) -> None:
        check_odd(k)
        channels = [c_in, *[c_in if middle is None else middle] * (k // 2 - 1)]
        super().__init__(*(linear_conv(a, b, 3) for a, b in pairwise(channels)), last_conv(channels[-1], c, min(k, 3)))


class BoundaryRefinement(nn.Module):
    """x + conv3x3(ReLU(conv3x3(x))), on scores: (N, c, h, w) -> the same (Fig. 2 C). With zero weights the identity."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = he_init(nn.Conv2d(c, c, 3, padding=1))
        self.conv2 = last_conv(c, c, 3)  # so small that the block starts close to the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


def linear_conv(c_in: int, c_out: int, kernel: int | tuple[int, int]) -> nn.Conv2d:
    """A convolution that keeps the size and, as nothing nonlinear follows, the variance; bias 0.

    (N, c_in, h, w) -> (N, c_out, h, w). Raises ValueError for an even kernel.
    """
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    for k in kernel:
        check_odd(k)
    conv = nn.Conv2d(c_in, c_out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    nn.init.zeros_(conv.bias)
    return conv


def last_conv(c_in: int, c_out: int, kernel: int | tuple[int, int]) -> nn.Conv2d:
    """As `linear_conv`, with normal weights of 0.01 as the package's score layers: scores start near 0."""
    conv = linear_conv(c_in, c_out, kernel)
    nn.init.normal_(conv.weight, std=0.01)
    return conv


def check_odd(k: int) -> None:
    """Raise ValueError unless a kernel of k cells has a middle one."""
    if k < 1 or k % 2 == 0:
        raise ValueError(
            f"k must be odd and at least 1, so that the kernel has a middle cell and keeps the size, got {k}"
        )

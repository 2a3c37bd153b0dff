"""Fully Convolutional Networks for Semantic Segmentation. Long, Shelhamer, Darrell; CVPR 2015, PAMI 2017.

Paper: https://arxiv.org/abs/1411.4038 (Fig. 3 and Sec. 4).  Code: https://github.com/shelhamer/fcn.berkeleyvision.org
Chapter: chapters/02_fcn.ipynb
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import he_init, vgg_stage
from segedu.layers import BilinearUpsampling, crop, learned_upsampling, normalize, scale

# Where one map lies in the next, from the centres of their cells. `pad` of the first convolution -> rows and columns
# to cut. With pad 100 (the release's prototxts) the skip scores are cut to the upsampled ones; with pad 1 the other
# way round.
OFFSETS = {
    100: {"32s": 19, "pool4": 5, "16s": 27, "pool3": 9, "8s": 31},
    1: {"32s": 16, "pool4": 1, "16s": 8, "pool3": 1, "8s": 4},
}


class FCN(nn.Module):
    """VGG16 turned into convolutions; class scores from three depths, upsampled and summed.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W.

    Args:
        num_classes: K.
        stride: 32 (FCN-32s, no skip), 16 (FCN-16s, pool4) or 8 (FCN-8s, pool4 and pool3).
        pad: padding of the first convolution. 100 as released; 1 for small pictures, with `fc6` padded too.
        learn_upsampling: train the 2x upsampling layers, as the CVPR text says. The release freezes them.
        at_once: scale pool4 by 0.01 and pool3 by 0.0001 before scoring, to train all skips in one go (FCN-8s at once).
        width: channel counts as a multiple of the paper's.

    Differences from the paper: the trunk is normalised and initialised as torchvision's VGG16, not Caffe's (RGB, unit
    variance). Frozen kernels are stored once per class, not as a K x K block that is zero off the diagonal.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        stride: int = 8,
        pad: int = 100,
        learn_upsampling: bool = False,
        at_once: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if stride not in (8, 16, 32):
            raise ValueError(f"stride must be 8, 16 or 32 (FCN-8s, -16s, -32s), got {stride}")
        if pad not in OFFSETS:
            raise ValueError(f"pad must be 100 (as released) or 1 (small pictures), got {pad}")
        self.num_classes, self.stride, self.offsets, self.pad = num_classes, stride, OFFSETS[pad], pad
        self.at_once = at_once
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)
        (c6,) = scale((4096,), width)

        self.stage1 = vgg_stage(3, c1, 2, padding=pad)
        self.stage2 = vgg_stage(c1, c2, 2)
        self.stage3 = vgg_stage(c2, c3, 3)
        self.stage4 = vgg_stage(c3, c4, 3)
        self.stage5 = vgg_stage(c4, c5, 3)
        self.fc6 = he_init(nn.Conv2d(c5, c6, 7, padding=0 if pad == 100 else 3))
        self.fc7 = he_init(nn.Conv2d(c6, c6, 1))
        self.dropout = nn.Dropout(0.5)

        self.score_fr = zero_init(nn.Conv2d(c6, num_classes, 1))
        if stride == 32:
            self.upscore = BilinearUpsampling(num_classes, 64, 32)
        else:
            self.score_pool4 = zero_init(nn.Conv2d(c4, num_classes, 1))
            self.upscore2 = upsampling_2x(num_classes, learn_upsampling, bias=True)
        if stride == 16:
            self.upscore16 = BilinearUpsampling(num_classes, 32, 16)
        if stride == 8:
            self.score_pool3 = zero_init(nn.Conv2d(c3, num_classes, 1))
            self.upscore_pool4 = upsampling_2x(num_classes, learn_upsampling)
            self.upscore8 = BilinearUpsampling(num_classes, 16, 8)

    # fmt: off
    def forward(self, images: Tensor) -> Tensor:
        x = normalize(images)
        x = pool(self.stage1(x))                             # 1/2
        x = pool(self.stage2(x))                             # 1/4
        x = pool3 = pool(self.stage3(x))                     # 1/8
        x = pool4 = pool(self.stage4(x))                     # 1/16
        x = pool(self.stage5(x))                             # 1/32
        x = self.dropout(F.relu(self.fc6(x)))                # 1/32
        x = self.dropout(F.relu(self.fc7(x)))                # 1/32
        scores = self.score_fr(x)                            # 1/32
        if self.stride == 32:
            return crop(self.upscore(scores), self.offsets["32s"], like=images)

        if self.at_once:
            pool4, pool3 = pool4 * 1e-2, pool3 * 1e-4
        scores = self.fuse(self.upscore2(scores), self.score_pool4(pool4), self.offsets["pool4"])  # 1/16
        if self.stride == 16:
            return crop(self.upscore16(scores), self.offsets["16s"], like=images)

        scores = self.fuse(self.upscore_pool4(scores), self.score_pool3(pool3), self.offsets["pool3"])  # 1/8
        return crop(self.upscore8(scores), self.offsets["8s"], like=images)
    # fmt: on

    def fuse(self, scores: Tensor, skip: Tensor, offset: int) -> Tensor:
        """Two score maps of the same stride, cut to the same place, summed."""
        if self.pad == 100:
            return scores + crop(skip, offset, like=scores)
        return crop(scores, offset, like=skip) + skip


def pool(x: Tensor) -> Tensor:
    """2x2 max pooling that rounds sizes up, as Caffe does: (N, C, h, w) -> (N, C, ceil(h / 2), ceil(w / 2))."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """A score layer that starts at zero: no opinion, equal probabilities (Sec. 4.1)."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def upsampling_2x(num_classes: int, learn: bool, bias: bool = False) -> nn.Module:
    """(N, K, h, w) -> (N, K, 2h + 2, 2w + 2), bilinear at the start."""
    return learned_upsampling(num_classes, 4, 2, bias) if learn else BilinearUpsampling(num_classes, 4, 2)


def load_coarser(model: FCN, coarse: FCN) -> None:
    """Start FCN-16s from a trained FCN-32s, or FCN-8s from FCN-16s (Sec. 4.2). New score layers stay at zero.

    The scores at the start are the coarse net's scores upsampled in two steps instead of one, so predictions are close
    to the coarse net's, not equal to them.
    """
    if coarse.stride != 2 * model.stride or coarse.pad != model.pad:
        raise ValueError(
            f"needs an FCN-{2 * model.stride}s with pad={model.pad}, got an FCN-{coarse.stride}s with pad={coarse.pad}"
        )
    missing, unexpected = model.load_state_dict(coarse.state_dict(), strict=False)
    new = {"score_pool4", "score_pool3", "upscore2", "upscore_pool4"}
    if unexpected or any(name.split(".")[0] not in new for name in missing):
        raise ValueError(f"the coarse net has other layers: missing {missing}, unexpected {unexpected}")


def sum_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy summed over pixels and pictures, void (255) left out: what the release's rates of 1e-10 go with.

    images (N, 3, H, W), target (N, H, W) -> scalar. Source: train.prototxt, `normalize: false`, batch 1.
    """
    return F.cross_entropy(model(images), target, ignore_index=255, reduction="sum")


def sampled_loss(keep: float, cell: int = 32) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Patch sampling as the paper does it: each output cell is kept with probability `keep`, the rest ignored.

    Returns a loss (model, images (N, 3, H, W), target (N, H, W)) -> scalar: the mean over kept pixels that are not
    void. To see as many pixels per step, the batch must be 1 / keep times as large. Source: Sec. 4.4 and Fig. 5.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a probability above 0 and at most 1, got {keep}")

    def loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        n, height, width = target.shape
        kept = torch.rand(n, 1, -(-height // cell), -(-width // cell), device=target.device) < keep
        kept = F.interpolate(kept.float(), scale_factor=cell, mode="nearest")[:, 0, :height, :width] > 0
        target = torch.where(kept, target, 255)
        total = F.cross_entropy(model(images), target, ignore_index=255, reduction="sum")
        return total / (target != 255).sum().clamp(min=1)

    return loss

"""SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation.

Badrinarayanan, Kendall, Cipolla; PAMI 2017.

Paper: https://arxiv.org/abs/1511.00561 (Fig. 2 and Sec. 3).  Code: https://github.com/alexgkendall/SegNet-Tutorial
Chapter: chapters/05_segnet.ipynb
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import he_init
from segedu.layers import batch_norm, check_images, normalize, pool_with_switches, scale, unpool


class SegNet(nn.Module):
    """VGG16's convolutions and their mirror image. Only the places of the pooling maxima cross from one to the other.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W.

    Args:
        num_classes: K.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: convolutions have biases, as in the release (the text has none). Images are normalised
    as torchvision's VGG16 expects; the release takes BGR in 0-255 as it is. Batch norm keeps running averages with
    eps 1e-5; the release passes over the training set once more after training, with eps 1e-9.
    """

    def __init__(self, num_classes: int, *, width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)

        self.stage1 = stage(3, c1, c1)
        self.stage2 = stage(c1, c2, c2)
        self.stage3 = stage(c2, c3, c3, c3)
        self.stage4 = stage(c3, c4, c4, c4)
        self.stage5 = stage(c4, c5, c5, c5)
        self.decode5 = stage(c5, c5, c5, c4)
        self.decode4 = stage(c4, c4, c4, c3)
        self.decode3 = stage(c3, c3, c3, c2)
        self.decode2 = stage(c2, c2, c1)
        self.decode1 = stage(c1, c1)
        self.score = he_init(nn.Conv2d(c1, num_classes, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        code, switches = self.encode(images)
        return self.decode(code, switches, like=images)

    # fmt: off
    def encode(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N, 3, H, W) -> code (N, C, H/32, W/32) and the switches of the five poolings, finest first."""
        x = normalize(images)
        x, switches1 = pool_with_switches(self.stage1(x))          # 1/2
        x, switches2 = pool_with_switches(self.stage2(x))          # 1/4
        x, switches3 = pool_with_switches(self.stage3(x))          # 1/8
        x, switches4 = pool_with_switches(self.stage4(x))          # 1/16
        x, switches5 = pool_with_switches(self.stage5(x))          # 1/32
        return x, (switches1, switches2, switches3, switches4, switches5)

    def decode(self, code: Tensor, switches: tuple[Tensor, ...], *, like: Tensor) -> Tensor:
        """code and switches as from `encode` -> logits (N, K, H, W) with the H and W of `like`, the images.

        Each map is unpooled to the size of the switches one level finer, so no feature map of the encoder is kept.
        """
        switches1, switches2, switches3, switches4, switches5 = switches
        x = self.decode5(unpool(code, switches5, like=switches4))  # 1/16
        x = self.decode4(unpool(x, switches4, like=switches3))     # 1/8
        x = self.decode3(unpool(x, switches3, like=switches2))     # 1/4
        x = self.decode2(unpool(x, switches2, like=switches1))     # 1/2
        x = self.decode1(unpool(x, switches1, like=like))          # 1
        return self.score(x)                                       # 1
    # fmt: on


class SegNetBasic(nn.Module):
    """The small SegNet of the paper's ablation: four encoders, four decoders, 7x7 kernels, no ReLU in the decoder.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W.

    Args:
        num_classes: K.
        decoder: which row of Table 1.
            "indices": SegNet-Basic. Unpool, convolve.
            "encoder-addition": the same, and the encoder's maps are added to the decoder's output.
            "single-channel": unpool, convolve each channel by itself.
            "bilinear": no indices. Interpolate, convolve each channel by itself.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: convolutions have biases and the image passes local response normalisation, as in the
    release (the text: no biases, local contrast normalisation). That takes the place of ImageNet's normalisation, and
    works on RGB in 0-255 where the release has BGR. Batch norm as in `SegNet`. Weights without biases and batch norm:
    1,415,040, where Table 1 has 1.425 M; "single-channel" 624,768, as the table has it. The paper says of "bilinear"
    only that the upsampling is fixed. With the single-channel decoder it has the table's 0.625 M weights; its 24.2 ms
    rather point to no decoder at all (612,224 weights).
    """

    def __init__(self, num_classes: int, *, decoder: str = "indices", width: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if decoder not in ("indices", "encoder-addition", "single-channel", "bilinear"):
            raise ValueError(
                f'decoder must be "indices", "encoder-addition", "single-channel" or "bilinear", got {decoder!r}'
            )
        self.num_classes, self.adds = num_classes, decoder == "encoder-addition"
        (c,) = scale((64,), width)

        self.stage1 = stage(3, c, kernel=7)
        self.stage2 = stage(c, c, kernel=7)
        self.stage3 = stage(c, c, kernel=7)
        self.stage4 = stage(c, c, kernel=7)
        self.decode4, self.decode3, self.decode2, self.decode1 = (decoder_box(decoder, c) for _ in range(4))
        self.score = he_init(nn.Conv2d(c, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        code, kept = self.encode(images)
        return self.decode(code, kept, like=images)

    # fmt: off
    def encode(self, images: Tensor) -> tuple[Tensor, tuple[tuple[Tensor, ...], ...]]:
        """(N, 3, H, W) -> code (N, C, H/16, W/16) and what crosses to each of the four decoders, finest first."""
        x = response_norm(images)
        x, kept1 = self.pool(self.stage1(x))            # 1/2
        x, kept2 = self.pool(self.stage2(x))            # 1/4
        x, kept3 = self.pool(self.stage3(x))            # 1/8
        x, kept4 = self.pool(self.stage4(x))            # 1/16
        return x, (kept1, kept2, kept3, kept4)

    def decode(self, code: Tensor, kept: tuple[tuple[Tensor, ...], ...], *, like: Tensor) -> Tensor:
        """code and kept as from `encode` -> logits (N, K, H, W) with the H and W of `like`, the images."""
        kept1, kept2, kept3, kept4 = kept
        x = self.decode4(code, *kept4, like=kept3[0])   # 1/8
        x = self.decode3(x, *kept3, like=kept2[0])      # 1/4
        x = self.decode2(x, *kept2, like=kept1[0])      # 1/2
        x = self.decode1(x, *kept1, like=like)          # 1
        return self.score(x)                            # 1
    # fmt: on

    def pool(self, maps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N, C, H, W) -> pooled maps and what crosses: the switches, and the maps themselves if they are added."""
        pooled, switches = pool_with_switches(maps)
        return pooled, ((switches, maps) if self.adds else (switches,))


def stage(*channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU from each channel count to the next. (N, c_first, h, w) -> (N, c_last, h, w).

    Batch norm starts at weight 1 and bias 0.001 (segnet_train.prototxt).
    """
    layers = []
    for c_in, c_out in pairwise(channels):
        layers += [he_init(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)), batch_norm(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


def response_norm(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> the same shape: 0-255 values, dark and bright places brought closer together.

    Caffe's LRN of 5 channels, alpha 1e-4, beta 0.75. Around each of three channels, five reach all three.
    """
    check_images(images)
    x = 255 * images
    return x / (1 + 1e-4 / 5 * (x * x).sum(1, keepdim=True)) ** 0.75


def decoder_box(decoder: str, channels: int) -> nn.Module:
    if decoder == "indices":
        return UnpoolDecoder(channels)
    if decoder == "encoder-addition":
        return AddingDecoder(channels)
    if decoder == "single-channel":
        return UnpoolDecoder(channels, groups=channels)
    return BilinearDecoder(channels, groups=channels)


class UnpoolDecoder(nn.Module):
    """Unpool, 7x7 convolution, batch norm. (N, C, h, w) and switches -> (N, C, H, W) with the H and W of `like`."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = he_init(nn.Conv2d(channels, channels, 7, padding=3, groups=groups))
        self.norm = batch_norm(channels)

    def forward(self, x: Tensor, switches: Tensor, *, like: Tensor) -> Tensor:
        return self.norm(self.conv(unpool(x, switches, like)))


class AddingDecoder(UnpoolDecoder):
    """As `UnpoolDecoder`, plus the encoder's maps (N, C, H, W)."""

    def forward(self, x: Tensor, switches: Tensor, maps: Tensor, *, like: Tensor) -> Tensor:
        return super().forward(x, switches, like=like) + maps


class BilinearDecoder(UnpoolDecoder):
    """As `UnpoolDecoder`, with fixed interpolation for the unpooling. The switches are not looked at."""

    def forward(self, x: Tensor, switches: Tensor, *, like: Tensor) -> Tensor:
        return self.norm(self.conv(F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)))


def median_frequency(targets: Sequence, num_classes: int) -> Tensor:
    """Class weights (K,) = median(freq) / freq: rare classes weigh more. A class that never occurs gets 0.

    freq(c) = pixels of c / pixels of the pictures that have c, the median over the classes that occur; 255 (void) is no
    class. So the median class weighs 1. Source: Eigen and Fergus 2015, Sec. 5, as Sec. 3.2 of SegNet asks for. The
    weights published with SegNet's code do not follow from its labels, by this or any other definition that was tried:
    their sign weighs 9.64, against 3.85 from the labels.

    Args:
        targets: label maps (H, W), or a data set of (image, target).

    Raises:
        ValueError: a label is not 0 to K - 1 or 255, or no pixel has a class.
    """
    of_class = torch.zeros(num_classes, dtype=torch.float64)
    around = torch.zeros(num_classes, dtype=torch.float64)
    for i in range(len(targets)):
        item = targets[i]
        target = item[1] if isinstance(item, tuple) else item
        labels = target[target != 255].cpu()
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(f"labels must be 0 to {num_classes - 1} or 255 (void), got {wrong[0]} in target {i}")
        counts = torch.bincount(labels, minlength=num_classes)
        of_class += counts
        around += target.numel() * (counts > 0)
    there = of_class > 0
    if not there.any():
        raise ValueError(f"no pixel of {len(targets)} targets has a class; all are 255 (void)")
    frequency = of_class[there] / around[there]
    weights = torch.zeros(num_classes, dtype=torch.float64)
    weights[there] = frequency.quantile(0.5) / frequency
    return weights.float()


def balanced_loss(weights: Tensor) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Cross-entropy with a weight for each class, (K,), as from `median_frequency`.

    Returns a loss (model, images (N, 3, H, W), target (N, H, W)) -> scalar: the weighted sum over the *number* of pixels
    that are not void (255), as Caffe has it. torch's own weighted mean divides by the sum of their weights.
    Source: softmax_loss_layer.cpp of caffe-segnet.
    """
    if weights.ndim != 1 or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be K numbers of 0 or above, got {weights}")

    def loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        logits = model(images).float()
        total = F.cross_entropy(logits, target, weights.to(logits), ignore_index=255, reduction="sum")
        return total / (target != 255).sum().clamp(min=1)

    return loss

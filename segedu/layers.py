"""Pieces that two or more papers share."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def scale(channels: Sequence[int], width: float) -> list[int]:
    """The paper's channel counts times `width`, as multiples of 4 and at least 4. `width=1` is the paper."""
    if not 0 < width <= 4:
        raise ValueError(f"width must be above 0 and at most 4 (1 is the paper, 1/8 a laptop), got {width}")
    return [c if width == 1 else max(4, round(c * width / 4) * 4) for c in channels]


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are (N, 3, H, W), TypeError unless they are floats (0-255 integers, for example)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W), got {tuple(images.shape)}; add the batch axis with image[None]")
    if not images.is_floating_point():
        raise TypeError(f"images must be floats in [0, 1], got {images.dtype}; use images / 255")


def normalize(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> the same shape, centred as torchvision's ImageNet weights expect.

    Raises as `check_images`.
    """
    check_images(images)
    mean = torch.tensor(IMAGENET_MEAN, dtype=images.dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm over (N, C, h, w) that starts at scale 1 and shift 0.001, as SegNet's and DeconvNet's releases do."""
    layer = nn.BatchNorm2d(channels)
    nn.init.constant_(layer.bias, 0.001)
    return layer


def conv_bn_relu(c_in: int, c_out: int, kernel: int = 1, *, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias, of odd kernel, that keeps the size; batch norm; ReLU. (N, c_in, h, w) -> (N, c_out, h, w)."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def separable_conv(
    c_in: int, c_out: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1, relu: bool = True, eps: float = 1e-5
) -> nn.Sequential:
    """Atrous separable convolution: each channel by itself, then 1x1 over channels; batch norm (and ReLU) after both.

    (N, c_in, h, w) -> (N, c_out, ceil(h / stride), ceil(w / stride)), with kernel^2 c_in + c_in c_out weights, not
    kernel^2 c_in c_out. Source: DeepLab v3+, Sec. 3.1 and Fig. 3; `relu` and `eps` (of batch norm) as the release has it.
    """
    reach = dilation * (kernel // 2)
    depthwise = nn.Conv2d(c_in, c_in, kernel, stride, reach, dilation, groups=c_in, bias=False)
    pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
    layers: list[nn.Module] = []
    for conv in (depthwise, pointwise):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(conv.out_channels, eps=eps), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(*layers)


def score_layer(c_in: int, num_classes: int, kernel: int = 1, *, dilation: int = 1) -> nn.Conv2d:
    """Convolution to the classes that keeps the size; normal weights of 0.01 (DeepLab v1's train.prototxt), bias 0."""
    conv = nn.Conv2d(c_in, num_classes, kernel, padding=dilation * (kernel // 2), dilation=dilation)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class FrozenBatchNorm(nn.Module):
    """Batch norm by its running statistics, in training too; nothing of it changes. Its weights keep their names."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        freeze(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Put a `FrozenBatchNorm` in the place of each batch norm, in place; a batch of one picture will do then.

    Returns: the model. Source: DeepLab v2 (statistics of ImageNet kept), DeepLab v3, Sec. 4.1.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm(child))
    return model


def freeze(*modules: nn.Module) -> None:
    """Their parameters get no gradient and stay as they are: a paper's later stage trains only what is new."""
    for module in modules:
        module.requires_grad_(False)


def grid_pad(x: Tensor, stride: int) -> Tensor:
    """(N, C, H, W) -> sides of stride m + 1 cells by zeros at the right and below: there strides hit the last pixel too.

    A normalised picture gets the mean colour. Then every map has its first and last cell on the first and last pixel.
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, -(width - 1) % stride, 0, -(height - 1) % stride))


def enlarged(scores: Tensor, times: int) -> Tensor:
    """(N, K, h, w) -> (N, K, (h - 1) times + 1, ...): bilinear, cell i stays as pixel `times` i."""
    height, width = scores.shape[-2:]
    size = ((height - 1) * times + 1, (width - 1) * times + 1)
    return F.interpolate(scores, size, mode="bilinear", align_corners=True)


def warn_wide_rates(module: nn.Module, rates: Sequence[int], size: Sequence[int]) -> None:
    """Warn, once for each module, if a 3x3 kernel's rate is not below the side of its map (h, w).

    Source: DeepLab v3, Sec. 3.3 and Fig. 4.
    """
    wide = [rate for rate in rates if rate >= min(size)]
    if wide and not getattr(module, "warned", False):
        module.warned = True
        warnings.warn(
            f"rates {wide} are too large for a map of {size[0]} x {size[1]} cells: where the rate is not below the map's "
            "side, outer taps of a 3x3 kernel always lie in the padding, and what is left is a 1x1 convolution. Give "
            "smaller rates, a larger picture or a smaller output stride",
            stacklevel=3,
        )


def mirror_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """(N, C, H, W) with that many mirror_pad columns and rows at each side, the outer pixel not repeated.

    As torch's "reflect" padding, also where more is needed than the picture has: mirror_pad again and again. A side of a
    single pixel is repeated.
    """
    while left or right or top or bottom:
        reach = [max(n - 1, 0) for n in (x.shape[-1], x.shape[-1], x.shape[-2], x.shape[-2])]
        one = [min(want, most) for want, most in zip((left, right, top, bottom), reach, strict=True)]
        if not any(one):
            return F.pad(x, (left, right, top, bottom), mode="replicate")
        x = F.pad(x, one, mode="reflect")
        left, right, top, bottom = left - one[0], right - one[1], top - one[2], bottom - one[3]
    return x


def coarse_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy on the map of stride 8, against every eighth label; void (255) left out.

    The model's `scores(images)` must give (N, K, ceil(H / 8), ceil(W / 8)). images (N, 3, H, W), target (N, H, W) ->
    scalar. Source: DeepLab v1, Sec. 3.1 and train.prototxt (Interp, shrink_factor 8); Dilation's release, train.py.
    """
    return F.cross_entropy(model.scores(images), target[:, ::8, ::8], ignore_index=255)


def crop(x: Tensor, offset: int, like: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W) of `like`, cut out at row and column `offset` (Caffe's Crop layer)."""
    height, width = like.shape[-2:]
    if offset + height > x.shape[-2] or offset + width > x.shape[-1]:
        raise ValueError(f"cannot cut {height} x {width} at {offset} out of a map of {x.shape[-2]} x {x.shape[-1]}")
    return x[..., offset : offset + height, offset : offset + width]


def bilinear_kernel(size: int) -> Tensor:
    """(size, size) bilinear interpolation weights, w(i, j) = (1 - |i - c| / f) (1 - |j - c| / f).

    f = (size + 1) // 2 is the upsampling factor. The sum is f * f, and size = 2f is what FCN uses for factor f.
    Source: the FCN release, surgery.py.
    """
    if size < 1:
        raise ValueError(f"kernel size must be at least 1, got {size}")
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    taps = 1 - (torch.arange(size) - centre).abs() / factor
    return taps[:, None] * taps[None, :]


class BilinearUpsampling(nn.Module):
    """Transposed convolution with a fixed bilinear kernel, each class by itself. No learnable parameter.

    Shape: (N, C, h, w) -> (N, C, (h - 1) stride + kernel, (w - 1) stride + kernel).
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        weight = bilinear_kernel(kernel).expand(channels, 1, kernel, kernel).clone()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight.to(x.dtype), stride=self.stride, groups=self.channels)


def learned_upsampling(channels: int, kernel: int, stride: int, bias: bool = False) -> nn.ConvTranspose2d:
    """A transposed convolution over all class pairs that starts as bilinear interpolation and may be trained.

    Shape: as `BilinearUpsampling`. Learnable parameters: channels^2 kernel^2 (+ channels with bias).
    """
    layer = nn.ConvTranspose2d(channels, channels, kernel, stride, bias=bias)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(channels), range(channels)] = bilinear_kernel(kernel)
        if bias:
            layer.bias.zero_()
    return layer


def pool_with_switches(x: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 max pooling that remembers where each maximum stood: its switch (DeconvNet) or pooling index (SegNet).

    (N, C, H, W) -> pooled and switches, both (N, C, ceil(H / 2), ceil(W / 2)). A switch is the flat place
    row * W + column in its plane of x, as in torch and Caffe; two bits would do (SegNet, Sec. 3.1).
    """
    return F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)


def unpool(x: Tensor, switches: Tensor, like: Tensor) -> Tensor:
    """Put each value back where its maximum stood; all other places are 0.

    x and switches (N, C, h, w) -> (N, C, H, W), H and W those of `like`, the map that was pooled.
    Source: DeconvNet, Sec. 3.2.1 and Fig. 3.

    Raises:
        ValueError: the switches are of another size than x, or were not taken from a map as large as `like`.
    """
    height, width = like.shape[-2:]
    if x.shape != switches.shape:
        raise ValueError(
            f"unpool needs one switch for each value: x is {tuple(x.shape)}, the switches are {tuple(switches.shape)}; "
            "take both from the same pooling and keep the number of channels"
        )
    if x.shape[-2:] != (-(-height // 2), -(-width // 2)):
        raise ValueError(
            f"pooling {height} x {width} gives {-(-height // 2)} x {-(-width // 2)}, but x is {x.shape[-2]} x "
            f"{x.shape[-1]}; `like` must be the map that was pooled"
        )
    return F.max_unpool2d(x, switches, 2, output_size=(height, width))

"""The ImageNet networks that the segmentation papers start from, and how their strides become dilation.

Chapter: chapters/07_dilation.ipynb
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segedu.layers import scale, separable_conv

VGG16_CONVOLUTIONS = 13  # Simonyan and Zisserman 2015, Table 1, column D
# Bottlenecks of the four stages. He et al. 2016, Table 1; 14 is ours.
BLOCKS = {14: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# Entry blocks (channels, stride) and the number of middle blocks of the aligned Xception. The release, core/xception.py.
XCEPTION = {
    41: (((128, 2), (256, 2), (728, 2)), 8),
    65: (((128, 2), (256, 2), (728, 2)), 16),
    71: (((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)), 16),
}


def vgg_stage(c_in: int, c_out: int, n: int, *, padding: int | None = None, dilation: int = 1) -> nn.Sequential:
    """One stage of VGG without its pool: n times (3x3 convolution, ReLU). (N, c_in, h, w) -> (N, c_out, h', w').

    Each convolution pads `dilation` and keeps the size. `padding` is another value for the first one (FCN: 100).
    Source: Simonyan and Zisserman 2015, Table 1, column D. Initialised as He et al. 2015.
    """
    layers = []
    for i in range(n):
        pad = padding if i == 0 and padding is not None else dilation
        conv = nn.Conv2d(c_in if i == 0 else c_out, c_out, 3, padding=pad, dilation=dilation)
        layers += [he_init(conv), nn.ReLU()]
    return nn.Sequential(*layers)


def he_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Normal weights of variance 2 / fan-in, zero bias: the variance survives ReLU (He et al. 2015, Eq. 10)."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return conv


class ResNet(nn.Module):
    """ResNet without its classifier: a stem, 3x3 pool, four stages of bottlenecks. Output stride 32.

    Shape: normalised images (N, 3, H, W) -> maps of layer1 to layer4, strides 4, 8, 16, 32 and 256, 512, 1024, 2048
    channels. Names are those of torchvision, and so are the weights.

    Args:
        depth: 50, 101 or 152; 14 for a laptop, one bottleneck a stage.
        stride_on: which convolution of a stage's first bottleneck has the stride: "3x3" as torchvision, "1x1" as in the
            paper and Caffe.
        stem: "7x7", one convolution to 64 channels, or "deep", three 3x3 to 64, 64 and 128, as PSPNet's releases have it.
        width: channel counts as a multiple of the paper's.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Table 1 and Fig. 5. Deep stem:
    hszhao/semseg, model/resnet.py.
    """

    def __init__(self, depth: int = 50, *, stride_on: str = "3x3", stem: str = "7x7", width: float = 1.0) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        if stride_on not in ("3x3", "1x1"):
            raise ValueError(f'stride_on must be "3x3" (torchvision) or "1x1" (Caffe), got {stride_on!r}')
        if stem not in ("7x7", "deep"):
            raise ValueError(f'stem must be "7x7" (torchvision) or "deep" (three 3x3), got {stem!r}')
        self.depth, self.stride_on, self.stem = depth, stride_on, stem
        c, *inner = scale((64, 64, 128, 256, 512), width)
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, c, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(c)
        else:
            self.conv1 = nn.Conv2d(3, c, 3, stride=2, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(c)
            self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(c)
            self.conv3 = nn.Conv2d(c, inner[1], 3, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(inner[1])
            c = inner[1]
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        for middle, blocks, stride in zip(inner, BLOCKS[depth], (1, 2, 2, 2), strict=True):
            first = Bottleneck(c, middle, stride, stride_on)
            c = 4 * middle
            stages.append(nn.Sequential(first, *(Bottleneck(c, middle) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "deep":
            x = F.relu(self.bn2(self.conv2(x)))
            x = F.relu(self.bn3(self.conv3(x)))
        x = self.maxpool(x)
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut: (N, c_in, h, w) -> (N, 4 middle, h / stride, w / stride)."""

    def __init__(self, c_in: int, middle: int, stride: int = 1, stride_on: str = "3x3") -> None:
        super().__init__()
        at_1x1, at_3x3 = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(c_in, middle, 1, stride=at_1x1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=at_3x3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, 4 * middle, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * middle)
        self.downsample = None
        if stride > 1 or c_in != 4 * middle:
            shortcut = nn.Conv2d(c_in, 4 * middle, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * middle))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Xception(nn.Module):
    """The aligned Xception of DeepLab v3+ without its classifier: strided separable convolutions, no pools. Stride 32.

    Shape: normalised images (N, 3, H, W) -> the low-level map of v3+'s decoder, stride 4 and 256 channels, and the last
    map, stride 32 and 2048 channels.

    Args:
        depth: 41, 65 (the paper's) or 71, by the number of middle and entry blocks.
        width: channel counts as a multiple of the paper's.

    The low-level map is the second convolution, with batch norm and before ReLU, of the last block of 256 channels, as in
    the release. Source: Chen et al., DeepLab v3+, Fig. 4; their release, core/xception.py. There, batch norm follows every
    3x3 and 1x1, and ReLU stands before each separable convolution but in the last block, where it comes after both.
    """

    def __init__(self, depth: int = 65, *, width: float = 1.0) -> None:
        super().__init__()
        if depth not in XCEPTION:
            raise ValueError(f"depth must be one of {', '.join(map(str, XCEPTION))}, got {depth}")
        entry, middle = XCEPTION[depth]
        self.low_level = max(i for i, (channels, _) in enumerate(entry) if channels == 256)
        c1, c2, c728, c1024, c1536, c2048 = scale((32, 64, 728, 1024, 1536, 2048), width)

        self.conv1 = nn.Conv2d(3, c1, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1, eps=1e-3)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c2, eps=1e-3)
        self.entry, c = nn.ModuleList(), c2
        for channels, stride in zip(
            scale([channels for channels, _ in entry], width), [s for _, s in entry], strict=True
        ):
            self.entry.append(XceptionBlock(c, (channels,) * 3, stride))
            c = channels
        self.middle = nn.ModuleList(XceptionBlock(c728, (c728,) * 3) for _ in range(middle))
        self.exit1 = XceptionBlock(c728, (c728, c1024, c1024), 2)
        self.exit2 = nn.Sequential(
            *(separable_conv(a, b, eps=1e-3) for a, b in ((c1024, c1536), (c1536, c1536), (c1536, c2048)))
        )
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    # fmt: off
    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))                  # 1/2
        x = F.relu(self.bn2(self.conv2(x)))                  # 1/2
        low = x
        for i, block in enumerate(self.entry):
            x, inside = block(x)                             # 1/4, 1/8, 1/16
            low = inside if i == self.low_level else low     # 1/4
        for block in self.middle:
            x, _ = block(x)                                  # 1/16
        x, _ = self.exit1(x)                                 # 1/32
        return [low, self.exit2(x)]                          # 1/32
    # fmt: on


class XceptionBlock(nn.Module):
    """Three times ReLU and separable convolution beside a shortcut, a strided 1x1 where size or channels change.

    (N, c_in, h, w) -> (N, channels[2], h / stride, w / stride), and what the second convolution gave.
    """

    def __init__(self, c_in: int, channels: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        a, b, c = channels
        self.conv1 = separable_conv(c_in, a, relu=False, eps=1e-3)
        self.conv2 = separable_conv(a, b, relu=False, eps=1e-3)
        self.conv3 = separable_conv(b, c, stride=stride, relu=False, eps=1e-3)
        self.downsample = None
        if stride > 1 or c_in != c:
            shortcut = nn.Conv2d(c_in, c, 1, stride=stride, bias=False)
            nn.init.kaiming_normal_(shortcut.weight, nonlinearity="relu")
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(c, eps=1e-3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.conv2(F.relu(self.conv1(F.relu(x))))
        y = self.conv3(F.relu(inside))
        return y + (x if self.downsample is None else self.downsample(x)), inside


def dilate(model: nn.Module, output_stride: int) -> nn.Module:
    """Turn the last strides of a network into dilation, in place, so that its output stride is `output_stride`.

    The layer that loses a stride s keeps its dilation; all layers after it, pools too, get theirs times s. Weights stay
    usable: in evaluation mode, every f-th row and column of the new map is the old map, f the old output stride over
    the new, where padding keeps sizes and pools round down. Source: DeepLab v1, Sec. 3.1 ("hole algorithm").

    Args:
        model: a chain of modules registered in the order in which they run, for example torchvision's vgg16().features,
            or a ResNet, ours or torchvision's: its shortcuts are the submodules named `downsample`.
        output_stride: one that the model passes through: 1, 2, 4, 8, 16 of 32.

    Returns: the model.

    Raises ValueError, and changes nothing, if no layer stands where the stride is `output_stride`, or one after it
    cannot be dilated (average pooling, transposed convolution).
    """
    plan: list[tuple[nn.Module, int, int]] = []
    stride, _ = _plan(model, "", 1, 1, output_stride, plan)
    if stride != output_stride:
        raise ValueError(
            f"the modules of {type(model).__name__} have a total stride of {stride}, so {output_stride} is not on the "
            "way; strides inside forward() do not count: they must be those of Conv2d or MaxPool2d modules"
        )
    for layer, stride, rate in plan:
        layer.stride = _pair(stride)
        if _pair(layer.kernel_size) != (1, 1):
            layer.dilation = tuple(d * rate for d in _pair(layer.dilation))
            if not isinstance(layer.padding, str):  # "same" sees to itself
                layer.padding = tuple(p * rate for p in _pair(layer.padding))
    return model


def _plan(
    module: nn.Module, name: str, stride: int, rate: int, limit: int, plan: list[tuple[nn.Module, int, int]]
) -> tuple[int, int]:
    """Walk the layers from a total stride and rate, note (layer, its stride, factor of its dilation); what comes out."""
    if isinstance(module, nn.Conv2d | nn.MaxPool2d):
        height, width = _pair(module.stride)
        if any(layer is module for layer, _, _ in plan):
            raise ValueError(f"{name} is a module that stands in the chain twice; give each place one of its own")
        if isinstance(module, nn.MaxPool2d) and max(_pair(module.padding)) * rate > min(_pair(module.kernel_size)) // 2:
            raise ValueError(
                f"{name} needs a padding of {max(_pair(module.padding)) * rate} at rate {rate}, more than MaxPool2d takes; "
                "pad by nn.ConstantPad2d(..., -inf) before it, and let the pool pad 0"
            )
        if height != width:
            raise ValueError(f"{name} has a stride of {height} x {width}; only equal strides become dilation")
        if stride * height <= limit:
            if rate > 1 or height > 1:
                plan.append((module, height, rate))
            return stride * height, rate
        if stride < limit:
            raise ValueError(
                f"{name} takes the stride from {stride} to {stride * height}, over {limit}; "
                f"output_stride can be {stride} or {stride * height}"
            )
        plan.append((module, 1, rate))
        return stride, rate * height
    strided_pool = isinstance(module, nn.AvgPool2d) and (rate > 1 or stride * _pair(module.stride)[0] > limit)
    if strided_pool or isinstance(module, nn.ConvTranspose2d):
        raise ValueError(f"{name} ({type(module).__name__}) cannot be dilated; output_stride={limit} needs it")
    start = (stride, rate)
    for child, part in module._modules.items():  # named_children() would leave out a module that comes a second time
        if part is not None:
            state = start if child == "downsample" else (stride, rate)
            end = _plan(part, f"{name}.{child}".lstrip("."), *state, limit, plan)
            if child != "downsample":
                stride, rate = end
    return stride, rate


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@torch.no_grad()
def load_imagenet(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Put torchvision's ImageNet weights, of VGG16 or of a ResNet, into the trunk of `model`, in place.

    VGG16: the 13 convolutions go in order; `fc6` and `fc7`, where the model has them, take the fully connected layers
    reshaped to convolutions: (4096, 25088) -> (4096, 512, 7, 7) and (4096, 4096) -> (4096, 4096, 1, 1). Where fc6 is a
    smaller kernel with holes, or has fewer channels, both are decimated (`decimated`). DeepLab v2 has four of each, which
    start alike. Score layers are not touched.

    Args:
        state_dict: weights with torchvision's names; None downloads the published ones (VGG16 528 MB, ResNet-50 98 MB).

    Raises:
        TypeError: the model has no such trunk.
        ValueError: sizes differ (pretrained weights need `width=1`); the model is left as it was.
    """
    resnet = next((m for m in model.modules() if isinstance(m, ResNet)), None)
    if resnet is not None:
        return _load_resnet(resnet, state_dict)
    trunk = next((m for m in model.modules() if hasattr(m, "stage5")), model)
    stages = [getattr(trunk, f"stage{i}", None) for i in range(1, 6)]
    convs = [m for s in stages if s is not None for m in s.modules() if isinstance(m, nn.Conv2d)]
    if len(convs) != VGG16_CONVOLUTIONS:
        raise TypeError(
            f"load_imagenet needs a ResNet or a VGG16 trunk (stage1 to stage5, {VGG16_CONVOLUTIONS} convolutions), "
            f"got {type(model).__name__} with {len(convs)}"
        )
    if state_dict is None:
        from torchvision.models import VGG16_Weights

        state_dict = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)

    names = [
        key.removesuffix(".weight") for key in state_dict if key.startswith("features.") and key.endswith("weight")
    ]
    pairs = list(zip(convs, sorted(names, key=lambda name: int(name.split(".")[1])), strict=True))
    fc6, fc7 = ([m for key, m in model.named_modules() if key.split(".")[-1] == fc] for fc in ("fc6", "fc7"))
    pairs += [(layer, "classifier.0") for layer in fc6] + [(layer, "classifier.3") for layer in fc7]
    ready = []
    for layer, name in pairs:  # look at every size before the first weight is changed
        weight, bias = state_dict[f"{name}.weight"], state_dict[f"{name}.bias"]
        if name == "classifier.0":
            weight = weight.view(len(weight), -1, 7, 7)
        elif name == "classifier.3":
            weight = weight[:, :, None, None]
        if name.startswith("classifier") and fc6[0].dilation != (1, 1):
            weight, bias = decimated(weight, layer.weight.shape), decimated(bias, layer.bias.shape)
        if layer.weight.shape != weight.shape:
            raise ValueError(
                f"cannot put weights {tuple(weight.shape)} of {name} into {tuple(layer.weight.shape)}; "
                "pretrained weights need width=1"
            )
        ready.append((layer, weight, bias))
    for layer, weight, bias in ready:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def decimated(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Every n-th entry along each axis, from the first on, to `shape`; as it is where a size does not divide.

    (4096, 512, 7, 7) -> (1024, 512, 3, 3): every fourth channel and taps 0, 3, 6. Two ends of a kernel stay its ends, so
    7x7 at rate 4, 4x4 at rate 8 and 3x3 at rate 12 see as far. Source: DeepLab v1, Sec. 3.1 and 5.2; DeepLab v2 draws
    the channels at random.
    """
    for axis, (n, wanted) in enumerate(zip(weight.shape, shape, strict=True)):
        taps = axis >= 2
        step = (n - 1) / (wanted - 1) if taps and wanted > 1 else n / wanted
        if step.is_integer() and step > 1:
            weight = weight.index_select(axis, torch.arange(wanted, device=weight.device) * int(step))
    return weight


@torch.no_grad()
def load_pretrained(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Put torchvision's published weights, trained for segmentation, into `model`, in place; its logits are then theirs.

    For `DeepLabV3(21, depth=50, head="torchvision")`, and depth=101. They were trained on the pictures of COCO that show
    one of the 20 classes of VOC; class 0 is background. The auxiliary head of the checkpoint is left out.

    Args:
        state_dict: weights with the names of torchvision's deeplabv3_resnet50 or 101; None downloads the published ones
            (161 and 233 MB).

    Raises:
        TypeError: the model has no counterpart in torchvision.
        ValueError: sizes or names differ; the model is left as it was.
    """
    if getattr(model, "head", None) != "torchvision":
        raise TypeError(
            'load_pretrained needs a model that torchvision has weights for, DeepLabV3(21, depth=50, head="torchvision"), '
            f"got {type(model).__name__}; for a trunk alone use load_imagenet"
        )
    if state_dict is None:
        depth, classes = model.backbone.depth, model.score.out_channels
        if depth not in (50, 101) or classes != 21:
            raise ValueError(f"weights are published for depth 50 and 101 and 21 classes, got {depth} and {classes}")
        import torchvision

        weights = torchvision.models.get_weight(f"DeepLabV3_ResNet{depth}_Weights.COCO_WITH_VOC_LABELS_V1")
        state_dict = weights.get_state_dict(progress=True, check_hash=True)
    places = {
        "classifier.0.": "aspp.",
        "classifier.1.": "between.0.",
        "classifier.2.": "between.1.",
        "classifier.4.": "score.",
    }
    weights = {}
    for name, p in state_dict.items():
        place = next((place for place in places if name.startswith(place)), "")
        if not name.startswith("aux_classifier."):
            weights[places.get(place, "") + name.removeprefix(place)] = p
    _load_strictly(model, weights, f"torchvision's DeepLab v3 with ResNet-{model.backbone.depth}")


def _load_strictly(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load all or, with a ValueError, nothing."""
    own = model.state_dict()
    wrong = [name for name in own.keys() | weights.keys() if name not in own or name not in weights]
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(
            f"these are not the weights of {what} at width=1: {len(wrong)} differ, for example {min(wrong)}"
        )
    model.load_state_dict(weights)


def _load_resnet(resnet: ResNet, state_dict: Mapping[str, Tensor] | None) -> None:
    if resnet.stride_on != "3x3":
        raise ValueError('torchvision\'s ResNets have the stride on the 3x3; build the model with stride_on="3x3"')
    if resnet.stem != "7x7":
        raise ValueError(
            'torchvision\'s ResNets have a stem of one 7x7; build the model with stem="7x7". The weights of the deep stem '
            "are hszhao/semseg's own: load them by resnet.load_state_dict"
        )
    if state_dict is None:
        import torchvision

        if resnet.depth == 14:
            raise ValueError("there are no published weights for depth 14; use 50, 101 or 152")
        state_dict = torchvision.models.get_weight(f"ResNet{resnet.depth}_Weights.IMAGENET1K_V1").get_state_dict(
            progress=True, check_hash=True
        )
    weights = {name: p for name, p in state_dict.items() if not name.startswith("fc.")}
    _load_strictly(resnet, weights, f"a ResNet-{resnet.depth}")

"""Receptive fields against the papers' numbers, and against the support of real gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_models import MODELS
from torch import nn
from torchvision.models import vgg16

import segedu as sg
from segedu.models import pspnet
from segedu.models.fcn import FCN
from segedu.receptive import Field, _spans, effective_field, hooked, receptive_field, receptive_fields


def test_vgg16_of_torchvision():
    with torch.device("meta"):
        model = vgg16()
    names = {"features.9": (16, 4), "features.16": (44, 8), "features.23": (100, 16), "features.28": (196, 16)}
    names["features.30"] = (212, 32)
    fields = receptive_fields(model, names)
    assert {name: field[:2] for name, field in fields.items()} == names


# Sizes and strides: FCN's layers. Centres: with padding 100, the ones its crops of 19, 5 and 27, 5 and 9 and 31 rest on.
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("stage1", Field(5, 1, -99)),
        ("stage3", Field(40, 4, -97.5)),
        ("stage4", Field(92, 8, -95.5)),
        ("score_pool3", Field(44, 8, -95.5)),
        ("stage5", Field(196, 16, -91.5)),
        ("score_pool4", Field(100, 16, -91.5)),
        ("fc6", Field(404, 32, 12.5)),
        ("fc7", Field(404, 32, 12.5)),
    ],
)
def test_fcn(name, field):
    assert receptive_field(FCN(21, width=1 / 8), name) == field


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_logits_of_fcn_lie_on_the_pixels(stride):
    field = receptive_field(FCN(3, stride=stride, width=1 / 16), "")
    assert (field.stride, field.centre) == (1, 0)


def test_fcn_alexnet():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 11, 4, 100), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 5, padding=2), nn.MaxPool2d(3, 2),
        *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 6),
    )  # fmt: skip
    sizes = [field[:2] for field in receptive_fields(model, [str(i) for i in range(9)]).values()]
    assert sizes == [(11, 4), (19, 8), (51, 8), (67, 16), (99, 16), (131, 16), (163, 16), (195, 32), (355, 32)]
    assert receptive_field(model, "8").centre == 13


def test_context_module_of_yu_and_koltun():
    layers = [nn.Conv2d(3, 3, 3, padding=d, dilation=d) for d in (1, 1, 2, 4, 8, 16, 1)]
    model = nn.Sequential(*layers, nn.Conv2d(3, 3, 1))
    fields = receptive_fields(model, [str(i) for i in range(8)])
    assert [field.size for field in fields.values()] == [3, 5, 9, 17, 33, 65, 67, 67]  # their Table 1
    assert {field[1:] for field in fields.values()} == {(1, 0)}


class UNet(nn.Module):
    """The sizes of Ronneberger et al. 2015, Fig. 1: valid convolutions, cropped skips."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(double(c, 2) for c in (1, 2, 2, 2, 2))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2, 2, 2, 2) for _ in range(4))
        self.merge = nn.ModuleList(double(4, 2) for _ in range(4))

    def forward(self, x):
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            cut = (skip.shape[-1] - x.shape[-1]) // 2
            x = merge(torch.cat([skip[..., cut : cut + x.shape[-2], cut : cut + x.shape[-1]], x], 1))
        return x


def double(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3), nn.ReLU(), nn.Conv2d(c_out, c_out, 3), nn.ReLU())


def test_unet():
    sizes = [receptive_field(UNet(), f"down.{i}", (572, 572)).size for i in range(5)]
    assert sizes == [5, 14, 32, 68, 140]
    field = receptive_field(UNet(), "", (572, 572))
    assert (field.size, field.stride) == (204, 1)
    rows = _spans(UNet(), [""], (572, 572))[""][0]
    sizes = rows.last - rows.first + 1
    assert set(sizes.tolist()) == {188, 204}
    assert [r for r in range(16) if sizes[160 + r] == 188] == [0, 1, 2, 3]  # rows 0 to 3 of each 16
    assert ((rows.first - torch.arange(388).numpy()).min(), (rows.last - torch.arange(388).numpy()).max()) == (-15, 199)


NETS = {
    "chain": lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1)),
    "holes": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=4), nn.Conv2d(4, 4, 3, dilation=2, padding=1)),
    "up": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 4, 2), nn.Conv2d(4, 4, 3)),
    "bilinear": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, 4), nn.Upsample(scale_factor=3, mode="bilinear"), nn.Conv2d(4, 4, 2)
    ),
    "corners": lambda: nn.Sequential(nn.AvgPool2d(4), nn.Upsample(size=(25, 31), mode="bilinear", align_corners=True)),
    "nearest": lambda: nn.Sequential(nn.AvgPool2d(3, 3, 1), nn.Upsample(scale_factor=2), nn.BatchNorm2d(3)),
    "bins": lambda: nn.Sequential(nn.AdaptiveAvgPool2d((5, 7)), nn.Conv2d(3, 2, 1)),
    "reflect": lambda: nn.Sequential(
        nn.ReflectionPad2d((3, 1, 2, 4)), nn.Conv2d(3, 4, 3, 2), nn.ZeroPad2d((2, 0, 0, 1))
    ),
    "ceil": lambda: nn.Sequential(
        nn.Conv2d(3, 2, (3, 5), (2, 1)), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(2, 2, 3, 1, 2)
    ),
}


def positive(model: nn.Module) -> nn.Module:
    """With weights above 0 and no rectifier no two paths cancel: the gradient is not 0 on all of the field."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", NETS)
def test_every_cell_equals_the_gradient(name):
    """Also the cells at the border, which look into the padding."""
    model = positive(NETS[name]()).eval()
    image = torch.rand(1, 3, 34, 46, requires_grad=True)
    spans = _spans(model, [""], (34, 46))[""]
    output = model(image)
    for axis, span in zip((2, 3), spans, strict=True):
        assert len(span.first) == output.shape[axis]
        for cell in range(output.shape[axis]):
            (gradient,) = torch.autograd.grad(output.select(axis, cell).sum(), image, retain_graph=True)
            pixels = gradient.sum((0, 1, 5 - axis)).nonzero()[:, 0].tolist()
            first, last = (pixels[0], pixels[-1]) if pixels else (None, None)
            expected = (span.first[cell], span.last[cell]) if span.first[cell] <= span.last[cell] else (None, None)
            assert (first, last) == expected, f"axis {axis}, cell {cell}"


def mean_pool(x, size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """Looks at the same window as max pooling, but at all of it."""
    maxima, switches = max_pool2d(x, size, stride, padding, dilation, ceil_mode, True)
    taps = torch.ones(x.shape[1], 1, size, size, dtype=x.dtype)
    step, padding, dilation = (v if isinstance(v, int) else v[0] for v in (stride or size, padding, dilation))
    more = [(n - 1) * step + (size - 1) * dilation + 1 - m for n, m in zip(maxima.shape[2:], x.shape[2:], strict=True)]
    x = F.pad(x, (padding, more[1] - padding, padding, more[0] - padding))
    sums = F.conv2d(x, taps, stride=step, dilation=dilation, groups=x.shape[1])
    return (sums, switches) if return_indices else sums


def spread(x, switches, size, output_size):
    """Puts a value at all places where unpooling may put it."""
    height, width = output_size
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]


max_pool2d = F.max_pool2d
WHOLE = {name: make for name, make in MODELS.items() if "tile" not in name and "proposals" not in name}  # not in parts
WHOLE["DeconvNet"] = lambda: sg.DeconvNet(5, size=128, width=1 / 16)
for stride in (32, 16, 8):
    WHOLE[f"ResNet at stride {stride}"] = partial(lambda s: sg.dilate(sg.ResNet(14, width=1 / 16), s), stride)


@pytest.mark.parametrize("name", WHOLE)
def test_every_model_equals_the_gradient(name, monkeypatch):
    """A cell of every third convolution and of the logits: first and last pixel with a gradient, rows and columns."""
    size = (128, 128) if name == "DeconvNet" else (104, 136)
    model = positive(WHOLE[name]()).double().eval()
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    few = layers[:: max(3, len(layers) // 12)]
    layers = [name for name in [*few, *layers[-2:]] if "branches" not in name]
    spans = _spans(model, layers, size)
    assert spans
    monkeypatch.setattr(F, "max_pool2d", mean_pool)
    monkeypatch.setattr(F, "max_unpool2d", spread)
    monkeypatch.setitem(pspnet.POOLS, "max", F.adaptive_avg_pool2d)
    image = (1 + torch.rand(1, 3, *size)).double().requires_grad_()  # above the mean colour: no rectifier cuts
    maps = {}
    with hooked(model, {layer: partial(maps.__setitem__, layer) for layer in layers}):
        model(image)
    for layer, (rows, columns) in spans.items():
        y, x = maps[layer].shape[-2] // 2, maps[layer].shape[-1] // 3
        (gradient,) = torch.autograd.grad(maps[layer][..., y, x].sum(), image, retain_graph=True)
        for pixels, span, cell in ((gradient.sum((0, 1, 3)), rows, y), (gradient.sum((0, 1, 2)), columns, x)):
            seen = pixels.nonzero()[:, 0]
            expected = (0, len(pixels) - 1) if span.everything else (span.first[cell], span.last[cell])
            assert (seen.min(), seen.max()) == expected, layer


@pytest.mark.parametrize("name", ["chain", "holes"])
def test_effective_field_fills_the_theoretical_one(name):
    model = positive(NETS[name]())
    size, stride, centre = receptive_field(model, "")
    support = effective_field(model, "", torch.rand(3, 90, 122)).nonzero()
    with torch.no_grad():
        cells = model(torch.zeros(1, 3, 90, 122)).shape[-2:]
    for axis in (0, 1):
        middle = centre + stride * (cells[axis] // 2)
        assert support[:, axis].min() == middle - (size - 1) / 2
        assert support[:, axis].max() == middle + (size - 1) / 2


def test_effective_field_lies_in_the_theoretical_one_and_leaves_no_trace():
    model = FCN(3, pad=1, width=1 / 16).train()
    nn.init.normal_(model.score_fr.weight)
    model.stage2.eval()
    seen = effective_field(model, "stage3", torch.rand(3, 96, 128))
    assert seen.shape == (96, 128)
    rows = seen.sum(1).nonzero()[:, 0]
    field = receptive_field(model, "stage3")
    assert 0 < rows[-1] - rows[0] + 1 <= field.size
    assert abs((rows[0] + rows[-1]) / 2 - (field.centre + field.stride * 12)) < 4
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and model.stage1.training and not model.stage2.training
    assert not any(module._forward_hooks for module in model.modules())


def test_kernels_that_are_not_square():
    model = nn.Sequential(nn.Conv2d(3, 2, (3, 7), (1, 2), (1, 3)))
    assert receptive_field(model, "0") == Field((3, 7), (1, 2), 0)


def test_upsampled_maps_have_fractional_strides():
    model = nn.Sequential(nn.Conv2d(3, 2, 2, 2), nn.Upsample(scale_factor=4), nn.Conv2d(2, 2, 1))
    assert receptive_field(model, "1").stride == 0.5
    assert receptive_field(model, "1").size == 2


def test_pooling_of_the_whole_map_sees_everything():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.near = nn.Conv2d(3, 4, 3, 2, 1)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.gate = nn.Linear(4, 4)
            self.out = nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, x):
            x = self.near(x)
            far = self.gate(self.pool(x).flatten(1))[:, :, None, None]
            return self.out(torch.cat([x, far.expand_as(x)], 1))

    fields = receptive_fields(Pooled(), ["near", "pool", "gate", "out"])
    assert fields["near"] == Field(3, 2, 0)
    assert fields["pool"] == Field(math.inf, None, None)
    assert fields["gate"] is None  # no map
    assert fields["out"] == Field(math.inf, 2, 0)


class Then(nn.Module):
    """A 3x3 convolution, then `call`."""

    def __init__(self, call):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.call = call

    def forward(self, x):
        return self.call(self.conv(x))


@pytest.mark.parametrize(
    ("call", "size"),
    [
        (lambda x: x.softmax(1), 3),
        (lambda x: x.mean(1, keepdim=True), 3),
        (lambda x: x.max(1).values[:, None], 3),
        (lambda x: x.argmax(1)[:, None], 3),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 3),
        (lambda x: F.normalize(x) + x.sigmoid() * x, 3),
        (lambda x: x.relu_().add_(1), 3),
        (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 4),
        (lambda x: torch.stack([x, torch.zeros_like(x)]).sum(0), 3),
        (lambda x: x.mean(3, keepdim=True).expand_as(x) + x, (3, math.inf)),
        (lambda x: F.instance_norm(x), math.inf),
        (lambda x: F.group_norm(x, 2), math.inf),
        (lambda x: x.softmax(2).softmax(3), math.inf),
        (lambda x: x * x.mean((2, 3))[:, :, None, None], math.inf),
        (lambda x: x.sum() + x, math.inf),
    ],
)
def test_operations(call, size):
    assert receptive_field(Then(call), "").size == size


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.roll(1, -1),
        lambda x: x.flip(2),
        lambda x: x.transpose(2, 3),
        lambda x: x.mean(3)[:, None],
        lambda x: x[:, :, 3][:, None],
        lambda x: x[..., 1:].relu_(),
        lambda x: x.flatten(2),
    ],
)
def test_an_operation_of_unknown_reach_is_an_error(call):
    with pytest.raises(NotImplementedError, match="the reach of aten"):
        receptive_field(Then(call), "")


def test_what_cannot_be_told_is_an_error():
    with pytest.raises(KeyError, match=r"no submodule 'stage9'; there are stage1, stage2"):
        receptive_field(FCN(2, width=1 / 16), "stage9")
    with pytest.raises(ValueError, match="inside an image of 64 x 64"):
        receptive_field(FCN(2, width=1 / 16), "fc7", (64, 64))
    with pytest.raises(ValueError, match="no fixed size"):
        receptive_field(nn.Sequential(nn.AdaptiveAvgPool2d(3)), "0")
    with pytest.raises(ValueError, match="one image"):
        effective_field(FCN(2, width=1 / 16), "stage1", torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match="must give a map"):
        effective_field(nn.Sequential(nn.Flatten()), "0", torch.rand(3, 8, 8))


def test_the_mode_is_kept_and_no_grad_is_left():
    model = FCN(2, width=1 / 16).train()
    model.dropout.eval()
    receptive_field(model, "fc7")
    assert model.training and model.stage1.training and not model.dropout.training
    assert not any(module._forward_hooks for module in model.modules())

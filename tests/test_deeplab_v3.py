"""DeepLab v3 against the paper and torchvision: counts, fields, rates, equal logits, output strides, valid weights."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import shaken
from torch import nn

import segedu as sg
from segedu.layers import FrozenBatchNorm, normalize
from segedu.models.deeplab_v3 import ASPP, first_phase, second_phase, valid_weights
from segedu.training import pixel_loss

R14 = {"depth": 14, "width": 1 / 8}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "arguments", "parameters"),
    [(21, {"depth": 50}, 39_048_533), (21, {}, 58_040_661), (19, {"depth": 50}, 39_048_019), (19, {}, 58_040_147),
     (21, {"output_stride": 8, "multi_grid": (1, 2, 1)}, 58_040_661),
     (21, {"depth": 50, "head": "torchvision"}, 39_638_869), (21, {"head": "torchvision"}, 58_630_997),
     (21, {"head": "cascade"}, 42_500_160 + 3 * 13_387_776 + 2048 * 21 + 21)],
)  # fmt: skip
def test_counts(classes, arguments, parameters):
    with torch.device("meta"):
        assert count(sg.DeepLabV3(classes, **arguments)) == parameters


def test_counts_of_the_aspp():
    with torch.device("meta"):
        aspp = sg.DeepLabV3(21).aspp
        assert count(aspp) == 15_535_104 and aspp.project[0].in_channels == 1280


@pytest.mark.parametrize(
    ("output_stride", "multi_grid", "rates"),
    [(16, (1, 2, 4), [2, 4, 8]), (8, (1, 2, 4), [4, 8, 16]), (16, (1, 1, 1), [2, 2, 2]), (32, (1, 2, 1), [1, 2, 1])],
)
def test_multi_grid(output_stride, multi_grid, rates):
    with torch.device("meta"):
        model = sg.DeepLabV3(21, depth=50, output_stride=output_stride, multi_grid=multi_grid)
    assert [block.conv2.dilation[0] for block in model.backbone.layer4] == rates
    assert [branch[0].dilation[0] for branch in model.aspp.convs[1:4]] == [r * 16 // output_stride for r in (6, 12, 18)]


@pytest.mark.parametrize(
    ("arguments", "layer4", "branches"),
    [({"depth": 50}, 715, [907, 1099, 1291]), ({}, 1259, [1451, 1643, 1835]),
     ({"depth": 50, "multi_grid": (1, 1, 1)}, 459, None), ({"multi_grid": (1, 1, 1)}, 1003, None),
     ({"depth": 50, "head": "torchvision"}, 427, None), ({"head": "torchvision"}, 971, None),
     ({"depth": 50, "output_stride": 8}, 715, [907, 1099, 1291])],
)  # fmt: skip
def test_fields(arguments, layer4, branches):
    """Those of stride 8 are those of 16, for layer3's first bottleneck keeps its rate; with 2 there it is 731."""
    with torch.device("meta"):
        model = sg.DeepLabV3(21, **arguments)
    size = (2560, 2560)
    assert sg.receptive_field(model, "backbone.layer4", size).size == layer4
    if branches:
        assert [sg.receptive_field(model, f"aspp.convs.{i}", size).size for i in (1, 2, 3)] == branches
    if arguments.get("output_stride") == 8:
        first = model.backbone.layer3[0].conv2
        first.dilation = first.padding = (2, 2)
        assert sg.receptive_field(model, "backbone.layer4", size).size == 731
        assert sg.receptive_field(model, "aspp.convs.1", size).size == 923


def test_fields_and_rates_of_the_cascade():
    with torch.device("meta"):
        model = sg.DeepLabV3(21, head="cascade")
    names = ["backbone.layer4", "blocks.block5", "blocks.block6", "blocks.block7"]
    fields = [sg.receptive_field(model, name, (6144, 6144)).size for name in names]
    assert fields == [1067, 1579, 2603, 4651]
    assert [[unit.conv2.dilation[0] for unit in stage] for stage in model.blocks] == [
        [4, 8, 4],
        [8, 16, 8],
        [16, 32, 16],
    ]


@pytest.mark.parametrize(("output_stride", "cells"), [(16, 33), (8, 65)])
def test_sizes_at_513(output_stride, cells):
    with torch.device("meta"):
        model = sg.DeepLabV3(21, depth=50, output_stride=output_stride).eval()
        images = torch.empty(1, 3, 513, 513)
        assert model.scores(images).shape == (1, 21, cells, cells) and model(images).shape == (1, 21, 513, 513)


@pytest.mark.parametrize(("depth", "aux"), [(50, True), (101, False)])
def test_logits_are_those_of_torchvision(depth, aux):
    torch.manual_seed(depth)
    make = getattr(torchvision.models.segmentation, f"deeplabv3_resnet{depth}")
    theirs = shaken(make(weights=None, weights_backbone=None, num_classes=21, aux_loss=aux)).double()
    ours = sg.DeepLabV3(21, depth=depth, head="torchvision").eval().double()
    sg.load_pretrained(ours, theirs.state_dict())
    images = torch.rand(1, 3, 111, 140).double()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # rates above the map's side: both have them
        expected = theirs(normalize(images))["out"]
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)


def test_wrong_weights_change_nothing():
    theirs = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None).state_dict()
    model = sg.DeepLabV3(21, head="torchvision", **R14)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not the weights of torchvision's DeepLab v3 with ResNet-14 at width=1"):
        sg.load_pretrained(model, theirs)
    with pytest.raises(ValueError, match="published for depth 50 and 101 and 21 classes, got 14 and 21"):
        sg.load_pretrained(model)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    for other in (sg.DeepLabV3(21, **R14), sg.FCN(21, width=1 / 16)):
        with pytest.raises(TypeError, match='head="torchvision"'):
            sg.load_pretrained(other, theirs)


def test_imagenet_weights_fit():
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    model = sg.DeepLabV3(2, depth=50)
    sg.load_imagenet(model, theirs)
    assert torch.equal(model.backbone.layer4[2].conv2.weight, theirs["layer4.2.conv2.weight"])


@pytest.fixture
def deep():
    """Three bottlenecks in layer3 and layer4, so that multi-grid counts; small and in double."""
    torch.manual_seed(0)
    model = shaken(sg.DeepLabV3(4, depth=50, rates=(1, 2, 3), image_pooling=False, width=1 / 16)).double()
    nn.init.normal_(model.score.weight)
    return model


@torch.no_grad()
def test_stride_8_subsampled_is_stride_16(deep):
    images = torch.rand(2, 3, 97, 129).double()
    dense = deep.at_stride(8)
    assert dense.aspp.rates == (2, 4, 6) and not dense.training
    torch.testing.assert_close(dense.scores(images)[..., ::2, ::2], deep.scores(images), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(deep.state_dict().values(), dense.state_dict().values(), strict=True))


@torch.no_grad()
def test_with_image_pooling_it_is_not():
    """The mean over four times as many cells is another number."""
    torch.manual_seed(0)
    model = shaken(sg.DeepLabV3(4, depth=50, rates=(1, 2, 3), width=1 / 16)).double()
    images = torch.rand(1, 3, 97, 129).double()
    names = ["aspp.convs.0", "aspp.convs.4"]
    with sg.record(model, names) as coarse:
        model.scores(images)
    dense = model.at_stride(8)
    with sg.record(dense, names) as fine:
        dense.scores(images)
    torch.testing.assert_close(fine[names[0]][..., ::2, ::2], coarse[names[0]])
    pooled, other = fine[names[1]], coarse[names[1]]
    assert (pooled == pooled[..., :1, :1]).all() and (other == other[..., :1, :1]).all()
    assert (pooled[..., 0, 0] - other[..., 0, 0]).abs().max() > 1e-4


def test_at_stride_of_the_defaults():
    with torch.device("meta"):
        assert sg.DeepLabV3(3, **R14).at_stride(8).aspp.rates == (12, 24, 36)
        assert sg.DeepLabV3(3, **R14).at_stride(32).aspp.rates == (3, 6, 9)
        with pytest.raises(ValueError, match="no whole numbers at 32"):
            sg.DeepLabV3(3, rates=(1, 2), **R14).at_stride(32)


def test_enlarged_scores_keep_the_grid_points(deep):
    images = torch.rand(1, 3, 70, 101).double()
    with torch.no_grad():
        torch.testing.assert_close(deep(images)[..., ::16, ::16], deep.scores(images))


def test_two_phases():
    torch.manual_seed(0)
    model = first_phase(sg.DeepLabV3(4, rates=(1, 2), **R14))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.0003}
    images, target = torch.rand(2, 3, 97, 97), torch.randint(0, 4, (2, 97, 97))
    before = model.backbone.bn1.running_mean.clone()
    pixel_loss(model.train(), images, target).backward()
    x = model.backbone.conv1(normalize(F.pad(images, (0, 0, 0, 0))))
    torch.testing.assert_close(model.backbone.bn1.running_mean, before * 0.9997 + 0.0003 * x.mean((0, 2, 3)))
    later = second_phase(model)
    assert later.output_stride == 8 and later.aspp.rates == (2, 4) and later.training
    kept = {name: buffer.clone() for name, buffer in later.named_buffers()}
    pixel_loss(later, images[:1], target[:1]).backward()  # one picture: batch norm is frozen
    assert len(kept) == 3 * len(norms) and all(torch.equal(kept[name], b) for name, b in later.named_buffers())
    still = {name for name, p in later.named_parameters() if p.grad is None}
    assert still == {f"{n}.{w}" for n, m in later.named_modules() if isinstance(m, FrozenBatchNorm) for w in ("weight", "bias")}  # fmt: skip


def test_loss_is_taken_on_whole_labels():
    torch.manual_seed(0)
    model = sg.DeepLabV3(4, rates=(1, 2), **R14).eval()
    images, target = torch.rand(1, 3, 60, 90), torch.randint(0, 4, (1, 60, 90))
    enlarged = F.interpolate(model.cells(images), (65, 97), mode="bilinear", align_corners=True)[..., :60, :90]
    torch.testing.assert_close(pixel_loss(model, images, target), F.cross_entropy(enlarged, target))


# Share of cells with 9, 6, 4, 2, 1 valid taps of a map of 65 x 65, and their mean over 9: facts, Sec. 1.5.
SHARES = {
    1: (0.980, [0.939, 0.060, 0.001, 0, 0]), 2: (0.959, [0.881, 0.116, 0.004, 0, 0]),
    6: (0.881, [0.665, 0.301, 0.034, 0, 0]), 12: (0.769, [0.398, 0.466, 0.136, 0, 0]),
    18: (0.665, [0.199, 0.494, 0.307, 0, 0]), 24: (0.568, [0.068, 0.386, 0.545, 0, 0]),
    32: (0.451, [0.0002, 0.030, 0.970, 0, 0]), 33: (0.438, [0, 0, 0.970, 0.030, 0.0002]),
    36: (0.398, [0, 0, 0.796, 0.192, 0.012]), 48: (0.258, [0, 0, 0.274, 0.499, 0.228]),
    60: (0.148, [0, 0, 0.024, 0.260, 0.716]), 64: (0.118, [0, 0, 0.001, 0.060, 0.939]), 65: (1 / 9, [0, 0, 0, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("rate", SHARES)
def test_valid_weights_of_figure_4(rate):
    taps = valid_weights(rate, 65)
    fraction, shares = SHARES[rate]
    assert taps.double().mean().item() / 9 == pytest.approx(fraction, abs=5.1e-4)
    found = [(taps == n).double().mean().item() for n in (9, 6, 4, 2, 1)]
    assert found == pytest.approx(shares, abs=1e-3)  # the table's last digit is rounded so that rows add up to 1
    assert taps.double().mean().item() == pytest.approx(((65 + 2 * max(65 - rate, 0)) / 65) ** 2)


@pytest.mark.parametrize(
    ("size", "rates", "fractions"),
    [(33, (6, 12, 18), (0.772, 0.574, 0.405)), (65, (12, 24, 36), (0.769, 0.568, 0.398)),
     (21, (6, 12, 18), (0.655, 0.383, 0.184)), (41, (6, 12, 18, 24), (0.814, 0.648, 0.500, 0.372)),
     (49, (6, 12, 18), (0.843, 0.700, 0.570)), (97, (12, 24, 36), (0.842, 0.697, 0.566))],
)  # fmt: skip
def test_valid_weights_of_other_maps(size, rates, fractions):
    assert [valid_weights(r, size).double().mean().item() / 9 for r in rates] == pytest.approx(fractions, abs=5.1e-4)


@pytest.mark.parametrize(("rate", "size"), list(itertools.product((1, 3, 6, 7, 12, 13), [(13, 13), (12, 7), (1, 5)])))
def test_valid_weights_are_what_a_convolution_of_ones_sees(rate, size):
    ones = torch.ones(1, 1, *size)
    seen = F.conv2d(ones, torch.ones(1, 1, 3, 3), padding=rate, dilation=rate)[0, 0]
    assert torch.equal(valid_weights(rate, size), seen.long())


@torch.no_grad()
@pytest.mark.parametrize("rate", [13, 24])
def test_rate_of_the_maps_side_is_the_1x1_of_the_middle(rate):
    torch.manual_seed(0)
    aspp = ASPP(8, 4, (rate, 12)).eval()
    conv, x = aspp.convs[1][0], torch.rand(2, 8, 13, 13)
    middle = F.conv2d(x, conv.weight[:, :, 1:2, 1:2])
    torch.testing.assert_close(conv(x), middle)
    other = aspp.convs[2][0]
    assert (other(x) - F.conv2d(x, other.weight[:, :, 1:2, 1:2])).abs().max() > 0.01  # rate 12 still sees corners


@torch.no_grad()
def test_aspp_by_hand():
    """Branches side by side in torchvision's order, then one 1x1."""
    torch.manual_seed(0)
    aspp = shaken(ASPP(8, 4, (1, 3)))
    x = torch.rand(2, 8, 9, 11)
    parts = [aspp.convs[0](x), aspp.convs[1](x), aspp.convs[2](x)]
    parts.append(F.relu(aspp.convs[3][2](aspp.convs[3][1](x.mean((2, 3), keepdim=True)))).expand(-1, -1, 9, 11))
    torch.testing.assert_close(aspp(x), aspp.project(torch.cat(parts, 1)))


def test_rates_too_wide_warn_once():
    model = sg.DeepLabV3(3, **R14).eval()
    with pytest.warns(UserWarning, match=r"rates \[6, 12, 18\] are too large for a map of 5 x 7 cells.*1x1 convolution") as seen:  # fmt: skip
        model(torch.rand(1, 3, 65, 97))
        model(torch.rand(1, 3, 65, 97))
    assert len(seen) == 1


@pytest.mark.parametrize("output_stride", [0, 4, 12, 64])
def test_other_output_strides(output_stride):
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32"):
        sg.DeepLabV3(3, output_stride=output_stride)


def test_one_picture_in_training():
    model = sg.DeepLabV3(3, rates=(1, 2), **R14)
    with pytest.raises(
        ValueError, match=r"image pooling leaves one value per picture.*got a batch of 1. Give at least 2"
    ):
        model(torch.rand(1, 3, 33, 33))
    assert model.eval()(torch.rand(1, 3, 33, 33)).shape == (1, 3, 33, 33)
    assert sg.DeepLabV3(3, rates=(1, 2), image_pooling=False, **R14)(torch.rand(1, 3, 33, 33)).shape == (1, 3, 33, 33)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"head": "fcn"}, "head must be one of paper, torchvision, cascade"), ({"depth": 18}, "depth must be one of"),
     ({"multi_grid": (1, 2)}, "three factors"), ({"rates": (0, 2)}, "rates must be at least 1"),
     ({"head": "cascade", "image_pooling": False}, "belong to the ASPP"), ({"num_classes": 0}, "num_classes must be")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.DeepLabV3(**{"num_classes": 3, **arguments})
    with pytest.raises(ValueError, match="rate and size must be at least 1"):
        valid_weights(0, 5)

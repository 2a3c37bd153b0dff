"""DeepLab v3+ against the paper and the release: counts, Xception, sizes, separable convolution, the decoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segedu as sg
from segedu.layers import separable_conv
from segedu.models.deeplab_v3 import valid_weights

R14 = {"backbone": "resnet14", "rates": (1, 2), "width": 1 / 8}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "arguments", "parameters"),
    [(21, {}, 59_344_309), (19, {}, 59_343_795), (21, {"backbone": "resnet50"}, 40_352_181),
     (19, {"backbone": "resnet50"}, 40_351_667), (21, {"backbone": "xception65"}, 41_055_413),
     (19, {"backbone": "xception65"}, 41_054_899), (19, {"backbone": "xception71"}, 43_477_323),
     (19, {"backbone": "xception71", "image_pooling": False}, 42_886_987)],
)  # fmt: skip
def test_counts(classes, arguments, parameters):
    with torch.device("meta"):
        assert count(sg.DeepLabV3Plus(classes, **arguments)) == parameters


def test_counts_of_the_parts():
    with torch.device("meta"):
        plain, separable = sg.DeepLabV3Plus(21), sg.DeepLabV3Plus(21, backbone="xception65")
        v3 = sg.DeepLabV3(21)
    assert sum(map(count, (plain.reduce, plain.decoder, plain.score))) == 1_309_045
    assert sum(map(count, (separable.reduce, separable.decoder, separable.score))) == 168_325
    assert (count(plain.aspp), count(separable.aspp)) == (15_535_104, 3_019_776)
    assert count(plain) - count(v3) == 1_303_648
    assert plain.reduce[0].weight.shape == (48, 256, 1, 1)
    assert [conv[0].weight.shape for conv in plain.decoder] == [(256, 304, 3, 3), (256, 256, 3, 3)]


@pytest.mark.parametrize(("depth", "parameters"), [(41, 24_920_560), (65, 37_867_312), (71, 40_289_736)])
def test_counts_of_xception(depth, parameters):
    with torch.device("meta"):
        assert count(sg.Xception(depth)) == parameters


@pytest.mark.parametrize("backbone", ["resnet101", "xception65", "xception71"])
@pytest.mark.parametrize(("output_stride", "cells"), [(16, 33), (8, 65)])
def test_sizes_at_513(backbone, output_stride, cells):
    with torch.device("meta"):
        model = sg.DeepLabV3Plus(21, backbone=backbone, output_stride=output_stride).eval()
        images = torch.empty(1, 3, 513, 513)
        with sg.record(model, ["aspp", "reduce", "decoder"]) as maps:
            assert model(images).shape == (1, 21, 513, 513) and model.scores(images).shape == (1, 21, 129, 129)
    sizes = {name: tuple(m.shape[1:]) for name, m in maps.items()}
    assert sizes == {"aspp": (256, cells, cells), "reduce": (48, 129, 129), "decoder": (256, 129, 129)}


def test_rates_of_xception():
    """Release: the unit whose stride goes keeps its rate, all after it get twice that."""
    with torch.device("meta"):
        for stride, middle, last in ((32, 1, 1), (16, 1, 2), (8, 2, 4)):
            net = sg.DeepLabV3Plus(21, backbone="xception65", output_stride=stride).backbone
            rates = [net.middle[0].conv1[0].dilation[0], net.exit1.conv3[0].dilation[0], net.exit2[0][0].dilation[0]]
            assert rates == [middle, middle, last]
            assert net.exit1.conv3[0].stride == net.exit1.downsample[0].stride == ((2, 2) if stride == 32 else (1, 1))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["xception41", "resnet50"])
def test_encoder_of_stride_8_subsampled_is_that_of_16(backbone):
    torch.manual_seed(0)
    model = sg.DeepLabV3Plus(3, backbone=backbone, rates=(1, 2), image_pooling=False, width=1 / 8).eval().double()
    dense = model.at_stride(8)
    images = torch.rand(1, 3, 97, 129).double()
    names = ["aspp", "reduce"]
    with sg.record(model, names) as coarse, sg.record(dense, names) as fine:
        model(images)
        dense(images)
    assert coarse["aspp"].std() > 1e-6
    torch.testing.assert_close(fine["aspp"][..., ::2, ::2], coarse["aspp"])
    torch.testing.assert_close(fine["reduce"], coarse["reduce"])


def test_order_of_relu_in_xception():
    """ReLU before each separable convolution; in the last block after 3x3 and 1x1 instead. Batch norm after each."""
    net = sg.Xception(41, width=1 / 16)
    kinds = [type(m).__name__ for m in net.middle[0].conv1]
    assert kinds == ["Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d"]
    assert [type(m).__name__ for m in net.exit2[0]] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    low, last = net.eval()(torch.randn(1, 3, 65, 65))
    assert low.min() < 0 and last.min() == 0  # the low-level map is taken before ReLU
    block, x = net.middle[0], torch.randn(1, 44, 9, 9).abs()
    for layer in (block.conv1, block.conv2, block.conv3):
        nn.init.zeros_(layer[-1].weight)
    assert torch.equal(block(x)[0], x)  # nothing but the shortcut is left


def test_separable_convolution_is_two_convolutions():
    """Weights 9 C_in + C_in C_out, and a 3x3 kernel of rank one over channels: each output's kernel is scaled alike."""
    layer = separable_conv(2048, 256)
    weights = sum(m.weight.numel() for m in layer if isinstance(m, nn.Conv2d))
    assert weights == 542_720 and weights / (9 * 2048 * 256) == pytest.approx(0.1150, abs=5e-5)
    torch.manual_seed(0)
    layer = separable_conv(6, 5, dilation=3, relu=False).eval().double()
    depthwise, pointwise = layer[0].weight, layer[2].weight
    full = pointwise * depthwise[:, 0][None]  # (5, 6, 1, 1) * (1, 6, 3, 3)
    x = torch.randn(2, 6, 13, 11).double()
    scale = 1 / (1 + 1e-5)  # two batch norms of mean 0 and variance 1
    torch.testing.assert_close(layer(x), F.conv2d(x, full, padding=3, dilation=3) * scale)


@torch.no_grad()
def test_depthwise_at_the_maps_side_scales_by_the_middle():
    layer = separable_conv(6, 5, dilation=13)[0]
    x = torch.randn(1, 6, 13, 13)
    torch.testing.assert_close(layer(x), x * layer.weight[:, 0, 1, 1].view(1, 6, 1, 1))
    assert (valid_weights(13, 13) == 1).all()


def test_field_of_a_separable_layer_is_that_of_a_plain_one():
    fields = []
    for separable in (False, True):
        with torch.device("meta"):
            model = sg.DeepLabV3Plus(3, backbone="resnet50", separable=separable, width=1 / 8)
        fields.append(sg.receptive_field(model, "aspp.convs.2", (2048, 2048)))
    assert fields[0] == fields[1] and fields[0].size == 1099


@torch.no_grad()
def test_decoder_by_hand():
    """ASPP's map four times as large beside the early map of 1/4, two 3x3 layers, scores, four times as large."""
    torch.manual_seed(0)
    model = sg.DeepLabV3Plus(3, **R14).eval()
    images = torch.rand(1, 3, 97, 129)
    with sg.record(model, ["aspp", "backbone.layer1", "score"]) as maps:
        logits = model(images)
    up = F.interpolate(maps["aspp"], (25, 33), mode="bilinear", align_corners=True)
    scores = model.score(model.decoder(torch.cat([up, model.reduce(maps["backbone.layer1"])], 1)))
    torch.testing.assert_close(scores, maps["score"])
    torch.testing.assert_close(logits[..., ::4, ::4], scores)
    torch.testing.assert_close(model.scores(images), scores)
    torch.testing.assert_close(logits, F.interpolate(scores, (97, 129), mode="bilinear", align_corners=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"backbone": "vgg16"}, "backbone must be one of resnet14"), ({"output_stride": 4}, "output_stride must be 8, 16"),
     ({"rates": (0,)}, "rates must be at least 1"), ({"num_classes": 0}, "num_classes must be at least 1")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.DeepLabV3Plus(**{"num_classes": 3, **arguments})
    with pytest.raises(ValueError, match="depth must be one of 41, 65, 71, got 50"):
        sg.Xception(50)
    with pytest.raises(ValueError, match="got a batch of 1"):
        sg.DeepLabV3Plus(3, **R14)(torch.rand(1, 3, 33, 33))
    with pytest.raises(TypeError, match="needs a ResNet or a VGG16 trunk"):
        sg.load_imagenet(sg.DeepLabV3Plus(3, backbone="xception41", width=1 / 16), {})

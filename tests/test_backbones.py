"""ResNet and dilate against torchvision, and the exact equality of dense and strided maps with its conditions."""

import copy

import pytest
import torch
import torchvision
from conftest import shaken
from torch import nn

import segedu as sg
from segedu.backbones import decimated


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def error(a, b):
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def maps(resnet):
    """A torchvision ResNet up to layer4."""
    return nn.Sequential(*list(resnet.children())[:-2])


def test_resnet_is_that_of_torchvision():
    theirs = shaken(torchvision.models.resnet50(weights=None))
    ours = sg.ResNet(50).eval()
    sg.load_imagenet(ours, theirs.state_dict())
    image = torch.randn(1, 3, 65, 90)
    with torch.no_grad():
        assert error(ours(image)[-1], maps(theirs)(image)) < 1e-12


@pytest.mark.parametrize(("depth", "count"), [(50, 23_508_032), (101, 42_500_160), (152, 58_143_808)])
def test_resnet_counts(depth, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in sg.ResNet(depth).parameters()) == count


@pytest.mark.parametrize(
    ("depth", "stride_on", "sizes"),
    [(50, "3x3", [35, 91, 267, 427]), (101, "3x3", [35, 91, 811, 971]), (152, "3x3", [35, 155, 1291, 1451]),
     (50, "1x1", [483]), (101, "1x1", [1027]), (152, "1x1", [1507])],
)  # fmt: skip
def test_resnet_fields(depth, stride_on, sizes):
    with torch.device("meta"):
        net = sg.ResNet(depth, stride_on=stride_on)
    names = [f"layer{i}" for i in range(5 - len(sizes), 5)]
    assert [sg.receptive_field(net, name, (2560, 2560)).size for name in names] == sizes


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilate_is_that_of_torchvision(output_stride):
    """Stride, dilation and padding of each layer, and layer4's field, which stays as it was."""
    with torch.device("meta"):
        ours = sg.dilate(sg.ResNet(50), output_stride)
        which = [False, output_stride == 8, True]
        theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=which)
        assert sg.receptive_field(ours, "layer4", (1024, 1024)) == (427, output_stride, 0)
    theirs = {name: m for name, m in theirs.named_modules() if isinstance(m, nn.Conv2d)}
    ours = {name: m for name, m in ours.named_modules() if isinstance(m, nn.Conv2d)}
    assert ours.keys() == theirs.keys()
    for name, conv in ours.items():
        assert (conv.stride, conv.padding) == (theirs[name].stride, theirs[name].padding), name
        if conv.kernel_size == (3, 3):
            assert conv.dilation == theirs[name].dilation, name


@pytest.mark.parametrize("side", [64, 65, 90])
@pytest.mark.parametrize("output_stride", [16, 8, 4])
@pytest.mark.parametrize("stride_on", ["3x3", "1x1"])
def test_dense_resnet_subsampled_is_the_strided_one(stride_on, output_stride, side):
    strided = shaken(sg.ResNet(14, stride_on=stride_on, width=1 / 4))
    dense, step = sg.dilate(copy.deepcopy(strided), output_stride), 32 // output_stride
    image = torch.randn(1, 3, side, side + 7)
    with torch.no_grad():
        assert error(dense(image)[-1][..., ::step, ::step], strided(image)[-1]) < 1e-12


@pytest.mark.parametrize("side", [96, 101, 129])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_dense_vgg_subsampled_is_the_strided_one(output_stride, side):
    strided = torchvision.models.vgg16(weights=None).features
    dense, step = sg.dilate(copy.deepcopy(strided), output_stride), 32 // output_stride
    image = torch.randn(1, 3, side, side + 6)
    with torch.no_grad():
        assert error(dense(image)[..., ::step, ::step], strided(image)) < 1e-12


def test_where_the_equality_fails():
    """A stride-1 pool5 that is not dilated (DeepLab v1's), and a first block that is dilated too (semseg's)."""
    strided = torchvision.models.vgg16(weights=None).features
    dense = sg.dilate(copy.deepcopy(strided), 8)
    dense[30].dilation = (1, 1)
    dense.append(nn.ConstantPad2d((0, 1, 0, 1), 0))  # pool5 then loses one cell, not two
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        got, wanted = dense(image)[..., :11, :11][..., ::4, ::4], strided(image)
        assert error(got, wanted) > 0.01

    strided = shaken(sg.ResNet(14, width=1 / 4))
    dense = sg.dilate(copy.deepcopy(strided), 8)
    for layer, rate in ((dense.layer3, 2), (dense.layer4, 4)):
        layer[0].conv2.dilation = layer[0].conv2.padding = (rate, rate)
    with torch.no_grad():
        assert error(dense(image)[-1][..., ::4, ::4], strided(image)[-1]) > 0.01


def test_convolution_that_pads_by_name_and_even_strides():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 5, padding="same"))
    dense = sg.dilate(copy.deepcopy(chain), 1)
    assert dense[1].dilation == (2, 2) and dense[1].padding == "same"
    image = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        assert error(dense(image)[..., ::2, ::2], chain(image)) < 1e-12


@pytest.mark.parametrize(
    ("model", "output_stride", "message"),
    [
        (lambda: sg.FCN(5, width=1 / 16), 8, "total stride of 1"),
        (lambda: sg.UNet(5, width=1 / 16), 0, "up4 .ConvTranspose2d. cannot be dilated"),
        (
            lambda: sg.ResNet(14, width=1 / 8),
            3,
            "maxpool takes the stride from 2 to 4, over 3; output_stride can be 2 or 4",
        ),
        (lambda: sg.ResNet(14, width=1 / 8), 64, "total stride of 32"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.AvgPool2d(2)), 1, "1 .AvgPool2d. cannot be dilated"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, stride=(2, 1))), 1, "stride of 2 x 1"),
        (lambda: nn.Sequential(*[nn.MaxPool2d(2)] * 2), 2, "1 is a module that stands in the chain twice"),
        (lambda: nn.Sequential(*(nn.MaxPool2d(3, 2, 1) for _ in range(2))), 1, "1 needs a padding of 2 at rate 2"),
    ],
)
def test_stride_in_the_wrong_place(model, output_stride, message):
    net = model()
    before = str(net)
    with pytest.raises(ValueError, match=message):
        sg.dilate(net, output_stride)
    assert str(net) == before


def test_decimated_takes_every_nth():
    weight = torch.arange(8 * 2 * 7 * 7.0).view(8, 2, 7, 7)
    assert torch.equal(decimated(weight, (2, 2, 3, 3)), weight[::4][:, :, ::3, ::3])
    assert torch.equal(decimated(weight, (8, 2, 4, 4)), weight[:, :, ::2, ::2])
    assert decimated(weight, (8, 2, 7, 7)) is weight
    assert decimated(weight, (3, 2, 7, 7)).shape[0] == 8  # 8 / 3 is no step: left as it is, and refused by its size


def test_wrong_weights_change_nothing():
    net = sg.ResNet(14, width=1 / 8)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="not the weights of a ResNet-14"):
        sg.load_imagenet(net, torchvision.models.resnet50(weights=None).state_dict())
    with pytest.raises(ValueError, match="no published weights"):
        sg.load_imagenet(net)
    with pytest.raises(ValueError, match='stride_on="3x3"'):
        sg.load_imagenet(sg.ResNet(14, stride_on="1x1", width=1 / 8), {})
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())


def test_deep_stem():
    """Three 3x3, 64, 64 and 128 channels, stride 4 with the pool, 15 pixels seen where the 7x7 has 11 (facts of semseg)."""
    with torch.device("meta"):
        deep, plain = sg.ResNet(50, stem="deep"), sg.ResNet(50)
    assert sum(p.numel() for p in deep.parameters()) == 23_631_808
    assert [sg.receptive_field(net, "maxpool", (224, 224)).size for net in (deep, plain)] == [15, 11]
    assert sg.receptive_field(deep, "maxpool", (224, 224)).stride == 4
    torch.manual_seed(0)
    net = sg.ResNet(14, stem="deep", width=1 / 4)
    maps, dense = net.eval()(x := torch.rand(1, 3, 97, 129)), sg.dilate(net, 8)(x)
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512]
    torch.testing.assert_close(dense[3][..., ::4, ::4], maps[3])
    with pytest.raises(ValueError, match='stem must be "7x7"'):
        sg.ResNet(50, stem="3x3")
    with pytest.raises(ValueError, match='stem="7x7"'):
        sg.load_imagenet(sg.ResNet(50, stem="deep"), {})


def test_bad_arguments():
    with pytest.raises(ValueError, match="depth must be one of 14, 50, 101, 152, got 18"):
        sg.ResNet(18)
    with pytest.raises(ValueError, match="stride_on must be"):
        sg.ResNet(50, stride_on="2x2")

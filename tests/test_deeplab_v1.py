"""DeepLab v1 against the paper and the released prototxts: counts, fields, sizes, and the two forms of MSc."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import segedu as sg
from segedu.layers import coarse_loss, enlarged, freeze


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [({}, 20_505_429), ({"multiscale": True}, 21_711_550), ({"kernel": 7, "dilation": 4}, 134_346_581),
     ({"kernel": 4, "dilation": 4}, 65_140_565), ({"kernel": 4, "dilation": 8}, 65_140_565),
     ({"kernel": 4, "dilation": 4, "multiscale": True}, 66_346_686)],
)  # fmt: skip
def test_counts(arguments, parameters):
    with torch.device("meta"):
        assert count(sg.DeepLabV1(21, **arguments)) == parameters


def test_counts_of_the_branches():
    with torch.device("meta"):
        branches = sg.DeepLabV1(21, multiscale=True).branches
    assert [count(branch) for branch in branches] == [22_805, 93_077, 166_805, 314_261, 609_173]


def test_fields_of_the_released_net():
    with torch.device("meta"):
        model = sg.DeepLabV1(21)
    names = ["stage4", "stage5", "fc6"]
    assert [sg.receptive_field(model, name, (1024, 1024)).size for name in names] == [99, 211, 435]
    assert sg.receptive_field(model, "fc6", (1024, 1024)) == (435, 8, 0)


@pytest.mark.parametrize(("kernel", "dilation"), [(7, 4), (4, 8), (3, 12)])
def test_three_kernels_span_25_cells(kernel, dilation):
    with torch.device("meta"):
        model = sg.DeepLabV1(21, kernel=kernel, dilation=dilation)
        assert sg.receptive_field(model, "fc6", (1024, 1024)).size == 435
    assert dilation * (kernel - 1) + 1 == 25


def test_even_kernel_of_odd_reach_keeps_the_size():
    model = sg.DeepLabV1(3, kernel=4, dilation=1, width=1 / 16)
    assert model(torch.rand(1, 3, 40, 50)).shape == (1, 3, 40, 50)


@pytest.mark.parametrize(("side", "cells"), [(321, 41), (513, 65), (306, 39), (8, 1), (9, 2)])
def test_sizes(side, cells):
    with torch.device("meta"):
        model = sg.DeepLabV1(5, multiscale=True)
        images = torch.empty(1, 3, side, side)
        assert model.scores(images).shape == (1, 5, cells, cells) and model(images).shape == (1, 5, side, side)


def test_strides_and_rates_of_the_prototxt():
    model = sg.DeepLabV1(3, width=1 / 16)
    assert {m.dilation for m in model.stage5 if isinstance(m, nn.Conv2d)} == {(2, 2)}
    assert model.fc6.dilation == (12, 12)
    x = torch.rand(1, 32, 9, 9)
    padded = F.conv2d(x, model.fc6.weight, model.fc6.bias, padding=12, dilation=12)
    torch.testing.assert_close(model.fc6(x), padded)
    with sg.record(model, ["stage1", "stage2", "stage3", "stage4", "stage5"]) as maps:
        model(torch.rand(1, 3, 65, 65))
    assert [m.shape[-1] for m in maps.values()] == [65, 33, 17, 9, 9]  # three halvings, pool4 and pool5 keep the size


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = sg.DeepLabV1(4, multiscale=True, width=1 / 16).eval().double()
    for layer in (model.score, *(branch.score for branch in model.branches)):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return model


@pytest.mark.parametrize("size", [(65, 97), (60, 101)])
def test_both_forms_of_msc_agree_on_every_eighth_pixel(model, size):
    """Test: stride-1 branches, scores enlarged 1, 2, 4, 8, 8 times. Training: strides 8, 4, 2, 1, 1."""
    images = torch.rand(2, 3, *size).double()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[..., ::8, ::8], model.scores(images), rtol=1e-12, atol=1e-12)


def test_sum_of_scores_is_one_layer_on_all_features(model):
    """Six 1x1 layers summed = one 1x1 layer on their inputs side by side, the biases summed."""
    images, layers = torch.rand(1, 3, 33, 33).double(), [model.score, *(branch.score for branch in model.branches)]
    inputs = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        summed = model.scores(images)
        weight, bias = torch.cat([layer.weight for layer in layers], 1), sum(layer.bias for layer in layers)
        torch.testing.assert_close(F.conv2d(torch.cat(inputs, 1), weight, bias), summed)
    assert weight.shape[1] == 64 + 5 * 8  # 1024 and 5 x 128 at full width: 1664


def test_enlarging_keeps_the_grid_points():
    x = torch.rand(1, 2, 65, 65)
    big = enlarged(x, 8)
    assert big.shape[-1] == 513
    torch.testing.assert_close(big[..., ::8, ::8], x)


def test_fc6_of_rate_12_is_a_25_x_25_kernel(model):
    x, spread = torch.randn(1, 32, 30, 30).double(), torch.zeros(64, 32, 25, 25).double()
    spread[:, :, ::12, ::12] = model.fc6.weight.data
    with torch.no_grad():
        torch.testing.assert_close(F.conv2d(x, spread, model.fc6.bias, padding=12), model.fc6(x))


def test_stage_of_msc_trains_branches_and_score_only(model):
    freeze(model.stage1, model.stage2, model.stage3, model.stage4, model.stage5, model.fc6, model.fc7)
    target = torch.randint(0, 4, (1, 33, 33))
    coarse_loss(model, torch.rand(1, 3, 33, 33).double(), target).backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"score", "branches"}


@pytest.mark.parametrize(
    ("kernel", "dilation", "step", "channels"), [(7, 4, 1, 4096), (4, 8, 2, 4096), (3, 12, 3, 1024)]
)
def test_fc6_is_decimated(kernel, dilation, step, channels):
    theirs = torchvision.models.vgg16(weights=None)
    model = sg.DeepLabV1(2, kernel=kernel, dilation=dilation)
    sg.load_imagenet(model, theirs.state_dict())
    every = 4096 // channels
    wanted = theirs.classifier[0].weight.view(4096, 512, 7, 7)[::every, :, ::step, ::step]
    assert torch.equal(model.fc6.weight, wanted)
    assert torch.equal(model.fc7.weight[:, :, 0, 0], theirs.classifier[3].weight[::every, ::every])
    assert torch.equal(model.fc7.bias, theirs.classifier[3].bias[::every])


def test_bad_input():
    with pytest.raises(ValueError, match="kernel must be 3, 4 or 7"):
        sg.DeepLabV1(3, kernel=5)
    with pytest.raises(ValueError, match="dilation at least 1"):
        sg.DeepLabV1(3, dilation=0)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        sg.DeepLabV1(0)

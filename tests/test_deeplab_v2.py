"""DeepLab v2 against the paper and kazuto's port: counts, sizes, fields, the sum of ASPP, the scales of MSC."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import segedu as sg
from segedu.layers import FrozenBatchNorm, freeze_batch_norm
from segedu.models.deeplab_v2 import MultiScale, multiscale_loss

R14 = {"backbone": "resnet14", "width": 1 / 8}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "arguments", "parameters"),
    [(21, {}, 44_048_532), (19, {}, 43_901_068), (150, {}, 53_559_960), (21, {"rates": (12,)}, 42_887_253),
     (21, {"rates": (2, 4, 8, 12)}, 44_048_532), (21, {"backbone": "vgg16"}, 37_877_652),
     (19, {"backbone": "vgg16"}, 37_869_452)],
)  # fmt: skip
def test_counts(classes, arguments, parameters):
    with torch.device("meta"):
        assert count(sg.DeepLabV2(classes, **arguments)) == parameters


def test_batch_norm_inside_resnet_101():
    with torch.device("meta"):
        model = sg.DeepLabV2(21)
    assert sum(count(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)) == 105_344


@pytest.mark.parametrize(
    ("backbone", "rates", "fields"),
    [("resnet101", (6, 12, 18, 24), [1123, 1219, 1315, 1411]), ("vgg16", (2, 4, 8, 12), [275, 307, 371, 435]),
     ("vgg16", (6, 12, 18, 24), [339, 435, 531, 627])],
)  # fmt: skip
def test_fields(backbone, rates, fields):
    with torch.device("meta"):
        model = sg.DeepLabV2(21, backbone=backbone, rates=rates)
    seen = [sg.receptive_field(model, f"aspp.{i}", (2560, 2560)) for i in range(4)]
    assert [field.size for field in seen] == fields and {field.stride for field in seen} == {8}


@pytest.mark.parametrize("backbone", ["resnet101", "vgg16"])
@pytest.mark.parametrize(("side", "cells"), [(321, 41), (513, 65), (384, 48), (256, 32)])
def test_sizes(backbone, side, cells):
    with torch.device("meta"):
        model = sg.DeepLabV2(5, backbone=backbone)
        images = torch.empty(1, 3, side, side)
        assert model.scores(images).shape == (1, 5, cells, cells) and model(images).shape == (1, 5, side, side)


def test_stride_stands_on_the_1x1_and_rates_follow():
    with torch.device("meta"):
        net = sg.DeepLabV2(21).backbone
    assert {block.conv2.dilation for block in net.layer3} == {(2, 2)}
    assert {block.conv2.dilation for block in net.layer4} == {(4, 4)}
    assert net.layer2[0].conv1.stride == (2, 2) and net.layer2[0].conv2.stride == (1, 1)


@pytest.mark.parametrize("backbone", ["resnet14", "vgg16"])
def test_aspp_is_the_sum_of_its_branches(backbone):
    torch.manual_seed(0)
    model = sg.DeepLabV2(4, backbone=backbone, rates=(1, 2, 3), width=1 / 16).eval().double()
    images = torch.rand(1, 3, 65, 97).double()
    with torch.no_grad(), sg.record(model, [f"aspp.{i}" for i in range(3)]) as maps:
        torch.testing.assert_close(model.scores(images), sum(maps.values()))
        alone = sg.DeepLabV2(4, backbone=backbone, rates=(2,), width=1 / 16).eval().double()
        alone.backbone.load_state_dict(model.backbone.state_dict())
        alone.aspp[0].load_state_dict(model.aspp[1].state_dict())
        for i in (0, 2):
            nn.init.zeros_(model.aspp[i].score.weight)
        torch.testing.assert_close(model(images), alone(images))


def test_enlarged_scores_keep_the_grid_points():
    model = sg.DeepLabV2(3, rates=(1, 2), **R14).eval()
    images = torch.rand(1, 3, 65, 90)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[..., ::8, ::8], model.scores(images))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return sg.DeepLabV2(4, rates=(1, 2), **R14).eval().double()


@pytest.mark.parametrize(("side", "sides"), [(321, [41, 21, 31, 41]), (513, [65, 33, 49, 65])])
def test_multi_scale_has_the_maps_of_the_port(side, sides):
    with torch.device("meta"):
        maps = MultiScale(sg.DeepLabV2(21, rates=(6, 12))).eval().maps(torch.empty(1, 3, side, side))
    assert [m.shape[-1] for m in maps] == sides


@torch.no_grad()
def test_multi_scale_is_the_largest_of_three_scores(net):
    images = torch.rand(2, 3, 97, 129).double()
    whole, half, most, largest = MultiScale(net).maps(images)
    torch.testing.assert_close(whole, net.scores(images))
    for scores in (whole, half, most):
        same = F.interpolate(scores, whole.shape[-2:], mode="bilinear", align_corners=True)
        assert (largest >= same).all()
    torch.testing.assert_close(half, net.scores(images[..., ::2, ::2]))  # cells of scale 1/2 lie on every second pixel
    assert (largest[..., ::2, ::2] >= half).all()
    torch.testing.assert_close(MultiScale(net)(images)[..., ::8, ::8], largest)


def test_cost_of_the_scales():
    work = []
    with torch.device("meta"):
        net = sg.DeepLabV2(4, **R14).eval()
        for model in (net, MultiScale(net)):
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, 1025, 1025))
            work.append(counter.get_total_flops())
    assert count(MultiScale(net)) == count(net)
    assert work[1] / work[0] == pytest.approx(1 + 0.5**2 + 0.75**2, rel=0.01)  # 1.8125 times the pixels


def test_multi_scale_loss_by_hand(net):
    images, target = torch.rand(2, 3, 97, 129).double(), torch.randint(0, 4, (2, 97, 129))
    target[:, :40] = 255
    model = MultiScale(net)
    whole, half, most, largest = model.maps(images)
    expected = sum(
        F.cross_entropy(scores, labels, ignore_index=255)
        for scores, labels in (
            (whole, target[:, ::8, ::8]), (half, target[:, ::16, ::16]), (largest, target[:, ::8, ::8]),
            (most, target[:, [0, 11, 21, 32, 43, 53, 64, 75, 85, 96]][:, :, [0, 11, 21, 32, 43, 53, 64, 75, 85, 96, 107, 117, 128]]),
        )
    )  # fmt: skip
    torch.testing.assert_close(multiscale_loss(model, images, target), expected)
    nothing = multiscale_loss(model, images, torch.full_like(target, 255))
    assert nothing == 0
    odd = multiscale_loss(model, images[..., :70, :101], target[:, :70, :101])
    assert odd.isfinite()


def test_frozen_batch_norm_stays(net):
    """As torch's batch norm in evaluation mode; nothing moves in a training step, not even with a single picture."""
    images = torch.rand(1, 3, 65, 65).double()
    before = net(images)
    frozen = freeze_batch_norm(copy.deepcopy(net)).train()
    torch.testing.assert_close(frozen(images), before)
    frozen(images).square().mean().backward()
    norms = [m for m in frozen.modules() if isinstance(m, FrozenBatchNorm)]
    assert len(norms) == 17 and all(p.grad is None for m in norms for p in m.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), frozen.buffers(), strict=True))
    net.load_state_dict(frozen.state_dict())
    learns = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    assert learns == count(net) - sum(2 * m.weight.numel() for m in norms)


def test_learning_rates_1_10_20():
    """One step of gradient 1 on all weights: the trunk moves by lr, ASPP's weights by 10 lr, its biases by 20 lr."""
    recipe = sg.recipes.DEEPLAB_V2
    assert (recipe.score_lr, recipe.score_lr * recipe.bias_lr) == (10, 20)
    assert recipe.lr_at(10_000) == pytest.approx(1.339717e-4, rel=1e-6)
    model = freeze_batch_norm(sg.DeepLabV2(11, rates=(2, 4), **R14))
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = sg.recipes.Recipe(steps=1, batch=1, lr=1e-3, momentum=0.0, bias_lr=2.0, score_lr=10.0)
    sg.fit(model, sg.Toytown("train", size=1), step, loss=lambda net, images, target: sum(p.sum() for p in net.parameters()),
           device="cpu", progress=False)  # fmt: skip
    moved = {name: (before[name] - p).mean().item() for name, p in model.named_parameters()}
    for name, distance in moved.items():
        factor = (
            0 if ".bn" in name or "downsample.1" in name else 1 if "backbone" in name else 20 if "bias" in name else 10
        )
        assert distance == pytest.approx(factor * 1e-3, abs=1e-6), name


def test_poly():
    """lr (1 - k / K)^0.9, by the table of the facts."""
    recipe = sg.recipes.Recipe(steps=30_000, batch=1, lr=0.007, power=0.9)
    steps = {0: 0.007, 3000: 0.00636673, 15_000: 0.00375121, 27_000: 0.000881248, 29_999: 6.5417e-7}
    assert {k: pytest.approx(recipe.lr_at(k), rel=1e-5) for k in steps} == steps


def test_imagenet_weights_of_vgg16_reach_all_branches():
    theirs = torchvision.models.vgg16(weights=None)
    model = sg.DeepLabV2(2, backbone="vgg16", rates=(6, 12))
    sg.load_imagenet(model, theirs.state_dict())
    assert torch.equal(model.backbone.stage5[4].weight, theirs.features[28].weight)
    for branch in model.aspp:
        assert torch.equal(branch.fc6.weight, theirs.classifier[0].weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3])
        assert torch.equal(branch.fc7.weight[:, :, 0, 0], theirs.classifier[3].weight[::4, ::4])


def test_imagenet_weights_of_resnet_need_the_stride_on_the_3x3():
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    with pytest.raises(ValueError, match='stride_on="3x3"'):
        sg.load_imagenet(sg.DeepLabV2(2, backbone="resnet50"), theirs)
    model = sg.DeepLabV2(2, backbone="resnet50", stride_on="3x3")
    sg.load_imagenet(model, theirs)
    assert torch.equal(model.backbone.layer4[2].conv3.weight, theirs["layer4.2.conv3.weight"])


def test_rates_too_wide_warn_once():
    model = sg.DeepLabV2(3, rates=(6, 12), **R14).eval()
    with pytest.warns(
        UserWarning, match=r"rates \[12\] are too large for a map of 9 x 13 cells.*1x1 convolution"
    ) as seen:
        model(torch.rand(1, 3, 65, 97))
        model(torch.rand(1, 3, 65, 97))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"backbone": "resnet18"}, "backbone must be one of vgg16, resnet14, resnet50"), ({"rates": ()}, "one or more"),
     ({"rates": (0, 2)}, "at least 1"), ({"num_classes": 0}, "num_classes must be at least 1")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.DeepLabV2(**{"num_classes": 3, **arguments})

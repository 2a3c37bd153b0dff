"""FCN against the paper, the release and torchvision (facts: prototxts and score.py of the FCN release)."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segedu as sg
from segedu.layers import BilinearUpsampling, bilinear_kernel
from segedu.models import fcn


def learnable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- the paper: counts, sizes, fields (meta device)


@pytest.mark.parametrize(
    ("classes", "stride", "count"),
    [
        (21, 32, 134_346_581), (21, 16, 134_357_354), (21, 8, 134_362_751),
        (60, 32, 134_506_364), (60, 16, 134_537_144), (60, 8, 134_552_564),
        (11, 32, 134_305_611), (11, 16, 134_311_254), (11, 8, 134_314_081),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_release(classes, stride, count):
    with torch.device("meta"):
        assert learnable(sg.FCN(classes, stride=stride)) == count


def test_parameter_count_of_the_cvpr_text_with_learned_upsampling():
    with torch.device("meta"):
        assert learnable(sg.FCN(21, learn_upsampling=True)) == 134_376_884


def test_fully_connected_layers_hold_89_percent():
    with torch.device("meta"):
        model = sg.FCN(21, stride=32)
    share = learnable(nn.ModuleList([model.fc6, model.fc7])) / learnable(model)
    assert round(share, 3) == 0.890


@pytest.mark.parametrize(("height", "cells"), [(500, 16), (375, 12), (224, 8)])
def test_coarse_map_has_the_release_size(height, cells):
    with torch.device("meta"):
        model = sg.FCN(21, stride=32)
        with sg.record(model, ["score_fr", "upscore"]) as maps:
            model(torch.empty(1, 3, height, height))
    assert maps["score_fr"].shape[-1] == cells == math.ceil((height + 198) / 32) - 6
    assert maps["upscore"].shape[-1] == 32 * cells + 32


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("pad", [1, 100])
def test_output_is_as_large_as_the_input_for_every_size(stride, pad):
    with torch.device("meta"):
        model = sg.FCN(5, stride=stride, pad=pad, width=1 / 16)
        for height in (1, 13, *range(32, 65)):
            assert model(torch.empty(1, 3, height, 47)).shape == (1, 5, height, 47)


@pytest.mark.parametrize(
    ("name", "size", "stride", "centre"),
    [("score_pool3", 44, 8, -95.5), ("score_pool4", 100, 16, -91.5), ("fc6", 404, 32, 12.5), ("fc7", 404, 32, 12.5)],
)
def test_receptive_fields_of_the_release(name, size, stride, centre):
    with torch.device("meta"):
        model = sg.FCN(21)
    found = sg.receptive_field(model, name)
    assert (found.size, found.stride, found.centre) == (size, stride, centre)


@pytest.mark.parametrize("pad", [1, 100])
def test_crop_offsets_follow_from_the_centres_of_the_cells(pad):
    """Facts 1.3: a transposed convolution of kernel k moves the centre of cell 0 by -(k - 1) / 2 new strides."""
    with torch.device("meta"):
        model = sg.FCN(2, pad=pad, width=1 / 16)
    fc7, pool4, pool3 = (sg.receptive_field(model, n).centre for n in ("fc7", "score_pool4", "score_pool3"))
    offsets = fcn.OFFSETS[pad]
    assert offsets["32s"] == -(fc7 - 31.5)
    two = fc7 - 1.5 * 16
    fused = two if pad == 100 else pool4
    assert offsets["pool4"] == abs(two - pool4) / 16
    assert offsets["16s"] == -(fused - 15.5)
    four = fused - 1.5 * 8
    assert offsets["pool3"] == abs(four - pool3) / 8
    assert offsets["8s"] == -((four if pad == 100 else pool3) - 7.5)


# ---- bilinear upsampling


def test_bilinear_taps_of_the_release():
    assert (bilinear_kernel(4).sum(0) / 2).tolist() == [0.25, 0.75, 0.75, 0.25]
    taps = bilinear_kernel(16)[7] / bilinear_kernel(16)[7].max()
    assert torch.allclose(taps, torch.tensor([1, 3, 5, 7, 9, 11, 13, 15, 15, 13, 11, 9, 7, 5, 3, 1.0]) / 15)
    assert bilinear_kernel(64).sum() == 1024 and bilinear_kernel(63).sum() == 1024


@pytest.mark.parametrize("factor", [2, 8, 16, 32])
def test_transposed_convolution_is_bilinear_interpolation(factor):
    """Facts 1.8 item 5: even kernels equal align_corners=False inside, odd ones align_corners=True everywhere."""
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    ours = BilinearUpsampling(2, 2 * factor, factor).double()(x)[
        ..., factor // 2 : -(factor // 2), factor // 2 : -(factor // 2)
    ]
    theirs = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    ring = factor // 2
    torch.testing.assert_close(ours[..., ring:-ring, ring:-ring], theirs[..., ring:-ring, ring:-ring])
    odd = BilinearUpsampling(2, 2 * factor - 1, factor).double()(x)[
        ..., factor - 1 : 1 - factor, factor - 1 : 1 - factor
    ]
    size = ((5 - 1) * factor + 1, (6 - 1) * factor + 1)
    torch.testing.assert_close(odd, F.interpolate(x, size=size, mode="bilinear", align_corners=True))


def test_border_of_the_release_is_attenuated():
    """Facts 1.3: weights sum to less than 1 in the first 13 pixels of FCN-32s; the least is 0.371, at the corner."""
    weights = BilinearUpsampling(1, 64, 32)(torch.ones(1, 1, 16, 16))[0, 0, 19 : 19 + 500, 19 : 19 + 500]
    row = weights[250]
    assert (row[:13] < 1).all() and torch.allclose(row[13:485], torch.ones(472))
    assert round(weights.min().item(), 3) == 0.371


# ---- torchvision: the same classifier


@pytest.fixture(scope="module")
def vgg():
    from torchvision.models import vgg16

    torch.manual_seed(0)
    return vgg16(weights=None).eval()


def test_convolutionalised_vgg16_gives_torchvisions_logits(vgg):
    model = sg.FCN(1000, stride=32, pad=1).eval()
    sg.load_imagenet(model, vgg.state_dict())
    with torch.no_grad():
        model.score_fr.weight.copy_(vgg.classifier[6].weight[..., None, None])
        model.score_fr.bias.copy_(vgg.classifier[6].bias)
        images = torch.rand(1, 3, 224, 224)
        with sg.record(model, ["score_fr"]) as maps:
            model(images)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        theirs = vgg((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert maps["score_fr"].shape == (1, 1000, 7, 7)
    torch.testing.assert_close(maps["score_fr"][:, :, 3, 3], theirs, rtol=1e-5, atol=1e-5)


def test_load_imagenet_leaves_a_model_it_cannot_fill_alone(vgg):
    small = sg.FCN(5, width=1 / 8)
    before = [p.clone() for p in small.parameters()]
    with pytest.raises(ValueError, match="width=1"):
        sg.load_imagenet(small, vgg.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    with pytest.raises(TypeError, match="VGG16 trunk"):
        sg.load_imagenet(nn.Conv2d(3, 5, 1), vgg.state_dict())


# ---- behaviour


def test_zero_scores_start_at_ln_k_and_move_only_the_score_layer():
    model = sg.FCN(21, stride=32, pad=1, width=1 / 16)
    target = torch.randint(0, 21, (1, 64, 64))
    loss = F.cross_entropy(model(torch.rand(1, 3, 64, 64)), target)
    assert loss.item() == pytest.approx(math.log(21), abs=1e-6)
    loss.backward()
    moving = {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert moving == {"score_fr"}


@pytest.mark.parametrize("pad", [1, 100])
def test_zero_skips_leave_the_two_step_upsampling_of_the_coarse_scores(pad):
    """Facts 0.1 item 1: equal to bilinear 16 of bilinear 2, and not equal to FCN-32s."""
    torch.manual_seed(0)
    coarse = sg.FCN(4, stride=32, pad=pad, width=1 / 16).eval()
    nn.init.normal_(coarse.score_fr.weight)
    fine = sg.FCN(4, stride=16, pad=pad, width=1 / 16).eval()
    fcn.load_coarser(fine, coarse)
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad(), sg.record(coarse, ["score_fr"]) as maps:
        logits32, logits16 = coarse(images), fine(images)
    two = F.conv_transpose2d(maps["score_fr"], bilinear_kernel(4).expand(4, 1, 4, 4), stride=2, groups=4)
    if pad == 1:
        two = two[..., 1:7, 1:9]
    sixteen = F.conv_transpose2d(two, bilinear_kernel(32).expand(4, 1, 32, 32), stride=16, groups=4)
    at = fcn.OFFSETS[pad]["16s"]
    torch.testing.assert_close(logits16, sixteen[..., at : at + 96, at : at + 128])
    assert not torch.allclose(logits16, logits32, atol=1e-3)


def test_impulse_lands_at_the_same_place_in_all_three_heads():
    """Facts 1.8 items 6 and 14: total mass 1024, centre of mass of fc7 cell i at pixel 32 i + 12.5."""
    for stride in (32, 16, 8):
        model = sg.FCN(1, stride=stride, width=1 / 16).eval()
        scores = torch.zeros(1, 1, 16, 16)
        scores[0, 0, 7, 8] = 1

        def impulse(*_, scores=scores):
            return scores

        model.score_fr.register_forward_hook(impulse)
        with torch.no_grad():
            out = model(torch.zeros(1, 3, 500, 500))[0, 0]
        assert out.sum().item() == pytest.approx(1024, rel=1e-5)
        assert (out.sum(1) @ torch.arange(500.0) / out.sum()).item() == pytest.approx(32 * 7 + 12.5, abs=1e-2)
        assert (out.sum(0) @ torch.arange(500.0) / out.sum()).item() == pytest.approx(32 * 8 + 12.5, abs=1e-2)


def test_staged_training_goes_from_coarse_to_fine_only():
    nets = [sg.FCN(3, stride=stride, pad=1, width=1 / 16) for stride in (32, 16, 8)]
    for coarse, fine in pairwise(nets):
        fcn.load_coarser(fine, coarse)
        assert torch.equal(fine.fc6.weight, coarse.fc6.weight)
    with pytest.raises(ValueError, match="needs an FCN-16s"):
        fcn.load_coarser(nets[2], nets[0])


def test_scaling_at_once_shrinks_the_skips():
    plain, scaled = sg.FCN(3, pad=1, width=1 / 16).eval(), sg.FCN(3, pad=1, width=1 / 16, at_once=True).eval()
    scaled.load_state_dict(plain.state_dict())
    for model in (plain, scaled):
        nn.init.ones_(model.score_pool4.weight)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(scaled(images), plain(images) * 1e-2)


def test_sampled_loss_is_unbiased_and_keep_1_is_the_plain_mean():
    torch.manual_seed(0)
    model = sg.FCN(3, pad=1, width=1 / 16).eval()
    for name in ("score_fr", "score_pool4", "score_pool3"):
        nn.init.normal_(getattr(model, name).weight)
    images, target = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    target[:, :5] = 255
    whole = F.cross_entropy(model(images), target, ignore_index=255)
    torch.testing.assert_close(fcn.sampled_loss(1.0)(model, images, target), whole)
    logits = model(images).detach()
    draws = torch.stack([fcn.sampled_loss(0.5)(lambda _: logits, images, target) for _ in range(400)])
    spread = draws.std() / 400**0.5
    assert (draws.mean() - whole).abs() < 4 * spread


def test_sum_loss_is_pixels_times_mean_loss():
    model = sg.FCN(3, pad=1, width=1 / 16).eval()
    target = torch.full((1, 64, 64), 255)
    target[:, :10] = 1
    assert fcn.sum_loss(model, torch.rand(1, 3, 64, 64), target).item() == pytest.approx(640 * math.log(3), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 4}, "stride must be 8, 16 or 32"),
        ({"pad": 50}, "pad must be 100"),
        ({"width": 0}, "width must be above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.FCN(5, **arguments)


def test_wrong_images_are_named():
    model = sg.FCN(5, pad=1, width=1 / 16)
    with pytest.raises(ValueError, match=r"add the batch axis"):
        model(torch.rand(3, 32, 32))
    with pytest.raises(TypeError, match="use images / 255"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))

"""Dilation against the paper: counts, fields, sizes, identity start, and dilation by other means."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import segedu as sg
from segedu.backbones import vgg_stage
from segedu.layers import coarse_loss, freeze, mirror_pad
from segedu.models.dilation import DILATIONS, Context, identity_init, load_front_end


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "context", "parameters"),
    [(21, None, 134_346_581), (11, None, 134_305_611), (19, None, 134_338_387),
     (21, "basic", 134_346_581 + 28_392), (11, "basic", 134_313_443), (21, "large", 141_149_720)],
)  # fmt: skip
def test_counts_of_the_release(classes, context, parameters):
    with torch.device("meta"):
        assert count(sg.Dilation(classes, context=context)) == parameters


@pytest.mark.parametrize(
    ("classes", "dilations", "parameters", "fields"),
    [
        (21, DILATIONS, 28_392, [3, 5, 9, 17, 33, 65, 67, 67]),  # VOC, Table 1
        (11, (1, 1, 2, 4, 8, 1), 6_732, [3, 5, 9, 17, 33, 35, 35]),  # KITTI
        (19, (1, 1, 2, 4, 8, 16, 32, 64, 1), 29_792, [3, 5, 9, 17, 33, 65, 129, 257, 259, 259]),  # Cityscapes
    ],
)
def test_context_modules_of_the_release(classes, dilations, parameters, fields):
    module = Context(classes, dilations=dilations)
    assert count(module) == parameters
    names = [f"layers.{i}" for i in range(len(dilations))] + ["last"]
    assert [sg.receptive_field(module, name, (700, 700)).size for name in names] == fields


def test_large_context():
    module = Context(21, large=True)
    assert count(module) == 6_803_139
    assert [conv.out_channels for conv in module.layers] == [42, 42, 84, 168, 336, 672, 672]
    assert module.last.out_channels == 21


def test_the_field_of_the_context_module_has_no_holes():
    """67 x 67 of 67 x 67 cells count, by the gradient of a cell in the middle."""
    module = Context(2).double()
    for conv in (*module.layers, module.last):
        nn.init.ones_(conv.weight)
    scores = torch.ones(1, 2, 69, 69, dtype=torch.double, requires_grad=True)
    module(scores)[0, 0, 34, 34].backward()
    assert torch.equal(scores.grad[0, 0, 1:68, 1:68] > 0, torch.ones(67, 67, dtype=torch.bool))
    assert (scores.grad[0, 0] > 0).sum() == 67 * 67


@pytest.mark.parametrize(("rates", "field", "seen"), [((1, 2, 4), 15, 225), ((2, 2, 2), 13, 49), ((1, 2, 5), 17, 289)])
def test_gridding(rates, field, seen):
    stack = nn.Sequential(*(nn.Conv2d(3, 1 if i == 2 else 3, 3, dilation=r, padding=r) for i, r in enumerate(rates)))
    for conv in stack:
        nn.init.ones_(conv.weight)
    image = torch.zeros(1, 3, 31, 31, requires_grad=True)
    stack(image)[0, 0, 15, 15].backward()
    assert (image.grad[0, 0] > 0).sum() == seen
    assert sg.receptive_field(stack, "2").size == field


def test_fields_of_the_front_end_and_with_context():
    """380, and 396 to 908 with the module (Yu and Koltun's own sizes; the layers count, and the pools left out)."""
    with torch.device("meta"):
        model = sg.Dilation(21, context="basic")
    names = ["stage4", "stage5.1", "stage5.3", "stage5.5", "fc6", "score"]
    assert [sg.receptive_field(model, name, (1600, 1600)).size for name in names] == [92, 124, 156, 188, 380, 380]
    assert sg.receptive_field(model, "score", (1600, 1600)) == (380, 8, 3.5)
    names = [f"context.layers.{i}" for i in range(7)]
    assert [sg.receptive_field(model, name, (1600, 1600)).size for name in names] == [396, 412, 444, 508, 636, 892, 908]


@pytest.mark.parametrize(("side", "cells"), [(380, 1), (500, 16), (628, 32), (900, 66), (852, 60), (1396, 128)])
def test_crops_of_the_release(side, cells):
    with torch.device("meta"):
        model = sg.Dilation(11)
        scores = model.front_end(torch.empty(1, 3, side, side))
    assert scores.shape == (1, 11, cells, cells)


def test_front_end_by_hand():
    """VGG16 of torchvision without pool4 and pool5, the convolutions after them dilated, no padding anywhere."""
    torch.manual_seed(0)
    theirs = torchvision.models.vgg16(weights=None)
    model = sg.Dilation(2).eval()
    sg.load_imagenet(model, theirs.state_dict())
    layers = [layer for i, layer in enumerate(theirs.features) if i not in (23, 30)]
    rate, convs = 1, 0
    x = y = torch.randn(1, 3, 380, 388)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                convs += 1
                rate = 2 if convs > 10 else 1
                x = F.conv2d(x, layer.weight, layer.bias, dilation=rate)
            else:
                x = layer(x)
        fc6, fc7 = theirs.classifier[0], theirs.classifier[3]
        x = F.conv2d(x, fc6.weight.view(4096, 512, 7, 7), fc6.bias, dilation=4).relu()
        x = F.conv2d(x, fc7.weight.view(4096, 4096, 1, 1), fc7.bias).relu()
        torch.testing.assert_close(model.front_end(y), model.score(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("pad_once", [False, True])
def test_context_starts_as_the_identity(large, pad_once):
    module = Context(3, large=large, pad_once=pad_once).double()
    for conv in (*module.layers, module.last):
        identity_init(conv, 3)
    scores = torch.randn(2, 3, 20, 31).double()
    torch.testing.assert_close(module(scores), scores.relu(), rtol=0, atol=1e-12)


def test_large_context_starts_with_little_noise():
    torch.manual_seed(0)
    weight = Context(11, large=True).layers[5].weight  # 16 K -> 32 K
    assert weight[:, :, 0, 0].std().item() == pytest.approx(0.01, rel=0.02)
    own = weight[0, :16, 1, 1]
    assert own.tolist() == pytest.approx([1 / 32] * 16) and weight[0, 16:, 1, 1].abs().max() < 0.06


@pytest.mark.parametrize("context", ["basic", "large"])
def test_a_front_end_goes_on_as_it_was(context):
    torch.manual_seed(0)
    front = sg.Dilation(4, pad=0, width=1 / 16)
    nn.init.normal_(front.score.weight)
    front.score.bias.data += 100  # all scores above 0: the module's ReLU cuts nothing
    model = sg.Dilation(4, context=context, pad=0, width=1 / 16)
    load_front_end(model, front)
    for conv in (*model.context.layers, model.context.last):
        identity_init(conv, 4)
    image = torch.rand(1, 3, 40, 50)
    torch.testing.assert_close(model.eval()(image), front.eval()(image))


def test_front_end_that_does_not_fit():
    model = sg.Dilation(4, context="basic", pad=0, width=1 / 16)
    with pytest.raises(ValueError, match=r"front end alone .*and a context module"):
        load_front_end(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="with pad=0, got pad=186"):
        load_front_end(model, sg.Dilation(4, width=1 / 16))


def test_dilated_convolution_is_one_with_zeros_between_the_taps():
    torch.manual_seed(0)
    image, weight = torch.randn(1, 2, 20, 20).double(), torch.randn(3, 2, 3, 3).double()
    for rate in (2, 3, 5):
        extent = rate * 2 + 1
        spread = torch.zeros(3, 2, extent, extent).double()
        spread[:, :, ::rate, ::rate] = weight
        torch.testing.assert_close(F.conv2d(image, weight, dilation=rate), F.conv2d(image, spread))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (40, 40)])
def test_mirror_pad_is_that_of_numpy(size):
    x = torch.rand(1, 2, *size)
    widths = (17, 30, 8, 51)  # left, right, top, bottom
    wanted = np.pad(x.numpy(), ((0, 0), (0, 0), (8, 51), (17, 30)), mode="reflect" if min(size) > 1 else "edge")
    if size == (1, 9):
        wanted = np.pad(
            np.pad(x, ((0, 0), (0, 0), (0, 0), (17, 30)), mode="reflect"),
            ((0, 0), (0, 0), (8, 51), (0, 0)),
            mode="edge",
        )
    assert np.array_equal(mirror_pad(x, *widths), wanted)


def test_scores_lie_on_the_labels():
    """Cell i of the scores is made of the 8 pixels from 8 i on: its centre is 8 i + 3.5."""
    for pad in (0, 186):
        with torch.device("meta"):
            model = sg.Dilation(3, pad=pad, width=1 / 8)
        side = 904 if pad == 0 else 1600
        assert sg.receptive_field(model, "score", (side, side)).centre == 3.5


def test_coarse_loss_by_hand():
    torch.manual_seed(0)
    model = sg.Dilation(3, pad=0, width=1 / 16).eval()
    nn.init.normal_(model.score.weight)
    images, target = torch.rand(2, 3, 20, 33), torch.randint(0, 3, (2, 20, 33))
    target[0, 8, 16] = 255
    log_p = model.scores(images).log_softmax(1)
    picked = [-log_p[n, target[n, 8 * i, 8 * j], i, j] for n in range(2) for i in range(3) for j in range(5)
              if target[n, 8 * i, 8 * j] != 255]  # fmt: skip
    assert len(picked) == 29
    torch.testing.assert_close(coarse_loss(model, images, target), torch.stack(picked).mean())


def test_frozen_front_end_learns_nothing():
    model = sg.Dilation(3, context="basic", pad=0, width=1 / 16)
    freeze(model.stage1, model.stage2, model.stage3, model.stage4, model.stage5, model.fc6, model.fc7, model.score)
    coarse_loss(model, torch.rand(1, 3, 32, 32), torch.randint(0, 3, (1, 32, 32))).backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {"context"}


def test_vgg_stage_dilated_keeps_the_size():
    assert vgg_stage(3, 4, 2, dilation=2)(torch.rand(1, 3, 9, 9)).shape == (1, 4, 9, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sg.Dilation(0), "num_classes must be at least 1"),
        (lambda: sg.Dilation(3, context="huge"), 'context must be None, "basic" or "large"'),
        (lambda: sg.Dilation(3, pad=33), "pad must be 186"),
        (lambda: Context(3, large=True, dilations=(1, 2)), "has 7 dilations, got 2"),
        (lambda: Context(5)(torch.rand(1, 3, 8, 8)), r"one channel for each of 5 classes.*got \(1, 3, 8, 8\)"),
        (lambda: identity_init(nn.Conv2d(4, 6, 1), 3), "multiples of the 3 classes, got 4 -> 6"),
        (lambda: sg.Dilation(3, width=1 / 16).front_end(torch.rand(1, 3, 300, 380)), "372 . 8 m.*got 300 x 380, the next is 380 x 380"),
        (lambda: sg.Dilation(3, width=1 / 16).front_end(torch.rand(1, 3, 500, 501)), "the next is 500 x 508"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

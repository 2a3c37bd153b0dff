"""RefineNet against the paper, the release and scipy: counts, sizes, fields, residual identities, paths, frozen norms."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
import torchvision
from conftest import shaken
from torch import nn

import segedu as sg
from segedu.layers import freeze_batch_norm, normalize
from segedu.models.refinenet import ChainedResidualPooling, Fusion, RefineNetBlock, ResidualConvUnit
from segedu.training import pixel_loss

R14 = {"depth": 14, "width": 1 / 16}


def count(model):
    return sum(p.numel() for p in model.parameters())


def of_type(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def lively(model):
    """Weights large enough for every path to show in float64."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.double()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return lively(shaken(sg.RefineNet(4, **R14)))


@pytest.mark.parametrize(
    ("classes", "depth", "parameters"),
    [(21, 50, 99_060_309), (21, 101, 118_052_437), (21, 152, 133_696_085), (19, 50, 99_055_699), (19, 101, 118_047_827),
     (19, 152, 133_691_475), (150, 101, 118_349_782)],
)  # fmt: skip
def test_counts(classes, depth, parameters):
    with torch.device("meta"):
        model = sg.RefineNet(classes, depth=depth)
    assert count(model) == parameters
    if classes == 21:
        assert count(model) - count(model.backbone) == 75_552_277


def test_boxes_of_the_release():
    """20 units, the first convolution with bias, the second without; 16 pools; 6 fusion convolutions; no norm, no rate."""
    with torch.device("meta"):
        model = sg.RefineNet(21)
    units, pools, fusions = (of_type(model, kind) for kind in (ResidualConvUnit, nn.MaxPool2d, Fusion))
    assert len(units) == 20 and all(u.conv1.bias is not None and u.conv2.bias is None for u in units)
    assert [u.conv1.in_channels for u in units].count(512) == 5
    assert [(p.kernel_size, p.stride, p.padding) for p in pools] == [(3, 2, 1)] + [(5, 1, 2)] * 16
    assert [len(f.convs) for f in fusions] == [0, 2, 2, 2]
    assert all(conv.bias is None for f in fusions for conv in f.convs) and all(c.bias is None for c in model.reduce)
    assert [block.channels for block in model.blocks] == [512, 256, 256, 256]
    assert [(c.in_channels, c.out_channels) for c in model.reduce] == [(256, 256), (512, 256), (1024, 256), (2048, 512)]
    assert of_type(model, nn.BatchNorm2d) == of_type(model.backbone, nn.BatchNorm2d)
    assert {conv.dilation for conv in of_type(model, nn.Conv2d)} == {(1, 1)}
    assert model.score.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("cascades", "widths"),
    [(4, [(512,), (256, 512), (256, 256), (256, 256)]), (2, [(256, 512), (256, 256, 256)]), (1, [(256, 256, 256, 512)])],
)  # fmt: skip
def test_cascades_of_figure_7(cascades, widths):
    with torch.device("meta"):
        model = sg.RefineNet(21, depth=50, cascades=cascades).eval()
        assert [block.widths for block in model.blocks] == widths
        assert model(torch.empty(1, 3, 65, 97)).shape == (1, 21, 65, 97)


@pytest.mark.parametrize(("side", "cells"), [(400, 100), (513, 129), (97, 25)])
def test_sizes(side, cells):
    with torch.device("meta"):
        model, images = sg.RefineNet(21, depth=50).eval(), torch.empty(1, 3, side, side)
        assert model.scores(images).shape == (1, 21, cells, cells) and model(images).shape == (1, 21, side, side)


def test_fields():
    """Each pooling stage adds 4 + 2 cells of its map: 24 a block, 768 pixels at stride 32. The trunk: facts, Sec. 1.2."""
    with torch.device("meta"):
        model = sg.RefineNet(21, depth=50)
    fields = {f"{n}": 6 * n + 1 for n in range(1, 5)}
    for n, size in fields.items():
        pooling = ChainedResidualPooling(4, int(n))
        assert sg.receptive_field(nn.Sequential(nn.Conv2d(3, 4, 1), pooling), "1").size == size
    names = ["backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4"]
    assert [sg.receptive_field(model, name, (512, 512)).size for name in names] == [35, 91, 267, 427]
    before, after = (sg.receptive_field(model, f"blocks.0.{n}", (4096, 4096)).size for n in ("fusion", "pooling"))
    assert after - before == 768


def test_zero_unit_is_the_identity():
    unit = ResidualConvUnit(8)
    for p in unit.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 8, 5, 7)
    assert x.min() < 0 and torch.equal(unit(x), x)


def test_unit_by_hand():
    """One channel, the middle taps 2 and 3, bias 1: x + 3 ReLU(2 ReLU(x) + 1)."""
    unit = ResidualConvUnit(1)
    with torch.no_grad():
        for conv, tap in ((unit.conv1, 2), (unit.conv2, 3)):
            conv.weight.zero_()[0, 0, 1, 1] = tap
        unit.conv1.bias.fill_(1)
    x = torch.tensor([-2.0, 0.0, 1.0]).view(1, 1, 1, 3)
    assert unit(x).flatten().tolist() == [-2 + 3, 0 + 3, 1 + 9]


def test_zero_pooling_is_relu():
    pooling = ChainedResidualPooling(6)
    for p in pooling.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 6, 9, 4)
    assert torch.equal(pooling(x), F.relu(x)) and torch.equal(ChainedResidualPooling(6, 0)(x), F.relu(x))
    assert pooling.stages[0][0](x).shape == x.shape


@torch.no_grad()
def test_pooling_is_that_of_scipy():
    torch.manual_seed(0)
    pooling, x = ChainedResidualPooling(3, 2).double(), torch.randn(1, 3, 9, 12).double()
    step = np.maximum(x[0].numpy(), 0)
    total = step.copy()
    for stage in pooling.stages:
        pooled = [scipy.ndimage.maximum_filter(plane, 5, mode="constant", cval=-np.inf) for plane in step]
        weight = stage[1].weight.numpy()
        step = np.stack([sum(scipy.ndimage.correlate(p, w, mode="constant") for p, w in zip(pooled, filters, strict=True))
                         for filters in weight])  # fmt: skip
        total += step
    torch.testing.assert_close(pooling(x)[0], torch.from_numpy(total))


@torch.no_grad()
def test_fusion_is_a_sum_of_enlarged_maps():
    torch.manual_seed(0)
    fusion = Fusion([4, 8]).double()
    fine, coarse = torch.randn(1, 4, 9, 13).double(), torch.randn(1, 8, 5, 7).double()
    a, b = fusion.convs[0](fine), fusion.convs[1](coarse)
    enlarged = [scipy.ndimage.zoom(plane, (9 / 5, 13 / 7), order=1) for plane in b[0].numpy()]  # corners on corners
    torch.testing.assert_close(fusion(fine, coarse)[0], a[0] + torch.from_numpy(np.stack(enlarged)))
    assert torch.equal(Fusion([8])(coarse.float()), coarse.float())


@torch.no_grad()
def test_units_of_the_paper_are_those_of_the_release(small):
    """The release's order, written out: 2 units, fusion, ReLU, pools, 3 units, and the coarse path's convolution last."""
    images = torch.rand(2, 3, 97, 129).double()  # 32 m + 1: nothing is padded
    units = [
        u for block in small.blocks for part in (block.adapt, block.output) for u in of_type(part, ResidualConvUnit)
    ]
    mine = [block.adapt[0] for block in small.blocks]
    after = [[*block.output, *(following.adapt[1] if following else small.last)]
             for block, following in zip(small.blocks, [*small.blocks[1:], None], strict=True)]  # fmt: skip
    assert [len(u) for u in mine] == [2] * 4 and [len(u) for u in after] == [3] * 4 and len(units) == 18
    maps = small.backbone(normalize(images))
    x = None
    for i, c in enumerate(reversed(maps)):
        y = mine[i](small.reduce[3 - i](c))
        if x is not None:
            y = small.blocks[i].fusion.convs[0](y)
            y = y + F.interpolate(small.blocks[i].fusion.convs[1](x), y.shape[-2:], mode="bilinear", align_corners=True)
        x = top = F.relu(y)
        for stage in small.blocks[i].pooling.stages:
            top = stage[1](F.max_pool2d(top, 5, 1, 2))
            x = x + top
        for unit in after[i]:
            x = unit(x)
    logits = F.conv2d(x, small.score.weight, small.score.bias, padding=1)
    torch.testing.assert_close(small.scores(images), logits)
    whole = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(small(images), whole)


def test_enlarged_scores_keep_the_grid_points(small):
    images = torch.rand(1, 3, 70, 101).double()
    with torch.no_grad():
        torch.testing.assert_close(small(images)[..., ::4, ::4], small.scores(images))


def test_long_paths_are_sums(small):
    """With the coarse path's fusion at zero, RefineNet-4 and layer4 are out, and the path of layer3 is as it was."""
    maps = [c.detach().requires_grad_() for c in small.backbone(torch.rand(1, 3, 97, 97).double())]
    block = small.blocks[1]
    c3 = small.reduce[2](maps[2])
    coarse = small.blocks[0](small.reduce[3](maps[3]))
    both = block.fusion(block.adapt[0](c3), block.adapt[1](coarse))
    nn.init.zeros_(block.fusion.convs[1].weight)
    alone = block.fusion(block.adapt[0](c3), block.adapt[1](coarse))
    torch.testing.assert_close(alone, block.fusion.convs[0](block.adapt[0](c3)))
    assert (both - alone).abs().max() > 1e-3
    grads = torch.autograd.grad(small.refine(maps).sum(), maps)
    assert [bool(g.abs().sum() > 0) for g in grads] == [True, True, True, False]


def test_order_of_maps():
    torch.manual_seed(0)
    model = sg.RefineNet(4, **R14).eval()
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert model.refine(maps).shape == (1, 16, 16, 24)
    with pytest.raises(ValueError, match=r"fine to coarse with 16, 32, 64, 128 channels \(layer1 first\), got 128 x 2 x 3, 64 x 4 x 6"):  # fmt: skip
        model.refine(maps[::-1])
    with pytest.raises(ValueError, match="got 16 x 16 x 24, 32 x 8 x 12 "):
        model.refine(maps[:2])
    block = RefineNetBlock((8, 8))
    fine, coarse = torch.rand(1, 8, 6, 8), torch.rand(1, 8, 3, 4)
    assert block(fine, coarse).shape == fine.shape
    with pytest.raises(ValueError, match=r"fine to coarse with 8, 8 channels.*got 8 x 3 x 4, 8 x 6 x 8"):
        block(coarse, fine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"cascades": 3}, r"cascades must be 4, 2 or 1 \(number of RefineNet blocks\), got 3"),
     ({"cascades": 0}, "cascades must be"), ({"depth": 18}, "depth must be one of"), ({"pools": -1}, "pools must be"),
     ({"units": (2, 1)}, r"units three such numbers, got 4 and \(2, 1\)"), ({"num_classes": 0}, "num_classes must be")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.RefineNet(**{"num_classes": 3, **arguments})


def test_parts_left_out():
    torch.manual_seed(0)
    whole = sg.RefineNet(4, **R14)
    plain = sg.RefineNet(4, units=(0, 0, 0), pools=0, **R14)
    assert not of_type(plain, ResidualConvUnit) and len(of_type(plain, nn.MaxPool2d)) == 1
    theirs = of_type(whole, ResidualConvUnit) + [block.pooling for block in whole.blocks]
    assert count(whole) - count(plain) == sum(map(count, theirs))
    assert plain(torch.rand(2, 3, 40, 50)).shape == (2, 4, 40, 50)


def test_weights_start_as_released():
    """Normal of 0.01 at the paper's width; at 1/16 four times that, so that 16 times fewer inputs give the same spread."""
    torch.manual_seed(0)
    for width in (1 / 4, 1 / 16):
        model = sg.RefineNet(4, depth=14, width=width)
        weights = torch.cat([p.flatten() for name, p in model.named_parameters()
                             if name.startswith(("reduce", "blocks", "last")) and name.endswith("weight")])  # fmt: skip
        assert weights.std().item() == pytest.approx(0.01 / width**0.5, rel=0.02)
        assert all((unit.conv1.bias == 0).all() for unit in of_type(model, ResidualConvUnit))


def test_frozen_norms_stay_and_take_one_picture():
    torch.manual_seed(0)
    model = freeze_batch_norm(sg.RefineNet(4, **R14)).train()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pixel_loss(model, torch.rand(1, 3, 64, 64), torch.randint(0, 4, (1, 64, 64))).backward()
    optimizer.step()
    assert kept and all(torch.equal(kept[name], buffer) for name, buffer in model.named_buffers())
    free = sg.RefineNet(4, **R14).train()
    before = free.backbone.bn1.running_mean.clone()
    free(torch.rand(2, 3, 64, 64))
    assert not torch.equal(before, free.backbone.bn1.running_mean)


def test_dropout_is_of_half_and_in_training_alone():
    torch.manual_seed(0)
    model, x = sg.RefineNet(4, **R14).train(), torch.ones(1, 8, 50, 50)
    assert model.drop(x).unique().tolist() == [0, 2] and model.drop(x).mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(model.eval().drop(x), x)


def test_imagenet_weights_fit():
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    model = sg.RefineNet(2, depth=50, cascades=1, pools=0, units=(0, 0, 0))
    sg.load_imagenet(model, theirs)
    assert torch.equal(model.backbone.layer4[2].conv2.weight, theirs["layer4.2.conv2.weight"])

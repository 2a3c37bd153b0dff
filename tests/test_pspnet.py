"""PSPNet against the paper, torch's own pooling and segmentation-models-pytorch: counts, bins, fields, the two losses."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import shaken
from torch import nn

import segedu as sg
from segedu.layers import freeze_batch_norm, normalize
from segedu.models.pspnet import PyramidPooling, auxiliary_loss
from segedu.training import pixel_loss

R14 = {"depth": 14, "width": 1 / 8}
BINS = (1, 2, 3, 6)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("classes", "arguments", "parameters", "auxiliary"),
    [(21, {"depth": 50}, 46_716_373, 49_081_578), (21, {}, 65_708_501, 68_073_706), (19, {"depth": 50}, 46_715_347, 49_080_038),
     (19, {}, 65_707_475, 68_072_166), (150, {"depth": 50}, 46_782_550, 49_180_908), (150, {}, 65_774_678, 68_173_036)],
)  # fmt: skip
def test_counts(classes, arguments, parameters, auxiliary):
    """Those of hszhao/semseg."""
    with torch.device("meta"):
        assert count(sg.PSPNet(classes, **arguments)) == parameters
        assert count(sg.PSPNet(classes, auxiliary=True, **arguments)) == auxiliary


def test_counts_of_the_parts():
    with torch.device("meta"):
        model, plain = (sg.PSPNet(21, depth=50, auxiliary=True, stem=stem) for stem in ("deep", "7x7"))
    assert count(model.pyramid) == 4_198_400 == 4 * (2048 * 512 + 2 * 512)
    assert count(model.head) + count(model.score) == 18_886_165 and count(model.auxiliary) == 2_365_205
    assert count(model.backbone) - count(plain.backbone) == 123_776
    assert count(plain) - count(plain.auxiliary) == 46_592_597


@pytest.mark.parametrize("bins", [(1,), (1, 2), (1, 2, 4, 8), (6, 1)])
def test_pyramid_has_as_many_parameters_for_any_bins(bins):
    """Channels are shared out among the bins, so their number costs nothing; N of them get 1/N each."""
    with torch.device("meta"):
        pyramid = PyramidPooling(2048, bins)
    assert count(pyramid) - sum(p.numel() for branch in pyramid.branches for p in branch[1].parameters()) == 2048 * 2048
    assert [branch[0].out_channels for branch in pyramid.branches] == [2048 // len(bins)] * len(bins)
    assert pyramid.c_out == 4096


@pytest.mark.parametrize(("depth", "field"), [(50, 479), (101, 1023)])
def test_fields(depth, field):
    with torch.device("meta"):
        model = sg.PSPNet(21, depth=depth)
    assert sg.receptive_field(model, "backbone.layer4", (2048, 2048)).size == field


@pytest.mark.parametrize(("side", "cells"), [(473, 60), (713, 90)])
def test_sizes(side, cells):
    with torch.device("meta"):
        model = sg.PSPNet(21, depth=50).eval()
        images = torch.empty(1, 3, side, side)
        assert model.cells(images)[0].shape == model.scores(images).shape == (1, 21, cells, cells)
        assert model(images).shape == (1, 21, side, side)


def test_dilation():
    with torch.device("meta"):
        trunk = sg.PSPNet(21).backbone
    rates = [{block.conv2.dilation for block in stage} for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)]  # fmt: skip
    assert rates == [{(1, 1)}, {(1, 1)}, {(2, 2)}, {(4, 4)}]
    assert [block.conv2.stride for block in trunk.layer3] == [(1, 1)] * 23


def test_other_sizes_are_padded_to_8m_plus_1():
    torch.manual_seed(0)
    model = shaken(sg.PSPNet(4, **R14)).double()
    nn.init.normal_(model.score.weight)
    images = torch.rand(2, 3, 50, 70).double()
    mean = normalize(torch.zeros(1, 3, 1, 1).double())  # what 0 means after normalising, so minus it is the mean colour
    padded = torch.empty(2, 3, 57, 73).double()
    padded[:] = -mean / (normalize(torch.ones(1, 3, 1, 1).double()) - mean)
    padded[..., :50, :70] = images
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :50, :70])
        torch.testing.assert_close(model(padded)[..., ::8, ::8], model.cells(padded)[0])
        assert model.scores(images).shape == (2, 4, 7, 9)


@pytest.mark.parametrize("side", [60, 90])
@pytest.mark.parametrize("b", BINS)
def test_bins_of_the_releases_crops_are_disjoint(side, b):
    """There the adaptive pool is Caffe's: kernel = stride = side / b."""
    x = torch.rand(2, 5, side, side).double()
    ours = PyramidPooling(5, (b,)).pooled(x, b)
    torch.testing.assert_close(ours, F.avg_pool2d(x, side // b))


def edges(n, b):
    return [(i * n // b, -(-(i + 1) * n // b)) for i in range(b)]


def test_bins_of_65_cells_overlap_by_one():
    assert edges(65, 6) == [(0, 11), (10, 22), (21, 33), (32, 44), (43, 55), (54, 65)]
    assert edges(60, 6) == [(10 * i, 10 * i + 10) for i in range(6)]


@pytest.mark.parametrize("pool", ["average", "max"])
@pytest.mark.parametrize(("height", "width"), [(65, 65), (13, 17), (6, 7), (60, 90)])
def test_bins_by_hand(height, width, pool):
    x = torch.rand(2, 4, height, width).double()
    pyramid = PyramidPooling(4, BINS, pool=pool)
    for b in BINS:
        parts = [[x[..., r:s, c:d] for c, d in edges(width, b)] for r, s in edges(height, b)]
        expected = [[p.mean((2, 3)) if pool == "average" else p.amax((2, 3)) for p in row] for row in parts]
        by_hand = torch.stack([torch.stack(row, -1) for row in expected], -2)
        torch.testing.assert_close(pyramid.pooled(x, b), by_hand)


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return shaken(PyramidPooling(32))


@torch.no_grad()
def test_pyramid_keeps_the_map_and_adds_as_much(pyramid):
    x = torch.randn(2, 32, 13, 17)
    y = pyramid(x)
    assert y.shape == (2, 64, 13, 17) and torch.equal(y[:, :32], x)
    whole = y[:, 32:40]
    assert torch.equal(whole, whole[..., :1, :1].expand_as(whole))  # bin 1
    for i, b in enumerate(BINS):
        parts = F.relu(pyramid.branches[i][1](pyramid.branches[i][0](F.adaptive_avg_pool2d(x, b))))
        corners = y[:, 32 + 8 * i : 40 + 8 * i, :: 13 - 1, :: 17 - 1]
        torch.testing.assert_close(corners, parts[..., :: max(b - 1, 1), :: max(b - 1, 1)].expand_as(corners))


@torch.no_grad()
def test_constant_map_stays_constant(pyramid):
    x = torch.randn(2, 32, 1, 1).expand(-1, -1, 65, 43)
    y = pyramid(x)
    torch.testing.assert_close(y, y[..., :1, :1].expand_as(y), rtol=0, atol=4e-5)


@torch.no_grad()
def test_branches_reduce_channels_and_do_not_weigh(pyramid):
    """Twice the input is twice the output before batch norm: nothing is multiplied by 1/4."""
    conv = pyramid.branches[2][0]
    assert conv.weight.shape == (8, 32, 1, 1) and conv.bias is None
    conv.weight.copy_(torch.eye(32)[:8, :, None, None])
    x = torch.randn(2, 32, 12, 12)
    torch.testing.assert_close(conv(pyramid.pooled(x, 3)), F.avg_pool2d(x, 4)[:, :8])


@torch.no_grad()
def test_pyramid_is_that_of_smp(pyramid):
    """Their order is bins first, and bin 1 has a bias in place of batch norm."""
    decoder = pytest.importorskip("segmentation_models_pytorch.decoders.pspnet.decoder", reason="SMP is not installed")
    theirs = decoder.PSPModule(32, BINS).eval()
    for branch, block in zip(pyramid.branches[1:], theirs.blocks[1:], strict=True):
        block.pool[1].load_state_dict(branch.state_dict())
    first, norm = theirs.blocks[0].pool[1][0], pyramid.branches[0][1]
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    first.weight.copy_(pyramid.branches[0][0].weight * slope[:, None, None, None])
    first.bias.copy_(norm.bias - norm.running_mean * slope)
    x = torch.randn(2, 32, 19, 23)
    expected = theirs(x)
    torch.testing.assert_close(pyramid(x), torch.cat([expected[:, 32:], expected[:, :32]], 1))


def test_trunk_is_that_of_smp():
    """Stride to dilation as in the release, the first bottlenecks of layer3 and layer4 too."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="SMP is not installed")
    torch.manual_seed(0)
    theirs = shaken(smp.encoders.get_encoder("resnet50", weights=None))
    theirs.double().make_dilated(8)
    ours = sg.PSPNet(3, depth=50, stem="7x7").backbone.eval().double()
    ours.load_state_dict({name: p for name, p in theirs.state_dict().items() if not name.startswith("fc.")})
    x = torch.randn(1, 3, 72, 88).double()
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[-1], theirs(x)[-1])


def test_imagenet_weights_need_the_7x7_stem():
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    model = sg.PSPNet(2, depth=50, stem="7x7")
    sg.load_imagenet(model, theirs)
    assert torch.equal(model.backbone.layer4[2].conv2.weight, theirs["layer4.2.conv2.weight"])
    with pytest.raises(ValueError, match=r'build the model with stem="7x7".*resnet\.load_state_dict'):
        sg.load_imagenet(sg.PSPNet(2, **R14), theirs)


def test_auxiliary_loss_is_a_sum():
    torch.manual_seed(0)
    model = sg.PSPNet(4, auxiliary=True, **R14).eval()
    nn.init.normal_(model.auxiliary[-1].weight)
    images, target = torch.rand(2, 3, 60, 90), torch.randint(0, 4, (2, 60, 90))
    target[:, :9] = 255
    main, side = model.both(images)
    assert torch.equal(main, model(images)) and side.shape == main.shape
    parts = [F.cross_entropy(x, target, ignore_index=255) for x in (main, side)]
    torch.testing.assert_close(auxiliary_loss()(model, images, target), parts[0] + 0.4 * parts[1])
    torch.testing.assert_close(auxiliary_loss(0)(model, images, target), pixel_loss(model, images, target))
    assert auxiliary_loss()(model, images, torch.full_like(target, 255)) == 0


def test_both_losses_reach_all_earlier_layers():
    """Not relayed: each of them alone gives layer3 and the stem a gradient; layer4 has its from the main loss alone."""
    torch.manual_seed(0)
    model = sg.PSPNet(4, auxiliary=True, **R14).eval()
    images, target = torch.rand(2, 3, 49, 57), torch.randint(0, 4, (2, 49, 57))
    main, side = (F.cross_entropy(x, target) for x in model.both(images))
    early = [model.backbone.conv1.weight, model.backbone.layer3[0].conv3.weight]
    late = [model.backbone.layer4[0].conv3.weight, *model.head.parameters()]
    gradients = [torch.autograd.grad(x, early + late, retain_graph=True, allow_unused=True) for x in (main, side)]
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(g.abs().sum() > 0 for g in gradients[1][:2]) and all(g is None for g in gradients[1][2:])
    auxiliary_loss()(model, images, target).backward()
    torch.testing.assert_close(early[0].grad, gradients[0][0] + 0.4 * gradients[1][0])
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_testing_needs_no_auxiliary_weights():
    torch.manual_seed(0)
    model = shaken(sg.PSPNet(4, auxiliary=True, bins=(1, 3), stem="7x7", pool="max", **R14))
    kept = model.without_auxiliary()
    assert set(model.state_dict()) - set(kept.state_dict()) == {n for n in model.state_dict() if n.startswith("auxiliary.")}  # fmt: skip
    plain = sg.PSPNet(4, bins=(1, 3), stem="7x7", pool="max", **R14).eval()
    plain.load_state_dict(kept.state_dict())
    images = torch.rand(1, 3, 40, 50)
    assert torch.equal(plain(images), model(images)) and torch.equal(kept(images), model(images))
    assert kept.auxiliary is None and not kept.training
    with pytest.raises(ValueError, match="auxiliary=True"):
        auxiliary_loss()(plain, images, torch.zeros(1, 40, 50, dtype=torch.long))


def test_new_layers_learn_ten_times_as_fast():
    """One SGD step without momentum and decay."""
    torch.manual_seed(0)
    model = sg.PSPNet(2, auxiliary=True, **R14)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [(torch.rand(3, 49, 49), torch.randint(0, 2, (49, 49))) for _ in range(2)]
    gradients = {}

    def loss(model, images, target):
        value = auxiliary_loss()(model, images, target)
        gradients.update(zip(before, torch.autograd.grad(value, list(model.parameters()), retain_graph=True), strict=True))  # fmt: skip
        return value

    recipe = sg.recipes.Recipe(steps=1, batch=2, lr=1e-2, momentum=0.0, new_lr=sg.recipes.PSPNET.new_lr)
    sg.fit(model, data, recipe, loss=loss)
    for name, p in model.named_parameters():
        factor = 1 if name.startswith("backbone.") else 10
        torch.testing.assert_close(before[name] - p, factor * 1e-2 * gradients[name], rtol=1e-3, atol=1e-6)


def test_recipe():
    """Base rate 0.01, 30,000 steps, batch 16, poly 0.9, decay 0.0001: Sec. 5.1."""
    recipe = sg.recipes.PSPNET
    assert (recipe.steps, recipe.batch, recipe.weight_decay, recipe.momentum) == (30_000, 16, 1e-4, 0.9)
    assert recipe.lr_at(15_000) == pytest.approx(0.00535887, rel=1e-5) and recipe.crop == (473, 473)


def test_map_smaller_than_the_bins():
    model = sg.PSPNet(3, **R14).eval()
    message = r"bins \(1, 2, 3, 6\) need a map of at least 6 x 6 cells, got 5 x 10; give pictures of at least 41 pixels"
    with pytest.raises(ValueError, match=message):
        model(torch.rand(1, 3, 40 - 7, 70))
    assert model(torch.rand(1, 3, 41, 41)).shape == (1, 3, 41, 41)
    assert sg.PSPNet(3, bins=(), **R14)(torch.rand(1, 3, 9, 9)).shape == (1, 3, 9, 9)


def test_one_picture_in_training():
    model = sg.PSPNet(3, **R14)
    image = torch.rand(1, 3, 49, 49)
    with pytest.raises(ValueError, match=r"bin of 1 leaves one value .* got a batch of 1. Give at least 2"):
        model(image)
    assert model.eval()(image).shape == image.shape
    assert sg.PSPNet(3, bins=(2, 3), **R14)(image).shape == image.shape
    assert freeze_batch_norm(sg.PSPNet(3, **R14))(image).shape == image.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bins": (0, 2)}, "bins must be different"), ({"bins": (2, 2)}, "bins must be different"),
     ({"pool": "sum"}, "pool must be one of average, max"), ({"stem": "3x3"}, 'stem must be "7x7"'),
     ({"depth": 18}, "depth must be one of"), ({"num_classes": 0}, "num_classes must be at least 1")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.PSPNet(**{"num_classes": 3, **R14, **arguments})
    with pytest.raises(ValueError, match="weight must not be negative"):
        auxiliary_loss(-1)

"""U-Net against the paper: counts, sizes, fields, tiles, weights (facts: arXiv 1505.04597 and arithmetic on its Fig. 1)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import segedu as sg
from segedu.data.cells import Cells
from segedu.models import unet
from segedu.models.unet import OverlapTile, UNet, border_loss, border_weights, covering, mirrored

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")


def learnable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def paper(**arguments):
    with torch.device("meta"):
        return UNet(2, in_channels=1, padding=0, **arguments)


@pytest.fixture(scope="module")
def valid():
    """A small net with valid convolutions, in double precision."""
    torch.manual_seed(0)
    return UNet(3, padding=0, width=1 / 16).double().eval()


# ---- the paper: counts, sizes, channels (meta device)


@pytest.mark.parametrize(
    ("channels", "classes", "count"),
    [
        (1, 2, 31_030_658), (3, 2, 31_031_810), (1, 1, 31_030_593), (3, 1, 31_031_745),
        (3, 21, 31_033_045), (3, 11, 31_032_395), (3, 12, 31_032_460),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padding", [0, 1])
def test_parameter_counts(channels, classes, count, padding):
    with torch.device("meta"):
        assert learnable(UNet(classes, in_channels=channels, padding=padding)) == count


def test_parameter_counts_of_the_boxes():
    model = paper()
    count = {name: learnable(module) for name, module in model.named_children()}
    assert [count[f"stage{i}"] for i in range(1, 6)] == [37_568, 221_440, 885_248, 3_539_968, 14_157_824]
    assert [count[f"up{i}"] for i in (4, 3, 2, 1)] == [2_097_664, 524_544, 131_200, 32_832]
    assert [count[f"merge{i}"] for i in (4, 3, 2, 1)] == [7_078_912, 1_769_984, 442_624, 110_720]
    assert count["score"] == 130


def test_23_convolutions_up_convolutions_included_and_no_batch_norm():
    model = paper()
    kinds = [(type(m).__name__, m.kernel_size) for m in model.modules() if hasattr(m, "kernel_size")]
    assert kinds.count(("Conv2d", (3, 3))) == 18
    assert kinds.count(("ConvTranspose2d", (2, 2))) == 4
    assert kinds.count(("Conv2d", (1, 1))) == 1 and len(kinds) == 23
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert all(m.bias is not None for m in model.modules() if hasattr(m, "kernel_size"))


def test_sizes_of_figure_1():
    model = paper()
    inside = [f"{box}.{i}" for box in ("stage1", "stage2", "stage3", "stage4", "stage5") for i in (0, 2)]
    outside = [name for k in (4, 3, 2, 1) for name in (f"up{k}", f"merge{k}.0", f"merge{k}.2")]
    with sg.record(model, [*inside, *outside]) as maps:
        logits = model(torch.empty(1, 1, 572, 572, device="meta"))
    assert logits.shape == (1, 2, 388, 388)
    assert [maps[n].shape[-1] for n in inside] == [570, 568, 282, 280, 138, 136, 66, 64, 30, 28]
    assert [maps[n].shape[-1] for n in outside] == [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388]
    channels = [maps[f"stage{i}.0"].shape[1] for i in range(1, 6)]
    assert channels == [64, 128, 256, 512, 1024]
    assert [getattr(model, f"merge{k}")[0].in_channels for k in (4, 3, 2, 1)] == [1024, 512, 256, 128]


def test_valid_sizes_lose_184():
    model = paper(width=1 / 16)
    for m, n in ((0, 3), (1, 0), (24, 32)):
        height, width = 188 + 16 * m, 188 + 16 * n
        assert model(torch.empty(1, 1, height, width, device="meta")).shape == (1, 2, height - 184, width - 184)


def test_skips_are_cut_by_4_16_40_88():
    model, cuts = paper(width=1 / 16), []

    class Watched(type(model)):
        def beside(self, up, skip):
            cuts.append((skip.shape[-1] - up.shape[-1]) / 2)
            return super().beside(up, skip)

    model.__class__ = Watched
    model(torch.empty(1, 1, 572, 572, device="meta"))
    assert cuts == [4, 16, 40, 88]


def test_skips_are_cut_to_their_middle():
    """The cell of a skip beside an upsampled cell looks at the same place: equal centres of their fields."""
    with torch.device("meta"):
        model = UNet(2, padding=0, width=1 / 16)
    for k, cut in ((4, 4), (3, 16), (2, 40), (1, 88)):
        up = sg.receptive_field(model, f"up{k}", image_size=(572, 572))
        skip = sg.receptive_field(model, f"stage{k}", image_size=(572, 572))
        assert up.stride == skip.stride == 2 ** (k - 1)
        assert up.centre == skip.centre + cut * skip.stride


@pytest.mark.parametrize("padding", [0, 1])
def test_receptive_fields(padding):
    with torch.device("meta"):
        model = UNet(2, padding=padding, width=1 / 16)
    found = {n: sg.receptive_field(model, n, image_size=(700, 700)).size for n in (*STAGES, "score")}
    assert [found[n] for n in STAGES] == [5, 14, 32, 68, 140] and found["score"] == 204


def test_an_output_pixel_depends_on_188_or_204_pixels_by_its_phase(monkeypatch):
    """By gradient, with averages for maxima and positive weights, so that no path is hidden."""
    monkeypatch.setattr(unet, "pool", lambda x: F.avg_pool2d(x, 2))
    model = UNet(1, in_channels=1, padding=0, width=1 / 16).double().eval()
    for p in model.parameters():
        nn.init.constant_(p, 0.01)
    images = torch.ones(1, 1, 396, 188, dtype=torch.float64, requires_grad=True)
    logits, found = model(images), {}
    for r in range(96, 112):
        (gradient,) = torch.autograd.grad(logits[0, 0, r, 1], images, retain_graph=True)
        rows = gradient[0, 0].abs().sum(1).nonzero()[:, 0]
        found[r % 16] = len(range(int(rows[0]), int(rows[-1]) + 1))
        assert r + 92 - 107 <= rows[0] and rows[-1] <= r + 92 + 107
    assert found == {phase: 188 if phase < 4 else 204 for phase in range(16)}


def test_up_convolution_spreads_a_cell_over_its_own_four_pixels():
    torch.manual_seed(0)
    up = UNet(2, width=1 / 16).up4
    x = torch.randn(1, up.in_channels, 5, 6)
    nudged = x.clone()
    nudged[:, :, 2, 3] += 1
    moved = (up(x) != up(nudged)).any(1)[0].nonzero().tolist()
    assert moved == [[4, 6], [4, 7], [5, 6], [5, 7]]


def test_initial_weights_have_the_paper_s_spread():
    torch.manual_seed(0)
    model = UNet(2)
    assert math.isclose(math.sqrt(2 / 576), 0.05893, abs_tol=5e-6)
    assert model.stage1[2].weight.std().item() == pytest.approx(0.05893, rel=0.02)
    assert model.stage5[2].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 1024)), rel=0.01)
    assert model.up4.weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.01)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


# ---- same padding, and how the maps meet


def test_any_size_comes_out_as_it_went_in():
    with torch.device("meta"):
        model = UNet(5, width=1 / 16)
        for height, width in ((1, 1), (13, 47), *((h, 129 - h) for h in range(32, 65))):
            assert model(torch.empty(2, 3, height, width)).shape == (2, 5, height, width)


def test_concatenation_keeps_both_maps_and_ablations_keep_the_count():
    class Sum(UNet):
        def join(self, up, skip):
            return torch.cat([up + skip, torch.zeros_like(skip)], 1)

    model = UNet(4, width=1 / 16)
    up, skip = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 5, 6)
    joined = model.beside(up, skip)
    assert torch.equal(joined[:, :4], up[..., :5, :]) and torch.equal(joined[:, 4:], skip)
    assert learnable(Sum(4, width=1 / 16)) == learnable(model)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 40, 40)
    other = Sum(4, width=1 / 16)
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other.eval()(images), model.eval()(images))


def test_same_padding_and_valid_convolutions_agree_away_from_the_border():
    """112 pixels in, no output sees the padding. A valid net pools 2, 4, 8, 16 pixels from 2, 6, 14, 30 on, so its
    picture must begin at 2, modulo 16, to pool the same groups as the padded one."""
    torch.manual_seed(0)
    valid = UNet(2, padding=0, width=1 / 16).double().eval()
    same = UNet(2, padding=1, width=1 / 16).double().eval()
    same.load_state_dict(valid.state_dict())
    images = torch.rand(1, 3, 352, 352, dtype=torch.float64)
    with torch.no_grad():
        middle = same(images)[..., 112:240, 112:240]
        for start in (0, 2, 10):
            begin = 112 - start - 92
            cut = valid(images[..., start : start + 332, start : start + 332])[..., begin:, begin:][..., :128, :128]
            assert ((middle - cut).abs().max() < 1e-12) == (start == 2)
        assert (same(images)[..., :92, :92] - OverlapTile(valid)(images)[..., :92, :92]).abs().max() > 0.01


def test_grey_images_are_not_normalised_and_rgb_ones_are():
    torch.manual_seed(0)
    model = UNet(2, in_channels=1, width=1 / 16).eval()
    with sg.record(model, ["stage1.0"]) as maps:
        image = torch.rand(1, 1, 20, 20)
        model(image)
    torch.testing.assert_close(maps["stage1.0"], model.stage1[0](image))
    model = UNet(2, width=1 / 16).eval()
    with sg.record(model, ["stage1.0"]) as maps:
        image = torch.rand(1, 3, 20, 20)
        model(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(maps["stage1.0"], model.stage1[0]((image - mean.view(3, 1, 1)) / std.view(3, 1, 1)))


# ---- overlap-tile


def test_mirroring_is_numpys_reflection_and_works_beyond_it():
    for side in (2, 3, 7, 50):
        expected = np.pad(np.arange(side), 92, mode="reflect")
        assert mirrored(-92, side + 92, side).tolist() == expected.tolist()
    assert mirrored(-92, 93, 1).unique().tolist() == [0]


def test_a_512_picture_is_one_tile_of_700(monkeypatch):
    assert covering(512) == 516
    seen = []
    model = OverlapTile(paper(width=1 / 16))
    monkeypatch.setattr(model.model, "check", lambda images: seen.append(tuple(images.shape)))
    assert model(torch.empty(1, 1, 512, 512, device="meta")).shape == (1, 2, 512, 512)
    assert seen == [(1, 1, 700, 700)]


@pytest.mark.parametrize("size", [(90, 70), (33, 5), (1, 20)])
def test_the_answer_does_not_depend_on_the_tile(valid, size):
    torch.manual_seed(1)
    images = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        whole = OverlapTile(valid)(images)
        assert whole.shape == (1, 3, *size)
        for tile in (20, 36, 52):
            torch.testing.assert_close(OverlapTile(valid, tile)(images), whole, rtol=0, atol=1e-12)


def test_tiles_agree_when_origins_are_multiples_of_16_and_not_otherwise(valid):
    torch.manual_seed(1)
    images = torch.rand(1, 3, 252, 188, dtype=torch.float64)
    with torch.no_grad():
        first = valid(images[..., :236, :])  # output rows 0 to 51
        for shift in range(1, 17):
            other = valid(images[..., shift : shift + 236, :])
            gap = (first[..., shift:, :] - other[..., : 52 - shift, :]).abs().max()
            assert (gap < 1e-12) == (shift == 16), (shift, gap)


def test_inside_the_picture_a_tile_is_the_plain_net(valid):
    images = torch.rand(1, 3, 220, 236, dtype=torch.float64)
    with torch.no_grad():
        whole = OverlapTile(valid)(images)
        plain = valid(images[..., 4:208, 4:224])  # its output begins at 4 + 92 = 6 * 16
    torch.testing.assert_close(whole[..., 96:116, 96:132], plain, rtol=0, atol=1e-12)


# ---- border weights


def two_cells(gap):
    """Two large cells with `gap` columns of background between them."""
    target = torch.ones(41, 60, dtype=torch.long)
    target[:, 30 : 30 + gap] = 0
    return target


@pytest.mark.parametrize(("gap", "weight"), [(1, 9.231), (3, 7.261), (9, 1.353)])
def test_border_weights_of_the_paper(gap, weight):
    """d1 + d2 is 2, 4, 10 in the middle of a gap of 1, 3, 9 pixels."""
    target = two_cells(gap)
    extra = border_weights(target) - border_weights(target, w0=0)
    assert extra[20, 30 + gap // 2].item() == pytest.approx(weight, abs=5e-4)
    assert extra[target == 1].abs().max() == 0


def test_border_weights_balance_the_classes():
    target = two_cells(4)
    weights = border_weights(target, w0=0)
    assert weights[target == 0].sum().item() == pytest.approx(weights[target == 1].sum().item(), rel=1e-5)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    target[:5] = 255
    weights = border_weights(target, w0=0)
    assert weights[:5].abs().max() == 0 and weights[5:].mean().item() == pytest.approx(1, rel=1e-5)


def test_border_weights_follow_the_formula_on_drawn_cells():
    """Against brute force: all distances from background to cell pixels."""
    target = Cells("val")[0][1][:40, :40]
    parts, count = ndimage.label(target.numpy())
    assert count > 3
    extra = (border_weights(target) - border_weights(target, w0=0)).numpy()
    for y, x in np.argwhere(target.numpy() == 0)[::17]:
        distances = sorted(np.sqrt(((np.argwhere(parts == k) - (y, x)) ** 2).sum(1)).min() for k in range(1, count + 1))
        expected = 10 * math.exp(-((distances[0] + distances[1]) ** 2) / 50)
        assert extra[y, x] == pytest.approx(expected, abs=1e-4)


def test_border_weights_without_two_cells_are_the_balance_alone():
    for target in (torch.zeros(9, 9), torch.ones(9, 9)):
        assert torch.equal(border_weights(target.long()), torch.ones(9, 9))
    one = torch.zeros(2, 9, 9, dtype=torch.long)
    one[0, 3:6, 3:6] = 1
    assert torch.equal(border_weights(one), border_weights(one, w0=0))  # cells of another picture do not count
    assert border_weights(torch.full((4, 4), 255)).abs().max() == 0


def test_border_loss_is_cross_entropy_with_these_weights():
    torch.manual_seed(0)
    target = torch.stack([two_cells(3), two_cells(5)])
    target[:, :4] = 255
    logits = torch.randn(2, 2, *target.shape[1:], requires_grad=True)
    value = border_loss()(lambda images: logits, None, target)
    log_p = torch.log_softmax(logits, 1).gather(1, target.clamp(max=1)[:, None])[:, 0]
    expected = -(border_weights(target) * log_p).sum() / (target != 255).sum()
    torch.testing.assert_close(value, expected)
    nothing = border_loss()(lambda images: logits, None, torch.full_like(target, 255))
    assert nothing.item() == 0
    nothing.backward()
    assert logits.grad.isfinite().all()


# ---- training


@pytest.mark.parametrize("tiled", [False, True])
def test_it_learns_a_few_cells(tiled):
    torch.manual_seed(0)
    net = UNet(2, padding=0 if tiled else 1, width=1 / 16)
    model, steps = (OverlapTile(net), 3) if tiled else (net, 40)
    train = Cells("train", size=2)
    recipe = sg.recipes.Recipe(steps=steps, batch=2, lr=5e-3, optimizer="adamw", elastic=2.0)
    run = sg.fit(model, train, recipe, val=train, loss=border_loss(), progress=False)
    assert run.scores.matrix.sum() == 2 * 96 * 96
    assert sg.predict(model, train[0][0]).shape == (96, 96)
    if not tiled:
        assert np.mean(run.loss[-10:]) < 0.75 * np.mean(run.loss[:5])


# ---- bad input


@pytest.mark.parametrize(
    ("size", "near"),
    [((572, 500), "572 x 508"), ((100, 190), "188 x 188"), ((188, 197), "188 x 204"), ((512, 512), "508 x 508")],
)
def test_sizes_that_valid_convolutions_cannot_take_are_named(size, near):
    with pytest.raises(ValueError, match=rf"got {size[0]} x {size[1]}, the nearest is {near}"):
        paper(width=1 / 16)(torch.empty(1, 1, *size, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": 2}, "padding must be 1"),
        ({"in_channels": 0}, "at least 1"),
        ({"width": 0}, "width must be above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(5, **arguments)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match="add the batch axis"):
        UNet(5, width=1 / 16)(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match=r"must be \(N, 1, H, W\), got \(1, 3, 32, 32\)"):
        UNet(5, in_channels=1, width=1 / 16)(torch.rand(1, 3, 32, 32))
    with pytest.raises(TypeError, match="use images / 255"):
        UNet(5, width=1 / 16)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_wrong_tiles_and_targets_are_named(valid):
    for tile in (0, 4, 32, 389):
        with pytest.raises(ValueError, match=r"tile must be 4 \+ 16 m"):
            OverlapTile(valid, tile)
    with pytest.raises(ValueError, match="padding=0"):
        OverlapTile(UNet(2, width=1 / 16))
    with pytest.raises(ValueError, match="must be integers"):
        border_weights(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="sigma must be above 0"):
        border_weights(torch.zeros(4, 4, dtype=torch.long), sigma=0)

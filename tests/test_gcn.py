"""GCN against the paper's counts and against linear algebra: composed kernels, ranks, borders, refinement, sums."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import segedu as sg
from segedu.layers import normalize
from segedu.models.gcn import BoundaryRefinement, GlobalConv, Stacked3x3, composed_kernel

SMALL = {"depth": 14, "k": 3, "width": 1 / 16}


def count(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    """Without biases, as the paper counts (782K and 3484K at k = 9)."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("classes", "arguments", "parameters"),
    [(21, {"depth": 50}, 26_052_308), (21, {}, 60_688_084), (19, {"depth": 50}, 25_799_280), (19, {}, 60_435_056),
     (21, {"depth": 50, "k": 7}, 24_733_844), (21, {"k": 7}, 59_369_620),
     (21, {"depth": 50, "refine": False}, 26_052_308 - 9 * 7_980), (19, {"refine": False}, 60_435_056 - 9 * 6_536)],
)  # fmt: skip
def test_counts(classes, arguments, parameters):
    with torch.device("meta"):
        model = sg.GCN(classes, **arguments)
    assert count(model) == parameters
    assert sum(isinstance(part, GlobalConv) for part in model.modules()) == 4
    blocks = sum(isinstance(part, BoundaryRefinement) for part in model.modules())
    assert blocks == (9 if arguments.get("refine", True) else 0)


@pytest.mark.parametrize(
    ("k", "separable", "trivial"),
    [(3, 260_694, 387_072), (5, 434_490, 1_075_200), (7, 608_286, 2_107_392), (9, 782_082, 3_483_648),
     (15, 1_303_470, None)],
)  # fmt: skip
def test_counts_of_the_blocks(k, separable, trivial):
    with torch.device("meta"):
        assert weights(GlobalConv(2048, 21, k)) == separable
        model = sg.GCN(21, depth=50, k=k, block="trivial")
    free = weights(model.score5)
    assert free == (trivial or 21 * 2048 * k * k)
    assert separable / free == pytest.approx(2 / k * (1 + 21 / 2048))


@pytest.mark.parametrize(("middle", "parameters"), [(2048, 75_884_544), (1024, 28_505_088), (210, 4_307_310)])
def test_counts_of_the_stack(middle, parameters):
    with torch.device("meta"):
        assert weights(Stacked3x3(2048, 21, 7, middle)) == parameters
        assert weights(Stacked3x3(2048, 21, 7)) == 75_884_544


def test_small_kernels_of_all_blocks():
    with torch.device("meta"):
        assert [conv.kernel_size for conv in Stacked3x3(8, 3, 1)] == [(1, 1)]
        assert [conv.kernel_size for conv in Stacked3x3(8, 3, 9)] == [(3, 3)] * 4
        baseline = sg.GCN(3, block="trivial", k=1, **{"depth": 14, "width": 1 / 16})
        assert count(baseline.score5) == 128 * 3 + 3
        four = sg.GCN(3, depth=14, k=(9, 7, 5, 3), width=1 / 16)
        sides = [getattr(four, f"score{i}").down_then_across[0].kernel_size for i in (2, 3, 4, 5)]
        assert sides == [(9, 1), (7, 1), (5, 1), (3, 1)]


@pytest.mark.parametrize("block", ["gcn", "trivial", "stack"])
def test_fields(block):
    """k cells at stride 32 are 32 (k - 1) pixels more: 480 for 15 cells by themselves."""
    with torch.device("meta"):
        model = sg.GCN(21, depth=50, block=block)
    for i, (size, stride) in {2: (35, 4), 3: (91, 8), 4: (267, 16), 5: (427, 32)}.items():
        assert sg.receptive_field(model, f"backbone.layer{i - 1}", (2048, 2048)).size == size
        field = sg.receptive_field(model, f"score{i}", (2048, 2048))
        assert field.size == size + 14 * stride and field.stride == stride


@pytest.fixture
def block():
    torch.manual_seed(0)
    return GlobalConv(6, 4, 7).double()


def without_biases(block):
    for name, p in block.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    return block


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 17), (7, 7), (3, 4), (1, 9)])
def test_composed_kernel_is_the_block(block, size):
    """Borders included, also where the map is smaller than the kernel."""
    x = torch.randn(2, 6, *size).double()
    whole = composed_kernel(without_biases(block))
    assert whole.shape == (4, 6, 7, 7)
    torch.testing.assert_close(block(x), F.conv2d(x, whole, padding=3), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_composed_kernel_is_the_answer_to_one_cell(block):
    """A single 1 in channel c: the answer is the kernel's slice, turned round."""
    whole = composed_kernel(without_biases(block))
    for c in range(6):
        x = torch.zeros(1, 6, 7, 7).double()
        x[0, c, 3, 3] = 1
        torch.testing.assert_close(block(x)[0].flip(1, 2), whole[:, c])


@torch.no_grad()
@pytest.mark.parametrize(("c", "rank"), [(1, 2), (2, 4), (3, 6), (4, 7), (21, 7)])
def test_ranks_of_the_slices(c, rank):
    """At most 2c; from 2c >= k on any slice is possible, though not all slices at once."""
    torch.manual_seed(0)
    block = GlobalConv(5, c, 7).double()
    ranks = torch.linalg.matrix_rank(composed_kernel(block))
    assert ranks.shape == (c, 5) and (ranks == rank).all()
    assert weights(block) == 2 * 7 * (5 * c + c * c)


@torch.no_grad()
def test_inner_bias_is_a_constant_in_the_interior(block):
    x = torch.randn(1, 6, 15, 16).double()
    before = F.conv2d(x, composed_kernel(block), padding=3)
    nn.init.normal_(block.down_then_across[0].bias)
    change = block(x) - before
    inside = change[..., 3:-3]  # the bias is there in every row, for the second kernel runs across
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))
    assert (change[..., :3] - inside[..., :1, :1]).abs().amin(dim=(0, 2, 3)).max() > 1e-3


@torch.no_grad()
def test_transposed_input_and_swapped_branches(block):
    other = GlobalConv(6, 4, 7).double()
    for mine, its in (("down_then_across", "across_then_down"), ("across_then_down", "down_then_across")):
        for conv, source in zip(getattr(other, mine), getattr(block, its), strict=True):
            conv.weight.copy_(source.weight.transpose(2, 3))
            conv.bias.copy_(source.bias)
    x = torch.randn(2, 6, 9, 13).double()
    torch.testing.assert_close(other(x.transpose(2, 3)), block(x).transpose(2, 3))


@torch.no_grad()
def test_blocks_are_linear(block):
    x, y = torch.randn(2, 1, 6, 9, 9).double()
    stack = Stacked3x3(6, 4, 7, 5).double()
    for linear in (without_biases(block), without_biases(stack)):
        torch.testing.assert_close(linear(x + 2 * y), linear(x) + 2 * linear(y))
    refine = without_biases(BoundaryRefinement(6).double())
    assert (refine(x) + refine(-x)).abs().max() > 1e-3  # a ReLU is inside


@torch.no_grad()
def test_stack_is_one_kernel_in_the_interior_only():
    """Its inner maps are cut at the border; those of the separable block have nothing there that could be cut."""
    torch.manual_seed(0)
    stack = without_biases(Stacked3x3(3, 2, 5, 4).double())
    first, last = stack[0].weight, stack[1].weight
    whole = F.conv_transpose2d(last.flip(2, 3), first.transpose(0, 1).flip(2, 3).transpose(0, 1)).flip(2, 3)
    x = torch.randn(1, 3, 11, 12).double()
    off = (stack(x) - F.conv2d(x, whole, padding=2)).abs()
    assert off[..., 1:-1, 1:-1].max() < 1e-12 and off.max() > 1e-3


@torch.no_grad()
def test_refinement_by_hand_and_as_identity():
    torch.manual_seed(0)
    refine, x = BoundaryRefinement(5), torch.randn(2, 5, 8, 9)
    first, second = refine.conv1, refine.conv2
    inner = F.conv2d(x, first.weight, first.bias, padding=1).clamp(min=0)
    torch.testing.assert_close(refine(x), x + F.conv2d(inner, second.weight, second.bias, padding=1))
    assert not torch.equal(refine(x), x)
    nn.init.zeros_(second.weight)
    assert torch.equal(refine(x), x)
    assert count(BoundaryRefinement(21)) == 7_980 and count(BoundaryRefinement(19)) == 6_536


@pytest.fixture
def model():
    torch.manual_seed(0)
    return sg.GCN(5, **SMALL).eval()


@torch.no_grad()
def test_without_refinement_it_is_the_sum_from_coarse_to_fine(model):
    for part in model.modules():
        if isinstance(part, BoundaryRefinement):
            nn.init.zeros_(part.conv2.weight)
    plain = sg.GCN(5, refine=False, **SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.rand(2, 3, 70, 101)
    torch.testing.assert_close(model(images), plain(images))

    maps = plain.backbone(F.pad(normalize(images), (0, 28, 0, 27)))  # to 97 x 129
    scores = [getattr(plain, f"score{i}")(x) for i, x in zip((2, 3, 4, 5), maps, strict=True)]
    x = scores[3]
    assert x.shape == (2, 5, 4, 5)
    for score, size in [
        (scores[2], (7, 9)),
        (scores[1], (13, 17)),
        (scores[0], (25, 33)),
        (0, (49, 65)),
        (0, (97, 129)),
    ]:
        x = score + F.interpolate(x, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(plain(images), x[..., :70, :101])


def test_summed_cells_lie_on_the_same_pixels():
    """Every map begins at pixel 0, so that a 1x1 has no shift to repair."""
    with torch.device("meta"):
        model = sg.GCN(21, depth=50, k=3)
    for name in ("score5", "refine_sum4", "refine_sum3", "refine_sum2", "refine_half", "refine_full"):
        assert sg.receptive_field(model, name, (2049, 2049)).centre == 0


@torch.no_grad()
def test_refinements_come_in_the_papers_order(model):
    names = [name for name, part in model.named_modules() if isinstance(part, BoundaryRefinement)]
    with sg.record(model, names) as maps:
        model(torch.rand(1, 3, 64, 96))
    sizes = {name: tuple(x.shape[-2:]) for name, x in maps.items()}
    assert sizes == {
        "refine5": (3, 4), "refine4": (5, 7), "refine3": (9, 13), "refine2": (17, 25), "refine_sum4": (5, 7),
        "refine_sum3": (9, 13), "refine_sum2": (17, 25), "refine_half": (33, 49), "refine_full": (65, 97),
    }  # fmt: skip


def test_sizes_at_512():
    with torch.device("meta"):
        model = sg.GCN(21).eval()
        with sg.record(model, ["score2", "score5"]) as maps:
            assert model(torch.empty(1, 3, 512, 512)).shape == (1, 21, 512, 512)
        assert maps["score2"].shape == (1, 21, 129, 129) and maps["score5"].shape == (1, 21, 17, 17)


def test_imagenet_weights_fit():
    theirs = torchvision.models.resnet50(weights=None).state_dict()
    model = sg.GCN(2, depth=50, k=3)
    sg.load_imagenet(model, theirs)
    assert torch.equal(model.backbone.layer4[2].conv2.weight, theirs["layer4.2.conv2.weight"])


def test_maps_in_another_order(model):
    maps = model.backbone(normalize(torch.rand(1, 3, 65, 97)))
    assert model.decode(maps, (65, 97)).shape == (1, 5, 65, 97)
    assert model.decode(maps, (64, 80)).shape == (1, 5, 64, 80)  # padded to the same
    for wrong in (maps[::-1], maps[:3], [maps[1], maps[0], *maps[2:]], [*maps[:3], maps[3][..., :-1]]):
        with pytest.raises(ValueError, match=r"stride 4, 8, 16, 32 in this order.*\(16, 17, 25\).* 65 x 97, got \["):
            model.decode(wrong, (65, 97))
    with pytest.raises(ValueError, match="picture of 32 x 32"):
        model.decode(maps, (32, 32))


def test_kernels_longer_than_twice_the_map():
    images = torch.rand(1, 3, 96, 128)
    model = sg.GCN(5, depth=14, k=11, width=1 / 16).eval()
    with pytest.warns(UserWarning, match=r"k=11 is too long for the map of stride 32, 4 x 5 .*k=9 reaches") as seen:
        model(images)
        model(images)
    assert len(seen) == 1
    with warnings.catch_warnings(action="error"):
        sg.GCN(5, depth=14, k=9, width=1 / 16).eval()(images)
        sg.GCN(5, depth=14, k=(15, 15, 15, 7), width=1 / 16).eval()(images)


@torch.no_grad()
def test_taps_beyond_the_map_do_nothing(block):
    """On 3 x 3 cells, k=7 has taps at distance 3 from its middle, and k=5 none."""
    x = torch.randn(1, 6, 3, 3).double()
    before = block(x)
    for conv in (*block.down_then_across, *block.across_then_down):
        far = conv.weight.view(*conv.weight.shape[:2], 7)
        far[..., [0, 6]] = 9.0
    assert torch.equal(block(x), before)
    far[..., [1]] = 9.0
    assert not torch.equal(block(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"k": 4}, "k must be odd and at least 1.*got 4"), ({"k": 0}, "k must be odd"), ({"k": (3, 3, 3)}, "one number or four.*got 3"),
     ({"k": (3, 3, 3, 2)}, "got 2"), ({"k": 4, "block": "stack"}, "k must be odd"), ({"k": 6, "block": "trivial"}, "k must be odd"),
     ({"block": "graph"}, "block must be one of gcn, trivial, stack, got 'graph'"), ({"depth": 18}, "depth must be one of"),
     ({"num_classes": 0}, "num_classes must be")],
)  # fmt: skip
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sg.GCN(**{"num_classes": 3, "depth": 14, "width": 1 / 16, **arguments})

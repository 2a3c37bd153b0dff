"""DeconvNet against the paper and the release (facts: prototxts and inference code of the DeconvNet release)."""

import copy
import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segedu as sg
from segedu.layers import pool_with_switches, unpool
from segedu.models import deconvnet
from segedu.models.deconvnet import DeconvNet, Ensemble, ObjectCrops, OverProposals, ProposalCrops, grid_boxes


def learnable(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return DeconvNet(21).eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return DeconvNet(3, size=64, width=1 / 16).eval()


# ---- the paper: counts, sizes (meta device)


def test_parameter_counts_of_the_release(paper):
    with torch.device("meta"):
        plain = DeconvNet(21, batch_norm=False)
        assert [learnable(DeconvNet(k)) for k in (11, 12)] == [251_805_003, 251_805_068]
    assert learnable(paper) == 251_805_653
    assert learnable(plain) == 251_772_245
    weights = sum(p.numel() for p in plain.parameters() if p.ndim == 4)
    assert (weights, learnable(plain) - weights) == (251_755_520, 16_725)


def test_blocks_of_the_release(paper):
    stages = [getattr(paper, f"stage{i}") for i in range(1, 6)]
    decoder = [getattr(paper, f"deconv{i}") for i in range(1, 6)]
    assert learnable(*stages) == 14_723_136
    assert learnable(paper.fc6, paper.norm6, paper.fc7, paper.norm7) == 119_562_240
    assert learnable(paper.fc6_deconv) == 102_761_984
    assert learnable(*decoder) == 14_756_928
    assert learnable(paper.score) == 1_365
    fully_connected = learnable(paper.fc6, paper.norm6, paper.fc7, paper.norm7, paper.fc6_deconv)
    assert round(fully_connected / learnable(paper), 3) == 0.883


def test_29_batch_norms_start_as_in_the_release_and_there_is_no_dropout(paper, small):
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 29
    assert all((m.weight == 1).all() and torch.allclose(m.bias, torch.tensor(0.001)) for m in norms)
    assert not any(isinstance(m, nn.Dropout) for m in paper.modules())
    decoder = [m.weight for m in small.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(decoder) == 1 + 3 + 3 + 3 + 2 + 2
    spread = torch.cat([w.flatten() for w in decoder]).std().item()
    assert spread == pytest.approx(0.01 * 4, rel=0.01)  # a 16th of the channels: 4 times the paper's 0.01


def test_every_map_has_the_paper_s_size(paper):
    sizes = {
        "stage1": (64, 224), "stage2": (128, 112), "stage3": (256, 56), "stage4": (512, 28), "stage5": (512, 14),
        "fc6": (4096, 1), "fc7": (4096, 1), "fc6_deconv": (512, 7),
        "unpool5": (512, 14), "deconv5": (512, 14), "unpool4": (512, 28), "deconv4.5": (512, 28), "deconv4": (256, 28),
        "unpool3": (256, 56), "deconv3.5": (256, 56), "deconv3": (128, 56), "unpool2": (128, 112),
        "deconv2.2": (128, 112), "deconv2": (64, 112), "unpool1": (64, 224), "deconv1": (64, 224), "score": (21, 224),
    }  # fmt: skip
    with sg.record(paper, sizes) as maps:
        logits = paper(torch.empty(1, 3, 224, 224, device="meta"))
    assert {name: tuple(m.shape[1:3]) for name, m in maps.items()} == sizes
    assert logits.shape == (1, 21, 224, 224)


def test_code_depends_on_the_whole_picture():
    """Facts 4.3: the field of fc7 is 404 pixels, more than 224. FCN has the same trunk and takes larger pictures."""
    with torch.device("meta"):
        assert sg.receptive_field(sg.FCN(21), "fc7").size == 404
    model = DeconvNet(3, width=1 / 16).eval()
    image = torch.rand(1, 3, 224, 224, requires_grad=True)
    model.encode(image)[0].sum().backward()
    assert (image.grad[0].abs().sum(0)[[0, 0, -1, -1], [0, -1, 0, -1]] > 0).all()


def test_ledger_of_a_model_of_one_size(paper):
    ledger = sg.summary(paper, (224, 224))
    fields = {row.name: row.field and row.field.size for row in ledger.rows}
    assert [fields[f"stage{i}"] for i in range(1, 5)] == [5, 14, 40, 92]
    assert fields["fc7"] is None and fields["deconv1"] is None  # no cell whose field lies inside the picture


# ---- deconvolution and unpooling


def test_stride_1_deconvolution_is_a_convolution_with_the_flipped_kernel(small):
    deconv = small.deconv4[0].double()
    x = torch.randn(1, deconv.in_channels, 8, 8, dtype=torch.float64)
    assert deconv.stride == (1, 1) and deconv(x).shape[-2:] == x.shape[-2:]
    flipped = F.conv2d(x, deconv.weight.flip(2, 3).transpose(0, 1), deconv.bias, padding=1)
    torch.testing.assert_close(deconv(x), flipped, rtol=0, atol=1e-13)
    deconv.float()


def test_deconvolution_is_the_adjoint_of_convolution(small):
    weight = small.deconv4[0].weight.double()
    x = torch.randn(1, weight.shape[1], 8, 8, dtype=torch.float64)
    y = torch.randn(1, weight.shape[0], 8, 8, dtype=torch.float64)
    left = (F.conv2d(x, weight, padding=1) * y).sum()
    right = (x * F.conv_transpose2d(y, weight, padding=1)).sum()
    torch.testing.assert_close(left, right)


def test_fc6_deconv_is_a_linear_map_of_the_code():
    layer = DeconvNet(3, width=1 / 16).fc6_deconv[0].double()
    code = torch.randn(2, layer.in_channels, 1, 1, dtype=torch.float64)
    linear = (code.flatten(1) @ layer.weight.flatten(1)).view(2, -1, 7, 7) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(code), linear)


@pytest.mark.parametrize("k", range(1, 6))
def test_unpooling_puts_values_where_pool_k_found_its_maxima(small, k):
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), sg.record(small, [f"stage{k}"]) as maps:
        _, switches = small.encode(images)
    stage, switch = maps[f"stage{k}"], switches[k - 1]
    dense = torch.rand(switch.shape) + 1
    out = getattr(small, f"unpool{k}")(dense, switch)
    assert out.shape == stage.shape
    assert (out != 0).float().mean() == 0.25
    n, c, h, w = switch.shape
    for window in np.ndindex(h, w):  # by hand: the maximum's place in each window
        rows, columns = slice(2 * window[0], 2 * window[0] + 2), slice(2 * window[1], 2 * window[1] + 2)
        seen = stage[:, :, rows, columns].reshape(n, c, 4).argmax(2)
        assert torch.equal(out[:, :, rows, columns].reshape(n, c, 4).argmax(2), seen)
    assert torch.equal(F.max_pool2d(out, 2), dense)


def test_pooling_with_stride_1_would_break_unpooling():
    """Facts 4.8 item 9: four windows share one maximum, so four values want one place."""
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 5
    pooled, switches = F.max_pool2d(x, 2, stride=1, return_indices=True)
    assert pooled.flatten().tolist() == [5, 5, 5, 5] and switches.flatten().tolist() == [4, 4, 4, 4]
    pooled, switches = pool_with_switches(x)
    assert len(set(switches.flatten().tolist())) == 4  # stride 2: each window has its own place
    assert torch.equal(unpool(pooled, switches, like=x), x)


def test_forward_is_decode_of_encode_and_the_switches_matter(small):
    a, b = torch.rand(2, 1, 3, 64, 64)
    with torch.no_grad():
        code, switches = small.encode(a)
        _, others = small.encode(b)
        assert code.shape == (1, 256, 1, 1)
        assert torch.equal(small(a), small.decode(code, switches))
        assert not torch.equal(small.decode(code, switches), small.decode(code, others))


def test_load_imagenet_fills_13_convolutions_fc6_and_fc7():
    from torchvision.models import vgg16

    with torch.device("meta"):
        names = vgg16().state_dict()
    torch.manual_seed(0)
    state = {name: torch.randn(1).expand(value.shape) for name, value in names.items()}  # no memory for the numbers
    with torch.device("meta"):
        model = DeconvNet(21)
    for layer in (model.fc6, model.fc7, *(m for i in range(1, 6) for m in getattr(model, f"stage{i}")[::3])):
        layer.to_empty(device="cpu")
    sg.load_imagenet(model, state)
    loaded = [m for i in range(1, 6) for m in getattr(model, f"stage{i}")[::3]] + [model.fc6, model.fc7]
    keys = [key for key in names if key.endswith("weight") and key != "classifier.6.weight"]
    assert len(loaded) == len(keys) == 15
    for layer, key in zip(loaded, keys, strict=True):
        assert layer.weight.flatten()[0] == layer.weight.flatten()[-1] == state[key].flatten()[0]
        assert layer.bias[0] == state[key.replace("weight", "bias")][0]
    with torch.device("meta"):
        narrow = DeconvNet(21, size=128)
    with pytest.raises(ValueError, match=r"classifier\.0"):
        sg.load_imagenet(narrow, state)


# ---- proposals


def test_grid_goes_from_the_whole_picture_to_small_windows():
    image = torch.rand(3, 96, 128)
    boxes = grid_boxes(image)
    assert boxes.shape == (55, 4) and boxes.dtype == torch.long
    assert boxes[0].tolist() == [0, 0, 96, 128]
    assert boxes[1:5].tolist() == [[0, 0, 64, 86], [0, 42, 64, 128], [32, 0, 96, 86], [32, 42, 96, 128]]
    assert boxes[5].tolist() == [24, 32, 72, 96]  # the middle window of 3 x 3
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    assert sorted(areas[:14], reverse=True) == areas[:14] and max(areas[30:]) < min(areas[14:30])
    assert [len(grid_boxes(image, n)) for n in (1, 2, 3, 4)] == [1, 5, 14, 30]
    for height, width in ((1, 1), (5, 3), (97, 31)):  # every level covers every pixel
        cover = torch.zeros(height, width)
        for top, left, bottom, right in grid_boxes(torch.rand(3, height, width)).tolist()[30:]:
            cover[top:bottom, left:right] += 1
        assert cover.min() >= 1
    with pytest.raises(ValueError, match="levels must be at least 1"):
        grid_boxes(image, 0)


class Bright(nn.Module):
    """Scores that are easy to follow by hand: the colours of the picture, less 0.5."""

    size = 16

    def forward(self, images):
        return images - 0.5


def given(*boxes):
    return lambda image: torch.tensor(boxes).reshape(-1, 4)


@pytest.mark.parametrize("aggregate", ["max", "sum"])
def test_aggregation_by_hand(aggregate):
    """Boxes of 16 x 16 are not resized at all, so each map is the picture's own part less 0.5."""
    image = torch.rand(3, 20, 30)
    a, b = [0, 0, 16, 16], [4, 10, 20, 26]
    out = OverProposals(Bright(), given(a, b), aggregate=aggregate)(image[None])[0]
    maps = torch.zeros(2, 3, 20, 30)
    for k, (top, left, bottom, right) in enumerate((a, b)):
        maps[k, :, top:bottom, left:right] = image[:, top:bottom, left:right] - 0.5
    expected = maps.sum(0) if aggregate == "sum" else maps.amax(0).clamp(min=0)
    torch.testing.assert_close(out, expected)


def test_order_of_proposals_does_not_matter_and_more_can_only_raise_the_maximum(small):
    model = copy.deepcopy(small)
    nn.init.normal_(model.score.weight, std=100.0)  # scores of an untrained net are near 0
    image = torch.rand(1, 3, 48, 80)
    boxes = grid_boxes(image[0])[[0, 2, 7]].tolist()
    with torch.no_grad():
        results = [OverProposals(model, given(*order))(image) for order in permutations(boxes)]
        fewer = OverProposals(model, given(*boxes), limit=1)(image)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert (results[0] >= fewer - 1e-6).all() and (results[0] > fewer + 1e-3).any()


def test_pixels_in_no_box_are_class_0():
    image = torch.rand(1, 3, 20, 30)
    image[:, 0] = 0  # class 0 scores below 0 everywhere
    logits = OverProposals(Bright(), given([0, 0, 16, 16]))(image)
    assert (logits[..., 16:, :] == 0).all() and (logits[..., 16:] == 0).all()
    labels = logits.argmax(1)[0]
    assert (labels[16:] == 0).all() and (labels[:, 16:] == 0).all() and (labels[:16, :16] > 0).any()


def test_any_size_works_with_evaluate_and_predict(small):
    model = OverProposals(small, limit=5).eval()
    data = [(torch.rand(3, 31, 47), torch.randint(0, 3, (31, 47))) for _ in range(2)]
    scores = sg.evaluate(model, data, device="cpu")
    assert scores.matrix.sum() == 2 * 31 * 47
    assert torch.equal(sg.predict(model, data[0][0]), model(data[0][0][None]).argmax(1)[0])
    images = torch.rand(2, 3, 40, 33, requires_grad=True)
    model(images).sum().backward()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()


def test_crf_comes_last(small):
    calls = []

    def crf(image, logits):
        calls.append((image, logits))
        return logits.softmax(0)

    images = torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        logits = OverProposals(small, limit=3)(images)
        out = OverProposals(small, limit=3, crf=crf)(images)
    assert torch.equal(calls[0][0], images[0]) and torch.equal(calls[0][1], logits[0])
    torch.testing.assert_close(out, logits.log_softmax(1))


def test_ensemble_is_the_mean_of_the_probabilities(small):
    first, second = OverProposals(small, limit=2), sg.FCN(3, pad=1, width=1 / 16).eval()
    nn.init.normal_(second.score_fr.weight)
    images = torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        mean = (first(images).softmax(1) + second(images).softmax(1)) / 2
        out = Ensemble(first, second)(images)
    torch.testing.assert_close(out.exp(), mean)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(1, 40, 33))


# ---- training data


class Plan(list):
    """Items (image, target) with classes; rows of digits are targets."""

    classes = ["ground", "house", "pole"]
    palette = torch.zeros(3, 3, dtype=torch.uint8)


def plan(*rows):
    target = torch.tensor([[int(c) if c != "." else 255 for c in row] for row in rows])
    image = torch.stack([target / 255, torch.zeros(target.shape), torch.ones(target.shape)])
    return Plan([(image, target)])


PICTURE = plan(
    "000000000000",
    "011110000200",
    "011110000200",
    "011110000200",
    "011110000200",
    "000000110000",
    "000000110000",
    "0000000000..",
)


def test_object_crops_hold_one_object_each():
    crops = ObjectCrops(PICTURE, ["house", "pole"], size=12, smallest=4)
    assert len(crops) == 3 and crops.classes == Plan.classes
    boxes = [box for *_, box in crops.found]
    assert boxes == [(1, 1, 5, 5), (5, 6, 7, 8), (1, 9, 5, 10)]
    image, target = crops[0]  # 4 pixels, times 1.5, is 6: rows 0 to 5 and columns 0 to 5 of the picture, twice as large
    image, target = ObjectCrops(PICTURE, ["house", "pole"], size=12, smallest=4, enlarge=1.5)[0]
    assert image.shape == (3, 12, 12) and target.dtype == torch.long
    assert torch.equal(target, PICTURE[0][1][:6, :6].repeat_interleave(2, 0).repeat_interleave(2, 1))
    for k in range(3):
        _, target = ObjectCrops(PICTURE, ["house", "pole"], size=12, smallest=4, enlarge=9)[k]
        assert {c for c in target.unique().tolist() if c != 255} == {0, crops.found[k][1]}
    _, target = ObjectCrops(PICTURE, ["house", "pole"], size=12, smallest=4, enlarge=9, others=0)[2]
    assert (target == 1).sum() == 0 and (target == 2).sum() > 0
    assert len(ObjectCrops(PICTURE, ["house", "pole"], size=12, smallest=5)) == 1


def test_enlarged_boxes_are_square_and_cut_at_the_border():
    assert deconvnet.enlarged((10, 20, 30, 30), 1.2, 100, 100) == (8, 13, 32, 37)
    assert deconvnet.enlarged((0, 0, 10, 4), 2, 12, 9) == (0, 0, 12, 9)


def test_proposal_crops_overlap_an_object_and_are_balanced():
    house, near, pole, ground = [1, 1, 5, 5], [1, 1, 5, 7], [1, 9, 5, 10], [5, 0, 8, 4]
    data = ProposalCrops(PICTURE, given(house, near, pole, ground), ["house", "pole"], size=8, smallest=4)
    assert [box for _, box in data.found] == [house, near, pole, pole]  # 16/24 is above a half; the pole comes twice
    image, target = data[0]
    assert torch.equal(target, torch.ones(8, 8, dtype=torch.long)) and image.shape == (3, 8, 8)
    exact = ProposalCrops(PICTURE, given(house, near), ["house"], size=8, overlap=0.7, smallest=4)
    assert [box for _, box in exact.found] == [house]
    whole = ProposalCrops(PICTURE, given([0, 0, 8, 12]), ["house"], size=24, overlap=0.1, smallest=4)
    assert set(whole[0][1].unique().tolist()) == {0, 1, 2, 255}  # all classes are labelled


def test_overlap_is_intersection_over_union():
    from torchvision.ops import box_iou

    torch.manual_seed(0)
    corner = torch.randint(0, 50, (20, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 50, (20, 2))], 1)
    torch.testing.assert_close(deconvnet.overlaps(boxes[:12], boxes[12:]), box_iou(boxes[:12], boxes[12:]))


def test_crops_of_toytown_train_a_step():
    data = sg.Toytown("train", 6)
    recipe = sg.recipes.Recipe(steps=2, batch=2, lr=1e-3, optimizer="adamw", scale=(250 / 224, 250 / 224), flip=True)
    for crops in (
        ObjectCrops(data, ["car", "building"], size=32),
        ProposalCrops(data, grid_boxes, ["building", "tree"], size=32),
    ):
        first, again = crops[0], crops[0]
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert first[0].min() >= 0 and first[0].max() <= 1
        run = sg.fit(DeconvNet(11, size=32, width=1 / 16), crops, recipe, device="cpu", progress=False)
        assert len(run.loss) == 2 and all(map(math.isfinite, run.loss))


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeconvNet(3, size=100), "multiple of 32"),
        (lambda: DeconvNet(3, size=0), "multiple of 32"),
        (lambda: DeconvNet(0), "num_classes must be at least 1"),
        (lambda: OverProposals(Bright(), limit=0), "limit must be at least 1"),
        (lambda: OverProposals(Bright(), aggregate="mean"), 'must be "max" or "sum"'),
        (lambda: ObjectCrops(PICTURE, ["boat"]), "things must be some of ground, house, pole; got boat"),
        (lambda: ObjectCrops(PICTURE, []), "got none"),
        (lambda: ObjectCrops(PICTURE, ["house"], smallest=99), "lower `smallest`"),
        (lambda: ProposalCrops(PICTURE, grid_boxes, ["pole"], smallest=4, overlap=0.9), "no proposal overlaps"),
        (lambda: ProposalCrops(PICTURE, given([0, 0, 9, 9]), ["house"], smallest=4), "reaches outside"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(1, 3, 65, 64), (1, 3, 128, 128), (1, 3, 32, 32)])
def test_another_size_says_what_to_do(small, shape):
    with pytest.raises(ValueError, match=r"takes pictures of 64 x 64, got .* use OverProposals"):
        small(torch.rand(shape))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.empty(0, 4, dtype=torch.long), "no proposals for this picture, at least 1"),
        (torch.tensor([[0, 0, 20, 30], [0, 0, 21, 30]]), r"box \[0, 0, 21, 30\] .* outside the picture of 20 x 30"),
        (torch.tensor([[-1, 0, 5, 5]]), "reaches outside"),
        (torch.tensor([[5, 5, 5, 9]]), "is empty"),
        (torch.tensor([[0.0, 0, 5, 5]]), r"whole numbers \(N, 4\)"),
        (torch.tensor([0, 0, 5, 5]), r"whole numbers \(N, 4\)"),
        ([[0, 0, 5, 5]], "got list"),
    ],
)
def test_wrong_proposals_are_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        OverProposals(Bright(), lambda image: boxes)(torch.rand(1, 3, 20, 30))


def test_switches_of_another_size_are_refused(small):
    code, switches = small.encode(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="one switch for each value"):
        small.decode(code, switches[::-1])

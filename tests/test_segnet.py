"""SegNet against the paper, the released prototxts, torch and arithmetic by hand."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segedu as sg
from segedu.layers import pool_with_switches, unpool
from segedu.models.segnet import SegNet, SegNetBasic, balanced_loss, median_frequency, response_norm

DECODERS = ("indices", "encoder-addition", "single-channel", "bilinear")


def learnable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def weights_alone(model):
    """Kernels of convolutions: what Table 1 of the paper counts."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


# ---- the paper and the release: counts, sizes, fields (meta device)


@pytest.mark.parametrize(
    ("classes", "count"), [(11, 29_449_355), (12, 29_449_932), (21, 29_455_125), (37, 29_464_357), (38, 29_464_934)]
)
def test_parameter_counts_of_segnet(classes, count):
    with torch.device("meta"):
        model = SegNet(classes)
    encoder = nn.ModuleList([getattr(model, f"stage{i}") for i in range(1, 6)])
    assert learnable(model) == count
    assert learnable(encoder) == 14_723_136
    assert weights_alone(encoder) == 14_710_464
    assert sum(m.bias.numel() for m in encoder.modules() if isinstance(m, nn.Conv2d)) == 4_224


@pytest.mark.parametrize(("classes", "count"), [(11, 1_416_587), (12, 1_416_652)])
def test_parameter_counts_of_segnet_basic(classes, count):
    with torch.device("meta"):
        model = SegNetBasic(classes)
    assert learnable(model) == count
    assert learnable(nn.ModuleList([getattr(model, f"stage{i}") for i in range(1, 5)])) == 612_288


@pytest.mark.parametrize(
    ("decoder", "count"),
    [("indices", 1_415_040), ("encoder-addition", 1_415_040), ("single-channel", 624_768), ("bilinear", 624_768)],
)
def test_kernel_weights_of_the_decoder_variants(decoder, count):
    with torch.device("meta"):
        assert weights_alone(SegNetBasic(11, decoder=decoder)) == count


def test_segnet_drops_what_fcn_spends_on_fc6_and_fc7():
    with torch.device("meta"):
        fcn = sg.FCN(11)
        fully_connected = learnable(nn.ModuleList([fcn.fc6, fcn.fc7]))
        assert fully_connected > learnable(fcn) - learnable(SegNet(11))


def test_each_decoder_takes_the_channels_of_its_pool():
    with torch.device("meta"):
        model = SegNet(11)
        _, switches = model.encode(torch.empty(1, 3, 360, 480))
    channels = [getattr(model, f"decode{i}")[0].in_channels for i in (5, 4, 3, 2, 1)]
    assert channels == [512, 512, 256, 128, 64] == [s.shape[1] for s in reversed(switches)]


def test_sizes_of_the_release_round_up():
    """upsample5 and upsample4 of segnet_train.prototxt: 30 x 23 and 60 x 45 for a picture of 480 x 360."""
    with torch.device("meta"):
        code, switches = SegNet(11).encode(torch.empty(1, 3, 360, 480))
    assert [tuple(s.shape[-2:]) for s in switches] == [(180, 240), (90, 120), (45, 60), (23, 30), (12, 15)]
    assert code.shape == (1, 512, 12, 15)


@pytest.mark.parametrize("build", [SegNet, SegNetBasic])
def test_output_is_as_large_as_the_input_for_every_size(build):
    with torch.device("meta"):
        model = build(5, width=1 / 16)
        for height in (1, 2, 13, *range(32, 65)):
            assert model(torch.empty(1, 3, height, 47)).shape == (1, 5, height, 47)


def test_receptive_field_of_segnet_basic():
    """Sec. 3.2: 106 x 106. A 2x2 pool adds one step of the map it pools."""
    with torch.device("meta"):
        model = SegNetBasic(11)
    found = [sg.receptive_field(model, f"stage{i}") for i in range(1, 5)]
    assert [f.size for f in found] == [7, 20, 46, 98]
    assert [f.size + f.stride for f in found] == [8, 22, 50, 106]
    assert 2 * found[-1].stride == 16


def test_receptive_field_of_the_encoder_is_that_of_vgg16():
    with torch.device("meta"):
        field = sg.receptive_field(SegNet(11), "stage5")
    assert (field.size, field.size + field.stride, 2 * field.stride) == (196, 212, 32)


def test_boundary_tolerance_at_camvids_size():
    """0.75 % of the diagonal is 4.5 px: an edge 4 px off counts as found, one 5 px off does not."""
    columns = torch.arange(480).expand(360, 480)
    target = (columns >= 100).long()
    found = [sg.metrics.boundary_f1((columns >= 100 + off).long(), target, 2) for off in (4, 5)]
    assert found[0] == 1 and found[1] < 1


# ---- the encoder's start


def test_load_imagenet_fills_the_13_convolutions_in_order():
    from torchvision.models import vgg16

    with torch.device("meta"):
        names = {k: v.shape for k, v in vgg16(weights=None).features.state_dict().items()}
    made = {f"features.{name}": torch.full(shape, i / 100) for i, (name, shape) in enumerate(names.items())}
    model = SegNet(11)
    score = model.score.weight.clone()
    sg.load_imagenet(model, made)
    stages = nn.ModuleList([getattr(model, f"stage{i}") for i in range(1, 6)])
    convs = [m for m in stages.modules() if isinstance(m, nn.Conv2d)]
    for conv, name in zip(convs, [n for n in made if n.endswith("weight")], strict=True):
        assert torch.equal(conv.weight, made[name])
        assert torch.equal(conv.bias, made[name.replace("weight", "bias")])
    assert torch.equal(model.score.weight, score)


def test_batch_norm_starts_as_in_the_prototxt():
    for model in (SegNet(3, width=1 / 16), SegNetBasic(3, width=1 / 16)):
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == (25 if isinstance(model, SegNet) else 8)
        assert all((m.weight == 1).all() and (m.bias == 0.001).all() for m in norms)


def test_response_norm_is_torchs_over_five_channels():
    images = torch.rand(2, 3, 9, 8)
    theirs = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1)(255 * images)
    torch.testing.assert_close(response_norm(images), theirs)


# ---- unpooling


def test_seed_example_by_hand():
    """Values 6, 8, 3, 4 at (1, 1), (1, 3), (2, 0), (3, 3)."""
    x = torch.tensor([[1.0, 2, 5, 3], [4, 6, 7, 8], [3, 1, 2, 0], [1, 2, 3, 4]])[None, None]
    pooled, switches = pool_with_switches(x)
    assert pooled.flatten().tolist() == [6, 8, 3, 4]
    assert [divmod(i, 4) for i in switches.flatten().tolist()] == [(1, 1), (1, 3), (2, 0), (3, 3)]
    by_hand = torch.tensor([[0.0, 0, 0, 0], [0, 6, 0, 8], [3, 0, 0, 0], [0, 0, 0, 4]])
    assert torch.equal(unpool(pooled, switches, like=x)[0, 0], by_hand)


@pytest.mark.parametrize("size", [(12, 16), (45, 60), (7, 5)])
def test_unpooled_maps_hold_one_value_in_each_window_at_the_maximum(size):
    torch.manual_seed(0)
    x = torch.rand(2, 3, *size) + 0.1
    pooled, switches = pool_with_switches(x)
    sparse = unpool(pooled, switches, like=x)
    there = sparse != 0
    assert torch.equal(sparse[there], x[there])
    windows = F.pad(there.float(), (0, size[1] % 2, 0, size[0] % 2)).unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2))
    assert (windows == 1).all()
    if size[0] % 2 == size[1] % 2 == 0:
        assert there.float().mean() == 0.25


def test_pooling_undoes_unpooling_only_where_values_are_not_negative():
    torch.manual_seed(0)
    _, switches = pool_with_switches(torch.rand(1, 2, 6, 8))
    p = torch.randn(1, 2, 3, 4)
    again, places = pool_with_switches(unpool(p, switches, like=torch.empty(6, 8)))
    assert torch.equal(again, p.relu())
    assert (p < 0).any() and not torch.equal(again, p)
    assert torch.equal(places[p > 0], switches[p > 0])


def test_unpooling_moves_with_the_switches():
    """Swap the columns inside each window: the decoder's input moves the same way."""
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 8)
    swapped = x.view(1, 2, 6, 4, 2).flip(-1).view(1, 2, 6, 8)
    ours = unpool(*pool_with_switches(swapped), like=x)
    assert torch.equal(ours.view(1, 2, 6, 4, 2).flip(-1).view(1, 2, 6, 8), unpool(*pool_with_switches(x), like=x))


def test_decoder_output_moves_with_the_switches():
    """A 7x7 decoder answers within 3 pixels of a switch, and follows it."""
    model = SegNetBasic(2, width=1 / 16).eval()
    x = torch.zeros(1, 4, 8, 8)
    x[0, 0, 4, 4] = 1
    centre = []
    for place in ((8, 8), (9, 9)):
        switches = torch.arange(8)[:, None] * 32 + torch.arange(8) * 2
        switches = switches.expand(1, 4, 8, 8).clone()
        switches[0, 0, 4, 4] = place[0] * 16 + place[1]
        with torch.no_grad():
            out = model.decode1(x, switches, like=torch.empty(16, 16))
            silent = model.decode1(torch.zeros_like(x), switches, like=torch.empty(16, 16))
        moved = (out - silent)[0].abs().sum(0).nonzero()
        assert moved.min(0).values.tolist() == [p - 3 for p in place]
        assert moved.max(0).values.tolist() == [p + 3 for p in place]
        centre.append((out - silent)[0, :, place[0], place[1]])
    torch.testing.assert_close(*centre)


def test_switches_of_another_size_are_named():
    pooled, switches = pool_with_switches(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="one switch for each value"):
        unpool(pooled, switches[:, :2], like=torch.empty(8, 8))
    with pytest.raises(ValueError, match=r"pooling 12 x 8 gives 6 x 4"):
        unpool(pooled, switches, like=torch.empty(12, 8))
    model = SegNet(2, width=1 / 16).eval()
    code, _ = model.encode(torch.rand(1, 3, 64, 64))
    _, foreign = model.encode(torch.rand(1, 3, 96, 64))
    with pytest.raises(ValueError, match="one switch for each value"):
        model.decode(code, foreign, like=torch.empty(96, 64))


# ---- the decoder


@pytest.mark.parametrize("decoder", DECODERS)
def test_basic_decoder_is_affine_in_the_code(decoder):
    """No ReLU: for fixed switches (and maps) and in evaluation mode, decode(a x + (1-a) y) = a decode(x) + ..."""
    torch.manual_seed(0)
    model = SegNetBasic(3, decoder=decoder, width=1 / 16).double().eval()
    images = torch.rand(1, 3, 40, 56, dtype=torch.float64)
    x, kept = model.encode(images)
    y = torch.randn_like(x)
    mixed = model.decode(0.3 * x + 0.7 * y, kept, like=images)
    torch.testing.assert_close(
        mixed, 0.3 * model.decode(x, kept, like=images) + 0.7 * model.decode(y, kept, like=images)
    )


def test_segnets_decoder_is_not_affine():
    torch.manual_seed(0)
    model = SegNet(3, width=1 / 16).double().eval()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    x, switches = model.encode(images)
    y = torch.randn_like(x)
    mixed = model.decode(0.3 * x + 0.7 * y, switches, like=images)
    apart = 0.3 * model.decode(x, switches, like=images) + 0.7 * model.decode(y, switches, like=images)
    assert not torch.allclose(mixed, apart, rtol=1e-3)


def test_what_crosses_to_the_decoder():
    images = torch.rand(1, 3, 32, 48)
    _, switches = SegNet(3, width=1 / 16).encode(images)
    assert [s.dtype for s in switches] == [torch.long] * 5
    for decoder in DECODERS:
        _, kept = SegNetBasic(3, decoder=decoder, width=1 / 16).encode(images)
        shapes = [(1, 4, 16, 24), (1, 4, 32, 48)] if decoder == "encoder-addition" else [(1, 4, 16, 24)]
        assert [tuple(t.shape) for t in kept[0]] == shapes


def test_adding_decoder_adds_the_encoders_maps():
    torch.manual_seed(0)
    plain, adding = SegNetBasic(3, width=1 / 16), SegNetBasic(3, decoder="encoder-addition", width=1 / 16)
    adding.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        _, ((switches, maps), *_) = adding.eval().encode(images)
        x = torch.randn(1, 4, 16, 24)
        ours = adding.decode1(x, switches, maps, like=images)
        torch.testing.assert_close(ours, plain.eval().decode1(x, switches, like=images) + maps)


def test_bilinear_decoder_does_not_look_at_the_switches():
    model = SegNetBasic(3, decoder="bilinear", width=1 / 16).eval()
    images = torch.rand(1, 3, 33, 50)
    with torch.no_grad():
        code, kept = model.encode(images)
        foreign = tuple((torch.zeros_like(s),) for (s,) in kept)
        assert torch.equal(model.decode(code, kept, like=images), model.decode(code, foreign, like=images))


# ---- class balancing


def test_median_frequency_by_hand():
    """Frequencies: class 0 6/8, class 1 3/16 (void counts to the picture's size), class 3 5/8; class 2 never occurs."""
    first = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 255]])
    second = torch.tensor([[3, 3, 3, 3], [3, 1, 1, 255]])
    weights = median_frequency([first, second], 4)
    assert weights.tolist() == pytest.approx([5 / 6, 10 / 3, 0, 1])
    pictures = [(torch.zeros(3, 2, 4), first), (torch.zeros(3, 2, 4), second)]
    assert torch.equal(median_frequency(pictures, 4), weights)
    assert torch.equal(median_frequency(torch.stack([first, second]), 4), weights)


def test_median_frequency_of_camvid():
    """Recomputed from the released labels. The published weights (sign symbol 9.6446) do not follow from them."""
    root = os.environ.get("SEGEDU_DATA")
    if not root or not (Path(root) / "camvid").is_dir():
        pytest.skip("needs CamVid: set SEGEDU_DATA to the folder that has camvid/")
    expected = [0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]
    found = median_frequency(sg.CamVid("train"), 11)
    assert found.tolist() == pytest.approx(expected, abs=5e-5)
    assert (found == 1).sum() == 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.full((2, 2), 7)], r"labels must be 0 to 3 or 255 \(void\), got 7 in target 0"),
        ([torch.zeros(2, 2).long(), torch.full((2, 2), -1)], r"got -1 in target 1"),
        ([torch.full((2, 2), 255)], "no pixel of 1 targets has a class"),
        ([], "no pixel of 0 targets has a class"),
    ],
)
def test_median_frequency_names_wrong_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        median_frequency(targets, 4)


def test_balanced_loss_divides_by_the_number_of_pixels():
    """Caffe's normaliser; torch's weighted mean is larger by 1 / (mean weight of the labels)."""
    torch.manual_seed(0)
    weights = torch.tensor([0.2, 1.0, 5.0])
    logits, target = torch.randn(2, 3, 6, 8), torch.randint(0, 3, (2, 6, 8))
    target[0, :2] = 255
    valid = target != 255
    nll = -logits.log_softmax(1).gather(1, target.where(valid, 0)[:, None])[:, 0]
    by_hand = (weights[target.where(valid, 0)] * nll)[valid].sum() / valid.sum()
    ours = balanced_loss(weights)(lambda _: logits, torch.empty(0), target)
    torch.testing.assert_close(ours, by_hand)
    torchs = F.cross_entropy(logits, target, weights, ignore_index=255)
    torch.testing.assert_close(ours / torchs, weights[target[valid]].mean())


def test_balanced_loss_of_equal_weights_is_the_plain_loss_and_void_gives_zero():
    logits, target = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    plain = balanced_loss(torch.ones(3))
    torch.testing.assert_close(plain(lambda _: logits, torch.empty(0), target), F.cross_entropy(logits, target))
    assert plain(lambda _: logits, torch.empty(0), torch.full_like(target, 255)) == 0


def test_balanced_training_runs_through_fit():
    data = [(torch.rand(3, 32, 32), torch.randint(0, 3, (32, 32))) for _ in range(4)]
    recipe = sg.recipes.Recipe(steps=3, batch=2, lr=1e-3, optimizer="adamw")
    run = sg.fit(
        SegNetBasic(3, width=1 / 16), data, recipe, loss=balanced_loss(median_frequency(data, 3)), progress=False
    )
    assert len(run.loss) == 3


# ---- wrong arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SegNet(0), "num_classes must be at least 1"),
        (lambda: SegNetBasic(0), "num_classes must be at least 1"),
        (lambda: SegNet(3, width=0), "width must be above 0"),
        (lambda: SegNetBasic(3, decoder="deconv"), "decoder must be"),
        (lambda: balanced_loss(torch.tensor([1.0, -1.0])), "weights must be K numbers"),
        (lambda: balanced_loss(torch.ones(2, 2)), "weights must be K numbers"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("build", [SegNet, SegNetBasic])
def test_wrong_images_are_named(build):
    model = build(3, width=1 / 16)
    with pytest.raises(ValueError, match="add the batch axis"):
        model(torch.rand(3, 32, 32))
    with pytest.raises(TypeError, match="use images / 255"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))

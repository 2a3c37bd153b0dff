"""Auto-DeepLab against the paper and counting by hand: counts, the trellis, the relaxation, decoding, the search."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken
from torch import nn
from torch.utils.data import TensorDataset

import segedu as sg
from segedu.layers import grid_pad, normalize
from segedu.models.autodeeplab import (
    OPERATORS,
    PUBLISHED_CELL,
    PUBLISHED_PATH,
    AutoDeepLab,
    DiscreteCell,
    MixedBlock,
    SuperNet,
    decode_cell,
    drop_samples,
    operator,
    path_probability,
    transitions,
    trellis,
    viterbi,
)
from segedu.search import search
from segedu.training import pixel_loss

FEW = ("sep3", "atrous3", "max3", "skip", "zero")
SPACE = {"layers": 3, "filters": 2, "blocks": 2, "operators": FEW, "reach": 8, "width": 1 / 16}
SMALL = {"filters": 2, "rates": (1, 2, 3), "width": 1 / 16}
RECIPE = sg.recipes.Recipe(steps=6, batch=2, lr=0.05, least=0.002, crop=(32, 32))


def count(*parts):
    return sum(p.numel() for part in parts for p in part.parameters())


def paths(layers):
    """All paths, by trying all levels."""
    steps = ((a, b) for a in range(4) for b in range(4) if abs(a - b) <= 1)
    allowed = set(steps)
    for path in itertools.product(range(4), repeat=layers):
        if all(step in allowed for step in itertools.pairwise((0, *path))):
            yield path


def probability(steps, path):
    """Of a path, one factor after the other."""
    value, level = 1.0, 0
    for row, target in zip(steps.tolist(), path, strict=True):
        value *= row[level][1 + target - level]
        level = target
    return value


@pytest.mark.parametrize(
    ("filters", "parameters", "backbone"),
    [(20, 10_147_427, 7_030_832), (32, 21_622_451, 17_612_096), (48, 44_424_691, 39_222_656)],
)
def test_counts_of_the_published_networks(filters, parameters, backbone):
    with torch.device("meta"):
        model = AutoDeepLab(19, filters=filters)
    assert count(model) == parameters
    assert count(model.stage1, model.stage2, model.cells) == backbone


def test_maps_of_the_published_network():
    with torch.device("meta"):
        model = AutoDeepLab(19).eval()
        images = torch.empty(1, 3, 769, 769)
        *_, before, last = maps = model.layers(images)
        assert model(images).shape == (1, 19, 769, 769) and model.scores(images).shape == (1, 19, 193, 193)
    assert [m.shape[1] for m in maps[2:]] == [100 * 2**level for level in PUBLISHED_PATH]
    assert [m.shape[-1] for m in maps] == [385, 193] + [
        {0: 193, 1: 97, 2: 49, 3: 25}[level] for level in PUBLISHED_PATH
    ]
    assert before.shape[-1] == 49 and last.shape[-1] == 97  # ends at stride 8
    assert model.reduce[0].in_channels == 100 and model.aspp.rates == (12, 24, 36)
    assert len(PUBLISHED_PATH) == 12 and {state for block in PUBLISHED_CELL for _, state in block} == set(range(6))


@pytest.mark.parametrize(
    ("path", "early", "rates"),
    [
        ((1, 2, 1), 8, (12, 24, 36)),
        ((0, 0), 20, (24, 48, 72)),
        ((0, 1, 0), 20, (24, 48, 72)),
        ((1, 2, 3), 8, (3, 6, 9)),
    ],
)
def test_the_decoder_takes_the_last_map_of_stride_4_before_the_path_leaves_it(path, early, rates):
    model = AutoDeepLab(3, filters=4, path=path, width=1 / 16)
    assert model.reduce[0].in_channels == early and model.aspp.rates == rates


@pytest.mark.parametrize("path", [(1, 2, 3, 2, 1, 0), (0, 1, 2, 3, 3), (1, 0, 1, 2, 2)])
def test_every_path_gives_maps_of_its_strides(path):
    model = AutoDeepLab(3, path=path, **SMALL).eval()
    images = torch.rand(1, 3, 50, 71)
    sides = [(m.shape[-2], m.shape[-1]) for m in model.layers(images)[2:]]
    height, width = grid_pad(images, 4 * 2 ** max(path)).shape[-2:]
    assert sides == [((height - 1) // (4 * 2**n) + 1, (width - 1) // (4 * 2**n) + 1) for n in path]
    assert model(images).shape == (1, 3, 50, 71) and model.scores(images).shape == (1, 3, 13, 18)


# The trellis


@pytest.fixture(scope="module")
def published():
    """The relaxed network at the paper's size."""
    with torch.device("meta"):
        return SuperNet(19)


def test_the_trellis_has_105_edges_and_45_cells(published):
    edges = trellis(12)
    assert edges.sum() == 105 and edges.shape == (12, 4, 3)
    assert sum(len(cells) for cells in published.cells) == 45
    outgoing = edges.sum(-1)
    assert outgoing[0].tolist() == [2, 0, 0, 0] and outgoing[1].tolist() == [2, 3, 0, 0]
    assert (outgoing[3:] == torch.tensor([2, 3, 3, 2])).all()


def test_paths_and_cells_are_as_many_as_the_paper_says():
    ways = torch.tensor([1, 0, 0, 0])
    for row in trellis(12):
        ways = sum(
            torch.tensor([ways[j] * row[j, 1 + i - j] if abs(i - j) <= 1 else 0 for i in range(4)]) for j in range(4)
        )
    assert ways.sum() == 75_025
    assert sum(1 for _ in paths(6)) == 233
    assert math.prod(((i + 1) * 8) ** 2 for i in range(1, 6)) == 556_627_761_561_600


def test_outgoing_probabilities_sum_to_1():
    beta = torch.randn(12, 4, 3, requires_grad=True)
    steps = transitions(beta)
    reached = trellis(12).any(-1)
    torch.testing.assert_close(steps.sum(-1), reached.float())
    assert (steps[~trellis(12)] == 0).all() and (steps[trellis(12)] > 0).all()
    steps[..., 0].sum().backward()
    assert beta.grad.isfinite().all() and (beta.grad[~trellis(12)] == 0).all()


def test_probabilities_of_all_paths_sum_to_1():
    torch.manual_seed(0)
    steps = transitions(torch.randn(12, 4, 3, dtype=torch.double))
    at = torch.tensor([1.0, 0, 0, 0], dtype=torch.double)
    for row in steps:  # dynamic programming over all 75,025
        at = sum(F.pad(at, (1, 1))[2 - k : 6 - k] * F.pad(row[:, k], (1, 1))[2 - k : 6 - k] for k in range(3))
    assert abs(at.sum().item() - 1) < 1e-12
    few = transitions(torch.randn(5, 4, 3, dtype=torch.double))
    every = [probability(few, path) for path in paths(5)]
    assert abs(sum(every) - 1) < 1e-12
    assert every == pytest.approx([path_probability(few, path) for path in paths(5)], rel=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_viterbi_is_enumeration(layers):
    torch.manual_seed(layers)
    for _ in range(10):
        steps = transitions(3 * torch.randn(layers, 4, 3, dtype=torch.double))
        assert viterbi(steps) == max(paths(layers), key=lambda path: probability(steps, path))


def test_viterbi_is_not_greedy():
    steps = transitions(torch.zeros(2, 4, 3))
    steps[0, 0], steps[1, 0], steps[1, 1] = (torch.tensor(row) for row in ([0, 0.6, 0.4], [0, 0.5, 0.5], [0.0, 1, 0]))
    assert viterbi(steps) == (1, 1)


def test_the_published_path_comes_back_from_its_own_beta():
    beta, level = torch.zeros(12, 4, 3), 0
    for row, target in zip(beta, PUBLISHED_PATH, strict=True):
        row[level, 1 + target - level] = 5
        level = target
    assert viterbi(transitions(beta)) == PUBLISHED_PATH


# The cell


def test_the_published_cell_comes_back_from_its_own_alpha(published):
    alpha, first = torch.zeros(20, 8), 0
    for i, block in enumerate(PUBLISHED_CELL):
        for name, state in block:
            alpha[first + state, OPERATORS.index(name)] = 2
        first += 2 + i
    assert [set(block) for block in decode_cell(alpha)] == [set(block) for block in PUBLISHED_CELL]
    assert published.alpha.shape == (20, 8) and published.alpha.numel() == 160


def test_zero_is_no_strength_and_is_never_chosen():
    alpha = torch.zeros(5, 5)
    alpha[0, 4] = 9  # block 0: both states, whatever they are
    alpha[1, 2] = 1
    alpha[2, 4], alpha[2, 1] = 5, 4  # block 1: state 0 has a strong zero, the others are weak but stronger
    alpha[3, 0], alpha[4, 3] = 1, 1
    assert decode_cell(alpha, FEW) == ((("sep3", 0), ("max3", 1)), (("sep3", 1), ("skip", 2)))


def alone(op, name, j, c):
    """The operator of edge j out of a grouped one, as a module of its own."""
    own = operator(name, c).double()
    own.load_state_dict(
        {key: value[j * c : (j + 1) * c] if value.ndim else value for key, value in op.state_dict().items()}
    )
    return own.train(op.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_mixed_block_is_the_weighted_sum_over_edges_and_operators(training):
    torch.manual_seed(0)
    block = shaken(MixedBlock(3, 4, OPERATORS)).double().train(training)
    states, weights = torch.randn(2, 3, 4, 9, 11).double(), torch.rand(3, 8).double()
    expected = 0
    for j, (k, name) in itertools.product(range(3), enumerate(OPERATORS)):
        if name != "zero":
            expected = expected + weights[j, k] * alone(block.operators[name], name, j, 4)(states[:, j])
    torch.testing.assert_close(block(states, weights), expected)


ONE_STATE = ((("sep3", 0),), (("max3", 0), ("skip", 2)))
BOTH_STATES = ((("sep3", 0), ("atrous3", 1)), (("max3", 0), ("skip", 2)))


@torch.no_grad()
@pytest.mark.parametrize(
    ("path", "cell"),
    [((0, 1, 1, 2, 1), ONE_STATE), ((1, 2, 3, 3, 2), ONE_STATE), ((1, 0, 0, 1, 0), ONE_STATE), ((0, 0, 0, 0), BOTH_STATES),
     ((1, 1, 1, 1), BOTH_STATES)],
)  # fmt: skip
def test_one_hot_the_relaxed_network_is_the_discrete_chain(path, cell):
    """With one-hot alpha (zero on every dropped edge) and beta along the path, the map at its end is the chain's.

    Nodes off the path must give 0 where they meet it. So batch norm has no shifts, and the map two layers before, which
    can be of such a node, is used only where the path stays at its stride.
    """
    torch.manual_seed(0)
    net = SuperNet(3, **SPACE | {"layers": len(path)}).double().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.uniform_(0.5, 2)
            part.weight.uniform_(0.5, 2)
    net.alpha.zero_()
    net.beta.zero_()
    net.beta[..., 1] = 1e4
    net.alpha[:, FEW.index("zero")] = 1e4
    for first, block in zip((0, 2), cell, strict=True):
        for name, state in block:
            net.alpha[first + state] = torch.where(torch.tensor([n == name for n in FEW]), 1e4, 0.0)
    for row, (level, target) in zip(net.beta, itertools.pairwise((0, *path)), strict=True):
        row[level] = 0
        row[level, 1 + target - level] = 1e4

    images = torch.rand(2, 3, 40, 61).double()
    levels, maps = [0, *path], [net.stage2(net.stage1(grid_pad(normalize(images), 32)))]
    for i, target in enumerate(path):
        mixed, level, c = net.cells[i][target], levels[i], 2 * 2**target
        x = maps[-1]
        if level > target:
            size = [2 * side - 1 for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=True)
        x = mixed.edges[1 + level - target](x)
        y = torch.zeros_like(x)
        if i > 0 and levels[i - 1] == target:  # two layers before, the chain was at this stride
            y = mixed.before(maps[-2])
        states = [x, y]
        for block, pair in zip(mixed.blocks, cell, strict=True):
            states.append(sum(alone(block.operators[name], name, state, c)(states[state]) for name, state in pair))
        maps.append(torch.cat(states[2:], dim=1))
    torch.testing.assert_close(net.layers(images)[-1][path[-1]], maps[-1])
    assert net.decode()[1] == path and (cell is ONE_STATE or net.decode()[0] == cell)


@torch.no_grad()
def test_the_relaxed_map_is_the_weighted_sum_of_its_edges():
    torch.manual_seed(0)
    net = shaken(SuperNet(3, **SPACE)).double().eval()
    nn.init.normal_(net.beta)
    maps, steps, alpha = net.layers(torch.rand(1, 3, 64, 64).double()), transitions(net.beta), net.alpha.softmax(1)
    cell = net.cells[2][1]  # layer 3, stride 8: from strides 4, 8, 16

    def one(j):
        edges = [None, None, None]
        edges[j] = maps[2][j], torch.tensor(1.0).double()
        return cell(edges, maps[1][1], alpha)

    expected = sum(steps[2, j, 2 - j] * one(j) for j in range(3))
    torch.testing.assert_close(maps[3][1], expected)


def test_the_heads_of_the_search(published):
    assert [head[0].rates for head in published.heads] == [(24,), (12,), (6,), (3,)]
    assert all(len(head[0].convs) == 3 for head in published.heads)
    assert [head[0].convs[0][0].in_channels for head in published.heads] == [40, 80, 160, 320]


# Operators and drop path


@torch.no_grad()
def test_atrous_with_stride_resizes_by_half_and_has_no_rate():
    op = shaken(operator("atrous5", 3, stride=2))
    x = torch.randn(2, 3, 17, 25)
    half = F.interpolate(F.relu(x), (9, 13), mode="bilinear", align_corners=True)
    torch.testing.assert_close(op(x), op[2](F.conv2d(half, op[1].weight, padding=2)))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "zero"])
def test_operators_keep_or_halve_the_map(name):
    x = torch.randn(2, 4, 17, 25)
    assert operator(name, 4)(x).shape == x.shape and operator(name, 4, stride=2)(x).shape == (2, 4, 9, 13)
    weights = {
        "sep3": 2 * (4 * 9 + 16 + 8),
        "sep5": 2 * (4 * 25 + 16 + 8),
        "atrous3": 16 * 9 + 8,
        "atrous5": 16 * 25 + 8,
    }
    assert count(operator(name, 4)) == weights.get(name, 0)


@torch.no_grad()
def test_a_discrete_cell_by_hand():
    cell = (("skip", 0), ("skip", 1)), (("avg3", 2), ("max3", 0))
    net = shaken(DiscreteCell(6, 5, 4, cell, 1))
    last, before = torch.randn(1, 6, 8, 8), torch.randn(1, 5, 8, 8)
    a, b = net.squeeze[0](last), net.squeeze[1](before)
    first = a + b
    average = F.avg_pool2d(first, 3, 1, 1) * 9 / F.avg_pool2d(torch.ones(1, 1, 8, 8), 3, 1, 1) / 9
    torch.testing.assert_close(net(last, before), torch.cat([first, average + F.max_pool2d(a, 3, 1, 1)], dim=1))


def test_drop_path_grows_with_layer_and_step():
    model = AutoDeepLab(3, path=(0, 1, 1, 0), drop_path=0.4, drop_steps=10, **SMALL)
    seen = []
    for cell in model.cells:
        cell.register_forward_pre_hook(lambda cell, args: seen.append(args[2]))
    images = torch.rand(2, 3, 33, 33)
    for _ in range(13):
        model(images)
    rows = torch.tensor(seen).view(13, 4)
    torch.testing.assert_close(rows[5], 0.4 * 0.5 * torch.tensor([0.25, 0.5, 0.75, 1]))
    assert (rows[0] == 0).all() and torch.equal(rows[10], rows[12]) and rows[10, 3] == pytest.approx(0.4)
    assert model.passes == 13 and "passes" in model.state_dict()
    seen.clear()
    model.eval()(images)
    assert seen == [0.0] * 4 and model.passes == 13


def test_dropped_pictures_are_zero_and_the_mean_stays():
    torch.manual_seed(0)
    x = drop_samples(torch.ones(4000, 2, 3, 3), 0.25)
    whole = x.flatten(1)
    assert ((whole == 0).all(1) | (whole == 1 / 0.75).all(1)).all()
    assert (whole[:, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.03) and x.mean() == pytest.approx(1, abs=0.04)


# The search


def pictures(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 32, 32, generator=generator)
    return TensorDataset(images, (2 * images.mean(1)).long().clamp(0, 2))


def run(net, a=None, b=None, **options):
    halves = pictures() if a is None else a, pictures(seed=1) if b is None else b
    return search(
        net, *halves, RECIPE, **{"start": 3, "lr": 0.1, "moments": 3, "device": "cpu", "progress": False} | options
    )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SuperNet(3, **SPACE)


def test_each_half_moves_its_own_parameters(net):
    """Weights are the same with and without updates of alpha and beta at the first of them; alpha and beta wait."""
    states, parameters = [], {"w": net.weights(), "architecture": net.architecture()}

    def watched(model, images, target):
        states.append({name: [p.detach().clone() for p in group] for name, group in parameters.items()})
        return pixel_loss(model, images, target)

    run(net, loss=watched)
    states.append({name: [p.detach().clone() for p in group] for name, group in parameters.items()})
    turns = [0, 0, 0, 0, 1, 0, 1, 0, 1]  # 0 weights, 1 alpha and beta, from step 3 on
    assert len(states) == len(turns) + 1
    for turn, old, new in zip(turns, states, states[1:], strict=False):
        moved = {name: not all(map(torch.equal, old[name], new[name])) for name in parameters}
        assert moved == {"w": turn == 0, "architecture": turn == 1}
    assert {id(p) for p in net.parameters()} == {id(p) for group in parameters.values() for p in group}


def test_the_halves_are_used_as_said(net):
    """Pictures of half A are bright, of half B dark: which loss sees which?"""
    seen = []

    def watched(model, images, target):
        seen.append(round(images.mean().item(), 1))
        return pixel_loss(model, images, target)

    bright, dark = (TensorDataset(torch.full((4, 3, 32, 32), v), torch.zeros(4, 32, 32).long()) for v in (0.9, 0.1))
    run(net, bright, dark, loss=watched)
    assert seen == [0.9, 0.9, 0.9, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1]


def test_what_a_search_gives(net):
    found = run(net)
    assert found.steps == [0, 2, 4, 6] and found.transitions.shape == (4, 3, 4, 3) and found.alphas.shape == (4, 5, 5)
    assert len(found.loss) == 6 and len(found.architecture_loss) == 3 and found.seconds > 0
    assert torch.equal(found.transitions[0], found.transitions[1]) and not torch.equal(*found.transitions[1:3])
    torch.testing.assert_close(found.transitions.sum(-1), trellis(3).any(-1).float().expand(4, -1, -1))
    torch.testing.assert_close(found.alphas.sum(-1), torch.ones(4, 5))
    assert found.path == viterbi(found.transitions[-1]) and found.cell == decode_cell(net.alpha, FEW)
    model = AutoDeepLab(3, path=found.path, cell=found.cell, **SMALL)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_killed_search_goes_on_bit_by_bit(net, tmp_path, killed_at):
    again, whole = copy.deepcopy(net), copy.deepcopy(net)
    expected = run(whole)
    path, calls = tmp_path / "search.safetensors", itertools.count()

    def killed(model, images, target):
        if next(calls) == killed_at + max(0, killed_at - 3):
            raise KeyboardInterrupt
        return pixel_loss(model, images, target)

    with pytest.raises(KeyboardInterrupt):
        run(net, loss=killed, checkpoint=path, checkpoint_every=1)
    found = run(again, checkpoint=path, checkpoint_every=1)
    assert (found.cell, found.path, found.steps) == (expected.cell, expected.path, expected.steps)
    assert found.loss == expected.loss and found.architecture_loss == expected.architecture_loss
    assert torch.equal(found.transitions, expected.transitions) and torch.equal(found.alphas, expected.alphas)
    assert all(torch.equal(p, q) for p, q in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    finished = run(copy.deepcopy(net), checkpoint=path)
    assert finished.cell == expected.cell and finished.loss == expected.loss and len(finished.steps) == 4


def test_a_search_of_another_space_is_refused_and_kept(net, tmp_path):
    path = tmp_path / "search.safetensors"
    run(net, checkpoint=path)
    stored, other = path.read_bytes(), SuperNet(3, **SPACE | {"layers": 4})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"another run.*'layers': 3.*there.*'layers': 4.*here"):
        run(other, checkpoint=path)
    with pytest.raises(ValueError, match=r"architecture: .*0.1.*there.*0.2.*here"):
        run(net, checkpoint=path, lr=0.2)
    assert path.read_bytes() == stored
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_search_that_breaks_keeps_the_last_good_checkpoint(net, tmp_path):
    path, calls = tmp_path / "search.safetensors", itertools.count()

    def broken(model, images, target):
        return pixel_loss(model, images, target) * (math.nan if next(calls) == 4 else 1)

    with pytest.raises(FloatingPointError, match=r"nan at step 3 of 6.*last good checkpoint"):
        run(net, loss=broken, checkpoint=path, checkpoint_every=1)
    assert path.exists()


def test_rates_of_the_search():
    recipe = sg.recipes.AUTO_DEEPLAB_SEARCH
    assert recipe.lr_at(0) == 0.025 and recipe.lr_at(recipe.steps // 2) == pytest.approx(0.013)
    assert recipe.lr_at(recipe.steps - 1) == pytest.approx(0.001, rel=1e-3)
    assert recipe.steps == 40 * 744 and recipe.batch == 2
    assert sg.recipes.AUTO_DEEPLAB.lr_at(750_000) == pytest.approx(0.05 * 0.535887, rel=1e-5)


def test_the_relaxed_network_keeps_more_for_its_gradients_than_the_decoded_one(net):
    def kept(model):
        sizes, own = {}, {p.data_ptr() for p in model.parameters()}

        def keep(t):
            sizes[t.data_ptr()] = t.untyped_storage().nbytes() * (t.data_ptr() not in own)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.rand(2, 3, 64, 64)).sum().backward()
        return sum(sizes.values())

    cell, path = net.decode()
    assert kept(net) > 3 * kept(AutoDeepLab(3, path=path, cell=cell, **SMALL))


# Bad input


@pytest.mark.parametrize(
    ("path", "message"),
    [((0, 2, 2), "layer 2: from level 0 to 2"), ((2, 2), "layer 1: from the stem's level 0 to 2"), ((0, 1, 2, 3, 4), "layer 5: level 4"),
     ((0, -1), "layer 2: level -1"), ((), "at least one layer")],
)  # fmt: skip
def test_paths_that_leave_the_trellis(path, message):
    with pytest.raises(ValueError, match=message):
        AutoDeepLab(3, path=path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [((), "at least one block"), (((("sep3", 0),),), "block 0 of the cell must have two"), (((("sep7", 0), ("sep3", 1)),), "got 'sep7'"),
     (((("zero", 0), ("sep3", 1)),), "got 'zero'"), (((("sep3", 0), ("sep3", 2)),), "state must be 0 to 1"),
     ((PUBLISHED_CELL[0], (("skip", 3), ("skip", 0))), "block 1 of the cell: state must be 0 to 2")],
)  # fmt: skip
def test_cells_that_cannot_be_built(cell, message):
    with pytest.raises(ValueError, match=message):
        AutoDeepLab(3, cell=cell)


def test_shapes_of_alpha_and_beta():
    for beta in (torch.zeros(12, 4), torch.zeros(12, 3, 4), torch.zeros(0, 4, 3)):
        with pytest.raises(ValueError, match=r"beta must be \(layers, 4, 3\)"):
            transitions(beta)
        with pytest.raises(ValueError, match=r"steps must be \(layers, 4, 3\)"):
            viterbi(beta)
    for alpha in (torch.zeros(20), torch.zeros(19, 8), torch.zeros(20, 7)):
        with pytest.raises(ValueError, match=r"alpha must be \(edges, 8 operators\)"):
            decode_cell(alpha)
    with pytest.raises(ValueError, match="one level for each of 3 layers, got 2"):
        path_probability(transitions(torch.zeros(3, 4, 3)), (0, 1))


WRONG = TensorDataset(torch.rand(1, 3, 32, 32), torch.full((1, 32, 32), 7))


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: SuperNet(3, operators=("sep3", "sep9")), "got sep9"), (lambda: SuperNet(3, operators=("zero",)), "must not be"),
     (lambda: SuperNet(3, operators=("sep3", "sep3")), "must differ"), (lambda: SuperNet(3, layers=0), "at least 1"),
     (lambda: SuperNet(0), "num_classes"), (lambda: AutoDeepLab(3, filters=0), "filters"),
     (lambda: AutoDeepLab(3, drop_path=1.0), "drop_path"), (lambda: AutoDeepLab(3, drop_steps=0), "drop_steps"),
     (lambda: run(SuperNet(3, **SPACE), start=6), "start must be"), (lambda: run(SuperNet(3, **SPACE), moments=0), "moments"),
     (lambda: run(SuperNet(3, **SPACE), WRONG), "labels of target 0 must be 0 to 2")],
)  # fmt: skip
def test_other_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

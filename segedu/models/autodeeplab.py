"""Auto-DeepLab: Hierarchical Neural Architecture Search for Semantic Image Segmentation. Liu et al.; CVPR 2019.

Paper: https://arxiv.org/abs/1901.02985 (Fig. 1 the trellis, Fig. 3 the cell found, Eq. 1-7 the relaxation, Sec. 3.2.3 decoding).
Code: https://github.com/tensorflow/models/tree/master/research/deeplab (core/nas_network.py, core/nas_cell.py: the net found)
Chapter: chapters/14_autodeeplab.ipynb
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segedu.layers import conv_bn_relu, enlarged, grid_pad, normalize, scale, score_layer
from segedu.models.deeplab_v3 import ASPP, default_rates

OPERATORS = ("sep3", "sep5", "atrous3", "atrous5", "avg3", "max3", "skip", "zero")
LEVELS = 4  # strides 4, 8, 16, 32
Cell = Sequence[Sequence[tuple[str, int]]]  # for each block two (operator, state): 0 and 1 the cells before, 2.. blocks
PUBLISHED_PATH = (0, 0, 0, 1, 2, 1, 2, 2, 3, 3, 2, 1)  # level of each layer
PUBLISHED_CELL = (
    (("atrous5", 1), ("sep3", 0)), (("sep3", 1), ("atrous3", 0)), (("sep3", 3), ("sep3", 1)),
    (("sep5", 4), ("sep5", 2)), (("sep5", 3), ("atrous5", 5)),
)  # fmt: skip


class AutoDeepLab(nn.Module):
    """A decoded network: one cell repeated along a path of strides, then ASPP and the decoder of DeepLab v3+.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 4.

    Args:
        num_classes: K.
        filters: F. A cell at stride s has F s / 4 channels in each block: 20, 32, 48 for the paper's S, M, L.
        path: level of each layer: 0 to 3 for strides 4 to 32; one up or down at most, from 0 (the stem's).
        cell: for each block two (operator, state); state 0 is the cell before, 1 the one before that, 2 the first block.
        rates: of the ASPP, in cells. None: DeepLab v3's 96, 192, 288 pixels.
        drop_path: how likely an operator of the last cell is dropped at the end of training. Earlier cells and steps have
            less, in proportion.
        drop_steps: training passes until then. They are counted in the buffer `passes`.
        width: of stem, ASPP and decoder, as a multiple of the paper's.

    Differences from the paper: the net is the release's, `hnasnet`: a stem of three convolutions, strides in a cell's first
    operators, the cell before the last one resized. Pictures are padded with the mean colour to full cells and one pixel.

    Raises ValueError for other values, a path that leaves the trellis, a cell with unknown states or operators.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        filters: int = 20,
        path: Sequence[int] = PUBLISHED_PATH,
        cell: Cell = PUBLISHED_CELL,
        rates: Sequence[int] | None = None,
        drop_path: float = 0.0,
        drop_steps: int = 500_000,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, filters)
        check_path(path)
        check_cell(cell)
        if not 0 <= drop_path < 1 or drop_steps < 1:
            raise ValueError(
                f"drop_path must be from 0 to below 1 and drop_steps at least 1, got {drop_path}, {drop_steps}"
            )
        self.path, self.cell, self.filters = tuple(path), cell, filters
        self.drop_path, self.drop_steps = drop_path, drop_steps
        self.register_buffer("passes", torch.tensor(0))
        c, c_low = scale((256, 48), width)

        self.stage1, self.stage2 = stem(width)
        channels, level = [self.stage1[3].out_channels, self.stage2[1].out_channels], 0
        self.cells = nn.ModuleList()
        for target in path:
            stride = 2 if target > level else 1
            self.cells.append(DiscreteCell(channels[-1], channels[-2], filters * 2**target, cell, stride))
            channels.append(len(cell) * filters * 2**target)
            level = target
        self.early = next((i for i, level in enumerate(path) if level), len(path))  # layers at stride 4 at the start
        rates = default_rates(4 * 2**level) if rates is None else rates
        self.aspp = ASPP(channels[-1], c, rates)
        self.reduce = conv_bn_relu(channels[1 + self.early], c_low)
        self.decoder = nn.Sequential(conv_bn_relu(c + c_low, c, 3), conv_bn_relu(c, c, 3))
        self.score = score_layer(c, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return enlarged(self.quarter(images), 4)[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of every fourth pixel (N, K, ceil(H / 4), ceil(W / 4))."""
        height, width = (-(-side // 4) for side in images.shape[-2:])
        return self.quarter(images)[..., :height, :width]

    # fmt: off
    def quarter(self, images: Tensor) -> Tensor:
        """Logits at stride 4 of the padded pictures."""
        *maps, x = self.layers(images)                              # 1/4 ... 1/32, as `path` has it
        early = (*maps, x)[1 + self.early]                          # 1/4
        x = self.aspp(torch.relu(x))                                # 1/8
        x = enlarged(x, 2 ** self.path[-1])                         # 1/4
        x = torch.cat([x, self.reduce(early)], dim=1)               # 1/4
        x = self.decoder(x)                                         # 1/4
        return self.score(x)                                        # 1/4

    def layers(self, images: Tensor) -> list[Tensor]:
        """The stem's two maps and every cell's."""
        x = grid_pad(normalize(images), 4 * 2 ** max(self.path))
        x = self.stage1(x)                                          # 1/2
        maps, levels = [x, self.stage2(x)], [-1, 0]                 # 1/4
        drop = self.highest_drop()
        for i, (cell, target) in enumerate(zip(self.cells, self.path, strict=True)):
            at = min(levels[-1], target)                            # where the cell begins; it halves the map itself
            last, before = resized(maps[-1], levels[-1], at), resized(maps[-2], levels[-2], at)
            maps.append(cell(last, before, drop * (i + 1) / len(self.path)))
            levels.append(target)
        return maps
    # fmt: on

    def highest_drop(self) -> float:
        """Highest chance of a drop in this pass, which is counted; 0 unless in training."""
        if not self.training or not self.drop_path:
            return 0.0
        self.passes += 1
        return self.drop_path * min(1.0, (self.passes.item() - 1) / self.drop_steps)


class SuperNet(nn.Module):
    """The relaxed network: all cells of the trellis, each operator weighted by alpha, each step between strides by beta.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W.

    Args:
        num_classes: K.
        layers: L.
        filters: F. A cell at stride s has F s / 4 channels in each block.
        blocks: B, of a cell.
        operators: some of OPERATORS.
        reach: pixels that the 3x3 of a head looks to each side: at stride s its rate is reach / s, and at least 1.
        width: of stem and heads, as a multiple of the paper's.

    `alpha` (B (B + 3) / 2, operators), the same for all cells, and `beta` (L, 4, 3) are parameters; softmax and `transitions`
    make weights of them. `weights()` gives all other parameters, `architecture()` these two.

    Differences from the paper: a cell's batch norm sees what comes along its two or three edges together. Where there is
    no map two layers before at the same stride, that state is 0.

    Raises ValueError for other values; in training also for a single picture.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layers: int = 12,
        filters: int = 8,
        blocks: int = 5,
        operators: Sequence[str] = OPERATORS,
        reach: int = 96,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, filters)
        if layers < 1 or blocks < 1 or reach < 1:
            raise ValueError(f"layers, blocks and reach must be at least 1, got {layers}, {blocks}, {reach}")
        check_operators(operators)
        self.space = {"num_classes": num_classes, "layers": layers, "filters": filters, "blocks": blocks,
                      "operators": list(operators), "reach": reach, "width": width}  # fmt: skip
        self.stage1, self.stage2 = stem(width)
        c, stem_channels = scale((256,), width)[0], self.stage2[1].out_channels

        def channels(layer: int, level: int) -> int:
            """0 where the trellis has no such node."""
            if not 0 <= level < min(layer + 1, LEVELS):
                return 0
            return blocks * filters * 2**level if layer else stem_channels

        self.cells = nn.ModuleList(
            nn.ModuleList(
                MixedCell(
                    [channels(layer - 1, level + step) for step in (-1, 0, 1)],
                    channels(layer - 2, level), filters * 2**level, blocks, operators,
                )
                for level in range(min(layer + 1, LEVELS))
            )
            for layer in range(1, layers + 1)
        )  # fmt: skip
        self.heads = nn.ModuleList(
            nn.Sequential(
                ASPP(blocks * filters * 2**level, c, (max(1, reach // (4 * 2**level)),)), score_layer(c, num_classes)
            )
            for level in range(len(self.cells[-1]))
        )
        self.alpha = nn.Parameter(1e-3 * torch.randn(blocks * (blocks + 3) // 2, len(operators)))
        self.beta = nn.Parameter(1e-3 * torch.randn(layers, LEVELS, 3))

    def architecture(self) -> list[nn.Parameter]:
        return [self.alpha, self.beta]

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p is not self.alpha and p is not self.beta]

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        maps = self.layers(images)[-1]
        x = sum(
            enlarged(head(torch.relu(x)), 2**level)
            for level, (head, x) in enumerate(zip(self.heads, maps, strict=True))
        )
        return enlarged(x, 4)[..., :height, :width]

    def layers(self, images: Tensor) -> list[list[Tensor]]:
        """For the stem and each layer, its maps of stride 4, 8, 16, 32 (Eq. 6)."""
        x = grid_pad(normalize(images), 4 * 2 ** (LEVELS - 1))
        layers = [[], [self.stage2(self.stage1(x))]]
        alpha, beta = self.alpha.softmax(1), transitions(self.beta)
        for cells, step in zip(self.cells, beta, strict=True):
            *_, before, last = layers
            layers.append(
                [
                    cell(
                        [
                            (last[j], step[j, 1 + level - j]) if 0 <= j < len(last) else None
                            for j in (level - 1, level, level + 1)
                        ],
                        before[level] if level < len(before) else None,
                        alpha,
                    )
                    for level, cell in enumerate(cells)
                ]
            )
        return layers[1:]

    def decode(self) -> tuple[Cell, tuple[int, ...]]:
        """Cell and path as they are now: `decode_cell`, `viterbi`."""
        return decode_cell(self.alpha, self.space["operators"]), viterbi(transitions(self.beta))


class DiscreteCell(nn.Module):
    """A decoded cell: blocks of two operators each, summed; all blocks side by side (Fig. 3).

    Shape: last (N, c_last, h, w), before (N, c_before, h, w) -> (N, B c, h / stride, w / stride).
    """

    def __init__(self, c_last: int, c_before: int, c: int, cell: Cell, stride: int) -> None:
        super().__init__()
        self.cell = cell
        used = {state for block in cell for _, state in block}
        self.squeeze = nn.ModuleList(
            squeeze(c_in, c) if state in used else nn.Identity() for state, c_in in enumerate((c_last, c_before))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(operator(name, c, stride=stride if state < 2 else 1) for name, state in block)
            for block in cell
        )

    def forward(self, last: Tensor, before: Tensor, drop: float = 0.0) -> Tensor:
        states = [self.squeeze[0](last), self.squeeze[1](before)]
        for block, pair in zip(self.blocks, self.cell, strict=True):
            results = [op(states[state]) for op, (_, state) in zip(block, pair, strict=True)]
            if drop:
                results = [
                    x if name == "skip" else drop_samples(x, drop) for x, (name, _) in zip(results, pair, strict=True)
                ]
            states.append(results[0] + results[1])
        return torch.cat(states[2:], dim=1)


class MixedCell(nn.Module):
    """A relaxed cell, run for each edge that leads to it, the results weighted by beta and summed (Eq. 6).

    Args:
        c_from: channels that come from the finer stride, the same and the coarser one; 0 where no edge is.
        c_before: of the map two layers before at the same stride; 0 where there is none.
    """

    def __init__(self, c_from: Sequence[int], c_before: int, c: int, blocks: int, operators: Sequence[str]) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            squeeze(c_in, c, stride=2 if i == 0 else 1) if c_in else nn.Identity() for i, c_in in enumerate(c_from)
        )
        self.before = squeeze(c_before, c) if c_before else None
        self.blocks = nn.ModuleList(MixedBlock(2 + i, c, operators) for i in range(blocks))

    def forward(self, edges: Sequence[tuple[Tensor, Tensor] | None], before: Tensor | None, alpha: Tensor) -> Tensor:
        """edges: (map, beta) from the finer stride, the same, the coarser; alpha (edges of a cell, operators), softmaxed."""
        inputs = [squeeze(edge[0] if i < 2 else enlarged(edge[0], 2))
                  for i, (squeeze, edge) in enumerate(zip(self.edges, edges, strict=True)) if edge]  # fmt: skip
        beta = [edge[1] for edge in edges if edge]
        x = torch.cat(inputs)  # all edges in one batch
        y = torch.zeros_like(x) if before is None else torch.cat([self.before(before)] * len(inputs))
        states, found = torch.stack([x, y], dim=1), []
        for block, weights in zip(self.blocks, alpha.split([2 + i for i in range(len(self.blocks))]), strict=True):
            found.append(block(states, weights))
            states = torch.cat([states, found[-1][:, None]], dim=1)
        blocks = torch.cat(found, dim=1).chunk(len(inputs))
        return sum(weight * x for weight, x in zip(beta, blocks, strict=True))


class MixedBlock(nn.Module):
    """Each of n states through each operator, weighted by alpha, summed (Eq. 1, 4). Group j of a layer is edge j's.

    Shape: states (N, n, c, h, w), weights (n, operators) -> (N, c, h, w).
    """

    def __init__(self, n: int, c: int, operators: Sequence[str]) -> None:
        super().__init__()
        self.operators = nn.ModuleDict({name: operator(name, c, groups=n) for name in operators if name != "zero"})
        self.columns = [i for i, name in enumerate(operators) if name != "zero"]

    def forward(self, states: Tensor, weights: Tensor) -> Tensor:
        x, total = states.flatten(1, 2), 0
        for op, column in zip(self.operators.values(), self.columns, strict=True):
            total = total + (weights[:, column, None, None, None] * op(x).unflatten(1, states.shape[1:3])).sum(1)
        return total


def operator(name: str, c: int, *, groups: int = 1, stride: int = 1) -> nn.Module:
    """One of OPERATORS but "zero", for `groups` maps of c channels each, side by side; each has its own weights.

    (N, groups c, h, w) -> (N, groups c, ceil(h / stride), ceil(w / stride)). Source: the release, nas_cell.py. Its atrous
    operators resize by half and lose their rate where the stride is 2; on maps of odd sides that is a rate of 2 with stride 2.
    """
    c, kernel = c * groups, int(name[-1]) if name[-1].isdigit() else 1
    if name.startswith("sep"):
        return nn.Sequential(*separable(c, kernel, groups, stride), *separable(c, kernel, groups, 1))
    if name.startswith("atrous"):
        return nn.Sequential(nn.ReLU(), conv(c, c, kernel, stride, 2, groups), nn.BatchNorm2d(c))
    if name == "max3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return (
        nn.Identity() if stride == 1 else nn.Sequential(nn.ReLU(), conv(c, c, 1, stride, 1, groups), nn.BatchNorm2d(c))
    )


def separable(c: int, kernel: int, groups: int, stride: int) -> list[nn.Module]:
    """ReLU, each channel by itself, 1x1 over the channels of a group, batch norm."""
    return [nn.ReLU(), conv(c, c, kernel, stride, 1, c), conv(c, c, 1, 1, 1, groups), nn.BatchNorm2d(c)]


def squeeze(c_in: int, c: int, stride: int = 1) -> nn.Sequential:
    """To the channels of a cell: 1x1, or 3x3 with stride 2. (N, c_in, h, w) -> (N, c, ceil(h / stride), ceil(w / stride))."""
    return nn.Sequential(nn.ReLU(), conv(c_in, c, 3 if stride == 2 else 1, stride), nn.BatchNorm2d(c))


def stem(width: float) -> tuple[nn.Sequential, nn.Sequential]:
    """Images -> a map of stride 2, and that -> one of stride 4."""
    c1, c2 = scale((64, 128), width)
    stage1 = nn.Sequential(conv(3, c1, 3, 2), nn.BatchNorm2d(c1), nn.ReLU(), conv(c1, c1, 3), nn.BatchNorm2d(c1))
    return stage1, nn.Sequential(nn.ReLU(), conv(c1, c2, 3, 2), nn.BatchNorm2d(c2))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel // 2), dilation, groups, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def resized(x: Tensor, level: int, target: int) -> Tensor:
    """A map of this level at another one: bilinear where it becomes larger, every second cell where smaller."""
    step = 2 ** max(target - level, 0)
    return x[..., ::step, ::step] if target >= level else enlarged(x, 2 ** (level - target))


def drop_samples(x: Tensor, chance: float) -> Tensor:
    """Each picture of a batch becomes 0 with this chance, the others grow so that the mean stays (FractalNet, NASNet)."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= chance
    return x * keep / (1 - chance)


# The trellis


def trellis(layers: int) -> Tensor:
    """Which steps there are: (L, 4, 3), bool. Row l leads from layer l - 1 to l, layer 0 is the stem.

    Second index: level 0 to 3 where the step starts; third: to the finer stride, the same, the coarser one.
    """
    layer, level, step = torch.meshgrid(torch.arange(layers), torch.arange(LEVELS), torch.arange(3) - 1, indexing="ij")
    return (level <= layer) & (level + step >= 0) & (level + step < LEVELS)


def transitions(beta: Tensor) -> Tensor:
    """Probabilities of the steps out of each node, (L, 4, 3); they sum to 1 over the last index (Eq. 7), 0 where no edge is.

    Raises ValueError for another shape.
    """
    check_transitions(beta, "beta")
    edges = trellis(len(beta)).to(beta.device)
    return beta.masked_fill(~edges, -1e9).softmax(-1) * edges


def viterbi(steps: Tensor) -> tuple[int, ...]:
    """The path of the highest product of probabilities, as the level of each layer. steps: (L, 4, 3), as `transitions`.

    Source: Sec. 3.2.3. Raises ValueError for another shape.
    """
    check_transitions(steps, "steps")
    best, came = {0: 0.0}, []  # of each level reached: log of the product; and where from
    for row in steps.detach().double().log().masked_fill(~trellis(len(steps)).to(steps.device), -torch.inf).tolist():
        ways = [
            max(((best[j] + row[j][1 + level - j], j) for j in best if abs(level - j) <= 1), default=None)
            for level in range(LEVELS)
        ]
        best = {level: way[0] for level, way in enumerate(ways) if way}
        came.append({level: way[1] for level, way in enumerate(ways) if way})
    path = [max(best, key=best.get)]
    for back in reversed(came[1:]):
        path.append(back[path[-1]])
    return tuple(reversed(path))


def path_probability(steps: Tensor, path: Sequence[int]) -> float:
    """Product of the probabilities along a path. steps: (L, 4, 3), as `transitions`."""
    check_transitions(steps, "steps")
    check_path(path)
    if len(path) != len(steps):
        raise ValueError(f"path must have one level for each of {len(steps)} layers, got {len(path)}")
    froms = torch.tensor([0, *path[:-1]])
    chosen = steps.detach().cpu().double()[torch.arange(len(path)), froms, 1 + torch.tensor(path) - froms]
    return chosen.prod().item()


# The cell


def decode_cell(alpha: Tensor, operators: Sequence[str] = OPERATORS) -> Cell:
    """Each block's two strongest states, each with its strongest operator; a cell as `AutoDeepLab` takes it.

    An edge is as strong as its highest softmaxed weight but that of "zero" (Sec. 3.2.3); "zero" is never chosen.

    Args:
        alpha: (B (B + 3) / 2, operators), before softmax: block by block, states 0, 1, 2, ...

    Raises ValueError for another shape.
    """
    check_operators(operators)
    blocks = next((b for b in range(1, 100) if alpha.ndim == 2 and b * (b + 3) // 2 == len(alpha)), None)
    if blocks is None or alpha.shape[1] != len(operators):
        raise ValueError(
            f"alpha must be (edges, {len(operators)} operators) with 2, 5, 9, 14 or 20 edges for 1 to 5 blocks (b (b + 3) / 2), "
            f"got {tuple(alpha.shape)}"
        )
    names = [name for name in operators if name != "zero"]
    strong = alpha.detach().softmax(1)[:, [operators.index(name) for name in names]]
    cell = []
    for edges in strong.split([2 + i for i in range(blocks)]):
        strength, choice = edges.max(1)
        pair = sorted(sorted(range(len(edges)), key=lambda j: -strength[j].item())[:2])
        cell.append(tuple((names[choice[j]], j) for j in pair))
    return tuple(cell)


# What can be wrong


def check_sizes(num_classes: int, filters: int) -> None:
    if num_classes < 1 or filters < 1:
        raise ValueError(f"num_classes and filters must be at least 1, got {num_classes} and {filters}")


def check_operators(operators: Sequence[str]) -> None:
    if unknown := set(operators) - set(OPERATORS):
        raise ValueError(f"operators must be some of {', '.join(OPERATORS)}, got {', '.join(sorted(unknown))}")
    if len(set(operators)) != len(operators) or not set(operators) - {"zero"}:
        raise ValueError(f'operators must differ, and one must not be "zero", got {", ".join(operators) or "none"}')


def check_path(path: Sequence[int]) -> None:
    """Raise ValueError, with layer and step, for a path that is not in the trellis."""
    level = 0
    for layer, target in enumerate(path, start=1):
        if target not in range(LEVELS):
            raise ValueError(
                f"path leaves the trellis at layer {layer}: level {target}; levels are 0 to 3, strides 4 to 32"
            )
        if abs(target - level) > 1:
            start = "the stem's level 0" if layer == 1 else f"level {level}"
            raise ValueError(
                f"path leaves the trellis at layer {layer}: from {start} to {target}; a step is one level at most"
            )
        level = target
    if not path:
        raise ValueError("path must have at least one layer, got none")


def check_cell(cell: Cell) -> None:
    if not cell:
        raise ValueError("cell must have at least one block, got none")
    for i, block in enumerate(cell):
        if len(block) != 2:
            raise ValueError(f"block {i} of the cell must have two (operator, state), got {block}")
        for name, state in block:
            if name not in OPERATORS or name == "zero":
                known = ", ".join(name for name in OPERATORS if name != "zero")
                raise ValueError(f"block {i} of the cell: operator must be one of {known}, got {name!r}")
            if state not in range(2 + i):
                raise ValueError(
                    f"block {i} of the cell: state must be 0 to {1 + i} (two cells before, {i} blocks before), got {state}"
                )


def check_transitions(steps: Tensor, name: str) -> None:
    if steps.ndim != 3 or steps.shape[1:] != (LEVELS, 3) or not len(steps):
        raise ValueError(
            f"{name} must be (layers, 4, 3): for each layer and level, to the finer stride, the same, the coarser; "
            f"got {tuple(steps.shape)}"
        )

"""Gaussian filtering of N points in a few milliseconds: the permutohedral lattice.

Paper: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010.
Kraehenbuehl and Koltun's C++ and pydensecrf filter in the same way, to the last constant.
Chapter: chapters/08_crf.ipynb
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def locate(f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where features (N, d) lie among the simplices of the lattice.

    The space is turned into the plane of d + 1 coordinates with sum 0. Its lattice points have coordinates that are all
    r modulo d + 1, one r for each of a simplex's d + 1 corners.

    Returns:
        cell (d + 1, N): the corner with r = 0, over d + 1.
        rank (d + 1, N): the place of each coordinate, 0 for the one that is furthest above the corner. Corner r of the
            simplex is r above it, and d + 1 less in the coordinates of the r last ranks.
        weight (d + 1, N): barycentric coordinates, row r that of corner r. They sum to 1.

    Raises:
        OverflowError: a feature is so large that its lattice points cannot be told apart.
    """
    d = f.shape[1]
    spread = math.sqrt(2 / 3) * (d + 1)  # the blur of `Lattice` is a Gaussian of standard deviation 1 at this scale
    elevated, rest = [], torch.zeros_like(f[:, 0])
    for j in range(d, 0, -1):
        part = f[:, j - 1] * (spread / math.sqrt(j * (j + 1)))
        elevated.append(rest - j * part)
        rest = rest + part
    elevated = torch.stack([rest, *reversed(elevated)])
    if not elevated.abs().amax() < 1 / torch.finfo(f.dtype).eps:  # from there on not every whole number is a float
        raise too_far(f)

    cell = (elevated * (1 / (d + 1))).round()
    above = elevated - cell * (d + 1)
    rank = torch.zeros_like(cell)
    for i in range(d + 1):
        for j in range(i + 1, d + 1):
            before = (above[i] < above[j]).to(f.dtype)
            rank[i] += before
            rank[j] += 1 - before
    rank += cell.sum(0)  # not 0 where the rounded point left the plane
    back = (rank < 0).to(f.dtype) - (rank > d).to(f.dtype)
    rank, cell = (rank + back * (d + 1)).long(), cell + back
    above = (elevated - cell * (d + 1)) * (1 / (d + 1))

    above = torch.empty_like(above).scatter_(0, rank, above)  # by rank
    weight = above.flip(0)
    weight[1:] -= above.flip(0)[:-1]
    weight[0] += 1 - above[0]
    return cell, rank, weight


def too_far(f: Tensor) -> OverflowError:
    return OverflowError(
        f"the features reach from {f.amin().item():.4g} to {f.amax().item():.4g}, too far to number the lattice points: a "
        "theta is too small for this image; take a larger one"
    )


class Lattice:
    """Filters values of N points with exp(-|f_i - f_j|^2 / 2), nearly: three sparse steps in place of N^2 pairs.

    Each point spreads its value over the d + 1 corners of its simplex (splat). The values of the lattice points are
    blurred with [1/2, 1, 1/2] along d + 1 axes. Each point reads from its corners (slice).

    Args:
        f: features (N, d), N at least 1.

    Attributes:
        size: M, the number of lattice points that are a corner for any point.
        vertex, weight: (N, d + 1), the lattice points at each point's corners, and its barycentric coordinates.
        window: (d + 1, M + 1, 3), along each axis a lattice point and its two neighbours. M stands for those that are
            not there, and has the value 0.
        points, weights, starts: (N (d + 1),) twice and (M + 2,): lattice point v is a corner of
            points[starts[v] : starts[v + 1]], with these barycentric coordinates.

    Raises:
        OverflowError: the features reach too far to number the lattice points.
    """

    def __init__(self, f: Tensor) -> None:
        cell, rank, weight = locate(f)
        (corners, n), device, d = cell.shape, f.device, len(cell) - 1

        # A lattice point becomes a number: its digits are d of its coordinates (the last follows from them), then r.
        low, high = cell[:d].amin(1) - 2, cell[:d].amax(1) + 1  # room for corners and neighbours
        bases = (high - low + 1).double().tolist()
        if math.prod(bases) * corners >= 2**62:
            raise too_far(f)
        digits = [corners * math.prod(map(int, bases[i + 1 :])) for i in range(d)] + [0]
        dtype = torch.int32 if math.prod(bases) * corners < 2**31 else torch.int64
        digit = torch.tensor(digits, dtype=dtype, device=device)
        lowered = torch.empty_like(rank, dtype=dtype).scatter_(0, rank, digit[:, None].expand_as(rank)).flip(0)
        number = ((cell[:d] - low[:, None]).to(dtype) * digit[:d, None]).sum(0, dtype=dtype).expand(corners, n).clone()
        number[1:] += torch.arange(1, corners, device=device)[:, None] - lowered[:-1].cumsum(0, dtype=dtype)

        # Sorted, equal numbers lie together: they are one lattice point, with the points around it.
        self.weight = weight.T.contiguous()
        number, entry = number.T.reshape(-1).sort()
        first = torch.ones_like(number, dtype=torch.bool)
        torch.ne(number[1:], number[:-1], out=first[1:])
        vertex = torch.empty(n * corners, dtype=torch.int32, device=device)
        self.vertex = vertex.scatter_(0, entry, first.cumsum(0, dtype=torch.int32) - 1).view(n, corners)
        self.points = (entry // corners).int()
        self.weights = self.weight.view(-1).gather(0, entry)
        starts = first.nonzero()[:, 0]
        self.starts = torch.cat([starts, starts.new_tensor([n * corners] * 2)]).int()
        self.size = len(starts)
        self.gain = 1 / (1 + 2.0**-d)

        # The neighbour along axis j is lower by 1 in each coordinate, then higher by d + 1 in coordinate j. That is
        # remainder r - 1 of the same cell, but from r = 0 it is remainder d of the cell before.
        number = number[starts]
        step = torch.where(number % corners > 0, -1, d - sum(digits)).to(dtype)
        wanted = number + step + digit[:, None]
        lower = torch.searchsorted(number, wanted, out_int32=True).clamp_(max=self.size - 1)
        lower = torch.where(number.gather(0, lower.view(-1).long()).view_as(lower) == wanted, lower, self.size)
        own = torch.arange(self.size, dtype=torch.int32, device=device)
        self.window = torch.full((corners, self.size + 1, 3), self.size, dtype=torch.int32, device=device)
        self.window[:, :-1, 0] = own
        self.window[:, :-1, 1] = lower
        self.window[:, :, 2].scatter_(1, lower.long(), own.expand(corners, -1))
        self.window[:, -1, 2] = self.size

    def filter(self, values: Tensor, transposed: bool = False) -> Tensor:
        """(N, C) -> (N, C), the readable form. `transposed` blurs along the axes in reverse: the transposed matrix."""
        table = values.new_zeros(self.size + 1, values.shape[1])
        for vertex, weight in zip(self.vertex.T, self.weight.T, strict=True):
            table.index_add_(0, vertex, weight[:, None] * values)  # splat
        for window in self.window.flip(0) if transposed else self.window:
            middle, lower, upper = window.T
            table = table[middle] + (table[lower] + table[upper]) / 2  # blur
        corners = zip(self.vertex.T, self.weight.T, strict=True)
        return self.gain * sum(weight[:, None] * table[vertex] for vertex, weight in corners)  # slice


class Filter:
    """A normalised lattice. `filter @ values` is what the (N, N) matrix of `exact.kernel` would give, nearly.

    Built once for a picture, used in each step for all classes. On the CPU splat, blur and slice are a gather with
    weighted sums each, and the normalisation is inside the weights. The gradient with respect to the values is the
    transposed filter.

    Args:
        f: features (N, d).
        normalization: as for `exact.kernel`. A raw lattice answers about half of what it should in five dimensions;
            its own row sums are as much too small, so dividing by them mends that.
    """

    def __init__(self, f: Tensor, normalization: str = "symmetric") -> None:
        self.lattice = lattice = Lattice(f)
        (n, corners), rows = lattice.vertex.shape, lattice.size + 1
        self.corners = torch.arange(0, (n + 1) * corners, corners, dtype=torch.int32, device=f.device)
        self.threes = torch.arange(0, (rows + 1) * 3, 3, dtype=torch.int32, device=f.device)
        self.blur_weight = f.new_tensor([1.0, 0.5, 0.5]).repeat(rows)
        self.tables = None
        ones = torch.ones_like(f[:, 0])
        self.scales = (ones, ones)
        self.weights = (lattice.weights, lattice.weight * lattice.gain)
        if normalization != "none":
            n = self.apply(ones[:, None])[:, 0]
            root = n.rsqrt()
            self.scales = {"symmetric": (root, root), "rows": (ones, 1 / n)}[normalization]
            self.weights = self.scaled(*self.scales)

    def scaled(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of splat (N (d + 1),) and slice (N, d + 1) that also scale the values by (N,) before and after."""
        splat = self.lattice.weights * before.index_select(0, self.lattice.points)
        return splat, self.lattice.weight * (after * self.lattice.gain)[:, None]

    def splat_and_blur(self, values: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
        """(N, C) -> values of the lattice points (M + 1, C), the last of them 0. The next call overwrites them."""
        lattice, shape = self.lattice, (self.lattice.size + 1, values.shape[1])
        if self.tables is None or self.tables[0].shape != shape:
            self.tables = [values.new_empty(shape), values.new_empty(shape)]
        table, other = self.tables
        weighted_sums(values, lattice.points, lattice.starts, weight, out=table)
        for window in lattice.window.flip(0) if transposed else lattice.window:
            weighted_sums(table, window.view(-1), self.threes, self.blur_weight, out=other)
            table, other = other, table
        return table

    def slice(self, table: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        """(M + 1, C) -> values of points start to stop, (stop - start, C)."""
        vertex, weight = self.lattice.vertex[start:stop], weight[start:stop]
        starts = self.corners[: len(vertex) + 1]
        return F.embedding_bag(
            vertex.view(-1), table, starts, mode="sum", per_sample_weights=weight.view(-1), include_last_offset=True
        )

    def apply(self, values: Tensor, transposed: bool = False) -> Tensor:
        """(N, C) -> (N, C), without a gradient."""
        if values.device.type != "cpu":  # on a GPU one thread would sum all points of a lattice point
            before, after = reversed(self.scales) if transposed else self.scales
            return after[:, None] * self.lattice.filter(before[:, None] * values, transposed)
        splat, slice_ = self.transposed_weights if transposed else self.weights
        table = self.splat_and_blur(values, splat, transposed)
        return weighted_sums(
            table, self.lattice.vertex.view(-1), self.corners, slice_.view(-1), torch.empty_like(values)
        )

    @functools.cached_property
    def transposed_weights(self) -> tuple[Tensor, Tensor]:
        before, after = self.scales
        return self.weights if before is after else self.scaled(after, before)

    def __matmul__(self, values: Tensor) -> Tensor:
        return _Apply.apply(values, self, False)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, kernel: Filter, transposed: bool) -> Tensor:
        ctx.kernel, ctx.transposed = kernel, transposed
        return kernel.apply(values, transposed)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Apply.apply(gradient.contiguous(), ctx.kernel, not ctx.transposed), None, None


BLOCK = 16384  # rows at a time: they stay in the processor's cache, and no large temporary array is needed


def weighted_sums(table: Tensor, rows: Tensor, starts: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out[i] = sum of weight[e] * table[rows[e]] over the entries e from starts[i] to starts[i + 1] - 1."""
    for i in range(0, len(out), BLOCK):
        part = starts[i : i + BLOCK + 1]
        first, last = part[0].item(), part[-1].item()
        out[i : i + BLOCK] = F.embedding_bag(
            rows[first:last],
            table,
            part - first,
            mode="sum",
            per_sample_weights=weight[first:last],
            include_last_offset=True,
        )
    return out


@torch.no_grad()
def mean_field(
    unary: Tensor, kernels: Sequence[tuple[float, Filter]], steps: int, compatibility: Tensor | None = None
) -> Tensor:
    """`exact.mean_field` on the CPU, without a gradient, block by block. All arguments as there."""
    logits = (-unary).log_softmax(1)  # the same marginals
    softmax(logits.clone(), out=(q := torch.empty_like(logits)))
    weights = [(w * kernel.weights[1], kernel) for w, kernel in kernels]
    for _ in range(steps):
        tables = [kernel.splat_and_blur(q, kernel.weights[0]) for _, kernel in weights]
        for start in range(0, len(q), BLOCK):
            stop = start + BLOCK
            message = None
            for table, (weight, kernel) in zip(tables, weights, strict=True):
                part = kernel.slice(table, weight, start, stop)
                message = part if message is None else message.add_(part)
            if compatibility is not None:
                message = message @ -compatibility.T
            softmax(message.add_(logits[start:stop]), out=q[start:stop])
    return q


def softmax(x: Tensor, out: Tensor) -> None:
    """Over dim 1 of (N, K), x is overwritten. torch's own is not vectorised for fewer than 16 classes.

    Below 1e-30 it gives 0: numbers below 1e-38 would make the processor many times slower.
    """
    if x.shape[1] >= 16:
        torch.softmax(x, 1, out=out)
    else:
        x.sub_(x.amax(1, keepdim=True)).exp_()
        torch.div(x, x.sum(1, keepdim=True), out=out)
    F.threshold_(out, 1e-30, 0.0)

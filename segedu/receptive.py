"""Which part of the image a cell of a feature map depends on: by arithmetic (theoretical) and by gradient (effective).

The theoretical field is found by running the model without numbers, on torch's meta device, and following through each
operation the first and last input pixel that every row and every column of cells depends on. So it holds for any model:
dilation, branches, crops, sums, upsampling. Along a plain chain of layers it is the rule k' + (k - 1) s', s s' of Long,
Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, Sec. 3. The effective field is
that of Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016.
Chapters: chapters/02_fcn.ipynb and chapters/07_dilation.ipynb
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Number = int | float


class Field(NamedTuple):
    """The receptive field of a map's cells, in pixels of the image; (vertical, horizontal) where the two differ.

    size: pixels from the first to the last one that a cell depends on; inf if it sees all of any image.
    stride: pixels from the field of one cell to that of the next.
    centre: middle of the field of cell 0, counted from the middle of pixel 0; negative if the map begins in padding.

    If the size is inf, stride and centre are those of the branches that see a part; None if there are none.
    """

    size: Number | tuple[Number, Number]
    stride: Number | tuple[Number, Number] | None
    centre: Number | tuple[Number, Number] | None


def receptive_field(model: nn.Module, name: str, image_size: tuple[int, int] | None = None) -> Field:
    """The theoretical receptive field of the submodule `name` (one of `model.named_modules()`), in evaluation mode.

    Taken from cells that do not reach the image's border. Where these differ, as after upsampling, the size is the
    largest, stride and centre are the mean. Nothing is computed, on any device, and the model is left as it was.

    Args:
        image_size: (H, W) of the image; by default as large as needed, from 512 x 512 on.

    Raises:
        KeyError: no submodule of this name.
        ValueError: no cell's field lies inside the image, or it grows with the image.
        NotImplementedError: an operation whose reach is not known here.
    """
    if image_size is None:
        field = receptive_fields(model, [name])[name]
        reason = f"the field of {name!r} has no fixed size, or one above 4096 pixels"
    else:
        field = _field(_spans(model, [name], image_size).get(name), image_size)
        reason = f"no cells of {name!r} have their whole field inside an image of {image_size[0]} x {image_size[1]}"
    if field is None:
        raise ValueError(f"{reason}; give a larger image_size=(H, W)")
    return field


def receptive_fields(
    model: nn.Module, names: Iterable[str], image_size: tuple[int, int] = (512, 512)
) -> dict[str, Field | None]:
    """The receptive fields of several submodules at once, from images of `image_size` and larger.

    The image grows until no field grows any more, or the model refuses it: then the fields are those of the largest
    image it takes. None for a field that grows with the image, and for a submodule that gives no map, is not used, or
    has no cell whose field lies inside the image.
    """
    known: dict[str, Field] = {}
    last: dict[str, Field | None] = dict.fromkeys(names)
    for more in (0, 512, 1536, 3584, 7680):  # multiples of 512: a model that asks for multiples of 32, say, still runs
        size = (image_size[0] + more, image_size[1] + more)
        try:
            spans = _spans(model, last.keys() - known.keys(), size)
        except ValueError:  # the model takes no larger image
            if more == 0:
                raise
            return {name: known.get(name, last[name]) for name in names}
        for name in last.keys() - known.keys():
            field = _field(spans.get(name), size)
            if field is not None and field == last[name] and field.stride is not None:
                known[name] = field
            last[name] = field
        if len(known) == len(last):
            break
    unbounded = {name: field for name, field in last.items() if field is not None and field.size == math.inf}
    return {name: known.get(name, unbounded.get(name)) for name in last}


def effective_field(model: nn.Module, name: str, image: Tensor) -> Tensor:
    """How strongly the central cell of the submodule `name` depends on each pixel of one image: (3, H, W) -> (H, W).

    The absolute gradient of the cell's sum over channels, summed over colours, in evaluation mode. No parameter gets a
    gradient, and the model's mode is kept.
    """
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or len(image) != 1:
        raise ValueError(f"image must be one image (3, H, W), got shape {tuple(image.shape)}")
    image = image.detach().clone().requires_grad_()
    outputs: list[Tensor] = []
    keep = {name: lambda output: outputs.append(main_output(output))}
    with hooked(model, keep), evaluating(model), torch.enable_grad():
        model(image)
    if not outputs or outputs[-1].dim() != 4:
        raise ValueError(f"{name!r} must give a map (N, C, h, w), got {[tuple(output.shape) for output in outputs]}")
    height, width = outputs[-1].shape[-2:]
    (gradient,) = torch.autograd.grad(outputs[-1][0, :, height // 2, width // 2].sum(), image)
    return gradient[0].abs().sum(0)


@contextmanager
def hooked(model: nn.Module, calls: dict[str, Callable[[Any], None]]) -> Iterator[None]:
    """While open, `calls[name](output)` runs at each forward of the submodule `name`.

    Raises KeyError for a name that is not there, with those that are.
    """
    modules = dict(model.named_modules())
    for name in calls:
        if name not in modules:
            parent = name.rpartition(".")[0]
            parent = parent if parent in modules else ""
            there = [f"{parent}.{child}".lstrip(".") for child, _ in modules[parent].named_children()]
            raise KeyError(f"{type(model).__name__} has no submodule {name!r}; there are {', '.join(there)}")

    def hook(call: Callable[[Any], None]) -> Callable[..., None]:
        return lambda module, args, output: call(output)

    handles = []
    try:
        for name, call in calls.items():
            handles.append(modules[name].register_forward_hook(hook(call)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while open; then each submodule has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def meta_image(model: nn.Module, image_size: tuple[int, int]) -> Tensor:
    """(1, C, H, W) without numbers; C as the first convolution that the model defines asks for."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return torch.empty(1, first.in_channels if first else 3, *image_size, device="meta")


def run_on_meta(model: nn.Module, images: Tensor) -> None:
    """One forward of shapes alone, in evaluation mode: tensors on the meta device stand in for the model's own."""
    state = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = torch.float if tensor.is_floating_point() else tensor.dtype
        state[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    with evaluating(model), torch.no_grad():
        torch.func.functional_call(model, state, (images,))


class _Span(NamedTuple):
    """What the cells of a map depend on along one axis.

    first, last: pixels, one of each for every cell, or a single one for all. first > last: nothing but padding.
    everything: besides, all cells depend on the whole image, however large.
    """

    first: np.ndarray
    last: np.ndarray
    everything: bool = False


_FAR = 1 << 40  # beyond every pixel
_EVERYTHING = _Span(np.array([_FAR]), np.array([-_FAR]), True)

# Operations that leave each cell at its place, besides the pointwise ones, and which of their arguments is the axis
# they work on (it must not be one of the last two).
_SAME_PLACE = {
    "view": None, "_unsafe_view": None, "alias": None, "clone": None, "detach": None, "_to_copy": None, "expand": None,
    "cat": 1, "native_dropout": None, "native_batch_norm": None, "native_group_norm": None, "select": 1, "unsqueeze": 1,
    "squeeze": 1, "stack": 1, "unbind": 1, "split": 2, "split_with_sizes": 2,
}  # fmt: skip
# Operations that mix all cells along some axes, and which of their arguments are these.
_OVER_AXES = {
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "argmax": 1, "linalg_vector_norm": 2, "_softmax": 1,
    "_log_softmax": 1,
}  # fmt: skip


def _spans(model: nn.Module, names: Iterable[str], image_size: tuple[int, int]) -> dict[str, list[_Span]]:
    """The spans, vertical and horizontal and as long as the map, of each submodule that gives a map."""
    images = meta_image(model, image_size)
    images._spans = [_Span(np.arange(n), np.arange(n)) for n in image_size]
    found = {}

    def keep(name: str, output: Any) -> None:
        output = main_output(output)
        if output.dim() == 4 and hasattr(output, "_spans"):
            found[name] = [_stretched(span, n) for span, n in zip(output._spans, output.shape[-2:], strict=True)]

    with hooked(model, {name: partial(keep, name) for name in names}), _Follow():
        run_on_meta(model, images)
    return found


def _field(spans: list[_Span] | None, image_size: tuple[int, int]) -> Field | None:
    """The field from the spans of the cells that do not reach the border; None if there are too few of them."""
    if spans is None:
        return None
    axes = [_axis_field(span, n) for span, n in zip(spans, image_size, strict=True)]
    return None if None in axes else Field(*(v if v == h else (v, h) for v, h in zip(*axes, strict=True)))


def _axis_field(span: _Span, n: int) -> tuple[Number, Number | None, Number | None] | None:
    first, last, everything = span
    cells = np.flatnonzero((first > 0) & (last < n - 1) & (first <= last))
    cells = cells[len(cells) // 4 : len(cells) - len(cells) // 4]  # padding of later layers can reach further in
    first, last = first[cells], last[cells]
    for period in range(1, len(cells) // 2 + 1):  # after how many cells the pattern of the fields repeats
        steps = np.concatenate([first[period:] - first[:-period], last[period:] - last[:-period]])
        if (steps == steps[0]).all():
            stride = Fraction(int(steps[0]), period)
            middles = (Fraction(int(first[i] + last[i]), 2) - stride * int(cells[i]) for i in range(period))
            size = math.inf if everything else int((last - first).max()) + 1
            return size, _number(stride), _number(sum(middles) / period)
    return (math.inf, None, None) if everything else None


def _number(x: Fraction) -> Number:
    return int(x) if x.denominator == 1 else float(x)


class _Follow(TorchDispatchMode):
    """Gives the result of each operation on a map its spans, as the attribute `_spans`. Weights have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        named = [argument for argument in func._schema.arguments if not argument.kwarg_only]
        args = (*args, *(kwargs.get(argument.name, argument.default_value) for argument in named[len(args) :]))
        sources = [tensor for tensor in _tensors(args) if hasattr(tensor, "_spans")]
        op = func.overloadpacket.__name__
        if sources and not op.endswith("_like") and not op.startswith("new_"):  # these take no more than the shape
            results = _tensors(output)
            for result in results:
                if result.dim() == results[0].dim():  # not the statistics that a normalisation returns besides
                    result._spans = [_follow(func, args, sources, result, axis) for axis in (-2, -1)]
        return output


def _follow(func: Any, args: tuple, sources: list[Tensor], result: Tensor, axis: int) -> _Span:
    """The span of an operation's result along one axis: -2 vertical, -1 horizontal."""
    op = func.overloadpacket.__name__
    source = sources[0]
    if op == "cat" and args[1] in (axis, axis + source.dim()):
        return _joined(args[0], axis)

    span = reduce(_union, (tensor._spans[axis] for tensor in sources))
    if source.dim() == result.dim() == 4:
        taps = _taps(func, args, source.shape[axis], result.shape[axis], axis)
        if taps is not None:
            return _gathered(_stretched(span, source.shape[axis]), taps)

    if all(len(s.first) == 1 for tensor in sources for s in tensor._spans):
        return span  # a single cell, or all cells alike

    mixed = _mixed(op, args, source, result)
    if axis in mixed:
        span = _union(span, _EVERYTHING) if result.shape == source.shape else _EVERYTHING
    fits = len(mixed) == 2 or (result.dim() > 2 and len(span.first) in (1, result.shape[axis]))
    fits = fits and (len(mixed) != 1 or result.dim() == source.dim())
    on_a_view = func._schema.is_mutable and args[0]._is_view()  # the map behind the view would not know
    if not fits or on_a_view or not (mixed or _keeps_place(func, args, source, result)):
        shapes = f"{tuple(source.shape)} -> {tuple(result.shape)}"
        raise NotImplementedError(f"the reach of {func} ({shapes}) is not known to segedu.receptive; add it to _taps")
    return span


def _taps(func: Any, args: tuple, n: int, size: int, axis: int) -> np.ndarray | None:
    """(size, T): the cells, of n, that each cell of the result depends on; others than 0..n-1 are padding.

    None for an operation that looks at no window.
    """
    cell = np.arange(size)[:, None]
    op = func.overloadpacket.__name__

    def along(values: list[int]) -> int:
        return values[axis] if len(values) > 1 else values[0]

    if op == "convolution":
        stride, padding, dilation = map(along, args[3:6])
        tap = np.arange(args[1].shape[axis]) * dilation
        if not args[6]:
            return cell * stride - padding + tap
        cell = cell + padding - tap  # transposed: cell = source * stride - padding + tap
        return np.where(cell % stride == 0, cell // stride, -1)
    if op in ("max_pool2d_with_indices", "avg_pool2d"):
        kernel, stride, padding = along(args[1]), along(args[2] or args[1]), along(args[3])
        dilation = along(args[4]) if op == "max_pool2d_with_indices" else 1
        return cell * stride - padding + np.arange(kernel) * dilation
    if op in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        start, end = cell * n // size, -(-(cell + 1) * n // size)
        tap = start + np.arange((end - start).max())
        return np.where(tap < end, tap, -1)
    if op == "max_unpool2d":
        return cell // -(-size // n)
    if op == "constant_pad_nd":
        left, _, top, *_ = (*args[1], 0, 0)
        return cell - (left if axis == -1 else top)
    if op == "reflection_pad2d":
        left, _, top, _ = args[1]
        return n - 1 - abs(n - 1 - abs(cell - (left if axis == -1 else top)))
    if op == "slice":
        _, dim, start, _, step = args
        if dim not in (axis, axis + 4):
            return cell
        start = min(max(start + n if start < 0 else start, 0), n) if start else 0
        return start + cell * step
    if "upsample" in op:  # resampling by any rule: see where a one in each cell goes to
        ones = torch.eye(n, device="cpu").view(1, n, n, 1)
        weights = func(ones, [size, 1], *args[2:-2], args[axis], None)[0, :, :, 0].numpy() != 0
        return np.stack([weights.argmax(0), n - 1 - weights[::-1].argmax(0)], axis=1)
    return None


def _mixed(op: str, args: tuple, source: Tensor, result: Tensor) -> set[int]:
    """The axes, of -2 and -1, along which an operation makes each cell depend on all cells."""
    if op in _OVER_AXES:
        axes = args[_OVER_AXES[op]] if len(args) > _OVER_AXES[op] else None
        axes = [axes] if isinstance(axes, int) else axes or range(source.dim())
        return {-2, -1} & {axis % source.dim() - source.dim() for axis in axes}
    if op == "native_group_norm" or (op == "native_batch_norm" and args[5]):  # by the statistics of this image
        return {-2, -1}
    if op in ("view", "_unsafe_view") and result.dim() == 2:  # the whole map as one vector
        return {-2, -1}
    return set()


def _keeps_place(func: Any, args: tuple, source: Tensor, result: Tensor) -> bool:
    op = func.overloadpacket.__name__
    if torch.Tag.pointwise in func.tags or op in _OVER_AXES:
        return True
    if op not in _SAME_PLACE:
        return False
    number = _SAME_PLACE[op]
    axis = args[number] if number is not None and len(args) > number else 0  # squeeze() names none
    return (axis if axis < 0 else axis - max(source.dim(), result.dim())) < -2


def _gathered(span: _Span, taps: np.ndarray) -> _Span:
    n = len(span.first)
    inside = (taps >= 0) & (taps < n)
    taps = taps.clip(0, n - 1)
    first = np.where(inside, span.first[taps], _FAR).min(1)
    last = np.where(inside, span.last[taps], -_FAR).max(1)
    return _Span(first, last, span.everything)


def _union(a: _Span, b: _Span) -> _Span:
    return _Span(np.minimum(a.first, b.first), np.maximum(a.last, b.last), a.everything or b.everything)


def _joined(maps: list[Tensor], axis: int) -> _Span:
    nothing = _EVERYTHING._replace(everything=False)
    spans = [_stretched(getattr(x, "_spans", {axis: nothing})[axis], x.shape[axis]) for x in maps]
    first, last, everything = zip(*spans, strict=True)
    return _Span(np.concatenate(first), np.concatenate(last), any(everything))


def _stretched(span: _Span, n: int) -> _Span:
    return _Span(np.broadcast_to(span.first, n), np.broadcast_to(span.last, n), span.everything)


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in an argument or output: itself, or those in its lists and tuples."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for branch in tree for tensor in _tensors(branch)] if isinstance(tree, list | tuple) else []


def main_output(output: Any) -> Tensor:
    """What a module is measured by: its tensor, the last of a list (a trunk's maps), the first of a tuple (a pool's values)."""
    return _tensors(output)[-1 if isinstance(output, list) else 0]

"""Look inside a model: the maps of its submodules, and its ledger (sizes, receptive fields, parameters, work, memory).

Chapter: chapters/02_fcn.ipynb
"""

import html
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from segedu.receptive import Field, hooked, main_output, meta_image, receptive_fields, run_on_meta


@contextmanager
def record(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """While open, the outputs of the submodules `names` are kept, detached, in the dict it gives.

    Names are those of `model.named_modules()`; of several forwards the last one stays. A wrong name is a KeyError that
    lists the ones there are.

        with record(model, ["stage3"]) as maps:
            model(images)
        maps["stage3"]                  # (N, C, h, w)
    """
    maps: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        maps[name] = _detached(output)

    with hooked(model, {name: partial(keep, name) for name in names}):
        yield maps


class Row(NamedTuple):
    """One box of a model. What is None cannot be told, or the box is not used.

    size: (C, h, w) of its output. field: receptive field of its output; `field.stride` is the output stride.
    parameters: learnable. macs: multiply-adds. memory: MB (10^6 bytes) of its output in float32.
    """

    name: str
    size: tuple[int, ...] | None
    field: Field | None
    parameters: int
    macs: int
    memory: float


@dataclass(frozen=True)
class Ledger:
    """The books of a model for one image. `parameters`, `macs` and `memory` (of the boxes' outputs) are totals."""

    model: str
    image_size: tuple[int, int]
    rows: list[Row]
    parameters: int
    macs: int

    @property
    def memory(self) -> float:
        return sum(row.memory for row in self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [
            (
                row.name,
                " x ".join(map(str, row.size)) if row.size else "-",
                _text(row.field and row.field.stride),
                _text(row.field and row.field.size),
                f"{row.parameters:,}",
                f"{row.macs / 1e6:,.1f}",
                f"{row.memory:.2f}",
            )
            for row in self.rows
        ]
        return [*rows, ("total", "", "", "", f"{self.parameters:,}", f"{self.macs / 1e6:,.1f}", f"{self.memory:.2f}")]

    def __str__(self) -> str:
        cells = [_HEAD, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.ljust(n) if i < 2 else text.rjust(n) for i, (text, n) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join([self._title(), *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{text}</th>' for text in _HEAD)
        body = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th>' + "".join(f"<td>{text}</td>" for text in row) + "</tr>"
            for name, *row in self._cells()
        )
        title = html.escape(self._title())
        return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _title(self) -> str:
        return f"{self.model}, one image of {self.image_size[0]} x {self.image_size[1]}"


_HEAD = ("box", "C x h x w", "stride", "field", "parameters", "multiply-adds (M)", "output (MB)")


def summary(model: nn.Module, image_size: tuple[int, int]) -> Ledger:
    """The ledger of a model: one row for each direct submodule, in the order they run, for one image (H, W).

    Works on any device, the meta device too, and does no arithmetic. Learnable parameters only: frozen ones and buffers
    are not counted. Multiply-adds are those of convolutions and matrix products, half of what torch's FlopCounterMode
    counts, which takes a multiplication and an addition for two. A box that runs several times is listed at its first
    place, with the output of its last run and the multiply-adds of all. Of a trunk that gives a list of maps the last counts.
    """
    boxes = dict(_boxes(model))
    sizes: dict[str, tuple[int, ...]] = {}
    macs = dict.fromkeys(boxes, 0)
    before: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def start(name: str, *_: Any) -> None:
        before[name] = counter.get_total_flops()

    def end(name: str, output: Any) -> None:
        sizes[name] = tuple(main_output(output).shape[1:])
        macs[name] += (counter.get_total_flops() - before[name]) // 2

    handles = [box.register_forward_pre_hook(partial(start, name)) for name, box in boxes.items()]
    try:
        with hooked(model, {name: partial(end, name) for name in boxes}), counter:
            run_on_meta(model, meta_image(model, image_size))
    finally:
        for handle in handles:
            handle.remove()

    fields = receptive_fields(model, boxes, image_size)
    order = [*sizes, *(name for name in boxes if name not in sizes)]
    rows = [
        Row(
            name,
            sizes.get(name),
            fields[name],
            _learnable(boxes[name]),
            macs[name],
            4e-6 * math.prod(sizes.get(name, [0])),
        )
        for name in order
    ]
    return Ledger(type(model).__name__, image_size, rows, _learnable(model), counter.get_total_flops() // 2)


def _boxes(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The direct submodules; those of a list in its place, as a list does not run itself."""
    for name, module in model.named_children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield from _boxes(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _learnable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return type(output)(map(_detached, output)) if isinstance(output, list | tuple) else output


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " x ".join(map(_text, value))
    return "all" if value == math.inf else f"{value:g}"

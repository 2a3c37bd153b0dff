"""search: the first-order bilevel search of Auto-DeepLab, one process, on whatever device there is.

Chapter: chapters/14_autodeeplab.ipynb
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segedu.checkpoint import resume, save_checkpoint
from segedu.models.autodeeplab import Cell, SuperNet, transitions
from segedu.recipes import Recipe
from segedu.training import (
    Loss,
    _accelerator,
    _check,
    _collate,
    _Draws,
    _mix,
    _not_finite,
    _optimizer,
    pixel_loss,
)


@dataclass
class Search:
    """What a search gave: cell and path at its end, and how they came about.

    steps: T of them, equally spaced, the last after all updates; transitions (T, L, 4, 3) and alphas (T, edges, operators,
    softmaxed) as they were then. loss: of the weights, one per step; architecture_loss: of alpha and beta, from their start.
    """

    recipe: Recipe
    seed: int
    device: str
    steps: list[int] = field(default_factory=list)
    transitions: Tensor = field(default_factory=lambda: torch.empty(0))
    alphas: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: list[float] = field(default_factory=list)
    architecture_loss: list[float] = field(default_factory=list)
    cell: Cell = ()
    path: tuple[int, ...] = ()
    seconds: float = 0.0


def search(
    supernet: SuperNet,
    half_a: Dataset,
    half_b: Dataset,
    recipe: Recipe,
    *,
    start: int | None = None,
    lr: float = 3e-3,
    weight_decay: float = 1e-3,
    seed: int = 0,
    moments: int = 20,
    loss: Loss = pixel_loss,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    device: str | None = None,
    progress: bool = True,
) -> Search:
    """Train weights on one half of the pictures and alpha and beta on the other, in turns (Auto-DeepLab, Sec. 3.2.2).

    Args:
        half_a, half_b: items (image (3, H, W) float in [0, 1], target (H, W) long, 255 = void); for the weights, and for
            alpha and beta.
        recipe: of the weights; its crop, flip and batch hold for both halves.
        start: first step with an update of alpha and beta. None: half of the steps (the paper's epoch 20 of 40).
        lr, weight_decay: of alpha and beta, by Adam; the paper's. A short search needs a larger lr.
        moments: how many times transitions and alphas are kept, besides the end.
        checkpoint: a .safetensors file, written every `checkpoint_every` steps and at the end. If it exists, the search
            goes on from it, bit for bit as if it had never stopped (same device and number of threads).

    Batch norm's statistics follow both halves; no gradient of one half reaches the parameters of the other.

    Raises:
        ValueError: data, recipe, network and checkpoint do not fit together; of a checkpoint of another space, both are named.
        FloatingPointError: a loss, alpha or beta is not finite; names the step. The last good checkpoint stays.
        OSError: a checkpoint cannot be written. The last good one stays.
    """
    place = _accelerator(device, "no").device
    num_classes, _ = (_check(supernet, half, recipe) for half in (half_a, half_b))
    start = recipe.steps // 2 if start is None else start
    if not 0 <= start < recipe.steps or moments < 1 or lr <= 0:
        raise ValueError(
            f"start must be a step from 0 to {recipe.steps - 1}, moments at least 1 and lr above 0, got {start}, {moments}, {lr}"
        )
    supernet.to(place).train()
    weights, architecture = supernet.weights(), supernet.architecture()
    both = _Both(_optimizer_of(supernet, recipe), Adam(architecture, lr=lr, weight_decay=weight_decay))
    path = None if checkpoint is None else Path(checkpoint)
    facts = {
        "space": supernet.space, "recipe": asdict(recipe), "seed": seed, "pictures": [len(half_a), len(half_b)],
        "architecture": {"start": start, "lr": lr, "weight_decay": weight_decay, "moments": moments},
    }  # fmt: skip
    found = Search(recipe, seed, str(place))
    kept: list[tuple[int, list, list]] = []
    if path is not None and path.exists():
        old = resume(path, supernet, both, facts)
        found.loss, found.architecture_loss, found.seconds = old["loss"], old["architecture_loss"], old["seconds"]
        kept = old["kept"]

    def keep(step: int) -> None:
        kept.append((step, transitions(supernet.beta).tolist(), supernet.alpha.softmax(1).tolist()))

    keep_at = {round(i * recipe.steps / moments) for i in range(moments)}
    began, before, done = time.perf_counter(), found.seconds, len(found.loss)
    batches = zip(
        _batches(half_a, recipe, seed, num_classes, done),
        _batches(half_b, recipe, _mix(seed, 3), num_classes, done), strict=True,
    )  # fmt: skip
    bar = tqdm(
        batches, initial=done, total=recipe.steps, unit="step", file=sys.stderr, leave=False, disable=not progress
    )
    with torch.random.fork_rng():
        for step, (batch_a, batch_b) in enumerate(bar, start=done):
            if step in keep_at:
                keep(step)
            for group in both.weights.param_groups:
                group["lr"] = recipe.lr_at(step) * group["factor"]
            turns = [(found.loss, batch_a, weights, both.weights)]
            if step >= start:
                turns.append((found.architecture_loss, batch_b, architecture, both.architecture))
            for turn, (losses, (images, target), parameters, optimizer) in enumerate(turns):
                torch.manual_seed(_mix(seed, 2, step, turn))
                value = loss(supernet, images.to(place), target.to(place))
                if not math.isfinite(value.item()):
                    raise _not_finite(f"the loss is {value.item()}", step, recipe, path)
                value.backward(inputs=parameters)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(value.item())
            last = step + 1 == recipe.steps
            if last:
                keep(recipe.steps)
            if path is not None and (last or (step + 1) % checkpoint_every == 0):
                if not all(p.isfinite().all() for p in supernet.parameters()):
                    raise _not_finite("weights, alpha or beta are not finite", step, recipe, path)
                facts |= {"loss": found.loss, "architecture_loss": found.architecture_loss, "kept": kept,
                          "seconds": before + time.perf_counter() - began}  # fmt: skip
                save_checkpoint(path, supernet, both, facts)
    found.seconds = before + time.perf_counter() - began
    found.steps = [step for step, _, _ in kept]
    found.transitions = torch.tensor([moment for _, moment, _ in kept])
    found.alphas = torch.tensor([moment for _, _, moment in kept])
    found.cell, found.path = supernet.decode()
    return found


def _optimizer_of(supernet: SuperNet, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of all parameters but alpha and beta."""
    for p in supernet.architecture():
        p.requires_grad_(False)
    optimizer = _optimizer(supernet, recipe)
    for p in supernet.architecture():
        p.requires_grad_(True)
    return optimizer


def _batches(data: Dataset, recipe: Recipe, seed: int, num_classes: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    draws = _Draws(data, recipe, seed, num_classes, start, rank=0, world=1)
    return iter(DataLoader(draws, batch_size=recipe.batch, collate_fn=_collate))


class _Both:
    """Two optimizers as one checkpoint: states of the weights from 0 on, those of alpha and beta are -2 and -1."""

    def __init__(self, weights: Optimizer, architecture: Optimizer) -> None:
        self.weights, self.architecture = weights, architecture

    def state_dict(self) -> dict:
        state = self.weights.state_dict()["state"]
        state |= {i - 2: value for i, value in self.architecture.state_dict()["state"].items()}
        return {"state": state, "param_groups": None}

    def load_state_dict(self, both: dict) -> None:
        for optimizer, shift in ((self.weights, 0), (self.architecture, 2)):
            state = {i + shift: value for i, value in both["state"].items() if (i < 0) == bool(shift)}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""fit, evaluate, predict: one loop for every model, on Hugging Face Accelerate.

Runs on a CPU, one GPU, or several processes started with `accelerate launch`. Every random draw of a step depends on
the seed and the step alone, so a run that was cut off goes on exactly where its last checkpoint was.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segedu.checkpoint import resume, save_checkpoint
from segedu.data.transforms import augment
from segedu.metrics import VOID, Scores
from segedu.recipes import Recipe

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass
class Run:
    """What a training gave. `loss` has one value per step; `scores` is None without validation data."""

    recipe: Recipe
    seed: int
    device: str
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of training alone, over all sittings
    peak_memory_mb: float = 0.0  # of the GPU's tensors; on a CPU of the whole process
    scores: Scores | None = None


def pixel_loss(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy at full resolution, mean over pixels that are not void. (N, 3, H, W), (N, H, W) -> scalar.

    A batch that is void everywhere gives 0, not NaN.
    """
    total = F.cross_entropy(model(images).float(), target, ignore_index=VOID, reduction="sum")
    return total / (target != VOID).sum().clamp(min=1)


def fit(
    model: nn.Module,
    train: Dataset,
    recipe: Recipe,
    *,
    val: Dataset | None = None,
    seed: int = 0,
    loss: Loss = pixel_loss,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    about: dict | None = None,
    mixed_precision: str = "no",
    workers: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Run:
    """Train `model` in place and return what happened.

    Args:
        train: items (image (3, H, W) float in [0, 1], target (H, W) long, 255 = void).
        val: scored once at the end, as `evaluate` does.
        loss: `(model, images, target) -> scalar`.
        checkpoint: a .safetensors file, written every `checkpoint_every` steps and at the end. If it exists, training
            goes on from it, bit for bit as if it had never stopped (same device and number of threads).
        about: facts to keep in the checkpoint (JSON).
        mixed_precision: "no", "bf16" or "fp16".
        workers: processes that load pictures.
        device: "cpu" to stay off the GPU; None takes what there is.
        progress: a progress line on stderr.

    Raises:
        ValueError: data, recipe, model and checkpoint do not fit together.
        FloatingPointError: the loss, or a weight to be saved, is not finite; names the step. The last good checkpoint stays.
        OSError: a checkpoint cannot be written. The last good one stays.
    """
    accelerator = _accelerator(device, mixed_precision)
    rank, world = accelerator.process_index, accelerator.num_processes
    num_classes = _check(model, train, recipe, world)
    optimizer = _optimizer(model, recipe)
    run = Run(recipe, seed, str(accelerator.device))
    path = None if checkpoint is None else Path(checkpoint)
    facts = {"recipe": asdict(recipe), "seed": seed, "pictures": len(train)}
    scaler = None
    if path is not None and path.exists():
        found = resume(path, model, optimizer, facts)
        run.loss, run.seconds, scaler = found["loss"], found["seconds"], found["scaler"]
    net, optimizer = accelerator.prepare(model, optimizer)
    if scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(scaler)
    net.train()

    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began, before = time.perf_counter(), run.seconds
    draws = _Draws(train, recipe, seed, num_classes, len(run.loss), rank, world)
    loader = DataLoader(draws, batch_size=recipe.batch // world, num_workers=workers, collate_fn=_collate)
    bar = tqdm(
        loader, initial=len(run.loss), total=recipe.steps, unit="step", file=sys.stderr, leave=False,
        disable=not progress or not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 30,
    )  # fmt: skip
    with torch.random.fork_rng():
        for step, (images, target) in enumerate(bar, start=len(run.loss)):
            torch.manual_seed(_mix(seed, 2, step, rank))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step) * group["factor"]
            with accelerator.autocast():
                value = loss(net, images.to(accelerator.device), target.to(accelerator.device))
            shown = accelerator.reduce(value.detach().clone(), "mean").item()
            if not math.isfinite(shown):
                raise _not_finite(f"the loss is {shown}", step, recipe, path)
            accelerator.backward(value)
            optimizer.step()
            optimizer.zero_grad()
            run.loss.append(shown)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
            last = step + 1 == recipe.steps
            if path is not None and accelerator.is_main_process and (last or (step + 1) % checkpoint_every == 0):
                if not all(p.isfinite().all() for p in model.parameters()):  # a finite loss can have a NaN gradient
                    raise _not_finite("weights are not finite", step, recipe, path)
                run.seconds = before + time.perf_counter() - began
                scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
                facts |= {"loss": run.loss, "seconds": run.seconds, "about": about or {}, "scaler": scaler}
                save_checkpoint(path, model, optimizer.optimizer, facts)
    run.seconds = before + time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run.peak_memory_mb = peak / 2**20
    accelerator.wait_for_everyone()
    if val is not None:
        run.scores = evaluate(model, val, device=device)
    return run


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, *, device: str | None = None, progress: bool = False) -> Scores:
    """Score `model` on every picture of `data` at its own size, uncropped. Several processes share the pictures.

    One confusion matrix for the whole set, boundary F1 averaged over pictures, recall by object size.

    Raises:
        ValueError: the set is empty, or an item is not (image (3, H, W), target (H, W)).
    """
    accelerator = _accelerator(device, "no")
    num_classes = _check(model, data)
    was_training = model.training
    model.to(accelerator.device).eval()
    scores = Scores(torch.zeros(num_classes, num_classes, dtype=torch.long), classes=getattr(data, "classes", None))
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    for i in tqdm(mine, unit="picture", file=sys.stderr, leave=False, disable=not progress):
        image, target = data[i]
        _check_item(image, target, i)
        labels = model(image[None].to(accelerator.device)).argmax(1)[0].cpu()
        scores = scores + Scores.of(labels, target, num_classes, classes=scores.classes)
    model.train(was_training)
    sums = {name: getattr(scores, name).to(accelerator.device) for name in ("matrix", "boundary", "sizes", "bands")}
    return Scores(**{name: accelerator.reduce(part) for name, part in sums.items()}, classes=scores.classes)


@torch.no_grad()
def predict(model: nn.Module, image: Tensor | np.ndarray | str | Path) -> Tensor:
    """Labels (H, W), long, on the CPU, of one picture.

    Args:
        image: a path, a PIL image, an array (H, W, 3) of 0-255 integers, or a tensor (3, H, W): floats in [0, 1] or
            0-255 integers. Photos are turned as their EXIF tag says; grey ones become RGB.
    """
    was_training = model.training
    device = next(model.parameters()).device
    labels = model.eval()(as_image(image)[None].to(device)).argmax(1)[0].cpu()
    model.train(was_training)
    return labels


def as_image(image: Tensor | np.ndarray | str | Path) -> Tensor:
    """Anything `predict` takes -> float (3, H, W) in [0, 1]. Raises ValueError or FileNotFoundError."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"no picture at {image}")
        try:
            image = Image.open(image)
            image.load()
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read a picture from {image}: {error}") from None
    if isinstance(image, Image.Image):
        image = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be (H, W, 3), got {image.shape}; a tensor would be (3, H, W)")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture must be (3, H, W), got {getattr(image, 'shape', type(image).__name__)}")
    if not image.is_floating_point():
        image = image.float() / 255
    if image.numel() == 0 or image.min() < 0 or image.max() > 1:
        raise ValueError(f"float pictures must lie in [0, 1], got {tuple(image.shape)}; divide 0-255 values by 255")
    return image.float()


def _not_finite(what: str, step: int, recipe: Recipe, path: Path | None) -> FloatingPointError:
    kept = f"the last good checkpoint is {path}" if path and path.exists() else "no checkpoint was kept"
    return FloatingPointError(
        f"{what} at step {step} of {recipe.steps} (lr {recipe.lr_at(step):g}); {kept}. "
        "Lower lr, lengthen the warm-up or look at the pictures of this step"
    )


def _accelerator(device: str | None, mixed_precision: str) -> Accelerator:
    if device not in (None, "cpu"):
        raise ValueError(f'device must be None (what there is) or "cpu", got {device!r}')
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get("WORLD_SIZE", "1")) == 1)
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)


def _check_item(image: Tensor, target: Tensor, i: int) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image {i} must be float (3, H, W) in [0, 1], got {what}")
    if not isinstance(target, Tensor) or target.dtype != torch.long:
        raise ValueError(f"target {i} must be long (H, W), got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != image.shape[1:]:
        raise ValueError(
            f"target {i} must be as large as its image, {tuple(image.shape[1:])}, got {tuple(target.shape)}"
        )


@torch.no_grad()
def _check(model: nn.Module, data: Dataset, recipe: Recipe | None = None, world: int = 1) -> int:
    """Do data, model and recipe fit together? Returns the number of classes."""
    if len(data) == 0:
        raise ValueError("the data set is empty; it needs at least one picture")
    if recipe is not None and recipe.batch % world:
        raise ValueError(f"batch {recipe.batch} cannot be shared by {world} processes; make it a multiple of {world}")
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if recipe is not None and norms and recipe.batch // world < 2:
        raise ValueError(
            f"batch must be at least 2 per process: {norms[0]} is a batch norm, got {recipe.batch // world}"
        )
    image, target = data[0]
    _check_item(image, target, 0)
    was_training = model.training
    device = next(model.parameters()).device
    logits = model.eval()(image[None].to(device))
    model.train(was_training)
    if logits.ndim != 4 or logits.shape[-2:] != target.shape:
        raise ValueError(f"logits must be (N, K, {target.shape[0]}, {target.shape[1]}), got {tuple(logits.shape)}")
    classes = getattr(data, "classes", None)
    if classes is not None and len(classes) != logits.shape[1]:
        raise ValueError(
            f"the data has {len(classes)} classes, the model {logits.shape[1]}; build it with {len(classes)}"
        )
    return logits.shape[1]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [], "factor": new * score * bias, "weight_decay": decay}
        for new in (1.0, recipe.new_lr)
        for score in (1.0, recipe.score_lr)
        for bias, decay in ((1.0, recipe.weight_decay), (recipe.bias_lr, 0.0))
    ]
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts = name.split(".")
            new = recipe.new_lr != 1.0 and "backbone" not in parts
            score = recipe.score_lr != 1.0 and any(part.startswith("score") for part in parts)
            groups[4 * new + 2 * score + name.endswith("bias")]["params"].append(p)
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def _mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, 0, epoch))).tolist()


class _Draws(Dataset):
    """The pictures of the steps from `start` on, as this process sees them: a pure function of seed and step."""

    def __init__(self, data: Dataset, recipe: Recipe, seed: int, num_classes: int, start: int, rank: int, world: int):
        self.data, self.recipe, self.seed, self.num_classes, self.start = data, recipe, seed, num_classes, start
        self.rank, self.share = rank, recipe.batch // world
        self.augment = augment(crop=recipe.crop, scale=recipe.scale, flip=recipe.flip, elastic=recipe.elastic)

    def __len__(self) -> int:
        return (self.recipe.steps - self.start) * self.share

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        if not 0 <= k < len(self):
            raise IndexError(k)
        step, slot = divmod(k, self.share)
        position = (self.start + step) * self.recipe.batch + self.rank * self.share + slot
        epoch, place = divmod(position, len(self.data))
        i = _order(self.seed, epoch, len(self.data))[place]
        image, target = self.data[i]
        _check_item(image, target, i)
        wrong = (target != VOID) & ((target < 0) | (target >= self.num_classes))
        if wrong.any():
            found = sorted(set(target[wrong].tolist()))
            raise ValueError(
                f"labels of target {i} must be 0 to {self.num_classes - 1} or {VOID} (void), got {found[:5]}; "
                f"map them, or build the model with more classes"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self.seed, 1, position))
            return self.augment(image, target)


def _collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    sizes = {tuple(image.shape[1:]) for image, _ in items}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a batch must be of one size, got {sorted(sizes)}; set crop in the recipe")
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.stack(targets)

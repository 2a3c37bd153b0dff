"""Recorded runs: train, score, and write one JSON each to results/. Runs whose file is there are skipped.

    python tools/record.py                    every experiment
    python tools/record.py skips sampling     some of them
    python tools/record.py camvid --seeds 0   with the data found through SEGEDU_DATA

A run that was cut goes on from its checkpoint in runs/.
"""

import argparse
import itertools
import json
import platform
import subprocess
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

import segedu as sg
from segedu.backbones import he_init
from segedu.checkpoint import load_checkpoint
from segedu.crf import CRFasRNN, DenseCRF, WithCRF
from segedu.data.cells import merged
from segedu.layers import coarse_loss, freeze, normalize, pool_with_switches, unpool
from segedu.metrics import VOID, confusion_matrix
from segedu.models.autodeeplab import SuperNet, trellis
from segedu.models.deconvnet import Ensemble, ObjectCrops, OverProposals, ProposalCrops, grid_boxes
from segedu.models.deeplab_v2 import MultiScale, multiscale_loss
from segedu.models.dilation import Context, load_front_end
from segedu.models.fcn import load_coarser, sampled_loss
from segedu.models.pspnet import PyramidPooling, auxiliary_loss
from segedu.models.segnet import balanced_loss, median_frequency
from segedu.models.unet import border_loss
from segedu.search import Search
from segedu.search import search as architecture_search
from segedu.training import Loss, pixel_loss

ROOT = Path(__file__).parents[1]
SMALL = {"pad": 1, "width": 1 / 8}
TOYTOWN = replace(sg.recipes.MINI, steps=1500)


class WaysUp(nn.Module):
    """Three stages down, three up: the net of chapters/03_upsampling.ipynb. `way` is how its maps become larger.

    way: "nearest", "bilinear", "unpool" (each followed by a 3x3 convolution), or "transposed" (3x3, stride 2).
    """

    def __init__(self, num_classes: int, *, way: str) -> None:
        super().__init__()
        up = {"conv": nn.ConvTranspose2d, "stride": 2, "output_padding": 1} if way == "transposed" else {}
        self.way = way
        self.down = nn.ModuleList([self.stage(3, 16), self.stage(16, 32), self.stage(32, 64)])
        self.up = nn.ModuleList([self.stage(64, 32, **up), self.stage(32, 16, **up), self.stage(16, 16, **up)])
        self.score = nn.Conv2d(16, num_classes, 1)

    @staticmethod
    def stage(c_in: int, c_out: int, conv: type = nn.Conv2d, **options: int) -> nn.Sequential:
        return nn.Sequential(conv(c_in, c_out, 3, padding=1, **options), nn.BatchNorm2d(c_out), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x, pools = normalize(images), []
        for stage in self.down:
            before = stage(x)
            x, switches = pool_with_switches(before)
            pools.append((switches, before))
        for stage in self.up:
            switches, before = pools.pop()
            if self.way == "unpool":
                x = unpool(x, switches, like=before)
            elif self.way != "transposed":
                x = F.interpolate(x, scale_factor=2, mode=self.way)
            x = stage(x)
        return self.score(x)


class UNetSum(sg.UNet):
    """U-Net that adds what it should put side by side. Same parameters; half of the channels stay empty."""

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([up + skip, torch.zeros_like(skip)], dim=1)


class UNetAlone(sg.UNet):
    """U-Net without skips. Same parameters; half of the channels stay empty."""

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([up, torch.zeros_like(skip)], dim=1)


class GCNShifted(sg.GCN):
    """GCN that doubles its maps by plain interpolation: cells lie up to 15.5 pixels off those that they are added to."""

    def forward(self, images: Tensor) -> Tensor:
        *finer, c5 = self.backbone(normalize(images))
        x = self.score5(c5)
        for score, c in zip((self.score4, self.score3, self.score2), reversed(finer), strict=True):
            x = score(c) + F.interpolate(x, c.shape[-2:], mode="bilinear")
        return F.interpolate(x, images.shape[-2:], mode="bilinear")


@dataclass(frozen=True)
class Job:
    """One run: what to build, on what, how. `start` may change the fresh model, by training a coarser one first."""

    experiment: str
    name: str
    arguments: dict | Callable[[int], dict]  # or what they are for a seed
    model: Callable[..., nn.Module] = sg.FCN
    recipe: sg.recipes.Recipe = TOYTOWN
    data: str = "toytown"
    loss: Loss = pixel_loss
    start: Callable[[nn.Module, int], None] | None = None
    pictures: Callable[[Dataset], Dataset] = lambda data: data  # what of the training set the model sees
    scored: Callable[[nn.Module, int], nn.Module] = lambda model, seed: model  # what is scored on whole pictures
    weights: str = ""  # name of the run that has the same training; default: this one
    measured: Callable[[nn.Module, Dataset], dict] = lambda model, test: {}  # beside the scores
    chapter: str = "02_fcn"


def staged(model: nn.Module, seed: int) -> None:
    """FCN-32s, then FCN-16s from it, then `model` from that: a third of the steps each."""
    data, recipe, coarse = sg.Toytown("train"), replace(TOYTOWN, steps=TOYTOWN.steps // 3), None
    for stride in (32, 16):
        fine = sg.FCN(len(data.classes), stride=stride, **SMALL)
        if coarse is not None:
            load_coarser(fine, coarse)
        sg.fit(fine, data, recipe, seed=seed)
        coarse = fine
    load_coarser(model, coarse)


def share_merged(model: nn.Module, test: sg.Cells) -> dict:
    """The share of cells that the prediction joins to another cell."""
    joined = [merged(sg.predict(model, test[i][0]), test.instances(i)) for i in range(len(test))]
    return {"merged": torch.cat(joined).float().mean().item()}


THINGS = ("building", "pole", "tree", "sign", "car", "boat", "person")
FOV = {"kernel": 3, "dilation": 3, "width": 1 / 8}
V2 = {"backbone": "vgg16", "width": 1 / 8}
V2_RESNET = {"backbone": "resnet14", "rates": (1, 2, 3, 4), "width": 1 / 4}
V3 = {"depth": 14, "output_stride": 8, "rates": (2, 4, 6), "width": 1 / 4}  # 13 x 17 cells: as 6, 12, 18 on 33 x 33
V3_16 = V3 | {"output_stride": 16, "rates": (1, 2, 3)}
PSPNET = {"depth": 14, "stem": "7x7", "width": 1 / 8}  # 13 x 17 cells
DILATION = {"pad": 0, "width": 1 / 8}
GCN = {"depth": 14, "refine": False, "width": 1 / 4}  # maps of 25 x 33, 13 x 17, 7 x 9 and 4 x 5 cells
REFINENET = {"depth": 14, "width": 1 / 8}  # 25 x 33 cells of stride 4: four times those of stride 8
CROPS = replace(sg.recipes.MINI, scale=(250 / 224, 250 / 224))


def on_objects(model: sg.DeconvNet, seed: int) -> None:
    """Stage 1 of DeconvNet: 700 of its 2100 steps."""
    crops = ObjectCrops(sg.Toytown("train"), THINGS, size=model.size)
    sg.fit(model, crops, replace(CROPS, steps=700), seed=seed)


def proposal_crops(data: Dataset) -> Dataset:
    return ProposalCrops(data, grid_boxes, THINGS, size=64)


def over(limit: int = 14, aggregate: str = "max") -> Callable[[nn.Module, int], nn.Module]:
    return lambda model, seed: OverProposals(model, limit=limit, aggregate=aggregate)


def with_fcn8s(model: sg.DeconvNet, seed: int) -> nn.Module:
    """DeconvNet over proposals, with chapter 02's FCN-8s of the same seed."""
    torch.manual_seed(seed)
    fcn = sg.FCN(model.num_classes, stride=8, **SMALL)
    checkpoint = ROOT / "runs" / f"fcn8s-toytown-mini-seed{seed}.safetensors"
    sg.fit(fcn, sg.Toytown("train"), TOYTOWN, seed=seed, checkpoint=checkpoint)
    return Ensemble(OverProposals(model, limit=14), fcn)


@torch.no_grad()
def mixed_up(model: sg.DeconvNet, test: Dataset) -> dict:
    """Code of picture B with switches of picture A, and A's code with spoiled switches: what the answer is like.

    Means over 100 pairs of the correlation of activities after deconv1 ("structure") and of the shared area of label
    counts ("classes"), with A's own answer (_a) and with B's own (_b).
    """
    device = next(model.parameters()).device
    model.eval()

    def decoded(code: Tensor, switches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with sg.record(model, ["deconv1"]) as maps:
            labels = model.decode(code, switches).argmax(1)
        return maps["deconv1"].sum(1).flatten(), labels.flatten().bincount(minlength=model.num_classes) / labels.numel()

    def alike(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        structure = torch.corrcoef(torch.stack([one[0], other[0]]))[0, 1]
        return torch.stack([structure, torch.minimum(one[1], other[1]).sum()])

    def moved(switches: Sequence[Tensor], rule: Callable[..., Tensor]) -> list[Tensor]:
        """Every switch to place rule(0 or 1, like=switch) of its 2 x 2 window, in rows and in columns."""
        spoiled = []
        for k, s in enumerate(switches):
            side = model.size // 2**k
            corner = torch.arange(0, side, 2, device=device)[:, None] * side + torch.arange(0, side, 2, device=device)
            spoiled.append(corner + rule(s) * side + rule(s))
        return spoiled

    pictures = [test[i][0] for i in range(100)]
    squares = [F.interpolate(p[None].to(device), (model.size,) * 2, mode="bilinear", antialias=True) for p in pictures]
    encoded = [model.encode(square) for square in squares]
    own = [decoded(*pair) for pair in encoded]
    torch.manual_seed(0)
    found = defaultdict(list)
    for i, (code, switches) in enumerate(encoded):
        j = (i + 7) % len(encoded)
        tries = {
            "other code": (encoded[j][0], switches),
            "unmixed": encoded[j],
            "corner": (code, moved(switches, torch.zeros_like)),
            "random": (code, moved(switches, lambda s: torch.randint_like(s, 2))),
        }
        for name, pair in tries.items():
            answer = decoded(*pair)
            found[name].append(torch.cat([alike(answer, own[i]), alike(answer, own[j])]))
    columns = ("structure_a", "classes_a", "structure_b", "classes_b")
    return {"mixing": {n: dict(zip(columns, torch.stack(v).mean(0).tolist(), strict=True)) for n, v in found.items()}}


def plain_context(num_classes: int, **arguments: object) -> sg.Dilation:
    """A context module of as many layers and weights, all of rate 1: it sees 15 cells and not 67."""
    model = sg.Dilation(num_classes, **arguments)
    model.context = Context(num_classes, dilations=(1,) * 7)
    return model


def random_context(num_classes: int, **arguments: object) -> sg.Dilation:
    """A context module that does not start as the identity."""
    model = sg.Dilation(num_classes, **arguments)
    for conv in (*model.context.layers, model.context.last):
        he_init(conv)
    return model


def on_front_end(model: sg.Dilation, seed: int) -> None:
    """1000 steps of the front end, the same for all contexts."""
    torch.manual_seed(seed)
    front = sg.Dilation(model.num_classes, **DILATION)
    checkpoint = ROOT / "runs" / f"dilation-front-seed{seed}.safetensors"
    sg.fit(front, sg.Toytown("train"), replace(TOYTOWN, steps=1000), seed=seed, checkpoint=checkpoint)
    if model.context is None:
        model.load_state_dict(front.state_dict())
    else:
        load_front_end(model, front)


def msc(num_classes: int, **arguments: object) -> sg.DeepLabV1:
    """Multi-scale prediction as it is trained: only branches and scores learn (Sec. 4.3)."""
    model = sg.DeepLabV1(num_classes, multiscale=True, **arguments)
    freeze(model.stage1, model.stage2, model.stage3, model.stage4, model.stage5, model.fc6, model.fc7)
    return model


def on_large_fov(model: sg.DeepLabV1, seed: int) -> None:
    """Start from the LargeFOV net of this seed."""
    trained = sg.DeepLabV1(model.num_classes, **FOV)
    load_checkpoint(ROOT / "runs" / f"deeplab-v1-3x3-r3-toytown-mini-seed{seed}.safetensors", trained)
    _, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected


def multi_scale(num_classes: int, **arguments: object) -> MultiScale:
    """DeepLab v2 that looks at three scales of the picture, in training too."""
    return MultiScale(sg.DeepLabV2(num_classes, **arguments))


class Unpooled(PyramidPooling):
    """The pyramid's weights on every cell by itself: as many parameters, no parts that are pooled."""

    def pooled(self, x: Tensor, b: int) -> Tensor:
        return x


def with_river(data: Dataset) -> Dataset:
    """Training scenes that all have a river, so that boats are not rare: the question is what surrounds a hull."""
    return sg.Toytown("train", river=True)


def without_pooling(num_classes: int, **arguments: object) -> sg.PSPNet:
    model = sg.PSPNet(num_classes, **arguments)
    model.pyramid = Unpooled(model.pyramid.c_in, model.pyramid.bins)
    return model


@torch.no_grad()
def confusion(model: nn.Module, data: Dataset, pictures: int, hulls: bool = False) -> Tensor:
    """(K, K) counts on the first pictures of the data; `hulls`: on the pixels of hulls alone."""
    total = torch.zeros(len(data.classes), len(data.classes), dtype=torch.long)
    for i in range(pictures):
        image, target = data[i]
        target = target.where(data.hulls(i), VOID) if hulls else target
        total += confusion_matrix(sg.predict(model, image), target, len(data.classes))
    return total


class Watched:
    """A loss that scores the model on 40 pictures of val before the steps 0, 50, 100 ... of a training."""

    def __init__(self, loss: Loss, steps: int) -> None:
        self.loss, self.steps, self.seen, self.curve = loss, steps, 0, []
        self.val = sg.Toytown("val", size=40)

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        if self.seen % 50 == 0:
            self.score(model)
        self.seen += 1
        return self.loss(model, images, target)

    def score(self, model: nn.Module) -> None:
        scores = sg.Scores(confusion(model, self.val, len(self.val)))
        self.curve.append({"step": self.seen, "miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy})

    def measured(self, model: nn.Module, test: Dataset) -> dict:
        """The curve, and the confusion matrix of the test set's hulls."""
        if self.seen != self.steps:
            raise ValueError(f"{self.seen} of {self.steps} steps were watched; delete the checkpoint and run it anew")
        self.score(model)
        return {"hulls": confusion(model, test, len(test), hulls=True).tolist(), "curve": self.curve}


VALIDATION = 20  # pictures that CRF parameters are searched and learned on


@torch.no_grad()
def with_logits(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Image, logits and target of the first pictures of val."""
    val, device = sg.Toytown("val", size=VALIDATION), next(model.parameters()).device
    return [(image, model.eval()(image[None].to(device))[0].cpu(), target) for image, target in val]


def search(model: nn.Module, coarse: dict[str, Sequence[float]]) -> WithCRF:
    """Model with the CRF that scores highest on val: a coarse grid, then a finer one about its best, as DeepLab v1 did."""
    data = with_logits(model)

    def miou(settings: tuple[float, ...]) -> float:
        crf = DenseCRF(**dict(zip(coarse, settings, strict=True)))
        scores = [sg.Scores.of(crf(x, logits, steps=5).argmax(0), y, len(logits)) for x, logits, y in data]
        return sum(scores[1:], scores[0]).miou

    tried = {settings: miou(settings) for settings in itertools.product(*coarse.values())}
    best = max(tried, key=tried.get)
    near = itertools.product(
        *((v * 0.6, v, v * 1.5) if len(coarse[k]) > 1 else (v,) for k, v in zip(coarse, best, strict=True))
    )
    tried |= {settings: miou(settings) for settings in near if settings not in tried}
    best = max(tried, key=tried.get)
    model = WithCRF(model, DenseCRF(**dict(zip(coarse, best, strict=True))))
    model.found = {
        "crf": dict(zip(coarse, best, strict=True)),
        "search": [{**dict(zip(coarse, settings, strict=True)), "miou": value} for settings, value in tried.items()],
    }
    return model


def with_crf(model: nn.Module, seed: int) -> nn.Module:
    place = {"sxy": (5, 12, 30), "srgb": (3, 6, 12)}
    return search(model, {"w": (1, 3, 9), **place, "w_smooth": (1,), "sxy_smooth": (1,)})


def with_smoothing(model: nn.Module, seed: int) -> nn.Module:
    """The short-range kernel alone: place, no colour."""
    return search(model, {"w": (0,), "w_smooth": (1, 3, 9), "sxy_smooth": (1, 2, 4)})


class WithLearnedCRF(nn.Module):
    """FCN-8s and CRF as RNN. `crf` starts from the parameters that were searched for the FCN-8s of this seed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = sg.FCN(num_classes, stride=8, **SMALL)
        self.crf = CRFasRNN(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.crf(images, self.model(images))


def found_crf(seed: int) -> dict:
    file = ROOT / "results" / f"fcn8s-crf-toytown-mini-seed{seed}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is needed first: python tools/record.py crf --seeds {seed}")
    return json.loads(file.read_text())["crf"]


def fcn8s(model: nn.Module, seed: int) -> None:
    """Start from FCN-8s of chapter 02."""
    load_checkpoint(ROOT / "runs" / f"fcn8s-toytown-mini-seed{seed}.safetensors", model)


def fcn8s_and_crf(model: WithLearnedCRF, seed: int) -> None:
    fcn8s(model.model, seed)
    model.crf = CRFasRNN(len(model.crf.smooth), **found_crf(seed))


def with_learned_crf(model: sg.FCN, seed: int) -> nn.Module:
    """The net stays; class weights and compatibility learn on the pictures that the search had."""
    data = with_logits(model)
    both = WithLearnedCRF(len(data[0][1]))
    both.model, both.crf = model, CRFasRNN(len(data[0][1]), **found_crf(seed)).train()
    filters = [both.crf.filters(image) for image, _, _ in data]
    optimizer = torch.optim.Adam(both.crf.parameters(), lr=0.05)
    torch.manual_seed(seed)
    for _ in range(100):
        some = torch.randint(len(data), (4,)).tolist()
        images, logits, targets = (torch.stack(x) for x in zip(*(data[i] for i in some), strict=True))
        optimizer.zero_grad()
        F.cross_entropy(both.crf(images, logits, [filters[i] for i in some]), targets, ignore_index=255).backward()
        optimizer.step()
    learned = {name: value.tolist() for name, value in both.crf.state_dict().items()}
    both.found = {"crf": found_crf(seed), "learned": learned}
    return both


@cache
def toytown_weights() -> Tensor:
    return median_frequency(sg.Toytown("train"), len(sg.Toytown.classes))


def balanced(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return balanced_loss(toytown_weights())(model, images, target)


MINI_SPACE = {"layers": 6, "filters": 4, "blocks": 2, "operators": ("sep3", "atrous3", "max3", "skip", "zero"), "reach": 24,
              "width": 1 / 8}  # fmt: skip
MINI_SEARCH = sg.recipes.Recipe(steps=140, batch=4, lr=0.05, least=0.002, weight_decay=3e-4, flip=True,
                                source="ours: Auto-DeepLab's for the mini space")  # fmt: skip
EQUAL_COST = 40e6  # multiply-adds of a forward of one picture of Toytown
BY_HAND = ((("sep3", 0), ("sep3", 1)), (("sep3", 2), ("sep3", 0)))


@cache
def searched(seed: int) -> Search:
    """Auto-DeepLab's search in the mini space, weights on one half of Toytown's pictures, alpha and beta on the other."""
    train = sg.Toytown("train")
    middle = len(train) // 2
    torch.manual_seed(seed)
    supernet = SuperNet(len(train.classes), **MINI_SPACE)
    return architecture_search(
        supernet, Subset(train, range(middle)), Subset(train, range(middle, len(train))), MINI_SEARCH, start=40, lr=0.05,
        seed=seed, checkpoint=ROOT / "runs" / f"autodeeplab-search-seed{seed}.safetensors",
    )  # fmt: skip


def drawn(seed: int, i: int) -> tuple[Sequence, Sequence[int]]:
    """A cell and a path by chance: operators, pairs of states, steps, each as likely as the others of its kind."""
    torch.manual_seed(1000 * seed + i)
    names = [name for name in MINI_SPACE["operators"] if name != "zero"]
    cell = tuple(
        tuple(
            (names[torch.randint(len(names), ()).item()], state) for state in sorted(torch.randperm(2 + b)[:2].tolist())
        )
        for b in range(MINI_SPACE["blocks"])
    )
    path = [0]
    for steps in trellis(MINI_SPACE["layers"]):
        path.append(path[-1] - 1 + torch.multinomial(steps[path[-1]].float(), 1).item())
    return cell, tuple(path[1:])


def multiply_adds(model: nn.Module) -> int:
    """Of a forward of one picture of Toytown."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 96, 128, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


def at_equal_cost(cell: Sequence, path: Sequence[int]) -> dict:
    """Arguments of the decoded net, with the number of filters that brings its multiply-adds nearest to EQUAL_COST."""
    fixed = {"path": path, "cell": cell, "width": 1 / 8}
    fixed["rates"] = [max(1, pixels // (4 * 2 ** path[-1])) for pixels in (16, 32, 48)]  # as V3's at stride 8

    def macs(filters: int) -> int:
        with torch.device("meta"):
            return multiply_adds(sg.AutoDeepLab(11, filters=filters, **fixed))

    many = 2 + bisect_left(range(2, 256), EQUAL_COST, key=macs)
    return {"filters": min((many - 1, many), key=lambda filters: abs(macs(filters) - EQUAL_COST)), **fixed}


def books(model: sg.AutoDeepLab, test: Dataset) -> dict:
    """Multiply-adds and parameters."""
    return {"macs": multiply_adds(model), "parameters": sum(p.numel() for p in model.parameters())}


def with_search(model: sg.AutoDeepLab, seed: int) -> sg.AutoDeepLab:
    """How the search went, to be kept beside the scores."""
    found = searched(seed)
    model.found = {
        "space": MINI_SPACE,
        "search": {
            "recipe": asdict(found.recipe),
            "seconds": round(found.seconds, 1),
            "steps": found.steps,
            "transitions": [
                [[[round(p, 4) for p in node] for node in row] for row in t] for t in found.transitions.tolist()
            ],
            "alphas": [[[round(p, 3) for p in edge] for edge in t] for t in found.alphas.tolist()],
            "loss": [round(value, 4) for value in found.loss],
            "architecture_loss": [round(value, 4) for value in found.architecture_loss],
        },
    }
    return model


def jobs() -> Iterator[Job]:
    for stride in (32, 16, 8):
        yield Job("skips", f"fcn{stride}s", {"stride": stride, **SMALL})
    third = replace(TOYTOWN, steps=TOYTOWN.steps // 3)
    yield Job("staged", "fcn8s-staged", {"stride": 8, **SMALL}, recipe=third, start=staged)
    yield Job("at-once", "fcn8s-at-once", {"stride": 8, "at_once": True, **SMALL})
    yield Job("learned-upsampling", "fcn8s-learned-upsampling", {"stride": 8, "learn_upsampling": True, **SMALL})
    for keep in (1.0, 0.5, 0.25):
        recipe = replace(TOYTOWN, steps=300, batch=round(4 / keep))
        yield Job("sampling", f"fcn8s-keep{keep:g}", {"stride": 8, **SMALL}, recipe=recipe, loss=sampled_loss(keep))
    for stride in (32, 8):
        yield Job("camvid", f"fcn{stride}s", {"stride": stride, **SMALL}, recipe=sg.recipes.MINI_CAMVID, data="camvid")
    for way in ("nearest", "bilinear", "unpool", "transposed"):
        recipe = replace(TOYTOWN, steps=300)
        yield Job("ways-up", f"up-{way}", {"way": way}, model=WaysUp, recipe=recipe, chapter="03_upsampling")
    yield Job("unet", "unet", {"width": 1 / 8}, model=sg.UNet, chapter="04_unet")
    short = replace(TOYTOWN, steps=500)
    for name, net in {"concat": sg.UNet, "sum": UNetSum, "none": UNetAlone}.items():
        yield Job("skips", f"unet-{name}", {"width": 1 / 8}, model=net, recipe=short, chapter="04_unet")
    for border, elastic in itertools.product((False, True), (0.0, 3.0)):
        name = "unet" + "-border" * border + "-elastic" * bool(elastic) + "-plain" * (not border and not elastic)
        recipe = replace(sg.recipes.MINI, steps=500, batch=4, elastic=elastic)
        loss = border_loss() if border else pixel_loss
        yield Job("cells", name, {"width": 1 / 8}, model=sg.UNet, data="cells", recipe=recipe, loss=loss,
                  measured=share_merged, chapter="04_unet")  # fmt: skip
    yield Job("camvid", "unet", {"width": 1 / 8}, model=sg.UNet, recipe=sg.recipes.MINI_CAMVID, data="camvid",
              chapter="04_unet")  # fmt: skip
    yield Job("segnet", "segnet", {"width": 1 / 8}, model=sg.SegNet, chapter="05_segnet")
    for decoder in ("indices", "encoder-addition", "single-channel", "bilinear"):
        arguments = {"decoder": decoder, "width": 1 / 4}
        yield Job(
            "decoders", f"segnet-basic-{decoder}", arguments, model=sg.SegNetBasic, recipe=short, chapter="05_segnet"
        )
    yield Job("balancing", "segnet-basic-balanced", {"decoder": "indices", "width": 1 / 4}, model=sg.SegNetBasic,
              recipe=short, loss=balanced, chapter="05_segnet")  # fmt: skip
    yield Job("camvid", "segnet", {"width": 1 / 8}, model=sg.SegNet, recipe=sg.recipes.MINI_CAMVID, data="camvid",
              chapter="05_segnet")  # fmt: skip
    small = {"size": 64, "width": 1 / 8}
    deconvnet = {"arguments": small, "model": sg.DeconvNet, "pictures": proposal_crops, "chapter": "06_deconvnet"}
    two_stages = {**deconvnet, "recipe": replace(CROPS, steps=1400), "start": on_objects}
    yield Job("stages", "deconvnet", scored=over(), measured=mixed_up, **two_stages)
    one_stage = {**deconvnet, "recipe": replace(CROPS, steps=2100)}
    yield Job("stage-2-only", "deconvnet-stage-2-only", scored=over(), **one_stage)
    plain = {**two_stages, "arguments": {**small, "batch_norm": False}}
    yield Job("batch-norm", "deconvnet-no-batch-norm", scored=over(), **plain)
    for limit, aggregate in itertools.product((1, 5, 14, 30, 50), ("max", "sum")):
        yield Job("proposals", f"deconvnet-{limit}-{aggregate}", weights="deconvnet", scored=over(limit, aggregate),
                  **two_stages)  # fmt: skip
    yield Job("ensemble", "edeconvnet", weights="deconvnet", scored=with_fcn8s, **two_stages)
    for name, model, context in (
        ("none", sg.Dilation, None), ("basic", sg.Dilation, "basic"), ("large", sg.Dilation, "large"),
        ("plain", plain_context, "basic"), ("random", random_context, "basic"),
    ):  # fmt: skip
        yield Job("context", f"dilation-{name}", {"context": context, **DILATION}, model=model, recipe=short,
                  start=on_front_end, chapter="07_dilation")  # fmt: skip
    for kernel, dilation in ((7, 1), (4, 1), (4, 2), (3, 3), (3, 12)):  # Table 2, its rates to the size of our maps
        arguments = {"kernel": kernel, "dilation": dilation, "width": 1 / 8}
        yield Job("fov", f"deeplab-v1-{kernel}x{kernel}-r{dilation}", arguments, model=sg.DeepLabV1, recipe=short,
                  chapter="09_deeplab_v1_v2")  # fmt: skip
    yield Job("msc", "deeplab-v1-msc", FOV, model=msc, recipe=replace(TOYTOWN, steps=300), start=on_large_fov,
              chapter="09_deeplab_v1_v2")  # fmt: skip
    steps = replace(short, power=0.0, drop_every=-(-short.steps // 3))  # v1's schedule: a tenth after each third
    for name, recipe, weights in (("poly", short, "deeplab-v1-3x3-r3"), ("step", steps, ""), ("constant", replace(short, power=0.0), "")):  # fmt: skip
        yield Job("poly", f"deeplab-v1-{name}", FOV, model=sg.DeepLabV1, recipe=recipe, weights=weights,
                  chapter="09_deeplab_v1_v2")  # fmt: skip
    for name, rates in (("large-fov", (3,)), ("aspp-s", (1, 2, 3, 4)), ("aspp-l", (2, 4, 6, 8))):  # of 41 cells to 13
        yield Job("aspp", f"deeplab-v2-{name}", V2 | {"rates": rates}, model=sg.DeepLabV2, recipe=short,
                  chapter="09_deeplab_v1_v2")  # fmt: skip
    alone = {"model": sg.DeepLabV2, "recipe": short, "chapter": "09_deeplab_v1_v2"}
    yield Job("scales", "deeplab-v2-resnet", V2_RESNET, **alone)
    yield Job("scales", "deeplab-v2-resnet-msc-test", V2_RESNET, weights="deeplab-v2-resnet",
              scored=lambda model, seed: MultiScale(model), **alone)  # fmt: skip
    yield Job("scales", "deeplab-v2-resnet-msc", V2_RESNET, model=multi_scale, recipe=short, loss=multiscale_loss,
              chapter="09_deeplab_v1_v2")  # fmt: skip
    v3 = {"model": sg.DeepLabV3, "recipe": short, "chapter": "10_deeplab_v3"}
    for name, rates, pooling in (
        ("1x1", (), False), ("one-rate", (4,), False), ("aspp", (2, 4, 6), False), ("pooling", (), True),
        ("aspp-pooling", (2, 4, 6), True),
    ):  # fmt: skip
        yield Job("multi-scale", f"deeplab-v3-{name}", V3 | {"rates": rates, "image_pooling": pooling}, **v3)
    whole = "deeplab-v3-aspp-pooling"
    yield Job("output-stride", "deeplab-v3-os8", V3 | {"image_pooling": True}, weights=whole, **v3)
    yield Job("output-stride", "deeplab-v3-os16", V3_16, **v3)
    yield Job("output-stride", "deeplab-v3-os16-test-os8", V3_16, weights="deeplab-v3-os16",
              scored=lambda model, seed: model.at_stride(8), **v3)  # fmt: skip
    yield Job("output-stride", "deeplab-v3-os32", V3 | {"output_stride": 32, "rates": (1, 1, 2)}, **v3)
    yield Job("labels", "deeplab-v3-shrunk-labels", V3, loss=coarse_loss, **v3)
    plus = {"model": sg.DeepLabV3Plus, "recipe": short, "chapter": "10_deeplab_v3"}
    for stride, arguments in ((8, V3), (16, V3_16)):
        arguments = {"backbone": "resnet14", **{key: arguments[key] for key in ("output_stride", "rates", "width")}}
        yield Job("decoder", f"deeplab-v3plus-os{stride}", arguments, **plus)
    for name, experiment, arguments in (
        ("pyramid", "context", {}), ("local", "context", {}), ("global", "context", {"bins": (1,)}),
        ("auxiliary", "auxiliary", {"auxiliary": True}), ("max", "context", {"pool": "max"}),
    ):  # fmt: skip
        watched = Watched(auxiliary_loss() if name == "auxiliary" else pixel_loss, short.steps)
        yield Job(experiment, f"pspnet-{name}", PSPNET | arguments, chapter="11_pspnet", recipe=short, loss=watched,
                  model=without_pooling if name == "local" else sg.PSPNet, pictures=with_river,
                  measured=watched.measured)  # fmt: skip
    gcn = {"model": sg.GCN, "recipe": short, "chapter": "12_gcn"}
    yield Job("kernel", "gcn-free-k1", GCN | {"block": "trivial", "k": 1}, **gcn)
    for k in (3, 5, 7):
        yield Job("kernel", f"gcn-separable-k{k}", GCN | {"k": k}, **gcn)
    yield Job("kernel", "gcn-separable-map", GCN | {"k": (25, 13, 7, 3)}, **gcn)  # as wide as each map is high, odd
    yield Job("refinement", "gcn-refined", GCN | {"k": 7, "refine": True}, **gcn)
    for block, k in (("trivial", 1), ("gcn", 3), ("gcn", 7)):
        yield Job("shift", f"gcn-shifted-k{k}", GCN | {"block": block, "k": k}, **gcn | {"model": GCNShifted})
    for name, k in (("free", 7), ("stacked", 7), ("free", 3), ("free", 5)):
        arguments = GCN | {"block": {"free": "trivial", "stacked": "stack"}[name], "k": k}
        yield Job("rivals", f"gcn-{name}-k{k}", arguments, **gcn)
    careful = replace(TOYTOWN, steps=400, lr=1.5e-3)  # for nets without batch norm in their larger half
    refinenet = {"model": sg.RefineNet, "recipe": careful, "chapter": "13_refinenet"}
    for name, arguments in (
        ("4-cascaded", {}), ("no-pooling", {"pools": 0}), ("single", {"cascades": 1}), ("no-units", {"units": (0, 0, 0)}),
        ("2-cascaded", {"cascades": 2}),
    ):  # fmt: skip
        yield Job("blocks", f"refinenet-{name}", REFINENET | arguments, **refinenet)
    fast = refinenet | {"recipe": replace(careful, lr=TOYTOWN.lr)}
    for stride, rates, pooling in ((32, (), False), (8, (2, 4, 6), True)):  # the same trunk: as it is, and dilated
        arguments = REFINENET | {"output_stride": stride, "rates": rates, "image_pooling": pooling}
        yield Job("resolution", f"refinenet-rival-os{stride}", arguments, **refinenet | {"model": sg.DeepLabV3})
        yield Job("fast", f"refinenet-rival-os{stride}-fast", arguments, **fast | {"model": sg.DeepLabV3})
    for name, arguments in (("4-cascaded", {}), ("single", {"cascades": 1})):
        yield Job("fast", f"refinenet-{name}-fast", REFINENET | arguments, **fast)
    decoded = {"model": sg.AutoDeepLab, "recipe": short, "measured": books, "chapter": "14_autodeeplab"}
    yield Job("search", "autodeeplab-searched", lambda seed: at_equal_cost(searched(seed).cell, searched(seed).path),
              scored=with_search, **decoded)  # fmt: skip
    for name, path in (("deeplab", (0, 1, 2, 2, 2, 2)), ("unet", (0, 1, 2, 3, 2, 1))):
        yield Job("hand", f"autodeeplab-{name}-path", at_equal_cost(BY_HAND, path), **decoded)
    for i in range(3):
        yield Job("random", f"autodeeplab-random-{i}", lambda seed, i=i: at_equal_cost(*drawn(seed, i)), **decoded)
    nets = {
        "fcn32s": (sg.FCN, {"stride": 32, **SMALL}, TOYTOWN), "fcn8s": (sg.FCN, {"stride": 8, **SMALL}, TOYTOWN),
        "unet": (sg.UNet, {"width": 1 / 8}, TOYTOWN), "deeplab-v1-3x3-r3": (sg.DeepLabV1, FOV, short),
    }  # fmt: skip
    for net, (model, arguments, recipe) in nets.items():
        same = {"model": model, "recipe": recipe, "weights": net, "chapter": "08_crf"}
        yield Job("crf", f"{net}-crf", arguments, scored=with_crf, **same)
        yield Job("crf", f"{net}-smoothing", arguments, scored=with_smoothing, **same)
    fcn = {"arguments": {"stride": 8, **SMALL}, "chapter": "08_crf"}
    yield Job("crf-rnn", "fcn8s-crf-rnn", weights="fcn8s", scored=with_learned_crf, **fcn)
    more = replace(TOYTOWN, steps=200, batch=4, lr=1e-3)
    yield Job("joint", "fcn8s-longer", recipe=more, start=fcn8s, **fcn)
    yield Job("joint", "fcn8s-longer-crf", recipe=more, start=fcn8s, weights="fcn8s-longer", scored=with_crf, **fcn)
    yield Job("joint", "fcn8s-joint", {}, model=WithLearnedCRF, recipe=more, start=fcn8s_and_crf, chapter="08_crf")


def git_hash() -> str:
    """The commit, with "+" where files of the package differ from it."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    changed = subprocess.run(
        ["git", "status", "--porcelain", "segedu"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    return commit.strip() + ("+" if changed else "")


def record(job: Job, seed: int) -> None:
    name = f"{job.name}-{job.data}-mini-seed{seed}"
    file = ROOT / "results" / f"{name}.json"
    if file.exists():
        return
    data = {"toytown": sg.Toytown, "camvid": sg.CamVid, "cells": sg.Cells}[job.data]
    train, test = data("train"), data("test")
    arguments = job.arguments(seed) if callable(job.arguments) else job.arguments
    torch.manual_seed(seed)
    model = job.model(len(train.classes), **arguments)
    checkpoint = ROOT / "runs" / f"{job.weights or job.name}-{job.data}-mini-seed{seed}.safetensors"
    if job.start is not None and not checkpoint.exists():
        job.start(model, seed)
    run = sg.fit(model, job.pictures(train), job.recipe, seed=seed, loss=job.loss, checkpoint=checkpoint)
    scored = job.scored(model, seed)
    scores = sg.evaluate(scored, test)
    facts = {
        "name": name,
        "chapter": job.chapter,
        "experiment": job.experiment,
        "model": job.model.__name__,
        "arguments": arguments,
        "data": job.data,
        "split": "test",
        "scale": "mini",
        "seed": seed,
        "recipe": asdict(job.recipe),
        "git": git_hash(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "accelerate")},
        "device": f"{run.device}, {torch.get_num_threads()} threads" if run.device == "cpu" else run.device,
        "seconds": round(run.seconds, 1),
        "peak_memory_mb": round(run.peak_memory_mb),
        "loss": [round(value, 4) for value in run.loss],
        "scores": scores.to_dict(),
        **getattr(scored, "found", {}),
        **job.measured(model, test),
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{name}: mean IU {scores.miou:.3f}, boundary F1 {scores.boundary_f1:.3f}, {run.seconds:.0f} s", flush=True)


def main() -> None:
    known = list(dict.fromkeys(job.experiment for job in jobs()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(known)}")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(known):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for seed in args.seeds:
        for job in jobs():
            if not args.experiments or job.experiment in args.experiments:
                record(job, seed)


if __name__ == "__main__":
    main()

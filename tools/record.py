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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import segedu as sg
from segedu.backbones import he_init
from segedu.checkpoint import load_checkpoint
from segedu.crf import CRFasRNN, DenseCRF, WithCRF
from segedu.data.cells import merged
from segedu.layers import coarse_loss, freeze, normalize, pool_with_switches, unpool
from segedu.models.deconvnet import Ensemble, ObjectCrops, OverProposals, ProposalCrops, grid_boxes
from segedu.models.deeplab_v2 import MultiScale, multiscale_loss
from segedu.models.dilation import Context, load_front_end
from segedu.models.fcn import load_coarser, sampled_loss
from segedu.models.segnet import balanced_loss, median_frequency
from segedu.models.unet import border_loss
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


@dataclass(frozen=True)
class Job:
    """One run: what to build, on what, how. `start` may change the fresh model, by training a coarser one first."""

    experiment: str
    name: str
    arguments: dict
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
DILATION = {"pad": 0, "width": 1 / 8}
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
    torch.manual_seed(seed)
    model = job.model(len(train.classes), **job.arguments)
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
        "arguments": job.arguments,
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

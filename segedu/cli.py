"""segedu train | evaluate | predict | download: the book's main job from a shell."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from segedu import recipes
from segedu.backbones import load_imagenet
from segedu.checkpoint import load_checkpoint, read_checkpoint
from segedu.data import CamVid, Toytown
from segedu.data.camvid import data_root
from segedu.layers import coarse_loss, freeze_batch_norm
from segedu.models.autodeeplab import AutoDeepLab
from segedu.models.deeplab_v1 import DeepLabV1
from segedu.models.deeplab_v2 import DeepLabV2, MultiScale, multiscale_loss
from segedu.models.deeplab_v3 import DeepLabV3, first_phase
from segedu.models.deeplab_v3plus import DeepLabV3Plus
from segedu.models.dilation import Dilation
from segedu.models.fcn import FCN, sum_loss
from segedu.models.gcn import GCN
from segedu.models.pspnet import PSPNet, auxiliary_loss
from segedu.models.refinenet import RefineNet, quarter_loss
from segedu.models.segnet import SegNet, SegNetBasic, balanced_loss, median_frequency
from segedu.models.unet import UNet
from segedu.training import Loss, as_image, evaluate, fit, pixel_loss, predict

MODELS = {"fcn": FCN, "unet": UNet, "segnet": SegNet, "segnet-basic": SegNetBasic, "dilation": Dilation,
          "deeplab-v1": DeepLabV1, "deeplab-v2": DeepLabV2, "deeplab-v3": DeepLabV3,
          "deeplab-v3plus": DeepLabV3Plus, "pspnet": PSPNet, "gcn": GCN, "refinenet": RefineNet,
          "autodeeplab": AutoDeepLab}  # fmt: skip
PRETRAINED = ("fcn", "refinenet", "pspnet", "gcn", "segnet", "dilation", "deeplab-v1", "deeplab-v2", "deeplab-v3",
              "deeplab-v3plus")  # fmt: skip
DATA = {"toytown": Toytown, "camvid": CamVid}
SMALL = {  # the others: width 1/8
    "fcn": {"stride": 8, "pad": 1, "width": 1 / 8},
    "segnet-basic": {"width": 1 / 4},
    "dilation": {"context": "basic", "pad": 0, "width": 1 / 8},
    "deeplab-v1": {"dilation": 3, "width": 1 / 8},  # as wide on a map of 12 x 16 as rate 12 on 41 x 41
    "deeplab-v2": {"backbone": "vgg16", "rates": (2, 4, 6, 8), "width": 1 / 8},
    "deeplab-v3": {"depth": 14, "output_stride": 8, "rates": (2, 4, 6), "width": 1 / 4},
    "deeplab-v3plus": {"backbone": "resnet14", "output_stride": 8, "rates": (2, 4, 6), "width": 1 / 4},
    "pspnet": {"depth": 14, "stem": "7x7", "width": 1 / 4},
    "gcn": {"depth": 14, "k": 7, "width": 1 / 4},
    "refinenet": {"depth": 14, "width": 1 / 8},
    "autodeeplab": {"filters": 8, "rates": (2, 4, 6), "width": 1 / 8},
}
STANDARD = {  # for torchvision's ImageNet weights; the others: as published
    "deeplab-v2": {"stride_on": "3x3"},
    "pspnet": {"stem": "7x7"},
}
PAPER = {
    "fcn": ({"stride": 8, "at_once": True}, recipes.FCN_8S_AT_ONCE),
    "unet": ({}, recipes.UNET),
    "segnet": ({}, recipes.SEGNET),
    "segnet-basic": ({}, recipes.SEGNET_BASIC),
    "dilation": ({}, recipes.DILATION_FRONT),
    "deeplab-v1": ({}, recipes.DEEPLAB_V1),
    "deeplab-v2": ({"stride_on": "3x3"}, recipes.DEEPLAB_V2),
    "deeplab-v3": ({}, recipes.DEEPLAB_V3),
    "deeplab-v3plus": ({}, replace(recipes.DEEPLAB_V3PLUS, weight_decay=1e-4)),
    "pspnet": ({"stem": "7x7", "auxiliary": True}, recipes.PSPNET),
    "gcn": ({}, recipes.GCN),
    "refinenet": ({}, recipes.REFINENET),
    "autodeeplab": ({"drop_path": 0.2, "drop_steps": recipes.AUTO_DEEPLAB.steps}, recipes.AUTO_DEEPLAB),
}


def setting(model: str, data: str, scale: str) -> tuple[dict, recipes.Recipe, bool]:
    """Constructor arguments, recipe, and whether to start from ImageNet weights, for `segedu train`."""
    if scale == "mini":
        recipe = recipes.MINI_CAMVID if data == "camvid" else replace(recipes.MINI, steps=2000)
        return SMALL.get(model, {"width": 1 / 8}), recipe, False
    arguments, recipe = PAPER[model] if scale == "paper" else (STANDARD.get(model, {}), recipes.STANDARD)
    return arguments, recipe, model in PRETRAINED


def loss_of(model: str, scale: str, pictures: Dataset) -> Loss:
    """The papers' own losses at their own scale, else the plain one. U-Net's is for cells, not for streets."""
    if scale != "paper" or model in ("unet", "gcn", "deeplab-v3", "deeplab-v3plus", "autodeeplab"):
        return pixel_loss
    if model == "fcn":
        return sum_loss
    if model in ("dilation", "deeplab-v1"):
        return coarse_loss
    if model == "deeplab-v2":
        return lambda net, images, target: multiscale_loss(MultiScale(net), images, target)
    if model == "pspnet":
        return auxiliary_loss()
    if model == "refinenet":
        return quarter_loss
    return balanced_loss(median_frequency(pictures, len(pictures.classes)))


def build(about: dict) -> nn.Module:
    """The model that a checkpoint was written for."""
    return MODELS[about["model"]](about["num_classes"], **about["arguments"])


def train(args: argparse.Namespace) -> None:
    arguments, recipe, pretrained = setting(args.model, args.data, args.scale)
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    pictures, val = DATA[args.data]("train"), DATA[args.data]("val")
    about = {"model": args.model, "arguments": arguments, "num_classes": len(pictures.classes), "data": args.data,
             "scale": args.scale}  # fmt: skip
    path = args.out or Path("runs") / f"{args.model}-{args.data}-{args.scale}-seed{args.seed}.safetensors"
    torch.manual_seed(args.seed)
    model = build(about)
    if pretrained and not path.exists():
        load_imagenet(model)
    if args.scale == "paper" and args.model in ("deeplab-v2", "refinenet"):
        freeze_batch_norm(model)
    elif args.scale == "paper" and args.model in ("deeplab-v3", "deeplab-v3plus"):
        first_phase(model)
    loss = loss_of(args.model, args.scale, pictures)
    run = fit(model, pictures, recipe, val=val, seed=args.seed, loss=loss, checkpoint=path, about=about,
              mixed_precision=args.mixed_precision, workers=args.workers)  # fmt: skip
    print(f"{recipe.steps} steps in {run.seconds:.0f} s on {run.device}, last loss {np.mean(run.loss[-50:]):.3f}")
    print(f"{args.data} val: mean IU {run.scores.miou:.3f}, boundary F1 {run.scores.boundary_f1:.3f}")
    print(f"weights: {path}")


def score(args: argparse.Namespace) -> None:
    about = read_checkpoint(args.checkpoint)[0]["about"]
    model = build(about)
    load_checkpoint(args.checkpoint, model)
    scores = evaluate(model, DATA[about["data"]](args.split), progress=True)
    print(f"{args.checkpoint} on {about['data']} {args.split}")
    print(scores)
    if args.json:
        args.json.write_text(json.dumps(scores.to_dict(), indent=1) + "\n")


def paint(args: argparse.Namespace) -> None:
    from PIL import Image

    about = read_checkpoint(args.checkpoint)[0]["about"]
    model = build(about)
    load_checkpoint(args.checkpoint, model)
    data = DATA[about["data"]]
    image = as_image(args.image)
    labels = predict(model, image)
    colours = data.palette[labels].numpy()
    photo = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    out = args.out or Path()
    out.mkdir(parents=True, exist_ok=True)
    stem = Path(args.image).stem
    Image.fromarray(labels.byte().numpy()).save(out / f"{stem}-mask.png")
    Image.fromarray((photo * 0.5 + colours * 0.5).astype(np.uint8)).save(out / f"{stem}-overlay.png")
    shares = torch.bincount(labels.flatten(), minlength=len(data.classes)) / labels.numel()
    for share, name in sorted(zip(shares.tolist(), data.classes, strict=True), reverse=True):
        if share:
            print(f"{share:6.1%}  {name}")
    print(f"labels {out / f'{stem}-mask.png'}, picture with classes {out / f'{stem}-overlay.png'}")


def fetch(args: argparse.Namespace) -> None:
    CamVid("train", download=True)
    print(f"CamVid is in {data_root() / 'camvid'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("segedu", description="Train, score and use the models of the book.")
    verbs = parser.add_subparsers(required=True, metavar="train | evaluate | predict | download")

    verb = verbs.add_parser("train", help="train a model; the same call goes on where it was stopped")
    verb.add_argument("model", choices=MODELS)
    verb.add_argument("--data", choices=DATA, default="toytown")
    verb.add_argument("--scale", choices=recipes.SCALES, default=recipes.current_scale())
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--steps", type=int, help="instead of the recipe's")
    verb.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    verb.add_argument("--workers", type=int, default=0, help="processes that load pictures")
    verb.add_argument("--out", type=Path, help="checkpoint; default runs/MODEL-DATA-SCALE-seedN.safetensors")
    verb.set_defaults(call=train)

    verb = verbs.add_parser("evaluate", help="print the scores of a checkpoint")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("--split", choices=("train", "val", "test"), default="test")
    verb.add_argument("--json", type=Path, help="write the scores to this file too")
    verb.set_defaults(call=score)

    verb = verbs.add_parser("predict", help="label a picture; writes NAME-mask.png and NAME-overlay.png")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("image", type=Path)
    verb.add_argument("--out", type=Path, help="folder; default: this one")
    verb.set_defaults(call=paint)

    verb = verbs.add_parser("download", help="fetch a data set")
    verb.add_argument("data", choices=("camvid",))
    verb.set_defaults(call=fetch)

    args = parser.parse_args(arguments)
    try:
        args.call(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"segedu: {error}")
    except KeyboardInterrupt:
        sys.exit("segedu: stopped; the same call goes on from the last checkpoint")


if __name__ == "__main__":
    main()

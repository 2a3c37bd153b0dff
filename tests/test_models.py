"""One contract for every model, small: sizes, gradients, modes, save and load. A new model adds a line to MODELS."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import segedu as sg
from segedu.models.deconvnet import OverProposals
from segedu.models.deeplab_v2 import MultiScale
from segedu.models.unet import OverlapTile

MODELS = {
    "FCN-32s": lambda: sg.FCN(5, stride=32, pad=1, width=1 / 16),
    "FCN-16s": lambda: sg.FCN(5, stride=16, pad=1, width=1 / 16),
    "FCN-8s": lambda: sg.FCN(5, stride=8, pad=1, width=1 / 16),
    "FCN-8s pad 100": lambda: sg.FCN(5, width=1 / 16),
    "U-Net": lambda: sg.UNet(5, width=1 / 16),
    "U-Net, overlap-tile": lambda: OverlapTile(sg.UNet(5, padding=0, width=1 / 16)),
    "SegNet": lambda: sg.SegNet(5, width=1 / 16),
    **{
        f"SegNet-Basic {decoder}": partial(sg.SegNetBasic, 5, decoder=decoder, width=1 / 8)
        for decoder in ("indices", "encoder-addition", "single-channel", "bilinear")
    },
    "DeconvNet over proposals": lambda: OverProposals(sg.DeconvNet(5, size=64, width=1 / 16), limit=5),
    "Dilation": lambda: sg.Dilation(5, pad=0, width=1 / 16),
    "Dilation, large context": lambda: sg.Dilation(5, context="large", pad=0, width=1 / 16),
    "Dilation, mirrored": lambda: sg.Dilation(5, context="basic", width=1 / 16),
    "DeepLab v1": lambda: sg.DeepLabV1(5, width=1 / 16),
    "DeepLab v1, multi-scale": lambda: sg.DeepLabV1(5, kernel=4, dilation=4, multiscale=True, width=1 / 16),
    "DeepLab v2": lambda: sg.DeepLabV2(5, backbone="resnet14", rates=(1, 2, 4), width=1 / 16),
    "DeepLab v2, VGG16": lambda: sg.DeepLabV2(5, backbone="vgg16", rates=(1, 2, 4), width=1 / 16),
    "DeepLab v2, multi-scale": lambda: MultiScale(sg.DeepLabV2(5, backbone="resnet14", rates=(1, 2), width=1 / 16)),
    "DeepLab v3": lambda: sg.DeepLabV3(5, depth=14, rates=(1, 2, 3), width=1 / 16),
    "DeepLab v3, stride 8": lambda: sg.DeepLabV3(5, depth=14, output_stride=8, rates=(2, 4), width=1 / 16),
    "DeepLab v3, torchvision": lambda: sg.DeepLabV3(5, depth=14, head="torchvision", rates=(2, 4), width=1 / 16),
    "DeepLab v3, cascade": lambda: sg.DeepLabV3(5, depth=14, head="cascade", width=1 / 16),
    "DeepLab v3+": lambda: sg.DeepLabV3Plus(5, backbone="resnet14", rates=(1, 2, 3), width=1 / 16),
    "DeepLab v3+, Xception": lambda: sg.DeepLabV3Plus(5, backbone="xception41", rates=(1, 2, 3), width=1 / 16),
    "PSPNet": lambda: sg.PSPNet(5, depth=14, width=1 / 16),
    "PSPNet, max, 7x7 stem": lambda: sg.PSPNet(5, depth=14, stem="7x7", bins=(1, 3), pool="max", width=1 / 16),
    "GCN": lambda: sg.GCN(5, depth=14, k=3, width=1 / 16),
    "GCN, stack": lambda: sg.GCN(5, depth=14, k=3, block="stack", refine=False, width=1 / 16),
    "RefineNet": lambda: sg.RefineNet(5, depth=14, width=1 / 16),
    "RefineNet, single block": lambda: sg.RefineNet(5, depth=14, cascades=1, pools=2, width=1 / 16),
    "Auto-DeepLab": lambda: sg.AutoDeepLab(5, filters=2, path=(0, 1, 2, 1), rates=(1, 2, 3), width=1 / 16),
    "Auto-DeepLab, relaxed": lambda: sg.SuperNet(5, layers=3, filters=2, blocks=2, reach=8, width=1 / 16),
    "FCN-8s learned upsampling": lambda: sg.FCN(5, learn_upsampling=True, width=1 / 16),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


def wake(model):
    """Score layers start at zero; give them values so that gradients can pass."""
    for p in model.parameters():
        if p.abs().sum() == 0:
            nn.init.normal_(p, std=0.1)
    return model


def test_logits_are_as_large_as_the_images_in_both_modes(model):
    images = torch.rand(2, 3, 70, 101)
    for mode in (True, False):
        logits = model.train(mode)(images)
        assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5, 70, 101) and logits.dtype == torch.float32


def test_every_parameter_learns(model):
    wake(model).eval()
    F.cross_entropy(model(torch.rand(2, 3, 64, 96)), torch.randint(0, 5, (2, 64, 96))).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert still == []


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    wake(model).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 64, 64)
    before = model(images)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(images), before)


def test_recorded_maps_are_not_overwritten(model):
    convolution = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    assert convolution.endswith(("stage1.0", "backbone.conv1"))
    with sg.record(model, [convolution]) as maps:
        model(torch.rand(2, 3, 64, 64))
    assert maps[convolution].min() < 0

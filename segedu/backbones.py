"""The ImageNet networks that the segmentation papers start from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

VGG16_CONVOLUTIONS = 13  # Simonyan and Zisserman 2015, Table 1, column D


def vgg_stage(c_in: int, c_out: int, n: int, *, padding: int = 1) -> nn.Sequential:
    """One stage of VGG without its pool: n times (3x3 convolution, ReLU). (N, c_in, h, w) -> (N, c_out, h', w').

    `padding` is that of the first convolution (FCN pads 100 there); the others pad 1, so h' = h + 2 (padding - 1).
    Source: Simonyan and Zisserman 2015, Table 1, column D. Initialised as He et al. 2015.
    """
    layers = []
    for i in range(n):
        conv = nn.Conv2d(c_in if i == 0 else c_out, c_out, 3, padding=padding if i == 0 else 1)
        layers += [he_init(conv), nn.ReLU()]
    return nn.Sequential(*layers)


def he_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Normal weights of variance 2 / fan-in, zero bias: the variance survives ReLU (He et al. 2015, Eq. 10)."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)
    return conv


@torch.no_grad()
def load_imagenet(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Put torchvision's VGG16 ImageNet weights into the trunk of `model`, in place.

    The 13 convolutions go in order; `fc6` and `fc7`, where the model has them, take the fully connected layers
    reshaped to convolutions: (4096, 25088) -> (4096, 512, 7, 7) and (4096, 4096) -> (4096, 4096, 1, 1).
    Score layers are not touched.

    Args:
        state_dict: weights with the names of `torchvision.models.vgg16`; None downloads the published ones (528 MB).

    Raises:
        TypeError: the model has no VGG16 trunk.
        ValueError: sizes differ (pretrained weights need `width=1`); the model is left as it was.
    """
    stages = [getattr(model, f"stage{i}", None) for i in range(1, 6)]
    convs = [m for s in stages if s is not None for m in s.modules() if isinstance(m, nn.Conv2d)]
    if len(convs) != VGG16_CONVOLUTIONS:
        raise TypeError(
            f"load_imagenet needs a VGG16 trunk (stage1 to stage5, {VGG16_CONVOLUTIONS} convolutions), "
            f"got {type(model).__name__} with {len(convs)}"
        )
    if state_dict is None:
        from torchvision.models import VGG16_Weights

        state_dict = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)

    names = [
        key.removesuffix(".weight") for key in state_dict if key.startswith("features.") and key.endswith("weight")
    ]
    pairs = list(zip(convs, sorted(names, key=lambda name: int(name.split(".")[1])), strict=True))
    pairs += [(getattr(model, fc), name) for fc, name in (("fc6", "classifier.0"), ("fc7", "classifier.3"))
              if hasattr(model, fc)]  # fmt: skip
    for layer, name in pairs:  # look at every size before the first weight is changed
        weight = state_dict[f"{name}.weight"]
        same_ends = layer.weight.shape[0] == weight.shape[0] and layer.weight.numel() == weight.numel()
        if not same_ends or (weight.ndim == 4 and layer.weight.shape != weight.shape):
            raise ValueError(
                f"cannot put weights {tuple(weight.shape)} of {name} into {tuple(layer.weight.shape)}; "
                "pretrained weights need width=1"
            )
    for layer, name in pairs:
        layer.weight.copy_(state_dict[f"{name}.weight"].view_as(layer.weight))
        layer.bias.copy_(state_dict[f"{name}.bias"])

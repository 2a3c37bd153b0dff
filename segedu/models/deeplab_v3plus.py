"""Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation. Chen et al.; ECCV 2018.

Paper: https://arxiv.org/abs/1802.02611 (Fig. 2 the model, Fig. 3 separable convolution, Fig. 4 Xception).
Code: https://github.com/tensorflow/models/tree/master/research/deeplab
Chapter: chapters/10_deeplab_v3.ipynb
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segedu.backbones import BLOCKS, XCEPTION, Xception, dilate
from segedu.layers import conv_bn_relu, enlarged, grid_pad, normalize, scale, score_layer, separable_conv
from segedu.models.deeplab_v3 import ASPP, HEADS, atrous_resnet, check, copied, default_rates

BACKBONES = [f"resnet{depth}" for depth in BLOCKS] + [f"xception{depth}" for depth in XCEPTION]


class DeepLabV3Plus(nn.Module):
    """DeepLab v3 up to the ASPP; then a decoder that puts an early map of stride 4 beside it, for the boundaries.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 4.

    Args:
        num_classes: K.
        backbone: "resnet50", 101, 152 ("resnet14" for a laptop), or "xception65", 41, 71.
        output_stride: of the encoder: 8, 16 or 32. The decoder's map has stride 4.
        rates: of the ASPP's 3x3 branches, in cells; () leaves the 1x1. None: 6, 12, 18 at stride 16, twice that at 8.
        image_pooling: the ASPP's branch of one mean over the whole map (off for Cityscapes, Table 7).
        separable: atrous separable convolutions in ASPP and decoder. None: with Xception, as in the paper's models.
        width: channel counts as a multiple of the paper's.

    Differences from the paper: ResNet and padding as in `DeepLabV3`, with multi-grid (1, 2, 4). Xception follows the
    release, which has no ReLU within most separable convolutions; the text has one after each 3x3.

    Raises ValueError for other values; in training also for a single picture where there is image pooling.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet101",
        output_stride: int = 16,
        rates: Sequence[int] | None = None,
        image_pooling: bool = True,
        separable: bool | None = None,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        check(num_classes, output_stride, rates)
        self.arguments = {"backbone": backbone, "output_stride": output_stride, "rates": rates,
                          "image_pooling": image_pooling, "separable": separable, "width": width}  # fmt: skip
        self.num_classes, self.output_stride = num_classes, output_stride
        xception = backbone.startswith("xception")
        conv = separable_conv if separable or (separable is None and xception) else conv_bn_relu
        c, c_low = scale((256, 48), width)  # Tables 1 and 2

        if xception:
            self.backbone = dilate(Xception(int(backbone.removeprefix("xception")), width=width), output_stride)
            c_early, c_last = scale((256, 2048), width)
        else:
            depth = int(backbone.removeprefix("resnet"))
            self.backbone = atrous_resnet(depth, output_stride, HEADS["paper"][1], width)
            c_early, c_last = (4 * middle for middle in scale((64, 512), width))
        rates = default_rates(output_stride) if rates is None else rates
        self.aspp = ASPP(c_last, c, rates, image_pooling=image_pooling, conv=conv)
        self.reduce = conv_bn_relu(c_early, c_low)
        self.decoder = nn.Sequential(conv(c + c_low, c, 3), conv(c, c, 3))
        self.score = score_layer(c, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return enlarged(self.cells(images), 4)[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of every fourth pixel (N, K, ceil(H / 4), ceil(W / 4))."""
        height, width = (-(-side // 4) for side in images.shape[-2:])
        return self.cells(images)[..., :height, :width]

    # fmt: off
    def cells(self, images: Tensor) -> Tensor:
        """Logits at stride 4 of the padded pictures."""
        x = grid_pad(normalize(images), self.output_stride)
        early, *_, x = self.backbone(x)                      # 1/4, 1/16
        x = self.aspp(x)                                     # 1/16
        x = enlarged(x, self.output_stride // 4)             # 1/4
        x = torch.cat([x, self.reduce(early)], dim=1)        # 1/4
        x = self.decoder(x)                                  # 1/4
        return self.score(x)                                 # 1/4
    # fmt: on

    def at_stride(self, output_stride: int) -> "DeepLabV3Plus":
        """A copy with the same weights at another output stride, its rates in proportion; batch norm is not frozen.

        Raises ValueError if a rate would be no whole number.
        """
        return copied(self, output_stride)

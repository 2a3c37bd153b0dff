"""Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs. Chen et al.; ICLR 2015.

Paper: https://arxiv.org/abs/1412.7062 (Sec. 3 dense scores, Sec. 4.3 multi-scale prediction, Sec. 5.2 field of view).
Code: the authors' Caffe prototxts, DeepLab-LargeFOV and DeepLab-MSc-LargeFOV.
Chapter: chapters/09_deeplab_v1_v2.ipynb
"""

import torch.nn.functional as F
from torch import Tensor, nn

from segedu.backbones import he_init, vgg_stage
from segedu.layers import enlarged, grid_pad, normalize, scale, score_layer


class DeepLabV1(nn.Module):
    """VGG16 at stride 8: pool4 and pool5 stay with stride 1, what follows them is dilated; fc6 is made small.

    Shape: images (N, 3, H, W) in [0, 1] -> logits (N, K, H, W), any H and W. `scores` gives them at stride 8.

    Args:
        num_classes: K.
        kernel, dilation: of fc6. (3, 12) with 1024 channels is LargeFOV. Kernels 4 and 7 have VGG's 4096 channels:
            (7, 4), (4, 4) and (4, 8) are the others of Table 2.
        multiscale: add the scores of small branches on the picture and on pool1 to pool4 (MSc, Sec. 4.3).
        width: channel counts as a multiple of the paper's.

    Differences from the paper: all kernels have LargeFOV's trunk (3x3 pools, average pool after pool5); the release
    pools 2x2 in its 4x4 net. The trunk is normalised and initialised as torchvision's VGG16, not Caffe's. The CRF is a
    step of its own after the net.

    Raises ValueError for a kernel other than 3, 4, 7.
    """

    def __init__(
        self, num_classes: int, *, kernel: int = 3, dilation: int = 12, multiscale: bool = False, width: float = 1.0
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if kernel not in (3, 4, 7) or dilation < 1:
            raise ValueError(f"kernel must be 3, 4 or 7 and dilation at least 1, got {kernel} and {dilation}")
        self.num_classes = num_classes
        c1, c2, c3, c4, c5 = scale((64, 128, 256, 512, 512), width)
        (c6,) = scale((1024 if kernel == 3 else 4096,), width)

        self.stage1 = vgg_stage(3, c1, 2)
        self.stage2 = vgg_stage(c1, c2, 2)
        self.stage3 = vgg_stage(c2, c3, 3)
        self.stage4 = vgg_stage(c3, c4, 3)
        self.stage5 = vgg_stage(c4, c5, 3, dilation=2)
        self.fc6 = he_init(nn.Conv2d(c5, c6, kernel, padding="same", dilation=dilation))
        self.fc7 = he_init(nn.Conv2d(c6, c6, 1))
        self.dropout = nn.Dropout(0.5)
        self.score = score_layer(c6, num_classes)
        if multiscale:
            between = scale((128,), width)[0]
            inputs = (3, c1, c2, c3, c4)  # the picture and four pools
            self.branches = nn.ModuleList(Branch(c, between, num_classes) for c in inputs)
        else:
            self.branches = nn.ModuleList()

    def forward(self, images: Tensor) -> Tensor:
        """Each map is scored at its own resolution, the scores are enlarged between their grid points and summed."""
        height, width = images.shape[-2:]
        scores, inputs = self.trunk(images)
        logits = enlarged(scores, 8)
        for branch, x, times in zip(self.branches, inputs, (1, 2, 4, 8, 8), strict=False):
            logits = logits + enlarged(branch(x), times)
        return logits[..., :height, :width]

    def scores(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits of every eighth pixel (N, K, ceil(H / 8), ceil(W / 8)), cheaper than all.

        Branches go down by the stride of their first convolution. These are `model(images)[..., ::8, ::8]`.
        """
        scores, inputs = self.trunk(images)
        for branch, x, stride in zip(self.branches, inputs, (8, 4, 2, 1, 1), strict=False):
            scores = scores + branch(x, stride)
        height, width = images.shape[-2:]
        return scores[..., : -(-height // 8), : -(-width // 8)]

    # fmt: off
    def trunk(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores at 1/8, and what the branches look at: the picture and pool1 to pool4."""
        x = picture = grid_pad(normalize(images), 8)         # 8 m + 1 pixels, with the mean colour
        x = pool1 = pool(self.stage1(x), 2)                  # 1/2
        x = pool2 = pool(self.stage2(x), 2)                  # 1/4
        x = pool3 = pool(self.stage3(x), 2)                  # 1/8
        x = pool4 = pool(self.stage4(x), 1)                  # 1/8
        x = pool(self.stage5(x), 1)                          # 1/8, rate 2
        x = F.avg_pool2d(x, 3, stride=1, padding=1)          # 1/8, pool5a
        x = self.dropout(F.relu(self.fc6(x)))                # 1/8
        x = self.dropout(F.relu(self.fc7(x)))                # 1/8
        return self.score(x), [picture, pool1, pool2, pool3, pool4]
    # fmt: on


class Branch(nn.Module):
    """Scores from one early map: 3x3 convolution, 1x1, 1x1 to the classes. (N, C, h, w) -> (N, K, h', w').

    Six such score maps (with fc8's) are summed, which is the same as one 1x1 layer on all features put side by side.
    """

    def __init__(self, c_in: int, between: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = he_init(nn.Conv2d(c_in, between, 3, padding=1))
        self.conv2 = he_init(nn.Conv2d(between, between, 1))
        self.dropout = nn.Dropout(0.5)
        self.score = score_layer(between, num_classes)

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        x = F.conv2d(x, self.conv1.weight, self.conv1.bias, stride=stride, padding=1)
        x = self.dropout(F.relu(x))
        x = self.dropout(F.relu(self.conv2(x)))
        return self.score(x)


def pool(x: Tensor, stride: int) -> Tensor:
    """3x3 max pooling: (N, C, h, w) -> (N, C, ceil(h / stride), ceil(w / stride))."""
    return F.max_pool2d(x, 3, stride=stride, padding=1)

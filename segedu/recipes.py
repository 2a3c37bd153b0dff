"""Training recipes: frozen values, each with its source. A variant is `dataclasses.replace(recipe, lr=...)`."""

import math
import os
from dataclasses import dataclass

SCALES = ("mini", "standard", "paper")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Raises ValueError where a field makes no sense."""

    steps: int                              # optimiser updates
    batch: int                              # pictures per update, over all processes
    lr: float                               # learning rate after the warm-up
    optimizer: str = "sgd"                  # "sgd" or "adamw"
    momentum: float = 0.9                   # of sgd
    weight_decay: float = 0.0
    bias_lr: float = 1.0                    # biases learn at lr * bias_lr, and without decay (Caffe's lr_mult: 2)
    score_lr: float = 1.0                   # score layers learn at lr * score_lr (DeepLab: 10 for fc8)
    new_lr: float = 1.0                     # all but the backbone learns at lr * new_lr (PSPNet: 10)
    warmup: int = 0                         # steps of linear rise
    power: float = 0.0                      # lr * (1 - step / steps) ** power; 0 keeps it constant
    drop_every: int = 0                     # steps after which lr falls to a tenth, again and again; 0: never
    least: float = 0.0                      # lr at the end of half a cosine (Auto-DeepLab's search); 0: no cosine
    crop: tuple[int, int] | None = None     # (height, width) in pixels; None: the whole picture
    scale: tuple[float, float] = (1.0, 1.0)  # random resizing, lowest and highest factor
    flip: bool = False                      # mirror half of the pictures
    elastic: float = 0.0                    # pixels: spread of a random smooth deformation (U-Net: 10)
    source: str = ""                        # where these numbers stand

    # fmt: on

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"steps and batch must be at least 1 and lr above 0, got {self}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f'optimizer must be "sgd" or "adamw", got {self.optimizer!r}')
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (lowest, highest) above 0, got {self.scale}")
        if self.elastic < 0:
            raise ValueError(f"elastic must be a number of pixels and not negative, got {self.elastic}")

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        drops = step // self.drop_every if self.drop_every else 0
        lr = self.least + (self.lr - self.least) * (1 + math.cos(math.pi * step / self.steps)) / 2 if self.least else self.lr
        return lr * rise * (1 - step / self.steps) ** self.power * 0.1**drops


MINI = Recipe(steps=300, batch=8, lr=4e-3, optimizer="adamw", weight_decay=1e-4, warmup=20, power=0.9, flip=True,
              source="ours: Toytown on two cores in seconds")  # fmt: skip
MINI_CAMVID = Recipe(steps=1000, batch=4, lr=3e-3, optimizer="adamw", weight_decay=1e-4, warmup=50, power=0.9,
                     crop=(256, 320), scale=(0.6, 1.2), flip=True,
                     source="ours: CamVid on two cores in minutes")  # fmt: skip
STANDARD = Recipe(steps=3000, batch=4, lr=1e-4, optimizer="adamw", weight_decay=1e-4, warmup=100, power=0.9,
                  crop=(320, 448), scale=(0.6, 1.4), flip=True,
                  source="ours: CamVid from ImageNet weights on one GPU")  # fmt: skip

FCN_32S = Recipe(steps=100_000, batch=1, lr=1e-10, momentum=0.99, weight_decay=5e-4, bias_lr=2.0,
                 source="FCN release, voc-fcn32s/solver.prototxt; with fcn.sum_loss, from ImageNet weights")  # fmt: skip
FCN_16S = Recipe(steps=100_000, batch=1, lr=1e-12, momentum=0.99, weight_decay=5e-4, bias_lr=2.0,
                 source="FCN release, voc-fcn16s/solver.prototxt; with fcn.sum_loss, from FCN-32s")  # fmt: skip
FCN_8S = Recipe(steps=100_000, batch=1, lr=1e-14, momentum=0.99, weight_decay=5e-4, bias_lr=2.0,
                source="FCN release, voc-fcn8s/solver.prototxt; with fcn.sum_loss, from FCN-16s")  # fmt: skip
FCN_8S_AT_ONCE = Recipe(steps=300_000, batch=1, lr=1e-10, momentum=0.99, weight_decay=5e-4, bias_lr=2.0,
                        source="FCN release, voc-fcn8s-atonce; with fcn.sum_loss, from ImageNet weights")  # fmt: skip
UNET = Recipe(steps=60_000, batch=1, lr=1e-4, momentum=0.99, flip=True, elastic=10.0,
              source="U-Net, Sec. 3: batch 1, momentum 0.99, elastic deformation of 10 px; on cells with unet.border_loss. "
                     "Steps and lr are ours, the paper gives none")  # fmt: skip
SEGNET = Recipe(steps=40_000, batch=4, lr=1e-3, weight_decay=5e-4, bias_lr=2.0,
                source="SegNet release, segnet_solver.prototxt; with segnet.balanced_loss, from ImageNet weights")  # fmt: skip
SEGNET_BASIC = Recipe(steps=10_000, batch=4, lr=0.1, weight_decay=5e-4, bias_lr=2.0,
                      source="SegNet release, segnet_basic_solver.prototxt; with segnet.balanced_loss")  # fmt: skip
DECONVNET_1 = Recipe(steps=20_000, batch=64, lr=0.01, weight_decay=5e-4, bias_lr=2.0, drop_every=9_000,
                     crop=(224, 224), scale=(250 / 224, 250 / 224), flip=True,
                     source="DeconvNet release, stage 1; on deconvnet.ObjectCrops, from ImageNet weights")  # fmt: skip
DECONVNET_2 = Recipe(steps=40_000, batch=64, lr=0.01, weight_decay=5e-4, bias_lr=2.0, drop_every=10_000,
                     crop=(224, 224), scale=(250 / 224, 250 / 224), flip=True,
                     source="DeconvNet release, stage 2; on deconvnet.ProposalCrops, from stage 1")  # fmt: skip
DILATION_FRONT = Recipe(steps=60_000, batch=14, lr=1e-3, weight_decay=5e-4, crop=(500, 500), flip=True,
                        source="Dilation, Sec. 4 (VOC2012); crop of the release; with layers.coarse_loss, from ImageNet "
                               "weights")  # fmt: skip
DILATION_CONTEXT = Recipe(steps=40_000, batch=60, lr=1e-3, weight_decay=5e-4, crop=(500, 500), flip=True,
                          source="Dilation, Sec. 4 and train.py: context module on a frozen front end; steps are ours, the "
                                 "paper gives none for VOC")  # fmt: skip
DEEPLAB_V1 = Recipe(steps=6_000, batch=30, lr=1e-3, weight_decay=5e-4, bias_lr=2.0, score_lr=10.0, drop_every=2_000,
                    crop=(321, 321), flip=True,
                    source="DeepLab-LargeFOV, train.prototxt and solver.prototxt; with layers.coarse_loss, from ImageNet "
                           "weights")  # fmt: skip
DEEPLAB_V1_MSC = Recipe(steps=8_000, batch=20, lr=1e-3, weight_decay=5e-4, bias_lr=2.0, drop_every=2_000, crop=(321, 321),
                        flip=True, source="DeepLab-MSc-LargeFOV: branches and fc8 on a frozen trunk")  # fmt: skip
DEEPLAB_V2 = Recipe(steps=20_000, batch=10, lr=2.5e-4, weight_decay=5e-4, bias_lr=2.0, score_lr=10.0, power=0.9,
                    crop=(321, 321), scale=(0.5, 1.5), flip=True,
                    source="DeepLab v2, Sec. 4.1.2, and kazuto1011/deeplab-pytorch, voc12.yaml: ResNet-101, batch norm frozen; "
                           "with deeplab_v2.multiscale_loss, from weights of ImageNet and COCO. There poly steps every 10 "
                           "updates and the scales are 0.5, 0.75 ... 1.5")  # fmt: skip
DEEPLAB_V2_VGG16 = Recipe(steps=20_000, batch=10, lr=1e-3, weight_decay=5e-4, bias_lr=2.0, score_lr=10.0, power=0.9,
                          crop=(321, 321), flip=True,
                          source="DeepLab v2, Sec. 4.1.1, Table 2, last row: DeepLab v1's with poly for step; with "
                                 "layers.coarse_loss, from ImageNet weights")  # fmt: skip
DEEPLAB_V3 = Recipe(steps=30_000, batch=16, lr=7e-3, weight_decay=1e-4, power=0.9, crop=(513, 513), scale=(0.5, 2.0),
                    flip=True, source="DeepLab v3, Sec. 4.1; weight decay of the release, train.py; after "
                                      "deeplab_v3.first_phase, from ImageNet weights")  # fmt: skip
DEEPLAB_V3_TRAINVAL = Recipe(steps=30_000, batch=16, lr=1e-3, weight_decay=1e-4, power=0.9, crop=(513, 513),
                             scale=(0.5, 2.0), flip=True,
                             source="DeepLab v3, Sec. 4.1: on VOC trainval, after deeplab_v3.second_phase")  # fmt: skip
DEEPLAB_V3PLUS = Recipe(steps=30_000, batch=16, lr=7e-3, weight_decay=4e-5, power=0.9, crop=(513, 513), scale=(0.5, 2.0),
                        flip=True, source="DeepLab v3+, Sec. 4: as v3; weight decay of the release for Xception, with ResNet "
                                          "1e-4")  # fmt: skip
PSPNET = Recipe(steps=30_000, batch=16, lr=1e-2, weight_decay=1e-4, new_lr=10.0, power=0.9, crop=(473, 473),
                scale=(0.5, 2.0), flip=True,
                source="PSPNet, Sec. 5.1 (VOC2012); new_lr and crop of the release, hszhao/semseg; with "
                       "pspnet.auxiliary_loss, from ImageNet weights. There also rotation by 10 degrees and blur, and batch "
                       "norm over all processes")  # fmt: skip
AUTO_DEEPLAB_SEARCH = Recipe(steps=29_760, batch=2, lr=0.025, least=0.001, weight_decay=3e-4, crop=(321, 321), flip=True,
                             source="Auto-DeepLab, Sec. 4.1: 40 epochs of 1,488 pictures, half of Cityscapes' train, at half "
                                    "resolution; with search.search, whose lr and start are the paper's")  # fmt: skip
AUTO_DEEPLAB = Recipe(steps=1_500_000, batch=16, lr=0.05, weight_decay=4e-5, power=0.9, crop=(769, 769), scale=(0.5, 2.0),
                      flip=True, source="Auto-DeepLab, Sec. 5.1 (Cityscapes), from scratch, with drop_path=0.2; batch, decay "
                                        "and scales are DeepLab v3+'s")  # fmt: skip
GCN = Recipe(steps=30_000, batch=1, lr=1e-4, momentum=0.99, weight_decay=5e-4, crop=(512, 512), flip=True,
             source="Large Kernel Matters, Sec. 4: batch 1, momentum 0.99, pictures of 512, from ImageNet weights; before that a "
                    "stage with COCO, of 640. Steps and lr are ours, they are not known")  # fmt: skip
REFINENET = Recipe(steps=150_000, batch=1, lr=5e-5, weight_decay=5e-4, new_lr=10.0, drop_every=60_000, crop=(400, 400),
                   scale=(0.7, 1.3), flip=True,
                   source="RefineNet release, demo_refinenet_train.m; with refinenet.quarter_loss, batch norm frozen, from "
                          "ImageNet weights. There lr falls by hand when val stalls, crops are drawn by class and enlarged "
                          "by 1.2; steps are ours")  # fmt: skip


def current_scale() -> str:
    """`SEGEDU_SCALE` from the environment; by default "standard" where there is a GPU, else "mini"."""
    import torch

    value = os.environ.get("SEGEDU_SCALE") or ("standard" if torch.cuda.is_available() else "mini")
    if value not in SCALES:
        raise ValueError(f"SEGEDU_SCALE must be one of {', '.join(SCALES)}, got {value!r}")
    return value

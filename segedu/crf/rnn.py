"""Conditional Random Fields as Recurrent Neural Networks. Zheng et al.; ICCV 2015.

Paper: https://arxiv.org/abs/1502.03240 (Sec. 4 one step as five layers, Sec. 5 steps, Sec. 6.1 the learning rates)
Code: the authors' Caffe (torrvision/crfasrnn)
Chapter: chapters/08_crf.ipynb
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segedu.crf import exact
from segedu.crf.lattice import Filter
from segedu.layers import check_images


class CRFasRNN(nn.Module):
    """Mean field as a recurrent layer: the same five steps each time, with weights that are learned.

    Shape: images (N, 3, H, W) in [0, 1], logits (N, K, H, W) -> logits (N, K, H, W).

    Learned, 2 K + K^2 numbers: `bilateral` and `smooth`, (K,) each, the weights of the kernels for each class, and
    `compatibility` (K, K), what label k (row) pays for a neighbour with label l. The thetas stay as they are: a lattice
    jumps where a point changes its simplex, so its derivative by theta is not that of the Gaussian.

    Args:
        num_classes: K.
        sxy, srgb, sxy_smooth: as in `DenseCRF`.
        w, w_smooth: where the weights of all classes start. The compatibility starts as -I, the Potts model.
        steps: in training and in evaluation (Sec. 5: 5 and 10).

    Differences from the paper: it learns the class weights as diagonals of (K, K) matrices. Its rates are 1e4 times that
    of the network for the class weights and 1e3 times for the compatibility (prototxt); here the caller sets them.
    """

    def __init__(
        self, num_classes: int, *, sxy: float = 160.0, srgb: float = 3.0, sxy_smooth: float = 3.0, w: float = 5.0,
        w_smooth: float = 3.0, steps: tuple[int, int] = (5, 10),
    ) -> None:  # fmt: skip
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.thetas = ((sxy_smooth,), (sxy, srgb))
        self.steps = steps
        self.smooth = nn.Parameter(torch.full((num_classes,), float(w_smooth)))
        self.bilateral = nn.Parameter(torch.full((num_classes,), float(w)))
        self.compatibility = nn.Parameter(-torch.eye(num_classes))

    def filters(self, image: Tensor) -> list[Filter]:
        """The lattices of one image (3, H, W). They hold nothing learned: build them once and keep them."""
        return [Filter(exact.features(image.float() * 255, *theta), "rows") for theta in self.thetas]

    def forward(self, images: Tensor, logits: Tensor, filters: Sequence[Sequence[Filter]] | None = None) -> Tensor:
        """filters: for each image what `filters(image)` gave; left out, they are built."""
        check_images(images)
        if logits.shape != (len(images), len(self.smooth), *images.shape[2:]):
            raise ValueError(
                f"logits must be (N, {len(self.smooth)}, H, W) at the images' size, got {tuple(logits.shape)} for images "
                f"{tuple(images.shape)}"
            )
        filters = [self.filters(image) for image in images] if filters is None else filters
        steps = self.steps[0] if self.training else self.steps[1]
        return torch.stack([self.refine(*pair, steps) for pair in zip(logits, filters, strict=True)])

    def refine(self, logits: Tensor, filters: Sequence[Filter], steps: int) -> Tensor:
        """One picture: logits (K, H, W) -> log of the marginals (K, H, W)."""
        unary = -logits.flatten(1).T.contiguous()
        kernels = list(zip((self.smooth, self.bilateral), filters, strict=True))
        q = exact.mean_field(unary, kernels, steps, self.compatibility)
        return q.clamp(min=1e-12).log().T.reshape(logits.shape)

"""Mean field of a fully connected CRF over all pairs of pixels: the reference, and the same as softmax attention.

Paper: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011,
https://arxiv.org/abs/1210.5644 (Sec. 2 the energy, Sec. 3 and Alg. 1 mean field).
Chapter: chapters/08_crf.ipynb
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALIZATIONS = ("symmetric", "rows", "none")


def features(image: Tensor, sxy: float, srgb: float | None = None) -> Tensor:
    """(3, H, W) -> (H W, 5): x, y, r, g, b of each pixel, each over its theta. Without srgb (H W, 2): x, y.

    sxy (theta_alpha or theta_gamma) is in pixels, srgb (theta_beta) in the image's units, 0 to 255 in all papers.
    """
    height, width = image.shape[-2:]
    rows, columns = torch.arange(height, device=image.device), torch.arange(width, device=image.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    place = torch.stack([x, y], dim=-1).view(-1, 2).to(image.dtype) / sxy
    return place if srgb is None else torch.cat([place, image.reshape(3, -1).T / srgb], dim=1)


def kernel(f: Tensor, normalization: str = "symmetric") -> Tensor:
    """Features (N, d) -> k(i, j) = exp(-|f_i - f_j|^2 / 2), (N, N), the pixel itself included.

    normalization: with n = the sums of the rows, "symmetric" is n_i^-1/2 k n_j^-1/2 (pydensecrf), "rows" is n_i^-1 k
    (DeepLab, CRF-as-RNN), "none" is k as the paper writes it.
    """
    squares = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").square()
    k = (-squares / 2).clamp(min=-80).exp()  # below lie numbers that processors are slow with
    n = k.sum(1)
    return {"symmetric": k / (n[:, None] * n).sqrt(), "rows": k / n[:, None], "none": k}[normalization]


def mean_field(unary: Tensor, kernels: Sequence[tuple], steps: int, compatibility: Tensor | None = None) -> Tensor:
    """Marginals Q (N, K) after `steps` parallel updates, from Q = softmax(-unary).

    Args:
        unary: (N, K) energies, -log of a network's probabilities.
        kernels: pairs of a weight (a number, or (K,) for each class) and a kernel, which is all that `kernel @ q` works
            with: a matrix (N, N) or a `segedu.crf.lattice.Filter`.
        compatibility: (K, K), what label k pays for a neighbour with label l. Left out: Potts, 1 - I.
    """
    logits = -unary
    q = logits.softmax(1)
    for _ in range(steps):
        messages = [k @ q for _, k in kernels]  # 1 message passing
        weighted = [w * m for (w, _), m in zip(kernels, messages, strict=True)]  # 2 weighting
        message = sum(weighted[1:], start=weighted[0])
        # 3 compatibility. Potts takes off what all other labels sent; up to the pixel's sum that is its own, added.
        gain = message if compatibility is None else -(message @ compatibility.T)
        q = (logits + gain).softmax(1)  # 4 adding the unary, 5 normalising
    return q


def free_energy(q: Tensor, unary: Tensor, kernels: Sequence[tuple]) -> float:
    """What mean field makes small: E_q[log q] + unary - pairs / 2, for Potts and up to a constant. q and unary (N, K).

    The half is there because the energy counts each pair once. pydensecrf's klDivergence leaves it out.
    """
    agreement = sum((w * q * (k @ q)).sum() for w, k in kernels)
    cost = torch.where(q > 0, q * unary, 0)  # an impossible class, with its infinite unary, costs nothing at q = 0
    return (torch.special.xlogy(q, q).sum() + cost.sum() - agreement / 2).item()


def attention(f: Tensor, q: Tensor) -> Tensor:
    """kernel(f, "rows") @ q as softmax attention, with no (N, N) matrix in memory: f (N, d), q (N, K) -> (N, K).

    exp(-|f_i - f_j|^2 / 2) over its row's sum is softmax_j(f_i . f_j - |f_j|^2 / 2): |f_i|^2 is the same in the row. So
    queries are [f, 1], keys [f, -|f|^2 / 2], values q, and nothing is learned.
    """
    f = f - f.mean(0)  # distances stay, products get small
    query = torch.cat([f, torch.ones_like(f[:, :1])], dim=1)
    key = torch.cat([f, -f.square().sum(1, keepdim=True) / 2], dim=1)
    return F.scaled_dot_product_attention(query[None], key[None], q[None], scale=1.0)[0]

"""The dense CRF as a step after a network: `DenseCRF`, and `WithCRF`, a network with that step.

Paper: Kraehenbuehl and Koltun, NIPS 2011, https://arxiv.org/abs/1210.5644
Code: the authors' C++ (densecrf), as DeepLab used it and as pydensecrf wraps it
Chapter: chapters/08_crf.ipynb
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from segedu.crf import exact, lattice

# What the papers ran. Steps: 10, CRF-as-RNN 5 in training, pydensecrf's example 5. "rows" is what the 2011 C++ of DeepLab
# and CRF-as-RNN's layer do, "symmetric" the 2013 C++, which pydensecrf wraps.
PARAMETERS = {
    # README and examples
    "pydensecrf": {"w": 10, "sxy": 80, "srgb": 13, "w_smooth": 3, "sxy_smooth": 3},
    # LargeFOV and MSc-LargeFOV, as searched on VOC's val
    "deeplab-v1": {"w": 4, "sxy": 121, "srgb": 5, "w_smooth": 3, "sxy_smooth": 3, "normalization": "rows"},
    "deeplab-v1-msc": {"w": 4, "sxy": 83, "srgb": 5, "w_smooth": 3, "sxy_smooth": 3, "normalization": "rows"},
    # the command line's defaults
    "deeplab-release": {"w": 10, "sxy": 60, "srgb": 20, "w_smooth": 3, "sxy_smooth": 3, "normalization": "rows"},
    # kazuto1011/deeplab-pytorch, all configurations, by pydensecrf
    "deeplab-v2": {"w": 4, "sxy": 67, "srgb": 3, "w_smooth": 3, "sxy_smooth": 1},
    # the release's MATLAB wrapper
    "deconvnet": {"w": 5, "sxy": 20, "srgb": 3, "w_smooth": 3, "sxy_smooth": 3},
    # prototxt
    "crf-rnn": {"w": 5, "sxy": 160, "srgb": 3, "w_smooth": 3, "sxy_smooth": 3, "normalization": "rows"},
}
BACKENDS = ("lattice", "exact", "pydensecrf")
MAX_EXACT = 128 * 128  # pixels
BYTES_LATTICE = 700  # for each pixel, of both kernels; measured, with 8 numbers for each pixel and class
_UNITS = {"sxy": "pixels", "srgb": "grey levels of 0 to 255", "sxy_smooth": "pixels"}


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseCRF:
    """Mean field of a fully connected CRF: `crf(image, logits)` gives marginals, and their argmax the labels.

    Two pixels that look alike and lie near each other are pulled to one label (bilateral kernel: w, sxy, srgb), and so
    are pixels that just lie near (smoothness kernel: w_smooth, sxy_smooth).

    Shape: image (3, H, W), logits (K, H, W) -> (K, H, W), on the device of the logits.

    Args:
        w, sxy, srgb: weight w(1), theta_alpha in pixels, theta_beta in grey levels of 0 to 255.
        w_smooth, sxy_smooth: weight w(2), theta_gamma in pixels.
        compatibility: (K, K), what label k (row) pays for a neighbour with label l; need not be symmetric. Left out:
            Potts, 1 for any other label.
        normalization: "symmetric", "rows" or "none", as for `segedu.crf.exact.kernel`.
        backend: "lattice" (any size, with gradients); "exact" (all pairs, with gradients, to 128 x 128 pixels);
            "pydensecrf" (no gradients; needs `pip install pydensecrf2`).
        max_bytes: the most memory to use; left out, 80 % of what is free.

    It shares the work out among torch's threads. Where other programs keep the cores busy these wait for each other, and
    `torch.set_num_threads(1)` is faster.

    The default values are those of pydensecrf's examples; `PARAMETERS` has those of the papers:
    `DenseCRF(**PARAMETERS["crf-rnn"])`. Good values depend on the pictures and the network: search them.

    Source: Kraehenbuehl and Koltun, NIPS 2011, Sec. 2 and 3. Differences from the paper: a pixel's message to itself is
    included and the kernels are normalised, as in all code that papers were made with.
    """

    w: float = 10.0
    sxy: float = 80.0
    srgb: float = 13.0
    w_smooth: float = 3.0
    sxy_smooth: float = 3.0
    compatibility: Tensor | None = None
    normalization: str = "symmetric"
    backend: str = "lattice"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("sxy", "srgb", "sxy_smooth"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, a distance in {_UNITS[name]}, got {value}")
        for name in ("w", "w_smooth"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)}; 0 leaves the kernel out")
        if self.normalization not in exact.NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {exact.NORMALIZATIONS}, got {self.normalization!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {self.backend!r}")

    def __call__(
        self,
        image: Tensor,
        logits: Tensor | None = None,
        *,
        unary: Tensor | None = None,
        probabilities: Tensor | None = None,
        steps: int = 10,
    ) -> Tensor:
        """Marginals Q (K, H, W); `steps=0` gives the softmax of the logits.

        Args:
            image: (3, H, W) or (H, W, 3), uint8 or floats in [0, 1]; a tensor, an array or a PIL image.
            logits: (K, H, W) of a network. Or, in its place, one of
            unary: energies, -log of probabilities; +inf for a class that cannot be.
            probabilities: (K, H, W) that sum to 1; below 1e-5 they count as 1e-5, as in pydensecrf.
            steps: updates of all pixels at once; 5 to 10 are enough.

        Raises:
            ValueError: NaN; a shape, range or size that does not fit; more memory than there is.
            OverflowError: a theta too small for this image.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")
        unary = _energies(logits, unary, probabilities)
        classes, height, width = unary.shape
        if unary.numel() == 0 or classes == 1:
            return torch.ones_like(unary)
        colours = _colours(image, unary)
        compatibility = self._penalties(unary)
        kernels = [(self.w_smooth, self.sxy_smooth, None), (self.w, self.sxy, self.srgb)]
        kernels = [part for part in kernels if part[0] != 0]
        unary = unary.reshape(classes, -1).T.contiguous()
        if steps == 0 or not kernels:
            return (-unary).softmax(1).T.reshape(classes, height, width)
        self._check_memory(unary)
        with torch.autocast(unary.device.type, enabled=False):
            if self.backend == "pydensecrf":
                q = self._pydensecrf(colours, unary, compatibility, steps)
            elif self.backend == "exact":
                built = [
                    (w, exact.kernel(exact.features(colours, *theta), self.normalization)) for w, *theta in kernels
                ]
                q = exact.mean_field(unary, built, steps, compatibility)
            else:
                built = [
                    (w, lattice.Filter(exact.features(colours, *theta), self.normalization)) for w, *theta in kernels
                ]
                learned = unary.requires_grad or (compatibility is not None and compatibility.requires_grad)
                plain = unary.device.type != "cpu" or (learned and torch.is_grad_enabled())
                q = (exact if plain else lattice).mean_field(unary, built, steps, compatibility)
        return q.T.reshape(classes, height, width)

    def _penalties(self, unary: Tensor) -> Tensor | None:
        if self.compatibility is None:
            return None
        matrix, classes = torch.as_tensor(self.compatibility), len(unary)
        if matrix.shape != (classes, classes):
            raise ValueError(
                f"compatibility must be ({classes}, {classes}), what each class pays for each other one, got "
                f"{tuple(matrix.shape)}"
            )
        if not matrix.isfinite().all():
            raise ValueError(f"compatibility has {(~matrix.isfinite()).sum()} entries that are not numbers")
        return matrix.to(unary)

    def _check_memory(self, unary: Tensor) -> None:
        n, classes = unary.shape
        if self.backend == "exact" and n > MAX_EXACT:
            raise ValueError(
                f"all pairs of {n:,} pixels need {n * n * unary.element_size() * 3 / 1e9:.0f} GB; the exact backend is "
                f'for up to {MAX_EXACT:,} pixels. Use backend="lattice", or a smaller image'
            )
        if n * 6 >= 2**31:
            raise ValueError(
                f"{n:,} pixels are too many for a lattice (at most {2**31 // 6:,}); cut the image into tiles"
            )
        need = n * (BYTES_LATTICE + 8 * classes * unary.element_size())
        have = self.max_bytes if self.max_bytes is not None else 0.8 * _free_bytes(unary.device)
        if self.backend == "lattice" and need > have:
            raise ValueError(
                f"{n:,} pixels and {classes} classes need about {need / 1e9:.1f} GB, of {have / 1e9:.1f} GB that may be used "
                "(max_bytes, or 80 % of what is free). Use a smaller image, or tiles with an overlap of 2 sxy"
            )

    def _pydensecrf(self, colours: Tensor, unary: Tensor, compatibility: Tensor | None, steps: int) -> Tensor:
        try:
            from pydensecrf import densecrf
        except ImportError as error:
            raise ImportError('backend="pydensecrf" needs the package: pip install pydensecrf2') from error
        if compatibility is not None and not torch.equal(compatibility, compatibility.T):
            raise ValueError('pydensecrf makes the compatibility symmetric; use backend="lattice" for one that is not')
        normalization = {
            "symmetric": densecrf.NORMALIZE_SYMMETRIC,
            "rows": densecrf.NORMALIZE_AFTER,
            "none": densecrf.NO_NORMALIZATION,
        }[self.normalization]
        height, width = colours.shape[-2:]
        matrix = None if compatibility is None else compatibility.cpu().numpy().astype(np.float32)
        smooth, bilateral = (w if matrix is None else w * matrix for w in (self.w_smooth, self.w))
        crf = densecrf.DenseCRF2D(width, height, unary.shape[1])
        crf.setUnaryEnergy(np.ascontiguousarray(unary.detach().T.cpu().numpy(), dtype=np.float32))
        crf.addPairwiseGaussian(sxy=self.sxy_smooth, compat=smooth, normalization=normalization)
        pixels = colours.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        crf.addPairwiseBilateral(
            sxy=self.sxy,
            srgb=self.srgb,
            rgbim=np.ascontiguousarray(pixels),
            compat=bilateral,
            normalization=normalization,
        )
        return torch.from_numpy(np.array(crf.inference(steps))).T.to(unary)


class WithCRF(nn.Module):
    """A network and the CRF behind it, so that `evaluate` and `predict` take the two as one.

    Shape: images (N, 3, H, W) in [0, 1] -> log of the marginals (N, K, H, W), no gradient.

    Args:
        model: images -> logits of the same size.
        crf: called with each image and its logits.
        steps: of mean field.
    """

    def __init__(self, model: nn.Module, crf: DenseCRF, steps: int = 10) -> None:
        super().__init__()
        self.model, self.crf, self.steps = model, crf, steps

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        marginals = [self.crf(*pair, steps=self.steps) for pair in zip(images, logits, strict=True)]
        return torch.stack(marginals).clamp(min=1e-30).log()


def _energies(logits: Tensor | None, unary: Tensor | None, probabilities: Tensor | None) -> Tensor:
    """Whichever came, as float energies (K, H, W)."""
    given = {"logits": logits, "unary": unary, "probabilities": probabilities}
    given = {name: torch.as_tensor(value) for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"one of logits, unary and probabilities is needed, got {', '.join(given) or 'none'}")
    name, x = given.popitem()
    if x.ndim != 3:
        hint = "; take one picture at a time, logits[i]" if x.ndim == 4 else ""
        raise ValueError(f"{name} must be (K, H, W), got {tuple(x.shape)}{hint}")
    x = x if x.dtype == torch.float64 else x.float()
    _no_nan(name, x)
    if x.numel() == 0:
        return x
    if name == "probabilities":
        off = (x.sum(0) - 1).abs().amax().item()
        if x.amin() < 0 or off > 1e-3:
            raise ValueError(
                f"probabilities must be at least 0 and sum to 1 over the first axis, the classes; the least is "
                f"{x.amin().item():.4g}, the sums are up to {off:.4g} away from 1. For raw scores use logits="
            )
        return -x.clamp(min=1e-5).log()
    energies = x if name == "unary" else -x
    if (energies == -math.inf).any():
        at = (energies == -math.inf).nonzero()[0].tolist()
        wrong = "-inf" if name == "unary" else "+inf"
        raise ValueError(f"{name} has {wrong} at (class, y, x) = {tuple(at)}: a class cannot be more than certain")
    never = (energies == math.inf).all(0)
    if never.any():
        y, x_ = never.nonzero()[0].tolist()
        raise ValueError(f"no class is possible at {never.sum()} pixels, the first at (y, x) = ({y}, {x_})")
    return energies if name == "unary" else -x.log_softmax(0)


def _colours(image: Tensor, unary: Tensor) -> Tensor:
    """(3, H, W) floats of 0 to 255, of the unary's type and on its device."""
    image = torch.as_tensor(image if isinstance(image, Tensor) else np.array(image))
    height, width = unary.shape[1:]
    if image.shape == (height, width, 3) and image.shape != (3, height, width):
        image = image.permute(2, 0, 1)
    if image.shape != (3, height, width):
        turned = " Height and width seem to be swapped." if (3, width, height) in (
            tuple(image.shape), tuple(image.shape[2:] + image.shape[:2])) else ""  # fmt: skip
        raise ValueError(
            f"the image must be (3, {height}, {width}) or ({height}, {width}, 3) for logits of (K, H, W) = "
            f"{tuple(unary.shape)}, got {tuple(image.shape)}.{turned}"
        )
    if image.dtype == torch.uint8:
        if image.amax() <= 1:
            warnings.warn(
                "the uint8 image holds only 0 and 1: the kernel is blind to colour. Was it a float image in [0, 1]?",
                stacklevel=3,
            )
        return image.to(unary)
    if not image.is_floating_point():
        raise ValueError(f"the image must be uint8 or floats in [0, 1], got {image.dtype}")
    _no_nan("the image", image)
    if image.amin() < 0 or image.amax() > 1:
        raise ValueError(
            f"a float image must be in [0, 1], got {image.amin().item():.4g} to {image.amax().item():.4g}; give the picture "
            "as it is, with no mean taken off, divided by 255 or as uint8"
        )
    image = image.to(unary) * 255
    whole = image.round()  # a picture of 8 bits over 255 gives the same as the 8 bits
    return whole if torch.allclose(image, whole, rtol=0, atol=1e-3) else image


def _no_nan(name: str, x: Tensor) -> None:
    wrong = x.isnan()
    if wrong.any():
        raise ValueError(
            f"{name} has {wrong.sum()} NaN, the first at (class, y, x) = {tuple(wrong.nonzero()[0].tolist())}"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available

"""The dense CRF against loops by hand, softmax attention, and pydensecrf.

`python tests/test_crf.py` writes crf_golden.npz again, with pydensecrf, for machines where that does not build.
"""

import itertools
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segedu as sg
from segedu.crf import PARAMETERS, CRFasRNN, DenseCRF, WithCRF, exact, lattice

GOLDEN = Path(__file__).with_name("crf_golden.npz")
PHOTOS = ("astronaut", "chelsea", "coffee")
BOTH = ("lattice", "exact")


def photo(name: str = "astronaut", rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    data = pytest.importorskip("skimage.data", reason="the photos are scikit-image's")
    return np.ascontiguousarray(getattr(data, name)()[rows, columns])


def scores(classes: int, height: int, width: int) -> torch.Tensor:
    """Logits (K, H, W) like a coarse net's, the same on every machine: one class in each cell of 16 pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cell = (7 * (y // 16) + 3 * (x // 16) + (y // 16) * (x // 16)) % classes
    grain = ((31 * x + 17 * y)[None] * torch.arange(1, classes + 1)[:, None, None]) % 64 / 64
    return 2.0 * F.one_hot(cell, classes).permute(2, 0, 1) + grain


def small(classes: int = 3, size: tuple[int, int] = (9, 11), seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (*size, 3), generator=rng, dtype=torch.uint8)
    return image.numpy(), torch.randn(classes, *size, generator=rng, dtype=torch.float64)


def golden_input() -> tuple[np.ndarray, torch.Tensor]:
    return photo(rows=slice(60, 92), columns=slice(190, 230)), scores(4, 32, 40)


# ---- exact ----------------------------------------------------------------------------------------------------------


def by_hand(image: np.ndarray, unary: np.ndarray, settings: dict, penalties: np.ndarray, steps: int) -> np.ndarray:
    """Mean field as the paper's Alg. 1 says it, one pixel pair at a time, with the normalisation of the codes."""
    classes, height, width = unary.shape
    pixels = list(itertools.product(range(height), range(width)))
    image = image.astype(float)

    def k(a, b, theta, theta_colour=None):
        (ya, xa), (yb, xb) = a, b
        distance = ((ya - yb) ** 2 + (xa - xb) ** 2) / theta**2
        if theta_colour:
            distance += ((image[a] - image[b]) ** 2).sum() / theta_colour**2
        return math.exp(-distance / 2)

    kernels = [(settings["w_smooth"], (settings["sxy_smooth"],)), (settings["w"], (settings["sxy"], settings["srgb"]))]
    sums = [{a: sum(k(a, b, *theta) for b in pixels) for a in pixels} for _, theta in kernels]
    rows = settings.get("normalization") == "rows"
    q = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(steps):
        new = np.zeros_like(q)
        for a in pixels:
            energy = unary[(slice(None), *a)].copy()
            for label, (m, (weight, theta)) in itertools.product(range(classes), enumerate(kernels)):
                for b in pixels:
                    share = k(a, b, *theta) / (sums[m][a] if rows else math.sqrt(sums[m][a] * sums[m][b]))
                    energy[label] += weight * share * sum(penalties[label, o] * q[(o, *b)] for o in range(classes))
            new[(slice(None), *a)] = np.exp(-energy) / np.exp(-energy).sum()
        q = new
    return q


@pytest.mark.parametrize("normalization", ["symmetric", "rows"])
@pytest.mark.parametrize("compatibility", ["potts", "asymmetric"])
def test_exact_equals_a_plain_double_loop(normalization, compatibility):
    image, logits = small(3, (4, 5))
    settings = {"w": 2.0, "sxy": 2.0, "srgb": 60.0, "w_smooth": 1.5, "sxy_smooth": 1.2, "normalization": normalization}
    potts = 1 - torch.eye(3, dtype=torch.float64)
    matrix = potts if compatibility == "potts" else torch.tensor([[0, 2, 0.5], [1, 0, 3], [0.2, 0.7, 0.1]]).double()
    unary = -logits.log_softmax(0)
    want = by_hand(image, unary.numpy(), settings, matrix.numpy(), steps=3)
    got = DenseCRF(**settings, compatibility=matrix, backend="exact")(image, unary=unary, steps=3)
    assert np.abs(got.numpy() - want).max() < 1e-10
    if compatibility == "potts":
        got = DenseCRF(**settings, backend="exact")(image, unary=unary, steps=3)
        assert np.abs(got.numpy() - want).max() < 1e-10


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_step_of_messages_is_softmax_attention(dtype, most):
    image = torch.from_numpy(photo(rows=slice(60, 92), columns=slice(190, 230))).permute(2, 0, 1).to(dtype)
    q = scores(4, 32, 40).flatten(1).T.to(dtype).softmax(1)
    for theta in ((20.0, 13.0), (3.0, None)):
        f = exact.features(image, *theta)
        assert (exact.attention(f, q) - exact.kernel(f, "rows") @ q).abs().max() < most


def test_free_energy_falls_and_stands_still_at_the_fixed_point():
    image, logits = small(3, (6, 7))
    unary = -logits.log_softmax(0).flatten(1).T
    colours = torch.from_numpy(image).permute(2, 0, 1).double()
    kernels = [(1.0, exact.kernel(exact.features(colours, 3, 60))), (0.5, exact.kernel(exact.features(colours, 2)))]
    energies = [exact.free_energy(exact.mean_field(unary, kernels, t), unary, kernels) for t in range(8)]
    assert all(after < before for before, after in itertools.pairwise(energies))
    q = exact.mean_field(unary, kernels, 300)
    torch.manual_seed(0)
    for _ in range(5):  # along directions that keep the sums at 1
        step = torch.randn_like(q)
        step = 1e-5 * q * (step - (q * step).sum(1, keepdim=True))
        slope = (exact.free_energy(q + step, unary, kernels) - exact.free_energy(q - step, unary, kernels)) / 2e-5
        assert abs(slope) < 1e-6


# ---- the lattice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_barycentric_coordinates_give_the_point_back(d):
    torch.manual_seed(d)
    f = 5 * torch.randn(500, d, dtype=torch.float64)
    cell, rank, weight = lattice.locate(f)
    assert weight.min() >= -1e-12 and torch.allclose(weight.sum(0), torch.ones(500).double())
    assert (rank.sort(0).values == torch.arange(d + 1)[:, None]).all()
    found = 0
    for r in range(d + 1):
        corner = cell * (d + 1) + r - (d + 1) * (rank > d - r)  # as `locate` says
        assert (corner.sum(0) == 0).all()
        found = found + weight[r] * corner
    # The map of Adams et al. keeps distances up to one scale: (d + 1) sqrt(2 / 3)
    assert torch.allclose(torch.pdist(found.T[:50]), torch.pdist(f[:50]) * (d + 1) * math.sqrt(2 / 3))


def test_lattice_in_one_dimension_by_hand():
    """At d = 1 the lattice points lie sqrt(3 / 4) apart and values are shared linearly, blurred with [1/4, 1/2, 1/4]."""
    apart = math.sqrt(3) / 2
    f = torch.tensor([[0.0], [apart], [2 * apart], [3.5 * apart]], dtype=torch.float64)
    got = lattice.Lattice(f).filter(torch.eye(4, dtype=torch.float64))
    blur = torch.tensor(
        [[1, 0.5, 0, 0, 0], [0.5, 1, 0.5, 0, 0], [0, 0.5, 1, 0.5, 0], [0, 0, 0.5, 1, 0.5], [0, 0, 0, 0.5, 1]]
    )
    share = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5]])
    both = blur @ blur  # d + 1 = 2 axes, the same line
    assert torch.allclose(got, (share @ both @ share.T).double() / 1.5)


@pytest.mark.parametrize("name", PHOTOS)
def test_lattice_is_near_the_exact_kernel(name):
    """Facts measured beside pydensecrf: a filter within 7 % (1 % without colour), most labels the same."""
    image = photo(name, slice(100, 164), slice(150, 214))
    colours = torch.from_numpy(image).permute(2, 0, 1).float()
    torch.manual_seed(0)
    values = torch.rand(64 * 64, 4)
    for theta, most in (((80.0, 13.0), 0.07), ((20.0, 3.0), 0.07), ((3.0, None), 0.01)):
        f = exact.features(colours, *theta)
        want = exact.kernel(f) @ values
        assert ((lattice.Filter(f) @ values - want).norm() / want.norm()).item() < most
    logits = scores(11, 64, 64)
    for settings in ({"w": 4, "sxy": 67, "srgb": 3, "sxy_smooth": 1}, {"w": 5, "sxy": 160, "srgb": 3}):
        near, all_pairs = (DenseCRF(**settings, backend=backend)(image, logits) for backend in BOTH)
        assert (near.argmax(0) == all_pairs.argmax(0)).float().mean() >= 0.96
        assert (near - all_pairs).abs().mean() <= 3e-3


@pytest.mark.parametrize("normalization", exact.NORMALIZATIONS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fast_filter_equals_the_readable_one(normalization, dtype, most):
    torch.manual_seed(0)
    f = torch.cat([3 * torch.rand(20_000, 5, dtype=dtype), 60 * torch.rand(300, 5, dtype=dtype)])  # more than one block
    kernel, values = lattice.Filter(f, normalization), torch.rand(len(f), 7, dtype=dtype)
    n = kernel.lattice.filter(torch.ones(len(f), 1, dtype=dtype))
    for transposed in (False, True):
        before, after = {"symmetric": (n**-0.5, n**-0.5), "rows": (1, 1 / n), "none": (1, 1)}[normalization]
        before, after = (after, before) if transposed else (before, after)
        want = after * kernel.lattice.filter(before * values, transposed)
        got = kernel.apply(values, transposed)
        assert ((got - want).norm() / want.norm()).item() < most
    other = torch.rand(len(f), 7, dtype=dtype)
    there, back = (other * kernel.apply(values)).sum(), (kernel.apply(other, transposed=True) * values).sum()
    assert abs(there - back) / there < most


@pytest.mark.parametrize("classes", [2, 15, 16, 21])
@pytest.mark.parametrize("compatibility", [False, True])
def test_mean_field_in_blocks_equals_the_readable_one(classes, compatibility):
    image = photo(rows=slice(0, 150), columns=slice(0, 140))  # more than one block of pixels
    logits = scores(classes, 150, 140)
    unary = -logits.log_softmax(0).flatten(1).T
    colours = torch.from_numpy(image).permute(2, 0, 1).float()
    kernels = [
        (3.0, lattice.Filter(exact.features(colours, 3))),
        (5.0, lattice.Filter(exact.features(colours, 30, 10))),
    ]
    torch.manual_seed(0)
    matrix = torch.rand(classes, classes) if compatibility else None
    got, want = (code.mean_field(unary, kernels, 5, matrix) for code in (lattice, exact))
    assert (got - want).abs().max() < 1e-4 and (got - want).abs().mean() < 1e-6
    assert torch.allclose(got.sum(1), torch.ones(len(got)))


def test_float32_and_float64_agree():
    image, logits = photo(rows=slice(0, 96), columns=slice(200, 296)), scores(5, 96, 96)
    one, two = (DenseCRF(w=5, sxy=20, srgb=10)(image, logits.to(dtype)) for dtype in (torch.float32, torch.float64))
    assert two.dtype == torch.float64 and (one - two).abs().mean() < 1e-6


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", exact.NORMALIZATIONS)
def test_gradient_of_the_filter_is_its_transpose(normalization):
    torch.manual_seed(0)
    kernel = lattice.Filter(3 * torch.rand(40, 5, dtype=torch.float64), normalization)
    values = torch.rand(40, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: kernel @ v, values)
    assert torch.autograd.gradgradcheck(lambda v: kernel @ v, values)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("normalization", ["symmetric", "rows"])
def test_gradients_by_logits_and_compatibility(backend, normalization):
    image, logits = small(3, (5, 6))
    matrix = torch.tensor([[0, 2, 0.5], [1, 0, 3], [0.2, 0.7, 0.1]], dtype=torch.float64)

    def q(logits, matrix):
        crf = DenseCRF(w=2, sxy=3, srgb=60, compatibility=matrix, normalization=normalization, backend=backend)
        return crf(image, logits, steps=5)

    assert torch.autograd.gradcheck(q, (logits.requires_grad_(), matrix.requires_grad_()))


def test_gradients_of_the_learned_crf():
    image, logits = small(3, (5, 6))
    images, model = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255, CRFasRNN(3, srgb=60).double()
    filters = [[lattice.Filter(exact.features(images[0] * 255, *theta), "rows") for theta in model.thetas]]

    def loss(logits, smooth, bilateral, compatibility):
        parameters = {"smooth": smooth, "bilateral": bilateral, "compatibility": compatibility}
        return torch.func.functional_call(model, parameters, (images, logits[None], filters))

    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), *parameters))


# ---- pydensecrf -----------------------------------------------------------------------------------------------------


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """99.99 % of the labels and |dQ| of 1e-6 in the mean; single pixels may differ by rounding."""
    difference = (ours - theirs).abs()
    assert difference.mean() < 1e-6 and (difference.amax(0) < 1e-3).float().mean() >= 0.999
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("settings", PARAMETERS.values(), ids=PARAMETERS)
def test_same_as_pydensecrf(name, settings):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 could not be compiled here")
    image = photo(name)
    logits = scores(21, *image.shape[:2])
    agree(DenseCRF(**settings)(image, logits), DenseCRF(**settings, backend="pydensecrf")(image, logits))


@pytest.mark.parametrize("key", [*PARAMETERS, "none", "matrix"])
def test_same_as_stored_answers_of_pydensecrf(key):
    image, logits = golden_input()
    with np.load(GOLDEN) as stored:
        assert (stored["image"] == image).all()
        agree(DenseCRF(**golden_settings()[key])(image, logits), torch.from_numpy(stored[key]))


def golden_settings() -> dict[str, dict]:
    matrix = torch.tensor([[0, 1, 2, 0.5], [1, 0, 0.3, 1], [2, 0.3, 0, 1], [0.5, 1, 1, 0]])
    plain = {"w": 0.01, "sxy": 20, "srgb": 30, "w_smooth": 0.02, "sxy_smooth": 3, "normalization": "none"}
    return {**PARAMETERS, "none": plain, "matrix": {"w": 3, "sxy": 20, "compatibility": matrix}}


def test_pydensecrf_is_called_as_documented():
    """Our way to call it against its own, written out as in its README."""
    pydensecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 could not be compiled here")
    image, logits = golden_input()
    theirs = pydensecrf.DenseCRF2D(40, 32, 4)
    theirs.setUnaryEnergy(np.ascontiguousarray(-logits.log_softmax(0).flatten(1).numpy()))
    theirs.addPairwiseGaussian(sxy=3, compat=3)
    theirs.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    want = torch.from_numpy(np.array(theirs.inference(5))).view(4, 32, 40)
    assert torch.equal(DenseCRF(backend="pydensecrf")(image, logits, steps=5), want)
    agree(DenseCRF()(image, logits, steps=5), want)


# ---- what must hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BOTH)
def test_invariants(backend):
    image, logits = small(4)
    crf = DenseCRF(w=3, sxy=4, srgb=50, backend=backend)
    q = crf(image, logits)
    assert q.shape == logits.shape and torch.allclose(q.sum(0), torch.ones(9, 11).double())
    assert not torch.equal(q.argmax(0), logits.argmax(0))  # it does something
    order = [2, 0, 3, 1]
    assert torch.allclose(crf(image, logits[order]), q[order])
    assert torch.allclose(crf(image, logits + torch.randn(9, 11)), q)  # a constant for each pixel
    off = DenseCRF(w=0, w_smooth=0, backend=backend)
    assert torch.allclose(off(image, logits), logits.softmax(0), rtol=1e-12)
    assert torch.allclose(crf(image, logits, steps=0), logits.softmax(0), rtol=1e-12)
    for matrix in (1 - torch.eye(4), -torch.eye(4)):
        assert torch.allclose(DenseCRF(w=3, sxy=4, srgb=50, backend=backend, compatibility=matrix)(image, logits), q)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 2)])
def test_tiny_pictures(size):
    image, logits = small(3, size)
    for settings in PARAMETERS.values():
        q = DenseCRF(**settings)(image, logits)
        assert q.shape == (3, *size) and torch.allclose(q.sum(0), torch.ones(size).double())


def test_one_flat_colour_and_one_kernel_each():
    _, logits = small(3, (12, 10))
    image = np.full((12, 10, 3), 128, np.uint8)
    for settings in ({"w": 0}, {"w_smooth": 0}, {}):
        near, all_pairs = (DenseCRF(**settings, backend=backend)(image, logits) for backend in BOTH)
        assert (near - all_pairs).abs().mean() < 0.02 and near.isfinite().all()


def test_images_of_any_kind_are_the_same():
    from PIL import Image

    image, logits = small(3)
    crf = DenseCRF(w=3, sxy=4, srgb=50)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    want = crf(tensor, logits)
    turned = np.asfortranarray(image)[:, ::-1][:, ::-1]
    for same in (image, turned, tensor.contiguous(), Image.fromarray(image)):
        assert torch.equal(crf(same, logits), want)
    for same in (tensor / 255, image / 255, (image / 255).astype(np.float32)):
        assert torch.equal(crf(same, logits), want)
    assert torch.equal(crf(image, logits.numpy()), want)
    assert torch.allclose(crf(image, probabilities=logits.softmax(0)), want, atol=1e-6)
    assert torch.allclose(crf(image, unary=-logits), want)
    assert crf(image, logits.bfloat16()).dtype == torch.float32


def test_impossible_class_stays_impossible():
    image, logits = small(3)
    logits[1, 2:5] = -math.inf
    for backend in BOTH:
        q = DenseCRF(w=3, sxy=4, srgb=50, backend=backend)(image, logits)
        assert (q[1, 2:5] == 0).all() and q.isfinite().all()


def test_one_class_and_no_pixels():
    image, logits = small(1)
    assert torch.equal(DenseCRF()(image, logits), torch.ones_like(logits))
    assert DenseCRF()(np.zeros((0, 5, 3), np.uint8), torch.zeros(4, 0, 5)).shape == (4, 0, 5)


def test_threads_do_not_disturb_each_other():
    inputs = [small(3, (40, 50), seed) for seed in range(4)]
    crf = DenseCRF(w=3, sxy=6, srgb=50)
    want, got = [crf(*pair) for pair in inputs], {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: crf(*inputs[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(4))


def test_autocast_changes_nothing():
    image, logits = small(3)
    crf, logits = DenseCRF(w=3, sxy=4, srgb=50, compatibility=1 - torch.eye(3)), logits.float()
    want = crf(image, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crf(image, logits), want)


# ---- bad input ------------------------------------------------------------------------------------------------------


def refused(says: str, *args, error: type = ValueError, crf: dict | None = None, **kwargs) -> None:
    with pytest.raises(error, match=says):
        DenseCRF(**(crf or {}))(*args, **kwargs)


def test_nan_and_infinity_are_named():
    image, logits = small(3)
    logits[1, 2, 3] = math.nan
    refused(r"logits has 1 NaN.*\(1, 2, 3\)", image, logits)
    image = torch.rand(3, 9, 11)
    image[0, 4, 5] = math.nan
    refused(r"image has 1 NaN.*\(0, 4, 5\)", image, small(3)[1])
    logits[1, 2, 3] = math.inf
    refused(r"logits has \+inf.*\(1, 2, 3\)", small(3)[0], logits)
    refused(r"unary has -inf.*\(1, 2, 3\)", small(3)[0], unary=-logits)
    logits[:, 2, 3] = -math.inf
    refused(r"no class is possible at 1 pixels.*\(2, 3\)", small(3)[0], logits)


def test_shapes_are_named():
    image, logits = small(3)
    refused(r"\(3, 9, 11\) or \(9, 11, 3\).*got \(11, 9, 3\).*swapped", image.transpose(1, 0, 2), logits)
    refused(r"got \(3, 11, 9\).*swapped", image.transpose(2, 1, 0), logits)
    refused(r"got \(9, 11\)", image[..., 0], logits)
    refused(r"got \(8, 11, 3\)", image[:8], logits)
    refused(r"\(K, H, W\), got \(1, 3, 9, 11\).*one picture", image, logits[None])
    refused(r"one of logits, unary and probabilities", image)
    refused(r"one of logits, unary and probabilities", image, logits, unary=logits)


def test_ranges_of_the_image():
    image, logits = small(3)
    refused(r"in \[0, 1\], got .* to 25\d", image.astype(np.float32), logits)
    refused(r"in \[0, 1\], got -0", image / 255 - 0.5, logits)
    refused("uint8 or floats", image.astype(np.int64), logits)
    with pytest.warns(UserWarning, match="blind to colour"):
        DenseCRF()(image // 200, logits)


def test_probabilities_must_be_probabilities():
    image, logits = small(3)
    refused("sum to 1", image, probabilities=logits)
    refused("sum to 1", image, probabilities=logits.softmax(1))
    zeros = F.one_hot(logits.argmax(0), 3).permute(2, 0, 1).double()  # clipped at 1e-5, as pydensecrf
    want = DenseCRF()(image, unary=-zeros.clamp(min=1e-5).log())
    assert torch.equal(DenseCRF()(image, probabilities=zeros), want)


@pytest.mark.parametrize("name", ["sxy", "srgb", "sxy_smooth"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_thetas_must_be_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        DenseCRF(**{name: value})


def test_settings_are_checked():
    image, logits = small(3)
    for name in ("w", "w_smooth"):
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            DenseCRF(**{name: math.nan})
    with pytest.raises(ValueError, match="normalization must be one of"):
        DenseCRF(normalization="before")
    with pytest.raises(ValueError, match="backend must be one of"):
        DenseCRF(backend="bilateral grid")
    refused(r"compatibility must be \(3, 3\)", image, logits, crf={"compatibility": torch.eye(4)})
    matrix = torch.eye(3)
    matrix[0, 2] = math.nan
    refused("1 entries that are not numbers", image, logits, crf={"compatibility": matrix})
    for steps in (-1, 2.0, True):
        refused("whole number", image, logits, steps=steps)


def test_thetas_that_no_lattice_can_hold():
    image, logits = small(3)
    for settings in ({"srgb": 0.005}, {"srgb": 1e-6}, {"sxy_smooth": 1e-9}, {"sxy": 1e-30}):
        refused("theta is too small", image, logits.float(), crf=settings, error=OverflowError)
    assert DenseCRF(srgb=0.05)(image, logits.float()).isfinite().all()


def test_memory_is_checked_before_it_is_used():
    image, logits = small(3)
    refused("max_bytes", image, logits, crf={"max_bytes": 1000})
    image = np.zeros((129, 128, 3), np.uint8)
    refused("16,384 pixels.*lattice", image + image.shape[0], torch.zeros(2, 129, 128), crf={"backend": "exact"})


def test_pydensecrf_missing_or_not_able(monkeypatch):
    image, logits = small(3)
    asymmetric = {"compatibility": torch.tensor([[0.0, 1, 2], [0, 0, 1], [0, 0, 0]]), "backend": "pydensecrf"}
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 could not be compiled here")
    refused("symmetric", image, logits, crf=asymmetric)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    refused("pip install pydensecrf2", image, logits, crf={"backend": "pydensecrf"}, error=ImportError)


# ---- behind a network -----------------------------------------------------------------------------------------------


def test_with_crf_is_the_network_then_the_crf():
    torch.manual_seed(0)
    model, data = sg.FCN(11, pad=1, width=1 / 16).eval(), sg.Toytown("val", size=3)
    crf = DenseCRF(w=3, sxy=10, srgb=10)
    both = WithCRF(model, crf, steps=3)
    want = []
    for image, target in data:
        with torch.no_grad():
            labels = crf(image, model(image[None])[0], steps=3).argmax(0)
        want.append(sg.Scores.of(labels, target, 11))
        assert torch.equal(sg.predict(both, image), labels)
    assert sg.evaluate(both, data).miou == pytest.approx(sum(want[1:], want[0]).miou)


def test_crf_as_rnn_starts_as_mean_field():
    image, logits = small(4, (12, 14))
    images, logits = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, logits.float()
    model = CRFasRNN(4, sxy=4, srgb=50, w=3, w_smooth=2)
    assert sum(p.numel() for p in model.parameters()) == 2 * 4 + 4 * 4
    for mode, steps in ((True, 5), (False, 10)):
        want = DenseCRF(sxy=4, srgb=50, w=3, w_smooth=2, normalization="rows")(image, logits, steps=steps)
        assert torch.allclose(model.train(mode)(images, logits[None])[0].softmax(0), want, atol=1e-5)


def test_crf_as_rnn_learns_which_classes_go_together():
    """Every other column is wrongly 1 instead of 0, and 2 is alone: 0 gains when a neighbour of 1 speaks for it."""
    torch.manual_seed(0)
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    target[:, :, 8:] = 2
    seen = target.clone()
    seen[:, ::2, :8] = 1
    images, logits = torch.full((1, 3, 16, 16), 0.5), 2.0 * F.one_hot(seen, 3).permute(0, 3, 1, 2)
    images[..., 8:] = 0.9
    model = CRFasRNN(3, sxy=4, srgb=20)
    filters = [model.filters(image) for image in images]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images, logits, filters), target)
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert (model(images, logits, filters).argmax(1) == target).all()


def test_crf_as_rnn_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\).*got \(1, 2, 8, 8\)"):
        CRFasRNN(3)(torch.rand(1, 3, 8, 8), torch.rand(1, 2, 8, 8))
    with pytest.raises(ValueError, match="num_classes"):
        CRFasRNN(0)


if __name__ == "__main__":
    image, logits = golden_input()
    answers = {
        key: DenseCRF(**settings, backend="pydensecrf")(image, logits).numpy()
        for key, settings in golden_settings().items()
    }
    np.savez_compressed(GOLDEN, image=image, **answers)

"""The pieces that papers share, against torch, scipy, torchvision and arithmetic by hand."""

import re

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from segedu.layers import (
    bilinear_kernel,
    crop,
    learned_upsampling,
    normalize,
    pool_with_switches,
    scale,
    unpool,
)

# ---- switches


def test_switches_of_the_4_by_4_example():
    """Maxima 6, 8, 3, 4 at (1, 1), (1, 3), (2, 0), (3, 3); by hand."""
    x = torch.tensor([[2.0, 1, 0, 5], [4, 6, 7, 8], [3, 1, 2, 0], [0, 2, 1, 4]])[None, None]
    pooled, switches = pool_with_switches(x)
    assert pooled[0, 0].tolist() == [[6, 8], [3, 4]]
    assert switches[0, 0].tolist() == [[5, 7], [8, 15]]
    up = unpool(pooled, switches, like=x)
    assert up[0, 0].tolist() == [[0, 0, 0, 0], [0, 6, 0, 8], [3, 0, 0, 0], [0, 0, 0, 4]]
    other = unpool(torch.tensor([[[[-1.0, 2], [0, 9]]]]), switches, like=x)  # another code through the same switches
    assert other[0, 0].tolist() == [[0, 0, 0, 0], [0, -1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 9]]


@pytest.mark.parametrize("size", [(8, 8), (45, 60), (23, 30), (7, 1), (1, 1)])
def test_pooling_is_scipys_maximum_filter_and_covers_odd_borders(size):
    x = torch.randn(2, 3, *size)
    pooled, switches = pool_with_switches(x)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (0, size[0] % 2), (0, size[1] % 2)], constant_values=-np.inf)
    expected = ndimage.maximum_filter(padded, size=(1, 1, 2, 2), origin=(0, 0, -1, -1), mode="nearest")[..., ::2, ::2]
    np.testing.assert_array_equal(pooled, expected)
    assert torch.equal(x.flatten(2).gather(2, switches.flatten(2)), pooled.flatten(2))


@pytest.mark.parametrize("size", [(8, 8), (45, 60), (23, 31)])  # 45 -> 23 -> 45 is SegNet's fourth pool at 360 x 480
def test_unpool_keeps_values_and_places_and_nothing_else(size):
    x = torch.rand(2, 3, *size) + 0.1
    pooled, switches = pool_with_switches(x)
    up = unpool(pooled, switches, like=x)
    assert up.shape == x.shape
    kept = up != 0
    assert torch.equal(up[kept], x[kept])
    assert kept.sum() == pooled.numel()  # one of each window: 25 % where the sides are even
    again, places = pool_with_switches(up)
    assert torch.equal(again, pooled) and torch.equal(places, switches)


def test_unpool_is_torchs_layer():
    x = torch.randn(2, 4, 12, 10)
    pooled, switches = torch.nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(unpool(pooled, switches, like=x), torch.nn.MaxUnpool2d(2)(pooled, switches))


def test_pool_after_unpool_loses_negative_values():
    x = -torch.rand(1, 2, 6, 6) - 0.1
    pooled, switches = pool_with_switches(x)
    assert (pool_with_switches(unpool(pooled, switches, like=x))[0] == 0).all()


def test_unpool_is_the_adjoint_of_reading_at_the_switches():
    x, y = torch.randn(2, 3, 9, 7, dtype=torch.double), torch.randn(2, 3, 5, 4, dtype=torch.double)
    pooled, switches = pool_with_switches(x)
    torch.testing.assert_close((pooled * y).sum(), (x * unpool(y, switches, like=x)).sum())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(pool_with_switches(x)[0], x, y)
    torch.testing.assert_close(gradient, unpool(y, switches, like=x))


def test_unpool_needs_a_switch_for_each_value():
    x = torch.rand(1, 2, 8, 8)
    pooled, switches = pool_with_switches(x)
    message = r"unpool needs one switch for each value: x is \(1, 3, 4, 4\), the switches are \(1, 2, 4, 4\).*channels"
    with pytest.raises(ValueError, match=message):
        unpool(torch.rand(1, 3, 4, 4), switches, like=x)
    with pytest.raises(ValueError, match=r"x is \(1, 2, 3, 4\), the switches are \(1, 2, 4, 4\)"):
        unpool(pooled[:, :, :3], switches, like=x)


@pytest.mark.parametrize("like", [(16, 8), (4, 4), (9, 8), (8, 6)])
def test_unpool_needs_the_map_that_was_pooled(like):
    pooled, switches = pool_with_switches(torch.rand(1, 2, 8, 8))
    message = f"pooling {like[0]} x {like[1]} gives {-(-like[0] // 2)} x {-(-like[1] // 2)}, but x is 4 x 4"
    with pytest.raises(ValueError, match=message):
        unpool(pooled, switches, like=torch.empty(1, 2, *like))


# ---- transposed convolution


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (16, 8), (3, 2), (5, 3)])
def test_learned_upsampling_starts_as_scipys_upfirdn(kernel, stride):
    layer = learned_upsampling(3, kernel, stride, bias=True)
    x = torch.randn(1, 3, 5, 4)
    taps = bilinear_kernel(kernel).diagonal().sqrt().numpy()  # the kernel is the product of its taps with themselves
    expected = signal.upfirdn(taps, signal.upfirdn(taps, x.numpy(), stride, axis=2), stride, axis=3)
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-6)
    assert sum(p.numel() for p in layer.parameters()) == 9 * kernel**2 + 3


def test_bilinear_kernel_by_hand():
    assert bilinear_kernel(3).tolist() == [[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25, 0.5, 0.25]]
    assert bilinear_kernel(1).tolist() == [[1]] and bilinear_kernel(2).tolist() == [[0.25, 0.25], [0.25, 0.25]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        bilinear_kernel(0)


# ---- crop, normalize, scale


def test_crop_is_a_slice():
    x = torch.arange(30.0).view(1, 1, 5, 6)
    assert crop(x, 1, like=torch.empty(1, 9, 2, 3)).tolist() == [[[[7, 8, 9], [13, 14, 15]]]]
    assert torch.equal(crop(x, 0, like=x), x)
    with pytest.raises(ValueError, match="cannot cut 5 x 6 at 1 out of a map of 5 x 6"):
        crop(x, 1, like=x)


def test_normalize_is_torchvisions():
    from torchvision.transforms import v2

    images = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(normalize(images), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 4, 5), ValueError, "(3, 4, 5); add the batch axis"),
        (torch.rand(1, 1, 4, 5), ValueError, "must be (N, 3, H, W), got (1, 1, 4, 5)"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), TypeError, "torch.uint8; use images / 255"),
    ],
)
def test_normalize_refuses(images, error, message):
    with pytest.raises(error, match=re.escape(message)):
        normalize(images)


def test_scale_by_hand():
    assert scale((64, 128, 21, 5), 1) == [64, 128, 21, 5]  # the paper's numbers stay as they are
    assert scale((64, 128, 256, 512), 1 / 8) == [8, 16, 32, 64]
    assert scale((64, 48), 1 / 16) == [4, 4]
    assert scale((8,), 1 / 8) == [4]  # never below 4
    assert scale((64,), 2) == [128]


@pytest.mark.parametrize("width", [0, -1, 4.5])
def test_scale_refuses(width):
    with pytest.raises(ValueError, match=f"above 0 and at most 4 .*got {width}"):
        scale((64,), width)

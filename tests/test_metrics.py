"""Scores against torchmetrics, scikit-learn, a slow version with distance transforms, and arithmetic by hand."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as tm
from scipy import ndimage

from segedu.metrics import VOID, Scores, band_accuracy, boundary_f1, class_boundary_f1, confusion_matrix, size_recall

K = 5


def scene(seed: int, void: float = 0.05, size: tuple[int, int] = (60, 80)) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and target with connected regions, some noise and some void."""
    rng = torch.Generator().manual_seed(seed)
    maps = F.interpolate(torch.randn(1, K, 6, 8, generator=rng), size, mode="bilinear")[0]
    target = maps.argmax(0)
    labels = (maps + 0.4 * torch.randn(maps.shape, generator=rng)).argmax(0)
    target[torch.rand(size, generator=rng) < void] = VOID
    return labels, target


def dots(*rows: str) -> torch.Tensor:
    return torch.tensor([[VOID if c == "v" else int(c) for c in row] for row in rows])


# The confusion matrix


def test_matrix_by_hand():
    target = torch.tensor([0, 0, 0, 1, 1, VOID])
    labels = torch.tensor([0, 1, 1, 1, 0, 0])
    assert confusion_matrix(labels, target, 2).tolist() == [[1, 2], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_matrix_equals_torchmetrics_and_scikit_learn(dtype):
    labels, target = scene(0)
    ours = confusion_matrix(labels.to(dtype), target.to(dtype if dtype != torch.int16 else torch.uint8), K)
    seen = target != VOID
    assert torch.equal(ours, tm.multiclass_confusion_matrix(labels, target, K, ignore_index=VOID))
    assert ours.tolist() == sklearn.metrics.confusion_matrix(target[seen], labels[seen], labels=range(K)).tolist()


def test_matrix_of_many_pictures_is_the_sum():
    labels, target = (torch.stack(x) for x in zip(*(scene(i, size=(300, 400)) for i in range(3)), strict=True))
    whole = confusion_matrix(labels, target, K)  # more pixels than are counted at once
    assert torch.equal(whole, sum(confusion_matrix(x, y, K) for x, y in zip(labels, target, strict=True)))
    assert whole.sum() == (target != VOID).sum()


def test_labels_may_be_anything_valid_where_the_target_is_void():
    target = torch.tensor([VOID, VOID, 1])
    assert confusion_matrix(torch.tensor([VOID, 0, 1]), target, 2).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        ([0, 7], [0, 1], "got 7 in the prediction"),
        ([0, -1], [0, 1], "got -1 in the prediction"),
        ([0, VOID], [0, 1], "got 255 in the prediction"),
        ([0, 1], [0, 3], "got 3 in the target"),
        ([0, 1], [0, -2], "got -2 in the target"),
        ([0, 1000], [0, 1], "got 1000 in the prediction"),
        ([0, 256], [1, -1], "got -1 in the target"),
        ([0, 1], [0, 300], r"got 300 in the target \(1 pixels\); check num_classes=3"),
    ],
)
def test_a_label_out_of_range_is_named(labels, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(labels), torch.tensor(target), 3)


def test_wrong_inputs_say_what_to_do():
    target = torch.zeros(4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"logits.argmax\(1\)"):
        confusion_matrix(torch.zeros(4, 4), target, 3)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(4, 4\)"):
        confusion_matrix(target[:2, :2], target, 3)
    with pytest.raises(ValueError, match="num_classes must be 1 to 255"):
        confusion_matrix(target, target, 0)
    with pytest.raises(ValueError, match="one picture"):
        boundary_f1(target[None], target[None], 3)
    with pytest.raises(ValueError, match="one picture"):
        size_recall(target[None], target[None])


# The four scores


def test_scores_by_hand():
    scores = Scores(torch.tensor([[1, 2], [1, 1]]))
    assert scores.pixel_accuracy == pytest.approx(2 / 5)
    assert scores.mean_accuracy == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores.iou.tolist() == pytest.approx([1 / 4, 1 / 4])
    assert scores.miou == pytest.approx(1 / 4)
    assert scores.fw_iou == pytest.approx((3 * 1 / 4 + 2 * 1 / 4) / 5)


def test_scores_equal_torchmetrics_and_scikit_learn():
    labels, target = scene(1)
    scores = Scores.of(labels, target, K)
    seen = target != VOID
    jaccard = sklearn.metrics.jaccard_score(target[seen], labels[seen], average=None)
    assert scores.iou.tolist() == pytest.approx(jaccard.tolist())
    assert scores.miou == pytest.approx(tm.multiclass_jaccard_index(labels, target, K, ignore_index=VOID).item())
    for average, ours in (("micro", scores.pixel_accuracy), ("macro", scores.mean_accuracy)):
        theirs = tm.multiclass_accuracy(labels[None], target[None], K, average=average, ignore_index=VOID)
        assert ours == pytest.approx(theirs.item(), abs=1e-6)
    weighted = sklearn.metrics.jaccard_score(target[seen], labels[seen], average="weighted")
    assert scores.fw_iou == pytest.approx(weighted)


def test_absent_classes():
    scores = Scores(torch.tensor([[4, 0, 1], [0, 0, 0], [0, 0, 0]]))  # 1: nowhere; 2: predicted, never there
    assert scores.iou.tolist() == pytest.approx([4 / 5, math.nan, 0], nan_ok=True)
    assert scores.miou == pytest.approx(2 / 5)
    assert scores.mean_accuracy == pytest.approx(4 / 5)
    assert scores.fw_iou == pytest.approx(4 / 5)


def test_an_empty_matrix_gives_nan():
    scores = Scores.of(torch.zeros(8, 8, dtype=torch.long), torch.full((8, 8), VOID), 3)
    values = [scores.miou, scores.pixel_accuracy, scores.mean_accuracy, scores.fw_iou, scores.boundary_f1]
    assert all(math.isnan(value) for value in (*values, *scores.by_size.values(), *scores.by_band.values()))


def test_a_wrong_matrix_is_refused():
    with pytest.raises(ValueError, match=r"\(K, K\)"):
        Scores(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        Scores(torch.eye(2))
    with pytest.raises(ValueError, match="got -1"):
        Scores(torch.tensor([[1, 0], [-1, 0]]))
    with pytest.raises(ValueError, match="classes must be 2 names"):
        Scores(torch.eye(2, dtype=torch.long), classes=["sky"])


def test_scores_add_up():
    names = ["sky", "tree", "road", "car", "pole"]
    first, second, third = (Scores.of(*scene(i), K, names) for i in range(3))
    total = sum([first, second, third])
    both = [torch.stack(x) for x in zip(*(scene(i) for i in range(3)), strict=True)]
    assert torch.equal(total.matrix, confusion_matrix(*both, K))
    assert total.boundary_f1 == pytest.approx((first.boundary_f1 + second.boundary_f1 + third.boundary_f1) / 3)
    assert torch.equal(total.bands, first.bands + second.bands + third.bands)
    assert total.classes == names
    with pytest.raises(ValueError, match="same classes"):
        first + Scores(torch.zeros(3, 3, dtype=torch.long))


def test_scores_as_json_text_and_table():
    scores = Scores.of(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 0], [0, 1]]), 3, ["sky", "<b>", "pole"])
    plain = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert plain["matrix"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert plain["iou"] == pytest.approx([2 / 3, 1 / 2, None])
    assert plain["by_size"] == {"small": None, "medium": None, "large": None}  # all under 4 pixels
    lines = str(scores).splitlines()
    assert lines[0].split() == ["mean", "IU", "0.5833"]
    assert lines[-1].split() == ["pole", "-", "-"]
    assert len({len(line) for line in lines if line.startswith(("sky", "<b>", "pole", "class"))}) == 1
    table = scores._repr_html_()
    assert '<th scope="row">sky</th><td>0.6667</td><td>0.6667</td>' in table
    assert "&lt;b&gt;" in table
    assert table.count("<caption>") == table.count("<table>") == 2


# Boundary F1


def slow_boundary_f1(labels: np.ndarray, target: np.ndarray, num_classes: int, tolerance: float) -> list[float]:
    """Class by class with exact distances, after Csurka et al. 2013."""

    def boundary(mask: np.ndarray) -> np.ndarray:
        cross = ndimage.generate_binary_structure(2, 1)
        return mask & ~ndimage.binary_erosion(mask, cross, border_value=1)

    def near(points: np.ndarray, others: np.ndarray) -> float:
        if not points.any() or not others.any():
            return 0.0
        distance = ndimage.distance_transform_edt(~others)
        return float((distance[points] <= tolerance * math.hypot(*target.shape) + 1e-9).mean())

    labels = np.where(target == VOID, VOID, labels)
    scores = []
    for k in range(num_classes):
        if not (target == k).any():
            scores.append(math.nan)
            continue
        true, predicted = boundary(target == k), boundary(labels == k)
        p, r = near(predicted, true), near(true, predicted)
        scores.append(2 * p * r / (p + r) if p + r else 0.0)
    return scores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.0, 0.0075, 0.02, 0.03, 0.1])
def test_boundary_f1_equals_the_slow_version(seed, tolerance):
    labels, target = scene(seed, void=0.02 * seed)
    ours = class_boundary_f1(labels, target, K + 1, tolerance)
    slow = slow_boundary_f1(labels.numpy(), target.numpy(), K + 1, tolerance)
    assert ours.tolist() == pytest.approx(slow, nan_ok=True)
    assert boundary_f1(labels, target, K + 1, tolerance) == pytest.approx(np.nanmean(slow))


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (4, 1.0), (5, 0.0)])
def test_tolerance_is_four_and_a_half_pixels_at_360_x_480(shift, score):
    target = torch.zeros(360, 480, dtype=torch.long)
    target[:, 200:] = 1
    labels = torch.zeros_like(target)
    labels[:, 200 + shift :] = 1
    assert class_boundary_f1(labels, target, 2).tolist() == [score, score]


def test_tolerance_is_euclidean():
    target, labels = torch.zeros(30, 40, dtype=torch.long), torch.zeros(30, 40, dtype=torch.long)
    target[10, 10] = labels[13, 14] = 1  # 5 px away, the diagonal is 50 px
    assert class_boundary_f1(labels, target, 2, 0.1)[1] == 1
    assert class_boundary_f1(labels, target, 2, 0.0999)[1] == 0


def test_half_the_boundary_found_by_hand():
    target = dots("0000000", "0110110", "0000000")
    labels = dots("0000000", "0110000", "0000000")
    assert class_boundary_f1(labels, target, 2, 0.0)[1] == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_prediction_is_void_where_the_target_is():
    target = dots("00v11", "00v11", "00v11")
    assert class_boundary_f1(dots("00011", "00111", "00011"), target, 2, 0.0).tolist() == [1, 1]


def test_a_class_without_boundary():
    target = torch.zeros(6, 6, dtype=torch.long)
    other = torch.zeros_like(target)
    other[2:4, 2:4] = 1
    assert boundary_f1(target, target, 2) == 1  # the whole picture, found
    assert boundary_f1(target + 1, target, 2) == 0  # all wrong
    assert boundary_f1(other, target, 2) == 0  # an edge where there is none
    assert class_boundary_f1(target, other, 2).tolist() == [0, 0]  # no edge where there is one
    assert math.isnan(boundary_f1(target, torch.full_like(target, VOID), 2))


# Recall by size


def test_recall_by_size_by_hand():
    target = torch.zeros(20, 100, dtype=torch.long)  # 2000 px: small < 10, medium 10 to 100, large > 100
    target[2:4, 2:4] = 1  # small: 4 px
    target[6:8, 6:8] = 1  # small: 4 px
    target[10:15, 10:20] = 1  # medium: 50 px
    target[2, 60] = 2  # a speck: left out
    labels = target.clone()
    labels[2:4, 2:4] = 0  # not found
    labels[10:15, 10:15] = 0  # half found
    scores = Scores.of(labels, target, 3)
    assert scores.by_size == pytest.approx({"small": 1 / 2, "medium": 1 / 2, "large": 1})
    assert size_recall(labels, target)[:, 1].tolist() == [2, 1, 1]


def test_objects_are_the_components_of_scipy():
    labels, target = scene(7, void=0.1)
    recalls = []
    for k in range(K):
        objects, n = ndimage.label((target == k).numpy())
        recalls += [(labels == k).numpy()[objects == i].mean() for i in range(1, n + 1) if (objects == i).sum() >= 4]
    recall, number = size_recall(labels, target).sum(0).tolist()
    assert number == len(recalls) > 10
    assert recall == pytest.approx(sum(recalls))


# Accuracy by distance to a border


def test_accuracy_by_band_by_hand():
    target = torch.zeros(4, 40, dtype=torch.long)
    target[:, 20:] = 1  # one border, between columns 19 and 20: 8 px at each distance
    labels = target.clone()
    labels[:, 20] = 0  # at distance 1, on one side
    labels[:2, 23] = 0  # at distance 4, half the rows
    scores = Scores.of(labels, target, 2)
    assert scores.bands[:, 1].tolist() == [8, 8, 16, 32, 96]
    right = {"1 px": 4 / 8, "2 px": 12 / 16, "4 px": (32 - 6) / 32, "8 px": (64 - 6) / 64, "beyond": 1}
    assert scores.by_band == pytest.approx(right)


def test_bands_agree_with_all_pairs_of_pixels():
    labels, target = scene(5, void=0.1)
    target[:12, :12] = 2  # somewhere to be far from a border
    places = torch.cartesian_prod(*(torch.arange(n) for n in target.shape)).double()
    edge = torch.zeros_like(target, dtype=torch.bool)
    for axis in (0, 1):
        for step in (1, -1):
            moved = target.roll(step, axis)
            moved.select(axis, 0 if step == 1 else -1).copy_(target.select(axis, 0 if step == 1 else -1))
            edge |= moved != target
    distance = torch.cdist(places, places[edge.flatten()]).amin(1).view_as(target) + 1
    for (low, high), (right, number) in zip(
        [(0, 1), (1, 2), (2, 4), (4, 8), (8, math.inf)], band_accuracy(labels, target).tolist(), strict=True
    ):
        ring = (distance > low) & (distance <= high) & (target != VOID)
        assert number == ring.sum() and right == (ring & (labels == target)).sum()


def test_one_class_everywhere_has_no_border():
    one = torch.zeros(6, 6, dtype=torch.long)
    assert Scores.of(one, one, 2).bands.tolist() == [[0, 0]] * 4 + [[36, 36]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same():
    labels, target = scene(3)
    here, there = Scores.of(labels, target, K), Scores.of(labels.cuda(), target.cuda(), K)
    assert there.to_dict() == pytest.approx(here.to_dict())

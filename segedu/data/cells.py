"""Cells: small procedural pictures of cells that touch, as under a microscope. Nothing to download.

A scene is a pure function of (split, index, seed). What the chapter on U-Net looks for is there on purpose:

* few training pictures, 30, as in the data sets of the paper;
* cells that touch: between two neighbours only one or two pixels are background, and their contrast is low, so that a
  net that misses one of them joins two cells;
* outlines that bend in every direction (elastic deformation makes more of the same kind);
* light that falls from one side, as in differential interference contrast: a cell is no brighter than the ground.

Only sums, products, quotients, comparisons and square roots reach the pixels: they round the same on every machine.
"""

import numpy as np
import torch
from torch import Tensor

SPLITS = {"train": (0, 30), "val": (1, 30), "test": (2, 60)}  # number of the stream, number of scenes
SIDE = 96


class Cells:
    """Procedural cells, 96 x 96, 2 classes.

    Item: image float32 (3, 96, 96) in [0, 1], grey in three equal channels, and target long (96, 96): 0 background,
    1 cell. `split` is train (30 scenes), val (30) or test (60); `size` asks for another number of them. The same split,
    index and seed always give the same scene. A scene that was drawn stays in memory (28 kB).

    Raises ValueError for an unknown split or a negative size, IndexError for an index outside the set.
    """

    classes = ["background", "cell"]
    palette = torch.tensor([(24, 26, 60), (250, 190, 70)], dtype=torch.uint8)

    def __init__(self, split: str, size: int | None = None, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.stream, usual = SPLITS[split]
        self.size = usual if size is None else size
        if self.size < 0 or seed < 0:
            raise ValueError(f"size and seed must not be negative, got size={self.size}, seed={seed}")
        self.split, self.seed = split, seed
        self.drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, cells = self.scene(index)
        return torch.from_numpy(image).float().expand(3, -1, -1) / 255, torch.from_numpy(cells > 0).long()

    def instances(self, index: int) -> Tensor:
        """(96, 96) long: 0 background, 1 to n the cells. Each is one connected component of the target."""
        return torch.from_numpy(self.scene(index)[1]).long()

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (96, 96) and instances (96, 96), both uint8; not to be written to."""
        if not -self.size <= index < self.size:
            raise IndexError(f"scene {index} of a set of {self.size}")
        index %= self.size
        if index not in self.drawn:
            self.drawn[index] = draw(np.random.default_rng((self.seed, self.stream, index)).random)
        return self.drawn[index]


def draw(random) -> tuple[np.ndarray, np.ndarray]:
    """One scene from a stream of random numbers in [0, 1)."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    x, y = x + 5 * waves(random, 4), y + 5 * waves(random, 4)  # bent, so that outlines are no circles

    tries = (-8 + (SIDE + 16) * random((400, 2))).astype(np.float32)
    apart = 10 + 5 * random()
    centres: list[np.ndarray] = []
    for place in tries:
        if all(((place - other) ** 2).sum() > apart * apart for other in centres) and random() < 0.5:
            centres.append(place)
    radii = (7 + 7 * random(len(centres))).astype(np.float32)

    # power diagram: a pixel belongs to the disc it lies deepest in, so that neighbours share a straight border
    cx, cy = np.array(centres).T[..., None, None]
    depth = radii[:, None, None] ** 2 - (x - cx) ** 2 - (y - cy) ** 2
    owner = np.where(depth.max(0) > 0, depth.argmax(0) + 1, 0)
    cells = components(owner)

    dome = np.sqrt(np.maximum(depth.max(0), 0)) * (cells > 0)  # height above the ground, in pixels
    slope = np.zeros_like(dome)
    slope[1:-1, 1:-1] = dome[:-2, :-2] - dome[2:, 2:]
    image = 0.5 + 0.035 * np.clip(slope, -5, 5) + 0.06 * (cells > 0) * waves(random, 16) + 0.05 * waves(random, 3)
    image = image - 0.06 * (cells == 0) * (owner > 0)  # the ridge between two cells is a little darker
    for cell, (grey, shift_x, shift_y) in enumerate(random((len(centres), 3)), start=1):  # a nucleus, and stain
        inside = (owner == cell) & (cells > 0)
        px, py = centres[cell - 1] + 4 * (np.array([shift_x, shift_y], np.float32) - 0.5)
        image[inside] += 0.1 * (grey - 0.5)
        image[inside & ((x - px) ** 2 + (y - py) ** 2 < 6)] -= 0.08
    image[1:-1, 1:-1] = 0.6 * image[1:-1, 1:-1] + 0.1 * (
        image[:-2, 1:-1] + image[2:, 1:-1] + image[1:-1, :-2] + image[1:-1, 2:]
    )
    image += (0.12 + 0.12 * random()) * (random((SIDE, SIDE)) - 0.5)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), cells


def waves(random, cells: int) -> np.ndarray:
    """(SIDE, SIDE) float32 in [-1, 1]: a random grid of `cells` x `cells`, interpolated smoothly."""
    grid = (2 * random((cells + 1, cells + 1)) - 1).astype(np.float32)
    at = np.arange(SIDE, dtype=np.float32) * (cells / SIDE)
    low = at.astype(np.intp)
    t = at - low
    t = t * t * (3 - 2 * t)
    rows = grid[low] + t[:, None] * (grid[low + 1] - grid[low])
    return rows[:, low] + t * (rows[:, low + 1] - rows[:, low])


def components(owner: np.ndarray) -> np.ndarray:
    """(H, W) numbers of owners, 0 for none -> (H, W) uint8 instances, with background between any two of them.

    A pixel whose right, lower, or lower diagonal neighbour belongs to another owner becomes background. What is left of
    fewer than 12 pixels goes too.
    """
    from scipy import ndimage

    ridge = np.zeros(owner.shape, bool)
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        ridge[here] |= (owner[here] != owner[there]) & (owner[here] > 0) & (owner[there] > 0)
    parts, _ = ndimage.label((owner > 0) & ~ridge)
    small = np.bincount(parts.ravel())[parts] < 12
    return ndimage.label((parts > 0) & ~small)[0].astype(np.uint8)


def merged(labels: Tensor, instances: Tensor) -> Tensor:
    """Which cells a prediction joins to another cell: labels (H, W) and instances (H, W) -> (cells,) bool.

    A cell belongs to the connected component of labels > 0 (4 neighbours) that holds at least half of it. It is joined
    if another cell belongs to the same component. `merged(...).float().mean()` is the share of cells.
    """
    from scipy import ndimage

    if labels.shape != instances.shape or labels.ndim != 2:
        raise ValueError(
            f"labels and instances must be (H, W) of one size, got {tuple(labels.shape)} and {tuple(instances.shape)}"
        )
    parts = torch.from_numpy(ndimage.label(labels.cpu().numpy() > 0)[0]).long()
    home = []
    for cell in range(1, int(instances.max()) + 1):
        inside = parts[instances == cell]
        part = int(inside.bincount()[1:].argmax()) + 1 if inside.any() else 0
        home.append(part if 2 * (inside == part).sum() >= len(inside) else 0)
    home = torch.tensor(home, dtype=torch.long)
    return (home > 0) & ((home[:, None] == home).sum(1) > 1)

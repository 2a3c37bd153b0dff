"""Toytown: small procedural street-and-river scenes, drawn with numpy. Nothing to download.

A scene is a pure function of (split, index, seed) and the scene knobs. It is drawn far to near on a ground plane that a
camera of height 1 looks along: `d` rows below the horizon, a thing of world size s measures s * d pixels.

What the chapters look for is there on purpose:

* thin poles and far people, one or two pixels wide (skips);
* vehicles, trees and walls wider than a receptive field (dilation, deconvolution);
* one vehicle drawn the same as `boat` on water and as `car` on the road, told apart only by its surroundings (context);
* the same class over more than eight-fold sizes (several rates);
* edges of colour where the labels change (CRF), yet paints, greens and greys shared by classes, so that colour alone
  does not give the class.

Only sums, products, quotients, comparisons and square roots reach the pixels: they round the same on every machine.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from segedu.metrics import VOID

PALETTE = {  # apart also for red-green colour blindness; neighbours differ in lightness
    "sky": (165, 200, 250),
    "building": (135, 80, 40),
    "pole": (15, 10, 10),
    "road": (148, 128, 124),
    "grass": (155, 230, 120),
    "water": (15, 75, 195),
    "tree": (0, 60, 65),
    "sign": (240, 245, 40),
    "car": (80, 0, 115),
    "boat": (228, 126, 46),
    "person": (245, 150, 195),
}
SKY, BUILDING, POLE, ROAD, GRASS, WATER, TREE, SIGN, CAR, BOAT, PERSON = range(len(PALETTE))
SPLITS = {"train": (0, 800), "val": (1, 200), "test": (2, 200)}  # number of the stream, number of scenes
HEIGHT, WIDTH = 96, 128
FOCAL = 110  # pixels: what is Z units away stands FOCAL / Z rows below the horizon

Box = tuple[slice, slice]  # rows and columns


def rgb(code: str) -> np.ndarray:
    """(3, 1, 1) float32 in [0, 1] from six hexadecimal digits."""
    return np.array(list(bytes.fromhex(code)), np.float32).reshape(3, 1, 1) / 255


def paints(codes: str) -> list[np.ndarray]:
    return [rgb(code) for code in codes.split()]


# houses, vehicles, signs and coats share one box of paints
PAINTS = paints("b24a3a decdaa 60809e 528c84 d6a046 e4e2dc 706c70 7e8454 966c54 be7882")
GREENS = paints("688e46 82984a 9e9c56 547e4c")  # grass
LEAVES = [*GREENS, *paints("466c46 b0783e 3a5c4a")]
WATERS = paints("52809e 588682 688068 788076")
STONES = paints("76767a 8a8682 988c7c 646872")
METALS = paints("3a3c40 5c5e60 969696 684e3a 466054")  # poles, trunks, trousers
SKINS = paints("ecc4a4 c69470 78543e")
LAMPS = paints("faf0be be3228")
GLASS, LIT, DARK, WHITE, EARTH = paints("566878 f0d080 2e2e34 ecece6 7a6a54")
LIGHTS = [  # light on the scene, sky above, sky at the horizon, strength of shadows
    (rgb("fffcf6"), rgb("689ed6"), rgb("c4dae8"), 0.36),  # day
    (rgb("fffcf6"), rgb("84b0d4"), rgb("d6e0e2"), 0.36),  # hazy day
    (rgb("f4cca8"), rgb("7080ac"), rgb("f4ba84"), 0.30),  # evening
    (rgb("d6dce2"), rgb("aab2ba"), rgb("ced0d0"), 0.10),  # overcast
]


class Dice:
    """Uniform draws from one stream of random numbers, the one named by `key`."""

    def __init__(self, *key: int) -> None:
        self.random = np.random.default_rng(key).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def chance(self, p: float) -> bool:
        return self.random() < p

    def pick(self, options: Sequence):
        return options[int(self.random() * len(options))]

    def count(self, low: int, high: int) -> int:
        """low to high, both included."""
        return low + int(self.random() * (high + 1 - low))

    def colour(self, options: Sequence[np.ndarray], spread: float = 0.1) -> np.ndarray:
        """One of the colours, a little lighter or darker."""
        return self.pick(options) * self.between(1 - spread, 1 + spread)

    def depth(self, far: float, close: float) -> float:
        """Rows below the horizon; small ones, far away, more often."""
        return far + (close - far) * self.random() * self.random()

    def field(self, rows: int, columns: int) -> np.ndarray:
        """(HEIGHT, WIDTH) float32 in [-1, 1]: a random grid of `rows` x `columns` cells, interpolated linearly."""
        grid = 2 * self.random((rows + 1, columns + 1), dtype=np.float32) - 1
        for axis, cells, shape in ((0, rows, (HEIGHT, 1)), (1, columns, (1, WIDTH))):
            at = np.arange(max(shape), dtype=np.float32) * (cells / max(shape))
            low = at.astype(np.intp)
            before, after = grid.take(low, axis), grid.take(low + 1, axis)
            grid = before + (at - low).reshape(shape) * (after - before)
        return grid


def cover(inside: np.ndarray) -> np.ndarray:
    """The covered share of a pixel whose centre lies `inside` pixels within an edge (negative: outside)."""
    return np.minimum(np.maximum(inside + 0.5, 0), 1)


def band(t: np.ndarray, low: float, high: float, pixels: float) -> np.ndarray:
    """Cover of the part [low, high) of every period of `t`, when a period is `pixels` wide."""
    phase = t - np.floor(t)
    return cover(np.minimum(phase - low, high - phase) * pixels)


class Canvas:
    """A picture, and the thing seen at every pixel.

    image: (3, HEIGHT, WIDTH) float32. things: (HEIGHT, WIDTH), the number of a thing. kinds: for every thing its
    (class, whether it is large and gets a void rim, whether it is a hull). Coordinates are pixels, y downwards.
    """

    X = np.arange(WIDTH, dtype=np.float32) + 0.5
    Y = (np.arange(HEIGHT, dtype=np.float32) + 0.5).reshape(-1, 1)

    def __init__(self, dice: Dice) -> None:
        self.image = np.zeros((3, HEIGHT, WIDTH), np.float32)
        self.things = np.zeros((HEIGHT, WIDTH), np.int16)
        self.kinds: list[tuple[int, bool, bool]] = []
        self.grain = 2 * dice.random((HEIGHT, WIDTH), dtype=np.float32) - 1
        self.mottle = dice.field(HEIGHT // 4, WIDTH // 4)
        self.drift, self.ripple = dice.field(4, 4), dice.field(HEIGHT // 2, WIDTH // 16)

    def thing(self, label: int, large: bool = False, hull: bool = False) -> int:
        self.kinds.append((label, large, hull))
        return len(self.kinds) - 1

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Box | None:
        """The pixels that a shape within these limits can touch; None if it lies outside the picture."""
        left, right = max(int(x0) - 1, 0), min(int(x1) + 2, WIDTH)
        top, bottom = max(int(y0) - 1, 0), min(int(y1) + 2, HEIGHT)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def paint(self, box: Box, share: np.ndarray, colour: np.ndarray, thing: int | None = None) -> None:
        """Blend in `colour` by the covered `share` (h, w) of each pixel. `thing` takes the pixels covered by half."""
        view = self.image[:, *box]
        change = colour - view
        change *= share
        view += change
        if thing is not None:
            np.copyto(self.things[box], thing, where=share >= 0.5)

    def rect(self, x0, y0, x1, y1, colour, thing=None) -> None:
        if box := self.box(x0, y0, x1, y1):
            x, y = self.X[box[1]], self.Y[box[0]]
            across = np.minimum(cover(np.minimum(x - x0, x1 - x)), x1 - x0)
            down = np.minimum(cover(np.minimum(y - y0, y1 - y)), y1 - y0)
            self.paint(box, across * down, colour, thing)

    def stick(self, x, y0, y1, width, colour, thing) -> None:
        """An upright bar, never thinner than one whole pixel."""
        x0, width = (int(x), 1) if width < 1.5 else (x - width / 2, width)
        self.rect(x0, y0, x0 + width, max(y1, y0 + 1), colour, thing)

    def ellipse(self, x, y, rx, ry, colour, thing=None, opacity=1.0, leafy=False) -> None:
        """`leafy`: with a ragged outline and a grain."""
        if box := self.box(x - 1.2 * rx, y - 1.2 * ry, x + 1.2 * rx, y + 1.2 * ry):
            dx, dy = (self.X[box[1]] - x) * (1 / rx), (self.Y[box[0]] - y) * (1 / ry)
            radius = np.sqrt(dx * dx + dy * dy)
            if leafy:
                radius += min(0.2, 2 / min(rx, ry)) * self.mottle[box]
                colour = colour * (1 + 0.1 * self.grain[box])
            share = cover((1 - radius) * min(rx, ry))
            self.paint(box, share if opacity == 1 else share * opacity, colour, thing)

    def polygon(self, points: Sequence[tuple[float, float]], colour: np.ndarray, thing: int | None = None) -> None:
        """A convex polygon, its corners in either sense of rotation."""
        xs, ys = zip(*points, strict=True)
        if not (box := self.box(min(xs), min(ys), max(xs), max(ys))):
            return
        edges = list(zip(points, [*points[1:], points[0]], strict=True))
        turn = 1 if sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges) > 0 else -1
        lines = []  # through a corner, with the unit vector that points inwards
        for (ax, ay), (bx, by) in edges:
            length = turn * math.sqrt((bx - ax) * (bx - ax) + (by - ay) * (by - ay))
            lines.append((ax, ay, (ay - by) / length, (bx - ax) / length))
        x, y, across, down = np.array(lines, np.float32).T[..., None, None]
        inside = (self.X[box[1]] - x) * across + (self.Y[box[0]] - y) * down
        self.paint(box, cover(inside.min(0)), colour, thing)

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Target (HEIGHT, WIDTH) uint8, VOID where a large thing ends, and the pixels of hulls (HEIGHT, WIDTH) bool."""
        label, large, hull = (np.array(column) for column in zip(*self.kinds, strict=True))
        thin = np.isin(label, (POLE, SIGN, PERSON))  # no rim around these: they are all edge
        things, rim = self.things, np.zeros((HEIGHT, WIDTH), bool)
        upper, lower, left, right = np.s_[:-1], np.s_[1:], np.s_[:, :-1], np.s_[:, 1:]
        for here, there in ((upper, lower), (lower, upper), (left, right), (right, left)):
            rim[here] |= (things[here] != things[there]) & ~thin[things[there]]
        target = label.astype(np.uint8)[things]
        target[rim & large[things]] = VOID
        return target, hull[things]


# ------------------------------------------------- things that stand at (x, y) and measure d pixels per unit of size


def draw_house(canvas: Canvas, dice: Dice, x: float, y: float, d: float, *, width: float, height: float) -> None:
    """A house front whose left corner stands at (x, y)."""
    wall, roof, glass = dice.colour(PAINTS), 0.75 * dice.colour(PAINTS, 0.2), dice.colour((GLASS, GLASS, LIT), 0.2)
    pane, floor, rise = dice.between(0.55, 0.9), dice.between(0.75, 1.0), dice.between(0.4, 0.9) * min(width, 2.5)
    pitched, ridge, chimney, entrance = dice.chance(0.6), dice.pick((0.5, 0.75)), dice.chance(0.5), dice.random()
    thing = canvas.thing(BUILDING, large=True)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + u * d, y - v * d

    if pitched:
        top = height + rise
        eaves = at(width + 0.12, height), at(-0.12, height)
        canvas.polygon([*eaves, at((1 - ridge) * width, top), at(ridge * width + 0.01, top)], roof, thing)
        if chimney:
            canvas.rect(*at(0.25 * width, top), *at(0.25 * width + 0.22, height), 0.8 * wall, thing)
    if not (box := canvas.box(*at(0, height), *at(width, 0))):
        return
    canvas.rect(*at(0, height), *at(width, 0), wall, thing)
    canvas.rect(*at(0, height), *at(0.18 * width, 0), 0.86 * wall, thing)  # in the shade
    if not pitched:
        canvas.rect(*at(-0.08, height), *at(width + 0.08, height - 0.16), roof, thing)
    columns, storeys = max(int(width / pane), 1), max(int(height / floor), 1)
    u = (canvas.X[box[1]] - x) * (columns / (width * d))
    v = (canvas.Y[box[0]] - (y - height * d)) * (1 / (floor * d))
    across = band(u, 0.28, 0.72, width * d / columns) * ((u > 0) & (u < columns))
    down = band(v, 0.25, 0.75, floor * d) * ((v > 0) & (v < storeys))
    canvas.paint(box, across * down * min(1.0, d / 8), glass)
    door = (int(entrance * columns) + 0.5) * width / columns
    canvas.rect(*at(door - 0.14, 0.6), *at(door + 0.14, 0), 0.7 * roof, thing)


def draw_tree(canvas: Canvas, dice: Dice, x: float, y: float, d: float) -> None:
    height, round_crown, wide = dice.between(1.2, 2.6) * d, dice.chance(0.7), dice.between(0.24, 0.4)
    leaf, trunk, lean = dice.colour(LEAVES), dice.colour(METALS), dice.between(-0.1, 0.1)
    thing = canvas.thing(TREE, large=height > 12)
    canvas.stick(x, y - 0.4 * height, y, 0.08 * height, trunk, thing)
    if round_crown:
        for shift, up, size, light in ((0, 0.62, 1.0, 0.8), (lean, 0.69, 0.8, 1.0), (-0.09, 0.7, 0.45, 1.15)):
            rx, ry = size * wide * height, size * 0.36 * height
            canvas.ellipse(x + shift * height, y - up * height, rx, ry, light * leaf, thing, leafy=True)
    else:
        for low, high, half in ((0.18, 0.62, 0.26), (0.4, 0.8, 0.2), (0.62, 1.0, 0.14)):
            foot = y - low * height
            corners = [(x - half * height, foot), (x, y - high * height), (x + half * height, foot)]
            canvas.polygon(corners, (0.7 + 0.35 * high) * leaf, thing)


def draw_pole(canvas: Canvas, dice: Dice, x: float, y: float, d: float) -> None:
    """A street lamp, or a shorter post with a sign."""
    metal, paint, lamp, side = dice.colour(METALS), dice.colour(PAINTS), dice.chance(0.45), dice.pick((-1, 1))
    height, size, shape = dice.between(1.7, 2.4) * d, dice.between(0.13, 0.22) * d, dice.count(0, 2)
    top = y - (height if lamp else 0.65 * height)
    thing = canvas.thing(POLE)
    canvas.stick(x, top, y, 0.036 * d, metal, thing)
    if lamp:
        end = x + side * 0.4 * d
        canvas.rect(min(x, end), int(top), max(x, end), int(top) + max(0.03 * d, 1), metal, thing)
        canvas.ellipse(end, top + 0.06 * d, 0.12 * d, 0.07 * d, LAMPS[0], thing)
        return
    sign, size = canvas.thing(SIGN), max(size, 1.2)
    if shape == 0:
        canvas.ellipse(x, top, size, size, paint, sign)
        canvas.ellipse(x, top, 0.6 * size, 0.6 * size, WHITE)
    elif shape == 1:
        canvas.rect(x - size, top - size, x + size, top + size, paint, sign)
        canvas.rect(x - 0.6 * size, top - 0.2 * size, x + 0.6 * size, top + 0.2 * size, WHITE)
    else:
        foot = top + size
        canvas.polygon([(x - 1.2 * size, foot), (x, top - 1.2 * size), (x + 1.2 * size, foot)], paint, sign)


def draw_person(canvas: Canvas, dice: Dice, x: float, y: float, d: float) -> None:
    coat, trousers, skin = dice.colour(PAINTS), dice.colour(METALS), dice.pick(SKINS)
    h, step = dice.between(0.48, 0.6) * d, dice.between(0.02, 0.1)
    thing = canvas.thing(PERSON)
    if h < 6:
        canvas.stick(x, y - h, y, 0.3 * h, coat, thing)
        canvas.stick(x, y - 0.4 * h, y, 0.25 * h, trousers, thing)
        canvas.stick(x, y - h, y - 0.75 * h, 0.2 * h, skin, thing)
        return
    for foot in (-step, step):
        canvas.rect(x + (foot - 0.06) * h, y - 0.5 * h, x + (foot + 0.06) * h, y, trousers, thing)
    canvas.ellipse(x, y - 0.6 * h, 0.17 * h, 0.26 * h, coat, thing)
    canvas.ellipse(x, y - 0.9 * h, 0.09 * h, 0.105 * h, skin, thing)
    canvas.ellipse(x, y - 0.94 * h, 0.09 * h, 0.07 * h, 0.7 * trousers)  # hair


def draw_car(canvas: Canvas, dice: Dice, x: float, y: float, d: float, *, front: bool) -> None:
    """A car, a van or a bus, seen from the side or (`front`) from one end."""
    paint, bus, facing, lamp = dice.colour(PAINTS), dice.chance(0.25), dice.pick((-1, 1)), dice.pick(LAMPS)
    long, high = 0.66 if front else 1.3, 0.5
    if bus:
        long, high = long * (1.15 if front else 1.5), 0.85
    bonnet, boot = (0.1, 0.1) if front else (0.05, 0.02) if bus else (0.26, 0.1)  # shares of the length
    belt, slope = 0.1 + 0.45 * high, 0.04 if bus else 0.1
    thing = canvas.thing(CAR, large=long * d > 10)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + facing * (u - 0.5) * long * d, y - v * d  # u from 0 at the back to 1 at the front

    wheels = [(at(u, 0.11), 0.07 if front else 0.12) for u in ((0.12, 0.88) if front else (0.22, 0.78))]
    for middle, size in wheels:
        canvas.ellipse(*middle, size * d, 0.12 * d, DARK, thing)
    low, left, right = belt - 0.02, boot, 1 - bonnet
    canvas.polygon([at(left, low), at(left + slope, high), at(right - slope, high), at(right, low)], paint, thing)
    left, right, top = left + 0.05, right - 0.05, high - 0.07
    canvas.polygon([at(left, belt), at(left + slope, top), at(right - slope, top), at(right, belt)], 0.8 * GLASS)
    canvas.polygon([at(0, 0.1), at(0, belt), at(1, belt), at(1, 0.1)], 0.92 * paint, thing)
    canvas.polygon([at(0, 0.1), at(0, 0.16), at(1, 0.16), at(1, 0.1)], 0.6 * paint)
    if not front:
        canvas.polygon([at(0.4, belt), at(0.4, high), at(0.44, high), at(0.44, belt)], paint)
        for middle, _ in wheels:
            canvas.ellipse(*middle, 0.05 * d, 0.05 * d, METALS[2])
    for u in (0.13, 0.87) if front else (0.97,):
        canvas.ellipse(*at(u, belt - 0.1), 0.06 * d, 0.05 * d, lamp)


def draw_hull(canvas: Canvas, dice: Dice, x: float, y: float, d: float, *, label: int) -> None:
    """The amphibious toy. Nothing in the drawing depends on `label`: only the surroundings tell a car from a boat."""
    paint, deck, facing, stripe = dice.colour(PAINTS), dice.colour(PAINTS), dice.pick((-1, 1)), dice.chance(0.6)
    long, high, cabin = dice.between(1.1, 1.5), dice.between(0.26, 0.32), dice.between(0.05, 0.2)
    roof = high + dice.between(0.24, 0.34)
    thing = canvas.thing(label, large=long * d > 10, hull=True)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + facing * u * long * d, y - v * d  # u from -0.5 at the stern to 0.5 at the bow

    low = high - 0.02
    canvas.polygon([at(-0.3, low), at(-0.27, roof), at(cabin - 0.06, roof), at(cabin, low)], deck, thing)
    sill, top = high + 0.3 * (roof - high), high + 0.75 * (roof - high)
    canvas.polygon([at(-0.23, sill), at(-0.23, top), at(cabin - 0.08, top), at(cabin - 0.08, sill)], 0.8 * GLASS)
    canvas.polygon([at(-0.46, 0), at(-0.5, high), at(0.5, high + 0.08), at(0.34, 0)], paint, thing)
    if stripe:
        low, top = 0.64 * high, 0.86 * high
        canvas.polygon([at(-0.485, low), at(-0.495, top), at(0.46, top), at(0.43, low)], deck)
    canvas.polygon([at(-0.46, 0), at(-0.465, 0.16 * high), at(0.36, 0.16 * high), at(0.34, 0)], 0.6 * paint)


# ---------------------------------------------------------------------------------------------------- the whole scene


class Scene:
    """One scene; the methods draw it in the order in which they stand here.

    Every part has its own stream of random numbers, so that a knob changes its own part and disturbs no other.
    """

    def __init__(self, *key: int, river: bool | None, poles: int | None, near: bool | None) -> None:
        plan, self.ground, self.town, self.life, self.fleet, self.posts, self.front, self.weather = (
            Dice(*key, part) for part in range(8)
        )
        self.canvas = Canvas(self.weather)
        self.light, self.zenith, self.haze, self.shadow = self.weather.pick(LIGHTS)
        self.horizon, self.vanish = plan.between(33, 44), plan.between(36, 92)  # row; column where avenues end
        self.below = HEIGHT - self.horizon  # rows of ground
        self.avenue, self.dense = plan.chance(0.55), plan.chance(0.6)  # the road goes into depth; houses line it
        wet, self.along, self.side = plan.chance(0.66), plan.chance(0.5), plan.pick((-1, 1))
        self.wet = wet if river is None else river
        self.along = self.along and self.avenue  # the river runs beside the road, on this side; otherwise it crosses
        self.lane, self.kerb, self.off = plan.between(0.45, 0.8), plan.between(0.12, 0.3), plan.between(-0.3, 0.3)
        self.sky()
        self.skyline()
        self.surfaces()
        self.streets()
        self.things(poles, near)
        self.camera()

    def sky(self) -> None:
        canvas, dice = self.canvas, self.weather
        up = np.maximum(1 - canvas.Y / self.horizon, 0)
        haze = self.haze * dice.between(0.9, 1.1)
        whole = np.s_[0:HEIGHT, 0:WIDTH]
        canvas.paint(whole, np.ones_like(canvas.drift), haze + (self.zenith - haze) * up, canvas.thing(SKY))
        for _ in range(dice.count(0, 4)):
            x, y, size = dice.between(0, WIDTH), dice.between(2, 0.6 * self.horizon), dice.between(6, 16)
            for shift, share in ((-0.7, 0.6), (0.6, 0.7), (0.0, 1.0)):
                rx, ry = share * size, 0.3 * share * size
                canvas.ellipse(x + shift * size, y - 1.5 * share, rx, ry, WHITE, opacity=0.5)

    def skyline(self) -> None:
        """Far trees and a row of houses, where the ground ends."""
        canvas, dice = self.canvas, self.town
        if dice.chance(0.7):
            leaf, thing = 0.8 * dice.colour(LEAVES) + 0.2 * self.haze, canvas.thing(TREE, large=True)
            for _ in range(dice.count(3, 8)):
                x, rx, ry = dice.between(0, WIDTH), dice.between(8, 22), dice.between(4, 11)
                canvas.ellipse(x, self.horizon + 2, rx, ry, leaf, thing, leafy=True)
        x = dice.between(-12, 10)
        while x < WIDTH:
            d, width, height = dice.between(4.0, 6.5), dice.between(1.8, 4.5), dice.between(1.4, 4.6)
            if dice.chance(0.75):
                draw_house(canvas, dice, x, self.horizon + d, d, width=width, height=height)
            x += width * d + dice.between(0, 7)

    def surfaces(self) -> None:
        """Grass, the river over it, the road over both. `road`, `path`, `river`: pixels inside their edge."""
        canvas, dice = self.canvas, self.ground
        box = np.s_[int(self.horizon + 4) : HEIGHT, 0:WIDTH]
        d = canvas.Y[box[0]] - self.horizon
        drift, grain = canvas.drift[box], canvas.grain[box]
        self.grass, self.water, self.road, self.path = (canvas.thing(label) for label in (GRASS, WATER, ROAD, ROAD))
        green = dice.colour(GREENS) * (1 + 0.1 * canvas.mottle[box] + 0.07 * grain)
        canvas.paint(box, np.ones_like(drift), green, self.grass)

        if self.avenue:
            lateral = (canvas.X - self.vanish) / d - self.off  # units to the right of the road's middle
            road = (self.lane - np.abs(lateral)) * d
            path = road + self.kerb * d
            dashes = band(FOCAL / 2.4 / d, 0.2, 0.6, 8) * cover((0.035 - np.abs(lateral)) * d)
        else:
            first, ratio = dice.between(8, 0.45 * self.below), dice.between(1.6, 2.4)
            middle, half = first * (1 + ratio) / 2, first * (ratio - 1) / 2
            road = half - np.abs(d - middle) + 0 * drift
            path = road + 0.4 * self.kerb * first
            dashes = band(canvas.X / (0.9 * middle), 0.2, 0.6, 0.9 * middle) * cover(road - half + 0.03 * middle)

        tint, calm, sway = dice.colour(WATERS), dice.between(0.3, 0.6), dice.between(0.5, 3.0)
        if self.along:
            edge = lateral * self.side - (self.lane + self.kerb + dice.between(0.2, 0.7))
            river = np.minimum(edge, dice.between(2.2, 6.0) - edge) * d + drift
        else:
            if self.avenue:  # below a bridge
                start = dice.between(8, 0.35 * self.below)
                end = start * dice.between(1.7, 2.6)
            elif dice.chance(0.5):  # behind the road
                start, end = 4.5, max((1 - self.kerb) * first - dice.between(0.5, 2.5), 8)
            else:  # before it
                start, end = (ratio + self.kerb) * first + dice.between(1, 5), 2 * self.below
            river = np.minimum(d - start, end - d) + sway * drift
        if self.wet:
            mirror = np.clip(2 * self.horizon + 3 - canvas.Y[box[0], 0], 0, self.horizon).astype(np.intp)
            reflected = tint + calm * (canvas.image[:, mirror] - tint)
            canvas.paint(box, 0.6 * cover(0.7 * river + 0.7), EARTH)  # a bank, part of the grass
            canvas.paint(box, cover(river), reflected * (1 + 0.1 * canvas.ripple[box] + 0.03 * grain), self.water)

        stone = dice.colour(STONES) * (1 + 0.05 * (grain + drift))
        canvas.paint(box, cover(path), 1.22 * stone, self.path)
        canvas.paint(box, cover(road), stone, self.road)
        canvas.paint(box, dashes * cover(road) * np.minimum(0.08 * d, 0.8), WHITE)

    def streets(self) -> None:
        """The houses that line an avenue, on upright planes beside it."""
        for side in (-1, 1):
            reach = self.lane + self.kerb + side * self.off + self.town.between(0.02, 0.5)
            close = self.town.between(40, 90)
            if self.avenue and self.dense and not (self.wet and self.along and side == self.side):
                self.street(side, reach, 6.5, close)

    def street(self, side: int, reach: float, far: float, close: float) -> None:
        """Fronts `reach` units beside the vanishing point, between the rows `far` and `close` below the horizon."""
        canvas, dice = self.canvas, self.town
        limits = self.vanish + side * reach * far, self.vanish + side * reach * close
        if not (box := canvas.box(min(limits), 0, max(limits), HEIGHT)):
            return
        d = np.clip((canvas.X[box[1]] - self.vanish) * (side / reach), far, close)  # of the foot of the wall
        distance = FOCAL / d
        house = ((distance - FOCAL / close) / 3.2).astype(np.intp)  # every house is 3.2 units long
        houses = range(int(house.max()) + 1)
        height = np.array([dice.between(2.2, 4.4) for _ in houses], np.float32)[house]
        colour = np.concatenate([dice.colour(PAINTS, 0.15) for _ in houses], axis=2)[..., house]
        up = (self.horizon + d - canvas.Y[box[0]]) / d  # height above the ground, in units
        wall = cover(np.minimum(up, height - up) * d)
        shade = (0.85 if side < 0 else 1.0) * (1 + 0.04 * canvas.grain[box])
        canvas.paint(box, wall, colour * shade, canvas.thing(BUILDING, large=True))
        pane = d * d * (reach * 0.8 / FOCAL)  # its width in pixels: far windows are too narrow to see
        windows = (
            band(distance / 0.8, 0.25, 0.75, pane) * band(up / 0.95, 0.35, 0.8, 0.95 * d) * np.minimum(pane / 3, 1)
        )
        canvas.paint(box, windows * ((up > 0.2) & (height - up > 0.25)), GLASS)
        canvas.paint(box, 0.5 * np.maximum(1 - 8 * (height - up), 0) * (height > up), DARK)  # the cornice

    def things(self, poles: int | None, near: bool | None) -> None:
        """Find a place for everything that stands on the ground, then draw it far to near."""
        canvas, life, fleet, posts, front = self.canvas, self.life, self.fleet, self.posts, self.front
        below = self.below
        grass, water, road, path = self.grass, self.water, self.road, self.path
        floor = canvas.things.copy()
        standing: list[tuple[float, float, float, Callable]] = []  # row below the horizon, x, shadow in units, drawing

        def put(draw, dice, count, depths, where, clear=0.0, shadow=0.6) -> None:
            """Stand `count` things on the surfaces `where`, `clear` units of them on both sides; up to 5 tries each."""
            for _ in range(5 * count):
                d, u = dice.depth(*depths), dice.random()
                row = floor[min(int(self.horizon + d), HEIGHT - 1)]
                free = np.logical_or.reduce([row == surface for surface in where])
                if step := int(clear * d):
                    free[step:-step] &= free[: -2 * step] & free[2 * step :]
                columns = np.flatnonzero(free)
                if len(columns):
                    x = float(columns[int(u * len(columns))]) + 0.5
                    standing.append((d, x, shadow, partial(draw, canvas, dice)))
                    count -= 1
                if count == 0:
                    return

        put(draw_tree, life, life.count(2, 7), (5, below), [grass])
        put(draw_person, life, life.count(3, 8), (6, below), [grass, path, road], shadow=0.15)
        put(partial(draw_car, front=self.avenue), life, life.count(1, 3), (7, below), [road], clear=0.2)
        put(partial(draw_hull, label=CAR), fleet, fleet.count(0, 2), (7, below), [road], clear=0.3)
        put(partial(draw_hull, label=BOAT), fleet, fleet.count(1, 3), (7, below), [water], clear=0.3)
        count = posts.count(3, 7)
        put(draw_pole, posts, count if poles is None else poles, (6, 0.9 * below), [grass, path], shadow=0)
        large = front.chance(0.3)
        if large if near is None else near:
            if front.chance(0.5):
                draw, d = partial(draw_house, width=2.0, height=3.0), 1.1 * below
                x = front.pick((front.between(-80, -50), front.between(70, 100)))
            else:
                draw, d = partial(draw_car, front=False), front.between(1.05, 1.35) * below
                x = front.between(10, WIDTH - 10)
            standing.append((d, x, 0, partial(draw, canvas, front)))

        for d, x, shadow, draw in sorted(standing, key=lambda thing: thing[0]):
            y = self.horizon + d
            if shadow * d > 2:
                canvas.ellipse(x + 0.15 * d, y, shadow * d, max(0.08 * d, 0.6), DARK, opacity=self.shadow)
            draw(x, y, d)

    def camera(self) -> None:
        """The light, a slightly soft lens and the noise of the sensor."""
        dice, image = self.weather, self.canvas.image
        image *= self.light * dice.between(0.85, 1.08) * (1 + 0.08 * self.canvas.drift)
        for inner, before, after in (
            (np.s_[:, 1:-1], np.s_[:, :-2], np.s_[:, 2:]),
            (np.s_[..., 1:-1], np.s_[..., :-2], np.s_[..., 2:]),
        ):
            image[inner] = 0.76 * image[inner] + 0.12 * (image[before] + image[after])
        image += dice.between(0.02, 0.05) * (dice.random(image.shape, dtype=np.float32) - 0.5)


class Toytown:
    """Procedural scenes, 96 x 128, 11 classes.

    Item: image float32 (3, 96, 128) in [0, 1] and target long (96, 128); 255 = void, on thin rims of large things.
    `split` is train (800 scenes), val (200) or test (200); `size` asks for another number of them. The same split,
    index and seed always give the same scene. A scene that was drawn stays in memory (61 kB).

    Knobs, where None leaves it to the scene: `river`, with or without; `poles`, how many; `near`, a very large house or
    vehicle in front, with or without. `poles` and `near` leave the rest of the scene as it was.

    Raises ValueError for an unknown split or a negative size, IndexError for an index outside the set.
    """

    classes = list(PALETTE)
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.uint8)

    def __init__(
        self,
        split: str,
        size: int | None = None,
        seed: int = 0,
        *,
        river: bool | None = None,
        poles: int | None = None,
        near: bool | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.stream, usual = SPLITS[split]
        self.size = usual if size is None else size
        if self.size < 0 or seed < 0:
            raise ValueError(f"size and seed must not be negative, got size={self.size}, seed={seed}")
        self.split, self.seed = split, seed
        self.knobs = {"river": river, "poles": poles, "near": near}
        self.drawn: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target, _ = self.scene(index)
        return torch.from_numpy(image).float() / 255, torch.from_numpy(target).long()

    def hulls(self, index: int) -> Tensor:
        """(96, 128) bool: pixels of the vehicle that is drawn the same as car on the road and as boat on water."""
        return torch.from_numpy(self.scene(index)[2].copy())

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (3, 96, 128) uint8, target (96, 128) uint8, hulls (96, 128) bool; not to be written to."""
        if not -self.size <= index < self.size:
            raise IndexError(f"scene {index} of a set of {self.size}")
        index %= self.size
        if index not in self.drawn:
            canvas = Scene(self.seed, self.stream, index, **self.knobs).canvas
            image = (np.clip(canvas.image, 0, 1) * 255 + 0.5).astype(np.uint8)
            self.drawn[index] = (image, *canvas.labels())
        return self.drawn[index]

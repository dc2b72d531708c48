"""CIFAR-10 as tensors on the device: loading, epoch order, augmentation.

    python data.py      # fetch and check CIFAR-10, draw Figure 1 before and after augmentation

The whole data set lives on the device as bytes, and a batch is made there by a few tensor lines.
All of an epoch's randomness is one table, drawn from (seed, epoch) alone: iteration t sees the same
batch on every device, and a resumed run needs no generator's state.
"""

import argparse
import difflib
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PADDING = 4  # zeros on every side before the random crop


class DataError(Exception):
    """The data set is not there, cannot be fetched, or is damaged; the message says what to do."""


class Split(NamedTuple):
    """images: uint8 [n, 3, 32, 32], stored channels last; labels: int64 [n] in 0..9"""

    images: Tensor
    labels: Tensor


def load(where: str, device: torch.device) -> tuple[Split, Split]:
    """Training and test split, on `device`.

    `where` is the folder that holds, or will hold, `cifar-10-batches-py`, or the word `synthetic`.
    Raises DataError.
    """
    splits = synthetic() if where == "synthetic" else cifar10(Path(where))
    return tuple(
        Split(images.to(device, memory_format=torch.channels_last), labels.to(device))
        for images, labels in splits
    )


def cifar10(root: Path) -> list[Split]:
    """The 50,000 training and 10,000 test images, checked, and fetched first if not there."""
    from torchvision.datasets import CIFAR10  # 1.5 s that synthetic data need not wait for

    folder = root / CIFAR10.base_folder
    if root.name == folder.name:
        raise DataError(f"--data is the folder that holds {root.name}: use --data {root.parent}")
    if not root.exists() and difflib.get_close_matches(root.name, ["synthetic"]):
        raise DataError(f"there is no folder {root}; did you mean --data synthetic?")
    problem = f"no CIFAR-10 in {root}, and the download failed: unpack {CIFAR10.url} there"
    try:
        if not folder.exists():
            # By way of a folder of its own, so that the data are there whole or not at all.
            place = root if root.exists() else root.parent
            with tempfile.TemporaryDirectory(prefix="cifar-10-download-", dir=place) as new:
                CIFAR10(new, download=True)
                root.mkdir(exist_ok=True)
                os.replace(Path(new, folder.name), folder)
        problem = f"cannot read {folder}: delete it and start again to fetch it anew"
        sets = [CIFAR10(str(root), train) for train in (True, False)]
    except Exception as error:  # whatever a network, an archive or a file system may raise
        reason = error if isinstance(error, OSError) else "its checksums are wrong"
        raise DataError(f"{problem}, or try --data synthetic ({reason})") from error
    return [
        Split(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets
    ]


def synthetic() -> list[Split]:
    """1,000 training and 200 test images of ten learnable classes: a coarse pattern and noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    splits = []
    for n in (1000, 200):
        labels = torch.arange(n) % 10
        clean = F.interpolate(patterns[labels], size=32, mode="bilinear")
        noise = torch.randn(n, 3, 32, 32, generator=generator)
        images = (255 * (clean + 0.2 * noise)).clamp(0, 255).to(torch.uint8)
        splits.append(Split(images, labels))
    return splits


def crop_windows(images: Tensor) -> Tensor:
    """Every 32x32 crop of the zero-padded images, as a view: uint8 [n, 9, 9, 3, 32, 32]."""
    padded = F.pad(images, [PADDING] * 4).contiguous(memory_format=torch.channels_last)
    return padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)


def epoch_plan(split: Split, seed: int, epoch: int) -> Tensor:
    """All of an epoch's randomness: int64 [4, n] on the split's device, a column for each image.

    Rows: which image, its crop's top and left in 0..8, and 1 where it is flipped.
    """
    n, device = len(split.labels), split.labels.device
    # A hash, as the generator takes 32 bits of its seed: (seed << 32) + epoch would be the epoch.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    flips = torch.randint(2, (1, n), generator=generator)
    plan = torch.cat([order[None], offsets, flips])
    if device.type == "cuda":
        return plan.pin_memory().to(device, non_blocking=True)  # waits for nothing
    return plan.to(device)


def scale(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1, to the bit what torchvision's ToTensor gives."""
    # CUDA divides by a number through its reciprocal, one bit off; by a tensor it divides.
    return images.float() / torch.full((), 255.0, device=images.device)


def augment(windows: Tensor, plan: Tensor) -> Tensor:
    """A batch, cropped, flipped and scaled: float32 [b, 3, 32, 32], stored channels last.

    `windows` is what crop_windows gives, `plan` some columns of epoch_plan's, int64 [4, b].
    """
    index, top, left, flip = plan
    images = windows[index, top, left]
    images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
    return scale(images)


def main() -> None:
    """Figure 1: training images, a column a class in label order, and the same augmented."""
    from torchvision.utils import make_grid, save_image

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"data.py: {message} (--help)\n")
    parser.add_argument("--data", default="./data", help="folder of CIFAR-10, or `synthetic`")
    parser.add_argument("--out", default="figure1.png", help="the picture to write")
    args = parser.parse_args()
    try:
        train, _ = load(args.data, torch.device("cpu"))
        columns = [(train.labels == label).nonzero()[:4, 0] for label in range(10)]
        plan = epoch_plan(train, seed=0, epoch=0)[:, :40]
        plan[0] = torch.stack(columns, dim=1).flatten()  # in label order instead of a random one
        before, after = scale(train.images[plan[0]]), augment(crop_windows(train.images), plan)
        grid = torch.cat([make_grid(half, nrow=10, pad_value=1) for half in (before, after)], dim=1)
        save_image(F.interpolate(grid[None], scale_factor=2), args.out)
    except (DataError, OSError, ValueError) as error:  # ValueError: --out has no picture's ending
        sys.exit(f"data.py: {error}")
    print(f"{args.out}: {', '.join(CLASSES)}; four images of each, below them the same augmented")


if __name__ == "__main__":
    main()

"""CIFAR-10 as tensors on the device: loading, epoch order, augmentation.

    python data.py

fetches and checks CIFAR-10, and draws Figure 1 before and after augmentation.

The whole data set lives on the device as bytes, and a batch is made there by a few tensor lines.
All of an epoch's randomness is one table, drawn from (seed, epoch) alone: iteration t sees the same
batch on every device, and a resumed run needs no generator's state.
"""

import argparse
import itertools
import math
import os
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
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
    """images: uint8 [n, 3, 32, 32]; labels: int64 [n] in 0..9"""

    images: Tensor
    labels: Tensor


def load(where: str, device: torch.device) -> tuple[Split, Split]:
    """Training and test split, on `device`.

    `where` is the folder that holds, or will hold, `cifar-10-batches-py`, or the word `synthetic`.
    Raises DataError.
    """
    splits = synthetic() if where == "synthetic" else cifar10(Path(where))
    return tuple(Split(images.to(device), labels.to(device)) for images, labels in splits)


def cifar10(root: Path) -> list[Split]:
    """The 50,000 training and 10,000 test images, checked, and fetched first if not there."""
    from torchvision.datasets import CIFAR10  # 1.5 s that synthetic data need not wait for
    from torchvision.datasets.utils import check_integrity

    class Batches(CIFAR10):
        base_folder = ""  # the files lie in the folder that it is given

    unpacked = root / CIFAR10.base_folder
    # The files may lie loose in `root`, or one folder deeper, where some unpackers put them.
    places = (unpacked, unpacked / CIFAR10.base_folder, root)
    try:
        folder = next((place for place in places if (place / "data_batch_1").exists()), unpacked)
        if not folder.exists():
            fetch(root)
        os.listdir(folder)  # a folder that may not be read would pass for an empty one
        sets = [Batches(str(folder), train) for train in (True, False)]
    except OSError as error:
        raise DataError(f"cannot read or write CIFAR-10: {error}") from error
    except RuntimeError as error:  # torchvision does not say which files
        meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
        files = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
        bad = ", ".join(name for name, md5 in files if not check_integrity(folder / name, md5))
        raise DataError(f"missing or damaged in {folder}: {bad}; put the original there") from error
    return [
        Split(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets
    ]


def fetch(root: Path) -> None:
    """Unpack the official archive in `root`, all or nothing; download it if it is not there."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_and_extract_archive

    parent = next(folder for folder in (root, *root.parents) if folder.exists())
    with tempfile.TemporaryDirectory(prefix="cifar-10-download-", dir=parent) as new:
        archive = root / CIFAR10.filename
        try:
            folder = root if archive.exists() else new
            download_and_extract_archive(CIFAR10.url, folder, new, md5=CIFAR10.tgz_md5)
        except Exception as error:  # whatever a network or an archive may raise
            raise DataError(
                f"no undamaged CIFAR-10 in {root}, and it cannot be fetched or unpacked ({error}): "
                f"put the original of {CIFAR10.url} there, or try --data synthetic"
            ) from error
        root.mkdir(parents=True, exist_ok=True)
        if not (root / CIFAR10.base_folder).exists():  # another process may have been faster
            os.replace(Path(new, CIFAR10.base_folder), root / CIFAR10.base_folder)


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


def epoch_plan(split: Split, seed: int, epoch: int) -> Tensor:
    """All of an epoch's randomness: int64 [4, n] on the split's device, a column for each image.

    Rows: which image, its crop's top and left in 0..8, and 1 where it is flipped.
    """
    n, device = len(split.labels), split.labels.device
    # A hash, as the generator keeps 32 bits of its seed: of (seed << 32) + epoch, only the epoch.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    flips = torch.randint(2, (1, n), generator=generator)
    plan = torch.cat([order[None], offsets, flips])
    if device.type == "cuda":
        return plan.pin_memory().to(device, non_blocking=True)  # waits for nothing
    return plan.to(device)


def plans(split: Split, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """The plans of iterations start, start + 1, ...: int64 [4, b].

    An epoch's last batch may be short. Iteration t has the same batch wherever a run starts.
    """
    per_epoch = math.ceil(len(split.labels) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        batches = epoch_plan(split, seed, epoch).split(batch_size, dim=1)
        yield from batches[max(0, start - epoch * per_epoch) :]


def layout(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory: channels last where that is known to be faster."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def scale(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1, to the bit what torchvision's ToTensor gives."""
    images = images.to(torch.float32, memory_format=layout(images.device))
    # CUDA divides by a number through its reciprocal, one bit off; by a tensor it divides.
    return images / torch.full((), 255.0, device=images.device)


def pad(images: Tensor) -> Tensor:
    """Zeros around each image, and its channels last: uint8 [n, 3, 32, 32] -> [n, 40, 40, 3]"""
    return F.pad(images, [PADDING] * 4).permute(0, 2, 3, 1).contiguous()


def augment(padded: Tensor, plan: Tensor) -> Tensor:
    """A batch, cropped, flipped and scaled: float32 [b, 3, 32, 32].

    `padded` is what pad gives, `plan` some columns of epoch_plan's, int64 [4, b].
    """
    index, top, left, flip = plan[:, :, None]  # each [b, 1]
    pixels = torch.arange(32, device=plan.device)
    rows = top + pixels  # [b, 32]
    columns = left + torch.where(flip == 1, 31 - pixels, pixels)  # a flip reads them backwards
    images = padded[index[:, :, None], rows[:, :, None], columns[:, None, :]]  # [b, 32, 32, 3]
    return scale(images.permute(0, 3, 1, 2))


def main() -> None:
    """Figure 1: training images, a column a class in label order, and the same augmented."""
    from torchvision.utils import make_grid, save_image

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"data.py: {message} (--help)\n")
    add, home = parser.add_argument, os.path.expanduser
    add("--data", type=home, default="./data", help="folder of CIFAR-10, or `synthetic`")
    add("--out", type=home, default="figure1.png", help="the picture to write")
    args = parser.parse_args()
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # `| head` may end it
    try:
        train, _ = load(args.data, torch.device("cpu"))
        columns = [(train.labels == label).nonzero()[:4, 0] for label in range(10)]
        plan = epoch_plan(train, seed=0, epoch=0)[:, :40]
        plan[0] = torch.stack(columns, dim=1).flatten()  # in label order instead of a random one
        before, after = scale(train.images[plan[0]]), augment(pad(train.images), plan)
        grid = torch.cat([make_grid(half, nrow=10, pad_value=1) for half in (before, after)], dim=1)
        save_image(F.interpolate(grid[None], scale_factor=2), args.out)
    except (DataError, OSError, ValueError) as error:  # ValueError: --out has no picture's ending
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped")
    print(f"{args.out}: {', '.join(CLASSES)}; four images of each, below them the same augmented")


if __name__ == "__main__":
    main()

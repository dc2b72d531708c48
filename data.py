"""CIFAR-10 as tensors on the device: loading, epoch plans, augmentation.

    python data.py

fetches CIFAR-10 and draws the report's Figure 1, before and after augmentation.

The whole data set lives on the device as bytes, and a batch is made there by a few tensor lines.
All of an epoch's randomness is one table, its plan, drawn from (seed, epoch) alone: iteration t has
the same batch on every device, and a run that continues needs no generator's state.
"""

import argparse
import itertools
import math
import socket
import sys
import zlib
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PADDING = 4  # zeros on every side before the random crop


class Split(NamedTuple):
    """images: uint8 [n, 3, 32, 32]; labels: int64 [n] in 0..9"""

    images: Tensor
    labels: Tensor


def load(source: str, device: torch.device) -> tuple[Split, Split]:
    """Training and test split, on `device`; OSError, in one line, if they cannot be had.

    `source` is the folder that holds, or will hold, CIFAR-10, or the word `synthetic`.
    """
    splits = synthetic() if source == "synthetic" else cifar10(source)
    return tuple(Split(images.to(device), labels.to(device)) for images, labels in splits)


def cifar10(folder: str) -> list[Split]:
    """The 50,000 training and 10,000 test images, checked, and downloaded if they are not there."""
    try:
        from torchvision.datasets import CIFAR10  # takes a second, which synthetic images save
    except Exception as error:  # one for another release of torch may raise anything
        found = " ".join(d.version for d in metadata.distributions(name="torchvision")) or "none"
        raise OSError(f"torchvision {found} with torch {torch.__version__}: {error}") from error
    socket.setdefaulttimeout(60)  # seconds without a byte; a silent proxy would hang for ever
    try:
        sets = [CIFAR10(folder, train, download=True) for train in (True, False)]
    except Exception as error:  # a network, an archive or a damaged file may raise anything
        raise OSError(
            f"no undamaged CIFAR-10 in {folder}, and no download ({error}): put {CIFAR10.url}, "
            f"MD5 {CIFAR10.tgz_md5}, there, packed or unpacked, or try --data synthetic"
        ) from error
    return [Split(torch.tensor(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets]


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
    # A hash of both: with their sum, seeds would share batches. A generator uses 32 bits of it.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    flips = torch.randint(2, (1, n), generator=generator)
    plan = torch.cat([order[None], offsets, flips])
    if device.type == "cuda":
        return plan.pin_memory().to(device, non_blocking=True)  # asynchronous
    return plan.to(device)


def plans(split: Split, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """The plans of iterations start, start + 1, ...: int64 [4, b], b columns of an epoch's plan.

    An epoch's last batch may be short. Iteration t has the same plan wherever a run starts.
    """
    first_epoch, skip = divmod(start, math.ceil(len(split.labels) / batch_size))
    for epoch in itertools.count(first_epoch):
        yield from epoch_plan(split, seed, epoch).split(batch_size, dim=1)[skip:]
        skip = 0


def layout(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory: channels last is faster, but not right on every MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def scale(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in 0..1; on a CPU, to the bit as torchvision's ToTensor."""
    return images.to(torch.float32, memory_format=layout(images.device)) / 255


def pad(images: Tensor) -> Tensor:
    """Zeros around each image, and its channels last: uint8 [n, 3, 32, 32] -> [n, 40, 40, 3]"""
    return F.pad(images, [PADDING] * 4).permute(0, 2, 3, 1).contiguous()


def augment(padded: Tensor, plan: Tensor) -> Tensor:
    """The batch of a plan, int64 [4, b], cropped, flipped and scaled: float32 [b, 3, 32, 32].

    `padded` is what pad gives.
    """
    index, top, left, flip = plan[:, :, None]  # each [b, 1]
    pixels = torch.arange(32, device=plan.device)
    rows = top + pixels  # [b, 32]
    columns = left + torch.where(flip == 1, 31 - pixels, pixels)  # a flip reads them backwards
    images = padded[index[:, :, None], rows[:, :, None], columns[:, None, :]]  # [b, 32, 32, 3]
    return scale(images.permute(0, 3, 1, 2))


def main() -> None:
    """Draw Figure 1: four training images of each class, and below them the same augmented."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", default="./data", help="folder of CIFAR-10, or `synthetic`")
    train, _ = load(parser.parse_args().data, torch.device("cpu"))
    from torchvision.utils import make_grid, save_image

    plan = epoch_plan(train, seed=0, epoch=0)[:, :40]
    columns = [(train.labels == label).nonzero()[:4, 0] for label in range(10)]
    plan[0] = torch.stack(columns, dim=1).flatten()  # a column a class, in place of a random order
    halves = scale(train.images[plan[0]]), augment(pad(train.images), plan)
    grid = torch.cat([make_grid(half, nrow=10, pad_value=1) for half in halves], dim=1)
    save_image(F.interpolate(grid[None], scale_factor=2), "figure1.png")
    print(f"figure1.png: {', '.join(CLASSES)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"data.py: {str(error) or 'stopped'}")

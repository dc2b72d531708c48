"""Time a training step of this code beside the loop that most CIFAR-10 code uses.

    python bench.py                              # a GPU: batches 32 to 256, tf32
    python bench.py --precision bf16             # this code in bf16 beside the same usual loop
    python bench.py --bs 32 --steps 2 --rounds 5 # a CPU

Both train the same network on the same data in one process, turn by turn, and each step makes its
batch, runs forward and backward, updates the weights and keeps the loss. The usual loop is a
DataLoader whose workers run torchvision's transforms, NCHW, eager, loss.item() after every step.
Start-up, compilation and the first batches are left out. A turn is timed from synchronisation to
synchronisation; given are the median over turns and half the distance between their quartiles.
"""

import argparse
import csv
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import data
import train
from model import ResNet


class Pictures(Dataset):
    """A split as torchvision's data sets hold it: pictures, transformed one by one."""

    def __init__(self, split: data.Split):
        self.images = split.images.permute(0, 2, 3, 1).cpu().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def usual_step(split: data.Split, config: dict, device: torch.device, workers: int):
    """A function that trains one iteration the usual way."""
    model = ResNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), config["lr0"], momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        Pictures(split), config["bs"], shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        images, labels = next(batches)
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_step(split: data.Split, config: dict, device: torch.device, how: str):
    """A function that trains one iteration as train.py does: plain, recorded or compiled."""
    model, optimizer = train.build(config, device)
    loss_sum = torch.zeros((), device=device)
    step = train.make_step(config, model, optimizer, split, loss_sum, how)
    full = len(split.labels) // config["bs"] * config["bs"]
    epochs = (data.epoch_plan(split, 0, epoch)[:, :full] for epoch in itertools.count())
    batches = itertools.chain.from_iterable(plan.split(config["bs"], dim=1) for plan in epochs)
    return lambda: step(next(batches))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_turns(steps: dict, device: torch.device, rounds: int, count: int) -> dict:
    """Seconds a step, for each function in `steps`, in each of `rounds` turns of `count` steps."""
    seconds = {name: [] for name in steps}
    for turn in range(-1, rounds):  # the first turn warms up
        for name, step in steps.items():
            for _ in range(5 if turn < 0 else 0):
                step()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def flop_per_image() -> float:
    """Floating-point operations of one image's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        ResNet()(torch.rand(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


def start(name: str, step, device: torch.device) -> bool:
    """Run what is no replay yet: three plain iterations and the recording; whether they worked."""
    began = time.perf_counter()
    try:
        for _ in range(4):
            step()
    except train.RecordingFailed as error:
        print(f"bench.py: without {name} ({error})", file=sys.stderr)
        return False
    synchronize(device)
    print(f"{name}: {time.perf_counter() - began:.1f} s to start", file=sys.stderr)
    return True


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help)\n")
    workers = min(8, os.cpu_count())
    parser.add_argument("--bs", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--steps", type=int, default=50, help="steps in a turn (50)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (10)")
    parser.add_argument("--workers", type=int, default=workers, help="of the DataLoader (up to 8)")
    parser.add_argument("--csv", type=Path, help="file to write the figures to as well")
    parser.add_argument("--data", default="./data", help="folder with CIFAR-10, or `synthetic`")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="the first one found")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="tf32")
    args = parser.parse_args()
    if min(*args.bs, args.steps, args.rounds, args.workers + 1) < 1:
        parser.error("--bs, --steps and --rounds must be 1 or more, --workers 0 or more")
    return args


def main() -> None:
    args = parse_args()
    device = train.open_device(args.device, args.precision)
    ways = ("plain", "recorded", "compiled") if device.type == "cuda" else ("plain",)
    try:
        split, _ = data.load(args.data, device)
    except data.DataError as error:
        sys.exit(f"bench.py: {error}")
    if max(args.bs) > len(split.labels):
        sys.exit(f"bench.py: {len(split.labels):,} images are too few for --bs {max(args.bs)}")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    flop = flop_per_image()
    print(f"{machine}, torch {torch.__version__}, {args.precision}, {args.workers} workers")
    print("\n| batch | code | ms a step | images/s | TFLOP/s | ratio |\n|--:|---|--:|--:|--:|--:|")
    rows = []
    for bs in args.bs:
        config = train.settings(train.parse_args(["--bs", str(bs), "--precision", args.precision]))
        steps = {"usual loop": usual_step(split, config, device, args.workers)}
        for way in ways:
            name = "this code" if way == "plain" else f"this code, {way}"
            step = our_step(split, config, device, way)
            if start(f"batch {bs}, {name}", step, device):
                steps[name] = step
        turns = time_turns(steps, device, args.rounds, args.steps)
        medians = {name: statistics.median(turn) for name, turn in turns.items()}
        for name, seconds in medians.items():
            low, _, high = statistics.quantiles(turns[name] * 2, n=4)  # * 2: one turn has none
            ms, spread = f"{1e3 * seconds:.3f}", f"{1e3 * (high - low) / 2:.3f}"
            rate, ratio = f"{bs / seconds:.0f}", f"{medians['usual loop'] / seconds:.2f}"
            tflops = f"{bs / seconds * flop / 1e12:.2f}"
            print(f"| {bs} | {name} | {ms} ± {spread} | {rate} | {tflops} | {ratio} |", flush=True)
            setting = [machine, torch.__version__, args.precision, bs, args.rounds, args.steps]
            rows.append([*setting, name, ms, spread, rate, tflops, ratio])
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        header = "device torch precision bs rounds steps code ms spread images_per_s tflops ratio"
        with open(args.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header.split(), *rows])


if __name__ == "__main__":
    main()

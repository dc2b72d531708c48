"""Time a training step of this code beside the loop that most CIFAR-10 code uses.

    python bench.py
    python bench.py --precision bf16 --compile
    python bench.py --bs 32 --steps 2 --rounds 5

The first is for a GPU: batches 32 to 256, tf32. The second times this code in bf16 beside the same
usual loop, and with the network compiled as well. The third takes a few minutes on a CPU.

Both loops train the same network on the same data in one process, turn by turn, and each step makes
its batch, runs forward and backward, updates the weights and keeps the loss. The usual loop is a
DataLoader whose workers run torchvision's transforms, NCHW, eager, loss.item() after every step.
Start-up, compilation and the first batches are left out; their seconds go to stderr. A turn is
timed from synchronisation to synchronisation. The table gives the median over turns ± half the
distance between their quartiles.
"""

import argparse
import csv
import itertools
import os
import signal
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


def usual_step(split: data.Split, bs: int, device: torch.device, workers: int):
    """A function that trains one iteration the usual way."""
    model = ResNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        Pictures(split), bs, shuffle=True, drop_last=True, num_workers=workers,
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


def our_step(split: data.Split, flags: list[str], device: torch.device):
    """A function that trains one iteration as train.py does with these flags."""
    args = train.parse_args(flags)
    model = ResNet().to(device, memory_format=data.layout(device))
    train_batch = train.make_train_batch(args, model, train.make_optimizer(args, model), split)
    plans = data.plans(split, args.bs, args.seed)
    full = (plan for plan in plans if plan.shape[1] == args.bs)  # no epoch's short last batch
    loss_sum = torch.zeros((), device=device)
    return lambda: loss_sum.add_(train_batch(next(full)))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_turns(steps: dict, device: torch.device, rounds: int, count: int) -> dict:
    """Seconds a step, for each function in `steps`, in each of `rounds` turns of `count` steps."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def flop_per_image() -> float:
    """Floating-point operations of one image's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        ResNet()(torch.rand(2, 3, 32, 32)).sum().backward()
    return counter.get_total_flops() / 2


def start(name: str, step, device: torch.device) -> None:
    """Run a function's first five steps: three plain iterations, a recording, a replay."""
    began = time.perf_counter()
    for _ in range(5):
        step()
    synchronize(device)
    print(f"{name}: {time.perf_counter() - began:.1f} s to start", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help)\n")
    workers = min(8, os.cpu_count())
    add, home = parser.add_argument, os.path.expanduser
    add("--bs", type=int, nargs="+", default=[32, 64, 128, 256], help="batch sizes (all four)")
    add("--steps", type=int, default=50, help="steps in a turn (50)")
    add("--rounds", type=int, default=10, help="turns of each (10)")
    add("--workers", type=int, default=workers, help="of the DataLoader (up to 8)")
    add("--compile", action="store_true", help="time the compiled network, too")
    add("--csv", type=home, help="file to write the figures to as well")
    add("--data", type=home, default="./data", help="folder with CIFAR-10, or `synthetic`")
    add("--device", choices=("cuda", "mps", "cpu"), help="the first one found")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
        help="of this code; the usual loop has no bf16 (tf32)")  # fmt: skip
    args = parser.parse_args()
    if min(*args.bs, args.steps, args.rounds - 1, args.workers + 1) < 1:
        parser.error("--bs and --steps must be 1 or more, --rounds 2, --workers 0")
    return args


def measure(args: argparse.Namespace, split: data.Split, device: torch.device, writer) -> None:
    """Print a row of a Markdown table for each batch size and code; the csv writer gets it, too."""
    ways = {"this code": ["--no-graph"]}
    if device.type == "cuda":
        ways["this code, recorded"] = []
    if args.compile:
        ways["this code, compiled"] = ["--compile"]
    machine, flop = train.device_name(device), flop_per_image()
    print(f"{machine}, torch {torch.__version__}, {args.precision}, {args.workers} workers")
    print("\n| batch | code | ms a step | images/s | TFLOP/s | ratio |\n|--:|---|--:|--:|--:|--:|")
    for bs in args.bs:
        torch.compiler.reset()  # it compiles a network for eight batch sizes, and no more
        steps = {"usual loop": usual_step(split, bs, device, args.workers)}
        for name, flags in ways.items():
            flags = ["--bs", str(bs), "--precision", args.precision, *flags]
            steps[name] = our_step(split, flags, device)
        for name, step in reversed(steps.items()):  # the usual loop's threads disturb recordings
            start(f"batch {bs}, {name}", step, device)
        turns = time_turns(steps, device, args.rounds, args.steps)
        medians = {name: statistics.median(turn) for name, turn in turns.items()}
        for name, seconds in medians.items():
            low, _, high = statistics.quantiles(turns[name], n=4)
            ms, spread = f"{1e3 * seconds:.3f}", f"{1e3 * (high - low) / 2:.3f}"
            rate, ratio = f"{bs / seconds:.0f}", f"{medians['usual loop'] / seconds:.2f}"
            tflops = f"{bs / seconds * flop / 1e12:.2f}"
            print(f"| {bs} | {name} | {ms} ± {spread} | {rate} | {tflops} | {ratio} |", flush=True)
            usual_bf16 = name == "usual loop" and args.precision == "bf16"
            precision = "tf32" if usual_bf16 else args.precision
            setting = [machine, torch.__version__, precision, bs]
            setting += [args.workers, args.rounds, args.steps, name]
            writer.writerow([*setting, ms, spread, rate, tflops, ratio])


def main() -> None:
    args = parse_args()
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # `| head` may end it
    sys.stdout.reconfigure(encoding="utf-8")  # for the ±
    header = "device torch precision bs workers rounds steps code "
    header += "ms spread images_per_s tflops ratio"
    device = train.open_device(args.device, args.precision)
    try:
        split, _ = data.load(args.data, device)
        if max(args.bs) > len(split.labels):
            raise data.DataError(f"only {len(split.labels):,} images for --bs {max(args.bs)}")
        if args.csv:
            Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv or os.devnull, "w", newline="", buffering=1) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header.split())
            measure(args, split, device, writer)
    except data.DataError as error:
        sys.exit(f"bench.py: {error}")
    except OSError as error:
        sys.exit(f"bench.py: {error.filename or args.csv}: {error.strerror}")


if __name__ == "__main__":
    main()

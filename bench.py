"""Time an iteration of this code beside the loop that most CIFAR-10 code uses.

    python bench.py                                      # for a GPU
    python bench.py --bs 32 --turns 5 --iterations 2     # two minutes on a CPU

The usual loop: torchvision's CIFAR10 and transforms in the workers of a DataLoader, NCHW,
loss.item() after every iteration. The loops take turns in one process; a time is the median of a
loop's turns, start-up left out.
"""

import argparse
import os
import sys
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import CIFAR10

import data
import train
from model import ResNet


def usual_loop(batch_size: int, device: torch.device):
    """Trains one iteration at each `next`, and yields its loss."""
    transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor()])
    images = CIFAR10("./data", transform=transform)
    loading = {"num_workers": min(8, os.cpu_count()), "pin_memory": device.type == "cuda"}
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, **loading)
    model = ResNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    while True:
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def this_code(split: data.Split, batch_size: int, *flags: str):
    """Trains one iteration at each `next`, as train.py does with these flags; yields its loss."""
    args = train.parse_args(["--bs", str(batch_size), *flags])
    _, _, train_plan = train.build(args, split)
    for plan in data.plans(split, batch_size, args.seed):
        if plan.shape[1] == batch_size:  # the usual loop drops an epoch's short last batch, too
            yield train_plan(plan)


def time_turn(loop, iterations: int) -> float:
    """Milliseconds an iteration."""
    began = perf_counter()
    for _ in range(iterations):
        loss = next(loop)
    float(loss)  # waits for the device
    return 1000 * (perf_counter() - began) / iterations


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--bs", type=int, nargs="+", default=[32, 64, 128, 256], help="batch sizes")
    add("--precision", choices=["fp32", "tf32"], default="tf32", help="of convolutions on CUDA")
    add("--device", choices=["cuda", "mps", "cpu"], help="None: the first of them that is there")
    add("--turns", type=int, default=10, help="of each loop")
    add("--iterations", type=int, default=50, help="in a turn")
    args = parser.parse_args(argv)
    device, processor, precision = train.open_device(args.device, args.precision)
    split, _ = data.load("./data", device)
    print(f"{processor}, {precision}, PyTorch {torch.__version__}\n")
    print("| batch | loop | ms an iteration | images/s | times as fast |\n|--:|---|--:|--:|--:|")
    for bs in args.bs:
        loops = {"this code": this_code(split, bs, "--no-graph")}
        if device.type == "cuda":
            loops["this code, recorded"] = this_code(split, bs)
        loops["usual"] = usual_loop(bs, device)  # last: its threads disturb a recording
        for loop in loops.values():
            time_turn(loop, 5)  # start-up: three plain iterations, a recording, a replay
        turns = {name: [] for name in loops}
        for _ in range(args.turns):
            for name, loop in loops.items():
                turns[name].append(time_turn(loop, args.iterations))
        times = {name: median(turns[name]) for name in loops}
        for name, ms in times.items():
            rate, ratio = 1000 * bs / ms, times["usual"] / ms
            print(f"| {bs} | {name} | {ms:.3f} | {rate:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(f"bench.py: {str(error) or 'stopped'}")

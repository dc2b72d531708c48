"""Train the report's ResNet on CIFAR-10: one configuration, one CSV log, one file of weights.

    python train.py                                # Table 8: SGD, lr 0.3, batch 128, step 8000
    python train.py --lr 0.1 --bs 64 --step 5000   # the SGD row of Tables 4 and 5
    python train.py --data synthetic --lr 0.003 --bs 16 --iters 100   # a try: no data, no GPU
    python train.py --eval logs/NAME.pt            # test accuracy of saved weights, by class

Writes LOGS/NAME.csv and LOGS/NAME.pt, and while it runs LOGS/NAME.ckpt; NAME is the settings. Stop
it however you like: the same command continues from the last checkpoint, which is about a minute or
a row of the log old, and ends with the files of an undisturbed run. A complete run is not repeated.
"""

import argparse
import difflib
import gc
import io
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, optim

import data
from model import ResNet, count_parameters

# The settings decide the result: they stand in every row of the log and make the run's name.
SETTINGS = "optimizer lr0 bs step gamma momentum betas wd iters seed data precision".split()
COLUMNS = [*SETTINGS, *"device torch iteration lr loss test_acc seconds".split()]


def fail(message: str, status: int = 1):
    """End the program with one line on stderr."""
    print("train.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


# ---- settings ------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; defaults are the report's best row (Tables 3 and 8)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}{nearest(parser, message)} (--help)", 2)
    add = parser.add_argument
    add("--optimizer", choices="sgd adam adagrad asgd".split(), default="sgd", help="(%(default)s)")
    add("--lr", type=float, default=0.3, help="learning rate at the start (%(default)s)")
    add("--bs", type=int, default=128, help="batch size (%(default)s)")
    add("--step", type=int, default=8000, help="iterations between two decays (%(default)s)")
    add("--gamma", type=float, default=0.2, help="factor of each decay (%(default)s)")
    add("--momentum", type=float, default=0.9, help="for sgd only (%(default)s)")
    add("--betas", type=float, nargs=2, default=[0.7, 0.7], help="the two, for adam only (0.7 0.7)")
    add("--wd", type=float, default=1e-4, help="weight decay, added to the gradient (%(default)s)")
    add("--iters", type=int, default=32000, help="iterations, not epochs (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, crops and flips (%(default)s)")
    add("--data", default="./data", help="folder with CIFAR-10, or `synthetic` (%(default)s)")
    add("--logs", type=Path, default=Path("logs"), help="folder for the files (./%(default)s)")
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these found")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
        help="of convolutions on CUDA; bf16: autocast anywhere (%(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="CUDA: compile the network, then record it")
    add("--log-every", type=int, default=100, help="iterations between rows (%(default)s)")
    add("--eval-every", type=int, default=1000, help="iterations between evaluations (%(default)s)")
    add("--ckpt-every", type=float, default=60, help="seconds between checkpoints (%(default)s)")
    add("--eval", type=Path, metavar="FILE", help="test the weights in FILE, train nothing")
    args = parser.parse_args(argv)
    for flags, low, high in (("bs step iters log-every eval-every", 1, 10**9), ("betas", 0, 0.9999),
                             ("lr wd ckpt-every", 0, 10**9), ("gamma momentum", 0, 1),
                             ("seed", 0, 2**32 - 1)):  # fmt: skip
        for flag in flags.split():
            value = getattr(args, flag.replace("-", "_"))
            if not all(low <= v <= high for v in (value if flag == "betas" else [value])):
                parser.error(f"--{flag} must be from {low:,} to {high:,}, not {value}")  # or nan
    return args


def nearest(parser: argparse.ArgumentParser, message: str) -> str:
    """For an unknown flag, the known flag whose name or help has a similar word."""
    unknown = re.match("unrecognized arguments: --([^ =]+)", message)
    lines = [f"{action.option_strings[-1]} {action.help}".split() for action in parser._actions]
    flags = {word.strip("-(,;:)"): line[0] for line in reversed(lines) for word in line}
    near = difflib.get_close_matches(unknown[1] if unknown else "", flags, 1, 0.65)
    return f"; did you mean {flags[near[0]]}?" if near else ""


def settings(args: argparse.Namespace) -> dict:
    """What decides the result, by column; "" where the optimizer has no such setting."""
    config = {name: getattr(args, "lr" if name == "lr0" else name) for name in SETTINGS}
    config["momentum"] = args.momentum if args.optimizer == "sgd" else ""
    config["betas"] = "{} {}".format(*args.betas) if args.optimizer == "adam" else ""
    config["data"] = "synthetic" if args.data == "synthetic" else "cifar10"
    return config


def run_name(config: dict) -> str:
    """NAME: sgd_lr0.3_bs128_step8000_seed0, with every other setting that is not the default."""
    default = settings(parse_args(["--optimizer", config["optimizer"]]))
    parts = ["{optimizer}_lr{lr0}_bs{bs}_step{step}".format(**config)]
    for key in ("gamma", "momentum", "betas", "wd", "iters", "data", "precision"):
        if config[key] != default[key]:
            parts.append(f"{key}{config[key]}".removeprefix("data").removeprefix("precision"))
    return "_".join([*parts, f"seed{config['seed']}"]).replace(" ", "-")


# ---- one iteration -------------------------------------------------------------------------------


def build(config: dict, device: torch.device) -> tuple[ResNet, optim.Optimizer]:
    """The seed's network, and its optimizer, which adds the weight decay to the gradient."""
    torch.manual_seed(config["seed"])
    model = ResNet().to(device, memory_format=torch.channels_last)
    params, cuda = model.parameters(), device.type == "cuda"  # the graph needs `capturable`
    common = {"lr": config["lr0"], "weight_decay": config["wd"]}
    if config["optimizer"] == "sgd":
        optimizer = optim.SGD(params, momentum=config["momentum"], fused=cuda or None, **common)
    elif config["optimizer"] == "adam":
        betas = tuple(map(float, config["betas"].split()))
        optimizer = optim.Adam(params, betas=betas, fused=cuda or None, capturable=cuda, **common)
    elif config["optimizer"] == "adagrad":
        optimizer = optim.Adagrad(params, **common)
    else:  # averaged SGD, though the report calls it "accelerated"; it averages from step t0 on
        optimizer = optim.ASGD(params, lambd=1e-4, alpha=0.75, t0=1e6, capturable=cuda, **common)
    return model, optimizer


def make_step(config: dict, model, optimizer, split: data.Split, loss_sum: Tensor, how: str):
    """A function that trains one iteration on the images of a plan, int64 [4, b].

    It adds their mean loss to `loss_sum`, float32 [], without waiting for the device, and returns
    the seconds that were no training but preparation. `how` is "plain" PyTorch, or on CUDA one
    graph for the step of a full batch: "recorded", or with the network "compiled" before. An
    epoch's last batch, where it is short, is not worth a graph of its own.
    """
    windows = data.crop_windows(split.images)

    def step(network, plan: Tensor) -> float:
        with torch.autocast(plan.device.type, torch.bfloat16, config["precision"] == "bf16"):
            logits = network(data.augment(windows, plan))
            loss = F.cross_entropy(logits, split.labels[plan[0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum.add_(loss.detach())
        return 0.0

    if how == "plain":
        return lambda plan: step(model, plan)
    network = torch.compile(model, dynamic=False) if how == "compiled" else model
    graph = RecordedStep(lambda plan: step(network, plan), optimizer)
    return lambda plan: graph(plan) if plan.shape[1] == config["bs"] else step(model, plan)


class RecordingFailed(Exception):
    """The step cannot be compiled or recorded on this machine; the message says why."""


class RecordedStep:
    """`step` recorded as a CUDA graph and replayed: one launch instead of hundreds.

    The first three calls are plain iterations, in which the compiler, the libraries and the
    optimizer allocate what a recording must find in place. The learning rate is a constant of the
    recording, so each decay makes a new one. (Adagrad counts its steps on the host, where a replay
    does not reach; only its lr_decay would need them, and that is 0.)
    """

    def __init__(self, step, optimizer: optim.Optimizer):
        self.step, self.optimizer, self.warmup = step, optimizer, 3
        self.lr = self.graph = self.plan = None

    def __call__(self, plan: Tensor) -> float:
        """Train one iteration; returns the seconds of preparation, 0 for a replay."""
        lr = self.optimizer.param_groups[0]["lr"]
        if lr == self.lr:
            self.plan.copy_(plan)
            self.graph.replay()
            return 0.0
        torch.cuda.synchronize()
        began = time.perf_counter()
        try:
            if self.warmup:
                self.warmup -= 1
                self.step(plan)
            else:
                self.lr, self.plan, self.graph = lr, plan.clone(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.step(self.plan)
                self.graph.replay()
        except Exception as error:  # a compiler or a library may raise anything
            error = error.__context__ or error  # what ended the recording, if it was recording
            line = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise RecordingFailed(line) from error
        torch.cuda.synchronize()
        return time.perf_counter() - began


@torch.no_grad()
def evaluate(model: ResNet, split: data.Split, precision: str) -> Tensor:
    """Correct predictions by class, int64 [10], with the running batch-norm statistics."""
    model.eval()
    correct = torch.zeros(10, dtype=torch.int64, device=split.labels.device)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000)):
        with torch.autocast(labels.device.type, torch.bfloat16, precision == "bf16"):
            logits = model(data.scale(images))
        correct.index_add_(0, labels, (logits.argmax(1) == labels).long())
    model.train()
    return correct


# ---- files ---------------------------------------------------------------------------------------


def save(path: Path, **content) -> None:
    """torch.save that no kill and no full disk tears: the old file stays until the new is whole."""
    buffer, new = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # straight to a file, a full disk would raise no OSError
    new.write_bytes(buffer.getbuffer())
    os.replace(new, path)


@contextmanager
def loaded(path: Path):
    """What `save` wrote, on the CPU; ends with one line where the file or its use goes wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load compares no checksums
                raise ValueError("wrong checksum")
        yield torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"there is no file {path}")
    except Exception as error:  # damage may raise anything
        fail(f"cannot use {path} ({error!r:.200}); if damaged or foreign, delete it and its log")


def is_complete(log: Path) -> bool:
    """Whether the log's last row is the run's last iteration, with a test accuracy."""
    text = log.read_text(errors="replace") if log.exists() else ""
    last = dict(zip(COLUMNS, text.splitlines()[-1].split(","))) if text.endswith("\n") else {}
    return bool(last.get("test_acc")) and last["iteration"] == last["iters"]


def resume(log, ckpt: Path, config: dict, model, optimizer) -> tuple[int, float]:
    """Take the log for this process alone, and bring all to where the checkpoint was, if any.

    Returns the iterations done and the seconds of training that they took.
    """
    try:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process, however it ends
    except ImportError:
        pass  # Windows: nothing stops a second process on the same run
    except BlockingIOError:
        fail(f"another process is training {log.name}")
    if not ckpt.exists():
        if log.tell():
            fail(f"{log.name} has no checkpoint; if it is unfinished, delete it to train anew")
        return 0, 0.0
    with loaded(ckpt) as saved:
        if saved["config"] != config or saved["log_size"] > log.tell():
            raise ValueError("it does not belong to this log")
        model.load_state_dict(saved["model"])
        # The groups hold flags of this start's device; the rest of the state is the run's.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})
        log.seek(saved["log_size"])
        log.truncate()
        print(f"continues from iteration {saved['iteration']}", flush=True)
        return saved["iteration"], saved["seconds"]


# ---- a run ---------------------------------------------------------------------------------------


def open_device(name: str | None, precision: str) -> torch.device:
    """The device of this name, else the first found of cuda, mps and cpu; exits if it cannot be."""
    found = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = name or next(name for name in found if found[name])
    if not found[name]:
        fail(f"no {name} device was found; without --device the best one found is used")
    if name == "cuda":
        try:
            torch.cuda.init()
        except RuntimeError as error:  # PyTorch names the driver and the ways out
            fail(f"CUDA does not start: {error} Or use --device cpu.")
        if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            fail("bf16 needs compute capability 8.0 or more: use --precision tf32 or --device cpu")
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    elif name == "cpu" and precision == "bf16":
        if not any(has for what, has in torch.cpu.get_capabilities().items() if "bf16" in what):
            print("this CPU has no bf16 instructions: fp32 is many times faster", file=sys.stderr)
    return torch.device(name)


def train(args: argparse.Namespace, plain: bool = False) -> None:
    """Train what the flags describe, or continue it, or say that it is complete.

    Exits with 3 when the loss is no longer finite; the log then shows it. On CUDA raises
    RecordingFailed where the step cannot be compiled or recorded; `plain` tries neither.
    """
    config = settings(args)
    name, bs, iters = run_name(config), config["bs"], config["iters"]
    log_path, weights, ckpt = (args.logs / f"{name}.{ending}" for ending in ("csv", "pt", "ckpt"))
    if is_complete(log_path):
        ckpt.unlink(missing_ok=True)
        return print(f"{log_path} is complete; delete it to train it again")
    device = open_device(args.device, args.precision)
    cuda = device.type == "cuda"
    if args.compile and not cuda:
        fail(f"--compile needs a CUDA device, and this one is {device}")
    how = "plain" if plain or not cuda else "compiled" if args.compile else "recorded"
    processor = torch.cuda.get_device_name().replace(",", "") if cuda else device.type
    constant = [*config.values(), processor, torch.__version__]  # in every row of the log
    train_split, test_split = data.load(args.data, device)
    model, optimizer = build(config, device)
    loss_sum = torch.zeros((), device=device)  # of the iterations since the log's last row
    step = make_step(config, model, optimizer, train_split, loss_sum, how)
    print(f"{name}\n{count_parameters(model):,} parameters, {processor}, {how}", flush=True)
    # On a terminal a line of progress takes the place of the one before.
    patience, end = (0.5, "\r") if sys.stdout.isatty() else (60, "\n")

    args.logs.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a", newline="") as log:
        start, seconds = resume(log, ckpt, config, model, optimizer)
        batches_per_epoch = math.ceil(len(train_split.labels) / bs)  # the last one may be short
        logged, saved_at, shown_at, result = start, -math.inf, seconds, ""
        started = time.perf_counter() - seconds  # neither files nor evaluation are training time
        for t in range(start, iters):
            if t == logged and seconds - saved_at >= args.ckpt_every:
                save(ckpt, config=config, model=model.state_dict(), iteration=t, seconds=seconds,
                     optimizer=optimizer.state_dict()["state"], log_size=log.tell())  # fmt: skip
                saved_at, started = seconds, time.perf_counter() - seconds

            epoch, i = divmod(t, batches_per_epoch)
            if i == 0 or t == start:
                batches = data.epoch_plan(train_split, config["seed"], epoch).split(bs, dim=1)
            lr = config["lr0"] * config["gamma"] ** (t // config["step"])  # report, Decay step
            optimizer.param_groups[0]["lr"] = lr
            started += step(batches[i])  # which returns what was preparation, not training

            done, accuracy = t + 1, ""
            evaluating = done == iters or done % args.eval_every == 0
            if evaluating or done % args.log_every == 0:
                loss = loss_sum.item() / (done - logged)  # waits for the device
                seconds = time.perf_counter() - started
                if evaluating and math.isfinite(loss):
                    right = evaluate(model, test_split, args.precision).sum().item()
                    accuracy = f"{100 * right / len(test_split.labels):.2f}"
                    if done == iters:  # before the row that makes the run complete
                        save(weights, config=config, model=model.state_dict())
                if not log.tell():
                    print(*COLUMNS, sep=",", file=log)
                row = f"{done},{lr:.6g},{loss:.6f},{accuracy},{seconds:.2f}"
                print(*constant, row, sep=",", file=log, flush=True)
                if not math.isfinite(loss):
                    fail(f"loss {loss} at iteration {done}, see {log_path}; try a lower --lr", 3)
                loss_sum.zero_()
                logged, started = done, time.perf_counter() - seconds
                result = f"loss {loss:.4f}  " + f"test {accuracy} %  " * bool(accuracy)

            trained = time.perf_counter() - started
            if accuracy or trained - shown_at > patience:
                pace, shown_at = trained / done, trained
                line = f"{done}/{iters}  {result}{bs / pace:.0f} images/s"
                line += f"  {pace * (iters - done) / 60:.0f} min left"
                width = shutil.get_terminal_size().columns - 1
                print(f"{line:{width}.{width}}", end="\n" if accuracy else end, flush=True)
    ckpt.unlink(missing_ok=True)
    print(f"{seconds:.0f} s of training; log {log_path}, weights {weights}")


def test(file: Path, where: str, device_name: str | None) -> None:
    """Print the test accuracy of the weights in `file`, overall and by class."""
    model = ResNet()
    with loaded(file) as saved:
        config, precision = saved["config"], saved["config"]["precision"]
        name = run_name(config)
        model.load_state_dict(saved["model"])
    device = open_device(device_name, precision)
    # Weights of generated images are tested on such: real ones would be a test of nothing.
    _, split = data.load("synthetic" if config["data"] == "synthetic" else where, device)
    correct = evaluate(model.to(device, memory_format=torch.channels_last), split, precision)
    print(f"{name}: {100 * correct.sum() / len(split.labels):.2f} %")
    for label, right, count in zip(data.CLASSES, correct, split.labels.bincount()):
        print(f"{label:<10} {100 * right / count:6.2f} %")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it like any kill, no traceback
    try:
        if args.eval:
            return test(args.eval, args.data, args.device)
        try:
            return train(args)
        except RecordingFailed as error:
            print(f"train.py: no CUDA graph, so slower plain PyTorch ({error})", file=sys.stderr)
        gc.collect()  # the failed start's tensors would stay in cycles, PyTorch's own among them
        train(args, plain=True)  # from the checkpoint, as after any other end
    except torch.OutOfMemoryError:
        fail("the device's memory is full; try a lower --bs or another --device")
    except (data.DataError, torch.AcceleratorError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error}; once that is mended, the same command continues")


if __name__ == "__main__":
    main()

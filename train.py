"""Train the report's ResNet on CIFAR-10: one configuration, one CSV log, one file of weights.

    python train.py                                # Table 8: SGD, lr 0.3, batch 128, step 8000
    python train.py --lr 0.1 --bs 64 --step 5000   # the SGD row of Tables 4 and 5
    python train.py --data synthetic --lr 0.003 --bs 16 --iters 100   # a try: no data, no GPU
    python train.py --eval logs/NAME.pt            # test accuracy of saved weights, by class

Writes LOGS/NAME.csv and LOGS/NAME.pt, and while it runs LOGS/NAME.ckpt; NAME is the settings.
Started again, a finished run says so and an interrupted one goes on from its checkpoint.
"""

import argparse
import csv
import datetime
import fcntl
import functools
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from model import ResNet, count_parameters

COLUMNS = (
    "optimizer lr0 bs step gamma momentum betas wd iters seed data precision device torch "
    "iteration lr loss test_acc seconds"
).split()


# ---- settings ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2, where argparse would print its whole usage."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (python {self.prog} --help)\n")


def within(kind: type, low: float, high: float):
    """An argparse type: an int or a float (`kind`) from low to high; nan is neither."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def fail(message: str, status: int = 1):
    """End the program with one line on stderr."""
    print(f"train.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9][0-9]?))?", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not cpu, mps, cuda or cuda:N")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; defaults are the report's best row (Tables 3 and 8)."""
    count, rate = within(int, 1, 10**9), within(float, 0, 1e9)
    fraction, beta = within(float, 0, 1), within(float, 0, 0.999999)
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--optimizer", choices=("sgd", "adam", "adagrad", "asgd"), default="sgd")
    add("--lr", type=rate, default=0.3, help="learning rate of the first iteration (0.3)")
    add("--bs", type=count, default=128, help="batch size (128)")
    add("--step", type=count, default=8000, help="iterations between two decays of lr (8000)")
    add("--gamma", type=fraction, default=0.2, help="factor of each decay (0.2)")
    add("--momentum", type=fraction, default=0.9, help="for sgd alone (0.9)")
    add("--betas", type=beta, nargs=2, default=[0.7, 0.7], help="for adam alone (0.7 0.7)")
    add("--wd", type=rate, default=1e-4, help="weight decay, added to the gradient (1e-4)")
    add("--iters", type=count, default=32000, help="iterations in all (32000)")
    add("--seed", type=within(int, 0, 2**32 - 1), default=0, help="of weights and batches (0)")
    add("--data", default="./data", help="folder of cifar-10-batches-py, or `synthetic` (./data)")
    add("--logs", type=Path, default=Path("logs"), help="folder of logs and weights (./logs)")
    add("--device", type=device_name, help="cpu, mps, cuda or cuda:N (the best there is)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
        help="fp32 or tf32 convolutions on CUDA; or bf16: autocast (tf32)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compiled network in a CUDA graph (on for CUDA where Triton works)")  # fmt: skip
    add("--log-every", type=count, default=100, help="iterations of a row in the log (100)")
    add("--eval-every", type=count, default=1000, help="iterations between evaluations (1000)")
    add("--ckpt-every", type=count, default=1000, help="iterations between checkpoints (1000)")
    add("--fresh", action="store_true", help="forget this configuration's log and checkpoint")
    add("--eval", type=Path, metavar="FILE", help="test the weights in FILE, train nothing")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict:
    """What decides the result, by CSV column; "" where the optimizer has no such setting."""
    return {
        "optimizer": args.optimizer,
        "lr0": args.lr,
        "bs": args.bs,
        "step": args.step,
        "gamma": args.gamma,
        "momentum": args.momentum if args.optimizer == "sgd" else "",
        "betas": "{} {}".format(*args.betas) if args.optimizer == "adam" else "",
        "wd": args.wd,
        "iters": args.iters,
        "seed": args.seed,
        "data": "synthetic" if args.data == "synthetic" else "cifar10",
        "precision": args.precision,
    }


def run_name(config: dict) -> str:
    """NAME: sgd_lr0.3_bs128_step8000_seed0, with every other setting that is not the default."""
    default = settings(parse_args(["--optimizer", config["optimizer"]]))
    name = "{optimizer}_lr{lr0}_bs{bs}_step{step}".format(**config)
    for key in ("gamma", "momentum", "betas", "wd", "iters", "data", "precision"):
        if config[key] != default[key]:
            label = "" if key in ("data", "precision") else key
            name += f"_{label}{config[key]}".replace(" ", "-")
    return f"{name}_seed{config['seed']}"


# ---- one iteration -------------------------------------------------------------------------------


def make_optimizer(config: dict, parameters, device: torch.device) -> torch.optim.Optimizer:
    """The optimizers of Table 4; weight decay is added to the gradient in all of them."""
    lr, wd, cuda = config["lr0"], config["wd"], device.type == "cuda"
    fused = cuda or None  # None leaves the choice to PyTorch
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=config["momentum"], weight_decay=wd, fused=fused
        )
    if config["optimizer"] == "adam":
        betas = tuple(map(float, config["betas"].split()))
        return torch.optim.Adam(
            parameters, lr, betas, eps=1e-8, weight_decay=wd, fused=fused, capturable=cuda
        )
    if config["optimizer"] == "adagrad":
        return torch.optim.Adagrad(parameters, lr, weight_decay=wd)
    # Averaged SGD, for all that the report says "accelerated"; it averages from iteration t0 on.
    return torch.optim.ASGD(
        parameters, lr, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=wd, capturable=cuda
    )


def decayed_lr(config: dict, t: int) -> float:
    """Learning rate of iteration t, counted from 0: lr * gamma^floor(t / step) (Decay step)."""
    return config["lr0"] * config["gamma"] ** (t // config["step"])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def train_step(network, optimizer, windows, labels, precision, loss_sum, plan) -> None:
    """One iteration on the images of `plan`, int64 [4, b]; adds their mean loss to `loss_sum`.

    windows: uint8 [n, 9, 9, 3, 32, 32]; labels: int64 [n]; loss_sum: float32 []. Nothing in it
    waits for the device.
    """
    with autocast(plan.device, precision):
        logits = network(data.augment(windows, plan))
        loss = F.cross_entropy(logits, labels[plan[0]])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss_sum += loss.detach()


class GraphedStep:
    """`step` recorded as a CUDA graph and replayed: one launch instead of hundreds.

    The first calls run as they are. They are real iterations, so that nothing need be put back, and
    they let the libraries and the optimizer allocate what a recording must find in place. The
    learning rate is a constant of the recording, so each decay makes a new one. Adagrad counts its
    steps on the host, where a replay does not reach; they matter to its own lr_decay alone, here 0.
    """

    def __init__(self, step, optimizer: torch.optim.Optimizer):
        self.step, self.optimizer, self.warmup = step, optimizer, 3
        self.lr = self.graph = self.plan = None

    def __call__(self, plan: Tensor) -> None:
        if self.warmup:
            self.warmup -= 1
            return self.step(plan)
        lr = self.optimizer.param_groups[0]["lr"]
        if lr != self.lr:
            self.lr, self.plan, self.graph = lr, plan.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.step(self.plan)
        self.plan.copy_(plan)
        self.graph.replay()


@torch.no_grad()
def evaluate(model: ResNet, split: data.Split, precision: str, check=lambda: None) -> Tensor:
    """Correct predictions by class, int64 [10], with the running batch-norm statistics.

    Calls `check` before each batch.
    """
    model.eval()
    correct = torch.zeros(10, dtype=torch.int64, device=split.labels.device)
    for images, labels in zip(split.images.split(1000), split.labels.split(1000)):
        check()
        with autocast(labels.device, precision):
            logits = model(data.scale(images))
        correct.index_add_(0, labels, (logits.argmax(1) == labels).long())
    model.train()
    return correct


# ---- files ---------------------------------------------------------------------------------------


class Files:
    """The files of a run: NAME.csv, NAME.pt, and while it runs NAME.ckpt and NAME.lock."""

    def __init__(self, folder: Path, name: str):
        self.log, self.weights, self.checkpoint, self.lock = (
            folder / f"{name}.{ending}" for ending in ("csv", "pt", "ckpt", "lock")
        )

    def forget(self) -> None:
        """Delete what the run left so far."""
        for path in (self.log, self.weights, self.checkpoint):
            path.unlink(missing_ok=True)

    def clear_up(self) -> None:
        """Delete what a complete run needs no more, and what a kill may have left behind."""
        for path in (self.checkpoint, Path(f"{self.checkpoint}.tmp"), self.lock):
            path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Replace the file atomically: whoever reads it finds the old content or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # on a full disk it is in the way
        fail(f"cannot write {path}: {error.strerror}; once it can be, start again to continue")


def save(path: Path, content: dict) -> None:
    """torch.save, by way of memory: to a full disk it would raise no OSError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load(path: Path) -> dict:
    """What `save` wrote, with its tensors on the CPU; call it inside `using`."""
    with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
        if archive.testzip():
            raise zipfile.BadZipFile("wrong checksum")
    content = dict(torch.load(path, map_location="cpu", weights_only=True))
    if [*content["config"]] != COLUMNS[:12]:
        raise ValueError("it holds no configuration")
    return content


@contextmanager
def using(path: Path):
    """Ends the program with one line where a file is damaged or not what it should be."""
    try:
        yield
    except Exception as error:  # damage may raise anything
        fail(f"cannot use {path}: {type(error).__name__}, {str(error)[:200]}")


def write_log(path: Path, rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_file(path, text.getvalue().encode())


def is_complete(path: Path, config: dict) -> bool:
    """Whether this log's last row is this configuration's last iteration, with a test accuracy."""
    try:
        text = path.read_text(errors="replace")
        last = list(csv.DictReader(io.StringIO(text)))[-1]
    except (OSError, IndexError, csv.Error):  # none, an empty one, a damaged one
        return False
    whole = text.endswith("\n") and bool(last.get("test_acc"))
    done = {**config, "iteration": config["iters"]}
    return whole and all(last.get(key) == str(done[key]) for key in done)


@contextmanager
def locked(path: Path):
    """Holds this configuration for one process; exits when another one has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
    except BlockingIOError:
        fail(f"another process is training {path.stem} in {path.parent}")
    except OSError as error:
        fail(f"cannot write to {path.parent}: {error.strerror}; --logs names another folder")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


# ---- a run ---------------------------------------------------------------------------------------


class Run:
    """The state of a run: all that a checkpoint holds."""

    POSITION = ("iteration", "logged", "seconds", "rows")

    def __init__(self, config: dict, device: torch.device):
        torch.manual_seed(config["seed"])
        self.config = config
        self.model = ResNet().to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(config, self.model.parameters(), device)
        self.loss_sum = torch.zeros((), device=device)  # of the iterations since the last row
        self.iteration = 0  # iterations done
        self.logged = 0  # iteration of the last row
        self.seconds = 0.0  # training time, evaluation left out
        self.rows: list[list[str]] = []  # of the CSV

    def save(self, path: Path) -> None:
        content = {key: getattr(self, key) for key in ("config", "loss_sum", *self.POSITION)}
        content["model"] = self.model.state_dict()
        content["optimizer"] = self.optimizer.state_dict()["state"]
        save(path, content)

    def resume(self, path: Path) -> None:
        """Go where the checkpoint was; exits when it is damaged or of another configuration."""
        with using(path):
            saved = load(path)
            if saved["config"] != self.config:
                raise ValueError("it is of another configuration; --fresh starts without it")
            self.model.load_state_dict(saved["model"])
            # The groups hold flags of this start's device; the rest of the state is the run's.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
            self.loss_sum.copy_(saved["loss_sum"])
            for key in self.POSITION:
                setattr(self, key, saved[key])


def make_step(run: Run, train: data.Split, compiled: bool):
    """The function that trains one iteration on the images of a plan, int64 [4, b].

    With `compiled`, full batches go through the compiled network in a CUDA graph; an epoch's short
    last batch, with a shape of its own, is not worth a second compilation.
    """
    windows, labels = data.crop_windows(train.images), train.labels
    rest = (run.optimizer, windows, labels, run.config["precision"], run.loss_sum)
    plain = functools.partial(train_step, run.model, *rest)
    if not compiled:
        return plain
    network = torch.compile(run.model, dynamic=False)
    graphed = GraphedStep(functools.partial(train_step, network, *rest), run.optimizer)
    return lambda plan: (graphed if plan.shape[1] == run.config["bs"] else plain)(plan)


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM; ends the program with exit status 130 or 143."""


class Interrupts:
    """Notes SIGINT and SIGTERM; they end the run where it calls `check`, and nowhere in between."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        self.received = number

    def check(self) -> None:
        if self.received:
            raise Interrupted(128 + self.received)


class Progress:
    """On a terminal one line that renews itself, otherwise one line every 1,000 iterations."""

    def __init__(self, config: dict, start: int):
        self.iters, self.bs, self.start = config["iters"], config["bs"], start
        self.terminal, self.began, self.shown = sys.stdout.isatty(), time.perf_counter(), 0.0

    def __call__(self, t: int, loss: float, lr: float) -> None:
        now = time.perf_counter()
        waits = now - self.shown < 0.5 if self.terminal else t % 1000
        if t == self.start or (waits and t < self.iters):
            return
        self.shown = now
        rate = (t - self.start) / (now - self.began)
        left = datetime.timedelta(seconds=round((self.iters - t) / rate))
        line = f"{t}/{self.iters}  loss {loss:.4f}  lr {lr:.6g}  "
        line += f"{rate * self.bs:.0f} images/s  {left} left"
        renews = self.terminal and t < self.iters
        print(line.ljust(79 * self.terminal), end="\r" if renews else "\n", flush=True)


def train(run: Run, splits, args: argparse.Namespace, files: Files) -> None:
    """Train from where the run is to its last iteration, and write its log and weights.

    Exits with 3 when the loss is no longer finite. When interrupted, writes a checkpoint first.
    """
    config, (train_split, test_split) = run.config, splits
    setting = [*map(str, config.values()), processor(run.loss_sum.device), str(torch.__version__)]
    batches = math.ceil(len(train_split.labels) / config["bs"])  # an epoch's; the last may be short
    step = make_step(run, train_split, args.compile)
    progress, interrupts = Progress(config, run.iteration), Interrupts()
    loss = float(run.rows[-1][COLUMNS.index("loss")]) if run.rows else math.nan
    epoch, started = None, time.perf_counter() - run.seconds
    try:
        while True:
            interrupts.check()
            t = run.iteration  # how many are done, and so the number of the next, from 0
            last = t == config["iters"]
            evaluating = last or t % args.eval_every == 0
            lr = decayed_lr(config, max(t - 1, 0))  # the last iteration's
            if t > run.logged and (evaluating or t % args.log_every == 0):
                loss = run.loss_sum.item() / (t - run.logged)  # waits for the device
                seconds = time.perf_counter() - started
                accuracy = ""
                if evaluating and math.isfinite(loss):
                    try:
                        check = interrupts.check
                        correct = evaluate(run.model, test_split, config["precision"], check)
                        accuracy = f"{100 * correct.sum().item() / len(test_split.labels):.2f}"
                    finally:  # evaluation is not training time
                        started = time.perf_counter() - seconds
                row = [f"{t}", f"{lr:.6g}", f"{loss:.6f}", accuracy, f"{seconds:.2f}"]
                run.rows.append([*setting, *row])
                run.logged = t
                run.loss_sum.zero_()
                if not last or not math.isfinite(loss):  # the very last row follows the weights
                    write_log(files.log, run.rows)
                if not math.isfinite(loss):
                    fail(f"loss {loss} at iteration {t} (see {files.log}); try a lower --lr", 3)
            progress(t, loss, lr)
            if last:
                break
            if t % args.ckpt_every == 0:
                run.seconds = time.perf_counter() - started
                run.save(files.checkpoint)
            if t // batches != epoch:
                epoch = t // batches
                plan = data.epoch_plan(train_split, config["seed"], epoch)
            first = t % batches * config["bs"]
            run.optimizer.param_groups[0]["lr"] = decayed_lr(config, t)
            step(plan[:, first : first + config["bs"]])
            run.iteration += 1
    except Interrupted:
        run.seconds = time.perf_counter() - started
        run.save(files.checkpoint)
        line = "\n" * progress.terminal + f"stopped after {run.iteration} iterations"
        print(f"{line}; the same command continues", flush=True)
        raise
    save(files.weights, {"config": config, "model": run.model.state_dict()})
    write_log(files.log, run.rows)


# ---- what the command does -----------------------------------------------------------------------


def triton_works() -> bool:
    """Whether Triton is there, and what it builds its launcher from: a C compiler and headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return bool(importlib.util.find_spec("triton") and compiler and header.exists())


def open_device(args: argparse.Namespace) -> torch.device:
    """The device asked for, else cuda, else mps, else cpu, made ready; settles args.compile too."""
    there = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    device = torch.device(args.device or next(name for name in there if there[name]))
    if (device.index or 0) >= there[device.type]:
        fail(f"device {device} is not there; without --device the best one that is there is taken")
    can_compile = device.type == "cuda" and triton_works()
    if args.compile and not can_compile:
        fail("--compile needs a CUDA device, Triton, a C compiler and Python's headers")
    args.compile = can_compile if args.compile is None else args.compile
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
        # Graphs need capturable optimizers, and these complain of each step outside a graph.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")
        # TF32 is for convolutions alone, as PyTorch has it; older compilers ask for more.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    return device


def load_data(where: str, device: torch.device) -> tuple[data.Split, data.Split]:
    try:
        return data.load(where, device)
    except data.DataError as error:
        fail(str(error))


def processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def start(args: argparse.Namespace) -> None:
    """Begin the run that the flags describe, or go on with it, or say that it is complete."""
    config = settings(args)
    name = run_name(config)
    files = Files(args.logs, name)
    if is_complete(files.log, config) and not args.fresh:
        files.clear_up()
        return print(f"{files.log} is complete; --fresh trains it again")
    device = open_device(args)
    splits = load_data(args.data, device)
    run = Run(config, device)
    parameters = count_parameters(run.model)
    how = f"{args.precision}, {'compiled' if args.compile else 'eager'}"
    print(f"{processor(device)}, {how}, {parameters:,} parameters\n{name}", flush=True)
    with locked(files.lock):
        if args.fresh:
            files.forget()
        if files.checkpoint.exists():
            run.resume(files.checkpoint)
            print(f"goes on from iteration {run.iteration}", flush=True)
        elif is_complete(files.log, config):  # since a moment ago, by another process
            return print(f"{files.log} is complete")
        elif files.log.exists():
            fail(f"{files.log} is unfinished and has no checkpoint; --fresh trains from the start")
        train(run, splits, args, files)
        files.clear_up()
    last = dict(zip(COLUMNS, run.rows[-1]))
    print(f"{last['test_acc']} % of the test images right, {last['seconds']} s of training")
    print(f"log {files.log}, weights {files.weights}")


def test(args: argparse.Namespace) -> None:
    """Print the test accuracy of the weights in args.eval, overall and by class."""
    model = ResNet()
    with using(args.eval):
        saved = load(args.eval)
        model.load_state_dict(saved["model"])
        args.precision = saved["config"]["precision"]
        if saved["config"]["data"] == "synthetic":  # real images would be a test of nothing
            args.data = "synthetic"
    device = open_device(args)
    _, split = load_data(args.data, device)
    model.to(device, memory_format=torch.channels_last)
    correct = evaluate(model, split, args.precision)
    print(f"{run_name(saved['config'])}: {100 * correct.sum() / len(split.labels):.2f} %")
    for name, right, count in zip(data.CLASSES, correct, split.labels.bincount()):
        print(f"{name:<10} {100 * right / count:6.2f} %")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training notes it, Ctrl-C just ends it
    sys.stdout.reconfigure(errors="backslashreplace")  # for a path that the terminal cannot show
    try:
        test(args) if args.eval else start(args)
    except OSError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail("the device's memory is full; try a lower --bs, or another --device")


if __name__ == "__main__":
    main()

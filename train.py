"""Train the report's ResNet on CIFAR-10: one configuration, one CSV log, one file of weights.

    python train.py
    python train.py --lr 0.1 --bs 64 --step 5000
    python train.py --data synthetic --lr 0.003 --bs 16 --iters 100 --log-every 10
    python train.py --eval logs/NAME.pt

These are Table 8, the report's best row; the SGD row of Tables 4 and 5; a try without data set and
GPU; and the test accuracy of saved weights. A run writes LOGS/NAME.csv, the log, LOGS/NAME.pt, the
final weights, and LOGS/NAME.ckpt, the checkpoint, at a line of the log and at most once a minute;
NAME is the settings. Stop it in any way: the same command continues from the checkpoint and ends
with the log and the weights of an undisturbed run. A complete run is not repeated.

Exit status: 0 done, 1 an error, 2 a bad flag, 3 the loss is no longer finite.
"""

import argparse
import copy
import io
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, optim

import data
from model import ResNet, count_parameters

# The settings decide the result: they stand in every line of the log and make the run's name.
SETTINGS = "optimizer lr0 bs step gamma momentum betas wd iters seed data precision".split()
COLUMNS = [*SETTINGS, *"device torch iteration lr loss test_acc seconds".split()]


def fail(message: str, status: int = 1):
    """End the program with one line on stderr."""
    print("train.py:", " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; defaults are the report's best row (Tables 3 and 8)."""
    raw, home = argparse.RawDescriptionHelpFormatter, os.path.expanduser  # ~ is the home folder
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help)", 2)
    add = parser.add_argument
    add("--optimizer", choices="sgd adam adagrad asgd".split(), default="sgd", help="(%(default)s)")
    add("--lr", type=float, default=0.3, dest="lr0", help="initial learning rate (%(default)s)")
    add("--bs", type=int, default=128, help="batch size (%(default)s)")
    add("--step", type=int, default=8000, help="iterations between two decays (%(default)s)")
    add("--gamma", type=float, default=0.2, help="factor of each decay (%(default)s)")
    add("--momentum", type=float, default=0.9, help="for sgd only (%(default)s)")
    add("--betas", type=float, nargs=2, default=[0.7, 0.7], help="the two, for adam only (0.7 0.7)")
    add("--wd", type=float, default=1e-4, help="weight decay, added to the gradient (%(default)s)")
    add("--iters", type=int, default=32000, help="iterations, not epochs (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order, crops and flips (%(default)s)")
    add("--data", type=home, default="./data", help="CIFAR-10's folder or synthetic (%(default)s)")
    add("--logs", type=home, default="logs", help="folder for the files (./%(default)s)")
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these found")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="tf32",
        help="of convolutions on CUDA; bf16: autocast anywhere (%(default)s)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network")
    add("--no-graph", action="store_true", help="CUDA: plain PyTorch, no CUDA graph")
    add("--log-every", type=int, default=100, help="iterations between lines (%(default)s)")
    add("--eval-every", type=int, default=1000, help="iterations between evaluations (%(default)s)")
    add("--ckpt-every", type=float, default=60, help="seconds between checkpoints (%(default)s)")
    add("--eval", type=home, metavar="FILE", help="test the weights in FILE, train nothing")
    args = parser.parse_args(argv)
    if min(args.bs, args.step, args.iters, args.log_every, args.eval_every) < 1:
        parser.error("--bs, --step, --iters, --log-every and --eval-every must be 1 or more")
    if not all(0 <= value < 1e18 for value in (args.lr0, args.wd, args.ckpt_every, args.seed)):
        parser.error("--lr, --wd, --ckpt-every and --seed must be from 0 to below 1e18")
    if not all(0 <= value <= 1 for value in (args.gamma, args.momentum)):
        parser.error("--gamma and --momentum must be from 0 to 1")
    if not all(0 <= value < 1 for value in args.betas):
        parser.error("--betas must be from 0 to below 1")
    return args


def make_config(args: argparse.Namespace) -> dict:
    """SETTINGS with their values; "" where the optimizer has no such setting."""
    config = {name: vars(args)[name] for name in SETTINGS}
    config["momentum"] = args.momentum if args.optimizer == "sgd" else ""
    config["betas"] = "{} {}".format(*args.betas) if args.optimizer == "adam" else ""
    config["data"] = "synthetic" if args.data == "synthetic" else "cifar10"
    return config


def run_name(config: dict) -> str:
    """NAME: sgd_lr0.3_bs128_step8000_seed0, with every other setting that is not the default."""
    default = {"gamma": 0.2, "momentum": 0.9, "betas": "0.7 0.7", "wd": 1e-4, "iters": 32000,
               "data": "cifar10", "precision": "tf32"}  # fmt: skip
    name = "{optimizer}_lr{lr0}_bs{bs}_step{step}".format(**config)
    for key, value in default.items():
        if config[key] not in (value, ""):
            name += f"_{config[key]}" if key in ("data", "precision") else f"_{key}{config[key]}"
    return f"{name}_seed{config['seed']}".replace(" ", "-")


# ---- one iteration -------------------------------------------------------------------------------
def make_optimizer(args: argparse.Namespace, model: ResNet) -> optim.Optimizer:
    """The optimizer with the report's settings; it adds the weight decay to the gradient."""
    cuda = model.linear.weight.is_cuda  # a graph needs `capturable`
    common = {"params": model.parameters(), "lr": args.lr0, "weight_decay": args.wd}
    if args.optimizer == "sgd":
        return optim.SGD(momentum=args.momentum, fused=cuda or None, **common)
    if args.optimizer == "adam":
        return optim.Adam(betas=tuple(args.betas), fused=cuda or None, capturable=cuda, **common)
    if args.optimizer == "adagrad":
        return optim.Adagrad(**common)
    # Averaged SGD, though the report calls it "accelerated"; it averages from step t0 on.
    return optim.ASGD(lambd=1e-4, alpha=0.75, t0=1e6, capturable=cuda, **common)


def make_train_batch(args: argparse.Namespace, model: ResNet, optimizer, split: data.Split):
    """The function that trains one iteration on images of `split`; on CUDA a RecordedBatch."""
    padded, device = data.pad(split.images), split.labels.device
    compiled = torch.compile(model, dynamic=False) if args.compile else model

    def train_batch(plan: Tensor) -> Tensor:
        """Forward, loss, backward, update: plan, int64 [4, b] -> mean loss, float32 []"""
        network = compiled if plan.shape[1] == args.bs else model  # a short one is not worth it
        images, labels = data.augment(padded, plan), split.labels[plan[0]]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    if device.type == "cuda" and not args.no_graph:
        return RecordedBatch(train_batch, optimizer, args.bs)
    return train_batch


class RecordedBatch:
    """train_batch as a CUDA graph: its hundreds of kernels, recorded once, are launched as one.

    A recording computes nothing; a replay runs the same kernels on the same memory. So the plan is
    copied to where the recording read it, each call's loss replaces the last one's, and what was a
    number in Python is a constant: each new learning rate needs a new recording. (So is Adagrad's
    count of steps, which only its lr_decay, 0, would use.)
    """

    def __init__(self, train_batch, optimizer: optim.Optimizer, batch_size: int):
        self.train_batch, self.optimizer, self.batch_size = train_batch, optimizer, batch_size
        self.calls, self.recorded_lr = 0, None
        torch.cuda.synchronize()  # what was begun in the default stream, which cannot be recorded
        torch.cuda.set_stream(torch.cuda.Stream())

    def __call__(self, plan: Tensor) -> Tensor:
        self.calls += 1  # the first three are plain: libraries choose and allocate what they need
        if self.calls <= 3 or plan.shape[1] < self.batch_size:
            return self.train_batch(plan)
        lr = self.optimizer.param_groups[0]["lr"]
        if lr != self.recorded_lr:
            self.recorded_lr, self.plan, self.graph = lr, plan.clone(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.loss = self.train_batch(self.plan)
            except Exception as error:  # its context is the cause: leaving a recording raises, too
                why = str(error.__context__ or error).partition("\n")[0]
                fail(f"the iteration cannot be recorded ({why}); use --no-graph")
        self.plan.copy_(plan)
        self.graph.replay()
        return self.loss


@torch.no_grad()
def evaluate(model: ResNet, split: data.Split, precision: str) -> Tensor:
    """Whether each image is classified correctly, by running statistics: bool [n], on the CPU."""
    model.eval()
    correct = []
    for images, labels in zip(split.images.split(1000), split.labels.split(1000)):
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
            correct.append(model(data.scale(images)).argmax(1) == labels)
    model.train()
    return torch.cat(correct).cpu()


def percent(correct: Tensor) -> str:
    """The accuracy, to two decimals."""
    return f"{100 * correct.double().mean():.2f}"


# ---- files ---------------------------------------------------------------------------------------
def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, would survive a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save(path: Path, **content) -> None:
    """torch.save, but a kill, a full disk or a power cut leaves the old file or the new one."""
    buffer, new = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # straight to a file, a full disk would raise no OSError
    try:
        new.write_bytes(buffer.getbuffer())
        flush_to_disk(new)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    with suppress(OSError):  # some network file systems cannot flush a folder
        flush_to_disk(path.parent)


def load(path: Path, model: ResNet, *keys: str) -> list:
    """Copy the weights that `save` wrote into `model`; returns what stands under the keys."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load compares no checksums
                raise ValueError("wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return [saved[key] for key in keys]
    except (OSError, MemoryError, torch.OutOfMemoryError):  # no fault of the content
        raise
    except Exception as error:  # damage may raise anything
        fail(f"{path} does not fit this train.py and model.py; move it away ({error!r:.200})")


class Run:
    """The paths of a run's files, and how far it is: its iteration, seconds and log so far."""

    def __init__(self, args: argparse.Namespace):
        self.config = make_config(args)
        self.name = run_name(self.config)
        files = [Path(args.logs, f"{self.name}.{ending}") for ending in ("csv", "pt", "ckpt")]
        self.log_path, self.weights_path, self.ckpt_path = files
        self.iteration, self.seconds, self.lines = 0, 0.0, ",".join(COLUMNS) + "\n"

    def is_complete(self) -> bool:
        """Whether the log's last line is the run's last iteration, with a test accuracy."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        last = dict(zip(COLUMNS, text.splitlines()[-1].split(","))) if text.endswith("\n") else {}
        return bool(last.get("test_acc")) and last["iteration"] == last["iters"]

    def open_log(self) -> None:
        """Take the log for this process alone until it ends; exits if another process has it."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log = open(self.log_path, "a", newline="")
        try:
            import fcntl

            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is training {self.log_path}")
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks: a second process is not noticed

    def resume(self, model: ResNet, optimizer: optim.Optimizer) -> None:
        """Bring all to where the checkpoint is; a new run first saves one, and starts from it."""
        if not self.ckpt_path.exists():
            if self.log.tell() > len(self.lines):  # more than the header
                fail(f"{self.log_path} has no checkpoint: if it is unfinished, move it away")
            self.save_checkpoint(model, optimizer)
        keys = ("config", "optimizer", "iteration", "seconds", "lines")
        config, state, self.iteration, self.seconds, self.lines = load(self.ckpt_path, model, *keys)
        if config != self.config:
            fail(f"{self.ckpt_path} is of another run; move it and the log away")
        # The state alone, laid out as the parameters are: the groups hold the other device's flags.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for p, values in optimizer.state.items():
            for key, value in values.items():
                if value.shape == p.shape:
                    values[key] = torch.empty_like(p).copy_(value)
        self.saved_at = self.seconds
        self.log.truncate(0)
        print(self.lines, end="", file=self.log, flush=True)

    def save_checkpoint(self, model: ResNet, optimizer: optim.Optimizer) -> None:
        save(self.ckpt_path, config=self.config, model=model.state_dict(),
             optimizer=optimizer.state_dict()["state"], iteration=self.iteration,
             seconds=self.seconds, lines=self.lines)  # fmt: skip
        self.saved_at = self.seconds
        flush_to_disk(self.log_path)  # what was seen in it should survive a power cut, too


# ---- a run ---------------------------------------------------------------------------------------
def open_device(name: str | None, precision: str) -> torch.device:
    """The device of this name, else the first found of cuda, mps and cpu; exits if it cannot be."""
    found = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = name or next(name for name in found if found[name])
    if not found[name]:
        fail(f"no {name} device was found; without --device the best one found is used")
    if name == "cuda":
        try:
            torch.ones(1, device=name).item()
        except RuntimeError as error:  # a driver too old, a card too old, a card in use
            fail(f"CUDA does not start: {error} Or use --device cpu.")
        if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            fail("bf16 needs compute capability 8.0 or more: use --precision tf32 or --device cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as the log names it; on a CPU the number of threads decides the rounding."""
    if device.type == "cuda":
        return torch.cuda.get_device_name().replace(",", "")
    return f"cpu {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def check_against_cpu(model: ResNet, split: data.Split) -> None:
    """Exit where the loss and gradients of a batch are not the CPU's, as on MPS in old PyTorch."""
    results = []
    for device in (split.labels.device, torch.device("cpu")):
        images, labels = split.images.to(device), split.labels.to(device)
        twin = copy.deepcopy(model).to(device, memory_format=data.layout(device))
        plan = data.epoch_plan(data.Split(images, labels), seed=0, epoch=0)
        loss = F.cross_entropy(twin(data.augment(data.pad(images), plan)), labels[plan[0]])
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in twin.parameters())])
    # Rounding by 1e-4 in each convolution gives 0.2, as ReLU switches; a wrong gradient, about 1.
    if not all((here - cpu).norm() <= 0.5 * cpu.norm() for here, cpu in zip(*results)):
        fail(f"PyTorch {torch.__version__} computes wrong gradients on {split.labels.device.type}, "
             "compared with the CPU: use --device cpu, or a newer PyTorch")  # fmt: skip


def train(args: argparse.Namespace) -> None:
    """Train what the flags describe, or continue it, or say that it is complete."""
    bs, iters, decay_step = args.bs, args.iters, args.step
    run = Run(args)
    if run.is_complete():
        run.ckpt_path.unlink(missing_ok=True)
        return print(f"{run.log_path} is complete; move it away to train it again")
    device = open_device(args.device, args.precision)
    train_split, test_split = data.load(args.data, device)
    if bs > len(train_split.labels):
        fail(f"--bs {bs} is more than the {len(train_split.labels):,} training images")
    torch.manual_seed(args.seed)
    model = ResNet().to(device, memory_format=data.layout(device))
    if device.type == "mps":
        check_against_cpu(model, data.Split(*(tensor[:bs] for tensor in train_split)))
    optimizer = make_optimizer(args, model)
    run.open_log()
    run.resume(model, optimizer)
    train_batch = make_train_batch(args, model, optimizer, train_split)
    constant = ",".join(map(str, [*run.config.values(), device_name(device), torch.__version__]))
    print(f"{run.name}: {device_name(device)}, {count_parameters(model):,} parameters, "
          f"from iteration {run.iteration}, a line every {args.log_every}")  # fmt: skip

    plans = data.plans(train_split, bs, args.seed, start=run.iteration)
    while run.iteration < iters:  # from one line of the log to the next
        start = run.iteration
        stop = min(iters, *((start // n + 1) * n for n in (args.log_every, args.eval_every)))
        loss_sum = torch.zeros((), device=device)
        began = time.perf_counter()
        for t in range(start, stop):
            lr = args.lr0 * args.gamma ** (t // decay_step)  # report, Decay step
            optimizer.param_groups[0]["lr"] = lr
            loss_sum += train_batch(next(plans))
        loss = loss_sum.item() / (stop - start)  # waits for the device
        run.seconds += time.perf_counter() - began
        run.iteration = stop

        finite = math.isfinite(loss)
        due = finite and (stop == iters or stop % args.eval_every == 0)
        accuracy = percent(evaluate(model, test_split, args.precision)) if due else ""
        line = f"{constant},{stop},{lr:.6g},{loss:.6f},{accuracy},{run.seconds:.2f}\n"
        run.lines += line
        # First the state, then the line: no log is ahead of its checkpoint or its weights.
        if finite and stop == iters:
            save(run.weights_path, config=run.config, model=model.state_dict())
        elif finite and run.seconds - run.saved_at >= args.ckpt_every:
            run.save_checkpoint(model, optimizer)
        print(line, end="", file=run.log, flush=True)
        if not finite:
            fail(f"loss {loss} at iteration {stop}, see {run.log_path}; try a lower --lr", 3)
        tested = f"test {accuracy} %  " if accuracy else ""
        left = run.seconds / stop * (iters - stop) / 60
        print(f"{stop}/{iters}  loss {loss:.4f}  {tested}{left:.0f} min left  {run.name}")
    flush_to_disk(run.log_path)
    run.ckpt_path.unlink(missing_ok=True)
    print(f"{run.seconds:.0f} s of training; log {run.log_path}, weights {run.weights_path}")


def test(args: argparse.Namespace) -> None:
    """Print the test accuracy of the weights in a file, overall and by class."""
    model = ResNet()
    (config,) = load(Path(args.eval), model, "config")
    device = open_device(args.device, config["precision"])
    # Weights of generated images are tested on such: real ones would be a test of nothing.
    _, split = data.load("synthetic" if config["data"] == "synthetic" else args.data, device)
    model.to(device, memory_format=data.layout(device))
    correct, labels = evaluate(model, split, config["precision"]), split.labels.cpu()
    print(f"{run_name(config)}: {percent(correct)} %")
    for number, name in enumerate(data.CLASSES):
        print(f"{name:<10} {percent(correct[labels == number]):>6} %")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it like any kill, no traceback
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # shown at once, always
    try:
        test(args) if args.eval else train(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else its end fails, too
        fail("stopped, as nobody reads the output any more; the same command continues")
    except (data.DataError, torch.OutOfMemoryError) as error:
        fail(str(error))
    except OSError as error:
        where = error.filename or f"{args.logs}, or the output"
        fail(f"{where}: {error.strerror}; mend that and start again")


if __name__ == "__main__":
    main()

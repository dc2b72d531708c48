"""Train the report's ResNet on CIFAR-10: one configuration, one CSV log, one file of weights.

    python train.py                                    # Table 8, the report's best row
    python train.py --eval logs/NAME.pt                # the test accuracy of its weights
    python train.py --data synthetic --lr 0.003 --bs 16 --iters 100 --log-every 10    # a short try

A run writes LOGS/NAME.csv (the log), LOGS/NAME.pt (the weights) and, until it ends, LOGS/NAME.ckpt:
however it was stopped, the same command goes on from there to the files of an undisturbed run.
NAME is the settings. Exit status: 0 done, 1 an error, 2 a bad flag, 3 a loss that is not finite.
"""

import argparse
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
from model import ResNet

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
    add("--betas", type=float, nargs=2, default=[0.7, 0.7], help="both, for adam only (0.7 0.7)")
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
    add("--ckpt-every", type=float, default=60, help="least seconds between saves (%(default)s)")
    add("--eval", type=home, metavar="FILE", help="test the weights in FILE, train nothing")
    args = parser.parse_args(argv)
    if min(args.bs, args.step, args.iters, args.log_every, args.eval_every) < 1:
        parser.error("--bs, --step, --iters, --log-every and --eval-every must be 1 or more")
    if not all(0 <= x < 1e18 for x in (args.lr0, args.wd, args.ckpt_every, args.seed)):
        parser.error("--lr, --wd, --ckpt-every and --seed must be from 0 to below 1e18")
    if not (0 <= args.gamma <= 1 and all(0 <= x < 1 for x in (args.momentum, *args.betas))):
        parser.error("--gamma must be from 0 to 1, --momentum and --betas from 0 to below 1")
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
    cuda = model.linear.weight.is_cuda  # where `fused` is faster and a graph needs `capturable`
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
        network = compiled if plan.shape[1] == args.bs else model  # short batches stay eager
        images, labels = data.augment(padded, plan), split.labels[plan[0]]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    recorded = device.type == "cuda" and not args.no_graph
    return RecordedBatch(train_batch, optimizer, args.bs) if recorded else train_batch


class RecordedBatch:
    """train_batch as a CUDA graph: its hundreds of kernels, recorded once, are launched as one.

    A recording computes nothing; a replay runs the same kernels on the same memory. So the plan is
    copied to where the recording read it, and what was a number in Python is a constant: each new
    learning rate needs a new recording. (Adagrad's count of steps matters only to its lr_decay, 0.)
    """

    def __init__(self, train_batch, optimizer: optim.Optimizer, batch_size: int):
        self.train_batch, self.optimizer, self.batch_size = train_batch, optimizer, batch_size
        self.calls, self.recorded_lr = 0, None
        torch.cuda.synchronize()  # let the default stream finish: it cannot be recorded
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
            except Exception as error:  # leaving it may raise once more: the first is the cause
                fail(f"cannot record a graph ({error.__context__ or error!s:.200}); use --no-graph")
        self.plan.copy_(plan)
        self.graph.replay()
        return self.loss


@torch.no_grad()
def evaluate(model: ResNet, split: data.Split, precision: str) -> Tensor:
    """100 for each correctly classified image, else 0: float64 [n], CPU; its mean is in percent."""
    model.eval()
    batches = zip(split.images.split(1000), split.labels.split(1000))
    with torch.autocast(split.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        correct = [model(data.scale(images)).argmax(1) == labels for images, labels in batches]
    model.train()
    return 100 * torch.cat(correct).cpu().double()


# ---- files ---------------------------------------------------------------------------------------
def save(path: Path, **content) -> None:
    """torch.save, but a kill, a full disk or a power cut leaves the old file or the new one."""
    buffer, new = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)  # straight to a file, a full disk would raise no OSError
    try:
        new.write_bytes(buffer.getbuffer())
        with open(new, "rb+") as file:
            os.fsync(file)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    with suppress(OSError):  # Windows opens no folder, some network file systems flush none
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)


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
        fail(f"{path} does not fit this code ({error!r:.200}); if a checkpoint, move it away")


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
        # The state alone, as the groups hold flags of their device; and laid out as the parameters.
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
        os.fsync(self.log)  # what was seen in it should survive a power cut, too


# ---- a run ---------------------------------------------------------------------------------------
def open_device(name: str | None, precision: str) -> torch.device:
    """The device of this name, else the first found of cuda, mps and cpu; exits if it cannot be."""
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.device_count() else "mps" if mps else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # not there, driver or card too old, in use
        fail(f"no {name} device ({str(error).partition('. ')[0]:.200}): use --device cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The device as the log names it; on a CPU the number of threads decides the rounding."""
    if device.type == "cuda":
        return torch.cuda.get_device_name().replace(",", "")
    return f"cpu {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def check_against_cpu(split: data.Split) -> None:
    """Exit where a batch's gradients are not the CPU's, as on MPS in old PyTorch."""
    gradients = []
    for device in (split.labels.device, torch.device("cpu")):
        torch.manual_seed(0)
        model = ResNet().to(device, memory_format=data.layout(device))
        images, labels = (tensor[:100].to(device) for tensor in split)
        F.cross_entropy(model(data.scale(images)), labels).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    # Relative: rounding gives up to 0.2, as it switches ReLUs, and a wrong gradient about 1.
    if not all((here - cpu).norm() <= 0.5 * cpu.norm() for here, cpu in zip(*gradients)):
        fail(f"wrong gradients on {split.labels.device}: use --device cpu or a newer PyTorch")


def train(args: argparse.Namespace) -> None:
    """Train what the flags describe, or continue it, or say that it is complete."""
    iters, decay_step = args.iters, args.step
    run = Run(args)
    if run.is_complete():
        run.ckpt_path.unlink(missing_ok=True)
        return print(f"{run.log_path} is complete; move it away to train it again")
    device = open_device(args.device, args.precision)
    train_split, test_split = data.load(args.data, device)
    if args.bs > len(train_split.labels):
        fail(f"--bs {args.bs} is more than the {len(train_split.labels):,} training images")
    if device.type == "mps":
        check_against_cpu(train_split)
    torch.manual_seed(args.seed)
    model = ResNet().to(device, memory_format=data.layout(device))
    optimizer = make_optimizer(args, model)
    run.open_log()
    run.resume(model, optimizer)
    train_batch = make_train_batch(args, model, optimizer, train_split)
    constant = ",".join(map(str, [*run.config.values(), device_name(device), torch.__version__]))
    plans = data.plans(train_split, args.bs, args.seed, start=run.iteration)
    print(f"{run.name}: {device_name(device)}, from iteration {run.iteration}")
    while run.iteration < iters:  # from one line of the log to the next
        end = min(iters, *((run.iteration // n + 1) * n for n in (args.log_every, args.eval_every)))
        loss_sum = torch.zeros((), device=device)
        began = time.perf_counter()
        for t in range(run.iteration, end):
            lr = args.lr0 * args.gamma ** (t // decay_step)  # report, Decay step
            optimizer.param_groups[0]["lr"] = lr
            loss_sum += train_batch(next(plans))
        loss = loss_sum.item() / (end - run.iteration)  # waits for the device
        run.seconds += time.perf_counter() - began
        run.iteration = end
        finite = math.isfinite(loss)
        due = finite and (end == iters or end % args.eval_every == 0)
        accuracy = f"{evaluate(model, test_split, args.precision).mean():.2f}" if due else ""
        line = f"{constant},{end},{lr:.6g},{loss:.6f},{accuracy},{run.seconds:.2f}\n"
        run.lines += line
        # First the files, then the line: a log that says complete has its weights.
        if finite and end == iters:
            save(run.weights_path, config=run.config, model=model.state_dict())
        elif finite and run.seconds - run.saved_at >= args.ckpt_every:
            run.save_checkpoint(model, optimizer)
        print(line, end="", file=run.log, flush=True)
        if not finite:
            fail(f"loss {loss} at iteration {end}, see {run.log_path}; try a lower --lr", 3)
        left = f"{run.seconds / end * (iters - end) / 60:.0f} min left  {run.name}"
        print(f"{end}/{iters}  loss {loss:.4f}  test {accuracy or '-':>5} %  {left}")
    os.fsync(run.log)
    run.ckpt_path.unlink(missing_ok=True)
    print(f"{run.seconds:.0f} s of training; log {run.log_path}, weights {run.weights_path}")


def test(args: argparse.Namespace) -> None:
    """Print the accuracy of the weights in a file, overall and by class."""
    model = ResNet()
    (config,) = load(Path(args.eval), model, "config")
    device = open_device(args.device, config["precision"])
    _, split = data.load("synthetic" if config["data"] == "synthetic" else args.data, device)
    model.to(device, memory_format=data.layout(device))
    correct, labels = evaluate(model, split, config["precision"]), split.labels.cpu()
    print(f"{run_name(config)}: {correct.mean():.2f} % of {len(labels):,} test images")
    for number, name in enumerate(data.CLASSES):
        print(f"{name:<10} {correct[labels == number].mean():6.2f} %")


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it like any kill, no traceback
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # so does `| head`
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # shown at once, always
    try:
        train(args) if args.eval is None else test(args)
    except (data.DataError, OSError, torch.OutOfMemoryError) as error:
        fail(f"{error}; mend that and start again")


if __name__ == "__main__":
    main()

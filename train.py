"""Train the report's ResNet on CIFAR-10: one run, one CSV log, one file of weights.

    python train.py                            # Table 8, the report's best row
    python train.py --eval logs/NAME.pt        # the test accuracy of its weights

A run writes LOGS/NAME.csv (the log), LOGS/NAME.pt (the weights) and, until it ends, LOGS/NAME.ckpt:
however it was stopped, the same command continues it as if nothing had happened. Exit status:
0 done, 1 error, 2 bad flag, 3 loss not finite, 4 no data, disk or device, 5 another process has it.
"""

import argparse
import io
import math
import os
import sys
from functools import partial
from pathlib import Path
from time import perf_counter as clock

import torch
import torch.nn.functional as F
from torch import Tensor, optim

import data
from model import ResNet

# The settings decide the result: they stand in every line of the log and make the run's name.
SETTINGS = "optimizer lr0 bs step gamma momentum betas wd iters seed data precision".split()
HEADER = ",".join(SETTINGS) + ",device,torch,iteration,lr,loss,test_acc,seconds\n"
SAVE_EVERY = 30  # seconds, by the clock, between checkpoints; each has a line on the screen

OPTIMIZERS = {  # on CUDA, `fused` is faster, and a recorded iteration needs `capturable`
    "sgd": lambda args, cuda: (optim.SGD, dict(momentum=args.momentum, fused=cuda)),
    "adam": lambda args, cuda: (optim.Adam, dict(betas=args.betas, fused=cuda, capturable=cuda)),
    "adagrad": lambda args, cuda: (optim.Adagrad, {}),  # a replay counts no steps; none is needed
    # Averaged SGD, though the report calls it "accelerated"; it averages from step t0 on.
    "asgd": lambda args, cuda: (optim.ASGD, dict(lambd=1e-4, alpha=0.75, t0=1e6, capturable=cuda)),
}


def fail(message, status: int = 1):
    """End the program with one line on stderr."""
    print("train.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


# ---- settings ------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; their defaults are the report's best row (Tables 3 and 8)."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = partial(fail, status=2)
    add = parser.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="one of the report's four")
    add("--lr", type=float, default=0.3, dest="lr0", help="initial learning rate")
    add("--bs", type=int, default=128, help="batch size")
    add("--step", type=int, default=8000, help="iterations between two decays")
    add("--gamma", type=float, default=0.2, help="factor of each decay")
    add("--momentum", type=float, default=0.9, help="of sgd alone")
    add("--betas", type=float, nargs=2, default=[0.7, 0.7], help="of adam alone")
    add("--wd", type=float, default=1e-4, help="weight decay, added to the gradient")
    add("--iters", type=int, default=32000, help="iterations, not epochs")
    add("--seed", type=int, default=0, help="of weights, order, crops and flips")
    add("--data", default="./data", help="folder of CIFAR-10, or `synthetic`")
    add("--precision", choices=["fp32", "tf32"], default="tf32", help="of convolutions on CUDA")
    add("--logs", type=Path, default="./logs", help="folder for the run's files")
    add("--device", choices=["cuda", "mps", "cpu"], help="None: the first of them that is there")
    add("--no-graph", action="store_true", help="on CUDA, record no iteration")
    add("--log-every", type=int, default=100, help="iterations between lines of the log")
    add("--eval-every", type=int, default=1000, help="iterations between evaluations")
    add("--eval", type=Path, metavar="FILE", help="weights to test; trains nothing")
    args = parser.parse_args(argv)
    if min(args.bs, args.step, args.iters, args.log_every, args.eval_every) < 1:
        parser.error("--bs, --step, --iters, --log-every and --eval-every must be 1 or more")
    if not all(0 <= x < 1e18 for x in (args.lr0, args.wd, args.seed)):  # refuses nan and inf, too
        parser.error("--lr, --wd and --seed must be from 0 to below 1e18")
    if not (0 <= args.gamma <= 1 and all(0 <= x < 1 for x in (args.momentum, *args.betas))):
        parser.error("--gamma must be from 0 to 1, --momentum and --betas from 0 to below 1")
    return args


def make_config(args: argparse.Namespace) -> dict:
    """SETTINGS with their values; "" where the optimizer has no such setting."""
    config = {name: getattr(args, name) for name in SETTINGS}
    config["momentum"] = args.momentum if args.optimizer == "sgd" else ""
    config["betas"] = "{} {}".format(*args.betas) if args.optimizer == "adam" else ""
    config["data"] = "synthetic" if args.data == "synthetic" else "cifar10"
    return config


def run_files(args: argparse.Namespace) -> list[Path]:
    """The run's log, weights and checkpoint: NAME has every setting that is not the default."""
    config, default = make_config(args), make_config(parse_args(["--optimizer", args.optimizer]))
    name = "{optimizer}_lr{lr0}_bs{bs}_step{step}".format(**config)
    for setting in ("gamma", "momentum", "betas", "wd", "iters", "data", "precision"):
        if config[setting] != default[setting]:
            name += f"_{'' if setting in ('data', 'precision') else setting}{config[setting]}"
    name = f"{name}_seed{args.seed}".replace(" ", "-")
    return [args.logs / f"{name}.{ending}" for ending in ("csv", "pt", "ckpt")]


def open_device(name: str | None, precision: str) -> tuple[torch.device, str, str]:
    """The device, its processor's name, the precision that it has; OSError if it cannot be used."""
    # This also counts a GPU whose driver is too old: to train on the CPU would hide that.
    name = name or next(x for x in ("cuda", "mps", "cpu") if getattr(torch, x).device_count())
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise OSError(f"cannot use {name}, try --device cpu ({error})") from error
    device = torch.device(name)
    if name != "cuda":
        return device, name if name == "mps" else f"cpu {torch.get_num_threads()} threads", "fp32"
    tf32 = precision == "tf32" and torch.cuda.get_device_capability() >= (8, 0)
    torch.backends.cudnn.benchmark = True  # measure which convolutions are the fastest
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # an environment variable can switch it on
    torch.cuda.set_stream(torch.cuda.Stream())  # as the default stream cannot be recorded
    return device, torch.cuda.get_device_name().replace(",", ""), "tf32" if tf32 else "fp32"


# ---- one iteration -------------------------------------------------------------------------------
def train_batch(model, optimizer, padded: Tensor, labels: Tensor, plan: Tensor) -> Tensor:
    """Forward, loss, backward, update on a plan's images, int64 [4, b] -> mean loss, float32 []"""
    loss = F.cross_entropy(model(data.augment(padded, plan)), labels[plan[0]])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class RecordedBatch:
    """train_batch as a CUDA graph: its hundreds of kernels, recorded once, are launched as one.

    A recording computes nothing; a replay runs the same kernels on the same memory. So a plan is
    copied to where the recording read it, and each new learning rate needs a new recording.
    """

    def __init__(self, train_plan, optimizer: optim.Optimizer, batch_size: int):
        self.train_plan, self.optimizer, self.batch_size = train_plan, optimizer, batch_size
        self.calls, self.lr = 0, None  # the learning rate of the recording

    def __call__(self, plan: Tensor) -> Tensor:
        """As train_batch; but the next call overwrites the loss that this one returns."""
        self.calls += 1  # the first three are plain: libraries choose and allocate what they need
        if self.calls <= 3 or plan.shape[1] < self.batch_size:
            return self.train_plan(plan)
        lr = self.optimizer.param_groups[0]["lr"]
        if lr != self.lr:
            self.lr, self.plan, self.graph = lr, plan.clone(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.loss = self.train_plan(self.plan)
            except RuntimeError as error:
                raise RuntimeError(f"cannot record it ({error}): use --no-graph") from error
        self.plan.copy_(plan)
        self.graph.replay()
        return self.loss


def build(args: argparse.Namespace, split: data.Split):
    """The network with the weights of its seed, its optimizer, and train_batch for a plan alone."""
    device = split.labels.device
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    model = ResNet().to(device, memory_format=data.layout(device))
    kind, options = OPTIMIZERS[args.optimizer](args, cuda)
    optimizer = kind(model.parameters(), lr=args.lr0, weight_decay=args.wd, **options)
    train_plan = partial(train_batch, model, optimizer, data.pad(split.images), split.labels)
    if cuda and not args.no_graph:
        train_plan = RecordedBatch(train_plan, optimizer, args.bs)
    return model, optimizer, train_plan


@torch.no_grad()
def evaluate(model: ResNet, split: data.Split) -> Tensor:
    """Whether each image is classified correctly: bool [n]"""
    model.eval()  # batch norm with its running statistics
    batches = zip(split.images.split(1000), split.labels.split(1000))
    correct = [model(data.scale(images)).argmax(1) == labels for images, labels in batches]
    model.train()
    return torch.cat(correct)


# ---- files ---------------------------------------------------------------------------------------
def save(path: Path, content: bytes | dict) -> None:
    """Write a file; whenever it is stopped, `path` holds the old content or the new, whole."""
    if isinstance(content, dict):
        buffer = io.BytesIO()  # straight to a file, a full disk would be no OSError
        torch.save(content, buffer)
        content = buffer.getvalue()
    new = path.with_suffix(".tmp")
    new.write_bytes(content)
    with open(new, "rb+") as file:
        os.fsync(file)  # on disk before it replaces the old one
    os.replace(new, path)


def load(path: Path, model: ResNet) -> dict:
    """The dict that `save` wrote, its weights copied into `model`; ends if it is damaged."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        return saved
    except Exception as error:  # damage may raise anything
        fail(f"cannot use {path} ({error!r:.200})")


def is_complete(log_path: Path) -> bool:
    """Whether the log ends with a whole line of the last iteration, with a test accuracy."""
    text = log_path.read_text(errors="replace") if log_path.exists() else ""
    last = text.splitlines()[-1] if text.endswith("\n") else ""  # without, it is cut off
    line = dict(zip(HEADER.split(","), last.split(",")))
    return bool(line.get("test_acc")) and line["iteration"] == line["iters"]


def lock(file) -> None:
    """Take a file for this process until it is closed; ends the program if another one has it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training {file.name}", 5)
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: a second process is not noticed


# ---- a run ---------------------------------------------------------------------------------------
def resume(path: Path, log, config: dict, model: ResNet, optimizer: optim.Optimizer) -> dict:
    """Bring network, optimizer and log to where the checkpoint is; a new run first saves one."""
    if not path.exists():
        if log.tell() > len(HEADER):  # its lines are work
            fail(f"{log.name} has no checkpoint; move it away to train it again")
        run = {"config": config, "iteration": 0, "logged": 0, "loss_sum": 0.0, "seconds": 0.0}
        run |= {"lines": HEADER, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(path, run)
    run = load(path, model)
    if other := dict(run["config"].items() - config.items()):
        fail(f"{path} is of {other}: continue it there, by --device, or move it away")
    optimizer.load_state_dict(run["optimizer"])
    log.truncate(0)
    log.write(run["lines"])
    return run


def train(args: argparse.Namespace) -> None:
    """Train the run that the flags describe, or continue it, or say that it is complete."""
    log_path, weights_path, ckpt_path = run_files(args)
    if is_complete(log_path):
        ckpt_path.unlink(missing_ok=True)
        return print(f"{log_path} is complete; move it away to train it again")
    device, processor, precision = open_device(args.device, args.precision)
    print(f"{log_path.stem} on {processor}", flush=True)
    train_split, test_split = data.load(args.data, device)
    if args.bs > len(train_split.labels):
        fail(f"--bs {args.bs} is more than the {len(train_split.labels)} training images", 2)
    model, optimizer, train_plan = build(args, train_split)
    config = make_config(args) | {"precision": precision, "device": device.type}  # as it is used
    constant = ",".join([*(str(config[name]) for name in SETTINGS), processor, torch.__version__])

    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "a", buffering=1, newline="") as log:  # each line is written at once
        lock(log)
        if is_complete(log_path):  # since this process first looked
            fail(f"another process has completed {log_path}", 5)
        run = resume(ckpt_path, log, config, model, optimizer)
        start, saved_at = run["iteration"], clock()
        print(f"from iteration {start} of {args.iters}", flush=True)
        began = clock() - run["seconds"]  # so that clock() - began is the time of training
        loss_sum = torch.tensor(run["loss_sum"], device=device)  # since the last line of the log
        plans = data.plans(train_split, args.bs, args.seed, start)

        for t, plan in zip(range(start, args.iters), plans):
            lr = args.lr0 * args.gamma ** (t // args.step)  # report, Decay step
            optimizer.param_groups[0]["lr"] = lr
            loss_sum += train_plan(plan)

            done = t + 1
            testing = done == args.iters or done % args.eval_every == 0
            logging = testing or done % args.log_every == 0
            saving = done < args.iters and clock() - saved_at >= SAVE_EVERY
            if not (logging or saving):
                continue
            loss = loss_sum.item() / (done - run["logged"])  # waits for the device
            run |= {"iteration": done, "seconds": clock() - began}
            minutes = round(run["seconds"] / done * (args.iters - done) / 60)
            next_up = "testing" if testing else f"{minutes // 60} h {minutes % 60} min left"
            print(f"{done}/{args.iters}  loss {loss:.4f}  {next_up}", flush=True)
            if logging:
                accuracy = ""
                if testing and math.isfinite(loss):
                    accuracy = f"{100 * evaluate(model, test_split).float().mean():.2f}"
                    print(f"{done}/{args.iters}  test {accuracy} %", flush=True)
                line = f"{constant},{done},{lr:.6g},{loss:.6f},{accuracy},{run['seconds']:.2f}\n"
                if done < args.iters or not accuracy:  # a complete log comes after the weights
                    log.write(line)
                if not math.isfinite(loss):  # no checkpoint has this line: each start ends here
                    fail(f"loss {loss} at iteration {done}: try a lower --lr", 3)
                run |= {"logged": done, "lines": run["lines"] + line}
                loss_sum.zero_()
            if saving:
                run |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save(ckpt_path, run | {"loss_sum": loss_sum.item()})
                saved_at = clock()
            began = clock() - run["seconds"]  # this pause was no training

    model.to("cpu", memory_format=torch.contiguous_format)  # as other programs expect weights
    save(weights_path, {"config": config, "model": model.state_dict()})
    save(log_path, run["lines"].encode())  # whole, whatever happened to the file meanwhile
    ckpt_path.unlink(missing_ok=True)
    print(f"{run['seconds']:.0f} s of training; log {log_path}, weights {weights_path}")


def test(args: argparse.Namespace) -> None:
    """Print the accuracy of the weights in a file, overall and by class."""
    model = ResNet()
    config = load(args.eval, model)["config"]
    if config["data"] != make_config(args)["data"]:
        fail(f"{args.eval} was trained on other images ({config['data']}) than --data names")
    device, processor, _ = open_device(args.device, config["precision"])
    print(f"{args.eval.stem} on {processor}", flush=True)
    _, split = data.load(args.data, device)
    correct = evaluate(model.to(device, memory_format=data.layout(device)), split).float()
    print(f"{100 * correct.mean():.2f} % of {len(correct):,} test images")
    for label, name in enumerate(data.CLASSES):
        print(f"{name:<10} {100 * correct[split.labels == label].mean():6.2f} %")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        test(args) if args.eval else train(args)
    except KeyboardInterrupt:  # nothing to save
        *_, ckpt_path = run_files(args)
        start = load(ckpt_path, ResNet())["iteration"] if ckpt_path.exists() else 0
        more = "" if args.eval else f"; the same command continues from iteration {start}"
        fail(f"stopped{more}", 130)
    except OSError as error:
        fail(error, 4)
    except (MemoryError, RuntimeError) as error:
        if not any(x in repr(error).lower() for x in ("alloc", "out of memory", "memoryerror")):
            raise  # most are bugs, but a CPU has no error of its own for memory
        fail("out of memory, a smaller --bs needs less")


if __name__ == "__main__":
    main()

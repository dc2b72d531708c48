"""All tests. They need no GPU, network or data set, and do more with CUDA or CIFAR-10 in ./data."""

import csv
import itertools
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, default_int_handler, raise_signal, signal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF

import bench
import data
import model
import report
import train

torch.set_num_threads(1)  # the tests' own processes share the cores, and small batches need no more
os.environ["COLUMNS"] = "80"  # however wide the terminal is

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adam", "adagrad", "asgd")
FILES = HERE / "data" / CIFAR10.base_folder
needs_cifar10 = pytest.mark.skipif(not FILES.exists(), reason="no CIFAR-10 in ./data")


# ---- the command line, run in fresh processes ----------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")
# Fork from a server that has imported PyTorch; it must not ask for CUDA, or forks cannot use it.
FORKS.set_forkserver_preload(["test_model"])


def ten_images(*args, load=data.load) -> list[data.Split]:
    """What data.load gives, cut to what is enough here."""
    return [data.Split(images[:10], labels[:10]) for images, labels in load(*args)]


def run_main(folder: Path, argv: list[str], hook) -> None:
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.dont_write_bytecode = True  # which replaces files too: see `at`
    data.load = ten_images
    sys.argv = ["train.py", *argv]
    if hook:
        hook[0](*hook[1:])
    train.main()


def call(folder: Path, *argv, hook=None) -> SimpleNamespace:
    """Run train.py in `folder`; `hook` is a function to call before it, and its arguments."""
    process = FORKS.Process(target=run_main, args=(folder, [*map(str, argv)], hook), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still running after two minutes"
    out, err = ((folder / name).read_bytes().decode() for name in ("stdout", "stderr"))
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def at(event: str, name: str, count: int, function, *args) -> None:
    """Call function(*args) at the count-th event, as in sys.setprofile, of the function `name`."""
    seen = itertools.count(1)

    def look(frame, kind, called):
        called_name = called.__qualname__ if kind.startswith("c_") else frame.f_code.co_name
        if (kind, called_name) == (event, name) and next(seen) == count:
            function(*args)

    sys.setprofile(look)


SHORT = """--data synthetic --device cpu --bs 4 --step 3 --iters 5 --seed 1
--log-every 2 --eval-every 4 --ckpt-every 0""".split()
NAME = "sgd_lr0.3_bs4_step3_iters5_synthetic_seed1"


def assert_one_line_error(result: SimpleNamespace, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert re.fullmatch(r"train\.py: [^\n]+\n", result.err), result.err
    assert all(word in result.err for word in words), result.err


def read_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def outcome(folder: Path) -> dict[str, bytes]:
    """The files of LOGS: weights as they are, logs without their last column, the seconds."""
    files = {path.name: path.read_bytes() for path in (folder / "logs").iterdir()}
    logs = {name: text for name, text in files.items() if name.endswith(".csv")}
    return {**files, **{name: re.sub(rb",[^,\n]*\n", b"\n", logs[name]) for name in logs}}


# ---- the network (report, Model Architecture) ----------------------------------------------------


def test_network():
    network = model.ResNet()
    counts = {name: model.count_parameters(child) for name, child in network.named_children()}
    assert counts == {"stem": 928, "layer1": 55_680, "layer2": 427_648, "layer3": 1_116_416,
                      "layer4": 3_280_384, "pool": 0, "linear": 2_570}  # fmt: skip
    assert model.count_parameters(network) == 4_883_626
    assert model.count_parameters(model.ResNet(project_layer1=True)) == 4_886_890
    shapes = []
    for child in network.children():
        child.register_forward_hook(lambda module, inputs, output: shapes.append([*output.shape]))
    network(torch.rand(2, 3, 32, 32))
    assert shapes == [[2, 32, 32, 32], [2, 32, 32, 32], [2, 64, 16, 16], [2, 128, 8, 8],
                      [2, 256, 4, 4], [2, 256, 1, 1], [2, 10]]  # fmt: skip
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    for block in (block for layer in layers for block in layer):
        down = block in [layer[0] for layer in layers[1:]]
        assert block.conv1[0].stride == ((2, 2) if down else (1, 1))
        assert block.conv2[0].stride == (1, 1)
        assert isinstance(block.skip, torch.nn.Sequential if down else torch.nn.Identity)


def test_block_adds_its_skip():
    x = torch.randn(2, 8, 5, 5)
    for block in (model.BasicBlock(8, 8), model.BasicBlock(8, 16, stride=2, project=True)):
        block.eval()
        torch.nn.init.zeros_(block.conv2[0].weight)  # the residual branch now gives zero
        assert torch.equal(block(x), block.skip(x).relu())


def test_no_bias_but_the_linear_one_and_default_initialisation():
    network = model.ResNet()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # Kaiming uniform with a = sqrt(5)
            assert module.bias is None and 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert network.linear.bias.shape == (10,)


# ---- the data ------------------------------------------------------------------------------------


def images_and_labels(n: int) -> data.Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.Split(images, torch.randint(10, (n,), generator=generator))


def test_augmentation_equals_torchvision_to_the_bit():
    images = images_and_labels(162).images
    cases = torch.tensor([*itertools.product(range(9), range(9), range(2))]).T
    plan = torch.cat([torch.randperm(162)[None], cases])
    batch = data.augment(data.crop_windows(images), plan)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (index, top, left, flip) in zip(batch, plan.T.tolist()):
        expected = TF.crop(TF.pad(TF.to_pil_image(images[index]), 4), top, left, 32, 32)
        assert torch.equal(ours, TF.to_tensor(TF.hflip(expected) if flip else expected))
    every = torch.arange(256, dtype=torch.uint8).expand(3, 16, 256)
    assert torch.equal(data.scale(every[None])[0], TF.to_tensor(TF.to_pil_image(every)))


def test_augmentation_is_uniform():
    plans = [data.epoch_plan(images_and_labels(50_000), seed=3, epoch=e) for e in range(4)]
    _, top, left, flip = torch.cat(plans, dim=1)
    # Every combination of an image, and every pair of images or epochs, is as frequent as another.
    for values, cells in ((18 * top + 2 * left + flip, 162), (9 * top[:-1:2] + top[1::2], 81),
                          (9 * plans[0][1] + plans[1][1], 81)):  # fmt: skip
        expected = len(values) / cells
        chi_square = ((values.bincount(minlength=cells) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - cells + 1) < 4 * math.sqrt(2 * cells)


def test_epoch_shows_each_image_once_in_an_order_of_its_own():
    split, state = images_and_labels(1000), torch.get_rng_state()
    plan = data.epoch_plan(split, seed=0, epoch=0)
    assert plan.shape == (4, 1000) and plan.dtype == torch.int64
    assert torch.equal(plan[0].sort().values, torch.arange(1000))
    assert torch.equal(plan, data.epoch_plan(split, seed=0, epoch=0))
    # A generator keeps 32 bits of its seed: (seed << 32) + epoch would be the same for every seed.
    others = [(0, 1), (1, 0), (2, 1), (1, 2), (2**32 - 1, 0)]
    plans = [plan] + [data.epoch_plan(split, *pair) for pair in others]
    for a, b in itertools.combinations(plans, 2):
        assert all((a[row] != b[row]).float().mean() > 0.3 for row in range(4))
    assert torch.equal(state, torch.get_rng_state())  # the generator of the weights is left alone


def test_synthetic_images_are_learnable():
    (images, labels), (test_images, test_labels) = data.load("synthetic", CPU)
    assert images.shape == (1000, 3, 32, 32) and labels.bincount().tolist() == [100] * 10
    means = torch.stack([images[labels == label].float().mean(0) for label in range(10)])
    nearest = torch.cdist(test_images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.95


def test_data_errors(tmp_path, monkeypatch):
    fetch = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    with pytest.raises(data.DataError, match="download failed: unpack .*no network"):
        data.load(str(tmp_path / "data"), CPU)
    assert not list(tmp_path.iterdir())
    with pytest.raises(data.DataError, match="mean --data synthetic"):
        data.load(str(tmp_path / "syntetic"), CPU)
    with pytest.raises(data.DataError, match=f"use --data {tmp_path}$"):
        data.load(str(tmp_path / CIFAR10.base_folder), CPU)
    damaged = tmp_path / CIFAR10.base_folder / "data_batch_1"
    damaged.parent.mkdir()
    damaged.write_bytes(b"damaged")
    with pytest.raises(data.DataError, match="delete it.*checksums are wrong"):
        data.load(str(tmp_path), CPU)
    assert damaged.read_bytes() == b"damaged"


def test_download_is_moved_into_place_whole(tmp_path, monkeypatch):
    class Fetched(CIFAR10):
        def __init__(self, root, train=True, download=False):
            if download:
                assert not (tmp_path / "data").exists()
                Path(root, self.base_folder, "part").mkdir(parents=True)
            assert Path(root, self.base_folder, "part").exists()
            self.data, self.targets = torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy(), [3, 7]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fetched)
    training, _ = data.load(str(tmp_path / "data"), CPU)
    assert training.images.shape == (2, 3, 32, 32) and training.labels.tolist() == [3, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@needs_cifar10
def test_real_cifar10():
    for n, train_set, split in zip((5000, 1000), (True, False), data.load(HERE / "data", CPU)):
        assert split.labels.bincount().tolist() == [n] * 10
        image, label = CIFAR10(HERE / "data", train_set)[4321]
        assert torch.equal(data.scale(split.images[4321:4322])[0], TF.to_tensor(image))
        assert split.labels[4321] == label


def test_figure_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"data.py --data synthetic --out {tmp_path}/1.png".split())
    data.main()
    assert ", ".join(data.CLASSES) in capsys.readouterr().out
    picture = TF.to_tensor(Image.open(tmp_path / "1.png"))[:, ::2, ::2]  # drawn twice as large
    assert picture.shape == (3, 2 * (4 * 34 + 2), 10 * 34 + 2)  # each with a border of two pixels
    images, labels = data.load("synthetic", CPU)[0]
    for label in range(10):
        column = picture[:, :, 34 * label + 2 :][:, :, :32]
        assert torch.equal(column[:, 2:34], data.scale(images[labels == label][0]))


# ---- settings ------------------------------------------------------------------------------------


def config(*argv: str) -> dict:
    return train.settings(train.parse_args([*map(str, argv)]))


def test_defaults_are_the_reports():
    assert config() == {"optimizer": "sgd", "lr0": 0.3, "bs": 128, "step": 8000, "gamma": 0.2,
                        "momentum": 0.9, "betas": "", "wd": 1e-4, "iters": 32_000, "seed": 0,
                        "data": "cifar10", "precision": "tf32"}  # fmt: skip
    assert config("--optimizer", "adam")["betas"] == "0.7 0.7"
    for key, value in report.REPORT.items():
        assert value == str(config("--optimizer", "adam")[key] or config()[key])


def test_name_tells_every_setting():
    assert train.run_name(config()) == "sgd_lr0.3_bs128_step8000_seed0"
    name = train.run_name(config("--step", 10_000, "--iters", 64_000, "--precision", "bf16"))
    assert name == "sgd_lr0.3_bs128_step10000_iters64000_bf16_seed0"
    adam = ("--optimizer", "adam", "--betas", 0.9, 0.999)
    assert train.run_name(config(*adam)) == "adam_lr0.3_bs128_step8000_betas0.9-0.999_seed0"
    changes = ["--optimizer asgd", "--lr 0.1", "--lr 0.30000001", "--bs 64", "--step 5000",
               "--gamma 0.5", "--momentum 0.8", "--wd 0", "--iters 100", "--seed 1",
               "--data synthetic", "--precision fp32"]  # fmt: skip
    names = {train.run_name(config(*change.split())) for change in changes}
    assert len(names | {train.run_name(config())}) == len(changes) + 1
    # What an optimizer does not have changes neither its configuration nor its name.
    assert config("--betas", 0.5, 0.5) == config()
    assert config(*adam, "--momentum", 0.5) == config(*adam)


BAD_FLAGS = [
    "--lr abc", "--lr nan", "--lr inf", "--lr -1", "--lr=", "--bs 0", "--bs 1.5", "--step 0",
    "--iters 1e3", "--gamma 1.1", "--momentum 2", "--betas 0.9", "--betas 0.9 1", "--betas nan 0",
    "--wd -1e-4", "--seed -1", f"--seed {2**32}", "--log-every 0", "--eval-every 0",
    "--ckpt-every -1", "--optimizer lion", "--precision fp8", "--device tpu", "--device cuda:x",
    "--learning-rate 0.1", "--optim sgd", "--epochs 9", "--batch-size 4", "stray",
]  # fmt: skip
HINTS = dict(zip(BAD_FLAGS[-5:], ("--lr", "--optimizer", "--iters", "--bs")))


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_args(flags.split())
    assert error.value.code == 2
    end = rf"did you mean {HINTS[flags]}\? " if flags in HINTS else ""
    assert re.fullmatch(rf"train\.py: [^\n]+{end}\(--help\)\n", capsys.readouterr().err)


# ---- training ------------------------------------------------------------------------------------


def test_optimizers_are_pytorchs_with_the_reports_settings():
    l2 = {"weight_decay": 1e-4, "lr": 0.3}  # added to the gradient in all four
    for name, kind, group in (
        ("sgd", torch.optim.SGD, l2 | {"momentum": 0.9, "dampening": 0, "nesterov": False}),
        ("adam", torch.optim.Adam, l2 | {"betas": (0.7, 0.7), "eps": 1e-8, "amsgrad": False}),
        ("adagrad", torch.optim.Adagrad, l2 | {"lr_decay": 0, "eps": 1e-10}),
        ("asgd", torch.optim.ASGD, l2 | {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}),
    ):
        network, optimizer = train.build(config("--optimizer", name), CPU)
        assert type(optimizer) is kind and not optimizer.defaults.get("decoupled_weight_decay")
        assert optimizer.param_groups[0].items() >= group.items()
        assert len(optimizer.param_groups[0]["params"]) == len(list(network.parameters()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders in which SHORT ran to its end, by optimizer."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in OPTIMIZERS}
    for optimizer, folder in folders.items():
        result = call(folder, *SHORT, "--optimizer", optimizer)
        assert result.code == 0, result.err
    return folders


@pytest.mark.parametrize("where", ["synthetic", pytest.param(HERE / "data", marks=needs_cifar10)])
def test_log_and_weights_against_a_recomputation(where, tmp_path):
    """Losses, accuracies, a decay of the learning rate, and an epoch's short last batch."""
    assert call(tmp_path, *SHORT, "--data", where).code == 0
    name = NAME if where == "synthetic" else NAME.replace("_synthetic", "")
    training, test = ten_images(where, CPU)
    torch.manual_seed(1)
    network = model.ResNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    plans = [data.epoch_plan(training, seed=1, epoch=epoch) for epoch in (0, 1)]
    losses, accuracy = [], {}
    for t, batch in enumerate((plans[0].split(4, dim=1) + plans[1].split(4, dim=1))[:5]):
        optimizer.param_groups[0]["lr"] = 0.3 if t < 3 else 0.06
        images = data.augment(data.crop_windows(training.images), batch)
        loss = F.cross_entropy(network(images), training.labels[batch[0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            guess = network.eval()(data.scale(test.images)).argmax(1)
        network.train()
        accuracy[t + 1] = f"{100 * (guess == test.labels).float().mean():.2f}"
    rows = read_rows(tmp_path / "logs" / f"{name}.csv")
    columns = "optimizer lr0 bs step gamma momentum betas wd iters seed data precision device torch"
    assert [*rows[0]] == [*columns.split(), "iteration", "lr", "loss", "test_acc", "seconds"]
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]
    assert [row["lr"] for row in rows] == ["0.3", "0.06", "0.06"]
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert [row["test_acc"] for row in rows] == ["", accuracy[4], accuracy[5]]
    constant = {**config(*SHORT, "--data", where), "device": "cpu", "torch": torch.__version__}
    for row in rows:
        assert {key: row[key] for key in constant} == {k: str(v) for k, v in constant.items()}
    saved = torch.load(tmp_path / "logs" / f"{name}.pt", weights_only=True)
    assert saved["config"] == config(*SHORT, "--data", where)
    assert all(torch.equal(saved["model"][k], value) for k, value in network.state_dict().items())


# When, for `at`, and the signal. With a checkpoint at each row the files replaced are: ckpt at 0, 2
# and 4, then the weights. One Tensor.backward returns twice, as it calls another.
KILLS = [("c_call", "replace", 1, SIGKILL), ("call", "zero_grad", 2, SIGKILL),
         ("c_call", "replace", 2, SIGKILL), ("return", "backward", 2, SIGTERM),
         ("c_return", "replace", 3, SIGKILL), ("call", "zero_grad", 1, SIGINT),
         ("call", "evaluate", 1, SIGINT), ("c_return", "replace", 2, SIGKILL),
         ("c_call", "unlink", 1, SIGKILL)]  # fmt: skip
KILL_AT_TWO = (at, "c_return", "replace", 2, raise_signal, SIGKILL)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_started_again_it_ends_as_if_undisturbed(optimizer, undisturbed, tmp_path):
    flags = (*SHORT, "--optimizer", optimizer)
    for *moment, number in KILLS:
        result = call(tmp_path, *flags, hook=(at, *moment, raise_signal, number))
        assert (result.code, result.err) == (-number, ""), moment
    result = call(tmp_path, *flags, hook=(at, "call", "open_device", 1, raise_signal, SIGKILL))
    assert result.code == 0 and "is complete" in result.out
    assert outcome(tmp_path) == outcome(undisturbed[optimizer])


def test_truncated_log_is_not_complete_and_not_thrown_away(undisturbed, tmp_path):
    shutil.copytree(undisturbed["sgd"] / "logs", tmp_path / "logs")
    log = tmp_path / "logs" / f"{NAME}.csv"
    whole = log.read_text()
    assert train.is_complete(log)
    for length in (0, 300, whole.rindex("cpu"), whole.rindex(",") - 1, whole.rindex(",") + 1):
        log.write_text(whole[:length])
        assert not train.is_complete(log)
    assert_one_line_error(call(tmp_path, *SHORT), 1, "delete it")
    assert log.read_text() == whole[:length]


def slow_clock(columns: int) -> None:
    """Each look at this process's clock adds 25 s; each step's preparation, evaluation or save adds
    10,000 s, which are no training. With `columns`, stdout passes for a terminal that wide."""
    looks, pauses, make_step = itertools.count(step=25), [], train.make_step
    train.time.perf_counter = lambda: next(looks) + 10_000 * len(pauses)

    def paused(function, preparation=None):
        def slower(*args, **named):
            pauses.append(function)
            result = function(*args, **named)
            return preparation or result

        return slower

    train.evaluate, train.save = paused(train.evaluate), paused(train.save)
    train.make_step = lambda *args: paused(make_step(*args), preparation=10_000)
    os.environ["COLUMNS"] = str(columns or 80)
    sys.stdout.isatty = lambda: columns > 0


@pytest.mark.parametrize("columns", [0, 30])
def test_progress_and_the_seconds_of_training_alone(columns, tmp_path):
    out = call(tmp_path, *SHORT, "--ckpt-every", 60, hook=(slow_clock, columns)).out
    lines = [line for line in re.split(r"(?<=[\r\n])", out) if re.match(r"\d/5 ", line)]
    assert [line[0] for line in lines] == [*("12345" if columns else "245")]  # once a minute
    assert [line[-1] for line in lines] == [*("\r\r\r\n\n" if columns else "\n\n\n")]
    assert {len(line) for line in lines} == {columns or 80}
    first = "1/5  " if columns else r"2/5  loss [\d.]+  "
    assert re.match(rf"{first}\d images/s  \d+ min left *[\r\n]", lines[0])
    assert columns or re.match(r"4/5  loss [\d.]+  test [\d.]+ %  \d images/s  ", lines[1])
    seconds = [float(row["seconds"]) for row in read_rows(tmp_path / "logs" / f"{NAME}.csv")]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < 10_000


def test_eval_gives_the_logged_accuracy(undisturbed):
    folder = undisturbed["sgd"]
    result = call(folder, "--eval", f"logs/{NAME}.pt", "--device", "cpu")  # data as trained on
    logged = read_rows(folder / "logs" / f"{NAME}.csv")[-1]["test_acc"]
    assert result.code == 0 and f"{NAME}: {logged} %\n" in result.out
    by_class = re.findall(r"^(\w+) +([\d.]+) %$", result.out, re.M)
    assert tuple(name for name, _ in by_class) == data.CLASSES
    assert sum(float(value) for _, value in by_class) == pytest.approx(10 * float(logged), abs=0.1)


def test_divergence_is_logged_and_exits_with_3(tmp_path):
    flags = "--data synthetic --bs 4 --lr 1e9 --iters 5 --device cpu".split()
    for _ in range(2):  # a log that ends in nan is not complete: the run fails again
        assert_one_line_error(call(tmp_path, *flags), 3, "loss nan at iteration 5", "lower --lr")
        (log,) = (tmp_path / "logs").glob("*.csv")
        assert [(row["loss"], row["test_acc"]) for row in read_rows(log)] == [("nan", "")]
    assert not list((tmp_path / "logs").glob("*.pt"))


def test_what_cannot_start_writes_nothing(tmp_path):
    absent = "cuda" if sys.platform == "darwin" else "mps"
    assert_one_line_error(call(tmp_path, *SHORT, "--device", absent), 1, f"no {absent} device")
    assert_one_line_error(call(tmp_path, *SHORT, "--compile"), 1, "--compile needs")
    assert_one_line_error(call(tmp_path, "--eval", "none.pt"), 1, "there is no file none.pt\n")
    (tmp_path / "data" / CIFAR10.base_folder).mkdir(parents=True)
    assert_one_line_error(call(tmp_path, "--device", "cpu"), 1, CIFAR10.base_folder, "synthetic")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").touch()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "logs")


def test_bad_checkpoints_and_weights(tmp_path):
    call(tmp_path, *SHORT, hook=KILL_AT_TWO)
    ckpt = tmp_path / "logs" / f"{NAME}.ckpt"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    content, saved = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    middle = len(content) // 2  # of the weights, where only a checksum sees a change
    for kind, bad in {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "pickle": pickle.dumps(bomb),
        "pickle in a zip": {"config": bomb, "model": {}},
        "foreign": [1, 2, 3],
        "network": {**saved, "model": model.ResNet(project_layer1=True).state_dict()},
        "configuration": {**saved, "config": config("--lr", 0.1)},
    }.items():
        ckpt.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, ckpt)
        before = outcome(tmp_path)
        assert_one_line_error(call(tmp_path, *SHORT), 1, f"cannot use logs/{NAME}.ckpt")
        if kind != "configuration":  # --eval takes any
            assert_one_line_error(call(tmp_path, "--eval", ckpt), 1, f"cannot use {ckpt}")
        assert outcome(tmp_path) == before and not (tmp_path / "exploded").exists()
    torch.save({**saved, "seconds": 1e6}, ckpt)
    assert call(tmp_path, *SHORT).code == 0
    assert float(read_rows(tmp_path / "logs" / f"{NAME}.csv")[-1]["seconds"]) > 1e6


def test_disk_that_takes_no_more(undisturbed, tmp_path):
    call(tmp_path, *SHORT, hook=KILL_AT_TWO)
    before = outcome(tmp_path)
    full = (resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
    assert_one_line_error(call(tmp_path, *SHORT, hook=full), 1, "File too large")
    assert outcome(tmp_path).items() >= before.items()
    assert call(tmp_path, *SHORT).code == 0  # once there is room
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


def test_second_process_on_one_configuration_stops(tmp_path):
    (tmp_path / "second").mkdir()
    flags = (*SHORT, "--iters", "1000", "--logs", tmp_path / "logs")
    first = FORKS.Process(target=run_main, args=(tmp_path, [*map(str, flags)], None), daemon=True)
    first.start()
    while not list((tmp_path / "logs").glob("*.ckpt")) and first.is_alive():
        time.sleep(0.05)
    assert_one_line_error(call(tmp_path / "second", *flags), 1, "another process is training")
    assert call(tmp_path / "second", *flags, "--iters", 1).code == 0  # another configuration may
    first.kill()


# ---- run_all.sh ----------------------------------------------------------------------------------

# As the report has them: table, accuracy, optimizer, lr, batch size, decay step, iterations.
ROWS = [line.split() for line in """\
4 60.47 adam 0.1 64 5000 32000
4 88.51 sgd 0.1 64 5000 32000
4 84.90 adagrad 0.1 64 5000 32000
4 88.95 asgd 0.1 64 5000 32000
5 88.51 sgd 0.1 64 5000 32000
5 89.31 sgd 0.3 64 5000 32000
5 87.70 sgd 0.5 64 5000 32000
6 84.96 sgd 0.3 32 5000 32000
6 89.31 sgd 0.3 64 5000 32000
6 91.07 sgd 0.3 128 5000 32000
6 90.40 sgd 0.3 256 5000 32000
7 89.83 sgd 0.3 128 4000 32000
7 91.07 sgd 0.3 128 5000 32000
7 92.65 sgd 0.3 128 8000 32000
7 92.14 sgd 0.3 128 10000 32000
extended 93.18 sgd 0.3 128 10000 64000""".splitlines()]  # fmt: skip


def commands(tables: str, n: int = 1) -> list[str]:
    """What run_all.sh is to run for these tables, shortened by n, each run once."""
    return list(dict.fromkeys(
        f"--optimizer {name} --lr {lr} --bs {bs} --step {int(step) // n} --iters {int(iters) // n}"
        + f" --log-every {math.ceil(100 / n)}" * (n > 1)
        for table, _, name, lr, bs, step, iters in ROWS if table in (tables or "4 5 6 7").split()
    ))  # fmt: skip


def script(name: str, *args, **env) -> subprocess.CompletedProcess:
    """Run a script of the project to its end."""
    env = os.environ | {"LC_ALL": "C", "OMP_NUM_THREADS": "1"} | env
    command = ["bash" if str(name).endswith("sh") else sys.executable, HERE / name, *args]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture
def stub(tmp_path):
    """An environment whose `python` only notes its arguments in `calls` and does DO."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*" >> "$CALLS"\neval "$DO"\n')
    (tmp_path / "python").chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


@pytest.mark.parametrize("tables, count", [("", 12), ("4", 4), ("5 7", 7), ("extended 6", 5)])
def test_list(tables, count, tmp_path):
    (tmp_path / "a project").symlink_to(HERE)
    flags = ["--logs", "it's a folder", "--data=a\\b$HOME"]
    for n in (1, 8, 1000):
        args = ["--list", *tables.split(), "--shorten", str(n), "--", *flags]
        lines = script(tmp_path / "a project" / "run_all.sh", *args).stdout.splitlines()
        wanted = [f"python train.py {run}".split() + flags for run in commands(tables, n)]
        assert [shlex.split(line) for line in lines] == wanted and len(lines) == count


@pytest.mark.parametrize("argument", ["8", "--lr", "", "--shorten", "--shorten 3"])
def test_run_all_usage(argument, stub, tmp_path):
    result = script("run_all.sh", "4", *(argument.split() or [""]), **stub)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert not (tmp_path / "calls").exists()


def test_failing_row_stops_the_others_only_if_all_would_fail(stub, tmp_path):
    fail = "case $* in *'--bs 32'*) exit 3; esac"
    result = script("run_all.sh", "--", "--seed", "1", "--logs=x", **stub, DO=fail)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:-1] == [f"train.py {flags} --seed 1 --logs=x" for flags in commands("")]
    assert calls[-1] == "report.py --logs=x"
    shared = "Report 88.51 % in Table 4 and Table 5: --optimizer sgd --lr 0.1 --bs 64"
    assert shared in result.stdout
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re.match(r"run_all\.sh: failed, exit 3: .*--bs 32", result.stderr)
    assert script("run_all.sh", "5", **stub, DO="exit 2").returncode == 2
    assert len((tmp_path / "calls").read_text().splitlines()) == len(calls) + 1


def test_run_all_help_and_another_shell():
    result = script("run_all.sh", "--help")
    assert result.returncode == 0 and "bash run_all.sh --shorten 10" in result.stdout
    for shell in filter(shutil.which, ("sh", "dash")):
        command = [shell, HERE / "run_all.sh", "--list", "extended"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stdout.count("python train.py") == 1 and result.returncode == 0


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_signals_end_run_all_and_the_training(number, stub, tmp_path):
    signal(SIGINT, default_int_handler)  # a background job's children would ignore it
    wait = f"case $* in *256*) touch '{tmp_path}/ready'; exec sleep 60; esac"
    command, env = ["bash", HERE / "run_all.sh"], os.environ | stub | {"DO": wait}
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    # Ctrl-C goes to all processes of a terminal, kill to one.
    (os.killpg if number == SIGINT else os.kill)(process.pid, number)
    process.communicate(timeout=10)  # ends when no process has its output open any more
    assert process.returncode == 128 + number


def test_table_on_ten_generated_images(stub, tmp_path):
    python = f"exec '{sys.executable}'"
    code = "import test_model, train; train.data.load = test_model.ten_images; train.main()"
    stub["DO"] = f'[ $1 = report.py ] && {python} "$@"; shift; {python} -c "{code}" "$@"'
    flags = "5 --shorten 1000 -- --data synthetic --device cpu --logs".split()
    first, again = (script("run_all.sh", *flags, tmp_path / "its logs", **stub) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    assert "**Our settings that are not the defaults: data synthetic.**" in first.stdout
    assert again.stdout.count("is complete") == 3  # and Tables 4 and 6 share a row each with 5:
    assert first.stdout.count(" (n = 1) |") == 5


# ---- report.py -----------------------------------------------------------------------------------


def write_log(folder, *accuracies, losses=(2.0, 1.0), name="", **settings):
    """One complete log for each accuracy, seed 0, 1, ..., with a row for each loss."""
    folder.mkdir(exist_ok=True)
    for seed, accuracy in enumerate(accuracies):
        run = config("--seed", seed) | {"step": 5000, "device": "cpu", "torch": "2.15.0"} | settings
        ends = [n * run["iters"] // len(losses) for n in range(1, len(losses) + 1)]
        rows = [[*run.values(), end, 0.1, loss, "", 3600] for end, loss in zip(ends, losses)]
        rows[-1][-2] = f"{accuracy:.2f}"
        text = "".join(",".join(map(str, row)) + "\n" for row in [train.COLUMNS, *rows])
        (folder / f"{name or '_'.join(map(str, run.values()))}.csv").write_text(text)


def page(folder):
    return report.markdown(*report.collect(folder)) + "\n"


@pytest.fixture
def all_runs(tmp_path):
    """Logs of every row with 3 seeds, whose means are the report's."""
    for _, accuracy, optimizer, lr, bs, step, iters in ROWS:
        write_log(tmp_path / "logs", *(float(accuracy) + d for d in (-0.5, 0, 0.5)),
                  losses=[2.3 / n for n in range(1, 33)], optimizer=optimizer, lr0=float(lr),
                  bs=int(bs), step=int(step), iters=int(iters))  # fmt: skip
    return tmp_path / "logs"


def test_page_of_all_rows(all_runs):
    rows = [[table, f"{reported:.2f}", *map(str, key)] for table in report.TABLES
            for _, reported, key in report.table_rows(table)]  # fmt: skip
    assert rows == [*ROWS[:-1], ["extended", *ROWS[-2][1:]], ROWS[-1]]
    text, half = page(all_runs), 2.776 * 0.5 * (2 / 3) ** 0.5  # dof 4, both deviations 0.5
    labels = ("Adam SGD Adagrad ASGD 0.1 0.3 0.5 32 64 128 256 4,000 5,000 8,000 10,000 "
              "32,000 64,000").split()  # fmt: skip
    for label, (_, accuracy, *_) in zip(labels, rows, strict=True):
        assert f"\n| {label} | {accuracy} | {accuracy} ± 0.50 (n = 3) |\n" in text
    for table, (heading, _) in report.TABLES.items():
        ranked = sorted(((float(row[1]), label) for label, row in zip(labels, rows)
                         if row[0] == table), reverse=True)  # fmt: skip
        for (high, better), (low, worse) in itertools.pairwise(ranked):
            gap = high - low
            ours = f"{gap:+.2f} ({gap - half:+.2f} to {gap + half:+.2f}) | 3, 3"
            word = "supported" if gap > half else "undecided"
            assert f"\n| {heading}: {better} > {worse} | {gap:+.2f} | {ours} | {word} |\n" in text
    assert text.count("| supported |") == 4 and text.count("| undecided |") == 8
    assert not re.search(r"left out|not the defaults:| at 1/\d", text)
    noise = " ".join(text.split())
    assert "logs hold 7 runs" in noise and "4,000 ranges from 0.66 to 0.94." in noise
    assert "is 0.0060 and 0.0038, on either side of the 0.0046 of decay step 8,000" in noise


def test_verdicts_of_few_runs(tmp_path):
    write_log(tmp_path, 80, 80.1, lr0=0.1, bs=64)
    write_log(tmp_path, 70, 70.1, lr0=0.3, bs=64)
    write_log(tmp_path, 10, lr0=0.5, bs=64)
    write_log(tmp_path, 99, 99.1, 99.2, lr0=0.3, bs=256, step=500, iters=3200)
    # dof 2, deviations sqrt(0.005): half = 4.303 * sqrt(0.005) = 0.30
    expected = """
| Learning rate: 0.3 > 0.1 | +0.80 | -10.00 (-10.30 to -9.70) | 2, 2 | contradicted |
| Learning rate: 0.1 > 0.5 | +0.81 | +70.05 | 2, 1 | undecided |
| Batch size: 128 > 256 | +0.67 |  |  | undecided |
| Batch size: 256 > 64 | +1.09 |  | 0, 2 | undecided |
"""
    assert expected in page(tmp_path)


def test_t_quantile_and_welch():
    for dof, t in ((1, 12.7062), (1.5, 6.0167), (2, 4.3027), (6, 2.4469), (30, 2.0423)):
        assert report.t_quantile(dof) == pytest.approx(t, abs=1e-4)
    # Variances 3 and 10, n = 3 and 5: squares of the standard errors 1 and 2, so
    # dof = (1 + 2)^2 / (1^2 / 2 + 2^2 / 4) = 6, and half the interval 2.4469 * sqrt(1 + 2).
    a, b = [90 - 3**0.5, 90, 90 + 3**0.5], [78, 80, 82, 84, 86]
    assert report.welch(a, b) == report.welch(b, a) == pytest.approx(2.4469 * 3**0.5, abs=1e-3)
    # With no spread in one of them, it is the other's t interval; in both, there is none.
    assert report.welch([1, 2, 3], [5, 5]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert report.welch([1.0, 1.0], [2.0, 2.0]) == report.welch(a, [1.0]) == math.inf


def test_lengths_and_settings_are_never_mixed(tmp_path):
    write_log(tmp_path, 90, name="run")
    write_log(tmp_path, 92, seed=1, torch="2.14.0")
    write_log(tmp_path, 70, 71, 72, step=500, iters=3200)
    write_log(tmp_path, 20, step=50, iters=320)
    write_log(tmp_path, 40, step=1000, iters=6400)  # 1/5, and 1/10 of the extended run
    text = page(tmp_path)
    head = "Report, % | Ours, % | Ours at 1/5, % | Ours at 1/10, % | Ours at 1/100, % |\n"
    cells = "91.07 | 91.00 ± 1.41 (n = 2) | 40.00 (n = 1) | 71.00 ± 1.00 (n = 3) | 20.00 (n = 1) |"
    assert f"| Batch size | {head}|---|--:|--:|--:|--:|--:|\n| 32 | 84.96 |  |  |  |  |\n" in text
    assert "| Iterations | Report, % |\n|---|--:|\n| 32,000 | 92.14 |\n| 64,000 | 93.18 |\n" in text
    assert " Ours: cpu, torch 2.14.0; cpu, torch 2.15.0.\n" in text and "left out" not in text
    for why, settings in (
        ("same settings and seed as run.csv", {}),
        ("other settings: gamma 0.5, momentum 0.8, betas 0.9 0.999",
         {"gamma": 0.5, "momentum": 0.8, "betas": "0.9 0.999"}),
        ("other settings: wd 0.0, data synthetic, precision bf16",
         {"wd": 0.0, "data": "synthetic", "precision": "bf16"}),
        ("not a row of the tables", {"lr0": 0.2}),
        ("not a row of the tables", {"iters": 3200}),
        ("not a row of the tables", {"step": 5000 // 3, "iters": 32000 // 3}),
    ):  # fmt: skip
        write_log(tmp_path, 50, name="z", **settings)
        text = page(tmp_path)
        assert text.count(f" | {cells}\n") == 2
        assert text.endswith(f"\n\nLogs left out:\n\n- `z.csv`: {why}\n")


def test_settings_of_most_runs_unless_the_reports_are_there(tmp_path):
    write_log(tmp_path, 20, 30, 40, lr0=0.1, bs=64, data="synthetic")
    write_log(tmp_path, 50, 60, lr0=0.1, bs=64, precision="bf16")
    write_log(tmp_path, *[70] * 9, lr0=0.7)  # in no table
    text = page(tmp_path)
    assert "\n\n**Our settings that are not the defaults: data synthetic.**\n" in text
    assert text.count("| 30.00 ± 10.00 (n = 3) |") == 2
    assert text.count(": other settings: precision bf16\n") == 2
    write_log(tmp_path, 80, lr0=0.5, bs=64)
    assert "| 80.00 (n = 1) |" in page(tmp_path) and "30.00" not in page(tmp_path)


def test_damaged_logs(tmp_path):
    write_log(tmp_path, 80, step=8000)
    (log,) = tmp_path.iterdir()
    one, two, three = log.read_text().replace(",0,cifar10", ",1,cifar10").splitlines(True)
    shutil.copy(HERE / "results" / "author.csv", tmp_path)
    for content, why in (
        ("", "damaged: empty"),
        (one, "damaged"),
        (one + two.replace(",2.0,,", ",2.0,80,"), "incomplete: 16000 of 32000 iterations"),
        (one + two + three.replace(",80.00,", ",,"), "incomplete: 32000 of 32000"),
        (one + two + three.replace(",1.0,", ",inf,"), "diverged"),
        (one + two.replace(",2.0,", ",nan,") + three, "diverged"),
        *((one.replace(name, "x") + two + three, f"damaged: KeyError.'{name}'")
          for name in ("lr0", "seed", "precision", "torch")),
        (one + two.replace(",2.0,", ",two,") + three, "'two'"),
        (one + two.replace(",128,", ",64,") + three, "damaged: its rows"),
        (one + three + two, "damaged: its rows"),
        (one + two + three + three, "damaged: its rows"),
        (one + two + three.replace("cpu", "cp\xfc"), "utf-8"),
        *((one + two + three[:length], "damaged: .*cut short") for length in range(1, len(three))),
    ):  # fmt: skip
        (tmp_path / "bad.csv").write_text(content, encoding="latin-1")
        text = page(tmp_path)
        assert text.count("| 92.65 | 80.00 (n = 1) |") == 1, content
        assert re.search(rf"Logs left out:\n\n- `bad\.csv`: .*{why}.*\n$", text), content
    (tmp_path / "bad.csv").write_text(one + two.replace("cpu,2.15", "NVIDIA H200,2.14") + three)
    assert "± 0.00 (n = 2) |" in page(tmp_path)  # a run may go on elsewhere, with another PyTorch
    (tmp_path / "folder.csv").mkdir()
    assert "- `folder.csv`: [Errno 21] Is a directory" in page(tmp_path)


@pytest.mark.parametrize("name, flags, code", [
    ("report", "--log x", 2), ("report", "x", 2), ("report", "--figures", 2), ("bench", "x", 2),
    ("report", "--logs missing", 1), ("bench", "--data synthetic --bs 4 1001", 1)])  # fmt: skip
def test_errors_of_report_and_bench(name, flags, code):
    result = script(f"{name}.py", *flags.split())
    assert result.returncode == code and not result.stdout
    assert re.fullmatch(rf"{name}\.py: .*{flags.split()[-1]}.*\n", result.stderr)


def test_readme_is_rewritten_also_when_head_has_read_enough(tmp_path):
    write_log(tmp_path / "logs", 91.5)
    readme, text = tmp_path / "README.md", page(tmp_path / "logs")
    flags = ("--logs", tmp_path / "logs", "--readme", readme)
    readme.write_bytes(b"# \r\n<!-- tables -->\nold\n<!-- /tables -->\r\nend\n")
    expected = f"# \r\n<!-- tables -->\n{text}<!-- /tables -->\r\nend\n".encode()
    read, write = os.pipe()
    os.close(read)  # as `head` does
    command = [sys.executable, HERE / "report.py", *flags]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"") and readme.read_bytes() == expected
    result = script("report.py", *flags)
    assert (result.returncode, result.stdout) == (0, text) and readme.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["README.md", "logs"]
    for text in ("", "<!-- /tables --><!-- tables -->", "<!-- tables -->" * 2):
        readme.write_text(text)
        result = script("report.py", *flags)
        assert result.returncode == 1 and readme.read_text() == text
        assert re.fullmatch(r"report\.py: .*README\.md needs .*\n", result.stderr)


def curves(ax):
    """The author's curves of a panel and ours, by colour: {iteration: value}, marked iterations."""
    both = {}, {}
    for line in ax.lines:
        x, y = map(list, line.get_data())
        if x:
            marked = [x[i] for i in line.get_markevery()]
            both[not line.is_dashed()][line.get_color()] = dict(zip(x, y)), marked
    return both


@pytest.mark.parametrize("number", [4, 5, 6, 7, 8])
def test_figures(all_runs, number):
    pytest.importorskip("matplotlib")
    rows = report.table_rows([*report.TABLES][number - 4])
    if number == 8:
        rows = [report.table_rows("7")[2], *rows]  # 92.65 %, decay step 8,000
        rows = [(f"{k[4]:,} iterations, step {k[3]:,}", best, k) for _, best, k in rows]
    author = {run["key"]: run for run in report.read_author() if not run["settings"]}
    figure = report.draw_figure(number, *report.collect(all_runs)[:2])
    assert figure.axes[0].get_title(loc="left").startswith(f"Figure {number}: ")
    assert (len(figure.axes), figure.axes[0].get_yscale()) == (2 if number == 8 else 1, "log")
    for ax, column in zip(figure.axes, ("loss", "test_acc")):
        theirs, ours = curves(ax)
        assert [*theirs] == [*ours] == report.COLOURS[: len(rows)]
        assert len({line.get_marker() for line in ax.lines}) == len(rows)
        for (_, reported, key), color in zip(rows, report.COLOURS):
            step, iters = key[3:]
            losses = {n * iters // 32: 2.3 / n for n in range(1, 33)}
            marks = [*range(step, iters, step), iters] if column == "loss" else [iters]
            assert theirs[color] == (author[key][column], marks)
            curve = losses if column == "loss" else {iters: reported}
            assert ours[color] == (pytest.approx(curve), marks)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"{label}: {reported:.2f}, ours {reported:.2f} ± 0.50 (n = 3)"
                     for label, reported, _ in rows]  # fmt: skip
    figure = report.draw_figure(number, "wd 0.0", {})
    assert figure.axes[0].get_title(loc="left").endswith("\nwd 0.0")
    assert len(figure.axes) == 1 and not curves(figure.axes[0])[1]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"{label}: {reported:.2f}" for label, reported, _ in rows]


def test_mean_band_and_runs_at_a_tenth(tmp_path):
    pytest.importorskip("matplotlib")
    colors = dict(zip((4000, 5000, 8000, 10000), report.COLOURS))
    for seed, losses in enumerate([(2.0, 1.0, 0.5, 0.2), (4.0, 2.0, 0.7, 0.4)]):
        write_log(tmp_path, 90, seed=seed, losses=losses, step=8000, name=f"{seed}")
    losses = [i / 100 for i in range(1, 321)]  # a row every 10 iterations
    write_log(tmp_path, 50, losses=losses, step=400, iters=3200)
    write_log(tmp_path, 50, losses=losses, step=1000, iters=3200)
    write_log(tmp_path, 50, losses=losses[:16], step=1000, iters=3200, seed=1)  # a row every 200
    write_log(tmp_path, 60, losses=losses, step=80, iters=320)  # 1/100: no 100 iterations
    full, tenth = report.draw_figure(7, *report.collect(tmp_path)[:2]).axes
    ((color, (curve, marks)),) = curves(full)[1].items()
    assert color == colors[8000] and marks == [8000, 16000, 24000, 32000]
    assert curve == pytest.approx({8000: 3.0, 16000: 1.5, 24000: 0.6, 32000: 0.3})
    bands = [path.vertices for band in full.collections for path in band.get_paths()]
    assert {1.0, 2.0} < {y for band in bands for x, y in band if x == 16000}
    assert tenth.get_title(loc="left") == "Ours at 1/10, until their first decay"
    theirs, ours = curves(tenth)
    for step, color in colors.items():
        curve, marks = theirs[color]
        assert [*curve] == [*range(100, step // 10 + 1, 100)] and marks == [step // 10]
    assert [*ours] == [colors[4000], colors[10000]]
    curve, marks = ours[colors[4000]]
    assert curve == pytest.approx({100: 0.055, 200: 0.155, 300: 0.255, 400: 0.355})
    assert marks == [400] and [*ours[colors[10000]][0]] == [200, 400, 600, 800, 1000]


def test_figure_files_need_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    flags = ("--logs", tmp_path, "--figures", tmp_path / "a" / "b")
    result = script("report.py", *flags, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and "| 8,000 | 92.65 |" in result.stdout
    assert result.stderr == "report.py: the figures need matplotlib: pip install matplotlib\n"
    pytest.importorskip("matplotlib")
    assert script("report.py", *flags).returncode == 0
    assert sorted(os.listdir(tmp_path / "a" / "b")) == [f"figure{n}.png" for n in range(4, 9)]


def test_readme_shows_the_committed_logs_and_timings_and_every_flag():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"<!-- tables -->\n{page(HERE / 'results')}<!-- /tables -->" in readme
    timings = [read_rows(path) for path in (HERE / "results" / "bench").glob("*.csv")]
    assert timings
    for row in itertools.chain.from_iterable(timings):
        figures = "{bs} | {code} | {ms} ± {spread} | {images_per_s} | {tflops} | {ratio}"
        assert f"| {figures.format(**row)} |\n" in readme
    options = script("train.py", "--help").stdout.split("options:")[1]
    flags = set(re.findall(r"--[a-z][a-z-]*", options)) - {"--help"}
    assert len(flags) == 19
    assert [flag for flag in flags if not re.search(rf"^\|.*`{flag}( FILE)?`", readme, re.M)] == []


# ---- speed ---------------------------------------------------------------------------------------


def test_bench(tmp_path, monkeypatch, capsys):
    argv = "bench.py --bs 4 --steps 1 --rounds 2 --workers 0 --data synthetic --device cpu --csv"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "bench.csv")])
    bench.main()
    usual, ours = read_rows(tmp_path / "bench.csv")
    assert (usual["code"], ours["code"]) == ("usual loop", "this code")
    assert float(ours["images_per_s"]) == pytest.approx(4e3 / float(ours["ms"]), abs=1)
    assert float(ours["ratio"]) == pytest.approx(float(usual["ms"]) / float(ours["ms"]), abs=0.01)
    assert f"| 4 | this code | {ours['ms']} ± " in capsys.readouterr().out


def test_recorded_step_trains_each_plan_once_at_its_rate(monkeypatch):
    optimizer, trained, recordings = SimpleNamespace(param_groups=[{}]), [], []

    def step(plan):
        trained.append((plan.item(), optimizer.param_groups[0]["lr"]))

    @contextmanager
    def record(graph, stream):
        """As CUDA does: nothing is computed, and the learning rate is a constant from now on."""
        yield
        recordings.append(trained.pop())
        plan, lr = recorded.plan, recordings[-1][1]
        graph.replay = lambda: trained.append((plan.item(), lr))

    monkeypatch.setattr(torch, "cuda", Mock(CUDAGraph=SimpleNamespace, graph=record))
    recorded = train.RecordedStep(step, optimizer)
    expected = [(t, 0.2 ** (t // 4)) for t in range(10)]
    for t, optimizer.param_groups[0]["lr"] in expected:
        recorded(torch.tensor(t))
    assert trained == expected
    assert recordings == [expected[t] for t in (3, 4, 8)]  # after three to warm up, at each rate
    with pytest.raises(train.RecordingFailed, match="RuntimeError: "):
        train.RecordedStep(step, optimizer)(torch.zeros(2))  # no single number: the step raises


# A string: pytest evaluates it, but not the import of this file in the forks' server. See FORKS.
needs_cuda = pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA")
SMALL_LR = {"sgd": 4e-5, "adam": 4e-6, "adagrad": 4e-6, "asgd": 8e-5}


def trained_on_cuda(settings: dict, how: str, rates: list[float]) -> dict[str, torch.Tensor]:
    """The state after 15 iterations on generated images, five at each rate."""
    device = train.open_device("cuda", settings["precision"])
    training, _ = data.load("synthetic", device)
    network, optimizer = train.build(settings, device)
    loss_sum = torch.zeros((), device=device)
    step = train.make_step(settings, network, optimizer, training, loss_sum, how)
    for t in range(15):
        epoch, i = divmod(t, math.ceil(1000 / settings["bs"]))
        optimizer.param_groups[0]["lr"] = settings["lr0"] * rates[t // 5]
        step(data.epoch_plan(training, 0, epoch).split(settings["bs"], dim=1)[i])
    buffers = [b.flatten() for name, b in network.named_buffers() if "running" in name]
    weights = [p.detach().flatten() for p in network.parameters()]
    return {"weights": torch.cat(weights), "buffers": torch.cat(buffers), "loss": loss_sum}


# Which images a rounding lets through a ReLU is chance, and soon everything differs: on a CPU, one
# rounding of each initial weight moves the weights of fifteen iterations as far as a missed decay.
# With a smooth activation it moves them by less than 1e-4 of what a missed change of the learning
# rate does in float32, by up to 0.16 (weights) and 0.3 (buffers) of it in bf16. Hence the limits.
@needs_cuda
@pytest.mark.parametrize(
    "optimizer, how, precision, bs, limit",
    [(optimizer, "recorded", *rest) for optimizer in OPTIMIZERS
     for rest in (("fp32", 128, 0.01), ("tf32", 32, 0.5), ("bf16", 256, 0.5))]
    + [("sgd", "compiled", "fp32", 128, 0.01)],
)  # fmt: skip
def test_recorded_is_plain_on_cuda(optimizer, how, precision, bs, limit, monkeypatch):
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(replay(g)))
    monkeypatch.setattr(F, "relu", F.silu)
    flags = f"--optimizer {optimizer} --lr {SMALL_LR[optimizer]} --bs {bs} --precision {precision}"
    plain, missed, ours = (
        trained_on_cuda(config(*flags.split()), way, rates)
        for way, rates in (("plain", [1, 5, 25]), ("plain", [1, 5, 5]), (how, [1, 5, 25]))
    )
    short = sum(t % math.ceil(1000 / bs) == 1000 // bs for t in range(15))
    assert len(replays) == 15 - 3 - short  # three to warm up
    for name, value in plain.items():
        change, apart = ((other[name] - value).norm().item() for other in (missed, ours))
        assert 0 < change and apart < limit * change, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_failed_recording_continues_in_plain_pytorch(device, undisturbed, tmp_path):
    """On CUDA a wait ends the recording in the fifth step; on a CPU that step raises by itself."""
    refuse = (exec, "raise train.RecordingFailed('why')")
    how = (torch.cuda.synchronize,) if device == "cuda" else refuse
    result = call(tmp_path, *SHORT, "--device", device, hook=(at, "call", "zero_grad", 5, *how))
    assert (result.code, result.err.count("no CUDA graph, so slower plain PyTorch (")) == (0, 1)
    assert "continues from iteration 4" in result.out
    rows = read_rows(tmp_path / "logs" / f"{NAME}.csv")
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]
    line = "train.py: no CUDA graph, so slower plain PyTorch (why)\n"
    if device == "cpu":
        assert (result.err, outcome(tmp_path)) == (line, outcome(undisturbed["sgd"]))


def smooth(kill: bool) -> None:
    """SiLU in the place of ReLU in this process, which perhaps kills itself eight iterations on."""
    F.relu = F.silu
    if kill:
        at("c_return", "replace", 3, raise_signal, SIGKILL)


@needs_cuda
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_continued_on_cuda_on_a_cpu_and_on_cuda(optimizer, tmp_path):
    (tmp_path / "cpu").mkdir()
    flags = "--data synthetic --bs 5 --iters 28 --step 10 --log-every 4 --ckpt-every 0".split()
    flags += ["--precision", "fp32", "--optimizer", optimizer, "--lr", 25 * SMALL_LR[optimizer]]
    whole = call(tmp_path / "cpu", *flags, "--device", "cpu", hook=(smooth, False))
    parts = [call(tmp_path, *flags, "--device", device, hook=(smooth, kill)) for device, kill
             in (("cuda", True), ("cuda", True), ("cpu", True), ("cuda", False))]  # fmt: skip
    assert [part.code for part in (whole, *parts)] == [0, *[-SIGKILL] * 3, 0]
    assert [part.err for part in parts] == [""] * 4  # a fall to plain PyTorch would say so
    assert ["recorded" in part.out for part in parts] == [True, True, False, True]
    (expected,), (log,) = (list((f / "logs").glob("*.csv")) for f in (tmp_path / "cpu", tmp_path))
    # On a CPU, one rounding of the weights moves no row by over 5e-6, a missed decay one by 7e-3.
    for ours, theirs in zip(read_rows(log), read_rows(expected), strict=True):
        assert [ours[key] for key in ("iteration", "lr")] == [theirs["iteration"], theirs["lr"]]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=2e-4)

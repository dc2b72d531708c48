"""All tests. They need no GPU, network or data set, and do more where there are some.

The method comes first (network, data, training), then the command line, files and ways of being
stopped, then the tools (run_all.sh, report.py, bench.py), then what needs a GPU.
"""

import copy
import csv
import hashlib
import importlib.util
import itertools
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import stat
import statistics
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, nullcontext
from errno import ENOLCK, ENOSYS
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, default_int_handler, raise_signal, signal
from types import SimpleNamespace
from unittest.mock import Mock, patch

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

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adam", "adagrad", "asgd")
FILES = HERE / "data" / CIFAR10.base_folder
needs_cifar10 = pytest.mark.skipif(not FILES.exists(), reason="no CIFAR-10 in ./data")


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
    batch = data.augment(data.pad(images), plan)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (index, top, left, flip) in zip(batch, plan.T.tolist()):
        expected = TF.crop(TF.pad(TF.to_pil_image(images[index]), 4), top, left, 32, 32)
        assert torch.equal(ours, TF.to_tensor(TF.hflip(expected) if flip else expected))
    every = torch.arange(256, dtype=torch.uint8).expand(3, 16, 256)
    assert torch.equal(data.scale(every[None])[0], TF.to_tensor(TF.to_pil_image(every)))
    # On MPS, batch norm of channels-last images has had wrong gradients.
    layouts = [data.layout(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]


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


def test_plans_are_the_same_wherever_a_run_starts():
    split = images_and_labels(10)
    batches = [*itertools.islice(data.plans(split, 4, seed=5), 8)]
    assert [batch.shape[1] for batch in batches] == [4, 4, 2, 4, 4, 2, 4, 4]
    plans = [data.epoch_plan(split, seed=5, epoch=epoch) for epoch in (0, 1)]
    assert torch.equal(torch.cat(batches[:6], dim=1), torch.cat(plans, dim=1))
    for start in range(7):
        assert torch.equal(next(data.plans(split, 4, seed=5, start=start)), batches[start])


@pytest.fixture
def small_cifar10(monkeypatch):
    """A function that writes files which pass for CIFAR-10's, of two images each."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    images = torch.arange(2 * 3072, dtype=torch.int64).remainder(251).to(torch.uint8).view(2, 3072)
    batch = pickle.dumps({"data": images.numpy(), "labels": [3, 7]})
    meta = pickle.dumps({"label_names": [*data.CLASSES]})
    contents = dict.fromkeys(names, batch) | {"batches.meta": meta}
    sums = [[name, hashlib.md5(contents[name]).hexdigest()] for name in contents]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums[6][1]})
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return write


@pytest.mark.parametrize("place", [CIFAR10.base_folder, ".", f"{CIFAR10.base_folder}/" * 2])
def test_files_are_found_where_unpackers_put_them(place, small_cifar10, tmp_path):
    small_cifar10(tmp_path / "data" / place)
    training, test = data.load(str(tmp_path / "data"), CPU)
    assert training.images.shape == (10, 3, 32, 32) and test.labels.tolist() == [3, 7]
    assert training.images[1, 0, 0, 1] == 3073 % 251  # the red of the second image's second pixel
    assert data.load(str(tmp_path / "data" / place), CPU)[1].labels.tolist() == [3, 7]


def test_archive_is_unpacked_whole_or_not_at_all(small_cifar10, tmp_path, monkeypatch):
    archive = tmp_path / "data" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small_cifar10(tmp_path / "files"), CIFAR10.base_folder)
    with pytest.raises(data.DataError, match="cannot be fetched or unpacked .*no network.*https"):
        data.load(str(tmp_path / "data"), CPU)  # another archive than CIFAR-10's is no use
    assert os.listdir(tmp_path / "data") == [CIFAR10.filename]
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.load(str(tmp_path / "data"), CPU)[0].labels) == 10
    assert sorted(os.listdir(tmp_path / "data")) == [CIFAR10.base_folder, CIFAR10.filename]


def test_data_errors_name_what_failed(small_cifar10, tmp_path, monkeypatch):
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in .*data, and it cannot be fetched"):
        data.load(str(tmp_path / "data"), CPU)
    with pytest.raises(data.DataError, match="No such file or directory: .*missing"):
        data.load(str(tmp_path / "missing" / "data"), CPU)
    assert not list(tmp_path.iterdir())
    folder = small_cifar10(tmp_path / CIFAR10.base_folder)
    (folder / "data_batch_2").write_bytes(b"damaged")
    (folder / "batches.meta").unlink()
    with pytest.raises(data.DataError, match=f"in {folder}: data_batch_2, batches.meta; put the"):
        data.load(str(tmp_path), CPU)
    assert (folder / "data_batch_2").read_bytes() == b"damaged"
    for function in ("os.listdir", "torchvision.datasets.utils.calculate_md5"):
        with patch(function, side_effect=PermissionError(13, "Permission denied", "x/y")):
            with pytest.raises(data.DataError, match=r"cannot read .*Permission denied: 'x/y'$"):
                data.load(str(tmp_path), CPU)


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
        assert torch.equal(column[:, 2:34], data.scale(images[labels == label][:1])[0])


# ---- training ------------------------------------------------------------------------------------


def config(*argv: str) -> dict:
    return train.settings(train.parse_args([*map(str, argv)]))


def test_optimizers_are_pytorchs_with_the_reports_settings():
    l2 = {"weight_decay": 1e-4, "lr": 0.3}  # added to the gradient in all four
    for name, kind, group in (
        ("sgd", torch.optim.SGD, l2 | {"momentum": 0.9, "dampening": 0, "nesterov": False}),
        ("adam", torch.optim.Adam, l2 | {"betas": (0.7, 0.7), "eps": 1e-8, "amsgrad": False}),
        ("adagrad", torch.optim.Adagrad, l2 | {"lr_decay": 0, "eps": 1e-10}),
        ("asgd", torch.optim.ASGD, l2 | {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}),
    ):
        network = model.ResNet()
        optimizer = train.make_optimizer(train.parse_args(["--optimizer", name]), network)
        assert type(optimizer) is kind and not optimizer.defaults.get("decoupled_weight_decay")
        assert optimizer.param_groups[0].items() >= group.items()
        assert len(optimizer.param_groups[0]["params"]) == len(list(network.parameters()))


def test_it_learns_the_generated_images(tmp_path):
    flags = f"--data synthetic --device cpu --lr 0.003 --bs 16 --iters 40 --logs {tmp_path}"
    train.train(train.parse_args(flags.split()))
    (log,) = tmp_path.glob("*.csv")
    assert float(read_rows(log)[-1]["test_acc"]) > 40  # chance is 10


def test_evaluate_counts_every_image_once_and_changes_nothing():
    class First(torch.nn.Module):
        """Takes the first pixel for the label, and is wrong in training mode."""

        def forward(self, x):
            label = (255 * x[:, 0, 0, 0]).round().long() + self.training
            return F.one_hot(label % 10, 10).float()

    split, network = images_and_labels(2300), First()
    wrong = torch.arange(2300) % 7 == 0
    split.images[:, 0, 0, 0] = (split.labels + 3 * wrong) % 10
    assert torch.equal(train.evaluate(network, split, "tf32"), ~wrong) and network.training
    assert train.percent(~wrong) == f"{100 * (~wrong).sum().item() / 2300:.2f}"


def test_wrong_gradients_of_a_device_are_noticed(capsys):
    network, split = model.ResNet(), images_and_labels(20)
    train.check_against_cpu(network, split)  # the CPU agrees with itself
    for name, factor, fails in (("linear.bias", 1.5, True), ("stem.1.weight", -1, True),
                                ("layer2.0.conv1.0.weight", math.nan, True),
                                ("layer2.0.conv1.0.weight", 1.01, False)):  # fmt: skip
        twins = [copy.deepcopy(network), copy.deepcopy(network)]
        twins[0].get_parameter(name).register_hook(lambda gradient: factor * gradient)
        with patch("copy.deepcopy", side_effect=twins):
            with pytest.raises(SystemExit) if fails else nullcontext():
                train.check_against_cpu(network, split)
    assert capsys.readouterr().err.count("--device cpu") == 3


# The command line runs in processes forked from a server that has imported PyTorch, since a fresh
# start takes seconds. `call` runs train.py with ten images and gives its exit code and output; its
# hook is a function called in that process first, such as `at`, which interferes at a given moment.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_model"])  # must not ask for CUDA, or its forks cannot use it


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders in which SHORT ran to its end, by optimizer."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in OPTIMIZERS}
    for optimizer, folder in folders.items():
        result = call(folder, *SHORT, "--optimizer", optimizer)
        assert (result.code, result.err) == (0, "")
        assert sorted(path.suffix for path in (folder / "logs").iterdir()) == [".csv", ".pt"]
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
        images = data.augment(data.pad(training.images), batch)
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
    constant = {**config(*SHORT, "--data", where), "device": "cpu 1 threads"}
    constant["torch"] = torch.__version__
    for row in rows:
        assert {key: row[key] for key in constant} == {k: str(v) for k, v in constant.items()}
    saved = torch.load(tmp_path / "logs" / f"{name}.pt", weights_only=True)
    assert saved["config"] == config(*SHORT, "--data", where)
    assert all(torch.equal(saved["model"][k], value) for k, value in network.state_dict().items())


def slow_clock() -> None:
    """Each look at this process's clock takes 25 s, each evaluation and each save 10,000 s."""
    now = [0]

    def later(seconds: int, result=None):
        now[0] += seconds
        return now[0] if result is None else result

    train.time.perf_counter = lambda: later(25)
    train.evaluate = lambda *args, old=train.evaluate: later(10_000, old(*args))
    train.save = lambda *args, old=train.save, **named: later(10_000, old(*args, **named))


def test_output_and_the_seconds_of_training_alone(tmp_path):
    out = call(tmp_path, *SHORT, hook=(slow_clock,)).out.splitlines()
    started = "cpu 1 threads, 4,883,626 parameters, from iteration 0, a line every 2"
    assert out[0] == f"{NAME}: {started}"
    losses = [f"{float(row['loss']):.4f}" for row in read_rows(tmp_path / "logs" / f"{NAME}.csv")]
    assert out[1] == f"2/5  loss {losses[0]}  1 min left  {NAME}"
    assert re.fullmatch(rf"4/5  loss {losses[1]}  test [\d.]+ %  0 min left  {NAME}", out[2])
    assert out[4] == f"75 s of training; log logs/{NAME}.csv, weights logs/{NAME}.pt"
    seconds = [row["seconds"] for row in read_rows(tmp_path / "logs" / f"{NAME}.csv")]
    assert seconds == ["25.00", "50.00", "75.00"]


def test_eval_gives_the_logged_accuracy(undisturbed):
    folder = undisturbed["sgd"]
    result = call(folder, "--eval", f"logs/{NAME}.pt", "--device", "cpu")  # data as trained on
    logged = read_rows(folder / "logs" / f"{NAME}.csv")[-1]["test_acc"]
    assert result.code == 0 and f"{NAME}: {logged} %\n" in result.out
    by_class = re.findall(r"^(\w+) +([\d.]+) %$", result.out, re.M)
    assert tuple(name for name, _ in by_class) == data.CLASSES
    assert sum(float(value) for _, value in by_class) == pytest.approx(10 * float(logged), abs=0.1)


@needs_cifar10
@pytest.mark.parametrize("weights", [*RESULTS.glob("*.pt")], ids=lambda file: file.stem)
def test_committed_weights_have_the_logged_accuracy(weights, capsys):
    train.test(train.parse_args(["--eval", str(weights), "--data", str(HERE / "data")]))
    name, accuracy = re.match(r"(.+): ([\d.]+) %\n", capsys.readouterr().out).groups()
    logged = read_rows(RESULTS / f"{name}.csv")[-1]["test_acc"]
    assert float(accuracy) == pytest.approx(float(logged), abs=0.02)


# ---- the command line ----------------------------------------------------------------------------


def test_defaults_are_the_reports():
    assert config() == {"optimizer": "sgd", "lr0": 0.3, "bs": 128, "step": 8000, "gamma": 0.2,
                        "momentum": 0.9, "betas": "", "wd": 1e-4, "iters": 32_000, "seed": 0,
                        "data": "cifar10", "precision": "tf32"}  # fmt: skip
    assert config("--optimizer", "adam")["betas"] == "0.7 0.7"


def test_name_tells_every_setting():
    for optimizer in OPTIMIZERS:  # what a name leaves out is the default
        name = train.run_name(config("--optimizer", optimizer))
        assert name == f"{optimizer}_lr0.3_bs128_step8000_seed0"
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


@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr -1", "--bs 0", "--bs 1.5", "--gamma 1.1", "--momentum 2", "--betas 0.9 1",
    "--seed -1", "--lr 1e38", "--ckpt-every -1", "--optimizer lion", "--epochs 9", "stray",
])  # fmt: skip
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_args(flags.split())
    assert error.value.code == 2
    assert re.fullmatch(r"train\.py: [^\n]+ \(--help\)\n", capsys.readouterr().err)


def test_home_folder_and_letters_that_a_terminal_has_not(tmp_path):
    args = train.parse_args(["--data=~/x", "--logs", "~/y", "--eval", "~/z"])
    assert [args.data, args.logs, args.eval] == [f"{Path.home()}/{name}" for name in "xyz"]
    ascii_only = (exec, "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')")
    result = call(tmp_path, *SHORT, "--logs", "\u03bb", hook=ascii_only)
    assert (result.code, result.err) == (0, "") and "log \\u03bb/" in result.out


# ---- files, and ways of being stopped ------------------------------------------------------------

# When, for `at`, and the signal. The files replaced are the checkpoints of iterations 0, 2 and 4,
# then the weights, each before its line of the log. One Tensor.backward returns twice, as it calls
# another.
KILLS = [("c_call", "replace", 1, SIGKILL), ("c_return", "replace", 1, SIGKILL),
         ("c_call", "fsync", 4, SIGKILL), ("call", "zero_grad", 2, SIGKILL),
         ("c_return", "replace", 1, SIGKILL), ("c_return", "TextIOWrapper.truncate", 1, SIGKILL),
         ("return", "backward", 2, SIGTERM), ("call", "evaluate", 1, SIGINT),
         ("c_return", "replace", 1, SIGKILL), ("call", "zero_grad", 1, SIGINT),
         ("c_return", "replace", 1, SIGKILL), ("c_call", "unlink", 1, SIGKILL)]  # fmt: skip
KILL_AFTER_TWO = (at, "call", "zero_grad", 3, raise_signal, SIGKILL)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_started_again_it_ends_as_if_undisturbed(optimizer, undisturbed, tmp_path):
    flags = (*SHORT, "--optimizer", optimizer)
    for *moment, number in KILLS if optimizer == "sgd" else KILLS[4:9:4]:
        result = call(tmp_path, *flags, hook=(at, *moment, raise_signal, number))
        assert (result.code, result.err) == (-number, ""), moment
        (log,) = (tmp_path / "logs").glob("*.csv")
        assert not read_rows(log) or list((tmp_path / "logs").glob("*.ckpt"))
    assert call(tmp_path, *flags).code == 0
    stop = (at, "call", "open_device", 1, raise_signal, SIGKILL)
    assert "is complete" in call(tmp_path, *flags, hook=stop).out
    assert outcome(tmp_path) == outcome(undisturbed[optimizer])


def power_cut(count: int) -> None:
    """Before the count-th fsync, throw LOGS back to what earlier ones had brought to disk, and die.

    A file is as its last fsync saw it, else empty; a folder lists the files of its own last fsync.
    """
    contents, listed, calls, fsync = {}, {}, itertools.count(1), os.fsync

    def recorded(descriptor: int) -> None:
        if next(calls) == count:
            kept = {name: contents.get(file, b"") for name, file in listed.items()}
            shutil.rmtree("logs")
            os.mkdir("logs")
            for name, content in kept.items():
                Path("logs", name).write_bytes(content)
            raise_signal(SIGKILL)
        fsync(descriptor)
        file = os.stat(descriptor)
        if stat.S_ISDIR(file.st_mode):
            listed.update({entry.name: entry.inode() for entry in os.scandir("logs")})
            for name in listed.keys() - set(os.listdir("logs")):
                del listed[name]
        else:
            contents[file.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    os.fsync = recorded
    for entry in os.scandir("logs") if os.path.exists("logs") else ():
        contents[entry.inode()] = Path(entry.path).read_bytes()  # on disk since the last cut
        listed[entry.name] = entry.inode()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
def test_power_cuts(undisturbed, tmp_path):
    for count in (1, 2, 3, 4, 5, 3, 2):
        result = call(tmp_path, *SHORT, hook=(power_cut, count))
        assert (result.code, result.err) == (-SIGKILL, "")
    assert call(tmp_path, *SHORT).code == 0
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


def test_truncated_log_is_not_complete_and_not_thrown_away(undisturbed, tmp_path):
    shutil.copytree(undisturbed["sgd"] / "logs", tmp_path / "logs")
    log, run = tmp_path / "logs" / f"{NAME}.csv", train.Run(train.parse_args(SHORT))
    run.log_path, whole = log, log.read_text()
    assert run.is_complete()
    for length in (0, 300, whole.rindex("cpu"), whole.rindex(",") + 1, whole.index("\n", 300) + 1):
        log.write_text(whole[:length])
        assert not run.is_complete()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "no checkpoint", "move it away")
    assert log.read_text() == whole[:length]


def test_divergence_is_logged_and_exits_with_3(tmp_path):
    """Its state is no checkpoint, so that a second start sees it again."""
    flags = "--data synthetic --bs 4 --lr 1e9 --iters 9 --log-every 1 --ckpt-every 0".split()
    for start in (0, 2):
        result = call(tmp_path, *flags, "--device", "cpu")
        assert_one_line_error(result, 3, "loss nan at iteration 3", "lower --lr")
        assert f"from iteration {start}," in result.out
        (log,) = (tmp_path / "logs").glob("*.csv")
        assert [(row["loss"], row["test_acc"]) for row in read_rows(log)][2:] == [("nan", "")]
    assert not list((tmp_path / "logs").glob("*.pt"))


def test_what_cannot_start_writes_nothing(tmp_path):
    absent = "cuda" if sys.platform == "darwin" else "mps"
    assert_one_line_error(call(tmp_path, *SHORT, "--device", absent), 1, f"no {absent} device")
    assert_one_line_error(call(tmp_path, *SHORT, "--bs", 11), 1, "--bs 11 is more than the 10")
    assert_one_line_error(call(tmp_path, "--eval", "none.pt"), 1, "none.pt: No such file")
    (tmp_path / "data" / CIFAR10.base_folder).mkdir(parents=True)
    assert_one_line_error(call(tmp_path, "--device", "cpu"), 1, CIFAR10.base_folder, "missing")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").touch()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "logs")


def test_bad_checkpoints_and_weights(tmp_path):
    call(tmp_path, *SHORT, hook=KILL_AFTER_TWO)
    ckpt = tmp_path / "logs" / f"{NAME}.ckpt"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    content, saved = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    middle = len(content) // 2  # of the weights, where only a checksum sees a change
    for kind, bad in {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "pickle": pickle.dumps(bomb),
        "pickle in a zip": {"config": bomb, "model": {}},
        "state dict": saved["model"],
        "network": {**saved, "model": model.ResNet(project_layer1=True).state_dict()},
        "configuration": {**saved, "config": config("--lr", 0.1)},
    }.items():
        ckpt.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, ckpt)
        before = outcome(tmp_path)
        why = "is of another run" if kind == "configuration" else "does not fit this train.py"
        assert_one_line_error(call(tmp_path, *SHORT), 1, f"logs/{NAME}.ckpt {why}")
        if kind != "configuration":  # --eval takes any
            assert_one_line_error(call(tmp_path, "--eval", ckpt), 1, f"{ckpt} {why}")
        assert outcome(tmp_path) == before and not (tmp_path / "exploded").exists()
    # What is no fault of the file is not put down to it.
    torch.save(saved, ckpt)
    for function, error, words in (
        ("zipfile.ZipFile", PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
        ("torch.nn.Module.load_state_dict", torch.OutOfMemoryError("full"), "train.py: full"),
    ):
        result = call(tmp_path, *SHORT, hook=(refuse, function, error))
        assert_one_line_error(result, 1, words)
        assert "does not fit" not in result.err
    assert saved["seconds"] > 0
    torch.save({**saved, "seconds": 1e6}, ckpt)
    assert call(tmp_path, *SHORT).code == 0
    assert float(read_rows(tmp_path / "logs" / f"{NAME}.csv")[-1]["seconds"]) > 1e6


def test_state_of_another_layout_is_brought_to_the_parameters(tmp_path):
    """As from a Mac: contiguous there, channels last here, which fused optimizers insist on."""
    call(tmp_path, *SHORT, hook=KILL_AFTER_TWO)
    ckpt = tmp_path / "logs" / f"{NAME}.ckpt"
    saved = torch.load(ckpt, weights_only=True)
    state = saved["optimizer"]
    moved = {i: {"momentum_buffer": state[i]["momentum_buffer"].contiguous()} for i in state}
    torch.save({**saved, "optimizer": moved}, ckpt)
    run = train.Run(train.parse_args([*SHORT, "--logs", str(tmp_path / "logs")]))
    network = model.ResNet().to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(train.parse_args(SHORT), network)
    run.open_log()
    run.resume(network, optimizer)
    for i, (p, values) in enumerate(optimizer.state.items()):
        assert values["momentum_buffer"].stride() == p.stride()
        assert torch.equal(values["momentum_buffer"], state[i]["momentum_buffer"])


def refuse(function: str, error: Exception) -> None:
    """From now on this function raises this error."""
    patch(function, side_effect=error).start()


def test_disk_that_takes_no_more(undisturbed, tmp_path):
    call(tmp_path, *SHORT, hook=KILL_AFTER_TWO)
    before = outcome(tmp_path)
    full = (resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
    result = call(tmp_path, *SHORT, hook=full)
    assert_one_line_error(result, 1, f"logs/{NAME}.ckpt: File too large", "mend that")
    assert outcome(tmp_path) == before
    assert call(tmp_path, *SHORT).code == 0  # once there is room
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


@pytest.mark.parametrize("error", [OSError(ENOSYS, "no"), OSError(ENOLCK, "no"), None])
def test_no_locks(error, undisturbed, tmp_path):
    """As on some network file systems, or on Windows: training goes on without a lock."""
    without = (exec, "import sys; sys.modules['fcntl'] = None")
    hook = (refuse, "fcntl.flock", error) if error else without
    assert call(tmp_path, *SHORT, hook=hook).code == 0
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


@pytest.mark.parametrize("name", ["train.py", "data.py", "report.py"])
def test_output_that_nobody_reads(name, tmp_path):
    """As with `| head -0`: training ends in words, the others as any tool does."""
    read, write = os.pipe()
    os.close(read)
    flags = {"train.py": [*SHORT, "--logs", tmp_path], "data.py": ["--data", "synthetic"],
             "report.py": ["--logs", RESULTS]}[name]  # fmt: skip
    command = [sys.executable, HERE / name, *flags]
    result = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    words = "train.py: stopped, as nobody reads the output any more; the same command continues\n"
    assert result.stderr == (words if name == "train.py" else "")


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


@pytest.mark.parametrize("argument", ["8", "--seed 1", "", "--shorten", "--shorten 3"])
def test_run_all_usage(argument, stub, tmp_path):
    result = script("run_all.sh", "4", *(argument.split() or [""]), **stub)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "-- --seed 1" in result.stderr and not (tmp_path / "calls").exists()


def test_failing_row_stops_the_others_only_if_all_would_fail(stub, tmp_path):
    fail = "case $* in *'--bs 32'*) exit 3; esac"
    result = script("run_all.sh", "--", "--seed", "1", "--logs=x", **stub, DO=fail)
    _, *calls = (tmp_path / "calls").read_text().splitlines()  # the first looks for PyTorch
    assert calls[:-1] == [f"train.py {flags} --seed 1 --logs=x" for flags in commands("")]
    assert calls[-1] == "report.py --logs x"
    assert "== Run 2 of 12, 0 min so far; the report has 88.51 % in Table 4 and Table 5\n" in (
        result.stdout
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re.match(r"run_all\.sh: failed, exit 3: .*--bs 32", result.stderr)
    for do, code, count in (("case $* in *train*) exit 2; esac", 2, 2), ("exit 1", 127, 1)):
        (tmp_path / "calls").unlink()
        result = script("run_all.sh", "5", **stub, DO=do)
        assert result.returncode == code
        assert len((tmp_path / "calls").read_text().splitlines()) == count
    assert re.fullmatch(r"run_all\.sh: no python with PyTorch .*activate.*\n", result.stderr)


def test_run_all_help_and_another_shell():
    assert "bash run_all.sh --shorten 10" in script("run_all.sh", "--help").stdout
    for shell in filter(shutil.which, ("sh", "dash")):
        command = [shell, HERE / "run_all.sh", "--list", "extended"]
        assert subprocess.check_output(command, text=True).count("python train.py") == 1


def test_ctrl_c_ends_run_all_and_the_training(stub, tmp_path):
    signal(SIGINT, default_int_handler)  # a background job's children would ignore it
    wait = f"case $* in *256*) touch '{tmp_path}/ready'; exec sleep 60; esac"
    command, env = ["bash", HERE / "run_all.sh"], os.environ | stub | {"DO": wait}
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, SIGINT)  # as a terminal does
    process.communicate(timeout=10)  # ends when no process has its output open any more
    assert process.returncode == -SIGINT


def test_table_on_ten_generated_images(stub, tmp_path):
    python = f"exec '{sys.executable}'"
    code = "import test_model, train; train.data.load = test_model.ten_images; train.main()"
    stub["DO"] = f'[ $1 = train.py ] || {python} "$@"; shift; {python} -c "{code}" "$@"'
    flags = "5 --shorten 1000 -- --data synthetic --device cpu --bs 4 --logs".split()
    first, again = (script("run_all.sh", *flags, tmp_path / "its logs", **stub) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    assert again.stdout.count("is complete") == 3
    page = again.stdout.rpartition("is complete")[2]
    assert page.count("_bs4_step5_iters32_synthetic_seed0") == 3  # report.py has read its logs


# ---- report.py -----------------------------------------------------------------------------------

# The author's 15 logs: their last lines, and their losses by iteration.
AUTHOR = {line["run"]: line for line in read_rows(RESULTS / "author.csv")}
LOSS = {run: {int(line["iteration"]): float(line["loss"]) for line in lines} for run, lines in
        itertools.groupby(read_rows(RESULTS / "author.csv"), lambda line: line["run"])}  # fmt: skip
SEVEN = [run for run, line in AUTHOR.items() if line["bs"] == "128"]


def write_log(folder, *accuracies, losses=(2.0, 1.0), name="", seeds=range(99), **settings) -> None:
    """A complete log for each accuracy, a seed each, with a line for each loss."""
    folder.mkdir(exist_ok=True)
    for seed, accuracy in zip(seeds, accuracies):
        run = config("--seed", seed) | {"device": "cpu 2 threads", "torch": "2.15.0"} | settings
        if run["optimizer"] != "sgd":
            run["momentum"] = ""
        ends = [n * run["iters"] // len(losses) for n in range(1, len(losses) + 1)]
        lines = [[*run.values(), end, 0.1, loss, "", 3600] for end, loss in zip(ends, losses)]
        lines[-1][-2] = f"{accuracy:.2f}"
        text = "".join(",".join(map(str, line)) + "\n" for line in [train.COLUMNS, *lines])
        file = name or "_".join(map(str, run.values())).replace(" ", "-")
        (folder / f"{file}.csv").write_text(text)


def setting(row: list[str]) -> dict:
    """The settings of one of ROWS as a log names them."""
    bs, step, iters = map(int, row[4:])
    return {"optimizer": row[2], "lr0": float(row[3]), "bs": bs, "step": step, "iters": iters}


def parts(folder: Path) -> dict[str, str]:
    """The computed parts of the page that report.py prints, without any package, in any locale."""
    command = [sys.executable, "-S", HERE / "report.py", "--logs", folder]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    page = subprocess.run(command, env=env, capture_output=True, check=True).stdout.decode("utf-8")
    return dict(re.findall(r"<!-- ([a-z ]+) -->\n(.*?)\n<!-- /\1 -->", page, re.S))


def test_rows_and_fixed_settings_are_the_reports():
    assert report.read_rows() == [
        (table, float(accuracy), (name, float(lr), int(bs), int(step), int(iters)))
        for table, accuracy, name, lr, bs, step, iters in ROWS
    ]
    for name, value in report.FIXED.items():
        assert value == str(config("--optimizer", "adam")[name] or config()[name])


def test_t_quantile_and_welch():
    for dof, t in ((1, 12.7062), (1.5, 6.0167), (2, 4.3027), (6, 2.4469), (30, 2.0423)):
        assert report.t_quantile(dof) == pytest.approx(t, abs=1e-4)
    # Variances 3 and 10, n = 3 and 5: squares of the standard errors 1 and 2, so
    # dof = (1 + 2)^2 / (1^2 / 2 + 2^2 / 4) = 6, and half the interval 2.4469 * sqrt(1 + 2).
    a, b = [90 - 3**0.5, 90, 90 + 3**0.5], [78, 80, 82, 84, 86]
    assert report.welch(a, b) == report.welch(b, a) == pytest.approx(2.4469 * 3**0.5, abs=1e-3)
    # With no spread in one of them it is the other's t interval; in both there is none.
    assert report.welch([1, 2, 3], [5, 5]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert report.welch([1.0, 1.0], [2.0, 2.0]) == math.inf


def test_summary(tmp_path):
    text = parts(tmp_path)["summary"]
    assert text.startswith("Full-length runs here: 0 of the report's 13 settings; whether the ")
    assert "is not known yet." in text and "Ours" not in text and text.count("\n|") == 18
    for row in ROWS:
        write_log(tmp_path, *(float(row[1]) + d for d in (0.1, 0.2, 0.6)), **setting(row))
    write_log(tmp_path, 90.5, 90.0, 95.0, **setting(ROWS[12]), precision="bf16")
    write_log(tmp_path, 85, 84, **setting(ROWS[7]), device="NVIDIA H200")
    write_log(tmp_path, 80, **setting(ROWS[0]) | {"iters": 3200, "step": 500})  # not in this table
    lines = parts(tmp_path)["summary"].splitlines()
    half = [4.3027 * (4 / 3) ** 0.5 * statistics.stdev(three)  # dof 2
            for three in ((0.1, 0.2, 0.6), (90.5, 90, 95))]  # fmt: skip
    tf32 = {tuple(ROWS[7][2:]): "85.00, 84.00 | -0.46"}
    bf16 = {tuple(ROWS[12][2:]): f"91.83 ± 2.75 (3) | +0.76 | ± {half[1]:.2f}, report inside"}
    assert lines == [
        "Full-length runs here: 13 of the report's 13 settings.",
        "The largest difference from the report's accuracy is +0.76 percentage points,",
        "91.83 ± 2.75 (3) % against 91.07 % (sgd, lr 0.3, bs 128, step 5000, iters 32000; "
        "bf16, runs: 3).",
        "",
        "| Table | optimizer | lr | bs | step | iters | Report, % | Ours in float32, % | "
        "Difference | 95 % for one more run | Ours in TF32, % | Difference | "
        "Ours in bf16, % | Difference | 95 % for one more run |",
        "|" + "---|" * 15,
        *(f"| {table} | {' | '.join(row)} | {accuracy} | {float(accuracy) + 0.3:.2f} ± 0.26 (3) | "
          f"+0.30 | ± {half[0]:.2f}, report inside | {tf32.get((*row,), ' | ')} | "
          f"{bf16.get((*row,), ' |  | ')} |" for table, accuracy, *row in ROWS),
    ]  # fmt: skip
    write_log(tmp_path, 90.5, 90.55, 90.6, **setting(ROWS[12]), precision="bf16")
    text = parts(tmp_path)["summary"]
    assert "| 90.55 ± 0.05 (3) | -0.52 | ± 0.25, report outside |" in text
    assert "is -0.52 percentage points,\n" in text


CLAIMS = """4 | optimizer asgd | optimizer adam | +28.48
4 | optimizer asgd | optimizer sgd | +0.44
4 | optimizer asgd | optimizer adagrad | +4.05
4 | optimizer sgd | optimizer adam | +28.04
4 | optimizer adagrad | optimizer adam | +24.43
5 | lr 0.3 | lr 0.1 | +0.80
5 | lr 0.3 | lr 0.5 | +1.61
6 | bs 128 | bs 32 | +6.11
6 | bs 128 | bs 64 | +1.76
6 | bs 128 | bs 256 | +0.67
7 | step 8000 | step 4000 | +2.82
7 | step 8000 | step 5000 | +1.58
7 | step 8000 | step 10000 | +0.51
extended | step 10000, iters 64000 | step 8000, iters 32000 | +0.53""".splitlines()


def test_verdicts(tmp_path):
    lines = parts(tmp_path)["verdicts"].splitlines()[2:]
    assert lines == [f"| {claim} | not tested |" for claim in CLAIMS]
    # Of two runs each that are 0.1 apart: dof 2, deviations sqrt(0.005), half 4.303 * sqrt(0.005).
    write_log(tmp_path, 70, 70.1, **setting(ROWS[5]))
    write_log(tmp_path, 80, 80.1, **setting(ROWS[4]))
    write_log(tmp_path, 60, 60.1, **setting(ROWS[6]))
    write_log(tmp_path, 90, **setting(ROWS[6]), precision="bf16")
    write_log(tmp_path, 90, **setting(ROWS[5]), precision="bf16")
    write_log(tmp_path, *range(90, 95), **setting(ROWS[4]), precision="bf16")
    write_log(tmp_path, 91, 92, 93, **setting(ROWS[9]), device="NVIDIA H200")
    write_log(tmp_path, 91.5, 92.5, 93.5, **setting(ROWS[10]), device="NVIDIA H200")
    write_log(tmp_path, 91, 92, 93, 94, **setting(ROWS[9]), precision="bf16")
    write_log(tmp_path, 91, 92, **setting(ROWS[7]), precision="fp32", device="NVIDIA H200")
    write_log(tmp_path, 95, **setting(ROWS[13]))
    write_log(tmp_path, 94, 94.4, 94.1, **setting(ROWS[14]))
    write_log(tmp_path, 93, **setting(ROWS[15]))
    text = parts(tmp_path)["verdicts"]
    for claim, cells in {
        CLAIMS[5]: "-10.00 | -10.30 to -9.70 | float32 | 2, 2 | contradicted",
        CLAIMS[6]: "+10.00 | +9.70 to +10.30 | float32 | 2, 2 | supported",
        CLAIMS[7]: " |  | bf16 | 4, 0 | not tested",
        CLAIMS[8]: "+2.50 |  | bf16 | 4, 1 | not tested",
        # dof 4, deviations 1: half 2.7764 * sqrt(2 / 3)
        CLAIMS[9]: "-0.50 | -2.77 to +1.77 | TF32 | 3, 3 | undecided",
        CLAIMS[12]: "+0.83 |  | float32 | 1, 3 | not tested",
        CLAIMS[13]: "-2.00 |  | float32 | 1, 1 | not tested",
    }.items():
        assert f"| {claim} | {cells} |\n" in text + "\n"


def test_start_of_training(tmp_path):
    tenth = setting(ROWS[14]) | {"step": 1000, "iters": 3200}
    losses = [i / 100 for i in range(1, 321)]  # a line every 10 iterations
    write_log(tmp_path, 50, 51, losses=losses, **tenth)
    write_log(tmp_path, 50, losses=losses[:16], seeds=[2], **tenth)  # a line every 200
    write_log(tmp_path, 90, losses=losses, seeds=[1], **setting(ROWS[14]))  # a line every 100
    write_log(tmp_path, 90, losses=losses, precision="bf16", **setting(ROWS[14]))
    write_log(tmp_path, 90, losses=losses, precision="bf16", **setting(ROWS[13]))
    write_log(tmp_path, 90, losses=losses, **setting(ROWS[0]) | {"step": 50, "iters": 320})
    lines = parts(tmp_path)["start of training"].splitlines()
    assert lines[0].endswith("| Iteration | Author's loss | Author's equal runs | "
                             "Our loss in float32 | Our loss in bf16 |")  # fmt: skip
    # Seeds 0: mean of lines 91 to 100; 1: line 10 of its longer run; 2: line 5.
    ours = report.several([0.955, 0.1, 0.05], 3)
    five = [LOSS[run][8000] for run in SEVEN if int(AUTHOR[run]["step"]) >= 8000]
    assert len(SEVEN) == 7 and len(five) == 5
    assert lines[2:] == [
        f"| sgd | 0.3 | 128 | 8000 | 32000 | 8000 | {LOSS['0406214550'][8000]:.3f} | "
        f"{min(five):.3f} to {max(five):.3f} (5) |  | 0.800 |",
        f"| sgd | 0.3 | 128 | 10000 | 32000 | 1000 | {LOSS['0406223010'][1000]:.3f} | "
        f"1.547 to 1.718 (7) | {ours} | 0.100 |",
    ]


def test_logs_left_out(tmp_path):
    write_log(tmp_path, 80, step=8000)
    (log,) = tmp_path.iterdir()
    one, two, three = log.read_text().replace(",0,cifar10", ",1,cifar10").splitlines(True)
    shutil.copy(RESULTS / "author.csv", tmp_path)
    half = "incomplete: 16000 of 32000 iterations"
    whole = one + two + three
    contents = [
        ("", "incomplete: no line yet"), (one, "incomplete: no line yet"), (one + two, half),
        (one[:9], "incomplete: no line yet"), (whole[:-1], half), (whole[: -len(three) + 9], half),
        (one + two.replace(",2.0,,", ",2.0,80,"), half),
        (whole.replace(",80.00,", ",,"), "incomplete: 32000 of 32000 iterations"),
        (whole.replace(",1.0,", ",inf,"), "diverged: the loss is inf at iteration 32000"),
        (one + two.replace(",2.0,", ",nan,"), "diverged: the loss is nan at iteration 16000"),
        *((whole.replace(name, "x"), f"damaged: KeyError('{name}')")
          for name in ("lr0", "seed", "precision", "torch", "iters")),
        (whole.replace(",2.0,", ",two,"), "could not convert string to float: 'two'"),
        *((one + lines, "damaged: its lines do not belong together") for lines in (
            two.replace(",128,", ",64,") + three, three + two, two + three + three)),
        *((whole.replace(old, new), f"other settings: {why}") for old, new, why in (
            (",0.2,", ",0.5,", "gamma 0.5"), (",0.9,", ",0.8,", "momentum 0.8"),
            (",0.0001,", ",0.0,", "wd 0.0"), (",cifar10,", ",synthetic,", "data synthetic"))),
        (one + two.replace("cpu 2 threads", "NVIDIA") + three, "other settings: TF32, float32"),
        *((whole.replace(old, new), "not a row of the tables") for old, new in (
            ("sgd,0.3", "sgd,0.2"), (",8000,", ",4001,"), (",8000,", ",800,"))),
        (whole.replace(",1,cifar10", ",0,cifar10"), f"same settings and seed as {log.name}"),
    ]  # fmt: skip
    rows = report.read_rows()
    for content, why in contents:
        (tmp_path / "z.csv").write_text(content)
        runs, left_out = report.collect(tmp_path, rows)
        assert left_out == [f"- `z.csv`: {why}"], content
        assert [run.accuracy for run in runs] == [80]
    assert parts(tmp_path)["logs left out"] == f"- `z.csv`: {why}"
    (tmp_path / "z.csv").write_text(one + two.replace("2 threads,2.15", "8 threads,2.14") + three)
    (tmp_path / "folder.csv").mkdir()
    page = parts(tmp_path)
    assert page["summary"].count("| 80.00, 80.00 | -12.65 |") == 1
    machine = "cpu 8 threads, PyTorch 2.14.0, then cpu 2 threads, PyTorch 2.15.0"
    assert f"| [z](z.csv) | full | 1 | float32 | 80.00 | {machine} |" in page["runs"]
    assert "`folder.csv`: [Errno 21] Is a directory" in page["logs left out"]


def test_arithmetic_and_runs(tmp_path):
    for precision, device, kind in (
        ("tf32", "cpu", "float32"), ("tf32", "cpu 2 threads", "float32"),
        ("tf32", "mps", "float32"), ("tf32", "NVIDIA H200", "TF32"),
        ("fp32", "NVIDIA H200", "float32"), ("bf16", "cpu", "bf16"),
        ("bf16", "NVIDIA H200", "bf16")):  # fmt: skip
        assert report.arithmetic({"precision": precision, "device": device}) == kind
    shutil.copytree(RESULTS, tmp_path / "logs")
    before = parts(RESULTS)
    write_log(tmp_path / "logs", 84.44, **setting(ROWS[7]), precision="bf16", name="b32")
    write_log(tmp_path / "logs", 89.99, **setting(ROWS[4]), precision="bf16", name="b64")
    write_log(tmp_path / "logs", 43.21, **setting(ROWS[6]) | {"iters": 3200, "step": 500}, name="z")
    after = parts(tmp_path / "logs")
    summary = after["summary"]
    assert "% | Ours in float32, % | Difference | Ours in bf16, % | Difference |\n" in summary
    assert "| 84.96 | 85.09 | +0.13 | 84.44 | -0.52 |\n" in summary
    assert summary.count("| 88.51 |  |  | 89.99 | +1.48 |\n") == 2
    new = set(after["runs"].splitlines()) - set(before["runs"].splitlines())
    machine = "cpu 2 threads, PyTorch 2.15.0"
    assert new == {f"| [{name}]({name}.csv) | full | 0 | bf16 | {final} | {machine} |"
                   for name, final in (("b32", 84.44), ("b64", 89.99))}  # fmt: skip
    twin = "sgd_lr0.5_bs64_step500_iters3200_seed0.csv"
    assert after["logs left out"] == f"- `z.csv`: same settings and seed as {twin}"
    for log in RESULTS.glob("*_iters3200_*.csv"):  # no accuracy of a shortened run is shown
        assert not re.search(rf"\D{read_rows(log)[-1]['test_acc']} *\|", "".join(before.values()))


def curves(ax) -> dict[str, tuple]:
    """A panel's curves by label: {iteration: loss}, marked iterations, colour, line style."""
    found = {}
    for line in ax.lines:
        x, y = map(list, line.get_data())
        marked = [x[i] for i in line.get_markevery()]
        found[line.get_label()] = dict(zip(x, y)), marked, line.get_color(), line.get_linestyle()
    return found


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("number, at, names", [
    (4, 3, ["optimizer adam", "optimizer sgd", "optimizer adagrad", "optimizer asgd"]),
    (5, 6, ["lr 0.1", "lr 0.3", "lr 0.5"]),
    (6, 10, ["bs 32", "bs 64", "bs 128", "bs 256"]),
    (7, 14, ["step 4000", "step 5000", "step 8000", "step 10000"]),
    (8, 15, ["step 8000, iters 32000", "step 10000, iters 64000"])])  # fmt: skip
def test_figures(number, at, names, tmp_path):
    pytest.importorskip("matplotlib")
    rows = report.read_rows()
    author = [f"{name}, author" for name in names]
    figure = report.draw_figure(number, rows, [])
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["no full-length run yet"]
    assert legend(figure) == [*curves(figure.axes[0])] == author
    logs = [ROWS[13], ROWS[15]] if number == 8 else [row for row in ROWS if row[0] == str(number)]
    for row, (curve, marked, _, style) in zip(logs, curves(figure.axes[0]).values(), strict=True):
        (run,) = (run for run, line in AUTHOR.items() if line["test_acc"] == row[1])
        step, iters = int(row[5]), int(row[6])
        assert (curve, style) == (LOSS[run], "--")
        assert marked == sorted({*range(step, iters + 1, step), iters})
    # Of its last row two runs in float32, one in bf16; of another row one at 1/10, one too short.
    last, other = setting(ROWS[at]), setting(logs[0])
    write_log(tmp_path, 90, losses=[1, 2, 3, 4], **last)
    write_log(tmp_path, 90, losses=[2, 4, 6, 8], seeds=[1], **last)
    write_log(tmp_path, 90, losses=[5, 6, 7, 8], **last, precision="bf16")
    step, losses = other["step"] // 10, [i / 100 for i in range(1, 321)]
    write_log(tmp_path, 50, losses=losses, **other | {"step": step, "iters": 3200})
    write_log(tmp_path, 50, **other | {"step": step // 10, "iters": 320})
    figure = report.draw_figure(number, rows, report.collect(tmp_path, rows)[0])
    full, tenth = figure.axes
    ours = [f"{names[-1]}, ours in bf16", *(f"{names[i]}, ours in float32" for i in (-1, 0))]
    assert legend(figure)[: len(author)] == author
    assert sorted(legend(figure)[len(author) :]) == sorted(ours)
    assert full.get_title(loc="left") == "full length" and full.get_yscale() == "log"
    color, quarters = curves(full)[author[-1]][2], [last["iters"] // 4 * n for n in (1, 2, 3, 4)]
    marked = [i for i in quarters if i % last["step"] == 0 or i == last["iters"]]
    assert curves(full)[ours[0]] == (dict(zip(quarters, [5, 6, 7, 8])), marked, color, ":")
    assert curves(full)[ours[1]] == (dict(zip(quarters, [1.5, 3, 4.5, 6])), marked, color, "-")
    band = [path.vertices for path in full.collections[len(author)].get_paths()]
    assert {(quarters[2], 3), (quarters[2], 6)} <= {tuple(xy) for path in band for xy in path}
    assert tenth.get_title(loc="left") == "ours at 1/10, until their first decay"
    hundreds = {i: pytest.approx(i / 1000 - 0.045) for i in range(100, step + 1, 100)}
    assert curves(tenth)[ours[2]] == (hundreds, [step], curves(full)[author[0]][2], "-")
    assert {*curves(tenth)} == {*author, ours[2]} and [*curves(tenth)[author[0]][0]] == [*hundreds]


@pytest.mark.parametrize("flags, code", [
    ("--log x", 2), ("x", 2), ("--figures", 2), ("--logs no", 1)])  # fmt: skip
def test_errors_of_report(flags, code):
    result = script("report.py", *flags.split())
    assert result.returncode == code and not result.stdout
    assert re.fullmatch(rf"report\.py: .*{flags.split()[-1]}.*\n", result.stderr)


def test_pages_are_renewed_and_figures_drawn(tmp_path):
    write_log(tmp_path / "logs", 91.5)
    shutil.copytree(RESULTS, tmp_path / "results")
    for name in ("report.py", "run_all.sh", "README.md"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    command = [sys.executable, tmp_path / "report.py", "--logs", tmp_path / "logs", "--write"]
    page = subprocess.check_output(command).decode("utf-8")
    assert page == (tmp_path / "results" / "README.md").read_text("utf-8")
    before, after = ((folder / "README.md").read_text("utf-8") for folder in (HERE, tmp_path))
    assert after == before.replace(parts(RESULTS)["summary"], parts(tmp_path / "logs")["summary"])
    command[-1:] = ["--figures", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stderr == "report.py: the figures need matplotlib: pip install matplotlib\n"
    pytest.importorskip("matplotlib")
    (tmp_path / "matplotlib.py").unlink()
    subprocess.check_call(command, stdout=subprocess.DEVNULL)
    assert {*tmp_path.glob("*.png")} == {tmp_path / f"figure{n}.png" for n in range(4, 9)}


def test_pages_show_the_committed_logs():
    main, page = ((HERE / name).read_text("utf-8") for name in ("README.md", "results/README.md"))
    computed = parts(RESULTS)
    assert len(computed) == 5
    for name, part in computed.items():
        block = f"<!-- {name} -->\n{part}\n<!-- /{name} -->\n"
        assert page.count(block) == 1 and main.count(block) == (name == "summary")
    for number in range(4, 9):
        assert f"![Figure {number}](figure{number}.png)" in page
        assert (RESULTS / f"figure{number}.png").exists()
    for text, folder in ((main, HERE), (page, RESULTS)):
        for link in re.findall(r"\]\(([^):#]+)\)", text):
            assert (folder / link).exists(), link


def test_numbers_in_the_text():
    main, page = (" ".join((HERE / name).read_text("utf-8").split()) for name in
                  ("README.md", "results/README.md"))  # fmt: skip

    def mean(run: str, start: int, end: int) -> float:
        return statistics.fmean(LOSS[run][i] for i in range(start + 100, end + 1, 100))

    early = [mean(run, 3000, 4000) for run in SEVEN]
    assert len(early) == 7 and f"is {min(early):.2f} to {max(early):.2f}. Decay step 10,000" in page
    late = [f"{mean(run, 31000, 32000):.4f}" for run in
            ("0406223010", "0407222653", "0406214550", "0406193350")]  # fmt: skip
    assert f"1,000 iterations {late[0]} and {late[1]}, on either side of the {late[2]} of" in page
    assert f"batch 256 ends at {late[3]} too, with 90.40 % against 92.65 %." in page
    adam = [LOSS["0406172725"][i] for i in range(1000, 5001, 100)]
    assert f"between {min(adam):.2f} and {max(adam):.2f} from iteration 1,000 to 5,000" in main
    distances = []
    for betas in ("", "_betas0.9-0.999"):
        ours = read_rows(RESULTS / "adam" / f"adam_lr0.1_bs64_step5000{betas}_iters1000_seed0.csv")
        squares = [(float(x["loss"]) - LOSS["0406172725"][int(x["iteration"])]) ** 2 for x in ours]
        distances.append(f"{statistics.fmean(squares) ** 0.5:.3f}")
        assert f"{float(ours[-1]['loss']):.2f}" == "1.85" and "both end at 1.85" in main
    assert f"(root mean square distance {distances[0]} against {distances[1]})" in main
    assert "0.1 with step 8,000 (91.80 %) and 0.3 with step 10,000 (91.89 %)" in main
    assert [AUTHOR[run]["test_acc"] for run in ("0406234842", "0407002842")] == ["91.80", "91.89"]
    epochs = [round(32000 / math.ceil(50000 / bs)) for bs in (32, 64, 128, 256)]
    assert "see the data {}, {}, {}, {} times".format(*epochs) in main
    assert "see the data {}, {}, {} and {} times".format(*epochs) in page
    frozen = {x["iteration"]: x["test_acc"] for x in
              read_rows(RESULTS / "sgd_lr0.1_bs64_step500_iters3200_seed0.csv")}  # fmt: skip
    assert f"[{frozen['2000']} %]" in page and f"and {frozen['3200']} % at its end" in page


def test_costs_and_timings():
    def hours(name: str) -> float:
        lines = read_rows(RESULTS / f"{name}_seed0.csv")
        seconds = [0.0, *(float(line["seconds"]) for line in lines)]
        gaps = [after - before for before, after in itertools.pairwise(seconds)]
        return statistics.median(gaps) * len(gaps) / 3600

    main = (HERE / "README.md").read_text("utf-8")
    bench = (RESULTS / "bench" / "README.md").read_text("utf-8")
    timings = read_rows(RESULTS / "bench" / "cpu.csv")
    ours = {x["bs"]: float(x["ms"]) * 32 / 3600 for x in timings if x["code"] == "this code"}
    full = [hours("sgd_lr0.3_bs32_step5000"), ours["64"],
            10 * hours("sgd_lr0.3_bs128_step400_iters3200"),
            10 * hours("sgd_lr0.3_bs256_step500_iters3200")]  # fmt: skip
    assert "| full | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(*full) in main
    assert f"gives {ours['256']:.1f} for\n256" in main
    total = full[0] + 6 * full[1] + 4 * full[2] + full[3]
    assert round(total, -1) == 100 and "about 100 hours" in main
    tenth = [hours(f"sgd_lr0.3_{name}_iters3200")
             for name in ("bs32_step500", "bs64_step500", "bs128_step800")]  # fmt: skip
    assert "| a tenth | {:.1f} | {:.1f} | {:.1f} | |".format(*tenth) in main
    ratios = [float(x["ratio"]) for x in timings if x["code"] == "this code"]
    assert f"[{min(ratios)} to {max(ratios)} times](results/bench)" in main
    for row in timings:
        cells = "| {bs} | {code} | {ms} ± {spread} | {images_per_s} | {tflops} | {ratio} |\n"
        assert cells.format(**row) in bench


# ---- bench.py, and CUDA --------------------------------------------------------------------------


def test_bench(tmp_path, monkeypatch, capsys):
    argv = "bench.py --bs 4 --steps 1 --rounds 2 --workers 0 --data synthetic --device cpu --csv"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "bench.csv")])
    bench.main()
    usual, ours = read_rows(tmp_path / "bench.csv")
    assert (usual["code"], ours["code"]) == ("usual loop", "this code")
    assert float(ours["images_per_s"]) == pytest.approx(4e3 / float(ours["ms"]), abs=1)
    assert float(ours["ratio"]) == pytest.approx(float(usual["ms"]) / float(ours["ms"]), abs=0.01)
    assert f"| 4 | this code | {ours['ms']} ± " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    "x", "--data synthetic --bs 4 1001", "--data synthetic --csv /dev/full"])  # fmt: skip
def test_errors_of_bench_come_before_the_timing(flags):
    result = script("bench.py", *flags.split())
    assert result.returncode in (1, 2) and not result.stdout
    assert re.fullmatch(rf"bench\.py: .*{flags.split()[-1]}.*\n", result.stderr)


def test_recorded_batch_trains_each_plan_once_at_its_rate(monkeypatch, capsys):
    optimizer, trained, recordings = SimpleNamespace(param_groups=[{}]), [], []

    def train_batch(plan):
        trained.append((plan[0, 0].item(), optimizer.param_groups[0]["lr"]))

    @contextmanager
    def record(graph, stream):
        """As CUDA does: nothing is computed, and the learning rate is a constant from now on."""
        try:
            yield
        except ValueError:
            raise RuntimeError("recording broken")  # leaving it raises once more
        recordings.append(trained.pop())
        plan, lr = recorded.plan, recordings[-1][1]
        graph.replay = lambda: trained.append((plan[0, 0].item(), lr))

    monkeypatch.setattr(torch, "cuda", Mock(CUDAGraph=SimpleNamespace, graph=record))
    recorded = train.RecordedBatch(train_batch, optimizer, batch_size=2)
    expected = [(t, 0.2 ** (t // 4)) for t in range(10)]
    for t, optimizer.param_groups[0]["lr"] in expected:
        recorded(torch.full([4, 2 - (t == 6)], t))  # the plan of iteration 6 is short
    assert trained == expected
    assert recordings == [expected[t] for t in (3, 4, 8)]  # after three to warm up, at each rate
    # A bug shows itself in a plain iteration; one line tells what a recording does not allow.
    recorded = train.RecordedBatch(Mock(side_effect=ValueError("why\nmore")), optimizer, 2)
    for _ in range(3):
        with pytest.raises(ValueError, match="why"):
            recorded(torch.zeros(4, 2))
    with pytest.raises(SystemExit):
        recorded(torch.zeros(4, 2))
    assert re.fullmatch(r"train\.py: [^\n]+\(why\); use --no-graph\n", capsys.readouterr().err)


# Strings: pytest evaluates them, but not the import of this file in the forks' server. See FORKS.
needs_cuda = pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA")
needs_mps = pytest.mark.skipif("not torch.backends.mps.is_available()", reason="no MPS")
SMALL_LR = {"sgd": 4e-5, "adam": 4e-6, "adagrad": 4e-6, "asgd": 8e-5}


def trained_on_cuda(flags: list[str], rates: list[float]) -> dict[str, torch.Tensor]:
    """The state after 15 iterations on generated images, five at each rate."""
    args = train.parse_args(flags)
    device = train.open_device("cuda", args.precision)
    training, _ = data.load("synthetic", device)
    torch.manual_seed(0)
    network = model.ResNet().to(device, memory_format=torch.channels_last)
    optimizer = train.make_optimizer(args, network)
    train_batch = train.make_train_batch(args, network, optimizer, training)
    loss_sum = torch.zeros((), device=device)
    for t, batch in zip(range(15), data.plans(training, args.bs, seed=0)):
        optimizer.param_groups[0]["lr"] = args.lr0 * rates[t // 5]
        loss_sum += train_batch(batch)
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
    [(optimizer, [], *rest) for optimizer in OPTIMIZERS
     for rest in (("fp32", 128, 0.01), ("tf32", 32, 0.5), ("bf16", 256, 0.5))]
    + [("sgd", ["--compile"], "fp32", 128, 0.01)],
)  # fmt: skip
def test_recorded_is_plain_on_cuda(optimizer, how, precision, bs, limit, monkeypatch):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16 on this card")
    if how and not (shutil.which("cc") and importlib.util.find_spec("triton")):
        pytest.skip("no compiler")
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(replay(g)))
    monkeypatch.setattr(F, "relu", F.silu)
    flags = f"--optimizer {optimizer} --lr {SMALL_LR[optimizer]} --bs {bs} --precision {precision}"
    plain, missed, ours = (
        trained_on_cuda([*flags.split(), *way], rates)
        for way, rates in ((["--no-graph"], [1, 5, 25]), (["--no-graph"], [1, 5, 5]),
                           (how, [1, 5, 25]))
    )  # fmt: skip
    short = sum(t % math.ceil(1000 / bs) == 1000 // bs for t in range(15))
    assert len(replays) == 15 - 3 - short  # three to warm up
    for name, value in plain.items():
        change, apart = ((other[name] - value).norm().item() for other in (missed, ours))
        assert 0 < change and apart < limit * change, name


@needs_cuda
def test_failed_recording_on_cuda_and_without_it(tmp_path):
    """A wait for the device, in the recording of the fourth iteration, ends it."""
    wait = (at, "call", "zero_grad", 4, torch.cuda.synchronize)
    result = call(tmp_path, *SHORT, "--bs", 5, "--device", "cuda", hook=wait)
    assert_one_line_error(result, 1, "recorded", "--no-graph")
    result = call(tmp_path, *SHORT, "--bs", 5, "--device", "cuda", "--no-graph", hook=wait)
    assert result.code == 0 and "from iteration 2," in result.out


def smooth(kill: bool) -> None:
    """SiLU in the place of ReLU in this process, which perhaps kills itself eight iterations on."""
    F.relu = F.silu
    if kill:
        at("call", "zero_grad", 9, raise_signal, SIGKILL)


@pytest.mark.parametrize("device, optimizer", [
    pytest.param(device, optimizer, marks=needs) for optimizer in OPTIMIZERS
    for device, needs in (("cuda", needs_cuda), ("mps", needs_mps))])  # fmt: skip
def test_killed_and_continued_on_a_gpu_on_a_cpu_and_on_a_gpu(device, optimizer, tmp_path):
    (tmp_path / "cpu").mkdir()
    flags = "--data synthetic --bs 5 --iters 28 --step 10 --log-every 4 --ckpt-every 0".split()
    flags += ["--precision", "fp32", "--optimizer", optimizer, "--lr", 25 * SMALL_LR[optimizer]]
    whole = call(tmp_path / "cpu", *flags, "--device", "cpu", hook=(smooth, False))
    parts = [call(tmp_path, *flags, "--device", where, hook=(smooth, kill)) for where, kill
             in ((device, True), (device, True), ("cpu", True), (device, False))]  # fmt: skip
    assert [part.code for part in (whole, *parts)] == [0, *[-SIGKILL] * 3, 0]
    assert [part.err for part in parts] == [""] * 4
    (expected,), (log,) = (list((f / "logs").glob("*.csv")) for f in (tmp_path / "cpu", tmp_path))
    # On a CPU, one rounding of the weights moves no loss by over 5e-6, a missed decay one by 7e-3.
    for ours, theirs in zip(read_rows(log), read_rows(expected), strict=True):
        assert [ours[key] for key in ("iteration", "lr")] == [theirs["iteration"], theirs["lr"]]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=2e-4)

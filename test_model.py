"""All tests. They need no GPU, network or data set, and do more where there are some."""

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
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
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

import data
import model
import report
import train

torch.set_num_threads(1)  # the tests' own processes share the cores, and small batches need no more

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CPU = torch.device("cpu")
FILES = HERE / "data" / CIFAR10.base_folder
needs_cifar10 = pytest.mark.skipif(not FILES.exists(), reason="no CIFAR-10 in ./data")
OPTIMIZERS = {  # the report's; each adds the weight decay to the gradient
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": partial(torch.optim.Adam, betas=(0.7, 0.7)),
    "adagrad": torch.optim.Adagrad,
    "asgd": partial(torch.optim.ASGD, lambd=1e-4, alpha=0.75, t0=1e6),
}


# ---- the network (report, Model Architecture) ----------------------------------------------------
def test_network():
    network = model.ResNet()
    counts = {name: model.count_parameters(child) for name, child in network.named_children()}
    assert counts == {"stem": 928, "layer1": 55_680, "layer2": 427_648, "layer3": 1_116_416,
                      "layer4": 3_280_384, "pool": 0, "linear": 2_570}  # fmt: skip
    assert model.count_parameters(network) == 4_883_626
    assert model.count_parameters(model.ResNet(project_layer1=True)) == 4_886_890
    convs = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)}
    halving = {f"layer{i}.0.{part}.0" for i in (2, 3, 4) for part in ("conv1", "skip")}
    assert {name for name, conv in convs.items() if conv.stride != (1, 1)} == halving
    for conv in convs.values():
        bound = 1 / math.sqrt(conv.weight[0].numel())  # Kaiming uniform with a = sqrt(5)
        assert 0.9 * bound < conv.weight.abs().max() <= bound
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_block_adds_its_skip():
    x = torch.randn(2, 8, 5, 5)
    for block in (model.BasicBlock(8, 8), model.BasicBlock(8, 16, stride=2, project=True)):
        block.eval()
        torch.nn.init.zeros_(block.conv2[0].weight)  # the residual branch now gives zero
        assert torch.equal(block(x), block.skip(x).relu())


# ---- the data ------------------------------------------------------------------------------------
def test_augmentation_equals_torchvision_to_the_bit():
    images = data.synthetic()[0].images[:162]  # every byte occurs in them
    cases = [*itertools.product(range(9), range(9), range(2))]
    plan = torch.cat([torch.randperm(162)[None], torch.tensor(cases).T])
    batch = data.augment(data.pad(images), plan)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (index, top, left, flip) in zip(batch, plan.T.tolist()):
        expected = TF.crop(TF.pad(TF.to_pil_image(images[index]), 4), top, left, 32, 32)
        assert torch.equal(ours, TF.to_tensor(TF.hflip(expected) if flip else expected))
    # On MPS, batch norm of channels-last images has had wrong gradients.
    layouts = [data.layout(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]


def test_epoch_shows_each_image_once_and_augments_uniformly():
    split, state = data.Split(None, torch.zeros(50_000)), torch.get_rng_state()
    seeds_and_epochs = ((0, 0), (0, 1), (1, 0), (2, 1), (1, 2), (2**32 - 1, 0))
    plans = [data.epoch_plan(split, seed, epoch) for seed, epoch in seeds_and_epochs]
    assert torch.equal(state, torch.get_rng_state())  # the generator of the weights is left alone
    assert all(torch.equal(plan[0].sort().values, torch.arange(50_000)) for plan in plans)
    for plan, other in itertools.combinations(plans, 2):
        assert ((plan != other).float().mean(dim=1) > 0.3).all()
    _, top, left, flip = torch.cat(plans, dim=1)
    # Every combination of an image, and every pair of images or epochs, is as frequent as another.
    for values, cells in ((18 * top + 2 * left + flip, 162), (9 * top[:-1:2] + top[1::2], 81),
                          (9 * plans[0][1] + plans[1][1], 81)):  # fmt: skip
        expected = len(values) / cells
        chi_square = ((values.bincount(minlength=cells) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - cells + 1) < 4 * math.sqrt(2 * cells)


@pytest.fixture
def files(tmp_path_factory, monkeypatch):
    """A folder with files that pass for CIFAR-10's, of two images each, and no network."""
    folder = tmp_path_factory.mktemp("data") / CIFAR10.base_folder / CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = torch.arange(2 * 3072).remainder(251).to(torch.uint8).view(2, 3072).numpy()
    content = pickle.dumps({"data": images, "labels": [3, 7], "label_names": [*data.CLASSES]})
    md5 = hashlib.md5(content).hexdigest()
    for key in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, key, [[name, md5] for name, _ in getattr(CIFAR10, key)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5})
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ["batches.meta", md5]]:
        (folder / name).write_bytes(content)
    return folder


def test_files_are_found_where_unpackers_put_them(files):
    for root in (files, files.parent, files.parent.parent):
        training, test = data.load(str(root), CPU)
        assert training.labels.tolist() == 5 * [3, 7] and test.labels.tolist() == [3, 7]
        assert training.images[1, 0, 0, 1] == 3073 % 251  # the second image's second pixel's red


def test_archive_is_unpacked_whole_or_not_at_all(files, tmp_path, monkeypatch):
    archive = Path(shutil.make_archive(tmp_path / "cifar-10-python", "gztar", files.parent))
    with pytest.raises(data.DataError, match="cannot be fetched or unpacked .*no network.*https"):
        data.load(str(tmp_path), CPU)  # another archive than CIFAR-10's is no use
    assert os.listdir(tmp_path) == [CIFAR10.filename]
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(data.load(str(tmp_path), CPU)[0].labels) == 10
    assert sorted(os.listdir(tmp_path)) == [CIFAR10.base_folder, CIFAR10.filename]


def test_data_errors_name_what_failed(files, tmp_path):
    absent = r"no undamaged CIFAR-10 in .*data, and it cannot be fetched"
    with pytest.raises(data.DataError, match=absent):
        data.load(str(tmp_path / "no" / "data"), CPU)
    assert not list(tmp_path.iterdir())
    (files / "data_batch_2").write_bytes(b"damaged")
    (files / "batches.meta").unlink()
    with pytest.raises(data.DataError, match=f"in {files}: data_batch_2, batches.meta; put the"):
        data.load(str(files), CPU)
    for function in ("os.listdir", "torchvision.datasets.utils.calculate_md5"):
        with patch(function, side_effect=PermissionError(13, "Permission denied", "x/y")):
            with pytest.raises(data.DataError, match=r"cannot read .*Permission denied: 'x/y'$"):
                data.load(str(files), CPU)


@needs_cifar10
def test_real_cifar10():
    for n, train_set, split in zip((5000, 1000), (True, False), data.load(HERE / "data", CPU)):
        assert split.labels.bincount().tolist() == [n] * 10
        image, label = CIFAR10(HERE / "data", train_set)[4321]
        assert torch.equal(data.scale(split.images[4321:4322])[0], TF.to_tensor(image))
        assert split.labels[4321] == label


def test_figure_1(tmp_path):
    result = script("data.py", "--data", "synthetic", "--out", tmp_path / "1.png")
    assert ", ".join(data.CLASSES) in result.stdout
    picture = TF.to_tensor(Image.open(tmp_path / "1.png"))[:, ::2, ::2]  # drawn twice as large
    assert picture.shape == (3, 2 * (4 * 34 + 2), 10 * 34 + 2)  # each with a border of two pixels
    images, labels = data.load("synthetic", CPU)[0]
    for label in range(10):
        shown = picture[:, 2:34, 34 * label + 2 :][:, :, :32]
        assert torch.equal(shown, data.scale(images[labels == label][:1])[0])
    with patch("data.load", side_effect=KeyboardInterrupt), patch("signal.signal"):
        with patch("sys.argv", ["data.py"]), pytest.raises(SystemExit, match="^data.py: stopped$"):
            data.main()


# ---- training ------------------------------------------------------------------------------------
def config(*argv: str) -> dict:
    return train.make_config(train.parse_args([*argv]))


def test_it_learns_the_generated_images(tmp_path):
    flags = f"--data synthetic --device cpu --lr 0.003 --bs 16 --iters 40 --logs {tmp_path}"
    train.train(train.parse_args(flags.split()))
    (log,) = tmp_path.glob("*.csv")
    assert float(read_log(log)[-1]["test_acc"]) > 40  # chance is 10


def test_evaluate_counts_every_image_once_and_changes_nothing():
    # It takes the place of the brightest byte for the label, and in training mode always 0.
    network = torch.nn.Sequential(torch.nn.Dropout(1), torch.nn.Flatten())
    labels, wrong = torch.arange(2300) % 9 + 1, torch.arange(2300) % 7 == 0
    images = F.one_hot(labels + wrong, 3072).to(torch.uint8).view(2300, 3, 32, 32)
    correct = train.evaluate(network, data.Split(images, labels), "tf32")
    assert torch.equal(correct, 100 * (~wrong).double()) and network.training


def test_wrong_gradients_of_a_device_are_noticed():
    split, _ = ten_images("synthetic", CPU)
    train.check_against_cpu(split)  # the CPU agrees with itself
    for factor in (2, 0, math.nan, 1.2):
        wrong, right = model.ResNet(), model.ResNet()
        right.load_state_dict(wrong.state_dict())
        wrong.layer2[0].conv1[0].weight.register_hook(lambda gradient: factor * gradient)
        with patch("train.ResNet", side_effect=[wrong, right]), patch("train.fail") as fail:
            train.check_against_cpu(split)
        assert ("--device cpu" in str(fail.call_args)) == (factor != 1.2)


# The command line runs in forks of a server that has imported PyTorch, as that takes seconds.
# `call` runs train.py there on ten images, and gives its exit code and what it printed. Its hook is
# a function called first, such as `at`, which interferes at a given moment.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_model"])  # must not ask for CUDA, or its forks cannot use it


def ten_images(*args, load=data.load) -> list[data.Split]:
    """What data.load gives, cut to ten images for training and eleven for the test."""
    return [data.Split(*(x[:n] for x in split)) for n, split in zip((10, 11), load(*args))]


def slow_clock() -> None:
    """Each look at this process's clock takes 25 s, each evaluation and each save 10,000 s."""
    now = [0]

    def later(seconds: int, result=None):
        now[0] += seconds
        return now[0] if result is None else result

    time.perf_counter = lambda: later(25)
    train.evaluate = lambda *args, old=train.evaluate: later(10_000, old(*args))
    train.save = lambda *args, old=train.save, **named: later(10_000, old(*args, **named))


def run_main(folder: Path, argv: list[str], hook) -> None:
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.dont_write_bytecode = True  # which replaces files too: see `at`
    data.load = ten_images
    slow_clock()
    sys.argv = ["train.py", *argv]
    if hook:
        hook[0](*hook[1:])
    train.main()


def call(folder: Path, *argv, hook=None) -> SimpleNamespace:
    """Run train.py in `folder`, after `hook`: a function, and its arguments."""
    process = FORKS.Process(target=run_main, args=(folder, [*map(str, argv)], hook), daemon=True)
    process.start()
    process.join(120)
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


def read_log(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def outcome(folder: Path) -> dict[str, bytes]:
    """The files of LOGS, to the byte: even the seconds are the same, thanks to the slow clock."""
    return {path.name: path.read_bytes() for path in (folder / "logs").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders in which SHORT ran to its end, by optimizer."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in OPTIMIZERS}
    for optimizer, folder in folders.items():
        assert call(folder, *SHORT, "--optimizer", optimizer).code == 0
    return folders


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_log_output_weights_and_eval_against_a_recomputation(name, undisturbed, tmp_path):
    """Losses, accuracies, a decay of the learning rate, and an epoch's short last batch."""
    flags, run, folder = [*SHORT, "--optimizer", name], NAME.replace("sgd", name), undisturbed[name]
    training, test = ten_images("synthetic", CPU)
    torch.manual_seed(1)
    network = model.ResNet().to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](network.parameters(), lr=0.3, weight_decay=1e-4)
    ours = train.make_optimizer(train.parse_args(flags), network)
    assert repr(ours) == repr(optimizer)  # type and settings
    plans = [data.epoch_plan(training, seed=1, epoch=epoch).split(4, dim=1) for epoch in (0, 1)]
    losses, correct = [], []
    for plan, lr in zip(plans[0] + plans[1], (0.3, 0.3, 0.3, 0.06, 0.06)):
        optimizer.param_groups[0]["lr"] = lr
        images = data.augment(data.pad(training.images), plan)
        loss = F.cross_entropy(network(images), training.labels[plan[0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            guess = network.eval()(data.scale(test.images)).argmax(1)
        network.train()
        correct.append(100 * (guess == test.labels).double())
    constant = ",".join(map(str, [*config(*flags).values(), "cpu 1 threads", torch.__version__]))
    log = ["optimizer,lr0,bs,step,gamma,momentum,betas,wd,iters,seed,data,precision,device,torch,"
           "iteration,lr,loss,test_acc,seconds"]  # fmt: skip
    shown = [f"{run}: cpu 1 threads, from iteration 0"]
    for end, lr, loss, acc, seconds, left in (
        (2, 0.3, (losses[0] + losses[1]) / 2, "", 25, 1),
        (4, 0.06, (losses[2] + losses[3]) / 2, f"{correct[3].mean():.2f}", 50, 0),
        (5, 0.06, losses[4], f"{correct[4].mean():.2f}", 75, 0),
    ):
        log.append(f"{constant},{end},{lr},{loss:.6f},{acc},{seconds}.00")
        shown.append(f"{end}/5  loss {loss:.4f}  test {acc or '-':>5} %  {left} min left  {run}")
    shown.append(f"75 s of training; log logs/{run}.csv, weights logs/{run}.pt")
    assert (folder / "stdout").read_text().splitlines() == shown
    log_path, weights = sorted((folder / "logs").iterdir())
    assert log_path.name == f"{run}.csv" and log_path.read_text().splitlines() == log
    saved = torch.load(weights, weights_only=True)
    assert weights.name == f"{run}.pt" and saved["config"] == config(*flags)
    assert all(torch.equal(saved["model"][k], value) for k, value in network.state_dict().items())
    shown = [f"{run}: {acc} % of 11 test images"]
    for i, name in enumerate(data.CLASSES):
        shown.append(f"{name:<10} {correct[4][test.labels == i].mean():6.2f} %")
    result = call(tmp_path, "--eval", weights, "--device", "cpu")  # data as trained on
    assert result.out.splitlines() == shown


@needs_cifar10
@pytest.mark.parametrize("weights", [*RESULTS.glob("*.pt")], ids=lambda file: file.stem)
def test_committed_weights_have_the_logged_accuracy(weights, capsys):
    train.test(train.parse_args(["--eval", str(weights), "--data", str(HERE / "data")]))
    shown = capsys.readouterr().out
    name, accuracy = re.match(r"(.+): ([\d.]+) % of 10,000 test images\n", shown).groups()
    logged = read_log(RESULTS / f"{name}.csv")[-1]["test_acc"]
    assert float(accuracy) == pytest.approx(float(logged), abs=0.02)


# ---- the command line ----------------------------------------------------------------------------
def test_defaults_are_the_reports_and_the_name_tells_every_other_setting():
    assert config() == {"optimizer": "sgd", "lr0": 0.3, "bs": 128, "step": 8000, "gamma": 0.2,
                        "momentum": 0.9, "betas": "", "wd": 1e-4, "iters": 32_000, "seed": 0,
                        "data": "cifar10", "precision": "tf32"}  # fmt: skip
    for flags, name in {  # what an optimizer does not have is not in its name
        "--betas 0.5 0.5": "sgd_lr0.3_bs128_step8000_seed0",
        "--optimizer adagrad --momentum 0.5 --seed 1": "adagrad_lr0.3_bs128_step8000_seed1",
        "--optimizer asgd --momentum 0.5 --betas 0.5 0.5": "asgd_lr0.3_bs128_step8000_seed0",
        "--optimizer adam --momentum 0.5 --lr 0.30000001": "adam_lr0.30000001_bs128_step8000_seed0",
        "--optimizer adam --betas 0.9 0.999": "adam_lr0.3_bs128_step8000_betas0.9-0.999_seed0",
        "--bs 64 --step 5000 --gamma 0.5 --momentum 0.8 --wd 0 --iters 100":
            "sgd_lr0.3_bs64_step5000_gamma0.5_momentum0.8_wd0.0_iters100_seed0",
        "--data synthetic --precision bf16": "sgd_lr0.3_bs128_step8000_synthetic_bf16_seed0",
    }.items():  # fmt: skip
        assert train.run_name(config(*flags.split())) == name


@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr -1", "--bs 0", "--bs 1.5", "--gamma 1.1", "--momentum 2", "--betas 0.9 1",
    "--seed -1", "--lr 1e38", "--ckpt-every -1", "--optimizer lion", "stray"])  # fmt: skip
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
def refuse(function: str, error: Exception) -> None:
    patch(function, side_effect=error).start()


# When, for `at`, and the signal. The files replaced are the checkpoints of iterations 0, 2 and 4,
# then the weights, each before its line of the log. backward returns twice, as it calls another.
KILLS = [("c_call", "replace", 1, SIGKILL), ("c_return", "replace", 1, SIGKILL),
         ("c_call", "fsync", 4, SIGKILL), ("call", "zero_grad", 2, SIGKILL),
         ("c_return", "replace", 1, SIGKILL), ("c_return", "TextIOWrapper.truncate", 1, SIGKILL),
         ("return", "backward", 2, SIGTERM), ("call", "evaluate", 1, SIGINT),
         ("c_return", "replace", 1, SIGKILL), ("call", "zero_grad", 1, SIGINT),
         ("c_return", "replace", 1, SIGKILL), ("c_call", "unlink", 1, SIGKILL)]  # fmt: skip
KILL_AFTER_TWO = (at, "call", "zero_grad", 3, raise_signal, SIGKILL)
# As on some network file systems, or on Windows: training goes on without a lock.
NO_LOCKS = {"adagrad": (refuse, "fcntl.flock", OSError("no locks")),
            "asgd": (exec, "import sys; sys.modules['fcntl'] = None")}  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_started_again_it_ends_as_if_undisturbed(optimizer, undisturbed, tmp_path):
    flags = (*SHORT, "--optimizer", optimizer)
    for *moment, number in KILLS if optimizer == "sgd" else KILLS[4:9:4]:
        result = call(tmp_path, *flags, hook=(at, *moment, raise_signal, number))
        assert (result.code, result.err) == (-number, ""), moment
    assert call(tmp_path, *flags, hook=NO_LOCKS.get(optimizer)).code == 0
    stop = (at, "call", "open_device", 1, raise_signal, SIGKILL)
    assert "is complete" in call(tmp_path, *flags, hook=stop).out
    assert outcome(tmp_path) == outcome(undisturbed[optimizer])


def test_files_are_on_disk_before_they_replace_others(tmp_path):
    """A power cut leaves of a file and of a folder's list of files what was last flushed."""
    events, replace = [], os.replace

    def note_flush(file) -> None:
        status = os.stat(file if isinstance(file, int) else file.fileno())
        (path,) = (p for p in (tmp_path, *tmp_path.iterdir()) if os.path.samestat(p.stat(), status))
        assert path.suffix != ".tmp" or status.st_size
        events.append(path.suffix)

    def note_replace(new, old) -> None:
        replace(new, old)
        events.append(f"replaces {old.suffix}")

    with patch("os.fsync", note_flush), patch("os.replace", note_replace):
        train.train(train.parse_args([*SHORT, "--logs", str(tmp_path)]))
    checkpoint, weights = ([".tmp", f"replaces {name}", "", ".csv"] for name in (".ckpt", ".pt"))
    assert events == 3 * checkpoint + weights


def test_truncated_log_and_log_of_another_process_are_left_alone(undisturbed, tmp_path):
    shutil.copytree(undisturbed["sgd"] / "logs", tmp_path / "logs")
    run = train.Run(train.parse_args([*SHORT, "--logs", f"{tmp_path}/logs"]))
    whole = run.log_path.read_text()
    for length in (0, 300, whole.rindex("cpu"), whole.rindex(",") + 1, whole.index("\n", 300) + 1):
        run.log_path.write_text(whole[:length])
        assert not run.is_complete()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "no checkpoint", "move it away")
    run.open_log()  # as a second process does
    assert_one_line_error(call(tmp_path, *SHORT), 1, "another process is training")
    assert run.log_path.read_text() == whole[:length]
    assert call(tmp_path, *SHORT, "--iters", 1).code == 0  # another configuration may


def test_divergence_is_logged_and_exits_with_3(tmp_path):
    """Its state is no checkpoint, so that a second start sees it again; it is never complete."""
    flags = "--data synthetic --bs 4 --lr 1e9 --log-every 1 --ckpt-every 0 --device cpu".split()
    for iters, start in ((9, 0), (9, 2), (3, 0), (3, 2)):
        result = call(tmp_path, *flags, "--iters", iters)
        assert_one_line_error(result, 3, "loss nan at iteration 3", "lower --lr")
        assert f"from iteration {start}\n" in result.out
        (log,) = (tmp_path / "logs").glob(f"*_iters{iters}_*.csv")
        assert [(row["loss"], row["test_acc"]) for row in read_log(log)][2:] == [("nan", "")]
    assert not list((tmp_path / "logs").glob("*.pt"))


def test_what_cannot_start_writes_nothing(tmp_path):
    absent = "cuda" if sys.platform == "darwin" else "mps"
    assert_one_line_error(call(tmp_path, *SHORT, "--device", absent), 1, f"no {absent} device")
    assert_one_line_error(call(tmp_path, *SHORT, "--bs", 11), 1, "--bs 11 is more than the 10")
    assert_one_line_error(call(tmp_path, "--eval", "none.pt"), 1, "No such file", "'none.pt'")
    assert_one_line_error(call(tmp_path, *SHORT, "--eval", ""), 1, "directory")
    (tmp_path / "data" / CIFAR10.base_folder).mkdir(parents=True)
    assert_one_line_error(call(tmp_path, "--device", "cpu"), 1, CIFAR10.base_folder, "missing")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").touch()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "logs")


def test_bad_files_and_trouble_with_good_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(tmp_path, *SHORT, hook=KILL_AFTER_TWO)
    ckpt, before = Path("logs", f"{NAME}.ckpt"), outcome(tmp_path)
    full_disk = (resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
    for hook, why in (
        (full_disk, f"[Errno 27] File too large: '{ckpt}'"),
        ((refuse, "zipfile.ZipFile", OSError("denied")), "denied"),
        ((refuse, "torch.nn.Module.load_state_dict", torch.OutOfMemoryError("full")), "full"),
    ):
        assert_one_line_error(call(tmp_path, *SHORT, hook=hook), 1, f"train.py: {why}; mend that")
        assert outcome(tmp_path) == before
    content, saved = ckpt.read_bytes(), torch.load(ckpt, weights_only=True)
    middle = len(content) // 2  # of the weights, where only a checksum sees a change
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    for bad in (
        content[:middle],
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        {"config": bomb, "model": {}},
        saved["model"],  # without anything else
        {**saved, "model": model.ResNet(project_layer1=True).state_dict()},
    ):
        ckpt.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, ckpt)
        before = outcome(tmp_path)
        for flags in (SHORT, ["--eval", ckpt]):
            assert_one_line_error(call(tmp_path, *flags), 1, f"{ckpt} does not fit this code")
        assert outcome(tmp_path) == before and not os.path.exists("exploded")
    torch.save({**saved, "config": saved["config"] | {"lr0": 0.1}}, ckpt)
    assert_one_line_error(call(tmp_path, *SHORT), 1, f"{ckpt} is of another run")


def test_state_of_another_layout_is_brought_to_the_parameters(tmp_path):
    """As on a Mac: contiguous here, channels last there. Fused optimizers insist on it."""
    call(tmp_path, *SHORT, hook=KILL_AFTER_TWO)
    args, network = train.parse_args([*SHORT, "--logs", f"{tmp_path}/logs"]), model.ResNet()
    run, optimizer = train.Run(args), train.make_optimizer(args, network)
    run.open_log()
    run.resume(network, optimizer)
    for p in network.parameters():
        assert optimizer.state[p]["momentum_buffer"].stride() == p.stride()


@pytest.mark.parametrize("command", [
    "train.py --data synthetic --device cpu", "data.py --data synthetic",
    f"report.py --logs {RESULTS}"])  # fmt: skip
def test_ends_quietly_when_nobody_reads(command, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *f"{HERE}/{command}".split()]
    assert not subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE).stderr
    os.close(write)


# ---- run_all.sh ----------------------------------------------------------------------------------
ROWS = report.read_rows()  # of the report's tables


def script(name: str, *args, **env) -> subprocess.CompletedProcess:
    how = {"cwd": "/", "capture_output": True, "encoding": "utf-8", "timeout": 600}
    how["env"] = os.environ | {"LC_ALL": "C", "OMP_NUM_THREADS": "1"} | env
    interpreter = "bash" if str(name).endswith("sh") else sys.executable
    return subprocess.run([interpreter, HERE / name, *args], **how)


@pytest.fixture
def stub(tmp_path):
    """An environment whose `python` only prints its arguments and does DO."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "python $*"\neval "$DO"\n')
    (tmp_path / "python").chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_list(tmp_path):
    (tmp_path / "a project").symlink_to(HERE)
    flags = ["--logs", "it's a folder", "--data=a\\b$HOME"]
    for tables, n, every in (("", 1, 100), ("4", 10, 10), ("5 7", 40, 2), ("extended 6", 1000, 1)):
        args = ["--list", *tables.split(), "--shorten", str(n), "--", *flags]
        lines = script(tmp_path / "a project" / "run_all.sh", *args).stdout.splitlines()
        runs = [f"python train.py --optimizer {name} --lr {lr} --bs {bs} --step {step // n} "
                f"--iters {iters // n} --log-every {every}"
                for table, _, (name, lr, bs, step, iters) in ROWS
                if table in (tables or "4567")]  # fmt: skip
        wanted = [run.split() + flags for run in dict.fromkeys(runs)]  # each once
        assert [shlex.split(line) for line in lines] == wanted


def test_run_all_usage_help_and_another_shell(stub):
    for argument in ("8", "--seed 1", "", "--shorten", "--shorten 3"):
        result = script("run_all.sh", "4", *(argument.split() or [""]), **stub)
        assert result.returncode == 2 and not result.stdout
        assert re.fullmatch(r"run_all\.sh: .*-- --seed 1\n", result.stderr)
    assert "bash run_all.sh --shorten 10" in script("run_all.sh", "--help").stdout
    in_sh = subprocess.check_output(["sh", HERE / "run_all.sh", "--list", "extended"], text=True)
    assert in_sh.count("python train.py") == 1


def test_failing_row_stops_the_others_only_if_all_would_fail(stub):
    flags = ["--", "--seed", "1", "--logs=x"]
    fail = "case $* in *'--optimizer a'* | *report*) exit 3; esac"
    result = script("run_all.sh", *flags, **stub, DO=fail)
    runs = script("run_all.sh", "--list", *flags).stdout.splitlines()
    _, *lines = result.stdout.splitlines()  # the first call asks for PyTorch
    assert lines[1::2] == runs and lines[24:] == ["python report.py --logs x"]
    assert lines[22] == "== Run 12 of 12, 0 min so far" and result.returncode == 1
    failed = [f"failed, exit 3: {run}" for run in runs if "--optimizer a" in run]
    failed.append("report.py failed")
    assert result.stderr == "".join(f"run_all.sh: {line}\n" for line in failed)
    result = script("run_all.sh", "extended", **stub)
    assert result.returncode == 0 and result.stdout.endswith("\npython report.py --logs logs\n")
    result = script("run_all.sh", "5", **stub, DO="case $* in *train*) exit 2; esac")
    assert result.returncode == 2 and result.stdout.count("python") == 2
    result = script("run_all.sh", "5", **stub, DO="exit 1")
    assert result.returncode == 127 and result.stdout.count("python") == 1
    assert re.fullmatch(r"run_all\.sh: no python with PyTorch .*activate.*\n", result.stderr)


def test_ctrl_c_ends_run_all_and_the_training(stub):
    signal(SIGINT, default_int_handler)  # a background job's children would ignore it
    env = os.environ | stub | {"DO": "case $* in *256*) exec sleep 60; esac"}
    process = subprocess.Popen(["bash", HERE / "run_all.sh"], env=env, start_new_session=True,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert any(b"--bs 256" in line for line in process.stdout)  # reads until there
    os.killpg(process.pid, SIGINT)  # as a terminal does
    process.communicate(timeout=10)  # ends when no process has its output open any more
    assert process.returncode == -SIGINT


def test_table_on_generated_images(stub, tmp_path):
    stub["DO"] = f"exec '{sys.executable}' \"$@\""
    flags = "5 --shorten 1000 -- --data synthetic --device cpu --bs 4 --logs".split()
    first, again = (script("run_all.sh", *flags, tmp_path / "its logs", **stub) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    assert again.stdout.count("is complete") == 3
    # report.py has read the logs, in which only the images are not the report's.
    left_out = "_bs4_step5_iters32_synthetic_seed0.csv`: other settings: data synthetic\n"
    assert again.stdout.count(left_out) == 3


# ---- report.py -----------------------------------------------------------------------------------
# The author's 15 logs: the last line of each, and its losses by final accuracy and iteration.
AUTHOR_LINES = read_log(RESULTS / "author.csv")
AUTHOR = {line["run"]: line for line in AUTHOR_LINES}
LOSS = {float(last["test_acc"]): {} for last in AUTHOR.values()}
for line in AUTHOR_LINES:
    LOSS[float(AUTHOR[line["run"]]["test_acc"])][int(line["iteration"])] = float(line["loss"])

HUNDREDS = {i: i for i in range(100, 3201, 100)}
RUNS = [  # made-up ones, with accuracies and, for the first of each group, losses
    report.Run(ROWS[row].setting, n, kind, "0", float(accuracy), loss, "", "")
    for row, n, kind, accuracies, *losses in (
        (1, 1, "float32", (88, 88.1), {1000: 1}, {2000: 1}),  # no iteration in common
        (3, 1, "float32", (87.9, 88)), (5, 1, "float32", (78, 78.1)),
        (6, 1, "float32", (68, 68.1), {1000: 1, 2000: 2}, {1000: 3, 2000: 6}),
        (6, 1, "bf16", (70, 70), {100: 5, 200: 5}), (13, 1, "float32", (95,), {100: 3, 8000: 1}),
        (9, 1, "TF32", (91, 92, 93), {5000: 0.4}), (9, 1, "bf16", (91, 91, 92, 92.5, 93, 94, 94)),
        (10, 1, "TF32", (90.5, 91.5, 92.5)),
        # Shortened runs count in no table of accuracies; decays within a hundred in none at all.
        (4, 10, "float32", (50,), HUNDREDS), (4, 100, "float32", (50,), HUNDREDS),
        (14, 10, "float32", (50, 50, 50), {1000: 0.1}, {1000: 0.955}, {1000: 0.955}),
        (13, 50, "float32", (50,), {100: 2.5}))
    for accuracy, loss in itertools.zip_longest(accuracies, losses, fillvalue={})
]  # fmt: skip


def test_rows_and_settings_are_the_reports():
    assert "".join(row.table for row in ROWS) == "444455566667777extended"
    columns = "test_acc optimizer lr0 bs step iters".split()
    logged = {tuple(x[name] for name in columns) for x in AUTHOR.values() if x["gamma"] == "0.2"}
    assert {(f"{row.accuracy:.2f}", *map(str, row.setting)) for row in ROWS} == logged


def test_t_quantile_and_welch():
    for dof, t in ((1, 12.7062), (1.5, 6.0167), (2, 4.3027), (6, 2.4469), (30, 2.0423)):
        assert report.t_quantile(dof) == pytest.approx(t, abs=1e-4)
    # Variances 3 and 10, n = 3 and 5: squares of the standard errors 1 and 2, so
    # dof = (1 + 2)^2 / (1^2 / 2 + 2^2 / 4) = 6, and half the interval 2.4469 * sqrt(1 + 2).
    half = report.welch([90 - 3**0.5, 90, 90 + 3**0.5], [78, 80, 82, 84, 86])
    assert half == pytest.approx(2.4469 * 3**0.5, abs=1e-3)
    # With no spread in one of them it is the other's t interval; in both there is none.
    assert report.welch([1, 2, 3], [5, 5]) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert report.welch([1.0, 1.0], [2.0, 2.0]) == math.inf


def test_tables():
    none = report.summary(ROWS, [])
    assert none.startswith("No full-length run yet.\n\n| Table |") and "Ours" not in none
    tables = report.summary(ROWS, RUNS), report.verdicts(ROWS, RUNS), report.starts(RUNS)
    assert [table.count("\n") for table in tables] == [4 + 17, 1 + 3 + 2 + 3 + 3 + 2 + 1, 1 + 5]
    # Half an interval is 4.303 * sqrt(0.005) at 2, 2 (dof 2), 2.7764 * sqrt(2 / 3) at 3, 3 (dof 4).
    for line in """\
In float32, 5 of 13 settings ran at full length. The largest difference is -19.65 points.
| Ours in TF32, % | Difference | 95 % for one more run | Ours in bf16, % | Difference | 95 % for
| 91.07 |  |  | 92.00 ± 1.00 (3) | +0.93 | ± 4.97, report inside | 92.50 ± 1.26 (7) | +1.43 | ± 3.29
| 4 | optimizer asgd | optimizer sgd | +0.44 | -0.10 (-0.40 to +0.20) | float32 | 2, 2 | undecided |
| 5 | lr 0.3 | lr 0.1 | +0.80 | -10.00 (-10.30 to -9.70) | float32 | 2, 2 | contradicted |
| 5 | lr 0.3 | lr 0.5 | +1.61 | +10.00 (+9.70 to +10.30) | float32 | 2, 2 | supported |
| 6 | bs 128 | bs 256 | +0.67 | +0.50 (-1.77 to +2.77) | TF32 | 3, 3 | undecided |
| 7 | step 8000 | step 5000 | +1.58 |  | bf16 | 0, 7 | not tested |
| sgd | 0.1 | 64 | 5000 | 32000 | 500 | 1.841 | 500.000 |
| sgd | 0.3 | 128 | 5000 | 32000 | 5000 | 0.556 |  | 0.400 |
| sgd | 0.3 | 128 | 10000 | 32000 | 1000 | 1.569 | 0.670 ± 0.494 (3) |
| sgd | 0.3 | 128 | 8000 | 32000 | 100 | 2.647 | 3.000, 2.500 |\
""".splitlines():
        assert any(line in table for table in tables), line


def test_logs(tmp_path):
    constant = "sgd,0.3,128,8000,0.2,0.9,,0.0001,32000,1,cifar10,tf32,cpu 2 threads,2.15"
    head = ",".join(train.COLUMNS) + "\n"
    half, end = f"{constant},16000,0.1,2.0,,3600\n", f"{constant},32000,0.1,1.0,80.00,3600\n"
    whole, tenth = head + half + end, constant.replace("8000", "800").replace("32000", "3200")
    logs = {
        "author": "",
        "bf16": whole.replace(",tf32,", ",bf16,"),
        "full": head + half.replace("2 threads,2.15", "8 threads,2.14") + end,
        "seed2": whole.replace(",1,c", ",2,c").replace(",80.00,", ",81.00,"),
        "seed3": whole.replace(",1,c", ",3,c").replace(",80.00,", ",82.00,"),
        "tenth": head + "".join(f"{tenth},{10 * i},0.1,{i},{i},9\n" for i in (2, *range(1, 321))),
        "tf32": whole.replace(",cpu 2 threads,", ",NVIDIA H200,"),
    }
    bad = [
        (head, "incomplete: no line yet"),
        (whole[:-1], "incomplete: iteration 16000/32000, loss 2.0"),  # the end is missing
        (whole.replace(",80.00,", ",,1,"), "incomplete: iteration 32000/32000, loss 1.0"),
        (whole + "sgd,0.3\n", "invalid literal for int() with base 10: ''"),
        (whole, "same settings and seed as full.csv"),
        *((whole.replace(name, "x"), f"damaged: KeyError('{name}')")
          for name in ("lr0", "seed", "precision", "torch", "iters")),
        *((whole.replace(f",{report.FIXED[name]},", ",x,"), f"other settings: {name} x")
          for name in ("gamma", "momentum", "wd", "data")),
        (whole.replace(",0.9,,", ",,0.9 0.999,"), "other settings: betas 0.9 0.999"),
        *((whole.replace(*change), "not a row of the tables")
          for change in (("sgd,0.3", "sgd,0.2"), (",8000,", ",800,"))),
        *((head + half.replace(*change) + end, "more than one setting, seed or arithmetic in it")
          for change in ((",128,", ",64,"), (",1,c", ",2,c"), ("cpu 2", "NVIDIA 2"))),
    ]  # fmt: skip
    for name, log in (logs | {f"z{i:02}": log for i, (log, _) in enumerate(bad)}).items():
        (tmp_path / f"{name}.csv").write_text(log)
    (tmp_path / "z.csv").mkdir()
    runs, left_out = report.collect(tmp_path, ROWS)
    assert left_out.pop(0).startswith("- `z.csv`: [Errno 21] Is a directory")
    assert left_out == [f"- `z{i:02}.csv`: {why}" for i, (_, why) in enumerate(bad)]
    kinds = [(run.n, run.kind) for run in runs]
    assert kinds == [(1, "bf16"), *[(1, "float32")] * 3, (1, "TF32"), (10, "float32")]
    # Lines of 16,000 iterations say nothing of a hundred; ten of ten iterations do.
    losses = {100 * i: 10 * i - 4.5 for i in range(1, 33)}
    assert [run.loss for run in runs] == [{}] * 5 + [losses]
    printed = script("report.py", "--logs", tmp_path, PYTHONIOENCODING="ascii").stdout
    assert "| 92.65 | 81.00 ± 1.00 (3) | -11.65 | ± 4.97, report outside |" in printed
    machines = "cpu 8 threads, PyTorch 2.14, then cpu 2 threads, PyTorch 2.15"
    assert f"| [full.csv](full.csv) | 1 | float32 | 80.00 | {machines} |\n" in printed
    for precision, device in (("fp32", "NVIDIA H200"), ("tf32", "mps")):
        assert report.arithmetic({"precision": precision, "device": device}) == "float32"


def curves(ax) -> dict[str, tuple]:
    """A panel's curves by label: style, colour, {iteration: loss}. Its legend names these only."""
    labels = [line.get_label() for line in ax.lines]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == labels
    return {line.get_label(): (line.get_linestyle(), line.get_color(), dict(zip(*line.get_data())))
            for line in ax.lines}  # fmt: skip


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    for number, rows in ((4, ROWS[:4]), (6, ROWS[7:11]), (7, ROWS[11:15]), (8, ROWS[13::2]),
                         (5, ROWS[4:7])):  # fmt: skip
        (ax,) = report.draw_figure(number, ROWS, []).axes
        author = curves(ax)
        lines = [("--", color, LOSS[row.accuracy]) for color, row in zip(report.COLOURS, rows)]
        assert [*author.values()] == lines
        assert ax.get_title(loc="left") == "no full-length run yet"
    assert [*author] == ["lr 0.1, author", "lr 0.3, author", "lr 0.5, author"]
    full, tenth = report.draw_figure(5, ROWS, RUNS).axes
    assert full.get_title(loc="left") == "full length" and full.get_yscale() == "log"
    assert curves(full) == author | {
        "lr 0.5, ours in float32": ("-", report.COLOURS[2], {1000: 2, 2000: 4}),
        "lr 0.5, ours in bf16": ("-", report.COLOURS[2], {100: 5, 200: 5})}  # fmt: skip
    band = full.collections[3].get_paths()[0].vertices  # the first after the author's three
    assert {(2000, 2), (2000, 6)} <= {*map(tuple, band)}
    assert tenth.get_title(loc="left") == "ours at 1/10, until their first decay"
    ours = {"lr 0.1, ours in float32": ("-", report.COLOURS[0], HUNDREDS)}
    assert curves(tenth) == {
        name: (style, color, {i: loss[i] for i in range(100, 501, 100)})
        for name, (style, color, loss) in (author | ours).items()}  # fmt: skip
    # One point is no line, so step 8,000 at 1/50 has no panel.
    assert [len(curves(ax)) for ax in report.draw_figure(7, ROWS, RUNS).axes] == [4 + 1, 4]
    assert script("report.py", "--logs", RESULTS, "--figures", tmp_path).returncode == 0
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == re.findall(r"!\[Figure .\]\((.*)\)", (RESULTS / "README.md").read_text("utf-8"))


def test_pages(tmp_path):
    """Those committed are of the committed logs; a copy of the project renews its own."""
    for name in ("report.py", "run_all.sh"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(RESULTS, tmp_path / "results")
    pages = {page: (HERE / page).read_bytes() for page in ("README.md", "results/README.md")}
    for page, count in zip(pages, (1, 5)):
        text = pages[page].decode()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert ((HERE / page).parent / link).exists(), link
        made = re.compile(r"<!-- ([a-z ]+) -->\n(.*?)\n<!-- /\1 -->", re.S)
        assert len(made.findall(text)) == count
        emptied = made.sub(r"<!-- \1 -->\n\n<!-- /\1 -->", text)
        (tmp_path / page).write_text(emptied, "utf-8")
    command = [sys.executable, "-S", tmp_path / "report.py", "--write"]  # -S: no packages
    printed = subprocess.check_output(command).decode()
    for name, part in made.findall(text):
        assert f"## {name.capitalize()}\n\n{part}\n" in printed
    assert {page: (tmp_path / page).read_bytes() for page in pages} == pages
    failed = subprocess.run([*command, "--figures", tmp_path], capture_output=True, text=True)
    assert failed.stderr == "report.py: the figures need matplotlib: pip install matplotlib\n"
    assert failed.returncode == 1


def test_numbers_in_the_text():
    """The decimal numbers in the prose of the two pages, in order, are those of committed files."""
    loss, right, seconds = dict(LOSS), {}, {}  # by log and iteration
    for path in RESULTS.rglob("*seed?.csv"):
        log = str(path.relative_to(RESULTS)).removesuffix(".csv").removesuffix("_seed0")
        for column, values in (("loss", loss), ("test_acc", right), ("seconds", seconds)):
            values[log] = {int(line["iteration"]): float(line[column])
                           for line in read_log(path) if line[column]}  # fmt: skip
    ms = {(file, line["code"], line["bs"]): float(line["ms"])
          for file in ("cpu", "h200", "h200_bf16")
          for line in read_log(RESULTS / "bench" / f"{file}.csv")}  # fmt: skip
    speedup = {(f, code, bs): ms[f, "usual loop", bs] / ms[f, code, bs] for f, code, bs in ms}

    def mean(log: str | float, end: int) -> float:
        """Of the losses of the last 1,000 iterations until there."""
        return statistics.fmean(loss[log][i] for i in range(end - 900, end + 1, 100))

    def hours(log: str, first: int = 0) -> float:
        """Of 32,000 iterations, by the lines from iteration `first` on."""
        lines = [(i, s) for i, s in seconds[log].items() if i >= first]
        rates = [(s - r) / (i - h) for (h, r), (i, s) in itertools.pairwise(lines)]
        return statistics.median(rates) * 32000 / 3600

    def span(values) -> tuple[float, float]:
        return min(values), max(values)

    b32, b64, slow = (f"sgd_lr{x}_step5000" for x in ("0.3_bs32", "0.3_bs64", "0.1_bs64"))
    b128 = [f"sgd_lr0.3_bs128_step{step}000" for step in (4, 5, 8, 10)]
    adam = "adam_lr0.1_bs64_step5000"
    wd = f"adam/{adam}_betas0.9-0.999_wd0.0"
    # Our logs that were cut off late, and until when; the author's logs go by their accuracies.
    late = (("asgd_lr0.1_bs64_step5000", 30000, 88.95), ("sgd_lr0.5_bs64_step5000", 30000, 87.70),
            ("adagrad_lr0.1_bs64_step5000", 28000, 84.90), (adam, 28000, 60.47))  # fmt: skip
    author_b128 = (89.83, 91.07, 92.65, 92.14, 93.18, 91.80, 91.89)
    runs, _ = report.collect(RESULTS, ROWS)
    gaps = {row.setting: ours - row.accuracy for row in ROWS for kind in ("float32", "TF32")
            for ours in report.finals(runs, row, kind)}  # fmt: skip
    first, second = right[b64][31000], right[f"h200/{b64}"][31000]
    gpu = [(file, bs) for file in ("h200", "h200_bf16") for bs in ("64", "128")]
    cpu = [hours(b32), ms["cpu", "this code", "64"] * 32 / 3600]
    cpu += [hours(f"sgd_lr0.3_{bs}_iters3200") for bs in ("bs128_step400", "bs256_step500")]
    expected = [
        *span(gaps.values()),  # Does it reproduce?
        *(abs(right[log][end] - theirs) for log, end, theirs in late),
        first - second, right[b128[3]][32000] - right[b128[2]][32000],
        60 * hours(f"h200/{b32}"),  # Use it
        *(ms[file, "this code, recorded", bs] * 32 / 60 for file, bs in gpu),
        *cpu, hours(f"{b32}_bf16", first=24100),
        *(speedup["h200", "this code, recorded", bs] for bs in ("128", "64")),
        0.75, 93.18, 91.80, 91.89,  # What the report does not say
        92.65,  # results/README.md: Summary
        right[f"{b32}_bf16"][32000], right[b32][32000],  # Is bf16 safe?
        right[f"{slow}_bf16"][8000], right[f"cpu/{slow}"][8000], right[slow][8000],
        right[f"h200/{b32}"][20000], right[b32][20000],
        right[f"h200/{b32}"][20000] - right[b32][20000],
        *(right["sgd_lr0.1_bs64_step500_iters3200"][i] for i in (2000, 3200)),  # Start of training
        *(x for i in (400, 500, 800, 1000) for x in span([loss[log][i] for log in author_b128])),
        *span([mean(theirs, 4000) for theirs in author_b128]),  # Noise
        *(mean(theirs, 32000) for theirs in (92.14, 93.18, 92.65, 90.40)), 90.40, 92.65,
        first, second, first - second, *(mean(log, 31000) for log in (b64, f"h200/{b64}", 89.31)),
        *span([mean(log, i) / mean(theirs, i)
               for log, end, theirs in (late[0], (slow, 32000, 88.51))
               for i in range(1000, end + 1, 1000)]),
        *(mean(log, end) / mean(theirs, end) for log, end, theirs in late[1:]),
        *span([mean(log, 4000) for log in b128]),
        *span([loss[60.47][i] for i in range(1000, 5001, 100)]), mean(60.47, 3000),  # Adam
        *span([mean(adam, 3000), *(mean(f"adam/{adam}_iters5000{seed}", 3000)
                                   for seed in ("", "_seed1", "_seed2"))]),
        mean(f"adam/{adam}_betas0.9-0.999_iters5000", 3000),
        mean(f"{wd}005_iters3000", 3000), mean(f"{wd}005_iters8000_seed1", 3000),
        mean(f"{wd}01_iters8000", 3000),
        *(loss[log][5300] for log in (f"{wd}005_iters8000_seed1", adam, 60.47)),
        *(x for log, end, theirs in late for x in (right[log][end], theirs)),  # Logs left out
        *span([speedup["cpu", "this code", bs] for bs in ("32", "64", "128", "256")]),  # Speed
        *(speedup[file, f"this code, {how}", bs]
          for how in ("recorded", "compiled") for file, bs in gpu),
    ]  # fmt: skip
    settings = "0.003 0.1 0.2 0.3 0.5 0.7 0.9 0.999 2.303 2.6 3.10 3.6 4.884 4.887".split()
    text = (HERE / "README.md").read_text("utf-8") + (RESULTS / "README.md").read_text("utf-8")
    prose = re.sub(r"<!-- (.*?) -->.*?<!-- /\1 -->|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    said = [number for number in re.findall(r"\b\d+\.\d+\b", prose) if number not in settings]
    digits = [len(number.partition(".")[2]) for number in said]
    assert said == [f"{value:.{n}f}" for value, n in zip(expected, digits)]
    assert len(said) == len(expected) and len(gaps) == 7
    assert "Seven of the 13 different settings have run to the end" in text
    assert f"about {round(cpu[0] + 6 * cpu[1] + 4 * cpu[2] + cpu[3], -1):.0f} hours" in text
    passes = [round(32000 / math.ceil(50000 / bs)) for bs in (32, 64, 128, 256)]
    assert "see the data {}, {}, {}, {} times".format(*passes) in text


# ---- bench.py, and CUDA --------------------------------------------------------------------------
def test_bench(tmp_path):
    flags = "--bs 4 --steps 1 --rounds 2 --workers 0 --data synthetic --device cpu --csv"
    result = script("bench.py", *flags.split(), tmp_path / "bench.csv")
    usual, ours = read_log(tmp_path / "bench.csv")
    assert (usual["code"], ours["code"]) == ("usual loop", "this code")
    assert float(ours["images_per_s"]) == pytest.approx(4e3 / float(ours["ms"]), abs=1)
    assert float(ours["ratio"]) == pytest.approx(float(usual["ms"]) / float(ours["ms"]), abs=0.01)
    assert f"| 4 | this code | {ours['ms']} ± " in result.stdout


@pytest.mark.parametrize("command, code", [
    ("report.py --log x", 2), ("report.py x", 2), ("report.py --figures", 2),
    ("report.py --logs no", 1), ("bench.py x", 2), ("bench.py --data synthetic --bs 4 1001", 1),
    ("bench.py --data synthetic --csv /dev/full", 1)])  # fmt: skip
def test_errors_of_the_tools_come_before_any_output(command, code):
    name, *flags = command.split()
    result = script(name, *flags)
    assert result.returncode == code and not result.stdout
    assert re.fullmatch(rf"{name}: .*{flags[-1]}.*\n", result.stderr)


def test_recorded_batch_trains_each_plan_once_at_its_rate(monkeypatch, capsys):
    optimizer, trained, recordings = SimpleNamespace(param_groups=[{}]), [], []

    def train_batch(plan):
        train_batch.plan = plan  # the memory that it reads, in a recording and its replays
        trained.append((plan[0, 0].item(), optimizer.param_groups[0]["lr"], plan.shape[1]))

    @contextmanager
    def record(graph, stream):
        """As CUDA does: nothing is computed, and the learning rate is a constant from now on."""
        try:
            yield
        except ValueError:
            raise RuntimeError("recording broken")  # leaving it raises once more
        recordings.append(trained.pop())
        plan, (_, *rest) = train_batch.plan, recordings[-1]
        graph.replay = lambda: trained.append((plan[0, 0].item(), *rest))

    monkeypatch.setattr(torch, "cuda", Mock(CUDAGraph=SimpleNamespace, graph=record))
    recorded = train.RecordedBatch(train_batch, optimizer, batch_size=2)
    expected = [(t, 0.2 ** (t // 4), 2 - (t == 6)) for t in range(10)]  # one plan is short
    plans = [torch.full([4, width], t) for t, _, width in expected]
    for plan, (_, optimizer.param_groups[0]["lr"], _) in zip(plans, expected):
        recorded(plan)
    assert trained == expected and [plan[0, 0] for plan in plans] == [*range(10)]  # left alone
    assert recordings == [expected[t] for t in (3, 4, 8)]  # after three to warm up, at each rate
    # A bug shows itself in a plain iteration; one line tells what a recording does not allow.
    recorded = train.RecordedBatch(Mock(side_effect=ValueError("why\nmore")), optimizer, 2)
    for error in (ValueError, ValueError, ValueError, SystemExit):
        with pytest.raises(error):
            recorded(torch.zeros(4, 2))
    assert capsys.readouterr().err == "train.py: cannot record a graph (why more); use --no-graph\n"


# Strings: pytest evaluates them, but not the import of this file in the forks' server. See FORKS.
needs_cuda = pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA")
needs_mps = pytest.mark.skipif("not torch.backends.mps.is_available()", reason="no MPS")
SMALL_LR = {"sgd": 4e-5, "adam": 4e-6, "adagrad": 4e-6, "asgd": 8e-5}


def trained_on_cuda(flags: str, rates: list[float]) -> dict[str, torch.Tensor]:
    """The state after 15 iterations on generated images, five at each rate."""
    args = train.parse_args(flags.split())
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
    [(optimizer, "", *rest) for optimizer in OPTIMIZERS
     for rest in (("fp32", 128, 0.01), ("tf32", 32, 0.5), ("bf16", 256, 0.5))]
    + [("sgd", "--compile", "fp32", 128, 0.01)],
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
    plain = trained_on_cuda(f"{flags} --no-graph", [1, 5, 25])
    missed = trained_on_cuda(f"{flags} --no-graph", [1, 5, 5])
    ours = trained_on_cuda(f"{flags} {how}", [1, 5, 25])
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
    assert_one_line_error(result, 1, "cannot record a graph", "--no-graph")
    result = call(tmp_path, *SHORT, "--bs", 5, "--device", "cuda", "--no-graph", hook=wait)
    assert result.code == 0 and "from iteration 2\n" in result.out


def smooth(kill: bool) -> None:
    """SiLU in the place of ReLU in this process, which perhaps kills itself eight iterations on."""
    F.relu = F.silu
    if kill:
        at("call", "plans", 9, raise_signal, SIGKILL)  # a replay calls no zero_grad


@pytest.mark.parametrize("device, optimizer", [
    pytest.param(device, optimizer, marks=needs) for optimizer in OPTIMIZERS
    for device, needs in (("cuda", needs_cuda), ("mps", needs_mps))])  # fmt: skip
def test_killed_and_continued_on_a_gpu_on_a_cpu_and_on_a_gpu(device, optimizer, tmp_path):
    flags = "--data synthetic --bs 5 --iters 28 --step 10 --log-every 4 --ckpt-every 0".split()
    flags += ["--precision", "fp32", "--optimizer", optimizer, "--lr", 25 * SMALL_LR[optimizer]]
    whole = call(tmp_path, *flags, "--device", "cpu", "--logs", "cpu", hook=(smooth, False))
    parts = [call(tmp_path, *flags, "--device", where, hook=(smooth, kill)) for where, kill
             in ((device, True), (device, True), ("cpu", True), (device, False))]  # fmt: skip
    assert [part.code for part in (whole, *parts)] == [0, *[-SIGKILL] * 3, 0]
    assert [part.err for part in parts] == [""] * 4
    (expected,), (log,) = (tmp_path.glob(f"{folder}/*.csv") for folder in ("cpu", "logs"))
    # On a CPU, one rounding of the weights moves no loss by over 5e-6, a missed decay one by 7e-3.
    for ours, theirs in zip(read_log(log), read_log(expected), strict=True):
        assert [ours[key] for key in ("iteration", "lr")] == [theirs["iteration"], theirs["lr"]]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=2e-4)

"""All tests: the method first, then the tools. They need no GPU, network or data set."""

import csv
import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF

import bench
import data
import model
import report
import train

pytestmark = pytest.mark.filterwarnings("error")
torch.set_num_threads(1)  # small batches need no more, and rounding depends on it
HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
LOAD = data.load
unix = pytest.mark.skipif(os.name == "nt", reason="needs signals and locks")
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
OPTIMIZERS = {  # with the settings of SHORT; each adds the weight decay to the gradient
    "sgd": partial(torch.optim.SGD, momentum=0.8),
    "adam": partial(torch.optim.Adam, betas=(0.6, 0.9)),
    "adagrad": torch.optim.Adagrad,
    "asgd": partial(torch.optim.ASGD, lambd=1e-4, alpha=0.75, t0=1e6),
}
SHORT = """--data synthetic --device cpu --lr 0.01 --bs 4 --step 3 --gamma 0.5 --momentum 0.8
--betas 0.6 0.9 --wd 0.01 --iters 5 --seed 1 --log-every 2 --eval-every 4""".split()


@cache
def few_images(source: str, device: torch.device) -> list[data.Split]:
    """Ten images for training; for the test 1,200, as an evaluation goes in batches of 1,000."""
    training, test = LOAD(source, device)
    test = data.Split(*map(torch.cat, zip(training, test)))
    return [data.Split(*(x[:10] for x in training)), test]


def small_network() -> torch.nn.Module:
    """For all that is not about the report's."""
    layers = model.conv_bn(3, 8, 3, 4), torch.nn.Flatten(), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.Linear(512, 10))


@pytest.fixture(autouse=True)
def takes(monkeypatch, tmp_path):
    """A small network, few images, a folder, and a clock that some of train.py's functions move."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", few_images)
    monkeypatch.setattr(train, "ResNet", small_network)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(train, "clock", lambda: clock.now)

    def takes(seconds: float, name: str) -> None:
        function = getattr(train, name)

        def slow(*args):
            clock.now += seconds
            return function(*args)

        monkeypatch.setattr(train, name, slow)

    takes(40, "train_batch"), takes(500, "evaluate"), takes(6000, "save")
    return takes


def read_log(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def digest(state: dict) -> str:
    """Of a network's weights, to the bit."""
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in state.values())).hexdigest()


def outcome(folder: str = "logs") -> dict:
    """A run's files, by their endings: the text of the log, the digest of weights."""
    files = {path.suffix: path for path in Path(folder).iterdir()}
    weights = torch.load(files[".pt"], weights_only=True)["model"]
    return files | {".csv": files[".csv"].read_text(), ".pt": digest(weights)}


def error_of(capsys, *argv, status: int = 1) -> str:
    """The one line on stderr with which train.py ends."""
    with pytest.raises(SystemExit, match=f"^{status}$"):
        train.main([*map(str, argv)])
    error = capsys.readouterr().err
    assert re.fullmatch(r"train\.py: [^\n]{15,}\n", error)
    return error


# ---- the network (report, Model Architecture) ----------------------------------------------------
def test_network():
    network = model.ResNet()
    counts = [model.count_parameters(child) for child in network.children()]
    assert counts == [928, 55_680, 427_648, 1_116_416, 3_280_384, 0, 2_570]
    assert model.count_parameters(network) == 4_883_626
    assert model.count_parameters(model.ResNet(project_layer1=True)) == 4_886_890


def test_network_computes_what_it_computed_in_the_committed_runs():
    torch.manual_seed(0)
    logits = model.ResNet()(torch.linspace(0, 1, 2 * 3072).view(2, 3, 32, 32))
    first = [-0.4034, -0.9841, 0.9974, 0.5351, -0.2292, 0.6282, 0.0235, -0.5973, -0.0958, 0.1299]
    assert logits[0].tolist() == pytest.approx(first, abs=1e-3)


# ---- the data ------------------------------------------------------------------------------------
def test_augmentation_equals_torchvision_to_the_bit():
    cases = torch.tensor([*itertools.product(range(9), range(9), range(2))])
    images = torch.randint(256, (len(cases), 3, 32, 32), dtype=torch.uint8)
    plan = torch.cat([torch.randperm(len(cases))[None], cases.T])
    batch = data.augment(data.pad(images), plan)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (index, top, left, flip) in zip(batch, plan.T.tolist()):
        picture = TF.crop(TF.pad(TF.to_pil_image(images[index]), 4), top, left, 32, 32)
        assert torch.equal(ours, TF.to_tensor(TF.hflip(picture) if flip else picture))
    assert data.layout(torch.device("mps")) == torch.contiguous_format


def test_epoch_plan_shows_each_image_once_and_is_uniform():
    split, state = data.Split(None, torch.zeros(50_000)), torch.get_rng_state()
    plans = [data.epoch_plan(split, *pair) for pair in ((0, 0), (0, 1), (1, 0), (2**32, 0))]
    assert torch.equal(plans[1], data.epoch_plan(split, seed=0, epoch=1))
    assert torch.equal(state, torch.get_rng_state())  # the generator of the weights is left alone
    for index, top, left, flip in plans:
        assert torch.equal(index.sort().values, torch.arange(50_000))
        for values, cells in ((top, 9), (left, 9), (flip, 2), (18 * top + 2 * left + flip, 162)):
            counts = values.bincount(minlength=cells)  # at 162 cells 309, with a deviation of 18
            assert len(counts) == cells and (counts * cells / 50_000 - 1).abs().max() < 0.35
    for plan, other in itertools.combinations(plans, 2):
        assert ((plan != other).float().mean(dim=1) > 0.4).all()


def test_cifar10_is_split_as_torchvision_has_it(monkeypatch):
    images = torch.arange(2 * 3072).remainder(251).to(torch.uint8).view(2, 32, 32, 3).numpy()
    fake = Mock(side_effect=lambda _, train, **x: SimpleNamespace(data=images, targets=[train, 5]))
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    training, test = LOAD("folder", CPU)
    assert training.labels.tolist() == [1, 5] and test.labels.tolist() == [0, 5]
    assert training.images[1, :, 0, 2].tolist() == [(3072 + i) % 251 for i in (6, 7, 8)]


def test_data_that_cannot_be_had_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))
    monkeypatch.setattr("socket.setdefaulttimeout", timeout := Mock())
    for folder in ("absent", "damaged"):
        error = error_of(capsys, "--device", "cpu", "--data", folder, status=4)
        assert all(x in error for x in (folder, "no network", CIFAR10.url, CIFAR10.tgz_md5))
        Path("damaged", CIFAR10.base_folder).mkdir(parents=True, exist_ok=True)
        Path("damaged", CIFAR10.base_folder, "data_batch_1").write_bytes(b"damaged")
    timeout.assert_called_with(60)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    error = error_of(capsys, "--device", "cpu", status=4)
    assert re.search(r"torchvision \d\S+ with torch", error) and torch.__version__ in error
    assert not Path("logs").exists()


def test_figure_1(monkeypatch):
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", "synthetic"])
    monkeypatch.setattr(data, "augment", drawn := Mock(wraps=data.augment))
    data.main()
    index = drawn.call_args[0][1][0]  # of images in the order of their classes, again and again
    assert (index % 10).tolist() == 4 * [*range(10)] and Path("figure1.png").exists()


# ---- training ------------------------------------------------------------------------------------
@cache
def recomputation(name: str) -> dict:
    """What outcome gives for SHORT, with torch.optim alone; an epoch is of 4, 4 and 2 images."""
    training, test = few_images("synthetic", CPU)
    torch.manual_seed(1)
    network = small_network().to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[name](network.parameters(), lr=0.01, weight_decay=0.01)
    plans = [data.epoch_plan(training, seed=1, epoch=epoch).split(4, dim=1) for epoch in (0, 1)]
    losses, accuracies = [], []
    for plan, lr in zip(plans[0] + plans[1], (0.01, 0.01, 0.01, 0.005, 0.005)):
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
        accuracies.append(f"{100 * (guess == test.labels).double().mean():.2f}")
    momentum, betas = "0.8" if name == "sgd" else "", "0.6 0.9" if name == "adam" else ""
    settings = f"{name},0.01,4,3,0.5,{momentum},{betas},0.01,5,1,synthetic,fp32,cpu 1 threads"
    constant = f"{settings},{torch.__version__}"
    log = f"""{train.HEADER}{constant},2,0.01,{(losses[0] + losses[1]) / 2:.6f},,80.00
{constant},4,0.005,{(losses[2] + losses[3]) / 2:.6f},{accuracies[3]},160.00
{constant},5,0.005,{losses[4]:.6f},{accuracies[4]},200.00
"""
    return {".csv": log, ".pt": digest(network.state_dict())}


def stopping(function, count: int) -> Mock:
    """As the function, but the call of this number is stopped by Ctrl-C."""
    return Mock(wraps=function, side_effect=[*[DEFAULT] * (count - 1), KeyboardInterrupt])


STOPS = [  # the call that is stopped, and the iteration from which the same command continues
    (os, "replace", 1, 0),  # a file is written, but not in its place: the first checkpoint
    (data, "augment", 2, 1),
    (data, "augment", 2, 2),
    (os, "replace", 1, 2),
    (train, "evaluate", 1, 3),
    (os, "replace", 1, 3),  # the log has a line that the checkpoint lacks
    (train, "evaluate", 2, 4),
    (os, "replace", 1, 4),  # the weights
    (os, "replace", 2, 4),  # the log
]


@pytest.mark.parametrize("stops", [[], STOPS[:2], STOPS], ids=["undisturbed", "once", "often"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_log_and_weights_equal_a_recomputation(name, stops, monkeypatch, capsys):
    run = [*SHORT, "--optimizer", name]
    for module, function, count, iteration in stops:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, stopping(getattr(module, function), count))
            error = error_of(capsys, *run, status=130)
        assert error.endswith(f"the same command continues from iteration {iteration}\n")
    train.main(run)
    train.run_files(train.parse_args(run))[2].touch()  # as if it had been stopped at the very end
    monkeypatch.setattr(train, "open_device", Mock(side_effect=AssertionError))
    train.main(run)  # at once, without a device
    assert "is complete" in capsys.readouterr().out and outcome() == recomputation(name)


def test_it_learns_the_generated_images(monkeypatch, capsys):
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr(train, "ResNet", model.ResNet)
    train.main("--data synthetic --device cpu --lr 0.003 --bs 8 --iters 40".split())
    (weights,), ((line,),) = Path("logs").glob("*.pt"), map(read_log, Path("logs").glob("*.csv"))
    assert float(line["test_acc"]) > 60
    test = ["--device", "cpu", "--data", "synthetic", "--eval", str(weights)]
    capsys.readouterr()
    train.main(test)
    _, total, *classes = capsys.readouterr().out.splitlines()
    assert total == f"{line['test_acc']} % of 200 test images"
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert [line.split()[0] for line in classes] == names
    monkeypatch.setattr(train, "evaluate", lambda model, split: split.labels == 3)
    train.main(test)
    assert re.findall(r"(\w+) +100\.00 %", capsys.readouterr().out) == ["cat"]
    assert "other images (synthetic)" in error_of(capsys, "--device", "cpu", "--eval", weights)


def test_checkpoints_and_words_go_by_the_clock(takes, monkeypatch, capsys):
    save, saved = train.save, []
    monkeypatch.setattr(train, "save", lambda path, x: [saved.append(path.suffix), save(path, x)])
    takes(-30, "train_batch")  # so an iteration takes 10 seconds
    train.main([*SHORT, "--log-every", "9", "--iters", "7"])
    words = re.findall(r"(\d)/7  loss \d\.\d{4}  (.*)", capsys.readouterr().out)
    assert words[::2] == [("3", "0 h 1 min left"), ("5", "0 h 0 min left")]
    assert words[1::2] == [("4", "testing"), ("7", "testing")]
    assert saved == [".ckpt", ".ckpt", ".ckpt", ".pt", ".csv"]
    takes(4080, "train_batch")
    train.main([*SHORT, "--iters", "12"])
    assert "\n1/12  loss" in (out := capsys.readouterr().out) and "12 h 30 min left" in out
    assert saved[5:] == 12 * [".ckpt"] + [".pt", ".csv"]


@pytest.mark.skipif(not (HERE / "data" / CIFAR10.base_folder).exists(), reason="no CIFAR-10")
def test_committed_weights_have_the_logged_accuracy():
    (path,), network = HERE.glob("results/*.pt"), model.ResNet()
    train.load(path, network)
    _, test = LOAD(HERE / "data", CPU)
    few = data.Split(*(x[:2000] for x in test))  # `train.py --eval` takes them all
    logged = float(read_log(path.with_suffix(".csv"))[-1]["test_acc"])
    assert 100 * train.evaluate(network, few).float().mean() == pytest.approx(logged, abs=1.5)


# ---- flags ---------------------------------------------------------------------------------------
def test_defaults_are_the_reports():
    config = train.make_config(train.parse_args([]))
    values = "sgd 0.3 128 8000 0.2 0.9  0.0001 32000 0 cifar10 tf32"
    assert [str(value) for value in config.values()] == values.split(" ")
    config |= {"lr": 0.3, "betas": "{} {}".format(*train.parse_args([]).betas)}
    assert report.USUAL == {name: str(config[name]) for name in report.USUAL}


@pytest.mark.parametrize(
    "line",
    """--betas 0.5 0.5: sgd_lr0.3_bs128_step8000_seed0
--optimizer asgd --momentum 0.5 --lr 1e-3: asgd_lr0.001_bs128_step8000_seed0
--optimizer adam --betas .9 .999: adam_lr0.3_bs128_step8000_betas0.9-0.999_seed0
--bs 64 --step 5 --gamma 0.5 --wd 0: sgd_lr0.3_bs64_step5_gamma0.5_wd0.0_seed0
--momentum 0 --iters 9 --seed 2: sgd_lr0.3_bs128_step8000_momentum0.0_iters9_seed2
--data synthetic --precision fp32: sgd_lr0.3_bs128_step8000_synthetic_fp32_seed0""".splitlines(),
)
def test_name_has_every_setting_that_is_not_the_default(line):
    flags, name = line.split(": ")
    paths = train.run_files(train.parse_args(flags.split()))
    assert paths == [Path("logs", f"{name}.{ending}") for ending in ("csv", "pt", "ckpt")]


@pytest.mark.parametrize(
    "flags",
    """--lr nan,--lr -1,--bs 0,--bs 1.5,--step 0,--iters 0,--log-every 0,--gamma 1.1,--momentum 1,
    --betas 0.9 1,--seed -1,--wd -1,--precision bf16,--optimizer lion,stray,
    --data synthetic --device cpu --bs 11""".split(","),  # more than the ten images
)
def test_bad_flag_is_one_line(flags, capsys):
    error_of(capsys, *flags.split(), status=2)


def test_device_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    old = RuntimeError("The NVIDIA driver on your system is too old\nmore")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as it is with an old driver
    monkeypatch.setattr(torch, "ones", Mock(side_effect=old))
    error = error_of(capsys, "--iters", 1, status=4)
    assert re.search("cannot use cuda.*--device cpu.*too old", error)


def test_precision_is_what_the_card_has(monkeypatch):
    for name in ("ones", "cuda", "backends"):
        monkeypatch.setattr(torch, name, Mock())
    torch.cuda.get_device_name.return_value = "Tesla T4, 16 GB"
    for card, asked, used in ((7, "tf32", "fp32"), (8, "tf32", "tf32"), (9, "fp32", "fp32")):
        torch.cuda.get_device_capability.return_value = (card, 0)
        assert train.open_device("cuda", asked) == (torch.device("cuda"), "Tesla T4 16 GB", used)
        assert torch.backends.cudnn.allow_tf32 is (used == "tf32")
        assert torch.backends.cuda.matmul.allow_tf32 is False


# ---- files, and ways of being stopped ------------------------------------------------------------
@unix
def test_ctrl_c_and_kill(monkeypatch, tmp_path):
    """Real signals to real processes, each of which has a checkpoint after every iteration."""
    code = "import sys, train; train.SAVE_EVERY = 0; train.main(sys.argv[1:])"
    flags = "--data synthetic --device cpu --lr 0.01 --bs 4 --iters 15 --log-every 5".split()
    command = [sys.executable, "-c", code, *flags, "--logs", str(tmp_path / "logs")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stopped = r"train.py: stopped; the same command continues from iteration \d+\n"
    for kill, status, words in ((signal.SIGINT, 130, stopped), (signal.SIGKILL, -9, "")):
        process = subprocess.Popen(command, cwd=HERE, **PIPES)
        assert any(next(process.stdout) for _ in range(6))  # iterations and lines before them
        process.send_signal(kill)
        error = process.communicate()[1]
        assert process.returncode == status and re.fullmatch(words, error)
    assert subprocess.run(command, cwd=HERE, stderr=subprocess.PIPE).stderr == b""
    (log,) = Path("logs").glob("*.csv")
    assert [line["iteration"] for line in read_log(log)] == ["5", "10", "15"]


def test_file_is_on_disk_first_and_the_log_is_whole_at_the_end(monkeypatch):
    (path, *_), events, replace = train.run_files(train.parse_args(SHORT)), [], os.replace

    def fsync(file):
        events.append(file.seek(0, 2) > 99)  # its size
        path.unlink(missing_ok=True)  # as a sync client or an editor does, at any time

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: events.append(replace(*paths)))
    train.main(SHORT)
    assert events == 7 * [True, None]  # five checkpoints, the weights, the log
    assert outcome() == recomputation("sgd")


def test_full_disk_and_full_memory_are_one_line(monkeypatch, capsys):
    no_space, no_memory = OSError(28, "No space left"), RuntimeError("can't allocate memory:\nyou")
    for error, status in ((no_space, 4), (no_memory, 1), (MemoryError(), 1)):
        with monkeypatch.context() as patch:
            patch.setattr(data, "augment", Mock(side_effect=error))
            error_of(capsys, *SHORT, status=status)
    Path("file").touch()
    error_of(capsys, *SHORT, "--logs", "file", status=4)
    monkeypatch.setattr(data, "augment", Mock(side_effect=RuntimeError("mat1 and mat2")))
    with pytest.raises(RuntimeError, match="mat1"):  # a bug shows as Python shows it
        train.main(SHORT)


def test_log_without_checkpoint_is_left_alone(capsys):
    train.main(SHORT)
    (path,) = Path("logs").glob("*.csv")
    whole = path.read_text()
    for length in (0, 300, whole.rindex("cpu"), whole.rindex(",") + 1, whole.index("\n", 300) + 1):
        path.write_text(whole[:length])
        assert not train.is_complete(path)
    assert "has no checkpoint" in error_of(capsys, *SHORT)
    assert path.read_text() == whole[:length]


@unix
def test_another_process_is_left_alone(monkeypatch, capsys):
    (path, *_) = train.run_files(train.parse_args(SHORT))
    path.parent.mkdir()
    with open(path, "a") as log:
        train.lock(log)  # as another process does
        assert "another process is training" in error_of(capsys, *SHORT, status=5)
        train.main([*SHORT, "--iters", "1"])  # another run may
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("no locks")))
        train.main(SHORT)  # a file system without locks: both are trusted
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    run = [*SHORT, "--iters", "2"]
    once = iter([lambda: train.main(run), lambda: None])  # another process trains all meanwhile
    monkeypatch.setattr(data, "load", lambda *where: next(once)() or few_images(*where))
    assert "another process has completed" in error_of(capsys, *run, status=5)


def test_divergence_is_logged_and_exits_with_3(capsys):
    flags = [*SHORT, "--lr", "1e9", "--log-every", "1", "--iters", "4"]
    for _ in range(2):  # its state is no checkpoint: the next start sees it again
        assert "loss nan at iteration 4" in error_of(capsys, *flags, status=3)
        (log,) = Path("logs").glob("*.csv")
        assert [(line["loss"], line["test_acc"]) for line in read_log(log)[3:]] == [("nan", "")]
    assert not list(Path("logs").glob("*.pt"))


def test_bad_checkpoint_or_weights_are_one_line_and_left_alone(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(data, "augment", stopping(data.augment, 3))
        error_of(capsys, *SHORT, status=130)
    (path,) = Path("logs").glob("*.ckpt")
    content, saved = path.read_bytes(), torch.load(path, weights_only=True)
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    other_network = torch.nn.Linear(512, 10).state_dict()
    for damaged in (None, {"model": bomb}, saved["model"], {**saved, "model": other_network}):
        torch.save(damaged, path) if damaged else path.write_bytes(content[:-1000])
        for flags in (SHORT, ["--eval", path]):
            assert f"cannot use {path}" in error_of(capsys, *flags)
    for other in ({"gamma": 0.1}, {"device": "cuda"}, {"precision": "tf32"}):
        torch.save(saved | {"config": saved["config"] | other}, path)
        assert f"{path} is of {other}: continue it there" in error_of(capsys, *SHORT)
    assert path.exists() and not Path("exploded").exists()
    assert "none.pt" in error_of(capsys, "--eval", "none.pt")


# ---- run_all.sh ----------------------------------------------------------------------------------
ROWS = re.findall(r"^row (\w+) +([\d.]+) +(.+)", (HERE / "run_all.sh").read_text(), re.MULTILINE)


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """Starts run_all.sh with a `python` that prints its arguments and, as train.py, does `do`."""
    if os.name == "nt":
        pytest.skip("needs bash")
    fake = '#!/bin/sh\necho "python $*"\ncase $* in train.py*) eval "$DO" ;; esac\n'
    (tmp_path / "python").write_text(fake)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def start(*argv, do="", script=HERE / "run_all.sh", shell="bash", **where) -> subprocess.Popen:
        monkeypatch.setenv("DO", do)
        return subprocess.Popen([shell, script, *argv], **PIPES, **where)

    return start


def ended(process: subprocess.Popen) -> tuple[list[str], str, int]:
    """The lines on stdout, the text on stderr, and the exit status."""
    out, error = process.communicate()
    return out.splitlines(), error, process.returncode


def test_rows_are_the_authors():
    assert "".join(table for table, _, _ in ROWS) == "444455566667777extended"
    names, ours, logged = "optimizer lr0 bs step gamma iters".split(), set(), set()
    for _, accuracy, flags in ROWS:
        args = vars(train.parse_args(flags.split()))
        ours.add((accuracy, *(str(args[name]) for name in names)))
    for line in read_log(HERE / "results" / "author.csv"):
        if line["test_acc"] and line["gamma"] == "0.2":  # other decay rates are in no table
            logged.add((line["test_acc"], *(line[name] for name in names)))
    assert ours == logged


@pytest.mark.parametrize("tables", ["", "4", "6 extended"])
def test_list(tables, run_all):
    more = ["--seed", "1", "--logs=it's a $HOME"]
    listed, _, _ = ended(run_all("--list", *tables.split(), "--", *more, do="exit 1", shell="sh"))
    flags = [flags for table, _, flags in ROWS if table in (tables or "4567")]
    wanted = [["python", "train.py", *x.split(), *more] for x in dict.fromkeys(flags)]  # each once
    assert [shlex.split(line) for line in listed] == wanted


def test_failing_rows_are_named_and_the_others_go_on(run_all):
    do = "case $* in *adam*) exit 3 ;; *adagrad*) exit 1 ;; *asgd*) exit 5 ;; esac"
    out, error, status = ended(run_all("--", "--logs", "x", do=do))
    runs = [line.strip() for line in ended(run_all("--list", "--", "--logs", "x"))[0]]
    trained = [line.strip() for line in out if "train.py" in line]
    assert trained == [run for run in runs for _ in range(2)]  # said, and done
    assert out[-1] == "python report.py --logs x" and status == 1
    failed = [f"  {run}" for run in runs if "adam" in run or "adagrad" in run]
    assert error.splitlines() == ["run_all.sh: failed:", *failed]
    out, *rest = ended(run_all("5", "--", "--logs=y"))
    assert out[-1] == "python report.py --logs y" and rest == ["", 0]
    for status in (2, 4):  # what all rows share
        out, _, ended_with = ended(run_all(do=f"exit {status}"))
        assert ended_with == status and sum("train.py" in line for line in out) == 2


def test_its_own_errors(run_all, tmp_path):
    for argv, words in (("8", "no table 8"), ("--seed 1", "--seed is not its flag")):
        assert words in (result := ended(run_all(*argv.split())))[1] and result[2] == 2
    copy = tmp_path / "copy.sh"  # as a scheduler makes
    copy.write_text((HERE / "run_all.sh").read_text())
    assert "train.py" in ended(run_all("--list", script=copy))[1]
    assert len(ended(run_all("--list", script=copy, cwd=HERE))[0]) == 12
    (tmp_path / "link").symlink_to(HERE / "run_all.sh")
    assert len(ended(run_all("--list", script=tmp_path / "link"))[0]) == 12
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    assert "activate the environment" in ended(run_all())[1]


@pytest.mark.parametrize("kill", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_killed_it_leaves_nothing_running(kill, run_all):
    process = run_all(do="echo $$; exec sleep 60")
    child = next(int(line) for line in process.stdout if line.strip().isdigit())
    process.send_signal(getattr(signal, kill))
    assert ended(process)[1:] == ("run_all.sh: stopped; the same command continues\n", 130)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


# ---- report.py -----------------------------------------------------------------------------------
def write_log(name: str, tests: dict, *changes: tuple[str, str]) -> None:
    """A log of Table 8's setting, or a changed one: {iteration: accuracy}, one in each line."""
    words = "sgd,0.3,128,8000,0.2,0.9,,0.0001,32000,0,cifar10,tf32,NVIDIA H200"
    for old, new in changes:
        words = words.replace(old, new)
    lines = [train.HEADER, *(f"{words},2.6,{i},0.1,0.25,{tests[i]},9.5\n" for i in tests)]
    Path(name).write_text("".join(lines), encoding="utf-8-sig")  # as a spreadsheet saves it


def test_tables_of_made_up_logs(tmp_path, monkeypatch, capsys):
    own_row = "row 7 - --lr 0.3 --step 6000 --wd 1e-3  # has no accuracy in the report\n"
    Path("run_all.sh").write_text((HERE / "run_all.sh").read_text() + own_row)
    Path("results").mkdir()
    shutil.copy(HERE / "results" / "author.csv", "results")
    monkeypatch.setattr(report, "HERE", tmp_path)
    write_log("own_seed0.csv", {32000: 91}, ("8000", "6000"), ("0.0001", "1E-03"))
    for seed, accuracy in enumerate((92, 93, 94)):
        write_log(f"a_seed{seed}.csv", {32000: accuracy}, ("0.0001", "1E-04"))
        write_log(f"b_seed{seed}.csv", {3200: accuracy}, ("32000", "3200"))
    shutil.copytree(".", "copies")  # are no further runs
    write_log("rising_seed1.csv", {24000: 70, 28000: 76}, ("8000", "4000"))
    write_log("late_seed0.csv", {27000: 93.2, 31000: 93.6}, ("8000", "4000"))
    write_log("cpu_seed0.csv", {32000: 92.5}, ("8000", "5000"), ("NVIDIA H200", "cpu 2 threads"))
    write_log("other_seed0.csv", {32000: 95.8}, ("8000", "10000"))
    write_log("early_seed0.csv", {27900: 93}, ("0.3,128,8000", "0.5,64,5000"))
    adam = ("sgd,0.3,128,8000,0.2,0.9,", "adam,0.1,64,5000,0.2,,0.7 0.7")
    write_log("adam_seed0.csv", {24000: 70, 28000: 76}, adam)
    report.main(["--logs", "."])
    out = capsys.readouterr().out
    for line in """adam, lr 0.1, bs 64, step 5000 | 60.47 | >76.00† | >+15.53 | 1.14 | 0.250 | 4 |
sgd, lr 0.5, bs 64, step 5000 | 87.70 |  |  | 0.222 |  | 5 |
sgd, lr 0.3, bs 128, step 5000 | 91.07 | 92.50‡ | +1.43 | 0.0312 | 0.250 | 6, 7 |
sgd, lr 0.3, bs 128, step 4000 | 89.83 | 93.60† | +3.77 | 0.0584 | 0.250 | 7 |
sgd, lr 0.3, bs 128, step 8000 | 92.65 | 93.00 ± 1.00 (3) | +0.35 | 0.00461 | 0.250 | 7 |
sgd, lr 0.3, bs 128, step 8000, iters 3200 | 93.00 ± 1.00 (3) | 0.250 |
sgd, lr 0.3, bs 128, step 6000, wd 0.001 |  | 91.00 |  |  | 0.250 | 7 |
lr 0.3 over lr 0.5 | no run | +1.61 |  | 5 |
step 8000 over step 4000 | holds | +2.82 | -0.60 | 7 |
step 8000 over step 5000 | open | +1.58 | +0.50 | 7 |
step 8000 over step 10000 | reversed | +0.51 | -2.80 | 7 |""".splitlines():
        assert f"\n| {line}\n" in f"{out}\n"


def test_broken_logs_are_named_and_left_out(capsys):
    write_log("good_seed0.csv", {32000: 92})
    good = Path("good_seed0.csv").read_text()
    for text in ("", good.split("\n")[0], good[:-6], "a,b\n1,2\n", "\0"):
        Path("bad_seed0.csv").write_text(text)
        report.main(["--logs", "."])
        out, err = capsys.readouterr()
        assert "| 92.65 | 92.00 |" in out
        assert err.startswith("report.py: bad_seed0.csv is left out") and err.count("\n") == 1


def test_pages_have_the_tables_of_the_committed_logs(capsys):
    report.main(["--logs", str(HERE / "results")])
    results, signs, conclusions, *_ = capsys.readouterr().out.split("\n\n")
    assert f"\n{results}\n\n{signs}\n" in (HERE / "README.md").read_text(encoding="utf-8")
    assert f"\n{conclusions}\n" in (HERE / "results/README.md").read_text(encoding="utf-8")


def test_figures_have_the_runs_of_their_settings(tmp_path):
    pytest.importorskip("matplotlib")
    folder = HERE / "results"
    rows, runs = report.read_rows(), report.read_logs(folder)
    author = report.read_log(folder / "author.csv")
    for number, settings, name in (
        (4, 4, "*_lr0.1_bs64_step5000"),
        (5, 3, "sgd_lr0.?_bs64_step5000"),
        (6, 4, "sgd_lr0.3_bs*_step5000"),
        (7, 4, "sgd_lr0.3_bs128_step????"),
        (8, 2, "sgd_lr0.3_bs128_step8000"),
    ):
        ends = {float(read_log(path)[-1]["loss"]) for path in folder.rglob(f"{name}_seed?.csv")}
        lines = report.draw_losses(number, rows, runs, author).lines
        drawn = [line.get_ydata()[-1] for line in lines if len(line.get_ydata())]
        assert ends <= {*drawn} and len(drawn) >= len(ends) + settings  # the author's
    dots = report.draw_accuracies(rows, runs).lines
    faces = [dot.get_markerfacecolor() for dot in dots[16:]]  # after the report's sixteen rows
    settings = [setting for *_, setting in rows]
    assert faces.count("white") == sum("†" in run.text for run in runs if run.setting in settings)
    report.main(["--logs", str(folder), "--figures", "."])
    assert len(list(tmp_path.glob("*.png"))) == 6


# ---- bench.py, and CUDA --------------------------------------------------------------------------
def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CIFAR10", lambda *_, **named: 8 * [(torch.rand(3, 32, 32), 1)])
    monkeypatch.setattr(data, "load", lambda source, device: few_images("synthetic", device))
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # no workers
    bench.main("--device cpu --bs 4 2 --turns 1 --iterations 1".split())
    rows = capsys.readouterr().out.splitlines()[4:]
    assert [row.split(" | ")[1] for row in rows] == 2 * ["this code", "usual"]
    times = [99, 99, 1, 4, 9, 4, 2, 4]  # a start of each loop, then turns: the median counts
    monkeypatch.setattr(bench, "time_turn", Mock(side_effect=times))
    bench.main("--device cpu --bs 4 --turns 3".split())
    assert "| 4 | this code | 2.000 | 2000 | 2.00 |" in capsys.readouterr().out


def test_recorded_batch_trains_each_plan_once_at_its_rate(monkeypatch):
    optimizer, trained, recordings = SimpleNamespace(param_groups=[{}]), [], []

    def train_batch(plan):
        train_batch.plan = plan  # the memory that it reads, in a recording and its replays
        trained.append((plan[0, 0].item(), optimizer.param_groups[0]["lr"], plan.shape[1]))

    @contextmanager
    def record(graph, stream):
        yield  # nothing is computed, and the learning rate is a constant from now on
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


# Which images a rounding lets through a ReLU is chance, and soon all differs; SiLU is smooth. With
# it, on a CPU, one rounding of the weights moves no loss by over 5e-6, a missed decay one by 7e-3.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name, lr", [*zip(OPTIMIZERS, (1e-3, 1e-4, 1e-4, 2e-3))])
def test_recorded_is_plain_on_cuda(name, lr, monkeypatch):
    replay, replays, logs = torch.cuda.CUDAGraph.replay, [], []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: replays.append(replay(g)))
    monkeypatch.setattr(train, "ResNet", model.ResNet)
    monkeypatch.setattr(F, "relu", F.silu)
    flags = f"--optimizer {name} --lr {lr} --data synthetic --bs 5 --iters 28 --step 10"
    flags = f"{flags} --precision fp32 --device cuda --log-every 4"
    for more in ("--no-graph --logs plain", "--logs recorded"):
        assert not replays
        train.main([*flags.split(), *more.split()])
        logs.append(read_log(next(Path(more.split()[-1]).glob("*.csv"))))
    assert len(replays) == 28 - 3  # three to warm up
    for plain, recorded in zip(*logs, strict=True):
        assert float(recorded["loss"]) == pytest.approx(float(plain["loss"]), rel=2e-4)

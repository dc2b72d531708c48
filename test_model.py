"""All tests: `pytest test_model.py`. They need no GPU, no network and no data set, and do a little
more where ./data holds CIFAR-10 or CUDA is there."""

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
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import to_pil_image

import bench
import data
import model
import report
import train

torch.set_num_threads(1)  # the tests' own processes share the cores, and small batches need no more

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
OPTIMIZERS = ("sgd", "adam", "adagrad", "asgd")
has_cifar10 = (HERE / "data" / CIFAR10.base_folder).exists()


# ---- the command line, run in fresh processes ----------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")
# Import PyTorch once, not in each of fifty runs. An import that asked for CUDA would bar it there.
FORKS.set_forkserver_preload(["test_model"])


def run_main(folder: Path, argv: list[str], hook=None) -> None:
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    splits = data.synthetic()  # of which ten images are enough here
    data.synthetic = lambda: [data.Split(*(tensor[:10] for tensor in split)) for split in splits]
    sys.argv = ["train.py", *argv]
    if hook:
        hook[0](*hook[1:])
    train.main()


def begin(folder: Path, *argv: str, hook=None):
    """Start train.py in `folder`; `hook` is a function to call before it, and its arguments."""
    process = FORKS.Process(target=run_main, args=(folder, [*map(str, argv)], hook))
    process.start()
    return process


def finish(process, folder: Path) -> SimpleNamespace:
    process.join(120)
    assert process.exitcode is not None, "still running after two minutes"
    out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def call(folder: Path, *argv: str, hook=None) -> SimpleNamespace:
    return finish(begin(folder, *argv, hook=hook), folder)


SHORT = (
    "--data synthetic --bs 4 --iters 5 --log-every 2 --ckpt-every 2 --eval-every 4 --device cpu"
).split()
NAME = "sgd_lr0.3_bs4_step8000_iters5_synthetic_seed0"


def assert_one_line_error(result: SimpleNamespace, code: int, *words: str) -> None:
    assert result.code == code, result.err
    assert re.fullmatch(r"train\.py: [^\n]+\n", result.err), result.err
    for word in words:
        assert word in result.err


def read_rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(folder: Path) -> dict[str, bytes]:
    """The files of LOGS: weights as they are, logs without their last column, the seconds."""
    paths = [path for path in (folder / "logs").iterdir() if path.suffix != ".lock"]
    files = {path.name: path.read_bytes() for path in paths}
    logs = {name: text for name, text in files.items() if name.endswith(".csv")}
    return {**files, **{name: re.sub(rb",[^,\n]*\n", b"\n", logs[name]) for name in logs}}


# ---- the network (report, Model Architecture) ----------------------------------------------------


def test_parameter_counts():
    network = model.ResNet()
    counts = {name: model.count_parameters(child) for name, child in network.named_children()}
    assert counts == {"stem": 928, "layer1": 55_680, "layer2": 427_648, "layer3": 1_116_416,
                      "layer4": 3_280_384, "pool": 0, "linear": 2_570}  # fmt: skip
    assert model.count_parameters(network) == 4_883_626
    assert model.count_parameters(model.ResNet(project_layer1=True)) == 4_886_890


def test_shapes():
    network = model.ResNet()
    shapes = []
    for child in network.children():
        child.register_forward_hook(lambda module, inputs, output: shapes.append([*output.shape]))
    network(torch.rand(2, 3, 32, 32))
    assert shapes == [[2, 32, 32, 32], [2, 32, 32, 32], [2, 64, 16, 16], [2, 128, 8, 8],
                      [2, 256, 4, 4], [2, 256, 1, 1], [2, 10]]  # fmt: skip


def test_skips_and_strides():
    network = model.ResNet()
    layers = [network.layer1, network.layer2, network.layer3, network.layer4]
    assert [len(layer) for layer in layers] == [3, 6, 4, 3]
    for number, layer in enumerate(layers, start=1):
        for i, block in enumerate(layer):
            down = number > 1 and i == 0
            assert block.conv1[0].stride == ((2, 2) if down else (1, 1))
            assert block.conv2[0].stride == (1, 1)
            assert isinstance(block.skip, torch.nn.Sequential if down else torch.nn.Identity)
            if down:
                assert block.skip[0].kernel_size == (1, 1) and block.skip[0].stride == (2, 2)
    assert all(isinstance(b.skip, torch.nn.Sequential) for b in model.ResNet(True).layer1)


def test_block_adds_its_skip():
    block = model.BasicBlock(8, 8).eval()
    torch.nn.init.zeros_(block.conv2[0].weight)  # the residual branch now gives zero
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x.relu())
    down = model.BasicBlock(8, 16, stride=2, project=True).eval()
    torch.nn.init.zeros_(down.conv2[0].weight)
    assert torch.equal(down(x), down.skip(x).relu())


def test_no_bias_but_the_linear_one_and_default_initialisation():
    network = model.ResNet()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.bias is None
            bound = 1 / math.sqrt(module.weight[0].numel())  # Kaiming uniform with a = sqrt(5)
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert network.linear.bias.shape == (10,)


def test_parameter_table(capsys):
    model.main()
    table = capsys.readouterr().out
    assert re.search(r"layer2\.0\.skip\.0\.weight +64x32x1x1 +2,048\n", table)
    assert re.search(r"\ntotal +4,883,626\n$", table)


# ---- the data ------------------------------------------------------------------------------------


def images_and_labels(n: int, seed: int = 0) -> data.Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.Split(images, torch.randint(10, (n,), generator=generator))


def test_augmentation_equals_torchvision_to_the_bit():
    images = images_and_labels(162).images
    cases = torch.tensor([*itertools.product(range(9), range(9), range(2))]).T
    plan = torch.cat([torch.randperm(162)[None], cases])
    batch = data.augment(data.crop_windows(images), plan)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    for ours, (index, top, left, flip) in zip(batch, plan.T.tolist()):
        expected = TF.crop(TF.pad(to_pil_image(images[index]), 4), top, left, 32, 32)
        expected = TF.to_tensor(TF.hflip(expected) if flip else expected)
        assert torch.equal(ours, expected)


def test_scale_equals_torchvision_to_the_bit():
    every = torch.arange(256, dtype=torch.uint8).expand(3, 16, 256)
    assert torch.equal(data.scale(every[None])[0], TF.to_tensor(to_pil_image(every)))


def chi_square(values, cells: int) -> float:
    """Chi-square of uniformity in standard deviations from its mean."""
    counts = torch.bincount(values, minlength=cells).double()
    expected = len(values) / cells
    surplus = ((counts - expected) ** 2 / expected).sum() - (cells - 1)
    return float(surplus) / math.sqrt(2 * (cells - 1))


def test_augmentation_is_uniform_and_independent():
    plans = [data.epoch_plan(images_and_labels(50_000), seed=3, epoch=e) for e in range(4)]
    _, top, left, flip = torch.cat(plans, dim=1)
    assert chi_square(top, 9) < 4 and chi_square(left, 9) < 4 and chi_square(flip, 2) < 4
    # Together, and with the next image's: every combination is as frequent as every other.
    assert chi_square(18 * top + 2 * left + flip, 162) < 4
    for values, cells in ((top, 9), (left, 9), (flip, 2)):
        assert chi_square(cells * values[:-1:2] + values[1::2], cells**2) < 4
    assert chi_square(9 * plans[0][1] + plans[1][1], 81) < 4  # and with the next epoch's


def test_epoch_shows_each_image_once_in_an_order_of_its_own():
    split = images_and_labels(1000)
    plan = data.epoch_plan(split, seed=0, epoch=0)
    assert plan.shape == (4, 1000) and plan.dtype == torch.int64
    batches = plan.split(128, dim=1)
    assert [batch.shape[1] for batch in batches] == [128] * 7 + [104]  # the short one is kept
    assert torch.equal(torch.cat([b[0] for b in batches]).sort().values, torch.arange(1000))
    assert torch.equal(plan, data.epoch_plan(split, seed=0, epoch=0))
    # 2^32 apart in (seed << 32) + epoch would be the same to a 32-bit generator.
    others = [(0, 1), (1, 0), (2, 1), (1, 2), (2**32 - 1, 0)]
    plans = [plan] + [data.epoch_plan(split, *pair) for pair in others]
    for a, b in itertools.combinations(plans, 2):
        assert all((a[row] != b[row]).float().mean() > 0.3 for row in range(4))


def test_plan_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    data.epoch_plan(images_and_labels(10), 0, 0)
    data.synthetic()
    assert torch.equal(state, torch.get_rng_state())


def test_synthetic_images_are_learnable():
    (images, labels), (test_images, test_labels) = data.load("synthetic", CPU)
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [100] * 10 and test_labels.bincount().tolist() == [20] * 10
    means = torch.stack([images[labels == label].float().mean(0) for label in range(10)])
    nearest = torch.cdist(test_images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test_labels).float().mean() > 0.95


def test_data_errors(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(data.DataError, match="no download .*no network"):
        data.load(str(tmp_path), CPU)
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="no CIFAR-10 in .*file"):
        data.load(str(tmp_path / "file"), CPU)
    (tmp_path / CIFAR10.base_folder).mkdir()
    (tmp_path / CIFAR10.base_folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match="checksums are wrong.*delete it"):
        data.load(str(tmp_path), CPU)
    assert (tmp_path / CIFAR10.base_folder / "data_batch_1").read_bytes() == b"damaged"


def test_figure_1(tmp_path, monkeypatch, capsys):
    target = tmp_path / "figure1.png"
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", "synthetic", "--out", str(target)])
    data.main()
    assert target.read_bytes().startswith(b"\x89PNG")
    labels = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    assert labels in capsys.readouterr().out


@pytest.mark.skipif(not has_cifar10, reason="no CIFAR-10 in ./data")
def test_real_cifar10():
    training, test = data.load(str(HERE / "data"), CPU)
    assert training.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    reference = CIFAR10(str(HERE / "data"), train=True)
    for i in (0, 12_345, 49_999):
        image, label = reference[i]
        assert torch.equal(data.scale(training.images[i : i + 1])[0], TF.to_tensor(image))
        assert training.labels[i] == label


# ---- settings ------------------------------------------------------------------------------------


def config(*argv: str) -> dict:
    return train.settings(train.parse_args([*map(str, argv)]))


def test_defaults_are_the_reports():
    assert config() == {"optimizer": "sgd", "lr0": 0.3, "bs": 128, "step": 8000, "gamma": 0.2,
                        "momentum": 0.9, "betas": "", "wd": 1e-4, "iters": 32_000, "seed": 0,
                        "data": "cifar10", "precision": "tf32"}  # fmt: skip
    assert list(config()) == train.COLUMNS[:12]
    assert config("--optimizer", "adam")["betas"] == "0.7 0.7"


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
    "--lr abc", "--lr nan", "--lr inf", "--lr -1", "--lr=", "--bs 0", "--bs 1.5", "--bs -3",
    "--step 0", "--iters 0", "--iters 1e3", "--gamma 1.1", "--gamma -0.1", "--momentum 2",
    "--betas 0.9", "--betas 0.9 1", "--wd -1e-4", "--seed -1", f"--seed {2**32}", "--log-every 0",
    "--eval-every 0", "--ckpt-every 0", "--optimizer lion", "--precision fp8", "--device tpu",
    "--device cuda:x", "--device cuda:00", "--learning-rate 0.1", "--optim sgd", "stray",
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse_args(flags.split())
    assert error.value.code == 2
    assert re.fullmatch(r"[^\n]+--help\)\n", capsys.readouterr().err)


def test_learning_rate_decay():
    row = config("--lr", 0.3, "--step", 8000)
    expected = {0: 0.3, 7999: 0.3, 8000: 0.06, 15_999: 0.06, 16_000: 0.012, 31_999: 0.0024}
    for t, lr in expected.items():
        assert train.decayed_lr(row, t) == pytest.approx(lr, rel=1e-12)


# ---- training ------------------------------------------------------------------------------------


def two_steps_by_hand(optimizer: str, w, gradients, lr: float, wd: float):
    """The update formulas of the four optimizers, written out."""
    state, eta = 0.0, lr
    first, second = 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + wd * w
        if optimizer == "sgd":
            state = 0.9 * state + g
            w = w - lr * state
        elif optimizer == "adam":
            first, second = 0.7 * first + 0.3 * g, 0.7 * second + 0.3 * g**2
            w = w - lr * (first / (1 - 0.7**t)) / ((second / (1 - 0.7**t)).sqrt() + 1e-8)
        elif optimizer == "adagrad":
            state = state + g**2
            w = w - lr * g / (state.sqrt() + 1e-10)
        else:  # no average is taken before t0 = 1e6
            w = w * (1 - 1e-4 * eta) - eta * g
            eta = lr / (1 + 1e-4 * lr * t) ** 0.75
    return w


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_first_two_steps_of_each_optimizer(optimizer):
    torch.manual_seed(0)
    start, gradients = torch.randn(50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    for wd in (1e-4, 0.1):  # the second is large enough to be seen if it were misplaced
        w = start.clone().requires_grad_()
        settings = config("--optimizer", optimizer, "--lr", 0.1, "--wd", wd)
        stepper = train.make_optimizer(settings, [w], CPU)
        for gradient in gradients:
            w.grad = gradient.clone()
            stepper.step()
        expected = two_steps_by_hand(optimizer, start, gradients, 0.1, wd)
        # ASGD holds its rate in float32.
        torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-8)


def test_a_small_set_is_overfitted():
    split = images_and_labels(16)
    run = train.Run(config("--lr", 0.02), CPU)
    step = train.make_step(run, split, compiled=False)
    plan = torch.stack([torch.arange(16), *torch.tensor([4, 4, 0])[:, None].expand(3, 16)])
    for _ in range(30):
        run.loss_sum.zero_()
        step(plan)
    assert run.loss_sum < 0.01


def test_evaluation_uses_running_statistics_and_counts_by_class():
    run = train.Run(config(), CPU)
    (_, split) = data.load("synthetic", CPU)
    few = data.Split(split.images[:30], split.labels[:30])
    correct = train.evaluate(run.model, few, "tf32")
    assert run.model.training  # as it was
    run.model.eval()
    one_by_one = [run.model(data.scale(image[None])).argmax() for image in few.images]
    hits = torch.stack(one_by_one) == few.labels
    assert correct.tolist() == [int(hits[few.labels == label].sum()) for label in range(10)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folders in which SHORT ran to its end, by optimizer."""
    folders = {optimizer: tmp_path_factory.mktemp(optimizer) for optimizer in OPTIMIZERS}
    for optimizer, folder in folders.items():
        result = call(folder, *SHORT, "--optimizer", optimizer)
        assert result.code == 0, result.err
    return folders


def test_log_against_a_recomputation(undisturbed):
    rows = read_rows(undisturbed["sgd"] / "logs" / f"{NAME}.csv")
    assert list(rows[0]) == (
        "optimizer,lr0,bs,step,gamma,momentum,betas,wd,iters,seed,data,precision,device,torch,"
        "iteration,lr,loss,test_acc,seconds".split(",")
    )
    assert [row["iteration"] for row in rows] == ["2", "4", "5"]

    training, test = (data.Split(s.images[:10], s.labels[:10]) for s in data.synthetic())
    torch.manual_seed(0)
    network = model.ResNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    plans = [data.epoch_plan(training, seed=0, epoch=epoch) for epoch in (0, 1)]
    losses, accuracy = [], {}
    for t, batch in enumerate((plans[0].split(4, dim=1) + plans[1].split(4, dim=1))[:5]):
        images = data.augment(data.crop_windows(training.images), batch)
        loss = F.cross_entropy(network(images), training.labels[batch[0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        network.eval()
        with torch.no_grad():
            guess = network(data.scale(test.images)).argmax(1)
        network.train()
        accuracy[t + 1] = f"{100 * (guess == test.labels).float().mean():.2f}"
    means = [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert [row["test_acc"] for row in rows] == ["", accuracy[4], accuracy[5]]
    seconds = [float(row["seconds"]) for row in rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    constant = {**config(*SHORT), "device": "cpu", "torch": torch.__version__, "lr": "0.3"}
    for row in rows:
        assert {key: row[key] for key in constant} == {k: str(v) for k, v in constant.items()}
    saved = torch.load(undisturbed["sgd"] / "logs" / f"{NAME}.pt", weights_only=True)
    assert saved["config"] == config(*SHORT)
    for key, value in network.state_dict().items():
        assert torch.equal(saved["model"][key], value)


def few_test_images_of_cifar10() -> None:
    cifar10 = data.cifar10

    def few(root):
        training, test = cifar10(root)
        return training, data.Split(test.images[:100], test.labels[:100])

    data.cifar10 = few


@pytest.mark.skipif(not has_cifar10, reason="no CIFAR-10 in ./data")
def test_short_run_on_real_cifar10(tmp_path):
    flags = ("--data", HERE / "data", "--bs", 8, "--lr", 0.01, "--iters", 8, "--device", "cpu")
    result = call(tmp_path, *flags, hook=(few_test_images_of_cifar10,))
    assert result.code == 0, result.err
    (log,) = (tmp_path / "logs").glob("sgd_lr0.01_bs8_step8000_iters8_seed0.csv")
    (row,) = read_rows(log)
    assert row["data"] == "cifar10" and 1.8 < float(row["loss"]) < 3.2


def test_learning_rate_and_short_batches_in_the_log(tmp_path):
    # Ten images in batches of six: epochs of two iterations, the second of four images.
    flags = "--data synthetic --bs 6 --iters 3 --step 2 --log-every 1 --device cpu"
    assert call(tmp_path, *flags.split()).code == 0
    (log,) = (tmp_path / "logs").glob("*.csv")
    assert [row["lr"] for row in read_rows(log)] == ["0.3", "0.3", "0.06"]


def kill_when_replacing(ending: str, count: int, after: bool) -> None:
    """Make this process kill itself around its count-th replacement of a file with this ending."""
    replace, seen = os.replace, itertools.count(1)

    def fatal(source, target):
        mine = str(target).endswith(ending) and next(seen) == count
        if not mine or after:
            replace(source, target)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    train.os.replace = fatal


def signal_in_step(count: int, number: int) -> None:
    """Make this process signal itself between backward pass and update of its count-th step."""
    seen, original = itertools.count(1), train.make_optimizer

    def make_optimizer(*args):
        optimizer = original(*args)

        def send(*unused):
            if next(seen) == count:
                os.kill(os.getpid(), number)

        optimizer.register_step_pre_hook(send)
        return optimizer

    train.make_optimizer = make_optimizer


KILLS = [(signal_in_step, 2, signal.SIGKILL), (kill_when_replacing, "csv", 2, True),
         (kill_when_replacing, "ckpt", 2, False), (kill_when_replacing, "pt", 1, True)]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_and_started_again_it_ends_as_if_undisturbed(optimizer, undisturbed, tmp_path):
    flags = (*SHORT, "--optimizer", optimizer)
    for hook in KILLS:
        assert call(tmp_path, *flags, hook=hook).code == -signal.SIGKILL
    assert call(tmp_path, *flags).code == 0
    assert outcome(tmp_path) == outcome(undisturbed[optimizer])


def signal_in_evaluation(number: int) -> None:
    evaluate = train.evaluate

    def send(*args):
        os.kill(os.getpid(), number)
        return evaluate(*args)

    train.evaluate = send


@pytest.mark.parametrize(
    "hook, code",
    [((signal_in_step, 3, signal.SIGINT), 130), ((signal_in_step, 1, signal.SIGTERM), 143),
     ((signal_in_evaluation, signal.SIGTERM), 143)],
)  # fmt: skip
def test_interrupted_it_writes_a_checkpoint_and_resumes(hook, code, undisturbed, tmp_path):
    result = call(tmp_path, *SHORT, hook=hook)
    assert result.code == code and result.err == ""
    done = hook[1] if hook[0] is signal_in_step else 4
    saved = torch.load(tmp_path / "logs" / f"{NAME}.ckpt", weights_only=True)
    assert saved["iteration"] == done
    again = call(tmp_path, *SHORT)
    assert again.code == 0 and f"goes on from iteration {done}\n" in again.out
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


def test_complete_run_is_not_trained_again(undisturbed):
    folder = undisturbed["sgd"]
    before = outcome(folder)
    began = time.perf_counter()
    result = call(folder, *SHORT)
    assert time.perf_counter() - began < 5
    assert result.code == 0 and "is complete" in result.out
    assert outcome(folder) == before


def test_truncated_log_is_not_complete(undisturbed, tmp_path):
    shutil.copytree(undisturbed["sgd"] / "logs", tmp_path / "logs")
    log = tmp_path / "logs" / f"{NAME}.csv"
    whole = log.read_text()
    # Cut within the last line, the accuracy's digits included; each is refused, none thrown away.
    for length in (len(whole) - 1, whole.rindex(",") - 1, whole.rindex("cpu"), 300, 0):
        log.write_text(whole[:length])
        assert not train.is_complete(log, config(*SHORT))
    assert_one_line_error(call(tmp_path, *SHORT), 1, "--fresh")
    assert log.read_text() == ""
    log.write_text(whole)
    assert train.is_complete(log, config(*SHORT))
    assert not train.is_complete(log, config(*SHORT, "--seed", 1))


def test_fresh_trains_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed["sgd"] / "logs", tmp_path / "logs")
    os.utime(tmp_path / "logs" / f"{NAME}.csv", (0, 0))
    result = call(tmp_path, *SHORT, "--fresh")
    assert result.code == 0 and "is complete" not in result.out
    assert (tmp_path / "logs" / f"{NAME}.csv").stat().st_mtime > 0
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


def test_eval_gives_the_logged_accuracy(undisturbed):
    folder = undisturbed["sgd"]
    before = outcome(folder)
    result = call(folder, "--eval", f"logs/{NAME}.pt", "--device", "cpu")  # data as trained on
    logged = read_rows(folder / "logs" / f"{NAME}.csv")[-1]["test_acc"]
    assert result.code == 0 and f"{NAME}: {logged} %\n" in result.out
    by_class = re.findall(r"^(\w+) +([\d.]+) %$", result.out, re.M)
    assert tuple(name for name, _ in by_class) == data.CLASSES
    assert sum(float(value) for _, value in by_class) / 10 == pytest.approx(float(logged), abs=0.01)
    assert outcome(folder) == before


def test_progress_without_a_terminal(capsys):
    progress = train.Progress(config("--iters", 2500), start=0)
    for t in range(2501):
        progress(t, 1.5, 0.3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["1000", "2000", "2500"]
    assert re.match(r"1000/2500  loss 1\.5000  lr 0\.3  \d+ images/s  0:00:0\d left", lines[0])


def test_progress_on_a_terminal_renews_its_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = train.Progress(config("--iters", 10), start=4)
    for t in range(4, 11):
        progress(t, 1.5, 0.3)
    out = capsys.readouterr().out
    assert re.fullmatch(r"5/10  loss [^\n]+ left *\r10/10  loss [^\r]+ left *\n", out)


# ---- errors: one line on stderr, no traceback, nothing lost --------------------------------------


def test_divergence_is_logged_and_exits_with_3(tmp_path):
    flags = "--data synthetic --bs 4 --lr 1e9 --log-every 5 --device cpu"
    assert_one_line_error(call(tmp_path, *flags.split()), 3, "loss nan at", "lower --lr")
    (log,) = (tmp_path / "logs").glob("*.csv")
    row = read_rows(log)[-1]
    assert row["loss"] == "nan" and row["test_acc"] == ""
    assert not list((tmp_path / "logs").glob("*.pt"))


def test_device_that_is_not_there(tmp_path):
    result = call(tmp_path, *SHORT[:-1], "cuda:99")
    assert_one_line_error(result, 1, "cuda:99 is not there")
    assert not (tmp_path / "logs").exists()


def test_compile_without_cuda(tmp_path):
    assert_one_line_error(call(tmp_path, *SHORT, "--compile"), 1, "--compile needs")


def test_damaged_data(tmp_path):
    (tmp_path / "data" / CIFAR10.base_folder).mkdir(parents=True)
    result = call(tmp_path, "--device", "cpu")
    assert_one_line_error(result, 1, "cifar-10-batches-py", "--data synthetic")
    assert not (tmp_path / "logs").exists()


def stop_after_first_checkpoint() -> None:
    kill_when_replacing("ckpt", 2, after=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder whose run was killed after two iterations."""
    folder = tmp_path_factory.mktemp("killed")
    assert call(folder, *SHORT, hook=(stop_after_first_checkpoint,)).code == -signal.SIGKILL
    return folder


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def zip_with(path: Path, **changes) -> None:
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, **changes}, path)


def damage(kind: str, path: Path) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one byte changed":  # in the middle of the weights, where only a checksum sees it
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "pickle in a zip":
        torch.save({"config": Bomb(), "model": {}}, path)
    elif kind == "other network":
        zip_with(path, model=model.ResNet(project_layer1=True).state_dict())
    elif kind == "weights":
        saved = torch.load(path, weights_only=True)
        torch.save({"config": saved["config"], "model": saved["model"]}, path)
    elif kind == "other configuration":
        zip_with(path, config=config("--lr", 0.1))
    else:
        torch.save([1, 2, 3], path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "one byte changed", "pickle", "pickle in a zip", "other network",
     "weights", "other configuration", "foreign"],
)  # fmt: skip
def test_bad_checkpoints_and_weights(kind, killed, tmp_path):
    shutil.copytree(killed / "logs", tmp_path / "logs")
    damage(kind, tmp_path / "logs" / f"{NAME}.ckpt")
    before = outcome(tmp_path)
    assert_one_line_error(call(tmp_path, *SHORT), 1, f"cannot use logs/{NAME}.ckpt")
    if kind not in ("weights", "other configuration"):  # which are as good as any to test
        result = call(tmp_path, *SHORT, "--eval", f"logs/{NAME}.ckpt")
        assert_one_line_error(result, 1, f"cannot use logs/{NAME}.ckpt")
    assert outcome(tmp_path) == before
    assert not (tmp_path / "exploded").exists()


def test_log_without_its_checkpoint_is_not_thrown_away(killed, tmp_path):
    shutil.copytree(killed / "logs", tmp_path / "logs")
    (tmp_path / "logs" / f"{NAME}.ckpt").unlink()
    before = outcome(tmp_path)
    assert_one_line_error(call(tmp_path, *SHORT), 1, "--fresh")
    assert outcome(tmp_path) == before


def test_log_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").touch()
    assert_one_line_error(call(tmp_path, *SHORT), 1, "cannot write to logs")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def test_disk_that_takes_no_more(killed, undisturbed, tmp_path):
    shutil.copytree(killed / "logs", tmp_path / "logs")
    before = outcome(tmp_path)
    result = call(tmp_path, *SHORT, hook=(limit_file_size,))
    assert_one_line_error(result, 1, "cannot write", "start again")
    assert outcome(tmp_path) == before
    assert call(tmp_path, *SHORT).code == 0  # once there is room
    assert outcome(tmp_path) == outcome(undisturbed["sgd"])


def test_second_process_on_one_configuration_stops(tmp_path):
    (tmp_path / "second").mkdir()
    logs = ("--logs", tmp_path / "logs")
    first = begin(tmp_path, *SHORT, "--iters", "1000", *logs)
    while not list((tmp_path / "logs").glob("*.ckpt")) and first.is_alive():
        time.sleep(0.05)
    result = call(tmp_path / "second", *SHORT, "--iters", "1000", *logs)
    assert_one_line_error(result, 1, "another process is training")
    other = call(tmp_path / "second", *SHORT, "--iters", "1", *logs)
    assert other.code == 0, other.err
    first.terminate()
    assert finish(first, tmp_path).code == 143


def test_numbers_at_the_edge(tmp_path):
    # A batch larger than the data set is the data set; the log may be coarser than the run.
    small = "--data synthetic --iters 1 --device cpu".split()
    assert call(tmp_path, *small, "--bs", "1", "--log-every", "1000").code == 0
    assert call(tmp_path, *small, "--bs", "11").code == 0
    (log,) = (tmp_path / "logs").glob("*bs1_*.csv")
    assert [row["iteration"] for row in read_rows(log)] == ["1"]


# ---- the report's rows, for the tests of run_all.sh and report.py --------------------------------

# Tables 4-7 and the extended run as the report prints them:
# table, report's accuracy in percent, optimizer, lr, batch size, decay step
ROWS = [
    ("4", "60.47", "adam", "0.1", "64", "5000"),
    ("4", "88.51", "sgd", "0.1", "64", "5000"),
    ("4", "84.90", "adagrad", "0.1", "64", "5000"),
    ("4", "88.95", "asgd", "0.1", "64", "5000"),
    ("5", "88.51", "sgd", "0.1", "64", "5000"),
    ("5", "89.31", "sgd", "0.3", "64", "5000"),
    ("5", "87.70", "sgd", "0.5", "64", "5000"),
    ("6", "84.96", "sgd", "0.3", "32", "5000"),
    ("6", "89.31", "sgd", "0.3", "64", "5000"),
    ("6", "91.07", "sgd", "0.3", "128", "5000"),
    ("6", "90.40", "sgd", "0.3", "256", "5000"),
    ("7", "89.83", "sgd", "0.3", "128", "4000"),
    ("7", "91.07", "sgd", "0.3", "128", "5000"),
    ("7", "92.65", "sgd", "0.3", "128", "8000"),
    ("7", "92.14", "sgd", "0.3", "128", "10000"),
    ("extended", "93.18", "sgd", "0.3", "128", "10000"),
]

# Stands for train.py where only run_all.sh is tested; needs no torch, so a row takes 50 ms.
STUB = """
import os, pathlib, signal, sys, time
flags = " ".join(sys.argv[1:])
done = pathlib.Path(flags.replace(" ", "_") + ".done")
if done.exists():
    sys.exit(0)
with open("calls.txt", "a") as calls:
    print(flags, file=calls)
if os.environ.get("FAIL", "none") in flags:
    sys.exit(int(os.environ["STATUS"]))
if os.environ.get("WAIT", "none") in flags:
    def stop(number, frame):
        time.sleep(0.5)
        pathlib.Path("checkpoint").touch()
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path("ready").touch()
    time.sleep(60)
done.touch()
"""


def flags_of(optimizer, lr, bs, step, table=None):
    more = " --iters 64000" if table == "extended" else ""
    return f"--optimizer {optimizer} --lr {lr} --bs {bs} --step {step}{more}"


def different_runs(tables):
    return list(dict.fromkeys(flags_of(*row[2:], row[0]) for row in ROWS if row[0] in tables))


def environment(**more):
    """`python` in the scripts is the one that runs the tests; one thread for each."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def run_all(folder, *args, cwd="/", **env):
    return subprocess.run(["bash", folder / "run_all.sh", *args], cwd=cwd, text=True,
                          capture_output=True, timeout=600, env=environment(**env))


def run_report(*args, **env):
    return subprocess.run([sys.executable, HERE / "report.py", *args], text=True, timeout=60,
                          capture_output=True, env=environment(**env))


def stub_calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


@pytest.fixture
def stubbed(tmp_path):
    """A folder with the scripts and a stub in the place of train.py."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("run_all.sh", "report.py"):
        shutil.copy(HERE / name, folder)
    (folder / "train.py").write_text(STUB)
    return folder


# ---- run_all.sh ----------------------------------------------------------------------------------


def test_rows_are_the_reports():
    text = (HERE / "run_all.sh").read_text()
    found = re.findall(r"^(4|5|6|7|extended) +([\d.]+) +(--.+)$", text, re.MULTILINE)
    assert [(table, accuracy, " ".join(flags.split())) for table, accuracy, flags in found] == [
        (row[0], row[1], flags_of(*row[2:], row[0])) for row in ROWS]
    in_report = [(str(table), f"{accuracy:.2f}", *map(str, key[:4]))
                 for table, (*_, rows) in report.TABLES.items() for _, key, accuracy in rows]
    assert in_report == ROWS


@pytest.mark.parametrize("tables", ["", "4", "5 7", "extended", "extended 6"])
def test_list(tables):
    listed = run_all(HERE, "--list", *tables.split())
    wanted = different_runs(tables.split() or "4567")
    assert listed.stdout.splitlines() == ["python train.py " + flags for flags in wanted]
    assert len(wanted) == {"": 12, "4": 4, "5 7": 7, "extended": 1, "extended 6": 5}[tables]


def test_list_quotes_flags():
    flags = ["--logs", "it's a folder", "--data=a\\b$HOME", "--seed", "1"]
    for line in run_all(HERE, "--list", "5", "--", *flags).stdout.splitlines():
        assert shlex.split(line)[-5:] == flags


@pytest.mark.parametrize("argument", ["8", "--lr", "", "--help"])
def test_run_all_usage(argument, stubbed):
    result = run_all(stubbed, "4", argument)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and f"'{argument}'" in result.stderr
    assert not (stubbed / "calls.txt").exists()


def test_run_all_trains_each_run_once(stubbed):
    first = run_all(stubbed, "--", "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert stub_calls(stubbed) == [flags + " --seed 1" for flags in different_runs("4567")]
    assert first.stdout.count("same run as above, not trained again") == 3
    assert "== 12 of 12, 0h00m so far. Table 7 (report 92.14 %)" in first.stdout
    assert "### Table 7" in first.stdout  # it ends with the report
    assert run_all(stubbed, "--", "--seed", "1").returncode == 0
    assert len(stub_calls(stubbed)) == 12


def test_failing_row_does_not_stop_the_others(stubbed):
    result = run_all(stubbed, FAIL="--bs 32", STATUS="3")
    assert result.returncode == 1
    assert stub_calls(stubbed) == different_runs("4567")
    assert result.stderr.count("--bs 32") == 2 and "exit 3" in result.stderr
    assert result.stderr.rstrip().endswith("exit 3") and "### Table 7" in result.stdout
    again = run_all(stubbed)
    assert again.returncode == 0 and not again.stderr
    assert len(stub_calls(stubbed)) == 13  # the failed one once more


@pytest.mark.parametrize("status", [130, 143])
def test_interrupted_training_stops_run_all(stubbed, status):
    assert run_all(stubbed, FAIL="--bs 32", STATUS=str(status)).returncode == status
    assert stub_calls(stubbed)[-1] == different_runs("6")[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_all_interrupted_and_restarted(stubbed, number):
    process = subprocess.Popen(["bash", stubbed / "run_all.sh"], env=environment(WAIT="--bs 256"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not (stubbed / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    # Ctrl-C goes to all processes of a terminal, kill to one.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(timeout=10) == 128 + number
    assert (stubbed / "checkpoint").exists()  # train.py was given the time to write it
    assert process.communicate()[1] == "run_all.sh: stopped; start it again to continue\n"
    reached = stub_calls(stubbed)
    assert reached[-1] == flags_of("sgd", "0.3", "256", "5000") and len(reached) < 12
    assert run_all(stubbed).returncode == 0
    assert stub_calls(stubbed)[len(reached):] == different_runs("4567")[len(reached) - 1:]


@pytest.mark.parametrize("flags", [["--logs", "else where"], ["--logs=else where"]])
def test_run_all_reports_on_its_logs(stubbed, flags):
    write_log(stubbed / "else where", 91.5, step=8000)
    assert "| 8,000 | 92.65 | 91.50 | 1 | -1.15 |" in run_all(stubbed, "4", "--", *flags).stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck():
    subprocess.run(["shellcheck", HERE / "run_all.sh"], check=True)


# ---- report.py -----------------------------------------------------------------------------------


def write_log(folder, *accuracies, losses=(2.0, 1.0), name="", **settings):
    """One complete log for each accuracy, seed 0, 1, ..., with a row for each loss."""
    folder.mkdir(exist_ok=True)
    for seed, accuracy in enumerate(accuracies):
        run = dict(optimizer="sgd", lr0=0.3, bs=128, step=5000, gamma=0.2, momentum=0.9, betas="",
                   wd=0.0001, iters=32000, seed=seed, data="cifar10", precision="tf32",
                   device="cpu", torch="2.15.0") | settings
        if run["optimizer"] != "sgd":
            run["momentum"] = ""
        if run["optimizer"] == "adam":
            run["betas"] = settings.get("betas", "0.7 0.7")
        every = run["iters"] // len(losses)
        rows = [report.HEADER]
        for n, loss in enumerate(losses, 1):
            acc = f"{accuracy:.2f}" if n == len(losses) else ""
            rows.append([*run.values(), n * every, 0.1, loss, acc, n * 1.5])
        file = name or "_".join(map(str, run.values())).replace("/", "")
        with open(folder / f"{file}.csv", "w", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(rows)
    return folder


def tables(folder):
    return report.markdown(*report.collect(folder))


@pytest.fixture
def all_runs(tmp_path):
    """Logs of every row with 3 seeds, whose means are the report's, and of the extended run."""
    for table, accuracy, optimizer, lr, bs, step in ROWS:
        iters = 64000 if table == "extended" else 32000
        write_log(tmp_path / "logs", *(float(accuracy) + d for d in (-0.5, 0, 0.5)),
                  losses=[2.3 / n for n in range(1, 33)], optimizer=optimizer, lr0=float(lr),
                  bs=int(bs), step=int(step), iters=iters)
    return tmp_path / "logs"


def test_mean_and_deviation(tmp_path):
    write_log(tmp_path, 88, 89, 90, optimizer="sgd", lr0=0.1, bs=64)  # deviation sqrt(2 / 2)
    write_log(tmp_path, 84, 85, optimizer="adagrad", lr0=0.1, bs=64)  # sqrt(0.5)
    write_log(tmp_path, 60, optimizer="adam", lr0=0.1, bs=64)
    text = tables(tmp_path)
    assert "| SGD | 88.51 | 89.00 ± 1.00 | 3 | +0.49 |" in text
    assert "| 0.1 | 88.51 | 89.00 ± 1.00 | 3 | +0.49 |" in text
    assert "| Adagrad | 84.90 | 84.50 ± 0.71 | 2 | -0.40 |" in text
    assert "| Adam | 60.47 | 60.00 | 1 | -0.47 |" in text
    assert "| ASGD | 88.95 | – | 0 | – |" in text
    assert "Runs: 6, on cpu with torch 2.15.0, precision tf32, seeds 0, 1, 2." in text
    assert "Not the report's settings" not in text and "left out" not in text


@pytest.mark.parametrize("accuracies, verdict", [
    ((88, 89, 87), "; it holds."),
    ((88, 87, 89), "; it does not hold, ours is 0.5 > 0.1 > 0.3."),
    ((88, 89, 88), "; it does not hold, ours is 0.3 > 0.1 = 0.5."),
    ((88, 89), "; ours is incomplete."),
])
def test_ranking(tmp_path, accuracies, verdict):
    for lr, accuracy in zip((0.1, 0.3, 0.5), accuracies):
        write_log(tmp_path, accuracy, lr0=lr, bs=64)
    assert f"Ranking of the report: 0.3 > 0.1 > 0.5{verdict}\n" in tables(tmp_path)


def test_all_rows(all_runs):
    text = tables(all_runs)
    for _, accuracy, *_ in ROWS:
        assert f"| {accuracy} | {accuracy} ± 0.50 | 3 | +0.00 |" in text
    assert text.count("it holds.") == 4 and "Runs: 39," in text


@pytest.mark.parametrize("logs", ["empty", "missing"])
def test_no_logs(tmp_path, logs):
    (tmp_path / "empty").mkdir()
    result = run_report("--logs", tmp_path / logs)
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.count("| – | 0 | – |") == len(ROWS)
    assert result.stdout.count("ours is incomplete") == 4 and "Runs:" not in result.stdout


def test_settings_are_never_mixed(tmp_path):
    write_log(tmp_path, 90)
    for other in (dict(precision="bf16"), dict(wd=0.0), dict(iters=64000), dict(gamma=0.5),
                  dict(momentum=0.8), dict(data="synthetic")):
        write_log(tmp_path, 50, 50, **other)
    write_log(tmp_path, 50, optimizer="adam", lr0=0.1, bs=64, betas="0.9 0.999")
    write_log(tmp_path, 50, lr0=0.2)
    text = tables(tmp_path) + "\n"
    assert text.count("| 90.00 | 1 |") == 2 and "50.00" not in text
    for reason in ("precision bf16", "wd 0.0", "iters 64000", "gamma 0.5", "momentum 0.8",
                   "data synthetic"):
        assert text.count(f": other settings: {reason}\n") == 2
    assert text.count(": other settings: betas 0.9 0.999\n") == 1
    assert text.count(": not a row of the tables") == 1


def test_settings_of_most_runs_without_the_reports(tmp_path):
    """Momentum is a setting of SGD alone and betas of Adam alone: they split no group."""
    for optimizer in ("sgd", "adam", "adagrad", "asgd"):
        write_log(tmp_path, 20, optimizer=optimizer, lr0=0.1, bs=64, data="synthetic", iters=30)
    write_log(tmp_path, 30, 40, lr0=0.3, bs=64, data="synthetic", iters=60)
    text = tables(tmp_path)
    assert "**Not the report's settings: iters 30, data synthetic.**" in text
    assert text.count("| 20.00 | 1 |") == 5 and "| 35.00" not in text
    assert text.count(": other settings: iters 60") == 2


def test_bf16_runs_of_the_report_go_before_others(tmp_path):
    write_log(tmp_path, 20, data="synthetic", iters=30)
    write_log(tmp_path, 90, precision="bf16")
    assert "Not the report's settings: precision bf16." in tables(tmp_path)


def test_extended_run(tmp_path):
    write_log(tmp_path, 93, 94, step=10000, iters=64000)
    text = tables(tmp_path)
    assert "| 64,000 | 93.18 | 93.50 ± 0.71 | 2 | +0.32 |" in text
    assert "| 10,000 | 92.14 | – | 0 | – |" in text and "left out" not in text


def test_copied_log(tmp_path):
    write_log(tmp_path, 90, name="run")
    write_log(tmp_path, 80, name="run (copy)")
    text = tables(tmp_path)
    assert text.count("| 90.00 | 1 |") == 2
    assert "- `run (copy).csv`: same settings and seed as run.csv" in text


DAMAGE = {  # what happens to a complete log's lines, and the reason that is given
    "empty": (lambda lines: [], "line 1 is not the header"),
    "header": (lambda lines: [lines[0].replace("lr0", "lr")] + lines[1:], "line 1 is not"),
    "no header": (lambda lines: lines[1:], "line 1 is not the header"),
    "no rows": (lambda lines: lines[:1], "incomplete: no iteration logged"),
    "truncated": (lambda lines: lines[:2] + [lines[2][:40]], "line 3 is not 19 values"),
    "cut number": (lambda lines: lines[:2] + [lines[2][:-2]], "the last line is cut short"),
    "too long": (lambda lines: lines[:2] + ["x," + lines[2]], "line 3 is not 19 values"),
    "word": (lambda lines: [line.replace(",2.0,", ",two,") for line in lines], "'two'"),
    "no accuracy": (lambda lines: [line.replace(",80.00,", ",800,") for line in lines], "800.0"),
    "NUL": (lambda lines: [line.replace("cpu", "c\0u") for line in lines], "damaged"),
    "order": (lambda lines: [lines[0], lines[2], lines[1]], "iteration 16000 follows 32000"),
    "twice": (lambda lines: lines + lines[2:], "iteration 32000 follows 32000"),
    "mixed": (lambda lines: lines[:2] + [lines[2].replace(",128,", ",64,")], "other settings than"),
    "stopped": (lambda lines: lines[:2], "incomplete: 16000 of 32000 iterations"),
    "not tested": (lambda lines: [line.replace(",80.00,", ",,") for line in lines], "incomplete"),
    "nan": (lambda lines: lines[:2] + [lines[2].replace(",1.0,80.00", ",nan,")],
            "diverged at iteration 32000: loss nan"),
    "inf": (lambda lines: [line.replace(",2.0,", ",inf,") for line in lines],
            "diverged at iteration 16000: loss inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_log(tmp_path, case):
    change, reason = DAMAGE[case]
    write_log(tmp_path, 80, name="good", step=8000)
    write_log(tmp_path, 80, name="bad", seed=1, step=8000)
    lines = (tmp_path / "bad.csv").read_text().splitlines(keepends=True)
    changed = "".join(change(lines))
    assert changed != "".join(lines)
    (tmp_path / "bad.csv").write_text(changed)
    text = tables(tmp_path)
    assert text.count("| 80.00 | 1 | -12.65 |") == 1
    assert "- `bad.csv`: " in text and reason in text


def test_unreadable_log(tmp_path):
    write_log(tmp_path, 80, name="good", step=8000)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "latin.csv").write_bytes("précision".encode("latin-1"))
    (tmp_path / "dangling.csv").symlink_to("nowhere")
    text = tables(tmp_path)
    assert text.count("| 80.00 | 1 |") == 1
    assert "- `folder.csv`: cannot be read: Is a directory" in text
    assert "- `latin.csv`: damaged: not CSV in UTF-8" in text
    assert "- `dangling.csv`: cannot be read: No such file or directory" in text


def test_log_folder_that_the_system_refuses():
    result = run_report("--logs", "x" * 300)
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [["--log", "x"], ["x"], ["--figures"]])
def test_report_usage(args):
    result = run_report(*args)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not result.stdout


def test_readme(tmp_path):
    write_log(tmp_path / "logs", 91.5)
    readme = tmp_path / "README.md"
    readme.write_bytes(b"# Title\r\n<!-- tables -->\nold\n<!-- /tables -->\r\nend\n")
    for _ in range(2):
        result = run_report("--logs", tmp_path / "logs", "--readme", readme)
        assert result.returncode == 0, result.stderr
        assert readme.read_bytes() == (b"# Title\r\n<!-- tables -->\n" + result.stdout.encode()
                                       + b"<!-- /tables -->\r\nend\n")
    assert "91.50" in readme.read_text() and sorted(os.listdir(tmp_path)) == ["README.md", "logs"]


@pytest.mark.parametrize("text", [None, "", "<!-- /tables --> <!-- tables -->", "<!-- tables -->"])
def test_readme_without_markers(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    result = run_report("--logs", tmp_path, "--readme", readme)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert str(readme) in result.stderr
    assert readme.exists() == (text is not None) and (text is None or readme.read_text() == text)


def test_readme_shows_the_committed_logs():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    text = tables(HERE / "results")
    assert f"<!-- tables -->\n{text}\n<!-- /tables -->" in readme


# ---- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, lines", [(4, 4), (5, 3), (6, 4), (7, 4), (8, 2)])
def test_figure_lines(all_runs, number, lines):
    pytest.importorskip("matplotlib")
    figure = report.draw_figure(number, *report.collect(all_runs)[:2])
    assert len(figure.axes) == (2 if number == 8 else 1)
    for ax in figure.axes:
        assert len(ax.lines) == len(ax.collections) == lines  # a mean and a band each
    assert f"Figure {number}" in figure.axes[0].get_title(loc="left")
    assert figure.axes[-1].get_xlabel().startswith("iteration")
    assert figure.axes[0].get_ylabel() == "training loss"
    assert all("± 0.50 %" in line.get_label() for line in figure.axes[0].lines)
    end = 64000 if number == 8 else 32000
    assert figure.axes[0].lines[0].get_xdata()[-1] == end  # iterations, not hundreds of them
    assert figure.axes[0].get_yscale() == "log"


def test_figure_values(tmp_path):
    pytest.importorskip("matplotlib")
    for seed, losses in enumerate([(2.0, 1.0, 0.5, 0.2), (4.0, 2.0, 0.7, 0.4)]):
        write_log(tmp_path, 90, seed=seed, losses=losses, lr0=0.3, bs=64, step=8000, name=seed)
        write_log(tmp_path, 90, seed=seed, losses=losses, step=8000, name=f"{seed} b")
    line, = report.draw_figure(7, *report.collect(tmp_path)[:2]).axes[0].lines
    assert list(line.get_xdata()) == [8000, 16000, 24000, 32000]
    assert list(line.get_ydata()) == pytest.approx([3.0, 1.5, 0.6, 0.3])
    assert line.get_markevery() == [0, 1, 2, 3]  # every decay of the learning rate
    assert report.draw_figure(5, *report.collect(tmp_path)[:2]) is None


def test_wild_loss_leaves_the_others_legible(tmp_path):
    pytest.importorskip("matplotlib")
    write_log(tmp_path, 60, optimizer="adam", lr0=0.1, bs=64, losses=(1e30, 1e20))
    write_log(tmp_path, 88, optimizer="sgd", lr0=0.1, bs=64, losses=(2.2, 0.3))
    low, high = report.draw_figure(4, *report.collect(tmp_path)[:2]).axes[0].get_ylim()
    assert 0.1 < low < 0.3 and 2.2 < high < 12


def test_figure_files(all_runs, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_report("--logs", all_runs, "--figures", tmp_path / "a" / "b")
    assert result.returncode == 0 and not result.stderr
    names = sorted(os.listdir(tmp_path / "a" / "b"))
    assert names == [f"figure{n}.png" for n in range(4, 9)]
    for name in names:
        content = (tmp_path / "a" / "b" / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
        assert int.from_bytes(content[16:20], "big") == 1200  # pixels wide


def test_figure_without_runs(tmp_path):
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "logs", 91, lr0=0.5, bs=64)
    result = run_report("--logs", tmp_path / "logs", "--figures", tmp_path / "figures")
    assert result.returncode == 0 and os.listdir(tmp_path / "figures") == ["figure5.png"]
    for number in (4, 6, 7, 8):
        assert f"Figure {number} is not drawn" in result.stderr


def test_figures_into_a_file(all_runs, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "figures").write_text("mine")
    result = run_report("--logs", all_runs, "--figures", tmp_path / "figures")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert (tmp_path / "figures").read_text() == "mine"


def test_without_matplotlib(all_runs, tmp_path):
    """The tables need no package; the figures say which one they need."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    result = run_report("--logs", all_runs, "--figures", tmp_path / "f", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and "92.65 ± 0.50" in result.stdout
    assert result.stderr == "report.py: the figures need matplotlib: pip install matplotlib\n"


# ---- both scripts on generated data --------------------------------------------------------------


TINY = "--data synthetic --iters 1 --log-every 1 --eval-every 1 --device cpu".split()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the scripts, with all tables trained; and what run_all.sh printed."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("run_all.sh", "report.py", "train.py", "data.py", "model.py"):
        shutil.copy(HERE / name, folder)
    text = (folder / "data.py").read_text()
    assert "(1000, 200)" in text  # generated images, of which ten and ten are enough here
    (folder / "data.py").write_text(text.replace("(1000, 200)", "(10, 10)"))
    return folder, run_all(folder, "--", *TINY)


def test_all_tables_on_generated_data(project):
    folder, result = project
    assert result.returncode == 0, result.stderr
    assert "**Not the report's settings: iters 1, data synthetic.**" in result.stdout
    assert "| – |" not in result.stdout.split("### Extended run")[0]
    files = {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()}
    assert sum(path.suffix == ".csv" for path in files) == 12
    start = time.monotonic()
    again = run_all(folder, "--", *TINY)
    assert again.returncode == 0 and again.stdout.count("is complete") == 12
    assert time.monotonic() - start < 12 * 10
    assert {path: path.stat().st_mtime_ns for path in (folder / "logs").iterdir()} == files


def test_parallel_logs_equal_sequential_ones(project):
    folder, _ = project
    commands = run_all(folder, "--list", "5", "--", *TINY, "--logs", "parallel").stdout
    subprocess.run(["xargs", "-P", "2", "-I", "RUN", "bash", "-c", "RUN"], input=commands,
                   text=True, cwd=folder, check=True, env=environment())
    logs = [*(folder / "parallel").glob("*.csv")]
    assert len(logs) == 3
    for path in logs:
        one, two = (re.sub(r",[^,]*$", "", (folder / logs / path.name).read_text(), flags=re.M)
                    for logs in ("logs", "parallel"))
        assert one == two


def test_failing_and_interrupted_rows_on_generated_data(project):
    folder, _ = project
    (folder / "more").mkdir()
    name = "sgd_lr0.3_bs64_step5000_iters9_synthetic_seed0"
    (folder / "more" / f"{name}.ckpt").write_bytes(b"damaged")
    flags = ["5", "--", *TINY, "--iters", "9", "--eval-every", "9", "--logs", "more"]
    process = subprocess.Popen(["bash", folder / "run_all.sh", *flags], env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((folder / "more").glob("*.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert len(list((folder / "more").glob("sgd_lr0.1_*.ckpt"))) == 1
    again = run_all(folder, *flags)
    assert again.stdout.count("goes on from iteration") == 1
    assert again.returncode == 1 and f"cannot use more/{name}.ckpt" in again.stderr
    assert len(list((folder / "more").glob("*.csv"))) == 2  # the others went on


# ---- README and bench.py -------------------------------------------------------------------------


def test_report_reads_what_train_writes():
    assert report.HEADER == train.COLUMNS
    assert report.REPORT == {key: str(config("--optimizer", "adam")[key] or config()[key])
                             for key in report.REPORT}


def test_readme_has_every_flag():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    shown = subprocess.run([sys.executable, HERE / "train.py", "--help"], text=True,
                           capture_output=True, check=True).stdout
    flags = set(re.findall(r"--[a-z][a-z-]*", shown[shown.index("options:"):])) - {"--help"}
    assert len(flags) == 21
    assert [flag for flag in flags if not re.search(rf"^\|.*`{flag}( FILE)?`", readme, re.M)] == []


def test_readme_shows_the_committed_timings():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    tables = [*(HERE / "results" / "bench").glob("*.csv")]
    assert tables
    for row in itertools.chain.from_iterable(map(read_rows, tables)):
        figures = "{bs} | {code} | {ms} ± {spread} | {images_per_s} | {tflops} | {ratio}"
        assert f"| {figures.format(**row)} |\n" in readme


def test_bench(tmp_path, monkeypatch, capsys):
    argv = "bench.py --bs 4 --steps 1 --rounds 2 --workers 0 --data synthetic --device cpu --csv"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "bench.csv")])
    bench.main()
    usual, ours = read_rows(tmp_path / "bench.csv")
    assert (usual["code"], ours["code"]) == ("usual loop", "this code")
    for row in (usual, ours):
        assert float(row["images_per_s"]) == pytest.approx(4 / (float(row["ms"]) / 1e3), abs=1)
    assert float(ours["ratio"]) == pytest.approx(float(usual["ms"]) / float(ours["ms"]), abs=0.01)
    assert f"| 4 | this code | {ours['ms']} ± " in capsys.readouterr().out


def test_operations_of_an_image():
    forward = sum(  # multiply-adds of convolutions and linear layer, from the shapes of Table 1
        [3 * 32 * 9 * 32**2, 6 * 32 * 32 * 9 * 32**2, 256 * 10]
        + [(c * 2 * c * (9 + 1) + (2 * n - 1) * (2 * c) ** 2 * 9) * size**2
           for c, n, size in ((32, 6, 16), (64, 4, 8), (128, 3, 4))])  # fmt: skip
    stem = 3 * 32 * 9 * 32**2  # no gradient of the images is taken
    assert 2 * (3 * forward - stem) == bench.flop_per_image()


# ---- the fast path -------------------------------------------------------------------------------


def test_graphed_step_records_what_the_plain_step_does(monkeypatch):
    optimizer = SimpleNamespace(param_groups=[{"lr": None}])
    weight, recordings = torch.zeros(2), []

    def step(plan, lr=None):
        nonlocal weight
        weight = 0.5 * weight - (lr or optimizer.param_groups[0]["lr"]) * plan.sum(1)

    class Graph:
        def replay(self):
            step(self.plan, self.lr)

    @contextmanager
    def record(graph, stream):
        """As CUDA does: nothing is computed, and the learning rate is a constant from now on."""
        nonlocal weight
        before = weight
        yield
        weight, graph.plan, graph.lr = before, graphed.plan, optimizer.param_groups[0]["lr"]
        recordings.append(graph.lr)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    graphed = train.GraphedStep(step, optimizer)
    plans = torch.arange(40.0).view(10, 2, 2)
    results = []
    for function in (step, graphed):
        weight = torch.zeros(2)
        for t, plan in enumerate(plans):
            optimizer.param_groups[0]["lr"] = 0.2 ** (t // 4)
            function(plan.clone())
        results.append(weight)
    assert torch.equal(*results)
    assert recordings == [1.0, 0.2, 0.2**2]  # one a learning rate, after three plain steps


class InAnotherOrder(torch.nn.Module):
    """The same network in NCHW: other kernels, so the same sums in another order."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.contiguous_format)

    def forward(self, images):
        return self.network(images.contiguous())


# One rounding flips some of millions of ReLUs, and these change a gradient by a thousandth. With a
# smooth activation in their place a rounding stays one, and any real difference stands out.
@pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA")  # asked late: see FORKS
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(
    "optimizer, lr", [("sgd", 0.001), ("adam", 1e-4), ("adagrad", 1e-4), ("asgd", 0.002)]
)
def test_fast_path_equals_the_plain_one_on_cuda(optimizer, lr, activation, monkeypatch, tmp_path):
    monkeypatch.setattr(F, "relu", getattr(F, activation))
    torch.compiler.reset()  # what was compiled for the other activation
    flags = f"--optimizer {optimizer} --lr {lr} --step 90 --precision fp32".split()
    weights = {}
    for way in ("plain", "plain again", "another order", "fast"):
        args = train.parse_args(flags)
        device = train.open_device(args)
        training, test = data.load("synthetic", device)
        run = train.Run(train.settings(args), device)
        if way == "another order":
            run.model = InAnotherOrder(run.model)
        step = train.make_step(run, training, compiled=way == "fast")
        for t in range(200):  # two decays, and a short last batch every eighth time
            if t % 50 == 49:
                train.evaluate(run.model, test, "fp32")
            if t == 120 and way == "fast":  # interrupted, and gone on with
                run.save(tmp_path / "checkpoint")
                run = train.Run(run.config, device)
                run.resume(tmp_path / "checkpoint")
                step = train.make_step(run, training, compiled=True)
            plan = data.epoch_plan(training, 0, t // 8)
            run.optimizer.param_groups[0]["lr"] = train.decayed_lr(run.config, t)
            step(plan[:, t % 8 * 128 :][:, :128])
        weights[way] = torch.cat([p.flatten() for p in run.model.parameters()])
    norm = weights["plain"].norm()
    apart = {way: ((w - weights["plain"]).norm() / norm).item() for way, w in weights.items()}
    print(optimizer, activation, *(f"{way} {value:.1e}" for way, value in apart.items()))
    assert apart["fast"] < 5 * max(apart["plain again"], apart["another order"])
    assert activation == "relu" or apart["fast"] < 1e-3  # a decay left out: 3e-3 to 2e-2

"""The report's Tables 4-7 and Figures 4-8 from the logs of train.py, beside its own figures.

    python report.py                        prints the tables of ./logs as Markdown
    python report.py --readme README.md     also rewrites them between the markers there
    python report.py --figures figures      also draws figure4.png ... (needs matplotlib)

Only complete runs of one set of settings enter the tables and figures: the report's, or if
no run has those, the settings of most runs. Every other log is named with the reason.
"""

import argparse
import csv
import io
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

HEADER = ("optimizer,lr0,bs,step,gamma,momentum,betas,wd,iters,seed,data,precision,device,torch,"
          "iteration,lr,loss,test_acc,seconds").split(",")

# Table 3, Adam's betas from the author's code, and PyTorch's default arithmetic on CUDA.
REPORT = {"gamma": "0.2", "momentum": "0.9", "betas": "0.7 0.7", "wd": "0.0001",
          "iters": "32000", "data": "cifar10", "precision": "tf32"}

EXTENDED = ("sgd", 0.3, 128, 10000, 64000)  # the one row with iterations of its own

# table: (what varies, what does not, first column, rows);
# row: (label, (optimizer, lr, batch size, decay step), the report's accuracy in percent)
TABLES = {
    4: ("on different optimizers", "Learning rate 0.1, batch size 64, decay step 5,000",
        "Optimizer", [
        ("Adam", ("adam", 0.1, 64, 5000), 60.47),
        ("SGD", ("sgd", 0.1, 64, 5000), 88.51),
        ("Adagrad", ("adagrad", 0.1, 64, 5000), 84.90),
        ("ASGD", ("asgd", 0.1, 64, 5000), 88.95)]),
    5: ("at different learning rates", "SGD, batch size 64, decay step 5,000", "Learning rate", [
        ("0.1", ("sgd", 0.1, 64, 5000), 88.51),
        ("0.3", ("sgd", 0.3, 64, 5000), 89.31),
        ("0.5", ("sgd", 0.5, 64, 5000), 87.70)]),
    6: ("at different batch sizes", "SGD, learning rate 0.3, decay step 5,000", "Batch size", [
        ("32", ("sgd", 0.3, 32, 5000), 84.96),
        ("64", ("sgd", 0.3, 64, 5000), 89.31),
        ("128", ("sgd", 0.3, 128, 5000), 91.07),
        ("256", ("sgd", 0.3, 256, 5000), 90.40)]),
    7: ("at different decay steps", "SGD, learning rate 0.3, batch size 128", "Decay step", [
        ("4,000", ("sgd", 0.3, 128, 4000), 89.83),
        ("5,000", ("sgd", 0.3, 128, 5000), 91.07),
        ("8,000", ("sgd", 0.3, 128, 8000), 92.65),
        ("10,000", ("sgd", 0.3, 128, 10000), 92.14)]),
    "extended": ("after 64,000 iterations",
                 "SGD, learning rate 0.3, batch size 128, decay step 10,000",
                 "Iterations", [("64,000", EXTENDED, 93.18)]),
}

COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]  # Okabe-Ito
MARKERS = ["o", "s", "^", "D"]


# ---- logs ----------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The rows of one run's CSV as dicts of text.

    Raises OSError, or ValueError that says where the file is damaged.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError("damaged: not CSV in UTF-8") from None
    if not rows or rows[0] != HEADER:
        raise ValueError("damaged: line 1 is not the header that train.py writes")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(HEADER) or "\0" in "".join(row):
            raise ValueError(f"damaged: line {number} is not {len(HEADER)} values")
        if row[:12] != rows[1][:12]:  # up to precision; a restart may change device and torch
            raise ValueError(f"damaged: line {number} has other settings than line 2")
    if not text.endswith("\n"):
        raise ValueError("damaged: the last line is cut short")
    return [dict(zip(HEADER, row)) for row in rows[1:]]


def read_log(path: Path) -> dict:
    """Read one complete run's CSV.

    Returns a dict: the settings as written, `key` and `seed`, sets `device` and `torch`, and one
    entry a row of the log in the lists `iteration`, `loss` (cross-entropy) and `test_acc`
    (percent, None where not evaluated). Raises OSError, or ValueError that says why the log
    cannot be used: damaged, diverged or incomplete.
    """
    rows = read_rows(path)
    if not rows:
        raise ValueError("incomplete: no iteration logged")
    run = {name: rows[0][name] for name in REPORT} | {"name": path.name}
    run |= {name: {row[name] for row in rows} for name in ("device", "torch")}
    try:
        first = rows[0]
        key = (first["optimizer"], float(first["lr0"]), int(first["bs"]), int(first["step"]))
        iters, run["seed"] = int(first["iters"]), int(first["seed"])
        for name, kind in (("iteration", int), ("lr", float), ("loss", float), ("seconds", float)):
            run[name] = [kind(row[name]) for row in rows]
        run["test_acc"] = [float(row["test_acc"]) if row["test_acc"] else None for row in rows]
    except ValueError as error:
        raise ValueError(f"damaged: {error}") from None

    for before, after in pairwise([0] + run["iteration"]):
        if after <= before:
            raise ValueError(f"damaged: iteration {after} follows {before}")
    for iteration, loss, acc in zip(run["iteration"], run["loss"], run["test_acc"]):
        if not math.isfinite(loss):
            raise ValueError(f"diverged at iteration {iteration}: loss {loss}")
        if acc is not None and not 0 <= acc <= 100:
            raise ValueError(f"damaged: test_acc {acc} at iteration {iteration}")
    if run["iteration"][-1] != iters or run["test_acc"][-1] is None:
        raise ValueError(f"incomplete: {run['iteration'][-1]} of {iters} iterations")

    run["key"] = key
    if key == EXTENDED[:4] and iters == EXTENDED[4]:
        run["key"], run["iters"] = EXTENDED, ""
    return run


def differences(run: dict, settings: dict) -> str:
    """A run's settings that are not these, as text; what a run leaves empty it does not use."""
    return ", ".join(f"{name} {run[name]}" for name in settings
                     if run[name] not in ("", settings[name]))


def choose_settings(runs: list[dict]) -> dict:
    """The settings to show: the report's, or if no run has them, those of most runs."""
    if any(not differences(run, REPORT) for run in runs):
        return REPORT

    def merit(settings):  # of equally many runs, the nearer to the report
        return (sum(not differences(run, settings) for run in runs),
                sum(settings[name] == REPORT[name] for name in REPORT))

    candidates = [{name: run[name] or REPORT[name] for name in REPORT} for run in runs]
    return max(candidates, default=REPORT, key=merit)


def collect(folder: str) -> tuple[dict, dict, list]:
    """Sort the logs of a folder into rows of the tables.

    Returns the settings shown, a dict from a row's key to its runs (one a seed), and a list of
    (file name, why it was left out).
    """
    runs, left_out = [], []
    for path in sorted(Path(folder).glob("*.csv"), key=lambda path: path.stem):
        try:
            runs.append(read_log(path))
        except OSError as error:
            left_out.append((path.name, f"cannot be read: {error.strerror}"))
        except ValueError as error:
            left_out.append((path.name, str(error)))
    rows = {key: [] for *_, entries in TABLES.values() for _, key, _ in entries}
    settings = choose_settings([run for run in runs if run["key"] in rows])
    for run in runs:
        twins = [other for other in rows.get(run["key"], []) if other["seed"] == run["seed"]]
        if run["key"] not in rows:
            left_out.append((run["name"], "not a row of the tables"))
        elif differences(run, settings):
            left_out.append((run["name"], "other settings: " + differences(run, settings)))
        elif twins:
            left_out.append((run["name"], f"same settings and seed as {twins[0]['name']}"))
        else:
            rows[run["key"]].append(run)
    return settings, rows, left_out


def accuracy(runs: list[dict]) -> tuple[float | None, str]:
    """Final test accuracy in percent over seeds: mean, and text '92.65 ± 0.12'; None, '–'."""
    finals = [run["test_acc"][-1] for run in runs]
    if not finals:
        return None, "–"
    deviation = f" ± {stdev(finals):.2f}" if len(finals) > 1 else ""
    return fmean(finals), f"{fmean(finals):.2f}{deviation}"


# ---- tables --------------------------------------------------------------------------------------


def ranking(labels: list[str], accuracies: list[float]) -> str:
    """'ASGD > SGD = Adam': best first, '=' where two print the same."""
    order = sorted(zip(labels, accuracies), key=lambda pair: -round(pair[1], 2))
    text = order[0][0]
    for (_, better), (label, worse) in pairwise(order):
        text += f" {'=' if round(better, 2) == round(worse, 2) else '>'} {label}"
    return text


def table(number: int | str, rows: dict) -> list[str]:
    """Markdown lines of one of Tables 4-7 or the extended run, and whether its ranking holds."""
    what, fixed, column, entries = TABLES[number]
    title = "Extended run" if number == "extended" else f"Table {number}"
    lines = [f"### {title}: final accuracy {what}", "", f"{fixed}.", "",
             f"| {column} | Report, % | Ours, % | n | Difference |", "|---|--:|--:|--:|--:|"]
    means = []
    for label, key, reported in entries:
        mean, text = accuracy(rows[key])
        difference = "–" if mean is None else f"{round(mean, 2) - reported:+.2f}"
        lines.append(f"| {label} | {reported:.2f} | {text} | {len(rows[key])} | {difference} |")
        means.append(mean)
    if number == "extended":
        return lines + [""]
    labels = [label for label, *_ in entries]
    theirs = ranking(labels, [reported for *_, reported in entries])
    if None in means:
        verdict = "ours is incomplete"
    elif ranking(labels, means) == theirs:
        verdict = "it holds"
    else:
        verdict = f"it does not hold, ours is {ranking(labels, means)}"
    return lines + ["", f"Ranking of the report: {theirs}; {verdict}.", ""]


def markdown(settings: dict, rows: dict, left_out: list) -> str:
    """All tables as Markdown, with where the runs come from and which logs were left out."""
    runs = [run for seeds in rows.values() for run in seeds]
    lines = ["Final accuracy on the test images in percent: the report's one run, and ours as "
             "mean ± sample standard deviation over n seeds, with the difference in points.", ""]
    if runs:
        devices = ", ".join(sorted(set().union(*(run["device"] for run in runs))))
        versions = ", ".join(sorted(set().union(*(run["torch"] for run in runs))))
        seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
        lines += [f"Runs: {len(runs)}, on {devices} with torch {versions}, "
                  f"precision {settings['precision']}, seeds {seeds}.", ""]
    if settings != REPORT:
        lines += [f"**Not the report's settings: {differences(settings, REPORT)}.**", ""]
    for number in TABLES:
        lines += table(number, rows)
    if left_out:
        lines += ["Logs left out:", ""] + [f"- `{name}`: {why}" for name, why in left_out]
    return "\n".join(lines).rstrip()


def rewrite_readme(path: str, text: str) -> None:
    """Put text between the markers of a Markdown file; exits when it has none."""
    path = Path(path)
    try:
        readme = path.read_bytes().decode("utf-8")
        before, rest = readme.split("<!-- tables -->")
        _, after = rest.split("<!-- /tables -->")
    except ValueError:
        sys.exit(f"report.py: {path} needs one <!-- tables --> and one <!-- /tables --> after it")
    new = path.with_name(path.name + ".tmp")
    new.write_bytes(f"{before}<!-- tables -->\n{text}\n<!-- /tables -->{after}".encode())
    os.replace(new, path)


# ---- figures -------------------------------------------------------------------------------------


def curve(runs: list[dict], column: str) -> tuple[list, list, list, list]:
    """Iterations that all seeds logged, and lowest, mean and highest value of a column there."""
    seeds = [dict(zip(run["iteration"], run[column])) for run in runs]
    x = [i for i in seeds[0] if all(seed.get(i) is not None for seed in seeds)]
    values = [[seed[i] for seed in seeds] for i in x]
    return x, [min(v) for v in values], [fmean(v) for v in values], [max(v) for v in values]


def draw_panel(ax, entries: list, rows: dict, column: str) -> None:
    """Draw one line a row of a table, with a band over its seeds if there are several."""
    for (label, key, _), colour, marker in zip(entries, COLOURS, MARKERS):
        if not rows[key]:
            continue
        x, low, mean, high = curve(rows[key], column)
        decays = [n for n, i in enumerate(x) if i % key[3] == 0 or i == x[-1]]
        ax.plot(x, mean, color=colour, marker=marker, markevery=decays, markersize=5,
                linewidth=1.3, label=f"{label}: {accuracy(rows[key])[1]} %")
        if len(rows[key]) > 1:
            ax.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=11)


def scale_loss(ax) -> None:
    """Log scale where the loss falls far; a wild line leaves the panel, the others stay legible."""
    tops = [max(line.get_ydata()) for line in ax.lines]
    top = min(max(tops), max(10.0, min(tops)))  # ten classes start at ln 10 = 2.3
    bottom = min(min(line.get_ydata()) for line in ax.lines)
    if 0 < 5 * bottom < top:
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.set_ylim(bottom / 1.2, top * 1.1)
    else:
        ax.set_ylim(bottom - 0.05 * top, top * 1.05)


def draw_figure(number: int, settings: dict, rows: dict):
    """Draw the report's Figure 4, 5, 6, 7 or 8 from what collect() returned.

    Figures 4-7 show the training loss of the rows of Tables 4-7, Figure 8 loss and test
    accuracy of the extended run and of the best row of Table 7. Returns a matplotlib Figure, or
    None if there is no run to draw. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    if number == 8:
        title, fixed, column = "best performance", "SGD, learning rate 0.3, batch size 128", "Run"
        label, *best = max(TABLES[7][3], key=lambda entry: accuracy(rows[entry[1]])[0] or 0)
        entries = [("64,000 iterations, decay step 10,000", EXTENDED, 93.18),
                   (f"{int(settings['iters']):,} iterations, decay step {label}", *best)]
    else:
        what, fixed, column, entries = TABLES[number]
        title = f"training loss {what}"
    if not any(rows[key] for _, key, _ in entries):
        return None

    panels = ["loss", "test_acc"] if number == 8 else ["loss"]
    figure = Figure(figsize=(8, 2.2 + 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels):
        draw_panel(ax, entries, rows, panel)
        ax.set_ylabel({"loss": "training loss", "test_acc": "test accuracy, %"}[panel], size=12)
    scale_loss(axes[0])
    if settings != REPORT:
        fixed += "\n" + differences(settings, REPORT)
    axes[0].set_title(f"Figure {number}: {title}\n{fixed}", loc="left", size=13)
    note = "markers: learning-rate decays and end"
    if axes[0].collections:
        note += "; band: min to max of seeds"
    axes[-1].set_xlabel(f"iteration ({note})", size=12)
    figure.legend(*axes[0].get_legend_handles_labels(), title=f"{column}: final accuracy",
                  ncols=1 if number == 8 else 2, loc="outside lower center", frameon=False,
                  fontsize=11, title_fontsize=11)
    return figure


# ---- command line --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (python report.py --help)\n")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="report.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--logs", default="logs", help="folder with train.py's CSV files")
    parser.add_argument("--readme", help="Markdown file whose tables to rewrite")
    parser.add_argument("--figures", help="folder for figure4.png ... figure8.png")
    args = parser.parse_args(argv)

    try:
        settings, rows, left_out = collect(args.logs)
        text = markdown(settings, rows, left_out)
        print(text)
        if args.readme:
            rewrite_readme(args.readme, text)
        if args.figures:
            Path(args.figures).mkdir(parents=True, exist_ok=True)
            for number in range(4, 9):
                figure = draw_figure(number, settings, rows)
                if figure:
                    figure.savefig(Path(args.figures) / f"figure{number}.png", dpi=150)
                else:
                    print(f"Figure {number} is not drawn: none of its runs is there",
                          file=sys.stderr)
    except ImportError:
        sys.exit("report.py: the figures need matplotlib: pip install matplotlib")
    except OSError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()

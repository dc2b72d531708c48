"""The report's Tables 4-7 and Figures 4-8 from the logs of train.py, beside its own numbers.

    python report.py                        prints the tables of ./logs as Markdown
    python report.py --readme README.md     also rewrites them between the markers there
    python report.py --figures figures      also draws figure4.png ... (needs matplotlib)

Shown are complete runs, at full length and at 1/N of it (run_all.sh --shorten N), with the default
settings or, where no run has them, those of most runs. Every other log is named with the reason.
"""

import argparse
import csv
import math
import os
import sys
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from statistics import fmean, stdev, variance

HERE = Path(__file__).resolve().parent
# What no row sets: Table 3, Adam's betas from the author's code, PyTorch's arithmetic on CUDA.
REPORT = {"gamma": "0.2", "momentum": "0.9", "betas": "0.7 0.7", "wd": "0.0001",
          "data": "cifar10", "precision": "tf32"}  # fmt: skip
TABLES = {  # what varies, and what does not
    "4": ("Optimizer", "Learning rate 0.1, batch size 64, decay step 5,000"),
    "5": ("Learning rate", "SGD, batch size 64, decay step 5,000"),
    "6": ("Batch size", "SGD, learning rate 0.3, decay step 5,000"),
    "7": ("Decay step", "SGD, learning rate 0.3, batch size 128"),
    "extended": ("Iterations", "SGD, learning rate 0.3, batch size 128, decay step 10,000"),
}
COLOURS, MARKERS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"], "os^D"  # Okabe-Ito
STYLE = {"font.size": 11, "lines.linewidth": 1.3, "lines.markersize": 5, "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
         "axes.grid": True, "axes.grid.which": "both", "grid.color": "0.9"}  # fmt: skip


def table_rows(table: str) -> list[tuple[str, float, tuple]]:
    """A table's rows in run_all.sh: label, the report's accuracy in percent, and key: (optimizer,
    learning rate, batch size, decay step, iterations). Beside the extended run stands its half."""
    rows = []
    for line in (HERE / "run_all.sh").read_text(encoding="utf-8").splitlines():
        half = table == "extended" and line.startswith("7 ") and " 10000 " in line
        if line.startswith(f"{table} ") or half:
            _, reported, name, lr, *numbers = line.split()
            key = (name, float(lr), *map(int, numbers))
            name = {"adam": "Adam", "adagrad": "Adagrad"}.get(name, name.upper())
            label = [name, lr, *(f"{number:,}" for number in key[2:])][list(TABLES).index(table)]
            rows.append((label, float(reported), key))
    return rows


# ---- logs ----------------------------------------------------------------------------------------


def complete_run(rows: list[dict]) -> dict:
    """A run from the rows of its log: the last row, `key` as in table_rows, `loss` {end of a
    hundred iterations: mean of its rows}, `test_acc` {iteration: percent}, `accuracy`, the last of
    them, and `settings`, those not the report's, as text. Raises ValueError or LookupError."""
    run, ends = rows[-1], [int(row["iteration"]) for row in rows]
    fixed = run.keys() - {"device", "torch", "iteration", "lr", "loss", "test_acc", "seconds"}
    if ends != sorted(set(ends)) or any(row[name] != run[name] for row in rows for name in fixed):
        raise ValueError("damaged: its rows do not belong together")
    if not all(math.isfinite(float(row["loss"])) for row in rows):
        raise ValueError("diverged: its loss is not finite")
    if ends[-1] != int(run["iters"]) or not run["test_acc"]:
        raise ValueError(f"incomplete: {ends[-1]} of {run['iters']} iterations")
    numbers = [int(run[name]) for name in ("bs", "step", "iters")]
    hundreds = groupby(rows, lambda row: math.ceil(int(row["iteration"]) / 100) * 100)
    evaluated = [row for row in rows if row["test_acc"]]
    return run | {
        "key": (run["optimizer"], float(run["lr0"]), *numbers),
        "loss": {end: fmean(float(row["loss"]) for row in some) for end, some in hundreds},
        "test_acc": {int(row["iteration"]): float(row["test_acc"]) for row in evaluated},
        "accuracy": float(run["test_acc"]),
        "settings": ", ".join(f"{k} {run[k]}" for k in REPORT if run[k] not in ("", REPORT[k])),
    }


@cache
def read_author() -> list[dict]:
    """The 15 published logs of the report's author, each as complete_run has it."""
    with open(HERE / "results" / "author.csv", newline="", encoding="utf-8") as file:
        rows = (REPORT | row for row in csv.DictReader(file))
        return [complete_run(list(group)) for _, group in groupby(rows, lambda row: row["run"])]


def collect(folder: str | Path) -> tuple[str, dict, list]:
    """Sort a folder's logs into the rows. Returns the settings shown that are not the defaults, as
    text; {(key, N): runs at 1/N of that row's length, one a seed}; [(file name, why left out)]."""
    rows = [key for name in TABLES for *_, key in table_rows(name)]
    places = {  # what run_all.sh --shorten n makes of a row; where two agree, the longer counts
        (*same, step // n, iters // n): ((*same, step, iters), n)
        for n in range(1000, 0, -1) if 1000 % n == 0 for *same, step, iters in rows}  # fmt: skip
    found, runs, left_out = {}, {}, []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix != ".csv" or path.name == "author.csv":
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):
                raise ValueError("damaged: empty, or its last line is cut short")
            run = complete_run(list(csv.DictReader(text.splitlines(), restval="")))
            run |= {"file": path.name, "by": f"{run['device']}, torch {run['torch']}"}
            if run["key"] not in places:
                raise ValueError("not a row of the tables")
            twin = found.setdefault((run["key"], run["settings"], run["seed"]), run)
            if twin is not run:
                raise ValueError(f"same settings and seed as {twin['file']}")
        except (OSError, ValueError) as error:
            left_out.append((path.name, str(error)))
        except (LookupError, csv.Error) as error:
            left_out.append((path.name, f"damaged: {error!r}"))
    settings = [text for _, text, _ in found]
    shown = "" if "" in settings else max(settings, key=settings.count, default="")
    for (key, text, _), run in found.items():
        if text == shown:
            runs.setdefault(places[key], []).append(run)
        else:
            left_out.append((run["file"], f"other settings: {text}"))
    return shown, runs, left_out


# ---- tables --------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with a header row; a column without any value is left out."""
    columns = [column for column in zip(*rows) if any(column[1:])]
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]
    return [header, "|---" + "|--:" * (len(columns) - 1) + "|", *lines]


def accuracy(runs: list[dict]) -> str:
    """Final test accuracy in percent over seeds, '92.65 ± 0.12 (n = 3)'; '' without a run."""
    finals = [run["accuracy"] for run in runs]
    deviation = f" ± {stdev(finals):.2f}" if len(finals) > 1 else ""
    return f"{fmean(finals):.2f}{deviation} (n = {len(finals)})" if finals else ""


def t_quantile(dof: float) -> float:
    """The absolute value that Student's t stays under in 95 % of cases, for any dof >= 1."""
    # With t = sqrt(dof) * tan(angle), the density of the angle is cos(angle) ** (dof - 1).
    width = math.pi / 2 / 10_000
    areas = list(accumulate(math.cos((i + 0.5) * width) ** (dof - 1) for i in range(10_000)))
    i = sum(area < 0.95 * areas[-1] for area in areas)
    angle = width * (i + (0.95 * areas[-1] - areas[i - 1]) / (areas[i] - areas[i - 1]))
    return math.sqrt(dof) * math.tan(angle)


def welch(a: list[float], b: list[float]) -> float:
    """Half of Welch's 95 % interval of mean(a) - mean(b); infinite where there is none."""
    if min(len(a), len(b)) < 2 or variance(a) == variance(b) == 0:
        return math.inf
    squares = [variance(a) / len(a), variance(b) / len(b)]  # of the means' standard errors
    dof = sum(squares) ** 2 / (squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1))
    return t_quantile(dof) * math.sqrt(sum(squares))


def verdicts(runs: dict) -> list[str]:
    """Lines of a table: each conclusion of the report, and what our full-length runs say of it."""
    rows = [["The report's conclusion", "Its gap", "Ours, 95 % interval", "n of each", "Verdict"]]
    for name, (heading, _) in TABLES.items():
        ranked = sorted(table_rows(name), key=lambda row: -row[1])
        for (better, high, key), (worse, low, other) in pairwise(ranked):
            a, b = ([run["accuracy"] for run in runs.get((k, 1), [])] for k in (key, other))
            gap, half = fmean(a or [0]) - fmean(b or [0]), welch(a, b)
            ours = f"{gap:+.2f}" if a and b else ""
            ours += f" ({gap - half:+.2f} to {gap + half:+.2f})" if half < math.inf else ""
            word = "supported" if gap > half else "contradicted" if gap < -half else "undecided"
            n = f"{len(a)}, {len(b)}" if a or b else ""
            rows.append([f"{heading}: {better} > {worse}", f"{high - low:+.2f}", ours, n, word])
    return table(rows)


def author_noise() -> str:
    """Two sentences on the noise between runs in the author's own logs (Table 7)."""
    runs = [run for run in read_author() if run["key"][:3] == ("sgd", 0.3, 128)]
    start, last = ([fmean(run["loss"][i] for i in range(end - 900, end + 1, 100)) for run in runs]
                   for end in (4000, 32000))  # fmt: skip
    best, *twice = [loss for step in ("8000", "10000") for run, loss in zip(runs, last)
                    if run["step"] == step and not run["settings"]]  # fmt: skip
    return f"""\
The author's logs hold {len(runs)} runs (SGD, learning rate 0.3, batch size 128) that are the same
training until their first decay; by chance alone, their mean loss over iterations 3,001 to 4,000
ranges from {min(start):.2f} to {max(start):.2f}. Decay step 10,000 was trained twice to iteration
32,000 (once in the extended run): the mean loss of the last 1,000 iterations is {max(twice):.4f}
and {min(twice):.4f}, on either side of the {best:.4f} of decay step 8,000, the report's best."""


def markdown(shown: str, runs: dict, left_out: list) -> str:
    """The page, from what collect returned: tables, verdicts, and which logs are left out."""
    lengths = sorted({n for _, n in runs})
    ours = ["Ours, %" if n == 1 else f"Ours at 1/{n}, %" for n in lengths]
    by = sorted({run["by"] for seeds in runs.values() for run in seeds})
    lines = ["Final accuracy on the 10,000 test images in percent: the report's one run, and ours,",
             "mean ± sample standard deviation of n seeds. At 1/N, ours has 1/N of the iterations",
             f"and of the decay step. Ours: {'; '.join(by) or 'no complete run'}."]  # fmt: skip
    if shown:
        lines += ["", f"**Our settings that are not the defaults: {shown}.**"]
    for name, (heading, fixed) in TABLES.items():
        rows = [[heading, "Report, %", *ours]]
        for label, reported, key in table_rows(name):
            cells = [accuracy(runs.get((key, n), [])) for n in lengths]
            rows.append([label, f"{reported:.2f}", *cells])
        title = "Extended run" if name == "extended" else f"Table {name}"
        lines += ["", f"### {title}: {heading.lower()}", "", f"{fixed}.", "", *table(rows)]
    lines += ["", "### The report's conclusions", "", *verdicts(runs), "", author_noise()]
    if left_out:
        lines += ["", "Logs left out:", "", *(f"- `{name}`: {why}" for name, why in left_out)]
    return "\n".join(lines)


def rewrite_readme(path: Path, text: str) -> None:
    """Put text between the markers of a Markdown file; exits if they are not there once each."""
    try:
        before, rest = path.read_bytes().decode().split("<!-- tables -->")
        _, after = rest.split("<!-- /tables -->")
    except ValueError:
        sys.exit(f"report.py: {path} needs one <!-- tables --> and one <!-- /tables --> after it")
    new = path.with_name(path.name + ".tmp")
    new.write_bytes(f"{before}<!-- tables -->\n{text}\n<!-- /tables -->{after}".encode())
    new.replace(path)


# ---- figures -------------------------------------------------------------------------------------


def draw_panel(ax, rows: list, runs: dict, column: str, n: int) -> None:
    """Draw the author's logs dashed and our runs at 1/n solid, for n > 1 until their first decay:
    the mean over seeds, and a band from the lowest to the highest."""
    author = {run["key"]: run for run in read_author() if not run["settings"]}
    for (label, reported, key), color, marker in zip(rows, COLOURS, MARKERS):
        step, end = key[3], key[4] if n == 1 else key[3] // n
        ours = runs.get((key, n), [])
        label = f"{label}: {reported:.2f}" + (f", ours {accuracy(ours)}" if ours else "")
        dashed = {"linestyle": (0, (4, 1.5)), "markerfacecolor": "white", "label": label}
        for lines, style in (([author[key][column]], dashed), ([run[column] for run in ours], {})):
            x = [i for i in sorted(set().union(*lines)) if i <= end and all(i in y for y in lines)]
            y = [[line[i] for line in lines] for i in x]
            marks = [at for at, i in enumerate(x) if i % step == 0 or i == x[-1]]
            ax.plot(x, [*map(fmean, y)], color=color, marker=marker, markevery=marks, **style)
            ax.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.25, linewidth=0)
    ax.set(xlabel="iteration (markers: learning-rate decays and end)", xlim=0)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title(f"Ours at 1/{n}, until their first decay" if n > 1 else "")
    ax.set_ylabel("training loss" if column == "loss" else "test accuracy, %")
    if column == "loss" and n == 1:
        ax.set_yscale("log", subs=(2, 5))
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")


def draw_figure(number: int, shown: str, runs: dict):
    """The report's Figure 4, 5, 6, 7 or 8 as a matplotlib Figure, from what collect returned.
    Figure 8 is the extended run and the best of Table 7, with the test accuracy of ours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name, (heading, fixed) = list(TABLES.items())[number - 4]
    title, rows = f"Figure {number}: training loss by {heading.lower()}", table_rows(name)
    if number == 8:
        title, fixed = "Figure 8: best performance", "SGD, learning rate 0.3, batch size 128"
        rows.insert(0, max(table_rows("7"), key=lambda row: row[1]))
        rows = [(f"{k[4]:,} iterations, step {k[3]:,}", best, k) for _, best, k in rows]
    lengths = sorted({n for *_, key in rows for k, n in runs if k == key and key[3] // n >= 100})
    panels = [("loss", 1)] + [("test_acc", 1)] * (number == 8 and 1 in lengths)
    panels += [("loss", n) for n in lengths if n > 1]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 2.2 + 2.8 * len(panels)), dpi=150, layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for ax, (column, n) in zip(axes, panels):
            draw_panel(ax, rows, runs, column, n)
        axes[0].set_title(f"{title}\n{fixed}" + f"\n{shown}" * bool(shown))
        figure.legend(handles=axes[0].lines[::2], loc="outside lower left", alignment="left",
                      title="Final accuracy, % (dashed: author, solid: ours)")  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"report.py: {message} (see --help)\n")
    parser.add_argument("--logs", default="logs", help="folder with train.py's CSV files (./logs)")
    parser.add_argument("--readme", type=Path, help="Markdown file whose tables to rewrite")
    parser.add_argument("--figures", type=Path, help="folder for figure4.png ... figure8.png")
    args = parser.parse_args()
    if not Path(args.logs).is_dir():
        sys.exit(f"report.py: no folder {args.logs}: train first, or try --logs results")
    try:
        shown, runs, left_out = collect(args.logs)
        text = markdown(shown, runs, left_out)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has read enough; the files are still written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.readme:
            rewrite_readme(args.readme, text)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            for number in range(4, 9):
                draw_figure(number, shown, runs).savefig(args.figures / f"figure{number}.png")
    except ImportError:
        sys.exit("report.py: the figures need matplotlib: pip install matplotlib")
    except OSError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()

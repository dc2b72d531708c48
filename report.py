"""The report's Tables 4-7 and Figures 4-8 from the logs of train.py, beside its own numbers.

    python report.py                        prints the tables of ./logs as Markdown
    python report.py --readme README.md     also rewrites them between the markers there
    python report.py --figures figures      also draws figure4.png ... (needs matplotlib)

Shown are complete runs, at full length and at 1/N of it (run_all.sh --shorten N), with the report's
settings or, where no run has them, those of most runs. Every other log is named with the reason.
The rows are read from run_all.sh, the logs of the report's author from results/author.csv.
"""

import argparse
import csv
import math
import os
import sys
from bisect import bisect
from collections import Counter
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
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "0.9", "axes.labelsize": 12, "axes.titlesize": 13,
         "axes.titlelocation": "left", "xtick.labelsize": 11, "ytick.labelsize": 11,
         "legend.fontsize": 11, "legend.title_fontsize": 11, "legend.frameon": False,
         "lines.linewidth": 1.3, "lines.markersize": 5}  # fmt: skip


def table_rows(table: str) -> list[tuple[str, float, tuple]]:
    """A table's rows in run_all.sh: label, the report's accuracy in percent, and key, which is
    (optimizer, learning rate, batch size, decay step, iterations)."""
    rows = []
    for line in (HERE / "run_all.sh").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{table} "):
            _, reported, name, lr, *numbers = line.split()
            key = (name, float(lr), *map(int, numbers))
            name = {"adam": "Adam", "adagrad": "Adagrad"}.get(name, name.upper())
            label = [name, lr, *(f"{number:,}" for number in key[2:])][list(TABLES).index(table)]
            rows.append((label, float(reported), key))
    return rows


# ---- logs ----------------------------------------------------------------------------------------


def complete_run(rows: list[dict]) -> dict:
    """A run: the last row of its log, and `key` as in table_rows, `loss` {iteration: mean over 100,
    as in the author's logs}, `test_acc` {iteration: percent}, `accuracy` (the last), `hours`, and
    `settings`, those that are not the report's. ValueError: the run is not complete."""
    run = rows[-1] | {"loss": {}, "test_acc": {}}
    numbers = [int(run[name]) for name in ("bs", "step", "iters")]
    fixed = run.keys() - {"device", "torch", "iteration", "lr", "loss", "test_acc", "seconds"}
    start = end = total = 0
    for row in rows:
        before, end, loss = end, int(row["iteration"]), float(row["loss"])
        if end <= before or any(row[name] != run[name] for name in fixed):
            raise ValueError(f"damaged: the row of iteration {end} does not belong there")
        if not math.isfinite(loss):
            raise ValueError(f"diverged at iteration {end}: loss {loss}")
        total += (end - before) * loss
        if end % 100 == 0:
            run["loss"][end] = total / (end - start)
            start, total = end, 0
        if row["test_acc"]:
            run["test_acc"][end] = float(row["test_acc"])
    if end != numbers[-1] or end not in run["test_acc"]:
        raise ValueError(f"incomplete: {end} of {numbers[-1]} iterations")
    other = [f"{k} {run[k]}" for k in REPORT if run.get(k, "") not in ("", REPORT[k])]
    return run | {"key": (run["optimizer"], float(run["lr0"]), *numbers),
                  "accuracy": run["test_acc"][end], "settings": ", ".join(other),
                  "hours": float(run.get("seconds", 0)) / 3600}  # fmt: skip


def read_log(path: Path) -> dict:
    """The complete_run of one CSV of train.py. Raises OSError, or ValueError that says why not."""
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError("damaged: empty, or the last line is cut short")
    try:
        return complete_run(list(csv.DictReader(text.splitlines()))) | {"file": path.name}
    except (LookupError, TypeError, csv.Error) as error:
        raise ValueError(f"damaged: {error!r}") from None


def read_author() -> list[dict]:
    """The 15 published logs of the report's author, each as complete_run has it."""
    with open(HERE / "results" / "author.csv", newline="", encoding="utf-8") as file:
        groups = groupby(csv.DictReader(file), lambda row: row["run"])
        return [complete_run(list(rows)) for _, rows in groups]


def collect(folder: str | Path) -> tuple[str, dict, list]:
    """Sort a folder's logs into the rows. Returns the settings shown that are not the report's, as
    text; {(key, N): runs at 1/N of that row's length, one a seed}; and a list of (file name, why it
    was left out)."""
    keys = {key for name in TABLES for *_, key in table_rows(name)}
    found, runs, left_out = [], {}, []
    for path in sorted(Path(folder).iterdir(), key=lambda path: path.stem):
        try:
            if path.suffix == ".csv" and path.name != "author.csv":
                found.append(read_log(path))
        except (OSError, ValueError) as error:
            left_out.append((path.name, getattr(error, "strerror", str(error))))
    for run in found:
        *same, step, iters = run["key"]
        places = [((*same, step * n, iters * n), n) for n in range(1, 1001)]
        run["place"] = next((place for place in places if place[0] in keys), None)
    counts = Counter(run["settings"] for run in found if run["place"])
    shown = "" if "" in counts or not counts else counts.most_common(1)[0][0]
    for run in found:
        seeds = runs.get(run["place"], [])
        twins = [other["file"] for other in seeds if other["seed"] == run["seed"]]
        if not run["place"]:
            left_out.append((run["file"], "not a row of the tables"))
        elif run["settings"] != shown:
            left_out.append((run["file"], f"other settings: {run['settings']}"))
        elif twins:
            left_out.append((run["file"], f"same settings and seed as {twins[0]}"))
        else:
            runs[run["place"]] = [*seeds, run]
    return shown, runs, left_out


def accuracy(runs: list[dict]) -> tuple[float | None, str]:
    """Final test accuracy in percent over seeds: mean, and text '92.65 ± 0.12'; None, ''."""
    finals = [run["accuracy"] for run in runs]
    if not finals:
        return None, ""
    deviation = f" ± {stdev(finals):.2f}" if len(finals) > 1 else ""
    return fmean(finals), f"{fmean(finals):.2f}{deviation}"


# ---- tables --------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table with a header row; a column without any value is left out."""
    columns = [column for column in zip(*rows) if any(column[1:])]
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]
    return [header, "|---" + "|--:" * (len(columns) - 1) + "|", *lines]


def accuracies(name: str, runs: dict) -> list[str]:
    """Lines of one of Tables 4-7 or the extended run, all lengths side by side."""
    rows = [[TABLES[name][0], "Report, %"]]
    rows += [[label, f"{reported:.2f}"] for label, reported, _ in table_rows(name)]
    for n in sorted({n for _, n in runs}):
        rows[0] += ["Ours, %" if n == 1 else f"Ours at 1/{n}, %", "n", "Difference"]
        for row, (_, reported, key) in zip(rows[1:], table_rows(name)):
            mean, text = accuracy(seeds := runs.get((key, n), []))
            difference = f"{round(mean, 2) - reported:+.2f}" if seeds and n == 1 else ""
            row += [text, str(len(seeds) or ""), difference]
    return table(rows)


def t_quantile(dof: float) -> float:
    """The absolute value that Student's t stays under in 95 % of cases, for any dof >= 1."""
    # With t = sqrt(dof) * tan(angle), the density of the angle is cos(angle) ** (dof - 1).
    width = math.pi / 2 / 10_000
    sums = list(accumulate(math.cos((i + 0.5) * width) ** (dof - 1) for i in range(10_000)))
    i = bisect(sums, 0.95 * sums[-1])
    angle = width * (i + (0.95 * sums[-1] - sums[i - 1]) / (sums[i] - sums[i - 1]))
    return math.sqrt(dof) * math.tan(angle)


def welch(a: list[float], b: list[float]) -> float:
    """Half of Welch's 95 % interval of mean(a) - mean(b); infinite if one has under 2 values."""
    if min(len(a), len(b)) < 2:
        return math.inf
    squares = [variance(a) / len(a), variance(b) / len(b)]  # of the means' standard errors
    if not any(squares):
        return 0.0
    dof = sum(squares) ** 2 / (squares[0] ** 2 / (len(a) - 1) + squares[1] ** 2 / (len(b) - 1))
    return t_quantile(dof) * math.sqrt(sum(squares))


def verdicts(runs: dict) -> list[str]:
    """Lines of a table: each conclusion of the report, and what our full-length runs say of it."""
    rows = [["The report's conclusion", "Its gap", "Ours, 95 % interval", "n", "Verdict"]]
    for name, (heading, _) in TABLES.items():
        ranked = sorted(table_rows(name), key=lambda row: -row[1])
        if name == "extended":  # beside the same training, half as long
            ranked += [("32,000", *row[1:]) for row in table_rows("7") if row[2][3] == 10000]
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

    def mean_loss(run: dict, end: int) -> float:  # of the 1,000 iterations up to there
        return fmean(run["loss"][i] for i in range(end - 900, end + 1, 100))

    start = [mean_loss(run, 4000) for run in runs]
    best, *twice = [mean_loss(run, 32000) for step in ("8000", "10000") for run in runs
                    if run["step"] == step and not run["settings"]]  # fmt: skip
    return f"""\
The author's logs hold {len(start)} runs (SGD, learning rate 0.3, batch size 128) that are the same
training until their first decay; by chance alone, their mean loss over iterations 3,001 to 4,000
ranges from {min(start):.2f} to {max(start):.2f}. Decay step 10,000 was trained twice to iteration
32,000 (once as the first half of the extended run): the mean loss of the last 1,000 iterations is
{max(twice):.4f} and {min(twice):.4f}, on either side of the {best:.4f} of decay step 8,000, the
report's best."""


def markdown(shown: str, runs: dict, left_out: list) -> str:
    """The page, from what collect returned: tables, verdicts, and which logs are left out."""
    lines = [
        "Final accuracy on the 10,000 test images in percent: the report's one run, and ours as",
        "mean ± sample standard deviation over n seeds. Differences are in points.",
    ]
    for n in sorted({n for _, n in runs}):
        some = [run for (_, length), seeds in runs.items() for run in seeds if length == n]
        facts = ", ".join(f"{name} {', '.join(sorted({run[name] for run in some}))}"
                          for name in ("seed", "device", "torch", "precision"))  # fmt: skip
        length = "full length" if n == 1 else f"1/{n} of the iterations and of the decay step"
        hours = sum(run["hours"] for run in some)
        lines += ["", f"Runs of ours at {length}: {len(some)}, {hours:.1f} hours, {facts}."]
        if n > 1:
            lines += ["These are no test of the report's rankings: so short of convergence,",
                      "networks are ordered by how fast they start and by the seed."]  # fmt: skip
    if shown:
        lines += ["", f"**Our settings that are not the report's: {shown}.**"]
    for name, (heading, fixed) in TABLES.items():
        title = "Extended run" if name == "extended" else f"Table {name}"
        lines += ["", f"### {title}: {heading.lower()}", "", f"{fixed}.", ""]
        lines += accuracies(name, runs)
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
    os.replace(new, path)


# ---- figures -------------------------------------------------------------------------------------


def draw_line(ax, curves: list[dict], end: float, every: int, **style) -> None:
    """Draw the mean of curves {iteration: value} up to end, with markers at multiples of every and
    at the last point, and a band from the lowest to the highest value."""
    x = [i for i in (curves or [{}])[0] if i <= end and all(i in curve for curve in curves)]
    if not x:
        return
    y = [[curve[i] for curve in curves] for i in x]
    marks = [n for n, i in enumerate(x) if i % every == 0 or i == x[-1]]
    ax.plot(x, [*map(fmean, y)], markevery=marks, **style)
    if len(curves) > 1:
        low, high = [*map(min, y)], [*map(max, y)]
        ax.fill_between(x, low, high, color=style["color"], alpha=0.25, linewidth=0)


def draw_panel(ax, rows: list, runs: dict, column: str, n: int) -> None:
    """Draw the author's logs dashed, our runs at 1/n solid; for n > 1 until the first decay."""
    author = {run["key"]: run for run in read_author() if not run["settings"]}
    ends = {key: key[4] if n == 1 else key[3] // n for *_, key in rows}
    last = max(end for key, end in ends.items() if n == 1 or (key, n) in runs)
    for (label, reported, key), color, marker in zip(rows, COLOURS, MARKERS):
        every, ours = 100 if n > 1 else key[3], runs.get((key, n), [])
        style = {"color": color, "marker": marker}
        draw_line(ax, [author[key][column]], last, every, linestyle=(0, (4, 1.5)),
                  markerfacecolor="white", label=f"{label}: {reported:.2f} %", **style)  # fmt: skip
        draw_line(ax, [run[column] for run in ours], ends[key], every,
                  label=f"{label}: {accuracy(ours)[1]} %", **style)  # fmt: skip
    markers = "every 100 iterations" if n > 1 else "learning-rate decays and end"
    band = "; band: min to max of seeds" if ax.collections else ""
    ax.set(xlabel=f"iteration (markers: {markers}{band})", xlim=0)
    ax.set_ylabel("training loss" if column == "loss" else "test accuracy, %")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    if column == "loss":
        lows, highs = ([f(line.get_ydata()) for line in ax.lines] for f in (min, max))
        # A wild line leaves the panel and the others stay legible: losses start at ln 10 = 2.3.
        low, high = min(lows), min(max(highs), max(10, min(highs)))
        ax.set_ylim(low / 1.2, high * 1.1)
        if 0 < 5 * low < high:
            ax.set_yscale("log")
            ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")


def draw_figure(number: int, shown: str, runs: dict):
    """The report's Figure 4, 5, 6, 7 or 8 as a matplotlib Figure, from what collect returned.
    Figure 8 is the extended run and the best row of Table 7, with the test accuracy of ours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    name = "7" if number == 8 else str(number)
    rows, (heading, fixed) = table_rows(name), TABLES[name]
    title, panels = f"training loss by {heading.lower()}", [("loss", 1)]
    if number == 8:
        best = [*table_rows("extended"), max(rows, key=lambda row: row[1])]
        rows = [(f"{k[4]:,} iterations, step {k[3]:,}", accuracy, k) for _, accuracy, k in best]
        title = "best performance"
        panels += [("test_acc", 1)] * any((key, 1) in runs for *_, key in rows)
    lengths = [n for *_, key in rows for n in range(2, key[3] // 100 + 1) if (key, n) in runs]
    panels += [("loss", n) for n in sorted(lengths)[:1]]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 2.2 + 2.8 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for ax, (column, n) in zip(axes, panels):
            draw_panel(ax, rows, runs, column, n)
        if lengths:
            same = "" if shown else ",\nas up to there they are the report's training"
            axes[-1].set_title(f"Until the first decay of our runs at 1/{n} (solid){same}")
        axes[0].set_title("\n".join(filter(None, [f"Figure {number}: {title}", fixed, shown])))
        for side, whose in (("left", "author, dashed"), ("right", "ours, solid")):
            lines = [line for line in axes[0].lines if line.is_dashed() == (side == "left")]
            if lines:
                figure.legend(handles=lines, title=f"Final accuracy, {whose}", alignment="left",
                              loc=f"outside lower {side}")  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"report.py: {message} (see --help)\n")
    parser.add_argument("--logs", default="logs", help="folder with train.py's CSV files (./logs)")
    parser.add_argument("--readme", type=Path, help="Markdown file whose tables to rewrite")
    parser.add_argument("--figures", type=Path, help="folder for figure4.png ... figure8.png")
    args = parser.parse_args()
    try:
        shown, runs, left_out = collect(args.logs)
        text = markdown(shown, runs, left_out)
        if not runs:
            print(f"report.py: no complete run in {args.logs}", file=sys.stderr)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` has read enough; the files are still written
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.readme:
            rewrite_readme(args.readme, text)
        if args.figures:
            args.figures.mkdir(parents=True, exist_ok=True)
            for number in range(4, 9):
                figure = draw_figure(number, shown, runs)
                figure.savefig(args.figures / f"figure{number}.png", dpi=150)
    except ImportError:
        sys.exit("report.py: the figures need matplotlib: pip install matplotlib")
    except OSError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()

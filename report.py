"""The logs of train.py beside the report: tables in Markdown, and Figures 4-8.

    python report.py                               # the tables, for the logs in ./logs
    python report.py --figures logs                # and logs/figure4.png ...; needs matplotlib
    python report.py --write --figures results     # renew both pages from the logs in results

A log counts when it is complete and has the report's settings, at full length or at 1/n of it
(run_all.sh --shorten n). Every other log is named with the reason why it does not.
"""

import argparse
import csv
import math
import os
import signal
import sys
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FIXED = {"gamma": "0.2", "momentum": "0.9", "betas": "0.7 0.7", "wd": "0.0001", "data": "cifar10"}
ARITHMETIC = {"float32": 1.5, "TF32": 1.0, "bf16": 0.6}  # and how wide a figure draws its lines
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]  # Okabe-Ito


class Setting(NamedTuple):
    """What the report varies; `step` is the iterations between two decays of the rate."""

    optimizer: str
    lr: float
    bs: int
    step: int
    iters: int


class Row(NamedTuple):
    """A row of the report's tables, with its accuracy in percent."""

    table: str
    accuracy: float
    setting: Setting


class Run(NamedTuple):
    """A complete training of ours, at 1/n of the iterations and of the decay step of a row."""

    setting: Setting  # the row's
    n: int
    kind: str  # of arithmetic
    seed: str
    accuracy: float  # final, in percent
    loss: dict[int, float]  # {iteration: mean of the hundred iterations that end there}
    file: str
    machine: str  # processor and PyTorch's version


# ---- reading -------------------------------------------------------------------------------------
def as_setting(line: dict[str, str]) -> Setting:
    numbers = (int(line[name]) for name in ("bs", "step", "iters"))
    return Setting(line["optimizer"], float(line["lr0"]), *numbers)


def read_rows() -> list[Row]:
    """The rows of the report's tables, from run_all.sh."""
    script = (HERE / "run_all.sh").read_text(encoding="utf-8")
    table = script.split("rows='\n# ")[1].split("\n'")[0]
    lines = csv.DictReader(table.splitlines(), delimiter=" ", skipinitialspace=True)
    return [Row(line["table"], float(line["accuracy"]), as_setting(line)) for line in lines]


def read_author() -> dict[Setting, dict[int, float]]:
    """The losses in the author's own logs of the rows, as a Run has them."""
    author = {}
    text = (HERE / "results" / "author.csv").read_text(encoding="utf-8")
    for line in csv.DictReader(text.splitlines()):
        if line["gamma"] == FIXED["gamma"]:
            loss = author.setdefault(as_setting(line), {})
            loss[int(line["iteration"])] = float(line["loss"])
    return author


def arithmetic(line: dict[str, str]) -> str:
    """CPUs and Apple's MPS have no TF32: what is trained there as `tf32` is float32."""
    tf32 = "float32" if line["device"].startswith(("cpu", "mps")) else "TF32"
    return {"fp32": "float32", "tf32": tf32, "bf16": "bf16"}[line["precision"]]


def read_log(path: Path, rows: list[Row]) -> Run:
    """A log's run. Raises ValueError or LookupError if it does not count."""
    text = path.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]  # a last line without its end is still being written
    lines = list(csv.DictReader(text.splitlines(), restval=""))
    if not lines:
        raise ValueError("incomplete: no line yet")
    (own, seed, kind), *more = {(as_setting(x), x["seed"], arithmetic(x)) for x in lines}
    if more:
        raise ValueError("more than one setting, seed or arithmetic in it")
    last = lines[-1]
    if last["iteration"] != last["iters"] or not last["test_acc"]:
        raise ValueError("incomplete: iteration {iteration}/{iters}, loss {loss}".format_map(last))
    others = [f"{name} {last[name]}" for name in FIXED if last[name] not in ("", FIXED[name])]
    if others:
        raise ValueError(f"other settings: {', '.join(others)}")
    sums, start = {0: 0.0}, 0  # {iteration: sum of the losses until there}
    for end, line in sorted({int(line["iteration"]): line for line in lines}.items()):
        sums[end] = sums[start] + float(line["loss"]) * (end - start)
        start = end
    loss = {i: (sums[i] - sums[i - 100]) / 100 for i in sums if i - 100 in sums and i % 100 == 0}
    machine = ", then ".join(dict.fromkeys(f"{x['device']}, PyTorch {x['torch']}" for x in lines))
    for row in rows:  # the extended run comes last: at 1/2 it is the full run of step 5000
        n = row.setting.iters // own.iters
        if own._replace(step=own.step * n, iters=own.iters * n) == row.setting:
            accuracy = float(last["test_acc"])
            return Run(row.setting, n, kind, seed, accuracy, loss, path.name, machine)
    raise ValueError("not a row of the tables")


def collect(folder: Path, rows: list[Row]) -> tuple[list[Run], list[str]]:
    """The runs of a folder's logs, in the rows' order, and a line on each log left out."""
    runs, left_out = {}, []
    logs = [path for path in folder.iterdir() if path.suffix == ".csv" and path.stem != "author"]
    for path in sorted(logs):
        try:
            run = read_log(path, rows)
            same = runs.setdefault(run[:4], run)  # setting, n, kind and seed
            if same is not run:
                raise ValueError(f"same settings and seed as {same.file}")
        except (OSError, ValueError, ArithmeticError, csv.Error) as error:
            left_out.append(f"- `{path.name}`: {error}")
        except LookupError as error:
            left_out.append(f"- `{path.name}`: damaged: {error!r}")
    order = [row.setting for row in rows]
    return sorted(runs.values(), key=lambda run: (order.index(run.setting), run.n)), left_out


# ---- the page ------------------------------------------------------------------------------------
def t_quantile(dof: float) -> float:
    """The t that |T| exceeds in 5 % of cases, for Student's T with dof >= 1 degrees of freedom."""
    # T = sqrt(dof) * tan(angle), and the angle's density is as cos(angle) ** (dof - 1).
    width = math.pi / 2 / 20_000
    areas = [math.cos((i + 0.5) * width) ** (dof - 1) for i in range(20_000)]
    missing = 0.95 * sum(areas)
    for i, area in enumerate(areas):
        if missing <= area:
            return math.sqrt(dof) * math.tan((i + missing / area) * width)
        missing -= area


def welch(a: list[float], b: list[float]) -> float:
    """Half of Welch's 95 % interval of mean(a) - mean(b), from two or more values of each."""
    va, vb = variance(a) / len(a), variance(b) / len(b)  # squared standard errors of the means
    if va == vb == 0:
        return math.inf  # no noise was seen, so nothing bounds it
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t_quantile(dof) * math.sqrt(va + vb)


def markdown(table: list[list[str]]) -> str:
    """A table, its header first, in Markdown; a column without any value is left out."""
    columns = [column for column in zip(*table) if any(column[1:])]
    lines = ["| " + " | ".join(cells) + " |" for cells in zip(*columns)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) if columns else "None yet."


def several(values: list[float], digits: int = 2) -> str:
    """Up to two values as they are; from three on their mean ± sample deviation (how many)."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f} ({len(values)})"


def names(settings: list[Setting], differ: bool = True) -> list[str]:
    """Each setting by what differs between them, as in "lr 0.1", or by what does not."""
    fields = zip(Setting._fields, zip(*settings))
    chosen = [name for name, values in fields if (len(set(values)) > 1) == differ]
    return [", ".join(f"{name} {getattr(one, name)}" for name in chosen) for one in settings]


def finals(runs: list[Run], row: Row, kind: str) -> list[float]:
    """The accuracies of a row's full-length runs in one arithmetic."""
    return [run.accuracy for run in runs if run[:3] == (row.setting, 1, kind)]


def summary(rows: list[Row], runs: list[Run]) -> str:
    """Two sentences for each arithmetic, and a table of the report's accuracies beside ours."""
    table = [["Table", *Setting._fields, "Report, %"]]
    table += [[row.table, *map(str, row.setting), f"{row.accuracy:.2f}"] for row in rows]
    text, settings = "", {row.setting for row in rows}  # some are in two tables
    for kind in ARITHMETIC:
        table[0] += [f"Ours in {kind}, %", "Difference", "95 % for one more run"]
        gaps = {}
        for row, cells in zip(rows, table[1:]):
            ours, difference, interval = finals(runs, row, kind), "", ""
            if ours:
                gaps[row.setting] = gap = fmean(ours) - row.accuracy
                difference = f"{gap:+.2f}"
            if len(ours) >= 3:
                half = t_quantile(len(ours) - 1) * stdev(ours) * math.sqrt(1 + 1 / len(ours))
                interval = f"± {half:.2f}, report {'inside' if abs(gap) <= half else 'outside'}"
            cells += [several(ours), difference, interval]
        if gaps:
            text += f"In {kind}, {len(gaps)} of {len(settings)} settings ran at full length. The "
            text += f"largest difference is {max(gaps.values(), key=abs):+.2f} points.\n"
    return (text or "No full-length run yet.\n") + "\n" + markdown(table)


def verdicts(rows: list[Row], runs: list[Run]) -> str:
    """A table of what the report concludes, and what our full-length runs say of it."""
    rising = sorted(rows, key=lambda row: row.accuracy)
    best = {row.table: row for row in rising}  # the last of a table stays
    claims = [(best[row.table], row) for row in rows if row != best[row.table]]
    claims += [(row, rows[0]) for row in rows[1:3]]  # Adam is the lowest of Table 4
    claims += [(rows[-1], best["7"])]  # the extended run against Table 8's
    table = [["Table", "Better", "Worse", "Gap in the report", "Our gap and its 95 % interval",
              "Arithmetic", "Runs of each", "Verdict"]]  # fmt: skip
    for better, worse in sorted(claims, key=lambda claim: claim[0].table):
        both = {kind: [finals(runs, row, kind) for row in (better, worse)] for kind in ARITHMETIC}
        # The arithmetic with most runs of the side that has fewer, then of the other side.
        kind, (a, b) = max(both.items(), key=lambda item: sorted(map(len, item[1])))
        ours, word = "", "not tested"
        if a and b:
            gap = fmean(a) - fmean(b)
            ours = f"{gap:+.2f}"
        if len(a) >= 2 and len(b) >= 2:
            half = welch(a, b)
            ours += f" ({gap - half:+.2f} to {gap + half:+.2f})"
            word = "supported" if gap > half else "contradicted" if gap < -half else "undecided"
        theirs = f"{better.accuracy - worse.accuracy:+.2f}"
        cells = [better.table, *names([better.setting, worse.setting]), theirs, ours]
        table.append([*cells, kind if a or b else "", f"{len(a)}, {len(b)}", word])
    return markdown(table)


def starts(runs: list[Run]) -> str:
    """A table of the losses just before the first decay of our shortest run of each setting."""
    author = read_author()
    table = [[*Setting._fields, "Iteration", "Author's loss"]]
    table[0] += [f"Ours in {kind}" for kind in ARITHMETIC]
    runs = [run for run in runs if run.loss and run.setting.step // run.n >= 100]
    for setting in dict.fromkeys(run.setting for run in runs):
        ours = [run for run in runs if run.setting == setting]
        end = setting.step // ours[-1].n // 100 * 100  # the last is the shortest
        cells = [*map(str, setting), str(end), f"{author[setting][end]:.3f}"]
        for kind in ARITHMETIC:
            losses = [run.loss[end] for run in ours if run.kind == kind and end in run.loss]
            cells.append(several(losses, digits=3))
        table.append(cells)
    return markdown(table)


def all_runs(runs: list[Run]) -> str:
    """A table of our runs, with links to their logs; only full-length ones show an accuracy."""
    table = [["Log", "Seed", "Arithmetic", "Accuracy, %", "Processor and PyTorch"]]
    for run in runs:
        final = f"{run.accuracy:.2f}" if run.n == 1 else ""
        table.append([f"[{run.file}]({run.file})", run.seed, run.kind, final, run.machine])
    return markdown(table)


# ---- figures -------------------------------------------------------------------------------------
def draw_panel(ax, n: int, settings: list[Setting], runs: list[Run]) -> None:
    """Draw the author's losses dashed, and the mean and the range of ours at 1/n solid."""
    author = read_author()
    for setting, name, color in zip(settings, names(settings), COLOURS):
        end = setting.iters if n == 1 else setting.step // n
        curves = [("author", [author[setting]], {"ls": "--", "lw": 1})]
        for kind, width in ARITHMETIC.items():
            losses = [run.loss for run in runs if run[:3] == (setting, n, kind)]
            curves.append((f"ours in {kind}", losses, {"lw": width}))
        for label, losses, style in curves:
            x = [i for i in range(100, end + 1, 100) if all(i in loss for loss in losses)]
            if losses and len(x) > 1:  # else there is no line to see
                y = [[loss[i] for loss in losses] for i in x]
                ax.plot(x, [*map(fmean, y)], color=color, label=f"{name}, {label}", **style)
                ax.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.25, lw=0)
    ax.set(xlabel="iteration", ylabel="training loss")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    ax.grid(color="0.9")
    title = f"ours at 1/{n}, until their first decay"
    if n == 1:
        title = "full length" if len(ax.lines) > len(settings) else "no full-length run yet"
        ax.set_yscale("log", subs=(2, 5))
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    ax.set_title(title, loc="left")


def draw_figure(number: int, rows: list[Row], runs: list[Run]):
    """The report's Figure 4, 5, 6 or 7, of that table's rows, or 8, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    settings = [row.setting for row in rows if row.table == str(number)]
    if number == 8:  # Table 8's run and the extended one, the report's two best
        settings = [row.setting for row in sorted(rows, key=lambda row: row.accuracy)[-2:]]
    ours = [run for run in runs if run.setting in settings and run.loss]
    divisors = sorted({1} | {run.n for run in ours if run.setting.step // run.n >= 200})
    figure = Figure(figsize=(10, 0.5 + 3.5 * len(divisors)), dpi=150, layout="constrained")
    for ax, n in zip(figure.subplots(len(divisors), squeeze=False)[:, 0], divisors):
        draw_panel(ax, n, settings, ours)
    same = names(settings, differ=False)[0]
    figure.suptitle(f"Figure {number}: training loss, {same}", x=0.01, ha="left")
    return figure


# ---- the command line ----------------------------------------------------------------------------
def renew(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its markers in a page."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if start in text:
            text = text.split(start)[0] + start + part + end + text.split(end)[1]
    page.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    raw, home = argparse.RawDescriptionHelpFormatter, os.path.expanduser  # ~ is the home folder
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"report.py: {message} (--help)\n")
    parser.add_argument("--logs", type=home, default="logs", help="folder of logs (./logs)")
    parser.add_argument("--figures", type=home, help="folder for figure4.png ... figure8.png")
    parser.add_argument("--write", action="store_true", help="renew both pages, from ./results")
    args = parser.parse_args()
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # `| head` may end it
    sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale is
    folder = HERE / "results" if args.write else Path(args.logs)
    if not folder.is_dir():
        sys.exit(f"report.py: no folder {folder}: train first, or try --logs results")
    try:
        rows = read_rows()
        runs, left_out = collect(folder, rows)
        parts = {"summary": summary(rows, runs), "verdicts": verdicts(rows, runs),
                 "start of training": starts(runs), "runs": all_runs(runs),
                 "logs left out": "\n".join(left_out) or "None."}  # fmt: skip
        if args.figures:
            for number in range(4, 9):
                path = Path(args.figures, f"figure{number}.png")
                draw_figure(number, rows, runs).savefig(path, metadata={"Software": None})
        if args.write:
            renew(HERE / "README.md", parts)
            renew(HERE / "results" / "README.md", parts)
        print("\n\n".join(f"## {name.capitalize()}\n\n{part}" for name, part in parts.items()))
    except ImportError:
        sys.exit("report.py: the figures need matplotlib: pip install matplotlib")
    except OSError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()

"""The logs of train.py beside the report: tables in Markdown, its Figures 4-8, and one picture.

    python report.py                   # the tables, from the logs in ./logs and its subfolders
    python report.py --figures logs    # and accuracy.png, figure4.png ... figure8.png; matplotlib
    python report.py --readme          # renew the pages and figures of this project from results/
"""

import argparse
import csv
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
COLOURS = "#D55E00 #0072B2 #009E73 #CC79A7 #000000 #56B4E9 #E69F00".split()  # Okabe and Ito's
# What makes a setting, with train.py's defaults; a setting is a tuple of such words.
USUAL = dict(optimizer="sgd", lr="0.3", bs="128", step="8000", gamma="0.2", momentum="0.9",
             betas="0.7 0.7", wd="0.0001", iters="32000", data="cifar10")  # fmt: skip
# How far chance moves the mean of two gaps, the report's and ours, in points. Our seven complete
# runs, Adam's aside, differ from the report's by 0.64 (root mean square). A gap is between two
# runs, too: the mean of two gaps varies by 0.64 / sqrt(2) = 0.46, in 95 % by up to 2.4 times that.
NOISE = 1.1
SIGNS = "† cut off in its last eighth, > while it still rose; ‡ in float32, the others in TF32."


class Run(NamedTuple):
    """What a log tells of a training, ours or the author's."""
    setting: tuple[str, ...]
    accuracy: float  # in percent; nan if none is from the last eighth of the iterations
    text: str  # the accuracy with its SIGNS
    loss: float  # mean training loss of the 1,000 iterations before that evaluation
    losses: dict[int, float]  # {iteration: mean training loss since the line before}


# ---- reading -------------------------------------------------------------------------------------
def as_setting(words: dict[str, str]) -> tuple[str, ...]:
    """The setting in a dict by USUAL's names; numbers in one spelling, as Excel has 1E-04."""
    number = re.compile(r"[\d.]+(e[+-]?\d+)?", re.I)
    words = [words.get(name) or usual for name, usual in USUAL.items()]  # Adam has no momentum
    return tuple(number.sub(lambda match: f"{float(match[0]):.12g}", word) for word in words)


def read_rows() -> list[tuple[str, float, tuple]]:
    """Of each row in run_all.sh its table, accuracy in percent (nan where "-"), and setting."""
    script = (HERE / "run_all.sh").read_text(encoding="utf-8")
    rows = re.findall(r"^row +(\w+) +([\d.]+|-) +(.+)", script, re.M)
    flag = re.compile(r"--(\w+)[ =]+([^-\s]\S*(?: [\d.]+)?)")  # with one value or two
    return [(table, float(accuracy.replace("-", "nan")), as_setting(dict(flag.findall(flags))))
            for table, accuracy, flags in rows]  # fmt: skip


def read_log(path: Path) -> list[Run]:
    """The run of a log, or the fifteen of author.csv. Raises an error if it is no whole log."""
    logs, runs = {}, []
    lines = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))  # Excel's, too
    if not lines or any(None in line.values() for line in lines):
        raise ValueError("empty, or a line is cut off")
    for line in lines:
        logs.setdefault(as_setting({**line, "lr": line["lr0"]}), []).append(line)
    for setting, lines in logs.items():
        losses = {int(line["iteration"]): float(line["loss"]) for line in lines}
        tests = {int(x["iteration"]): float(x["test_acc"]) for x in lines if x["test_acc"]}
        end, iters = max(tests, default=0), int(lines[0]["iters"])
        accuracy = tests[end] if end >= iters * 7 / 8 else math.nan
        before = [tests[i] for i in tests if i <= end - iters / 8] or [math.nan]
        rose = end < iters and accuracy > before[-1] + 0.5
        # Older logs say tf32 on a CPU, too. The author's, in float32, have no such columns.
        precision, device = lines[0].get("precision", "fp32"), lines[0].get("device", "")
        float32 = {"fp32": True, "tf32": device.startswith("cpu")}[precision]
        text = f"{'>' * rose}{accuracy:.2f}{'†' * (end < iters)}{'‡' * float32}"
        loss = fmean([losses[i] for i in losses if end - 1000 < i <= end] or [math.nan])
        runs.append(Run(setting, accuracy, text, loss, losses))
    return runs


def read_logs(folder: Path) -> list[Run]:
    """The runs of all logs in a folder and below; names on stderr what is no whole log."""
    runs = []
    for path in sorted(folder.rglob("*_seed*.csv")):
        try:
            runs += [run for run in read_log(path) if run not in runs]  # a copy is no second run
        except (ValueError, KeyError, csv.Error) as error:
            print(f"report.py: {path} is left out, no whole log: {error!r}", file=sys.stderr)
    return runs


# ---- the tables ----------------------------------------------------------------------------------
def label(setting: tuple, others: list[tuple] | None = None) -> str:
    """A setting in words: what tells it from others, else the first four and what is unusual."""
    others = others or [(*4 * [""], *list(USUAL.values())[4:])]
    told = [i for i, word in enumerate(setting) if any(word != other[i] for other in others)]
    return ", ".join(f"{list(USUAL)[i]} {setting[i]}" if i else setting[0] for i in told)


def ours(runs: list[Run], setting: tuple) -> tuple[str, float, float]:
    """A setting's accuracies as a cell, their mean, and the mean of the runs' losses."""
    own = [run for run in runs if run.setting == setting and run.accuracy >= 0]
    own = [run for run in own if run.text[0] != ">"] or own  # a bound only for want of a value
    values = [run.accuracy for run in own] or [math.nan]
    cell = ", ".join(sorted((run.text for run in own), key=lambda text: "†" in text))
    if len(own) > 2:
        bound, *signs = (sign * (sign in cell) for sign in ">†‡")
        cell = f"{bound}{fmean(values):.2f} ± {stdev(values):.2f} ({len(own)}){''.join(signs)}"
    return cell, fmean(values), fmean([run.loss for run in own] or [math.nan])


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table; a cell that is no number (nan) is empty, a column of such cells left out."""
    rows = [[re.sub(".*nan", "", cell) for cell in row] for row in rows]
    columns = zip(header.split(" | "), 9 * ["---"], *rows)
    columns = [column for column in columns if any(column[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns))


def accuracies(settings, rows: list[tuple], runs: list[Run], author: list[Run]) -> str:
    """A line for each setting: the report's accuracy and ours, the author's loss and ours."""
    header = "Setting | Report | Ours | Ours - report | Author's loss | Our loss | Tables"
    lines = []
    for setting in dict.fromkeys(settings):
        (cell, mean, loss), theirs = ours(runs, setting), ours(author, setting)[2]
        report = [value for _, value, own in rows if own == setting] or [math.nan]
        gap = f"{'>' * (cell[:1] == '>')}{mean - report[0]:+.2f}"
        tables = ", ".join(table for table, _, own in rows if own == setting)
        losses = f"{theirs:#.3g}", f"{loss:#.3g}"
        lines.append([label(setting), f"{report[0]:.2f}", cell, gap, *losses, tables])
    return markdown(header, lines)


def conclusions(rows: list[tuple], runs: list[Run]) -> str:
    """A line for each conclusion of the report: its gap, ours, and whether it holds."""
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: row[1])
    best, table4 = {row[0]: row for row in rows}, [row for row in rows if row[0] == "4"]
    claims = [(best[row[0]], row) for row in rows if row != best[row[0]]]
    claims += [(row, table4[0]) for row in table4[1:-1]]  # Adam has the lowest accuracy
    claims += [(row, best["7"]) for row in rows if row[0] == "extended"]  # better than Table 8's
    lines = []
    for (table, high, better), (_, low, worse) in sorted(claims, key=lambda claim: claim[0][0]):
        theirs, own = high - low, ours(runs, better)[1] - ours(runs, worse)[1]
        both = (theirs + own) / 2
        verdict = "holds" if both > NOISE else "reversed" if both < -NOISE else "open"
        verdict = "no run" if math.isnan(own) else verdict
        told = " over ".join(label(setting, [better, worse]) for setting in (better, worse))
        lines.append([told, verdict, f"{theirs:+.2f}", f"{own:+.2f}", table])
    return markdown("Conclusion | Verdict | Report's gap | Our gap | Table", lines)


# ---- the figures ---------------------------------------------------------------------------------
def new_axes(height: float, title: str):
    """One panel, legible on a phone, and the same whatever style matplotlib is set to."""
    import matplotlib.figure
    matplotlib.rcdefaults()
    ax = matplotlib.figure.Figure(figsize=(5.4, height), dpi=140, layout="constrained").subplots()
    ax.figure.suptitle(title, x=0.01, ha="left")
    ax.grid(color="0.9")
    return ax


def draw_losses(number: int, rows: list[tuple], runs: list[Run], author: list[Run]):
    """Figure 4, 5, 6 or 7, of that table's settings, or 8, of Table 8's and the extended run."""
    table = "extended" if number == 8 else str(number)
    drawn = [as_setting({})] if number == 8 else []  # Table 8 has train.py's defaults
    drawn += [setting for name, _, setting in rows if name == table]
    ax = new_axes(3.8, f"Figure {number}: author's logs broad and pale, ours thin")
    for setting, colour in zip(drawn, 9 * COLOURS):
        ax.plot([], [], color=colour, label=label(setting, drawn))
        for whose, style in ((author, {"lw": 3.5, "alpha": 0.3}), (runs, {"lw": 0.8})):
            for run in (run for run in whose if run.setting == setting):
                ax.plot(*zip(*run.losses.items()), color=colour, **style)
    ax.set(xlabel="iteration", ylabel="training loss", xlim=(0, None))
    ax.set_yscale("log", subs=(2, 5))
    ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    ax.legend(frameon=False)
    return ax


def draw_accuracies(rows: list[tuple], runs: list[Run]):
    """A line for each setting: the report's accuracies, and ours, hollow if cut off."""
    settings = list(dict.fromkeys(setting for *_, setting in rows))[::-1]  # the first on top
    ax = new_axes(1 + 0.25 * len(settings), "Test accuracy, %: report |, ours ●, cut off ○")
    for _, accuracy, setting in rows:
        ax.plot(100 - accuracy, settings.index(setting), "|", color="black", ms=14, mew=2)
    for run in (run for run in runs if run.setting in settings):
        face = "white" if "†" in run.text else COLOURS[1]
        ax.plot(100 - run.accuracy, settings.index(run.setting), "o", color=COLOURS[1], mfc=face)
    ax.set_xscale("log")  # of the error: so 60 % and 93 % share a picture
    ax.set_xticks([40, 30, 20, 15, 10, 8, 6], [60, 70, 80, 85, 90, 92, 94])
    ax.minorticks_off()
    ax.set_yticks(range(len(settings)), [re.sub(", i", ",\ni", label(own)) for own in settings])
    ax.invert_xaxis()
    return ax


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The logs of train.py beside the report.")
    parser.add_argument("--logs", type=Path, default="logs", help="folder of logs (./logs)")
    parser.add_argument("--figures", type=Path, help="folder for the figures (none are drawn)")
    parser.add_argument("--readme", action="store_true", help="renew the pages, from results")
    args = parser.parse_args(argv)
    if args.readme:
        args.logs = args.figures = HERE / "results"
    if not args.logs.is_dir():
        sys.exit(f"report.py: no folder {args.logs}: train first, or try --logs results")
    try:
        rows, runs = read_rows(), read_logs(args.logs)
        author = read_log(HERE / "results" / "author.csv")
        settings = [setting for *_, setting in rows]
        others = [run.setting for run in runs if run.accuracy >= 0 and run.setting not in settings]
        parts = {"results": f"{accuracies(settings, rows, runs, author)}\n\n{SIGNS}",
                 "conclusions": conclusions(rows, runs),
                 "other runs": accuracies(others, rows, runs, author)}  # fmt: skip
        print("\n\n".join(filter(None, parts.values())))
        if args.figures:
            figures = {f"figure{n}": draw_losses(n, rows, runs, author) for n in range(4, 9)}
            for name, ax in {**figures, "accuracy": draw_accuracies(rows, runs)}.items():
                ax.figure.savefig(args.figures / f"{name}.png", metadata={"Software": None})
        for page in (HERE / "README.md", HERE / "results/README.md") if args.readme else ():
            text = page.read_text(encoding="utf-8")
            for name, part in parts.items():
                marks = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
                text = re.sub(marks, rf"\g<1>{part}\g<2>", text, flags=re.S)
            page.write_text(text, encoding="utf-8", newline="\n")
    except (ImportError, OSError, UnicodeError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()

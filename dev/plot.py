"""Draws the losses of training runs from their logs (./train_gpt2_mla --log FILE).

    python3 dev/plot.py mha.csv mla.csv                  writes losses.svg
    python3 dev/plot.py run*.csv -o runs.png --x seconds

Thin lines are training losses (nats per token, smoothed over a fiftieth of the run), thick ones
with points validation losses. The legend says in what the runs differ, as the logs themselves
begin with it; a log without such lines is called by its file's name. Needs numpy and matplotlib.
"""

import argparse
from pathlib import Path

import numpy as np

COLUMNS = "step,loss,lr,grad_norm,val_loss,tok_per_s,seconds"
# Readable on white and on black alike.
GREY = "#767676"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a0d3", "#a0522d", "#767676"]


def read_log(path):
    """A log's `# key: value` lines as a dict, and its columns as a dict of arrays (steps).

    Values of configuration and settings ("kv_rank 85, q_rank 64, ...") become entries of their
    own, by their first words. Raises SystemExit with a line if the file is no log.
    """
    said, rows = {}, []
    try:
        text = Path(path).read_text()
        lines = text[:text.rfind("\n") + 1].splitlines()  # the last may be on its way
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot read: {error}") from None
    for line in lines:
        key, colon, value = line[1:].strip().partition(": ")
        if line.startswith("#") and key in ("configuration", "settings"):
            for part in value.replace("schedule: ", "schedule, ").split(", "):
                words = part.rpartition if key == "configuration" else part.partition
                name, _, text = words(" ")
                said[name] = text
        elif line.startswith("#"):
            said[key] = value if colon else ""
        elif line != COLUMNS:
            rows.append(line.split(","))
    if COLUMNS not in lines or any(len(row) != 7 for row in rows):
        raise SystemExit(f"{path}: expected a log of train_gpt2_mla, with a line {COLUMNS}")
    try:
        columns = np.array([[float(text or "nan") for text in row] for row in rows]).reshape(-1, 7)
    except ValueError:
        raise SystemExit(f"{path}: a row has something that is no number") from None
    return said, dict(zip(COLUMNS.split(","), columns.T))


def labels(paths, said):
    """In what each run differs from the others; else its file's name.

    That is its attention and position, and what else runs of the same attention and position have
    differently: ranks that only go with a kind are no news.
    """
    kinds = [(one.get("attention", ""), one.get("position", "")) for one in said]
    keys = [key for key in dict.fromkeys(key for one in said for key in one)
            if key not in ("attention", "position", "parameters", "vector bytes", "compiler")
            and any(a.get(key) != b.get(key) for a, kind in zip(said, kinds)
                    for b, other in zip(said, kinds) if kind == other)]
    texts = []
    for one, kind in zip(said, kinds):
        parts = list(kind) if len(set(kinds)) > 1 or not keys else []
        parts += [f"{key} {one[key]}" for key in keys if one.get(key, "0") not in ("0", "none")]
        texts.append(", ".join(filter(None, parts)))
    names = [str(path) if len({Path(p).stem for p in paths}) < len(paths) else Path(path).stem
             for path in paths]
    return [text if text and texts.count(text) == 1 else f"{name} {text}".strip()
            for name, text in zip(names, texts)]


def smoothed(loss):
    """The mean of each point's neighbours, a fiftieth of all; at the ends of those that exist"""
    width = max(1, len(loss) // 50)
    ones = np.ones(width)
    return np.convolve(loss, ones, "same") / np.convolve(np.ones(len(loss)), ones, "same")


def new_axes(xlabel, ylabel, size=(7, 4.2)):
    """Figure and axes in colours that do for a light and for a dark page."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "train_gpt2_mla", "font.size": 11,
        "text.color": GREY, "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY,
        "ytick.color": GREY, "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    return figure, axes


def check_format(path):
    """SystemExit unless the path ends as a kind of picture does that can be written."""
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise SystemExit(f"{path}: expected a name that ends in .svg, .png or .pdf")


def save(figure, path):
    """Without date and background, so that equal content means equal bytes."""
    date = {"Date": None} if str(path).endswith(".svg") else None
    figure.savefig(path, transparent=True, metadata=date, dpi=150)


def draw(runs, path, x="step"):
    """One picture of runs {label: list of columns, one entry a seed} -> file `path`.

    With several seeds the line is their mean and the shade reaches from the least to the largest.
    """
    figure, axes = new_axes({"step": "step", "seconds": "seconds of training"}[x],
                            "loss (nats per token)")
    for label, logs in runs.items():
        logs = [log for log in logs if len(log["step"]) == max(len(log["step"]) for log in logs)]
        place = np.mean([log[x] for log in logs], axis=0)
        line, = axes.plot(place, np.mean([smoothed(log["loss"]) for log in logs], axis=0),
                          linewidth=0.8, alpha=0.7)
        val = np.array([log["val_loss"] for log in logs])
        at = ~np.isnan(val).any(axis=0)
        style = dict(color=line.get_color(), marker="o", markersize=3.5, linewidth=1.8)
        if at.any():
            axes.plot(place[at], val[:, at].mean(axis=0), label=label, **style)
            axes.fill_between(place[at], val[:, at].min(axis=0), val[:, at].max(axis=0),
                              color=line.get_color(), alpha=0.2, linewidth=0)
        else:
            line.set_label(label)
    last = [value for log in sum(runs.values(), []) for value in smoothed(log["loss"])[-1:]]
    first = max(np.nanmax(smoothed(log["loss"])[len(log["loss"]) // 20:], initial=-np.inf)
                for log in sum(runs.values(), []))
    if last and np.isfinite(first) and first > min(last):  # what matters is not the first steps
        axes.set_ylim(min(last) - 0.08 * (first - min(last)), first)
    figure.legend(loc="outside lower left", ncols=1 + (len(runs) > 4))
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="LOG")
    parser.add_argument("-o", "--out", default="losses.svg", metavar="FILE",
                        help="svg, png or pdf (losses.svg)")
    parser.add_argument("--x", choices=["step", "seconds"], default="step")
    options = parser.parse_args()
    check_format(options.out)
    said, columns = zip(*(read_log(path) for path in options.logs))
    for path, column in zip(options.logs, columns):
        if not len(column["step"]):
            raise SystemExit(f"{path}: no steps yet, nothing to draw")
    runs = {label: [column] for label, column in zip(labels(options.logs, said), columns)}
    draw(runs, options.out, options.x)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""Writes the results' tables into the texts, and their figures, from dev/results/*.csv and
dev/speed/decode_speed.md.

    python3 dev/report.py              rewrites what stands between <!-- NAME --> and <!-- /NAME -->
                                       in doc/writeup.md and README.md, and figures in doc/figures
    python3 dev/report.py --check      changes nothing; status 1 if a text does not say what the
                                       CSVs do, or a figure is missing

Needs numpy and scipy, for the figures matplotlib.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

import compare
import experiments
import plot

ROOT = experiments.ROOT
TEXTS = [ROOT / "doc" / "writeup.md", ROOT / "README.md"]
FIGURES = ROOT / "doc" / "figures"


def losses(name):
    """{row: {seed: validation loss}} of an experiment, each row at its chosen learning rate"""
    found = {}
    for entry in experiments.read_results(name):
        if entry["learning_rate"] == experiments.rate_of(entry["row"], entry["options"]):
            found.setdefault(entry["row"], {})[int(entry["seed"])] = float(entry["val_loss"])
    return found


def entry_of(name, row):
    return next(e for e in experiments.read_results(name) if e["row"] == row)


def markdown(head, lines):
    """A table whose first column is text and whose others are numbers"""
    rule = "|---|" + "--:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule,
                      *("| " + " | ".join(line) + " |" for line in lines)])


def mean_sd(values):
    values = list(values)
    return f"{np.mean(values):.4f} ({np.std(values, ddof=1):.4f})"


def difference(found):
    """±-text of compare.paired's result; bold where the interval leaves out 0"""
    text = f"{found['mean']:+.4f} ± {found['half']:.4f}"
    return f"**{text}**" if abs(found["mean"]) > found["half"] else text


# ---- Tables

def rates_table():
    """Mean loss after half the steps, by learning rate"""
    entries = experiments.read_results("rates")
    lines = []
    for row in dict.fromkeys(entry["row"] for entry in entries):
        cells = []
        for rate in experiments.RATES:
            own = [float(e["val_loss"]) for e in entries
                   if e["row"] == row and e["learning_rate"] == rate]
            cell = mean_sd(own)
            chosen = experiments.rate_of(row, entry_of("rates", row)["options"])
            cells.append(f"**{cell}**" if rate == chosen else cell)
        lines.append([row, *cells])
    return markdown(["row", *experiments.RATES], lines)


def against_first_table(name):
    """Every row of an experiment beside its first: parameters, cache, loss, difference"""
    found = losses(name)
    rows = [row for row, _, _ in experiments.EXPERIMENTS[name] if len(found.get(row, ())) > 1]
    lines = []
    for row in rows:
        entry = entry_of(name, row)
        beside = compare.paired(found[row], found[rows[0]], len(rows) - 1)
        lines.append([row, entry["parameters"], entry["cache"],
                      experiments.rate_of(row, entry["options"]), str(len(found[row])),
                      mean_sd(found[row].values()), difference(beside) if row != rows[0] else ""])
    return markdown(["row", "parameters", "cache", "rate", "seeds", "validation loss (sd)",
                     f"difference to {rows[0]}"], lines)


# One change each, from the second row to the first.
CHANGES = [
    ("positions decoupled", "mha decoupled", "mha rope"),
    ("keys and values from a latent", "mla, plain", "mha decoupled"),
    ("LayerNorm on that latent", "mla, layernorm", "mla, plain"),
    ("(RMSNorm in its place)", "mla, rmsnorm", "mla, plain"),
    ("queries from a latent, normed", "mla decoupled", "mla, layernorm"),
    ("all of these: mla", "mla decoupled", "mha rope"),
    ("queries from a latent, no norm at all", "mla, query latent, no norm", "mla, plain"),
    ("RMSNorm in place of LayerNorm, both latents", "mla, query latent, rmsnorm",
     "mla decoupled"),
    ("DeepSeek's widths in place of split heads", "mla, DeepSeek's widths", "mla decoupled"),
    ("the same with RMSNorm", "mla, DeepSeek's widths, rmsnorm", "mla, query latent, rmsnorm"),
]


def changes():
    """[(text, from, to, alone, jointly)]: compare.paired's results, for an interval by itself and
    for all of them together"""
    found = losses("steps")
    return [(text, old, new, *(compare.paired(found[new], found[old], n)
                               for n in (1, len(CHANGES)))) for text, new, old in CHANGES]


def changes_table():
    rates = {row: experiments.rate_of(row, options)
             for row, options, _ in experiments.EXPERIMENTS["steps"]}
    return markdown(["change", "from", "to", "rates", "difference", "± alone", "± all ten"],
                    [[text, old, new, f"{rates[old]}, {rates[new]}", f"{alone['mean']:+.4f}",
                      f"{alone['half']:.4f}", f"{joint['half']:.4f}"]
                     for text, old, new, alone, joint in changes()])


def headline_table():
    """The rows of `steps` that README shows"""
    found, lines = losses("steps"), []
    compared = sum(len(seeds) > 1 for seeds in found.values()) - 1  # as in the table of all
    for row in ("mha rope", "mha decoupled", "mla decoupled"):
        entry = entry_of("steps", row)
        beside = compare.paired(found[row], found["mha rope"], compared)
        lines.append([row, entry["parameters"], entry["cache"], mean_sd(found[row].values()),
                      difference(beside) if row != "mha rope" else ""])
    return markdown([f"{len(found[row])} seeds each", "parameters", "cached floats per token",
                     "validation loss (sd)", "difference to mha"], lines)


TABLES = {
    "headline": headline_table,
    "rates": rates_table,
    "steps": lambda: against_first_table("steps"),
    "changes": changes_table,
}


# ---- Figures

def changes_figure(path):
    """Differences of loss, one line each, with both intervals, the wider one thin"""
    figure, axes = plot.new_axes("difference in validation loss (nats per byte)", "", (7, 4))
    found = changes()
    for place, (_, _, _, alone, joint) in enumerate(found):
        mean = alone["mean"]
        colour = plot.GREY if abs(mean) <= alone["half"] else plot.COLOURS[mean > 0]
        axes.errorbar(mean, -place, xerr=joint["half"], fmt="none", color=colour, elinewidth=0.8)
        axes.errorbar(mean, -place, xerr=alone["half"], fmt="o", color=colour, capsize=3)
    axes.axvline(0, color=plot.GREY, linewidth=1)
    axes.set_yticks([-place for place in range(len(found))], [text for text, *_ in found])
    plot.save(figure, path)


def rates_figure(path):
    """Loss over learning rate, for those rows that differ in how they bear a high one"""
    figure, axes = plot.new_axes("learning rate", "validation loss after 2,000 steps", (7, 4))
    entries = experiments.read_results("rates")
    rows = ["mha rope", "mla decoupled", "mla, plain", "mla, layernorm",
            "mla, query latent, no norm", "mla, query latent, rmsnorm"]
    for place, row in enumerate(rows):
        own = [[float(e["val_loss"]) for e in entries
                if e["row"] == row and e["learning_rate"] == rate] for rate in experiments.RATES]
        x = [float(rate) * 1.006 ** (place - 2.5) for rate in experiments.RATES]  # side by side
        errors = [np.std(values, ddof=1) / len(values) ** 0.5 for values in own]
        axes.errorbar(x, [np.mean(values) for values in own], yerr=errors, marker="o", capsize=3,
                      label=row)
    axes.set_xscale("log")
    axes.set_xticks([float(rate) for rate in experiments.RATES], experiments.RATES)
    axes.minorticks_off()
    figure.legend(loc="outside lower left", ncols=2)
    plot.save(figure, path)


def decoding_figure(path, batch=1):
    """Tokens per second over the context, from dev/speed/decode_speed.md"""
    table = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in (ROOT / "dev/speed/decode_speed.md").read_text().splitlines()
             if re.match(r"\| \d", line)]
    figure, axes = plot.new_axes("tokens in the cache", f"tokens per second, batch {batch}",
                                 (7, 4.8))
    colours = {}  # one a kind and cache; ranks differ in their lines
    for row in dict.fromkeys(line[2] for line in table):
        colour = colours.setdefault(row.split(", R=")[0], plot.COLOURS[len(colours)])
        own = [(int(line[0]), float(line[5])) for line in table
               if line[2] == row and int(line[1]) == batch]
        axes.plot(*zip(*own), marker="o", markersize=3.5, color=colour, label=row,
                  linestyle="--" if row.endswith("R=64") else "-")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([128, 1024, 4096, 16384], ["128", "1,024", "4,096", "16,384"])
    figure.legend(loc="outside lower left", ncols=3)
    plot.save(figure, path)


DRAWINGS = {"changes_loss.svg": changes_figure, "rates_loss.svg": rates_figure,
            "decoding_batch1.svg": decoding_figure,
            "decoding_batch16.svg": lambda path: decoding_figure(path, batch=16)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    wrong, placed = 0, set()
    for path in TEXTS:
        text = path.read_text()
        for name, table in TABLES.items():
            place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
            if place.search(text):
                placed.add(name)
                new = place.sub(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text)
                if new != text and options.check:
                    print(f"{path.relative_to(ROOT)}: table {name} differs from dev/results")
                    wrong += 1
                text = new
        if not options.check:
            path.write_text(text)
    for name in TABLES.keys() - placed:
        print(f"table {name}: no text has <!-- {name} --> and <!-- /{name} -->")
        wrong += 1
    for name, draw in DRAWINGS.items():
        if not options.check:
            draw(FIGURES / name)
        elif not (FIGURES / name).exists():
            print(f"doc/figures/{name} is missing")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

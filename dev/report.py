"""Writes the results' tables into the texts, and their figures, from dev/results/*.csv and
dev/speed/decode_speed.md.

    python3 dev/report.py           rewrites what stands between <!-- NAME --> and <!-- /NAME --> in
                                    doc/writeup.md, doc/modify.md and README.md, and figures in
                                    doc/figures
    python3 dev/report.py --check   changes nothing; status 1 if a text does not say what the CSVs
                                    do, or a figure is missing

Needs numpy and scipy, for the figures matplotlib.
"""

import argparse
import json
import re
import sys

import numpy as np
from scipy import stats

import compare
import experiments
import plot

ROOT = experiments.ROOT
TEXTS = [ROOT / "doc" / "writeup.md", ROOT / "doc" / "modify.md", ROOT / "README.md"]
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


def rows_of(name, has="", lacks=None):
    """Rows of an experiment with two seeds or more, those whose name has (and lacks) a word"""
    found = losses(name)
    return [row for row, _, _ in experiments.EXPERIMENTS[name] if len(found.get(row, ())) > 1
            and has in row and not (lacks and lacks in row)]


def against_first_table(name, rows=None):
    """Rows of an experiment (all) beside the first: parameters, cache, loss, difference"""
    found, lines = losses(name), []
    rows = rows or rows_of(name)
    for row in rows:
        entry = entry_of(name, row)
        beside = compare.paired(found[row], found[rows[0]], len(rows) - 1)
        lines.append([row, entry["parameters"], entry["cache"],
                      experiments.rate_of(row, entry["options"]), str(len(found[row])),
                      mean_sd(found[row].values()), difference(beside) if row != rows[0] else ""])
    return markdown(["row", "parameters", "cache", "rate", "seeds", "validation loss (sd)",
                     f"difference to {rows[0]}"], lines)


# Comparisons that the text names besides, each with an interval by itself.
PAIRS = [
    ("rank", "gqa rope", "mla decoupled"),
    ("rank", "mla, rank 16", "mla, rank 128"),
    ("rank", "mla, rank 16", "mha rope"),
    ("learned", "mla learned, layernorm", "mha learned"),
    ("learned", "mla learned", "mla learned, layernorm"),
    ("size", "25M mla decoupled", "25M mqa rope"),
    ("quality", "gqla decoupled", "mla decoupled"),
    ("quality", "mqa rope, wider", "mqa rope"),
    ("learned", "mla learned, rank 128", "mla learned"),
]
HIGH_RATE = ["mla, layernorm", "mla, rmsnorm", "mla, query latent, no norm"]


def pairs_table():
    """PAIRS, and what rows of HIGH_RATE lose from 4e-3 to 6e-3"""
    lines = []
    for name, new, old in PAIRS:
        found = losses(name)
        lines.append([name, new, old, compare.paired(found[new], found[old], 1)])
    for row in HIGH_RATE:
        at = [{int(e["seed"]): float(e["val_loss"]) for e in experiments.read_results("rates")
               if e["row"] == row and e["learning_rate"] == rate} for rate in ("6e-3", "4e-3")]
        lines.append(["rates", f"{row}, 6e-3", "4e-3", compare.paired(*at, 1)])
    return markdown(["experiment", "row", "beside", "seeds", "difference"],
                    [[name, new, old, str(len(found["seeds"])), difference(found)]
                     for name, new, old, found in lines])


def programs_table():
    """The rows that the C program and the PyTorch model have both trained, at the same rate"""
    ours, lines = losses("quality"), []
    theirs = {**losses("rank"), **losses("steps")}
    shared = [row for row in ours if len(ours[row]) > 1 and len(theirs.get(row, ())) > 1]
    for row in shared:
        a, b = list(ours[row].values()), list(theirs[row].values())
        found = stats.ttest_ind(a, b, equal_var=False)
        low, high = found.confidence_interval(1 - 0.05 / len(shared))
        lines.append([row, f"{mean_sd(a)}, {len(a)}", f"{mean_sd(b)}, {len(b)}",
                      difference({"mean": np.mean(a) - np.mean(b), "half": (high - low) / 2})])
    return markdown(["row", "C: loss (sd), seeds", "PyTorch", "difference"], lines)


def data_table():
    """mla against mha on other data; bits per byte where tokens are not bytes"""
    found, bits, lines = losses("data"), {}, []
    for entry in experiments.read_results("data"):
        bits.setdefault(entry["row"], []).append(float(entry["bits_per_byte"]))
    for data in ("tinyshakespeare", "BPE"):
        rows = rows_of("data", has=data)
        for row in rows:
            beside = compare.paired(found[row], found[rows[0]], len(rows) - 1)
            lines.append([row, entry_of("data", row)["parameters"], str(len(found[row])),
                          mean_sd(found[row].values()), mean_sd(bits[row]),
                          difference(beside) if row != rows[0] else ""])
    return markdown(["row", "parameters", "seeds", "loss per token (sd)", "bits per byte (sd)",
                     "difference to mha, loss"], lines)


def time_table():
    """What has been run: rows, seeds, machine time"""
    lines, total = [], 0.0
    for name in experiments.EXPERIMENTS:
        entries = experiments.read_results(name)
        for program in sorted({entry["program"] for entry in entries}):
            own = [entry for entry in entries if entry["program"] == program]
            seconds = [float(entry["seconds"]) for entry in own]
            total += sum(seconds)
            lines.append([name, program, str(len({entry["row"] for entry in own})), str(len(own)),
                          f"{np.median(seconds):.0f} s", f"{sum(seconds) / 3600:.1f} h"])
    lines.append(["all", "", "", str(sum(int(line[3]) for line in lines)), "",
                  f"{total / 3600:.1f} h"])
    return markdown(["experiment", "program", "rows", "runs", "a run (median)", "all of them"],
                    lines)


def modified_table(name):
    """What dev/compare.py said of a worked change: dev/results/NAME.json"""
    table = json.loads((experiments.RESULTS / f"{name}.json").read_text())["rows"]
    lines = [[row["name"], str(row["parameters"]), str(row["cache"]), str(len(row["seeds"])),
              f"{row['val_loss']:.4f} ({row['sd']:.4f})",
              difference(row["difference"]) if row["difference"] else ""] for row in table]
    return markdown(["", "parameters", "cache", "seeds", "validation loss (sd)",
                     f"difference to {table[0]['name']}"], lines)


# One change each, from the second row to the first.
CHANGES = [
    ("positions decoupled", "mha decoupled", "mha rope"),
    ("keys and values from a latent", "mla, plain", "mha decoupled"),
    ("LayerNorm on that latent", "mla, layernorm", "mla, plain"),
    ("(RMSNorm in its place)", "mla, rmsnorm", "mla, plain"),
    ("queries from a latent, normed", "mla decoupled", "mla, layernorm"),
    ("all of these: mla", "mla decoupled", "mha rope"),
    ("queries from a latent, no norm at all", "mla, query latent, no norm", "mla, plain"),
    ("the same with a query latent of 128", "mla, query latent of 128, no norm", "mla, plain"),
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
    return markdown(["change", "from", "to", "rates", "difference", "± alone", "± all"],
                    [[text, old, new, f"{rates[old]}, {rates[new]}", f"{alone['mean']:+.4f}",
                      f"{alone['half']:.4f}", f"{joint['half']:.4f}"]
                     for text, old, new, alone, joint in changes()])


def rewritten_losses():
    """{row: {seed: loss}} of `convert`: reported seeds, fine-tuned rows at their rank's rate"""
    found = {}
    for entry in experiments.read_results("convert"):
        row, seed = entry["row"], int(entry["seed"])
        if row in experiments.REWRITTEN:
            rate = experiments.tuning_rate(experiments.REWRITTEN[row][1])
            if entry["learning_rate"] != rate:
                continue
        if seed != experiments.TUNING_SEED:
            found.setdefault(row, {})[seed] = float(entry["val_loss"])
    return found


# What becomes of a model, and what it stands beside: column, row for a kind and a rank.
FATES = [
    ("at once, by weights", "{kind} to rank {R}, at once"),
    ("at once, by data", "{kind} to rank {R}, by data, at once"),
    ("fine-tuned, by weights", "{kind} to rank {R}"),
    ("fine-tuned, by data", "{kind} to rank {R}, by data"),
    ("from scratch, no norm", "{mla} learned, plain, rank {R}"),
    ("from scratch, layernorm", "{mla} learned, layernorm, rank {R}"),
]
MLA_OF = {"mha": "mla", "gqa": "gqla"}


def fate_row(row, kind, R):
    return row.format(kind=kind, mla=MLA_OF[kind], R=R)


def convert_table():
    """Trained mha and gqa, rewritten with a latent of R numbers"""
    found, lines = rewritten_losses(), []
    for kind in MLA_OF:
        before = mean_sd(found[f"{kind} learned"].values())
        for R in experiments.RANKS_KEPT:
            cells = [mean_sd(found[fate_row(row, kind, R)].values()) for _, row in FATES]
            lines.append([f"{kind}, R = {R}", entry_of("convert", f"{kind} to rank {R}")["cache"],
                          experiments.tuning_rate(R), before, *cells])
    return markdown(["", "cache", "rate", "before", *(name for name, _ in FATES)], lines)


def convert_pairs_table():
    """Differences by seed; the intervals of a column hold together"""
    found, lines = rewritten_losses(), []
    rows = len(MLA_OF) * len(experiments.RANKS_KEPT)
    pairs = [("fine-tuned, by data", "fine-tuned, by weights"),
             ("fine-tuned, by data", "from scratch, layernorm")]
    for kind in MLA_OF:
        for R in experiments.RANKS_KEPT:
            own = {name: found[fate_row(row, kind, R)] for name, row in FATES}
            exact = found[f"{kind} to rank {max(experiments.RANKS_KEPT)}"]
            cells = [compare.paired(own["fine-tuned, by data"], exact, rows)]
            cells += [compare.paired(own[a], own[b], rows) for a, b in pairs]
            lines.append([f"{kind}, R = {R}", *("" if c["half"] is None else difference(c)
                                                for c in cells)])
    return markdown(["fine-tuned, by data, less", "that of R = C, by weights",
                     "the same rank, by weights", "the same rank from scratch, layernorm"], lines)


def bf16_speed_table():
    """Tokens per second by precision, medians of rounds, and bf16's ratios to the others"""
    rates, lines = {}, []
    for entry in experiments.read_results("bf16_speed", ROOT / "dev" / "speed"):
        key = (entry["work"], entry["attention"], entry["threads"])
        own = rates.setdefault(key, {}).setdefault(entry["program"], [])
        own.append(float(entry["tokens_per_second"]))
    for (work, attention, threads), programs in rates.items():
        median = {program: np.median(own) for program, own in programs.items()}
        cells = [f"{median['this bf16']:.0f}"]
        for other in ("this fp32", "PyTorch autocast bf16"):
            own = programs.get(other)
            cells.append(f"{median[other]:.0f}" if own else "")
            pairs = [a / b for a, b in zip(programs["this bf16"], own)] if own else []
            spread = f" ({min(pairs):.2f} to {max(pairs):.2f})" if len(pairs) > 1 else ""
            cells.append(f"{median['this bf16'] / median[other]:.2f}{spread}" if own else "")
        lines.append([f"{work}, {attention}", threads, *cells])
    return markdown(["", "threads", "bf16", "float32", "bf16 over it", "PyTorch, bf16",
                     "bf16 over it"], lines)


def precision_table():
    """The default run with products of bfloat16 beside float32, by seed"""
    found, lines = {**losses("quality"), **losses("precision")}, []
    for row, options, seeds in experiments.EXPERIMENTS["precision"]:
        plain = row.removesuffix(", bf16")
        single = {seed: found[plain][seed] for seed in seeds}
        beside = compare.paired(found[row], single, 1)
        lines.append([plain, str(len(beside["seeds"])), mean_sd(single.values()),
                      mean_sd(found[row].values()), difference(beside)])
    return markdown(["", "seeds", "float32 (sd)", "bf16 (sd)", "difference"], lines)


def headline_table():
    """The rows of `quality` that README shows"""
    found, lines = losses("quality"), []
    compared = len(rows_of("quality", lacks="learned")) - 1  # as in the table of all
    for row in ("mha rope", "gqa rope", "mqa rope", "mla decoupled", "gqla decoupled"):
        entry = entry_of("quality", row)
        beside = compare.paired(found[row], found["mha rope"], compared)
        lines.append([row, entry["parameters"], entry["cache"], mean_sd(found[row].values()),
                      difference(beside) if row != "mha rope" else ""])
    return markdown([f"{len(found[row])} seeds each", "parameters", "cached floats per token",
                     "validation loss (sd)", "difference to mha"], lines)


TABLES = {
    "headline": headline_table,
    "rates": rates_table,
    "quality": lambda: against_first_table("quality", rows_of("quality", lacks="learned")),
    "quality learned": lambda: against_first_table("quality", rows_of("quality", has="learned")),
    "steps": lambda: against_first_table("steps"),
    "changes": changes_table,
    "learned": lambda: against_first_table("learned"),
    "rank": lambda: against_first_table("rank"),
    **{f"size {size}": lambda size=size: against_first_table("size", rows_of("size", has=size))
       for size in ("6M", "25M")},
    "data": data_table,
    "precision": precision_table,
    "bf16 speed": bf16_speed_table,
    "convert": convert_table,
    "convert pairs": convert_pairs_table,
    "programs": programs_table,
    "pairs": pairs_table,
    "time": time_table,
    **{name: lambda name=name: modified_table(name)
       for name in ("qk_norm", "qk_norm_high_rate", "rotary_keys_per_head",
                    "tied_keys_and_values", "tied_alone")},
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


def rank_figure(path):
    """Loss over what a decoder keeps: fewer key/value heads against smaller latents"""
    figure, axes = plot.new_axes("cached floats per token", "validation loss (nats per byte)",
                                 (7, 4.4))
    found = losses("rank")
    lines = {
        "fewer key/value heads: mha, gqa, mqa": ["mha rope", "gqa rope", "mqa rope"],
        "smaller latents: mla": sorted((row for row in found if row.startswith("mla")),
                                       key=lambda row: int(entry_of("rank", row)["cache"])),
        "both: gqla": ["gqla decoupled"]}
    for label, rows in lines.items():
        x = [int(entry_of("rank", row)["cache"]) for row in rows]
        values = [list(found[row].values()) for row in rows]
        errors = [np.std(own, ddof=1) / len(own) ** 0.5 for own in values]
        axes.errorbar(x, [np.mean(own) for own in values], yerr=errors, marker="o", capsize=3,
                      label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([128, 256, 512, 1024], ["128", "256", "512", "1,024"])
    figure.legend(loc="outside lower left", ncols=1)
    plot.save(figure, path)


def convert_figure(path):
    """Loss over the cache of models rewritten as mla: lines of mha solid, of gqa dashed"""
    figure, axes = plot.new_axes("cached floats per token", "validation loss (nats per byte)",
                                 (7, 5))
    found = rewritten_losses()
    cache = [int(entry_of("convert", f"mha to rank {R}")["cache"]) for R in experiments.RANKS_KEPT]
    for kind, style in (("mha", "-"), ("gqa", "--")):
        axes.axhline(np.mean(list(found[f"{kind} learned"].values())), color=plot.GREY, lw=1,
                     linestyle=style, label=f"{kind} as trained" if kind == "mha" else None)
        for (name, row), colour in zip(FATES, plot.COLOURS):
            values = [list(found[fate_row(row, kind, R)].values()) for R in experiments.RANKS_KEPT]
            errors = [np.std(own, ddof=1) / len(own) ** 0.5 for own in values]
            axes.errorbar(cache, [np.mean(own) for own in values], yerr=errors, marker="o",
                          markersize=4, capsize=3, color=colour, linestyle=style,
                          label=name if kind == "mha" else None)
    axes.set_xscale("log", base=2)
    axes.set_xticks(cache, [str(x) for x in cache])
    axes.set_ylim(1.53, 1.76)  # at once, rank 16 is above
    figure.legend(loc="outside lower left", ncols=2)
    plot.save(figure, path)


def decoding_figure(path, batch=1):
    """Tokens per second over the context, from dev/speed/decode_speed.md"""
    table = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in (ROOT / "dev/speed/decode_speed.md").read_text().splitlines()
             if re.match(r"\| \d", line)]
    figure, axes = plot.new_axes("tokens in the cache", f"tokens per second, batch {batch}",
                                 (7, 5.6))
    colours = {}  # one a kind and cache; ranks and precisions differ in their lines
    for row in dict.fromkeys(line[2] for line in table):
        kind = row.removesuffix(", bf16").split(", R=")[0]
        if kind not in colours:
            colours[kind] = plot.COLOURS[len(colours)]
        colour = colours[kind]
        own = [(int(line[0]), float(line[5])) for line in table
               if line[2] == row and int(line[1]) == batch]
        axes.plot(*zip(*own), marker="o", markersize=3.5, color=colour, label=row,
                  linestyle=":" if "bf16" in row else "--" if "R=64" in row else "-")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([128, 1024, 4096, 16384], ["128", "1,024", "4,096", "16,384"])
    figure.legend(loc="outside lower left", ncols=2)
    plot.save(figure, path)


DRAWINGS = {"changes_loss.svg": changes_figure, "rates_loss.svg": rates_figure,
            "rank_loss.svg": rank_figure, "convert_loss.svg": convert_figure,
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

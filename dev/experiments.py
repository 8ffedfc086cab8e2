"""The experiments behind the writeup's results: one CSV each under dev/results/, a row per run.

    python3 dev/experiments.py all                 what is not in the CSVs yet
    python3 dev/experiments.py quality steps       these
    python3 dev/experiments.py quality --only mha --seeds 1      runs that are all there already are
                                          made again, and it says whether the losses are the same
    python3 dev/experiments.py quality --quick     a few minutes: shorter runs, kept elsewhere

    rates     the learning rate of every row: half as many steps, seeds that are not reported
    quality   every kind and position
    steps     from mha rope to mla, one change at a time; DeepSeek's widths
    learned   what is it about a latent that learned positions do not go with?
    rank      loss against what a decoder keeps
    data      tinyshakespeare; novels in tokens of a BPE (dev/novels.py --vocab 10000)
    size      models of 6 and of 25 million parameters: a GPU's work (--device cuda, bfloat16)
    precision products of bfloat16 (--precision bf16)
    convert   mha and gqa, trained, rewritten as mla and fine-tuned; mla from scratch beside them

Data: data/novels_train.txt and data/novels_val.txt as dev/novels.py makes them (--data FOLDER for
another place). All runs of a seed belong on one kind of processor. Interrupted, the same command
goes on; CSVs from several machines are joined by adding their rows. Needs numpy, --device cuda also
PyTorch, convert PyTorch and safetensors.
"""

import argparse
import concurrent.futures
import csv
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import compare

ROOT = compare.ROOT
RESULTS = ROOT / "dev" / "results"
RATES = ["3e-3", "4e-3", "6e-3"]
RATE_SEEDS = [101, 102, 103, 104]
COLUMNS = ["row", "seed", "program", "val_loss", "learning_rate", "parameters", "cache",
           "tokens_per_second", "seconds", "processor", "vector_bytes", "commit", "data", "options",
           "bits_per_byte", "best_val_loss", "compiler"]

NOVELS = "--train-data {data}/novels_train.txt --val-data {data}/novels_val.txt"
# Rows by name: options of the model. Default size: 4 layers, C = 128, 4 heads, T = 128, 8 rows.
KINDS = {
    "mha rope": "--attention mha --position rope",
    "mla decoupled": "--attention mla --position decoupled",
    "mqa rope": "--attention mqa --position rope",
    "gqa rope": "--attention gqa --kv-heads 2 --position rope",
    "mha decoupled": "--attention mha --position decoupled",
    "gqla decoupled": "--attention mla --kv-heads 2 --position decoupled",
    "mha learned": "--attention mha --position learned",
    "mla learned": "--attention mla --position learned",
    "mqa learned": "--attention mqa --position learned",
    "gqa learned": "--attention gqa --kv-heads 2 --position learned",
    "gqla learned": "--attention mla --kv-heads 2 --position learned",
}
MLA = KINDS["mla decoupled"]
# The same, wider or of higher rank, where a kind has over 5% fewer parameters than mha rope.
MATCHED = {
    "mqa rope, wider": KINDS["mqa rope"] + " --channels 136",
    "gqa rope, wider": KINDS["gqa rope"] + " --channels 136",
    "gqla decoupled, rank 128": KINDS["gqla decoupled"] + " --kv-rank 128",
}
STEPS = {
    "mla, plain": MLA + " --q-rank 0 --latent-norm none",
    "mla, layernorm": MLA + " --q-rank 0",
    "mla, rmsnorm": MLA + " --q-rank 0 --latent-norm rmsnorm",
    "mla, query latent, no norm": MLA + " --latent-norm none",
    "mla, query latent, rmsnorm": MLA + " --latent-norm rmsnorm",
    "mla, query latent of 128, no norm": MLA + " --q-rank 128 --latent-norm none",
    "mla, DeepSeek's widths": MLA + " --nope-dim 32 --rope-dim 16 --kv-rank 70",
    "mla, DeepSeek's widths, rmsnorm":
        MLA + " --nope-dim 32 --rope-dim 16 --kv-rank 70 --latent-norm rmsnorm",
}
LEARNED = {
    "mla learned, plain": KINDS["mla learned"] + " --q-rank 0 --latent-norm none",
    "mla learned, layernorm": KINDS["mla learned"] + " --q-rank 0",
    "mla learned, no norm": KINDS["mla learned"] + " --latent-norm none",
    "mla learned, rank 128": KINDS["mla learned"] + " --kv-rank 128",
}
RANKS = {f"mla, rank {R}": MLA + f" --kv-rank {R}" for R in (16, 32, 48, 64, 106, 128)}

# The original's layers, batch (12 x 4 sequences), rate and schedule, for bytes; and a size between.
LARGE = ("--layers 8 --heads 16 --channels 512 --seq-len 1024 --batch-size 48 --steps 2035 "
         "--learning-rate 6e-4 --warmup 20 --val-every 185")
MIDDLE = ("--layers 6 --heads 6 --channels 288 --seq-len 512 --batch-size 32 --steps 2035 "
          "--learning-rate 2e-3 --val-every 185")
SIZES = {f"{size} {row}": f"{KINDS[row]} {shape}"
         for size, shape in (("25M", LARGE), ("6M", MIDDLE))
         for row in ("mha rope", "mqa rope", "mla decoupled")}

SHAKESPEARE = ("--train-data {data}/tinyshakespeare_train.bin "
               "--val-data {data}/tinyshakespeare_val.bin")
BPE = ("--train-data {data}/novels_10000_train.bin --val-data {data}/novels_10000_val.bin "
       "--tokenizer {data}/novels_10000_tokenizer.bin")
DATA = {f"{name}, {row}": f"{KINDS[row]} {files} --learning-rate 4e-3"
        for name, files in (("tinyshakespeare", SHAKESPEARE), ("BPE", BPE))
        for row in ("mha rope", "mla decoupled")}

# From MHA to MLA (the writeup's section 12): what is trained from scratch, and what becomes of it:
# row: (its base, rank, whether the rank is cut with the data in view).
RANKS_KEPT = (128, 64, 32, 16)
FROM_SCRATCH = {row: KINDS[row] for row in ("mha learned", "gqa learned")} | {
    f"{row}, {name}, rank {R}": f"{KINDS[row]} --q-rank 0 --latent-norm {norm} --kv-rank {R}"
    for row in ("mla learned", "gqla learned") for R in RANKS_KEPT
    for name, norm in (("plain", "none"), ("layernorm", "layernorm"))}
REWRITTEN = {f"{kind} to rank {R}{way}": (f"{kind} learned", R, bool(way))
             for kind in ("mha", "gqa") for R in RANKS_KEPT for way in ("", ", by data")}
TUNING_STEPS = 400  # a tenth
TUNING_RATES = ["1e-4", "3e-4", "1e-3", "3e-3"]
TUNING_SEED = 101   # chooses each rank's rate, and is not reported

SIX, FOUR = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4]
EXPERIMENTS = {  # name: list of (row, options, seeds); the others rest on rates
    "rates": [(row, options, RATE_SEEDS) for row, options in {**KINDS, **STEPS}.items()],
    "quality": [(row, options, FOUR if "learned" in row else SIX)
                for row, options in {**KINDS, **MATCHED}.items()],
    "steps": [(row, KINDS[row], SIX) for row in ("mha rope", "mha decoupled", "mla decoupled")]
             + [(row, options, SIX) for row, options in STEPS.items()],
    "learned": [(row, options, FOUR) for row, options in {
        "mha learned": KINDS["mha learned"], "mla learned": KINDS["mla learned"],
        **LEARNED}.items()],
    "size": [(row, options, SIX[:5]) for row, options in SIZES.items()],
    "data": [(row, options, FOUR) for row, options in DATA.items()],
    "rank": [(row, KINDS[row], FOUR) for row in ("mha rope", "gqa rope", "mqa rope",
                                                 "mla decoupled", "gqla decoupled")]
            + [(row, options, FOUR) for row, options in RANKS.items()],
    "precision": [(f"{row}, bf16", KINDS[row] + " --precision bf16", FOUR[:3])
                  for row in ("mla decoupled",)],
    "convert": [(row, options, [1, 2, 3] + [TUNING_SEED] * ("rank" not in row))
                for row, options in FROM_SCRATCH.items()],
}


# ---- The CSVs

def read_results(name, folder=RESULTS):
    """The rows of dev/results/NAME.csv, as dicts of strings"""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_result(name, entry, folder):
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(entry)


def rate_of(row, options, folder=RESULTS):
    """The row's own learning rate; else that with the least mean loss among half-length runs, of
    all its seeds; "4e-3" without any.

    A row that was not tried has that of the row whose options its own begin with.
    """
    own = compare.parse_options(options, row).get("--learning-rate")
    if own:
        return own
    entries, losses = read_results("rates", folder), {}
    if not any(entry["row"] == row for entry in entries):
        row = next((kind for kind, own in KINDS.items() if options.startswith(own)), row)
    for entry in entries:
        if entry["row"] == row:
            losses.setdefault(entry["learning_rate"], []).append(float(entry["val_loss"]))
    if any(len(losses.get(rate, ())) < len(RATE_SEEDS) for rate in RATES):
        return "4e-3"
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def commit():
    """The commit of this tree, with a + if files differ from it; "" where there is no git"""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"],
                             capture_output=True, text=True)
    return head.stdout.strip() + "+" * bool(changed.stdout) if head.returncode == 0 else ""


# ---- Runs

class Torch(compare.Run):
    """A run of dev/pytorch/gpt2_mla.py on a GPU, from the C program's initial numbers."""

    SCRIPT = ROOT / "dev/pytorch/gpt2_mla.py"
    PASSED_ON = compare.DATA + ("--steps", "--seed", "--learning-rate", "--warmup", "--val-every",
                                "--val-batches", "--batch-size")

    def __init__(self, *arguments, extra):
        self.extra = extra
        self.also = [compare.digest(self.SCRIPT), *extra]
        super().__init__(*arguments)

    def start(self, threads):
        o, init = self.options, self.file(".init")
        model = {k: v for k, v in o.items()
                 if k not in self.PASSED_ON or k in ("--seed", "--load")}
        made = subprocess.run([self.program, *compare.command_line({**model, "--steps": "0"}),
                               "--train-data", o["--train-data"], "--save", init],
                              capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(made.stderr)
        rate = float(o.get("--learning-rate", 4e-3))
        command = [
            sys.executable, self.SCRIPT, "train", "--load", init,
            "--device", "cuda", "--train-data", o["--train-data"], "--val-data", o["--val-data"],
            "--steps", o["--steps"], "--seed", o["--seed"], "--learning-rate", str(rate),
            "--schedule", "cosine", "--min-lr", str(rate / 10), "--order", "random",
            "--warmup", o.get("--warmup", str((self.steps + 19) // 20)), "--beta2", "0.99",
            "--log", self.file(".csv"), "--val-every", o["--val-every"], "--print-every", "50",
            "--batch-size", o.get("--batch-size", "8"),
            "--eval-batch-size", str(32768 // int(o.get("--seq-len", 128))), *self.extra,
            *["--save", self.file(".safetensors")] * self.keeps_model]
        with open(self.file(".out"), "w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output,
                                            start_new_session=True, pass_fds=[self.held.fileno()])

    def finish(self):
        super().finish()
        self.file(".init").unlink(missing_ok=True)


def gpu_name():
    import torch
    return torch.cuda.get_device_name()


def settings(row, text, steps, options):
    """A run's options, a dict: what the row's text names, over what all rows share"""
    data = shlex.quote(str(Path(options.data).resolve()))
    words = {**compare.parse_options(NOVELS.format(data=data), row),
             "--steps": str(steps), "--val-every": "1000", "--val-batches": "100",
             **compare.parse_options(text.format(data=data), row)}
    if options.quick:
        words["--steps"] = "300"
    if not Path(words["--train-data"]).exists():
        raise SystemExit(f"{words['--train-data']}: not there; python3 dev/novels.py makes the "
                         "novels (--vocab 10000: as tokens), make shakespeare the rest")
    compare.add_data(words)
    return words


def new_run(row, text, rate, seed, words, program, model, hashes, options, how="--graph"):
    """A run of the C program, on a GPU of PyTorch's model. row, text and rate are for the CSV."""
    arguments = (row, program, {**words, "--learning-rate": rate}, seed, model,
                 options.out.resolve(), hashes)
    cuda = options.device == "cuda"
    run = Torch(*arguments, extra=how.split()) if cuda else compare.Run(*arguments)
    run.row, run.text, run.rate, run.data = row, text, rate, hashes[words["--train-data"]][:8]
    return run


def csv_row(run):
    """What the CSV says of a run that has a result"""
    result, cuda = run.result, isinstance(run, Torch)
    return {**{key: result[key] for key in ("parameters", "cache", "vector_bytes")},
            "row": run.row, "seed": run.seed, "learning_rate": run.rate, "options": run.text,
            "compiler": result.get("compiler", ""), "bits_per_byte": result["bits_per_byte"] or "",
            "program": "PyTorch" if cuda else "C", "commit": commit(), "data": run.data,
            "val_loss": f"{result['val_loss']:.6f}",
            "best_val_loss": f"{result.get('best_val_loss', float('nan')):.6f}",
            "tokens_per_second": "" if cuda else f"{result['tokens_per_second']:.0f}",
            "seconds": f"{result['seconds']:.0f}",
            "processor": gpu_name() if cuda else result["processor"]}


def to_make(name, jobs, options, folder):
    """Of jobs, {(row, seed, rate): anything}, those that the CSV lacks, or, if --only or --seeds
    name jobs that are all there, these once more -> them, and what the CSV has by the same keys"""
    published = {(e["row"], int(e["seed"]), e["learning_rate"]): e
                 for e in read_results(name, folder)}
    missing = {key: job for key, job in jobs.items() if key not in published}
    return missing if missing or not (options.only or options.seeds) else jobs, published


def run_missing(name, runs, options, folder):
    """Makes the runs that the CSV lacks, and adds them to it -> how many failed. Runs that are made
    once more are compared."""
    runs, published = to_make(name, {(run.row, run.seed, run.rate): run for run in runs}, options,
                              folder)
    for key in runs.keys() & published.keys():
        for ending in (".json", ".csv", ".safetensors"):
            runs[key].file(ending).unlink(missing_ok=True)
        runs[key].result = None
    runs = list(runs.values())
    if not runs:
        print(f"{name}: all runs are in {folder / name}.csv")
        return 0
    for run in runs:  # what stands beside it in the CSV must be made alike
        is_now = ("PyTorch" if isinstance(run, Torch) else "C", run.data)
        for entry in published.values():
            was = (entry["program"], entry["data"])
            if entry["row"] == run.row and was != is_now:
                raise SystemExit(f"{folder / name}.csv: {run.row} was run by {was[0]} on data "
                                 f"{was[1]}; this would be {is_now[0]} on {is_now[1]}: "
                                 "move that file away to make your own")
    runs.sort(key=lambda run: run.seed)  # so that an interruption leaves whole seeds

    def done(run):
        old, entry = published.get((run.row, run.seed, run.rate)), csv_row(run)
        if old is None:
            add_result(name, entry, folder)
        elif old["val_loss"] == entry["val_loss"]:
            compare.show(f"{run.row} seed {run.seed}: {entry['val_loss']}, as published")
        else:
            compare.show(f"{run.row} seed {run.seed}: {entry['val_loss']}, published "
                         f"{old['val_loss']} ({old['processor']}, compiler {old['compiler']}, "
                         f"data {old['data']})")

    compare.run_all(runs, options.jobs or (os.cpu_count() or 1), 1, done)
    return sum(run.failure is not None for run in runs)


def run_experiment(name, options, folder):
    """All of an experiment that --only and --seeds leave -> how many runs failed"""
    asked = lambda row: not options.only or any(row.startswith(only) for only in options.only)
    rows = [row for row, _, _ in EXPERIMENTS[name]] + [*REWRITTEN] * (name == "convert")
    if not any(map(asked, rows)):
        raise SystemExit(f"--only: {name} has no such row, expected the beginning of one of "
                         + ", ".join(rows))
    program, hashes, runs = compare.copied(compare.build(ROOT), options.out.resolve()), {}, []
    for row, text, seeds in EXPERIMENTS[name]:
        if not asked(row):
            continue
        words = settings(row, text, 2000 if name == "rates" else 4000, options)
        model = compare.probe(program, words)
        for rate in RATES if name == "rates" else [rate_of(row, text, folder)]:
            for seed in options.seeds or seeds:
                runs.append(new_run(row, text, rate, seed, words, program, model, hashes, options,
                                    "--bf16 --compile" if name == "size" else "--graph"))
                runs[-1].keeps_model = name == "convert" and "rank" not in row
    failed = run_missing(name, runs, options, folder) if runs else 0
    if name == "convert":
        failed += run_rewritten([row for row in REWRITTEN if asked(row)], program, hashes, options,
                                folder)
    return failed


# ---- From MHA to MLA

def rewritten(row, seed, program, hashes, options, folder):
    """A base's trained model of that seed, rewritten as row has it -> path of its checkpoint"""
    import convert
    base, rank, by_data = REWRITTEN[row]
    words = settings(base, KINDS[base], 4000, options)
    trained = new_run(base, KINDS[base], rate_of(base, KINDS[base], folder), seed, words, program,
                      {}, hashes, options)
    path = trained.file(f".{rank}{'.data' if by_data else ''}.safetensors")
    if not trained.file(".safetensors").exists():
        raise SystemExit(f"{trained.file('.safetensors')}: the trained model is not there; "
                         f'experiments.py convert --only "{base}" --seeds {seed} makes it')
    model = convert.read(trained.file(".safetensors"))
    data = words["--train-data"] if by_data else None
    model = convert.to_mla(trained.name, model, rank, data, show=lambda line: None)
    path.unlink(missing_ok=True)  # it may be of another convert.py
    convert.write_ours(model, path)
    return path


def loss_of(program, path, val_data):
    """A checkpoint's validation loss, by the C program with one thread"""
    ran = subprocess.run([program, "--load", path, "--eval", "--val-data", val_data],
                         capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = re.search(r"loss ([\d.]+)", ran.stdout)
    if ran.returncode or not found:
        raise SystemExit(f"{path}: --eval failed: {(ran.stderr or ran.stdout).strip()}")
    return float(found[1])


def tuning_rate(rank, folder=RESULTS):
    """The rate of fine-tuning at which models of that rank end lowest; "1e-3" without any"""
    losses = {}
    for entry in read_results("convert", folder):
        if entry["seed"] == str(TUNING_SEED) and entry["row"].endswith(f" to rank {rank}"):
            losses.setdefault(entry["learning_rate"], []).append(float(entry["val_loss"]))
    return min(losses, key=lambda rate: sum(losses[rate]), default="1e-3")


def run_rewritten(rows, program, hashes, options, folder):
    """These rows of REWRITTEN: the loss at once (a row of its own), then after fine-tuning.

    -> how many runs failed
    """
    def at_once(pair):
        row, seed = pair
        began, path = time.time(), rewritten(row, seed, program, hashes, options, folder)
        words = settings(row, f"--load {shlex.quote(str(path))}", TUNING_STEPS, options)
        model, loss = compare.probe(program, words), loss_of(program, path, words["--val-data"])
        entry = {"row": f"{row}, at once", "seed": seed, "program": "C", "val_loss": f"{loss:.6f}",
                 "options": text(row), "parameters": model["parameters"], "cache": model["cache"],
                 "seconds": f"{time.time() - began:.0f}", "processor": compare.processor(),
                 "commit": commit(), "data": hashes[words["--train-data"]][:8]}
        return entry, words, model

    def text(row):
        _, rank, by_data = REWRITTEN[row]
        return f"--to mla --kv-rank {rank}" + " --data novels_train.txt" * by_data

    def tune(jobs):
        jobs, published = to_make("convert", dict.fromkeys(jobs), options, folder)
        pairs, made = list(dict.fromkeys(job[:2] for job in jobs)), {}
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for pair, (entry, *of_run) in zip(pairs, pool.map(at_once, pairs)):
                if pair[1] != TUNING_SEED and (entry["row"], pair[1], "") not in published:
                    add_result("convert", entry, folder)
                compare.show(f"{entry['row']}, seed {pair[1]}: {entry['val_loss']}")
                made[pair] = of_run
        runs = [new_run(row, text(row), rate, seed, words, program, model, hashes, options)
                for row, seed, rate in jobs for words, model in [made[row, seed]]]
        return run_missing("convert", runs, options, folder) if runs else 0

    if not options.seeds:
        failed = tune([(row, TUNING_SEED, rate) for rate in TUNING_RATES for row in rows
                       if not REWRITTEN[row][2]])
        if failed:
            return failed
    return tune([(row, seed, tuning_rate(REWRITTEN[row][1], folder))
                 for seed in options.seeds or [1, 2, 3] for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME")
    parser.add_argument("--only", action="append", metavar="ROW", help="rows that begin so")
    parser.add_argument("--seeds", type=compare.seed_list, help="1-5 or 1,2,7 (each one's own)")
    parser.add_argument("--quick", action="store_true",
                        help="300 steps, two seeds; results go to OUT/quick and not to dev/results")
    parser.add_argument("--jobs", type=compare.positive,
                        help="runs at a time, one thread each (cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="cuda: PyTorch in place of the C program")
    parser.add_argument("--data", default=ROOT / "data", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER")
    options = parser.parse_args()
    folder = RESULTS
    if options.quick:
        folder = options.out.resolve() / "quick"
        options.seeds = options.seeds or [1, 2]
    compare.lock(options.out)
    names = options.names
    if "all" in names:  # size without a GPU would take weeks
        names = [name for name in EXPERIMENTS if name != "size" or options.device == "cuda"]
    try:
        return 1 if sum(run_experiment(name, options, folder) for name in names) else 0
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())

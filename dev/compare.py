"""Does a change help? Trains variants with several seeds each, and says how sure the answer is.

    python3 dev/compare.py mha="--attention mha" mla="--attention mla" \\
        gqla="--attention mla --kv-heads 2" --common "--steps 2000" --seeds 1-5
    python3 dev/compare.py --against HEAD          this working tree's program against that commit's
    python3 dev/compare.py --against main mha="--attention mha" mla=""       the same for two models

Every row is trained on the same batches from the same seeds. Its validation loss (after the last
step, over all validation data) is compared with the first row's, seed by seed: the mean of these
differences with a 95% interval from Student's t distribution; with several rows compared, each
interval is wider (Bonferroni: 1 - 0.05/rows), so that all of them together hold at 95%.

Finished runs are kept in --out and used again; interrupted ones go on where they were. A run is
known by the program's and the data's bytes, its options and its seed. Needs numpy and scipy, for
--plot matplotlib.
"""

import argparse
import concurrent.futures
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "train_gpt2_mla"
OURS = ("--seed", "--save", "--log", "--resume", "--save-every", "--sample-every")
FLAGS = ("--resume", "--eval", "--help")
DATA = ("--train-data", "--val-data", "--tokenizer", "--load")  # files: known by their bytes
SMALL_DIFFERENCE = 0.005  # nats: what a table says the seeds for


# ---- Options, programs, data

def parse_options(text, where):
    """"--attention mla --kv-rank 64" -> {"--attention": "mla", ...}; refuses what is set here."""
    options = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SystemExit(f"{where}: '{text}': {error}") from None
    while words:
        name = words.pop(0)
        if not name.startswith("--") or name in FLAGS or name in OURS:
            raise SystemExit(f"{where}: {name}: expected options of a training run, without "
                             + ", ".join(OURS) + ", which are set here")
        if not words:
            raise SystemExit(f"{where}: {name}: its value is missing")
        options[name] = words.pop(0)
    if not options.get("--steps", "1").isdigit() or options.get("--steps") == "0":
        raise SystemExit(f"{where}: --steps {options['--steps']}: expected at least 1")
    return options


def command_line(options):
    return [word for pair in options.items() for word in pair]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def build(folder):
    """Makes the program in `folder` -> its path"""
    made = subprocess.run(["make", "-s", PROGRAM], cwd=folder, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{folder}: make {PROGRAM} failed:\n{made.stderr.strip()}")
    print(made.stderr, end="", file=sys.stderr)  # warnings
    return Path(folder) / PROGRAM


def copied(program, out):
    """A copy of the program under its own digest, which stays as it is when the tree is edited"""
    copy = out / "programs" / digest(program)[:16]
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(program, f"{copy}.tmp")
        os.replace(f"{copy}.tmp", copy)
    return str(copy)


def build_revision(revision, out):
    """The program of a commit, made in a folder of its own -> its path"""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--verify", "-q", revision + "^{commit}"],
                           capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"--against {revision}: no such commit here")
    folder = out / "programs" / found.stdout.strip()
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run([*git, "archive", found.stdout.strip(), "Makefile", PROGRAM + ".c"],
                             capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return build(folder)


def add_data(options):
    """Data files by their full paths: those named, or the prepared tinyshakespeare."""
    if "--train-data" not in options:
        prepared = ROOT / "data" / "tinyshakespeare_train.bin"
        if not prepared.exists():
            raise SystemExit('no data: run `make shakespeare`, or name files with --common '
                             '"--train-data FILE --val-data FILE"')
        options["--train-data"] = prepared
        options.setdefault("--val-data", str(prepared).replace("_train", "_val"))
    if "--val-data" not in options:
        raise SystemExit(f"--train-data {options['--train-data']}: expected --val-data FILE too")
    for name in DATA:
        if name in options:
            options[name] = str(Path(options[name]).resolve())
            if not Path(options[name]).is_file():
                raise SystemExit(f"{name} {options[name]}: no such file")


def probe(program, options):
    """What the program says of the model that options describe: a dict, or SystemExit."""
    asked = command_line({**options, "--steps": "0"})
    ran = subprocess.run([program, *asked], capture_output=True, text=True)
    found = re.search(r"^(\w+), position (\w+): .*\n(\d+) parameters \| KV cache (\d+) floats",
                      ran.stdout, re.M)
    if ran.returncode or not found:
        said = (ran.stderr or ran.stdout).strip().splitlines()
        raise SystemExit(f"{' '.join(asked)}: {said[-1] if said else 'the program said nothing'}")
    return {"attention": found[1], "position": found[2],
            "parameters": int(found[3]), "cache": int(found[4])}


def match_parameters(program, options, wanted):
    """The options with that rank or width changed which brings parameters closest to `wanted`.

    Returns options and a word on what it took. An mla row changes kv-rank if it leaves it open,
    then channels; others change channels, in steps that keep heads even.
    """
    base = probe(program, options)
    heads = int(options.get("--heads", 4))
    channels = int(options.get("--channels", 128))
    knobs = [("--channels", 2 * heads, 4 * channels // (2 * heads))]
    if base["attention"] == "mla" and "--kv-rank" not in options:
        knobs.insert(0, ("--kv-rank", 1, channels))
    best = None
    for knob, unit, high in knobs:
        low = 1
        while low < high:  # the least that has at least as many
            middle = (low + high) // 2
            changed = {**options, knob: str(middle * unit)}
            if probe(program, changed)["parameters"] < wanted:
                low = middle + 1
            else:
                high = middle
        for units in (low - 1, low):
            if units < 1:
                continue
            changed = {**options, knob: str(units * unit)}
            off = abs(probe(program, changed)["parameters"] - wanted) / wanted
            if best is None or off < best[0]:
                best = (off, knob, changed)
        if best[0] < 0.005:
            break
    off, knob, changed = best
    return changed, f"{knob} {changed[knob]} ({100 * off:.1f}% off)"


# ---- Runs

def processor():
    """The processor's name, as the system tells it"""
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


class Run:
    """One training run: a program, options, a seed; and what became of it.

    `model` is what `probe` says of it, `hashes` keeps digests of files from run to run.
    """

    also = []  # what else a run is known by: texts
    keeps_model = False  # or the checkpoint goes when the result is there
    held = None  # the lock of the folder, which runs hold on to

    def __init__(self, name, program, options, seed, model, out, hashes):
        self.name, self.program, self.seed, self.model = name, program, seed, model
        self.options = {**options, "--seed": str(seed)}
        self.steps = int(options.get("--steps", 4000))
        self.hashes = hashes
        for path in self.files():
            if path not in hashes:
                hashes[path] = digest(path)
        known_by = {o: hashes.get(v, v) for o, v in self.options.items()}
        text = json.dumps([hashes[program], sorted(known_by.items()), *self.also])
        self.stem = out / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.process, self.result, self.failure = None, None, None
        if self.file(".json").exists():
            try:
                self.result = json.loads(self.file(".json").read_text())
            except ValueError:
                raise SystemExit(f"{self.file('.json')}: cut short; delete it, and the run is "
                                 "made again") from None

    def files(self):
        return [self.program, *(self.options[o] for o in DATA if o in self.options)]

    def file(self, ending):
        return self.stem.with_name(self.stem.name + ending)

    def step(self):
        """Steps done, as the log's end tells it"""
        try:
            with open(self.file(".csv"), "rb") as log:
                log.seek(max(0, log.seek(0, 2) - 200))
                rows = log.read().decode(errors="replace").split("\n")
            return int(rows[-2].split(",")[0])
        except (OSError, ValueError, IndexError):
            return 0

    def start(self, threads):
        save = self.file(".safetensors")
        command = [self.program, *command_line(self.options), "--log", self.file(".csv"), "--save",
                   save, "--save-every", "500", "--sample-every", "0"]
        with open(self.file(".out"), "w") as output:
            self.process = subprocess.Popen(
                [*command, *["--resume"] * save.exists()], stdout=output, stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True,
                pass_fds=[self.held.fileno()] if self.held else [])

    def finish(self):
        """Waits; keeps the result, or what went wrong."""
        status = self.process.wait()
        if status < 0:
            self.failure = f"killed by {signal.Signals(-status).name}; see {self.file('.out')}"
            return
        if status:
            said = self.file(".out").read_text(errors="replace").strip().splitlines()
            self.failure = said[-1] if said else f"exit status {status}"
            return
        import plot
        path = self.file(".csv")
        said, log = plot.read_log(path)
        whole = len(log["step"]) and log["step"][-1] == self.steps
        if not whole or not math.isfinite(log["val_loss"][-1]):
            raise ValueError(f"{path}: expected a last row of step {self.steps} with a loss")
        for path in self.files():
            if digest(path) != self.hashes[path]:
                raise ValueError(f"{path}: changed while this was running")
        rates = sorted(log["tok_per_s"])
        bits = re.findall(r"bits_per_byte ([\d.]+)", self.file(".out").read_text(errors="replace"))
        self.result = {
            "name": self.name, "seed": self.seed, "options": self.options,
            "val_loss": float(log["val_loss"][-1]),
            "best_val_loss": min(float(x) for x in log["val_loss"] if x == x),  # NaN: none there
            "bits_per_byte": float(bits[-1]) if bits else None,
            "tokens_per_second": rates[len(rates) // 2], "seconds": float(log["seconds"][-1]),
            **self.model, "processor": processor(),
            "vector_bytes": int(said.get("vector bytes", 0)),
            "compiler": said.get("compiler", "")}
        self.file(".json.tmp").write_text(json.dumps(self.result, indent=1))
        self.file(".json.tmp").rename(self.file(".json"))
        if not self.keeps_model:
            self.file(".safetensors").unlink(missing_ok=True)


def duration(seconds):
    minutes = int(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else \
        f"{minutes}m{int(seconds) % 60:02}s" if minutes else f"{seconds:.0f}s"


def show(text, stays=False):
    """A line of progress on stderr; on a terminal one that stays is drawn over by the next."""
    terminal = sys.stderr.isatty()
    print(f"\r\033[K{text}" if terminal else text, end="" if terminal and stays else "\n",
          file=sys.stderr, flush=True)


def run_all(runs, jobs, threads, done=lambda run: None):
    """Trains what is not done, `jobs` at a time; progress on stderr. Ctrl-C lets each run save.

    Calls `done` with each run that has a result, those from before included.
    """
    left = [run for run in runs if not run.result]
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done already", file=sys.stderr)
    for run in runs:
        if run.result:
            done(run)
    stopping = threading.Event()

    def one(run):
        try:
            if not stopping.is_set():
                run.start(threads)
                run.finish()
        except (SystemExit, OSError, ValueError) as error:  # spoils no other run
            run.failure = str(error)

    def interrupt(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C
        signal.signal(number, interrupt)
    began, drawn = time.time(), 0
    total = sum(run.steps for run in left)
    before = sum(run.step() for run in left if run.file(".safetensors").exists())
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, run): run for run in left}
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = concurrent.futures.wait(waiting, timeout=1)
                for future in ended:
                    future.result()
                    run = futures[future]
                    if run.result:
                        done(run)
                    if run.failure:
                        show(f"{run.name} seed {run.seed}: failed: {run.failure}")
                if time.time() - drawn < (1 if sys.stderr.isatty() else 60) and waiting:
                    continue
                drawn = time.time()
                steps = sum(run.steps if run.result or run.failure else
                            run.step() if run.process else 0 for run in left)
                speed = (steps - before) / (drawn - began)
                eta = duration((total - steps) / speed) if speed > 0 else "?"
                over = sum(bool(run.result or run.failure) for run in left)
                show(f"{over}/{len(left)} runs, {100 * steps / max(total, 1):.0f}% of all steps, "
                     f"ETA {eta}", stays=bool(waiting))
        except KeyboardInterrupt:
            stopping.set()
            for run in left:
                if run.process and run.process.poll() is None:
                    run.process.send_signal(signal.SIGINT)
            print("\nstopping; each run saves, and the same command goes on", file=sys.stderr)
            for future in futures:
                future.cancel()
            try:
                pool.shutdown()
            except KeyboardInterrupt:  # a run that does not stop
                for run in left:
                    if run.process and run.process.poll() is None:
                        run.process.kill()
            sys.exit(130)


# ---- Statistics

def paired(losses, base, rows):
    """Differences of losses {seed: loss} to `base`, paired by seed, among `rows` comparisons.

    -> dict: seeds, mean, sd, half (of the interval; None with one seed), verdict, and seeds_needed,
    with which the interval would reach 0.005 to each side.
    """
    import numpy as np
    from scipy import stats
    seeds = sorted(losses.keys() & base.keys())
    if not seeds:
        return {"seeds": seeds, "verdict": "no common seeds"}
    d = np.array([losses[seed] - base[seed] for seed in seeds])
    found = {"seeds": seeds, "mean": float(d.mean()), "sd": None, "half": None}
    if not d.any():
        return {**found, "verdict": "exactly the same"}
    if len(seeds) == 1:
        return {**found, "verdict": "one seed: no interval"}
    sd, n = float(d.std(ddof=1)), np.arange(2, max(1000, len(d)) + 1)
    halves = sd * stats.t.ppf(1 - 0.025 / rows, n - 1) / np.sqrt(n)  # with n seeds
    half = float(halves[len(d) - 2])
    verdict = "worse" if d.mean() > half else "better" if d.mean() < -half else "no difference seen"
    enough = n[halves <= SMALL_DIFFERENCE]
    needed = int(enough[0]) if len(enough) else None
    if verdict == "no difference seen" and half > SMALL_DIFFERENCE:
        verdict += f" (for ±{SMALL_DIFFERENCE}: {needed or 'over 1000'} seeds)"
    return {**found, "sd": sd, "half": half, "verdict": verdict, "seeds_needed": needed}


def summarize(rows):
    """Rows {name, base (index of the row to compare with), model, runs} -> list of dicts"""
    import numpy as np
    losses = [{run.seed: run.result["val_loss"] for run in row["runs"] if run.result}
              for row in rows]
    compared = sum(row["base"] is not None for row in rows)
    table = []
    for row, own in zip(rows, losses):
        values = np.array(list(own.values()))
        rates = [run.result["tokens_per_second"] for run in row["runs"] if run.result]
        table.append({
            "name": row["name"], **row["model"], "seeds": sorted(own),
            "val_loss": float(values.mean()) if len(values) else None,
            "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            "tokens_per_second": float(np.median(rates)) if rates else None,
            "difference": paired(own, losses[row["base"]], compared)
                          if row["base"] is not None else None,
            "runs": [run.result or {"seed": run.seed, "failed": run.failure}
                     for run in row["runs"]]})
    return table


def print_table(table):
    head = ["", "parameters", "cache", "seeds", "val loss (sd)", "difference (95%)", "tok/s",
            "verdict"]
    lines = [head]
    for row in table:
        loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        sd = "" if row["sd"] is None else f" ({row['sd']:.4f})"
        rate = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}"
        d = row["difference"] or {}
        mean = f"{d['mean']:+.4f}" if "mean" in d else ""
        half = "" if d.get("half") is None else f" ± {d['half']:.4f}"
        lines.append([row["name"], str(row["parameters"]), str(row["cache"]),
                      str(len(row["seeds"])), loss + sd, mean + half, rate, d.get("verdict", "")])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:]))]
        print("  ".join([*cells, line[-1]]).rstrip())
    print("cache: floats per token over all layers. Losses in nats per token; sd over seeds.")
    compared = sum(row["difference"] is not None for row in table)
    if compared > 1:
        print(f"{compared} comparisons: each interval at {100 * (1 - 0.05 / compared):.2f}%, so "
              "that together they hold at 95%.")


def warnings(rows):
    """What makes a comparison unfair, one line each"""
    for row in rows:
        failed = sum(run.result is None for run in row["runs"])
        if failed:
            yield (f"{row['name']}: {failed} of {len(row['runs'])} seeds failed; only the others "
                   "are compared, and they may be the lucky ones")
        if row["base"] is None:
            continue
        base = rows[row["base"]]
        apart = row["model"]["parameters"] / base["model"]["parameters"] - 1
        if abs(apart) > 0.02:
            yield (f"{row['name']} has {100 * apart:+.1f}% parameters beside {base['name']} "
                   f"(--match-params {base['name']} comes as close as it can)")
        if row["model"]["position"] != base["model"]["position"]:
            yield (f"{row['name']} has position {row['model']['position']}, {base['name']} "
                   f"{base['model']['position']}: the difference is that of both changes")
    on = {}
    for row in rows:
        for run in row["runs"]:
            if run.result and run.result["vector_bytes"]:
                on.setdefault(run.seed, set()).add(
                    (run.result["processor"], run.result["vector_bytes"],
                     run.result.get("compiler", "")))
    for seed, processors in sorted(on.items()):
        if len(processors) > 1:
            names = " and ".join(f"{name} ({width}-byte vectors, compiler {compiler})"
                                 for name, width, compiler in sorted(processors))
            yield f"seed {seed} was run on unlike processors or compilers: {names}"


# ---- Command line

def positive(text):
    """A whole number of at least 1, for argparse"""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected a whole number of at least 1")
    return int(text)


def lock(out):
    """Makes the folder this command's own until it and its runs end, however; else SystemExit."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = open(out / "lock", "w")
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot write there: {error.strerror}") from None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"--out {out}: another command is making runs there; wait for it, or name "
                         "another folder") from None
    Run.held = held


def seed_list(text):
    """"1-3,7" -> [1, 2, 3, 7]"""
    try:
        seeds = [seed for part in text.split(",") for first, _, last in [part.partition("-")]
                 for seed in range(int(first), int(last or first) + 1)]
    except ValueError:
        seeds = []
    if not seeds or len(seeds) > 1000:
        raise argparse.ArgumentTypeError(f"'{text}', expected seeds such as 1-5 or 1,2,7")
    return list(dict.fromkeys(seeds))


def parse_row(text):
    name, equals, options = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise argparse.ArgumentTypeError(f"'{text}', expected NAME=\"OPTIONS\"")
    return name, options


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=parse_row, metavar='NAME="OPTIONS"',
                        help="a variant and its options; all are compared with the first")
    parser.add_argument("--against", metavar="REV",
                        help="compare each row with that commit's program")
    parser.add_argument("--common", default="", metavar='"OPTIONS"', help="options of all rows")
    parser.add_argument("--seeds", type=seed_list, default=[1, 2, 3], help="1-5 or 1,2,7 (1-3)")
    parser.add_argument("--jobs", type=positive, help="runs at a time (cores / threads)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each run (1)")
    parser.add_argument("--match-params", metavar="NAME",
                        help="change ranks or channels of all other rows to have its parameters")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER",
                        help="where runs are kept (runs)")
    parser.add_argument("--plot", metavar="FILE", help="loss curves, svg or png")
    parser.add_argument("--json", metavar="FILE", help="the table and every run's figures")
    options = parser.parse_args()

    rows = options.rows or ([("default", "")] if options.against else [])
    names = [name for name, _ in rows]
    if len(rows) < (1 if options.against else 2):
        parser.error('expected at least two variants, NAME="OPTIONS" each, or --against REV')
    if len(set(names)) < len(names):
        parser.error(f"{max(names, key=names.count)}: this name is given twice")
    if options.match_params and options.match_params not in names:
        parser.error(f"--match-params {options.match_params}: expected one of {', '.join(names)}")
    jobs = options.jobs or max(1, (os.cpu_count() or 1) // options.threads)
    try:  # better missed now than after the runs
        import scipy  # noqa: F401
        import plot
        if options.plot:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}: pip install numpy scipy, and matplotlib for --plot") from None
    if options.plot:
        plot.check_format(options.plot)
    out = options.out.resolve()
    lock(out)

    program = copied(build(ROOT), out)
    old = copied(build_revision(options.against, out), out) if options.against else None
    if program == old:
        print(f"note: the program of {options.against} is this one, byte for byte")
    common, hashes, table = parse_options(options.common, "--common"), {}, []
    known = {}  # a run that two rows share is made once
    parsed = {name: {**common, **parse_options(text, name)} for name, text in rows}
    for one in parsed.values():
        add_data(one)
    if options.match_params:
        wanted = probe(program, parsed[options.match_params])["parameters"]
        for name in names:
            if name != options.match_params:
                parsed[name], took = match_parameters(program, parsed[name], wanted)
                print(f"{name}: {took}, to have {options.match_params}'s {wanted} parameters")
    for name, one in parsed.items():
        if old:
            versions = [(f"{name} {options.against}", old, None), (name, program, len(table))]
        else:
            versions = [(name, program, 0 if table else None)]
        for label, binary, base in versions:
            model = probe(binary, one)
            runs = [Run(label, binary, one, seed, model, out, hashes) for seed in options.seeds]
            runs = [known.setdefault(run.stem, run) for run in runs]
            table.append({"name": label, "base": base, "model": model, "runs": runs})
    run_all(list(known.values()), jobs, options.threads)

    summary = summarize(table)
    print_table(summary)
    for line in (noted := list(warnings(table))):
        print("note:", line)
    if options.json:
        text = json.dumps({"rows": summary, "notes": noted}, indent=1)
        Path(options.json).write_text(text + "\n")
    if options.plot:
        logs = {row["name"]: [plot.read_log(run.file(".csv"))[1]
                              for run in row["runs"] if run.result] for row in table}
        plot.draw({name: log for name, log in logs.items() if log}, options.plot)
        print(f"wrote {options.plot}")
    failed = sum(run.failure is not None for row in table for run in row["runs"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Trains with MPI on 1, 2 and 4 ranks and checks that it is the training of one process.

    python3 dev/test/mpi_test.py                builds the program with `make MPI=1` in a copy
    python3 dev/test/mpi_test.py --kills 20     so many killed ranks (default 3)

Needs a C compiler and an MPI (Debian: openmpi-bin, libopenmpi-dev); ranks may be more than cores.
What is compared with is the program built without MPI. Exit status 1 if a check fails; the last
line counts them.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive",
                   OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                   OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_hwloc_base_binding_policy="none",
                   OMPI_MCA_mpi_yield_when_idle="1")
SHAPE = ("--layers 2 --heads 4 --channels 32 --seq-len 16 --batch-size 8 --train-data text "
         "--val-data text --val-every 25 --val-batches 3 --sample-every 0 --steps 50 "
         "--learning-rate 5e-4")
KINDS = [
    "mha learned", "mha rope --order sequential", "mha decoupled", "gqa rope --grad-accum 3",
    "gqa learned --order sequential", "mqa learned --dropout 0.2", "mqa rope --grad-clip 0.5",
    "mla learned --order sequential --grad-accum 2 --dropout 0.1",
    "mla decoupled --dropout 0.1 --grad-accum 2 --grad-clip 0.5",
    "mla decoupled --q-rank 0 --latent-norm rmsnorm --layers 1", "mla decoupled --kv-heads 2",
    "mla decoupled --nope-dim 20 --rope-dim 16 --layers 3 --weight-decay 0.5",
]
FULL = "mla decoupled --dropout 0.1 --grad-accum 2 --grad-clip 0.5"
checks = failures = 0


def check(ok, what, found=""):
    global checks, failures
    checks += 1
    failures += not ok
    if not ok:
        print(f"FAILED: {what}: {found}")


def options(kind, more=""):
    """The command line of a kind: its own options, and `more`, take the place of SHAPE's."""
    attention, position, *own = kind.split()
    words = f"--attention {attention} --position {position} {SHAPE}".split() + own + more.split()
    return [word for pair in dict(zip(words[::2], words[1::2])).items() for word in pair]


def ranks_of(n, line, program="./mpi"):
    return ["mpirun", "-q", "-np", str(n), program, *line]


def rank_each(*commands):
    """One rank with each command, which may begin with options of mpirun."""
    return ["mpirun", "-q"] + " : ".join("-np 1 " + " ".join(c) for c in commands).split()


def start(command, folder):
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process, seconds=120):
    """Status, output and errors; None for the status of one that had to be killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return None, out, err + f"(no end within {seconds} s)"
    return process.returncode, out, err


def run(command, folder, seconds=120):
    return end(start(command, folder), seconds)


def processes_of(mpirun):
    return [int(pid) for pid in subprocess.run(["ps", "-o", "pid=", "--ppid", str(mpirun.pid)],
                                               text=True, stdout=subprocess.PIPE).stdout.split()]


def runs(pid):
    """Whether there is such a process, and not only what its parent has not collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def rows(path):
    """A log's rows as numbers, without its two columns of times; an empty field is None."""
    lines = [line.split(",")[:5] for line in path.read_text().splitlines() if line[:1].isdigit()]
    return [[float(field) if field else None for field in line] for line in lines]


def difference(a, b):
    """The largest between two logs in loss, validation loss and, a tenth of its part, gradient
    norm (AdamW and clipping hide a wrong scale from losses); infinite for other steps."""
    if [row[0] for row in a] != [row[0] for row in b] or not a:
        return float("inf")
    return max(max(abs(x[1] - y[1]), abs((x[4] or 0) - (y[4] or 0)), abs(x[3] / y[3] - 1) / 10)
               for x, y in zip(a, b))


def test_equality(folder):
    """In float, and in double at a rate at which small models are so unsteady that the last bit of
    a float, which the order of a sum decides, moves the losses of 50 steps by up to 0.2. In double
    two ranks complete each sum where it begins: what is added to a gradient after that is then
    missing for sure, not only if the other rank was quick to take what it had before."""
    for real, more, limit in (("", "", 1e-5), ("_double", "--learning-rate 4e-3", 1.1e-6)):
        worst = 0
        for kind in KINDS:
            for n in (0, 1, 2, 4):  # 0: the program without MPI
                line = options(kind, f"{more} --log {n}.csv --save {n}.safetensors")
                program = f"./{'at_once' if real and n == 2 else 'mpi' if n else 'alone'}{real}"
                command = ranks_of(n, line, program) if n else [program, *line]
                status, _, err = run(command, folder)
                apart = difference(rows(folder / "0.csv"), rows(folder / f"{n}.csv"))
                check(status == 0 and not err and apart <= limit,
                      f"{kind}, {n} ranks: the losses of one process", (status, err, apart))
                worst = max(worst, apart)
            same = len({(folder / f"{n}.safetensors").read_bytes() for n in (0, 1)}) == 1
            check(same, f"{kind}, one rank: the same bits as without MPI")
            for path in [*folder.glob("*.csv"), *folder.glob("*.safetensors")]:
                path.unlink()
        print(f"{len(KINDS)} kinds{real} on 1, 2, 4 ranks: losses differ by {worst:.1e} at most")


def test_bfloat16(folder):
    """The last bit of a sum may turn the rounding of a factor to 8 bits: no 1e-5 here."""
    line = options("mla decoupled", "--precision bf16 --log b.csv")
    run(["./alone", *line], folder)
    expected = rows(folder / "b.csv")
    status, _, err = run(ranks_of(2, line), folder)
    apart = difference(expected, rows(folder / "b.csv"))
    check(status == 0 and not err and apart <= 2**-10, "bf16, 2 ranks", (status, err, apart))
    print(f"bf16 on 2 ranks: losses differ by {apart:.1e} at most")


def test_threads(folder):
    """Without OMP_NUM_THREADS, ranks share out their host's cores."""
    environment = dict(ENVIRONMENT)
    del environment["OMP_NUM_THREADS"]
    count, cores = 4, len(os.sched_getaffinity(0))
    out = subprocess.run(ranks_of(count, options("mla decoupled", "--steps 1")), cwd=folder,
                         env=environment, text=True, capture_output=True).stdout
    threads = max(1, cores // count)
    check(f", {threads} thread" in out, f"{threads} threads to a rank", out)


def test_repeats(folder):
    for n in (2, 4):
        saved = []
        for name in "ab":
            run(ranks_of(n, options(FULL, f"--save {name}{n}.safetensors")), folder)
            saved.append((folder / f"{name}{n}.safetensors").read_bytes())
        check(saved[0] == saved[1], f"{n} ranks twice: the same bits")


def test_resume(folder):
    """Stopped by a signal to mpirun, a run goes on with other numbers of ranks, all but rank 0 in
    a folder where there is no checkpoint."""
    run(["./alone", *options(FULL, "--log whole.csv --steps 400")], folder)
    line = options(FULL, "--log r.csv --save r.safetensors --steps 400")
    other = folder / "other"
    other.mkdir()
    shutil.copy(folder / "text", other)
    done = 0
    for n in (4, 1, 2):
        here = ["./mpi", *line] + ["--resume"] * (n != 4)
        process = start(rank_each(here, *[["-wdir", "other", "../mpi", *here[1:]]] * (n - 1)),
                        folder)
        while n != 2 and process.poll() is None:
            time.sleep(0.002)
            if (folder / "r.csv").exists() and len(rows(folder / "r.csv")) >= done + 20:
                process.send_signal(signal.SIGUSR1)
                break
        status, out, err = end(process)
        done = len(rows(folder / "r.csv"))
        check(status == (0 if n == 2 else 128 + signal.SIGUSR1) and (n == 1 or not err)
              and out.count("saved r.safetensors") == 1 and (n == 2) == (done == 400),
              f"{n} ranks, stopped by a signal, or at the end", (status, done, out, err))
        check(not [*other.glob("r.*")], f"{n} ranks: only rank 0 writes")
    apart = difference(rows(folder / "whole.csv")[:50], rows(folder / "r.csv")[:50])
    check(apart <= 1e-5, "4 ranks, then 1: the losses of one process", apart)
    print(f"resumed with other numbers of ranks: losses differ by {apart:.1e} at most")


def test_eval(folder):
    run(["./alone", *options("mla decoupled", "--save e.safetensors")], folder)
    line = "--eval --load e.safetensors --val-data text --batch-size 8".split()
    expected = run(["./alone", *line], folder)[1].split("\nloss ")[1].split()
    for n in (1, 2, 4):
        status, out, err = run(ranks_of(n, line), folder)
        found = out.split("\nloss ")[-1].split()
        check(status == 0 and not err and found[1::2] == expected[1::2]
              and all(abs(float(a) / float(b) - 1) < 1e-6
                      for a, b in zip(found[::2], expected[::2])),
              f"--eval on {n} ranks", (status, expected, found, err))


def test_refusals(folder):
    """One line of the program's, a status of failure, an end."""
    base, far = options("mla decoupled"), folder / "far"
    far.mkdir()
    (far / "text").write_bytes((folder / "text").read_bytes()[:-1] + b"?")
    shutil.copy(folder / "mpi", folder / "mpi2")
    with open(folder / "mpi2", "ab") as file:
        file.write(b"?")
    here, wild = ["./mpi", *base], "--learning-rate 1000 --min-lr 1000 --grad-clip 0 --save nan"
    for name, command, expected in [
        ("ranks that do not divide the batch", ranks_of(3, base), "--batch-size 8: expected a "
         "multiple of the number of ranks, 3"),
        ("more ranks than rows", ranks_of(2, options("mla decoupled", "--batch-size 1")),
         "--batch-size 1: expected a multiple of the number of ranks, 2"),
        ("data that all lack", ranks_of(4, options("mla decoupled", "--train-data none")),
         "train_gpt2_mla: none: cannot open"),
        ("an option that is none", ranks_of(4, [*base, "--more"]), "--more: no such option"),
        ("--generate", ranks_of(2, "--generate 5 --load e.safetensors".split()), "one rank"),
        ("a checkpoint that is none", ranks_of(2, [*base, "--load", "text"]), "text: "),
        ("a loss of NaN", ranks_of(2, options("mla decoupled", wild)), "and not saved"),
        ("another option", rank_each(here, [*here, "--seed", "2"]), "rank 1: its command line"),
        ("help for one", rank_each(here, [*here, "--help"]), "rank 1: its command line"),
        ("another program", rank_each(here, ["./mpi2", *base]), "rank 1: its program"),
        ("other data", rank_each(here, ["-wdir", "far", "../mpi", *base]),
         "rank 1: its training data"),
        ("data that one lacks", rank_each(here, ["-wdir", "/", str(folder / "mpi"), *base]),
         "rank 1 of train_gpt2_mla: text: cannot open"),
    ]:
        status, _, err = run(command, folder, 20)
        said = [text for text in err.splitlines() if "train_gpt2_mla" in text]
        check(status and len(said) == 1 and expected in said[0], name, (status, err))
    check(not (folder / "nan").exists(), "a loss of NaN is not saved")


def test_signals(folder):
    """To one rank alone: all end after the same step, or within a validation, and rank 0 saves."""
    for i, more in enumerate(("--val-every 0 --steps 1000000", "--val-every 1 --val-batches 0")):
        process = start(ranks_of(2, options("mla decoupled", more + f" --save s{i}")), folder)
        line = ""
        while not line.startswith("step 1/"):
            line = process.stdout.readline()
        time.sleep(0.2)
        os.kill(processes_of(process)[1], signal.SIGTERM)
        status, out, err = end(process, 30)
        check(status == 143 and out.count("stopped by signal 15") == out.count(f"saved s{i}") == 1
              and (folder / f"s{i}").exists(), f"SIGTERM to one rank, {more}", (status, out, err))


def test_disk(folder):
    """A checkpoint too large for its file's limit: said once by rank 0, and the run goes on."""
    line = options("mla decoupled", "--save big.safetensors --save-every 20")
    script = "trap '' XFSZ; ulimit -f 64; exec ./mpi " + " ".join(line)
    (folder / "limited").write_text(script)
    status, out, err = run(["mpirun", "-q", "-np", "2", "sh", "limited"], folder)
    check(status == 1 and "step 50/50" in out and err.count("big.safetensors: not written") == 3
          and not (folder / "big.safetensors").exists(), "a full disk", (status, out, err))


def test_kills(folder, kills):
    line = [*options(FULL, "--steps 300 --save-every 10 --val-every 0"), "--save"]
    run(ranks_of(2, [*line, "whole.safetensors"]), folder)
    expected, slowest = (folder / "whole.safetensors").read_bytes(), 0
    draw, checkpoint = random.Random(1), folder / "k.safetensors"
    for _ in range(kills):
        checkpoint.unlink(missing_ok=True)
        loud = [word for word in ranks_of(2, [*line, "k.safetensors"]) if word != "-q"]
        process = start(loud, folder)
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        children = processes_of(process)
        os.kill(draw.choice(children), signal.SIGKILL)
        begun = time.time()
        status, _, err = end(process, 60)
        while any(map(runs, children)) and time.time() < begun + 10:
            time.sleep(0.01)
        slowest = max(slowest, time.time() - begun)
        check(status and len(children) == 2 and "signal 9" in err and slowest < 10
              and not any(map(runs, children)), "a killed rank takes all along",
              (status, children, err, slowest))
        status, _, err = run(ranks_of(2, [*line, "k.safetensors", "--resume"]), folder)
        check(status == 0 and checkpoint.read_bytes() == expected,
              "resumed after a kill: the bits of the undisturbed run", (status, err))
    print(f"{kills} killed ranks: all were gone after {slowest:.1f} s at most")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "Makefile", folder)
        source, at = (ROOT / "train_gpt2_mla.c").read_text(), "&sums[n_sums++]);"
        at_once = source.replace(at, at + " end_sums();")
        check(at_once != source, f"begin_sum has {at}")
        for program, text in (("alone", source), ("mpi", source), ("alone_double", source),
                              ("mpi_double", source), ("at_once_double", at_once)):
            (folder / "train_gpt2_mla.c").write_text(text)
            subprocess.run(["make", "-s", *["MPI=1"] * (not program.startswith("alone")),
                            *["CFLAGS=-O3 -std=c11 -DREAL_DOUBLE"] * program.endswith("double"),
                            "train_gpt2_mla"], cwd=folder, check=True)
            (folder / "train_gpt2_mla").rename(folder / program)
        (folder / "text").write_text(source[:30000])
        linked = subprocess.run(["nm", "alone"], cwd=folder, text=True, capture_output=True).stdout
        check("MPI" not in linked, "without MPI=1 nothing of it is in the program")
        for test in (test_equality, test_bfloat16, test_threads, test_repeats, test_resume,
                     test_eval, test_refusals, test_signals, test_disk):
            test(folder)
        test_kills(folder, args.kills)
    print(f"{checks - failures} passed, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Kills training again and again and checks that nothing is lost by it.

    python3 dev/test/kill_and_resume.py             100 kills, half a minute, with ./train_gpt2_mla
    python3 dev/test/kill_and_resume.py --kills 1000 --seed 7
    python3 dev/test/kill_and_resume.py --signals   those that announce an end, in turn, in place of
                                                    SIGKILL: each run must save, and say so

For every kind of attention a run of a small model, with dropout, validation and frequent saves, is
left alone once. Then the same run is killed (SIGKILL) at random moments, three times in four soon
after it began to write a checkpoint, and resumed, until it has reached its end. Its last checkpoint
must be that of the undisturbed run byte for byte, and so must its log but for the columns that hold
times. Exit status 1 if not.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM,
           signal.SIGXCPU, signal.SIGXFSZ]
ROOT = Path(__file__).resolve().parents[2]
KINDS = [
    "mha learned", "mha rope", "mha decoupled", "gqa learned", "gqa rope", "mqa learned",
    "mqa rope", "mla learned", "mla decoupled", "mla decoupled --q-rank 0 --latent-norm rmsnorm",
    "mla learned --latent-norm none", "mla decoupled --kv-heads 2",
    "mla decoupled --nope-dim 20 --rope-dim 16 --q-rank 0",
]


def command(kind, name):
    attention, position, *more = kind.split()
    return [str(ROOT / "train_gpt2_mla"), "--attention", attention, "--position", position, *more,
            *"--layers 2 --heads 4 --channels 128 --seq-len 32 --batch-size 4 --grad-accum 2 "
             "--dropout 0.1 --steps 60 --val-every 7 --val-batches 2 --sample-every 0 "
             "--save-every 2 --train-data text --val-data text".split(),
            "--save", f"{name}.safetensors", "--log", f"{name}.csv"]


def log_rows(path):
    """The log without its columns tok_per_s and seconds."""
    return [line.split(",")[:5] for line in path.read_text().splitlines()]


def run_killed(kind, folder, kills, draw, expected_seconds, signals):
    """Runs until the end with so many kills; returns kills, those during a save, and resumes."""
    checkpoint, part = folder / "killed.safetensors", folder / "killed.safetensors.tmp"
    killed = in_save = resumes = 0
    while True:
        resume = checkpoint.exists()
        if killed % 2:  # else what a killed save left behind stays
            part.unlink(missing_ok=True)
        process = subprocess.Popen(command(kind, "killed") + ["--resume"] * resume, cwd=folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        resumes += resume
        if killed < kills:
            # so that every kill is followed by a resume
            while process.poll() is None and not checkpoint.exists():
                pass
            moment = time.monotonic() + draw.uniform(0, expected_seconds / 5)
            while process.poll() is None and time.monotonic() < moment:
                pass
            if killed % 4:  # wait for a save, and hit it somewhere
                while process.poll() is None and not part.exists():
                    pass
                moment = time.monotonic() + draw.uniform(0, 0.002)
                while time.monotonic() < moment:
                    pass
            if process.poll() is None:
                number = signals[killed % len(signals)]
                process.send_signal(number)
                status, error = process.wait(), process.stderr.read()
                saved = status == 128 + number and "stopping after this step" in error
                # one at its end did not disturb it, one before its first step ended it
                begun = "step " in process.stdout.read()
                if number != signal.SIGKILL and not saved and (
                        status not in (0, -number) or (status and begun)):
                    sys.exit(f"error: {kind}: signal {number}: exit status {status}: {error}")
                killed += 1
                in_save += part.exists()
                continue
        error = process.communicate()[1]
        if process.returncode:
            sys.exit(f"error: {kind}: exit status {process.returncode} after {killed} kills: "
                     f"{error}")
        if killed >= kills:
            return killed, in_save, resumes
        checkpoint.unlink()  # it got to the end too soon: from the start again


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="in all, at least")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--signals", action="store_true", help="in place of SIGKILL")
    args = p.parse_args()
    draw = random.Random(args.seed)
    each = -(-args.kills // len(KINDS))
    totals, bad = [0, 0, 0], 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "text").write_bytes((ROOT / "README.md").read_bytes())
            start = time.monotonic()
            subprocess.run(command(kind, "whole"), cwd=folder, check=True,
                           stdout=subprocess.DEVNULL)
            counts = run_killed(kind, folder, each, draw, time.monotonic() - start,
                                SIGNALS if args.signals else [signal.SIGKILL])
            whole, killed = folder / "whole.safetensors", folder / "killed.safetensors"
            same = whole.read_bytes() == killed.read_bytes()
            same_log = log_rows(folder / "whole.csv") == log_rows(folder / "killed.csv")
        bad += not (same and same_log)
        totals = [a + b for a, b in zip(totals, counts)]
        print(f"{kind:<52} {counts[0]} kills, {counts[1]} of them during a save, "
              f"{counts[2]} resumes: checkpoint {'identical' if same else 'DIFFERS'}, "
              f"log {'identical' if same_log else 'DIFFERS'}", flush=True)
    print(f"{totals[0]} kills, {totals[1]} of them during a save, {totals[2]} resumes, "
          f"{bad} runs that differ")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

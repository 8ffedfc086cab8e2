#!/usr/bin/env python3
"""Training speed of this program against PyTorch, on the same cores, in one table.

    python3 dev/speed/training_speed.py                       four workloads, two kinds of attention
    python3 dev/speed/training_speed.py --only 384 --compile  those with 384, torch.compile too
    python3 dev/speed/training_speed.py --bf16                with products of bfloat16
    python3 dev/speed/training_speed.py --peer llmc='./train_gpt2 {threads}'
                                                              anything that prints `12.3 ms` a step

Programs take turns, round after round, so that a noisy machine is noisy to all; a cell is the
median over rounds. A step's arithmetic (6 per weight of a matrix and token, and 6 L C T for causal
attention, forward and backward) over its time is set against the multiply-add peak that
dev/speed/multiply_add_peak.c measured in the same rounds. Memory is the largest that a process ever
had. PyTorch is dev/pytorch/gpt2_mla.py.
"""

import argparse
import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {  # name: layers, heads, channels, vocabulary, batch, sequence
    "6 layers C=384 T=256": (6, 6, 384, 256, 16, 256),
    "12 layers C=768 V=50257 T=64": (12, 12, 768, 50257, 4, 64),
    "6 layers C=384 T=1024": (6, 6, 384, 256, 4, 1024),
    "4 layers C=128 V=65 T=64": (4, 4, 128, 65, 12, 64),
}
KINDS = [("mha", "learned"), ("mla", "decoupled")]


def run(command, threads):
    """Output and peak memory in MB of a command on so many threads."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    env.update(OMP_NUM_THREADS=str(threads))
    process = subprocess.Popen(command, shell=isinstance(command, str), cwd=ROOT, env=env,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {command} exited with {process.returncode}:\n{output}")
    return output, usage.ru_maxrss / 1024


def token_file(path, vocabulary, count):
    """Random tokens in llm.c's format."""
    draw = random.Random(1)
    tokens = [draw.randrange(vocabulary) for _ in range(count)]
    path.write_bytes(struct.pack("<256i", 20240520, 1, count, *[0] * 253)
                     + struct.pack(f"<{count}H", *tokens))


def flops_per_token(checkpoint, T):
    """Of a forward and a backward: 6 per weight in a matrix, 6 L C T in causal attention."""
    with open(checkpoint, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    c = header.pop("__metadata__")
    shapes = [t["shape"] for name, t in header.items() if name != "wpe.weight"]
    return (6 * sum(s[0] * s[1] for s in shapes if len(s) == 2)
            + 6 * int(c["n_layer"]) * int(c["n_embd"]) * T)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=8, help="of steps per program and round, about")
    p.add_argument("--only", default="", help="workloads whose name has this in it")
    p.add_argument("--compile", action="store_true", help="torch.compile too")
    p.add_argument("--bf16", action="store_true",
                   help="--precision bf16 beside float32, and PyTorch's autocast to bfloat16")
    p.add_argument("--no-torch", action="store_true", help="this program alone")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND",
                   help="a program that prints ms per step")
    a = p.parse_args()
    subprocess.run(["make", "-s", "train_gpt2_mla", "multiply_add_peak"], cwd=ROOT, check=True)
    print(f"{a.threads} threads, {a.rounds} rounds, medians (spread: largest over smallest)\n")
    print("| work | attention | program | tok/s | spread | of this program | of the FMA peak "
          "| memory MB |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, (L, NH, C, V, B, T) in WORKLOADS.items():
            if a.only not in name:
                continue
            data, model, log = folder / "data.bin", folder / "model.safetensors", folder / "log.csv"
            token_file(data, V, max(20000, 4 * B * T))
            for kind, position in KINDS:
                shape = (f"--attention {kind} --position {position} --layers {L} --heads {NH} "
                         f"--channels {C} --vocab-size {V}")
                run(f"./train_gpt2_mla {shape} --seq-len {T} --steps 0 --save {model}", a.threads)
                flops = flops_per_token(model, T)
                steps = max(4, int(a.seconds * 1e11 * a.threads / 2 / (flops * B * T)))
                train = (f"--load {model} --train-data {data} --batch-size {B} --seq-len {T} "
                         f"--steps {steps} --learning-rate 1e-4")
                torch = (f"{sys.executable} dev/pytorch/gpt2_mla.py train "
                         f"--threads {a.threads} {train}")
                programs = {"this": f"./train_gpt2_mla {train} --sample-every 0 --log {log}"}
                if a.bf16:
                    programs["this, bf16"] = programs["this"] + " --precision bf16"
                if a.bf16 and not a.no_torch:
                    programs["PyTorch autocast bf16"] = torch + " --bf16"
                elif not a.no_torch:
                    programs["PyTorch eager"] = torch
                if a.compile:
                    programs["PyTorch compile"] = torch + " --compile"
                programs.update(peer.split("=", 1) for peer in a.peer)
                rates, memory, peaks = {q: [] for q in programs}, {}, []
                for r in range(a.rounds):
                    peaks.append(float(run("./multiply_add_peak", a.threads)[0]))
                    for q, command in programs.items():
                        print(f"{name} {kind}: round {r + 1}/{a.rounds}, {q} ...", end="\r",
                              file=sys.stderr)
                        output, memory[q] = run(command.replace("{threads}", str(a.threads)),
                                                a.threads)
                        if q.startswith("this"):
                            rate = statistics.median(
                                float(line.split(",")[5]) for line in log.read_text().splitlines()
                                if line[0].isdigit() and line[:2] != "1,")
                        elif q.startswith("PyTorch"):
                            rate = float(re.search(r"median of steps .*: ([\d.]+) tok/s",
                                                   output.replace(",", "")).group(1))
                        else:
                            times = [float(x) for x in re.findall(r"([\d.]+) ms", output)]
                            rate = B * T * 1000 / statistics.median(times[1:] or times)
                        rates[q].append(rate)
                peak, mine = statistics.median(peaks), statistics.median(rates["this"])
                for q, x in rates.items():
                    rate = statistics.median(x)
                    print(f"| {name} | {kind} {position} | {q} | {rate:.0f} "
                          f"| {max(x) / min(x):.2f} | {rate / mine:.2f} "
                          f"| {100 * rate * flops / peak / 1e9:.0f}% of {peak:.0f} "
                          f"| {memory[q]:.0f} |", flush=True)


if __name__ == "__main__":
    main()

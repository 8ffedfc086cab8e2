#!/usr/bin/env python3
"""Measures training over MPI, and what a model of the step time says of it.

    python3 dev/speed/mpi_speed.py host       ranks x threads on this machine's cores
    python3 dev/speed/mpi_speed.py net        over network namespaces, hosts of their own (root)
    python3 dev/speed/mpi_speed.py write      the tables of doc/mpi.md, from the results
    python3 dev/speed/mpi_speed.py check      whether they say what the results do

`host --cores 16` takes so many cores; `net --hosts 2 4 --mbit 100 1000 --delay-us 0` those values;
`--seq-len 64`, where the machine is slow or busy, a quarter of the tokens for the same gradients.
Results go to dev/speed/mpi.csv, where they replace rows of the same place. Each is measured with
sums under way during the backward and (a line of the program changed) without. Needs a C compiler
and an MPI; net: root, iproute2, and tbf and tun in the kernel. Exit status 1 if a run fails,
or a table is not up to date.
"""

import argparse
import csv
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "dev" / "speed" / "mpi.csv", ROOT / "doc" / "mpi.md"
COLUMNS = ["processor", "place", "cores", "ranks", "threads", "mbit", "delay_us", "overlap",
           "seq_len", "parameters", "seconds", "compute", "bandwidth"]
BATCH, LAYERS, REST = 16, 6, 258 * 384  # rows; of MODEL; its parameters outside the layers
MODEL = ("--attention mla --layers 6 --heads 6 --channels 384 --sample-every 0 --train-data text"
         .split())
ENVIRONMENT = dict(os.environ, OMP_WAIT_POLICY="passive", OMPI_ALLOW_RUN_AS_ROOT="1",
                   OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_rmaps_base_oversubscribe="1",
                   OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_hwloc_base_binding_policy="none")

# What a process takes for 64 MB to another: it listens, or sends and prints bytes per second.
TRANSFER = """
import socket, sys, time
at, n = (sys.argv[2], 5999), 64 << 20
if sys.argv[1] == "listen":
    s = socket.create_server(at); print("ready", flush=True); c, _ = s.accept()
    while n: n -= len(c.recv(1 << 20))
    c.send(b"!")
else:
    s, data = socket.create_connection(at), b"x" * n; t = time.time()
    s.sendall(data); s.recv(1); print(n / (time.time() - t))
"""

# A switch that delivers frames late: between hosts' network devices, which are made here. A host's
# number is the last byte of its address.
SWITCH = """
import collections, fcntl, os, select, struct, sys, time
hosts, delay, late = [], float(sys.argv[2]), collections.deque()
for i in range(int(sys.argv[1])):
    hosts.append(os.open("/dev/net/tun", os.O_RDWR))
    fcntl.ioctl(hosts[-1], 0x400454ca, struct.pack("16sH22x", b"mlat%d" % (i + 1), 0x1002))  # a tap
print("made", flush=True)
sys.stdin.readline()  # until they are up
while True:
    wait = max(0, late[0][0] - time.time()) if late else None
    for host in select.select(hosts, [], [], wait)[0]:
        late.append((time.time() + delay, host, os.read(host, 1 << 16)))
    while late and late[0][0] <= time.time():
        _, host, frame = late.popleft()
        for other in [h for h in hosts if h != host] if frame[0] & 1 else [hosts[frame[5] - 1]]:
            os.write(other, frame)
"""


def bandwidth(address, listener=(), sender=()):
    """Bytes per second over TCP; listener and sender are commands to be put in front."""
    python = [sys.executable, "-c", TRANSFER]
    with subprocess.Popen([*listener, *python, "listen", address], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        return float(subprocess.run([*sender, *python, "send", address], check=True,
                                    capture_output=True, text=True).stdout)


def build(folder):
    """`mpi` and `blocking`, which waits for each sum where it begins."""
    source, at = (ROOT / "train_gpt2_mla.c").read_text(), "&sums[n_sums++]);"
    assert source.count(at) == 1
    shutil.copy(ROOT / "Makefile", folder)
    for name, text in (("blocking", source.replace(at, at + " end_sums();")), ("mpi", source)):
        (folder / "train_gpt2_mla.c").write_text(text)
        subprocess.run(["make", "-s", "MPI=1", "train_gpt2_mla"], cwd=folder, check=True)
        (folder / "train_gpt2_mla").rename(folder / name)
    (folder / "text").write_text(source)


def step_seconds(folder, commands, rows, threads, args):
    """Of the steps but the first of runs side by side, in each the slowest; the parameters."""
    runs, seconds = [], []
    for i, command in enumerate(commands):
        (folder / f"{i}.csv").unlink(missing_ok=True)
        runs.append(subprocess.Popen(
            [*command, *MODEL, "--batch-size", str(rows), "--log", f"{i}.csv", "--steps",
             str(args.steps), "--seq-len", str(args.seq_len)], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=dict(ENVIRONMENT, OMP_NUM_THREADS=str(threads))))
    for i, run in enumerate(runs):
        out, err = run.communicate()
        if run.returncode:
            sys.exit(f"mpi_speed.py: {' '.join(commands[i])}: {err.strip()}")
        lines = [line.split(",") for line in (folder / f"{i}.csv").read_text().splitlines()
                 if line[:1].isdigit()]
        seconds.append([rows * args.seq_len / float(line[5]) for line in lines[1:]])
    return list(map(max, zip(*seconds))), re.search(r"(\d+) parameters", out).group(1)


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown"


def measure(folder, place, launcher, ranks, threads, mbit, link, args):
    """Two rows: with overlap and without. Compute: as many processes that share nothing. The three
    take turns; medians."""
    seconds = {"alone": [], "mpi": [], "blocking": []}
    for _ in range(args.rounds):
        for program, took in seconds.items():
            commands, rows = [[*launcher, f"./{program}"]], BATCH
            if program == "alone":
                commands, rows = [["./mpi"]] * ranks, BATCH // ranks
            steps, parameters = step_seconds(folder, commands, rows, threads, args)
            took += steps
    compute = statistics.median(seconds.pop("alone"))
    for program, took in seconds.items():
        row = dict(zip(COLUMNS, map(str, (
            processor(), place, args.cores, ranks, threads, mbit, args.delay_us,
            int(program == "mpi"), args.seq_len, parameters, f"{statistics.median(took):.4f}",
            f"{compute:.4f}", f"{link:.4g}"))))
        keep(row)
        print(",".join(row.values()), flush=True)


def results():
    return list(csv.DictReader(open(RESULTS))) if RESULTS.exists() else []


def keep(row):
    key = COLUMNS[:COLUMNS.index("parameters")]
    rows = [r for r in results() if any(r[k] != row[k] for k in key)] + [row]
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def host(args, folder):
    link = bandwidth("127.0.0.1")
    splits = [(n, max(args.cores // n, 1)) for n in (1, 2, 4, 8, 16)
              if args.cores % n == 0 or n == 2 * args.cores]
    for ranks, threads in splits:
        measure(folder, "host", ["mpirun", "-q", "-np", str(ranks)], ranks, threads, 0, link, args)


def shell(command):
    done = subprocess.run(command, shell=True, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"mpi_speed.py: {command}: {done.stderr.strip()}, expected success (a kernel "
                 "without this kind of queue cannot measure it)")


def net(args, folder):
    """Hosts mla1, mla2, ... are network namespaces; tbf limits what each sends, a switch of ours
    delays it. mpirun starts its daemons there by an agent in ssh's place."""
    agent = folder / "agent"
    agent.write_text('#!/bin/sh\nhost=mla${1##*.}; shift\nexec ip netns exec $host unshare -u '
                     'sh -c "hostname $host; $*"\n')
    agent.chmod(0o755)
    inside = ["ip", "netns", "exec", "mla1", "unshare", "-u", "sh", "-c",
              'hostname mla1; exec "$@"', "sh"]
    hosts = range(1, max(args.hosts) + 1)
    switch = subprocess.Popen([sys.executable, "-c", SWITCH, str(max(hosts)),
                               str(args.delay_us / 1e6)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        switch.stdout.readline()
        for i in hosts:  # large frames, so that the switch takes little of the cores' time
            shell(f"ip netns add mla{i} && ip link set mlat{i} netns mla{i}"
                  f" && ip netns exec mla{i} sh -c 'ip link set lo up"
                  f" && ip link set mlat{i} mtu 60000 address 02:00:00:00:00:{i:02x} up"
                  f" && ip addr add 10.91.0.{i}/24 dev mlat{i}'")
        switch.stdin.write(b"\n")
        switch.stdin.flush()
        for mbit in args.mbit:
            for i in hosts:
                shell(f"tc -n mla{i} qdisc replace dev mlat{i} root handle 1:"
                      f" tbf rate {mbit}mbit burst 256kb latency 50ms")
            link = bandwidth("10.91.0.1", ["ip", "netns", "exec", "mla1"],
                             ["ip", "netns", "exec", "mla2"])
            for n in args.hosts:
                names = ",".join(f"10.91.0.{i}" for i in range(1, n + 1))
                launcher = [*inside, "mpirun", "-q", "--host", names, "-np", str(n), "--mca",
                            "plm_rsh_agent", str(agent), "--mca", "btl", "self,tcp", "--mca", "pml",
                            "ob1", "--mca", "btl_tcp_if_include", "10.91.0.0/24", "--mca",
                            "oob_tcp_if_include", "10.91.0.0/24"]
                measure(folder, "net", launcher, n, 1, mbit, link, args)
    finally:
        switch.kill()
        for i in hosts:
            subprocess.run(["ip", "netns", "del", f"mla{i}"], stderr=subprocess.DEVNULL)


# --- The model of the step time

def predict(compute, ranks, link, delay, layer, rest, layers, overlap=True):
    """Seconds of a step. compute: of a rank's rows alone, a third of it the forward; link: bytes
    per second; delay: seconds; layer, rest: bytes of a layer's gradients, and of those outside the
    layers. The backward passes the head, then the layers, each for as long as it has bytes. Sums
    take turns on the link; a layer's begins when its backward is done."""
    def ring(size):
        return 2 * (ranks - 1) * (size / ranks / link + delay)
    sizes = [layer] * (layers - 1) + [layer + rest]
    if not overlap:
        return compute + sum(map(ring, sizes))
    part = compute * 2 / 3 * layer / (layers * layer + rest)
    now, free = compute - layers * part, 0
    for size in sizes:
        now += part
        free = max(free, now) + ring(size)
    return max(compute, free)


def table(head, lines):
    rule = "|---" + "|--:" * (len(head) - 1) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule,
                      *("| " + " | ".join(line) + " |" for line in lines)])


def measured(place):
    lines = []
    for r in sorted((r for r in results() if r["place"] == place),
                    key=lambda r: (int(r["cores"]), int(r["mbit"]), int(r["delay_us"]),
                                   int(r["ranks"]), -int(r["overlap"]))):
        layer = 4 * (int(r["parameters"]) - REST) / LAYERS
        expected = predict(float(r["compute"]), int(r["ranks"]), float(r["bandwidth"]),
                           int(r["delay_us"]) / 1e6, layer, 4 * REST, LAYERS, r["overlap"] == "1")
        took = float(r["seconds"])
        lines.append([f"{r['ranks']} x {r['threads']}", r["cores"], r["seq_len"],
                      *([r["mbit"], r["delay_us"]] if place == "net" else []),
                      "yes" if r["overlap"] == "1" else "no", f"{float(r['compute']):.3f}",
                      f"{took:.3f}", f"{expected:.3f}", f"{100 * (expected / took - 1):+.0f}%"])
    network = ["Mbit/s", "us"] if place == "net" else []
    return table(["ranks x threads", "cores", "T", *network, "overlap", "compute", "step",
                  "predicted", "error"], lines)


def carried():
    """Speedup over one host, where each computes as one rank did on the most cores measured."""
    one = max((r for r in results() if r["place"] == "host" and r["ranks"] == "1"),
              key=lambda r: int(r["cores"]))
    per_token = float(one["compute"]) / BATCH / int(one["seq_len"])
    per_token /= int(one["parameters"])  # and parameter: of both, work is about their product
    lines = []
    for name, layers, layer, rest, rows, T in (
            ("this model, 1,024 rows of 256", LAYERS, (int(one["parameters"]) - REST) / LAYERS,
             REST, 1024, 256),
            ("GPT-2 124M, 1,024 rows of 1,024", 12, 7087872, 39385344, 1024, 1024)):
        alone = per_token * (layers * layer + rest) * rows * T
        for hosts in (8, 64, 256, 1024):
            cells = []
            for gbit in (1, 10, 100):
                took = predict(alone / hosts, hosts, gbit * 1e9 / 8, 20e-6, 4 * layer, 4 * rest,
                               layers)
                cells.append(f"{alone / took:.0f} ({100 * alone / took / hosts:.0f}%)")
            lines.append([name, str(hosts), *cells])
    return table([f"model and batch; hosts of {one['cores']} cores", "hosts", "1 Gbit/s",
                  "10 Gbit/s", "100 Gbit/s"], lines)


def page():
    text = PAGE.read_text()
    for name, rows in (("host", measured("host")), ("net", measured("net")),
                       ("carried", carried())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + "\n\n" + rows + "\n\n" + end + rest.split(end)[1]
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["host", "net", "write", "check"])
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--delay-us", type=int, default=0)
    args = parser.parse_args()
    if args.what == "write":
        PAGE.write_text(page())
    elif args.what == "check":
        if PAGE.read_text() != page():
            sys.exit("doc/mpi.md: its tables are not those of dev/speed/mpi.csv, expected "
                     "`mpi_speed.py write` to change nothing")
    else:
        with tempfile.TemporaryDirectory() as name:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without cleaning up
            build(Path(name))
            (host if args.what == "host" else net)(args, Path(name))


if __name__ == "__main__":
    main()

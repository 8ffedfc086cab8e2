"""Tests of compare.py, plot.py and experiments.py: statistics, runs that stop or fail. A minute.

    python3 dev/test/compare_test.py         with the program in the top folder; numpy, scipy
"""

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import compare  # noqa: E402
import experiments  # noqa: E402
import plot  # noqa: E402

TINY = "--layers 1 --channels 16 --heads 2 --seq-len 16 --val-batches 1"


def test_statistics():
    draw = np.random.default_rng(1)
    a = {seed: draw.normal() for seed in range(8)}
    b = {seed: a[seed] + 0.01 * draw.normal() for seed in range(1, 9) if seed in a}
    found = compare.paired(b, a, 1)
    d = [b[seed] - a[seed] for seed in range(1, 8)]
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert found["seeds"] == list(range(1, 8))
    assert np.allclose([found["mean"] - found["half"], found["mean"] + found["half"]], [low, high])
    n = found["seeds_needed"]
    reach = lambda n: stats.t.ppf(0.975, n - 1) * np.std(d, ddof=1) / n ** 0.5
    assert reach(n) <= compare.SMALL_DIFFERENCE < reach(n - 1)
    assert compare.paired(b, a, 5)["half"] > found["half"] * 1.2
    assert compare.paired(a, a, 1)["verdict"] == "exactly the same"
    worse = {seed: value + 1 for seed, value in b.items()}
    assert compare.paired(worse, a, 1)["verdict"] == "worse"
    assert compare.paired(a, worse, 1)["verdict"] == "better"
    assert compare.paired({1: 2.0}, {1: 1.0}, 1)["half"] is None
    # Of intervals around draws without a difference, one in twenty leaves out 0.
    outside = 0
    for _ in range(2000):
        noise = {seed: draw.normal() for seed in range(5)}
        verdict = compare.paired(noise, dict.fromkeys(range(5), 0.0), 1)["verdict"]
        outside += verdict in ("better", "worse")
    assert 60 < outside < 140, outside  # 100 +- 4 standard deviations


def run(*arguments, folder):
    ran = subprocess.run([sys.executable, ROOT / "dev/compare.py", *arguments], cwd=folder,
                         capture_output=True, text=True)
    return ran.returncode, ran.stdout, ran.stderr


def test_runs(folder):
    data = folder / "text"
    data.write_bytes((ROOT / "train_gpt2_mla.c").read_bytes()[:20000])
    common = f"--train-data {data} --val-data {data} {TINY}"
    rows = ["a=--attention mha", "b=--learning-rate 900 --weight-decay 900 --grad-clip 0"]
    status, out, err = run(*rows, "--common", common + " --steps 30", "--seeds", "1-2", "--json",
                           "o.json", "--plot", "c.svg", folder=folder)
    table = json.loads((folder / "o.json").read_text())["rows"]
    assert status == 1 and "b seed 1: failed: train_gpt2_mla: step" in err, err
    assert table[0]["seeds"] == [1, 2] and table[1]["seeds"] == [], "a's runs are whole"
    assert "note: b: 2 of 2 seeds failed" in out, out
    assert (folder / "c.svg").read_text().startswith("<?xml")
    status, out, err = run(rows[0], "c=--attention mha --position learned", "--common",
                           common + " --steps 30", "--seeds", "1-2", folder=folder)
    assert status == 0 and "2 of 4 runs are done already" in err, err
    assert "note: c has position learned, a rope" in out, out

    # A run that is stopped goes on, and ends as one that was left alone.
    long = ["d=--attention mqa", "e=--attention mqa --seq-len 8", "--common",
            common + " --steps 6000", "--seeds", "1", "--json", "long.json"]
    started = subprocess.Popen([sys.executable, ROOT / "dev/compare.py", *long], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((folder / "runs").glob("*.csv")) or started.poll() is None and not any(
            log.read_text().count("\n") > 60 and not log.with_suffix(".json").exists()
            for log in (folder / "runs").glob("*.csv")):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    said, status = started.stderr.read(), started.wait()
    assert status == 130 and "the same command goes on" in said, (status, said)
    assert not (folder / "long.json").exists()
    assert run(*long, folder=folder)[0] == 0
    resumed = json.loads((folder / "long.json").read_text())["rows"]
    assert run(*long, "--out", "other", folder=folder)[0] == 0
    alone = json.loads((folder / "long.json").read_text())["rows"]
    assert [row["val_loss"] for row in resumed] == [row["val_loss"] for row in alone]


def test_against(folder):
    """A change that does nothing: the same bytes, or other bytes of the same arithmetic."""
    if not (ROOT / ".git").exists():
        print("test_against: not run, this is no clone")
        return
    data, tree = folder / "text", folder / "tree"
    data.write_bytes((ROOT / "train_gpt2_mla.c").read_bytes()[:20000])
    subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
    program, help_text = tree / "train_gpt2_mla.c", '"this text"'
    for change in ("// nothing\n", '"this very text"'):
        text = program.read_text()
        assert text.count(help_text) == 1
        program.write_text(change + text if change[0] == "/" else text.replace(help_text, change))
        ran = subprocess.run(
            [sys.executable, "dev/compare.py", "--against", "HEAD", "--seeds", "1-2", "--common",
             f"--train-data {data} --val-data {data} {TINY} --steps 30", "--json", "o.json"],
            cwd=tree, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        old, new = json.loads((tree / "o.json").read_text())["rows"]
        assert (old["name"], new["name"]) == ("default HEAD", "default"), ran.stdout
        assert new["difference"]["verdict"] == "exactly the same", ran.stdout
        assert ("byte for byte" in ran.stdout) == (change[0] == "/"), ran.stdout


def test_keys(folder):
    """What else a run is known by: its data's bytes, and on a GPU PyTorch's script and how."""
    data, program = folder / "data", str(ROOT / compare.PROGRAM)
    options = {"--train-data": str(data), "--val-data": str(data)}

    def made(kind=compare.Run, seed=1, **more):
        return kind("a", program, options, seed, {}, folder, {}, **more)

    data.write_text("one")
    first = made().stem
    assert first == made().stem != made(seed=2).stem
    first.with_name(first.name + ".json").write_text('{"val_loss": 1}')
    torch = made(experiments.Torch, extra=["--graph"])
    assert made().result and torch.result is None and torch.stem != first
    assert torch.stem != made(experiments.Torch, extra=["--bf16"]).stem
    data.write_text("two")
    assert made().stem != first


def test_rates(folder):
    """The rate with the least mean; none while one of its runs is missing."""
    losses = {"3e-3": [3, 3, 3, 3], "4e-3": [2, 2, 2, 9], "6e-3": [3, 2, 2, 3]}
    text = experiments.KINDS["mha rope"]
    for rate, values in losses.items():
        for seed, loss in zip(experiments.RATE_SEEDS, values):
            assert experiments.rate_of("mha rope", text, folder) == "4e-3"
            experiments.add_result("rates", {"row": "mha rope", "seed": seed, "val_loss": loss,
                                             "learning_rate": rate}, folder)
    assert experiments.rate_of("mha rope", text, folder) == "6e-3"
    assert experiments.rate_of("mha rope, wider", text + " --channels 136", folder) == "6e-3"
    assert experiments.rate_of("x", "--learning-rate 1e-3", folder) == "1e-3"


def test_refusals(folder):
    compare.lock(folder / "runs")
    status, out, err = run("a=", "b=", folder=folder)
    assert status and "another command is making runs there" in err, err
    compare.Run.held.close()
    compare.Run.held = None
    for arguments, line in [
            (["a=--attention mha"], "at least two variants"),
            (["a=", "a="], "a: this name is given twice"),
            (["a=--seed 1", "b="], "a: --seed: expected options of a training run"),
            (["a=--attention", "b="], "a: --attention: its value is missing"),
            (["a=", "b=", "--common", "--train-data no --val-data no"], "no: no such file"),
            (["--against", "nothing"], "--against nothing: no such commit"),
            (["a=", "b=", "--jobs", "0"], "'0', expected a whole number of at least 1"),
            (["a=", "b='"], "No closing quotation"),
            (["a=--steps x", "b="], "a: --steps x: expected at least 1"),
            (["a=", "b=", "--plot", "x.xyz"], "x.xyz: expected a name that ends in .svg"),
            (["a=", "b=", "--seeds", "x"], "'x', expected seeds such as"),
            (["a=--attention mha --kv-heads 2", "b=", "--common",
              f"--train-data {folder / 'text'} --val-data {folder / 'text'}"],
             "kv-heads 2: mha has 4")]:
        status, out, err = run(*arguments, folder=folder)
        assert status and line in err and "Traceback" not in err, (arguments, err)


def test_matching(folder):
    program = str(ROOT / compare.PROGRAM)
    for text, knob in [("--attention mla", "--kv-rank"),
                       ("--attention mqa", "--channels")]:
        options, took = compare.match_parameters(program, compare.parse_options(text, ""), 826112)
        unit = 1 if knob == "--kv-rank" else 8
        beside = [{**options, knob: str(int(options[knob]) + by * unit)} for by in (-1, 0, 1)]
        off = [abs(compare.probe(program, one)["parameters"] - 826112) for one in beside]
        assert took.startswith(knob) and min(off) == off[1], (took, off)


def test_plot(folder):
    logs = sorted((folder / "runs").glob("*.csv"))
    said, columns = zip(*map(plot.read_log, logs))
    assert all(one["n_layer"] == "1" for one in said) and len(columns[0]["step"])
    labels = plot.labels(logs, said)
    assert len(set(labels)) == len(labels), labels
    (folder / "bad.csv").write_text("1,2\n")
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            plot.read_log(folder / "bad.csv")
        except SystemExit as error:
            assert "expected a log" in str(error)
        else:
            raise AssertionError("a file that is no log was read")


def main():
    compare.build(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_statistics()
        for test in (test_runs, test_against, test_keys, test_rates, test_refusals, test_matching,
                     test_plot):
            test(folder)
            print(f"{test.__name__}: as expected", flush=True)


if __name__ == "__main__":
    main()

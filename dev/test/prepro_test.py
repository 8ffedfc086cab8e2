#!/usr/bin/env python3
"""Tests prepro_tinyshakespeare.py on texts of its own, without a network: what is in the files, how
the split falls, and that a text takes at most five times its size in memory. What has to do with a
BPE needs a package (pip install tokenizers), and is left out without it."""

import contextlib
import importlib.util
import os
import random
import resource
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import prepro_tinyshakespeare as prepro

prepro.say = lambda *what, **how: None
PREPRO = [sys.executable, ROOT / "prepro_tinyshakespeare.py"]
BLANKS = "       \n\n\t\r\x85\xa0\u1680\u2000\u200a\u2028\u202f\u205f\u3000"


def expect(holds, what):
    if not holds:
        sys.exit(f"FAILED: {what}")


def prepare(folder, texts, *options):
    """The ids in the train and val files, the tokens, and what was printed; or an error's line."""
    names = [Path(folder, f"{i}.txt") for i in range(len(texts))]
    for name, text in zip(names, texts):
        name.write_bytes(text)
    terminal, its_end = os.openpty()  # progress is for terminals
    run = subprocess.Popen([*PREPRO, "--out-dir", folder, *[f"--input={name}" for name in names],
                            *options], stdout=its_end, stderr=subprocess.PIPE, text=True)
    os.close(its_end)
    said = b""
    with contextlib.suppress(OSError):  # its end, when the program's is closed
        while chunk := os.read(terminal, 65536):
            said += chunk
    os.close(terminal)
    error = run.communicate()[1]
    if run.returncode:
        return error
    train, val = (array("H", Path(folder, f"tinyshakespeare_{part}.bin").read_bytes()[1024:])
                  for part in ("train", "val"))
    known, tokens = Path(folder, "tinyshakespeare_tokenizer.bin").read_bytes()[1024:], []
    while known:
        tokens.append(known[1:1 + known[0]])
        known = known[1 + known[0]:]
    return train.tolist(), val.tolist(), tokens, said.decode().replace("\r\n", "\n")


def random_text(draw, letters, n_words):
    words = ["".join(draw.choices(letters, k=draw.randrange(1, 9))) for _ in range(500)]
    return "".join(draw.choice(words) + "".join(draw.choices(BLANKS, k=draw.choice([1, 1, 2])))
                   for _ in range(n_words))


def test_bytes(folder):
    """One text as it is, a newline between two; a split within a text and between two."""
    long = b"0123456789" * 9
    for texts, train, val in [([long + b"abcdefghij"], long, b"abcdefghij"),
                              ([b"x" * 45, b"y" * 55], b"x" * 45 + b"\n" + b"y" * 45, b"y" * 10),
                              ([long, b"z" * 10], long, b"z" * 10),
                              ([b"", long, b"a" * 5, b"b" * 5], long, b"aaaaa\nbbbbb"),
                              ([long[:88] + b"\xe4\xb8\x96" * 4], long[:88], b"\xe4\xb8\x96" * 4),
                              ([b"ab\xff" * 40], b"ab\xff" * 36, b"ab\xff" * 4)]:
        found = prepare(folder, texts)
        expect(found[:2] == (list(train), list(val)), f"{texts}: {found}")
        expect("tokens of the train part: " in found[3] and "(100%)\n" in found[3], found[3])
    for texts in ([b"x"], [b"", b"x"]):
        expect("found 1 bytes, expected enough text to split in two" in prepare(folder, texts),
               texts)


def test_files(folder):
    """Links and read-only files stay, and what is no such file; a reader that ends does not end it;
    no progress in a pipe."""
    text = Path(folder, "text")
    text.write_bytes(b"0123456789" * 10)
    val = Path(folder, "tinyshakespeare_val.bin")
    val.rename(Path(folder, "linked"))
    val.symlink_to("linked")
    command = [*PREPRO, "--out-dir", folder, "--input", text]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    expect(val.is_symlink() and "%" not in run.stdout, run.stdout)
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    expect(run.returncode == 0 and run.stderr.count("\n") == 1, run.stderr)
    val.chmod(0o444)
    run = subprocess.run(command, capture_output=True, text=True)
    expect(run.returncode == 1 and run.stderr.endswith("is read-only; will not replace it\n"),
           run.stderr)
    val.unlink()
    train = Path(folder, "tinyshakespeare_train.bin")
    train.unlink()
    for there, line in ((val.mkdir, "no regular file"), (lambda: val.write_text("precious"),
                                                         "no file of this program")):
        there()
        run = subprocess.run(command, capture_output=True, text=True)
        expect(run.returncode == 1 and run.stderr.count("\n") == 1 and line in run.stderr and
               not train.exists(), run.stderr)
        val.rmdir() if val.is_dir() else val.unlink()
    odd = os.fsencode(text) + b"\xff\n"
    Path(os.fsdecode(odd)).write_bytes(b"a" * 99)
    run = subprocess.run([*PREPRO, "--out-dir", folder, "--input", odd], capture_output=True)
    expect(run.returncode == 0 and rb"text\udcff\n is not" in run.stdout, run.stderr)
    run = subprocess.run([*command, "--input", text], capture_output=True, text=True)
    expect(run.returncode == 1 and run.stderr.endswith("text: given twice\n"), run.stderr)
    val.unlink()


def test_chunks(draw):
    """They are the text, and no cut lies beside a blank that might go with what is before it."""
    text = random_text(draw, "abc\xe9\u4e16\u300c\u300d1\u0663.'", 40000).encode()
    parts = [chunk for _, chunk in prepro.chunks([(True, text)], "chunks")]
    expect(b"".join(parts) == text and len(parts) > 9, f"{len(parts)} chunks")
    for cut in prepro.CUT.finditer(text):
        before = text[:cut.end()][-4:].decode(errors="ignore")
        expect(not before[-1].isspace() and text[cut.end()] in b" \n", f"cut after {before!r}")


def test_bpe(folder, draw):
    """End of text before each text, what is between are the ids of the whole; several chunks."""
    texts = [random_text(draw, "abc\xe9\u4e16\u300c\u300d1\u0663.'", n) for n in (20000, 9000, 300)]
    found = prepare(folder, [text.encode() for text in texts], "--vocab", "400")
    expect(len(found) == 4, found)
    train, val, tokens, _ = found
    eot = 399
    expect(tokens[eot] == b"<|endoftext|>" and len(tokens) == 400, tokens[-1])
    expect(train.count(eot) == 2 and train[0] == eot and val.count(eot) == 1, "ends of text")
    parts = prepro.split({i: text.encode() for i, text in enumerate(texts)})
    known, eot, encode = prepro.bpe_tokenizer(parts[0], 400)
    expect(known == tokens, "the same vocabulary again")
    for part, ids in zip(parts, (train, val)):
        whole = [i for begins, text in part for i in [eot] * begins + encode(bytes(text))]
        expect(ids == whole, "the ids of chunks are those of the whole")
    expect("found byte 0xff at offset 3, expected UTF-8" in
           prepare(folder, [b"abc", b"abc\xff"], "--vocab", "300"), "no UTF-8")


def test_memory(folder, draw):
    text = random_text(draw, "abcdefgh", 40_000).encode("ascii", "replace") * 100
    expect(len(prepare(folder, [text])) == 4, "a large text")
    unit = 1 if sys.platform == "darwin" else 1024
    times = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / len(text)
    expect(times < 5, f"memory for {len(text)} bytes: {times:.1f} times that")
    return f"{times:.1f} times the memory of {len(text) / 1e6:.0f} MB"


def main():
    bpe = importlib.util.find_spec("tokenizers")
    with tempfile.TemporaryDirectory() as folder:
        memory = test_memory(folder, random.Random(1))  # first: the largest of all runs counts
        test_bytes(folder)
        test_files(folder)
        test_chunks(random.Random(2))
        if bpe:
            test_bpe(folder, random.Random(3))
    print(f"prepro_tinyshakespeare.py: all as expected, {memory}"
          f"{'' if bpe else '; its BPE left out (pip install tokenizers)'}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Tests dev/novels.py in a second, without a network, on made-up books in Gutenberg's forms."""

import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import novels

novels.SMALLEST = 250
novels.print = lambda *what, **how: None
HEAD = "Title: Emma\n\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n\n"
TAIL = "\n\n***END OF THIS PROJECT GUTENBERG EBOOK EMMA***\n\nLicense"
BOOK = HEAD + ("E-text prepared by A.\nand B.\n\n\n  EMMA\n\n\n\n\nOne.\n\nProduced by us.\n\n"
               "[Project Gutenberg Editor's Note]\n\nD\xe9j\xe0\xa0vu: \xa35.  \n\n"
               "End of Project Gutenberg's Emma") + TAIL
NOVEL = "  EMMA\n\n\nOne.\n\nProduced by us.\n\nDeja vu: L5."
SIGNS = "\u201cNa\xefve\u201d\u2014it\u2019s 2\xbd \u4e00caf\xe9s, \xc6sop"
PLAIN = '"Naive"--it\'s 2 1/2 cafes, AEsop'


def expect(expected, what, *arguments):
    """The result of what, or its error, must be expected; or begin so, if expected ends in ..."""
    try:
        found = what(*arguments)
    except (SystemExit, ValueError) as e:
        found = str(e)
    if found != expected and not (expected[-3:] == "..." and found.startswith(expected[:-3])):
        sys.exit(f"FAILED: expected {expected!r}, found {found!r}")


def run(*options):
    sys.argv[1:] = options
    novels.main()


for raw, expected in [
        (BOOK.encode("latin-1"), NOVEL),
        (BOOK.replace("One.", SIGNS).encode(), NOVEL.replace("One.", PLAIN)),
        (b" <!DOCTYPE html><title>Emma", "found an HTML page in 27 bytes..."),
        (BOOK.replace("Emma", "Ulysses").replace("EMMA", "ULYSSES").encode(), "found Ulysses,..."),
        (BOOK.encode()[:200], "found 200 bytes that stop before Gutenberg's END line..."),
        ((HEAD + TAIL).encode(), f"found {len(HEAD + TAIL)} bytes, expected 250...")]:
    expect(expected, novels.novel, raw, "Emma")
with tempfile.TemporaryDirectory() as name, socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))  # no one listens there
    network = "--mirror", f"http://127.0.0.1:{closed.getsockname()[1]}", "--out-dir", name
    expect(f"error: 2600 War and Peace: cannot reach {network[1]}...", run, *network)
    expect("error: 2600 War and Peace: cannot read x/2600.txt: ...", run, "--folder", "x")
    for number, title in [book for part in novels.BOOKS.values() for book in part.items()]:
        text = "\ufeff" + BOOK.replace("Emma", title).replace("\n", "\r\n")
        novels.write_files({f"{name}/novels_raw/{number}.txt": text.encode()})
    run(*network)  # needs none: it finds novels_raw in --out-dir
    for part, books in novels.BOOKS.items():
        text = "\n\n\n".join([NOVEL] * len(books)) + "\n"
        expect(text, Path(name, f"novels_{part}.txt").read_text)
print("dev/novels.py: all as expected")

#!/usr/bin/env python3
"""The C code's encoder beside tiktoken, with GPT-2's whole vocabulary (pip install tiktoken).

    python3 dev/test/encoding_test.py --gpt2-files DIR           vocab.bpe and encoder.json in DIR
    python3 dev/test/encoding_test.py --gpt2-files DIR --table   prints chapter 17's three strings

Compared are the classes of all characters, the bytes of each of the 50257 tokens, random texts of
all planes of Unicode, and random bytes. tiktoken cuts bytes that are no UTF-8 by no rule of its
own; here they are letters, so a regular expression cuts them so, and tiktoken merges the pieces.
"""

import argparse
import ctypes
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import tiktoken

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from prepro_tinyshakespeare import END_OF_TEXT, GPT2_PATTERN, gpt2_tokenizer, tokenizer_file

CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
CLASSES = {"LETTER": r"\p{L}", "NUMBER": r"\p{N}", "SPACE": r"\s"}
WRAPPER = """
#define TESTING
#include "train_gpt2_mla.c"
static Tokenizer tokenizer;
void load(const char *path) { tokenizer = tokenizer_load(path); }
long tokens(const char *text, long n, int *out) { return encode(&tokenizer, (void *)text, n, out); }
const char *class(int code) {
    static const char *const names[] = {"OTHER", "LETTER", "NUMBER", "SPACE"};
    return names[unicode_class(code)];
}
"""


def members(pattern, ranks):
    """The codes of the characters that match pattern, as tiktoken sees it."""
    only = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    found = set()
    for i in range(0, len(CODES), 4096):
        text = "".join(map(chr, CODES[i:i + 4096]))
        found.update(map(ord, only.decode(only.encode_ordinary(text))))
    return sorted(found)


def ranges(codes):
    """[first, one past the last] of each run of codes."""
    runs = []
    for code in codes:
        if runs and runs[-1][1] == code:
            runs[-1][1] += 1
        else:
            runs.append([code, code + 1])
    return runs


def table_string(codes):
    """How far each range begins after the one before, and how long it is, in base 26, whose last
    digit is a small letter."""
    text, end = "", 0
    for first, last in ranges(codes):
        for number in (first - end, last - first):
            digits = chr(ord("a") + number % 26)
            while number := number // 26:
                digits = chr(ord("A") + number % 26) + digits
            text += digits
        end = last
    return text


def random_text(draw, edges):
    """Words of characters near the edges of classes, of any, of ASCII, of blanks, in turn."""
    blanks = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
    kinds = [lambda: chr(draw.choice(edges)), lambda: chr(draw.choice(CODES)),
             lambda: chr(draw.randrange(0x3100)), lambda: chr(draw.randrange(1, 128)),
             lambda: draw.choice(" 'aEst1.,"), lambda: draw.choice(blanks), lambda: " ",
             lambda: chr(draw.randrange(0x300, 0x370)),  # accents
             lambda: draw.choice("'s 't 're 've 'm 'll 'd 'S ' '\u017f".split(" "))]
    return "".join(kind() for kind in draw.choices(kinds, k=draw.randrange(1, 12))
                   for _ in range(draw.choice([1, 1, 1, 2, 5, 20])))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpt2-files", metavar="DIR", required=True)
    p.add_argument("--texts", type=int, default=20000, help="random texts (20000)")
    p.add_argument("--seed", type=int, default=1, help="of these (1)")
    p.add_argument("--table", action="store_true", help="print the strings of chapter 17")
    args = p.parse_args()

    tokens, eot, encode = gpt2_tokenizer(args.gpt2_files)
    ranks = {token: i for i, token in enumerate(tokens) if i != eot}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: eot})
    classes = {name: members(pattern, ranks) for name, pattern in CLASSES.items()}
    if args.table:
        for name, codes in classes.items():
            text = table_string(codes)
            lines = "".join(f'\n        "{text[i:i + 90]}"' for i in range(0, len(text), 90))
            print(f"        [{name}] ={lines},")
        return

    with tempfile.TemporaryDirectory() as folder:
        source, library = f"{folder}/encode.c", f"{folder}/encode.so"
        Path(source).write_text(WRAPPER)
        Path(f"{folder}/tokenizer.bin").write_bytes(tokenizer_file(tokens, eot))
        subprocess.run([*shlex.split(os.environ.get("CC", "cc")), "-std=c11", "-O2", "-w",
                        "-shared", "-fPIC", f"-I{ROOT}", source, "-o", library, "-lm"], check=True)
        c = ctypes.CDLL(library)
        c.load(f"{folder}/tokenizer.bin".encode())
    c.tokens.restype, c.tokens.argtypes = ctypes.c_long, [ctypes.c_char_p, ctypes.c_long,
                                                          ctypes.c_void_p]
    getattr(c, "class").restype = ctypes.c_char_p

    wrong = 0

    def expect(expected, found, what):
        nonlocal wrong
        if found != expected:
            wrong += 1
            if wrong <= 10:
                print(f"FAILED {what}: expected {expected}, found {found}")

    def ours(text):
        out = (ctypes.c_int * (len(text) + 1))()
        return out[:c.tokens(text, len(text), out)]

    named = {code: name for name, codes in classes.items() for code in codes}
    for code in CODES:
        expect(named.get(code, "OTHER"), getattr(c, "class")(code).decode(), f"class of {code:#x}")
    for i, token in enumerate(tokens):
        expect(encode(token) if i == eot else [i], ours(token), f"token {i}, {token}")
    draw = random.Random(args.seed)
    edges = [code for codes in classes.values() for run in ranges(codes)
             for code in (run[0] - 1, run[0], run[1] - 1, run[1])]
    n_tokens = 0
    for _ in range(args.texts):
        text = random_text(draw, edges).encode()
        expect(encode(text), ours(text), f"text {text}")
        n_tokens += len(ours(text))
    # A byte that is no UTF-8 comes as one of the surrogates U+DC80 to U+DCFF.
    letters, numbers, blanks = (
        "".join(f"\\U{first:08x}-\\U{last - 1:08x}" for first, last in ranges(codes))
        for codes in classes.values())
    letters += r"\uDC80-\uDCFF"
    bytes_too = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+"
                           f"| ?[^{blanks}{letters}{numbers}]+"
                           f"|[{blanks}]+(?![^{blanks}])|[{blanks}]+")
    for _ in range(args.texts):
        text = bytearray(random_text(draw, edges).encode())
        for _ in range(draw.randrange(1, 4)):  # a byte changed, or left out, or put in
            at = draw.randrange(len(text) + 1)
            text[at:at + draw.randrange(2)] = draw.randbytes(draw.randrange(2))
        text = bytes(text)
        pieces = [found[0].encode(errors="surrogateescape")
                  for found in bytes_too.finditer(text.decode(errors="surrogateescape"))]
        expect([i for piece in pieces for i in gpt2._core_bpe.encode_single_piece(piece)],
               ours(text), f"bytes {text}")
    print(f"GPT-2's encoding: {len(CODES)} characters, {len(tokens)} tokens, {args.texts} texts of "
          f"{n_tokens} tokens, {args.texts} of any bytes: {wrong or 'none'} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes dev/test/reference/encoding_*.bin: what the tests compare the C code's GPT-2 encoder with.

encoding_cases.bin: strings, and the ids that tiktoken's encode_ordinary gives for them with GPT-2's
full vocabulary. One record after another, little-endian, no header, no padding:
    uint32, uint32  number of bytes, number of tokens
    bytes           the string: UTF-8, any byte but 0, no terminator
    uint16          the token ids

encoding_tokenizer.bin: a tokenizer file in llm.c's format with GPT-2's ids, most of them left empty
(length 0) to keep it small. Present are the 256 single bytes, <|endoftext|>, and every token that
occurs somewhere in some case, among them all that mix ASCII with what lies beyond. No other can
matter: byte-pair encoding looks up nothing but stretches of the string in hand. So an encoder that
looks merged bytes up here, lowest id first, finds whatever it would find in the full vocabulary,
and gives the same ids for these cases (for other strings it may not). Empty tokens take no part,
nor does <|endoftext|>, which is plain text here.

Both files come out the same on every run.

    python dev/test/make_encoding_cases.py --gpt2-files DIR --text tinyshakespeare.txt
"""

import argparse
import itertools
import string
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from prepro_tinyshakespeare import (
    difference, gpt2_tokenizer, read_file, tokenizer_file, write_files)

LITERALS = [
    "", "<|endoftext|>", "One.<|endoftext|>\nTwo.", "Hello world", "Don't, don't; DON'T!",
    "'Tis I'd've'll", "rock 'n' roll", "the dogs' bones", "\"'So,'\" he said.",
    "state-of-the-art (e.g. 'this')...",
    "int main(void) {\n\tprintf(\"%5.2f\\n\", x[i++]); /* y */\n    return 0;\n}\n",
    "def f(self, *args):\r\n    return {k: v for k, v in args} # __init__\r\n\r\n",
    "https://www.example.com/a_b/c-d.html?q=1&r=%20x#top",
    "snake_case __dunder__ _x camelCaseXMLHttp2x",
    "3.14159 -1e-05 0xDEADBEEF 1,000,000 12:30 2024-03-28 v1.2.3 50% $9.99 #1 1st 2nd H2O a1b2c3",
    "".join(map(chr, range(32, 127))), "".join(map(chr, [*range(1, 32), 127])),
    "a" * 3000, " " * 3000, "\n" * 300, "=" * 300, "ab" * 300, " a" * 300,
]
BEYOND_ASCII = [
    "caf\xe9 au lait", "na\xefve Na\xefvet\xe9", "\u4e16\u754c\uff0c\u4f60\u3002 \uc548\ub155",
    "\u201cSo,\u201d he\u2014she\u2014said\u2026 [\u2026] (\u2026)", "\u041f\u0440\u0438, \u043c!",
    "it\u2019s we'\u017f don't\u2026'tis \u2026's e\u0301's",
    "e\u0301 a\u0308o\u0308 \u0301 a\u0300\u0301b",
    "\u0e2a\u0e27\u0e31\u0e2a \u0928\u092e\u0938\u094d \u0645\u0631\u062d\u0628\u0627",
    "\u0663\u0664 \u0967\u0968 x\xb2 \xbd \u2167 7\u0667 1\xbd \U0001d7d8", "#\U0001f389!",
    "\U0001f642\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469 \U00020000 \U0010ffff \ufffd\ufeff",
    "\xe9" * 300, "\u4e16" * 300, "\xa0" * 40, "\u3000" * 40,
]


def beyond_ascii(tokens):
    """Strings with characters beyond ASCII: letters, numbers, signs and blanks."""
    yield from BEYOND_ASCII
    for n in range(1, 4):
        yield from map("".join, itertools.product(" \na1.\xe9\u0663\u2026\xa0", repeat=n))
    for c in "\n\x85\xa0\u1680\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff":
        yield from (f" {c}", f"a {c}b", f"{c} b", f"1{c}{c}2", f".{c}\xe9", f"{c}'s")
    for token in tokens:
        if not token.isascii() and any(byte < 128 for byte in token[1:]):
            yield token.decode(errors="ignore")


def cases(text):
    """All strings of ASCII to encode: first the text's, then the awkward ones."""
    lines = text.splitlines(keepends=True)
    spoken = [line for line in lines if line.strip()]
    yield from (spoken[i * len(spoken) // 1200] for i in range(1200))
    yield from ("".join(lines[i * len(lines) // 40:][:2 + i % 8]) for i in range(40))  # several
    yield " ".join(text.split())[:10000]                # a long line
    yield "".join(filter(str.isalpha, text))[:10000]    # a long word

    yield from LITERALS
    for n in range(1, 5):  # space, newline, letter, digit, sign and 's in every order
        yield from map("".join, itertools.product(" \n1's", repeat=n))
    for end in "s t re ve m ll d  S T RE Re rE LL lL D l r v e x lll ree sm".split(" "):
        for form in ("'{}", "we'{}", "we'{}n", "we'{} go", " '{}", "we '{}", "''{}", "7'{}",
                     ".'{}", "\n'{}"):
            yield form.format(end)
    for n, blank in itertools.product(range(1, 21), " \t\n"):
        run = n * blank
        yield from (run, run + "word", "on" + run, "to" + run + "be", run + "42", run + "!",
                    run + " 's")
    for run in map("".join, itertools.product(" \t\n\r\v\f", repeat=2)):
        yield from (run + "word", "on" + run, "to" + run + " be", " " + run + "7")
    for c in map(chr, [*range(1, 32), 127]):  # 9 to 13 are blanks: spaces before them stay together
        yield from (c, f"a{c}b", f" {c}b", f"  {c}", f"a   {c}b")
        yield from (f"a {c}{c}  b", f"1{c} ", f".{c}.", f"\n\n{c} {c}")
    for n in [*range(1, 21), 64, 100]:
        digits = ("31415926535897932384626433" * 4)[:n]
        yield from (digits, " " + digits, "x" + digits, digits + "x", "1" + n * "0")
    for sign in string.punctuation:
        yield "a".join(sign + other for other in string.punctuation)
        yield from (f"a {n * sign}b 1{n * sign} " for n in (1, 2, 3, 4, 8, 17, 65))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpt2-files", metavar="DIR", required=True,
                   help="where vocab.bpe and encoder.json are")
    p.add_argument("--text", metavar="FILE", required=True, help="tinyshakespeare")
    args = p.parse_args()
    text = read_file(args.text, "--text")
    if difference(text):
        sys.exit(f"error: --text: {args.text}: {difference(text)}")

    tokens, eot, encode = gpt2_tokenizer(args.gpt2_files)
    each_once = dict.fromkeys([*cases(text.decode()), *beyond_ascii(tokens)])
    strings = [case.encode() for case in each_once]
    records, n_ids = [], 0
    for s in strings:
        ids = encode(s)
        assert b"".join(tokens[i] for i in ids) == s
        records.append(struct.pack(f"<II{len(s)}s{len(ids)}H", len(s), len(ids), s, *ids))
        n_ids += len(ids)

    everything = b"\xff".join(strings)  # a byte that UTF-8 never has keeps them apart
    kept = [t if len(t) == 1 or i == eot or t in everything else b"" for i, t in enumerate(tokens)]
    files = {str(ROOT / "dev/test/reference/encoding_tokenizer.bin"): tokenizer_file(kept, eot),
             str(ROOT / "dev/test/reference/encoding_cases.bin"): b"".join(records)}
    write_files(files)
    for (path, content), what in zip(files.items(), (
            f"{sum(map(bool, kept))} of {len(kept)} tokens",
            f"{len(strings)} cases, {sum(map(len, strings))} bytes, {n_ids} tokens")):
        print(f"{path}  {len(content)} bytes: {what}")


if __name__ == "__main__":
    main()

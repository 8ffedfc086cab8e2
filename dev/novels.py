#!/usr/bin/env python3
"""Make a second corpus, of 18 novels in plain ASCII, for what tinyshakespeare is too small for.

    python3 dev/novels.py                 fetches the books from Project Gutenberg (27 MB)
    python3 dev/novels.py --folder DIR    takes them from DIR/2600.txt, ...; needs no network
    python3 dev/novels.py --vocab 10000   also as tokens of its own BPE (pip install tokenizers)

Two texts come out: novels_train.txt, 16 novels one after the other (25 MB), and novels_val.txt, two
by authors who are not among those (1.6 MB). Gutenberg's headers, footers and credits are removed;
quotes, dashes and accented letters become ASCII, and what has no such form is left out. Books that
were fetched are kept in novels_raw, beside the texts: after an interruption the same command goes
on from there, and for another machine novels_raw is a DIR. Gutenberg corrects its books from time
to time, so texts made at different times may differ: compare losses only where the sha256 printed
at the end are the same.
"""

import argparse
import hashlib
import http.client
import os
import re
import shlex
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from prepro_tinyshakespeare import (DATA, Parser, bpe_tokenizer, chunks, one_line, read_file,
                                    require, token_file, tokenizer_file, write_files)

BOOKS = {  # by Gutenberg's numbers, in the order in which they are joined
    "train": {
        2600: "War and Peace", 1399: "Anna Karenina", 1023: "Bleak House", 766: "David Copperfield",
        963: "Little Dorrit", 883: "Our Mutual Friend", 145: "Middlemarch",
        580: "The Pickwick Papers", 599: "Vanity Fair", 4300: "Ulysses", 2701: "Moby Dick",
        2554: "Crime and Punishment", 1400: "Great Expectations", 345: "Dracula", 158: "Emma",
        1342: "Pride and Prejudice"},
    "val": {1260: "Jane Eyre", 1661: "The Adventures of Sherlock Holmes"},
}
SMALLEST, LARGEST = 400_000, 5_000_000  # bytes; these have from 0.6 to 3.3 million

# Gutenberg asks programs to go to its mirrors: its own site comes last. A book is kept in several
# places, as UTF-8 first; {path} is the number's digits but the last, a folder each.
MIRRORS = ["https://gutenberg.pglaf.org", "https://aleph.gutenberg.org",
           "https://www.gutenberg.org"]
FORMS = ["cache/epub/{n}/pg{n}.txt", "files/{n}/{n}-0.txt", "{path}/{n}/{n}-0.txt",
         "{path}/{n}/{n}.txt"]
PAUSE, PATIENCE = 2, 300  # seconds after each request, and for one to end

START = re.compile(r"^ *\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^*]*\*\*\*", re.M)
END = re.compile(r"^ *\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|"
                 r"^Typographical errors corrected by the etext transcriber", re.M)
CREDITS = re.compile(r"\s*(?:E-?text )?(?:Produced|Prepared|Transcribed|Scanned) (?:by|from)\b|"
                     r"\s*An Anonymous Volunteer", re.I)
NOTES = re.compile(r"Project Gutenberg|Transcriber's Note", re.I)
ASCII = {"'": "\u2018\u2019\u201b\u2032", '"': "\u201c\u201d\u201e\xab\xbb", ",": "\u201a",
         "-": "\u2010\u2011\u2013\u2212", "--": "\u2014\u2015", "AE": "\xc6", "ae": "\xe6",
         "OE": "\u0152", "oe": "\u0153", "ss": "\xdf", "L": "\xa3", "x": "\xd7", "/": "\u2044"}
ASCII = str.maketrans({sign: plain for plain, signs in ASCII.items() for sign in signs})


def to_ascii(raw):
    """UTF-8 or Latin-1 (with Windows' quotes) as ASCII lines without blanks at their ends."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("cp1252", "ignore")
    text = re.sub(r"(?<=\d)(?=[\xbc-\xbe])", " ", text)  # 2 1/2, not 21/2
    text = unicodedata.normalize("NFKD", text).translate(ASCII)
    text = text.encode("ascii", "ignore").decode()  # without accents, which NFKD sets apart
    return "\n".join(line.expandtabs().rstrip() for line in text.splitlines())


def novel(raw, title):
    """The novel in a file of Gutenberg's; a ValueError says what was found if it is no such file.
    Dropped are paragraphs with credits, at the start, and with Gutenberg's notes, anywhere."""
    text = to_ascii(raw)
    start = START.search(text)
    if not start:
        kind = "an HTML page" if re.match(r"\s*<(!doctype|html|\?xml)", text, re.I) else "no START"
        raise ValueError(f"found {kind} in {len(raw)} bytes, expected a text of Gutenberg's, with "
                         f"a line *** START OF THE PROJECT GUTENBERG EBOOK ...")
    header = text[:start.end()]
    if title.lower() not in header.lower().replace("-", " "):
        found = re.search(r"^Title: *(.*)", header, re.M)
        raise ValueError(f"found {found[1] if found else 'another book'}, expected {title}")
    end = END.search(text, start.end())
    if not end:
        raise ValueError(f"found {len(raw)} bytes that stop before Gutenberg's END line, expected "
                         f"a whole book")
    if not SMALLEST <= len(raw) <= LARGEST:
        raise ValueError(f"found {len(raw)} bytes, expected {SMALLEST} to {LARGEST}")
    body = re.sub(r"\n{4,}", "\n\n\n", text[start.end():end.start()].strip("\n"))
    return "\n\n".join(p for i, p in enumerate(body.split("\n\n"))
                       if not (i < 3 and CREDITS.match(p) or NOTES.search(p))).strip("\n")


def fetch(url):
    """The bytes at url, if they end in time. Whether they are a whole book, novel() finds out."""
    request = urllib.request.Request(url, headers={"User-Agent": "train_gpt2_mla/dev/novels.py"})
    content, deadline = b"", time.monotonic() + PATIENCE
    with urllib.request.urlopen(request, timeout=30) as reply:
        while chunk := reply.read1(1 << 16):
            content += chunk
            if len(content) > LARGEST or time.monotonic() > deadline:
                raise ValueError(f"found no end after {len(content)} bytes, expected one within "
                                 f"{LARGEST} bytes and {PATIENCE} seconds")
    return content


def download(number, title, mirrors, unreachable):
    """The book and its address, the first that has it. Mirrors that cannot be reached are entered
    in unreachable, with the reason, and not tried again."""
    for form in FORMS:
        for mirror in (m for m in mirrors if m not in unreachable):
            url = f"{mirror}/{form.format(n=number, path='/'.join(str(number)[:-1]))}"
            try:
                raw = fetch(url)
                return raw, novel(raw, title), url
            except urllib.error.HTTPError as e:
                problem = f"found HTTP status {e.code}, expected the book"
            except urllib.error.URLError as e:
                unreachable[mirror] = one_line(e.reason)
                continue
            except ValueError as e:  # from fetch or novel
                problem = one_line(e)
            except (OSError, http.client.HTTPException) as e:
                problem = f"found no whole answer ({one_line(e)}), expected the book"
            print(f"note: {number} {title}: {url}: {problem}", flush=True)
            time.sleep(PAUSE)
    reason = "; ".join(f"cannot reach {m}: {why}" for m, why in unreachable.items())
    sys.exit(f"error: {number} {title}: {reason or 'found at none of these addresses'}; without a "
             f"network pass --folder DIR, with the books as DIR/{number}.txt, ... (see --help)")


def get_novel(number, title, args, unreachable):
    """The novel and its place: in --folder, in what an earlier run fetched, or on the network."""
    kept = os.path.join(args.out_dir, "novels_raw", f"{number}.txt")
    path = kept if args.folder is None else os.path.join(args.folder, f"{number}.txt")
    if args.folder is None and not os.path.exists(kept):
        raw, text, url = download(number, title, args.mirrors, unreachable)
        write_files({kept: raw})
        time.sleep(PAUSE)
        return text, url
    try:
        return novel(read_file(path, f"{number} {title}"), title), path
    except ValueError as e:
        again = "; delete it to fetch it again" if path == kept else ""
        sys.exit(f"error: {number} {title}: {path}: {e}{again}")


def parse_arguments():
    books = [f"  {n:>4} {title}" for part in BOOKS.values() for n, title in part.items()]
    p = Parser(description=__doc__, epilog="\n".join(["the books:", *books]), allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--folder", metavar="DIR", help="take every book from DIR/NUMBER.txt")
    source.add_argument("--mirror", metavar="URL", help="fetch from this mirror of Gutenberg alone")
    p.add_argument("--out-dir", metavar="DIR", default=DATA,
                   help="where the texts and novels_raw go (default: data, in the top folder)")
    p.add_argument("--vocab", type=int, metavar="N",
                   help="write novels_N_train.bin, _val.bin and _tokenizer.bin too: N tokens, "
                        "learned from the training text")
    args = p.parse_args()
    if args.vocab is not None and not 257 <= args.vocab <= 65536:
        p.error(f"--vocab: found {args.vocab}, expected 257 to 65536")
    if args.mirror is not None and not re.match(r"https?://\w", args.mirror):
        p.error(f"--mirror: found {args.mirror!r}, expected http://... or https://...")
    args.mirrors = [args.mirror.rstrip("/")] if args.mirror else MIRRORS
    return args


def tokens_of(texts, size, base):
    """{part: text} in tokens of a BPE that its train part teaches, as files: {path: bytes}"""
    tokens, eot, encode = bpe_tokenizer([(True, texts["train"])], size)
    files = {f"{base}_{part}.bin": token_file(
        encode(chunk) for _, chunk in chunks([(True, text)], f"tokens of the {part} part"))
        for part, text in texts.items()}
    return {**files, f"{base}_tokenizer.bin": tokenizer_file(tokens, eot)}


def main():
    args, unreachable, files = parse_arguments(), {}, {}
    if args.vocab:
        require("tokenizers")
    for part, books in BOOKS.items():
        novels = []
        for number, title in books.items():
            text, place = get_novel(number, title, args, unreachable)
            print(f"{number:>4} {title:<33} {len(text):>7} characters from {place}", flush=True)
            novels.append(text)
        path = os.path.join(args.out_dir, f"novels_{part}.txt")
        files[path] = ("\n\n\n".join(novels) + "\n").encode()
    texts = dict(zip(BOOKS, files.values()))
    if args.vocab:
        base = os.path.join(args.out_dir, f"novels_{args.vocab}")
        files.update(tokens_of(texts, args.vocab, base))
    write_files(files)
    for mirror, reason in unreachable.items():
        print(f"note: cannot reach {mirror}: {reason}")
    for path, content in files.items():
        print(f"{path}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:12]}...")
    train, val = map(shlex.quote, list(files)[-3:-1] if args.vocab else files)
    print(f"now run: ./train_gpt2_mla --train-data {train} --val-data {val}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted, no half-written file is left; the same command goes on from here",
              file=sys.stderr)
        sys.exit(130)

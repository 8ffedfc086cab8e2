#!/usr/bin/env python3
"""Fetch tinyshakespeare, split it, and write the token files that ./train_gpt2_mla reads.

    python3 prepro_tinyshakespeare.py               one token per byte; needs nothing but Python
    python3 prepro_tinyshakespeare.py --vocab 1024  trains its own BPE      (pip install tokenizers)
    python3 prepro_tinyshakespeare.py --gpt2        uses GPT-2's own BPE    (pip install tiktoken)
    python3 prepro_tinyshakespeare.py --input A --input B   takes these texts, one after the other

Of all bytes of all texts the first 90% are for training and the last 10% for validation, even if
that cuts a text in two. With a BPE every text begins with the end-of-text token; bytes have no such
token, and get a newline between two texts.

Three files come out, all little-endian, in the formats of llm.c:

    tinyshakespeare_train.bin, tinyshakespeare_val.bin
        256 int32   20240520, version 1, number of tokens, zeros
        uint16      the tokens
    tinyshakespeare_tokenizer.bin
        256 uint32  20240328, version 2, vocabulary size, id of the end-of-text token, zeros
        per token   its length in one byte, then its bytes
"""

import argparse
import array
import contextlib
import hashlib
import http.client
import importlib
import os
import re
import shlex
import struct
import sys
import urllib.error
import urllib.request

DATA = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data"))
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1115394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

END_OF_TEXT = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # and their sha256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# How GPT-2 cuts text into words before merging: contractions; letters, digits or signs with the
# blank before them; blanks. No merge crosses a cut.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# A place where it always cuts: before an ASCII blank that follows no blank. Bytes that may end a
# blank beyond ASCII, such as U+00A0, are left out here.
CUT = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?=[ \n])")


# ---- Files and errors ---------------------------------------------------------------------------

def visible(text):
    """A name may hold anything: what would break the line, or a terminal, is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say(text="", start="", end="\n"):
    """print, which a reader that has gone, or a full disk, does not end: the files matter."""
    try:
        print(start + visible(text), end=end, flush=True)
    except OSError as e:
        sys.stderr.write(f"error: standard output: cannot write: {e.strerror}; going on\n")
        sys.stdout = open(os.devnull, "w")


def fail(message):
    """Ends the program: one line, exit status 1."""
    sys.exit(f"error: {visible(message)}")


def show_progress(text):
    """On a terminal, in place; an empty text ends the line."""
    if sys.stdout.isatty():
        say(text, *("\r", "") if text else ())


def one_line(error):
    """An exception's message on a single line (some libraries' messages have several)."""
    return " ".join(str(error).split()) or type(error).__name__


def require(package):
    """If it is missing, says so: better before anything is fetched."""
    try:
        importlib.import_module(package)
    except ImportError as e:
        fail(f"the package {package} is missing: pip install {package} ({one_line(e)})")


def read_file(path, option):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        fail(f"{option}: cannot read {path}: {e.strerror}")


def check_replaceable(path, kind, start, at=0):
    """Refuses what is there, if it is no such file (bytes `start` at `at`) or cannot be written."""
    if not os.path.exists(path):
        return
    if not os.path.isfile(path):
        fail(f"{path}: exists and is no regular file; will not replace it")
    if not os.access(path, os.W_OK) or not os.stat(path).st_mode & 0o222:
        fail(f"{path}: exists and is read-only; will not replace it")
    with open(path, "rb") as f:
        f.seek(at)
        if os.path.getsize(path) and f.read(len(start)) != start:
            fail(f"{path}: exists and is no {kind}; will not replace it")


def write_files(files):
    """Write every file of {path: bytes}, or none: a new vocabulary beside old tokens would be worse
    than an error. So all are written beside their final names first, and renamed at the end."""
    files = {os.path.realpath(path): content for path, content in files.items()}  # a link stays
    parts = {path: f"{path}.{os.getpid()}.part" for path in files}
    for path, content in files.items():
        check_replaceable(path, "file of this program", content[:4])
    try:
        for path, content in files.items():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(parts[path], "wb") as f:
                f.write(content)
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")
    finally:  # after an error or Ctrl-C; on success there is nothing left to remove
        for part in parts.values():
            with contextlib.suppress(OSError):
                os.remove(part)


# ---- The text -----------------------------------------------------------------------------------

def difference(text):
    """How text differs from the known tinyshakespeare; empty if it is the same."""
    digest = hashlib.sha256(text).hexdigest()
    return "" if digest == SHA256 else (f"found {len(text)} bytes with sha256 {digest[:12]}..., "
                                        f"expected {SIZE} with {SHA256[:12]}...")


def fetch(url):
    """Download tinyshakespeare, into memory: so a failure has no half file to clean up."""
    say(f"fetching {url}")
    text = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            length = reply.headers.get("Content-Length", str(SIZE))
            if length != str(SIZE):  # an error page, most likely
                raise ValueError(f"found Content-Length {length}, expected {SIZE}")
            while len(text) <= SIZE:  # a server that never stops sending is not ours
                chunk = reply.read(1 << 16)
                if not chunk:
                    break
                text += chunk
                show_progress(f"  {len(text)} of {SIZE} bytes ({100 * len(text) // SIZE}%)")
        if len(text) < SIZE:  # a connection cut half way looks like the end of the file
            raise ValueError(f"connection closed: found {len(text)} bytes, expected {SIZE}")
        if difference(text):
            raise ValueError(difference(text))
        return bytes(text)
    except (OSError, http.client.HTTPException, ValueError) as e:
        if type(e) is urllib.error.URLError:  # a wrapper around the error that matters
            e = e.reason
        fail(f"cannot fetch {url}: {one_line(e)}; fetch it by hand and run "
             f"python3 prepro_tinyshakespeare.py --input FILE, or name a mirror with --url")
    finally:
        if text:
            show_progress("")


def get_texts(args):
    """{file's name: text}, from --input, from an earlier run or from the network."""
    kept = os.path.join(args.out_dir, "tinyshakespeare.txt")
    if args.input is not None:
        for path in args.input:
            if args.input.count(path) > 1:
                fail(f"--input {path}: given twice")
        texts = {path: read_file(path, "--input") for path in args.input}
        for path, text in texts.items():
            if difference(text):
                say(f"note: {path} is not the known tinyshakespeare ({difference(text)}), "
                    f"so losses will not compare")
            elif not os.path.exists(kept):
                write_files({kept: text})  # so that a later run need not be told again
        return texts
    if os.path.exists(kept):
        text = read_file(kept, "--out-dir")
        if difference(text):
            fail(f"{kept}: {difference(text)}; delete it to fetch it again, "
                 f"or pass it as --input to use it as it is")
        say(f"using {kept} from an earlier run, nothing fetched")
    else:
        text = fetch(args.url)
        write_files({kept: text})
    return {kept: text}


def split(texts):
    """The first 90% to train on, the last 10% to validate: the split behind nanoGPT's losses. Both
    as lists of (whether a text begins here, its bytes)."""
    size = sum(map(len, texts.values()))
    left, train, val = int(size * 0.9), [], []  # how much is still to go to train
    for text in map(memoryview, texts.values()):
        n = min(left, len(text))
        left -= n
        while 0 < n < len(text) and text[n] & 0xC0 == 0x80:  # not within a character (all bytes of
            n -= 1                                # tinyshakespeare are ASCII, but not of all texts)
        if n:
            train.append((True, text[:n]))
        if n < len(text):
            val.append((n == 0, text[n:]))
    if not train:
        fail(f"{', '.join(texts)}: found {size} bytes, expected enough text to split in two")
    return train, val


def chunks(part, what):
    """A part in chunks of some 16 KB that no token spans, each as (whether a text begins here, its
    bytes): what is made of a text takes many times its memory, so it is made bit by bit. Prints how
    far that is."""
    done, shown, size = 0, -1, sum(len(text) for _, text in part)
    try:
        for begins, text in part:
            at = 0
            while at < len(text):
                cut = CUT.search(text, at + 16384)
                end = cut.end() if cut else len(text)
                yield begins and at == 0, bytes(text[at:end])
                done += end - at
                at = end
                if 100 * done // size > shown:
                    shown = 100 * done // size
                    show_progress(f"{what}: {done} of {size} bytes ({shown}%)")
    finally:
        show_progress("")


# ---- Tokenizers: the bytes of every token, the id that ends a text, and a function bytes -> ids --

def byte_tokenizer():
    """One token per byte, its id the byte's value. No byte means end of text: newline stands in,
    since a sample starts after that token, and so at the start of a line."""
    return [bytes([b]) for b in range(256)], ord("\n"), list


def bpe_tokenizer(train, size):
    """A byte-level BPE with GPT-2's rules, trained on that part. Ids are the 256 bytes by value,
    then the merges in the order learned (which is the order to apply them in), then end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    level = pre_tokenizers.ByteLevel  # cuts by GPT2_PATTERN, writes each byte as a visible letter
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = level(add_prefix_space=False, use_regex=True)
    words = (chunk.decode() for _, chunk in chunks(train, "learning from the training part"))
    bpe.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=level.alphabet(), show_progress=False))
    learned = bpe.get_vocab_size()
    if learned != size - 1:
        fail(f"--vocab {size}: found {learned - 256} merges in the training text, "
             f"expected {size - 257}; this text allows at most --vocab {learned + 1}")

    # The library sorts the bytes by the letters that stand for them, so their ids need remapping:
    # a visible byte is its own letter, the other 68 in order are chr(256), chr(257), ...
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in visible}
    byte_of.update((chr(256 + i), b) for i, b in enumerate(sorted({*range(256)} - {*visible})))
    theirs = [bytes(byte_of[letter] for letter in bpe.id_to_token(i)) for i in range(learned)]
    tokens = sorted(t for t in theirs if len(t) == 1) + [t for t in theirs if len(t) > 1]
    new_id = {token: i for i, token in enumerate(tokens)}
    remap = [new_id[token] for token in theirs]

    longest = max(map(len, tokens))
    if longest > 255:  # the tokenizer file has one byte for the length
        fail(f"--vocab {size}: found a token of {longest} bytes, expected 255 at most; "
             f"try a smaller --vocab")
    return (tokens + [END_OF_TEXT.encode()], size - 1,
            lambda part: [remap[i] for i in bpe.encode(part.decode()).ids])


def gpt2_tokenizer(folder):
    """GPT-2's 50257 tokens: from the network (tiktoken keeps a copy), or from files in folder."""
    import tiktoken.load
    if folder is None:
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever tiktoken and the library it downloads with may raise
            fail(f"--gpt2: cannot fetch GPT-2's vocabulary; fetch vocab.bpe and "
                 f"encoder.json from {GPT2_URL} by hand and pass --gpt2-files DIR "
                 f"({one_line(e)})")
    else:
        paths = [os.path.join(folder, name) for name in GPT2_FILES]
        for path, expected in zip(paths, GPT2_FILES.values()):
            found = hashlib.sha256(read_file(path, "--gpt2-files")).hexdigest()
            if found != expected:
                fail(f"--gpt2-files: {path}: found sha256 {found[:12]}..., "
                     f"expected {expected[:12]}..., the file at {GPT2_URL}")
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no copies of files that are here already
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*paths)
        gpt2 = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: len(ranks)})
    tokens = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.n_vocab)]
    return tokens, gpt2.eot_token, lambda part: gpt2.encode_ordinary(part.decode())


# ---- The files for the trainer ------------------------------------------------------------------

def token_file(lists):
    """The file of these lists of ids, joined; in two bytes a token all the way."""
    content = array.array("H", bytes(1024))
    for ids in lists:
        content.extend(ids)
    if sys.byteorder == "big":
        content.byteswap()
    struct.pack_into("<256i", content, 0, 20240520, 1, len(content) - 512, *[0] * 253)
    return memoryview(content).cast("B")


def tokenizer_file(tokens, eot):
    header = struct.pack("<256I", 20240328, 2, len(tokens), eot, *[0] * 252)
    return header + b"".join(bytes([len(token)]) + token for token in tokens)


# ---- The command line ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print the usage, several lines, as well
        self.exit(2, f"error: {visible(message)}; see --help\n")


def parse_arguments():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("--vocab", type=int, metavar="N",
                   help="train a BPE of N tokens on the training part (default: bytes)")
    p.add_argument("--gpt2", action="store_true", help="use GPT-2's tokenizer, 50257 tokens")
    p.add_argument("--gpt2-files", metavar="DIR",
                   help="the same, from DIR/vocab.bpe and DIR/encoder.json: needs no network")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="FILE", action="append",
                        help="read this text instead of fetching one; may be given several times")
    source.add_argument("--url", default=URL, help="fetch the same text from a mirror")
    p.add_argument("--out-dir", metavar="DIR", default=DATA,
                   help="where the files go (default: data, beside this script)")
    args = p.parse_args()
    args.gpt2 = args.gpt2 or args.gpt2_files is not None
    # At least the 256 bytes and end of text; at most what 16 bits can number.
    if args.vocab is not None and not 257 <= args.vocab <= 65535:
        p.error(f"--vocab: found {args.vocab}, expected a number from 257 to 65535")
    if args.vocab and args.gpt2:
        p.error("--vocab and --gpt2: found both, expected at most one of them")
    if os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir):
        fail(f"--out-dir {args.out_dir}: found a file, expected a directory")
    return args


def main():
    args = parse_arguments()
    package = "tokenizers" if args.vocab else "tiktoken" if args.gpt2 else None
    if package:
        require(package)
    texts = get_texts(args)
    if package:
        for name, text in texts.items():
            try:
                text.decode()
            except UnicodeDecodeError as e:
                fail(f"{name}: found byte {text[e.start]:#04x} at offset {e.start}, "
                     f"expected UTF-8 (without --vocab or --gpt2, any bytes will do)")

    # Split first: the vocabulary is learned from the training part, and no token spans both parts.
    train, val = split(texts)
    tokens, eot, encode = (bpe_tokenizer(train, args.vocab) if args.vocab else
                           gpt2_tokenizer(args.gpt2_files) if args.gpt2 else byte_tokenizer())

    def lists_of_ids(part, kind):
        for i, (begins, chunk) in enumerate(chunks(part, f"tokens of the {kind} part")):
            ids = encode(chunk)
            if b"".join(map(tokens.__getitem__, ids)) != chunk:
                fail(f"{', '.join(texts)}: the tokens of the {kind} part decode to "
                     f"another text, expected the same; please report this, with your version "
                     f"of {package}")
            if begins and (package or i > 0):  # bytes: only between texts
                yield [eot]
            yield ids

    base = os.path.join(args.out_dir, "tinyshakespeare_")
    files, summary = {}, []
    for kind, part in (("train", train), ("val", val)):
        content = files[f"{base}{kind}.bin"] = token_file(lists_of_ids(part, kind))
        n, size = len(content) // 2 - 512, sum(len(text) for _, text in part)
        summary.append(f"{n} tokens, {size / n:.3f} bytes per token")
    files[f"{base}tokenizer.bin"] = tokenizer_file(tokens, eot)
    summary.append(f"vocabulary of {len(tokens)}, end of text is {eot} ({tokens[eot].decode()!r})")
    write_files(files)

    for path, line in zip(files, summary):
        say(f"{path:<{len(base) + len('tokenizer.bin')}}  {line}")
    command = "./train_gpt2_mla"
    if args.out_dir != "data":  # where the trainer looks by itself
        for option, path in zip(("--train-data", "--val-data", "--tokenizer"), files):
            command += f" {option} {shlex.quote(path)}"
    say(f"now run: {command}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted, no half-written file is left", file=sys.stderr)
        sys.exit(130)

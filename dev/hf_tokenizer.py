"""Tokenizers of Hugging Face's GPT-2 folders, read and written: a BPE of bytes.

A tokenizer is (tokens, eot) everywhere: a list of bytes, and the id of the token that ends a text.
What the C program would not cut as transformers do is not read.
"""

from prepro_tinyshakespeare import END_OF_TEXT, one_line
from whole_files import read_json, write_json


def letters():
    """GPT-2's letter for each byte: visible ones are their own, the others U+0100 and on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in visible else next(others)) for b in range(256)]


LETTERS = letters()


def spelled(token):
    return "".join(LETTERS[b] for b in token)


def merges_of(tokens, eot):
    """A BPE's merges, pairs of bytes, from its tokens in the order learned; None if it is none.

    The C program and GPT-2's encoder know no other order, so each token must come from two parts
    that the tokens before it make of its bytes.
    """
    rank, merges = {}, []
    for i, token in enumerate(tokens):
        rank.setdefault(token, i)
    for i, token in enumerate(tokens):
        if len(token) < 2 or i == eot or rank[token] != i:
            continue
        parts = [token[j:j + 1] for j in range(len(token))]
        while len(parts) > 2:
            pair = min(range(len(parts) - 1),
                       key=lambda j: rank.get(parts[j] + parts[j + 1], len(tokens)))
            if rank.get(parts[pair] + parts[pair + 1], i) >= i:
                return None
            parts[pair:pair + 2] = [parts[pair] + parts[pair + 1]]
        if any(part not in rank for part in parts):  # a character's bytes, if only it is a token
            return None
        merges.append(tuple(parts))
    return merges


def parts_of(folder):
    """Of a folder's files: the vocabulary {text: id}, the merges, and the added tokens, or None"""
    if (folder / "tokenizer.json").exists():
        whole = read_json(folder / "tokenizer.json")
        before = whole.get("pre_tokenizer") or {}
        cuts = [(p["type"], p.get("add_prefix_space") or False, p.get("use_regex", True))
                for p in before.get("pretokenizers", [before])]
        if whole.get("normalizer") or cuts != [("ByteLevel", False, True)]:
            raise ValueError("it does not cut texts as GPT-2's does")
        added = {t["content"]: t["id"] for t in whole.get("added_tokens") or []}
        return whole["model"]["vocab"], whole["model"]["merges"], added
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges, {}
    return None


def tokens_of(vocabulary, merges, added, eos, V):
    """-> tokens, eot. Raises ValueError with the reason for which the C program cannot take it."""
    eot = {**vocabulary, **added}.get(END_OF_TEXT, eos)
    byte_of = {letter: b for b, letter in enumerate(LETTERS)}
    by_id = {}
    for text, i in [*vocabulary.items(), *added.items()]:
        if not 0 <= i < V:
            raise ValueError(f"token {i}, {text!r}, is beyond the model's {V}")
        if i != eot and text in added:
            raise ValueError(f"it has an added token that is no end of text, {text!r}")
        if text in added:
            by_id[i] = text.encode()
        elif all(letter in byte_of for letter in text):
            by_id[i] = bytes(byte_of[letter] for letter in text)
        else:
            raise ValueError(f"token {i}, {text!r}, is not of bytes as GPT-2 spells them")
    tokens = [by_id.get(i, b"") for i in range(max(by_id, default=-1) + 1)]
    if eot is None and len(tokens) <= 256:
        eot = tokens.index(b"\n") if b"\n" in tokens else 0
    if not isinstance(eot, int) or not 0 <= eot < len(tokens) or max(map(len, tokens)) > 255:
        raise ValueError("it has no end of text, or a token of more than 255 bytes")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    made = merges_of(tokens, eot)
    if made is None or pairs != [[spelled(part) for part in pair] for pair in made]:
        raise ValueError("its merges are not in the order of its tokens")
    return tokens, eot


def read(folder, eos, V):
    """A folder's tokenizer or None; why one that is there is left out, or "".

    eos: the id that the model's configuration has for end of text, V: its vocabulary's size.
    """
    try:
        found = parts_of(folder)
        return (tokens_of(*found, eos, V) if found else None), ""
    except ValueError as error:
        return None, one_line(error)
    except (AttributeError, KeyError, TypeError, OSError):
        return None, "its files are not built as GPT-2's, a BPE of bytes"


def write(folder, tokens, eot):
    """tokenizer.json and tokenizer_config.json -> whether tokens are a BPE's; else neither."""
    merges = merges_of(tokens, eot)
    if merges is None:
        return False
    ends = len(tokens[eot]) > 1  # of bytes none means end of text
    end = tokens[eot].decode(errors="replace")
    vocabulary = {}
    for i, token in enumerate(tokens):
        if token:
            vocabulary.setdefault(end if ends and i == eot else spelled(token), i)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": eot, "content": end, "special": True} | plain] * ends
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
             "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
             "model": {"type": "BPE", "dropout": None, "unk_token": None,
                       "continuing_subword_prefix": None, "end_of_word_suffix": None,
                       "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                       "vocab": vocabulary,
                       "merges": [[spelled(a), spelled(b)] for a, b in merges]}}
    # Without these names transformers before 5 give token types too, which GPT-2 adds to its input.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", "attention_mask"],
                "clean_up_tokenization_spaces": False}
    if ends:
        settings |= dict.fromkeys(("bos_token", "eos_token"), end)
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "tokenizer_config.json", settings)
    return True

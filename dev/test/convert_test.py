"""Tests of convert.py, with transformers, the C program and files made here as the other sides.

    python3 dev/test/convert_test.py            with the program in the top folder; below a minute
    python3 dev/test/convert_test.py --large    only memory and exactness, for GPT-2's 124M

--gpt2-files DIR, with encoder.json and vocab.bpe, adds GPT-2's own vocabulary.
(pip install torch numpy safetensors transformers tokenizers)
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "dev"), str(ROOT / "dev/pytorch")]
import convert  # noqa: E402
import hf_tokenizer  # noqa: E402
import prepro_tinyshakespeare as prepro  # noqa: E402
from gpt2_mla import GPT  # noqa: E402

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")
disable_progress_bar()
PROGRAM = str(ROOT / "train_gpt2_mla")
TEXT = ROOT / "README.md"


# ---- What all tests use -------------------------------------------------------------------------

def run(*arguments):
    """convert.py on that command line -> exit status, standard output, standard error"""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["convert.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            convert.main()
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as end:
        said = isinstance(end.code, str)
        return (1 if said else end.code), out.getvalue(), end.code if said else err.getvalue()
    finally:
        sys.argv = argv


def converted(*arguments):
    status, out, err = run(*arguments)
    assert status == 0, (arguments, err)
    return out


def program(*arguments):
    """The C program on that command line -> its standard output"""
    ran = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, cwd=ROOT)
    assert ran.returncode == 0, (arguments, ran.stderr)
    return ran.stdout


def trained(path, data, *options):
    """A small model of learned positions, trained by the C program"""
    program("--position", "learned", *options, "--layers", 2, "--channels", 32, "--heads", 4,
            "--seq-len", 48, "--steps", 600, "--train-data", data, "--sample-every", 0,
            "--save", path)


def loss_of(checkpoint, *more, data=TEXT):
    out = program("--eval", "--load", checkpoint, "--val-data", data, *more).decode()
    return float(re.search(r"^loss (\S+)", out, re.M)[1])


def random_gpt2(seed, tokenizer=False, **size):
    """A GPT-2 of transformers whose every tensor, norms and biases too, is far from its start."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{"bos_token_id": None, "eos_token_id": None} | size))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        out = model(ids)
    return out[0] if isinstance(out, tuple) else out.logits


def distance(one, other, T=40, V=None):
    """The largest difference of logits between two models"""
    V = V or one.config.vocab_size
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    return (logits_of(one, ids) - logits_of(other, ids)).abs().max().item()


def ours(path):
    return GPT.from_checkpoint(path).eval()


def same_tensors(one, other):
    """Two safetensors files have the same tensors, to the bit, under the same names."""
    a, b = load_file(one), load_file(other)
    for path in (one, other):  # so that the data is aligned
        assert int.from_bytes(Path(path).read_bytes()[:8], "little") % 8 == 0
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        bits = [t.view(torch.int16).numpy().tobytes() for t in (a[name], b[name])]
        assert bits[0] == bits[1], name


def write_llmc(path, model, version=3):
    """llm.c's format from its description, from a GPT-2 of transformers, tensor after tensor."""
    c, w = model.config, {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    Vp = (c.vocab_size + 127) // 128 * 128
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", 20240326, version, c.n_positions, c.vocab_size, c.n_layer,
                            c.n_head, c.n_embd, Vp, *[0] * 248))

        def put(t):
            if version == 5:
                f.write(t.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            else:
                f.write(t.contiguous().numpy().tobytes())

        put(torch.cat([w["wte.weight"], torch.zeros(Vp - c.vocab_size, c.n_embd)]))
        put(w["wpe.weight"])
        for part in ("ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight "
                     "attn.c_proj.bias ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias "
                     "mlp.c_proj.weight mlp.c_proj.bias").split():
            for layer in range(c.n_layer):
                t = w[f"h.{layer}.{part}"]
                put(t.T if t.dim() == 2 else t)
        put(w["ln_f.weight"])
        put(w["ln_f.bias"])


# ---- Formats ------------------------------------------------------------------------------------

def test_llmc(folder):
    """Against transformers' logits; there and back byte for byte, the whole file."""
    for i, size in enumerate([
            dict(vocab_size=256, n_positions=64, n_embd=48, n_layer=2, n_head=4),
            dict(vocab_size=129, n_positions=41, n_embd=30, n_layer=1, n_head=1),
            dict(vocab_size=300, n_positions=50, n_embd=24, n_layer=3, n_head=6)]):
        theirs = random_gpt2(i, **size)
        for version, dtype in ((3, "f32"), (5, "bf16")):
            name = folder / f"l{i}{version}"
            write_llmc(f"{name}.bin", theirs, version)
            converted(f"{name}.bin", f"{name}.safetensors")
            converted(f"{name}.safetensors", f"{name}b.bin", "--dtype", dtype)
            assert Path(f"{name}.bin").read_bytes() == Path(f"{name}b.bin").read_bytes()
            if version == 5:
                theirs.load_state_dict({k: v.to(torch.bfloat16).float()
                                        for k, v in theirs.state_dict().items()})
            off = distance(theirs, ours(f"{name}.safetensors"))
            assert off < 1e-4, (size, version, off)
    loss_of(folder / "l03.safetensors", "--seq-len", 32)


def test_hf(folder):
    """Sizes, dtypes, and the ways in which a folder holds its tensors; back, byte for byte."""
    for i, (size, dtype) in enumerate([
            (dict(vocab_size=199, n_positions=64, n_embd=48, n_layer=3, n_head=4), torch.float32),
            (dict(vocab_size=70, n_positions=40, n_embd=20, n_layer=1, n_head=2), torch.bfloat16),
            (dict(vocab_size=257, n_positions=48, n_embd=36, n_layer=2, n_head=12), torch.float16),
            (dict(vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=1), torch.float64)]):
        theirs = random_gpt2(10 + i, **size).to(dtype)
        theirs.save_pretrained(folder / f"hf{i}")
        converted(folder / f"hf{i}", folder / f"h{i}.safetensors")
        off = distance(theirs.float(), ours(folder / f"h{i}.safetensors"))
        assert off < 1e-4, (size, dtype, off)
        if dtype == torch.float64:
            continue
        name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        converted(folder / f"h{i}.safetensors", folder / f"back{i}", "--dtype", name)
        same_tensors(folder / f"hf{i}/model.safetensors", folder / f"back{i}/model.safetensors")
        again = AutoModelForCausalLM.from_pretrained(folder / f"back{i}", dtype=torch.float32)
        assert distance(again, theirs) == 0
        assert again.config.eos_token_id is None

    state = load_file(folder / "hf0/model.safetensors")
    config = (folder / "hf0/config.json").read_bytes()

    def variant(name, write):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(config)
        write(folder / name)
        converted(folder / name, folder / f"{name}.safetensors")
        same_tensors(folder / f"{name}.safetensors", folder / "h0.safetensors")

    variant("pickled", lambda f: torch.save(state, f / "pytorch_model.bin"))
    variant("old", lambda f: torch.save(state, f / "pytorch_model.bin",
                                        _use_new_zipfile_serialization=False))
    variant("untidy", lambda f: save_file(  # as the hub's first files are
        {k.removeprefix("transformer."): v for k, v in state.items()}
        | {"h.0.attn.bias": torch.ones(1, 1, 9, 9), "lm_head.weight":
           state["transformer.wte.weight"].clone()}, f / "model.safetensors"))

    def shards(f):
        names = sorted(state)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for part, of in parts.items():
            save_file({name: state[name] for name in of}, f / part)
        (f / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {name: part for part, of in parts.items() for name in of}}))

    variant("shards", shards)

    def renamed(f):  # the other names are believed, even beside GPT-2's own
        save_file(state, f / "model.safetensors")
        c = json.loads(config)
        (f / "config.json").write_text(json.dumps(c | {
            "num_attention_heads": c["n_head"], "hidden_size": c["n_embd"], "num_hidden_layers":
            c["n_layer"], "max_position_embeddings": c.pop("n_positions"), "n_head": 2, "n_embd": 7,
            "n_layer": 1, "activation_function": "gelu_pytorch_tanh"}))
        assert GPT2Config.from_pretrained(f).n_head == 4

    variant("renamed", renamed)
    (folder / "default").mkdir()  # what is absent is GPT-2's
    (folder / "default/config.json").write_text('{"model_type": "gpt2"}')
    w = GPT2LMHeadModel(GPT2Config()).state_dict()
    del w["lm_head.weight"]
    save_file(w, folder / "default/model.safetensors")
    c = convert.read(folder / "default").config
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size) == (12, 12, 768, 1024, 50257)


def test_nanogpt(folder):
    """With and without biases, compiled or not; and what the note about GELU is about."""
    size = dict(vocab_size=65, n_positions=48, n_embd=32, n_layer=2, n_head=4)
    for bias in (True, False):
        theirs = random_gpt2(20, **size)
        if not bias:
            for name, p in theirs.named_parameters():
                if name.endswith("bias"):
                    p.data.zero_()
        state = {k: (v.T.contiguous() if v.dim() == 2 and ".h." in k else v)
                 for k, v in theirs.state_dict().items() if bias or not k.endswith("bias")}
        state = {("_orig_mod." if bias else "") + k: v for k, v in state.items()}
        args = dict(n_layer=2, n_head=4, n_embd=32, block_size=48, bias=bias, vocab_size=65,
                    dropout=0.0)
        torch.save({"model": state, "optimizer": {"state": {0: {"step": torch.tensor(3.)}}},
                    "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(1.5),
                    "config": {"dataset": "x", "learning_rate": 1e-3}}, folder / "ckpt.pt")
        out = converted(folder / "ckpt.pt", folder / f"nano{bias}.safetensors")
        assert "GELU" in out and "moments" in out
        off = distance(theirs, ours(folder / f"nano{bias}.safetensors"))
        assert off < 1e-4, off
    assert "no tokenizer" in out
    assert "note: no" in converted(folder / "ckpt.pt", folder / "unnamed")
    assert not (folder / "unnamed/tokenizer.json").exists()  # 65 tokens are no bytes
    letters = sorted(set(map(chr, range(32, 96))) | {"\n"})
    (folder / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": 65, "itos": dict(enumerate(letters)),
        "stoi": {c: i for i, c in enumerate(letters)}}))
    out = converted(folder / "ckpt.pt", folder / "named", "--tokenizer", folder / "meta.pkl")
    assert "no tokenizer" not in out
    named = AutoTokenizer.from_pretrained(folder / "named")
    assert named("TO BE\n")["input_ids"] == [letters.index(c) for c in "TO BE\n"]
    assert named.decode([1, 2, 0]) == " !\n"
    exact = GPT2LMHeadModel(GPT2Config(**size, activation_function="gelu")).eval()
    exact.load_state_dict(theirs.state_dict())
    assert 1e-5 < distance(exact, ours(folder / "nanoFalse.safetensors")) < 1e-2


def test_hub(folder):
    """A hub name, from the hub's cache as its own library keeps it; standard output is full."""
    cache = folder / "hub/models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    os.symlink(folder / "hf0", cache / "snapshots" / ("0" * 40))
    with open("/dev/full", "wb") as full:  # a line says so, and nothing else is amiss
        ran = subprocess.run(
            [sys.executable, ROOT / "dev/convert.py", "someone/tiny", folder / "hub.safetensors"],
            env=os.environ | {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
            stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0 and ran.stderr.count("\n") == 1, ran.stderr
    same_tensors(folder / "hub.safetensors", folder / "h0.safetensors")


# ---- MHA into MLA -------------------------------------------------------------------------------

def test_mla_exact(folder):
    """At full rank: logits of random models; of trained ones loss, text from every cache."""
    converted(folder / "hf0", folder / "m0.safetensors", "--to", "mla", "--kv-rank", "48")
    off = distance(ours(folder / "h0.safetensors"), ours(folder / "m0.safetensors"))
    assert off < 1e-4, off
    for attention, more, rank in (("mha", (), 32), ("gqa", ("--kv-heads", "2"), 32),
                                  ("mqa", (), 16)):
        before, after = folder / f"{attention}.safetensors", folder / f"{attention}_mla.safetensors"
        trained(before, TEXT, "--attention", attention, *more)
        out = converted(before, after, "--to", "mla", "--kv-rank", rank)
        assert out.count(f"rank {rank} of {rank} keeps 100.000%") == 2, out
        off = distance(ours(before), ours(after))
        assert off < 1e-4, (attention, off)
        assert abs(loss_of(before) - loss_of(after)) < 1e-5
        text = program("--generate", 40, "--prompt", "The ", "--temperature", 0, "--load", before)
        for cache in ("full", "latent", "absorbed"):
            assert text == program("--generate", 40, "--prompt", "The ", "--temperature", 0,
                                   "--load", after, "--cache", cache), (attention, cache)
        program("--load", after, "--train-data", TEXT, "--steps", 20, "--sample-every", 0,
                "--learning-rate", "1e-4", "--save", folder / "on.safetensors")
        assert loss_of(folder / "on.safetensors") < loss_of(after) + 0.05


def made_text():
    """Made-up words, each with four that may follow it"""
    draw, text, word = np.random.default_rng(3), [], 0
    words = ["".join(map(chr, draw.integers(97, 123, n))) for n in draw.integers(2, 7, 80)]
    following = draw.integers(80, size=(80, 4))
    for which in draw.integers(4, size=12000):
        word = following[word, which]
        text.append(words[word])
    return " ".join(text)


def test_mla_rank(folder):
    """Below, the factors are the nearest matrix of that rank (Eckart and Young), computed here by
    NumPy; with data, what attention reads loses less, and so does the model."""
    before, text, lines = folder / "made.safetensors", folder / "made", {}
    text.write_text(made_text())
    trained(before, text, "--attention", "mha")
    w = load_file(before)
    for l in range(2):
        kv = w[f"h.{l}.attn.c_attn.weight"][32:].double().numpy()                # (2C, C)
        A, S, Z = np.linalg.svd(kv)
        for rank in (1, 8, 31):
            after = folder / f"r{rank}.safetensors"
            if l == 0:
                lines[rank] = converted(before, after, "--to", "mla", "--kv-rank", rank)
            new = load_file(after)
            up = new[f"h.{l}.attn.kv_b_proj.weight"].double().numpy()            # (2C, R)
            down = new[f"h.{l}.attn.kv_a_proj_with_mqa.weight"].double().numpy()  # (R, C)
            up = up.reshape(4, 2, 8, rank).transpose(1, 0, 2, 3).reshape(64, rank)
            nearest = A[:, :rank] * S[:rank] @ Z[:rank]
            assert np.abs(up @ down - nearest).max() < 1e-5
            assert np.allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=1e-4)
            kept = 100 * (S[:rank] ** 2).sum() / (S ** 2).sum()
            assert f"layer {l}: rank {rank} of 32 keeps {kept:.3f}%" in lines[rank], (kept, lines)
    exact, *losses = [loss_of(path, data=text) for path in (
        before, *(folder / f"r{rank}.safetensors" for rank in (1, 8, 31)))]
    assert exact - 1e-3 < losses[2] < losses[1] < losses[0], losses
    converted(before, folder / "d8.safetensors", "--to", "mla", "--kv-rank", 8, "--data", text)
    converted(before, folder / "d32.safetensors", "--to", "mla", "--kv-rank", 32, "--data", text)
    aware = loss_of(folder / "d8.safetensors", data=text)
    assert aware < losses[1] - 0.02, (aware, losses)
    (folder / "short").write_bytes(b"ab")  # what attention reads then has no covariance at all
    converted(before, folder / "s32.safetensors", "--to", "mla", "--kv-rank", 32, "--data",
              folder / "short")
    assert distance(ours(before), ours(folder / "s32.safetensors")) < 1e-4
    assert distance(ours(before), ours(folder / "d32.safetensors")) < 1e-4
    return f"loss {exact:.4f}; at C/4 {losses[1]:.4f}, rank cut on data {aware:.4f}"


def test_mla_data(folder):
    """Mean and covariance are those of what attention reads; for given ones the cut is the best
    that (31a) allows, and exact at the mean, whatever the rank."""
    model = convert.read(folder / "mha.safetensors")
    gpt, n = ours(folder / "mha.safetensors"), 96
    print_nothing = lambda line: None
    mean, covariance = convert.moments_on(model, TEXT, n, show=print_nothing)[0]
    ids = torch.tensor(list(TEXT.read_bytes()[:n])).view(2, 48)
    with torch.no_grad():
        x = gpt.h[0].ln_1(gpt.wte(ids) + gpt.wpe.weight).flatten(0, 1).double().numpy()  # (n, C)
    assert np.abs(mean.numpy() - x.mean(0)).max() < 1e-5
    assert np.abs(covariance.numpy() - np.cov(x.T, bias=True)).max() < 1e-5
    draw, C = np.random.default_rng(1), 32
    (folder / "long").write_bytes(draw.integers(1, 256, 70000).astype(np.uint8))
    whole, default = (convert.moments_on(model, folder / "long", *n, show=print_nothing)[1][1]
                      for n in ((65536,), ()))
    assert torch.equal(whole, default)
    w = {name: t().double() for name, t in model.tensors.items()}
    nothing = {name: torch.zeros_like(t) for name, t in w.items()}  # a layer that reads no x
    new, _ = convert.layer_to_mla(model.config, lambda name: nothing[f"h.1.{name}"], 8)
    assert all(t.isfinite().all() for t in new.values())
    mean, root = torch.tensor(draw.normal(size=C)), draw.normal(size=(C, C)) ** 3
    old = lambda name: w[f"h.1.{name}"]
    W, b_V = old("attn.c_attn.weight")[C:], old("attn.c_attn.bias")[2 * C:]      # (2C, C), (C)
    for rank in (1, 8, 20):
        new, kept = convert.layer_to_mla(model.config, old, rank,
                                         (mean, torch.tensor(root @ root.T)))
        up = new["attn.kv_b_proj.weight"].view(4, 2, 8, rank).transpose(0, 1).reshape(2 * C, rank)
        cut = up @ new["attn.kv_a_proj_with_mqa.weight"]                         # (2C, C)
        S = np.linalg.svd(W.numpy() @ root)[1]
        lost, least = np.linalg.norm((W - cut).numpy() @ root) ** 2, (S[rank:] ** 2).sum()
        assert least * 0.999999 < lost < least * 1.001, (rank, lost, least)
        assert abs(kept - 1 + least / (S ** 2).sum()) < 1e-3
        moved = mean + new["ln_1.bias"] - old("ln_1.bias")                       # (C)
        before = old("attn.c_proj.weight") @ (W[C:] @ mean + b_V) + old("attn.c_proj.bias")
        after = old("attn.c_proj.weight") @ (cut[C:] @ moved) + new["attn.c_proj.bias"]
        assert (before - after).abs().max() < 1e-9


def test_mla_query_bias(folder):
    """It finds its place whatever ln_1's weight holds: little, a zero, two. Without such a bias
    ln_1 stays as it is."""
    w, path = load_file(folder / "nanoFalse.safetensors"), folder / "z.safetensors"
    w["h.0.ln_1.weight"][3] = 0
    config = GPT.from_checkpoint(folder / "nanoFalse.safetensors").config
    save_file(w, path, config.to_metadata())
    converted(path, folder / "z_mla.safetensors", "--to", "mla", "--kv-rank", 32)
    assert distance(ours(path), ours(folder / "z_mla.safetensors")) < 1e-4
    assert torch.equal(load_file(folder / "z_mla.safetensors")["h.0.ln_1.bias"],
                       w["h.0.ln_1.bias"])
    w, path = load_file(folder / "h0.safetensors"), folder / "small.safetensors"
    for at, value in ((3, 1e-3), (3, 1e-6), (3, 1e-30), (3, 0), (7, 0)):
        w["h.0.ln_1.weight"][at] = value
        save_file(w, path, ours(folder / "h0.safetensors").config.to_metadata())
        converted(path, folder / "small_mla.safetensors", "--to", "mla", "--kv-rank", 48)
        off = distance(ours(path), ours(folder / "small_mla.safetensors"))
        assert off < 1e-5, (value, off)


# ---- Tokenizers ---------------------------------------------------------------------------------

def check_tokenizer(folder, name, tokens, eot, encode):
    """llm.c's file -> a folder -> the same file; encoded there as here, and as by the program."""
    V = len(tokens)
    random_gpt2(30, vocab_size=V, n_positions=40, n_embd=16, n_layer=1,
                n_head=2).save_pretrained(folder / f"{name}0")
    (folder / f"{name}_tokenizer.bin").write_bytes(prepro.tokenizer_file(tokens, eot))
    converted(folder / f"{name}0", folder / f"{name}.safetensors", "--tokenizer",
              folder / f"{name}_tokenizer.bin")
    converted(folder / f"{name}.safetensors", folder / f"{name}.d")
    theirs = AutoTokenizer.from_pretrained(folder / f"{name}.d")
    for text in ("It's 3 o'clock,  he said.\n\n\tNa\xefve \u4e16\u754c! don't  ",
                 "".join(map(chr, range(256))), TEXT.read_text()[:5000]):
        found = theirs(text)["input_ids"]
        assert found == list(encode(text.encode())), name
        assert theirs.decode(found) == text
    assert theirs.eos_token_id == (eot if len(tokens[eot]) > 1 else None)
    settings = json.loads((folder / f"{name}.d/tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 ask
    plain = Tokenizer.from_file(str(folder / f"{name}.d/tokenizer.json"))
    assert plain.encode("a<|endoftext|>").ids[1:] == (
        [eot] if theirs.eos_token_id else list(b"<|endoftext|>"))
    out = converted(folder / f"{name}.d", folder / f"{name}2.bin")
    assert f"its tokenizer, {V} tokens" in out, out
    assert (folder / f"{name}2_tokenizer.bin").read_bytes() == \
        (folder / f"{name}_tokenizer.bin").read_bytes()
    program("--generate", 5, "--prompt", "the", "--load", folder / f"{name}.safetensors",
            "--tokenizer", folder / f"{name}_tokenizer.bin")


def test_tokenizers(folder, gpt2):
    assert hf_tokenizer.merges_of([b"a", "\u00e9".encode()], 0) is None  # its bytes are no tokens
    tokens, eot, encode = prepro.bpe_tokenizer([(True, TEXT.read_bytes())], 400)
    check_tokenizer(folder, "bpe", tokens, eot, encode)
    check_tokenizer(folder, "byte", *prepro.byte_tokenizer())
    if gpt2:
        check_tokenizer(folder, "gpt2", *prepro.gpt2_tokenizer(gpt2))
    # Version 1 does not say what ends a text: GPT-2's 50256.
    many = [bytes([i % 256, i // 256]) for i in range(50257)]
    for version, eot in ((2, 7), (1, 50256)):
        old = bytearray(prepro.tokenizer_file(many, 7))
        old[4] = version
        (folder / "old.bin").write_bytes(old)
        assert convert.read_tokenizer(folder / "old.bin") == (many, eot)
    whole = json.loads((folder / "bpe.d/tokenizer.json").read_text())
    # One that cuts text otherwise, or that is no tokenizer at all, stays behind.
    for part, value, line in [
            ("pre_tokenizer", whole["pre_tokenizer"] | {"add_prefix_space": True}, "cut texts as"),
            ("pre_tokenizer", whole["pre_tokenizer"] | {"use_regex": False}, "cut texts as"),
            ("normalizer", {"type": "Lowercase"}, "cut texts as"), ("model", [1], "not built as"),
            ("pre_tokenizer", "x", "not built as"), ("added_tokens", [1], "not built as"),
            ("model", whole["model"] | {"merges": [1]}, "in the order"),
            ("model", whole["model"] | {"merges": [["\u4e16", "a"]]}, "in the order"),
            ("model", whole["model"] | {"vocab": {"\ud800": 1}}, "is not of bytes"),
            ("added_tokens", [{"content": "[PAD]", "id": 400}], "400, '[PAD]', is beyond"),
            ("added_tokens", whole["added_tokens"] + [{"content": "[PAD]", "id": 7}],
             "an added token that is no end of text, '[PAD]'")]:
        (folder / "bpe.d/tokenizer.json").write_text(json.dumps(whole | {part: value}))
        out = converted(folder / "bpe.d", folder / "bpe5.safetensors")
        assert "the tokenizer is left out" in out and line in out, (part, value, out)
    (folder / "odd.bin").write_bytes(prepro.tokenizer_file(tokens[:-1] + [b"\xff\xff"], 399))
    converted(folder / "bpe.safetensors", folder / "odd.d", "--tokenizer", folder / "odd.bin")
    assert AutoTokenizer.from_pretrained(folder / "odd.d").eos_token_id == 399
    (folder / "bpe.d/tokenizer.json").write_text(json.dumps(whole))
    (folder / "bpe6_tokenizer.bin").write_bytes(prepro.tokenizer_file(tokens, 0))
    out = converted(folder / "bpe0", folder / "bpe6.safetensors")
    assert "bpe6_tokenizer.bin was there before" in out and "--gpt2" in out, out
    converted(folder / "bpe0", folder / "bpe7.safetensors", "--tokenizer", folder / "bpe.d")
    assert (folder / "bpe7_tokenizer.bin").read_bytes() == \
        (folder / "bpe_tokenizer.bin").read_bytes()
    default = {k: v for k, v in whole["pre_tokenizer"].items() if k != "use_regex"}
    (folder / "bpe.d/tokenizer.json").write_text(json.dumps(whole | {"pre_tokenizer": default}))
    assert "left out" not in converted(folder / "bpe.d", folder / "bpe8.safetensors")
    # As transformers' own GPT-2 has it on the hub: vocab.json and merges.txt.
    os.remove(folder / "bpe.d/tokenizer.json")
    (folder / "bpe.d/vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "bpe.d/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    converted(folder / "bpe.d", folder / "bpe3.safetensors")
    assert (folder / "bpe3_tokenizer.bin").read_bytes() == \
        (folder / "bpe_tokenizer.bin").read_bytes()
    (folder / "sharp").mkdir()  # a merge that looks like a comment
    sharp = [bytes([b]) for b in range(256)] + [b"##", b"<|endoftext|>"]
    (folder / "sharp/vocab.json").write_text(json.dumps(
        {hf_tokenizer.spelled(token): i for i, token in enumerate(sharp)}))
    (folder / "sharp/merges.txt").write_text("#version: 0.2\n# #\n")
    assert hf_tokenizer.read(folder / "sharp", None, 258) == ((sharp, 257), "")
    merges[3], merges[100] = merges[100], merges[3]
    (folder / "bpe.d/merges.txt").write_text("\n".join(merges))
    assert "not in the order" in converted(folder / "bpe.d", folder / "bpe4.safetensors")
    assert not (folder / "bpe4_tokenizer.bin").exists()


# ---- What is refused ----------------------------------------------------------------------------

def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refused(arguments, line, folder, status=1):
    """One line, with that in it; the exit status; and not a byte in the folder is another one."""
    before = contents(folder)
    found, _, err = run(*arguments)
    assert found == status and line in err and "\n" not in err.strip(), \
        (arguments, line, found, err)
    assert contents(folder) == before, arguments


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


def test_refusals(top):
    folder = top / "bad"
    folder.mkdir()
    dst = folder / "dst.safetensors"
    mha, hf = folder / "mha.safetensors", folder / "hf"
    mha.write_bytes((top / "mha.safetensors").read_bytes())
    hf.mkdir()
    for name in ("config.json", "model.safetensors"):
        (hf / name).write_bytes((top / "hf0" / name).read_bytes())
    program("--attention", "mha", "--position", "rope", "--layers", 1, "--channels", 16, "--heads",
            2, "--steps", 0, "--save", folder / "rope.safetensors")
    for rank in (0, -1, 33, 1 << 40):
        refused([mha, dst, "--to", "mla", "--kv-rank", rank], f"--kv-rank {rank}, expected 1 to 32",
                folder)
    rope = folder / "rope.safetensors"
    refused([rope, dst, "--to", "mla", "--kv-rank", 4], "doc/writeup.md, section 9", folder)
    mla = top / "mha_mla.safetensors"
    refused([mla, dst, "--to", "mla", "--kv-rank", 4], "mla already", folder)
    refused([rope, folder / "x.bin"], "is mha with position rope", folder)
    refused([rope, folder / "x"], "dev/export_hf.py", folder)
    refused([mha, dst, "--dtype", "bf16"], "F32 only", folder)
    refused([mha, folder / "x.bin", "--dtype", "f16"], "f32 or bf16", folder)
    refused([mha, folder / "x.PT"], "cannot write .pt", folder)
    refused([mha, folder / "x.bin", "--to", "mla", "--kv-rank", 4], "expected X.safetensors",
            folder)
    refused([mha, ""], "an empty name", folder)
    refused([mha, "/"], "/: a mount point", folder)
    refused([folder / "nothing.bin", dst], "no such file", folder)
    refused([mha, folder / "no/dst.safetensors"], "cannot write: No such file", folder)
    refused([mha, dst, "--kv-rank", 3], "expected both or neither", folder, 2)
    refused([mha, dst, "--dtype", "int8"], "--dtype", folder, 2)
    refused([mha, dst, "--od\nd"], r"--od\nd", folder, 2)
    header = lambda n, version=1: struct.pack("<256i", 20240520, version, n, *[0] * 253)
    for data, line in [(None, "no such file"), (header(2, 2), "error: "), (b"a\0", "error: "),
                       (header(2) + bytes(60), "1084 bytes, expected a header of 1024, and 2 for "
                        "each of its 2 tokens"), (header(2) + bytes(3), "1027 bytes"),
                       (header(-506)[:12], "its -506 tokens"), (header(2)[:40], "40 bytes"),
                       (b"a", "1 tokens up to 97, expected two or more"),
                       (prepro.token_file([[7, 300]]), "2 tokens up to 300, expected two or more, "
                        "all below 256")]:
        if data:
            (folder / "data").write_bytes(data)
        refused([mha, dst, "--to", "mla", "--kv-rank", 8, "--data", folder / "data"], line, folder)
    refused([top / "h2.safetensors", dst, "--to", "mla", "--kv-rank", 8, "--data", TEXT],
            "a text, read as bytes, but the model has 257 tokens: expected a token file", folder)
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    for _ in range(2):  # what a link leads to is replaced, not the link
        converted(mha, f"{folder}/link/")
        assert (folder / "link").is_symlink() and (folder / "real/model.safetensors").exists()
    (folder / "away.bin").symlink_to("nowhere")
    refused([mha, folder / "away.bin"], "a link that leads to no file", folder)
    assert "x.d: written, a folder" in converted(mha, folder / "x.d")
    (folder / "t.bin").write_bytes(prepro.tokenizer_file([b"a"] * 257, 0))
    refused([mha, dst, "--tokenizer", folder / "t.bin"], "257 tokens, the model's vocab", folder)
    refused([mha, dst, "--tokenizer", mha], "expected a tokenizer", folder)
    for bad in ({"itos": Evil()}, {"stoi": {}}, {"itos": {1: "a"}}, {"itos": [1]}, 3):
        (folder / "t.bin").write_bytes(pickle.dumps(bad))
        refused([mha, dst, "--tokenizer", folder / "t.bin"], "not nanoGPT's meta.pkl", folder)
    null = "/dev/null"  # a pipe is refused like it, before it is waited for
    for arguments in ([null, dst], [mha, dst, "--tokenizer", null],
                      [mha, dst, "--to", "mla", "--kv-rank", 4, "--data", null]):
        refused(arguments, "no regular file", folder)
    refused([mha, dst, "--tokenizer", top], "no tokenizer.json", folder)
    (folder / "t.bin").write_bytes(pickle.dumps({"itos": {0: "a"}})[:-2])
    refused([mha, dst, "--tokenizer", folder / "t.bin"], "not nanoGPT's meta.pkl", folder)

    # What is not of the kind is never replaced; what is, is kept.
    for there, target in ((b"a thesis", dst), (b"a thesis", folder / "x.bin"),
                          (b"a thesis", folder / "x.BIN"), (b"a thesis", folder / "x"),
                          (b"PK\3\4", dst)):
        target.write_bytes(there)
        refused([mha, target], "will not replace it", folder)
        target.unlink()
    (folder / "dst_tokenizer.bin").write_bytes(b"a thesis")
    refused([top / "bpe.safetensors", dst], "dst_tokenizer.bin: exists and is no tokenizer", folder)
    (folder / "dst_tokenizer.bin").unlink()
    (folder / "x").mkdir()
    (folder / "x/thesis").write_text("a")
    refused([mha, folder / "x"], "will not replace it", folder)
    (folder / "x/config.json").write_text('{"model_type": "llama"}')
    refused([mha, folder / "x"], "model_type is llama", folder)
    (folder / "x/config.json").write_text('{"model_type": "gpt2"}')
    converted(mha, folder / "x")
    assert (folder / "x.old/thesis").exists() and (folder / "x/model.safetensors").exists()
    dst.write_bytes(mha.read_bytes())
    dst.chmod(0o400)
    refused([mha, dst], "read-only", folder)
    dst.chmod(0o600)
    converted(mha, dst)
    plain = dst.read_bytes()
    converted(mha, dst, "--to", "mla", "--kv-rank", 4)
    assert (folder / "dst.safetensors.old").read_bytes() == mha.read_bytes()
    assert (folder / "dst.safetensors.old2").read_bytes() == plain
    assert dst.stat().st_mode & 0o777 == 0o600
    run_of_c = subprocess.Popen(
        [PROGRAM, "--train-data", TEXT, "--save", dst, "--load", dst, "--steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while not Path(f"{dst}.lock").exists():
            time.sleep(0.01)
        run_of_c.stdout.readline()
        found, _, err = run(mha, dst)
        assert found == 1 and "another process is writing it" in err, err
    finally:
        run_of_c.kill()
        run_of_c.wait()
    for name in ("dst.safetensors", "dst.safetensors.lock", "dst.safetensors.tmp"):
        (folder / name).unlink(missing_ok=True)


def test_hostile_files(top):
    """Files cut at many places; numbers that do not fit, huge or negative; pickles that run."""
    folder = top / "bad"
    dst, src = folder / "new.safetensors", folder / "src"
    llmc = (top / "l03.bin").read_bytes()
    sources = {"llm.c": llmc, "ours": (top / "mha.safetensors").read_bytes(),
               "nanoGPT": (top / "ckpt.pt").read_bytes()}
    tried = 0
    for kind, whole in sources.items():
        for at in {0, 1, 3, 4, 7, 8, 9, 100, 1023, 1024, len(whole) // 2, len(whole) - 1,
                   *np.random.default_rng(1).integers(len(whole), size=10).tolist()}:
            src.write_bytes(whole[:at])
            refused([src, dst], "src: ", folder)
            tried += 1
        if kind != "nanoGPT":  # a zip may have a tail
            src.write_bytes(whole + b"\0")
            refused([src, dst], "src: ", folder)
    for place in range(8):
        for value in (-1, 0, 1, 7, 1 << 24, (1 << 31) - 1, -(1 << 31)):
            header = list(struct.unpack("<8i", llmc[:32]))
            if header[place] == value or (place, value) in ((5, 1), (3, 1), (3, 7)):
                continue  # any NH that divides C will do, and any V below the padded one
            header[place] = value
            src.write_bytes(struct.pack("<8i", *header) + llmc[32:])
            refused([src, dst], "src: ", folder)
            tried += 1
    nan = bytearray(llmc)
    nan[-4:] = struct.pack("<f", float("nan"))
    src.write_bytes(nan)
    for target in (dst, folder / "new"):  # found out at its very end
        refused([src, target], "ln_f.bias holds numbers that are not finite", folder)
        assert not list(folder.glob("new*"))
    w = load_file(top / "mha.safetensors")
    w["h.1.ln_1.weight"][3] = 1e-41  # whose reciprocal float32 does not hold
    save_file(w, src, ours(top / "mha.safetensors").config.to_metadata())
    refused([src, dst, "--to", "mla", "--kv-rank", 32], "too large for torch.float32", folder)
    for name in w:
        w[name] = w[name] * 1e25
    save_file(w, src, ours(top / "mha.safetensors").config.to_metadata())
    refused([src, dst, "--to", "mla", "--kv-rank", 8, "--data", TEXT], "is not finite", folder)
    nan[-4:] = struct.pack("<f", 1e6)
    src.write_bytes(nan)
    refused([src, folder / "new", "--dtype", "f16"], "holds 1e+06, too large for", folder)
    random_gpt2(50, vocab_size=65537, n_positions=4, n_embd=4, n_layer=1,
                n_head=1).save_pretrained(folder / "wide")
    refused([folder / "wide", dst], "vocabulary 65537, channels 4, expected at most", folder)

    whole = sources["ours"]
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + n])
    for key, value in [("n_layer", "16777216"), ("n_layer", "1"), ("n_layer", "x"),
                       ("vocab_size", "16777216"), ("n_embd", "9" * 30), ("n_embd", "-4"),
                       ("n_head", "0"), ("n_head", "3"), ("n_kv_head", "0"), ("n_kv_head", "2"),
                       ("kv_rank", "1e9"), ("kv_rank", "8"), ("rope_dim", "4"),
                       ("attention", "mla"), ("attention", "flash"), ("position", "rope"),
                       ("block_size", "47"), ("format", "pt"), ("latent_norm", None)]:
        changed = json.loads(json.dumps(header))
        changed["__metadata__"][key] = value
        if value is None:
            del changed["__metadata__"][key]
        text = json.dumps(changed).encode()
        src.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n:])
        refused([src, dst], "src: ", folder)
        tried += 1

    hf = folder / "hf"
    config = json.loads((hf / "config.json").read_text())
    for key, value, line in [
            ("model_type", "llama", "model_type is 'llama', expected 'gpt2'"),
            ("n_layer", 4, "has no tensor h.3."), ("n_layer", 2, "no place"),
            ("n_layer", 1 << 24, "layers"), ("n_embd", "48", "n_embd is '48'"),
            ("n_embd", 1e9, "n_embd is"), ("n_head", 5, "not a multiple"), ("n_head", 0, "n_head"),
            ("vocab_size", 1 << 24, "has shape"), ("n_positions", -1, "expected a whole number"),
            ("activation_function", "gelu", "activation_function is 'gelu', expected 'gelu_"),
            ("scale_attn_weights", False, "scale_attn_weights is False, expected True"),
            ("add_cross_attention", True, "add_cross_attention is True, expected False"),
            ("num_attention_heads", 5, "not a multiple"),
            ("n_inner", 7, "n_inner is 7, expected 192"),
            ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by"),
            ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06, expected 1e-05"),
            ("quantization_config", {"bits": 4}, "quantized"), ("n_layer", True, "n_layer is True"),
            ("tie_word_embeddings", False, "tie_word")]:
        (hf / "config.json").write_text(json.dumps(config | {key: value}))
        refused([hf, dst], line, folder)
        tried += 1
    for text in ("", "{", "[]", "[" * 100000, "\0"):
        (hf / "config.json").write_text(text)
        refused([hf, dst], "config.json: ", folder)
    (hf / "config.json").unlink()
    refused([hf, dst], "without config.json", folder)
    (hf / "config.json").write_text(json.dumps(config))
    weights = load_file(hf / "model.safetensors")
    for name, new, line in [
            ("transformer.wpe.weight", torch.ones(64, 48, dtype=torch.int8), "has dtype int8"),
            ("transformer.h.1.mlp.c_fc.weight", torch.ones(192, 48), "has shape (48, 192)"),
            ("transformer.extra", torch.ones(2), "tensor extra has no place"),
            ("bad\nname\x1b[2J", torch.ones(2), r"tensor bad\nname\x1b[2J has no place"),
            ("lm_head.weight", torch.ones(199, 48), "lm_head.weight is not equal"),
            ("ln_f.bias", torch.ones(48), "both ln_f.bias and transformer.ln_f.bias"),
            ("transformer.wte.weight", None, "has no tensor wte.weight")]:
        changed = dict(weights)
        changed[name] = new
        if new is None:
            del changed[name]
        save_file(changed, hf / "model.safetensors")
        refused([hf, dst], line, folder)
    (hf / "model.safetensors").unlink()
    refused([hf, dst], "has no model.safetensors", folder)
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    refused([hf, dst], "does not name files of this folder", folder)
    (hf / "model.safetensors.index.json").unlink()
    torch.save({"a": Evil()}, hf / "pytorch_model.bin")
    refused([hf, dst], "holds more than tensors", folder)

    plain = torch.load(top / "ckpt.pt", weights_only=True)
    wide = torch.ones(1).expand(65, 32)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    eight = plain["model"]["transformer.wte.weight"].to(torch.float8_e4m3fn)
    for what, line in [
            (plain | {"model_args": Evil()}, "holds more than tensors and plain values"),
            (plain | {"config": Evil()}, "holds more than tensors"),
            ({"state": 1}, "without model and model_args"), ([], "without model and model_args"),
            (plain | {"model": plain["model"] | {"transformer.wte.weight": 3}}, "is int, expected"),
            (plain | {"model": plain["model"] | {"transformer.wte.weight": wide}}, "larger than"),
            (plain | {"model": plain["model"] | {"transformer.wte.weight": wide.to("meta")}},
             "expected a plain tensor"),
            (plain | {"model": plain["model"] | {3: torch.ones(1)}}, "expected a plain tensor"),
            (plain | {"model": plain["model"] | {"x": nested}}, "expected a plain tensor"),
            (plain | {"model": plain["model"] | {"transformer.ln_f.bias": torch.ones(7)}},
             "ln_f.bias has shape (7,), expected (32,)"),
            (plain | {"model": plain["model"] | {"lm_head.weight": eight}},
             "lm_head.weight has dtype float8_e4m3fn"),
            (plain | {"model_args": plain["model_args"] | {"n_layer": 1 << 24}}, "layers"),
            (plain | {"model_args": plain["model_args"] | {"n_embd": 1 << 24}}, "has shape"),
            (plain | {"model_args": {}}, "n_layer is None")]:
        torch.save(what, src)
        refused([src, dst], line, folder)
        tried += 1
    torch.save(plain, src, _use_new_zipfile_serialization=False)
    draw, whole = np.random.default_rng(2), src.read_bytes()
    for _ in range(100):  # damaged, and perhaps still a checkpoint
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[draw.integers(2000, size=3)] = draw.integers(256, size=3)
        src.write_bytes(damaged)
        status, _, err = run(src, folder / "new.bin")
        assert status == 0 or (status == 1 and "src: " in err and "\n" not in err), err
        for path in folder.glob("new.bin*"):
            path.unlink()
    src.write_bytes(pickle.dumps(Evil()))
    refused([src, dst], "holds more than tensors", folder)
    src.write_bytes(pickle.dumps({"model": 1}))
    refused([src, dst], "src: ", folder)
    assert not list(Path().glob("evil_was_here")) and not list(folder.glob("evil*"))
    return f"{tried} bad files and more, each refused in a line"


# ---- Bad machines -------------------------------------------------------------------------------

def forked(top, *arguments, output=lambda: os.open(os.devnull, os.O_WRONLY), limits={}):
    """convert.py on that command line in a process of its own, without the seconds in which Python
    and PyTorch start. output: makes its standard output; limits: {of resource: value}."""
    def begin():
        torch.set_num_threads(1)  # others do not outlive a fork
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output(), 1)
        os.dup2(os.open(top / "machine.err", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), 2)
        for of, value in limits.items():
            resource.setrlimit(of, (value, value))
        sys.argv = ["convert.py", *map(str, arguments)]
        runpy.run_path(str(ROOT / "dev/convert.py"), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    return process


def test_make(folder):
    """make finetune takes a folder whose name has a blank."""
    said = subprocess.run(["make", "-n", "finetune", "GPT2=my hf"], cwd=ROOT, capture_output=True)
    assert b'convert.py "my hf" data/' in said.stdout, said


def test_machine(top):
    """An output that nobody reads, a full disk, a signal, too little memory."""
    folder = top / "machine"
    folder.mkdir()
    L, C, V, T = 60, 1024, 256, 64
    with open(top / "huge.bin", "wb") as file:  # 3 GB of zeros, of which the disk holds none
        file.write(struct.pack("<256i", 20240326, 3, T, V, L, 16, C, V, *[0] * 248))
        file.truncate(1024 + 4 * (V + T + L * (12 * C + 13) + 2) * C)
    small = (top / "bpe0", folder / "m.safetensors", "--tokenizer", top / "bpe_tokenizer.bin")
    large = (top / "huge.bin", folder / "huge.safetensors")
    new = lambda: {p.name for p in folder.iterdir()}

    def ended(process):
        """Its exit status, and what it said on standard error"""
        process.join()
        return process.exitcode, (top / "machine.err").read_text()

    def shut():
        read, write = os.pipe()
        os.close(read)
        return write

    status, err = ended(forked(top, *small, output=shut))
    assert status == 0 and err.count("\n") == 1, (status, err)
    assert new() == {"m.safetensors", "m_tokenizer.bin"}
    for path in folder.iterdir():
        path.unlink()
    fits = (top / "bpe_tokenizer.bin").stat().st_size  # but the model does not
    status, err = ended(forked(top, *small, limits={resource.RLIMIT_FSIZE: fits}))
    assert (status, err.count("\n"), new()) == (1, 1, set()), (status, err)
    assert "cannot write: File too large" in err
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        status, err = ended(forked(top, *large, limits={resource.RLIMIT_AS: held + (1 << 30)}))
        assert (status, err.count("\n"), new()) == (1, 1, set()), (status, err)
        assert "not enough memory" in err
        for tool in ("convert.py", "export_hf.py"):  # Ctrl-C while they import
            starting = subprocess.Popen(
                [sys.executable, ROOT / "dev" / tool, "--help"], stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # in the background this test's own is to be ignored
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            while "numpy" not in Path(f"/proc/{starting.pid}/maps").read_text():
                time.sleep(0.01)
            starting.send_signal(signal.SIGINT)
            said = starting.communicate()[1]
            assert (said, starting.returncode) == (b"", -signal.SIGINT), said
    odd = os.fsencode(folder / "\xe4") + b"\xff.bin"  # no UTF-8, and not to be shown in ASCII
    ran = subprocess.run([sys.executable, ROOT / "dev/convert.py", top / "bpe.safetensors", odd],
                         env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True)
    assert ran.returncode == 0 and rb"\xe4\udcff.bin: written" in ran.stdout, ran.stderr
    for path in folder.iterdir():
        path.unlink()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        running = forked(top, *large)
        while not list(folder.glob("*.part")) and running.is_alive():
            time.sleep(0.01)
        os.kill(running.pid, number)
        assert ended(running)[0] == 128 + number and not new()


# ---- Memory -------------------------------------------------------------------------------------

def peak_memory(*arguments):
    """Of convert.py on that command line, in bytes. A process counts as its own what the process
    that starts it holds, hence a small one in between."""
    between = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, " \
              "stdout=subprocess.DEVNULL); " \
              "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    ran = subprocess.run([sys.executable, "-c", between, sys.executable, ROOT / "dev/convert.py",
                          *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, (arguments, ran.stderr)
    return int(ran.stdout) * (1 if sys.platform == "darwin" else 1024)


def test_memory(folder, **size):
    """Of a model with random weights: at most 3 times its size, in every direction. What Python
    and PyTorch take by themselves counts too in a large model, and not in a small one."""
    theirs = random_gpt2(40, **size)
    size = sum(p.numel() * 4 for p in theirs.parameters())
    write_llmc(folder / "big.bin", theirs)
    del theirs
    tokens = struct.pack("<256i600H", 20240520, 1, 600, *[0] * 253, *range(600))
    (folder / "tokens.bin").write_bytes(tokens)
    alone = 0 if size > 400e6 else peak_memory("--help")
    peaks = {}
    for src, dst, more in (("big.bin", "big.safetensors", ()), ("big.safetensors", "big.hf", ()),
                           ("big.hf", "big2.safetensors", ()),
                           ("big.bin", "big_mla.safetensors", ("--to", "mla", "--kv-rank", 128)),
                           ("big.bin", "big_data.safetensors", (
                               "--to", "mla", "--kv-rank", 128, "--data", folder / "tokens.bin"))):
        peaks[dst] = (peak_memory(folder / src, folder / dst, *more) - alone) / size
    same_tensors(folder / "big.safetensors", folder / "big2.safetensors")
    assert max(peaks.values()) < 3, peaks
    return f"{size / 1e6:.0f} MB: " + ", ".join(f"{dst} {x:.2f}" for dst, x in peaks.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--gpt2-files", metavar="DIR")
    args = parser.parse_args()
    if not os.access(PROGRAM, os.X_OK):
        sys.exit("convert_test.py: no ./train_gpt2_mla, expected the program: run make first")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = dict.fromkeys([test_llmc, test_hf, test_nanogpt, test_hub, test_mla_exact,
                               test_mla_rank, test_mla_data, test_mla_query_bias, test_tokenizers,
                               test_refusals, test_hostile_files, test_make, test_machine], {})
        tests[test_tokenizers] = {"gpt2": args.gpt2_files}
        tests[test_memory] = dict(vocab_size=20000, n_positions=256, n_embd=384, n_layer=12,
                                  n_head=6)
        if args.large:
            tests = {test_memory: dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12,
                                       n_head=12)}
        for test, more in tests.items():
            said = test(folder, **more)
            print(f"{test.__name__}: as expected{', ' + said if said else ''} "
                  f"({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

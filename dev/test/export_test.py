"""Tests of export_hf.py: what transformers open computes and writes what the C program does.

    python3 dev/test/export_test.py     with the program in the top folder; half a minute
(pip install torch numpy safetensors transformers tokenizers)
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODULES = tempfile.TemporaryDirectory()  # where transformers copy a folder's Python file
os.environ["HF_MODULES_CACHE"] = MODULES.name

import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from convert_test import PROGRAM, ROOT, TEXT, contents, prepro, program, same_tensors  # noqa: E402
import export_hf  # noqa: E402
from gpt2_mla import GPT, load_safetensors  # noqa: E402

KINDS = [("mha", "learned", ()), ("gqa", "rope", ("--kv-heads", 2)), ("mha", "decoupled", ()),
         ("mla", "learned", ("--kv-rank", 12, "--q-rank", 0, "--latent-norm", "none")),
         ("mla", "decoupled", ()),
         ("mla", "decoupled", ("--kv-heads", 2, "--nope-dim", 12, "--latent-norm", "rmsnorm"))]


def export(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        export_hf.export(*map(str, arguments))


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_reference(folder):
    """The models of dev/test/reference, of every kind: in float32 what gpt2_mla.py computes, in
    float64 the dumps' logits and losses."""
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    paths = sorted((ROOT / "dev/test/reference").glob("m*_*.safetensors")) + \
        sorted((ROOT / "dev/test/reference").glob("gqa_*.safetensors"))
    for path in paths:
        export(path, folder / path.stem)
        model = opened(folder / path.stem)
        tensors, _ = load_safetensors(path)
        tokens = torch.from_numpy(tensors["ref.tokens"].astype("int64"))         # (B, T+1)
        for dtype, expected in ((torch.float32, GPT.from_checkpoint(path)(tokens[:, :-1])[0]),
                                (torch.float64, torch.from_numpy(tensors["ref.logits"]))):
            with torch.no_grad():
                logits = model.to(dtype)(input_ids=tokens[:, :-1]).logits
            worst[dtype] = max(worst[dtype], (logits - expected).abs().max().item())
        loss = model(input_ids=tokens, labels=tokens).loss if "rope" in path.stem else None
        assert loss is None or abs(loss - tensors["ref.loss"][0]) < 1e-6
    assert len(paths) == 16 and max(worst.values()) < 1e-5, (len(paths), worst)
    return f"{len(paths)} models, logits to {worst[torch.float32]:.1e}, " \
           f"in float64 {worst[torch.float64]:.1e}"


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def check_text(model, tokenizer, checkpoint, prompt, n, *more):
    """Greedy text by the cache of generate, and without one, is the C program's."""
    text = program("--generate", n, "--prompt", prompt, "--temperature", 0, "--load", checkpoint,
                   *more).decode()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for use_cache in (True, False):
        out = model.generate(ids, max_new_tokens=n, do_sample=False, use_cache=use_cache)
        assert tokenizer.decode(out[0]) == text[:-1], (checkpoint, use_cache, out, text)
    return out


def test_text(folder):
    """Trained models of bytes, of every kind; caches of the sizes that they should have. Their
    text counts, for what comes next to depend on all before; a newline must not end it."""
    numbers = folder / "numbers"
    numbers.write_text("\n".join(map(str, range(5000, 9000))))
    for i, (attention, position, more) in enumerate(KINDS):
        checkpoint = folder / f"k{i}.safetensors"
        program("--attention", attention, "--position", position, *more, "--layers", 2,
                "--channels", 32, "--heads", 4, "--seq-len", 64, "--steps", 600, "--train-data",
                numbers, "--sample-every", 0, "--save", checkpoint)
        export(checkpoint, folder / f"k{i}")
        model = opened(folder / f"k{i}")
        tokenizer = tokenizer_of(folder / f"k{i}")
        ids = check_text(model, tokenizer, checkpoint, "6789\n67", 50)
        assert model.config.eos_token_id is None and ord("\n") in ids[0, 7:]
        c = GPT.from_checkpoint(checkpoint).config
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            again = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
            step = model(input_ids=ids[:, :1], **{export_cache(model): out[export_cache(model)]})
        assert out.logits.shape[1] == ids.shape[1]
        assert (step.logits - again).abs().max() < 1e-5
        layer = out[export_cache(model)].layers[0]
        kept = layer.keys.shape[1] * layer.keys.shape[3] + \
            layer.values.shape[1] * layer.values.shape[3]
        expected = c.kv_rank + c.rope_dim if attention == "mla" else \
            c.n_kv_head * (c.qk_size + c.head_size)
        assert kept == expected, (attention, kept, expected)
        beams = model.generate(ids[:, :9], max_new_tokens=20, num_beams=3, do_sample=False)
        assert beams.shape == (1, 29)
        two = model.generate(torch.cat([ids[:, :9], ids[:, 5:14]]), max_new_tokens=20,
                             do_sample=False)
        assert torch.equal(two[:1], ids[:, :29])
        longer, limited = ids[:, :1].expand(1, 65), position == "learned"
        model(longer[:, limited:])
        for line, call in [
                *[("65 tokens, but this model has 64 learned", lambda: model(longer))] * limited,
                ("no padding", lambda: model(ids, torch.arange(ids.shape[1])[None] > 0)),
                ("StaticCache, expected", lambda: model.generate(
                    ids[:, :9], max_new_tokens=5, cache_implementation="static")),
                ("0 tokens after 3", lambda: model.generate(ids[:, :9], prefill_chunk_size=3)),
                ("0 tokens after 0 in the cache", lambda: model(ids[:, :0])),
                ("position_ids is given", lambda: model(ids, position_ids=ids)),
                ("inputs_embeds is given", lambda: model(ids, inputs_embeds=torch.ones(1))),
                ("output_hidden_states is given", lambda: model.generate(
                    ids[:, :9], output_hidden_states=True, return_dict_in_generate=True))]:
            try:
                call()
            except ValueError as error:
                assert line in str(error), error
            else:
                raise AssertionError(f"nothing was said of {line}")
        unused = dict(inputs_embeds=None, output_attentions=False, output_hidden_states=None)
        plain = model(ids, **unused, return_dict=False)
        assert isinstance(plain, tuple) and torch.equal(plain[0], out.logits)
        last = model(ids, logits_to_keep=2).logits
        assert last.shape[1] == 2 and (last - out.logits[:, -2:]).abs().max() < 1e-5
        counts = torch.arange(ids.shape[1]) % 3 > 0
        loss = cross_entropy(out.logits[0, :-1][counts[1:]], ids[0, 1:][counts[1:]])
        assert abs(model(ids, labels=ids.where(counts, -100)).loss - loss) < 1e-6
        theirs = model.config
        assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
                theirs.num_key_value_heads, theirs.max_position_embeddings) == \
            (c.n_embd, c.n_layer, c.n_head, c.n_kv_head, c.block_size)
        assert not model.accepts_loss_kwargs  # else Trainer takes micro-batches' losses for shares


def export_cache(model):
    return sys.modules[type(model).__module__].CACHE


def test_bpe(folder):
    """A vocabulary of its own, learned here; end of text is its last token."""
    subprocess.run([sys.executable, ROOT / "prepro_tinyshakespeare.py", "--vocab", "320", "--input",
                    TEXT, "--out-dir", folder / "bpe"], check=True, stdout=subprocess.DEVNULL)
    names = [folder / f"bpe/tinyshakespeare_{part}.bin" for part in ("train", "tokenizer")]
    program("--train-data", names[0], "--tokenizer", names[1], "--layers", 2, "--channels", 32,
            "--heads", 4, "--seq-len", 64, "--steps", 150, "--sample-every", 0, "--save",
            folder / "b.safetensors")
    export(folder / "b.safetensors", folder / "b", names[1])
    tokenizer = tokenizer_of(folder / "b")
    assert tokenizer.eos_token_id == 319 == AutoConfig.from_pretrained(
        folder / "b", trust_remote_code=True).eos_token_id
    check_text(opened(folder / "b"), tokenizer, folder / "b.safetensors", "The model's state", 40,
               "--tokenizer", names[1])
    assert prepro.END_OF_TEXT == tokenizer.eos_token


def test_files(folder):
    """It saves and opens itself again; nothing but an export is ever replaced."""
    model = opened(folder / "k5")
    model.save_pretrained(folder / "saved")
    same_tensors(folder / "saved/model.safetensors", folder / "k5/model.safetensors")
    assert torch.equal(opened(folder / "saved")(torch.arange(9)[None]).logits,
                       model(torch.arange(9)[None]).logits)
    export(folder / "k4.safetensors", folder / "k5")
    same_tensors(folder / "k5.old/model.safetensors", folder / "saved/model.safetensors")
    (folder / "mine").mkdir()
    (folder / "mine/thesis").write_text("a")
    (folder / "cut.safetensors").write_bytes((folder / "k4.safetensors").read_bytes()[:-1])
    before = contents(folder)
    for src, dst, line in [("k4.safetensors", "mine", "will not replace it"),
                           ("k4.safetensors", "cut.safetensors", "is no folder"),
                           ("cut.safetensors", "new", "cut short"), ("no", "new", "no such file"),
                           ("k4.safetensors", "no/new", "cannot write")]:
        try:
            export(folder / src, folder / dst)
        except SystemExit as error:
            assert line in error.code and "\n" not in error.code, error
        else:
            raise AssertionError(f"{src} {dst} was not refused")
    ran = subprocess.run([sys.executable, ROOT / "dev/export_hf.py", folder / "no", folder / "new"],
                         capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1, ran.stderr
    assert contents(folder) == before


def main():
    if not os.access(PROGRAM, os.X_OK):
        sys.exit("export_test.py: no ./train_gpt2_mla, expected the program: run make first")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    began = time.time()
    with MODULES, tempfile.TemporaryDirectory() as name:
        for test in (test_reference, test_text, test_bpe, test_files):
            said = test(Path(name))
            print(f"{test.__name__}: as expected{', ' + said if said else ''} "
                  f"({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

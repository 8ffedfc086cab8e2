"""Models from elsewhere and to elsewhere: llm.c, Hugging Face's GPT-2, nanoGPT; and MHA into MLA.

    python3 dev/convert.py gpt2_124M.bin gpt2.safetensors         llm.c's checkpoint into ours
    python3 dev/convert.py FOLDER gpt2.safetensors                a Hugging Face GPT-2's folder
    python3 dev/convert.py openai-community/gpt2 gpt2.safetensors the same, fetched by its hub name
    python3 dev/convert.py ckpt.pt nano.safetensors               nanoGPT's checkpoint
    python3 dev/convert.py gpt2.safetensors back.bin              ours for llm.c ...
    python3 dev/convert.py gpt2.safetensors FOLDER --dtype bf16   ... and for Hugging Face's GPT-2
    python3 dev/convert.py gpt2.safetensors mla.safetensors --to mla --kv-rank 384

What SRC is, it sees for itself. DST's name says what to write: X.safetensors this program's
checkpoint, X.bin llm.c's, anything else a folder. Only mha with learned positions fits llm.c and
Hugging Face's GPT-2; for all other models there is dev/export_hf.py.

--to mla rewrites mha, gqa or mqa with learned positions as mla (the writeup's section 12, (31)).
Rank R = C is exact, or already R = 2 NKV HS if that is less. With --data FILE, tokens, or for
a model of bytes a text, the rank is cut where the activations on that data lose least, not the
weights.

The tokenizer comes along: from SRC's folder or beside SRC, or --tokenizer FILE (llm.c's, nanoGPT's
meta.pkl, or a Hugging Face folder), to X_tokenizer.bin in llm.c's format, or into the folder. A DST
that is there already is replaced only if it is of the kind that is written, and is kept as DST.old.
(pip install torch numpy safetensors)
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import pickle
import re
import signal
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds, and may catch exceptions
try:
    import numpy as np
    import torch
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install torch numpy safetensors") from None

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "dev/pytorch")]
import hf_tokenizer  # noqa: E402
from gpt2_mla import GPT, Config, read_tokens, windows  # noqa: E402
from prepro_tinyshakespeare import (Parser, byte_tokenizer, check_replaceable, fail,  # noqa: E402
                                    one_line, say, tokenizer_file)
from whole_files import (check_file, check_folder, check_unlocked, place, read_json,  # noqa: E402
                         replacing, run_command, write_json)

LLMC_MAGIC, TOKENIZER_MAGIC = 20240326, 20240328
LLMC_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OURS = b'{"__metadata__":{"format":"train_gpt2_mla"'  # how a checkpoint's header starts
LARGEST = 65536  # vocabulary and channels, as the C program has it

# In llm.c's order.
IN_LAYER = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
            "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias",
            "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")
# Hugging Face's GPT-2 has these as (in, out).
TRANSPOSED = tuple(name for name in IN_LAYER if name.endswith("weight") and "ln_" not in name)
# transformers read these too, and believe them more.
HF_OTHER_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers",
                  "n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}
NO_MOMENTS = "the optimizer's moments do not come along"


@dataclass
class Model:
    """A model, wherever it is from, in this program's names and shapes.

    A tensor is read, or computed, each time it is called for, so that memory holds one at a time.
    """

    kind: str                     # in words, for messages
    config: Config
    tensors: dict                 # name -> function without arguments -> float32, (out, in)
    tokenizer: tuple = None       # tokens as bytes, and the id of end of text
    left_out: str = ""            # why a tokenizer that is there is none of these
    notes: list = field(default_factory=list)  # what does not come along, a line each

    def __str__(self):
        c = self.config
        return f"{self.kind}, {c.attention} {c.position}, {c.n_layer} layers, {c.n_embd} channels"


# ---- Checks that all readers share --------------------------------------------------------------

def is_finite(tensor):
    """The sum alone tells nearly always, and needs no memory; but it may overflow."""
    return torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all()


def as_float32(path, name, tensor):
    """A tensor of any floating dtype in float32. Refuses other dtypes, and what is not finite."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fail(f"{path}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected "
             "float32, bfloat16, float16 or float64: quantized weights cannot be converted")
    tensor = tensor.detach().to(torch.float32)
    if not is_finite(tensor):
        fail(f"{path}: {name} holds numbers that are not finite, expected finite ones")
    return tensor


def make_config(path, attention="mha", position="learned", **values):
    """Config from numbers that a file claims; an impossible one is refused in a line."""
    for key, value in values.items():
        least = 0 if key in ("q_rank", "kv_rank", "rope_dim", "nope_dim") else 1
        if key != "latent_norm" and (
                type(value) is not int or not least <= value <= 1 << 24):
            fail(f"{path}: {key} is {value!r}, expected a whole number from {least} to {1 << 24}")
    try:
        return Config(attention, position, **values)
    except ValueError as error:
        fail(f"{path}: {one_line(error)}")


def shapes_of(config):
    """{name: shape} of all tensors of such a model, in the order of our checkpoints"""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in GPT(config).state_dict().items()}


def check_shapes(path, config, found):
    """found: {name: shape}. What is missing, of another shape, or too much is refused."""
    if config.n_layer > len(found):
        fail(f"{path}: {config.n_layer} layers, but {len(found)} tensors in all: expected more")
    expected = shapes_of(config)
    for name, shape in expected.items():
        if name not in found:
            fail(f"{path}: has no tensor {name}, which its configuration needs")
        if tuple(found[name]) != shape:
            fail(f"{path}: {name} has shape {tuple(found[name])}, expected {shape}")
    for name in found:
        if name not in expected:
            fail(f"{path}: tensor {name} has no place in a model of its configuration")


# ---- Reading ------------------------------------------------------------------------------------

def open_safetensors(path):
    """A file's {name: shape}, metadata, and a function name -> tensor. Bad files are refused."""
    try:
        file = safe_open(path, "pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return shapes, file.metadata() or {}, file.get_tensor
    except (SafetensorError, OSError, ValueError) as error:
        fail(f"{path}: not a safetensors file, or cut short: {one_line(error)}")


def read_ours(path):
    """This program's checkpoint, of any kind. Optimizer moments and references stay behind."""
    shapes, metadata, get = open_safetensors(path)
    if metadata.get("format") != "train_gpt2_mla":
        fail(f"{path}: its metadata's format is {metadata.get('format', 'missing')}, expected "
             "train_gpt2_mla (of a Hugging Face model, name the folder)")
    claimed = {}
    for f in fields(Config):
        value = metadata.get(f.name)
        if f.name == "nope_dim" and value is None:
            continue  # HS - RD, then
        if value is None:
            fail(f"{path}: its metadata has no {f.name}")
        if f.type is int and not re.fullmatch("[0-9]{1,8}", value):
            fail(f"{path}: {f.name} is {value!r}, expected a whole number")
        claimed[f.name] = f.type(value)
    config = make_config(path, **claimed)
    for key, value in claimed.items():
        if value != getattr(config, key):
            fail(f"{path}: {key} is {value}, expected {getattr(config, key)} for "
                 f"{config.attention} with position {config.position}")
    names = [name for name in shapes if not name.startswith(("adam.", "ref."))]
    check_shapes(path, config, {name: shapes[name] for name in names})
    notes = [NO_MOMENTS] * (len(names) < len(shapes))
    tensors = {name: lambda name=name: as_float32(path, name, get(name)) for name in names}
    return Model("train_gpt2_mla", config, tensors, notes=notes)


def llmc_order(n_layer):
    """Names of llm.c's tensors. Layers are stacked: the same tensor of all, one after the other."""
    return ["wte.weight", "wpe.weight",
            *(f"h.{layer}.{name}" for name in IN_LAYER for layer in range(n_layer)),
            "ln_f.weight", "ln_f.bias"]


def read_llmc(path):
    """llm.c's checkpoint: 256 int32 of header, then tensors in the order of its train_gpt2.c."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256:
        fail(f"{path}: {size} bytes, expected a llm.c checkpoint, whose header alone has 1024")
    version, T, V, L, NH, C, Vp = map(int, header[1:8])
    if version not in LLMC_VERSIONS:
        fail(f"{path}: version {version} of llm.c's format, expected 3 (float32) or 5 (bfloat16)")
    config = make_config(path, block_size=T, vocab_size=V, n_layer=L, n_head=NH, n_embd=C)
    if not V <= Vp <= 1 << 24:
        fail(f"{path}: padded vocabulary of {Vp}, expected at least the vocabulary, {V}")
    dtype = LLMC_VERSIONS[version]
    expected = 1024 + dtype.itemsize * ((Vp + T + L * (12 * C + 13) + 2) * C)
    if size != expected:
        fail(f"{path}: {size} bytes, expected {expected} for {L} layers of {C} channels, padded "
             f"vocabulary {Vp}, {T} positions: cut short or over-long")
    data = torch.from_numpy(np.memmap(path, f"i{dtype.itemsize}", "c", 1024)).view(dtype)
    shapes, tensors, at = shapes_of(config), {}, 0

    def read(name, begin):
        shape = shapes[name]
        return as_float32(path, name, data[begin:begin + math.prod(shape)].view(shape))

    for name in llmc_order(L):
        tensors[name] = functools.partial(read, name, at)
        at += math.prod(shapes[name]) + (Vp - V) * C * (name == "wte.weight")
    return Model(f"llm.c ({'float32' if version == 3 else 'bfloat16'})", config, tensors)


def load_pickle(path):
    """What torch.save wrote, if that is tensors and plain values; nothing else is ever run."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"  # else an old file, which cannot be mapped
        return torch.load(path, "cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        fail(f"{path}: holds more than tensors and plain values, expected a plain checkpoint: "
             "such a file could run any program, and is not opened")
    except Exception as error:  # a damaged file misleads PyTorch in many ways
        fail(f"{path}: not a whole file of torch.save: {one_line(error)[:120]}")


def check_pickled(path, tensors):
    """Plain tensors, each with memory of its own size: {name: tensor} -> {name: shape}"""
    for name, t in tensors.items():
        if not isinstance(name, str) or not isinstance(t, torch.Tensor) or t.is_meta \
                or t.layout != torch.strided or t.is_quantized or t.is_nested:
            fail(f"{path}: {name} is {type(t).__name__}, expected a plain tensor with a name")
        if t.untyped_storage().nbytes() < t.numel() * t.itemsize:
            fail(f"{path}: {name} has shape {tuple(t.shape)}, larger than its data")
    return {name: tuple(t.shape) for name, t in tensors.items()}


def from_gpt2_names(path, config, shapes, get, transposed):
    """Tensors under GPT-2's names, as Hugging Face and nanoGPT have them: -> {name: function}

    The prefix `transformer.` may be there; masks that older versions stored are no parameters; a
    head of its own must be equal to the embedding. shapes: {name: shape}, get: name -> tensor.
    """
    theirs = {}
    for name in shapes:
        short = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", short):
            continue
        if short in theirs:
            fail(f"{path}: has both {theirs[short]} and {name}, expected one of them")
        theirs[short] = name
    head = theirs.pop("lm_head.weight", None)
    turned = {name for name in theirs if transposed and name.endswith(TRANSPOSED)}
    check_shapes(path, config, {name: shapes[theirs[name]][::-1 if name in turned else 1]
                                for name in theirs})

    def read(name):
        t = as_float32(path, name, get(theirs[name]))
        return t.t() if name in turned else t

    if head and not torch.equal(as_float32(path, "lm_head.weight", get(head)), read("wte.weight")):
        fail(f"{path}: lm_head.weight is not equal to wte.weight, expected a head tied to it")
    return {name: functools.partial(read, name) for name in theirs}


def read_nanogpt(path):
    """nanoGPT's ckpt.pt. Without biases in its model_args, they are zero."""
    checkpoint = load_pickle(path)
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key), dict) for key in ("model", "model_args")):
        fail(f"{path}: a file of torch.save without model and model_args, expected nanoGPT's "
             "ckpt.pt")
    args, state = checkpoint["model_args"], checkpoint["model"]
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    config = make_config(path, **{key: args.get(key) for key in keys})
    shapes = check_pickled(path, state)
    if not args.get("bias", True):  # all weights but those of embeddings and head have one
        shapes = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()
                  if re.search(r"(h\.\d+|ln_f)\..*weight$", name)} | shapes
    get = lambda name: state[name] if name in state else torch.zeros(shapes[name])
    tensors = from_gpt2_names(path, config, shapes, get, False)
    notes = ["nanoGPT's GELU is exact, this program's GPT-2's tanh form: logits differ by some "
             "1e-3"]
    return Model("nanoGPT", config, tensors,
                 notes=notes + [NO_MOMENTS] * ("optimizer" in checkpoint))


def open_hf_weights(folder):
    """All tensors of a folder, in one file or several: {name: shape}, function name -> tensor"""
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.exists():
            files = [whole]
        elif index.exists():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(
                    isinstance(f, str) and f == os.path.basename(f) for f in named.values()):
                fail(f"{index}: its weight_map does not name files of this folder")
            files = [folder / file for file in sorted(set(named.values()))]
        else:
            continue
        shapes, where = {}, {}
        for file in files:
            if name.endswith(".bin"):
                state = load_pickle(file)
                if not isinstance(state, dict):
                    fail(f"{file}: no tensors by name, expected a model's state")
                found, get = check_pickled(file, state), state.__getitem__
            else:
                found, _, get = open_safetensors(file)
            shapes |= found
            where |= dict.fromkeys(found, get)
        return shapes, lambda name: where[name](name)
    fail(f"{folder}: has no model.safetensors or pytorch_model.bin, expected a model's weights")


def read_hf(folder):
    """A folder of Hugging Face's transformers with a GPT-2."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        fail(f"{folder}: a folder without config.json, expected a Hugging Face model's")
    c = read_json(path)
    if c.get("model_type") != "gpt2":
        ours = c.get("model_type") == "train_gpt2_mla"
        fail(f"{path}: model_type is {c.get('model_type')!r}, expected 'gpt2'"
             + " (what export_hf.py wrote has no way back: take the checkpoint)" * ours)
    if c.get("quantization_config"):
        fail(f"{path}: the weights are quantized, expected float32, bfloat16 or float16")
    c |= {key: c[other] for key, other in HF_OTHER_NAMES.items() if other in c}
    C = c.get("n_embd", 768)
    for key, default, expected in [
            ("activation_function", "gelu_new", ("gelu_pytorch_tanh", "gelu_new")),
            ("layer_norm_epsilon", 1e-5, (1e-5,)), ("scale_attn_weights", True, (True,)),
            ("scale_attn_by_inverse_layer_idx", False, (False,)),
            ("add_cross_attention", False, (False,)), ("tie_word_embeddings", True, (True,)),
            ("n_inner", None, (None, 4 * C if isinstance(C, int) else None))]:
        if c.get(key, default) not in expected:
            fail(f"{path}: {key} is {c[key]!r}, expected {expected[-1]!r}")
    config = make_config(path, n_embd=C, n_layer=c.get("n_layer", 12), n_head=c.get("n_head", 12),
                         block_size=c.get("n_positions", 1024),
                         vocab_size=c.get("vocab_size", 50257))
    tensors = from_gpt2_names(folder, config, *open_hf_weights(folder), True)
    return Model("Hugging Face's GPT-2", config, tensors,
                 *hf_tokenizer.read(folder, c.get("eos_token_id"), config.vocab_size))


def fetch(name):
    """A model of the Hugging Face hub, if it is in safetensors -> its folder in the hub's cache"""
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(name, allow_patterns=[
            "config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
            "vocab.json", "merges.txt"])
    except Exception as error:  # the network's, the hub's and the package's are many
        fail(f"{name}: no such file or folder, and not to be had from the Hugging Face hub: "
             f"{one_line(error)[:200]}")


def read(path, tokenizer=None):
    """A model of any kind -> Model. tokenizer: file or folder with one, to take before any other.

    path: a file or folder; or, if there is none, a name of the Hugging Face hub.
    """
    path = os.fspath(path)
    if not os.path.exists(path) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) \
            and not path.endswith((".safetensors", ".bin", ".pt")):
        path = fetch(path)
    if os.path.isdir(path):
        model = read_hf(path)
    else:
        check_file(path)
        try:
            with open(path, "rb") as file:
                start = file.read(9)
        except OSError as error:
            fail(f"{path}: cannot be read: {error.strerror}")
        if start[8:] == b"{":
            model = read_ours(path)
        elif start[:4] == LLMC_MAGIC.to_bytes(4, "little"):
            model = read_llmc(path)
        elif start[:2] == b"PK" or start[:1] == b"\x80":
            model = read_nanogpt(path)
        else:
            found = f"it starts with {start[:8].hex(' ')}" if start else "it is empty"
            fail(f"{path}: {found}, expected a safetensors file, a llm.c checkpoint (magic "
                 f"{LLMC_MAGIC}), nanoGPT's ckpt.pt or a Hugging Face folder")
    if tokenizer:
        model.tokenizer, model.left_out = read_tokenizer(tokenizer, model.config.vocab_size), ""
    elif os.path.isfile(path):
        model.tokenizer = tokenizer_beside(path, model.config)
    V = model.config.vocab_size
    if model.tokenizer and len(model.tokenizer[0]) > V:
        message = f"{len(model.tokenizer[0])} tokens, the model's vocabulary is {V}"
        if tokenizer:
            fail(f"{tokenizer}: {message}")
        model.tokenizer, model.left_out = None, message
    if model.left_out:
        model.notes.append(f"the tokenizer is left out: {model.left_out}")
    elif not model.tokenizer and V != 256:
        model.notes.append("no tokenizer: name one with --tokenizer, or to the C program (GPT-2's "
                           "is what prepro_tinyshakespeare.py --gpt2 writes)")
    return model


# ---- Tokenizers ---------------------------------------------------------------------------------

def read_characters(path, content):
    """nanoGPT's meta.pkl -> its characters as tokens; a newline, or the first, starts samples"""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):  # dicts, strings and numbers need none
            raise pickle.UnpicklingError(f"it names {module}.{name}")

    try:
        itos = Plain(io.BytesIO(content)).load()["itos"]
        tokens = [itos[i].encode() for i in range(len(itos))]
    except Exception as error:  # a bad pickle's are many
        fail(f"{path}: not nanoGPT's meta.pkl, whose itos has a character for each token: "
             f"{one_line(error)[:120]}")
    return tokens, tokens.index(b"\n") if b"\n" in tokens else 0


def read_tokenizer(path, V=None):
    """llm.c's tokenizer file, nanoGPT's meta.pkl, or a Hugging Face folder for a model of V tokens
    -> tokens (list of bytes), id of end of text"""
    if os.path.isdir(path):
        found, why = hf_tokenizer.read(Path(path), None, V)
        return found or fail(f"{path}: {why or 'no tokenizer.json, nor vocab.json and merges.txt'}")
    check_file(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}")
    if content[:1] == b"\x80":
        return read_characters(path, content)
    magic, version, V, eot = np.frombuffer(content[:16].ljust(16, b"\0"), "<u4").tolist()
    if len(content) < 1024 or magic != TOKENIZER_MAGIC or version not in (1, 2):
        fail(f"{path}: magic {magic}, version {version}, expected a tokenizer, {TOKENIZER_MAGIC} "
             "and 1 or 2")
    eot = 50256 if version == 1 else eot  # version 1 does not say
    tokens, at = [], 1024
    while at < len(content) and len(tokens) < V:
        tokens.append(content[at + 1:at + 1 + content[at]])
        at += 1 + content[at]
    if len(tokens) != V or at != len(content) or eot >= V:
        fail(f"{path}: {len(tokens)} tokens in {len(content)} bytes, end of text {eot}, expected "
             f"{V} tokens: cut short or over-long")
    return tokens, eot


def tokenizer_beside(path, config):
    """X_tokenizer.bin of a model X.*; for GPT-2's vocabulary also llm.c's name for it."""
    stem = os.path.splitext(path)[0]
    names = [f"{stem}_tokenizer.bin"]
    if config.vocab_size == 50257:
        names.append(os.path.join(os.path.dirname(path), "gpt2_tokenizer.bin"))
    return next((read_tokenizer(name) for name in names if os.path.exists(name)), None)


# ---- MHA, GQA and MQA into MLA (the writeup's section 12) ---------------------------------------

@torch.no_grad()
def moments_on(model, path, tokens=65536, show=say):
    """What attention reads, on the first tokens of a file: per layer the mean (C) and covariance
    (C, C) of ln_1's output, in float64."""
    V = model.config.vocab_size
    check_file(path)
    try:
        data, is_text = read_tokens(path)
    except (OSError, ValueError) as error:
        fail(f"{path}: no tokens or text: {one_line(error)}")
    if is_text and V > 256:
        fail(f"{path}: a text, read as bytes, but the model has {V} tokens: expected a token file")
    data = data[:tokens + 1]
    largest = data.max(initial=0)
    if len(data) < 2 or largest >= V:
        fail(f"{path}: {len(data)} tokens up to {largest}, expected two or more, all below {V}")
    show(f"{path}: seen through the model, which takes a while")
    with torch.device("meta"):  # no numbers yet: those of the model take this place
        gpt, C = GPT(model.config).eval(), model.config.n_embd
    gpt.load_state_dict({name: tensor() for name, tensor in model.tensors.items()}, assign=True)
    sums = [[torch.zeros(C).double(), torch.zeros(C, C).double()] for _ in gpt.h]
    for block, sum_of in zip(gpt.h, sums):
        def add(_, args, sum_of=sum_of):
            x = args[0].flatten(0, 1).double()                                   # (B*T, C)
            sum_of[0] += x.sum(0)
            sum_of[1] += x.T @ x
        block.attn.register_forward_pre_hook(add)
    for x, _ in windows(data, 2, model.config.block_size):
        gpt.hidden(x)
    if not all(torch.isfinite(xx).all() for _, xx in sums):
        fail(f"{path}: what attention reads on it is not finite, expected finite numbers")
    n = len(data) - 1
    return [(s / n, xx / n - torch.outer(s / n, s / n)) for s, xx in sums]


def layer_to_mla(config, w, rank, moments=None):
    """One layer's tensors, rewritten: {name in the layer: float64}, share of the spectrum kept.

    w: name in the layer -> tensor in float64. Biases go as section 12 has it; then (31), whose
    first factor is an orthonormal basis of R outputs, A_R, and the second A_R^T [W_K; W_V]. Which
    outputs: those that are largest for x of covariance 1, or, with moments = (mean, covariance),
    for the x of data (31a).
    """
    NKV, HS, C = config.n_kv_head, config.head_size, config.n_embd
    shared = NKV * HS
    W_Q, W_K, W_V = w("attn.c_attn.weight").split([C, shared, shared])           # (C | shared, C)
    b_Q, _, b_V = w("attn.c_attn.bias").split([C, shared, shared])               # b_K drops out
    W_O, b_O = w("attn.c_proj.weight"), w("attn.c_proj.bias")                    # (C, C), (C)
    scale, shift = w("ln_1.weight"), w("ln_1.bias")                              # (C), (C)

    old_shift = shift
    if b_Q.any():  # W_Q + b_Q u^T needs u with u @ x = 1 for every x that ln_1 gives
        still = scale == 0  # there x is ln_1's bias, whatever ln_1 reads
        if still.any():
            shift, u = torch.where(still, 1, shift), still.double() / still.sum()
        else:  # x_i u_i is 1/C and a share in a sum of 0, however small a scale is
            shift, u = scale, 1 / (C * scale)
        W_Q = W_Q + torch.outer(b_Q - W_Q @ (shift - old_shift), u)              # (C, C)

    W = torch.cat([W_K, W_V])                                                    # (2 shared, C)
    mean, root = torch.zeros(C).double(), None
    if moments:
        mean, covariance = moments
        # A little of covariance 1: where the data has nothing, the weights alone decide.
        size = covariance.trace().clamp(min=1e-3 * mean @ mean)
        e, E = torch.linalg.eigh(covariance + 1e-6 * size / C * torch.eye(C))
        root = E * e.clamp(min=0).sqrt()                                         # (C, C)
    A, S, _ = torch.linalg.svd(W if root is None else W @ root, full_matrices=False)
    up = A[:, :rank]                                                             # (2 shared, R)
    down = up.T @ W                                                              # (R, C)
    size = down.norm(dim=1, keepdim=True)                                        # S_R if no moments
    half = torch.where(size > 0, size, 1.0).sqrt()                               # (R, 1)
    up, down = up * half.T, down / half
    U_K, U_V = up.split(shared)                                                  # (shared, R) each
    W_V_new = U_V @ down                                                         # (shared, C)
    b_V = b_V - W_V_new @ (shift - old_shift) + (W_V - W_V_new) @ mean           # (shared)
    b_V = b_V.view(NKV, HS).repeat_interleave(config.n_head // NKV, 0).flatten()  # (C)
    heads = torch.cat([U_K.view(NKV, HS, rank), U_V.view(NKV, HS, rank)], 1)     # (NKV, 2 HS, R)
    return {"ln_1.bias": shift, "attn.c_proj.bias": b_O + W_O @ b_V, "attn.q_proj.weight": W_Q,
            "attn.kv_a_proj_with_mqa.weight": down,
            "attn.kv_b_proj.weight": heads.flatten(0, 1)}, float((S[:rank] ** 2).sum()
                                                                 / (S ** 2).sum().clamp(1e-300))


def to_mla(path, model, rank, data=None, show=say):
    """The model rewritten as mla of this rank. Prints, by show, what each layer keeps.

    data: tokens for which the rank is cut; None: the weights alone decide.
    """
    c = model.config
    if c.attention == "mla":
        fail(f"{path}: attention is mla already, expected mha, gqa or mqa")
    if c.position != "learned":
        fail(f"{path}: position is {c.position}, expected learned: rotary keys cannot be written "
             "as a latent's (doc/writeup.md, section 9)")
    most = min(c.n_embd, 2 * c.n_kv_head * c.head_size)
    if not 1 <= rank <= most:
        fail(f"{path}: --kv-rank {rank}, expected 1 to {most}, at which nothing is lost")
    config = Config("mla", "learned", c.n_layer, c.n_head, c.n_kv_head, c.n_embd, c.block_size,
                    c.vocab_size, q_rank=0, kv_rank=rank, latent_norm="none")
    moments = moments_on(model, data, show=show) if data else [None] * c.n_layer

    @functools.lru_cache(1)  # a layer's tensors are asked for one after the other
    def layer(l):
        w = lambda name: model.tensors[f"h.{l}.{name}"]().double()
        tensors, kept = layer_to_mla(c, w, rank, moments[l])
        show(f"layer {l}: rank {rank} of {most} keeps {100 * kept:.3f}% of the sum of squared "
             f"singular values{' of keys and values on the data' if data else ''}")
        return tensors

    def new(name):
        _, l, short = name.split(".", 2)
        return layer(int(l))[short].float()

    rewritten = ("ln_1.bias", "attn.c_proj.bias", "q_proj.weight", "kv_a_proj_with_mqa.weight",
                 "kv_b_proj.weight")
    tensors = {name: functools.partial(new, name) if name.endswith(rewritten)
               else model.tensors[name] for name in shapes_of(config)}
    return replace(model, config=config, tensors=tensors)


# ---- Writing ------------------------------------------------------------------------------------

def bytes_of(path, name, tensor, dtype):
    """A tensor's bytes in that dtype, rounded to nearest; what gets too large is refused."""
    t = tensor.to(dtype).contiguous()
    if not is_finite(t):
        fail(f"{path}: {name} holds {tensor.abs().max():g}, too large for {dtype}")
    if dtype != torch.float32:
        t = t.view(torch.int16)
    return memoryview(t.numpy()).cast("B")


def write_safetensors(file, path, metadata, tensors, dtype):
    """tensors: {name: (shape, function)}, written in this order, one in memory at a time."""
    names = {of: name.upper() for name, of in DTYPES.items()}
    header, at = {"__metadata__": metadata}, 0
    for name, (shape, _) in tensors.items():
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, (_, get) in tensors.items():
        file.write(bytes_of(path, name, get(), dtype))


def write_ours(model, path):
    """This program's checkpoint, float32."""
    c = model.config
    if max(c.vocab_size, c.n_embd) > LARGEST:
        fail(f"{path}: vocabulary {c.vocab_size}, channels {c.n_embd}, expected at most {LARGEST}")
    with replacing(path) as file:
        write_safetensors(file, path, c.to_metadata(), {
            name: (shape, model.tensors[name]) for name, shape in shapes_of(c).items()},
            torch.float32)


def write_llmc(model, path, dtype):
    """llm.c's checkpoint, version 3 or 5; the vocabulary padded with zeros to 128 rows."""
    c = model.config
    Vp = -(-c.vocab_size // 128) * 128
    version = next(v for v, t in LLMC_VERSIONS.items() if t == dtype)
    header = np.zeros(256, "<i4")
    header[:8] = (LLMC_MAGIC, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd,
                  Vp)
    with replacing(path) as file:
        file.write(header.tobytes())
        for name in llmc_order(c.n_layer):
            file.write(bytes_of(path, name, model.tensors[name](), dtype))
            if name == "wte.weight":
                file.write(bytes((Vp - c.vocab_size) * c.n_embd * dtype.itemsize))


def write_folder(model, path, config, dtype=torch.float32, transposed=(), files={}):
    """A folder that transformers open: config.json, weights, tokenizer; files: {name: text} more.

    Without a tokenizer 256 tokens are bytes.
    """
    tokenizer = model.tokenizer
    if not tokenizer and model.config.vocab_size == 256:
        tokenizer = byte_tokenizer()[:2]
    eot = None
    if tokenizer and len(tokenizer[0][tokenizer[1]]) > 1:  # one byte only says where samples start
        eot = tokenizer[1]

    def tensor(name):
        t = model.tensors[name]()
        return t.t() if name.endswith(transposed) else t

    with replacing(path, folder=True) as folder:
        write_json(folder / "config.json", config | {
            "dtype": str(dtype).removeprefix("torch."), "bos_token_id": eot, "eos_token_id": eot})
        with open(folder / "model.safetensors", "wb") as file:
            write_safetensors(file, path, {"format": "pt"}, {
                f"transformer.{name}": (shape[::-1] if name.endswith(transposed) else shape,
                                        functools.partial(tensor, name))
                for name, shape in shapes_of(model.config).items()}, dtype)
        if tokenizer and not hf_tokenizer.write(folder, *tokenizer):
            model.notes.append("the tokenizer is left out: its tokens are not those of a BPE of "
                               "bytes in the order of its merges")
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def write_hf(model, path, dtype):
    """A folder that transformers' GPT2LMHeadModel opens."""
    c = model.config
    write_folder(model, path, {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
        "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True}, dtype, TRANSPOSED)


def convert(src, dst, dtype="f32", rank=None, data=None, tokenizer=None):
    """All that the command line does; rank: --to mla. Refusals are SystemExit with one line."""
    beside = os.path.splitext(os.fspath(dst).rstrip("/"))[0] + "_tokenizer.bin"
    dst = place(dst)
    kind = os.path.splitext(dst)[1].lower()
    if kind in (".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".npz", ".h5"):
        fail(f"{dst}: cannot write {kind}, expected X.safetensors, X.bin or a folder")
    if kind == ".safetensors" and dtype != "f32":
        fail(f"{dst}: --dtype {dtype}, but this program's checkpoints are F32 only")
    if kind == ".bin" and dtype == "f16":
        fail(f"{dst}: --dtype f16, llm.c's checkpoints are f32 or bf16")
    if rank is not None and kind != ".safetensors":
        fail(f"{dst}: --to mla, expected X.safetensors: no other format here has mla (from that "
             "dev/export_hf.py makes a folder)")
    if kind == ".safetensors":
        check_replaceable(dst, "checkpoint of this program", OURS, 8)
        check_unlocked(dst)
    elif kind == ".bin":
        check_replaceable(dst, "llm.c checkpoint", LLMC_MAGIC.to_bytes(4, "little"))
    else:
        check_folder(dst, "gpt2")
    model = read(src, tokenizer)
    say(f"{src}: {model}")
    if rank is not None:
        model = to_mla(src, model, rank, data)
    c = model.config
    if kind != ".safetensors" and (c.attention, c.position) != ("mha", "learned"):
        fail(f"{src}: the model is {c.attention} with position {c.position}, expected mha with "
             f"position learned for {dst} (all kinds: dev/export_hf.py)")
    is_file = kind in (".safetensors", ".bin")
    with contextlib.ExitStack() as both:  # files bear their names, or neither does
        if is_file and model.tokenizer:
            beside = place(beside)
            check_replaceable(beside, "tokenizer", TOKENIZER_MAGIC.to_bytes(4, "little"))
            content = tokenizer_file(*model.tokenizer)
            if not os.path.exists(beside) or Path(beside).read_bytes() != content:
                file = both.enter_context(replacing(beside))
                file.write(content)
                file.flush()  # before the model bears its name, since a disk may be full
        if kind == ".safetensors":
            write_ours(model, dst)
        elif kind == ".bin":
            write_llmc(model, dst, DTYPES[dtype])
        else:
            write_hf(model, dst, DTYPES[dtype])
    if is_file and model.tokenizer:
        say(f"{beside}: its tokenizer, {len(model.tokenizer[0])} tokens")
    elif is_file and os.path.exists(beside):
        model.notes.append(f"{beside} was there before, and will be taken for this model's: remove "
                           "it if it is not")
    for note in model.notes:
        say(f"note: {note}")
    say(f"{dst}: written{', a folder' * (not is_file)}")


def main():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("src", metavar="SRC", help="file or folder, or a name of the Hugging Face hub")
    p.add_argument("dst", metavar="DST", help="X.safetensors, X.bin (llm.c) or a folder")
    p.add_argument("--to", choices=["mla"], help="rewrite the attention")
    p.add_argument("--kv-rank", type=int, metavar="R", help="rank of the latent")
    p.add_argument("--data", metavar="FILE", help="with --to mla: tokens or text to cut rank for")
    p.add_argument("--dtype", choices=list(DTYPES), default="f32",
                   help="of what is written; this program's checkpoints are f32 (f32)")
    p.add_argument("--tokenizer", metavar="FILE",
                   help="the model's: llm.c's format, nanoGPT's meta.pkl, or a folder")
    args = p.parse_args()
    if (args.to is None) != (args.kv_rank is None) or (args.data and not args.to):
        p.error("--to mla, --kv-rank R: expected both or neither; --data FILE only with them")
    convert(args.src, args.dst, args.dtype, args.kv_rank, args.data, args.tokenizer)


if __name__ == "__main__":
    run_command(main)

"""GPT-2 with switchable attention in PyTorch: the same model as train_gpt2_mla.c.

It reads and writes the same checkpoints and the same data files, so either
program can evaluate, train further or check what the other one made (optimizer
moments are left to the C program). PyTorch and NumPy are all it needs.

    python dev/gpt2_mla.py eval  --load model.safetensors --val-data val.bin
    python dev/gpt2_mla.py train --load model.safetensors --train-data train.bin --steps 20

Letters in the shape comments:
    B sequences   T positions   V vocabulary   C channels   HS = C/NH head size
    NH query heads    NKV key/value heads      R kv_rank    RQ q_rank
    RD rope_dim, the rotated part of a head    NOPE = HS - RD, the rest of it
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------
# Configuration: exactly the __metadata__ of a checkpoint

POSITIONS = {
    "mha": ("learned", "rope", "decoupled"),
    "gqa": ("learned", "rope"),
    "mqa": ("learned", "rope"),
    "mla": ("learned", "decoupled"),
}


@dataclass
class Config:
    """What a model is. Fields that mean nothing for its kind are set to 0 or "none"."""

    attention: str = "mla"           # mha | gqa | mqa | mla
    position: str = "decoupled"      # learned | rope | decoupled
    n_layer: int = 6
    n_head: int = 6                  # NH
    n_kv_head: int = 0               # NKV, a free choice for gqa only
    n_embd: int = 384                # C
    block_size: int = 256            # rows of wpe; the training length otherwise
    vocab_size: int = 256            # V
    q_rank: int = 0                  # RQ, mla only; 0: queries come straight from x
    kv_rank: int = 0                 # R, mla only
    rope_dim: int = 0                # RD, a free choice for decoupled only
    latent_norm: str = "layernorm"   # layernorm | rmsnorm | none, mla only

    def __post_init__(self):
        if self.position not in POSITIONS.get(self.attention, ()):
            raise ValueError(f"no attention {self.attention!r} with position {self.position!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.attention != "gqa":
            self.n_kv_head = 1 if self.attention == "mqa" else self.n_head
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.position != "decoupled":
            self.rope_dim = self.head_size if self.position == "rope" else 0
        elif not 0 < self.rope_dim < self.head_size:
            raise ValueError(f"rope_dim {self.rope_dim} is not between 0 and {self.head_size}")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim {self.rope_dim} is odd, but rotations need pairs")
        if self.attention != "mla":
            self.q_rank, self.kv_rank, self.latent_norm = 0, 0, "none"
        elif self.kv_rank < 1:
            raise ValueError("mla needs a kv_rank")
        if self.latent_norm not in ("layernorm", "rmsnorm", "none"):
            raise ValueError(f"no latent_norm {self.latent_norm!r}")

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @classmethod
    def from_metadata(cls, metadata):
        """From a dict of strings; other entries are ignored, absent ones keep their default."""
        return cls(**{f.name: f.type(metadata[f.name]) for f in fields(cls) if f.name in metadata})

    def to_metadata(self):
        return {"format": "train_gpt2_mla"} | {f.name: str(getattr(self, f.name)) for f in fields(self)}


# ----------------------------------------------------------------------------
# Attention: three front ends that make q, k and v from x, and one core

def split_heads(x, n):
    """(B, T, n*width) -> (B, n, T, width)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def rope_table(T, RD, like):
    """Cosine and sine of position * 10000^(-2i/RD), each (T, RD/2)."""
    i = torch.arange(RD // 2, device=like.device, dtype=torch.float64)           # (RD/2)
    positions = torch.arange(T, device=like.device, dtype=torch.float64)         # (T)
    angles = torch.outer(positions, 10000.0 ** (-2 * i / RD))                    # (T, RD/2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x, rope):
    """Rotary positions: turn each pair (i, i + RD/2) of x (..., T, RD) by its angle."""
    cos, sin = rope                                                              # (T, RD/2)
    x1, x2 = x.chunk(2, dim=-1)                                                  # (..., T, RD/2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)         # (..., T, RD)


class Attention(nn.Module):
    """The core that all kinds share; a subclass says how x becomes q, k and v."""

    def __init__(self, config):
        super().__init__()
        self.NH, self.NKV, self.HS = config.n_head, config.n_kv_head, config.head_size
        self.RD = config.rope_dim
        self.NOPE = self.HS - self.RD
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def queries_keys_values(self, x, rope):
        """x (B, T, C) -> q (B, NH, T, HS), k and v (B, NKV, T, HS)"""
        raise NotImplementedError

    def join_decoupled(self, q, k_nope, k_rope, rope):
        """Rotate the last RD of each query head, and give every key head the one rotary key.

        q (B, NH, T, HS), k_nope (B, NH, T, NOPE), k_rope (B, T, RD)
        """
        q_nope, q_rope = q.split([self.NOPE, self.RD], dim=-1)                   # (B, NH, T, NOPE | RD)
        k_rope = rotate(k_rope.unsqueeze(1), rope)                               # (B, 1, T, RD)
        q = torch.cat([q_nope, rotate(q_rope, rope)], dim=-1)                    # (B, NH, T, HS)
        k = torch.cat([k_nope, k_rope.expand(-1, self.NH, -1, -1)], dim=-1)      # (B, NH, T, HS)
        return q, k

    def forward(self, x, rope):
        q, k, v = self.queries_keys_values(x, rope)
        y = F.scaled_dot_product_attention(                                      # (B, NH, T, HS)
            q, k, v, is_causal=True, scale=self.HS ** -0.5, enable_gqa=self.NKV < self.NH)
        return self.c_proj(y.transpose(1, 2).flatten(2))                         # (B, T, C)


class PlainAttention(Attention):
    """mha, gqa, mqa; positions are learned, or rotate the whole of every q and k head."""

    def __init__(self, config):
        super().__init__(config)
        self.rows = [self.NH * self.HS, self.NKV * self.HS, self.NKV * self.HS]  # q, k, v
        self.c_attn = nn.Linear(config.n_embd, sum(self.rows))

    def queries_keys_values(self, x, rope):
        q, k, v = self.c_attn(x).split(self.rows, dim=-1)                        # (B, T, NH*HS | NKV*HS | NKV*HS)
        q = split_heads(q, self.NH)                                              # (B, NH, T, HS)
        k = split_heads(k, self.NKV)                                             # (B, NKV, T, HS)
        v = split_heads(v, self.NKV)                                             # (B, NKV, T, HS)
        if self.RD:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v


class DecoupledAttention(Attention):
    """mha as mla sees positions: part of each head is rotated, with one rotary key for all heads."""

    def __init__(self, config):
        super().__init__(config)
        NH, HS, NOPE, RD = self.NH, self.HS, self.NOPE, self.RD
        self.rows = [NH * HS, NH * NOPE, RD, NH * HS]                            # q, k_nope, k_rope, v
        self.c_attn = nn.Linear(config.n_embd, sum(self.rows))

    def queries_keys_values(self, x, rope):
        q, k_nope, k_rope, v = self.c_attn(x).split(self.rows, dim=-1)           # (B, T, NH*HS | NH*NOPE | RD | NH*HS)
        q = split_heads(q, self.NH)                                              # (B, NH, T, HS)
        k_nope = split_heads(k_nope, self.NH)                                    # (B, NH, T, NOPE)
        v = split_heads(v, self.NH)                                              # (B, NH, T, HS)
        q, k = self.join_decoupled(q, k_nope, k_rope, rope)                      # (B, NH, T, HS)
        return q, k, v


class LatentAttention(Attention):
    """mla: keys and values of all heads are expanded from one latent of R numbers per token."""

    def __init__(self, config):
        super().__init__(config)
        C, RQ, self.R = config.n_embd, config.q_rank, config.kv_rank
        NH, HS, NOPE, RD = self.NH, self.HS, self.NOPE, self.RD
        norm = {
            "layernorm": lambda width: nn.LayerNorm(width, eps=1e-5),
            "rmsnorm": lambda width: nn.RMSNorm(width, eps=1e-6),
            "none": lambda width: nn.Identity(),
        }[config.latent_norm]
        if RQ:
            self.q_a_proj = nn.Linear(C, RQ, bias=False)
            self.q_a_layernorm = norm(RQ)
            self.q_b_proj = nn.Linear(RQ, NH * HS, bias=False)
        else:
            self.q_proj = nn.Linear(C, NH * HS, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, self.R + RD, bias=False)          # rows: latent, k_rope
        self.kv_a_layernorm = norm(self.R)
        self.kv_b_proj = nn.Linear(self.R, NH * (NOPE + HS), bias=False)         # rows per head: k_nope, v

    def queries_keys_values(self, x, rope):
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)                                                   # (B, T, NH*HS)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))              # (B, T, NH*HS)
        q = split_heads(q, self.NH)                                              # (B, NH, T, HS)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.R, self.RD], dim=-1)  # (B, T, R | RD)
        kv = split_heads(self.kv_b_proj(self.kv_a_layernorm(latent)), self.NH)   # (B, NH, T, NOPE+HS)
        k, v = kv.split([self.NOPE, self.HS], dim=-1)                            # (B, NH, T, NOPE | HS)
        if self.RD:
            q, k = self.join_decoupled(q, k, k_rope, rope)                       # (B, NH, T, HS)
        return q, k, v


# ----------------------------------------------------------------------------
# The model

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))             # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        if config.attention == "mla":
            attention = LatentAttention
        else:
            attention = DecoupledAttention if config.position == "decoupled" else PlainAttention
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, rope):
        x = x + self.drop(self.attn(self.ln_1(x), rope))                         # (B, T, C)
        x = x + self.drop(self.mlp(self.ln_2(x)))                                # (B, T, C)
        return x


class GPT(nn.Module):
    """The names in its state_dict are the tensor names of a checkpoint."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.init_weights()

    def init_weights(self):
        """As GPT-2: N(0, 0.02), what adds to the residual scaled by 1/sqrt(2L), biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                scale = (2 * self.config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(self, idx, targets=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), mean cross-entropy or None"""
        T = idx.shape[1]
        x = self.wte(idx)                                                        # (B, T, C)
        rope = None
        if self.config.position == "learned":
            x = x + self.wpe.weight[:T]                                          # (B, T, C)
        else:
            rope = rope_table(T, self.config.rope_dim, like=x)                   # 2 * (T, RD/2)
        x = self.drop(x)
        for block in self.h:
            x = block(x, rope)
        logits = F.linear(self.ln_f(x), self.wte.weight)                         # (B, T, V), head tied to wte
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @classmethod
    def from_checkpoint(cls, path, dropout=0.0):
        """Whatever else the file holds (optimizer moments, references) is ignored."""
        tensors, metadata = load_safetensors(path)
        model = cls(Config.from_metadata(metadata), dropout)
        names = model.state_dict().keys()
        model.load_state_dict({name: torch.from_numpy(tensors[name]) for name in names if name in tensors})
        return model

    def save_checkpoint(self, path):
        save_safetensors(path, self.state_dict(), self.config.to_metadata())

    def configure_optimizer(self, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        """AdamW; weight decay only for tensors of two or more dimensions."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


# ----------------------------------------------------------------------------
# Files

def load_safetensors(path):
    """Header length (8 bytes), JSON header, raw data -> dict of F32 arrays, dict of strings."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data, "<f4", (end - begin) // 4, begin).reshape(entry["shape"])
    return tensors, metadata


def save_safetensors(path, tensors, metadata):
    """The reverse, in the order given, so that equal content means equal bytes."""
    header, chunks, offset = {"__metadata__": metadata}, [], 0
    for name, tensor in tensors.items():
        chunks.append(tensor.detach().cpu().numpy().astype("<f4").tobytes())
        end = offset + len(chunks[-1])
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                                              # keeps the data aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_tokens(path):
    """A token file (256 int32 of header, then uint16), or any other file as bytes.

    Returns the tokens and whether they are bytes.
    """
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 3 or header[0] != 20240520:
        return np.fromfile(path, np.uint8), True
    if header[1] != 1:
        raise SystemExit(f"{path}: version {header[1]} of the token format, expected 1")
    return np.memmap(path, "<u2", mode="r", offset=1024, shape=(int(header[2]),)), False


def inputs_and_targets(tokens, begin, rows, T):
    """Consecutive tokens from begin on as inputs (rows, T), and the same one later as targets."""
    chunk = torch.from_numpy(tokens[begin:begin + rows * T + 1].astype(np.int64))
    return chunk[:-1].view(rows, T), chunk[1:].view(rows, T)


def sequential_batches(tokens, B, T):
    """In the order of the file, without end; back to the start when a whole batch is not left."""
    position = 0
    while True:
        if position + B * T + 1 > len(tokens):
            position = 0
        yield inputs_and_targets(tokens, position, B, T)
        position += B * T


def windows(tokens, B, T):
    """Once over the file: full windows of T targets, B at a time, then the shorter rest."""
    position, left = 0, len(tokens) - 1
    while left > 0:
        rows, length = (min(B, left // T), T) if left >= T else (1, left)
        yield inputs_and_targets(tokens, position, rows, length)
        position, left = position + rows * length, left - rows * length


# ----------------------------------------------------------------------------
# Command line

def load_model_and_tokens(args, path, dropout=0.0):
    """What both commands start from, with what can be wrong said early."""
    model = GPT.from_checkpoint(args.load, dropout)
    tokens, is_bytes = read_tokens(path)
    args.seq_len = args.seq_len or model.config.block_size
    if model.config.position == "learned" and args.seq_len > model.config.block_size:
        raise SystemExit(f"--seq-len {args.seq_len}: this model has {model.config.block_size} learned positions")
    if len(tokens) < 2 or tokens.max() >= model.config.vocab_size:
        raise SystemExit(f"{path}: needs two tokens or more, all below vocab_size {model.config.vocab_size}")
    return model, tokens, is_bytes


@torch.no_grad()
def evaluate(args):
    model, tokens, is_bytes = load_model_and_tokens(args, args.val_data)
    total = 0.0
    for x, y in windows(tokens, args.batch_size, args.seq_len):
        total += model(x, y)[1].item() * y.numel()
    loss = total / (len(tokens) - 1)
    bits = f"{loss / math.log(2):.6f}" if is_bytes else "n/a"
    print(f"loss {loss:.8f} perplexity {math.exp(loss):.6f} bits_per_byte {bits} tokens {len(tokens) - 1}")


def train(args):
    model, tokens, _ = load_model_and_tokens(args, args.train_data, args.dropout)
    B, T, N = args.batch_size, args.seq_len, args.steps
    if len(tokens) < B * T + 1:
        raise SystemExit(f"{args.train_data}: a batch needs {B * T + 1} tokens, the file has {len(tokens)}")
    optimizer = model.configure_optimizer(args.learning_rate, (args.beta1, args.beta2), args.eps, args.weight_decay)
    step_model = torch.compile(model) if args.compile else model
    seconds = []
    for step, (x, y) in zip(range(1, N + 1), sequential_batches(tokens, B, T)):
        start = time.perf_counter()
        _, loss = step_model(x, y)
        loss.backward()
        if args.grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        print(f"step {step}/{N} | loss {loss.item():.6f}", flush=True)
    if N > 1:
        print(f"median of steps 2 to {N}: {B * T / np.median(seconds[1:]):.0f} tok/s")
    if args.save:
        model.save_checkpoint(args.save)


def main():
    parser = argparse.ArgumentParser(description="The model of train_gpt2_mla.c in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    e = commands.add_parser("eval", help="loss over a whole file")
    e.add_argument("--val-data", required=True, metavar="FILE")
    t = commands.add_parser("train", help="continue from a checkpoint, at a constant learning rate")
    t.add_argument("--train-data", required=True, metavar="FILE")
    t.add_argument("--save", metavar="FILE", help="write the trained model")
    t.add_argument("--steps", type=int, default=20)
    t.add_argument("--learning-rate", type=float, default=1e-3)
    t.add_argument("--weight-decay", type=float, default=0.1)
    t.add_argument("--beta1", type=float, default=0.9)
    t.add_argument("--beta2", type=float, default=0.95)
    t.add_argument("--eps", type=float, default=1e-8)
    t.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0: off")
    t.add_argument("--dropout", type=float, default=0.0)
    t.add_argument("--compile", action="store_true", help="torch.compile the model")
    for p in (e, t):
        p.add_argument("--load", required=True, metavar="FILE", help="checkpoint")
        p.add_argument("--batch-size", type=int, default=16, help="sequences at a time")
        p.add_argument("--seq-len", type=int, default=0, help="default: the model's block_size")
        p.add_argument("--threads", type=int, default=0, help="default: PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    evaluate(args) if args.command == "eval" else train(args)


if __name__ == "__main__":
    main()

"""GPT-2 with switchable attention in PyTorch: the same model as train_gpt2_mla.c.

It reads and writes the same checkpoints and the same data files, so either
program can evaluate, train further or check what the other one made (optimizer
moments are left to the C program). PyTorch and NumPy are all it needs.

    python dev/pytorch/gpt2_mla.py eval   --load model.safetensors --val-data val.bin
    python dev/pytorch/gpt2_mla.py train  --load model.safetensors --train-data train.bin --steps 20
    python dev/pytorch/gpt2_mla.py decode --load model.safetensors --cache absorbed --context 1024

Instead of --load FILE, --config n_layer=4,n_embd=128,... makes a new random model.

Letters in the shape comments:
    B sequences   T positions   V vocabulary   C channels   HS = C/NH head size
    NH query heads    NKV key/value heads    G = NH/NKV query heads that share a key/value head
    R kv_rank         RQ q_rank
    RD rope_dim, the rotated part of a query or key head    NOPE nope_dim, the rest of it
    QK = NOPE + RD, the width of a query or key head; NOPE is HS - RD and so QK is HS, unless
       mla with position decoupled chooses its own nope_dim. A value head is HS wide.
    S positions attended to: T, or when decoding, all that the cache holds
"""

import argparse
import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------
# Configuration: exactly the __metadata__ of a checkpoint

POSITIONS = {"mha": ("learned", "rope", "decoupled"), "gqa": ("learned", "rope"),
             "mqa": ("learned", "rope"), "mla": ("learned", "decoupled")}


@dataclass
class Config:
    """What a model is.

    Fields that are no choice for its kind are set to what they must be: 0 or "none" where they
    mean nothing.
    """

    attention: str = "mla"           # mha | gqa | mqa | mla
    position: str = "decoupled"      # learned | rope | decoupled
    n_layer: int = 6
    n_head: int = 6                  # NH
    n_kv_head: int = 0               # NKV, a free choice for gqa and mla only; mla, 0: n_head
    n_embd: int = 384                # C
    block_size: int = 256            # rows of wpe; the training length otherwise
    vocab_size: int = 256            # V
    q_rank: int = 0                  # RQ, mla only; 0: queries come straight from x
    kv_rank: int = 0                 # R, mla only
    rope_dim: int = 0                # RD, a free choice for decoupled only
    nope_dim: int = 0                # NOPE, a free choice for mla decoupled only; 0: HS - RD
    latent_norm: str = "layernorm"   # layernorm | rmsnorm | none, mla only

    def __post_init__(self):
        if self.attention == "mqa":
            self.n_kv_head = 1
        elif self.attention == "mha" or (self.attention == "mla" and self.n_kv_head == 0):
            self.n_kv_head = self.n_head
        if self.position != "decoupled":
            self.rope_dim = self.head_size if self.position == "rope" else 0
        if self.position != "decoupled" or self.nope_dim == 0:
            self.nope_dim = self.default_nope_dim
        if self.attention != "mla":
            self.q_rank, self.kv_rank, self.latent_norm = 0, 0, "none"
        for wrong, message in [
            (self.position not in POSITIONS.get(self.attention, ()),
             "this attention has no such position"),
            (self.n_embd % self.n_head, "n_embd is not a multiple of n_head"),
            (self.n_kv_head < 1 or self.n_head % self.n_kv_head,
             "n_kv_head does not divide n_head"),
            (self.attention == "mha" and self.nope_dim != self.default_nope_dim,
             "nope_dim is a free choice for mla only; that of mha is n_embd/n_head - rope_dim, "
             f"{self.default_nope_dim}"),
            (self.position == "decoupled" and self.nope_dim == self.default_nope_dim
             and not 0 < self.rope_dim < self.head_size,
             f"rope_dim is not between 0 and n_embd/n_head, {self.head_size}"),
            (self.position == "decoupled" and self.rope_dim < 2, "rope_dim is less than 2"),
            (self.rope_dim % 2, "rope_dim is odd, but rotations need pairs"),
            (self.nope_dim < 0, "nope_dim is negative"),
            (self.attention == "mla" and self.kv_rank < 1, "mla needs a kv_rank"),
            (self.latent_norm not in ("layernorm", "rmsnorm", "none"), "no such latent_norm"),
        ]:
            if wrong:
                raise ValueError(f"{message}: {self}")

    @property
    def head_size(self):
        """HS, the width of a value head"""
        return self.n_embd // self.n_head

    @property
    def default_nope_dim(self):
        """HS - RD: what nope_dim is unless chosen, so that QK is HS"""
        return self.head_size - self.rope_dim

    @property
    def qk_size(self):
        """QK, the width of a query or key head"""
        return self.nope_dim + self.rope_dim

    @classmethod
    def from_metadata(cls, metadata):
        """From a dict of strings; other entries are ignored, absent ones keep their default."""
        return cls(**{f.name: f.type(metadata[f.name]) for f in fields(cls) if f.name in metadata})

    def to_metadata(self):
        """Without nope_dim where it is the default: older programs then read the file too."""
        metadata = {f.name: str(getattr(self, f.name)) for f in fields(self)}
        if self.nope_dim == self.default_nope_dim:
            del metadata["nope_dim"]
        return {"format": "train_gpt2_mla"} | metadata


# ----------------------------------------------------------------------------
# Attention: two kinds of projection that turn x into queries, keys and values, and one core

def split_heads(x, n):
    """(B, T, n*width) -> (B, n, T, width)"""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def rope_table(T, RD, like):
    """Cosine and sine of the angles position * 10000^(-2i/RD), as rotate wants them: (2, T, RD)"""
    i = torch.arange(RD // 2, device=like.device, dtype=torch.float64)           # (RD/2)
    positions = torch.arange(T, device=like.device, dtype=torch.float64)         # (T)
    angles = torch.outer(positions, 10000.0 ** (-2 * i / RD))                    # (T, RD/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1),
                        torch.cat([-sin, sin], dim=-1)]).to(like.dtype)


def rotate(x, rope):
    """Rotary positions: turn each pair (i, i + RD/2) of x's last RD columns, x (..., T, width)."""
    cos, sin = rope                                                              # (T, RD) each
    RD = cos.shape[-1]
    if RD == 0:
        return x
    still, x = x.split([x.shape[-1] - RD, RD], dim=-1)                     # (..., T, width-RD | RD)
    x = x * cos + x.roll(RD // 2, dims=-1) * sin                                 # (..., T, RD)
    return torch.cat([still, x], dim=-1) if still.shape[-1] else x               # (..., T, width)


class Cache:
    """What attention keeps of past tokens, so that one more token costs a step and not a pass.

    mode says what is kept: "full" the keys and values. For mla also "latent": what they are
    made from, R+RD numbers per token, and every step makes them anew; or "absorbed": the same
    numbers, which a step uses as they are.
    """

    def __init__(self, model, capacity, mode="full"):
        c = model.config
        if mode != "full" and c.attention != "mla":
            raise ValueError(f"cache {mode!r}: {c.attention} has no latent, only mla does")
        if c.position == "learned" and capacity > c.block_size:
            raise ValueError(f"{capacity} tokens: this model has {c.block_size} learned positions")
        self.mode, self.capacity, self.length = mode, capacity, 0
        self.rope = rope_table(capacity, c.rope_dim, like=model.wte.weight)      # (2, capacity, RD)
        self.kept = {}                                    # layer -> (B, n, capacity, width) ...

    def append(self, layer, parts):
        """parts: tensors (B, n, T, width) of T more positions -> (B, n, S, width) of all so far"""
        begin, end = self.length, self.length + parts[0].shape[2]
        assert begin == 0 or end == begin + 1, "the prompt in one pass, then token by token"
        if layer not in self.kept:
            self.kept[layer] = [p.new_empty(*p.shape[:2], self.capacity, p.shape[3]) for p in parts]
        for kept, part in zip(self.kept[layer], parts):
            kept[:, :, begin:end] = part
        return [kept[:, :, :end] for kept in self.kept[layer]]


class Attention(nn.Module):
    """The core that all kinds share. A subclass says what the projections are, in two methods:

    project(x, rope)    x (B, T, C) -> q (B, NH, T, QK), and what later tokens need to know of x
    up_project(*known)  that for any positions -> k, v and perhaps k_rope, as attend takes them
    """

    def __init__(self, config):
        super().__init__()
        self.NH, self.NKV, self.HS = config.n_head, config.n_kv_head, config.head_size
        self.NOPE, self.RD, self.QK = config.nope_dim, config.rope_dim, config.qk_size
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rope, cache=None):
        q, *known = self.project(x, rope)
        if cache is None:
            y = self.attend(q, *self.up_project(*known))                         # (B, NH, T, HS)
        else:
            y = self.attend_cached(q, known, cache)                              # (B, NH, T, HS)
        return self.c_proj(y.transpose(1, 2).flatten(2))                         # (B, T, C)

    def attend_cached(self, q, known, cache):
        """First the prompt, T positions that attend to themselves, then one position to all S."""
        if cache.mode == "full":
            known = self.up_project(*known)
        known = cache.append(self, known)
        step = cache.length > 0
        if step:
            q = q * self.QK ** -0.5                                              # (B, NH, 1, QK)
        if step and cache.mode == "absorbed":
            return self.attend_absorbed(q, *known)
        if cache.mode != "full":
            known = self.up_project(*known)
        return (self.attend_step if step else self.attend)(q, *known)

    def attend(self, q, k, v, k_rope=None):
        """Causal attention of T positions to themselves.

        q (B, NH, T, QK), k (B, NKV, T, QK), v (B, NKV, T, HS) -> (B, NH, T, HS).
        With k_rope (B, 1, T, RD), a rotary key for all heads, k is (B, NKV, T, NOPE).
        """
        if k_rope is not None:
            k = torch.cat([k, k_rope.expand(-1, self.NKV, -1, -1)], dim=-1)      # (B, NKV, T, QK)
        if self.QK != self.HS:
            # PyTorch's fused attention, at T = 1024 twice as fast, wants one width for all three.
            # Zeros add nothing to a score, and the columns that they add to v are cut off below.
            width = max(self.QK, self.HS)
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))    # (B, ., T, width)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.QK ** -0.5, enable_gqa=self.NKV < self.NH)
        return y[..., :self.HS]                                                  # (B, NH, T, HS)

    def attend_step(self, q, k, v, k_rope=None):
        """The same for the last of S positions alone, with q already scaled.

        q (B, NH, 1, QK), k (B, NKV, S, QK or, with k_rope, NOPE), v (B, NKV, S, HS)
        -> (B, NH, 1, HS).
        Query heads that share a key are rows of one matrix product, so the keys are read once;
        for so few rows that is at least as fast as scaled_dot_product_attention.
        """
        q = q.squeeze(2).unflatten(1, (k.shape[1], -1))                          # (B, NKV, G, QK)
        if k_rope is None:
            scores = q @ k.mT                                                    # (B, NKV, G, S)
        else:
            q_nope, q_rope = q.split([self.NOPE, self.RD], dim=-1)         # (B, NKV, G, NOPE | RD)
            scores = q_nope @ k.mT                                               # (B, NKV, G, S)
            rope_scores = q_rope.flatten(1, 2).unsqueeze(1) @ k_rope.mT          # (B, 1, NH, S)
            scores += rope_scores.view_as(scores)                                # (B, NKV, G, S)
        return (scores.softmax(dim=-1) @ v).flatten(1, 2).unsqueeze(2)           # (B, NH, 1, HS)


class DirectAttention(Attention):
    """mha, gqa, mqa: queries, keys and values are all rows of c_attn.

    rope rotates the whole of every q and k head, decoupled (as mla does) the last RD of
    every q head and one rotary key for all heads. QK is HS.
    """

    def __init__(self, config):
        super().__init__(config)
        shared = self.RD if config.position == "decoupled" else 0
        self.rows = [self.NH * self.QK, self.NKV * (self.QK - shared), shared,   # q, k, k_rope,
                     self.NKV * self.HS]                                         # v
        self.c_attn = nn.Linear(config.n_embd, sum(self.rows))

    def project(self, x, rope):
        q, k, k_rope, v = self.c_attn(x).split(self.rows, dim=-1)                # (B, T, ...)
        q = rotate(split_heads(q, self.NH), rope)                                # (B, NH, T, QK)
        k = split_heads(k, self.NKV)                                       # (B, NKV, T, QK or NOPE)
        v = split_heads(v, self.NKV)                                             # (B, NKV, T, HS)
        if k_rope.shape[-1]:
            return q, k, v, rotate(k_rope.unsqueeze(1), rope)              # k_rope (B, 1, T, RD)
        return q, rotate(k, rope), v

    def up_project(self, *known):
        return known                                                             # already k and v


class LatentAttention(Attention):
    """mla: keys and values of all heads are up-projected from one latent of R numbers per token.

    With NKV < NH this is GQLA (arXiv 2605.15250): query head h reads key/value head h // G.
    """

    def __init__(self, config):
        super().__init__(config)
        C, RQ, self.R = config.n_embd, config.q_rank, config.kv_rank
        NH, NKV, HS, NOPE, RD, QK = self.NH, self.NKV, self.HS, self.NOPE, self.RD, self.QK
        norms = {"layernorm": nn.LayerNorm, "rmsnorm": partial(nn.RMSNorm, eps=1e-6),
                 "none": nn.Identity}
        norm = norms[config.latent_norm]
        if RQ:
            self.q_a_proj = nn.Linear(C, RQ, bias=False)
            self.q_a_layernorm = norm(RQ)
            self.q_b_proj = nn.Linear(RQ, NH * QK, bias=False)
        else:
            self.q_proj = nn.Linear(C, NH * QK, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, self.R + RD, bias=False)    # rows: latent, k_rope
        self.kv_a_layernorm = norm(self.R)
        self.kv_b_proj = nn.Linear(self.R, NKV * (NOPE + HS), bias=False)  # per head: k_nope, v

    def project(self, x, rope):
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)                                                   # (B, T, NH*QK)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))              # (B, T, NH*QK)
        q = rotate(split_heads(q, self.NH), rope)                                # (B, NH, T, QK)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.R, self.RD], dim=-1)                                           # (B, T, R | RD)
        latent = self.kv_a_layernorm(latent)
        if self.RD:
            latent = torch.cat([latent, rotate(k_rope, rope)], dim=-1)           # (B, T, R+RD)
        return q, latent.unsqueeze(1)                                      # latent (B, 1, T, R+RD)

    def up_project(self, latent):
        latent, k_rope = latent.split([self.R, self.RD], dim=-1)                 # (B, 1, S, R | RD)
        kv = split_heads(self.kv_b_proj(latent.squeeze(1)), self.NKV)      # (B, NKV, S, NOPE+HS)
        k, v = kv.split([self.NOPE, self.HS], dim=-1)                      # (B, NKV, S, NOPE | HS)
        return (k, v, k_rope) if self.RD else (k, v)

    def attend_absorbed(self, q, latent):
        """attend_step without up-projection: the latents themselves are keys and values of an MQA.

        With W_UK, W_UV the rows of kv_b_proj that make a head's key and value,
        q . (W_UK latent) = (W_UK^T q) . latent, and sums of W_UV latent are W_UV times their sum.
        """
        w = self.kv_b_proj.weight.unflatten(0, (self.NKV, -1))                   # (NKV, NOPE+HS, R)
        w_uk, w_uv = w.split([self.NOPE, self.HS], dim=1)                  # (NKV, NOPE | HS, R)
        q_nope, q_rope = q.split([self.NOPE, self.RD], dim=-1)             # (B, NH, 1, NOPE | RD)
        q_nope = self.matmul_by_kv_head(q_nope, w_uk)                            # (B, NH, 1, R)
        q = torch.cat([q_nope, q_rope], dim=-1)                                  # (B, NH, 1, R+RD)
        y = self.attend_step(q, latent, latent[..., :self.R])                    # (B, NH, 1, R)
        return self.matmul_by_kv_head(y, w_uv.mT)                                # (B, NH, 1, HS)

    def matmul_by_kv_head(self, x, w):
        """Each head's x (B, NH, 1, m) times the w (NKV, m, n) of its kv head -> (B, NH, 1, n)"""
        x = x.transpose(0, 2).reshape(self.NKV, -1, x.shape[-1])                 # (NKV, G*B, m)
        return (x @ w).view(1, self.NH, -1, w.shape[-1]).transpose(0, 2)         # (B, NH, 1, n)


# ----------------------------------------------------------------------------
# The model

class Block(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C, eps=1e-5)
        self.attn = (LatentAttention if config.attention == "mla" else DirectAttention)(config)
        self.ln_2 = nn.LayerNorm(C, eps=1e-5)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(C, 4 * C), gelu=nn.GELU(approximate="tanh"), c_proj=nn.Linear(4 * C, C)))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), rope, cache))                  # (B, T, C)
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
        """As GPT-2: N(0, 0.02), what adds to the residual times 1/sqrt(2L), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * self.config.n_layer if "c_proj" in name else 1))
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    def hidden(self, idx, cache=None):
        """idx (B, T) -> (B, T, C), what the head reads; with a cache, idx goes on from it"""
        begin, T = cache.length if cache else 0, idx.shape[1]
        x = self.wte(idx)                                                        # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe.weight[begin:begin + T]                             # (B, T, C)
        rope = cache.rope if cache else rope_table(T, self.config.rope_dim, like=x)
        rope = rope[:, begin:begin + T]                                          # (2, T, RD)
        x = self.drop(x)
        for block in self.h:
            x = block(x, rope, cache)
        if cache:
            cache.length += T
        return self.ln_f(x)                                                      # (B, T, C)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T), targets (B, T) or None -> logits (B, T, V), mean cross-entropy or None

        With a cache, idx continues what it holds; the logits are of the last position, (B, 1, V).
        """
        x = self.hidden(idx, cache)                                              # (B, T, C)
        if cache:
            x = x[:, -1:]                                                        # (B, 1, C)
        logits = F.linear(x, self.wte.weight)                                    # (B, T, V), tied
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(self, idx, n, temperature=0.0, top_k=0, cache="full"):
        """idx (B, T) -> (B, T+n): n more tokens, the likeliest or, with a temperature, random"""
        training, T = self.training, idx.shape[1]
        self.eval()
        cache = Cache(self, T + n - 1, cache)                         # the last token is not read
        idx = F.pad(idx, (0, n))                                                 # (B, T+n)
        for end in range(T, T + n):
            logits = self(idx[:, cache.length:end], cache=cache)[0][:, -1]       # (B, V)
            if top_k:
                worst = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:] # (B, 1)
                logits = logits.masked_fill(logits < worst, -math.inf)
            if temperature > 0:
                idx[:, end] = torch.multinomial(
                    (logits / temperature).softmax(dim=-1), 1).squeeze(1)
            else:
                idx[:, end] = logits.argmax(dim=-1)
        self.train(training)
        return idx

    @classmethod
    def from_checkpoint(cls, path, dropout=0.0):
        """Whatever else the file holds (optimizer moments, references) is ignored."""
        tensors, metadata = load_safetensors(path)
        model = cls(Config.from_metadata(metadata), dropout)
        names = model.state_dict().keys()
        model.load_state_dict(
            {name: torch.from_numpy(tensors[name]) for name in names if name in tensors})
        return model

    def save_checkpoint(self, path):
        save_safetensors(path, self.state_dict(), self.config.to_metadata())

    def configure_optimizer(self, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        """AdamW; weight decay only for tensors of two or more dimensions."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay},
                  {"params": no_decay, "weight_decay": 0.0}]
        device = self.wte.weight.device
        return torch.optim.AdamW(groups, lr=torch.tensor(lr, device=device), betas=betas, eps=eps,
                                 fused=True, capturable=device.type == "cuda")


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
        tensors[name] = np.frombuffer(
            data, "<f4", (end - begin) // 4, begin).reshape(entry["shape"])
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
    text += b" " * (-len(text) % 8)                                        # keeps the data aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def read_tokens(path):
    """A token file (256 int32, then uint16), or any other as bytes -> tokens, are they bytes"""
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 3 or header[0] != 20240520:
        tokens = np.fromfile(path, np.uint8)
        if not tokens.all():
            raise ValueError("neither tokens (expected 20240520 at the start) nor text (it has "
                             "zero bytes)")
        return tokens, True
    version, count = map(int, header[1:3])
    if version != 1:
        raise ValueError(f"version {version} of the token format, expected 1")
    size = os.path.getsize(path)
    if count < 0 or size != 1024 + 2 * count:
        raise ValueError(f"{size} bytes, expected a header of 1024, and 2 for each of its {count} "
                         "tokens")
    return np.memmap(path, "<u2", mode="r", offset=1024, shape=(count,)), False


def inputs_and_targets(tokens, begin, rows, T):
    """Consecutive tokens from begin on as inputs (rows, T), and the same one later as targets."""
    chunk = torch.from_numpy(tokens[begin:begin + rows * T + 1].astype(np.int64))
    return chunk[:-1].view(rows, T), chunk[1:].view(rows, T)


def batch_starts(tokens, B, T, steps, order, seed):
    """Where the rows of each step's batch begin: (steps, B). As the C program's --order has it,
    but for the random numbers themselves."""
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(tokens) - T, (steps, B), generator=generator)
    batches = (len(tokens) - 1) // (B * T)
    return (torch.arange(steps) % batches)[:, None] * (B * T) + torch.arange(B) * T


def windows(tokens, B, T):
    """Once over the file: full windows of T targets, B at a time, then the shorter rest."""
    full, rest = divmod(len(tokens) - 1, T)
    for row in range(0, full, B):
        yield inputs_and_targets(tokens, row * T, min(B, full - row), T)
    if rest:
        yield inputs_and_targets(tokens, full * T, 1, rest)


# ----------------------------------------------------------------------------
# Command line

def parse_config(text):
    """"n_layer=4,n_embd=128,..." -> Config; what is absent keeps its default."""
    entries = dict(entry.partition("=")[::2] for entry in text.split(","))
    unknown = entries.keys() - {f.name for f in fields(Config)}
    try:
        if unknown:
            raise ValueError(f"a model has no {', '.join(sorted(unknown))}")
        return Config.from_metadata(entries)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def load_model(args, dropout=0.0):
    return GPT.from_checkpoint(args.load, dropout) if args.load else GPT(args.config, dropout)


def load_tokens(args, model, path):
    """Tokens and whether they are bytes, with what can be wrong said early."""
    c = model.config
    try:
        tokens, is_bytes = read_tokens(path)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    args.seq_len = args.seq_len or c.block_size
    if c.position == "learned" and args.seq_len > c.block_size:
        raise SystemExit(f"--seq-len {args.seq_len}: "
                         f"this model has {c.block_size} learned positions")
    if len(tokens) < 2 or tokens.max() >= c.vocab_size:
        raise SystemExit(f"{path}: needs two tokens or more, all below vocab_size {c.vocab_size}")
    return tokens, is_bytes


@torch.no_grad()
def mean_loss(model, tokens, B, T, bf16=False):
    """Over the targets of a whole file, each predicted once; in nats"""
    device, total, training = model.wte.weight.device, 0.0, model.training
    model.eval()
    for x, y in windows(tokens, B, T):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total += model(x.to(device), y.to(device))[1].item() * y.numel()
    model.train(training)
    return total / (len(tokens) - 1)


def evaluate(args):
    model = load_model(args)
    tokens, is_bytes = load_tokens(args, model, args.val_data)
    loss = mean_loss(model, tokens, args.batch_size, args.seq_len)
    bits = f"{loss / math.log(2):.6f}" if is_bytes else "n/a"
    print(f"loss {loss:.8f} perplexity {math.exp(loss):.6f} bits_per_byte {bits} "
          f"tokens {len(tokens) - 1}")


def learning_rate_at(args, step):
    """Of step 0, 1, ...: linear warm-up, half a cosine down to min_lr; or constant."""
    peak, warmup = args.learning_rate, args.warmup
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if args.schedule == "constant" or args.steps <= warmup:
        return peak
    done = (step - warmup) / (args.steps - warmup)
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (peak - args.min_lr)


def captured(update, model, optimizer):
    """`update` as one CUDA graph: a small model's hundreds of kernels start as one.

    Its first calls, which a graph must not see, are undone; AdamW's state is zero at the start.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    model.load_state_dict(before)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    return graph.replay


def train(args):
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = load_model(args, args.dropout).to(device)
    tokens, _ = load_tokens(args, model, args.train_data)
    val = load_tokens(args, model, args.val_data)[0] if args.val_data else None
    B, T, N = args.batch_size, args.seq_len, args.steps
    if len(tokens) < B * T + 1:
        raise SystemExit(f"{args.train_data}: a batch needs {B * T + 1} tokens, "
                         f"the file has {len(tokens)}")
    starts = batch_starts(tokens, B, T, N, args.order, args.seed).to(device)     # (N, B)
    data = torch.from_numpy(np.asarray(tokens).astype(np.int32)).to(device)
    window = torch.arange(T + 1, device=device)
    at = torch.zeros(B, dtype=torch.long, device=device)              # this step's row of starts
    loss = torch.zeros((), device=device)
    norm = torch.zeros((), device=device)
    optimizer = model.configure_optimizer(args.learning_rate, (args.beta1, args.beta2), args.eps,
                                          args.weight_decay)
    step_model = torch.compile(model) if args.compile else model

    def update():
        batch = data[at[:, None] + window].long()                                # (B, T+1)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            mean = step_model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1]
        mean.backward()
        norm.copy_(nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf))
        optimizer.step()
        optimizer.zero_grad()
        loss.copy_(mean.detach())

    if args.graph:
        update = captured(update, model, optimizer)
    log = open(args.log, "w") if args.log else None
    if log:
        configuration = ", ".join(
            f"{k} {v}" for k, v in model.config.to_metadata().items() if k != "format")
        settings = f"training data {len(tokens)} tokens, order {args.order}, " \
                   f"batch {B} x 1 x {T}, steps {N}, {args.schedule} schedule: " \
                   f"warmup {args.warmup}, lr {args.learning_rate} to {args.min_lr}, " \
                   f"dropout {args.dropout}, seed {args.seed}"
        log.write(f"# a log of gpt2_mla.py, {'bf16' if args.bf16 else 'float32'}\n"
                  f"# configuration: {configuration}\n"
                  f"# parameters: {sum(p.numel() for p in model.parameters())}\n"
                  f"# settings: {settings}\n"
                  "step,loss,lr,grad_norm,val_loss,tok_per_s,seconds\n")
    seconds, began, printed, start = [], time.perf_counter(), 0, time.perf_counter()
    for step in range(1, N + 1):
        at.copy_(starts[step - 1])
        lr = learning_rate_at(args, step - 1)
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        update()
        validates = val is not None and (step == N or step % args.val_every == 0)
        if not (validates or step % args.print_every == 0 or step == N):
            continue
        value = loss.item()                                                # waits for the device
        seconds.append((time.perf_counter() - start) / (step - printed))         # per step
        line = f"step {step}/{N} | loss {value:.6f}"
        val_loss = (mean_loss(model, val, args.eval_batch_size or B, T, args.bf16)
                    if validates else None)
        print(line + (f" | val {val_loss:.6f}" if validates else ""), flush=True)
        if log:
            rate, passed = B * T / seconds[-1], time.perf_counter() - began
            shown = f"{val_loss:.6f}" if validates else ""
            log.write(f"{step},{value:.6f},{lr:.6e},{norm.item():.6f},{shown},{rate:.0f},"
                      f"{passed:.3f}\n")
            log.flush()
        if not math.isfinite(value):
            raise SystemExit(f"step {step}: loss {value}")
        printed, start = step, time.perf_counter()
    if len(seconds) > 1:
        print(f"median of steps 2 to {N}: {B * T / np.median(seconds[1:]):.0f} tok/s")
    if args.save:
        model.save_checkpoint(args.save)


@torch.inference_mode()
def decode(args):
    """Steps of one token per sequence, each attending to --context tokens, itself included."""
    model = load_model(args).eval()
    B, N = args.batch_size, args.context
    cache = Cache(model, N, args.cache)
    idx = torch.zeros(B, 1, dtype=torch.long)
    model(idx, cache=cache)                                           # makes the cache's tensors
    for kept in sum(cache.kept.values(), []):
        kept.normal_()                                                # any past takes the same time
    seconds = []
    for _ in range(args.steps + 2):
        cache.length = N - 1
        start = time.perf_counter()
        idx = model(idx, cache=cache)[0].argmax(dim=-1)                          # (B, 1)
        seconds.append(time.perf_counter() - start)
    print(f"decode tok/s {B / np.median(seconds[2:]):.1f} context {N} batch {B} cache {args.cache} "
          f"threads {torch.get_num_threads()}")


def main():
    parser = argparse.ArgumentParser(description="The model of train_gpt2_mla.c in PyTorch.")
    commands = parser.add_subparsers(required=True)

    def command(run, name, batch_size, help):
        p = commands.add_parser(name, help=help)
        p.set_defaults(run=run)
        model = p.add_mutually_exclusive_group(required=True)
        model.add_argument("--load", metavar="FILE", help="checkpoint")
        model.add_argument("--config", type=parse_config, metavar="KEY=VALUE,...",
                           help="or a new model of this kind")
        p.add_argument("--batch-size", type=int, default=batch_size, help="sequences at a time")
        p.add_argument("--threads", type=int, default=0, help="default: PyTorch's choice")
        return p

    e = command(evaluate, "eval", 16, "loss over a whole file")
    e.add_argument("--val-data", required=True, metavar="FILE")
    t = command(train, "train", 16, "train, or train on")
    t.add_argument("--train-data", required=True, metavar="FILE")
    t.add_argument("--val-data", metavar="FILE")
    t.add_argument("--val-every", type=int, default=500, help="steps between validations (500)")
    t.add_argument("--eval-batch-size", type=int, default=0,
                   help="sequences at a time (--batch-size)")
    t.add_argument("--print-every", type=int, default=1,
                   help="steps between lines, and rows of the log (1)")
    t.add_argument("--log", metavar="FILE", help="CSV, as the C program's")
    t.add_argument("--order", choices=["sequential", "random"], default="sequential")
    t.add_argument("--schedule", choices=["constant", "cosine"], default="constant")
    t.add_argument("--warmup", type=int, default=0, help="steps (0)")
    t.add_argument("--min-lr", type=float, default=0.0, help="where the cosine ends (0)")
    t.add_argument("--seed", type=int, default=1337)
    t.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    t.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    t.add_argument("--graph", action="store_true", help="cuda: each step as one CUDA graph")
    t.add_argument("--save", metavar="FILE", help="write the trained model")
    t.add_argument("--compile", action="store_true", help="torch.compile the model")
    t.add_argument("--steps", type=int, default=20)
    defaults = dict(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
                    grad_clip=1.0, dropout=0.0)
    for name, default in defaults.items():
        t.add_argument("--" + name.replace("_", "-"), type=float, default=default,
                       help=f"default: {default}")
    for p in (e, t):
        p.add_argument("--seq-len", type=int, default=0, help="default: the model's block_size")
    d = command(decode, "decode", 1, "speed of generating, a token per sequence and step")
    d.add_argument("--cache", choices=["full", "latent", "absorbed"], default="full")
    d.add_argument("--context", type=int, default=256, help="tokens that each step attends to")
    d.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()

"""Writes dev/test/reference/*.safetensors: what test_mla.c compares the C code with.

One file or more per row of the attention family, each a tiny and deliberately awkward
model: heads of 6, ranks of 7 and 10 and a vocabulary of 37 divide by no vector
width, and sequences of 75 end within the second 64-wide tile of the attention.
Parameters are random, rounded to float32; everything computed from them is
float64, rounded to float32 only when written.

A file is a normal checkpoint with these tensors added:
    ref.tokens       (B, T+1)  token numbers: inputs are [:, :-1], targets [:, 1:]
    ref.logits       (B, T, V)
    ref.loss         (1)       mean cross-entropy
    ref.grad.<name>            gradient of the loss, not clipped, for every parameter
    ref.losses       (10)      losses of 10 AdamW steps on this batch, each before its update
    ref.norms        (10)      gradient norms of these steps, each before clipping
and, in the metadata, the steps' ref.learning_rate, ref.beta1, ref.beta2, ref.eps,
ref.weight_decay and ref.grad_clip.

Nothing is written before a second implementation, from the definitions and with
one loop over heads, gives the same logits and gradients to 1e-12.

    python dev/pytorch/make_reference.py [folder]
"""

import math
import sys
import zlib
from pathlib import Path

import torch

from gpt2_mla import GPT, Config, save_safetensors

B, T, STEPS = 2, 75, 10
SIZES = dict(n_layer=2, n_head=4, n_embd=24, block_size=80, vocab_size=37)
RQ, R, RD, NKV = 7, 10, 4, 2
LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY, GRAD_CLIP = 3e-3, 0.9, 0.95, 1e-8, 0.1, 1.0

MODELS = {
    "mha_learned": dict(attention="mha", position="learned"),
    "mha_rope": dict(attention="mha", position="rope"),
    "mha_decoupled": dict(attention="mha", position="decoupled"),
    "gqa_learned": dict(attention="gqa", position="learned", n_kv_head=NKV),
    "gqa_rope": dict(attention="gqa", position="rope", n_kv_head=NKV),
    "mqa_learned": dict(attention="mqa", position="learned"),
    "mqa_rope": dict(attention="mqa", position="rope"),
    "mla_learned": dict(attention="mla", position="learned"),
    "mla_learned_none_q0": dict(attention="mla", position="learned", latent_norm="none", q_rank=0),
    "mla_decoupled": dict(attention="mla", position="decoupled"),
    "mla_decoupled_rmsnorm": dict(attention="mla", position="decoupled", latent_norm="rmsnorm"),
    "mla_decoupled_none": dict(attention="mla", position="decoupled", latent_norm="none"),
    "mla_decoupled_q0": dict(attention="mla", position="decoupled", q_rank=0),
    "mla_decoupled_gqla": dict(attention="mla", position="decoupled", n_kv_head=NKV),
    "mla_learned_kv1": dict(attention="mla", position="learned", n_kv_head=1),
    "mla_decoupled_nope": dict(attention="mla", position="decoupled", latent_norm="rmsnorm",
                               nope_dim=8),  # a query is twice as wide as a value
}


# ----------------------------------------------------------------------------
# The model a second time: c is its Config, w its tensors by name

def layernorm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight + bias


def latent_norm(kind, x, w, name):
    if kind == "layernorm":
        return layernorm(x, w[name + ".weight"], w[name + ".bias"])
    if kind == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[name + ".weight"]
    return x


def rope(x):
    """x (B, T, RD): position p turns the pair (i, i + RD/2), a complex number, by p * frequency."""
    half = x.shape[-1] // 2
    if half == 0:
        return x
    i, p = torch.arange(half).double(), torch.arange(x.shape[1]).double()
    angle = p[:, None] * 10000.0 ** (-i / half)                                  # (T, RD/2)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle) # (B, T, RD/2)
    return torch.cat([turned.real, turned.imag], -1)


def attention(c, w, name, x):
    """x (B, T, C) -> (B, T, C); each head takes its own rows out of the weight matrices."""
    NH, NKV, HS, RD, R = c.n_head, c.n_kv_head, c.head_size, c.rope_dim, c.kv_rank
    NOPE = c.nope_dim
    QK = NOPE + RD                                                               # width of q and k
    get = lambda tensor: w[f"{name}.{tensor}"]
    if c.attention == "mla":
        down = torch.einsum("btc,rc->btr", x, get("kv_a_proj_with_mqa.weight"))  # (B, T, R+RD)
        latent = latent_norm(c.latent_norm, down[..., :R], w, f"{name}.kv_a_layernorm")
        source, w_q = x, get("q_proj.weight") if c.q_rank == 0 else get("q_b_proj.weight")
        if c.q_rank:
            down_q = torch.einsum("btc,rc->btr", x, get("q_a_proj.weight"))      # (B, T, RQ)
            source = latent_norm(c.latent_norm, down_q, w, f"{name}.q_a_layernorm")
    else:
        w_attn, b_attn = get("c_attn.weight"), get("c_attn.bias")

    def project(first, count):
        """Rows [first, first + count) of c_attn applied to x."""
        rows = slice(first, first + count)
        return torch.einsum("btc,rc->btr", x, w_attn[rows]) + b_attn[rows]

    y = b_out = get("c_proj.bias")
    causal = torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1])       # (T, T)
    for h in range(NH):
        g = h // (NH // NKV)                                               # its key/value head
        if c.attention == "mla":
            q = torch.einsum("btr,dr->btd", source, w_q[h * QK:(h + 1) * QK])
            w_k = get("kv_b_proj.weight")[g * (NOPE + HS):][:NOPE]
            w_v = get("kv_b_proj.weight")[g * (NOPE + HS) + NOPE:][:HS]
            q_nope, q_rope = q[..., :NOPE], q[..., NOPE:]
            k_nope, k_rope = torch.einsum("btr,dr->btd", latent, w_k), down[..., R:]
            v = torch.einsum("btr,dr->btd", latent, w_v)
        elif c.position == "decoupled":
            q_nope, q_rope = project(h * HS, NOPE), project(h * HS + NOPE, RD)
            k_nope, k_rope = project(NH * HS + h * NOPE, NOPE), project(NH * (HS + NOPE), RD)
            v = project(NH * (HS + NOPE) + RD + h * HS, HS)
        else:
            q_nope, q_rope = project(h * HS, NOPE), project(h * HS + NOPE, RD)
            k_nope, k_rope = project((NH + g) * HS, NOPE), project((NH + g) * HS + NOPE, RD)
            v = project((NH + NKV + g) * HS, HS)
        score = torch.einsum("bid,bjd->bij", q_nope, k_nope)                     # (B, T, T)
        score = score + torch.einsum("bid,bjd->bij", rope(q_rope), rope(k_rope))
        weight = torch.exp(score / math.sqrt(QK)) * causal
        weight = weight / weight.sum(-1, keepdim=True)
        head = torch.einsum("bij,bjd->bid", weight, v)                           # (B, T, HS)
        y = y + torch.einsum("btd,cd->btc", head, get("c_proj.weight")[:, h * HS:(h + 1) * HS])
    return y


def model_by_definition(c, w, idx):
    """idx (B, T) -> logits (B, T, V)"""
    x = w["wte.weight"][idx]
    if c.position == "learned":
        x = x + w["wpe.weight"][:idx.shape[1]]
    for i in range(c.n_layer):
        norm = lambda n: layernorm(x, w[f"h.{i}.{n}.weight"], w[f"h.{i}.{n}.bias"])
        linear = lambda n, z: z @ w[f"h.{i}.{n}.weight"].T + w[f"h.{i}.{n}.bias"]
        x = x + attention(c, w, f"h.{i}.attn", norm("ln_1"))
        z = linear("mlp.c_fc", norm("ln_2"))
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))
        x = x + linear("mlp.c_proj", z)
    return layernorm(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def check_by_definition(model, x, y, logits):
    """Logits and gradients of the module against the second implementation: largest difference."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    again = model_by_definition(model.config, w, x)
    loss = -again.log_softmax(-1).gather(-1, y[..., None]).mean()
    gradients = torch.autograd.grad(loss, list(w.values()))
    worst = (again - logits).abs().max().item()
    for p, gradient in zip(model.parameters(), gradients):
        worst = max(worst, (p.grad - gradient).abs().max().item())
    assert worst < 1e-12, worst
    return worst


def check_transformers(model, x, logits):
    """For mha with learned positions: the GPT-2 of the transformers library, if it is there."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return
    c = model.config
    other = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=0, eos_token_id=0))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")             # stored (in, out) there
    state = {name: t.T if name.endswith(conv1d) else t for name, t in model.state_dict().items()}
    other.transformer.load_state_dict(state)
    other.double().eval()
    worst = (other(x).logits - logits).abs().max().item()
    assert worst < 1e-12, worst
    print(f"  transformers' GPT2LMHeadModel gives the same logits, largest difference {worst:.1e}")


# ----------------------------------------------------------------------------
# The files

def randomize(model):
    """Nothing zero, nothing tiny: attention far from uniform, every gradient worth comparing."""
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        if name.endswith("bias"):
            p.uniform_(-0.1, 0.1)
        elif p.dim() == 1:
            p.uniform_(0.8, 1.2)
        elif name.startswith(("wte", "wpe")):
            p.normal_(std=0.3)
        else:
            gain = 1.4 if ".attn." in name and "c_proj" not in name else 0.8
            p.normal_(std=gain / math.sqrt(p.shape[1]))
        p.requires_grad_(True)


def make_reference(name, choices, folder):
    torch.manual_seed(zlib.crc32(name.encode()))
    ranks = dict(q_rank=RQ, kv_rank=R, rope_dim=RD)  # other kinds of attention ignore them
    model = GPT(Config(**(SIZES | ranks | choices)))
    randomize(model)
    tokens = torch.randint(model.config.vocab_size, (B, T + 1))                  # (B, T+1)
    x, y = tokens[:, :-1], tokens[:, 1:]                                         # (B, T) each
    model.double()

    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    logits, loss = model(x, y)
    loss.backward()
    tensors["ref.tokens"] = tokens.double()
    tensors["ref.logits"] = logits
    tensors["ref.loss"] = loss.reshape(1)
    tensors |= {"ref.grad." + key: p.grad.clone() for key, p in model.named_parameters()}
    worst = check_by_definition(model, x, y, logits)
    if name == "mha_learned":
        check_transformers(model, x, logits)

    optimizer = model.configure_optimizer(LEARNING_RATE, (BETA1, BETA2), EPS, WEIGHT_DECAY)
    losses, norms = torch.zeros(STEPS), torch.zeros(STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        losses[step] = loss.item()
        norms[step] = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP).item()
        optimizer.step()
    assert norms.max() > 1.5 * GRAD_CLIP and losses[-1] < losses[0] - 0.3
    tensors["ref.losses"] = losses
    tensors["ref.norms"] = norms

    values = dict(learning_rate=LEARNING_RATE, beta1=BETA1, beta2=BETA2, eps=EPS,
                  weight_decay=WEIGHT_DECAY, grad_clip=GRAD_CLIP)
    metadata = (model.config.to_metadata()
                | {"ref." + key: str(value) for key, value in values.items()})
    path = folder / f"{name}.safetensors"
    save_safetensors(path, tensors, metadata)
    print(f"{path.name:34} {path.stat().st_size:7} bytes  "
          f"loss {losses[0]:.4f} -> {losses[-1]:.4f}  "
          f"norm {norms.max():.2f} .. {norms.min():.2f}  definition differs by {worst:.1e}")


def main():
    folder = (Path(sys.argv[1]) if len(sys.argv) > 1
              else Path(__file__).resolve().parents[1] / "test/reference")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)                                               # one order of summation
    torch.use_deterministic_algorithms(True)
    for name, choices in MODELS.items():
        make_reference(name, choices, folder)


if __name__ == "__main__":
    main()

"""DeepSeek's own attention, as transformers have it (DeepseekV3Attention), is ours, to 1e-5.

    python3 dev/test/deepseek_test.py     with the program in the top folder; some seconds

Both ways: weights of models of this program in that layer, and that layer's weights in ours; the
outputs beside gpt2_mla.py's, and losses of whole models beside the C program's. Ours are mla with
position decoupled and latent norm rmsnorm. The only differences are names and an order:
    o_proj is our c_proj. DeepSeek's has no bias unless attention_bias, which gives the two
    down-projections biases too: those are zero here;
    with rope_interleave, as in DeepSeek's own files, rotary pair i is (2i, 2i+1), not (i, i+RD/2):
    the rotary rows of queries and of the rotary key in another order.
(pip install torch numpy safetensors transformers)
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (DeepseekV3Attention,
                                                                  DeepseekV3RotaryEmbedding)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from convert_test import PROGRAM, TEXT, loss_of, program  # noqa: E402
from gpt2_mla import (GPT, Config, LatentAttention, mean_loss, read_tokens,  # noqa: E402
                      rope_table)


class DeepSeek(torch.nn.Module):
    """DeepseekV3Attention in the place of our Attention: x (B, T, C) -> (B, T, C)"""

    def __init__(self, c, interleave):
        super().__init__()
        config = DeepseekV3Config(
            hidden_size=c.n_embd, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
            q_lora_rank=c.q_rank or None, kv_lora_rank=c.kv_rank, qk_rope_head_dim=c.rope_dim,
            qk_nope_head_dim=c.nope_dim, v_head_dim=c.head_size, rope_interleave=interleave,
            attention_bias=True, max_position_embeddings=c.block_size, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        self.layer = DeepseekV3Attention(config, 0)
        self.rotary = DeepseekV3RotaryEmbedding(config)
        for name, p in self.layer.named_parameters():
            p.data = torch.zeros_like(p) if name.endswith("bias") else torch.randn_like(p) * 0.2
            if "layernorm" in name:
                p.data += 1

    def forward(self, x, rope=None, cache=None):
        T = x.shape[1]
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]             # (1, 1, T, T)
        positions = self.rotary(x, torch.arange(T)[None])
        return self.layer(x, positions, mask)[0]


def rotary_rows(c, interleave):
    """Which row of a rotary part in DeepSeek's order is row i of ours: (RD)"""
    i = torch.arange(c.rope_dim)
    return torch.cat([i[::2], i[1::2]]) if interleave else i


def to_ours(theirs, c, interleave):
    """A DeepseekV3Attention's tensors -> those of a LatentAttention, by name"""
    order = rotary_rows(c, interleave)
    tensors = {}
    for name, t in theirs.state_dict().items():
        if name.startswith(("q_proj", "q_b_proj")):
            heads = t.unflatten(0, (c.n_head, c.qk_size))                        # (NH, QK, .)
            t = torch.cat([heads[:, :c.nope_dim], heads[:, c.nope_dim:][:, order]], 1).flatten(0, 1)
        if name == "kv_a_proj_with_mqa.weight":
            t = torch.cat([t[:c.kv_rank], t[c.kv_rank:][order]])                 # (R+RD, C)
        if name in ("q_a_proj.bias", "kv_a_proj_with_mqa.bias"):
            assert not t.any()
        else:
            tensors[name.replace("o_proj", "c_proj")] = t
    return tensors


def to_theirs(ours, c, theirs, interleave):
    """The reverse, into `theirs`. Its zero biases stay."""
    order = rotary_rows(c, interleave).argsort()
    state = theirs.state_dict()
    for name, t in ours.items():
        if name.startswith(("q_proj", "q_b_proj")):
            heads = t.unflatten(0, (c.n_head, c.qk_size))                        # (NH, QK, .)
            t = torch.cat([heads[:, :c.nope_dim], heads[:, c.nope_dim:][:, order]], 1).flatten(0, 1)
        if name == "kv_a_proj_with_mqa.weight":
            t = torch.cat([t[:c.kv_rank], t[c.kv_rank:][order]])                 # (R+RD, C)
        state[name.replace("c_proj", "o_proj")] = t
    theirs.load_state_dict(state)


SHAPES = {
    "split heads, q_rank 24": dict(n_embd=64, n_head=4, q_rank=24, kv_rank=40, rope_dim=8),
    "V2-Lite's proportions": dict(n_embd=64, n_head=4, kv_rank=64, rope_dim=8, nope_dim=16),
    # 16 heads of 128 + 64, values of 128, latents of 512: a layer of DeepSeek-V2-Lite, as it is
    "V2-Lite's size": dict(n_embd=2048, n_head=16, kv_rank=512, rope_dim=64, nope_dim=128),
}


@torch.no_grad()
def test_outputs():
    """A layer's outputs, both ways, with pairs in either order."""
    worst = 0
    for name, shape in SHAPES.items():
        c = Config("mla", "decoupled", n_layer=1, latent_norm="rmsnorm", block_size=48, **shape)
        for interleave in (False, True):
            torch.manual_seed(1)
            theirs, ours = DeepSeek(c, interleave).eval(), LatentAttention(c).eval()
            if c.n_embd > 64:  # outputs near 1, as with numbers of a trained model
                for p in theirs.parameters():
                    p.data *= 0.1 if p.dim() == 2 else 1
            theirs.layer.o_proj.bias.data.normal_()
            x = torch.randn(2, 48, c.n_embd)
            rope = rope_table(48, c.rope_dim, like=x)
            ours.load_state_dict(to_ours(theirs.layer, c, interleave))
            y = theirs(x)
            off = (y - ours(x, rope)).abs().max().item()
            back = DeepSeek(c, interleave).eval()
            to_theirs(ours.state_dict(), c, back.layer, interleave)
            off = max(off, (back(x) - y).abs().max().item())
            assert off < 1e-5, (name, interleave, off)
            assert all(torch.equal(a, b) for a, b in zip(back.layer.state_dict().values(),
                                                         theirs.layer.state_dict().values()))
            worst = max(worst, off)
        wrong = LatentAttention(c)
        wrong.load_state_dict(to_ours(theirs.layer, c, not interleave))
        assert (wrong(x, rope) - y).abs().max() > 1e-2, "the order of rotary rows is not seen"
    return f"{', '.join(SHAPES)}: outputs to {worst:.1e}"


def test_losses(folder):
    """Models that the C program has trained, with DeepSeek's layers; and models with DeepSeek's
    random layers, which the C program evaluates."""
    tokens, _ = read_tokens(TEXT)
    said = []
    for i, (name, shape) in enumerate(list(SHAPES.items())[:2]):
        path = folder / f"{i}.safetensors"
        options = {"--kv-rank": shape["kv_rank"], "--rope-dim": shape["rope_dim"],
                   "--q-rank": shape.get("q_rank", 0)}
        if "nope_dim" in shape:
            options["--nope-dim"] = shape["nope_dim"]
        program("--attention", "mla", "--latent-norm", "rmsnorm", "--layers", 2, "--channels", 64,
                "--heads", 4, "--seq-len", 48, *sum(options.items(), ()), "--steps", 60,
                "--train-data", TEXT, "--sample-every", 0, "--save", path)
        for trained in (True, False):
            model = GPT.from_checkpoint(path)
            c = model.config
            for block in model.h:
                layer = DeepSeek(c, False)
                if trained:
                    to_theirs(block.attn.state_dict(), c, layer.layer, False)
                else:
                    block.attn.load_state_dict(to_ours(layer.layer, c, False))
                block.theirs = layer
            if not trained:
                state = {k: v for k, v in model.state_dict().items() if "theirs" not in k}
                plain = GPT(c)
                plain.load_state_dict(state)
                plain.save_checkpoint(path)
            for block in model.h:
                block.attn = block.theirs
            theirs, c_program = mean_loss(model, tokens, 16, 48), loss_of(path)
            assert abs(theirs - c_program) < 1e-5 * c_program, (name, trained, theirs, c_program)
            said.append(f"{c_program:.6f} and {theirs:.6f}")
    return f"C program's and DeepSeek's layers' loss: {'; '.join(said)}"


def main():
    if not os.access(PROGRAM, os.X_OK):
        sys.exit("deepseek_test.py: no ./train_gpt2_mla, expected the program: run make first")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    began = time.time()
    print(f"test_outputs: as expected, {test_outputs()} ({time.time() - began:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        said = test_losses(Path(folder))
    print(f"test_losses: as expected, {said} ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    main()

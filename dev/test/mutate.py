#!/usr/bin/env python3
"""Shows that the tests can fail.

Makes one small mistake at a time in a temporary copy of train_gpt2_mla.c, runs `make test` there
and reports whether the tests notice: caught, with the first check that failed, or MISSED. The
mistakes are such as one makes: a sign, a dropped term, a wrong index, stride or scale.

    dev/test/mutate.py                             all of them, about half an hour
    dev/test/mutate.py rotate attention_backward   those in functions so named
    dev/test/mutate.py --check                     only see whether the table still fits the source
    dev/test/mutate.py --jobs 4                    four at a time

Exit status 0: all caught; 1: some missed; 2: the table needs an update, or the tests fail on the
source as it is. A mistake is (function, text, text instead, what it is); the text must occur
exactly once in the function. Your own attention deserves a few lines of its own here.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "train_gpt2_mla.c"
TIMEOUT = 400  # seconds; built at -O1 and on one thread the tests take two minutes
# Quickest, measured: -O1 to build and run together, one thread except where a test asks for more.
CFLAGS = "CFLAGS=-O1 -std=c11"
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")

MUTATIONS = [
    # --- 1, 2: randomness, configuration, tensors
    ("random_normal", "2 * i + 1", "2 * i", "angle and radius from one number"),
    ("random_stream", "(seed, purpose)", "(seed, 0)", "all purposes share one stream"),
    ("random_stream", ", which)", ", 0)", "every number of a stream is the same"),
    ("random_stream", "(seed, purpose)", "(0, purpose)", "the seed is ignored"),
    ("config_complete", "c->RQ = c->C / 2", "c->RQ = c->C / 3", "default q_rank"),
    ("config_complete", "c->R = 2 * c->C / 3", "c->R = c->C / 2", "default kv_rank"),
    ("config_complete", "c->HS / 4 * 2)", "c->HS / 8 * 2)", "default rope_dim"),
    ("config_complete", "? c->NH / 4 :", "? c->NH / 8 :", "default kv-heads of gqa"),
    ("config_complete", "== MQA ? 1", "== MQA ? 2", "mqa with two kv heads"),
    ("config_complete", "== DECOUPLED ? c->HS - c->RD : c->HS", "!= LEARNED ? c->HS - c->RD : c->HS",
     "position rope takes the rotary part from the kv heads"),
    ("config_complete", "c->NH * c->HS + c->NKV * c->NOPE", "c->NH * c->HS + c->NH * c->NOPE", "a key for every query head"),
    ("cache_floats", "c->HS - c->NOPE", "c->RD", "rotary part counted twice where it is the whole head"),
    ("cache_floats", "c->R + rope", "c->R", "mla without its rotary key"),
    ("cache_mode", "? CACHE_ABSORBED :", "? CACHE_LATENT :", "mla does not absorb by itself"),
    ("cache_floats", "(c->NOPE + c->HS) + rope", "(c->NOPE + c->HS)", "mha decoupled without its rotary key"),
    ("cache_floats", "c->NKV * (", "c->NH * (", "every query head's key and value"),
    ("describe_tensors", "C, NH * HS, RESIDUAL", "C, NH * HS, NORMAL", "attention's c_proj at full size"),
    ("describe_tensors", "C, 4 * C, RESIDUAL", "C, 4 * C, NORMAL", "the MLP's c_proj at full size"),
    ("describe_tensors", '"ln_f.weight", C, 0, ONES', '"ln_f.weight", C, 0, ZEROS', "final norm starts at zero"),
    ("describe_tensors", "norm == NONE ? 0 : mla * R, 0, ONES", "norm == NONE ? 0 : mla * R, 0, ZEROS",
     "latent's norm starts at zero"),
    ("describe_tensors", "mla * NH * (NOPE + HS), R, NORMAL", "mla * NH * (NOPE + HS), R, RESIDUAL", "kv_b_proj starts too small"),
    ("model_create", "-2.0 * i / c->RD", "-2.0 * i / c->HS", "rotary frequencies over the head size"),
    ("model_create", "-2.0 * i / c->RD", "-1.0 * i / c->RD", "rotary frequencies half as far apart"),
    ("model_create", "pow(10000.0", "pow(1000.0", "theta"),
    ("model_create", "= sin(angle)", "= -sin(angle)", "turns the wrong way"),
    ("model_create", "m->n_params += t->size", "m->n_params = block.used", "padding counted as parameters"),
    ("model_init", "sqrt(2.0 * m->c.L)", "sqrt(m->c.L)", "residual projections too large"),
    ("model_init", "hash_bytes(t->name, strlen(t->name))", "0", "every tensor starts with the same numbers"),
    ("model_init", "(std * random_normal(key, k))", "(std * random_normal(key, k % t->cols))", "every row the same"),
    ("model_init", ": 0.02;", ": 0.2;", "standard deviation"),

    # --- 3: matrix product
    ("tile", "acc[i][1] += a[i * a_row] * b1", "acc[i][1] += a[i * a_row] * b0", "second vector from the first"),
    ("tile", "acc[i][0] += a[i * a_row] * b0", "acc[i][0] = a[i * a_row] * b0", "the last k only"),
    ("tile", "i * start_row + j * VW", "i * start_row", "first half of the start twice"),
    ("tile", "c + i * c_row + j * VW", "c + i * NR + j * VW", "rows of c close together"),
    ("tile", "b += b_row", "b += NR", "b taken for packed"),
    ("tile", "a += a_step", "a += MR", "a taken for packed"),
    ("pack", "square[x][y] = s[y * line + x]", "square[y][x] = s[y * line + x]", "the square not transposed"),
    ("pack", "(long)(i / W) * W * K + i % W + k * W", "(long)(i / W) * W * K + k * W", "wide panels: second square on the first"),
    ("pack", "src + k * deep + i;", "src + k * line + i;", "stride between numbers"),
    ("pack", "min_int(8, K - k)", "min_int(7, K - k)", "the last k of a ragged square"),
    ("pack", "y < n - i; y++) d[y]", "y < n - i - 1; y++) d[y]", "last line of a ragged panel"),
    ("multiply_blocks", "b += panel", "b += NR", "panels of b taken for rows"),
    ("multiply_blocks", "i / MR * a_panel", "i / MR * MR", "rows are the first ones"),
    ("multiply_blocks", "s = edge, s_row = NR", "s = edge, s_row = start_row", "stride of the start at the edge"),
    ("multiply_blocks", "memcpy(edge + r * NR, s + r * start_row", "memcpy(edge + r * NR, s", "first row of the start for all at the edge"),
    ("multiply_blocks", "memcpy(pc + r * c_row, edge + r * NR", "memcpy(pc + r * c_row, edge", "first row for all at the edge"),
    ("multiply_blocks", "M - i >= 4 ? 4 : 1", "M - i >= 3 ? 4 : 1", "a row too many"),
    ("few_by_columns", "x + (long)m * K", "x", "every VW rows are the first"),
    ("few_by_columns", "t[j * VW + i - m]", "t[j * VW]", "every row is the first"),
    ("few_by_columns", "start[i * start_row + n + j]", "start[i * start_row + n]", "start of another column"),
    ("few_by_columns", "N - n >= 4 ? 4 : 1", "MR", "columns past the last"),
    ("few_dots", "s5 += x[k] * b5[k]", "s5 += x[k] * b4[k]", "one of eight sums"),
    ("few_dots", "min_int(j + n * part, N - 1)", "min_int(j + n * part, N - 2)", "the last column of b"),
    ("few_dots", "start[at]", "start[j]", "start of another column"),
    ("matmul_few", "k ? cm : start ?", "start ?", "later blocks of k start afresh"),
    ("matmul_few", "mat_from(b, k, 0)", "b", "every block of k is the first"),
    ("matmul_few", "k ? c_row : start_row", "start_row", "later blocks of k from the first row"),
    ("matmul_few", "pack(own_a, a.p + m * a.row + k,", "pack(own_a, a.p + m * a.row,", "every block of a is the first"),
    ("matmul_few", "pack(own_a, a.p + m * a.row + k,", "pack(own_a, a.p + k,", "every VW rows are the first"),
    ("multiply_alone", "mat_from(b, k, 0).p", "b.p", "every block of b is the first"),
    ("multiply_alone", "mat_from(a, i, k)", "mat_from(a, i, 0)", "every block of a is the first"),
    ("multiply_alone", "mat_from(a, i, k)", "mat_from(a, 0, k)", "every block of rows is the first"),
    ("multiply_alone", "MR * (packed ? kc : a.row)", "MR * a.row", "panels of a taken for rows"),
    ("multiply_alone", "k ? pc : start ?", "start ?", "later blocks of k start afresh"),
    ("multiply_alone", "start + i * start_row", "start", "rows of the start are the first ones"),
    ("multiply_alone", "k ? c_row : start_row", "start_row", "later blocks of k with the bias's stride"),
    ("matmul", "M <= FEW && !packed", "M <= FEW", "few rows, though a is transposed"),
    ("matmul", "start ? start + j : NULL", "start", "few rows: bias of the first columns for all"),
    ("matmul", "c_row, a, mat_from(b, 0, j), M,", "c_row, a, b, M,", "few rows: the first columns for all"),
    ("matmul", "(N - 1) / (NC / 2) + 1", "1", "more columns of b than a thread has room for"),
    ("matmul", "mat_from(a, i, 0), mat_from(b, 0, j)", "a, mat_from(b, 0, j)", "alone: the first rows for all"),
    ("matmul", "mat_from(a, i, 0), mat_from(b, 0, j)", "mat_from(a, i, 0), b", "alone: the first columns for all"),
    ("matmul", "start + i * start_row + j : NULL, start_row", "start + i * start_row : NULL, start_row", "alone: bias of the first columns for all"),
    ("matmul", "start + i * start_row + j : NULL, start_row", "start + j : NULL, start_row", "alone: rows of the start are the first ones"),
    ("next_unit", "% threads, i", "% 1, i", "the first thread's units only"),
    ("next_unit", "i += (long)n * owner / threads", "i += 0", "every thread's units are the first ones"),
    ("next_unit", "(owner + 1) / threads", "(owner + 1) / threads - 1", "each thread's last unit is left out"),
    ("multiply_shared", "(long)j * kc", "0L * kc", "every panel packed into the first place"),
    ("multiply_shared", "mat_from(b, k, j0 + j)", "mat_from(b, 0, j0 + j)", "every block of k is the first in b"),
    ("multiply_shared", "mat_from(b, k, j0 + j)", "mat_from(b, k, j)", "every block of columns is the first"),
    ("multiply_shared", "mat_from(a, i, k)", "mat_from(a, i, 0)", "every block of k is the first in a"),
    ("multiply_shared", "mat_from(a, i, k)", "mat_from(a, 0, k)", "every block of rows is the first"),
    ("multiply_shared", "taken[omp_get_thread_num()] = 0;", "if (!k) taken[omp_get_thread_num()] = 0;", "after the first KC terms nothing is left to do"),
    ("multiply_shared", "MR * (packed ? kc : a.row)", "MR * a.row", "panels of a taken for rows"),
    ("multiply_shared", "k ? pc : start ?", "start ?", "later blocks of k start afresh"),
    ("multiply_shared", "start + i * start_row + j0", "start + i * start_row", "bias of the first columns for all"),
    ("multiply_shared", "start + i * start_row + j0", "start + j0", "rows of the start are the first ones"),
    ("multiply_shared", "k ? c_row : start_row", "start_row", "later blocks of k with the bias's stride"),

    # --- 4: layers
    ("add_pieces", "p < PIECES", "p < PIECES - 1", "the last piece is dropped"),
    ("add_pieces", "out[i] += sum", "out[i] = sum", "overwrites: micro-batches do not accumulate"),
    ("linear_forward", "I, b, 0)", "I, NULL, 0)", "no bias"),
    ("linear_forward", "I, b, 0)", "I, b, 1)", "bias shifted from token to token"),
    ("linear_forward", "transposed(w, I)", "rows_of(w, O)", "W not transposed"),
    ("linear_backward_input", "add ? dx : NULL", "NULL", "overwrites the other branch's gradient"),
    ("linear_backward_input", "add ? dx : NULL", "dx", "adds to what was there before"),
    ("linear_backward_input", "rows_of(w, I)", "transposed(w, O)", "W transposed"),
    ("linear_backward_weight", "N, dw, I)", "N, NULL, 0)", "dW overwritten, not accumulated"),
    ("linear_backward_weight", "transposed(dy, O)", "rows_of(dy, N)", "dy not transposed"),
    ("linear_backward_weight", "(long)N * (p + 1) / PIECES", "(long)(N - 1) * (p + 1) / PIECES", "db without the last token"),
    ("linear_backward_weight", "t = (long)N * p / PIECES", "t = N / PIECES * p", "db counts tokens twice"),
    ("linear_backward_weight", "sum[i] += dy[t * O + i]", "sum[i] = dy[t * O + i]", "db of a single token"),
    ("norm_statistics", "(x[i] - mu) * (x[i] - mu)", "x[i] * x[i]", "mean square in place of the variance"),
    ("norm_statistics", "square / n +", "square / (n - 1) +", "variance over n - 1"),
    ("norm_statistics", "(real)1e-5 : (real)1e-6", "(real)1e-5 : (real)1e-5", "layernorm's eps for rmsnorm"),
    ("norm_statistics", "(real)1e-5 : (real)1e-6", "(real)1e-6 : (real)1e-6", "rmsnorm's eps for layernorm"),
    ("norm_statistics", "kind == LAYERNORM) {", "kind != NONE) {", "rmsnorm subtracts a mean"),
    ("norm_forward", "x + t * x_row", "x + (long)t * n", "row stride where a rotary key follows the latent"),
    ("norm_forward", "(xt[i] - mean) * rstd", "xt[i] * rstd", "mean not subtracted"),
    ("norm_forward", "yt[i] += b[i]", "yt[i] += b[0]", "one bias for all"),
    ("norm_forward", "w[i] * (", "(", "no weight"),
    ("norm_backward", "w[i] * dyt[i] - mean_g - (", "w[i] * dyt[i] - (", "without mean(g)"),
    ("norm_backward", "w[i] * dyt[i] - mean_g", "dyt[i] - mean_g", "without the weight in g"),
    ("norm_backward", " - (xt[i] - mean) * rstd * mean_gx", "", "without x^ mean(g x^)"),
    ("norm_backward", " - (xt[i] - mean) * rstd * mean_gx", " - (xt[i] - mean) * mean_gx", "x^ without rstd"),
    ("norm_backward", "kind == LAYERNORM ? mean_g / n : 0", "mean_g / n", "rmsnorm with mean(g)"),
    ("norm_backward", "mean_gx /= n;", "", "a sum for a mean"),
    ("norm_backward", "+= rstd * (w[i]", "+= (w[i]", "rstd forgotten"),
    ("norm_backward", "+= rstd * (w[i]", "= rstd * (w[i]", "overwrites the residual stream's gradient"),
    ("norm_backward", "*dxt = dx + t * x_row", "*dxt = dx + t * n", "row stride of dx"),
    ("norm_backward", "sum_w[i] += dyt[i] * xhat", "sum_w[i] += dyt[i] * xt[i]", "dw from x in place of x^"),
    ("norm_backward", "sum_b[i] += dyt[i]", "sum_b[i] += g", "db with the weight in it"),
    ("norm_backward", "db, m->partial + n", "db, m->partial", "db from dw's sums"),
    ("norm_backward", "p + 1) / PIECES", "p + 1) / PIECES - 1", "the last token of each piece is dropped"),
    ("fast_exp", "+ n * 2.12194440e-4f", "- n * 2.12194440e-4f", "sign of ln 2's second part"),
    ("fast_exp", "0.16666521f", "0.16665621f", "two digits swapped"),
    ("fast_exp", " + r * 0.00138146f", "", "degree 5"),
    ("fast_exp", "x < -60.0f ? -60.0f :", "", "no clamp below"),
    ("fast_exp", "x < -60.0f ? -60.0f : x", "x >= -60.0f ? x : -60.0f; x = x", "NaN becomes a number"),
    ("fast_exp", "return exp(x)", "return expf(x)", "float in the double build"),
    ("largest", "for (; i < n; i++)", "for (; i < n - 1; i++)", "the last number is not looked at"),
    ("largest", "for (int j = 1;", "for (int j = 2;", "one lane of sixteen is not looked at"),
    ("largest", "x[i + j] > max[j] ? x[i + j] : max[j]", "x[i + j]", "the last sixteen only"),
    ("exp_row", "scale * (x[i] - max)", "scale * x[i] - max", "the maximum not scaled"),
    ("exp_row", "scale * (x[i] - max)", "scale * x[i]", "the maximum not subtracted"),
    ("exp_row", "sum += x[i]", "sum += scale * x[i]", "sum scaled"),
    ("GELU_2U", "(real)0.044715 * (x) * (x) * (x)", "(real)0.044715 * (x) * (x)", "square for cube"),
    ("GELU_2U", "1.5957691216057308", "1.702", "the sigmoid form's constant"),
    ("gelu_forward", "-GELU_2U(", "GELU_2U(", "sign"),
    ("gelu_forward", "y[i] = x[i] / (", "y[i] = 1 / (", "without x"),
    ("gelu_forward", "GELU_2U(x[i])", "(real)0.5 * GELU_2U(x[i])", "u for 2u"),
    ("gelu_backward", "0.134145", "0.044715", "slope without the 3 of the cube"),
    ("gelu_backward", " * (1 - s)", "", "without (1 - s)"),
    ("gelu_backward", "s + x[i] * s", "x[i] * s", "without s"),
    ("gelu_backward", "dy[i] *= s", "dy[i] = s", "dy forgotten"),
    ("gelu_backward", "x[i] *= s;", "x[i] = s;", "output not made again"),
    ("dropout_scale", "1 / (1 - m->dropout)", "1", "kept numbers not scaled up"),
    ("dropout_scale", "1 / (1 - m->dropout)", "1 / m->dropout", "scaled by 1/p"),
    ("dropout_scale", "m->dropout_key + where", "m->dropout_key", "the same numbers dropped in every place"),
    ("dropout_scale", "m->dropout_key + where", "where", "the same numbers dropped in every step"),
    ("dropout_scale", "< threshold", ">= threshold", "keeps with probability p"),
    ("residual_forward", "y[i] = x[i] + branch[i];", "y[i] = branch[i];", "no residual"),
    ("residual_forward", "x[i] + branch[i] * drop", "branch[i] * drop", "no residual under dropout"),
    ("residual_forward", "dropout_scale(m, where, i)", "dropout_scale(m, where, i / 2)", "dropped in pairs"),
    ("residual_backward", "* dropout_scale(m, where, i)", "", "no dropout"),
    ("residual_backward", "dropout_scale(m, where, i)", "dropout_scale(m, where + 1, i)", "another place's mask"),
    ("residual_backward", "return dy;", "{ for (long i = 0; i < n; i++) d_branch[i] = dy[i] / 2; return d_branch; }", "half"),
    ("rotate", "- sign * b * s[i]", "- b * s[i]", "backward turns forward, half of it"),
    ("rotate", "+ sign * a * s[i]", "+ a * s[i]", "backward turns forward, the other half"),
    ("rotate", "a * c[i] - sign", "a * c[i] + sign", "not a rotation"),
    ("rotate", "m->rope_sin + (long)(first + n % T)", "m->rope_sin + (long)(first + n)", "positions run on into the next sequence"),
    ("rotate", "*hi = lo + half", "*hi = lo + 1", "neighbours paired"),
    ("rotate", "element(x, n, h)", "element(x, n, 0) + h * 2 * half", "heads assumed adjacent"),
    ("rotate", "b * c[i] + sign * a", "b * c[i] + sign * lo[i]", "uses the turned number"),

    # --- 5: attention core
    ("join_keys", "element(a->k_rope, first + t, g), a->rope", "element(a->k_rope, first, g), a->rope", "one rotary key for all tokens"),
    ("join_keys", "element(a->k, first + t, g)", "element(a->k, first + t, 0)", "all heads read the first key head"),
    ("attention_forward", "for (int j = seen; j < whole; j++) pi[j] = -INFINITY;", "", "keys to come count in the sum"),
    ("attention_forward", "tokens_of(a->q, first + i0, h)", "tokens_of(a->q, first + i0, g)", "query head of the group's number"),
    ("join_keys", "r->keys + t * K + a->nope", "r->keys + t * K", "rotary keys over the other part"),
    ("attention_forward", "sqrt(m->c.HS)", "sqrt(a->nope)", "scale by the part that is not rotated"),
    ("attention_forward", "sqrt(m->c.HS)", "sqrt(m->c.C)", "scale by all channels"),
    ("attention_forward", "h / (a->heads / a->kv_heads)", "h % a->kv_heads", "groups interleaved"),
    ("attention_forward", "seen = i0 + i + 1", "seen = i0 + max_int(i, 1)", "a query does not see itself"),
    ("attention_forward", "seen = i0 + i + 1", "seen = min_int(i0 + i + 2, keys)", "a query sees the next token"),
    ("attention_forward", "seen = i0 + i + 1", "seen = keys", "no mask within a strip"),
    ("attention_forward", "pi[j] = 0", "(void)pi", "masked scores stay"),
    ("attention_forward", "[e] *= 1 / sums[i]", "[e] *= 1", "not divided by the sum"),
    ("attention_forward", "scale * max + (real)log(sums[i])", "(real)log(sums[i])", "lse without the maximum"),
    ("attention_forward", "scale * max + (real)log(sums[i])", "max + (real)log(sums[i])", "lse with the maximum not scaled"),
    ("attention_forward", "(first + i0 + i) * a->heads + h", "(first + i0 + i) * a->kv_heads + g", "lse kept by kv head"),
    ("attention_forward", "(long)b * T;", "0;", "every sequence is the first"),
    ("attention_forward", "element(a->v, first, g)", "element(a->v, first, 0)", "all heads read the first value head"),
    ("attention_forward", "r.v, end, rows", "r.v, keys, rows", "panels of values as if they ended with the strip"),
    ("attention_backward", "sqrt(m->c.HS)", "sqrt(a->value + a->rope)", "another scale than the forward's"),
    ("attention_backward", "memset(r.dk, ", "if (0) memset(r.dk, ", "dk adds to the head before"),
    ("attention_backward", "memset(dv + ", "if (0) memset(dv + ", "dv adds to the step before"),
    ("attention_backward", "scale * pi[j] * (dsi[j] - D)", "pi[j] * (dsi[j] - D)", "ds without the scale"),
    ("attention_backward", "scale * pi[j] * (dsi[j] - D)", "scale * pi[j] * dsi[j]", "ds without D"),
    ("attention_backward", "(dsi[j] - D)", "(dsi[j] + D)", "sign of D"),
    ("attention_backward", "scale * pi[j] * (dsi[j] - D)", "scale * (dsi[j] - D)", "ds without p"),
    ("attention_backward", "fast_exp(scale * pi[j] - li)", "fast_exp(pi[j] - li)", "scores not scaled"),
    ("attention_backward", "fast_exp(scale * pi[j] - li)", "fast_exp(scale * pi[j])", "probabilities not normalized"),
    ("attention_backward", "D += o[e] * d_o[e]", "D = o[e] * d_o[e]", "D of one place"),
    ("attention_backward", "seen = i0 + i + 1", "seen = keys", "no mask within a strip"),
    ("attention_backward", "seen = i0 + i + 1", "seen = i0 + i", "a query does not see itself"),
    ("attention_backward", "pi[j] = dsi[j] = 0", "pi[j] = 0", "masked ds stay"),
    ("attention_backward", "pi[j] = dsi[j] = 0", "dsi[j] = 0", "masked p stay"),
    ("attention_backward", "keys, V, rows, dv, d->v.token)", "keys, V, rows, NULL, 0)", "dv of the last strip only"),
    ("attention_backward", "keys, K, rows, r.dk, K)", "keys, K, rows, NULL, 0)", "dk of the last strip only"),
    ("attention_backward", "r.dk + t * K + a->nope", "r.dk + t * K", "dk_rope is dk"),
    ("attention_backward", "rows_of(r.ds, r.row), r.k, T", "rows_of(r.ds, r.row), r.k, keys", "panels of keys as if they ended with the strip"),
    ("attention_backward", "pack(r.q, element(a->q, q0, h)", "pack(r.q, element(a->q, first, h)", "dk from the first strip of queries"),
    ("attention_backward", "h < (g + 1) * group", "h < g * group + 1", "only the first query head of a group"),
    ("attention_backward", "pack(r.vt, element(a->v, first, g)", "pack(r.vt, element(a->v, first, 0)", "dp from the first value head"),
    ("attention_backward", "lse[(q0 + i) * a->heads + h]", "lse[(first + i) * a->heads + h]", "every strip has the first's lse"),
    ("attention_backward", "transposed(r.ds, r.row), r.q", "transposed(r.p, r.row), r.q", "p for ds in dk"),
    ("attention_decode", "rope, s, CHUNK)", "rope, NULL, 0)", "rotary scores overwrite the others"),
    ("attention_decode", "s + r * CHUNK, *end", "s, *end", "softmax of the first query for all"),
    ("attention_decode", "exp_row(sr, n, scale, end[0])", "exp_row(sr, n, scale, 0)", "maximum not taken off"),
    ("attention_decode", "sqrt(m->c.HS)", "sqrt(value)", "absorbed: scale by the width of a value"),
    ("attention_decode", "fast_exp(scale * (part[value] - max))", "fast_exp(part[value] - max)", "chunks weighted without the scale"),
    ("attention_decode", "real w = fast_exp(scale * (part[value] - max));", "real w = 1;", "chunks not weighted"),
    ("attention_decode", "max = fmax(max, part[c * (value + 2) + value])", "max = part[value]", "relative to the first chunk"),
    ("attention_decode", "sqrt(m->c.HS)", "sqrt(a->nope + a->rope)", "absorbed: scale by the width of what is multiplied"),
    ("attention_decode", "min_int(CHUNK, keys - first)", "min_int(CHUNK, keys - first - 1)", "does not see its own token"),
    ("attention_decode", "chunks = (keys + CHUNK - 1) / CHUNK", "chunks = max_int(1, keys / CHUNK)", "the last, short chunk dropped"),
    ("attention_decode", "element(a->q, b, g * group)", "element(a->q, b, g)", "queries of the first group"),
    ("attention_decode", "part_of_chunk(m, b, g * group, c", "part_of_chunk(m, b, g, c", "results of the groups overlap"),
    ("attention_decode", " + b * a->v_sequence", "", "values of the first sequence"),
    ("attention_decode", "element(a->k_rope, first, g)", "element(a->k_rope, 0, g)", "rotary keys of the first chunk"),
    ("attention_decode", "a->panels ? rows_of(pk_rope, NR) : transposed", "transposed", "rotary keys taken for rows"),

    # --- 6: front ends
    ("heads_of", "acts->kv + NOPE, kv_row", "acts->kv + HS, kv_row", "mla: place of the values"),
    ("heads_of", "(View){acts->kv, kv_row, NOPE + HS}", "(View){acts->kv, kv_row, NOPE}", "mla: keys of all heads first"),
    ("heads_of", "acts->kv_a + c->R,", "acts->kv_a,", "mla: rotary key from the latent"),
    ("heads_of", "acts->qkv + k_rope, row, 0", "acts->qkv + k, row, 0", "rotary key from the first key head"),
    ("heads_of", "k_rope = k + NKV * NOPE", "k_rope = k + NH * NOPE", "keys counted by query heads"),
    ("heads_of", "(View){acts->qkv + k, row, NOPE}", "(View){acts->qkv + k, row, HS}", "stride of key heads"),
    ("heads_of", "acts->qkv + v, row", "acts->qkv + k, row", "values are the keys"),
    ("rope_heads", "rotate(m, a->q, c->NH, N, T, first, sign)", "rotate(m, a->q, c->NH, N, T, first, 1)", "queries' gradient turned on"),
    ("rope_heads", "rotate(m, a->k, c->NKV, N", "rotate(m, a->k, 1, N", "only the first key head turned"),
    ("rope_heads", "a->q.p + a->nope", "a->q.p", "turns the head's start"),
    ("rope_heads", "rotate(m, a->k_rope, 1, N, T, first, sign)", "rotate(m, a->k_rope, 1, N, T, first, 1)", "rotary key's gradient turned on"),
    ("rope_heads", "rotate(m, a->k_rope, 1", "rotate(m, a->k_rope, c->NH", "one key turned once per head"),
    ("qkv_forward", "m->w[l][ATTN_B]", "NULL", "no bias"),
    ("qkv_forward", "m->norm", "acts->x", "x not normed"),
    ("qkv_backward", "m->g[l][ATTN_B]", "NULL", "bias has no gradient"),
    ("qkv_backward", "m->w[l][ATTN_W]", "m->w[0][ATTN_W]", "first layer's weight"),
    ("qkv_backward", "m->c.QKV, 0)", "m->c.QKV, 1)", "d_norm adds to what was there"),
    ("mla_latents", "m->latent, acts->kv_a, c->R + c->HS - c->NOPE", "m->latent, acts->kv_a, c->R", "rotary key not skipped"),
    ("mla_latents", "w[QA_NORM_W], w[QA_NORM_B]", "w[KVA_NORM_W], w[KVA_NORM_B]", "the other latent's norm"),
    ("mla_latents", "N, c->R, c->latent_norm", "N, c->R, LAYERNORM", "always layernorm"),
    ("mla_forward", "acts->kv, m->latent, w[KVB_W]", "acts->kv, acts->kv_a, w[KVB_W]", "latent not normed"),
    ("mla_forward", "if (decompress) ", "if (0) ", "keys and values not made"),
    ("mla_forward", "linear_forward(acts->q, m->q_latent", "linear_forward(acts->q, acts->q_a", "query latent not normed"),
    ("mla_forward", "else linear_forward(acts->q, m->norm, w[Q_W]", "else linear_forward(acts->q, acts->x, w[Q_W]", "q_rank 0: x not normed"),
    ("mla_backward", "mla_latents(m, l, acts, N);", "", "latents of the layer above"),
    ("mla_backward", "m->d.kv, m->latent, N", "m->d.kv, acts->kv_a, N", "kv_b_proj's gradient from the latent before its norm"),
    ("mla_backward", "memset(m->d.kv_a + t * kv_a, 0, R", "memset(m->d.kv_a + t * kv_a, 0, 0 * R", "latent's gradient adds to the layer above"),
    ("mla_backward", "memset(m->d.kv_a + t * kv_a, 0, R", "memset(m->d.kv_a + t * kv_a, 0, kv_a", "clears the rotary key's gradient"),
    ("mla_backward", "memset(m->d.q_a, 0, (size_t)N * RQ", "memset(m->d.q_a, 0, (size_t)N / 2 * RQ", "query latent's gradient half cleared"),
    ("mla_backward", "w[QA_W], N, C, RQ, 1)", "w[QA_W], N, C, RQ, 0)", "queries' gradient overwrites the keys'"),
    ("mla_backward", "w[Q_W], N, C, Q, 1)", "w[Q_W], N, C, Q, 0)", "q_rank 0: queries' gradient overwrites the keys'"),
    ("mla_backward", "w[KVA_W], N, C, kv_a, 0)", "w[KVA_W], N, C, kv_a, 1)", "d_norm adds to what was there"),
    ("mla_backward", "acts->kv_a, kv_a, w[KVA_NORM_W]", "acts->kv_a, R, w[KVA_NORM_W]", "rotary key not skipped"),
    ("mla_backward", "g[QA_NORM_W], g[QA_NORM_B], m->d_q_latent", "g[QA_NORM_W], NULL, m->d_q_latent", "norm's bias has no gradient"),
    ("cache_heads", "base + cache->B * keys, c->HS", "base + keys, c->HS", "values of one sequence over keys of the next"),
    ("cache_heads", "cache->layers + l * cache->layer_size", "cache->layers", "layers share a cache"),
    ("cache_heads", "latent ? 0 : capacity * k}", "latent ? 0 : k}", "heads overlap"),
    ("cache_heads", "(latent ? 1 : c->NKV)", "1", "values over all keys but the first head's"),
    ("cache_heads", ".k_sequence = keys", ".k_sequence = 0", "all sequences read the first one's keys"),
    ("cache_heads", "m->w[l][KVB_W]", "m->w[0][KVB_W]", "first layer's weight decompresses"),
    ("attention_decode", "(long)g * rows * R", "0", "every head decompressed as the first"),
    ("attention_decode", "kv + a->nope * CHUNK", "kv", "keys taken for values"),
    ("attention_decode", "(long)omp_get_thread_num() * rows * CHUNK", "0", "threads decompress into the same place"),
    ("cache_append", "at = cache->used + t", "at = t", "every token in the first's place"),
    ("cache_append", "n = (long)b * T + t", "n = (long)b * T", "the prompt's first token again and again"),
    ("cache_append", "at, m->latent + n * R, R)", "at, acts->kv_a + n * (R + rope), R)", "latent mode: latent before its norm"),
    ("cache_append", "b * to.k_rope_sequence", "0", "rotary keys of all sequences in one place"),
    ("cache_append", "memcpy(row, m->latent + n * R", "memcpy(row, acts->kv_a + n * (R + rope)", "latent before its norm"),
    ("cache_append", "memcpy(row + R, element(from.k_rope, n, 0), rope", "memcpy(row + R, element(from.k_rope, n, 0), 0 * rope", "rotary key not kept"),
    ("cache_append", "((long)b * cache->capacity + at)", "((long)b * cache->used + at)", "sequences overlap"),
    ("decode_absorbed", "+ NOPE) * R;", ") * R;", "W_UK for W_UV"),
    ("decode_absorbed", "m->w[l][KVB_W] + (long)h * (NOPE + HS) * R", "m->w[l][KVB_W] + (long)h * NOPE * R", "W_UK's rows taken for adjacent"),
    ("decode_absorbed", "element(q, b, h) + NOPE, rope", "element(q, b, h), rope", "rotary queries from the head's start"),
    ("decode_absorbed", ".heads = NH,", ".heads = NH - 1,", "the last head is forgotten"),
    ("decode_absorbed", "transposed(w_uv, R), B, HS, R", "transposed(w_uv, R), 1, HS, R", "output of the first sequence only"),
    ("attention_block_forward", "rope_heads(m, &a, N, T, first, 1)", "rope_heads(m, &a, N, T, first, -1)", "turned the wrong way"),
    ("attention_block_forward", "rope_heads(m, &a, N, T, first, 1)", "rope_heads(m, &a, N, N, first, 1)", "positions run on into the next sequence"),
    ("attention_block_forward", "rope_heads(m, &a, N, T, first, 1)", "rope_heads(m, &a, N, T, 0, 1)", "every decoded token at position 0"),
    ("attention_block_forward", "attention_decode(m, &cached, out, B, first + 1)", "attention_decode(m, &cached, out, B, first)", "does not see its own token"),
    ("attention_block_forward", "first == 0 || mode == CACHE_FULL", "mode == CACHE_FULL", "a latent cache's prompt without keys and values"),
    ("attention_block_forward", "m->w[l][APROJ_B]", "NULL", "no bias"),
    ("attention_block_forward", "m->w[l][APROJ_W]", "m->w[0][APROJ_W]", "first layer's weight"),
    ("attention_block_backward", "sum += element", "sum = element", "rotary key's gradient from one head only"),
    ("attention_block_backward", "g < c->NKV", "g < 1", "rotary key's gradient from the first head only"),
    ("attention_block_backward", "rope_heads(m, &d, N, T, 0, -1)", "rope_heads(m, &d, N, T, 0, 1)", "turned on, not back"),
    ("attention_block_backward", "rope_heads(m, &d, N, T, 0, -1)", "rope_heads(m, &a, N, T, 0, -1)", "turns q and k, not their gradients"),
    ("attention_block_backward", "rope_heads(m, &d, N, T, 0, -1);", "", "gradients not turned back"),
    ("attention_block_backward", "m->g[l][APROJ_B]", "NULL", "bias has no gradient"),
    ("attention_block_backward", "d_proj, acts->att, N", "d_proj, m->d.att, N", "c_proj's gradient from the wrong input"),
    ("attention_block_backward", "(View){m->d_k_rope, c->NKV * rope, rope}", "(View){m->d_k_rope, c->NKV * rope, 0}", "heads overwrite each other"),

    # --- 7: the network
    ("embedding_forward", "first + n % T", "first + n", "positions run on into the next sequence"),
    ("embedding_forward", "first + n % T", "n % T", "every decoded token at position 0"),
    ("embedding_forward", "+ (wpe ?", "- (wpe ?", "sign of the positions"),
    ("embedding_forward", "dropout_scale(m, 0, n * C + i)", "dropout_scale(m, 0, n)", "whole tokens dropped"),
    ("embedding_forward", "m->dropping ? sum * dropout_scale(m, 0, n * C + i) : sum", "sum", "no dropout"),
    ("embedding_backward", "if (dwpe)", "if (0)", "positions have no gradient"),
    ("embedding_backward", "dwpe[(n % T) * C + i] +=", "dwpe[(n % T) * C + i] =", "positions: last sequence only"),
    ("embedding_backward", "dwte[(long)tokens[n] * C + i] +=", "dwte[(long)tokens[n] * C + i] =", "repeated tokens and the head overwritten"),
    ("embedding_backward", "min_int(C, i0 + OWN)", "min_int(C / OWN * OWN, i0 + OWN)", "last columns dropped"),
    ("embedding_backward", "(long)N * C, 0)", "(long)N * C, 1)", "another place's dropout"),
    ("block_forward", "residual_forward(m, y, acts->x_mid", "residual_forward(m, y, acts->x", "MLP's residual passes attention by"),
    ("block_forward", "m->norm, acts->x_mid, C, w[LN2_W]", "m->norm, acts->x, C, w[LN2_W]", "MLP reads the block's input"),
    ("block_forward", "w[LN1_W], w[LN1_B]", "w[LN2_W], w[LN2_B]", "the other norm's weights"),
    ("block_forward", "2 * l + 2)", "2 * l + 1)", "both branches drop the same numbers"),
    ("block_forward", "w[FC_B]", "NULL", "no bias"),
    ("block_forward", "w[LN2_B], N, C, LAYERNORM", "w[LN2_B], N, C, RMSNORM", "rmsnorm for layernorm"),
    ("block_backward", "norm_forward(m->norm, acts->x, C, w[LN1_W], w[LN1_B], N, C, LAYERNORM);", "", "norm not made again for attention"),
    ("block_backward", "norm_forward(m->norm, acts->x_mid, C, w[LN2_W], w[LN2_B], N, C, LAYERNORM);", "", "norm not made again for the MLP"),
    ("block_backward", "2 * l + 1)", "2 * l + 2)", "another place's dropout"),
    ("block_backward", "gelu_backward(m->d.fc, acts->fc, (long)N * 4 * C)", "gelu_backward(m->d.fc, acts->fc, (long)N * C)", "a quarter of GELU"),
    ("block_backward", "m->d.x, g[LN2_W], g[LN2_B]", "m->d.x, g[LN2_W], NULL", "norm's bias has no gradient"),
    ("block_backward", "m->d_norm, acts->x_mid, C, w[LN2_W]", "m->d_norm, acts->x, C, w[LN2_W]", "norm's backward at the wrong place"),
    ("block_backward", "m->d.fc, w[FC_W], N, C, 4 * C, 0)", "m->d.fc, w[FC_W], N, C, 4 * C, 1)", "d_norm adds to what was there"),
    ("forward", "m->acts[l + 1].x", "acts->x", "layers do not keep their inputs"),
    ("forward", "training ? l : 0", "0", "all layers share one set of activations"),
    ("forward", "used += T", "used += 1", "a prompt counted as one token"),
    ("forward", "l < m->c.L;", "l < max_int(1, m->c.L - 1);", "the last layer is skipped"),
    ("forward", "training && m->dropout > 0", "m->dropout > 0", "dropout outside training"),
    ("forward", "training && m->dropout > 0", "0", "no dropout at all"),
    ("head_forward", "m->w[0][WTE], NULL", "m->w[0][WTE], m->w[0][LNF_W]", "a bias that is none"),
    ("head_loss", "r0 += m->head_rows", "r0 += N", "first slice of tokens only"),
    ("head_loss", "min_int(m->head_rows, N - r0)", "m->head_rows", "last, short slice taken for a whole one"),
    ("head_loss", "m->norm + (long)r0 * C", "m->norm", "every slice is the first"),
    ("head_loss", "targets[r0 + r]] -=", "targets[r]] -=", "targets of the first slice"),
    ("head_loss", "log(sum) + max - target", "log(sum) - target", "loss without the maximum"),
    ("head_loss", "z[targets[r0 + r]] -= (real)d_loss", "z[targets[r0 + r]] -= 1", "one-hot not scaled"),
    ("head_loss", "real scale = (real)d_loss / sum", "real scale = (real)d_loss", "probabilities not normalized"),
    ("head_loss", "m->d_norm + (long)r0 * C", "m->d_norm", "every slice's gradient to the first"),
    ("head_loss", "memset(m->d.x, 0, (size_t)N * C", "memset(m->d.x, 0, (size_t)N", "gradient adds to the step before"),
    ("head_loss", "linear_backward_weight(m, g[WTE], NULL, m->logits, x, rows, C, V);", "", "no gradient from the head to wte"),
    ("head_loss", "total += m->row_loss[r]", "total = m->row_loss[r]", "loss of the last token"),
    ("forward_backward", "share / (B * T)", "share / T", "sum over the batch for its mean"),
    ("forward_backward", "share / (B * T)", "1.0 / (B * T)", "share of the micro-batch ignored"),
    ("forward_backward", "head_loss(m, targets, B * T, ", "head_loss(m, targets, B * T / 2, ", "half of the batch ignored"),
    ("forward_backward", "l >= 0", "l > 0", "the first layer is not trained"),
    ("forward_backward", "embedding_backward(m, tokens, B * T, T)", "embedding_backward(m, tokens, (B - 1) * T, T)", "last sequence's embeddings not trained"),
    ("forward_loss", "head_loss(m, targets, B * T, 0)", "head_loss(m, targets, B * T, 1)", "leaves gradients behind"),

    # --- 8: optimizer
    ("gradient_norm", "p < PIECES; p++) total", "p < PIECES - 1; p++) total", "the last piece is dropped"),
    ("gradient_norm", "return sqrt(total)", "return total", "the square"),
    ("gradient_norm", "m->block * (p + 1) / PIECES", "m->block * (p + 1) / PIECES - 1", "a number in each piece is dropped"),
    ("clip_scale", "limit / norm : 1", "limit / norm : limit > 0 ? limit / norm : 1", "enlarges small gradients"),
    ("clip_scale", "limit > 0 && norm > limit", "norm > limit", "0 means zero"),
    ("clip_scale", "limit / norm", "limit / (norm * norm)", "by the square"),
    ("adamw_update", "pow(o->beta1, step)", "pow(o->beta1, step + 1)", "first correction a step late"),
    ("adamw_update", "pow(o->beta2, step)", "pow(o->beta2, step - 1 + (step == 1))", "second correction a step early"),
    ("adamw_update", "t->cols ? 1 - learning_rate", "1 ? 1 - learning_rate", "biases and norms decayed"),
    ("adamw_update", "1 - learning_rate * o->weight_decay", "1 - o->weight_decay", "decay not scaled by the learning rate"),
    ("adamw_update", "w[k] * keep", "w[k]", "no decay"),
    ("adamw_update", "(real)sqrt(av[k] * correct2) + eps", "(real)sqrt(av[k] * correct2 + eps)", "eps under the root"),
    ("adamw_update", "(real)sqrt(av[k] * correct2) + eps", "(real)sqrt(av[k]) * correct2 + eps", "correction outside the root"),
    ("adamw_update", "(real)sqrt(av[k] * correct2) + eps", "(real)sqrt(av[k] * correct2)", "no eps"),
    ("adamw_update", "one_b1 * g", "g", "momentum as in SGD"),
    ("adamw_update", "one_b2 * g * g", "one_b1 * g * g", "the other beta"),
    ("adamw_update", "dw[k] * scale", "dw[k]", "clipping not applied"),
    ("adamw_update", "dw[k] = 0", "dw[k] = g", "gradients not cleared"),
    ("learning_rate_at", "step < s->warmup", "step + 1 < s->warmup", "warm-up a step shorter"),
    ("learning_rate_at", "(step + 1) / (s->warmup + 1)", "step / s->warmup", "first step of size zero"),
    ("learning_rate_at", "(s->steps - s->warmup);", "s->steps;", "does not reach the floor"),
    ("learning_rate_at", "(s->peak - s->floor)", "s->peak", "ends above the floor"),
    ("learning_rate_at", "0.5 * (1 + cos", "(1 + cos", "twice the peak"),
    ("learning_rate_at", "s->kind == CONSTANT ||", "", "constant decays too"),

    # --- 9 to 12: encoding, batches, checkpoints, sampling, evaluation
    ("character_class", "c >= 128 ||", "", "bytes beyond ASCII are no letters"),
    ("first_piece", "end < n && end > 1 ? end - 1", "0 ? end - 1", "white space keeps all before a word"),
    ("first_piece", "text[0] == ' ' && n > 1", "0", "no word takes its space along"),
    ("first_piece", "length <= n &&", "length < n &&", "no ending at the end of the text"),
    ("tokenizer_index", "*place == -1 && n", "n", "of equal tokens the last counts"),
    ("tokenizer_index", "(i != t->eot || n == 1)", "1", "text becomes the end of text"),
    ("encode", "merged[i] < merged[best]", "merged[i] <= merged[best]", "of equal pairs the last merges first"),
    ("encode", "changed - 1)", "changed)", "the pair before a merge not looked up again"),
    ("encode", "i <= changed)", "i < changed)", "the pair after a merge not looked up again"),
    ("next_batch", "% (d->n - T)", "% (d->n - T - 1)", "random rows never reach the end"),
    ("next_batch", "random_bits(key, b)", "random_bits(key, 0)", "all rows of a batch the same"),
    ("next_batch", "STREAM_DATA, index)", "STREAM_DATA, 0)", "all random batches the same"),
    ("next_batch", "(long)b * T", "(long)b", "rows overlap"),
    ("next_batch", "((d->n - 1) / ((long)B * T))", "(d->n / ((long)B * T) + 1)", "reads past the end"),
    ("next_batch", "d->tokens[from + t + 1]", "d->tokens[from + t]", "targets not shifted"),
    ("checkpoint_save", "part_of(m, part)[t->offset + k + i]", "part_of(m, part)[t->offset + i]", "first 4096 numbers again and again"),
    ("checkpoint_save", "part_of(m, part)[", "part_of(m, 0)[", "parameters in place of the moments"),
    ("checkpoint_save", "part_prefix[part], t->name, t->rows", "part_prefix[part], t->name, t->cols", "shape"),
    ("checkpoint_save", "int parts = settings ? 3 : 1", "int parts = settings ? 2 : 1", "second moments not written"),
    ("part_of", "part == 1 ? m->adam_m : m->adam_v", "part == 2 ? m->adam_m : m->adam_v", "moments swapped in the file"),
    ("checkpoint_read", "x[i + j] = piece[j]", "x[j] = piece[j]", "every piece to the start"),
    ("checkpoint_read", "k->data_start + e->from", "e->from", "data taken from the header"),
    ("checkpoint_read_model", "moments ? 3 : 1", "1", "moments not read"),
    ("checkpoint_config", "= n;", "= key->names ? 0 : n;", "names not read"),
    ("train", "step * o->grad_accum + micro", "step", "one micro-batch again and again"),
    ("train", "step * o->grad_accum + micro", "(step - done) * o->grad_accum + micro", "a resumed run starts the data again"),
    ("train", "STREAM_DROPOUT, index", "STREAM_DROPOUT, micro", "the same numbers dropped in every step"),
    ("train", "B, T, 1.0 / o->grad_accum", "B, T, 1", "gradients summed over micro-batches"),
    ("train", "learning_rate_at(&schedule, step)", "learning_rate_at(&schedule, step + 1)", "schedule a step ahead"),
    ("train", "lr, step + 1, clip_scale", "lr, step + 1 - done, clip_scale", "a resumed run corrects its bias again"),
    ("train", "clip_scale(norm, o->grad_clip)", "1", "no clipping"),
    ("train", "long step = done", "long step = 0", "a resumed run starts again"),
    ("evaluate", "+ (tail > 0)", "", "the last, shorter window is dropped"),
    ("evaluate", "length = tail", "length = tail - 1", "the last token is dropped"),
    ("evaluate", "full - window < B ? full - window : B", "B", "a batch reaches past the full windows"),
    ("evaluate", "i * batches / taken * B", "i * B", "the first batches, not spread over the data"),
    ("evaluate", "sum / e.tokens", "sum / (d->n - 1)", "some batches averaged as all"),
    ("evaluate", "sum / log(2)", "sum", "nats for bits"),
    ("evaluate", "token_length(tokenizer, y[k])", "1", "bytes per token"),
    ("kth_largest", "k <= j", "k < j", "stops short"),
    ("kth_largest", "x[j] < pivot", "x[j] <= pivot", "runs past its bounds"),
    ("decode", "m->x_final + (long)(T - 1) * C", "m->x_final", "logits after the prompt's first token"),
    ("decode", "(long)T * C, m->w", "C, m->w", "rows of one sequence for several"),
    ("generate", "logits + (long)b * V", "logits", "every sequence from the first's logits"),
    ("generate", "STREAM_SAMPLE, b), i)", "STREAM_SAMPLE, 0), i)", "every sequence draws the same"),
    ("generate", "STREAM_SAMPLE, b), i)", "STREAM_SAMPLE, b), 0)", "every token draws the same"),
    ("generate", "cache->used = 0", "cache->used += 0", "cache of the text before"),
    ("sample_token", "(logits[v] - max) / how->temperature", "(logits[v] - max) * how->temperature", "temperature upside down"),
    ("sample_token", "how->top_k - 1)", "how->top_k)", "one more than top_k"),
    ("sample_token", "logits[v] < least ? 0", "logits[v] <= least ? 0", "one less than top_k"),
    ("sample_token", "u * sum", "u", "probabilities not normalized"),
    ("sample_token", "logits[v] > logits[best]", "logits[v] < logits[best]", "the least likely"),
    ("sample_token", "running += logits[v]", "running = logits[v]", "not cumulative"),
    # --- What a person can do wrong
    ("check_replaceable", "!S_ISREG(st.st_mode)", "0", "replaces a device or a folder"),
    ("check_replaceable", "memcmp(found, like, n)", "0", "replaces a file of another kind"),
    ("check_replaceable", "partial ? 1", "partial ? 0", "replaces a file too short to tell"),
    ("log_open", "atol(row) <= done", "1", "rows of steps that are not done stay"),
    ("log_open", "kept = ftell(f)", "ftell(f)", "a resumed run's log starts anew"),
    ("train", "!isfinite(loss) || !isfinite(norm)", "0", "a loss that is NaN goes unnoticed"),
    ("train", "step < o->steps && !stop_signal", "step < o->steps", "signals do not stop the run"),
    ("train", "exit(128 + stop_signal)", "exit(0)", "stopped, yet a success"),
    ("on_signal", "if (stop_signal) _exit(128 + number);", "", "a second signal waits like the first"),
    ("checkpoint_read", "!isfinite(piece[j])", "0", "NaN in weights"),
    ("checkpoint_open", "k.entries[i].from != at", "0", "tensors that overlap"),
    ("checkpoint_open", "at != k.data_size", "0", "data after the last tensor"),
    ("data_load", "(size - HEADER) != 2", "(size - HEADER) < 2", "tokens after the last one"),
    ("tokenizer_load", "if (at != size)", "if (0)", "bytes after the last token"),
    ("parse_options", "if (o->given++)", "if (o->given++ < 0)", "an option given twice"),
]

# Changes that change no result, to show that the tests do not just always fail; `what` is why.
HARMLESS = [
    ("largest", "i + 16 <= n", "i + 16 < n", "the last loop takes what the first leaves"),
    ("learning_rate_at", "step < s->warmup", "step <= s->warmup", "where the warm-up ends both rules give the peak"),
    ("model_create", "double angle = t *", "double angle = (t + 1) *", "turned queries meet turned keys: only differences count"),
    ("exp_row", "real sum = 0;", "real sum = -0.0;", "-0 + x is x"),
]


def mutant(source, name, old, new):
    """The source with `old` replaced in function (or macro) `name`."""
    found = re.search(rf"^(?:static .*\b{name}\(.*[^;]|#define {name}\(.*)$", source, re.M)
    if not found:
        raise LookupError(f"{name}: not defined")
    start, end = found.span()
    if found[0].startswith("static") and not found[0].endswith("}"):
        end = source.index("\n}", end)
    count = source.count(old, start, end)
    if count != 1:
        raise LookupError(f"{name}: {old!r} occurs {count} times, expected once")
    return source[:start] + source[start:end].replace(old, new) + source[end:]


def make(folder, *targets):
    return subprocess.Popen(["make", *targets, CFLAGS], cwd=folder, env=ENVIRONMENT, text=True, errors="replace",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def verdict(tree, source):
    """The first check that fails on `source` in a copy of `tree`, "" if all pass; and the seconds that took."""
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        copy = shutil.copytree(tree, Path(folder) / "copy")
        (copy / SOURCE).write_text(source)
        build = make(copy, "-j2", "test_mla", "test_mla_double")
        output = build.communicate()[0]
        if build.returncode:
            raise RuntimeError("does not compile:\n" + output)
        test = make(copy, "test")
        stop = lambda: os.killpg(test.pid, signal.SIGKILL)  # make, and the tests that it runs
        timer = threading.Timer(TIMEOUT, stop)
        timer.start()
        failure = ""
        for line in test.stdout:
            if line.startswith("FAILED"):
                failure = line.split(maxsplit=1)[1].strip()
                stop()
                break
        if test.wait() and not failure:
            failure = "stops early" if timer.is_alive() else f"takes over {TIMEOUT} s"
        timer.cancel()
        test.stdout.close()
    return failure, time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", help="only mistakes in these functions")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    parser.add_argument("--check", action="store_true", help="only see whether the table fits the source")
    options = parser.parse_args()

    source = (ROOT / SOURCE).read_text()
    table = [(*entry, False) for entry in MUTATIONS] + [(*entry, True) for entry in HARMLESS]
    errors = [f"{name}: no such function in the table" for name in set(options.functions) - {entry[0] for entry in table}]
    mutants = []
    for name, old, new, what, harmless in table:
        try:
            mutants.append((name, what, harmless, mutant(source, name, old, new)))
        except LookupError as error:
            errors.append(str(error))
    if errors:
        print(f"dev/test/mutate.py: the table does not fit {SOURCE}; bring it up to date:", *errors, sep="\n  ", file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(MUTATIONS)} mistakes and {len(HARMLESS)} harmless changes fit {SOURCE}")
        return 0
    if options.functions:
        mutants = [entry for entry in mutants if entry[0] in options.functions]

    caught = missed = wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        tree = Path(folder) / "tree"  # as it is now, whatever is edited meanwhile
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "data", "doc", "train_gpt2_mla", "test_mla", "test_mla_double"))
        failure, took = verdict(tree, source)
        if failure:
            print(f"dev/test/mutate.py: the tests do not pass on {SOURCE} as it is: {failure}", file=sys.stderr)
            return 2
        print(f"{'':9} passes {took:5.1f} s  {SOURCE} as it is", flush=True)
        pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
        try:
            running = {pool.submit(verdict, tree, text): (name, what, harmless) for name, what, harmless, text in mutants}
            for done, future in enumerate(concurrent.futures.as_completed(running), 1):
                name, what, harmless = running[future]
                try:
                    failure, took = future.result()
                except RuntimeError as error:
                    wrong += 1
                    print(f"{done:4}/{len(mutants):<4} ERROR   {name}: {what}: {error}", flush=True)
                    continue
                if harmless:
                    wrong += failure != ""
                    result, what = "CAUGHT" if failure else "passes", "harmless: " + what
                else:
                    caught, missed = caught + (failure != ""), missed + (failure == "")
                    result = "caught" if failure else "MISSED"
                print(f"{done:4}/{len(mutants):<4} {result} {took:5.1f} s  {name}: {what}{failure and ' | ' + failure}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if wrong:
        print(f"{wrong} errors of the table: changes that do not compile, or harmless ones that are caught")
    print(f"{caught} caught, {missed} missed")
    return 2 if wrong else 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

/*
The plain twin: one layer of multi-head latent attention (MLA), its backward and its decoder, in
plain loops over whole arrays. Chapters 4, 5 and 10 of train_gpt2_mla.c do the same, but fast.

    cc doc/mla.c -lm && ./a.out      checks the decoder, and the backward by finite differences

The forward has twelve numbered steps: read their comments first, then their code. The backward
has the same twelve, last first: each says what its step was, and so what the gradients are now.
The decoder caches latents, not keys. Numbers such as (20) are equations of doc/writeup.md.

    T   tokens; i numbers queries, j keys    R    width of the latent, source of keys and values
    C   channels = NH * HS                   RQ   width of the query latent
    NH  heads; h numbers them                NOPE width of a query's or key's part without position
    HS  width of a head's value              RD   width of its rotary part; QK = NOPE + RD
Weights are (out, in). W' is W transposed. dx is the gradient of the loss with respect to x.
*/
#include <math.h>
#include <stdio.h>
#include <string.h>

// No two widths are equal but C and NH*HS, so that one in another's place shows.
enum { T = 11, NH = 3, HS = 8, C = NH * HS, NOPE = 5, RD = 4, QK = NOPE + RD, R = 12, RQ = 7 };

typedef struct {                            // in the order and layout of checkpoints:
    double w_dq[RQ][C];                     // (RQ, C) q_a_proj
    double q_ln_w[RQ], q_ln_b[RQ];          // (RQ), (RQ) q_a_layernorm
    double w_uq[NH][QK][RQ];                // (NH*QK, RQ) q_b_proj: per head NOPE rows, RD rows
    double w_dkv_kr[R + RD][C];             // (R+RD, C) kv_a_proj_with_mqa: W_DKV, then W_KR
    double c_ln_w[R], c_ln_b[R];            // (R), (R) kv_a_layernorm
    double w_ukv[NH][NOPE + HS][R];         // (NH*(NOPE+HS), R) kv_b_proj: per head W_UK, W_UV
    double w_o[C][NH * HS], b_o[C];         // (C, NH*HS), (C) c_proj
} Parameters;

typedef struct {                            // what the forward makes:
    double q_raw[T][RQ], q_latent[T][RQ];   // (T, RQ) the query latent before and after its norm
    double q[T][NH][QK];                    // (T, NH, QK) queries, [q_nope; q_rope]
    double c_raw[T][R], c[T][R];            // (T, R) the latent before and after its norm
    double k_rope[T][RD];                   // (T, RD) the rotary key, one for all heads
    double kv[T][NH][NOPE + HS];            // (T, NH, NOPE+HS) each head's [k_nope; v]
    double p[T][NH][T];                     // (T, NH, T) by query, head, key: weights; 0 if j > i
    double heads[T][NH * HS], out[T][C];    // (T, NH*HS) each head's mean of values; (T, C)
} Activations;

// ---- Layers, for one token. They add to their last arguments, normalize sets its own; turn and
// softmax work in place.
static double dot(int n, const double *x, const double *y) {    // x . y: both (n)
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}
static void add(int n, double s, const double *x, double *y) {  // y += s x: both (n)
    for (int i = 0; i < n; i++) y[i] += s * x[i];
}

// y += W x (8): W (O, I), x (I), y (O)
static void linear(int O, int I, const double W[O][I], const double *x, double *y) {
    for (int o = 0; o < O; o++) y[o] += dot(I, W[o], x);
}
// y was W x, so dW += dy x', dx += W' dy (8)
static void linear_back(int O, int I, const double W[O][I], const double *x, const double *dy,
                        double dW[O][I], double *dx) {
    for (int o = 0; o < O; o++) add(I, dy[o], x, dW[o]), add(I, dy[o], W[o], dx);
}

static double normalize(int n, const double *x, double *xhat) {  // x^ of (2); returns rstd
    double mean = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) xhat[i] = x[i] - mean;
    double rstd = 1 / sqrt(dot(n, xhat, xhat) / n + 1e-5);
    for (int i = 0; i < n; i++) xhat[i] *= rstd;
    return rstd;
}
// y += w x^ + b, x^ = (x - mean) rstd (2): all (n)
static void norm(int n, const double *w, const double *b, const double *x, double *y) {
    double xhat[n];
    normalize(n, x, xhat);
    for (int i = 0; i < n; i++) y[i] += w[i] * xhat[i] + b[i];
}
// y was w x^ + b, so dw += dy x^, db += dy; g = w dy, dx += rstd (g - mean(g) - x^ mean(g x^)) (3)
static void norm_back(int n, const double *w, const double *x, const double *dy, double *dw,
                      double *db, double *dx) {
    double xhat[n], g[n], rstd = normalize(n, x, xhat);
    for (int i = 0; i < n; i++) g[i] = w[i] * dy[i], dw[i] += dy[i] * xhat[i], db[i] += dy[i];
    double mean_g = dot(n, w, dy) / n, mean_gx = dot(n, g, xhat) / n;
    for (int i = 0; i < n; i++) dx[i] += rstd * (g[i] - mean_g - xhat[i] * mean_gx);
}

// Turns each pair (i, i + RD/2) of x (RD) by t 10000^(-2i/RD) (17). The backward turns by -t (18).
static void turn(double *x, int t) {
    for (int i = 0; i < RD / 2; i++) {
        double angle = t * pow(10000, -2.0 * i / RD), lo = x[i], hi = x[i + RD / 2];
        x[i] = lo * cos(angle) - hi * sin(angle);
        x[i + RD / 2] = hi * cos(angle) + lo * sin(angle);
    }
}

static void softmax(int n, double *p) {  // p (n): scores become e^score / (sum of e^score) (12)
    double max = p[0], sum = 0;
    for (int j = 1; j < n; j++) max = fmax(max, p[j]);
    for (int j = 0; j < n; j++) sum += p[j] = exp(p[j] - max);
    for (int j = 0; j < n; j++) p[j] /= sum;
}

// ---- Forward, from x (T, C) to a->out. Steps 1 to 7 know nothing of other tokens.
static void token_forward(const Parameters *w, const double *x, int t, Activations *a) {
    linear(RQ, C, w->w_dq, x, a->q_raw[t]);                           // 1 q_raw = W_DQ x (22)
    norm(RQ, w->q_ln_w, w->q_ln_b, a->q_raw[t], a->q_latent[t]);      // 2 q_latent = norm(q_raw)
    for (int h = 0; h < NH; h++) {
        linear(QK, RQ, w->w_uq[h], a->q_latent[t], a->q[t][h]);       // 3 q = W_UQ q_latent (22)
        turn(a->q[t][h] + NOPE, t);                                   // 4 q_rope turned to t (19)
    }
    linear(R, C, w->w_dkv_kr, x, a->c_raw[t]);                        // 5 c_raw = W_DKV x (20)
    norm(R, w->c_ln_w, w->c_ln_b, a->c_raw[t], a->c[t]);              // 6 c = norm(c_raw) (20)
    linear(RD, C, w->w_dkv_kr + R, x, a->k_rope[t]);                  // 7 k_rope = W_KR x,
    turn(a->k_rope[t], t);                                            //   turned to t (23)
}

static void layer_forward(const Parameters *w, double x[T][C], Activations *a) {
    memset(a, 0, sizeof *a);
    for (int i = 0; i < T; i++) {  // a token sees no later one, so each meets all its keys
        token_forward(w, x[i], i, a);
        for (int h = 0; h < NH; h++) {
            double *q = a->q[i][h], *p = a->p[i][h], *head = a->heads[i] + h * HS;
            // 8 [k_nope; v] = W_UKV c (21)
            linear(NOPE + HS, R, w->w_ukv[h], a->c[i], a->kv[i][h]);
            // 9 score_j = (q_nope . k_nope_j + q_rope . k_rope_j) / sqrt(QK), j <= i (11)
            for (int j = 0; j <= i; j++)
                p[j] = (dot(NOPE, q, a->kv[j][h]) + dot(RD, q + NOPE, a->k_rope[j])) / sqrt(QK);
            // 10 p = softmax(score) (12)
            softmax(i + 1, p);
            // 11 head = sum of p_j v_j (13)
            for (int j = 0; j <= i; j++) add(HS, p[j], a->kv[j][h] + NOPE, head);
        }
        // 12 out = W_O heads + b_O (8)
        linear(C, NH * HS, w->w_o, a->heads[i], a->out[i]);
        add(C, 1, w->b_o, a->out[i]);
    }
}

// ---- Backward, from d_out (T, C). Adds to dx (T, C) and to the parameters' gradients, g.
static void layer_backward(const Parameters *w, double x[T][C], const Activations *a,
                           double d_out[T][C], Parameters *g, double dx[T][C]) {
    Activations d = {0};  // d.q is the gradient of a->q, and so on
    for (int i = T - 1; i >= 0; i--) {  // last first: later queries add to its keys' gradients
        // 12 out was W_O heads + b_O, so dW_O = d_out heads', dheads = W_O' d_out, db_O = d_out (8)
        linear_back(C, NH * HS, w->w_o, a->heads[i], d_out[i], g->w_o, d.heads[i]);
        add(C, 1, d_out[i], g->b_o);
        for (int h = 0; h < NH; h++) {
            const double *q = a->q[i][h], *p = a->p[i][h], *d_head = d.heads[i] + h * HS;
            double *dq = d.q[i][h], D = dot(HS, d_head, a->heads[i] + h * HS);
            for (int j = 0; j <= i; j++) {
                const double *k = a->kv[j][h], *v = k + NOPE;
                double *dk = d.kv[j][h], *dv = dk + NOPE;
                // 11 head was sum of p_j v_j, so dv_j = p_j d_head, dp_j = d_head . v_j (14)
                add(HS, p[j], d_head, dv);
                double dp = dot(HS, d_head, v);
                // 10 p was softmax(score), so dscore_j = p_j (dp_j - D), D = d_head . head (14)
                double dscore = p[j] * (dp - D);
                // 9 score was q . k / sqrt(QK), so ds = dscore / sqrt(QK), dq = sum of ds_j k_j,
                //   dk_j = ds_j q (14); the rotary key's gradient is the sum over heads (23d)
                double ds = dscore / sqrt(QK);
                add(NOPE, ds, k, dq), add(RD, ds, a->k_rope[j], dq + NOPE);
                add(NOPE, ds, q, dk), add(RD, ds, q + NOPE, d.k_rope[j]);
            }
            // 8 [k; v] was W_UKV c, so dW_UKV = [dk; dv] c' (23a), dc = sum_h W_UKV' [dk; dv] (23b)
            linear_back(NOPE + HS, R, w->w_ukv[h], a->c[i], d.kv[i][h], g->w_ukv[h], d.c[i]);
        }
        // 7 k_rope was W_KR x, turned; so dk_rope is turned back (23d), then dW_KR (23e), dx (23f)
        turn(d.k_rope[i], -i);
        linear_back(RD, C, w->w_dkv_kr + R, x[i], d.k_rope[i], g->w_dkv_kr + R, dx[i]);
        // 6 c was norm(c_raw), so dc_raw is made of dc as in (3) (23c)
        norm_back(R, w->c_ln_w, a->c_raw[i], d.c[i], g->c_ln_w, g->c_ln_b, d.c_raw[i]);
        // 5 c_raw was W_DKV x, so dW_DKV = dc_raw x' (23e), dx += W_DKV' dc_raw (23f)
        linear_back(R, C, w->w_dkv_kr, x[i], d.c_raw[i], g->w_dkv_kr, dx[i]);
        for (int h = 0; h < NH; h++) {
            // 4 q_rope was turned to i, so dq_rope is turned back (18)
            turn(d.q[i][h] + NOPE, -i);
            // 3 q was W_UQ q_latent, so dW_UQ = dq q_latent', dq_latent = sum_h W_UQ' dq (8)
            linear_back(QK, RQ, w->w_uq[h], a->q_latent[i], d.q[i][h], g->w_uq[h], d.q_latent[i]);
        }
        // 2 q_latent was norm(q_raw), so dq_raw is made of dq_latent as in (3)
        norm_back(RQ, w->q_ln_w, a->q_raw[i], d.q_latent[i], g->q_ln_w, g->q_ln_b, d.q_raw[i]);
        // 1 q_raw was W_DQ x, so dW_DQ = dq_raw x' (8), dx += W_DQ' dq_raw (23f)
        linear_back(RQ, C, w->w_dq, x[i], d.q_raw[i], g->w_dq, dx[i]);
    }
}

// ---- Decoding, to out (T, C), from latents and rotary keys. No k_nope, no v is ever made.
static void layer_decode(const Parameters *w, double x[T][C], double out[T][C]) {
    double c[T][R], k_rope[T][RD];  // (T, R), (T, RD) the cache
    for (int i = 0; i < T; i++) {
        Activations a = {0};  // the new token's, forgotten after it
        token_forward(w, x[i], i, &a);
        memcpy(c[i], a.c[i], sizeof c[i]), memcpy(k_rope[i], a.k_rope[i], sizeof k_rope[i]);
        for (int h = 0; h < NH; h++) {
            double *q = a.q[i][h], p[T], q_c[R] = {0}, mean_c[R] = {0};
            // q_nope . (W_UK c_j) = (W_UK' q_nope) . c_j = q_c . c_j: latents serve as keys (25)
            for (int e = 0; e < NOPE; e++) add(R, q[e], w->w_ukv[h][e], q_c);
            for (int j = 0; j <= i; j++)
                p[j] = (dot(R, q_c, c[j]) + dot(RD, q + NOPE, k_rope[j])) / sqrt(QK);
            softmax(i + 1, p);
            // sum of p_j (W_UV c_j) = W_UV (sum of p_j c_j): latents serve as values (26)
            for (int j = 0; j <= i; j++) add(R, p[j], c[j], mean_c);
            linear(HS, R, w->w_ukv[h] + NOPE, mean_c, a.heads[i] + h * HS);  // W_UV mean_c
        }
        memcpy(out[i], w->b_o, sizeof out[i]);
        linear(C, NH * HS, w->w_o, a.heads[i], out[i]);
    }
}

// ---- The check. The loss is the sum of out * d_out; its slopes are fourth-order differences.
// Rounding moves the loss by some 1e-14, a slope by 1e-14 / h = 1e-10; a mistake by far more.
#ifndef TESTING
int main(void) {
    static const struct { const char *name; int size; } tensors[] = {
        {"w_dq", RQ * C}, {"q_ln_w", RQ}, {"q_ln_b", RQ}, {"w_uq", NH * QK * RQ},
        {"w_dkv_kr", (R + RD) * C}, {"c_ln_w", R}, {"c_ln_b", R}, {"w_ukv", NH * (NOPE + HS) * R},
        {"w_o", C * NH * HS}, {"b_o", C}, {"x", T * C}};
    static struct { Parameters w; double x[T][C], d_out[T][C]; } in, d;  // d is the gradient of in
    static double decoded[T][C];
    static Activations a;
    const double h = 1e-4, step[4] = {1, -1, 2, -2}, factor[4] = {8, -8, -1, 1};
    double *p = (double *)&in, *dp = (double *)&d;
    for (unsigned k = 0, random = 1; k < sizeof in / sizeof *p; k++)  // from -1 to 1
        p[k] = (random = 1664525 * random + 1013904223) / 2147483648.0 - 1;
    layer_forward(&in.w, in.x, &a);
    layer_backward(&in.w, in.x, &a, in.d_out, &d.w, d.x);
    layer_decode(&in.w, in.x, decoded);
    add(T * C, -1, a.out[0], decoded[0]);  // now the difference of both
    double error = sqrt(dot(T * C, decoded[0], decoded[0]) / dot(T * C, a.out[0], a.out[0]));
    int failed = !(error <= 1e-12);
    printf("relative errors\n%-10s %.1e, at most 1e-12\n", "decoding", error);
    for (int k = 0; k < 11; k++) {
        double squares = error = 0;
        for (int n = 0; n < tensors[k].size; n++, p++, dp++) {
            double at = *p, slope = 0;
            for (int s = 0; s < 4; s++) {
                *p = at + step[s] * h;
                layer_forward(&in.w, in.x, &a);
                slope += factor[s] / (12 * h) * dot(T * C, a.out[0], in.d_out[0]);
            }
            *p = at;
            error += (slope - *dp) * (slope - *dp), squares += *dp * *dp;
        }
        error = sqrt(error / squares);
        failed |= !(error <= 1e-8);
        printf("%-10s %.1e, at most 1e-8\n", tensors[k].name, error);
    }
    return failed;
}
#endif

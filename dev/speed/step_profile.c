/*
Where the time of a training step goes: every operation by itself, at the shapes of a model, against
what its arithmetic should cost; and their sum against a whole step.

    make profile                                     the default model
    ./step_profile --attention mha --layers 6 --heads 6 --channels 384 --seq-len 256 --batch-size 16

Takes the trainer's options. An operation's time is the median of several runs, times the number of
times that a step does it. Its limit is the longer of two: its multiply-adds at the peak of the
processor, and the bytes that it must read and write at the bandwidth of memory, both measured here.
What is small stays in the caches, and may well be faster than memory.
*/
#define TESTING
#include "../../train_gpt2_mla.c"
#include "machine_limits.h"

// An operation is a function of a model, its batch, and a tensor if it is a linear layer's.
typedef struct {
    Model *m;
    int *x, *y, B, T;
    const Tensor *tensor;
    real *in, *out;  // (N, widest) each
} Work;

static void linear_f(Work *w) {
    const Tensor *t = w->tensor;
    linear_forward(w->out, w->in, w->m->params + t->offset, NULL, w->B * w->T, t->cols, t->rows);
}

static void linear_bi(Work *w) {
    const Tensor *t = w->tensor;
    linear_backward_input(w->in, w->out, w->m->params + t->offset, w->B * w->T, t->cols, t->rows,
                          0);
}

static void linear_bw(Work *w) {
    const Tensor *t = w->tensor;
    linear_backward_weight(w->m, w->m->grads + t->offset, NULL, w->out, w->in, w->B * w->T,
                           t->cols, t->rows);
}

static void attention_f(Work *w) {
    Model *m = w->m;
    Acts *acts = &m->acts[0];
    Heads a = heads_of(m, acts);
    attention_forward(m, &a, (View){acts->att, m->c.att_row, m->c.HS}, acts->lse, w->B, w->T);
}

static void attention_b(Work *w) {
    Model *m = w->m;
    Acts *acts = &m->acts[0];
    Heads a = heads_of(m, acts), d = heads_of(m, &m->d);
    View out = {acts->att, m->c.att_row, m->c.HS}, d_out = {m->d.att, m->c.att_row, m->c.HS};
    d.k_rope = (View){m->d_k_rope, m->c.NKV * d.rope, d.rope};
    attention_backward(m, &a, &d, out, d_out, acts->lse, w->B, w->T);
}

static void rope_f(Work *w) {
    Heads a = heads_of(w->m, &w->m->acts[0]);
    rope_heads(w->m, &a, w->B * w->T, w->T, 1);
}

static void latents(Work *w) { mla_latents(w->m, 0, &w->m->acts[0], w->B * w->T); }

static void norm_f(Work *w) {
    Model *m = w->m;
    int C = m->c.C;
    norm_forward(m->norm, m->acts[0].x, C, m->w[0][LN1_W], m->w[0][LN1_B], w->B * w->T, C,
                 LAYERNORM);
}

static void norm_b(Work *w) {
    Model *m = w->m;
    int C = m->c.C;
    norm_backward(m, m->d.x, m->g[0][LN1_W], m->g[0][LN1_B], m->d_norm, m->acts[0].x, C,
                  m->w[0][LN1_W], w->B * w->T, C, LAYERNORM);
}

static void gelu_f(Work *w) {
    gelu_forward(w->m->gelu, w->m->acts[0].fc, (long)w->B * w->T * 4 * w->m->c.C);
}

static void gelu_b(Work *w) {
    gelu_backward(w->m->d.fc, w->m->acts[0].fc, (long)w->B * w->T * 4 * w->m->c.C);
}

static void residual_f(Work *w) {
    Model *m = w->m;
    residual_forward(m, m->acts[0].x_mid, m->acts[0].x, m->proj, (long)w->B * w->T * m->c.C, 1);
}

static void head(Work *w) { head_loss(w->m, w->y, w->B * w->T, 1e-3); }

static void embedding(Work *w) {
    embedding_forward(w->m, w->m->acts[0].x, w->x, w->B * w->T, w->T);
    embedding_backward(w->m, w->x, w->B * w->T, w->T);
}

static void optimizer(Work *w) {
    AdamW adam = {0.9, 0.99, 1e-8, 0.1};
    adamw_update(w->m, &adam, 1e-9, 1, clip_scale(gradient_norm(w->m), 1));
}

static void step(Work *w) {
    forward_backward(w->m, w->x, w->y, w->B, w->T, 1);
    optimizer(w);
}

static double peak, bandwidth, total;

static double time_of(void (*operation)(Work *), Work *w) {
    double times[15], start = seconds();
    int n = 0;
    operation(w);  // warm up
    do {
        double t = seconds();
        operation(w);
        times[n++] = seconds() - t;
    } while (n < 15 && (n < 3 || seconds() - start < 1));
    return median(times, n);
}

// One row of the table; flops and reals that must move are those of one time.
static void report(const char *what, double times, double once, double flops, double reals) {
    double by_arithmetic = flops / peak / 1e9, by_memory = reals * sizeof(real) / bandwidth / 1e9;
    double limit = fmax(by_arithmetic, by_memory);
    printf("| %-40s | %3.0f | %8.2f | %8.2f | %8.2f | %3.0f%% of %s |\n", what, times,
           1000 * times * once, times * flops / 1e9, 1000 * times * limit, 100 * limit / once,
           by_arithmetic > by_memory ? "arithmetic" : "memory");
    fflush(stdout);
    total += times * once;
}

// Every linear layer of a block by itself. Returns the arithmetic of all linear layers of a step.
static double report_linear(Work *w) {
    static const struct { const char *what; void (*operation)(Work *); } ways[] = {
        {"forward", linear_f}, {"d input", linear_bi}, {"d weight", linear_bw}};
    const Model *m = w->m;
    double N = (double)w->B * w->T, flops = 0;
    for (w->tensor = m->tensors; w->tensor < m->tensors + m->n_tensors; w->tensor++) {
        const Tensor *t = w->tensor;
        double reals = N * (t->rows + t->cols) + t->size;
        char what[80];
        if (!t->cols) continue;
        if (t->id != WPE) flops += 6 * N * t->size;
        for (int i = 0; t->layer == 0 && i < 3; i++) {
            snprintf(what, sizeof what, "%s, %s", t->name + 4, ways[i].what);
            report(what, m->c.L, time_of(ways[i].operation, w), 2 * N * t->size,
                   reals + (i == 2) * t->size);
        }
    }
    return flops;
}

// Causal attention: a query meets half of the keys, in products as wide as a query (s; dq, dk) or
// as a value (out; dp, dv). The backward makes s again. Returns the arithmetic of a step, which
// does not count that.
static double report_attention(Work *w) {
    const Config *c = &w->m->c;
    double N = (double)w->B * w->T, pairs = N * w->T * c->NH;
    double kv = c->kv_row + c->rope, turned = c->position == ROPE ? c->NKV : 1;
    report("attention, forward", c->L, time_of(attention_f, w), pairs * (c->QK + c->HS),
           N * (c->q_row + kv + c->att_row));
    report("attention, backward", c->L, time_of(attention_b, w), pairs * (3 * c->QK + 2 * c->HS),
           N * 2 * (c->q_row + kv + c->att_row));
    if (c->RD)
        report("rope, both ways", 2 * c->L, time_of(rope_f, w), 0,
               2 * N * c->RD * (c->NH + turned));
    return c->L * 3 * pairs * (c->QK + c->HS);
}

int main(int argc, char **argv) {
    parse_options(argc, argv);
    if (precision == BF16) find_matrix_unit();
    Config *c = &opt.config;
    if (c->V == -1) c->V = 256;
    if (opt.batch_size == -1) opt.batch_size = 8;
    model_defaults(&(Inputs){.named = 0});
    config_complete(c, 2, "options");
    int B = opt.batch_size, T = opt.seq_len, C = c->C;
    double N = (double)B * T, widest = 4 * C;
    Model *m = model_create(c, 1);
    model_init(m, 1);
    model_reserve(m, B, T, 1);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        if (t->layer >= 0) widest = fmax(widest, max_int(t->rows, t->cols));
    Work w = {.m = m, .B = B, .T = T, .x = allocate(2 * sizeof(int) * N, "batch"),
              .in = allocate(N * widest * sizeof(real), "input"),
              .out = allocate(N * widest * sizeof(real), "output")};
    w.y = w.x + B * T;
    for (int i = 0; i < 2 * B * T; i++) w.x[i] = random_bits(1, i) % c->V;
    for (size_t i = 0; i < N * widest; i++)
        w.in[i] = w.out[i] = (real)(1e-3 * random_normal(2, i % 1000));
    double whole = time_of(step, &w);  // leaves true activations and gradients behind, too
    peak = multiply_add_peak(), bandwidth = read_bandwidth();
    print_model(stdout, m, cache_mode(&m->c));
    printf("%d x %d tokens, %d threads, multiply-add peak %.0f GFLOP/s, memory %.1f GB/s\n\n", B, T,
           omp_get_max_threads(), peak, bandwidth);
    printf("| %-40s |   x |       ms |    GFLOP | limit ms | reached |\n"
           "|---|--:|--:|--:|--:|---|\n", "operation");
    double flops = report_linear(&w);
    flops += report_attention(&w);
    if (has_latent(c))
        report("norms of latents, forward and again", 2 * c->L, time_of(latents, &w), 0,
               2 * N * (c->R + c->RQ));
    report("layer norm, forward and again", 4 * c->L, time_of(norm_f, &w), 0, 2 * N * C);
    report("layer norm, backward", 2 * c->L, time_of(norm_b, &w), 0, 4 * N * C);
    report("GELU, forward", c->L, time_of(gelu_f, &w), 0, 8 * N * C);
    report("GELU, backward", c->L, time_of(gelu_b, &w), 0, 16 * N * C);
    report("residual", 2 * c->L, time_of(residual_f, &w), 0, 3 * N * C);
    report("embedding, both ways", 1, time_of(embedding, &w), 0, 5 * N * C);
    report("final norm, head and loss, both ways", 1, time_of(head, &w), 6 * N * C * c->V,
           6 * N * C + 4.0 * C * c->V);
    report("gradient norm and AdamW", 1, time_of(optimizer, &w), 0, 9.0 * m->n_reals);
    printf("\nsum %.1f ms, a whole step %.1f ms: %.0f tokens/s, %.0f%% of the multiply-add peak "
           "(arithmetic of a step: %.2f GFLOP)\n", 1000 * total, 1000 * whole, N / whole,
           100 * flops / whole / peak / 1e9, flops / 1e9);
    return 0;
}

/*
Tests of train_gpt2_mla.c, which is included below: `make test`. They need a C compiler alone.

The same tests are built twice. test_mla computes in float, as training does; test_mla_double
(-DREAL_DOUBLE) in double, where rounding is out of the way: there finite differences check
every gradient, so that an attention of your own can be trusted without another framework.
test_mla runs test_mla_double, dev/test/bad_input.sh (bad input) and dev/test/runs.sh (signals,
files) too and adds up; its last line is `N passed, M failed`. `./test_mla decoding batches` runs
these groups alone.

    matrix product, exp       against plain loops and libm
    reference dumps           dev/test/reference/: logits, loss, gradients and 10 AdamW steps of
                              every kind of attention, computed in PyTorch by
                              dev/pytorch/make_reference.py
    finite differences        of the loss, along directions in every parameter tensor (double)
    gradient accumulation, threads, batches, evaluation, schedule, dropout, sampling, files
*/
#define TESTING
#include "train_gpt2_mla.c"
#include <dirent.h>
#include <fcntl.h>
#include <sys/wait.h>

#ifndef _OPENMP
static void omp_set_num_threads(int n) { (void)n; }
#endif

static int passed, failed;

// One check: a value that must not exceed its bound. NaN fails.
static void check_below(const char *what, const char *detail, double value, double bound) {
    if (value <= bound) { passed++; return; }
    failed++;
    printf("FAILED %s %s: %.3g, expected at most %.3g\n", what, detail, value, bound);
}

static void check(const char *what, const char *detail, int holds) {
    if (holds) { passed++; return; }
    failed++;
    printf("FAILED %s %s\n", what, detail);
}

// The larger of two errors; NaN, which fmax would pass over, is the largest.
static double worse(double a, double b) { return a >= b || isnan(a) ? a : b; }

// ||x - reference|| / ||reference||
static double relative_error(const real *x, const real *reference, size_t n) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)x[i] - reference[i]) * ((double)x[i] - reference[i]);
        norm += (double)reference[i] * reference[i];
    }
    return sqrt(error / norm);
}

// Bounds. Sums of the lengths here lose about sqrt(length) units in the last place; the dumps
// themselves are rounded to float, 6e-8.
#ifdef REAL_DOUBLE
static const double EPS = 2.3e-16, DUMP = 1e-6;
#else
static const double EPS = 1.2e-7, DUMP = 1e-4;
#endif

// --- Matrix product

// The ways in which products are made: 0, of floats; 1, of bfloat16 by vectors; 2, by a matrix
// unit, or by what stands in for one. Returns whether there is such a way here.
enum { WAYS = sizeof(real) == sizeof(float) ? 3 : 1 };
static const char *const way_names[] = {"fp32", "bf16 by vectors", "bf16 by tiles"};

static int use_way(int way) {
    precision = way ? BF16 : FP32;
    matrix_unit = way == 2 && NR == 32;
    if (matrix_unit) find_matrix_unit();
    return way < 2 || matrix_unit;
}

// Exact for every upper half of a float, with lower halves on both sides of, and at, the middle.
static void test_rounding(void) {
    static const uint32_t lower[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    int wrong = 0;
    for (uint32_t upper = 0; upper < 1 << 16; upper++)
        for (int i = 0; i < 6; i++) {
            union { uint32_t u; float f; } x = {upper << 16 | lower[i]}, down = {upper << 16};
            int exponent = upper >> 7 & 255;
            real found = from_bfloat16(to_bfloat16(x.f));
            if (isnan(x.f)) { wrong += !isnan(found); continue; }
            if (isinf(x.f)) { wrong += found != x.f; continue; }
            // away from zero: a unit in the last of 8 bits, beyond the largest number too
            double unit = ldexp(copysign(1, down.f), (exponent ? exponent : 1) - 127 - 7);
            double up = down.f + unit, below = fabs(x.f - down.f), above = fabs(up - x.f);
            double nearest = below < above || (below == above && !(upper & 1)) ? down.f : up;
            wrong += found != (float)nearest || !signbit(found) != !signbit(x.f);
        }
    check("bfloat16", "is the nearest, of two the even one", wrong == 0);
}

// c = start + a b by definition, and the sum of |terms| of each element, which bounds the error
static void matmul_plain(double *c, double *size, Mat a, Mat b, int M, int N, int K,
                         const real *start, long start_row) {
    #pragma omp parallel for
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            double sum = start ? start[i * start_row + j] : 0, terms = fabs(sum);
            for (int k = 0; k < K; k++) {
                double term = (double)a.p[i * a.row + k * a.col] * b.p[k * b.row + j * b.col];
                sum += term;
                terms += fabs(term);
            }
            c[i * N + j] = sum, size[i * N + j] = terms;
        }
}

static void test_matmul_way(int way) {
    static const int shapes[][3] = {
        {1, 1, 1}, {1, 7, 5}, {2, 3, 400}, {5, 33, 1}, {6, 16, 8}, {7, 17, 9}, {8, 32, 384},
        {13, 64, 385}, {63, 31, 100}, {64, 129, 70}, {65, 1, 65}, {97, 75, 33}, {3, 2050, 270},
        {66, 40, 800}, {9, 270, 30}, {130, 300, 9}, {3, 5, 40000}, {1, 9, 17000}, {530, 33, 260},
        {600, 70, 260}, {1291, 1300, 2}, {1030, 1040, 260}, {600, 1040, 530}};
    int threads = omp_get_max_threads();
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int M = shapes[s][0], N = shapes[s][1], K = shapes[s][2], pad = 3;
        long c_row = N + pad;  // rows of c lie apart: what is between them must stay
        real *a = allocate(M * K * sizeof(real), "a");
        real *b = allocate((K * N + NR) * sizeof(real), "b");
        real *c = allocate(M * c_row * sizeof(real), "c");
        real *once = allocate(M * c_row * sizeof(real), "c");
        real *bias = allocate(N * sizeof(real), "bias");
        double *expected = allocate(M * N * sizeof(double), "c");
        double *size = allocate(M * N * sizeof(double), "c");
        for (int i = 0; i < M * K; i++) a[i] = random_normal(1, i);
        for (int i = 0; i < K * N; i++) b[i] = random_normal(2, i);
        for (int i = 0; i < N; i++) bias[i] = random_normal(3, i);
        real *ra = allocate(M * K * sizeof(real), "a"), *rb = allocate(K * N * sizeof(real), "b");
        for (int i = 0; i < M * K; i++) ra[i] = way ? rounded(a[i]) : a[i];
        for (int i = 0; i < K * N; i++) rb[i] = way ? rounded(b[i]) : b[i];
        uint16_t *half = allocate(K * N * sizeof *half, "b");
        for (int i = 0; i < K * N; i++) half[i] = to_bfloat16(b[i]);
        // every pair of transposes; start from zero, from a bias, from c; then the one for few
        // rows, and that with b kept as bfloat16
        for (int variant = 0; variant < 4 * (way ? 9 : 6); variant++) {
            Mat A = variant & 1 ? transposed(a, M) : rows_of(a, K);
            Mat B = variant & 2 ? transposed(b, K) : rows_of(b, N);
            int kind = variant / 4;
            if (kind >= 3 && variant & 1) continue;
            // The largest shapes are slow, and meant for the products that share what is packed. Of
            // bfloat16 one is enough: variant 9 adds to c, in several blocks of k.
            if (M * N * K > 1 << (way ? 22 : 26) &&
                (way ? variant != 9 : kind >= 3 || variant % 4 != 1)) continue;
            for (int i = 0; i < M * c_row; i++) c[i] = once[i] = random_normal(4, i);
            const real *start = kind % 3 == 1 ? bias : kind % 3 == 2 ? c : NULL;
            long start_row = kind % 3 == 1 ? 0 : c_row;
            Mat RA = A, RB = B;
            RA.p = ra, RB.p = rb;
            if (kind >= 6) B.p = NULL, B.bf16 = half;
            matmul_plain(expected, size, RA, RB, M, N, K, start, start_row);
            if (kind < 3) {  // on 1 thread and on 5, which may be other ways through matmul
                omp_set_num_threads(1);
                matmul(once, c_row, A, B, M, N, K, start == c ? once : start, start_row);
                omp_set_num_threads(5);
                matmul(c, c_row, A, B, M, N, K, start, start_row);
            } else matmul_few(c, c_row, A, B, M, N, K, start, start_row);
            double worst = 0;
            int outside = 0;
            for (int i = 0; i < M; i++) {
                for (int j = 0; j < N; j++)
                    worst = worse(worst, fabs(c[i * c_row + j] - expected[i * N + j]) /
                                         (size[i * N + j] * EPS * (1 + sqrt(K))));
                for (int j = N; j < c_row; j++)
                    outside += c[i * c_row + j] != (real)random_normal(4, i * c_row + j);
            }
            char detail[80];
            snprintf(detail, sizeof detail, "%s, %dx%dx%d, variant %d", way_names[way], M, N, K,
                     variant);
            check_below("matmul: rounding errors", detail, worst, 2);
            check("matmul: writes between rows", detail, outside == 0);
            if (kind < 3 && omp_get_max_threads() > 1)  // else there was nothing to compare
                check("matmul: same bits on 1 thread and 5", detail,
                      !memcmp(c, once, M * c_row * sizeof(real)));
        }
        free(a), free(b), free(ra), free(rb), free(c), free(once), free(bias), free(expected);
        free(size), free(half);
    }
    omp_set_num_threads(threads);
}

// What attention does: b is packed `depth` rows deep, and the first K of them are used.
static void test_panels(int way) {
    static const int shapes[][4] = {{5, 31, 7, 40}, {33, 70, 33, 100}, {64, 130, 256, 300},
                                    {70, 40, 600, 700}, {8, 65, 64, 64}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int M = shapes[s][0], N = shapes[s][1], K = shapes[s][2], depth = shapes[s][3];
        real *a = allocate(M * K * sizeof(real), "a"), *ra = allocate(M * K * sizeof(real), "a");
        real *b = allocate(depth * N * sizeof(real), "b");
        real *rb = allocate(depth * N * sizeof(real), "b");
        real *c = allocate(M * N * sizeof(real), "c"), *bias = allocate(N * sizeof(real), "bias");
        real *panels = allocate(round_up(depth, KR) * round_up(N, NR) * sizeof(real), "panels");
        double *expected = allocate(2 * M * N * sizeof(double), "c"), *size = expected + M * N;
        for (int i = 0; i < M * K; i++) a[i] = random_normal(1, i);
        for (int i = 0; i < depth * N; i++) b[i] = random_normal(2, i);
        for (int i = 0; i < N; i++) bias[i] = random_normal(3, i);
        for (int i = 0; i < M * K; i++) ra[i] = way ? rounded(a[i]) : a[i];
        for (int i = 0; i < depth * N; i++) rb[i] = way ? rounded(b[i]) : b[i];
        pack_panels(panels, rows_of(b, N), depth, N);
        for (int variant = 0; variant < 4; variant++) {
            int across = variant & 1;
            const real *start = variant & 2 ? bias : NULL;
            Mat A = across ? transposed(a, M) : rows_of(a, K);
            Mat RA = across ? transposed(ra, M) : rows_of(ra, K);
            multiply_panels(c, N, A, panels, depth, M, N, K, start, 0);
            matmul_plain(expected, size, RA, rows_of(rb, N), M, N, K, start, 0);
            double worst = 0;
            for (int i = 0; i < M * N; i++)
                worst = worse(worst, fabs(c[i] - expected[i]) / (size[i] * EPS * (1 + sqrt(K))));
            char detail[80];
            snprintf(detail, sizeof detail, "%s, %dx%dx%d of %d, variant %d", way_names[way], M, N,
                     K, depth, variant);
            check_below("panels: rounding errors", detail, worst, 2);
        }
        free(a), free(ra), free(b), free(rb), free(c), free(bias), free(panels), free(expected);
    }
}

static void test_matmul(void) {
    for (int way = 0; way < WAYS; way++)
        if (use_way(way)) test_matmul_way(way), test_panels(way);
    use_way(0);
    test_rounding();
}

static void test_exp(void) {
    double worst = 0;
    for (double x = -60; x <= 60; x += 0.00037)
        worst = worse(worst, fabs(fast_exp(x) / exp((real)x) - 1));
    check_below("fast_exp", "relative error on [-60, 60]", worst, sizeof(real) == 4 ? 2e-7 : 1e-15);
    check("fast_exp", "of NaN is NaN", isnan(fast_exp(NAN)));
    check("fast_exp", "of -1000 is about 0", fast_exp(-1000) < 1e-26);
    check("fast_exp", "of 0 is 1", fast_exp(0) == 1);

    worst = 0;  // in units of |x|, since gelu(x) is x times a number from 0 to 1
    for (double x = -12; x <= 12; x += 0.0007) {
        real in = x, out;
        gelu_forward(&out, &in, 1);
        worst = worse(worst, fabs(out - in / (1 + exp(-GELU_2U((double)in)))) / fabs(in));
    }
    check_below("GELU", "error relative to x on [-12, 12]", worst,
                sizeof(real) == 4 ? 5e-7 : 1e-15);
    int wrong = 0;  // a maximum overlooked changes no softmax, until one overflows
    for (int n = 1; n <= 50; n++)
        for (int at = 0; at < n; at++) {
            real x[50];
            for (int i = 0; i < n; i++) x[i] = i == at ? 50 : i - n;
            wrong += largest(x, n) != 50;
        }
    check("largest", "at every place of rows up to 50", wrong == 0);
}

// --- Models to test on

// Every row of the attention table and its relatives: add one for an attention of your own. NKV and
// NOPE -1: the default.
typedef struct {
    int attention, position, norm, RQ, NKV, NOPE;
} Kind;

static const Kind kinds[] = {
    {MHA, LEARNED, NONE, -1, -1, -1}, {MHA, ROPE, NONE, -1, -1, -1},
    {MHA, DECOUPLED, NONE, -1, -1, -1}, {GQA, LEARNED, NONE, -1, -1, -1},
    {GQA, ROPE, NONE, -1, -1, -1}, {MQA, LEARNED, NONE, -1, -1, -1}, {MQA, ROPE, NONE, -1, -1, -1},
    {MLA, LEARNED, LAYERNORM, -1, -1, -1}, {MLA, DECOUPLED, LAYERNORM, -1, -1, -1},
    {MLA, DECOUPLED, RMSNORM, -1, -1, -1}, {MLA, DECOUPLED, NONE, -1, -1, -1},
    {MLA, DECOUPLED, LAYERNORM, 0, -1, -1}, {MLA, LEARNED, NONE, 0, -1, -1},
    {MLA, DECOUPLED, LAYERNORM, -1, 2, -1},  // GQLA
    {MLA, LEARNED, LAYERNORM, -1, 1, -1},
    {MLA, DECOUPLED, RMSNORM, 0, 2, 10},     // a query wider than a value
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static const char *kind_name(const Kind *k) {
    static char name[100];
    int at = snprintf(name, sizeof name, "%s %s", attention_names[k->attention],
                      position_names[k->position]);
    if (k->norm != NONE) at += snprintf(name + at, sizeof name - at, " %s", norm_names[k->norm]);
    if (k->RQ == 0) at += snprintf(name + at, sizeof name - at, " q_rank 0");
    if (k->NKV != -1) at += snprintf(name + at, sizeof name - at, " %d kv heads", k->NKV);
    if (k->NOPE != -1) snprintf(name + at, sizeof name - at, " nope_dim %d", k->NOPE);
    return name;
}

// A small model of any kind, its parameters far enough from their start that every gradient counts.
// V*C numbers are more than a checkpoint is written and read by at a time.
static Model *model_of_heads(int NH, int HS, const Kind *k, int B, int T) {
    Config c = {.attention = k->attention, .position = k->position, .latent_norm = k->norm, .L = 2,
                .NH = NH, .NKV = k->NKV, .C = NH * HS, .block_size = T, .V = 180, .RQ = k->RQ,
                .R = -1, .RD = -1, .NOPE = k->NOPE};
    config_complete(&c, 1, "test");
    Model *m = model_create(&c, 1);
    model_init(m, 5);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        for (size_t i = 0; i < t->size; i++)
            m->params[t->offset + i] += (real)(0.2 * random_normal(6 + (t - m->tensors), i));
    model_reserve(m, B, T, 1);
    return m;
}

static Model *model_of_kind(const Kind *k, int B, int T) { return model_of_heads(4, 6, k, B, T); }

static Model *small_model(int attention, int position, int B, int T) {
    return model_of_kind(&(Kind){attention, position, LAYERNORM, -1, -1, -1}, B, T);
}

static void random_tokens(int *x, int n, int V) {
    for (int i = 0; i < n; i++) x[i] = random_bits(8, i) % V;
}

static void clear_gradients(Model *m) { memset(m->grads, 0, m->n_reals * sizeof(real)); }

// --- Reference dumps

typedef struct {
    Model *m;
    Checkpoint file;
    int B, T, *x, *y, complete;  // complete: the dump has all of the model's tensors
} Case;

// The dump's parameters. A tensor that it lacks, one of your own, keeps its initial value.
static void read_dump(Case *c) {
    int found = 0, there = 0;
    model_init(c->m, 1);
    for (Tensor *t = c->m->tensors; t < c->m->tensors + c->m->n_tensors; t++) {
        if (!checkpoint_find(&c->file, t->name)) {
            static int noted;
            if (!noted++)
                printf("note: the dumps lack %s, if not more; it keeps its initial value, and no "
                       "optimizer steps are compared\n", t->name);
            continue;
        }
        checkpoint_read(&c->file, t->name, c->m->params + t->offset, t->rows, t->cols);
        found++;
    }
    for (int i = 0; i < c->file.n; i++) there += !foreign(c->file.entries[i].name);
    check(c->file.path, "every tensor has its place in the model", found == there);
    c->complete = found == c->m->n_tensors;
}

static Case case_open(const char *path) {
    Case c = {.file = checkpoint_open(path)};
    Config config = checkpoint_config(&c.file);
    const Entry *tokens = checkpoint_find(&c.file, "ref.tokens");
    c.m = model_create(&config, 1);
    read_dump(&c);
    c.B = tokens->shape[0], c.T = tokens->shape[1] - 1;
    model_reserve(c.m, c.B, c.T, 1);
    c.m->head_rows = 64;  // so that the loss comes in several slices, the last one short
    real *values = allocate(c.B * (c.T + 1) * sizeof(real), path);
    checkpoint_read(&c.file, "ref.tokens", values, c.B, c.T + 1);
    c.x = allocate(2 * sizeof(int) * c.B * c.T, path), c.y = c.x + c.B * c.T;
    for (int b = 0; b < c.B; b++)
        for (int t = 0; t < c.T; t++) {
            c.x[b * c.T + t] = values[b * (c.T + 1) + t];
            c.y[b * c.T + t] = values[b * (c.T + 1) + t + 1];
        }
    free(values);
    return c;
}

static void case_close(Case *c) {
    checkpoint_close(&c->file);
    model_free(c->m);
    free(c->x);
}

static double meta_number(const Checkpoint *file, const char *key) {
    const char *value = checkpoint_meta(file, key);
    return value ? strtod(value, NULL) : NAN;
}

static void test_dump(const char *path) {
    Case c = case_open(path);
    Model *m = c.m;
    int N = c.B * c.T, C = m->c.C, V = m->c.V;
    char name[96];
    real *logits = allocate(N * V * sizeof(real), path);
    real *logits_ref = allocate(N * V * sizeof(real), path);
    real loss_ref, losses[10], norms[10], *g_ref = allocate(m->n_reals * sizeof(real), path);

    // logits are dumped as (B, T, V): the reader, which takes matrices, sees the entry flattened
    Entry *e = (Entry *)checkpoint_find(&c.file, "ref.logits");
    e->dims = 2, e->shape[0] = N, e->shape[1] = V;
    checkpoint_read(&c.file, "ref.logits", logits_ref, N, V);
    forward(m, c.x, c.B, c.T, 1);
    norm_forward(m->norm, m->x_final, C, m->w[0][LNF_W], m->w[0][LNF_B], N, C, LAYERNORM);
    head_forward(m, logits, m->norm, N);
    check_below(path, "logits", relative_error(logits, logits_ref, N * V), DUMP);

    checkpoint_read(&c.file, "ref.loss", &loss_ref, 1, 0);
    double alone = forward_loss(m, c.x, c.y, c.B, c.T) / N;
    double loss = forward_backward(m, c.x, c.y, c.B, c.T, 1);
    check_below(path, "loss", fabs(loss / loss_ref - 1), DUMP / 10);
    check_below(path, "loss without gradients", fabs(alone / loss_ref - 1), DUMP / 10);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        snprintf(name, sizeof name, "ref.grad.%s", t->name);
        if (!checkpoint_find(&c.file, t->name)) continue;
        checkpoint_read(&c.file, name, g_ref, t->rows, t->cols);
        check_below(path, name, relative_error(m->grads + t->offset, g_ref, t->size), DUMP);
    }

    clear_gradients(m);
    int steps = c.complete ? 10 : 0;  // tensors of your own would train along
    checkpoint_read(&c.file, "ref.losses", losses, 10, 0);
    checkpoint_read(&c.file, "ref.norms", norms, 10, 0);
    AdamW adam = {meta_number(&c.file, "ref.beta1"), meta_number(&c.file, "ref.beta2"),
                  meta_number(&c.file, "ref.eps"), meta_number(&c.file, "ref.weight_decay")};
    double lr = meta_number(&c.file, "ref.learning_rate");
    double clip = meta_number(&c.file, "ref.grad_clip");
    for (int step = 0; step < steps; step++) {
        snprintf(name, sizeof name, "after %d AdamW steps", step);
        loss = forward_backward(m, c.x, c.y, c.B, c.T, 1);
        double norm = gradient_norm(m);
        check_below(path, name, fabs(loss - losses[step]), DUMP);
        check_below("gradient norm", name, fabs(norm / norms[step] - 1), DUMP);
        adamw_update(m, &adam, lr, step + 1, clip_scale(norm, clip));
    }
    free(logits), free(logits_ref), free(g_ref);
    case_close(&c);
}


// --- Decoding

// Logits (n, V) of all positions of sequence b of tokens (B, n), by one pass over the whole.
static void full_logits(Model *m, real *logits, const int *tokens, int n, int b) {
    forward(m, tokens + b * n, 1, n, 0);
    norm_forward(m->norm, m->x_final, m->c.C, m->w[0][LNF_W], m->w[0][LNF_B], n, m->c.C, LAYERNORM);
    head_forward(m, logits, m->norm, n);
}

// A prompt in one pass and then token by token gives the logits of the full pass, in every cache
// mode; and the same greedy text. What is kept of a token is as much as cache_floats says: before
// the start a cache is full of NaN, of which nothing may be read and the rest must be left.
static void test_decoding(const char *what, Model *m, int n, int n_prompt) {
    enum { B = 3, LENGTH = 60 };
    const double bound = precision == BF16 ? 0x1p-6 : sizeof(real) == 4 ? 1e-4 : 1e-10;
    int V = m->c.V, modes = has_latent(&m->c) ? 3 : 1, first = 3, text[3][LENGTH], out[B * LENGTH];
    int *tokens = allocate(sizeof(int) * B * n, what), *fed = allocate(sizeof(int) * B * n, what);
    real *full = allocate(sizeof(real) * B * n * V, what);
    random_tokens(tokens, B * n, V);
    for (int b = 0; b < B; b++) full_logits(m, full + b * n * V, tokens, n, b);
    for (int mode = 0; mode < modes; mode++) {
        Cache *cache = cache_create(m, mode, B, n);
        size_t size = cache->sequence_size * B * m->c.L + NR, kept = 0;
        double worst = 0, largest = precision == BF16 ? 0 : 1;
        int bytes = precision == BF16 ? 2 : sizeof(real);
        memset(cache->layers, 255, size * bytes);  // NaN, of either kind
        for (int at = n_prompt - 1, T = n_prompt; at < n; at++, T = 1) {
            for (int b = 0; b < B; b++)
                memcpy(fed + b * T, tokens + b * n + at + 1 - T, T * sizeof(int));
            real *logits = decode(m, cache, fed, T);
            for (int b = 0; b < B; b++)
                for (int v = 0; v < V; v++) {
                    real expected = full[(b * n + at) * V + v];
                    worst = worse(worst, fabs(logits[b * V + v] - expected));
                    largest = fmax(largest, fabs(expected));
                }
        }
        check_below(what, cache_names[mode], worst / largest, bound);
        check(what, "leaves the model without a cache and a past", !m->cache && !m->past);
        for (size_t i = 0; i < size; i++)
            kept += !isnan(bytes == 2 ? from_bfloat16(((uint16_t *)cache->layers)[i])
                                      : ((real *)cache->layers)[i]);
        check(what, "keeps as many floats per token as it says",
              kept == (size_t)cache_floats(&m->c, mode) * B * n);
        Sampling greedy = {0, 0};
        if (precision == FP32) {  // else two tokens may be too close to tell apart
            generate(m, cache, &first, 1, LENGTH, &greedy, 1, NULL, NULL);
            generate(m, cache, &first, 1, LENGTH, &greedy, 1, NULL, out);
            memcpy(text[mode], out, sizeof text[mode]);
            check(what, "greedy text is the same in every cache mode",
                  !memcmp(text[0], text[mode], sizeof text[0]));
        }
        cache_free(cache);
    }
    free(tokens), free(fed), free(full);
}

// Gradients of the dumps, in float32, from products of bfloat16. A factor is off by 2^-8 at most,
// two together by 0.0023 in the root mean square. Some forty products lie between a batch and a
// gradient, whose errors have any sign: sqrt(40) 0.0023 = 0.015; where a sum's terms cancel each
// other (biases and norms add up all tokens) a few times that.
//
// Errors are kept by tensor (that of all layers together) for --bf16-errors, which prints them.
static struct { char name[64]; double errors[256]; int n; } rounding[64];

static void note_rounding(const char *name, double error) {
    int i = 0;
    if (!strncmp(name, "h.", 2)) name = strchr(name + 2, '.') + 1;
    while (rounding[i].n && strcmp(rounding[i].name, name)) i++;
    snprintf(rounding[i].name, sizeof rounding[i].name, "%s", name);
    if (rounding[i].n < 256) rounding[i].errors[rounding[i].n++] = error;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_rounding(void) {
    printf("| gradient of | tensors | relative error, median | largest |\n|---|--:|--:|--:|\n");
    for (int i = 0; i < 64 && rounding[i].n; i++) {
        int n = rounding[i].n;
        qsort(rounding[i].errors, n, sizeof(double), by_size);
        printf("| %s | %d | %.4f | %.4f |\n", rounding[i].name, n, rounding[i].errors[n / 2],
               rounding[i].errors[n - 1]);
    }
}

static void test_dump_rounded(const char *path) {
    Case c = case_open(path);
    Model *m = c.m;
    char name[96];
    real loss_ref, *g_ref = allocate(m->n_reals * sizeof(real), path);
    checkpoint_read(&c.file, "ref.loss", &loss_ref, 1, 0);
    for (int way = 1; way < WAYS; way++) {
        if (!use_way(way)) continue;
        double loss = forward_backward(m, c.x, c.y, c.B, c.T, 1);
        check_below(path, way_names[way], fabs(loss / loss_ref - 1), 0x1p-9);
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
            snprintf(name, sizeof name, "ref.grad.%s", t->name);
            if (!checkpoint_find(&c.file, t->name)) continue;
            checkpoint_read(&c.file, name, g_ref, t->rows, t->cols);
            double error = relative_error(m->grads + t->offset, g_ref, t->size);
            check_below(way_names[way], name, error, 0x1p-4);
            if (way == 1) note_rounding(t->name, error);
        }
        clear_gradients(m);
    }
    use_way(0);
    free(g_ref);
    case_close(&c);
}

static void test_decoding_dump(const char *path) {
    Case c = {.file = checkpoint_open(path)};
    Config config = checkpoint_config(&c.file);
    c.m = model_create(&config, 0);
    read_dump(&c);
    model_reserve(c.m, 3, config.block_size, 0);
    test_decoding(path, c.m, config.block_size, 5);
    case_close(&c);
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void test_references(void) {
    char *files[64];
    int n = 0;
    DIR *folder = opendir("dev/test/reference");
    for (struct dirent *e; folder && (e = readdir(folder));)
        if (strstr(e->d_name, ".safetensors") && n < 64) {
            files[n] = allocate(strlen(e->d_name) + 16, "file name");
            sprintf(files[n++], "dev/test/reference/%s", e->d_name);
        }
    if (folder) closedir(folder);
    check("dev/test/reference", "holds sixteen dumps", n >= 16);
    qsort(files, n, sizeof *files, by_name);
    for (int i = 0; i < n; i++) {
        test_dump(files[i]);
        test_dump_rounded(files[i]);
        test_decoding_dump(files[i]);
        free(files[i]);
    }
}

// --- Finite differences

#ifdef REAL_DOUBLE
// d/dh loss(w + h u) at 0, against <gradient, u>: u is the gradient's own direction plus a random
// one, so that no element is left out. Central differences of fourth order with h = 1e-4:
// truncation and rounding both stay far below the bound.
static void finite_differences(const char *what, Model *m, const int *x, const int *y, int B,
                               int T) {
    static const double at[] = {1, -1, 2, -2}, weight[] = {8, -8, -1, 1};
    const double h = 1e-4;
    clear_gradients(m);
    forward_backward(m, x, y, B, T, 1);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        real *w = m->params + t->offset, *g = m->grads + t->offset;
        double *u = allocate(t->size * sizeof(double), what);
        double *w0 = allocate(t->size * sizeof(double), what);
        double norm = 0, along = 0, slope = 0;
        for (size_t i = 0; i < t->size; i++) norm += g[i] * g[i];
        norm = sqrt(norm);
        for (size_t i = 0; i < t->size; i++) {
            u[i] = g[i] / norm + random_normal(7, i) / sqrt(t->size);
            along += g[i] * u[i];
            w0[i] = w[i];
        }
        for (int k = 0; k < 4; k++) {
            for (size_t i = 0; i < t->size; i++) w[i] = w0[i] + h * at[k] * u[i];
            forward(m, x, B, T, 1);  // with dropout, as in training
            slope += weight[k] * head_loss(m, y, B * T, 0) / (B * T) / (12 * h);
        }
        for (size_t i = 0; i < t->size; i++) w[i] = w0[i];
        check_below(what, t->name, fabs(slope - along) / norm, 1e-7);
        free(u), free(w0);
    }
}

// With and without dropout; then heads wider than a panel of the matrix product.
static void test_finite_differences(void) {
    int B = 2, T = 67, x[2 * 67], y[2 * 67];
    for (int k = 0; k < N_KINDS; k++) {
        char what[140];
        Model *m = model_of_kind(&kinds[k], B, T);
        random_tokens(x, B * T, m->c.V), random_tokens(y, B * T, m->c.V);
        m->head_rows = 64, m->dropout_key = 99;
        for (int i = 0; i < 2; i++) {
            m->dropout = i ? 0.2f : 0;
            snprintf(what, sizeof what, "finite differences: %s%s", kind_name(&kinds[k]),
                     i ? " dropout" : "");
            finite_differences(what, m, x, y, B, T);
        }
        model_free(m);
    }
    Kind mla = {MLA, DECOUPLED, LAYERNORM, -1, -1, -1};
    Model *wide = model_of_heads(2, 2 * NR + 4, &mla, B, T);
    random_tokens(x, B * T, wide->c.V), random_tokens(y, B * T, wide->c.V);
    finite_differences("finite differences: wide heads", wide, x, y, B, T);
    model_free(wide);
}
#endif

// --- The rest of training

// Fewer tokens than a matrix unit packs at a time: what attention works in must have room.
static void test_few_tokens(const char *what, const Kind *kind) {
    enum { T = 5 };
    int x[T], y[T];
    Model *m = model_of_kind(kind, 1, T);
    random_tokens(x, T, m->c.V), random_tokens(y, T, m->c.V);
    double loss = forward_backward(m, x, y, 1, T, 1);
    use_way(0);
    check_below(what, "five tokens", fabs(loss / (forward_loss(m, x, y, 1, T) / T) - 1), 0x1p-9);
    model_free(m);
}

static void test_long_decoding(void) {  // of every kind, from one chunk of keys to the next
    int T = 2 * CHUNK + 29, before = omp_get_max_threads();
    omp_set_num_threads(3);  // whatever the number elsewhere: what they must not share would show
    for (int k = 0; k < N_KINDS; k++) {
        Model *m = model_of_kind(&kinds[k], 3, T);
        test_decoding(kind_name(&kinds[k]), m, T, 2 * CHUNK - 3);
        model_free(m);
        for (int way = 1; way < WAYS; way++) {
            char what[140];
            if (!use_way(way)) continue;
            m = model_of_kind(&kinds[k], 3, CHUNK + 9);
            snprintf(what, sizeof what, "%s, %s", kind_name(&kinds[k]), way_names[way]);
            if (way == 1) keep_twin(m);  // else decoding rounds weights as it reads them
            test_decoding(what, m, CHUNK + 9, CHUNK - 3);
            free(twin.numbers), twin.numbers = NULL, twin.n = 0;
            model_free(m);
            test_few_tokens(what, &kinds[k]);
        }
        use_way(0);
    }
    omp_set_num_threads(before);
}

// Chunks whose scores differ by more than the exponent of a float holds: the last of three decides.
static void test_unequal_chunks(void) {
    int keys = 3 * CHUNK;
    Model *m = small_model(MHA, LEARNED, 1, keys);
    Cache *cache = m->cache = cache_create(m, CACHE_FULL, 1, keys);
    Cached cached = cached_heads(m, 0), *a = &cached;
    real *numbers = cache->layers;
    int NH = m->c.NH, HS = m->c.HS;
    real *q = allocate(2 * NH * HS * sizeof(real), "query and output"), *out = q + NH * HS;
    double worst = 0;
    a->q = (View){q, NH * HS, HS};
    for (int h = 0; h < NH; h++) {
        head_at(a->q, 0, h)[0] = sqrt(HS);
        for (int t = 0; t < keys; t++) {
            numbers[panel_place(place_of(a->k, 0, h), t, HS)] = 200 * (t / CHUNK);
            numbers[place_of(a->v, t, h)] = t / CHUNK;
        }
    }
    attention_query(m, &cached, (View){out, NH * HS, HS}, 1, keys);
    for (int h = 0; h < NH; h++) worst = worse(worst, fabs(out[h * HS] - 2));
    check_below("decoding", "chunks with scores 200 apart", worst, 1e-6);
    free(q);
    cache_free(cache);
    model_free(m);
}

// Every token is what sample_token makes of the full pass's logits and its own random number.
static void test_generation_with(double penalty) {
    enum { B = 3, N = 20, PROMPT = 2 };
    Model *m = small_model(MLA, DECOUPLED, B, PROMPT + N);
    Cache *cache = cache_create(m, CACHE_ABSORBED, B, PROMPT + N);
    Sampling how = {1, 0, 0, penalty, {0}, 0};
    int V = m->c.V, prompt[PROMPT] = {3, 14}, out[B * N], text[PROMPT + N], same = 1;
    real *logits = allocate(((PROMPT + N) * V + V) * sizeof(real), "logits");
    real *scratch = logits + (PROMPT + N) * V;
    m->dropout = 0.5f;  // which generation must not apply
    generate(m, cache, prompt, PROMPT, N, &how, 77, NULL, out);
    m->dropout = 0;
    unsigned char *seen = allocate(V, "tokens seen");
    for (int b = 0; b < B; b++) {
        memcpy(text, prompt, sizeof prompt), memcpy(text + PROMPT, out + b * N, N * sizeof(int));
        full_logits(m, logits, text, PROMPT + N, 0);
        memset(seen, 0, V);
        seen[prompt[0]] = 1;
        for (int i = 0; i < N; i++) {
            double u = random_uniform(random_stream(77, STREAM_SAMPLE, b), i);
            seen[text[PROMPT + i - 1]] = 1;
            same &= out[b * N + i] == sample_token(logits + (PROMPT + i - 1) * V, scratch, V, &how,
                                                   penalty == 1 ? NULL : seen, u);
        }
    }
    check("generation", "samples every sequence by itself", same);
    free(logits), free(seen);
    cache_free(cache);
    model_free(m);
}

static void test_generation(void) {
    test_generation_with(1);
    test_generation_with(50);  // tokens of the prompt, and those made, count as seen
}

// A copy of what a view shows, (N, heads, width), and how many numbers are other than in a copy.
static void copy_heads(real *copy, View x, int heads, int width, int N) {
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++)
            memcpy(copy + (n * heads + h) * width, head_at(x, n, h), width * sizeof(real));
}

static long other_heads(const real *copy, View x, int heads, int width, int N) {
    long others = 0;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < width; i++)
                others += copy[(n * heads + h) * width + i] != head_at(x, n, h)[i];
    return others;
}

// What shows that a kind is added whole, without a reference of its own.
static void test_kinds(void) {
    for (int attention = 0; attention < KINDS; attention++) {
        int positions = 0;
        for (int position = 0; position < POSITIONS; position++) {
            int listed = 0;
            positions += takes_position[attention][position];
            for (int k = 0; k < N_KINDS; k++)
                listed += kinds[k].attention == attention && kinds[k].position == position;
            check("kinds", "lists each kind with each of its positions, and no other",
                  (listed > 0) == takes_position[attention][position]);
        }
        check("kinds", "take a position each", positions > 0);
    }
    // Rotary kinds: if all positions lie SHIFT later, RD numbers of every query and key are turned
    // further, but their scores stay.
    enum { B = 2, T = 40, N = B * T, SHIFT = 13 };
    int x[N];
    for (int i = 0; i < N_KINDS; i++) {
        if (kinds[i].position == LEARNED) continue;
        Model *m = model_of_kind(&kinds[i], B, T + SHIFT);
        const Config *c = &m->c;
        Heads h = heads_of(m, &m->acts[0]);  // whose input knows nothing of positions
        real *before = allocate(N * c->C * sizeof(real), "outputs"), q[N * c->q_row];
        real k[N * c->kv_row], k_rope[N * c->NKV * c->rope + 1];
        random_tokens(x, N, c->V);
        forward(m, x, B, T, 1);
        memcpy(before, m->x_final, N * c->C * sizeof(real));
        copy_heads(q, h.q, c->NH, c->QK, N), copy_heads(k, h.k, c->NKV, c->NOPE, N);
        copy_heads(k_rope, h.k_rope, c->NKV, c->rope, N);
        m->past = SHIFT;
        forward(m, x, B, T, 1);
        check("all positions shifted: turns RD numbers of each head", kind_name(&kinds[i]),
              other_heads(q, h.q, c->NH, c->QK, N) == (long)N * c->NH * c->RD &&
              other_heads(k, h.k, c->NKV, c->NOPE, N) +
              other_heads(k_rope, h.k_rope, c->NKV, c->rope, N) == (long)N * c->NKV * c->RD);
        check_below("all positions shifted", kind_name(&kinds[i]),
                    relative_error(m->x_final, before, N * c->C), sizeof(real) == 4 ? 1e-4 : 1e-12);
        m->past = 0;
        // Nothing of attention's matrices is without use: each row has a gradient.
        forward_backward(m, x, x, B, T, 1);
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
            for (int r = 0; strstr(t->name, "attn") && t->cols && r < t->rows; r++) {
                double sum = 0;
                for (int j = 0; j < t->cols; j++)
                    sum += fabs(m->grads[t->offset + (long)r * t->cols + j]);
                if (!(sum > 0)) check(t->name, "has a row without a gradient", 0);
            }
        free(before);
        model_free(m);
    }
}

static void test_all_decoding(void) {
    test_long_decoding();
    test_unequal_chunks();
    test_generation();
}

// A text to stop at is complete with the token in which its last byte lies, wherever it begins.
static void test_stops(const Tokenizer *t) {
    static const char text[] = "It is not the end; not even the beginning of the end.";
    static const char *const stops[] = {
        "is not", "o", " the end;", "nning", "of the en", ".", "It", "nothing"};
    int tokens[sizeof text], wrong = 0;
    int n = encode(t, (const unsigned char *)text, sizeof text - 1, tokens);
    for (size_t k = 0; k < sizeof stops / sizeof *stops; k++)
        for (int i = 1, end = 0; i <= n; i++) {
            int from = end, length = strlen(stops[k]), expected = 0;
            end += token_bytes(t, tokens[i - 1]);
            for (int last = from + 1; last <= end; last++)
                expected |= last >= length && !memcmp(text + last - length, stops[k], length);
            wrong += completes(t, tokens, i, stops[k]) != expected;
        }
    check("stops", "are complete with the right token", n < (int)sizeof text - 9 && wrong == 0);
    check("stops", "end-of-text ends a text",
          is_end_of_text(t, t->eot) && !is_end_of_text(t, tokens[0]));
}

// dev/test/reference/encoding_*: texts and what GPT-2's own encoder makes of them, as
// dev/test/make_encoding_cases.py writes them.
static void test_encoding(void) {
    size_t size, at = 0;
    int wrong = 0, cases = 0;
    static const char vocabulary[] = "dev/test/reference/encoding_tokenizer.bin";
    Tokenizer t = tokenizer_load(vocabulary);
    unsigned char *all = read_file("dev/test/reference/encoding_cases.bin", &size);
    while (at < size) {
        uint32_t n, n_tokens;
        memcpy(&n, all + at, 4), memcpy(&n_tokens, all + at + 4, 4);
        unsigned char *text = all + at + 8, *expected = text + n;
        int *out = allocate((n + 1) * sizeof(int), "tokens");
        int same = encode(&t, text, n, out) == n_tokens;
        for (uint32_t i = 0; same && i < n_tokens; i++)
            same = out[i] == expected[2 * i] + 256 * expected[2 * i + 1];
        if (!same) printf("FAILED encoding of \"%.*s\"\n", n < 60 ? (int)n : 60, text);
        wrong += !same, cases++;
        at += 8 + n + 2 * n_tokens;
        free(out);
    }
    check("encoding", "has over 1000 cases", cases > 1000);
    check("encoding", "is as GPT-2's in every case", wrong == 0);
    check("encoding", "samples start after a newline", first_token(&t) == 198);
    test_stops(&t);
    free(all);
    tokenizer_free(&t);
    t = tokenizer_bytes(256);
    check("stops", "a byte is no end-of-text", !is_end_of_text(&t, t.eot));
    int out[9];
    check("encoding", "of bytes", encode(&t, (const unsigned char *)"don't  \xc3", 8, out) == 8 &&
          out[3] == '\'' && out[7] == 0xc3);
    tokenizer_free(&t);
    static const struct { const char *text; int length; } pieces[] = {
        // letters, numbers, a sign, blanks
        {"caf\xc3\xa9 au lait", 5}, {" \xd9\xa3\xd9\xa4x", 5}, {" \xe2\x80\xa6'x", 5},
        {"a\xe2\x80\xa6", 1}, {" \xc2\xa0x", 1}, {"\xe2\x80\xa8x", 3}, {"\n\xe3\x80\x80", 4},
        // what is no UTF-8: cut short, longer than need be, a surrogate, beyond U+10FFFF
        {"a\xe2\x80", 3}, {"a\xc3. ", 2}, {" \x80\xff.", 3}, {"a\xc0\xa0.", 3},
        {"a\xe0\x80\xa0.", 4}, {"a\xf0\x82\x80\xa6.", 5}, {"a\xed\xa0\x80.", 4},
        {"a\xf4\x90\x80\x80.", 5}};
    wrong = 0;
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        const char *text = pieces[i].text;
        wrong += first_piece((const unsigned char *)text, strlen(text)) != pieces[i].length;
    }
    check("encoding", "pieces beyond ASCII, and of bytes that are letters", !wrong);
    t = tokenizer_bytes(2);
    check("encoding", "or after the end of text", first_token(&t) == 1 && t.V == 2);
    tokenizer_free(&t);
    t = tokenizer_bytes(0);
    check("encoding", "tokens not known", first_token(&t) == 0 && token_bytes(&t, 0) == -1);
    tokenizer_free(&t);
    int n_classes = 0x110000, long_word = 1000000;
    unsigned char *classes = allocate(n_classes, "classes"), *word = allocate(long_word, "word");
    for (int i = 0; i < n_classes; i++) classes[i] = unicode_class(i);
    check("encoding", "classes of all characters as dev/test/encoding_test.py found them right",
          hash_bytes(classes, n_classes) == 0x5e9617f0);
    t = tokenizer_load(vocabulary);
    int *tokens = allocate(long_word * sizeof(int), "tokens");
    double start = seconds();
    memset(word, 'a', long_word);
    check("encoding", "of a long word", encode(&t, word, long_word, tokens) == long_word / 4);
    check("encoding", "of a long word, in less than minutes", seconds() - start < 20);
    tokenizer_free(&t), free(classes), free(word), free(tokens);
    t = (Tokenizer){.V = 4, .eot = 3, .bytes = (unsigned char *)"abaab",  // a, b, a, ab
                    .start = (size_t[]){0, 1, 2, 3, 5}};
    tokenizer_index(&t);
    check("encoding", "the first of equal tokens, never the end of text",
          encode(&t, (const unsigned char *)"ab", 2, out) == 2 && out[0] == 0 && out[1] == 1);
    free(t.table);
}

// Standard output from `capture` on goes to a file; `captured` gives what was printed.
static int capture(char path[32]) {
    fflush(stdout);
    strcpy(path, "/tmp/test_mla_XXXXXX");
    int out = dup(1), file = mkstemp(path);
    dup2(file, 1), close(file);
    return out;
}

static int captured(int out, const char *path, const char *expected) {
    size_t size;
    fflush(stdout);
    dup2(out, 1), close(out);
    unsigned char *printed = read_file(path, &size);
    int same = size == strlen(expected) && !memcmp(printed, expected, size);
    free(printed), remove(path);
    return same;
}

// A model of zeros whose head sees nothing but positions: it writes the two bytes of a character in
// turn, a token each, of which the second by itself would be left out.
static void test_printed_generation(void) {
    Config c = {.attention = MHA, .position = LEARNED, .L = 1, .NH = 1, .NKV = 1, .C = 8,
                .block_size = 4, .V = 256, .RQ = -1, .R = -1, .RD = -1, .NOPE = -1};
    int start = 'a';
    char path[32];
    config_complete(&c, 1, "test");
    Model *m = model_create(&c, 0);
    Tokenizer bytes = tokenizer_bytes(256);
    Sampling likeliest = {0};
    m->w[0][WTE][0xC3 * 8] = m->w[0][WTE][0x80 * 8 + 1] = 1;
    for (int t = 0; t < 4; t++) m->w[0][WPE][t * 8 + t % 2] = 100;
    for (int i = 0; i < 8; i++) m->w[0][LNF_W][i] = 1;
    model_reserve(m, 1, 4, 0);
    Cache *cache = cache_create(m, CACHE_FULL, 1, 4);
    int out = capture(path);
    generate(m, cache, &start, 1, 4, &likeliest, 1, &bytes, NULL);
    check("printing", "a character made of two tokens", captured(out, path, "\xc3\x80\xc3\x80"));
    cache_free(cache), tokenizer_free(&bytes), model_free(m);
}

static void test_printing(void) {  // what could upset a terminal stays out, characters stay whole
    static const struct { const char *text, *printed; } texts[] = {
        {"a\tb\n\x1b[1m\x7f\r", "a\tb\n[1m"},
        {"caf\xc3\xa9 \xe2\x80\x9c", "caf\xc3\xa9 \xe2\x80\x9c"},
        {"\xf0\x9f\x99\x82", "\xf0\x9f\x99\x82"}, {"\x9b" "1m\x80", "1m"},   // U+009B by itself,
        {"\xc2\x9b" "1m\xc2\xa9", "\xc2" "1m\xc2\xa9"},                      // as UTF-8,
        {"\xe0\x80\x9b" "1m", "\xe0" "1m"}, {"\xf0\x80\x80\x9b", "\xf0"},     // and in longer forms
        {"\xe9t\xe9", "\xe9t\xe9"}, {"\xc3x\x9b", "\xc3x"}, {"\xf5\x80\x9b", "\xf5"},
        {"\xe2\xe2\x80\x9c", "\xe2\xe2\x80\x9c"}, {"\xc3\xa9\x9b", "\xc3\xa9"},
        {"\xc1\x9b", "\xc1"}};
    Tokenizer bytes = tokenizer_bytes(256);
    int wrong = 0;
    char path[32];
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        Printer printer = {0};
        int out = capture(path);
        for (const char *c = texts[i].text; *c; c++)
            print_token(&bytes, (unsigned char)*c, &printer);
        wrong += !captured(out, path, texts[i].printed);
    }
    check("printing", "leaves out control characters and nothing else", !wrong);
    tokenizer_free(&bytes);
    test_printed_generation();
}

static void test_accumulation(void) {  // two halves of a batch give the gradient of the whole
    int B = 4, T = 70, x[4 * 70], y[4 * 70];
    Model *m = small_model(MLA, DECOUPLED, B, T);
    random_tokens(x, B * T, m->c.V), random_tokens(y, B * T, m->c.V);
    double whole = forward_backward(m, x, y, B, T, 1), halves = 0;
    real *g = allocate(m->n_reals * sizeof(real), "gradients");
    memcpy(g, m->grads, m->n_reals * sizeof(real));
    clear_gradients(m);
    for (int i = 0; i < 2; i++)
        halves += forward_backward(m, x + i * B / 2 * T, y + i * B / 2 * T, B / 2, T, 0.5) / 2;
    check_below("accumulation", "loss", fabs(halves / whole - 1), 20 * EPS);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        check_below("accumulation", t->name,
                    relative_error(m->grads + t->offset, g + t->offset, t->size), 100 * EPS);
    free(g);
    model_free(m);
}

static int same_files(const char *a, const char *b) {
    size_t na, nb;
    unsigned char *x = read_file(a, &na), *y = read_file(b, &nb);
    int same = na == nb && !memcmp(x, y, na);
    free(x), free(y);
    return same;
}

// Steps of every kind, in every way, leave the same checkpoint, byte for byte, on any number of
// threads.
static void test_threads(void) {
#ifdef _OPENMP
    static const int threads[] = {1, 2, 3, 5, 16};
    // 268 rows: other ways through matmul on 1 thread and more
    int B = 4, T = 67, x[4 * 67], y[4 * 67], before = omp_get_max_threads();
    char first[] = "/tmp/test_mla_a_XXXXXX", other[] = "/tmp/test_mla_b_XXXXXX";
    close(mkstemp(first)), close(mkstemp(other));
    for (int k = 0; k < WAYS * N_KINDS; k++)
        for (int i = 0; i < (k < N_KINDS ? 5 : 2) && use_way(k / N_KINDS); i++) {
            omp_set_num_threads(threads[k < N_KINDS ? i : 3 * i]);
            Model *m = model_of_kind(&kinds[k % N_KINDS], B, T);
            m->dropout = 0.1f;
            AdamW adam = {0.9, 0.99, 1e-8, 0.1};
            random_tokens(x, B * T, m->c.V), random_tokens(y, B * T, m->c.V);
            for (int step = 1; step <= (k < N_KINDS ? 20 : 3); step++) {
                m->dropout_key = step;
                forward_backward(m, x, y, B, T, 1);
                adamw_update(m, &adam, 1e-3, step, clip_scale(gradient_norm(m), 0.5));
            }
            checkpoint_save(m, i ? other : first, 20, "threads", "");
            if (i)
                check("threads: same checkpoint", attention_names[kinds[k % N_KINDS].attention],
                      same_files(first, other));
            model_free(m);
        }
    use_way(0);
    remove(first), remove(other);
    omp_set_num_threads(before);
#endif
}

static void train_quietly(Model *m, const Options *o, const Data *d, const Tokenizer *t,
                          long done) {
    fflush(stdout);
    int out = dup(1), null = open("/dev/null", O_WRONLY);
    dup2(null, 1);
    Outputs none = {.settings = "", .best = INFINITY};
    train(m, o, d, NULL, t, &none, done);
    fflush(stdout);
    dup2(out, 1), close(out), close(null);
    signal(SIGINT, SIG_DFL), signal(SIGTERM, SIG_DFL);
}

// The same bits as its parts by hand, from the start or from step 3 on; some steps are clipped.
static void test_training(void) {
    enum { B = 2, T = 8, N = 200 };
    Options o = {.order = RANDOM, .batch_size = B, .seq_len = T, .grad_accum = 3, .seed = 3,
                 .schedule = {COSINE, 5, 2, 1e-2, 1e-3}, .grad_clip = 2,
                 .adam = {0.9, 0.99, 1e-8, 0.1}};
    uint16_t tokens[N];
    int x[B * T], y[B * T];
    Data d = {.path = "test", .tokens = tokens, .n = N};
    Tokenizer bytes = tokenizer_bytes(256);
    Model *m[3];
    for (int i = 0; i < N; i++) tokens[i] = random_bits(10, i) % 180;
    for (int i = 0; i < 3; i++) m[i] = small_model(MLA, DECOUPLED, B, T), m[i]->dropout = 0.1f;
    for (int step = 0; step < o.schedule.steps; step++) {
        if (step == 3)
            for (int set = 0; set < 3; set++)
                memcpy(set_of(m[2], set), set_of(m[0], set), m[0]->n_reals * sizeof(real));
        for (int index = 3 * step; index < 3 * step + 3; index++) {
            next_batch(&d, o.order, o.seed, index, x, y, B, T);
            m[0]->dropout_key = random_stream(o.seed, STREAM_DROPOUT, index);
            forward_backward(m[0], x, y, B, T, 1.0 / 3);
        }
        adamw_update(m[0], &o.adam, learning_rate_at(&o.schedule, step), step + 1,
                     clip_scale(gradient_norm(m[0]), o.grad_clip));
    }
    train_quietly(m[1], &o, &d, &bytes, 0);
    train_quietly(m[2], &o, &d, &bytes, 3);
    check("training", "is its parts in order",
          !memcmp(m[0]->params, m[1]->params, m[0]->n_reals * sizeof(real)));
    check("training", "goes on where it stopped",
          !memcmp(m[0]->params, m[2]->params, m[0]->n_reals * sizeof(real)));
    for (int i = 0; i < 3; i++) model_free(m[i]);
    tokenizer_free(&bytes);
}

static void test_batches(void) {
    enum { N = 101, B = 2, T = 10 };
    uint16_t tokens[N];
    int x[B * T], y[B * T];
    Data d = {.tokens = tokens, .n = N};
    for (int i = 0; i < N; i++) tokens[i] = i;
    for (int index = 0; index < 7; index++) {  // 100 targets hold 5 batches of 20
        next_batch(&d, SEQUENTIAL, 1, index, x, y, B, T);
        int right = 1;
        for (int i = 0; i < B * T; i++) right &= x[i] == index % 5 * 20 + i && y[i] == x[i] + 1;
        check("batches", "sequential, from the start again at the end", right);
    }
    int seen_first = 0, seen_last = 0, right = 1, same = 0;
    for (int index = 0; index < 2000; index++) {
        next_batch(&d, RANDOM, 1, index, x, y, B, T);
        same += x[0] == x[T];
        for (int b = 0; b < B; b++) {
            seen_first |= x[b * T] == 0, seen_last |= y[b * T + T - 1] == N - 1;
            for (int t = 0; t < T; t++)
                right &= x[b * T + t] == x[b * T] + t && y[b * T + t] == x[b * T + t] + 1;
        }
    }
    check("batches", "random rows are stretches of the data", right);
    check("batches", "random rows reach both ends", seen_first && seen_last);
    check("batches", "rows are drawn one by one", same < 100);  // 1 in 91 of 2000: 22
}

static void test_evaluation(void) {  // each window by itself must give the same, whatever the batch
    enum { N = 95, T = 10 };
    uint16_t tokens[N];
    Data d = {.tokens = tokens, .n = N};
    Model *m = small_model(GQA, ROPE, 4, T);
    Tokenizer bytes = tokenizer_bytes(256);
    for (int i = 0; i <= 256; i++) bytes.start[i] = 3 * i;  // as if every token had three bytes
    int x[N], y[N];
    for (int i = 0; i < N; i++) tokens[i] = random_bits(9, i) % m->c.V;
    double sum = 0, losses[N];
    for (int w = 0; w < N - 1; w += T) {
        int length = min_int(T, N - 1 - w);
        for (int i = 0; i < length; i++) x[i] = tokens[w + i], y[i] = tokens[w + i + 1];
        sum += losses[w / T] = forward_loss(m, x, y, 1, length);
    }
    m->dropout = 0.5f;  // which evaluation must not apply
    for (int B = 1; B <= 4; B++) {
        Evaluation e = evaluate(m, &d, &bytes, B, T, 0);
        check("evaluation", "predicts every token but the first once", e.tokens == N - 1);
        check_below("evaluation", "loss", fabs(e.loss / (sum / (N - 1)) - 1), 20 * EPS);
        check_below("evaluation", "bits per byte",
                    fabs(e.bits_per_byte / (e.loss / log(2) / 3) - 1), 1e-12);
    }
    Evaluation some = evaluate(m, &d, &bytes, 2, T, 2);  // of 6 batches: windows 0, 1 and 6, 7
    check("evaluation", "of some batches", some.tokens == 2 * 2 * T);
    sum = losses[0] + losses[1] + losses[6] + losses[7];
    check_below("evaluation", "of some batches, evenly spread",
                fabs(some.loss / (sum / (2 * 2 * T)) - 1), 20 * EPS);
    tokenizer_free(&bytes);
    model_free(m);
}

static void test_schedule(void) {
    Schedule s = {COSINE, 110, 10, 2e-3, 4e-4};
    check_below("schedule", "first step", fabs(learning_rate_at(&s, 0) / (2e-3 / 11) - 1), 1e-12);
    check_below("schedule", "last warm-up step",
                fabs(learning_rate_at(&s, 9) / (2e-3 * 10 / 11) - 1), 1e-12);
    check_below("schedule", "peak", fabs(learning_rate_at(&s, 10) / 2e-3 - 1), 1e-12);
    check_below("schedule", "a quarter down",
                fabs(learning_rate_at(&s, 35) / (4e-4 + 1.6e-3 * (0.5 + sqrt(0.125))) - 1), 1e-12);
    check_below("schedule", "half way", fabs(learning_rate_at(&s, 60) / 1.2e-3 - 1), 1e-12);
    check_below("schedule", "floor", fabs(learning_rate_at(&s, 110) / 4e-4 - 1), 1e-12);
    s.kind = CONSTANT;
    check_below("schedule", "constant", fabs(learning_rate_at(&s, 100) / 2e-3 - 1), 1e-12);
    check_below("schedule", "constant, warming up",
                fabs(learning_rate_at(&s, 4) / (2e-3 * 5 / 11) - 1), 1e-12);
    check("clipping", "off, below and above the bound",
          clip_scale(5, 0) == 1 && clip_scale(5, 6) == 1 && clip_scale(5, 1) == 0.2);
}

static void test_randomness(void) {
    enum { N = 200000 };
    Model *m = small_model(MHA, LEARNED, 1, 8);
    double kept = 0, sum = 0, square = 0, same_place = 0, same_key = 0;
    m->dropout = 0.25f;
    for (int i = 0; i < N; i++) {
        m->dropout_key = 3;
        double scale = dropout_scale(m, 1, i);
        kept += scale != 0;
        sum += scale;
        same_place += (dropout_scale(m, 2, i) != 0) == (scale != 0);
        m->dropout_key = 4000;
        same_key += (dropout_scale(m, 1, i) != 0) == (scale != 0);
    }
    // five standard deviations of the means of N draws
    const double agree = 0.75 * 0.75 + 0.25 * 0.25;
    check_below("dropout", "keeps 3 of 4", fabs(kept / N - 0.75), 5 * sqrt(0.75 * 0.25 / N));
    check_below("dropout", "keeps the mean", fabs(sum / N - 1), 5 * sqrt(0.25 / 0.75 / N));
    check_below("dropout", "is another in every place", fabs(same_place / N - agree),
                5 * sqrt(agree * (1 - agree) / N));
    check_below("dropout", "is another for every key", fabs(same_key / N - agree),
                5 * sqrt(agree * (1 - agree) / N));
    // Three places of a training pass: a dropped embedding is zero, a dropped branch leaves the
    // residual stream as it was.
    int tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8}, n = 8 * m->c.C, dropped[3] = {0};
    const Acts *a = m->acts;
    forward(m, tokens, 1, 8, 1);
    for (int i = 0; i < n; i++) {
        dropped[0] += a->x[i] == 0;
        dropped[1] += a->x_mid[i] == a->x[i];
        dropped[2] += a[1].x[i] == a->x_mid[i];
    }
    for (int i = 0; i < 3; i++)
        check_below("dropout", "drops 1 of 4 in training", fabs((double)dropped[i] / n - 0.25),
                    5 * sqrt(0.75 * 0.25 / n));
    sum = 0;
    for (int i = 0; i < N; i++) {
        double z = random_normal(11, i);
        sum += z, square += z * z;
    }
    check_below("random normal", "mean 0", fabs(sum / N), 5 / sqrt(N));
    check_below("random normal", "variance 1", fabs(square / N - 1), 5 * sqrt(2.0 / N));
    uint64_t stream = random_stream(1, STREAM_DATA, 2);
    check("random streams", "differ by seed, purpose and number",
          stream != random_stream(3, STREAM_DATA, 2) &&
          stream != random_stream(1, STREAM_DROPOUT, 2) &&
          stream != random_stream(1, STREAM_DATA, 3));
    model_free(m);
}

static void test_initialization_of(int attention, int position) {
    Model *m = small_model(attention, position, 1, 8);
    model_init(m, 1);
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        double wanted = t->init == ONES ? 1 : t->init == ZEROS ? 0
                      : t->init == RESIDUAL ? 0.02 / 2 : 0.02;
        double square = 0, rows = 0, first = 0;
        real *w = m->params + t->offset, *wte = m->w[0][WTE];
        for (size_t i = 0; i < t->size; i++) square += (double)w[i] * w[i];
        check("initialization", t->name,
              t->cols ? t->init == (strstr(t->name, "c_proj") ? RESIDUAL : NORMAL)
                      : t->init == (strstr(t->name, "bias") ? ZEROS : ONES));
        check_below("initialization", t->name, fabs(sqrt(square / t->size) - wanted),
                    t->cols ? 5 * wanted / sqrt(2.0 * t->size) : 0);
        if (!t->cols) continue;
        for (int i = 0; i < 128; i++) rows += w[i] * w[i + t->cols], first += w[i] * wte[i];
        check_below("initialization: rows are independent", t->name,
                    fabs(rows) / (wanted * wanted), 5 * sqrt(128));
        if (t != m->tensors)
            check_below("initialization: tensors are independent", t->name,
                        fabs(first) / (wanted * 0.02), 5 * sqrt(128));
    }
    size_t sum = 0;
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        sum += (size_t)t->rows * (t->cols ? t->cols : 1);
    check("parameters", "are counted", m->n_params == sum);
    model_free(m);
}

static void test_initialization(void) {
    test_initialization_of(MHA, LEARNED);
    test_initialization_of(MLA, DECOUPLED);
}

static void test_sampling(void) {
    enum { N = 100000 };
    int counts[4] = {0};
    Sampling all = {0.5, 0}, greedy = {0, 0}, two = {1, 2};
    real scratch[4];
    for (int i = 0; i < N; i++) {
        real logits[4] = {0, 1, 2, -1};
        counts[sample_token(logits, scratch, 4, &all, NULL, random_uniform(12, i))]++;
    }
    double sum = exp(0) + exp(2) + exp(4) + exp(-2);
    for (int v = 0; v < 4; v++) {
        double p = exp((double[]){0, 2, 4, -2}[v]) / sum;
        check_below("sampling", "follows softmax(logits / temperature)",
                    fabs((double)counts[v] / N - p), 5 * sqrt(p * (1 - p) / N));
    }
    real logits[4] = {0, 1, 2, -1};
    check("sampling", "temperature 0 takes the likeliest",
          sample_token(logits, scratch, 4, &greedy, NULL, 0.999) == 2);
    int seen[4] = {0};
    for (int i = 0; i < 1000; i++) {
        real again[4] = {0, 1, 2, -1};
        seen[sample_token(again, scratch, 4, &two, NULL, random_uniform(13, i))]++;
    }
    check("sampling", "top-k leaves the likeliest k",
          !seen[0] && seen[1] > 200 && seen[2] > 600 && !seen[3]);

    // Of probabilities 0.087, 0.237, 0.644, 0.032 the first two have 0.881, the first three 0.968.
    for (int set = 0; set < 3; set++) {
        Sampling nucleus = {1, set == 2 ? 2 : 0, (double[]){0.87, 0.89, 0.99}[set], 0, {0}, 0};
        int found[4] = {0};
        for (int i = 0; i < 2000; i++) {
            real again[4] = {0, 1, 2, -1};
            found[sample_token(again, scratch, 4, &nucleus, NULL, random_uniform(15, i))]++;
        }
        check("sampling", "top-p leaves the likeliest that have so much",
              found[1] > 400 && found[2] > 1000 && (found[0] > 0) == (set == 1) && !found[3]);
    }
    Sampling even = {1, 0, 0.4, 0, {0}, 0};
    int first[3] = {0};
    for (int i = 0; i < 200; i++) {
        real again[3] = {1, 1, 0};
        first[sample_token(again, scratch, 3, &even, NULL, random_uniform(16, i))]++;
    }
    check("sampling", "top-p keeps what is as likely as the last",
          first[0] > 50 && first[1] > 50 && !first[2]);
    Sampling penal = {0, 0, 0, 3, {0}, 0};
    real positive[4] = {0, 1, 2, -1}, negative[4] = {-4, -1, -2, -4};
    check("sampling", "the penalty divides",
          sample_token(positive, scratch, 4, &penal, (unsigned char[]){0, 0, 1, 0}, 1) == 1 &&
          fabs(positive[2] - 2.0 / 3) < 1e-6 && positive[1] == 1);
    check("sampling", "and multiplies what is negative",
          sample_token(negative, scratch, 4, &penal, (unsigned char[]){0, 1, 0, 0}, 1) == 2 &&
          negative[1] == -3);
    for (int k = 0; k < 50; k++) {  // against counting
        real x[50], y[50];
        for (int i = 0; i < 50; i++) x[i] = y[i] = random_bits(14 + k, i) % 20;
        int above = 0, equal = 0;
        real found = kth_largest(y, 50, k);
        for (int i = 0; i < 50; i++) above += x[i] > found, equal += x[i] == found;
        check("sampling", "k-th largest", above <= k && k < above + equal);
    }
}

// --- Files

static void test_checkpoints(void) {
    char a[] = "/tmp/test_mla_a_XXXXXX", b[] = "/tmp/test_mla_b_XXXXXX";
    close(mkstemp(a)), close(mkstemp(b));
    for (int k = 0; k < N_KINDS; k++) {
        Model *m = model_of_kind(&kinds[k], 1, 8);
        for (size_t i = 0; i < m->n_reals; i++) {  // floats, so that the double build loses nothing
            m->params[i] = (float)m->params[i];
            m->adam_m[i] = (float)random_normal(1, i);
            m->adam_v[i] = (float)random_normal(2, i);
        }
        for (int with_state = 0; with_state < 2; with_state++) {
            checkpoint_save(m, a, 17, with_state ? "as it was" : NULL, "");
            Checkpoint file = checkpoint_open(a);
            Config c = checkpoint_config(&file);
            Model *loaded = model_create(&c, 1);
            checkpoint_read_model(&file, loaded, with_state);
            check("checkpoint", "configuration comes back", !memcmp(&c, &m->c, sizeof c));
            check("checkpoint", "names nope_dim only where it is set apart",
                  !checkpoint_meta(&file, "nope_dim") == (kinds[k].NOPE == -1));
            int same = 1;
            for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
                for (int set = 0; set < (with_state ? 3 : 1); set++)
                    same &= !memcmp(set_of(m, set) + t->offset, set_of(loaded, set) + t->offset,
                                    t->size * sizeof(real));
            check("checkpoint", "tensors come back bit for bit", same);
            if (with_state) {
                real *v = allocate(m->tensors[WTE].size * sizeof(real), "adam_v");
                checkpoint_read(&file, "adam.v.wte.weight", v, c.V, c.C);
                check("checkpoint", "moments bear their names",
                      !memcmp(v, m->adam_v, m->tensors[WTE].size * sizeof(real)));
                free(v);
            }
            checkpoint_save(loaded, b, 17, with_state ? "as it was" : NULL, "");
            check("checkpoint", "saved again is the same file", same_files(a, b));
            checkpoint_close(&file);
            model_free(loaded);
        }
        model_free(m);
    }
    remove(a), remove(b);
}

// Defaults; the experiments' cache sizes, floats per token in all layers.
static void test_config(void) {
    static const struct {
        int attention, position, L, C, NKV, NOPE, kv_heads, full, latent;  // -1: default; none
    } rows[] = {
        {MHA, ROPE, 8, 512, -1, -1, 16, 8192, -1}, {MLA, DECOUPLED, 8, 512, -1, -1, 16, 6272, 2856},
        {MLA, LEARNED, 8, 512, -1, -1, 16, 8192, 2728}, {MQA, ROPE, 8, 512, -1, -1, 1, 512, -1},
        {MHA, LEARNED, 24, 1024, -1, -1, 16, 49152, -1},
        {MLA, LEARNED, 24, 1024, -1, -1, 16, 49152, 16368},
        {MQA, LEARNED, 24, 1024, -1, -1, 1, 3072, -1},
        {MHA, DECOUPLED, 8, 512, -1, -1, 16, 6272, -1},
        {GQA, ROPE, 8, 512, -1, -1, 4, 2048, -1}, {MLA, DECOUPLED, 8, 512, 4, -1, 4, 1664, 2856},
        {MLA, DECOUPLED, 8, 512, -1, 32, 16, 8320, 2856}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Config c = {.attention = rows[i].attention, .position = rows[i].position,
                    .latent_norm = LAYERNORM, .L = rows[i].L, .NH = 16, .NKV = rows[i].NKV,
                    .C = rows[i].C, .block_size = 1024, .V = 256, .RQ = -1, .R = -1, .RD = -1,
                    .NOPE = rows[i].NOPE};
        config_complete(&c, 1, "test");
        int latent = rows[i].latent != -1;
        const char *name = attention_names[c.attention];
        check("cache floats per token", name, cache_floats(&c, CACHE_FULL) == rows[i].full);
        for (int mode = CACHE_LATENT; latent && mode <= CACHE_ABSORBED; mode++)
            check("cache floats per token", name, cache_floats(&c, mode) == rows[i].latent);
        check("default cache", name, cache_mode(&c) ==
              (latent && rows[i].latent <= rows[i].full ? CACHE_ABSORBED : CACHE_FULL));
        check("default kv-heads", name, c.NKV == rows[i].kv_heads);
        check("default q-rank", name, c.RQ == (latent ? c.C / 2 : 0));
    }
}

// Calls that must not be: each stops with one line, which begins like this. test_mla runs itself.
static const char *const misuses[] = {
    "matmul: called within a parallel region, expected outside",
    "matmul: strides 2, 3 and 1, 8: expected one of each two to be 1",
    "decode: 2 tokens for a cache that holds 3, expected 1",
    "decode: 4 tokens after 0, expected at most the cache's 3",
    "decode: 1 tokens after 3, expected at most the cache's 3",
    "a cache of 9 tokens: the model's block size is 8",
    "a pass over 1 x 8 tokens: model_reserve was asked for 12 in sequences of 6",
    "a gradient of 2000 sums over tokens: expected at most 192, twice the widest bias",
    "matmul: strides 8, 1 and 3, 2: expected one of each two to be 1",
    "step 7: weights or moments are not finite after it; not saved",
    "step 7: weights or moments are not finite after it; not saved",
    "step 7: the loss is not finite after it; not saved",
};

static void misuse(int which) {
    enum { LENGTH = 8 };
    Model *m = small_model(MLA, DECOUPLED, 1, LENGTH);
    real x[64] = {0};
    int tokens[LENGTH] = {0};
    Cache *cache = cache_create(m, CACHE_ABSORBED, 1, which == 3 || which == 4 ? 3 : LENGTH);
    if (which == 0) {
        #pragma omp parallel num_threads(2)
        matmul(x, 8, rows_of(x, 8), transposed(x, 8), 8, 8, 8, NULL, 0);
    }
    if (which == 1) matmul(x, 8, (Mat){x, 2, 3}, transposed(x, 8), 2, 2, 2, NULL, 0);
    if (which == 2) decode(m, cache, tokens, 3), decode(m, cache, tokens, 2);
    if (which == 3) decode(m, cache, tokens, 4);
    if (which == 4) decode(m, cache, tokens, 3), decode(m, cache, tokens, 1);
    if (which == 5) cache_create(m, CACHE_FULL, 1, LENGTH + 1);
    if (which == 6) {
        free(m->acts), free(m->act_memory);
        model_reserve(m, 2, 6, 1);
        forward(m, tokens, 1, LENGTH, 1);
    }
    if (which == 7) norm_backward(m, NULL, NULL, NULL, NULL, NULL, 0, NULL, 1, 1000, NONE);
    if (which == 8) matmul(x, 8, rows_of(x, 8), (Mat){x, 3, 2}, 2, 2, 2, NULL, 0);
    if (which >= 9) {
        Options o = {.batch_size = 1, .seq_len = LENGTH, .save = "/nowhere/at all"};
        if (which < 11) (which == 9 ? m->adam_m : m->adam_v)[3] = INFINITY;
        else for (size_t i = 0; i < m->n_params; i++) m->params[i] = 3e38;
        save_run(&(Outputs){.settings = ""}, m, &o, tokens, tokens, 7);
    }
}

static const char *program;  // how this one was called

static void test_misuse(void) {
    if (sizeof(real) == sizeof(double)) return;
    for (int i = 0; i < (int)(sizeof misuses / sizeof *misuses); i++) {
        char command[4096], line[512] = "";
        #ifndef _OPENMP
        if (i == 0) continue;  // there is one thread only
        #endif
        snprintf(command, sizeof command, "$RUN '%s' --misuse %d 2>&1", program, i);
        FILE *pipe = popen(command, "r");
        while (pipe && fgets(line, sizeof line, pipe) && strncmp(line, "train_gpt2_mla: ", 16)) {}
        int status = pipe ? pclose(pipe) : -1;
        check("misuse", misuses[i], WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
              !strncmp(line + 16, misuses[i], strlen(misuses[i])));
    }
    #ifdef __SANITIZE_ADDRESS__
    Model *m = small_model(MLA, DECOUPLED, 1, 8);
    check("arena", "has a gap after a piece that may not be touched",
          __asan_address_is_poisoned(m->norm + 8 * m->c.C) &&
          !__asan_address_is_poisoned(m->latent));
    model_free(m);
    #endif
}

// --- The plain twin

#ifdef REAL_DOUBLE
#include "doc/mla.c"

// The program's parameters, or gradients, in the order of the twin's struct: copied from `from` if
// there is one, else compared with `to`. Returns how many there are.
static size_t twin_parameters(real *const *w, const Model *m, const double *from,
                              const double *to) {
    static const int ids[] = {QA_W, QA_NORM_W, QA_NORM_B, QB_W, KVA_W, KVA_NORM_W, KVA_NORM_B,
                              KVB_W, APROJ_W, APROJ_B};
    size_t at = 0;
    for (int i = 0; i < 10; i++) {
        const Tensor *t = m->tensors;
        while (t->id != ids[i]) t++;
        if (from) memcpy(w[t->id], from + at, t->size * sizeof(double));
        else check_below("twin: gradient", t->name, relative_error(w[t->id], to + at, t->size),
                         1e-10);
        at += t->size;
    }
    return at;
}

// doc/mla.c's layer and the program's, with the same parameters: outputs, gradients, decoding.
static void test_twin(void) {
    static Parameters w, g;
    static Activations a;
    static double x[T][C], out[T][C], d_out[T][C], dx[T][C];
    Config c = {.attention = MLA, .position = DECOUPLED, .latent_norm = LAYERNORM, .L = 1,
                .NH = NH, .NKV = NH, .C = C, .block_size = T, .V = 2, .RQ = RQ, .R = R, .RD = RD,
                .NOPE = NOPE};
    size_t n = sizeof w / sizeof(double);
    config_complete(&c, 1, "test");
    Model *m = model_create(&c, 1);
    model_init(m, 1);  // a tensor of your own, which the twin lacks, keeps its initial value
    model_reserve(m, 1, T, 1);
    for (size_t i = 0; i < n; i++) ((double *)&w)[i] = random_normal(21, i) / 2;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < C; i++)
            x[t][i] = random_normal(22, t * C + i), d_out[t][i] = random_normal(23, t * C + i);
    check("twin", "has the program's parameters",
          twin_parameters(m->w[0], m, (double *)&w, NULL) == n);

    layer_forward(&w, x, &a);
    memcpy(m->norm, x, sizeof x);
    attention_block_forward(m, 0, m->acts, 1, T);
    check_below("twin", "outputs", relative_error(m->proj, a.out[0], T * C), 1e-10);
    layer_backward(&w, x, &a, d_out, &g, dx);
    attention_block_backward(m, 0, m->acts, d_out[0], 1, T);
    check_below("twin", "dx", relative_error(m->d_norm, dx[0], T * C), 1e-10);
    twin_parameters(m->g[0], m, NULL, (double *)&g);
    layer_decode(&w, x, out);
    for (int mode = CACHE_FULL; mode <= CACHE_ABSORBED; mode++) {
        m->cache = cache_create(m, mode, 1, T);
        for (m->past = 0; m->past < T; m->past = ++m->cache->used) {
            memcpy(m->norm, x[m->past], sizeof x[0]);
            attention_block_forward(m, 0, m->acts, 1, 1);
            check_below("twin: decoded", cache_names[mode],
                        relative_error(m->proj, out[m->past], C), 1e-10);
        }
        cache_free(m->cache);
        m->cache = NULL, m->past = 0;
    }
    model_free(m);
}
#endif

// Runs tests that are a program of their own and adds their counts to ours.
static void run_also(const char *command) {
    char line[1024];
    int p = -1, f = -1;
    FILE *pipe = popen(command, "r");
    while (pipe && fgets(line, sizeof line, pipe))
        if (sscanf(line, "%d passed, %d failed", &p, &f) != 2) fputs(line, stdout);
    int status = pipe ? pclose(pipe) : -1;
    if (p < 1 || f < 0 || (status != 0) != (f > 0)) check(command, "must run to its end", 0);
    else passed += p, failed += f;
}

// Whether a group of tests is named on the command line, or none is.
static int named(int argc, char **argv, const char *what) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], what)) return 1;
    return argc == 1;
}

int main(int argc, char **argv) {
    static const struct { const char *what; void (*test)(void); } tests[] = {
        {"matrix product", test_matmul}, {"exp", test_exp}, {"reference dumps", test_references},
#ifdef REAL_DOUBLE
        {"finite differences", test_finite_differences},
#endif
        {"kinds", test_kinds}, {"decoding", test_all_decoding}, {"encoding", test_encoding},
        {"printing", test_printing}, {"gradient accumulation", test_accumulation},
        {"batches", test_batches}, {"training", test_training}, {"evaluation", test_evaluation},
        {"schedule", test_schedule}, {"randomness", test_randomness},
        {"initialization", test_initialization}, {"sampling", test_sampling},
        {"checkpoints", test_checkpoints}, {"configurations", test_config},
        {"misuse", test_misuse},
#ifdef REAL_DOUBLE
        {"plain twin", test_twin},
#endif
        {"threads", test_threads},
    };
    if (argc == 3 && !strcmp(argv[1], "--misuse")) return misuse(atoi(argv[2])), 0;
    if (argc == 2 && !strcmp(argv[1], "--bf16-errors"))
        return test_references(), print_rounding(), failed > 0;
    program = argv[0];
    if (access("dev/test/reference", R_OK))
        fail(1, "dev/test/reference: not found; run the tests in the repository's top folder");
    if (sizeof(real) == sizeof(float) && argc == 1) {
        run_also("sh dev/test/bad_input.sh");
        printf("bad input                     %4d checks\n", passed);
        int before = passed;
        run_also("sh dev/test/runs.sh");
        printf("runs and their files          %4d checks\n", passed - before);
    }
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int before = passed;
        if (!named(argc, argv, tests[i].what)) continue;
        tests[i].test();
        if (passed == before) continue;  // of the other build
        printf("%s: %-22s %4d checks\n", sizeof(real) == sizeof(float) ? "float " : "double",
               tests[i].what, passed - before);
        fflush(stdout);
    }
    if (sizeof(real) == sizeof(float) && argc == 1) {
        char command[4096];
        snprintf(command, sizeof command, "$RUN '%s_double'", argv[0]);
        run_also(command);
    }
    if (!passed && !failed)
        fail(2, "%s: no such group of tests, expected those that all print", argv[1]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

/*
train_gpt2_mla: train a GPT-2 whose attention is multi-head (MHA), grouped- or multi-query
(GQA, MQA) or multi-head latent attention (MLA), on a CPU, in one C file.

HOW TO READ THIS FILE
Part I from top to bottom; it is complete: forward, backward and optimizer of every kind of
attention. Every backward stands under its forward and names the derivative that it implements.
Numbers such as (14) are equations of the writeup, doc/writeup.md, which derives what is only
used here: read its sections 2 to 6 with chapters 3 and 4, 7 to 9 with chapter 5, 10 with chapters
9 and 10. What Part I needs of the other two is declared in chapter 1, each with what it promises;
at a first reading skip that and config_complete.

    PART I    THE MODEL AND HOW IT LEARNS
        1  Ground           numbers, errors, memory, randomness; what the other parts offer
        2  The model        its configuration, the one table of parameter tensors, activations
        3  Layers           linear, norms, GELU, dropout, rotary embedding
        4  Attention core   softmax(q k') v and its backward, for every kind of attention
        5  Projections      how x becomes q, k, v: MHA/GQA/MQA, then MLA
        6  The network      block, head and loss; forward and backward through all of it
        7  Optimizer        AdamW, clipping, learning-rate schedule
        8  Training         validation, a step, the loop
    PART II   DECODING
        9  The cache        what is kept of past tokens, and where
       10  Attention in decoding   one query and a cache; absorption, where MLA becomes MQA
       11  Generation       sampling, one token after the other
    PART III  MACHINERY
       12  Memory           where tensors and activations lie
       13  Matrix product   where nearly all time goes: packed panels and a register tile
       14  Data             token files, text files, tokenizers, batches
       15  Checkpoints      safetensors, written and read
       16  Command line     logs, signals, options, and main
       17  Unicode          letters, numbers and white space, for the tokenizer
       18  Ranks            one training by many processes, over MPI: only with `make MPI=1`

NOTATION (the writeup uses the same)
    B  sequences in a batch      T  tokens in a sequence    N = B*T  tokens in a batch
    L  layers                    C  channels                V  vocabulary size
    NH query heads               NKV key/value heads        HS = C/NH  head size: width of a value
    R  kv_rank                   RQ q_rank                  RD rope_dim
    A query or key is QK = NOPE + rope numbers wide. Position `decoupled` splits rope = RD numbers
    off, which are rotated; NOPE = HS - RD are not, unless --nope-dim says how many. The other
    positions split nothing off: rope = 0, NOPE = HS. (Position `rope` turns the whole head before
    it comes to the attention core, whatever NOPE's name says.)
Arrays are row-major; a comment such as (N, C) gives the shape. Weights are (out, in), as in
PyTorch. The gradient of the loss with respect to x is called dx.

TO ADD YOUR OWN ATTENTION
`grep -n 'ATTENTION [123]'` finds every place that a kind can touch; most touch a few, and with
has_latent and the derived widths of Config a kind with a latent gets through many unchanged:
  - [ATTENTION 1], what it is made of: its name, what its configuration derives and allows, its
    tensors in the table, what its forward keeps, its options;
  - [ATTENTION 2], what it does: a projection, forward and backward (chapter 5), and which heads
    have a rotary key of their own (a head stride of 0: one for all); in the core (chapter 4) where
    keys are put together and their gradients taken apart, if they are more than [k_nope; k_rope];
  - [ATTENTION 3], how it decodes: what a cache keeps of a token, and how a query reads it.
Then add it to `kinds` in test_mla.c, its name to dev/test/bad_input.sh, and run `make test`:
finite differences say whether the backward is right, shifted positions whether every head is
turned, full passes whether decoding is right in every cache. A kind that is added half does not
pass.
*/
#define _XOPEN_SOURCE 700
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined __AMX_BF16__ && defined __linux__  // chapter 13
#include <immintrin.h>
#include <sys/syscall.h>
long syscall(long number, ...);  // unistd.h has it among extensions only
#endif

#if __FINITE_MATH_ONLY__
#error "-Ofast and -ffast-math remove every check for NaN: use -O3"
#endif
_Static_assert(sizeof(long) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "64 bits, little");
#ifdef _OPENMP
#include <omp.h>
#else  // without OpenMP the same code runs on one thread
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_in_parallel(void) { return 0; }
#endif

// ######## PART I: THE MODEL AND HOW IT LEARNS ###################################################

// ==== 1  GROUND =================================================================================
// The scalar type. Training uses float; -DREAL_DOUBLE builds the same program in double, in
// which finite differences check gradients to six digits and more (test_mla.c).
#ifdef REAL_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// Says what is wrong, on one line, and ends the program. Status 1: a file, the machine, the
// numbers, or a call that must not be; status 2: the command line.
__attribute__((noreturn, format(printf, 2, 3)))
static void fail(int status, const char *format, ...);
// The same, and goes on.
__attribute__((format(printf, 1, 2)))
static void warn(const char *format, ...);

static const double PI = 3.14159265358979323846;
static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }
static long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// Memory of `bytes`, zeroed, aligned to a cache line; `what` names it should there be too little.
static void *allocate(size_t bytes, const char *what);

// Randomness without state: number i of stream `key` is a hash of the two (the finalizer of
// SplitMix64: Steele, Lea and Flood 2014). So every random number has an address: dropout is
// the same for any number of threads, and no generator's state needs to be saved.
static const uint64_t STRIDE = 0x9E3779B97F4A7C15u;  // from a number of a stream to the next
static uint64_t random_bits(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * STRIDE;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint32_t hash_bytes(const void *bytes, long n);  // FNV-1a

static double random_uniform(uint64_t key, uint64_t i) {  // in (0, 1]
    return ((random_bits(key, i) >> 11) + 0.5) * 0x1p-53;
}

static double random_normal(uint64_t key, uint64_t i) {  // N(0, 1), by Box and Muller's transform
    double u = random_uniform(key, 2 * i), angle = 2 * PI * random_uniform(key, 2 * i + 1);
    return sqrt(-2 * log(u)) * cos(angle);
}

enum { STREAM_INIT, STREAM_DATA, STREAM_DROPOUT, STREAM_SAMPLE };  // what randomness is for

static uint64_t random_stream(uint64_t seed, int purpose, uint64_t which) {
    return random_bits(random_bits(seed, purpose), which);
}

// --- What Parts I and II use of the others

typedef struct Model Model;
typedef struct Acts Acts;
typedef struct Cache Cache;
typedef struct Tokenizer Tokenizer;
typedef struct Options Options;
typedef struct Step Step;
typedef struct Evaluation Evaluation;

// Chapter 12. Room for the activations of passes over up to B sequences of up to T tokens.
static void model_reserve(Model *m, int B, int T, int training);

// Chapter 13. A matrix by its strides: element (i, j) is p[i*row + j*col], one of row and col
// being 1. Swapping the two transposes. In decoding, b's numbers may be bfloat16: then bf16 has
// them, and p, unless it is NULL, the same numbers before they were rounded.
typedef struct {
    const real *p;
    long row, col;
    const uint16_t *bf16;
} Mat;

static Mat rows_of(const real *p, long row) { return (Mat){p, row, 1, NULL}; }
static Mat transposed(const real *p, long row) { return (Mat){p, 1, row, NULL}; }
static Mat mat_from(Mat a, long i, long j) {  // what lies right of and below element (i, j)
    long at = i * a.row + j * a.col;
    return (Mat){a.p ? a.p + at : NULL, a.row, a.col, a.bf16 ? a.bf16 + at : NULL};
}

// c (M, N) = start + a (M, K) b (K, N), where rows of c are c_row apart:
//     for i < M: for j < N:
//         sum = start ? start[i*start_row + j] : 0
//         for k < K: sum += a(i, k) * b(k, j)
//         c[i*c_row + j] = sum
// `start` is c itself to add to it, or a vector with start_row 0 to add a bias. All threads work,
// so one of several may not call it; the result's bits do not depend on their number.
static void matmul(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                   const real *start, long start_row);

// For products that a thread makes alone. b (K, N) is first packed into panels of NR columns:
// number (k, j) goes to panels[j/NR * NR*K + k*NR + j%NR], room for whole panels being there, and
// for round_up(K, KR) rows (a matrix unit has an order of its own). Then c = start + a b, which may
// use the first K rows only of a b that was packed `depth` rows deep.
static void pack_panels(real *panels, Mat b, int K, int N);
static void multiply_panels(real *c, long c_row, Mat a, const real *panels, long depth,
                            int M, int N, int K, const real *start, long start_row);

// Sizes that the processor's vector registers dictate.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 8 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 8 };
#else
enum { VECTOR_BYTES = 16, MR = 6 };
#endif
enum {
    VW = VECTOR_BYTES / sizeof(real),  // numbers in a vector
    NR = 2 * VW,                       // columns of a panel
    MC = 8 * MR,                       // rows that a thread multiplies at a time: whole tiles
    KR = 16,                           // rows of panels for which there must be room
};

// e^x, as code that compilers turn into vectors; within 2e-7, and x taken as -60 to 60 (float).
static inline real fast_exp(real x);
static real largest(const real *x, int n);  // of n numbers, at least one
// x = e^(scale (x - max)), and their sum: the numerators and the denominator of a softmax.
static real exp_row(real *x, int n, real scale, real max);

// Chapter 14. Tokens, and what they stand for.
typedef struct {
    const char *path;
    uint16_t *tokens;
    long n;
    int largest, text;  // the largest token; whether tokens are a text's bytes
} Data;

// How many bytes a token stands for; -1: not known.
static int token_bytes(const Tokenizer *t, int token);
// Micro-batch number `index` of a run: tokens x (B, T) and the tokens that follow each, y (B, T),
// of data that has enough for one.
static void next_batch(const Data *d, int order, uint64_t seed, long index,
                       int *x, int *y, int B, int T);

// Chapters 15 and 16, for the training loop. What a run reports and leaves behind. What cannot be
// written is said in a line, and the run goes on:
typedef struct Outputs Outputs;
static double seconds(void);
static void print_step(const Step *s, const Options *o, double eta, int stays);  // stays in place
static void print_evaluation(const Evaluation *e);
static void print_end(const Options *o, const Outputs *out, long done, long step, double seconds,
                      double stepping);
static void log_row(Outputs *out, const Model *m, const Options *o, const Step *s,
                    const Evaluation *e, double time);
static void log_validation(Outputs *out, double loss);  // into the last row, which lacks it
// Returns whether it was written. Ends the program, with the file as it was, unless weights and
// moments are finite, and the loss of the batch x, y with them.
static int save_run(Outputs *out, Model *m, const Options *o, const int *x, const int *y,
                    long step);
static int save_best(const Outputs *out, const Model *m, const Options *o, long step, double loss);
// From then on a signal to end sets stop_signal, and the step at hand is finished; another one, a
// second or more later, ends the program at once.
static void catch_signals(void);
static volatile sig_atomic_t stop_signal;

// Chapter 18. Processes that train one model together, each on its rows of every batch, are called
// ranks; [MPI] marks what they need. Without `make MPI=1` there is one, and all of this is empty.
static int rank, ranks = 1;  // which one this is, of how many
static uint64_t numbers_from(uint64_t key, uint64_t n);  // of stream `key`, from number n on
static void expect_sums(int last);             // whether the next backward ends a step's gradients
static void begin_sum(const Model *m, int l);  // then: layer l's; 0: also those outside the layers
static void end_sums(void);                    // waits for them
static void sum_numbers(double *x, int n);     // over the ranks, at once
static int stopping(void);                     // any rank's stop_signal; all ranks ask together

// Part II. Attention of a layer's tokens, projected and turned, to those of m->cache and to
// themselves: heads' outputs into acts->att. What is kept of them is appended.
static void attend_cached(Model *m, int l, Acts *acts, int B, int T);
// A text of the model's own, up to T tokens and 200, printed as it is made.
static Cache *sample_cache(const Model *m, int T);
static void print_sample(Model *m, Cache *cache, const Tokenizer *t, const Options *o, long step);
static void cache_free(Cache *cache);

// ==== 2  THE MODEL ==============================================================================
// [ATTENTION 1] The kinds of attention, by their names on the command line and in checkpoints, and
// the positions that each can take.
enum { MHA, GQA, MQA, MLA, KINDS };
enum { LEARNED, ROPE, DECOUPLED, POSITIONS };
enum { LAYERNORM, RMSNORM, NONE };
static const char *const attention_names[KINDS + 1] = {"mha", "gqa", "mqa", "mla"};
static const char *const position_names[POSITIONS + 1] = {"learned", "rope", "decoupled"};
static const char *const norm_names[] = {"layernorm", "rmsnorm", "none", NULL};
static const char takes_position[KINDS][POSITIONS] = {
    [MHA] = {[LEARNED] = 1, [ROPE] = 1, [DECOUPLED] = 1},
    [GQA] = {[LEARNED] = 1, [ROPE] = 1},
    [MQA] = {[LEARNED] = 1, [ROPE] = 1},
    [MLA] = {[LEARNED] = 1, [DECOUPLED] = 1},
};

// [ATTENTION 1] Everything that fixes the shape of a model. -1 stands for "choose the default".
typedef struct {
    int attention, position, latent_norm;
    int L, NH, NKV, C, block_size, V;  // block_size: the longest sequence
    int RQ, R, RD, NOPE;               // ranks of the latents; parts of a query
    // Derived: widths of a value, of the shared rotary key, of a query
    int HS, rope, QK;
    // and, in numbers per token,
    int q_row;     // NH*QK  all queries
    int kv_row;    // NKV*(NOPE+HS)  keys and values of all key/value heads
    int qkv_row;   // q_row + kv_row + rope  what c_attn makes; 0 with a latent
    int kv_a_row;  // R+rope  the latent and the rotary key; 0 without a latent
    int att_row;   // NH*HS  the heads' outputs
} Config;

// [ATTENTION 1] Whether keys and values are made of a latent, which a decoder may keep instead.
static int has_latent(const Config *c) { return c->attention == MLA; }

// Fills in heads, widths and ranks that were left open (for mla the experiments' defaults RQ = C/2,
// R = 2C/3, RD = HS/2, with which it has about as many parameters as MHA) and refuses what cannot
// be; `where` names its source. [ATTENTION 1] What your kind derives or forbids belongs here.
static void config_complete(Config *c, int status, const char *where) {
    const char *kind = attention_names[c->attention], *position = position_names[c->position];
    if (c->C % c->NH) fail(status, "%s: heads %d does not divide channels %d", where, c->NH, c->C);
    c->HS = c->C / c->NH;

    int fixed = c->attention == MHA ? c->NH : c->attention == MQA ? 1 : -1;
    if (c->NKV == -1)
        c->NKV = fixed != -1 ? fixed : has_latent(c) ? c->NH
               : c->NH >= 8 && c->NH % 4 == 0 ? c->NH / 4 : c->NH % 2 ? 1 : c->NH / 2;
    if (fixed != -1 && c->NKV != fixed)
        fail(status, "%s: kv-heads %d: %s has %d (gqa and mla let you choose)", where, c->NKV, kind,
             fixed);
    if (c->NKV < 1 || c->NH % c->NKV)
        fail(status, "%s: kv-heads %d does not divide heads %d", where, c->NKV, c->NH);

    if (!takes_position[c->attention][c->position]) {
        char expected[64] = "";
        for (int p = 0; p < POSITIONS; p++)
            if (takes_position[c->attention][p])
                strcat(strcat(expected, *expected ? " or " : ""), position_names[p]);
        fail(status, "%s: position %s does not go with attention %s (expected %s)", where, position,
             kind, expected);
    }
    int split = c->position == DECOUPLED;  // a head into a part that is rotated and one that is not
    if (c->position == ROPE && c->HS % 2)
        fail(status, "%s: head size %d: position rope turns pairs, expected an even one", where,
             c->HS);
    int rd = split ? -1 : c->position == ROPE ? c->HS : 0;
    if (c->RD == -1) c->RD = rd != -1 ? rd : max_int(2, c->HS / 4 * 2);  // even
    if (rd != -1 && c->RD != rd)
        fail(status, "%s: rope-dim %d: position %s needs %d", where, c->RD, position, rd);
    if (c->NOPE != -1 && !(split && has_latent(c)))
        fail(status, "%s: nope-dim %d: goes with mla decoupled only", where, c->NOPE);
    if (split && c->NOPE == -1 && c->RD >= c->HS)
        fail(status, "%s: rope-dim %d: expected less than the head size, %d", where, c->RD, c->HS);
    if (split && (c->RD % 2 || c->RD < 2))
        fail(status, "%s: rope-dim %d: expected an even number of at least 2", where, c->RD);
    if (c->NOPE == -1) c->NOPE = split ? c->HS - c->RD : c->HS;
    if (c->NOPE < 1) fail(status, "%s: nope-dim %d: expected at least 1", where, c->NOPE);
    c->rope = split ? c->RD : 0;
    c->QK = c->NOPE + c->rope;

    if (has_latent(c)) {
        if (c->RQ == -1) c->RQ = c->C / 2;
        if (c->R == -1) c->R = max_int(1, 2 * c->C / 3);
        if (c->R < 1 || c->R > c->C)
            fail(status, "%s: kv-rank %d: expected 1 to channels, %d", where, c->R, c->C);
        if (c->RQ < 0 || c->RQ > c->C)
            fail(status, "%s: q-rank %d: expected 0 (no query latent) to channels, %d", where,
                 c->RQ, c->C);
    } else {
        if (c->R > 0 || c->RQ > 0)
            fail(status, "%s: attention %s has no latent: q-rank and kv-rank go with mla", where,
                 kind);
        c->R = c->RQ = 0;
        c->latent_norm = NONE;
    }

    if ((long)c->NH * c->QK > 1 << 24)
        fail(status, "%s: queries of %d heads x %d numbers, expected at most %d together", where,
             c->NH, c->QK, 1 << 24);
    c->q_row = c->NH * c->QK;
    c->kv_row = c->NKV * (c->NOPE + c->HS);
    c->qkv_row = has_latent(c) ? 0 : c->q_row + c->kv_row + c->rope;
    c->kv_a_row = has_latent(c) ? c->R + c->rope : 0;
    c->att_row = c->NH * c->HS;
}

// THE TABLE. It says each parameter tensor's name, shape and initialization once. A tensor of
// one dimension (cols 0) is a bias or a norm weight and is not decayed; one with rows 0 does
// not exist in this configuration; "%d" in a name stands for the layer. Add a tensor here and
// to the enum, and it is allocated, initialized, trained, saved, loaded and tested.
// In DeepSeek's names of MLA's tensors a is the way down, to a latent, and b the way up.
enum {  // [ATTENTION 1]
    WTE, WPE,
    LN1_W, LN1_B,
    ATTN_W, ATTN_B,                              // mha, gqa, mqa
    QA_W, QA_NORM_W, QA_NORM_B, QB_W, Q_W,       // mla, queries
    KVA_W, KVA_NORM_W, KVA_NORM_B, KVB_W,        // mla, keys and values
    APROJ_W, APROJ_B,
    LN2_W, LN2_B,
    FC_W, FC_B, MPROJ_W, MPROJ_B,
    LNF_W, LNF_B,
    TENSORS
};
enum { ZEROS, ONES, NORMAL, RESIDUAL };  // standard deviation 0.02; RESIDUAL: / sqrt(2L) (30)

typedef struct {
    const char *name;
    int rows, cols, init;
} Spec;

// [ATTENTION 1]
static void describe_tensors(const Config *c, Spec spec[TENSORS]) {
    int C = c->C, R = c->R, RQ = c->RQ, latent = has_latent(c);
    int has_weight = c->latent_norm != NONE, has_bias = c->latent_norm == LAYERNORM;
    Spec table[TENSORS] = {
        [WTE]        = {"wte.weight", c->V, C, NORMAL},
        [WPE]        = {"wpe.weight", c->position == LEARNED ? c->block_size : 0, C, NORMAL},
        [LN1_W]      = {"h.%d.ln_1.weight", C, 0, ONES},
        [LN1_B]      = {"h.%d.ln_1.bias", C, 0, ZEROS},
        [ATTN_W]     = {"h.%d.attn.c_attn.weight", c->qkv_row, C, NORMAL},
        [ATTN_B]     = {"h.%d.attn.c_attn.bias", c->qkv_row, 0, ZEROS},
        // W_DQ, its norm, W_UQ (22); Q_W takes their place when q_rank is 0
        [QA_W]       = {"h.%d.attn.q_a_proj.weight", RQ, C, NORMAL},
        [QA_NORM_W]  = {"h.%d.attn.q_a_layernorm.weight", has_weight * RQ, 0, ONES},
        [QA_NORM_B]  = {"h.%d.attn.q_a_layernorm.bias", has_bias * RQ, 0, ZEROS},
        [QB_W]       = {"h.%d.attn.q_b_proj.weight", RQ ? c->q_row : 0, RQ, NORMAL},
        [Q_W]        = {"h.%d.attn.q_proj.weight", latent && !RQ ? c->q_row : 0, C, NORMAL},
        // [W_DKV; W_KR] (20, 23), the latent's norm, W_UKV: per kv head k rows, then v rows (21)
        [KVA_W]      = {"h.%d.attn.kv_a_proj_with_mqa.weight", c->kv_a_row, C, NORMAL},
        [KVA_NORM_W] = {"h.%d.attn.kv_a_layernorm.weight", has_weight * R, 0, ONES},
        [KVA_NORM_B] = {"h.%d.attn.kv_a_layernorm.bias", has_bias * R, 0, ZEROS},
        [KVB_W]      = {"h.%d.attn.kv_b_proj.weight", latent ? c->kv_row : 0, R, NORMAL},
        [APROJ_W]    = {"h.%d.attn.c_proj.weight", C, c->att_row, RESIDUAL},
        [APROJ_B]    = {"h.%d.attn.c_proj.bias", C, 0, ZEROS},
        [LN2_W]      = {"h.%d.ln_2.weight", C, 0, ONES},
        [LN2_B]      = {"h.%d.ln_2.bias", C, 0, ZEROS},
        [FC_W]       = {"h.%d.mlp.c_fc.weight", 4 * C, C, NORMAL},
        [FC_B]       = {"h.%d.mlp.c_fc.bias", 4 * C, 0, ZEROS},
        [MPROJ_W]    = {"h.%d.mlp.c_proj.weight", C, 4 * C, RESIDUAL},
        [MPROJ_B]    = {"h.%d.mlp.c_proj.bias", C, 0, ZEROS},
        [LNF_W]      = {"ln_f.weight", C, 0, ONES},
        [LNF_B]      = {"ln_f.bias", C, 0, ZEROS},
    };
    memcpy(spec, table, sizeof table);
}

// One tensor of one layer; the model lists them all in the order of the table.
typedef struct {
    char name[64];
    int id, layer;        // place in the table; -1: outside the layers
    int rows, cols, init;
    size_t size, offset;  // in params, grads, adam_m and adam_v alike
} Tensor;

// The tensors of one layer by their place in the table: w[l][FC_W] is layer l's c_fc.weight.
// Tensors outside the layers (wte, ln_f) are reached through any layer.
typedef real *Layer[TENSORS];

// [ATTENTION 1] What the forward of one block leaves for its backward. The backward uses the same
// struct, m->d, for their gradients, of all but x_mid and lse; where a vector was turned in place,
// its gradient ends as that of the vector before.
struct Acts {
    real *x;           // (N, C) the block's input: the residual stream
    real *qkv;         // (N, qkv_row) mha, gqa, mqa: all, as rope_heads leaves it
    real *q_a, *q;     // (N, RQ), (N, NH*QK) mla: query latent before its norm; rotated queries
    real *kv_a, *kv;   // (N, R+rope), (N, NKV*(NOPE+HS)) mla: latent before its norm and rotated
                       //     shared key; keys and values
    real *att;         // (N, NH*HS) the heads' outputs
    real *lse;         // (N, NH) log of the softmax's denominator
    real *x_mid;       // (N, C) the residual stream between attention and MLP
    real *fc;          // (N, 4C) before GELU
};

struct Model {
    Config c;
    Tensor *tensors;
    int n_tensors;
    size_t n_params, n_reals;                 // parameters; numbers in each of the four, padded:
    real *params, *grads, *adam_m, *adam_v;   // the last three only when training
    Layer *w, *g;                             // L of each: pointers into params and grads
    real *rope_cos, *rope_sin;                // (block_size, RD/2)
    // Activations, for at most max_N tokens.
    int max_N, max_T, head_rows;
    void *act_memory;              // what these are cut from
    Acts *acts;                    // L of them when training, else one that all layers share
    real *x_final;                 // (N, C) the residual stream after the last block
    real *norm;                    // (N, C) output of the norm at hand
    real *latent, *q_latent;       // (N, R), (N, RQ) normed latents at hand [ATTENTION 1]
    real *gelu;                    // (N, 4C) output of GELU
    real *proj;                    // (N, C) output of a branch, or (dropout) its gradient
    real *logits, *row_loss;       // (head_rows, V) some tokens' logits, then gradient; (head_rows)
    real *rooms;                   // per thread room_size reals, where attention works (chapter 4)
    size_t room_size;
    Acts d;                        // gradients of the acts of the layer at hand
    real *d_norm, *d_latent, *d_q_latent;  // gradients of those without the d_
    real *d_k_rope;                // (N, NKV, rope) gradient of the shared rotary key by kv head
    real *partial;                 // (PIECES, partial_row) for gradients that sum over tokens
    int partial_row;
    float dropout;                 // probability
    int dropping;                  // whether the pass at hand drops: only when training
    uint64_t dropout_key;          // changes with every micro-batch
    // Decoding (Part II); in training 0 and NULL.
    int past;                      // tokens of each sequence that came before those of this pass
    Cache *cache;                  // what is kept of them
};

// Normal numbers of standard deviation 0.02, in residual projections smaller by sqrt(2L); norm
// weights one, biases zero (30).
static void model_init(Model *m, uint64_t seed) {
    for (int i = 0; i < m->n_tensors; i++) {
        Tensor *t = &m->tensors[i];
        uint64_t key = random_stream(seed, STREAM_INIT, hash_bytes(t->name, strlen(t->name)));
        double std = t->init == RESIDUAL ? 0.02 / sqrt(2.0 * m->c.L) : 0.02;
        #pragma omp parallel for
        for (size_t k = 0; k < t->size; k++)
            m->params[t->offset + k] = t->init == ZEROS ? 0 : t->init == ONES ? 1
                                     : (real)(std * random_normal(key, k));
    }
}

// ==== 3  LAYERS =================================================================================
// Backwards ADD to the gradients of parameters, so that micro-batches accumulate. Of activations:
// linear_backward overwrites dx unless told to add; norm_backward always adds, so its target holds
// the residual stream's gradient, or is zeroed first; attention_backward overwrites; gelu_backward
// and rotate work in place.
// Where a sum over tokens is no matrix product (biases, norm weights), the tokens are cut into
// PIECES fixed pieces whose sums are then added in order: the result does not depend on the number
// of threads.

enum { PIECES = 32 };
// A loop over fewer numbers runs on one thread, since waking others takes longer.
enum { SMALL = 8192 };

// How many of a loop's n numbers each thread takes: one range, which after a matrix product is
// about the rows that it computed and still has in its cache. A multiple of 1024, so that where a
// vector loop ends, and with it the last bit of a result, does not depend on the number of threads.
static inline long range_of_thread(long n) {
    return round_up((n - 1) / omp_get_max_threads() + 1, 1024);
}

// Room for the pieces' sums, `row` numbers each.
static real *sums_of_pieces(const Model *m, int row) {
    if (row > m->partial_row)
        fail(1, "a gradient of %d sums over tokens: expected at most %d, twice the widest bias or "
             "norm in the table of tensors", row, m->partial_row);
    return m->partial;
}

// out[i] += sum over pieces of partial[piece][i], i < n
static void add_pieces(real *out, const real *partial, long partial_row, int n) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        real sum = 0;
        for (int p = 0; p < PIECES; p++) sum += partial[p * partial_row + i];
        out[i] += sum;
    }
}

// --- Linear: y = x W' + b (8)                      y (N, O), x (N, I), W (O, I), b (O) or NULL

static void linear_forward(real *y, const real *x, const real *w, const real *b,
                           int N, int I, int O) {
    matmul(y, O, rows_of(x, I), transposed(w, I), N, O, I, b, 0);
}

// y was x W' + b, so dx = dy W (8); with `add`, dx += dy W
static void linear_backward_input(real *dx, const real *dy, const real *w,
                                  int N, int I, int O, int add) {
    matmul(dx, I, rows_of(dy, O), rows_of(w, I), N, I, O, add ? dx : NULL, I);
}

// and dW += dy' x, db += sum of dy over tokens (8)
static void linear_backward_weight(const Model *m, real *dw, real *db, const real *dy,
                                   const real *x, int N, int I, int O) {
    matmul(dw, I, transposed(dy, O), rows_of(x, I), O, I, N, dw, I);
    if (!db) return;
    real *sums = sums_of_pieces(m, O);
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        real *sum = sums + (long)p * O;
        memset(sum, 0, O * sizeof(real));
        for (long t = (long)N * p / PIECES; t < (long)N * (p + 1) / PIECES; t++)
            for (int i = 0; i < O; i++) sum[i] += dy[t * O + i];
    }
    add_pieces(db, sums, O, O);
}

// Both: dx = dy W, or += with `add`; dW and db add up.
static void linear_backward(const Model *m, real *dx, int add, real *dw, real *db, const real *dy,
                            const real *x, const real *w, int N, int I, int O) {
    linear_backward_weight(m, dw, db, dy, x, N, I, O);
    linear_backward_input(dx, dy, w, N, I, O, add);
}

// --- Norms over the last n numbers: y = w (x - mean) rstd + b (2), RMSNorm without mean and b (4)

// rstd = 1 / sqrt(variance + eps), or of the mean square for RMSNorm, whose mean counts as 0.
static void norm_statistics(const real *x, int n, int kind, real *mean, real *rstd) {
    real sum = 0, square = 0;
    if (kind == LAYERNORM) {
        #pragma omp simd reduction(+:sum)
        for (int i = 0; i < n; i++) sum += x[i];
    }
    real mu = sum / n;
    #pragma omp simd reduction(+:square)
    for (int i = 0; i < n; i++) square += (x[i] - mu) * (x[i] - mu);
    *mean = mu;
    *rstd = 1 / (real)sqrt(square / n + (kind == LAYERNORM ? (real)1e-5 : (real)1e-6));
}

// y (N, n) from x (N, n) whose rows are x_row apart, by (2) or (4); w, b (n).
static void norm_forward(real *y, const real *x, long x_row, const real *w, const real *b, int N,
                         int n, int kind) {
    #pragma omp parallel for if (N > 1)
    for (int t = 0; t < N; t++) {
        const real *xt = x + t * x_row;
        real *yt = y + (long)t * n, mean, rstd;
        if (kind == NONE) {
            memcpy(yt, xt, n * sizeof(real));
            continue;
        }
        norm_statistics(xt, n, kind, &mean, &rstd);
        for (int i = 0; i < n; i++) yt[i] = w[i] * ((xt[i] - mean) * rstd);
        for (int i = 0; b && i < n; i++) yt[i] += b[i];
    }
}

// y was w x^ + b with x^ = (x - mean) rstd. So, with g = w dy,
//   dx += rstd (g - mean(g) - x^ mean(g x^)) (3); RMSNorm lacks mean(g) (5)
//   dw += sum over tokens of dy x^, db += sum of dy
static void norm_backward(const Model *m, real *dx, real *dw, real *db, const real *dy,
                          const real *x, long x_row, const real *w, int N, int n, int kind) {
    real *sums = sums_of_pieces(m, 2 * n);
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        real *sum_w = sums + 2L * p * n, *sum_b = sum_w + n;
        memset(sum_w, 0, 2 * n * sizeof(real));
        for (long t = (long)N * p / PIECES; t < (long)N * (p + 1) / PIECES; t++) {
            const real *xt = x + t * x_row, *dyt = dy + t * n;
            real *dxt = dx + t * x_row, mean, rstd, mean_g = 0, mean_gx = 0;
            if (kind == NONE) {
                for (int i = 0; i < n; i++) dxt[i] += dyt[i];
                continue;
            }
            norm_statistics(xt, n, kind, &mean, &rstd);
            #pragma omp simd reduction(+:mean_g, mean_gx)
            for (int i = 0; i < n; i++) {
                real xhat = (xt[i] - mean) * rstd, g = w[i] * dyt[i];
                mean_g += g;
                mean_gx += g * xhat;
                sum_w[i] += dyt[i] * xhat;
                sum_b[i] += dyt[i];
            }
            mean_g = kind == LAYERNORM ? mean_g / n : 0;
            mean_gx /= n;
            for (int i = 0; i < n; i++)
                dxt[i] += rstd * (w[i] * dyt[i] - mean_g - (xt[i] - mean) * rstd * mean_gx);
        }
    }
    if (dw) add_pieces(dw, sums, 2 * n, n);
    if (db) add_pieces(db, sums + n, 2 * n, n);
}

// --- GELU, tanh form: y = x/2 (1 + tanh u) = x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), where
//     s(z) = 1 / (1 + e^-z), since 1 + tanh u = 2 s(2u) (6)

#define GELU_2U(x) ((real)1.5957691216057308 * ((x) + (real)0.044715 * (x) * (x) * (x)))

static void gelu_forward(real *y, const real *x, long n) {
    #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
    for (long i = 0; i < n; i++) y[i] = x[i] / (1 + fast_exp(-GELU_2U(x[i])));
}

// y was x s(2u), so dx = dy (s + x s (1 - s) (2u)') (7), over dy in place. Overwrites x with y,
// which was not kept and which the gradient of the MLP's c_proj needs: x s costs one
// multiplication, as s is at hand.
static void gelu_backward(real *dy, real *x, long n) {
    #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
    for (long i = 0; i < n; i++) {
        real s = 1 / (1 + fast_exp(-GELU_2U(x[i])));
        real slope = (real)1.5957691216057308 * (1 + (real)0.134145 * x[i] * x[i]);
        dy[i] *= s + x[i] * s * (1 - s) * slope;
        x[i] *= s;
    }
}

// --- Dropout: a number is dropped with probability p, else scaled by 1/(1-p). Whether number i
//     of place `where` is dropped is a hash of both: forward and backward agree without a mask.

static inline real dropout_scale(const Model *m, uint64_t where, long i) {
    uint32_t threshold = (uint32_t)(m->dropout * 4294967296.0);
    return (random_bits(m->dropout_key + where, i) >> 32) < threshold ? 0 : 1 / (1 - m->dropout);
}

// y = x + dropout(branch), n numbers: the residual connection (1)
static void residual_forward(const Model *m, real *y, const real *x, const real *branch,
                             long n, int where) {
    if (!m->dropping) {
        #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
        for (long i = 0; i < n; i++) y[i] = x[i] + branch[i];
    } else {
        #pragma omp parallel for schedule(static, range_of_thread(n))
        for (long i = 0; i < n; i++) y[i] = x[i] + branch[i] * dropout_scale(m, where, i);
    }
}

// y was x + dropout(branch): the branch's gradient is dropout(dy), x's is dy itself (1a). Without
// dropout so is the branch's, and what is returned IS dy: to be used before dy is added to.
static const real *residual_backward(const Model *m, real *d_branch, const real *dy, long n,
                                     int where) {
    if (!m->dropping) return dy;
    #pragma omp parallel for schedule(static, range_of_thread(n))
    for (long i = 0; i < n; i++) d_branch[i] = dy[i] * dropout_scale(m, where, i);
    return d_branch;
}

// --- Rotary embedding

// Numbers by token and head: those of head h of token t start at p + t*token + h*head. A head
// stride of 0 means one for all heads.
typedef struct {
    real *p;
    long token, head;
} View;

static real *head_at(View x, long t, int h) { return x.p + t * x.token + h * x.head; }

// cos and sin (block_size, RD/2) of the angles t theta^(-2i/RD), theta = 10000 (17)
static void rope_table(Model *m) {
    int half = m->c.RD / 2;
    for (int t = 0; t < m->c.block_size; t++)
        for (int i = 0; i < half; i++) {
            double angle = t * pow(10000.0, -2.0 * i / m->c.RD);
            m->rope_cos[(long)t * half + i] = cos(angle);
            m->rope_sin[(long)t * half + i] = sin(angle);
        }
}

// Turns the pair (a, b) = (i, i + RD/2) of every head by the angle t theta^(-2i/RD), t the token's
// position (17):  a -> a cos - b sin,  b -> b cos + a sin.  The backward is the turn by the
// opposite angle (18): sign -1. x (N, heads, RD) at positions past .. past+T-1, N a multiple of T.
static void rotate(const Model *m, View x, int heads, int N, int T, int sign) {
    int half = m->c.RD / 2;
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const real *c = m->rope_cos + (long)(m->past + n % T) * half;
        const real *s = m->rope_sin + (long)(m->past + n % T) * half;
        for (int h = 0; h < heads; h++) {
            real *lo = head_at(x, n, h), *hi = lo + half;
            for (int i = 0; i < half; i++) {
                real a = lo[i], b = hi[i];
                lo[i] = a * c[i] - sign * b * s[i];
                hi[i] = b * c[i] + sign * a * s[i];
            }
        }
    }
}

// ==== 4  ATTENTION CORE =========================================================================
//
// One core serves every kind. A query head is [q_nope; q_rope], of which the second may be empty;
// query head h reads key/value head h / (NH/NKV) (16); the rotary part of the keys is one for all
// heads. In this chapter q_i and k_j are the joined vectors, QK numbers wide:
//     score_ij = s_ij / sqrt(QK),  s_ij = q_i . k_j = q_nope_i . k_nope_j + q_rope_i . k_rope_j,
//                                                                        j <= i       (11)
//     p_ij   = e^(score_ij - lse_i),  lse_i = log sum_j e^score_ij                    (12)
//     out_i  = sum_j p_ij v_j                                                         (13)
// MHA, GQA, MQA and MLA differ only in where these views point.
//
// The T x T matrix of probabilities is never kept. The core works on a strip at a time, STRIP
// queries against all keys they may see, small enough for the second-level cache; what the
// backward needs of it is one number per query, lse, from which it makes p again.

// Queries handled at once; queries in a thread's unit of work in the forward, whose strips share
// the packed keys.
enum { STRIP = MC / 2, UNIT = 8 * STRIP };

typedef struct {
    int heads, kv_heads;     // NH, NKV
    int nope, rope, value;   // widths of q_nope, q_rope and v
    View q, k, k_rope, v;    // (N, NH, nope+rope), (N, NKV, nope), (N, 1, rope), (N, NKV, value)
} Heads;

// The matrix (tokens from t on, width) of head h.
static Mat tokens_of(View x, long t, int h) { return rows_of(head_at(x, t, h), x.token); }

static real score_scale(const Config *c) { return 1 / (real)sqrt(c->QK); }  // (11)

// Where a thread works. QK = nope + rope, HS = value.
typedef struct {
    real *s, *ds;       // (STRIP, row) scores, then what softmax makes of them; their gradient
    long row;           // at least T in whole vectors, and no multiple of 32, so that a column
                        //     spreads over all of a cache
    real *keys, *dk;    // (T, QK) each key's two parts joined; their gradient
    // All others are in panels.
    real *kt, *vt;      // k' (QK, T), v' (HS, T)
    real *k, *v;        // (T, QK), (T, HS)
    real *q, *d_out;    // (STRIP, QK), (STRIP, HS)
} Room;

// That of the calling thread, for sequences of T tokens (chapter 12).
static Room room_of_thread(const Model *m, const Heads *a, int T);

// [ATTENTION 2] The keys of T tokens, each [k_nope; k_rope] as queries are, into r->keys, and their
// transpose into r->kt.
static void join_keys(Room *r, const Heads *a, long first, int g, int T) {
    int QK = a->nope + a->rope;
    for (int t = 0; t < T; t++) {
        real *k = r->keys + t * QK;
        memcpy(k, head_at(a->k, first + t, g), a->nope * sizeof(real));
        memcpy(k + a->nope, head_at(a->k_rope, first + t, g), a->rope * sizeof(real));
    }
    pack_panels(r->kt, transposed(r->keys, QK), QK, T);
}

// Queries i0 .. i0+rows-1 of head h of the sequence that starts at token `first`, whose keys and
// values up to `packed` lie in r.
static void forward_strip(const Model *m, const Heads *a, const Room *r, View out, real *lse,
                          long first, int h, int i0, int rows, int packed) {
    int QK = a->nope + a->rope, HS = a->value, keys = i0 + rows;
    real scale = score_scale(&m->c), sums[STRIP];
    Mat q = tokens_of(a->q, first + i0, h);
    real *o = head_at(out, first + i0, h);
    // s = q k' (11)
    multiply_panels(r->s, r->row, q, r->kt, QK, rows, keys, QK, NULL, 0);
    for (int i = 0; i < rows; i++) {
        // keys 0 .. i0+i; a loop's last few numbers, one by one, would take longer than a vector
        int seen = i0 + i + 1, whole = round_up(seen, VW);
        real *si = r->s + i * r->row;
        for (int j = seen; j < whole; j++) si[j] = -INFINITY;  // exp_row makes e^-60 of it
        real max = largest(si, whole);
        sums[i] = exp_row(si, whole, scale, max);  // p, not yet divided by its sum (12)
        for (int j = seen; j < keys; j++) si[j] = 0;
        lse[(first + i0 + i) * a->heads + h] = scale * max + (real)log(sums[i]);
    }
    // out = p v (13)
    multiply_panels(o, out.token, rows_of(r->s, r->row), r->v, packed, rows, HS, keys, NULL, 0);
    for (int i = 0; i < rows; i++)
        for (int e = 0; e < HS; e++) o[i * out.token + e] *= 1 / sums[i];
}

// out (N, NH, HS), lse (N, NH): B sequences of T tokens each
static void attention_forward(const Model *m, const Heads *a, View out, real *lse, int B, int T) {
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < a->heads; h++)
            for (int i1 = 0; i1 < T; i1 += UNIT) {
                int g = h / (a->heads / a->kv_heads), end = min_int(T, i1 + UNIT);  // (16)
                long first = (long)b * T;
                Room r = room_of_thread(m, a, T);
                join_keys(&r, a, first, g, end);
                pack_panels(r.v, tokens_of(a->v, first, g), end, a->value);
                for (int i0 = i1; i0 < end; i0 += STRIP)
                    forward_strip(m, a, &r, out, lse, first, h, i0, min_int(STRIP, end - i0), end);
            }
}

// out_i was sum_j p_ij v_j, with p_ij made of s_ij = q_i . k_j. From d_out, with p made again from
// lse, a strip of queries gives (14):
//     dv_j += sum_i p_ij d_out_i                    dp_ij = d_out_i . v_j
//     ds_ij = p_ij (dp_ij - D_i) / sqrt(QK),        D_i = sum_j p_ij dp_ij = d_out_i . out_i
//     dq_i  = sum_j ds_ij k_j                       dk_j += sum_i ds_ij q_i
static void backward_strip(const Model *m, const Heads *a, const Heads *d, const Room *r, View out,
                           View d_out, const real *lse, long first, int h, int g, int i0, int rows,
                           int T) {
    int QK = a->nope + a->rope, HS = a->value, keys = i0 + rows;
    real scale = score_scale(&m->c);
    long q0 = first + i0;
    Mat q = tokens_of(a->q, q0, h), d_o = tokens_of(d_out, q0, h);
    // s = q k' (11); dp = d_out v', in the place of ds
    multiply_panels(r->s, r->row, q, r->kt, QK, rows, keys, QK, NULL, 0);
    multiply_panels(r->ds, r->row, d_o, r->vt, HS, rows, keys, HS, NULL, 0);
    for (int i = 0; i < rows; i++) {
        real *si = r->s + i * r->row, *dsi = r->ds + i * r->row, D = 0;
        const real *oi = head_at(out, q0 + i, h), *d_oi = head_at(d_out, q0 + i, h);
        real li = lse[(q0 + i) * a->heads + h];
        int seen = i0 + i + 1;
        #pragma omp simd reduction(+:D)
        for (int e = 0; e < HS; e++) D += oi[e] * d_oi[e];
        #pragma omp simd
        for (int j = 0; j < round_up(seen, VW); j++) {
            si[j] = fast_exp(scale * si[j] - li);         // p (12)
            dsi[j] = scale * si[j] * (dsi[j] - D);        // ds
        }
        for (int j = seen; j < keys; j++) si[j] = dsi[j] = 0;
    }
    pack_panels(r->q, q, rows, QK);
    pack_panels(r->d_out, d_o, rows, HS);
    Mat pt = transposed(r->s, r->row), ds = rows_of(r->ds, r->row), dst = transposed(r->ds, r->row);
    real *dv = head_at(d->v, first, g), *dq = head_at(d->q, q0, h);
    // dv += p' d_out;  dq = ds k;  dk += ds' q
    multiply_panels(dv, d->v.token, pt, r->d_out, rows, keys, HS, rows, dv, d->v.token);
    multiply_panels(dq, d->q.token, ds, r->k, T, rows, QK, keys, NULL, 0);
    multiply_panels(r->dk, QK, dst, r->q, rows, keys, QK, rows, r->dk, QK);
}

// d holds views of the gradients, which are overwritten. A thread owns a key/value head with all
// its query heads, so d->k_rope has a row per key/value head: (N, NKV, rope).
static void attention_backward(const Model *m, const Heads *a, const Heads *d, View out, View d_out,
                               const real *lse, int B, int T) {
    int group = a->heads / a->kv_heads, QK = a->nope + a->rope, HS = a->value;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int g = 0; g < a->kv_heads; g++) {
            long first = (long)b * T;
            Room r = room_of_thread(m, a, T);
            join_keys(&r, a, first, g, T);
            pack_panels(r.k, rows_of(r.keys, QK), T, QK);
            pack_panels(r.vt, transposed(head_at(a->v, first, g), a->v.token), HS, T);
            memset(r.dk, 0, sizeof(real) * T * QK);
            for (int t = 0; t < T; t++)
                memset(head_at(d->v, first + t, g), 0, HS * sizeof(real));
            for (int h = g * group; h < (g + 1) * group; h++)
                for (int i0 = 0; i0 < T; i0 += STRIP)
                    backward_strip(m, a, d, &r, out, d_out, lse, first, h, g, i0,
                                   min_int(STRIP, T - i0), T);
            for (int t = 0; t < T; t++) {  // [ATTENTION 2] dk's two parts, each to its place
                const real *dk = r.dk + t * QK;
                memcpy(head_at(d->k, first + t, g), dk, a->nope * sizeof(real));
                memcpy(head_at(d->k_rope, first + t, g), dk + a->nope, a->rope * sizeof(real));
            }
        }
}

// ==== 5  PROJECTIONS ============================================================================
//
// A projection makes q, k and v from the normed residual stream, m->norm (N, C), says where they
// lie (heads_of), and carries their gradients back to d_norm and its weights. With a latent it has
// two steps, since a decoder may keep the latent: `project`, and `up_project` from latent to k, v.
// In this chapter's formulas x is that normed stream and dx is d_norm; c is the latent. A bar (c_)
// marks what is not yet normed or turned, as in the writeup.

// [ATTENTION 2] Where queries, keys and values lie in `acts`, or their gradients in m->d.
static Heads heads_of(const Model *m, const Acts *acts) {
    const Config *c = &m->c;
    int NKV = c->NKV, NOPE = c->NOPE, HS = c->HS;
    Heads a = {.heads = c->NH, .kv_heads = NKV, .nope = NOPE, .rope = c->rope, .value = HS};
    if (has_latent(c)) {
        a.q = (View){acts->q, c->q_row, c->QK};
        a.k = (View){acts->kv, c->kv_row, NOPE + HS};
        a.v = (View){acts->kv + NOPE, c->kv_row, NOPE + HS};
        a.k_rope = (View){acts->kv_a + c->R, c->kv_a_row, 0};
    } else {
        int k = c->q_row, k_rope = k + NKV * NOPE, v = k_rope + c->rope, row = c->qkv_row;
        a.q = (View){acts->qkv, row, c->QK};
        a.k = (View){acts->qkv + k, row, NOPE};
        a.k_rope = (View){acts->qkv + k_rope, row, 0};
        a.v = (View){acts->qkv + v, row, HS};
    }
    return a;
}

// [ATTENTION 2] Turns queries and keys to their positions (17, 19), or (sign -1) their gradients
// back (18). No key that is yet to be made of a latent is turned: `rope` never goes with a latent.
static void rope_heads(const Model *m, const Heads *a, int N, int T, int sign) {
    if (m->c.position == ROPE) {  // the whole of every head
        rotate(m, a->q, a->heads, N, T, sign);
        rotate(m, a->k, a->kv_heads, N, T, sign);
    } else if (m->c.position == DECOUPLED) {  // the last RD of a query head, the shared key
        rotate(m, (View){a->q.p + a->nope, a->q.token, a->q.head}, a->heads, N, T, sign);
        rotate(m, a->k_rope, 1, N, T, sign);
    }
}

// --- MHA, GQA, MQA: one matrix makes all, [q_; k_; k_rope_; v] = W x + b (15)

static void qkv_forward(Model *m, int l, Acts *acts, int N) {
    const Config *c = &m->c;
    linear_forward(acts->qkv, m->norm, m->w[l][ATTN_W], m->w[l][ATTN_B], N, c->C, c->qkv_row);
}

static void qkv_backward(Model *m, int l, int N) {
    real **w = m->w[l], **g = m->g[l];
    int C = m->c.C, row = m->c.qkv_row;
    linear_backward(m, m->d_norm, 0, g[ATTN_W], g[ATTN_B], m->d.qkv, m->norm, w[ATTN_W], N, C, row);
}

// --- MLA: queries and keys/values each pass through a narrow latent

// The normed latents, which the forward does not keep: latent (N, R), q_latent (N, RQ).
static void mla_latents(Model *m, int l, const Acts *acts, int N) {
    const Config *c = &m->c;
    real **w = m->w[l];
    norm_forward(m->latent, acts->kv_a, c->kv_a_row, w[KVA_NORM_W], w[KVA_NORM_B], N, c->R,
                 c->latent_norm);
    if (c->RQ)
        norm_forward(m->q_latent, acts->q_a, c->RQ, w[QA_NORM_W], w[QA_NORM_B], N, c->RQ,
                     c->latent_norm);
}

// [ATTENTION 2] [c_; k_rope_] = [W_DKV; W_KR] x, side by side in kv_a, and c = norm(c_) (20, 23)
// q_ = W_UQ norm(W_DQ x) (22), or W_Q x
static void mla_forward(Model *m, int l, Acts *acts, int N) {
    const Config *c = &m->c;
    real **w = m->w[l];
    linear_forward(acts->kv_a, m->norm, w[KVA_W], NULL, N, c->C, c->kv_a_row);
    if (c->RQ) linear_forward(acts->q_a, m->norm, w[QA_W], NULL, N, c->C, c->RQ);
    mla_latents(m, l, acts, N);
    if (c->RQ) linear_forward(acts->q, m->q_latent, w[QB_W], NULL, N, c->RQ, c->q_row);
    else linear_forward(acts->q, m->norm, w[Q_W], NULL, N, c->C, c->q_row);
}

// [ATTENTION 2] Called at the end of attention_block_backward. By then d.kv holds [dk_nope; dv],
// d.q the gradient of q_, and the last columns of d.kv_a that of k_rope_ (23d). The latents are
// made again; then keys and values go from the last step of the forward to the first, and the
// queries likewise.
static void mla_backward(Model *m, int l, const Acts *acts, int N) {
    const Config *c = &m->c;
    real **w = m->w[l], **g = m->g[l];
    int C = c->C, R = c->R, RQ = c->RQ, q_row = c->q_row, kv_row = c->kv_row, kv_a = c->kv_a_row;
    mla_latents(m, l, acts, N);
    // [k_nope; v] was W_UKV c:  dW_UKV += [dk_nope; dv]' c (23a),  dc = [dk_nope; dv] W_UKV (23b)
    linear_backward(m, m->d_latent, 0, g[KVB_W], NULL, m->d.kv, m->latent, w[KVB_W], N, R, kv_row);
    // c was norm(c_):  dc_ through the norm, to the first columns of d.kv_a, which it adds to (23c)
    for (long t = 0; t < N; t++) memset(m->d.kv_a + t * kv_a, 0, R * sizeof(real));
    norm_backward(m, m->d.kv_a, g[KVA_NORM_W], g[KVA_NORM_B], m->d_latent, acts->kv_a, kv_a,
                  w[KVA_NORM_W], N, R, c->latent_norm);
    // [c_; k_rope_] was [W_DKV; W_KR] x:  dW_DKV and dW_KR (23e), one tensor; the first two terms
    // of dx (23f)
    linear_backward(m, m->d_norm, 0, g[KVA_W], NULL, m->d.kv_a, m->norm, w[KVA_W], N, C, kv_a);
    // q_ was W_UQ norm(W_DQ x): the same steps; the third term of dx is added.
    if (RQ) {
        linear_backward(m, m->d_q_latent, 0, g[QB_W], NULL, m->d.q, m->q_latent, w[QB_W], N, RQ,
                        q_row);
        memset(m->d.q_a, 0, (size_t)N * RQ * sizeof(real));
        norm_backward(m, m->d.q_a, g[QA_NORM_W], g[QA_NORM_B], m->d_q_latent, acts->q_a, RQ,
                      w[QA_NORM_W], N, RQ, c->latent_norm);
        linear_backward(m, m->d_norm, 1, g[QA_W], NULL, m->d.q_a, m->norm, w[QA_W], N, C, RQ);
    } else
        linear_backward(m, m->d_norm, 1, g[Q_W], NULL, m->d.q, m->norm, w[Q_W], N, C, q_row);
}

// --- What every kind shares: proj = c_proj(attention(norm))

// [ATTENTION 2] Queries, and keys and values or the latent that they come from; then the rest.
static void project(Model *m, int l, Acts *acts, int N) {
    if (has_latent(&m->c)) mla_forward(m, l, acts, N);
    else qkv_forward(m, l, acts, N);
}

// [k_nope; v] = W_UKV c for every key/value head (21)
static void up_project(Model *m, int l, Acts *acts, int N) {
    if (!has_latent(&m->c)) return;
    linear_forward(acts->kv, m->latent, m->w[l][KVB_W], NULL, N, m->c.R, m->c.kv_row);
}

static void project_backward(Model *m, int l, const Acts *acts, int N) {
    if (has_latent(&m->c)) mla_backward(m, l, acts, N);
    else qkv_backward(m, l, N);
}

static void attention_block_forward(Model *m, int l, Acts *acts, int B, int T) {
    const Config *c = &m->c;
    int N = B * T;
    project(m, l, acts, N);
    Heads a = heads_of(m, acts);
    rope_heads(m, &a, N, T, 1);
    if (m->cache) attend_cached(m, l, acts, B, T);
    else {
        up_project(m, l, acts, N);
        attention_forward(m, &a, (View){acts->att, c->att_row, c->HS}, acts->lse, B, T);
    }
    linear_forward(m->proj, acts->att, m->w[l][APROJ_W], m->w[l][APROJ_B], N, c->att_row, c->C);
}

// THE WAY OF A GRADIENT, from d_proj (N, C) to d_norm:
//     through c_proj (8)                     to d.att (N, NH*HS)
//     attention_backward (14)                to d.q and, per head, [dk_nope; dv] in d.kv (without
//                                            a latent: all in d.qkv); d_k_rope (N, NKV, rope)
//     the sum over heads, turned back (23d)  to the last columns of d.kv_a
//     project_backward (23a to 23f, or 8)    to d_norm
// It finds its places as the forward does: `d` are views of m->d as `a` are of acts.
static void attention_block_backward(Model *m, int l, Acts *acts, const real *d_proj,
                                     int B, int T) {
    const Config *c = &m->c;
    real **w = m->w[l], **g = m->g[l];
    int N = B * T, row = c->att_row, rope = c->rope;
    linear_backward(m, m->d.att, 0, g[APROJ_W], g[APROJ_B], d_proj, acts->att, w[APROJ_W], N, row,
                    c->C);

    Heads a = heads_of(m, acts), d = heads_of(m, &m->d), d_by_head = d;
    View out = {acts->att, row, c->HS}, d_out = {m->d.att, row, c->HS};
    d_by_head.k_rope = (View){m->d_k_rope, c->NKV * rope, rope};  // the one difference from d
    attention_backward(m, &a, &d_by_head, out, d_out, acts->lse, B, T);
    #pragma omp parallel for  // [ATTENTION 2]
    for (int t = 0; t < N; t++)  // the rotary key is one for all heads: its gradient is their sum
        for (int i = 0; i < rope; i++) {
            real sum = 0;
            for (int h = 0; h < c->NKV; h++) sum += head_at(d_by_head.k_rope, t, h)[i];
            head_at(d.k_rope, t, 0)[i] = sum;
        }
    rope_heads(m, &d, N, T, -1);  // turning the sum back is turning each head's back (23d)
    project_backward(m, l, acts, N);
}

// ==== 6  THE NETWORK ============================================================================
// --- Embedding: x = dropout(wte[token] + wpe[position])          dropout's place 0

static void embedding_forward(Model *m, real *x, const int *tokens, int N, int T) {
    int C = m->c.C;
    const real *wte = m->w[0][WTE], *wpe = m->w[0][WPE];
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++)
        for (int i = 0; i < C; i++) {
            real sum = wte[(long)tokens[n] * C + i] + (wpe ? wpe[(m->past + n % T) * C + i] : 0);
            x[n * C + i] = m->dropping ? sum * dropout_scale(m, 0, n * C + i) : sum;
        }
}

// dwte[token] += dx, dwpe[position] += dx. Tokens repeat, so threads share out the columns.
static void embedding_backward(Model *m, const int *tokens, int N, int T) {
    enum { OWN = 16 };  // columns to a thread's unit of work
    int C = m->c.C;
    const real *dx = residual_backward(m, m->proj, m->d.x, (long)N * C, 0);
    real *dwte = m->g[0][WTE], *dwpe = m->g[0][WPE];
    #pragma omp parallel for
    for (int i0 = 0; i0 < C; i0 += OWN)
        for (long n = 0; n < N; n++)
            for (int i = i0; i < min_int(C, i0 + OWN); i++) {
                dwte[(long)tokens[n] * C + i] += dx[n * C + i];
                if (dwpe) dwpe[(n % T) * C + i] += dx[n * C + i];
            }
}

// WHERE ACTIVATIONS LIVE when training. (Else all layers share one set, and GELU's output has a
// place of its own.) From a layer's forward to its backward it keeps, of its own, x, qkv or q_a to
// kv, att, lse, x_mid and fc. All layers share the rest; a cell names what an array holds then, and
// "." says that nobody needs it:
//
//     array     forward: attention   MLP        | backward: MLP              attention
//     fc                 .           fc         | fc, then gelu(fc)          .
//     d.fc               .           gelu(fc)   | d.fc                       d.qkv, d.q_a to d.att
//     norm               LN(x)       LN(x_mid)  | LN(x_mid), made again      LN(x), made again
//     proj               its output  its output | under dropout the gradient of each one's output
//     d.x                .           .          | dy, then d x_mid           d x_mid, then d x
//     d_norm             .           .          | d LN(x_mid)                d LN(x)
//     latent, q_latent   normed      .          | .                          normed, made again
//
// d.fc's place serves three that never live together: GELU's output (m->gelu), its gradient, and
// the gradients of attention.

// --- Block (1): x_mid = x + dropout(attention(LN x)), y = x_mid + dropout(MLP(LN x_mid))
//     dropout's places 2l+1 and 2l+2

static void block_forward(Model *m, int l, Acts *acts, real *y, int B, int T) {
    real **w = m->w[l];
    int N = B * T, C = m->c.C;
    norm_forward(m->norm, acts->x, C, w[LN1_W], w[LN1_B], N, C, LAYERNORM);
    attention_block_forward(m, l, acts, B, T);
    residual_forward(m, acts->x_mid, acts->x, m->proj, (long)N * C, 2 * l + 1);

    norm_forward(m->norm, acts->x_mid, C, w[LN2_W], w[LN2_B], N, C, LAYERNORM);
    linear_forward(acts->fc, m->norm, w[FC_W], w[FC_B], N, C, 4 * C);
    gelu_forward(m->gelu, acts->fc, (long)N * 4 * C);
    linear_forward(m->proj, m->gelu, w[MPROJ_W], w[MPROJ_B], N, 4 * C, C);
    residual_forward(m, y, acts->x_mid, m->proj, (long)N * C, 2 * l + 2);
}

// y was x_mid + dropout(MLP(LN x_mid)), x_mid was x + dropout(attention(LN x)). So d.x goes in as
// the gradient of y and comes out as that of x (1a): along the residual stream it just passes, and
// each branch adds its own. Norm outputs were not kept: each is made again first.
static void block_backward(Model *m, int l, Acts *acts, int B, int T) {
    real **w = m->w[l], **g = m->g[l];
    int N = B * T, C = m->c.C;
    norm_forward(m->norm, acts->x_mid, C, w[LN2_W], w[LN2_B], N, C, LAYERNORM);
    const real *d_proj = residual_backward(m, m->proj, m->d.x, (long)N * C, 2 * l + 2);
    linear_backward_input(m->d.fc, d_proj, w[MPROJ_W], N, 4 * C, C, 0);
    gelu_backward(m->d.fc, acts->fc, (long)N * 4 * C);
    linear_backward_weight(m, g[MPROJ_W], g[MPROJ_B], d_proj, acts->fc, N, 4 * C, C);
    linear_backward(m, m->d_norm, 0, g[FC_W], g[FC_B], m->d.fc, m->norm, w[FC_W], N, C, 4 * C);
    norm_backward(m, m->d.x, g[LN2_W], g[LN2_B], m->d_norm, acts->x_mid, C, w[LN2_W], N, C,
                  LAYERNORM);

    norm_forward(m->norm, acts->x, C, w[LN1_W], w[LN1_B], N, C, LAYERNORM);
    d_proj = residual_backward(m, m->proj, m->d.x, (long)N * C, 2 * l + 1);
    attention_block_backward(m, l, acts, d_proj, B, T);
    norm_backward(m, m->d.x, g[LN1_W], g[LN1_B], m->d_norm, acts->x, C, w[LN1_W], N, C, LAYERNORM);
}

// The final residual stream x_final (N, C) of B sequences of T tokens. When training, each
// layer keeps its own acts; else all use the same, and the stream goes round in its x.
static void forward(Model *m, const int *tokens, int B, int T, int training) {
    if (T > m->max_T || (long)B * T > m->max_N)
        fail(1, "a pass over %d x %d tokens: model_reserve was asked for %d in sequences of %d", B,
             T, m->max_N, m->max_T);
    m->dropping = training && m->dropout > 0;
    embedding_forward(m, m->acts[0].x, tokens, B * T, T);
    for (int l = 0; l < m->c.L; l++) {
        Acts *acts = &m->acts[training ? l : 0];
        real *y = l == m->c.L - 1 ? m->x_final : training ? m->acts[l + 1].x : acts->x;
        block_forward(m, l, acts, y, B, T);
    }
}

// --- Head and loss: logits = LN(x_final) wte'

// logits (rows, V) from `rows` normed rows x (rows, C)
static void head_forward(Model *m, real *logits, const real *x, int rows) {
    linear_forward(logits, x, m->w[0][WTE], NULL, rows, m->c.C, m->c.V);
}

// The sum of the losses of N tokens, -log softmax(logits)[target] each (9). With d_loss != 0, the
// gradient of d_loss times that sum is added to wte and ln_f, and d.x is set. Logits exist for
// head_rows tokens at a time: their gradient, (softmax(logits) - onehot(target)) d_loss (10), is
// taken where they stand, and all of them, (N, V), are never in memory.
static double head_loss(Model *m, const int *targets, int N, double d_loss) {
    real **w = m->w[0], **g = m->g[0];
    int C = m->c.C, V = m->c.V;
    double total = 0;
    norm_forward(m->norm, m->x_final, C, w[LNF_W], w[LNF_B], N, C, LAYERNORM);
    for (int r0 = 0; r0 < N; r0 += m->head_rows) {
        int rows = min_int(m->head_rows, N - r0);
        real *x = m->norm + (long)r0 * C;
        head_forward(m, m->logits, x, rows);
        #pragma omp parallel for
        for (int r = 0; r < rows; r++) {
            real *z = m->logits + (long)r * V, target = z[targets[r0 + r]];
            real max = largest(z, V), sum = exp_row(z, V, 1, max);
            m->row_loss[r] = (real)log(sum) + max - target;
            if (d_loss == 0) continue;
            real scale = (real)d_loss / sum;
            for (int v = 0; v < V; v++) z[v] *= scale;
            z[targets[r0 + r]] -= (real)d_loss;
        }
        for (int r = 0; r < rows; r++) total += m->row_loss[r];
        if (d_loss == 0) continue;
        real *dx = m->d_norm + (long)r0 * C;
        linear_backward(m, dx, 0, g[WTE], NULL, m->logits, x, w[WTE], rows, C, V);
    }
    if (d_loss != 0) {
        memset(m->d.x, 0, (size_t)N * C * sizeof(real));
        norm_backward(m, m->d.x, g[LNF_W], g[LNF_B], m->d_norm, m->x_final, C, w[LNF_W], N, C,
                      LAYERNORM);
    }
    return total;
}

// Mean loss over B*T targets; adds the gradient of that mean times `scale` (1/micro-batches).
static double forward_backward(Model *m, const int *tokens, const int *targets, int B, int T,
                               double scale) {
    forward(m, tokens, B, T, 1);
    double loss = head_loss(m, targets, B * T, scale / (B * T)) / (B * T);
    for (int l = m->c.L - 1; l >= 0; l--) {
        block_backward(m, l, &m->acts[l], B, T);
        if (l) begin_sum(m, l);  // [MPI]
    }
    embedding_backward(m, tokens, B * T, T);
    begin_sum(m, 0);  // [MPI]
    return loss;
}

// The same loss alone, summed over the targets.
static double forward_loss(Model *m, const int *tokens, const int *targets, int B, int T) {
    forward(m, tokens, B, T, 0);
    return head_loss(m, targets, B * T, 0);
}

// ==== 7  OPTIMIZER ==============================================================================
// The Euclidean norm of all gradients together (28).
static double gradient_norm(const Model *m) {
    double sums[PIECES], total = 0;
    const real *g = m->grads;  // a copy: read through m, it would keep compilers from vectors
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        size_t from = m->n_reals * p / PIECES, to = m->n_reals * (p + 1) / PIECES;
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (size_t k = from; k < to; k++) sum += (double)g[k] * g[k];
        sums[p] = sum;
    }
    for (int p = 0; p < PIECES; p++) total += sums[p];
    return sqrt(total);
}

// What to multiply gradients by so that their norm is at most `limit`; 0: no limit (28).
static double clip_scale(double norm, double limit) {
    return limit > 0 && norm > limit ? limit / norm : 1;
}

typedef struct {
    double beta1, beta2, eps, weight_decay;
} AdamW;

// AdamW (27), step counted from 1. Gradients are multiplied by `clip` and set to zero for the next
// step. Decay touches matrices only, and is apart from the gradient:
//     m = b1 m + (1-b1) g      v = b2 v + (1-b2) g^2
//     w = w (1 - lr decay) - lr (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)
static void adamw_update(Model *m, const AdamW *o, double learning_rate, long step, double clip) {
    real b1 = o->beta1, b2 = o->beta2;
    real one_b1 = 1 - o->beta1, one_b2 = 1 - o->beta2;  // 1 - beta2 is small: in double
    real eps = o->eps, scale = clip, lr = learning_rate;
    real correct1 = 1 / (1 - pow(o->beta1, step)), correct2 = 1 / (1 - pow(o->beta2, step));
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        real *w = m->params + t->offset, *dw = m->grads + t->offset;
        real *am = m->adam_m + t->offset, *av = m->adam_v + t->offset;
        real keep = t->cols ? 1 - learning_rate * o->weight_decay : 1;
        long n = t->size;
        #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
        for (long k = 0; k < n; k++) {
            real g = dw[k] * scale;
            am[k] = b1 * am[k] + one_b1 * g;
            av[k] = b2 * av[k] + one_b2 * g * g;
            w[k] = w[k] * keep - lr * (am[k] * correct1) / ((real)sqrt(av[k] * correct2) + eps);
            dw[k] = 0;
        }
    }
}

enum { COSINE, CONSTANT };

typedef struct {
    int kind;
    long steps, warmup;
    double peak, floor;
} Schedule;

// The learning rate of step 0, 1, ...: linear warm-up, then half a cosine down to the floor, or
// constant (29).
static double learning_rate_at(const Schedule *s, long step) {
    if (step < s->warmup) return s->peak * (step + 1) / (s->warmup + 1);
    if (s->kind == CONSTANT || s->steps <= s->warmup) return s->peak;
    double done = (double)(step - s->warmup) / (s->steps - s->warmup);
    return s->floor + 0.5 * (1 + cos(PI * done)) * (s->peak - s->floor);
}

// ==== 8  TRAINING ===============================================================================
typedef struct {
    double temperature;
    int top_k;                          // 0: all
    double top_p, repetition_penalty;   // 0 or 1: none
    const char *stop[8];                // texts that end a sequence
    int n_stop;
} Sampling;

// What the command line sets (chapter 16); config holds -1 where it says nothing.
struct Options {
    Config config;
    const char *train_data, *val_data, *tokenizer, *log, *save, *save_best, *load;
    const char *prompt, *prompt_file;
    int order, batch_size, seq_len, grad_accum, val_every, val_batches, sample_every;
    int resume, eval, help, generate, cache;
    long seed, save_every, print_every;
    double grad_clip, dropout;
    Schedule schedule;
    AdamW adam;
    Sampling sampling;
};

struct Step {
    long number;            // counted from 1
    double loss, norm, lr;  // mean over its micro-batches; of the gradient before clipping
    double seconds, rate;   // that it took; tokens per second
};

// What a run writes, and what of it was there before.
struct Outputs {
    FILE *log;                 // NULL: none, not begun, or none any more
    const char *settings;      // what a checkpoint says of the run
    char validation[120];      // and of the validation data, and how much of it is taken
    double seconds;            // of the run before it was interrupted, as its log has them
    long last_row;             // where the log's last row begins
    double best;               // the lowest validation loss yet, INFINITY before there is one
    long best_step, validated; // and after which step; the last step with a validation
    int log_lost, best_lost, unsaved;  // could not be written
    int cut;                   // the validation after the last step, by a signal
};

struct Evaluation {
    double loss;           // mean over tokens, in nats
    double bits_per_byte;  // the same over the bytes they stand for; NaN if these are not known
    long tokens;
};

// The loss over consecutive windows of T targets, B at a time; the last, shorter window counts
// too: every token but the first is predicted once. With max_batches, that many batches, spread
// evenly over the data. Cut short when a signal comes.
static Evaluation evaluate(Model *m, const Data *d, const Tokenizer *tokenizer, int B, int T,
                           int max_batches) {
    double sums[3] = {0}, *loss = sums, *bytes = sums + 1, *tokens = sums + 2;
    long full = (d->n - 1) / T, tail = (d->n - 1) % T, batches = (full + B - 1) / B + (tail > 0);
    long taken = max_batches && max_batches < batches ? max_batches : batches;
    int *x = allocate(2 * sizeof(int) * B * T, "evaluation batch"), *y = x + B * T;
    for (long i = 0; i < taken && !stopping(); i++) {
        long window = i * batches / taken * B;
        int rows = full - window < B ? full - window : B, length = T;
        if (window >= full) window = full, rows = 1, length = tail;
        int before = rows * rank / ranks;  // [MPI] these rows are other ranks'
        rows = rows * (rank + 1) / ranks - before, window += before;
        if (!rows) continue;
        for (long k = 0; k < (long)rows * length; k++) {
            x[k] = d->tokens[window * T + k];
            y[k] = d->tokens[window * T + k + 1];
            int n = token_bytes(tokenizer, y[k]);
            *bytes += n < 0 ? NAN : n;
        }
        *loss += forward_loss(m, x, y, rows, length);
        *tokens += (double)rows * length;
    }
    free(x);
    sum_numbers(sums, 3);  // [MPI]
    return (Evaluation){*loss / *tokens, *loss / log(2) / *bytes, *tokens};
}

// Step `done` + 1: gradients of grad_accum micro-batches, clipped, then one update. x and y are
// room for a batch.
static Step training_step(Model *m, const Options *o, const Data *data, long done, int *x, int *y) {
    int B = o->batch_size / ranks, T = o->seq_len, accum = o->grad_accum;
    long first = (long)rank * B * T;  // [MPI] of this rank's B rows of tokens
    double start = seconds();
    Step s = {.number = done + 1, .lr = learning_rate_at(&o->schedule, done)};
    for (int micro = 0; micro < accum; micro++) {
        long index = done * accum + micro;
        next_batch(data, o->order, o->seed, index, x, y, o->batch_size, T);
        m->dropout_key = random_stream(o->seed, STREAM_DROPOUT, index);
        m->dropout_key = numbers_from(m->dropout_key, first * m->c.C);  // [MPI] a place drops C
        expect_sums(micro == accum - 1);  // [MPI]
        s.loss += forward_backward(m, x + first, y + first, B, T, 1.0 / ranks / accum) / accum;
    }
    s.loss /= ranks, sum_numbers(&s.loss, 1), end_sums();  // [MPI]
    s.norm = gradient_norm(m);
    if (!isfinite(s.loss) || !isfinite(s.norm))
        fail(1, "step %ld: loss %f, gradient norm %f at learning rate %g; stopped, and not saved "
             "(a lower --learning-rate may help)", s.number, fabs(s.loss), fabs(s.norm), s.lr);
    adamw_update(m, &o->adam, s.lr, s.number, clip_scale(s.norm, o->grad_clip));
    s.seconds = seconds() - start;
    s.rate = (double)o->batch_size * T * accum / s.seconds;
    return s;
}

// Whether there is a validation after a step.
static int validates_at(const Options *o, const Data *val, long step) {
    return val && (step == o->schedule.steps || (o->val_every && step % o->val_every == 0));
}

// The loss on validation data: on val_batches, and so compared with the lowest; after the last step
// then on all of it. NaN where a signal cut it short.
static Evaluation validate(Model *m, const Options *o, const Data *val, const Tokenizer *tokenizer,
                           Outputs *out, long step) {
    int B = o->batch_size, T = o->seq_len, last = step == o->schedule.steps;
    Evaluation part = evaluate(m, val, tokenizer, B, T, o->val_batches), e = part;
    if (last && o->val_batches) e = evaluate(m, val, tokenizer, B, T, 0);
    printf("val  %ld/%ld | ", step, o->schedule.steps);
    if (stopping()) {
        printf("cut short\n");
        out->cut = last;
        return (Evaluation){.loss = NAN};
    }
    print_evaluation(&e);
    if (!isfinite(e.loss))
        fail(1, "step %ld: validation loss %f; not saved (a lower --learning-rate may help)", step,
             fabs(e.loss));
    out->validated = step;
    if (part.loss < out->best) {
        out->best_lost = o->save_best && !save_best(out, m, o, step, part.loss);
        if (!out->best_lost) out->best = part.loss, out->best_step = step;
    }
    return e;
}

// Steps done+1 to the last, with the moments of the model as they are; `val` may be NULL. Returns
// the exit status: 0, or 128 and the number of the signal that stopped it; 1 if a file could not be
// written.
static int train(Model *m, const Options *o, const Data *data, const Data *val,
                 const Tokenizer *tokenizer, Outputs *out, long done) {
    int B = o->batch_size, T = o->seq_len;
    int *x = allocate(2 * sizeof(int) * B * T, "batch"), *y = x + B * T;
    long step = done, steps = o->schedule.steps, saved = done;  // saved: what is on disk
    Cache *cache = o->sample_every ? sample_cache(m, T) : NULL;
    catch_signals();
    if (done && out->validated < done && validates_at(o, val, done)) {  // it was cut short
        Evaluation e = validate(m, o, val, tokenizer, out, done);
        if (out->log && !isnan(e.loss)) log_validation(out, e.loss);
        saved = -1;
    }
    double start = seconds(), stepping = 0;  // stepping: time without validation and samples
    while (step < steps && !stopping()) {
        Step s = training_step(m, o, data, step, x, y);
        Evaluation e = {.loss = NAN};
        step = s.number;
        stepping += s.seconds;
        int last = step == steps;
        int validates = validates_at(o, val, step);
        int samples = cache && (last || step % o->sample_every == 0);
        double eta = (seconds() - start) / (step - done) * (steps - step);
        print_step(&s, o, eta, !validates && !samples && !last && !stop_signal);
        if (validates) e = validate(m, o, val, tokenizer, out, step);
        if (samples && !stop_signal) print_sample(m, cache, tokenizer, o, step);
        log_row(out, m, o, &s, &e, seconds() - start);
        if (o->save && o->save_every && step % o->save_every == 0 &&
            save_run(out, m, o, x, y, step))
            saved = step;
    }
    if (o->save && saved != step) out->unsaved = !save_run(out, m, o, x, y, step);
    if (out->log) fclose(out->log);
    if (cache) cache_free(cache);
    free(x);
    print_end(o, out, done, step, seconds() - start, stepping);
    if (out->log_lost || out->best_lost || out->unsaved) return 1;
    return step < steps || out->cut ? 128 + stop_signal : 0;
}

// ######## PART II: DECODING #####################################################################

// ==== 9  THE CACHE ==============================================================================
//
// Per layer and sequence, CACHE_FULL keeps keys and values by head and the shared rotary key once:
// k (NKV, places, NOPE) and k_rope (places, rope) in panels of NR keys, so that a query meets NR
// keys with each multiply-add; v (NKV, places, HS) in rows. With a latent, CACHE_LATENT has the
// normed latents, (places, R) in panels too, in the place of k and v. Keys and values are made of
// them at every step: the latent's memory at the price of R*NKV*(NOPE+HS) multiply-adds per cached
// token, layer and step. CACHE_ABSORBED keeps a row per token, [normed latent; rotated key]
// (places, R+rope), and needs neither keys nor values (chapter 10).

enum { CACHE_FULL, CACHE_LATENT, CACHE_ABSORBED };  // [ATTENTION 3]
static const char *const cache_names[] = {"full", "latent", "absorbed", NULL};
enum { CHUNK = 256 };  // keys to a chunk (chapter 10), a multiple of NR

// What products take, and with it what a cache keeps: floats, or floats rounded to bfloat16, which
// is the upper half of a float, its exponent and 7 bits of its fraction ("Half the bits" in section
// 14). With --precision bf16 every product rounds both its factors so; sums are floats.
enum { FP32, BF16 };
static const char *const precision_names[] = {"fp32", "bf16", NULL};
static int precision;

static inline uint16_t to_bfloat16(real x) {  // to the nearest; of two as near, to the even one
    union { float f; uint32_t u; } v = {x};
    uint32_t up = 0x7fff + (v.u >> 16 & 1);
    return x == x ? (v.u + up) >> 16 : v.u >> 16 | 0x40;  // NaN stays NaN
}

static inline real from_bfloat16(uint16_t x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

static inline real rounded(real x) { return from_bfloat16(to_bfloat16(x)); }

static void keep_twin(const Model *m);  // its weights as bfloat16, from which decoding reads

// [ATTENTION 3] Floats that a decoder keeps per token, all layers together (24).
static long cache_floats(const Config *c, int mode) {
    return c->L * (long)(mode == CACHE_FULL ? c->kv_row + c->rope : c->kv_a_row);
}

// [ATTENTION 3] The default is the smallest: for MLA too that is `full`, with few key/value heads.
static int cache_mode(const Config *c) {
    int smaller = has_latent(c) && cache_floats(c, CACHE_ABSORBED) <= cache_floats(c, CACHE_FULL);
    return smaller ? CACHE_ABSORBED : CACHE_FULL;
}

// [ATTENTION 3] What decoding keeps of the tokens so far, and the room in which it works.
struct Cache {
    int mode, B;                  // sequences
    int used, capacity, places;   // tokens of each: so far, at most; capacity in whole panels
    size_t sequence_size;         // numbers of one sequence in one layer
    void *layers;                 // (L, B, sequence_size) reals, or bfloat16
    real *chunks, *scores;        // (B, NH, chunks, value+2), per thread (NH, CHUNK)
    real *q_lat, *o_lat;          // (B, NH, R+rope), (B, NH, R) absorbed
    real *kv;                     // latent: per thread (NOPE+HS, CHUNK), a head's keys and values
};

// An arena hands out consecutive pieces of one allocation. A layout function that takes its pieces
// is run twice: with no base it only counts, then it places.
typedef struct {
    real *base;
    size_t used;  // in reals
    int overlap;  // pieces lie over each other on purpose: no gaps between them (chapter 12)
} Arena;

static real *take(Arena *arena, size_t n);                   // the next piece, n numbers
static void arena_allocate(Arena *arena, const char *what);  // as many as were counted

// [ATTENTION 3]
static void place_cache(const Model *m, Cache *cache, Arena *arena) {
    const Config *c = &m->c;
    int absorbed = cache->mode == CACHE_ABSORBED, latent = cache->mode == CACHE_LATENT;
    size_t B = cache->B, NH = c->NH, threads = omp_get_max_threads();
    size_t chunks = (cache->places + CHUNK - 1) / CHUNK;
    size_t numbers = c->L * B * cache->sequence_size + NR;  // tiles read past the end
    cache->layers = take(arena, precision == BF16 ? (numbers + 1) / 2 : numbers);
    cache->chunks = take(arena, B * NH * chunks * (max_int(c->HS, c->R) + 2));
    cache->scores = take(arena, threads * NH * CHUNK);
    cache->q_lat = take(arena, absorbed * B * NH * c->kv_a_row);
    cache->o_lat = take(arena, absorbed * B * NH * c->R);
    cache->kv = take(arena, latent * threads * (c->NOPE + c->HS) * CHUNK);
}

// Everything that decoding B sequences of up to `capacity` tokens will need: no step allocates.
static Cache *cache_create(const Model *m, int mode, int B, int capacity) {
    if (capacity > m->c.block_size)
        fail(1, "a cache of %d tokens: the model's block size is %d", capacity, m->c.block_size);
    Cache *cache = allocate(sizeof *cache, "cache");
    *cache = (Cache){.mode = mode, .B = B, .capacity = capacity, .places = round_up(capacity, NR)};
    cache->sequence_size = (size_t)cache_floats(&m->c, mode) / m->c.L * cache->places;
    Arena arena = {0};
    place_cache(m, cache, &arena);
    arena_allocate(&arena, "KV cache");
    place_cache(m, cache, &arena);
    return cache;
}

static void cache_free(Cache *cache) {
    free(cache->layers);  // the first piece of its arena
    free(cache);
}

// Where among a cache's numbers those of sequence 0 are: token t's of head h from
// at + t*token + h*head on; those of the next sequence sequence_size further.
typedef struct {
    long at, token, head;
} Places;

static long place_of(Places x, long t, int h) { return x.at + t * x.token + h * x.head; }

// [ATTENTION 3] Keys and values where a cache has them. k and k_rope lie in panels. If `up` is set,
// W_UKV, k has latents (places, R), of which a query has yet to make keys and values; with
// keys_in_rows, there is no k_rope.
typedef struct {
    int heads, kv_heads, nope, rope, value;  // as in Heads
    View q;
    Places k, k_rope, v;
    const real *up;
    int keys_in_rows;
} Cached;

static long cached_layer(const Model *m, int l) {  // where its sequences begin
    return (long)l * m->cache->B * m->cache->sequence_size;
}

// The matrix of cached numbers that begins at place `at`.
static Mat cached_matrix(const Model *m, long at, long row, long col) {
    const Cache *cache = m->cache;
    if (precision == BF16) return (Mat){NULL, row, col, (const uint16_t *)cache->layers + at};
    return (Mat){(const real *)cache->layers + at, row, col, NULL};
}

// Writes x (n) to a cache, number by number `apart`.
static void cache_put(Cache *cache, long at, const real *x, int n, long apart) {
    for (int i = 0; i < n; i++, at += apart)
        if (precision == BF16) ((uint16_t *)cache->layers)[at] = to_bfloat16(x[i]);
        else ((real *)cache->layers)[at] = x[i];
}

static Cached cached_heads(const Model *m, int l) {  // [ATTENTION 3] of layer l, full or latent
    const Config *c = &m->c;
    int latent = m->cache->mode == CACHE_LATENT, k = latent ? c->R : c->NOPE;
    long places = m->cache->places;
    long keys = places * k * (latent ? 1 : c->NKV), values = latent ? 0 : places * c->NKV * c->HS;
    long base = cached_layer(m, l);
    return (Cached){.heads = c->NH, .kv_heads = c->NKV, .nope = c->NOPE, .rope = c->rope,
                    .value = c->HS,
                    .k = {base, k, latent ? 0 : places * k},
                    .v = {base + keys, c->HS, latent ? 0 : places * c->HS},
                    .k_rope = {base + keys + values, c->rope, 0},
                    .up = latent ? m->w[l][KVB_W] : NULL};
}

// Where the numbers of key t, n of them, stand among panels that begin at `panels`: NR apart.
static long panel_place(long panels, long t, int n) { return panels + t / NR * NR * n + t % NR; }

// [ATTENTION 3] Appends T tokens of each sequence, from what the projection just made.
static void cache_append(Model *m, int l, const Acts *acts, int B, int T) {
    const Config *c = &m->c;
    Cache *cache = m->cache;
    Heads from = heads_of(m, acts);
    size_t R = c->R, rope = c->rope;
    #pragma omp parallel for collapse(2) if (B * T > 1)
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            long n = (long)b * T + t, at = m->past + t;
            long sequence = b * cache->sequence_size;
            const real *latent = m->latent + n * R, *k_rope = head_at(from.k_rope, n, 0);
            if (cache->mode == CACHE_ABSORBED) {
                long row = cached_layer(m, l) + sequence + at * c->kv_a_row;
                cache_put(cache, row, latent, R, 1), cache_put(cache, row + R, k_rope, rope, 1);
                continue;
            }
            Cached to = cached_heads(m, l);
            for (int g = 0; g < (to.up ? 1 : c->NKV); g++) {
                long k = place_of(to.k, 0, g) + sequence, v = place_of(to.v, at, g) + sequence;
                if (to.up) cache_put(cache, panel_place(k, at, R), latent, R, NR);
                else {
                    const real *key = head_at(from.k, n, g);
                    cache_put(cache, panel_place(k, at, c->NOPE), key, c->NOPE, NR);
                    cache_put(cache, v, head_at(from.v, n, g), c->HS, 1);
                }
            }
            long rotary = panel_place(to.k_rope.at + sequence, at, rope);
            cache_put(cache, rotary, k_rope, rope, NR);
        }
}

// ==== 10  ATTENTION IN DECODING =================================================================
//
// Decoding asks for one query per sequence, against `keys` keys in a cache. There is nothing to
// reuse but the group of query heads that share a key/value head: its `group` queries are the rows
// of the products here. Keys are cut into chunks, the unit of work, so that even a single sequence
// with a single key/value head keeps all threads busy. A chunk's softmax is relative to its own
// maximum m_i, of scores not yet divided by the root; the chunks are then weighted:
//     out = sum_i w_i o_i / sum_i w_i s_i,   w_i = e^((m_i - largest m) / sqrt(QK))

// The product of matmul, by one thread and meant for a few rows (chapter 13). a's numbers adjoin
// within a row; b's within a column, or in panels (rows NR apart), or within a row, and then NR
// numbers past its end can be read too.
static void matmul_few(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                       const real *start, long start_row);

// What became of chunk i for head h: o_i (value), then m_i and s_i. (B, NH, chunks, value+2)
static real *chunk_result(const Model *m, int b, int h, int chunk, int chunks, int value) {
    return m->cache->chunks + (((long)b * m->c.NH + h) * chunks + chunk) * (value + 2);
}

// [ATTENTION 3] The queries of sequence b that read key/value head g, against one chunk's keys.
static void query_chunk(const Model *m, const Cached *a, int b, int g, int chunk, int keys) {
    int chunks = (keys + CHUNK - 1) / CHUNK, value = a->value, group = a->heads / a->kv_heads;
    long first = (long)chunk * CHUNK, o_row = (long)chunks * (value + 2);
    int n = min_int(CHUNK, keys - first), thread = omp_get_thread_num();
    real *o = chunk_result(m, b, g * group, chunk, chunks, value);     // (group, o_row)
    real *s = m->cache->scores + (long)thread * m->c.NH * CHUNK;       // (group, CHUNK)
    long sequence = b * m->cache->sequence_size;
    long k_at = place_of(a->k, first, g) + sequence, v_at = place_of(a->v, first, g) + sequence;
    long k_rope_at = place_of(a->k_rope, first, g) + sequence;
    Mat q = rows_of(head_at(a->q, b, g * group), a->q.head), q_rope = mat_from(q, 0, a->nope);
    Mat k = a->keys_in_rows ? cached_matrix(m, k_at, 1, a->k.token)       // (nope, n)
                            : cached_matrix(m, k_at, NR, 1);
    Mat v = cached_matrix(m, v_at, a->v.token, 1);                        // (n, value)
    if (a->up) {  // [k'; v'] = W_UKV c', (nope+value, n) from latents c' (R, n) in panels (21)
        int rows = a->nope + value, R = a->k.token;
        real *kv = m->cache->kv + (long)thread * rows * CHUNK;
        matmul_few(kv, CHUNK, rows_of(a->up + (long)g * rows * R, R), k, rows, n, R, NULL, 0);
        k = rows_of(kv, CHUNK), v = transposed(kv + a->nope * CHUNK, CHUNK);
    }
    matmul_few(s, CHUNK, q, k, group, n, a->nope, NULL, 0);  // s = q_nope k_nope' (11)
    if (a->rope)                                             //   + q_rope k_rope'
        matmul_few(s, CHUNK, q_rope, cached_matrix(m, k_rope_at, NR, 1), group, n, a->rope, s,
                   CHUNK);
    for (int r = 0; r < group; r++) {  // p (12), relative to the chunk
        real *sr = s + r * CHUNK, *end = o + r * o_row + value;
        end[0] = largest(sr, n);
        end[1] = exp_row(sr, n, score_scale(&m->c), end[0]);
    }
    matmul_few(o, o_row, rows_of(s, CHUNK), v, group, value, n, NULL, 0);  // o = p v (13)
}

// q (B, NH, nope+rope) of a, out (B, NH, value), against `keys` keys
static void attention_query(const Model *m, const Cached *a, View out, int B, int keys) {
    int chunks = (keys + CHUNK - 1) / CHUNK, value = a->value;
    real scale = score_scale(&m->c);
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int chunk = 0; chunk < chunks; chunk++)
            for (int g = 0; g < a->kv_heads; g++) query_chunk(m, a, b, g, chunk, keys);
    #pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < a->heads; h++) {
            const real *o = chunk_result(m, b, h, 0, chunks, value);
            real *total = head_at(out, b, h), max = o[value], sum = 0;
            for (int c = 1; c < chunks; c++) max = fmax(max, o[c * (value + 2) + value]);
            memset(total, 0, value * sizeof(real));
            for (int c = 0; c < chunks; c++, o += value + 2) {
                real w = fast_exp(scale * (o[value] - max));
                sum += w * o[value + 1];
                for (int e = 0; e < value; e++) total[e] += w * o[e];
            }
            for (int e = 0; e < value; e++) total[e] /= sum;
        }
}

// ABSORPTION: decoding from the latents themselves. Keys and values are linear in the latent c_j,
// so their matrices can change places with the sums over tokens. For the scores (25),
//     q_nope . k_nope_j = q_nope . (W_UK c_j) = (W_UK' q_nope) . c_j = q_lat . c_j
// and for the output (26)
//     sum_j p_j v_j = sum_j p_j (W_UV c_j) = W_UV (sum_j p_j c_j) = W_UV o_lat
// W_UK' is applied once per query instead of W_UK once per key, W_UV once per output instead of
// once per value. What is left between the two is MQA, and runs on its code: NH query heads
// [q_lat; q_rope] of width R+rope read one key head, which is the cached row [c_j; k_rope_j], and
// one value head, which is that row's first R numbers. The scores are the same numbers as before,
// so they are still divided by sqrt(QK), not by the root of their new width. For head h, from the
// rows of kv_b_proj that its key/value head h / (NH/NKV) has:
//     W_UK (NOPE, R)   q_nope (B, NOPE) -> q_lat (B, R)
//     W_UV (HS, R)     o_lat (B, R)     -> out (B, HS)
// [ATTENTION 3]
static void absorbed_query(Model *m, int l, View q, View out, int B, int keys) {
    const Config *c = &m->c;
    int NH = c->NH, HS = c->HS, NOPE = c->NOPE, R = c->R, row = c->kv_a_row, group = NH / c->NKV;
    View q_lat = {m->cache->q_lat, NH * row, row}, o_lat = {m->cache->o_lat, NH * R, R};
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {  // q_lat = W_UK' q_nope (25), beside it q_rope
        const real *w_uk = m->w[l][KVB_W] + (long)(h / group) * (NOPE + HS) * R;
        matmul_few(head_at(q_lat, 0, h), q_lat.token, tokens_of(q, 0, h), rows_of(w_uk, R), B, R,
                   NOPE, NULL, 0);
        for (int b = 0; b < B; b++)
            memcpy(head_at(q_lat, b, h) + R, head_at(q, b, h) + NOPE, c->rope * sizeof(real));
    }
    Places latents = {cached_layer(m, l), row, 0};  // the whole row is the key: rope is within nope
    Cached mqa = {.heads = NH, .kv_heads = 1, .nope = row, .rope = 0, .value = R, .q = q_lat,
                  .k = latents, .v = latents, .k_rope = latents, .keys_in_rows = 1};
    attention_query(m, &mqa, o_lat, B, keys);
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {  // out = W_UV o_lat (26)
        const real *w_uv = m->w[l][KVB_W] + ((long)(h / group) * (NOPE + HS) + NOPE) * R;
        matmul_few(head_at(out, 0, h), out.token, tokens_of(o_lat, 0, h), transposed(w_uv, R), B,
                   HS, R, NULL, 0);
    }
}

// With an empty cache tokens see the tokens of this pass, a prompt's, by keys and values as in
// training; after that, one token per sequence sees all that are cached. [ATTENTION 3]
static void attend_cached(Model *m, int l, Acts *acts, int B, int T) {
    int mode = m->cache->mode, prompt = m->past == 0, keys = m->past + 1;
    View out = {acts->att, m->c.att_row, m->c.HS};
    Heads a = heads_of(m, acts);
    if (prompt || mode == CACHE_FULL) up_project(m, l, acts, B * T);
    cache_append(m, l, acts, B, T);
    if (prompt) attention_forward(m, &a, out, acts->lse, B, T);
    else if (mode == CACHE_ABSORBED) absorbed_query(m, l, a.q, out, B, keys);
    else {
        Cached cached = cached_heads(m, l);
        cached.q = a.q;
        attention_query(m, &cached, out, B, keys);
    }
}

// ==== 11  GENERATION ============================================================================
// What generation uses of chapter 14: the token that samples start from; whether a token is
// end-of-text, and whether the last of n tokens completes a text to stop at; a prompt's bytes, and
// the tokens of n bytes, into out, which has room for n; and printing a token, without what could
// upset a terminal. Chapter 16 prints what a model is.
typedef struct {
    int expected;         // bytes that the character at hand still lacks
    unsigned char least;  // what the next of them is at least
} Printer;
static int first_token(const Tokenizer *t);
static int is_end_of_text(const Tokenizer *t, int token);
static int completes(const Tokenizer *t, const int *tokens, int n, const char *text);
static unsigned char *read_prompt(const char *path, size_t *size);
static long encode(const Tokenizer *t, const unsigned char *text, long n, int *out);
static void print_model(FILE *f, const Model *m, int cache);
static void flush_output(void);
static void print_token(const Tokenizer *t, int token, Printer *printer);

// Logits (B, V) of what follows the last of T more tokens of each of the cache's B sequences. With
// an empty cache T is free, the prompt's length; after that it is 1.
static real *decode(Model *m, Cache *cache, const int *tokens, int T) {
    int B = cache->B, C = m->c.C;
    real **w = m->w[0];
    if (cache->used > 0 && T != 1)
        fail(1, "decode: %d tokens for a cache that holds %d, expected 1", T, cache->used);
    if (cache->used + T > cache->capacity)
        fail(1, "decode: %d tokens after %d, expected at most the cache's %d", T, cache->used,
             cache->capacity);
    m->cache = cache, m->past = cache->used;
    forward(m, tokens, B, T, 0);
    m->cache = NULL, m->past = 0;
    cache->used += T;
    norm_forward(m->norm, m->x_final + (long)(T - 1) * C, (long)T * C, w[LNF_W], w[LNF_B], B, C,
                 LAYERNORM);
    head_forward(m, m->logits, m->norm, B);
    return m->logits;
}

// The k-th largest of n numbers, k from 0, by Hoare's FIND. Reorders x.
static real kth_largest(real *x, int n, int k) {
    for (int low = 0, high = n - 1; low < high;) {
        real pivot = x[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            real t = x[i];
            x[i++] = x[j], x[j--] = t;
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return x[k];
}

static int descending(const void *a, const void *b) {
    real x = *(const real *)a, y = *(const real *)b;
    return (x < y) - (x > y);
}

// One token from the distribution softmax(logits / temperature) over the top_k likeliest (0: all),
// and of these over the likeliest that have top_p of the probability between them; temperature 0
// takes the likeliest. The logits of tokens already seen (V; NULL: none) are first divided by
// repetition_penalty (CTRL, Keskar et al. 2019); negative ones are multiplied by it, so that they
// too become smaller.
// u in (0, 1] decides. Overwrites logits; scratch (V).
static int sample_token(real *logits, real *scratch, int V, const Sampling *how,
                        const unsigned char *seen, double u) {
    int best = 0, finite = 1;
    double penalty = how->repetition_penalty;
    for (int v = 0; v < V; v++) {
        if (seen && seen[v]) logits[v] *= logits[v] > 0 ? 1 / penalty : penalty;
        if (logits[v] > logits[best]) best = v;
        finite &= !!isfinite(logits[v]);
    }
    if (!finite) fail(1, "the model's logits are no finite numbers: its weights are useless");
    if (how->temperature == 0) return best;
    real max = logits[best], least = -INFINITY;
    if (how->top_k && how->top_k < V) {
        memcpy(scratch, logits, V * sizeof(real));
        least = kth_largest(scratch, V, how->top_k - 1);
    }
    double sum = 0, running = 0;
    for (int v = 0; v < V; v++) {
        logits[v] = logits[v] < least ? 0 : exp((logits[v] - max) / how->temperature);
        sum += logits[v];
    }
    if (how->top_p > 0 && how->top_p < 1) {
        double wanted = how->top_p * sum;
        memcpy(scratch, logits, V * sizeof(real));
        qsort(scratch, V, sizeof(real), descending);
        sum = 0;
        for (int v = 0; v < V && sum < wanted; v++) sum += least = scratch[v];
        sum = 0;  // again, with those that are as likely as the last
        for (int v = 0; v < V; v++) sum += logits[v] = logits[v] < least ? 0 : logits[v];
    }
    for (int v = 0; v < V; v++)
        if ((running += logits[v]) > u * sum) return v;
    return best;
}

typedef struct {
    double prompt_seconds, seconds;  // reading the prompt, making the rest
    long made;                       // tokens, of all sequences
} Generation;

// Continues the prompt, n_prompt tokens, by n tokens in each of cache->B sequences; the cache must
// have room for all but the last. Token i of sequence b goes to out[b*n + i] if there is an out.
// With a tokenizer a sequence ends at end-of-text and with a text to stop at, and there is -1 in
// out from then on; those of sequence 0 are printed as they come.
static Generation generate(Model *m, Cache *cache, const int *prompt, int n_prompt, int n,
                           const Sampling *how, uint64_t key, const Tokenizer *tokenizer,
                           int *out) {
    int B = cache->B, V = m->c.V, running = B;
    int penalizes = how->repetition_penalty != 0 && how->repetition_penalty != 1;
    int *tokens = allocate(sizeof(int) * B * n_prompt, "prompt");
    int *made = out ? out : allocate(sizeof(int) * B * n, "generated tokens");        // (B, n)
    real *scratch = allocate(sizeof(real) * V, "sampling");
    unsigned char *seen = penalizes ? allocate((size_t)B * V, "tokens seen") : NULL;  // (B, V)
    unsigned char *ended = allocate(B, "sequences");
    Generation g = {0};
    Printer printer = {0};
    for (int b = 0; b < B; b++) {
        memcpy(tokens + (long)b * n_prompt, prompt, n_prompt * sizeof(int));
        for (int t = 0; seen && t < n_prompt; t++) seen[(long)b * V + prompt[t]] = 1;
    }
    cache->used = 0;
    double start = seconds();
    real *logits = decode(m, cache, tokens, n_prompt);
    g.prompt_seconds = seconds() - start;
    for (int i = 0; i < n; i++) {
        for (int b = 0; b < B; b++) {
            int *own = made + (long)b * n;
            own[i] = -1;
            if (ended[b]) continue;
            unsigned char *own_seen = seen ? seen + (long)b * V : NULL;
            double u = random_uniform(random_stream(key, STREAM_SAMPLE, b), i);
            int token = sample_token(logits + (long)b * V, scratch, V, how, own_seen, u);
            tokens[b] = token;
            g.made++;
            if (seen) own_seen[token] = 1;
            ended[b] = tokenizer && is_end_of_text(tokenizer, token);
            if (!ended[b]) own[i] = token;
            for (int k = 0; tokenizer && k < how->n_stop && !ended[b]; k++)
                ended[b] = completes(tokenizer, own, i + 1, how->stop[k]);
            running -= ended[b];
        }
        if (tokenizer && made[i] != -1) {
            print_token(tokenizer, made[i], &printer);
            flush_output();
        }
        if (i + 1 < n && running) logits = decode(m, cache, tokens, 1);
    }
    g.seconds = seconds() - start - g.prompt_seconds;
    if (!out) free(made);
    free(tokens), free(scratch), free(seen), free(ended);
    return g;
}

static Cache *sample_cache(const Model *m, int T) {
    return cache_create(m, cache_mode(&m->c), 1, T);
}

static void print_sample(Model *m, Cache *cache, const Tokenizer *t, const Options *o, long step) {
    int start = first_token(t), n = min_int(200, cache->capacity);
    uint64_t key = random_stream(o->seed, STREAM_SAMPLE, step);
    printf("sample %ld/%ld |\n", step, o->schedule.steps);
    generate(m, cache, &start, 1, n, &o->sampling, key, t, NULL);
    printf("\n");
}

// The command --generate: the prompt and its continuation on standard output; what that cost and
// all else on standard error.
static void generate_command(Model *m, const Options *o, const Tokenizer *tokenizer) {
    const Config *c = &m->c;
    const char *option = o->prompt_file ? "--prompt-file" : "--prompt";
    size_t length = o->prompt ? strlen(o->prompt) : 0;
    unsigned char *file = o->prompt_file ? read_prompt(o->prompt_file, &length) : NULL;
    const unsigned char *text = file ? file : (unsigned char *)(o->prompt ? o->prompt : "");
    int mode = o->cache == -1 ? cache_mode(c) : o->cache, B = o->batch_size;
    int *prompt = allocate((length + 1) * sizeof(int), "prompt");
    long n_prompt = encode(tokenizer, text, length, prompt);
    if (n_prompt == 0) prompt[n_prompt++] = first_token(tokenizer);
    if (n_prompt > c->block_size)
        fail(2, "%s: %ld tokens, expected at most the model's block size, %d", option, n_prompt,
             c->block_size);
    int capacity = min_int(n_prompt + o->generate, c->block_size);
    int n = min_int(o->generate, capacity - n_prompt + 1);
    int *out = allocate(sizeof(int) * B * (n + 1), "generated tokens");

    if (precision == BF16) keep_twin(m);
    model_reserve(m, B, n_prompt, 0);
    Cache *cache = cache_create(m, mode, B, capacity);
    print_model(stderr, m, mode);
    if (B > 1) fprintf(stderr, "--- 1\n");
    fwrite(text, 1, length, stdout);
    fflush(stdout);
    Generation g = generate(m, cache, prompt, n_prompt, n, &o->sampling, o->seed, tokenizer, out);
    for (int b = 1; b < B; b++) {
        Printer printer = {0};
        printf("\n");
        fflush(stdout);
        fprintf(stderr, "--- %d\n", b + 1);
        fwrite(text, 1, length, stdout);
        for (int i = 0; i < n && out[(long)b * n + i] != -1; i++)
            print_token(tokenizer, out[(long)b * n + i], &printer);
    }
    printf("\n");
    fflush(stdout);
    if (n < o->generate)  // to drop the oldest tokens would be another model: the rest saw them
        fprintf(stderr, "[stopped: the %d tokens that the model has learned to look back over, its "
                "block size, are full]\n", c->block_size);
    long floats = cache_floats(c, mode), mha = 2L * c->L * c->C;
    double tokens = (double)B * capacity, MB = (precision == BF16 ? 2 : sizeof(real)) / 1e6;
    fprintf(stderr, "prompt %ld tokens x %d, %.0f tok/s | decoded %ld tokens, %.0f tok/s\n",
            n_prompt, B, n_prompt * B / g.prompt_seconds, g.made,
            g.made > B ? (g.made - B) / g.seconds : 0.0);
    fprintf(stderr, "cache %s: %ld %s per token, %.2f MB in all | MHA: %ld per token, "
            "%.2f MB in all\n", cache_names[mode], floats,
            precision == BF16 ? "bfloat16" : "floats", floats * tokens * MB, mha,
            mha * tokens * MB);
    cache_free(cache);
    free(prompt), free(out), free(file);
}

// ######## PART III: MACHINERY ###################################################################
// What it needs of chapter 18:
typedef struct Inputs Inputs;
static void begin_ranks(int argc, char **argv);   // of one program and command line, or fails
static void agree(const Inputs *in);              // the same of their data; rank 0 is to write
static Model *share_model(Model *m, long *done);  // rank 0's, which has done so many steps
static void share(void *p, size_t bytes);  // rank 0's bytes go to all
static void continue_sums(void);           // for an MPI that works only when it is called
static void wait_to_fail(int status);      // others may fail of the same: one line is enough

// ==== 12  MEMORY ================================================================================
static uint32_t hash_bytes(const void *bytes, long n) {  // FNV-1a
    uint32_t hash = 2166136261u;
    for (long i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 16777619u;
    return hash;
}

static volatile sig_atomic_t line_is_drawn;  // and a terminal's cursor stands in it

static int takes_output(int fd) {  // without waiting for a reader
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    return poll(&p, 1, 0) != 0;
}

// One line, whatever signs a file's name or text has.
static void print_error(const char *format, va_list args) {
    char text[3 * PATH_MAX];
    vsnprintf(text, sizeof text, format, args);
    for (char *p = text; *p; p++)
        if ((unsigned char)*p < ' ') *p = '?';
    if (!stop_signal || takes_output(1)) fflush(stdout);
    if (stop_signal && !takes_output(2)) return;
    if (line_is_drawn) fputc('\n', stderr);
    line_is_drawn = 0;
    if (rank) fprintf(stderr, "rank %d of ", rank);  // [MPI]
    fprintf(stderr, "train_gpt2_mla: %s\n", text);
}

static void fail(int status, const char *format, ...) {
    va_list args;
    wait_to_fail(status);  // [MPI]
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    exit(status);
}

static void warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *allocate(size_t bytes, const char *what) {
    void *p = aligned_alloc(64, (bytes + 64) & ~(size_t)63);
    if (!p) fail(1, "%s: %.1f MB of memory needed, and not to be had", what, bytes / 1e6);
    memset(p, 0, bytes);
    return p;
}

static void arena_allocate(Arena *arena, const char *what) {
    arena->base = allocate(arena->used * sizeof(real), what);
    arena->used = 0;
}

// Under AddressSanitizer a gap follows each piece that nothing may touch: who writes past a piece
// that is too small, or reads there, is stopped.
#ifdef __has_feature  // clang's way of telling
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
enum { GAP = 64 };
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
enum { GAP = 0 };
#endif

static real *take(Arena *arena, size_t n) {
    real *p = arena->base ? arena->base + arena->used : NULL;
    size_t whole = round_up(n, 16) + GAP;  // to the next cache line
    if (p) ASAN_UNPOISON_MEMORY_REGION(p, whole * sizeof(real));  // a room may be cut anew
    if (p && !arena->overlap) ASAN_POISON_MEMORY_REGION(p + n, (whole - n) * sizeof(real));
    arena->used += whole;
    return p;
}

// --- The model's memory

// Lists the tensors, in the order of the table, layer by layer.
static void list_tensors(Model *m) {
    Spec spec[TENSORS];
    Arena counter = {0};
    describe_tensors(&m->c, spec);
    m->tensors = allocate(sizeof(Tensor) * TENSORS * m->c.L, "tensor list");
    for (int l = 0; l < m->c.L; l++)
        for (int id = 0; id < TENSORS; id++) {
            int per_layer = strchr(spec[id].name, '%') != NULL;
            if (!spec[id].rows || (l > 0 && !per_layer)) continue;
            Tensor *t = &m->tensors[m->n_tensors++];
            snprintf(t->name, sizeof t->name, spec[id].name, l);
            t->id = id, t->layer = per_layer ? l : -1;
            t->rows = spec[id].rows, t->cols = spec[id].cols, t->init = spec[id].init;
            t->size = (size_t)t->rows * (t->cols ? t->cols : 1);
            t->offset = counter.used;
            take(&counter, t->size);
            m->n_params += t->size;
            if (!t->cols) m->partial_row = max_int(m->partial_row, 2 * t->rows);
        }
    m->n_reals = counter.used;
}

// Builds a model of all zeros: lists the tensors, allocates, points every layer at its own.
static Model *model_create(const Config *c, int training) {
    Model *m = allocate(sizeof *m, "model");
    m->c = *c;
    list_tensors(m);
    size_t bytes = m->n_reals * sizeof(real), angles = (size_t)c->block_size * (c->RD / 2);
    m->params = allocate(bytes, "parameters");
    if (training) {
        m->grads = allocate(bytes, "gradients");
        m->adam_m = allocate(bytes, "optimizer");
        m->adam_v = allocate(bytes, "optimizer");
    }
    m->rope_cos = allocate(angles * sizeof(real), "rotary table");
    m->rope_sin = allocate(angles * sizeof(real), "rotary table");
    m->w = allocate(sizeof(Layer) * c->L, "layer list");
    m->g = allocate(sizeof(Layer) * c->L, "layer list");
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        for (int l = max_int(t->layer, 0); l < (t->layer == -1 ? c->L : t->layer + 1); l++) {
            m->w[l][t->id] = m->params + t->offset;
            m->g[l][t->id] = training ? m->grads + t->offset : NULL;
        }
    rope_table(m);
    return m;
}

// The weights once more, as bfloat16, for generation with --precision bf16, which reads these.
static struct { const real *of; size_t n; uint16_t *numbers; } twin;

static void keep_twin(const Model *m) {
    twin.of = m->params, twin.n = m->n_reals;
    twin.numbers = allocate(twin.n * sizeof *twin.numbers, "parameters as bfloat16");
    #pragma omp parallel for
    for (size_t i = 0; i < twin.n; i++) twin.numbers[i] = to_bfloat16(m->params[i]);
}

static Mat with_twin(Mat b) {  // b, and its place in the twin, if it is of weights
    size_t at = ((uintptr_t)b.p - (uintptr_t)twin.of) / sizeof(real);
    if (at < twin.n) b.bf16 = twin.numbers + at;
    return b;
}

static Room place_room(Arena *arena, int QK, int HS, int T) {
    size_t t = round_up(T, NR), deep = round_up(T, KR);
    Room r = {.row = t / 32 * 32 + 48};
    r.s = take(arena, STRIP * r.row), r.ds = take(arena, STRIP * r.row);
    r.keys = take(arena, T * QK), r.dk = take(arena, T * QK);
    r.kt = take(arena, round_up(QK, KR) * t), r.vt = take(arena, round_up(HS, KR) * t);
    r.k = take(arena, deep * round_up(QK, NR)), r.v = take(arena, deep * round_up(HS, NR));
    r.q = take(arena, STRIP * round_up(QK, NR));
    r.d_out = take(arena, STRIP * round_up(HS, NR));
    return r;
}

static Room room_of_thread(const Model *m, const Heads *a, int T) {
    Arena arena = {.base = m->rooms + omp_get_thread_num() * m->room_size};
    return place_room(&arena, a->nope + a->rope, a->value, T);
}

// [ATTENTION 1]
static void place_acts(Model *m, Arena *arena, int T, int training) {
    const Config *c = &m->c;
    size_t N = m->max_N, C = c->C;
    int layers = training ? c->L : 1;
    for (int l = 0; l < layers + training; l++) {
        Acts *a = l < layers ? &m->acts[l] : &m->d;  // the gradients' set comes last
        a->x = take(arena, N * C);
        size_t attention = arena->used;
        arena->overlap = l == layers;
        a->qkv = take(arena, N * c->qkv_row);
        a->q_a = take(arena, N * c->RQ);
        a->q = take(arena, has_latent(c) ? N * c->q_row : 0);
        a->kv_a = take(arena, N * c->kv_a_row);
        a->kv = take(arena, has_latent(c) ? N * c->kv_row : 0);
        a->att = take(arena, N * c->att_row);
        size_t end = arena->used;  // what your attention keeps belongs above this line
        if (l == layers) arena->used = attention;  // the shared room of the drawing
        a->fc = take(arena, N * 4 * C);
        if (arena->used < end) arena->used = end;
        arena->overlap = 0;
        if (l == layers) break;
        a->lse = take(arena, N * c->NH);
        a->x_mid = take(arena, N * C);
    }
    m->x_final = take(arena, N * C);
    m->norm = take(arena, N * C);
    m->latent = take(arena, N * c->R);
    m->q_latent = take(arena, N * c->RQ);
    m->gelu = training ? m->d.fc : take(arena, N * 4 * C);
    m->proj = take(arena, N * C);
    m->logits = take(arena, (size_t)m->head_rows * c->V);
    m->row_loss = take(arena, m->head_rows);
    Arena room = {0};
    place_room(&room, c->QK, c->HS, T);
    m->room_size = room.used;
    m->rooms = take(arena, omp_get_max_threads() * m->room_size);
    if (!training) return;
    m->d_norm = take(arena, N * C);
    m->d_latent = take(arena, N * c->R);
    m->d_q_latent = take(arena, N * c->RQ);
    m->d_k_rope = take(arena, N * c->NKV * c->rope);
    m->partial = take(arena, (size_t)PIECES * m->partial_row);
}

static void model_reserve(Model *m, int B, int T, int training) {
    // A limit under which tokens, and tokens times any width, fit an int. [ATTENTION 1]
    const Config *c = &m->c;
    long widest = max_int(max_int(max_int(4 * c->C, c->q_row), c->kv_a_row),
                          max_int(c->qkv_row, c->kv_row));
    if ((long)B * T > INT_MAX / widest)
        fail(1, "a batch of %d x %d tokens: expected at most %ld tokens for this model", B, T,
             INT_MAX / widest);
    m->max_N = B * T, m->max_T = T;
    // 4 MB of logits, but at least 256 rows and, for decoding, B
    m->head_rows = min_int(m->max_N, max_int(max_int(B, 256), (1 << 20) / c->V));
    m->acts = allocate(sizeof(Acts) * (training ? c->L : 1), "activations");
    Arena arena = {0};
    place_acts(m, &arena, T, training);
    arena_allocate(&arena, "activations");
    place_acts(m, &arena, T, training);
    m->act_memory = arena.base;
}

static void model_free(Model *m) {
    free(m->params), free(m->grads), free(m->adam_m), free(m->adam_v), free(m->rope_cos);
    free(m->rope_sin), free(m->tensors), free(m->w), free(m->g), free(m->acts), free(m->act_memory);
    free(m);
}

// ==== 13  MATRIX PRODUCT ========================================================================
//
// Nearly all time goes into products c = a b, M rows, N columns, sums of K terms. Section 14 of the
// writeup tells how they come near to what the processor can do: a TILE of MR x NR sums stays in
// registers, PANELS are read strictly forwards. The order in which an element of c is summed
// depends on shapes and strides alone, never on the number of threads.

// A vector of VECTOR_BYTES that may lie anywhere in an array of reals.
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
enum { KC = 256, NC = 1024 };  // depth of a thread's panels; columns of panels that all share

// c (rows, vectors*VW) = start + a b. Number (i, k) of a is a[i*a_row + k*a_step], rows of b are
// b_row apart. Always inlined, so that the constants of each caller unroll the loops and put acc
// into registers. With one vector (few_by_columns), a is the large matrix and comes from memory:
// its rows are fetched ahead, those of the tile after the next into the second-level cache (the
// first may be full of b).
__attribute__((always_inline))
static inline void tile(const int rows, const int vectors, int K, const real *a, long a_row,
                        long a_step, const real *b, long b_row, real *c, long c_row,
                        const real *start, long start_row) {
    vec acc[MR][2];
    #pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            acc[i][j] = start ? *(const vec *)(start + i * start_row + j * VW) : (vec){0};
    #pragma GCC unroll 2
    for (int k = 0; k < K; k++, a += a_step, b += b_row) {
        vec b0 = *(const vec *)b, b1 = *(const vec *)(b + (vectors - 1) * VW);
        #pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            if (vectors == 1 && k % 16 == 0) __builtin_prefetch(a + (2 * rows + i) * a_row, 0, 2);
            acc[i][0] += a[i * a_row] * b0;
            if (vectors == 2) acc[i][1] += a[i * a_row] * b1;
        }
    }
    #pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            *(vec *)(c + i * c_row + j * VW) = acc[i][j];
}

// Packs n lines of K numbers (line i, number k at src[i*line + k*deep], one of the two being 1)
// into panels of W lines: number k of line i goes to dst[(i/W)*W*K + k*W + i%W]. A last panel of
// fewer lines keeps what it had in their place: it meets only sums that are never stored. Inlined,
// so that W is a constant.
static inline void pack(real *dst, const real *src, long line, long deep, int n, int K,
                        const int W) {
    if (deep == 1) {  // a transpose, done in squares that stay in registers
        const int S = W < 8 ? W : 8;
        for (int i = 0; i < n; i += S)
            for (int k = 0; k < K; k += 8) {
                const real *s = src + i * line + k;
                real *d = dst + (long)(i / W) * W * K + i % W + k * W;
                if (i + S <= n && k + 8 <= K) {
                    for (int y = 0; y < S; y++) __builtin_prefetch(s + (S + y) * line);  // below
                    real square[8][8];
                    for (int y = 0; y < S; y++)
                        for (int x = 0; x < 8; x++) square[x][y] = s[y * line + x];
                    for (int x = 0; x < 8; x++)
                        for (int y = 0; y < S; y++) d[x * W + y] = square[x][y];
                } else {
                    for (int y = 0; y < min_int(S, n - i); y++)
                        for (int x = 0; x < min_int(8, K - k); x++) d[x * W + y] = s[y * line + x];
                }
            }
    } else {
        for (int k = 0; k < K; k++)
            for (int i = 0; i < n; i += W) {
                const real *s = src + k * deep + i;
                __builtin_prefetch(s + 12 * deep);  // rows far apart are not foreseen
                real *d = dst + (long)i * K + k * W;
                if (i + W <= n)
                    for (int y = 0; y < W; y++) d[y] = s[y];
                else
                    for (int y = 0; y < n - i; y++) d[y] = s[y];
            }
    }
    if (precision == BF16)
        for (long i = 0; i < round_up(n, W) * K; i++) dst[i] = rounded(dst[i]);
}

_Alignas(64) static _Thread_local real own_a[MC * KC], own_b[NC / 2 * KC];  // a thread's own panels
_Alignas(64) static real shared[NC * KC];                        // panels that all threads read

// --- A matrix unit (AMX, in Intel's servers since 2023), where the processor has one
//
// It multiplies tiles: registers of 16 rows of 64 bytes. One instruction adds to 16 x 16 float sums
// the product of 16 x 32 and 32 x 16 bfloat16 (subnormal ones count as zero): 8192 multiply-adds in
// 16 cycles, where two vector units do 512. The factor on the right has its numbers in PAIRS of two
// rows: line p of its tile is b(2p, j), b(2p+1, j) for 16 columns j; row i on the left is a(i, 2p),
// a(i, 2p+1) for 16 p, as it lies. So both are packed as pairs, 32 bits each, in panels of 32
// lines (rows of a, columns of b), zeros up to whole 32 numbers: pair p of line i of a panel is at
// p/16*512 + i*16 + p%16 in a's, at p*32 + i in b's. No other code here is for one processor.

static int matrix_unit;  // whether there is one, and the system lets this process use it
enum { PAIRS_A, PAIRS_B };

// Number k of line i is src[i*line + k*deep], one of the two being 1; n lines of K numbers.
static void pack_pairs(real *panels, const real *src, long line, long deep, int n, int K,
                       int which) {
    long depth = round_up(K, 32), apart = which == PAIRS_A ? 16 : 32;
    for (int i = 0; i < n; i += 16)
        for (int k = 0; k < K; k += 32) {
            union { uint32_t pairs[16][16]; uint16_t numbers[16][32]; } block;
            uint32_t *dst = (uint32_t *)panels + i / 32 * 16 * depth;
            dst += which == PAIRS_A ? k * 16 + i % 32 * 16 : k * 16 + i % 32;
            const real *s = src + i * line + k * deep;
            long s_line = line, s_deep = deep;
            real whole[16 * 32];
            if (n - i < 16 || K - k < 32) {  // at the edges, from a copy with zeros
                memset(whole, 0, sizeof whole);
                s_line = deep == 1 ? 32 : 1, s_deep = deep == 1 ? 1 : 16;
                for (int x = 0; x < min_int(16, n - i); x++)
                    for (int y = 0; y < min_int(32, K - k); y++)
                        whole[x * s_line + y * s_deep] = s[x * line + y * deep];
                s = whole;
            }
            if (deep == 1)  // a line's pairs side by side; else a pair of 16 lines
                for (int x = 0; x < 16; x++)
                    for (int y = 0; y < 32; y++)
                        block.numbers[x][y] = to_bfloat16(s[x * s_line + y]);
            else
                for (int y = 0; y < 16; y++)
                    for (int x = 0; x < 16; x++)
                        block.pairs[y][x] = to_bfloat16(s[2 * y * s_deep + x]) |
                            (uint32_t)to_bfloat16(s[(2 * y + 1) * s_deep + x]) << 16;
            if ((deep == 1) == (which == PAIRS_A))
                for (int r = 0; r < 16; r++) memcpy(dst + r * apart, block.pairs[r], 64);
            else
                for (int r = 0; r < 16; r++)
                    for (int x = 0; x < 16; x++) dst[r * apart + x] = block.pairs[x][r];
        }
}

#if defined __AMX_BF16__ && defined __linux__
// c, 32 x 32, = start + a b, from a panel of each, whole 32s deep. Two tiles of each: with 4 sums
// at work at a time, loads (8 cycles a tile) stay behind products.
static void multiply_pairs(const uint32_t *a, const uint32_t *b, long depth, real *c, long c_row,
                           const real *start, long start_row) {
    // palette 1, start row 0, bytes of a row, rows: of tiles 0 to 7
    static const struct { uint8_t palette, row, none[14]; uint16_t bytes[16]; uint8_t rows[16]; }
        shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    static _Thread_local int configured;
    if (!configured) _tile_loadconfig(&shape), configured = 1;
    __asm__ volatile("" ::: "memory");  // gcc does not know that tiles are loaded from memory
    long from = start_row * sizeof(real), to = c_row * sizeof(real);
    if (start) {
        _tile_loadd(0, start, from); _tile_loadd(1, start + 16, from);
        start += 16 * start_row;
        _tile_loadd(2, start, from); _tile_loadd(3, start + 16, from);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (long k = 0; k < depth; k += 32, a += 512, b += 512) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 128); _tile_loadd(7, b + 16, 128);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 256, 64);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, to); _tile_stored(1, c + 16, to);
    _tile_stored(2, c + 16 * c_row, to); _tile_stored(3, c + 16 * c_row + 16, to);
}

// Linux keeps tiles back (8 KB to save at every switch) from processes that have not asked.
static void find_matrix_unit(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    matrix_unit = NR == 32 && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#else
// The same without such a unit: tests have it where there is none.
static void multiply_pairs(const uint32_t *a, const uint32_t *b, long depth, real *c, long c_row,
                           const real *start, long start_row) {
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 32; j++) {
            real sum = start ? start[i * start_row + j] : 0;
            for (int p = 0; p < depth / 2; p++) {
                uint32_t x = a[p / 16 * 512 + i * 16 + p % 16], y = b[p * 32 + j];
                sum += from_bfloat16(x) * from_bfloat16(y);  // their lower halves
                sum += from_bfloat16(x >> 16) * from_bfloat16(y >> 16);
            }
            c[i * c_row + j] = sum;
        }
}
static void find_matrix_unit(void) {}
#endif

static void pack_panels(real *panels, Mat b, int K, int N) {
    if (matrix_unit) pack_pairs(panels, b.p, b.col, b.row, N, K, PAIRS_B);
    else pack(panels, b.p, b.col, b.row, N, K, NR);
}

// Numbers in which a panel of K rows lies, and how many rows own_b's and the shared ones have.
static long panel_size(int K) { return matrix_unit ? round_up(K, 32) / 2 * NR : (long)K * NR; }
static int panel_depth(void) { return matrix_unit ? 2 * KC : KC; }

// --- Tiles over whole matrices, within one thread

// c (M, N) = start + a b. Row i of a starts at a.p + i/MR*a_panel + i%MR*a.row.
//   a  in panels of a_panel numbers; or read where it lies, with a_panel = MR*a.row
//   b  in panels of NR columns, b_row = NR, `panel` numbers each; or in rows where it lies, with
//      panel = NR, readable up to NR numbers past its end
// A tile that sticks out of c is computed in `edge`, and what is inside is copied.
static void multiply_tiles(real *c, long c_row, Mat a, long a_panel, const real *b, long b_row,
                           long panel, int M, int N, int K, const real *start, long start_row) {
    for (int j = 0; j < N; j += NR, b += panel)
        for (int i = 0, rows; i < M; i += rows) {
            const real *pa = a.p + i / MR * a_panel + i % MR * a.row;
            const real *s = start ? start + i * start_row + j : NULL;
            real edge[MR * NR], *pc = c + i * c_row + j, *t = j + NR <= N ? pc : edge;
            long t_row = t == edge ? NR : c_row, s_row = start_row;
            size_t inside = (N - j) * sizeof(real);
            rows = M - i >= MR ? MR : M - i >= 4 ? 4 : 1;
            if (t == edge && s) {
                for (int r = 0; r < rows; r++) memcpy(edge + r * NR, s + r * start_row, inside);
                s = edge, s_row = NR;
            }
            if (rows == MR) tile(MR, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            else if (rows == 4) tile(4, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            else tile(1, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            if (t == edge)
                for (int r = 0; r < rows; r++) memcpy(pc + r * c_row, edge + r * NR, inside);
        }
}

// The same from panels of pairs, both; M at most MC.
static void multiply_pair_tiles(real *c, long c_row, const real *a, const real *b, long panel,
                                int M, int N, int K, const real *start, long start_row) {
    long depth = round_up(K, 32);
    for (int j = 0; j < N; j += 32, b += panel)
        for (int i = 0; i < M; i += 32) {
            const uint32_t *pa = (const uint32_t *)a + i / 2 * depth, *pb = (const uint32_t *)b;
            const real *s = start ? start + i * start_row + j : NULL;
            int rows = min_int(32, M - i), cols = min_int(32, N - j);
            real edge[32 * 32], *pc = c + i * c_row + j;
            size_t width = cols * sizeof(real);
            if (rows == 32 && cols == 32) multiply_pairs(pa, pb, depth, pc, c_row, s, start_row);
            else {
                for (int r = 0; s && r < rows; r++) memcpy(edge + r * 32, s + r * start_row, width);
                multiply_pairs(pa, pb, depth, edge, 32, s ? edge : NULL, 32);
                for (int r = 0; r < rows; r++) memcpy(pc + r * c_row, edge + r * 32, width);
            }
        }
}

static int must_pack(Mat a) { return a.col != 1 || precision == BF16; }

// Adds terms k .. k+kc-1 for M rows of c, from row i of a on: b's are in panels. The first terms
// start from `start`, later ones from what c has by then. If a must be packed, M is at most MC.
static void multiply_rows(real *c, long c_row, Mat a, int i, int k, const real *panels, long panel,
                          int M, int N, int kc, const real *start, long start_row) {
    Mat rows = mat_from(a, i, k);
    if (k) start = c, start_row = c_row;
    if (matrix_unit) {
        pack_pairs(own_a, rows.p, a.row, a.col, M, kc, PAIRS_A);
        multiply_pair_tiles(c, c_row, own_a, panels, panel, M, N, kc, start, start_row);
        return;
    }
    if (must_pack(a)) {
        pack(own_a, rows.p, a.row, a.col, M, kc, MR);
        rows = (Mat){own_a, 1, MR, NULL};
    }
    multiply_tiles(c, c_row, rows, MR * (must_pack(a) ? kc : a.row), panels, NR, panel, M, N, kc,
                   start, start_row);
}

static void multiply_panels(real *c, long c_row, Mat a, const real *panels, long depth,
                            int M, int N, int K, const real *start, long start_row) {
    if (precision == FP32)
        multiply_tiles(c, c_row, a, MR * a.row, panels, NR, depth * NR, M, N, K, start, start_row);
    else
        for (int k = 0, kc; k < K; k += kc) {
            kc = min_int(panel_depth(), K - k);
            for (int i = 0; i < M; i += MC)
                multiply_rows(c + i * c_row, c_row, a, i, k, panels + panel_size(k),
                              panel_size(depth), min_int(MC, M - i), N, kc,
                              start ? start + i * start_row : NULL, start_row);
        }
}

// --- A few rows: what decoding does all the time
//
// Each number of b is used M times only, too few to pay for packing b; it is read as it lies, and
// memory should set the pace. How depends on whether b's rows or its columns are contiguous.

enum { FEW = 16 };  // rows that are few, a multiple of VW

// Rows of a, which are contiguous, as floats: rounded, or bfloat16 already. dst (rows, n)
static void as_floats(real *dst, long dst_row, Mat a, int rows, int n) {
    for (int i = 0; i < rows; i++, dst += dst_row) {
        Mat row = mat_from(a, i, 0);
        for (int j = 0; j < n; j++)
            dst[j] = a.bf16 ? from_bfloat16(row.bf16[j]) : rounded(row.p[j]);
    }
}

// If b's columns are contiguous and a has several rows, compute the transpose, c' = b' a': each
// number of b multiplies a vector, of VW rows of a. x holds a in panels of VW rows.
static void few_by_columns(real *c, long c_row, const real *x, Mat b, int M, int N, int K,
                           const real *start, long start_row) {
    for (int n = 0, cols; n < N; n += cols) {
        cols = N - n >= MR ? MR : N - n >= 4 ? 4 : 1;
        Mat bn = mat_from(b, 0, n);
        if (precision == BF16) {
            as_floats(own_b, K, (Mat){bn.p, b.col, 1, bn.bf16}, cols, K);
            bn = transposed(own_b, K);
        }
        for (int m = 0; m < M; m += VW) {
            real t[MR * VW];  // (cols, VW)
            const real *px = x + (long)m * K;
            if (cols == MR) tile(MR, 1, K, bn.p, bn.col, 1, px, VW, t, VW, NULL, 0);
            else if (cols == 4) tile(4, 1, K, bn.p, bn.col, 1, px, VW, t, VW, NULL, 0);
            else tile(1, 1, K, bn.p, bn.col, 1, px, VW, t, VW, NULL, 0);
            for (int i = m; i < min_int(m + VW, M); i++)
                for (int j = 0; j < cols; j++)
                    c[i * c_row + n + j] = (start ? start[i * start_row + n + j] : 0)
                                         + t[j * VW + i - m];
        }
    }
}

// The same for one row, x: dot products, eight at a time. They stand N/8 columns apart, so that
// memory delivers eight streams without gaps. Inlined, so that it is known whether b is bfloat16.
static inline real number(const void *p, long i, const int is_bf16) {
    return is_bf16 ? from_bfloat16(((const uint16_t *)p)[i]) : ((const real *)p)[i];
}

__attribute__((always_inline))
static inline void few_dots(real *c, const real *x, Mat b, int N, int K, const real *start,
                            const int is_bf16) {
    int apart = (N + 7) / 8;
    for (int j = 0; j < apart; j++) {
        const void *y[8];  // some are computed twice at the end
        for (int n = 0; n < 8; n++) {
            Mat bn = mat_from(b, 0, min_int(j + n * apart, N - 1));
            y[n] = is_bf16 ? (const void *)bn.bf16 : bn.p;
        }
        const void *b0 = y[0], *b1 = y[1], *b2 = y[2], *b3 = y[3];
        const void *b4 = y[4], *b5 = y[5], *b6 = y[6], *b7 = y[7];
        real s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        #pragma omp simd reduction(+:s0, s1, s2, s3, s4, s5, s6, s7)
        for (int k = 0; k < K; k++) {
            s0 += x[k] * number(b0, k, is_bf16), s1 += x[k] * number(b1, k, is_bf16);
            s2 += x[k] * number(b2, k, is_bf16), s3 += x[k] * number(b3, k, is_bf16);
            s4 += x[k] * number(b4, k, is_bf16), s5 += x[k] * number(b5, k, is_bf16);
            s6 += x[k] * number(b6, k, is_bf16), s7 += x[k] * number(b7, k, is_bf16);
        }
        real sum[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
        for (int n = 0, at = j; n < 8 && at < N; n++, at += apart)
            c[at] = (start ? start[at] : 0) + sum[n];
    }
}

// With rounding, FEW rows: b's rows, or panels, become panels of floats, 128 columns at a time.
static void few_rounded(real *c, long c_row, Mat a, Mat b, long panel, int M, int N, int K,
                        const real *start, long start_row) {
    as_floats(own_a, K, a, M, K);
    for (int n = 0; n < N; n += 128) {
        int cols = min_int(128, N - n);
        for (int j = 0; j < cols; j += NR)
            as_floats(own_b + j * K, NR, mat_from(b, 0, (n + j) / NR * panel), K,
                      min_int(NR, cols - j));
        multiply_tiles(c + n, c_row, rows_of(own_a, K), MR * K, own_b, NR, (long)K * NR, M, cols, K,
                       start ? start + n : NULL, start_row);
    }
}

// b's rows NR apart are read as panels: a plain matrix of such rows has at most NR columns and is
// a single panel, which is the same.
static void matmul_few(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                       const real *start, long start_row) {
    long panel = b.row == NR ? (long)K * NR : NR;
    b = with_twin(b);
    int rounds = precision == BF16, dots = M == 1 && b.col != 1 && rounds == (b.bf16 != NULL);
    int most = !dots ? MC * KC / FEW : rounds ? MC * KC : K;  // terms at a time
    if (b.col == 1 && !rounds) {
        multiply_tiles(c, c_row, a, MR * a.row, b.p, b.row, panel, M, N, K, start, start_row);
        return;
    }
    for (int m = 0; m < M; m += FEW)
        for (int k = 0; k < K; k += most) {
            int rows = min_int(FEW, M - m), kc = min_int(most, K - k);
            real *cm = c + m * c_row;
            const real *from = k ? cm : start ? start + m * start_row : NULL;
            long from_row = k ? c_row : start_row;
            Mat am = mat_from(a, m, k), bk = mat_from(b, k, 0);
            if (b.col == 1) few_rounded(cm, c_row, am, bk, panel, rows, N, kc, from, from_row);
            else if (!dots) {
                pack(own_a, am.p, a.row, 1, rows, kc, VW);
                few_by_columns(cm, c_row, own_a, bk, rows, N, kc, from, from_row);
            } else if (rounds) {
                as_floats(own_a, kc, am, 1, kc);
                few_dots(cm, own_a, bk, N, kc, from, 1);
            } else few_dots(cm, am.p, bk, N, kc, from, 0);
        }
}

// --- The product, by all threads
//
// c is cut into rectangles. What one needs in panels, its thread packs alone, or all threads pack
// together what all will read (`shared`). Which of the two depends on the shape: see "Who packs" in
// section 14.

// By one thread, which packs b, NC/2 columns at most, and a too if its rows are not contiguous.
static void multiply_alone(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                           const real *start, long start_row) {
    int height = must_pack(a) ? MC : M;
    for (int k = 0, kc; k < K; k += kc) {
        kc = min_int(panel_depth(), K - k);
        pack_panels(own_b, mat_from(b, k, 0), kc, N);
        for (int i = 0; i < M; i += height)
            multiply_rows(c + i * c_row, c_row, a, i, k, own_b, panel_size(kc),
                          min_int(height, M - i), N, kc, start ? start + i * start_row : NULL,
                          start_row);
    }
}

// Which of n units of work a thread does next: one of its own, which are the same each time, or
// else one that another has not begun (a core may be late: on 16, waiting for it costs 10% of a
// step). n: none is left. taken[t] counts what has been taken of thread t's.
static int next_unit(int *taken, int n) {
    int threads = omp_get_num_threads();
    for (int t = 0; t < threads; t++) {
        int owner = (omp_get_thread_num() + t) % threads, i;
        #pragma omp atomic capture
        i = taken[owner]++;
        i += (long)n * owner / threads;
        if (i < (long)n * (owner + 1) / threads) return i;
    }
    return n;
}

// With b in `shared`, up to NC columns of it at a time. A thread's rows of c are mostly the same:
// still in its cache when the next KC terms are added to them, and when the next operation reads
// them.
static void multiply_shared(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                            const real *start, long start_row) {
    int threads = omp_get_max_threads(), taken[threads];
    int groups = threads * ((M - 1) / (threads * MC) + 1);  // of rows, about as many for each
    int height = round_up((M - 1) / groups + 1, MR), units = (M - 1) / height + 1;  // whole tiles
    #pragma omp parallel
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k = 0, kc; k < K; k += kc) {
            int n = min_int(NC, N - j0);
            kc = min_int(panel_depth(), K - k);
            taken[omp_get_thread_num()] = 0;
            #pragma omp for
            for (int j = 0; j < n; j += NR)
                pack_panels(shared + j / NR * panel_size(kc), mat_from(b, k, j0 + j), kc,
                            min_int(NR, n - j));
            for (int u; (u = next_unit(taken, units)) < units;) {
                int i = u * height;
                continue_sums();  // [MPI]
                multiply_rows(c + i * c_row + j0, c_row, a, i, k, shared, panel_size(kc),
                              min_int(height, M - i), n, kc,
                              start ? start + i * start_row + j0 : NULL, start_row);
            }
            #pragma omp barrier
        }
}

// Stops where a product would give wrong numbers.
static void check_matmul(Mat a, Mat b) {
    if (omp_in_parallel())
        #pragma omp critical
        fail(1, "matmul: called within a parallel region, expected outside: it is parallel itself");
    if ((a.row != 1 && a.col != 1) || (b.row != 1 && b.col != 1))
        fail(1, "matmul: strides %ld, %ld and %ld, %ld: expected one of each two to be 1", a.row,
             a.col, b.row, b.col);
}

static void matmul(real *c, long c_row, Mat a, Mat b, int M, int N, int K,
                   const real *start, long start_row) {
    int threads = omp_get_max_threads(), packed = must_pack(a);
    check_matmul(a, b);
    if (M <= FEW && a.col == 1 && b.row == 1) {
        int columns = M == 1 ? 64 : round_up((N - 1) / threads + 1, MR);  // few_dots: streams of 8
        #pragma omp parallel for
        for (int j = 0; j < N; j += columns)
            matmul_few(c + j, c_row, a, mat_from(b, 0, j), M, min_int(columns, N - j), K,
                       start ? start + j : NULL, start_row);
    } else if (packed ? (long)M * N <= NC * NC / 2 : M <= 4 * MC * threads) {
        // Groups of at most 8 MC rows, which the next panel still finds in the second-level cache
        // (unless K is large); more groups where panels are too few for all threads.
        int panels = (N - 1) / NR + 1, width = NR;
        int groups = max_int((M - 1) / (8 * MC) + 1, (2 * threads - 1) / panels + 1);
        if (packed) {
            int across = (N - 1) / (NC / 2) + 1;
            for (int n = across + 1; n <= threads; n++)  // for each thread, of least rows + columns
                if (threads % n == 0 && M * n / threads + N / n < M * across / threads + N / across)
                    across = n;
            groups = max_int(threads / across, 1), width = round_up((N - 1) / across + 1, NR);
        }
        int height = round_up((M - 1) / groups + 1, MR);
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int i = 0; i < M; i += height)
            for (int j = 0; j < N; j += width) {
                continue_sums();  // [MPI]
                multiply_alone(c + i * c_row + j, c_row, mat_from(a, i, 0), mat_from(b, 0, j),
                               min_int(height, M - i), min_int(width, N - j), K,
                               start ? start + i * start_row + j : NULL, start_row);
            }
    } else
        multiply_shared(c, c_row, a, b, M, N, K, start, start_row);
}

// --- exp, in a form that compilers turn into vector code (libm's is a call per number)

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2)/2, where a polynomial of degree 6, fitted
// for the least relative error, is off by 4e-9. With rounding the error stays below 2e-7 for x in
// [-60, 60], to whose ends x is clamped; NaN stays NaN. e^-60 = 9e-27 is as good as zero for a
// probability; stopping there also avoids subnormal numbers, each of which costs a hundred cycles.
static inline real fast_exp(real x) {
#ifdef REAL_DOUBLE
    return exp(x);
#else
    x = x < -60.0f ? -60.0f : x > 60.0f ? 60.0f : x;
    // Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to an integer, which
    // then sits in the low bits of the float.
    union { float f; uint32_t u; } shifted, power;
    shifted.f = x * 1.44269504f + 12582912.0f;
    float n = shifted.f - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: exact product
    float p = 1 + r * (1 + r * (0.49999993f + r * (0.16666521f + r * (0.04166839f
                + r * (0.00836871f + r * 0.00138146f)))));
    power.u = (shifted.u + 127) << 23;                       // 2^n: n in the exponent's place
    return p * power.f;
#endif
}

// Sixteen running maxima, since compilers do not reorder a single one.
static real largest(const real *x, int n) {
    real max[16];
    for (int i = 0; i < 16; i++) max[i] = x[0];
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) max[j] = x[i + j] > max[j] ? x[i + j] : max[j];
    for (; i < n; i++) max[0] = x[i] > max[0] ? x[i] : max[0];
    for (int j = 1; j < 16; j++) max[0] = max[j] > max[0] ? max[j] : max[0];
    return max[0];
}

static real exp_row(real *x, int n, real scale, real max) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < n; i++) {
        x[i] = fast_exp(scale * (x[i] - max));
        sum += x[i];
    }
    return sum;
}

// ==== 14  DATA ==================================================================================
// Files are little-endian, as are the machines this runs on.

static FILE *open_regular(const char *path, size_t *size) {
    struct stat st;
    int found = !stat(path, &st);  // opening a pipe would wait for its writer
    if (found && !S_ISREG(st.st_mode))
        fail(1, "%s: found a %s, expected a regular file", path,
             S_ISDIR(st.st_mode) ? "folder" : "pipe or device");
    FILE *f = found ? fopen(path, "rb") : NULL;
    if (!f) fail(1, "%s: cannot open: %s", path, strerror(errno));
    *size = st.st_size;
    return f;
}

// A whole file in memory, with a NUL behind it.
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *f = open_regular(path, size);
    unsigned char *bytes = allocate(*size + 1, path);
    if (fread(bytes, 1, *size, f) != *size) fail(1, "%s: cannot read its %zu bytes", path, *size);
    fclose(f);
    return bytes;
}

// What comes from a file, or from standard input for "-", until it ends: a pipe will do.
static unsigned char *read_prompt(const char *path, size_t *size) {
    size_t room = 0, n;
    unsigned char *bytes = NULL;
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) fail(1, "--prompt-file %s: cannot open: %s", path, strerror(errno));
    *size = 0;
    do {
        if (*size == room) bytes = realloc(bytes, room = 2 * room + 4096);
        if (!bytes) fail(1, "--prompt-file %s: too long for memory", path);
        *size += n = fread(bytes + *size, 1, room - *size, f);
    } while (n);
    if (ferror(f)) fail(1, "--prompt-file %s: cannot read: %s", path, strerror(errno));
    if (f != stdin) fclose(f);
    return bytes;
}

// --- Tokens: llm.c's format (256 int32: 20240520, 1, count; then uint16 tokens), or plain text,
//     whose bytes are the tokens

static Data data_load(const char *path) {
    enum { HEADER = 1024, MAGIC = 20240520 };
    Data d = {.path = path};
    size_t size;
    unsigned char *bytes = read_file(path, &size);
    int32_t header[3] = {0};
    memcpy(header, bytes, size < sizeof header ? size : sizeof header);
    if (header[0] == MAGIC) {
        if (size < HEADER)
            fail(1, "%s: %zu bytes, expected a header of %d: cut short", path, size, HEADER);
        if (header[1] != 1) fail(1, "%s: token file version %d, expected 1", path, header[1]);
        if (header[2] < 0 || (size - HEADER) != 2 * (size_t)header[2])
            fail(1, "%s: %zu bytes follow the header, expected %lld for its count of %d tokens",
                 path, size - HEADER, 2LL * header[2], header[2]);
        d.n = header[2];
        d.tokens = allocate(size - HEADER, path);
        memcpy(d.tokens, bytes + HEADER, size - HEADER);
    } else {
        unsigned char *zero = memchr(bytes, 0, size);
        if (zero)
            fail(1, "%s: neither tokens (first number %d, expected %d) nor text (a zero byte at "
                 "offset %ld)", path, header[0], MAGIC, (long)(zero - bytes));
        d.n = size, d.text = 1;
        d.tokens = allocate(size * sizeof *d.tokens, path);
        for (size_t i = 0; i < size; i++) d.tokens[i] = bytes[i];
    }
    free(bytes);
    if (d.n < 2) fail(1, "%s: %ld tokens, expected at least 2", path, d.n);
    for (long i = 0; i < d.n; i++) d.largest = max_int(d.largest, d.tokens[i]);
    return d;
}

// --- Tokenizer: llm.c's format (256 uint32: 20240328, version, vocabulary, end of text; then for
//     each token a length byte and its bytes). Without a file tokens are bytes.

struct Tokenizer {
    int V, eot;             // vocabulary, 0 if unknown; the token that ends a text
    unsigned char *bytes;   // those of token t are bytes[start[t]] .. bytes[start[t+1] - 1]
    size_t *start;
    int *table, mask;       // hash table from bytes to token, -1: empty; its size less one
};

static int token_bytes(const Tokenizer *t, int token) {
    return token < t->V ? (int)(t->start[token + 1] - t->start[token]) : -1;
}

// An end-of-text token of one byte only says where samples start.
static int is_end_of_text(const Tokenizer *t, int token) {
    return token == t->eot && token_bytes(t, token) != 1;
}

// From the text's end backwards, for each place in the last token where it can lie.
static int completes(const Tokenizer *t, const int *tokens, int n, const char *text) {
    for (int end = token_bytes(t, tokens[n - 1]); end > 0; end--) {
        int i = n - 1, at = end, left = strlen(text);
        while (left && i >= 0) {
            if (!at) at = --i >= 0 ? max_int(0, token_bytes(t, tokens[i])) : 0;
            else if (t->bytes[t->start[tokens[i]] + --at] != (unsigned char)text[--left]) break;
            else if (!left) return 1;
        }
    }
    return 0;
}

// Where the table has the token with these bytes, or the free place where it belongs.
static int *tokenizer_place(const Tokenizer *t, const unsigned char *bytes, int n) {
    for (uint32_t i = hash_bytes(bytes, n) & t->mask;; i = (i + 1) & t->mask) {
        int token = t->table[i];
        if (token == -1) return &t->table[i];
        if (token_bytes(t, token) == n && !memcmp(t->bytes + t->start[token], bytes, n))
            return &t->table[i];
    }
}

// Of tokens with the same bytes the first counts. Text never becomes <|endoftext|>, nor "".
static void tokenizer_index(Tokenizer *t) {
    int size = 1;
    while (size < 2 * t->V + 2) size *= 2;
    t->mask = size - 1;
    t->table = allocate(size * sizeof(int), "tokenizer");
    for (int i = 0; i < size; i++) t->table[i] = -1;
    for (int i = 0; i < t->V; i++) {
        int n = token_bytes(t, i), *place = tokenizer_place(t, t->bytes + t->start[i], n);
        if (*place == -1 && n && (i != t->eot || n == 1)) *place = i;
    }
}

// Samples start as a line does, after a newline. Text files have nothing else, and of token files
// many have one end of text or none: too few for a model to learn what follows it. That token is
// left for vocabularies without a newline.
static int first_token(const Tokenizer *t) {
    int newline = *tokenizer_place(t, (const unsigned char *)"\n", 1);
    return newline == -1 ? t->eot : newline;
}

// The first V bytes as tokens, 256 at most; V = 0: what tokens stand for is not known.
static Tokenizer tokenizer_bytes(int V) {
    Tokenizer t = {.V = min_int(V, 256), .bytes = allocate(256, "tokenizer")};
    t.eot = max_int(0, min_int('\n', V - 1));
    t.start = allocate(257 * sizeof(size_t), "tokenizer");
    for (int i = 0; i < t.V; i++) t.bytes[i] = i, t.start[i + 1] = i + 1;
    tokenizer_index(&t);
    return t;
}

static Tokenizer tokenizer_load(const char *path) {
    enum { HEADER = 1024, MAGIC = 20240328, GPT2_EOT = 50256 };
    size_t size, at = HEADER;
    Tokenizer t = {.bytes = read_file(path, &size)};
    uint32_t header[4] = {0};
    memcpy(header, t.bytes, size < sizeof header ? size : sizeof header);
    if (size < HEADER)
        fail(1, "%s: %zu bytes, a tokenizer's header alone has %d", path, size, HEADER);
    if (header[0] != MAGIC)
        fail(1, "%s: first number %u, expected a tokenizer's %d", path, header[0], MAGIC);
    if (header[1] != 1 && header[1] != 2)
        fail(1, "%s: tokenizer version %u, expected 1 or 2", path, header[1]);
    if (header[2] < 1 || header[2] > 65536)
        fail(1, "%s: vocabulary of %u, expected 1 to 65536", path, header[2]);
    t.V = header[2];
    t.eot = header[1] == 1 ? GPT2_EOT : (int)header[3];  // version 1 did not store it
    if (t.eot < 0 || t.eot >= t.V)
        fail(1, "%s: end-of-text token %u, expected less than %d", path, t.eot, t.V);
    t.start = allocate((t.V + 1) * sizeof(size_t), path);
    for (int i = 0; i < t.V; i++) {
        size_t length = at < size ? t.bytes[at] : 0;
        if (at >= size || at + 1 + length > size)
            fail(1, "%s: ends within token %d, expected %d tokens: cut short", path, i, t.V);
        memmove(t.bytes + t.start[i], t.bytes + at + 1, length);  // never overtakes what it reads
        t.start[i + 1] = t.start[i] + length;
        at += 1 + length;
    }
    if (at != size) fail(1, "%s: %zu bytes after its last token", path, size - at);
    tokenizer_index(&t);
    return t;
}

static int same_tokens(const Tokenizer *a, const Tokenizer *b) {
    return a->V == b->V && !memcmp(a->start, b->start, (a->V + 1) * sizeof *a->start) &&
           !memcmp(a->bytes, b->bytes, a->start[a->V]);
}

static void tokenizer_free(Tokenizer *t) { free(t->bytes), free(t->start), free(t->table); }

// How many bytes follow the first byte of a character in UTF-8; 0 also if c is no such byte.
static int bytes_after(unsigned char c) {
    return c < 0xC2 || c > 0xF4 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
}

// Leaves out control characters: ASCII's, and U+0080 to U+009F, which stand in UTF-8 as two bytes
// but which some terminals also take as one. Bytes that continue a character of UTF-8 are in the
// same range; a token may end within one, so what the next byte can be is remembered.
static void print_token(const Tokenizer *t, int token, Printer *p) {
    for (int i = 0; i < token_bytes(t, token); i++) {
        unsigned char c = t->bytes[t->start[token] + i];
        int continues = p->expected && c >= p->least && c < 0xC0;
        if (continues) p->expected--, p->least = 0x80;
        else {
            p->expected = bytes_after(c);
            p->least = c == 0xC2 || c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
        }
        int plain = c < 0x80 ? (c >= 32 && c != 127) || c == '\n' || c == '\t' : c >= 0xA0;
        if (plain || continues) putchar(c);
    }
}

// --- Encoding a text: byte-pair encoding, whose merges need no list of their own, since tokens are
//     numbered in the order in which their merges were learned: of all adjacent pairs whose joined
//     bytes are a token, the one with the lowest number merges first

enum { OTHER, LETTER, NUMBER, SPACE };

static int unicode_class(int code);  // chapter 17

// The class of the character that a text of n bytes begins with, and its length. Bytes that are no
// UTF-8 are taken for letters: they may be parts of some.
static int character_class(const unsigned char *text, long n, long *length) {
    static const int from[] = {0, 0x80, 0x800, 0x10000, 0x110000};  // codes of 1, 2, 3, 4 bytes
    int more = bytes_after(text[0]), code = more ? text[0] & 0x3F >> more : text[0];
    *length = 1;
    for (int i = 1; i <= more; i++) {
        if (i == n || (text[i] & 0xC0) != 0x80) return LETTER;
        code = code << 6 | (text[i] & 0x3F);
    }
    *length += more;
    int surrogate = code >= 0xD800 && code < 0xE000;  // numbers that are no characters
    return code < from[more] || code >= from[more + 1] || surrogate ? LETTER : unicode_class(code);
}

// The length of the first piece of a text of n bytes: tokens never cross from one piece to the
// next. GPT-2's rule: 's 't 're 've 'm 'll 'd; else a run of letters, of numbers, or of other
// characters, with a space before it if there is one; else white space, which leaves its last
// character to what follows.
static long first_piece(const unsigned char *text, long n) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        long length = strlen(endings[i]);
        if (length <= n && !memcmp(text, endings[i], length)) return length;
    }
    long at = text[0] == ' ' && n > 1, last = 0, length;
    int class = character_class(text + at, n - at, &length);
    for (; at < n && character_class(text + at, n - at, &length) == class; at += length) last = at;
    return class == SPACE && at < n && last > 0 ? last : at;
}

// A piece while it is merged. Its parts, at first single bytes, are known by the place of their
// first byte. To find what merges next, and of equals the leftmost, in log n steps, `least` is a
// tree in an array: above the nodes 2k and 2k+1 stands k, the smaller of the two, up to node 1;
// node leaves + i is the token that part i would make with the part after it, V if none.
typedef struct {
    const unsigned char *text;
    int n, leaves;                // bytes; a power of 2, as many or more
    int *before, *after, *least;  // per part the place of the one before and after it; (2 leaves)
} Piece;

static void set_least(Piece *p, int i, int token) {
    int k = p->leaves + i;
    for (p->least[k] = token; k > 1; k /= 2)
        p->least[k / 2] = min_int(p->least[k], p->least[k ^ 1]);
}

static void look_up_pair(const Tokenizer *t, Piece *p, int i) {
    int second = p->after[i];
    int token = second == p->n ? -1 : *tokenizer_place(t, p->text + i, p->after[second] - i);
    set_least(p, i, token == -1 ? t->V : token);
}

static void merge(const Tokenizer *t, Piece *p) {
    for (int i = 0; i < p->n; i++) p->before[i] = i - 1, p->after[i] = i + 1;
    for (int k = 1; k < 2 * p->leaves; k++) p->least[k] = t->V;
    for (int i = 0; i < p->n; i++) look_up_pair(t, p, i);
    while (p->least[1] != t->V) {
        int k = 1;
        while (k < p->leaves) k = 2 * k + (p->least[2 * k] != p->least[k]);
        int i = k - p->leaves, second = p->after[i], third = p->after[second];
        p->after[i] = third, p->before[third] = i;
        set_least(p, second, t->V);
        look_up_pair(t, p, i);
        if (i > 0) look_up_pair(t, p, p->before[i]);
    }
}

// Tokens of a text of n bytes into out, which has room for n; returns how many.
static long encode(const Tokenizer *t, const unsigned char *text, long n, int *out) {
    long count = 0, longest = 1;
    for (long at = 0, length; at < n; at += length)
        longest = max_int(longest, length = first_piece(text + at, n - at));
    int *room = allocate((6 * longest + 1) * sizeof(int), "prompt");
    Piece p = {.before = room, .after = room + longest + 1, .least = room + 2 * longest + 1};
    for (long at = 0; at < n; at += p.n) {
        p.text = text + at, p.n = first_piece(text + at, n - at);
        for (p.leaves = 1; p.leaves < p.n; p.leaves *= 2) {}
        merge(t, &p);
        for (int i = 0; i < p.n; i = p.after[i]) {
            int token = *tokenizer_place(t, p.text + i, p.after[i] - i);
            if (token == -1)
                fail(2, "prompt: byte %d at place %ld is not in the vocabulary", p.text[i],
                     at + i);
            out[count++] = token;
        }
    }
    free(room);
    return count;
}

// --- Batches

enum { RANDOM, SEQUENTIAL };
static const char *const order_names[] = {"random", "sequential", NULL};

// Sequential: consecutive pieces of B*T tokens, from the start again when the rest is too short
// (as llm.c). Random: every row starts anywhere. Both depend on nothing but seed and index.
static void next_batch(const Data *d, int order, uint64_t seed, long index,
                       int *x, int *y, int B, int T) {
    uint64_t key = random_stream(seed, STREAM_DATA, index);
    for (int b = 0; b < B; b++) {
        long from = order == SEQUENTIAL ? index % ((d->n - 1) / ((long)B * T)) * B * T + (long)b * T
                                        : (long)(random_bits(key, b) % (d->n - T));
        for (int t = 0; t < T; t++) {
            x[b * T + t] = d->tokens[from + t];
            y[b * T + t] = d->tokens[from + t + 1];
        }
    }
}

// ==== 15  CHECKPOINTS ===========================================================================
// safetensors: 8 bytes length of the header, the header in JSON, then the tensors' raw data.
// {"__metadata__": {"key": "value", ...}, "name": {"dtype": "F32", "shape": [2, 3],
// "data_offsets": [from, to]}, ...}. A training checkpoint has the moments adam.m.* and adam.v.*
// beside the parameters and the run's state in the metadata; it opens as a model all the same.

// The configuration's keys in the metadata. One list serves writing and reading.
typedef struct {
    const char *key;
    size_t offset;                      // of the int in Config
    const char *const *names;           // NULL: a number
    int (*is_default)(const Config *);  // then files leave it out, as older ones do; NULL: never
} ConfigKey;

static int default_nope(const Config *c) {
    return c->position != DECOUPLED || c->NOPE == c->HS - c->RD;
}

static const ConfigKey config_keys[] = {  // [ATTENTION 1] one of yours needs an is_default
    {"attention", offsetof(Config, attention), attention_names, NULL},
    {"position", offsetof(Config, position), position_names, NULL},
    {"n_layer", offsetof(Config, L), NULL, NULL},
    {"n_head", offsetof(Config, NH), NULL, NULL},
    {"n_kv_head", offsetof(Config, NKV), NULL, NULL},
    {"n_embd", offsetof(Config, C), NULL, NULL},
    {"block_size", offsetof(Config, block_size), NULL, NULL},
    {"vocab_size", offsetof(Config, V), NULL, NULL},
    {"q_rank", offsetof(Config, RQ), NULL, NULL},
    {"kv_rank", offsetof(Config, R), NULL, NULL},
    {"rope_dim", offsetof(Config, RD), NULL, NULL},
    {"latent_norm", offsetof(Config, latent_norm), norm_names, NULL},
    {"nope_dim", offsetof(Config, NOPE), NULL, default_nope},
};
enum { CONFIG_KEYS = sizeof config_keys / sizeof *config_keys };

// What a configuration has for a key; NULL where it is left out.
static const char *config_text(const Config *c, const ConfigKey *k) {
    static char number[16];
    int value = *(const int *)((const char *)c + k->offset);
    if (k->is_default && k->is_default(c)) return NULL;
    snprintf(number, sizeof number, "%d", value);
    return k->names ? k->names[value] : number;
}

// --- Writing

// A checkpoint has one set of tensors, or three.
static const char *const set_prefix[] = {"", "adam.m.", "adam.v."};

static real *set_of(const Model *m, int set) {
    return set == 0 ? m->params : set == 1 ? m->adam_m : m->adam_v;
}

// path and an ending.
static char *with_ending(const char *path, const char *ending) {
    char *name = allocate(strlen(path) + strlen(ending) + 1, path);
    sprintf(name, "%s%s", path, ending);
    return name;
}

// The file that a link leads to; else the path itself. What is renamed to a link would replace it.
static const char *link_target(const char *path) {
    struct stat st;
    if (!path || lstat(path, &st) || !S_ISLNK(st.st_mode)) return path;
    const char *target = realpath(path, NULL);
    if (!target) fail(1, "%s: a link that leads to no file: %s", path, strerror(errno));
    return target;
}

// The files that a run writes. No other run can: each has path.lock, which is locked for as long as
// this program lives, however it ends. What stood there before, or is put there while it runs, is
// kept as `old`.
typedef struct {
    const char *option, *path;
    char *lock, *old;  // old: NULL if there is nothing to keep
    char *beside;      // a checkpoint that could not have the name
    struct stat is;    // of the lock
    long step, saved;  // of a checkpoint that is to be kept, 0: unknown; of this run's own, or -1
    int kept;
} Held;
static Held held[3];
static int n_held;

static void release_files(void) {
    while (n_held) unlink(held[--n_held].lock);
}

// The first of path.old, path.old2, path.old3, ... (or of .tmp, ...) that nothing bears, not even a
// link.
static char *free_name(const char *path, const char *ending) {
    struct stat st;
    char *name = with_ending(path, ending), numbered[20];
    for (int i = 2; !lstat(name, &st); i++) {
        free(name);
        snprintf(numbered, sizeof numbered, "%s%d", ending, i);
        name = with_ending(path, numbered);
    }
    return name;
}

// Whether `name` is one that the writer of `path` takes for itself, by whatever way its folder is
// named.
static int is_helper(const char *name, const char *path) {
    const char *of[] = {name, path}, *last[2];
    struct stat folder[2] = {0};
    for (int i = 0; i < 2; i++) {
        const char *slash = strrchr(of[i], '/');
        last[i] = slash ? slash + 1 : of[i];
        char *copy = with_ending(of[i], "");
        copy[last[i] - of[i]] = 0;
        stat(*copy ? copy : ".", &folder[i]);
        free(copy);
    }
    size_t n = strlen(last[1]);
    const char *ending = last[0] + n;
    return folder[0].st_ino == folder[1].st_ino && folder[0].st_dev == folder[1].st_dev &&
           !strncmp(last[0], last[1], n) &&
           (!strncmp(ending, ".tmp", 4) || !strcmp(ending, ".lock") || !strncmp(ending, ".old", 4));
}

// The step that a checkpoint of this program says it is from; 0 if none.
static long step_in(const char *path) {
    char start[4096] = "";
    FILE *f = fopen(path, "rb");
    if (!f) return 0;
    size_t n = fseek(f, 8, SEEK_SET) ? 0 : fread(start, 1, sizeof start - 1, f);
    fclose(f);
    start[n] = 0;
    char *found = strstr(start, "\"step\":\"");
    return found ? atol(found + 8) : 0;
}

// With `continued` what stands in the file is this run's own.
static void hold_file(const char *option, const char *path, int continued) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    struct stat there;
    Held *h = &held[n_held];
    *h = (Held){.option = option, .path = path, .lock = with_ending(path, ".lock")};
    for (Held *o = held; o < h; o++)
        if (is_helper(path, o->path) || is_helper(o->path, path))
            fail(2, "%s %s: too near to %s %s, beside which others are written", option, path,
                 o->option, o->path);
    for (int fd;; close(fd)) {
        fd = open(h->lock, O_RDWR | O_CREAT | O_NOFOLLOW, 0666);
        if (fd < 0 || fstat(fd, &h->is)) {
            int error = errno, of_another = error == EACCES && !lstat(h->lock, &there);
            fail(1, "%s: cannot write: %s", of_another ? h->lock : path, strerror(error));
        }
        if (h->is.st_size) fail(1, "%s: exists and is no lock of this program", h->lock);
        if (fcntl(fd, F_SETLK, &lock) && (errno == EACCES || errno == EAGAIN)) {
            fcntl(fd, F_GETLK, &lock);
            fail(1, "%s: another run (process %d) is writing it; end that, or name another file",
                 path, (int)lock.l_pid);
        }  // file systems without locks go without
        // its owner may have ended, and removed it, since it was opened
        if (!stat(h->lock, &there) && h->is.st_ino == there.st_ino) break;
    }
    for (Held *o = held; o < h; o++)
        if (o->is.st_ino == h->is.st_ino && o->is.st_dev == h->is.st_dev)
            fail(2, "%s %s: the same file as %s", option, path, o->option);
    if (!n_held++) atexit(release_files);
    h->saved = continued ? step_in(path) : -1;
    if (continued || stat(path, &there) || !there.st_size) return;
    h->old = free_name(path, ".old");
    h->step = step_in(path);
}

// Before a file is replaced: what is not this run's own is put aside. Two names for one file, where
// there can be such, leave no moment without either. Returns whether nothing is lost by replacing
// it now; if not, errno says why.
static int keep_old(const char *path) {
    for (Held *h = held; h < held + n_held; h++) {
        if (strcmp(h->path, path)) continue;
        struct stat is;
        long found = step_in(path);
        if (found == h->saved || stat(path, &is) || !is.st_size) continue;
        int late = !h->old || h->kept;  // put there since the run began
        if (late) free(h->old), h->old = free_name(path, ".old"), h->step = found;
        while (link(path, h->old)) {
            if (errno != EEXIST && rename(path, h->old)) return 0;
            if (errno != EEXIST) break;
            free(h->old), h->old = free_name(path, ".old");
        }
        h->kept = 1;
        if (late) warn("%s: not what this run saved; kept as %s", path, h->old);
    }
    return 1;
}

// Fails unless `path` is free, empty, or a file of the right kind, with the text `like`, or that of
// older files, at byte `at` (beginning: or the beginning of one): nothing else is ever replaced.
static void check_replaceable(const char *path, const char *kind, const char *like,
                              const char *older, long at, int beginning) {
    char found[64] = {0};
    struct stat st;
    if (stat(path, &st)) return;
    if (!S_ISREG(st.st_mode))
        fail(1, "%s: exists and is no regular file; will not replace it", path);
    if (access(path, W_OK) || !(st.st_mode & 0222))  // root may write all the same
        fail(1, "%s: exists and is read-only; will not replace it", path);
    FILE *f = fopen(path, "rb");
    if (!f)
        fail(1, "%s: exists and cannot be read: %s; will not replace it", path, strerror(errno));
    int ours = !st.st_size;
    for (const char *text = like; text; text = text == like ? older : NULL) {
        size_t length = strlen(text), n = !fseek(f, at, SEEK_SET) ? fread(found, 1, length, f) : 0;
        ours |= !memcmp(found, text, n) && n >= (beginning ? 1 : length);
    }
    if (!ours)
        fail(1, "%s: exists and is no %s of this program; will not replace it", path, kind);
    fclose(f);
}

static FILE *open_temporary(const char *path, char **name) {
    *name = free_name(path, ".tmp");
    int fd = open(*name, O_WRONLY | O_CREAT | O_EXCL, 0666);
    return fd < 0 ? NULL : fdopen(fd, "wb");
}

// A complete checkpoint that cannot have its name, as that is taken, is kept beside it as what was
// there would be; of such ones the last. Returns its name, NULL if it has none.
static const char *put_beside(const char *path, const char *temporary) {
    for (Held *h = held; h < held + n_held; h++) {
        if (strcmp(h->path, path)) continue;
        char *before = h->beside;
        h->beside = free_name(path, ".old");
        if (rename(temporary, h->beside)) return NULL;
        if (before) unlink(before), free(before);
        return h->beside;
    }
    return NULL;
}

static const char checkpoint_start[] = "{\"__metadata__\":{\"format\":\"train_gpt2_mla\"";

// Fails if a checkpoint could not be written to `path`: better before the training than after it.
static void check_writable(const char *path) {
    char *temporary = with_ending(path, ".tmp");
    check_replaceable(temporary, "checkpoint", checkpoint_start, NULL, 8, 1);
    unlink(temporary), free(temporary);  // what a killed run left
    FILE *f = open_temporary(path, &temporary);
    if (!f) fail(1, "%s: cannot write: %s", path, strerror(errno));
    fclose(f);
    unlink(temporary);
    free(temporary);
}

static void hold_checkpoint(const char *option, const char *path, int continued) {
    check_replaceable(path, "checkpoint", checkpoint_start, NULL, 8, 0);
    hold_file(option, path, continued);
    check_writable(path);
}

// Writes `path`.tmp and renames it when it is complete: a file that bears the name is whole, and it
// keeps its mode. With settings, what a run needs to go on as if it had never stopped is written
// too: the moments, the steps done, and the options that shape the run, in words. Data and
// randomness follow from step and seed. `more` is metadata besides, in JSON, each after a comma.
// Returns whether it was written; if not, says so.
static int checkpoint_save(const Model *m, const char *path, long step, const char *settings,
                           const char *more) {
    char *temporary;
    const char *beside = NULL;
    FILE *f = open_temporary(path, &temporary);
    struct stat st;
    if (!f) return warn("%s: cannot write: %s", temporary, strerror(errno)), free(temporary), 0;
    if (!stat(path, &st)) fchmod(fileno(f), st.st_mode & 07777);
    int sets = settings ? 3 : 1;
    size_t at = 0;
    uint64_t length = 0;
    fwrite(&length, 8, 1, f);  // known only after the header
    fputs(checkpoint_start, f);
    for (const ConfigKey *k = config_keys; k < config_keys + CONFIG_KEYS; k++) {
        const char *value = config_text(&m->c, k);
        if (value) fprintf(f, ",\"%s\":\"%s\"", k->key, value);
    }
    if (step) fprintf(f, ",\"step\":\"%ld\"", step);
    if (settings) fprintf(f, ",\"settings\":\"%s\"", settings);
    fputs(more, f);
    fprintf(f, "}");
    for (int set = 0; set < sets; set++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
            fprintf(f, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[%d", set_prefix[set], t->name,
                    t->rows);
            if (t->cols) fprintf(f, ",%d", t->cols);
            fprintf(f, "],\"data_offsets\":[%zu,%zu]}", at, at + 4 * t->size);
            at += 4 * t->size;
        }
    fprintf(f, "}");
    fprintf(f, "%*s", (int)(-ftell(f) & 7), "");  // so that the data is aligned
    length = ftell(f) - 8;
    int ok = !fseek(f, 0, SEEK_SET) && fwrite(&length, 8, 1, f) == 1 && !fseek(f, 0, SEEK_END);
    for (int set = 0; set < sets; set++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
            for (size_t k = 0; ok && k < t->size;) {
                float piece[4096];  // F32 in the file, whatever real is
                size_t n = t->size - k < 4096 ? t->size - k : 4096;
                for (size_t i = 0; i < n; i++) piece[i] = set_of(m, set)[t->offset + k + i];
                ok = fwrite(piece, 4, n, f) == n;
                k += n;
            }
    ok = ok && !ferror(f) && !fflush(f) && !fsync(fileno(f));
    int error = errno;
    if (fclose(f) && ok) error = errno, ok = 0;
    if (ok && (!keep_old(path) || rename(temporary, path))) {
        error = errno, ok = 0;
        beside = put_beside(path, temporary);
    }
    if (!ok) {
        unlink(temporary);
        warn("%s: not written: %s (%s%s)", path, strerror(error),
             beside ? "the checkpoint is " : "a file of that name is as it was",
             beside ? beside : "");
    }
    for (Held *h = held; ok && h < held + n_held; h++)
        if (!strcmp(h->path, path)) h->saved = step;
    free(temporary);
    return ok;
}

// --- Reading. The header's few forms are parsed where they stand; strings are unescaped in place.

typedef struct {
    char *name;
    int dims;
    size_t shape[2], from, to;  // bytes in the data
} Entry;

typedef struct {
    const char *path;
    FILE *f;
    char *header, *p, *end;     // p, end: the parser's place and its limit
    size_t data_start, data_size;
    Entry *entries;             // sorted by name
    int n;
    char **meta;                // key, value, key, value, ...
    int n_meta;
} Checkpoint;

static void json_fail(const Checkpoint *k, const char *expected) {
    fail(1, "%s: its header is not that of a safetensors file at byte %ld: expected %s", k->path,
         (long)(k->p - k->header) + 8, expected);
}

static char json_peek(Checkpoint *k) {  // the next character that is not space; 0 at the end
    while (k->p < k->end && (*k->p == ' ' || *k->p == '\n' || *k->p == '\t' || *k->p == '\r'))
        k->p++;
    return k->p < k->end ? *k->p : 0;
}

static void json_char(Checkpoint *k, char c) {
    char expected[] = {'\'', c, '\'', 0};
    if (json_peek(k) != c) json_fail(k, expected);
    k->p++;
}

// Whether another element follows in a list or object that `close` ends.
static int json_more(Checkpoint *k, char close) {
    if (json_peek(k) == ',') return k->p++, 1;
    json_char(k, close);
    return 0;
}

static char *json_string(Checkpoint *k) {
    json_char(k, '"');
    char *start = k->p, *out = k->p;
    while (k->p < k->end && *k->p != '"') {
        if (!*k->p) json_fail(k, "no zero byte in a string");
        if (*k->p != '\\') { *out++ = *k->p++; continue; }
        const char *escapes = "\"\\/bfnrtu", *found = NULL;
        if (++k->p < k->end && *k->p) found = strchr(escapes, *k->p);
        if (!found) json_fail(k, "one of \"\\/bfnrtu after a backslash");
        // no name of ours has a \u: '?' and its digits will do
        *out++ = "\"\\/\b\f\n\r\t?"[found - escapes];
        k->p++;
    }
    if (k->p == k->end) json_fail(k, "the end of a string");
    k->p++;
    *out = 0;
    return start;
}

static size_t json_number(Checkpoint *k) {
    size_t n = 0;
    if (json_peek(k) < '0' || json_peek(k) > '9') json_fail(k, "a whole number");
    for (; k->p < k->end && *k->p >= '0' && *k->p <= '9'; k->p++) {
        if (n > (SIZE_MAX >> 8) / 10) json_fail(k, "a number of a size that a file can have");
        n = 10 * n + (*k->p - '0');
    }
    return n;
}

static void json_tensor(Checkpoint *k, Entry *e) {
    size_t values = 1;
    int has_shape = 0, has_offsets = 0, has_dtype = 0;
    json_char(k, '{');
    do {
        char *key = json_string(k);
        json_char(k, ':');
        if (!strcmp(key, "dtype")) {
            char *dtype = json_string(k);
            if (strcmp(dtype, "F32"))
                fail(1, "%s: %s has dtype %s, expected F32", k->path, e->name, dtype);
            has_dtype = 1;
        } else if (!strcmp(key, "shape")) {
            json_char(k, '[');
            has_shape = 1;
            if (json_peek(k) == ']') { k->p++; continue; }
            do {
                size_t n = json_number(k);
                if (e->dims < 2) e->shape[e->dims] = n;
                e->dims++;
                if (n && values > SIZE_MAX / 8 / n)
                    fail(1, "%s: %s has a shape larger than any file", k->path, e->name);
                values *= n;
            } while (json_more(k, ']'));
        } else if (!strcmp(key, "data_offsets")) {
            json_char(k, '[');
            e->from = json_number(k);
            json_char(k, ',');
            e->to = json_number(k);
            json_char(k, ']');
            has_offsets = 1;
        } else json_fail(k, "dtype, shape or data_offsets");
    } while (json_more(k, '}'));
    if (!has_shape || !has_offsets || !has_dtype)
        json_fail(k, "dtype, shape and data_offsets in each tensor");
    if (e->to < e->from || e->to - e->from != 4 * values)
        fail(1, "%s: %s has offsets %zu to %zu, expected %zu bytes for its shape", k->path, e->name,
             e->from, e->to, 4 * values);
}

static int entry_by_name(const void *a, const void *b) {
    return strcmp(((const Entry *)a)->name, ((const Entry *)b)->name);
}
static int entry_by_place(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    size_t from = x->from != y->from, p = from ? x->from : x->to, q = from ? y->from : y->to;
    return (p > q) - (p < q);
}

// Opens a file, reads its header and checks that the tensors tile the data exactly.
static Checkpoint checkpoint_open(const char *path) {
    Checkpoint k = {.path = path};
    uint64_t length = 0;
    size_t size;
    k.f = open_regular(path, &size);
    if (size < 8 || fread(&length, 8, 1, k.f) != 1)
        fail(1, "%s: %zu bytes, expected a safetensors checkpoint", path, size);
    if (length > size - 8 || length > 100000000)
        fail(1, "%s: not a safetensors file, or cut short: its header claims %llu bytes, of a file "
             "of %zu", path, (unsigned long long)length, size);
    k.header = k.p = allocate(length + 1, path);
    k.end = k.header + length;
    k.data_start = 8 + length, k.data_size = size - k.data_start;
    if (fread(k.header, 1, length, k.f) != length) fail(1, "%s: cannot read its header", path);

    size_t braces = 0, quotes = 0;  // there are no more tensors and strings than these
    for (char *p = k.header; p < k.end; p++) braces += *p == '{', quotes += *p == '"';
    k.entries = allocate(braces * sizeof *k.entries, path);
    k.meta = allocate(quotes * sizeof *k.meta, path);
    json_char(&k, '{');
    do {
        char *name = json_string(&k);
        json_char(&k, ':');
        if (!strcmp(name, "__metadata__")) {
            json_char(&k, '{');
            if (json_peek(&k) == '}') { k.p++; continue; }
            do {
                k.meta[k.n_meta++] = json_string(&k);
                json_char(&k, ':');
                k.meta[k.n_meta++] = json_string(&k);
            } while (json_more(&k, '}'));
        } else {
            k.entries[k.n] = (Entry){.name = name};
            json_tensor(&k, &k.entries[k.n++]);
        }
    } while (json_more(&k, '}'));
    if (json_peek(&k)) json_fail(&k, "the end of the header");

    size_t at = 0;
    if (!k.n) fail(1, "%s: has no tensors", path);
    qsort(k.entries, k.n, sizeof *k.entries, entry_by_place);
    for (int i = 0; i < k.n; at = k.entries[i++].to)
        if (k.entries[i].from != at)
            fail(1, "%s: %s starts at byte %zu of the data, expected %zu: tensors overlap or leave "
                 "gaps", path, k.entries[i].name, k.entries[i].from, at);
    if (at != k.data_size)
        fail(1, "%s: %zu bytes of data, expected %zu: cut short or over-long", path,
             k.data_size, at);
    qsort(k.entries, k.n, sizeof *k.entries, entry_by_name);
    for (int i = 1; i < k.n; i++)
        if (!strcmp(k.entries[i].name, k.entries[i - 1].name))
            fail(1, "%s: two tensors named %s", path, k.entries[i].name);
    return k;
}

static void checkpoint_close(Checkpoint *k) {
    fclose(k->f);
    free(k->header), free(k->entries), free(k->meta);
}

static const char *checkpoint_meta(const Checkpoint *k, const char *key) {  // NULL: absent
    for (int i = 0; i < k->n_meta; i += 2)
        if (!strcmp(k->meta[i], key)) return k->meta[i + 1];
    return NULL;
}

static const Entry *checkpoint_find(const Checkpoint *k, const char *name) {
    Entry key = {.name = (char *)name};
    return bsearch(&key, k->entries, k->n, sizeof key, entry_by_name);
}

// Reads tensor `name` into x; its shape must be (rows, cols), or (rows) for cols 0.
static void checkpoint_read(const Checkpoint *k, const char *name, real *x, int rows, int cols) {
    const Entry *e = checkpoint_find(k, name);
    if (!e) fail(1, "%s: has no tensor %s, which its configuration needs", k->path, name);
    if (e->dims != (cols ? 2 : 1) || e->shape[0] != (size_t)rows ||
        (cols && e->shape[1] != (size_t)cols)) {
        char expected[40];
        snprintf(expected, sizeof expected, cols ? "(%d, %d)" : "(%d)", rows, cols);
        fail(1, "%s: %s has %d dimensions, %zu by %zu; expected %s", k->path, name, e->dims,
             e->shape[0], e->dims > 1 ? e->shape[1] : 1, expected);
    }
    size_t size = (e->to - e->from) / 4;
    if (fseeko(k->f, k->data_start + e->from, SEEK_SET))
        fail(1, "%s: cannot read %s", k->path, name);
    for (size_t i = 0; i < size;) {
        float piece[4096];
        size_t n = size - i < 4096 ? size - i : 4096;
        if (fread(piece, 4, n, k->f) != n) fail(1, "%s: cannot read %s", k->path, name);
        for (size_t j = 0; j < n; j++) {
            if (!isfinite(piece[j]))
                fail(1, "%s: %s holds %f at place %zu, expected finite numbers", k->path, name,
                     piece[j], i + j);
            x[i + j] = piece[j];
        }
        i += n;
    }
}

// The configuration in the metadata.
static Config checkpoint_config(const Checkpoint *k) {
    Config c;
    const char *format = checkpoint_meta(k, "format");
    if (!format || strcmp(format, "train_gpt2_mla"))
        fail(1, "%s: its metadata's format is %s, expected train_gpt2_mla", k->path,
             format ? format : "missing");
    for (const ConfigKey *key = config_keys; key < config_keys + CONFIG_KEYS; key++) {
        const char *value = checkpoint_meta(k, key->key);
        char *end;
        long n = 0;
        if (key->is_default && !value) n = -1;
        else if (!value) fail(1, "%s: its metadata has no %s", k->path, key->key);
        else if (key->names) {
            while (key->names[n] && strcmp(key->names[n], value)) n++;
            if (!key->names[n])
                fail(1, "%s: %s is %s, which this program does not know", k->path, key->key, value);
        } else {
            n = strtol(value, &end, 10);
            if (end == value || *end || n < 0 || n > 1 << 24)
                fail(1, "%s: %s is '%s', expected a whole number from 0 to %d", k->path, key->key,
                     value, 1 << 24);
        }
        *(int *)((char *)&c + key->offset) = n;
    }
    if (c.L < 1 || c.NH < 1 || c.C < 1 || c.block_size < 1 || c.V < 1)
        fail(1, "%s: layers, heads, channels, block_size and vocab_size must be at least 1",
             k->path);
    if (c.C > 65536 || c.V > 65536)
        fail(1, "%s: channels %d, vocabulary %d, expected at most 65536", k->path, c.C, c.V);
    if (c.position != DECOUPLED && c.NOPE == c.C / c.NH - c.RD) c.NOPE = -1;  // says nothing more
    config_complete(&c, 1, k->path);
    Spec spec[TENSORS];
    double bytes = 0;
    describe_tensors(&c, spec);
    for (int id = 0; id < TENSORS; id++)
        bytes += 4.0 * spec[id].rows * max_int(spec[id].cols, 1) *
                 (strchr(spec[id].name, '%') ? c.L : 1);
    if (bytes > k->data_size)
        fail(1, "%s: %d layers, %d channels and a vocabulary of %d, more than its data holds",
             k->path, c.L, c.C, c.V);
    return c;
}

static int foreign(const char *name) {
    return !strncmp(name, "adam.", 5) || !strncmp(name, "ref.", 4);
}

// The parameters, and with moments those too. Every tensor of the file must have its place in
// the model, but for those of an optimizer or of a test's reference.
static void checkpoint_read_model(const Checkpoint *k, Model *m, int moments) {
    char name[80];
    for (int set = 0; set < (moments ? 3 : 1); set++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
            snprintf(name, sizeof name, "%s%s", set_prefix[set], t->name);
            checkpoint_read(k, name, set_of(m, set) + t->offset, t->rows, t->cols);
        }
    for (int i = 0, known; i < k->n; i++) {
        known = foreign(k->entries[i].name);
        for (int j = 0; j < m->n_tensors && !known; j++)
            known = !strcmp(k->entries[i].name, m->tensors[j].name);
        if (!known)
            fail(1, "%s: tensor %s has no place in a model of its configuration", k->path,
                 k->entries[i].name);
    }
}

// ==== 16  COMMAND LINE ==========================================================================
// --- What a run prints

static void format_duration(char *text, double s) {  // at most 63 characters
    long t = s < 1e9 ? s : 1e9;
    if (t >= 3600) sprintf(text, "%ldh%02ldm", t / 3600, t / 60 % 60);
    else if (t >= 60) sprintf(text, "%ldm%02lds", t / 60, t % 60);
    else sprintf(text, "%.0fs", s);
}

// Output on its way. A reader that has gone is no reason to lose a run, and one that does not read
// is none to wait once a signal has come: what it does not take goes out after the last save.
static void flush_output(void) {
    static int lost;
    if ((!stop_signal || takes_output(1)) && fflush(stdout) && errno != EINTR && !lost++)
        warn("standard output: cannot write: %s; the run goes on", strerror(errno));
}

// On a terminal the line of a step that nothing follows stays in its place, and the next is drawn
// over it; where it is too narrow, a shorter one. Elsewhere there are some 100 lines a run, and the
// first step's.
static void print_step(const Step *s, const Options *o, double eta, int stays) {
    char line[200], left[64];
    struct winsize window;
    static int begun;
    long steps = o->schedule.steps, every = o->print_every;
    int terminal = ranks == 1 && isatty(1);  // [MPI] mpirun puts one even before a file
    int width = terminal && !ioctl(1, TIOCGWINSZ, &window) ? window.ws_col : 0;
    if (!every) every = terminal ? LONG_MAX : steps < 200 ? 1 : steps / 100;
    stays = stays && s->number % every != 0;
    if (stays && !terminal && begun) return;
    begun = 1;
    format_duration(left, eta);
    int length = snprintf(line, sizeof line, "step %ld/%ld | loss %.6f | lr %.1e | grad %.3g | "
                          "tok/s %.0f | ETA %s", s->number, steps, s->loss, s->lr, s->norm,
                          s->rate, left);
    if (width && length >= width)
        snprintf(line, min_int(sizeof line, width), "step %ld/%ld | loss %.4f | ETA %s", s->number,
                 steps, s->loss, left);
    printf(!terminal ? "%s\n" : stays ? "%s\033[K\r" : "%s\033[K\n", line);
    flush_output();
    line_is_drawn = terminal && stays;
}

static void print_evaluation(const Evaluation *e) {
    printf("loss %.8f perplexity %.4f bits_per_byte ", e->loss, exp(e->loss));
    printf(isnan(e->bits_per_byte) ? "n/a" : "%.6f", e->bits_per_byte);
    printf(" tokens %ld\n", e->tokens);
    flush_output();
}

// The run in all, and where its model is; if it was interrupted, how it can go on.
static void print_end(const Options *o, const Outputs *out, long done, long step, double seconds,
                      double stepping) {
    long steps = o->schedule.steps, tokens = (long)o->batch_size * o->seq_len * o->grad_accum;
    char took[64];
    if (done && done == steps) printf("%s: all its %ld steps are done already\n", o->save, done);
    if (step > done) {
        format_duration(took, seconds);
        printf("%ld steps in %s, %.0f tokens/s\n", step - done, took,
               tokens * (step - done) / stepping);
        if (out->best_step)
            printf("lowest validation loss %.4f (of --val-batches %d), after step %ld%s%s\n",
                   out->best, o->val_batches, out->best_step, o->save_best ? ": saved " : "",
                   o->save_best ? o->save_best : "");
        if (!o->save && !(o->save_best && out->best_step))
            printf("the model is gone: nothing is kept without --save FILE\n");
        if (o->save && !out->unsaved) printf("saved %s\n", o->save);
        for (Held *h = held; h < held + n_held; h++)
            if (h->kept && h->step && h->path == o->save)
                printf("%s has step %ld of before: to go on from it, move it back to %s%s\n",
                       h->old, h->step, h->path, o->log ? ", and the log" : "");
    }
    if (out->cut)
        printf("the last validation was stopped by signal %d (%s); --eval makes it\n",
               (int)stop_signal, strsignal(stop_signal));
    if (!stop_signal || step == steps) return;
    printf("stopped by signal %d (%s) after step %ld%s\n", (int)stop_signal,
           strsignal(stop_signal), step,
           step == 0 ? ", nothing to save yet"
           : !o->save || out->unsaved ? ""
           : o->load ? "; the same command with --resume in place of --load goes on from there"
           : "; the same command with --resume goes on from there");
}

static void print_model(FILE *f, const Model *m, int cache) {  // [ATTENTION 1]
    const Config *c = &m->c;
    long floats = cache_floats(c, cache), mha = 2L * c->L * c->C;
    fprintf(f, "%s, position %s: %d layers, %d heads, %d channels, vocabulary %d, block size %d",
            attention_names[c->attention], position_names[c->position], c->L, c->NH, c->C, c->V,
            c->block_size);
    if (c->NKV != c->NH) fprintf(f, ", %d kv head%s", c->NKV, c->NKV == 1 ? "" : "s");
    if (has_latent(c))
        fprintf(f, ", kv_rank %d, q_rank %d, latent norm %s", c->R, c->RQ,
                norm_names[c->latent_norm]);
    if (c->position == DECOUPLED) fprintf(f, ", rope_dim %d", c->RD);
    if (c->QK != c->HS) fprintf(f, ", nope_dim %d", c->NOPE);
    fprintf(f, "\n%zu parameters | KV cache %ld floats per token over all layers, where MHA needs "
            "%ld (%.1f%%)\n", m->n_params, floats, mha, 100.0 * floats / mha);
    if (precision == BF16)
        fprintf(f, "products of bfloat16, by %s\n", matrix_unit ? "a matrix unit" :
                "vector units, as fast as of floats: no matrix unit here");
}

// --- What a run leaves behind, and how it is stopped

// The first signal lets the step at hand finish. Another interrupt ends the program at once, but
// not within a second: `timeout`, for one, sends to a program and to its group, which comes twice.
// The system repeats those of limits by itself: they never count as a second.
static void on_signal(int number) {
    static const char said[] = "\ntrain_gpt2_mla: stopping after this step; again, in a "
                               "second: at once, unsaved\n";
    static volatile sig_atomic_t first;  // in milliseconds
    struct timespec now;
    int error = errno;
    clock_gettime(CLOCK_MONOTONIC, &now);
    unsigned ms = (unsigned)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    int counts = number == SIGINT || number == SIGTERM || number == SIGHUP;
    if (first && counts && ms - (unsigned)first >= 1000) _exit(128 + number);
    if (!first) {
        first = ms, stop_signal = number;
        int from = !line_is_drawn;  // its first newline ends a drawn line
        int says = ranks == 1 && takes_output(2);  // [MPI] else it may be that mpirun ends them all
        if (says && write(2, said + from, sizeof said - 1 - from) > 0) line_is_drawn = 0;
    }
    errno = error;
}

// What users, terminals and schedulers send to end a program; a file that has become too large for
// its limit, too. One that was ignored before stays so (nohup), but for an interrupt, which shells
// have ignored in the background. A reader of standard output that ends is no signal to end. A
// write that waits for a reader is given up.
static void catch_signals(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGXFSZ,
                                  SIGALRM, SIGVTALRM, SIGPROF};
    struct sigaction stop = {.sa_handler = on_signal}, was;
    sigfillset(&stop.sa_mask);
    for (int i = 0; i < (int)(sizeof signals / sizeof *signals); i++)
        if (signals[i] == SIGINT ||
            (!sigaction(signals[i], NULL, &was) && was.sa_handler != SIG_IGN))
            sigaction(signals[i], &stop, NULL);
    signal(SIGPIPE, SIG_IGN);
    flush_output();
}

// A log says in lines that begin with # what was run (older ones do not), then has a row per step.
static const char log_title[] = "# a log of train_gpt2_mla\n";
static const char settings_are[] = "# settings: ";
static const char log_columns[] = "step,loss,lr,grad_norm,val_loss,tok_per_s,seconds\n";

static void log_begin(FILE *f, const Model *m, const char *settings) {
    const char *value, *between = "";
    fprintf(f, "%s# configuration: ", log_title);
    for (const ConfigKey *k = config_keys; k < config_keys + CONFIG_KEYS; k++)
        if ((value = config_text(&m->c, k))) {
            fprintf(f, "%s%s %s", between, k->key, value);
            between = ", ";
        }
    fprintf(f, "\n# parameters: %zu\n%s%s\n# vector bytes: %d\n# compiler: %s\n%s", m->n_params,
            settings_are, settings, VECTOR_BYTES, __VERSION__, log_columns);
}

// Opens the log of a resumed run: what stands before the rows is kept, and rows of steps that are
// done; seconds count on from the last. A log of other settings is refused.
static FILE *log_resume(const char *path, const Model *m, long done, Outputs *out) {
    char row[2048], *last, *is;
    long kept = 0;
    FILE *f = fopen(path, "a+b");
    if (!f) fail(1, "%s: cannot write: %s", path, strerror(errno));
    rewind(f);
    while (fgets(row, sizeof row, f) && (kept == 0 || atol(row) <= done)) {
        if (!strchr(row, '\n') && !feof(f))
            fail(1, "%s: a line of over %zu bytes; will not go on with it", path, sizeof row - 2);
        if (!strchr(row, '\n')) break;  // cut short
        size_t length = strlen(out->settings);
        is = row + strlen(settings_are);
        if (!strncmp(row, settings_are, is - row) &&
            (strncmp(is, out->settings, length) || is[length] != '\n'))
            fail(1, "%s: the log of a run with other settings; will not go on with it", path);
        out->last_row = kept;
        kept = ftell(f);
        if (atol(row) && (last = strrchr(row, ','))) out->seconds = atof(last + 1);
    }
    if (ftruncate(fileno(f), kept) || fseek(f, 0, SEEK_END))
        fail(1, "%s: cannot write: %s", path, strerror(errno));
    if (!kept) log_begin(f, m, out->settings);
    if (fflush(f)) fail(1, "%s: cannot write: %s", path, strerror(errno));
    return f;
}

static void log_validation(Outputs *out, double loss) {
    char row[200] = "", *gap;
    fseek(out->log, out->last_row, SEEK_SET);
    if (!fgets(row, sizeof row, out->log) || !(gap = strstr(row, ",,"))) return;
    if (ftruncate(fileno(out->log), out->last_row) || fseek(out->log, 0, SEEK_END)) return;
    fprintf(out->log, "%.*s,%.6f%s", (int)(gap - row), row, loss, gap + 1);
    fflush(out->log);
}

// Begins a log, with the mode of one that was there, which is kept beside it. NULL: it cannot be.
static FILE *log_start(const char *path, const Model *m, const char *settings) {
    struct stat st;
    int replaces = !stat(path, &st);
    if (replaces && (!keep_old(path) || (unlink(path) && errno != ENOENT))) return NULL;
    FILE *f = fopen(path, "ab");  // what others append, or cut, leaves no holes
    if (f && replaces) fchmod(fileno(f), st.st_mode & 07777);
    if (f) log_begin(f, m, settings);
    return f;
}

static void log_row(Outputs *out, const Model *m, const Options *o, const Step *s,
                    const Evaluation *e, double time) {
    if (!o->log || out->log_lost) return;
    struct stat is;
    if (!out->log) out->log = log_start(o->log, m, out->settings);
    if (out->log && !fstat(fileno(out->log), &is) && !is.st_nlink)
        errno = ENOENT;  // removed or replaced: its rows would be nowhere
    else if (out->log) {
        fprintf(out->log, "%ld,%.6f,%.6e,%.6f,", s->number, s->loss, s->lr, s->norm);
        if (!isnan(e->loss)) fprintf(out->log, "%.6f", e->loss);
        fprintf(out->log, ",%.0f,%.3f\n", s->rate, out->seconds + time);
        if (!fflush(out->log)) return;
    }
    warn("%s: cannot write: %s; the run goes on without it", o->log, strerror(errno));
    if (out->log) fclose(out->log);
    out->log = NULL, out->log_lost = 1;
}

// Whether a --save-best file is of the run with these outputs, which has done so many steps: that
// of its lowest loss, or of a later one that was saved before a kill. (After the same command was
// started over, a file of the same run may be from before its lowest loss.)
static int is_best_of(const char *path, const Outputs *out, long done) {
    if (access(path, F_OK)) return 0;
    Checkpoint k = checkpoint_open(path);
    long step = step_in(path);
    const char *run = checkpoint_meta(&k, "run"), *validation = checkpoint_meta(&k, "validation");
    int same = run && validation && !strcmp(run, out->settings) &&
               !strcmp(validation, out->validation) && (step == out->best_step || step > done);
    checkpoint_close(&k);
    return same;
}

// What a resumed run's checkpoint knows of its validations, if their data is the same.
static void restore_validation(Outputs *out, const char *path) {
    Checkpoint k = checkpoint_open(path);
    const char *is = checkpoint_meta(&k, "validation"), *last = checkpoint_meta(&k, "validated");
    const char *loss = checkpoint_meta(&k, "best_val_loss");
    const char *step = checkpoint_meta(&k, "best_step");
    if (is && last && loss && step && !strcmp(is, out->validation)) {
        out->validated = atol(last);
        if (atol(step)) out->best = atof(loss), out->best_step = atol(step);
    }
    checkpoint_close(&k);
}

// Makes sure of every file that the run is to write, before it begins.
static Outputs open_outputs(const Options *o, const Model *m, const char *settings,
                            const Data *val, long done) {
    Outputs out = {.settings = settings, .best = INFINITY, .validated = done};
    const char *log = o->schedule.steps > 0 ? o->log : NULL;
    snprintf(out.validation, sizeof out.validation, "%ld tokens (hash %08x), %d x %d x %d", val->n,
             val->n ? hash_bytes(val->tokens, val->n * (long)sizeof *val->tokens) : 0,
             o->val_batches, o->batch_size, o->seq_len);
    if (log) {
        check_replaceable(log, "log", log_title, log_columns, 0, 0);
        hold_file("--log", log, o->resume);
    }
    if (o->save) hold_checkpoint("--save", o->save, o->resume);
    if (o->resume) restore_validation(&out, o->save);
    int own = o->resume && o->save_best && is_best_of(o->save_best, &out, done);
    if (o->save_best) hold_checkpoint("--save-best", o->save_best, own);
    if (o->save_best && !own) out.best = INFINITY, out.best_step = 0;
    int ended = done == o->schedule.steps && (!val->n || out.validated == done);
    if (!log || ended) return out;
    if (o->resume) out.log = log_resume(log, m, done, &out);
    else {  // begun with the first row: until then what is there stays
        FILE *f = fopen(log, "ab");
        if (!f) fail(1, "%s: cannot write: %s", log, strerror(errno));
        fclose(f);
    }
    return out;
}

// What files there are already, and what becomes of them.
static void print_kept(const Options *o) {
    for (Held *h = held; h < held + n_held; h++) {
        if (!h->old) continue;
        if (h->step) printf("%s: holds step %ld; ", h->path, h->step);
        else printf("%s: exists; ", h->path);
        int unfinished = h->path == o->save && h->step && h->step < o->schedule.steps;
        printf("%s keeps it as %s%s\n",
               !strcmp(h->option, "--log") ? "the first step" : "the first save", h->old,
               unfinished ? " (to go on from it: --resume)" : "");
    }
}

static int save_run(Outputs *out, Model *m, const Options *o, const int *x, const int *y,
                    long step) {
    double loss = forward_loss(m, x, y, o->batch_size / ranks, o->seq_len);
    int finite = 1;
    for (int set = 0; set < 3; set++)
        for (size_t i = 0; i < m->n_params; i++) finite &= !!isfinite(set_of(m, set)[i]);
    if (!finite || !isfinite(loss))
        fail(1, "step %ld: %s after it; not saved (a lower --learning-rate may help)", step,
             finite ? "the loss is not finite" : "weights or moments are not finite");
    if (out->log) fsync(fileno(out->log));  // after a crash it has at least the checkpoint's steps
    char more[400];
    snprintf(more, sizeof more, ",\"validation\":\"%s\",\"validated\":\"%ld\","
             "\"best_val_loss\":\"%.17g\",\"best_step\":\"%ld\"", out->validation,
             out->validated, out->best_step ? out->best : 0, out->best_step);
    return checkpoint_save(m, o->save, step, out->settings, more);
}

static int save_best(const Outputs *out, const Model *m, const Options *o, long step, double loss) {
    char more[1200];
    snprintf(more, sizeof more, ",\"val_loss\":\"%.9f\",\"run\":\"%s\",\"validation\":\"%s\"",
             loss, out->settings, out->validation);
    return checkpoint_save(m, o->save_best, step, NULL, more);
}

// --- Options

static const char *const schedule_names[] = {"cosine", "constant", NULL};

static Options opt = {  // [ATTENTION 1]
    .config = {.attention = -1, .position = -1, .latent_norm = -1, .L = -1, .NH = -1, .NKV = -1,
               .C = -1, .block_size = -1, .V = -1, .RQ = -1, .R = -1, .RD = -1, .NOPE = -1},
    .batch_size = -1, .seq_len = -1, .grad_accum = 1, .grad_clip = 1, .seed = 1337,
    .schedule = {.kind = COSINE, .steps = -1, .warmup = -1, .peak = 4e-3, .floor = -1},
    .adam = {.beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1},
    .val_every = 500, .val_batches = 20, .sample_every = 1000,
    .generate = -1, .sampling = {.temperature = 0.8}, .cache = -1,
};

// Kinds of option: how its text becomes the value at `at`. And what an option is for: a heading
// says it for those below it, unless they do themselves.
enum { INT, LONG, DOUBLE, TEXT, TEXTS, CHOICE, FLAG };
enum { TRAIN = 1, EVAL = 2, GENERATE = 4, ALL = 7 };

typedef struct {
    const char *name, *help;     // no help: a heading
    int kind;                    // a heading: what its options are for
    void *at;
    double low, high;            // numbers
    const char *const *choices;
    int modes, given;
} Option;

#pragma GCC diagnostic ignored "-Wmissing-field-initializers"  // rows end where they can
static Option options[] = {  // [ATTENTION 1]
    {"model", NULL, ALL},
    {"--attention", "mla, mha, gqa or mqa (mla)",
     CHOICE, &opt.config.attention, 0, 0, attention_names},
    {"--position", "learned, rope or decoupled (decoupled for mla, else rope)",
     CHOICE, &opt.config.position, 0, 0, position_names},
    {"--layers", "blocks (4)", INT, &opt.config.L, 1, 1000},
    {"--heads", "query heads (4)", INT, &opt.config.NH, 1, 1024},
    {"--channels", "width of the residual stream (128)", INT, &opt.config.C, 1, 65536},
    {"--kv-heads", "gqa, mla: key/value heads (mla: heads; gqa: a quarter, else half, else 1)",
     INT, &opt.config.NKV, 1, 1024},
    {"--q-rank", "mla: width of the query latent, 0 for none (channels/2)",
     INT, &opt.config.RQ, 0, 65536},
    {"--kv-rank", "mla: width of the key/value latent (2/3 of channels)",
     INT, &opt.config.R, 1, 65536},
    {"--rope-dim", "decoupled: rotary part of a query or key (half of the head size)",
     INT, &opt.config.RD, 0, 65536},
    {"--nope-dim", "mla decoupled: their other part (head size - rope-dim)",
     INT, &opt.config.NOPE, 1, 65536},
    {"--latent-norm", "mla: layernorm, rmsnorm or none (layernorm)",
     CHOICE, &opt.config.latent_norm, 0, 0, norm_names},
    {"--vocab-size", "tokens known (the tokenizer's; 256; 50257 for tokens above 255)",
     INT, &opt.config.V, 2, 65536},
    {"data", NULL, TRAIN | EVAL},
    {"--train-data", "token file, or text, read as bytes (data/tinyshakespeare_train.bin)",
     TEXT, &opt.train_data},
    {"--val-data", "the same for validation (the default's: data/tinyshakespeare_val.bin)",
     TEXT, &opt.val_data},
    {"--tokenizer", "its file (X_tokenizer.bin beside X.safetensors, X_train.bin or X_val.bin)",
     TEXT, &opt.tokenizer, .modes = ALL},
    {"--order", "batches at random or sequential places (random)",
     CHOICE, &opt.order, 0, 0, order_names, TRAIN},
    {"training", NULL, TRAIN},
    {"--batch-size", "sequences in a micro-batch (8); or to generate side by side (1)",
     INT, &opt.batch_size, 1, 65536, .modes = ALL},
    {"--seq-len", "tokens in a sequence; a new model's block size (128; a loaded model's)",
     INT, &opt.seq_len, 1, 1 << 24, .modes = TRAIN | EVAL},
    {"--steps", "updates; 0 with --save writes the initial model (4000; own text: 1500)",
     LONG, &opt.schedule.steps, 0, 1e12},
    {"--grad-accum", "micro-batches per update (1)", INT, &opt.grad_accum, 1, 65536},
    {"--learning-rate", "its peak (4e-3)", DOUBLE, &opt.schedule.peak, 0, 1e3},
    {"--schedule", "cosine or constant (cosine)", CHOICE, &opt.schedule.kind, 0, 0, schedule_names},
    {"--warmup", "steps of linear warm-up (cosine: a twentieth of all; constant: 0)",
     LONG, &opt.schedule.warmup, 0, 1e12},
    {"--min-lr", "where the cosine ends (a tenth of the peak)",
     DOUBLE, &opt.schedule.floor, 0, 1e3},
    {"--weight-decay", "on matrices (0.1)", DOUBLE, &opt.adam.weight_decay, 0, 1e3},
    {"--beta1", "AdamW's (0.9)", DOUBLE, &opt.adam.beta1, 0, 0.999999},
    {"--beta2", "AdamW's (0.99)", DOUBLE, &opt.adam.beta2, 0, 0.999999},
    {"--eps", "AdamW's (1e-8)", DOUBLE, &opt.adam.eps, 1e-30, 1},
    {"--grad-clip", "largest gradient norm, 0 for no limit (1)", DOUBLE, &opt.grad_clip, 0, 1e9},
    {"--precision", "of factors in products: fp32, or bf16, twice as fast with matrix units (fp32)",
     CHOICE, &precision, 0, 0, precision_names, ALL},
    {"--dropout", "probability, on embedding, attention and MLP outputs (0)",
     DOUBLE, &opt.dropout, 0, 0.99},
    {"--seed", "of all randomness (1337)", LONG, &opt.seed, 0, 9e15, .modes = TRAIN | GENERATE},
    {"reports", NULL, TRAIN},
    {"--print-every", "steps between lines (in a file or pipe: a hundredth of all; terminal: last)",
     LONG, &opt.print_every, 1, 1e12},
    {"--val-every", "steps between validations, 0 for only the last (500)",
     INT, &opt.val_every, 0, INT_MAX},
    {"--val-batches", "batches in each; 0, and after the last step: all data (20)",
     INT, &opt.val_batches, 0, INT_MAX},
    {"--sample-every", "steps between samples, 0 for none (1000)",
     INT, &opt.sample_every, 0, INT_MAX},
    {"--log", "CSV file of every step", TEXT, &opt.log},
    {"files", NULL, TRAIN},
    {"--save", "checkpoint to write at the end, and when interrupted (safetensors)",
     TEXT, &opt.save},
    {"--save-every", "steps between further saves to it, 0 for none (0)",
     LONG, &opt.save_every, 0, 1e12},
    {"--save-best", "checkpoint of the lowest validation loss: its model, not the run's state",
     TEXT, &opt.save_best},
    {"--resume", "go on from --save FILE, which a run with the same options left",
     FLAG, &opt.resume},
    {"--load", "checkpoint to start from", TEXT, &opt.load, .modes = ALL},
    {"modes (default: train)", NULL, ALL},
    {"--eval", "loss of the model --load over all validation data", FLAG, &opt.eval},
    {"--generate", "tokens to make with the model --load; with the prompt, its block size and one",
     INT, &opt.generate, 0, 1 << 24},
    {"--help", "this text", FLAG, &opt.help},
    {"generation", NULL, GENERATE},
    {"--prompt", "its text (empty: starts as a line does, after a newline)", TEXT, &opt.prompt},
    {"--prompt-file", "a file that has it, - for standard input", TEXT, &opt.prompt_file},
    {"--temperature", "of samples; 0 takes the likeliest token (0.8)",
     DOUBLE, &opt.sampling.temperature, 0, 1e3, .modes = TRAIN | GENERATE},
    {"--top-k", "samples come from that many likeliest tokens, 0 for all (0)",
     INT, &opt.sampling.top_k, 0, 65536, .modes = TRAIN | GENERATE},
    {"--top-p", "and from the likeliest that have this probability between them (1: all)",
     DOUBLE, &opt.sampling.top_p, 1e-6, 1, .modes = TRAIN | GENERATE},
    {"--repetition-penalty", "logits of tokens seen already are divided by it (1: not)",
     DOUBLE, &opt.sampling.repetition_penalty, 1e-3, 1e3, .modes = TRAIN | GENERATE},
    {"--stop", "a text that ends a sequence; may be given several times",
     TEXTS, &opt.sampling.stop},
    {"--cache", "mla: full, latent or absorbed (the smallest of full and absorbed)",
     CHOICE, &opt.cache, 0, 0, cache_names},
};
enum { N_OPTIONS = sizeof options / sizeof *options };

static void print_help(void) {
    printf("usage: ./train_gpt2_mla [options]            defaults in parentheses\n");
    for (Option *o = options; o < options + N_OPTIONS; o++) {
        if (!o->help) printf("%s\n", o->name);
        else printf("  %-20s %s\n", o->name, o->help);
    }
}

static void option_set(Option *o, const char *text) {
    char *end;
    errno = 0;
    if (o->kind == TEXT) {
        if (!*text && o->at != &opt.prompt) fail(2, "%s: empty, expected a file name", o->name);
        *(const char **)o->at = text;
    } else if (o->kind == TEXTS) {
        Sampling *how = &opt.sampling;
        int most = sizeof how->stop / sizeof *how->stop;
        if (!*text) fail(2, "%s: empty, expected a text", o->name);
        if (how->n_stop == most) fail(2, "%s: expected at most %d", o->name, most);
        how->stop[how->n_stop++] = text;
    } else if (o->kind == CHOICE) {
        int i = 0;
        char expected[80] = "";
        for (; o->choices[i] && strcmp(o->choices[i], text); i++)
            strcat(strcat(expected, i ? ", " : ""), o->choices[i]);
        if (!o->choices[i]) fail(2, "%s: '%s', expected one of %s", o->name, text, expected);
        *(int *)o->at = i;
    } else {
        double value = o->kind == DOUBLE ? strtod(text, &end) : (double)strtoll(text, &end, 10);
        if (end == text || *end || errno || !(value >= o->low && value <= o->high))
            fail(2, "%s: '%s', expected a %s from %.15g to %.15g", o->name, text,
                 o->kind == DOUBLE ? "number" : "whole number", o->low, o->high);
        if (o->kind == DOUBLE) *(double *)o->at = value;
        else if (o->kind == LONG) *(long *)o->at = value;
        else *(int *)o->at = value;
    }
}

// --name value, or --name=value.
static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        Option *o = options;
        if (!strcmp(argv[i], "-h")) argv[i] = "--help";
        size_t length = strcspn(argv[i], "=");
        const char *value = argv[i][length] ? argv[i] + length + 1 : NULL;
        while (o < options + N_OPTIONS && (!o->help || strncmp(o->name, argv[i], length) ||
                                           o->name[length])) o++;
        if (o == options + N_OPTIONS) fail(2, "%s: no such option; --help lists them", argv[i]);
        if (o->given++ && o->kind != TEXTS) fail(2, "%s: given twice", o->name);
        if (o->kind == FLAG && value) fail(2, "%s: '%s', expected no value", o->name, value);
        if (o->kind == FLAG) *(int *)o->at = 1;
        else if (value) option_set(o, value);
        else if (++i == argc || (o->kind != TEXTS && o->at != &opt.prompt &&
                                 !strncmp(argv[i], "--", 2)))
            fail(2, "%s: its value is missing", o->name);
        else option_set(o, argv[i]);
    }
}

static int generating(void) { return opt.generate >= 0; }
static int training(void) { return !opt.eval && !generating(); }
static int updating(void) { return training() && opt.schedule.steps != 0; }

// What would be ignored is refused.
static void check_modes(void) {
    int mode = opt.eval ? EVAL : generating() ? GENERATE : TRAIN, modes = 0;
    for (Option *o = options; o < options + N_OPTIONS; o++) {
        if (!o->help) modes = o->kind;
        else if (o->given && !((o->modes ? o->modes : modes) & mode))
            fail(2, training() ? "%s: expected --generate N too" : "%s: not with %s", o->name,
                 opt.eval ? "--eval" : "--generate");
    }
}

// Refuses what contradicts itself, and fills in defaults that need neither data nor model.
static void check_options(void) {
    if (!training() && !opt.load)
        fail(2, "%s: expected --load FILE too", opt.eval ? "--eval" : "--generate");
    if (opt.eval && generating()) fail(2, "--eval and --generate: expected one of them");
    check_modes();
    if (opt.prompt && opt.prompt_file) fail(2, "--prompt and --prompt-file: expected one of them");
    if (training() && opt.val_data && !opt.train_data)
        fail(2, "--val-data: expected --train-data FILE too");
    if (opt.save_best && !opt.val_data && opt.train_data)
        fail(2, "--save-best: expected --val-data FILE too");
    if (opt.resume && (!training() || !opt.save || opt.load))
        fail(2, "--resume: expected --save FILE, the run to go on with, and no --load");
    if (opt.save_every && !opt.save) fail(2, "--save-every: expected --save FILE too");
    opt.save = link_target(opt.save), opt.save_best = link_target(opt.save_best);
    opt.log = link_target(opt.log);
    if (opt.load && opt.save && is_helper(opt.load, opt.save))
        fail(2, "--load %s: --save %s writes it", opt.load, opt.save);
    if (opt.eval && opt.train_data && !opt.val_data)
        fail(2, "--eval: expected --val-data FILE too");
    if (opt.batch_size == -1) opt.batch_size = generating() ? 1 : 8;
}

// --- Data: what was named, else tinyshakespeare if prepared, else this program's own text

struct Inputs {
    Data train, val;        // n = 0: none
    Tokenizer tokenizer;
    int named;              // whether the command line names the tokenizer
    int own_text, prepared; // whether data is this program's own text, or the prepared default
};

// More of them only learn this program's own text by heart.
static void check_schedule(const Inputs *in) {
    Schedule *s = &opt.schedule;
    if (s->steps < 0) s->steps = in->own_text ? 1500 : 4000;
    if (s->floor < 0) s->floor = s->peak / 10;
    if (s->floor > s->peak)
        fail(2, "--min-lr %g: expected at most the learning rate, %g", s->floor, s->peak);
    if (s->warmup < 0) s->warmup = s->kind == CONSTANT ? 0 : (s->steps + 19) / 20;
    if (!s->steps && (opt.log || opt.save_best))
        fail(2, "--steps 0: expected no %s", opt.log ? "--log" : "--save-best");
}

// X_tokenizer.bin, if there is one, for X.safetensors, X_train.bin or X_val.bin; else NULL.
static char *tokenizer_beside(const char *file) {
    static const char *const endings[] = {".safetensors", "_train.bin", "_val.bin"};
    for (int i = 0; file && i < 3; i++) {
        size_t n = strlen(file), length = strlen(endings[i]);
        if (n < length || strcmp(file + n - length, endings[i])) continue;
        char *path = with_ending(file, "_tokenizer.bin");
        strcpy(path + n - length, "_tokenizer.bin");
        if (!access(path, R_OK)) return path;
        free(path);
    }
    return NULL;
}

static Inputs open_inputs(void) {
    static const char prepared[] = "data/tinyshakespeare_train.bin";
    Inputs in = {.named = opt.tokenizer != NULL};
    if (!opt.train_data && !opt.val_data && !access(prepared, R_OK)) {
        opt.train_data = prepared, opt.val_data = "data/tinyshakespeare_val.bin";
        in.prepared = 1;
    }
    if (!in.named) opt.tokenizer = tokenizer_beside(opt.resume ? opt.save : opt.load);
    if (!opt.tokenizer)
        opt.tokenizer = tokenizer_beside(opt.train_data ? opt.train_data : opt.val_data);
    in.tokenizer = opt.tokenizer ? tokenizer_load(opt.tokenizer) : tokenizer_bytes(256);
    if (generating() || (training() && !updating() && !opt.train_data)) return in;  // none needed
    if (!opt.train_data && !opt.val_data) {
        if (access("train_gpt2_mla.c", R_OK) || access("test_mla.c", R_OK))
            fail(1, "no data: run this in the repository, run `make shakespeare` first, or name a "
                 "text with --train-data (--eval: --val-data) FILE");
        opt.train_data = "train_gpt2_mla.c", opt.val_data = "test_mla.c";
        in.own_text = 1;
    }
    if (training()) in.train = data_load(opt.train_data);
    if (opt.val_data) in.val = data_load(opt.val_data);
    return in;
}

static void check_data(const Data *d, const Model *m, const Tokenizer *tokenizer, long needed) {
    if (!d->n) return;
    if (d->text && tokenizer->V > 256)
        fail(1, "%s: a text, read as bytes, but %s has %d tokens: expected a token file", d->path,
             opt.tokenizer, tokenizer->V);
    if (d->largest >= m->c.V)
        fail(1, "%s: token %d, expected less than the model's vocabulary, %d: made with another "
             "tokenizer?", d->path, d->largest, m->c.V);
    char *beside = opt.tokenizer ? tokenizer_beside(d->path) : NULL;
    if (beside && strcmp(beside, opt.tokenizer)) {
        Tokenizer other = tokenizer_load(beside);
        if (!same_tokens(&other, tokenizer))
            fail(1, "%s: its tokens are those of %s, not of %s", d->path, beside, opt.tokenizer);
        tokenizer_free(&other);
    }
    free(beside);
    if (d->n < needed)
        fail(1, "%s: %ld tokens, expected at least %ld for a batch", d->path, d->n, needed);
}

// What tokens stand for must be what the model knows.
static void check_inputs(Inputs *in, const Model *m) {
    int V = m->c.V, T = opt.seq_len;
    int known = in->tokenizer.V, meant = in->named || opt.config.V != -1;
    if (!in->named && in->prepared && V <= 256 && known != V)
        opt.tokenizer = NULL;  // a byte model, beside other data
    int padded = V == round_up(known, 64) || V == round_up(known, 128);
    if (opt.tokenizer && (known > V || (known < V && !meant && !padded)))
        fail(1, "%s: vocabulary %d, the model's is %d: %s", opt.tokenizer, known, V,
             in->named ? "made with another --tokenizer?" :
             generating() ? "expected --tokenizer FILE" : "expected data of the model's tokenizer");
    if (!opt.tokenizer) {  // then tokens are bytes, but for those in a file of a larger vocabulary
        int bytes = V <= 256 || in->train.text || in->val.text;
        tokenizer_free(&in->tokenizer);
        in->tokenizer = tokenizer_bytes(bytes ? V : 0);
        if (generating() && !bytes)
            fail(2, "--generate: expected --tokenizer FILE, the model's vocabulary is %d", V);
    }
    check_data(&in->val, m, &in->tokenizer, 2);
    check_data(&in->train, m, &in->tokenizer,
               opt.order == SEQUENTIAL ? (long)opt.batch_size * T + 1 : T + 1);
}

// --- The model: loaded, or new

// A model's shape given along with --load must be that of the checkpoint.
static void check_against(const Config *loaded, const char *path) {
    for (Option *o = options; o < options + N_OPTIONS; o++) {
        if (!o->given) continue;
        ptrdiff_t offset = (char *)o->at - (char *)&opt.config;
        if (offset < 0 || offset >= (ptrdiff_t)sizeof opt.config) continue;
        int found = *(const int *)((const char *)loaded + offset), wanted = *(int *)o->at;
        if (found == wanted) continue;
        if (o->choices)
            fail(2, "%s %s: %s has %s", o->name, o->choices[wanted], path, o->choices[found]);
        fail(2, "%s %d: %s has %d", o->name, wanted, path, found);
    }
}

// A new model's shape where the command line does not say it. [ATTENTION 1]
static void model_defaults(const Inputs *in) {
    Config *c = &opt.config;
    if (opt.seq_len == -1) opt.seq_len = 128;
    if (c->attention == -1) c->attention = MLA;
    if (c->position == -1) c->position = takes_position[c->attention][ROPE] ? ROPE : DECOUPLED;
    if (c->latent_norm != -1 && !has_latent(c))
        fail(2, "--latent-norm: attention %s has no latent", attention_names[c->attention]);
    if (c->latent_norm == -1) c->latent_norm = LAYERNORM;
    if (c->L == -1) c->L = 4;
    if (c->NH == -1) c->NH = 4;
    if (c->C == -1) c->C = 128;
    if (c->V == -1)
        c->V = opt.tokenizer ? in->tokenizer.V
             : max_int(in->train.largest, in->val.largest) < 256 ? 256 : 50257;
    c->block_size = opt.seq_len;
}

// The options that shape a run, in words, once all defaults are chosen. 15 digits tell apart all
// that a person can give, and print 0.004 as it was given.
static const char bf16_setting[] = ", precision bf16";  // without it, fp32

static const char *settings(const Data *d) {
    static char text[900];
    const Options *o = &opt;
    const Schedule *s = &opt.schedule;
    const AdamW *a = &opt.adam;
    snprintf(text, sizeof text, "training data %ld tokens (hash %08x), order %s, "
             "batch %d x %d x %d, steps %ld, %s schedule: warmup %ld, lr %.15g to %.15g, "
             "decay %.15g, betas %.15g %.15g, eps %.15g, clip %.15g, dropout %.15g, seed %ld%s",
             d->n, hash_bytes(d->tokens, d->n * (long)sizeof *d->tokens), order_names[o->order],
             o->batch_size, o->grad_accum, o->seq_len, s->steps, schedule_names[s->kind],
             s->warmup, s->peak, s->floor, a->weight_decay, a->beta1, a->beta2, a->eps,
             o->grad_clip, o->dropout, o->seed, precision == BF16 ? bf16_setting : "");
    return text;
}

// The steps that the run in a checkpoint has done, if its settings are these.
static long resume_point(const Checkpoint *checkpoint, const char *is) {
    const char *was = checkpoint_meta(checkpoint, "settings");
    const char *step = checkpoint_meta(checkpoint, "step");
    int bf16 = strstr(was, bf16_setting) != NULL;
    if (bf16 != (precision == BF16))
        fail(2, "%s: its run had precision %s; this one has %s (--load starts another run from it)",
             opt.save, precision_names[bf16], precision_names[precision]);
    size_t same = 0;  // up to the first setting that differs
    for (size_t i = 0; was[i] && was[i] == is[i]; i++)
        if (was[i] == ' ' && i && was[i - 1] == ',') same = i + 1;
    was += same, is += same;
    if (strcmp(was, is))
        fail(2, "%s: its run had %.*s; this one has %.*s (--load starts another run from it)",
             opt.save, (int)strcspn(was, ","), was, (int)strcspn(is, ","), is);
    char *end;
    long done = strtol(step, &end, 10);
    if (end == step || *end || done < 0 || done > opt.schedule.steps)
        fail(1, "%s: step '%s', expected a number from 0 to %ld", opt.save, step,
             opt.schedule.steps);
    return done;
}

// The model, and the steps that its run has done already.
static Model *open_model(const Inputs *in, long *done) {
    Model *m;
    if (opt.load || opt.resume) {
        Checkpoint checkpoint = checkpoint_open(opt.load ? opt.load : opt.save);
        Config loaded = checkpoint_config(&checkpoint);
        check_against(&loaded, checkpoint.path);
        if (opt.resume && !(checkpoint_meta(&checkpoint, "settings") &&
                            checkpoint_meta(&checkpoint, "step")))
            fail(1, "%s: a model without a run's state, nothing to resume (--load starts from it)",
                 opt.save);
        if (opt.seq_len == -1) opt.seq_len = loaded.block_size;
        if (opt.resume) *done = resume_point(&checkpoint, settings(&in->train));
        m = model_create(&loaded, updating());
        checkpoint_read_model(&checkpoint, m, opt.resume && updating());
        checkpoint_close(&checkpoint);
    } else {
        model_defaults(in);
        config_complete(&opt.config, 2, "options");
        m = model_create(&opt.config, updating());
        model_init(m, opt.seed);
    }
    const Config *c = &m->c;
    if (opt.seq_len > c->block_size)
        fail(2, "--seq-len %d: the model's block size is %d", opt.seq_len, c->block_size);
    if (opt.cache > CACHE_FULL && !has_latent(c))  // [ATTENTION 3]
        fail(2, "--cache %s: attention %s has no latent, expected --cache full",
             cache_names[opt.cache], attention_names[c->attention]);
    return m;
}

// What goes into the run, once nothing is wrong with it.
static void print_inputs(const Inputs *in, const Model *m) {
    const Data *d = opt.eval ? &in->val : &in->train;
    if (in->own_text)
        printf("No data prepared: taking this program's own text, byte by byte. "
               "For Shakespeare: make shakespeare\n");
    print_model(stdout, m, cache_mode(&m->c));
    print_kept(&opt);
    if (!opt.eval && !updating()) return;
    printf("%ld tokens of %s, %d threads%s%s\n", d->n, d->path, omp_get_max_threads(),
           opt.eval ? "" : in->val.n ? "; validation on " : "; no validation without --val-data",
           opt.eval || !in->val.n ? "" : in->val.path);
}

#ifndef TESTING
int main(int argc, char **argv) {
    for (int fd = 0; fd < 3; fd++)  // one that was closed must not become that of a file
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd) return 1;
    setvbuf(stderr, NULL, _IOLBF, BUFSIZ);  // no signal's line comes amid another
    begin_ranks(argc, argv);  // [MPI]
    parse_options(argc, argv);
    if (opt.help) return print_help(), 0;
    check_options();
    if (precision == BF16) find_matrix_unit();
    long done = 0;
    int status = 0;
    Inputs in = open_inputs();
    check_schedule(&in);
    agree(&in);  // [MPI]
    Model *m = share_model(rank ? NULL : open_model(&in, &done), &done);
    check_inputs(&in, m);
    if (!generating()) model_reserve(m, opt.batch_size / ranks, opt.seq_len, updating());
    Outputs out = {0};
    if (training()) out = open_outputs(&opt, m, settings(&in.train), &in.val, done);
    share(&out.validated, sizeof out.validated);  // [MPI]
    if (!generating()) print_inputs(&in, m);

    if (generating()) generate_command(m, &opt, &in.tokenizer);
    else if (opt.eval) {
        Evaluation e = evaluate(m, &in.val, &in.tokenizer, opt.batch_size, opt.seq_len, 0);
        print_evaluation(&e);
        if (!isfinite(e.loss)) fail(1, "%s: its loss is no number", opt.load);
    } else if (updating()) {
        m->dropout = opt.dropout;
        status = train(m, &opt, &in.train, in.val.n ? &in.val : NULL, &in.tokenizer, &out, done);
    } else if (opt.save) {
        status = !checkpoint_save(m, opt.save, 0, NULL, "");
        if (!status) printf("saved %s\n", opt.save);
    }
    if ((fflush(stdout) || ferror(stdout)) && !status)
        fail(1, "standard output: cannot write: %s", strerror(errno));
    model_free(m), tokenizer_free(&in.tokenizer), free(in.train.tokens), free(in.val.tokens);
    return status;
}
#endif

// ==== 17  UNICODE ===============================================================================
// Which characters are letters (\p{L}), numbers (\p{N}) and white space (\s): in Unicode 16.0, as
// tiktoken 0.14 has it. Written by dev/test/encoding_test.py --table: how far each range of codes
// begins after the one before, and how long it is, in base 26, whose last digit is a small letter.

static int unicode_class(int code) {
    static const char *const ranges[] = {
        [LETTER] =
        "CnBagBaBvbkbebfxbBfbRqemofhbbbEzfbccebbgbbdbbbubDfbFjiGkbBmcbgBpCtBbeeBtBrBjcbDvbbpchckdcb"
        "qbbBeBdDllbyBhjcebfwebjbdbxzhlfybgrBqCgCcdbsbhkpqeicccwbhbbdedbqbncbdockbigeccwbhbcbcbcBfe"
        "bbtdqjbdbwbhbcbfdbsbpcxblicccwbhbcbfdbBecbdpbrbbgddbedcbbbcdcdddmwbCaibdbxbqdbBadcbccBebei"
        "bdbxbkbfdbBfcbcpcrjbdbBpcbqbfdidygfsdybjbbchCgBwbcmhCgcbbbfbybbbkbcjbcfbbveBgbClibBkBbfElB"
        "rubqgeedbdchdenmbrBmbbfbcBrbMvbechbbbecBpbecBhbechbbbecpbCfbecCpBlqqDicgdXwcrbBafCxgihsnto"
        "sonbdpCaBjbebCpDlhfcBibbfCskBfBxBecflBseBaCcxjCbDebDpBvriCcBenckBsBaBkBpdkBkclfBrcdBpebgbc"
        "dbfHkCmKscgcBmcgcibbbbbbbBfcCbbhbbddbhdecgenfdbhEmbnbqnDxbebckbbdfgbbbbbbeblceffebCacDZfIv"
        "gedcmBmbbfbcCehbqxjhbhbhbhbhbhbhbhDcbSbcBqffceDigdbDmbefBrbDqrBgBwqTsJToCmBGUfCpBucKjdqkcu"
        "BvqBfcCsBxjcDzcCpccbbbivqbdbebxBdCaoByCkgdbbclBckxzBdhBvBcbqfbkkfbBpxdbiuxdbdBybbdccfcbbby"
        "dclhdmgcgcgjhbhbBrbogElBdQNsmxeBxMNcOccEcBmhmffbbkbnbfbbbcbcbEeBhNzsCmcCcBomEmfbFfBkBagBal"
        "DldgcgcgcdBjmbBabtbcbpcoBiEtOzBddBxBvBgnubigBmkBecBkeiBwGcsBkeBkeBoiCamlbpbhbcblbpbhbcdCam"
        "LzjwkiygbBqbjCrgcbbBsbcdbcxkxjBfCntbckwkBaCsCegcCmbpebdbBdBqBddBdBjibBcBbCckwktnsEgCvCdBzn"
        "BznBkBmBcjxJqBqgcqdChBdkbiwBqsBuvBbxmCbCfccbnBtBgzBaBkBdbcbiBjdbmBwoevbbbBjsbztcClhbbbebpb"
        "khBvBmicccwbhbcbfdbsbmfBekbbcbbBmbbzbbbBsCbseudBeBwucbbHcBvBpeBkBwubChBrnbCtBbBlhHdBsEmCmB"
        "ficbcibcbypbbbDqicBnqbbbBcbkBohbvblButbsCvHrBhBfjbBlrbBxBeEihbcbBmvbzgbcbBgobMptpbbnbBiEub"
        "DbBJmIwHoDXkDtpBPgrgzFXrfWlKDdBeCPuVxhBfrDbrBesBwqeBfvftQqBtIdCmEyCxfbConCmcbbBcJCaiBVqBpk"
        "NFrebhbcbLfpbBddcboeiPgDKuEdfndjhkIWkDhbCtbccbcccebmbbbhbCnbecibhbBcbebfbbdhbNcczbzbBfbzbB"
        "fbzbBfbzbBfbzbiCSyBfggKbCkFqBtkhqbMjBesBsSqBcIuBecbTbhbebcbpbHpChCqhbBUiebBbbcbbcbbkbebbbb"
        "gbebbbbbbdbcbbcbbbbbbbbbbcbbcebhbebebbbkbrfdbfbrGOaCLFcBgGDugIocINqoLBlpXyDQwUwCFyHHzfGFg",
        [NUMBER] =
        "BwkEqcfbcdCDlkFekHqkPwkEokegEekEokEokcgEgnElkihDzkEahhtEfkDskEokCsuKikCskBBruBHxdJfkgkwkLo"
        "kEylGjkgkHakDikFekgkBOgbdggkHqBzcfBByCiDawYgBeCBhbBDxbzjodNfeFikBeibpBgkBnpBRSakHgkMigFykB"
        "mkHqkwkDikPqkBFMckSzBtmCfrcNdBbBkeBdbibFefHukBKgizhBnjCxfwgGeccqcBuCmjCacBedCxfEaiyiBphMsg"
        "BwkgkKsBfGckBqeEihFeBeEykCikFokhuJrkNekEokOkkDykguCymQetDpkZmkDiBdItkCskQgkDyvBPbEhXAfkDMc"
        "kDikFekbhUgkKcxBJSzkCEwumuEezBQrByDNckQgkTikJnkBBojEykBElChbdbeCyBtbpBLanEDfk",
        [SPACE] =
        "jfsbDwbBabIHjbDPnlBdcfbBvbFXwb",
    };
    static unsigned char classes[0x110000];
    if (!classes['A'])  // at the first call
        for (int class = LETTER; class <= SPACE; class++)
            for (int at = 0, number = 0, inside = 0, i = 0; ranges[class][i]; i++) {
                char digit = ranges[class][i];
                number = 26 * number + digit - (digit < 'a' ? 'A' : 'a');
                if (digit < 'a') continue;
                if (inside) memset(classes + at, class, number);
                at += number, number = 0, inside = !inside;
            }
    return classes[code];
}

// ==== 18  RANKS =================================================================================
// Data parallelism: every rank has the whole model, and computes its rows of every micro-batch with
// the dropout that they have in one process. The gradient of the batch's mean loss is the sum of
// what the ranks have; from that sum each makes the same update, bit for bit, so that weights stay
// the same without being sent. Memory for weights and moments is not saved, only for activations.
//
// An all-reduce leaves with each of n ranks the sum of what S bytes each had. In a ring, every rank
// passes an n-th of S on to the next and adds to its own what arrives from the one before; after
// n-1 times each has an n-th of the sum, and n-1 times more, without adding, bring it to all. So a
// rank sends 2 (n-1)/n S bytes: nearly the same for any n, which is why this scales. What grows
// with n is latency, paid 2 (n-1) times.
//
// A layer's gradients are complete when the backward of the last micro-batch leaves it. Their sum,
// one bucket, is under way while the layers below are computed: of all of it a step waits only for
// what takes longer than they do, and for the bucket of layer 0, with the embedding, at the end.

static uint64_t numbers_from(uint64_t key, uint64_t n) {
    return key + n * STRIDE;  // random_bits(key, n + i) is random_bits(this, i)
}

#ifdef USE_MPI
#include <mpi.h>
#define NUMBER (sizeof(real) == sizeof(float) ? MPI_FLOAT : MPI_DOUBLE)
static MPI_Request *sums;  // one by layer, under way or MPI_REQUEST_NULL
static int n_sums, last_backward, failed;

// Layer l's part of params, grads and moments; 0: and that of what lies outside the layers.
static size_t bucket(const Model *m, int l, int *size) {
    size_t from = l ? m->w[l][LN1_W] - m->params : 0;
    size_t to = l < m->c.L - 1 ? (size_t)(m->w[l + 1][LN1_W] - m->params) : m->n_reals;
    if (to - from > INT_MAX)
        fail(1, "layer %d: %zu parameters, MPI counts to %d", l, to - from, INT_MAX);
    *size = to - from;
    return from;
}

static void expect_sums(int last) { last_backward = last; }

static void begin_sum(const Model *m, int l) {
    int size;
    if (ranks == 1 || !last_backward) return;
    if (!sums) sums = allocate(m->c.L * sizeof *sums, "requests");
    real *g = m->grads + bucket(m, l, &size);
    MPI_Iallreduce(MPI_IN_PLACE, g, size, NUMBER, MPI_SUM, MPI_COMM_WORLD, &sums[n_sums++]);
}

static void continue_sums(void) {  // from a product's threads: MPI is promised the first alone
    int done;
    if (n_sums && !omp_get_thread_num()) MPI_Testall(n_sums, sums, &done, MPI_STATUSES_IGNORE);
}

static void end_sums(void) {
    if (n_sums) MPI_Waitall(n_sums, sums, MPI_STATUSES_IGNORE);
    n_sums = 0;
}

static void sum_numbers(double *x, int n) {
    if (ranks > 1) MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

static int stopping(void) {
    int any = stop_signal;
    if (ranks > 1) MPI_Allreduce(MPI_IN_PLACE, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    if (any) stop_signal = any;
    return any;
}

static void share(void *p, size_t bytes) { MPI_Bcast(p, bytes, MPI_BYTE, 0, MPI_COMM_WORLD); }

// --- The beginning: all ranks do the same, with weights and moments that only rank 0 reads

// Fails unless all ranks have the same.
static void compare(const char *what, uint32_t hash) {
    uint32_t all[ranks];
    MPI_Gather(&hash, 1, MPI_UINT32_T, all, 1, MPI_UINT32_T, 0, MPI_COMM_WORLD);
    for (int r = 1; r < ranks && !rank; r++)
        if (all[r] != hash)
            fail(1, "rank %d: its %s (hash %08x) is not that of rank 0 (%08x)", r, what, all[r],
                 hash);
}

// Before an option counts: with --help for one of them, the others would wait for it.
static void compare_programs(int argc, char **argv) {
    static const char program[] = "/proc/self/exe";  // where there is none, builds are not compared
    size_t size = 0;
    uint32_t hash = 0;
    unsigned char *bytes = access(program, R_OK) ? NULL : read_file(program, &size);
    compare("program", hash_bytes(bytes, size));
    for (int i = 1; i < argc; i++) hash = 31 * hash + hash_bytes(argv[i], strlen(argv[i]));
    compare("command line", hash);
    free(bytes);
}

// On data, and on who reports and writes.
static void agree(const Inputs *in) {
    const Tokenizer *t = &in->tokenizer;
    if (generating() && ranks > 1) fail(2, "--generate: expected one rank, found %d", ranks);
    if (opt.batch_size % ranks)
        fail(2, "--batch-size %d: expected a multiple of the number of ranks, %d", opt.batch_size,
             ranks);
    compare("training data", hash_bytes(in->train.tokens, in->train.n * (long)sizeof(uint16_t)));
    compare("validation data", hash_bytes(in->val.tokens, in->val.n * (long)sizeof(uint16_t)));
    compare("tokenizer", hash_bytes(t->bytes, t->start[t->V]));
    if (rank) opt.log = opt.save = opt.save_best = NULL, opt.resume = opt.sample_every = 0;
    int rows = opt.batch_size / ranks;
    if (ranks > 1) printf("%d ranks, each with %d rows of a batch\n", ranks, rows);
}

static Model *share_model(Model *m, long *done) {
    Config c = {0};
    int size;
    if (m) c = m->c;
    share(&c, sizeof c), share(done, sizeof *done), share(&opt.seq_len, sizeof opt.seq_len);
    if (!m) m = model_create(&c, updating());
    for (int set = 0; set < (updating() ? 3 : 1); set++)
        for (int l = 0; l < c.L; l++) {
            real *x = set_of(m, set) + bucket(m, l, &size);
            MPI_Bcast(x, size, NUMBER, 0, MPI_COMM_WORLD);
        }
    return m;
}

// --- The end. Who fails takes all along. What fails on every rank is said once, by rank 0: others
//     wait a while before they speak, and it ends them.

static void wait_to_fail(int status) {
    failed = status;
    signal(SIGTERM, SIG_DFL);
    if (rank) poll(NULL, 0, 1000 + 250 * min_int(rank, 30));
}

static void end_ranks(void) {
    if (failed && ranks > 1) MPI_Abort(MPI_COMM_WORLD, failed);
    MPI_Finalize();
}

static void begin_ranks(int argc, char **argv) {
    int level, here;
    MPI_Comm host;
    // For a sum in place Open MPI would take a tree, in which S goes 2 log2(n) times. 1: the ring.
    setenv("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "1", 0);
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    atexit(end_ranks);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    MPI_Comm_size(host, &here), MPI_Comm_free(&host);
#ifdef _OPENMP  // else each of a host's ranks would take all of its cores
    int cores = sysconf(_SC_NPROCESSORS_ONLN) / here;
    if (!getenv("OMP_NUM_THREADS"))
        omp_set_num_threads(max_int(1, min_int(cores, omp_get_num_procs())));
#endif
    if (rank && !freopen("/dev/null", "w", stdout)) fail(1, "/dev/null: cannot open");
    compare_programs(argc, argv);
}
#else  // one rank waits for nobody
static void expect_sums(int last) { (void)last; }
static void begin_sum(const Model *m, int l) { (void)m, (void)l; }
static void continue_sums(void) {}
static void end_sums(void) {}
static void sum_numbers(double *x, int n) { (void)x, (void)n; }
static int stopping(void) { return stop_signal; }
static void begin_ranks(int argc, char **argv) { (void)argc, (void)argv; }
static void agree(const Inputs *in) { (void)in; }
static Model *share_model(Model *m, long *done) { return (void)done, m; }
static void share(void *p, size_t bytes) { (void)p, (void)bytes; }
static void wait_to_fail(int status) { (void)status; }
#endif

/*
train_gpt2_mla: train a GPT-2 whose attention is multi-head (MHA), grouped- or multi-query
(GQA, MQA) or multi-head latent attention (MLA), on a CPU, in one C file.

HOW TO READ THIS FILE
Top to bottom. Each chapter uses only what stands above it; every backward stands under its
forward and names the derivative that it implements. Numbers such as (14) are equations of
the writeup, doc/writeup.md, which derives what is only used here.

    1  Ground            numbers, errors, threads, randomness that needs no state
    2  The model         its configuration and the one table of parameter tensors
    3  Matrix product    where nearly all time goes: packed panels and a register tile
    4  Layers            linear, norms, GELU, dropout, rotary embedding
    5  Attention core    softmax(q k') v and its backward, for every kind of attention
    6  Front ends        how x becomes q, k, v: MHA/GQA/MQA, then MLA
    7  The network       block, head and loss; forward and backward through all of it
    8  Optimizer         AdamW, clipping, learning-rate schedule
    9  Data              token files, text files, tokenizers, batches
   10  Checkpoints       safetensors, written and read
   11  Decoding          generating text, one token after the other
   12  Training          validation, the loop
   13  Command line      options, and main

NOTATION (the writeup uses the same)
    B  sequences in a batch      T  tokens in a sequence    N = B*T  tokens in a batch
    L  layers                    C  channels                V  vocabulary size
    NH query heads               NKV key/value heads        HS = C/NH  head size
    R  kv_rank                   RQ q_rank                  RD rope_dim
    NOPE = HS - RD when the rotary part of a head is split off (position `decoupled`), else HS;
    rope = HS - NOPE is the width of that split-off part (0 for learned; 0 too for position
    `rope`, where the whole head is rotated in place and travels as the NOPE part)
Arrays are row-major; a comment such as (N, C) gives the shape. Weights are (out, in), as in
PyTorch. The gradient of the loss with respect to x is called dx.

TO ADD YOUR OWN ATTENTION
  - what it is made of, marked [ATTENTION 1]: its name, what its configuration allows, its tensors
    in the table, what its forward keeps. Checkpoints and optimizer then know of them;
  - what it does, marked [ATTENTION 2] in chapter 6: a front end, forward and backward;
  - how it decodes, marked [ATTENTION 3] in chapters 2, 6 and 11: what a cache keeps of a token;
  - run `make test`, with your kind added to `kinds` in test_mla.c: finite differences in double
    precision say whether the backward is right, full passes whether decoding is.
*/
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(long) == 8 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "64 bits, little-endian");
#ifdef _OPENMP
#include <omp.h>
#else  // without OpenMP the same code runs on one thread
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

// ==== 1  GROUND =============================================================================

// The scalar type. Training uses float; -DREAL_DOUBLE builds the same program in double, in
// which finite differences check gradients to six digits and more (test_mla.c).
#ifdef REAL_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// Says what is wrong, on one line, and ends the program. Status 1: a file, the machine or the
// numbers; status 2: the command line.
__attribute__((noreturn, format(printf, 2, 3)))
static void fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("train_gpt2_mla: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(status);
}

static const double PI = 3.14159265358979323846;
static int min_int(int a, int b) { return a < b ? a : b; }
static int max_int(int a, int b) { return a > b ? a : b; }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Memory of `bytes`, zeroed, aligned to a cache line; `what` names it should there be too little.
static void *allocate(size_t bytes, const char *what) {
    void *p = aligned_alloc(64, (bytes + 64) & ~(size_t)63);
    if (!p) fail(1, "%s: %.1f MB of memory needed, and not to be had", what, bytes / 1e6);
    memset(p, 0, bytes);
    return p;
}

// An arena hands out consecutive pieces of one allocation. A layout function that takes its
// pieces is run twice: with no base it only counts, then it places.
typedef struct {
    real *base;
    size_t used;  // in reals
} Arena;

static void arena_allocate(Arena *arena, const char *what) {
    arena->base = allocate((arena->used + 64) * sizeof(real), what);  // 64: tiles may read past an end
    arena->used = 0;
}

static real *take(Arena *arena, size_t n) {
    real *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += (n + 15) & ~(size_t)15;  // every piece starts on a cache line
    return p;
}

// Randomness without state: number i of stream `key` is a hash of the two (the finalizer of
// SplitMix64: Steele, Lea and Flood 2014). So every random number has an address: dropout is
// the same for any number of threads, and no generator's state needs to be saved.
static uint64_t random_bits(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint32_t hash_bytes(const void *bytes, long n) {  // FNV-1a
    uint32_t hash = 2166136261u;
    for (long i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 16777619u;
    return hash;
}

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

// ==== 2  THE MODEL ==========================================================================

// [ATTENTION 1] The kinds of attention, by their names on the command line and in checkpoints.
enum { MHA, GQA, MQA, MLA };
enum { LEARNED, ROPE, DECOUPLED };
enum { LAYERNORM, RMSNORM, NONE };
static const char *const attention_names[] = {"mha", "gqa", "mqa", "mla", NULL};
static const char *const position_names[] = {"learned", "rope", "decoupled", NULL};
static const char *const norm_names[] = {"layernorm", "rmsnorm", "none", NULL};

// Everything that fixes the shape of a model. -1 stands for "choose the default".
typedef struct {
    int attention, position, latent_norm;
    int L, NH, NKV, C, block_size, V;  // block_size: the longest sequence
    int RQ, R, RD;                     // ranks of the latents (mla), rotated width of a head
    int HS, NOPE, QKV;                 // derived: see NOTATION; QKV: rows of c_attn (0 for mla)
} Config;

// Fills in what was left open (for mla the experiments' defaults RQ = C/2, R = 2C/3, RD = HS/2,
// with which it has about as many parameters as MHA) and refuses what cannot be; `where` names its source.
// [ATTENTION 1] What your kind derives or forbids belongs here.
static void config_complete(Config *c, int status, const char *where) {
    if (c->C % c->NH) fail(status, "%s: heads %d does not divide channels %d", where, c->NH, c->C);
    c->HS = c->C / c->NH;
    const char *kind = attention_names[c->attention], *position = position_names[c->position];

    int fixed = c->attention == GQA ? -1 : c->attention == MQA ? 1 : c->NH;
    if (c->NKV == -1) c->NKV = fixed != -1 ? fixed : c->NH >= 8 && c->NH % 4 == 0 ? c->NH / 4 : c->NH % 2 ? 1 : c->NH / 2;
    if (fixed != -1 && c->NKV != fixed)
        fail(status, "%s: kv-heads %d: %s has %d (gqa lets you choose)", where, c->NKV, kind, fixed);
    if (c->NKV < 1 || c->NH % c->NKV)
        fail(status, "%s: kv-heads %d does not divide heads %d", where, c->NKV, c->NH);

    if ((c->attention == MLA && c->position == ROPE) ||
        ((c->attention == GQA || c->attention == MQA) && c->position == DECOUPLED))
        fail(status, "%s: position %s does not go with attention %s (expected learned or %s)", where,
             position, kind, c->attention == MLA ? "decoupled" : "rope");

    if (c->position == ROPE && c->HS % 2)
        fail(status, "%s: head size %d (channels / heads): position rope turns pairs, expected an even one", where, c->HS);
    int rd = c->position == LEARNED ? 0 : c->position == ROPE ? c->HS : -1;
    if (c->RD == -1) c->RD = rd != -1 ? rd : max_int(2, c->HS / 4 * 2);  // even
    if (rd != -1 && c->RD != rd)
        fail(status, "%s: rope-dim %d: position %s needs %d", where, c->RD, position, rd);
    if (c->RD % 2 || (rd == -1 && (c->RD < 2 || c->RD >= c->HS)))
        fail(status, "%s: rope-dim %d: expected an even number from 2 to less than the head size, %d", where,
             c->RD, c->HS);
    c->NOPE = c->position == DECOUPLED ? c->HS - c->RD : c->HS;

    if (c->attention == MLA) {
        if (c->RQ == -1) c->RQ = c->C / 2;
        if (c->R == -1) c->R = 2 * c->C / 3;
        if (c->R < 1 || c->R > c->C)
            fail(status, "%s: kv-rank %d: expected 1 to channels, %d", where, c->R, c->C);
        if (c->RQ < 0 || c->RQ > c->C)
            fail(status, "%s: q-rank %d: expected 0 (no query latent) to channels, %d", where, c->RQ, c->C);
    } else {
        if (c->R > 0 || c->RQ > 0)
            fail(status, "%s: attention %s has no latent: q-rank and kv-rank go with mla", where, kind);
        c->R = c->RQ = 0;
        c->latent_norm = NONE;
    }
    // q of every head (NOPE, then RD), k of every kv head, the shared rotary key, v
    c->QKV = c->attention == MLA ? 0 : c->NH * c->HS + c->NKV * c->NOPE + (c->HS - c->NOPE) + c->NKV * c->HS;
}

// What a decoder keeps of each token: keys and values, or for mla the latent they come from
// (chapter 6). The latter serves in two ways.
enum { CACHE_FULL, CACHE_LATENT, CACHE_ABSORBED };
static const char *const cache_names[] = {"full", "latent", "absorbed", NULL};

static int cache_mode(const Config *c) { return c->attention == MLA ? CACHE_ABSORBED : CACHE_FULL; }  // the smallest

// [ATTENTION 3] Floats that a decoder keeps per token, all layers together (24). The shared rotary key is kept once.
static long cache_floats(const Config *c, int mode) {
    long rope = c->HS - c->NOPE;
    return c->L * (mode == CACHE_FULL ? c->NKV * (c->NOPE + c->HS) + rope : c->R + rope);
}

// THE TABLE. It says each parameter tensor's name, shape and initialization once. A tensor of
// one dimension (cols 0) is a bias or a norm weight and is not decayed; one with rows 0 does
// not exist in this configuration; "%d" in a name stands for the layer. Add a tensor here and
// to the enum, and it is allocated, initialized, trained, saved, loaded and tested.
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

static void describe_tensors(const Config *c, Spec spec[TENSORS]) {
    int C = c->C, HS = c->HS, NH = c->NH, NOPE = c->NOPE, R = c->R, RQ = c->RQ;
    int mla = c->attention == MLA, rope = HS - NOPE, norm = c->latent_norm;
    Spec table[TENSORS] = {
        [WTE]        = {"wte.weight", c->V, C, NORMAL},
        [WPE]        = {"wpe.weight", c->position == LEARNED ? c->block_size : 0, C, NORMAL},
        [LN1_W]      = {"h.%d.ln_1.weight", C, 0, ONES},
        [LN1_B]      = {"h.%d.ln_1.bias", C, 0, ZEROS},
        [ATTN_W]     = {"h.%d.attn.c_attn.weight", c->QKV, C, NORMAL},
        [ATTN_B]     = {"h.%d.attn.c_attn.bias", c->QKV, 0, ZEROS},
        // W_DQ, its norm, W_UQ (22); Q_W takes their place when q_rank is 0
        [QA_W]       = {"h.%d.attn.q_a_proj.weight", RQ, C, NORMAL},
        [QA_NORM_W]  = {"h.%d.attn.q_a_layernorm.weight", norm == NONE ? 0 : RQ, 0, ONES},
        [QA_NORM_B]  = {"h.%d.attn.q_a_layernorm.bias", norm == LAYERNORM ? RQ : 0, 0, ZEROS},
        [QB_W]       = {"h.%d.attn.q_b_proj.weight", RQ ? NH * HS : 0, RQ, NORMAL},
        [Q_W]        = {"h.%d.attn.q_proj.weight", mla && !RQ ? NH * HS : 0, C, NORMAL},
        // [W_DKV; W_KR] (20, 23), the latent's norm, W_UKV: per head k rows, then v rows (21)
        [KVA_W]      = {"h.%d.attn.kv_a_proj_with_mqa.weight", mla * (R + rope), C, NORMAL},
        [KVA_NORM_W] = {"h.%d.attn.kv_a_layernorm.weight", norm == NONE ? 0 : mla * R, 0, ONES},
        [KVA_NORM_B] = {"h.%d.attn.kv_a_layernorm.bias", norm == LAYERNORM ? mla * R : 0, 0, ZEROS},
        [KVB_W]      = {"h.%d.attn.kv_b_proj.weight", mla * NH * (NOPE + HS), R, NORMAL},
        [APROJ_W]    = {"h.%d.attn.c_proj.weight", C, NH * HS, RESIDUAL},
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
    size_t size, offset;  // in the blocks params, grads, adam_m and adam_v alike
} Tensor;

// The tensors of one layer by their place in the table: w[l][FC_W] is layer l's c_fc.weight.
// Tensors outside the layers (wte, ln_f) are reached through any layer.
typedef real *Layer[TENSORS];

// [ATTENTION 1] What the forward of one block leaves for its backward; place_acts (chapter 7) gives
// each its room. The backward uses the same struct for their gradients, of all but x_mid and lse.
typedef struct {
    real *x;           // (N, C) the block's input: the residual stream
    real *qkv;         // (N, rows of c_attn) mha, gqa, mqa: q and k rotated if position is rope
    real *q_a, *q;     // (N, RQ), (N, NH*HS) mla: query latent before its norm; rotated queries
    real *kv_a, *kv;   // (N, R+rope), (N, NH*(NOPE+HS)) mla: latent before its norm and rotated
                       //     shared key; keys and values
    real *att;         // (N, NH*HS) the heads' outputs
    real *lse;         // (N, NH) log of the softmax's denominator
    real *x_mid;       // (N, C) the residual stream between attention and MLP
    real *fc;          // (N, 4C) before GELU; its backward leaves GELU's output here
} Acts;

// What decoding keeps of the tokens so far (chapter 6), and the room in which it works.
typedef struct {
    int mode, B, capacity, used;  // sequences; tokens to each: at most, so far
    size_t layer_size;            // reals per layer
    real *layers;
    real *parts, *scores;         // (B, NH, chunks, value+2), per thread (NH, CHUNK): see attention_decode
    real *q_lat, *o_lat;          // (B, NH, R+rope), (B, NH, R) absorbed
    real *kv;                     // latent: per thread (NOPE+HS, CHUNK), a chunk of one head decompressed
} Cache;

typedef struct {
    Config c;
    Tensor *tensors;
    int n_tensors;
    size_t n_params, block;                   // true parameters; reals in a block (with padding)
    real *params, *grads, *adam_m, *adam_v;   // grads and moments only when training
    Layer *w, *g;                             // L of each
    real *rope_cos, *rope_sin;                // (block_size, RD/2)
    void *memory;                             // what all of these are cut from
    // Activations, for at most max_N tokens.
    int max_N, head_rows;
    void *act_memory;
    Acts *acts;                    // L of them when training, else one that all layers share
    real *x_final;                 // (N, C) the residual stream after the last block
    real *norm;                    // (N, C) output of the norm at hand
    real *latent, *q_latent;       // (N, R), (N, RQ) normed latents of the layer at hand
    real *gelu;                    // (N, 4C) output of GELU; when training, the room of d.fc
    real *proj;                    // (N, C) output of c_proj, or (dropout) the gradient of one
    real *logits, *row_loss;       // (head_rows, V) a slice of the logits, then their gradient; (head_rows)
    real *rooms;                   // per thread room_size reals, where attention works (chapter 5)
    size_t room_size;
    Acts d;                        // gradients of the acts of the layer at hand
    real *d_norm, *d_latent, *d_q_latent;  // gradients of those without the d_
    real *d_k_rope;                // (N, NKV, rope) gradient of the shared rotary key by head
    real *partial;                 // partial sums of gradients that sum over tokens
    Cache *cache;                  // NULL: not decoding
    float dropout;                 // probability
    int dropping;                  // whether the pass at hand drops: only when training
    uint64_t dropout_key;          // changes with every micro-batch
} Model;

static void place_params(Model *m, Arena *arena, int training) {
    m->params = take(arena, m->block);
    if (training) {
        m->grads = take(arena, m->block);
        m->adam_m = take(arena, m->block);
        m->adam_v = take(arena, m->block);
    }
    m->rope_cos = take(arena, (size_t)m->c.block_size * m->c.RD / 2);
    m->rope_sin = take(arena, (size_t)m->c.block_size * m->c.RD / 2);
}

// Builds a model of all zeros: lists the tensors, allocates, points every layer at its own.
static Model *model_create(const Config *c, int training) {
    Model *m = allocate(sizeof *m, "model");
    Spec spec[TENSORS];
    m->c = *c;
    describe_tensors(c, spec);
    m->tensors = allocate(sizeof(Tensor) * TENSORS * c->L, "tensor list");
    Arena block = {0};
    for (int l = 0; l < c->L; l++)
        for (int id = 0; id < TENSORS; id++) {
            int per_layer = strchr(spec[id].name, '%') != NULL;
            if (!spec[id].rows || (l > 0 && !per_layer)) continue;
            Tensor *t = &m->tensors[m->n_tensors++];
            snprintf(t->name, sizeof t->name, spec[id].name, l);
            t->id = id, t->layer = per_layer ? l : -1;
            t->rows = spec[id].rows, t->cols = spec[id].cols, t->init = spec[id].init;
            t->size = (size_t)t->rows * (t->cols ? t->cols : 1);
            t->offset = block.used;
            take(&block, t->size);
            m->n_params += t->size;
        }
    m->block = block.used;

    Arena arena = {0};
    place_params(m, &arena, training);
    arena_allocate(&arena, "parameters and optimizer");
    place_params(m, &arena, training);
    m->memory = arena.base;

    m->w = allocate(sizeof(Layer) * c->L, "layer list");
    m->g = allocate(sizeof(Layer) * c->L, "layer list");
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
        for (int l = max_int(t->layer, 0); l < (t->layer == -1 ? c->L : t->layer + 1); l++) {
            m->w[l][t->id] = m->params + t->offset;
            m->g[l][t->id] = training ? m->grads + t->offset : NULL;
        }
    for (int t = 0; t < c->block_size; t++)  // (17)
        for (int i = 0; i < c->RD / 2; i++) {
            double angle = t * pow(10000.0, -2.0 * i / c->RD);
            m->rope_cos[(long)t * (c->RD / 2) + i] = cos(angle);
            m->rope_sin[(long)t * (c->RD / 2) + i] = sin(angle);
        }
    return m;
}

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

// ==== 3  MATRIX PRODUCT =====================================================================
//
// Nearly all time goes into products c = a b. Written as three loops they run at a few percent
// of what the processor can do, for two reasons, each with its own cure.
//
// Arithmetic waits for loads. A fused multiply-add needs two operands; fetched anew for each,
// they keep the load ports busy and the multipliers idle. Cure: the REGISTER TILE. MR x NR
// elements of c stay in registers while k runs; each step loads one column of a (MR numbers)
// and one row of b (NR numbers) and does MR*NR multiply-adds with them. The tile must leave
// registers for the operands: with 16 vector registers 6 x 2 vectors (12 sums, 2 of b, 1 of a),
// with 32 registers 8 x 2. Two vectors wide, since each sum must wait about 4 cycles for its
// previous multiply-add and there are two units: at least 8 independent sums keep them busy.
//
// Loads wait for memory. Consecutive rows of b are far apart, so each step would touch another
// cache line, and both matrices are too large for the fast caches. Cure: PACKED PANELS. b is copied
// panel by panel, so that the tile reads it strictly forwards: panel p holds columns p*NR ..
// p*NR+NR-1, KC rows at a time, and within it step k's NR numbers are adjacent. A panel (16 KB with
// vectors of 8 floats, 32 KB with 16) stays in the fastest caches while rows of a pass by. Copying
// also absorbs transposes (a stride decides, not the code) and makes the last panel whole. a itself
// is read where it lies if its rows are contiguous: MR rows are MR streams, which processors
// foresee. If its columns are, matmul packs a too, by MR rows.
// (In this chapter M, N, K are rows, columns and the length of the sums.)
//
// In which order an element of c is summed depends on shapes and strides alone (that of k, in blocks
// of KC; with few rows in others), never on which thread does it or how c is cut into pieces:
// results do not depend on the number of threads.

#if defined(__AVX512F__)
enum { VEC_BYTES = 64, MR = 8 };
#elif defined(__AVX__)
enum { VEC_BYTES = 32, MR = 6 };
#elif defined(__aarch64__)
enum { VEC_BYTES = 16, MR = 8 };
#else
enum { VEC_BYTES = 16, MR = 6 };
#endif
// A vector of VEC_BYTES that may lie anywhere in an array of reals.
typedef real vec __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
enum {
    VW = VEC_BYTES / sizeof(real),  // numbers in a vector
    NR = 2 * VW,
    MC = 8 * MR, KC = 256, NC = 1024  // rows of a block of a, depth of all panels, columns of a shared block of b
};

// A matrix by its strides: element (i, j) is p[i*row + j*col]. Swapping the two transposes.
typedef struct {
    const real *p;
    long row, col;
} Mat;

static Mat rows_of(const real *p, long row) { return (Mat){p, row, 1}; }
static Mat transposed(const real *p, long row) { return (Mat){p, 1, row}; }
// The part of a from element (i, j) on.
static Mat mat_from(Mat a, long i, long j) { return (Mat){a.p + i * a.row + j * a.col, a.row, a.col}; }

// c (rows, vectors*VW) = start + a b. Number (i, k) of a is a[i*a_row + k*a_step], rows of b are b_row
// apart. `start` is c itself to add to it, a row with stride 0 to add a bias, NULL for zero. Always
// inlined, so that the constants of each caller unroll the loops and put acc into registers. With
// one vector (few_by_columns), a is the large matrix and comes from memory: its rows are fetched ahead,
// those of the tile after the next into the second-level cache (the first may be full of b).
__attribute__((always_inline))
static inline void tile(const int rows, const int vectors, int K, const real *a, long a_row, long a_step,
                        const real *b, long b_row, real *c, long c_row, const real *start, long start_row) {
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

// Packs n lines of K numbers (line i, number k at src[i*line + k*deep], one of the two being 1) into
// panels of W lines: number k of line i goes to dst[(i/W)*W*K + k*W + i%W]. A last panel of fewer
// lines keeps what it had in their place: it meets only sums that are never stored. Inlined, so that
// W is a constant.
static inline void pack(real *dst, const real *src, long line, long deep, int n, int K, const int W) {
    if (deep == 1) {  // a transpose, done in squares that stay in registers
        const int S = W < 8 ? W : 8;
        for (int i = 0; i < n; i += S)
            for (int k = 0; k < K; k += 8) {
                const real *s = src + i * line + k;
                real *d = dst + (long)(i / W) * W * K + i % W + k * W;
                if (i + S <= n && k + 8 <= K) {
                    for (int y = 0; y < S; y++) __builtin_prefetch(s + (S + y) * line);  // the square below
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
                __builtin_prefetch(s + 12 * deep);  // rows far apart: the processor does not foresee them
                real *d = dst + (long)i * K + k * W;
                if (i + W <= n)
                    for (int y = 0; y < W; y++) d[y] = s[y];
                else
                    for (int y = 0; y < n - i; y++) d[y] = s[y];
            }
    }
}

_Alignas(64) static _Thread_local real own_a[MC * KC], own_b[NC / 2 * KC];  // panels of a thread's own
_Alignas(64) static real shared[NC * KC];                                   // panels that all threads read

// --- Tiles over whole matrices, within one thread

// c (M, N) = start + a b. Row i of a starts at a.p + i/MR*a_panel + i%MR*a.row.
//   a  in panels of a_panel numbers; or read where it lies, with a_panel = MR*a.row
//   b  in panels of NR columns, b_row = NR, `panel` numbers each; or in rows where it lies, with
//      panel = NR, readable up to NR numbers past its end
// A tile that sticks out of c is computed in `edge`, and the part inside is copied.
static void multiply_blocks(real *c, long c_row, Mat a, long a_panel, const real *b, long b_row, long panel,
                            int M, int N, int K, const real *start, long start_row) {
    for (int j = 0; j < N; j += NR, b += panel)
        for (int i = 0, rows; i < M; i += rows) {
            const real *pa = a.p + i / MR * a_panel + i % MR * a.row, *s = start ? start + i * start_row + j : NULL;
            real edge[MR * NR], *pc = c + i * c_row + j, *t = j + NR <= N ? pc : edge;
            long t_row = t == edge ? NR : c_row, s_row = start_row;
            rows = M - i >= MR ? MR : M - i >= 4 ? 4 : 1;
            if (t == edge && s) {
                for (int r = 0; r < rows; r++) memcpy(edge + r * NR, s + r * start_row, (N - j) * sizeof(real));
                s = edge, s_row = NR;
            }
            if (rows == MR) tile(MR, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            else if (rows == 4) tile(4, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            else tile(1, 2, K, pa, a.row, a.col, b, b_row, t, t_row, s, s_row);
            for (int r = 0; t == edge && r < rows; r++) memcpy(pc + r * c_row, edge + r * NR, (N - j) * sizeof(real));
        }
}

// The same with a as it lies and b in panels that are `depth` >= K rows deep.
static void multiply_panels(real *c, long c_row, Mat a, const real *b, long depth, int M, int N, int K, const real *start,
                            long start_row) {
    multiply_blocks(c, c_row, a, MR * a.row, b, NR, depth * NR, M, N, K, start, start_row);
}

// --- A few rows: what decoding does all the time
//
// Each number of b is used M times only, too few to pay for packing b; it is read as it lies, and
// memory should set the pace. How it is read depends on whether b's rows or its columns are contiguous.

enum { FEW = 16 };  // rows that are few, a multiple of VW

// If b's columns are contiguous and a has several rows, compute the transpose, c' = b' a': each
// number of b multiplies a vector, of VW rows of a. x holds a in panels of VW rows.
static void few_by_columns(real *c, long c_row, const real *x, Mat b, int M, int N, int K, const real *start,
                           long start_row) {
    for (int n = 0, cols; n < N; n += cols) {
        cols = N - n >= MR ? MR : N - n >= 4 ? 4 : 1;
        for (int m = 0; m < M; m += VW) {
            real t[MR * VW];  // (cols, VW)
            const real *pb = b.p + n * b.col, *px = x + (long)m * K;
            if (cols == MR) tile(MR, 1, K, pb, b.col, 1, px, VW, t, VW, NULL, 0);
            else if (cols == 4) tile(4, 1, K, pb, b.col, 1, px, VW, t, VW, NULL, 0);
            else tile(1, 1, K, pb, b.col, 1, px, VW, t, VW, NULL, 0);
            for (int i = m; i < min_int(m + VW, M); i++)
                for (int j = 0; j < cols; j++)
                    c[i * c_row + n + j] = (start ? start[i * start_row + n + j] : 0) + t[j * VW + i - m];
        }
    }
}

// The same for one row, x: dot products, eight at a time. They stand N/8 columns apart, so that
// memory delivers eight streams without gaps.
static void few_dots(real *c, const real *x, Mat b, int N, int K, const real *start) {
    int part = (N + 7) / 8;
    for (int j = 0; j < part; j++) {
        const real *y[8];  // some are computed twice at the end
        for (int n = 0; n < 8; n++) y[n] = b.p + min_int(j + n * part, N - 1) * b.col;
        const real *b0 = y[0], *b1 = y[1], *b2 = y[2], *b3 = y[3], *b4 = y[4], *b5 = y[5], *b6 = y[6], *b7 = y[7];
        real s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        #pragma omp simd reduction(+:s0, s1, s2, s3, s4, s5, s6, s7)
        for (int k = 0; k < K; k++) {
            s0 += x[k] * b0[k], s1 += x[k] * b1[k], s2 += x[k] * b2[k], s3 += x[k] * b3[k];
            s4 += x[k] * b4[k], s5 += x[k] * b5[k], s6 += x[k] * b6[k], s7 += x[k] * b7[k];
        }
        real sum[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
        for (int n = 0, at = j; n < 8 && at < N; n++, at += part) c[at] = (start ? start[at] : 0) + sum[n];
    }
}

// c (M, N) = start + a b for a few rows within one thread; a's numbers are adjacent within a row. b's
// columns are contiguous, or its rows. Rows NR apart are read as panels: a plain matrix of such rows
// has at most NR columns and is a single panel, which is the same.
static void matmul_few(real *c, long c_row, Mat a, Mat b, int M, int N, int K, const real *start, long start_row) {
    long panel = b.row == NR ? (long)K * NR : NR;
    if (b.col == 1) multiply_blocks(c, c_row, a, MR * a.row, b.p, b.row, panel, M, N, K, start, start_row);
    else if (M == 1) few_dots(c, a.p, b, N, K, start);
    else
        for (int m = 0; m < M; m += FEW)
            for (int k = 0; k < K; k += MC * KC / FEW) {
                int rows = min_int(FEW, M - m), kc = min_int(MC * KC / FEW, K - k);
                real *cm = c + m * c_row;
                pack(own_a, a.p + m * a.row + k, a.row, 1, rows, kc, VW);
                few_by_columns(cm, c_row, own_a, mat_from(b, k, 0), rows, N, kc,
                               k ? cm : start ? start + m * start_row : NULL, k ? c_row : start_row);
            }
}

// --- The product, by all threads
//
// c is cut into blocks. What a block needs in panels, its thread packs alone, or all threads pack together
// what all will read (`shared`), which saves copying, but they must wait for each other.
// b is packed, unless a has few rows and b's columns are contiguous. a is packed if its columns are contiguous, as in
// a weight's gradient:
//     c is small     (NC*NC/2 numbers at most) each packs both, for a block of c about square: it has
//                    the fewest rows + columns to pack
//     else           b is shared; each packs a for its rows
// If a is read where it lies:
//     many rows      (more than 4 MC for each thread) b is shared; a block has up to MC rows
//     else           each packs NR columns of b, for up to 8 MC rows: most of a shared b would
//                    come out of another processor's cache, to be used a few times only

// c (M, N) = start + a b by one thread, which packs b, NC/2 columns at most, and a too if its rows are not contiguous.
static void multiply_alone(real *c, long c_row, Mat a, Mat b, int M, int N, int K, const real *start, long start_row) {
    int packed = a.col != 1, height = packed ? MC : M;
    for (int k = 0; k < K; k += KC) {
        int kc = min_int(KC, K - k);
        pack(own_b, mat_from(b, k, 0).p, b.col, b.row, N, kc, NR);
        for (int i = 0; i < M; i += height) {
            int m = min_int(height, M - i);
            Mat rows = mat_from(a, i, k);
            real *pc = c + i * c_row;
            if (packed) pack(own_a, rows.p, a.row, a.col, m, kc, MR), rows = (Mat){own_a, 1, MR};
            multiply_blocks(pc, c_row, rows, MR * (packed ? kc : a.row), own_b, NR, (long)kc * NR, m, N, kc,
                            k ? pc : start ? start + i * start_row : NULL, k ? c_row : start_row);
        }
    }
}

// Which of n units of work a thread does next: one of its own, which are the same each time, or else one that another
// has not begun (a core may be late: on 16, waiting for it costs 10% of a step). n: none is left. taken[t] counts what
// has been taken of thread t's.
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

// c (M, N) = start + a b, with b in `shared`, up to NC columns of it at a time. A thread's rows of c are mostly the
// same: still in its cache when the next KC terms are added to them, and when the next operation reads them.
static void multiply_shared(real *c, long c_row, Mat a, Mat b, int M, int N, int K, const real *start, long start_row) {
    int threads = omp_get_max_threads(), packed = a.col != 1, taken[threads];
    int groups = threads * ((M - 1) / (threads * MC) + 1);  // of rows, about as many for each thread
    int height = ((M - 1) / groups / MR + 1) * MR, units = (M - 1) / height + 1;  // a unit: a group, in whole tiles
    #pragma omp parallel
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k = 0; k < K; k += KC) {
            int n = min_int(NC, N - j0), kc = min_int(KC, K - k);
            taken[omp_get_thread_num()] = 0;
            #pragma omp for
            for (int j = 0; j < n; j += NR)
                pack(shared + (long)j * kc, mat_from(b, k, j0 + j).p, b.col, b.row, min_int(NR, n - j), kc, NR);
            for (int u; (u = next_unit(taken, units)) < units;) {
                int i = u * height, m = min_int(height, M - i);
                Mat rows = mat_from(a, i, k);
                real *pc = c + i * c_row + j0;
                if (packed) pack(own_a, rows.p, a.row, a.col, m, kc, MR), rows = (Mat){own_a, 1, MR};
                multiply_blocks(pc, c_row, rows, MR * (packed ? kc : a.row), shared, NR, (long)kc * NR, m, n, kc,
                                k ? pc : start ? start + i * start_row + j0 : NULL, k ? c_row : start_row);
            }
            #pragma omp barrier
        }
}

// c (M, N) = start + a (M, K) b (K, N); c's rows are c_row apart. For start see tile.
static void matmul(real *c, long c_row, Mat a, Mat b, int M, int N, int K, const real *start, long start_row) {
    int threads = omp_get_max_threads(), packed = a.col != 1;
    if (M <= FEW && !packed && b.row == 1) {
        int columns = M == 1 ? 64 : ((N - 1) / threads / MR + 1) * MR;  // few_dots: eight streams of 8 columns
        #pragma omp parallel for
        for (int j = 0; j < N; j += columns)
            matmul_few(c + j, c_row, a, mat_from(b, 0, j), M, min_int(columns, N - j), K,
                       start ? start + j : NULL, start_row);
    } else if (packed ? (long)M * N <= NC * NC / 2 : M <= 4 * MC * threads) {
        // Groups of at most 8 MC rows, which the next panel still finds in the second-level cache (unless K is large);
        // more groups where panels are too few for all threads.
        int panels = (N - 1) / NR + 1, width = NR;
        int groups = max_int((M - 1) / (8 * MC) + 1, (2 * threads - 1) / panels + 1);
        if (packed) {
            int across = (N - 1) / (NC / 2) + 1;
            for (int n = across + 1; n <= threads; n++)  // a block for each thread, of the least rows + columns
                if (threads % n == 0 && M * n / threads + N / n < M * across / threads + N / across) across = n;
            groups = max_int(threads / across, 1), width = ((N - 1) / across / NR + 1) * NR;
        }
        int height = ((M - 1) / groups / MR + 1) * MR;
        #pragma omp parallel for collapse(2) schedule(dynamic)
        for (int i = 0; i < M; i += height)
            for (int j = 0; j < N; j += width)
                multiply_alone(c + i * c_row + j, c_row, mat_from(a, i, 0), mat_from(b, 0, j), min_int(height, M - i),
                               min_int(width, N - j), K, start ? start + i * start_row + j : NULL, start_row);
    } else
        multiply_shared(c, c_row, a, b, M, N, K, start, start_row);
}

// ==== 4  LAYERS =============================================================================
// Backwards ADD to the gradients of parameters, so that micro-batches accumulate. Where a sum over
// tokens is no matrix product (biases, norm weights), the tokens are cut into PIECES fixed pieces
// whose sums are then added in order: the result does not depend on the number of threads.

enum { PIECES = 32 };
// A loop over fewer numbers runs on one thread, since waking others takes longer.
enum { SMALL = 8192 };

// How many of a loop's n numbers each thread takes: one range, which after a shared product (chapter 3) is about
// the rows that it computed and still has in its cache. A multiple of 1024, so that where a vector loop ends, and
// with it the last bit of a result, does not depend on the number of threads.
static inline long range_of_thread(long n) { return ((n - 1) / omp_get_max_threads() / 1024 + 1) * 1024; }

// out[i] += sum over pieces of partial[piece][i], i < n
static void add_pieces(real *out, const real *partial, long piece_row, int n) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        real sum = 0;
        for (int p = 0; p < PIECES; p++) sum += partial[p * piece_row + i];
        out[i] += sum;
    }
}

// --- Linear: y = x W' + b (8)                      y (N, O), x (N, I), W (O, I), b (O) or NULL

static void linear_forward(real *y, const real *x, const real *w, const real *b, int N, int I, int O) {
    matmul(y, O, rows_of(x, I), transposed(w, I), N, O, I, b, 0);
}

// dx = dy W; with `add`, dx += dy W
static void linear_backward_input(real *dx, const real *dy, const real *w, int N, int I, int O, int add) {
    matmul(dx, I, rows_of(dy, O), rows_of(w, I), N, I, O, add ? dx : NULL, I);
}

// dW += dy' x, db += sum of dy over tokens
static void linear_backward_weight(const Model *m, real *dw, real *db, const real *dy, const real *x,
                                   int N, int I, int O) {
    matmul(dw, I, transposed(dy, O), rows_of(x, I), O, I, N, dw, I);
    if (!db) return;
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        real *sum = m->partial + (long)p * O;
        memset(sum, 0, O * sizeof(real));
        for (long t = (long)N * p / PIECES; t < (long)N * (p + 1) / PIECES; t++)
            for (int i = 0; i < O; i++) sum[i] += dy[t * O + i];
    }
    add_pieces(db, m->partial, O, O);
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

// y (N, n) from x (N, n) whose rows are x_row apart; w, b (n).
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

// With x^ = (x - mean) rstd and g = w dy:
//   dx += rstd (g - mean(g) - x^ mean(g x^)) (3); RMSNorm lacks mean(g) (5)
//   dw += sum over tokens of dy x^, db += sum of dy
static void norm_backward(const Model *m, real *dx, real *dw, real *db, const real *dy,
                          const real *x, long x_row, const real *w, int N, int n, int kind) {
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        real *sum_w = m->partial + 2L * p * n, *sum_b = sum_w + n;
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
    if (dw) add_pieces(dw, m->partial, 2 * n, n);
    if (db) add_pieces(db, m->partial + n, 2 * n, n);
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

// The largest of n numbers. Sixteen running maxima, since compilers do not reorder a single one.
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

// x = e^(scale (x - max)), and their sum: the numerators and the denominator of a softmax.
static real exp_row(real *x, int n, real scale, real max) {
    real sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int i = 0; i < n; i++) {
        x[i] = fast_exp(scale * (x[i] - max));
        sum += x[i];
    }
    return sum;
}

// --- GELU, tanh form: x/2 (1 + tanh u) = x s(2u), u = sqrt(2/pi) (x + 0.044715 x^3), where
//     s(z) = 1 / (1 + e^-z), since 1 + tanh u = 2 s(2u) (6)

#define GELU_2U(x) ((real)1.5957691216057308 * ((x) + (real)0.044715 * (x) * (x) * (x)))

static void gelu_forward(real *y, const real *x, long n) {
    #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
    for (long i = 0; i < n; i++) y[i] = x[i] / (1 + fast_exp(-GELU_2U(x[i])));
}

// dx = dy (s + x s (1 - s) (2u)') (7), over dy in place. Overwrites x with y = gelu(x), which the forward
// did not keep and the gradient of c_proj's weight needs: one product more, since s is at hand.
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
static void residual_forward(const Model *m, real *y, const real *x, const real *branch, long n, int where) {
    if (!m->dropping) {
        #pragma omp parallel for simd schedule(static, range_of_thread(n)) if (parallel : n > SMALL)
        for (long i = 0; i < n; i++) y[i] = x[i] + branch[i];
    } else {
        #pragma omp parallel for schedule(static, range_of_thread(n))
        for (long i = 0; i < n; i++) y[i] = x[i] + branch[i] * dropout_scale(m, where, i);
    }
}

// The branch's gradient from that of the sum, dy; x's is dy itself. Without dropout, so is the
// branch's, and no copy is made.
static const real *residual_backward(const Model *m, real *d_branch, const real *dy, long n, int where) {
    if (!m->dropping) return dy;
    #pragma omp parallel for schedule(static, range_of_thread(n))
    for (long i = 0; i < n; i++) d_branch[i] = dy[i] * dropout_scale(m, where, i);
    return d_branch;
}

// --- Rotary embedding

// Numbers by token, head and place: number i of head h of token t is p[t*token + h*head + i]. A head
// stride of 0 means one for all heads.
typedef struct {
    real *p;
    long token, head;
} View;

static real *element(View x, long t, int h) { return x.p + t * x.token + h * x.head; }

// Turns the pair (i, i + RD/2) of every head by the angle t theta^(-2i/RD), t the token's
// position (17). The backward is the turn by the opposite angle (18): sign -1.
// x (N, heads, RD) at positions first .. first+T-1, N a multiple of T.
static void rotate(const Model *m, View x, int heads, int N, int T, int first, int sign) {
    int half = m->c.RD / 2;
    #pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const real *c = m->rope_cos + (long)(first + n % T) * half;
        const real *s = m->rope_sin + (long)(first + n % T) * half;
        for (int h = 0; h < heads; h++) {
            real *lo = element(x, n, h), *hi = lo + half;
            for (int i = 0; i < half; i++) {
                real a = lo[i], b = hi[i];
                lo[i] = a * c[i] - sign * b * s[i];
                hi[i] = b * c[i] + sign * a * s[i];
            }
        }
    }
}

// ==== 5  ATTENTION CORE =====================================================================
//
// One core serves every kind. A query head is [q_nope; q_rope], of which the second may be
// empty; query head h reads key/value head h / (NH/NKV); the rotary part of the keys is one
// for all heads:
//     score(i, j) = (q_nope_i . k_nope_j + q_rope_i . k_rope_j) / sqrt(HS),   j <= i       (11)
//     p_ij = e^(score_ij - lse_i), lse_i = log sum_j e^score_ij                            (12)
//     out_i = sum_j p_ij v_j                                                               (13)
// MHA, GQA, MQA and MLA differ only in where these views point.
//
// The T x T matrix of probabilities is never kept. The core works on a strip at a time, STRIP
// queries against all keys they may see, small enough for the second-level cache; what the
// backward needs of it is one number per query, lse, from which it makes p again.

// Queries handled at once; queries in a thread's piece of work, whose strips share the packed keys.
enum { STRIP = MC, BLOCK = 4 * STRIP };

typedef struct {
    int heads, kv_heads;     // NH, NKV
    int nope, rope, value;   // widths of q_nope, q_rope and v
    View q, k, k_rope, v;    // q (N, NH, nope+rope), k (N, NKV, nope), k_rope (N, 1, rope), v (N, NKV, value)
    // decoding: from one sequence's cache to the next; whether keys are in panels of NR (chapter 3);
    // W_UKV (NH, nope+value, R) if k views latents, of which keys and values are yet to be made
    long k_sequence, k_rope_sequence, v_sequence;
    int panels;
    const real *decompress;
} Heads;

// The matrix whose rows are the tokens from t on, of head h.
static Mat tokens_of(View x, long t, int h) { return rows_of(element(x, t, h), x.token); }

// Where a thread works. Widths: K = nope + rope, V = value.
typedef struct {
    real *p, *ds;              // (STRIP, row) scores, then what softmax makes of them; their gradient
    long row;                  // at least T in whole vectors; no multiple of 32, so that a column spreads over all of a cache
    real *keys, *dk;           // (T, K) each key's two parts joined; their gradient
    real *kt, *vt;             // k' (K, T), v' (V, T) in panels of NR tokens
    real *k, *v, *q, *d_out;   // (T, K), (T, V), (STRIP, K), (STRIP, V) in panels of NR columns
} Room;

static Room place_room(Arena *arena, int K, int V, int T) {
    size_t t = (T + NR - 1) / NR * NR, k = (K + NR - 1) / NR * NR, v = (V + NR - 1) / NR * NR;
    Room r = {.row = t / 32 * 32 + 48};
    r.p = take(arena, STRIP * r.row), r.ds = take(arena, STRIP * r.row);
    r.keys = take(arena, T * K), r.dk = take(arena, T * K);
    r.kt = take(arena, K * t), r.vt = take(arena, V * t);
    r.k = take(arena, T * k), r.v = take(arena, T * v), r.q = take(arena, STRIP * k), r.d_out = take(arena, STRIP * v);
    return r;
}

static Room room_of_thread(const Model *m, const Heads *a, int T) {
    Arena arena = {.base = m->rooms + omp_get_thread_num() * m->room_size};
    return place_room(&arena, a->nope + a->rope, a->value, T);
}

// The keys of T tokens, each [k_nope; k_rope] as queries are, into r->keys and r->kt.
static void join_keys(Room *r, const Heads *a, long first, int g, int T) {
    int K = a->nope + a->rope;
    for (int t = 0; t < T; t++) {
        memcpy(r->keys + t * K, element(a->k, first + t, g), a->nope * sizeof(real));
        memcpy(r->keys + t * K + a->nope, element(a->k_rope, first + t, g), a->rope * sizeof(real));
    }
    pack(r->kt, r->keys, K, 1, T, K, NR);
}

// n, rounded up to whole vectors: a loop's last few numbers, one by one, would take longer than a vector does.
static int whole_vectors(int n) { return (n + VW - 1) / VW * VW; }

// out (N, NH, value), lse (N, NH): B sequences of T tokens each
static void attention_forward(const Model *m, const Heads *a, View out, real *lse, int B, int T) {
    real scale = 1 / (real)sqrt(m->c.HS);
    int K = a->nope + a->rope, V = a->value;
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < a->heads; h++)
            for (int i1 = 0; i1 < T; i1 += BLOCK) {
                int g = h / (a->heads / a->kv_heads), end = min_int(T, i1 + BLOCK);
                long first = (long)b * T;  // the sequence's first token
                Room r = room_of_thread(m, a, T);
                join_keys(&r, a, first, g, end);
                pack(r.v, element(a->v, first, g), 1, a->v.token, V, end, NR);
                for (int i0 = i1; i0 < end; i0 += STRIP) {
                    int rows = min_int(STRIP, end - i0), keys = i0 + rows;
                    real sums[STRIP];
                    multiply_panels(r.p, r.row, tokens_of(a->q, first + i0, h), r.kt, K, rows, keys, K, NULL, 0);
                    for (int i = 0; i < rows; i++) {
                        int seen = i0 + i + 1, whole = whole_vectors(seen);  // keys 0 .. i0+i
                        real *pi = r.p + i * r.row;
                        for (int j = seen; j < whole; j++) pi[j] = -INFINITY;  // e^-60, nothing beside the largest, e^0
                        real max = largest(pi, whole);
                        sums[i] = exp_row(pi, whole, scale, max);
                        for (int j = seen; j < keys; j++) pi[j] = 0;
                        lse[(first + i0 + i) * a->heads + h] = scale * max + (real)log(sums[i]);
                    }
                    multiply_panels(element(out, first + i0, h), out.token, rows_of(r.p, r.row), r.v, end, rows, V, keys,
                                    NULL, 0);
                    for (int i = 0; i < rows; i++)
                        for (int e = 0; e < V; e++) element(out, first + i0 + i, h)[e] *= 1 / sums[i];
                }
            }
}

// From d_out, with p made again from lse, strip by strip (14):
//     dv_j  = sum_i p_ij d_out_i                    dp_ij = d_out_i . v_j
//     ds_ij = p_ij (dp_ij - D_i) / sqrt(HS),        D_i = sum_j p_ij dp_ij = d_out_i . out_i
//     (ds is the gradient of the dot product q_i . k_j, before its scaling)
//     dq_i  = sum_j ds_ij k_j                       dk_j  = sum_i ds_ij q_i
// d holds views of the gradients, which are overwritten. A thread owns a key/value head with all
// its query heads, so d->k_rope has a row per key/value head: (N, NKV, rope).
static void attention_backward(const Model *m, const Heads *a, const Heads *d, View out, View d_out,
                               const real *lse, int B, int T) {
    real scale = 1 / (real)sqrt(m->c.HS);
    int group = a->heads / a->kv_heads, K = a->nope + a->rope, V = a->value;
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int g = 0; g < a->kv_heads; g++) {
            long first = (long)b * T;  // the sequence's first token
            Room r = room_of_thread(m, a, T);
            real *dv = element(d->v, first, g);
            join_keys(&r, a, first, g, T);
            pack(r.k, r.keys, 1, K, K, T, NR);
            pack(r.vt, element(a->v, first, g), a->v.token, 1, T, V, NR);
            memset(r.dk, 0, sizeof(real) * T * K);
            for (int t = 0; t < T; t++) memset(dv + t * d->v.token, 0, V * sizeof(real));
            for (int h = g * group; h < (g + 1) * group; h++)
                for (int i0 = 0; i0 < T; i0 += STRIP) {
                    int rows = min_int(STRIP, T - i0), keys = i0 + rows;
                    long q0 = first + i0;
                    multiply_panels(r.p, r.row, tokens_of(a->q, q0, h), r.kt, K, rows, keys, K, NULL, 0);
                    multiply_panels(r.ds, r.row, tokens_of(d_out, q0, h), r.vt, V, rows, keys, V, NULL, 0);
                    for (int i = 0; i < rows; i++) {
                        real *pi = r.p + i * r.row, *dsi = r.ds + i * r.row, D = 0;
                        const real *o = element(out, q0 + i, h), *d_o = element(d_out, q0 + i, h);
                        real li = lse[(q0 + i) * a->heads + h];
                        int seen = i0 + i + 1;
                        #pragma omp simd reduction(+:D)
                        for (int e = 0; e < V; e++) D += o[e] * d_o[e];
                        #pragma omp simd
                        for (int j = 0; j < whole_vectors(seen); j++) {
                            pi[j] = fast_exp(scale * pi[j] - li);
                            dsi[j] = scale * pi[j] * (dsi[j] - D);
                        }
                        for (int j = seen; j < keys; j++) pi[j] = dsi[j] = 0;
                    }
                    pack(r.q, element(a->q, q0, h), 1, a->q.token, K, rows, NR);
                    pack(r.d_out, element(d_out, q0, h), 1, d_out.token, V, rows, NR);
                    multiply_panels(dv, d->v.token, transposed(r.p, r.row), r.d_out, rows, keys, V, rows, dv, d->v.token);
                    multiply_panels(element(d->q, q0, h), d->q.token, rows_of(r.ds, r.row), r.k, T, rows, K, keys, NULL, 0);
                    multiply_panels(r.dk, K, transposed(r.ds, r.row), r.q, rows, keys, K, rows, r.dk, K);
                }
            for (int t = 0; t < T; t++) {
                memcpy(element(d->k, first + t, g), r.dk + t * K, a->nope * sizeof(real));
                memcpy(element(d->k_rope, first + t, g), r.dk + t * K + a->nope, a->rope * sizeof(real));
            }
        }
}

// --- One query
//
// Decoding asks for one query per sequence, against `keys` keys in a cache. There is nothing to
// reuse but the group of query heads that share a key/value head: its `group` queries are the rows
// of the products here. Keys are cut into chunks, the unit of work, so that even a single sequence
// with a single key/value head keeps all threads busy. A chunk's softmax is relative to its own
// maximum; the chunks are then weighted by e^(their maximum - the largest):
//     out = sum_c w_c o_c / sum_c w_c s_c,   w_c = e^(max_c - max), s_c: the chunk's own sum

enum { CHUNK = 256 };  // keys to a chunk, a multiple of NR

// What becomes of the chunks: (B, NH, chunks, value+2), for each head o_c, max_c, s_c.
static real *part_of_chunk(const Model *m, int b, int h, int chunk, int chunks, int value) {
    return m->cache->parts + (((long)b * m->c.NH + h) * chunks + chunk) * (value + 2);
}

// q (B, NH, nope+rope), out (B, NH, value); k, k_rope, v view the cache of sequence 0. Keys in panels are
// as chapter 3 packs them: NR keys, number by number.
static void attention_decode(const Model *m, const Heads *a, View out, int B, int keys) {
    int group = a->heads / a->kv_heads, chunks = (keys + CHUNK - 1) / CHUNK, value = a->value;
    real scale = 1 / (real)sqrt(m->c.HS);
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int c = 0; c < chunks; c++)
            for (int g = 0; g < a->kv_heads; g++) {
                long first = (long)c * CHUNK, part_row = (long)chunks * (value + 2);
                int n = min_int(CHUNK, keys - first);
                real *part = part_of_chunk(m, b, g * group, c, chunks, value);              // (group, part_row)
                real *s = m->cache->scores + (long)omp_get_thread_num() * m->c.NH * CHUNK;  // (group, CHUNK)
                Mat q = rows_of(element(a->q, b, g * group), a->q.head), q_rope = rows_of(q.p + a->nope, a->q.head);
                const real *pk = element(a->k, first, g) + b * a->k_sequence;
                const real *pk_rope = element(a->k_rope, first, g) + b * a->k_rope_sequence;
                Mat k = a->panels ? rows_of(pk, NR) : transposed(pk, a->k.token), v;
                Mat k_rope = a->panels ? rows_of(pk_rope, NR) : transposed(pk_rope, a->k_rope.token);
                if (a->decompress) {  // (21), transposed: k' (nope, n) above v' (value, n)
                    int rows = a->nope + value, R = a->k.token;
                    real *kv = m->cache->kv + (long)omp_get_thread_num() * rows * CHUNK;
                    multiply_panels(kv, CHUNK, rows_of(a->decompress + (long)g * rows * R, R), pk, R, rows, n, R, NULL, 0);
                    k = rows_of(kv, CHUNK), v = transposed(kv + a->nope * CHUNK, CHUNK);
                } else v = rows_of(element(a->v, first, g) + b * a->v_sequence, a->v.token);
                matmul_few(s, CHUNK, q, k, group, n, a->nope, NULL, 0);
                if (a->rope) matmul_few(s, CHUNK, q_rope, k_rope, group, n, a->rope, s, CHUNK);
                for (int r = 0; r < group; r++) {
                    real *sr = s + r * CHUNK, *end = part + r * part_row + value;
                    end[0] = largest(sr, n);
                    end[1] = exp_row(sr, n, scale, end[0]);
                }
                matmul_few(part, part_row, rows_of(s, CHUNK), v, group, value, n, NULL, 0);
            }
    #pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < a->heads; h++) {
            const real *part = part_of_chunk(m, b, h, 0, chunks, value);
            real *o = element(out, b, h), max = part[value], sum = 0;
            for (int c = 1; c < chunks; c++) max = fmax(max, part[c * (value + 2) + value]);
            memset(o, 0, value * sizeof(real));
            for (int c = 0; c < chunks; c++, part += value + 2) {
                real w = fast_exp(scale * (part[value] - max));
                sum += w * part[value + 1];
                for (int e = 0; e < value; e++) o[e] += w * part[e];
            }
            for (int e = 0; e < value; e++) o[e] /= sum;
        }
}

// ==== 6  FRONT ENDS =========================================================================
//
// A front end makes q, k and v from the normed residual stream, m->norm (N, C), says where they
// lie (heads_of), and carries their gradients back to d_norm and its weights.

// [ATTENTION 2] Where queries, keys and values lie in `acts`, or their gradients in m->d.
static Heads heads_of(const Model *m, const Acts *acts) {
    const Config *c = &m->c;
    int HS = c->HS, NH = c->NH, NKV = c->NKV, NOPE = c->NOPE, rope = HS - NOPE;
    Heads a = {.heads = NH, .kv_heads = NKV, .nope = NOPE, .rope = rope, .value = HS};
    if (c->attention == MLA) {
        long q_row = NH * HS, kv_row = NH * (NOPE + HS), kv_a_row = c->R + rope;
        a.q = (View){acts->q, q_row, HS};
        a.k = (View){acts->kv, kv_row, NOPE + HS};
        a.v = (View){acts->kv + NOPE, kv_row, NOPE + HS};
        a.k_rope = (View){acts->kv_a + c->R, kv_a_row, 0};
    } else {
        int k = NH * HS, k_rope = k + NKV * NOPE, v = k_rope + rope, row = v + NKV * HS;
        a.q = (View){acts->qkv, row, HS};
        a.k = (View){acts->qkv + k, row, NOPE};
        a.k_rope = (View){acts->qkv + k_rope, row, 0};
        a.v = (View){acts->qkv + v, row, HS};
    }
    return a;
}

// Turns queries and keys to their positions, or (sign -1) their gradients back.
static void rope_heads(const Model *m, const Heads *a, int N, int T, int first, int sign) {
    const Config *c = &m->c;
    if (c->position == ROPE) {  // the whole of every head
        rotate(m, a->q, c->NH, N, T, first, sign);
        rotate(m, a->k, c->NKV, N, T, first, sign);
    } else if (c->position == DECOUPLED) {  // the last RD of a query head, the shared key
        rotate(m, (View){a->q.p + a->nope, a->q.token, a->q.head}, c->NH, N, T, first, sign);
        rotate(m, a->k_rope, 1, N, T, first, sign);
    }
}

// --- MHA, GQA, MQA: one matrix makes all (15, 16)

static void qkv_forward(Model *m, int l, Acts *acts, int N) {
    linear_forward(acts->qkv, m->norm, m->w[l][ATTN_W], m->w[l][ATTN_B], N, m->c.C, m->c.QKV);
}

static void qkv_backward(Model *m, int l, int N) {
    linear_backward_weight(m, m->g[l][ATTN_W], m->g[l][ATTN_B], m->d.qkv, m->norm, N, m->c.C, m->c.QKV);
    linear_backward_input(m->d_norm, m->d.qkv, m->w[l][ATTN_W], N, m->c.C, m->c.QKV, 0);
}

// --- MLA: queries and keys/values each pass through a narrow latent

// The normed latents, which the forward does not keep: latent (N, R), q_latent (N, RQ).
static void mla_latents(Model *m, int l, const Acts *acts, int N) {
    const Config *c = &m->c;
    real **w = m->w[l];
    norm_forward(m->latent, acts->kv_a, c->R + c->HS - c->NOPE, w[KVA_NORM_W], w[KVA_NORM_B], N, c->R, c->latent_norm);
    if (c->RQ) norm_forward(m->q_latent, acts->q_a, c->RQ, w[QA_NORM_W], w[QA_NORM_B], N, c->RQ, c->latent_norm);
}

// With `decompress` off, keys and values stay in their latents: decoding may not need them.
static void mla_forward(Model *m, int l, Acts *acts, int N, int decompress) {
    const Config *c = &m->c;
    real **w = m->w[l];
    int kv_a = c->R + c->HS - c->NOPE;
    linear_forward(acts->kv_a, m->norm, w[KVA_W], NULL, N, c->C, kv_a);                          // (20, 23)
    if (c->RQ) linear_forward(acts->q_a, m->norm, w[QA_W], NULL, N, c->C, c->RQ);                // (22)
    mla_latents(m, l, acts, N);
    if (decompress)                                                                              // (21)
        linear_forward(acts->kv, m->latent, w[KVB_W], NULL, N, c->R, c->NH * (c->NOPE + c->HS));
    if (c->RQ) linear_forward(acts->q, m->q_latent, w[QB_W], NULL, N, c->RQ, c->NH * c->HS);     // (22)
    else linear_forward(acts->q, m->norm, w[Q_W], NULL, N, c->C, c->NH * c->HS);
}

// The forward's lines in reverse, each a linear layer or a norm. The rotary columns of d.kv_a
// hold their gradient already; the latent's columns are set here.
static void mla_backward(Model *m, int l, const Acts *acts, int N) {
    const Config *c = &m->c;
    real **w = m->w[l], **g = m->g[l];
    int C = c->C, R = c->R, RQ = c->RQ, Q = c->NH * c->HS, KV = c->NH * (c->NOPE + c->HS);
    int kv_a = R + c->HS - c->NOPE;
    mla_latents(m, l, acts, N);
    linear_backward_weight(m, g[KVB_W], NULL, m->d.kv, m->latent, N, R, KV);
    linear_backward_input(m->d_latent, m->d.kv, w[KVB_W], N, R, KV, 0);
    for (long t = 0; t < N; t++) memset(m->d.kv_a + t * kv_a, 0, R * sizeof(real));
    norm_backward(m, m->d.kv_a, g[KVA_NORM_W], g[KVA_NORM_B], m->d_latent, acts->kv_a, kv_a, w[KVA_NORM_W], N, R,
                  c->latent_norm);
    linear_backward_weight(m, g[KVA_W], NULL, m->d.kv_a, m->norm, N, C, kv_a);
    linear_backward_input(m->d_norm, m->d.kv_a, w[KVA_W], N, C, kv_a, 0);
    if (RQ) {
        linear_backward_weight(m, g[QB_W], NULL, m->d.q, m->q_latent, N, RQ, Q);
        linear_backward_input(m->d_q_latent, m->d.q, w[QB_W], N, RQ, Q, 0);
        memset(m->d.q_a, 0, (size_t)N * RQ * sizeof(real));
        norm_backward(m, m->d.q_a, g[QA_NORM_W], g[QA_NORM_B], m->d_q_latent, acts->q_a, RQ, w[QA_NORM_W], N, RQ,
                      c->latent_norm);
        linear_backward_weight(m, g[QA_W], NULL, m->d.q_a, m->norm, N, C, RQ);
        linear_backward_input(m->d_norm, m->d.q_a, w[QA_W], N, C, RQ, 1);
    } else {
        linear_backward_weight(m, g[Q_W], NULL, m->d.q, m->norm, N, C, Q);
        linear_backward_input(m->d_norm, m->d.q, w[Q_W], N, C, Q, 1);
    }
}

// --- The cache: what decoding keeps of the tokens so far
//
// Per layer and sequence, CACHE_FULL keeps keys and values by head and the shared rotary key once:
// k (NKV, capacity, NOPE) and k_rope (capacity, rope) in panels of NR keys, so that a query meets NR keys
// with each multiply-add; v (NKV, capacity, HS) in rows. For mla, CACHE_LATENT has the normed latents,
// (capacity, R) in panels too, in the place of k and v. Keys and values are made of them at every step:
// MLA's memory at the price of NH*(NOPE+HS)*R multiply-adds per cached token, layer and step.
// CACHE_ABSORBED keeps a row per token, [normed latent; rotated key] (capacity, R+rope).

static Heads cache_heads(const Model *m, int l) {  // [ATTENTION 3] views of layer l's cache, full or latent
    const Config *c = &m->c;
    const Cache *cache = m->cache;
    int latent = cache->mode == CACHE_LATENT, k = latent ? c->R : c->NOPE, rope = c->HS - c->NOPE;
    long capacity = cache->capacity, keys = capacity * k * (latent ? 1 : c->NKV);
    long values = latent ? 0 : capacity * c->NKV * c->HS;
    real *base = cache->layers + l * cache->layer_size;
    return (Heads){.heads = c->NH, .kv_heads = c->NKV, .nope = c->NOPE, .rope = rope, .value = c->HS, .panels = 1,
                   .k = {base, k, latent ? 0 : capacity * k}, .k_sequence = keys,
                   .v = {base + cache->B * keys, c->HS, latent ? 0 : capacity * c->HS}, .v_sequence = values,
                   .k_rope = {base + cache->B * (keys + values), rope, 0}, .k_rope_sequence = capacity * rope,
                   .decompress = latent ? m->w[l][KVB_W] : NULL};
}

// Where the numbers of key `at`, n of them, stand among panels: NR apart.
static real *panel_place(real *panels, long at, int n) { return panels + at / NR * NR * n + at % NR; }

static void panel_put(real *panels, long at, const real *key, int n) {
    real *place = panel_place(panels, at, n);
    for (int i = 0; i < n; i++) place[(long)i * NR] = key[i];
}

// [ATTENTION 3] Appends T tokens of each sequence, from what the front end just made.
static void cache_append(Model *m, int l, const Acts *acts, int B, int T) {
    const Config *c = &m->c;
    Cache *cache = m->cache;
    Heads from = heads_of(m, acts);
    size_t R = c->R, rope = from.rope;
    #pragma omp parallel for collapse(2) if (B * T > 1)
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            long n = (long)b * T + t, at = cache->used + t;
            if (cache->mode == CACHE_ABSORBED) {
                real *row = cache->layers + l * cache->layer_size + ((long)b * cache->capacity + at) * (R + rope);
                memcpy(row, m->latent + n * R, R * sizeof(real));
                memcpy(row + R, element(from.k_rope, n, 0), rope * sizeof(real));
                continue;
            }
            Heads to = cache_heads(m, l);
            if (cache->mode == CACHE_LATENT) panel_put(to.k.p + b * to.k_sequence, at, m->latent + n * R, R);
            else
                for (int g = 0; g < c->NKV; g++) {
                    panel_put(element(to.k, 0, g) + b * to.k_sequence, at, element(from.k, n, g), c->NOPE);
                    memcpy(element(to.v, at, g) + b * to.v_sequence, element(from.v, n, g), c->HS * sizeof(real));
                }
            panel_put(to.k_rope.p + b * to.k_rope_sequence, at, element(from.k_rope, n, 0), rope);
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
// one value head, which is that row's first R numbers. Per head h, from kv_b_proj's rows:
//     W_UK (NOPE, R)   q_nope (B, NOPE) -> q_lat (B, R)
//     W_UV (HS, R)     o_lat (B, R)     -> out (B, HS)
static void decode_absorbed(Model *m, int l, const Acts *acts, View out, int B, int keys) {
    const Config *c = &m->c;
    int NH = c->NH, HS = c->HS, NOPE = c->NOPE, R = c->R, rope = HS - NOPE, row = R + rope;
    View q = {acts->q, NH * HS, HS}, q_lat = {m->cache->q_lat, NH * row, row}, o_lat = {m->cache->o_lat, NH * R, R};
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {
        const real *w_uk = m->w[l][KVB_W] + (long)h * (NOPE + HS) * R;
        matmul_few(element(q_lat, 0, h), q_lat.token, tokens_of(q, 0, h), rows_of(w_uk, R), B, R, NOPE, NULL, 0);
        for (int b = 0; b < B; b++) memcpy(element(q_lat, b, h) + R, element(q, b, h) + NOPE, rope * sizeof(real));
    }
    real *base = m->cache->layers + l * m->cache->layer_size;
    View latents = {base, row, 0};
    long sequence = m->cache->capacity * row;
    Heads mqa = {.heads = NH, .kv_heads = 1, .nope = row, .rope = 0, .value = R, .q = q_lat, .k = latents, .v = latents,
                 .k_rope = latents, .k_sequence = sequence, .v_sequence = sequence, .k_rope_sequence = sequence};
    attention_decode(m, &mqa, o_lat, B, keys);
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {
        const real *w_uv = m->w[l][KVB_W] + ((long)h * (NOPE + HS) + NOPE) * R;
        matmul_few(element(out, 0, h), out.token, tokens_of(o_lat, 0, h), transposed(w_uv, R), B, HS, R, NULL, 0);
    }
}

// --- What every kind shares: proj = c_proj(attention(norm))

// Without a cache, or with an empty one, tokens see the tokens of this pass; after that, one token
// per sequence sees all that are cached.
static void attention_block_forward(Model *m, int l, Acts *acts, int B, int T) {
    const Config *c = &m->c;
    int N = B * T, Q = c->NH * c->HS, first = m->cache ? m->cache->used : 0, mode = m->cache ? m->cache->mode : CACHE_FULL;
    if (c->attention == MLA) mla_forward(m, l, acts, N, first == 0 || mode == CACHE_FULL);  // [ATTENTION 2]
    else qkv_forward(m, l, acts, N);
    Heads a = heads_of(m, acts);
    View out = {acts->att, Q, c->HS};
    rope_heads(m, &a, N, T, first, 1);
    if (m->cache) cache_append(m, l, acts, B, T);
    if (first == 0) attention_forward(m, &a, out, acts->lse, B, T);
    else if (mode == CACHE_ABSORBED) decode_absorbed(m, l, acts, out, B, first + 1);
    else {
        Heads cached = cache_heads(m, l);
        cached.q = a.q;
        attention_decode(m, &cached, out, B, first + 1);
    }
    linear_forward(m->proj, acts->att, m->w[l][APROJ_W], m->w[l][APROJ_B], N, Q, c->C);
}

// From d_proj (N, C) to d_norm.
static void attention_block_backward(Model *m, int l, Acts *acts, const real *d_proj, int B, int T) {
    const Config *c = &m->c;
    int N = B * T, Q = c->NH * c->HS, rope = c->HS - c->NOPE;
    linear_backward_weight(m, m->g[l][APROJ_W], m->g[l][APROJ_B], d_proj, acts->att, N, Q, c->C);
    linear_backward_input(m->d.att, d_proj, m->w[l][APROJ_W], N, Q, c->C, 0);

    Heads a = heads_of(m, acts), d = heads_of(m, &m->d), d_by_head = d;
    d_by_head.k_rope = (View){m->d_k_rope, c->NKV * rope, rope};
    attention_backward(m, &a, &d_by_head, (View){acts->att, Q, c->HS}, (View){m->d.att, Q, c->HS}, acts->lse, B, T);
    #pragma omp parallel for
    for (int t = 0; t < N; t++)  // the rotary key is one for all heads: its gradient is their sum
        for (int i = 0; i < rope; i++) {
            real sum = 0;
            for (int g = 0; g < c->NKV; g++) sum += element(d_by_head.k_rope, t, g)[i];
            element(d.k_rope, t, 0)[i] = sum;
        }
    rope_heads(m, &d, N, T, 0, -1);
    if (c->attention == MLA) mla_backward(m, l, acts, N);  // [ATTENTION 2]
    else qkv_backward(m, l, N);
}

// ==== 7  THE NETWORK ========================================================================

// [ATTENTION 1]
static void place_acts(Model *m, Arena *arena, int T, int training) {
    const Config *c = &m->c;
    size_t N = m->max_N, C = c->C, Q = c->NH * c->HS, rope = c->HS - c->NOPE;
    size_t KV = c->R ? c->NH * (c->NOPE + c->HS) : 0, KV_A = c->R ? c->R + rope : 0;
    int layers = training ? c->L : 1;
    for (int l = 0; l < layers + training; l++) {
        Acts *a = l < layers ? &m->acts[l] : &m->d;  // the gradients' set comes last
        a->x = take(arena, N * C);
        size_t attention = arena->used;
        a->qkv = take(arena, N * c->QKV);
        a->q_a = take(arena, N * c->RQ);
        a->q = take(arena, c->R ? N * Q : 0);
        a->kv_a = take(arena, N * KV_A);
        a->kv = take(arena, N * KV);
        a->att = take(arena, N * Q);
        size_t end = arena->used;  // what your attention keeps belongs above this line
        if (l == layers) arena->used = attention;  // gradients of attention and of the MLP never live together
        a->fc = take(arena, N * 4 * C);
        if (arena->used < end) arena->used = end;
        if (l == layers) break;
        a->lse = take(arena, N * c->NH);
        a->x_mid = take(arena, N * C);
    }
    m->x_final = take(arena, N * C);
    m->norm = take(arena, N * C);
    m->latent = take(arena, N * c->R);
    m->q_latent = take(arena, N * c->RQ);
    m->gelu = training ? m->d.fc : take(arena, N * 4 * C);  // a forward has no use for gradients' room
    m->proj = take(arena, N * C);
    m->logits = take(arena, (size_t)m->head_rows * c->V);
    m->row_loss = take(arena, m->head_rows);
    Arena room = {0};
    place_room(&room, c->HS, c->HS, T);  // the widths of a key and of a value
    m->room_size = room.used;
    m->rooms = take(arena, omp_get_max_threads() * m->room_size);
    if (!training) return;
    m->d_norm = take(arena, N * C);
    m->d_latent = take(arena, N * c->R);
    m->d_q_latent = take(arena, N * c->RQ);
    m->d_k_rope = take(arena, N * c->NKV * rope);
    m->partial = take(arena, (size_t)PIECES * 4 * C);  // the widest bias, c_fc's [ATTENTION 1]
}

// Memory for the activations of up to B sequences of T tokens.
static void model_reserve(Model *m, int B, int T, int training) {
    // A limit under which tokens, and tokens times any width, fit an int. [ATTENTION 1]
    long widest = max_int(4 * m->c.C, max_int(m->c.QKV, m->c.R ? m->c.NH * (m->c.NOPE + m->c.HS) : 0));
    if ((long)B * T > INT_MAX / widest)
        fail(1, "a batch of %d x %d tokens: expected at most %ld tokens for this model", B, T, INT_MAX / widest);
    m->max_N = B * T;
    // 4 MB of logits, but at least 256 rows and, for decoding, B
    m->head_rows = min_int(m->max_N, max_int(max_int(B, 256), (1 << 20) / m->c.V));
    m->acts = allocate(sizeof(Acts) * (training ? m->c.L : 1), "activations");
    Arena arena = {0};
    place_acts(m, &arena, T, training);
    arena_allocate(&arena, "activations");
    place_acts(m, &arena, T, training);
    m->act_memory = arena.base;
}

static void model_free(Model *m) {
    free(m->tensors), free(m->w), free(m->g), free(m->memory), free(m->acts), free(m->act_memory);
    free(m);
}

// --- Embedding: x = dropout(wte[token] + wpe[position])          dropout's place 0

static void embedding_forward(Model *m, real *x, const int *tokens, int N, int T, int first) {
    int C = m->c.C;
    const real *wte = m->w[0][WTE], *wpe = m->w[0][WPE];
    #pragma omp parallel for if (N > 1)
    for (long n = 0; n < N; n++)
        for (int i = 0; i < C; i++) {
            real sum = wte[(long)tokens[n] * C + i] + (wpe ? wpe[(first + n % T) * C + i] : 0);
            x[n * C + i] = m->dropping ? sum * dropout_scale(m, 0, n * C + i) : sum;
        }
}

// dwte[token] += dx, dwpe[position] += dx. Tokens repeat, so threads share out the columns.
static void embedding_backward(Model *m, const int *tokens, int N, int T) {
    enum { OWN = 16 };  // columns to a thread's piece
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

// d.x goes in as the gradient of y and comes out as that of x. Along the residual stream it just
// passes; each branch adds its own. Norm outputs were not kept: each is made again first.
static void block_backward(Model *m, int l, Acts *acts, int B, int T) {
    real **w = m->w[l], **g = m->g[l];
    int N = B * T, C = m->c.C;
    norm_forward(m->norm, acts->x_mid, C, w[LN2_W], w[LN2_B], N, C, LAYERNORM);
    const real *d_proj = residual_backward(m, m->proj, m->d.x, (long)N * C, 2 * l + 2);
    linear_backward_input(m->d.fc, d_proj, w[MPROJ_W], N, 4 * C, C, 0);
    gelu_backward(m->d.fc, acts->fc, (long)N * 4 * C);
    linear_backward_weight(m, g[MPROJ_W], g[MPROJ_B], d_proj, acts->fc, N, 4 * C, C);
    linear_backward_weight(m, g[FC_W], g[FC_B], m->d.fc, m->norm, N, C, 4 * C);
    linear_backward_input(m->d_norm, m->d.fc, w[FC_W], N, C, 4 * C, 0);
    norm_backward(m, m->d.x, g[LN2_W], g[LN2_B], m->d_norm, acts->x_mid, C, w[LN2_W], N, C, LAYERNORM);

    norm_forward(m->norm, acts->x, C, w[LN1_W], w[LN1_B], N, C, LAYERNORM);
    d_proj = residual_backward(m, m->proj, m->d.x, (long)N * C, 2 * l + 1);
    attention_block_backward(m, l, acts, d_proj, B, T);
    norm_backward(m, m->d.x, g[LN1_W], g[LN1_B], m->d_norm, acts->x, C, w[LN1_W], N, C, LAYERNORM);
}

// The final residual stream x_final (N, C) of B sequences of T tokens. When training, each
// layer keeps its own acts; else all use the same, and the stream goes round in its x. With a
// cache, the tokens continue those that it holds.
static void forward(Model *m, const int *tokens, int B, int T, int training) {
    m->dropping = training && m->dropout > 0;
    embedding_forward(m, m->acts[0].x, tokens, B * T, T, m->cache ? m->cache->used : 0);
    for (int l = 0; l < m->c.L; l++) {
        Acts *acts = &m->acts[training ? l : 0];
        real *y = l == m->c.L - 1 ? m->x_final : training ? m->acts[l + 1].x : acts->x;
        block_forward(m, l, acts, y, B, T);
    }
    if (m->cache) m->cache->used += T;
}

// --- Head and loss: logits = LN(x_final) wte', loss = -log softmax(logits)[target] (9),
//     d_logits = (softmax(logits) - onehot(target)) d_loss (10)

// logits (rows, V) from `rows` normed rows x (rows, C)
static void head_forward(Model *m, real *logits, const real *x, int rows) {
    linear_forward(logits, x, m->w[0][WTE], NULL, rows, m->c.C, m->c.V);
}

// The sum of the losses of N tokens. With d_loss != 0, the gradient of d_loss times that sum is
// added to wte and ln_f, and d.x is set. Logits exist for head_rows tokens at a time: their
// gradient is taken where they stand, and all of them, (N, V), are never in memory.
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
        linear_backward_weight(m, g[WTE], NULL, m->logits, x, rows, C, V);
        linear_backward_input(m->d_norm + (long)r0 * C, m->logits, w[WTE], rows, C, V, 0);
    }
    if (d_loss != 0) {
        memset(m->d.x, 0, (size_t)N * C * sizeof(real));
        norm_backward(m, m->d.x, g[LNF_W], g[LNF_B], m->d_norm, m->x_final, C, w[LNF_W], N, C, LAYERNORM);
    }
    return total;
}

// Mean loss over B*T targets; adds the gradient of that mean times `share` (1/micro-batches).
static double forward_backward(Model *m, const int *tokens, const int *targets, int B, int T, double share) {
    forward(m, tokens, B, T, 1);
    double loss = head_loss(m, targets, B * T, share / (B * T)) / (B * T);
    for (int l = m->c.L - 1; l >= 0; l--) block_backward(m, l, &m->acts[l], B, T);
    embedding_backward(m, tokens, B * T, T);
    return loss;
}

// The same loss alone, summed over the targets.
static double forward_loss(Model *m, const int *tokens, const int *targets, int B, int T) {
    forward(m, tokens, B, T, 0);
    return head_loss(m, targets, B * T, 0);
}

// ==== 8  OPTIMIZER ==========================================================================

// The Euclidean norm of all gradients together (28).
static double gradient_norm(const Model *m) {
    double sums[PIECES], total = 0;
    const real *g = m->grads;  // a copy: read through m in the loop, it would keep compilers from vectors
    #pragma omp parallel for
    for (int p = 0; p < PIECES; p++) {
        size_t from = m->block * p / PIECES, to = m->block * (p + 1) / PIECES;
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (size_t k = from; k < to; k++) sum += (double)g[k] * g[k];
        sums[p] = sum;
    }
    for (int p = 0; p < PIECES; p++) total += sums[p];
    return sqrt(total);
}

// What to multiply gradients by so that their norm is at most `limit`; 0: no limit (28).
static double clip_scale(double norm, double limit) { return limit > 0 && norm > limit ? limit / norm : 1; }

typedef struct {
    double beta1, beta2, eps, weight_decay;
} AdamW;

// AdamW (27), step counted from 1. Gradients are multiplied by grad_scale (clipping) and set to
// zero for the next step. Decay touches matrices only, and is apart from the gradient:
//     m = b1 m + (1-b1) g      v = b2 v + (1-b2) g^2
//     w = w (1 - lr decay) - lr (m / (1-b1^step)) / (sqrt(v / (1-b2^step)) + eps)
static void adamw_update(Model *m, const AdamW *o, double learning_rate, long step, double grad_scale) {
    real b1 = o->beta1, b2 = o->beta2, one_b1 = 1 - o->beta1, one_b2 = 1 - o->beta2;  // 1 - beta2 is small: in double
    real eps = o->eps, scale = grad_scale, lr = learning_rate;
    real correct1 = 1 / (1 - pow(o->beta1, step)), correct2 = 1 / (1 - pow(o->beta2, step));
    for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        real *w = m->params + t->offset, *dw = m->grads + t->offset;
        real *am = m->adam_m + t->offset, *av = m->adam_v + t->offset;
        real keep = t->cols ? 1 - learning_rate * o->weight_decay : 1;
        #pragma omp parallel for simd schedule(static, range_of_thread(t->size)) if (parallel : t->size > SMALL)
        for (size_t k = 0; k < t->size; k++) {
            real g = dw[k] * scale;
            am[k] = b1 * am[k] + one_b1 * g;
            av[k] = b2 * av[k] + one_b2 * g * g;
            w[k] = w[k] * keep - lr * (am[k] * correct1) / ((real)sqrt(av[k] * correct2) + eps);
            dw[k] = 0;
        }
    }
}

enum { COSINE, CONSTANT };
static const char *const schedule_names[] = {"cosine", "constant", NULL};

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

// ==== 9  DATA ===============================================================================
// Files are little-endian, as are the machines this runs on.

static FILE *open_regular(const char *path, size_t *size) {
    struct stat st;
    int found = !stat(path, &st);  // opening a pipe would wait for its writer
    if (found && !S_ISREG(st.st_mode))
        fail(1, "%s: found a %s, expected a regular file", path, S_ISDIR(st.st_mode) ? "folder" : "pipe or device");
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

// --- Tokens: llm.c's format (256 int32: 20240520, 1, count; then uint16 tokens), or plain text,
//     whose bytes are the tokens

typedef struct {
    const char *path;
    uint16_t *tokens;
    long n;
    int largest, text;  // the largest token; whether tokens are a text's bytes
} Data;

static Data data_load(const char *path) {
    enum { HEADER = 1024, MAGIC = 20240520 };
    Data d = {.path = path};
    size_t size;
    unsigned char *bytes = read_file(path, &size);
    int32_t header[3] = {0};
    memcpy(header, bytes, size < sizeof header ? size : sizeof header);
    if (header[0] == MAGIC) {
        if (size < HEADER) fail(1, "%s: %zu bytes, expected a header of %d: the file is cut short", path, size, HEADER);
        if (header[1] != 1) fail(1, "%s: token file version %d, expected 1", path, header[1]);
        if (header[2] < 0 || (size - HEADER) != 2 * (size_t)header[2])
            fail(1, "%s: %zu bytes follow the header, expected %lld for its count of %d tokens", path, size - HEADER,
                 2LL * header[2], header[2]);
        d.n = header[2];
        d.tokens = allocate(size - HEADER, path);
        memcpy(d.tokens, bytes + HEADER, size - HEADER);
    } else {
        unsigned char *zero = memchr(bytes, 0, size);
        if (zero)
            fail(1, "%s: neither tokens (first number %d, expected %d) nor text (a zero byte at offset %ld)", path,
                 header[0], MAGIC, (long)(zero - bytes));
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

typedef struct {
    int V, eot;             // eot: the token that samples start from
    unsigned char *bytes;   // those of token t are bytes[start[t]] .. bytes[start[t+1] - 1]
    size_t *start;
    int *table, mask;       // hash table from bytes to token, -1: empty; its size less one
} Tokenizer;

static int token_length(const Tokenizer *t, int token) { return t->start[token + 1] - t->start[token]; }

// Where the table has the token with these bytes, or the free place where it belongs.
static int *tokenizer_place(const Tokenizer *t, const unsigned char *bytes, int n) {
    for (uint32_t i = hash_bytes(bytes, n) & t->mask;; i = (i + 1) & t->mask) {
        int token = t->table[i];
        if (token == -1 || (token_length(t, token) == n && !memcmp(t->bytes + t->start[token], bytes, n))) return &t->table[i];
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
        int n = token_length(t, i), *place = tokenizer_place(t, t->bytes + t->start[i], n);
        if (*place == -1 && n && (i != t->eot || n == 1)) *place = i;
    }
}

static Tokenizer tokenizer_bytes(void) {
    Tokenizer t = {.V = 256, .eot = '\n', .bytes = allocate(256, "tokenizer")};
    t.start = allocate(257 * sizeof(size_t), "tokenizer");
    for (int i = 0; i < 256; i++) t.bytes[i] = i, t.start[i + 1] = i + 1;
    tokenizer_index(&t);
    return t;
}

static Tokenizer tokenizer_load(const char *path) {
    enum { HEADER = 1024, MAGIC = 20240328, GPT2_EOT = 50256 };
    size_t size, at = HEADER;
    Tokenizer t = {.bytes = read_file(path, &size)};
    uint32_t header[4] = {0};
    memcpy(header, t.bytes, size < sizeof header ? size : sizeof header);
    if (size < HEADER) fail(1, "%s: %zu bytes, expected a tokenizer, whose header alone has %d", path, size, HEADER);
    if (header[0] != MAGIC) fail(1, "%s: first number %u, expected a tokenizer's %d", path, header[0], MAGIC);
    if (header[1] != 1 && header[1] != 2) fail(1, "%s: tokenizer version %u, expected 1 or 2", path, header[1]);
    if (header[2] < 1 || header[2] > 65536) fail(1, "%s: vocabulary of %u, expected 1 to 65536", path, header[2]);
    t.V = header[2];
    t.eot = header[1] == 1 ? GPT2_EOT : (int)header[3];  // version 1 did not store it
    if (t.eot < 0 || t.eot >= t.V) fail(1, "%s: end-of-text token %u, expected less than %d", path, t.eot, t.V);
    t.start = allocate((t.V + 1) * sizeof(size_t), path);
    for (int i = 0; i < t.V; i++) {
        size_t length = at < size ? t.bytes[at] : 0;
        if (at >= size || at + 1 + length > size)
            fail(1, "%s: ends within token %d, expected %d tokens: the file is cut short", path, i, t.V);
        memmove(t.bytes + t.start[i], t.bytes + at + 1, length);  // never overtakes what it reads
        t.start[i + 1] = t.start[i] + length;
        at += 1 + length;
    }
    if (at != size) fail(1, "%s: %zu bytes after its last token", path, size - at);
    tokenizer_index(&t);
    return t;
}

static void tokenizer_free(Tokenizer *t) { free(t->bytes), free(t->start), free(t->table); }

// Writes a token's bytes, without control characters that could upset a terminal.
static void print_token(const Tokenizer *t, int token) {
    for (size_t i = t->start[token]; i < t->start[token + 1]; i++) {
        unsigned char c = t->bytes[i];
        if (c >= 32 ? c != 127 : c == '\n' || c == '\t') putchar(c);
    }
}

// --- Encoding a text: byte-pair encoding, whose merges need no list of their own, since tokens are
//     numbered in the order in which their merges were learned: of all adjacent pairs whose joined
//     bytes are a token, the one with the lowest number merges first

enum { LETTER, DIGIT, SPACE, OTHER };

static int character_class(unsigned char c) {  // bytes beyond ASCII are taken for letters
    if (c >= 128 || ((c | 32) >= 'a' && (c | 32) <= 'z')) return LETTER;
    return c >= '0' && c <= '9' ? DIGIT : c == ' ' || (c >= '\t' && c <= '\r') ? SPACE : OTHER;
}

// The length of the first piece of a text of n bytes: tokens never cross from one piece to the next.
// GPT-2's rule: 's 't 're 've 'm 'll 'd; else a run of letters, of digits, or of other characters,
// with a space before it if there is one; else white space, which leaves its last character to a
// word that follows.
static long first_piece(const unsigned char *text, long n) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        long length = strlen(endings[i]);
        if (length <= n && !memcmp(text, endings[i], length)) return length;
    }
    long at = text[0] == ' ' && n > 1, end;
    int class = character_class(text[at]);
    if (class == SPACE) class = character_class(text[at = 0]);
    for (end = at; end < n && character_class(text[end]) == class; end++) {}
    return class == SPACE && end < n && end > 1 ? end - 1 : end;
}

// Tokens of a text of n bytes into out, which has room for n; returns how many.
static long encode(const Tokenizer *t, const unsigned char *text, long n, int *out) {
    long count = 0, longest = 0, length;
    for (long at = 0; at < n; at += length) if ((length = first_piece(text + at, n - at)) > longest) longest = length;
    // A piece is cut at start[0] = 0 < start[1] < ...; merged[i] is the token that parts i and i+1
    // would make, or V if none.
    int *start = allocate((2 * longest + 2) * sizeof(int), "prompt"), *merged = start + longest + 1;
    for (long at = 0; at < n; at += length) {
        const unsigned char *piece = text + at;
        int parts = length = first_piece(piece, n - at);
        for (int i = 0; i <= parts; i++) start[i] = i;
        for (int changed = 0, all = 1;; all = 0) {
            for (int i = all ? 0 : max_int(0, changed - 1); i < parts - 1 && (all || i <= changed); i++) {
                int token = *tokenizer_place(t, piece + start[i], start[i + 2] - start[i]);
                merged[i] = token == -1 ? t->V : token;
            }
            int best = 0;
            for (int i = 1; i < parts - 1; i++) if (merged[i] < merged[best]) best = i;
            if (parts < 2 || merged[best] == t->V) break;
            memmove(start + best + 1, start + best + 2, (parts - best - 1) * sizeof(int));
            memmove(merged + best, merged + best + 1, (parts - best - 2) * sizeof(int));
            parts--, changed = best;
        }
        for (int i = 0; i < parts; i++) {
            int token = *tokenizer_place(t, piece + start[i], start[i + 1] - start[i]);
            if (token == -1) fail(2, "--prompt: byte %d at place %ld is not in the vocabulary", piece[start[i]], at + start[i]);
            out[count++] = token;
        }
    }
    free(start);
    return count;
}

// --- Batches

enum { RANDOM, SEQUENTIAL };
static const char *const order_names[] = {"random", "sequential", NULL};

// Micro-batch number `index` of a run: tokens x (B, T) and the tokens that follow each, y (B, T).
// Sequential: consecutive pieces of B*T tokens, from the start again when the rest is too short
// (as llm.c). Random: every row starts anywhere. Both depend on nothing but seed and index.
static void next_batch(const Data *d, int order, uint64_t seed, long index, int *x, int *y, int B, int T) {
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

// ==== 10  CHECKPOINTS =======================================================================
// safetensors: 8 bytes length of the header, the header in JSON, then the tensors' raw data.
// {"__metadata__": {"key": "value", ...}, "name": {"dtype": "F32", "shape": [2, 3],
// "data_offsets": [from, to]}, ...}. A training checkpoint has the moments adam.m.* and adam.v.*
// beside the parameters and the run's state in the metadata; it opens as a model all the same.

// The configuration's keys in the metadata. One list serves writing and reading.
typedef struct {
    const char *key;
    size_t offset;              // of the int in Config
    const char *const *names;   // NULL: a number
} ConfigKey;

static const ConfigKey config_keys[] = {
    {"attention", offsetof(Config, attention), attention_names},
    {"position", offsetof(Config, position), position_names},
    {"n_layer", offsetof(Config, L), NULL},
    {"n_head", offsetof(Config, NH), NULL},
    {"n_kv_head", offsetof(Config, NKV), NULL},
    {"n_embd", offsetof(Config, C), NULL},
    {"block_size", offsetof(Config, block_size), NULL},
    {"vocab_size", offsetof(Config, V), NULL},
    {"q_rank", offsetof(Config, RQ), NULL},
    {"kv_rank", offsetof(Config, R), NULL},
    {"rope_dim", offsetof(Config, RD), NULL},
    {"latent_norm", offsetof(Config, latent_norm), norm_names},
};
enum { CONFIG_KEYS = sizeof config_keys / sizeof *config_keys };

// --- Writing

static const char *const part_prefix[] = {"", "adam.m.", "adam.v."};

static real *part_of(const Model *m, int part) { return part == 0 ? m->params : part == 1 ? m->adam_m : m->adam_v; }

static char *temporary_name(const char *path) {
    char *name = allocate(strlen(path) + 5, path);
    sprintf(name, "%s.tmp", path);
    return name;
}

// Fails unless `path` is free, empty, or a file of the right kind, with the text `like` at byte `at` (partial: or
// the beginning of one): nothing else is ever replaced.
static void check_replaceable(const char *path, const char *kind, const char *like, long at, int partial) {
    char found[64] = {0};
    struct stat st;
    if (stat(path, &st)) return;
    if (!S_ISREG(st.st_mode)) fail(1, "%s: exists and is no regular file; will not replace it", path);
    FILE *f = fopen(path, "rb");
    if (!f) fail(1, "%s: exists and cannot be read: %s; will not replace it", path, strerror(errno));
    size_t n = !fseek(f, at, SEEK_SET) ? fread(found, 1, strlen(like), f) : 0;
    if (st.st_size && (memcmp(found, like, n) || n < (partial ? 1 : strlen(like))))
        fail(1, "%s: exists and is no %s of this program; will not replace it", path, kind);
    fclose(f);
}

// Fails if a checkpoint could not be written to `path`: better before the training than after it.
static void check_checkpoint_writable(const char *path) {
    static const char like[] = "{\"__metadata__\":{\"format\":\"train_gpt2_mla\"";
    char *temporary = temporary_name(path);
    check_replaceable(path, "checkpoint", like, 8, 0);
    check_replaceable(temporary, "checkpoint", like, 8, 1);
    FILE *f = fopen(temporary, "wb");
    if (!f) fail(1, "%s: cannot write: %s", path, strerror(errno));
    fclose(f);
    unlink(temporary);
    free(temporary);
}

// Writes `path`.tmp and renames it when it is complete: a file that bears the name is whole.
// With settings, what a run needs to go on as if it had never stopped is written too: the moments, the steps
// done, and the options that shape the run, in words. Data and randomness follow from step and seed.
static void checkpoint_save(const Model *m, const char *path, long step, const char *settings) {
    char *temporary = temporary_name(path);
    FILE *f = fopen(temporary, "wb");
    if (!f) fail(1, "%s: cannot write: %s", temporary, strerror(errno));
    int parts = settings ? 3 : 1;
    size_t at = 0;
    uint64_t length = 0;
    fwrite(&length, 8, 1, f);  // known only after the header
    fprintf(f, "{\"__metadata__\":{\"format\":\"train_gpt2_mla\"");
    for (const ConfigKey *k = config_keys; k < config_keys + CONFIG_KEYS; k++) {
        int value = *(const int *)((const char *)&m->c + k->offset);
        if (k->names) fprintf(f, ",\"%s\":\"%s\"", k->key, k->names[value]);
        else fprintf(f, ",\"%s\":\"%d\"", k->key, value);
    }
    if (settings) fprintf(f, ",\"step\":\"%ld\",\"settings\":\"%s\"", step, settings);
    fprintf(f, "}");
    for (int part = 0; part < parts; part++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
            fprintf(f, ",\"%s%s\":{\"dtype\":\"F32\",\"shape\":[%d", part_prefix[part], t->name, t->rows);
            if (t->cols) fprintf(f, ",%d", t->cols);
            fprintf(f, "],\"data_offsets\":[%zu,%zu]}", at, at + 4 * t->size);
            at += 4 * t->size;
        }
    fprintf(f, "}");
    fprintf(f, "%*s", (int)(-ftell(f) & 7), "");  // so that the data is aligned
    length = ftell(f) - 8;
    int ok = !fseek(f, 0, SEEK_SET) && fwrite(&length, 8, 1, f) == 1 && !fseek(f, 0, SEEK_END);
    for (int part = 0; part < parts; part++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++)
            for (size_t k = 0; ok && k < t->size;) {
                float piece[4096];  // F32 in the file, whatever real is
                size_t n = t->size - k < 4096 ? t->size - k : 4096;
                for (size_t i = 0; i < n; i++) piece[i] = part_of(m, part)[t->offset + k + i];
                ok = fwrite(piece, 4, n, f) == n;
                k += n;
            }
    ok = ok && !ferror(f) && !fflush(f) && !fsync(fileno(f));
    int error = errno;
    if (fclose(f) || !ok || rename(temporary, path)) {
        if (ok) error = errno;
        unlink(temporary);
        fail(1, "%s: not written: %s (a file of that name is as it was)", path, strerror(error));
    }
    free(temporary);
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
    while (k->p < k->end && (*k->p == ' ' || *k->p == '\n' || *k->p == '\t' || *k->p == '\r')) k->p++;
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
        const char *escapes = "\"\\/bfnrtu", *found = ++k->p < k->end && *k->p ? strchr(escapes, *k->p) : NULL;
        if (!found) json_fail(k, "one of \"\\/bfnrtu after a backslash");
        *out++ = "\"\\/\b\f\n\r\t?"[found - escapes];  // no name of ours has a \u: '?' and its digits will do
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
            if (strcmp(dtype, "F32")) fail(1, "%s: %s has dtype %s, expected F32", k->path, e->name, dtype);
            has_dtype = 1;
        } else if (!strcmp(key, "shape")) {
            json_char(k, '[');
            has_shape = 1;
            if (json_peek(k) == ']') { k->p++; continue; }
            do {
                size_t n = json_number(k);
                if (e->dims < 2) e->shape[e->dims] = n;
                e->dims++;
                if (n && values > SIZE_MAX / 8 / n) fail(1, "%s: %s has a shape larger than any file", k->path, e->name);
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
    if (!has_shape || !has_offsets || !has_dtype) json_fail(k, "dtype, shape and data_offsets in each tensor");
    if (e->to < e->from || e->to - e->from != 4 * values)
        fail(1, "%s: %s has offsets %zu to %zu, expected %zu bytes for its shape", k->path, e->name, e->from, e->to, 4 * values);
}

static int entry_by_name(const void *a, const void *b) { return strcmp(((const Entry *)a)->name, ((const Entry *)b)->name); }
static int entry_by_place(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    return x->from != y->from ? (x->from > y->from) - (x->from < y->from) : (x->to > y->to) - (x->to < y->to);
}

// Opens a file, reads its header and checks that the tensors tile the data exactly.
static Checkpoint checkpoint_open(const char *path) {
    Checkpoint k = {.path = path};
    uint64_t length = 0;
    size_t size;
    k.f = open_regular(path, &size);
    if (size < 8 || fread(&length, 8, 1, k.f) != 1) fail(1, "%s: %zu bytes, expected a safetensors checkpoint", path, size);
    if (length > size - 8 || length > 100000000)
        fail(1, "%s: not a safetensors file, or cut short: its header claims %llu bytes, of a file of %zu", path,
             (unsigned long long)length, size);
    k.header = k.p = allocate(length + 1, path);
    k.end = k.header + length;
    k.data_start = 8 + length, k.data_size = size - k.data_start;
    if (fread(k.header, 1, length, k.f) != length) fail(1, "%s: cannot read its header", path);

    int room = 0, room_meta = 0;
    json_char(&k, '{');
    do {
        char *name = json_string(&k);
        json_char(&k, ':');
        if (!strcmp(name, "__metadata__")) {
            json_char(&k, '{');
            if (json_peek(&k) == '}') { k.p++; continue; }
            do {
                if (k.n_meta + 2 > room_meta && !(k.meta = realloc(k.meta, (room_meta = 2 * room_meta + 32) * sizeof *k.meta)))
                    fail(1, "%s: no memory for its metadata", path);
                k.meta[k.n_meta++] = json_string(&k);
                json_char(&k, ':');
                k.meta[k.n_meta++] = json_string(&k);
            } while (json_more(&k, '}'));
        } else {
            if (k.n == room && !(k.entries = realloc(k.entries, (room = 2 * room + 64) * sizeof *k.entries)))
                fail(1, "%s: no memory for its list of tensors", path);
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
            fail(1, "%s: %s starts at byte %zu of the data, expected %zu: tensors overlap or leave gaps", path,
                 k.entries[i].name, k.entries[i].from, at);
    if (at != k.data_size) fail(1, "%s: %zu bytes of data, expected %zu: cut short or over-long", path, k.data_size, at);
    qsort(k.entries, k.n, sizeof *k.entries, entry_by_name);
    for (int i = 1; i < k.n; i++)
        if (!strcmp(k.entries[i].name, k.entries[i - 1].name)) fail(1, "%s: two tensors named %s", path, k.entries[i].name);
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
    if (e->dims != (cols ? 2 : 1) || e->shape[0] != (size_t)rows || (cols && e->shape[1] != (size_t)cols)) {
        char expected[40];
        snprintf(expected, sizeof expected, cols ? "(%d, %d)" : "(%d)", rows, cols);
        fail(1, "%s: %s has %d dimensions, %zu by %zu; expected %s", k->path, name, e->dims, e->shape[0],
             e->dims > 1 ? e->shape[1] : 1, expected);
    }
    size_t size = (e->to - e->from) / 4;
    if (fseeko(k->f, k->data_start + e->from, SEEK_SET)) fail(1, "%s: cannot read %s", k->path, name);
    for (size_t i = 0; i < size;) {
        float piece[4096];
        size_t n = size - i < 4096 ? size - i : 4096;
        if (fread(piece, 4, n, k->f) != n) fail(1, "%s: cannot read %s", k->path, name);
        for (size_t j = 0; j < n; j++) {
            if (!isfinite(piece[j]))
                fail(1, "%s: %s holds %f at place %zu, expected finite numbers", k->path, name, piece[j], i + j);
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
        fail(1, "%s: its metadata's format is %s, expected train_gpt2_mla", k->path, format ? format : "missing");
    for (const ConfigKey *key = config_keys; key < config_keys + CONFIG_KEYS; key++) {
        const char *value = checkpoint_meta(k, key->key);
        char *end;
        long n = 0;
        if (!value) fail(1, "%s: its metadata has no %s", k->path, key->key);
        if (key->names) {
            while (key->names[n] && strcmp(key->names[n], value)) n++;
            if (!key->names[n]) fail(1, "%s: %s is %s, which this program does not know", k->path, key->key, value);
        } else {
            n = strtol(value, &end, 10);
            if (end == value || *end || n < 0 || n > 1 << 24)
                fail(1, "%s: %s is '%s', expected a whole number from 0 to %d", k->path, key->key, value, 1 << 24);
        }
        *(int *)((char *)&c + key->offset) = n;
    }
    if (c.L < 1 || c.NH < 1 || c.C < 1 || c.block_size < 1 || c.V < 1)
        fail(1, "%s: layers, heads, channels, block_size and vocab_size must be at least 1", k->path);
    if (c.L > k->n || c.C > 65536 || c.V > 65536 || 4.0 * c.C * (c.V + 8.0 * c.C * c.L) > k->data_size)
        fail(1, "%s: %d layers, %d channels and a vocabulary of %d, more than its data holds", k->path, c.L, c.C, c.V);
    config_complete(&c, 1, k->path);
    return c;
}

static int foreign(const char *name) { return !strncmp(name, "adam.", 5) || !strncmp(name, "ref.", 4); }

// The parameters, and with moments those too. Every tensor of the file must have its place in
// the model, but for those of an optimizer or of a test's reference.
static void checkpoint_read_model(const Checkpoint *k, Model *m, int moments) {
    char name[80];
    for (int part = 0; part < (moments ? 3 : 1); part++)
        for (Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
            snprintf(name, sizeof name, "%s%s", part_prefix[part], t->name);
            checkpoint_read(k, name, part_of(m, part) + t->offset, t->rows, t->cols);
        }
    for (int i = 0, known; i < k->n; i++) {
        known = foreign(k->entries[i].name);
        for (int j = 0; j < m->n_tensors && !known; j++) known = !strcmp(k->entries[i].name, m->tensors[j].name);
        if (!known) fail(1, "%s: tensor %s has no place in a model of its configuration", k->path, k->entries[i].name);
    }
}

// ==== 11  DECODING ==========================================================================

// [ATTENTION 3]
static void place_cache(const Model *m, Cache *cache, Arena *arena) {
    const Config *c = &m->c;
    size_t B = cache->B, NH = c->NH, chunks = (cache->capacity + CHUNK - 1) / CHUNK, threads = omp_get_max_threads();
    cache->layers = take(arena, cache->layer_size * c->L + NR);  // tiles may read past the last row
    cache->parts = take(arena, B * NH * chunks * (max_int(c->HS, c->R) + 2));
    cache->scores = take(arena, threads * NH * CHUNK);
    cache->q_lat = take(arena, cache->mode == CACHE_ABSORBED ? B * NH * (c->R + c->HS - c->NOPE) : 0);
    cache->o_lat = take(arena, cache->mode == CACHE_ABSORBED ? B * NH * c->R : 0);
    cache->kv = take(arena, cache->mode == CACHE_LATENT ? threads * (c->NOPE + c->HS) * CHUNK : 0);
}

// Everything that decoding B sequences of up to `capacity` tokens will need: no step allocates.
static Cache *cache_create(const Model *m, int mode, int B, int capacity) {
    Cache *cache = allocate(sizeof *cache, "cache");
    *cache = (Cache){.mode = mode, .B = B, .capacity = (capacity + NR - 1) / NR * NR};  // whole panels
    cache->layer_size = (size_t)cache_floats(&m->c, mode) / m->c.L * B * cache->capacity;
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

// Logits (B, V) of what follows the last of T more tokens of each sequence. With an empty cache T
// is free, the prompt's length; after that it is 1.
static real *decode(Model *m, const int *tokens, int B, int T) {
    int C = m->c.C;
    forward(m, tokens, B, T, 0);
    norm_forward(m->norm, m->x_final + (long)(T - 1) * C, (long)T * C, m->w[0][LNF_W], m->w[0][LNF_B], B, C, LAYERNORM);
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

typedef struct {
    double temperature;
    int top_k;
} Sampling;

// One token from the distribution softmax(logits / temperature) over the top_k likeliest (0: all);
// temperature 0 takes the likeliest. u in (0, 1] decides. Overwrites logits; scratch (V).
static int sample_token(real *logits, real *scratch, int V, const Sampling *how, double u) {
    int best = 0;
    for (int v = 1; v < V; v++) if (logits[v] > logits[best]) best = v;
    if (how->temperature == 0) return best;
    real max = logits[best], least = -INFINITY;
    if (how->top_k && how->top_k < V) {
        memcpy(scratch, logits, V * sizeof(real));
        least = kth_largest(scratch, V, how->top_k - 1);
    }
    double sum = 0, running = 0;
    for (int v = 0; v < V; v++) sum += logits[v] = logits[v] < least ? 0 : exp((logits[v] - max) / how->temperature);
    for (int v = 0; v < V; v++)
        if ((running += logits[v]) > u * sum) return v;
    return best;
}

typedef struct {
    double prompt_seconds, seconds;    // reading the prompt, making the rest
} Generation;

// Continues the prompt, n_prompt tokens, by n tokens in each of cache->B sequences; the cache must
// have room for all but the last. Token i of sequence b goes to out[b*n + i] if there is an out, and those of
// sequence 0 are printed as they come if there is a tokenizer.
static Generation generate(Model *m, Cache *cache, const int *prompt, int n_prompt, int n, const Sampling *how, uint64_t key,
                           const Tokenizer *tokenizer, int *out) {
    int B = cache->B, V = m->c.V;
    int *tokens = allocate(sizeof(int) * B * n_prompt, "prompt");
    real *scratch = allocate(sizeof(real) * V, "sampling");
    Generation g = {0};
    for (int b = 0; b < B; b++) memcpy(tokens + (long)b * n_prompt, prompt, n_prompt * sizeof(int));
    cache->used = 0, m->cache = cache;
    double start = seconds();
    real *logits = decode(m, tokens, B, n_prompt);
    g.prompt_seconds = seconds() - start;
    for (int i = 0; i < n; i++) {
        for (int b = 0; b < B; b++) {
            double u = random_uniform(random_stream(key, STREAM_SAMPLE, b), i);
            tokens[b] = sample_token(logits + (long)b * V, scratch, V, how, u);
            if (out) out[(long)b * n + i] = tokens[b];
        }
        if (tokenizer) {
            if (tokens[0] < tokenizer->V) print_token(tokenizer, tokens[0]);
            fflush(stdout);
        }
        if (i + 1 < n) logits = decode(m, tokens, B, 1);
    }
    g.seconds = seconds() - start - g.prompt_seconds;
    m->cache = NULL;
    free(tokens), free(scratch);
    return g;
}

// ==== 12  TRAINING ==========================================================================

// What the command line sets; config holds -1 where it says nothing.
typedef struct {
    Config config;
    const char *train_data, *val_data, *tokenizer, *log, *save, *load, *prompt;
    int order, schedule, batch_size, seq_len, grad_accum, val_every, val_batches, sample_every, resume, eval, help;
    int generate, top_k, cache;
    long steps, warmup, seed, save_every;
    double learning_rate, min_lr, grad_clip, dropout, temperature;
    AdamW adam;
} Options;

// The command --generate: the prompt, its continuation, and what that cost.
static void generate_command(Model *m, const Options *o, const Tokenizer *tokenizer) {
    const Config *c = &m->c;
    const char *text = o->prompt ? o->prompt : "";
    int mode = o->cache == -1 ? cache_mode(c) : o->cache, B = o->batch_size;
    if (mode != CACHE_FULL && c->attention != MLA)
        fail(2, "--cache %s: attention %s has no latent, expected --cache full", cache_names[mode],
             attention_names[c->attention]);
    int *prompt = allocate((strlen(text) + 1) * sizeof(int), "prompt");
    long n_prompt = encode(tokenizer, (const unsigned char *)text, strlen(text), prompt);
    if (n_prompt == 0) prompt[n_prompt++] = tokenizer->eot;
    if (n_prompt > c->block_size)
        fail(2, "--prompt: %ld tokens, expected at most the model's block size, %d", n_prompt, c->block_size);
    int capacity = o->generate < c->block_size - n_prompt ? n_prompt + o->generate : c->block_size;
    int n = min_int(o->generate, capacity - n_prompt + 1);
    int *out = allocate(sizeof(int) * B * (n + 1), "generated tokens");

    model_reserve(m, B, n_prompt, 0);
    Cache *cache = cache_create(m, mode, B, capacity);
    Sampling how = {o->temperature, o->top_k};
    printf(B > 1 ? "--- 1\n%s" : "%s", text);
    fflush(stdout);
    Generation g = generate(m, cache, prompt, n_prompt, n, &how, o->seed, tokenizer, out);
    for (int b = 1; b < B; b++) {
        printf("\n--- %d\n%s", b + 1, text);
        for (int i = 0; i < n; i++)
            if (out[(long)b * n + i] < tokenizer->V) print_token(tokenizer, out[(long)b * n + i]);
    }
    if (n < o->generate) printf("\n[stopped: the model's block size, %d tokens, is full]", c->block_size);
    long floats = cache_floats(c, mode), mha = 2L * c->L * c->C;
    double tokens = (double)B * capacity, MB = sizeof(real) / 1e6;
    printf("\n\nprompt %ld tokens x %d, %.0f tok/s | decoded %d tokens x %d, %.0f tok/s\n", n_prompt, B,
           n_prompt * B / g.prompt_seconds, n, B, n > 1 ? (n - 1.0) * B / g.seconds : 0.0);
    printf("cache %s: %ld floats per token, %.2f MB in all | MHA: %ld floats per token, %.2f MB in all\n", cache_names[mode],
           floats, floats * tokens * MB, mha, mha * tokens * MB);
    cache_free(cache);
    free(prompt), free(out);
}

typedef struct {
    double loss;           // mean over tokens, in nats
    double bits_per_byte;  // the same over the bytes they stand for; NaN without a tokenizer
    long tokens;
} Evaluation;

// The loss over consecutive windows of T targets, B at a time; the last, shorter window counts
// too: every token but the first is predicted once. With max_batches, that many batches, spread
// evenly over the data.
static Evaluation evaluate(Model *m, const Data *d, const Tokenizer *tokenizer, int B, int T, int max_batches) {
    Evaluation e = {0};
    double sum = 0, bytes = 0;
    long full = (d->n - 1) / T, tail = (d->n - 1) % T, batches = (full + B - 1) / B + (tail > 0);
    long taken = max_batches && max_batches < batches ? max_batches : batches;
    int *x = allocate(2 * sizeof(int) * B * T, "evaluation batch"), *y = x + B * T;
    for (long i = 0; i < taken; i++) {
        long window = i * batches / taken * B;
        int rows = full - window < B ? full - window : B, length = T;
        if (window >= full) window = full, rows = 1, length = tail;
        for (long k = 0; k < (long)rows * length; k++) {
            x[k] = d->tokens[window * T + k];
            y[k] = d->tokens[window * T + k + 1];
            bytes += y[k] < tokenizer->V ? token_length(tokenizer, y[k]) : NAN;
        }
        sum += forward_loss(m, x, y, rows, length);
        e.tokens += (long)rows * length;
    }
    free(x);
    e.loss = sum / e.tokens;
    e.bits_per_byte = sum / log(2) / bytes;
    return e;
}

static void print_evaluation(const Evaluation *e) {
    printf("loss %.8f perplexity %.4f bits_per_byte ", e->loss, exp(e->loss));
    printf(isnan(e->bits_per_byte) ? "n/a" : "%.6f", e->bits_per_byte);
    printf(" tokens %ld\n", e->tokens);
    fflush(stdout);
}

static void print_duration(double s) {
    long t = s;
    if (t >= 3600) printf("%ldh%02ldm", t / 3600, t / 60 % 60);
    else if (t >= 60) printf("%ldm%02lds", t / 60, t % 60);
    else printf("%.0fs", s);
}

// SIGINT, SIGTERM and SIGHUP let the step at hand finish; a second one ends the program at once.
static volatile sig_atomic_t stop_signal;

static void on_signal(int number) {
    if (stop_signal) _exit(128 + number);
    stop_signal = number;
}

static const char log_header[] = "step,loss,lr,grad_norm,val_loss,tok_per_s,seconds\n";

// Opens the log. A resumed run keeps the header and the rows of the steps that are done, and appends to them.
static FILE *log_open(const char *path, long done) {
    char row[256];
    long kept = 0;
    check_replaceable(path, "log", log_header, 0, 0);
    FILE *f = fopen(path, done ? "a+b" : "wb");
    if (!f) fail(1, "%s: cannot write: %s", path, strerror(errno));
    if (done) rewind(f);
    while (done && fgets(row, sizeof row, f) && strchr(row, '\n') && (kept == 0 || atol(row) <= done)) kept = ftell(f);
    if (!kept) fputs(log_header, f);
    else if (ftruncate(fileno(f), kept) || fseek(f, 0, SEEK_END)) fail(1, "%s: cannot write: %s", path, strerror(errno));
    if (fflush(f)) fail(1, "%s: cannot write: %s", path, strerror(errno));
    return f;
}

// From step `done` to the last, with the moments of the model as they are.
static void train(Model *m, const Options *o, const Data *data, const Data *val, const Tokenizer *tokenizer,
                  const char *settings, long done) {
    int B = o->batch_size, T = o->seq_len, live = isatty(1);
    int *x = allocate(2 * sizeof(int) * B * T, "batch"), *y = x + B * T;
    Schedule schedule = {o->schedule, o->steps, o->warmup, o->learning_rate, o->min_lr};
    long step = done, saved = done;  // steps done; the step that the file on disk holds (done: nothing new to save)
    Cache *cache = o->sample_every ? cache_create(m, cache_mode(&m->c), 1, T) : NULL;  // for samples
    Sampling how = {o->temperature, o->top_k};
    int start_token = min_int(tokenizer->eot, m->c.V - 1);
    if (o->save) check_checkpoint_writable(o->save);
    FILE *log = o->log ? log_open(o->log, done) : NULL;
    if (o->save && log) check_checkpoint_writable(o->save);  // again: the log may be the same file by another name
    struct sigaction stop = {.sa_handler = on_signal, .sa_flags = SA_RESTART};  // writing a file goes on
    struct sigaction hangup;
    sigaction(SIGINT, &stop, NULL), sigaction(SIGTERM, &stop, NULL);
    if (!sigaction(SIGHUP, NULL, &hangup) && hangup.sa_handler != SIG_IGN) sigaction(SIGHUP, &stop, NULL);  // but for nohup

    fflush(stdout);
    double start = seconds(), stepping = 0;  // stepping: time without validation and samples
    while (step < o->steps && !stop_signal) {
        double t0 = seconds(), loss = 0, lr = learning_rate_at(&schedule, step);
        for (int micro = 0; micro < o->grad_accum; micro++) {
            long index = step * o->grad_accum + micro;
            next_batch(data, o->order, o->seed, index, x, y, B, T);
            m->dropout_key = random_stream(o->seed, STREAM_DROPOUT, index);
            loss += forward_backward(m, x, y, B, T, 1.0 / o->grad_accum) / o->grad_accum;
        }
        double norm = gradient_norm(m);
        if (!isfinite(loss) || !isfinite(norm))
            fail(1, "step %ld: loss %f, gradient norm %f at learning rate %g; stopped, and not saved (a lower --learning-rate "
                 "may help)", step + 1, fabs(loss), fabs(norm), lr);
        adamw_update(m, &o->adam, lr, step + 1, clip_scale(norm, o->grad_clip));
        step++;

        double took = seconds() - t0, rate = (double)B * T * o->grad_accum / took;
        stepping += took;
        int last = step == o->steps;
        int validate = val && (last || (o->val_every && step % o->val_every == 0));
        int sample = cache && (last || step % o->sample_every == 0);
        printf("step %ld/%ld | loss %.6f | lr %.1e | grad %.3g | tok/s %.0f | ETA ", step, o->steps, loss, lr, norm, rate);
        print_duration((seconds() - start) / (step - done) * (o->steps - step));
        int stays = live && !validate && !sample && !last && !stop_signal;  // a terminal's line, in its place
        printf(stays ? "\033[K\r" : live ? "\033[K\n" : "\n");
        fflush(stdout);
        Evaluation e = {0};
        if (validate) {
            e = evaluate(m, val, tokenizer, B, T, last ? 0 : o->val_batches);
            printf("val  %ld/%ld | ", step, o->steps);
            print_evaluation(&e);
        }
        if (sample) {
            uint64_t key = random_stream(o->seed, STREAM_SAMPLE, step);
            generate(m, cache, &start_token, 1, min_int(200, T), &how, key, tokenizer, NULL);
            printf("\n");
        }
        if (log) {
            fprintf(log, "%ld,%.6f,%.6e,%.6f,", step, loss, lr, norm);
            if (validate) fprintf(log, "%.6f", e.loss);
            fprintf(log, ",%.0f,%.3f\n", rate, seconds() - start);
            if (fflush(log)) fail(1, "%s: cannot write: %s", o->log, strerror(errno));
        }
        if (o->save && o->save_every && step % o->save_every == 0) {
            if (log) fsync(fileno(log));  // after a crash it holds at least the checkpoint's steps
            checkpoint_save(m, o->save, saved = step, settings);
        }
    }
    if (done && done == o->steps) printf("%s: all its %ld steps are done already\n", o->save, done);
    if (step > done) {
        printf("%ld steps in ", step - done);
        print_duration(seconds() - start);
        printf(", %.0f tokens/s\n", (double)B * T * o->grad_accum * (step - done) / stepping);
    }
    if (log) fsync(fileno(log));
    if (o->save && saved != step) checkpoint_save(m, o->save, saved = step, settings);
    if (o->save && step > done) printf("saved %s\n", o->save);
    if (stop_signal && step < o->steps) {
        printf("stopped by signal %d after step %ld%s\n", (int)stop_signal, step,
               !o->save ? ", nothing saved without --save FILE" : step == 0 ? ", nothing to save yet"
               : o->load ? "; the same command with --resume in place of --load goes on from there"
               : "; the same command with --resume goes on from there");
        exit(128 + stop_signal);
    }
    if (log) fclose(log);
    if (cache) cache_free(cache);
    free(x);
}

// ==== 13  COMMAND LINE ======================================================================

static Options opt = {
    .config = {.attention = -1, .position = -1, .latent_norm = -1, .L = -1, .NH = -1, .NKV = -1, .C = -1,
               .block_size = -1, .V = -1, .RQ = -1, .R = -1, .RD = -1},
    .seq_len = -1, .batch_size = -1, .grad_accum = 1, .steps = 4000, .learning_rate = 4e-3, .warmup = -1, .min_lr = -1,
    .grad_clip = 1, .seed = 1337, .val_every = 500, .val_batches = 20, .sample_every = 1000, .generate = -1, .temperature = 0.8,
    .cache = -1,
    .adam = {.beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .weight_decay = 0.1},
};

// Kinds of option: how its text becomes the value at `at`.
enum { INT, LONG, DOUBLE, TEXT, CHOICE, FLAG };

typedef struct {
    const char *name;
    int kind;
    void *at;
    double low, high;            // numbers
    const char *const *choices;
    const char *help;
    int given;
} Option;

static Option options[] = {
    {"model", .help = NULL},
    {"--attention", CHOICE, &opt.config.attention, .choices = attention_names, .help = "mla, mha, gqa or mqa (mla)"},
    {"--position", CHOICE, &opt.config.position, .choices = position_names, .help = "learned, rope or decoupled (decoupled for mla, else rope)"},
    {"--layers", INT, &opt.config.L, 1, 1000, .help = "blocks (4)"},
    {"--heads", INT, &opt.config.NH, 1, 1024, .help = "query heads (4)"},
    {"--channels", INT, &opt.config.C, 1, 65536, .help = "width of the residual stream (128)"},
    {"--kv-heads", INT, &opt.config.NKV, 1, 1024, .help = "gqa: key/value heads (a quarter of the heads if that is whole and not 1, else half, of odd ones 1)"},
    {"--q-rank", INT, &opt.config.RQ, 0, 65536, .help = "mla: width of the query latent, 0 for none (channels/2)"},
    {"--kv-rank", INT, &opt.config.R, 1, 65536, .help = "mla: width of the key/value latent (2/3 of channels)"},
    {"--rope-dim", INT, &opt.config.RD, 0, 65536, .help = "decoupled: rotary part of a head (half of it)"},
    {"--latent-norm", CHOICE, &opt.config.latent_norm, .choices = norm_names, .help = "mla: layernorm, rmsnorm or none (layernorm)"},
    {"--vocab-size", INT, &opt.config.V, 2, 65536, .help = "tokens known (the tokenizer's, or 256, or 50257 for tokens above 255)"},
    {"data", .help = NULL},
    {"--train-data", TEXT, &opt.train_data, .help = "token file, or text, read as bytes (data/tinyshakespeare_train.bin)"},
    {"--val-data", TEXT, &opt.val_data, .help = "the same for validation (beside the default text: data/tinyshakespeare_val.bin; else none)"},
    {"--tokenizer", TEXT, &opt.tokenizer, .help = "its file (X_tokenizer.bin beside X_train.bin or X_val.bin; else bytes)"},
    {"--order", CHOICE, &opt.order, .choices = order_names, .help = "batches at random or sequential places (random)"},
    {"training", .help = NULL},
    {"--batch-size", INT, &opt.batch_size, 1, 65536, .help = "sequences in a micro-batch (8); or to generate side by side (1)"},
    {"--seq-len", INT, &opt.seq_len, 1, 1 << 24, .help = "tokens in a sequence; a new model's block size (128, or the loaded model's)"},
    {"--steps", LONG, &opt.steps, 0, 1e12, .help = "updates; 0 with --save writes the initial model (4000)"},
    {"--grad-accum", INT, &opt.grad_accum, 1, 65536, .help = "micro-batches per update (1)"},
    {"--learning-rate", DOUBLE, &opt.learning_rate, 0, 1e3, .help = "its peak (4e-3)"},
    {"--schedule", CHOICE, &opt.schedule, .choices = schedule_names, .help = "cosine or constant (cosine)"},
    {"--warmup", LONG, &opt.warmup, 0, 1e12, .help = "steps of linear warm-up (cosine: a twentieth of the steps, constant: 0)"},
    {"--min-lr", DOUBLE, &opt.min_lr, 0, 1e3, .help = "where the cosine ends (a tenth of the peak)"},
    {"--weight-decay", DOUBLE, &opt.adam.weight_decay, 0, 1e3, .help = "on matrices (0.1)"},
    {"--beta1", DOUBLE, &opt.adam.beta1, 0, 0.999999, .help = "AdamW's (0.9)"},
    {"--beta2", DOUBLE, &opt.adam.beta2, 0, 0.999999, .help = "AdamW's (0.99)"},
    {"--eps", DOUBLE, &opt.adam.eps, 1e-30, 1, .help = "AdamW's (1e-8)"},
    {"--grad-clip", DOUBLE, &opt.grad_clip, 0, 1e9, .help = "largest gradient norm, 0 for no limit (1)"},
    {"--dropout", DOUBLE, &opt.dropout, 0, 0.99, .help = "probability, on embedding, attention and MLP outputs (0)"},
    {"--seed", LONG, &opt.seed, 0, 9e15, .help = "of all randomness (1337)"},
    {"reports", .help = NULL},
    {"--val-every", INT, &opt.val_every, 0, INT_MAX, .help = "steps between validations, 0 for only the last (500)"},
    {"--val-batches", INT, &opt.val_batches, 0, INT_MAX, .help = "batches in each, 0 for all data, as after the last step (20)"},
    {"--sample-every", INT, &opt.sample_every, 0, INT_MAX, .help = "steps between samples, 0 for none (1000)"},
    {"--log", TEXT, &opt.log, .help = "CSV file of every step"},
    {"files", .help = NULL},
    {"--save", TEXT, &opt.save, .help = "checkpoint to write at the end, and when interrupted (safetensors)"},
    {"--save-every", LONG, &opt.save_every, 0, 1e12, .help = "steps between further saves to it, 0 for none (0)"},
    {"--resume", FLAG, &opt.resume, .help = "go on from --save FILE, which a run with the same options left"},
    {"--load", TEXT, &opt.load, .help = "checkpoint to start from"},
    {"modes (default: train)", .help = NULL},
    {"--eval", FLAG, &opt.eval, .help = "loss of the model --load over all validation data"},
    {"--generate", INT, &opt.generate, 0, 1 << 24, .help = "tokens to make with the model --load; with the prompt at most its block size and one"},
    {"--prompt", TEXT, &opt.prompt, .help = "its text (empty: starts from the end-of-text token)"},
    {"--temperature", DOUBLE, &opt.temperature, 0, 1e3, .help = "of samples; 0 takes the likeliest token (0.8)"},
    {"--top-k", INT, &opt.top_k, 0, 65536, .help = "samples come from that many likeliest tokens, 0 for all (0)"},
    {"--cache", CHOICE, &opt.cache, .choices = cache_names, .help = "mla: full, latent or absorbed (absorbed)"},
    {"--help", FLAG, &opt.help, .help = "this text"},
};
enum { N_OPTIONS = sizeof options / sizeof *options };

static void print_help(void) {
    printf("usage: ./train_gpt2_mla [options]            defaults in parentheses\n");
    for (Option *o = options; o < options + N_OPTIONS; o++) {
        if (!o->help) printf("%s\n", o->name);
        else printf("  %-16s %s\n", o->name, o->help);
    }
}

static void option_set(Option *o, const char *text) {
    char *end;
    errno = 0;
    if (o->kind == TEXT) {
        if (!*text && o->at != &opt.prompt) fail(2, "%s: empty, expected a file name", o->name);
        *(const char **)o->at = text;
    } else if (o->kind == CHOICE) {
        int i = 0;
        char expected[80] = "";
        for (; o->choices[i] && strcmp(o->choices[i], text); i++) strcat(strcat(expected, i ? ", " : ""), o->choices[i]);
        if (!o->choices[i]) fail(2, "%s: '%s', expected one of %s", o->name, text, expected);
        *(int *)o->at = i;
    } else {
        double value = o->kind == DOUBLE ? strtod(text, &end) : (double)strtoll(text, &end, 10);
        if (end == text || *end || errno || !(value >= o->low && value <= o->high))
            fail(2, "%s: '%s', expected a %s from %.15g to %.15g", o->name, text, o->kind == DOUBLE ? "number" : "whole number",
                 o->low, o->high);
        if (o->kind == DOUBLE) *(double *)o->at = value;
        else if (o->kind == LONG) *(long *)o->at = value;
        else *(int *)o->at = value;
    }
}

static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        Option *o = options;
        if (!strcmp(argv[i], "-h")) argv[i] = "--help";
        while (o < options + N_OPTIONS && (!o->help || strcmp(o->name, argv[i]))) o++;
        if (o == options + N_OPTIONS) fail(2, "%s: no such option; --help lists them", argv[i]);
        if (o->given++) fail(2, "%s: given twice", o->name);
        if (o->kind == FLAG) *(int *)o->at = 1;
        else if (++i == argc || (o->at != &opt.prompt && !strncmp(argv[i], "--", 2))) fail(2, "%s: its value is missing", o->name);
        else option_set(o, argv[i]);
    }
}

// A model's shape given along with --load must be that of the checkpoint.
static void check_against(const Config *loaded, const char *path) {
    for (Option *o = options; o < options + N_OPTIONS; o++) {
        if (!o->given) continue;
        ptrdiff_t offset = (char *)o->at - (char *)&opt.config;
        if (offset < 0 || offset >= (ptrdiff_t)sizeof opt.config) continue;
        int found = *(const int *)((const char *)loaded + offset), wanted = *(int *)o->at;
        if (found == wanted) continue;
        if (o->choices) fail(2, "%s %s: %s has %s", o->name, o->choices[wanted], path, o->choices[found]);
        fail(2, "%s %d: %s has %d", o->name, wanted, path, found);
    }
}

// X_tokenizer.bin, if there is one, for data named X_train.bin or X_val.bin; else NULL.
static const char *tokenizer_beside(const char *data) {
    static char path[PATH_MAX];
    const char *end = data ? strrchr(data, '_') : NULL;
    if (!end || (strcmp(end, "_train.bin") && strcmp(end, "_val.bin"))) return NULL;
    snprintf(path, sizeof path, "%.*s_tokenizer.bin", (int)(end - data), data);
    return access(path, R_OK) ? NULL : path;
}

static void check_data(const Data *d, const Model *m, const Tokenizer *tokenizer, long needed) {
    if (d->text && tokenizer->V > 256)
        fail(1, "%s: a text, read as bytes, but %s has %d tokens: expected a token file", d->path, opt.tokenizer, tokenizer->V);
    if (d->largest >= m->c.V)
        fail(1, "%s: token %d, expected less than the model's vocabulary, %d: made with another tokenizer?", d->path,
             d->largest, m->c.V);
    if (d->n < needed) fail(1, "%s: %ld tokens, expected at least %ld for a batch", d->path, d->n, needed);
}

// The options that shape a run, in words, once all defaults are chosen.
static const char *settings(const Data *d) {
    static char text[900];
    const Options *o = &opt;
    snprintf(text, sizeof text, "training data %ld tokens (hash %08x), order %s, batch %d x %d x %d, steps %ld, %s schedule: "
             "warmup %ld, lr %g to %g, decay %g, betas %g %g, eps %g, clip %g, dropout %g, seed %ld", d->n,
             hash_bytes(d->tokens, d->n * (long)sizeof *d->tokens), order_names[o->order], o->batch_size,
             o->grad_accum, o->seq_len, o->steps, schedule_names[o->schedule], o->warmup, o->learning_rate, o->min_lr,
             o->adam.weight_decay, o->adam.beta1, o->adam.beta2, o->adam.eps, o->grad_clip, o->dropout, o->seed);
    return text;
}

static void print_model(const Model *m) {
    const Config *c = &m->c;
    int mode = c->attention == MLA && opt.cache != -1 ? opt.cache : cache_mode(c);
    long cache = cache_floats(c, mode), mha = 2L * c->L * c->C;
    printf("%s, position %s: %d layers, %d heads, %d channels, vocabulary %d, block size %d", attention_names[c->attention],
           position_names[c->position], c->L, c->NH, c->C, c->V, c->block_size);
    if (c->attention == GQA) printf(", %d kv heads", c->NKV);
    if (c->attention == MLA) printf(", kv_rank %d, q_rank %d, latent norm %s", c->R, c->RQ, norm_names[c->latent_norm]);
    if (c->position == DECOUPLED) printf(", rope_dim %d", c->RD);
    printf("\n%zu parameters | KV cache %ld floats per token, where MHA needs %ld (%.1f%%)\n", m->n_params, cache, mha,
           100.0 * cache / mha);
}

// A new model's shape where the command line does not say it, but for the vocabulary.
static void model_defaults(void) {
    Config *c = &opt.config;
    if (opt.seq_len == -1) opt.seq_len = 128;
    if (c->attention == -1) c->attention = MLA;
    if (c->position == -1) c->position = c->attention == MLA ? DECOUPLED : ROPE;
    if (c->latent_norm != -1 && c->attention != MLA)
        fail(2, "--latent-norm: attention %s has no latent", attention_names[c->attention]);
    if (c->latent_norm == -1) c->latent_norm = LAYERNORM;
    if (c->L == -1) c->L = 4;
    if (c->NH == -1) c->NH = 4;
    if (c->C == -1) c->C = 128;
    c->block_size = opt.seq_len;
}

#ifndef TESTING
int main(int argc, char **argv) {
    parse_options(argc, argv);
    if (opt.help) return print_help(), 0;
    Config *c = &opt.config;
    int generating = opt.generate >= 0, training = !opt.eval && !generating;
    if (!training && !opt.load) fail(2, "%s: expected --load FILE too", opt.eval ? "--eval" : "--generate");
    if (opt.eval && generating) fail(2, "--eval and --generate: expected one of them");
    if (opt.prompt && !generating) fail(2, "--prompt: expected --generate N too");
    if (training && opt.val_data && !opt.train_data) fail(2, "--val-data: expected --train-data FILE too");
    if (opt.resume && (!training || !opt.save || opt.load))
        fail(2, "--resume: expected --save FILE, the run to go on with, and no --load");
    if (opt.save_every && !opt.save) fail(2, "--save-every: expected --save FILE too");
    if (opt.save && opt.log && !strcmp(opt.save, opt.log)) fail(2, "--log %s: the same file as --save", opt.log);
    if (opt.eval && opt.train_data && !opt.val_data) fail(2, "--eval: expected --val-data FILE too");
    if (opt.min_lr < 0) opt.min_lr = opt.learning_rate / 10;
    if (opt.min_lr > opt.learning_rate)
        fail(2, "--min-lr %g: expected at most the learning rate, %g", opt.min_lr, opt.learning_rate);
    if (opt.batch_size == -1) opt.batch_size = generating ? 1 : 8;

    // Data: what was named, else tinyshakespeare if prepared, else this program's own text.
    static const char prepared[] = "data/tinyshakespeare_train.bin";
    Data train_data = {0}, val_data = {0};
    if (!opt.train_data && !opt.val_data && !access(prepared, R_OK))
        opt.train_data = prepared, opt.val_data = "data/tinyshakespeare_val.bin";
    int named = opt.tokenizer != NULL, defaults = opt.train_data == prepared;
    if (!named) opt.tokenizer = tokenizer_beside(opt.train_data ? opt.train_data : opt.val_data);
    Tokenizer tokenizer = opt.tokenizer ? tokenizer_load(opt.tokenizer) : tokenizer_bytes();
    if (generating || (training && opt.steps == 0 && !opt.train_data)) {
        // no data needed
    } else if (!opt.train_data && !opt.val_data) {
        if (access("train_gpt2_mla.c", R_OK) || access("test_mla.c", R_OK))
            fail(1, "no data: run this in the repository, run `make shakespeare` first, or name a text with --train-data (--eval: "
                 "--val-data) FILE");
        train_data = data_load("train_gpt2_mla.c"), val_data = data_load("test_mla.c");
        printf("No data prepared: taking this program's own text, byte by byte. For Shakespeare: make shakespeare\n");
    } else {
        if (training) train_data = data_load(opt.train_data);
        if (opt.val_data) val_data = data_load(opt.val_data);
    }

    // Model: loaded, or new.
    Model *m;
    Checkpoint checkpoint = {0};
    int B = opt.batch_size, updating = training && opt.steps > 0;
    if (opt.load || opt.resume) {
        checkpoint = checkpoint_open(opt.load ? opt.load : opt.save);
        Config loaded = checkpoint_config(&checkpoint);
        check_against(&loaded, checkpoint.path);
        if (opt.resume && !(checkpoint_meta(&checkpoint, "settings") && checkpoint_meta(&checkpoint, "step")))
            fail(1, "%s: a model without a run's state, nothing to resume (--load starts from it)", opt.save);
        m = model_create(&loaded, updating);
        checkpoint_read_model(&checkpoint, m, opt.resume && updating);
        if (opt.seq_len == -1) opt.seq_len = loaded.block_size;
    } else {
        model_defaults();
        if (c->V == -1) c->V = opt.tokenizer ? tokenizer.V : max_int(train_data.largest, val_data.largest) < 256 ? 256 : 50257;
        config_complete(c, 2, "options");
        m = model_create(c, updating);
        model_init(m, opt.seed);
    }
    if (!named && defaults && m->c.V == 256 && tokenizer.V != 256)  // a byte model, beside other data
        tokenizer_free(&tokenizer), tokenizer = tokenizer_bytes(), opt.tokenizer = NULL;
    if (opt.tokenizer && (named ? tokenizer.V > m->c.V : tokenizer.V != m->c.V))  // a smaller one must be meant
        fail(1, "%s: vocabulary %d, the model's is %d: made with another --tokenizer?", opt.tokenizer, tokenizer.V, m->c.V);
    if (!opt.tokenizer && m->c.V != 256) tokenizer.V = 0;  // what its tokens stand for is not known
    if (!opt.tokenizer && generating && m->c.V != 256)
        fail(2, "--generate: expected --tokenizer FILE, the model's vocabulary is %d", m->c.V);
    if (opt.seq_len > m->c.block_size) fail(2, "--seq-len %d: the model's block size is %d", opt.seq_len, m->c.block_size);
    if (opt.warmup < 0) opt.warmup = opt.schedule == CONSTANT ? 0 : (opt.steps + 19) / 20;
    long done = 0;
    if (opt.resume) {
        const char *was = checkpoint_meta(&checkpoint, "settings"), *step = checkpoint_meta(&checkpoint, "step");
        const char *is = settings(&train_data);
        size_t same = 0;  // up to the first setting that differs
        for (size_t i = 0; was[i] && was[i] == is[i]; i++) if (was[i] == ' ' && i && was[i - 1] == ',') same = i + 1;
        was += same, is += same;
        if (strcmp(was, is))
            fail(2, "%s: its run had %.*s; this one has %.*s (--load starts another run from it)", opt.save,
                 (int)strcspn(was, ","), was, (int)strcspn(is, ","), is);
        char *end;
        done = strtol(step, &end, 10);
        if (end == step || *end || done < 0 || done > opt.steps)
            fail(1, "%s: step '%s', expected a number from 0 to %ld", opt.save, step, opt.steps);
    }
    if (checkpoint.f) checkpoint_close(&checkpoint);
    if (val_data.n) check_data(&val_data, m, &tokenizer, 2);
    if (train_data.n) check_data(&train_data, m, &tokenizer, opt.order == SEQUENTIAL ? (long)B * opt.seq_len + 1 : opt.seq_len + 1);
    print_model(m);

    if (generating) generate_command(m, &opt, &tokenizer);
    else if (opt.eval) {
        model_reserve(m, B, opt.seq_len, 0);
        Evaluation e = evaluate(m, &val_data, &tokenizer, B, opt.seq_len, 0);
        print_evaluation(&e);
    } else if (!updating) {
        if (opt.save) check_checkpoint_writable(opt.save), checkpoint_save(m, opt.save, 0, NULL), printf("saved %s\n", opt.save);
    } else {
        m->dropout = opt.dropout;
        model_reserve(m, B, opt.seq_len, 1);
        printf("%ld tokens of %s, %d threads%s\n", train_data.n, train_data.path, omp_get_max_threads(),
               val_data.n ? "" : "; no validation without --val-data");
        train(m, &opt, &train_data, val_data.n ? &val_data : NULL, &tokenizer, settings(&train_data), done);
    }
    if (fflush(stdout) || ferror(stdout)) fail(1, "standard output: cannot write: %s", strerror(errno));
    model_free(m), tokenizer_free(&tokenizer), free(train_data.tokens), free(val_data.tokens);
    return 0;
}
#endif

/*
Decode speed of every kind of attention and cache at several contexts; prints a Markdown table.

    make decode-speed         all of it, some six minutes, written to dev/speed/decode_speed.md
    ./decode_speed 1024 1 [layers heads channels]        one context and batch size

A model of random weights (8 layers, 16 heads, 512 channels, vocabulary 256) gets a cache filled
with random numbers up to the context, then decodes a few tokens there. Rounds of all kinds are
interleaved and medians taken. Each row is set against its limit: the time that its bytes (weights
once, cache once per step) take at the memory bandwidth, or its arithmetic at the multiply-add peak,
both measured in this run, whichever is longer. gqla 4 is mla with 4 key/value heads, whose cache of
keys and values is no longer much larger than that of latents, or even smaller.
*/
#define TESTING
#include "../../train_gpt2_mla.c"
#include "machine_limits.h"

typedef struct {
    const char *name;
    int attention, position, NKV, R, mode, precision;
    Model *m;
    double rates[64], bytes, flops;
} Row;

static Model *random_model(const Row *r, int L, int NH, int C, int context, int B) {
    Config c = {.attention = r->attention, .position = r->position, .latent_norm = LAYERNORM,
                .L = L, .NH = NH, .NKV = r->NKV, .C = C, .block_size = context + 64, .V = 256,
                .RQ = -1, .R = r->R > C ? -1 : r->R, .RD = -1, .NOPE = -1};
    config_complete(&c, 1, "decode_speed");
    Model *m = model_create(&c, 0);
    model_init(m, 1);
    model_reserve(m, B, 1, 0);
    return m;
}

static double number_bytes(const Row *r) { return r->precision == BF16 ? 2 : sizeof(real); }

// What a step must read, weights once for the batch and the cache of each sequence, and compute.
static void count_work(Row *r, int context, int B) {
    const Config *c = &r->m->c;
    double weights = r->m->n_params, cached = (double)cache_floats(c, r->mode) * context * B;
    double up = (double)c->R * (c->NOPE + c->HS);  // a key/value head's rows of kv_b_proj
    // multiply-adds per token of a sequence and layer, and per cached token and layer
    double new = 0, old = (double)c->NH * (c->QK + c->HS);
    if (r->mode == CACHE_LATENT) old += c->NKV * up;
    if (r->mode == CACHE_ABSORBED) {
        old = (double)c->NH * (2 * c->R + c->rope);
        new = (c->NH - c->NKV) * up;  // each query head absorbs; weights count key/value heads
    }
    r->bytes = number_bytes(r) * (weights + cached);
    r->flops = 2 * B * (weights + c->L * (new + context * old));
}

// Tokens per second just behind `context` tokens.
static double decode_rate(const Row *r, int context, int B) {
    int tokens[1024], steps = 0;
    Model *m = r->m;
    precision = r->precision;
    if (precision == BF16) keep_twin(m);
    Cache *cache = cache_create(m, r->mode, B, context + 64);
    long size = cache->sequence_size * cache->B * m->c.L;
    #pragma omp parallel for
    for (long i = 0; i < size; i++) {
        real x = (int)(random_bits(1, i) >> 40) * 0x1p-24 - 0.5;
        cache_put(cache, i, &x, 1, 1);
    }
    for (int b = 0; b < B; b++) tokens[b] = b % 256;
    cache->used = context;
    decode(m, cache, tokens, 1);  // warm up
    double start = seconds(), took;
    do {
        decode(m, cache, tokens, 1);
        took = seconds() - start;
    } while (++steps < 32 && took < 0.5);
    cache_free(cache);
    if (precision == BF16) free(twin.numbers), twin.n = 0;
    precision = FP32;
    return B * steps / took;
}

static void print_row(Row *r, int context, int B, int rounds, double GBs, double GFLOPs,
                      double mha) {
    const Config *c = &r->m->c;
    long floats = cache_floats(c, r->mode);
    double rate = median(r->rates, rounds), spread = r->rates[rounds - 1] / r->rates[0];
    double by_memory = r->bytes / GBs / 1e9, by_arithmetic = r->flops / GFLOPs / 1e9;
    double limit = B / fmax(by_memory, by_arithmetic);
    char name[80], rank[20] = "";
    if (c->R) snprintf(rank, sizeof rank, ", R=%d", c->R);
    snprintf(name, sizeof name, "%s%s%s", r->name, rank, r->precision == BF16 ? ", bf16" : "");
    printf("| %d | %d | %s | %ld | %.1f | %.1f | %.2f | %.2f | %.0f%% of %s | "
           "%d rounds, max/min %.2f |\n", context, B, name, floats,
           floats * (double)context * B * number_bytes(r) / 1e6, rate, 1000 * B / rate,
           rate / (mha ? mha : rate), 100 * rate / limit,
           by_memory > by_arithmetic ? "memory" : "arithmetic", rounds, spread);
    fflush(stdout);
}

static void run(Row *rows, int n, int L, int NH, int C, int context, int B, double budget) {
    double bandwidth[64], peak[64];
    int rounds = 0;
    for (int r = 0; r < n; r++) {
        rows[r].m = random_model(&rows[r], L, NH, C, context, B);
        count_work(&rows[r], context, B);
    }
    double start = seconds();
    for (; rounds < 3 || (rounds < 32 && seconds() - start < budget); rounds++) {
        bandwidth[rounds] = read_bandwidth();
        peak[rounds] = multiply_add_peak();
        for (int r = 0; r < n; r++)
            rows[r].rates[rounds] = decode_rate(&rows[r], context, B);
    }
    double GBs = median(bandwidth, rounds), GFLOPs = median(peak, rounds), mha = 0;
    for (int r = 0; r < n; r++) {
        print_row(&rows[r], context, B, rounds, GBs, GFLOPs, mha);
        if (!r) mha = rows[r].rates[rounds / 2];  // sorted by now
        model_free(rows[r].m);
    }
    fprintf(stderr, "context %d, batch %d: memory %.1f GB/s, multiply-add peak %.0f GFLOP/s\n",
            context, B, GBs, GFLOPs);
}

int main(int argc, char **argv) {
    static const int contexts[] = {128, 1024, 4096, 16384}, batches[] = {1, 16};
    Row rows[] = {
        {"mha", MHA, ROPE, -1, -1, CACHE_FULL},
        {"gqa 4", GQA, ROPE, 4, -1, CACHE_FULL},
        {"mqa", MQA, ROPE, -1, -1, CACHE_FULL},
        {"mla full", MLA, DECOUPLED, -1, 341, CACHE_FULL},
        {"mla latent", MLA, DECOUPLED, -1, 341, CACHE_LATENT},
        {"mla absorbed", MLA, DECOUPLED, -1, 341, CACHE_ABSORBED},
        {"gqla 4 full", MLA, DECOUPLED, 4, 341, CACHE_FULL},
        {"gqla 4 absorbed", MLA, DECOUPLED, 4, 341, CACHE_ABSORBED},
        {"mla full", MLA, DECOUPLED, -1, 64, CACHE_FULL},
        {"mla latent", MLA, DECOUPLED, -1, 64, CACHE_LATENT},
        {"mla absorbed", MLA, DECOUPLED, -1, 64, CACHE_ABSORBED},
        {"gqla 4 full", MLA, DECOUPLED, 4, 64, CACHE_FULL},
        {"gqla 4 absorbed", MLA, DECOUPLED, 4, 64, CACHE_ABSORBED},
        {"mha", MHA, ROPE, -1, -1, CACHE_FULL, BF16},
        {"mla absorbed", MLA, DECOUPLED, -1, 341, CACHE_ABSORBED, BF16},
    };
    int n = sizeof rows / sizeof *rows, one = argc >= 3;
    int L = 8, NH = 16, C = 512;
    if (argc >= 6) L = atoi(argv[3]), NH = atoi(argv[4]), C = atoi(argv[5]);
    printf("%d layers, %d heads, %d channels, %d threads. Limit: what memory or arithmetic allows, "
           "as measured beside it.\n\n", L, NH, C, omp_get_max_threads());
    printf("| context | batch | attention, cache | floats/token | cache MB | tok/s | ms/step "
           "| vs mha | of its limit | |\n|--:|--:|---|--:|--:|--:|--:|--:|--:|---|\n");
    for (int i = 0; i < (one ? 1 : 4); i++)
        for (int j = 0; j < (one ? 1 : 2); j++)
            run(rows, n, L, NH, C, one ? atoi(argv[1]) : contexts[i],
                one ? atoi(argv[2]) : batches[j], 10);
    return 0;
}

/*
Decode speed of every kind of attention and cache at several contexts; prints a Markdown table.

    make decode-speed                      all of it, some five minutes, written to dev/speed/decode_speed.md
    ./decode_speed 1024 1 [layers heads channels]   one context and batch size

A model of random weights (8 layers, 16 heads, 512 channels, vocabulary 256) gets a cache filled with
random numbers up to the context, then decodes a few tokens there. Rounds of all kinds are
interleaved and medians taken. Each row is set against its limit: the time that its bytes (weights
once, cache once per step) take at the memory bandwidth, or its arithmetic at the multiply-add peak,
both measured in this run, whichever is longer.
*/
#define TESTING
#include "../../train_gpt2_mla.c"
#include "machine_limits.h"

typedef struct {
    const char *name;
    int attention, position, NKV, R, mode;
    Model *m;
    double rates[64], bytes, flops;
} Row;

static void run(Row *rows, int n, int L, int NH, int C, int context, int B, double budget) {
    double bandwidth[64], peak[64];
    int rounds = 0, tokens[1024];
    for (int r = 0; r < n; r++) {
        Config c = {.attention = rows[r].attention, .position = rows[r].position, .latent_norm = LAYERNORM, .L = L, .NH = NH,
                    .NKV = rows[r].NKV, .C = C, .block_size = context + 64, .V = 256, .RQ = -1, .R = rows[r].R > C ? -1 : rows[r].R, .RD = -1};
        config_complete(&c, 1, "decode_speed");
        rows[r].m = model_create(&c, 0);
        model_init(rows[r].m, 1);
        model_reserve(rows[r].m, B, 1, 0);
        // bytes that a step must read, and its arithmetic: weights once for the batch, cache per sequence
        double cached = (double)cache_floats(&c, rows[r].mode) * context * B, weights = rows[r].m->n_params;
        double score = rows[r].mode == CACHE_ABSORBED ? 2.0 * c.R + c.HS - c.NOPE : 2.0 * c.HS, decompress = (double)c.R * (c.NOPE + c.HS);
        rows[r].bytes = sizeof(real) * (weights + cached);
        rows[r].flops = 2 * B * (weights + (double)L * NH * context * (score + (rows[r].mode == CACHE_LATENT) * decompress));
    }
    for (double start = seconds(); rounds < 3 || (rounds < 32 && seconds() - start < budget); rounds++) {
        bandwidth[rounds] = read_bandwidth();
        peak[rounds] = multiply_add_peak();
        for (int r = 0; r < n; r++) {
            Model *m = rows[r].m;
            Cache *cache = cache_create(m, rows[r].mode, B, context + 64);
            size_t size = cache->layer_size * L;
            #pragma omp parallel for
            for (size_t i = 0; i < size; i++) cache->layers[i] = (real)((int)(random_bits(1, i) >> 40) * 0x1p-24 - 0.5);
            for (int b = 0; b < B; b++) tokens[b] = b % 256;
            m->cache = cache, cache->used = context;
            decode(m, tokens, B, 1);  // warm up
            int steps = 0;
            double t = seconds(), took;
            do decode(m, tokens, B, 1), steps++, took = seconds() - t; while (steps < 32 && took < 0.5);
            rows[r].rates[rounds] = B * steps / took;
            cache_free(cache);
        }
    }
    double GBs = median(bandwidth, rounds), GFLOPs = median(peak, rounds), mha = 0;
    for (int r = 0; r < n; r++) {
        double rate = median(rows[r].rates, rounds), spread = rows[r].rates[rounds - 1] / rows[r].rates[0];
        double by_memory = rows[r].bytes / GBs / 1e9, by_arithmetic = rows[r].flops / GFLOPs / 1e9;
        double limit = B / fmax(by_memory, by_arithmetic);
        if (!r) mha = rate;
        char name[80];
        snprintf(name, sizeof name, rows[r].m->c.R ? "%s, R=%d" : "%s", rows[r].name, rows[r].m->c.R);
        printf("| %d | %d | %s | %ld | %.1f | %.1f | %.2f | %.2f | %.0f%% of %s | %d rounds, max/min %.2f |\n", context, B, name,
               cache_floats(&rows[r].m->c, rows[r].mode), cache_floats(&rows[r].m->c, rows[r].mode) * (double)context * B * sizeof(real) / 1e6,
               rate, 1000 * B / rate, rate / mha, 100 * rate / limit, by_memory > by_arithmetic ? "memory" : "arithmetic", rounds, spread);
        fflush(stdout);
        model_free(rows[r].m);
    }
    fprintf(stderr, "context %d, batch %d: memory %.1f GB/s, multiply-add peak %.0f GFLOP/s\n", context, B, GBs, GFLOPs);
}

int main(int argc, char **argv) {
    static const int contexts[] = {128, 1024, 4096, 16384}, batches[] = {1, 16};
    Row rows[] = {
        {.name = "mha", .attention = MHA, .position = ROPE, .NKV = -1, .R = -1},
        {.name = "gqa 4", .attention = GQA, .position = ROPE, .NKV = 4, .R = -1},
        {.name = "mqa", .attention = MQA, .position = ROPE, .NKV = -1, .R = -1},
        {.name = "mla full", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 341, .mode = CACHE_FULL},
        {.name = "mla latent", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 341, .mode = CACHE_LATENT},
        {.name = "mla absorbed", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 341, .mode = CACHE_ABSORBED},
        {.name = "mla full", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 64, .mode = CACHE_FULL},
        {.name = "mla latent", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 64, .mode = CACHE_LATENT},
        {.name = "mla absorbed", .attention = MLA, .position = DECOUPLED, .NKV = -1, .R = 64, .mode = CACHE_ABSORBED},
    };
    int n = sizeof rows / sizeof *rows, one = argc >= 3;
    int L = argc >= 6 ? atoi(argv[3]) : 8, NH = argc >= 6 ? atoi(argv[4]) : 16, C = argc >= 6 ? atoi(argv[5]) : 512;
    printf("%d layers, %d heads, %d channels, %d threads. Limit: what memory or arithmetic allows, as measured beside it.\n\n", L, NH, C,
           omp_get_max_threads());
    printf("| context | batch | attention, cache | floats/token | cache MB | tok/s | ms/step | vs mha | of its limit | |\n");
    printf("|--:|--:|---|--:|--:|--:|--:|--:|--:|---|\n");
    for (int i = 0; i < (one ? 1 : 4); i++)
        for (int j = 0; j < (one ? 1 : 2); j++)
            run(rows, n, L, NH, C, one ? atoi(argv[1]) : contexts[i], one ? atoi(argv[2]) : batches[j], 10);
    return 0;
}

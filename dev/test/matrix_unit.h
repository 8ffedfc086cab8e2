/*
A matrix unit for processors without one: what the instructions of AMX do, in plain C, so that the
code that uses them is tested on any x86-64 processor with AVX-512 (whose panels are wide enough):

    make test_mla CFLAGS="-O2 -std=c11 -D__AMX_BF16__ -include dev/test/matrix_unit.h"
    ./test_mla "matrix product" decoding

The order of sums differs from the real unit's, and numbers below 1e-38 are kept here. A thread that
has not configured its tiles, or a process that has not asked for them, is stopped, as there. From
Intel's Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBF16PS.
*/
#define _XOPEN_SOURCE 700
#include <immintrin.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int unit_allowed;
static _Thread_local struct {
    int rows, bytes;        // as configured; no bytes: not at all
    uint8_t at[16][64];
} unit_tile[8];

static void unit_check(int right, const char *what) {
    if (!right) fprintf(stderr, "matrix_unit.h: %s\n", what), abort();
}

static long unit_ask(long number, ...) {
    va_list more;
    va_start(more, number);
    unit_allowed = va_arg(more, int) == 0x1023 && va_arg(more, int) == 18;
    va_end(more);
    unit_check(unit_allowed, "expected arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)");
    return 0;
}

static void unit_configure(const uint8_t *c) {
    unit_check(unit_allowed, "tiles configured before the system was asked");
    unit_check(c[0] == 1, "expected palette 1");
    for (int i = 1; i < 16; i++) unit_check(c[i] == 0, "expected zeros after the palette");
    for (int t = 0; t < 16; t++) {
        int bytes = c[16 + 2 * t] + 256 * c[17 + 2 * t], rows = c[48 + t];
        unit_check(bytes <= 64 && rows <= 16, "a tile has at most 16 rows of 64 bytes");
        unit_check(t < 8 || (!bytes && !rows), "there are 8 tiles");
        if (t < 8) memset(&unit_tile[t], 0, sizeof unit_tile[t]);
        if (t < 8) unit_tile[t].rows = rows, unit_tile[t].bytes = bytes;
    }
}

static void unit_zero(int t) {
    unit_check(unit_tile[t].bytes, "a tile that is not configured");
    memset(unit_tile[t].at, 0, sizeof unit_tile[t].at);
}

static void unit_load(int t, const void *from, long stride) {
    unit_zero(t);
    for (int i = 0; i < unit_tile[t].rows; i++)
        memcpy(unit_tile[t].at[i], (const char *)from + i * stride, unit_tile[t].bytes);
}

static void unit_store(int t, void *to, long stride) {
    unit_check(unit_tile[t].bytes, "a tile that is not configured");
    for (int i = 0; i < unit_tile[t].rows; i++)
        memcpy((char *)to + i * stride, unit_tile[t].at[i], unit_tile[t].bytes);
}

static float unit_float(const uint8_t *bfloat16) {
    float x = 0;
    memcpy((char *)&x + 2, bfloat16, 2);
    return x;
}

// c (M, N) += a (M, 2K) b (2K, N), where b's rows lie in pairs: (K, N, 2)
static void unit_multiply(int c, int a, int b) {
    int M = unit_tile[c].rows, N = unit_tile[c].bytes / 4, K = unit_tile[a].bytes / 4;
    unit_check(M && N && K && unit_tile[a].rows == M && unit_tile[b].rows == K &&
               unit_tile[b].bytes == 4 * N, "tiles whose shapes do not fit");
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum;
            memcpy(&sum, unit_tile[c].at[m] + 4 * n, 4);
            for (int k = 0; k < 2 * K; k++)
                sum += unit_float(unit_tile[a].at[m] + 2 * k) *
                       unit_float(unit_tile[b].at[k / 2] + 4 * n + 2 * (k % 2));
            memcpy(unit_tile[c].at[m] + 4 * n, &sum, 4);
        }
}

#define syscall unit_ask
#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) unit_configure((const uint8_t *)(shape))
#define _tile_loadd(t, from, stride) unit_load(t, from, stride)
#define _tile_stored(t, to, stride) unit_store(t, to, stride)
#define _tile_zero(t) unit_zero(t)
#define _tile_dpbf16ps(c, a, b) unit_multiply(c, a, b)

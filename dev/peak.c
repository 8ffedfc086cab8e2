/*
Prints the rate of independent fused multiply-adds in registers, on all OpenMP threads, in GFLOP/s:
what the arithmetic units can do at most. dev/bench.py builds and runs it beside what it measures.
*/
#define TESTING
#include "../train_gpt2_mla.c"

int main(void) {
    enum { SUMS = 12, STEPS = 40000000 };  // 12 sums hide the latency of any multiply-add unit of today
    double start = seconds();
    volatile real sink = 0;
    #pragma omp parallel
    {
        vec acc[SUMS], x, y;
        for (int i = 0; i < VW; i++) x[i] = (real)0.999, y[i] = (real)1e-3;
        for (int i = 0; i < SUMS; i++) acc[i] = y * (real)i;
        for (long k = 0; k < STEPS; k++) {
            #pragma GCC unroll 12
            for (int i = 0; i < SUMS; i++) acc[i] = acc[i] * x + y;
        }
        real sum = 0;
        for (int i = 0; i < SUMS; i++) sum += acc[i][0];
        sink = sum;
    }
    (void)sink;
    printf("%.1f\n", 2.0 * SUMS * VW * STEPS * omp_get_max_threads() / (seconds() - start) / 1e9);
    return 0;
}

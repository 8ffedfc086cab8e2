// What the processor and its memory can do at most: the yardsticks of dev/speed/*.c. To be included
// after train_gpt2_mla.c, whose vectors and clock it uses.

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n) {  // sorts x
    qsort(x, n, sizeof *x, by_size);
    return x[n / 2];
}

// GB/s at which all threads together read a gigabyte.
static double read_bandwidth(void) {
    static real *x;
    long n = (1L << 30) / sizeof(real);
    real sink = 0;
    if (!x) x = allocate(n * sizeof(real), "bandwidth");
    double start = seconds();
    #pragma omp parallel for reduction(+:sink)
    for (long i = 0; i < n; i += 16 * VW) {
        vec sum = {0};
        for (int j = 0; j < 16 * VW; j += VW) sum += *(const vec *)(x + i + j);
        sink += sum[0];
    }
    volatile real used = sink;  // so that the loop is not left out
    (void)used;
    return n * sizeof(real) / (seconds() - start) / 1e9;
}

// GFLOP/s of independent multiply-adds in registers, on all threads. Twelve sums hide the latency
// of any multiply-add unit of today.
static double multiply_add_peak(void) {
    enum { SUMS = 12, STEPS = 20000000 };
    real sink = 0;
    double start = seconds();
    #pragma omp parallel reduction(+:sink)
    {
        vec acc[SUMS], x, y;
        for (int i = 0; i < VW; i++) x[i] = (real)0.999, y[i] = (real)1e-3;
        for (int i = 0; i < SUMS; i++) acc[i] = y * (real)i;
        for (long k = 0; k < STEPS; k++) {
            #pragma GCC unroll 12
            for (int i = 0; i < SUMS; i++) acc[i] = acc[i] * x + y;
        }
        for (int i = 0; i < SUMS; i++) sink += acc[i][0];
    }
    volatile real used = sink;
    (void)used;
    return 2.0 * SUMS * VW * STEPS * omp_get_max_threads() / (seconds() - start) / 1e9;
}

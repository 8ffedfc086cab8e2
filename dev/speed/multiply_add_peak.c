// Prints the multiply-add peak of all OpenMP threads in GFLOP/s. dev/speed/training_speed.py runs
// it beside what it measures.
#define TESTING
#include "../../train_gpt2_mla.c"
#include "machine_limits.h"

int main(void) {
    printf("%.1f\n", multiply_add_peak());
    return 0;
}

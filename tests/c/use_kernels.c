/* A C program that uses the kernels by their header and library alone. Prints what it found;
 * ends with status 0 if all is right. */
#include <hpcsync_kernels.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { COUNT = 1000 };

static int failures;

static void check(int right, const char *what) {
    printf("%-40s %s\n", what, right ? "ok" : "WRONG");
    failures += !right;
}

static void sums(const float *values) {
    float first[COUNT], second[COUNT], wanted[COUNT];
    const float *const sources[] = {values, values, values};
    float *const outs[] = {first, second};
    for (int i = 0; i < COUNT; ++i) wanted[i] = (values[i] + values[i] + values[i]) / 3.0f;
    hpcsync_add_f32(outs, 2, sources, 3, COUNT, 3.0f);
    check(!memcmp(first, wanted, sizeof wanted) && !memcmp(second, wanted, sizeof wanted),
          "add_f32: mean of three, written twice");
}

int main(void) {
    float values[COUNT];
    for (int i = 0; i < COUNT; ++i) values[i] = sinf((float)i) * expf(0.01f * (float)(i % 100));
    check(hpcsync_abi_version() == HPCSYNC_ABI_VERSION, "the version of the ABI");
    check(hpcsync_use_isa("abacus") == -1, "an unknown instruction set is refused");
    const char *const isas[] = {"plain", "avx2", "avx512"};
    for (int i = 0; i < 3; ++i) {
        if (hpcsync_use_isa(isas[i]) != 0) continue;
        printf("%s:\n", hpcsync_isa());
        check(!strcmp(hpcsync_isa(), isas[i]), "the instruction set in use");
        sums(values);
    }
    return failures != 0;
}

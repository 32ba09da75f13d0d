/* A C program that uses the kernels by their header and library alone. Prints what it found;
 * ends with status 0 if all is right. */
#include <hpcsync_kernels.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { COUNT = 1000 };

static int failures;

static void check(int right, const char *what) {
    printf("%-46s %s\n", what, right ? "ok" : "WRONG");
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

/* The codecs whose functions have these shapes. */
typedef struct {
    const char *name;
    size_t (*bytes)(size_t);
    void (*encode)(const float *, float *, size_t, int, uint64_t, uint8_t *);
    void (*decode)(const uint8_t *, size_t, float *);
    void (*decode_add)(const uint8_t *, size_t, float *);
    double wrong; /* most that a value may be off, as a share of the largest */
} codec;

static double largest(const float *values) {
    double most = 0;
    for (int i = 0; i < COUNT; ++i) most = fmax(most, fabs((double)values[i]));
    return most;
}

static double distance(const float *a, const float *b) {
    double most = 0;
    for (int i = 0; i < COUNT; ++i) most = fmax(most, fabs((double)a[i] - (double)b[i]));
    return most;
}

/* Code and decode, with an error store that makes up for what was lost. */
static void round_trip(const codec *c, const float *values) {
    uint8_t coded[4 * COUNT + 64];
    float once[COUNT], twice[COUNT], error[COUNT] = {0}, mean[COUNT];
    const size_t bytes = c->bytes(COUNT);
    check(bytes < sizeof(float) * COUNT, c->name);
    memset(coded, 0xA5, sizeof coded);
    c->encode(values, error, COUNT, 0, 0, coded);
    check(coded[bytes] == 0xA5, "    nothing written behind the coded piece");
    c->decode(coded, COUNT, once);
    check(distance(once, values) <= c->wrong * largest(values), "    decoded as near as promised");
    memcpy(twice, once, sizeof once);
    c->encode(values, error, COUNT, 1, 7, coded);
    c->decode_add(coded, COUNT, twice);
    for (int i = 0; i < COUNT; ++i) mean[i] = (twice[i] + error[i]) / 2;
    check(distance(mean, values) <= 1e-5 * largest(values), "    the error store holds the rest");
}

static void int4(const float *values) {
    uint8_t coded[COUNT], exponents[COUNT / 256 + 1] = {0};
    int8_t error[COUNT] = {0};
    float decoded[COUNT], total[COUNT] = {0}, wanted[COUNT];
    const int steps = 64;
    check(hpcsync_int4_bytes(COUNT) < COUNT, "int4: fewer bytes than elements");
    for (int step = 0; step < steps; ++step) {
        hpcsync_int4_encode(values, error, exponents, 0.0f, COUNT, 0, (uint64_t)step, coded);
        hpcsync_int4_decode_add(coded, COUNT, total);
    }
    hpcsync_int4_decode(coded, COUNT, decoded);
    double lost = 0, all = 0;
    for (int i = 0; i < COUNT; ++i) {
        lost += ((double)decoded[i] - (double)values[i]) * ((double)decoded[i] - (double)values[i]);
        all += (double)values[i] * (double)values[i];
    }
    check(sqrt(lost / all) < 0.5, "    decoded as near as promised");
    for (int i = 0; i < COUNT; ++i) wanted[i] = (float)steps * values[i];
    check(distance(total, wanted) <= largest(values), "    steps add up to what was put in");
}

static void not_finite(const float *values) {
    uint8_t coded[4 * COUNT];
    float bad[COUNT], decoded[COUNT];
    memcpy(bad, values, sizeof bad);
    bad[300] = INFINITY;
    hpcsync_int8_encode(bad, NULL, COUNT, 0, 0, coded);
    hpcsync_int8_decode(coded, COUNT, decoded);
    check(isnan(decoded[300]) && !isnan(decoded[0]), "int8: Inf makes its block NaN");
}

#define CODEC(NAME, WRONG)                                                               \
    {#NAME, hpcsync_##NAME##_bytes, hpcsync_##NAME##_encode, hpcsync_##NAME##_decode, \
     hpcsync_##NAME##_decode_add, WRONG}

int main(void) {
    const codec codecs[] = {
        CODEC(bf16, 1.0 / 256), CODEC(fp16, 1.0 / 2048), CODEC(fp8, 1.0 / 16), CODEC(int8, 1.0 / 254)};
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
        for (size_t c = 0; c < sizeof codecs / sizeof *codecs; ++c) round_trip(&codecs[c], values);
        int4(values);
        not_finite(values);
    }
    return failures != 0;
}

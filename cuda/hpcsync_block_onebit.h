// Block maths of the codec onebit, for host and device: see hpcsync_block.h for the rules.
//
// h = x + error is coded as its sign bits and one scale a block, the mean of |h|; decoding gives
// plus or minus the scale. Sums over a block: 16 partial sums, element i in number i mod 16, added
// to each other at distance 8, then 4, 2 and 1. (1-bit SGD: Seide et al. 2014; the mean as scale:
// Tang et al. 2021, arXiv 2102.02888.)
#pragma once

#include "hpcsync_block.h"

#define HPCSYNC_ONEBIT_BLOCK 1024
#define HPCSYNC_ONEBIT_SHRINK 0.0009765625f  // 2^-10

// A block's sum from its 16 partial sums, which are overwritten.
HPCSYNC_HD float hpcsync_onebit_total(float *sums) {
    for (int step = 8; step; step >>= 1)
        for (int i = 0; i < step; ++i) sums[i] = sums[i] + sums[i + step];
    return sums[0];
}

// The scale: the sum of |h| over the count of elements. If the sum is not finite, `shrunk`, the
// sum of |h| * HPCSYNC_ONEBIT_SHRINK, tells whether it was only too large. NaN if the block holds
// a NaN or Inf.
HPCSYNC_HD float hpcsync_onebit_scale(float total, float shrunk, uint32_t count) {
    float mean = hpcsync_finite(total) ? total / (float)count
                                       : shrunk / ((float)count * HPCSYNC_ONEBIT_SHRINK);
    return hpcsync_finite(mean) ? mean : hpcsync_float(HPCSYNC_NAN_BITS);
}

// The scale with the sign of a bit.
HPCSYNC_HD float hpcsync_onebit_value(float scale, uint32_t bit) {
    return hpcsync_float(hpcsync_bits(scale) ^ (bit << 31));
}

// mm_scale.h - what becomes of the integers that avx2's tiles of 3 rows and more sum (mm_words.h, mm_nibbles.h): scales
// and zeros, as mm_int8_groups.h multiplies them, so its bits.
//
// The tiles need all registers for themselves; their sums wait in L1. Everything that a call could decide is a
// compile-time constant: with row counts and kinds of zeros in variables, 6 rows of panels in L2 made 126 instead of
// 147 GOP/s of int4 in groups of 32 on a Zen 3 core, 85 instead of 97 of int8 (dot roof 193).
#ifndef PACE_MM_SCALE_H
#define PACE_MM_SCALE_H

#include "mm_int8_groups.h"

#define MS_ROWS MQ_WIDE
#define MS_COLUMNS (2 * VL)

// Columns c .. c + 15 of group g's sums [mr][PACE_NR] to t->c.
INLINE void ms_scale(const int mr, const int layout, const int symmetric, const int whole, const mq_args *t,
                     const uint8_t *block, long g, long c, const int32_t *sums) {
    const int8_t *beside = t->a + t->width + 4 * g;
    vf scale[2], zero[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        scale[j] = gr_load(block, t->scales, c + j * VL);
        if (!symmetric) zero[j] = mq_zero(t, block, c + j * VL, scale[j]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++, beside += t->lda) {
        float row;
        int32_t x;
        memcpy(&row, beside, 4);
        memcpy(&x, beside + 4 * t->groups, 4);
        const vi begin = mq_begin(layout, x);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            float *const at = t->c + r * PACE_NR + c + j * VL;
            vi sum = vi_load(sums + r * PACE_NR + j * VL);
            if (symmetric) sum = _mm256_add_epi32(sum, begin);
            vf y = v_mul(vi_float(sum), v_set(row));
            y = whole ? v_mul(y, scale[j]) : v_fma(y, scale[j], g > 0 ? v_load(at) : v_zero());
            v_store(at, symmetric ? y : v_fma(v_set(mq_less(row, x)), zero[j], y));
        }
    }
}

typedef void ms_scaler(const mq_args *t, const uint8_t *block, long g, long c, const int32_t *sums);
#define MS_SCALER(layout, MR, symmetric, whole)                                          \
    static __attribute__((noinline)) void ms_scale_##layout##_##MR##_##symmetric##whole( \
        const mq_args *t, const uint8_t *block, long g, long c, const int32_t *sums) {   \
        ms_scale(MR, layout, symmetric, whole, t, block, g, c, sums);                    \
    }
#define MS_KINDS(X, layout, MR) X(layout, MR, 0, 0) X(layout, MR, 0, 1) X(layout, MR, 1, 0) X(layout, MR, 1, 1)
#define MS_ALL(layout)             \
    MS_KINDS(MS_SCALER, layout, 3) \
    MS_KINDS(MS_SCALER, layout, 4) MS_KINDS(MS_SCALER, layout, 5) MS_KINDS(MS_SCALER, layout, 6)
MS_ALL(PACE_INT8)
MS_ALL(PACE_INT4)
#undef MS_ALL
#define MS_NAME(layout, MR, symmetric, whole) ms_scale_##layout##_##MR##_##symmetric##whole,
#define MS_ALL(layout)                                                                                    \
    {                                                                                                     \
        {MS_KINDS(MS_NAME, layout, 3)}, {MS_KINDS(MS_NAME, layout, 4)}, {MS_KINDS(MS_NAME, layout, 5)}, { \
            MS_KINDS(MS_NAME, layout, 6)                                                                  \
        }                                                                                                 \
    }
static ms_scaler *const ms_scalers[2][4][4] = {MS_ALL(PACE_INT8), MS_ALL(PACE_INT4)};
INLINE ms_scaler *ms_scale_of(int layout, int mr, const mq_args *t) {
    return ms_scalers[layout == PACE_INT4][mr - 3][2 * (t->zeros == PACE_SYMMETRIC) + mq_is_whole(t)];
}
#undef MS_NAME
#undef MS_ALL
#undef MS_KINDS
#undef MS_SCALER

#endif

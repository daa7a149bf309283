// quantise.h - rows of bf16, f16 or f32 to codes and scales, while a checkpoint is loaded: round to nearest, and for
// int4 the scale that leaves the least error.
//
//   int8  scale amax / 127. (A search gains nothing: of 256 steps none is worth clipping for.)
//   int4  the extreme of a group becomes -8, or with up to 14 % more scale -7, or with up to 30 % less it is clipped.
//         Scales may be negative, so that the extreme's side has the eighth step. What counts is the square of the
//         error, in groups of 128 times |x|: the plain square clips the few large weights of so long a group, which
//         matter most. Perplexity over bf16 in groups of 128 of SmolLM2-135M / of the embedded model: plain +39 / +1.4
//         %, times |x| +27 / +2.5 %, extreme at -8 without a search +31 / +2.7 %. In groups of 32: plain +19 / +0.5 %,
//         no search +18 / +1.1 %: neither is better on both.
//   FP8   scale amax / 448, the largest number of E4M3.
#ifndef PACE_QUANTISE_H
#define PACE_QUANTISE_H

#include "groups.h"

enum { QU_TRIALS = 16 };
#define QU_FIRST 0.70f
#define QU_STEP 0.03f  // up to 1.15

INLINE float qu_round(float scale, int type) {
    return type == PACE_SCALES_BF16 ? bf16_to_f32(f32_to_bf16(scale)) : scale;
}

INLINE void qu_floats(float *dst, const void *src, int dtype, long n) {
    long i = 0;
    for (; i + VL <= n; i += VL)
        v_store(dst + i, dtype == 0   ? v_load_bf16((const bf16 *)src + i)
                         : dtype == 1 ? v_load_f16((const uint16_t *)src + i)
                                      : v_load((const float *)src + i));
    for (; i < n; i++)
        dst[i] = dtype == 0   ? bf16_to_f32(((const bf16 *)src)[i])
                 : dtype == 1 ? _cvtsh_ss(((const uint16_t *)src)[i])
                              : ((const float *)src)[i];
}

// x / scale to the nearest integer from least to most.
INLINE vf qu_steps(vf x, vf inverse, vf least, vf most) {
    return v_min(v_max(v_round(v_mul(x, inverse)), least), most);
}

// Square error of x [n], n a multiple of 16, in steps of scale; weighted: times |x|.
static float qu_error(const float *x, long n, float scale, int weighted) {
    const vf inverse = v_set(1.0f / scale), s = v_set(scale), least = v_set(-8.0f), most = v_set(7.0f);
    vf sum = v_zero();
    for (long i = 0; i < n; i += VL) {
        const vf e = v_fnma(qu_steps(v_load(x + i), inverse, least, most), s, v_load(x + i));
        const vf size = v_max(v_load(x + i), v_sub(v_zero(), v_load(x + i)));
        sum = v_fma(v_mul(e, e), weighted ? size : v_set(1.0f), sum);
    }
    return v_sum(sum);
}

static float qu_scale(const float *x, long n, const pace_matrix *w) {
    float low = 0.0f, high = 0.0f, bad = 0.0f;
    for (long i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        bad += x[i] * 0.0f;  // NaN for a NaN or an infinity
    }
    const float top = (high > -low ? high : -low) + bad;
    if (w->layout != PACE_INT4) return qu_round(top / (w->layout == PACE_FP8 ? 448.0f : 127.0f), w->scales);
    const float eighth = (high > -low ? high : low) / -8.0f + bad;
    const int weighted = w->group == 128;
    float best = qu_round(eighth, w->scales), least = best != 0.0f ? qu_error(x, n, best, weighted) : 0.0f;
    for (int i = 0; least > 0.0f && i < QU_TRIALS; i++) {
        const float scale = qu_round(eighth * (QU_FIRST + QU_STEP * (float)i), w->scales);
        const float error = scale != 0.0f ? qu_error(x, n, scale, weighted) : least;
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

// To the nearest number of E4M3, ties to even; |x| up to 448, or a little more.
INLINE uint8_t qu_e4m3(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint8_t sign = (uint8_t)(u >> 24 & 128);
    const float size = x < 0.0f ? -x : x;
    if (size < 0x1p-6f) return sign | (uint8_t)__builtin_rintf(size * 512.0f);  // steps of 2^-9
    const float held = size < 448.0f ? size : 448.0f;
    memcpy(&u, &held, 4);
    u += 0x7ffffu + (u >> 20 & 1);
    return sign | (uint8_t)((u >> 20) - (120u << 3));
}

// See quantise_rows of pace_kernels.
static void quantise_rows(uint8_t *codes, void *scales, float *row, const pace_matrix *w, const void *src, int dtype,
                          long ld, long rows) {
    const long groups = (w->k + w->group - 1) / w->group, zero = w->layout == PACE_INT4 ? 8 : 128;
    const vf least = v_set((float)-zero), most = v_set((float)(zero - 1));
    for (long r = 0; r < rows; r++, codes += w->k) {
        memset(row, 0, (size_t)w->k_pad * sizeof(float));
        qu_floats(row, (const char *)src + r * ld * (dtype == 2 ? 4 : 2), dtype, w->k);
        for (long g = 0; g < groups; g++) {
            const long at = g * w->group, left = w->k_pad - at, n = left < w->group ? left : w->group;
            const float *x = row + at;
            const float scale = qu_scale(x, n, w), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
            if (w->scales == PACE_SCALES_F32)
                ((float *)scales)[r * groups + g] = scale;
            else
                ((bf16 *)scales)[r * groups + g] = f32_to_bf16(scale);
            for (long i = 0; i < n && at + i < w->k; i += VL) {
                _Alignas(64) float q[VL];
                v_store(q, w->layout == PACE_FP8 ? v_mul(v_load(x + i), v_set(inverse))
                                                 : qu_steps(v_load(x + i), v_set(inverse), least, most));
                const long end = w->k - at - i < VL ? w->k - at - i : VL;
                for (long l = 0; l < end; l++)
                    codes[at + i + l] = w->layout == PACE_FP8 ? qu_e4m3(q[l]) : (uint8_t)((int)q[l] + zero);
            }
        }
    }
}

#endif

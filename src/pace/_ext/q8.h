// q8.h - panels of int8 with a scale per column (PACE_INT8 in kernels.h): packing, and weights as bf16, which integers
// up to 128 are exactly. On bf16 rows every tier expands a chunk of a panel and multiplies it like any other; the
// column's scale comes last, once.
#ifndef PACE_Q8_H
#define PACE_Q8_H

#include "simd.h"

INLINE const uint8_t *q8_panel(const pace_matrix *w, long p) {
    return (const uint8_t *)w->data + p * pace_panel_bytes(w);
}

// Signed words, |x| <= 128, as bf16.
#ifdef __AVX512F__
typedef __m512i q8_words;
INLINE q8_words q8_bf16(q8_words x) {
    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16));
    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 16));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                   _mm512_castps_si512(odd));
}
INLINE q8_words q8_load(const uint8_t *p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
INLINE q8_words q8_first(q8_words x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
INLINE q8_words q8_second(q8_words x) { return _mm512_srai_epi16(x, 8); }
INLINE void q8_store(bf16 *p, q8_words x) { _mm512_storeu_si512(p, x); }
#else
typedef __m256i q8_words;
INLINE q8_words q8_bf16(q8_words x) {
    const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16));
    const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 16));
    return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd), 0xaa);
}
INLINE q8_words q8_load(const uint8_t *p) {
    return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8(-128));
}
INLINE q8_words q8_first(q8_words x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INLINE q8_words q8_second(q8_words x) { return _mm256_srai_epi16(x, 8); }
INLINE void q8_store(bf16 *p, q8_words x) { _mm256_storeu_si256((__m256i *)p, x); }
#endif

// k0 .. k0 + kc of panel p as a panel of bf16 at dst, scales apart; both are multiples of 32.
static const bf16 *q8_expand(bf16 *dst, const pace_matrix *w, long p, long k0, long kc) {
    const uint8_t *codes = q8_panel(w, p) + PACE_NR * sizeof(float) + k0 * PACE_NR;
    for (long k = 0; k < kc; k += 8, codes += 8 * PACE_NR, dst += 8 * PACE_NR) {
#pragma GCC unroll 4
        for (uintptr_t i = 0; i < 4; i++) FETCH((uintptr_t)codes + 4096 + 64 * i, _MM_HINT_T0);
        for (long c = 0; c < PACE_NR; c += VL) {  // 4 bytes a column: k 0 4 1 5, then 2 6 3 7
            const q8_words low = q8_load(codes + 4 * c), high = q8_load(codes + 4 * PACE_NR + 4 * c);
            q8_store(dst + 2 * c, q8_bf16(q8_first(low)));
            q8_store(dst + 2 * PACE_NR + 2 * c, q8_bf16(q8_first(high)));
            q8_store(dst + 4 * PACE_NR + 2 * c, q8_bf16(q8_second(low)));
            q8_store(dst + 6 * PACE_NR + 2 * c, q8_bf16(q8_second(high)));
        }
    }
    return dst - kc * PACE_NR;
}

// c [rows][ldc] times the scales of panel p.
static void q8_scale(const pace_matrix *w, long p, long rows, float *c, long ldc) {
    const float *scales = (const float *)(const void *)q8_panel(w, p);
    for (long r = 0; r < rows; r++, c += ldc)
        for (long i = 0; i < PACE_NR; i += VL) v_store(c + i, v_mul(v_load(c + i), v_load(scales + i)));
}

// Up to 16 rows of int8 [rows][ld] with a scale each to half a panel, integers beyond k zero. Returns the first row
// whose scale is no finite number, or -1.
static long pack_int8(uint8_t *dst, const int8_t *src, const float *scales, long ld, long rows, long k, long k_pad,
                      long half) {
    static const uint8_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    uint8_t *codes = dst + PACE_NR * sizeof(float) + half * 64;
    for (long c = 0; c < rows; c++) {
        if (!(scales[c] - scales[c] == 0.0f)) return c;
        memcpy(dst + (half * 16 + c) * 4, scales + c, 4);
    }
    for (long k0 = 0; k0 < k_pad; k0 += 8, codes += 8 * PACE_NR)
        for (long c = 0; c < 16; c++)
            for (long i = 0; i < 8; i++) {
                const long at = k0 + order[i];
                const int8_t q = c < rows && at < k ? src[c * ld + at] : 0;
                codes[i / 4 * 4 * PACE_NR + c * 4 + i % 4] = (uint8_t)(q + 128);
            }
    return -1;
}

// Packed column `row` as f32.
static void q8_unpack_row(float *dst, const pace_matrix *w, long row) {
    const uint8_t *panel = q8_panel(w, row / PACE_NR);
    float scale;
    memcpy(&scale, panel + row % PACE_NR * 4, 4);
    for (long k = 0; k < w->k; k++) dst[k] = (float)pace_int8_code(panel, row % PACE_NR, k) * scale;
}

#endif

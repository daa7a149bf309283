// mm_int8.h - dot products of integers, and the register tile of int8 rows and MXFP4: C[mr][cols] is the sum over
// groups g of 32, ascending, of
//
//     scale[r][g] * scale[c][g] * (sum over k of u[c][k] q[r][k]  -  zero * sum over k of q[r][k])
//
// Dot products want unsigned times signed, so weights are unsigned: u is twice a code's value plus PACE_INT8_ZERO, from
// a table. The sum of q, which corrects that, is a property of the row and the group alone, and the row brings it (see
// pace_slot). Integers are exact; a group's sum is multiplied by the row's scale, which rounds, and added in one fma
// with the weight's, 2^(e - 128). So an element is the same at every mr.
//
//   tier         two dot products of 4 k and 16 columns, one row; MXFP4 also a load, a shift and 2 lookups for all rows
//   avx512bf16 avx512vnni  2 vpdpbusd
//   avx512 avx2  MXFP4: 2 vpmaddubsw, vpaddw, vpmaddwd, vpaddd. vpmaddubsw adds two products of at most 28 * 127 in 16
//                bits, the vpaddw two of those: 14224, far from saturation. int8: 255 * 127 twice is not, so bytes are
//                widened to words: 4 vpmaddwd.
//
// GCC 12 copies the accumulators of _mm512_dpbusd_epi32 (half the speed); a line of assembly does not.
#ifndef PACE_MM_INT8_H
#define PACE_MM_INT8_H

#include "groups.h"
#include "mxfp4.h"

#define MI_VALUE(x) PACE_INT8_ZERO + (x)
#define MI_VALUES                                                                                            \
    MI_VALUE(0), MI_VALUE(1), MI_VALUE(2), MI_VALUE(3), MI_VALUE(4), MI_VALUE(6), MI_VALUE(8), MI_VALUE(12), \
        MI_VALUE(0), MI_VALUE(-1), MI_VALUE(-2), MI_VALUE(-3), MI_VALUE(-4), MI_VALUE(-6), MI_VALUE(-8), MI_VALUE(-12)
static const _Alignas(64) uint8_t mi_values[64] = {MI_VALUES, MI_VALUES, MI_VALUES, MI_VALUES};

#ifdef __AVX512F__
// 12 integer and 12 f32 accumulators, 4 values, the table and a broadcast. (13 rows of one vector: 7 cycles a row and 8
// k of 32 columns instead of 5.1, where its dot products take 4 and its products and sums in f32 one.)
#define MI_ROWS 6
#define MI_VECTORS 2
typedef __m512i vi;
INLINE vi mi_first(vi x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }  // of two signed bytes in a word
INLINE vi mi_second(vi x) { return _mm512_srai_epi16(x, 8); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_high(vi x) { return _mm512_srli_epi16(x, 4); }
INLINE vi vi_times_8(vi x) { return _mm512_slli_epi32(x, 3); }
INLINE vf vi_float(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vi mi_lookup(vi x, vi table) {
#ifdef __AVX512VBMI__
    return _mm512_permutexvar_epi8(x, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(x, _mm512_set1_epi8(15)));
#endif
}
// 2^(e - 128) of VL columns; 0 for e 0 and 1, which no product can tell.
INLINE vf mi_scales(const uint8_t *e) {
    const __m128i x = _mm_subs_epu8(_mm_loadu_si128((const __m128i *)e), _mm_set1_epi8(1));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(x), 23));
}
// acc += u0 . q0 + u1 . q1 per column of four bytes; wide: u is up to 255.
INLINE vi mi_dot(vi acc, const int wide, vi u0, vi q0, vi u1, vi q1) {
#ifdef __AVX512VNNI__
    (void)wide;
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u0), "v"(q0));
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u1), "v"(q1));
    return acc;
#else
    if (wide) {
        const vi byte = _mm512_set1_epi16(255);
        const vi even = _mm512_add_epi32(_mm512_madd_epi16(_mm512_and_si512(u0, byte), mi_first(q0)),
                                         _mm512_madd_epi16(_mm512_and_si512(u1, byte), mi_first(q1)));
        const vi odd = _mm512_add_epi32(_mm512_madd_epi16(_mm512_srli_epi16(u0, 8), mi_second(q0)),
                                        _mm512_madd_epi16(_mm512_srli_epi16(u1, 8), mi_second(q1)));
        return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
    }
    const vi pairs = _mm512_add_epi16(_mm512_maddubs_epi16(u0, q0), _mm512_maddubs_epi16(u1, q1));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
#else
#define MI_ROWS 3  // 8 columns: 3 + 3, scales, table, mask, ones, 2 values, 2 broadcasts
#define MI_VECTORS 1
typedef __m256i vi;
INLINE vi mi_first(vi x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
INLINE vi mi_second(vi x) { return _mm256_srai_epi16(x, 8); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_high(vi x) { return _mm256_srli_epi16(x, 4); }
INLINE vi vi_times_8(vi x) { return _mm256_slli_epi32(x, 3); }
INLINE vf vi_float(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vi mi_lookup(vi x, vi table) { return _mm256_shuffle_epi8(table, _mm256_and_si256(x, _mm256_set1_epi8(15))); }
INLINE vf mi_scales(const uint8_t *e) {
    const __m128i x = _mm_subs_epu8(_mm_loadl_epi64((const __m128i *)e), _mm_set1_epi8(1));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(x), 23));
}
INLINE vi mi_dot(vi acc, const int wide, vi u0, vi q0, vi u1, vi q1) {
    if (wide) {
        const vi byte = _mm256_set1_epi16(255);
        const vi even = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(u0, byte), mi_first(q0)),
                                         _mm256_madd_epi16(_mm256_and_si256(u1, byte), mi_first(q1)));
        const vi odd = _mm256_add_epi32(_mm256_madd_epi16(_mm256_srli_epi16(u0, 8), mi_second(q0)),
                                        _mm256_madd_epi16(_mm256_srli_epi16(u1, 8), mi_second(q1)));
        return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
    }
    const vi pairs = _mm256_add_epi16(_mm256_maddubs_epi16(u0, q0), _mm256_maddubs_epi16(u1, q1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Columns from `vector` * VL on; mr and fetch are compile-time constants in every call.
INLINE void mi_tile(const int mr, const int fetch, const mx_args *t, int vector) {
    enum { nv = MI_VECTORS };
    const vi table = vi_load(mi_values);
    vf sum[MI_ROWS][nv];
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) sum[r][j] = v_zero();
    const int8_t *a[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) a[i] = (const int8_t *)t->a + (3 * i < mr ? 3 * i : 0) * t->lda;
    const long lda = t->lda, groups = t->k / PACE_MX_GROUP, at_scales = t->k, at_sums = t->k + 4 * groups;
    const long step = 4 * PACE_NR;  // bytes of 8 k
    const uint8_t *scales = t->b + vector * VL, *codes = t->b + 2 * PACE_NR + vector * VL * 4;
    uintptr_t share = t->share;
    for (long i = 0; i < groups; i++) {
        if (fetch == MX_SHARE) mx_fetch_share(&share, t->share_step, MX_SHARE_LINES);
        if (fetch == MX_AHEAD) FETCH((uintptr_t)scales + MX_BYTES_AHEAD, _MM_HINT_T0);
        vi acc[MI_ROWS][nv];
        const long beside = i * 4 - i * PACE_MX_GROUP;  // a has moved on; scales and sums are 4 bytes a group
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            int32_t zero;
            memcpy(&zero, a[r / 3] + (r % 3) * lda + at_sums + beside, 4);
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) acc[r][j] = vi_set(zero);
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            vi low[nv], high[nv];
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) {
                const uint8_t *at = codes + q * step + j * VL * 4;
                const vi x = vi_load(at);
                low[j] = mi_lookup(x, table);
                high[j] = mi_lookup(vi_high(x), table);
            }
#pragma GCC unroll 4
            for (long line = 0; fetch == MX_AHEAD && line < step; line += 64)
                FETCH((uintptr_t)codes + (uintptr_t)(q * step + line) + MX_BYTES_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                int32_t x[2];
                memcpy(x, a[r / 3] + (r % 3) * lda + 8 * q, 8);
#pragma GCC unroll 2
                for (int j = 0; j < nv; j++)
                    acc[r][j] = mi_dot(acc[r][j], 0, low[j], vi_set(x[0]), high[j], vi_set(x[1]));
            }
        }
        vf weight[nv];
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) weight[j] = mi_scales(scales + j * VL);
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            float row;
            memcpy(&row, a[r / 3] + (r % 3) * lda + at_scales + beside, 4);
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++)
                sum[r][j] = v_fma(v_mul(vi_float(acc[r][j]), v_set(row)), weight[j], sum[r][j]);
        }
        codes += 4 * step;
        scales += PACE_NR;
        if (i % 2) {  // the next block
            scales += PACE_MX_BLOCK - 2 * PACE_NR;
            codes += 2 * PACE_NR;
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) a[r] += PACE_MX_GROUP;
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) v_store(t->c + r * t->ldc + (vector + j) * VL, sum[r][j]);
}

// mr <= MI_ROWS rows of an int8 slot times a panel of MXFP4.
static void mi_rows(int mr, int fetch, const mx_args *t) {
#define MI_CASE(MR)                           \
    case MR:                                  \
        if (MR > MI_ROWS) break;              \
        if (fetch == MX_AHEAD && v == 0)      \
            mi_tile(MR, MX_AHEAD, t, v);      \
        else if (fetch == MX_SHARE && v == 0) \
            mi_tile(MR, MX_SHARE, t, v);      \
        else                                  \
            mi_tile(MR, MX_NONE, t, v);       \
        break;
    for (int v = 0; v < PACE_NR / VL; v += MI_VECTORS) {
        switch (mr) { MI_CASE(1) MI_CASE(2) MI_CASE(3) MI_CASE(4) MI_CASE(5) MI_CASE(6) }
    }
#undef MI_CASE
}

#endif

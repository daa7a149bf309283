// mm_codes.h - the register tile of few bf16 rows on int8, int4 and FP8 as they lie in memory, of tiers without dot
// products of bf16: the sums of mm.h and mm_groups.h in their order, so their bits.
//
// A code becomes f32 in registers and meets rows in f32. Expanded to bf16 in L1 (gr_expand) it is stored, loaded and
// widened once more. A decode step of the 1B shape on two Cascade Lake cores beside working siblings, matrices' share
// of the read roof that way / this, two runs: FP8 0.53 / 0.78 to 0.88, int8 0.58 / 0.65 to 0.89, int4 0.49 / 0.70 to
// 0.98. Time of that way by this in turns, 1 / 4 / 10 rows: FP8 1.5 to 2.0 / 1.1 to 1.2 / 1.2; int8 1.7 to 2.2 / 1.4
// to 1.6 / 1.1 to 1.3; int4 1.9 to 2.1 / 1.3 to 1.4 / 1.0 to 1.3. The tier avx2 on them, 1 / 2 rows: int8 1.5 to 1.6
// / 1.4; int4 1.5 to 1.9 / 1.3; FP8 1.0 to 1.2 / 0.93 to 0.98.
#ifndef PACE_MM_CODES_H
#define PACE_MM_CODES_H

#include "groups.h"
#include "mm_rows.h"

#ifdef __AVX512F__
#define MC_ROWS 10  // 20 sums, 4 weights, codes, a table or zeros; 12 rows spill: half the speed
#define MC_ROWS_FP8 10
#define MC_HOLDS 1  // codes of 8 k in registers
#else
#define MC_ROWS 2
#define MC_ROWS_FP8 1
#define MC_HOLDS 0
#endif
#define MC_VECTORS (PACE_NR / VL)
#define MC_MOST (2 * MC_VECTORS)
#define MC_CHUNK 256   // k; whole groups
#define MC_AHEAD 4096  // bytes

typedef struct {
    const pace_matrix *w;
    const uint8_t *block;  // of the chunk's first group; of the other panel `apart` further on
    long apart;
    long in, k;      // the chunk's first k, from its group's first one; how many
    const float *x;  // rows [mr][MR_STEP]
    float *c;        // [mr][vectors * VL]
    int accumulate;
} mc_args;

// What an even or odd k has in words: integers, numbers of bf16.
#ifdef __AVX512F__
INLINE gr_words mc_low(gr_words x) { return _mm512_slli_epi32(x, 16); }
INLINE gr_words mc_high(gr_words x) { return _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u)); }
INLINE vf mc_integers(gr_words x, const int odd) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(odd ? x : mc_low(x), 16));
}
INLINE vf mc_floats(gr_words x, const int odd) { return _mm512_castsi512_ps(odd ? mc_high(x) : mc_low(x)); }
#else
INLINE gr_words mc_low(gr_words x) { return _mm256_slli_epi32(x, 16); }
INLINE gr_words mc_high(gr_words x) { return _mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000u)); }
INLINE vf mc_integers(gr_words x, const int odd) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(odd ? x : mc_low(x), 16));
}
INLINE vf mc_floats(gr_words x, const int odd) { return _mm256_castsi256_ps(odd ? mc_high(x) : mc_low(x)); }
#endif

// Weights of k 2 p and 2 p + 1 of 8 and VL columns, from the bytes that hold them.
INLINE void mc_pair(vf w[2], const int layout, const int lookup, gr_words x, const int p, gr_words zero) {
#ifdef __AVX512F__
    if (lookup) {  // int4 minus 8: a table knows the 16 values
        const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        w[0] = _mm512_permutexvar_ps(p ? _mm512_srli_epi32(x, (unsigned)(4 * p)) : x, table);
        w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(x, (unsigned)(4 * p + 16)), table);
        return;
    }
#endif
    (void)lookup;
    const gr_words code = layout == PACE_INT4 ? gr_and(gr_right(x, 4 * p), gr_set(15))
                          : p < 2             ? gr_and(x, gr_set(255))
                                              : gr_right(x, 8);
    const gr_words value = layout == PACE_FP8 ? gr_e4m3(code) : gr_sub(code, zero);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) w[odd] = layout == PACE_FP8 ? mc_floats(value, odd) : mc_integers(value, odd);
}

// Vector j: of int8 and FP8 the codes of k 0, 1, 4, 5 or the other ones, of int4 those of 8 k.
INLINE gr_words mc_read(const uint8_t *codes, int j, int other, long apart) {
    return gr_read(codes + j / MC_VECTORS * apart + j % MC_VECTORS * 4 * VL + other * 4 * PACE_NR);
}

// sum += rows times `run` k. mr, nv (vectors, of one panel or two), layout and lookup are compile-time constants here
// and below.
INLINE void mc_products(const int mr, const int nv, const int layout, const int lookup, vf sum[MC_ROWS][MC_MOST],
                        const float *x, const uint8_t *codes, long run, long apart, const gr_words zero[MC_MOST]) {
    const long step = layout == PACE_INT4 ? 4 * PACE_NR : 8 * PACE_NR;
    for (const float *const end = x + run; x != end; x += 8, codes += step) {
#pragma GCC unroll 8
        for (long line = 0; line < step * nv / MC_VECTORS; line += 64)
            FETCH((uintptr_t)codes + (uintptr_t)(line / step * apart + line % step + MC_AHEAD), _MM_HINT_T0);
#if MC_HOLDS
        gr_words held[MC_MOST][2];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            held[j][0] = mc_read(codes, j, 0, apart);
            if (layout != PACE_INT4) held[j][1] = mc_read(codes, j, 1, apart);
        }
#define MC_CODES(j, other) held[j][other]
#else
#define MC_CODES(j, other) mc_read(codes, j, other, apart)
#endif
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++)
#pragma GCC unroll 4
            for (int j0 = 0; j0 < nv; j0 += 2) {
                vf w[2][2];
#pragma GCC unroll 2
                for (int j = j0; j < j0 + 2; j++)
                    mc_pair(w[j - j0], layout, lookup, MC_CODES(j, layout == PACE_INT4 ? 0 : p % 2), p, zero[j]);
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++)
#pragma GCC unroll 10
                    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
                        for (int j = j0; j < j0 + 2; j++)
                            sum[r][j] = v_fma(v_set(x[r * MR_STEP + 2 * p + odd]), w[j - j0][odd], sum[r][j]);
            }
    }
#undef MC_CODES
}

INLINE void mc_tile(const int mr, const int nv, const int layout, const int lookup, const mc_args *t) {
    const pace_matrix *w = t->w;
    const int whole = w->group == w->k_pad;
    const uint8_t *block = t->block;
    for (long k = 0, run; k < t->k; k += run, block += pace_block_bytes(w)) {
        run = t->k - k < w->group ? t->k - k : w->group;
        gr_words zero[MC_MOST];
        vf sum[MC_ROWS][MC_MOST];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            zero[j] = gr_zeros_of(w, block + j / MC_VECTORS * t->apart).v[j % MC_VECTORS];
#pragma GCC unroll 10
            for (int r = 0; r < mr; r++)
                sum[r][j] = whole && t->accumulate ? v_load(t->c + (r * nv + j) * VL) : v_zero();
        }
        mc_products(mr, nv, layout, lookup, sum, t->x + k, block + pace_block_head(w) + t->in * pace_code_bytes(w), run,
                    t->apart, zero);
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            const vf scale = gr_load(block + j / MC_VECTORS * t->apart, w->scales, j % MC_VECTORS * VL);
#pragma GCC unroll 10
            for (int r = 0; r < mr; r++) {
                float *const at = t->c + (r * nv + j) * VL;
                if (!whole) sum[r][j] = v_fma(sum[r][j], scale, t->accumulate || k ? v_load(at) : v_zero());
                v_store(at, sum[r][j]);
            }
        }
    }
}

// Whether sums come out as those of chunks of MC_CHUNK whatever a group is, and the row's own sum has no part in them.
INLINE int mc_takes(const pace_matrix *w, long rows) {
    if (!pace_is_grouped(w) || rows > (w->layout == PACE_FP8 ? MC_ROWS_FP8 : MC_ROWS)) return 0;
    return w->zeros != PACE_OFFSETS && (w->group == w->k_pad || MC_CHUNK % w->group == 0);
}

// 1 .. MC_ROWS rows times a panel, or one row times two; a function for each layout, or the compiler takes minutes.
#define MC_LAYOUT(layout, lookup)                                                                        \
    static __attribute__((noinline)) void mc_##layout##_##lookup(int mr, int panels, const mc_args *t) { \
        if (panels == 2) {                                                                               \
            mc_tile(1, MC_MOST, layout, lookup, t);                                                      \
            return;                                                                                      \
        }                                                                                                \
        switch (mr) { MC_CASES(layout, lookup) }                                                         \
    }
#define MC_CASE(MR, ...)                         \
    case MR:                                     \
        mc_tile(MR, MC_VECTORS, __VA_ARGS__, t); \
        return;
#ifdef __AVX512F__
#define MC_CASES(...)       \
    MC_CASE(1, __VA_ARGS__) \
    MC_CASE(2, __VA_ARGS__) \
    MC_CASE(3, __VA_ARGS__) \
    MC_CASE(4, __VA_ARGS__) \
    MC_CASE(5, __VA_ARGS__) \
    MC_CASE(6, __VA_ARGS__) \
    MC_CASE(7, __VA_ARGS__) \
    MC_CASE(8, __VA_ARGS__) \
    MC_CASE(9, __VA_ARGS__) \
    MC_CASE(10, __VA_ARGS__)
MC_LAYOUT(PACE_INT4, 1)
#else
#define MC_CASES(...)       \
    MC_CASE(1, __VA_ARGS__) \
    MC_CASE(2, __VA_ARGS__)
#endif
MC_LAYOUT(PACE_INT8, 0)
MC_LAYOUT(PACE_INT4, 0)
MC_LAYOUT(PACE_FP8, 0)
#undef MC_LAYOUT
#undef MC_CASES
#undef MC_CASE

static void mc_rows(int mr, int panels, const mc_args *t) {
    const int layout = t->w->layout;
#ifdef __AVX512F__
    if (layout == PACE_INT4 && t->w->zeros == PACE_SYMMETRIC) {
        mc_PACE_INT4_1(mr, panels, t);
        return;
    }
#endif
    (layout == PACE_FP8 ? mc_PACE_FP8_0 : layout == PACE_INT8 ? mc_PACE_INT8_0 : mc_PACE_INT4_0)(mr, panels, t);
}

#endif

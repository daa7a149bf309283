// mm_int8_groups.h - the register tiles of int8 rows and panels of int8 or int4 (kernels.h): products of integers are
// exact in 32 bits, so what is left is when scales come.
//
//   groups  a row's scale per group, which is a weight's group or a part of its column: the sum over groups g,
//   ascending,
//           of scale[c][g] * (scale[r][g] * sum), one product and one fma. Symmetric weights begin with their zero
//           times the sum of the row's integers, which the row brings (see pace_slot); others add it with their own
//           zero or offset, a second fma.
//   whole   a scale for the whole row and one for the whole column: no number but integers inside the loop, so 14 rows
//           fit the registers.
// An element is the same at every mr.
//
// GCC 12 copies the accumulators of _mm512_dpbusd_epi32 (half the speed); a line of assembly does not (mi_dot).
#ifndef PACE_MM_INT8_GROUPS_H
#define PACE_MM_INT8_GROUPS_H

#include "mm_int8.h"

typedef struct {
    const int8_t *a;   // rows [mr][lda]: width integers, then scales, then sums
    const uint8_t *b;  // a panel
    float *c;          // [mr][PACE_NR]
    long lda, width, groups, group;
    long head, step;  // from a block to its codes; from a group's codes to the next ones'
    long scale_step;  // the same of scales: 0 where a column has one
    int scales, zeros;
    uintptr_t fetch;  // 0, or what comes nearer along the way
    long fetch_step;  // bytes of it per 8 k, all passes over the panel together
} mq_args;

#ifdef __AVX512F__
#define MQ_ROWS 6         // 12 integer and 12 f32 accumulators, 4 weights, a mask and broadcasts
#define MQ_WHOLE_ROWS 13  // 26 accumulators, 4 weights, a broadcast; 14 would leave 3
#define MQ_WIDE 0
#define MQ_VECTORS 2
INLINE int mq_vectors(int rows) { return (void)rows, MQ_VECTORS; }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_half(vi x) { return _mm512_srai_epi32(x, 1); }
INLINE vf mq_zeros(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p)));
}
#else
// More rows than these are multiplied by the tiles of mm_words.h and mm_nibbles.h, MQ_WIDE of them at a time.
#define MQ_ROWS 2
#define MQ_WHOLE_ROWS 2
#define MQ_WIDE 6
// One row reads a panel in one pass, two in two: four, each of a quarter of every line, widened a row's bytes four
// times. 1 row from memory on two Zen 3 cores, share of the read roof, four passes / this: int4 in groups of 32 0.79 to
// 0.84 / 0.85 to 0.91, int8 in groups of 128 0.79 to 0.89 / 0.83 to 0.89, of 32 0.83 to 0.88 / 0.93; 2 rows 0.54 to
// 0.74 / 0.75 to 0.77, 0.80 / 0.87 to 0.90, 0.72 / 0.82 to 0.84.
#define MQ_VECTORS 4  // at most
INLINE int mq_vectors(int rows) { return rows == 1 ? 4 : 2; }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_half(vi x) { return _mm256_srai_epi32(x, 1); }
INLINE vf mq_zeros(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#endif

// Weights of 8 k of VL columns, those of the first 4 bytes and of the second.
INLINE void mq_load(vi u[2], const uint8_t *codes, const int layout) {
    const vi x = vi_load(codes), nibble = vi_set(0x0f0f0f0f);
    u[0] = layout == PACE_INT4 ? vi_and(x, nibble) : x;
    u[1] = layout == PACE_INT4 ? vi_and(vi_high(x), nibble) : vi_load(codes + 4 * PACE_NR);
}
INLINE vi mq_begin(const int layout, int32_t sum) {  // PACE_INT8_ZERO is 16; the zeros are 8 and 128
    return layout == PACE_INT4 ? vi_half(vi_set(sum)) : vi_times_8(vi_set(sum));
}
// What a column's zero or offset, the scale in it, is times: minus the sum of the row's integers, times the row's
// scale.
INLINE vf mq_zero(const mq_args *t, const uint8_t *block, long c, vf scale) {
    const uint8_t *at = block + PACE_NR * (t->scales == PACE_SCALES_F32 ? 4 : 2);
    return t->zeros == PACE_ZEROS ? v_mul(mq_zeros(at + 2 * c), scale) : v_sub(v_zero(), gr_load(at, t->scales, c));
}
INLINE float mq_less(float row, int32_t sum) { return row * ((float)sum * (1.0f / PACE_INT8_ZERO)); }

INLINE int mq_passes(int rows) { return PACE_NR / (mq_vectors(rows) * VL); }  // over a panel
// Every line of 8 k, 4 of int8 and 2 of int4: tiles that share a panel need fewer, a lone one all. (Two of int8's: 13
// rows stream 9.6 instead of 14.7 GB/s on a Granite Rapids core, 1 row 13.7 instead of 17.6.)
INLINE void mq_fetch(uintptr_t *at, const int mr, const int layout, long step) {
    const int lines = (layout == PACE_INT8 ? 4 : 2) / mq_passes(mr);
    step /= mq_passes(mr);
#pragma GCC unroll 4
    for (int i = 0; i < lines; i++) FETCH(*at + (uintptr_t)(step / lines * i), _MM_HINT_T1);
    *at += (uintptr_t)step;
}

// Where the pass of columns from c on begins to fetch.
INLINE uintptr_t mq_ahead(const mq_args *t, const int mr, long c) {
    return t->fetch + (uintptr_t)(c / (mq_vectors(mr) * VL) * (t->width / 8) * (t->fetch_step / mq_passes(mr)));
}

// Columns from c on; mr, layout, symmetric and fetch are compile-time constants.
INLINE void mq_groups(const int mr, const int layout, const int symmetric, const int fetch, const mq_args *t, long c) {
    const int nv = mq_vectors(mr);
    vf sum[MQ_ROWS][MQ_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) sum[r][j] = v_zero();
    const long lda = t->lda, bytes = layout == PACE_INT4 ? 4 * PACE_NR : 8 * PACE_NR;
    const int8_t *a[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) a[i] = t->a + (3 * i < mr ? 3 * i : 0) * lda;
    const uint8_t *block = t->b, *codes = t->b + t->head + 4 * c;
    uintptr_t ahead = mq_ahead(t, mr, c);
    const long fetch_step = t->fetch_step;
    for (long g = 0, k = 0; g < t->groups; g++, block += t->scale_step, codes += t->step) {
        const long beside = t->width + 4 * g, sums = beside + 4 * t->groups;
        vi acc[MQ_ROWS][MQ_VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            int32_t x;
            memcpy(&x, a[r / 3] + (r % 3) * lda + sums, 4);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) acc[r][j] = symmetric ? mq_begin(layout, x) : vi_set(0);
        }
        const long end = k + t->group < t->width ? k + t->group : t->width;
        for (const uint8_t *at = codes; k < end; k += 8, at += bytes) {
            vi u[MQ_VECTORS][2];
            if (fetch) mq_fetch(&ahead, mr, layout, fetch_step);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) mq_load(u[j], at + 4 * VL * j, layout);
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                int32_t x[2];
                memcpy(x, a[r / 3] + (r % 3) * lda + k, 8);
#pragma GCC unroll 4
                for (int j = 0; j < nv; j++)
                    acc[r][j] = mi_dot(acc[r][j], layout == PACE_INT8, u[j][0], vi_set(x[0]), u[j][1], vi_set(x[1]));
            }
        }
        vf scale[MQ_VECTORS], zero[MQ_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            scale[j] = gr_load(block, t->scales, c + j * VL);
            if (!symmetric) zero[j] = mq_zero(t, block, c + j * VL, scale[j]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            float row;
            int32_t x;
            memcpy(&row, a[r / 3] + (r % 3) * lda + beside, 4);
            memcpy(&x, a[r / 3] + (r % 3) * lda + sums, 4);
            const float less = mq_less(row, x);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                sum[r][j] = v_fma(v_mul(vi_float(acc[r][j]), v_set(row)), scale[j], sum[r][j]);
                if (!symmetric) sum[r][j] = v_fma(v_set(less), zero[j], sum[r][j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) v_store(t->c + r * PACE_NR + c + j * VL, sum[r][j]);
}

INLINE void mq_whole(const int mr, const int layout, const int symmetric, const int fetch, const mq_args *t, long c) {
    const int nv = mq_vectors(mr);
    const long lda = t->lda, bytes = layout == PACE_INT4 ? 4 * PACE_NR : 8 * PACE_NR, width = t->width;
    const int8_t *a[5];
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) a[i] = t->a + (3 * i < mr ? 3 * i : 0) * lda;
    vi acc[MQ_WHOLE_ROWS][MQ_VECTORS];
#pragma GCC unroll 13
    for (int r = 0; r < mr; r++) {
        int32_t x;
        memcpy(&x, a[r / 3] + (r % 3) * lda + width + 4, 4);
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) acc[r][j] = symmetric ? mq_begin(layout, x) : vi_set(0);
    }
    const uint8_t *codes = t->b + t->head + 4 * c;
    uintptr_t ahead = mq_ahead(t, mr, c);
    const long fetch_step = t->fetch_step;
    for (long k = 0; k < width; k += 8, codes += bytes) {
        vi u[MQ_VECTORS][2];
        if (fetch) mq_fetch(&ahead, mr, layout, fetch_step);
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) mq_load(u[j], codes + 4 * VL * j, layout);
#pragma GCC unroll 13
        for (int r = 0; r < mr; r++) {
            int32_t x[2];
            memcpy(x, a[r / 3] + (r % 3) * lda, 8);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++)
                acc[r][j] = mi_dot(acc[r][j], layout == PACE_INT8, u[j][0], vi_set(x[0]), u[j][1], vi_set(x[1]));
        }
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) a[i] += 8;
    }
#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) {
        const vf scale = gr_load(t->b, t->scales, c + j * VL);
        const vf zero = symmetric ? v_zero() : mq_zero(t, t->b, c + j * VL, scale);
#pragma GCC unroll 13
        for (int r = 0; r < mr; r++) {
            float row;
            int32_t x;
            memcpy(&row, a[r / 3] + (r % 3) * lda, 4);  // the integers have been passed
            memcpy(&x, a[r / 3] + (r % 3) * lda + 4, 4);
            vf y = v_mul(v_mul(vi_float(acc[r][j]), v_set(row)), scale);
            if (!symmetric) y = v_fma(v_set(mq_less(row, x)), zero, y);
            v_store(t->c + r * PACE_NR + c + j * VL, y);
        }
    }
}

#ifdef __AVX512F__
// Int4 codes of k to bytes.
INLINE void mq_widen(uint8_t *to, const uint8_t *codes, long k) {
    const vi nibble = vi_set(0x0f0f0f0f);
    for (long i = 0; i < k; i += 8, codes += 4 * PACE_NR, to += 8 * PACE_NR)
        for (int j = 0; j < 2; j++) {
            const vi x = vi_load(codes + 64 * j);
            _mm512_store_si512(to + 64 * j, vi_and(x, nibble));
            _mm512_store_si512(to + 64 * j + 4 * PACE_NR, vi_and(vi_high(x), nibble));
        }
}
#endif

INLINE int mq_is_whole(const mq_args *t) { return t->groups == 1 && t->scale_step == 0; }
INLINE long mq_most(const mq_args *t) { return MQ_WIDE ? MQ_WIDE : mq_is_whole(t) ? MQ_WHOLE_ROWS : MQ_ROWS; }

// 1 .. mq_most rows, without MQ_WIDE, times a panel; each loop is a function of its own, or the compiler takes minutes.
#define MQ_TILE(kind, layout, symmetric)                                                            \
    static __attribute__((noinline)) void kind##_##layout##_##symmetric(int mr, const mq_args *t) { \
        const int fetch = t->fetch != 0;                                                            \
        switch (mr) { MQ_CASES(kind, layout, symmetric) }                                           \
    }
#define MQ_CASE(MR, MOST, kind, layout, symmetric)              \
    case MR:                                                    \
        if (MR > MOST) break;                                   \
        for (long c = 0; c < PACE_NR; c += mq_vectors(MR) * VL) \
            if (fetch)                                          \
                kind(MR, layout, symmetric, 1, t, c);           \
            else                                                \
                kind(MR, layout, symmetric, 0, t, c);           \
        break;
#define MQ_6(MOST, ...)           \
    MQ_CASE(1, MOST, __VA_ARGS__) \
    MQ_CASE(2, MOST, __VA_ARGS__) \
    MQ_CASE(3, MOST, __VA_ARGS__) \
    MQ_CASE(4, MOST, __VA_ARGS__) MQ_CASE(5, MOST, __VA_ARGS__) MQ_CASE(6, MOST, __VA_ARGS__)
#define MQ_CASES(kind, layout, symmetric) MQ_6(MQ_ROWS, kind, layout, symmetric)
MQ_TILE(mq_groups, PACE_INT8, 1)
MQ_TILE(mq_groups, PACE_INT8, 0)
MQ_TILE(mq_groups, PACE_INT4, 1)
MQ_TILE(mq_groups, PACE_INT4, 0)
#undef MQ_CASES
#ifdef __AVX512F__
#define MQ_CASES(...)           \
    MQ_6(13, __VA_ARGS__)       \
    MQ_CASE(7, 13, __VA_ARGS__) \
    MQ_CASE(8, 13, __VA_ARGS__) \
    MQ_CASE(9, 13, __VA_ARGS__) \
    MQ_CASE(10, 13, __VA_ARGS__) MQ_CASE(11, 13, __VA_ARGS__) MQ_CASE(12, 13, __VA_ARGS__) MQ_CASE(13, 13, __VA_ARGS__)
#else
#define MQ_CASES(...) MQ_6(MQ_WHOLE_ROWS, __VA_ARGS__)
#endif
MQ_TILE(mq_whole, PACE_INT8, 1)
MQ_TILE(mq_whole, PACE_INT8, 0)
MQ_TILE(mq_whole, PACE_INT4, 1)
MQ_TILE(mq_whole, PACE_INT4, 0)
#undef MQ_CASES
#undef MQ_CASE
#undef MQ_6
#undef MQ_TILE

static void mq_rows(int mr, int layout, const mq_args *t) {
    typedef void tile(int mr, const mq_args *t);
    static tile *const tiles[2][2][2] = {
        {{mq_groups_PACE_INT8_0, mq_groups_PACE_INT8_1}, {mq_groups_PACE_INT4_0, mq_groups_PACE_INT4_1}},
        {{mq_whole_PACE_INT8_0, mq_whole_PACE_INT8_1}, {mq_whole_PACE_INT4_0, mq_whole_PACE_INT4_1}}};
    tiles[mq_is_whole(t)][layout == PACE_INT4][t->zeros == PACE_SYMMETRIC](mr, t);
}

#endif

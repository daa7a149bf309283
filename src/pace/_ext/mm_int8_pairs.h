// mm_int8_pairs.h - the register tile of int8 rows and two panels of int8 or int4 side by side, for many rows on CPUs
// whose cores issue few instructions: the sums of mm_int8_groups.h in their order, so their bits.
//
// 6 rows x 64 columns of integers fill the registers, 34 instructions for 24 dot products of 4 k; f32 sums wait in L1,
// where a group's integers are added to them. (6 x 32 with sums in registers: 20 for 12, and int4's 4 more.) A chunk of
// both panels stays in L1 while all rows pass, int4 as bytes. From L1 and L2 on a Cascade Lake core, share of its dot
// roof, this / 6 x 32: int4 in groups of 128 0.77 to 0.80 / 0.60, of 32 0.48 to 0.52 / 0.45, beside a sibling's work
// 0.5 / 0.4. An element of a row broadcast by the dot product itself: 0.74 to 0.89 of the speed.
#ifndef PACE_MM_INT8_PAIRS_H
#define PACE_MM_INT8_PAIRS_H

#include "mm_int8_groups.h"

#define MP_ROWS 6     // 24 sums, 4 weights and broadcasts
#define MP_VECTORS 4  // of two panels
#define MP_CHUNK 256  // k, whole groups: 16 KB of L1

typedef struct {
    const mq_args *q;      // the product with whole panels: scales and zeros, what a row is
    const int8_t *a;       // k0 of rows [mr][q->lda]
    const int8_t *beside;  // the rows' scale of the chunk's first group
    const uint8_t *codes;  // bytes of k0 of the first panel
    long step, apart;      // from a group's bytes to the next ones', from one panel's to the other's
    const uint8_t *block;  // scales of the first panel's first group
    long panel;            // bytes of one: to the other's scales, and what is fetched of it
    float *c;  // [mr][PACE_NR] of the first panel; where a column has one scale, integers until the last chunk
    long c_apart;
    long k;           // of the chunk
    int first, last;  // of the chunks
    uintptr_t fetch;  // 0, or what comes nearer: a line of each panel every 8 k
} mp_args;

// Both panels times k of the rows at `a`, added to acc; mr and fetch are compile-time constants.
INLINE void mp_products(const int mr, const int fetch, vi acc[MP_ROWS][MP_VECTORS], const mp_args *t,
                        const int8_t *rows, const uint8_t *codes, long k, uintptr_t *ahead) {
    const int8_t *a[2];
    const long lda = t->q->lda, apart = t->apart;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) a[i] = rows + (3 * i < mr ? 3 * i : 0) * lda;
    for (const uint8_t *const end = codes + k * PACE_NR; codes < end; codes += 8 * PACE_NR) {
        if (fetch) {
            FETCH(*ahead, _MM_HINT_T1);
            FETCH(*ahead + (uintptr_t)t->panel, _MM_HINT_T1);
            *ahead += 64;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vi u[MP_VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < MP_VECTORS; j++)
                u[j] = vi_load(codes + 4 * PACE_NR * half + j / 2 * apart + j % 2 * 64);
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                int32_t x;
                memcpy(&x, a[r / 3] + (r % 3) * lda + 4 * half, 4);
                const vi q = vi_set(x);
#pragma GCC unroll 4
                for (int j = 0; j < MP_VECTORS; j++)
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[r][j]) : "v"(u[j]), "v"(q));
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) a[i] += 8;
    }
}

INLINE int32_t mp_sum(const mp_args *t, const int8_t *beside) {
    int32_t x;
    memcpy(&x, beside + 4 * t->q->groups, 4);
    return x;
}

INLINE void mp_groups(const int mr, const int layout, const int symmetric, const int fetch, const mp_args *t) {
    const mq_args *q = t->q;
    const int8_t *beside = t->beside;
    const uint8_t *codes = t->codes, *block = t->block;
    uintptr_t ahead = t->fetch;
    const long lda = q->lda;
    float *const c[2] = {t->c, t->c + t->c_apart};
    for (long k = 0; k < t->k; k += q->group, beside += 4, codes += t->step, block += q->scale_step) {
        vi acc[MP_ROWS][MP_VECTORS];
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
            for (int j = 0; j < MP_VECTORS; j++)
                acc[r][j] = symmetric ? mq_begin(layout, mp_sum(t, beside + r * lda)) : vi_set(0);
        mp_products(mr, fetch, acc, t, t->a + k, codes, t->k - k < q->group ? t->k - k : q->group, &ahead);
        vf scale[MP_VECTORS], zero[MP_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < MP_VECTORS; j++) {
            const uint8_t *at = block + j / 2 * t->panel;
            scale[j] = gr_load(at, q->scales, j % 2 * VL);
            if (!symmetric) zero[j] = mq_zero(q, at, j % 2 * VL, scale[j]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            float row;
            memcpy(&row, beside + r * lda, 4);
            const float less = symmetric ? 0.0f : mq_less(row, mp_sum(t, beside + r * lda));
#pragma GCC unroll 4
            for (int j = 0; j < MP_VECTORS; j++) {
                float *const at = c[j / 2] + r * PACE_NR + j % 2 * VL;
                vf y = v_fma(v_mul(vi_float(acc[r][j]), v_set(row)), scale[j], v_load(at));
                if (!symmetric) y = v_fma(v_set(less), zero[j], y);
                v_store(at, y);
            }
        }
    }
}

INLINE void mp_whole(const int mr, const int layout, const int symmetric, const int fetch, const mp_args *t) {
    const mq_args *q = t->q;
    uintptr_t ahead = t->fetch;
    vi acc[MP_ROWS][MP_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int j = 0; j < MP_VECTORS; j++)
            acc[r][j] = !t->first   ? vi_load(t->c + j / 2 * t->c_apart + r * PACE_NR + j % 2 * VL)
                        : symmetric ? mq_begin(layout, mp_sum(t, t->beside + r * q->lda))
                                    : vi_set(0);
    mp_products(mr, fetch, acc, t, t->a, t->codes, t->k, &ahead);
#pragma GCC unroll 4
    for (int j = 0; j < MP_VECTORS; j++) {
        float *c = t->c + j / 2 * t->c_apart + j % 2 * VL;
        if (!t->last) {
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) _mm512_storeu_si512(c + r * PACE_NR, acc[r][j]);
            continue;
        }
        const uint8_t *at = t->block + j / 2 * t->panel;
        const vf scale = gr_load(at, q->scales, j % 2 * VL);
        const vf zero = symmetric ? v_zero() : mq_zero(q, at, j % 2 * VL, scale);
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            float row;
            memcpy(&row, t->beside + r * q->lda, 4);
            vf y = v_mul(v_mul(vi_float(acc[r][j]), v_set(row)), scale);
            if (!symmetric) y = v_fma(v_set(mq_less(row, mp_sum(t, t->beside + r * q->lda))), zero, y);
            v_store(c + r * PACE_NR, y);
        }
    }
}

// 1 .. MP_ROWS rows; each loop is a function of its own, or the compiler takes minutes.
#define MP_CASE(MR, kind, layout, symmetric)   \
    case MR:                                   \
        if (t->fetch)                          \
            kind(MR, layout, symmetric, 1, t); \
        else                                   \
            kind(MR, layout, symmetric, 0, t); \
        break;
#define MP_TILE(kind, layout, symmetric)                                                            \
    static __attribute__((noinline)) void kind##_##layout##_##symmetric(int mr, const mp_args *t) { \
        switch (mr) {                                                                               \
            MP_CASE(1, kind, layout, symmetric)                                                     \
            MP_CASE(2, kind, layout, symmetric)                                                     \
            MP_CASE(3, kind, layout, symmetric)                                                     \
            MP_CASE(4, kind, layout, symmetric)                                                     \
            MP_CASE(5, kind, layout, symmetric)                                                     \
            MP_CASE(6, kind, layout, symmetric)                                                     \
        }                                                                                           \
    }
#define MP_TILES(kind)          \
    MP_TILE(kind, PACE_INT8, 1) \
    MP_TILE(kind, PACE_INT8, 0) \
    MP_TILE(kind, PACE_INT4, 1) \
    MP_TILE(kind, PACE_INT4, 0)
MP_TILES(mp_groups)
MP_TILES(mp_whole)
#undef MP_TILES
#undef MP_TILE
#undef MP_CASE

static void mp_rows(int mr, int layout, const mp_args *t) {
    typedef void tile(int mr, const mp_args *t);
#define MP_TILES(kind)                                                                       \
    {                                                                                        \
        {kind##_PACE_INT8_0, kind##_PACE_INT8_1}, { kind##_PACE_INT4_0, kind##_PACE_INT4_1 } \
    }
    static tile *const tiles[2][2][2] = {MP_TILES(mp_groups), MP_TILES(mp_whole)};
#undef MP_TILES
    tiles[mq_is_whole(t->q)][layout == PACE_INT4][t->q->zeros == PACE_SYMMETRIC](mr, t);
}

#endif

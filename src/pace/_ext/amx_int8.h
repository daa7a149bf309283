// amx_int8.h - int8 rows and panels of int8 or int4 in AMX tiles: bit for bit what the tiles of mm_int8_groups.h
// compute, since products of integers are exact and a group's sum meets its scales in the same two operations. So which
// of the two multiplies may depend on the row count.
//
// Codes of 4 k and 32 columns are 128 bytes, which is what tdpbsud wants of a B tile: 16 of them (64 k) by 16 columns,
// 128 bytes apart. Int4 is widened to bytes a chunk at a time. Where a column has one scale, sums stay integers over
// all of k; a group's are stored, scaled and added to f32 by AVX-512 while the tiles of the next one multiply.
#ifndef PACE_AMX_INT8_H
#define PACE_AMX_INT8_H

#include "amx.h"
#include "mm_int8_groups.h"

#define AI_CHUNK 512  // k: 16 KB of codes, and as much of 32 rows (see GEMM_KC)
// Rows from which tiles are faster. A decode step of the 1B shape, shares of the read roof at 1 / 4 / 8 / 32 rows, and
// tokens/s of a prompt of 512, mm_int8_groups.h, then tiles (Granite Rapids, memory at 32 GB/s):
//   a scale per column   0.91 / 0.88 / 0.77 / 0.41,  590, then 0.86 / 0.80 / 0.78 / 0.45 to 0.54, 1538
//   int8, groups of 128  0.93 / 0.86 / 0.65 / 0.37,  460, then 0.86 / 0.79 / 0.73 / 0.42, 1006
//   int4, groups of 128  0.87 / 0.76 / 0.59 / 0.24,  465, then 0.77 / 0.71 / 0.61 / 0.32, 1016
//   int4, groups of 32   0.82 / 0.71 / 0.58 / 0.22,  366, then 0.66 / 0.61 / 0.55 / 0.24,  444
INLINE long ai_least(long group) { return group == 32 ? 17 : 7; }
#define AI_FEW 64  // rows up to which panels come one after the other, in one stream

typedef struct {
    const int8_t *a;   // [rows][lda]
    const uint8_t *b;  // [k / 4][32][4]
    int32_t *c;        // [rows][PACE_NR]
    long lda, steps;
    int accumulate;
    uintptr_t fetch, fetch_rows;  // 0, or `lines` lines per step from there, and a line of each of four rows
    long lines;
} ai_args;

// bytes: of k per step, 64 or (groups of 32) 32.
INLINE void ai_tile(const int halves, const int bytes, ai_args *t) {
    AMX_FENCE;
    const size_t lda = (size_t)t->lda, ldc = PACE_NR * 4, ldb = PACE_NR * 4;
    amx_sums(halves, t->accumulate, t->c, ldc);
    const int8_t *a = t->a;
    const uint8_t *b = t->b;
    for (long i = 0; i < t->steps; i++) {
        _tile_loadd(6, b, ldb);
        _tile_loadd(4, a, lda);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b + 64, ldb);
        _tile_dpbsud(1, 4, 7);
        if (halves == 2) {
            _tile_loadd(5, a + 16 * t->lda, lda);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        if (t->fetch) {
            for (long line = 0; line < t->lines; line++) FETCH(t->fetch + (uintptr_t)(64 * line), _MM_HINT_T1);
            t->fetch += (uintptr_t)(64 * t->lines);
        }
        if (t->fetch_rows) {
#pragma GCC unroll 4
            for (uintptr_t r = 0; r < 4; r++) FETCH(t->fetch_rows + r * lda, _MM_HINT_T1);
            t->fetch_rows += (uintptr_t)bytes;
        }
        a += bytes;
        b += bytes * PACE_NR;
    }
    amx_store(halves, t->c, ldc);
}
static void ai_products(int rows, int bytes, ai_args *t) {
    if (rows > 16 && bytes == 64)
        ai_tile(2, 64, t);
    else if (rows > 16)
        ai_tile(2, 32, t);
    else if (bytes == 64)
        ai_tile(1, 64, t);
    else
        ai_tile(1, 32, t);
}

// What a panel's group g brings to the sums of its products: scales, and zeros or offsets.
typedef struct {
    vf scale[2], zero[2];
} ai_scales;
INLINE ai_scales ai_scales_of(const mq_args *t, const uint8_t *block) {
    ai_scales s;
    for (int j = 0; j < 2; j++) {
        s.scale[j] = gr_load(block, t->scales, j * VL);
        s.zero[j] = t->zeros == PACE_SYMMETRIC ? v_zero() : mq_zero(t, block, j * VL, s.scale[j]);
    }
    return s;
}

// Sums [rows][32] of group g of rows a to f32, times both scales; c [rows][32] becomes that, or has it added.
enum { AI_WHOLE, AI_FIRST, AI_NEXT };  // the column's only one; of several the first one, which is added to 0; another
INLINE void ai_scale(const int layout, const int symmetric, const int which, float *c, const int32_t *sums,
                     const mq_args *t, const int8_t *a, long rows, long g, const ai_scales *s) {
    const int8_t *beside = a + t->width + 4 * g;
    for (long r = 0; r < rows; r++, beside += t->lda) {
        float row;
        int32_t x;
        memcpy(&row, beside, 4);
        memcpy(&x, beside + 4 * t->groups, 4);
        const vi begin = symmetric ? mq_begin(layout, x) : vi_set(0);
        const float less = mq_less(row, x);
        for (int j = 0; j < 2; j++) {
            const vi acc = _mm512_add_epi32(vi_load(sums + r * PACE_NR + j * VL), begin);
            const vf y = v_mul(vi_float(acc), v_set(row));
            vf sum = which == AI_WHOLE   ? v_mul(y, s->scale[j])
                     : which == AI_FIRST ? v_fma(y, s->scale[j], v_zero())
                                         : v_fma(y, s->scale[j], v_load(c + r * PACE_NR + j * VL));
            if (!symmetric) sum = v_fma(v_set(less), s->zero[j], sum);
            v_store(c + r * PACE_NR + j * VL, sum);
        }
    }
}
static void ai_scale_any(int layout, int which, float *c, const int32_t *sums, const mq_args *t, const int8_t *a,
                         long rows, long g, const ai_scales *s) {
#define AI_CASE(LAYOUT, SYMMETRIC, WHICH)                                                  \
    if (layout == LAYOUT && (t->zeros == PACE_SYMMETRIC) == SYMMETRIC && which == WHICH) { \
        ai_scale(LAYOUT, SYMMETRIC, WHICH, c, sums, t, a, rows, g, s);                     \
        return;                                                                            \
    }
#define AI_CASES(LAYOUT, SYMMETRIC)      \
    AI_CASE(LAYOUT, SYMMETRIC, AI_WHOLE) \
    AI_CASE(LAYOUT, SYMMETRIC, AI_FIRST) \
    AI_CASE(LAYOUT, SYMMETRIC, AI_NEXT)
    AI_CASES(PACE_INT8, 1)
    AI_CASES(PACE_INT8, 0)
    AI_CASES(PACE_INT4, 1)
    AI_CASES(PACE_INT4, 0)
#undef AI_CASES
#undef AI_CASE
}

#endif

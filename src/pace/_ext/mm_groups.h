// mm_groups.h - the register tile on bf16 rows and a chunk of groups (gr_chunk): C[mr][32] (+)= the sum over groups g,
// ascending, of scale[c][g] * (A[mr][k of g] . B), and of offset[c][g] * (the sum of A over g) where there are offsets.
//
// A group's products are summed from 0 in the order of mm.h, then added in one fma with the scale, offsets in another.
// An element is the same at every mr.
#ifndef PACE_MM_GROUPS_H
#define PACE_MM_GROUPS_H

#include "groups.h"
#include "mm.h"

typedef struct {
    const bf16 *a;  // rows [mr][lda]
    const gr_chunk *chunk;
    float *c;  // [mr][PACE_NR]
    long lda, k, group;
    int accumulate, offsets;
} mg_args;

#ifdef __AVX512F__
#define MG_ROWS 6  // 12 + 12 accumulators, 2 weights (4 where pairs are split) and broadcasts
#define MG_VECTORS 2
typedef struct {
    __m512i x[MM_SPLIT];
} mg_w;
INLINE mg_w mg_load(const bf16 *p) {
    mg_w w;
    mm_split(w.x, _mm512_loadu_si512(p));
    return w;
}
INLINE mg_w mg_ones(void) {
    mg_w w;
    mm_split(w.x, _mm512_set1_epi32(0x3f803f80));
    return w;
}
INLINE vf mg_dot(vf acc, mg_w w, int32_t x) { return mm_dot(acc, w.x, x); }
#else
#define MG_ROWS 2
#define MG_VECTORS 2
typedef struct {
    __m256 even, odd;
} mg_w;
INLINE mg_w mg_load(const bf16 *p) {
    mg_w w;
    mm_split(&w.even, &w.odd, p);
    return w;
}
INLINE mg_w mg_ones(void) { return (mg_w){v_set(1.0f), v_set(1.0f)}; }
INLINE vf mg_dot(vf acc, mg_w w, int32_t x) {
    const __m256i v = _mm256_set1_epi32(x);
    acc = v_fma(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), w.even, acc);
    return v_fma(_mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000u))), w.odd, acc);
}
#endif
#define MG_ROWS_OFFSETS (MG_ROWS - 1)  // a sum of the row beside

// Columns from c on; mr and offsets are compile-time constants.
INLINE void mg_tile(const int mr, const int offsets, const mg_args *t, long c) {
    enum { nv = MG_VECTORS };
    vf sum[MG_ROWS][nv];
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) sum[r][j] = t->accumulate ? v_load(t->c + r * PACE_NR + c + j * VL) : v_zero();
    const bf16 *b = t->chunk->b + 2 * c, *a[2];
    const long lda = t->lda;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) a[i] = t->a + (3 * i < mr ? 3 * i : 0) * lda;
    long g = 0;
    for (long k = 0, run; k < t->k; k += run, g++) {
        run = t->group < t->k - k ? t->group : t->k - k;
        vf acc[MG_ROWS][nv], whole[MG_ROWS];
#pragma GCC unroll 6
        for (int r = 0; r < mr; r++) {
            whole[r] = v_zero();
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) acc[r][j] = v_zero();
        }
        for (long p = 0; p < run / 2; p++, b += 2 * PACE_NR) {
            mg_w w[nv];
#pragma GCC unroll 2
            for (int j = 0; j < nv; j++) w[j] = mg_load(b + 2 * VL * j);
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                int32_t x;
                memcpy(&x, a[r / 3] + (r % 3) * lda + 2 * p, 4);
#pragma GCC unroll 2
                for (int j = 0; j < nv; j++) acc[r][j] = mg_dot(acc[r][j], w[j], x);
                if (offsets) whole[r] = mg_dot(whole[r], mg_ones(), x);
            }
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) a[i] += run;
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) {
            const vf scale = v_load(t->chunk->scales[g] + c + j * VL);
            const vf offset = offsets ? v_load(t->chunk->offsets[g] + c + j * VL) : v_zero();
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                sum[r][j] = v_fma(acc[r][j], scale, sum[r][j]);
                if (offsets) sum[r][j] = v_fma(whole[r], offset, sum[r][j]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < nv; j++) v_store(t->c + r * PACE_NR + c + j * VL, sum[r][j]);
}

// Any rows, in equal tiles.
static void mg_rows(long rows, mg_args t) {
    const long most = t.offsets ? MG_ROWS_OFFSETS : MG_ROWS, tiles = (rows + most - 1) / most;
    for (long i = 0, mr; i < tiles; i++, rows -= mr, t.a += mr * t.lda, t.c += mr * PACE_NR) {
        mr = rows / (tiles - i);
        for (long c = 0; c < PACE_NR; c += MG_VECTORS * VL) {
#define MG_CASE(MR)                     \
    case MR:                            \
        if (MR > MG_ROWS) break;        \
        if (!t.offsets)                 \
            mg_tile(MR, 0, &t, c);      \
        else if (MR <= MG_ROWS_OFFSETS) \
            mg_tile(MR, 1, &t, c);      \
        break;
            switch (mr) { MG_CASE(1) MG_CASE(2) MG_CASE(3) MG_CASE(4) MG_CASE(5) MG_CASE(6) }
#undef MG_CASE
        }
    }
}

#endif

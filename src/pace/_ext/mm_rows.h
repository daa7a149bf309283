// mm_rows.h - avx2's register tile on rows in f32: C[mr][32] (+)= A[mr][2 kp] * B, in the order of mm.h, so its bits.
//
// 6 rows x 16 columns are 12 sums; with 2 weights, an element of a row and the mask they fill the 16 registers. Rows
// are widened once for all panels of a group: in bf16 every element would take two operations more in the loop, which
// a 4 x 1 tile on rows in bf16 (mm.h) did: from L1 0.7 of the dot roof on Zen 3, this one 0.97 with 6 rows and 0.9 with
// 5; 4 rows (8 sums, each waited for) 0.88. Tiles of 7 to 14 rows x 8 columns would read a panel once for as many rows,
// but each product takes a broadcast then, and a Zen 3 loads two a cycle: 8 / 12 / 13 rows of a matrix in memory, one
// core beside other work, 0.52 / 0.53 / 0.62 of the dot roof instead of 0.68 / 0.77 / 0.66.
#ifndef PACE_MM_ROWS_H
#define PACE_MM_ROWS_H

#include "groups.h"
#include "mm.h"

#define MR_ROWS 6
#define MR_CHUNK 512             // of k: 6 rows are 12 KB of L1, a panel's half 16 KB
#define MR_STEP (MR_CHUNK + 16)  // rows lie in different sets

typedef struct {
    const bf16 *a;  // the rows that x holds, and how far
    long kp;
    float x[MR_ROWS * MR_STEP];
} mr_rows;

INLINE void mr_widen(mr_rows *s, long rows, const mm_args *g) {
    if (s->a == g->a && s->kp == g->kp) return;
    s->a = g->a;
    s->kp = g->kp;
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < 2 * g->kp; k += VL) v_store(s->x + r * MR_STEP + k, v_load_bf16(g->a + r * g->lda + k));
}

// Columns c0 .. c0 + 15, c0 being 0 or 16. A row's element and its two fma in assembly: left to itself GCC 12 writes
// sums over other registers and spills the ones that stood there, in the middle of the sum's chain (0.65 of the roof);
// with the fma alone in assembly it takes two elements at once, for which a sum and the mask have no register: 50
// instructions a pair of k where these are 45. That counts where a hyperthread's sibling takes half of the slots, 3 a
// cycle: 6 / 4 rows of panels in L2 on such a Zen 3 core 0.71 / 0.67 before, now 0.83 / 0.77 of the dot roof; in its
// quiet moments, 0.96 / 0.84 and 0.96 / 0.95. (Fetching to L1 4 to 16 pairs ahead, or a
// line every second pair: no difference.)
INLINE void mr_tile(const int mr, const int fetch, const float *x, long c0, const mm_args *g) {
    __m256 acc[MR_ROWS][2];
    const bf16 *b = g->b + 2 * c0;
    float *const c = g->c + c0;
    // Each half of the columns fetches half, so that memory works in both: 4 / 5 / 6 rows stream 31 / 31 / 24 instead
    // of 29 / 22 / 22 GB/s on two Zen 3 cores.
    const uintptr_t step = (uintptr_t)g->prefetch_step / 2;
    uintptr_t pf = g->prefetch + (c0 ? (uintptr_t)g->kp * step : 0);
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) acc[r][j] = g->accumulate ? v_load(c + r * g->ldc + j * VL) : v_zero();
    const bf16 *const end = b + g->kp * 2 * PACE_NR;
#pragma GCC unroll 4
    for (; b != end; x += 2, b += 2 * PACE_NR) {
        if (fetch) {
            FETCH(pf, _MM_HINT_T1);
            pf += step;
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            __m256 w[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const __m256i *v = (const __m256i *)(b + 2 * VL * j);
                if (odd)
                    __asm__("vpand %1, %2, %0" : "=x"(w[j]) : "m"(*v), "x"(mask));
                else
                    w[j] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(v), 16));
            }
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                __m256 s;
                __asm__("vbroadcastss %3, %2\n\tvfmadd231ps %2, %4, %0\n\tvfmadd231ps %2, %5, %1"
                        : "+x"(acc[r][0]), "+x"(acc[r][1]), "=&x"(s)
                        : "m"(x[r * MR_STEP + odd]), "x"(w[0]), "x"(w[1]));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) v_store(c + r * g->ldc + j * VL, acc[r][j]);
}

// 3 .. MR_ROWS rows x times a panel.
static void mr_product(const float *x, int rows, const mm_args *g) {
#define MR_CASE(MR)                                   \
    case MR:                                          \
        for (long c0 = 0; c0 < PACE_NR; c0 += 2 * VL) \
            if (g->prefetch)                          \
                mr_tile(MR, 1, x, c0, g);             \
            else                                      \
                mr_tile(MR, 0, x, c0, g);             \
        return;
    switch (rows) { MR_CASE(3) MR_CASE(4) MR_CASE(5) MR_CASE(6) }
#undef MR_CASE
}

static void mr_panel(mr_rows *s, int rows, const mm_args *g) {
    mr_widen(s, rows, g);
    mr_product(s->x, rows, g);
}

// The same times a chunk of groups without offsets: the sums of mm_groups.h, whose 2 x 2 tile made 45 GFLOP/s of FP8
// and 512 rows on a Zen 3 core, this 72 of 99; int4 in groups of 128 / 32 45 / 45, this 62 / 55.
static void mr_groups(mr_rows *s, int rows, const mm_args *g, const gr_chunk *chunk, long group) {
    float sums[MR_ROWS * PACE_NR];
    mm_args part = *g;
    part.c = sums;
    part.ldc = PACE_NR;
    part.prefetch = 0;
    part.accumulate = 0;
    mr_widen(s, rows, g);
    for (long k = 0, i = 0, run; k < 2 * g->kp; k += run, i++) {
        run = group < 2 * g->kp - k ? group : 2 * g->kp - k;
        part.b = chunk->b + k * PACE_NR;
        part.kp = run / 2;
        mr_product(s->x + k, rows, &part);
        for (long r = 0; r < rows; r++)
            for (long c = 0; c < PACE_NR; c += VL) {
                float *const at = g->c + r * g->ldc + c;
                const vf old = g->accumulate || i > 0 ? v_load(at) : v_zero();
                v_store(at, v_fma(v_load(sums + r * PACE_NR + c), v_load(chunk->scales[i] + c), old));
            }
    }
}

#endif

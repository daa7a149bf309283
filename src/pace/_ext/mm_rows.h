// mm_rows.h - the register tile on rows in f32, of tiers without dot products of bf16: C[mr][32] (+)= A[mr][2 kp] * B,
// in the order of mm.h, so its bits.
//
// avx2: 6 rows x 16 columns are 12 sums; with 2 weights, an element of a row and the mask they fill the 16 registers.
// Rows are widened once for all panels of a group: in bf16 every element would take two operations more in the loop,
// which a 4 x 1 tile on rows in bf16 (mm.h) did: from L1 0.7 of the dot roof on Zen 3, this one 0.97 with 6 rows and
// 0.9 with 5; 4 rows (8 sums, each waited for) 0.88. Tiles of 7 to 14 rows x 8 columns would read a panel once for as
// many rows, but each product takes a broadcast then, and a Zen 3 loads two a cycle: 8 / 12 / 13 rows of a matrix in
// memory, one core beside other work, 0.52 / 0.53 / 0.62 of the dot roof instead of 0.68 / 0.77 / 0.66.
//
// avx512, avx512vnni: 14 rows x 32 columns, 92 instructions a pair of k for 56 fma; the 12 x 32 tile of mm.h takes as
// many for 48, of which 28 more go where the fma go. From L1 on a Cascade Lake core whose sibling works too, share of
// the dot roof: this 0.60 to 0.68, in its quiet moments 0.98; mm.h 0.51. Fewer instructions would be tiles of 6 x 64
// (0.68 to 0.72, but 0.86 at most in quiet moments: they widen more weights) or of weights in f32, 6 x 64 / 14 x 32
// (0.73 to 0.77 / 0.61 to 0.71), which many rows could share. Elements broadcast by the fma itself: two loads a pair
// (0.60).
#ifndef PACE_MM_ROWS_H
#define PACE_MM_ROWS_H

#include "groups.h"
#include "mm.h"

#ifdef __AVX512F__
#define MR_ROWS 14
#else
#define MR_ROWS 6
#endif
#define MR_CHUNK 512             // of k: avx2's 6 rows are 12 KB of L1, a panel's half 16 KB
#define MR_STEP (MR_CHUNK + 16)  // rows lie in different sets
#define MR_PASSES (PACE_NR / (2 * VL))

#define MR_LEAST 3  // fewer rows wait for memory, whatever they are multiplied with

typedef struct {
    int few;        // rows meet a panel once: widening them would not pay
    const bf16 *a;  // the rows that x holds, and how far
    long kp;
    float x[MR_ROWS * MR_STEP];
} mr_rows;

INLINE void mr_begin(mr_rows *s, int few) {
    s->few = few;
    s->a = NULL;
}
INLINE int mr_takes(const mr_rows *s, long rows) { return !s->few && rows >= MR_LEAST; }

INLINE void mr_widen(mr_rows *s, long rows, const mm_args *g) {
    if (s->a == g->a && s->kp == g->kp) return;
    s->a = g->a;
    s->kp = g->kp;
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < 2 * g->kp; k += VL) v_store(s->x + r * MR_STEP + k, v_load_bf16(g->a + r * g->lda + k));
}

// The weights of an even or odd k.
#ifdef __AVX512F__
INLINE vf mr_weights(const bf16 *p, const int odd) {  // every load does its arithmetic: no mask in a register
    return _mm512_castsi512_ps(odd ? _mm512_maskz_loadu_epi16(0xaaaaaaaau, p)
                                   : _mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
#else
INLINE vf mr_weights(const bf16 *p, const int odd) {
    const __m256i *v = (const __m256i *)p;
    if (!odd) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(v), 16));
    __m256 w;
    __asm__("vpand %1, %2, %0" : "=x"(w) : "m"(*v), "x"(_mm256_set1_epi32((int)0xffff0000u)));
    return w;
}
#endif

// Columns c0 .. c0 + 2 VL - 1. A row's element and its two fma in assembly: left to itself GCC 12 writes
// sums over other registers and spills the ones that stood there, in the middle of the sum's chain (0.65 of the roof);
// with the fma alone in assembly it takes two elements at once, for which a sum and the mask have no register: 50
// instructions a pair of k where these are 45. That counts where a hyperthread's sibling takes half of the slots, 3 a
// cycle: 6 / 4 rows of panels in L2 on such a Zen 3 core 0.71 / 0.67 before, now 0.83 / 0.77 of the dot roof; in its
// quiet moments, 0.96 / 0.84 and 0.96 / 0.95. (Fetching to L1 4 to 16 pairs ahead, or a
// line every second pair: no difference.)
INLINE void mr_tile(const int mr, const int fetch, const float *x, long c0, const mm_args *g) {
    vf acc[MR_ROWS][2];
    const bf16 *b = g->b + 2 * c0;
    float *const c = g->c + c0;
    // Each half of the columns fetches half, so that memory works in both: 4 / 5 / 6 rows stream 31 / 31 / 24 instead
    // of 29 / 22 / 22 GB/s on two Zen 3 cores.
    const uintptr_t step = (uintptr_t)g->prefetch_step / MR_PASSES;
    uintptr_t pf = g->prefetch + (c0 ? (uintptr_t)g->kp * step : 0);
#pragma GCC unroll 14
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) acc[r][j] = g->accumulate ? v_load(c + r * g->ldc + j * VL) : v_zero();
    const bf16 *const end = b + g->kp * 2 * PACE_NR;
#pragma GCC unroll 4
    for (; b != end; x += 2, b += 2 * PACE_NR) {
        if (fetch) {
            FETCH(pf, _MM_HINT_T1);
            if (fetch > 1) FETCH(pf + 64, _MM_HINT_T1);
            pf += step;
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            const vf w0 = mr_weights(b, odd), w1 = mr_weights(b + 2 * VL, odd);
#pragma GCC unroll 14
            for (int r = 0; r < mr; r++) {
                vf s;
                __asm__("vbroadcastss %3, %2\n\tvfmadd231ps %2, %4, %0\n\tvfmadd231ps %2, %5, %1"
                        : "+v"(acc[r][0]), "+v"(acc[r][1]), "=&v"(s)
                        : "m"(x[r * MR_STEP + odd]), "v"(w0), "v"(w1));
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) v_store(c + r * g->ldc + j * VL, acc[r][j]);
}

#ifdef __AVX512F__
#define MR_MORE MR_CASE(7) MR_CASE(8) MR_CASE(9) MR_CASE(10) MR_CASE(11) MR_CASE(12) MR_CASE(13) MR_CASE(14)
#else
#define MR_MORE
#endif

// MR_LEAST .. MR_ROWS rows x times a panel.
static void mr_product(const float *x, int rows, const mm_args *g) {
    const long step = g->prefetch ? g->prefetch_step / MR_PASSES : 0;
#define MR_CASE(MR)                                   \
    case MR:                                          \
        for (long c0 = 0; c0 < PACE_NR; c0 += 2 * VL) \
            if (step > 64)                            \
                mr_tile(MR, 2, x, c0, g);             \
            else if (step)                            \
                mr_tile(MR, 1, x, c0, g);             \
            else                                      \
                mr_tile(MR, 0, x, c0, g);             \
        return;
    switch (rows) { MR_CASE(3) MR_CASE(4) MR_CASE(5) MR_CASE(6) MR_MORE }
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

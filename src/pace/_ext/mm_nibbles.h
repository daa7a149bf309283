// mm_nibbles.h - avx2's tile of int8 rows and panels of int4 for 3 rows and more: the sums of mm_int8_groups.h, whose
// integers are exact, so its bits.
//
// A code of 0 .. 15 times a signed byte, twice, is at most 3810: vpmaddubsw adds two products in 16 bits, which hold
// eight such sums, those of 32 k. So 32 products take an instruction to multiply and one to add, where bytes
// (mm_words.h) take four, and an eighth of what widens the sums. 6 rows x 16 columns are 12 of them; 2 weights, a row's
// bytes and a product fill the 16 registers. 512 rows x 2048 x 2048 on two Zen 3 cores, share of the dot roof of bytes,
// the tile of 3 rows x 8 columns that this replaced / this: groups of 128 0.57 / 0.74, of 32 0.57 / 0.61 before scales
// were a matter of mm_scale.h.
#ifndef PACE_MM_NIBBLES_H
#define PACE_MM_NIBBLES_H

#include "mm_scale.h"

#define MN_K 32  // whose sums fit 16 bits

// sums [mr][PACE_NR], columns 0 .. 15, (+)= `run` codes, at most MN_K, times bytes of rows a. mr and fetch are
// compile-time constants. A row's bytes and their products in assembly, as in mm_rows.h.
INLINE void mn_tile(const int mr, const int fetch, const int8_t *a, long lda, const uint8_t *codes, long run,
                    int accumulate, int32_t *sums, uintptr_t ahead, long fetch_step) {
    vi acc[MS_ROWS][2];
    const int8_t *row[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) row[i] = a + (3 * i < mr ? 3 * i : 0) * lda;
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) acc[r][j] = vi_set(0);
#pragma GCC unroll 4
    for (long k = 0; k < run; k += 8, codes += 4 * PACE_NR) {
        if (fetch) {
            FETCH(ahead, _MM_HINT_T1);
            FETCH(ahead + (uintptr_t)(fetch_step / 2), _MM_HINT_T1);
            ahead += (uintptr_t)fetch_step;
        }
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
            vi w[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const vi u = vi_load(codes + 4 * VL * j);
                w[j] = vi_and(high ? vi_high(u) : u, vi_set(0x0f0f0f0f));
            }
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                vi x, product;
                __asm__(
                    "vpbroadcastd %4, %2\n\tvpmaddubsw %2, %5, %3\n\tvpaddw %3, %0, %0\n\tvpmaddubsw %2, %6, "
                    "%2\n\tvpaddw %2, %1, %1"
                    : "+x"(acc[r][0]), "+x"(acc[r][1]), "=&x"(x), "=&x"(product)
                    : "m"(*(const int32_t *)(const void *)(row[r / 3] + (r % 3) * lda + k + 4 * high)), "x"(w[0]),
                      "x"(w[1]));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            int32_t *const at = sums + r * PACE_NR + j * VL;
            vi sum = _mm256_madd_epi16(acc[r][j], _mm256_set1_epi16(1));
            if (accumulate) sum = _mm256_add_epi32(sum, vi_load(at));
            _mm256_storeu_si256((__m256i *)at, sum);
        }
}

static void mn_product(int mr, const int8_t *a, long lda, const uint8_t *codes, long run, int accumulate, int32_t *sums,
                       uintptr_t ahead, long fetch_step) {
#define MN_CASE(MR)                                                                  \
    case MR:                                                                         \
        if (ahead)                                                                   \
            mn_tile(MR, 1, a, lda, codes, run, accumulate, sums, ahead, fetch_step); \
        else                                                                         \
            mn_tile(MR, 0, a, lda, codes, run, accumulate, sums, 0, 0);              \
        return;
    switch (mr) { MN_CASE(3) MN_CASE(4) MN_CASE(5) MN_CASE(6) }
#undef MN_CASE
}

// 3 .. MS_ROWS rows times a panel.
static void mn_rows(int mr, const mq_args *t) {
    int32_t sums[MS_ROWS * PACE_NR];
    ms_scaler *const scale = ms_scale_of(PACE_INT4, mr, t);
    const long steps = t->width / 8, step = t->fetch_step / 2;  // of two passes
    for (long c = 0; c < PACE_NR; c += MS_COLUMNS) {
        for (long g = 0, k = 0; g < t->groups; g++) {
            const uint8_t *codes = t->b + t->head + g * t->step + 4 * c;
            const long begin = k, end = k + t->group < t->width ? k + t->group : t->width;
            for (long run; k < end; k += run, codes += run / 2 * PACE_NR) {
                run = end - k < MN_K ? end - k : MN_K;
                mn_product(mr, t->a + k, t->lda, codes, run, k > begin, sums,
                           t->fetch ? t->fetch + (uintptr_t)((c / MS_COLUMNS * steps + k / 8) * step) : 0, step);
            }
            scale(t, t->b + g * t->scale_step, g, c, sums);
        }
    }
}

#endif

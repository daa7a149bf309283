// mm_words.h - avx2's tile of int8 rows and panels of int8 for 3 rows and more: the sums of mm_int8_groups.h, whose
// integers are exact, so its bits.
//
// A byte of 0 .. 255 times a signed one needs words of 16 bits: vpmaddwd takes pairs of them. The tile for fewer rows
// widens a row's bytes anew for every 8 columns; here they are widened once for the panel, as pairs (0, 2) and (1, 3)
// of every 4 k, which is how a mask and a shift leave the weights. 6 rows x 16 columns are 12 sums; 2 weights, a row's
// pair and a product fill the 16 registers. A product and an addition are 16 multiplications: with 2 vpmaddwd a cycle
// as many as vpmaddubsw and vpmaddwd make of bytes, twice those of f32. 8 rows x 2048 x 4096 on a Zen 3 core, GOP/s of
// 193, the tile it replaced / this: a scale per column 80 / 125, groups of 128 70 / 108, of 32 55 / 72. (Bytes u - 128
// as |u - 128| times the row with its sign, vpsignb, vpmaddubsw, vpmaddwd: 80.)
#ifndef PACE_MM_WORDS_H
#define PACE_MM_WORDS_H

#include "mm_scale.h"

#define MW_CHUNK 1024                // of k: 6 rows are 12 KB of L1
#define MW_STEP (MW_CHUNK / 2 + 16)  // in pairs; rows lie in different sets. The odd pairs are MW_CHUNK / 4 behind

// kc columns of rows a: a multiple of 8.
static void mw_widen(int32_t *x, long rows, const int8_t *a, long lda, long kc) {
    for (long r = 0; r < rows; r++, a += lda, x += MW_STEP) {
        long k = 0;
        for (; k + 32 <= kc; k += 32) {
            const vi q = vi_load(a + k);
            _mm256_storeu_si256((__m256i *)(x + k / 4), mi_first(q));
            _mm256_storeu_si256((__m256i *)(x + MW_CHUNK / 4 + k / 4), mi_second(q));
        }
        for (; k < kc; k += 8) {
            const __m128i q = _mm_loadl_epi64((const __m128i *)(a + k));
            _mm_storel_epi64((__m128i *)(x + k / 4), _mm_srai_epi16(_mm_slli_epi16(q, 8), 8));
            _mm_storel_epi64((__m128i *)(x + MW_CHUNK / 4 + k / 4), _mm_srai_epi16(q, 8));
        }
    }
}

// sums [mr][PACE_NR], columns 0 .. 15: run / 4 pairs of rows x with codes. mr and fetch are compile-time constants. The
// addition in assembly: GCC 12 adds products of even and odd pairs to each other first, and spills the sums meanwhile.
INLINE void mw_tile(const int mr, const int fetch, const int32_t *x, const uint8_t *codes, long run, int accumulate,
                    int32_t *sums, uintptr_t ahead, long fetch_step) {
    vi acc[MS_ROWS][2];
    const vi byte = _mm256_set1_epi16(255);
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) acc[r][j] = accumulate ? vi_load(sums + r * PACE_NR + j * VL) : vi_set(0);
    for (long i = 0; i < run / 4; i++, codes += 4 * PACE_NR) {
        if (fetch) {
            FETCH(ahead, _MM_HINT_T1);
            ahead += (uintptr_t)fetch_step;
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vi w[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const vi u = vi_load(codes + 4 * VL * j);
                w[j] = odd ? _mm256_srli_epi16(u, 8) : _mm256_and_si256(u, byte);
            }
#pragma GCC unroll 6
            for (int r = 0; r < mr; r++) {
                const vi q = vi_set(x[r * MW_STEP + odd * MW_CHUNK / 4 + i]);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    const vi product = _mm256_madd_epi16(w[j], q);
                    __asm__("vpaddd %1, %0, %0" : "+x"(acc[r][j]) : "x"(product));
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) _mm256_storeu_si256((__m256i *)(sums + r * PACE_NR + j * VL), acc[r][j]);
}
static void mw_product(int mr, const int32_t *x, const uint8_t *codes, long run, int accumulate, int32_t *sums,
                       uintptr_t ahead, long fetch_step) {
#define MW_CASE(MR)                                                             \
    case MR:                                                                    \
        if (ahead)                                                              \
            mw_tile(MR, 1, x, codes, run, accumulate, sums, ahead, fetch_step); \
        else                                                                    \
            mw_tile(MR, 0, x, codes, run, accumulate, sums, 0, 0);              \
        return;
    switch (mr) { MW_CASE(3) MW_CASE(4) MW_CASE(5) MW_CASE(6) }
#undef MW_CASE
}

// 3 .. MS_ROWS rows times a panel.
static void mw_rows(int mr, const mq_args *t) {
    int32_t x[MS_ROWS * MW_STEP], sums[MS_ROWS * PACE_NR];
    const int whole = mq_is_whole(t);
    ms_scaler *const scale = ms_scale_of(PACE_INT8, mr, t);
    const long chunk = whole ? MW_CHUNK : MW_CHUNK / t->group * t->group, pairs = t->width / 4,
               step = t->fetch_step / 4;  // of two passes, for 4 k
    for (long k0 = 0, kc; k0 < t->width; k0 += kc) {
        kc = t->width - k0 < chunk ? t->width - k0 : chunk;
        mw_widen(x, mr, t->a + k0, t->lda, kc);
        for (long c = 0; c < PACE_NR; c += MS_COLUMNS) {
            for (long k = k0, run; k < k0 + kc; k += run) {
                const long left = k0 + kc - k, g = whole ? 0 : k / t->group;
                run = whole || left < t->group ? left : t->group;
                const uint8_t *codes = t->b + t->head + g * t->step + (k - g * t->group) * PACE_NR + 4 * c;
                const uintptr_t ahead = (uintptr_t)((c / MS_COLUMNS * pairs + k / 4) * step);
                mw_product(mr, x + (k - k0) / 4, codes, run, whole && k0 > 0, sums + c, t->fetch ? t->fetch + ahead : 0,
                           step);
                if (!whole) scale(t, t->b + g * t->scale_step, g, c, sums + c);
            }
        }
    }
    for (long c = 0; whole && c < PACE_NR; c += MS_COLUMNS) scale(t, t->b, 0, c, sums + c);
}

#endif

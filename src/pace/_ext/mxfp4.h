// mxfp4.h - panels of MXFP4 (kernels.h has their bytes): packing, and weights as bf16, which is exact: a code has two
// significant bits, its scale is a power of two.
//
// A product on bf16 rows is, bit for bit, the product with the dequantised matrix in bf16 panels. AVX-512 expands in
// registers (mx_rows); on avx2 and amx a chunk of a panel goes to scratch, where their register tile reads it.
//
// A word of a panel holds four codes of one column and one parity of k. A table of 16 words gives a code's bf16 times
// 2^125; subtracting (252 - e) << 7 from its bits multiplies it by 2^(e - 252). Zero must stay zero, in one of two
// ways:
//   saturating  zero is the word 0x8000, the least there is: a saturating subtraction leaves it, and -0 adds nothing to
//   a
//               sum. A pair of k costs a shift, a lookup and a subtraction per 16 columns; but on Zen 4 the subtraction
//               takes a slot of the dot products.
//   minimum     zero is the word 0, and no other word is less than what is subtracted: the unsigned minimum of both. An
//               instruction more, both of which run anywhere.
// One thread of a Zen 4, cycles per 8 k and 32 columns from L2 at 1, 2, 3, 4, 8, 12 rows: saturating 19 26 32 40 74
// 105, minimum 24 30 34 39 64 96 (8, 16 .. 96 of them are dot products).
#ifndef PACE_MXFP4_H
#define PACE_MXFP4_H

#include "mm.h"

#define MX_CHUNK 256  // k expanded at a time: 16 KB of L1 (32 KB: 9 instead of 22 GB/s of codes on one thread)

INLINE const uint8_t *mx_block(const pace_matrix *w, long p, long k) {  // k: a multiple of 64
    return (const uint8_t *)w->data + p * pace_panel_bytes(w) + k / 64 * PACE_MX_BLOCK;
}

// Words of the table: 0 .5 1 1.5 2 3 4 6 times 2^125, then their negatives.
#define MX_WORDS(zero) zero, 0x7d80, 0x7e00, 0x7e40, 0x7e80, 0x7ec0, 0x7f00, 0x7f40
#define MX_NEGATIVE(zero) zero, 0xfd80, 0xfe00, 0xfe40, 0xfe80, 0xfec0, 0xff00, 0xff40

#ifdef __AVX512F__

typedef __m512i mx_table;
INLINE mx_table mx_words(const int minimum) {  // vpermw reads five bits of a word: the fifth is the next code's
    static const _Alignas(64)
        uint16_t words[2][32] = {{MX_WORDS(0x8000), MX_NEGATIVE(0x8000), MX_WORDS(0x8000), MX_NEGATIVE(0x8000)},
                                 {MX_WORDS(0), MX_NEGATIVE(0), MX_WORDS(0), MX_NEGATIVE(0)}};
    return _mm512_load_si512(words[minimum]);
}
// (252 - e) << 7 in both words of 16 columns.
INLINE __m512i mx_shift(const uint8_t *scales) {
    const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)scales));
    const __m512i d = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(252), e), 7);
    return _mm512_or_si512(d, _mm512_slli_epi32(d, 16));
}
// Pair i of the four that x holds.
INLINE __m512i mx_pair(__m512i x, const int i, mx_table table, __m512i shift, const int minimum) {
    if (i) x = _mm512_srli_epi16(x, (unsigned)(4 * i));
    const __m512i w = _mm512_permutexvar_epi16(x, table);
    return minimum ? _mm512_sub_epi16(w, _mm512_min_epu16(w, shift)) : _mm512_subs_epi16(w, shift);
}

// 8 k of 32 columns to pairs [4][32][2].
INLINE void mx_expand_8(bf16 *dst, const uint8_t *codes, mx_table table, const __m512i shift[2]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m512i x = _mm512_loadu_si512(codes + half * 64);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(dst + i * 64 + half * 32, mx_pair(x, i, table, shift[half], 0));
    }
}
INLINE void mx_shifts(__m512i shift[2], const uint8_t *scales) {
    shift[0] = mx_shift(scales);
    shift[1] = mx_shift(scales + 16);
}
typedef __m512i mx_shift_of_panel[2];

#else

typedef struct {
    __m256i high, low;  // bytes of the words
} mx_table;
INLINE mx_table mx_words(const int minimum) {
    const uint16_t zero = minimum ? 0 : 0x8000, words[16] = {MX_WORDS(zero), MX_NEGATIVE(zero)};
    uint8_t high[16], low[16];
    for (int i = 0; i < 16; i++) {
        high[i] = (uint8_t)(words[i] >> 8);
        low[i] = (uint8_t)words[i];
    }
    return (mx_table){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high)),
                      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low))};
}
// (252 - e) << 7 in both words of 8 columns.
INLINE __m256i mx_shift(const uint8_t *scales) {
    const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)scales));
    const __m256i d = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(252), e), 7);
    return _mm256_or_si256(d, _mm256_slli_epi32(d, 16));
}
// 8 k of 8 columns to their four pairs. Bytes 0 and 2 of a column (k 0 1, and 2 3 in the high nibbles) go to the lower
// half of a lane, 1 and 3 to the upper one: so the words of a pair are where the bytes of both tables interleave. 16
// operations; nibbles in place, whose table bytes shifts and masks put together, took 23.
INLINE void mx_pairs(__m256i w[4], __m256i x, mx_table table, __m256i shift) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i nibble = _mm256_set1_epi8(15);
    x = _mm256_shuffle_epi8(x, order);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const __m256i code = _mm256_and_si256(odd ? _mm256_srli_epi16(x, 4) : x, nibble);
        const __m256i high = _mm256_shuffle_epi8(table.high, code), low = _mm256_shuffle_epi8(table.low, code);
        w[odd] = _mm256_subs_epi16(_mm256_unpacklo_epi8(low, high), shift);
        w[odd + 2] = _mm256_subs_epi16(_mm256_unpackhi_epi8(low, high), shift);
    }
}
typedef __m256i mx_shift_of_panel[4];
INLINE void mx_shifts(__m256i shift[4], const uint8_t *scales) {
    for (int i = 0; i < 4; i++) shift[i] = mx_shift(scales + 8 * i);
}
INLINE void mx_expand_8(bf16 *dst, const uint8_t *codes, mx_table table, const __m256i shift[4]) {
    for (int i = 0; i < 4; i++) {  // 8 columns
        __m256i w[4];
        mx_pairs(w, _mm256_loadu_si256((const __m256i *)(codes + 32 * i)), table, shift[i]);
        for (int pair = 0; pair < 4; pair++) _mm256_storeu_si256((__m256i *)(dst + pair * 64 + 16 * i), w[pair]);
    }
}

#endif

// k0 .. k0 + kc of panel p as a panel of bf16 at dst; k0 is a multiple of 64, kc of 32. The stream of the next chunk is
// brought to L2 meanwhile.
static const bf16 *mx_expand(bf16 *dst, const pace_matrix *w, long p, long k0, long kc) {
    const uint8_t *block = mx_block(w, p, k0);
    const mx_table table = mx_words(0);
    for (long k = 0; k < kc; k += 32) {
        const uint8_t *at = block + k / 64 * PACE_MX_BLOCK, *codes = at + 64 + k % 64 * 16;
        for (uintptr_t i = 0; i < 9; i++) FETCH((uintptr_t)codes + MX_CHUNK / 64 * PACE_MX_BLOCK + 64 * i, _MM_HINT_T1);
        mx_shift_of_panel shift;
        mx_shifts(shift, at + k % 64);
        for (long q = 0; q < 4; q++) mx_expand_8(dst + (k + 8 * q) * PACE_NR, codes + 128 * q, table, shift);
    }
    return dst;
}

// ---- register tiles on a panel's own bytes: bf16 rows here, int8 rows in mm_int8.h --------------------------

// A tile's panel comes from memory (a lone tile), or it was brought to L2 while the last one was worked on, each of
// that one's tiles having fetched a share.
enum mx_fetch { MX_NONE, MX_AHEAD, MX_SHARE };
typedef struct {
    const void *a;     // rows [mr][lda]
    const uint8_t *b;  // panels, bps bytes apart
    float *c;          // [mr][ldc]
    long lda, bps, ldc, k;
    uintptr_t share;  // MX_SHARE: what to fetch, share_step bytes per group of k
    long share_step;
} mx_args;

// Bytes ahead, to L1: with the L2 as the goal a lone tile waits for every line again (one thread, panels in memory,
// bf16, 2 rows: 10 instead of 18 GB/s).
#define MX_BYTES_AHEAD 4096

// Most bytes of a share per group: half a group of a panel.
#define MX_SHARE_LINES 5
INLINE void mx_fetch_share(uintptr_t *at, long step, const uintptr_t lines) {
#pragma GCC unroll 10
    for (uintptr_t i = 0; i < lines; i++) FETCH(*at + 64 * i, _MM_HINT_T1);
    *at += (uintptr_t)step;
}

#if defined(__AVX512F__) && !defined(PACE_AMX)
#define MX_ROWS (MM_SPLIT == 1 ? 12 : 8)  // accumulators of 2 vectors; the table, shifts, codes and a broadcast take 8

// nv / 2 panels; mr, nv and fetch are compile-time constants.
INLINE void mx_tile(const int mr, const int nv, const int fetch, const mx_args *t) {
    const int minimum = mr >= 4;
    const mx_table table = mx_words(minimum);
    __m512 acc[12][4];
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) acc[r][j] = _mm512_setzero_ps();
    const uint8_t *codes = t->b + 64, *scales = t->b;
    const bf16 *a = t->a;
    const long lda = t->lda, bps = t->bps, step = t->share_step;
    uintptr_t share = t->share;
    for (long g = 0; g < t->k / PACE_MX_GROUP; g++) {
        __m512i shift[4];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) shift[j] = mx_shift(scales + (j / 2) * bps + (j % 2) * 16);
        if (fetch == MX_SHARE) mx_fetch_share(&share, step, MX_SHARE_LINES);
#pragma GCC unroll 2
        for (int j = 0; fetch == MX_AHEAD && j < nv; j += 2)
            FETCH((uintptr_t)scales + (uintptr_t)(j / 2 * bps) + MX_BYTES_AHEAD, _MM_HINT_T0);
        for (int q = 0; q < 4; q++) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) {
                const uint8_t *at = codes + (j / 2) * bps + (j % 2) * 64;
                x[j] = _mm512_loadu_si512(at);
                if (fetch == MX_AHEAD) FETCH((uintptr_t)at + MX_BYTES_AHEAD, _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i w[4][MM_SPLIT];
#pragma GCC unroll 4
                for (int j = 0; j < nv; j++) mm_split(w[j], mx_pair(x[j], i, table, shift[j], minimum));
#pragma GCC unroll 12
                for (int r = 0; r < mr; r++) {
                    int32_t y;
                    memcpy(&y, a + r * lda + 2 * i, 4);
#pragma GCC unroll 4
                    for (int j = 0; j < nv; j++) acc[r][j] = mm_dot(acc[r][j], w[j], y);
                }
            }
            codes += 128;
            a += 8;
        }
        scales += 32;
        if (g % 2) {  // behind the next scales
            scales += PACE_MX_BLOCK - 64;
            codes += 64;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) _mm512_storeu_ps(t->c + r * t->ldc + j * 16, acc[r][j]);
}

// mr <= MX_ROWS rows times a panel; one row takes two panels as well.
static void mx_rows(int mr, int panels, int fetch, const mx_args *t) {
#define MX_CASE(MR)                      \
    case MR:                             \
        if (MR > MX_ROWS) break;         \
        if (fetch == MX_AHEAD)           \
            mx_tile(MR, 2, MX_AHEAD, t); \
        else if (fetch == MX_SHARE)      \
            mx_tile(MR, 2, MX_SHARE, t); \
        else                             \
            mx_tile(MR, 2, MX_NONE, t);  \
        return;
    if (panels == 2) {
        mx_tile(1, 4, MX_AHEAD, t);
        return;
    }
    switch (mr) {
        MX_CASE(1)
        MX_CASE(2)
        MX_CASE(3)
        MX_CASE(4)
        MX_CASE(5)
        MX_CASE(6)
        MX_CASE(7)
        MX_CASE(8)
        MX_CASE(9)
        MX_CASE(10)
        MX_CASE(11)
        MX_CASE(12)
    }
#undef MX_CASE
}
#else
#define MX_ROWS 0
INLINE void mx_rows(int mr, int panels, int fetch, const mx_args *t) { (void)mr, (void)panels, (void)fetch, (void)t; }
#endif

// ---- packing ----------------------------------------------------------------------------------------------

// Makes e one of 1 .. 252 without changing a value: what is below 2^-126 becomes zero, as every product takes it.
// False: e is 255, which is NaN, or a value is 2^128 or more.
static int mx_normalise(uint8_t *e, uint8_t codes[16]) {
    // Indices of magnitudes doubled and halved; 8: there is none. What is halved to less than .5 is below 2^-126.
    static const uint8_t twice[8] = {0, 2, 4, 5, 6, 7, 8, 8}, half[8] = {0, 0, 0, 0, 2, 3, 4, 5};
    if (*e == 255) return 0;
    const int from = *e;
    for (int n = from > 252 ? from - 252 : from == 0; n > 0; n--)
        for (int i = 0; i < 16; i++) {
            const uint8_t *to = from ? twice : half, lo = to[codes[i] & 7], hi = to[codes[i] >> 4 & 7];
            if (lo > 7 || hi > 7) return 0;
            codes[i] = (uint8_t)((codes[i] & 0x88) | lo | hi << 4);
        }
    if (from > 252) *e = 252;
    if (from < 2) {  // .5 is 2^-127 here
        for (int i = 0; i < 16; i++) {
            if ((codes[i] & 7) == 1) codes[i] &= 0xf8;
            if ((codes[i] >> 4 & 7) == 1) codes[i] &= 0x8f;
        }
        *e = 1;
    }
    return 1;
}

// Eight codes k 0 .. 7 of a row, low nibble first, in the order of a panel.
INLINE uint32_t mx_order(uint32_t x) {
    uint32_t even = x & 0x0f0f0f0f, odd = x >> 4 & 0x0f0f0f0f;
    even = (even | even >> 4) & 0x00ff00ff;
    odd = (odd | odd >> 4) & 0x00ff00ff;
    return ((even | even >> 8) & 0xffff) | (odd | odd >> 8) << 16;
}

// Up to 16 rows of blocks [rows][k / 32][16] and scales [rows][k / 32], as a checkpoint has them, rows ld_blocks and
// ld_scales bytes apart, to half a panel; missing rows become zeros. Returns the first row with a value that there is
// no number for, or -1.
static long pack_mxfp4(uint8_t *dst, const uint8_t *blocks, const uint8_t *scales, long ld_blocks, long ld_scales,
                       long rows, long k, long half) {
    for (long g = 0; g < k / 32; g++) {
        uint8_t *block = dst + g / 2 * PACE_MX_BLOCK, *e = block + g % 2 * 32 + half * 16;
        uint32_t order[4][16] = {{0}};
        memset(e, 0, 16);
        for (long r = 0; r < rows; r++) {
            uint8_t codes[16];
            memcpy(codes, blocks + r * ld_blocks + g * 16, 16);
            e[r] = scales[r * ld_scales + g];
            if ((e[r] < 2 || e[r] > 252) && !mx_normalise(&e[r], codes)) return r;
            uint32_t x[4];
            memcpy(x, codes, 16);
            for (int q = 0; q < 4; q++) order[q][r] = mx_order(x[q]);
        }
        for (int q = 0; q < 4; q++) memcpy(block + 64 + (g % 2 * 4 + q) * 128 + half * 64, order[q], 64);
    }
    return -1;
}

// Packed column `row` as f32.
static void mx_unpack_row(float *dst, const pace_matrix *w, long row) {
    static const float values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const uint8_t *panel = mx_block(w, row / PACE_NR, 0);
    for (long k = 0; k < w->k; k++) {
        const uint8_t *block = panel + k / 64 * PACE_MX_BLOCK;
        const int code = pace_mx_code(block, row % PACE_NR, k % 64), e = block[k % 64 / 32 * 32 + row % PACE_NR];
        const uint32_t bits = (uint32_t)e << 23;
        float scale;
        memcpy(&scale, &bits, 4);
        dst[k] = (code & 8 ? -values[code & 7] : values[code & 7]) * scale;
    }
}

#endif

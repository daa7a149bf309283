// mm.h - the register tile that GEMM and attention share: C[mr][16 nv] (+)= A[mr][2 kp] * B.
//
// A is bf16 with row stride lda. B comes in pair layout: for k pair p, vector j holds 16 columns x 2 k at
// b + (j / 2) * bps + (j % 2) * 32 + p * ldb. A weight panel has ldb = 64; neighbouring panels are bps apart.
// A block of K or V has ldb = 2 * block or 2 * head_dim and bps = 64. C is f32 scratch with row stride ldc.
//
// Each element is acc = acc + a[2p] b[2p] + a[2p+1] b[2p+1] for p ascending, whatever mr and nv are: this is
// where DESIGN law 1 comes from. C may be stored and loaded between k chunks, which changes no bit.
//
// Registers (AVX-512): mr * nv accumulators + nv weights + 1 broadcast <= 32, hence 14 x 2, 6 x 4, 2 x 8.
// The skinny shapes use more weight vectors because one row and two vectors would wait on the latency of the dot
// product. Rows are addressed from every third row's pointer (x, x + lda, x + 2 lda) so that 14 rows need 5 pointers.
//
//   tier         inner step per 16 columns and k pair               per cycle
//   avx512bf16   vdpbf16ps                                          Zen 4: 1, Zen 5: 2, Golden Cove: 0.5
//   avx512       shift, mask, 2 vfmadd                              1
//   avx2         the same on two 8-lane halves                      0.5
#ifndef PACE_MM_H
#define PACE_MM_H

#include "simd.h"

#define MM_PREFETCH_AHEAD 2048  // bytes ahead in each skinny stream: beyond a 4 KB page's end for the L2 prefetcher

typedef struct {
    const bf16 *a, *b;
    float *c;
    uintptr_t prefetch;  // 0, or prefetch_step (<= 128) bytes per k pair from there are brought to L2 along the way
    long prefetch_step;
    long lda, ldb, bps, ldc, kp;
    int accumulate;
    uintptr_t prefetch_rows;  // amx only: 0, or four rows of A, lda apart, of which a line per 16 k pairs is brought
} mm_args;

#if defined(__AVX512F__)

#ifdef __AVX512BF16__
#define MM_ROWS_1 14
#define MM_ROWS_2 14
#define MM_ROWS_4 6
#define MM_ROWS_8 2
typedef __m512i mm_w;  // 16 columns x 2 k
#define MM_SPLIT 1
INLINE void mm_split(__m512i w[MM_SPLIT], __m512i x) { w[0] = x; }
INLINE __m512 mm_dot(__m512 acc, const __m512i w[MM_SPLIT], int32_t x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w[0]);
}
#else
// Each weight vector becomes two (even and odd k) and so does the broadcast: fewer rows fit.
#define MM_ROWS_1 14
#define MM_ROWS_2 12
#define MM_ROWS_4 5
#define MM_ROWS_8 1
#define MM_SPLIT 2
INLINE void mm_split(__m512i w[MM_SPLIT], __m512i x) {
    w[0] = _mm512_slli_epi32(x, 16);
    w[1] = _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000u));
}
INLINE __m512 mm_dot(__m512 acc, const __m512i w[MM_SPLIT], int32_t x) {
    __m512i v = _mm512_set1_epi32(x);
    acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(w[0]), acc);
    v = _mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000u));
    return _mm512_fmadd_ps(_mm512_castsi512_ps(v), _mm512_castsi512_ps(w[1]), acc);
}
#endif

// mr, nv and fetch are compile-time constants in every call.
INLINE void mm_tile(const int mr, const int nv, const int fetch, const mm_args *g) {
    __m512 acc[14][8];
#pragma GCC unroll 14
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            acc[r][j] = g->accumulate ? _mm512_loadu_ps(g->c + r * g->ldc + j * 16) : _mm512_setzero_ps();
    const bf16 *a[5], *b = g->b;
    const long lda = g->lda, ldb = g->ldb, bps = g->bps;
    uintptr_t pf = g->prefetch;
    const long step = g->prefetch_step;
#pragma GCC unroll 5
    for (int i = 0; i < 5; i++) a[i] = g->a + (3 * i < mr ? 3 * i : 0) * lda;
    for (long p = 0; p < g->kp; p++) {
        __m512i w[8][MM_SPLIT];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            mm_split(w[j], _mm512_loadu_si512(b + (j / 2) * bps + (j % 2) * 32));
        }
        if (fetch) {  // to which cache: measured, see GEMM_AHEAD
            FETCH(pf, mr >= 3 && mr <= 6 ? _MM_HINT_T0 : _MM_HINT_T1);
            FETCH(pf + (uintptr_t)(step / 2), mr >= 3 && mr <= 6 ? _MM_HINT_T0 : _MM_HINT_T1);
            pf += (uintptr_t)step;
        }
#pragma GCC unroll 14
        for (int r = 0; r < mr; r++) {
            int32_t x;
            memcpy(&x, a[r / 3] + (r % 3) * lda, 4);
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) acc[r][j] = mm_dot(acc[r][j], w[j], x);
        }
#pragma GCC unroll 5
        for (int i = 0; i < 5; i++) a[i] += 2;
        b += ldb;
    }
#pragma GCC unroll 14
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) _mm512_storeu_ps(g->c + r * g->ldc + j * 16, acc[r][j]);
}

#else  // AVX2: 16 registers hold 4 x 1, 2 x 2 or 1 x 4 tiles of 16 columns

#define MM_ROWS_1 4
#define MM_ROWS_2 2
#define MM_ROWS_4 1
#define MM_ROWS_8 0

INLINE void mm_split(__m256 *even, __m256 *odd, const bf16 *p) {  // 8 columns x 2 k
    const __m256i w = _mm256_loadu_si256((const __m256i *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u)));
}

INLINE void mm_tile(const int mr, const int nv, const int fetch, const mm_args *g) {
    __m256 acc[4][8];
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * nv; j++)
            acc[r][j] = g->accumulate ? _mm256_loadu_ps(g->c + r * g->ldc + j * 8) : _mm256_setzero_ps();
    const bf16 *a = g->a, *b = g->b;
    uintptr_t pf = g->prefetch;
    const long step = g->prefetch_step;
    for (long p = 0; p < g->kp; p++) {
        if (fetch) {
            FETCH(pf, _MM_HINT_T1);
            FETCH(pf + (uintptr_t)(step / 2), _MM_HINT_T1);
            pf += (uintptr_t)step;
        }
        __m256 even[4], odd[4], w0[8], w1[8];
        // The smaller side rests in registers: two weight vectors for 3 or 4 rows, else the rows.
        if (mr > 2) {
#pragma GCC unroll 8
            for (int j = 0; j < 2 * nv; j++) mm_split(w0 + j, w1 + j, b + j * 16);
        }
#pragma GCC unroll 4
        for (int r = 0; r < mr; r++) {
            int32_t x;
            memcpy(&x, a + r * g->lda, 4);
            const __m256i v = _mm256_set1_epi32(x);
            even[r] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
            odd[r] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000u)));
            if (mr > 2) {
#pragma GCC unroll 8
                for (int j = 0; j < 2 * nv; j++)
                    acc[r][j] = _mm256_fmadd_ps(odd[r], w1[j], _mm256_fmadd_ps(even[r], w0[j], acc[r][j]));
            }
        }
        if (mr <= 2) {
#pragma GCC unroll 8
            for (int j = 0; j < 2 * nv; j++) {
                mm_split(w0 + j, w1 + j, b + (j / 4) * g->bps + (j % 4) * 16);
#pragma GCC unroll 4
                for (int r = 0; r < mr; r++)
                    acc[r][j] = _mm256_fmadd_ps(odd[r], w1[j], _mm256_fmadd_ps(even[r], w0[j], acc[r][j]));
            }
        }
        a += 2;
        b += g->ldb;
    }
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < 2 * nv; j++) _mm256_storeu_ps(g->c + r * g->ldc + j * 8, acc[r][j]);
}

#endif

// One register tile; mr <= MM_ROWS_<nv>.
static void mm(int mr, int nv, const mm_args *g) {
#define MM_CASE(NV, MR)               \
    case NV * 16 + MR:                \
        if (MR > MM_ROWS_##NV) break; \
        if (g->prefetch)              \
            mm_tile(MR, NV, 1, g);    \
        else                          \
            mm_tile(MR, NV, 0, g);    \
        return;
#define MM_3(NV) MM_CASE(NV, 1) MM_CASE(NV, 2) MM_CASE(NV, 3)
#define MM_6(NV) MM_3(NV) MM_CASE(NV, 4) MM_CASE(NV, 5) MM_CASE(NV, 6)
#define MM_14(NV)  \
    MM_6(NV)       \
    MM_CASE(NV, 7) \
    MM_CASE(NV, 8) MM_CASE(NV, 9) MM_CASE(NV, 10) MM_CASE(NV, 11) MM_CASE(NV, 12) MM_CASE(NV, 13) MM_CASE(NV, 14)
    switch (nv * 16 + mr) {
#ifdef __AVX512F__
        MM_14(1) MM_14(2) MM_6(4) MM_CASE(8, 1) MM_CASE(8, 2)
#else
        MM_CASE(1, 1) MM_CASE(1, 2) MM_CASE(1, 3) MM_CASE(1, 4) MM_CASE(2, 1) MM_CASE(2, 2) MM_CASE(4, 1)
#endif
    }
#undef MM_CASE
#undef MM_3
#undef MM_6
#undef MM_14
}

// The widest tile that `rows` rows allow: vectors per step.
INLINE int mm_width(long rows) {
    return rows <= MM_ROWS_8 ? 8 : rows <= MM_ROWS_4 ? 4 : rows <= MM_ROWS_2 ? 2 : MM_ROWS_2 >= 8 ? 2 : 1;
}
INLINE long mm_rows(int nv) { return nv == 8 ? MM_ROWS_8 : nv == 4 ? MM_ROWS_4 : nv == 2 ? MM_ROWS_2 : MM_ROWS_1; }

// Any rows x nv_total: rows in equal tiles (33 rows are 3 x 11, not 14 + 14 + 5), columns in the widest steps.
static void mm_block(long rows, int nv_total, mm_args g) {
    const int width = mm_width(rows);
    const bf16 *a = g.a, *b = g.b;
    float *c = g.c;
    for (int j = 0; j < nv_total;) {
        int nv = width;
        while (nv > nv_total - j) nv /= 2;
        long most = mm_rows(nv), tiles = (rows + most - 1) / most, done = 0;
        for (long t = 0; t < tiles; t++) {
            long mr = (rows - done) / (tiles - t);
            g.a = a + done * g.lda;
            g.b = b + j * 32;
            g.c = c + done * g.ldc + j * 16;
            mm((int)mr, nv, &g);
            done += mr;
        }
        j += nv;
    }
}

#endif

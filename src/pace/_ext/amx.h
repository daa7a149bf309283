// amx.h - the GEMM tile of the amx tier: up to 32 rows x 32 columns in four 16 x 16 f32 tiles.
//
// The packed panel is already what tdpbf16ps wants: 16 k pairs x 16 columns of a panel are a B tile with a row
// stride of 128 bytes, 16 rows x 32 k of the activations an A tile. Per 32 k: 4 tile loads, 4 tdpbf16ps of 16
// cycles. One tdpbf16ps sums its 32 k in a fixed order and adds once to C, so the result of an element depends
// on neither the rows beside it nor the tile's row count.
#ifndef PACE_AMX_H
#define PACE_AMX_H

#include "mm.h"

typedef struct {
    int rows;  // what the tiles are configured for; 0: not yet
} gemm_state;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t col_bytes[16];
    uint8_t rows[16];
} tile_config;

INLINE void gemm_begin(gemm_state *s, int few) {
    (void)few;
    s->rows = 0;
}
INLINE void gemm_end(gemm_state *s) {
    if (s->rows) _tile_release();  // else the kernel saves 8 KB of tile state at every context switch
}

// Tiles 0..3: C (rows x 2 column halves), 4 and 5: A, 6 and 7: B; `bytes` of k each.
static void amx_configure(int rows, int bytes) {
    tile_config t;
    memset(&t, 0, sizeof t);
    t.palette = 1;
    const uint8_t top = (uint8_t)(rows < 16 ? rows : 16), low = (uint8_t)(rows > 16 ? rows - 16 : 1);
    for (int i = 0; i < 8; i++) t.col_bytes[i] = 64;
    t.rows[0] = t.rows[1] = t.rows[4] = top;
    t.rows[2] = t.rows[3] = t.rows[5] = low;
    t.rows[6] = t.rows[7] = (uint8_t)(bytes / 4);
    t.col_bytes[4] = t.col_bytes[5] = (uint16_t)bytes;
    // GCC 12's _tile_loadconfig names 8 of the 64 bytes as its input, so the stores above would be dropped.
    __asm__ volatile("ldtilecfg %0" ::"m"(t));
}

// GCC 12's tile loads do not tell the compiler that they read memory: without this, stores to A or C made just before
// could be moved behind them. (Its tile stores do clobber memory.)
#define AMX_FENCE __asm__ volatile("" ::: "memory")

// Tiles 0 .. 3 are the sums of 32 rows and 32 columns, 0 and 1 those of 16 rows, at c, rows `ldc` bytes apart: zeros,
// or what stands there. halves: 1 or 2, a constant.
INLINE void amx_sums(const int halves, int accumulate, const void *c, size_t ldc) {
    const char *low = (const char *)c + 16 * ldc;
    if (accumulate) {
        _tile_loadd(0, c, ldc);
        _tile_loadd(1, (const char *)c + 64, ldc);
        if (halves == 2) {
            _tile_loadd(2, low, ldc);
            _tile_loadd(3, low + 64, ldc);
        }
        return;
    }
    _tile_zero(0);
    _tile_zero(1);
    if (halves == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
}
INLINE void amx_store(const int halves, void *c, size_t ldc) {
    char *low = (char *)c + 16 * ldc;
    _tile_stored(0, c, ldc);
    _tile_stored(1, (char *)c + 64, ldc);
    if (halves == 2) {
        _tile_stored(2, low, ldc);
        _tile_stored(3, low + 64, ldc);
    }
}

// fetch: AMX_STREAM, all lines of 2 KB per step (the next panel), AMX_SHARE, some of them (what many tiles fetch
// together), and AMX_SHARE_ROWS, also a line of each of four rows (of the next row tile: 32 rows on 32 pages are more
// streams than the hardware prefetcher follows).
enum { AMX_ALONE, AMX_STREAM, AMX_SHARE, AMX_SHARE_ROWS };
INLINE void amx_tile(const int halves, const int fetch, const mm_args *g) {
    AMX_FENCE;
    const size_t lda = (size_t)g->lda * 2, ldc = (size_t)g->ldc * 4, ldb = (size_t)g->ldb * 2;
    amx_sums(halves, g->accumulate, g->c, ldc);
    const bf16 *a = g->a, *b = g->b;
    uintptr_t pf = g->prefetch, rows = g->prefetch_rows;
    const uintptr_t share = (uintptr_t)g->prefetch_step * 16;
    for (long p = 0; p < g->kp; p += 16) {
        _tile_loadd(6, b, ldb);
        _tile_loadd(4, a, lda);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 32, ldb);
        _tile_dpbf16ps(1, 4, 7);
        if (halves == 2) {
            _tile_loadd(5, a + 16 * g->lda, lda);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (fetch == AMX_STREAM) {
#pragma GCC unroll 32
            for (uintptr_t i = 0; i < 32; i++) FETCH(pf + 64 * i, _MM_HINT_T1);
            pf += 32 * 64;
        }
        if (fetch == AMX_SHARE || fetch == AMX_SHARE_ROWS) {
            for (uintptr_t i = 0; i < share; i += 64) FETCH(pf + i, _MM_HINT_T1);
            pf += share;
        }
        if (fetch == AMX_SHARE_ROWS) {
#pragma GCC unroll 4
            for (uintptr_t i = 0; i < 4; i++) FETCH(rows + i * lda, _MM_HINT_T1);
            rows += 64;
        }
        a += 32;
        b += 16 * g->ldb;
    }
    amx_store(halves, g->c, ldc);
}

// A few rows without tiles, bit for bit what tdpbf16ps computes: per 32 k the even and the odd products are two
// FMA chains (denormals flushed, as the team's control word does) whose sum is added to C once. Four or two panels
// stream side by side: at one row 1.05 of the read roof, where tiles reach 0.87 of it with one panel or
// two and any prefetch (their loads wait on the L1's fill buffers).
INLINE void amx_like(const int mr, const int nv, const mm_args *g) {
    __m512 c[4][8];
    const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            c[r][j] = g->accumulate ? _mm512_loadu_ps(g->c + r * g->ldc + j * 16) : _mm512_setzero_ps();
    const bf16 *a = g->a, *b = g->b;
    for (long p = 0; p < g->kp; p += 16) {
        __m512 even[4][8], odd[4][8];
#pragma GCC unroll 4
        for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) even[r][j] = odd[r][j] = _mm512_setzero_ps();
        for (int i = 0; i < 16; i++, a += 2, b += g->ldb) {
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) {
                const bf16 *at = b + (j / 2) * g->bps + (j % 2) * 32;
                const __m512i w = _mm512_loadu_si512(at);
                if (g->prefetch) FETCH((uintptr_t)at + MM_PREFETCH_AHEAD, _MM_HINT_T0);
                const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
                const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(w, high));
#pragma GCC unroll 4
                for (int r = 0; r < mr; r++) {
                    int32_t x;
                    memcpy(&x, a + r * g->lda, 4);
                    const __m512i v = _mm512_set1_epi32(x);
                    even[r][j] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), w0, even[r][j]);
                    odd[r][j] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(v, high)), w1, odd[r][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) c[r][j] = _mm512_add_ps(c[r][j], _mm512_add_ps(even[r][j], odd[r][j]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) _mm512_storeu_ps(g->c + r * g->ldc + j * 16, c[r][j]);
}

#define AMX_LIKE_ROWS 2       // GEMM: from three rows on the products cost more than the stream
#define AMX_LIKE_ATTENTION 4  // attention: one query token of a 4:1 group
static void amx_rows(int rows, int nv, const mm_args *g) {
    switch (rows * 16 + nv) {
#define AMX_CASE(ROWS, NV)     \
    case ROWS * 16 + NV:       \
        amx_like(ROWS, NV, g); \
        return;
        AMX_CASE(1, 8)
        AMX_CASE(1, 4)
        AMX_CASE(1, 2)
        AMX_CASE(1, 1)
        AMX_CASE(2, 4)
        AMX_CASE(2, 2)
        AMX_CASE(2, 1)
        AMX_CASE(3, 2)
        AMX_CASE(3, 1)
        AMX_CASE(4, 2)
        AMX_CASE(4, 1)
#undef AMX_CASE
    }
}

// Any rows x columns (a multiple of 16) with tiles configured for 32 rows: the attention products. Row counts are
// rounded up to 16: the rows beyond are scratch of the caller, read and written but never used. kp: multiple of 16.
static void amx_block(long rows, long columns, const mm_args *g) {
    if (rows <= AMX_LIKE_ATTENTION) {
        mm_args part = *g;
        const int widest = rows == 1 ? 8 : rows == 2 ? 4 : 2;
        for (long n = 0, nv; n < columns; n += 16 * nv) {
            nv = widest;
            while (16 * nv > columns - n) nv /= 2;
            part.b = g->b + 2 * n;
            part.c = g->c + n;
            amx_rows((int)rows, (int)nv, &part);
        }
        return;
    }
    AMX_FENCE;
    const size_t lda = (size_t)g->lda * 2, ldb = (size_t)g->ldb * 2, ldc = (size_t)g->ldc * 4;
    for (long r = 0; r < rows; r += 32)
        for (long n = 0; n < columns; n += 32) {
            const int low = r + 16 < rows, right = n + 16 < columns;
            const bf16 *a = g->a + r * g->lda, *b = g->b + n * 2;
            float *c = g->c + r * g->ldc + n;
            if (g->accumulate) {
                _tile_loadd(0, c, ldc);
                if (right) _tile_loadd(1, c + 16, ldc);
                if (low) _tile_loadd(2, c + 16 * g->ldc, ldc);
                if (low && right) _tile_loadd(3, c + 16 * g->ldc + 16, ldc);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long p = 0; p < g->kp; p += 16, a += 32, b += 16 * g->ldb) {
                _tile_loadd(4, a, lda);
                _tile_loadd(6, b, ldb);
                _tile_dpbf16ps(0, 4, 6);
                if (right) {
                    _tile_loadd(7, b + 32, ldb);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (low) {
                    _tile_loadd(5, a + 16 * g->lda, lda);
                    _tile_dpbf16ps(2, 5, 6);
                    if (right) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c, ldc);
            if (right) _tile_stored(1, c + 16, ldc);
            if (low) _tile_stored(2, c + 16 * g->ldc, ldc);
            if (low && right) _tile_stored(3, c + 16 * g->ldc + 16, ldc);
        }
}

static void gemm_tile(gemm_state *s, int rows, const mm_args *g) {
    if (s->rows != rows) {
        amx_configure(rows, 64);
        s->rows = rows;
    }
    const int fetch = g->prefetch_rows          ? AMX_SHARE_ROWS
                      : !g->prefetch            ? AMX_ALONE
                      : g->prefetch_step == 128 ? AMX_STREAM
                                                : AMX_SHARE;
#define AMX_CASE(HALVES, FETCH_)     \
    case HALVES * 8 + FETCH_:        \
        amx_tile(HALVES, FETCH_, g); \
        return;
    switch ((rows > 16 ? 2 : 1) * 8 + fetch) {
        AMX_CASE(1, AMX_ALONE)
        AMX_CASE(1, AMX_STREAM)
        AMX_CASE(1, AMX_SHARE)
        AMX_CASE(1, AMX_SHARE_ROWS)
        AMX_CASE(2, AMX_ALONE)
        AMX_CASE(2, AMX_STREAM)
        AMX_CASE(2, AMX_SHARE)
        AMX_CASE(2, AMX_SHARE_ROWS)
    }
#undef AMX_CASE
}

#endif

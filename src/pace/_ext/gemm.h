// gemm.h - C = epilogue(A W^T): A [m][k] bf16, W packed panels of 32 columns, f32 accumulation.
//
// Four ways through tiles that add in the same order, so all give the same bits:
//   few      a handful of tiles (up to GEMM_FEW rows): panel by panel, so that weights stream from memory once and
//            in one sequence; one tile fetches a little ahead of itself, several share the fetching of the next
//            GEMM_FEW_KC of k, so that memory works all the time and no tile waits for it. (The first tile alone, a
//            whole panel ahead: 16 rows 108 instead of 99 ms, 32 rows 207 instead of 194, on a Zen 4.)
//   skinny   few rows on avx2 and amx: 1, 2 or 4 panels side by side.
//   codes    few rows on codes, which become f32 in registers, on tiers without dot products of bf16.
//   blocked  many rows: GEMM_GROUP panels x GEMM_MC rows x GEMM_KC of k; a group of panels stays in L2 over all
//            rows, C tiles rest in f32 scratch between k chunks.
// The tile goes to scratch (L1) and the epilogue works from there: 1 load and 1 store per 1000 dot products, and
// bias, residual, activation x gate need no variant of the tile.
#ifndef PACE_GEMM_H
#define PACE_GEMM_H

#include "cpu.h"
#include "mm.h"
#include "mm_groups.h"
#include "mm_int8_groups.h"
#ifndef __AVX512BF16__
#include "mm_codes.h"
#include "mm_rows.h"
#endif
#if defined(__AVX512VNNI__) && !defined(__AVX512BF16__)
#include "mm_int8_pairs.h"
#endif
#ifndef __AVX512F__
#include "mm_nibbles.h"
#include "mm_words.h"
#endif
#include "mxfp4.h"

#ifdef PACE_AMX
#define GEMM_TILE_ROWS 32
#define GEMM_ROW_STEP 512  // bytes: 32 rows of GEMM_KC are then 4 lines in each set of L1
// 32 rows x 256 k of A are 16 KB, and as much of B: A's tile, this panel's chunk and the next one's fit 48 KB of L1.
// 512 rows of gate|up / down / o of the 1B shape, TFLOP/s of two Granite Rapids cores, chunks of 512 with 256 rows a
// block and only rows fetched: 1.45 to 1.75 / 1.94 / 1.90; with the next chunk fetched by all tiles 1.88 / 1.96 / 1.86;
// chunks of 256 and 512 rows 2.34 / 2.34 / 2.21; rows spread over the sets (GEMM_ROW_STEP) 2.47 / 2.63 / 2.40. Groups
// of 16: 2.28 / 2.33 / 2.15; a panel's chunk kept while rows pass, instead of rows while panels pass: 2.35 / 2.46
// / 2.25. From L1 alone tiles of random numbers reach 2.3 a core, from L2 1.7 (of zeros 3.0 and 2.1: what is loaded
// decides); the roof, products of tiles that stay, is 3.7 of either.
#define GEMM_KC 256
#define GEMM_FEW 64
#define GEMM_FEW_KC k
#define GEMM_SPREAD(tiles) 1  // how many tiles share the fetching of the next chunk: a step of 32 k is long enough
#define GEMM_FETCH_ROWS 1     // 32 rows on 32 pages: more streams than the hardware follows
#define GEMM_FETCHERS(tiles) (tiles)  // row tiles that share the fetching of the next chunk
#define GEMM_GROUP 8
#define GEMM_MC 512
#define GEMM_AHEAD(rows) 4096  // bytes ahead of a single tile's stream; on amx 2 to 16 KB made no difference
#elif !defined(__AVX512BF16__)
#define GEMM_TILE_ROWS MR_ROWS
#define GEMM_ROW_STEP 64
// A group's chunks are 128 KB: beside the next ones and 128 KB of sums they stay in the 512 KB that Zen 3 has of L2.
// Rows are widened for 4 panels at once, 3 % of the products. One Zen 3 core on 2048 x 2048, share of its dot roof, the
// better of two, 512 / 32 / 8 rows: this 0.90 / 0.88 / 0.74; 256 k 0.87 / 0.88 / 0.79; 1024 k 0.83 / 0.89 / 0.74; 8
// panels of 256 k and 240 rows 0.89 / 0.86 / 0.75. (4 x 1 tiles on rows in bf16, which this replaced, made the 1B shape
// 57.7 tokens/s of 512 and 32.8 of 8 sequences; this 73.0 and 38.5, two cores.)
#define GEMM_KC MR_CHUNK
#define GEMM_GROUP 4
#define GEMM_FETCHERS(tiles) ((tiles) <= 8 ? (tiles) : 2)  // few tiles: memory is to work all the time
#define GEMM_MC 256
// More rows are widened, and that for a group of panels. Rows of the 1B shape's gate-up in turns on two Cascade Lake
// cores, time of rows in bf16 by that of widened ones: 8 / 10 / 13 / 16 / 32 / 512 0.94 / 0.95 / 1.06 to 1.07 / 1.12 /
// 1.07 to 1.10 / 1.09 (down: 1.07).
#ifdef __AVX512F__
#define GEMM_FEW 10
#else
#define GEMM_FEW 2
#endif
#define GEMM_FEW_KC k
#define GEMM_SPREAD(tiles) (tiles)
#define GEMM_FETCH_ROWS 0
#define GEMM_AHEAD(rows) ((rows) <= 6 ? 4096 : 8192)
#else
#define GEMM_TILE_ROWS MM_ROWS_2
#define GEMM_ROW_STEP 64
// A group's chunks are 256 KB: beside the next ones, which the last GEMM_FETCHERS row tiles fetch, and the rows they
// stay in 1 MB of L2. 512 rows of Phi-4-mini's matrices on Zen 4, GFLOP/s (2 threads, roof 467), groups of 8 and chunks
// of 2048 without fetching / this: gate-up 434 / 441, down 411 / 425, qkv 427 / 430, o 420 / 423; 8 panels of 1024
// with fetching 432 / 427 / 429 / 422, without (8, 1024) 2 to 4 % less; 2 panels of 2048 431 / 404 / 427 / 425.
// On Zen 5 a tile takes half the time and its sums, stored and loaded for each chunk, count twice: chunks of 2048,
// means of four runs on two threads, share of the dot roof, 1024 x 4 panels / 2048 x 2 / x 3 / x 4: K = 2048, 512 rows
// 0.946 / 0.967 / 0.960 / 0.963; K = 8192, 512 rows 0.950 / 0.957 / 0.960 / 0.953; 1920 rows, which lie in L3 and are
// read for each group, 0.912 / 0.885 / 0.916 / 0.921. Three or four tiles that fetch, blocks of 128 or 512 rows: no
// difference.
#define GEMM_KC (pace_cpu_pairs_dots() ? 2048 : 1024)
#define GEMM_GROUP 4
#define GEMM_FETCHERS(tiles) 2  // the last row tiles of a chunk fetch the next one
#define GEMM_MC 256
// Codes with one scale a column are expanded for each block of rows, and sums stored for each chunk, so that both are
// larger: 512 rows of the 1B shape's gate-up and down on two Zen 5 cores, share of the dot roof, chunks of 256 / 512 /
// 1024 / 2048: 0.88 / 0.90 / 0.91 / 0.92 in blocks of 256 rows, - / - / 0.925 / 0.935 in blocks of 512 (bf16 0.955).
// Chunks are those of bf16, GEMM_KC; other CPUs than Zen 5 were not timed.
#define GEMM_MC_WHOLE 512
#define GEMM_FEW 64
#define GEMM_FEW_KC 2048  // a chunk and the next are 256 KB of L2; panels of K = 8192 would be 1 MB
#define GEMM_SPREAD(tiles) (tiles)
#define GEMM_FETCH_ROWS 0
// Bytes ahead of a single tile's stream. A decode step of the 1B shape on Zen 4 (2 threads, read roof 60 GB/s), panels
// side by side as on avx2 / 2 KB ahead / 4 KB ahead: 1 row 45 / 40 / 40 ms, 2 rows 48 / 39 / 39, 8 rows 58 / 85 / 58
// (2 KB at 8 rows: the loads catch up with their own prefetch). 3 to 6 rows fetch to L1: 4 rows 52 (L2) / 46 ms (L1); 1
// and 2 rows are faster with L2 (40 / 42), and so are 8 (58 / 61).
// The distance is a time: 13 rows spend 13 cycles on a pair of k that one row has done in one. 13 rows of the same
// shape, 4 / 8 / 12 / 16 KB ahead, share of their roofline: on Zen 4 with memory at 28 GB/s 0.89 / 0.96 / 0.95 / 0.98
// (8 rows 0.93 / 1.02 / 0.96 / 0.97, 14 rows 0.86 / 0.89 / 0.88 / 0.93); on Zen 5 at 77 GB/s 0.72 at 4 KB and 0.87
// at 16.
#define GEMM_AHEAD(rows) ((rows) <= 6 ? 4096u : (rows) <= 10 ? 8192u : 16384u)
#endif
#define GEMM_MX_BYTES \
    (384 << 10)  // of rows: with 8 panels of K = 2880, 392 KB, they fill three quarters of a Zen 4's L2
#define GEMM_MX_SHARERS 8
// Bytes ahead of a lone tile. 13 rows, a scale per column, 2 / 4 / 8 / 16 / 32 KB ahead: 15.8 / 14.5 / 14.7 / 14.9
// / 14.5 GB/s on a Granite Rapids core; 1 row 18.4 / 17.0 / 17.6 / 17.3 / 16.7.
#define GEMM_INT8_AHEAD 8192
#ifndef GEMM_MC_WHOLE
#define GEMM_MC_WHOLE GEMM_MC
#endif
#define GEMM_C (GEMM_GROUP * GEMM_MC_WHOLE * PACE_NR)
#define GEMM_SCRATCH (GEMM_C * sizeof(float) + GEMM_GROUP * sizeof(gr_chunk))

// c: [rows][ldc] f32, the first 32 columns are panel p of rows m..m + rows - 1.
static void gemm_epilogue(const void *op, long p, long m, long rows, const float *c, long ldc) {
    const pace_gemm *g = op;
    const float *bias = g->bias ? g->bias + p * PACE_NR : NULL;
    const int width = g->epilogue == PACE_EPILOGUE_gated ? PACE_NR / 2 : PACE_NR;
    const long n0 = p * width, n_left = g->dst.width - n0;
    const vf scale = v_set(g->scale), cap = v_set(g->cap);
    for (long r = 0; r < rows; r++, c += ldc) {
        for (int j = 0; j < width && j < n_left; j += VL) {
            vf y = v_load(c + j);
            if (bias) y = v_add(y, v_load(bias + j));
            const long at = (m + r) * g->dst.ld + n0 + j, left = n_left - j;
            if (g->epilogue == PACE_EPILOGUE_gated) {
                vf up = v_load(c + j + PACE_NR / 2);
                if (bias) up = v_add(up, v_load(bias + j + PACE_NR / 2));
                y = v_mul(v_act(y, g->act), up);
            } else if (g->epilogue == PACE_EPILOGUE_add) {
                float *out = (float *)g->dst.data + at;
                const vf by = g->other.data
                                  ? v_mul(scale, v_set(((const float *)g->other.data)[(m + r) * g->other.ld + g->at]))
                                  : scale;
                store_left(out, v_fma(y, by, load_left(out, left)), left);
                continue;
            } else {
                y = v_mul(v_act(y, g->act), scale);
                if (g->cap > 0.0f) y = v_mul(v_tanh(v_div(y, cap)), cap);
                if (g->epilogue == PACE_EPILOGUE_mul) {
                    const float *other = (const float *)g->other.data + (m + r) * g->other.ld + g->at + n0 + j;
                    y = v_mul(y, load_left(other, left));
                }
            }
            if (g->dst.bf16)
                store_bf16_left((bf16 *)g->dst.data + at, y, left);
            else
                store_left((float *)g->dst.data + at, y, left);
        }
    }
}

#ifdef PACE_AMX
#include "amx_int8.h"
#define GEMM_SKINNY amx_rows
#define GEMM_SKINNY_ROWS AMX_LIKE_ROWS
#define GEMM_SKINNY_WIDTH(rows) ((rows) == 1 ? 8 : 4)
#else
#define GEMM_SKINNY mm
#define GEMM_SKINNY_ROWS (MM_ROWS_2 >= 8 ? 0 : MM_ROWS_4)  // AVX-512: one stream is faster, see GEMM_AHEAD
#define GEMM_SKINNY_WIDTH mm_width
#ifdef __AVX512BF16__
typedef int gemm_state;
INLINE void gemm_begin(gemm_state *s, int few) { (void)s, (void)few; }
INLINE void gemm_tile(gemm_state *s, int rows, const mm_args *a) {
    (void)s;
    mm(rows, 2, a);
}
#else
typedef mr_rows gemm_state;
INLINE void gemm_begin(gemm_state *s, int few) { mr_begin(s, few); }
INLINE void gemm_tile(gemm_state *s, int rows, const mm_args *a) {
    if (mr_takes(s, rows))
        mr_panel(s, rows, a);
    else
        mm_block(rows, 2, *a);
}
#endif
INLINE void gemm_end(gemm_state *s) { (void)s; }
#endif

// Rows of the next tile: vector tiles are balanced (33 rows are 11 + 11 + 11), AMX tiles are filled, because a
// tile instruction costs the same for any row count above a few.
INLINE long gemm_rows_of(long rows_left, long tiles_left) {
#ifdef PACE_AMX
    (void)tiles_left;
    return rows_left < GEMM_TILE_ROWS ? rows_left : GEMM_TILE_ROWS;
#else
    return rows_left / tiles_left;
#endif
}

// What a product with panels of one matrix is: rows [m0, m0 + rows) of src, and what becomes of finished tiles.
typedef void gemm_done(const void *op, long p, long m, long rows, const float *c, long ldc);
typedef struct {
    const pace_matrix *w;
    const pace_slot *src;
    long m0, rows;
    float *c;              // scratch [GEMM_GROUP * GEMM_MC_WHOLE][PACE_NR]
    gr_chunk *expanded;    // scratch for GEMM_GROUP panels, of formats that are expanded
    gemm_done *done;       // takes c [rows][ldc]: panel p of src's rows m .. m + rows - 1
    const void *op;        // its first argument
    const pace_slot *dst;  // where it writes panel p of a row, side by side; NULL: elsewhere
    long dst_width;        // columns that a panel has there
} gemm_job;

INLINE const bf16 *gemm_row(const gemm_job *j, long m, long k) {
    return (const bf16 *)j->src->data + (j->m0 + m) * j->src->ld + k;
}
INLINE const bf16 *gemm_panel(const gemm_job *j, long p, long k) {
    return (const bf16 *)j->w->data + (p * j->w->k_pad + k) * PACE_NR;
}
// k0 .. k0 + kc of panel p in bf16: where it stands, or expanded to `to`.
INLINE const bf16 *gemm_chunk(const gemm_job *j, long p, long k0, long kc, gr_chunk *to) {
    if (j->w->layout == PACE_PANELS) return gemm_panel(j, p, k0);
    if (j->w->layout == PACE_MXFP4) return mx_expand(to->b, j->w, p, k0, kc);
    gr_expand(to, j->w, p, k0, kc);
    return to->b;
}
// Whether sums are multiplied group by group, and not at the end: a column's only scale is. (Its offset needs the sum
// of a row, which the tile of groups has.)
INLINE int gemm_by_groups(const pace_matrix *w) {
    return pace_is_grouped(w) && (w->group != w->k_pad || w->zeros == PACE_OFFSETS);
}
// Sums of bf16 rows with panel p are complete.
INLINE void gemm_finish(const gemm_job *j, long p, long m, long rows, float *c) {
    if (pace_is_grouped(j->w) && !gemm_by_groups(j->w)) {
        const uint8_t *scales = gr_panel(j->w, p);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < PACE_NR; i += VL)
                v_store(c + r * PACE_NR + i, v_mul(v_load(c + r * PACE_NR + i), gr_load(scales, j->w->scales, i)));
    }
    j->done(j->op, p, j->m0 + m, rows, c, PACE_NR);
}

// A register tile with a chunk: `a` is set up for any format, `chunk` holds what has groups.
INLINE void gemm_product(gemm_state *state, const gemm_job *j, long rows, const mm_args *a, const gr_chunk *chunk) {
    if (!gemm_by_groups(j->w)) {
        gemm_tile(state, (int)rows, a);
        return;
    }
#ifndef __AVX512BF16__
    if (mr_takes(state, rows) && j->w->zeros != PACE_OFFSETS) {
        mr_groups(state, (int)rows, a, chunk, j->w->group);
        return;
    }
#endif
    mg_rows(rows, (mg_args){.a = a->a,
                            .chunk = chunk,
                            .c = a->c,
                            .lda = a->lda,
                            .k = 2 * a->kp,
                            .group = j->w->group,
                            .accumulate = a->accumulate,
                            .offsets = j->w->zeros == PACE_OFFSETS});
}

static void gemm_skinny(const gemm_job *j, long p0, long p1, mm_args a) {
    const long most = GEMM_SKINNY_WIDTH(j->rows) / 2;
    a.a = gemm_row(j, 0, 0);
    a.c = j->c;
    for (long p = p0, np; p < p1; p += np) {
        np = most;
        while (np > p1 - p) np /= 2;
        a.b = gemm_panel(j, p, 0);
        a.ldc = np * PACE_NR;
        a.prefetch = (uintptr_t)a.b + (np > 1 ? 0 : MM_PREFETCH_AHEAD);
        GEMM_SKINNY((int)j->rows, (int)np * 2, &a);
        for (long i = 0; i < np; i++) j->done(j->op, p + i, j->m0, j->rows, j->c + i * PACE_NR, a.ldc);
    }
}

// Tiles on a panel's own bytes: blocks of rows that stay in L2 beside the panels. Several tiles fetch the next panel
// together; a lone one reads ahead of itself, and one row reads two panels side by side, because two sums would wait
// for each other.
static void gemm_mx(const gemm_job *j, long p0, long p1) {
    const int int8 = j->src->int8;
    const long most = int8 ? MI_ROWS : MX_ROWS, panel = pace_panel_bytes(j->w), groups = j->w->k_pad / PACE_MX_GROUP;
    const long row = j->src->ld * (int8 ? 1 : (long)sizeof(bf16));
    const long fit = GEMM_MX_BYTES / row / most * most, block = fit < most ? most : fit;
    for (long m = 0, rows; m < j->rows; m += rows) {
        rows = j->rows - m < block ? j->rows - m : block;
        const long tiles = (rows + most - 1) / most, sharers = tiles < GEMM_MX_SHARERS ? tiles : GEMM_MX_SHARERS;
        for (long p = p0, np; p < p1; p += np) {
            np = !int8 && rows == 1 && p + 1 < p1 ? 2 : 1;
            mx_args t = {.b = (const uint8_t *)j->w->data + p * panel,
                         .c = j->c,
                         .lda = j->src->ld,
                         .bps = panel,
                         .ldc = np * PACE_NR};
            t.k = j->w->k;
            t.share_step = (panel / sharers + groups - 1) / groups;
            for (long i = 0, done = 0, mr; i < tiles; i++, done += mr) {
                const int fetch = tiles == 1 ? MX_AHEAD : i < sharers && m == 0 ? MX_SHARE : MX_NONE;
                mr = (rows - done) / (tiles - i);
                t.a = (const char *)j->src->data + (j->m0 + m + done) * row;
                t.share = (uintptr_t)(t.b + panel) + (uintptr_t)(i * groups * t.share_step);
                if (int8)
                    mi_rows((int)mr, fetch, &t);
                else
                    mx_rows((int)mr, (int)np, fetch, &t);
                for (long n = 0; n < np; n++) j->done(j->op, p + n, j->m0 + m + done, mr, j->c + n * PACE_NR, t.ldc);
            }
        }
    }
}

// Brings to L2 what `done` will write of a tile, while the tile computes: rows of an f32 slot are 8 KB or more apart,
// no prefetcher follows them. 512 rows on Zen 4: o 430 -> 447 GFLOP/s, down 442 -> 448 of 467.
static void gemm_fetch_result(const gemm_job *j, long p, long m, long rows) {
    if (!j->dst) return;
    const uintptr_t size = j->dst->bf16 ? sizeof(bf16) : sizeof(float), step = (uintptr_t)j->dst->ld * size;
    uintptr_t row = (uintptr_t)j->dst->data + (uintptr_t)((j->m0 + m) * j->dst->ld + p * j->dst_width) * size;
    for (long r = 0; r < rows; r++, row += step)
        for (uintptr_t at = 0; at < (uintptr_t)j->dst_width * size; at += 64) FETCH(row + at, _MM_HINT_T1);
}

#include "gemm_int8.h"

static void gemm_few(const gemm_job *j, long p0, long p1, mm_args a) {
    const long rows = j->rows, k = j->w->k_pad, tiles = (rows + GEMM_TILE_ROWS - 1) / GEMM_TILE_ROWS;
    const int expands = j->w->layout != PACE_PANELS;
    const long most = expands ? MX_CHUNK : tiles == 1 ? k : GEMM_FEW_KC;
    gemm_state state;
    gemm_begin(&state, 1);
    a.prefetch_step = (128 + GEMM_SPREAD(tiles) - 1) / GEMM_SPREAD(tiles);
    for (long p = p0; p < p1; p++) {
        for (long k0 = 0, kc; k0 < k; k0 += kc) {
            kc = k - k0 < most ? k - k0 : most;
            a.kp = kc / 2;
            a.b = gemm_chunk(j, p, k0, kc, j->expanded);
            a.accumulate = k0 > 0;
            for (long t = 0, done = 0, mr; t < tiles; t++, done += mr) {
                mr = gemm_rows_of(rows - done, tiles - t);
                a.a = gemm_row(j, done, k0);
                a.c = j->c + done * PACE_NR;
                // One tile reads a little ahead of itself. Several share the fetching of what follows: the next
                // chunk of this panel or the first of the next, which mostly is this worker's too.
                a.prefetch = expands      ? 0
                             : tiles == 1 ? (uintptr_t)a.b + GEMM_AHEAD(mr)
                             : t < GEMM_SPREAD(tiles)
                                 ? (uintptr_t)(a.b + kc * PACE_NR) + (uintptr_t)(t * a.kp * a.prefetch_step)
                                 : 0;
                gemm_product(&state, j, mr, &a, j->expanded);
                if (k0 + kc == k) gemm_finish(j, p, done, mr, a.c);
            }
        }
    }
    gemm_end(&state);
}

#ifndef __AVX512BF16__
#include "gemm_codes.h"
#endif

// The panel chunk that follows k0 .. k0 + kc of panel p: of the same panel, or the first one of the next block of rows
// or the next group; NULL after the last.
INLINE const bf16 *gemm_next_chunk(const gemm_job *j, long p, long k0, long kc, int last_rows) {
    if (j->w->layout != PACE_PANELS) return NULL;
    if (k0 + kc < j->w->k_pad) return gemm_panel(j, p, k0 + kc);
    if (!last_rows) return gemm_panel(j, p, 0);
    return p + GEMM_GROUP < j->w->n_panels ? gemm_panel(j, p + GEMM_GROUP, 0) : NULL;
}

// Bytes per k pair that each of so many tiles fetches of a panel's next chunk: whole lines per step of a tile on amx.
INLINE long gemm_share(long fetchers) {
#ifdef PACE_AMX
    return (32 + fetchers - 1) / fetchers * 4;
#else
    return fetchers ? 128 / fetchers : 0;
#endif
}

// The chunks of at most so many k that divide K evenly: 2560 is twice 1280, not 2048 and 512.
INLINE long gemm_even(long k, long most) {
    const long n = (k + most - 1) / most;
    return ((k + n - 1) / n + 31) / 32 * 32;
}

static void gemm_blocked(const gemm_job *j, long p0, long p1, mm_args a) {
    const long k = j->w->k_pad;
    const int panels = j->w->layout == PACE_PANELS, whole = pace_is_grouped(j->w) && !gemm_by_groups(j->w);
    const long kc_whole = GEMM_KC < GR_WHOLE ? GEMM_KC : GR_WHOLE;
    const long most = panels ? gemm_even(k, GEMM_KC) : whole ? gemm_even(k, kc_whole) : MX_CHUNK;
    const long most_rows = whole ? GEMM_MC_WHOLE : GEMM_MC;
    const bf16 *b[GEMM_GROUP];
    gemm_state state;
    gemm_begin(&state, 0);
    for (long pg = p0; pg < p1; pg += GEMM_GROUP) {
        const long pe = pg + GEMM_GROUP < p1 ? pg + GEMM_GROUP : p1;
        for (long mb = 0; mb < j->rows; mb += most_rows) {
            const long block = j->rows - mb < most_rows ? j->rows - mb : most_rows;
            const long tiles = (block + GEMM_TILE_ROWS - 1) / GEMM_TILE_ROWS, fetchers = GEMM_FETCHERS(tiles);
            a.prefetch_step = gemm_share(fetchers);
            for (long k0 = 0; k0 < k; k0 += most) {
                const long kc = k - k0 < most ? k - k0 : most;
                for (long p = pg; p < pe; p++) b[p - pg] = gemm_chunk(j, p, k0, kc, j->expanded + (p - pg));
                for (long t = 0, done = 0, mr; t < tiles; t++, done += mr) {
                    mr = gemm_rows_of(block - done, tiles - t);
                    // The row tile after this one: its rows come to L2 four at a time while the panels compute.
                    const bf16 *next = t + 1 < tiles ? gemm_row(j, mb + done + mr, k0)
                                       : k0 + kc < k ? gemm_row(j, mb, k0 + kc)
                                                     : NULL;
                    for (long p = pg; p < pe; p++) {
                        a.prefetch = 0;
                        if (t >= tiles - fetchers) {
                            const bf16 *chunk = gemm_next_chunk(j, p, k0, kc, mb + block == j->rows);
                            const long share = t - (tiles - fetchers);
                            a.prefetch = chunk ? (uintptr_t)chunk + (uintptr_t)(share * kc / 2 * a.prefetch_step) : 0;
                        }
                        a.prefetch_rows =
                            GEMM_FETCH_ROWS && next ? (uintptr_t)next + (uintptr_t)((p - pg) * 8 * a.lda) : 0;
                        a.a = gemm_row(j, mb + done, k0);
                        a.b = b[p - pg];
                        a.c = j->c + ((p - pg) * most_rows + done) * PACE_NR;
                        a.kp = kc / 2;
                        a.accumulate = k0 > 0;
                        if (k0 + kc == k) gemm_fetch_result(j, p, mb + done, mr);
                        gemm_product(&state, j, mr, &a, j->expanded + (p - pg));
                        if (k0 + kc == k) gemm_finish(j, p, mb + done, mr, a.c);
                    }
                }
            }
        }
    }
    gemm_end(&state);
}

// Rows [m0, m1) of src times panels [p0, p1) of one matrix of any format: the only way to a product with packed
// weights. `done` takes every tile once its sums are complete, and writes to dst as gemm_job says. Scratch:
// GEMM_SCRATCH bytes.
static void gemm_panels(const pace_matrix *w, const pace_slot *src, long p0, long p1, long m0, long m1, void *scratch,
                        gemm_done *done, const void *op, const pace_slot *dst, long dst_width) {
    if (m0 == m1) return;  // a step may ask for no logits
    float *const c = scratch;
    const gemm_job j = {w, src, m0, m1 - m0, c, (gr_chunk *)(void *)(c + GEMM_C), done, op, dst, dst_width};
    const mm_args a = {.lda = src->ld,
                       .ldb = 2 * PACE_NR,
                       .bps = w->k_pad * PACE_NR,
                       .ldc = PACE_NR,
                       .kp = w->k_pad / 2,
                       .prefetch_step = 128};
    if (src->int8 && pace_is_grouped(w)) {
#ifdef PACE_AMX
        if (gemm_takes_tiles(&j)) {
            gemm_amx_int8(&j, p0, p1);
            return;
        }
#endif
#ifdef PACE_MM_INT8_PAIRS_H
        if (gemm_takes_pairs(&j)) p0 = gemm_int8_pairs(&j, p0, p1);
#endif
        gemm_int8(&j, p0, p1);
        return;
    }
    if (src->int8 || (w->layout == PACE_MXFP4 && MX_ROWS)) {
        gemm_mx(&j, p0, p1);
        return;
    }
    if (w->layout == PACE_PANELS && j.rows <= GEMM_SKINNY_ROWS) gemm_skinny(&j, p0, p1, a);
#ifdef PACE_GEMM_CODES_H
    else if (mc_takes(w, j.rows))
        gemm_codes(&j, p0, p1);
#endif
#if !defined(__AVX512F__)
    else if (j.rows == 1 && w->layout == PACE_MXFP4)
        gemm_lone_row(&j, p0, p1, a);
#endif
    else if (j.rows <= GEMM_FEW)
        gemm_few(&j, p0, p1, a);
    else
        gemm_blocked(&j, p0, p1, a);
}

static void kernel_gemm(const pace_gemm *g, long p0, long p1, long m0, long m1, void *scratch) {
    const long width = g->epilogue == PACE_EPILOGUE_gated ? PACE_NR / 2 : PACE_NR;
    gemm_panels(&g->weight, &g->src, p0, p1, m0, m1, scratch, gemm_epilogue, g, &g->dst, width);
}

#endif

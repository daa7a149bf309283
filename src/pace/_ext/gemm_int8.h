// gemm_int8.h - int8 rows times panels of int8 and int4; part of gemm.h.
#ifndef PACE_GEMM_INT8_H
#define PACE_GEMM_INT8_H

static mq_args gemm_int8_args(const gemm_job *j) {
    const pace_matrix *w = j->w;
    const int whole = w->group == w->k_pad;
    return (mq_args){.c = j->c,
                     .lda = j->src->ld,
                     .width = j->src->width,
                     .groups = pace_slot_groups(j->src),
                     .group = j->src->group,
                     .head = pace_block_head(w),
                     .step = whole ? j->src->group * pace_code_bytes(w) : pace_block_bytes(w),
                     .scale_step = whole ? 0 : pace_block_bytes(w),
                     .scales = w->scales,
                     .zeros = w->zeros};
}
INLINE const int8_t *gemm_int8_row(const gemm_job *j, long m) {
    return (const int8_t *)j->src->data + (j->m0 + m) * j->src->ld;
}

INLINE void gemm_int8_tile(int mr, int layout, const mq_args *t) {
#if MQ_WIDE
    if (mr > MQ_ROWS) {
        (layout == PACE_INT4 ? mn_rows : mw_rows)(mr, t);
        return;
    }
#endif
    mq_rows(mr, layout, t);
}

// int8 rows and panels of integers, in the same way; where a lone tile passes several times over a panel, on avx2, each
// pass fetches its part of the next one (the first pass reading ahead for all: 0.49 of the read roof). A row's scales
// belong to the weights' groups, or to parts of a column; the caller has checked that they do.
static void gemm_int8(const gemm_job *j, long p0, long p1) {
    const pace_matrix *w = j->w;
    const long panel = pace_panel_bytes(w), steps = w->k_pad / 8;
    mq_args t = gemm_int8_args(j);
    const long most = mq_most(&t), fit = GEMM_MX_BYTES / j->src->ld / most * most, block = fit < most ? most : fit;
    for (long m = 0, rows; m < j->rows; m += rows) {
        rows = j->rows - m < block ? j->rows - m : block;
        const long tiles = (rows + most - 1) / most, sharers = tiles < GEMM_MX_SHARERS ? tiles : GEMM_MX_SHARERS;
        for (long p = p0; p < p1; p++) {
            t.b = gr_panel(w, p);
            const uintptr_t next = (uintptr_t)(t.b + panel);
            t.fetch_step = (panel / sharers + 4 * steps - 1) / (4 * steps) * 4;
            for (long i = 0, done = 0, mr; i < tiles; i++, done += mr) {
                mr = (rows - done) / (tiles - i);
                t.a = gemm_int8_row(j, m + done);
                t.fetch = tiles == 1 && mq_passes((int)rows) == 1 ? (uintptr_t)t.b + GEMM_INT8_AHEAD
                          : i < sharers && m == 0                 ? next + (uintptr_t)(i * steps * t.fetch_step)
                                                                  : 0;
                gemm_fetch_result(j, p, m + done, mr);
                gemm_int8_tile((int)mr, w->layout, &t);
                j->done(j->op, p, j->m0 + m + done, mr, j->c, PACE_NR);
            }
        }
    }
}

#if defined(PACE_AMX) || defined(PACE_MM_INT8_PAIRS_H)
// Where k0 of a panel begins: its codes, or the block of its group.
INLINE const uint8_t *gemm_int8_at(const mq_args *q, const pace_matrix *w, const uint8_t *panel, long k0) {
    return panel + (q->scale_step ? k0 / q->group * q->scale_step : q->head + k0 * pace_code_bytes(w));
}
// Int4 codes of kc k from there on as bytes.
static void gemm_int8_widen(uint8_t *wide, const mq_args *q, const uint8_t *at, long kc) {
    if (!q->scale_step) mq_widen(wide, at, kc);
    for (long in = 0; q->scale_step && in < kc; in += q->group)
        mq_widen(wide + in * PACE_NR, at + in / q->group * q->scale_step + q->head,
                 kc - in < q->group ? kc - in : q->group);
}
#endif

#ifdef PACE_MM_INT8_PAIRS_H
// Time of one panel after the other by that of pairs, in turns on two Cascade Lake cores, a stretch with busy
// neighbours left out. Groups of 128, rows 320 / 32 / 24 / 16: int8 1.06 to 1.18 / 1.15 to 1.23 / 1.06 to 1.14 / 0.97
// to 1.02, int4 0.97 to 1.12 / 0.97 to 1.15 / 0.88 to 0.99 / 0.93 to 0.99; of 64, rows 320 / 32 / 16: int8 1.01 / 1.15
// / 1.06, int4 1.11 / 1.07 / 0.94; of 32, rows 320 / 32: 0.94 to 1.03 / 1.01 to 1.05 (3 rows with f32 sums in
// registers 1.03 / 0.90 to 1.01). A scale per column, int8, rows 320 / 32 / 24 / 16 / 13: 1.03 to 1.07 / 0.98 to 1.13 /
// 0.99 / 1.02 / 0.88. Chunks of 128 k: 0.94 to 1.11; of 512 as these. Fetching the next tile's rows and sums to L1:
// 0.89 to 0.97 of the speed. Prompts of 512 tokens of the 1B shape 1.08 (w8) and 1.10 (w4g128), steps of 32
// sequences 1.06 and 1.12.
INLINE int gemm_takes_pairs(const gemm_job *j) {
    const long group = j->src->group, least = j->w->layout == PACE_INT4 ? 25 : 14;
    if (j->rows < least) return 0;
    return j->w->group == j->w->k_pad && j->src->width <= group ? 1 : group >= 64 && MP_CHUNK % group == 0;
}

// Rows [m, m + rows) times a chunk of panels p and p + 1, for which t is set up.
static void gemm_pair(const gemm_job *j, long p, long m, long rows, mp_args *t, const uint8_t *then, long size) {
    const long tiles = (rows + MP_ROWS - 1) / MP_ROWS;
    const int8_t *const a = t->a, *const beside = t->beside;
    for (long i = 0, done = 0, mr; i < tiles; i++, done += mr) {
        const long fetched = i * MP_CHUNK / 8 * 64;
        mr = (rows - done) / (tiles - i);
        t->a = a + done * j->src->ld;
        t->beside = beside + done * j->src->ld;
        t->c = j->c + done * PACE_NR;
        t->fetch = fetched < size ? (uintptr_t)(then + fetched) : 0;
        for (long n = 0; t->last && n < 2; n++) gemm_fetch_result(j, p + n, m + done, mr);
        mp_rows((int)mr, j->w->layout, t);
        for (long n = 0; t->last && n < 2; n++)
            j->done(j->op, p + n, j->m0 + m + done, mr, t->c + n * t->c_apart, PACE_NR);
    }
}

// The same for pairs of panels, a chunk of k at a time (mm_int8_pairs.h). A lone last panel, returned, is the caller's.
static long gemm_int8_pairs(const gemm_job *j, long p0, long p1) {
    const pace_matrix *w = j->w;
    const mq_args q = gemm_int8_args(j);
    const int whole = mq_is_whole(&q), wide = w->layout == PACE_INT4;
    const long panel = pace_panel_bytes(w);
    const long fit = GEMM_MX_BYTES / q.lda / MP_ROWS * MP_ROWS, most = GEMM_C / (2 * PACE_NR) / MP_ROWS * MP_ROWS;
    const long block = fit < MP_ROWS ? MP_ROWS : fit < most ? fit : most;
    uint8_t *const bytes = (uint8_t *)j->expanded[0].b;
    mp_args t = {.q = &q,
                 .step = wide || !q.scale_step ? q.group * PACE_NR : q.scale_step,
                 .apart = wide ? MP_CHUNK * PACE_NR : panel,
                 .panel = panel};
    for (long m = 0, rows; m < j->rows; m += rows) {
        rows = j->rows - m < block ? j->rows - m : block;
        t.c_apart = rows * PACE_NR;
        for (long p = p0; p + 1 < p1; p += 2) {
            const uint8_t *const b = gr_panel(w, p);
            if (!whole) memset(j->c, 0, (size_t)(2 * rows * PACE_NR) * sizeof(float));
            for (long k0 = 0; k0 < q.width; k0 += MP_CHUNK) {
                const uint8_t *at = gemm_int8_at(&q, w, b, k0), *then = gemm_int8_at(&q, w, b, k0 + MP_CHUNK);
                const long size = then - at;
                t.k = q.width - k0 < MP_CHUNK ? q.width - k0 : MP_CHUNK;
                t.first = k0 == 0;
                t.last = k0 + t.k == q.width;
                t.block = q.scale_step ? at : b;
                t.codes = wide ? bytes : q.scale_step ? at + q.head : at;
                for (long n = 0; wide && n < 2; n++) gemm_int8_widen(bytes + n * t.apart, &q, at + n * panel, t.k);
                t.a = gemm_int8_row(j, m) + k0;
                t.beside = gemm_int8_row(j, m) + q.width + (whole ? 0 : k0 / q.group * 4);
                gemm_pair(j, p, m, rows, &t, t.last ? b + 2 * panel : then, size);
            }
        }
    }
    return p1 - (p1 - p0) % 2;
}
#endif

#ifdef PACE_AMX
// The same in AMX tiles (amx_int8.h), for groups of 32 and of a multiple of 64.
INLINE int gemm_takes_tiles(const gemm_job *j) {
    const long group = j->src->group, bytes = group == 32 ? 32 : 64;
    return j->rows >= ai_least(group) && group % bytes == 0 && j->src->width % bytes == 0;
}

// What a tile of rows at `a` multiplies: k0 .. k0 + kc of panel p.
typedef struct {
    const mq_args *q;
    const pace_matrix *w;
    const uint8_t *panel, *at;  // `at`: see gemm_int8_at
    const uint8_t *wide;        // int4: the chunk's codes as bytes
    long k0, kc, bytes;
} gemm_int8_chunk;

// Codes of k from `in` on of the chunk as bytes.
INLINE const uint8_t *gemm_int8_codes(const gemm_int8_chunk *h, long in) {
    if (h->w->layout == PACE_INT4) return h->wide + in * PACE_NR;
    return h->q->scale_step ? h->at + in / h->q->group * h->q->scale_step + h->q->head : h->at + in * PACE_NR;
}

// c [rows][32] of f32 gets the chunk's groups added. A group is scaled after the next one's tiles have been issued: its
// sums are on their way to L1 until then.
static void gemm_int8_groups(const gemm_int8_chunk *h, ai_args *t, const int8_t *a, long rows, float *c) {
    _Alignas(64) int32_t sums[2][GEMM_TILE_ROWS * PACE_NR];
    const mq_args *q = h->q;
    const long first = h->k0 / q->group;
    ai_scales scales = {0};
    t->accumulate = 0;
    for (long in = 0, g = first;; in += q->group, g++) {
        const int more = in < h->kc;
        if (more) {
            t->a = a + h->k0 + in;
            t->b = gemm_int8_codes(h, in);
            t->c = sums[g % 2];
            t->steps = (h->kc - in < q->group ? h->kc - in : q->group) / h->bytes;
            ai_products((int)rows, (int)h->bytes, t);
        }
        if (g > first)
            ai_scale_any(h->w->layout, g > 1 ? AI_NEXT : AI_FIRST, c, sums[(g - 1) % 2], q, a, rows, g - 1, &scales);
        if (!more) return;
        scales = ai_scales_of(q, q->scale_step ? h->at + in / q->group * q->scale_step : h->panel);
    }
}

static void gemm_amx_int8(const gemm_job *j, long p0, long p1) {
    const pace_matrix *w = j->w;
    const mq_args q = gemm_int8_args(j);
    const int whole = mq_is_whole(&q);
    const long k = q.width, bytes = q.group == 32 ? 32 : 64, at_once = j->rows <= AI_FEW ? 1 : GEMM_GROUP;
    const long chunk_bytes = AI_CHUNK * pace_code_bytes(w) + (q.scale_step ? AI_CHUNK / q.group * q.head : 0);
    ai_args t = {.lda = q.lda};
    gemm_state state;
    gemm_begin(&state, 0);
    for (long pg = p0; pg < p1; pg += at_once) {
        const long pe = pg + at_once < p1 ? pg + at_once : p1;
        for (long mb = 0; mb < j->rows; mb += GEMM_MC) {
            const long block = j->rows - mb < GEMM_MC ? j->rows - mb : GEMM_MC;
            const long tiles = (block + GEMM_TILE_ROWS - 1) / GEMM_TILE_ROWS;
            for (long k0 = 0; k0 < k; k0 += AI_CHUNK) {
                const long kc = k - k0 < AI_CHUNK ? k - k0 : AI_CHUNK, steps = (kc + bytes - 1) / bytes;
                t.lines = (chunk_bytes / 64 + steps * tiles - 1) / (steps * tiles);
                for (long i = 0, done = 0, mr; i < tiles; i++, done += mr) {
                    mr = gemm_rows_of(block - done, tiles - i);
                    if (state.rows != mr) amx_configure(state.rows = (int)mr, (int)bytes);
                    const int8_t *a = gemm_int8_row(j, mb + done);
                    const int8_t *next = at_once == 1    ? NULL
                                         : i + 1 < tiles ? gemm_int8_row(j, mb + done + mr) + k0
                                         : k0 + kc < k   ? gemm_int8_row(j, mb) + k0 + kc
                                                         : NULL;
                    for (long p = pg; p < pe; p++) {
                        const uint8_t *panel = gr_panel(w, p);
                        uint8_t *wide = (uint8_t *)j->expanded[p - pg].b;
                        const gemm_int8_chunk h = {.q = &q,
                                                   .w = w,
                                                   .panel = panel,
                                                   .at = gemm_int8_at(&q, w, panel, k0),
                                                   .wide = wide,
                                                   .k0 = k0,
                                                   .kc = kc,
                                                   .bytes = bytes};
                        if (w->layout == PACE_INT4 && i == 0) gemm_int8_widen(wide, &q, h.at, kc);
                        const uint8_t *then = k0 + kc < k                 ? h.at + chunk_bytes
                                              : mb + block < j->rows      ? panel
                                              : p + at_once < w->n_panels ? gr_panel(w, p + at_once)
                                                                          : NULL;
                        t.fetch = then ? (uintptr_t)then + (uintptr_t)(i * steps * t.lines * 64) : 0;
                        t.fetch_rows = next ? (uintptr_t)next + (uintptr_t)((p - pg) * 4 * q.lda) : 0;
                        float *c = j->c + ((p - pg) * GEMM_MC + done) * PACE_NR;
                        if (whole) {  // c holds integers until the end
                            t.a = a + k0;
                            t.b = gemm_int8_codes(&h, 0);
                            t.c = (int32_t *)(void *)c;
                            t.steps = steps;
                            t.accumulate = k0 > 0;
                            ai_products((int)mr, (int)bytes, &t);
                        } else {
                            gemm_int8_groups(&h, &t, a, mr, c);
                        }
                        if (k0 + kc < k) continue;
                        if (whole) {
                            const ai_scales s = ai_scales_of(&q, panel);
                            ai_scale_any(w->layout, AI_WHOLE, c, (int32_t *)(void *)c, &q, a, mr, 0, &s);
                        }
                        gemm_fetch_result(j, p, mb + done, mr);
                        j->done(j->op, p, j->m0 + mb + done, mr, c, PACE_NR);
                    }
                }
            }
        }
    }
    gemm_end(&state);
}
#endif

#endif

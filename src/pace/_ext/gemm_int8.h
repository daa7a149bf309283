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
    const uint8_t *panel, *at;  // `at`: codes of k0, or the block of its group
    const uint8_t *wide;        // int4: the chunk's codes as bytes
    long k0, kc, bytes;
} gemm_int8_chunk;

// Codes of k from `in` on of the chunk as bytes.
INLINE const uint8_t *gemm_int8_codes(const gemm_int8_chunk *h, long in) {
    if (h->w->layout == PACE_INT4) return h->wide + in * PACE_NR;
    return h->q->scale_step ? h->at + in / h->q->group * h->q->scale_step + h->q->head : h->at + in * PACE_NR;
}

static void gemm_int8_widen(uint8_t *wide, const gemm_int8_chunk *h) {
    const mq_args *q = h->q;
    if (!q->scale_step) ai_widen(wide, h->at, h->kc);
    for (long in = 0; q->scale_step && in < h->kc; in += q->group)
        ai_widen(wide + in * PACE_NR, h->at + in / q->group * q->scale_step + q->head,
                 h->kc - in < q->group ? h->kc - in : q->group);
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
                                                   .at = panel + (q.scale_step ? k0 / q.group * q.scale_step
                                                                               : q.head + k0 * pace_code_bytes(w)),
                                                   .wide = wide,
                                                   .k0 = k0,
                                                   .kc = kc,
                                                   .bytes = bytes};
                        if (w->layout == PACE_INT4 && i == 0) gemm_int8_widen(wide, &h);
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

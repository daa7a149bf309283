// experts.h - the two products of a mixture of experts, on the same panels and tiles as every GEMM.
//
//   experts_in    a call is some panels of one expert and all rows that chose it. Their rows are gathered into scratch
//                 first: tiles then have one stride, and a copy is 1 part in 16 p of the products with p panels.
//   experts_out   a call is some panels (columns of the result) of all experts, ascending, so that a row's sum has one
//                 order whoever computes it and nobody else writes there: no buffer of partial results, no barrier.
#ifndef PACE_EXPERTS_H
#define PACE_EXPERTS_H

#include <math.h>

#include "gemm.h"

// What becomes of the tiles of one expert.
typedef struct {
    const void *op;
    const pace_chosen *choices;
    pace_gemm epilogue;  // experts_in
    const float *bias;   // of the expert
    long first;          // choice of the first row
} experts_job;

// (up + 1) * gate * sigmoid(alpha * gate), clamped (gpt-oss).
static void experts_clamped(const void *job, long p, long m, long rows, const float *c, long ldc) {
    const experts_job *j = job;
    const pace_experts_in *g = j->op;
    const vf limit = v_set(g->limit), least = v_set(-g->limit), one = v_set(1.0f), alpha = v_set(g->alpha);
    const long n0 = p * (PACE_NR / 2), n_left = g->dst.width - n0;
    for (long r = 0; r < rows; r++, c += ldc)
        for (long i = 0; i < PACE_NR / 2 && i < n_left; i += VL) {
            vf gate = v_load(c + i), up = v_load(c + i + PACE_NR / 2);
            if (j->bias) {
                gate = v_add(gate, v_load(j->bias + p * PACE_NR + i));
                up = v_add(up, v_load(j->bias + p * PACE_NR + i + PACE_NR / 2));
            }
            // The NaN of a first operand is lost, so that it comes second.
            gate = v_min(limit, gate);
            up = v_max(least, v_min(limit, up));
            const vf y = v_mul(v_mul(v_add(up, one), gate), v_sigmoid(v_mul(alpha, gate)));
            store_bf16_left((bf16 *)g->dst.data + (j->first + m + r) * g->dst.ld + n0 + i, y, n_left - i);
        }
}

static void experts_gated(const void *job, long p, long m, long rows, const float *c, long ldc) {
    const experts_job *j = job;
    gemm_epilogue(&j->epilogue, p, j->first + m, rows, c, ldc);
}

static void experts_sum(const void *job, long p, long m, long rows, const float *c, long ldc) {
    const experts_job *j = job;
    const pace_experts_out *g = j->op;
    const long n0 = p * PACE_NR, n_left = g->dst.width - n0;
    for (long r = 0; r < rows; r++, c += ldc) {
        const long i = j->first + m + r;
        const vf by = v_set(g->weigh ? g->scale * j->choices->weight[i] : g->scale);
        float *const out = (float *)g->dst.data + j->choices->row[i] * g->dst.ld + n0;
        for (long n = 0; n < PACE_NR && n < n_left; n += VL) {
            vf y = v_load(c + n);
            if (j->bias) y = v_add(y, v_load(j->bias + n0 + n));
            store_left(out + n, v_fma(y, by, load_left(out + n, n_left - n)), n_left - n);
        }
    }
}

INLINE char *experts_row(const pace_slot *s, long r) { return (char *)s->data + r * s->ld * (s->int8 ? 1 : 2); }

// Rows of choices i .. i + n - 1 as a slot: where they are if they follow each other, else copied to `to`.
static pace_slot experts_rows(const pace_experts_in *g, const pace_chosen *c, long i, long n, void *to) {
    pace_slot rows = g->src;
    long next = 1;
    while (next < n && c->row[i + next] == c->row[i] + next) next++;
    if (next == n && !g->on_input) {
        rows.data = experts_row(&g->src, c->row[i]);
        return rows;
    }
    rows.data = to;
    for (long r = 0; r < n; r++) {
        const bf16 *const x = (const bf16 *)experts_row(&g->src, c->row[i + r]);
        bf16 *const y = (bf16 *)experts_row(&rows, r);
        if (!g->on_input) {
            memcpy(y, x, (size_t)g->src.ld * (g->src.int8 ? 1 : 2));
            continue;
        }
        const vf by = v_set(c->weight[i + r]);
        const long k = (g->src.width + PACE_KPAD - 1) / PACE_KPAD * PACE_KPAD;  // with the zeros behind
        for (long at = 0; at < k; at += VL) v_store_bf16(y + at, v_mul(v_load_bf16(x + at), by));
    }
    return rows;
}

static void kernel_experts_in(const pace_experts_in *g, const pace_chosen *c, long a, long p0, long p1, void *scratch) {
    const pace_matrix w = pace_matrix_at(&g->weight, c->expert[a]);
    experts_job j = {.op = g, .choices = c};
    if (g->bias) j.bias = g->bias + c->expert[a] * w.n_panels * PACE_NR;
    j.epilogue =
        (pace_gemm){.dst = g->dst, .bias = j.bias, .scale = 1.0f, .epilogue = PACE_EPILOGUE_gated, .act = g->act};
    char *const gathered = (char *)scratch + GEMM_SCRATCH;
    for (long i = c->start[a], n; i < c->start[a + 1]; i += n) {
        n = c->start[a + 1] - i;
        n = n < PACE_GATHER_ROWS ? n : PACE_GATHER_ROWS;
        const pace_slot rows = experts_rows(g, c, i, n, gathered);
        j.first = i;
        gemm_panels(&w, &rows, p0, p1, 0, n, scratch, g->limit > 0.0f ? experts_clamped : experts_gated, &j, NULL, 0);
    }
}

static void kernel_experts_out(const pace_experts_out *g, const pace_chosen *c, long m, long p0, long p1,
                               void *scratch) {
    const long n0 = p0 * PACE_NR, n1 = p1 * PACE_NR < g->dst.width ? p1 * PACE_NR : g->dst.width;
    for (long r = 0; r < m && !g->add; r++)
        memset((float *)g->dst.data + r * g->dst.ld + n0, 0, (size_t)(n1 - n0) * sizeof(float));
    for (long a = 0; a < c->n_active; a++) {
        const pace_matrix w = pace_matrix_at(&g->weight, c->expert[a]);
        experts_job j = {.op = g, .choices = c, .first = 0};
        if (g->bias) j.bias = g->bias + c->expert[a] * w.n_panels * PACE_NR;
        gemm_panels(&w, &g->src, p0, p1, c->start[a], c->start[a + 1], scratch, experts_sum, &j, NULL, 0);
    }
}

#endif

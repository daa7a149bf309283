// plan.c - executes a plan: all operators of a step in one call on the thread team.
#define _GNU_SOURCE
#include "plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pages.h"

// ---- building ---------------------------------------------------------------------------------------------

int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits) {
    memset(p, 0, sizeof *p);
    p->team = team;
    p->n_threads = pace_team_size(team);
    p->max_tokens = max_tokens;
    p->max_seqs = max_seqs;
    p->max_logits = max_logits;
    if (p->n_threads > 1 && !(p->parts = pace_alloc_huge(PACE_PARTS_BYTES))) return ENOMEM;
    if (!(p->sorted = calloc((size_t)p->n_threads, sizeof *p->sorted))) return ENOMEM;
    if (pace_work_init(&p->fold, p->n_threads)) return ENOMEM;
    for (int i = 0; i < 2; i++)
        if (pace_work_init(&p->ring[i], p->n_threads)) return ENOMEM;
    return 0;
}

void pace_plan_free(pace_plan *p) {
    for (int i = 0; i < p->n_lists; i++) pace_list_free(&p->lists[i]);
    free(p->ops);
    free(p->op_s);
    free(p->op_experts);
    for (int tid = 0; p->sorted && tid < p->n_threads; tid++) pace_sorted_free(&p->sorted[tid]);
    free(p->sorted);
    for (int i = 0; i < 2; i++) pace_work_destroy(&p->ring[i]);
    pace_work_destroy(&p->fold);
    pace_free_huge(p->parts, PACE_PARTS_BYTES);
    memset(p, 0, sizeof *p);
}

// What an operator's list must be; false: it has none.
static bool list_key(const pace_op *op, pace_list_key *key) {
    *key = (pace_list_key){.logits = op->logits};
    if (op->kind == PACE_OP_attention) {
        const pace_attention *a = &op->u.attention;
        key->tiles = 1;
        key->group = a->n_heads / a->kv.n_kv_heads;
        key->window = a->window;
        key->chunk = a->chunk;
        key->n_kv_heads = a->kv.n_kv_heads;
        key->head_dim = a->kv.head_dim;
    }
    return op->kind == PACE_OP_attention || op->kind == PACE_OP_rope;
}

// The list of an operator, made where there is none like it; 0 or an errno.
static int find_list(pace_plan *p, pace_op *op) {
    pace_list_key key;
    if (!list_key(op, &key)) return 0;
    for (op->list = 0; op->list < p->n_lists; op->list++)
        if (memcmp(&p->lists[op->list].key, &key, sizeof key) == 0) return 0;
    if (p->n_lists == PACE_MAX_LISTS) return E2BIG;
    const int e = pace_list_init(&p->lists[p->n_lists], &key, p->max_tokens, p->max_seqs);
    if (!e) p->n_lists++;
    return e;
}

// The router's slot and the matrix of an operator on choices; NULL: it is none.
static const pace_slot *route_of(const pace_op *op, const pace_matrix **w) {
    if (op->kind == PACE_OP_experts_in) {
        *w = &op->u.experts_in.weight;
        return &op->u.experts_in.route;
    }
    if (op->kind != PACE_OP_experts_out) return NULL;
    *w = &op->u.experts_out.weight;
    return &op->u.experts_out.route;
}

static size_t gather_bytes(const pace_op *op) {
    const pace_slot *src = &op->u.experts_in.src;
    return op->kind == PACE_OP_experts_in ? (size_t)(PACE_GATHER_ROWS * src->ld * (src->int8 ? 1 : 2)) : 0;
}

// Each growth is remembered only when it has succeeded.
static int grow(pace_plan *p, const pace_op *op) {
    const pace_kernels *kernels = op->kernels;
    const pace_matrix *w;
    const pace_slot *route = route_of(op, &w);
    for (int tid = 0; route && tid < p->n_threads; tid++) {
        const int e = pace_sorted_reserve(&p->sorted[tid], p->max_tokens * (route->width / 2), w->count);
        if (e) return e;
    }
    if (p->n_ops == p->cap_ops) {
        const long cap = p->cap_ops ? 2 * p->cap_ops : 128;
        pace_op *ops = realloc(p->ops, (size_t)cap * sizeof *ops);
        if (!ops) return ENOMEM;
        p->ops = ops;
        double *op_s = realloc(p->op_s, (size_t)cap * sizeof *op_s);
        if (!op_s) return ENOMEM;
        p->op_s = op_s;
        long *op_experts = realloc(p->op_experts, (size_t)cap * sizeof *op_experts);
        if (!op_experts) return ENOMEM;
        p->op_experts = op_experts;
        p->cap_ops = cap;
    }
    const size_t gemm = kernels->gemm_scratch + gather_bytes(op);
    const size_t need = gemm > kernels->attention_scratch ? gemm : kernels->attention_scratch;
    if (need <= p->scratch_bytes) return 0;
    const int e = pace_team_reserve(p->team, need);
    if (!e) p->scratch_bytes = need;
    return e;
}

int pace_plan_add(pace_plan *p, const pace_op *op) {
    pace_op added = *op;
    int e = find_list(p, &added);
    if (!e) e = grow(p, op);
    if (e) return e;
    p->op_s[p->n_ops] = 0.0;
    p->op_experts[p->n_ops] = 0;
    p->ops[p->n_ops++] = added;
    return 0;
}

// ---- one step ---------------------------------------------------------------------------------------------

// How an operator's work is cut: n items of `grain` panels or rows, times row blocks for large GEMMs.
typedef struct {
    long n, grain, row_blocks, rows_per_block;
} cut;

#define GEMM_FEW_ROWS 64  // up to here the weights' stream decides and rows are never split

static cut cut_gemm(const pace_plan *p, long group, long n_panels, long m, long least) {
    cut c = {.row_blocks = 1, .rows_per_block = m};
    const long t = p->n_threads;
    if (m <= GEMM_FEW_ROWS) {
        // About 16 claims per worker, in whole groups of the 4 panels that the skinny kernel reads side by side.
        // (Claims of 1 or 2 panels where that leaves 4: the same times at 1 to 32 rows, so it is not the tail that
        // costs.)
        c.grain = n_panels / (t * 16) / 4 * 4;
        c.grain = c.grain < 4 ? 4 : c.grain > 32 ? 32 : c.grain;
    } else {
        // Claims of two groups (8 panels) left o of the 1B shape, 64 panels, four a worker: 512 rows on Zen 5 0.91 of
        // the dot roof, of one 0.94, of half a group 0.89; down 0.942, 0.950, 0.935.
        c.grain = group;
        // Too few panel groups for the team: cut rows as well (a multiple of 32 keeps register tiles full).
        while ((n_panels + c.grain - 1) / c.grain * c.row_blocks < 3 * t && m / c.row_blocks > 256) c.row_blocks++;
        if ((n_panels + c.grain - 1) / c.grain * c.row_blocks < 3 * t) c.grain = least;
        c.rows_per_block = ((m + c.row_blocks - 1) / c.row_blocks + 31) / 32 * 32;
        c.row_blocks = (m + c.rows_per_block - 1) / c.rows_per_block;
    }
    c.n = (n_panels + c.grain - 1) / c.grain * c.row_blocks;
    return c;
}

static const pace_list *list_of(const pace_plan *p, const pace_op *op) { return &p->lists[op->list]; }

static bool splits(const pace_plan *p, const pace_op *op) {
    return op->kind == PACE_OP_attention && list_of(p, op)->split && op->kernels->attention_part;
}

static float *parts_of(const pace_plan *p, const pace_list *list, long tile, long kv_head) {
    return p->parts + (tile * list->key.n_kv_heads + kv_head) * list->part_stride;
}

static long rows_of(const pace_plan *p, const pace_op *op) {
    const long times = op->kind == PACE_OP_quantise ? op->u.quantise.times : 1;
    if (!op->logits) return p->batch.n_tokens * times;
    const long left = p->batch.n_logits - p->head_row;
    return !op->head ? p->batch.n_logits * times : left < p->max_logits ? left : p->max_logits;
}

// Panels of an expert, times as many experts as can be active: what nobody chose is an item that does nothing, because
// the next operator is cut before this one's router has run. With rows to gather an item is as many panels as the
// team allows.
static cut cut_experts_in(const pace_plan *p, const pace_op *op, long m) {
    const pace_matrix *w = &op->u.experts_in.weight;
    const long choices = m * (op->u.experts_in.route.width / 2);
    const long active = choices < w->count ? choices : w->count;
    cut c = {.grain = active * w->n_panels / (16 * p->n_threads) / 4 * 4};
    c.grain = c.grain < 4 ? 4 : c.grain > w->n_panels ? w->n_panels : c.grain;
    c.row_blocks = (w->n_panels + c.grain - 1) / c.grain;  // items of one expert
    c.n = active * c.row_blocks;
    return c;
}

// Columns of the result, each item through all experts.
static cut cut_experts_out(const pace_plan *p, const pace_op *op) {
    const long n_panels = op->u.experts_out.weight.n_panels;
    cut c = {.grain = n_panels / (8 * p->n_threads)};
    c.grain = c.grain < 1 ? 1 : c.grain >= 8 ? 8 : c.grain >= 4 ? 4 : c.grain;
    c.n = (n_panels + c.grain - 1) / c.grain;
    return c;
}

static cut cut_op(const pace_plan *p, const pace_op *op) {
    const long m = rows_of(p, op);
    switch (op->kind) {
        case PACE_OP_experts_in:
            return cut_experts_in(p, op, m);
        case PACE_OP_experts_out:
            return cut_experts_out(p, op);
        case PACE_OP_gemm:
            // Block maxima are noted by the item that has the whole block.
            return cut_gemm(p, op->kernels->gemm_group, op->u.gemm.weight.n_panels, m,
                            op->block_max ? PACE_LOGIT_BLOCK / PACE_NR : 2);
        case PACE_OP_rope:
            return (cut){.n = list_of(p, op)->n * op->u.rope.kv.n_kv_heads};
        case PACE_OP_attention: {
            const pace_list *list = list_of(p, op);
            const long units = list->n * list->key.n_kv_heads;
            if (!splits(p, op)) return (cut){.n = units};
            const long per_head = (list->split + list->pieces_per_item - 1) / list->pieces_per_item;
            return (cut){.n = units * per_head, .grain = per_head};
        }
        default: {
            // Row-wise work: about 4 claims per worker.
            const long grain = m / (4 * p->n_threads) + 1;
            return (cut){.n = (m + grain - 1) / grain, .grain = grain};
        }
    }
}

static void arm(pace_plan *p, long i, int tid) {
    if (i >= p->end_op) return;
    pace_work *w = &p->ring[i & 1];
    const long n = cut_op(p, &p->ops[i]).n;
    if (p->ops[i].kind == PACE_OP_attention)
        pace_work_arm_shared(w, tid, n);  // tiles are sorted longest first
    else
        pace_work_arm(w, tid, n);
}

// The sampler starts from the maxima of blocks. Here the logits are still in L2; after the step 32 rows of 128k are
// 16 MB, which two threads read from memory in 300 us.
static void note_maxima(const pace_op *op, long p0, long p1, long m0, long m1) {
    const pace_slot *dst = &op->u.gemm.dst;
    const long n0 = p0 * PACE_NR, n1 = p1 * PACE_NR < dst->width ? p1 * PACE_NR : dst->width;
    const long blocks = (dst->width + PACE_LOGIT_BLOCK - 1) / PACE_LOGIT_BLOCK;
    for (long r = m0; r < m1; r++)
        op->kernels->block_max((const float *)dst->data + r * dst->ld + n0, n1 - n0,
                               op->block_max + r * blocks + n0 / PACE_LOGIT_BLOCK);
}

static void run_gemm(const pace_plan *p, const pace_op *op, const cut *c, long item, void *scratch) {
    const long p0 = item / c->row_blocks * c->grain, n_panels = op->u.gemm.weight.n_panels, m = rows_of(p, op);
    const long m0 = item % c->row_blocks * c->rows_per_block;
    const long p1 = p0 + c->grain < n_panels ? p0 + c->grain : n_panels;
    const long m1 = m0 + c->rows_per_block < m ? m0 + c->rows_per_block : m;
    pace_gemm g = op->u.gemm;
    if (op->head) g.src.data = (char *)g.src.data + p->head_row * g.src.ld * (g.src.int8 ? 1 : (long)sizeof(bf16));
    op->kernels->gemm(&g, p0, p1, m0, m1, scratch);
    if (op->block_max) note_maxima(op, p0, p1, m0, m1);
}

static void run_attention(const pace_plan *p, const pace_op *op, const cut *c, long item, void *scratch) {
    const pace_attention *g = &op->u.attention;
    const pace_list *list = list_of(p, op);
    const long n_kv_heads = list->key.n_kv_heads;
    if (!splits(p, op)) {
        op->kernels->attention(g, &p->batch, &list->rows[item / n_kv_heads], item % n_kv_heads, scratch);
        return;
    }
    const long unit = item / c->grain, tile = unit / n_kv_heads, kv_head = unit % n_kv_heads;
    const long pieces = pace_list_pieces(list, &p->batch, tile), p0 = item % c->grain * list->pieces_per_item;
    const long p1 = p0 + list->pieces_per_item < pieces ? p0 + list->pieces_per_item : pieces;
    if (p0 < p1)
        op->kernels->attention_part(g, &p->batch, &list->rows[tile], kv_head, p0, p1, parts_of(p, list, tile, kv_head),
                                    scratch);
}

static void run_experts_in(const pace_plan *p, const pace_op *op, const cut *c, long item, int tid, void *scratch) {
    const pace_chosen *choices = &p->sorted[tid].c;
    const long n_panels = op->u.experts_in.weight.n_panels, a = item / c->row_blocks;
    const long p0 = item % c->row_blocks * c->grain, p1 = p0 + c->grain < n_panels ? p0 + c->grain : n_panels;
    if (a < choices->n_active) op->kernels->experts_in(&op->u.experts_in, choices, a, p0, p1, scratch);
}

static void run_experts_out(const pace_plan *p, const pace_op *op, const cut *c, long item, int tid, void *scratch) {
    const long n_panels = op->u.experts_out.weight.n_panels, p0 = item * c->grain;
    op->kernels->experts_out(&op->u.experts_out, &p->sorted[tid].c, rows_of(p, op), p0,
                             p0 + c->grain < n_panels ? p0 + c->grain : n_panels, scratch);
}

static void fold_attention(const pace_plan *p, const pace_op *op, long unit, void *scratch) {
    const pace_list *list = list_of(p, op);
    const long tile = unit / list->key.n_kv_heads, kv_head = unit % list->key.n_kv_heads;
    op->kernels->attention_fold(&op->u.attention, &p->batch, &list->rows[tile], kv_head,
                                pace_list_pieces(list, &p->batch, tile), parts_of(p, list, tile, kv_head), scratch);
}

// How items of an operator run, by what it is cut into (see PACE_OPERATORS).
#define RUN_rows(op)                            \
    case PACE_OP_##op:                          \
        k->op(&o->u.op, &p->batch, r0, r0 + n); \
        break;
#define RUN_panels(op)                    \
    case PACE_OP_##op:                    \
        run_##op(p, o, c, item, scratch); \
        break;
#define RUN_tiles RUN_panels
#define RUN_choices(op)                        \
    case PACE_OP_##op:                         \
        run_##op(p, o, c, item, tid, scratch); \
        break;
#define RUN_groups(op)                                                                          \
    case PACE_OP_##op:                                                                          \
        k->op(&o->u.op, &p->batch, &list_of(p, o)->rows[item / n_kv_heads], item % n_kv_heads); \
        break;
#define RUN(op, cut) RUN_##cut(op)

static void run_item(const pace_plan *p, const pace_op *o, const cut *c, long item, int tid, void *scratch) {
    const pace_kernels *k = o->kernels;
    const long r0 = item * c->grain, left = rows_of(p, o) - r0, n = left < c->grain ? left : c->grain;
    const long n_kv_heads = o->kind == PACE_OP_rope ? o->u.rope.kv.n_kv_heads : 1;
    switch (o->kind) { PACE_OPERATORS(RUN) }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void step_worker(void *arg, int tid, pace_team *team) {
    pace_plan *p = arg;
    void *scratch = pace_team_scratch(team, tid);
    double last = tid == 0 ? seconds() : 0.0;
    for (long i = p->first_op; i < p->end_op; i++) {
        const pace_op *op = &p->ops[i];
        const cut c = cut_op(p, op);
        arm(p, i + 1, tid);
        long begin, end;
        const bool fold = splits(p, op);
        const pace_matrix *w;
        const pace_slot *route = route_of(op, &w);
        if (route) pace_sorted_make(&p->sorted[tid], route, rows_of(p, op), w->count);
        if (fold) pace_work_arm(&p->fold, tid, list_of(p, op)->n * list_of(p, op)->key.n_kv_heads);
        while (pace_work_next(&p->ring[i & 1], tid, 1, &begin, &end)) run_item(p, op, &c, begin, tid, scratch);
        pace_team_barrier(team, tid);
        if (fold) {
            while (pace_work_next(&p->fold, tid, 1, &begin, &end)) fold_attention(p, op, begin, scratch);
            pace_team_barrier(team, tid);
        }
        if (tid == 0) {
            const double now = seconds();
            p->op_s[i] = now - last;
            p->op_experts[i] = route ? p->sorted[0].c.n_active : 0;
            last = now;
        }
    }
}

static int run(pace_plan *p, long op, long end, long head_row) {
    p->first_op = op;
    p->end_op = end;
    p->head_row = head_row;
    for (int tid = 0; tid < p->n_threads; tid++) arm(p, op, tid);
    return pace_team_run_with(p->team, step_worker, p, p->scratch_bytes);
}

int pace_plan_part(pace_plan *p, const pace_batch *batch, long first, long end) {
    p->batch = *batch;
    for (int i = 0; i < p->n_lists; i++) pace_list_make(&p->lists[i], &p->batch, p->n_threads);
    return run(p, first, end, 0);
}

int pace_plan_step(pace_plan *p, const pace_batch *batch) { return pace_plan_part(p, batch, 0, p->n_ops); }

int pace_plan_head(pace_plan *p, long first) { return run(p, p->n_ops - 1, p->n_ops, first); }

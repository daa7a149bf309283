// plan.c - executes a plan: all operators of a step in one call on the thread team.
#define _GNU_SOURCE
#include "plan.h"

#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "mapped.h"

// ---- weights ----------------------------------------------------------------------------------------------

int pace_matrix_init(pace_matrix *w, long n, long k) {
    memset(w, 0, sizeof *w);
    w->n = n;
    w->k = k;
    w->k_pad = (k + PACE_KPAD - 1) / PACE_KPAD * PACE_KPAD;
    w->n_panels = (n + PACE_NR - 1) / PACE_NR;
    w->bytes = (size_t)w->n_panels * PACE_NR * (size_t)w->k_pad * sizeof(bf16);
    w->data = pace_alloc_huge(w->bytes);
    return w->data ? 0 : ENOMEM;
}

void pace_matrix_free(pace_matrix *w) {
    pace_free_huge(w->data, w->bytes);
    w->data = NULL;
}

typedef struct {
    pace_matrix *w;
    const char *src;
    const pace_kernels *kernels;
    long ld, rows, at;
    int dtype, mode;
    atomic_int error;
    pace_work work;
} pack_job;

static void pack_worker(void *arg, int tid, pace_team *team) {
    pack_job *j = arg;
    void *rows = pace_team_scratch(team, tid);
    static const size_t size[3] = {2, 2, 4};
    long begin, end;
    while (pace_work_next(&j->work, tid, 2, &begin, &end))
        for (long i = begin; i < end; i++) {
            const long left = j->rows - i * 16, n = left < 16 ? left : 16;
            // Half-panel that receives rows 16 i .. 16 i + 15 of the source.
            long half = j->at / 16;
            half += j->mode == PACE_PACK_ROWS ? i : 2 * i + (j->mode == PACE_PACK_UP);
            bf16 *dst = j->w->data + (half / 2) * j->w->k_pad * PACE_NR + (half % 2) * 32;
            const char *src = j->src + (size_t)(i * 16 * j->ld) * size[j->dtype];
            if (pace_copy_mapped(rows, src, (size_t)((n - 1) * j->ld + j->w->k) * size[j->dtype]) != 0) {
                j->error = EFAULT;
                return;
            }
            j->kernels->pack_half(dst, rows, j->dtype, j->ld, n, j->w->k, j->w->k_pad);
        }
}

int pace_matrix_pack(pace_matrix *w, pace_team *team, const pace_kernels *kernels, const void *src, int dtype, long ld,
                     long rows, long at, int mode) {
    pack_job j = {
        .w = w, .src = src, .kernels = kernels, .ld = ld, .rows = rows, .at = at, .dtype = dtype, .mode = mode};
    int e = pace_work_init(&j.work, pace_team_size(team));
    if (e) return e;
    pace_work_arm_all(&j.work, (rows + 15) / 16);
    e = pace_team_run_with(team, pack_worker, &j, (size_t)(16 * ld) * sizeof(float));
    pace_work_destroy(&j.work);
    return e ? e : j.error;
}

// ---- KV cache memory --------------------------------------------------------------------------------------

int pace_pool_init(pace_pool *pool, long n_layers, long n_blocks, const pace_kv *shape) {
    *pool = (pace_pool){.n_layers = n_layers, .n_blocks = n_blocks, .kv = *shape};
    const double most = (double)n_layers * (double)n_blocks * (double)shape->n_kv_heads * (double)shape->block;
    if (most * 4 * PACE_MAX_HEAD_DIM > 0x1p62) return ENOMEM;  // and nothing below overflows
    pool->kv.block_stride = n_layers * shape->n_kv_heads * pace_kv_head_bytes(shape);
    pool->bytes = (size_t)(n_blocks * pool->kv.block_stride);
    pool->kv.kv = pace_alloc_huge(pool->bytes);
    return pool->kv.kv ? 0 : ENOMEM;
}

void pace_pool_free(pace_pool *pool) {
    pace_free_huge(pool->kv.kv, pool->bytes);
    pool->kv.kv = NULL;
}

pace_kv pace_pool_layer(const pace_pool *pool, long layer) {
    pace_kv kv = pool->kv;
    kv.kv += layer * kv.n_kv_heads * pace_kv_head_bytes(&kv);
    return kv;
}

static void copy_head(const pace_kv *kv, const char *src, char *dst, long n) {
    const size_t size = kv->int8 ? 1 : sizeof(bf16), d = (size_t)kv->head_dim, b = (size_t)kv->block;
    const size_t tokens = (size_t)n, pairs = (tokens + 1) / 2, group = (size_t)pace_kv_group(kv);
    const size_t end = (tokens + group - 1) / group * group;  // of the last group that holds a token
    for (size_t p = 0; p < d / 2; p++)                        // K [d / 2][block][2]
        memcpy(dst + p * 2 * b * size, src + p * 2 * b * size, tokens * 2 * size);
    src += b * d * size;  // V [block / 2][d][2]
    dst += b * d * size;
    memcpy(dst, src, pairs * 2 * d * size);
    if (tokens % 2)
        for (size_t e = 0; e < d; e++) memset(dst + ((pairs - 1) * 2 * d + 2 * e + 1) * size, 0, size);
    memset(dst + pairs * 2 * d * size, 0, (end / 2 - pairs) * 2 * d * size);
    if (!kv->int8) return;
    src += b * d;  // scales of K [block], of V [block]
    dst += b * d;
    memcpy(dst, src, tokens * sizeof(float));
    memcpy(dst + b * sizeof(float), src + b * sizeof(float), tokens * sizeof(float));
    memset(dst + (b + tokens) * sizeof(float), 0, (end - tokens) * sizeof(float));
}

void pace_pool_copy(const pace_pool *pool, long src, long dst, long n_tokens) {
    for (long layer = 0; layer < pool->n_layers; layer++) {
        const pace_kv kv = pace_pool_layer(pool, layer);
        for (long h = 0; h < kv.n_kv_heads; h++)
            copy_head(&kv, pace_kv_head(&kv, src, h), pace_kv_head(&kv, dst, h), n_tokens);
    }
}

void pace_pool_map_ahead(pace_pool *pool, long reached, long n_seqs) {
    if (pool->n_mapped < reached) pool->n_mapped = reached;
    if (pool->n_mapped >= pool->n_blocks || pool->n_mapped >= reached + n_seqs) return;
    pace_map_huge(pool->kv.kv + pool->n_mapped++ * pool->kv.block_stride, (size_t)pool->kv.block_stride);
}

// ---- building ---------------------------------------------------------------------------------------------

// Room for split attention's partial results; touched only when used. 32 MB hold 4000 pieces (a million tokens) of 32
// heads of 64.
#define PARTS_BYTES ((size_t)32 << 20)

int pace_plan_init(pace_plan *p, pace_team *team, long max_tokens, long max_seqs, long max_logits, long n_heads,
                   long n_kv_heads, long head_dim) {
    memset(p, 0, sizeof *p);
    p->team = team;
    p->n_threads = pace_team_size(team);
    p->max_tokens = max_tokens;
    p->max_seqs = max_seqs;
    p->max_logits = max_logits;
    p->n_heads = n_heads;
    p->n_kv_heads = n_kv_heads;
    p->head_dim = head_dim;
    // A sequence's rows fall into at most rows / 32 + 2 groups; tiles are never more than that or one per token.
    p->rope_rows = malloc((size_t)(max_tokens + 2 * max_seqs) * sizeof(pace_rows));
    p->tiles = malloc((size_t)(max_tokens + max_seqs) * sizeof(pace_rows));
    if (p->n_threads > 1) p->parts = pace_alloc_huge(PARTS_BYTES);
    if (!p->rope_rows || !p->tiles || (p->n_threads > 1 && !p->parts)) return ENOMEM;
    if (pace_work_init(&p->fold, p->n_threads)) return ENOMEM;
    for (int i = 0; i < 2; i++)
        if (pace_work_init(&p->ring[i], p->n_threads)) return ENOMEM;
    return 0;
}

void pace_plan_free(pace_plan *p) {
    free(p->rope_rows);
    free(p->tiles);
    free(p->ops);
    free(p->op_s);
    for (int i = 0; i < 2; i++) pace_work_destroy(&p->ring[i]);
    pace_work_destroy(&p->fold);
    pace_free_huge(p->parts, PARTS_BYTES);
    pace_free_huge(p->scratch, p->scratch_bytes);
    memset(p, 0, sizeof *p);
}

pace_op *pace_plan_add(pace_plan *p, int kind, const pace_kernels *kernels) {
    if (p->n_ops == p->cap_ops) {
        const long cap = p->cap_ops ? 2 * p->cap_ops : 128;
        pace_op *ops = realloc(p->ops, (size_t)cap * sizeof *ops);
        if (!ops) return NULL;
        p->ops = ops;
        double *op_s = realloc(p->op_s, (size_t)cap * sizeof *op_s);
        if (!op_s) return NULL;
        p->op_s = op_s;
        p->cap_ops = cap;
    }
    size_t need =
        kernels->gemm_scratch > kernels->attention_scratch ? kernels->gemm_scratch : kernels->attention_scratch;
    need = (need + 4095) / 4096 * 4096;
    if (need > p->scratch_stride) {
        pace_free_huge(p->scratch, p->scratch_bytes);
        p->scratch_stride = need;
        p->scratch_bytes = need * (size_t)p->n_threads;
        p->scratch = pace_alloc_huge(p->scratch_bytes);
        if (!p->scratch) return NULL;
    }
    pace_op *op = &p->ops[p->n_ops];
    memset(op, 0, sizeof *op);
    op->kind = kind;
    op->kernels = kernels;
    p->op_s[p->n_ops++] = 0.0;
    return op;
}

// ---- one step ---------------------------------------------------------------------------------------------

// How an operator's work is cut: n items of `grain` panels or rows, times row blocks for large GEMMs.
typedef struct {
    long n, grain, row_blocks, rows_per_block;
} cut;

#define GEMM_FEW_ROWS 64  // up to here the weights' stream decides and rows are never split

static cut cut_gemm(const pace_plan *p, long n_panels, long m, long least) {
    cut c = {.row_blocks = 1, .rows_per_block = m};
    const long t = p->n_threads;
    if (m <= GEMM_FEW_ROWS) {
        // About 16 claims per worker, in whole groups of the 4 panels that the skinny kernel reads side by side.
        // (Claims of 1 or 2 panels where that leaves 4: the same times at 1 to 32 rows, so it is not the tail that
        // costs.)
        c.grain = n_panels / (t * 16) / 4 * 4;
        c.grain = c.grain < 4 ? 4 : c.grain > 32 ? 32 : c.grain;
    } else {
        c.grain = 8;
        // Too few panel groups for the team: cut rows as well (a multiple of 32 keeps register tiles full).
        while ((n_panels + c.grain - 1) / c.grain * c.row_blocks < 3 * t && m / c.row_blocks > 256) c.row_blocks++;
        if ((n_panels + c.grain - 1) / c.grain * c.row_blocks < 3 * t) c.grain = least;
        c.rows_per_block = ((m + c.row_blocks - 1) / c.row_blocks + 31) / 32 * 32;
        c.row_blocks = (m + c.rows_per_block - 1) / c.rows_per_block;
    }
    c.n = (n_panels + c.grain - 1) / c.grain * c.row_blocks;
    return c;
}

static int splits(const pace_plan *p, const pace_op *op) {
    return op->kind == PACE_ATTENTION && p->split && op->kernels->attention_part;
}

// First and last piece of the positions that a tile's rows see under a window (0: none).
static long pieces_of(const pace_plan *p, const pace_rows *tile, long window) {
    const long pos0 = (long)p->batch.kv_len[tile->seq] - p->batch.q_start[tile->seq + 1] + tile->row0;
    const long begin = window && pos0 - window + 1 > 0 ? pos0 - window + 1 : 0;
    const long end = pos0 + tile->row1 - tile->row0;
    return (end + PACE_PIECE - 1) / PACE_PIECE - begin / PACE_PIECE;
}

static float *parts_of(const pace_plan *p, long tile, long kv_head) {
    return p->parts + (tile * p->n_kv_heads + kv_head) * p->part_stride;
}

static long rows_of(const pace_plan *p, const pace_op *op) {
    if (!op->logits) return p->batch.n_tokens;
    const long left = p->batch.n_logits - p->head_row;
    return !op->head ? p->batch.n_logits : left < p->max_logits ? left : p->max_logits;
}

static cut cut_op(const pace_plan *p, const pace_op *op) {
    const long m = rows_of(p, op);
    switch (op->kind) {
        case PACE_GEMM:
            // Block maxima are noted by the item that has the whole block.
            return cut_gemm(p, op->u.gemm.n_panels, m, op->u.gemm.block_max ? PACE_LOGIT_BLOCK / PACE_NR : 2);
        case PACE_ROPE_KV:
            return (cut){.n = p->n_rope_rows * p->n_kv_heads};
        case PACE_ATTENTION:
            if (splits(p, op)) {
                const long per_head = (p->split + p->pieces_per_item - 1) / p->pieces_per_item;
                return (cut){.n = p->n_tiles * p->n_kv_heads * per_head, .grain = per_head};
            }
            return (cut){.n = p->n_tiles * p->n_kv_heads};
        default: {
            // Row-wise work: about 4 claims per worker.
            const long grain = m / (4 * p->n_threads) + 1;
            return (cut){.n = (m + grain - 1) / grain, .grain = grain};
        }
    }
}

static void arm(pace_plan *p, long i, int tid) {
    if (i >= p->n_ops) return;
    pace_work *w = &p->ring[i & 1];
    const long n = cut_op(p, &p->ops[i]).n;
    if (p->ops[i].kind == PACE_ATTENTION)
        pace_work_arm_shared(w, tid, n);  // tiles are sorted longest first
    else
        pace_work_arm(w, tid, n);
}

static void angles(const pace_plan *p, const pace_op *op, long m0, long m1) {
    const pace_batch *b = &p->batch;
    const long half = op->u.angles.half;
    long seq = 0;
    for (long r = m0; r < m1; r++) {
        while (r >= b->q_start[seq + 1]) seq++;
        const float pos = (float)(b->kv_len[seq] - b->q_start[seq + 1] + r);
        for (long i = 0; i < half; i++) {
            const double a = (double)(pos * op->u.angles.inv_freq[i]);  // the product is f32, as in transformers
            double s, c;
            sincos(a, &s, &c);
            op->u.angles.cos[r * half + i] = (float)c * op->u.angles.factor;
            op->u.angles.sin[r * half + i] = (float)s * op->u.angles.factor;
        }
    }
}

static pace_attention attention_of(const pace_plan *p, const pace_op *op) {
    pace_attention g = op->u.attention;
    g.kv.block_tables = p->batch.block_tables;
    g.kv.table_stride = p->batch.table_stride;
    g.kv.q_start = p->batch.q_start;
    g.kv.kv_len = p->batch.kv_len;
    return g;
}

// The sampler starts from the maxima of blocks. Here the logits are still in L2; after the step 32 rows of 128k are
// 16 MB, which two threads read from memory in 300 us.
static void note_maxima(const pace_op *op, long p0, long p1, long m0, long m1) {
    const pace_gemm *g = &op->u.gemm.g;
    const long n0 = p0 * PACE_NR, n1 = p1 * PACE_NR < g->n ? p1 * PACE_NR : g->n;
    const long blocks = (g->n + PACE_LOGIT_BLOCK - 1) / PACE_LOGIT_BLOCK;
    for (long r = m0; r < m1; r++)
        op->kernels->block_max((const float *)g->c + r * g->ldc + n0, n1 - n0,
                               op->u.gemm.block_max + r * blocks + n0 / PACE_LOGIT_BLOCK);
}

static void run_item(const pace_plan *p, const pace_op *op, const cut *c, long item, void *scratch) {
    const pace_batch *b = &p->batch;
    const long m = rows_of(p, op);
    const long r0 = item * c->grain, r1 = r0 + c->grain < m ? r0 + c->grain : m;
    switch (op->kind) {
        case PACE_EMBED:
            for (long r = r0; r < r1; r++)
                op->kernels->embed(op->u.embed.x + r * op->u.embed.ldx, op->u.embed.table->data, b->token_ids[r],
                                   op->u.embed.table->k, op->u.embed.table->k_pad, op->u.embed.scale);
            break;
        case PACE_NORM:
            op->kernels->norm(&op->u.norm, r0, r1);
            break;
        case PACE_GEMM: {
            const long p0 = item / c->row_blocks * c->grain, n_panels = op->u.gemm.n_panels;
            const long m0 = item % c->row_blocks * c->rows_per_block;
            const long p1 = p0 + c->grain < n_panels ? p0 + c->grain : n_panels;
            const long m1 = m0 + c->rows_per_block < m ? m0 + c->rows_per_block : m;
            pace_gemm g = op->u.gemm.g;
            if (op->head) g.a += p->head_row * g.lda;
            op->kernels->gemm_bf16(&g, p0, p1, m0, m1, scratch);
            if (op->u.gemm.block_max) note_maxima(op, p0, p1, m0, m1);
            break;
        }
        case PACE_ANGLES:
            angles(p, op, r0, r1);
            break;
        case PACE_ROPE_KV: {
            pace_rope_kv g = op->u.rope;
            g.kv.block_tables = b->block_tables;
            g.kv.table_stride = b->table_stride;
            g.kv.q_start = b->q_start;
            g.kv.kv_len = b->kv_len;
            op->kernels->rope_kv(&g, &p->rope_rows[item / p->n_kv_heads], item % p->n_kv_heads);
            break;
        }
        case PACE_ATTENTION: {
            const pace_attention g = attention_of(p, op);
            if (splits(p, op)) {
                const long unit = item / c->grain, tile = unit / p->n_kv_heads, kv_head = unit % p->n_kv_heads;
                const long pieces = pieces_of(p, &p->tiles[tile], g.window), p0 = item % c->grain * p->pieces_per_item;
                const long p1 = p0 + p->pieces_per_item < pieces ? p0 + p->pieces_per_item : pieces;
                if (p0 < p1)
                    op->kernels->attention_part(&g, &p->tiles[tile], kv_head, p0, p1, parts_of(p, tile, kv_head),
                                                scratch);
            } else {
                op->kernels->attention(&g, &p->tiles[item / p->n_kv_heads], item % p->n_kv_heads, scratch);
            }
            break;
        }
        case PACE_SELECT:
            for (long r = r0; r < r1; r++)
                memcpy(op->u.select.dst + (size_t)r * op->u.select.dst_stride,
                       op->u.select.src + (size_t)b->logit_rows[r] * op->u.select.src_stride, op->u.select.row_bytes);
            break;
    }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void step_worker(void *arg, int tid, pace_team *team) {
    pace_plan *p = arg;
    void *scratch = (char *)p->scratch + (size_t)tid * p->scratch_stride;
    double last = tid == 0 ? seconds() : 0.0;
    for (long i = p->first_op; i < p->n_ops; i++) {
        const pace_op *op = &p->ops[i];
        const cut c = cut_op(p, op);
        arm(p, i + 1, tid);
        long begin, end;
        const int fold = splits(p, op);
        if (fold) pace_work_arm(&p->fold, tid, p->n_tiles * p->n_kv_heads);
        while (pace_work_next(&p->ring[i & 1], tid, 1, &begin, &end)) run_item(p, op, &c, begin, scratch);
        pace_team_barrier(team, tid);
        if (fold) {
            const pace_attention g = attention_of(p, op);
            while (pace_work_next(&p->fold, tid, 1, &begin, &end)) {
                const long tile = begin / p->n_kv_heads, kv_head = begin % p->n_kv_heads;
                op->kernels->attention_fold(&g, &p->tiles[tile], kv_head, pieces_of(p, &p->tiles[tile], g.window),
                                            parts_of(p, tile, kv_head), scratch);
            }
            pace_team_barrier(team, tid);
        }
        if (tid == 0) {
            const double now = seconds();
            p->op_s[i] = now - last;
            last = now;
        }
    }
}

static int longest_first(const void *a, const void *b, void *arg) {
    const pace_batch *s = arg;
    const pace_rows *x = a, *y = b;
    const long ex = (long)s->kv_len[x->seq] - s->q_start[x->seq + 1] + x->row1;
    const long ey = (long)s->kv_len[y->seq] - s->q_start[y->seq + 1] + y->row1;
    const long cx = ex * (x->row1 - x->row0), cy = ey * (y->row1 - y->row0);
    return cx > cy ? -1 : cx < cy ? 1 : (x->row0 > y->row0) - (x->row0 < y->row0);
}

static void list_rows(pace_plan *p) {
    const pace_batch *b = &p->batch;
    const long group = p->n_heads / p->n_kv_heads, most = PACE_ATTN_ROWS / group > 0 ? PACE_ATTN_ROWS / group : 1;
    p->n_rope_rows = p->n_tiles = 0;
    for (long s = 0; s < b->n_seqs; s++) {
        const long first = b->q_start[s], end = b->q_start[s + 1], pos0 = (long)b->kv_len[s] - end;
        for (long r = first, next; r < end; r = next) {
            next = ((pos0 + r) / PACE_ROPE_ROWS + 1) * PACE_ROPE_ROWS - pos0;
            if (next > end) next = end;
            p->rope_rows[p->n_rope_rows++] = (pace_rows){(int32_t)s, (int32_t)r, (int32_t)next};
        }
        for (long r = first; r < end; r += most)
            p->tiles[p->n_tiles++] = (pace_rows){(int32_t)s, (int32_t)r, (int32_t)(r + most < end ? r + most : end)};
    }
    qsort_r(p->tiles, (size_t)p->n_tiles, sizeof(pace_rows), longest_first, &p->batch);
}

// Fewer than two tiles and heads per worker, and a cache long enough: cut along the cache too. Three items a worker
// even out; the pieces themselves never change (law 1).
static void cut_attention(pace_plan *p) {
    const long units = p->n_tiles * p->n_kv_heads, group = p->n_heads / p->n_kv_heads;
    long most = 0, rows = 0;
    for (long i = 0; i < p->n_tiles; i++) {
        const long pieces = pieces_of(p, &p->tiles[i], 0), n = (p->tiles[i].row1 - p->tiles[i].row0) * group;
        most = pieces > most ? pieces : most;
        rows = n > rows ? n : rows;
    }
    p->split = 0;
    p->part_stride = most * rows * (p->head_dim + 2);
    if (p->n_threads == 1 || units >= 2 * p->n_threads || most < 4) return;
    if ((size_t)(units * p->part_stride) * sizeof(float) > PARTS_BYTES) return;
    const long wanted = (3 * p->n_threads + units - 1) / units;
    p->split = most;
    p->pieces_per_item = (most + wanted - 1) / wanted;
}

static int run_from(pace_plan *p, long op, long head_row) {
    p->first_op = op;
    p->head_row = head_row;
    for (int tid = 0; tid < p->n_threads; tid++) arm(p, op, tid);
    return pace_team_run(p->team, step_worker, p);
}

int pace_plan_step(pace_plan *p, const pace_batch *batch) {
    p->batch = *batch;
    list_rows(p);
    cut_attention(p);
    return run_from(p, 0, 0);
}

int pace_plan_head(pace_plan *p, long first) { return run_from(p, p->n_ops - 1, first); }

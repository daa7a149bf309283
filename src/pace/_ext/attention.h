// attention.h - softmax(scale Q K^T) V for decode, verification and prefill alike.
//
// A tile is up to 64 rows = query tokens x query heads of one kv head; K and V are read once for all of them.
// The cache is walked in pieces of 256 tokens at absolute positions. In a piece: S = Q K^T (f32 scratch), mask,
// row maximum, P = exp(S - max) rounded to bf16, row sum of the rounded P (so that the weights add up to one),
// O = P V; then (max, sum, O) folds into the running triple. Masked columns contribute exact zeros and the
// reduction order is fixed by absolute position, so a row is bit-identical alone, among drafts, or in a chunk,
// on any block size.
//
// int8 K and V are integers times a scale per token. The integers are exact in bf16, so they are expanded once per tile
// to the same pairs and the same kernels multiply them; a K scale multiplies its column of S, a V scale its column of P
// after the row sum and before the product, rounded to bf16 once more.
//
// Short contexts wait for memory and compute in turn: 32 sequences of 128 tokens, 16 layers of 8 heads of 64, take 7.8
// to 9.0 ms on two Zen 4 cores, 3.3 from a warm cache, 3.9 at the read roof. Tried: prefetching V during the scores: no
// change; all of the next tile in one burst, 7.9 to 8.5 (perhaps for want of L1 miss registers); blocks of 64 tokens,
// whose K has fewer gaps, 7.1 to 7.3, but a sixth slower for 8 sequences of 250. On two Zen 5 cores it is 6.5 ms
// whether memory gives 50 or 80 GB/s, 4.4 ns a line, and as much with the next item's K, its V or both fetched before a
// tile: what one core's L1 misses allow at once. Blocks of 128 / 64 / 32: 7.5 / 7.8 / 10.7 ms.
#ifndef PACE_ATTENTION_H
#define PACE_ATTENTION_H

#include "mm.h"
#ifdef PACE_AMX
#include "amx.h"
#endif

// Tokens of int8 K or V expanded at a time: 8 KB at head_dim 64. 128 and 256 are within 5 %.
#define KV_RUN 64

typedef struct {
    _Alignas(64) bf16 q[PACE_ATTN_ROWS * PACE_MAX_HEAD_DIM];  // rows attention_tile.ld apart, as in o and sum_o
    float s[PACE_ATTN_ROWS][PACE_PIECE];
    bf16 p[PACE_ATTN_ROWS][PACE_PIECE + 32];  // + 32: rows do not share a cache set
    float o[PACE_ATTN_ROWS * PACE_MAX_HEAD_DIM];
    float sum_o[PACE_ATTN_ROWS * PACE_MAX_HEAD_DIM];
    float max[PACE_ATTN_ROWS], sum[PACE_ATTN_ROWS];
    _Alignas(64) bf16 kv[KV_RUN * PACE_MAX_HEAD_DIM];  // K or V that cannot be multiplied where it stands
    float k_scale[PACE_PIECE], v_scale[PACE_PIECE];    // int8: of the piece's tokens
} attention_buf;

// Which unit multiplies is a property of the tier and head_dim, never of the row count or the block size (law 1).
INLINE int attention_in_tiles(long head_dim) {
#ifdef PACE_AMX
    return head_dim % 32 == 0;
#else
    (void)head_dim;
    return 0;
#endif
}

INLINE void attention_mm(int in_tiles, long rows, long columns, const mm_args *g) {
#ifdef PACE_AMX
    if (in_tiles) {
        amx_block(rows, columns, g);
        return;
    }
#endif
    (void)in_tiles;
    mm_block(rows, (int)(columns / 16), *g);
}

// int8 rows of n elements, a multiple of 32, as bf16: exact. Meanwhile as many bytes at `ahead` come to the L2, for
// expanding alone leaves the memory idle: 21 -> 14 ns per token and kv head of 64 at 64k tokens on one Zen 4 core.
INLINE void expand(bf16 *dst, long ld_dst, const int8_t *src, long ld_src, uintptr_t ahead, long ld_ahead, long rows,
                   long n) {
    for (long r = 0; r < rows; r++, dst += ld_dst, src += ld_src, ahead += (uintptr_t)ld_ahead)
        for (long i = 0; i < n; i += 2 * VL) {
            FETCH(ahead + (uintptr_t)i, _MM_HINT_T1);
            v_int8_to_bf16(dst + i, src + i);
        }
}

// Tokens from position pos to the end of their block, at most `left` of them.
INLINE long run_in_block(const pace_kv *kv, long pos, long left) {
    const long run = kv->block - pos % kv->block;
    return run < left ? run : left;
}

// K and V of int8 tokens from position pos on, inside their block: K [d / 2] rows of 2 * block, V on end.
INLINE const int8_t *int8_keys(const pace_kv *kv, const pace_batch *b, long seq, long kv_head, long pos) {
    return (const int8_t *)pace_kv_at(kv, b, seq, pos, kv_head) + pos % kv->block * 2;
}
INLINE const int8_t *int8_values(const pace_kv *kv, const pace_batch *b, long seq, long kv_head, long pos) {
    return (const int8_t *)pace_kv_at(kv, b, seq, pos, kv_head) + (kv->block + pos % kv->block) * kv->head_dim;
}

// K of *n (<= left) tokens from position pos on as pairs [d / 2][*ld / 2][2]: bf16 where they stand in the cache, int8
// expanded in scratch while their V is fetched.
INLINE const bf16 *keys_at(attention_buf *t, const pace_kv *kv, const pace_batch *b, long seq, long kv_head, long pos,
                           long left, long *n, long *ld) {
    if (!kv->int8) {
        *n = run_in_block(kv, pos, left);
        *ld = 2 * kv->block;
        return (const bf16 *)(const void *)pace_kv_at(kv, b, seq, pos, kv_head) + pos % kv->block * 2;
    }
    *n = left < KV_RUN ? left : KV_RUN;
    *ld = 2 * KV_RUN;
    for (long i = 0, run; i < *n; i += run) {
        run = run_in_block(kv, pos + i, *n - i);
        expand(t->kv + 2 * i, 2 * KV_RUN, int8_keys(kv, b, seq, kv_head, pos + i), 2 * kv->block,
               (uintptr_t)int8_values(kv, b, seq, kv_head, pos + i), 2 * run, kv->head_dim / 2, 2 * run);
    }
    return t->kv;
}

// V of *n tokens from position pos on as pairs [*n / 2][d][2]: at most `left`, or for tiles that rounded up to 32 with
// zeros. bf16 where it stands in the cache, unless a tile wants 32 tokens of two blocks (a tile's sum has the same 32
// terms on every block size); int8 expanded while K of the next piece is fetched, if that is before `end`.
INLINE const bf16 *values_at(attention_buf *t, const pace_kv *kv, const pace_batch *b, long seq, long kv_head, long pos,
                             long left, long end, int in_tiles, long *n) {
    const long d = kv->head_dim, block = kv->block;
    if (!kv->int8 && (block >= 32 || !in_tiles)) {
        *n = run_in_block(kv, pos, left);
        return (const bf16 *)(const void *)pace_kv_at(kv, b, seq, pos, kv_head) + (block + pos % block) * d;
    }
    *n = left < KV_RUN ? left : KV_RUN;
    for (long i = 0, run; i < *n; i += run) {
        const long at = pos + i, next = at + PACE_PIECE < end ? at + PACE_PIECE : at;
        run = run_in_block(kv, at, *n - i);
        if (kv->int8)
            expand(t->kv + i * d, 2 * run, int8_values(kv, b, seq, kv_head, at), 2 * run,
                   (uintptr_t)int8_keys(kv, b, seq, kv_head, next), 2 * block, d / 2, 2 * run);
        else
            memcpy(t->kv + i * d, (const bf16 *)(const void *)pace_kv_at(kv, b, seq, at, kv_head) + block * d,
                   (size_t)(run * d) * sizeof(bf16));  // blocks of 16: at is the first of one
    }
    if (in_tiles && *n % 32) {
        memset(t->kv + *n * d, 0, (size_t)(16 * d) * sizeof(bf16));
        *n += 16;
    }
    return t->kv;
}

// Columns [first, last) of one piece's score row become probabilities; columns [c0, c1) outside that are zero.
// Returns the row maximum and sum over visible columns (-inf and 0 when there are none).
// int8 (k_scale not NULL): the scores still lack their key's scale, and p takes its value's.
//
// The maximum is taken before the scale: rounding is monotonic. It is subtracted before the scale too: of scores that
// are large together only their distance is rounded. 2^x takes fewer instructions than e^x: 64 rows x 256 columns on a
// Zen 5 core 3.0 us, 3.7 as a maximum of scaled scores, e^x and p read back. (Two vectors converted at once and
// summed by a dot product with ones would save another 0.7, on avx512bf16 alone.)
INLINE void softmax_piece(float *s, bf16 *p, long c0, long c1, long first, long last, float scale, float cap,
                          const float *k_scale, const float *v_scale, float *max, float *sum) {
    if (k_scale || cap > 0.0f || !(scale > 0.0f)) {
        const vf vs = v_set(scale), vcap = v_set(cap);
        for (long j = c0; j < c1; j += VL) {
            vf x = v_mul(v_load(s + j), vs);
            if (k_scale) x = v_mul(x, v_load(k_scale + j));
            if (cap > 0.0f) x = v_mul(v_tanh(v_div(x, vcap)), vcap);
            v_store(s + j, x);
        }
        scale = 1.0f;
    }
    vf top = v_set(-__builtin_inff()), total = v_zero();
    for (long j = c0; j < c1; j += VL) {
        vf x = v_load(s + j);
        if (first > j || last < j + VL) x = v_keep(x, first - j, last - j, -__builtin_inff());
        top = v_max(top, x);
    }
    const float highest = v_hmax(top);
    const vf m = v_set(highest), to_base_2 = v_set(scale * 1.44269504f);
    for (long j = c0; j < c1; j += VL) {
        vf e = v_exp2(v_mul(v_sub(v_load(s + j), m), to_base_2));
        if (first > j || last < j + VL) e = v_keep(e, first - j, last - j, 0.0f);
        v_store_bf16(p + j, e);
        e = v_as_bf16(e);
        total = v_add(total, e);
        if (v_scale) v_store_bf16(p + j, v_mul(e, v_load(v_scale + j)));
    }
    *max = highest * scale;
    *sum = v_sum(total);
}

// What a tile is: rows of one sequence and kv head, the positions they see, and how they are multiplied.
typedef struct {
    long seq, d, group, n, pos0, begin, end;  // n rows; the first at position pos0; positions [begin, end) are seen
    long ld;                                  // of q, o and sum_o
    int in_tiles;
} attention_tile;

static attention_tile attention_shape(const pace_attention *g, const pace_batch *b, const pace_rows *rows) {
    const pace_kv *kv = &g->kv;
    const long n_tok = rows->row1 - rows->row0;
    attention_tile a = {.seq = rows->seq, .d = kv->head_dim};
    a.group = g->n_heads / kv->n_kv_heads;
    a.n = n_tok * a.group;
    a.pos0 = pace_position_of(b, rows, rows->row0);
    a.end = a.pos0 + n_tok;
    a.begin = pace_first_seen(a.pos0, g->window, g->chunk);
    a.ld = a.d <= 256 ? 256 : 512;
    a.in_tiles = attention_in_tiles(a.d);
    return a;
}

static void attention_load(attention_buf *t, const pace_attention *g, const pace_rows *rows, long kv_head,
                           const attention_tile *a) {
    for (long r = 0; r < a->n; r++)  // row r is query token r / group, head r % group
        memcpy(t->q + r * a->ld,
               (const bf16 *)g->src.data + (rows->row0 + r / a->group) * g->src.ld +
                   (kv_head * a->group + r % a->group) * a->d,
               (size_t)a->d * 2);
#ifdef PACE_AMX
    if (a->in_tiles) amx_configure(32, 64);
#endif
}

INLINE void attention_release(const attention_tile *a) {
#ifdef PACE_AMX
    if (a->in_tiles) _tile_release();
#else
    (void)a;
#endif
}

// One piece: t->o[r], max[r], sum[r] of every row.
static void attention_piece(attention_buf *t, const pace_attention *g, const pace_batch *b, long kv_head,
                            const attention_tile *a, long piece, float *max, float *sum) {
    const pace_kv *kv = &g->kv;
    const long d = a->d, unit = pace_kv_group(kv);  // columns are computed in whole units: V is clean up to there
    const long lo = a->begin > piece ? (a->begin - piece) / 32 * 32 : 0;  // columns of this piece: [lo, hi)
    const long hi = a->end - piece < PACE_PIECE ? (a->end - piece + unit - 1) / unit * unit : PACE_PIECE;
    for (long c = lo, step, ld; c < hi; c += step) {  // S = Q K^T
        const bf16 *k = keys_at(t, kv, b, a->seq, kv_head, piece + c, hi - c, &step, &ld);
        attention_mm(a->in_tiles, a->n, step,
                     &(mm_args){.a = t->q,
                                .lda = a->ld,
                                .b = k,
                                .ldb = ld,
                                .bps = 64,
                                .c = t->s[0] + c,
                                .ldc = PACE_PIECE,
                                .kp = d / 2});
    }
    for (long c = lo, run; kv->int8 && c < hi; c += run) {
        run = run_in_block(kv, piece + c, hi - c);
        const float *scales = pace_kv_scales(kv, pace_kv_at(kv, b, a->seq, piece + c, kv_head));
        scales += (piece + c) % kv->block;
        memcpy(t->k_scale + c, scales, (size_t)run * sizeof(float));
        memcpy(t->v_scale + c, scales + kv->block, (size_t)run * sizeof(float));
    }
    for (long r = 0; r < a->n; r++) {
        const long pos = a->pos0 + r / a->group;
        const long first = pace_first_seen(pos, g->window, g->chunk) - piece;
        softmax_piece(t->s[r], t->p[r], lo, hi, first < 0 ? 0 : first, pos + 1 - piece, g->scale, g->softcap,
                      kv->int8 ? t->k_scale : NULL, kv->int8 ? t->v_scale : NULL, &max[r], &sum[r]);
        if (a->in_tiles && hi % 32) memset(t->p[r] + hi, 0, 16 * sizeof(bf16));
    }
    for (long c = lo, step; c < hi; c += step) {  // O = P V
        const bf16 *v = values_at(t, kv, b, a->seq, kv_head, piece + c, hi - c, a->end, a->in_tiles, &step);
        attention_mm(a->in_tiles, a->n, d,
                     &(mm_args){.a = t->p[0] + c,
                                .lda = PACE_PIECE + 32,
                                .b = v,
                                .ldb = 2 * d,
                                .bps = 64,
                                .c = t->o,
                                .ldc = a->ld,
                                .kp = step / 2,
                                .accumulate = c > lo});
    }
}

INLINE float exp_one(float x) {
    float lanes[VL];
    v_store(lanes, v_exp(v_set(x)));
    return lanes[0];
}

// The running (max, sum, O) of row r takes in one more piece. Pieces must come in ascending order.
INLINE void attention_fold_row(attention_buf *t, const attention_tile *a, long r, const float *o, float max,
                               float sum) {
    if (sum == 0.0f) return;  // nothing visible in this piece
    const float top = t->max[r] > max ? t->max[r] : max;
    const float keep = t->sum[r] == 0.0f ? 0.0f : exp_one(t->max[r] - top), take = exp_one(max - top);
    float *sum_o = t->sum_o + r * a->ld;
    for (long e = 0; e < a->d; e += VL)
        v_store(sum_o + e, v_fma(v_load(o + e), v_set(take), v_mul(v_load(sum_o + e), v_set(keep))));
    t->sum[r] = t->sum[r] * keep + sum * take;
    t->max[r] = top;
}

INLINE void attention_clear(attention_buf *t, const attention_tile *a) {
    for (long r = 0; r < a->n; r++) {
        t->max[r] = -__builtin_inff();
        t->sum[r] = 0.0f;
        memset(t->sum_o + r * a->ld, 0, (size_t)a->d * 4);
    }
}

static void attention_store(const attention_buf *t, const pace_attention *g, const pace_rows *rows, long kv_head,
                            const attention_tile *a) {
    for (long r = 0; r < a->n; r++) {
        const long head = kv_head * a->group + r % a->group;
        float sum = t->sum[r], scale = 1.0f;
        if (g->sinks) {  // a sink is one more column with score sinks[head] and no value
            const float sink = g->sinks[head], top = t->max[r] > sink ? t->max[r] : sink;
            scale = exp_one(t->max[r] - top);
            sum = sum * scale + exp_one(sink - top);
        }
        const vf inv = v_set(scale / sum);
        bf16 *o = (bf16 *)g->dst.data + (rows->row0 + r / a->group) * g->dst.ld + head * a->d;
        for (long e = 0; e < a->d; e += VL) v_store_bf16(o + e, v_mul(v_load(t->sum_o + r * a->ld + e), inv));
    }
}

static void kernel_attention(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head,
                             void *scratch) {
    attention_buf *t = scratch;
    const attention_tile a = attention_shape(g, b, rows);
    attention_load(t, g, rows, kv_head, &a);
    attention_clear(t, &a);
    for (long piece = a.begin / PACE_PIECE * PACE_PIECE; piece < a.end; piece += PACE_PIECE) {
        float max[PACE_ATTN_ROWS], sum[PACE_ATTN_ROWS];
        attention_piece(t, g, b, kv_head, &a, piece, max, sum);
        for (long r = 0; r < a.n; r++) attention_fold_row(t, &a, r, t->o + r * a.ld, max[r], sum[r]);
    }
    attention_release(&a);
    attention_store(t, g, rows, kv_head, &a);
}

// The same in two steps, for few tiles and many threads: pieces [p0, p1) go to parts [n_pieces][n][2 + d] as
// (max, sum, O), and the fold, after a barrier, takes them in the order that kernel_attention() would have.
static void attention_part(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head, long p0,
                           long p1, float *parts, void *scratch) {
    attention_buf *t = scratch;
    const attention_tile a = attention_shape(g, b, rows);
    attention_load(t, g, rows, kv_head, &a);
    for (long i = p0; i < p1; i++) {
        float max[PACE_ATTN_ROWS], sum[PACE_ATTN_ROWS];
        attention_piece(t, g, b, kv_head, &a, (a.begin / PACE_PIECE + i) * PACE_PIECE, max, sum);
        for (long r = 0; r < a.n; r++) {
            float *part = parts + (i * a.n + r) * (a.d + 2);
            part[0] = max[r];
            part[1] = sum[r];
            memcpy(part + 2, t->o + r * a.ld, (size_t)a.d * 4);
        }
    }
    attention_release(&a);
}

static void attention_fold(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head,
                           long n_pieces, const float *parts, void *scratch) {
    attention_buf *t = scratch;
    const attention_tile a = attention_shape(g, b, rows);
    attention_clear(t, &a);
    for (long i = 0; i < n_pieces; i++)
        for (long r = 0; r < a.n; r++) {
            const float *part = parts + (i * a.n + r) * (a.d + 2);
            attention_fold_row(t, &a, r, part + 2, part[0], part[1]);
        }
    attention_store(t, g, rows, kv_head, &a);
}

#endif

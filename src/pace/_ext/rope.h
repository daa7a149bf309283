// rope.h - angles, and from q, k and v of a token to its queries and its place in the KV cache: norms of heads,
// rotation, temperature, int8. Tiny beside the products that feed it; plain vector code on simd.h serves every tier.
#ifndef PACE_ROPE_H
#define PACE_ROPE_H

#include <math.h>

#include "rowwise.h"

static void kernel_angles(const pace_angles *g, const pace_batch *b, long m0, long m1) {
    long seq = 0;
    for (long r = m0; r < m1; r++) {
        while (r >= b->q_start[seq + 1]) seq++;
        const float pos = (float)pace_position(b, seq, r);
        float *cosines = (float *)g->cos.data + r * g->cos.ld, *sines = (float *)g->sin.data + r * g->sin.ld;
        for (long i = 0; i < g->cos.width; i++) {
            const double a = (double)(pos * g->inv_freq[i]);
            cosines[i] = (float)cos(a) * g->attention_factor;
            sines[i] = (float)sin(a) * g->attention_factor;
        }
    }
}

INLINE void normalise_head(float *h, const pace_rope *g, const float *w, moments m) {
    const long n = g->norm_width ? g->norm_width : g->kv.head_dim;
    for (long i = 0; i < n; i += VL) store_left(h + i, normalised(h, w, NULL, i, n - i, g->qk_norm, m), n - i);
}

// The first 2 * half elements of a head, in place.
INLINE void rotate_head(float *h, const pace_rotation *g, long token) {
    const long half = g->half;
    const float *cos = g->cos + token * g->ld, *sin = g->sin + token * g->ld;
    if (g->interleaved) {
        for (long i = 0; i < half; i++) {
            const float a = h[2 * i], b = h[2 * i + 1];
            h[2 * i] = a * cos[i] - b * sin[i];
            h[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (long i = 0; i < half; i += VL) {
        const long left = half - i;
        vf a = load_left(h + i, left), b = load_left(h + half + i, left);
        vf c = load_left(cos + i, left), s = load_left(sin + i, left);
        vf x = v_fnma(b, s, v_mul(a, c)), y = v_fma(a, s, v_mul(b, c));
        store_left(h + i, x, left);
        store_left(h + half + i, y, left);
    }
}

// 1 where there is none.
INLINE float query_temperature(const float *t, long pos) {
    return t[0] == 0.0f ? 1.0f
                        : (float)(1.0 + (double)t[0] * log(1.0 + floor(((double)pos + (double)t[2]) / (double)t[1])));
}

// One head of q or k at x to h: norm and rotation. m: of all heads, where they have one norm together.
INLINE void turn_head(float *h, const float *x, const pace_rope *g, const float *w, const moments *m, long token) {
    const long d = g->kv.head_dim;
    memcpy(h, x, (size_t)d * 4);
    if (g->norm_after_rope && g->rope.cos) rotate_head(h, &g->rope, token);
    if (g->qk_norm != PACE_NORM_none)
        normalise_head(h, g, w,
                       m ? *m : moments_of(h, 1, 0, g->norm_width ? g->norm_width : d, g->qk_norm, g->norm_eps));
    if (!g->norm_after_rope && g->rope.cos) rotate_head(h, &g->rope, token);
}

// Stores a key and a value, [head_dim] each, at position `in` of its block. The first position of a group clears V of
// the whole group (see pace_kv_group).
INLINE void append_head(const pace_kv *kv, char *head, long in, const float *xk, const float *xv) {
    const long d = kv->head_dim, b = kv->block, clear = pace_kv_group(kv);
    if (kv->int8) {
        int8_t t[PACE_MAX_HEAD_DIM], *k = (int8_t *)head, *v = k + b * d;
        float *k_scale = pace_kv_scales(kv, head), *v_scale = k_scale + b;
        k_scale[in] = quantise_row(t, xk, d);
        for (long e = 0; e < d; e += 2) memcpy(k + e * b + in * 2, t + e, 2);
        if (in % clear == 0) {
            memset(v + in * d, 0, (size_t)(clear * d));
            memset(v_scale + in, 0, (size_t)clear * sizeof(float));
        }
        v_scale[in] = quantise_row(t, xv, d);
        int8_t *pair = v + (in / 2) * 2 * d + in % 2;
        for (long e = 0; e < d; e++) pair[2 * e] = t[e];
    } else {
        bf16 t[PACE_MAX_HEAD_DIM], *k = (bf16 *)(void *)head, *v = k + b * d;
        for (long e = 0; e < d; e += VL) v_store_bf16(t + e, v_load(xk + e));
        for (long e = 0; e < d; e += 2) memcpy(k + e * b + in * 2, t + e, 4);
        if (in % clear == 0) memset(v + in * d, 0, (size_t)(clear * d) * sizeof(bf16));
        for (long e = 0; e < d; e += VL) v_store_bf16(t + e, v_load(xv + e));
        bf16 *pair = v + (in / 2) * 2 * d + in % 2;
        for (long e = 0; e < d; e++) pair[2 * e] = t[e];
    }
}

// Moments of all heads of q or k of one token, from x on. With the norm after the rotation the heads must turn first; a
// rotation keeps a sum of squares but for rounding, and a mean it does not keep.
static moments moments_of_all(const pace_rope *g, const float *x, long n_heads, long token) {
    const long d = g->kv.head_dim, width = g->norm_width ? g->norm_width : d;
    if (!g->norm_after_rope || !g->rope.cos) return moments_of(x, n_heads, d, width, g->qk_norm, g->norm_eps);
    float h[PACE_MAX_HEAD_DIM], mean = 0.0f, squares = 0.0f;
    for (int pass = g->qk_norm == PACE_NORM_layer ? 0 : 1; pass < 2; pass++)
        for (long i = 0; i < n_heads; i++) {
            memcpy(h, x + i * d, (size_t)d * 4);
            rotate_head(h, &g->rope, token);
            if (pass == 0)
                mean += row_sum(h, width) / (float)(n_heads * width);
            else
                squares += sum_squares(h, width, mean);
        }
    return (moments){mean, 1.0f / __builtin_sqrtf(squares / (float)(n_heads * width) + g->norm_eps)};
}

// Pieces of rows and lines of K, a kilobyte or more apart, are what no prefetcher follows: the next row and the item's
// places in the cache are fetched. 512 rows of the 1B shape on two Zen 5 cores, 16 layers: 11.9 ms without, 8.1 with
// (2.4 from a warm cache, where it costs a twentieth).
INLINE void rope_fetch(const void *p, long bytes) {
    for (long i = 0; i < bytes; i += 64) FETCH((uintptr_t)p + (uintptr_t)i, _MM_HINT_T0);
}

// What row r of the source holds of one kv head.
INLINE void rope_fetch_row(const pace_rope *g, long r, long kv_head) {
    const long d = g->kv.head_dim, group = g->n_heads / g->kv.n_kv_heads;
    const float *x = (const float *)g->src.data + r * g->src.ld, *xk = x + (g->n_heads + kv_head) * d;
    rope_fetch(x + kv_head * group * d, group * d * 4);
    if (!g->append) return;
    rope_fetch(xk, d * 4);
    if (!g->k_is_v) rope_fetch(xk + g->kv.n_kv_heads * d, d * 4);
}

// The places of n tokens from position pos on, inside one block.
INLINE void rope_fetch_places(const pace_kv *kv, char *head, long in, long n) {
    const long d = kv->head_dim, size = kv->int8 ? 1 : 2;
    for (long e = 0; e < d / 2; e++) rope_fetch(head + (e * kv->block + in) * 2 * size, n * 2 * size);
    rope_fetch(head + (kv->block + in) * d * size, n * d * size);
}

// Query heads of one kv head go to dst; its k and v go to the cache at their absolute positions.
static void kernel_rope(const pace_rope *g, const pace_batch *b, const pace_rows *rows, long kv_head) {
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, group = g->n_heads / kv->n_kv_heads;
    const long own = g->norm_scope == PACE_SCOPE_head ? 0 : d;  // from the weights of a head to those of the next
    const int full = g->qk_norm != PACE_NORM_none && g->norm_scope == PACE_SCOPE_full;
    _Alignas(64) float h[PACE_MAX_HEAD_DIM], v[PACE_MAX_HEAD_DIM];
    moments m = {0.0f, 1.0f};
    const long pos0 = pace_position_of(b, rows, rows->row0);
    rope_fetch_row(g, rows->row0, kv_head);
    if (g->append)
        rope_fetch_places(kv, pace_kv_at(kv, b, rows->seq, pos0, kv_head), pos0 % kv->block, rows->row1 - rows->row0);
    for (long r = rows->row0; r < rows->row1; r++) {
        if (r + 1 < rows->row1) rope_fetch_row(g, r + 1, kv_head);
        const long pos = pace_position_of(b, rows, r), token = rows->token + r - rows->row0;
        const float *x = (const float *)g->src.data + r * g->src.ld, *xk = x + g->n_heads * d;
        if (full) m = moments_of_all(g, x, g->n_heads, token);
        const vf warm = v_set(query_temperature(g->temperature, pos));
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            turn_head(h, x + i * d, g, g->q_norm ? g->q_norm + i * own : NULL, full ? &m : NULL, token);
            bf16 *q = (bf16 *)g->dst.data + r * g->dst.ld + i * d;
            for (long e = 0; e < d; e += VL) v_store_bf16(q + e, v_mul(v_load(h + e), warm));
        }
        if (!g->append) continue;
        if (full) m = moments_of_all(g, xk, kv->n_kv_heads, token);
        turn_head(h, xk + kv_head * d, g, g->k_norm ? g->k_norm + kv_head * own : NULL, full ? &m : NULL, token);
        const float *xv = g->k_is_v ? xk + kv_head * d : xk + (kv->n_kv_heads + kv_head) * d;
        if (g->v_norm) {
            const long width = g->norm_width ? g->norm_width : d;
            const moments mv = moments_of(xv, 1, 0, width, PACE_NORM_rms, g->norm_eps);
            for (long e = 0; e < d; e += VL) v_store(v + e, v_mul(v_load(xv + e), v_set(mv.inv)));
            xv = v;
        }
        append_head(kv, pace_kv_at(kv, b, rows->seq, pos, kv_head), pos % kv->block, h, xv);
    }
}

#endif

// rowwise.h - everything that works on one row at a time: packing, embedding, norms, RoPE with the KV append,
// softmax, argmax. Memory-bound or tiny; plain vector code on simd.h serves every tier.
#ifndef PACE_ROWWISE_H
#define PACE_ROWWISE_H

#include "simd.h"

// ---- packing ----------------------------------------------------------------------------------------------

INLINE void row_to_bf16(bf16 *dst, const void *src, int dtype, long k) {
    long i = 0;
    if (dtype == 0) {
        memcpy(dst, src, (size_t)k * 2);
    } else if (dtype == 1) {
        const uint16_t *x = src;
        for (; i + VL <= k; i += VL) v_store_bf16(dst + i, v_load_f16(x + i));
        if (i < k) {
            uint16_t t[VL] = {0};
            for (long j = 0; j < VL && i + j < k; j++) t[j] = x[i + j];
            v_store_bf16_n(dst + i, v_load_f16(t), k - i);
        }
    } else {
        const float *x = src;
        for (; i + VL <= k; i += VL) v_store_bf16(dst + i, v_load(x + i));
        if (i < k) v_store_bf16_n(dst + i, v_load_n(x + i, k - i), k - i);
    }
}

#define PACK_K 256  // k handled at a time: 16 rows x 256 x 2 bytes stay in L1 between the read and the transpose

// dst: first of 16 columns inside a panel; dst[p * 64 + 2 c + i] = src[c][2 p + i].
static void pack_half(bf16 *dst, const void *src, int dtype, long ld, long rows, long k, long k_pad) {
    static const size_t size[3] = {2, 2, 4};
    _Alignas(64) bf16 t[16][PACK_K];
    for (long k0 = 0; k0 < k_pad; k0 += PACK_K) {
        const long in = k - k0 < PACK_K ? (k > k0 ? k - k0 : 0) : PACK_K;
        const long out = k_pad - k0 < PACK_K ? k_pad - k0 : PACK_K;
        for (long r = 0; r < 16; r++) {
            if (r < rows && in > 0)
                row_to_bf16(t[r], (const char *)src + (size_t)(r * ld + k0) * size[dtype], dtype, in);
            const long have = r < rows ? in : 0;
            if (have < out) memset(t[r] + have, 0, (size_t)(out - have) * 2);
        }
        for (long p = 0; p < out / 2; p += 8) {  // out is a multiple of 32: 16 rows x 8 pairs at a time
            uint32_t pair[8][16];
            for (long r = 0; r < 16; r++) {
                uint32_t x[8];
                memcpy(x, t[r] + 2 * p, 32);
                for (int i = 0; i < 8; i++) pair[i][r] = x[i];
            }
            for (int i = 0; i < 8; i++) {
#ifdef __AVX512F__
                // Past the caches: packed weights are read next by the first step, hundreds of MB later.
                _mm512_stream_si512((__m512i *)(dst + (k0 / 2 + p + i) * 64), _mm512_loadu_si512(pair[i]));
#else
                memcpy(dst + (k0 / 2 + p + i) * 64, pair[i], 64);
#endif
            }
        }
    }
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

// Packed column `row` as a contiguous f32 vector.
static void unpack_row(float *dst, const bf16 *w, long row, long k, long k_pad) {
    const bf16 *s = w + (row / PACE_NR) * k_pad * PACE_NR + (row % PACE_NR) * 2;
    for (long i = 0; i < k; i++) dst[i] = bf16_to_f32(s[(i / 2) * 2 * PACE_NR + i % 2]);
}

// The embedding table is the packed matrix itself (shared with a tied LM head): one token touches k/2 cache lines,
// 64 KB at dim 2048, against 525 MB for a second copy of a 128k vocabulary.
static void embed(float *x, const bf16 *w, long token, long k, long k_pad, float scale) {
    const bf16 *s = w + (token / PACE_NR) * k_pad * PACE_NR + (token % PACE_NR) * 2;
    for (long p = 0; p < k / 2; p++) {
        FETCH((uintptr_t)s + (uintptr_t)(p + 16) * 4 * PACE_NR, _MM_HINT_T0);
        x[2 * p] = bf16_to_f32(s[p * 2 * PACE_NR]) * scale;
        x[2 * p + 1] = bf16_to_f32(s[p * 2 * PACE_NR + 1]) * scale;
    }
    if (k % 2) x[k - 1] = bf16_to_f32(s[(k / 2) * 2 * PACE_NR]) * scale;
}

// ---- norms ------------------------------------------------------------------------------------------------

INLINE vf load_left(const float *p, long left) { return left >= VL ? v_load(p) : v_load_n(p, left); }

INLINE float sum_squares(const float *x, long n, float mean) {
    vf s0 = v_zero(), s1 = v_zero(), m = v_set(mean);
    for (long i = 0; i < n; i += 2 * VL) {
        vf a = v_sub(load_left(x + i, n - i), m);
        if (n - i < VL) a = v_keep(a, 0, n - i, 0.0f);
        s0 = v_fma(a, a, s0);
        if (n - i > VL) {
            vf b = v_sub(load_left(x + i + VL, n - i - VL), m);
            if (n - i < 2 * VL) b = v_keep(b, 0, n - i - VL, 0.0f);
            s1 = v_fma(b, b, s1);
        }
    }
    return v_sum(v_add(s0, s1));
}

INLINE float row_sum(const float *x, long n) {
    vf s = v_zero();
    for (long i = 0; i < n; i += VL) s = v_add(s, load_left(x + i, n - i));
    return v_sum(s);
}

static void norm(const pace_norm *g, long m0, long m1) {
    const long n = g->n;
    const vf one = v_set(g->kind == 1 ? 1.0f : 0.0f);
    for (long r = m0; r < m1; r++) {
        const float *x = g->x + r * g->ldx;
        const float mean = g->kind == 2 ? row_sum(x, n) / (float)n : 0.0f;
        const float inv = 1.0f / __builtin_sqrtf(sum_squares(x, n, mean) / (float)n + g->eps);
        const vf vi = v_set(inv), vm = v_set(mean);
        for (long i = 0; i < n; i += VL) {
            const long left = n - i;
            vf y = v_mul(v_sub(load_left(x + i, left), vm), vi);
            y = v_mul(y, v_add(load_left(g->weight + i, left), one));
            if (g->bias) y = v_add(y, load_left(g->bias + i, left));
            if (g->y_bf16) {
                bf16 *o = (bf16 *)g->y + r * g->ldy + i;
                if (left >= VL)
                    v_store_bf16(o, y);
                else
                    v_store_bf16_n(o, y, left);
            } else {
                float *o = (float *)g->y + r * g->ldy + i;
                if (g->add) y = v_add(load_left(o, left), y);
                if (left >= VL)
                    v_store(o, y);
                else
                    v_store_n(o, y, left);
            }
        }
    }
}

// ---- RoPE and KV append -----------------------------------------------------------------------------------

// One head in place: optional RMS norm, then rotation of the first rotary_dim elements.
INLINE void rotate_head(float *h, const pace_rope_kv *g, const float *w, long row) {
    const long d = g->kv.head_dim, half = g->rotary_dim / 2;
    if (w) {
        pace_norm n = {
            .x = h, .y = h, .weight = w, .ldx = d, .ldy = d, .m = 1, .n = d, .eps = g->norm_eps, .kind = g->norm_kind};
        norm(&n, 0, 1);
    }
    const float *cos = g->cos + row * half, *sin = g->sin + row * half;
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
        if (left >= VL) {
            v_store(h + i, x);
            v_store(h + half + i, y);
        } else {
            v_store_n(h + i, x, left);
            v_store_n(h + half + i, y, left);
        }
    }
}

// One head to int8: x / scale to the nearest integer; returns the scale, amax / 127 (see pace_kv).
INLINE float quantise_head(int8_t *q, const float *x, long d) {
    vf top = v_zero(), bad = v_zero();
    for (long e = 0; e < d; e += VL) {
        const vf v = v_load(x + e);
        top = v_max(top, v_abs(v));
        bad = v_add(bad, v_mul(v, v_zero()));  // NaN for a NaN or an infinity, else 0
    }
    const float scale = (v_hmax(top) + v_sum(bad)) / 127.0f;
    if (scale > 0.0f)
        for (long e = 0; e < d; e += VL) v_store_int8(q + e, v_div(v_load(x + e), v_set(scale)));
    else
        memset(q, 0, (size_t)d);
    return scale;
}

// Query heads of one kv head go to q; its k and v go to the cache at their absolute positions. The row at the
// first position of a group clears V of the whole group (see pace_kv_group).
static void rope_kv(const pace_rope_kv *g, const pace_rows *rows, long kv_head) {
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, b = kv->block, group = kv->n_heads / kv->n_kv_heads, clear = pace_kv_group(kv);
    const long pos_of_row0 = (long)kv->kv_len[rows->seq] - kv->q_start[rows->seq + 1];
    float h[PACE_MAX_HEAD_DIM];
    for (long r = rows->row0; r < rows->row1; r++) {
        const long pos = pos_of_row0 + r, in = pos % b;
        const float *x = g->qkv + r * g->ldx;
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            memcpy(h, x + i * d, (size_t)d * 4);
            rotate_head(h, g, g->q_norm, r);
            bf16 *q = g->q + r * g->ldq + i * d;
            for (long e = 0; e < d; e += VL) v_store_bf16(q + e, v_load(h + e));  // d is a multiple of 16
        }
        char *head = pace_kv_at(kv, rows->seq, pos, kv_head);
        memcpy(h, x + (kv->n_heads + kv_head) * d, (size_t)d * 4);
        rotate_head(h, g, g->k_norm, r);
        const float *xv = x + (kv->n_heads + kv->n_kv_heads + kv_head) * d;
        if (kv->int8) {
            int8_t t[PACE_MAX_HEAD_DIM], *k = (int8_t *)head, *v = k + b * d;
            float *k_scale = pace_kv_scales(kv, head), *v_scale = k_scale + b;
            k_scale[in] = quantise_head(t, h, d);
            for (long e = 0; e < d; e += 2) memcpy(k + e * b + in * 2, t + e, 2);
            if (in % clear == 0) {
                memset(v + in * d, 0, (size_t)(clear * d));
                memset(v_scale + in, 0, (size_t)clear * sizeof(float));
            }
            v_scale[in] = quantise_head(t, xv, d);
            int8_t *pair = v + (in / 2) * 2 * d + in % 2;
            for (long e = 0; e < d; e++) pair[2 * e] = t[e];
        } else {
            bf16 t[PACE_MAX_HEAD_DIM], *k = (bf16 *)(void *)head, *v = k + b * d;
            for (long e = 0; e < d; e += VL) v_store_bf16(t + e, v_load(h + e));
            for (long e = 0; e < d; e += 2) memcpy(k + e * b + in * 2, t + e, 4);
            if (in % clear == 0) memset(v + in * d, 0, (size_t)(clear * d) * sizeof(bf16));
            for (long e = 0; e < d; e += VL) v_store_bf16(t + e, v_load(xv + e));
            bf16 *pair = v + (in / 2) * 2 * d + in % 2;
            for (long e = 0; e < d; e++) pair[2 * e] = t[e];
        }
    }
}

// ---- rows of logits ---------------------------------------------------------------------------------------

static void softmax(float *x, long n) {
    float top = x[0];
    for (long i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    const vf m = v_set(top);
    vf s = v_zero();
    for (long i = 0; i < n; i += VL) {
        vf e = v_exp(v_sub(load_left(x + i, n - i), m));
        if (n - i < VL) {
            e = v_keep(e, 0, n - i, 0.0f);
            v_store_n(x + i, e, n - i);
        } else {
            v_store(x + i, e);
        }
        s = v_add(s, e);
    }
    const vf inv = v_set(1.0f / v_sum(s));
    for (long i = 0; i < n; i += VL) {
        if (n - i >= VL)
            v_store(x + i, v_mul(v_load(x + i), inv));
        else
            v_store_n(x + i, v_mul(v_load_n(x + i, n - i), inv), n - i);
    }
}

static long argmax(const float *x, long n) {
    float top = -__builtin_inff();
    vf t = v_set(top), sum = v_zero();
    long i = 0;
    for (; i + VL <= n; i += VL) {
        vf a = v_load(x + i);
        t = v_max(t, a);
        sum = v_add(sum, v_mul(a, v_zero()));  // NaN for a NaN (or an infinity), else 0
    }
    float s = v_sum(sum);
    top = v_hmax(t);
    for (; i < n; i++) {
        s += x[i] * 0.0f;
        top = x[i] > top ? x[i] : top;
    }
    if (s != 0.0f)  // masked logits are -inf, which is fine; a NaN is not
        for (i = 0; i < n; i++)
            if (x[i] != x[i]) return -1;
    for (i = 0; i < n; i++)
        if (x[i] == top) return i;
    return -1;
}

static void block_max(const float *x, long n, float *max) {
    for (long b = 0; b * PACE_LOGIT_BLOCK < n; b++) {
        const float *p = x + b * PACE_LOGIT_BLOCK;
        const long left = n - b * PACE_LOGIT_BLOCK, end = left < PACE_LOGIT_BLOCK ? left : PACE_LOGIT_BLOCK;
        vf t0 = v_set(-__builtin_inff()), t1 = t0, nans = v_zero();
        long i = 0;
        for (; i + 2 * VL <= end; i += 2 * VL) {
            const vf a0 = v_load(p + i), a1 = v_load(p + i + VL);
            t0 = v_max(t0, a0);
            t1 = v_max(t1, a1);
            nans = v_fma(v_add(a0, a1), v_zero(), nans);  // NaN for a NaN (or an infinity), else 0
        }
        float top = v_hmax(v_max(t0, t1));
        const int check = v_sum(nans) != 0.0f || i < end;
        for (; i < end; i++) top = p[i] > top ? p[i] : top;
        for (i = 0; check && i < end; i++)
            if (p[i] != p[i]) top = p[i];
        max[b] = top;
    }
}

// 16 lanes on every tier, folded in one order, so that a draw does not depend on the tier: a sum is used only where
// it is within rounding of u, but there it decides.
static void block_exp_sum(const float *x, long n, float max, float inv_temperature, float *sum) {
    const vf top = v_set(max), inv = v_set(inv_temperature);
    for (long b = 0; b * PACE_LOGIT_BLOCK < n; b++) {
        const float *p = x + b * PACE_LOGIT_BLOCK;
        const long left = n - b * PACE_LOGIT_BLOCK, end = left < PACE_LOGIT_BLOCK ? left : PACE_LOGIT_BLOCK;
        vf s[16 / VL];
        for (int j = 0; j < 16 / VL; j++) s[j] = v_zero();
        for (long i = 0; i < end; i += 16) {
            for (int j = 0; j < 16 / VL; j++) {
                const long at = i + j * VL;
                if (at >= end) break;
                vf e = v_exp(v_mul(v_sub(load_left(p + at, end - at), top), inv));
                if (end - at < VL) e = v_keep(e, 0, end - at, 0.0f);
                s[j] = v_add(s[j], e);
            }
        }
#if VL == 8
        s[0] = v_add(s[0], s[1]);  // as v_sum of 16 lanes begins
#endif
        sum[b] = v_sum(s[0]);
    }
}

#endif

// rowwise.h - what works on one row at a time: packing, embedding, norms, softmax, argmax. Memory-bound or tiny; plain
// vector code on simd.h serves every tier.
#ifndef PACE_ROWWISE_H
#define PACE_ROWWISE_H

#include "groups.h"
#include "mxfp4.h"
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
static void unpack_row(float *dst, const pace_matrix *w, long row) {
    if (w->layout == PACE_MXFP4) {
        mx_unpack_row(dst, w, row);
        return;
    }
    if (pace_is_grouped(w)) {
        gr_unpack(dst, w, row, 0, w->k);
        return;
    }
    const bf16 *s = (const bf16 *)w->data + (row / PACE_NR) * w->k_pad * PACE_NR + (row % PACE_NR) * 2;
    for (long i = 0; i < w->k; i++) dst[i] = bf16_to_f32(s[(i / 2) * 2 * PACE_NR + i % 2]);
}

// ---- embedding and selection ------------------------------------------------------------------------------

// Columns [k0, k0 + n) of row `row` of a matrix as f32; k0 is even.
// A tied embedding is the packed matrix of the LM head: one token touches k/2 cache lines, 64 KB at dim 2048, against
// 525 MB for a second copy of a 128k vocabulary.
static void gather(float *dst, const pace_matrix *w, long row, long k0, long n) {
    const size_t at = (size_t)row * (size_t)w->k + (size_t)k0;
    if (w->layout == PACE_PANELS) {
        const bf16 *s = (const bf16 *)w->data + (row / PACE_NR) * w->k_pad * PACE_NR + (row % PACE_NR) * 2;
        s += k0 * PACE_NR;
        for (long p = 0; p < (n + 1) / 2; p++) {
            FETCH((uintptr_t)s + (uintptr_t)(p + 16) * 4 * PACE_NR, _MM_HINT_T0);
            dst[2 * p] = bf16_to_f32(s[p * 2 * PACE_NR]);
            dst[2 * p + 1] = bf16_to_f32(s[p * 2 * PACE_NR + 1]);
        }
    } else if (pace_is_grouped(w)) {
        gr_unpack(dst, w, row, k0, n);
    } else if (w->layout == PACE_F32_ROWS) {
        memcpy(dst, (const float *)w->data + at, (size_t)n * sizeof(float));
    } else {
        const uint16_t *s = (const uint16_t *)w->data + at;
        for (long i = 0; i < n; i += VL) {
            uint16_t t[VL] = {0};  // a file's last row may end where its mapping does
            memcpy(t, s + i, (size_t)(n - i < VL ? n - i : VL) * 2);
            v_store(dst + i, w->layout == PACE_F16_ROWS ? v_load_f16(t) : v_load_bf16(t));
        }
    }
}

#define EMBED_K 256  // columns at a time

static void kernel_embed(const pace_embed *g, const pace_batch *b, long m0, long m1) {
    _Alignas(64) float x[EMBED_K + VL], y[EMBED_K + VL];
    const vf scale = v_set(g->scale), post = v_set(g->post);
    const long width = g->dst.width;
    long seq = 0;
    for (long r = m0; r < m1; r++) {
        while (r >= b->q_start[seq + 1]) seq++;
        const long at = g->offset + pace_position(b, seq, r);
        for (long k0 = 0; k0 < width; k0 += EMBED_K) {
            const long n = width - k0 < EMBED_K ? width - k0 : EMBED_K;
            if (g->weight.data) gather(x, &g->weight, b->token_ids[r], k0, n);
            if (g->positions.data) gather(y, &g->positions, at, k0, n);
            for (long i = 0; i < n; i += VL) {
                float *f = (float *)g->dst.data + r * g->dst.ld + k0 + i;
                vf v = g->weight.data ? v_mul(v_load(x + i), scale) : v_zero();
                if (g->positions.data) v = v_add(v, v_load(y + i));
                if (g->add) v = v_add(load_left(f, n - i), v);
                v = v_mul(v, post);
                if (g->dst.bf16)
                    store_bf16_left((bf16 *)g->dst.data + r * g->dst.ld + k0 + i, v, n - i);
                else
                    store_left(f, v, n - i);
            }
        }
    }
}

static void kernel_quantise(const pace_quantise *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    const long width = g->dst.width, groups = pace_slot_groups(&g->dst);
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    for (long r = m0; r < m1; r++) {
        const bf16 *src = (const bf16 *)g->src.data + r * g->src.ld;
        int8_t *row = (int8_t *)g->dst.data + r * g->dst.ld;
        for (long i = 0, at = 0; i < groups; i++) {
            const long n = g->dst.group < width - at ? g->dst.group : width - at;
            vf top = v_zero(), bad = v_zero();
            for (long e = 0; e < n; e += VL) {
                const vf x = v_load_bf16(src + at + e);
                top = v_max(top, v_abs(x));
                bad = v_add(bad, v_mul(x, v_zero()));  // NaN for a NaN or an infinity, else 0
            }
            const float scale = (v_hmax(top) + v_sum(bad)) / 127.0f;
            __m128i sums = _mm_setzero_si128();
            for (long e = 0; e < n; e += 16) {
                _Alignas(16) int8_t q[16] = {0};
                for (long l = 0; l < 16 && scale > 0.0f; l += VL)
                    v_store_int8(q + l, v_div(v_load_bf16(src + at + e + l), v_set(scale)));
                const __m128i x = _mm_load_si128((const __m128i *)q);
                // Bytes as unsigned ones, 128 more each.
                sums = _mm_add_epi64(sums, _mm_sad_epu8(_mm_xor_si128(x, _mm_set1_epi8(-128)), _mm_setzero_si128()));
                _mm_storeu_si128((__m128i *)(row + at + e), _mm_shuffle_epi8(x, order));
            }
            const int64_t sum = _mm_cvtsi128_si64(sums) + _mm_extract_epi64(sums, 1) - 128 * n;
            const int32_t beside = (int32_t)sum * -PACE_INT8_ZERO;
            memcpy(row + width + 4 * i, &scale, 4);
            memcpy(row + width + 4 * (groups + i), &beside, 4);
            at += n;
        }
    }
}

static void kernel_select(const pace_select *g, const pace_batch *b, long m0, long m1) {
    const size_t size = g->dst.bf16 ? sizeof(bf16) : sizeof(float);
    for (long r = m0; r < m1; r++)
        memcpy((char *)g->dst.data + (size_t)(r * g->dst.ld) * size,
               (const char *)g->src.data + (size_t)(b->logit_rows[r] * g->src.ld) * size, (size_t)g->dst.width * size);
}

// A load for each column, from a row that lies in L1: 2 us for 4096 (Zen 3), about a hundredth of the product behind.
static void kernel_permute(const pace_permute *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    for (long r = m0; r < m1; r++) {
        const bf16 *src = (const bf16 *)g->src.data + r * g->src.ld;
        bf16 *dst = (bf16 *)g->dst.data + r * g->dst.ld;
        for (long i = 0; i < g->dst.width; i++) dst[i] = src[g->order[i]];
    }
}

// ---- norms ------------------------------------------------------------------------------------------------

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

// What a norm subtracts and multiplies by.
typedef struct {
    float mean, inv;
} moments;

// Over the first n columns of each of `parts` parts, `ld` apart.
INLINE moments moments_of(const float *x, long parts, long ld, long n, int kind, float eps) {
    if (kind == PACE_NORM_none) return (moments){0.0f, 1.0f};
    const float count = (float)(parts * n);
    float mean = 0.0f, squares = 0.0f;
    if (kind == PACE_NORM_layer) {
        for (long p = 0; p < parts; p++) mean += row_sum(x + p * ld, n);
        mean /= count;
    }
    for (long p = 0; p < parts; p++) squares += sum_squares(x + p * ld, n, mean);
    return (moments){mean, 1.0f / __builtin_sqrtf(squares / count + eps)};
}

// Elements i .. i + VL of x, normalised.
INLINE vf normalised(const float *x, const float *weight, const float *bias, long i, long left, int kind, moments m) {
    vf y = v_mul(v_sub(load_left(x + i, left), v_set(m.mean)), v_set(m.inv));
    if (weight) y = v_mul(y, v_add(load_left(weight + i, left), v_set(kind == PACE_NORM_rms1 ? 1.0f : 0.0f)));
    return bias ? v_add(y, load_left(bias + i, left)) : y;
}

static void kernel_norm(const pace_norm *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    const long n = g->src.width / g->groups;
    const vf scale = v_set(g->scale ? *g->scale : 1.0f);
    for (long r = m0; r < m1; r++)
        for (long at = 0; at < g->src.width; at += n) {
            const float *x = (const float *)g->src.data + r * g->src.ld + at;
            const long to = r * g->dst.ld + at;
            const moments m = moments_of(x, 1, 0, n, g->kind, g->eps);
            for (long i = 0; i < n; i += VL) {
                const long left = n - i;
                vf y = normalised(x, g->weight, g->bias, i, left, g->kind, m);
                float *f = (float *)g->dst.data + to + i;
                if (g->add) y = v_add(load_left(f, left), y);
                y = v_mul(y, scale);
                if (g->dst.bf16)
                    store_bf16_left((bf16 *)g->dst.data + to + i, y, left);
                else
                    store_left(f, y, left);
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

// reference.c - every operator in plain scalar C with double accumulation: the slow truth an engine can run one
// operator on (kernels={"attention": "reference"}) to find out which kernel makes a number wrong. It reads the same
// packed weights and the same KV cache as the fast tiers and rounds only what it stores.
#include <math.h>
#include <string.h>

#include "kernels.h"

static double from_bf16(bf16 h) {
    const uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return (double)f;
}

static bf16 to_bf16(double x) {
    const float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f) return (bf16)((u >> 16) | 0x40);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static double weight_at(const bf16 *w, long n, long k, long k_pad) {
    return from_bf16(w[(n / PACE_NR) * k_pad * PACE_NR + (k / 2) * 2 * PACE_NR + (n % PACE_NR) * 2 + k % 2]);
}

static double activate(double x, int act) {
    switch (act) {
        case PACE_ACT_SILU:
            return x / (1.0 + exp(-x));
        case PACE_ACT_GELU:
            return 0.5 * x * (1.0 + erf(x * 0.70710678118654752));
        case PACE_ACT_GELU_TANH:
            return 0.5 * x * (1.0 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
        case PACE_ACT_RELU:
            return x > 0.0 ? x : 0.0;
        default:
            return x;
    }
}

static double dot_at(const pace_gemm *g, long m, long n) {
    double sum = g->bias ? (double)g->bias[n] : 0.0;
    for (long k = 0; k < g->k; k++) sum += from_bf16(g->a[m * g->lda + k]) * weight_at(g->w, n, k, g->k);
    return sum;
}

static void gemm(const pace_gemm *g, long p0, long p1, long m0, long m1, void *scratch) {
    (void)scratch;
    const int gated = g->epilogue == PACE_GATED;
    const long width = gated ? PACE_NR / 2 : PACE_NR;
    for (long m = m0; m < m1; m++)
        for (long n = p0 * width; n < p1 * width && n < g->n; n++) {
            double y;
            if (gated) {
                const long gate = n / 16 * PACE_NR + n % 16;
                y = activate(dot_at(g, m, gate), g->act) * dot_at(g, m, gate + 16);
            } else {
                y = activate(dot_at(g, m, n), g->act) * (double)g->scale;
            }
            if (g->c_bf16) {
                ((bf16 *)g->c)[m * g->ldc + n] = to_bf16(y);
            } else {
                float *c = (float *)g->c + m * g->ldc + n;
                *c = (float)(g->epilogue == PACE_ADD ? (double)*c + y : y);
            }
        }
}

static void unpack_row(float *dst, const bf16 *w, long row, long k, long k_pad) {
    for (long i = 0; i < k; i++) dst[i] = (float)weight_at(w, row, i, k_pad);
}

static void embed(float *x, const bf16 *w, long token, long k, long k_pad, float scale) {
    for (long i = 0; i < k; i++) x[i] = (float)weight_at(w, token, i, k_pad) * scale;
}

static double norm_scale(const float *x, long n, int kind, double eps, double *mean) {
    double sum = 0.0, squares = 0.0;
    for (long i = 0; i < n && kind == 2; i++) sum += (double)x[i];
    *mean = sum / (double)n;
    for (long i = 0; i < n; i++) squares += ((double)x[i] - *mean) * ((double)x[i] - *mean);
    return 1.0 / sqrt(squares / (double)n + eps);
}

static void norm(const pace_norm *g, long m0, long m1) {
    for (long m = m0; m < m1; m++) {
        const float *x = g->x + m * g->ldx;
        double mean;
        const double scale = norm_scale(x, g->n, g->kind, (double)g->eps, &mean);
        for (long i = 0; i < g->n; i++) {
            const double w = (double)g->weight[i] + (g->kind == 1 ? 1.0 : 0.0);
            const double y = ((double)x[i] - mean) * scale * w + (g->bias ? (double)g->bias[i] : 0.0);
            if (g->y_bf16)
                ((bf16 *)g->y)[m * g->ldy + i] = to_bf16(y);
            else
                ((float *)g->y)[m * g->ldy + i] = (float)(g->add ? (double)((float *)g->y)[m * g->ldy + i] + y : y);
        }
    }
}

// Norm and rotation of one head of row r into h.
static void head(double *h, const pace_rope_kv *g, const float *x, const float *w, long r) {
    const long d = g->kv.head_dim, half = g->rotary_dim / 2;
    double mean = 0.0;
    const double scale = w ? norm_scale(x, d, g->norm_kind, (double)g->norm_eps, &mean) : 1.0;
    for (long i = 0; i < d; i++) {
        h[i] = ((double)x[i] - mean) * scale;
        if (w) h[i] *= (double)w[i] + (g->norm_kind == 1 ? 1.0 : 0.0);
    }
    for (long i = 0; i < half; i++) {
        const long a = g->interleaved ? 2 * i : i, b = g->interleaved ? 2 * i + 1 : i + half;
        const double c = (double)g->cos[r * half + i], s = (double)g->sin[r * half + i], x0 = h[a], x1 = h[b];
        h[a] = x0 * c - x1 * s;
        h[b] = x1 * c + x0 * s;
    }
}

// Element e of a token's key and value, counted from the start of its block and kv head.
static long key_at(const pace_kv *kv, long pos, long e) {
    return (e / 2) * 2 * kv->block + pos % kv->block * 2 + e % 2;
}

static long value_at(const pace_kv *kv, long pos, long e) {
    const long in = pos % kv->block, d = kv->head_dim;
    return kv->block * d + (in / 2) * 2 * d + 2 * e + in % 2;
}

static double cached(const pace_kv *kv, const char *head, long at, float scale) {
    return kv->int8 ? (double)((const int8_t *)head)[at] * (double)scale
                    : from_bf16(((const bf16 *)(const void *)head)[at]);
}

// Scale of one head (see pace_kv); bf16 has none.
static float scale_of(const pace_kv *kv, const double *x) {
    double top = 0.0;
    for (long e = 0; kv->int8 && e < kv->head_dim; e++) {
        if (!isfinite((float)x[e])) return NAN;
        top = fmax(top, fabs(x[e]));
    }
    return (float)(top / 127.0);
}

static void cache(const pace_kv *kv, char *head, long at, double x, float scale) {
    if (kv->int8)
        ((int8_t *)head)[at] = scale > 0.0f ? (int8_t)rintf((float)(x / (double)scale)) : 0;
    else
        ((bf16 *)(void *)head)[at] = to_bf16(x);
}

static void rope_kv(const pace_rope_kv *g, const pace_rows *rows, long kv_head) {
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, group = kv->n_heads / kv->n_kv_heads, clear = pace_kv_group(kv);
    double h[PACE_MAX_HEAD_DIM], v[PACE_MAX_HEAD_DIM];
    for (long r = rows->row0; r < rows->row1; r++) {
        const long pos = (long)kv->kv_len[rows->seq] - kv->q_start[rows->seq + 1] + r;
        const float *x = g->qkv + r * g->ldx;
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            head(h, g, x + i * d, g->q_norm, r);
            for (long e = 0; e < d; e++) g->q[r * g->ldq + i * d + e] = to_bf16(h[e]);
        }
        head(h, g, x + (kv->n_heads + kv_head) * d, g->k_norm, r);
        for (long e = 0; e < d; e++) v[e] = (double)x[(kv->n_heads + kv->n_kv_heads + kv_head) * d + e];
        char *at = pace_kv_at(kv, rows->seq, pos, kv_head);
        const float k_scale = scale_of(kv, h), v_scale = scale_of(kv, v);
        if (pos % clear == 0) {
            const size_t size = kv->int8 ? 1 : sizeof(bf16);
            memset(at + (size_t)value_at(kv, pos, 0) * size, 0, (size_t)(clear * d) * size);
            if (kv->int8)
                memset(pace_kv_scales(kv, at) + kv->block + pos % kv->block, 0, (size_t)clear * sizeof(float));
        }
        for (long e = 0; e < d; e++) {
            cache(kv, at, key_at(kv, pos, e), h[e], k_scale);
            cache(kv, at, value_at(kv, pos, e), v[e], v_scale);
        }
        if (kv->int8) {
            pace_kv_scales(kv, at)[pos % kv->block] = k_scale;
            pace_kv_scales(kv, at)[kv->block + pos % kv->block] = v_scale;
        }
    }
}

static void attention(const pace_attention *g, const pace_rows *rows, long kv_head, void *scratch) {
    (void)scratch;
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, group = kv->n_heads / kv->n_kv_heads;
    for (long r = rows->row0; r < rows->row1; r++) {
        const long pos = (long)kv->kv_len[rows->seq] - kv->q_start[rows->seq + 1] + r;
        const long first = g->window && pos - g->window + 1 > 0 ? pos - g->window + 1 : 0;
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            double top = g->sinks ? (double)g->sinks[i] : -HUGE_VAL, sum = 0.0, o[PACE_MAX_HEAD_DIM] = {0};
            if (g->sinks) sum = 1.0;
            for (long p = first; p <= pos; p++) {  // running softmax, one position at a time
                double s = 0.0;
                char *at = pace_kv_at(kv, rows->seq, p, kv_head);
                const float *scale = kv->int8 ? pace_kv_scales(kv, at) + p % kv->block : NULL;
                const float k_scale = scale ? scale[0] : 1.0f, v_scale = scale ? scale[kv->block] : 1.0f;
                for (long e = 0; e < d; e++)
                    s += from_bf16(g->q[r * g->ldq + i * d + e]) * cached(kv, at, key_at(kv, p, e), k_scale);
                s *= (double)g->scale;
                if (g->softcap > 0.0f) s = (double)g->softcap * tanh(s / (double)g->softcap);
                const double m = s > top ? s : top, keep = exp(top - m), take = exp(s - m);
                for (long e = 0; e < d; e++) o[e] = o[e] * keep + take * cached(kv, at, value_at(kv, p, e), v_scale);
                sum = sum * keep + take;
                top = m;
            }
            for (long e = 0; e < d; e++) g->out[r * g->ldo + i * d + e] = to_bf16(o[e] / sum);
        }
    }
}

static void softmax(float *x, long n) {
    double top = (double)x[0], sum = 0.0;
    for (long i = 1; i < n; i++) top = (double)x[i] > top ? (double)x[i] : top;
    for (long i = 0; i < n; i++) sum += exp((double)x[i] - top);
    for (long i = 0; i < n; i++) x[i] = (float)(exp((double)x[i] - top) / sum);
}

static long argmax(const float *x, long n) {
    long best = 0;
    for (long i = 0; i < n; i++) {
        if (x[i] != x[i]) return -1;
        if (x[i] > x[best]) best = i;
    }
    return best;
}

extern const pace_kernels pace_kernels_reference;
const pace_kernels pace_kernels_reference = {
    .isa = "reference",
    .gemm_bf16 = gemm,
    .gemm_rows = 1,
    .unpack_row = unpack_row,
    .embed = embed,
    .norm = norm,
    .rope_kv = rope_kv,
    .attention = attention,
    .softmax = softmax,
    .argmax = argmax,
};

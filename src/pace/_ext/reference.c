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

// Element (n, k) of packed panels.
static double packed_at(const bf16 *w, long n, long k, long k_pad) {
    return from_bf16(w[(n / PACE_NR) * k_pad * PACE_NR + (k / 2) * 2 * PACE_NR + (n % PACE_NR) * 2 + k % 2]);
}

static double from_f16(uint16_t h) {
    const double magnitude = (h & 0x7fff) >= 0x7c00 ? (h & 0x3ff ? NAN : HUGE_VAL)
                             : (h & 0x7c00) == 0    ? ldexp(h & 0x3ff, -24)
                                                    : ldexp(0x400 + (h & 0x3ff), (h >> 10 & 31) - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

static double mxfp4_at(const pace_matrix *w, long n, long k) {
    static const double values[8] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
    const uint8_t *block = (const uint8_t *)w->data + n / PACE_NR * pace_panel_bytes(w) + k / 64 * (long)PACE_MX_BLOCK;
    const int code = pace_mx_code(block, n % PACE_NR, k % 64);
    const double x = ldexp(values[code & 7], block[k % 64 / PACE_MX_GROUP * PACE_NR + n % PACE_NR] - 127);
    return code & 8 ? -x : x;
}

// Element i of scales of a type.
static double scale_at(const uint8_t *p, int type, long i) {
    float f;
    uint16_t h;
    memcpy(&f, p + 4 * i * (type == PACE_SCALES_F32), 4);
    memcpy(&h, p + 2 * i, 2);
    return type == PACE_SCALES_F32 ? (double)f : type == PACE_SCALES_BF16 ? from_bf16(h) : from_f16(h);
}

static double from_e4m3(int code) {
    const int magnitude = code & 127;
    const double x = magnitude < 8 ? ldexp(magnitude, -9) : ldexp(8 + magnitude % 8, magnitude / 8 - 10);
    return code & 128 ? -x : x;
}

static double grouped_at(const pace_matrix *w, long n, long k) {
    const uint8_t *panel = (const uint8_t *)w->data + n / PACE_NR * pace_panel_bytes(w);
    const uint8_t *block = panel + k / w->group * pace_block_bytes(w), *codes = block + pace_block_head(w);
    const uint8_t *zeros = block + PACE_NR * (w->scales == PACE_SCALES_F32 ? 4 : 2);
    const long column = n % PACE_NR, in = k % w->group;
    const double scale = scale_at(block, w->scales, column);
    const int code = w->layout == PACE_INT4 ? pace_nibble_code(codes, column, in) : pace_byte_code(codes, column, in);
    if (w->layout == PACE_FP8) return from_e4m3(code) * scale;
    if (w->zeros == PACE_OFFSETS) return (double)code * scale + scale_at(zeros, w->scales, column);
    int16_t zero = w->layout == PACE_INT4 ? 8 : 128;
    if (w->zeros == PACE_ZEROS) memcpy(&zero, zeros + 2 * column, 2);
    return (double)(code - zero) * scale;
}

static double weight_at(const pace_matrix *w, long n, long k) {
    const size_t at = (size_t)n * (size_t)w->k + (size_t)k;
    switch (w->layout) {
        case PACE_BF16_ROWS:
            return from_bf16(((const bf16 *)w->data)[at]);
        case PACE_F16_ROWS:
            return from_f16(((const uint16_t *)w->data)[at]);
        case PACE_F32_ROWS:
            return (double)((const float *)w->data)[at];
        case PACE_MXFP4:
            return mxfp4_at(w, n, k);
        case PACE_INT8:
        case PACE_INT4:
        case PACE_FP8:
            return grouped_at(w, n, k);
        default:
            return packed_at(w->data, n, k, w->k_pad);
    }
}

// Where column i of an int8 row is, and where its group's scale and sum are.
static long int8_at(long i) { return i / 8 * 8 + i % 4 * 2 + i % 8 / 4; }

static double load(const pace_slot *s, long r, long i) {
    if (s->int8) {
        const int8_t *row = (const int8_t *)s->data + r * s->ld;
        float scale;
        memcpy(&scale, row + s->width + i / s->group * 4, 4);
        return (double)row[int8_at(i)] * (double)scale;
    }
    return s->bf16 ? from_bf16(((const bf16 *)s->data)[r * s->ld + i])
                   : (double)((const float *)s->data)[r * s->ld + i];
}

static void store(const pace_slot *s, long r, long i, double x) {
    if (s->bf16)
        ((bf16 *)s->data)[r * s->ld + i] = to_bf16(x);
    else
        ((float *)s->data)[r * s->ld + i] = (float)x;
}

static double activate(double x, int act) {
    switch (act) {
        case PACE_ACT_silu:
            return x / (1.0 + exp(-x));
        case PACE_ACT_gelu:
            return 0.5 * x * (1.0 + erf(x * 0.70710678118654752));
        case PACE_ACT_gelu_tanh:
            return 0.5 * x * (1.0 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
        case PACE_ACT_relu:
            return x > 0.0 ? x : 0.0;
        case PACE_ACT_relu2:
            return x > 0.0 ? x * x : 0.0;
        case PACE_ACT_quick_gelu:
            return x / (1.0 + exp(-1.702 * x));
        case PACE_ACT_sigmoid:
            return 1.0 / (1.0 + exp(-x));
        default:
            return x;
    }
}

static double dot(const pace_slot *src, long m, const pace_matrix *w, long n, double sum) {
    for (long k = 0; k < w->k; k++) sum += load(src, m, k) * weight_at(w, n, k);
    return sum;
}

static double dot_at(const pace_gemm *g, long m, long n) {
    return dot(&g->src, m, &g->weight, n, g->bias ? (double)g->bias[n] : 0.0);
}

static double product_at(const pace_gemm *g, long m, long n) {
    if (g->epilogue == PACE_EPILOGUE_gated) {
        const long gate = n / 16 * PACE_NR + n % 16;
        return activate(dot_at(g, m, gate), g->act) * dot_at(g, m, gate + 16);
    }
    const double y = (double)g->scale * activate(dot_at(g, m, n), g->act);
    if (g->epilogue == PACE_EPILOGUE_add)
        return load(&g->dst, m, n) + y * (g->other.data ? load(&g->other, m, g->at) : 1.0);
    if (g->epilogue == PACE_EPILOGUE_mul) return load(&g->other, m, g->at + n) * y;
    return g->cap > 0.0f ? (double)g->cap * tanh(y / (double)g->cap) : y;
}

static void kernel_gemm(const pace_gemm *g, long p0, long p1, long m0, long m1, void *scratch) {
    (void)scratch;
    const long width = g->epilogue == PACE_EPILOGUE_gated ? PACE_NR / 2 : PACE_NR;
    for (long m = m0; m < m1; m++)
        for (long n = p0 * width; n < p1 * width && n < g->dst.width; n++) store(&g->dst, m, n, product_at(g, m, n));
}

static double route_score(const pace_route *g, long r, long e) {
    const double l = load(&g->src, r, e);
    return g->order == PACE_ORDER_sigmoid ? 1.0 / (1.0 + exp(-l)) : l;
}

// What chooses; alone the logits do, because the sigmoids of 30 and 31 are nearly one number.
static double route_value(const pace_route *g, long r, long e) {
    if (!g->choice && g->n_groups == 1) return load(&g->src, r, e);
    return route_score(g, r, e) + (g->choice ? (double)g->choice[e] : 0.0);
}

// The sum of a group's two best.
static double group_value(const pace_route *g, long r, long group) {
    const long size = g->src.width / g->n_groups;
    double best[2] = {-HUGE_VAL, -HUGE_VAL};
    for (long e = group * size; e < (group + 1) * size; e++) {
        const double x = route_value(g, r, e);
        if (x > best[0]) {
            best[1] = best[0];
            best[0] = x;
        } else if (x > best[1])
            best[1] = x;
    }
    return best[0] + best[1];
}

static int group_counts(const pace_route *g, long r, long group) {
    const double own = group_value(g, r, group);
    long better = 0;
    for (long i = 0; i < g->n_groups; i++) {
        const double x = group_value(g, r, i);
        better += x > own || (x == own && i < group);
    }
    return better < g->top_groups;
}

static void kernel_route(const pace_route *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    for (long r = m0; r < m1; r++) {
        char counts[PACE_MAX_EXPERTS];
        double over = 0.0, sum = 0.0;
        int bad = 0;
        for (long e = 0; e < g->src.width; e++) {
            const double l = load(&g->src, r, e);
            counts[e] = (char)(g->n_groups == 1 || group_counts(g, r, e / (g->src.width / g->n_groups)));
            bad |= l != l;
            if (g->order == PACE_ORDER_softmax) over += exp(l);
        }
        float *const id = (float *)g->dst.data + r * g->dst.ld, *const weight = id + g->top_k;
        for (long i = 0; i < g->top_k; i++) {
            long best = -1;
            for (long e = 0; e < g->src.width && !bad; e++)
                if (counts[e] && (best < 0 || route_value(g, r, e) > route_value(g, r, best))) best = e;
            id[i] = (float)(bad ? i : best);
            if (!bad) counts[best] = 0;
            if (g->order == PACE_ORDER_chosen && !bad) over += exp(load(&g->src, r, best));
        }
        double w[PACE_MAX_EXPERTS];
        for (long i = 0; i < g->top_k; i++) {
            const double s = route_score(g, r, (long)id[i]);
            w[i] = bad ? NAN : g->order == PACE_ORDER_sigmoid ? s : exp(s) / over;
            sum += w[i];
        }
        for (long i = 0; i < g->top_k; i++) {
            if (g->renormalise) w[i] /= sum + (g->order == PACE_ORDER_sigmoid ? 1e-20 : 0.0);
            const double own = g->expert_scale ? (double)g->expert_scale[(long)id[i]] : 1.0;
            weight[i] = (float)(w[i] * (double)g->scale * own);
        }
    }
}

static double expert_at(const pace_experts_in *g, const pace_chosen *c, const pace_matrix *w, const float *bias, long i,
                        long n) {
    double sum = bias ? (double)bias[n] : 0.0;
    for (long k = 0; k < w->k; k++) {
        double x = load(&g->src, c->row[i], k);
        if (g->on_input) x = from_bf16(to_bf16(x * (double)c->weight[i]));
        sum += x * weight_at(w, n, k);
    }
    return sum;
}

static void kernel_experts_in(const pace_experts_in *g, const pace_chosen *c, long a, long p0, long p1, void *scratch) {
    (void)scratch;
    const pace_matrix w = pace_matrix_at(&g->weight, c->expert[a]);
    const float *bias = g->bias ? g->bias + c->expert[a] * w.n_panels * PACE_NR : NULL;
    const double limit = (double)g->limit;
    for (long i = c->start[a]; i < c->start[a + 1]; i++)
        for (long n = p0 * 16; n < p1 * 16 && n < g->dst.width; n++) {
            const long at = n / 16 * PACE_NR + n % 16;
            double gate = expert_at(g, c, &w, bias, i, at), up = expert_at(g, c, &w, bias, i, at + 16);
            if (limit > 0.0) {
                gate = gate > limit ? limit : gate;
                up = up > limit ? limit : up < -limit ? -limit : up;
                store(&g->dst, i, n, (up + 1.0) * gate / (1.0 + exp(-(double)g->alpha * gate)));
            } else
                store(&g->dst, i, n, activate(gate, g->act) * up);
        }
}

static void kernel_experts_out(const pace_experts_out *g, const pace_chosen *c, long m, long p0, long p1,
                               void *scratch) {
    (void)scratch;
    for (long n = p0 * PACE_NR; n < p1 * PACE_NR && n < g->dst.width; n++) {
        for (long r = 0; r < m && !g->add; r++) store(&g->dst, r, n, 0.0);
        for (long a = 0; a < c->n_active; a++) {
            const pace_matrix w = pace_matrix_at(&g->weight, c->expert[a]);
            const double bias = g->bias ? (double)g->bias[c->expert[a] * w.n_panels * PACE_NR + n] : 0.0;
            for (long i = c->start[a]; i < c->start[a + 1]; i++) {
                const double by = (double)g->scale * (g->weigh ? (double)c->weight[i] : 1.0);
                store(&g->dst, c->row[i], n, load(&g->dst, c->row[i], n) + by * dot(&g->src, i, &w, n, bias));
            }
        }
    }
}

static void unpack_row(float *dst, const pace_matrix *w, long row) {
    for (long i = 0; i < w->k; i++) dst[i] = (float)weight_at(w, row, i);
}

static void kernel_embed(const pace_embed *g, const pace_batch *b, long m0, long m1) {
    long seq = 0;
    for (long r = m0; r < m1; r++) {
        while (r >= b->q_start[seq + 1]) seq++;
        for (long i = 0; i < g->dst.width; i++) {
            double x = g->add ? load(&g->dst, r, i) : 0.0;
            if (g->weight.data) x += (double)g->scale * weight_at(&g->weight, b->token_ids[r], i);
            if (g->positions.data) x += weight_at(&g->positions, g->offset + pace_position(b, seq, r), i);
            store(&g->dst, r, i, (double)g->post * x);
        }
    }
}

static void kernel_select(const pace_select *g, const pace_batch *b, long m0, long m1) {
    for (long r = m0; r < m1; r++)
        for (long i = 0; i < g->dst.width; i++) store(&g->dst, r, i, load(&g->src, b->logit_rows[r], i));
}

static void kernel_quantise(const pace_quantise *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    for (long r = m0; r < m1; r++)
        for (long at = 0, group = g->dst.group; at < g->dst.width; at += group) {
            int8_t *row = (int8_t *)g->dst.data + r * g->dst.ld, *beside = row + g->dst.width + at / group * 4;
            const long end = at + group < g->dst.width ? at + group : g->dst.width;
            int32_t sum = 0;
            float top = 0.0f;
            for (long i = at; i < end; i++) {
                const float x = (float)load(&g->src, r, i);
                top = isfinite(x) && top == top ? fmaxf(top, fabsf(x)) : NAN;
            }
            const float scale = top / 127.0f;
            for (long i = at; i < end; i++) {
                const int8_t q = scale > 0.0f ? (int8_t)rintf((float)load(&g->src, r, i) / scale) : 0;
                row[int8_at(i)] = q;
                sum -= PACE_INT8_ZERO * q;
            }
            memcpy(beside, &scale, 4);
            memcpy(beside + pace_slot_groups(&g->dst) * 4, &sum, 4);
        }
}

static void kernel_permute(const pace_permute *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    for (long r = m0; r < m1; r++)
        for (long i = 0; i < g->dst.width; i++) store(&g->dst, r, i, load(&g->src, r, g->order[i]));
}

static double gain(const float *w, long i, int kind) {
    return w ? (double)w[i] + (kind == PACE_NORM_rms1 ? 1.0 : 0.0) : 1.0;
}

static void kernel_norm(const pace_norm *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    const long n = g->src.width / g->groups;
    const double s = g->scale ? (double)*g->scale : 1.0;
    for (long r = m0; r < m1; r++)
        for (long at = 0; at < g->src.width; at += n) {
            double mean = 0.0, squares = 0.0;
            for (long i = 0; i < n && g->kind == PACE_NORM_layer; i++) mean += load(&g->src, r, at + i) / (double)n;
            for (long i = 0; i < n; i++) squares += pow(load(&g->src, r, at + i) - mean, 2.0);
            const double inv = g->kind == PACE_NORM_none ? 1.0 : 1.0 / sqrt(squares / (double)n + (double)g->eps);
            for (long i = 0; i < n; i++) {
                double y = (load(&g->src, r, at + i) - mean) * inv * gain(g->weight, i, g->kind);
                if (g->bias) y += (double)g->bias[i];
                store(&g->dst, r, at + i, s * (g->add ? load(&g->dst, r, at + i) + y : y));
            }
        }
}

static void kernel_angles(const pace_angles *g, const pace_batch *b, long m0, long m1) {
    long seq = 0;
    for (long r = m0; r < m1; r++) {
        while (r >= b->q_start[seq + 1]) seq++;
        for (long i = 0; i < g->cos.width; i++) {
            const float angle = (float)pace_position(b, seq, r) * g->inv_freq[i];
            store(&g->cos, r, i, cos((double)angle) * (double)g->attention_factor);
            store(&g->sin, r, i, sin((double)angle) * (double)g->attention_factor);
        }
    }
}

static void rotate(double *h, const pace_rotation *g, long token) {
    for (long i = 0; i < g->half; i++) {
        const long a = g->interleaved ? 2 * i : i, b = g->interleaved ? 2 * i + 1 : i + g->half;
        const double c = (double)g->cos[token * g->ld + i], s = (double)g->sin[token * g->ld + i], x0 = h[a], x1 = h[b];
        h[a] = x0 * c - x1 * s;
        h[b] = x1 * c + x0 * s;
    }
}

// Head i of n_heads of q or k of row r, which begin at column `at`, into h: norm and rotation.
static void turn_head(double *h, const pace_rope *g, long at, long i, long n_heads, const float *w, long r,
                      long token) {
    const long d = g->kv.head_dim, n = g->norm_width ? g->norm_width : d;
    const int full = g->norm_scope == PACE_SCOPE_full;
    double mean = 0.0, sum = 0.0, squares = 0.0, x[PACE_MAX_HEAD_DIM];
    // A norm of all heads: their sum in the first pass, their squares in the second; then this head as it is.
    for (int pass = 0; g->qk_norm != PACE_NORM_none && pass < 2; pass++) {
        for (long j = full ? 0 : i; j < (full ? n_heads : i + 1); j++) {
            for (long e = 0; e < d; e++) x[e] = load(&g->src, r, at + j * d + e);
            if (g->norm_after_rope) rotate(x, &g->rope, token);
            for (long e = 0; e < n; e++) {
                sum += x[e];
                squares += (x[e] - mean) * (x[e] - mean);
            }
        }
        const double count = (double)((full ? n_heads : 1) * n);
        if (pass == 0) {
            mean = g->qk_norm == PACE_NORM_layer ? sum / count : 0.0;
            squares = 0.0;
        } else {
            squares /= count;
        }
    }
    for (long e = 0; e < d; e++) h[e] = load(&g->src, r, at + i * d + e);
    if (g->norm_after_rope) rotate(h, &g->rope, token);
    const float *own = w && g->norm_scope != PACE_SCOPE_head ? w + i * d : w;
    for (long e = 0; g->qk_norm != PACE_NORM_none && e < n; e++)
        h[e] = (h[e] - mean) / sqrt(squares + (double)g->norm_eps) * gain(own, e, g->qk_norm);
    if (!g->norm_after_rope) rotate(h, &g->rope, token);
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

static void append(const pace_kv *kv, char *at, long pos, const double *k, const double *v) {
    const long d = kv->head_dim, clear = pace_kv_group(kv);
    const float k_scale = scale_of(kv, k), v_scale = scale_of(kv, v);
    if (pos % clear == 0) {
        const size_t size = kv->int8 ? 1 : sizeof(bf16);
        memset(at + (size_t)value_at(kv, pos, 0) * size, 0, (size_t)(clear * d) * size);
        if (kv->int8) memset(pace_kv_scales(kv, at) + kv->block + pos % kv->block, 0, (size_t)clear * sizeof(float));
    }
    for (long e = 0; e < d; e++) {
        cache(kv, at, key_at(kv, pos, e), k[e], k_scale);
        cache(kv, at, value_at(kv, pos, e), v[e], v_scale);
    }
    if (kv->int8) {
        pace_kv_scales(kv, at)[pos % kv->block] = k_scale;
        pace_kv_scales(kv, at)[kv->block + pos % kv->block] = v_scale;
    }
}

static void kernel_rope(const pace_rope *g, const pace_batch *b, const pace_rows *rows, long kv_head) {
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, group = g->n_heads / kv->n_kv_heads, k_at = g->n_heads * d;
    const long v_at = g->k_is_v ? k_at : k_at + kv->n_kv_heads * d, n = g->norm_width ? g->norm_width : d;
    const float *t = g->temperature;
    double h[PACE_MAX_HEAD_DIM], v[PACE_MAX_HEAD_DIM];
    for (long r = rows->row0; r < rows->row1; r++) {
        const long pos = pace_position_of(b, rows, r), token = rows->token + r - rows->row0;
        const double warm =
            t[0] == 0.0f ? 1.0 : 1.0 + (double)t[0] * log(1.0 + floor(((double)pos + (double)t[2]) / (double)t[1]));
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            turn_head(h, g, 0, i, g->n_heads, g->q_norm, r, token);
            for (long e = 0; e < d; e++) store(&g->dst, r, i * d + e, warm * h[e]);
        }
        if (!g->append) continue;
        turn_head(h, g, k_at, kv_head, kv->n_kv_heads, g->k_norm, r, token);
        double squares = 0.0;
        for (long e = 0; e < d; e++) v[e] = load(&g->src, r, v_at + kv_head * d + e);
        for (long e = 0; e < n; e++) squares += v[e] * v[e];
        for (long e = 0; g->v_norm && e < n; e++) v[e] /= sqrt(squares / (double)n + (double)g->norm_eps);
        append(kv, pace_kv_at(kv, b, rows->seq, pos, kv_head), pos, h, v);
    }
}

static void kernel_attention(const pace_attention *g, const pace_batch *b, const pace_rows *rows, long kv_head,
                             void *scratch) {
    (void)scratch;
    const pace_kv *kv = &g->kv;
    const long d = kv->head_dim, group = g->n_heads / kv->n_kv_heads;
    for (long r = rows->row0; r < rows->row1; r++) {
        const long pos = pace_position_of(b, rows, r);
        for (long i = kv_head * group; i < (kv_head + 1) * group; i++) {
            double top = g->sinks ? (double)g->sinks[i] : -HUGE_VAL, sum = 0.0, o[PACE_MAX_HEAD_DIM] = {0};
            if (g->sinks) sum = 1.0;
            for (long p = pace_first_seen(pos, g->window, g->chunk); p <= pos; p++) {  // a running softmax
                double s = 0.0;
                char *at = pace_kv_at(kv, b, rows->seq, p, kv_head);
                const float *scale = kv->int8 ? pace_kv_scales(kv, at) + p % kv->block : NULL;
                const float k_scale = scale ? scale[0] : 1.0f, v_scale = scale ? scale[kv->block] : 1.0f;
                for (long e = 0; e < d; e++)
                    s += load(&g->src, r, i * d + e) * cached(kv, at, key_at(kv, p, e), k_scale);
                s *= (double)g->scale;
                if (g->softcap > 0.0f) s = (double)g->softcap * tanh(s / (double)g->softcap);
                const double m = s > top ? s : top, keep = exp(top - m), take = exp(s - m);
                for (long e = 0; e < d; e++) o[e] = o[e] * keep + take * cached(kv, at, value_at(kv, p, e), v_scale);
                sum = sum * keep + take;
                top = m;
            }
            for (long e = 0; e < d; e++) store(&g->dst, r, i * d + e, o[e] / sum);
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
#define ENTRY(op, cut) .op = kernel_##op,
    PACE_OPERATORS(ENTRY)
#undef ENTRY
        .gemm_rows = 1,
    .row_step = 64,
    .gemm_group = 4,
    .unpack_row = unpack_row,
    .softmax = softmax,
    .argmax = argmax,
};

// route.h - which experts a row takes. A thousandth of a layer's work: one row after the other, scores in vectors, the
// choice in plain code (128 experts, 8 of them: 1 us a row).
#ifndef PACE_ROUTE_H
#define PACE_ROUTE_H

#include "simd.h"

// The best of value [n] that is not taken; at least one is left.
INLINE long route_best(const float *value, const char *taken, long n) {
    long best = -1;
    for (long e = 0; e < n; e++)
        if (!taken[e] && (best < 0 || value[e] > value[best])) best = e;
    return best;
}

// Marks the experts of all groups but the best as taken.
static void route_groups(const pace_route *g, const float *value, char *taken) {
    float two_best[PACE_MAX_EXPERTS];
    char kept[PACE_MAX_EXPERTS] = {0};
    const long size = g->src.width / g->n_groups;
    for (long i = 0; i < g->n_groups; i++) {
        char used[PACE_MAX_EXPERTS] = {0};
        const float *const own = value + i * size;
        const long first = route_best(own, used, size);
        used[first] = 1;
        two_best[i] = own[first] + own[route_best(own, used, size)];
    }
    for (long i = 0; i < g->top_groups; i++) kept[route_best(two_best, kept, g->n_groups)] = 1;
    for (long e = 0; e < g->src.width; e++) taken[e] = !kept[e / size];
}

// What the chosen weigh, before scales: their scores, or their softmax over all or over themselves.
static void route_weigh(const pace_route *g, const float *logits, const float *scores, const float *id, float *weight) {
    const long n = g->src.width, k = g->top_k;
    float top = logits[0], sum = 0.0f;
    for (long e = 1; e < n; e++) top = logits[e] > top ? logits[e] : top;
    if (g->order == PACE_ORDER_softmax) {
        for (long e = 0; e < n; e += VL) {
            const vf x = v_exp(v_sub(load_left(logits + e, n - e), v_set(top)));
            sum += v_sum(n - e >= VL ? x : v_keep(x, 0, n - e, 0.0f));
        }
    }
    for (long i = 0; i < k; i += VL) {
        float x[VL] = {0};
        for (long j = 0; j < VL && i + j < k; j++) x[j] = scores[(long)id[i + j]];
        vf w = v_load(x);
        if (g->order != PACE_ORDER_sigmoid) w = v_exp(v_sub(w, v_set(top)));
        store_left(weight + i, w, k - i);
    }
    if (g->order == PACE_ORDER_chosen)
        for (long i = 0; i < k; i++) sum += weight[i];
    for (long i = 0; i < k && g->order != PACE_ORDER_sigmoid; i++) weight[i] /= sum;
}

static void kernel_route(const pace_route *g, const pace_batch *b, long m0, long m1) {
    (void)b;
    const long n = g->src.width, k = g->top_k;
    for (long r = m0; r < m1; r++) {
        const float *const logits = (const float *)g->src.data + r * g->src.ld;
        float *const id = (float *)g->dst.data + r * g->dst.ld, *const weight = id + k;
        float scores[PACE_MAX_EXPERTS], value[PACE_MAX_EXPERTS];
        char taken[PACE_MAX_EXPERTS] = {0};
        float nan = 0.0f;
        for (long e = 0; e < n; e++) nan += logits[e] == logits[e] ? 0.0f : 1.0f;
        for (long e = 0; e < n; e += VL) {
            const vf l = load_left(logits + e, n - e), s = g->order == PACE_ORDER_sigmoid ? v_sigmoid(l) : l;
            store_left(scores + e, s, n - e);
            store_left(value + e, g->choice ? v_add(s, load_left(g->choice + e, n - e)) : s, n - e);
        }
        // Without a bias the logits choose: sigmoids of 18 and 20 are the same float.
        const float *const by = g->choice || g->n_groups > 1 ? value : logits;
        if (nan > 0.0f) {
            for (long i = 0; i < k; i++) {
                id[i] = (float)i;
                weight[i] = NAN;
            }
            continue;
        }
        if (g->n_groups > 1) route_groups(g, by, taken);
        for (long i = 0; i < k; i++) {
            const long best = route_best(by, taken, n);
            taken[best] = 1;
            id[i] = (float)best;
        }
        route_weigh(g, logits, scores, id, weight);
        float sum = g->order == PACE_ORDER_sigmoid ? 1e-20f : 0.0f;
        for (long i = 0; i < k; i++) sum += weight[i];
        for (long i = 0; i < k; i++) {
            if (g->renormalise) weight[i] /= sum;
            weight[i] *= g->scale * (g->expert_scale ? g->expert_scale[(long)id[i]] : 1.0f);
        }
    }
}

#endif

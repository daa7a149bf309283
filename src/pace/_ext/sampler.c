#include "sampler.h"

#include <emmintrin.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

// Compiled for the baseline. The two passes over whole rows are the tier's: the maxima of blocks, which the LM head has
// noted where it could, and the exponentials (300 us for 128k in SSE2, 25 us in AVX-512). Everything else looks only at
// blocks that hold something large enough.

enum { BLOCK = PACE_LOGIT_BLOCK };

struct scratch {
    float *edited;           // [vocab] logits after masks, bias and penalties
    float *weight;           // [vocab] exp((logit - max) / temperature) of candidates; before that, int32 counts
    float *raw_max;          // [blocks of vocab] maxima of the logits' blocks
    float *edited_max;       // [blocks of vocab]
    float *block_sum;        // [blocks of vocab]
    const float *block_max;  // [blocks of vocab] those of the row that is looked at
    uint64_t *list;          // [vocab] candidates, see entry()
    uint64_t *spare;         // [vocab] for sorting
};

static size_t align_up(size_t n) { return (n + 63) / 64 * 64; }

static int n_blocks(int vocab) { return (vocab + BLOCK - 1) / BLOCK; }

size_t pace_sample_scratch(int vocab) {
    size_t n = (size_t)vocab;
    return 2 * align_up(n * sizeof(float)) + 2 * align_up(n * sizeof(uint64_t)) +
           3 * align_up((size_t)n_blocks(vocab) * sizeof(float));
}

static struct scratch carve(void *memory, int vocab) {
    size_t n = (size_t)vocab, floats = align_up(n * sizeof(float));
    size_t entries = align_up(n * sizeof(uint64_t));
    size_t blocks = align_up((size_t)n_blocks(vocab) * sizeof(float));
    char *p = memory;
    return (struct scratch){
        .edited = (float *)(void *)p,
        .weight = (float *)(void *)(p + floats),
        .list = (uint64_t *)(void *)(p + 2 * floats),
        .spare = (uint64_t *)(void *)(p + 2 * floats + entries),
        .raw_max = (float *)(void *)(p + 2 * floats + 2 * entries),
        .edited_max = (float *)(void *)(p + 2 * floats + 2 * entries + blocks),
        .block_sum = (float *)(void *)(p + 2 * floats + 2 * entries + 2 * blocks),
    };
}

// --- Philox4x32-10 (Salmon et al., SC 2011) ------------------------------------------------------

double pace_sample_uniform(uint64_t seed, uint64_t position, uint32_t sample_index) {
    uint32_t c[4] = {(uint32_t)position, (uint32_t)(position >> 32), sample_index, 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c[1] = (uint32_t)p1;
        c[2] = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return ((double)(c[0] >> 5) * 67108864.0 + (double)(c[1] >> 6)) / 9007199254740992.0;
}

// --- Vector passes over a row --------------------------------------------------------------------

// The maximum of the row from those of its blocks; NAN if one holds a NaN.
static float row_max(const float *block_max, int n) {
    int b = 0, blocks = n_blocks(n);
    __m128 best4 = _mm_set1_ps(-INFINITY), nans = _mm_setzero_ps();
    for (; b + 4 <= blocks; b += 4) {
        __m128 v = _mm_loadu_ps(block_max + b);
        nans = _mm_or_ps(nans, _mm_cmpunord_ps(v, v));
        best4 = _mm_max_ps(v, best4);
    }
    float lanes[4], best = -INFINITY;
    bool nan = _mm_movemask_ps(nans);
    _mm_storeu_ps(lanes, best4);
    for (int i = 0; i < 4; i++) best = lanes[i] > best ? lanes[i] : best;
    for (; b < blocks; b++) {
        nan |= isnan(block_max[b]);
        best = block_max[b] > best ? block_max[b] : best;
    }
    return nan ? NAN : best;
}

static int first_equal(const float *x, int n, float value, const float *block_max) {
    for (int b = 0; b < n_blocks(n); b++) {
        if (block_max[b] != value) continue;
        for (int i = b * BLOCK; i < n; i++)
            if (x[i] == value) return i;
    }
    return -1;
}

// exp(x) for x <= 0, within 2 ulp; 0 below -87, so that no result is a denormal.
static __m128 exp4(__m128 x) {
    __m128 live = _mm_cmpge_ps(x, _mm_set1_ps(-87.0f));
    x = _mm_max_ps(x, _mm_set1_ps(-87.0f));
    __m128i i = _mm_cvtps_epi32(_mm_mul_ps(x, _mm_set1_ps(1.44269504f)));
    __m128 k = _mm_cvtepi32_ps(i);
    // r = x - k ln 2 with ln 2 in two parts, then Cephes' minimax polynomial on |r| <= ln(2) / 2.
    __m128 r = _mm_sub_ps(x, _mm_mul_ps(k, _mm_set1_ps(0.693359375f)));
    r = _mm_sub_ps(r, _mm_mul_ps(k, _mm_set1_ps(-2.12194440e-4f)));
    __m128 p = _mm_set1_ps(1.9875691500e-4f);
    p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(1.3981999507e-3f));
    p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(8.3334519073e-3f));
    p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(4.1665795894e-2f));
    p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(1.6666665459e-1f));
    p = _mm_add_ps(_mm_mul_ps(p, r), _mm_set1_ps(5.0000001201e-1f));
    p = _mm_add_ps(_mm_mul_ps(p, _mm_mul_ps(r, r)), _mm_add_ps(r, _mm_set1_ps(1.0f)));
    __m128i scale = _mm_slli_epi32(_mm_add_epi32(i, _mm_set1_epi32(127)), 23);
    return _mm_and_ps(_mm_mul_ps(p, _mm_castsi128_ps(scale)), live);
}

static float weight_of(float x, float max, float inv_temperature) {
    return _mm_cvtss_f32(exp4(_mm_set_ss((x - max) * inv_temperature)));
}

// Sum of exp((x - max) * inv_temperature) over the row, in f64 over the blocks.
static double exp_sum(const pace_kernels *k, const float *x, int n, float max, float inv_temperature,
                      float *block_sum) {
    double sum = 0;
    k->block_exp_sum(x, n, max, inv_temperature, block_sum);
    for (int b = 0; b < n_blocks(n); b++) sum += block_sum[b];
    return sum;
}

static int count_at_least(const float *x, int n, float value, const float *block_max) {
    int total = 0;
    for (int b = 0; b < n_blocks(n); b++) {
        if (block_max[b] < value) continue;
        int end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
        for (int i = b * BLOCK; i < end; i++) total += x[i] >= value;
    }
    return total;
}

// --- Candidates, best first ----------------------------------------------------------------------

// Value and token in one integer: larger value first in ascending order of the upper half. A stable
// sort of a list made in ascending token order leaves equal values in that order.
static uint64_t entry(float value, int token) {
    uint32_t bits;
    value += 0.0f;  // -0 equals +0
    memcpy(&bits, &value, sizeof bits);
    bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
    return (uint64_t)bits << 32 | (uint32_t)token;
}

static int token_of(uint64_t e) { return (int)(uint32_t)e; }

// Stable, by the upper half. Radix, so no row of logits can make it slow.
static void sort_entries(uint64_t *list, uint64_t *spare, int n) {
    if (n <= 48) {
        for (int i = 1; i < n; i++) {
            uint64_t e = list[i];
            int j = i;
            for (; j > 0 && list[j - 1] >> 32 > e >> 32; j--) list[j] = list[j - 1];
            list[j] = e;
        }
        return;
    }
    enum { BITS = 8, SIZE = 1 << BITS, PASSES = 32 / BITS };
    int32_t count[PASSES][SIZE];
    memset(count, 0, sizeof count);
    for (int i = 0; i < n; i++)
        for (int p = 0; p < PASSES; p++) count[p][list[i] >> (32 + p * BITS) & (SIZE - 1)]++;
    uint64_t *from = list, *to = spare;
    for (int p = 0; p < PASSES; p++) {
        int shift = 32 + p * BITS;
        if (count[p][from[0] >> shift & (SIZE - 1)] == n) continue;  // all equal here
        int32_t at = 0;
        for (int d = 0; d < SIZE; d++) {
            int32_t c = count[p][d];
            count[p][d] = at;
            at += c;
        }
        for (int i = 0; i < n; i++) to[count[p][from[i] >> shift & (SIZE - 1)]++] = from[i];
        uint64_t *t = from;
        from = to;
        to = t;
    }
    if (from != list) memcpy(list, from, (size_t)n * sizeof *list);
}

// Every token with x >= bound, ascending, to s->list; returns how many.
static int gather(const float *x, int n, float bound, const struct scratch *s) {
    int found = 0;
    __m128 b4 = _mm_set1_ps(bound);
    for (int b = 0; b < n_blocks(n); b++) {
        if (s->block_max[b] < bound) continue;
        int i = b * BLOCK, end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
        for (; i + 4 <= end; i += 4) {
            int mask = _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(x + i), b4));
            for (; mask; mask &= mask - 1) {
                int t = i + __builtin_ctz((unsigned)mask);
                s->list[found++] = entry(x[t], t);
            }
        }
        for (; i < end; i++)
            if (x[i] >= bound) s->list[found++] = entry(x[i], i);
    }
    return found;
}

// The k best tokens of x, best first, in s->list; returns how many (k, or n if smaller).
static int best_k(const float *x, int n, int k, const struct scratch *s) {
    float bound = -INFINITY;
    int blocks = n_blocks(n);
    if (k < blocks) {
        // The k-th largest block maximum: k tokens are at least as large, so the k best are too.
        for (int b = 0; b < blocks; b++) s->list[b] = entry(s->block_max[b], b);
        sort_entries(s->list, s->spare, blocks);
        bound = s->block_max[token_of(s->list[k - 1])];
    }
    int found = gather(x, n, bound, s);
    sort_entries(s->list, s->spare, found);
    return found < k ? found : k;
}

// --- Log-probabilities ---------------------------------------------------------------------------

static void logprobs(const pace_kernels *k, const float *x, int n, float max, int token, int n_logprobs,
                     struct pace_sample_result *out, const struct scratch *s) {
    double log_sum = (double)max + log(exp_sum(k, x, n, max, 1.0f, s->block_sum));
    out->logprob = (float)((double)x[token] - log_sum);
    out->rank = count_at_least(x, n, x[token], s->block_max);
    if (n_logprobs > n) n_logprobs = n;
    if (n_logprobs > 0) {
        best_k(x, n, n_logprobs, s);
        for (int i = 0; i < n_logprobs; i++) {
            out->top_ids[i] = token_of(s->list[i]);
            out->top_logprobs[i] = (float)((double)x[out->top_ids[i]] - log_sum);
        }
    }
}

static int row_status(float max) {
    if (isnan(max) || max == INFINITY) return PACE_SAMPLE_NAN;
    return max == -INFINITY ? PACE_SAMPLE_EMPTY : 0;
}

int pace_logprobs_row(const pace_kernels *kernels, const float *logits, int vocab, int32_t token, int n_logprobs,
                      struct pace_sample_result *out, void *memory) {
    struct scratch s = carve(memory, vocab);
    kernels->block_max(logits, vocab, s.raw_max);
    s.block_max = s.raw_max;
    float max = row_max(s.block_max, vocab);
    int status = row_status(max);
    out->token = status ? -1 : token;
    out->rank = 0;
    out->logprob = 0.0f;
    if (!status) logprobs(kernels, logits, vocab, max, token, n_logprobs, out, &s);
    return status;
}

// --- Drawing -------------------------------------------------------------------------------------

static bool edits(const struct pace_sample_params *p) {
    return p->mask || p->n_banned > 0 || p->n_bias > 0 || p->n_allowed > 0 ||
           (p->repetition_penalty != 1.0f && p->n_prompt + p->n_output > 0) ||
           ((p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f) && p->n_output > 0);
}

// x = the row after masks, bias and penalties. A masked logit is -inf, which neither bias nor penalties move.
static void edit(float *x, const float *logits, int n, const struct pace_sample_params *p, int32_t *count) {
    if (p->n_allowed > 0) {
        for (int i = 0; i < n; i++) x[i] = -INFINITY;
        for (int i = 0; i < p->n_allowed; i++) {
            uint32_t t = (uint32_t)p->allowed[i];
            if (t < (uint32_t)n) x[t] = logits[t];
        }
    } else {
        memcpy(x, logits, (size_t)n * sizeof *logits);
    }
    for (int i = 0; p->mask && i < n; i += 32) {
        uint32_t word = p->mask[i / 32];
        if (word == UINT32_MAX) continue;
        int end = i + 32 < n ? i + 32 : n;
        for (int t = i; t < end; t++)
            if (!(word >> (t - i) & 1)) x[t] = -INFINITY;
    }
    for (int i = 0; i < p->n_banned; i++) {
        uint32_t t = (uint32_t)p->banned[i];
        if (t < (uint32_t)n) x[t] = -INFINITY;
    }
    for (int i = 0; i < p->n_bias; i++) {
        uint32_t t = (uint32_t)p->bias_ids[i];
        if (t < (uint32_t)n) x[t] += p->bias[i];
    }
    bool repetition = p->repetition_penalty != 1.0f;
    bool counts = p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
    if (!repetition && !counts) return;

    // count: bit 0: seen at all; above: occurrences in output. Only what the history names is cleared and read.
    const int32_t *history[] = {p->prompt, p->output};
    const int32_t lengths[] = {p->n_prompt, p->n_output};
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < lengths[h]; i++) {
            uint32_t t = (uint32_t)history[h][i];
            if (t < (uint32_t)n) count[t] = 0;
        }
    }
    for (int h = 0; h < 2; h++) {
        for (int i = 0; i < lengths[h]; i++) {
            uint32_t t = (uint32_t)history[h][i];
            if (t >= (uint32_t)n) continue;
            if (repetition && !(count[t] & 1))
                x[t] = x[t] > 0 ? x[t] / p->repetition_penalty : x[t] * p->repetition_penalty;
            count[t] = (count[t] | 1) + 2 * h;
        }
    }
    for (int i = 0; counts && i < p->n_output; i++) {
        uint32_t t = (uint32_t)p->output[i];
        if (t >= (uint32_t)n || count[t] < 2) continue;
        x[t] -= p->frequency_penalty * (float)(count[t] >> 1);
        x[t] -= p->presence_penalty;
        count[t] = 1;  // once per distinct token
    }
}

// A bound on x that no token of at least this weight is below; the slack of 0.1 % covers every rounding.
static float bound_of(double weight, float max, float temperature) {
    double bound = (double)max + (double)temperature * (log(weight) - 1e-3);
    return nextafterf((float)bound, -INFINITY);
}

// The weights of the n tokens in s->list; returns their sum. Those below min_weight leave the list.
static double weigh(const float *x, float max, float inv, float min_weight, int *n, const struct scratch *s) {
    double total = 0;
    int kept = 0;
    for (int i = 0; i < *n; i++) {
        int t = token_of(s->list[i]);
        float w = weight_of(x[t], max, inv);
        if (w < min_weight) continue;
        total += s->weight[t] = w;
        s->list[kept++] = s->list[i];
    }
    *n = kept;
    return total;
}

// The first entry whose cumulated weight exceeds u of the total of the first n. weight by token.
static int draw_listed(const uint64_t *list, int n, const float *weight, double u) {
    double total = 0, sum = 0;
    for (int i = 0; i < n; i++) total += weight[token_of(list[i])];
    for (int i = 0; i < n; i++) {
        sum += weight[token_of(list[i])];
        if (sum > u * total) return token_of(list[i]);
    }
    return token_of(list[0]);  // u * total rounded up to total
}

// The same over the whole vocabulary in token order: first the block, then the token in it.
static int draw_any(const pace_kernels *k, const float *x, int n, float max, float inv, double u,
                    const struct scratch *s) {
    double total = exp_sum(k, x, n, max, inv, s->block_sum), sum = 0;
    int last = 0;
    for (int b = 0; b < n_blocks(n); b++) {
        if (sum + (double)s->block_sum[b] <= u * total) {
            sum += (double)s->block_sum[b];
            continue;
        }
        int end = (b + 1) * BLOCK < n ? (b + 1) * BLOCK : n;
        for (int i = b * BLOCK; i < end; i++) {
            float w = weight_of(x[i], max, inv);
            if (w == 0.0f) continue;
            last = i;
            sum += (double)w;
            if (sum > u * total) return i;
        }
    }
    return last;  // the block's sum and the sum of its tokens differ by rounding
}

static int draw(const pace_kernels *k, const float *x, int n, float max, const struct pace_sample_params *p,
                const struct scratch *s) {
    double u = pace_sample_uniform(p->seed, p->position, p->sample_index);
    float inv = 1.0f / p->temperature;
    bool top_k = p->top_k > 0 && p->top_k < n, top_p = p->top_p<1.0f, min_p = p->min_p> 0.0f;
    int kept;
    double total;
    if (top_k) {
        kept = best_k(x, n, p->top_k, s);
        total = weigh(x, max, inv, p->min_p, &kept, s);
    } else if (min_p) {
        kept = gather(x, n, bound_of(p->min_p, max, p->temperature), s);
        total = weigh(x, max, inv, p->min_p, &kept, s);
        if (!top_p) return draw_listed(s->list, kept, s->weight, u);  // in token order
        sort_entries(s->list, s->spare, kept);
    } else if (top_p) {
        total = exp_sum(k, x, n, max, inv, s->block_sum);
        // A token inside the nucleus has more than 1 - p below or at it, hence more than the n-th part of that itself:
        // the others need not be sorted. Mostly far fewer tokens suffice, so larger bounds are tried first.
        double floor = (1.0 - (double)p->top_p) * total / n, bound = 1.0 / 64, mass;
        do {
            bound = bound > floor ? bound : floor;
            kept = gather(x, n, bound_of(bound, max, p->temperature), s);
            mass = weigh(x, max, inv, 0.0f, &kept, s);
            if (bound == floor) break;
            bound /= 8;
        } while (mass < (double)p->top_p * total * (1 + 1e-6));
        sort_entries(s->list, s->spare, kept);
    } else {
        return draw_any(k, x, n, max, inv, u, s);
    }
    int nucleus = kept;
    if (top_p) {  // the smallest set of best tokens that reaches p; at least 1
        double sum = 0;
        for (nucleus = 0; nucleus < kept && (nucleus == 0 || sum < (double)p->top_p * total); nucleus++)
            sum += (double)s->weight[token_of(s->list[nucleus])];
    }
    return draw_listed(s->list, nucleus, s->weight, u);
}

int pace_sample_row(const pace_kernels *kernels, const float *logits, const float *block_max, int vocab,
                    const struct pace_sample_params *p, struct pace_sample_result *out, void *memory) {
    struct scratch s = carve(memory, vocab);
    out->token = -1;
    out->rank = 0;
    out->logprob = 0.0f;
    if (!block_max) {
        kernels->block_max(logits, vocab, s.raw_max);
        block_max = s.raw_max;
    }
    s.block_max = block_max;
    float raw_max = row_max(block_max, vocab);
    int status = row_status(raw_max);
    if (status) return status;

    const float *x = logits;
    float max = raw_max;
    if (edits(p)) {
        edit(s.edited, logits, vocab, p, (int32_t *)(void *)s.weight);
        kernels->block_max(s.edited, vocab, s.edited_max);
        x = s.edited;
        s.block_max = s.edited_max;
        max = row_max(s.block_max, vocab);
        status = row_status(max);
        if (status) return status;
    }
    int token = p->temperature == 0.0f ? first_equal(x, vocab, max, s.block_max) : draw(kernels, x, vocab, max, p, &s);
    if (p->n_logprobs >= 0) {
        s.block_max = block_max;
        logprobs(kernels, logits, vocab, raw_max, token, p->n_logprobs, out, &s);
    }
    out->token = token;
    return 0;
}

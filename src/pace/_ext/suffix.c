#include "suffix.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// States and edges are numbered from 1; state ROOT is the empty context, and 0 is none.
enum { NONE = 0, ROOT = 1 };

typedef struct {
    int32_t length;    // of its longest context
    int32_t link;      // state of the longest suffix of its contexts that is not its own; NONE for ROOT
    int32_t followed;  // how often a token came behind it: the sum of its edges' counts
    int32_t best;      // its edge of the largest count, the latest among equals; NONE before any
    int32_t edges;     // its first edge
} state;

typedef struct {
    int32_t from, token, to;
    int32_t count;  // how often `token` came behind `from`; exact where `from` has a context of at most the order
    int32_t next;   // of the same state
} edge;

struct pace_suffix {
    state *states;
    edge *edges;
    int32_t *slots;  // [1 << bits] numbers of edges by (from, token), open addressing, at most half full
    long n_states, n_edges, max_states, max_edges, n_tokens;
    int bits;
    uint64_t seed;
    int32_t last;  // state of the whole text
    int32_t here;  // state of its last `depth` tokens
    int32_t depth;
    int32_t recent[PACE_SUFFIX_ORDER];  // the last tokens, the latest at the end
};

// --- Edges by state and token ---------------------------------------------------------------------

static uint64_t first_slot(const pace_suffix *a, int32_t from, int32_t token) {
    uint64_t h = ((uint64_t)(uint32_t)from << 32 | (uint32_t)token) ^ a->seed;
    h = (h ^ h >> 33) *
        0xff51afd7ed558ccdu;  // MurmurHash3's finaliser: every bit of the key moves every bit of the slot
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53u;
    return h >> (64 - a->bits);
}

static int32_t find(const pace_suffix *a, int32_t from, int32_t token) {
    const uint64_t mask = ((uint64_t)1 << a->bits) - 1;
    for (uint64_t i = first_slot(a, from, token);; i = (i + 1) & mask) {
        const int32_t e = a->slots[i];
        if (e == NONE || (a->edges[e].from == from && a->edges[e].token == token)) return e;
    }
}

static void enter(pace_suffix *a, int32_t e) {
    const uint64_t mask = ((uint64_t)1 << a->bits) - 1;
    uint64_t i = first_slot(a, a->edges[e].from, a->edges[e].token);
    while (a->slots[i] != NONE) i = (i + 1) & mask;
    a->slots[i] = e;
}

static bool grow_edges(pace_suffix *a) {
    const long max = 2 * a->max_edges;
    edge *edges = realloc(a->edges, (size_t)max * sizeof *edges);
    if (!edges) return false;
    a->edges = edges;
    int32_t *slots = calloc((size_t)2 << a->bits, sizeof *slots);
    if (!slots) return false;
    free(a->slots);
    a->slots = slots;
    a->max_edges = max;
    a->bits++;
    for (int32_t e = 1; e <= a->n_edges; e++) enter(a, e);
    return true;
}

// Its number, or NONE: out of memory.
static int32_t new_edge(pace_suffix *a, int32_t from, int32_t token, int32_t to, int32_t count) {
    if (a->n_edges + 1 >= a->max_edges && !grow_edges(a)) return NONE;
    const int32_t e = (int32_t)++a->n_edges;
    a->edges[e] = (edge){from, token, to, count, a->states[from].edges};
    a->states[from].edges = e;
    enter(a, e);
    return e;
}

static int32_t new_state(pace_suffix *a, int32_t length) {
    if (a->n_states + 1 >= a->max_states) {
        const long max = 2 * a->max_states;
        state *states = realloc(a->states, (size_t)max * sizeof *states);
        if (!states) return NONE;
        a->states = states;
        a->max_states = max;
    }
    a->states[++a->n_states] = (state){.length = length, .link = ROOT};
    return (int32_t)a->n_states;
}

// --- Growth (Blumer et al. 1985) ------------------------------------------------------------------

// p's edge of `token` leads to q, which has longer contexts than that: those that end in p's get a state of their own.
static int32_t split(pace_suffix *a, int32_t p, int32_t token, int32_t q) {
    const int32_t c = new_state(a, a->states[p].length + 1);
    if (c == NONE) return NONE;
    a->states[c].link = a->states[q].link;
    a->states[c].followed = a->states[q].followed;
    for (int32_t e = a->states[q].edges; e != NONE; e = a->edges[e].next) {
        const int32_t copy = new_edge(a, c, a->edges[e].token, a->edges[e].to, a->edges[e].count);
        if (copy == NONE) return NONE;
        if (e == a->states[q].best) a->states[c].best = copy;
    }
    a->states[q].link = c;
    for (; p != NONE; p = a->states[p].link) {
        const int32_t e = find(a, p, token);
        if (a->edges[e].to != q) break;
        a->edges[e].to = c;
    }
    return c;
}

static bool extend(pace_suffix *a, int32_t token) {
    const int32_t whole = new_state(a, a->states[a->last].length + 1);
    int32_t p = a->last, e = NONE;
    if (whole == NONE) return false;
    for (; p != NONE && (e = find(a, p, token)) == NONE; p = a->states[p].link)
        if (new_edge(a, p, token, whole, 0) == NONE) return false;
    if (p != NONE) {
        const int32_t q = a->edges[e].to;
        const bool exact = a->states[q].length == a->states[p].length + 1;
        const int32_t link = exact ? q : split(a, p, token, q);
        if (link == NONE) return false;
        a->states[whole].link = link;
    }
    a->last = whole;
    return true;
}

// The state that has the last `depth` tokens of a context of s's.
static int32_t holder(const pace_suffix *a, int32_t s, int32_t depth) {
    while (s != ROOT && a->states[a->states[s].link].length >= depth) s = a->states[s].link;
    return s;
}

// `token` came behind every context that ends here.
static void count(pace_suffix *a, int32_t token) {
    a->here = holder(a, a->here, a->depth);  // it may have been split
    int32_t next = NONE;
    for (int32_t s = a->here; s != NONE; s = a->states[s].link) {
        const int32_t e = find(a, s, token), best = a->states[s].best;
        if (next == NONE) next = a->edges[e].to;
        a->states[s].followed++;
        if (++a->edges[e].count >= (best == NONE ? 0 : a->edges[best].count)) a->states[s].best = e;
    }
    if (a->depth < PACE_SUFFIX_ORDER) a->depth++;
    a->here = holder(a, next, a->depth);
}

static void remember(pace_suffix *a, const int32_t *tokens, long n) {
    const long fresh = n < PACE_SUFFIX_ORDER ? n : PACE_SUFFIX_ORDER, kept = PACE_SUFFIX_ORDER - fresh;
    memmove(a->recent, a->recent + fresh, (size_t)kept * sizeof *tokens);
    memcpy(a->recent + kept, tokens + n - fresh, (size_t)fresh * sizeof *tokens);
}

int pace_suffix_add(pace_suffix *a, const int32_t *tokens, long n) {
    if (n > PACE_SUFFIX_MAX_TOKENS - a->n_tokens) return EOVERFLOW;
    remember(a, tokens, n);
    for (long i = 0; i < n; i++) {
        if (!extend(a, tokens[i])) return ENOMEM;
        count(a, tokens[i]);
        a->n_tokens++;
    }
    return 0;
}

pace_suffix *pace_suffix_new(uint64_t seed) {
    pace_suffix *a = calloc(1, sizeof *a);
    if (!a) return NULL;
    *a = (pace_suffix){.max_states = 64, .max_edges = 64, .bits = 7, .seed = seed, .last = ROOT, .here = ROOT};
    a->states = malloc((size_t)a->max_states * sizeof *a->states);
    a->edges = malloc((size_t)a->max_edges * sizeof *a->edges);
    a->slots = calloc((size_t)1 << a->bits, sizeof *a->slots);
    if (!a->states || !a->edges || !a->slots) {
        pace_suffix_free(a);
        return NULL;
    }
    a->states[ROOT] = (state){.link = NONE};
    a->n_states = 1;
    return a;
}

void pace_suffix_free(pace_suffix *a) {
    if (!a) return;
    free(a->states);
    free(a->edges);
    free(a->slots);
    free(a);
}

size_t pace_suffix_bytes(const pace_suffix *a) {
    return sizeof *a + (size_t)a->max_states * sizeof *a->states + (size_t)a->max_edges * sizeof *a->edges +
           (sizeof *a->slots << a->bits);
}

long pace_suffix_tokens(const pace_suffix *a) { return a->n_tokens; }

long pace_suffix_recent(const pace_suffix *a, const int32_t **tokens) {
    const long n = a->n_tokens < PACE_SUFFIX_ORDER ? a->n_tokens : PACE_SUFFIX_ORDER;
    *tokens = a->recent + PACE_SUFFIX_ORDER - n;
    return n;
}

// --- Guesses --------------------------------------------------------------------------------------

// One token after the other behind `depth` tokens of s's context; a context that ends the text goes on as its longest
// suffix that was followed by something, so what repeats is guessed on beyond its end. It ends early where it can't
// promise more than `beat` any more: each further token adds `all` at most.
static pace_suffix_guess follow(const pace_suffix *a, int32_t s, int32_t depth, int min_match, long max_tokens,
                                float least, float beat, int32_t *tokens, float *confidence) {
    pace_suffix_guess guess = {.match = depth};
    float all = 1;
    while (guess.n < max_tokens && guess.expected + all * (float)(max_tokens - guess.n) > beat) {
        while (s != NONE && a->states[s].best == NONE) {
            s = a->states[s].link;
            depth = s == NONE ? 0 : a->states[s].length;
        }
        if (s == NONE || depth < min_match) break;
        const edge *e = &a->edges[a->states[s].best];
        if (e->token == PACE_SUFFIX_BREAK) break;
        const float share = (float)e->count / ((float)a->states[s].followed + 1 / (float)depth);
        all *= share;
        if (all < least) break;
        guess.expected += all;
        tokens[guess.n] = e->token;
        confidence[guess.n++] = share;
        if (depth < PACE_SUFFIX_ORDER) depth++;
        s = holder(a, e->to, depth);
    }
    return guess;
}

// The state of the longest suffix of `context` that is in the text, and its length.
static int32_t walk(const pace_suffix *a, const int32_t *context, long n, int32_t *depth) {
    int32_t s = ROOT;
    *depth = 0;
    for (long i = 0; i < n; i++) {
        int32_t e;
        while ((e = find(a, s, context[i])) == NONE && s != ROOT) {
            s = a->states[s].link;
            *depth = a->states[s].length;
        }
        if (e == NONE) continue;
        ++*depth;
        s = holder(a, a->edges[e].to, *depth);
    }
    return s;
}

// Few contexts are known by more than some tokens, and in a large text each token that is looked up costs several cache
// misses: so the last 2 are tried first, and twice as many while all are known. Of 200k tokens of source code that have
// left the L2 cache a guess costs 2.3 to 3.9 us so, and 6.8 to 8 when all 32 are looked up (a Granite Rapids core).
static int32_t locate(const pace_suffix *a, const int32_t *context, long n, int32_t *depth) {
    const long most = n < PACE_SUFFIX_ORDER ? n : PACE_SUFFIX_ORDER;
    for (long tried = 2;; tried *= 2) {
        const long m = tried < most ? tried : most;
        const int32_t s = walk(a, context + n - m, m, depth);
        if (m == most || *depth < m) return s;
    }
}

pace_suffix_guess pace_suffix_propose(const pace_suffix *a, const int32_t *context, long n_context, int min_match,
                                      long max_tokens, float least, int32_t *tokens, float *confidence) {
    int32_t s = a->here, depth = a->depth;
    pace_suffix_guess best = {0};
    if (context) s = locate(a, context, n_context, &depth);
    int32_t at = NONE, at_depth = 0;
    for (; s != NONE && depth >= min_match; s = a->states[s].link, depth = s == NONE ? 0 : a->states[s].length) {
        if (a->states[s].best == NONE) continue;
        const pace_suffix_guess guess =
            follow(a, s, depth, min_match, max_tokens, least, best.expected, tokens, confidence);
        if (guess.expected > best.expected) best = guess, at = s, at_depth = depth;
    }
    return at == NONE ? best : follow(a, at, at_depth, min_match, max_tokens, least, 0, tokens, confidence);
}

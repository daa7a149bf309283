#include "suffix.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

// States and edges are numbered from 1; state ROOT is the empty context, and 0 is none.
enum { NONE = 0, ROOT = 1 };

// Half a cache line. A guess reads one state for each of its tokens, and each is a cache miss in a large text: so what
// is read of the link and of the best edge stands here, too. (With these looked up where they belong, a guess in a
// text of 400 000 tokens took 0.9 instead of 0.5 us of a Zen 3 whose L2 cache had been emptied.)
typedef struct {
    int32_t length;      // of its longest context
    int32_t link;        // state of the longest suffix of its contexts that is not its own; NONE for ROOT
    int32_t cut;         // length of that suffix: its own contexts are longer
    int32_t edges;       // its first edge
    int32_t followed;    // how often a token came behind it: the sum of its edges' counts
    int32_t best_count;  // of its edges the largest count; 0 before any
    int32_t best_token;  // of the edge that has it, the latest among equals
    int32_t best_to;     // where that leads
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
    uint64_t version;  // no automaton, and none with other tokens, has the same
    int32_t last;      // state of the whole text
    int32_t here;      // state of its last `depth` tokens
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
        const long max = a->max_states + a->max_states / 4;  // not twice: they are most of the memory
        state *states = realloc(a->states, (size_t)max * sizeof *states);
        if (!states) return NONE;
        a->states = states;
        a->max_states = max;
    }
    a->states[++a->n_states] = (state){.length = length, .link = ROOT};
    return (int32_t)a->n_states;
}

static void set_link(pace_suffix *a, int32_t s, int32_t link) {
    a->states[s].link = link;
    a->states[s].cut = a->states[link].length;
}

// --- Growth (Blumer et al. 1985) ------------------------------------------------------------------

// p's edge of `token` leads to q, which has longer contexts than that: those that end in p's get a state of their own.
static int32_t split(pace_suffix *a, int32_t p, int32_t token, int32_t q) {
    const int32_t c = new_state(a, a->states[p].length + 1);
    if (c == NONE) return NONE;
    const int32_t length = a->states[c].length;
    a->states[c] = a->states[q];
    a->states[c].length = length;
    a->states[c].edges = NONE;
    for (int32_t e = a->states[q].edges; e != NONE; e = a->edges[e].next)
        if (new_edge(a, c, a->edges[e].token, a->edges[e].to, a->edges[e].count) == NONE) return NONE;
    set_link(a, q, c);
    for (; p != NONE; p = a->states[p].link) {
        const int32_t e = find(a, p, token);
        if (a->edges[e].to != q) break;
        a->edges[e].to = c;
        if (a->states[p].best_token == token) a->states[p].best_to = c;
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
        set_link(a, whole, link);
    }
    a->last = whole;
    return true;
}

// The state that has the last `depth` tokens of a context of s's.
static int32_t holder(const pace_suffix *a, int32_t s, int32_t depth) {
    while (a->states[s].cut >= depth && s != ROOT) s = a->states[s].link;
    return s;
}

// `token` came behind every context that ends here.
static void count(pace_suffix *a, int32_t token) {
    a->here = holder(a, a->here, a->depth);  // it may have been split
    int32_t next = NONE;
    for (int32_t s = a->here; s != NONE; s = a->states[s].link) {
        edge *e = &a->edges[find(a, s, token)];
        state *at = &a->states[s];
        if (next == NONE) next = e->to;
        at->followed++;
        if (++e->count >= at->best_count) at->best_count = e->count, at->best_token = token, at->best_to = e->to;
    }
    if (a->depth < PACE_SUFFIX_ORDER) a->depth++;
    a->here = holder(a, next, a->depth);
}

static uint64_t next_version(void) {
    static _Atomic uint64_t last;
    return ++last;
}

static void remember(pace_suffix *a, const int32_t *tokens, long n) {
    const long fresh = n < PACE_SUFFIX_ORDER ? n : PACE_SUFFIX_ORDER, kept = PACE_SUFFIX_ORDER - fresh;
    memmove(a->recent, a->recent + fresh, (size_t)kept * sizeof *tokens);
    memcpy(a->recent + kept, tokens + n - fresh, (size_t)fresh * sizeof *tokens);
}

int pace_suffix_add(pace_suffix *a, const int32_t *tokens, long n) {
    if (n > PACE_SUFFIX_MAX_TOKENS - a->n_tokens) return EOVERFLOW;
    remember(a, tokens, n);
    a->version = next_version();
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
    *a = (pace_suffix){.max_states = 64,
                       .max_edges = 64,
                       .bits = 7,
                       .seed = seed,
                       .version = next_version(),
                       .last = ROOT,
                       .here = ROOT};
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

// --- Places ---------------------------------------------------------------------------------------

// On from the longest suffix of a text that is known to that of the text with tokens [n] behind it.
static void walk(const pace_suffix *a, const int32_t *tokens, long n, pace_suffix_place *place) {
    int32_t s = place->state, depth = place->depth;
    for (long i = 0; i < n; i++) {
        int32_t e;
        while ((e = find(a, s, tokens[i])) == NONE && s != ROOT) {
            depth = a->states[s].cut;
            s = a->states[s].link;
        }
        if (e == NONE) continue;
        if (depth < PACE_SUFFIX_ORDER) depth++;
        s = holder(a, a->edges[e].to, depth);
    }
    place->state = s;
    place->depth = depth;
}

pace_suffix_place pace_suffix_end(const pace_suffix *a) {
    return (pace_suffix_place){a->version, a->n_tokens, a->here, a->depth};
}

pace_suffix_place pace_suffix_locate(const pace_suffix *a, const int32_t *context, long n) {
    pace_suffix_place place = {a->version, n, ROOT, 0};
    const long known = n < PACE_SUFFIX_ORDER ? n : PACE_SUFFIX_ORDER;
    walk(a, context + n - known, known, &place);
    return place;
}

void pace_suffix_follow(const pace_suffix *a, const pace_suffix *text, pace_suffix_place *place) {
    const int32_t *end = text->recent + PACE_SUFFIX_ORDER;
    const long kept = text->n_tokens < PACE_SUFFIX_ORDER ? text->n_tokens : PACE_SUFFIX_ORDER;
    const long fresh = text->n_tokens - place->at;
    if (place->version != a->version || fresh > kept) {
        *place = pace_suffix_locate(a, end - kept, kept);
    } else {
        walk(a, end - fresh, fresh, place);
    }
    place->at = text->n_tokens;
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
        while (s != NONE && a->states[s].best_count == 0) {
            depth = a->states[s].cut;
            s = a->states[s].link;
        }
        if (s == NONE || depth < min_match) break;
        const state *at = &a->states[s];
        if (at->best_token == PACE_SUFFIX_BREAK) break;
        const float share = (float)at->best_count / ((float)at->followed + 1 / (float)depth);
        all *= share;
        if (all < least) break;
        guess.expected += all;
        tokens[guess.n] = at->best_token;
        confidence[guess.n++] = share;
        if (depth < PACE_SUFFIX_ORDER) depth++;
        s = holder(a, at->best_to, depth);
    }
    return guess;
}

pace_suffix_guess pace_suffix_propose(const pace_suffix *a, pace_suffix_place place, int min_match, long max_tokens,
                                      float least, int32_t *tokens, float *confidence) {
    int32_t s = place.state, depth = place.depth;
    pace_suffix_guess best = {0};
    int32_t at = NONE, at_depth = 0;
    for (; s != NONE && depth >= min_match; depth = a->states[s].cut, s = a->states[s].link) {
        if (a->states[s].best_count == 0) continue;
        const pace_suffix_guess guess =
            follow(a, s, depth, min_match, max_tokens, least, best.expected, tokens, confidence);
        if (guess.expected > best.expected) best = guess, at = s, at_depth = depth;
    }
    return at == NONE ? best : follow(a, at, at_depth, min_match, max_tokens, least, 0, tokens, confidence);
}

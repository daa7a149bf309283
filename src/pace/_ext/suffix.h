// A text as a suffix automaton that counts: for every context of at most PACE_SUFFIX_ORDER tokens, how often each token
// followed it, exactly, and which one did most often. It grows by a token in amortised O(1) plus one count for each
// distinct context that ends there (at most the order; about 6 in source code).
//
// A state stands for all contexts that occur at the same places; its link leads to the longest shorter suffix that
// occurs elsewhere, too. So the states from `here` along the links are the contexts of the next token, longest first.
//
// A token costs at most 2 states and 3 edges: 148 bytes, about 110 in text, and up to 250 while arrays have room.
#ifndef PACE_SUFFIX_H
#define PACE_SUFFIX_H

#include <stddef.h>
#include <stdint.h>

enum {
    PACE_SUFFIX_ORDER = 32,  // longest context; what a longer one would tell apart is rare: see suffix.c
    PACE_SUFFIX_BREAK = -1,  // a token that ends a text within the stream: it is never guessed, nor what follows it
    PACE_SUFFIX_MAX_TOKENS = 1 << 28,  // of one automaton: states, edges and counts are int32
};

typedef struct pace_suffix pace_suffix;

// What probably follows.
typedef struct {
    long n;          // tokens
    int match;       // length of the context that they follow from, in tokens
    float expected;  // how many of them will be right: the sum over i of the product of confidence[0 .. i]
} pace_suffix_guess;

// seed: of the hash table, so that nobody can choose tokens that collide; no result depends on it. NULL: out of memory.
pace_suffix *pace_suffix_new(uint64_t seed);
void pace_suffix_free(pace_suffix *a);  // NULL is allowed
size_t pace_suffix_bytes(const pace_suffix *a);
long pace_suffix_tokens(const pace_suffix *a);

// Appends tokens [n]. Returns 0; EOVERFLOW and nothing is added: more than PACE_SUFFIX_MAX_TOKENS in all; ENOMEM: the
// automaton may only be freed.
int pace_suffix_add(pace_suffix *a, const int32_t *tokens, long n);

// Where a text stands in an automaton: at its longest suffix, of PACE_SUFFIX_ORDER tokens at most, that is in there.
typedef struct {
    uint64_t version;  // of the automaton
    long at;           // tokens of the text
    int32_t state, depth;
} pace_suffix_place;

pace_suffix_place pace_suffix_end(const pace_suffix *a);                                     // of its own text
pace_suffix_place pace_suffix_locate(const pace_suffix *a, const int32_t *context, long n);  // of context [n]

// Moves the place of `text` in `a` to its end; a place of zeros is nowhere yet. What is new of the text is looked up,
// or, where `a` has grown since, its last PACE_SUFFIX_ORDER tokens: each costs several cache misses in a large
// automaton.
void pace_suffix_follow(const pace_suffix *a, const pace_suffix *text, pace_suffix_place *place);

// Guesses up to max_tokens tokens behind a place that is of this version.
//
// Of the contexts of at least min_match (>= 1) tokens, the one whose guess has the largest `expected`. Each token is
// the most frequent one behind what precedes it, the latest among equals; confidence[i] is its share of all that
// followed, where a context of L tokens counts as if it had also been followed 1 / L times by something else. The guess
// ends before a token that is right, with all before it, with a probability below `least`.
pace_suffix_guess pace_suffix_propose(const pace_suffix *a, pace_suffix_place place, int min_match, long max_tokens,
                                      float least, int32_t *tokens, float *confidence);

#endif

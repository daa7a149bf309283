// A text as a suffix automaton that counts: for every context of at most PACE_SUFFIX_ORDER tokens, how often each token
// followed it, exactly, and which one did most often. It grows by a token in amortised O(1) plus one count for each
// distinct context that ends there (at most the order; about 6 in source code).
//
// A state stands for all contexts that occur at the same places; its link leads to the longest shorter suffix that
// occurs elsewhere, too. So the states from `here` along the links are the contexts of the next token, longest first.
//
// A token costs at most 2 states and 3 edges: 124 bytes, about 90 in text, and up to twice that while arrays double.
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
long pace_suffix_recent(const pace_suffix *a, const int32_t **tokens);  // the last ones, at most PACE_SUFFIX_ORDER

// Appends tokens [n]. Returns 0; EOVERFLOW and nothing is added: more than PACE_SUFFIX_MAX_TOKENS in all; ENOMEM: the
// automaton may only be freed.
int pace_suffix_add(pace_suffix *a, const int32_t *tokens, long n);

// Guesses up to max_tokens tokens behind the text, or, where context [n_context] is not NULL, behind that.
//
// Of the contexts of at least min_match (>= 1) tokens, the one whose guess has the largest `expected`. Each token is
// the most frequent one behind what precedes it, the latest among equals; confidence[i] is its share of all that
// followed, where a context of L tokens counts as if it had also been followed 1 / L times by something else. The guess
// ends before a token that is right, with all before it, with a probability below `least`.
pace_suffix_guess pace_suffix_propose(const pace_suffix *a, const int32_t *context, long n_context, int min_match,
                                      long max_tokens, float least, int32_t *tokens, float *confidence);

#endif

// From one row of logits to one token: penalties, temperature, top-k, top-p, min-p, a seeded draw,
// and log-probabilities. A row never looks at another row (DESIGN law 1); the caller spreads rows
// over the team, one scratch per worker.
//
// Order, as vLLM's V1 sampler: mask, allowed tokens and bans (bad words, stop ids before min_tokens), bias, repetition
// penalty, frequency and presence penalty; then for greedy the maximum, else temperature, min-p, top-k of what min-p
// left, top-p of what both left, draw. Log-probabilities are those of the raw logits, before all this. Wherever logits
// are equal the lower token id comes first; top-k keeps exactly k tokens (vLLM keeps all that equal the k-th).
#ifndef PACE_SAMPLER_H
#define PACE_SAMPLER_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

enum {
    PACE_SAMPLE_NAN = -1,    // the logits hold a NaN or +inf
    PACE_SAMPLE_EMPTY = -2,  // no token is left: all banned, not allowed or -inf
};

// Who makes the parameters decides what is greedy, once, and writes 0. Far below this the inverse would overflow.
#define PACE_LEAST_TEMPERATURE 1e-5f

struct pace_sample_params {
    float temperature;         // 0: greedy, the filters and the seed are not used; else PACE_LEAST_TEMPERATURE or more
    float top_p;               // in (0, 1]; 1: off
    float min_p;               // in [0, 1]; 0: off
    float repetition_penalty;  // > 0; 1: off; over prompt and output, logit > 0 ? l / r : l * r
    float presence_penalty;    // 0: off; over output, once per distinct token
    float frequency_penalty;   // 0: off; over output, per occurrence
    int32_t top_k;             // <= 0 or >= vocab: off
    int32_t n_logprobs;        // < 0: none; 0: the chosen token's; n: and the n best, n <= vocab
    uint64_t seed;
    uint64_t position;      // of the token to be drawn, in its sequence
    uint32_t sample_index;  // which of the n samples of one prompt
    // Token ids outside [0, vocab) are ignored in all lists. Pointers may be NULL where n is 0.
    int32_t n_prompt, n_output, n_banned, n_bias, n_allowed;
    const int32_t *prompt, *output;
    const int32_t *banned;  // may not be drawn, e.g. EOS before min_tokens
    const int32_t *bias_ids;
    const float *bias;       // [n_bias], added to the logits of bias_ids
    const int32_t *allowed;  // only these may be drawn; n_allowed 0: all
    const uint32_t *mask;    // [ceil(vocab / 32)] bit t % 32 of word t / 32: t may be drawn; NULL: all
};

struct pace_sample_result {
    int32_t token;
    int32_t rank;   // how many tokens have at least its raw logit: 1 for the best; 0 if not asked for
    float logprob;  // natural logarithm; 0 if not asked for
    // Caller's arrays [n_logprobs], filled best first; may be NULL if n_logprobs <= 0.
    int32_t *top_ids;
    float *top_logprobs;
};

// Bytes of scratch that a row of this vocabulary needs, about 24 per token. 64-byte aligned, no
// initial contents.
size_t pace_sample_scratch(int vocab);

// logits [vocab], read only, any alignment; block_max: as the kernel of that name leaves it, NULL: not known. Returns
// 0, or a PACE_SAMPLE_ code with result->token -1, rank and logprob 0, and nothing in the arrays.
int pace_sample_row(const pace_kernels *kernels, const float *logits, const float *block_max, int vocab,
                    const struct pace_sample_params *params, struct pace_sample_result *result, void *scratch);

// Fills logprob, rank and the n_logprobs best for a given token in [0, vocab): prompt
// log-probabilities. Returns as pace_sample_row.
int pace_logprobs_row(const pace_kernels *kernels, const float *logits, int vocab, int32_t token, int n_logprobs,
                      struct pace_sample_result *result, void *scratch);

// The generator, for reference implementations: Philox4x32-10 with key seed and counter
// (position, sample_index, 0), as a double in [0, 1) from 53 bits.
double pace_sample_uniform(uint64_t seed, uint64_t position, uint32_t sample_index);

#endif

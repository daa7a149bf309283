#include "choices.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int pace_sorted_reserve(pace_sorted *s, long n_choices, long n_experts) {
    if (n_choices <= s->max_choices && n_experts <= s->max_experts) return 0;
    const long choices = n_choices > s->max_choices ? n_choices : s->max_choices;
    const long experts = n_experts > s->max_experts ? n_experts : s->max_experts;
    void *memory = malloc((size_t)(2 * choices + 2 * experts + 1) * 4);
    if (!memory) return ENOMEM;
    free(s->memory);
    *s = (pace_sorted){.memory = memory, .max_choices = choices, .max_experts = experts};
    return 0;
}

void pace_sorted_free(pace_sorted *s) {
    free(s->memory);
    memset(s, 0, sizeof *s);
}

void pace_sorted_make(pace_sorted *s, const pace_slot *route, long m, long n_experts) {
    const long k = route->width / 2;
    int32_t *const expert = s->memory, *const start = expert + s->max_experts, *const row = start + s->max_experts + 1;
    float *const weight = (float *)(void *)(row + s->max_choices);
    int32_t next[PACE_MAX_EXPERTS] = {0};
    const float *chosen = route->data;
    for (long r = 0; r < m; r++)
        for (long i = 0; i < k; i++) next[(long)chosen[r * route->ld + i]]++;
    long active = 0, at = 0;
    for (long e = 0; e < n_experts; e++) {
        const int32_t n = next[e];
        next[e] = (int32_t)at;
        if (!n) continue;
        expert[active] = (int32_t)e;
        start[active++] = (int32_t)at;
        at += n;
    }
    start[active] = (int32_t)at;
    for (long r = 0; r < m; r++)
        for (long i = 0; i < k; i++) {
            const int32_t to = next[(long)chosen[r * route->ld + i]]++;
            row[to] = (int32_t)r;
            weight[to] = chosen[r * route->ld + k + i];
        }
    s->c = (pace_chosen){active, expert, start, row, weight};
}

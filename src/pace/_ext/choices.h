// choices.h - rows sorted by the experts that they chose. Every worker sorts for itself, into memory of its own: 4096
// choices take it 10 us, and no barrier.
#ifndef PACE_CHOICES_H
#define PACE_CHOICES_H

#include "kernels.h"

typedef struct {
    pace_chosen c;  // as kernels see it: pointers into `memory`
    void *memory;
    long max_choices, max_experts;
} pace_sorted;

int pace_sorted_reserve(pace_sorted *s, long n_choices, long n_experts);  // 0, or ENOMEM; s was zero or is larger then
void pace_sorted_free(pace_sorted *s);
// The choices of m rows of a slot that pace_route wrote, among n_experts; allocates nothing.
void pace_sorted_make(pace_sorted *s, const pace_slot *route, long m, long n_experts);

#endif

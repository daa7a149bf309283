#include "work.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t range(uint64_t begin, uint64_t end) { return end << 32 | begin; }

int pace_work_init(pace_work *w, int n_threads) {
    w->n_threads = n_threads;
    w->slots = aligned_alloc(_Alignof(struct pace_work_slot), sizeof *w->slots * (size_t)n_threads);
    if (!w->slots) return ENOMEM;
    pace_work_arm_all(w, 0);
    return 0;
}

void pace_work_destroy(pace_work *w) {
    free(w->slots);
    w->slots = NULL;
}

void pace_work_split(long n_items, int n_threads, int tid, long *begin, long *end) {
    long each = n_items / n_threads, extra = n_items % n_threads;
    *begin = each * tid + (tid < extra ? tid : extra);
    *end = *begin + each + (tid < extra);
}

void pace_work_arm_range(pace_work *w, int tid, long begin, long end) {
    w->slots[tid].shared = false;
    atomic_store_explicit(&w->slots[tid].range, range((uint64_t)begin, (uint64_t)end), memory_order_relaxed);
}

void pace_work_arm(pace_work *w, int tid, long n_items) {
    long begin, end;
    pace_work_split(n_items, w->n_threads, tid, &begin, &end);
    pace_work_arm_range(w, tid, begin, end);
}

void pace_work_arm_shared(pace_work *w, int tid, long n_items) {
    pace_work_arm_range(w, tid, 0, tid == 0 ? n_items : 0);
    w->slots[tid].shared = true;
}

void pace_work_arm_all(pace_work *w, long n_items) {
    for (int tid = 0; tid < w->n_threads; tid++) pace_work_arm(w, tid, n_items);
}

static bool claim(struct pace_work_slot *slot, bool back, long grain, long *begin, long *end) {
    // Relaxed throughout: the items' data are published by the barriers, not by the claims.
    uint64_t old = atomic_load_explicit(&slot->range, memory_order_relaxed), rest;
    do {
        long b = (long)(uint32_t)old, e = (long)(old >> 32);
        if (b >= e) return false;
        long n = e - b < grain ? e - b : grain;
        *begin = back ? e - n : b;
        *end = *begin + n;
        rest = back ? range((uint64_t)b, (uint64_t)*begin) : range((uint64_t)*end, (uint64_t)e);
    } while (
        !atomic_compare_exchange_weak_explicit(&slot->range, &old, rest, memory_order_relaxed, memory_order_relaxed));
    return true;
}

bool pace_work_next(pace_work *w, int tid, long grain, long *begin, long *end) {
    if (w->slots[tid].shared) return claim(&w->slots[0], false, grain, begin, end);
    if (claim(&w->slots[tid], false, grain, begin, end)) return true;
    for (int i = tid + 1; i < w->n_threads; i++)
        if (claim(&w->slots[i], true, grain, begin, end)) return true;
    for (int i = 0; i < tid; i++)
        if (claim(&w->slots[i], true, grain, begin, end)) return true;
    return false;
}

// Claimable work: the items of one operator, shared out over a team, so that nobody waits for a worker that lost its
// core.
//
// Inside a step the plan executor does, for every operator,
//
//     pace_work_arm(&ring[(i + 1) & 1], tid, n_items_of(i + 1));  // my slot, for the next one
//     while (pace_work_next(&ring[i & 1], tid, grain, &begin, &end)) kernel(begin, end);
//     pace_team_barrier(team, tid);
//
// Two pace_work objects are enough and nobody resets anything in a critical section: while operator
// i runs, nobody touches ring[(i + 1) & 1] any more (all passed the barrier after operator i - 1),
// so each thread arms its own slot, a store to its own cache line, and the barrier after operator i
// publishes it. Operator 0 is armed with pace_work_arm_all() before pace_team_run().
#ifndef PACE_WORK_H
#define PACE_WORK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

// One worker's remaining items [begin, end) in one word, so that taking from either side is one
// compare-and-swap. A value that recurs means that the same items are free again: no ABA problem.
struct pace_work_slot {
    _Alignas(64) _Atomic uint64_t range;  // begin in the low, end in the high 32 bits
    bool shared;                          // this worker claims from slot 0's front; read by its owner only
};

typedef struct pace_work {
    int n_threads;
    struct pace_work_slot *slots;  // [n_threads]
} pace_work;

int pace_work_init(pace_work *work, int n_threads);  // 0, or ENOMEM; no items yet
void pace_work_destroy(pace_work *work);

// The static partition: worker tid's share [*begin, *end) of n_items, contiguous, sizes differing
// by at most one. Packing uses the same function, so that a worker first touches what it will read.
void pace_work_split(long n_items, int n_threads, int tid, long *begin, long *end);

// Fills worker tid's slot with its static share of n_items (< 2^32). See the protocol above.
void pace_work_arm(pace_work *work, int tid, long n_items);
// The same with a given share: shares of all workers must not overlap.
void pace_work_arm_range(pace_work *work, int tid, long begin, long end);
// One common queue, handed out in ascending order to whoever asks: for items of very unequal cost
// sorted longest first. All workers must arm it so.
void pace_work_arm_shared(pace_work *work, int tid, long n_items);
// All slots at once, by one thread while nobody claims.
void pace_work_arm_all(pace_work *work, long n_items);

// Claims up to grain items for worker tid: first from the front of its own share, then from the
// backs of the others' shares, nearest neighbour first. False when nothing is left anywhere. So a
// worker that lost its core delays the rest by the one claim it holds, not by its whole share.
bool pace_work_next(pace_work *work, int tid, long grain, long *begin, long *end);

#endif

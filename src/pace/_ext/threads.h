// The thread team: persistent pthreads that run one function together, barriers between its parts,
// and claimable work ranges. Also what the machine offers: thread count, NUMA nodes, huge pages.
//
// A step is one pace_team_run(). Inside it the plan executor does, for every operator,
//
//     pace_work_arm(&ring[(i + 1) & 1], tid, n_items_of(i + 1));  // my slot, for the next one
//     while (pace_work_next(&ring[i & 1], tid, grain, &begin, &end)) kernel(begin, end);
//     pace_team_barrier(team, tid);
//
// Two pace_work objects are enough and nobody resets anything in a critical section: while operator
// i runs, nobody touches ring[(i + 1) & 1] any more (all passed the barrier after operator i - 1),
// so each thread arms its own slot, a store to its own cache line, and the barrier after operator i
// publishes it. Operator 0 is armed with pace_work_arm_all() before pace_team_run().
#ifndef PACE_THREADS_H
#define PACE_THREADS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PACE_E_FORKED = -101,  // the team's threads do not exist in this forked child
    PACE_E_BUSY = -102,    // run from inside the same team's own function
};

enum { PACE_MAX_THREADS = 1024 };

typedef struct pace_team pace_team;
typedef void (*pace_team_fn)(void *arg, int tid, pace_team *team);

// n_threads includes the caller, which is worker 0 of every run; n_threads - 1 pthreads are started
// and live until pace_team_free(). They block all signals and have 2 MiB of stack. cpus: NULL, or
// n_threads distinct CPU numbers, worker i stays on cpus[i] (worker 0, the caller, only during a
// run; its own mask is restored). Unpinned is the default for a reason: when another process takes
// a core, the kernel moves the displaced worker to the core of one that waits.
// NULL on failure, with one line in err.
pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes);
// No run may be in progress. In a forked child it only releases the memory.
void pace_team_free(pace_team *team);
int pace_team_size(const pace_team *team);

// Runs fn(arg, tid, team) on every worker and returns 0 when all have finished. Callers from
// several threads take turns. fn runs with the SSE control word at "round to nearest, flush
// denormals, no exceptions" whatever the caller had, and the caller gets its own back: results do
// not depend on who calls. Nonzero (nothing ran): PACE_E_FORKED, PACE_E_BUSY, or a positive errno
// if the caller's thread could not be pinned.
int pace_team_run(pace_team *team, pace_team_fn fn, void *arg);

// For use inside fn: returns when all workers have arrived; what they wrote before is visible.
// Spins for up to 50 us, then sleeps in the kernel.
void pace_team_barrier(pace_team *team, int tid);
// The same; the last worker to arrive runs hook(arg) alone before anybody is let go.
void pace_team_barrier_hook(pace_team *team, int tid, void (*hook)(void *arg), void *arg);

// --- Claimable work ------------------------------------------------------------------------------

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

// --- The machine ---------------------------------------------------------------------------------

// min(CPUs of this thread's affinity mask, cgroup quota rounded up, physical cores among those
// CPUs), at least 1. why (may be NULL) receives one line, e.g.
// "2: 2 physical cores (affinity 4 CPUs, no cgroup quota)".
int pace_default_threads(char *why, size_t why_bytes);
// One allowed CPU per physical core, ascending, up to max_cpus of them; returns how many exist.
int pace_default_cpus(int *cpus, int max_cpus);
// CPUs of the affinity mask, ascending, up to max_cpus; returns how many exist.
int pace_allowed_cpus(int *cpus, int max_cpus);
// The tightest CPU quota of this process's cgroup and its ancestors (v1 and v2) in CPUs, 0 if none.
// root: "" for this machine, or a directory that holds proc/ and the mounts, for tests.
double pace_cgroup_cpus(const char *root);

int pace_numa_nodes(void);  // at least 1
// Transparent huge pages: "always", "madvise", "never", or "unknown".
void pace_thp_mode(char *mode, size_t mode_bytes);

// Zeroed memory. From 2 MiB on it is 2 MiB-aligned and asks for huge pages; below, it is
// page-aligned. Pages are placed where they are first touched. NULL if there is none.
void *pace_alloc_huge(size_t bytes);
void pace_map_huge(void *p, size_t bytes);   // touch the pages of a part of it now, where the system can
void pace_free_huge(void *p, size_t bytes);  // bytes as allocated; p may be NULL

#endif

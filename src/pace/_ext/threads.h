// The thread team: persistent pthreads that run one function together, and barriers between its parts. What they do
// inside is shared out with work.h.
#ifndef PACE_THREADS_H
#define PACE_THREADS_H

#include <stdbool.h>
#include <stddef.h>

enum {
    PACE_E_FORKED = -101,  // the team's threads do not exist in this forked child
    PACE_E_BUSY = -102,    // called from inside the same team's own function
    PACE_E_CLOSED = -103,  // its threads have ended
};

enum { PACE_MAX_THREADS = 1024 };

typedef struct pace_team pace_team;
typedef void (*pace_team_fn)(void *arg, int tid, pace_team *team);

// n_threads includes the caller, which is worker 0 of every run; n_threads - 1 pthreads are started
// and live until pace_team_close(). They have 2 MiB of stack and block all signals but those that an
// instruction of their own raises: the host's handlers, faulthandler's above all, must see a fault.
// cpus: NULL, or n_threads distinct CPU numbers, worker i stays on cpus[i] (worker 0, the caller,
// only during a run; its own mask is restored). Unpinned is the default for a reason: when another
// process takes a core, the kernel moves the displaced worker to the core of one that waits.
// NULL on failure, with one line in err.
pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes);
// Ends the threads, from any thread, any number of times: takes its turn among the runs, those after it find the team
// closed. In a forked child there is nothing to end. 0 or PACE_E_BUSY.
int pace_team_close(pace_team *team);
// Closes and releases it: the last call of all, nobody may be inside any other.
void pace_team_free(pace_team *team);
int pace_team_size(const pace_team *team);
bool pace_team_is_closed(const pace_team *team);  // by now; only a run's own answer is certain

// Runs fn(arg, tid, team) on every worker and returns 0 when all have finished. Callers from
// several threads take turns, one mutex a run. fn runs with the SSE control word at "round to nearest, flush
// denormals, no exceptions" whatever the caller had, and the caller gets its own back: results do
// not depend on who calls. Nonzero (nothing ran): a PACE_E_ code, or a positive errno: ENOMEM, or the
// caller's thread could not be pinned.
int pace_team_run(pace_team *team, pace_team_fn fn, void *arg);
// The same for an fn whose workers want scratch_bytes each. The scratch is the team's, grown under the turn and kept,
// so that a step allocates nothing once it is large enough.
int pace_team_run_with(pace_team *team, pace_team_fn fn, void *arg, size_t scratch_bytes);
// Grows it now, so that a later run does not fail for it. 0 or as pace_team_run.
int pace_team_reserve(pace_team *team, size_t scratch_bytes);
// For use inside fn: the worker's scratch, page-aligned, with whatever an earlier run left in it.
void *pace_team_scratch(const pace_team *team, int tid);

// For use inside fn: returns when all workers have arrived; what they wrote before is visible.
// Spins for up to 50 us, then sleeps in the kernel.
void pace_team_barrier(pace_team *team, int tid);

#endif

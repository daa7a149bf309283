#define _GNU_SOURCE
#include "threads.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

#include "fork.h"
#include "machine.h"
#include "pages.h"

// A barrier inside a step should not sleep over ordinary imbalance, as waking costs 5-50 us in a
// virtual machine; but it must sleep soon when a worker has lost its core, because a core that goes
// idle is what makes the kernel pull the displaced worker over.
static const int64_t BARRIER_SPIN_NS = 50 * 1000;
// Between runs: covers most of the Python between two steps (waking a worker took 100-150 us in a
// virtual machine); after that the engine costs nothing.
static const int64_t IDLE_SPIN_NS = 500 * 1000;
enum { SPIN_BATCH = 32 };                        // pauses between two looks at the clock, about 1-2 us
enum { GROUP = 8 };                              // workers per first-level arrival counter
enum { MXCSR_TEAM = 0x1f80 | 0x8000 | 0x0040 };  // all exceptions masked | FTZ | DAZ
enum { STACK_BYTES = 2 << 20 };
// Raised by what the thread itself does.
static const int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};
enum { MASK_SETS = 8 };  // affinity masks of up to 8 * 1024 CPUs

struct line {  // one counter on a cache line of its own (two: the adjacent-line prefetcher)
    _Alignas(128) atomic_uint n;
};

struct worker {
    pthread_t thread;
    pace_team *team;
    int tid;
    void *scratch;
    size_t scratch_bytes;
};

struct pace_team {
    struct line generation;  // barrier: counts releases; waiters watch and sleep on it
    struct line parked;      // how many sleep on generation
    struct line epoch;       // counts runs; idle workers watch and sleep on it
    struct line idle;        // how many sleep on epoch
    struct line root;        // barrier: complete groups
    struct line groups[(PACE_MAX_THREADS + GROUP - 1) / GROUP];  // barrier: arrivals per group
    int n_threads, n_groups;
    int64_t barrier_spin_ns, idle_spin_ns;
    pace_origin origin;
    bool pinned;
    int caller_cpu;
    pthread_mutex_t turn;  // one run at a time, or the close; what follows belongs to who has it
    atomic_bool closed;
    pace_team_fn fn;
    void *arg;
    struct worker *workers;  // [n_threads]; entry 0 is the caller's and has no thread
};

static _Thread_local const pace_team *inside;  // the team whose function this thread executes

// --- Waiting -------------------------------------------------------------------------------------

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Returns once *word differs from old. No wake-up is lost: the sleeper raises `sleepers` before the
// kernel compares *word, the waker changes *word before it reads `sleepers`, all in one total
// order.
static void wait_change(atomic_uint *word, unsigned old, atomic_uint *sleepers, int64_t spin_ns) {
    int64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < SPIN_BATCH; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != old) return;
            _mm_pause();
        }
        int64_t now = now_ns();
        if (deadline == 0) deadline = now + spin_ns;
        if (now >= deadline) break;
    }
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(sleepers, 1);
}

static void change(atomic_uint *word, atomic_uint *sleepers) {
    atomic_fetch_add(word, 1);
    if (atomic_load(sleepers) != 0) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void pace_team_barrier(pace_team *t, int tid) {
    // Cannot change before this worker has arrived.
    unsigned generation = atomic_load_explicit(&t->generation.n, memory_order_relaxed);
    // Two levels, so that 128 workers do not queue for one cache line; neighbours share a group.
    int g = tid / GROUP;
    unsigned group_size = (unsigned)(g < t->n_groups - 1 ? GROUP : t->n_threads - g * GROUP);
    if (atomic_fetch_add_explicit(&t->groups[g].n, 1, memory_order_acq_rel) + 1 == group_size) {
        atomic_store_explicit(&t->groups[g].n, 0, memory_order_relaxed);
        unsigned n_groups = (unsigned)t->n_groups;
        if (n_groups == 1 || atomic_fetch_add_explicit(&t->root.n, 1, memory_order_acq_rel) + 1 == n_groups) {
            atomic_store_explicit(&t->root.n, 0, memory_order_relaxed);
            if (t->n_threads > 1) change(&t->generation.n, &t->parked.n);
            return;
        }
    }
    wait_change(&t->generation.n, generation, &t->parked.n, t->barrier_spin_ns);
}

// --- The team ------------------------------------------------------------------------------------

static void *worker_main(void *p) {
    struct worker *w = p;
    pace_team *t = w->team;
    char name[16];
    snprintf(name, sizeof name, "pace-%d", w->tid);
    pthread_setname_np(pthread_self(), name);
    _mm_setcsr(MXCSR_TEAM);
    inside = t;
    for (unsigned epoch = 0;; epoch++) {
        wait_change(&t->epoch.n, epoch, &t->idle.n, t->idle_spin_ns);
        if (atomic_load_explicit(&t->closed, memory_order_relaxed)) return NULL;  // the epoch published it
        t->fn(t->arg, w->tid, t);
        pace_team_barrier(t, w->tid);
    }
}

static void stop_workers(pace_team *t, int n_started) {
    atomic_store(&t->closed, true);
    change(&t->epoch.n, &t->idle.n);
    for (int i = 1; i < n_started; i++) pthread_join(t->workers[i].thread, NULL);
}

static void release(pace_team *t) {
    for (int i = 0; i < t->n_threads; i++) pace_free_huge(t->workers[i].scratch, t->workers[i].scratch_bytes);
    pace_origin_destroy(&t->origin);
    free(t->workers);
    free(t);
}

static int start_worker(struct worker *w, const int *cpus) {
    pthread_attr_t attr;
    int rc = pthread_attr_init(&attr);
    if (rc) return rc;
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    cpu_set_t *set = NULL;
    if (cpus) {
        set = CPU_ALLOC(cpus[w->tid] + 1);
        if (set) {
            size_t set_bytes = CPU_ALLOC_SIZE(cpus[w->tid] + 1);
            CPU_ZERO_S(set_bytes, set);
            CPU_SET_S(cpus[w->tid], set_bytes, set);
            rc = pthread_attr_setaffinity_np(&attr, set_bytes, set);
        } else {
            rc = ENOMEM;
        }
    }
    if (rc == 0) rc = pthread_create(&w->thread, &attr, worker_main, w);
    CPU_FREE(set);
    pthread_attr_destroy(&attr);
    return rc;
}

static bool check_cpus(int n, const int *cpus, char *err, size_t err_bytes) {
    for (int i = 0; i < n; i++) {
        for (int j = 0; j < i; j++) {
            if (cpus[j] == cpus[i]) {
                snprintf(err, err_bytes, "CPU %d is listed twice; name one CPU per thread", cpus[i]);
                return false;
            }
        }
    }
    int n_allowed = pace_allowed_cpus(NULL, 0);
    int *allowed = malloc(sizeof *allowed * (size_t)n_allowed);
    if (!allowed) {
        snprintf(err, err_bytes, "out of memory for a list of %d CPUs", n_allowed);
        return false;
    }
    int n_listed = pace_allowed_cpus(allowed, n_allowed);
    if (n_listed > n_allowed) n_listed = n_allowed;
    int bad = -1;
    for (int i = 0; i < n && bad < 0; i++) {
        bool found = false;
        for (int j = 0; j < n_listed; j++) found |= allowed[j] == cpus[i];
        if (!found) bad = i;
    }
    if (bad >= 0)
        snprintf(err, err_bytes, "CPU %d is not among the %d CPUs (%d to %d) this process may use; see `taskset -p`",
                 cpus[bad], n_listed, allowed[0], allowed[n_listed - 1]);
    free(allowed);
    return bad < 0;
}

pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes) {
    if (n_threads < 1 || n_threads > PACE_MAX_THREADS) {
        snprintf(err, err_bytes, "%d threads requested; expected 1 to %d", n_threads, PACE_MAX_THREADS);
        return NULL;
    }
    if (cpus && !check_cpus(n_threads, cpus, err, err_bytes)) return NULL;
    pace_team *t = aligned_alloc(_Alignof(pace_team), sizeof *t);
    if (t) {
        memset(t, 0, sizeof *t);
        t->workers = calloc((size_t)n_threads, sizeof *t->workers);
    }
    if (!t || !t->workers) {
        snprintf(err, err_bytes, "out of memory for a team of %d threads", n_threads);
        free(t);
        return NULL;
    }
    t->n_threads = n_threads;
    t->n_groups = (n_threads + GROUP - 1) / GROUP;
    pace_origin_init(&t->origin);
    t->pinned = cpus != NULL;
    t->caller_cpu = cpus ? cpus[0] : -1;
    // With more workers than CPUs a spinning worker keeps the one it waits for from running.
    bool oversubscribed = n_threads > pace_allowed_cpus(NULL, 0);
    t->barrier_spin_ns = oversubscribed ? 0 : BARRIER_SPIN_NS;
    t->idle_spin_ns = oversubscribed ? 0 : IDLE_SPIN_NS;
    pthread_mutex_init(&t->turn, NULL);

    sigset_t blocked, before;
    sigfillset(&blocked);
    // A fault whose signal is blocked kills the process without running its handler.
    for (size_t i = 0; i < sizeof FAULTS / sizeof *FAULTS; i++) sigdelset(&blocked, FAULTS[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);  // inherited: signals go to the host's own threads
    int rc = 0, n_started = 1;
    for (; n_started < n_threads; n_started++) {
        t->workers[n_started] = (struct worker){.team = t, .tid = n_started};
        rc = start_worker(&t->workers[n_started], cpus);
        if (rc) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        snprintf(err, err_bytes, "could not start thread %d of %d: %s; ask for fewer threads", n_started + 1, n_threads,
                 strerror(rc));
        stop_workers(t, n_started);
        release(t);
        return NULL;
    }
    return t;
}

int pace_team_close(pace_team *t) {
    if (!pace_origin_is_here(&t->origin)) return 0;  // another thread may have had the turn when this child was made
    if (inside == t) return PACE_E_BUSY;
    pthread_mutex_lock(&t->turn);
    if (!pace_team_is_closed(t)) stop_workers(t, t->n_threads);
    pthread_mutex_unlock(&t->turn);
    return 0;
}

void pace_team_free(pace_team *t) {
    if (!t) return;
    pace_team_close(t);
    if (pace_origin_is_here(&t->origin)) pthread_mutex_destroy(&t->turn);
    release(t);
}

int pace_team_size(const pace_team *t) { return t->n_threads; }

bool pace_team_is_closed(const pace_team *t) { return atomic_load(&t->closed); }

void *pace_team_scratch(const pace_team *t, int tid) { return t->workers[tid].scratch; }

static int grow_scratch(pace_team *t, size_t bytes) {
    for (int i = 0; i < t->n_threads; i++) {
        struct worker *w = &t->workers[i];
        if (w->scratch_bytes >= bytes) continue;
        void *larger = pace_alloc_huge(bytes);
        if (!larger) return ENOMEM;  // what there was stays
        pace_free_huge(w->scratch, w->scratch_bytes);
        w->scratch = larger;
        w->scratch_bytes = bytes;
    }
    return 0;
}

static int pin_caller(const pace_team *t, cpu_set_t *before, size_t set_bytes) {
    if (sched_getaffinity(0, set_bytes, before) != 0) return errno;
    cpu_set_t mine[MASK_SETS];
    size_t mine_bytes = sizeof mine;
    CPU_ZERO_S(mine_bytes, mine);
    CPU_SET_S(t->caller_cpu, mine_bytes, mine);
    return sched_setaffinity(0, mine_bytes, mine) == 0 ? 0 : errno;
}

static int run(pace_team *t, pace_team_fn fn, void *arg) {
    cpu_set_t before[MASK_SETS];
    int rc = t->pinned ? pin_caller(t, before, sizeof before) : 0;
    if (rc) return rc;
    const pace_team *outer = inside;
    unsigned csr = _mm_getcsr();
    _mm_setcsr(MXCSR_TEAM);
    inside = t;
    t->fn = fn;
    t->arg = arg;
    if (t->n_threads > 1) change(&t->epoch.n, &t->idle.n);
    fn(arg, 0, t);
    pace_team_barrier(t, 0);
    inside = outer;
    _mm_setcsr(csr);
    if (t->pinned) sched_setaffinity(0, sizeof before, before);
    return 0;
}

// The caller's turn, on a team that is open, with that much scratch.
static int begin(pace_team *t, size_t scratch_bytes) {
    if (!pace_origin_is_here(&t->origin)) return PACE_E_FORKED;
    if (inside == t) return PACE_E_BUSY;
    pthread_mutex_lock(&t->turn);
    int rc = pace_team_is_closed(t) ? PACE_E_CLOSED : grow_scratch(t, scratch_bytes);
    if (rc) pthread_mutex_unlock(&t->turn);
    return rc;
}

int pace_team_reserve(pace_team *t, size_t scratch_bytes) {
    int rc = begin(t, scratch_bytes);
    if (rc == 0) pthread_mutex_unlock(&t->turn);
    return rc;
}

int pace_team_run_with(pace_team *t, pace_team_fn fn, void *arg, size_t scratch_bytes) {
    int rc = begin(t, scratch_bytes);
    if (rc) return rc;
    rc = run(t, fn, arg);
    pthread_mutex_unlock(&t->turn);
    return rc;
}

int pace_team_run(pace_team *t, pace_team_fn fn, void *arg) { return pace_team_run_with(t, fn, arg, 0); }

#define _GNU_SOURCE
#include "threads.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

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
enum { MASK_SETS = 8 };  // affinity masks of up to 8 * 1024 CPUs

struct line {  // one counter on a cache line of its own (two: the adjacent-line prefetcher)
    _Alignas(128) atomic_uint n;
};

struct worker {
    pthread_t thread;
    pace_team *team;
    int tid;
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
    pid_t pid;
    bool stop;
    bool pinned;
    int caller_cpu;
    pthread_mutex_t turn;  // one run at a time
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

void pace_team_barrier_hook(pace_team *t, int tid, void (*hook)(void *arg), void *arg) {
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
            if (hook) hook(arg);
            if (t->n_threads > 1) change(&t->generation.n, &t->parked.n);
            return;
        }
    }
    wait_change(&t->generation.n, generation, &t->parked.n, t->barrier_spin_ns);
}

void pace_team_barrier(pace_team *t, int tid) { pace_team_barrier_hook(t, tid, NULL, NULL); }

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
        if (t->stop) return NULL;
        t->fn(t->arg, w->tid, t);
        pace_team_barrier(t, w->tid);
    }
}

static void stop_workers(pace_team *t, int n_started) {
    t->stop = true;
    change(&t->epoch.n, &t->idle.n);
    for (int i = 1; i < n_started; i++) pthread_join(t->workers[i].thread, NULL);
}

static void release(pace_team *t) {
    free(t->workers);
    free(t);
}

__attribute__((format(printf, 3, 4))) static void explain(char *err, size_t n, const char *f, ...) {
    va_list args;
    va_start(args, f);
    if (err && n) vsnprintf(err, n, f, args);
    va_end(args);
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
                explain(err, err_bytes, "CPU %d is listed twice; name one CPU per thread", cpus[i]);
                return false;
            }
        }
    }
    int n_allowed = pace_allowed_cpus(NULL, 0);
    int *allowed = malloc(sizeof *allowed * (size_t)n_allowed);
    if (!allowed) {
        explain(err, err_bytes, "out of memory for a list of %d CPUs", n_allowed);
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
        explain(err, err_bytes, "CPU %d is not among the %d CPUs (%d to %d) this process may use; see `taskset -p`",
                cpus[bad], n_listed, allowed[0], allowed[n_listed - 1]);
    free(allowed);
    return bad < 0;
}

pace_team *pace_team_new(int n_threads, const int *cpus, char *err, size_t err_bytes) {
    if (n_threads < 1 || n_threads > PACE_MAX_THREADS) {
        explain(err, err_bytes, "%d threads requested; expected 1 to %d", n_threads, PACE_MAX_THREADS);
        return NULL;
    }
    if (cpus && !check_cpus(n_threads, cpus, err, err_bytes)) return NULL;
    pace_team *t = aligned_alloc(_Alignof(pace_team), sizeof *t);
    if (t) {
        memset(t, 0, sizeof *t);
        t->workers = calloc((size_t)n_threads, sizeof *t->workers);
    }
    if (!t || !t->workers) {
        explain(err, err_bytes, "out of memory for a team of %d threads", n_threads);
        free(t);
        return NULL;
    }
    t->n_threads = n_threads;
    t->n_groups = (n_threads + GROUP - 1) / GROUP;
    t->pid = getpid();
    t->pinned = cpus != NULL;
    t->caller_cpu = cpus ? cpus[0] : -1;
    // With more workers than CPUs a spinning worker keeps the one it waits for from running.
    bool oversubscribed = n_threads > pace_allowed_cpus(NULL, 0);
    t->barrier_spin_ns = oversubscribed ? 0 : BARRIER_SPIN_NS;
    t->idle_spin_ns = oversubscribed ? 0 : IDLE_SPIN_NS;
    pthread_mutex_init(&t->turn, NULL);

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited: signals go to the host's own threads
    int rc = 0, n_started = 1;
    for (; n_started < n_threads; n_started++) {
        t->workers[n_started] = (struct worker){.team = t, .tid = n_started};
        rc = start_worker(&t->workers[n_started], cpus);
        if (rc) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc) {
        explain(err, err_bytes, "could not start thread %d of %d: %s; ask for fewer threads", n_started + 1, n_threads,
                strerror(rc));
        stop_workers(t, n_started);
        release(t);
        return NULL;
    }
    return t;
}

void pace_team_free(pace_team *t) {
    if (!t) return;
    if (t->pid == getpid()) {
        stop_workers(t, t->n_threads);
        pthread_mutex_destroy(&t->turn);
    }
    release(t);
}

int pace_team_size(const pace_team *t) { return t->n_threads; }

static int pin_caller(const pace_team *t, cpu_set_t *before, size_t set_bytes) {
    if (sched_getaffinity(0, set_bytes, before) != 0) return errno;
    cpu_set_t mine[MASK_SETS];
    size_t mine_bytes = sizeof mine;
    CPU_ZERO_S(mine_bytes, mine);
    CPU_SET_S(t->caller_cpu, mine_bytes, mine);
    return sched_setaffinity(0, mine_bytes, mine) == 0 ? 0 : errno;
}

int pace_team_run(pace_team *t, pace_team_fn fn, void *arg) {
    // getpid() rather than pthread_atfork(): it leaves no handler behind in the host process.
    if (t->pid != getpid()) return PACE_E_FORKED;
    if (inside == t) return PACE_E_BUSY;
    pthread_mutex_lock(&t->turn);
    cpu_set_t before[MASK_SETS];
    int rc = t->pinned ? pin_caller(t, before, sizeof before) : 0;
    if (rc == 0) {
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
    }
    pthread_mutex_unlock(&t->turn);
    return rc;
}

// --- Claimable work ------------------------------------------------------------------------------

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

// --- The machine ---------------------------------------------------------------------------------

// First line of a file into text, without its newline.
static bool read_line(const char *path, char *text, size_t text_bytes) {
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool ok = fgets(text, (int)text_bytes, f) != NULL;
    fclose(f);
    if (ok) text[strcspn(text, "\n")] = 0;
    return ok;
}

int pace_allowed_cpus(int *cpus, int max_cpus) {
    int n = 0;
    // The kernel refuses a mask shorter than its own (EINVAL): grow until it fits.
    for (int bits = 1024; bits <= 1 << 20; bits *= 2) {
        cpu_set_t *set = CPU_ALLOC(bits);
        if (!set) break;
        size_t set_bytes = CPU_ALLOC_SIZE(bits);
        bool ok = sched_getaffinity(0, set_bytes, set) == 0;
        for (int cpu = 0; ok && cpu < bits; cpu++) {
            if (!CPU_ISSET_S(cpu, set_bytes, set)) continue;
            if (n < max_cpus) cpus[n] = cpu;
            n++;
        }
        CPU_FREE(set);
        if (ok) break;
    }
    if (n == 0) {  // no answer: assume the one CPU we run on
        if (max_cpus > 0) cpus[0] = 0;
        n = 1;
    }
    return n;
}

// The lowest-numbered hardware thread of cpu's core: equal for siblings, different for any two
// cores of any dies and packages (core_id alone repeats across them).
static int core_key(int cpu) {
    char path[96], text[32];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    int key;
    return read_line(path, text, sizeof text) && sscanf(text, "%d", &key) == 1 ? key : cpu;
}

int pace_default_cpus(int *cpus, int max_cpus) {
    int n_allowed = pace_allowed_cpus(NULL, 0), n = 0;
    int *list = malloc(sizeof *list * 2 * (size_t)n_allowed);
    if (!list) return 0;
    int *keys = list + n_allowed;
    int n_listed = pace_allowed_cpus(list, n_allowed);
    if (n_listed > n_allowed) n_listed = n_allowed;
    for (int i = 0; i < n_listed; i++) {
        int key = core_key(list[i]);
        bool seen = false;
        for (int j = 0; j < n; j++) seen |= keys[j] == key;
        if (seen) continue;
        if (n < max_cpus) cpus[n] = list[i];
        keys[n++] = key;
    }
    free(list);
    return n;
}

// Whether comma-separated list contains word.
static bool list_has(const char *list, const char *word) {
    size_t n = strlen(word);
    for (const char *p = list; *p; p += strcspn(p, ","), p += *p == ',')
        if (strcspn(p, ",\n ") == n && strncmp(p, word, n) == 0) return true;
    return false;
}

// Quota in CPUs set in one cgroup directory, 0 if none.
static double quota_at(const char *dir, bool v2) {
    char path[3 * PATH_MAX + 32], text[64];
    double quota = 0, period = 0;
    if (v2) {
        snprintf(path, sizeof path, "%s/cpu.max", dir);
        // "max 100000" does not parse as a number: no quota.
        if (!read_line(path, text, sizeof text) || sscanf(text, "%lf %lf", &quota, &period) != 2) return 0;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", dir);
        if (!read_line(path, text, sizeof text) || sscanf(text, "%lf", &quota) != 1) return 0;
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", dir);
        if (!read_line(path, text, sizeof text) || sscanf(text, "%lf", &period) != 1) return 0;
    }
    return quota > 0 && period > 0 ? quota / period : 0;  // v1 says -1 for none
}

// Where the cpu controller's hierarchy is mounted, and which of its cgroups the mount shows as its
// top (not "/" in a container without a cgroup namespace).
static bool cgroup_mount(const char *root, bool v2, char *mount, char *top) {
    char path[PATH_MAX + 32], line[4 * PATH_MAX];
    snprintf(path, sizeof path, "%s/proc/self/mountinfo", root);
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool found = false;
    while (!found && fgets(line, sizeof line, f)) {
        // id parent major:minor root mount-point options [tags] - type source super-options
        char *tail = strstr(line, " - "), type[32], options[512] = "";
        if (!tail || sscanf(tail, " - %31s %*s %511s", type, options) < 1) continue;
        if (strcmp(type, v2 ? "cgroup2" : "cgroup") != 0) continue;
        if (!v2 && !list_has(options, "cpu")) continue;
        found = sscanf(line, "%*s %*s %*s %4095s %4095s", top, mount) == 2;
    }
    fclose(f);
    return found;
}

// The cgroup path of this process in the cpu controller's hierarchy.
static bool cgroup_path(const char *root, bool v2, char *cgroup) {
    char path[PATH_MAX + 32], line[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool found = false;
    while (!found && fgets(line, sizeof line, f)) {  // hierarchy:controllers:path
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *where = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!where) continue;
        *where++ = 0;
        controllers++;
        found = v2 ? strcmp(line, "0:") == 0 : list_has(controllers, "cpu");
        if (found) snprintf(cgroup, PATH_MAX, "%s", where);
    }
    fclose(f);
    return found;
}

static double hierarchy_cpus(const char *root, bool v2) {
    char mount[PATH_MAX], top[PATH_MAX], cgroup[PATH_MAX];
    if (!cgroup_mount(root, v2, mount, top) || !cgroup_path(root, v2, cgroup)) return 0;
    // Make the path relative to what the mount shows. A path outside it ("/../x" seen from an inner
    // namespace, or a stale one) leaves the mount's own top, which is ours in a container.
    size_t n_top = strlen(top);
    char *below = cgroup;
    if (strcmp(top, "/") != 0)
        below = strncmp(cgroup, top, n_top) == 0 && (cgroup[n_top] == '/' || cgroup[n_top] == 0)
                    ? cgroup + n_top
                    : cgroup + strlen(cgroup);
    if (strstr(below, "..")) *below = 0;

    double tightest = 0;
    for (;;) {  // this cgroup and each of its ancestors
        char dir[3 * PATH_MAX];
        snprintf(dir, sizeof dir, "%s%s%s", root, mount, below);
        double quota = quota_at(dir, v2);
        if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
        char *slash = strrchr(below, '/');
        if (!slash) break;
        *slash = 0;
    }
    return tightest;
}

double pace_cgroup_cpus(const char *root) {
    double v1 = hierarchy_cpus(root, false), v2 = hierarchy_cpus(root, true);
    return v1 > 0 && (v2 == 0 || v1 < v2) ? v1 : v2;
}

int pace_default_threads(char *why, size_t why_bytes) {
    int n_affinity = pace_allowed_cpus(NULL, 0), n_cores = pace_default_cpus(NULL, 0);
    double quota = pace_cgroup_cpus("");
    int n = n_cores < n_affinity ? n_cores : n_affinity;
    if (n > PACE_MAX_THREADS) n = PACE_MAX_THREADS;
    int n_quota = 0;
    if (quota > 0 && quota < n) {
        n_quota = (int)quota;
        n_quota += n_quota < quota;  // 1.5 CPUs: two threads, each at most three quarters throttled
        n = n_quota;
    }
    if (n < 1) n = 1;
    char limit[64] = "no cgroup quota";
    if (quota > 0) snprintf(limit, sizeof limit, "cgroup quota %.2f CPUs", quota);
    if (n_quota > 0)
        explain(why, why_bytes, "%d: %s (affinity %d CPUs, %d physical cores)", n, limit, n_affinity, n_cores);
    else
        explain(why, why_bytes, "%d: %d physical core%s (affinity %d CPU%s, %s)", n, n_cores, n_cores == 1 ? "" : "s",
                n_affinity, n_affinity == 1 ? "" : "s", limit);
    return n;
}

int pace_numa_nodes(void) {
    DIR *dir = opendir("/sys/devices/system/node");
    if (!dir) return 1;
    int n = 0;
    for (struct dirent *e; (e = readdir(dir));) {
        int node;
        n += sscanf(e->d_name, "node%d", &node) == 1;
    }
    closedir(dir);
    return n > 0 ? n : 1;
}

void pace_thp_mode(char *mode, size_t mode_bytes) {
    char text[96];
    char *begin = NULL, *end = NULL;
    if (read_line("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof text)) {
        begin = strchr(text, '[');  // "always [madvise] never"
        end = begin ? strchr(begin, ']') : NULL;
    }
    if (end)
        snprintf(mode, mode_bytes, "%.*s", (int)(end - begin - 1), begin + 1);
    else
        snprintf(mode, mode_bytes, "unknown");
}

enum { SMALL_PAGE = 4096, HUGE_PAGE = 2 << 20 };

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

void *pace_alloc_huge(size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL;
    size_t need = round_up(bytes ? bytes : 1, SMALL_PAGE);
    bool huge = need >= HUGE_PAGE;
    size_t mapped = need + (huge ? HUGE_PAGE : 0);
    char *p = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    if (!huge) return p;
    // Trim to alignment. The tail keeps small pages: rounding it up would cost up to 2 MiB each.
    size_t head = (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
    if (head) munmap(p, head);
    if (mapped - head > need) munmap(p + head + need, mapped - head - need);
    madvise(p + head, need, MADV_HUGEPAGE);  // refused where THP is "never": small pages then
    return p + head;
}

void pace_map_huge(void *p, size_t bytes) {
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
    const uintptr_t begin = (uintptr_t)p / SMALL_PAGE * SMALL_PAGE;
    // Refused before Linux 5.14: then pages come when they are touched.
    madvise((void *)begin, round_up((uintptr_t)p + bytes - begin, SMALL_PAGE), MADV_POPULATE_WRITE);
}

void pace_free_huge(void *p, size_t bytes) {
    if (p) munmap(p, round_up(bytes ? bytes : 1, SMALL_PAGE));
}

#define _GNU_SOURCE
#include "machine.h"

#include <dirent.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

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
        snprintf(why, why_bytes, "%d: %s (affinity %d CPUs, %d physical cores)", n, limit, n_affinity, n_cores);
    else
        snprintf(why, why_bytes, "%d: %d physical core%s (affinity %d CPU%s, %s)", n, n_cores, n_cores == 1 ? "" : "s",
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

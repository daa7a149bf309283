// What the machine offers: CPUs and cores of this process, cgroup quota, NUMA nodes, huge pages.
#ifndef PACE_MACHINE_H
#define PACE_MACHINE_H

#include <stddef.h>

// min(CPUs of this thread's affinity mask, cgroup quota rounded up, physical cores among those
// CPUs), at least 1. why receives one line, e.g.
// "2: 2 physical cores (affinity 4 CPUs, no cgroup quota)"; NULL, 0: no line.
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

#endif

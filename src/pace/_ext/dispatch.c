// dispatch.c - which kernel table runs: the best tier that this CPU and OS execute, or one asked for by name.
// "reference" is no tier: it is never chosen by itself and packs nothing.
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "kernels.h"

#define X(name, parent, features) extern const pace_kernels pace_kernels_##name;
PACE_TIERS(X)
#undef X

const pace_kernels *const pace_tiers[] = {
#define X(name, parent, features) &pace_kernels_##name,
    PACE_TIERS(X)
#undef X
        NULL};

extern const pace_kernels pace_kernels_reference;

static int runs(int tier) {
    if (!pace_cpu_runs((enum pace_tier)tier)) return 0;
    return tier != PACE_TIER_amx || pace_cpu_enable_amx() == 0;
}

const pace_kernels *pace_find_tier(const char *isa) {
    for (int i = 0; pace_tiers[i]; i++)
        if ((!isa || strcmp(isa, pace_tiers[i]->isa) == 0) && runs(i)) return pace_tiers[i];
    return isa && strcmp(isa, pace_kernels_reference.isa) == 0 ? &pace_kernels_reference : NULL;
}

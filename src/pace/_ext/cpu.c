#define _GNU_SOURCE
#include "cpu.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// arch/x86/include/uapi/asm/prctl.h of Linux 5.16; spelt out because older headers lack them.
enum { ARCH_GET_XCOMP_SUPP_ = 0x1021, ARCH_REQ_XCOMP_PERM_ = 0x1023, XFEATURE_XTILEDATA_ = 18 };

// XCR0 bits: SSE 1, AVX 2, opmask 5, ZMM0-15 high 6, ZMM16-31 7, tile configuration 17, data 18.
enum { STATE_YMM = 0x6, STATE_ZMM = 0xe6, STATE_AMX = 0x60000 };

struct regs {
    unsigned eax, ebx, ecx, edx;
};

static struct regs cpuid(unsigned leaf, unsigned sub) {
    struct regs r = {0, 0, 0, 0};
    if (__get_cpuid_max(leaf & 0x80000000u, NULL) >= leaf) __cpuid_count(leaf, sub, r.eax, r.ebx, r.ecx, r.edx);
    if (leaf == 7 && sub > 0) {  // the answer is undefined beyond the sub-leaf count
        struct regs head = cpuid(7, 0);
        if (head.eax < sub) memset(&r, 0, sizeof r);
    }
    return r;
}

static uint64_t os_saved_state(void) {
    if (!(cpuid(1, 0).ecx >> 27 & 1)) return 0;  // no OSXSAVE: xgetbv itself would fault
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    uint64_t state = (uint64_t)hi << 32 | lo;
    // XCR0 may show the tiles in a sandbox whose kernel refuses the permission; this query has no
    // side effect, unlike the request.
    unsigned long supported = 0;
    if ((state & STATE_AMX) == STATE_AMX &&
        (syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP_, &supported) != 0 || !(supported >> XFEATURE_XTILEDATA_ & 1)))
        state &= ~(uint64_t)STATE_AMX;
    return state;
}

static pthread_once_t detect_once = PTHREAD_ONCE_INIT;
static uint32_t detected;
static bool pairs_dots;

static void detect(void) {
    uint64_t state = os_saved_state();
#define X(name, leaf, sub, reg, bit, need) \
    if ((cpuid(leaf, sub).reg >> bit & 1) && (state & (need)) == (need)) detected |= 1u << PACE_FEATURE_##name;
    PACE_CPU_FEATURES(X)
#undef X
    struct pace_cpu_info info;
    pace_cpu_identify(&info);
    pairs_dots = strcmp(info.vendor, "AuthenticAMD") == 0 && info.family >= 0x1a;
}

uint32_t pace_cpu_features(void) {
    pthread_once(&detect_once, detect);
    return detected;
}

bool pace_cpu_has(enum pace_feature feature) { return pace_cpu_features() >> feature & 1; }

bool pace_cpu_pairs_dots(void) {
    pthread_once(&detect_once, detect);
    return pairs_dots;
}

const char *pace_cpu_feature_name(int i) {
    static const char *const names[] = {
#define X(name, leaf, sub, reg, bit, state) #name,
        PACE_CPU_FEATURES(X)
#undef X
    };
    return i >= 0 && i < PACE_N_FEATURES ? names[i] : NULL;
}

static uint32_t tier_features(enum pace_tier tier) {
    static const struct {
        enum pace_tier parent;
        uint32_t features;
    } tiers[] = {
#define PACE_F(name) (1u << PACE_FEATURE_##name)
#define X(name, parent, features) {PACE_TIER_##parent, features},
        PACE_TIERS(X)
#undef X
#undef PACE_F
    };
    uint32_t all = tiers[tier].features;
    for (; tiers[tier].parent != tier; tier = tiers[tier].parent) all |= tiers[tiers[tier].parent].features;
    return all;
}

bool pace_cpu_runs(enum pace_tier tier) { return pace_tier_missing(tier) == NULL; }

const char *pace_tier_missing(enum pace_tier tier) {
    if ((int)tier < 0 || tier >= PACE_N_TIERS) return "a known tier";
    uint32_t missing = tier_features(tier) & ~pace_cpu_features();
    return missing ? pace_cpu_feature_name(__builtin_ctz(missing)) : NULL;
}

const char *pace_tier_name(int i) {
    static const char *const names[] = {
#define X(name, parent, features) #name,
        PACE_TIERS(X)
#undef X
    };
    return i >= 0 && i < PACE_N_TIERS ? names[i] : NULL;
}

int pace_cpu_enable_amx(void) {
    if (!pace_cpu_has(PACE_FEATURE_amx_tile)) return EOPNOTSUPP;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM_, XFEATURE_XTILEDATA_) == 0 ? 0 : errno;
}

// Leaf 4 (Intel) and 0x8000001D (AMD) share one format: one cache per sub-leaf, type 0 ends.
static void read_caches(unsigned leaf, struct pace_cpu_info *info) {
    for (unsigned sub = 0; sub < 16; sub++) {
        struct regs r = cpuid(leaf, sub);
        unsigned type = r.eax & 31, level = r.eax >> 5 & 7;
        if (type == 0) break;
        if (type == 2) continue;  // instruction cache
        size_t bytes =
            (size_t)((r.ebx >> 22) + 1) * ((r.ebx >> 12 & 1023) + 1) * ((r.ebx & 4095) + 1) * ((size_t)r.ecx + 1);
        if (level == 1) info->l1d_bytes = bytes;
        if (level == 2) info->l2_bytes = bytes;
        if (level == 3) info->l3_bytes = bytes;
    }
}

void pace_cpu_identify(struct pace_cpu_info *info) {
    memset(info, 0, sizeof *info);
    struct regs r = cpuid(0, 0);
    memcpy(info->vendor, &r.ebx, 4);
    memcpy(info->vendor + 4, &r.edx, 4);
    memcpy(info->vendor + 8, &r.ecx, 4);

    r = cpuid(1, 0);
    unsigned family = r.eax >> 8 & 15, model = r.eax >> 4 & 15;
    if (family == 6 || family == 15) model |= r.eax >> 12 & 0xf0;
    if (family == 15) family += r.eax >> 20 & 255;
    info->family = (int)family;
    info->model = (int)model;
    info->stepping = (int)(r.eax & 15);

    char brand[49] = {0};
    for (unsigned i = 0; i < 3; i++) {
        r = cpuid(0x80000002u + i, 0);
        memcpy(brand + 16 * i, &r, 16);
    }
    size_t begin = strspn(brand, " "), end = strlen(brand);
    while (end > begin && brand[end - 1] == ' ') end--;
    memcpy(info->brand, brand + begin, end - begin);

    read_caches(4, info);
    if (info->l1d_bytes == 0 && cpuid(0x80000001u, 0).ecx >> 22 & 1) read_caches(0x8000001Du, info);
}

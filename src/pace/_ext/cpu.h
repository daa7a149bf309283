// What this CPU and its operating system let us execute: features, ISA tiers, identity, caches.
//
// A feature counts only when cpuid reports it AND the operating system saves the registers that it
// needs (XCR0, and for AMX the kernel's own list of supported components). Everything here is
// read-only except pace_cpu_enable_amx().
#ifndef PACE_CPU_H
#define PACE_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// name, cpuid leaf, sub-leaf, register, bit, register state that the OS must save.
// The order numbers the features; the enum, the names and the detection all come from this table.
#define PACE_CPU_FEATURES(X)                \
    X(fma, 1, 0, ecx, 12, STATE_YMM)        \
    X(f16c, 1, 0, ecx, 29, STATE_YMM)       \
    X(avx2, 7, 0, ebx, 5, STATE_YMM)        \
    X(bmi2, 7, 0, ebx, 8, STATE_YMM)        \
    X(avx512f, 7, 0, ebx, 16, STATE_ZMM)    \
    X(avx512dq, 7, 0, ebx, 17, STATE_ZMM)   \
    X(avx512bw, 7, 0, ebx, 30, STATE_ZMM)   \
    X(avx512vl, 7, 0, ebx, 31, STATE_ZMM)   \
    X(avx512vbmi, 7, 0, ecx, 1, STATE_ZMM)  \
    X(avx512vnni, 7, 0, ecx, 11, STATE_ZMM) \
    X(avx512bf16, 7, 1, eax, 5, STATE_ZMM)  \
    X(amx_bf16, 7, 0, edx, 22, STATE_AMX)   \
    X(amx_tile, 7, 0, edx, 24, STATE_AMX)   \
    X(amx_int8, 7, 0, edx, 25, STATE_AMX)

enum pace_feature {
#define X(name, leaf, sub, reg, bit, state) PACE_FEATURE_##name,
    PACE_CPU_FEATURES(X)
#undef X
        PACE_N_FEATURES
};

// ISA tiers, best first: name, the tier whose features it extends, its own additional features.
#define PACE_TIERS(X)                                                                         \
    X(amx, avx512bf16, PACE_F(amx_tile) | PACE_F(amx_bf16) | PACE_F(amx_int8))                \
    X(avx512bf16, avx512vnni, PACE_F(avx512bf16) | PACE_F(avx512vbmi))                        \
    X(avx512vnni, avx512, PACE_F(avx512vnni))                                                 \
    X(avx512, avx2, PACE_F(avx512f) | PACE_F(avx512dq) | PACE_F(avx512bw) | PACE_F(avx512vl)) \
    X(avx2, avx2, PACE_F(avx2) | PACE_F(fma) | PACE_F(f16c) | PACE_F(bmi2))

enum pace_tier {
#define X(name, parent, features) PACE_TIER_##name,
    PACE_TIERS(X)
#undef X
        PACE_N_TIERS
};

struct pace_cpu_info {
    char vendor[13];  // "GenuineIntel", "AuthenticAMD", ...
    char brand[49];   // marketing name, blanks trimmed; "" where cpuid has none
    int family, model, stepping;
    // Data or unified cache in bytes, per instance (a shared L3 counts once); 0 where unknown.
    size_t l1d_bytes, l2_bytes, l3_bytes;
};

// Bit i is feature i of enum pace_feature. Detected once, then cached; safe from any thread.
uint32_t pace_cpu_features(void);
bool pace_cpu_has(enum pace_feature feature);
// Name of feature i, NULL at i < 0 or i >= PACE_N_FEATURES: iterate from 0 until NULL.
const char *pace_cpu_feature_name(int i);

// True if every instruction of the tier can execute here. PACE_TIER_amx also needs
// pace_cpu_enable_amx() to have returned 0 before its first tile instruction.
bool pace_cpu_runs(enum pace_tier tier);
// Two 512-bit dot products a cycle instead of one or a half: AMD from Zen 5 on. Blocking is chosen by it.
bool pace_cpu_pairs_dots(void);
const char *pace_tier_name(int i);                   // NULL past the end, as above
const char *pace_tier_missing(enum pace_tier tier);  // first missing feature, NULL if it runs

// Asks the kernel for the AMX tile state, once for the whole process, all threads present and
// future. Returns 0, or an errno: ENOSYS/EINVAL/EOPNOTSUPP (kernel < 5.16, sandbox) or ENOSPC (some
// thread's alternate signal stack is too small for the larger frame).
int pace_cpu_enable_amx(void);

void pace_cpu_identify(struct pace_cpu_info *info);

#endif

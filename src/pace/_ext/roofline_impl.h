// Roof measurements of one ISA tier; included by table.c under that tier's flags.
//
// The dot products are inline assembly: GCC 12 copies accumulators around VNNI intrinsics, which
// halves the rate, and volatile assembly can be neither hoisted nor dropped.
#include <immintrin.h>
#include <stdint.h>

#include "roofline.h"

#if defined(__AVX512F__)
#define ROOF_ACCUMULATORS 20  // latency 4-5 x 2 per cycle = 10 in flight at least
#define ROOF_REPEAT(X) \
    X(0)               \
    X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19)
#define ROOF_REG "v"
#define ROOF_BYTES 64
typedef __m512 roof_f32;
typedef __m512i roof_int;
static inline roof_f32 roof_set_f32(float x) { return _mm512_set1_ps(x); }
static inline roof_int roof_set_int(int x) { return _mm512_set1_epi32(x); }
static inline roof_int roof_load(const char *p) { return _mm512_load_si512(p); }
static inline roof_int roof_xor(roof_int a, roof_int b) { return _mm512_xor_si512(a, b); }
#else
#define ROOF_ACCUMULATORS 12  // of 16 registers: two inputs, one temporary, one for the ones
#define ROOF_REPEAT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define ROOF_REG "x"
#define ROOF_BYTES 32
typedef __m256 roof_f32;
typedef __m256i roof_int;
static inline roof_f32 roof_set_f32(float x) { return _mm256_set1_ps(x); }
static inline roof_int roof_set_int(int x) { return _mm256_set1_epi32(x); }
static inline roof_int roof_load(const char *p) { return _mm256_load_si256((const __m256i *)p); }
static inline roof_int roof_xor(roof_int a, roof_int b) { return _mm256_xor_si256(a, b); }
#endif

// Four streams side by side, as the skinny GEMM reads four panels: on Granite Rapids one stream per thread leaves 5 to
// 10 % of the bandwidth unused.
static double roof_read(const void *data, size_t bytes) {
    enum { STREAMS = 4, STEP = 128, AHEAD = 2048 };  // the L2 prefetcher stops at page ends; AHEAD crosses them
    const size_t each = bytes / STREAMS / STEP * STEP;
    const char *p = data;
    roof_int sum[STREAMS] = {roof_set_int(0), roof_set_int(0), roof_set_int(0), roof_set_int(0)};
    for (size_t at = 0; at < each; at += STEP) {
#pragma GCC unroll 4
        for (size_t s = 0; s < STREAMS; s++) {
            const char *q = p + s * each + at;
#pragma GCC unroll 4
            for (size_t i = 0; i < STEP; i += ROOF_BYTES) sum[s] = roof_xor(sum[s], roof_load(q + i));
#pragma GCC unroll 2
            for (size_t i = 0; i < STEP; i += 64)  // past the end it touches nothing: a prefetch never faults
                _mm_prefetch((const char *)((uintptr_t)q + AHEAD + i), _MM_HINT_T0);
        }
    }
    const roof_int all = roof_xor(roof_xor(sum[0], sum[1]), roof_xor(sum[2], sum[3]));
    __asm__ volatile("" : : ROOF_REG(all));  // the loads are needed
    return (double)(each * STREAMS);
}

#define ROOF_FMA_OPS (2.0 * ROOF_ACCUMULATORS * (ROOF_BYTES / 4))

static double roof_fma_f32(long iters) {
    roof_f32 x = roof_set_f32(0.5f), y = roof_set_f32(0.25f);
#define X(i) roof_f32 acc##i = roof_set_f32(0.0f);
    ROOF_REPEAT(X)
#undef X
    for (long k = 0; k < iters; k++) {
#define X(i) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+" ROOF_REG(acc##i) : ROOF_REG(x), ROOF_REG(y));
        ROOF_REPEAT(X)
#undef X
    }
    return (double)iters * ROOF_FMA_OPS;
}

#if defined(__AMX_TILE__)

enum { ROOF_TILES = 4 };  // accumulators: latency 52, one per 16 cycles

// One tdp per accumulator and pass, 16 x 16 outputs of 64 bytes of K each.
#define ROOF_AMX(name, instruction, ops)                                                       \
    static double name(long iters) {                                                           \
        /* Full tiles. ldtilecfg through assembly: GCC 12's intrinsic declares only 8 bytes */ \
        /* of its operand as input, so the stores to the rest may be dropped. */               \
        struct {                                                                               \
            uint8_t palette, start_row, reserved[14];                                          \
            uint16_t colsb[16];                                                                \
            uint8_t rows[16];                                                                  \
        } config = {.palette = 1};                                                             \
        for (int i = 0; i < 8; i++) {                                                          \
            config.colsb[i] = 64;                                                              \
            config.rows[i] = 16;                                                               \
        }                                                                                      \
        __asm__ volatile("ldtilecfg %0" : : "m"(config));                                      \
        _tile_zero(0);                                                                         \
        _tile_zero(1);                                                                         \
        _tile_zero(2);                                                                         \
        _tile_zero(3);                                                                         \
        _tile_zero(4);                                                                         \
        _tile_zero(5);                                                                         \
        _tile_zero(6);                                                                         \
        _tile_zero(7);                                                                         \
        for (long k = 0; k < iters; k++) {                                                     \
            instruction(0, 4, 6);                                                              \
            instruction(1, 4, 7);                                                              \
            instruction(2, 5, 6);                                                              \
            instruction(3, 5, 7);                                                              \
        }                                                                                      \
        _tile_release();                                                                       \
        return (double)iters * (ops);                                                          \
    }

#define ROOF_BF16_OPS (2.0 * ROOF_TILES * 16 * 16 * 32)
#define ROOF_S8_OPS (2.0 * ROOF_TILES * 16 * 16 * 64)
ROOF_AMX(roof_dot_bf16, _tile_dpbf16ps, ROOF_BF16_OPS)
ROOF_AMX(roof_dot_s8, _tile_dpbssd, ROOF_S8_OPS)
#undef ROOF_AMX

#else

#if defined(__AVX512BF16__)
#define ROOF_BF16_OPS (2.0 * ROOF_ACCUMULATORS * (ROOF_BYTES / 2))
static double roof_dot_bf16(long iters) {
    roof_int x = roof_set_int(0x3f003f00), y = roof_set_int(0x3e803e80);  // pairs of 0.5 and 0.25
#define X(i) roof_f32 acc##i = roof_set_f32(0.0f);
    ROOF_REPEAT(X)
#undef X
    for (long k = 0; k < iters; k++) {
#define X(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+" ROOF_REG(acc##i) : ROOF_REG(x), ROOF_REG(y));
        ROOF_REPEAT(X)
#undef X
    }
    return (double)iters * ROOF_BF16_OPS;
}
#else
#define ROOF_BF16_OPS ROOF_FMA_OPS
static double roof_dot_bf16(long iters) { return roof_fma_f32(iters); }
#endif

#define ROOF_S8_OPS (2.0 * ROOF_ACCUMULATORS * ROOF_BYTES)
static double roof_dot_s8(long iters) {
    roof_int x = roof_set_int(0x01010101), y = x;
#define X(i) roof_int acc##i = roof_set_int(0);
    ROOF_REPEAT(X)
#undef X
#if !defined(__AVX512VNNI__)
    roof_int ones = roof_set_int(0x00010001);
#endif
    for (long k = 0; k < iters; k++) {
#if defined(__AVX512VNNI__)
#define X(i) __asm__ volatile("vpdpbusd %2, %1, %0" : "+" ROOF_REG(acc##i) : ROOF_REG(x), ROOF_REG(y));
#else  // u8 x s8 pairs to s16, pairs of those to s32, add
#define X(i)                                             \
    {                                                    \
        roof_int t;                                      \
        __asm__ volatile(                                \
            "vpmaddubsw %3, %2, %1\n\t"                  \
            "vpmaddwd %4, %1, %1\n\t"                    \
            "vpaddd %1, %0, %0"                          \
            : "+" ROOF_REG(acc##i), "=&" ROOF_REG(t)     \
            : ROOF_REG(x), ROOF_REG(y), ROOF_REG(ones)); \
    }
#endif
        ROOF_REPEAT(X)
#undef X
    }
    return (double)iters * ROOF_S8_OPS;
}
#endif

#define PACE_ROOFLINE_TABLE                                                                           \
    {                                                                                                 \
        .read = roof_read, .dot_bf16 = roof_dot_bf16, .dot_s8 = roof_dot_s8, .fma_f32 = roof_fma_f32, \
        .dot_bf16_ops = ROOF_BF16_OPS, .dot_s8_ops = ROOF_S8_OPS, .fma_f32_ops = ROOF_FMA_OPS,        \
    }

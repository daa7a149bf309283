// groups.h - panels of int8, int4 and FP8 with a scale per group of k (kernels.h has their bytes): packing, and weights
// as bf16, scales apart. What is multiplied is exact in bf16: integers up to 256, and every number of E4M3. On bf16
// rows every tier expands a chunk of a panel; mm_groups.h multiplies it.
#ifndef PACE_GROUPS_H
#define PACE_GROUPS_H

#include "simd.h"

#define GR_CHUNK 256  // k expanded at a time: 16 KB of L1. Whole groups, unless a column is one
#if defined(__AVX512F__) && !defined(PACE_AMX)
#define GR_WHOLE 2048  // see GEMM_MC_WHOLE
#else
#define GR_WHOLE GR_CHUNK
#endif
#define GR_LEAST 16  // the smallest group

INLINE const uint8_t *gr_panel(const pace_matrix *w, long p) {
    return (const uint8_t *)w->data + p * pace_panel_bytes(w);
}

// A group's scales (or offsets) of a whole panel as f32.
INLINE vf gr_load(const uint8_t *p, int type, long c) {
    return type == PACE_SCALES_F32    ? v_load((const float *)(const void *)p + c)
           : type == PACE_SCALES_BF16 ? v_load_bf16((const bf16 *)(const void *)p + c)
                                      : v_load_f16((const uint16_t *)(const void *)p + c);
}
INLINE void gr_floats(float dst[PACE_NR], const uint8_t *p, int type) {
    for (long c = 0; c < PACE_NR; c += VL) v_store(dst + c, gr_load(p, type, c));
}
INLINE float gr_float(const void *p, int type, long i) {
    if (type == PACE_SCALES_F32) return ((const float *)p)[i];
    const uint16_t h = ((const uint16_t *)p)[i];
    return type == PACE_SCALES_BF16 ? bf16_to_f32(h) : _cvtsh_ss(h);
}

// ---- words of 16 bits: codes to bf16 ------------------------------------------------------------------------

// A vector holds 4 codes of each of VL columns, or 8 of int4; of its words, the low bytes are one pair of k, the high
// ones another.
#ifdef __AVX512F__
typedef __m512i gr_words;
INLINE gr_words gr_read(const uint8_t *p) { return _mm512_loadu_si512(p); }
INLINE void gr_write(bf16 *p, gr_words x) { _mm512_storeu_si512(p, x); }
INLINE gr_words gr_set(int x) { return _mm512_set1_epi16((short)x); }
INLINE gr_words gr_and(gr_words a, gr_words b) { return _mm512_and_si512(a, b); }
INLINE gr_words gr_sub(gr_words a, gr_words b) { return _mm512_sub_epi16(a, b); }
INLINE gr_words gr_right(gr_words a, const int n) { return _mm512_srli_epi16(a, (unsigned)n); }
// Integers, |x| <= 256.
INLINE gr_words gr_bf16(gr_words x) {
    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16));
    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 16));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                   _mm512_castps_si512(odd));
}
// VL numbers of 16 bits, each in both words of its column.
INLINE gr_words gr_both(const uint8_t *p) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_or_si512(x, _mm512_slli_epi32(x, 16));
}
// E4M3, a byte in each word. Exponents of normal numbers move by 120; of the others a table has the values, m / 512.
INLINE gr_words gr_e4m3(gr_words x) {
    static const _Alignas(64) uint16_t small[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(_mm512_and_si512(x, gr_set(127)), 4), gr_set(120 << 7));
    const __mmask32 least = _mm512_testn_epi16_mask(x, gr_set(0x78));  // then the low five bits are m
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, least, x, _mm512_load_si512(small));
    return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(x, 8), gr_set((short)0x8000), 0xf8);  // value | sign
}
#else
typedef __m256i gr_words;
INLINE gr_words gr_read(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void gr_write(bf16 *p, gr_words x) { _mm256_storeu_si256((__m256i *)p, x); }
INLINE gr_words gr_set(int x) { return _mm256_set1_epi16((short)x); }
INLINE gr_words gr_and(gr_words a, gr_words b) { return _mm256_and_si256(a, b); }
INLINE gr_words gr_sub(gr_words a, gr_words b) { return _mm256_sub_epi16(a, b); }
INLINE gr_words gr_right(gr_words a, const int n) { return _mm256_srli_epi16(a, n); }
INLINE gr_words gr_bf16(gr_words x) {
    const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16));
    const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 16));
    return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd), 0xaa);
}
INLINE gr_words gr_both(const uint8_t *p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_or_si256(x, _mm256_slli_epi32(x, 16));
}
INLINE gr_words gr_e4m3(gr_words x) {
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 59, 59, 59, 60, 60, 60, 60, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256i low =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, -128, -64, 0, 32, 64, 96, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256i magnitude = _mm256_and_si256(x, gr_set(127));
    const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), gr_set(120 << 7));
    const __m256i least = _mm256_or_si256(_mm256_slli_epi16(_mm256_shuffle_epi8(high, magnitude), 8),
                                          _mm256_and_si256(_mm256_shuffle_epi8(low, magnitude), gr_set(255)));
    const __m256i value = _mm256_blendv_epi8(normal, least, _mm256_cmpgt_epi16(gr_set(8), magnitude));
    return _mm256_or_si256(value, _mm256_slli_epi16(_mm256_and_si256(x, gr_set(128)), 8));
}
#endif

#define GR_VECTORS (PACE_NR / VL)
typedef struct {
    gr_words v[GR_VECTORS];
} gr_zeros;  // what is subtracted from integers of each column

INLINE gr_zeros gr_zeros_of(const pace_matrix *w, const uint8_t *block) {
    gr_zeros z;
    const uint8_t *at = block + PACE_NR * (w->scales == PACE_SCALES_F32 ? 4 : 2);
    for (int j = 0; j < GR_VECTORS; j++)
        z.v[j] = w->zeros == PACE_ZEROS     ? gr_both(at + 2 * VL * j)
                 : w->zeros == PACE_OFFSETS ? gr_set(0)
                                            : gr_set(w->layout == PACE_INT4 ? 8 : 128);
    return z;
}

// 8 k of 32 columns to pairs [4][32][2]. layout is a compile-time constant in every call.
INLINE void gr_expand_8(bf16 *dst, const uint8_t *codes, const int layout, const gr_zeros *z) {
    for (int j = 0; j < GR_VECTORS; j++, dst += 2 * VL, codes += 4 * VL) {
        if (layout == PACE_INT4) {
            const gr_words x = gr_read(codes), nibble = gr_set(15);
            gr_write(dst, gr_bf16(gr_sub(gr_and(x, nibble), z->v[j])));
            gr_write(dst + 2 * PACE_NR, gr_bf16(gr_sub(gr_and(gr_right(x, 4), nibble), z->v[j])));
            gr_write(dst + 4 * PACE_NR, gr_bf16(gr_sub(gr_and(gr_right(x, 8), nibble), z->v[j])));
            gr_write(dst + 6 * PACE_NR, gr_bf16(gr_sub(gr_right(x, 12), z->v[j])));
            continue;
        }
        const gr_words byte = gr_set(255), x[2] = {gr_read(codes), gr_read(codes + 4 * PACE_NR)};
        for (int i = 0; i < 2; i++) {
            const gr_words first = gr_and(x[i], byte), second = gr_right(x[i], 8);
            const int fp8 = layout == PACE_FP8;
            gr_write(dst + 2 * i * PACE_NR, fp8 ? gr_e4m3(first) : gr_bf16(gr_sub(first, z->v[j])));
            gr_write(dst + (2 * i + 4) * PACE_NR, fp8 ? gr_e4m3(second) : gr_bf16(gr_sub(second, z->v[j])));
        }
    }
}

#ifdef __AVX512F__
// int4 with one zero for all columns: a table instead of arithmetic.
INLINE void gr_lookup_8(bf16 *dst, const uint8_t *codes, const __m512i table) {
    for (int j = 0; j < GR_VECTORS; j++) {
        const __m512i x = gr_read(codes + 64 * j);
        gr_write(dst + 32 * j, _mm512_permutexvar_epi16(x, table));
        gr_write(dst + 32 * j + 2 * PACE_NR, _mm512_permutexvar_epi16(gr_right(x, 4), table));
        gr_write(dst + 32 * j + 4 * PACE_NR, _mm512_permutexvar_epi16(gr_right(x, 8), table));
        gr_write(dst + 32 * j + 6 * PACE_NR, _mm512_permutexvar_epi16(gr_right(x, 12), table));
    }
}
INLINE __m512i gr_table(const int zero) {  // five bits choose a word: the fifth is the next code's
    uint16_t words[32];
    for (int i = 0; i < 32; i++) words[i] = f32_to_bf16((float)(i % 16 - zero));
    return _mm512_loadu_si512(words);
}
#endif

// A chunk of a panel in bf16, with what its groups are multiplied by: up to GR_CHUNK k, up to GR_WHOLE of columns with
// one scale.
typedef struct {
    bf16 b[GR_WHOLE * PACE_NR];
    float scales[GR_CHUNK / GR_LEAST][PACE_NR], offsets[GR_CHUNK / GR_LEAST][PACE_NR];
} gr_chunk;

// k of codes at once to pairs; the stream comes nearer meanwhile.
INLINE void gr_expand_run(bf16 *dst, const uint8_t *codes, const int layout, long k, const gr_zeros *z,
                          const int lookup) {
#ifdef __AVX512F__
    const __m512i table = lookup ? gr_table(lookup < 0 ? 0 : lookup) : gr_set(0);
#endif
    const long step = layout == PACE_INT4 ? 4 * PACE_NR : 8 * PACE_NR;
    for (long i = 0; i < k; i += 8, codes += step, dst += 8 * PACE_NR) {
#pragma GCC unroll 4
        for (long line = 0; line < step; line += 64) FETCH((uintptr_t)codes + (uintptr_t)(4096 + line), _MM_HINT_T0);
#ifdef __AVX512F__
        if (layout == PACE_INT4 && lookup) {
            gr_lookup_8(dst, codes, table);
            continue;
        }
#endif
        (void)lookup;
        gr_expand_8(dst, codes, layout, z);
    }
}

// k0 .. k0 + kc of panel p: whole groups or a part of one, at most as many as a chunk holds; kc is a multiple of 16.
static void gr_expand(gr_chunk *to, const pace_matrix *w, long p, long k0, long kc) {
    const uint8_t *panel = gr_panel(w, p);
    const long head = pace_block_head(w), block_bytes = pace_block_bytes(w);
    const int lookup = w->zeros == PACE_ZEROS ? 0 : w->zeros == PACE_OFFSETS ? -1 : 8;
    for (long k = 0, g = 0, run; k < kc; k += run, g++) {
        const long in = (k0 + k) % w->group;
        run = w->group - in < kc - k ? w->group - in : kc - k;
        const uint8_t *block = panel + (k0 + k) / w->group * block_bytes;
        const uint8_t *codes = block + head + in * pace_code_bytes(w);
        const gr_zeros z = gr_zeros_of(w, block);
        bf16 *dst = to->b + k * PACE_NR;
        if (w->layout == PACE_INT4)
            gr_expand_run(dst, codes, PACE_INT4, run, &z, lookup);
        else if (w->layout == PACE_INT8)
            gr_expand_run(dst, codes, PACE_INT8, run, &z, 0);
        else
            gr_expand_run(dst, codes, PACE_FP8, run, &z, 0);
        gr_floats(to->scales[g], block, w->scales);
        if (w->zeros == PACE_OFFSETS) gr_floats(to->offsets[g], block + head / 2, w->scales);
    }
}

// ---- packing --------------------------------------------------------------------------------------------------

INLINE uint32_t gr_spread(uint32_t x) { return (x & 0xff) | (x & 0xff00) << 8; }

// Whether 8 codes are ones of the format.
INLINE int gr_fits(uint64_t x, int layout) {
    if (layout == PACE_INT4) return !(x & 0xf0f0f0f0f0f0f0f0u);
    if (layout == PACE_INT8) return 1;
    for (int i = 0; i < 8; i++)
        if ((x >> 8 * i & 127) == 127) return 0;
    return 1;
}

// See pack_groups of pace_kernels.
static long pack_groups(uint8_t *panel, const pace_matrix *w, const pace_rows_of_codes *src, long rows, long half) {
    const long groups = (w->k_pad + w->group - 1) / w->group, real = (w->k + w->group - 1) / w->group;
    const long block_bytes = pace_block_bytes(w), head = pace_block_head(w),
               size = w->scales == PACE_SCALES_F32 ? 4 : 2;
    const long zero_size = w->zeros == PACE_ZEROS ? 2 : size;
    const int padding = w->layout == PACE_FP8 || w->zeros != PACE_SYMMETRIC ? 0 : w->layout == PACE_INT4 ? 8 : 128;
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < real; g++) {
            const long at = r * src->ld_scales + g, column = half * 16 + r;
            uint8_t *to = panel + g * block_bytes;
            const float scale = gr_float(src->scales, w->scales, at);
            if (!(scale - scale == 0.0f)) return r;
            memcpy(to + column * size, (const char *)src->scales + at * size, (size_t)size);
            if (w->zeros == PACE_SYMMETRIC) continue;
            const float offset = w->zeros == PACE_OFFSETS ? gr_float(src->offsets, w->scales, at) : 0.0f;
            if (!(offset - offset == 0.0f)) return r;
            memcpy(to + PACE_NR * size + column * zero_size, (const char *)src->offsets + at * zero_size,
                   (size_t)zero_size);
        }
    for (long g = 0; g < groups; g++) {
        uint8_t *codes = panel + g * block_bytes + head + half * 64;
        const long k0 = g * w->group, k1 = k0 + w->group < w->k_pad ? k0 + w->group : w->k_pad;
        for (long k = k0; k < k1; k += 8, codes += 8 * pace_code_bytes(w))
            for (long r = 0; r < 16; r++) {
                uint8_t eight[8];
                uint64_t x;
                memset(eight, padding, 8);
                if (r < rows && k < w->k) {
                    const uint8_t *from = src->codes + r * src->ld + k;
                    if (w->k - k >= 8)
                        memcpy(eight, from, 8);
                    else
                        memcpy(eight, from, (size_t)(w->k - k));
                }
                memcpy(&x, eight, 8);
                if (!gr_fits(x, w->layout)) return r;
                const uint32_t low = (uint32_t)x, high = (uint32_t)(x >> 32);
                const uint32_t first = gr_spread(low & 0xffff) | gr_spread(high & 0xffff) << 8;
                const uint32_t second = gr_spread(low >> 16) | gr_spread(high >> 16) << 8;
                const uint32_t both = first | second << 4;
                memcpy(codes + 4 * r, w->layout == PACE_INT4 ? &both : &first, 4);
                if (w->layout != PACE_INT4) memcpy(codes + 4 * PACE_NR + 4 * r, &second, 4);
            }
    }
    return -1;
}

// Columns [k0, k0 + n) of packed column `row` as f32.
static void gr_unpack(float *dst, const pace_matrix *w, long row, long k0, long n) {
    const uint8_t *panel = gr_panel(w, row / PACE_NR);
    const long column = row % PACE_NR, size = w->scales == PACE_SCALES_F32 ? 4 : 2;
    for (long i = 0; i < n; i++) {
        const long k = k0 + i, in = k % w->group;
        const uint8_t *block = panel + k / w->group * pace_block_bytes(w), *codes = block + pace_block_head(w);
        const int code =
            w->layout == PACE_INT4 ? pace_nibble_code(codes, column, in) : pace_byte_code(codes, column, in);
        const float scale = gr_float(block, w->scales, column);
        if (w->layout == PACE_FP8) {
            const int magnitude = code & 127;
            const float value =
                magnitude < 8 ? (float)magnitude * 0x1p-9f : bf16_to_f32((bf16)((magnitude << 4) + (120 << 7)));
            dst[i] = (code & 128 ? -value : value) * scale;
        } else if (w->zeros == PACE_OFFSETS) {
            const double offset = (double)gr_float(block + PACE_NR * size, w->scales, column);
            dst[i] = (float)((double)code * (double)scale + offset);
        } else {
            int16_t zero = w->layout == PACE_INT4 ? 8 : 128;
            if (w->zeros == PACE_ZEROS) memcpy(&zero, block + PACE_NR * size + 2 * column, 2);
            dst[i] = (float)(code - zero) * scale;
        }
    }
}

#endif

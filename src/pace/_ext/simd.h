// simd.h - one small vector interface, two widths: 16 lanes (AVX-512) and 8 lanes (AVX2).
//
// Norms, RoPE, activations, softmax and packing are written once on it. Every horizontal sum is a fixed tree, so
// a row's result never depends on its neighbours. GEMM and attention use mm.h, not this file, for their products.
#ifndef PACE_SIMD_H
#define PACE_SIMD_H

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline, unused))

// Brings the cache line at an address nearer. It never faults and may lie outside every array, where a pointer may not
// even be formed: addresses of what comes next are integers.
#define FETCH(address, hint) _mm_prefetch((const char *)(address), hint)

INLINE float bf16_to_f32(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE bf16 f32_to_bf16(float f) {  // round to nearest even, NaN stays NaN
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 0x40);
    return (bf16)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

#ifdef __AVX512F__

#define VL 16
typedef __m512 vf;

INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE __mmask16 v_tail(long n) { return (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1u); }
INLINE vf v_load_n(const float *p, long n) { return _mm512_maskz_loadu_ps(v_tail(n), p); }
INLINE void v_store_n(float *p, vf x, long n) { _mm512_mask_storeu_ps(p, v_tail(n), x); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, 8); }
INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf v_copysign(vf a, vf s) {
    __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a), _mm512_castps_si512(s), sign, 0xD8));
}
INLINE vf v_less(vf a, vf b, vf yes, vf no) {  // a < b ? yes : no, lane by lane
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// Lanes first .. last - 1 (clamped) of x, others `fill`.
INLINE vf v_keep(vf x, long first, long last, float fill) {
    long lo = first < 0 ? 0 : first > 16 ? 16 : first, hi = last < 0 ? 0 : last > 16 ? 16 : last;
    __mmask16 m = (__mmask16)(((1u << hi) - 1u) & ~((1u << lo) - 1u));
    return _mm512_mask_blend_ps(m, v_set(fill), x);
}
INLINE float v_sum(vf x) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float v_hmax(vf x) { return _mm512_reduce_max_ps(x); }
INLINE vf v_pow2(vf x, vf n) { return _mm512_scalef_ps(x, n); }  // x * 2^n, n integral

INLINE vf v_from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE vf v_load_bf16(const bf16 *p) { return v_from_bf16(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE __m256i v_to_bf16(vf x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, r, quiet));
#endif
}
INLINE void v_store_bf16(bf16 *p, vf x) { _mm256_storeu_si256((__m256i *)p, v_to_bf16(x)); }
INLINE void v_store_bf16_n(bf16 *p, vf x, long n) { _mm256_mask_storeu_epi16(p, v_tail(n), v_to_bf16(x)); }

// Nearest integers, ties to even, |x| <= 127.
INLINE void v_store_int8(int8_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
// 2 VL integers as bf16: |x| <= 128 has at most 8 significant bits, so the upper half of the f32 is exact.
INLINE void v_int8_to_bf16(bf16 *p, const int8_t *x) {
#ifdef __AVX512BF16__
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(x + 16))));
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    // Even and odd elements by themselves, so that they need no shuffle to stand side by side again.
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)x));
    const __m512 even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, 16), 16));
    const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(w, 16));
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(even), 16),
                                                   _mm512_castps_si512(odd)));
#endif
}

#else  // AVX2 + FMA + F16C

#define VL 8
typedef __m256 vf;

INLINE vf v_set(float x) { return _mm256_set1_ps(x); }
INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE __m256i v_lanes(long first, long last) {  // all ones in lanes first .. last - 1
    __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    int lo = first < -1 ? -1 : first > 8 ? 8 : (int)first, hi = last < 0 ? 0 : last > 8 ? 8 : (int)last;
    return _mm256_and_si256(_mm256_cmpgt_epi32(i, _mm256_set1_epi32(lo - 1)),
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), i));
}
INLINE vf v_load_n(const float *p, long n) { return _mm256_maskload_ps(p, v_lanes(0, n)); }
INLINE void v_store_n(float *p, vf x, long n) { _mm256_maskstore_ps(p, v_lanes(0, n), x); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, 8); }
INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf v_copysign(vf a, vf s) {
    vf sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, s));
}
INLINE vf v_less(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE vf v_keep(vf x, long first, long last, float fill) {
    return _mm256_blendv_ps(v_set(fill), x, _mm256_castsi256_ps(v_lanes(first, last)));
}
INLINE float v_sum(vf x) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float v_hmax(vf x) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE vf v_pow2(vf x, vf n) {  // n in [-126, 127]
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
INLINE vf v_from_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
INLINE vf v_load_bf16(const bf16 *p) { return v_from_bf16(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE __m128i v_to_bf16(vf x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
INLINE void v_store_bf16(bf16 *p, vf x) { _mm_storeu_si128((__m128i *)p, v_to_bf16(x)); }
INLINE void v_store_bf16_n(bf16 *p, vf x, long n) {
    bf16 t[8];
    v_store_bf16(t, x);
    memcpy(p, t, (size_t)(n > 8 ? 8 : n) * sizeof(bf16));
}
INLINE void v_store_int8(int8_t *p, vf x) {
    const __m256i i = _mm256_cvtps_epi32(x);
    const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(h, h));
}
INLINE void v_int8_to_bf16(bf16 *p, const int8_t *x) {
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x));
    const __m256 even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w, 16), 16));
    const __m256 odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(w, 16));
    _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16),
                                                         _mm256_castps_si256(odd), 0xaa));
}

#endif

// The first `left` lanes, or all of them.
INLINE vf load_left(const float *p, long left) { return left >= VL ? v_load(p) : v_load_n(p, left); }

INLINE void store_left(float *p, vf x, long left) {
    if (left >= VL)
        v_store(p, x);
    else
        v_store_n(p, x, left);
}

INLINE void store_bf16_left(bf16 *p, vf x, long left) {
    if (left >= VL)
        v_store_bf16(p, x);
    else
        v_store_bf16_n(p, x, left);
}

// To int8: x / scale to the nearest integer; returns the scale, amax / 127 (see pace_kv and pace_slot). d: a multiple
// of 16.
INLINE float quantise_row(int8_t *q, const float *x, long d) {
    vf top = v_zero(), bad = v_zero();
    for (long e = 0; e < d; e += VL) {
        const vf v = v_load(x + e);
        top = v_max(top, v_abs(v));
        bad = v_add(bad, v_mul(v, v_zero()));  // NaN for a NaN or an infinity, else 0
    }
    const float scale = (v_hmax(top) + v_sum(bad)) / 127.0f;
    if (scale > 0.0f)
        for (long e = 0; e < d; e += VL) v_store_int8(q + e, v_div(v_load(x + e), v_set(scale)));
    else
        memset(q, 0, (size_t)d);
    return scale;
}

// e^x. x = n ln2 + r, |r| <= ln2 / 2; Taylor of e^r to r^7 / 7! leaves 2e-9 relative, below the rounding of f32.
// Clamped to [-87.3, 88.3] so that 2^n stays a normal number on every tier: the low end gives 1e-38. NaN stays NaN
// (max and min return their second operand then).
INLINE vf v_exp(vf x) {
    x = v_min(v_set(88.3f), v_max(v_set(-87.3f), x));
    vf n = v_round(v_mul(x, v_set(1.44269504f)));
    vf r = v_fnma(n, v_set(0.693359375f), x);  // ln2 in two parts: the first has 9 bits, n * it is exact
    r = v_fnma(n, v_set(-2.12194440e-4f), r);
    vf p = v_set(1.0f / 5040);
    p = v_fma(p, r, v_set(1.0f / 720));
    p = v_fma(p, r, v_set(1.0f / 120));
    p = v_fma(p, r, v_set(1.0f / 24));
    p = v_fma(p, r, v_set(1.0f / 6));
    p = v_fma(p, r, v_set(0.5f));
    p = v_fma(p, r, v_set(1.0f));
    p = v_fma(p, r, v_set(1.0f));
    return v_pow2(p, n);
}

// 2^x of x <= 0, at least 2^-126; Taylor's polynomial on [-1/2, 1/2], relative error 2e-7.
INLINE vf v_exp2(vf x) {
    x = v_max(v_set(-126.0f), x);
    const vf n = v_round(x), r = v_sub(x, n);
    vf p = v_set(1.54035304e-4f);
    p = v_fma(p, r, v_set(1.33335581e-3f));
    p = v_fma(p, r, v_set(9.61812911e-3f));
    p = v_fma(p, r, v_set(5.55041087e-2f));
    p = v_fma(p, r, v_set(2.40226507e-1f));
    p = v_fma(p, r, v_set(6.93147181e-1f));
    p = v_fma(p, r, v_set(1.0f));
    return v_pow2(p, n);
}

INLINE vf v_as_bf16(vf x) { return v_from_bf16(v_to_bf16(x)); }  // rounded

INLINE vf v_sigmoid(vf x) { return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x)))); }
INLINE vf v_tanh(vf x) {  // 2 sigmoid(2x) - 1: absolute error 1e-7, what a soft cap needs
    return v_fma(v_set(2.0f), v_sigmoid(v_add(x, x)), v_set(-1.0f));
}

// Coefficients of v_erf: erf(x) / x in x^2 on [0, 1] and ln erfc(x) on [1, 4].
#define ERF_S0 1.128379166e+00f
#define ERF_S1 -3.761262690e-01f
#define ERF_S2 1.128359746e-01f
#define ERF_S3 -2.685432880e-02f
#define ERF_S4 5.189311942e-03f
#define ERF_S5 -8.018854990e-04f
#define ERF_S6 7.882497103e-05f
#define ERF_L0 -7.569686190e-04f
#define ERF_L1 -1.125925949e+00f
#define ERF_L2 -6.390933195e-01f
#define ERF_L3 -1.033189801e-01f
#define ERF_L4 2.262198593e-02f
#define ERF_L5 -3.436867600e-03f
#define ERF_L6 3.175720348e-04f
#define ERF_L7 -1.330939040e-05f

// erf, both branches interpolated at Chebyshev nodes; absolute error 2e-7.
INLINE vf v_erf(vf x) {
    vf t = v_abs(x), s = v_mul(x, x);
    vf small = v_set(ERF_S6);
    small = v_fma(small, s, v_set(ERF_S5));
    small = v_fma(small, s, v_set(ERF_S4));
    small = v_fma(small, s, v_set(ERF_S3));
    small = v_fma(small, s, v_set(ERF_S2));
    small = v_fma(small, s, v_set(ERF_S1));
    small = v_fma(small, s, v_set(ERF_S0));
    small = v_mul(small, x);  // x P(x^2) on |x| < 1
    vf u = v_min(t, v_set(4.0f));
    vf q = v_set(ERF_L7);
    q = v_fma(q, u, v_set(ERF_L6));
    q = v_fma(q, u, v_set(ERF_L5));
    q = v_fma(q, u, v_set(ERF_L4));
    q = v_fma(q, u, v_set(ERF_L3));
    q = v_fma(q, u, v_set(ERF_L2));
    q = v_fma(q, u, v_set(ERF_L1));
    q = v_fma(q, u, v_set(ERF_L0));
    vf large = v_copysign(v_sub(v_set(1.0f), v_exp(q)), x);  // 1 - e^{Q(|x|)} on 1 <= |x| <= 4, then 1
    return v_less(t, v_set(1.0f), small, large);
}

INLINE vf v_act(vf x, int act) {
    switch (act) {
        case PACE_ACT_silu:
            return v_mul(x, v_sigmoid(x));
        case PACE_ACT_quick_gelu:
            return v_mul(x, v_sigmoid(v_mul(v_set(1.702f), x)));
        case PACE_ACT_gelu:
            return v_mul(v_mul(v_set(0.5f), x), v_add(v_set(1.0f), v_erf(v_mul(x, v_set(0.70710678f)))));
        case PACE_ACT_sigmoid:
            return v_sigmoid(x);
        case PACE_ACT_gelu_tanh: {  // 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
            vf u = v_mul(v_set(1.59576912f), v_fma(v_mul(v_mul(x, x), x), v_set(0.044715f), x));
            return v_mul(x, v_sigmoid(u));
        }
        case PACE_ACT_relu:
            return v_max(x, v_zero());
        case PACE_ACT_relu2:
            x = v_max(x, v_zero());
            return v_mul(x, x);
        default:
            return x;
    }
}

#endif

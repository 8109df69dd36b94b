// Sixteen fp32 lanes in one AVX-512 register, and exact integer dot products with VNNI.
// The three lanes_*.h headers offer the same names with the same roundings.
#pragma once

#include "formats.h"

#define QUIRE_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr const char* kName = "avx512";
// Tiles that fit the registers. A 64-byte load costs as much as one and a half multiply-adds here:
// two panels share each broadcast activation, except where memory is the limit anyway.
constexpr int kMaxRows = 12, kScoreBlocks = 2, kValueRows = 6, kValueLanes = 4;  // attention
constexpr int kMaxLinearRows = 12;
constexpr int panels_of(int rows) { return rows > 4 ? 2 : 1; }
constexpr int dense_panels_of(int rows) { return rows > 2 ? 2 : 4; }

using F = __m512;
using I = __m512i;

inline F splat(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline __mmask16 first_lanes(Index n) { return __mmask16((1u << n) - 1); }
inline F load_part(const float* p, Index n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_bf16_part(const uint16_t* p, Index n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
// 2^-8 of e4m3 codes, which are those of f16 without an exponent's highest bit.
inline F load_e4m3(const uint8_t* p) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(int16_t(0xbf80))));
}
inline F load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F load_s8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store_part(float* p, F x, Index n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
// Both return b where either is a NaN.
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F absolute(F a) { return _mm512_abs_ps(a); }
inline F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F times_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }  // one rounding, also to subnormals

inline bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// Lanes outside begin..end-1 become `other`.
inline F keep_lanes(F a, int begin, int end, float other) {
    const __mmask16 keep = __mmask16(first_lanes(end) & ~first_lanes(begin));
    return _mm512_mask_blend_ps(keep, splat(other), a);
}

// Reductions: lane i with i+8, then i+4, i+2, i+1, everywhere.
inline float sum_lanes(F a) {
    const __m256 e = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_lanes(F a) {
    const __m256 e = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I integers(int32_t x) { return _mm512_set1_epi32(x); }

// sum + the products of two int16 pairs in each lane. What a block format's codes become for it:
// pair j holds k 4g and 4g+2 of group g = j / 2 if j is even, 4g+1 and 4g+3 if odd.
inline I dot_pairs(I sum, I codes, int32_t activations) { return _mm512_dpwssd_epi32(sum, codes, _mm512_set1_epi32(activations)); }
template <class Format>
inline I code_pairs(const uint8_t* codes, int j) {
    const I bytes = _mm512_load_si512(codes + j / 2 % Format::bits * 64);
    const int shift = j % 2 * 8 + (j / 2 >= Format::bits ? 4 : 0);
    return _mm512_and_si512(_mm512_srli_epi16(bytes, shift), _mm512_set1_epi16((1 << Format::bits) - 1));
}
// Stores integral lanes of 16 bits, within each four in the order 0 2 1 3; returns their sum.
inline int store_pairs(int16_t* p, F x) {
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
    _mm256_storeu_si256((__m256i*)p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
    return int(sum_lanes(x));  // exact: integers below 2^24
}

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace

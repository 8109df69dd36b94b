// Sixteen fp32 lanes in two AVX2 registers. Same names and roundings as lanes_avx512.h.
#pragma once

#include "formats.h"

#define QUIRE_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr const char* kName = "avx2";
constexpr int kMaxRows = 4, kScoreBlocks = 1, kValueRows = 2, kValueLanes = 2;
constexpr int kMaxLinearRows = 4;
constexpr int panels_of(int) { return 1; }
constexpr int dense_panels_of(int rows) { return rows > 2 ? 1 : 2; }

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};

inline F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256i first_eight(Index n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F load_part(const float* p, Index n) {
    return {_mm256_maskload_ps(p, first_eight(n)), _mm256_maskload_ps(p + 8, first_eight(n - 8))};
}
inline F load_f16(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline __m256 widen_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline F load_bf16(const uint16_t* p) {
    const __m128i* q = (const __m128i*)p;
    return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
inline F load_bf16_part(const uint16_t* p, Index n) {
    alignas(32) uint16_t copy[16] = {};
    std::memcpy(copy, p, size_t(n) * 2);
    return load_bf16(copy);
}
// 2^-8 of e4m3 codes, which are those of f16 without an exponent's highest bit.
inline F load_e4m3(const uint8_t* p) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(int16_t(0xbf80)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
inline F load_u8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
inline F load_s8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline void store_part(float* p, F x, Index n) {
    _mm256_maskstore_ps(p, first_eight(n), x.a);
    _mm256_maskstore_ps(p + 8, first_eight(n - 8), x.b);
}

inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F absolute(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F round_even(F x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
// In two exact halves but for the last rounding, which is then the only one.
inline __m256 times_power_of_two(__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const auto power = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline F times_power_of_two(F x, F n) { return {times_power_of_two(x.a, n.a), times_power_of_two(x.b, n.b)}; }

inline bool any_greater(F x, F y) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)));
}
inline bool any_nan(F x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)); }
inline F keep_lanes(F x, int begin, int end, float other) {
    const __m256 o = _mm256_set1_ps(other);
    const auto keep = [&](__m256 v, int shift) {
        const __m256i mask = _mm256_andnot_si256(first_eight(begin - shift), first_eight(end - shift));
        return _mm256_blendv_ps(o, v, _mm256_castsi256_ps(mask));
    };
    return {keep(x.a, 0), keep(x.b, 8)};
}

inline float sum_lanes(F x) {
    const __m256 e = _mm256_add_ps(x.a, x.b);
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_lanes(F x) {
    const __m256 e = _mm256_max_ps(x.a, x.b);
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I integers(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline I dot_pairs(I sum, I codes, int32_t activations) {
    const __m256i x = _mm256_set1_epi32(activations);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(codes.a, x)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(codes.b, x))};
}
template <class Format>
inline I code_pairs(const uint8_t* codes, int j) {
    const __m256i* bytes = (const __m256i*)(codes + j / 2 % Format::bits * 64);
    const int shift = j % 2 * 8 + (j / 2 >= Format::bits ? 4 : 0);
    const __m256i mask = _mm256_set1_epi16((1 << Format::bits) - 1);
    return {_mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256(bytes), shift), mask),
            _mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256(bytes + 1), shift), mask)};
}
inline int store_pairs(int16_t* p, F x) {
    const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);
    _mm256_storeu_si256((__m256i*)p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
    return int(sum_lanes(x));
}

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

}  // namespace

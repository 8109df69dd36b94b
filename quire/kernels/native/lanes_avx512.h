// Sixteen fp32 lanes in one AVX-512 register, and the exact int8 dot product with VNNI.
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
inline I times_128_plus(I a, int32_t b) { return _mm512_add_epi32(_mm512_slli_epi32(a, 7), _mm512_set1_epi32(b)); }
template <class Format>
constexpr bool kSubtractsZero = false;  // block_dots uses codes as they are stored
// Stores sixteen integral lanes of -127..127 as bytes and returns their sum.
inline int store_int8(int8_t* p, F a) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a));
    _mm_storeu_si128((__m128i*)p, bytes);
    const __m128i four = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), bytes);
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Exact dot products of one block: consume(h, p, r, sum) for each half-block h with a scale of its
// own (one "half" if the block has one scale), panel p of P and row r of a tile of R.
// codes: the block in the first panel, panel_stride bytes from the next; a: [R][32] int8
// activations; start(h, p, r): what a sum begins with.
template <class Format, int P, int R, class Start, class Consume>
inline void block_dots(const uint8_t* codes, Index panel_stride, const int8_t* a, Start&& start, Consume&& consume) {
    constexpr int kGroups = 8 / Format::scales;
    QUIRE_UNROLL for (int h = 0; h < Format::scales; ++h) {
        I sum[P][R];
        QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r)
            sum[p][r] = start(h, p, r);
        QUIRE_UNROLL for (int g = h * kGroups; g < (h + 1) * kGroups; ++g) {
            I w[P];
            QUIRE_UNROLL for (int p = 0; p < P; ++p) {
                w[p] = _mm512_load_si512(codes + p * panel_stride + g % Format::bits * 64);
                if constexpr (Format::bits == 4) {
                    if (g >= 4) w[p] = _mm512_srli_epi16(w[p], 4);
                    w[p] = _mm512_and_si512(w[p], _mm512_set1_epi8(15));
                }
            }
            QUIRE_UNROLL for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, a + r * kBlock + 4 * g, 4);
                const I x = _mm512_set1_epi32(four);
                QUIRE_UNROLL for (int p = 0; p < P; ++p) sum[p][r] = _mm512_dpbusd_epi32(sum[p][r], w[p], x);
            }
        }
        QUIRE_UNROLL for (int r = 0; r < R; ++r) QUIRE_UNROLL for (int p = 0; p < P; ++p) consume(h, p, r, sum[p][r]);
    }
}

}  // namespace

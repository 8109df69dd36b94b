// Sixteen fp32 lanes in plain C++, as four groups of four that compilers map to SSE2 or NEON.
// Same names and roundings as lanes_avx512.h, except that fma rounds twice where the target has no
// such instruction.
#pragma once

#include <cmath>

#include "formats.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__GNUC__)
#define QUIRE_UNROLL _Pragma("GCC unroll 16")
#else
#define QUIRE_UNROLL
#endif

namespace {

constexpr const char* kName = "portable";
constexpr int kMaxRows = 4, kScoreBlocks = 1, kValueRows = 2, kValueLanes = 2;
constexpr int kMaxLinearRows = 4;
constexpr int panels_of(int) { return 1; }
constexpr int dense_panels_of(int rows) { return rows > 2 ? 1 : 2; }

// Four lanes of fp32 or int32 with operators that work lane by lane.
#if defined(__GNUC__)
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInt __attribute__((vector_size(16)));
inline Four to_float(FourInt x) { return __builtin_convertvector(x, Four); }
inline FourInt truncate(Four x) { return __builtin_convertvector(x, FourInt); }
inline FourInt bits_of(Four x) { return (FourInt)x; }
inline Four from_bits(FourInt x) { return (Four)x; }
inline Four greater_of(Four a, Four b) { return a > b ? a : b; }
inline Four less_of(Four a, Four b) { return a < b ? a : b; }
#else
template <class T>
struct Vector {
    T x[4];
    T operator[](int i) const { return x[i]; }
    T& operator[](int i) { return x[i]; }
};
using Four = Vector<float>;
using FourInt = Vector<int32_t>;
#define QUIRE_OPERATOR(op)                                     \
    template <class T>                                         \
    inline Vector<T> operator op(Vector<T> a, Vector<T> b) {   \
        for (int i = 0; i < 4; ++i) a.x[i] = a.x[i] op b.x[i]; \
        return a;                                              \
    }
QUIRE_OPERATOR(+)
QUIRE_OPERATOR(-)
QUIRE_OPERATOR(*)
QUIRE_OPERATOR(/)
QUIRE_OPERATOR(&)
QUIRE_OPERATOR(|)
QUIRE_OPERATOR(<<)
QUIRE_OPERATOR(>>)
template <class To, class From, class Operation>
inline To map_four(From a, From b, Operation&& operation) {
    To out;
    for (int i = 0; i < 4; ++i) out.x[i] = operation(a.x[i], b.x[i]);
    return out;
}
inline Four to_float(FourInt x) { return map_four<Four>(x, x, [](int32_t a, int32_t) { return float(a); }); }
inline FourInt truncate(Four x) { return map_four<FourInt>(x, x, [](float a, float) { return a == a ? int32_t(a) : 0; }); }
inline FourInt bits_of(Four x) { return map_four<FourInt>(x, x, [](float a, float) { return int32_t(float_to_bits(a)); }); }
inline Four from_bits(FourInt x) { return map_four<Four>(x, x, [](int32_t a, int32_t) { return bits_to_float(uint32_t(a)); }); }
inline Four greater_of(Four a, Four b) { return map_four<Four>(a, b, [](float x, float y) { return x > y ? x : y; }); }
inline Four less_of(Four a, Four b) { return map_four<Four>(a, b, [](float x, float y) { return x < y ? x : y; }); }
#endif

struct F {
    Four v[4];
};
struct I {
    FourInt v[4];
};

inline FourInt four_integers(int32_t x) { return FourInt{x, x, x, x}; }
template <class Operation>
inline F each_four(Operation&& operation) {  // operation(quarter) for every four lanes
    F out;
    QUIRE_UNROLL for (int i = 0; i < 4; ++i) out.v[i] = operation(i);
    return out;
}
inline float lane(const F& x, int i) { return x.v[i / 4][i % 4]; }

inline F splat(float x) {
    return each_four([=](int) { return Four{x, x, x, x}; });
}
inline F zero() { return splat(0); }
inline F load(const float* p) {
    F out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline F load_part(const float* p, Index n) {
    F out = zero();
    if (n > 0) std::memcpy(&out, p, size_t(n < kLanes ? n : kLanes) * 4);
    return out;
}
template <class T>
inline FourInt widen(const T* p) { return FourInt{p[0], p[1], p[2], p[3]}; }
inline F load_f16(const void* p) {
    uint16_t halves[16];
    std::memcpy(halves, p, sizeof halves);
    return each_four([&](int i) {
        // As f16_to_float, the exponent of infinities and NaNs being filled up afterwards.
        const FourInt half = widen(halves + 4 * i), rest = half & four_integers(0x7fff);
        const Four scaled = from_bits(rest << four_integers(13)) * from_bits(four_integers(0x77800000));
        const FourInt special = (four_integers(0x7bff) - rest) >> four_integers(31);
        const FourInt sign = (half & four_integers(0x8000)) << four_integers(16);
        return from_bits(bits_of(scaled) | (special & four_integers(0x7f800000)) | sign);
    });
}
inline F load_bf16(const uint16_t* p) {
    return each_four([=](int i) { return from_bits(widen(p + 4 * i) << four_integers(16)); });
}
inline F load_bf16_part(const uint16_t* p, Index n) {
    uint16_t copy[16] = {};
    std::memcpy(copy, p, size_t(n) * 2);
    return load_bf16(copy);
}
// 2^-8 of e4m3 codes: their bits are those of 2^-120 of them in fp32.
inline F load_e4m3(const uint8_t* p) {
    return each_four([=](int i) {
        const FourInt code = widen(p + 4 * i);
        const FourInt size = (code & four_integers(0x7f)) << four_integers(20), sign = (code & four_integers(0x80)) << four_integers(24);
        return from_bits(size | sign) * from_bits(four_integers(0x77800000));
    });
}
inline F load_u8(const uint8_t* p) {
    return each_four([=](int i) { return to_float(widen(p + 4 * i)); });
}
inline F load_s8(const uint8_t* p) {
    return each_four([=](int i) { return to_float(widen(reinterpret_cast<const int8_t*>(p) + 4 * i)); });
}
inline void store(float* p, const F& x) { std::memcpy(p, &x, sizeof x); }
inline void store_part(float* p, const F& x, Index n) {
    if (n > 0) std::memcpy(p, &x, size_t(n < kLanes ? n : kLanes) * 4);
}

inline F add(const F& a, const F& b) {
    return each_four([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(const F& a, const F& b) {
    return each_four([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(const F& a, const F& b) {
    return each_four([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(const F& a, const F& b) {
    return each_four([&](int i) { return a.v[i] / b.v[i]; });
}
#if defined(__aarch64__)
inline F fma(const F& a, const F& b, const F& c) {
    return each_four([&](int i) { return (Four)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]); });
}
inline F fnma(const F& a, const F& b, const F& c) {
    return each_four([&](int i) { return (Four)vfmsq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]); });
}
#else
inline F fma(const F& a, const F& b, const F& c) { return add(mul(a, b), c); }
inline F fnma(const F& a, const F& b, const F& c) { return sub(c, mul(a, b)); }
#endif
inline F max(const F& a, const F& b) {
    return each_four([&](int i) { return greater_of(a.v[i], b.v[i]); });
}
inline F min(const F& a, const F& b) {
    return each_four([&](int i) { return less_of(a.v[i], b.v[i]); });
}
inline F absolute(const F& a) {
    return each_four([&](int i) { return from_bits(bits_of(a.v[i]) & four_integers(0x7fffffff)); });
}
inline F round_even(const F& a) {  // adding 1.5 * 2^23 rounds away the fraction, for |a| < 2^22
    const F magic = splat(12582912.0f);
    return sub(add(a, magic), magic);
}
inline F times_power_of_two(const F& a, const F& n) {
    return each_four([&](int i) {
        const FourInt whole = truncate(n.v[i]), half = whole >> four_integers(1), bias = four_integers(127);
        const auto power = [&](FourInt e) { return from_bits((e + bias) << four_integers(23)); };
        return a.v[i] * power(half) * power(whole - half);
    });
}

inline bool any_greater(const F& a, const F& b) {
    int any = 0;
    for (int i = 0; i < kLanes; ++i) any |= lane(a, i) > lane(b, i);
    return any;
}
inline bool any_nan(const F& a) {
    int any = 0;
    for (int i = 0; i < kLanes; ++i) any |= lane(a, i) != lane(a, i);
    return any;
}
inline F keep_lanes(F a, int begin, int end, float other) {
    for (int i = 0; i < kLanes; ++i)
        if (i < begin || i >= end) a.v[i / 4][i % 4] = other;
    return a;
}

template <class Combine>
inline float reduce(const F& a, Combine&& combine) {
    const Four half[2] = {combine(a.v[0], a.v[2]), combine(a.v[1], a.v[3])}, four = combine(half[0], half[1]);
    const Four two = combine(four, Four{four[2], four[3], four[2], four[3]});
    return combine(two, Four{two[1], two[1], two[1], two[1]})[0];
}
inline float sum_lanes(const F& a) {
    return reduce(a, [](Four x, Four y) { return x + y; });
}
inline float max_lanes(const F& a) {
    return reduce(a, [](Four x, Four y) { return greater_of(x, y); });
}

inline F to_float(const I& a) {
    return each_four([&](int i) { return to_float(a.v[i]); });
}
inline I integers(int32_t x) {
    const FourInt four = four_integers(x);
    return {{four, four, four, four}};
}

// Products of the int16 pairs in each lane, summed.
inline FourInt pair_products(FourInt codes, int32_t activations) {
#if defined(__SSE2__)
    return (FourInt)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(activations));
#elif defined(__aarch64__)
    const int16x8_t x = vreinterpretq_s16_s32(vdupq_n_s32(activations)), w = (int16x8_t)codes;
    return (FourInt)vpaddq_s32(vmull_s16(vget_low_s16(w), vget_low_s16(x)), vmull_high_s16(w, x));
#else
    int16_t x[2];
    std::memcpy(x, &activations, 4);
    return (codes & four_integers(0xffff)) * four_integers(x[0]) + (codes >> four_integers(16)) * four_integers(x[1]);
#endif
}
inline I dot_pairs(I sum, const I& codes, int32_t activations) {
    QUIRE_UNROLL for (int i = 0; i < 4; ++i) sum.v[i] = sum.v[i] + pair_products(codes.v[i], activations);
    return sum;
}
template <class Format>
inline I code_pairs(const uint8_t* codes, int j) {
    const int shift = j % 2 * 8 + (j / 2 >= Format::bits ? 4 : 0), mask = (1 << Format::bits) - 1;
    I out;
    std::memcpy(&out, codes + j / 2 % Format::bits * 64, sizeof out);
    QUIRE_UNROLL for (int i = 0; i < 4; ++i)  // the arithmetic shift's sign bits are masked away
        out.v[i] = (out.v[i] >> four_integers(shift)) & four_integers(mask << 16 | mask);
    return out;
}
inline int store_pairs(int16_t* p, const F& x) {
    QUIRE_UNROLL for (int i = 0; i < 4; ++i) {
        const FourInt codes = truncate(x.v[i]);
        const int16_t four[4] = {int16_t(codes[0]), int16_t(codes[2]), int16_t(codes[1]), int16_t(codes[3])};
        std::memcpy(p + 4 * i, four, sizeof four);
    }
    return int(sum_lanes(x));
}

inline void prefetch(const void*) {}

}  // namespace

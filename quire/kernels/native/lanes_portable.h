// Sixteen fp32 lanes in plain C++, as four groups of four that compilers map to SSE2 or NEON.
// Same names and roundings as lanes_avx512.h, except that fma rounds twice where the target has no
// such instruction.
#pragma once

#include <cmath>

#include "formats.h"

#if defined(__aarch64__)
#include <arm_neon.h>
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

#if defined(__GNUC__)
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInt __attribute__((vector_size(16)));
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
#endif

struct F {
    Four v[4];
};
struct I {
    FourInt v[4];
};

template <class Operation>
inline F each(Operation&& operation) {  // operation(lane) for every lane
    F out;
    QUIRE_UNROLL for (int i = 0; i < kLanes; ++i) out.v[i / 4][i % 4] = operation(i);
    return out;
}
inline float lane(const F& x, int i) { return x.v[i / 4][i % 4]; }

inline F splat(float x) { return each([=](int) { return x; }); }
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
inline F load_f16(const void* p) {
    uint16_t half[16];
    std::memcpy(half, p, sizeof half);
    return each([&](int i) { return f16_to_float(half[i]); });
}
inline F load_bf16(const uint16_t* p) {
    return each([=](int i) { return bf16_to_float(p[i]); });
}
inline F load_bf16_part(const uint16_t* p, Index n) {
    return each([=](int i) { return i < n ? bf16_to_float(p[i]) : 0.0f; });
}
inline F load_u8(const uint8_t* p) {
    return each([=](int i) { return float(p[i]); });
}
inline F load_s8(const uint8_t* p) {
    return each([=](int i) { return float(int8_t(p[i])); });
}
inline void store(float* p, const F& x) { std::memcpy(p, &x, sizeof x); }
inline void store_part(float* p, const F& x, Index n) {
    if (n > 0) std::memcpy(p, &x, size_t(n < kLanes ? n : kLanes) * 4);
}

#define QUIRE_BINARY(name, op)                                            \
    inline F name(F a, const F& b) {                                      \
        QUIRE_UNROLL for (int i = 0; i < 4; ++i) a.v[i] = a.v[i] op b.v[i]; \
        return a;                                                         \
    }
QUIRE_BINARY(add, +)
QUIRE_BINARY(sub, -)
QUIRE_BINARY(mul, *)
QUIRE_BINARY(div, /)

#if defined(__aarch64__)
inline F fma(const F& a, const F& b, F c) {
    QUIRE_UNROLL for (int i = 0; i < 4; ++i) c.v[i] = (Four)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]);
    return c;
}
inline F fnma(const F& a, const F& b, F c) {
    QUIRE_UNROLL for (int i = 0; i < 4; ++i) c.v[i] = (Four)vfmsq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]);
    return c;
}
#else
inline F fma(const F& a, const F& b, const F& c) { return add(mul(a, b), c); }
inline F fnma(const F& a, const F& b, const F& c) { return sub(c, mul(a, b)); }
#endif

inline F max(const F& a, const F& b) {
    return each([&](int i) { return lane(a, i) > lane(b, i) ? lane(a, i) : lane(b, i); });
}
inline F min(const F& a, const F& b) {
    return each([&](int i) { return lane(a, i) < lane(b, i) ? lane(a, i) : lane(b, i); });
}
inline F absolute(const F& a) {
    return each([&](int i) { return bits_to_float(float_to_bits(lane(a, i)) & 0x7fffffffu); });
}
inline F round_even(const F& a) {  // adding 1.5 * 2^23 rounds away the fraction, for |a| < 2^22
    const F magic = splat(12582912.0f);
    return sub(add(a, magic), magic);
}
inline F times_power_of_two(const F& a, const F& n) {
    return each([&](int i) {
        const float power = lane(n, i);
        const int whole = power >= -254 && power <= 254 ? int(power) : 0, half = whole >> 1;
        return lane(a, i) * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(whole - half + 127) << 23);
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
inline F keep_lanes(const F& a, int begin, int end, float other) {
    return each([&](int i) { return i >= begin && i < end ? lane(a, i) : other; });
}

template <class Combine>
inline float reduce(const F& a, Combine&& combine) {
    float x[kLanes];
    store(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] = combine(x[i], x[i + half]);
    return x[0];
}
inline float sum_lanes(const F& a) {
    return reduce(a, [](float x, float y) { return x + y; });
}
inline float max_lanes(const F& a) {
    return reduce(a, [](float x, float y) { return x > y ? x : y; });
}

inline F to_float(const I& a) {
    return each([&](int i) { return float(a.v[i / 4][i % 4]); });
}
inline I integers(int32_t x) {
    I out;
    for (int i = 0; i < kLanes; ++i) out.v[i / 4][i % 4] = x;
    return out;
}
inline I times_128_plus(I a, int32_t b) {
    for (int i = 0; i < kLanes; ++i) a.v[i / 4][i % 4] = a.v[i / 4][i % 4] * 128 + b;
    return a;
}
template <class Format>
constexpr bool kSubtractsZero = false;
inline int store_int8(int8_t* p, const F& a) {
    int sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += p[i] = int8_t(lane(a, i));
    return sum;
}

inline void prefetch(const void*) {}

template <class Format, int P, int R, class Start, class Consume>
inline void block_dots(const uint8_t* codes, Index, const int8_t* a, Start&& start, Consume&& consume) {
    static_assert(P == 1, "one panel at a time");
    constexpr int kGroups = 8 / Format::scales;
    for (int h = 0; h < Format::scales; ++h) {
        int32_t sums[R][kLanes];
        for (int r = 0; r < R; ++r) {
            const I first = start(h, 0, r);
            std::memcpy(sums[r], &first, sizeof first);
        }
        for (int g = h * kGroups; g < (h + 1) * kGroups; ++g) {
            uint8_t four[64];
            const uint8_t* from = codes + g % Format::bits * 64;
            for (int i = 0; i < 64; ++i) four[i] = Format::bits == 8 ? from[i] : g < 4 ? from[i] & 15 : from[i] >> 4;
            for (int r = 0; r < R; ++r) {
                const int8_t* x = a + r * kBlock + 4 * g;
                for (int i = 0; i < kLanes; ++i)
                    sums[r][i] += four[4 * i] * x[0] + four[4 * i + 1] * x[1] + four[4 * i + 2] * x[2] + four[4 * i + 3] * x[3];
            }
        }
        for (int r = 0; r < R; ++r) {
            I sum;
            std::memcpy(&sum, sums[r], sizeof sum);
            consume(h, 0, r, sum);
        }
    }
}

}  // namespace

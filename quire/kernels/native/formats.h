// How weights lie in memory once packed: panels of 16 output rows ("lanes").
//
//   dense          [N/16][K][16] of the stored type
//   block formats  per panel: all scale headers, padded to 64 bytes, then for each block of 32 k
//                  the codes, one 64-byte group being [16 lanes][4 k]. With 4-bit codes group g
//                  holds k 4g..4g+3 in its low nibbles and 16 more in its high nibbles.
//
// A header belongs to one block, or to a super-block of eight (the K-quants, whose 6- and 8-bit
// scales stay as they are: the product with the fp16 super-scale is exact in fp32).
//   plain   fp16 scale[16], fp16 minimum[16] if any
//   super   fp16 scale[16], fp16 minimum[16] if any,
//           8 x { scale codes [scales][16], minimum codes [16] if any }
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Index = std::ptrdiff_t;

constexpr int kLanes = 16;
constexpr int kBlock = 32;        // k covered by one activation scale
constexpr int kCacheBlock = 16;   // tokens in one block of the paged KV cache

enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, kFormats };

// weight = scale * (code - zero), minus or plus a minimum.
template <int MaxCode, int Zero, int MinimumSign, int Scales, bool Super>
struct BlockFormat {
    static constexpr int max_code = MaxCode, zero = Zero, minimum_sign = MinimumSign, scales = Scales;
    static constexpr bool super = Super, has_minimum = MinimumSign != 0;
    static constexpr int bits = MaxCode < 16 ? 4 : 8;
    static constexpr int code_bytes = kLanes * kBlock * bits / 8;
    static constexpr int blocks = Super ? 8 : 1;
    static constexpr int base_bytes = kLanes * 2 * (has_minimum ? 2 : 1);
    static constexpr int sub_bytes = Super ? kLanes * (Scales + (has_minimum ? 1 : 0)) : 0;
    static constexpr int header_bytes = base_bytes + sub_bytes * (Super ? 8 : 0);
    static Index headers_bytes(Index k) { return (k / (kBlock * blocks) * header_bytes + 63) / 64 * 64; }
    static Index panel_bytes(Index k) { return headers_bytes(k) + k / kBlock * code_bytes; }
};

using FormatQ4_0 = BlockFormat<15, 8, 0, 1, false>;
using FormatQ4_1 = BlockFormat<15, 0, 1, 1, false>;
using FormatQ5_0 = BlockFormat<31, 16, 0, 1, false>;
using FormatQ5_1 = BlockFormat<31, 0, 1, 1, false>;
using FormatQ8_0 = BlockFormat<255, 128, 0, 1, false>;
using FormatQ4_K = BlockFormat<15, 0, -1, 1, true>;
using FormatQ5_K = BlockFormat<31, 0, -1, 1, true>;
using FormatQ6_K = BlockFormat<63, 32, 0, 2, true>;

// Calls visit(FormatX{}) for a block format; returns a value-initialised result for a dense one.
template <class Visit>
inline auto with_block_format(int format, Visit&& visit) -> decltype(visit(FormatQ4_0{})) {
    switch (format) {
        case Q4_0: return visit(FormatQ4_0{});
        case Q4_1: return visit(FormatQ4_1{});
        case Q5_0: return visit(FormatQ5_0{});
        case Q5_1: return visit(FormatQ5_1{});
        case Q8_0: return visit(FormatQ8_0{});
        case Q4_K: return visit(FormatQ4_K{});
        case Q5_K: return visit(FormatQ5_K{});
        case Q6_K: return visit(FormatQ6_K{});
        default: return decltype(visit(FormatQ4_0{}))();
    }
}

inline int dense_bytes(int format) { return format == F32 ? 4 : format <= BF16 ? 2 : 0; }

inline Index panel_bytes(int format, Index k) {
    if (dense_bytes(format)) return k * kLanes * dense_bytes(format);
    return with_block_format(format, [&](auto f) { return decltype(f)::panel_bytes(k); });
}

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

inline uint16_t float_to_bf16(float value) {  // to nearest even; a NaN stays a NaN
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// To nearest, ties to even; what is larger than 448, a NaN too, becomes 448.
inline uint8_t float_to_e4m3(float value) {
    const uint32_t bits = float_to_bits(value), size = bits & 0x7fffffffu;
    const uint8_t sign = uint8_t(bits >> 24 & 0x80);
    if (size >= 0x43e00000u) return uint8_t(sign | 0x7e);
    if (size < 0x3c800000u)  // below 2^-6 codes are 2^-9 apart, as are numbers from 2^14 on
        return uint8_t(sign | (float_to_bits(bits_to_float(size) + 16384.0f) - 0x46800000u));
    return uint8_t(sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3)));
}

inline float f16_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // The exponent is rebiased by an exact multiplication, which also handles subnormals.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));
}

}  // namespace

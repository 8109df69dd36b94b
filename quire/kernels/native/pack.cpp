// GGUF blocks (layouts as in ggml's specification of the formats) to panels, and rows back again.
#include "formats.h"
#include "kernels.h"
#include "pool.h"

namespace quire {
namespace {

// One block of 32 weights on its way from GGUF to a panel.
struct Source {
    uint8_t codes[kBlock];
    uint16_t scale, minimum;            // fp16, of the block or of the super-block
    uint8_t scale_codes[2], minimum_code;  // K-quants only
};

uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

void split_nibbles(const uint8_t* bytes, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) {
        codes[i] = bytes[i] & 15;
        codes[i + 16] = bytes[i] >> 4;
    }
}

Source read(FormatQ4_0, const uint8_t* row, Index block) {
    const uint8_t* p = row + block * 18;
    Source s{};
    s.scale = load_u16(p);
    split_nibbles(p + 2, s.codes);
    return s;
}

Source read(FormatQ4_1, const uint8_t* row, Index block) {
    const uint8_t* p = row + block * 20;
    Source s{};
    s.scale = load_u16(p);
    s.minimum = load_u16(p + 2);
    split_nibbles(p + 4, s.codes);
    return s;
}

void add_fifth_bits(const uint8_t* bits, uint8_t* codes) {
    for (int i = 0; i < kBlock; ++i) codes[i] = uint8_t(codes[i] | ((bits[i / 8] >> (i % 8)) & 1) << 4);
}

Source read(FormatQ5_0, const uint8_t* row, Index block) {
    const uint8_t* p = row + block * 22;
    Source s{};
    s.scale = load_u16(p);
    split_nibbles(p + 6, s.codes);
    add_fifth_bits(p + 2, s.codes);
    return s;
}

Source read(FormatQ5_1, const uint8_t* row, Index block) {
    const uint8_t* p = row + block * 24;
    Source s{};
    s.scale = load_u16(p);
    s.minimum = load_u16(p + 2);
    split_nibbles(p + 8, s.codes);
    add_fifth_bits(p + 4, s.codes);
    return s;
}

Source read(FormatQ8_0, const uint8_t* row, Index block) {
    const uint8_t* p = row + block * 34;
    Source s{};
    s.scale = load_u16(p);
    for (int i = 0; i < kBlock; ++i) s.codes[i] = p[2 + i] ^ 0x80;  // two's complement to excess 128
    return s;
}

// Eight 6-bit scales and eight 6-bit minima in twelve bytes.
void read_six_bit(const uint8_t* p, int j, Source& s) {
    if (j < 4) {
        s.scale_codes[0] = p[j] & 63;
        s.minimum_code = p[j + 4] & 63;
    } else {
        s.scale_codes[0] = uint8_t((p[j + 4] & 15) | (p[j - 4] >> 6) << 4);
        s.minimum_code = uint8_t((p[j + 4] >> 4) | (p[j] >> 6) << 4);
    }
}

Source read(FormatQ4_K, const uint8_t* row, Index block) {
    const uint8_t* p = row + block / 8 * 144;
    const int j = int(block % 8);
    Source s{};
    s.scale = load_u16(p);
    s.minimum = load_u16(p + 2);
    read_six_bit(p + 4, j, s);
    const uint8_t* low = p + 16 + j / 2 * 32;
    for (int i = 0; i < kBlock; ++i) s.codes[i] = uint8_t(low[i] >> (j % 2 * 4)) & 15;
    return s;
}

Source read(FormatQ5_K, const uint8_t* row, Index block) {
    const uint8_t* p = row + block / 8 * 176;
    const int j = int(block % 8);
    Source s{};
    s.scale = load_u16(p);
    s.minimum = load_u16(p + 2);
    read_six_bit(p + 4, j, s);
    const uint8_t *high = p + 16, *low = p + 48 + j / 2 * 32;
    for (int i = 0; i < kBlock; ++i)
        s.codes[i] = uint8_t(((low[i] >> (j % 2 * 4)) & 15) | ((high[i] >> j) & 1) << 4);
    return s;
}

Source read(FormatQ6_K, const uint8_t* row, Index block) {
    const uint8_t* p = row + block / 8 * 210;
    const int j = int(block % 8), half = j / 4, quarter = j % 4;
    Source s{};
    s.scale = load_u16(p + 208);
    s.scale_codes[0] = p[192 + 2 * j];
    s.scale_codes[1] = p[193 + 2 * j];
    const uint8_t *low = p + half * 64 + quarter % 2 * 32, *high = p + 128 + half * 32;
    for (int i = 0; i < kBlock; ++i)
        s.codes[i] = uint8_t(((low[i] >> (quarter / 2 * 4)) & 15) | ((high[i] >> (2 * quarter)) & 3) << 4);
    return s;
}

template <class F>
void put_codes(const uint8_t* codes, uint8_t* group, int lane) {
    for (int g = 0; g < F::bits; ++g, group += 64) {
        uint8_t four[4];
        for (int i = 0; i < 4; ++i)
            four[i] = F::bits == 4 ? uint8_t(codes[4 * g + i] | codes[4 * g + i + 16] << 4) : codes[4 * g + i];
        std::memcpy(group + lane * 4, four, 4);
    }
}

template <class F>
uint8_t get_code(const uint8_t* group, int lane, int i) {
    if (F::bits == 8) return group[i / 4 * 64 + lane * 4 + i % 4];
    const uint8_t byte = group[i % 16 / 4 * 64 + lane * 4 + i % 4];
    return i < 16 ? byte & 15 : byte >> 4;
}

template <class F>
void pack_lane(const uint8_t* row, Index k, uint8_t* panel, int lane) {
    uint8_t* codes = panel + F::headers_bytes(k);
    for (Index block = 0; block < k / kBlock; ++block) {
        const Source s = read(F{}, row, block);
        uint8_t* header = panel + block / F::blocks * F::header_bytes;
        std::memcpy(header + lane * 2, &s.scale, 2);
        if (F::has_minimum) std::memcpy(header + kLanes * 2 + lane * 2, &s.minimum, 2);
        if (F::super) {
            uint8_t* sub = header + F::base_bytes + block % 8 * F::sub_bytes + lane;
            for (int i = 0; i < F::scales; ++i) sub[i * kLanes] = s.scale_codes[i];
            if (F::has_minimum) sub[F::scales * kLanes] = s.minimum_code;
        }
        put_codes<F>(s.codes, codes + block * F::code_bytes, lane);
    }
}

// The fp32 operations and their order are those of the formats' definition, so that an embedding
// row equals the dequantised row to the last bit.
template <class F>
void unpack_lane(const uint8_t* panel, Index k, int lane, float factor, float* out) {
    const uint8_t* codes = panel + F::headers_bytes(k);
    for (Index block = 0; block < k / kBlock; ++block) {
        const uint8_t* header = panel + block / F::blocks * F::header_bytes;
        const uint8_t* sub = header + F::base_bytes + block % 8 * F::sub_bytes + lane;
        const float base = f16_to_float(load_u16(header + lane * 2));
        float minimum = F::has_minimum ? F::minimum_sign * f16_to_float(load_u16(header + kLanes * 2 + lane * 2)) : 0;
        if (F::super && F::has_minimum) minimum *= sub[F::scales * kLanes];
        for (int i = 0; i < kBlock; ++i) {
            float scale = base;
            if (F::super) {
                const uint8_t code = sub[F::scales == 2 ? i / 16 * kLanes : 0];
                scale *= F::scales == 2 ? float(int8_t(code)) : float(code);
            }
            float value = scale * float(get_code<F>(codes + block * F::code_bytes, lane, i) - F::zero);
            if (F::has_minimum) value += minimum;
            out[block * kBlock + i] = value * factor;
        }
    }
}

template <class T>
void pack_dense_panel(const uint8_t* source, Index row_bytes, int lanes, Index k, T* panel) {
    constexpr Index kStep = 32;  // a tile of 16 rows x 32 k stays in the first-level cache
    for (Index first = 0; first < k; first += kStep) {
        const Index last = first + kStep < k ? first + kStep : k;
        for (int lane = 0; lane < lanes; ++lane) {
            const T* row = reinterpret_cast<const T*>(source + lane * row_bytes);
            for (Index i = first; i < last; ++i) panel[i * kLanes + lane] = row[i];
        }
    }
}

void unpack_dense_lane(int format, const uint8_t* panel, Index k, int lane, float factor, float* out) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(panel) + lane;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel) + lane;
    for (Index i = 0; i < k; ++i) {
        const float value = format == F32   ? bits_to_float(words[i * kLanes])
                            : format == F16 ? f16_to_float(halves[i * kLanes])
                                            : bf16_to_float(halves[i * kLanes]);
        out[i] = value * factor;
    }
}

}  // namespace

void pack_rows(int format, const uint8_t* source, Index row_bytes, Index n, Index k, uint8_t* packed) {
    const Index bytes = panel_bytes(format, k);
    parallel_for(ceil_div(n, kLanes), [&](Index index) {
        uint8_t* panel = packed + index * bytes;
        const uint8_t* rows = source + index * kLanes * row_bytes;
        const int lanes = int(n - index * kLanes < kLanes ? n - index * kLanes : kLanes);
        if (lanes < kLanes) std::memset(panel, 0, size_t(bytes));  // the missing rows are zeros
        if (format == F32) return pack_dense_panel(rows, row_bytes, lanes, k, reinterpret_cast<uint32_t*>(panel));
        if (dense_bytes(format)) return pack_dense_panel(rows, row_bytes, lanes, k, reinterpret_cast<uint16_t*>(panel));
        with_block_format(format, [&](auto f) {
            for (int lane = 0; lane < lanes; ++lane) pack_lane<decltype(f)>(rows + lane * row_bytes, k, panel, lane);
        });
    });
}

void unpack_rows(int format, const uint8_t* packed, Index k, const int64_t* ids, Index count, float scale, float* out) {
    const Index bytes = panel_bytes(format, k);
    parallel_rows(count, 8 * k, [&](Index first, Index last) {
        for (Index i = first; i < last; ++i) {
            const uint8_t* panel = packed + ids[i] / kLanes * bytes;
            const int lane = int(ids[i] % kLanes);
            float* row = out + i * k;
            if (dense_bytes(format)) unpack_dense_lane(format, panel, k, lane, scale, row);
            else with_block_format(format, [&](auto f) { unpack_lane<decltype(f)>(panel, k, lane, scale, row); });
        }
    });
}

}  // namespace quire

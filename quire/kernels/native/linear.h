// x * W^T for every weight format. One tile is one panel of 16 outputs times R rows; how many rows
// share a tile changes with M, the sequence of roundings behind one output never does.
#pragma once

namespace {

// Calls run(integral constant R) for the smallest tile height that holds `rows`.
template <int R>
struct Constant {
    static constexpr int value = R;
};
template <int Max, class Run>
inline void with_height(int rows, Run&& run) {
    if constexpr (Max > 8) {
        if (rows > 8) return run(Constant<12>{});
    }
    if constexpr (Max > 4) {
        if (rows > 4) return run(Constant<8>{});
    }
    if (rows > 2) return run(Constant<4>{});
    if (rows > 1) return run(Constant<2>{});
    run(Constant<1>{});
}

inline int padded_height(int max, int rows) {
    for (int height : {1, 2, 4, 8, 12})
        if (rows <= height && height <= max) return height;
    return max;
}

inline void store_outputs(const quire::LinearArgs& a, Index row, Index panel, F value) {
    const Index column = panel * kLanes, left = a.n - column;
    float* out = a.out + row * a.out_stride + column;
    if (left >= kLanes) {
        if (a.bias) value = add(value, load(a.bias + column));
        store(out, value);
    } else {
        if (a.bias) value = add(value, load_part(a.bias + column, left));
        store_part(out, value, left);
    }
}

template <int P, int R>
inline void store_tile(const quire::LinearArgs& a, Index first_row, int rows, Index first_panel, const F (&acc)[P][R]) {
    QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r)
        if (r < rows) store_outputs(a, first_row + r, first_panel + p, acc[p][r]);
}

// How rows and panels are cut into chunks of work. Results do not depend on it.
struct Plan {
    static constexpr int kPanels = 4;  // a multiple of what any tile takes together
    int max_height;
    Index tiles, tiles_per_group, groups;    // rows
    Index panels, panels_per_part, parts;    // outputs
    Index tile_bytes;

    Plan(const quire::LinearArgs& a, Index bytes_per_row)
        : max_height(padded_height(kMaxLinearRows, a.rows < kMaxLinearRows ? int(a.rows) : kMaxLinearRows)) {
        constexpr Index kGroupBytes = 384 << 10;  // activations of one group stay in the second-level cache
        constexpr Index kPartBytes = 128 << 10;   // weights per chunk: long enough to stream
        tile_bytes = (max_height * bytes_per_row + 63) / 64 * 64;
        tiles = ceil_div(a.rows, max_height);
        tiles_per_group = kGroupBytes / tile_bytes > 0 ? kGroupBytes / tile_bytes : 1;
        if (tiles_per_group > tiles) tiles_per_group = tiles;
        groups = ceil_div(tiles, tiles_per_group);
        panels = ceil_div(a.n, kLanes);
        const Index bytes = panel_bytes(int(a.format), a.k);
        const Index wanted = ceil_div(Index(6) * quire::thread_count(), groups), streamed = panels * bytes / kPartBytes;
        parts = wanted > streamed ? wanted : streamed;
        // A part of fewer bytes than this (times rows) is not worth another thread's attention.
        const Index floor = a.rows >= 16 ? 2 << 10 : 16 << 10;
        const Index most = panels * bytes / floor + 1;
        if (parts > most) parts = most;
        panels_per_part = ceil_div(ceil_div(panels, parts), kPanels) * kPanels;
        parts = ceil_div(panels, panels_per_part);
    }

    int rows_of(const quire::LinearArgs& a, Index tile) const {
        const Index left = a.rows - tile * max_height;
        return int(left < max_height ? left : max_height);
    }

    // run(tile, first panel, last panel): a part's weights stay in the second-level cache for all tiles.
    template <class Run>
    void execute(Run&& run) const {
        parallel_for(groups * parts, [&](Index chunk) {
            const Index group = chunk / parts, first = chunk % parts * panels_per_part;
            const Index last = first + panels_per_part < panels ? first + panels_per_part : panels;
            const Index first_tile = group * tiles_per_group;
            const Index last_tile = first_tile + tiles_per_group < tiles ? first_tile + tiles_per_group : tiles;
            for (Index tile = first_tile; tile < last_tile; ++tile) run(tile, first, last);
        });
    }
};

// ---- block formats: activations as int16 with one fp32 scale per 32 ----
//
// Sixteen bits rather than eight: with an error 256 times smaller, greedy text stays that of fp32,
// at no cost where memory is the limit. A block's sum of 32 products of 16 and 8 bits fits int32.
constexpr float kLargestCode = 32767;

// One block of a tile of R rows: codes[R][32], scale[R], scaled_sum[R], initial[2][R].
constexpr Index kBytesPerRowBlock = 2 * kBlock + 16;

struct QuantisedBlock {
    int16_t* codes;
    float *scale, *scaled_sum;
    int32_t* initial;  // what the sums of each half start with: minus zero times the sum of the codes
    QuantisedBlock(uint8_t* tile, Index block, int rows) {
        uint8_t* p = tile + block * rows * kBytesPerRowBlock;
        codes = reinterpret_cast<int16_t*>(p);
        scale = reinterpret_cast<float*>(p + 2 * rows * kBlock);
        scaled_sum = scale + rows;
        initial = reinterpret_cast<int32_t*>(scaled_sum + rows);
    }
};

template <class Format>
void quantise_tile(const quire::LinearArgs& a, Index first_row, int rows, int height, uint8_t* tile) {
    for (Index block = 0; block < a.k / kBlock; ++block) {
        const QuantisedBlock q(tile, block, height);
        for (int r = 0; r < height; ++r) {
            const float* x = a.x + (first_row + (r < rows ? r : 0)) * a.x_stride + block * kBlock;
            const F x0 = load(x), x1 = load(x + 16);
            const float largest = max_lanes(max(absolute(x0), absolute(x1)));
            // x * 0 is a NaN exactly for infinities and NaNs. Such a block has the scale NaN, which
            // makes every output of the row a NaN; its codes are zeros.
            const bool finite = !any_nan(fma(x1, zero(), mul(x0, zero())));
            // Below 1e-34 the inverse would overflow: such a block counts as zeros.
            const float inverse = finite && largest > 1e-34f ? kLargestCode / largest : 0.0f;
            const float scale = !finite ? bits_to_float(0x7fc00000u) : inverse > 0 ? largest / kLargestCode : 0.0f;
            const F keep = splat(inverse);
            const F q0 = finite ? round_even(mul(x0, keep)) : zero(), q1 = finite ? round_even(mul(x1, keep)) : zero();
            int16_t* codes = q.codes + r * kBlock;
            const int sum0 = store_pairs(codes, q0), sum1 = store_pairs(codes + 16, q1);
            q.scale[r] = scale;
            q.scaled_sum[r] = scale * float(sum0 + sum1);
            q.initial[r] = -Format::zero * (Format::scales == 2 ? sum0 : sum0 + sum1);
            q.initial[height + r] = -Format::zero * sum1;
        }
    }
}

// Exact dot products of one block: consume(h, p, r, sum) for each half-block h with a scale of its
// own (one "half" if the block has one scale), panel p of P and row r of a tile of R. codes: the
// block in the first panel, panel_stride bytes from the next.
template <class Format, int P, int R, class Consume>
inline void block_dots(const uint8_t* codes, Index panel_stride, const QuantisedBlock& q, Consume&& consume) {
    constexpr int kPairs = 16 / Format::scales;
    QUIRE_UNROLL for (int h = 0; h < Format::scales; ++h) {
        I sum[P][R];
        QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r)
            sum[p][r] = integers(Format::zero ? q.initial[h * R + r] : 0);
        QUIRE_UNROLL for (int j = h * kPairs; j < (h + 1) * kPairs; ++j) {
            I w[P];
            QUIRE_UNROLL for (int p = 0; p < P; ++p) w[p] = code_pairs<Format>(codes + p * panel_stride, j);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) {
                int32_t pair;
                std::memcpy(&pair, q.codes + r * kBlock + 2 * j, 4);
                QUIRE_UNROLL for (int p = 0; p < P; ++p) sum[p][r] = dot_pairs(sum[p][r], w[p], pair);
            }
        }
        QUIRE_UNROLL for (int r = 0; r < R; ++r) QUIRE_UNROLL for (int p = 0; p < P; ++p) consume(h, p, r, sum[p][r]);
    }
}

// P panels times R rows.
template <class Format, int P, int R>
void block_tile(const uint8_t* panel, const uint8_t* tile, Index k, F (&acc)[P][R]) {
    const Index stride = Format::panel_bytes(k);
    const uint8_t *header = panel, *codes = panel + Format::headers_bytes(k);
    QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r) acc[p][r] = zero();
    for (Index block = 0; block < k / kBlock; header += Format::header_bytes) {
        const uint8_t* sub = header + Format::base_bytes;
        for (int i = 0; i < Format::blocks; ++i, ++block, codes += Format::code_bytes, sub += Format::sub_bytes) {
            F scale[P][2], minimum[P];
            QUIRE_UNROLL for (int p = 0; p < P; ++p) {
                const uint8_t *base = header + p * stride, *code = sub + p * stride;
                scale[p][0] = load_f16(base);
                if constexpr (Format::scales == 2) {
                    scale[p][1] = mul(scale[p][0], load_s8(code + kLanes));
                    scale[p][0] = mul(scale[p][0], load_s8(code));
                } else if constexpr (Format::super) {
                    scale[p][0] = mul(scale[p][0], load_u8(code));
                }
                if constexpr (Format::has_minimum) minimum[p] = load_f16(base + kLanes * 2);
                if constexpr (Format::super && Format::has_minimum) minimum[p] = mul(minimum[p], load_u8(code + Format::scales * kLanes));
            }
            // Memory-bound: stay ahead of the hardware prefetcher, which stops at a page's end.
            if constexpr (R <= 4)
                QUIRE_UNROLL for (int line = 0; line < Format::code_bytes; line += 64) prefetch(codes + 2048 + line);
            const QuantisedBlock q(const_cast<uint8_t*>(tile), block, R);
            block_dots<Format, P, R>(codes, stride, q, [&](int h, int p, int r, I dots) {
                F sum = fma(to_float(dots), mul(scale[p][h], splat(q.scale[r])), acc[p][r]);
                if (h == Format::scales - 1) {
                    if constexpr (Format::minimum_sign > 0) sum = fma(minimum[p], splat(q.scaled_sum[r]), sum);
                    if constexpr (Format::minimum_sign < 0) sum = fnma(minimum[p], splat(q.scaled_sum[r]), sum);
                }
                acc[p][r] = sum;
            });
        }
    }
}

// Calls compute(integral constant P, first panel) over panels first..last-1, P at a time.
template <int P, class Compute>
inline void in_panels(Index first, Index last, Compute&& compute) {
    for (; first + P <= last; first += P) compute(Constant<P>{}, first);
    for (; first < last; ++first) compute(Constant<1>{}, first);
}

template <class Format>
void block_linear(const quire::LinearArgs& a) {
    const Plan plan(a, a.k / kBlock * kBytesPerRowBlock);
    uint8_t* tiles = static_cast<uint8_t*>(quire::thread_scratch(0, plan.tiles * plan.tile_bytes));
    parallel_rows(plan.tiles, plan.max_height * a.k, [&](Index first, Index last) {
        for (Index tile = first; tile < last; ++tile) {
            const int rows = plan.rows_of(a, tile);
            quantise_tile<Format>(a, tile * plan.max_height, rows, padded_height(kMaxLinearRows, rows), tiles + tile * plan.tile_bytes);
        }
    });
    const Index bytes = Format::panel_bytes(a.k);
    plan.execute([&](Index tile, Index first_panel, Index last_panel) {
        const int rows = plan.rows_of(a, tile);
        with_height<kMaxLinearRows>(rows, [&](auto height) {
            constexpr int R = decltype(height)::value;
            in_panels<panels_of(R)>(first_panel, last_panel, [&](auto count, Index panel) {
                constexpr int P = decltype(count)::value;
                F acc[P][R];
                block_tile<Format, P, R>(a.weight + panel * bytes, tiles + tile * plan.tile_bytes, a.k, acc);
                store_tile(a, tile * plan.max_height, rows, panel, acc);
            });
        });
    });
}

// ---- dense weights: one chain of fused multiply-adds over k, in order ----

struct DenseF32 {
    using Stored = float;
    static F load_weights(const float* p) { return load(p); }
};
struct DenseF16 {
    using Stored = uint16_t;
    static F load_weights(const uint16_t* p) { return load_f16(p); }
};
struct DenseBF16 {
    using Stored = uint16_t;
    static F load_weights(const uint16_t* p) { return load_bf16(p); }
};

// x: [k][R]
template <class Dense, int P, int R>
void dense_tile(const typename Dense::Stored* panels, const float* x, Index k, F (&acc)[P][R]) {
    QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r) acc[p][r] = zero();
    for (Index i = 0; i < k; ++i) {
        F w[P];
        QUIRE_UNROLL for (int p = 0; p < P; ++p) {
            const auto* at = panels + p * k * kLanes + i * kLanes;
            if constexpr (R <= 2) prefetch(at + 512);
            w[p] = Dense::load_weights(at);
        }
        QUIRE_UNROLL for (int r = 0; r < R; ++r) {
            const F xi = splat(x[i * R + r]);
            QUIRE_UNROLL for (int p = 0; p < P; ++p) acc[p][r] = fma(xi, w[p], acc[p][r]);
        }
    }
}

template <class Dense>
void dense_linear(const quire::LinearArgs& a) {
    const Plan plan(a, a.k * 4);
    float* tiles = static_cast<float*>(quire::thread_scratch(0, plan.tiles * plan.tile_bytes));
    parallel_rows(plan.tiles, plan.max_height * a.k, [&](Index first, Index last) {
        for (Index tile = first; tile < last; ++tile) {
            const int rows = plan.rows_of(a, tile), height = padded_height(kMaxLinearRows, rows);
            float* to = tiles + tile * plan.tile_bytes / 4;
            for (int r = 0; r < height; ++r) {
                const float* x = a.x + (tile * plan.max_height + (r < rows ? r : 0)) * a.x_stride;
                for (Index i = 0; i < a.k; ++i) to[i * height + r] = x[i];
            }
        }
    });
    const auto* weight = reinterpret_cast<const typename Dense::Stored*>(a.weight);
    plan.execute([&](Index tile, Index first_panel, Index last_panel) {
        const int rows = plan.rows_of(a, tile);
        with_height<kMaxLinearRows>(rows, [&](auto height) {
            constexpr int R = decltype(height)::value;
            in_panels<dense_panels_of(R)>(first_panel, last_panel, [&](auto count, Index panel) {
                constexpr int P = decltype(count)::value;
                F acc[P][R];
                dense_tile<Dense, P, R>(weight + panel * a.k * kLanes, tiles + tile * plan.tile_bytes / 4, a.k, acc);
                store_tile(a, tile * plan.max_height, rows, panel, acc);
            });
        });
    });
}

void linear(const quire::LinearArgs& a) {
    if (a.format == F32) return dense_linear<DenseF32>(a);
    if (a.format == F16) return dense_linear<DenseF16>(a);
    if (a.format == BF16) return dense_linear<DenseBF16>(a);
    with_block_format(int(a.format), [&](auto format) { block_linear<decltype(format)>(a); });
}

}  // namespace

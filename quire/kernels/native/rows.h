// Operations on single rows: norms, rotary embedding with the cache write, activations, reductions.
#pragma once

#include <cfloat>
#include <cmath>

namespace {

// body(offset, lanes in use) over a row of `width`; the last step may be shorter than 16.
template <class Body>
inline void for_lanes(Index width, Body&& body) {
    Index i = 0;
    for (; i + kLanes <= width; i += kLanes) body(i, Index(kLanes));
    if (i < width) body(i, width - i);
}

inline F load_lanes(const float* p, Index n) { return n == kLanes ? load(p) : load_part(p, n); }
inline void store_lanes(float* p, F x, Index n) { n == kLanes ? store(p, x) : store_part(p, x, n); }

// 1 / sqrt(mean of squares + epsilon), summed in sixteen lanes times two.
inline float inverse_rms(const float* x, Index width, double epsilon) {
    F even = zero(), odd = zero();
    Index i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
        const F a = load(x + i), b = load(x + i + kLanes);
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    for (; i < width; i += kLanes) {
        const F a = load_lanes(x + i, width - i < kLanes ? width - i : kLanes);
        even = fma(a, a, even);
    }
    const float mean = sum_lanes(add(even, odd)) / float(width);
    return 1.0f / std::sqrt(mean + float(epsilon));
}

inline void norm_row(const float* x, const float* weight, Index width, double epsilon, float* out) {
    const F inverse = splat(inverse_rms(x, width, epsilon));
    for_lanes(width, [&](Index i, Index n) {
        store_lanes(out + i, mul(mul(load_lanes(x + i, n), inverse), load_lanes(weight + i, n)), n);
    });
}

void norm(const quire::NormArgs& a) {
    parallel_rows(a.rows, a.width, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const float* x = a.x + row * a.x_stride;
            if (a.residual) {
                float* residual = a.residual + row * a.width;
                for_lanes(a.width, [&](Index i, Index n) {
                    store_lanes(residual + i, add(load_lanes(residual + i, n), load_lanes(x + i, n)), n);
                });
                x = residual;
            }
            norm_row(x, a.weight, a.width, a.epsilon, a.out + row * a.width);
        }
    });
}

// Rotates pairs (i, i + half), the "rotate half" convention; elements past rotary_size stay.
inline void rotate(float* head, const float* cosine, const float* sine, Index half) {
    for_lanes(half, [&](Index i, Index n) {
        const F a = load_lanes(head + i, n), b = load_lanes(head + half + i, n);
        const F c = load_lanes(cosine + i, n), s = load_lanes(sine + i, n);
        store_lanes(head + i, fnma(b, s, mul(a, c)), n);
        store_lanes(head + half + i, fma(a, s, mul(b, c)), n);
    });
}

inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = float_to_bf16(value); }

// Writes values `step` apart into head `head` of the cache, counted over blocks, from `first` on.
template <class Stored>
inline void put_head(void* cache, Index head, Index first, Index step, Index, const float*, const float* x, Index d) {
    Stored* to = static_cast<Stored*>(cache) + head * d * kCacheBlock + first;
    for (Index i = 0; i < d; ++i) put(to + i * step, x[i]);
}

// As codes, and the scale of the `token` of the block, which is NaN where a value is not finite.
template <>
inline void put_head<uint8_t>(void* cache, Index head, Index first, Index step, Index token, const float* fixed, const float* x, Index d) {
    uint8_t* block = static_cast<uint8_t*>(cache) + head * (d + quire::kScaleBytes) * kCacheBlock;
    float largest = 0;
    for (Index i = 0; i < d; ++i) {
        const float size = std::fabs(x[i]);
        if (size > largest || size != size) largest = size;
    }
    float scale = fixed ? *fixed : largest / 448.0f;
    if (scale < FLT_MIN) scale = FLT_MIN;
    if (!(largest <= FLT_MAX)) scale = NAN;
    const float inverse = 1.0f / scale;
    for (Index i = 0; i < d; ++i) block[first + i * step] = float_to_e4m3(x[i] * inverse);
    std::memcpy(block + d * kCacheBlock + token * quire::kScaleBytes, &scale, quire::kScaleBytes);
}

template <class Stored>
void rotary_row(const quire::RotaryArgs& a, Index row) {
    const Index d = a.head_size;
    const float* in = a.qkv + row * (a.query_heads + 2 * a.kv_heads) * d;
    const float* cosine = a.cos_sin + a.positions[row] * a.rotary_size;
    const auto prepare = [&](const float* head, const float* weight, float* out) {
        if (weight) norm_row(head, weight, d, a.epsilon, out);
        else if (out != head) std::memcpy(out, head, size_t(d) * 4);
        if (a.rotary_size) rotate(out, cosine, cosine + a.rotary_size / 2, a.rotary_size / 2);
    };
    for (Index h = 0; h < a.query_heads; ++h) prepare(in + h * d, a.q_norm, a.q_out + (row * a.query_heads + h) * d);
    const Index slot = a.slots[row];
    if (slot < 0) return;
    const float *keys = in + a.query_heads * d, *values = keys + a.kv_heads * d;
    for (Index h = 0; h < a.kv_heads; ++h) {
        alignas(64) float key[256];
        prepare(keys + h * d, a.k_norm, key);
        const Index head = slot / kCacheBlock * a.kv_heads + h, token = slot % kCacheBlock;
        const float *k_fixed = a.fixed ? a.fixed + h : nullptr, *v_fixed = a.fixed ? k_fixed + a.kv_heads : nullptr;
        put_head<Stored>(a.k_cache, head, token, kCacheBlock, token, k_fixed, key, d);
        put_head<Stored>(a.v_cache, head, token * d, 1, token, v_fixed, values + h * d, d);
    }
}

void rotary_cache(const quire::RotaryArgs& a) {
    parallel_rows(a.rows, (a.query_heads + 4 * a.kv_heads) * a.head_size, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            if (a.cache_type == quire::kCacheE4M3) rotary_row<uint8_t>(a, row);
            else a.cache_type == quire::kCacheBF16 ? rotary_row<uint16_t>(a, row) : rotary_row<float>(a, row);
        }
    });
}

void gated_activation(const quire::GatedArgs& a) {
    parallel_rows(a.rows, 4 * a.width, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const float *gate = a.x + row * 2 * a.width, *up = gate + a.width;
            float* out = a.out + row * a.width;
            for_lanes(a.width, [&](Index i, Index n) {
                const F x = load_lanes(gate + i, n);
                store_lanes(out + i, mul(a.kind ? gelu_tanh(x) : silu(x), load_lanes(up + i, n)), n);
            });
        }
    });
}

// Largest value of x[0..width); a NaN if there is one.
inline float largest(const float* x, Index width) {
    F best = splat(-INFINITY);
    bool bad = false;
    for_lanes(width, [&](Index i, Index n) {
        F v = load_lanes(x + i, n);
        if (n < kLanes) v = keep_lanes(v, 0, int(n), -INFINITY);
        bad |= any_nan(v);
        best = max(best, v);
    });
    return bad ? NAN : max_lanes(best);
}

void argmax(const quire::ReduceArgs& a) {
    parallel_rows(a.rows, a.width, [&](Index first, Index last) {
        constexpr Index kSegment = 1024;  // only the segment of the winner is searched for its index
        for (Index row = first; row < last; ++row) {
            const float* x = a.x + row * a.x_stride;
            float best = -INFINITY;
            Index index = 0;
            for (Index i = 0; i < a.width && index >= 0; i += kSegment) {
                const float value = largest(x + i, a.width - i < kSegment ? a.width - i : kSegment);
                if (value != value) index = -1;
                else if (value > best) best = value, index = i;
            }
            if (index >= 0)
                while (x[index] != best) ++index;
            static_cast<int64_t*>(a.out)[row] = index;
        }
    });
}

void logsumexp(const quire::ReduceArgs& a) {
    parallel_rows(a.rows, 4 * a.width, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) {
            const float* x = a.x + row * a.x_stride;
            float* out = static_cast<float*>(a.out) + row;
            const float top = largest(x, a.width);
            if (!std::isfinite(top)) {
                *out = top;
                continue;
            }
            double sums[kLanes] = {};
            alignas(64) float terms[kLanes];
            for_lanes(a.width, [&](Index i, Index n) {
                F v = load_lanes(x + i, n);
                if (n < kLanes) v = keep_lanes(v, 0, int(n), -INFINITY);
                store(terms, exp(sub(v, splat(top))));
                for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(terms[lane]);
            });
            double sum = 0;
            for (double s : sums) sum += s;
            *out = float(double(top) + std::log(sum));
        }
    });
}

}  // namespace

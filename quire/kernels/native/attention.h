// Causal attention over the paged cache. A tile is up to kMaxRows rows of (query, head of one KV
// head's group); keys come in blocks of 16 tokens at absolute positions. Softmax runs online inside
// a piece of kPiece tokens, and pieces are merged in order: the cut depends only on positions, so a
// query's bits are the same in prefill, in decode and in any batch.
#pragma once

namespace {

constexpr Index kPiece = 512;
constexpr float kLowest = -3.4028234663852886e38f;

struct CacheF32 {
    using Stored = float;
    static F read(const float* p) { return load(p); }
    static F read_part(const float* p, Index n) { return load_part(p, n); }
};
struct CacheBF16 {
    using Stored = uint16_t;
    static F read(const uint16_t* p) { return load_bf16(p); }
    static F read_part(const uint16_t* p, Index n) { return load_bf16_part(p, n); }
};

// Online softmax of some rows: largest score, sums by position modulo 16, weighted values.
struct Softmax {
    static constexpr int kMaxHead = 256;
    alignas(64) float top[kMaxRows];
    alignas(64) float sums[kMaxRows][kLanes];
    alignas(64) float values[kMaxRows * kMaxHead];  // [rows][padded]

    void clear(int rows, Index padded) {
        for (int r = 0; r < rows; ++r) {
            top[r] = kLowest;
            store(sums[r], zero());
            for (Index i = 0; i < padded; i += kLanes) store(values + r * padded + i, zero());
        }
    }

    // Adds a later piece of row r. (A NaN in it arrives through its sums and values.)
    void merge(const Softmax& later, int r, Index padded) {
        const float joint = top[r] > later.top[r] ? top[r] : later.top[r];
        const F mine = exp(splat(top[r] - joint)), theirs = exp(splat(later.top[r] - joint));
        top[r] = joint;
        store(sums[r], fma(load(later.sums[r]), theirs, mul(load(sums[r]), mine)));
        for (Index i = 0; i < padded; i += kLanes) {
            float* to = values + r * padded + i;
            store(to, fma(load(later.values + r * padded + i), theirs, mul(load(to), mine)));
        }
    }
};

struct Tile {
    Index sequence, kv_head, first;  // first row, counted as query * group + head
    int rows;
    int begin[kMaxRows], end[kMaxRows];  // positions that each row sees
    int first_key, last_key;             // of any row: [first_key, last_key)
    alignas(64) float q[kMaxRows * Softmax::kMaxHead];  // [head_size][R], times the scale
};

inline Index group_size(const quire::AttentionArgs& a) { return a.query_heads / a.kv_heads; }

inline Index row_offset(const quire::AttentionArgs& a, const Tile& t, int r) {
    const Index row = t.first + r, group = group_size(a);
    const Index query = a.query_start[t.sequence] + row / group, head = t.kv_head * group + row % group;
    return (query * a.query_heads + head) * a.head_size;
}

inline void fill_tile(const quire::AttentionArgs& a, Tile& t) {
    const Index queries = a.query_start[t.sequence + 1] - a.query_start[t.sequence], group = group_size(a);
    const Index all = queries * group, left = all - t.first;
    t.rows = int(left < kMaxRows ? left : kMaxRows);
    const int height = padded_height(kMaxRows, t.rows);
    const float scale = float(a.scale);
    for (int r = 0; r < height; ++r) {
        const int row = r < t.rows ? r : t.rows - 1;  // padding repeats the last row
        const Index position = a.context_len[t.sequence] - queries + (t.first + row) / group;
        t.end[r] = int(position + 1);
        t.begin[r] = a.window && position >= a.window ? int(position + 1 - a.window) : 0;
        const float* q = a.q + row_offset(a, t, row);
        for (Index i = 0; i < a.head_size; ++i) t.q[i * height + r] = q[i] * scale;
    }
    t.first_key = t.begin[0];  // positions only grow with r
    t.last_key = t.end[t.rows - 1];
}

// values[rows][.] = values * correction + weights[rows][tokens] * V, tokens in order.
template <class Cache, int R, int J>
inline void add_values(const typename Cache::Stored* v, Index stride, Index lanes, int first, int last,
                       const float* weights, const float* correction, float* values, Index padded) {
    F acc[R][J];
    QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        const F factor = splat(correction[r]);
        QUIRE_UNROLL for (int j = 0; j < J; ++j) acc[r][j] = mul(load(values + r * padded + j * kLanes), factor);
    }
    for (int t = first; t < last; ++t) {
        F row[J];
        QUIRE_UNROLL for (int j = 0; j < J; ++j)
            row[j] = lanes < kLanes ? Cache::read_part(v + t * stride, lanes) : Cache::read(v + t * stride + j * kLanes);
        QUIRE_UNROLL for (int r = 0; r < R; ++r) {
            const F weight = splat(weights[r * kLanes + t]);
            QUIRE_UNROLL for (int j = 0; j < J; ++j) acc[r][j] = fma(weight, row[j], acc[r][j]);
        }
    }
    QUIRE_UNROLL for (int r = 0; r < R; ++r) QUIRE_UNROLL for (int j = 0; j < J; ++j)
        store(values + r * padded + j * kLanes, acc[r][j]);
}

template <class Cache, int R>
inline void add_values_wide(const typename Cache::Stored* v, Index head_size, int first, int last,
                            const float* weights, const float* correction, float* values, Index padded) {
    constexpr int J = kMaxRows > 4 ? 4 : 2;
    Index i = 0;
    for (; i + J * kLanes <= head_size; i += J * kLanes)
        add_values<Cache, R, J>(v + i, head_size, kLanes, first, last, weights, correction, values + i, padded);
    for (; i + kLanes <= head_size; i += kLanes)
        add_values<Cache, R, 1>(v + i, head_size, kLanes, first, last, weights, correction, values + i, padded);
    if (i < head_size)  // a partial read: the row after the last one may be another's memory
        add_values<Cache, R, 1>(v + i, head_size, head_size - i, first, last, weights, correction, values + i, padded);
}

inline int clamp_to_block(int position) { return position < 0 ? 0 : position > kCacheBlock ? kCacheBlock : position; }

template <class Cache, int R>
void attend_block(const quire::AttentionArgs& a, const Tile& t, const typename Cache::Stored* k,
                  const typename Cache::Stored* v, int base, Softmax& state, Index padded) {
    F scores[R];
    QUIRE_UNROLL for (int r = 0; r < R; ++r) scores[r] = zero();
    for (Index i = 0; i < a.head_size; ++i) {
        const F key = Cache::read(k + i * kCacheBlock);
        QUIRE_UNROLL for (int r = 0; r < R; ++r) scores[r] = fma(splat(t.q[i * R + r]), key, scores[r]);
    }
    if (a.softcap > 0) {
        const F cap = splat(float(a.softcap)), inverse = splat(float(1.0 / a.softcap));
        for (int r = 0; r < R; ++r) scores[r] = mul(cap, tanh(mul(scores[r], inverse)));
    }
    // Rows see the same keys of this block unless the diagonal or the window's edge runs through it.
    const int first = clamp_to_block(t.begin[0] - base), last = clamp_to_block(t.end[0] - base);
    const bool uniform = first == clamp_to_block(t.begin[R - 1] - base) && last == clamp_to_block(t.end[R - 1] - base);
    if (!uniform || first > 0 || last < kCacheBlock)
        QUIRE_UNROLL for (int r = 0; r < R; ++r)
            scores[r] = keep_lanes(scores[r], clamp_to_block(t.begin[r] - base), clamp_to_block(t.end[r] - base), -INFINITY);

    alignas(64) float weights[R * kLanes], correction[kLanes], before[kLanes] = {}, after[kLanes] = {};
    bool raised = false;
    QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        before[r] = state.top[r];
        if (any_greater(scores[r], splat(state.top[r]))) {
            const float here = max_lanes(scores[r]);
            if (here > state.top[r]) state.top[r] = here;
            raised = true;
        }
        after[r] = state.top[r];
    }
    store(correction, raised ? exp(sub(load(before), load(after))) : splat(1.0f));
    QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        const F weight = exp(sub(scores[r], splat(state.top[r])));
        store(weights + r * kLanes, weight);
        store(state.sums[r], fma(load(state.sums[r]), splat(correction[r]), weight));
    }

    constexpr int kStep = R % 4 == 0 ? 4 : R % 3 == 0 ? 3 : R;
    if (uniform) {
        for (int r = 0; r < R; r += kStep)
            add_values_wide<Cache, kStep>(v, a.head_size, first, last, weights + r * kLanes, correction + r, state.values + r * padded, padded);
        return;
    }
    // A key that a row does not see must not reach it even as 0 * NaN.
    for (int r = 0; r < R; ++r) {
        const int from = clamp_to_block(t.begin[r] - base), to = clamp_to_block(t.end[r] - base);
        if (from < to)
            add_values_wide<Cache, 1>(v, a.head_size, from, to, weights + r * kLanes, correction + r, state.values + r * padded, padded);
    }
}

// Keys [first_key, last_key) of one piece, which starts at a multiple of kPiece.
template <class Cache>
void attend_piece(const quire::AttentionArgs& a, const Tile& t, Index piece, Softmax& state, Index padded) {
    using Stored = typename Cache::Stored;
    const Index start = piece * kPiece > t.first_key ? piece * kPiece : t.first_key;
    const Index stop = (piece + 1) * kPiece < t.last_key ? (piece + 1) * kPiece : t.last_key;
    const int32_t* table = a.block_tables + t.sequence * a.table_stride;
    const Index block_size = a.head_size * kCacheBlock;
    with_height<kMaxRows>(t.rows, [&](auto height) {
        constexpr int R = decltype(height)::value;
        state.clear(R, padded);
        for (Index block = start / kCacheBlock; block * kCacheBlock < stop; ++block) {
            const Index at = (table[block] * a.kv_heads + t.kv_head) * block_size;
            attend_block<Cache, R>(a, t, static_cast<const Stored*>(a.k_cache) + at, static_cast<const Stored*>(a.v_cache) + at,
                                   int(block * kCacheBlock), state, padded);
        }
    });
}

// A row without keys in the piece stays as it is, to the bit.
inline void merge_piece(const Tile& t, Index piece, const Softmax& part, Softmax& total, Index padded) {
    for (int r = 0; r < t.rows; ++r)
        if (t.begin[r] < (piece + 1) * kPiece && t.end[r] > piece * kPiece) total.merge(part, r, padded);
}

inline void finish_tile(const quire::AttentionArgs& a, const Tile& t, const Softmax& state, Index padded) {
    for (int r = 0; r < t.rows; ++r) {
        float factor = 1, sum = sum_lanes(load(state.sums[r]));
        if (a.sinks) {  // one more logit in the denominator, with no value
            const float sink = a.sinks[t.kv_head * group_size(a) + (t.first + r) % group_size(a)];
            const float joint = sink > state.top[r] ? sink : state.top[r];
            alignas(64) float parts[kLanes] = {state.top[r] - joint, sink - joint};
            store(parts, exp(load(parts)));
            factor = parts[0];
            sum = sum * factor + parts[1];
        }
        const F scale = splat(factor / sum);
        float* out = a.out + row_offset(a, t, r);
        for_lanes(a.head_size, [&](Index i, Index n) { store_lanes(out + i, mul(load(state.values + r * padded + i), scale), n); });
    }
}

inline Index tiles_of(const quire::AttentionArgs& a, Index sequence) {
    return ceil_div((a.query_start[sequence + 1] - a.query_start[sequence]) * group_size(a), kMaxRows);
}

// Finds which (sequence, tile, KV head) a chunk is; the longest contexts of a sequence come first.
inline void locate(const quire::AttentionArgs& a, Index chunk, Tile& t) {
    Index tile = chunk / a.kv_heads;
    t.kv_head = chunk % a.kv_heads;
    for (t.sequence = 0; tile >= tiles_of(a, t.sequence); ++t.sequence) tile -= tiles_of(a, t.sequence);
    t.first = (tiles_of(a, t.sequence) - 1 - tile) * kMaxRows;
    fill_tile(a, t);
}

template <class Cache>
void attention_with(const quire::AttentionArgs& a) {
    const Index padded = ceil_div(a.head_size, kLanes) * kLanes;
    Index tiles = 0, pieces = 1;
    for (Index i = 0; i < a.sequences; ++i) {
        tiles += tiles_of(a, i);
        if (pieces < ceil_div(a.context_len[i], kPiece)) pieces = ceil_div(a.context_len[i], kPiece);
    }
    const Index chunks = tiles * a.kv_heads;
    if (!chunks) return;
    const bool few = pieces > 1 && chunks < Index(4) * quire::thread_count() && quire::thread_count() > 1;
    if (!few) {
        parallel_for(chunks, [&](Index chunk) {
            Tile t;
            locate(a, chunk, t);
            Softmax total, part;
            total.clear(t.rows, padded);
            for (Index piece = t.first_key / kPiece; piece * kPiece < t.last_key; ++piece) {
                attend_piece<Cache>(a, t, piece, part, padded);
                merge_piece(t, piece, part, total, padded);
            }
            finish_tile(a, t, total, padded);
        });
        return;
    }
    // Long contexts, few rows: threads share the pieces of one row; the merge is the same.
    auto* parts = static_cast<Softmax*>(quire::thread_scratch(1, sizeof(Softmax) * (std::size_t)(chunks * pieces)));
    parallel_for(chunks * pieces, [&](Index index) {
        Tile t;
        locate(a, index / pieces, t);
        const Index piece = index % pieces;
        if ((piece + 1) * kPiece > t.first_key && piece * kPiece < t.last_key) attend_piece<Cache>(a, t, piece, parts[index], padded);
    });
    parallel_for(chunks, [&](Index chunk) {
        Tile t;
        locate(a, chunk, t);
        Softmax total;
        total.clear(t.rows, padded);
        for (Index piece = t.first_key / kPiece; piece * kPiece < t.last_key; ++piece)
            merge_piece(t, piece, parts[chunk * pieces + piece], total, padded);
        finish_tile(a, t, total, padded);
    });
}

void attention(const quire::AttentionArgs& a) {
    a.cache_is_bf16 ? attention_with<CacheBF16>(a) : attention_with<CacheF32>(a);
}

}  // namespace

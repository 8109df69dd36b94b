// Causal attention over the paged cache. A tile is up to kMaxRows rows of (query, head of one KV
// head's group). Keys are taken in steps of kStep at absolute positions, with an online softmax
// inside a piece of kPiece keys; pieces are merged in order. The cut depends only on positions, so
// a query's bits are the same in prefill, in decode and in any batch.
#pragma once

namespace {

constexpr Index kPiece = 512;
constexpr int kStepBlocks = 4, kStep = kStepBlocks * kCacheBlock;
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

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

constexpr int largest_divisor(int of, int limit) { return of <= limit ? of : of % limit == 0 ? limit : largest_divisor(of, limit - 1); }

// The blocks that a tile needs of one step of kStep keys.
template <class Cache>
struct Step {
    const typename Cache::Stored *keys[kStepBlocks], *values[kStepBlocks];
    int base;         // position of the step's first key
    int first, last;  // blocks first..last-1 are there
};

// scores[R][kStep]: chains of fused multiply-adds over the head, for P blocks side by side.
template <class Cache, int P, int R>
inline void score_blocks(const Tile& t, const Step<Cache>& step, int block, Index head_size, float* scores) {
    F sum[P][R];
    QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r) sum[p][r] = zero();
    for (Index i = 0; i < head_size; ++i) {
        F key[P];
        QUIRE_UNROLL for (int p = 0; p < P; ++p) key[p] = Cache::read(step.keys[block + p] + i * kCacheBlock);
        QUIRE_UNROLL for (int r = 0; r < R; ++r) {
            const F q = splat(t.q[i * R + r]);
            QUIRE_UNROLL for (int p = 0; p < P; ++p) sum[p][r] = fma(q, key[p], sum[p][r]);
        }
    }
    QUIRE_UNROLL for (int p = 0; p < P; ++p) QUIRE_UNROLL for (int r = 0; r < R; ++r)
        store(scores + r * kStep + (block + p) * kCacheBlock, sum[p][r]);
}

// values[R][.] = values * correction + weights[R][first..last) * V, keys in order; J registers wide.
template <class Cache, int R, int J>
inline void add_values(const Step<Cache>& step, Index column, Index head_size, int first, int last,
                       const float* weights, const float* correction, float* values, Index padded) {
    const Index lanes = head_size - column;  // fewer than 16: a partial read, what follows may be another's
    F acc[R][J];
    QUIRE_UNROLL for (int r = 0; r < R; ++r) {
        const F factor = splat(correction[r]);
        QUIRE_UNROLL for (int j = 0; j < J; ++j) acc[r][j] = mul(load(values + r * padded + column + j * kLanes), factor);
    }
    while (first < last) {
        const int block = first / kCacheBlock, stop = last < (block + 1) * kCacheBlock ? last : (block + 1) * kCacheBlock;
        const auto* v = step.values[block] + (first - block * kCacheBlock) * head_size + column;
        for (; first < stop; ++first, v += head_size) {
            F row[J];
            QUIRE_UNROLL for (int j = 0; j < J; ++j)
                row[j] = J == 1 && lanes < kLanes ? Cache::read_part(v, lanes) : Cache::read(v + j * kLanes);
            QUIRE_UNROLL for (int r = 0; r < R; ++r) {
                const F weight = splat(weights[r * kStep + first]);
                QUIRE_UNROLL for (int j = 0; j < J; ++j) acc[r][j] = fma(weight, row[j], acc[r][j]);
            }
        }
    }
    QUIRE_UNROLL for (int r = 0; r < R; ++r) QUIRE_UNROLL for (int j = 0; j < J; ++j)
        store(values + r * padded + column + j * kLanes, acc[r][j]);
}

template <class Cache, int R>
inline void add_values(const Step<Cache>& step, Index head_size, int first, int last,
                       const float* weights, const float* correction, float* values, Index padded) {
    Index i = 0;
    for (; i + kValueLanes * kLanes <= head_size; i += kValueLanes * kLanes)
        add_values<Cache, R, kValueLanes>(step, i, head_size, first, last, weights, correction, values, padded);
    for (; i < head_size; i += kLanes) add_values<Cache, R, 1>(step, i, head_size, first, last, weights, correction, values, padded);
}

template <class Cache, int R>
void attend_step(const quire::AttentionArgs& a, const Tile& t, const Step<Cache>& step, Softmax& state, Index padded) {
    alignas(64) float weights[R * kStep];
    int block = step.first;
    for (; block + kScoreBlocks <= step.last; block += kScoreBlocks) score_blocks<Cache, kScoreBlocks, R>(t, step, block, a.head_size, weights);
    for (; block < step.last; ++block) score_blocks<Cache, 1, R>(t, step, block, a.head_size, weights);

    // Scores to weights. A key that a row does not see gets -infinity, then the weight 0: neither
    // changes a maximum or a sum, so a row does not notice which keys its tile looks at for others.
    alignas(64) float correction[kLanes], before[kLanes] = {}, after[kLanes] = {};
    const F cap = splat(float(a.softcap)), inverse_cap = splat(a.softcap > 0 ? float(1 / a.softcap) : 0);
    for (int r = 0; r < R; ++r) {
        F top = splat(state.top[r]);
        const F known = top;
        for (block = step.first; block < step.last; ++block) {
            float* at = weights + r * kStep + block * kCacheBlock;
            const int base = step.base + block * kCacheBlock;
            F score = load(at);
            if (a.softcap > 0) score = mul(cap, tanh(mul(score, inverse_cap)));
            if (t.begin[r] > base || t.end[r] < base + kCacheBlock)
                score = keep_lanes(score, clamp(t.begin[r] - base, 0, kCacheBlock), clamp(t.end[r] - base, 0, kCacheBlock), -INFINITY);
            if (a.softcap > 0 || t.begin[r] > base || t.end[r] < base + kCacheBlock) store(at, score);
            top = max(score, top);
        }
        before[r] = state.top[r];
        if (any_greater(top, known)) state.top[r] = max_lanes(top);
        after[r] = state.top[r];
    }
    store(correction, exp(sub(load(before), load(after))));
    for (int r = 0; r < R; ++r) {
        const F top = splat(state.top[r]);
        F sum = mul(load(state.sums[r]), splat(correction[r]));
        for (block = step.first; block < step.last; ++block) {
            float* at = weights + r * kStep + block * kCacheBlock;
            const F weight = exp(sub(load(at), top));
            store(at, weight);
            sum = add(sum, weight);
        }
        store(state.sums[r], sum);
    }

    // Keys that all rows see go together. The others must not reach a row even as 0 * NaN: each row
    // takes its own before and after.
    const int from = clamp(t.begin[R - 1] - step.base, 0, kStep), to = clamp(t.end[0] - step.base, 0, kStep);
    alignas(64) float none[kLanes];
    store(none, splat(1.0f));
    if (from >= to) {
        for (int r = 0; r < R; ++r)
            add_values<Cache, 1>(step, a.head_size, clamp(t.begin[r] - step.base, 0, kStep), clamp(t.end[r] - step.base, 0, kStep),
                                 weights + r * kStep, correction + r, state.values + r * padded, padded);
        return;
    }
    const float* factor = correction;
    if (clamp(t.begin[0] - step.base, 0, kStep) < from) {
        for (int r = 0; r < R; ++r)
            add_values<Cache, 1>(step, a.head_size, clamp(t.begin[r] - step.base, 0, kStep), from,
                                 weights + r * kStep, correction + r, state.values + r * padded, padded);
        factor = none;
    }
    constexpr int kTogether = largest_divisor(R, kValueRows);
    for (int r = 0; r < R; r += kTogether)
        add_values<Cache, kTogether>(step, a.head_size, from, to, weights + r * kStep, factor + r, state.values + r * padded, padded);
    for (int r = 0; r < R; ++r)
        if (t.end[r] - step.base > to && to < kStep)
            add_values<Cache, 1>(step, a.head_size, to, clamp(t.end[r] - step.base, 0, kStep), weights + r * kStep, none,
                                 state.values + r * padded, padded);
}

// The keys of one piece, which starts at a multiple of kPiece.
template <class Cache>
void attend_piece(const quire::AttentionArgs& a, const Tile& t, Index piece, Softmax& state, Index padded) {
    using Stored = typename Cache::Stored;
    const Index start = piece * kPiece > t.first_key ? piece * kPiece : t.first_key;
    const Index stop = (piece + 1) * kPiece < t.last_key ? (piece + 1) * kPiece : t.last_key;
    const int32_t* table = a.block_tables + t.sequence * a.table_stride;
    const Index first_block = start / kCacheBlock, last_block = ceil_div(stop, kCacheBlock);
    with_height<kMaxRows>(t.rows, [&](auto height) {
        constexpr int R = decltype(height)::value;
        state.clear(R, padded);
        for (Index base = start / kStep * kStepBlocks; base < last_block; base += kStepBlocks) {
            Step<Cache> step;
            step.base = int(base * kCacheBlock);
            step.first = int(first_block > base ? first_block - base : 0);
            step.last = int(last_block - base < kStepBlocks ? last_block - base : kStepBlocks);
            for (int i = step.first; i < step.last; ++i) {
                const Index at = (table[base + i] * a.kv_heads + t.kv_head) * a.head_size * kCacheBlock;
                step.keys[i] = static_cast<const Stored*>(a.k_cache) + at;
                step.values[i] = static_cast<const Stored*>(a.v_cache) + at;
            }
            attend_step<Cache, R>(a, t, step, state, padded);
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

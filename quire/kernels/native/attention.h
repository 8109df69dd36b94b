// Causal attention over the paged cache. A tile is up to kMaxRows rows of (query, head of one KV
// head's group), a strip a few tiles that use the same keys one after the other. Keys are taken in
// steps of kStep at absolute positions, with an online softmax inside a piece of kPiece keys, and
// pieces are merged in order. These cuts depend only on positions, so a query's bits are the same
// in prefill, in decode and in any batch.
#pragma once

namespace {

constexpr Index kPiece = 512;
constexpr int kStepBlocks = 2, kStep = kStepBlocks * kCacheBlock;
constexpr int kMaxHead = 256;
constexpr int kQueryStride = kMaxHead + kLanes;  // a power of two would crowd a few cache sets
constexpr int kStripTiles = 4;
constexpr Index kStripFloats = kStripTiles * (kLanes + kMaxRows * (kLanes + kMaxHead));
constexpr float kLowest = -3.4028234663852886e38f;

struct CacheF32 {
    using Stored = float;
    static constexpr Index kScaleBytes = 0;
    static F read(const float* p) { return load(p); }
    static F read_part(const float* p, Index n) { return load_part(p, n); }
};
struct CacheBF16 {
    using Stored = uint16_t;
    static constexpr Index kScaleBytes = 0;
    static F read(const uint16_t* p) { return load_bf16(p); }
    static F read_part(const uint16_t* p, Index n) { return load_bf16_part(p, n); }
};
struct CacheE4M3 {  // reads 2^-8 of the codes; their keys' scales make up for it
    using Stored = uint8_t;
    static constexpr Index kScaleBytes = quire::kScaleBytes;
    static F read(const uint8_t* p) { return load_e4m3(p); }
    static F read_part(const uint8_t* p, Index n) {
        uint8_t copy[kLanes] = {};
        std::memcpy(copy, p, size_t(n));
        return load_e4m3(copy);
    }
};

// Online softmax of the rows of a tile: largest score, sums by position modulo 16, weighted values.
struct Softmax {
    float *top, *sums, *values;  // [kLanes], [height][kLanes], [height][padded]
    Index padded;

    static Index floats(int height, Index padded) { return kLanes + height * (kLanes + padded); }

    Softmax(float* memory, int height, Index padded)
        : top(memory), sums(memory + kLanes), values(sums + height * kLanes), padded(padded) {}

    void clear(int height) {
        store(top, splat(kLowest));
        for (Index i = 0; i < height * (kLanes + padded); i += kLanes) store(sums + i, zero());
    }

    void copy(const Softmax& from, int r) {
        top[r] = from.top[r];
        store(sums + r * kLanes, load(from.sums + r * kLanes));
        for (Index i = r * padded; i < (r + 1) * padded; i += kLanes) store(values + i, load(from.values + i));
    }

    // Adds a later piece of row r. (A NaN in it arrives through its sums and values.)
    void merge(const Softmax& later, int r) {
        const float joint = top[r] > later.top[r] ? top[r] : later.top[r];
        const F mine = exp(splat(top[r] - joint)), theirs = exp(splat(later.top[r] - joint));
        top[r] = joint;
        const auto join = [&](float* to, const float* from) { store(to, fma(load(from), theirs, mul(load(to), mine))); };
        join(sums + r * kLanes, later.sums + r * kLanes);
        for (Index i = r * padded; i < (r + 1) * padded; i += kLanes) join(values + i, later.values + i);
    }
};

struct Tile {
    int rows, height;                    // height: rows padded to one that there is code for
    int begin[kMaxRows], end[kMaxRows];  // positions that each row sees
    int first_key, last_key;             // of any row: [first_key, last_key)
    Index offset[kMaxRows];              // of each row in q and out
    alignas(64) float q[kMaxRows][kQueryStride];  // times the scale
};

// Consecutive tiles of one sequence and KV head: they share each step of keys while it is near.
struct Strip {
    Index sequence, kv_head, padded;  // padded: head_size in whole registers
    int count, height, first_key, last_key;
    Tile tiles[kStripTiles];

    Softmax softmax(float* memory, int tile) const {
        return Softmax(memory + tile * Softmax::floats(height, padded), height, padded);
    }
};

// Rows count queries * group + head. Padding repeats the last row.
inline void fill_tile(const quire::AttentionArgs& a, const Strip& strip, Index first, Index all, Tile& t) {
    const Index group = a.query_heads / a.kv_heads, start = a.query_start[strip.sequence];
    const Index before = a.context_len[strip.sequence] - (a.query_start[strip.sequence + 1] - start);
    t.rows = int(all - first < kMaxRows ? all - first : kMaxRows);
    t.height = padded_height(kMaxRows, t.rows);
    Index query = first / group, head = first % group;
    for (int r = 0; r < t.height; ++r) {
        const Index position = before + query;
        t.end[r] = int(position + 1);
        t.begin[r] = a.window && position >= a.window ? int(position + 1 - a.window) : 0;
        t.offset[r] = ((start + query) * a.query_heads + strip.kv_head * group + head) * a.head_size;
        if (r + 1 < t.rows && ++head == group) head = 0, ++query;
    }
    const F scale = splat(float(a.scale));
    for (int r = 0; r < t.height; ++r)
        for_lanes(a.head_size, [&](Index i, Index n) { store_lanes(t.q[r] + i, mul(load_lanes(a.q + t.offset[r] + i, n), scale), n); });
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
            const F q = splat(t.q[r][i]);
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

// Scores [height][kStep] of P blocks from position `base` become weights; correction[r] is what the
// row's earlier sums are to be multiplied with. A key that a row does not see gets the score
// -infinity and so the weight 0: neither changes a maximum or a sum, so a row does not notice which
// keys its tile looks at for others.
template <int P>
void weigh(const quire::AttentionArgs& a, const Tile& t, int base, float* scores, const Softmax& state, float* correction) {
    const bool masked = t.begin[t.rows - 1] > base || t.end[0] < base + P * kCacheBlock;
    const F before = load(state.top);
    if (a.softcap > 0) {
        const F cap = splat(float(a.softcap)), inverse = splat(float(1 / a.softcap));
        for (int r = 0; r < t.height; ++r)
            for (float* at = scores + r * kStep; at < scores + r * kStep + P * kCacheBlock; at += kCacheBlock)
                store(at, mul(cap, tanh(mul(load(at), inverse))));
    }
    for (int r = 0; r < t.height; ++r) {
        F top = splat(state.top[r]);
        QUIRE_UNROLL for (int p = 0; p < P; ++p) {
            float* at = scores + r * kStep + p * kCacheBlock;
            F score = load(at);
            if (masked) {
                const int first = base + p * kCacheBlock;
                score = keep_lanes(score, clamp(t.begin[r] - first, 0, kCacheBlock), clamp(t.end[r] - first, 0, kCacheBlock), -INFINITY);
                store(at, score);
            }
            top = max(score, top);  // a NaN is passed over here, and spoils the weights below
        }
        state.top[r] = max_lanes(top);
    }
    store(correction, exp(sub(before, load(state.top))));
    for (int r = 0; r < t.height; ++r) {
        const F top = splat(state.top[r]);
        F sum = mul(load(state.sums + r * kLanes), splat(correction[r]));
        QUIRE_UNROLL for (int p = 0; p < P; ++p) {
            float* at = scores + r * kStep + p * kCacheBlock;
            const F weight = exp(sub(load(at), top));
            store(at, weight);
            sum = add(sum, weight);
        }
        store(state.sums + r * kLanes, sum);
    }
}

// rows[R][kStep] times the scales of the blocks' keys, where a cache has them.
template <class Cache, int R>
inline void scale_keys(const Step<Cache>& step, const typename Cache::Stored* const* blocks, Index head_size, float* rows) {
    if constexpr (Cache::kScaleBytes > 0)
        for (int block = step.first; block < step.last; ++block) {
            alignas(64) float scales[kCacheBlock];
            std::memcpy(scales, blocks[block] + head_size * kCacheBlock, sizeof scales);
            const F scale = mul(load(scales), splat(256.0f));
            QUIRE_UNROLL for (int r = 0; r < R; ++r) {
                float* at = rows + r * kStep + block * kCacheBlock;
                store(at, mul(load(at), scale));
            }
        }
}

template <class Cache, int R>
void attend_step(const quire::AttentionArgs& a, const Tile& t, const Step<Cache>& step, Softmax state) {
    const Index padded = state.padded;
    alignas(64) float weights[R * kStep];
    int block = step.first;
    for (; block + kScoreBlocks <= step.last; block += kScoreBlocks) score_blocks<Cache, kScoreBlocks, R>(t, step, block, a.head_size, weights);
    for (; block < step.last; ++block) score_blocks<Cache, 1, R>(t, step, block, a.head_size, weights);

    scale_keys<Cache, R>(step, step.keys, a.head_size, weights);

    alignas(64) float correction[kLanes], none[kLanes];
    store(none, splat(1.0f));
    const int start = step.first * kCacheBlock;
    if (step.last - step.first == kStepBlocks) weigh<kStepBlocks>(a, t, step.base + start, weights + start, state, correction);
    else weigh<1>(a, t, step.base + start, weights + start, state, correction);

    scale_keys<Cache, R>(step, step.values, a.head_size, weights);

    // Keys that all rows see go together. The others must not reach a row even as 0 * NaN: each row
    // takes its own before and after.
    const int from = clamp(t.begin[R - 1] - step.base, 0, kStep), to = clamp(t.end[0] - step.base, 0, kStep);
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
void attend_piece(const quire::AttentionArgs& a, const Strip& strip, Index piece, float* memory) {
    using Stored = typename Cache::Stored;
    const Index start = piece * kPiece > strip.first_key ? piece * kPiece : strip.first_key;
    const Index stop = (piece + 1) * kPiece < strip.last_key ? (piece + 1) * kPiece : strip.last_key;
    const int32_t* table = a.block_tables + strip.sequence * a.table_stride;
    const Index first_block = start / kCacheBlock, last_block = ceil_div(stop, kCacheBlock);
    for (int i = 0; i < strip.count; ++i) strip.softmax(memory, i).clear(strip.height);
    for (Index block = start / kStep * kStepBlocks; block < last_block; block += kStepBlocks) {
        Step<Cache> step;
        step.base = int(block * kCacheBlock);
        const int first = int(first_block > block ? first_block - block : 0);
        const int last = int(last_block - block < kStepBlocks ? last_block - block : kStepBlocks);
        for (int i = first; i < last; ++i) {
            const Index head = table[block + i] * a.kv_heads + strip.kv_head;
            const Index at = head * (a.head_size + Cache::kScaleBytes) * kCacheBlock;
            step.keys[i] = static_cast<const Stored*>(a.k_cache) + at;
            step.values[i] = static_cast<const Stored*>(a.v_cache) + at;
        }
        for (int i = 0; i < strip.count; ++i) {
            const Tile& t = strip.tiles[i];
            if (t.first_key >= step.base + kStep || t.last_key <= step.base) continue;
            step.first = clamp((t.first_key - step.base) / kCacheBlock, first, last);
            step.last = clamp((t.last_key - step.base + kCacheBlock - 1) / kCacheBlock, first, last);
            with_height<kMaxRows>(t.rows, [&](auto height) {
                attend_step<Cache, decltype(height)::value>(a, t, step, strip.softmax(memory, i));
            });
        }
    }
}

// For rows that see keys of the piece it is the first one or a later one; others stay as they are.
inline void merge_piece(const Strip& strip, Index piece, float* part, float* total) {
    for (int i = 0; i < strip.count; ++i) {
        const Tile& t = strip.tiles[i];
        for (int r = 0; r < t.rows; ++r) {
            if (t.begin[r] >= (piece + 1) * kPiece || t.end[r] <= piece * kPiece) continue;
            Softmax to = strip.softmax(total, i);
            if (t.begin[r] >= piece * kPiece) to.copy(strip.softmax(part, i), r);
            else to.merge(strip.softmax(part, i), r);
        }
    }
}

inline void finish_tile(const quire::AttentionArgs& a, const Tile& t, const Softmax& state) {
    for (int r = 0; r < t.rows; ++r) {
        float factor = 1, sum = sum_lanes(load(state.sums + r * kLanes));
        if (a.sinks) {  // one more logit in the denominator, with no value
            const float sink = a.sinks[t.offset[r] / a.head_size % a.query_heads];
            const float joint = sink > state.top[r] ? sink : state.top[r];
            alignas(64) float parts[kLanes] = {state.top[r] - joint, sink - joint};
            store(parts, exp(load(parts)));
            factor = parts[0];
            sum = sum * factor + parts[1];
        }
        const F scale = splat(factor / sum);
        const float* values = state.values + r * state.padded;
        float* out = a.out + t.offset[r];
        for_lanes(a.head_size, [&](Index i, Index n) { store_lanes(out + i, mul(load(values + i), scale), n); });
    }
}

inline Index rows_of(const quire::AttentionArgs& a, Index sequence) {
    return (a.query_start[sequence + 1] - a.query_start[sequence]) * (a.query_heads / a.kv_heads);
}

// Fills in the strip of one chunk; starts[i] is the number of strips before sequence i. The longest
// contexts of a sequence come first, so that the last chunks to finish are short ones.
inline void find_strip(const quire::AttentionArgs& a, const Index* starts, Index chunk, Strip& strip) {
    const Index index = chunk / a.kv_heads;
    Index low = 0, high = a.sequences;
    while (high - low > 1) {
        const Index middle = (low + high) / 2;
        (starts[middle] <= index ? low : high) = middle;
    }
    strip.sequence = low;
    strip.kv_head = chunk % a.kv_heads;
    strip.padded = ceil_div(a.head_size, kLanes) * kLanes;
    strip.count = 0;
    const Index first = (starts[low + 1] - 1 - index) * kStripTiles * kMaxRows, all = rows_of(a, low);
    for (Index row = first; row < all && strip.count < kStripTiles; row += kMaxRows)
        fill_tile(a, strip, row, all, strip.tiles[strip.count++]);
    strip.height = strip.tiles[0].height;
    strip.first_key = strip.tiles[0].first_key;
    strip.last_key = strip.tiles[strip.count - 1].last_key;
}

// Merges attend(piece), where a piece's softmax states lie, for every piece in order.
template <class Attend>
inline void all_pieces(const quire::AttentionArgs& a, const Strip& strip, Attend&& attend) {
    alignas(64) float merged[kStripFloats];
    const Index first = strip.first_key / kPiece, last = ceil_div(strip.last_key, kPiece);
    float* total = last - first == 1 ? attend(first) : merged;
    for (Index piece = first; last - first > 1 && piece < last; ++piece) merge_piece(strip, piece, attend(piece), merged);
    for (int i = 0; i < strip.count; ++i) finish_tile(a, strip.tiles[i], strip.softmax(total, i));
}

template <class Cache>
void attention_with(const quire::AttentionArgs& a) {
    auto* starts = static_cast<Index*>(quire::thread_scratch(1, sizeof(Index) * std::size_t(a.sequences + 1)));
    Index pieces = 1, most_rows = 1;
    starts[0] = 0;
    for (Index i = 0; i < a.sequences; ++i) {
        const Index rows = rows_of(a, i);
        starts[i + 1] = starts[i] + ceil_div(rows, kStripTiles * kMaxRows);
        if (rows > most_rows) most_rows = rows;
        if (rows && pieces < ceil_div(a.context_len[i], kPiece)) pieces = ceil_div(a.context_len[i], kPiece);
    }
    const Index chunks = starts[a.sequences] * a.kv_heads;
    if (!chunks) return;
    if (pieces == 1 || quire::thread_count() == 1 || chunks >= 4 * quire::thread_count()) {
        parallel_for(chunks, [&](Index chunk) {
            Strip strip;
            find_strip(a, starts, chunk, strip);
            alignas(64) float part[kStripFloats];
            all_pieces(a, strip, [&](Index piece) {
                attend_piece<Cache>(a, strip, piece, part);
                return part;
            });
        });
        return;
    }
    // Long contexts, few rows: threads share the pieces of one row; the merge is the same.
    const Index tiles = ceil_div(most_rows, kMaxRows) < kStripTiles ? ceil_div(most_rows, kMaxRows) : kStripTiles;
    const int height = padded_height(kMaxRows, int(most_rows < kMaxRows ? most_rows : kMaxRows));
    const Index floats = tiles * Softmax::floats(height, ceil_div(a.head_size, kLanes) * kLanes);
    auto* parts = static_cast<float*>(quire::thread_scratch(2, sizeof(float) * std::size_t(chunks * pieces * floats)));
    parallel_for(chunks * pieces, [&](Index index) {
        Strip strip;
        find_strip(a, starts, index / pieces, strip);
        const Index piece = index % pieces;
        if ((piece + 1) * kPiece > strip.first_key && piece * kPiece < strip.last_key)
            attend_piece<Cache>(a, strip, piece, parts + index * floats);
    });
    parallel_for(chunks, [&](Index chunk) {
        Strip strip;
        find_strip(a, starts, chunk, strip);
        all_pieces(a, strip, [&](Index piece) { return parts + (chunk * pieces + piece) * floats; });
    });
}

void attention(const quire::AttentionArgs& a) {
    if (a.cache_type == quire::kCacheE4M3) attention_with<CacheE4M3>(a);
    else a.cache_type == quire::kCacheBF16 ? attention_with<CacheBF16>(a) : attention_with<CacheF32>(a);
}

}  // namespace

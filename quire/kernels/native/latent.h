// Attention over a paged cache of latents, which all heads of a token share: its first `rank` values
// are the values, all `width` of them the keys. A head's keys are taken block by block in order,
// whatever other heads and queries a task has, so its bits are its own.
#pragma once

namespace {

constexpr Index kMaxLatent = 1024;
constexpr Index kTileHeads = 4, kTaskHeads = 16;

inline void rotate_key(const float* in, const float* cosine, const float* sine, Index half, bool interleaved, float* out) {
    for (Index i = 0; i < half; ++i) {
        const float a = in[interleaved ? 2 * i : i], b = in[interleaved ? 2 * i + 1 : i + half];
        out[i] = a * cosine[i] - b * sine[i];
        out[i + half] = b * cosine[i] + a * sine[i];
    }
}

template <class Stored>
void latent_row(const quire::LatentCacheArgs& a, Index row) {
    const Index width = a.rank + a.rotary, half = a.rotary / 2, query = a.nope + a.rotary;
    const float *cosine = a.cos_sin + a.positions[row] * a.rotary, *sine = cosine + half;
    for (Index h = 0; h < a.heads; ++h)
        rotate_key(a.q + (row * a.heads + h) * query + a.nope, cosine, sine, half, a.interleaved,
                   a.out + (row * a.heads + h) * width + a.rank);
    const Index slot = a.slots[row];
    if (slot < 0) return;
    alignas(64) float latent[kMaxLatent];
    const float* in = a.latents + row * a.latents_stride;
    norm_row(in, a.norm, a.rank, a.epsilon, latent);
    rotate_key(in + a.rank, cosine, sine, half, a.interleaved, latent + a.rank);
    Stored* to = static_cast<Stored*>(a.cache) + slot * width;
    for (Index i = 0; i < width; ++i) put(to + i, latent[i]);
}

void latent_cache(const quire::LatentCacheArgs& a) {
    parallel_rows(a.rows, 2 * a.rank + a.heads * a.rotary, [&](Index first, Index last) {
        for (Index row = first; row < last; ++row) a.cache_is_bf16 ? latent_row<uint16_t>(a, row) : latent_row<float>(a, row);
    });
}

// Some heads of one query with what they have seen so far.
struct Heads {
    Index count, padded_width, padded_rank;
    float top[kTaskHeads];
    alignas(64) float sums[kTaskHeads][kLanes];     // by position modulo 16
    alignas(64) float q[kTaskHeads * kMaxLatent];       // times the scale
    alignas(64) float values[kTaskHeads * kMaxLatent];  // weighted by exp(score - top)
};

// Keys [count][padded_width] of one block, for `H` heads from `head` on.
template <int H>
void attend_block(Heads& state, Index head, const float* keys, Index count, Index rank) {
    alignas(64) float scores[H][kLanes];
    QUIRE_UNROLL for (int h = 0; h < H; ++h) store(scores[h], splat(-INFINITY));
    const float* q = state.q + head * state.padded_width;
    for (Index key = 0; key < count; ++key) {
        F sum[H];
        QUIRE_UNROLL for (int h = 0; h < H; ++h) sum[h] = zero();
        for (Index i = 0; i < state.padded_width; i += kLanes) {
            const F k = load(keys + key * state.padded_width + i);
            QUIRE_UNROLL for (int h = 0; h < H; ++h) sum[h] = fma(load(q + h * state.padded_width + i), k, sum[h]);
        }
        QUIRE_UNROLL for (int h = 0; h < H; ++h) scores[h][key] = sum_lanes(sum[h]);
    }
    F factor[H];
    QUIRE_UNROLL for (int h = 0; h < H; ++h) {
        float& top = state.top[head + h];
        // A NaN is passed over here, and spoils the weights below.
        const float joint = max_lanes(max(load(scores[h]), splat(top)));
        factor[h] = exp(splat(top - joint));
        top = joint;
        const F weight = exp(sub(load(scores[h]), splat(joint)));
        store(scores[h], weight);
        float* sums = state.sums[head + h];
        store(sums, add(mul(load(sums), factor[h]), weight));
    }
    float* values = state.values + head * state.padded_rank;
    for (Index i = 0; i < rank; i += kLanes) {
        F acc[H];
        QUIRE_UNROLL for (int h = 0; h < H; ++h) acc[h] = mul(load(values + h * state.padded_rank + i), factor[h]);
        for (Index key = 0; key < count; ++key) {
            const F value = load(keys + key * state.padded_width + i);
            QUIRE_UNROLL for (int h = 0; h < H; ++h) acc[h] = fma(splat(scores[h][key]), value, acc[h]);
        }
        QUIRE_UNROLL for (int h = 0; h < H; ++h) store(values + h * state.padded_rank + i, acc[h]);
    }
}

template <class Cache>
void attend_latents(const quire::LatentAttentionArgs& a, Index sequence, Index token, Index first_head, Heads& state) {
    state.padded_width = ceil_div(a.width, kLanes) * kLanes;
    state.padded_rank = ceil_div(a.rank, kLanes) * kLanes;
    const F scale = splat(float(a.scale));
    const Index left = a.heads - first_head;
    if (left < state.count) state.count = left;
    for (Index h = 0; h < state.count; ++h) {
        const float* q = a.q + (token * a.heads + first_head + h) * a.width;
        float* to = state.q + h * state.padded_width;
        for_lanes(a.width, [&](Index i, Index n) { store(to + i, mul(load_lanes(q + i, n), scale)); });
        state.top[h] = kLowest;
        store(state.sums[h], zero());
        for (Index i = 0; i < state.padded_rank; i += kLanes) store(state.values + h * state.padded_rank + i, zero());
    }
    auto* keys = static_cast<float*>(quire::thread_scratch(2, sizeof(float) * std::size_t(kCacheBlock * kMaxLatent)));
    const Index seen = a.context_len[sequence] - (a.query_start[sequence + 1] - 1 - token);
    for (Index block = 0; block * kCacheBlock < seen; ++block) {
        const Index here = seen - block * kCacheBlock, count = here < kCacheBlock ? here : kCacheBlock;
        const auto* from = static_cast<const typename Cache::Stored*>(a.cache) +
                           Index(a.block_tables[sequence * a.table_stride + block]) * kCacheBlock * a.width;
        for (Index key = 0; key < count; ++key)
            for_lanes(a.width, [&](Index i, Index n) {
                const auto* at = from + key * a.width + i;
                store(keys + key * state.padded_width + i, n == kLanes ? Cache::read(at) : Cache::read_part(at, n));
            });
        Index head = 0;
        for (; head + kTileHeads <= state.count; head += kTileHeads) attend_block<kTileHeads>(state, head, keys, count, a.rank);
        for (; head < state.count; ++head) attend_block<1>(state, head, keys, count, a.rank);
    }
    for (Index h = 0; h < state.count; ++h) {
        const F inverse = splat(1 / sum_lanes(load(state.sums[h])));
        float* out = a.out + (token * a.heads + first_head + h) * a.rank;
        const float* values = state.values + h * state.padded_rank;
        for_lanes(a.rank, [&](Index i, Index n) { store_lanes(out + i, mul(load(values + i), inverse), n); });
    }
}

void latent_attention(const quire::LatentAttentionArgs& a) {
    const Index tokens = a.query_start[a.sequences];
    // Heads that share a task widen keys once; few tasks leave threads idle.
    const Index enough = 4 * quire::thread_count();
    const Index heads = tokens * ceil_div(a.heads, kTaskHeads) >= enough ? kTaskHeads : kTileHeads;
    const Index tasks = ceil_div(a.heads, heads);
    if (!tokens) return;
    parallel_for(tokens * tasks, [&](Index task) {
        const Index token = task / tasks;
        Index low = 0, high = a.sequences;
        while (high - low > 1) {
            const Index middle = (low + high) / 2;
            (a.query_start[middle] <= token ? low : high) = middle;
        }
        Heads& state = *static_cast<Heads*>(quire::thread_scratch(1, sizeof(Heads)));
        state.count = heads;
        const Index first = task % tasks * heads;
        a.cache_is_bf16 ? attend_latents<CacheBF16>(a, low, token, first, state) : attend_latents<CacheF32>(a, low, token, first, state);
    });
}

}  // namespace

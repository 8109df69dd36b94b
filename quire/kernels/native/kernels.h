// The operations every instruction set provides, as plain pointers and sizes. Strides are in
// elements; x and out are fp32 rows whose last dimension is contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quire {

using Index = std::ptrdiff_t;

// How a cache holds keys and values. E4M3: of each head in a block the codes, where other caches
// have values, then 16 fp32 scales.
enum CacheType { kCacheF32, kCacheBF16, kCacheE4M3 };
constexpr Index kScaleBytes = 4;  // for each head of a token

struct LinearArgs {  // out[rows, n] = x[rows, k] * weight[n, k]^T + bias
    const float* x;
    Index x_stride;
    const uint8_t* weight;
    Index format, n, k;
    const float* bias;  // or null
    float* out;
    Index out_stride, rows;
};

struct NormArgs {  // residual (if any) += x; out = rms_norm(residual or x) * weight
    const float* x;
    Index x_stride;
    float* residual;
    const float* weight;
    double epsilon;
    float* out;
    Index rows, width;
};

struct RotaryArgs {
    const float* qkv;  // [rows, (query_heads + 2 * kv_heads) * head_size]
    float* q_out;      // [rows, query_heads * head_size]
    const int64_t* positions;
    const float* cos_sin;  // [*, rotary_size]: cosines, then sines
    Index rotary_size;
    const float *q_norm, *k_norm;  // [head_size] or null
    double epsilon;
    void *k_cache, *v_cache;  // [blocks, kv_heads, head_size, 16] and [blocks, kv_heads, 16, head_size]
    Index cache_type;
    const int64_t* slots;  // negative: not written
    const float* fixed;    // [2, kv_heads] scales of e4m3 for keys and values, or null: the heads' own
    Index rows, query_heads, kv_heads, head_size;
};

struct AttentionArgs {
    const float* q;
    const void *k_cache, *v_cache;
    Index cache_type;
    const int32_t* block_tables;
    Index table_stride;
    const int32_t *query_start, *context_len;
    Index sequences, query_heads, kv_heads, head_size;
    double scale;
    Index window;     // 0: none
    double softcap;  // 0: none
    const float* sinks;  // [query_heads] or null
    float* out;
};

struct LatentCacheArgs {
    const float* q;  // [rows, heads * (nope + rotary)]
    const float* latents;  // [rows, rank + rotary]
    Index latents_stride;
    float* out;  // [rows, heads * (rank + rotary)], of which the rotated parts are written
    const int64_t* positions;
    const float *cos_sin, *norm;  // [*, rotary]: cosines, then sines; [rank]
    double epsilon;
    void* cache;  // [blocks, 1, 16, rank + rotary]
    Index cache_is_bf16;
    const int64_t* slots;  // negative: not written
    Index rows, heads, nope, rank, rotary, interleaved;
};

struct LatentAttentionArgs {
    const float* q;  // [tokens, heads * width]
    const void* cache;
    Index cache_is_bf16;
    const int32_t* block_tables;
    Index table_stride;
    const int32_t *query_start, *context_len;
    Index sequences, heads, width, rank;
    double scale;
    float* out;  // [tokens, heads * rank]
};

struct GatedArgs {
    const float* x;  // [rows, 2 * width]
    Index kind;       // 0: silu, 1: gelu_tanh
    float* out;
    Index rows, width;
};

struct ReduceArgs {
    const float* x;
    Index x_stride;
    void* out;  // int64 for argmax, fp32 for logsumexp
    Index rows, width;
};

struct Kernels {
    const char* name;
    void (*linear)(const LinearArgs&);
    void (*norm)(const NormArgs&);
    void (*rotary_cache)(const RotaryArgs&);
    void (*attention)(const AttentionArgs&);
    void (*latent_cache)(const LatentCacheArgs&);
    void (*latent_attention)(const LatentAttentionArgs&);
    void (*gated_activation)(const GatedArgs&);
    void (*argmax)(const ReduceArgs&);
    void (*logsumexp)(const ReduceArgs&);
    void (*gumbel)(uint64_t seed, uint32_t choice, uint32_t position, Index size, float* out);
};

// Null where the compiler or the processor family has no such instructions.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// pack.cpp: source rows are row_bytes apart; packed is panel_bytes(format, k) * ceil(n / 16).
void pack_rows(int format, const uint8_t* source, Index row_bytes, Index n, Index k, uint8_t* packed);
void unpack_rows(int format, const uint8_t* packed, Index k, const int64_t* ids, Index count, float scale, float* out);

}  // namespace quire

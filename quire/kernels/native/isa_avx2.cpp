// The kernels compiled for AVX2 with FMA and F16C. Standard headers come before the target pragma: their inline
// functions are shared with the rest of the program and must run on any processor.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif

#include "formats.h"
#include "pool.h"

#include "lanes_avx2.h"
#include "vector_math.h"
#include "linear.h"
#include "rows.h"
#include "attention.h"
#include "latent.h"
#include "noise.h"

namespace quire {

const Kernels* avx2_kernels() {
    static const Kernels table{kName, linear, norm, rotary_cache, attention, latent_cache, latent_attention, gated_activation, argmax, logsumexp, gumbel};
    return &table;
}

}  // namespace quire

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const quire::Kernels* quire::avx2_kernels() { return nullptr; }
#endif

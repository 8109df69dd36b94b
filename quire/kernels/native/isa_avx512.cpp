// The kernels compiled for AVX-512 with VNNI. Standard headers come before the target pragma: their inline
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593: in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#include "formats.h"
#include "pool.h"

#include "lanes_avx512.h"
#include "vector_math.h"
#include "linear.h"
#include "rows.h"
#include "attention.h"
#include "latent.h"
#include "noise.h"

namespace quire {

const Kernels* avx512_kernels() {
    static const Kernels table{kName, linear, norm, rotary_cache, attention, latent_cache, latent_attention, gated_activation, argmax, logsumexp, gumbel};
    return &table;
}

}  // namespace quire

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const quire::Kernels* quire::avx512_kernels() { return nullptr; }
#endif

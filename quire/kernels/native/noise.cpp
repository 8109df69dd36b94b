// Gumbel noise from Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011): each value is a function of (seed, choice, position, index) and of nothing else.
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "pool.h"

namespace quire {
namespace {

void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key1, uint32_t(a)};
        for (int i = 0; i < 4; ++i) c[i] = next[i];
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

}  // namespace

void gumbel_noise(uint64_t seed, uint32_t choice, uint32_t position, Index size, float* out) {
    parallel_rows(ceil_div(size, 4), 64, [&](Index first, Index last) {
        for (Index group = first; group < last; ++group) {
            uint32_t words[4] = {uint32_t(group), position, choice, 0};
            philox(words, uint32_t(seed), uint32_t(seed >> 32));
            for (Index i = 0; i < 4 && group * 4 + i < size; ++i) {
                const double uniform = (double(words[i] >> 8) + 0.5) * 0x1p-24;
                out[group * 4 + i] = float(-std::log(-std::log(uniform)));
            }
        }
    });
}

}  // namespace quire

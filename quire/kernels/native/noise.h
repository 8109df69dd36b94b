// Gumbel noise from Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011): each value is a function of (seed, choice, position, index) and of nothing else. Plain
// loops over arrays, which compilers vectorise; integers and doubles are the same on every machine.
#pragma once

namespace {

constexpr int kGroups = 16;  // Philox counters worked on together, four values each

inline void philox(uint32_t (&words)[4][kGroups], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
        for (int i = 0; i < kGroups; ++i) {
            const uint64_t a = uint64_t(0xD2511F53u) * words[0][i], b = uint64_t(0xCD9E8D57u) * words[2][i];
            words[0][i] = uint32_t(b >> 32) ^ words[1][i] ^ key0;
            words[1][i] = uint32_t(b);
            words[2][i] = uint32_t(a >> 32) ^ words[3][i] ^ key1;
            words[3][i] = uint32_t(a);
        }
}

// Natural logarithm of normal positive numbers, absolute error below 1e-13: x = m 2^e with m around
// 1, log m = 2 artanh((m - 1) / (m + 1)) as its series up to the 17th power.
inline void logarithms(double (&x)[kGroups]) {
    for (int i = 0; i < kGroups; ++i) {
        uint64_t bits;
        std::memcpy(&bits, &x[i], 8);
        const uint64_t mantissa_bits = (bits & 0x000FFFFFFFFFFFFFu) | 0x3FF0000000000000u;
        const uint64_t exponent_bits = (bits >> 52) | 0x4330000000000000u;  // 2^52 + biased exponent
        double mantissa, exponent;
        std::memcpy(&mantissa, &mantissa_bits, 8);
        std::memcpy(&exponent, &exponent_bits, 8);
        exponent -= 4503599627370496.0 + 1023.0;
        const double half = mantissa > 1.4142135623730951 ? 0.5 : 1.0;
        const double carry = mantissa > 1.4142135623730951 ? 1.0 : 0.0;
        mantissa *= half;
        exponent += carry;
        const double s = (mantissa - 1.0) / (mantissa + 1.0), t = s * s;
        double series = 1.0 / 17;
        series = series * t + 1.0 / 15;
        series = series * t + 1.0 / 13;
        series = series * t + 1.0 / 11;
        series = series * t + 1.0 / 9;
        series = series * t + 1.0 / 7;
        series = series * t + 1.0 / 5;
        series = series * t + 1.0 / 3;
        series = series * t + 1.0;
        x[i] = exponent * 0.6931471805599453 + 2.0 * s * series;
    }
}

void gumbel(uint64_t seed, uint32_t choice, uint32_t position, Index size, float* out) {
    const Index batches = ceil_div(size, 4 * kGroups);
    parallel_rows(batches, 16 * kGroups, [&](Index first, Index last) {
        for (Index batch = first; batch < last; ++batch) {
            uint32_t words[4][kGroups];
            for (int i = 0; i < kGroups; ++i) {
                words[0][i] = uint32_t(batch * kGroups + i);
                words[1][i] = position;
                words[2][i] = choice;
                words[3][i] = 0;
            }
            philox(words, uint32_t(seed), uint32_t(seed >> 32));
            float values[4 * kGroups];
            for (int word = 0; word < 4; ++word) {
                double x[kGroups];
                for (int i = 0; i < kGroups; ++i) x[i] = (double(int32_t(words[word][i] >> 8)) + 0.5) * (1.0 / 16777216);
                logarithms(x);
                for (int i = 0; i < kGroups; ++i) x[i] = -x[i];
                logarithms(x);
                for (int i = 0; i < kGroups; ++i) values[4 * i + word] = float(-x[i]);
            }
            const Index start = batch * 4 * kGroups, count = size - start < 4 * kGroups ? size - start : 4 * kGroups;
            std::memcpy(out + start, values, std::size_t(count) * 4);
        }
    });
}

}  // namespace

// exp and friends on sixteen lanes: every lane is computed alike, so a value's bits do not depend
// on where in a row it stands.
#pragma once

namespace {

// Relative error below 1.5 units in the last place, subnormal results included; exp(-inf) = 0,
// overflow gives infinity and a NaN stays one. Range reduction after Cody and Waite; the polynomial
// is a minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, relative error 3.2e-9.
inline F exp(F x) {
    x = max(splat(-104.0f), min(splat(89.0f), x));
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F n = sub(fma(x, splat(1.44269504f), magic), magic);
    F r = fnma(n, splat(0.693359375f), x);
    r = fnma(n, splat(-2.12194440e-4f), r);
    F p = splat(0.0013814318226650357f);
    p = fma(p, r, splat(0.008368851616978645f));
    p = fma(p, r, splat(0.041668400168418884f));
    p = fma(p, r, splat(0.1666651964187622f));
    p = fma(p, r, splat(0.4999999403953552f));
    p = add(fma(mul(r, r), p, r), splat(1.0f));
    return times_power_of_two(p, n);
}

// Absolute error below 2e-7, which is what a soft cap needs.
inline F tanh(F x) {
    const F e = exp(add(x, x));
    return sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
}

inline F silu(F x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
inline F gelu_tanh(F x) {
    const F cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
    return div(x, add(splat(1.0f), exp(mul(cubic, splat(-1.5957691216f)))));
}

}  // namespace

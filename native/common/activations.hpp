// The elementary functions of gates and time steps, on vectors: small relative errors everywhere, in float and double.
#pragma once

#include "vec.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
constexpr T kLog2e = T(1.442695040888963407360);

// 2^x for any x: inf from half an octave below the largest number on, 0 below the smallest normal one, NaN for NaN.
template <class T>
inline Vec<T> exp2_any(Vec<T> x) {
    return exp2(at_most(broadcast(T(sizeof(T) == 4 ? 128 : 1024)), x));
}

// 2^x for |x| ≤ kExp2Reach; for other x anything at all. Relative error about one ulp.
template <class T>
constexpr T kExp2Reach = sizeof(T) == 4 ? 120 : 1000;
template <class T>
inline Vec<T> exp2_within(Vec<T> x) {
    return exp2(x);
}
#if defined(__AVX2__)
// x = m/8 + f with an integer m and |f| ≤ 1/16: a table for 2^(m/8) and a cubic for 2^f, whose even error has mean zero.
// Adding 1.5·2^20 leaves m in the low bits of the sum. Moved to the exponent's place, its last three bits fall on top of
// the mantissa; the table has them taken away beforehand.
template <>
inline Vec<float> exp2_within<float>(Vec<float> x) {
    using Bits = VecOf<float>::bits;
    static constexpr int32_t kEighths[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                           0x3f7744fd, 0x3f7ac0c7, 0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                           0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const Vec<float> shifted = x + 1572864.0f;
    const Vec<float> f = x - (shifted - 1572864.0f);
    const Bits m = reinterpret_cast<Bits>(shifted);
    const Vec<float> scale = reinterpret_cast<Vec<float>>(look_up(kEighths, m) + (m << 20));
    Vec<float> p = broadcast(5.550312e-2f);
    p = p * f + 2.4025178e-1f;
    p = p * f + 6.9314720e-1f;
    return scale + scale * f * p;
}
#endif

// e^-|x|.
template <class T>
inline Vec<T> exp_minus_size(Vec<T> x) {
    return exp2((x < 0 ? x : -x) * kLog2e<T>);
}

// Far below zero e^-x is inf, and this 0.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    return 1 / (1 + exp2_any<T>(x * -kLog2e<T>));
}

// log(1 + e^x), and from 20 on x itself, as PyTorch has it. For e = e^-|x| in (0, 1], log(1 + e) = 2 artanh(s) with
// s = e / (2 + e) ≤ 1/3, by its series; max(x, 0) makes up for the sign.
template <class T>
inline Vec<T> softplus(Vec<T> x) {
    constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
    const Vec<T> e = exp_minus_size<T>(x);
    const Vec<T> s = e / (2 + e), square = s * s;
    Vec<T> sum = broadcast(T(1) / (2 * kTerms + 1));
    for (int k = kTerms - 1; k >= 0; --k) sum = sum * square + T(1) / (2 * k + 1);
    const Vec<T> above = x < 0 ? Vec<T>{} : x;
    return x > 20 ? x : above + 2 * s * sum;
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
    return x / (1 + exp2_any<T>(x * -kLog2e<T>));
}

// The derivative of silu.
template <class T>
inline Vec<T> silu_slope(Vec<T> x) {
    const Vec<T> s = sigmoid<T>(x);
    return s * (1 + x * (1 - s));
}

}  // namespace onchip::ONCHIP_ISA

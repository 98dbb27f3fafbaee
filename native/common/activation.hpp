// The smooth functions of gates and steps, and their derivatives.
#pragma once

#include <cmath>

#include "vec.hpp"

namespace onchip::ONCHIP_ISA {

constexpr double kLog2e = 1.442695040888963407360;

// 2^x for any x: infinite a little below the end of the exponent range, and beyond it.
template <class T>
inline Vec<T> exp2_of_any(Vec<T> x) {
    const Vec<T> ceiling = broadcast(T(sizeof(T) == 4 ? 128 : 1024));
    return exp2(x > ceiling ? ceiling : x);  // keeps a NaN
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    return 1 / (1 + exp2_of_any<T>(x * T(-kLog2e)));
}

// PyTorch's softplus, which is the identity above 20, and its derivative.
template <class T>
inline T softplus(T x) {
    return x > 20 ? x : std::log1p(std::exp(x));
}
template <class T>
inline T softplus_slope(T x) {
    return x > 20 ? T(1) : 1 / (1 + std::exp(-x));
}

}  // namespace onchip::ONCHIP_ISA

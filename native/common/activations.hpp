// The logistic function and what is made of it.
#pragma once

#include "vec.hpp"

namespace onchip::ONCHIP_ISA {

// 1 / (1 + e^-x). The exponential is only taken of what is not positive: no overflow, and a small relative error.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    const Vec<T> size = x < 0 ? -x : x;
    const Vec<T> e = exp2(size * T(-1.442695040888963407360));  // e^-|x|
    return (x < 0 ? e : broadcast(T(1))) / (1 + e);
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
    return x * sigmoid<T>(x);
}

// The derivative of silu.
template <class T>
inline Vec<T> silu_slope(Vec<T> x) {
    const Vec<T> s = sigmoid<T>(x);
    return s * (1 + x * (1 - s));
}

}  // namespace onchip::ONCHIP_ISA

// The Walsh–Hadamard transform of rows in the first cache, in place and without its scale.
//
// H of size n is the product of log2(n) stages, one for each bit of the index, in any order: a stage replaces the pair
// (a, b) of elements that differ in its bit by (a + b, a - b). The lowest bits number the lanes of a vector: those stages
// exchange lanes while the vector is in a register. The others number vectors, and up to three are done in one pass.
#pragma once

#include <bit>

#include "common/vec.hpp"

namespace onchip::ONCHIP_ISA {

template <int W, class T, int... I>
inline Vec<T> lane_stage(Vec<T> x, std::integer_sequence<int, I...>) {
    const Vec<T> sign = {T(I & W ? -1 : 1)...};
    return x * sign + shuffle(x, x, std::integer_sequence<int, (I ^ W)...>{});
}

// The transform of every `Width` neighbouring lanes.
template <int Width, class T>
inline Vec<T> within(Vec<T> x) {
    if constexpr (Width > 1) {
        x = within<Width / 2, T>(x);
        x = lane_stage<Width / 2, T>(x, std::make_integer_sequence<int, kLanes<T>>{});
    }
    return x;
}

// The transform across `Count` vectors, lane by lane.
template <int Count, class T>
inline void across(Vec<T>* x) {
    if constexpr (Count > 1) {
        across<Count / 2, T>(x);
        across<Count / 2, T>(x + Count / 2);
#pragma GCC unroll 8
        for (int i = 0; i < Count / 2; ++i) {
            const Vec<T> a = x[i], b = x[i + Count / 2];
            x[i] = a + b;
            x[i + Count / 2] = a - b;
        }
    }
}

// One pass over `total` elements: the stages within `Width` lanes, and those across `Count` vectors `stride` apart.
template <int Count, int Width, class T>
void pass(T* data, int64_t total, int64_t stride) {
    for (int64_t begin = 0; begin < total; begin += Count * stride) {
        for (int64_t i = begin; i < begin + stride; i += kLanes<T>) {
            Vec<T> x[Count];
#pragma GCC unroll 8
            for (int v = 0; v < Count; ++v) x[v] = within<Width, T>(load(data + i + v * stride));
            across<Count, T>(x);
#pragma GCC unroll 8
            for (int v = 0; v < Count; ++v) store(data + i + v * stride, x[v]);
        }
    }
}

// How many vectors a pass takes at once where `left` numbers vectors yet: 2, 4 or 8, as even as the passes can be.
inline int vectors_at_once(int64_t left) {
    const int bits = std::countr_zero(uint64_t(left)), passes = (bits + 2) / 3;
    return passes == 0 ? 1 : 1 << (bits + passes - 1) / passes;
}

template <int Width, class T>
int64_t widest_pass(T* data, int64_t total, int64_t stride, int64_t left) {
    const int count = vectors_at_once(left);
    switch (count) {
        case 1: pass<1, Width>(data, total, stride); break;
        case 2: pass<2, Width>(data, total, stride); break;
        case 4: pass<4, Width>(data, total, stride); break;
        default: pass<8, Width>(data, total, stride); break;
    }
    return stride * count;
}

// Rows shorter than a vector.
template <int Width, class T>
void short_rows(T* data, int64_t total, int64_t n) {
    if constexpr (Width > 1) {
        if (n == Width) return pass<1, Width>(data, total, kLanes<T>);
        short_rows<Width / 2>(data, total, n);
    }
}

// Transforms each of the rows of n elements that lie one after another in `data`: `total` elements in whole vectors.
template <class T>
void transform_rows(T* data, int64_t total, int64_t n) {
    constexpr int L = kLanes<T>;
    if (n < L) return short_rows<L / 2>(data, total, n);
    for (int64_t stride = widest_pass<L>(data, total, L, n / L); stride < n;)
        stride = widest_pass<1>(data, total, stride, n / stride);
}

}  // namespace onchip::ONCHIP_ISA

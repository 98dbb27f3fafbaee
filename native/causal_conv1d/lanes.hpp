// What lies where in a call's tensors, and vectors of it.
//
// Where the caller's memory is contiguous along channels, lanes of a vector are channels; where it is contiguous along
// time, they are times. In both, element (time i, channel c) of a stretch of rows is at data + i·step + c: of contiguous
// time, a stretch is of one channel, and its step is 1. The convolution is the same code.
#pragma once

#include <algorithm>

#include "common/activations.hpp"
#include "common/convert.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

template <class S, bool Time>
struct Stretch {
    S* data;
    int64_t pitch;  // from a time to the next, where lanes are channels

    int64_t step() const { return Time ? 1 : pitch; }
    S* at(int64_t time, int64_t channel) const { return data + time * step() + channel; }
    Stretch from(int64_t time) const { return {at(time, 0), pitch}; }
};

// Of a vector's lanes those that are there: all, or the first `count`, while the others are zero.
template <class T, bool All>
struct Lanes {
    int64_t count;

    template <class S>
    Vec<T> load(const S* p) const {
        if constexpr (All) return load_as<T>(p);
        S there[kLanes<T>] = {};
        std::memcpy(there, p, count * sizeof(S));
        return load_as<T>(there);
    }
    template <class S>
    void store(S* p, Vec<T> x) const {
        if constexpr (All) return store_as<T>(p, x);
        S there[kLanes<T>];
        store_as<T>(there, x);
        std::memcpy(p, there, count * sizeof(S));
    }
};

#define ONCHIP_INLINED __attribute__((always_inline))  // a loop's body that keeps in registers what it captures

// Calls each(n, time, channel, lanes) for the vectors of `rows` rows of `channels` channels: n of them, a constant, follow
// each other in time. Where that is several, they share inputs and taps.
template <class T, bool Time, class Each>
ONCHIP_INLINED inline void for_vectors(int64_t rows, int64_t channels, const Each& each) {
    constexpr int64_t kWhole = kLanes<T>, kTimes = Time ? kWhole : 1;
    const auto across = [&](auto n, int64_t t) ONCHIP_INLINED {
        const int64_t lanes = Time ? std::min(rows - t, kWhole) : channels;
        int64_t c = 0;
        for (; c + kWhole <= lanes; c += kWhole) each(n, t, c, Lanes<T, true>{kWhole});
        if (c < lanes) each(n, t, c, Lanes<T, false>{lanes - c});
    };
    constexpr std::integral_constant<int, 4> kSeveral;
    int64_t t = 0;
    for (; t + kSeveral * kTimes <= rows; t += kSeveral * kTimes) across(kSeveral, t);
    for (; t < rows; t += kTimes) across(std::integral_constant<int, 1>{}, t);
}

// n elements, each `stride` from the one before.
template <class S>
inline void copy_row(S* to, int64_t to_stride, const S* from, int64_t from_stride, int64_t n) {
    if (to_stride == 1 && from_stride == 1) return void(std::memcpy(to, from, n * sizeof(S)));
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

}  // namespace onchip::ONCHIP_ISA

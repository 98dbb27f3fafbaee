// A tile of inputs in the first cache, in the type of the arithmetic, and the convolution of it.
//
// Time `t` and channel `c` of a tile lie at t·pitch + c. Where the caller's memory is contiguous along channels, a tile is
// some rows of a block of channels, lanes are channels, and `pitch` is the block's size, in whole vectors. Where it is
// contiguous along time, a tile is a stretch of one channel, lanes are times, and `pitch` is 1. In both, the vector that
// lies one pitch on is the one that follows in time: the convolution is the same code.
#pragma once

#include "common/activations.hpp"
#include "common/convert.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

template <class T, bool Time>
struct Shape {
    static constexpr int64_t kTileElements = 8192 / sizeof(T);  // two or three tiles share the first cache
    static constexpr int64_t kMostChannels = 1024 / sizeof(T);

    int64_t channels;  // of a block
    int64_t pitch;     // with a cache line between rows, which would otherwise share the cache's sets
    int64_t rows;      // that a tile has besides its history
    int64_t history;   // rows before the first that the filter reaches

    explicit Shape(const causal_conv1d::Problem& p)
        : channels(Time ? 1 : std::min<int64_t>(p.channels, kMostChannels)),
          pitch(Time ? 1 : round_up(channels, kLanes<T>) + 64 / sizeof(T)),
          rows(std::max(kTileElements / pitch, std::max<int64_t>(p.width - 1, kLanes<T>))),
          history(p.width - 1) {}

    static constexpr int64_t kTimes = Time ? kLanes<T> : 1;  // that a vector holds
    static constexpr int64_t kChannels = Time ? 1 : kLanes<T>;

    // Where the last vector of a row of `count` channels ends.
    static int64_t end(int64_t count) { return Time ? 1 : round_up(count, kLanes<T>); }

    // Elements of a tile with its history; the last vector of a stretch of time may reach beyond it.
    int64_t elements() const { return (history + rows) * pitch + kLanes<T>; }
};

// What a vector of lanes at channel `c` sees of a number for each channel.
template <class T, bool Time>
inline Vec<T> of_channel(const T* numbers, int64_t c) {
    if constexpr (Time) return broadcast(numbers[c]);
    return load(numbers + c);
}

// A filter: taps[w·pitch + c] and bias[c]. `Width` is its width, or 0 where that is not known before the call.
template <class T, bool Time, int Width>
struct Filter {
    const T* taps;
    const T* bias;
    int64_t width, pitch;

    // The taps of channel c, in registers where their number is known.
    struct Taps {
        Vec<T> known[Width ? Width : 1];
        const Filter& filter;
        int64_t c;

        Taps(const Filter& f, int64_t channel) : filter(f), c(channel) {
            for (int w = 0; w < Width; ++w) known[w] = of_channel<T, Time>(f.taps + w * f.pitch, c);
        }
        Vec<T> operator[](int64_t w) const {
            if constexpr (Width) return known[w];
            return of_channel<T, Time>(filter.taps + w * filter.pitch, c);
        }
        int64_t width() const { return Width ? Width : filter.width; }
    };
};

// bias + Σ_w taps[w] · x[w], where x points at the first input that the filter sees.
template <class T, class Taps>
inline Vec<T> convolved(const Taps& taps, Vec<T> bias, const T* x, int64_t pitch) {
    Vec<T> sum = bias;
#pragma GCC unroll 4
    for (int64_t w = 0; w < taps.width(); ++w) sum += taps[w] * load(x + w * pitch);
    return sum;
}

// Σ_w taps[w] · g[width - 1 - w]: the transpose, where g points at the present's gradient.
template <class T, class Taps>
inline Vec<T> correlated(const Taps& taps, const T* g, int64_t pitch) {
    Vec<T> sum = {};
#pragma GCC unroll 4
    for (int64_t w = 0; w < taps.width(); ++w) sum += taps[w] * load(g + (taps.width() - 1 - w) * pitch);
    return sum;
}

// The block of a call's channels that a worker is at: reads and writes `count` rows from time t of a tensor
// (batch, time, channel).
struct Columns {
    int64_t first, count;

    template <class T, bool Time>
    void read(T* to, int64_t pitch, const Tensor& x, int64_t batch, int64_t t, int64_t rows) const {
        if constexpr (Time) return read_row(to, x.at(batch, t, first), x.dtype, x.strides[1], rows);
        for (int64_t i = 0; i < rows; ++i)
            read_row(to + i * pitch, x.at(batch, t + i, first), x.dtype, x.strides[2], count);
    }
    template <class T, bool Time>
    void write(const Tensor& x, int64_t batch, int64_t t, const T* from, int64_t pitch, int64_t rows) const {
        if constexpr (Time) return write_row(x.at(batch, t, first), x.dtype, x.strides[1], from, T(1), rows);
        for (int64_t i = 0; i < rows; ++i)
            write_row(x.at(batch, t + i, first), x.dtype, x.strides[2], from + i * pitch, T(1), count);
    }
};

}  // namespace onchip::ONCHIP_ISA

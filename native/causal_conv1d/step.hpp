// What a step does to the state: each row takes the place of the one before it, and the present input that of the last.
#pragma once

#include "common/parallel.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

template <class S>
void shift_rows_as(const causal_conv1d::Problem& p, const Tensor& state, int64_t rows, int64_t batch) {
    const int64_t row = state.strides[1], channel = state.strides[2], x_channel = p.x.strides[2];
    S* const to = reinterpret_cast<S*>(state.at(batch, 0, 0));
    const S* const x = reinterpret_cast<const S*>(p.x.at(batch, 0, 0));
    if (row == 1) {
        for (int64_t c = 0; c < p.channels; ++c) {
            for (int64_t i = 0; i + 1 < rows; ++i) to[c * channel + i] = to[c * channel + i + 1];
            to[c * channel + rows - 1] = x[c * x_channel];
        }
        return;
    }
    for (int64_t i = 0; i + 1 < rows; ++i)
        for (int64_t c = 0; c < p.channels; ++c) to[i * row + c * channel] = to[(i + 1) * row + c * channel];
    for (int64_t c = 0; c < p.channels; ++c) to[(rows - 1) * row + c * channel] = x[c * x_channel];
}

inline void shift_rows(const causal_conv1d::Problem& p, const Tensor& state, int64_t rows) {
    const int64_t size = item_size(state.dtype);
    if (rows == 0) return;
    const int threads = p.channels * rows * int64_t(p.sequences.size()) < (1 << 16) ? 1 : p.threads;
    parallel_units(threads, int64_t(p.sequences.size()), [&](int, int64_t batch) {
        if (size == 8) return shift_rows_as<uint64_t>(p, state, rows, batch);
        if (size == 4) return shift_rows_as<uint32_t>(p, state, rows, batch);
        shift_rows_as<uint16_t>(p, state, rows, batch);
    });
}

}  // namespace onchip::ONCHIP_ISA

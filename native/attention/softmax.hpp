// The online softmax: a row's running maximum and sum, in units of log 2, while its keys arrive tile by tile.
#pragma once

#include "scores.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
struct Running {
    T top = kMinusInfinity<T>;
    T sum = T(0);
};

// x[begin, end), logits, becomes exp2(x - top) under the row's new maximum. Returns the factor that what was summed
// under the old maximum must be multiplied by: exactly 1 where the maximum did not move.
template <class T>
inline T absorb(Running<T>& row, T* x, int64_t begin, int64_t end) {
    Vec<T> tops = broadcast(row.top);
    for (int64_t c = begin; c < end; c += kLanes<T>) tops = maximum<T>(tops, load(x + c));
    const T top = horizontal_max<T>(tops);
    // A row that has seen nothing keeps -inf; subtracting 0 from it makes its probabilities 0 and not NaN.
    const T base = top == kMinusInfinity<T> ? T(0) : top;
    Vec<T> sums{};
    for (int64_t c = begin; c < end; c += kLanes<T>) {
        const Vec<T> p = exp2(load(x + c) - base);
        store(x + c, p);
        sums += p;
    }
    const T factor = top == row.top ? T(1) : exp2(broadcast(row.top - top))[0];
    row.sum = row.sum * factor + horizontal_sum<T>(sums);
    row.top = top;
    return factor;
}

template <class T>
inline void scale_row(T* x, int64_t n, T factor) {
    for (int64_t c = 0; c < n; c += kLanes<T>) store(x + c, load(x + c) * factor);
}

// Closes a row: adds the sink, divides, writes out and lse. `x` holds Σ p·v.
template <class T>
void finish_row(const Problem& p, const Sequence& s, int64_t kv_head, int64_t row, Running<T> run, const T* x) {
    const int64_t i = row / p.group(), head = kv_head * p.group() + row % p.group();
    double top = run.top, sum = run.sum, factor = 1;
    if (p.sinks) {
        const double sink = *reinterpret_cast<const T*>(p.sinks.at(head, 0, 0)) * kLog2e;
        const double both = std::max(top, sink);
        factor = top == both ? 1 : std::exp2(top - both);
        sum = sum * factor + std::exp2(sink - both);
        top = both;
    }
    const bool empty = sum == 0;  // a NaN sum is not empty: it must show
    write_row(p.out.at(s.batch, s.q_start + i, head), p.out.dtype, p.out.strides[3], x, T(empty ? 0 : factor / sum),
              p.value_dim);
    *reinterpret_cast<T*>(p.lse.at(s.batch, head, s.q_start + i)) =
        empty ? kMinusInfinity<T> : T((top + std::log2(sum)) * kLn2);
}

}  // namespace onchip::ONCHIP_ISA

// The online softmax: a row's running maximum and sum, in units of log 2, while its keys arrive tile by tile.
#pragma once

#include "common/scratch.hpp"
#include "scores.hpp"

namespace onchip::ONCHIP_ISA {

// A row's maximum and sum so far, kept in arrays so that kLanes rows are one vector.
template <class T>
struct Running {
    T* top;
    T* sum;

    Running(Scratch& scratch, size_t rows) : top(scratch.take<T>(padded(rows))), sum(scratch.take<T>(padded(rows))) {}
    static size_t need(size_t rows) { return 2 * Scratch::need<T>(padded(rows)); }
    static size_t padded(size_t rows) { return size_t(round_up(int64_t(rows), kLanes<T>)); }
    void clear(int64_t begin, int64_t end) {
        std::fill(top + begin, top + end, kMinusInfinity<T>);
        std::fill(sum + begin, sum + end, T(0));
    }
};

// The logits x[row][begin, end) of kLanes rows become exp2(x - top) under the rows' new maxima. `factor[row]` receives
// what a sum under the old maximum must be multiplied by: exactly 1 where the maximum did not move.
template <class T>
inline void absorb(T* top, T* sum, T* factor, T* x, int64_t x_row, int64_t begin, int64_t end) {
    constexpr int L = kLanes<T>;
    Vec<T> each[L];
    for (int r = 0; r < L; ++r) {
        each[r] = broadcast(kMinusInfinity<T>);
        for (int64_t c = begin; c < end; c += L) each[r] = maximum<T>(each[r], load(x + r * x_row + c));
    }
    const Vec<T> before = load(top), tops = maximum<T>(before, reduce_each<T>(each, maximum<T>));
    // A row that has seen nothing keeps -inf; subtracting 0 from it makes its probabilities 0 and not NaN.
    const Vec<T> base = tops == kMinusInfinity<T> ? Vec<T>{} : tops;
    for (int r = 0; r < L; ++r) {
        each[r] = Vec<T>{};
        const Vec<T> shift = broadcast<T>(base[r]);
        for (int64_t c = begin; c < end; c += L) {
            const Vec<T> p = exp2(load(x + r * x_row + c) - shift);
            store(x + r * x_row + c, p);
            each[r] += p;
        }
    }
    const Vec<T> factors = exp2(before - base);
    store(factor, factors);
    store(top, tops);
    store(sum, load(sum) * factors + reduce_each<T>(each, [](Vec<T> a, Vec<T> b) { return a + b; }));
}

// Closes a row: adds the sink, divides, writes out and lse. `x` holds Σ p·v.
template <class T>
void finish_row(const Problem& p, const Sequence& s, int64_t kv_head, int64_t row, T row_top, T row_sum, const T* x) {
    const int64_t i = p.query_of(row), head = kv_head * p.group + p.member_of(row);
    double top = row_top, sum = row_sum, factor = 1;
    if (p.sinks) {
        const double sink = *reinterpret_cast<const T*>(p.sinks.at(head, 0, 0)) * kLog2e;
        const double both = std::max(top, sink);
        factor = top == both ? 1 : std::exp2(top - both);
        sum = sum * factor + (sink == kMinusInfinity<double> ? 0 : std::exp2(sink - both));
        top = both;
    }
    const bool empty = sum == 0;  // a NaN sum is not empty: it must show
    write_row(p.out.at(s.batch, s.q_start + i, head), p.out.dtype, p.out.strides[3], x, T(empty ? 0 : factor / sum),
              p.value_dim);
    *reinterpret_cast<T*>(p.lse.at(s.batch, head, s.q_start + i)) =
        empty ? kMinusInfinity<T> : T((top + std::log2(sum)) * kLn2);
}

}  // namespace onchip::ONCHIP_ISA

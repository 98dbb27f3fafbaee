// From products q·k to probabilities: softcap, ALiBi, bias and mask, and the way back through them.
//
// Logits are kept in units of log 2, so that the softmax is exp2 and needs no further factor: the query is packed with
// `query_factor`, which holds scale · log2 e, or scale / softcap where tanh comes next.
#pragma once

#include <cmath>
#include <limits>

#include "common/gemm.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::kLn2;
using attention::kLog2e;
using attention::Problem;
using attention::Reach;
using attention::Sequence;

template <class T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

inline double query_factor(const Problem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e; }
// d(logit) / d(packed q · k), but for the softcap's 1 - tanh², which differs from entry to entry.
inline double logit_factor(const Problem& p) { return p.softcap > 0 ? p.softcap : kLn2; }

// The terms that one (sequence, key head) adds to its products.
template <class T>
class Scores {
public:
    Scores(const Problem& p, const Sequence& s, int64_t kv_head)
        : p_(p), s_(s), reach_(p, s), first_head_(kv_head * p.group),
          plain_(!(p.softcap > 0) && !p.bias && !p.slopes) {}

    const Reach& reach() const { return reach_; }
    int64_t begin(int64_t row) const { return reach_.begin(p_.query_of(row)); }
    int64_t end(int64_t row) const { return reach_.end(p_.query_of(row)); }
    int64_t head(int64_t row) const { return first_head_ + p_.member_of(row); }
    bool plain() const { return plain_; }  // nothing but a mask

    // x[column] holds the row's product with key `first + column` and becomes the logit, for columns [begin, end), both
    // multiples of a vector; -inf outside `seen`, the columns whose keys the row sees. `cap`, if any, receives
    // 1 - tanh². `buffer` holds a row.
    void logits(int64_t row, int64_t first, int64_t begin, int64_t end, Range seen, T* x, T* cap, T* buffer) const {
        if (p_.softcap > 0) apply_softcap(begin, end, x, cap);
        if (p_.slopes) apply_slope(row, first, begin, end, x);
        const int64_t lo = std::clamp(seen.begin, begin, end);
        const int64_t hi = std::clamp(seen.end, lo, end);
        if (p_.bias) apply_bias(row, first, lo, hi, x, buffer);
        std::fill(x + begin, x + lo, kMinusInfinity<T>);
        std::fill(x + hi, x + end, kMinusInfinity<T>);
    }

    T slope(int64_t row) const { return *reinterpret_cast<const T*>(p_.slopes.at(s_.index, head(row), 0)); }

private:
    void apply_softcap(int64_t begin, int64_t end, T* x, T* cap) const {
        const T factor = T(p_.softcap * kLog2e);
        for (int64_t c = begin; c < end; c += kLanes<T>) {
            const Vec<T> t = tanh<T>(load(x + c));
            store(x + c, t * factor);
            if (cap != nullptr) store(cap + c, 1 - t * t);
        }
    }

    void apply_slope(int64_t row, int64_t first, int64_t begin, int64_t end, T* x) const {
        const T factor = T(slope(row) * kLog2e);
        const int64_t position = reach_.position(p_.query_of(row)) - first;
        for (int64_t c = begin; c < end; ++c) x[c] -= factor * T(std::abs(position - c));
    }

    void apply_bias(int64_t row, int64_t first, int64_t lo, int64_t hi, T* x, T* buffer) const {
        const char* from = p_.bias.at(s_.index, head(row), p_.query_of(row), first + lo);
        const int64_t stride = p_.bias.strides[3];
        if (p_.bias.dtype == DType::boolean) {
            for (int64_t c = lo; c < hi; ++c) x[c] = from[(c - lo) * stride] ? x[c] : kMinusInfinity<T>;
        } else {
            read_row(buffer, from, p_.bias.dtype, stride, hi - lo);
            for (int64_t c = lo; c < hi; ++c) x[c] += buffer[c - lo] * T(kLog2e);
        }
    }

    const Problem& p_;
    const Sequence& s_;
    const Reach reach_;
    const int64_t first_head_;
    const bool plain_;
};

}  // namespace onchip::ONCHIP_ISA

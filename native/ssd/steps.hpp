// The steps of one head in a chunk of time, and the decays that follow from them.
#pragma once

#include "common/activations.hpp"
#include "common/gemm.hpp"
#include "common/scratch.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using ssd::Problem;
using ssd::Sequence;

// Decays are exponentials of sums over their own segment of time. Row i of the segments' sums is row i - 1 plus a[i],
// with a new segment, which is empty, at its end: no sum is ever taken away from another.
template <class T>
class Steps {
public:
    const int64_t s_pitch;  // of `decay`
    T* const step;          // s[t], what dt became
    T* const slope;         // its derivative with respect to dt
    T* const from_start;    // exp(A · Σ s[k]) over the chunk's k ≤ t
    T* const decay;         // exp(A · Σ s[k]) over j < k ≤ i, at (i, j); 0 above the diagonal

    Steps(const Problem& p, Scratch& scratch)
        : s_pitch(pitch<T>(p.chunk)), step(scratch.take<T>(s_pitch)), slope(scratch.take<T>(s_pitch)),
          from_start(scratch.take<T>(s_pitch)), decay(scratch.take<T>(p.chunk * s_pitch)), p_(p),
          segments_(scratch.take<T>(s_pitch)) {}

    static size_t need(const Problem& p) {
        return 4 * Scratch::need<T>(pitch<T>(p.chunk)) + Scratch::need<T>(p.chunk * pitch<T>(p.chunk));
    }

    void read(const Sequence& s, int64_t head, int64_t first, int64_t count) {
        read_row(step, p_.dt.at(s.batch, s.start + first, head), p_.dt.dtype, p_.dt.strides[1], count);
        T bias = 0;
        if (p_.dt_bias) read_row(&bias, p_.dt_bias.at(head, 0, 0), p_.dt_bias.dtype, 1, 1);
        for (int64_t t = 0; t < count; t += kLanes<T>) find_steps(load(step + t) + bias, step + t, slope + t);
        read_row(&rate_, p_.A.at(head, 0, 0), p_.A.dtype, 1, 1);
        count_ = count;
        find_decays();
    }

    T rate() const { return rate_; }
    T whole() const { return from_start[count_ - 1]; }                       // the decay over the chunk
    const T* to_end() const { return decay + (count_ - 1) * s_pitch; }  // the decay from each step to the last one

private:
    void find_steps(Vec<T> raw, T* values, T* slopes) const {
        const Vec<T> low = broadcast(T(p_.low)), high = broadcast(T(p_.high));
        const Vec<T> x = p_.softplus ? softplus<T>(raw) : raw;
        const Vec<T> inner = p_.softplus ? (raw > 20 ? broadcast(T(1)) : sigmoid<T>(raw)) : broadcast(T(1));
        store(values, x < low ? low : (x > high ? high : x));  // keeps a NaN
        store(slopes, x < low ? Vec<T>{} : (x > high ? Vec<T>{} : inner));
    }

    void find_decays() {
        const T factor = rate_ * kLog2e<T>;
        T sum = 0;
        for (int64_t t = 0; t < count_; ++t) from_start[t] = sum += step[t] * factor;
        for (int64_t t = 0; t < count_; t += kLanes<T>) store(from_start + t, exp2_any<T>(load(from_start + t)));
        for (int64_t i = 0; i < count_; ++i) {
            T* const row = decay + i * s_pitch;
            const T a = step[i] * factor;
            segments_[i] = -a;
            for (int64_t j = 0; j <= i; j += kLanes<T>) {
                const Vec<T> sums = load(segments_ + j) + a;
                store(segments_ + j, sums);
                store(row + j, exp2_any<T>(sums));
            }
            segments_[i] = 0;  // and not what -a + a gives where a is infinite
            row[i] = 1;
            std::fill(row + i + 1, row + s_pitch, T(0));
        }
    }

    const Problem& p_;
    T* const segments_;
    T rate_ = 0;
    int64_t count_ = 0;
};

}  // namespace onchip::ONCHIP_ISA

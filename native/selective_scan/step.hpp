// One token: the state is read once and written once, in place.
//
// Here lanes are states, which lie next to each other in memory; a vector's worth of channels is summed across lanes at
// once, and finished with lanes as channels.
#pragma once

#include <array>

#include "common/activations.hpp"
#include "common/scratch.hpp"
#include "tile.hpp"

namespace onchip::ONCHIP_ISA {

constexpr int64_t kStepChannels = 512;  // of a unit

// x, dt, z and out are (batch, channels), B and C (batch, groups, states), the state is final_state.
template <class T>
class ScanStep {
public:
    ScanStep(const Problem& p, Scratch& scratch)
        : p_(p),
          width_(round_up(p.states, L)),
          B_(scratch.take<T>(width_)),
          C_(scratch.take<T>(width_)),
          A_(scratch.take<T>(width_)),
          h_(scratch.take<T>(width_)) {
        for (T*& row : channels_) row = scratch.take<T>(kStepChannels);
        for (T* row : {B_, C_, A_, h_}) std::fill_n(row, width_, T(0));
    }

    static size_t need(const Problem& p) {
        return 4 * Scratch::need<T>(round_up(p.states, L)) + 6 * Scratch::need<T>(kStepChannels);
    }

    void run(int64_t batch, int64_t group, int64_t first, int64_t count) {
        read_row(B_, p_.B.at(batch, group, 0), p_.B.dtype, p_.B.strides[2], p_.states);
        read_row(C_, p_.C.at(batch, group, 0), p_.C.dtype, p_.C.strides[2], p_.states);
        const auto [x, dt, z, D, bias, y] = channels_;
        read(x, p_.x, p_.x.at(batch, first, 0), p_.x.strides[1], count);
        read(dt, p_.dt, p_.dt.at(batch, first, 0), p_.dt.strides[1], count);
        read(z, p_.z, p_.z.at(batch, first, 0), p_.z.strides[1], count);
        read(D, p_.D, p_.D.at(first, 0, 0), p_.D.strides[0], count);
        read(bias, p_.dt_bias, p_.dt_bias.at(first, 0, 0), p_.dt_bias.strides[0], count);
        for (int64_t c = 0; c < count; c += L) {
            Vec<T> step = load(dt + c) + load(bias + c);
            if (p_.softplus) step = softplus<T>(step);
            T exponents[L], inputs[L];
            store(exponents, step * kLog2e<T>);
            store(inputs, step * load(x + c));
            Vec<T> sums[L] = {};
            for (int64_t i = 0; i < std::min(L, count - c); ++i)
                sums[i] = advance(batch, first + c + i, exponents[i], inputs[i]);
            Vec<T> out = reduce_each<T>(sums, [](Vec<T> a, Vec<T> b) { return a + b; }) + load(D + c) * load(x + c);
            if (p_.z) out *= silu<T>(load(z + c));
            store(y + c, out);
        }
        write_row(p_.out.at(batch, first, 0), p_.out.dtype, p_.out.strides[1], y, T(1), count);
    }

private:
    static constexpr int64_t L = kLanes<T>;

    static void read(T* to, const Tensor& x, const char* from, int64_t stride, int64_t count) {
        std::fill_n(to + (x ? count : 0), round_up(count, L) - (x ? count : 0), T(0));
        if (x) read_row(to, from, x.dtype, stride, count);
    }

    // A channel's states; the products with C, to be summed.
    Vec<T> advance(int64_t batch, int64_t d, T exponent, T input) {
        const Tensor& state = p_.final_state;
        char* const at = state.at(batch, d, 0);
        const bool in_place = whole(state, 2), direct = whole(p_.A, 1);
        if (!direct) read_row(A_, p_.A.at(d, 0, 0), p_.A.dtype, p_.A.strides[1], p_.states);
        if (!in_place) read_row(h_, at, state.dtype, state.strides[2], p_.states);
        const T* const A = direct ? reinterpret_cast<const T*>(p_.A.at(d, 0, 0)) : A_;
        T* const h = in_place ? reinterpret_cast<T*>(at) : h_;
        Vec<T> sum{};
        for (int64_t n = 0; n < width_; n += L) {
            const Vec<T> next = exp2_any<T>(exponent * load(A + n)) * load(h + n) + input * load(B_ + n);
            store(h + n, next);
            sum += next * load(C_ + n);
        }
        if (!in_place) write_row(at, state.dtype, state.strides[2], h, T(1), p_.states);
        return sum;
    }

    // Whether a row of states can be worked on where it is.
    bool whole(const Tensor& x, int dim) const {
        const bool same = x.dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64);
        return same && x.strides[dim] == 1 && width_ == p_.states;
    }

    const Problem& p_;
    const int64_t width_;
    T *const B_, *const C_, *const A_, *const h_;
    std::array<T*, 6> channels_;
};

}  // namespace onchip::ONCHIP_ISA

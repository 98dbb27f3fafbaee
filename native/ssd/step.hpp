// One step of time: the state is read once and written once, possibly onto itself.
#pragma once

#include "steps.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
class StateStep {
public:
    StateStep(const Problem& p, Scratch& scratch)
        : p_(p), steps_(p, scratch), b_(scratch.take<T>(p.state_dim)), c_(scratch.take<T>(p.state_dim)),
          row_(scratch.take<T>(p.state_dim)), x_(scratch.take<T>(width(p))), y_(scratch.take<T>(width(p))),
          extra_(scratch.take<T>(width(p))) {}

    static size_t need(const Problem& p) {
        return Steps<T>::need(p) + 3 * Scratch::need<T>(p.state_dim) + 3 * Scratch::need<T>(width(p));
    }

    void run(const Sequence& s, int64_t head) {
        steps_.read(s, head, 0, 1);
        read_row(b_, p_.B.at(s.batch, 0, head / p_.group), p_.B.dtype, p_.B.strides[3], p_.state_dim);
        read_row(c_, p_.C.at(s.batch, 0, head / p_.group), p_.C.dtype, p_.C.strides[3], p_.state_dim);
        read_row(x_, p_.x.at(s.batch, 0, head), p_.x.dtype, p_.x.strides[3], p_.dim);
        for (int64_t d = 0; d < p_.dim; ++d) y_[d] = update(s, head, d, steps_.step[0] * x_[d], steps_.whole());
        if (p_.D) {
            read_row(extra_, p_.D.at(head, 0, 0), p_.D.dtype, p_.D.strides[1], p_.dim);
            for (int64_t d = 0; d < p_.dim; ++d) y_[d] += extra_[d] * x_[d];
        }
        if (p_.z) {
            read_row(extra_, p_.z.at(s.batch, 0, head), p_.z.dtype, p_.z.strides[3], p_.dim);
            for (int64_t d = 0; d < p_.dim; d += kLanes<T>)
                store(y_ + d, load(y_ + d) * silu<T>(load(extra_ + d)));
        }
        write_row(p_.out.at(s.batch, 0, head), p_.out.dtype, p_.out.strides[3], y_, T(1), p_.dim);
    }

private:
    static int64_t width(const Problem& p) { return round_up(p.dim, kLanes<T>); }

    // Row d of the state, in place where it lies as the arithmetic wants it; its product with C.
    T update(const Sequence& s, int64_t head, int64_t d, T u, T decay) {
        const Tensor &from = p_.initial_state, &to = p_.final_state;
        const T* in = reinterpret_cast<const T*>(from.at(s.index, head, d));
        if (from.dtype != to.dtype || from.strides[3] != 1) {
            read_row(row_, from.at(s.index, head, d), from.dtype, from.strides[3], p_.state_dim);
            in = row_;
        }
        T* const out = to.strides[3] == 1 ? reinterpret_cast<T*>(to.at(s.index, head, d)) : row_;
        const T y = advance(in, out, u, decay);
        if (out == row_) write_row(to.at(s.index, head, d), to.dtype, to.strides[3], row_, T(1), p_.state_dim);
        return y;
    }

    T advance(const T* in, T* out, T u, T decay) const {
        constexpr int L = kLanes<T>;
        const int64_t whole = p_.state_dim / (2 * L) * 2 * L;
        Vec<T> even{}, odd{};
        for (int64_t n = 0; n < whole; n += 2 * L) {
            const Vec<T> h0 = load(in + n) * decay + load(b_ + n) * u;
            const Vec<T> h1 = load(in + n + L) * decay + load(b_ + n + L) * u;
            store(out + n, h0);
            store(out + n + L, h1);
            even += h0 * load(c_ + n);
            odd += h1 * load(c_ + n + L);
        }
        even += odd;
        T sum = 0;
        for (int64_t n = whole; n < p_.state_dim; ++n) sum += (out[n] = in[n] * decay + b_[n] * u) * c_[n];
        for (int lane = 0; lane < L; ++lane) sum += even[lane];
        return sum;
    }

    const Problem& p_;
    Steps<T> steps_;
    T* const b_;
    T* const c_;
    T* const row_;
    T* const x_;
    T* const y_;
    T* const extra_;
};

}  // namespace onchip::ONCHIP_ISA

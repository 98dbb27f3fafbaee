// The backward pass: a thread takes a block of channels of one sequence, the last chunk first.
//
// A chunk's states are computed again from the checkpoint before it, kTile states of a vector of channels at a time, and
// with them in the first cache the chunk is gone through backwards. With g the gradient of h,
//     g_t = exp(δ_{t+1} A) g_{t+1} + C_t dy_t,   dC_t = Σ_d h_t dy_t,   dB_t = Σ_d g_t δ_t x_t,
//     d(δ_t) = x_t (B_t · g_t) + Σ_n A (g_t exp(δ_t A) h_{t-1}),   dA = Σ_t δ_t g_t exp(δ_t A) h_{t-1}.
// dB and dC of a block are summed lane by lane over its vectors, then across lanes, always in the same order.
#pragma once

#include "chunk.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
class ScanBackward {
public:
    ScanBackward(const Problem& p, const Gradients& g, Scratch& scratch)
        : p_(p),
          g_(g),
          chunk_(p, scratch),
          slope_(scratch.take<T>(p.chunk * W)),
          dy_(scratch.take<T>(p.chunk * W)),
          out_(scratch.take<T>(p.chunk * W)),
          y_(scratch.take<T>(p.chunk * W)),
          z_(scratch.take<T>(p.chunk * W)),
          to_u_(scratch.take<T>(p.chunk * W)),
          to_decay_(scratch.take<T>(p.chunk * W)),
          state_(scratch.take<T>(p.states * W)),
          carry_(scratch.take<T>(p.states * W)),
          dA_(scratch.take<T>(p.states * W)),
          dD_(scratch.take<T>(W)),
          dbias_(scratch.take<T>(W)),
          decay_(scratch.take<T>(p.chunk * kTile * L)),
          decayed_(scratch.take<T>(p.chunk * kTile * L)),
          dB_(scratch.take<T>(p.chunk * kTile * L)),
          dC_(scratch.take<T>(p.chunk * kTile * L)) {}

    static size_t need(const Problem& p) {
        return Chunk<T>::need(p) + 7 * Scratch::need<T>(p.chunk * W) + 3 * Scratch::need<T>(p.states * W) +
               2 * Scratch::need<T>(W) + 4 * Scratch::need<T>(p.chunk * kTile * L);
    }

    void run(const Sequence& s, const Block& block) {
        chunk_.enter(block);
        chunk_.read_states(carry_, states(g_.final_state, s.index, block), block);
        std::fill_n(dA_, p_.states * W, T(0));
        std::fill_n(dD_, W, T(0));
        std::fill_n(dbias_, W, T(0));
        for (int64_t t = (s.length - 1) / p_.chunk * p_.chunk; t >= 0 && s.length > 0; t -= p_.chunk)
            retreat(s, block, t, std::min(p_.chunk, s.length - t));
        chunk_.write_states(states(g_.A, s.index, block), dA_, block);
        if (g_.initial_state) chunk_.write_states(states(g_.initial_state, s.index, block), carry_, block);
        write_row(g_.D.at(s.index, block.first, 0), g_.D.dtype, 1, dD_, T(1), block.count);
        write_row(g_.dt_bias.at(s.index, block.first, 0), g_.dt_bias.dtype, 1, dbias_, T(1), block.count);
    }

private:
    static constexpr int64_t W = kWidth<T>, L = kLanes<T>;
    static constexpr int kTile = 2;

    void retreat(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        chunk_.read(s, block, t, length, slope_);
        chunk_.read_states(state_, checkpoint(s.checkpoint + t / p_.chunk, block), block);
        enter_output(s, block, t, length);
        std::fill_n(to_u_, length * W, T(0));
        std::fill_n(to_decay_, length * W, T(0));
        int64_t n = 0;
        for (; n + kTile <= p_.states; n += kTile) some_states<kTile>(s, block, t, n, length);
        for (; n < p_.states; ++n) some_states<1>(s, block, t, n, length);
        leave_inputs(s, block, t, length);
        if (p_.z) leave_gate(s, block, t, length);
    }

    Source checkpoint(int64_t row, const Block& block) const {
        return {p_.checkpoints.at(row, 0, block.first), p_.checkpoints.dtype, p_.checkpoints.strides[1], 1};
    }

    // dy, the gradient of what is gated, and y without the states' part.
    void enter_output(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        chunk_.read_channels(out_, g_.out, s, block, t, length);
        if (p_.z) chunk_.read_channels(z_, p_.z, s, block, t, length);
        for (int64_t j = 0; j < block.lanes<T>(); j += L) {
            Vec<T> dD{};
            const Vec<T> D = load(chunk_.D + j);
            for (int64_t at = j; at < j + length * W; at += W) {
                Vec<T> dy = load(out_ + at);
                if (p_.z) dy *= silu<T>(load(z_ + at));
                store(dy_ + at, dy);
                store(y_ + at, D * load(chunk_.x + at));
                dD += dy * load(chunk_.x + at);
            }
            store(dD_ + j, load(dD_ + j) + dD);
        }
    }

    // COUNT states of all of the block's channels: while dB and dC are summed over them, they stay in the first cache.
    template <int COUNT>
    void some_states(const Sequence& s, const Block& block, int64_t t, int64_t n, int64_t length) {
        std::fill_n(dB_, round_up(length * COUNT, L) * L, T(0));
        std::fill_n(dC_, round_up(length * COUNT, L) * L, T(0));
        for (int64_t j = 0; j < block.lanes<T>(); j += L) {
            chunk_.within(j) ? recompute<COUNT, true>(n, j, length) : recompute<COUNT, false>(n, j, length);
            if (p_.z) {
                backwards<COUNT, true>(n, j, length);
            } else {
                backwards<COUNT, false>(n, j, length);
            }
        }
        sum_lanes<COUNT>(g_.B_partial, dB_, s.row + t, n, block, length);
        sum_lanes<COUNT>(g_.C_partial, dC_, s.row + t, n, block, length);
    }

    // exp(δ A), and that times the state before.
    template <int COUNT, bool WITHIN>
    void recompute(int64_t n, int64_t j, int64_t length) {
        Vec<T> A[COUNT], h[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            A[i] = load(chunk_.A + (n + i) * W + j);
            h[i] = load(state_ + (n + i) * W + j);
        }
        const T* B = chunk_.B + n;
        T *decay = decay_, *decayed = decayed_;
        for (int64_t at = j; at < j + length * W; at += W, B += p_.states) {
            const Vec<T> dt = load(chunk_.dt + at), u = load(chunk_.u + at);
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i, decay += L, decayed += L) {
                const Vec<T> a = decay_of<T, WITHIN>(dt * A[i]);
                const Vec<T> ah = a * h[i];
                store(decay, a);
                store(decayed, ah);
                h[i] = ah + u * B[i];
            }
        }
    }

    template <int COUNT, bool GATED>
    void backwards(int64_t n, int64_t j, int64_t length) {
        Vec<T> A[COUNT], carry[COUNT], dA[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            A[i] = load(chunk_.A + (n + i) * W + j);
            carry[i] = load(carry_ + (n + i) * W + j);
            dA[i] = Vec<T>{};
        }
        // In variables of their own: a store might change the members, as far as the compiler can know.
        const T *const all_dy = dy_ + j, *const all_u = chunk_.u + j, *const all_dt = chunk_.dt + j;
        const T *const all_B = chunk_.B + n, *const all_C = chunk_.C + n, *const decay = decay_, *const decayed = decayed_;
        T *const all_to_u = to_u_ + j, *const all_to_decay = to_decay_ + j, *const all_y = y_ + j;
        T *const all_dB = dB_, *const all_dC = dC_;
        const int64_t states = p_.states;
        for (int64_t t = length - 1; t >= 0; --t) {
            const T *const B = all_B + t * states, *const C = all_C + t * states;
            const Vec<T> dy = load(all_dy + t * W), u = load(all_u + t * W), dt = load(all_dt + t * W);
            Vec<T> to_u = load(all_to_u + t * W), to_decay = load(all_to_decay + t * W), y{};
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                const int64_t at = (t * COUNT + i) * L;
                const Vec<T> ah = load(decayed + at);
                const Vec<T> h = ah + u * B[i];
                const Vec<T> g = carry[i] + dy * C[i];
                if (GATED) y += h * C[i];
                store(all_dC + at, load(all_dC + at) + dy * h);
                store(all_dB + at, load(all_dB + at) + g * u);
                to_u += g * B[i];
                const Vec<T> exponent = g * ah;
                to_decay += exponent * A[i];
                dA[i] += exponent * dt;
                carry[i] = load(decay + at) * g;
            }
            store(all_to_u + t * W, to_u);
            store(all_to_decay + t * W, to_decay);
            if (GATED) store(all_y + t * W, load(all_y + t * W) + y);
        }
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            store(carry_ + (n + i) * W + j, carry[i]);
            store(dA_ + (n + i) * W + j, load(dA_ + (n + i) * W + j) + dA[i]);
        }
    }

    // The gradients of x and dt from those of δ x and of the exponents, which were taken for base 2.
    void leave_inputs(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        for (int64_t j = 0; j < block.lanes<T>(); j += L) {
            Vec<T> dbias{};
            const Vec<T> D = load(chunk_.D + j);
            for (int64_t at = j; at < j + length * W; at += W) {
                const Vec<T> to_u = load(to_u_ + at), x = load(chunk_.x + at);
                const Vec<T> ddt = (x * to_u + load(to_decay_ + at) / kLog2e<T>)*load(slope_ + at);
                dbias += ddt;
                store(to_u_ + at, load(chunk_.dt + at) * to_u + D * load(dy_ + at));
                store(to_decay_ + at, ddt);
            }
            store(dbias_ + j, load(dbias_ + j) + dbias);
        }
        chunk_.write_channels(g_.x, to_u_, s, block, t, length);
        chunk_.write_channels(g_.dt, to_decay_, s, block, t, length);
    }

    // The gradient of z, y silu'(z) times the output's.
    void leave_gate(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        for (int64_t i = 0; i < length * W; i += W) {
            for (int64_t j = i; j < i + block.lanes<T>(); j += L)
                store(y_ + j, load(y_ + j) * load(out_ + j) * silu_slope<T>(load(z_ + j)));
        }
        chunk_.write_channels(g_.z, y_, s, block, t, length);
    }

    template <int COUNT>
    void sum_lanes(const Tensor& to, T* sums, int64_t row, int64_t n, const Block& block, int64_t length) {
        for (int64_t i = 0; i < length * COUNT; i += L) {
            Vec<T> x[L];
            for (int64_t lane = 0; lane < L; ++lane) x[lane] = load(sums + (i + lane) * L);
            store(sums + i, reduce_each<T>(x, [](Vec<T> a, Vec<T> b) { return a + b; }));
        }
        T* const first = reinterpret_cast<T*>(to.at(block.index, row, n));
        for (int64_t t = 0; t < length; ++t)
            for (int i = 0; i < COUNT; ++i) first[t * p_.states + i] = sums[t * COUNT + i];
    }

    const Problem& p_;
    const Gradients& g_;
    Chunk<T> chunk_;
    T* const slope_;     // (tokens, W): dδ/d(dt)
    T* const dy_;        // of what is gated
    T* const out_;       // of what the gate gives
    T* const y_;         // what is gated
    T* const z_;
    T* const to_u_;      // of δ x; then of x
    T* const to_decay_;  // of δ through the exponents; then of dt
    T* const state_;     // (states, W): before the chunk
    T* const carry_;     // of the state before the chunk, and at first after it
    T* const dA_;
    T* const dD_;  // (W,)
    T* const dbias_;
    T* const decay_;    // (tokens, kTile, L): exp(δ A)
    T* const decayed_;  // exp(δ A) h
    T* const dB_;       // (tokens, kTile, L)
    T* const dC_;
};

}  // namespace onchip::ONCHIP_ISA

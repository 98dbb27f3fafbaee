// A chunk of a sequence's tokens as both passes want it: a block's channels, time steps and inputs, and its group's B, C.
#pragma once

#include "common/activations.hpp"
#include "common/scratch.hpp"
#include "tile.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
class Chunk {
public:
    static constexpr int64_t W = kWidth<T>;

    Chunk(const Problem& p, Scratch& scratch)
        : x(scratch.take<T>(p.chunk * W)),
          dt(scratch.take<T>(p.chunk * W)),
          u(scratch.take<T>(p.chunk * W)),
          B(scratch.take<T>(p.chunk * p.states)),
          C(scratch.take<T>(p.chunk * p.states)),
          A(scratch.take<T>(p.states * W)),
          D(scratch.take<T>(W)),
          line(scratch.take<T>(line_size(p))),
          p_(p),
          bias_(scratch.take<T>(W)),
          reach_(scratch.take<T>(W)) {}

    static size_t need(const Problem& p) {
        return 3 * Scratch::need<T>(p.chunk * W) + 2 * Scratch::need<T>(p.chunk * p.states) +
               Scratch::need<T>(p.states * W) + 3 * Scratch::need<T>(W) + Scratch::need<T>(line_size(p));
    }

    // What the channels of a block have for all tokens.
    void enter(const Block& block) {
        read_states(A, {p_.A.at(block.first, 0, 0), p_.A.dtype, p_.A.strides[1], p_.A.strides[0]}, block);
        for (int64_t i = 0; i < p_.states * W; ++i) A[i] *= kLog2e<T>;
        for (int64_t j = 0; j < W; j += kLanes<T>) find_reach(j);
        per_channel(D, p_.D, block);
        per_channel(bias_, p_.dt_bias, block);
    }

    // Tokens [t, t + length) of the sequence. `slope`, where given, is filled with dδ/d(dt).
    void read(const Sequence& s, const Block& block, int64_t t, int64_t length, T* slope = nullptr) {
        read_channels(x, p_.x, s, block, t, length);
        read_channels(dt, p_.dt, s, block, t, length);
        read_tile(B, p_.states, tokens_of_group(p_.B, s, t, block), length, p_.states, line);
        read_tile(C, p_.states, tokens_of_group(p_.C, s, t, block), length, p_.states, line);
        for (int64_t j = 0; j < block.lanes<T>(); j += kLanes<T>) find_steps(j, length, slope);
    }

    // Whether exp2_within takes every exponent of the vector of channels at j.
    bool within(int64_t j) const { return within_[j / kLanes<T>]; }

    void read_channels(T* tile, const Tensor& from, const Sequence& s, const Block& block, int64_t t, int64_t length) {
        if (block.count < block.lanes<T>()) std::fill_n(tile, length * W, T(0));
        read_tile(tile, W, tokens(from, s, t, block), length, block.count, line);
    }
    void write_channels(const Tensor& to, const T* tile, const Sequence& s, const Block& block, int64_t t, int64_t length) {
        write_tile(tokens(to, s, t, block), tile, W, length, block.count, line);
    }

    // A block's states, a row per state; zeros where there is no tensor.
    void read_states(T* tile, const Source& from, const Block& block) {
        if (from.data == nullptr || block.count < W) std::fill_n(tile, p_.states * W, T(0));
        if (from.data != nullptr) read_tile(tile, W, from, p_.states, block.count, line);
    }
    void write_states(const Source& to, const T* tile, const Block& block) {
        write_tile(to, tile, W, p_.states, block.count, line);
    }

    T* const x;   // (tokens, W)
    T* const dt;  // δ
    T* const u;   // δ x
    T* const B;   // (tokens, states)
    T* const C;
    T* const A;  // (states, W): A log2(e)
    T* const D;  // (W,)
    T* const line;

private:
    static int64_t line_size(const Problem& p) { return kLanes<T> * std::max({p.chunk, p.states, W}); }

    void per_channel(T* to, const Tensor& from, const Block& block) {
        std::fill_n(to, W, T(0));
        if (from) read_row(to, from.at(block.first, 0, 0), from.dtype, from.strides[0], block.count);
    }

    // How far δ may be from zero: not at all, and less than that, where A is not finite.
    void find_reach(int64_t j) {
        Vec<T> largest{}, zero{};
        for (int64_t n = 0; n < p_.states; ++n) {
            const Vec<T> a = load(A + n * W + j);
            largest = maximum<T>(largest, a < 0 ? -a : a);
            zero += 0 * a;
        }
        const Vec<T> reach = at_most(broadcast(std::numeric_limits<T>::max()), kExp2Reach<T> / largest);
        store(reach_ + j, zero == 0 ? reach : broadcast(T(-1)));
    }

    void find_steps(int64_t j, int64_t length, T* slope) {
        const Vec<T> bias = load(bias_ + j), reach = load(reach_ + j);
        auto beyond = reach < 0;
        for (int64_t at = j; at < j + length * W; at += W) {
            Vec<T> step = load(dt + at) + bias;
            if (slope != nullptr) store(slope + at, slope_at(step));
            if (p_.softplus) step = softplus<T>(step);
            beyond |= ~((step < 0 ? -step : step) <= reach);
            store(dt + at, step);
            store(u + at, step * load(x + at));
        }
        bool within = true;
        for (int lane = 0; lane < kLanes<T>; ++lane) within &= beyond[lane] == 0;
        within_[j / kLanes<T>] = within;
    }

    Vec<T> slope_at(Vec<T> step) const {
        const Vec<T> one = broadcast(T(1));
        return p_.softplus ? (step > 20 ? one : sigmoid<T>(step)) : one;
    }

    const Problem& p_;
    T* const bias_;
    T* const reach_;
    bool within_[kVectors];
};

// 2^x, where WITHIN for x that are known to be small enough for the quicker way.
template <class T, bool WITHIN>
inline Vec<T> decay_of(Vec<T> exponent) {
    return WITHIN ? exp2_within<T>(exponent) : exp2_any<T>(exponent);
}

}  // namespace onchip::ONCHIP_ISA

// The forward pass: a thread takes a block of channels of one sequence, chunk after chunk.
//
// Lanes are channels, so that nothing is summed across a vector; kTile states at a time stay in registers through a chunk,
// while their chains of products overlap.
#pragma once

#include "chunk.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
class ScanForward {
public:
    ScanForward(const Problem& p, Scratch& scratch)
        : p_(p),
          chunk_(p, scratch),
          state_(scratch.take<T>(p.states * W)),
          y_(scratch.take<T>(p.chunk * W)),
          z_(scratch.take<T>(p.chunk * W)) {}

    static size_t need(const Problem& p) {
        return Chunk<T>::need(p) + Scratch::need<T>(p.states * W) + 2 * Scratch::need<T>(p.chunk * W);
    }

    void run(const Sequence& s, const Block& block) {
        chunk_.enter(block);
        chunk_.read_states(state_, states(p_.initial_state, s.index, block), block);
        for (int64_t t = 0; t < s.length; t += p_.chunk) {
            if (p_.checkpoints) checkpoint(s.checkpoint + t / p_.chunk, block);
            advance(s, block, t, std::min(p_.chunk, s.length - t));
        }
        chunk_.write_states(states(p_.final_state, s.index, block), state_, block);
    }

private:
    static constexpr int64_t W = kWidth<T>;
    static constexpr int kTile = 4;

    void checkpoint(int64_t row, const Block& block) {
        for (int64_t n = 0; n < p_.states; ++n)
            write_row(p_.checkpoints.at(row, n, block.first), p_.checkpoints.dtype, 1, state_ + n * W, T(1), block.count);
    }

    void advance(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        chunk_.read(s, block, t, length);
        const int64_t lanes = block.lanes<T>();
        for (int64_t i = 0; i < length * W; i += W)
            for (int64_t j = 0; j < lanes; j += kLanes<T>) store(y_ + i + j, load(chunk_.D + j) * load(chunk_.x + i + j));
        for (int64_t j = 0; j < lanes; j += kLanes<T>) chunk_.within(j) ? recur<true>(j, length) : recur<false>(j, length);
        if (p_.z) gate(s, block, t, length);
        chunk_.write_channels(p_.out, y_, s, block, t, length);
    }

    template <bool WITHIN>
    void recur(int64_t j, int64_t length) {
        int64_t n = 0;
        for (; n + kTile <= p_.states; n += kTile) some_states<kTile, WITHIN>(n, j, length);
        for (; n < p_.states; ++n) some_states<1, WITHIN>(n, j, length);
    }

    // COUNT states of the vector of channels at j, through the chunk.
    template <int COUNT, bool WITHIN>
    void some_states(int64_t n, int64_t j, int64_t length) {
        Vec<T> A[COUNT], h[COUNT];
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) {
            A[i] = load(chunk_.A + (n + i) * W + j);
            h[i] = load(state_ + (n + i) * W + j);
        }
        const T *B = chunk_.B + n, *C = chunk_.C + n;
        for (int64_t at = j; at < j + length * W; at += W, B += p_.states, C += p_.states) {
            const Vec<T> dt = load(chunk_.dt + at), u = load(chunk_.u + at);
            Vec<T> y = load(y_ + at);
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; ++i) {
                h[i] = decay_of<T, WITHIN>(dt * A[i]) * h[i] + u * B[i];
                y += h[i] * C[i];
            }
            store(y_ + at, y);
        }
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i) store(state_ + (n + i) * W + j, h[i]);
    }

    void gate(const Sequence& s, const Block& block, int64_t t, int64_t length) {
        chunk_.read_channels(z_, p_.z, s, block, t, length);
        const int64_t lanes = block.lanes<T>();
        for (int64_t i = 0; i < length * W; i += W) {
            for (int64_t j = 0; j < lanes; j += kLanes<T>) {
                store(y_ + i + j, load(y_ + i + j) * silu<T>(load(z_ + i + j)));
            }
        }
    }

    const Problem& p_;
    Chunk<T> chunk_;
    T* const state_;  // (states, W)
    T* const y_;      // (tokens, W)
    T* const z_;
};

}  // namespace onchip::ONCHIP_ISA

// Attention, backward: every probability is computed again from Q, K and lse, once, and used for all gradients.
//
// A unit of work is one tile of keys of one (sequence, key head). It runs over the blocks of rows that see it:
//     S = Q Kᵀ;  P = exp2(S - lse);  dP = dO Vᵀ;  dS = P ∘ (dP - δ),  δ = Σ dO·O - dlse
//     dV += Pᵀ dO;  dK += dSᵀ Q;  dQ += dS K
// dK and dV belong to the unit. dQ is summed over units, in the order of the keys: a block of rows has a turn, and a
// unit waits until the tile before it that the block sees is done with it. Blocks run from last to first, so that under a causal
// mask a unit follows its predecessor at a distance instead of meeting it at the diagonal. The order of every sum is
// then fixed, whatever the number of threads, and dQ needs one accumulator for each (sequence, key head) in flight,
// kept in one of a few slots.
//
// Where it stands, counting five products, on the core described in forward.hpp: 70-79 GFLOP/s of a register tile's 90.
// One exponential and half a dozen operations an entry are spread over five products instead of two; the rest is
// copying Q and dO into a block's tile for every tile of keys.
#pragma once

#include <atomic>
#include <thread>

#include "backward_tile.hpp"

namespace onchip::ONCHIP_ISA {

inline void wait_for(const std::atomic<int64_t>& value, int64_t wanted) {
    for (int spins = 0; value.load(std::memory_order_acquire) != wanted; ++spins)
        if (spins > 64) std::this_thread::yield();
}

// What the units of one (sequence, key head) share.
template <class T>
struct Head {
    int64_t sequence, kv_head;
    int64_t tiles, blocks;
    T* grad_q;                         // [rows][whole panels of head_dim]
    const std::atomic<int64_t>* slot;  // tiles finished by the slot's previous user, and how many it has in all
    int64_t slot_tiles;
    std::atomic<int64_t>* turns;       // per block of rows: the tile whose turn it is
    std::atomic<int64_t>* finished;    // tiles
    T* lse2;   // per row, in units of log 2; 0 where the row sees nothing
    T* delta;  // per row
    double* slopes;                    // [tiles][group], or null
};

template <class T>
class BackwardWorker {
public:
    BackwardWorker(const Problem& p, const Gradients& g, Scratch& scratch)
        : p_(p), g_(g), tile_(p, g, scratch), grad_k_(scratch.take<T>(tile_.keys * tile_.q_pitch)),
          grad_v_(scratch.take<T>(tile_.keys * tile_.o_pitch)) {}

    static size_t need(const Problem& p) {
        return BackwardTile<T>::need(p) + Scratch::need<T>(tile_keys(p) * pitch<T>(p.head_dim)) +
               Scratch::need<T>(tile_keys(p) * pitch<T>(p.value_dim));
    }

    void run(const Head<T>& head, int64_t tile) {
        const Sequence& s = p_.sequences[head.sequence];
        const Scores<T> scores(p_, s, head.kv_head);
        const int64_t first = tile * tile_.keys, last = std::min(first + tile_.keys, s.k_length);
        if (head.slot != nullptr) wait_for(*head.slot, head.slot_tiles);
        tile_.pack(s, head.kv_head, first, last);
        std::fill(grad_k_, grad_k_ + tile_.keys * tile_.q_pitch, T(0));
        std::fill(grad_v_, grad_v_ + tile_.keys * tile_.o_pitch, T(0));
        double* const slopes = head.slopes == nullptr ? nullptr : head.slopes + tile * p_.group;
        if (slopes != nullptr) std::fill(slopes, slopes + p_.group, 0.0);
        const BlockMask mask(p_, s, head.kv_head);
        for (int64_t block = head.blocks - 1;; --block) {
            block = mask.last_block(first, block, block_rows(p_));
            if (block < 0) break;
            const Range rows = block_of(p_, s, block);
            const Range seen{scores.begin(rows.begin), scores.end(rows.end - 1)};
            if (seen.begin >= last || seen.end <= first || seen.begin >= seen.end) continue;
            tile_.differentiate(scores, s, head.kv_head, rows, first, head.lse2, head.delta);
            if (slopes != nullptr) tile_.add_slope_gradient(scores, slopes);
            if (p_.softcap > 0) tile_.through_softcap();
            tile_.add_key_gradients(grad_k_, grad_v_);
            wait_for(head.turns[block], tile);
            const int64_t next = mask.next_tile(rows, tile + 1, tile_.keys);
            const bool is_first = tile == mask.next_tile(rows, seen.begin / tile_.keys, tile_.keys);
            add_query_gradient(head, s, rows, is_first, next * tile_.keys >= seen.end);
            head.turns[block].store(next, std::memory_order_release);
        }
        for (int64_t key = first; key < last; ++key) {
            write_row(key_row(g_.k, s, head.kv_head, key), g_.k.dtype, g_.k.strides[3],
                      grad_k_ + (key - first) * tile_.q_pitch, T(logit_factor(p_)), p_.head_dim);
            write_row(key_row(g_.v, s, head.kv_head, key), g_.v.dtype, g_.v.strides[3],
                      grad_v_ + (key - first) * tile_.o_pitch, T(1), p_.value_dim);
        }
        head.finished->fetch_add(1, std::memory_order_release);
    }

private:
    void add_query_gradient(const Head<T>& head, const Sequence& s, Range rows, bool is_first, bool is_last) {
        const int64_t width = round_up(p_.head_dim, kPanel<T>);
        T* const to = head.grad_q + rows.begin * width;
        if (is_first) std::fill(to, to + (rows.end - rows.begin) * width, T(0));
        tile_.add_query_gradient(to, width);
        if (!is_last) return;
        const T factor = T(query_factor(p_) * logit_factor(p_));
        for (int64_t row = rows.begin; row < rows.end; ++row)
            write_row(query_row(p_, g_.q, s, head.kv_head, row), g_.q.dtype, g_.q.strides[3],
                      head.grad_q + row * width, factor, p_.head_dim);
    }

    const Problem& p_;
    const Gradients& g_;
    BackwardTile<T> tile_;
    T* const grad_k_;
    T* const grad_v_;
};

}  // namespace onchip::ONCHIP_ISA

// The gradient of a floating bias: dS, summed over every dimension in which the bias is broadcast.
//
// A pass of its own. A unit owns the entries of the gradient that one block of rows and one tile of keys can touch (all
// rows, or all keys, where that dimension is broadcast) and runs over everything that adds to them, in a fixed order;
// so broadcast dimensions need neither atomics nor a T×T array of partial sums.
#pragma once

#include <array>

#include "backward.hpp"

namespace onchip::ONCHIP_ISA {

template <class T>
class BiasGradientWorker {
public:
    BiasGradientWorker(const Problem& p, const Gradients& g, Scratch& scratch)
        : p_(p), g_(g), tile_(p, g, scratch), sum_(scratch.take<double>(block_rows(p) * tile_.keys)) {}

    static size_t need(const Problem& p) {
        return BackwardTile<T>::need(p) + Scratch::need<double>(block_rows(p) * tile_keys(p));
    }

    // Units along (batch, key head, block of rows, tile of keys); 1 where the bias is broadcast.
    static std::array<int64_t, 4> grid(const Problem& p, const Gradients& g) {
        int64_t blocks = 1, tiles = 1;
        for (const Sequence& s : p.sequences) {
            if (g.bias_shape[2] > 1) blocks = std::max(blocks, count_blocks(p, s));
            if (g.bias_shape[3] > 1) tiles = std::max(tiles, ceil_div(s.k_length, tile_keys(p)));
        }
        return {g.bias_shape[0], g.bias_shape[1] > 1 ? p.kv_heads : 1, blocks, tiles};
    }

    void run(const std::vector<Head<T>>& heads, const std::array<int64_t, 4>& at) {
        at_ = at;
        std::fill(sum_, sum_ + block_rows(p_) * tile_.keys, 0.0);
        for (const Head<T>& head : heads) {
            const Sequence& s = p_.sequences[head.sequence];
            if ((g_.bias_shape[0] > 1 && s.index != at[0]) || (g_.bias_shape[1] > 1 && head.kv_head != at[1])) continue;
            const int64_t tiles = ceil_div(s.k_length, tile_.keys), blocks = count_blocks(p_, s);
            for (int64_t tile = tile_begin(); tile < (g_.bias_shape[3] > 1 ? std::min(tiles, at[3] + 1) : tiles); ++tile) {
                const int64_t first = tile * tile_.keys, last = std::min(first + tile_.keys, s.k_length);
                tile_.pack(s, head.kv_head, first, last);
                for (int64_t block = g_.bias_shape[2] > 1 ? at[2] : 0;
                     block < (g_.bias_shape[2] > 1 ? std::min(blocks, at[2] + 1) : blocks); ++block)
                    add(head, s, block_of(p_, s, block), first, last);
            }
        }
        write();
    }

private:
    int64_t tile_begin() const { return g_.bias_shape[3] > 1 ? at_[3] : 0; }
    bool per_head() const { return g_.bias_shape[1] > 1; }

    // Row of sum_ that a row of the block adds to: per query and head of the group, as far as the bias tells them apart.
    int64_t sum_row(int64_t row, int64_t first_row) const {
        const int64_t group = p_.group, head = per_head() ? row % group : 0, heads = per_head() ? group : 1;
        return (g_.bias_shape[2] > 1 ? (row - first_row) / group * heads : 0) + head;
    }

    void add(const Head<T>& head, const Sequence& s, Range rows, int64_t first, int64_t last) {
        const Scores<T> scores(p_, s, head.kv_head);
        const Range seen{scores.begin(rows.begin), scores.end(rows.end - 1)};
        if (seen.begin >= last || seen.end <= first || seen.begin >= seen.end) return;
        if (!BlockMask(p_, s, head.kv_head).sees(rows, first / tile_.keys, tile_.keys)) return;
        tile_.differentiate(scores, s, head.kv_head, rows, first, head.lse2, head.delta);
        for (int64_t r = 0; r < tile_.count(); ++r) {
            const T* const ds = tile_.gradient(r);
            double* const to = sum_ + sum_row(rows.begin + r, rows.begin) * tile_.keys;
            for (int64_t c = tile_.columns().begin; c < tile_.columns().end; ++c) to[g_.bias_shape[3] > 1 ? c : 0] += ds[c];
        }
    }

    void write() const {
        const int64_t group = p_.group, heads = per_head() ? group : 1;
        const int64_t queries = g_.bias_shape[2] > 1 ? block_rows(p_) / group : 1;
        const int64_t first_query = g_.bias_shape[2] > 1 ? at_[2] * queries : 0, first_key = tile_begin() * tile_.keys;
        const int64_t columns = std::min(tile_.keys, g_.bias_shape[3] - first_key);
        for (int64_t i = 0; i < std::min(queries, g_.bias_shape[2] - first_query); ++i)
            for (int64_t h = 0; h < heads; ++h)
                write_row(g_.bias.at(at_[0], per_head() ? at_[1] * group + h : 0, first_query + i, first_key), g_.bias.dtype,
                          g_.bias.strides[3], sum_ + (i * heads + h) * tile_.keys, 1.0, columns);
    }

    const Problem& p_;
    const Gradients& g_;
    BackwardTile<T> tile_;
    double* const sum_;
    std::array<int64_t, 4> at_{};
};

}  // namespace onchip::ONCHIP_ISA

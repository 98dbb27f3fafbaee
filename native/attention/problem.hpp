// One call to attention as the kernels see it: tensors, sequences, and which keys a row sees.
//
// The query heads that share a key head are worked on together: a "row" is one (query i, head g of the group), numbered
// i · group + g, so that every tile of keys is packed once per group and a decoding step fills its tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/tensor.hpp"

namespace onchip::attention {

constexpr double kLog2e = 1.442695040888963407360;
constexpr double kLn2 = 0.693147180559945309417;

// A sequence of the batch: where its rows begin in packed tensors (0 otherwise) and how many there are.
struct Sequence {
    int64_t batch, q_start, q_length, k_start, k_length;
    int64_t index;  // in the batch, packed or not
};

// A cache whose keys lie in pages: `table` names, for each sequence, the pages of its keys in order, `row` entries
// further for the next sequence. Page n is entry n of the first dimension of k and v. No table: no pages.
struct Pages {
    const int32_t* table = nullptr;
    int64_t row = 0, size = 0;  // size: keys of a page
};

// For each tile along one axis, the visible tiles along the other, ascending: entries are pairs of a tile and of the
// number of its bits, -1 where all of it is seen. `lines` of tiles: a line is a (sequence, head).
struct TileLists {
    const int32_t* starts = nullptr;
    const int32_t* entries = nullptr;
    int64_t tiles = 0;

    using Span = std::pair<const int32_t*, const int32_t*>;
    Span of(int64_t line, int64_t n) const {
        const int32_t* const start = starts + line * (tiles + 1) + n;
        return {entries + 2 * int64_t(start[0]), entries + 2 * int64_t(start[1])};
    }
    // The entries of tiles not before `tile`, and of those up to it.
    Span from(int64_t line, int64_t n, int64_t tile) const {
        const auto [begin, end] = of(line, n);
        return {bound(begin, end, tile), end};
    }
    Span up_to(int64_t line, int64_t n, int64_t tile) const {
        const auto [begin, end] = of(line, n);
        return {begin, bound(begin, end, tile + 1)};
    }

private:
    static const int32_t* bound(const int32_t* begin, const int32_t* end, int64_t tile) {
        while (begin != end) {
            const int32_t* const middle = begin + (end - begin) / 4 * 2;
            if (*middle < tile) {
                begin = middle + 2;
            } else {
                end = middle;
            }
        }
        return begin;
    }
};

// Which queries see which keys, in tiles of `block` of each; bits are [number][query][key / 32].
struct BlockMask {
    int64_t block = 0, batch = 1, heads = 1;  // 1: one serves all. No block: no mask.
    TileLists by_query, by_key;
    const uint32_t* bits = nullptr;

    explicit operator bool() const { return block > 0; }
};

struct Problem {
    std::vector<Sequence> sequences;
    int64_t heads, kv_heads, group, head_dim, value_dim;  // group: heads / kv_heads
    int64_t left, right;  // the window's reach, -1 for unbounded
    double scale, softcap;
    double dropout;       // the probability of being dropped
    uint64_t seed;        // of the mask
    Tensor q, k, v;       // (batch, time, heads, dim)
    Tensor bias;          // (batch, heads, query, key); optional, as the next two
    Tensor slopes;        // (batch, heads) in the type of the arithmetic
    Tensor sinks;         // (heads) in the type of the arithmetic
    Tensor out, lse;      // lse: (batch, heads, time) in the type of the arithmetic
    Pages pages;          // of k and v; for the forward pass
    BlockMask mask;
    int threads;
    bool batch_invariant;  // one kernel for every call, so that a row's bits depend on nothing but what it sees

    // A row's query and its head in the group. Most often the group is one head, and a division by a variable costs as
    // much as a hundred multiplications of the kernels.
    int64_t query_of(int64_t row) const { return group == 1 ? row : row / group; }
    int64_t member_of(int64_t row) const { return group == 1 ? 0 : row % group; }
    bool double_precision() const { return q.dtype == DType::float64; }
};

struct Gradients {
    Tensor out, lse;                // of the outputs; lse optional
    Tensor q, k, v;                 // of the inputs
    Tensor bias;                    // optional; as the problem's bias, stride 0 where that is broadcast
    int64_t bias_shape[4];          // (batch, heads, query, key), 1 where broadcast
    Tensor slopes, sinks;           // optional, (batch, heads) in double: one entry per sequence and head
};

// What a call adds to its cache before it attends: the last `count` keys of each sequence come from here. Pairs of the
// keys' features, and of the queries', are turned by the angle of their position in the cache.
struct Append {
    Tensor k, v;        // (batch, count, heads, dim); optional
    int64_t count = 0;  // of each sequence
    Tensor q;           // the queries before they are turned, into the problem's q
    Tensor cos, sin;    // (positions, pairs); optional, and without them nothing is turned
    std::vector<int64_t> positions;  // of each sequence's first appended key; if empty, its place in the cache
    int64_t pairs = 0;
    bool interleaved = true;  // a pair is two neighbours, not features i and i + pairs
    bool in_order = true;     // query i stands i positions after the first appended key, not beside it
};

// The keys that query i of a sequence sees: [begin, end), ascending with i in both ends.
struct Reach {
    int64_t shift, keys, left, right;

    Reach(const Problem& p, const Sequence& s)
        : shift(s.k_length - s.q_length), keys(s.k_length), left(p.left), right(p.right) {}
    int64_t position(int64_t i) const { return i + shift; }  // the key that query i sits on
    int64_t begin(int64_t i) const { return left < 0 ? 0 : std::clamp<int64_t>(position(i) - left, 0, keys); }
    int64_t end(int64_t i) const { return right < 0 ? keys : std::clamp<int64_t>(position(i) + right + 1, 0, keys); }
};

// The kernels of one instruction set.
struct Kernels {
    void (*forward)(const Problem&);
    void (*backward)(const Problem&, const Gradients&);
    void (*append)(const Problem&, const Append&);
};

}  // namespace onchip::attention

// A call's block mask as one (sequence, key head) sees it: which tiles are worked on, and what is hidden in them.
//
// The kernels' tiles divide the mask's: their keys and the queries of a block of rows lie in one tile of it. Where heads of
// a group have masks of their own, a tile is worked on if one of them sees it.
#pragma once

#include <limits>

#include "common/gemm.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Problem;
using attention::Sequence;

class BlockMask {
public:
    BlockMask(const Problem& p, const Sequence& s, int64_t kv_head)
        : p_(p), mask_(p.mask), heads_(mask_.heads > 1 ? p.group : 1), sequence_(mask_.batch > 1 ? s.index : 0),
          first_head_(mask_.heads > 1 ? kv_head * p.group : 0) {}

    explicit operator bool() const { return bool(mask_); }

    // The first tile of `keys` keys, from `tile` on, of which some of the rows may see something; far away if none.
    int64_t next_tile(Range rows, int64_t tile, int64_t keys) const {
        if (!mask_) return tile;
        const int64_t parts = mask_.block / keys, from = tile / parts;
        int64_t found = kNone;
        for (int64_t n = query_tile(rows.begin); n <= query_tile(rows.end - 1); ++n)
            for (int64_t head = 0; head < heads_; ++head) {
                const auto [entry, stop] = mask_.by_query.from(line(head), n, from);
                if (entry != stop) found = std::min<int64_t>(found, entry[0]);
            }
        return found == from ? tile : found * parts;
    }

    // Whether some of the rows, of one tile, may see something of a tile of `keys` keys.
    bool sees(Range rows, int64_t tile, int64_t keys) const { return next_tile(rows, tile, keys) == tile; }

    // The last block of `length` rows, from `block` down, that may see something of the key; -1 if none does.
    int64_t last_block(int64_t key, int64_t block, int64_t length) const {
        if (!mask_) return block;
        const int64_t parts = mask_.block * p_.group / length, from = block / parts;
        int64_t found = -1;
        for (int64_t head = 0; head < heads_; ++head) {
            const auto [begin, entry] = mask_.by_key.up_to(line(head), key / mask_.block, from);
            if (entry != begin) found = std::max<int64_t>(found, entry[-2]);
        }
        return found == from ? block : found * parts + parts - 1;
    }

    // -inf for what each of the rows, of one tile, does not see of the `keys` keys from `first`. x[0] is the first row's
    // logit of the first key, x[pitch] the second's.
    template <class T>
    void hide(Range rows, int64_t first, int64_t keys, T* x, int64_t pitch) const {
        if (!mask_ || (heads_ == 1 && find(rows.begin, first).bits == kFull)) return;
        for (int64_t row = rows.begin; row < rows.end; ++row, x += pitch) {
            const Tile tile = find(row, first);
            if (tile.bits == kFull) continue;
            if (tile.bits == kHidden) {
                std::fill(x, x + keys, -std::numeric_limits<T>::infinity());
                continue;
            }
            const int64_t words = mask_.block / 32, line = tile.bits * mask_.block + p_.query_of(row) % mask_.block;
            hide_bits(mask_.bits + line * words + first % mask_.block / 32, keys, x);
        }
    }

private:
    static constexpr int64_t kNone = int64_t(1) << 40;  // a tile beyond any
    static constexpr int64_t kFull = -1, kHidden = -2;
    struct Tile {
        int64_t bits;  // which, or kFull or kHidden
    };

    int64_t line(int64_t head) const { return sequence_ * mask_.heads + first_head_ + head; }
    int64_t query_tile(int64_t row) const { return p_.query_of(row) / mask_.block; }

    Tile find(int64_t row, int64_t key) const {
        const int64_t head = heads_ == 1 ? 0 : p_.member_of(row), tile = key / mask_.block;
        const auto [entry, stop] = mask_.by_query.from(line(head), query_tile(row), tile);
        return {entry != stop && entry[0] == tile ? entry[1] : kHidden};
    }

    template <class T>
    static void hide_bits(const uint32_t* words, int64_t keys, T* x) {
        for (int64_t c = 0; c < keys; c += 32, x += 32) {
            const uint32_t word = words[c / 32];
            for (int bit = 0; bit < 32; ++bit)
                x[bit] = word >> bit & 1 ? x[bit] : -std::numeric_limits<T>::infinity();
        }
    }

    const Problem& p_;
    const attention::BlockMask& mask_;
    const int64_t heads_, sequence_, first_head_;  // heads: that have masks of their own, of this key head's group
};

}  // namespace onchip::ONCHIP_ISA

// Attention, forward, for many queries: FlashAttention's loop over tiles of keys, on packed tiles.
//
// A unit of work is a span of rows of one (sequence, key head). For each tile of keys it packs K transposed and V once,
// then runs over its rows in blocks small enough that the block's probabilities stay in the first two caches:
//     S = Q Kᵀ;  P = exp2(S - top);  O = O · factor + P V
// Tiles that no row sees, or that a block mask leaves out, are skipped, and in tiles that the mask cuts only what is needed is multiplied. Tiles begin at
// multiples of their size whatever the unit, and a register tile sums in the order of its steps, so a row's bits do not
// depend on what it was grouped with.
//
// Where it stands, on one core of an EPYC with AVX2 and a peak of 92 GFLOP/s: the register tile reaches 90, and with the
// softmax between two products, all in cache, 78 at D 64 and 84 at D 128. That is the floor; the exponential costs
// 0.4 ns an entry. The whole kernel reaches 66-70 and 72-75 (torch.mm: 76). The rest goes to rows of K and V that lie
// kilobytes apart (7 % with 8 heads against 1; prefetching them changed nothing), to writing out and to the logarithms. Blocks
// of 96 rows, tiles of 64 or 256 keys and units twice as long were within the noise. The kernel's figures are those of
// `onchip bench attention --threads 1`; the tile's come from a loop over one tile, made for the purpose and not kept.
#pragma once

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "block_mask.hpp"
#include "dropout.hpp"
#include "rows.hpp"
#include "softmax.hpp"

namespace onchip::ONCHIP_ISA {

// Length of a line of a tile: whole panels, and an odd number of cache lines so that successive rows fall into
// different cache sets.
template <class T>
inline int64_t pitch(int64_t n) {
    const int64_t lines = round_up(n, kPanel<T>) * int64_t(sizeof(T)) / 64;
    return std::max<int64_t>(round_up(n, kPanel<T>), (lines | 1) * 64 / int64_t(sizeof(T)));
}

constexpr int64_t kBlockRows = 48;  // rows whose scores against one tile of keys are held at once
constexpr int64_t kUnitRows = 8 * kBlockRows;

// Keys in a tile: K and V of it, in the arithmetic's type, fit the second-level cache with room to spare.
inline int64_t tile_keys(const Problem& p) {
    const int64_t keys = p.head_dim + p.value_dim <= 256 ? 128 : 64;
    return p.mask ? std::min(keys, p.mask.block) : keys;
}

struct ForwardUnit {
    int64_t sequence, kv_head;
    Range rows;
};

template <class T>
class ForwardWorker {
public:
    ForwardWorker(const Problem& p, Scratch& scratch)
        : p_(p), keys_(tile_keys(p)), q_pitch_(pitch<T>(p.head_dim)), o_pitch_(pitch<T>(p.value_dim)),
          s_pitch_(pitch<T>(keys_)),
          q_(scratch.take<T>(kUnitRows * q_pitch_)), o_(scratch.take<T>(kUnitRows * o_pitch_)),
          k_panels_(scratch.take<T>(keys_ * p.head_dim)), k_rows_(scratch.take<T>(keys_ * q_pitch_)),
          v_rows_(scratch.take<T>(keys_ * o_pitch_)), s_(scratch.take<T>(kBlockRows * s_pitch_)),
          buffer_(scratch.take<T>(keys_)), factor_(scratch.take<T>(kBlockRows)), run_(scratch, kUnitRows),
          seen_(scratch.take<Range>(kUnitRows)) {}

    static size_t need(const Problem& p) {
        const int64_t keys = tile_keys(p), q = pitch<T>(p.head_dim), o = pitch<T>(p.value_dim);
        return Scratch::need<T>(kUnitRows * q) + Scratch::need<T>(kUnitRows * o) + Scratch::need<T>(keys * p.head_dim) +
               Scratch::need<T>(keys * q) + Scratch::need<T>(keys * o) + Scratch::need<T>(kBlockRows * pitch<T>(keys)) +
               Scratch::need<T>(keys) + Scratch::need<T>(kBlockRows) + Running<T>::need(kUnitRows) +
               Scratch::need<Range>(kUnitRows);
    }

    void run(const ForwardUnit& unit) {
        const Sequence& s = p_.sequences[unit.sequence];
        const Scores<T> scores(p_, s, unit.kv_head);
        const BlockMask mask(p_, s, unit.kv_head);
        Dropout<T> dropout(p_, s);
        const int64_t rows = unit.rows.end - unit.rows.begin;
        read_queries(p_, p_.q, s, unit.kv_head, unit.rows.begin, unit.rows.end, p_.head_dim, T(query_factor(p_)), q_,
                     q_pitch_);
        std::fill(o_, o_ + rows * o_pitch_, T(0));
        run_.clear(0, round_up(rows, kBlockRows));
        for (int64_t r = 0; r < rows; ++r)
            seen_[r] = {scores.begin(unit.rows.begin + r), scores.end(unit.rows.begin + r)};
        for (int64_t tile = seen_[0].begin / keys_;; ++tile) {
            tile = mask.next_tile(unit.rows, tile, keys_);
            const int64_t first = tile * keys_;
            if (first >= seen_[rows - 1].end) break;
            pack(s, unit.kv_head, first, std::min(first + keys_, s.k_length));
            for (int64_t r = 0, end; r < rows; r = end) {
                end = block_end(unit.rows, r);
                if (mask.sees({unit.rows.begin + r, unit.rows.begin + end}, tile, keys_))
                    block(scores, mask, dropout, unit.rows.begin, {r, end}, first);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            finish_row(p_, s, unit.kv_head, unit.rows.begin + r, run_.top[r], run_.sum[r], o_ + r * o_pitch_);
    }

private:
    // Where the block that begins at the unit's row r ends: at a tile of the mask at the latest.
    int64_t block_end(Range unit, int64_t r) const {
        const int64_t end = std::min(r + kBlockRows, unit.end - unit.begin);
        const int64_t rows = p_.mask.block * p_.group;
        return p_.mask ? std::min(end, ((unit.begin + r) / rows + 1) * rows - unit.begin) : end;
    }

    void pack(const Sequence& s, int64_t kv_head, int64_t begin, int64_t end) {
        read_keys(p_, p_.k, s, kv_head, begin, end, p_.head_dim, k_rows_, q_pitch_);
        pack_transposed(k_panels_, k_rows_, q_pitch_, end - begin, p_.head_dim);
        read_keys(p_, p_.v, s, kv_head, begin, end, p_.value_dim, v_rows_, o_pitch_);
    }

    // One block of rows against the packed tile of keys that begins at `first`.
    void block(const Scores<T>& scores, const BlockMask& mask, Dropout<T>& dropout, int64_t unit_begin, Range rows,
               int64_t first) {
        const Range none{0, 0};
        const int64_t begin = std::max<int64_t>(seen_[rows.begin].begin - first, 0) / kPanel<T> * kPanel<T>;
        const int64_t end = std::min<int64_t>(seen_[rows.end - 1].end - first, keys_);
        if (begin >= end) return;
        const Range columns{begin, round_up(end, kPanel<T>)};
        const bool cut = seen_[rows.end - 1].begin > first + begin || seen_[rows.begin].end < first + columns.end;
        T* const s = s_ - rows.begin * s_pitch_;
        product<Into::set>(rows, columns, Left<T>{q_, q_pitch_, 1},
                       Right<T>{k_panels_, p_.head_dim * kPanel<T>, kPanel<T>}, Result<T>{s, s_pitch_}, [&](int64_t row, int count, int64_t column) {
                           const bool hidden = cut && (seen_[row + count - 1].end <= first + column ||
                                                       seen_[row].begin >= first + column + kPanel<T>);
                           return hidden ? none : Range{0, p_.head_dim};
                       });
        if (cut || !scores.plain()) {
            for (int64_t r = rows.begin; r < rows.end; ++r)
                scores.logits(unit_begin + r, first, columns.begin, columns.end,
                              {seen_[r].begin - first, seen_[r].end - first}, s + r * s_pitch_, nullptr, buffer_);
        }
        mask.hide({unit_begin + rows.begin, unit_begin + rows.end}, first, keys_, s_, s_pitch_);
        for (int64_t r = rows.begin; r < rows.end; r += kLanes<T>)  // a last few rows may be nobody's
            absorb(run_.top + r, run_.sum + r, factor_ + r - rows.begin, s + r * s_pitch_, s_pitch_, columns.begin, columns.end);
        if (dropout) {
            for (int64_t r = rows.begin; r < rows.end; ++r)
                dropout.apply(p_.query_of(unit_begin + r), scores.head(unit_begin + r), first + columns.begin,
                              columns.end - columns.begin, s + r * s_pitch_ + columns.begin);
        }
        product<Into::scale>(rows, {0, round_up(p_.value_dim, kPanel<T>)}, Left<T>{s, s_pitch_, 1},
                      Right<T>{v_rows_, kPanel<T>, o_pitch_}, Result<T>{o_, o_pitch_, factor_ - rows.begin}, [&](int64_t row, int count, int64_t) {
                          return cut ? Range{std::max(begin, seen_[row].begin - first),
                                             std::min(end, seen_[row + count - 1].end - first)}
                                     : Range{begin, end};
                      });
    }

    const Problem& p_;
    const int64_t keys_, q_pitch_, o_pitch_, s_pitch_;
    T* const q_;
    T* const o_;
    T* const k_panels_;
    T* const k_rows_;
    T* const v_rows_;
    T* const s_;
    T* const buffer_;
    T* const factor_;
    Running<T> run_;
    Range* const seen_;
};

}  // namespace onchip::ONCHIP_ISA

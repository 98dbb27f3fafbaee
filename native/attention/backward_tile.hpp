// One block of rows against one tile of keys, on the way back: P and dS of it, and what they add to the gradients.
#pragma once

#include <bit>

#include "forward.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Gradients;

// Rows of a block: about 64, whole queries (all heads of a group together), of one tile of a block mask.
inline int64_t block_rows(const Problem& p) {
    const int64_t queries = std::max<int64_t>(64 / p.group, 1);
    return (p.mask ? std::min(int64_t(std::bit_floor(uint64_t(queries))), p.mask.block) : queries) * p.group;
}
inline int64_t count_rows(const Problem& p, const Sequence& s) { return s.q_length * p.group; }
inline int64_t count_blocks(const Problem& p, const Sequence& s) { return ceil_div(count_rows(p, s), block_rows(p)); }
inline Range block_of(const Problem& p, const Sequence& s, int64_t block) {
    return {block * block_rows(p), std::min((block + 1) * block_rows(p), count_rows(p, s))};
}

template <class T>
class BackwardTile {
public:
    const int64_t keys, q_pitch, o_pitch, s_pitch;

    BackwardTile(const Problem& p, const Gradients& g, Scratch& scratch)
        : keys(tile_keys(p)), q_pitch(pitch<T>(p.head_dim)), o_pitch(pitch<T>(p.value_dim)), s_pitch(pitch<T>(keys)),
          p_(p), g_(g), k_panels_(scratch.take<T>(keys * p.head_dim)), k_rows_(scratch.take<T>(keys * q_pitch)),
          v_panels_(scratch.take<T>(keys * p.value_dim)), v_rows_(scratch.take<T>(keys * o_pitch)),
          q_(scratch.take<T>(block_rows(p) * q_pitch)), grad_o_(scratch.take<T>(block_rows(p) * o_pitch)),
          p_tile_(scratch.take<T>(block_rows(p) * s_pitch)), ds_tile_(scratch.take<T>(block_rows(p) * s_pitch)),
          cap_(scratch.take<T>(block_rows(p) * s_pitch)), buffer_(scratch.take<T>(keys)),
          seen_(scratch.take<Range>(block_rows(p))), seen_by_(scratch.take<Range>(keys)) {}

    static size_t need(const Problem& p) {
        const int64_t keys = tile_keys(p), rows = block_rows(p);
        const size_t q = pitch<T>(p.head_dim), o = pitch<T>(p.value_dim), s = pitch<T>(keys);
        return Scratch::need<T>(keys * p.head_dim) + Scratch::need<T>(keys * q) + Scratch::need<T>(keys * p.value_dim) +
               Scratch::need<T>(keys * o) + Scratch::need<T>(rows * q) + Scratch::need<T>(rows * o) +
               3 * Scratch::need<T>(rows * s) + Scratch::need<T>(keys) + Scratch::need<Range>(rows) +
               Scratch::need<Range>(keys);
    }

    void pack(const Sequence& s, int64_t kv_head, int64_t begin, int64_t end) {
        read_keys(p_, p_.k, s, kv_head, begin, end, p_.head_dim, k_rows_, q_pitch);
        pack_transposed(k_panels_, k_rows_, q_pitch, end - begin, p_.head_dim);
        read_keys(p_, p_.v, s, kv_head, begin, end, p_.value_dim, v_rows_, o_pitch);
        pack_transposed(v_panels_, v_rows_, o_pitch, end - begin, p_.value_dim);
    }

    // Reads the block of rows and computes P and dS = P ∘ (dP - δ) against the packed keys that begin at `first`; both
    // are zero where a row does not see a key. Dropout's factors go into dP and the P that is kept, and not into dS's
    // own P. `lse2` and `delta` are the (sequence, key head)'s.
    void differentiate(const Scores<T>& scores, const Sequence& s, int64_t kv_head, Range rows, int64_t first,
                       const T* lse2, const T* delta) {
        rows_ = rows;
        first_ = first;
        count_ = rows.end - rows.begin;
        find_seen(scores);
        read_queries(p_, p_.q, s, kv_head, rows.begin, rows.end, p_.head_dim, T(query_factor(p_)), q_, q_pitch);
        read_queries(p_, g_.out, s, kv_head, rows.begin, rows.end, p_.value_dim, T(1), grad_o_, o_pitch);
        multiply(q_, q_pitch, k_panels_, p_.head_dim, p_tile_);
        multiply(grad_o_, o_pitch, v_panels_, p_.value_dim, ds_tile_);
        const BlockMask mask(p_, s, kv_head);
        Dropout<T> dropout(p_, s);
        for (int64_t r = 0; r < count_ && (cut_ || !scores.plain()); ++r)
            scores.logits(rows.begin + r, first, columns_.begin, columns_.end, seen(r), p_tile_ + r * s_pitch,
                          cap_ + r * s_pitch, buffer_);
        mask.hide(rows, first, keys, p_tile_, s_pitch);
        for (int64_t r = 0; r < count_; ++r) {
            T* const x = p_tile_ + r * s_pitch;
            T* const ds = ds_tile_ + r * s_pitch;
            const T base = lse2[rows.begin + r], shift = delta[rows.begin + r];
            if (dropout) {
                const T* const kept = dropout.factors(p_.query_of(rows.begin + r), scores.head(rows.begin + r),
                                                      first + columns_.begin, columns_.end - columns_.begin);
                for (int64_t c = columns_.begin; c < columns_.end; c += kLanes<T>) {
                    const Vec<T> probability = exp2(load(x + c) - base), factor = load(kept + c - columns_.begin);
                    store(x + c, probability * factor);
                    store(ds + c, probability * (load(ds + c) * factor - shift));
                }
            } else {
                for (int64_t c = columns_.begin; c < columns_.end; c += kLanes<T>) {
                    const Vec<T> probability = exp2(load(x + c) - base);
                    store(x + c, probability);
                    store(ds + c, probability * (load(ds + c) - shift));
                }
            }
            if (cut_) {  // products with hidden keys were never computed
                const Range columns = seen(r);
                std::fill(ds + columns_.begin, ds + std::clamp(columns.begin, columns_.begin, columns_.end), T(0));
                std::fill(ds + std::clamp(columns.end, columns_.begin, columns_.end), ds + columns_.end, T(0));
            }
        }
    }

    // slopes[g] -= Σ |position - key| · dS over the rows of head g.
    void add_slope_gradient(const Scores<T>& scores, double* slopes) const {
        for (int64_t r = 0; r < count_; ++r) {
            const int64_t row = rows_.begin + r, position = scores.reach().position(row / p_.group) - first_;
            double sum = 0;
            for (int64_t c = columns_.begin; c < columns_.end; ++c)
                sum += double(std::abs(position - c)) * ds_tile_[r * s_pitch + c];
            slopes[row % p_.group] -= sum;
        }
    }

    void through_softcap() {
        for (int64_t r = 0; r < count_; ++r) {
            T* const ds = ds_tile_ + r * s_pitch;
            const T* const cap = cap_ + r * s_pitch;
            for (int64_t c = columns_.begin; c < columns_.end; ++c) ds[c] = ds[c] == 0 ? T(0) : ds[c] * cap[c];
        }
    }

    // grad_k += dSᵀ Q, grad_v += Pᵀ dO, for the tile's keys.
    void add_key_gradients(T* grad_k, T* grad_v) const {
        const auto needed = [&](int64_t key, int count, int64_t) {
            return cut_ ? Range{seen_by_[key].begin, seen_by_[key + count - 1].end} : Range{0, count_};
        };
        product<Into::add>(columns_, {0, round_up(p_.value_dim, kPanel<T>)}, Left<T>{p_tile_, 1, s_pitch},
                      Right<T>{grad_o_, kPanel<T>, o_pitch}, Result<T>{grad_v, o_pitch}, needed);
        product<Into::add>(columns_, {0, round_up(p_.head_dim, kPanel<T>)}, Left<T>{ds_tile_, 1, s_pitch},
                      Right<T>{q_, kPanel<T>, q_pitch}, Result<T>{grad_k, q_pitch}, needed);
    }

    // grad_q[row of the block] += dS K
    void add_query_gradient(T* grad_q, int64_t grad_row) const {
        product<Into::add>({0, count_}, {0, round_up(p_.head_dim, kPanel<T>)}, Left<T>{ds_tile_, s_pitch, 1},
                      Right<T>{k_rows_, kPanel<T>, q_pitch}, Result<T>{grad_q, grad_row}, [&](int64_t row, int count, int64_t) {
                          return cut_ ? Range{std::max(columns_.begin, seen_[row].begin - first_),
                                              std::min(keys_seen_, seen_[row + count - 1].end - first_)}
                                      : Range{columns_.begin, keys_seen_};
                      });
    }

    int64_t count() const { return count_; }
    Range columns() const { return {columns_.begin, keys_seen_}; }
    const T* gradient(int64_t r) const { return ds_tile_ + r * s_pitch; }

private:
    // Which columns the block sees, whether the mask cuts them, and if so, row by row and column by column.
    void find_seen(const Scores<T>& scores) {
        const int64_t begin = scores.begin(rows_.begin) - first_, end = scores.end(rows_.end - 1) - first_;
        keys_seen_ = std::min(end, keys);
        columns_ = {std::max<int64_t>(begin, 0) / kPanel<T> * kPanel<T>, round_up(keys_seen_, kPanel<T>)};
        cut_ = scores.begin(rows_.end - 1) > first_ + columns_.begin || scores.end(rows_.begin) < first_ + columns_.end;
        if (!cut_) return;
        for (int64_t r = 0; r < count_; ++r) seen_[r] = {scores.begin(rows_.begin + r), scores.end(rows_.begin + r)};
        int64_t from = 0, to = 0;
        for (int64_t c = columns_.begin; c < columns_.end; ++c) {
            while (from < count_ && seen_[from].end <= first_ + c) ++from;
            while (to < count_ && seen_[to].begin <= first_ + c) ++to;
            seen_by_[c] = {from, to};
        }
    }

    // The columns that row r of the block sees.
    Range seen(int64_t r) const {
        return cut_ ? Range{seen_[r].begin - first_, seen_[r].end - first_} : columns_;
    }

    void multiply(const T* a, int64_t a_row, const T* panels, int64_t depth, T* to) const {
        product<Into::set>({0, count_}, columns_, Left<T>{a, a_row, 1}, Right<T>{panels, depth * kPanel<T>, kPanel<T>},
                       Result<T>{to, s_pitch}, [&](int64_t row, int count, int64_t column) {
                           const bool hidden = cut_ && (seen_[row + count - 1].end <= first_ + column ||
                                                        seen_[row].begin >= first_ + column + kPanel<T>);
                           return hidden ? Range{0, 0} : Range{0, depth};
                       });
    }

    const Problem& p_;
    const Gradients& g_;
    T* const k_panels_;
    T* const k_rows_;
    T* const v_panels_;
    T* const v_rows_;
    T* const q_;
    T* const grad_o_;
    T* const p_tile_;
    T* const ds_tile_;
    T* const cap_;
    T* const buffer_;
    Range* const seen_;
    Range* const seen_by_;
    Range rows_{}, columns_{};
    int64_t first_ = 0, count_ = 0, keys_seen_ = 0;
    bool cut_ = false;
};

}  // namespace onchip::ONCHIP_ISA

// The forward pass over the heads of a unit, chunk after chunk.
#pragma once

#include "tiles.hpp"

namespace onchip::ONCHIP_ISA {

// y[t] before the gate: from_start · C h + (C Bᵀ ∘ decay) u + D x. `state` is what the chunk begins with.
template <class T>
class ChunkOutput {
public:
    const int64_t p_pitch;
    T* const y;

    ChunkOutput(const Problem& p, Scratch& scratch)
        : p_pitch(pitch<T>(p.dim)), y(scratch.take<T>(p.chunk * p_pitch)), p_(p),
          skip_(scratch.take<T>(p_pitch)), row_(scratch.take<T>(p_pitch)) {}

    static size_t need(const Problem& p) {
        return Scratch::need<T>(p.chunk * pitch<T>(p.dim)) + 2 * Scratch::need<T>(pitch<T>(p.dim));
    }

    void find(const GroupTile<T>& group, const Steps<T>& steps, const T* weights, const T* u, const T* state, int64_t count) {
        const Range columns{0, round_up(p_.dim, kPanel<T>)};
        product<Into::set>({0, count}, columns, Left<T>{group.c, group.n_pitch, 1}, Right<T>{state, kPanel<T>, p_pitch},
                           Result<T>{y, p_pitch}, kAll(p_.state_dim));
        product<Into::scale>({0, count}, columns, Left<T>{weights, group.s_pitch, 1}, Right<T>{u, kPanel<T>, p_pitch},
                             Result<T>{y, p_pitch, steps.from_start}, kUpToRow);
    }

    void add_skip(const Sequence& s, int64_t head, int64_t first, int64_t count) {
        if (!p_.D) return;
        read_row(skip_, p_.D.at(head, 0, 0), p_.D.dtype, p_.D.strides[1], p_.dim);
        for (int64_t t = 0; t < count; ++t) {
            read_steps(p_.x, s, head, first + t, 1, p_.dim, row_, p_pitch);
            for (int64_t d = 0; d < p_.dim; ++d) y[t * p_pitch + d] += skip_[d] * row_[d];
        }
    }

    void write(const Sequence& s, int64_t head, int64_t first, int64_t count) {
        for (int64_t t = 0; t < count; ++t) {
            T* const to = y + t * p_pitch;
            if (p_.z) {
                read_steps(p_.z, s, head, first + t, 1, p_.dim, row_, p_pitch);
                for (int64_t d = 0; d < p_.dim; d += kLanes<T>) {
                    const Vec<T> z = load(row_ + d);
                    store(to + d, load(to + d) * silu<T>(z));
                }
            }
            write_row(p_.out.at(s.batch, s.start + first + t, head), p_.out.dtype, p_.out.strides[3], to, T(1), p_.dim);
        }
    }

private:
    const Problem& p_;
    T* const skip_;
    T* const row_;
};

template <class T>
class ForwardHeads {
public:
    ForwardHeads(const Problem& p, Scratch& scratch)
        : p_(p), p_pitch_(pitch<T>(p.dim)), steps_(p, scratch), group_(p, scratch), output_(p, scratch),
          weights_(scratch.take<T>(p.chunk * group_.s_pitch)), u_(scratch.take<T>(p.chunk * p_pitch_)),
          states_(scratch.take<T>(kHeadsAtOnce * p.state_dim * p_pitch_)), buffer_(scratch.take<T>(p.state_dim)) {}

    static size_t need(const Problem& p) {
        return Steps<T>::need(p) + GroupTile<T>::need(p) + ChunkOutput<T>::need(p) +
               Scratch::need<T>(p.chunk * pitch<T>(p.chunk)) + Scratch::need<T>(p.chunk * pitch<T>(p.dim)) +
               Scratch::need<T>(kHeadsAtOnce * p.state_dim * pitch<T>(p.dim)) + Scratch::need<T>(p.state_dim);
    }

    void run(const HeadUnit& unit) {
        const Sequence& s = p_.sequences[unit.sequence];
        for (int64_t h = unit.first; h < unit.end; ++h)
            read_state(p_, p_.initial_state, s, h, state(unit, h), p_pitch_, buffer_);
        for (int64_t first = 0; first < s.length; first += p_.chunk) {
            const int64_t count = std::min(p_.chunk, s.length - first);
            group_.read(s, unit.first / p_.group, first, count);
            for (int64_t h = unit.first; h < unit.end; ++h) run_chunk(s, h, first, count, state(unit, h));
        }
        for (int64_t h = unit.first; h < unit.end; ++h)
            write_state(p_, p_.final_state, s, h, state(unit, h), p_pitch_, buffer_);
    }

private:
    T* state(const HeadUnit& unit, int64_t head) const {
        return states_ + (head - unit.first) * p_.state_dim * p_pitch_;
    }

    void run_chunk(const Sequence& s, int64_t head, int64_t first, int64_t count, T* state) {
        steps_.read(s, head, first, count);
        weigh(group_.products, steps_.decay, group_.s_pitch, count, weights_);
        read_steps(p_.x, s, head, first, count, p_.dim, u_, p_pitch_);
        scale_rows(u_, p_pitch_, count, steps_.step);
        output_.find(group_, steps_, weights_, u_, state, count);
        output_.add_skip(s, head, first, count);
        output_.write(s, head, first, count);
        scale_rows(u_, p_pitch_, count, steps_.to_end());
        pass_state(p_, group_.b, group_.n_pitch, u_, p_pitch_, count, steps_.whole(), state, buffer_);
    }

    const Problem& p_;
    const int64_t p_pitch_;
    Steps<T> steps_;
    GroupTile<T> group_;
    ChunkOutput<T> output_;
    T* const weights_;
    T* const u_;  // step · x, and then decayed to the chunk's end
    T* const states_;
    T* const buffer_;
};

}  // namespace onchip::ONCHIP_ISA

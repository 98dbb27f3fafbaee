// The backward pass over the heads of a unit: the states once more from the first chunk to the last, and back again.
//
// The gradients of B and C, sums over the heads of a group, are summed here over a unit's heads; `GroupSums` holds a
// unit's part. Which heads form a unit depends on the shapes alone, so the sums are the same on any number of threads.
#pragma once

#include "forward.hpp"

namespace onchip::ONCHIP_ISA {

using ssd::Gradients;

// A unit's part of the gradients of B and C: rows of `n_pitch`, the sequence's length of them.
template <class T>
struct GroupSums {
    T* b;
    T* c;
};

template <class T>
class BackwardHeads {
public:
    BackwardHeads(const Problem& p, const Gradients& g, Scratch& scratch)
        : p_(p), g_(g), p_pitch_(pitch<T>(p.dim)), steps_(p, scratch), group_(p, scratch), output_(p, scratch),
          c_panels_(take(scratch, group_.s_pitch, p.state_dim)), weights_(take(scratch, p.chunk, group_.s_pitch)),
          pairs_(take(scratch, p.chunk, group_.s_pitch)), grad_products_(take(scratch, p.chunk, group_.s_pitch)),
          x_(take(scratch, p.chunk, p_pitch_)), u_(take(scratch, p.chunk, p_pitch_)),
          grad_y_(take(scratch, p.chunk, p_pitch_)), grad_u_(take(scratch, p.chunk, p_pitch_)),
          u_panels_(take(scratch, group_.s_pitch, p.dim)), y_panels_(take(scratch, group_.s_pitch, p.dim)),
          outer_(take(scratch, p.state_dim, group_.s_pitch)), sum_b_(take(scratch, p.state_dim, group_.s_pitch)),
          sum_c_(take(scratch, p.state_dim, group_.s_pitch)),
          grad_states_(take(scratch, kHeadsAtOnce * p.state_dim, p_pitch_)),
          states_(take(scratch, chunks(p) * kHeadsAtOnce * p.state_dim, p_pitch_)),
          buffer_(take(scratch, std::max(p.state_dim, p_pitch_), 1)), per_step_(take(scratch, 5, group_.s_pitch)) {}

    static size_t need(const Problem& p) {
        const int64_t s = pitch<T>(p.chunk), d = pitch<T>(p.dim), n = p.state_dim, q = p.chunk;
        const auto size = [](int64_t rows, int64_t row) { return Scratch::need<T>(rows * row); };
        return Steps<T>::need(p) + GroupTile<T>::need(p) + ChunkOutput<T>::need(p) + 4 * size(n, s) + 3 * size(q, s) +
               4 * size(q, d) + 2 * size(s, p.dim) + size(kHeadsAtOnce * n, d) + size(chunks(p) * kHeadsAtOnce * n, d) +
               size(std::max(n, d), 1) + size(5, s);
    }

    void run(const HeadUnit& unit, const GroupSums<T>& sums) {
        const Sequence& s = p_.sequences[unit.sequence];
        find_states(s, unit);
        for (int64_t h = unit.first; h < unit.end; ++h)
            read_state(p_, g_.final_state, s, h, grad_state(unit, h), p_pitch_, buffer_);
        for (int64_t chunk = ceil_div(s.length, p_.chunk) - 1; chunk >= 0; --chunk) run_chunk(s, unit, chunk, sums);
        for (int64_t h = unit.first; h < unit.end; ++h)
            write_state(p_, g_.initial_state, s, h, grad_state(unit, h), p_pitch_, buffer_);
    }

private:
    static T* take(Scratch& scratch, int64_t rows, int64_t row) { return scratch.take<T>(rows * row); }
    static int64_t chunks(const Problem& p) { return ceil_div(p.longest(), p.chunk); }

    // The state that head `head` of the unit begins a chunk with.
    T* state(const HeadUnit& unit, int64_t head, int64_t chunk) const {
        return states_ + (chunk * kHeadsAtOnce + head - unit.first) * p_.state_dim * p_pitch_;
    }
    T* grad_state(const HeadUnit& unit, int64_t head) const {
        return grad_states_ + (head - unit.first) * p_.state_dim * p_pitch_;
    }

    void find_states(const Sequence& s, const HeadUnit& unit) {
        for (int64_t h = unit.first; h < unit.end && s.length > 0; ++h)
            read_state(p_, p_.initial_state, s, h, state(unit, h, 0), p_pitch_, buffer_);
        for (int64_t chunk = 0; (chunk + 1) * p_.chunk < s.length; ++chunk) {
            const int64_t first = chunk * p_.chunk;
            group_.read_b(s, unit.first / p_.group, first, p_.chunk);
            for (int64_t h = unit.first; h < unit.end; ++h) {
                steps_.read(s, h, first, p_.chunk);
                read_steps(p_.x, s, h, first, p_.chunk, p_.dim, u_, p_pitch_);
                scale_rows(u_, p_pitch_, p_.chunk, steps_.step);
                scale_rows(u_, p_pitch_, p_.chunk, steps_.to_end());
                const T* const before = state(unit, h, chunk);
                T* const after = state(unit, h, chunk + 1);
                std::copy(before, before + p_.state_dim * p_pitch_, after);
                pass_state(p_, group_.b, group_.n_pitch, u_, p_pitch_, p_.chunk, steps_.whole(), after, buffer_);
            }
        }
    }

    void run_chunk(const Sequence& s, const HeadUnit& unit, int64_t chunk, const GroupSums<T>& sums) {
        const int64_t first = chunk * p_.chunk, count = std::min(p_.chunk, s.length - first);
        group_.read(s, unit.first / p_.group, first, count);
        pack_transposed(c_panels_, group_.c, group_.n_pitch, count, p_.state_dim);
        std::fill(grad_products_, grad_products_ + count * group_.s_pitch, T(0));
        std::fill(sum_b_, sum_b_ + p_.state_dim * group_.s_pitch, T(0));
        std::fill(sum_c_, sum_c_ + p_.state_dim * group_.s_pitch, T(0));
        for (int64_t h = unit.first; h < unit.end; ++h)
            run_head(s, h, first, count, state(unit, h, chunk), grad_state(unit, h));
        add_up(count, {sums.b + first * group_.n_pitch, sums.c + first * group_.n_pitch});
    }

    void run_head(const Sequence& s, int64_t head, int64_t first, int64_t count, const T* state, T* grad_state) {
        T *const rate_pairs = per_step_, *const from_c = rate_pairs + group_.s_pitch, *const from_b = from_c + group_.s_pitch;
        T* const direct = from_b + group_.s_pitch;
        steps_.read(s, head, first, count);
        weigh(group_.products, steps_.decay, group_.s_pitch, count, weights_);
        read_steps(p_.x, s, head, first, count, p_.dim, x_, p_pitch_);
        std::copy(x_, x_ + count * p_pitch_, u_);
        scale_rows(u_, p_pitch_, count, steps_.step);
        read_steps(g_.out, s, head, first, count, p_.dim, grad_y_, p_pitch_);
        if (p_.z) through_gate(s, head, first, count, state);
        pack_transposed(u_panels_, u_, p_pitch_, count, p_.dim);
        pack_transposed(y_panels_, grad_y_, p_pitch_, count, p_.dim);
        through_weights(count, rate_pairs);
        find_grad_u(count, grad_state);
        for (int64_t t = 0; t < count; ++t) direct[t] = dot(x_ + t * p_pitch_, grad_u_ + t * p_pitch_, p_pitch_);
        through_outer(state, y_panels_, c_panels_, count, steps_.from_start, sum_c_, from_c);
        through_outer(grad_state, u_panels_, group_.b_panels, count, steps_.to_end(), sum_b_, from_b);
        const T whole = steps_.whole() * dot(state, grad_state, p_.state_dim * p_pitch_);
        write_x(s, head, first, count);
        write_dt(s, head, first, count, rate_pairs, from_c, from_b, direct, whole);
        scale_rows(grad_y_, p_pitch_, count, steps_.from_start);
        pass_state(p_, group_.c, group_.n_pitch, grad_y_, p_pitch_, count, steps_.whole(), grad_state, buffer_);
    }

    // out = y · silu(z): z's gradient is written, and y's takes the place of out's.
    void through_gate(const Sequence& s, int64_t head, int64_t first, int64_t count, const T* state) {
        output_.find(group_, steps_, weights_, u_, state, count);
        output_.add_skip(s, head, first, count);
        for (int64_t t = 0; t < count; ++t) {
            T *const y = output_.y + t * p_pitch_, *const grad = grad_y_ + t * p_pitch_;
            read_steps(p_.z, s, head, first + t, 1, p_.dim, buffer_, p_pitch_);
            for (int64_t d = 0; d < p_.dim; d += kLanes<T>) {
                const Vec<T> z = load(buffer_ + d);
                store(y + d, load(grad + d) * load(y + d) * silu_slope<T>(z));
                store(grad + d, load(grad + d) * silu<T>(z));
            }
            write_row(g_.z.at(s.batch, s.start + first + t, head), g_.z.dtype, g_.z.strides[3], y, T(1), p_.dim);
        }
    }

    // From Y = M U with M = C Bᵀ ∘ decay: what it adds to the gradient of C Bᵀ, and to that of each step's log-decay,
    // which is a term of every (i, j) with j < k ≤ i.
    void through_weights(int64_t count, T* rate_pairs) {
        const int64_t row = group_.s_pitch;
        product<Into::set>({0, count}, {0, round_up(count, kPanel<T>)}, Left<T>{grad_y_, p_pitch_, 1},
                           Right<T>{u_panels_, p_.dim * kPanel<T>, kPanel<T>}, Result<T>{pairs_, row},
                           kLowerTriangle(p_.dim));
        for (int64_t i = 0; i < count; ++i) {
            T *const pair = pairs_ + i * row, *const grad = grad_products_ + i * row;
            const T *const decay = steps_.decay + i * row, *const weight = weights_ + i * row;
            std::fill(pair + i + 1, pair + round_up(i + 1, kLanes<T>), T(0));
            for (int64_t j = 0; j <= i; j += kLanes<T>) {
                store(grad + j, load(grad + j) + load(pair + j) * load(decay + j));
                store(pair + j, load(pair + j) * load(weight + j));
            }
            std::fill(pair + i, pair + round_up(i + 1, kLanes<T>), T(0));
        }
        T* const columns = per_step_ + 4 * row;
        std::fill(columns, columns + row, T(0));
        for (int64_t k = count - 1; k >= 0; --k) {
            columns[k] = 0;
            Vec<T> sum{};
            for (int64_t j = 0; j < k; j += kLanes<T>) {
                const Vec<T> so_far = load(columns + j) + load(pairs_ + k * row + j);
                store(columns + j, so_far);
                sum += so_far;
            }
            rate_pairs[k] = sum_lanes(sum);
        }
    }

    // grad_u = to_end · B grad_state + Mᵀ grad_y
    void find_grad_u(int64_t count, const T* grad_state) {
        const Range columns{0, round_up(p_.dim, kPanel<T>)};
        std::fill(grad_u_, grad_u_ + count * p_pitch_, T(0));
        product<Into::set>({0, count}, columns, Left<T>{group_.b, group_.n_pitch, 1},
                           Right<T>{grad_state, kPanel<T>, p_pitch_}, Result<T>{grad_u_, p_pitch_}, kAll(p_.state_dim));
        product<Into::scale>({0, count}, columns, Left<T>{weights_, 1, group_.s_pitch},
                             Right<T>{grad_y_, kPanel<T>, p_pitch_}, Result<T>{grad_u_, p_pitch_, steps_.to_end()},
                             from_row(count));
    }

    // Of B (with grad_state, u and to_end) or C (with state, grad_y and from_start): its gradient through the state,
    // transposed, factor[t] · state · rows[t], added to `sum`; and that of the factor's logarithm.
    void through_outer(const T* state, const T* panels, const T* own, int64_t count, const T* factor, T* sum, T* log_grad) {
        constexpr int L = kLanes<T>, W = kPanel<T>;
        const int64_t row = group_.s_pitch;
        product<Into::set>({0, p_.state_dim}, {0, round_up(count, W)}, Left<T>{state, p_pitch_, 1},
                           Right<T>{panels, p_.dim * W, W}, Result<T>{outer_, row}, kAll(p_.dim));
        for (int64_t t = 0; t < count; t += W, own += p_.state_dim * W) {
            const Vec<T> f0 = load(factor + t), f1 = load(factor + t + L);
            Vec<T> g0{}, g1{};
            for (int64_t n = 0; n < p_.state_dim; ++n) {
                const Vec<T> x0 = load(outer_ + n * row + t) * f0, x1 = load(outer_ + n * row + t + L) * f1;
                T* const to = sum + n * row + t;
                store(to, load(to) + x0);
                store(to + L, load(to + L) + x1);
                g0 += x0 * load(own + n * W);
                g1 += x1 * load(own + n * W + L);
            }
            store(log_grad + t, g0);
            store(log_grad + t + L, g1);
        }
    }

    void write_x(const Sequence& s, int64_t head, int64_t first, int64_t count) {
        scale_rows(grad_u_, p_pitch_, count, steps_.step);
        if (p_.D) {
            read_row(buffer_, p_.D.at(head, 0, 0), p_.D.dtype, p_.D.strides[1], p_.dim);
            for (int64_t t = 0; t < count; ++t)
                for (int64_t d = 0; d < p_.dim; ++d) grad_u_[t * p_pitch_ + d] += buffer_[d] * grad_y_[t * p_pitch_ + d];
            std::fill(buffer_, buffer_ + p_.dim, T(0));
            for (int64_t t = 0; t < count; ++t)
                for (int64_t d = 0; d < p_.dim; ++d) buffer_[d] += x_[t * p_pitch_ + d] * grad_y_[t * p_pitch_ + d];
            double* const sums = reinterpret_cast<double*>(g_.D.at(s.index, head, 0));
            for (int64_t d = 0; d < p_.dim; ++d) sums[d] += buffer_[d];
        }
        for (int64_t t = 0; t < count; ++t)
            write_row(g_.x.at(s.batch, s.start + first + t, head), g_.x.dtype, g_.x.strides[3], grad_u_ + t * p_pitch_, T(1), p_.dim);
    }

    // A step's log-decay is in from_start of all that follow it, in to_end of all before, and in the chunk's whole decay.
    void write_dt(const Sequence& s, int64_t head, int64_t first, int64_t count, T* rate, const T* from_c, const T* from_b,
                  const T* direct, T whole) {
        T later = whole, earlier = 0;
        for (int64_t t = count - 1; t >= 0; --t) rate[t] += later += from_c[t];
        double rate_sum = 0, bias_sum = 0;
        for (int64_t t = 0; t < count; ++t) {
            rate[t] += earlier;
            earlier += from_b[t];
            rate_sum += double(steps_.step[t]) * rate[t];
            rate[t] = (direct[t] + steps_.rate() * rate[t]) * steps_.slope[t];
            bias_sum += rate[t];
        }
        *reinterpret_cast<double*>(g_.A.at(s.index, head, 0)) += rate_sum;
        *reinterpret_cast<double*>(g_.dt_bias.at(s.index, head, 0)) += bias_sum;
        write_row(g_.dt.at(s.batch, s.start + first, head), g_.dt.dtype, g_.dt.strides[1], rate, T(1), count);
    }

    // All heads' gradient of C Bᵀ goes to B and C at once; what came through the states comes on top.
    void add_up(int64_t count, const GroupSums<T>& to) {
        const int64_t row = group_.n_pitch, across = group_.s_pitch;
        const Range columns{0, round_up(p_.state_dim, kPanel<T>)};
        product<Into::set>({0, count}, columns, Left<T>{grad_products_, across, 1}, Right<T>{group_.b, kPanel<T>, row},
                           Result<T>{to.c, row}, kUpToRow);
        product<Into::set>({0, count}, columns, Left<T>{grad_products_, 1, across}, Right<T>{group_.c, kPanel<T>, row},
                           Result<T>{to.b, row}, from_row(count));
        for (int64_t t = 0; t < count; ++t)
            for (int64_t n = 0; n < p_.state_dim; ++n) {
                to.c[t * row + n] += sum_c_[n * across + t];
                to.b[t * row + n] += sum_b_[n * across + t];
            }
    }

    static auto from_row(int64_t count) {  // the transpose of a lower triangle
        return [count](int64_t row, int, int64_t) { return Range{row, count}; };
    }

    static T sum_lanes(Vec<T> x) {
        T sum = 0;
        for (int lane = 0; lane < kLanes<T>; ++lane) sum += x[lane];
        return sum;
    }
    static T dot(const T* a, const T* b, int64_t n) {
        Vec<T> sum{};
        for (int64_t i = 0; i < n; i += kLanes<T>) sum += load(a + i) * load(b + i);
        return sum_lanes(sum);
    }

    const Problem& p_;
    const Gradients& g_;
    const int64_t p_pitch_;
    Steps<T> steps_;
    GroupTile<T> group_;
    ChunkOutput<T> output_;
    T* const c_panels_;       // Cᵀ
    T* const weights_;        // C Bᵀ ∘ decay
    T* const pairs_;
    T* const grad_products_;  // of C Bᵀ, all heads'
    T* const x_;
    T* const u_;              // step · x
    T* const grad_y_;
    T* const grad_u_;
    T* const u_panels_;
    T* const y_panels_;
    T* const outer_;
    T* const sum_b_;          // of all heads, transposed
    T* const sum_c_;
    T* const grad_states_;    // of the state after the chunk, and then of the one before it
    T* const states_;         // before each chunk
    T* const buffer_;
    T* const per_step_;
};

}  // namespace onchip::ONCHIP_ISA

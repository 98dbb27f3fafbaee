// What a chunk of time is in cache: rows of the inputs, C Bᵀ, and states with their rows along the state dim.
#pragma once

#include "steps.hpp"

namespace onchip::ONCHIP_ISA {

constexpr auto kLowerTriangle = [](int64_t depth) {  // tiles of a product that is wanted on and below the diagonal
    return [depth](int64_t row, int count, int64_t column) { return Range{0, column < row + count ? depth : 0}; };
};
constexpr auto kUpToRow = [](int64_t row, int count, int64_t) { return Range{0, row + count}; };  // A is lower triangular
constexpr auto kAll = [](int64_t depth) { return [depth](int64_t, int, int64_t) { return Range{0, depth}; }; };

// `count` rows of x (batch, time, heads, dim) from time `first` of the sequence, padded with zeros to `to_row`.
template <class T>
void read_steps(const Tensor& x, const Sequence& s, int64_t head, int64_t first, int64_t count, int64_t dim, T* to,
                int64_t to_row) {
    for (int64_t t = 0; t < count; ++t, to += to_row) {
        read_row(to, x.at(s.batch, s.start + first + t, head), x.dtype, x.strides[3], dim);
        std::fill(to + dim, to + to_row, T(0));
    }
}

// The rows of a group's B and C in a chunk, and what all heads of the group share: C Bᵀ on and below the diagonal.
template <class T>
class GroupTile {
public:
    const int64_t n_pitch, s_pitch;
    T* const b;
    T* const c;
    T* const b_panels;  // Bᵀ
    T* const products;  // C Bᵀ

    GroupTile(const Problem& p, Scratch& scratch)
        : n_pitch(pitch<T>(p.state_dim)), s_pitch(pitch<T>(p.chunk)), b(scratch.take<T>(p.chunk * n_pitch)),
          c(scratch.take<T>(p.chunk * n_pitch)), b_panels(scratch.take<T>(s_pitch * p.state_dim)),
          products(scratch.take<T>(p.chunk * s_pitch)), p_(p) {}

    static size_t need(const Problem& p) {
        const int64_t n = pitch<T>(p.state_dim), s = pitch<T>(p.chunk);
        return 2 * Scratch::need<T>(p.chunk * n) + Scratch::need<T>(s * p.state_dim) + Scratch::need<T>(p.chunk * s);
    }

    void read_b(const Sequence& s, int64_t group, int64_t first, int64_t count) {
        read_steps(p_.B, s, group, first, count, p_.state_dim, b, n_pitch);
    }

    void read(const Sequence& s, int64_t group, int64_t first, int64_t count) {
        const int64_t depth = p_.state_dim;
        read_b(s, group, first, count);
        read_steps(p_.C, s, group, first, count, depth, c, n_pitch);
        pack_transposed(b_panels, b, n_pitch, count, depth);
        product<Into::set>({0, count}, {0, round_up(count, kPanel<T>)}, Left<T>{c, n_pitch, 1},
                           Right<T>{b_panels, depth * kPanel<T>, kPanel<T>}, Result<T>{products, s_pitch},
                           kLowerTriangle(depth));
    }

private:
    const Problem& p_;
};

// The lower triangle of C Bᵀ with its decays; zero above.
template <class T>
void weigh(const T* products, const T* decay, int64_t row, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i, products += row, decay += row, to += row) {
        for (int64_t j = 0; j <= i; j += kLanes<T>) store(to + j, load(products + j) * load(decay + j));
        std::fill(to + i + 1, to + row, T(0));
    }
}

template <class T>
void scale_rows(T* rows, int64_t row, int64_t count, const T* factors) {
    for (int64_t t = 0; t < count; ++t, rows += row)
        for (int64_t d = 0; d < row; d += kLanes<T>) store(rows + d, load(rows + d) * factors[t]);
}

// A state lies in cache as (state dim, dim), so that it is the right side of a product with C.
template <class T>
void read_state(const Problem& p, const Tensor& from, const Sequence& s, int64_t head, T* to, int64_t to_row, T* buffer) {
    std::fill(to, to + p.state_dim * to_row, T(0));
    if (!from) return;
    for (int64_t d = 0; d < p.dim; ++d) {
        read_row(buffer, from.at(s.index, head, d), from.dtype, from.strides[3], p.state_dim);
        for (int64_t n = 0; n < p.state_dim; ++n) to[n * to_row + d] = buffer[n];
    }
}
template <class T>
void write_state(const Problem& p, const Tensor& to, const Sequence& s, int64_t head, const T* from, int64_t from_row,
                 T* buffer) {
    if (!to) return;
    for (int64_t d = 0; d < p.dim; ++d) {
        for (int64_t n = 0; n < p.state_dim; ++n) buffer[n] = from[n * from_row + d];
        write_row(to.at(s.index, head, d), to.dtype, to.strides[3], buffer, T(1), p.state_dim);
    }
}

// state ← whole · state + Bᵀ · rows, the chunk's steps of `rows` already decayed to its end. `factors` holds a state dim.
template <class T>
void pass_state(const Problem& p, const T* b, int64_t n_pitch, const T* rows, int64_t p_pitch, int64_t count, T whole,
                T* state, T* factors) {
    std::fill(factors, factors + p.state_dim, whole);
    product<Into::scale>({0, p.state_dim}, {0, round_up(p.dim, kPanel<T>)}, Left<T>{b, 1, n_pitch},
                         Right<T>{rows, kPanel<T>, p_pitch}, Result<T>{state, p_pitch, factors}, kAll(count));
}

// A thread is woken in about the time that this many operations take.
inline int worth_threads(const Problem& p, double operations) {
    return int(std::clamp(operations / 5e5, 1.0, double(p.threads)));
}

// Some heads of one group in one sequence: what a thread takes at a time, from the first chunk to the last. The state
// then stays in cache, and nothing but inputs and outputs crosses to memory. Chunks would be another axis to divide
// along, at the price of writing every chunk's state; but models have tens of heads, and more of them than a CPU cores.
struct HeadUnit {
    int64_t sequence, first, end;
};

inline std::vector<HeadUnit> divide_heads(const Problem& p, int64_t at_once) {
    const int64_t units = ceil_div(p.group, std::clamp<int64_t>(at_once, 1, p.group));
    std::vector<HeadUnit> all;
    for (size_t i = 0; i < p.sequences.size(); ++i)
        for (int64_t first = 0; first < p.heads; first += p.group)
            for (int64_t u = 0; u < units; ++u)
                all.push_back({int64_t(i), first + u * p.group / units, first + (u + 1) * p.group / units});
    return all;
}

constexpr int64_t kHeadsAtOnce = 4;  // sharing C Bᵀ among more saves little, and their states would leave the second cache

}  // namespace onchip::ONCHIP_ISA

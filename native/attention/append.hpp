// What comes before attention over a cache: new keys and values go to their places, keys and queries turned (RoPE).
//
// A decoding step moves a few kilobytes, so all that counts is that there is no call for it besides attention's own. A
// unit is a run of tokens of one sequence, of which it does the keys, the values and the queries.
#pragma once

#include <vector>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "rows.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Append;

constexpr int64_t kAppendTokens = 64;           // of a unit
constexpr double kAppendedPerThread = 1 << 16;  // elements moved in about the time in which a thread is woken

template <class T>
class Appender {
public:
    Appender(const Problem& p, const Append& a, Scratch& scratch)
        : p_(p), a_(a), row_(scratch.take<T>(std::max(p.head_dim, p.value_dim))), cos_(scratch.take<T>(a.pairs)),
          sin_(scratch.take<T>(a.pairs)) {}

    static size_t need(const Problem& p, const Append& a) {
        return Scratch::need<T>(std::max(p.head_dim, p.value_dim)) + 2 * Scratch::need<T>(a.pairs);
    }

    void run(const Sequence& s, int64_t first) {
        const int64_t before = s.k_length - a_.count;  // keys that the sequence had
        const int64_t position = a_.positions.empty() ? s.k_start + before : a_.positions[s.index];
        const int64_t keys = std::min(first + kAppendTokens, a_.count);
        if (first < keys) {
            KeyWalk k_to(p_, p_.k, s, 0, before + first), v_to(p_, p_.v, s, 0, before + first);
            for (int64_t t = first; t < keys; ++t, k_to.next(), v_to.next()) {
                if (a_.cos) stand_at(position + t);
                copy(a_.k, s.batch, t, p_.kv_heads, p_.head_dim, p_.k, k_to.row(), bool(a_.cos));
                copy(a_.v, s.batch, t, p_.kv_heads, p_.value_dim, p_.v, v_to.row(), false);
            }
        }
        if (!a_.cos) return;
        for (int64_t t = first; t < std::min(first + kAppendTokens, s.q_length); ++t) {
            stand_at(position + (a_.in_order ? t : 0));
            copy(a_.q, s.batch, t, p_.heads, p_.head_dim, p_.q, p_.q.at(s.batch, t, 0), true);
        }
    }

private:
    void stand_at(int64_t position) {
        read_row(cos_, a_.cos.at(position, 0, 0), a_.cos.dtype, a_.cos.strides[1], a_.pairs);
        read_row(sin_, a_.sin.at(position, 0, 0), a_.sin.dtype, a_.sin.strides[1], a_.pairs);
    }

    // The heads of one token, to rows of `to` that begin at `at`.
    void copy(const Tensor& from, int64_t b, int64_t t, int64_t heads, int64_t dim, const Tensor& to, char* at,
              bool turned) {
        for (int64_t h = 0; h < heads; ++h, at += to.strides[2] * item_size(to.dtype)) {
            read_row(row_, from.at(b, t, h), from.dtype, from.strides[3], dim);
            if (turned) turn();
            write_row(at, to.dtype, to.strides[3], row_, T(1), dim);
        }
    }

    void turn() {
        const int64_t step = a_.interleaved ? 2 : 1, other = a_.interleaved ? 1 : a_.pairs;
        for (int64_t i = 0; i < a_.pairs; ++i) {
            const T x = row_[i * step], y = row_[i * step + other];
            row_[i * step] = x * cos_[i] - y * sin_[i];
            row_[i * step + other] = x * sin_[i] + y * cos_[i];
        }
    }

    const Problem& p_;
    const Append& a_;
    T* const row_;
    T* const cos_;
    T* const sin_;
};

template <class T>
void append_tokens(const Problem& p, const Append& a) {
    int64_t tokens = a.count;
    if (a.cos && !p.sequences.empty()) tokens = std::max(tokens, p.sequences.front().q_length);
    const int64_t runs = ceil_div(tokens, kAppendTokens), units = runs * int64_t(p.sequences.size());
    if (units == 0) return;
    const double moved = double(tokens) * p.sequences.size() * (p.heads + p.kv_heads) * p.head_dim;
    const int threads = int(std::clamp(moved / kAppendedPerThread, 1.0, double(p.threads)));
    Scratch scratch(threads * Appender<T>::need(p, a));
    std::vector<Appender<T>> workers;
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, a, scratch);
    parallel_units(threads, units, [&](int thread, int64_t unit) {
        workers[thread].run(p.sequences[unit / runs], unit % runs * kAppendTokens);
    });
}

}  // namespace onchip::ONCHIP_ISA

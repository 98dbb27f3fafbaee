// The backward pass over a unit. With g the gradient before the activation, which is computed anew:
//     grad_x[t] = Σ_w weight[w] · g[t + W - 1 - w]
//     grad_weight[w] = Σ_t g[t] · x[t - (W - 1) + w],    grad_bias = Σ_t g[t]
// g streams through a tile in the first cache, W - 1 rows ahead of grad_x. Before a sequence's first row grad_x is the
// gradient of its state. Sums over a unit's time are left in `sums`, (W + 1) rows of channels for each group of pieces.
#pragma once

#include "forward.hpp"

namespace onchip::ONCHIP_ISA {

template <class T, class S, bool Time>
class Backward : Forward<T, S, Time> {
    using Base = Forward<T, S, Time>;
    using typename Base::Span;
    using Base::copy_, Base::count_, Base::first_, Base::history_, Base::kTimes, Base::p_, Base::pitch_, Base::width_;

public:
    using Base::kMostChannels;

    Backward(const causal_conv1d::Problem& p, const causal_conv1d::Gradients& gradients, T* sums, Scratch& scratch)
        : Base(p, scratch), gradients_(gradients), sums_(sums), lanes_(lanes(p)), g_{scratch.take<T>(tile(p)), pitch_},
          sum_(scratch.take<T>((p.width + 1) * lanes_)) {}

    static size_t need(const causal_conv1d::Problem& p) {
        return Base::need(p) + Scratch::need<T>(tile(p)) + Scratch::need<T>((p.width + 1) * lanes(p));
    }

    void run(const std::vector<Piece>& pieces, int64_t group, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c += kMostChannels) {
            this->enter(c, std::min(kMostChannels, end - c));
            std::fill_n(sum_, (width_ + 1) * lanes_, T(0));
            for (const Piece& piece : pieces) differentiate(piece);
            keep_sums(group);
        }
    }

private:
    static constexpr int64_t kRows = Time ? 512 : 16;  // of the tile, besides its history

    static int64_t tile(const causal_conv1d::Problem& p) { return (p.width - 1 + kRows) * Base::pitch(p) + kLanes<T>; }
    static int64_t lanes(const causal_conv1d::Problem& p) { return Time ? kLanes<T> : Base::pitch(p); }

    void differentiate(const Piece& piece) {
        std::fill_n(g_.data, history_ * g_.step(), T(0));
        for (int64_t t = piece.begin, rows; t < piece.end + history_; t += rows) {
            const bool own = t < piece.end;
            rows = std::min((own ? piece.end : piece.end + history_) - t, kRows);
            before_activation(piece, t, rows, own);
            to_inputs(piece, t, rows);
            std::memmove(g_.data, g_.at(rows, 0), history_ * g_.step() * sizeof(T));
        }
    }

    // g of these rows, and zero in those beyond the sequence. Sums are of a piece's own rows.
    void before_activation(const Piece& piece, int64_t t, int64_t rows, bool own) {
        const int64_t there = std::clamp<int64_t>(piece.sequence->length - t, 0, rows);
        const Stretch<T, Time> to = g_.from(history_);
        for (int64_t done = 0, next; done < there; done += next) {
            next = there - done;
            const Span x = this->inputs(piece, t + done, next), out = this->span(gradients_.out, piece, t + done);
            for_vectors<T, Time>(next, count_, [&](auto together, int64_t i, int64_t c, auto lanes) ONCHIP_INLINED {
                Vec<T> g[together];
                for (int n = 0; n < together; ++n) g[n] = lanes.load(out.at(i + n * kTimes, c));
                if (p_.silu) {
                    Vec<T> y[together];
                    this->convolved(y, x.from(i), c, lanes);
                    for (int n = 0; n < together; ++n) g[n] *= silu_slope<T>(y[n]);
                }
                for (int n = 0; n < together; ++n) store(to.at(done + i + n * kTimes, c), g[n]);
                if (own) accumulate(g, x.from(i), c, lanes);
            });
        }
        std::fill_n(to.at(there, 0), (rows - there) * to.step(), T(0));
    }

    // To the sum of each tap, and to the bias's behind them. Lanes that are not there are zero.
    template <int N, class Present>
    void accumulate(const Vec<T> (&g)[N], const Span& x, int64_t c, Present lanes) {
        const int64_t width = width_, apart = lanes_;  // known to outlast the stores
        T* to = sum_ + c;
        for (int64_t w = 0; w < width; ++w, to += apart) {
            Vec<T> total = load(to);
            for (int n = 0; n < N; ++n) total += g[n] * lanes.load(x.at(n * kTimes + w, c));
            store(to, total);
        }
        Vec<T> total = load(to);
        for (int n = 0; n < N; ++n) total += g[n];
        store(to, total);
    }

    // The gradients of the rows that lie W - 1 before these to where they belong. Those before the piece, unless it is its
    // sequence's first, are another unit's.
    void to_inputs(const Piece& piece, int64_t t, int64_t rows) const {
        const int64_t first = t - history_, before = std::clamp<int64_t>(piece.begin - first, 0, rows);
        if (piece.first() && gradients_.state && before > 0) {
            const Span copy{copy_, pitch_};
            correlate(g_, copy, before);
            give_state(copy, piece.sequence->index, t, before);
        }
        correlate(g_.from(before), this->span(gradients_.x, piece, first + before), rows - before);
    }

    // Σ_w tap[w] · g[t + W - 1 - w], the transpose of the convolution.
    void correlate(const Stretch<T, Time>& g, const Span& to, int64_t rows) const {
        for_vectors<T, Time>(rows, count_, [&](auto together, int64_t i, int64_t c, auto lanes) ONCHIP_INLINED {
            Vec<T> y[together]{};
            for (int64_t w = 0; w < width_; ++w)
                for (int n = 0; n < together; ++n)
                    y[n] += this->tap(w, c) * load(g.at(i + n * kTimes + history_ - w, c));
            for (int n = 0; n < together; ++n) lanes.store(to.at(i + n * kTimes, c), y[n]);
        });
    }

    void give_state(const Span& from, int64_t sequence, int64_t t, int64_t rows) const {
        const Tensor& state = gradients_.state;
        const auto row = [&](int64_t i) { return reinterpret_cast<S*>(state.at(sequence, t + i, first_)); };
        if constexpr (Time) return copy_row(row(0), state.strides[1], from.data, 1, rows);
        for (int64_t i = 0; i < rows; ++i) copy_row(row(i), state.strides[2], from.at(i, 0), 1, count_);
    }

    void keep_sums(int64_t group) const {
        for (int64_t w = 0; w <= width_; ++w) {
            T* const to = sums_ + (group * (width_ + 1) + w) * p_.channels + first_;
            const T* const from = sum_ + w * lanes_;
            if constexpr (Time) {
                *to = 0;
                for (int i = 0; i < kLanes<T>; ++i) *to += from[i];
            } else {
                std::copy_n(from, count_, to);
            }
        }
    }

    const causal_conv1d::Gradients& gradients_;
    T* const sums_;
    const int64_t lanes_;    // of a sum: all channels, or the times that a vector holds
    const Stretch<T, Time> g_;  // a tile after its history
    T* const sum_;           // of each tap, and of the bias behind them
};

}  // namespace onchip::ONCHIP_ISA

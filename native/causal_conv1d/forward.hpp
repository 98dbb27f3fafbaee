// The forward pass over a unit: each piece of a sequence straight from the caller's memory to the caller's memory.
//
// The rows before a sequence are its state's, or zero: the first inputs are copied behind them, and so are inputs whose
// lanes do not lie beside each other.
#pragma once

#include "blocks.hpp"
#include "common/scratch.hpp"
#include "lanes.hpp"

namespace onchip::ONCHIP_ISA {

// Taps are read anew for every few vectors: a width that is known before the call gains nothing.
template <class T, class S, bool Time>
class Forward {
public:
    static constexpr int64_t kMostChannels = Time ? 1 : 2048 / sizeof(T);  // of a block
    static constexpr int64_t kTimes = Time ? kLanes<T> : 1;                // that a vector holds
    using Span = Stretch<S, Time>;

    Forward(const causal_conv1d::Problem& p, Scratch& scratch)
        : p_(p), width_(p.width), history_(p.width - 1), pitch_(pitch(p)),
          taps_(scratch.take<T>((p.width + 1) * pitch_)), copy_(scratch.take<S>(copied(p))) {}

    static size_t need(const causal_conv1d::Problem& p) {
        return Scratch::need<T>((p.width + 1) * pitch(p)) + Scratch::need<S>(copied(p));
    }

    // Channels from `first` to `end` of these pieces.
    void run(const std::vector<Piece>& pieces, int64_t, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c += kMostChannels) {
            enter(c, std::min(kMostChannels, end - c));
            for (const Piece& piece : pieces) convolve(piece);
        }
    }

protected:
    void enter(int64_t first, int64_t count) {
        first_ = first;
        count_ = count;
        for (int64_t w = 0; w < width_; ++w)
            read_row(taps_ + w * pitch_, p_.weight.at(first, w, 0), p_.weight.dtype, p_.weight.strides[0], count);
        T* const bias = taps_ + width_ * pitch_;
        std::fill_n(bias, pitch_, T(0));
        if (p_.bias) read_row(bias, p_.bias.at(first, 0, 0), p_.bias.dtype, p_.bias.strides[0], count);
    }

    // Rows of a tensor shaped as x, from the piece's row t on.
    Span span(const Tensor& x, const Piece& piece, int64_t t) const {
        return {reinterpret_cast<S*>(x.at(piece.sequence->batch, piece.sequence->start + t, first_)), x.strides[1]};
    }

    // Inputs from row t - history on: those of `rows` outputs, or of fewer where they are copied.
    Span inputs(const Piece& piece, int64_t t, int64_t& rows) const {
        const bool beside = p_.x.strides[Time ? 1 : 2] == 1;
        if (beside && t >= history_) return span(p_.x, piece, t - history_);
        rows = std::min(rows, beside ? std::max(history_ - t, kTimes) : kCopiedRows);
        const Span copy{copy_, pitch_};
        const int64_t before = std::clamp<int64_t>(history_ - t, 0, history_);
        if (p_.state) {
            copy_rows(copy, p_.state, piece.sequence->index, t, before);
        } else {
            std::fill_n(copy_, before * copy.step(), S{});
        }
        copy_rows(copy.from(before), p_.x, piece.sequence->batch, piece.sequence->start + t - history_ + before,
                  history_ - before + rows);
        return copy;
    }

    // Of channel c the tap w, or the bias, which lies behind the taps.
    Vec<T> tap(int64_t w, int64_t c) const {
        if constexpr (Time) return broadcast(taps_[w]);
        return load(taps_ + w * pitch_ + c);
    }

    // y[n] = bias + Σ_w tap[w] · x[n + w], for N vectors that follow each other in time.
    template <int N, class Present>
    void convolved(Vec<T> (&y)[N], const Span& x, int64_t c, Present lanes) const {
        for (int n = 0; n < N; ++n) y[n] = tap(width_, c);
        for (int64_t w = 0; w < width_; ++w)
            for (int n = 0; n < N; ++n) y[n] += tap(w, c) * lanes.load(x.at(n * kTimes + w, c));
    }

    static int64_t pitch(const causal_conv1d::Problem& p) {
        // With a cache line between rows, which would otherwise share the cache's sets.
        return Time ? 1 : round_up(std::min(p.channels, kMostChannels), kLanes<T>) + 64 / sizeof(T);
    }

private:
    static constexpr int64_t kCopiedRows = Time ? 512 : 16;

    static int64_t copied(const causal_conv1d::Problem& p) {
        return (p.width - 1 + std::max(p.width - 1, kCopiedRows)) * pitch(p);
    }

    void copy_rows(const Span& to, const Tensor& from, int64_t batch, int64_t t, int64_t rows) const {
        const auto row = [&](int64_t i) { return reinterpret_cast<const S*>(from.at(batch, t + i, first_)); };
        if constexpr (Time) return copy_row(to.data, 1, row(0), from.strides[1], rows);
        for (int64_t i = 0; i < rows; ++i) copy_row(to.at(i, 0), 1, row(i), from.strides[2], count_);
    }

    void convolve(const Piece& piece) const {
        for (int64_t t = piece.begin, rows; t < piece.end; t += rows) {
            rows = piece.end - t;
            const Span x = inputs(piece, t, rows), out = span(p_.out, piece, t);
            for_vectors<T, Time>(rows, count_, [&](auto together, int64_t i, int64_t c, auto lanes) ONCHIP_INLINED {
                Vec<T> y[together];
                convolved(y, x.from(i), c, lanes);
                if (p_.silu)
                    for (Vec<T>& each : y) each = silu<T>(each);
                for (int n = 0; n < together; ++n) lanes.store(out.at(i + n * kTimes, c), y[n]);
            });
        }
    }

protected:
    const causal_conv1d::Problem& p_;
    const int64_t width_, history_;
    const int64_t pitch_;  // of channels in scratch
    T* const taps_;        // and the bias behind them
    S* const copy_;        // of inputs, where they cannot be read in their place
    int64_t first_ = 0, count_ = 0;  // of a block's channels
};

}  // namespace onchip::ONCHIP_ISA

// The backward pass over a unit. With g the gradient before the activation, which is computed anew:
//     grad_x[t] = Σ_w weight[w] · g[t + W - 1 - w]
//     grad_weight[w] = Σ_t g[t] · x[t - (W - 1) + w],    grad_bias = Σ_t g[t]
// g streams through a tile of its own, W - 1 rows ahead of grad_x. Before a sequence's first row grad_x is the gradient of
// its state. Sums over a unit's time are left in `sums`, (W + 1) rows of channels for each group of pieces.
#pragma once

#include "forward.hpp"

namespace onchip::ONCHIP_ISA {

template <class T, bool Time, int Width>
class Backward : Forward<T, Time, Width> {
    using Base = Forward<T, Time, Width>;
    using typename Base::Dimensions;
    using Base::columns_, Base::filter_, Base::p_, Base::shape_, Base::x_, Base::y_;

public:
    Backward(const causal_conv1d::Problem& p, const causal_conv1d::Gradients& gradients, T* sums, Scratch& scratch)
        : Base(p, scratch), gradients_(gradients), sums_(sums), g_(scratch.take<T>(shape_.elements())),
          sum_(scratch.take<T>((p.width + 1) * lanes(shape_))) {}

    static size_t need(const causal_conv1d::Problem& p) {
        const Dimensions shape(p);
        return Base::need(p) + Scratch::need<T>(shape.elements()) + Scratch::need<T>((p.width + 1) * lanes(shape));
    }

    void run(const std::vector<Piece>& pieces, int64_t group, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c += shape_.channels) {
            this->enter({c, std::min(shape_.channels, end - c)});
            std::fill_n(sum_, (p_.width + 1) * lanes(shape_), T(0));
            for (const Piece& piece : pieces) differentiate(piece);
            keep_sums(group);
        }
    }

private:
    // A sum's lanes: of all channels, or of the times that a vector holds.
    static int64_t lanes(const Dimensions& shape) { return Time ? kLanes<T> : shape.pitch; }

    void differentiate(const Piece& piece) {
        const int64_t history = shape_.history, length = piece.sequence->length, ahead = piece.end + history;
        this->recall(piece);
        std::fill_n(g_, history * shape_.pitch, T(0));
        for (int64_t t = piece.begin; t < ahead; t += shape_.rows) {
            const int64_t rows = std::min(shape_.rows, ahead - t), there = std::clamp<int64_t>(length - t, 0, rows);
            this->read(this->tile(), p_.x, piece, t, there);
            this->read(g_ + history * shape_.pitch, gradients_.out, piece, t, there);
            for (int64_t c = 0; c < Dimensions::end(columns_.count); c += Dimensions::kChannels) {
                before_activation(c, there, rows);
                accumulate(c, std::clamp<int64_t>(piece.end - t, 0, rows));
                to_inputs(c, rows);
            }
            give(piece, t - history, rows);
            this->advance(x_, rows);
            this->advance(g_, rows);
        }
    }

    // g of the tile's first `there` rows, and zero in those beyond the sequence.
    void before_activation(int64_t c, int64_t there, int64_t rows) {
        const int64_t pitch = shape_.pitch, end = there * pitch;
        T* const g = g_ + shape_.history * pitch;
        if (p_.silu) {
            const typename Filter<T, Time, Width>::Taps taps(filter_, c);
            const Vec<T> bias = of_channel<T, Time>(filter_.bias, c);
            for (int64_t i = c; i < end; i += Dimensions::kTimes * pitch)
                store(g + i, load(g + i) * silu_slope<T>(convolved<T>(taps, bias, x_ + i, pitch)));
        }
        for (int64_t t = there; t < rows; ++t) std::fill_n(g + t * pitch + c, Dimensions::kChannels, T(0));
    }

    void accumulate(int64_t c, int64_t rows) {
        if constexpr (Width) {
            Vec<T> sums[Width + 1];
            for (int w = 0; w <= Width; ++w) sums[w] = load(sum(w, c));
            add_products(c, rows, Width, sums);
            for (int w = 0; w <= Width; ++w) store(sum(w, c), sums[w]);
        } else {
            for (int64_t w = 0; w <= p_.width; ++w) add_product(c, rows, w);
        }
    }
    T* sum(int64_t w, int64_t c) const { return sum_ + w * lanes(shape_) + (Time ? 0 : c); }

    // To the sum of each tap, and to the bias's after them.
    void add_products(int64_t c, int64_t rows, int width, Vec<T>* sums) const {
        const int64_t pitch = shape_.pitch;
        const T* const g = g_ + shape_.history * pitch;
        for (int64_t i = c, left = rows; left > 0; i += Dimensions::kTimes * pitch, left -= Dimensions::kTimes) {
            const Vec<T> here = load(g + i);
#pragma GCC unroll 4
            for (int w = 0; w < width; ++w) sums[w] += kept(here * load(x_ + i + w * pitch), left);
            sums[width] += kept(here, left);
        }
    }
    void add_product(int64_t c, int64_t rows, int64_t w) const {
        const int64_t pitch = shape_.pitch;
        const T* const g = g_ + shape_.history * pitch;
        Vec<T> total = load(sum(w, c));
        for (int64_t i = c, left = rows; left > 0; i += Dimensions::kTimes * pitch, left -= Dimensions::kTimes)
            total += kept(w == p_.width ? load(g + i) : load(g + i) * load(x_ + i + w * pitch), left);
        store(sum(w, c), total);
    }
    // Without the times that are another unit's, or nobody's.
    static Vec<T> kept(Vec<T> x, int64_t left) {
        if (Time && left < kLanes<T>)
            for (int64_t i = left; i < kLanes<T>; ++i) x[i] = 0;
        return x;
    }

    void to_inputs(int64_t c, int64_t rows) {
        const typename Filter<T, Time, Width>::Taps taps(filter_, c);
        const int64_t pitch = shape_.pitch, end = rows * pitch;
        for (int64_t i = c; i < end; i += Dimensions::kTimes * pitch) store(y_ + i, correlated<T>(taps, g_ + i, pitch));
    }

    // The gradients of rows [t, t + rows) to where they belong; those before the piece, unless it is its sequence's first,
    // are another unit's.
    void give(const Piece& piece, int64_t t, int64_t rows) const {
        const int64_t before = std::clamp<int64_t>(piece.begin - t, 0, rows);
        if (piece.first() && gradients_.state && before > 0)
            columns_.template write<T, Time>(gradients_.state, piece.sequence->index, t + shape_.history, y_, shape_.pitch, before);
        this->write(gradients_.x, piece, t + before, y_ + before * shape_.pitch, rows - before);
    }

    void keep_sums(int64_t group) const {
        for (int64_t w = 0; w <= p_.width; ++w) {
            T* const to = sums_ + (group * (p_.width + 1) + w) * p_.channels + columns_.first;
            const T* const from = sum(w, 0);
            if constexpr (Time) {
                *to = 0;
                for (int i = 0; i < kLanes<T>; ++i) *to += from[i];
            } else {
                std::copy_n(from, columns_.count, to);
            }
        }
    }

    const causal_conv1d::Gradients& gradients_;
    T* const sums_;
    T* const g_;    // a tile after its history
    T* const sum_;  // of each tap, and of the bias after them
};

}  // namespace onchip::ONCHIP_ISA

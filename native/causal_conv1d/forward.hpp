// The forward pass over a unit: each piece of a sequence streams through the tile, and leaves its last rows as history.
#pragma once

#include "blocks.hpp"
#include "common/scratch.hpp"
#include "tile.hpp"

namespace onchip::ONCHIP_ISA {

template <class T, bool Time, int Width>
class Forward {
public:
    using Dimensions = Shape<T, Time>;

    Forward(const causal_conv1d::Problem& p, Scratch& scratch)
        : p_(p), shape_(p), taps_(scratch.take<T>(p.width * shape_.pitch)), bias_(scratch.take<T>(shape_.pitch)),
          x_(scratch.take<T>(shape_.elements())), y_(scratch.take<T>(shape_.elements())),
          filter_{taps_, bias_, p.width, shape_.pitch} {}

    static size_t need(const causal_conv1d::Problem& p) {
        const Dimensions shape(p);
        return Scratch::need<T>(p.width * shape.pitch) + Scratch::need<T>(shape.pitch) + 2 * Scratch::need<T>(shape.elements());
    }

    // Channels from `first` to `end` of these pieces.
    void run(const std::vector<Piece>& pieces, int64_t, int64_t first, int64_t end) {
        for (int64_t c = first; c < end; c += shape_.channels) {
            enter({c, std::min(shape_.channels, end - c)});
            for (const Piece& piece : pieces) convolve(piece);
        }
    }

protected:
    void enter(Columns columns) {
        columns_ = columns;
        for (int64_t w = 0; w < p_.width; ++w)
            read_row(taps_ + w * shape_.pitch, p_.weight.at(columns.first, w, 0), p_.weight.dtype, p_.weight.strides[0], columns.count);
        std::fill_n(bias_, shape_.pitch, T(0));
        if (p_.bias) read_row(bias_, p_.bias.at(columns.first, 0, 0), p_.bias.dtype, p_.bias.strides[0], columns.count);
    }

    T* tile() const { return x_ + shape_.history * shape_.pitch; }

    // Rows [t, t + rows) of the sequence into the tile.
    void read(T* to, const Tensor& from, const Piece& piece, int64_t t, int64_t rows) const {
        columns_.read<T, Time>(to, shape_.pitch, from, piece.sequence->batch, piece.sequence->start + t, rows);
    }
    void write(const Tensor& to, const Piece& piece, int64_t t, const T* from, int64_t rows) const {
        columns_.write<T, Time>(to, piece.sequence->batch, piece.sequence->start + t, from, shape_.pitch, rows);
    }

    // The rows before the piece: of the sequence, of its state before that, and zeros where there is none.
    void recall(const Piece& piece) const {
        const int64_t history = shape_.history, inside = std::min(history, piece.begin), before = history - inside;
        read(x_ + before * shape_.pitch, p_.x, piece, piece.begin - inside, inside);
        if (before == 0) return;
        if (p_.state) return columns_.read<T, Time>(x_, shape_.pitch, p_.state, piece.sequence->index, piece.begin, before);
        std::fill_n(x_, before * shape_.pitch, T(0));
    }

    // The last rows of a tile of `rows` become its history.
    void advance(T* x, int64_t rows) const {
        std::memmove(x, x + rows * shape_.pitch, shape_.history * shape_.pitch * sizeof(T));
    }

private:
    void convolve(const Piece& piece) {
        recall(piece);
        for (int64_t t = piece.begin; t < piece.end; t += shape_.rows) {
            const int64_t rows = std::min(shape_.rows, piece.end - t);
            read(tile(), p_.x, piece, t, rows);
            for (int64_t c = 0; c < Dimensions::end(columns_.count); c += Dimensions::kChannels) convolve_channels(c, rows);
            write(p_.out, piece, t, y_, rows);
            advance(x_, rows);
        }
    }

    void convolve_channels(int64_t c, int64_t rows) {
        const typename Filter<T, Time, Width>::Taps taps(filter_, c);
        const Vec<T> bias = of_channel<T, Time>(bias_, c);
        const int64_t pitch = shape_.pitch, end = rows * pitch;
        for (int64_t i = c; i < end; i += Dimensions::kTimes * pitch) {
            const Vec<T> y = convolved<T>(taps, bias, x_ + i, pitch);
            store(y_ + i, p_.silu ? silu<T>(y) : y);
        }
    }

protected:
    const causal_conv1d::Problem& p_;
    const Dimensions shape_;
    T* const taps_;
    T* const bias_;
    T* const x_;  // a tile after its history
    T* const y_;
    const Filter<T, Time, Width> filter_;
    Columns columns_{};
};

}  // namespace onchip::ONCHIP_ISA

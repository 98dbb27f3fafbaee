// Tiles: a block of channels, or the states, of a chunk's tokens in the first cache, one row per token.
//
// The lanes of a vector are channels. A block has up to kVectors vectors of them, all of one group, so that B and C are
// the same for all lanes. Lanes beyond the last channel hold zeros.
#pragma once

#include <algorithm>

#include "common/convert.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using selective_scan::Gradients;
using selective_scan::Problem;
using selective_scan::Sequence;

constexpr int kVectors = 4;
template <class T>
constexpr int64_t kWidth = kVectors * kLanes<T>;

struct Block {
    int64_t index, group, first, count;

    template <class T>
    int64_t lanes() const {
        return round_up(count, kLanes<T>);
    }
};

template <class T>
int64_t blocks_in_group(int64_t channels, int64_t groups) {
    return ceil_div(channels / groups, kWidth<T>);
}

template <class T>
Block block_at(const Problem& p, int64_t index) {
    const int64_t per_group = blocks_in_group<T>(p.channels, p.groups), size = p.channels / p.groups;
    const int64_t group = index / per_group, begin = index % per_group * kWidth<T>;
    return {index, group, group * size + begin, std::min(kWidth<T>, size - begin)};
}

// Where a tile lies in slow memory: rows and columns with their strides.
struct Source {
    char* data;
    DType dtype;
    int64_t row, column;
};

// Tokens of a tensor (batch, time, channels).
inline Source tokens(const Tensor& x, const Sequence& s, int64_t t, const Block& block) {
    return {x.at(s.batch, s.start + t, block.first), x.dtype, x.strides[1], x.strides[2]};
}
// Tokens of a tensor (batch, time, groups, states).
inline Source tokens_of_group(const Tensor& x, const Sequence& s, int64_t t, const Block& block) {
    return {x.at(s.batch, s.start + t, block.group), x.dtype, x.strides[1], x.strides[3]};
}
// A block's channels of a tensor (sequences, channels, states), a row per state.
inline Source states(const Tensor& x, int64_t sequence, const Block& block) {
    return {x.at(sequence, block.first, 0), x.dtype, x.strides[2], x.strides[1]};
}

inline bool by_rows(const Source& s) { return std::abs(s.column) <= std::abs(s.row); }
inline char* at(const Source& s, int64_t row, int64_t column) {
    return s.data + item_size(s.dtype) * (row * s.row + column * s.column);
}

template <class T, class S>
void read_rows(T* tile, int64_t width, const Source& from, int64_t rows, int64_t columns) {
    const S* row = reinterpret_cast<const S*>(from.data);
    if (from.column == 1 && columns == kWidth<T>) {  // a whole block of channels, its size known
        for (int64_t r = 0; r < rows; ++r, row += from.row, tile += width)
            for (int64_t i = 0; i < kWidth<T>; ++i) tile[i] = T(widen(row[i]));
    } else if (from.column == 1 && from.row == columns && width == columns) {
        read_as(tile, row, 1, rows * columns);
    } else {
        for (int64_t r = 0; r < rows; ++r) read_as(tile + r * width, row + r * from.row, from.column, columns);
    }
}

template <class T>
void read_rows(T* tile, int64_t width, const Source& from, int64_t rows, int64_t columns) {
    switch (from.dtype) {
        case DType::float32: return read_rows<T, float>(tile, width, from, rows, columns);
        case DType::float64: return read_rows<T, double>(tile, width, from, rows, columns);
        case DType::bfloat16: return read_rows<T, BFloat16>(tile, width, from, rows, columns);
        case DType::float16: return read_rows<T, Half>(tile, width, from, rows, columns);
        case DType::boolean: return;
    }
}

// tile[rows × columns], `width` apart. Memory is read along the smaller stride; `lines` has room for a vector's worth of
// max(rows, columns).
template <class T>
void read_tile(T* tile, int64_t width, const Source& from, int64_t rows, int64_t columns, T* lines) {
    constexpr int64_t L = kLanes<T>;
    if (by_rows(from)) return read_rows(tile, width, from, rows, columns);
    for (int64_t c = 0; c < columns; c += L) {
        const int64_t count = std::min(L, columns - c);
        for (int64_t i = 0; i < count; ++i) read_row(lines + i * rows, at(from, 0, c + i), from.dtype, from.row, rows);
        int64_t r = 0;
        for (; count == L && r + L <= rows; r += L) {
            Vec<T> square[L];
            for (int64_t i = 0; i < L; ++i) square[i] = load(lines + i * rows + r);
            transpose<T>(square);
            for (int64_t i = 0; i < L; ++i) store(tile + (r + i) * width + c, square[i]);
        }
        for (; r < rows; ++r)
            for (int64_t i = 0; i < count; ++i) tile[r * width + c + i] = lines[i * rows + r];
    }
}

template <class T, class S>
void write_rows(const Source& to, const T* tile, int64_t width, int64_t rows, int64_t columns) {
    S* row = reinterpret_cast<S*>(to.data);
    if (to.column == 1 && columns == kWidth<T>) {
        for (int64_t r = 0; r < rows; ++r, row += to.row, tile += width)
            for (int64_t i = 0; i < kWidth<T>; ++i) narrow(row[i], tile[i]);
    } else {
        for (int64_t r = 0; r < rows; ++r) write_as(row + r * to.row, to.column, tile + r * width, T(1), columns);
    }
}

template <class T>
void write_rows(const Source& to, const T* tile, int64_t width, int64_t rows, int64_t columns) {
    switch (to.dtype) {
        case DType::float32: return write_rows<T, float>(to, tile, width, rows, columns);
        case DType::float64: return write_rows<T, double>(to, tile, width, rows, columns);
        case DType::bfloat16: return write_rows<T, BFloat16>(to, tile, width, rows, columns);
        case DType::float16: return write_rows<T, Half>(to, tile, width, rows, columns);
        case DType::boolean: return;
    }
}

template <class T>
void write_tile(const Source& to, const T* tile, int64_t width, int64_t rows, int64_t columns, T* line) {
    if (by_rows(to)) return write_rows(to, tile, width, rows, columns);
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = 0; r < rows; ++r) line[r] = tile[r * width + c];
        write_row(at(to, 0, c), to.dtype, to.row, line, T(1), rows);
    }
}

}  // namespace onchip::ONCHIP_ISA

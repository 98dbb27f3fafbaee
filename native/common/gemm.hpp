// The matrix product's inner tile: kTileRows × kPanel results held in registers.
//
// B comes in panels of kPanel columns, so that a step of the product reads one contiguous line of it; A is read one
// scalar at a time with any strides, so the same code serves A and Aᵀ. C is padded to whole panels.
#pragma once

#include <algorithm>

#include "convert.hpp"

namespace onchip::ONCHIP_ISA {

// Length of a line of a tile: whole panels, and an odd number of cache lines so that successive rows fall into
// different cache sets.
template <class T>
inline int64_t pitch(int64_t n) {
    const int64_t lines = round_up(n, kPanel<T>) * int64_t(sizeof(T)) / 64;
    return std::max<int64_t>(round_up(n, kPanel<T>), (lines | 1) * 64 / int64_t(sizeof(T)));
}

template <class T>
struct Left {  // A: element (row, step)
    const T* data;
    int64_t row, step;
};

template <class T>
struct Result {  // C, with the factor its rows are multiplied by before the product is added; 1 where that is null
    T* data;
    int64_t row;
    const T* factor = nullptr;
};

// What becomes of C: C = AB, C += AB, or C = factor · C + AB row by row.
enum class Into { set, add, scale };

// C[ROWS × kPanel] = [C +] A[ROWS × steps] · B[steps × kPanel]. C is added last: a long sum made of sums of tiles rounds
// much less than one chain through all of it.
template <Into INTO, int ROWS, class T>
inline void tile_product(int64_t steps, Left<T> a, const T* b, int64_t b_step, Result<T> c) {
    constexpr int L = kLanes<T>;
    Vec<T> sum[ROWS][2] = {};
    for (int64_t s = 0; s < steps; ++s) {
        const Vec<T> b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Vec<T> x = broadcast(a.data[r * a.row]);
            sum[r][0] += x * b0;
            sum[r][1] += x * b1;
        }
        a.data += a.step;
        b += b_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            T* const to = c.data + r * c.row + half * L;
            if constexpr (INTO == Into::set) store(to, sum[r][half]);
            if constexpr (INTO == Into::add) store(to, load(to) + sum[r][half]);
            if constexpr (INTO == Into::scale) store(to, load(to) * c.factor[r] + sum[r][half]);
        }
    }
}

template <Into INTO, int ROWS = kTileRows, class T>
inline void rows_product(int rows, int64_t steps, Left<T> a, const T* b, int64_t b_step, Result<T> c) {
    if (rows == ROWS) {
        tile_product<INTO, ROWS>(steps, a, b, b_step, c);
    } else if constexpr (ROWS > 1) {
        rows_product<INTO, ROWS - 1>(rows, steps, a, b, b_step, c);
    }
}

struct Range {
    int64_t begin, end;
};

// A matrix B of `steps` lines; column panel p starts at data + p·panel, and its lines are `step` apart.
template <class T>
struct Right {
    const T* data;
    int64_t panel, step;
};

// C[rows × columns] = [C +] A · B, `columns` a multiple of kPanel. A triangle need not be computed as a square:
// `needed(row, rows, column)` gives the range of steps that the tile of those rows and that panel needs; an empty range
// leaves C as it is.
template <Into INTO, class T, class Needed>
inline void product(Range rows, Range columns, Left<T> a, Right<T> b, Result<T> c, const Needed& needed) {
    for (int64_t column = columns.begin; column < columns.end; column += kPanel<T>) {
        const T* panel = b.data + column / kPanel<T> * b.panel;
        for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
            const int count = int(std::min<int64_t>(kTileRows, rows.end - row));
            const Range steps = needed(row, count, column);
            if (steps.begin >= steps.end) continue;
            rows_product<INTO>(count, steps.end - steps.begin,
                               Left<T>{a.data + row * a.row + steps.begin * a.step, a.row, a.step},
                               panel + steps.begin * b.step, b.step,
                               Result<T>{c.data + row * c.row + column, c.row, c.factor + (INTO == Into::scale ? row : 0)});
        }
    }
}

// Packs the transpose of a row-major block into panels: to[panel][i][lane] = from[panel·kPanel + lane][i]; rows beyond
// `rows` are zero.
template <class T>
void pack_transposed(T* to, const T* from, int64_t from_row, int64_t rows, int64_t columns) {
    constexpr int W = kPanel<T>;
    for (int64_t first = 0; first < rows; first += W, to += columns * W) {
        const int64_t count = std::min<int64_t>(W, rows - first);
        const T* block = from + first * from_row;
        if (count == W) {
            for (int64_t i = 0; i < columns; ++i)
                for (int lane = 0; lane < W; ++lane) to[i * W + lane] = block[lane * from_row + i];
        } else {
            for (int64_t i = 0; i < columns; ++i)
                for (int lane = 0; lane < W; ++lane) to[i * W + lane] = lane < count ? block[lane * from_row + i] : T(0);
        }
    }
}

}  // namespace onchip::ONCHIP_ISA

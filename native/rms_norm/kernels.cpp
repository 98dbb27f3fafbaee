// The root-mean-square norm of rows, each in cache from its reading to its writing.
#include <algorithm>
#include <cmath>

#include "common/convert.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

using rms_norm::Problem;

constexpr int64_t kElementsPerThread = 1 << 15;  // a thread is woken in about the time that this many take

// `row` has room for a row and zeros after it, up to `width`.
template <class T>
void norm_row(const Problem& p, const T* weight, T* row, int64_t i, int64_t width) {
    constexpr int64_t L = kLanes<T>;
    const int64_t size = p.x.size;
    read_row(row, p.x.at(i), p.x.tensor.dtype, p.x.stride(), size);
    Vec<T> sums[2] = {};
    for (int64_t c = 0; c < width; c += 2 * L)
        for (int s = 0; s < 2; ++s) sums[s] += load(row + c + s * L) * load(row + c + s * L);
    sums[0] += sums[1];
    T sum = 0;
    for (int64_t lane = 0; lane < L; ++lane) sum += sums[0][lane];
    const T scale = 1 / std::sqrt(sum / T(size) + T(p.eps));
    for (int64_t c = 0; c < size; ++c) row[c] *= scale * weight[c];
    write_row(p.out.at(i), p.out.tensor.dtype, p.out.stride(), row, T(1), size);
}

template <class T>
void norm_as(const Problem& p) {
    const int64_t size = p.x.size, width = round_up(size, 2 * kLanes<T>), count = p.x.count();
    const int threads = int(std::clamp<int64_t>(count * size / kElementsPerThread, 1, p.threads));
    Scratch scratch(Scratch::need<T>(size) + Scratch::need<T>(threads * width));
    T* const weight = scratch.take<T>(size);
    read_row(weight, p.weight.data, p.weight.dtype, p.weight.strides[0], size);
    T* const rows = scratch.take<T>(threads * width);
    std::fill(rows, rows + threads * width, T(0));
    parallel_units(threads, count, [&](int thread, int64_t i) { norm_row(p, weight, rows + thread * width, i, width); });
}

void norm(const Problem& p) { p.x.tensor.dtype == DType::float64 ? norm_as<double>(p) : norm_as<float>(p); }

}  // namespace

extern const rms_norm::Kernels rms_norm_kernels;
const rms_norm::Kernels rms_norm_kernels{norm};

}  // namespace onchip::ONCHIP_ISA

// The Walsh–Hadamard transform: blocks of rows are read into the first cache, transformed there, and written.
//
// The floor is one read and one write of memory. On one core of an EPYC with AVX2, (65536, 128) in float32, thread CPU
// time, best of 21: into memory that is there 3.7 ms, PyTorch's copy 4.0, its product with the matrix 42. Into a fresh
// result, whose pages the system must first make: 24 ms, clone 20, x @ H 53 to 58. Blocks are small because the
// processor then reads the next one while it transforms this one: blocks of 16 KiB took 7 ms.
#include <algorithm>
#include <vector>

#include "butterfly.hpp"
#include "common/convert.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

using hadamard::Problem;

constexpr int64_t kBlockBytes = 2048;            // few enough that the processor reads the next block during this one
constexpr int64_t kUnitBytes = 65536;            // what a thread takes at a time
constexpr int64_t kElementsPerThread = 1 << 16;  // a thread is woken in about the time that this many take

template <class T>
class Worker {
public:
    Worker(const Problem& p, const T* before, const T* after, Scratch& scratch)
        : p_(p), before_(before), after_(after), block_(scratch.take<T>(block_size(p))) {}

    static int64_t period(const Problem& p) { return std::max<int64_t>(p.n, kLanes<T>); }
    static int64_t rows_in(int64_t bytes, const Problem& p) { return std::max<int64_t>(bytes / sizeof(T) / p.n, 1); }
    static int64_t block_size(const Problem& p) { return round_up(rows_in(kBlockBytes, p) * p.n, kLanes<T>); }

    void run(int64_t unit) {
        const int64_t unit_rows = rows_in(kUnitBytes, p_), rows = rows_in(kBlockBytes, p_);
        const int64_t first = unit * unit_rows, end = std::min(first + unit_rows, p_.rows());
        for (int64_t row = first; row < end; row += rows) block(row, std::min(rows, end - row));
    }

private:
    void block(int64_t first, int64_t rows) {
        const int64_t total = round_up(rows * p_.n, kLanes<T>);  // lanes beyond the last row are nobody's
        read(first, rows);
        multiply(before_, total);
        transform_rows(block_, total, p_.n);
        multiply(after_, total);
        char* const to = p_.out.data + item_size(p_.out.dtype) * first * p_.n;
        write_row(to, p_.out.dtype, 1, block_, T(p_.scale), rows * p_.n);
    }

    void read(int64_t first, int64_t rows) {
        const int64_t inner = p_.sizes[2];
        const bool packed = p_.x.strides[3] == 1 && p_.x.strides[2] == p_.n;
        for (int64_t done = 0; done < rows;) {
            const int64_t outer = (first + done) / inner, c = (first + done) % inner;
            const int64_t count = std::min(rows - done, inner - c);
            const int64_t a = outer / p_.sizes[1], b = outer % p_.sizes[1];
            T* const to = block_ + done * p_.n;
            if (packed) {
                read_row(to, p_.x.at(a, b, c), p_.x.dtype, 1, count * p_.n);
            } else {
                for (int64_t i = 0; i < count; ++i)
                    read_row(to + i * p_.n, p_.x.at(a, b, c + i), p_.x.dtype, p_.x.strides[3], p_.n);
            }
            done += count;
        }
    }

    void multiply(const T* factors, int64_t total) {
        if (factors == nullptr) return;
        const int64_t period = Worker::period(p_);
        for (int64_t begin = 0; begin < total; begin += period)
            for (int64_t i = 0; i < period; i += kLanes<T>)
                store(block_ + begin + i, load(block_ + begin + i) * load(factors + i));
    }

    const Problem& p_;
    const T* const before_;
    const T* const after_;
    T* const block_;
};

// The factors of a row, again and again until they fill a vector; null where there are none.
template <class T>
const T* repeated(const Problem& p, const Tensor& factors, Scratch& scratch) {
    if (!factors) return nullptr;
    const int64_t period = Worker<T>::period(p);
    T* const to = scratch.take<T>(period);
    for (int64_t i = 0; i < period; ++i) to[i] = reinterpret_cast<const T*>(factors.data)[i % p.n];
    return to;
}

template <class T>
void transform_as(const Problem& p) {
    if (p.rows() == 0) return;
    const int threads = int(std::clamp<int64_t>(p.rows() * p.n / kElementsPerThread, 1, p.threads));
    Scratch scratch(threads * Scratch::need<T>(Worker<T>::block_size(p)) + 2 * Scratch::need<T>(Worker<T>::period(p)));
    const T* const before = repeated<T>(p, p.before, scratch);
    const T* const after = repeated<T>(p, p.after, scratch);
    std::vector<Worker<T>> workers;
    workers.reserve(threads);
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, before, after, scratch);
    const int64_t units = ceil_div(p.rows(), Worker<T>::rows_in(kUnitBytes, p));
    parallel_units(threads, units, [&](int thread, int64_t unit) { workers[thread].run(unit); });
}

void transform(const Problem& p) {
    if (p.x.dtype == DType::float64) return transform_as<double>(p);
    transform_as<float>(p);
}

}  // namespace

extern const hadamard::Kernels hadamard_kernels;
const hadamard::Kernels hadamard_kernels{transform};

}  // namespace onchip::ONCHIP_ISA

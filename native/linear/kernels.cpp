// A linear map of few rows: reading the weights is all the time there is.
//
// A core reads at the rate of memory where it reads in the order of addresses, and its prefetchers run ahead of it. So a
// row of weights is read from one end to the other before the next one, multiplied by all rows of x, which stay in cache;
// 16-bit weights widen in registers. A dot product's sums are the same, in the same order, however many rows there are.
//
// On one core of an EPYC with AVX2, a busy machine, thread CPU time, best of 7, weights (3352, 768) and (768, 1536) beyond
// cache, as a fraction of the rate of summing as many bytes: one row in float32 0.96 and 1.0, bfloat16 0.92 and 0.97,
// float16 0.92 and 1.0 (PyTorch's: 0.56 and 0.77, 0.57 and 0.84, 0.81 and 0.83); eight rows in float32 0.38 and 0.30,
// where it is the arithmetic. Two or four rows of weights at once take twice the time, asking for them early a quarter
// more, and past the second-level cache (non-temporal) as much.
#include <algorithm>

#include "common/convert.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

using linear::Problem;

constexpr int kSums = 4;        // of a dot product, side by side: an addition waits for the one before it
constexpr int kRowsAtOnce = 3;  // of x: their sums, and the weights, fit 16 registers
constexpr int64_t kBlock = kSums * kLanes<float>;
constexpr int64_t kUnitBytes = 64 << 10;        // of weights, which a thread takes at a time
constexpr int64_t kBytesPerThread = 512 << 10;  // a thread is woken in about the time in which another reads as many

// Two vectors of neighbouring weights. Of bfloat16 the first has the even ones and the second the odd ones, which takes a
// shift and a mask, where their own order would take shuffles; x is then laid out the same way.
template <class S>
inline void load_pair(const S* p, Vec<float>& a, Vec<float>& b) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        using Bits = VecOf<float>::bits;
        const Bits both = reinterpret_cast<Bits>(load(reinterpret_cast<const float*>(p)));
        a = reinterpret_cast<Vec<float>>(both << 16);
        b = reinterpret_cast<Vec<float>>(both & int32_t(0xffff0000));
    } else {
        a = load_as<float>(p);
        b = load_as<float>(p + kLanes<float>);
    }
}

template <class S>
void lay_out(float* x, int64_t n) {
    if constexpr (std::is_same_v<S, BFloat16>) {
        constexpr int64_t L = kLanes<float>;
        for (int64_t c = 0; c < n; c += 2 * L) {
            float odd[L];
            for (int64_t i = 0; i < L; ++i) odd[i] = x[c + 2 * i + 1];
            for (int64_t i = 0; i < L; ++i) x[c + i] = x[c + 2 * i];
            std::copy_n(odd, L, x + c + L);
        }
    }
}

// sums[i] += Σ over blocks of weights ∘ the i-th row of x, of which each vector is a sum of its own. Where the weights are
// in cache by now, `ahead` are those to ask for meanwhile; else null.
template <class S, int N>
inline void add_products(const S* weights, int64_t n, const S* ahead, const float* x, int64_t pitch,
                         Vec<float> (&sums)[N][kSums]) {
    constexpr int L = kLanes<float>;
    for (int64_t c = 0; c < n; c += kBlock) {
        if (ahead != nullptr)
            for (size_t byte = 0; byte < kBlock * sizeof(S); byte += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(ahead + c) + byte);
#pragma GCC unroll 2
        for (int s = 0; s < kSums; s += 2) {
            Vec<float> a, b;
            load_pair(weights + c + s * L, a, b);
#pragma GCC unroll 3
            for (int i = 0; i < N; ++i) {
                sums[i][s] += a * load(x + i * pitch + c + s * L);
                sums[i][s + 1] += b * load(x + i * pitch + c + (s + 1) * L);
            }
        }
    }
}

template <class S>
class Product {
public:
    explicit Product(const Problem& p, Scratch& scratch)
        : p_(p), rows_(p.x.count()), pitch_(pitch(p)), x_(scratch.take<float>(rows_ * pitch_)) {
        for (int64_t row = 0; row < rows_; ++row) {
            float* const to = x_ + row * pitch_;
            read_row(to, p.x.at(row), p.x.tensor.dtype, p.x.stride(), p.x.size);
            std::fill(to + p.x.size, to + pitch_, 0.0f);
            lay_out<S>(to, pitch_);
        }
    }

    static int64_t pitch(const Problem& p) { return round_up(p.x.size, kBlock); }
    static int64_t need(const Problem& p) { return Scratch::need<float>(p.x.count() * pitch(p)); }

    // Outputs from `first` on, as many as there are lanes but not beyond the last.
    void run(int64_t first) const {
        constexpr int L = kLanes<float>;
        const int64_t count = std::min<int64_t>(L, p_.out.size - first);
        float bias[L] = {};
        if (p_.bias) read_row(bias, p_.bias.at(first, 0, 0), p_.bias.dtype, p_.bias.strides[0], count);
        Vec<float> dots[linear::kMaxRows][L];
        std::fill_n(dots[0], rows_ * L, Vec<float>{});
        for (int64_t j = 0; j < count; ++j) all_rows(first + j, j, dots);
        for (int64_t row = 0; row < rows_; ++row) {
            const Vec<float> y = reduce_each<float>(dots[row], [](auto a, auto b) { return a + b; }) + load(bias);
            char* const to = p_.out.at(row) + item_size(p_.out.tensor.dtype) * p_.out.stride() * first;
            write_row(to, p_.out.tensor.dtype, p_.out.stride(), reinterpret_cast<const float*>(&y), 1.0f, count);
        }
    }

private:
    void all_rows(int64_t output, int64_t lane, Vec<float> (*dots)[kLanes<float>]) const {
        const S* const weights = reinterpret_cast<const S*>(p_.weight.at(output, 0, 0));
        const int64_t whole = p_.x.size / kBlock * kBlock;
        S tail[kBlock] = {};
        std::copy(weights + whole, weights + p_.x.size, tail);
        for (int64_t row = 0; row < rows_; row += kRowsAtOnce) {
            switch (rows_ - row) {
                case 1: some_rows<1>(weights, whole, tail, row, lane, dots); break;
                case 2: some_rows<2>(weights, whole, tail, row, lane, dots); break;
                default: some_rows<kRowsAtOnce>(weights, whole, tail, row, lane, dots);
            }
        }
    }

    template <int N>
    void some_rows(const S* weights, int64_t whole, const S* tail, int64_t row, int64_t lane,
                   Vec<float> (*dots)[kLanes<float>]) const {
        const float* const x = x_ + row * pitch_;
        Vec<float> sums[N][kSums] = {};
        add_products(weights, whole, row == 0 ? nullptr : weights + p_.weight.strides[0], x, pitch_, sums);
        if (whole < p_.x.size) add_products<S>(tail, kBlock, nullptr, x + whole, pitch_, sums);
        for (int i = 0; i < N; ++i) dots[row + i][lane] = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
    }

    const Problem& p_;
    const int64_t rows_, pitch_;
    float* const x_;
};

template <class S>
void product_as(const Problem& p) {
    constexpr int64_t L = kLanes<float>;
    const int64_t out = p.out.size, row_bytes = p.x.size * int64_t(sizeof(S));
    const int threads = int(std::clamp<int64_t>(out * row_bytes / kBytesPerThread, 1, p.threads));
    const int64_t unit = std::max<int64_t>(kUnitBytes / row_bytes / L * L, L);
    Scratch scratch(Product<S>::need(p));
    const Product<S> product(p, scratch);
    parallel_units(threads, ceil_div(out, unit), [&](int, int64_t i) {
        for (int64_t first = i * unit; first < std::min((i + 1) * unit, out); first += L) product.run(first);
    });
}

void product(const Problem& p) {
    switch (p.weight.dtype) {
        case DType::float32: return product_as<float>(p);
        case DType::bfloat16: return product_as<BFloat16>(p);
        case DType::float16: return product_as<Half>(p);
        default: return;
    }
}

}  // namespace

extern const linear::Kernels linear_kernels;
const linear::Kernels linear_kernels{product};

}  // namespace onchip::ONCHIP_ISA

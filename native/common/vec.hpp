// Vectors of one register, in the compiler's portable vector extension, and the elementary functions on them.
//
// Every file that includes this is compiled once per instruction set, with ONCHIP_ISA naming the namespace it lives in
// and the compiler's own macros telling how wide a register is.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef ONCHIP_ISA
#error "compile with -DONCHIP_ISA=<namespace of this instruction set>"
#endif

namespace onchip::ONCHIP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// Width of a column panel of the matrix product: two registers.
template <class T>
constexpr int kPanel = 2 * kLanes<T>;

template <class T>
inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VecOf<T>::loose*>(p);
}
template <class T>
inline void store(T* p, Vec<T> x) {
    *reinterpret_cast<typename VecOf<T>::loose*>(p) = x;
}
template <class T>
inline Vec<T> broadcast(T x) {
    return x - Vec<T>{};
}

// Lanes of 64 bits, for integer arithmetic.
typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
constexpr int kWideLanes = kVectorBytes / 8;

inline Wide broadcast_wide(uint64_t x) { return x - Wide{}; }

// The products of the lanes' lower halves. One instruction, which the compiler does not find by itself.
inline Wide multiply_halves(Wide a, Wide b) {
#if defined(__AVX512F__)
    // Masked, with every lane: GCC 12 warns of its own header's unmasked form.
    return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

template <int... I, class V>
inline V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Index{I...});
#endif
}

template <int W, class T, class Combine, int... I>
inline void reduce_level(Vec<T>* x, const Combine& combine, std::integer_sequence<int, I...>) {
    constexpr int L = kLanes<T>;
    for (int i = 0; i < W; ++i)
        x[i] = combine(shuffle(x[i], x[i + W], std::integer_sequence<int, (I & W ? L + I : I)...>{}),
                       shuffle(x[i], x[i + W], std::integer_sequence<int, (I & W ? L : 0) + (I ^ W)...>{}));
    if constexpr (W > 1) reduce_level<W / 2, T>(x, combine, std::make_integer_sequence<int, L>{});
}

// Reduces each of kLanes vectors to one number: lane i of the result is vector i's. Halves the number of vectors at every
// step, so that a reduction costs about three instructions and not three times log(lanes).
template <class T, class Combine>
inline Vec<T> reduce_each(Vec<T>* x, const Combine& combine) {
    reduce_level<kLanes<T> / 2, T>(x, combine, std::make_integer_sequence<int, kLanes<T>>{});
    return x[0];
}

// The larger, or the smaller, of the bound and x, which keeps a NaN of x. One instruction, which the compiler does not
// always find by itself.
#if defined(__AVX512F__)
inline Vec<float> at_least(Vec<float> bound, Vec<float> x) { return _mm512_maskz_max_ps(0xffff, bound, x); }
inline Vec<float> at_most(Vec<float> bound, Vec<float> x) { return _mm512_maskz_min_ps(0xffff, bound, x); }
inline Vec<double> at_least(Vec<double> bound, Vec<double> x) { return _mm512_maskz_max_pd(0xff, bound, x); }
inline Vec<double> at_most(Vec<double> bound, Vec<double> x) { return _mm512_maskz_min_pd(0xff, bound, x); }
#elif defined(__AVX2__)
inline Vec<float> at_least(Vec<float> bound, Vec<float> x) { return _mm256_max_ps(bound, x); }
inline Vec<float> at_most(Vec<float> bound, Vec<float> x) { return _mm256_min_ps(bound, x); }
inline Vec<double> at_least(Vec<double> bound, Vec<double> x) { return _mm256_max_pd(bound, x); }
inline Vec<double> at_most(Vec<double> bound, Vec<double> x) { return _mm256_min_pd(bound, x); }
#elif defined(__SSE2__)
inline Vec<float> at_least(Vec<float> bound, Vec<float> x) { return _mm_max_ps(bound, x); }
inline Vec<float> at_most(Vec<float> bound, Vec<float> x) { return _mm_min_ps(bound, x); }
inline Vec<double> at_least(Vec<double> bound, Vec<double> x) { return _mm_max_pd(bound, x); }
inline Vec<double> at_most(Vec<double> bound, Vec<double> x) { return _mm_min_pd(bound, x); }
#else
template <class V>
inline V at_least(V bound, V x) {
    return bound > x ? bound : x;
}
template <class V>
inline V at_most(V bound, V x) {
    return bound < x ? bound : x;
}
#endif

template <int W, class T, int... I>
inline void transpose_level(Vec<T>* x, std::integer_sequence<int, I...> lanes) {
    constexpr int L = kLanes<T>;
    for (int i = 0; i < L; ++i) {
        if (i & W) continue;
        const Vec<T> a = x[i], b = x[i + W];
        x[i] = shuffle(a, b, std::integer_sequence<int, (I & W ? L + (I ^ W) : I)...>{});
        x[i + W] = shuffle(a, b, std::integer_sequence<int, (I & W ? L + I : I ^ W)...>{});
    }
    if constexpr (W > 1) transpose_level<W / 2, T>(x, lanes);
}

// Lane j of vector i and lane i of vector j change places, in kLanes vectors.
template <class T>
inline void transpose(Vec<T>* x) {
    transpose_level<kLanes<T> / 2, T>(x, std::make_integer_sequence<int, kLanes<T>>{});
}

#if defined(__AVX512F__)
// table[index], of which only the lowest bits that tell a register's lanes apart are looked at.
inline VecOf<float>::bits look_up(const int32_t* table, VecOf<float>::bits index) {
    return reinterpret_cast<VecOf<float>::bits>(
        _mm512_maskz_permutexvar_epi32(0xffff, reinterpret_cast<__m512i>(index), _mm512_loadu_si512(table)));
}
#elif defined(__AVX2__)
inline VecOf<float>::bits look_up(const int32_t* table, VecOf<float>::bits index) {
    return reinterpret_cast<VecOf<float>::bits>(_mm256_permutevar8x32_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)), reinterpret_cast<__m256i>(index)));
}
#endif

// Keeps `a` where `b` is NaN; the NaN then shows in the exponential.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
    return b > a ? b : a;
}

// 2^x for x ≤ 0. Exactly 0 below the exponent range and for -inf, NaN for NaN; relative error about one ulp.
// x = r + f with r an integer and |f| ≤ 1/2: a polynomial for 2^f, and r put straight into the exponent's bits. Adding
// 1.5·2^(mantissa bits) leaves r in the low bits of the sum, and so does more than that, r with the exponent's bias.
inline Vec<float> exp2(Vec<float> x) {
    using Bits = VecOf<float>::bits;
    const Vec<float> floor = broadcast(-127.0f);
    x = at_least(floor, x);
    constexpr float kShift = 12582912.0f + 127;
    const Vec<float> shifted = x + kShift;
    const Vec<float> f = x - (shifted - kShift);
    Vec<float> p = broadcast(1.5353362e-4f);
    p = p * f + 1.3398874e-3f;
    p = p * f + 9.6184370e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    p = p * f + 1.0f;
    const Bits exponent = reinterpret_cast<Bits>(shifted) << 23;  // the magic number's own bits shift out
    return p * reinterpret_cast<Vec<float>>(exponent);
}
inline Vec<double> exp2(Vec<double> x) {
    using Bits = VecOf<double>::bits;
    const Vec<double> floor = broadcast(-1023.0);
    x = at_least(floor, x);
    constexpr double kShift = 6755399441055744.0 + 1023;
    const Vec<double> shifted = x + kShift;
    const Vec<double> f = (x - (shifted - kShift)) * 0.693147180559945309417;
    Vec<double> p = broadcast(1.0 / 6227020800.0);  // e^f by its Taylor series: |f| ≤ 0.35, so 13 terms reach 1e-16
    p = p * f + 1.0 / 479001600.0;
    p = p * f + 1.0 / 39916800.0;
    p = p * f + 1.0 / 3628800.0;
    p = p * f + 1.0 / 362880.0;
    p = p * f + 1.0 / 40320.0;
    p = p * f + 1.0 / 5040.0;
    p = p * f + 1.0 / 720.0;
    p = p * f + 1.0 / 120.0;
    p = p * f + 1.0 / 24.0;
    p = p * f + 1.0 / 6.0;
    p = p * f + 0.5;
    p = p * f + 1.0;
    p = p * f + 1.0;
    const Bits exponent = reinterpret_cast<Bits>(shifted) << 52;
    return p * reinterpret_cast<Vec<double>>(exponent);
}

// tanh with a small relative error everywhere: x + x³·P(x²)/Q(x²) near zero, where 1 - 2/(e^2x + 1) would cancel.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
    const Vec<T> size = x < 0 ? -x : x;
    const Vec<T> e = exp2(size * T(-2.885390081777926814720));  // e^(-2|x|)
    const Vec<T> far = (1 - e) / (1 + e);
    const Vec<T> z = x * x;
    const Vec<T> p = (z * T(-9.64399179425052238628e-1) + T(-9.92877231001918586564e1)) * z + T(-1.61468768441708447952e3);
    const Vec<T> q = ((z + T(1.12811678491632931402e2)) * z + T(2.23548839060100448583e3)) * z + T(4.84406305325125486048e3);
    const Vec<T> near = x + x * z * (p / q);
    return size < T(0.625) ? near : (x < 0 ? -far : far);
}

}  // namespace onchip::ONCHIP_ISA

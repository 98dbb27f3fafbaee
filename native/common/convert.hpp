// Vectors and rows of any element type, rows of any stride too, to and from the type of the arithmetic (float or double).
#pragma once

#include <cmath>
#include <limits>

#include "tensor.hpp"
#include "vec.hpp"

namespace onchip::ONCHIP_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
// Shifts the half's exponent and mantissa into a float's place; the product mends the exponent's bias, subnormals too.
inline float widen(Half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const float value = bits_to_float(magnitude) * 0x1p112f;
    const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // inf and NaN keep their mantissa
    return bits_to_float(float_to_bits(value) | special | sign);
}

// Both round to nearest, ties to even, as PyTorch does.
inline void narrow(float& to, double x) { to = float(x); }
inline void narrow(double& to, double x) { to = x; }
inline void narrow(BFloat16& to, float x) {
    const uint32_t bits = float_to_bits(x);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(Half& to, float x) {
    const uint32_t sign = (float_to_bits(x) >> 16) & 0x8000;
    const uint32_t size = float_to_bits(x) & 0x7fffffff;
    uint32_t bits;
    if (size >= 0x47800000) {  // 65536 and beyond, inf, NaN
        bits = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (size < 0x38800000) {  // subnormal: let the float adder round at 2^-24
        bits = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000;
    } else {
        bits = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    }
    to.bits = uint16_t(bits | sign);
}

// A vector of T from as many elements of another type, and back.
template <class T, class S>
inline Vec<T> load_as(const S* p) {
    if constexpr (std::is_same_v<T, S>) {
        return load(p);
    } else {
        Vec<T> x;
        for (int i = 0; i < kLanes<T>; ++i) x[i] = T(widen(p[i]));
        return x;
    }
}
template <class T, class S>
inline void store_as(S* p, Vec<T> x) {
    if constexpr (std::is_same_v<T, S>) {
        store(p, x);
    } else {
        for (int i = 0; i < kLanes<T>; ++i) narrow(p[i], x[i]);
    }
}
// A few instructions, of which the compiler makes a number at a time.
#if defined(__AVX512F__)
template <>
inline Vec<float> load_as<float, BFloat16>(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Vec<float>>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16));
}
template <>
inline Vec<float> load_as<float, Half>(const Half* p) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__AVX2__)
template <>
inline Vec<float> load_as<float, BFloat16>(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
template <>
inline void store_as<float, BFloat16>(BFloat16* p, Vec<float> x) {
    typedef uint32_t Bits __attribute__((vector_size(32)));
    const Bits bits = reinterpret_cast<Bits>(x);
    const Bits rounded = x != x ? Bits{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const __m256i pairs = _mm256_packus_epi32(reinterpret_cast<__m256i>(rounded), __m256i{});
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000)));
}
template <>
inline Vec<float> load_as<float, Half>(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
inline void store_as<float, Half>(Half* p, Vec<float> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <class T, class S>
inline void read_as(T* to, const S* from, int64_t stride, int64_t n) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) to[i] = T(widen(from[i]));
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = T(widen(from[i * stride]));
    }
}

// to[0..n) = the n elements at `from`, `stride` elements apart.
template <class T>
void read_row(T* to, const char* from, DType dtype, int64_t stride, int64_t n) {
    switch (dtype) {
        case DType::float32: return read_as(to, reinterpret_cast<const float*>(from), stride, n);
        case DType::float64: return read_as(to, reinterpret_cast<const double*>(from), stride, n);
        case DType::bfloat16: return read_as(to, reinterpret_cast<const BFloat16*>(from), stride, n);
        case DType::float16: return read_as(to, reinterpret_cast<const Half*>(from), stride, n);
        case DType::boolean: return;
    }
}

template <class T, class S>
inline void write_as(S* to, int64_t stride, const T* from, T factor, int64_t n) {
    if (stride == 1) {
        for (int64_t i = 0; i < n; ++i) narrow(to[i], from[i] * factor);
    } else {
        for (int64_t i = 0; i < n; ++i) narrow(to[i * stride], from[i] * factor);
    }
}

// The n elements at `to`, `stride` elements apart, = from[0..n) · factor.
template <class T>
void write_row(char* to, DType dtype, int64_t stride, const T* from, T factor, int64_t n) {
    switch (dtype) {
        case DType::float32: return write_as(reinterpret_cast<float*>(to), stride, from, factor, n);
        case DType::float64: return write_as(reinterpret_cast<double*>(to), stride, from, factor, n);
        case DType::bfloat16: return write_as(reinterpret_cast<BFloat16*>(to), stride, from, factor, n);
        case DType::float16: return write_as(reinterpret_cast<Half*>(to), stride, from, factor, n);
        case DType::boolean: return;
    }
}

}  // namespace onchip::ONCHIP_ISA

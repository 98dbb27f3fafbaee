// Attention, forward, for few queries: K and V are read once, where they lie, and reading them is all the time there is.
//
// With a handful of rows a key head there is nothing to gain from packing. Scores are dot products with a key's own
// row, and P·V runs over values as they lie; 16-bit elements widen in registers. While one block of keys is worked on,
// the next is prefetched: rows of one head lie far apart, where the hardware's prefetchers do not follow. Keys are cut
// into spans of fixed length, so that one long sequence occupies every core and its bits depend on nothing else; the
// spans' partial results are joined at the end, in order.
#pragma once

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "softmax.hpp"

namespace onchip::ONCHIP_ISA {

constexpr int64_t kStreamRows = 16;   // at most this many rows a key head
constexpr int64_t kStreamSpan = 1024; // keys of a unit
constexpr int64_t kStreamBlock = 64;  // keys worked on at once: their K and V stay in the second-level cache
constexpr int kStreamTile = 4;        // rows in registers

inline bool streams(const Problem& p, const Sequence& s) {
    return s.q_length * p.group() <= kStreamRows && p.k.strides[3] == 1 && p.v.strides[3] == 1 &&
           p.head_dim * (p.double_precision() ? 2 : 1) % (kVectorBytes / 4) == 0 &&
           p.value_dim * (p.double_precision() ? 2 : 1) % (kVectorBytes / 2) == 0;
}

// A vector of T from as many elements of another type.
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
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
inline Vec<float> load_as<float, BFloat16>(const BFloat16* p) {
    typedef uint16_t Narrow __attribute__((vector_size(16), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(32)));
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide) << 16);
}
#endif

// Sums the lanes of `count` vectors.
template <class T, int COUNT>
inline void horizontal_sums(const Vec<T>* x, T* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float> && COUNT == 8) {
        typedef int32_t I __attribute__((vector_size(32)));
        const auto pair = [](Vec<float> a, Vec<float> b) {
            return __builtin_shuffle(a, b, I{0, 8, 1, 9, 4, 12, 5, 13}) + __builtin_shuffle(a, b, I{2, 10, 3, 11, 6, 14, 7, 15});
        };
        const auto join = [](Vec<float> a, Vec<float> b) {
            return __builtin_shuffle(a, b, I{0, 1, 8, 9, 4, 5, 12, 13}) + __builtin_shuffle(a, b, I{2, 3, 10, 11, 6, 7, 14, 15});
        };
        const Vec<float> low = join(pair(x[0], x[1]), pair(x[2], x[3]));
        const Vec<float> high = join(pair(x[4], x[5]), pair(x[6], x[7]));
        store(to, __builtin_shuffle(low, high, I{0, 1, 2, 3, 8, 9, 10, 11}) +
                      __builtin_shuffle(low, high, I{4, 5, 6, 7, 12, 13, 14, 15}));
        return;
    }
#endif
    for (int i = 0; i < COUNT; ++i) to[i] = horizontal_sum<T>(x[i]);
}

struct StreamUnit {
    int64_t sequence, kv_head;
    Range keys;
    int64_t partial;  // index of the unit's first row among all partial results
};

template <class T>
struct Partials {
    Running<T>* run;
    T* out;
    int64_t pitch;
};

template <class T, class S>
class StreamWorker {
public:
    StreamWorker(const Problem& p, Partials<T> partials, Scratch& scratch)
        : p_(p), partials_(partials), q_(scratch.take<T>(kStreamRows * p.head_dim)),
          s_(scratch.take<T>(kStreamRows * kStreamBlock)), buffer_(scratch.take<T>(kStreamBlock)) {}

    static size_t need(const Problem& p) {
        return Scratch::need<T>(kStreamRows * p.head_dim) + Scratch::need<T>(kStreamRows * kStreamBlock) +
               Scratch::need<T>(kStreamBlock);
    }

    void run(const StreamUnit& unit) {
        const Sequence& s = p_.sequences[unit.sequence];
        const Scores<T> scores(p_, s, unit.kv_head);
        const int64_t rows = s.q_length * p_.group();
        read_queries(p_, p_.q, s, unit.kv_head, 0, rows, p_.head_dim, T(query_factor(p_)), q_, p_.head_dim);
        T* const out = partials_.out + unit.partial * partials_.pitch;
        Running<T>* const run = partials_.run + unit.partial;
        std::fill(out, out + rows * partials_.pitch, T(0));
        std::fill(run, run + rows, Running<T>{});
        for (int64_t first = unit.keys.begin; first < unit.keys.end; first += kStreamBlock) {
            const int64_t count = std::min(kStreamBlock, unit.keys.end - first);
            const int64_t next = std::min(kStreamBlock, unit.keys.end - first - count);
            prefetch(p_.v, s, unit.kv_head, first, count, p_.value_dim);
            dots(rows, key_at(p_.k, s, unit.kv_head, first), count);
            prefetch(p_.k, s, unit.kv_head, first + count, next, p_.head_dim);
            for (int64_t r = 0; r < rows; ++r) {
                T* const x = s_ + r * kStreamBlock;
                const int64_t width = round_up(count, kLanes<T>);
                const Range seen{scores.begin(r) - first, std::min(scores.end(r) - first, count)};
                if (!scores.plain() || seen.begin > 0 || seen.end < width)
                    scores.logits(r, first, 0, width, seen, x, nullptr, buffer_);
                const T factor = absorb(run[r], x, 0, width);
                if (factor != T(1)) scale_row(out + r * partials_.pitch, p_.value_dim, factor);
            }
            values(rows, key_at(p_.v, s, unit.kv_head, first), count, out);
        }
    }

private:
    const S* key_at(const Tensor& x, const Sequence& s, int64_t kv_head, int64_t key) const {
        return reinterpret_cast<const S*>(key_row(x, s, kv_head, key));
    }

    void prefetch(const Tensor& x, const Sequence& s, int64_t kv_head, int64_t first, int64_t count, int64_t dim) const {
        for (int64_t key = first; key < first + count; ++key) {
            const char* const row = key_row(x, s, kv_head, key);
            for (int64_t at = 0; at < dim * int64_t(sizeof(S)); at += 64) __builtin_prefetch(row + at, 0, 2);
        }
    }

    // s[row][key] = q[row] · k[key], two keys and kStreamTile rows at a time.
    void dots(int64_t rows, const S* k, int64_t count) {
        const int64_t stride = p_.k.strides[1];
        for (int64_t key = 0; key < count; key += 2) {
            const S* const k0 = k + key * stride;
            const S* const k1 = key + 1 < count ? k0 + stride : k0;
            for (int64_t r = 0; r < rows; r += kStreamTile) {
                const T* q[kStreamTile];
                for (int i = 0; i < kStreamTile; ++i) q[i] = q_ + std::min(r + i, rows - 1) * p_.head_dim;
                Vec<T> sum[2 * kStreamTile] = {};
                for (int64_t d = 0; d < p_.head_dim; d += kLanes<T>) {
                    const Vec<T> x0 = load_as<T>(k0 + d), x1 = load_as<T>(k1 + d);
#pragma GCC unroll 4
                    for (int i = 0; i < kStreamTile; ++i) {
                        const Vec<T> y = load(q[i] + d);
                        sum[i] += x0 * y;
                        sum[kStreamTile + i] += x1 * y;
                    }
                }
                T sums[2 * kStreamTile];
                horizontal_sums<T, 2 * kStreamTile>(sum, sums);
                for (int i = 0; i < kStreamTile && r + i < rows; ++i) {
                    s_[(r + i) * kStreamBlock + key] = sums[i];
                    if (key + 1 < count) s_[(r + i) * kStreamBlock + key + 1] = sums[kStreamTile + i];
                }
            }
        }
    }

    // out[row] += Σ_key s[row][key] · v[key]
    void values(int64_t rows, const S* v, int64_t count, T* out) {
        for (int64_t r = 0; r < rows; r += kStreamTile) {
            switch (rows - r) {
                case 1: values_tile<1>(r, v, count, out); break;
                case 2: values_tile<2>(r, v, count, out); break;
                case 3: values_tile<3>(r, v, count, out); break;
                default: values_tile<4>(r, v, count, out);
            }
        }
    }

    template <int ROWS>
    void values_tile(int64_t r, const S* v, int64_t count, T* out) {
        constexpr int L = kLanes<T>;
        const int64_t stride = p_.v.strides[1];
        for (int64_t d = 0; d < p_.value_dim; d += 2 * L) {
            T* const to = out + r * partials_.pitch + d;
            Vec<T> sum[ROWS][2];
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                sum[i][0] = load(to + i * partials_.pitch);
                sum[i][1] = load(to + i * partials_.pitch + L);
            }
            for (int64_t key = 0; key < count; ++key) {
                const Vec<T> x0 = load_as<T>(v + key * stride + d), x1 = load_as<T>(v + key * stride + d + L);
#pragma GCC unroll 4
                for (int i = 0; i < ROWS; ++i) {
                    const Vec<T> p = broadcast(s_[(r + i) * kStreamBlock + key]);
                    sum[i][0] += p * x0;
                    sum[i][1] += p * x1;
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                store(to + i * partials_.pitch, sum[i][0]);
                store(to + i * partials_.pitch + L, sum[i][1]);
            }
        }
    }

    const Problem& p_;
    const Partials<T> partials_;
    T* const q_;
    T* const s_;
    T* const buffer_;
};

// Joins the partial results of one (sequence, key head), `spans` times `rows` of them, and closes its rows.
template <class T>
void join_spans(const Problem& p, const Sequence& s, int64_t kv_head, Partials<T> partials, int64_t first, int64_t spans) {
    const int64_t rows = s.q_length * p.group();
    for (int64_t row = 0; row < rows; ++row) {
        Running<T> whole = partials.run[first + row];
        T* const out = partials.out + (first + row) * partials.pitch;
        for (int64_t span = 1; span < spans; ++span) {
            const Running<T> part = partials.run[first + span * rows + row];
            const T* const x = partials.out + (first + span * rows + row) * partials.pitch;
            if (part.sum == T(0)) continue;
            const T top = std::max(whole.top, part.top);
            const T a = exp2(broadcast(whole.top - top))[0], b = exp2(broadcast(part.top - top))[0];
            for (int64_t d = 0; d < p.value_dim; ++d) out[d] = out[d] * a + x[d] * b;
            whole = {top, whole.sum * a + part.sum * b};
        }
        finish_row(p, s, kv_head, row, whole, out);
    }
}

}  // namespace onchip::ONCHIP_ISA

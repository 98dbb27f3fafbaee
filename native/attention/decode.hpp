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
#include "rows.hpp"
#include "softmax.hpp"

namespace onchip::ONCHIP_ISA {

constexpr int64_t kStreamRows = 16;    // at most this many rows a key head
constexpr int64_t kStreamSpan = 1024;  // keys of a unit
constexpr int64_t kStreamBlock = 64;   // keys worked on at once: their K and V stay in the second-level cache

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

struct StreamUnit {
    int64_t sequence, kv_head;
    Range keys;
    int64_t partial;  // index of the unit's first row among all partial results
};

template <class T>
struct Partials {  // per unit and row: maximum, sum, and Σ p·v
    T* top;
    T* sum;
    T* out;
    int64_t pitch;

    Partials(Scratch& scratch, int64_t count, int64_t dim)
        : top(scratch.take<T>(count)), sum(scratch.take<T>(count)), out(scratch.take<T>(count * width(dim))),
          pitch(width(dim)) {}
    static int64_t width(int64_t dim) { return round_up(dim, kPanel<T>); }
    static size_t need(int64_t count, int64_t dim) {
        return 2 * Scratch::need<T>(count) + Scratch::need<T>(count * width(dim));
    }
};

template <class T, class S>
class StreamWorker {
public:
    StreamWorker(const Problem& p, const Partials<T>& partials, Scratch& scratch)
        : p_(p), partials_(partials), q_(scratch.take<T>(kStreamRows * p.head_dim)),
          s_(scratch.take<T>(kStreamRows * kStreamBlock)), buffer_(scratch.take<T>(kStreamBlock)),
          factor_(scratch.take<T>(kStreamRows)), run_(scratch, kStreamRows) {}

    static size_t need(const Problem& p) {
        return Scratch::need<T>(kStreamRows * p.head_dim) + Scratch::need<T>(kStreamRows * kStreamBlock) +
               Scratch::need<T>(kStreamBlock) + Scratch::need<T>(kStreamRows) + Running<T>::need(kStreamRows);
    }

    void run(const StreamUnit& unit) {
        const Sequence& s = p_.sequences[unit.sequence];
        const Scores<T> scores(p_, s, unit.kv_head);
        const int64_t rows = s.q_length * p_.group();
        read_queries(p_, p_.q, s, unit.kv_head, 0, rows, p_.head_dim, T(query_factor(p_)), q_, p_.head_dim);
        T* const out = partials_.out + unit.partial * partials_.pitch;
        std::fill(out, out + rows * partials_.pitch, T(0));
        run_.clear(0, kStreamRows);
        for (int64_t first = unit.keys.begin; first < unit.keys.end; first += kStreamBlock) {
            const int64_t last = std::min(first + kStreamBlock, unit.keys.end);
            prefetch_keys(p_.v, s, unit.kv_head, first, last, p_.value_dim);
            dots(rows, key_at(p_.k, s, unit.kv_head, first), last - first);
            prefetch_keys(p_.k, s, unit.kv_head, last, std::min(last + kStreamBlock, unit.keys.end), p_.head_dim);
            softmax(scores, rows, first, last - first);
            values(rows, key_at(p_.v, s, unit.kv_head, first), last - first, out);
        }
        std::copy(run_.top, run_.top + rows, partials_.top + unit.partial);
        std::copy(run_.sum, run_.sum + rows, partials_.sum + unit.partial);
    }

private:
    const S* key_at(const Tensor& x, const Sequence& s, int64_t kv_head, int64_t key) const {
        return reinterpret_cast<const S*>(key_row(x, s, kv_head, key));
    }

    // s[row][key] = q[row] · k[key], as many keys and rows at a time as fill a vector with results.
    void dots(int64_t rows, const S* k, int64_t count) {
        constexpr int ROWS = std::min(4, kLanes<T>), KEYS = kLanes<T> / ROWS;
        const int64_t stride = p_.k.strides[1];
        for (int64_t key = 0; key < count; key += KEYS) {
            const S* line[KEYS];
            for (int j = 0; j < KEYS; ++j) line[j] = k + std::min(key + j, count - 1) * stride;
            for (int64_t r = 0; r < rows; r += ROWS) {
                const T* q[ROWS];
                for (int i = 0; i < ROWS; ++i) q[i] = q_ + std::min(r + i, rows - 1) * p_.head_dim;
                Vec<T> sums[KEYS * ROWS] = {};
                for (int64_t d = 0; d < p_.head_dim; d += kLanes<T>) {
#pragma GCC unroll 4
                    for (int j = 0; j < KEYS; ++j) {
                        const Vec<T> x = load_as<T>(line[j] + d);
#pragma GCC unroll 4
                        for (int i = 0; i < ROWS; ++i) sums[j * ROWS + i] += x * load(q[i] + d);
                    }
                }
                const Vec<T> sum = reduce_each<T>(sums, [](Vec<T> a, Vec<T> b) { return a + b; });
                for (int j = 0; j < KEYS; ++j)
                    for (int i = 0; i < ROWS; ++i) s_[std::min(r + i, kStreamRows - 1) * kStreamBlock + key + j] = sum[j * ROWS + i];
            }
        }
    }

    void softmax(const Scores<T>& scores, int64_t rows, int64_t first, int64_t count) {
        const int64_t width = round_up(count, kLanes<T>);
        for (int64_t r = 0; r < rows; ++r) {
            const Range seen{scores.begin(r) - first, std::min(scores.end(r) - first, count)};
            if (!scores.plain() || seen.begin > 0 || seen.end < width)
                scores.logits(r, first, 0, width, seen, s_ + r * kStreamBlock, nullptr, buffer_);
        }
        for (int64_t r = 0; r < rows; r += kLanes<T>)
            absorb(run_.top + r, run_.sum + r, factor_ + r, s_ + r * kStreamBlock, kStreamBlock, 0, width);
    }

    // out[row] = factor[row] · out[row] + Σ_key s[row][key] · v[key]
    void values(int64_t rows, const S* v, int64_t count, T* out) {
        for (int64_t r = 0; r < rows; r += 4) {
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
                sum[i][0] = load(to + i * partials_.pitch) * factor_[r + i];
                sum[i][1] = load(to + i * partials_.pitch + L) * factor_[r + i];
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
    const Partials<T>& partials_;
    T* const q_;
    T* const s_;
    T* const buffer_;
    T* const factor_;
    Running<T> run_;
};

// Joins the partial results of one (sequence, key head), `spans` times `rows` of them, and closes its rows.
template <class T>
void join_spans(const Problem& p, const Sequence& s, int64_t kv_head, const Partials<T>& partials, int64_t first,
                int64_t spans) {
    const int64_t rows = s.q_length * p.group();
    for (int64_t at = first; at < first + rows; ++at) {
        T top = partials.top[at], sum = partials.sum[at];
        T* const out = partials.out + at * partials.pitch;
        for (int64_t part = at + rows; part < first + spans * rows; part += rows) {
            if (partials.sum[part] == T(0)) continue;
            const T* const x = partials.out + part * partials.pitch;
            const T both = std::max(top, partials.top[part]);
            const T a = exp2(broadcast(top - both))[0], b = exp2(broadcast(partials.top[part] - both))[0];
            for (int64_t d = 0; d < p.value_dim; ++d) out[d] = out[d] * a + x[d] * b;
            sum = sum * a + partials.sum[part] * b;
            top = both;
        }
        finish_row(p, s, kv_head, at - first, top, sum, out);
    }
}

}  // namespace onchip::ONCHIP_ISA

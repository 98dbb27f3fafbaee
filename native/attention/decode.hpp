// Attention, forward, for few queries: K and V are read once, where they lie, and reading them is all the time there is.
//
// With a handful of rows a key head there is nothing to gain from packing. Scores are dot products with a key's own
// row, P·V runs over values as they lie, and 16-bit elements widen in registers. What counts is to read in the order of
// addresses: only then do the hardware's prefetchers run, and a core without them waits for its few outstanding misses
// (measured: 25 GB/s in order, 7 out of order, software prefetch or not). So a unit of work is a span of keys with all
// its heads where a key's heads are neighbours in memory, with one head where a head's keys are. Spans have a fixed
// length, so that one long sequence occupies every core and its bits depend on nothing else; their partial results are
// joined at the end, in order.
//
// Where it stands, 32 heads on 8 key heads, D 128, Tk 32768: one core reads 9 GB/s in float32 and 7 in bfloat16, two
// cores half of what they can read. It is the arithmetic: four rows a key cost 0.22 ns an element also in cache, which
// is 18 and 9 GB/s. With one row a key (8 heads on 8) one core reads 15 GB/s. Pages of 16 keys in random order are read
// at 0.90 to 0.99 of the rate of keys in one piece, single keys at 0.87.
#pragma once

#include "common/gemm.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "dropout.hpp"
#include "rows.hpp"
#include "softmax.hpp"

namespace onchip::ONCHIP_ISA {

constexpr int64_t kStreamRows = 16;           // at most this many rows a key head
constexpr int64_t kStreamSpan = 256;          // keys of a unit
constexpr int64_t kStreamBytes = 256 * 1024;  // of K and V between two visits to the softmax
constexpr int64_t kStreamAhead = 4096;        // bytes by which reading is announced

// Heads that a unit takes together.
inline int64_t stream_heads(const Problem& p) { return p.k.strides[2] < p.k.strides[1] ? p.kv_heads : 1; }

inline int64_t stream_keys(const Problem& p) {
    const int64_t key = stream_heads(p) * (p.head_dim + p.value_dim) * item_size(p.k.dtype);
    return std::clamp<int64_t>(kStreamBytes / key / 16 * 16, 16, 64);
}

inline bool streams(const Problem& p, const Sequence& s) {
    return !p.mask && !p.batch_invariant && s.q_length * p.group <= kStreamRows && p.k.strides[3] == 1 && p.v.strides[3] == 1 &&
           p.head_dim * (p.double_precision() ? 2 : 1) % (kVectorBytes / 4) == 0 &&
           p.value_dim * (p.double_precision() ? 2 : 1) % (kVectorBytes / 2) == 0;
}

struct StreamUnit {
    int64_t sequence;
    Range heads, keys;
    int64_t partial;  // index of the unit's first row among all partial results; rows are ordered by head
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

// Collects vectors whose lanes are to be summed, and sums them by the register full.
template <class T>
class LaneSums {
public:
    void push(Vec<T> x, T* to) {
        x_[count_] = x;
        to_[count_] = to;
        if (++count_ == kLanes<T>) flush();
    }
    void flush() {
        const Vec<T> sums = reduce_each<T>(x_, [](Vec<T> a, Vec<T> b) { return a + b; });
        for (int i = 0; i < count_; ++i) *to_[i] = sums[i];
        count_ = 0;
    }

private:
    Vec<T> x_[kLanes<T>] = {};
    T* to_[kLanes<T>];
    int count_ = 0;
};

template <class T, class S>
class StreamWorker {
public:
    StreamWorker(const Problem& p, const Partials<T>& partials, Scratch& scratch)
        : p_(p), partials_(partials), keys_(stream_keys(p)), 
          ahead_(std::max<int64_t>(2, kStreamAhead / (stream_heads(p) * p.head_dim * int64_t(sizeof(S))))), q_(scratch.take<T>(most_rows(p) * p.head_dim)),
          s_(scratch.take<T>(most_rows(p) * keys_)), buffer_(scratch.take<T>(keys_)),
          factor_(scratch.take<T>(most_rows(p))), run_(scratch, most_rows(p)) {}

    static size_t need(const Problem& p) {
        const int64_t rows = most_rows(p), keys = stream_keys(p);
        return Scratch::need<T>(rows * p.head_dim) + Scratch::need<T>(rows * keys) + Scratch::need<T>(keys) +
               Scratch::need<T>(rows) + Running<T>::need(rows);
    }

    void run(const StreamUnit& unit) {
        const Sequence& s = p_.sequences[unit.sequence];
        rows_ = s.q_length * p_.group;
        const int64_t all = (unit.heads.end - unit.heads.begin) * rows_;
        for (int64_t h = unit.heads.begin; h < unit.heads.end; ++h)
            read_queries(p_, p_.q, s, h, 0, rows_, p_.head_dim, T(query_factor(p_)),
                         q_ + (h - unit.heads.begin) * rows_ * p_.head_dim, p_.head_dim);
        T* const out = partials_.out + unit.partial * partials_.pitch;
        std::fill(out, out + all * partials_.pitch, T(0));
        run_.clear(0, round_up(all, kLanes<T>));
        for (int64_t first = unit.keys.begin; first < unit.keys.end; first += keys_) {
            const Range keys{first, std::min(first + keys_, unit.keys.end)};
            dots(s, unit.heads, keys);
            softmax(s, unit.heads, keys);
            if (p_.dropout > 0) drop(s, unit.heads, keys);
            for (int64_t row = 0; row < all; ++row) {
                if (factor_[row] == T(1)) continue;
                for (int64_t d = 0; d < p_.value_dim; ++d) out[row * partials_.pitch + d] *= factor_[row];
            }
            values(s, unit.heads, keys, out);
        }
        std::copy_n(run_.top, all, partials_.top + unit.partial);
        std::copy_n(run_.sum, all, partials_.sum + unit.partial);
    }

private:
    static int64_t most_rows(const Problem& p) { return round_up(stream_heads(p) * kStreamRows, kLanes<T>); }

    // s[row][key] = q[row] · k[key]
    void dots(const Sequence& s, Range heads, Range keys) {
        LaneSums<T> sums;
        KeyWalk here(p_, p_.k, s, heads.begin, keys.begin), later = ahead(p_.k, s, heads, keys);
        for (int64_t key = keys.begin; key < keys.end; ++key, here.next(), later.next()) {
            T* to = s_ + (key - keys.begin);
            const T* q = q_;
            for (int64_t h = heads.begin; h < heads.end; ++h) {
                const int64_t head = (h - heads.begin) * p_.k.strides[2];
                const S* const k = reinterpret_cast<const S*>(here.row()) + head;
                announce(reinterpret_cast<const S*>(later.row()) + head, p_.head_dim);
                for (int64_t r = 0; r < rows_; r += 4) {
                    const int count = int(std::min<int64_t>(4, rows_ - r));
                    with_rows(count, [&](auto rows) { dot<decltype(rows)::value>(q, k, to, sums); });
                    q += count * p_.head_dim;
                    to += count * keys_;
                }
            }
        }
        sums.flush();
    }

    template <class Body>
    static void with_rows(int count, const Body& body) {
        switch (count) {
            case 1: return body(std::integral_constant<int, 1>{});
            case 2: return body(std::integral_constant<int, 2>{});
            case 3: return body(std::integral_constant<int, 3>{});
            default: return body(std::integral_constant<int, 4>{});
        }
    }

    template <int ROWS>
    void dot(const T* q, const S* k, T* to, LaneSums<T>& sums) {
        constexpr int L = kLanes<T>;
        Vec<T> even[ROWS] = {}, odd[ROWS] = {};  // two chains a row hide the latency of one
        const int64_t dim = p_.head_dim;
        int64_t d = 0;
        for (; d + 2 * L <= dim; d += 2 * L) {
            const Vec<T> x0 = load_as<T>(k + d), x1 = load_as<T>(k + d + L);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                even[i] += x0 * load(q + i * dim + d);
                odd[i] += x1 * load(q + i * dim + d + L);
            }
        }
        if (d < dim) {
            const Vec<T> x = load_as<T>(k + d);
            for (int i = 0; i < ROWS; ++i) even[i] += x * load(q + i * dim + d);
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) sums.push(even[i] + odd[i], to + i * keys_);
    }

    void softmax(const Sequence& s, Range heads, Range keys) {
        const int64_t count = keys.end - keys.begin, width = round_up(count, kLanes<T>);
        const int64_t all = (heads.end - heads.begin) * rows_;
        for (int64_t row = 0; row < all; ++row) {
            const Scores<T> scores(p_, s, heads.begin + row / rows_);
            const int64_t r = row % rows_;
            const Range seen{scores.begin(r) - keys.begin, std::min(scores.end(r) - keys.begin, count)};
            if (!scores.plain() || seen.begin > 0 || seen.end < width)
                scores.logits(r, keys.begin, 0, width, seen, s_ + row * keys_, nullptr, buffer_);
        }
        for (int64_t row = 0; row < all; row += kLanes<T>)
            absorb(run_.top + row, run_.sum + row, factor_ + row, s_ + row * keys_, keys_, 0, width);
    }

    void drop(const Sequence& s, Range heads, Range keys) {
        Dropout<T> dropout(p_, s);
        for (int64_t row = 0; row < (heads.end - heads.begin) * rows_; ++row) {
            const int64_t r = row % rows_, head = (heads.begin + row / rows_) * p_.group + p_.member_of(r);
            dropout.apply(p_.query_of(r), head, keys.begin, keys.end - keys.begin, s_ + row * keys_);
        }
    }

    // out[row] += Σ_key s[row][key] · v[key], two keys at a time, as every sum is stored each time.
    void values(const Sequence& s, Range heads, Range keys, T* out) {
        KeyWalk here(p_, p_.v, s, heads.begin, keys.begin), later = ahead(p_.v, s, heads, keys);
        for (int64_t key = keys.begin; key < keys.end; key += 2) {
            const bool pair = key + 1 < keys.end;
            const char* const rows[] = {next_row(here), pair ? next_row(here) : nullptr};
            const char* const announced[] = {next_row(later), next_row(later)};
            const T* weight = s_ + (key - keys.begin);
            T* to = out;
            for (int64_t h = heads.begin; h < heads.end; ++h) {
                const int64_t head = (h - heads.begin) * p_.v.strides[2];
                const S* const v0 = reinterpret_cast<const S*>(rows[0]) + head;
                const S* const v1 = pair ? reinterpret_cast<const S*>(rows[1]) + head : v0;
                announce(reinterpret_cast<const S*>(announced[0]) + head, p_.value_dim);
                announce(reinterpret_cast<const S*>(announced[1]) + head, p_.value_dim);
                for (int64_t r = 0; r < rows_; r += 4) {
                    const int count = int(std::min<int64_t>(4, rows_ - r));
                    with_rows(count, [&](auto rows) { add_values<decltype(rows)::value>(weight, pair, v0, v1, to); });
                    weight += count * keys_;
                    to += count * partials_.pitch;
                }
            }
        }
    }

    template <int ROWS>
    void add_values(const T* weight, bool pair, const S* v0, const S* v1, T* to) {
        constexpr int L = kLanes<T>;
        const int64_t pitch = partials_.pitch, dim = p_.value_dim;
        Vec<T> w0[ROWS], w1[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            w0[i] = broadcast(weight[i * keys_]);
            w1[i] = pair ? broadcast(weight[i * keys_ + 1]) : Vec<T>{};
        }
        for (int64_t d = 0; d < dim; d += L) {
            const Vec<T> x0 = load_as<T>(v0 + d), x1 = load_as<T>(v1 + d);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) store(to + i * pitch + d, load(to + i * pitch + d) + w0[i] * x0 + w1[i] * x1);
        }
    }

    // Some keys further on, where there are any.
    KeyWalk ahead(const Tensor& x, const Sequence& s, Range heads, Range keys) const {
        return KeyWalk(p_, x, s, heads.begin, std::min(keys.begin + ahead_, s.k_length - 1));
    }
    static const char* next_row(KeyWalk& walk) {
        const char* const row = walk.row();
        walk.next();
        return row;
    }
    static void announce(const S* row, int64_t dim) {
        const char* const at = reinterpret_cast<const char*>(row);
        for (int64_t byte = 0; byte < dim * int64_t(sizeof(S)); byte += 64) __builtin_prefetch(at + byte);
    }

    const Problem& p_;
    const Partials<T>& partials_;
    const int64_t keys_, ahead_;
    int64_t rows_ = 0;
    T* const q_;
    T* const s_;
    T* const buffer_;
    T* const factor_;
    Running<T> run_;
};

// Joins the partial results of one (sequence, heads), `rows` rows in each of `spans` spans, and closes the rows.
template <class T>
void join_spans(const Problem& p, const Sequence& s, int64_t first_head, const Partials<T>& partials, int64_t first,
                int64_t rows, int64_t spans) {
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
        const int64_t per_head = s.q_length * p.group;
        finish_row(p, s, first_head + (at - first) / per_head, (at - first) % per_head, top, sum, out);
    }
}

}  // namespace onchip::ONCHIP_ISA

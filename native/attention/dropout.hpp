// Dropout: which probabilities are dropped, as Philox 4x32-10 (Salmon et al., SC 2011) says from where they stand.
//
// The counter is (key / 4, query, head, sequence), the generator's key is the seed, and key j has word j % 4 of the four:
// a probability is dropped where its word is below p · 2^32. So tiles, threads and packing change nothing, and the
// backward pass makes the mask again instead of reading it.
//
// Where it stands, on the core described in forward.hpp: 0.65 ns an entry with AVX2, 92 instructions for 16, in a loop
// made for the purpose and not kept; two exponentials. 15 of them are the products that ten rounds come down to once
// what a row has no part in is shared. Attention at D 64, forward and backward, takes 8 to 14 % longer with it for T of
// 1024 to 4096, on a machine with other work.
#pragma once

#include "common/vec.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Problem;
using attention::Sequence;

constexpr uint64_t kPhilox0 = 0xD2511F53, kPhilox1 = 0xCD9E8D57;  // the words multiply by these

// The words of the key that the seed gives a round, in every lane.
struct PhiloxKey {
    Wide word0, word1;

    PhiloxKey() = default;
    PhiloxKey(uint64_t seed, int round)
        : word0(broadcast_wide(uint32_t(uint32_t(seed) + round * 0x9E3779B9u))),
          word1(broadcast_wide(uint32_t(uint32_t(seed >> 32) + round * 0xBB67AE85u))) {}
};

// The last rounds on as many counters as there are lanes. Words are the lower halves of lanes; the upper halves hold
// anything.
template <int FROM>
inline void philox(Wide (&c)[4], const PhiloxKey (&keys)[10]) {
#pragma GCC unroll 10
    for (int round = FROM; round < 10; ++round) {
        const Wide a = multiply_halves(c[0], broadcast_wide(kPhilox0));
        const Wide b = multiply_halves(c[2], broadcast_wide(kPhilox1));
        c[0] = (b >> 32) ^ c[1] ^ keys[round].word0;
        c[1] = b;
        c[2] = (a >> 32) ^ c[3] ^ keys[round].word1;
        c[3] = a;
    }
}

template <int... I>
inline Wide ascending(std::integer_sequence<int, I...>) {
    return Wide{I...};
}

template <class T>
class Dropout {
public:
    Dropout(const Problem& p, const Sequence& s)
        : sequence_(uint32_t(s.index)), threshold_(uint32_t(p.dropout * 0x1p32)),
          scale_(p.dropout > 0 ? T(1 / (1 - p.dropout)) : T(0)) {
        if (*this)
            for (int round = 0; round < 10; ++round) keys_[round] = PhiloxKey(p.seed, round);
    }

    explicit operator bool() const { return scale_ != T(0); }

    // What the row's probabilities are multiplied by, for `count` keys from `first`, a multiple of 4: 0 or 1 / (1 - p).
    const T* factors(int64_t query, int64_t head, int64_t first, int64_t count) {
        if (head != head_ || first != first_ || count > count_) begin(head, first, count);
        const uint64_t of_head = kPhilox1 * uint32_t(head) >> 32;
        const uint64_t row = kPhilox0 * uint32_t(of_head ^ uint64_t(query) ^ keys_[0].word0[0]);
        const Wide high = broadcast_wide(row >> 32) ^ keys_[1].word1, low = broadcast_wide(row) ^ keys_[2].word1;
        for (int64_t c = 0; c < count; c += kChunk) {
            const Columns& known = columns_[c / kChunk];
            const Wide b = multiply_halves(known.first ^ high, broadcast_wide(kPhilox1));
            Wide words[4] = {(b >> 32) ^ known.second, b, known.third_high ^ low, known.third};
            philox<3>(words, keys_);
            keep(words, factors_ + c);
        }
        return factors_;
    }

    // x[0..count) of the row, multiplied by its factors.
    void apply(int64_t query, int64_t head, int64_t first, int64_t count, T* x) {
        const T* const by = factors(query, head, first, count);
        for (int64_t c = 0; c < count; ++c) x[c] *= by[c];
    }

private:
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
    using Bits = typename VecOf<T>::bits;
    static constexpr int kChunk = 4 * kWideLanes;  // keys
    static constexpr int64_t kMostKeys = 128;     // of a tile

    // The first three rounds' products that a row has no part in: half of what those rounds cost.
    struct Columns {
        Wide first, second, third, third_high;
    };

    void begin(int64_t head, int64_t first, int64_t count) {
        head_ = head;
        first_ = first;
        count_ = count;
        const Wide of_head = broadcast_wide(kPhilox1 * uint32_t(head)), sequence = broadcast_wide(sequence_);
        for (int64_t c = 0; c < count; c += kChunk) {
            const Wide fours = broadcast_wide((first + c) / 4) + ascending(std::make_integer_sequence<int, kWideLanes>{});
            const Wide a = multiply_halves(fours, broadcast_wide(kPhilox0));
            const Wide b = multiply_halves((a >> 32) ^ sequence ^ keys_[0].word1, broadcast_wide(kPhilox1));
            const Wide third = multiply_halves((b >> 32) ^ of_head ^ keys_[1].word0, broadcast_wide(kPhilox0));
            columns_[c / kChunk] = {a, b ^ keys_[2].word0, third, third >> 32};
        }
    }

    // A counter's words become neighbours, as its keys are.
    void keep(const Wide (&words)[4], T* to) const {
        const Wide low = broadcast_wide(0xffffffff);
        const Wide even = (words[0] & low) | (words[1] << 32), odd = (words[2] & low) | (words[3] << 32);
        const auto lanes = std::make_integer_sequence<int, kWideLanes>{};
        write(reinterpret_cast<Words>(zip<0>(even, odd, lanes)), to);
        write(reinterpret_cast<Words>(zip<1>(even, odd, lanes)), to + kChunk / 2);
    }

    void write(Words words, T* to) const {
        const Mask kept = words >= threshold_;
        if constexpr (sizeof(T) == 4) {
            write(kept, to);
        } else {
            const auto lanes = std::make_integer_sequence<int, 2 * kWideLanes>{};
            write(twice<0>(kept, lanes), to);
            write(twice<1>(kept, lanes), to + kLanes<T>);
        }
    }

    void write(Mask kept, T* to) const {
        store(to, reinterpret_cast<Vec<T>>(reinterpret_cast<Bits>(kept) & reinterpret_cast<Bits>(broadcast(scale_))));
    }

    // Half of a's lanes and of b's, in turns.
    template <int HALF, int... I>
    static Wide zip(Wide a, Wide b, std::integer_sequence<int, I...>) {
        return shuffle(a, b, std::integer_sequence<int, (HALF * kWideLanes / 2 + I / 2 + I % 2 * kWideLanes)...>{});
    }
    // Half of the lanes, each twice: of 32 bits to 64.
    template <int HALF, int... I>
    static Mask twice(Mask x, std::integer_sequence<int, I...>) {
        return shuffle(x, x, std::integer_sequence<int, (HALF * kWideLanes + I / 2)...>{});
    }

    const uint32_t sequence_, threshold_;
    const T scale_;
    PhiloxKey keys_[10];
    int64_t head_ = -1, first_ = -1, count_ = 0;  // what columns_ are of
    Columns columns_[kMostKeys / kChunk];
    alignas(64) T factors_[kMostKeys + kChunk];
};

}  // namespace onchip::ONCHIP_ISA

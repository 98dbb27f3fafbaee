// Dropout: which probabilities are dropped, as Philox 4x32-10 (Salmon et al., SC 2011) says from where they stand.
//
// The counter is (key / 4, query, head, sequence), the generator's key is the seed, and key j has word j % 4 of the four:
// a probability is dropped where its word is below p · 2^32. So tiles, threads and packing change nothing, and the
// backward pass makes the mask again instead of reading it.
#pragma once

#include "common/vec.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Problem;
using attention::Sequence;

// Ten rounds on as many counters as there are lanes. Words are the lower halves of lanes; the upper halves hold anything.
inline void philox(Wide (&c)[4], uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
        const Wide a = multiply_halves(c[0], broadcast_wide(0xD2511F53));
        const Wide b = multiply_halves(c[2], broadcast_wide(0xCD9E8D57));
        c[0] = (b >> 32) ^ c[1] ^ broadcast_wide(key0);
        c[1] = b;
        c[2] = (a >> 32) ^ c[3] ^ broadcast_wide(key1);
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
        : seed_(p.seed), sequence_(uint32_t(s.index)), threshold_(uint32_t(p.dropout * 0x1p32)),
          scale_(p.dropout > 0 ? T(1 / (1 - p.dropout)) : T(0)) {}

    explicit operator bool() const { return scale_ != T(0); }

    // What the row's probabilities are multiplied by, for `count` keys from `first`, a multiple of 4: 0 or 1 / (1 - p).
    const T* factors(int64_t query, int64_t head, int64_t first, int64_t count) {
        for (int64_t c = 0; c < count; c += kChunk) {
            Wide words[4] = {broadcast_wide((first + c) / 4) + ascending(std::make_integer_sequence<int, kWideLanes>{}), broadcast_wide(query), broadcast_wide(head),
                             broadcast_wide(sequence_)};
            philox(words, seed_);
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

    const uint64_t seed_;
    const uint32_t sequence_, threshold_;
    const T scale_;
    alignas(64) T factors_[kMostKeys + kChunk];
};

}  // namespace onchip::ONCHIP_ISA

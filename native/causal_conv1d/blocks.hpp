// How a call is cut into units of work: pieces of sequences, together of about the same length, times blocks of channels.
//
// The cut depends on the shapes alone: sums over time have the same order whatever the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

// Rows [begin, end) of a sequence.
struct Piece {
    const causal_conv1d::Sequence* sequence;
    int64_t begin, end;

    bool first() const { return begin == 0; }
};

// Groups of pieces, each of at most `rows` rows; an empty sequence is an empty piece.
inline std::vector<std::vector<Piece>> grouped(const std::vector<causal_conv1d::Sequence>& sequences, int64_t rows) {
    std::vector<std::vector<Piece>> groups;
    int64_t space = 0;
    for (const causal_conv1d::Sequence& sequence : sequences) {
        int64_t begin = 0;
        do {
            if (space == 0) {
                groups.emplace_back();
                space = rows;
            }
            const int64_t end = std::min(sequence.length, begin + space);
            groups.back().push_back({&sequence, begin, end});
            space -= std::max<int64_t>(end - begin, 1);
            begin = end;
        } while (begin < sequence.length);
    }
    return groups;
}

}  // namespace onchip::ONCHIP_ISA

// How many threads a call is worth, and a worker with its own tiles for each.
#pragma once

#include <vector>

#include "common/scratch.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Problem;
using attention::Sequence;

constexpr double kOperationsPerThread = 5e5;  // a thread is woken in about the time that this many operations take

inline int useful_threads(const Problem& p, double operations) {
    return int(std::clamp(operations / kOperationsPerThread, 1.0, double(p.threads)));
}

inline double count_operations(const Problem& p, const Sequence& s) {
    return 2.0 * p.heads * s.q_length * s.k_length * (p.head_dim + p.value_dim);
}

template <class Worker, class... Extra>
std::vector<Worker> make_workers(int threads, Scratch& scratch, const Problem& p, const Extra&... extra) {
    std::vector<Worker> workers;
    workers.reserve(threads);
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, extra..., scratch);
    return workers;
}

}  // namespace onchip::ONCHIP_ISA

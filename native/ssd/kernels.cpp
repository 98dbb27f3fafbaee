// The kernels of ssd of one instruction set: dividing a problem into units, and running them.
//
// The floor is the products' arithmetic: with chunks of Q steps 2·B·T·H·(2·P·N + Q/2·P) operations forward, and C Bᵀ once
// for the heads of a unit.
#include <vector>

#include "backward.hpp"
#include "common/parallel.hpp"
#include "step.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

template <class T>
void forward_as(const Problem& p) {
    const int threads = worth_threads(p, p.operations());
    const int64_t heads = p.heads * int64_t(p.sequences.size());
    const auto units = divide_heads(p, std::clamp<int64_t>(heads / threads, 1, kHeadsAtOnce));
    Scratch scratch(threads * ForwardHeads<T>::need(p));
    std::vector<ForwardHeads<T>> workers;
    workers.reserve(threads);
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, scratch);
    parallel_units(threads, units.size(), [&](int thread, int64_t unit) { workers[thread].run(units[unit]); });
}

// The gradients of B and C: rows [first row of the sequence] summed over the units of each group, in their order.
template <class T>
void write_sums(const Problem& p, const Gradients& g, const std::vector<HeadUnit>& units, const std::vector<GroupSums<T>>& sums) {
    const int64_t row = pitch<T>(p.state_dim), per_group = std::max<int64_t>(1, int64_t(units.size()) /
        std::max<int64_t>(1, int64_t(p.sequences.size()) * (p.heads / p.group)));
    for (size_t i = 0; i < units.size(); i += per_group) {
        const Sequence& s = p.sequences[units[i].sequence];
        for (int64_t t = 0; t < s.length; ++t) {
            for (const auto& [to, from] : {std::pair{&g.B, &GroupSums<T>::b}, std::pair{&g.C, &GroupSums<T>::c}}) {
                T* const total = sums[i].*from + t * row;
                for (int64_t u = 1; u < per_group; ++u)
                    for (int64_t n = 0; n < p.state_dim; ++n) total[n] += (sums[i + u].*from)[t * row + n];
                write_row(to->at(s.batch, s.start + t, units[i].first / p.group), to->dtype, to->strides[3], total, T(1), p.state_dim);
            }
        }
    }
}

template <class T>
void backward_as(const Problem& p, const Gradients& g) {
    const int threads = worth_threads(p, 2.5 * p.operations());
    const auto units = divide_heads(p, kHeadsAtOnce);
    const int64_t row = pitch<T>(p.state_dim);
    size_t bytes = threads * BackwardHeads<T>::need(p);
    for (const HeadUnit& unit : units) bytes += 2 * Scratch::need<T>(p.sequences[unit.sequence].length * row);
    Scratch scratch(bytes);
    std::vector<GroupSums<T>> sums;
    for (const HeadUnit& unit : units) {
        const int64_t size = p.sequences[unit.sequence].length * row;
        T* const b = scratch.take<T>(size);
        sums.push_back({b, scratch.take<T>(size)});
    }
    std::vector<BackwardHeads<T>> workers;
    workers.reserve(threads);
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, g, scratch);
    parallel_units(threads, units.size(), [&](int thread, int64_t unit) { workers[thread].run(units[unit], sums[unit]); });
    write_sums(p, g, units, sums);
}

template <class T>
void step_as(const Problem& p) {
    const double elements = double(p.sequences.size()) * double(p.heads * p.dim * p.state_dim);
    const int threads = worth_threads(p, 4 * elements);
    Scratch scratch(threads * StateStep<T>::need(p));
    std::vector<StateStep<T>> workers;
    workers.reserve(threads);
    for (int t = 0; t < threads; ++t) workers.emplace_back(p, scratch);
    parallel_units(threads, int64_t(p.sequences.size()) * p.heads, [&](int thread, int64_t unit) {
        workers[thread].run(p.sequences[unit / p.heads], unit % p.heads);
    });
}

bool in_double(const Problem& p) { return p.x.dtype == DType::float64; }

void forward(const Problem& p) { in_double(p) ? forward_as<double>(p) : forward_as<float>(p); }
void backward(const Problem& p, const Gradients& g) { in_double(p) ? backward_as<double>(p, g) : backward_as<float>(p, g); }
void step(const Problem& p) { in_double(p) ? step_as<double>(p) : step_as<float>(p); }

}  // namespace

extern const ssd::Kernels ssd_kernels;
const ssd::Kernels ssd_kernels{forward, backward, step};

}  // namespace onchip::ONCHIP_ISA

// The selective scan's kernels of one instruction set: dividing a problem into units, and running them.
//
// The floor is an exponential for every channel, token and state, forward and again backward; x, dt, z and the result
// cross to memory once, which is little beside it. For 512 channels of 16 states and 2048 tokens, in float32, those are
// 16.8 million. With AVX2 a vector of them takes five multiplications or fused additions, and the recurrence three
// more: two a cycle, on one core of an EPYC at 2.9 GHz, take 2.9 ms. Measured there, thread CPU time, the best of many
// while it was busy with other work: the loop over the states alone, in cache, 3.8 ms (6.1 where exponents are out of
// reach); forward 6.0, with softplus, D and gate 8.9; both passes 34. Memory beyond the results: forward a state for
// every 32 tokens, where a gradient will be asked for; backward, for B and C, a row of states per token and block of
// four vectors of channels.
#include "backward.hpp"
#include "common/parallel.hpp"
#include "forward.hpp"
#include "step.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;  // a thread is woken in about the time that this many take
constexpr int64_t kRows = 64;                    // what a thread sums at a time

template <class T>
int64_t count_blocks(const Problem& p) {
    return p.groups * blocks_in_group<T>(p.channels, p.groups);
}

// Worker(p, more…) for each thread, over all blocks of all sequences.
template <class T, class Worker, class... More>
void run_units(const Problem& p, const More&... more) {
    const int64_t blocks = count_blocks<T>(p), units = blocks * int64_t(p.sequences.size());
    if (units == 0) return;
    const int64_t work = p.tokens * p.channels * p.states / kElementsPerThread;
    const int threads = int(std::clamp<int64_t>(work, 1, std::min<int64_t>(p.threads, units)));
    Scratch scratch(threads * Worker::need(p));
    std::vector<Worker> workers;
    workers.reserve(threads);
    for (int i = 0; i < threads; ++i) workers.emplace_back(p, more..., scratch);
    parallel_units(threads, units, [&](int thread, int64_t unit) {
        workers[thread].run(p.sequences[unit / blocks], block_at<T>(p, unit % blocks));
    });
}

// dB or dC: the blocks' sums, added in their order.
template <class T>
void sum_blocks(const Problem& p, const Tensor& partial, const Tensor& to) {
    const int64_t per_group = blocks_in_group<T>(p.channels, p.groups), n = p.states;
    parallel_units(p.threads, ceil_div(p.tokens, kRows), [&](int, int64_t unit) {
        for (int64_t row = unit * kRows; row < std::min((unit + 1) * kRows, p.tokens); ++row) {
            for (int64_t group = 0; group < p.groups; ++group) {
                T* const sum = reinterpret_cast<T*>(partial.at(group * per_group, row, 0));
                for (int64_t i = 1; i < per_group; ++i) {
                    const T* const next = reinterpret_cast<const T*>(partial.at(group * per_group + i, row, 0));
                    for (int64_t k = 0; k < n; ++k) sum[k] += next[k];
                }
                write_row(to.at(row, group, 0), to.dtype, 1, sum, T(1), n);
            }
        }
    });
}

template <class T>
void backward_as(const Problem& p, const Gradients& g) {
    run_units<T, ScanBackward<T>>(p, g);
    sum_blocks<T>(p, g.B_partial, g.B);
    sum_blocks<T>(p, g.C_partial, g.C);
}

void forward(const Problem& p) {
    if (p.x.dtype == DType::float64) return run_units<double, ScanForward<double>>(p);
    run_units<float, ScanForward<float>>(p);
}

void backward(const Problem& p, const Gradients& g) {
    if (p.x.dtype == DType::float64) return backward_as<double>(p, g);
    backward_as<float>(p, g);
}

template <class T>
void step_as(const Problem& p) {
    const int64_t size = p.channels / p.groups, spans = ceil_div(size, kStepChannels);
    const int64_t units = p.tokens * p.groups * spans, work = p.tokens * p.channels * p.states / kElementsPerThread;
    if (units == 0) return;
    const int threads = int(std::clamp<int64_t>(work, 1, std::min<int64_t>(p.threads, units)));
    Scratch scratch(threads * ScanStep<T>::need(p));
    std::vector<ScanStep<T>> workers;
    workers.reserve(threads);
    for (int i = 0; i < threads; ++i) workers.emplace_back(p, scratch);
    parallel_units(threads, units, [&](int thread, int64_t unit) {
        const int64_t group = unit / spans % p.groups, first = unit % spans * kStepChannels;
        workers[thread].run(unit / spans / p.groups, group, group * size + first, std::min(kStepChannels, size - first));
    });
}

void step(const Problem& p) {
    if (p.x.dtype == DType::float64) return step_as<double>(p);
    step_as<float>(p);
}

int64_t blocks(int64_t channels, int64_t groups, bool wide) {
    return groups * (wide ? blocks_in_group<double>(channels, groups) : blocks_in_group<float>(channels, groups));
}

}  // namespace

extern const selective_scan::Kernels selective_scan_kernels;
const selective_scan::Kernels selective_scan_kernels{forward, backward, step, blocks};

}  // namespace onchip::ONCHIP_ISA

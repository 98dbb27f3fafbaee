// The attention kernels of one instruction set: dividing a problem into units, and running them.
#include <algorithm>
#include <vector>

#include "append.hpp"
#include "backward_pass.hpp"
#include "decode.hpp"

namespace onchip::ONCHIP_ISA {
namespace {

template <class T>
void forward_packed(const Problem& p) {
    std::vector<ForwardUnit> units;
    double operations = 0;
    for (size_t i = 0; i < p.sequences.size(); ++i) {
        const Sequence& s = p.sequences[i];
        const int64_t rows = count_rows(p, s);
        if (rows == 0 || streams(p, s)) continue;
        operations += count_operations(p, s);
        const int64_t wanted = 4 * p.threads / (p.kv_heads * int64_t(p.sequences.size()));  // units, so that none idles
        const int64_t spans = std::clamp(wanted, ceil_div(rows, kUnitRows), ceil_div(rows, kBlockRows));
        const int64_t length = round_up(ceil_div(rows, spans), kBlockRows);
        for (int64_t h = 0; h < p.kv_heads; ++h)
            for (int64_t begin = (rows - 1) / length * length; begin >= 0; begin -= length)  // causal: longest first
                units.push_back({int64_t(i), h, {begin, std::min(begin + length, rows)}});
    }
    if (units.empty()) return;
    const int threads = useful_threads(p, operations);
    Scratch scratch(threads * ForwardWorker<T>::need(p));
    auto workers = make_workers<ForwardWorker<T>>(threads, scratch, p);
    parallel_units(threads, units.size(), [&](int thread, int64_t unit) { workers[thread].run(units[unit]); });
}

template <class T, class S>
void forward_streamed(const Problem& p) {
    struct Join {
        int64_t sequence, first_head, partial, rows, spans;
    };
    std::vector<StreamUnit> units;
    std::vector<Join> joins;
    int64_t partials = 0;
    double operations = 0;
    for (size_t i = 0; i < p.sequences.size(); ++i) {
        const Sequence& s = p.sequences[i];
        const int64_t rows = count_rows(p, s);
        if (rows == 0 || !streams(p, s)) continue;
        operations += count_operations(p, s);
        const Reach reach(p, s);
        const int64_t begin = reach.begin(0) / kStreamSpan, end = reach.end(s.q_length - 1);
        const int64_t spans = std::max<int64_t>(ceil_div(end, kStreamSpan) - begin, 1);
        const int64_t heads = stream_heads(p);
        for (int64_t h = 0; h < p.kv_heads; h += heads) {
            joins.push_back({int64_t(i), h, partials, heads * rows, spans});
            for (int64_t span = begin; span < begin + spans; ++span, partials += heads * rows)
                units.push_back({int64_t(i), {h, h + heads}, {span * kStreamSpan, std::min((span + 1) * kStreamSpan, end)}, partials});
        }
    }
    if (units.empty()) return;
    const int threads = useful_threads(p, operations);
    Scratch scratch(threads * StreamWorker<T, S>::need(p) + Partials<T>::need(partials, p.value_dim));
    const Partials<T> results(scratch, partials, p.value_dim);
    auto workers = make_workers<StreamWorker<T, S>>(threads, scratch, p, results);
    parallel_units(threads, units.size(), [&](int thread, int64_t unit) { workers[thread].run(units[unit]); });
    for (const Join& join : joins) 
        join_spans(p, p.sequences[join.sequence], join.first_head, results, join.partial, join.rows, join.spans);
}

void forward(const Problem& p) {
    switch (p.q.dtype) {
        case DType::float32: forward_packed<float>(p); return forward_streamed<float, float>(p);
        case DType::bfloat16: forward_packed<float>(p); return forward_streamed<float, BFloat16>(p);
        case DType::float16: forward_packed<float>(p); return forward_streamed<float, Half>(p);
        default: forward_packed<double>(p); return forward_streamed<double, double>(p);
    }
}

void backward(const Problem& p, const Gradients& g) {
    if (p.double_precision()) {
        BackwardPass<double>(p, g).run();
    } else {
        BackwardPass<float>(p, g).run();
    }
}

void append(const Problem& p, const Append& a) {
    if (p.double_precision()) {
        append_tokens<double>(p, a);
    } else {
        append_tokens<float>(p, a);
    }
}

}  // namespace

extern const attention::Kernels attention_kernels;
const attention::Kernels attention_kernels{forward, backward, append};

}  // namespace onchip::ONCHIP_ISA

// The Python module: tensors come as (address, element type, strides), so that a call costs a microsecond.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "common/scratch.hpp"
#include "instruction_sets.hpp"

#define ONCHIP_DECLARE(isa)                                              \
    namespace onchip::isa {                                              \
    extern const onchip::attention::Kernels attention_kernels;           \
    extern const onchip::causal_conv1d::Kernels causal_conv1d_kernels;   \
    extern const onchip::hadamard::Kernels hadamard_kernels;             \
    extern const onchip::selective_scan::Kernels selective_scan_kernels; \
    extern const onchip::ssd::Kernels ssd_kernels;                       \
    }
ONCHIP_DECLARE(baseline)
#ifdef ONCHIP_X86
ONCHIP_DECLARE(avx2)
ONCHIP_DECLARE(avx512)
#endif

namespace nb = nanobind;
using namespace onchip;

namespace onchip {
void bind_steps(nb::module_& m);
}

namespace {

#define ONCHIP_INSTRUCTION_SET(isa) \
    InstructionSet {                                                                                    \
        #isa, isa::attention_kernels, isa::causal_conv1d_kernels, isa::hadamard_kernels, isa::selective_scan_kernels, \
            isa::ssd_kernels                                                                         \
    }

// Best first.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> sets;
#ifdef ONCHIP_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        sets.push_back(ONCHIP_INSTRUCTION_SET(avx512));
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(ONCHIP_INSTRUCTION_SET(avx2));
#endif
    sets.push_back(ONCHIP_INSTRUCTION_SET(baseline));
    return sets;
}

}  // namespace

InstructionSet onchip::chosen = supported().front();

namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : supported()) names.emplace_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const InstructionSet& set : supported()) {
        if (set.name == name) {
            chosen = set;
            return;
        }
    }
    throw std::invalid_argument("instruction set not supported by this processor: " + name);
}

// (address, element type, four strides)
using Described = std::array<int64_t, 6>;

Tensor tensor(const std::optional<Described>& d) {
    if (!d) return {};
    return {reinterpret_cast<char*>((*d)[0]), DType((*d)[1]), {(*d)[2], (*d)[3], (*d)[4], (*d)[5]}};
}

// (batch, Tq, Tk, heads, kv_heads, head_dim, value_dim, left, right, threads, batch_invariant)
using Sizes = std::array<int64_t, 11>;
// (scale, softcap, dropout)
using Settings = std::array<double, 3>;

// (block, sequences, heads, tiles of queries, tiles of keys), and the addresses of the lists by query, by key, and bits.
using Mask = std::optional<std::pair<std::array<int64_t, 5>, std::array<int64_t, 5>>>;

attention::BlockMask block_mask(const Mask& mask) {
    if (!mask) return {};
    const auto& [n, at] = *mask;
    const auto list = [](int64_t starts, int64_t entries, int64_t tiles) {
        return attention::TileLists{reinterpret_cast<const int32_t*>(starts), reinterpret_cast<const int32_t*>(entries), tiles};
    };
    return {n[0], n[1], n[2], list(at[0], at[1], n[3]), list(at[2], at[3], n[4]), reinterpret_cast<const uint32_t*>(at[4])};
}

attention::Problem problem(const Sizes& n, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
                           const std::vector<int64_t>& starts_k, const std::array<std::optional<Described>, 8>& tensors) {
    attention::Problem p;
    const bool packed = !starts_q.empty();
    for (int64_t b = 0; b < n[0]; ++b) {
        if (packed) {
            p.sequences.push_back({0, starts_q[b], starts_q[b + 1] - starts_q[b], starts_k[b], starts_k[b + 1] - starts_k[b], b});
        } else {
            p.sequences.push_back({b, 0, n[1], 0, n[2], b});
        }
    }
    p.heads = n[3];
    p.kv_heads = n[4];
    p.group = p.heads / p.kv_heads;
    p.head_dim = n[5];
    p.value_dim = n[6];
    p.left = n[7];
    p.right = n[8];
    p.threads = int(n[9]);
    p.batch_invariant = n[10] != 0;
    p.scale = settings[0];
    p.softcap = settings[1];
    p.dropout = settings[2];
    p.seed = seed;
    Tensor* const targets[] = {&p.q, &p.k, &p.v, &p.out, &p.lse, &p.bias, &p.slopes, &p.sinks};
    for (size_t i = 0; i < tensors.size(); ++i) *targets[i] = tensor(tensors[i]);
    return p;
}

using Tensors = std::array<std::optional<Described>, 8>;

void attention_forward(const Sizes& sizes, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
                       const std::vector<int64_t>& starts_k, const Tensors& tensors, const Mask& mask) {
    attention::Problem p = problem(sizes, settings, seed, starts_q, starts_k, tensors);
    p.mask = block_mask(mask);
    nb::gil_scoped_release release;
    chosen.attention.forward(p);
}

void attention_backward(const Sizes& sizes, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
                        const std::vector<int64_t>& starts_k, const Tensors& tensors, const Mask& mask,
                        const Tensors& gradients, const std::array<int64_t, 4>& bias_shape) {
    attention::Problem p = problem(sizes, settings, seed, starts_q, starts_k, tensors);
    p.mask = block_mask(mask);
    attention::Gradients g{tensor(gradients[0]), tensor(gradients[1]), tensor(gradients[2]), tensor(gradients[3]),
                           tensor(gradients[4]), tensor(gradients[5]), {bias_shape[0], bias_shape[1], bias_shape[2], bias_shape[3]},
                           tensor(gradients[6]), tensor(gradients[7])};
    nb::gil_scoped_release release;
    chosen.attention.backward(p, g);
}

// Which row of a batch holds which keys of a cache: where each row's begin and how many there are, the appended ones
// among them; and where the cache lies in pages (address of the table, entries of a row, keys of a page).
using Cached = std::pair<std::vector<int64_t>, std::vector<int64_t>>;
using Paged = std::array<int64_t, 3>;
// (appended keys of a row, pairs of features that are turned, interleaved, in order), and k, v, q, cos and sin.
using Appended = std::pair<std::array<int64_t, 4>, std::array<std::optional<Described>, 5>>;

void attention_with_cache(const Sizes& sizes, double scale, double softcap, const Cached& cached, const Paged& paged,
                          const Appended& appended, const Tensors& tensors) {
    attention::Problem p = problem(sizes, {scale, softcap, 0.0}, 0, {}, {}, tensors);
    for (attention::Sequence& s : p.sequences) {
        s.k_start = cached.first[s.index];
        s.k_length = cached.second[s.index];
    }
    p.pages = {reinterpret_cast<const int32_t*>(paged[0]), paged[1], paged[2]};
    const auto& [n, x] = appended;
    const attention::Append a{tensor(x[0]), tensor(x[1]), n[0],      tensor(x[2]), tensor(x[3]),
                              tensor(x[4]), n[1],         n[2] != 0, n[3] != 0};
    nb::gil_scoped_release release;
    chosen.attention.append(p, a);
    chosen.attention.forward(p);
}

// (batch, time, channels, width, silu, contiguous along time, threads); x, weight, bias, state and out.
using ConvolutionSizes = std::array<int64_t, 7>;
using ConvolutionTensors = std::array<std::optional<Described>, 5>;

causal_conv1d::Problem convolution(const ConvolutionSizes& n, const std::vector<int64_t>& starts, const ConvolutionTensors& x) {
    causal_conv1d::Problem p{{}, n[2], n[3], n[4] != 0, n[5] != 0, tensor(x[0]), tensor(x[1]), tensor(x[2]), tensor(x[3]),
                             tensor(x[4]), int(n[6])};
    for (int64_t b = 0; b < n[0]; ++b) {
        if (starts.empty()) {
            p.sequences.push_back({b, 0, n[1], b});
        } else {
            p.sequences.push_back({0, starts[b], starts[b + 1] - starts[b], b});
        }
    }
    return p;
}

void causal_conv1d_forward(const ConvolutionSizes& sizes, const std::vector<int64_t>& starts, const ConvolutionTensors& tensors) {
    const causal_conv1d::Problem p = convolution(sizes, starts, tensors);
    nb::gil_scoped_release release;
    chosen.causal_conv1d.forward(p);
}

// Gradients of out, and those of x, weight, bias and state, which are written.
void causal_conv1d_backward(const ConvolutionSizes& sizes, const std::vector<int64_t>& starts, const ConvolutionTensors& tensors,
                            const ConvolutionTensors& gradients) {
    const causal_conv1d::Problem p = convolution(sizes, starts, tensors);
    const causal_conv1d::Gradients g{tensor(gradients[0]), tensor(gradients[1]), tensor(gradients[2]), tensor(gradients[3]),
                                     tensor(gradients[4])};
    nb::gil_scoped_release release;
    chosen.causal_conv1d.backward(p, g);
}

// A state that may be longer than the filter, and is moved on by one: it and its number of rows.
void causal_conv1d_step(const ConvolutionSizes& sizes, const ConvolutionTensors& tensors, const Described& state, int64_t rows) {
    causal_conv1d::Problem p = convolution(sizes, {}, tensors);
    const Tensor whole = tensor(state);
    p.state = whole;
    p.state.data = whole.at(0, rows - (p.width - 1), 0);
    nb::gil_scoped_release release;
    chosen.causal_conv1d.step(p, whole, rows);
}

// Sizes are (a, b, c, n, threads): three leading dimensions and the transform's.
void hadamard_transform(const std::array<int64_t, 5>& sizes, double scale,
                        const std::array<std::optional<Described>, 4>& tensors) {
    const hadamard::Problem p{{sizes[0], sizes[1], sizes[2]}, sizes[3], scale, tensor(tensors[0]), tensor(tensors[1]),
                              tensor(tensors[2]), tensor(tensors[3]), int(sizes[4])};
    nb::gil_scoped_release release;
    chosen.hadamard.transform(p);
}

// (batch, time, channels, states, groups, chunk, softplus, threads), as integers.
using ScanSizes = std::array<int64_t, 8>;
using ScanTensors = std::array<std::optional<Described>, 12>;

// `starts` are the boundaries of packed sequences, empty where each row of the batch is one.
selective_scan::Problem scan_problem(const ScanSizes& n, const std::vector<int64_t>& starts, const ScanTensors& tensors) {
    selective_scan::Problem p;
    const int64_t count = starts.empty() ? n[0] : int64_t(starts.size()) - 1;
    int64_t checkpoint = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = starts.empty() ? i * n[1] : starts[i], length = starts.empty() ? n[1] : starts[i + 1] - row;
        p.sequences.push_back({starts.empty() ? i : 0, starts.empty() ? 0 : row, length, i, row, checkpoint});
        checkpoint += ceil_div(length, n[5]);
    }
    p.tokens = n[0] * n[1];
    p.channels = n[2];
    p.states = n[3];
    p.groups = n[4];
    p.chunk = n[5];
    p.softplus = n[6] != 0;
    p.threads = int(n[7]);
    Tensor* const targets[] = {&p.x, &p.dt,      &p.A,             &p.B,   &p.C,           &p.D,
                               &p.z, &p.dt_bias, &p.initial_state, &p.out, &p.final_state, &p.checkpoints};
    for (size_t i = 0; i < tensors.size(); ++i) *targets[i] = tensor(tensors[i]);
    return p;
}

void selective_scan_forward(const ScanSizes& sizes, const std::vector<int64_t>& starts, const ScanTensors& tensors) {
    const selective_scan::Problem p = scan_problem(sizes, starts, tensors);
    nb::gil_scoped_release release;
    chosen.selective_scan.forward(p);
}

void selective_scan_backward(const ScanSizes& sizes, const std::vector<int64_t>& starts, const ScanTensors& tensors,
                             const std::array<std::optional<Described>, 13>& gradients) {
    const selective_scan::Problem p = scan_problem(sizes, starts, tensors);
    selective_scan::Gradients g;
    Tensor* const targets[] = {&g.out, &g.final_state, &g.x,       &g.dt,            &g.A,         &g.B,        &g.C,
                               &g.D,   &g.z,           &g.dt_bias, &g.initial_state, &g.B_partial, &g.C_partial};
    for (size_t i = 0; i < gradients.size(); ++i) *targets[i] = tensor(gradients[i]);
    nb::gil_scoped_release release;
    chosen.selective_scan.backward(p, g);
}

// The first size is the number of rows, and the second 1: the tensors have no time.
void selective_scan_step(const ScanSizes& sizes, const ScanTensors& tensors) {
    const selective_scan::Problem p = scan_problem(sizes, {}, tensors);
    nb::gil_scoped_release release;
    chosen.selective_scan.step(p);
}

// (batch, T, heads, groups, dim, state_dim, chunk, softplus, threads); the range of a step; where packed sequences begin;
// x, dt, A, B, C, D, z, dt_bias, initial state, out, final state.
using SsdTensors = std::array<std::optional<Described>, 11>;

ssd::Problem ssd_problem(const std::array<int64_t, 9>& n, const std::array<double, 2>& limit,
                         const std::vector<int64_t>& starts, const SsdTensors& tensors) {
    ssd::Problem p;
    for (int64_t b = 0; b < n[0]; ++b) {
        p.sequences.push_back(starts.empty() ? ssd::Sequence{b, 0, n[1], b}
                                             : ssd::Sequence{0, starts[b], starts[b + 1] - starts[b], b});
    }
    p.heads = n[2];
    p.group = p.heads / n[3];
    p.dim = n[4];
    p.state_dim = n[5];
    p.chunk = std::max<int64_t>(std::min(n[6], p.longest()), 1);
    p.softplus = n[7] != 0;
    p.threads = int(n[8]);
    p.low = limit[0];
    p.high = limit[1];
    Tensor* const targets[] = {&p.x, &p.dt, &p.A, &p.B, &p.C, &p.D, &p.z, &p.dt_bias, &p.initial_state, &p.out, &p.final_state};
    for (size_t i = 0; i < tensors.size(); ++i) *targets[i] = tensor(tensors[i]);
    return p;
}

void ssd_forward(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const std::vector<int64_t>& starts,
                 const SsdTensors& tensors) {
    const ssd::Problem p = ssd_problem(sizes, limit, starts, tensors);
    nb::gil_scoped_release release;
    chosen.ssd.forward(p);
}

// The gradients of out, final state, x, dt, B, C, z, initial state, A, D, dt_bias.
void ssd_backward(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const std::vector<int64_t>& starts,
                  const SsdTensors& tensors, const SsdTensors& gradients) {
    const ssd::Problem p = ssd_problem(sizes, limit, starts, tensors);
    ssd::Gradients g;
    Tensor* const targets[] = {&g.out, &g.final_state, &g.x, &g.dt, &g.B, &g.C, &g.z, &g.initial_state, &g.A, &g.D, &g.dt_bias};
    for (size_t i = 0; i < gradients.size(); ++i) *targets[i] = tensor(gradients[i]);
    nb::gil_scoped_release release;
    chosen.ssd.backward(p, g);
}

void ssd_step(const std::array<int64_t, 9>& sizes, const std::array<double, 2>& limit, const SsdTensors& tensors) {
    const ssd::Problem p = ssd_problem(sizes, limit, {}, tensors);
    nb::gil_scoped_release release;
    chosen.ssd.step(p);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "onchip's native CPU kernels; the functions in onchip.ops are the way in.";
    m.def("instruction_sets", instruction_sets, "Instruction sets this processor can run, best first.");
    m.def("instruction_set", [] { return chosen.name; }, "The instruction set in use.");
    m.def("use_instruction_set", use_instruction_set, "Use another of `instruction_sets`; for tests.");
    m.def("poison_scratch", poison_scratch, "Fill working memory with NaNs before every use; for tests.");
    m.def("attention_forward", attention_forward);
    m.def("attention_backward", attention_backward);
    m.def("attention_with_cache", attention_with_cache);
    m.def("causal_conv1d_forward", causal_conv1d_forward);
    m.def("causal_conv1d_backward", causal_conv1d_backward);
    m.def("causal_conv1d_step", causal_conv1d_step);
    m.def("hadamard_transform", hadamard_transform);
    m.def("selective_scan_forward", selective_scan_forward);
    m.def("selective_scan_backward", selective_scan_backward);
    m.def("selective_scan_step", selective_scan_step);
    m.def("selective_scan_blocks", [](int64_t channels, int64_t groups, bool wide) {
        return chosen.selective_scan.blocks(channels, groups, wide);
    });
    m.def("ssd_forward", ssd_forward);
    m.def("ssd_backward", ssd_backward);
    m.def("ssd_step", ssd_step);
    bind_steps(m);
}

// Attention as Python calls it.
#include "bindings.hpp"

#include "attention/problem.hpp"

ONCHIP_KERNELS(attention)

namespace nb = nanobind;

namespace onchip::attention {
namespace {

// (batch, Tq, Tk, heads, kv_heads, head_dim, value_dim, left, right, threads, batch_invariant)
using Sizes = std::array<int64_t, 11>;
// (scale, softcap, dropout)
using Settings = std::array<double, 3>;
using Tensors = DescribedTensors<8>;

// (block, sequences, heads, tiles of queries, tiles of keys), and the addresses of the lists by query, by key, and bits.
using Mask = std::optional<std::pair<std::array<int64_t, 5>, std::array<int64_t, 5>>>;

BlockMask block_mask(const Mask& mask) {
    if (!mask) return {};
    const auto& [n, at] = *mask;
    const auto list = [](int64_t starts, int64_t entries, int64_t tiles) {
        return TileLists{reinterpret_cast<const int32_t*>(starts), reinterpret_cast<const int32_t*>(entries), tiles};
    };
    return {n[0], n[1], n[2], list(at[0], at[1], n[3]), list(at[2], at[3], n[4]), reinterpret_cast<const uint32_t*>(at[4])};
}

Problem problem(const Sizes& n, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
                const std::vector<int64_t>& starts_k, const Tensors& tensors) {
    Problem p;
    const bool packed = !starts_q.empty();
    for (int64_t b = 0; b < n[0]; ++b) {
        if (packed) {
            p.sequences.push_back(
                {0, starts_q[b], starts_q[b + 1] - starts_q[b], starts_k[b], starts_k[b + 1] - starts_k[b], b});
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
    assign(targets, tensors);
    return p;
}

void forward(const Sizes& sizes, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
             const std::vector<int64_t>& starts_k, const Tensors& tensors, const Mask& mask) {
    Problem p = problem(sizes, settings, seed, starts_q, starts_k, tensors);
    p.mask = block_mask(mask);
    nb::gil_scoped_release release;
    kernels().forward(p);
}

void backward(const Sizes& sizes, const Settings& settings, uint64_t seed, const std::vector<int64_t>& starts_q,
              const std::vector<int64_t>& starts_k, const Tensors& tensors, const Mask& mask, const Tensors& gradients,
              const std::array<int64_t, 4>& bias_shape) {
    Problem p = problem(sizes, settings, seed, starts_q, starts_k, tensors);
    p.mask = block_mask(mask);
    Gradients g{tensor(gradients[0]),
                tensor(gradients[1]),
                tensor(gradients[2]),
                tensor(gradients[3]),
                tensor(gradients[4]),
                tensor(gradients[5]),
                {bias_shape[0], bias_shape[1], bias_shape[2], bias_shape[3]},
                tensor(gradients[6]),
                tensor(gradients[7])};
    nb::gil_scoped_release release;
    kernels().backward(p, g);
}

// Which row of a batch holds which keys of a cache: where each row's begin and how many there are, the appended ones
// among them; and where the cache lies in pages (address of the table, entries of a row, keys of a page).
using Cached = std::pair<std::vector<int64_t>, std::vector<int64_t>>;
using Paged = std::array<int64_t, 3>;
// (appended keys of a row, pairs of features that are turned, interleaved, in order); k, v, q, cos and sin; positions.
using Appended = std::tuple<std::array<int64_t, 4>, DescribedTensors<5>, std::vector<int64_t>>;

void with_cache(const Sizes& sizes, double scale, double softcap, const Cached& cached, const Paged& paged,
                const Appended& appended, const Tensors& tensors) {
    Problem p = problem(sizes, {scale, softcap, 0.0}, 0, {}, {}, tensors);
    for (Sequence& s : p.sequences) {
        s.k_start = cached.first[s.index];
        s.k_length = cached.second[s.index];
    }
    p.pages = {reinterpret_cast<const int32_t*>(paged[0]), paged[1], paged[2]};
    const auto& [n, x, positions] = appended;
    const Append a{tensor(x[0]), tensor(x[1]), n[0], tensor(x[2]), tensor(x[3]), tensor(x[4]), positions,
                   n[1],         n[2] != 0,    n[3] != 0};
    nb::gil_scoped_release release;
    kernels().append(p, a);
    kernels().forward(p);
}

}  // namespace

void bind(nb::module_& m) {
    m.def("attention_forward", forward);
    m.def("attention_backward", backward);
    m.def("attention_with_cache", with_cache);
}

}  // namespace onchip::attention

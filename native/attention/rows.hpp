// Moving the rows of a (sequence, key head) between user tensors and packed tiles.
#pragma once

#include "common/convert.hpp"
#include "problem.hpp"

namespace onchip::ONCHIP_ISA {

using attention::Problem;
using attention::Sequence;

// The address of a query-side row (q, out and their gradients) or of a key (k, v and theirs).
inline char* query_row(const Problem& p, const Tensor& x, const Sequence& s, int64_t kv_head, int64_t row) {
    return x.at(s.batch, s.q_start + p.query_of(row), kv_head * p.group + p.member_of(row));
}
inline char* key_row(const Tensor& x, const Sequence& s, int64_t kv_head, int64_t key) {
    return x.at(s.batch, s.k_start + key, kv_head);
}

template <class T>
void read_queries(const Problem& p, const Tensor& x, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                  int64_t dim, T factor, T* to, int64_t to_row) {
    for (int64_t row = begin; row < end; ++row, to += to_row) {
        read_row(to, query_row(p, x, s, kv_head, row), x.dtype, x.strides[3], dim);
        if (factor != T(1))
            for (int64_t d = 0; d < dim; ++d) to[d] *= factor;
    }
}

template <class T>
void read_keys(const Tensor& x, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, int64_t dim, T* to,
               int64_t to_row) {
    for (int64_t key = begin; key < end; ++key, to += to_row)
        read_row(to, key_row(x, s, kv_head, key), x.dtype, x.strides[3], dim);
}

}  // namespace onchip::ONCHIP_ISA

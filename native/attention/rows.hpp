// Moving the rows of a (sequence, key head) between user tensors and packed tiles.
#pragma once

#include <limits>

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

// The rows of a sequence's keys in order, wherever they lie: one after another, or in pages. Beyond the last key it stays
// on the last page.
class KeyWalk {
public:
    KeyWalk(const Problem& p, const Tensor& x, const Sequence& s, int64_t kv_head, int64_t key)
        : step_(x.strides[1] * item_size(x.dtype)) {
        if (p.pages.table == nullptr) {
            at_ = key_row(x, s, kv_head, key);
            return;
        }
        first_ = x.at(0, 0, kv_head);
        page_step_ = x.strides[0] * item_size(x.dtype);
        size_ = p.pages.size;
        const int64_t column = s.k_start + key, end = s.k_start + s.k_length;
        page_ = p.pages.table + s.index * p.pages.row + column / size_;
        last_page_ = p.pages.table + s.index * p.pages.row + (end - 1) / size_;
        left_ = size_ - column % size_;
        at_ = first_ + *page_ * page_step_ + column % size_ * step_;
    }

    char* row() const { return at_; }
    void next() {
        at_ += step_;
        if (--left_ == 0) turn_page();
    }

private:
    void turn_page() {
        if (page_ == last_page_) return;
        at_ = first_ + *++page_ * page_step_;
        left_ = size_;
    }

    char* at_ = nullptr;
    char* first_ = nullptr;
    const int32_t* page_ = nullptr;
    const int32_t* last_page_ = nullptr;
    int64_t step_, page_step_ = 0, size_ = 0, left_ = std::numeric_limits<int64_t>::max();
};

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
void read_keys(const Problem& p, const Tensor& x, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
               int64_t dim, T* to, int64_t to_row) {
    KeyWalk walk(p, x, s, kv_head, begin);
    for (int64_t key = begin; key < end; ++key, to += to_row, walk.next())
        read_row(to, walk.row(), x.dtype, x.strides[3], dim);
}

}  // namespace onchip::ONCHIP_ISA

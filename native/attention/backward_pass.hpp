// The backward pass as a whole: preparation, tiles of keys, the bias's own pass, and the sums per head.
#pragma once

#include "bias_gradient.hpp"
#include "workers.hpp"

namespace onchip::ONCHIP_ISA {

constexpr int64_t kSlotBytes = int64_t(4) << 20;  // for the dQ of heads in flight, beyond the first

template <class T>
class BackwardPass {
public:
    BackwardPass(const Problem& p, const Gradients& g) : p_(p), g_(g), plan_(p), shared_(plan_.need(p)) {
        T* lse2 = shared_.take<T>(plan_.rows);
        T* delta = shared_.take<T>(plan_.rows);
        T* const slots = shared_.take<T>(plan_.slots * plan_.slot_size);
        double* slopes = shared_.take<double>(plan_.tiles * p.group);
        turns_ = std::vector<std::atomic<int64_t>>(plan_.blocks);
        finished_ = std::vector<std::atomic<int64_t>>(plan_.heads);
        int64_t turn = 0;
        std::vector<int64_t> users;  // of slots: heads with tiles, as one without would be done before it began
        for (size_t i = 0; i < p.sequences.size(); ++i) {
            const Sequence& s = p.sequences[i];
            const int64_t tiles = ceil_div(s.k_length, tile_keys(p)), blocks = count_blocks(p, s), rows = count_rows(p, s);
            for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
                const int64_t n = heads_.size(), slot = users.size() % plan_.slots;
                const int64_t before = int64_t(users.size()) < plan_.slots ? -1 : users[users.size() - plan_.slots];
                if (tiles > 0) users.push_back(n);
                heads_.push_back({int64_t(i), kv_head, tiles, blocks, slots + slot * plan_.slot_size,
                                  before < 0 ? nullptr : &finished_[before], before < 0 ? 0 : heads_[before].tiles,
                                  turns_.data() + turn, &finished_[n], lse2, delta, g.slopes ? slopes : nullptr});
                lse2 += rows;
                delta += rows;
                slopes += tiles * p.group;
                turn += blocks;
            }
        }
    }

    void run() {
        std::vector<std::pair<int64_t, int64_t>> blocks, tiles;  // (head, block), (head, tile)
        for (int64_t h = 0; h < int64_t(heads_.size()); ++h) {
            for (int64_t block = 0; block < heads_[h].blocks; ++block) blocks.push_back({h, block});
        }
        // Heads in flight take turns: two threads on one head would pass its dQ from cache to cache.
        for (int64_t first = 0; first < int64_t(heads_.size()); first += plan_.slots) {
            const int64_t last = std::min<int64_t>(first + plan_.slots, heads_.size());
            for (int64_t tile = 0; tile < plan_.most_tiles; ++tile)
                for (int64_t h = first; h < last; ++h)
                    if (tile < heads_[h].tiles) tiles.push_back({h, tile});
        }
        parallel_units(plan_.threads, blocks.size(),
                       [&](int, int64_t unit) { prepare(heads_[blocks[unit].first], blocks[unit].second); });
        run_tiles(tiles);
        if (g_.bias) run_bias();
        for (const Head<T>& head : heads_) sum_over_rows(head);
    }

private:
    struct Plan {
        int64_t heads = 0, tiles = 0, most_tiles = 1, blocks = 0, rows = 0, slots = 1, slot_size = 0;
        int threads = 1;

        explicit Plan(const Problem& p) {
            int64_t longest = 0;
            double operations = 0;
            for (const Sequence& s : p.sequences) {
                operations += 2.5 * count_operations(p, s);
                tiles += p.kv_heads * ceil_div(s.k_length, tile_keys(p));
                blocks += p.kv_heads * count_blocks(p, s);
                rows += p.kv_heads * count_rows(p, s);
                longest = std::max(longest, count_rows(p, s));
                most_tiles = std::max(most_tiles, ceil_div(s.k_length, tile_keys(p)));
            }
            heads = p.kv_heads * int64_t(p.sequences.size());
            threads = useful_threads(p, operations);
            slot_size = longest * round_up(p.head_dim, kPanel<T>);
            // Heads in flight: one a thread, or two if it may run out of tiles, within the memory that is worth it.
            const int64_t wanted = ceil_div(2 * threads, std::min<int64_t>(most_tiles, 2));
            const int64_t affordable = kSlotBytes / std::max<int64_t>(slot_size * int64_t(sizeof(T)), 1);
            slots = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, std::min(heads, affordable)));
        }

        size_t need(const Problem& p) const {
            return 2 * Scratch::need<T>(rows) + Scratch::need<T>(slots * slot_size) + Scratch::need<double>(tiles * p.group);
        }
    };

    // δ and the log-sum-exp in units of log 2; who has the first turn; zero gradients where no tile will come by.
    void prepare(const Head<T>& head, int64_t block) {
        const Sequence& s = p_.sequences[head.sequence];
        const Scores<T> scores(p_, s, head.kv_head);
        const Range rows = block_of(p_, s, block);
        std::vector<T> out(p_.value_dim), grad(p_.value_dim);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            read_queries(p_, p_.out, s, head.kv_head, row, row + 1, p_.value_dim, T(1), out.data(), 0);
            read_queries(p_, g_.out, s, head.kv_head, row, row + 1, p_.value_dim, T(1), grad.data(), 0);
            T sum = 0;
            for (int64_t d = 0; d < p_.value_dim; ++d) sum += out[d] * grad[d];
            const int64_t i = s.q_start + row / p_.group, h = scores.head(row);
            if (g_.lse) sum -= *reinterpret_cast<const T*>(g_.lse.at(s.batch, h, i));
            const T lse = *reinterpret_cast<const T*>(p_.lse.at(s.batch, h, i));
            head.lse2[row] = lse == kMinusInfinity<T> ? T(0) : lse * T(kLog2e);
            head.delta[row] = sum;
        }
        const int64_t begin = scores.begin(rows.begin), end = scores.end(rows.end - 1);
        const int64_t first = BlockMask(p_, s, head.kv_head).next_tile(rows, begin / tile_keys(p_), tile_keys(p_));
        head.turns[block].store(first, std::memory_order_relaxed);
        if (begin < end && first * tile_keys(p_) < end) return;
        const std::vector<T> zeros(p_.head_dim);
        for (int64_t row = rows.begin; row < rows.end; ++row)
            write_row(query_row(p_, g_.q, s, head.kv_head, row), g_.q.dtype, g_.q.strides[3], zeros.data(), T(1), p_.head_dim);
    }

    void run_tiles(const std::vector<std::pair<int64_t, int64_t>>& tiles) {
        Scratch scratch(plan_.threads * BackwardWorker<T>::need(p_));
        auto workers = make_workers<BackwardWorker<T>>(plan_.threads, scratch, p_, g_);
        parallel_units(plan_.threads, tiles.size(), [&](int thread, int64_t unit) {
            workers[thread].run(heads_[tiles[unit].first], tiles[unit].second);
        });
    }

    void run_bias() {
        Scratch scratch(plan_.threads * BiasGradientWorker<T>::need(p_));
        auto workers = make_workers<BiasGradientWorker<T>>(plan_.threads, scratch, p_, g_);
        const std::array<int64_t, 4> grid = BiasGradientWorker<T>::grid(p_, g_);
        parallel_units(plan_.threads, grid[0] * grid[1] * grid[2] * grid[3], [&](int thread, int64_t unit) {
            workers[thread].run(heads_, {unit / (grid[3] * grid[2] * grid[1]), unit / (grid[3] * grid[2]) % grid[1],
                                         unit / grid[3] % grid[2], unit % grid[3]});
        });
    }

    // The gradients of slopes and sinks: one sum per sequence and head.
    void sum_over_rows(const Head<T>& head) const {
        const Sequence& s = p_.sequences[head.sequence];
        const int64_t group = p_.group;
        for (int64_t g = 0; g < group; ++g) {
            const int64_t h = head.kv_head * group + g;
            if (g_.slopes) {
                double sum = 0;
                for (int64_t tile = 0; tile < head.tiles; ++tile) sum += head.slopes[tile * group + g];
                *reinterpret_cast<double*>(g_.slopes.at(s.index, h, 0)) = sum;
            }
            if (g_.sinks) {
                const double sink = *reinterpret_cast<const T*>(p_.sinks.at(h, 0, 0)) * kLog2e;
                double sum = 0;
                for (int64_t row = g; row < count_rows(p_, s); row += group)
                    sum -= std::exp2(sink - head.lse2[row]) * head.delta[row];
                *reinterpret_cast<double*>(g_.sinks.at(s.index, h, 0)) = sum;
            }
        }
    }

    const Problem& p_;
    const Gradients& g_;
    const Plan plan_;
    Scratch shared_;
    std::vector<Head<T>> heads_;
    std::vector<std::atomic<int64_t>> turns_, finished_;
};

}  // namespace onchip::ONCHIP_ISA

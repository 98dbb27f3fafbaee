// A parallel loop over units of unequal work, taken in order as threads become free.
#pragma once

#include <atomic>
#include <cstdint>

namespace onchip {

// work(thread, unit) for every unit in [0, units). Units are handed out in ascending order, so a unit may wait for an
// earlier one. `work` must not throw.
template <class Work>
void parallel_units(int threads, int64_t units, const Work& work) {
    if (threads > units) threads = int(units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; ++unit) work(0, unit);
        return;
    }
#ifdef _OPENMP
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
#pragma omp parallel num_threads(threads)
    {
        const int thread = arrived.fetch_add(1, std::memory_order_relaxed);
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(thread, unit);
    }
#else
    for (int64_t unit = 0; unit < units; ++unit) work(0, unit);
#endif
}

}  // namespace onchip

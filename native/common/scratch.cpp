#include "scratch.hpp"

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

namespace onchip {
namespace {

constexpr size_t kKeptBytes = size_t(256) << 20;  // blocks beyond this sum are freed when they come back
constexpr std::align_val_t kAlign{64};

struct Block {
    char* data;
    size_t size;
};

struct Pool {
    std::mutex mutex;
    std::vector<Block> blocks;
    size_t kept = 0;
};

Pool& pool() {
    static Pool* const shared = new Pool;  // never destroyed: calls may outlive static destruction
    return *shared;
}

std::atomic<bool> poison{false};

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), size_(bytes) {
    {
        Pool& shared = pool();
        std::lock_guard<std::mutex> lock(shared.mutex);
        size_t best = shared.blocks.size();
        for (size_t i = 0; i < shared.blocks.size(); ++i) {
            if (shared.blocks[i].size >= bytes && (best == shared.blocks.size() || shared.blocks[i].size < shared.blocks[best].size)) best = i;
        }
        if (best < shared.blocks.size()) {
            data_ = shared.blocks[best].data;
            size_ = shared.blocks[best].size;
            shared.kept -= size_;
            shared.blocks.erase(shared.blocks.begin() + best);
        } else if (!shared.blocks.empty()) {
            // Too small for this call: what it replaces would only pile up.
            ::operator delete(shared.blocks.back().data, kAlign);
            shared.kept -= shared.blocks.back().size;
            shared.blocks.pop_back();
        }
    }
    if (data_ == nullptr) data_ = static_cast<char*>(::operator new(size_, kAlign));
    if (poison.load(std::memory_order_relaxed)) std::memset(data_, 0xff, size_);
}

Scratch::~Scratch() {
    Pool& shared = pool();
    std::lock_guard<std::mutex> lock(shared.mutex);
    if (shared.kept + size_ > kKeptBytes) {
        ::operator delete(data_, kAlign);
        return;
    }
    shared.blocks.push_back({data_, size_});
    shared.kept += size_;
}

void poison_scratch(bool on) { poison.store(on); }

}  // namespace onchip

// Working memory that outlives a call: on a virtual machine a fresh page costs more than the arithmetic done in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onchip {

// Borrows at least `bytes` of 64-byte aligned memory from a process-wide pool; gives it back when it goes out of scope.
// Throws std::bad_alloc. The memory holds whatever was left there, or NaNs after poison_scratch(true).
class Scratch {
public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next `count` elements, 64-byte aligned. All that is taken must fit in what was borrowed: see `need`.
    template <class T>
    T* take(size_t count) {
        T* p = reinterpret_cast<T*>(data_ + used_);
        used_ += need<T>(count);
        return p;
    }
    template <class T>
    static size_t need(size_t count) {
        return (count * sizeof(T) + 63) / 64 * 64;
    }

private:
    char* data_;
    size_t size_;
    size_t used_ = 0;
};

// For tests: fill borrowed memory with NaNs, so that a kernel that reads what it did not write shows it.
void poison_scratch(bool on);

}  // namespace onchip

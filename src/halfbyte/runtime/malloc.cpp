// Tensors on the C library's heap, each in the hole that has its size; see malloc.py.

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr std::size_t kAlignment = 64;  // torch's own
constexpr std::size_t kHeader = 8;      // of a block of the heap
constexpr std::size_t kLarge = 1 << 16;

class Heap final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t n) override {
    void* data = nullptr;
    if (n >= kLarge) {
      // With its header a multiple of 64 bytes, so that what follows an aligned block is aligned.
      n = ((n + kHeader + kAlignment - 1) & ~(kAlignment - 1)) - kHeader;
      data = std::malloc(n);
      if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
        std::free(data);
        data = nullptr;
      }
    }
    // Not c10::alloc_cpu: on ARM that is mimalloc's, whose free does not know malloc's blocks.
    if (data == nullptr && n > 0) {
      const int failed = posix_memalign(&data, kAlignment, n);
      TORCH_CHECK(failed == 0, "can't allocate memory: ", n, " bytes for a tensor on the CPU");
    }
    return {data, data, &std::free, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }

  void copy_data(void* to, const void* from, std::size_t n) const override {
    default_copy_data(to, from, n);
  }
};

}  // namespace

// Never destroyed: what else ends with the process may still ask for tensors.
extern "C" void halfbyte_use_malloc() { c10::SetCPUAllocator(new Heap); }

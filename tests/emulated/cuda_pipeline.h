// Asynchronous copies for the emulator in cuda_runtime.h: they wait until they are waited for.
#pragma once

#include <deque>
#include <map>

#include "cuda_runtime.h"

namespace emulated {

struct Copy {
  void* to;
  const void* from;
  std::size_t size, zeros;
};
inline thread_local std::map<int, std::deque<std::vector<Copy>>>
    copies;  // of each fiber: groups, the last one open

}  // namespace emulated

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t size, std::size_t zeros = 0) {
  auto& groups = emulated::copies[emulated::block->current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, size, zeros});
}

inline void __pipeline_commit() {
  auto& groups = emulated::copies[emulated::block->current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

inline void __pipeline_wait_prior(std::size_t prior) {
  auto& groups = emulated::copies[emulated::block->current];
  while (groups.size() > prior + 1) {
    for (const emulated::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.size - copy.zeros);
      std::memset(static_cast<char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
    }
    groups.pop_front();
  }
}

// Clusters for the emulator in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return emulated::block->rank; }
  unsigned num_blocks() const { return emulated::block->cluster->anchors.size(); }
  void sync() const {
    __syncthreads();
    if (emulated::block->current == 0) emulated::block->cluster->barrier.arrive_and_wait();
    __syncthreads();
  }
  template <typename T>
  T* map_shared_rank(T* own, int rank) const {
    char* const* anchors = emulated::block->cluster->anchors.data();
    return reinterpret_cast<T*>(anchors[rank] + (reinterpret_cast<char*>(own) - anchors[block_rank()]));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

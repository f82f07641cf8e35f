// The CUDA runtime: what it refuses becomes an exception that names the op, and one way to launch.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace retro {

inline void check(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and not once more to who asks next
  throw std::runtime_error(std::string(op) + " (CUDA): " + cudaGetErrorString(error));
}

// `cluster` blocks that follow one another run at the same time and read each other's shared memory. `early`: they may
// begin while the launch before them in the stream still runs, if that one lets them (`let_next_begin`).
struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes;
  cudaStream_t stream;
  unsigned cluster = 1;
  bool early = false;

  template <class Call>
  cudaError_t configured(Call call) const {
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (cluster > 1) {
      cudaLaunchAttribute& size = attributes[count++];
      size.id = cudaLaunchAttributeClusterDimension;
      size.val.clusterDim.x = cluster, size.val.clusterDim.y = 1, size.val.clusterDim.z = 1;
    }
    if (early) {
      cudaLaunchAttribute& overlap = attributes[count++];
      overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = attributes, config.numAttrs = count;
    return call(config);
  }

  template <class Kernel, class Job>
  cudaError_t launch(Kernel kernel, const Job& job) const {
    return configured([&](const cudaLaunchConfig_t& config) { return cudaLaunchKernelEx(&config, kernel, job); });
  }
};

}  // namespace retro

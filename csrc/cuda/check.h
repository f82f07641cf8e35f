// What the CUDA runtime refuses becomes an exception that names the op.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace retro {

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + " (CUDA): " + cudaGetErrorString(error));
}

}  // namespace retro

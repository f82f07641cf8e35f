// The host gather's twin: one warp a neighbour, 16 bytes a lane and load. The loads may cross the bus into pinned host
// memory, where wide accesses of whole lines are what counts; a warp asks for a chunk and its continuation at once. Many
// rows all over the store would have most loads wait for a page's address there: they come in an order by place.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../ops.h"
#include "check.h"

namespace retro {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

void check(cudaError_t error) { retro::check(error, "gather_neighbours"); }

// Vec elements that move as one access.
template <class T, int Vec>
struct alignas(sizeof(T) * Vec) Pack {
  T at[Vec];
};

template <class Token, class Out, int Vec>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) gather_neighbours_kernel(Gather g) {
  const int lane = threadIdx.x % kWarp;
  const int64_t m = g.chunk_size;
  const Token* tokens = static_cast<const Token*>(g.tokens);
  const int64_t stride = int64_t(gridDim.x) * kWarpsPerBlock;
  for (int64_t turn = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; turn < g.n; turn += stride) {
    const int64_t i = g.order == nullptr ? turn : g.order[turn];
    const int64_t id = g.ids[i];
    const bool present = id >= 0 && id < g.num_chunks;
    const bool continues = present && id + 1 < g.num_chunks && g.continuation[id] != 0;
    Out* out = static_cast<Out*>(g.out) + i * 2 * m;
    int length = 0;
    for (int64_t c = int64_t(lane) * Vec; c < 2 * m; c += kWarp * Vec) {
      // Vec divides M, so that no pack lies across the border between the two chunks.
      const bool second = c >= m;
      Pack<Token, Vec> in;
      if (second ? continues : present) {
        const int64_t offset = second ? (id + 1) * g.row_stride + c - m : id * g.row_stride + c;
        in = *reinterpret_cast<const Pack<Token, Vec>*>(tokens + offset);
      } else {
#pragma unroll
        for (int v = 0; v < Vec; ++v) in.at[v] = Token(g.pad_id);
      }
      Pack<Out, Vec> wide;
#pragma unroll
      for (int v = 0; v < Vec; ++v) {
        wide.at[v] = Out(in.at[v]);
        if (int64_t(in.at[v]) != g.pad_id) length = int(c) + v + 1;
      }
      *reinterpret_cast<Pack<Out, Vec>*>(out + c) = wide;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      length = max(length, __shfl_xor_sync(0xffffffffu, length, offset));
    if (lane == 0) g.lengths[i] = length;
  }
}

template <class Token, class Out>
void launch(const Gather& g, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(Token);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (16 / sizeof(Token) * sizeof(Out)) == 0; };
  const bool wide = g.chunk_size % kVec == 0 && g.row_stride % kVec == 0 &&
                    reinterpret_cast<uintptr_t>(g.tokens) % 16 == 0 && aligned(g.out);
  const int64_t blocks = std::min<int64_t>((g.n + kWarpsPerBlock - 1) / kWarpsPerBlock, 1 << 20);
  const auto kernel = wide ? gather_neighbours_kernel<Token, Out, kVec> : gather_neighbours_kernel<Token, Out, 1>;
  check(Grid{static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0, stream}.launch(kernel, g));
}

template <class T>
const T* device_address(const T* host) {
  void* device = nullptr;
  check(cudaHostGetDevicePointer(&device, const_cast<T*>(host), 0));
  return static_cast<const T*>(device);
}

}  // namespace

void gather_neighbours_cuda(Gather g, bool host_tokens, bool host_continuation, uintptr_t stream) {
  if (g.n == 0 || g.chunk_size == 0) return;
  if (host_tokens) g.tokens = device_address(g.tokens);
  if (host_continuation) g.continuation = device_address(g.continuation);
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  if (g.token_bytes == 2 && g.out_bytes == 2) return launch<uint16_t, uint16_t>(g, s);
  if (g.token_bytes == 2 && g.out_bytes == 4) return launch<uint16_t, int32_t>(g, s);
  if (g.token_bytes == 2 && g.out_bytes == 8) return launch<uint16_t, int64_t>(g, s);
  if (g.token_bytes == 4 && g.out_bytes == 4) return launch<int32_t, int32_t>(g, s);
  if (g.token_bytes == 4 && g.out_bytes == 8) return launch<int32_t, int64_t>(g, s);
  throw std::invalid_argument("gather_neighbours (CUDA): tokens of " + std::to_string(g.token_bytes) + " bytes into " +
                              std::to_string(g.out_bytes) + " bytes; 2 into 2, 4, 8 or 4 into 4, 8 are allowed.");
}

}  // namespace retro

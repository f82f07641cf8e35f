// Every native op: a plain function over addresses, sizes and, on a GPU, a stream. No torch, no Python.
// An op allocates nothing that outlives it, never synchronises, and throws std::exception with its own name in front.
#pragma once
#include <cstdint>

namespace retro {

// Neighbours out of the chunk store: row i of `out` is chunk ids[i] followed by its continuation, or by pads where
// continuation[ids[i]] is 0 or the store ends; lengths[i] counts the tokens before the row's trailing pads. -1: all pads.
// C chunks, M chunk size, n neighbours; all sizes in elements.
struct Gather {
  const void* tokens;           // [C, M] uint16 or int32, rows `row_stride` apart
  int token_bytes;              // 2: uint16, 4: int32
  int64_t row_stride;
  int64_t num_chunks;           // C
  int64_t chunk_size;           // M
  const uint8_t* continuation;  // [C] 0 or 1: chunk c + 1 continues chunk c's document
  const int64_t* ids;           // [n] -1 .. C-1
  int64_t n;
  int64_t pad_id;
  void* out;                    // [n, 2M] uint16, int32 or int64
  int out_bytes;                // 2, 4 or 8; not below token_bytes
  int32_t* lengths;             // [n]
};

enum class Advise : int { never = 0, always = 1, when_cold = 2 };

// Host memory, `threads` at most. Ids outside -1 .. C-1 throw before anything is read. A mapped file that is not in
// memory is asked for ahead (madvise WILLNEED): always, never, or as soon as a page fault had to wait for the disk.
void gather_neighbours_cpu(const Gather& g, int threads, Advise advise);

#ifdef RETRO_WITH_CUDA
// All of it in memory that the GPU reaches; `host_tokens`, `host_continuation`: pinned host memory, read in place.
// An id outside -1 .. C-1 gives a row of pads, since throwing would need a synchronisation.
void gather_neighbours_cuda(Gather g, bool host_tokens, bool host_continuation, uintptr_t stream);
#endif

}  // namespace retro

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
  const int64_t* order;         // [n] of the GPU: which rows are read one after another; null: as they stand
};

enum class Advise : int { never = 0, always = 1, when_cold = 2 };

// Host memory, `threads` at most. Ids outside -1 .. C-1 throw before anything is read. A mapped file that is not in
// memory is asked for ahead (madvise WILLNEED): always, never, or as soon as a page fault had to wait for the disk.
void gather_neighbours_cpu(const Gather& g, int threads, Advise advise);

// Block attention as retro_kernels/ops/cca/reference.py defines it, whose letters these are: computed in float32, of
// float32 or bfloat16. Strides in elements; a head's D numbers lie together.
struct Attention {
  const void* query;  // [S, N, H, D]
  int64_t query_seq, query_row, query_head;
  const void* key;  // [G, J·TK, Hkv, D]
  int64_t key_group, key_row, key_head;
  const void* value;  // likewise
  int64_t value_group, value_row, value_head;
  const float* table;  // [H, D, columns] keys of positions by reversed distance, or null
  int64_t columns;     // at least TQ + TK + 95
  const float* content_bias;   // [H, D] or null
  const float* position_bias;  // [H, D] or null
  const float* rel_bias;       // [H, TQ + TK - 1] by distance, or null
  const int64_t* lengths;      // [G, J] or null
  void* out;                   // [S, N, H, D] whole; rows before `shift` are left alone
  int64_t seqs, rows, heads, kv_heads, dim, groups, neighbours, keys, block, shift, repeat;
  float scale;
  bool bf16;  // query, key, value and out, and their gradients; all else is float32

  int64_t real(int64_t group, int64_t neighbour) const {
    return lengths == nullptr ? keys : lengths[group * neighbours + neighbour];
  }
};

// Its gradients. Those of the tables are sums over a part of the groups, to which the op adds: zero at first.
struct Gradients {
  const void* grad_out;     // [S, N, H, D] whole, as `out`
  const void* out;
  const float* table_rows;  // [H, columns, wide] keys of positions by reversed distance, or null
  void* grad_query;         // [S, N, H, D] whole; rows before `shift` are left alone
  void* grad_key;           // [G, J, TK, Hkv, D] whole
  void* grad_value;         // likewise
  float* grad_table;        // [parts, H, columns, wide]
  float* grad_bias;         // [parts, H, columns] by reversed distance
  float* grad_content;      // [parts, H, D]
  float* grad_position;     // [parts, H, D]
  int64_t parts, wide;      // wide: a multiple of 32, at least D
};

bool attend_cpu_works();

// From now on OpenMP's loops of the calling thread, torch's among them, run on so many threads; those of other threads
// are left alone. False where this was built without OpenMP.
bool limit_threads(int threads);

// The same bits for every number of threads.
void attend_cpu(const Attention& a, int threads);
void attend_backward_cpu(const Attention& a, const Gradients& g, int threads);

#ifdef RETRO_WITH_CUDA
// All of it in memory that the GPU reaches; `host_tokens`, `host_continuation`: pinned host memory, read in place.
// An id outside -1 .. C-1 gives a row of pads, since throwing would need a synchronisation.
void gather_neighbours_cuda(Gather g, bool host_tokens, bool host_continuation, uintptr_t stream);

// One new token or a few of every sequence against encoder states that are keys and values at once. Everything lies in
// one piece, in fp16 (`half`) or bf16; `splits` programs share the neighbours of a row. Each leaves a part of its own, or,
// as a `cluster`, they merge the parts. It may begin before the launch before it in the stream has ended, which must write
// nothing of what is given but query and rel.
struct AbsorbedDecode {
  const void* query;     // [B, T, H, E]
  const void* states;    // [B, K, R, E]
  const void* rows;      // integers of `row_bytes` [B, T]: rows of attending chunks, -1 where there is none
  const void* rel;       // [H, B·T, rel_stride] logits by distance, not scaled, or null
  const void* rel_bias;  // [H, G] float32 (`bias_bytes` 4) or as the query, or null
  const void* lengths;   // integers of `length_bytes` [B, K], or null
  void* out;             // [B, T, H, E] as the query, or of parts float32 [B, T, H, splits, E]
  float* lse;            // of parts [B, T, H, splits], in units of log 2, or null
  float scale_log2;
  int batch, tokens, heads, width, neighbours, keys, columns, rel_stride, splits;
  int row_bytes, length_bytes, bias_bytes;  // 4 or 8; 2 or 4
  bool half, cluster;
  int key_tiles;      // of a neighbour, and its inverse in units of 2^-32; the op sets them
  uint64_t inverse;
};

constexpr int kAbsorbedDecodeKeys = 32;  // states of one tile

// Query rows of a sequence that one program takes.
constexpr int absorbed_decode_rows(int of_sequence) { return of_sequence <= 16 ? 16 : 32; }

// Whether states so wide, of so many neighbours of so many keys, can be taken on the current GPU, with so many rows.
bool absorbed_decode_takes(int width, int neighbours, int keys, int of_sequence);
// How many clusters of `splits` programs run at the same time on the current GPU; 0 where it has none so large.
int absorbed_decode_clusters(AbsorbedDecode d);
void absorbed_decode_cuda(AbsorbedDecode d, uintptr_t stream);
#endif

}  // namespace retro

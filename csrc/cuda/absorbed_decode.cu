// Attention of a few query rows to encoder states that are keys and values at once, for all heads: a program reads the
// states of its share of the neighbours once, for up to 32 rows.
//
// The width is cut over the eight warps. A warp multiplies its part of query and states, the parts of the logits meet in
// shared memory, and each warp adds the weighted states of its own columns, which it has still there. So every state
// passes twice from shared memory to the matrix units, and the query, whose fragments stay in registers, never again.
//
// A tile takes about as long to come as to be used, so nothing may wait in between: states come as bulk copies of whole
// rows, which cost the warps no instructions, one or two tiles ahead; the first before the launch that makes the query
// has ended. Logits by distance are the same for all neighbours, and are fetched once.
//
// Programs that share the keys of a row leave a part of it each, or form a cluster, which merges the parts.
//
// Tensor cores by mma.sync: warpgroup products would need tiles of 64 states, of which shared memory has no second. sm_90
// has what all of this needs; older GPUs have the kernel in Triton.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../ops.h"
#include "check.h"
#include "ptx.h"

namespace retro {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = kAbsorbedDecodeKeys;
constexpr int kPad = 8;         // elements behind a row, so that eight rows lie in different banks
constexpr int kPartRow = 40;    // floats of a row of partial logits, likewise
constexpr int kNearPad = 32;    // elements behind a row of logits by distance, likewise

void check(cudaError_t error) { retro::check(error, "absorbed_decode"); }

[[maybe_unused]] __device__ int64_t integer(const void* p, int bytes, int64_t i) {
  return bytes == 8 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

template <class T>
__device__ T rounded(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

template <class T>
__device__ uint32_t pair(float low, float high) {
  const T both[2] = {rounded<T>(low), rounded<T>(high)};
  uint32_t word;
  memcpy(&word, both, 4);
  return word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The parts of a row lie in the shared memory of the programs that made them; each of those merges some rows.
// `mine` [rows, width + 8] and its log-sum-exp `lse` [rows] are this program's. Not inlined, lest it cost the loop registers.
template <class T, int Steps, int Tiles>
__device__ __noinline__ void merge_cluster(const float* mine, const float* lse, T* out, int rows, int splits, int i_split) {
  constexpr int kWidth = 128 * Steps, kMost = 8;  // parts
  constexpr int kRowsEach = Tiles;  // of a warp, at most: each of two programs or more has half of 16 or 32
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = i_split + warp * splits, step = kWarps * splits;
  const auto there = [&](int i, int n, int other) {
    return of_cluster<float4>(mine + (first + i * step) * (kWidth + kPad) + 128 * n + 4 * lane, other);
  };
  // what comes from afar is asked for at once: the parts of the next program, and of four rows, eight lanes each, the weights
  float4 next[kRowsEach][Steps];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
    for (int n = 0; n < Steps; ++n)
      if (first + i * step < rows) next[i][n] = there(i, n, i_split + 1 < splits ? i_split + 1 : 0);
  const int weighted = first + lane / kMost * step, part = lane % kMost;
  const float l = weighted < rows && part < splits ? of_cluster<float>(lse + weighted, part) : -INFINITY;
  float top = l;
#pragma unroll
  for (int offset = kMost / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  float weight = exp2f(l - (top == -INFINITY ? 0.f : top)), total = weight;
#pragma unroll
  for (int offset = kMost / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  weight = total == 0.f ? 0.f : weight / total;
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = first + i * step;
    if (row >= rows) break;
    const float own = __shfl_sync(0xffffffffu, weight, i * kMost + i_split);
    float4 merged[Steps];
#pragma unroll
    for (int n = 0; n < Steps; ++n) {
      const float4 x = *reinterpret_cast<const float4*>(mine + row * (kWidth + kPad) + 128 * n + 4 * lane);
      merged[n] = float4{own * x.x, own * x.y, own * x.z, own * x.w};
    }
#pragma unroll 1
    for (int j = 1; j < splits; ++j) {
      const int other = i_split + j < splits ? i_split + j : i_split + j - splits;
      const float w = __shfl_sync(0xffffffffu, weight, i * kMost + other);
#pragma unroll
      for (int n = 0; n < Steps; ++n) {
        const float4 x = j == 1 ? next[i][n] : there(i, n, other);
        merged[n].x += w * x.x, merged[n].y += w * x.y, merged[n].z += w * x.z, merged[n].w += w * x.w;
      }
    }
#pragma unroll
    for (int n = 0; n < Steps; ++n)
      *reinterpret_cast<uint2*>(out + row * kWidth + 128 * n + 4 * lane) =
          make_uint2(pair<T>(merged[n].x, merged[n].y), pair<T>(merged[n].z, merged[n].w));
  }
}
#endif

// Steps: width / 128. Tiles: of 16 query rows.
template <int Steps, int Tiles>
struct Sizes {
  static constexpr int width = 128 * Steps;
  static constexpr int row = width + kPad;
  static constexpr int rows = 16 * Tiles;
  // Tiles of states that are there or under way: as many as the shared memory of an H100 holds.
  static constexpr int stages = Steps < 8 || Tiles == 1 ? 3 : 2;
  static constexpr int stage_bytes = kKeys * row * 2;
  static constexpr int part_bytes = kWarps * rows * kPartRow * 4;
  static constexpr int weight_row = kKeys + kPad;
  static constexpr int weight_bytes = rows * weight_row * 2;
  static constexpr int barrier_bytes = 8 * (stages + 1);
  static int near_row(int keys) { return (keys + kKeys - 1) / kKeys * kKeys + kNearPad; }
  static int bytes(int neighbours, int keys) {
    return stages * stage_bytes + part_bytes + weight_bytes + barrier_bytes + rows * near_row(keys) * 2 + rows * 4 +
           neighbours * 4;
  }
};

// So many numbers of 16 bits in one load.
template <class T, int Count>
struct alignas(2 * Count) Few {
  T x[Count];
};

template <class T, int Steps, int Tiles>
__global__ void __launch_bounds__(kThreads, 1) absorbed_decode_kernel(AbsorbedDecode d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using S = Sizes<Steps, Tiles>;
  constexpr int Stages = S::stages;
  constexpr float kNone = -INFINITY;
  constexpr int kColumns = 16 * Steps;            // of a warp
  constexpr int kRowsEach = S::rows / kWarps;     // whose softmax a warp makes
  constexpr int kLanesEach = 32 / kRowsEach;      // of one row
  constexpr int kKeysEach = kKeys / kLanesEach;   // of one lane
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* const states = shared;
  float* const parts = reinterpret_cast<float*>(shared + Stages * S::stage_bytes);  // [warps, rows, kPartRow]
  T* const weights = reinterpret_cast<T*>(shared + Stages * S::stage_bytes + S::part_bytes);  // [rows, weight_row]
  // a stage's tile, and at last the query, has come
  uint64_t* const here_is = reinterpret_cast<uint64_t*>(shared + Stages * S::stage_bytes + S::part_bytes + S::weight_bytes);
  const int near_row = d.key_tiles * kKeys + kNearPad;
  T* const near = reinterpret_cast<T*>(here_is + Stages + 1);  // [rows, near_row] logits by distance, of every key
  float* const factors = reinterpret_cast<float*>(near + S::rows * near_row);
  int* const lengths = reinterpret_cast<int*>(factors + S::rows);  // [neighbours]
  // of the rows, until the first tile's factors and weights: where in its chunk the token is, where its logits by distance
  int* const positions = reinterpret_cast<int*>(factors);
  int64_t* const rel_rows = reinterpret_cast<int64_t*>(weights);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, quad = lane % 4;
  const int of_sequence = d.tokens * d.heads;
  const int row_tiles = (of_sequence + S::rows - 1) / S::rows;
  const int i_split = blockIdx.x % d.splits;
  const int first_row = blockIdx.x / d.splits % row_tiles * S::rows;
  const int64_t i_b = blockIdx.x / (d.splits * row_tiles);
  const int all_tiles = d.neighbours * d.key_tiles;
  const int per_split = (all_tiles + d.splits - 1) / d.splits;
  const int begin = i_split * per_split, end = min(all_tiles, begin + per_split);

  if (thread == 0) {
    for (int i = 0; i < Stages + 1; ++i) init_barrier(here_is + i, kWarps);
    end_of_init();
  }
  if (thread < S::rows) {
    const int row = first_row + thread, head = row % d.heads;
    const int64_t token = i_b * d.tokens + row / d.heads;
    positions[thread] = row < of_sequence ? static_cast<int>(integer(d.rows, d.row_bytes, token)) : -1;
    rel_rows[thread] = (int64_t(head) * d.batch * d.tokens + token) * d.rel_stride;
  }
  for (int j = thread; j < d.neighbours; j += kThreads)
    lengths[j] = d.lengths == nullptr ? d.keys
                                      : min(d.keys, int(integer(d.lengths, d.length_bytes, i_b * d.neighbours + j)));
  __syncthreads();

  const auto neighbour = [&](int tile) { return int(uint64_t(tile) * d.inverse >> 32); };
  // how many keys from the first one of a tile on are real
  const auto real_keys = [&](int tile) {
    const int j = neighbour(tile);
    return lengths[j] - (tile - j * d.key_tiles) * kKeys;
  };
  const auto next_tile = [&](int tile) {
    while (tile < end && real_keys(tile) <= 0) ++tile;
    return tile;
  };
  // `real` rows of the query or of states set out for a stage
  const auto set_out = [&](const T* from, int stage, uint64_t* barrier, int real) {
    const int mine = warp + kWarps * lane;  // row
    const int count = real > warp ? min((real - warp + kWarps - 1) / kWarps, kKeys / kWarps) : 0;  // of the warp
    if (lane == 0) expect(barrier, count * S::width * 2);
    if (lane < count)
      copy_bulk(shared_address(states) + stage * S::stage_bytes + mine * S::row * 2, from + mine * S::width, S::width * 2, barrier);
  };
  const T* const of_this = static_cast<const T*>(d.states) + i_b * d.neighbours * d.keys * S::width;
  int coming = next_tile(begin), coming_stage = 0;
  const auto load_next = [&] {
    if (coming >= end) return;
    const int j = neighbour(coming), real = min(kKeys, real_keys(coming));
    set_out(of_this + (j * d.keys + (coming - j * d.key_tiles) * kKeys) * S::width, coming_stage, here_is + coming_stage, real);
    if (real < kKeys) {  // what is not real is zeros, since a weight of zero times whatever lay there may be NaN
      for (int row = real + warp; row < kKeys; row += kWarps)
        for (int i = 8 * lane; i < S::width; i += 256)
          *reinterpret_cast<uint4*>(states + coming_stage * S::stage_bytes + (row * S::row + i) * 2) = uint4{};
      before_bulk_copies();
    }
    coming = next_tile(coming + 1);
    coming_stage = coming_stage + 1 == Stages ? 0 : coming_stage + 1;
  };
  int tile = coming;
  if constexpr (Stages > 2) load_next();
  wait_for_previous();  // which makes `query` and `rel`

  // logits by distance of the warp's rows: asked for before the copies that would hold them up, stored after those
  constexpr int kAtOnce = 128 / 32;
  const auto by_key = [&](int i, int key) {
    const int row = warp + kWarps * i, column = positions[row] + d.keys - 1 - key;
    return static_cast<const T*>(d.rel)[rel_rows[row] + min(max(column, 0), d.columns - 1)];
  };
  const auto is_row = [&](int i) { return d.rel != nullptr && first_row + warp + kWarps * i < of_sequence; };
  const int padded_keys = d.key_tiles * kKeys;
  T first_keys[kRowsEach][kAtOnce];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i)
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (is_row(i) && lane + 32 * n < padded_keys) first_keys[i][n] = by_key(i, lane + 32 * n);
  // the query comes into the stage that is filled last
  set_out(static_cast<const T*>(d.query) + (i_b * of_sequence + first_row) * S::width, Stages - 1, here_is + Stages,
          of_sequence - first_row);
  load_next();

  // the row whose softmax this lane shares in
  const int own = warp * kRowsEach + lane / kLanesEach;
  const int own_row = first_row + own;
  const int own_key = lane % kLanesEach * kKeysEach;
  const int a = positions[own], bias_row = d.rel_bias == nullptr ? 0 : own_row % d.heads * d.columns;

#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    T* const to = near + (warp + kWarps * i) * near_row;
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      if (is_row(i) && lane + 32 * n < padded_keys) to[lane + 32 * n] = first_keys[i][n];
#pragma unroll 1
    for (int key = lane + 32 * kAtOnce; is_row(i) && key < padded_keys; key += 32) to[key] = by_key(i, key);
  }

  float acc[Tiles][2 * Steps][4];
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
#pragma unroll
    for (int n = 0; n < 2 * Steps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
  float highest = kNone, sum = 0.f;

  // fragments of the query: the warp's columns of every row
  uint32_t q[Steps][Tiles][4];
  wait_for(here_is + Stages, 0);
#pragma unroll
  for (int m = 0; m < Tiles; ++m)
#pragma unroll
    for (int k = 0; k < Steps; ++k)
      load_matrices(q[k][m], shared_address(states) + (Stages - 1) * S::stage_bytes +
                                 ((16 * m + lane % 16) * S::row + warp * kColumns + 16 * k + lane / 16 * 8) * 2);

  __syncthreads();  // zeros of the first tile are there too

  for (int stage = 0, phase = 0; tile < end; tile = next_tile(tile + 1)) {
    wait_for(here_is + stage, phase);
    const uint32_t here = shared_address(states) + stage * S::stage_bytes;
    {
      float logits[Tiles][4][4] = {};
      // states as [n, k]: keys 0-7 and 8-15 of a pair of blocks, columns 0-7 and 8-15
      const uint32_t from = here + ((lane % 8 + lane / 16 * 8) * S::row + warp * kColumns + lane / 8 % 2 * 8) * 2;
#pragma unroll
      for (int k = 0; k < Steps; ++k)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t e[4];
          load_matrices(e, from + (16 * n * S::row + 16 * k) * 2);
#pragma unroll
          for (int m = 0; m < Tiles; ++m) {
            multiply<T>(logits[m][2 * n], q[k][m], e[0], e[1]);
            multiply<T>(logits[m][2 * n + 1], q[k][m], e[2], e[3]);
          }
        }
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(parts + (warp * S::rows + 16 * m + 8 * half + group) * kPartRow + 8 * n + 2 * quad) =
                make_float2(logits[m][n][2 * half], logits[m][n][2 * half + 1]);
    }
    // what positions add to the logits of this lane; the loads are under way while the warps meet
    const int j = neighbour(tile);
    const int key = (tile - j * d.key_tiles) * kKeys + own_key;
    const int column = a + d.keys - 1 - key;  // of the first key; the next are before it
    float bias[kKeysEach];
    if (d.rel_bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kKeysEach; ++i) {
        const int at = bias_row + min(max(column - i, 0), d.columns - 1);
        bias[i] = d.bias_bytes == 4 ? static_cast<const float*>(d.rel_bias)[at]
                                    : float(static_cast<const T*>(d.rel_bias)[at]);
      }
    }
    __syncthreads();
    load_next();  // to where the tile before this one was, which nobody reads any more

    float s[kKeysEach] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* part = parts + (w * S::rows + own) * kPartRow + own_key;
#pragma unroll
      for (int i = 0; i < kKeysEach; i += 2) {
        const float2 two = *reinterpret_cast<const float2*>(part + i);
        s[i] += two.x;
        s[i + 1] += two.y;
      }
    }
    Few<T, kKeysEach> by_distance;
    if (d.rel != nullptr) by_distance = *reinterpret_cast<const Few<T, kKeysEach>*>(near + own * near_row + key);
    const int real = a >= 0 ? lengths[j] - key : 0;
    float high = kNone;
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) {
      if (d.rel != nullptr) s[i] += float(by_distance.x[i]);
      s[i] *= d.scale_log2;
      if (d.rel_bias != nullptr) s[i] += 1.4426950408889634f * bias[i];
      s[i] = i < real ? s[i] : kNone;
      high = fmaxf(high, s[i]);
    }
#pragma unroll
    for (int offset = kLanesEach / 2; offset > 0; offset /= 2)
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
    high = fmaxf(high, highest);
    const float base = high == kNone ? 0.f : high;
    const float factor = exp2f(highest - base);
    highest = high;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) {
      s[i] = exp2f(s[i] - base);
      total += s[i];
    }
#pragma unroll
    for (int i = 0; i < kKeysEach; i += 2)
      *reinterpret_cast<uint32_t*>(weights + own * S::weight_row + own_key + i) = pair<T>(s[i], s[i + 1]);
#pragma unroll
    for (int offset = kLanesEach / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    sum = sum * factor + total;
    if (lane % kLanesEach == 0) factors[own] = factor;
    __syncthreads();

    float scales[Tiles][2];
    bool same = true;
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[m][half] = factors[16 * m + 8 * half + group];
        same = same && scales[m][half] == 1.f;
      }
    if (!__all_sync(0xffffffffu, same)) {
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int n = 0; n < 2 * Steps; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] *= scales[m][i / 2];
    }
    // weights as [m, k]; states as [k, n]: keys 0-7 and 8-15, columns 0-7 and 8-15
    const uint32_t p_from = shared_address(weights) + ((lane % 8 + lane / 8 % 2 * 8) * S::weight_row + lane / 16 * 8) * 2;
    const uint32_t e_from = here + ((lane % 8 + lane / 8 % 2 * 8) * S::row + warp * kColumns + lane / 16 * 8) * 2;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t p[Tiles][4];
#pragma unroll
      for (int m = 0; m < Tiles; ++m) load_matrices(p[m], p_from + (16 * m * S::weight_row + 16 * k) * 2);
#pragma unroll
      for (int n = 0; n < Steps; ++n) {
        uint32_t e[4];
        load_transposed(e, e_from + (16 * k * S::row + 16 * n) * 2);
#pragma unroll
        for (int m = 0; m < Tiles; ++m) {
          multiply<T>(acc[m][2 * n], p[m], e[0], e[1]);
          multiply<T>(acc[m][2 * n + 1], p[m], e[2], e[3]);
        }
      }
    }
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
  let_next_begin();  // not before: it would fill the few multiprocessors that are idle, and be slow there

  __syncthreads();
  if (lane % kLanesEach == 0) {
    const float lse = sum == 0.f ? kNone : highest + log2f(sum);
    factors[own] = sum == 0.f ? 0.f : 1.f / sum;
    parts[own] = lse;
    if (d.lse != nullptr && own_row < of_sequence) d.lse[(i_b * of_sequence + own_row) * d.splits + i_split] = lse;
  }
  __syncthreads();
  // `store` gets pairs of numbers of the first `rows` rows: the row, the first column, and the two
  const auto each = [&](int rows, const auto& store) {
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + group;
        if (row >= rows) continue;
        const float scale = factors[row];
#pragma unroll
        for (int n = 0; n < 2 * Steps; ++n)
          store(row, warp * kColumns + 2 * quad + 8 * n, acc[m][n][2 * half] * scale, acc[m][n][2 * half + 1] * scale);
      }
  };
  if (d.cluster) {
    constexpr int kRow = S::width + kPad;  // floats, so that eight rows lie in different banks
    static_assert(S::rows * kRow * 4 <= Stages * S::stage_bytes);
    float* const mine = reinterpret_cast<float*>(states);
    each(S::rows, [&](int row, int column, float low, float high) {
      *reinterpret_cast<float2*>(mine + row * kRow + column) = make_float2(low, high);
    });
    sync_cluster();
    merge_cluster<T, Steps, Tiles>(mine, parts, static_cast<T*>(d.out) + (i_b * of_sequence + first_row) * S::width,
                                   min(S::rows, of_sequence - first_row), d.splits, i_split);
    sync_cluster();  // nobody ends while others read
    return;
  }
  const int64_t first = i_b * of_sequence + first_row;
  if (d.splits > 1)
    each(of_sequence - first_row, [&](int row, int column, float low, float high) {
      float* const to = static_cast<float*>(d.out) + ((first + row) * d.splits + i_split) * S::width + column;
      *reinterpret_cast<float2*>(to) = make_float2(low, high);
    });
  else
    each(of_sequence - first_row, [&](int row, int column, float low, float high) {
      *reinterpret_cast<uint32_t*>(static_cast<T*>(d.out) + (first + row) * S::width + column) = pair<T>(low, high);
    });
#endif
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Calls `made` with the kernel and its launch, one thread at a time: the limit that it sets is the kernel's, and another
// number of neighbours has another one.
template <class T, int Steps, int Tiles, class Made>
void with_grid(const AbsorbedDecode& d, cudaStream_t stream, Made made) {
  using S = Sizes<Steps, Tiles>;
  const auto kernel = absorbed_decode_kernel<T, Steps, Tiles>;
  const size_t bytes = S::bytes(d.neighbours, d.keys);
  static std::mutex launching;
  const std::lock_guard<std::mutex> alone(launching);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const int64_t row_tiles = (int64_t(d.tokens) * d.heads + S::rows - 1) / S::rows;
  made(kernel, Grid{static_cast<unsigned>(d.batch * row_tiles * d.splits), kThreads, bytes, stream,
                    static_cast<unsigned>(d.cluster ? d.splits : 1), true});
}

template <class T, int Steps, class Made>
void with_grid(const AbsorbedDecode& d, cudaStream_t stream, Made made) {
  if (absorbed_decode_rows(d.tokens * d.heads) == 16)
    with_grid<T, Steps, 1>(d, stream, made);
  else
    with_grid<T, Steps, 2>(d, stream, made);
}

// Calls `made` with the steps of a width that there are kernels for; false where there are none.
template <class Made>
bool with_steps(int width, Made made) {
  switch (width) {
    case 512: made(std::integral_constant<int, 4>()); return true;
    case 768: made(std::integral_constant<int, 6>()); return true;
    case 896: made(std::integral_constant<int, 7>()); return true;
    case 1024: made(std::integral_constant<int, 8>()); return true;
    default: return false;
  }
}

template <class Made>
void with_grid(const AbsorbedDecode& d, cudaStream_t stream, Made made) {
  const bool known = with_steps(d.width, [&](auto steps) {
    if (d.half)
      with_grid<__half, steps.value>(d, stream, made);
    else
      with_grid<__nv_bfloat16, steps.value>(d, stream, made);
  });
  if (!known)
    throw std::invalid_argument("absorbed_decode (CUDA): states " + std::to_string(d.width) +
                                " wide; 512, 768, 896 and 1024 are allowed.");
}

// For what architecture the code that runs here was compiled to PTX (80, 90, …), which is what __CUDA_ARCH__ was then; 0
// where there is none.
int architecture() {
  cudaFuncAttributes code;
  if (cudaFuncGetAttributes(&code, absorbed_decode_kernel<__half, 4, 1>) == cudaSuccess) return code.ptxVersion;
  cudaGetLastError();  // built for other GPUs
  return 0;
}

}  // namespace

bool absorbed_decode_takes(int width, int neighbours, int keys, int of_sequence) {
  int bytes = 0;
  const bool known = with_steps(width, [&](auto steps) {
    bytes = absorbed_decode_rows(of_sequence) == 16 ? Sizes<steps.value, 1>::bytes(neighbours, keys)
                                                    : Sizes<steps.value, 2>::bytes(neighbours, keys);
  });
  if (!known || architecture() < 90) return false;
  const int64_t key_tiles = (keys + kKeys - 1) / kKeys, tiles = neighbours * key_tiles;
  // of offsets within a sequence, and of what is divided by a product
  if (int64_t(neighbours) * keys * width >= INT32_MAX || tiles * key_tiles >= INT32_MAX) return false;
  return bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

int absorbed_decode_clusters(AbsorbedDecode d) {
  if (d.splits < 2 || d.splits > 8) return 0;  // of more, not every GPU has any
  d.cluster = true;
  int found = 0;
  with_grid(d, nullptr, [&](auto kernel, const Grid& grid) {
    Grid alone = grid;
    alone.early = false;
    const cudaError_t error = alone.configured(
        [&](const cudaLaunchConfig_t& config) { return cudaOccupancyMaxActiveClusters(&found, kernel, &config); });
    if (error != cudaSuccess) {
      cudaGetLastError();
      found = 0;
    }
  });
  return found;
}

void absorbed_decode_cuda(AbsorbedDecode d, uintptr_t stream) {
  d.key_tiles = (d.keys + kKeys - 1) / kKeys;
  d.inverse = ((uint64_t(1) << 32) + d.key_tiles - 1) / d.key_tiles;  // exact as long as tiles · key_tiles < 2^32
  with_grid(d, reinterpret_cast<cudaStream_t>(stream),
            [&](auto kernel, const Grid& grid) { check(grid.launch(kernel, d)); });
}

}  // namespace retro

// Runs the CUDA C++ of csrc/cuda on a CPU: what those files take from CUDA's headers and from ptx.h, for tests without a
// GPU. It stands in for cuda_runtime.h, cuda_fp16.h, cuda_bf16.h and ptx.h.
//
// The threads of a block (or of a cluster of blocks) are coroutines that stop where threads wait for one another, and
// go on in random order, warps at changing speeds. So a barrier that is missing shows up as a wrong result sooner or
// later, and one that not all threads reach at once, as do threads of a warp that execute different instructions
// together. Shared memory is full of NaN before its block begins and after it ends, instructions that take its addresses
// are checked against its end, and bulk copies are made one by one, in any order, before their barrier is over. What the
// launch before writes is there only when a thread waits for that.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __noinline__

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

struct __half {
  _Float16 value;
  operator float() const { return value; }
};
inline __half __float2half_rn(float x) { return {_Float16(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

namespace on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned resting = 0;  // rounds
  const char* instruction = nullptr;
  unsigned char given[kWarp][64];
};

// One of shared memory's barriers, with the bytes that are expected and have not come.
struct CopyBarrier {
  int count, arrived = 0;
  int64_t expected = 0;
  unsigned phase = 0;
};

struct Copy {
  uint32_t target;
  const void* source;
  size_t bytes;
  uint32_t barrier;
};

struct Block {
  unsigned index;
  size_t shared_bytes;
  unsigned char* shared;
  Barrier all;
  int left;  // threads that have not ended
  std::vector<Warp> warps;
  std::vector<Copy> copies;
  std::map<uint32_t, CopyBarrier> barriers;  // by address
  std::vector<unsigned char> memory;

  Block(unsigned index, int threads, size_t bytes)
      : index(index), shared_bytes(bytes), left(threads), warps((threads + kWarp - 1) / kWarp), memory(bytes + 256, 0xff) {
    shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
    all.size = threads;
    for (Warp& warp : warps) warp.barrier.size = kWarp;
  }
};

struct Thread {
  unsigned index;
  Block* block;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  ucontext_t start;
  jmp_buf state;
  bool begun = false, done = false;
};

struct Run {
  unsigned grid = 0;
  std::vector<std::unique_ptr<Block>> cluster;  // the blocks that run now
  Barrier all;                                  // of their threads
  std::function<void()> kernel;
  std::vector<Thread> threads;
  Thread* current = nullptr;
  jmp_buf scheduler;
  unsigned copies_wait = 1;  // how many chances to be made they let pass, on average
  long events = 0;  // arrivals and ends; a round without any is a deadlock
  std::exception_ptr failure;
};

inline Run& run() {
  static Run it;
  return it;
}

inline std::mt19937& random() {
  static std::mt19937 it;
  return it;
}
inline unsigned random_number() { return static_cast<unsigned>(random()()); }
inline bool chance(unsigned one_in) { return random_number() % one_in == 0; }

inline void fail(const std::string& what) { throw std::runtime_error("CUDA on a CPU: " + what); }

inline void make_a_copy();

inline void yield() {
  Thread& self = *run().current;
  if (!self.block->copies.empty()) {
    ++run().events;
    if (chance(run().copies_wait)) make_a_copy();
  }
  if (_setjmp(self.state) == 0) _longjmp(run().scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const unsigned mine = barrier.generation;
  ++run().events;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == mine) yield();
  }
}

inline Thread& self() { return *run().current; }
inline int lane() { return self().index % kWarp; }

// What the lanes of this thread's warp give to one instruction, which all of them execute.
template <class Given>
void exchange(const char* instruction, const Given& mine, Given (&all)[kWarp]) {
  static_assert(sizeof(Given) <= sizeof(Warp::given[0]) && std::is_trivially_copyable_v<Given>);
  Warp& warp = self().block->warps[self().index / kWarp];
  if (warp.barrier.arrived == 0) warp.instruction = instruction;
  if (warp.instruction != instruction) fail(std::string(instruction) + " meets " + warp.instruction + " in a warp");
  std::memcpy(warp.given[lane()], &mine, sizeof mine);
  wait(warp.barrier);
  for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], warp.given[i], sizeof mine);
  wait(warp.barrier);
}

inline unsigned char* shared_at(uint32_t address, size_t bytes, Block* of = nullptr) {
  Block& block = of == nullptr ? *self().block : *of;
  if (address % bytes != 0) fail("address " + std::to_string(address) + " in shared memory is not aligned");
  if (address + bytes > block.shared_bytes) fail("address " + std::to_string(address) + " is behind shared memory");
  return block.shared + address;
}

inline CopyBarrier& barrier_at(uint32_t address) {
  const auto found = self().block->barriers.find(address);
  if (found == self().block->barriers.end()) fail("a barrier that was not made");
  return found->second;
}

inline void see_whether_over(CopyBarrier& barrier) {
  if (barrier.arrived > barrier.count) fail("more threads arrive at a barrier than it is for");
  if (barrier.arrived == barrier.count && barrier.expected == 0) barrier.arrived = 0, ++barrier.phase;
}

inline void make_a_copy() {
  std::vector<Copy>& copies = self().block->copies;
  std::swap(copies[random_number() % copies.size()], copies.back());
  const Copy copy = copies.back();
  copies.pop_back();
  shared_at(copy.target + copy.bytes - 16, 16);
  std::memcpy(shared_at(copy.target, 16), copy.source, copy.bytes);
  CopyBarrier& barrier = barrier_at(copy.barrier);
  barrier.expected -= copy.bytes;
  see_whether_over(barrier);
}

inline void resume(Thread& thread) {
  run().current = &thread;
  if (_setjmp(run().scheduler) == 0) {
    if (thread.begun) _longjmp(thread.state, 1);
    thread.begun = true;
    setcontext(&thread.start);
  }
}

inline void enter() {
  try {
    run().kernel();
  } catch (...) {
    run().failure = std::current_exception();
  }
  ++run().events;
  self().done = true;
  if (--self().block->left == 0) {
    if (!self().block->copies.empty() && !run().failure)
      run().failure = std::make_exception_ptr(std::runtime_error("CUDA on a CPU: a block ends before its copies are made"));
    std::fill(self().block->memory.begin(), self().block->memory.end(), 0xff);
  }
  _longjmp(run().scheduler, 1);
}

// The clusters one after another.
inline void launch(unsigned grid, unsigned block_size, size_t bytes, unsigned cluster, std::function<void()> kernel) {
  if (grid % cluster != 0) fail("a grid of " + std::to_string(grid) + " blocks in clusters of " + std::to_string(cluster));
  Run& it = run();
  it.grid = grid;
  it.kernel = std::move(kernel);
  it.failure = nullptr;
  it.copies_wait = 4u << random_number() % 3 * 4;
  it.threads = std::vector<Thread>(cluster * block_size);
  for (unsigned first = 0; first < grid; first += cluster) {
    it.cluster.clear();
    it.all = Barrier{static_cast<int>(cluster * block_size)};
    std::vector<Thread*> left;
    for (unsigned i = 0; i < cluster * block_size; ++i) {
      if (i % block_size == 0)
        it.cluster.push_back(std::make_unique<Block>(first + i / block_size, block_size, bytes));
      Thread& thread = it.threads[i];
      thread.index = i % block_size;
      thread.block = it.cluster.back().get();
      thread.begun = thread.done = false;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = kStack;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, enter, 0);
      left.push_back(&thread);
    }
    while (!left.empty()) {
      const long before = it.events;
      std::shuffle(left.begin(), left.end(), random());
      bool all = true;
      for (const auto& block : it.cluster)
        for (Warp& warp : block->warps) {
          if (warp.resting > 0)
            --warp.resting;
          else if (chance(32))
            warp.resting = 1u << random_number() % 8;
          all = all && warp.resting == 0;
        }
      for (Thread* thread : left) {
        if (thread->block->warps[thread->index / kWarp].resting > 0) continue;
        resume(*thread);
        if (it.failure) std::rethrow_exception(it.failure);
      }
      left.erase(std::remove_if(left.begin(), left.end(), [](Thread* thread) { return thread->done; }), left.end());
      if (all && it.events == before) fail("threads wait for others that have ended, or stand at another barrier");
    }
  }
  it.cluster.clear();
}

// What the launch before this one writes, and where; it is written when somebody waits for it.
struct Written {
  void* to;
  const void* from;
  size_t bytes;
};
inline std::vector<Written>& previous() {
  static std::vector<Written> it;
  return it;
}
inline void end_previous() {
  for (const Written& written : previous()) std::memcpy(written.to, written.from, written.bytes);
  previous().clear();
}

// What of the running thread `threadIdx.x` and its like are read from.
template <unsigned (*Get)()>
struct Index {
  struct X {
    operator unsigned() const { return Get(); }
  } x;
};
inline unsigned thread_index() { return self().index; }
inline unsigned block_index() { return self().block->index; }
inline unsigned grid_size() { return run().grid; }

}  // namespace on_cpu

// In what order threads run, and when copies are made.
extern "C" __attribute__((used)) inline void on_cpu_seed(unsigned seed) { on_cpu::random().seed(seed); }

extern "C" __attribute__((used)) inline void on_cpu_previous(void* to, const void* from, size_t bytes) {
  on_cpu::previous().push_back({to, from, bytes});
}

inline constexpr on_cpu::Index<on_cpu::thread_index> threadIdx{};
inline constexpr on_cpu::Index<on_cpu::block_index> blockIdx{};
inline constexpr on_cpu::Index<on_cpu::grid_size> gridDim{};

inline void __syncthreads() { on_cpu::wait(on_cpu::self().block->all); }

template <class T>
T __shfl_xor_sync(unsigned, T mine, int offset) {
  T all[on_cpu::kWarp];
  on_cpu::exchange("shfl", mine, all);
  return all[on_cpu::lane() ^ offset];
}

template <class T>
T __shfl_sync(unsigned, T mine, int lane) {
  T all[on_cpu::kWarp];
  on_cpu::exchange("shfl.idx", mine, all);
  return all[lane];
}

inline void __syncwarp() {
  char all[on_cpu::kWarp];
  on_cpu::exchange("syncwarp", 'x', all);
}

inline bool __all_sync(unsigned, bool mine) {
  bool all[on_cpu::kWarp];
  on_cpu::exchange("vote", mine, all);
  return std::all_of(all, all + on_cpu::kWarp, [](bool x) { return x; });
}

// The runtime, of a GPU of the architecture that is compiled for.
constexpr int kSharedBytes = (__CUDA_ARCH__ >= 900 ? 227 : 163) << 10;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int ptxVersion;
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? __CUDA_ARCH__ / 100 : kSharedBytes;
  return cudaSuccess;
}
// What a kernel was allowed last, whichever thread said so; `on_cpu_pause` milliseconds later its call returns.
template <class Kernel>
size_t& shared_limit(Kernel kernel) {
  static std::map<Kernel, size_t> limits;
  return limits[kernel];
}
extern "C" {
__attribute__((used)) inline int on_cpu_pause = 0;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes > kSharedBytes) on_cpu::fail(std::to_string(bytes) + " bytes of shared memory");
  shared_limit(kernel) = bytes;
  std::this_thread::sleep_for(std::chrono::milliseconds(on_cpu_pause));
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel) {
  return found->ptxVersion = __CUDA_ARCH__ / 10, cudaSuccess;
}
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class Kernel, class Job>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Job& job) {
  unsigned cluster = 1;
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
    else
      early = config->attrs[i].val.programmaticStreamSerializationAllowed;
  if (config->dynamicSmemBytes > std::max(shared_limit(kernel), size_t(48 << 10)))
    on_cpu::fail(std::to_string(config->dynamicSmemBytes) + " bytes of shared memory are more than the kernel may have");
  if (!early) on_cpu::end_previous();
  on_cpu::launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, cluster, [=] { kernel(job); });
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel, const cudaLaunchConfig_t* config) {
  return *found = 132 / config->attrs[0].val.clusterDim.x, cudaSuccess;  // the first attribute, where there are two
}
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) { return *device = host, cudaSuccess; }

namespace retro {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - on_cpu::self().block->shared);
}

// Row `row` of matrix i, eight numbers of 16 bits, lies where lane 8 · i + row says.
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  uint32_t all[on_cpu::kWarp];
  on_cpu::exchange("ldmatrix", address, all);
  for (int i = 0; i < 4; ++i)
    std::memcpy(&r[i], on_cpu::shared_at(all[8 * i + on_cpu::lane() / 4], 16) + on_cpu::lane() % 4 * 4, 4);
}

inline void load_transposed(uint32_t (&r)[4], uint32_t address) {
  uint32_t all[on_cpu::kWarp];
  on_cpu::exchange("ldmatrix.trans", address, all);
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      std::memcpy(reinterpret_cast<unsigned char*>(&r[i]) + 2 * half,
                  on_cpu::shared_at(all[8 * i + on_cpu::lane() % 4 * 2 + half], 16) + on_cpu::lane() / 4 * 2, 2);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    T a[4][2], b[2][2];
  } mine, all[on_cpu::kWarp];
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b[0], &b0, 4), std::memcpy(mine.b[1], &b1, 4);
  on_cpu::exchange("mma", mine, all);
  const int group = on_cpu::lane() / 4, quad = on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {  // row group + 8 · (i / 2), column 2 · quad + i % 2
    const int column = 2 * quad + i % 2;
    for (int k = 0; k < 16; ++k) {
      const T left = all[4 * group + k % 8 / 2].a[i / 2 + k / 8 * 2][k % 2];
      const T right = all[4 * column + k % 8 / 2].b[k / 8][k % 2];
      c[i] += float(left) * float(right);
    }
  }
}

inline void init_barrier(uint64_t* barrier, int count) { on_cpu::self().block->barriers[shared_address(barrier)] = {count}; }
inline void end_of_init() {}

inline void expect(uint64_t* barrier, int bytes) {
  on_cpu::CopyBarrier& at = on_cpu::barrier_at(shared_address(barrier));
  ++at.arrived, at.expected += bytes;
  ++on_cpu::run().events;
  on_cpu::see_whether_over(at);
}

inline void copy_bulk(uint32_t target, const void* source, int bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes % 16 != 0) on_cpu::fail("a bulk copy is not aligned");
  on_cpu::barrier_at(shared_address(barrier));
  on_cpu::self().block->copies.push_back({target, source, size_t(bytes), shared_address(barrier)});
}

inline void before_bulk_copies() {}

inline void wait_for(uint64_t* barrier, int phase) {
  while (on_cpu::barrier_at(shared_address(barrier)).phase % 2 == unsigned(phase)) on_cpu::yield();
  ++on_cpu::run().events;
  __syncwarp();
}

inline void let_next_begin() {}
inline void wait_for_previous() { on_cpu::end_previous(); }

inline void sync_cluster() { on_cpu::wait(on_cpu::run().all); }

template <class T>
T of_cluster(const float* mine, int rank) {
  T x;
  std::memcpy(&x, on_cpu::shared_at(shared_address(mine), sizeof x, on_cpu::run().cluster.at(rank).get()), sizeof x);
  return x;
}

}  // namespace retro

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../ops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(_OPENMP)
#define RETRO_VECTORS 1
#endif

namespace retro {

#ifdef RETRO_VECTORS
namespace {

constexpr int64_t kTileBytes = 64 << 10;  // of logits that exist at one time, where a few rows have no more
constexpr int64_t kAskedKeys = 32 << 10;  // numbers of a unit's keys, up to which the next one's fit the L2 beside it
constexpr int kBuffers = 16;
constexpr int64_t kAhead = 16, kLine = 16;  // rows between a row's prefetch and its use; floats of a cache line

// What one thread works in; grows to what was asked for.
class Scratch {
 public:
  float* at(int which, int64_t size) {
    std::vector<float>& buffer = buffers_[which];
    if (static_cast<int64_t>(buffer.size()) < size + 16) buffer.resize(size + 16);
    void* start = buffer.data();
    size_t space = buffer.size() * sizeof(float);
    return static_cast<float*>(std::align(64, size * sizeof(float), start, space));
  }

 private:
  std::vector<float> buffers_[kBuffers];
};

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kLanes = 8, kTall = 6, kWide = 2;
#include "attention.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr int kLanes = 16, kTall = 8, kWide = 2;
#include "attention.h"
}  // namespace avx512
#pragma GCC pop_options

using Run = void (*)(const Attention&, const Gradients*, int64_t, int64_t, int64_t, Scratch&);

Run best() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512::run;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::run;
  return nullptr;
}

}  // namespace

bool attend_cpu_works() { return best() != nullptr; }

namespace {

// `task(taken, count, scratch)` on so many threads: each takes the next number below `count` until none is left.
// OpenMP's, because torch's are the same ones: threads of our own would share the cores with those, which spin for
// milliseconds after torch's last loop.
template <class Task>
void spread(int64_t count, int threads, const Task& task) {
  std::atomic<int64_t> taken{0};
  const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel num_threads(team)
  {
    Scratch scratch;
    task(taken, count, scratch);
  }
}

Run best_or_throw() {
  if (const Run run = best()) return run;
  throw std::runtime_error("attend_cpu: this processor has no AVX2.");
}

}  // namespace

void attend_cpu(const Attention& a, int threads) {
  const Run run = best_or_throw();
  spread(a.groups * a.kv_heads, threads, [&a, run](std::atomic<int64_t>& taken, int64_t units, Scratch& scratch) {
    for (int64_t unit = taken++; unit < units;) {
      const int64_t next = taken++;
      run(a, nullptr, 0, unit, next, scratch);
      unit = next;
    }
  });
}

void attend_backward_cpu(const Attention& a, const Gradients& g, int threads) {
  const Run run = best_or_throw();
  // A task is one part and key head: nobody else adds to its sums, and its groups come in order.
  spread(g.parts * a.kv_heads, threads, [&a, &g, run](std::atomic<int64_t>& taken, int64_t tasks, Scratch& scratch) {
    for (int64_t task = taken++; task < tasks; task = taken++) {
      const int64_t part = task / a.kv_heads, head = task % a.kv_heads;
      const int64_t end = (part + 1) * a.groups / g.parts;
      for (int64_t group = part * a.groups / g.parts; group < end; ++group)
        run(a, &g, part, group * a.kv_heads + head, (group + 1) * a.kv_heads + head, scratch);
    }
  });
}
#else
bool attend_cpu_works() { return false; }
void attend_cpu(const Attention&, int) { throw std::runtime_error("attend_cpu: it is built for x86-64 by GCC with OpenMP only."); }
void attend_backward_cpu(const Attention& a, const Gradients&, int threads) { attend_cpu(a, threads); }
#endif

}  // namespace retro

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../ops.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#define RETRO_POSIX 1
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

// A function that only prefetches has no effect in GCC's eyes, which then drops every call of it: such functions have to
// be part of their caller before GCC looks.
#if defined(__GNUC__)
#define RETRO_PREFETCH(p) __builtin_prefetch(p)
#define RETRO_INLINE inline __attribute__((always_inline))
#else
#define RETRO_PREFETCH(p) (void)(p)
#define RETRO_INLINE inline
#endif

namespace retro {
namespace {

constexpr int64_t kAhead = 12;          // rows between a row's prefetch and its copy: hides one memory latency
constexpr int64_t kRowsPerTurn = 2048;  // a thread's turn: fewer are copied sooner than another thread starts
constexpr int64_t kHugeBytes = 4 << 20;   // an output from here on holds a whole huge page in any case
constexpr int64_t kRowsPerCheck = 256;  // rows between two looks at the fault counter
constexpr int64_t kStreamBytes = 32 << 20;  // an output from here on leaves the caches before anyone reads it

// Page faults of this thread that waited for a disk.
int64_t major_faults() {
#ifdef RETRO_POSIX
  rusage usage;
#ifdef RUSAGE_THREAD
  getrusage(RUSAGE_THREAD, &usage);
#else
  getrusage(RUSAGE_SELF, &usage);
#endif
  return usage.ru_majflt;
#else
  return 0;
#endif
}

// stream_chunk writes m tokens past the caches, where a store would first read from memory what it is about to replace,
// a third of all that a large gather moves. dst is aligned to 16 bytes, and m tokens of src are a multiple of 16 bytes.
// streamed: what was streamed is there for whoever this thread tells that it is done.
#ifdef __SSE2__
constexpr bool kStreams = true;

inline void streamed() { _mm_sfence(); }

template <class Token, class Out>
RETRO_INLINE void stream_chunk(const Token* src, Out* dst, const int64_t m) {
  __m128i* to = reinterpret_cast<__m128i*>(dst);
  for (int64_t c = 0; c < m; c += 16 / static_cast<int64_t>(sizeof(Token))) {
    const __m128i tokens = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + c));
    if constexpr (sizeof(Token) == sizeof(Out)) {
      _mm_stream_si128(to++, tokens);
    } else if constexpr (sizeof(Token) == 4) {
      const __m128i sign = _mm_srai_epi32(tokens, 31);
      _mm_stream_si128(to++, _mm_unpacklo_epi32(tokens, sign));
      _mm_stream_si128(to++, _mm_unpackhi_epi32(tokens, sign));
    } else {
      const __m128i zero = _mm_setzero_si128();
      for (const __m128i half : {_mm_unpacklo_epi16(tokens, zero), _mm_unpackhi_epi16(tokens, zero)}) {
        if constexpr (sizeof(Out) == 4) {
          _mm_stream_si128(to++, half);
        } else {
          _mm_stream_si128(to++, _mm_unpacklo_epi32(half, zero));
          _mm_stream_si128(to++, _mm_unpackhi_epi32(half, zero));
        }
      }
    }
  }
}
#else
constexpr bool kStreams = false;

inline void streamed() {}

template <class Token, class Out>
void stream_chunk(const Token*, Out*, int64_t) {}
#endif

template <class Token, class Out>
struct Copier {
  const Gather& g;
  const bool streams;

  const Token* row(int64_t id) const { return static_cast<const Token*>(g.tokens) + id * g.row_stride; }

  bool continues(int64_t id) const { return g.continuation[id] != 0 && id + 1 < g.num_chunks; }

  RETRO_INLINE void prefetch(int64_t i) const {
    const int64_t id = g.ids[i];
    if (id < 0) return;
    RETRO_PREFETCH(g.continuation + id);
    // The next chunk usually stands right behind; where it does not belong to the row, its lines cost little.
    const char* begin = reinterpret_cast<const char*>(row(id));
    const int64_t bytes = 2 * g.chunk_size * static_cast<int64_t>(sizeof(Token));
    for (int64_t offset = 0; offset < std::min<int64_t>(bytes, 1024); offset += 64) RETRO_PREFETCH(begin + offset);
  }

  // Reads from disk in flight for rows [begin, end), so that they overlap instead of waiting one for another.
  void will_need(int64_t begin, int64_t end) const {
#ifdef RETRO_POSIX
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = g.ids[i];
      if (id < 0) continue;
      const int64_t last = continues(id) ? id + 1 : id;
      const uintptr_t from = reinterpret_cast<uintptr_t>(row(id)) & ~(page - 1);
      const uintptr_t to = reinterpret_cast<uintptr_t>(row(last) + g.chunk_size);
      // An advice: where it cannot be followed the copy below still reads every byte.
      (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_WILLNEED);
    }
#else
    (void)begin, (void)end;
#endif
  }

  // Copies one chunk of m tokens; returns how many stand before its trailing pads. No alias: without that word, and with
  // m read from g, a store of int64 could change m, and the loop would stay scalar.
  int64_t copy_chunk(const Token* __restrict src, Out* __restrict dst, const int64_t m) const {
    if (streams)
      stream_chunk(src, dst, m);
    else
      for (int64_t c = 0; c < m; ++c) dst[c] = static_cast<Out>(src[c]);
    int64_t length = m;
    while (length > 0 && static_cast<int64_t>(src[length - 1]) == g.pad_id) --length;
    return length;
  }

  void copy(int64_t i) const {
    const int64_t m = g.chunk_size, id = g.ids[i];
    Out* dst = static_cast<Out*>(g.out) + i * 2 * m;
    const Out pad = static_cast<Out>(g.pad_id);
    int64_t length = 0;
    if (id < 0) {
      std::fill_n(dst, 2 * m, pad);
    } else {
      length = copy_chunk(row(id), dst, m);
      if (continues(id)) {
        if (const int64_t more = copy_chunk(row(id + 1), dst + m, m)) length = m + more;
      } else {
        std::fill_n(dst + m, m, pad);
      }
    }
    g.lengths[i] = static_cast<int32_t>(length);
  }

  // Rows [begin, end). `cold`: pages had to be read from disk before, so these rows' are asked for at once.
  void run(int64_t begin, int64_t end, Advise advise, bool& cold) const {
    if (advise == Advise::always || cold) will_need(begin, end);
    const bool watch = advise == Advise::when_cold;
    int64_t faults = watch && !cold ? major_faults() : 0;
    int64_t check = begin + 4;  // soon at first: if all is cold, every row before it waits for the disk alone
    for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) prefetch(i);
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) prefetch(i + kAhead);
      copy(i);
      if (watch && !cold && i == check) {
        if (major_faults() != faults) {
          will_need(i + 1, end);
          cold = true;
        }
        check += std::min<int64_t>(2 * (check - begin), kRowsPerCheck);
      }
    }
  }

  // Turn after turn until no row is left: a thread that the system lets wait holds up one turn, not half of the rows.
  void take_turns(std::atomic<int64_t>& next, Advise advise) const {
    bool cold = false;
    for (int64_t begin; (begin = next.fetch_add(kRowsPerTurn)) < g.n;)
      run(begin, std::min(begin + kRowsPerTurn, g.n), advise, cold);
    streamed();
  }
};

// Asks for huge pages under a large new output: half of the time went into its page faults. (numpy does so as well.)
void few_faults(void* out, int64_t bytes) {
#if defined(RETRO_POSIX) && defined(MADV_HUGEPAGE)
  if (bytes < kHugeBytes) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t from = (reinterpret_cast<uintptr_t>(out) + page - 1) & ~(page - 1);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(out) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  // An advice: memory that cannot have them (pinned, for one) is written all the same.
  (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

template <class Token, class Out>
void gather(const Gather& g, int threads, Advise advise) {
  const int64_t bytes = g.n * 2 * g.chunk_size * g.out_bytes;
  few_faults(g.out, bytes);
  const bool aligned = reinterpret_cast<uintptr_t>(g.out) % 16 == 0 && g.chunk_size * g.token_bytes % 16 == 0;
  const Copier<Token, Out> copier{g, kStreams && aligned && bytes >= kStreamBytes};
  const int64_t turns = (g.n + kRowsPerTurn - 1) / kRowsPerTurn;
  const int64_t wanted = std::min<int64_t>(std::max(threads, 1), turns);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> others;
  try {
    while (static_cast<int64_t>(others.size()) + 1 < wanted)
      others.emplace_back([&copier, &next, advise] { copier.take_turns(next, advise); });
  } catch (const std::system_error&) {
    // No more threads to be had: these do the rest.
  }
  copier.take_turns(next, advise);
  for (std::thread& other : others) other.join();
}

void check(const Gather& g) {
  const std::string name = "gather_neighbours: ";
  if (g.token_bytes != 2 && g.token_bytes != 4)
    throw std::invalid_argument(name + "tokens have " + std::to_string(g.token_bytes) + " bytes; 2 or 4 are allowed.");
  if ((g.out_bytes != 2 && g.out_bytes != 4 && g.out_bytes != 8) || g.out_bytes < g.token_bytes)
    throw std::invalid_argument(name + std::to_string(g.out_bytes) + " bytes do not hold a token of the store.");
  for (int64_t i = 0; i < g.n; ++i)
    if (g.ids[i] < -1 || g.ids[i] >= g.num_chunks)
      throw std::invalid_argument(name + "ids has " + std::to_string(g.ids[i]) + " at flat position " +
                                  std::to_string(i) + "; the store has " + std::to_string(g.num_chunks) +
                                  " chunks, so ids run from 0 to " + std::to_string(g.num_chunks - 1) +
                                  ", and -1 is none.");
}

}  // namespace

void gather_neighbours_cpu(const Gather& g, int threads, Advise advise) {
  check(g);
  if (g.n == 0 || g.chunk_size == 0) return;
  if (g.token_bytes == 2) {
    if (g.out_bytes == 2) gather<uint16_t, uint16_t>(g, threads, advise);
    if (g.out_bytes == 4) gather<uint16_t, int32_t>(g, threads, advise);
    if (g.out_bytes == 8) gather<uint16_t, int64_t>(g, threads, advise);
  } else {
    if (g.out_bytes == 4) gather<int32_t, int32_t>(g, threads, advise);
    if (g.out_bytes == 8) gather<int32_t, int64_t>(g, threads, advise);
  }
}

}  // namespace retro

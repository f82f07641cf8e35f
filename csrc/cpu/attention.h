// One (key group, key head) of block attention, as csrc/cpu/attention.cpp includes it: once for each instruction set, in
// a namespace that says how wide a vector is (kLanes), and how many query rows (kTall) by vectors of columns (kWide) a
// product keeps in registers. No include, no template: what is defined here is compiled for that instruction set only.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Pick __attribute__((vector_size(16)));

constexpr int64_t kPanel = kLanes * kWide;  // columns of a panel

static inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }
static inline Vec splat(float x) { return x - Vec{}; }  // unlike 0 + x, which turns -0 into 0, no operation
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// exp(x) for x <= 0, zero below the smallest normal number, NaN for NaN. 2^n times a polynomial of the rest, |r| <= ln2/2.
static inline Vec exponential(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec inside = x < splat(-87.33654f) ? splat(-87.33654f) : x;  // the other way round would lose a NaN
  const Vec shifted = inside * splat(1.44269504f) + magic;
  const Vec n = shifted - magic;
  const Vec r = (inside - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + (127 << 23);  // the magic number's own bits fall out
  const Vec result = p * reinterpret_cast<Vec>(power);
  return x < splat(-87.33654f) ? Vec{} : result;
}

// c[i, 0 .. kPanel) = start[i, ..] + Σ_d a[i, d] · panel[d, ..] for kTall rows; `start` may be null, or c itself.
// Not inlined: inside `run` its addresses would not stay in registers.
__attribute__((noinline)) static void product(const float* a, int64_t a_row, int64_t a_step, const float* panel,
                                              int64_t panel_row, int64_t depth, const float* start, int64_t start_row,
                                              float* c, int64_t c_row) {
  Vec sum[kTall][kWide];
  for (int i = 0; i < kTall; ++i)
    for (int v = 0; v < kWide; ++v) sum[i][v] = start ? load(start + i * start_row + v * kLanes) : Vec{};
  for (int64_t d = 0; d < depth; ++d, a += a_step) {
    Vec b[kWide];
    for (int v = 0; v < kWide; ++v) b[v] = load(panel + d * panel_row + v * kLanes);
    for (int i = 0; i < kTall; ++i) {
      const Vec x = splat(a[i * a_row]);
      for (int v = 0; v < kWide; ++v) sum[i][v] += x * b[v];
    }
  }
  for (int i = 0; i < kTall; ++i)
    for (int v = 0; v < kWide; ++v) store(c + i * c_row + v * kLanes, sum[i][v]);
}

static int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// exp(logit - largest) in place; returns what makes the row's sum one, 0 where no logit is above -inf.
static inline float soften(float* row, int64_t width) {
  Vec top = splat(-INFINITY);
  for (int64_t c = 0; c < width; c += kLanes) top = larger(load(row + c), top);
  float largest = -INFINITY;
  for (int i = 0; i < kLanes; ++i) largest = top[i] > largest ? top[i] : largest;
  if (largest == -INFINITY) {
    bool nan = false;
    for (int64_t c = 0; c < width; ++c) nan |= row[c] != row[c];
    if (!nan) {
      memset(row, 0, width * sizeof(float));
      return 0.0f;
    }
  }
  Vec sum{};
  for (int64_t c = 0; c < width; c += kLanes) {
    const Vec weight = exponential(load(row + c) - splat(largest));
    store(row + c, weight);
    sum += weight;
  }
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return 1.0f / total;
}

// scale · (x + more) of `count` numbers, zero behind up to `wide`; `more` may be null.
static inline void widen(const float* x, const float* more, float scale, int64_t count, int64_t wide, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes)
    store(to + d, splat(scale) * (more ? load(x + d) + load(more + d) : load(x + d)));
  for (; d < count; ++d) to[d] = scale * (more ? x[d] + more[d] : x[d]);
  for (; d < wide; ++d) to[d] = 0.0f;
}

// `count` numbers of what the op was given, from number `at` on: where they lie, or in float32 in `room`.
static inline const float* taken(const Attention& a, const void* from, int64_t at, int64_t count, float* room) {
  if (!a.bf16) return static_cast<const float*>(from) + at;
  const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
  for (int64_t d = 0; d < count; ++d) {
    const uint32_t bits = static_cast<uint32_t>(halves[d]) << 16;
    memcpy(room + d, &bits, sizeof bits);
  }
  return room;
}

// Into `to` from number `at` on, rounded to the nearest, of two to the even one.
static inline void give(const Attention& a, const float* from, int64_t count, void* to, int64_t at) {
  if (!a.bf16) {
    memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(to) + at;
  for (int64_t d = 0; d < count; ++d) {
    uint32_t bits;
    memcpy(&bits, from + d, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    halves[d] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// Numbers of a cache line.
static inline int64_t line(const Attention& a) { return a.bf16 ? 2 * kLine : kLine; }

static inline const char* address(const Attention& a, const void* from, int64_t at) {
  return static_cast<const char*>(from) + at * (a.bf16 ? 2 : 4);
}

// Four rows become four columns: to[d · kPanel + i] = from[i · from_row + d].
static inline void turn(const float* from, int64_t from_row, int64_t dim, float* to) {
  const auto quad = [](const float* p) -> Quad { return *reinterpret_cast<const LooseQuad*>(p); };
  const Pick low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
  int64_t d = 0;
  for (; d + 4 <= dim; d += 4, to += 4 * kPanel) {
    const Quad r0 = quad(from + d), r1 = quad(from + from_row + d);
    const Quad r2 = quad(from + 2 * from_row + d), r3 = quad(from + 3 * from_row + d);
    const Quad a = __builtin_shuffle(r0, r1, low), b = __builtin_shuffle(r0, r1, high);
    const Quad e = __builtin_shuffle(r2, r3, low), f = __builtin_shuffle(r2, r3, high);
    *reinterpret_cast<LooseQuad*>(to) = __builtin_shuffle(a, e, first);
    *reinterpret_cast<LooseQuad*>(to + kPanel) = __builtin_shuffle(a, e, second);
    *reinterpret_cast<LooseQuad*>(to + 2 * kPanel) = __builtin_shuffle(b, f, first);
    *reinterpret_cast<LooseQuad*>(to + 3 * kPanel) = __builtin_shuffle(b, f, second);
  }
  for (; d < dim; ++d, to += kPanel)
    for (int64_t i = 0; i < 4; ++i) to[i] = from[i * from_row + d];
}

// The keys of a group that exist, from number `first` on, in whole panels of one neighbour each. `across`
// [panel][D][kPanel], `along` [panel of D][key][kPanel]; either may be null. `room`: four rows.
static void pack(const Attention& a, int64_t group, const void* from, int64_t first, int64_t from_row, int64_t width,
                 float* across, float* along, float* room) {
  const int64_t dim = a.dim, wide_dim = up(dim, kPanel), step = a.bf16 ? dim : from_row;
  for (int64_t j = 0, at = 0; j < a.neighbours; ++j) {
    const int64_t real = a.real(group, j), padded = up(real, kPanel);
    for (int64_t c = 0; c < padded; c += 4, at += 4) {
      const int64_t begin = first + (j * a.keys + c) * from_row;
      const int64_t count = std::clamp<int64_t>(real - c, 0, 4), column = at % kPanel;
      for (int64_t i = 0; i < 4 && c + i + kAhead < real; ++i)
        for (int64_t d = 0; d < dim; d += line(a))
          __builtin_prefetch(address(a, from, begin + (i + kAhead) * from_row + d));
      const float* rows = room;
      for (int64_t i = count; i-- > 0;) rows = taken(a, from, begin + i * from_row, dim, room + i * dim);
      if (across) {
        float* to = across + (at - column) * dim + column;
        if (count == 4)
          turn(rows, step, dim, to);
        else
          for (int64_t d = 0; d < dim; ++d)
            for (int64_t i = 0; i < 4; ++i) to[d * kPanel + i] = i < count ? rows[i * step + d] : 0.0f;
      }
      if (along)
        for (int64_t i = 0; i < 4; ++i)
          for (int64_t d = 0; d < wide_dim; d += kPanel)
            widen(rows + i * step + d, nullptr, 1.0f, i < count ? std::min(kPanel, dim - d) : 0, kPanel,
                  along + d * width + (at + i) * kPanel);
    }
  }
}

// [keys][D], as far as they exist, into the gradient of keys or values; `nothing`, a row of zeros, behind.
static void unpack(const Attention& a, int64_t group, int64_t head, const float* from, void* to,
                   const float* nothing) {
  const int64_t dim = a.dim, wide_dim = up(dim, kPanel);
  for (int64_t j = 0, at = 0; j < a.neighbours; at += up(a.real(group, j), kPanel), ++j)
    for (int64_t c = 0; c < a.keys; ++c) {
      const int64_t row = (((group * a.neighbours + j) * a.keys + c) * a.kv_heads + head) * dim;
      give(a, c < a.real(group, j) ? from + (at + c) * wide_dim : nothing, dim, to, row);
    }
}

static inline float dot(const float* x, const float* y, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

// One unit; with `g` its gradients, those of the tables added to what part `part` has. `next` is the unit after this one:
// its keys, values and queries are asked for while this one is computed.
static void run(const Attention& a, const Gradients* g, int64_t part, int64_t unit, int64_t next, Scratch& scratch) {
  const int64_t group = unit / a.kv_heads, head = unit % a.kv_heads;
  const int64_t dim = a.dim, wide_dim = up(dim, kPanel), share = a.heads / a.kv_heads;
  const int64_t key = group * a.key_group + head * a.key_head, value = group * a.value_group + head * a.value_head;
  int64_t width = 0;
  for (int64_t j = 0; j < a.neighbours; ++j) width += up(a.real(group, j), kPanel);
  float* keys = scratch.at(0, width * dim);  // across
  float* values = scratch.at(1, width * wide_dim);  // along; across for the gradients
  float* key_rows = g ? scratch.at(9, width * wide_dim) : nullptr;
  float* room = scratch.at(15, 4 * dim);
  pack(a, group, a.key, key, a.key_row, width, keys, key_rows, room);
  pack(a, group, a.value, value, a.value_row, width, g ? values : nullptr, g ? nullptr : values, room);

  const int64_t all_keys = a.neighbours * a.keys;
  const bool ask = next < a.groups * a.kv_heads && all_keys * dim <= kAskedKeys;
  const int64_t next_key = next / a.kv_heads * a.key_group + next % a.kv_heads * a.key_head;
  const int64_t next_value = next / a.kv_heads * a.value_group + next % a.kv_heads * a.value_head;
  const int64_t per_seq = a.groups * a.repeat / a.seqs, next_block = next / a.kv_heads * a.repeat;  // in blocks
  const int64_t next_query = next_block / per_seq * a.query_seq + next % a.kv_heads * share * a.query_head +
                             (a.shift + next_block % per_seq * a.block) * a.query_row;
  const int64_t each = (all_keys - 1) / (a.repeat * share * a.block) + 1;
  int64_t asked = ask ? 0 : all_keys;

  const int64_t reach = a.block - 1 + up(a.keys, kPanel);  // columns of the table that a row or its padding reads
  const int64_t columns = up(reach, kPanel), most = up(a.block, kTall);
  const int64_t tall =
      std::min(most, std::max<int64_t>(kTall, kTileBytes / 4 / std::max<int64_t>(width, 1) / kTall * kTall));
  float* content = scratch.at(2, most * wide_dim);
  float* position = scratch.at(3, most * wide_dim);
  float* by_distance = scratch.at(4, most * std::max(columns, wide_dim));
  float* bias = scratch.at(5, kTall + columns + kPanel) + kTall;
  float* logits = scratch.at(6, tall * width + kTall);
  float* sums = scratch.at(7, most * wide_dim);
  float* shares = scratch.at(14, most);
  float *grads = nullptr, *slopes = nullptr, *key_sums = nullptr, *value_sums = nullptr, *distances = nullptr;
  if (g) {
    grads = scratch.at(8, most * wide_dim);
    slopes = scratch.at(10, tall * width + kTall);
    key_sums = scratch.at(11, up(width, kTall) * wide_dim);
    value_sums = scratch.at(12, up(width, kTall) * wide_dim);
    distances = scratch.at(13, most * columns + kTall);
    memset(key_sums, 0, width * wide_dim * sizeof(float));
    memset(value_sums, 0, width * wide_dim * sizeof(float));
  }

  for (int64_t r = 0; r < a.repeat; ++r) {
    const int64_t block = group * a.repeat + r;
    const int64_t first = a.shift + block % per_seq * a.block, seq = block / per_seq;
    const int64_t rows = std::min(a.block, a.rows - first), padded = up(rows, kTall), skipped = a.block - rows;
    for (int64_t h = head * share; h < (head + 1) * share; ++h) {
      const int64_t query = seq * a.query_seq + first * a.query_row + h * a.query_head;
      const int64_t whole = ((seq * a.rows + first) * a.heads + h) * dim, whole_row = a.heads * dim;
      const float* u = a.content_bias ? a.content_bias + h * dim : nullptr;
      const float* w = a.position_bias ? a.position_bias + h * dim : nullptr;
      for (int64_t i = 0; i < padded; ++i) {
        const int64_t some = i < rows ? dim : 0;
        const float* row = some ? taken(a, a.query, query + i * a.query_row, dim, room) : room;
        widen(row, u, a.scale, some, wide_dim, content + i * wide_dim);
        if (a.table) widen(row, w, a.scale, some, wide_dim, position + i * wide_dim);
        if (!g) continue;
        row = some ? taken(a, g->grad_out, whole + i * whole_row, dim, room) : room;
        widen(row, nullptr, 1.0f, some, wide_dim, grads + i * wide_dim);
      }
      // Row i of a block reads column rows - 1 - i + c of what is laid out by reversed distance.
      const float* start = nullptr;
      int64_t start_row = 0;
      if (a.rel_bias) {
        const int64_t all = a.block + a.keys - 1, left = all - skipped;
        for (int64_t x = -kTall; x < columns + kPanel; ++x)
          bias[x] = x >= 0 && x < left ? a.rel_bias[h * all + left - 1 - x] : 0.0f;
        start = bias + rows - 1;
        start_row = -1;
      }
      if (a.table) {
        const float* table = a.table + h * dim * a.columns + skipped;
        for (int64_t x = 0; x < rows - 1 + up(a.keys, kPanel); x += kPanel)
          for (int64_t i = 0; i < padded; i += kTall)
            product(position + i * wide_dim, wide_dim, 1, table + x, a.columns, dim, a.rel_bias ? bias + x : nullptr, 0,
                    by_distance + i * columns + x, columns);
        start = by_distance + rows - 1;
        start_row = columns - 1;
      }
      if (g) memset(distances, 0, padded * columns * sizeof(float));
      for (int64_t top = 0; top < rows; top += tall) {
        const int64_t bottom = std::min(top + tall, padded), count = std::min(bottom, rows) - top;
        for (int64_t j = 0, at = 0; j < a.neighbours; ++j) {
          const int64_t real = a.real(group, j);
          for (int64_t c = 0; c < real; c += kPanel, at += kPanel) {
            for (int64_t i = top; i < bottom; i += kTall) {
              product(content + i * wide_dim, wide_dim, 1, keys + at * dim, kPanel, dim,
                      start ? start + i * start_row + c : nullptr, start_row, logits + (i - top) * width + at, width);
              if (g)
                product(grads + i * wide_dim, wide_dim, 1, values + at * dim, kPanel, dim, nullptr, 0,
                        slopes + (i - top) * width + at, width);
            }
            for (int64_t pad = real - c; pad < kPanel; ++pad)
              for (int64_t i = top; i < bottom; ++i) logits[(i - top) * width + at + pad] = -INFINITY;
          }
        }
        for (int64_t i = top; i < bottom; ++i) {
          for (const int64_t last = std::min(asked + each, all_keys); asked < last; ++asked)
            for (int64_t d = 0; d < dim; d += line(a)) {
              __builtin_prefetch(address(a, a.key, next_key + asked * a.key_row + d), 0, 2);
              __builtin_prefetch(address(a, a.value, next_value + asked * a.value_row + d), 0, 2);
            }
          if (ask)
            for (int64_t d = 0; d < dim; d += line(a))
              __builtin_prefetch(address(a, a.query, next_query + i * a.query_row + d), 0, 2);
          float* row = logits + (i - top) * width;
          shares[i - top] = soften(row, width);
          if (g && i < rows) {  // weights, and the gradient of their logits
            float* slope = slopes + (i - top) * width;
            const Vec mean = splat(dot(grads + i * wide_dim, taken(a, g->out, whole + i * whole_row, dim, room), dim));
            for (int64_t c = 0; c < width; c += kLanes) {
              const Vec weight = load(row + c) * splat(shares[i - top]);
              store(row + c, weight);
              store(slope + c, weight * (load(slope + c) - mean));
            }
          }
        }
        for (int64_t d = 0; d < wide_dim; d += kPanel)
          for (int64_t i = top; i < bottom; i += kTall)
            product((g ? slopes : logits) + (i - top) * width, width, 1, (g ? key_rows : values) + d * width, kPanel,
                    width, nullptr, 0, sums + i * wide_dim + d, wide_dim);
        if (!g) {
          for (int64_t i = top; i < top + count; ++i) {
            for (int64_t d = 0; d < dim; ++d) room[d] = sums[i * wide_dim + d] * shares[i - top];
            give(a, room, dim, a.out, whole + i * whole_row);
          }
          continue;
        }
        for (int64_t d = 0; d < wide_dim; d += kPanel)
          for (int64_t k = 0; k < width; k += kTall) {
            float *to_key = key_sums + k * wide_dim + d, *to_value = value_sums + k * wide_dim + d;
            product(slopes + k, 1, width, content + top * wide_dim + d, wide_dim, count, to_key, wide_dim, to_key,
                    wide_dim);
            product(logits + k, 1, width, grads + top * wide_dim + d, wide_dim, count, to_value, wide_dim, to_value,
                    wide_dim);
          }
        if (start)
          for (int64_t i = top; i < top + count; ++i)
            for (int64_t j = 0, at = 0; j < a.neighbours; at += up(a.real(group, j), kPanel), ++j) {
              const float* slope = slopes + (i - top) * width + at;
              float* to = distances + i * columns + rows - 1 - i;
              for (int64_t c = 0; c < a.real(group, j); ++c) to[c] += slope[c];
            }
      }
      if (!g) continue;
      const int64_t table = (part * a.heads + h) * a.columns + skipped, left = rows - 1 + a.keys;
      float* grad_content = g->grad_content + (part * a.heads + h) * dim;
      float* grad_position = g->grad_position + (part * a.heads + h) * dim;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < dim; ++d) grad_content[d] += a.scale * sums[i * wide_dim + d];
      if (a.rel_bias)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t x = 0; x < left; ++x) g->grad_bias[table + x] += distances[i * columns + x];
      if (a.table)
        for (int64_t d = 0; d < wide_dim; d += kPanel) {
          for (int64_t x = 0; x < left; x += kTall) {
            float* to = g->grad_table + (table + x) * g->wide + d;
            product(distances + x, 1, columns, position + d, wide_dim, rows, to, g->wide, to, g->wide);
          }
          for (int64_t i = 0; i < padded; i += kTall)  // the logits by distance have been used
            product(distances + i * columns, columns, 1, g->table_rows + (h * a.columns + skipped) * g->wide + d, g->wide,
                    left, nullptr, 0, by_distance + i * wide_dim + d, wide_dim);
        }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
          const float more = a.table ? by_distance[i * wide_dim + d] : 0.0f;
          if (a.table) grad_position[d] += a.scale * more;
          room[d] = a.scale * (sums[i * wide_dim + d] + more);
        }
        give(a, room, dim, g->grad_query, whole + i * whole_row);
      }
    }
  }
  if (g) {
    memset(room, 0, dim * sizeof(float));
    unpack(a, group, head, key_sums, g->grad_key, room);
    unpack(a, group, head, value_sums, g->grad_value, room);
  }
}

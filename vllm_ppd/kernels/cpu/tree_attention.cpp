// Tree attention over vLLM's paged CPU KV cache: exact softmax, flash style.
//
// One work item is (request, KV head, range of rows). Its rows times the query heads
// of the group form M query vectors, cut into register tiles of at most kTileRows.
// For each chunk of kChunk cached tokens, and each tile: scores S = Q K^T (vectors run
// along tokens, because K is stored transposed), running max and sum, then
// O = O * alpha + P V (vectors run along the head dimension). All sums are float32.

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "simd.hpp"
#include "tiles.hpp"

namespace {

constexpr int kMaxRows = 128;
constexpr float kMasked = -1e30f;  // a hidden key; finite, so no inf - inf
constexpr float kStartMax = -1e29f;  // > kMasked: exp(kMasked - max) is always 0

// ---- one request, one KV head, a range of rows --------------------------------------

struct Layer {  // strides in elements
  int heads, kv_heads, dim, block_size;
  int64_t query_token, query_head, block, kv_head, output_token, output_head;
  float scale, softcap;
  int window;
};

struct Scratch {
  float* query;    // [M][D], packed tile by tile
  float* output;   // [M][D] running, unnormalised
  float* peak;     // [M] running max
  float* sum;      // [M][kLanes] running sums per lane
  float* scores;   // [kTileRows][kChunk]
  uint64_t* seen;  // [rows][2] in-step rows that each row sees
  int* first;      // [rows] first visible position (sliding window)
};

template <typename T>
struct Chunk {
  struct Segment {
    const T* k;
    const T* v;
    int offset, count;
  } segments[kChunk / kLanes + 1];
  int num_segments, begin, count;  // tokens begin .. begin + count
  int context;                     // the request's context length
  int first_masked;                // every row sees the tokens before this one
};

// Bit i set: token begin + i is visible to the row.
inline uint32_t visible_lanes(int begin, int context, int end, int first,
                              const uint64_t* seen) {
  const int j = begin - context;  // in-step index of lane 0
  uint64_t bits;
  if (j <= -kLanes) {
    bits = ~0ull;
  } else if (j < 0) {
    bits = (seen[0] << -j) | ((1ull << -j) - 1);
  } else if (j < 64) {
    bits = (seen[0] >> j) | (j ? seen[1] << (64 - j) : 0);
  } else {
    bits = j < kMaxRows ? seen[1] >> (j - 64) : 0;
  }
  if (begin + kLanes > end) bits &= (1ull << (end - begin)) - 1;
  // The window hides context by position; in-step rows were filtered in `seen`.
  const int hidden = std::min(first, context) - begin;
  if (hidden > 0) bits = hidden >= kLanes ? bits & 0 : bits & (~0ull << hidden);
  return static_cast<uint32_t>(bits);
}

template <typename T, int R>
void run_tile(const Chunk<T>& chunk, const Layer& layer, const Scratch& s, int m0,
              int group) {
  const int dim = layer.dim;
  for (int i = 0; i < chunk.num_segments; ++i) {
    const auto& seg = chunk.segments[i];
    const float* q = s.query + static_cast<int64_t>(m0) * dim;
    for (int t = 0; t < seg.count;) {
      const int left = (seg.count - t + kLanes - 1) / kLanes;
      float* out = s.scores + seg.offset + t;
      if (left >= kVectors) {
        score_tile<T, R, kVectors>(q, seg.k + t, layer.block_size, dim, out);
        t += kVectors * kLanes;
      } else {
        score_tile<T, R, 1>(q, seg.k + t, layer.block_size, dim, out);
        t += kLanes;
      }
    }
  }

  float alpha[R];
  const int vectors = (chunk.count + kLanes - 1) / kLanes;
  const int first_masked = chunk.first_masked / kLanes;
  for (int r = 0; r < R; ++r) {
    const int m = m0 + r, row = m / group;
    float* scores = s.scores + r * kChunk;
    vf high = splat(kMasked);
    for (int n = 0; n < vectors; ++n) {
      vf x = loadf(scores + n * kLanes) * layer.scale;
      if (layer.softcap > 0) x = tanh_vec(x * (1.f / layer.softcap)) * layer.softcap;
      if (n >= first_masked) {
        const uint32_t bits =
            visible_lanes(chunk.begin + n * kLanes, chunk.context,
                          chunk.begin + chunk.count, s.first[row], s.seen + 2 * row);
        x = (((vu{} + bits) >> (vu)iota()) & 1u) != 0u ? x : splat(kMasked);
      }
      high = x > high ? x : high;
      storef(scores + n * kLanes, x);
    }
    const float peak = std::max(s.peak[m], max_lane(high));
    vf sum = {};
    for (int n = 0; n < vectors; ++n) {
      const vf p = exp_nonpositive(loadf(scores + n * kLanes) - peak);
      sum += p;
      storef(scores + n * kLanes, p);
    }
    alpha[r] = exp_nonpositive(splat(s.peak[m] - peak))[0];
    float* total = s.sum + m * kLanes;
    storef(total, loadf(total) * alpha[r] + sum);
    s.peak[m] = peak;
  }

  for (int i = 0; i < chunk.num_segments; ++i) {
    const auto& seg = chunk.segments[i];
    const float* p = s.scores + seg.offset;
    float* o = s.output + static_cast<int64_t>(m0) * dim;
    for (int d = 0; d < dim;) {
      if (dim - d >= kVectors * kLanes) {
        value_tile<T, R, kVectors>(p, seg.v + d, seg.count, dim, alpha, o + d);
        d += kVectors * kLanes;
      } else {
        value_tile<T, R, 1>(p, seg.v + d, seg.count, dim, alpha, o + d);
        d += kLanes;
      }
    }
    for (int r = 0; r < R; ++r) alpha[r] = 1.f;  // once per chunk
  }
}

struct Plan {  // mirrors vllm_ppd/kernels/cpu/tree_attention.py
  const int32_t* block_table;    // [R][table_stride]
  const int32_t* starts;         // [R]
  const int32_t* num_rows;       // [R]
  const int32_t* context_lens;   // [R]
  const uint64_t* ancestors;     // [T][mask_words]
  const int32_t* depths;         // [T]
  int64_t num_requests, mask_words, table_stride;
  int64_t table_width, num_tokens;
};

// Rounds up to whole cache lines, in floats.
inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Thread-local memory that only grows; returns null when out of memory.
float* scratch_floats(int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < count) {
    std::free(buffer.data);
    buffer.data = static_cast<float*>(std::aligned_alloc(64, count * sizeof(float)));
    buffer.size = buffer.data ? count : 0;
  }
  return buffer.data;
}

template <typename T>
bool run_item(const Plan& plan, const Layer& layer, const T* query, const T* kv,
              T* output, int request, int kv_head, int row0, int rows) {
  const int group = layer.heads / layer.kv_heads, dim = layer.dim, M = rows * group;
  const int context = plan.context_lens[request], start = plan.starts[request];
  const int all_rows = plan.num_rows[request], total = context + all_rows;
  const int tiles = (M + kTileRows - 1) / kTileRows;
  const auto tile_begin = [&](int i) { return M * i / tiles; };  // balanced sizes

  const int64_t md = padded(int64_t{M} * dim);
  const int64_t sums = padded(int64_t{M} * kLanes);
  float* memory = scratch_floats(2 * md + padded(M) + sums + kTileRows * kChunk +
                                 padded(rows * 4) + padded(rows));
  if (!memory) return false;
  Scratch s;
  s.query = memory, s.output = s.query + md, s.peak = s.output + md;
  s.sum = s.peak + padded(M), s.scores = s.sum + sums;
  s.seen = reinterpret_cast<uint64_t*>(s.scores + kTileRows * kChunk);
  s.first = reinterpret_cast<int*>(s.seen) + padded(rows * 4);

  std::fill(s.output, s.output + md, 0.f);
  std::fill(s.peak, s.peak + M, kStartMax);
  std::fill(s.sum, s.sum + int64_t{M} * kLanes, 0.f);
  for (int i = 0; i < tiles; ++i) {
    const int m0 = tile_begin(i), count = tile_begin(i + 1) - m0;
    for (int r = 0; r < count; ++r) {
      const int m = m0 + r;
      const T* q = query + (start + row0 + m / group) * layer.query_token +
                   (kv_head * group + m % group) * layer.query_head;
      pack_query(q, r, count, dim, s.query + static_cast<int64_t>(m0) * dim);
    }
  }
  int lowest = 0, highest = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t token = start + row0 + i;
    uint64_t* seen = s.seen + 2 * i;
    seen[0] = plan.ancestors[token * plan.mask_words];
    seen[1] = plan.mask_words > 1 ? plan.ancestors[token * plan.mask_words + 1] : 0;
    s.first[i] = 0;
    if (layer.window > 0) {
      const int first = context + plan.depths[token] - layer.window + 1;
      s.first[i] = std::max(first, 0);
      for (int j = 0; j < all_rows && first > context; ++j)
        if (context + plan.depths[start + j] < first) seen[j / 64] &= ~(1ull << j % 64);
    }
    lowest = i ? std::min(lowest, s.first[i]) : s.first[i];
    highest = std::max(highest, s.first[i]);
  }

  const int32_t* table = plan.block_table + request * plan.table_stride;
  Chunk<T> chunk;
  chunk.context = context;
  for (int t = std::min(lowest, context) / kLanes * kLanes; t < total;) {
    const int end = std::min((t / kChunk + 1) * kChunk, total);
    chunk.begin = t, chunk.count = end - t, chunk.num_segments = 0;
    chunk.first_masked = t < highest ? 0 : std::max(context - t, 0);
    while (t < end) {
      const int offset = t % layer.block_size;
      const int count = std::min(end - t, layer.block_size - offset);
      const int64_t block = table[t / layer.block_size];
      const T* k = kv + block * layer.block + kv_head * layer.kv_head;
      const T* v = k + static_cast<int64_t>(layer.block_size) * dim;
      chunk.segments[chunk.num_segments++] = {
          k + offset, v + static_cast<int64_t>(offset) * dim, t - chunk.begin, count};
      t += count;
    }
    for (int i = 0; i < tiles; ++i) {
      const int m0 = tile_begin(i);
      switch (tile_begin(i + 1) - m0) {
        case 1: run_tile<T, 1>(chunk, layer, s, m0, group); break;
        case 2: run_tile<T, 2>(chunk, layer, s, m0, group); break;
        case 3: run_tile<T, 3>(chunk, layer, s, m0, group); break;
        case 4: run_tile<T, 4>(chunk, layer, s, m0, group); break;
        case 5: run_tile<T, 5>(chunk, layer, s, m0, group); break;
        default: run_tile<T, 6>(chunk, layer, s, m0, group);
      }
    }
  }

  for (int m = 0; m < M; ++m) {
    const float sum = sum_lanes(loadf(s.sum + m * kLanes));
    const float norm = sum > 0 ? 1.f / sum : 0.f;
    T* out = output + (start + row0 + m / group) * layer.output_token +
             (kv_head * group + m % group) * layer.output_head;
    for (int d = 0; d < dim; d += kLanes)
      store1(out + d, loadf(s.output + static_cast<int64_t>(m) * dim + d) * norm);
  }
  return true;
}

template <typename T>
int run_all(const Plan& plan, const Layer& layer, const void* query, const void* kv,
            void* output, int64_t num_blocks) {
  const T* q = static_cast<const T*>(query);
  const T* cache = static_cast<const T*>(kv);
  T* out = static_cast<T*>(output);
  int64_t pairs = 0;  // (row, key) pairs
  for (int r = 0; r < plan.num_requests; ++r) {
    const int64_t rows = plan.num_rows[r], start = plan.starts[r];
    if (rows > kMaxRows || rows > 64 * plan.mask_words) return 2;
    if (rows <= 0) continue;
    const int64_t context = plan.context_lens[r];
    const int64_t blocks = (context + rows - 1) / layer.block_size + 1;
    if (context < 0 || start < 0 || start + rows > plan.num_tokens ||
        blocks > plan.table_width)
      return 4;
    const int32_t* table = plan.block_table + r * plan.table_stride;
    // Blocks that lie before every row's window may be gone.
    const int64_t seen = layer.window > 0 ? context - layer.window + 1 : 0;
    for (int64_t b = std::max<int64_t>(seen, 0) / layer.block_size; b < blocks; ++b)
      if (table[b] < 0 || table[b] >= num_blocks) return 4;
    pairs += rows * (plan.context_lens[r] + rows);
  }
  // A parallel region costs a few microseconds; below this much work it does not pay.
  const bool parallel = pairs * layer.heads * layer.dim > (int64_t{1} << 18);
  const int threads = parallel ? omp_get_max_threads() : 1;
  const int items = static_cast<int>(plan.num_requests) * layer.kv_heads;
  // Few requests and many threads: cut the rows as well, at least one tile each.
  const int splits = std::max(1, std::min(threads / std::max(items, 1), kMaxRows));
  int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) reduction(| : failed) \
    if (threads > 1 && items * splits > 1)
  for (int item = 0; item < items * splits; ++item) {
    const int pair = item / splits, split = item % splits;
    const int request = pair / layer.kv_heads, head = pair % layer.kv_heads;
    const int rows = plan.num_rows[request];
    const int group = layer.heads / layer.kv_heads;
    const int parts = std::max(1, std::min(splits, rows * group / kTileRows));
    if (split >= parts) continue;
    const int row0 = rows * split / parts, row1 = rows * (split + 1) / parts;
    if (row1 <= row0) continue;
    failed |=
        !run_item<T>(plan, layer, q, cache, out, request, head, row0, row1 - row0);
  }
  return failed;
}

}  // namespace

// Returns 0, 1 (out of memory), 2 (more rows than mask bits), 3 (unknown dtype) or 4 (a
// row or a block outside its tensor; then nothing is written).
// dtype: 0 float32, 1 bfloat16, 2 float16. Strides are in elements.
extern "C" int ppd_tree_attention(
    const void* plan, const void* query, const void* kv, void* output, int64_t dtype,
    int64_t num_blocks, int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_size,
    int64_t query_token, int64_t query_head, int64_t block, int64_t kv_head,
    int64_t output_token, int64_t output_head, double scale, double softcap,
    int64_t window) {
  const Layer layer = {(int)heads, (int)kv_heads, (int)dim, (int)block_size,
                       query_token, query_head, block, kv_head,
                       output_token, output_head,
                       (float)scale, (float)softcap, (int)window};
  const Plan& p = *static_cast<const Plan*>(plan);
  if (dtype == 0) return run_all<float>(p, layer, query, kv, output, num_blocks);
  if (dtype == 1) return run_all<bf16>(p, layer, query, kv, output, num_blocks);
  if (dtype == 2) return run_all<f16>(p, layer, query, kv, output, num_blocks);
  return 3;
}

extern "C" int ppd_vector_lanes() { return kLanes; }

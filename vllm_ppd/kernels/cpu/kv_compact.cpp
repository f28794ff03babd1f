// Moves cached tokens between slots in every layer: one call over a pointer table.

#include <cstdint>
#include <cstring>

namespace {

struct CacheLayer {  // mirrors vllm_ppd/kernels/cpu/kv_compact.py; strides in bytes
  char* base;
  int64_t num_blocks, kv_heads, block_size, dim, item_size, block_stride, head_stride;
};

// A key is a column of the transposed block: dim items, block_size items apart.
template <typename T>
void copy_column(const char* from, char* to, int64_t dim, int64_t stride) {
  const T* a = reinterpret_cast<const T*>(from);
  T* b = reinterpret_cast<T*>(to);
  for (int64_t d = 0; d < dim; ++d) b[d * stride] = a[d * stride];
}

void move_head(const CacheLayer& c, int64_t head, const int64_t* src,
               const int64_t* dst, int64_t moves) {
  char* base = c.base + head * c.head_stride;
  const int64_t row = c.dim * c.item_size, values = c.block_size * row;
  for (int64_t i = 0; i < moves; ++i) {
    if (src[i] == dst[i]) continue;
    const int64_t a = src[i] % c.block_size, b = dst[i] % c.block_size;
    const char* from = base + src[i] / c.block_size * c.block_stride;
    char* to = base + dst[i] / c.block_size * c.block_stride;
    std::memcpy(to + values + b * row, from + values + a * row, row);
    from += a * c.item_size, to += b * c.item_size;
    if (c.item_size == 2) {
      copy_column<uint16_t>(from, to, c.dim, c.block_size);
    } else if (c.item_size == 4) {
      copy_column<uint32_t>(from, to, c.dim, c.block_size);
    } else {
      copy_column<uint8_t>(from, to, c.dim, c.block_size);
    }
  }
}

}  // namespace

// Copies slot src[i] to dst[i], in order, for all layers and heads. Returns 0, or
// 1 + the index of the first move that leaves a layer's cache (then nothing moved).
extern "C" int64_t ppd_kv_compact(const void* table, int64_t num_layers,
                                  const int64_t* src, const int64_t* dst,
                                  int64_t moves) {
  const CacheLayer* layers = static_cast<const CacheLayer*>(table);
  int64_t items = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    const int64_t slots = layers[l].num_blocks * layers[l].block_size;
    items += layers[l].kv_heads * layers[l].dim * moves;
    for (int64_t i = 0; i < moves; ++i)
      if (src[i] < 0 || dst[i] < 0 || src[i] >= slots || dst[i] >= slots) return i + 1;
  }
  // A parallel region costs a few microseconds; below this much work it does not pay.
#pragma omp parallel for schedule(static) if (items > (1 << 16))
  for (int64_t l = 0; l < num_layers; ++l)
    for (int64_t h = 0; h < layers[l].kv_heads; ++h)
      move_head(layers[l], h, src, dst, moves);
  return 0;
}

// Register tiles: the two small matrix products of attention.

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int kTileRows = 6;  // 6 x kVectors accumulators fit the register file
constexpr int kChunk = 128;   // cached tokens per softmax step

// The CPU multiplies pairs of bfloat16 exactly and adds them in float32: twice the
// rate of float32. Only for scores: rounding the softmax weights would cost accuracy.
template <typename T>
#if defined(__AVX512BF16__)
constexpr bool kDotProducts = std::is_same<T, bf16>::value;

template <int R, int N>
inline void score_tile_pairs(const float* q, const bf16* k, int64_t stride, int dim,
                             float* s) {
  __m512 acc[R][N] = {};
  for (int d = 0; d < dim; d += 2, k += 2 * stride) {
    __m512i pair[N];  // per token: (k[d], k[d + 1])
    if constexpr (N % 2 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n += 2) {
        const __m512i a = _mm512_loadu_si512(k + n * kLanes);
        const __m512i b = _mm512_loadu_si512(k + stride + n * kLanes);
        pair[n] = _mm512_unpacklo_epi16(a, b);
        pair[n + 1] = _mm512_unpackhi_epi16(a, b);
      }
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const vu a = __builtin_convertvector(load_as<vh>(k + n * kLanes), vu);
        const vu b = __builtin_convertvector(load_as<vh>(k + stride + n * kLanes), vu);
        pair[n] = (__m512i)(a | (b << 16));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh x = (__m512bh)_mm512_set1_ps(q[d / 2 * R + r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        acc[r][n] = _mm512_dpbf16_ps(acc[r][n], x, (__m512bh)pair[n]);
    }
  }
  // unpack left tokens 8 l + (0..3) in lane group l of the first, 8 l + (4..7) of the
  // second vector.
  const __m512i low =
      _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      __m512 x = acc[r][n];
      if constexpr (N % 2 == 0)
        x = _mm512_permutex2var_ps(acc[r][n & ~1], n & 1 ? high : low, acc[r][n | 1]);
      _mm512_storeu_ps(s + r * kChunk + n * kLanes, x);
    }
  }
}
#else
constexpr bool kDotProducts = false;
#endif

// Lays a tile's query vectors out as score_tile wants them; call once per row r.
template <typename T>
inline void pack_query(const T* query, int r, int rows, int dim, float* packed) {
  if constexpr (kDotProducts<T>) {
    for (int d = 0; d < dim; d += 2)
      std::memcpy(packed + d / 2 * rows + r, query + d, sizeof(float));
  } else {
    for (int d = 0; d < dim; d += kLanes) {
      const vf x = load1(query + d);
      for (int l = 0; l < kLanes; ++l) packed[(d + l) * rows + r] = x[l];
    }
  }
}

// s[r][0 .. N*kLanes) = q[r] . k[:, token]. k: [D][stride]; q: [D][R], or for dot
// products of pairs [D / 2][R][2].
template <typename T, int R, int N>
inline void score_tile(const float* q, const T* k, int64_t stride, int dim, float* s) {
#if defined(__AVX512BF16__)
  if constexpr (kDotProducts<T>) {
    score_tile_pairs<R, N>(q, k, stride, dim, s);
    return;
  }
#endif
  vf acc[R][N] = {};
  for (int d = 0; d < dim; ++d) {
    vf key[N];
    load_n<N>(k + d * stride, key);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(q[d * R + r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] += x * key[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if (kPaired<T, N> && n % 2 == 0) interleave(acc[r][n], acc[r][(n + 1) % N]);
      storef(s + r * kChunk + n * kLanes, acc[r][n]);
    }
  }
}

// o[r][0 .. N*kLanes) = o * alpha[r] + sum_t p[r][t] v[t]. v: [count][dim].
template <typename T, int R, int N>
inline void value_tile(const float* p, const T* v, int count, int dim,
                       const float* alpha, float* o) {
  vf acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = loadf(o + r * dim + n * kLanes) * alpha[r];
#pragma GCC unroll 8
    for (int n = 0; n + 1 < N; n += 2)
      if (kPaired<T, N>) deinterleave(acc[r][n], acc[r][n + 1]);
  }
  for (int t = 0; t < count; ++t) {
    vf value[N];
    load_n<N>(v + static_cast<int64_t>(t) * dim, value);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = splat(p[r * kChunk + t]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] += x * value[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if (kPaired<T, N> && n % 2 == 0) interleave(acc[r][n], acc[r][(n + 1) % N]);
      storef(o + r * dim + n * kLanes, acc[r][n]);
    }
  }
}

}  // namespace

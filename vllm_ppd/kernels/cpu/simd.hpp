// Float vectors of the widest ISA the compiler was told to use, conversions from and
// to bfloat16 and float16, and a few elementary functions. Only GCC/Clang vector
// extensions are used, so that one source serves every ISA.

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // vectors per register tile
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;  // 16 registers only
#else
constexpr int kLanes = 4;
constexpr int kVectors = 4;
#endif
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <typename V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf loadf(const float* p) { return load_as<vf>(p); }
inline void storef(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
inline vi iota() {
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// ---- element types ----------------------------------------------------------------

inline vf load1(const float* p) { return loadf(p); }
inline vf load1(const bf16* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
inline vf load1(const f16* p) {
  const vu h = __builtin_convertvector(load_as<vh>(p), vu);
  const vu magnitude = (h & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication: exact, and right for subnormals too.
  vf x = (vf)magnitude * splat(0x1p112f);
  const vu special = (vu)(magnitude >= (0x7c00u << 13));  // inf, nan
  x = (vf)((vu)x | (special & 0x7f800000u));
  return (vf)((vu)x | ((h & 0x8000u) << 16));
}

inline void store1(float* p, vf v) { storef(p, v); }
inline void store1(bf16* p, vf v) {
  vu u = (vu)v;
  const vu rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest even
  u = (vu)(v == v) ? rounded : (u | 0x400000u);       // nan stays nan
  const vh h = __builtin_convertvector(u >> 16, vh);
  std::memcpy(p, &h, sizeof h);
}
inline void store1(f16* p, vf v) {
  const vu u = (vu)v, sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const vu normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal half's bits with the low mantissa bits of a float.
  const vu small = (vu)((vf)a + splat(0.5f)) - 0x3f000000u;
  vu h = (vu)(a < 0x38800000u) ? small : normal;
  h = (vu)(a >= 0x477ff000u) ? (vu{} + 0x7c00u) : h;  // rounds beyond 65504
  h = (vu)(a > 0x7f800000u) ? (vu{} + 0x7e00u) : h;
  const vh half = __builtin_convertvector(h | sign, vh);
  std::memcpy(p, &half, sizeof half);
}

// Interleaves (even elements, odd elements) back to memory order, and the inverse.
inline void interleave(vf& a, vf& b) {
  const vi low = iota() / 2 + (iota() & 1) * kLanes;
  const vf x = a, y = b;
#if defined(__clang__)
  float t[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) t[2 * i] = x[i], t[2 * i + 1] = y[i];
  a = loadf(t), b = loadf(t + kLanes);
  (void)low;
#else
  a = __builtin_shuffle(x, y, low);
  b = __builtin_shuffle(x, y, low + kLanes / 2);
#endif
}
inline void deinterleave(vf& a, vf& b) {
  const vi even = iota() * 2;
  const vf x = a, y = b;
#if defined(__clang__)
  float t[2 * kLanes];
  storef(t, x), storef(t + kLanes, y);
  for (int i = 0; i < kLanes; ++i) a[i] = t[2 * i], b[i] = t[2 * i + 1];
  (void)even;
#else
  a = __builtin_shuffle(x, y, even);
  b = __builtin_shuffle(x, y, even + 1);
#endif
}

// Loads N vectors of consecutive elements. For bfloat16 and even N, each pair of
// vectors comes as (even elements, odd elements): two ops instead of four per pair.
template <typename T, int N>
constexpr bool kPaired = std::is_same<T, bf16>::value && N % 2 == 0;

template <int N, typename T>
inline void load_n(const T* p, vf (&v)[N]) {
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    if constexpr (kPaired<T, N>) {
      if (n % 2 == 0) {
        const vu w = load_as<vu>(p + n * kLanes);
        v[n] = (vf)(w << 16);
        v[n + 1] = (vf)(w & 0xffff0000u);
      }
    } else {
      v[n] = load1(p + n * kLanes);
    }
  }
}

// ---- elementary functions ---------------------------------------------------------

// exp(x) for x <= 0 within 2 ulp (Cephes polynomial); exactly 0 below -87.3.
inline vf exp_nonpositive(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vi underflow = x < splat(-87.3f);
  x = underflow ? splat(-87.3f) : x;
  const vf t = x * 1.44269504088896341f + magic;
  const vf n = t - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const vu scaled = (vu)p + (((vu)t - (vu)magic) << 23);
  return underflow ? vf{} : (vf)scaled;
}

// tanh within a few ulp; the polynomial avoids the cancellation near zero.
inline vf tanh_vec(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  const vf a = (vf)((vu)x & 0x7fffffffu);
  const vf e = exp_nonpositive(a * -2.f);
  const vf large = (vf)((vu)((1.f - e) / (1.f + e)) | sign);
  const vf z = x * x;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return a < splat(0.625f) ? p * z * x + x : large;
}

inline float max_lane(vf v) {
  float lanes[kLanes];
  storef(lanes, v);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i)
      if (lanes[i + n] > lanes[i]) lanes[i] = lanes[i + n];
  return lanes[0];
}
inline float sum_lanes(vf v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

}  // namespace

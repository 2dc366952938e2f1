// y = x W^T + b for nested weights of one level, few rows of x; see cpu_nested.py for the maths and the layouts.
//
// One of four paths is compiled, by the flags of the compiler: AVX-512 VNNI, AVX2, NEON with dot products, plain C++.
// Each gives, for 64 columns of a row, the 16 (8, 4, 1) partial integer sums of nibbles times x codes; all else is shared.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(LOWPREC_PLAIN)
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LOWPREC_VNNI
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define LOWPREC_AVX2
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define LOWPREC_NEON
#include <arm_neon.h>
#endif
#if !defined(LOWPREC_VNNI) && !defined(LOWPREC_AVX2) && !defined(LOWPREC_NEON)
#define LOWPREC_PLAIN_CODES
#endif

namespace {

constexpr int64_t CHUNK = 64;        // columns of a chunk: 32 bytes, two planes of nibbles
constexpr int64_t PLANE = 32;        // columns of a plane
constexpr int64_t BYTES = 32;        // bytes of a chunk
constexpr float LARGEST = 32639.0f;  // 127 * 256 + 127: largest code of x whose two bytes are both signed
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
constexpr int32_t OFFSET = 8;         // nibble of code 0
constexpr int64_t ROWS = 8;           // rows of weights whose factors are made together
constexpr int64_t AHEAD = 1024;      // bytes that are asked for ahead of use
constexpr int64_t GRAIN = 1 << 16;   // weights below which another thread does not pay

float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

float load(const float* x, int64_t i) { return x[i]; }
float load(const uint16_t* x, int64_t i) { return from_bf16(x[i]); }
void store(float* y, int64_t i, float value) { y[i] = value; }
void store(uint16_t* y, int64_t i, float value) { y[i] = to_bf16(value); }

// One row of x as integers: code = 256 high + low, x ~ scale * code, a scale for each group of columns, as weights have.
// `sum` has the sum of a group's codes: what one step of an offset of its weights adds. `scale` is there ROWS times.
struct Row {
  std::vector<int8_t> high, low;
  std::vector<int16_t> code;
  std::vector<int32_t> sum;
  std::vector<float> scale;

  template <typename T>
  void fill(const T* x, int64_t chunks, int64_t group, int64_t groups) {
#if defined(LOWPREC_PLAIN_CODES)
    code.assign(chunks * CHUNK, 0);
#else
    high.assign(chunks * CHUNK, 0);
    low.assign(chunks * CHUNK, 0);
#endif
    // A row that ends in half a chunk has a last sum that is no group's.
    sum.assign(groups + 1, 0);
    scale.assign(ROWS * groups, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * group;
      float largest = 0.0f, check = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : check)
      for (int64_t j = first; j < first + group; ++j) {
        const float value = load(x, j), size = std::fabs(value);
        largest = size > largest ? size : largest;
        check += value * 0.0f;
      }
      if (check != 0.0f) {
        // NaN or infinity makes the whole row NaN, as it does in a quantised activation.
        scale[g] = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      const float inverse = largest > 0.0f ? LARGEST / largest : 0.0f;
      // Where that overflows, the values are too small to matter.
      if (!std::isfinite(inverse)) continue;
      int32_t total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t j = first; j < first + group; ++j) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the lower bits: an instruction where lrintf may be a call.
        const float shifted = load(x, j) * inverse + MAGIC;
        const int32_t found = static_cast<int32_t>(shifted - MAGIC);
        total += found;
#if defined(LOWPREC_PLAIN_CODES)
        code[j] = static_cast<int16_t>(found);
#else
        low[j] = static_cast<int8_t>(found);
        high[j] = static_cast<int8_t>((found + 128) >> 8);
#endif
      }
      sum[g] = total;
      scale[g] = largest / LARGEST;
    }
    for (int64_t r = 1; r < ROWS; ++r) std::copy_n(scale.begin(), groups, scale.begin() + r * groups);
  }
};

template <bool ZERO>
inline int32_t offset_of(const int8_t* zero, int64_t group) {
  return ZERO ? OFFSET + zero[group] : OFFSET;
}

// What nibbles stand for: their value less `offset`, 8 or, of plane 1 with zero points, 8 + zero.
// `dot`: sum over a row's groups of factor times the sum of (nibble - offset) times codes. Groups are `per` chunks long or,
// where SHORT, one plane of a chunk.
#if defined(LOWPREC_VNNI)
inline __m512i nibbles(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD), _MM_HINT_T0);
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  constexpr int64_t four = 0x4000400040004;
  const __m512i shift = _mm512_set_epi64(four, four, four, four, 0, 0, 0, 0);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shift), _mm512_set1_epi8(15));
}

struct Sums {
  __m512i high = _mm512_setzero_si512(), low;

  // What the offsets take off stands in one lane of each group.
  template <bool SHORT>
  void start(int32_t first, int32_t second) {
    low = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-first));
    if (SHORT) low = _mm512_mask_set1_epi32(low, 0x100, -second);
  }

  void add(const uint8_t* at, __m512i x_high, __m512i x_low) {
    const __m512i weights = nibbles(at);
    high = _mm512_dpbusd_epi32(high, weights, x_high);
    low = _mm512_dpbusd_epi32(low, weights, x_low);
  }

  __m512 value() const { return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low)); }
};

template <bool SHORT>
inline __m512 factor_of(const float* at) {
  const __m512 first = _mm512_set1_ps(at[0]);
  return SHORT ? _mm512_mask_broadcastss_ps(first, 0xff00, _mm_load_ss(at + 1)) : first;
}

template <bool FINE, bool SHORT, bool ZERO>
float dot(
    const uint8_t* base, const uint8_t* rest, const int8_t* zero, const Row& x, const float* coarse, const float* fine,
    int64_t chunks, int64_t per, int64_t groups) {
  __m512 sums = _mm512_setzero_ps(), more = _mm512_setzero_ps();
  const int8_t *high = x.high.data(), *low = x.low.data();
  const int32_t* sum = x.sum.data();
  for (int64_t c = 0, g = 0; c < chunks; g += SHORT ? 2 : 1) {
    Sums lower, upper;
    // A row that ends in half a chunk has no second group there.
    const bool both = SHORT && g + 1 < groups;
    lower.start<SHORT>(offset_of<ZERO>(zero, g) * sum[g], both ? offset_of<ZERO>(zero, g + 1) * sum[g + 1] : 0);
    if (FINE) upper.start<SHORT>(OFFSET * sum[g], both ? OFFSET * sum[g + 1] : 0);
    for (const int64_t stop = c + per; c < stop; ++c) {
      const __m512i x_high = _mm512_loadu_si512(high + c * CHUNK), x_low = _mm512_loadu_si512(low + c * CHUNK);
      lower.add(base + c * BYTES, x_high, x_low);
      if (FINE) upper.add(rest + c * BYTES, x_high, x_low);
    }
    sums = _mm512_fmadd_ps(lower.value(), factor_of<SHORT>(coarse + g), sums);
    if (FINE) more = _mm512_fmadd_ps(upper.value(), factor_of<SHORT>(fine + g), more);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums, more));
}
#else
#if defined(LOWPREC_AVX2)
using Part = __m256;

// 32 products of a plane; nibbles are at most 15, so pairs of them stay within 16 bits.
inline Part products(__m256i weights, const int8_t* high, const int8_t* low) {
  const __m256i upper = _mm256_maddubs_epi16(weights, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  const __m256i lower = _mm256_maddubs_epi16(weights, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(
      _mm256_madd_epi16(upper, _mm256_set1_epi16(256)), _mm256_madd_epi16(lower, _mm256_set1_epi16(1))));
}

// Adds a chunk of 32 bytes: the two planes with a factor each.
inline void add(Part* sums, const uint8_t* at, const Row& x, int64_t first, const float* one, const float* two) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), mask = _mm256_set1_epi8(15);
  const int8_t *high = x.high.data() + first, *low = x.low.data() + first;
  const __m256i lower = _mm256_and_si256(both, mask), upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  sums[0] = _mm256_fmadd_ps(products(lower, high, low), _mm256_broadcast_ss(one), sums[0]);
  sums[1] = _mm256_fmadd_ps(products(upper, high + PLANE, low + PLANE), _mm256_broadcast_ss(two), sums[1]);
}

inline float total(const Part* sums) {
  const __m256 all = _mm256_add_ps(sums[0], sums[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#elif defined(LOWPREC_NEON)
using Part = float32x4_t;

inline Part products(uint8x16_t first, uint8x16_t second, const int8_t* high, const int8_t* low) {
  const int8x16_t one = vreinterpretq_s8_u8(first), two = vreinterpretq_s8_u8(second);
  int32x4_t sums = vdotq_s32(vdotq_s32(vdupq_n_s32(0), one, vld1q_s8(high)), two, vld1q_s8(high + 16));
  sums = vdotq_s32(vdotq_s32(vshlq_n_s32(sums, 8), one, vld1q_s8(low)), two, vld1q_s8(low + 16));
  return vcvtq_f32_s32(sums);
}

inline void add(Part* sums, const uint8_t* at, const Row& x, int64_t first, const float* one, const float* two) {
  const uint8x16_t mask = vdupq_n_u8(15), a = vld1q_u8(at), b = vld1q_u8(at + 16);
  const int8_t *high = x.high.data() + first, *low = x.low.data() + first;
  sums[0] = vfmaq_n_f32(sums[0], products(vandq_u8(a, mask), vandq_u8(b, mask), high, low), *one);
  sums[1] = vfmaq_n_f32(
      sums[1], products(vshrq_n_u8(a, 4), vshrq_n_u8(b, 4), high + PLANE, low + PLANE), *two);
}

inline float total(const Part* sums) { return vaddvq_f32(vaddq_f32(sums[0], sums[1])); }
#else
using Part = float;

inline void add(Part* sums, const uint8_t* at, const Row& x, int64_t first, const float* one, const float* two) {
  const int16_t* codes = x.code.data() + first;
  int32_t lower = 0, upper = 0;
  for (int64_t j = 0; j < PLANE; ++j) {
    lower += static_cast<int32_t>(at[j] & 15) * codes[j];
    upper += static_cast<int32_t>(at[j] >> 4) * codes[PLANE + j];
  }
  sums[0] += *one * static_cast<float>(lower);
  sums[1] += *two * static_cast<float>(upper);
}

inline float total(const Part* sums) { return sums[0] + sums[1]; }
#endif

template <bool FINE, bool SHORT, bool ZERO>
float dot(
    const uint8_t* base, const uint8_t* rest, const int8_t* zero, const Row& x, const float* coarse, const float* fine,
    int64_t chunks, int64_t per, int64_t groups) {
  Part sums[2] = {};
  float offset = 0.0f;
  for (int64_t c = 0, g = 0; c < chunks; g += SHORT ? 2 : 1) {
    for (int64_t at = g; at < std::min(g + 1 + SHORT, groups); ++at) {
      const float whole = static_cast<float>(x.sum[at]);
      offset += coarse[at] * static_cast<float>(offset_of<ZERO>(zero, at)) * whole;
      if (FINE) offset += fine[at] * static_cast<float>(OFFSET) * whole;
    }
    for (const int64_t stop = c + per; c < stop; ++c) {
      add(sums, base + c * BYTES, x, c * CHUNK, coarse + g, coarse + g + SHORT);
      if (FINE) add(sums, rest + c * BYTES, x, c * CHUNK, fine + g, fine + g + SHORT);
    }
  }
  return total(sums) - offset;
}
#endif

struct Weights {
  const uint8_t *base, *rest;
  const uint16_t* scale;
  const int8_t *ratio, *zero;
  int64_t chunks, groups, per;  // `per`: chunks of a group
};

// Factors of each group of some rows of weights for one row of x.
template <bool FINE>
void factors_of(const Weights& w, int64_t row, int64_t rows, const float* x_scale, float* coarse, float* fine) {
  const uint16_t* scale = w.scale + row * w.groups;
  const int8_t* ratio = FINE ? w.ratio + row * w.groups : nullptr;
  for (int64_t g = 0; g < rows * w.groups; ++g) {
    const float factor = from_bf16(scale[g]) * x_scale[g];
    coarse[g] = factor;
    if (FINE) fine[g] = factor / static_cast<float>(ratio[g]);
  }
}

template <bool FINE, bool SHORT, bool ZERO, typename T>
void rows_of(const Weights& w, const std::vector<Row>& x, int64_t m, const float* bias, T* y, int64_t n) {
  const Row* rows = x.data();
  const int64_t grain = std::max<int64_t>(1, GRAIN / (m * w.chunks * CHUNK));
  at::parallel_for(0, n, grain, [&](int64_t start, int64_t stop) {
    thread_local std::vector<float> factors;
    factors.assign(2 * (ROWS * w.groups + 1), 0.0f);
    float *coarse = factors.data(), *fine = coarse + ROWS * w.groups + 1;
    for (int64_t first = start; first < stop; first += ROWS) {
      const int64_t count = std::min(ROWS, stop - first);
      for (int64_t i = 0; i < m; ++i) {
        factors_of<FINE>(w, first, count, rows[i].scale.data(), coarse, fine);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t j = first + r, at = j * w.chunks * BYTES, group = r * w.groups;
          const float sum = dot<FINE, SHORT, ZERO>(
              w.base + at, FINE ? w.rest + at : nullptr, ZERO ? w.zero + j * w.groups : nullptr, rows[i],
              coarse + group, fine + group, w.chunks, w.per, w.groups);
          store(y, i * n + j, sum + (bias ? bias[j] : 0.0f));
        }
      }
    }
  });
}

template <bool FINE, typename T>
void gemm(const T* x, int64_t m, int64_t k, Weights w, int64_t group, const float* bias, T* y, int64_t n) {
  w.chunks = (k + CHUNK - 1) / CHUNK;
  w.groups = k / group;
  w.per = std::max<int64_t>(1, group / CHUNK);
  thread_local std::vector<Row> rows;
  if (static_cast<int64_t>(rows.size()) < m) rows.resize(m);
  for (int64_t i = 0; i < m; ++i) rows[i].fill(x + i * k, w.chunks, group, w.groups);
  if (group == PLANE) {
    w.zero ? rows_of<FINE, true, true>(w, rows, m, bias, y, n) : rows_of<FINE, true, false>(w, rows, m, bias, y, n);
  } else {
    w.zero ? rows_of<FINE, false, true>(w, rows, m, bias, y, n) : rows_of<FINE, false, false>(w, rows, m, bias, y, n);
  }
}

}  // namespace

extern "C" {

const char* lowprec_nested_path() {
#if defined(LOWPREC_VNNI)
  return "avx512-vnni";
#elif defined(LOWPREC_AVX2)
  return "avx2";
#elif defined(LOWPREC_NEON)
  return "neon-dotprod";
#else
  return "plain";
#endif
}

// x, y: float32 or, where `half`, bfloat16. `rest` null: level 4. `zero`, `bias` may be null. k a multiple of `group`,
// which is 32 or a multiple of 64; rows of base and rest are ceil(k / 64) * 32 bytes apart.
void lowprec_nested_gemm(
    const void* x, int64_t m, int64_t k, const uint8_t* base, const uint8_t* rest, const uint16_t* scale,
    const int8_t* ratio, const int8_t* zero, int64_t group, const float* bias, void* y, int64_t n, bool half) {
  const Weights w{base, rest, scale, ratio, zero, 0, 0, 0};
  const auto run = [&](auto* in, auto* out) {
    if (rest != nullptr) {
      gemm<true>(in, m, k, w, group, bias, out, n);
    } else {
      gemm<false>(in, m, k, w, group, bias, out, n);
    }
  };
  if (half) {
    run(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
  } else {
    run(static_cast<const float*>(x), static_cast<float*>(y));
  }
}
}

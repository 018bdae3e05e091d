// Attention of one token a request, over what its mask lets it see: a request reads its own columns of the cache, and
// no more. At a token a forward, reading keys and values is what takes the time, and most rows end before the longest.
//
// B requests, h heads of keys with GROUP heads of queries each, S visible columns, KEY and VALUE numbers a column.

#pragma GCC optimize("tree-loop-vectorize")  // which torch's flags turn off

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

constexpr int64_t group = GROUP, key_size = KEY, value_size = VALUE;
constexpr float hidden = -1e38f;  // masks have the lowest float, or minus infinity

// The next thing that is read is on its way while the processor is at the last one.
static inline void fetch(const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(from + i);
}

static void attend_row(const float* query, const float* key, const float* next, const float* value, const float* mask, float* out,
                       const std::vector<int64_t>& seen, std::vector<float>& weight, int64_t key_step,
                       int64_t value_step, float scale) {
  const int64_t n = seen.size();
  for (int64_t s = 0; s < n; s++) {
    const float* k = key + seen[s] * key_step;
    fetch(value + seen[s] * value_step, value_size);
    for (int64_t g = 0; g < group; g++) {
      float dot = 0;
      for (int64_t i = 0; i < key_size; i++) dot += query[g * key_size + i] * k[i];
      weight[g * n + s] = dot * scale + mask[seen[s]];
    }
  }
  for (int64_t g = 0; g < group; g++) {
    float *w = &weight[g * n], top = hidden, sum = 0;
    for (int64_t s = 0; s < n; s++) top = std::max(top, w[s]);
    for (int64_t s = 0; s < n; s++) w[s] = std::exp(w[s] - top);
    for (int64_t s = 0; s < n; s++) sum += w[s];
    for (int64_t s = 0; s < n; s++) w[s] /= sum;
  }
  float mixed[group][value_size] = {};
  for (int64_t s = 0; s < n; s++) {
    const float* v = value + seen[s] * value_step;
    fetch(next + seen[s] * key_step, key_size);
    for (int64_t g = 0; g < group; g++)
      for (int64_t i = 0; i < value_size; i++) mixed[g][i] += weight[g * n + s] * v[i];
  }
  std::copy_n(&mixed[0][0], group * value_size, out);
}

// query [B, h, GROUP, KEY] and out [B, h, GROUP, VALUE] lie end to end; key [B, h, S, KEY], value [B, h, S, VALUE] and
// mask [B, S] have the strides given, which leave out the last one, 1.
extern "C" void attend(const float* query, const float* key, const float* value, const float* mask, float* out,
                       int64_t B, int64_t h, int64_t S, const int64_t* key_strides, const int64_t* value_strides,
                       int64_t mask_stride, float scale, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<int64_t> seen;
    std::vector<float> weight(group * S);
#pragma omp for
    for (int64_t b = 0; b < B; b++) {
      const float* m = mask + b * mask_stride;
      seen.clear();
      for (int64_t s = 0; s < S; s++)
        if (m[s] > hidden) seen.push_back(s);
      for (int64_t i = 0; i < h; i++)
        attend_row(query + (b * h + i) * group * key_size, key + b * key_strides[0] + i * key_strides[1],
                   key + (i + 1 < h ? b * key_strides[0] + (i + 1) * key_strides[1] : (b + 1) * key_strides[0]),
                   value + b * value_strides[0] + i * value_strides[1], m, out + (b * h + i) * group * value_size,
                   seen, weight, key_strides[2], value_strides[2], scale);
    }
  }
}

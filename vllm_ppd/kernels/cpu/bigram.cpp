// Online learning of a bigram table: the fast form of learn_bigrams in
// vllm_ppd/trees/bigram.py. Needs simd.hpp and fill_tree.cpp.

struct OnlineTable {  // mirrored in bigram.py
  int32_t* ids;        // [V, n]
  float* gains;        // [V, n]
  float* floor;        // [V]
  float* counts;       // [V, n]
  float* totals;       // [V]
  float* base;         // [V]
  double* base_total;  // [1]
  int64_t vocabulary, n;
};

extern "C" void ppd_learn_bigrams(
    const OnlineTable* t, int64_t rows, const int64_t* tokens, const float* logits,
    int64_t num_listed, float smoothing, float max_total) {
  const int64_t vocabulary = t->vocabulary, n = t->n;
  struct Entry { float count; int32_t id; };
  std::vector<Scored> best;
  std::vector<float> weights(vocabulary + kLanes);
  std::vector<Entry> added(rows * num_listed);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits + r * vocabulary;
    top_of(row, vocabulary, num_listed, best);
    const float peak = best[0].score;
    int64_t i = 0;
    vf sums{};
    for (; i + kLanes <= vocabulary; i += kLanes) {
      const vf e = exp_nonpositive(loadf(row + i) - splat(peak));
      storef(&weights[i], e);
      sums += e;
    }
    float sum = sum_lanes(sums);
    for (; i < vocabulary; ++i) sum += weights[i] = std::exp(row[i] - peak);
    float scale = 1 / sum;
    if (!std::isfinite(sum)) {  // no distribution: such a row adds nothing
      std::fill(weights.begin(), weights.end(), 0.f);
      scale = 0;
    }
    for (int64_t c = 0; c < vocabulary; ++c) t->base[c] += weights[c] * scale;
    for (int64_t k = 0; k < num_listed; ++k)
      added[r * num_listed + k] = {weights[best[k].id] * scale, best[k].id};
  }
  *t->base_total += rows;
  const float all = (float)*t->base_total + vocabulary;

  std::vector<Entry> entries;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t u = tokens[r];
    if (std::find(tokens, tokens + r, u) != tokens + r) continue;
    float total = t->totals[u] + 1;
    const float fading = total > max_total ? 0.5f : 1.f;
    total *= fading;
    entries.clear();
    for (int64_t i = 0; i < n; ++i)
      entries.push_back({t->counts[u * n + i] * fading, t->ids[u * n + i]});
    for (int64_t k = 0; k < num_listed; ++k) {
      const Entry& entry = added[r * num_listed + k];
      int64_t i = 0;
      while (i < n && entries[i].id != entry.id) ++i;
      if (i < n)
        entries[i].count += entry.count;
      else
        entries.push_back(entry);
    }
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return a.count > b.count; });
    const float smoothed = total + smoothing;
    for (int64_t i = 0; i < n; ++i) {
      const Entry& entry = entries[i];
      const float base = (t->base[entry.id] + 1) / all;
      t->ids[u * n + i] = entry.id;
      t->counts[u * n + i] = entry.count;
      t->gains[u * n + i] = std::log((entry.count / base + smoothing) / smoothed);
    }
    t->floor[u] = std::log(smoothing / smoothed);
    t->totals[u] = total;
  }
}

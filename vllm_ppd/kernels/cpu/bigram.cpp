// A bigram table that goes on learning: see vllm_ppd/trees/bigram_learning.py, of
// which this is the fast form. Needs simd.hpp and fill_tree.cpp.

struct LiveTable {  // mirrored in learn_bigrams.py
  int32_t* ids;         // [V, n]
  float* gains;         // [V, n]
  float* floor;         // [V]
  float* counts;        // [V, n]
  float* totals;        // [V]
  float* base;          // [V]
  double* base_total;   // [1]
  int64_t vocabulary, n;
};

extern "C" void ppd_learn_bigrams(
  const LiveTable* t, int64_t rows, const int64_t* tokens, const float* logits,
  int64_t listed, float smoothing, float most) {
  const int64_t vocabulary = t->vocabulary, n = t->n;
  std::vector<Scored> best;
  std::vector<float> chances(vocabulary + kLanes);
  struct Pick { int32_t id; float chance; };
  std::vector<Pick> picks(rows * listed);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = logits + r * vocabulary;
    top_of(row, vocabulary, listed, best);
    const float peak = best[0].score;
    float sum = 0;
    int64_t i = 0;
    vf sums{};
    for (; i + kLanes <= vocabulary; i += kLanes) {
      const vf e = exp_nonpositive(loadf(row + i) - splat(peak));
      storef(&chances[i], e);
      sums += e;
    }
    sum = sum_lanes(sums);
    for (; i < vocabulary; ++i) sum += chances[i] = std::exp(row[i] - peak);
    float scale = 1 / sum;
    if (!std::isfinite(sum)) {  // no distribution: nothing is learnt of it
      std::fill(chances.begin(), chances.end(), 0.f);
      scale = 0;
    }
    for (int64_t c = 0; c < vocabulary; ++c) t->base[c] += chances[c] * scale;
    for (int64_t k = 0; k < listed; ++k)
      picks[r * listed + k] = {best[k].id, chances[best[k].id] * scale};
  }
  *t->base_total += rows;
  const float all = (float)*t->base_total + vocabulary;

  struct Entry { float count; int32_t id; };
  std::vector<Entry> entries;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t u = tokens[r];
    if (std::find(tokens, tokens + r, u) != tokens + r) continue;
    float total = t->totals[u] + 1;
    const float fading = total > most ? 0.5f : 1.f;
    total *= fading;
    entries.clear();
    for (int64_t i = 0; i < n; ++i)
      entries.push_back({t->counts[u * n + i] * fading, t->ids[u * n + i]});
    for (int64_t k = 0; k < listed; ++k) {
      const Pick& pick = picks[r * listed + k];
      int64_t i = 0;
      while (i < n && entries[i].id != pick.id) ++i;
      if (i < n)
        entries[i].count += pick.chance;
      else
        entries.push_back({pick.chance, pick.id});
    }
    std::stable_sort(entries.begin(), entries.end(),
             [](const Entry& a, const Entry& b) { return a.count > b.count; });
    const float seen = total + smoothing;
    for (int64_t i = 0; i < n; ++i) {
      const Entry& entry = entries[i];
      const float base = (t->base[entry.id] + 1) / all;
      t->ids[u * n + i] = entry.id;
      t->counts[u * n + i] = entry.count;
      t->gains[u * n + i] = std::log((entry.count / base + smoothing) / seen);
    }
    t->floor[u] = std::log(smoothing / seen);
    t->totals[u] = total;
  }
}

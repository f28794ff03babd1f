// DraftInputs of a batch: see vllm_ppd/trees/drafting.py, of which this is the fast form.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

struct FillTables {  // mirrored in fill_trees.py
  const int64_t* parents;      // [S, N]
  const int64_t* ranks;        // [S, N]
  const int64_t* depths;       // [S, N]
  const uint8_t* on_ngram;     // [S, N]
  const int64_t* num_nodes;    // [S]
  const int64_t* soft_ids;     // [S, Q]
  int64_t nodes, rows, max_rank;
  const int32_t* bigram;   // [V, n], or null
  const float* gains;          // [V, n]
  const float* floor;          // [V]
  int64_t n;
  const double* weights;       // [m]
  int64_t pool;
};

namespace {

struct Scored {
  float score;
  int32_t id;
};

// The `count` best of a row, best first; equal ones in order of their ids.
void top_of(const float* row, int64_t size, int64_t count, std::vector<Scored>& best) {
  best.clear();
  if (count <= 0) return;
  const auto better = [](const Scored& a, const Scored& b) { return a.score > b.score; };
  float least = -std::numeric_limits<float>::infinity();
  int64_t at = 0;
  for (; at < size && (int64_t)best.size() < count; ++at)
    best.push_back({row[at], (int32_t)at});
  std::stable_sort(best.begin(), best.end(), better);
  least = best.back().score;
  constexpr int64_t lanes = 32;
  while (at < size) {
    const int64_t end = std::min(at + lanes, size);
    float most = row[at];
    for (int64_t i = at; i < end; ++i) most = std::max(most, row[i]);
    if (most > least) {
      for (int64_t i = at; i < end; ++i) {
        if (row[i] <= least) continue;
        const Scored item{row[i], (int32_t)i};
        best.pop_back();
        best.insert(std::upper_bound(best.begin(), best.end(), item, better), item);
        least = best.back().score;
      }
    }
    at = end;
  }
}

}  // namespace

extern "C" void ppd_fill_trees(
  const FillTables* t, int64_t batch, const int64_t* trees, const int64_t* counts,
  const float* logits, int64_t vocabulary, const int64_t* roots,
  const int64_t* ngrams, int64_t ngram_length, int64_t* out) {
  std::vector<std::vector<Scored>> best;
  std::vector<Scored> pool;
  std::vector<std::vector<int64_t>> ranked;
  std::vector<int64_t> tokens;
  const float* prompt_rows = logits;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tree = trees[b], count = counts[b], nodes = t->num_nodes[tree];
    const int64_t* parents = t->parents + tree * t->nodes;
    const int64_t* ranks = t->ranks + tree * t->nodes;
    const int64_t* depths = t->depths + tree * t->nodes;
    const uint8_t* on_ngram = t->on_ngram + tree * t->nodes;
    int64_t* row = out + b * (t->rows - 1);
    const int64_t* soft = t->soft_ids + tree * t->rows + 1;
    std::copy(soft, soft + t->rows - 1, row);
    best.assign(count, {});
    ranked.assign(nodes, {});
    tokens.assign(nodes, 0);
    tokens[0] = roots[b];
    for (int64_t node = 1; node < nodes; ++node) {
      const int64_t parent = parents[node], depth = depths[node];
      const int64_t token = tokens[parent];
      int64_t chain = -1;
      if (on_ngram[parent] && depth <= ngram_length)
        chain = ngrams[b * ngram_length + depth - 1];
      const int64_t rank = ranks[node] - (chain >= 0);
      if (rank < 0) {
        tokens[node] = row[node - 1] = chain;
        continue;
      }
      auto& children = ranked[parent];
      if (children.empty()) {
        pool.clear();
        const int32_t* own = t->bigram ? t->bigram + token * t->n : nullptr;
        const int64_t listed = own ? t->n : 0;
        if (depth <= count) {
          const float* values = prompt_rows + (depth - 1) * vocabulary;
          auto& top = best[depth - 1];
          if (top.empty())
            top_of(values, vocabulary, std::min(t->pool, vocabulary), top);
          const float weight = (float)t->weights[depth - 1];
          pool = top;
          if (own) {
            const float* gains = t->gains + token * t->n;
            const float floor = t->floor[token];
            for (auto& item : pool) {
              float gain = floor;
              for (int64_t i = 0; i < listed; ++i)
                if (own[i] == item.id) gain = gains[i];
              item.score += weight * gain;
            }
            for (int64_t i = 0; i < listed; ++i) {
              bool there = false;
              for (const auto& item : top) there |= item.id == own[i];
              if (!there)
                pool.push_back({values[own[i]] + weight * gains[i], own[i]});
            }
          }
        } else {
          for (int64_t i = 0; i < listed; ++i) pool.push_back({-(float)i, own[i]});
        }
        if (chain >= 0)
          pool.erase(std::remove_if(pool.begin(), pool.end(),
                       [&](const Scored& s) { return s.id == chain; }),
               pool.end());
        const int64_t wanted = std::min<int64_t>(t->max_rank + 1, pool.size());
        std::stable_sort(pool.begin(), pool.end(), [](const Scored& a, const Scored& c) {
          return a.score > c.score;
        });
        for (int64_t i = 0; i < wanted; ++i) children.push_back(pool[i].id);
        // Something, even if nothing is known: token 0 is as good as any.
        while ((int64_t)children.size() <= t->max_rank) children.push_back(0);
      }
      tokens[node] = row[node - 1] = children[rank];
    }
    prompt_rows += count * vocabulary;
  }
}

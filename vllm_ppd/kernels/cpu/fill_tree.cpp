// Draft tokens of a batch: the fast form of fill_trees in vllm_ppd/trees/drafting.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct FillTables {  // mirrored in fill_tree.py
  const int64_t* parents;     // [S, N]
  const int64_t* ranks;       // [S, N]
  const int64_t* depths;      // [S, N]
  const int64_t* num_nodes;   // [S]
  const int64_t* soft_ids;    // [S, Q]
  const uint8_t* on_ngram;    // [S, N]
  const int32_t* bigram_ids;  // [V, n], or null
  const float* gains;         // [V, n]
  const float* floor;         // [V]
  const double* weights;      // [m]
  int64_t nodes, rows, max_rank, num_listed, pool;
};

namespace {

struct Scored {
  float score;
  int32_t id;
};

inline bool better(const Scored& a, const Scored& b) { return a.score > b.score; }

// The `count` best of a row, best first; equal ones in order of their ids.
void top_of(const float* row, int64_t size, int64_t count, std::vector<Scored>& best) {
  best.clear();
  if (count <= 0) return;
  int64_t at = 0;
  for (; at < size && (int64_t)best.size() < count; ++at)
    best.push_back({row[at], (int32_t)at});
  std::stable_sort(best.begin(), best.end(), better);
  float least = best.back().score;
  constexpr int64_t lanes = 32;
  while (at < size) {
    const int64_t end = std::min(at + lanes, size);
    float highest = row[at];
    for (int64_t i = at; i < end; ++i) highest = std::max(highest, row[i]);
    for (int64_t i = at; i < end && highest > least; ++i) {
      if (row[i] <= least) continue;
      const Scored item{row[i], (int32_t)i};
      best.pop_back();
      best.insert(std::upper_bound(best.begin(), best.end(), item, better), item);
      least = best.back().score;
    }
    at = end;
  }
}

// Tokens that may follow `token`, scored, where a prompt row has the logits `values`
// and the best tokens `top`.
void score_prompted(const FillTables& t, int64_t token, const float* values,
                    const std::vector<Scored>& top, float weight,
                    std::vector<Scored>& pool) {
  pool = top;
  if (!t.bigram_ids) return;
  const int32_t* listed = t.bigram_ids + token * t.num_listed;
  const float* gains = t.gains + token * t.num_listed;
  for (auto& item : pool) {
    float gain = t.floor[token];
    for (int64_t i = 0; i < t.num_listed; ++i)
      if (listed[i] == item.id) gain = gains[i];
    item.score += weight * gain;
  }
  for (int64_t i = 0; i < t.num_listed; ++i) {
    const auto same = [&](const Scored& item) { return item.id == listed[i]; };
    if (std::none_of(top.begin(), top.end(), same))
      pool.push_back({values[listed[i]] + weight * gains[i], listed[i]});
  }
}

}  // namespace

extern "C" void ppd_fill_trees(
    const FillTables* t, int64_t batch, const int64_t* trees,
    const int64_t* num_prompted, const float* logits, int64_t vocabulary,
    const int64_t* roots, const int64_t* ngrams, int64_t ngram_length, int64_t* out) {
  std::vector<std::vector<Scored>> best;
  std::vector<Scored> pool;
  std::vector<std::vector<int64_t>> ranked;
  std::vector<int64_t> tokens;
  const float* prompt_rows = logits;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tree = trees[b], count = num_prompted[b], nodes = t->num_nodes[tree];
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
      int64_t ngram = -1;
      if (on_ngram[parent] && depth <= ngram_length)
        ngram = ngrams[b * ngram_length + depth - 1];
      const int64_t rank = ranks[node] - (ngram >= 0);
      if (rank < 0) {
        tokens[node] = row[node - 1] = ngram;
        continue;
      }
      auto& children = ranked[parent];
      if (children.empty()) {
        pool.clear();
        if (depth <= count) {
          const float* values = prompt_rows + (depth - 1) * vocabulary;
          auto& top = best[depth - 1];
          if (top.empty())
            top_of(values, vocabulary, std::min(t->pool, vocabulary), top);
          score_prompted(*t, token, values, top, (float)t->weights[depth - 1], pool);
        } else if (t->bigram_ids) {
          for (int64_t i = 0; i < t->num_listed; ++i)
            pool.push_back({-(float)i, t->bigram_ids[token * t->num_listed + i]});
        }
        const auto excluded = [&](const Scored& item) { return item.id == ngram; };
        if (ngram >= 0)
          pool.erase(std::remove_if(pool.begin(), pool.end(), excluded), pool.end());
        std::stable_sort(pool.begin(), pool.end(), better);
        const int64_t size = std::min<int64_t>(t->max_rank + 1, pool.size());
        for (int64_t i = 0; i < size; ++i) children.push_back(pool[i].id);
        // A node for which no token is listed gets token 0.
        children.resize(t->max_rank + 1, 0);
      }
      tokens[node] = row[node - 1] = children[rank];
    }
    prompt_rows += count * vocabulary;
  }
}

// Greedy verification of a batch: the fast form of TreeWalk.run_greedy and kv_moves in
// vllm_ppd/trees/verify.py. Returns the number of moves.
extern "C" int64_t ppd_walk_trees(
    const int64_t* parents, int64_t nodes,  // [S, N]
    int64_t batch, const int64_t* trees, const int64_t* starts,
    const int64_t* num_nodes, const int64_t* first_nodes, const int32_t* tokens,
    const int64_t* picked, int64_t depths,  // D + 1
    int64_t* tokens_out, int64_t* paths, int64_t* lengths, int64_t* ends,
    int64_t* sources, int64_t* targets) {
  int64_t moves = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* parent = parents + trees[b] * nodes;
    const int64_t first = first_nodes[b], count = num_nodes[b];
    int64_t node = 0, level = 0;
    for (;; ++level) {
      const int64_t token = picked[first + node];
      tokens_out[b * depths + level] = token;
      paths[b * depths + level] = node;
      if (node != level) {
        sources[moves] = starts[b] + node;
        targets[moves++] = starts[b] + level;
      }
      int64_t child = node + 1;  // parents come first
      while (child < count && !(parent[child] == node && tokens[first + child] == token))
        ++child;
      if (child >= count || level + 1 >= depths) break;
      node = child;
    }
    lengths[b] = level + 1;
    ends[b] = node;
  }
  return moves;
}

// The longest earlier match of each request's last tokens, and of equally long ones the
// earliest: the fast form of match_ngrams in vllm_ppd/trees/ngram.py.
extern "C" void ppd_match_ngrams(
    const int32_t* token_ids, int64_t stride, int64_t batch, const int64_t* ends,
    int64_t context, const int64_t* lows, const int64_t* highs, int64_t num_classes,
    int64_t* classes, int64_t* drafts, int64_t num_drafts) {
  const int64_t max_length = highs[num_classes - 1];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = ends[b] > context ? ends[b] - context : 0;
    const int32_t* text = token_ids + b * stride + begin;
    const int64_t n = ends[b] - begin;
    int64_t longest = 0, match_end = 0;
    for (int64_t end = 1; end < n && longest < max_length; ++end) {
      if (text[end - 1] != text[n - 1]) continue;
      // A longer match must also match where the longest one so far ended.
      if (longest && (end <= longest || text[end - 1 - longest] != text[n - 1 - longest]))
        continue;
      int64_t length = 1;
      while (length < max_length && length < end &&
             text[end - 1 - length] == text[n - 1 - length])
        ++length;
      if (length > longest) {
        longest = length;
        match_end = end;
      }
    }
    classes[b] = 0;
    for (int64_t c = 0; c < num_classes; ++c)
      if (longest >= lows[c] && longest <= highs[c]) classes[b] = c + 1;
    int64_t* row = drafts + b * num_drafts;
    for (int64_t i = 0; i < num_drafts; ++i)
      row[i] = classes[b] && match_end + i < n ? text[match_end + i] : -1;
  }
}

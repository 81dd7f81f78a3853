// The token that is sampled from a row of logits, without sorting the row: what transformers' warpers keep, and the
// noise, decide. Where rounding could decide instead, the answer is "not known", and the caller calls the warpers. Here
// and not in isa/, as `truncate` of draft.h is and for the same reason.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "../dispatch.h"
#include "../memory.h"

namespace {

// transformers' warpers of these names, in this order; 1, 0, 1 and 0: none.
struct Warping {
  float temperature;
  int64_t top_k;
  double top_p, min_p;
};

// Scores [count] with the largest of each piece, by which most of them are passed over.
struct Pieces {
  const float* scores;
  int64_t count;
  const float* peaks;

  // Calls visit(score) for those that are at least `bound`, and for some others.
  template <class Visit>
  void each_from(float bound, Visit visit) const {
    for (int64_t at = 0, piece = 0; at < count; at += portable::kPiece, ++piece) {
      if (peaks[piece] < bound) continue;
      const int64_t end = std::min(at + portable::kPiece, count);
      for (int64_t i = at; i < end; ++i) visit(scores[i]);
    }
  }
};

// The k-th largest score, 0 < k <= count; `some` [count] is scratch. k pieces whose largest are no smaller than `bound`
// have k scores that are not.
float kth_largest(const Pieces& pieces, int64_t k, float* some) {
  const int64_t parts = (pieces.count + portable::kPiece - 1) / portable::kPiece;
  float bound = -std::numeric_limits<float>::infinity();
  if (k <= parts) {
    std::copy(pieces.peaks, pieces.peaks + parts, some);
    std::nth_element(some, some + k - 1, some + parts, std::greater<float>());
    bound = some[k - 1];
  }
  float* end = some;
  pieces.each_from(bound, [&](float score) {
    if (score >= bound) *end++ = score;
  });
  std::nth_element(some, some + k - 1, end, std::greater<float>());
  return some[k - 1];
}

// How many scores are above `bound` and how many equal it, and the sum of exp(score - top) of those above.
struct Above {
  int64_t count = 0, equal = 0;
  double mass = 0;
  Above(const Pieces& pieces, float bound, float top) {
    pieces.each_from(bound, [&](float score) {
      if (score > bound) ++count, mass += std::exp(double(score) - top);
      if (score == bound) ++equal;
    });
  }
};

enum class Kept { yes, no, unknown };

// Whether top_p keeps a score, of which all from `lowest` on have the share `total` together; the largest is `top`.
// transformers adds float32 shares, smallest first, and scores that are equal in any order.
Kept kept_by_top_p(const Pieces& pieces, double top_p, float score, float top, double total) {
  const Above above(pieces, score, top);
  if (above.count == 0 && above.equal == 1) return Kept::yes;
  const double rounding = 1e-4 + double(pieces.count) * 0x1p-25;  // sums of `count` floats, in four lanes or more
  const double share = above.mass / total, equals = double(above.equal - 1) * std::exp(double(score) - top) / total;
  if (share + equals < top_p - rounding) return Kept::yes;
  return share >= top_p + rounding ? Kept::no : Kept::unknown;
}

constexpr int kTries = 16;  // winners that are dropped before it is given up

// The token whose logit, warped, wins with the noise of `key`. -1: not known, because rounding could decide, `min_p` is
// tiny, kTries winners were dropped, a logit is no number, or there is no memory.
int64_t sampled_token(const float* logits, int64_t count, const Warping& warping, uint64_t key) {
  const float infinity = std::numeric_limits<float>::infinity();
  const bool truncates = (warping.top_k > 0 && warping.top_k < count) || warping.top_p < 1;
  Arena sizes;
  sizes.take<float>(count);
  sizes.take<int64_t>(count);
  sizes.take<float>(count);
  sizes.take<float>(count / portable::kPiece + 1);
  const Scratch scratch(sizes.used());
  if (!scratch.data) return -1;
  Arena arena(scratch.data);
  float* divided = arena.take<float>(count);
  int64_t* found = arena.take<int64_t>(count);
  float* some = arena.take<float>(count);
  float* peaks = arena.take<float>(count / portable::kPiece + 1);

  if (warping.temperature != 1) chosen->divide_row(logits, warping.temperature, count, divided);
  const float* scores = warping.temperature != 1 ? divided : logits;
  float top = 0;
  chosen->best_of(scores, count, &top);
  if (!std::isfinite(top)) return -1;
  if (truncates) chosen->piece_peaks(scores, count, peaks);
  const Pieces pieces{scores, count, peaks};

  double floor = double(top) - portable::kReach, total = 0;  // at or below it nothing wins
  float lowest = -infinity;  // that top_k keeps
  if (warping.top_k > 0 && warping.top_k < count) {
    lowest = kth_largest(pieces, warping.top_k, some);
    // below `lowest`, because `floor` itself is left out; by no denormal number: a CPU may take those for zero
    floor = std::max(floor, double(lowest) - std::max(std::fabs(double(lowest)) * 1e-12, 1e-30));
    if (warping.top_p < 1) {
      const Above kept(pieces, lowest, top);
      total = kept.mass + double(kept.equal) * std::exp(double(lowest) - top);
    }
  } else if (warping.top_p < 1) {
    total = 1.0 / chosen->top_share(scores, count, 1.0f, top);
  }
  constexpr double kRounding = 1e-5;  // of the quotient of two float32 probabilities, in nats, and much more than it is
  double surely_kept = -infinity;     // by min_p: what is above
  if (warping.min_p > 0) {
    if (warping.min_p < 1e-6) return -1;  // a share that is no normal number is rounded otherwise
    surely_kept = top + std::log(warping.min_p) + kRounding;
    floor = std::max(floor, surely_kept - 2 * kRounding);
  }

  for (int tries = 0; tries < kTries; ++tries) {
    const int64_t kept = chosen->gumbel_candidates(scores, nullptr, count, top, floor, key, found);
    double best = -infinity, second = -infinity;
    int64_t winner = -1;
    for (int64_t k = 0; k < kept; ++k) {
      const double sum = scores[found[k]] + portable::gumbel(portable::noise_bits(uint64_t(found[k]), key));
      if (sum > best) {
        second = best, best = sum, winner = found[k];
      } else if (sum > second) {
        second = sum;
      }
    }
    if (!(best - second > 1e-9)) return -1;  // logarithms of other libraries round otherwise
    const float score = scores[winner];
    if (score < lowest) {
      floor = score;
      continue;
    }
    if (score <= surely_kept && score != top) return -1;
    if (!(warping.top_p < 1)) return winner;
    switch (kept_by_top_p(pieces, warping.top_p, score, top, total)) {
      case Kept::yes: return winner;
      case Kept::unknown: return -1;
      case Kept::no: floor = score;  // nor what is smaller
    }
  }
  return -1;
}

}  // namespace

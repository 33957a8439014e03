// The catalogue of everything that runs on data: what each kernel takes (pointers, sizes, strides), and one table of
// kernels for each backend. The CPU's are plain loops, the reference; CUDA's have the same contracts and are
// asynchronous, on PyTorch's current stream.
//
// Layouts: every matrix is row-major. A quantised matrix is zero-padded so that both dimensions are multiples of 16,
// which is what FP8 GEMMs need on either side; padded(n) is the padded size.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "torch_fp8/cuda.h"
#include "torch_fp8/scale.h"

namespace at {
class Tensor;
}

namespace torch_fp8 {

enum class Type : uint8_t { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t kAlignment = 16;
TORCH_FP8_HOST_DEVICE constexpr int64_t padded(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

constexpr int kTile = 128;            // rows and columns of a tile, which is what a block casts at a time
constexpr int64_t kBiasRows = kTile;  // rows of x that one row of column sums covers
constexpr int kAmaxParts = 512;       // in how many parts an amax is taken
constexpr int64_t tiles_along(int64_t n) { return (padded(n) + kTile - 1) / kTile; }

struct Matrix {  // (rows, cols), any strides, in elements
  const void* data;
  Type type;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// q = saturate(round_to_nearest_even(x * slot->scale)), in one pass over x. In all casts NaN is written for an x that
// is not finite (encode in format.h).
struct QuantizeArgs {
  Matrix x;
  Format format;
  const Slot* slot;
  uint8_t* q;          // (padded(rows), padded(cols)), or null
  uint8_t* q_t;        // (padded(cols), padded(rows)), the transpose, or null
  float* scale_inv;    // 1: this tensor's own copy of slot->scale_inv, or null
  float* amax;         // 1: raised to max |x| where that is larger; NaN is larger than Inf; or null
  float* column_sums;  // (ceil(rows / kBiasRows), padded(cols)): sums of x over kBiasRows rows, or null
};

// What quantize(cast) wrote to q, q_t and scale_inv is written again, scaled by cast.amax, where that shows the slot's
// scale to be unfit (scale.h). Where it is not, nothing is written, and no word from the host is needed to find out.
struct RecastArgs {
  QuantizeArgs cast;  // as it ran; cast.amax, not null, covers x by now
  float target;       // fp8_max / 2^margin
  int margin;         // as scale_for takes it
};

// One or two small casts in one launch, each with the amax that it needs: the same codes, scales and amaxes as amax,
// scale_from_amax, quantize and recast one after the other.
enum class ScaleBy : uint8_t { kSlot, kSlotIfFit, kOwnAmax };  // quantize; quantize and recast; by x's own amax
struct SmallCast {
  QuantizeArgs cast;  // without column_sums; where scaled by the own amax, slot is not read
  ScaleBy scale_by;
  float target;  // these two as in RecastArgs
  int margin;
};
struct SmallCasts {
  SmallCast casts[2];  // of one type and format
  int count;
};
constexpr int64_t kSmallTiles = 16;  // with more of them, several launches take less time than one cluster
constexpr bool is_small(const Matrix& x) {
  const int64_t down = tiles_along(x.rows), across = tiles_along(x.cols);
  return down > 0 && across > 0 && down <= kSmallTiles && across <= kSmallTiles && down * across <= kSmallTiles;
}

// What stands between the linear layers of an MLP: f(gate), or f(gate) * up.
enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kXielu, kReluSquared };

// Where gate and up are: in tensors of their own, or halves of what one layer makes, in that order.
enum class Halves : uint8_t { kNone, kGateFirst, kUpFirst };

// What xielu has beside its argument.
struct XieluArgs {
  const float* alphas;  // 2: of positive and of negative x; null for the other activations
  float beta;
};

// quantize(cast) of what an activation makes, computed in float32 and rounded once. cast.x is gate; up.data is null
// where there is no second factor, else up is of the same size and type. No column sums here. Rows are 16-byte aligned
// and can be read to the end of a pack of 8.
struct ActivationArgs {
  Activation activation;
  XieluArgs xielu;
  QuantizeArgs cast;
  Matrix up;
};

// quantize_rows of the same. q: E4M3 (rows, padded(cols)), zero behind cols; scale_inv: rows.
struct ActivationRowsArgs {
  Activation activation;  // not kXielu
  Matrix gate, up;
  uint8_t* q;
  float* scale_inv;
};

// The same of the two gradients: of gate, dy * up * f'(gate), and of up, dy * f(gate). up.x.data is null where there is
// no second factor; gate.x, up.x and dy are of one size and type. Column sums are of both or of none. By halves the two
// are cast side by side as one (rows, 2 cols), in that order: q, q_t, scale_inv, amax and column_sums of gate are those
// of both, up has x alone, and cols is a multiple of kAlignment.
struct ActivationBackwardArgs {
  Activation activation;
  XieluArgs xielu;
  Matrix dy;
  QuantizeArgs gate, up;
  float* alpha_sums;  // (tiles_along(rows), tiles_along(cols), 2): each tile's part of the gradients of alphas, or null
  Halves halves;
};

// What stands between the projections and the attention: each head of q and k is normalised, and its pairs of elements
// are turned by the angle of their token.
enum class RotaryNorm : uint8_t { kNone, kRms, kTanh };

struct Heads {  // (batch, tokens, heads, dims), strides in elements; dims are neighbours
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// One of the two tensors; without heads it is not touched.
struct RotarySide {
  int64_t heads;
  Heads x;           // forward: the input; backward: the same, and null without a norm
  Heads dy;          // backward alone
  void* out;         // (batch, tokens, heads, dims), contiguous and 16-byte aligned: the result, or the gradient of x
  const void* gain;  // kRms: dims, or null; kTanh: 1; of gain_type
  Type gain_type;
  void* dgain;  // backward: the gradient of gain, of its size and type; of both sides, or null
};

// dims <= kRotaryDims. Pair i < rotary_dims / 2 is elements i and i + rotary_dims / 2 or, interleaved, 2 i and 2 i + 1;
// (x1, x2) -> (x1 c - x2 s, x2 c + x1 s). The other elements pass. In front of it
//   kRms   x / sqrt(mean(x^2) + eps) * (gain + gain_offset), or without gain x / sqrt(mean(x^2) + eps)
//   kTanh  tanh(gain x)
// In float32, rounded once. Backward is the transpose of the linear map, whatever c and s are, and then the norm's.
constexpr int64_t kRotaryDims = 512, kRotaryParts = 264;
struct RotaryArgs {
  Type type;  // of x, dy and out
  int64_t batch, tokens, dims, rotary_dims;
  const void *cos, *sin;  // (batch, tokens, rotary_dims / 2) of table_type, strides in elements
  Type table_type;
  int64_t table_batch_stride, table_token_stride, table_pair_stride;
  bool interleaved;
  RotaryNorm norm;
  float eps, gain_offset;
  RotarySide q, k;
  float* parts;  // backward: room for kRotaryParts x dims sums, or null where dgain is
};

// quantize(cast) of the norm of x, or of x + residual, computed in float32 and rounded once:
// y = (x - mean) * rstd * (gain + gain_offset) + bias, rstd = 1 / sqrt(mean of (x - mean)^2 + eps). Without layer_norm
// mean is 0: that is RMSNorm.
struct Vector {
  const void* data;  // one element for each column, or null
  Type type;         // kFloat32 or that of x
};
struct NormArgs {
  bool layer_norm;
  float eps;
  QuantizeArgs cast;  // cast.x is x; without a slot nothing is cast
  Matrix residual;    // of x's size and type; data null: none. What is normalised is the sum, rounded to that type
  Vector gain, bias;  // without a gain the factor is 1
  float gain_offset;
  void* sum;     // (rows, cols) of x's type: x + residual, or null
  void* y;       // (rows, cols) of x's type, or null
  float* stats;  // rstd (rows); with layer_norm the means, and behind them rstd
};

// The same norm for layers that are not trained: norm.y, which is not null here, is rounded first, and q is
// quantize_rows of what it is then or, with a slot, quantize. norm.cast is x alone.
struct NormRowsArgs {
  NormArgs norm;
  const Slot* slot;  // or null: each row by its own amax
  uint8_t* q;  // E4M3 (padded(rows), padded(cols)), zero behind cols; rows behind those of x are anything; or null
  float* scale_inv;  // rows, or null without q or with a slot
};

// dx = rstd * (g - mean of g - n * mean of g * n) [+ dsum], rounded once, with g = dy * (gain + gain_offset) and
// n = (x - mean) * rstd; without layer_norm the mean of g is not taken off. dgain and dbias: the sums over rows of
// dy * n and dy, row r in part r % parts.
struct NormBackwardArgs {
  bool layer_norm;
  float gain_offset;
  Matrix dy, x, dsum;  // of one size and type; dsum.data null: none
  Vector gain;
  const float* stats;    // as in NormArgs
  void* dx;              // (rows, cols)
  float *dgain, *dbias;  // (parts, cols), or null
  int64_t parts;
};
// As many parts as blocks of a GPU: 132 multiprocessors hold one each or, where rows are short, more.
constexpr int64_t norm_parts(int64_t rows, int64_t cols) {
  const int64_t blocks = 132 * (cols <= 1024 ? 4 : cols <= 4096 ? 2 : 1);
  return rows < blocks ? rows : blocks;
}

// Each row of x by its own amax: q = saturate(round_to_nearest_even(x * scale)), scale = fp8_max / amax of the row.
// With col_scale it is x * col_scale that is cast, a product in float32: one that is not finite counts as an x that is
// not.
struct QuantizeRowsArgs {
  Matrix x;
  uint8_t* q;              // E4M3 (rows, padded(cols)), zero behind cols
  float* scale_inv;        // rows
  const float* col_scale;  // cols, or null
};

// The same for each kScaleBlock columns of a row, as cuBLASLt takes it. cols is a multiple of kScaleBlock.
constexpr int64_t kScaleBlock = 128;
struct QuantizeGroupsArgs {
  Matrix x;
  int64_t rows;      // of q: no fewer than x has; those behind them are zero, with scale 1
  uint8_t* q;        // E4M3 (rows, cols)
  float* scale_inv;  // (cols / kScaleBlock, rows)
};

// out (m, n) = x (m, k) . (w (n, k) * w_scale)^T [+ bias (n)]: few rows of 16-bit x on a weight that is read once.
enum class WeightScale : uint8_t { kTensor, kChannel, kBlock };  // one; of each row of w; of each 128 x 128 of w
constexpr int64_t kSkinnyRows = 16;                              // at most so many rows of x

// Which scale belongs to an element of w (n, k).
TORCH_FP8_HOST_DEVICE constexpr int64_t scale_index(WeightScale kind, int64_t k, int64_t row, int64_t col) {
  if (kind == WeightScale::kTensor) return 0;
  if (kind == WeightScale::kChannel) return row;
  return row / kScaleBlock * ((k + kScaleBlock - 1) / kScaleBlock) + col / kScaleBlock;
}

// weight_stands: the kernel may read w, w_scale and bias while kernels in front of it still run
// (cuda/common/block.cuh). The host says so only where every write to the three is older than all kernels that may
// still run: never of what the same call wrote, nor of another tensor or version than it has seen. False is always
// right: the kernel then waits for all kernels in front before it reads anything, and before it lets a kernel behind it
// begin. x, its scale and all else are read after the wait in any case.
struct SkinnyArgs {
  int64_t m, n, k;   // k a multiple of 16
  const void* x;     // contiguous and 16-byte aligned, as w
  const uint8_t* w;  // E4M3
  const float* w_scale;
  WeightScale scale_kind;
  const void* bias;  // or null
  void* out;
  Type type;  // of x, bias and out; not float32
  // As told above; csrc/ops/standing.h finds it out.
  bool weight_stands = false;
};

// An output with more columns than these is wide.
constexpr int64_t kWideOutputs = 8192;

// Whether skinny_ring.cu is made for a product, and faster: more than 6 rows of x are so much that each block had
// better fetch them once for many outputs.
constexpr int64_t kRingRows = 8, kRingCols = 8192, kManyRingOutputs = 8192;
constexpr bool is_for_ring(int64_t m, int64_t n, int64_t k) {
  return m > 1 && m <= kRingRows && k <= kRingCols && (m <= 6 || n >= kManyRingOutputs) && n <= 1 << 30;
}

// The same with x in FP8 too: out (m, n) = (x (m, k) * x_scale) . (w (n, k) * w_scale)^T [+ bias (n)].
constexpr int64_t kSkinnyFp8Rows = 32;  // at most so many rows of x
struct SkinnyFp8Args {
  int64_t m, n, k;       // k a multiple of 16
  const uint8_t *x, *w;  // E4M3, 16-byte aligned
  const float *x_scale, *w_scale;
  bool one_x_scale, one_w_scale;  // for all rows, else one for each
  const void* bias;               // or null
  void* out;
  Type type;                   // of bias and out; not float32
  bool weight_stands = false;  // as in SkinnyArgs
};

// out (rows, cols) = sums (rows, stride) * row_scale * col_scale [+ bias (cols)], rounded once.
struct RescaleArgs {
  const float* sums;
  int64_t rows, cols, stride;
  const float *row_scale, *col_scale;
  bool one_row_scale, one_col_scale;  // for all rows, for all columns
  const void* bias;                   // of type, or null
  void* out;
  Type type;
};

// out (n, k) = w * w_scale: the product in float32, rounded once.
struct DequantizeArgs {
  int64_t n, k;
  const uint8_t* w;  // E4M3, contiguous
  const float* w_scale;
  WeightScale scale_kind;
  void* out;
  Type type;  // of out
};

// out (padded(cols), padded(rows)) = the transpose of codes (rows, cols), contiguous; zero behind it.
struct TransposeArgs {
  int64_t rows, cols;
  const uint8_t* codes;
  uint8_t* out;  // 16-byte aligned
};

// What a cast of x with that slot loses.
enum Loss : int { kSaturated, kFlushed, kInf, kNaN, kLosses };  // finite but too large, to zero, ...
struct LossArgs {
  Matrix x;
  Format format;
  const Slot* slot;
  int64_t* counts;  // kLosses: elements are added to it
  float* values;    // 2: the scale, and an amax that is raised
};

// out (cols) = the sums of the columns of parts (count, cols), whose rows are stride floats apart.
struct ColumnSums {
  const float* parts;
  int64_t count, cols, stride;
  void* out;
  Type type;
};

// Which elements of a GEMM's operand share a scale: all; each row; or, of a (m, k), 128 columns of a row, and of b
// (n, k), 128 x 128. These are stored as (k / 128, m), and as (ceil(n / 128), scale_stride(k)).
enum class Scales : uint8_t { kOne, kRows, kBlocks };
constexpr int64_t scale_stride(int64_t k) { return (k + 4 * kScaleBlock - 1) / (4 * kScaleBlock) * 4; }

// out (m, n) = a (m, k) . b (n, k)^T * a_scale_inv * b_scale_inv [+ bias (n)] [+ addend (m, n)]
struct GemmArgs {
  int64_t m, n, k;  // n and k multiples of 16; with scales of blocks k of 128 and m of 4
  const uint8_t *a, *b;
  Format a_format, b_format;  // not both E5M2
  // 16-byte aligned, as scales says; or both null: no scales.
  const float *a_scale_inv, *b_scale_inv;
  const void* bias;  // of type out_type (not float32), or null
  void* out;         // 16-byte aligned
  Type out_type;
  const void* addend;  // of type out_type, 16-byte aligned, may be out itself; or null
  bool fast_accum;     // cheaper, less exact sums in the tensor core (about 14 bits on Hopper); CPU: no difference
  Scales scales;
};

// A GEMM without its data, as it is tuned: GemmArgs with pointers aligned as those of fresh tensors.
struct GemmProblem {
  int64_t m, n, k;
  Format a_format, b_format;
  Type out_type;
  bool bias, accumulate, fast_accum;
  Scales scales;
};

struct TimedAlgorithm {
  std::string algorithm;   // opaque; of this cuBLASLt and this kind of GPU only
  std::vector<double> us;  // of each round
};

// The scaling state of one role of a layer, and how its scale follows from the history (see update_scales).
struct RoleState {
  Slot* slot;
  float* history;  // length: a ring of amaxes
  int32_t length : 24;
  int32_t margin : 8;  // these two as scale_for takes them
  float target;
};
static_assert(sizeof(RoleState) == 24, "over a thousand of them fit a kernel's arguments");

// FP8 attention: O = softmax(scale * Q K^T) V, and its gradient, with the roles' tensors as codes. Scales are read from
// one slot a role, as they are when the kernel runs; what is cast inside of a kernel, or comes from it, is scaled by
// its slot's scale, which must be there before.
//   forward   keys come 256 at a time. P = exp(scale * S - its row's maximum so far) is cast, and the sums of rows that
//             O is divided by are of P before the cast; O is cast
//   backward  P = exp(scale * S - lse); D = rowsum(dO * O); dS = scale * P * (dO V^T - D), of P before its cast, is
//             cast as dP's; dV = P^T dO, of P after its cast, dQ = dS K and dK = dS^T Q are cast
// What is cast saturates, Inf too; NaN stays. An amax is of what is cast before it is scaled, and does not depend on
// the scale. Where there is a NaN it is NaN, but that of O may pass over it. That of P may be of P after its division.
struct AttentionSize {
  // None is 0; heads is a multiple of kv_heads, dims of 16. CUDA's forward takes 2 tokens and more, and up to 256 dims;
  // its backward 128 dims.
  int64_t batch, heads, kv_heads, tokens, kv_tokens, dims;
  bool causal;  // a query sees the keys up to its own number
  float scale;
};

struct AttentionArgs {
  AttentionSize size;
  Heads q, k, v;       // E4M3, 16-byte aligned, with strides that are multiples of 16
  Heads o;             // E4M3: where the result goes, likewise
  const Slot* scales;  // kAttentionRoles
  float* lse;          // (batch, heads, tokens): the natural logarithm of each row's sum of exp(scale * S)
  float* amaxes;       // kAttentionRoles: those of kP and kO are overwritten by max |.| of what was cast
};

struct AttentionBackwardArgs {
  AttentionSize size;
  Heads q, k, v, o;    // as in forward
  Heads dy;            // of grad_format
  Heads dq, dk, dv;    // of result_format: where the results go
  Format grad_format;  // of dO and dP
  Format result_format;
  const Slot* scales;
  const float* lse;
  float* amaxes;  // those of kGradP, kGradQ, kGradK, kGradV are overwritten
};

// What was measured outside of a cast: slots[role].amax is raised to amaxes[role] for the roles of record (one bit
// each), and scales[role] becomes the slot of a tensor that is scaled by its own amax (own_slot) for those of own.
// P's amax is taken as 1, which forward casts in every row.
struct RoleAmaxesArgs {
  int roles;
  const float* amaxes;
  Slot *slots, *scales;
  uint32_t record, own;
  struct {
    float target;
    int margin = kExact;
  } casts[kAttentionRoles];
};
TORCH_FP8_HOST_DEVICE inline float amax_of_role(const RoleAmaxesArgs& args, int role) {
  return role == kP ? 1.0f : float_of(magnitude(args.amaxes[role]));
}

// Codes of one scale as numbers: out (outer, inner) = scale_inv * (the sum over group of codes (outer, group, inner)),
// in float32, rounded once. inner is a multiple of 16; up to 4 tensors in one launch.
struct HeadsOfCodes {
  const uint8_t* codes;  // 16-byte aligned, as out
  const float* scale_inv;
  void* out;
  int64_t outer, group, inner;
};
struct DequantizeHeadsArgs {
  int count;
  Format format;
  Type type;  // of out
  HeadsOfCodes tensors[4];
};

// Keys without what is common to all tokens of a batch and head, and the log-sum-exps of softmax(scale * Q K^T) with
// them: apart = (K - common) / 2, in codes of twice their scale_inv; shifted = lse - scale * Q common. A key near to
// the common part loses nothing by the difference, since that has twice the room.
struct CentreArgs {
  AttentionSize size;
  const uint8_t *q, *k;  // E4M3 (batch, tokens, heads, dims), contiguous, 16-byte aligned
  const float* lse;      // (batch, heads, tokens)
  const Slot* scales;    // kAttentionRoles
  float rounding;        // standard deviation of the relative error of what K - common becomes
  uint8_t* apart;        // as k; or null, where the caller subtracts common
  float* common;         // (batch, kv_heads, dims), what K's codes stand for
  float* shifted;        // as lse
  Slot* apart_scales;    // where apart is given, a copy of scales: that of kK is doubled
  // (batch, kv_heads, 2 dims + 1), zeros: sums of a channel's codes and of their squares, in kCodeUnits, and the
  // float32 bits of the largest squared length of a query that sees these keys.
  int64_t* sums;
};
constexpr float kCodeUnits = 512;  // E4M3's numbers are multiples of its smallest, so that whole numbers add exactly
constexpr float kRoundingOfCodes = 0.026f, kRoundingOf16Bits = 0.0011f;  // of E4M3 and BF16, over all significands
// Rows of backward's probabilities sum to 1 but for what rounding moves the scores. Where it moves them by more than
// this, keys keep their common part: gradients of queries are less precise then, but nothing grows with e^score.
constexpr float kMostMoved = 0.1f;

// What a channel's keys have in common, before it becomes a code; NaN counts as 0. To subtract little would cost a
// rounding and gain nothing.
TORCH_FP8_HOST_DEVICE inline float common_part(int64_t sum, int64_t squares, int64_t tokens) {
  const double total = static_cast<double>(sum), count = static_cast<double>(tokens);
  const bool is_common = 16 * total * total > count * static_cast<double>(squares);
  return is_common ? static_cast<float>(total / (kCodeUnits * count)) : 0.0f;
}
// The variance of such a channel's codes.
TORCH_FP8_HOST_DEVICE inline float spread_of(int64_t sum, int64_t squares, int64_t tokens) {
  const double count = static_cast<double>(tokens), mean = static_cast<double>(sum) / count;
  const double variance = static_cast<double>(squares) / count - mean * mean;  // of equal keys 0, but for rounding
  return variance > 0 ? static_cast<float>(variance / (kCodeUnits * kCodeUnits)) : 0.0f;
}
// Whether scores stay where they are when K - common is rounded. spread: the mean over channels of spread_of where
// something is common; longest: the largest squared length of a query.
TORCH_FP8_HOST_DEVICE inline bool keeps_scores(const CentreArgs& args, float spread, float longest) {
  const float moved = args.rounding * args.size.scale * args.scales[kQ].scale_inv * args.scales[kK].scale_inv;
  return moved * std::sqrt(spread * longest) < kMostMoved;
}

// A backend's kernels. Each is declared here and nowhere else; the file that defines it fills its row.
struct Kernels {
  // parts (kAmaxParts): their largest is max |x|.
  void (*amax)(const Matrix& x, float* parts);
  // The slot of what those parts belong to: scale 1 where the amax is 0, Inf or NaN.
  void (*scale_from_amax)(const float* parts, Slot* slot, float target, int margin);
  void (*quantize)(const QuantizeArgs& args);
  void (*recast)(const RecastArgs& args);
  void (*activate)(const ActivationArgs& args);
  void (*activate_rows)(const ActivationRowsArgs& args);
  void (*activate_backward)(const ActivationBackwardArgs& args);
  void (*rotary)(const RotaryArgs& args);
  void (*rotary_backward)(const RotaryArgs& args);
  void (*norm)(const NormArgs& args);
  void (*norm_backward)(const NormBackwardArgs& args);
  void (*norm_rows)(const NormRowsArgs& args);
  void (*quantize_rows)(const QuantizeRowsArgs& args);
  void (*quantize_groups)(const QuantizeGroupsArgs& args);
  void (*count_losses)(const LossArgs& args);
  void (*add_column_sums)(const ColumnSums& sums);
  void (*gemm)(const GemmArgs& args);
  void (*rescale)(const RescaleArgs& args);
  void (*dequantize)(const DequantizeArgs& args);
  void (*transpose)(const TransposeArgs& args);
  void (*attention)(const AttentionArgs& args);
  void (*attention_backward)(const AttentionBackwardArgs& args);
  void (*role_amaxes)(const RoleAmaxesArgs& args);
  void (*dequantize_heads)(const DequantizeHeadsArgs& args);
  void (*centre_keys)(const CentreArgs& args);
  // For each role: an amax that is positive and finite enters the history, and the scale follows from the largest
  // entry; any other amax leaves scale and history as they were. Then the slot's amax is 0 again.
  void (*update_scales)(const RoleState* roles, int64_t count);

  // From here on CUDA's alone.
  // Throws, in words, where the library, this cuDNN or this GPU has no FP8 attention.
  void (*check_attention)();
  void (*cast_small)(const SmallCasts& small);
  void (*skinny)(const SkinnyArgs& args);
  void (*skinny_fp8)(const SkinnyFp8Args& args);
  // The current stream of the current device.
  cuda::StreamState (*current_stream)();
  size_t (*cublaslt_version)();
  // Every right candidate of cuBLASLt for the problem, its first choice first, timed in interleaved rounds on random
  // data.
  std::vector<TimedAlgorithm> (*time_algorithms)(const GemmProblem& problem, int rounds);
  // Throws where this cuBLASLt does not take the algorithm on the current device.
  void (*check_algorithm)(const GemmProblem& problem, const std::string& algorithm);
  // From now on these problems are solved so on the current device, in every thread; all or, on an error, none.
  void (*use_algorithms)(const std::vector<std::pair<GemmProblem, std::string>>& chosen);
  // Back to cuBLASLt's first choice.
  void (*forget_algorithms)();
};

// The kernels of a backend, or of the one that a tensor lies on; those of the meta device do nothing. A library built
// without CUDA throws where it is asked for CUDA's.
const Kernels& kernels(bool on_cuda);
const Kernels& kernels_of(const at::Tensor& tensor);

// The tables that the files of csrc/cpu and csrc/cuda fill while the library is loaded.
Kernels& cpu_kernels();
Kernels& cuda_kernels();

// What norm_rows computes, by the kernels that do one thing each: the reference, and for what a kernel does not take.
void norm_and_quantize(const Kernels& kernels, const NormRowsArgs& args);

namespace cuda {
inline StreamState current_stream() { return kernels(/*on_cuda=*/true).current_stream(); }
inline bool is_capturing() { return current_stream().capture != 0; }
}  // namespace cuda

}  // namespace torch_fp8

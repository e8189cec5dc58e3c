// The two kernels of the fused all-to-all that move rows (kernels/fused/triton_exchange.py: send_kernel, gather_sum_kernel), by bulk copies: a row is
// one or a few instructions, and no register holds it. Pointer tables, maps, signals and the order of sums are those of the Triton kernels.
//
// A warp is on its own: it has slots in shared memory for a few rows, and fills one while it empties another. Compiled by nvcc alone, without torch's
// headers, for compute capability 9.0 and newer; called through ctypes (kernels/cuda/build.py).
//
// T tokens here, K experts per token, R rows that fit at a rank
#ifndef PRIMITIVES
#define PRIMITIVES "bulk.cuh"
#endif
#include PRIMITIVES

constexpr int kThreads = 256, kShared = 227 * 1024;
constexpr int kSlots = 4, kAhead = 2;  // rows of a warp in shared memory, and how many of them are on their way there

// Row `row` of the rows of `bytes` at the address `table[rank]`.
DEVICE char* row_at(const int64_t* table, int rank, int64_t row, int64_t bytes) { return reinterpret_cast<char*>(table[rank]) + row * bytes; }

// One thread enters the meeting of all ranks on a channel, and waits for them: _meet of triton_exchange.py.
DEVICE void meet(const int64_t* signals, int* epochs, int* error, int me, int64_t spins, int world, int channel) {
  const int epoch = epochs[channel] + 1;
  for (int i = 0; i < world; i++) store_release(reinterpret_cast<int*>(signals[(me + i) % world]) + channel * world + me, epoch);
  const int* mine = reinterpret_cast<const int*>(signals[me]) + channel * world;
  int64_t left = *error == 0 ? spins : 0;
  for (int i = 0; i < world; i++) {
    int seen = load_acquire(mine + i);
    for (; seen < epoch && left > 0; left--) seen = load_acquire(mine + i);
    if (seen < epoch) *error = 1 + channel * world + i;
  }
  epochs[channel] = epoch;
}

__global__ void __launch_bounds__(kThreads, 1)
    send(const char* x,              // [T, row_bytes]
         const float* weights,       // [T, K], or null: rows alone travel
         const int* owner,           // [T, K]: the rank of each row, -1 for none
         const int* row,             // [T, K]: the row there
         const int* choice,          // [T, K]: which of the token's choices it is
         const int64_t* rows_of,     // [world]: everyone's rows [R, row_bytes]
         const int64_t* weights_of,  // [world]: everyone's row weights [R]
         const int64_t* signals,     // [world]: everyone's pad [channels, world]
         int* epochs,                // [channels], of this rank
         int* error, int* ticket,    // [1]
         int me, int64_t spins, int T, int K, int world, int channel, uint32_t row_bytes) {
  DYNAMIC_SHARED(shared);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* slots = shared + (size_t)warp * kSlots * row_bytes;
  uint64_t* here = reinterpret_cast<uint64_t*>(shared + (size_t)warps * kSlots * row_bytes) + warp * kSlots;
  if (lane == 0) {
    for (int s = 0; s < kSlots; s++) barrier_init(here + s, 1);
    barriers_ready();
  }
  __syncwarp();
  const int64_t stride = (int64_t)gridDim.x * warps, first = (int64_t)blockIdx.x * warps + warp;
  auto fetch = [&](int64_t token, int number) {
    uint64_t* barrier = here + number % kSlots;
    arrive_expecting(barrier, row_bytes);
    load_bulk(slots + (size_t)(number % kSlots) * row_bytes, x + token * row_bytes, row_bytes, barrier);
  };
  if (lane == 0) {
    for (int i = 0; i < kAhead; i++) {
      if (first + i * stride < T) fetch(first + i * stride, i);
    }
  }
  int number = 0;
  for (int64_t token = first; token < T; token += stride, number++) {
    // The slot that is filled now was sent from kSlots - kAhead tokens ago, by all lanes.
    wait_until_read<kSlots - kAhead - 1>();
    __syncwarp();
    if (lane == 0 && token + kAhead * stride < T) fetch(token + kAhead * stride, number + kAhead);
    wait_for_phase(here + number % kSlots, (number / kSlots) & 1);
    for (int j = lane; j < K; j += 32) {
      const int64_t at = token * K + j;
      const int rank = owner[at];
      if (rank >= 0) {
        store_bulk(row_at(rows_of, rank, row[at], row_bytes), slots + (size_t)(number % kSlots) * row_bytes, row_bytes);
        if (weights) *reinterpret_cast<float*>(row_at(weights_of, rank, row[at], 4)) = weights[token * K + choice[at]];
      }
    }
    close_group();
  }
  wait_until_written();
  fence_copies();
  fence_system();
  __syncthreads();
  if (threadIdx.x == 0 && add_acq_rel(ticket, 1) == (int)gridDim.x - 1) {  // who waits last cannot be waited for by blocks that have not started
    *ticket = 0;
    fence_system();
    meet(signals, epochs, error, me, spins, world, channel);
  }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads, 1)
    gather_sum(const int64_t* rows_of,     // [world]: everyone's rows [R, row_bytes]
               const int64_t* scalars_of,  // [world]: everyone's [R]
               const int* owner,           // [T, K], a token's experts ascending
               const int* row,             // [T, K]
               const int* choice,          // [T, K]
               char* out,                  // [T, row_bytes]
               float* scalars,             // [T, K], zeros before; or null
               int T, int K, uint32_t row_bytes, uint32_t piece_bytes) {
  constexpr int kEach = 16 / sizeof(Value);  // values of the 16 bytes that a lane takes at a time
  DYNAMIC_SHARED(shared);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t stage_bytes = (size_t)K * piece_bytes;
  char* stages = shared + warp * 2 * stage_bytes;
  uint64_t* here = reinterpret_cast<uint64_t*>(shared + warps * 2 * stage_bytes) + warp * 2;
  if (lane == 0) {
    barrier_init(here, 32);
    barrier_init(here + 1, 32);
    barriers_ready();
  }
  __syncwarp();
  const int pieces = (row_bytes + piece_bytes - 1) / piece_bytes;
  const int64_t items = (int64_t)T * pieces, stride = (int64_t)gridDim.x * warps, first = (int64_t)blockIdx.x * warps + warp;
  auto bytes_of = [&](int64_t item) { return min(piece_bytes, row_bytes - (uint32_t)(item % pieces) * piece_bytes); };
  auto fetch = [&](int64_t item, int stage) {  // all lanes: a piece of each of the token's rows
    const int64_t token = item / pieces;
    const uint32_t bytes = bytes_of(item);
    uint32_t expected = 0;
    for (int j = lane; j < K; j += 32) expected += owner[token * K + j] >= 0 ? bytes : 0;
    arrive_expecting(here + stage, expected);
    for (int j = lane; j < K; j += 32) {
      const int rank = owner[token * K + j];
      const char* from = rank < 0 ? nullptr : row_at(rows_of, rank, row[token * K + j], row_bytes) + (item % pieces) * piece_bytes;
      if (from) load_bulk(stages + stage * stage_bytes + (size_t)j * piece_bytes, from, bytes, here + stage);
    }
  };
  if (first < items) fetch(first, 0);
  int number = 0;
  for (int64_t item = first; item < items; item += stride, number++) {
    const int stage = number % 2;
    if (item + stride < items) fetch(item + stride, 1 - stage);
    const int64_t token = item / pieces;
    wait_for_phase(here + stage, (number / 2) & 1);
    for (uint32_t at = lane * 16; at < bytes_of(item); at += 32 * 16) {
      float total[kEach] = {}, of_rank[kEach] = {};
      int last = -1;
      for (int j = 0; j < K; j++) {  // by expert within a rank, and then the ranks' sums by rank
        const int rank = owner[token * K + j];
        const Value* values = reinterpret_cast<const Value*>(stages + stage * stage_bytes + (size_t)j * piece_bytes + at);
        for (int i = 0; i < kEach; i++) {
          const float value = rank < 0 ? 0.0f : wide(values[i]);
          total[i] = rank == last ? total[i] : total[i] + of_rank[i];
          of_rank[i] = rank == last ? of_rank[i] + value : value;
        }
        last = rank;
      }
      alignas(16) Value sum[kEach];
      for (int i = 0; i < kEach; i++) narrow(total[i] + of_rank[i], sum[i]);
      *reinterpret_cast<uint4*>(out + token * row_bytes + (item % pieces) * piece_bytes + at) = *reinterpret_cast<const uint4*>(sum);
    }
    if (scalars && item % pieces == 0) {
      for (int j = lane; j < K; j += 32) {
        const int64_t at = token * K + j;
        if (owner[at] >= 0) scalars[token * K + choice[at]] = *reinterpret_cast<const float*>(row_at(scalars_of, owner[at], row[at], 4));
      }
    }
    fence_copies();  // this stage has been read: it may be filled
    __syncwarp();
  }
}

// ---------------------------------------------------------------- called from Python; 0, a CUDA error, or -1 where the rows do not fit

static int warps_that_fit(size_t bytes_per_warp) {
  const size_t fit = kShared / bytes_per_warp;
  return fit > kThreads / 32 ? kThreads / 32 : (int)fit;
}

extern "C" int moe_send(const void* x, const void* weights, const void* owner, const void* row, const void* choice, const void* rows_of,
                        const void* weights_of, const void* signals, void* epochs, void* error, void* ticket, int me, long long spins, int T, int K,
                        int world, int channel, int row_bytes, int blocks, void* stream) {
  const size_t per_warp = (size_t)kSlots * (row_bytes + sizeof(uint64_t));
  const int warps = warps_that_fit(per_warp);
  if (row_bytes % 16 || warps == 0) return -1;
  if (int failed = cudaFuncSetAttribute(send, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(warps * per_warp))) return failed;
  LAUNCH(send, blocks, warps * 32, warps * per_warp, stream, (const char*)x, (const float*)weights, (const int*)owner, (const int*)row,
         (const int*)choice, (const int64_t*)rows_of, (const int64_t*)weights_of, (const int64_t*)signals, (int*)epochs, (int*)error, (int*)ticket, me,
         spins, T, K, world, channel, (uint32_t)row_bytes);
  return cudaGetLastError();
}

template <typename Value>
static int launch_gather_sum(const void* rows_of, const void* scalars_of, const void* owner, const void* row, const void* choice, void* out,
                             void* scalars, int T, int K, int row_bytes, int blocks, void* stream) {
  int piece = 2048;
  auto per_warp = [&] { return 2 * ((size_t)K * piece + sizeof(uint64_t)); };
  while (piece > 512 && warps_that_fit(per_warp()) < 4) piece /= 2;
  const int warps = warps_that_fit(per_warp());
  if (row_bytes % 16 || warps == 0) return -1;
  if (int failed = cudaFuncSetAttribute(gather_sum<Value>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(warps * per_warp()))) return failed;
  LAUNCH(gather_sum<Value>, blocks, warps * 32, warps * per_warp(), stream, (const int64_t*)rows_of, (const int64_t*)scalars_of, (const int*)owner,
         (const int*)row, (const int*)choice, (char*)out, (float*)scalars, T, K, (uint32_t)row_bytes, (uint32_t)piece);
  return cudaGetLastError();
}

// kind: 0 float32, 1 bfloat16, 2 float16
extern "C" int moe_gather_sum(int kind, const void* rows_of, const void* scalars_of, const void* owner, const void* row, const void* choice, void* out,
                              void* scalars, int T, int K, int row_bytes, int blocks, void* stream) {
  auto launch = kind == 0 ? launch_gather_sum<float> : kind == 1 ? launch_gather_sum<bf16> : launch_gather_sum<__half>;
  return launch(rows_of, scalars_of, owner, row, choice, out, scalars, T, K, row_bytes, blocks, stream);
}

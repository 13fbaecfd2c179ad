// One graph of a group: the text step and, where any row draws `<|empty|>`, the patch.
//
//     step -> decide -> if any row speaks: patch
//                  \-> event, at which the host has the tokens
//
// Whether a row speaks is tested where its token is, so the host is never between a token and its
// patch and no patch is computed in vain. The host learns the tokens while the patch runs: `decide`
// writes them to pinned memory, and behind them how many launches it has seen. That count tells the
// tokens of this launch from those of an earlier one that nobody read.
//
// Conditional nodes need a toolkit and a driver of CUDA 12.4; below that everything here answers
// cudaErrorNotSupported. The two graphs are cloned into the new one; the memory that their kernels
// name is not, and must outlive it.
#include <cuda_runtime.h>

#include <cstdint>
#include <new>

namespace {

constexpr int NEEDED = 12040;
constexpr int WARP = 32;

struct Conditional {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t drawn = nullptr;
};

// rows tokens at [rows] slots, of which `scratch` pads the batch and does not count. host [rows + 1]
// is pinned, count [1] on the device.
struct Decision {
  const int64_t* tokens;
  const int64_t* slots;
  int64_t empty;
  int64_t scratch;
  int64_t* host;
  int64_t* count;
  int rows;
};

#if CUDART_VERSION >= 12040

__global__ void decide(cudaGraphConditionalHandle speaking, Decision decision) {
  bool speaks = false;
  for (int row = threadIdx.x; row < decision.rows; row += WARP) {
    const int64_t token = decision.tokens[row];
    speaks |= token == decision.empty && decision.slots[row] != decision.scratch;
    decision.host[row] = token;
  }
  // Each thread's tokens reach the host before the count, which another thread writes.
  __threadfence_system();
  speaks = __any_sync(0xffffffffu, speaks);
  if (threadIdx.x == 0) {
    cudaGraphSetConditional(speaking, speaks ? 1 : 0);
    *reinterpret_cast<volatile int64_t*>(decision.host + decision.rows) = ++*decision.count;
  }
}

cudaError_t add_conditional(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                            cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, after, nullptr, 1, params);
#else
  return cudaGraphAddNode(node, graph, after, 1, params);
#endif
}

cudaError_t build(Conditional* made, cudaGraph_t step, cudaGraph_t patch, Decision decision) {
  cudaError_t error = cudaGraphCreate(&made->graph, 0);
  if (error) return error;
  error = cudaEventCreateWithFlags(&made->drawn, cudaEventDisableTiming);
  if (error) return error;

  cudaGraphNode_t stepped, decided, recorded, chosen, patched;
  error = cudaGraphAddChildGraphNode(&stepped, made->graph, nullptr, 0, step);
  if (error) return error;

  // Set anew by `decide` in each launch.
  cudaGraphConditionalHandle speaking;
  error = cudaGraphConditionalHandleCreate(&speaking, made->graph, 0, cudaGraphCondAssignDefault);
  if (error) return error;
  void* arguments[] = {&speaking, &decision};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(decide);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(WARP);
  kernel.kernelParams = arguments;
  error = cudaGraphAddKernelNode(&decided, made->graph, &stepped, 1, &kernel);
  if (error) return error;
  error = cudaGraphAddEventRecordNode(&recorded, made->graph, &decided, 1, made->drawn);
  if (error) return error;

  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = speaking;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  error = add_conditional(&chosen, made->graph, &decided, &params);
  if (error) return error;
  cudaGraph_t body = params.conditional.phGraph_out[0];
  error = cudaGraphAddChildGraphNode(&patched, body, nullptr, 0, patch);
  if (error) return error;
  return cudaGraphInstantiate(&made->exec, made->graph, 0);
}

#else

cudaError_t build(Conditional*, cudaGraph_t, cudaGraph_t, Decision) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace

// 0 if graphs can be conditional here.
extern "C" int mimo_fast_conditional_supported() {
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  if (error) return error;
  return CUDART_VERSION >= NEEDED && driver >= NEEDED ? cudaSuccess : cudaErrorNotSupported;
}

extern "C" int mimo_fast_conditional_destroy(void* conditional) {
  Conditional* made = static_cast<Conditional*>(conditional);
  cudaError_t first = cudaSuccess;
  const auto note = [&](cudaError_t error) { first = first ? first : error; };
  if (made->exec) note(cudaGraphExecDestroy(made->exec));
  if (made->graph) note(cudaGraphDestroy(made->graph));
  if (made->drawn) note(cudaEventDestroy(made->drawn));
  delete made;
  return first;
}

// step writes tokens [rows], patch may run after it: both captured, both cloned.
extern "C" int mimo_fast_conditional_create(void** conditional, void* step, void* patch,
                                            const int64_t* tokens, const int64_t* slots,
                                            int64_t empty, int64_t scratch, int64_t* host,
                                            int64_t* count, int rows) {
  Conditional* made = new (std::nothrow) Conditional;
  if (!made) return cudaErrorMemoryAllocation;
  const Decision decision = {tokens, slots, empty, scratch, host, count, rows};
  const cudaError_t error =
      build(made, static_cast<cudaGraph_t>(step), static_cast<cudaGraph_t>(patch), decision);
  if (error) {
    mimo_fast_conditional_destroy(made);
    // The launch that follows must not report it as its own.
    cudaGetLastError();
    return error;
  }
  *conditional = made;
  return cudaSuccess;
}

extern "C" int mimo_fast_conditional_launch(void* conditional, void* stream) {
  return cudaGraphLaunch(static_cast<Conditional*>(conditional)->exec,
                         static_cast<cudaStream_t>(stream));
}

// Until the last launch's tokens have been drawn; its patch may still run.
extern "C" int mimo_fast_conditional_wait(void* conditional) {
  return cudaEventSynchronize(static_cast<Conditional*>(conditional)->drawn);
}

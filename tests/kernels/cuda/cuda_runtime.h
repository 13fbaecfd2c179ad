// The graphs of CUDA's runtime as csrc/cuda/graph_conditional.cu uses them, on a CPU: nodes run on
// launch, one at a time, the newest first of those that have nothing to wait for.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>

#include <warp.cuh>

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorUnknown = 999, cudaErrorNotSupported = 801 };

struct Node {
    std::function<void()> run;
    std::vector<Node*> after;
};

struct Graph {
    std::vector<std::shared_ptr<Node>> nodes;
    std::map<unsigned long long, unsigned> defaults;
    std::vector<std::unique_ptr<Graph>> bodies;
};

struct Event { int records = 0; };

using cudaGraph_t = Graph*;
using cudaGraphExec_t = Graph**;
using cudaGraphNode_t = Node*;
using cudaEvent_t = Event*;
using cudaGraphConditionalHandle = unsigned long long;

struct cudaGraphEdgeData;
struct cudaKernelNodeParams { void* func; dim3 gridDim, blockDim; void** kernelParams; };
enum { cudaEventDisableTiming = 2, cudaGraphCondAssignDefault = 1 };
enum { cudaGraphNodeTypeConditional = 13, cudaGraphCondTypeIf = 0 };
struct cudaGraphNodeParams {
    int type;
    struct { cudaGraphConditionalHandle handle; int type; unsigned size; cudaGraph_t* phGraph_out; } conditional;
};

inline std::map<cudaGraphConditionalHandle, unsigned> conditions;
inline std::vector<cudaGraph_t> outs;
inline int live = 0, calls = 0, failing = 0, driver_version = 13000;

// Whether this call is the one that was told to fail.
inline bool fails() { return ++calls == failing; }

inline void run(const std::vector<std::shared_ptr<Node>>& nodes) {
    std::set<Node*> done;
    while (done.size() < nodes.size()) {
        Node* next = nullptr;
        for (const auto& node : nodes) {
            bool ready = !done.count(node.get());
            for (Node* before : node->after) ready = ready && done.count(before);
            if (ready) next = node.get();
        }
        next->run();
        done.insert(next);
    }
}

inline cudaError_t add(cudaGraphNode_t* made, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, std::function<void()> run) {
    if (fails()) return cudaErrorUnknown;
    graph->nodes.push_back(std::make_shared<Node>(Node{run, std::vector<Node*>(after, after + count)}));
    *made = graph->nodes.back().get();
    return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) { return *version = driver_version, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
    if (fails()) return cudaErrorUnknown;
    return *graph = new Graph, ++live, cudaSuccess;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, --live, cudaSuccess; }

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    if (fails()) return cudaErrorUnknown;
    return *event = new Event, ++live, cudaSuccess;
}

inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, --live, cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return event->records ? cudaSuccess : cudaErrorUnknown; }

inline cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, cudaGraph_t child) {
    return add(node, graph, after, count, [nodes = child->nodes] { run(nodes); });
}

inline cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph, unsigned value, unsigned) {
    if (fails()) return cudaErrorUnknown;
    *handle = conditions.size() + 1;
    conditions[*handle] = graph->defaults[*handle] = value;
    return cudaSuccess;
}

inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) { conditions[handle] = value; }
inline void __threadfence_system() {}

inline bool __any_sync(unsigned, bool mine) {
    return of_warp(mine, [](uint32_t a, uint32_t b) { return a | b; });
}

// A kernel's arguments are copied when its node is made: a handle, and a structure of seven words.
inline cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, const cudaKernelNodeParams* params) {
    struct Words { uint64_t values[7]; };
    struct Arguments { cudaGraphConditionalHandle handle; Words words; void (*kernel)(cudaGraphConditionalHandle, Words); };
    Arguments copied;
    std::memcpy(&copied.handle, params->kernelParams[0], sizeof copied.handle);
    std::memcpy(&copied.words, params->kernelParams[1], sizeof copied.words);
    copied.kernel = reinterpret_cast<void (*)(cudaGraphConditionalHandle, Words)>(params->func);
    void (*call)(Arguments) = [](Arguments a) { a.kernel(a.handle, a.words); };
    return add(node, graph, after, count, [copied, call, grid = params->gridDim, threads = params->blockDim.x] {
        run_blocks<Arguments>(call, grid, threads, 0, copied);
    });
}

inline cudaError_t cudaGraphAddEventRecordNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count, cudaEvent_t event) {
    return add(node, graph, after, count, [event] { ++event->records; });
}

inline cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
    auto& choice = params->conditional;
    if (params->type != cudaGraphNodeTypeConditional || choice.type != cudaGraphCondTypeIf || choice.size != 1) return cudaErrorUnknown;
    graph->bodies.push_back(std::make_unique<Graph>());
    Graph* body = graph->bodies.back().get();
    outs.assign(1, body);
    choice.phGraph_out = outs.data();
    return add(node, graph, after, count, [handle = choice.handle, body] {
        if (conditions.at(handle)) run(body->nodes);
    });
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned) {
    if (fails()) return cudaErrorUnknown;
    return *exec = new cudaGraph_t(graph), ++live, cudaSuccess;
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, --live, cudaSuccess; }

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    for (const auto& [handle, value] : (*exec)->defaults) conditions[handle] = value;
    run((*exec)->nodes);
    return cudaSuccess;
}

// For the tests: a captured graph of one piece of work, the n-th call from now on that fails, and
// what has been made and not been destroyed.
extern "C" void* fake_graph(void (*work)()) {
    Graph* graph = new Graph;
    graph->nodes.push_back(std::make_shared<Node>(Node{work, {}}));
    return graph;
}
extern "C" void fake_failure(int call) { calls = 0, failing = call; }
extern "C" int fake_live() { return live; }
extern "C" void fake_driver(int version) { driver_version = version; }

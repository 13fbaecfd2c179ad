// What a persistent launch is told: a table of phases, and what they read. mimo_fast/kernels/cuda/engine.py has the same
// structures for the host.
#pragma once

#include <cstdint>

namespace {

// What a phase does; what it reads is `from` (or `input`), what it makes is `to` (or `output`).
enum Operation : int32_t {
    PRODUCT,     // epilogues(norm(x) W^T + b), in the order of sums of row_order.cuh
    NORMALIZE,   // rms_norm(x)
    ATTEND,      // new position of each row, over a cache in parts: q, k, v of `from`
    DRAW,        // codes of the step's active channels from their logits
    EMBED,       // sum of these codes' embeddings, for the next step
    PRODUCT_OF_ROWS,  // PRODUCT of up to MOST_STREAM_ROWS rows by a dense W; LayerNorm and GELU
    ATTEND_RING,      // new positions of each stream, over its ring: q, k, v of `from`
    ATTEND_FRAMES,    // rows of each stream, to those near them: q, k, v of `from`
    TEXT,        // the last phase: each row's text token, from the logits of the phase before; nothing without `tokens`
};

// Which rows of W a tile has, in two octets of 8, and what becomes of its sums.
enum Order : int32_t {
    WHOLE,    // 16 neighbouring rows
    HALF,     // 8 neighbouring rows: where there are fewer tiles than blocks
    GATED,    // 8 rows of the gate and the 8 of the other half of W: silu(gate) up, 8 results
    HEADS,    // jobs of whole heads: their q, then k, then v; attention among few positions follows at once
    ACTIVE,   // WHOLE, of the rows that are active in this step
};

constexpr int NONE = -1;
constexpr int POINTERS = 12;
constexpr int MOST_ACTIVE = 8;   // channels that draw in one step
constexpr int MOST_STEPS = 16;
constexpr int MOST_ROWS = 8;
constexpr int MOST_STREAM_ROWS = 32;  // where `stream_rows` is set

// W of a product; n is 0 in other phases.
struct Matrix {
    const uint4* words;      // [n, k bits / 128] as quantized_weight.py packs them; 16 bits: [n, k] of T
    const uint16_t* scales;  // [n, k / 128], or [n, 1] where `grouped` is 0; null where it is dense
    const uint16_t* zeros;   // float16 [n, k / 128], or null
    int32_t n, k;
    int32_t bits, grouped;
    int32_t order;
    int32_t first;  // the block that has the first job: jobs go round from there
    int32_t keep;   // whether it is to stay in L2
    int32_t job;    // HEADS: columns of a job, whole heads and whole octets
};

// Vectors are numbered by the columns before them: that of `from` begins at from * rows values of what is exchanged, and
// in the loop as many times `loop_columns` further on as there were steps before.
struct Phase {
    const uint16_t* norm;  // [columns of x], or null
    const uint16_t* bias;  // [n], or null
    int32_t operation;
    int32_t from, columns;          // of x; from: NONE where it is an input
    int32_t to, width;              // of the result; to: NONE where nobody waits for it
    int32_t residual;               // what is added to the result, or NONE
    int32_t input, residual_input;  // numbers of pointers [rows, columns] that are there already, or NONE
    int32_t output;                 // number of a pointer [rows, width] that gets the result, too, or NONE
    int32_t from_prologue;          // bits: 1, 2: `from`, `residual` are outside the loop; 4: `to` is of the next step
    int32_t layer;
    int32_t fold;                   // rows that this phase takes as one
    int32_t partial;                // ATTEND, TEXT: the vector of what their blocks exchange
    float eps;
    const uint16_t *layer_norm, *layer_norm_bias;  // [columns of x], or null
    int32_t gelu;                   // whether the result, rounded, becomes its GELU
    int32_t spare;
};

struct Program {
    const Matrix* matrices;  // [phases]
    const Phase* phases;
    int32_t count, loop_begin, loop_end, steps;
    int32_t loop_columns;
    int32_t rows;
    uint16_t* exchanged;     // of ones at first: "not there yet"
    uint32_t* error;
    void* pointers[POINTERS];

    // Attention. HEADS: kv_heads is heads; `past` positions come from `own_cache`, `together` rows attend to each other.
    const float* rope;       // [2, positions, head_dim / 2]
    int32_t positions;
    int32_t heads, kv_heads, head_dim;
    int32_t together, causal;
    int32_t cached;          // HEADS: whether step s is position s of `own_cache`
    int32_t spare;
    uint16_t* own_cache;     // [layers, heads, rows, 512]: k [16 positions, 16], v [16 values, 16 positions]
    uint16_t* keys;          // ATTEND: [layers, slots, kv_heads, capacity, head_dim] by these strides
    uint16_t* values;
    int64_t layer_stride, slot_stride, head_stride;
    int32_t capacity;
    int32_t stream_rows;     // neighbouring rows that are new positions of one stream, or 0
    const int64_t* slots;    // [rows]; [streams]
    const int64_t* starts;   // [rows]: the new position, < 0 for none; [streams]: the first one

    // Codes. [5, active] a step: channel, frame, first row of the table, size, empty id.
    const int64_t* active[MOST_STEPS];
    int32_t active_count[MOST_STEPS], first_row[MOST_STEPS], active_rows[MOST_STEPS];
    const uint16_t* embeddings;  // [rows of all channels, embed_dim]
    int32_t table_rows, embed_dim;
    const float* noise;          // [rows, frames, table_rows], or null: all are greedy
    const float* temperature;    // [rows]
    const int64_t* top_k;        // 0: off
    const float* tail;           // 1 - top_p
    const unsigned char* greedy;
    int64_t* codes;              // [rows, channels, frames]
    int32_t channels, frames;

    // Text. Its settings are temperature, top_k, tail and greedy; without temperature all are greedy.
    const int64_t* seeds;        // [rows]
    const int64_t* draws;        // [rows]
    const unsigned char* banned; // [rows, vocabulary] by this stride, or null
    int64_t* tokens;             // [rows]
    int64_t banned_stride;
    int32_t vocabulary, text_slot;

    // Shared memory, as the host has divided it.
    int32_t x_columns;           // of x at a time, a multiple of 128
    int32_t sums_floats;         // of each of two buffers
    int32_t scratch_bytes;       // at least, of x's place
    int32_t pause;               // nanoseconds between two looks
    int64_t* clocks;             // [blocks, phases]: clock cycles, added up, or null

    // ATTEND_RING: slot p % capacity of a row of `keys` holds position p. rope: [2, rows, head_dim / 2] of the rows.
    int32_t context;             // positions before its own that a row sees

    // ATTEND_FRAMES: keys and values of `context` rows before a stream's first; frames.cuh. Launches of groups: `blocks`
    // and `rows` are those of a group, the first ones are of the first stream.
    int32_t ahead;               // rows after its own that a row sees
    int32_t groups, stream_groups;  // all, and of a stream; 0 where there are none
    int32_t group_rows;          // of all but a stream's last one
    int32_t pointer_columns;     // of all inputs and outputs
    int64_t group_values;        // that a group exchanges
    uint16_t *kept_keys, *kept_values;  // [streams, layers, heads, context, head_dim]
    int32_t layers, fresh;       // rows that what is kept moves on by
};

}  // namespace

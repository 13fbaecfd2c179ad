// Where a fiber goes on, and the change from one to another: on x86-64 and aarch64 some instructions that keep what a
// function has to keep, elsewhere `ucontext`, whose every change asks the system for the mask of signals.
//
// Registers of modes (rounding, denormals) are the thread's and not a fiber's: no kernel sets them.
#pragma once

#include <cstddef>
#include <cstdint>

#if (defined(__x86_64__) || defined(__aarch64__)) && defined(__ELF__) && !defined(BY_UCONTEXT)

struct Context {
    void* stack;  // what has been kept lies on top of it
};

// Keeps the registers on this stack, whose pointer goes to `from`, and goes on with those on the stack at `to`.
extern "C" void mimo_fast_change_stack(void** from, void* to) __attribute__((visibility("hidden")));

#ifdef __x86_64__

asm(R"(
    .pushsection .text
    .weak mimo_fast_change_stack
    .hidden mimo_fast_change_stack
    .type mimo_fast_change_stack, @function
mimo_fast_change_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size mimo_fast_change_stack, . - mimo_fast_change_stack
    .popsection
)");

// The six registers, the address to return to, and the one that `body` finds as its caller's.
constexpr int KEPT = 8, RETURN = 6;

#else

asm(R"(
    .pushsection .text
    .weak mimo_fast_change_stack
    .hidden mimo_fast_change_stack
    .type mimo_fast_change_stack, %function
mimo_fast_change_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size mimo_fast_change_stack, . - mimo_fast_change_stack
    .popsection
)");

// Twelve general registers, the last of which is the address to return to, and eight of floating point.
constexpr int KEPT = 20, RETURN = 11;

#endif

// `body`, which never returns, on a stack of its own.
inline void begin(Context& context, char* stack, size_t size, void (*body)()) {
    uint64_t* const kept = reinterpret_cast<uint64_t*>(uintptr_t(stack + size) / 16 * 16) - KEPT;
    for (int i = 0; i < KEPT; ++i) kept[i] = 0;
    kept[RETURN] = reinterpret_cast<uintptr_t>(body);
    context.stack = kept;
}

inline void change(Context& from, Context& to) { mimo_fast_change_stack(&from.stack, to.stack); }

#else

#include <ucontext.h>

using Context = ucontext_t;

inline void begin(Context& context, char* stack, size_t size, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    makecontext(&context, body, 0);
}

inline void change(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

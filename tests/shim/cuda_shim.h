// CUDA on the host, for tests: lets g++ compile the kernels of cuda/gpu and runs them.
//
// Blocks run one after the other. A block's threads are fibers (ucontext) of one host thread, and
// truly interleave: each runs until it must wait for others (__syncthreads, a warp's vote or
// shuffle), then the next one runs. So a kernel without a needed barrier reads what is not there
// yet, and one that only some threads reach is an error, not a hang. `backwards` runs blocks and
// threads in the opposite order, which shows results that depend on it.
//
// Warps must be whole in votes and shuffles: the only mask is 0xFFFFFFFF.
#pragma once

// setjmp's check of the stack would take a jump to another fiber's for a fault.
#undef _FORTIFY_SOURCE

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__ __restrict
#define __launch_bounds__(...)

namespace shim {

struct Dimensions {
    unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 << 10;

enum class State { READY, AT_BARRIER, IN_WARP, DONE };

// What a warp exchanges in a vote or a shuffle. Two in turn: a lane may begin the next exchange
// while others still read this one, but not the one after that.
struct Exchange {
    uint64_t values[WARP];
    unsigned arrived = 0, left = 0;
};

struct Thread {
    ucontext_t context;
    jmp_buf jump;
    bool begun = false;
    std::vector<char> stack;
    State state = State::READY;
    unsigned exchanges = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Exchange> exchanges;
    std::function<void()> body;
    jmp_buf scheduler;
    unsigned size = 0, current = 0;
    const char *kernel = "";
};

static Block block;
static Dimensions thread_at, block_at, block_size, grid_size;

[[noreturn]] static void fail(const char *why) {
    std::fprintf(stderr, "cuda_shim: kernel %s, block %u, thread %u: %s\n", block.kernel, block_at.x,
                 block.current, why);
    std::abort();
}

// A fiber begins by ucontext, and goes on by setjmp, which spares two system calls each time.
static void resume(Thread &thread) {
    if (_setjmp(block.scheduler)) return;
    if (thread.begun) _longjmp(thread.jump, 1);
    thread.begun = true;
    setcontext(&thread.context);
}

static void wait(State state) {
    Thread &mine = block.threads[block.current];
    mine.state = state;
    if (!_setjmp(mine.jump)) _longjmp(block.scheduler, 1);
}

static void fiber() {
    block.body();
    block.threads[block.current].state = State::DONE;
    _longjmp(block.scheduler, 1);
}

// Every lane's value, once all lanes of the warp have come here.
static const uint64_t *exchange(unsigned mask, uint64_t value) {
    if (mask != 0xFFFFFFFFu) fail("a vote or shuffle of part of a warp");
    Thread &mine = block.threads[block.current];
    const unsigned lane = block.current % WARP;
    Exchange &shared = block.exchanges[block.current / WARP * 2 + mine.exchanges++ % 2];
    static uint64_t seen[WARP];
    shared.values[lane] = value;
    shared.arrived |= 1u << lane;
    while (shared.arrived != 0xFFFFFFFFu) wait(State::IN_WARP);
    std::memcpy(seen, shared.values, sizeof seen);
    shared.left |= 1u << lane;
    if (shared.left == 0xFFFFFFFFu) shared.arrived = shared.left = 0;
    return seen;
}

static void barrier() { wait(State::AT_BARRIER); }

// All wait at the barrier: on they go. Fewer, and the others are gone: they wait forever.
static void release_barrier() {
    unsigned waiting = 0, done = 0;
    for (Thread &each : block.threads) {
        waiting += each.state == State::AT_BARRIER;
        done += each.state == State::DONE;
    }
    if (waiting && waiting + done == block.size) {
        if (done) fail("threads ended while others wait in __syncthreads");
        for (Thread &each : block.threads) each.state = State::READY;
    }
}

static void run_block(bool backwards) {
    for (unsigned i = 0; i < block.size; ++i) {
        Thread &each = block.threads[i];
        each.state = State::READY;
        each.exchanges = 0;
        each.begun = false;
        getcontext(&each.context);
        each.context.uc_stack.ss_sp = each.stack.data();
        each.context.uc_stack.ss_size = each.stack.size();
        makecontext(&each.context, fiber, 0);
    }
    for (Exchange &each : block.exchanges) each.arrived = each.left = 0;
    for (unsigned idle = 0;;) {
        unsigned done = 0;
        volatile bool ran = false;  // kept over setjmp
        for (unsigned turn = 0; turn < block.size; ++turn) {
            const unsigned i = backwards ? block.size - 1 - turn : turn;
            Thread &each = block.threads[i];
            if (each.state == State::DONE) ++done;
            if (each.state == State::DONE || each.state == State::AT_BARRIER) continue;
            ran = ran || each.state == State::READY;
            each.state = State::READY;
            block.current = i;
            thread_at.x = i;
            const unsigned exchanges = each.exchanges;
            resume(each);
            ran = ran || each.exchanges != exchanges || each.state != State::IN_WARP;
        }
        if (done == block.size) return;
        release_barrier();
        idle = ran ? 0 : idle + 1;
        if (idle > 3) fail("lanes wait in a vote or shuffle that others of the warp do not reach");
    }
}

static void launch(const char *kernel, unsigned grid, unsigned size, bool backwards,
                   std::function<void()> body) {
    if (size % WARP) fail("blocks must be whole warps");
    block.kernel = kernel;
    block.size = size;
    block.body = std::move(body);
    block.threads.resize(size);
    for (Thread &each : block.threads) each.stack.resize(STACK);
    block.exchanges.resize(size / WARP * 2);
    grid_size.x = grid;
    block_size.x = size;
    for (unsigned i = 0; i < grid; ++i) {
        block_at.x = backwards ? grid - 1 - i : i;
        run_block(backwards);
    }
}

template <auto Kernel>
struct Entry;

// A kernel as a C function: its name, the launch, then the kernel's own parameters.
template <typename... Parameters, void (*Kernel)(Parameters...)>
struct Entry<Kernel> {
    static void run(const char *name, unsigned grid, unsigned size, int backwards,
                    Parameters... parameters) {
        launch(name, grid, size, backwards != 0, [&] { Kernel(parameters...); });
    }
};

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace shim

#define SHIM_KERNEL(NAME) extern "C" void *const shim_##NAME = (void *)&shim::Entry<NAME>::run;

// ---- what kernels use of CUDA ----------------------------------------------------------------

#define threadIdx shim::thread_at
#define blockIdx shim::block_at
#define blockDim shim::block_size
#define gridDim shim::grid_size

struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));

struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));

struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));

static inline void __syncthreads() { shim::barrier(); }
static inline void __syncwarp() { shim::exchange(0xFFFFFFFFu, 0); }
static inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return shim::from_bits<T>(shim::exchange(mask, shim::to_bits(value))[lane & 31]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    const unsigned lane = shim::block.current % shim::WARP;
    return shim::from_bits<T>(shim::exchange(mask, shim::to_bits(value))[lane ^ (unsigned)other]);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
    const unsigned lane = shim::block.current % shim::WARP, from = lane + distance;
    return shim::from_bits<T>(shim::exchange(mask, shim::to_bits(value))[from < 32 ? from : lane]);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const unsigned lane = shim::block.current % shim::WARP;
    return shim::from_bits<T>(
        shim::exchange(mask, shim::to_bits(value))[lane >= distance ? lane - distance : lane]);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t *values = shim::exchange(mask, predicate != 0);
    unsigned bits = 0;
    for (unsigned i = 0; i < shim::WARP; ++i) bits |= (unsigned)values[i] << i;
    return bits;
}

static inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

static inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xFFFFFFFFu;
}

static inline int __popc(unsigned value) { return __builtin_popcount(value); }
static inline int __ffs(int value) { return __builtin_ffs(value); }

template <typename T>
T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}

template <typename T>
T atomicOr(T *at, T value) {
    T old = *at;
    *at = old | value;
    return old;
}

template <typename T>
T atomicMax(T *at, T value) {
    T old = *at;
    *at = old > value ? old : value;
    return old;
}

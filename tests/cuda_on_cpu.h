// CUDA's words with their meaning on a CPU: the text of kernels.cu compiles below this header.
//
// The threads of a block are coroutines on one thread of the CPU, and a block follows the other. One
// runs until it waits for others, so a missing barrier is no matter of luck: warp 0 has gone as far
// as it can before warp 1 begins, or, in every second block, the last warp before the one before it.
// Shared memory holds nan before every block. What a GPU leaves undefined is an error here: to wait
// at two barriers at a time, or in a shuffle for a lane that does not come.
#include <csetjmp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>

#define __global__
#define __device__ static
#define __shared__ static __attribute__((section("of_block")))
#define __syncthreads() cpu::wait_for_block(__LINE__)
#define __shfl_xor_sync(mask, x, step) \
    cpu::shuffle(mask, x, cpu::lane() ^ (step), __LINE__)
#define __shfl_down_sync(mask, x, step) \
    cpu::shuffle(mask, x, cpu::lane() + (step) < 32 ? cpu::lane() + (step) : cpu::lane(), __LINE__)

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

extern char __start_of_block[] __attribute__((visibility("hidden")));
extern char __stop_of_block[] __attribute__((visibility("hidden")));
__shared__ int always_some __attribute__((used));  // or the linker knows no start and no stop

using std::exp, std::fmax, std::isfinite, std::log, std::sqrt;

template <class T> static T atomicAdd(T* place, T x) {
    const T before = *place;
    *place += x;
    return before;
}
template <class T> static T atomicMax(T* place, T x) {
    const T before = *place;
    *place = before > x ? before : x;
    return before;
}
template <class T> static T atomicMin(T* place, T x) {
    const T before = *place;
    *place = before < x ? before : x;
    return before;
}

namespace cpu {
enum State { new_, ready, at_barrier, in_shuffle, ended };
struct Thread {
    State state;
    int line, parity;
    unsigned mask;
    double given[2];  // to the others of a shuffle, and to those of the next
    jmp_buf where;
    ucontext_t start;
    char stack[1 << 14];
};
static Thread threads[1024];
static std::function<void()> kernel;
static jmp_buf scheduler;
static const char* error;

static void fail(const char* what) {
    if (!error) error = what;
}

static unsigned lane() { return threadIdx.x % 32; }

static void pause(State state, int line) {
    Thread& me = threads[threadIdx.x];
    me.state = state, me.line = line;
    if (!_setjmp(me.where)) _longjmp(scheduler, 1);
}

static void wait_for_block(int line) { pause(at_barrier, line); }

template <class T> static T shuffle(unsigned mask, T x, unsigned from, int line) {
    Thread& me = threads[threadIdx.x];
    const unsigned warp = threadIdx.x / 32 * 32, parity = me.parity ^= 1;
    if (!(mask >> lane() & 1)) fail("a lane shuffles that is not in its mask");
    if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
    me.given[parity] = x, me.mask = mask;
    pause(in_shuffle, line);
    return T(threads[warp + from].given[parity]);
}

static void begin() {
    kernel();
    threads[threadIdx.x].state = ended;
    _longjmp(scheduler, 1);
}

static void resume(unsigned t) {
    Thread& thread = threads[t];
    threadIdx.x = t;
    if (_setjmp(scheduler)) return;
    if (thread.state != new_) _longjmp(thread.where, 1);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = sizeof thread.stack;
    makecontext(&thread.start, begin, 0);
    setcontext(&thread.start);
}

// Lets the lanes of a warp run on until all have ended or wait for the block; false if none could.
static bool run_warp(unsigned first, bool upwards) {
    bool any = false;
    for (;;) {
        bool ran = false;
        for (unsigned i = 0; i < 32; i++) {
            const unsigned t = first + (upwards ? i : 31 - i);
            if (threads[t].state > ready) continue;
            resume(t);
            ran = any = true;
        }
        if (ran) continue;
        for (unsigned t = first; t < first + 32; t++) {
            if (threads[t].state != in_shuffle) continue;
            bool all_came = true;
            for (unsigned i = 0; i < 32; i++) {
                const Thread& other = threads[first + i];
                const bool came = other.state == in_shuffle && other.line == threads[t].line &&
                                  other.mask == threads[t].mask;
                all_came &= came || !(threads[t].mask >> i & 1);
            }
            if (!all_came) continue;
            for (unsigned i = 0; i < 32; i++)
                if (threads[t].mask >> i & 1) threads[first + i].state = ready;
            ran = true;
            break;
        }
        if (!ran) return any;
    }
}

static void run_block(bool upwards) {
    const unsigned n_warps = blockDim.x / 32;
    for (char* at = __start_of_block; at < __stop_of_block; at++) *at = -1;
    for (unsigned t = 0; t < blockDim.x; t++) threads[t].state = new_, threads[t].parity = 0;
    while (!error) {
        for (unsigned w = 0; w < n_warps; w++) run_warp(32 * (upwards ? w : n_warps - 1 - w), upwards);
        int line = 0, n_ended = 0;
        for (unsigned t = 0; t < blockDim.x; t++) {
            Thread& thread = threads[t];
            if (thread.state == ended) n_ended++;
            if (thread.state == in_shuffle) fail("a shuffle waits for a lane that does not come");
            if (thread.state != at_barrier) continue;
            if (line && line != thread.line) fail("a block waits at two barriers at a time");
            line = thread.line, thread.state = ready;
        }
        if (n_ended == int(blockDim.x)) return;
        if (n_ended) fail("a barrier waits for threads that have ended");
    }
}

static const char* launch(long long n_blocks, long long n_threads, std::function<void()> call) {
    error = nullptr, kernel = call, gridDim.x = n_blocks, blockDim.x = n_threads;
    if (n_threads % 32 || n_threads < 32 || n_threads > 1024) return "a block of an odd size";
    for (blockIdx.x = 0; blockIdx.x < n_blocks && !error; blockIdx.x++) run_block(blockIdx.x % 2 == 0);
    return error;
}
}  // namespace cpu

// A small thread pool: the caller plus N-1 workers take numbered chunks from one counter.
#pragma once

#include <cstddef>

namespace quire {

using Index = std::ptrdiff_t;

using Task = void (*)(void* context, Index chunk);

// Runs task(context, 0..chunks-1), each once, in any order and on any thread; returns when all are
// done. If another Python thread is using the pool, the caller does all the chunks by itself.
void run_chunks(Index chunks, Task task, void* context);

void set_thread_count(int count);
int thread_count();

// A grow-only, 64-byte aligned scratch buffer of the calling thread, one for each `slot`.
constexpr int kScratchSlots = 3;
void* thread_scratch(int slot, std::size_t bytes);

}  // namespace quire

namespace {  // every instruction set has its own copy: nothing here may be merged by the linker

using quire::Index;

template <class Body>
inline void parallel_for(Index chunks, Body&& body) {
    if (chunks == 1) return body(Index(0));
    auto call = [](void* context, Index chunk) { (*static_cast<Body*>(context))(chunk); };
    quire::run_chunks(chunks, call, &body);
}

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

// Splits rows 0..count-1 into chunks worth waking a thread for; body(first, last).
template <class Body>
inline void parallel_rows(Index count, Index elements_per_row, Body&& body) {
    constexpr Index kElementsPerChunk = 8192;
    const Index step = elements_per_row >= kElementsPerChunk ? 1 : kElementsPerChunk / (elements_per_row + 1) + 1;
    if (count <= 0) return;
    parallel_for(ceil_div(count, step), [&](Index chunk) {
        const Index first = chunk * step;
        body(first, first + step < count ? first + step : count);
    });
}

}  // namespace

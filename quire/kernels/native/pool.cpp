#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace quire {
namespace {

// Decode calls follow one another within a few microseconds: spinning this long keeps workers hot
// between the operations of one token, and lets them sleep between requests.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

template <class Ready>
bool spin_until(Ready ready) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 16; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    return ready();
}

class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work_forever(); });
    }

    ~Pool() {
        stopping_ = true;
        announce();
        for (auto& worker : workers_) worker.join();
    }

    void run(Index chunks, Task task, void* context) {
        task_ = task;
        context_ = context;
        chunks_ = chunks;
        next_ = 0;
        open_ = true;
        announce();
        take_chunks();
        // A worker either counted itself inside before this line and is waited for, or finds the
        // job closed. One that never woke up is not waited for.
        open_ = false;
        if (spin_until([this] { return inside_ == 0; })) return;
        // A worker lost its core in the middle of a chunk. Sleeping offers it this one.
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_ = true;
        finished_.wait(lock, [this] { return inside_ == 0; });
        waiting_ = false;
    }

  private:
    void announce() {
        ++generation_;
        if (sleepers_ > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
    }

    void take_chunks() {
        for (Index chunk; (chunk = next_.fetch_add(1)) < chunks_;) task_(context_, chunk);
    }

    void work_forever() {
        unsigned seen = 0;
        while (!stopping_) {
            if (!spin_until([&] { return generation_ != seen; })) {
                std::unique_lock<std::mutex> lock(mutex_);
                ++sleepers_;
                wake_.wait(lock, [&] { return generation_ != seen; });
                --sleepers_;
            }
            seen = generation_;
            ++inside_;
            if (open_) take_chunks();
            if (--inside_ == 0 && waiting_) {
                { std::lock_guard<std::mutex> lock(mutex_); }
                finished_.notify_one();
            }
        }
    }

    // Sequentially consistent throughout; each on its own cache line.
    alignas(64) std::atomic<unsigned> generation_{0};
    alignas(64) std::atomic<Index> next_{0};
    alignas(64) std::atomic<int> inside_{0};
    alignas(64) std::atomic<bool> open_{false};
    std::atomic<bool> stopping_{false};
    std::atomic<bool> waiting_{false};
    std::atomic<int> sleepers_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    Index chunks_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_, finished_;
    std::vector<std::thread> workers_;
};

struct State {
    std::mutex busy;  // held while a job runs or the pool changes
    Pool* pool = nullptr;
};

std::atomic<int> threads{0};
std::atomic<State*> state{nullptr};

// The threads of a pool do not survive fork: the child forgets the parent's (a small leak on
// purpose: its mutexes may be locked for ever) and builds its own at its first job.
void forget_after_fork() { state = nullptr; }

State* current_state() {
    State* now = state;
    if (now) return now;
#ifndef _WIN32
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    (void)registered;
#endif
    State* fresh = new State;
    if (state.compare_exchange_strong(now, fresh)) return fresh;
    delete fresh;
    return now;
}

struct Buffer {
    static constexpr std::align_val_t kAlign{64};
    void* data = nullptr;
    std::size_t bytes = 0;
    ~Buffer() { ::operator delete(data, kAlign); }
};

}  // namespace

int thread_count() {
    if (threads == 0) {
        const unsigned found = std::thread::hardware_concurrency();
        threads = found ? static_cast<int>(found) : 1;
    }
    return threads;
}

void set_thread_count(int count) {
    State* now = current_state();
    std::lock_guard<std::mutex> lock(now->busy);
    threads = count;
    delete now->pool;
    now->pool = nullptr;
}

void run_chunks(Index chunks, Task task, void* context) {
    State* now = chunks > 1 && thread_count() > 1 ? current_state() : nullptr;
    if (now && now->busy.try_lock()) {
        std::lock_guard<std::mutex> lock(now->busy, std::adopt_lock);
        if (!now->pool) now->pool = new Pool(thread_count());
        now->pool->run(chunks, task, context);
        return;
    }
    for (Index chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
}

void* thread_scratch(int slot, std::size_t bytes) {
    thread_local Buffer buffers[kScratchSlots];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        ::operator delete(buffer.data, Buffer::kAlign);
        buffer.data = nullptr;
        buffer.bytes = 0;
        buffer.data = ::operator new(bytes, Buffer::kAlign);
        buffer.bytes = bytes;
    }
    return buffer.data;
}

}  // namespace quire

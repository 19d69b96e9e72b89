// The pool. A thread's stretch of a job is one 64-bit ticket: the job's number, the stretch's end and its next unclaimed tile. So a
// worker that comes late can neither claim a tile of a job that is over nor run one with another job's function.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#include <cerrno>
#endif

namespace qwen2 {
namespace {

constexpr int TILE_BITS = 20, SLOTS = 8;
constexpr uint64_t TILE_MASK = (1u << TILE_BITS) - 1;
constexpr int SPINS = 40000;          // about 0.4 ms on the processors seen: longer than Python needs between two operations
constexpr int SPINS_TO_YIELD = 20000;  // of a caller that waits for tiles of others

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct Slot {
    TileFunction function = nullptr;
    void* context = nullptr;
    alignas(64) std::atomic<int> done{0};
};

struct Ticket {
    alignas(64) std::atomic<uint64_t> value{0};
};

struct Block {  // aligned memory that only grows
    void* raw = nullptr;
    size_t bytes = 0;
    void* get(size_t wanted) {
        if (wanted > bytes || raw == nullptr) {
            std::free(raw);
            raw = std::malloc(wanted + 64);
            bytes = raw == nullptr ? 0 : wanted;
        }
        if (raw == nullptr) return nullptr;
        return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64);
    }
};

class Pool {
  public:
    void run(TileFunction function, void* context, int tiles) {
        if (tiles <= 0) return;
        if (wanted() == 1 || tiles == 1 || tiles > MAX_TILES) {
            for (int tile = 0; tile < tiles; tile++) function(context, tile, 0);
            return;
        }
        start();
        number_++;
        Slot& slot = slots_[number_ % SLOTS];
        slot.function = function;
        slot.context = context;
        slot.done.store(0, std::memory_order_relaxed);
        const int count = wanted();
        for (int thread = count - 1; thread >= 0; thread--) {
            const uint64_t from = static_cast<uint64_t>(tiles) * thread / count, to = static_cast<uint64_t>(tiles) * (thread + 1) / count;
            tickets_[thread].value.store(number_ << (2 * TILE_BITS) | to << TILE_BITS | from, std::memory_order_seq_cst);
        }
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        work(0);
        for (int spins = 0; slot.done.load(std::memory_order_acquire) < tiles; spins++) {
            if (spins < SPINS_TO_YIELD) relax();
            else std::this_thread::yield();
        }
    }

    int wanted() const { return wanted_.load(std::memory_order_relaxed); }

    void resize(int count) {
        stop();
        wanted_ = count;
    }

    void stop() {
        if (workers_.empty()) return;
        stopping_.store(true, std::memory_order_seq_cst);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
        stopping_.store(false, std::memory_order_seq_cst);
    }

    // A fork waits for the operation that runs, so that the child finds nothing half done.
    void before_fork() { turn.lock(), sleep_.lock(); }
    void after_fork() { sleep_.unlock(), turn.unlock(); }

    // In the child the workers are gone, and what they waited for still counts them: all that is forgotten, new workers start with
    // the next job.
    void forget() {
        for (std::thread& worker : workers_) new (new char[sizeof(std::thread)]) std::thread(std::move(worker));
        workers_.clear();
        sleeping_.store(0), stopping_.store(false);
        new (&turn) std::mutex, new (&sleep_) std::mutex, new (&wake_) std::condition_variable;
    }

    std::mutex turn;
    Block own[MAX_THREADS][USES];
    Block shared[SHARED_USES];

  private:
    void start() {
        while (static_cast<int>(workers_.size()) < wanted_ - 1) {
            const int thread = static_cast<int>(workers_.size()) + 1;
            try {
                workers_.emplace_back([this, thread] { live(thread); });
            } catch (const std::system_error&) {  // the system gives no more threads: those there are do the work
                wanted_ = thread;
            }
        }
    }

    // Claims and runs tiles until none is left, of its own stretch first; whether it ran any.
    bool work(int thread) {
        bool worked = false;
        const int count = wanted();
        for (int i = 0; i < count; i++) worked |= work_on(tickets_[(thread + i) % count].value, thread);
        return worked;
    }

    bool work_on(std::atomic<uint64_t>& ticket, int thread) {
        for (bool worked = false;; worked = true) {
            if (exhausted(ticket.load(std::memory_order_acquire))) return worked;
            const uint64_t claimed = ticket.fetch_add(1, std::memory_order_acq_rel);
            if (exhausted(claimed)) return worked;
            Slot& slot = slots_[(claimed >> (2 * TILE_BITS)) % SLOTS];  // stays as it is until this tile is done
            slot.function(slot.context, static_cast<int>(claimed & TILE_MASK), thread);
            slot.done.fetch_add(1, std::memory_order_acq_rel);
        }
    }

    static bool exhausted(uint64_t ticket) { return (ticket & TILE_MASK) >= (ticket >> TILE_BITS & TILE_MASK); }

    bool idle() const {
        for (int thread = 0; thread < wanted(); thread++)
            if (!exhausted(tickets_[thread].value.load(std::memory_order_seq_cst))) return false;
        return !stopping_.load(std::memory_order_seq_cst);
    }

    void live(int thread) {
        int spins = 0;
        while (!stopping_.load(std::memory_order_relaxed)) {
            if (work(thread)) {
                spins = 0;
            } else if (++spins < SPINS) {
                relax();
            } else {
                std::unique_lock<std::mutex> lock(sleep_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                while (idle()) wake_.wait(lock);
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                spins = 0;
            }
        }
    }

    Ticket tickets_[MAX_THREADS];
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stopping_{false};
    Slot slots_[SLOTS];
    uint64_t number_ = 0;
    std::atomic<int> wanted_{1};
    std::vector<std::thread> workers_;
    std::mutex sleep_;
    std::condition_variable wake_;
};

Pool& pool() {
    static Pool* const one = [] {
        Pool* made = new Pool;  // never destroyed: a daemon thread may still be in an operation when the process ends
#if defined(__linux__) || defined(__APPLE__)
        pthread_atfork([] { pool().before_fork(); }, [] { pool().after_fork(); }, [] { pool().forget(); });
#endif
        return made;
    }();
    return *one;
}

}  // namespace

void run_tiles(TileFunction function, void* context, int tiles) { pool().run(function, context, tiles); }

namespace {

Parallel lent = nullptr;  // read and written by whoever has the turn
int lent_threads = 1;

struct LentJob {
    TileFunction function;
    void* context;
    int tiles;
    std::atomic<int> next{0}, joined{0};
};

void work_lent(void* memory) {
    LentJob& job = *static_cast<LentJob*>(memory);
    const int thread = job.joined.fetch_add(1, std::memory_order_relaxed);
    for (int tile; (tile = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tiles;) job.function(job.context, tile, thread);
}

}  // namespace

void run_lent_tiles(TileFunction function, void* context, int tiles) {
    if (lent == nullptr) return run_tiles(function, context, tiles);
    LentJob job{function, context, tiles};
    const int count = tiles < lent_threads ? tiles : lent_threads;
    if (count <= 1) return work_lent(&job);
    lent(work_lent, &job, static_cast<unsigned>(count), 0);
}

void lend_team(Parallel parallel, int threads) {
    Turn turn;
    lent = parallel;
    lent_threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
}

namespace {

std::chrono::steady_clock::time_point turn_began;  // both written by whoever has the turn
std::atomic<uint64_t> busy{0};

}  // namespace

Turn::Turn() {
    pool().turn.lock();
    turn_began = std::chrono::steady_clock::now();
}

Turn::~Turn() {
    const std::chrono::nanoseconds passed = std::chrono::steady_clock::now() - turn_began;
    busy.fetch_add(static_cast<uint64_t>(passed.count()), std::memory_order_relaxed);
    pool().turn.unlock();
}

uint64_t busy_nanoseconds() { return busy.load(std::memory_order_relaxed); }

int threads() { return pool().wanted(); }

void set_threads(int count) {
    Turn turn;
    pool().resize(count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count);
}

bool read_at(int file, int64_t offset, void* into, size_t bytes) {
#if defined(__linux__) || defined(__APPLE__)
    for (char* at = static_cast<char*>(into); bytes > 0;) {
        const ssize_t count = pread(file, at, bytes, static_cast<off_t>(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        at += count, offset += count, bytes -= static_cast<size_t>(count);
    }
    return true;
#else
    (void)file, (void)offset, (void)into;
    return bytes == 0;
#endif
}

void* scratch(int thread, Use use, size_t bytes) { return pool().own[thread][use].get(bytes); }
void* shared_scratch(Shared use, size_t bytes) { return pool().shared[use].get(bytes); }

}  // namespace qwen2

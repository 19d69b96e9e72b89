// The library's one pool of threads. A job is cut into tiles; each thread claims them one by one from a stretch of its own, so that
// it reads memory in one stream, and then from the others' stretches. The caller works too. Nobody waits for a thread, only for
// tiles that were claimed: where the other cores are busy the caller does all of them.
// Workers spin for a moment after a job, because the next one of a decode step follows within microseconds, then sleep.
#ifndef QWEN2_POOL_H
#define QWEN2_POOL_H

#include <stddef.h>
#include <stdint.h>

namespace qwen2 {

constexpr int MAX_THREADS = 256;
constexpr int MAX_TILES = (1 << 20) - MAX_THREADS - 1;  // of one job; more run on the caller alone

// A tile's work: `thread` (0 is the caller) names whose scratch memory may be used.
typedef void (*TileFunction)(void* context, int tile, int thread);

// Runs all tiles and returns when they are done. Not to be called from inside a tile. Callers take `Turn` first.
void run_tiles(TileFunction function, void* context, int tiles);

// The same for a lambda (tile, thread).
template <class Work>
void for_tiles(int tiles, Work&& work) {
    run_tiles([](void* context, int tile, int thread) { (*static_cast<Work*>(context))(tile, thread); }, &work, tiles);
}

// The same on the team of threads that was lent (qwen2_lend_team), or on the pool's own where none was.
void run_lent_tiles(TileFunction function, void* context, int tiles);
typedef void (*Parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
void lend_team(Parallel parallel, int threads);

template <class Work>
void for_lent_tiles(int tiles, Work&& work) {
    run_lent_tiles([](void* context, int tile, int thread) { (*static_cast<Work*>(context))(tile, thread); }, &work, tiles);
}

constexpr int NO_MEMORY = -3, NOT_SUPPORTED = -4, NOT_READ = -5;  // what operations return, as kernels.h says

class Failure {  // noted by any thread, asked for when all are done
  public:
    void note() { __atomic_store_n(&noted_, 1, __ATOMIC_RELAXED); }
    bool happened() const { return __atomic_load_n(&noted_, __ATOMIC_RELAXED) != 0; }

  private:
    int noted_ = 0;
};

// One operation at a time: held from the first phase of an operation to its last.
class Turn {
  public:
    Turn();
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
};

uint64_t busy_nanoseconds();  // spent in all turns that have ended

int threads();
void set_threads(int count);  // ends workers or starts them when they are next needed

// Bytes of a file from an offset on, by any number of threads at once. False where it does not have them.
constexpr bool POSITIONED_READS =
#if defined(__linux__) || defined(__APPLE__)
    true;
#else
    false;
#endif
bool read_at(int file, int64_t offset, void* into, size_t bytes);

// Memory that is kept between operations: one piece per thread and use, 64-byte aligned, its content undefined.
// Returns nullptr where there is no memory.
enum Use { PANEL_MEMORY, PRODUCT, SECOND_PRODUCT, SMALL, QUERY, USES };
void* scratch(int thread, Use use, size_t bytes);

// The same, shared by all threads of an operation.
enum Shared { NORMED, QUANTIZED, SECOND_QUANTIZED, HIDDEN, ROUTES, PARTIALS, QUERIES, CHOSEN, ADAPTED, ADAPTED_ROWS, HIDDEN_FLOATS, SHARED_USES };
void* shared_scratch(Shared use, size_t bytes);

}  // namespace qwen2

#endif

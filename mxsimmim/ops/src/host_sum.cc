// Sums over the workers of a host, in memory that all of them see; parallel/shared_memory.py lays it out and calls.
//
// A worker's arrays lie where the others can read and write them. Each worker adds up its part of an array, of all
// workers' arrays, and writes it into them: nothing is sent, and no copy is made. They wait for each other in the
// kernel, so that a core computes meanwhile.
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simmim {
namespace {

using Counter = std::atomic<uint32_t>;
static_assert(sizeof(Counter) == 4 && Counter::is_always_lock_free, "the kernel waits for 4 bytes of shared memory");

constexpr int64_t BLOCK = 4096;        // elements that are added up in the cache
constexpr timespec PATIENCE = {1, 0};  // before looking whether the others are alive

std::atomic<int32_t> lost{0};  // the worker that ended while this one waited for it

// One array of the workers, and what is done with it each time. As `Task` of parallel/shared_memory.py.
struct Task {
  Counter* arrived;  // two of them, shared
  float* const* arrays;
  const int32_t* processes;
  int32_t workers, me;
  int64_t size;
  int32_t targets;  // the sum goes into the arrays of so many workers, the first ones
  uint32_t times;   // that this has been done
};

long futex(Counter& counter, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&counter), operation, value, timeout, nullptr, 0);
}

// Waits until all workers are here; false if one of them has ended.
bool meet(const Task& task, Counter& counter) {
  const uint32_t everybody = task.times * uint32_t(task.workers);
  if (counter.fetch_add(1) + 1 == everybody) {
    futex(counter, FUTEX_WAKE, INT32_MAX, nullptr);
    return true;
  }
  for (uint32_t here = counter; int32_t(here - everybody) < 0; here = counter) {
    if (futex(counter, FUTEX_WAIT, here, &PATIENCE) == 0 || errno != ETIMEDOUT) continue;
    for (int32_t i = 0; i < task.workers; ++i)
      if (kill(task.processes[i], 0) != 0 && errno == ESRCH) {
        lost = task.processes[i];
        return false;
      }
  }
  return true;
}

void add_up(const Task& task) {
  const int64_t lines = (task.size + LANES - 1) / LANES;
  const auto begin = [&](int32_t worker) { return std::min(task.size, lines * worker / task.workers * LANES); };
  float sums[BLOCK];
  for (int64_t first = begin(task.me), end = begin(task.me + 1); first < end; first += BLOCK) {
    const int64_t n = std::min(BLOCK, end - first);
    std::memcpy(sums, task.arrays[0] + first, sizeof(float) * n);
    for (int32_t i = 1; i < task.workers; ++i) rows<float>().add(task.arrays[i] + first, sums, n);
    for (int32_t i = 0; i < task.targets; ++i) std::memcpy(task.arrays[i] + first, sums, sizeof(float) * n);
  }
}

void take_first(const Task& task) {
  if (task.me) std::memcpy(task.arrays[task.me], task.arrays[0], sizeof(float) * task.size);
}

// Does it between two meetings: before, all arrays are complete; after, all are done with them. If that cannot be, the
// array becomes NaN, so that no update is made of it.
void together(Task& task, void (*work)(const Task&)) {
  ++task.times;
  if (!lost && meet(task, task.arrived[0])) {
    work(task);
    if (meet(task, task.arrived[1])) return;
  }
  std::fill_n(task.arrays[task.me], task.size, NAN);
}

}  // namespace
}  // namespace simmim

// Operations for MXNet's engine, which gives them the second argument. The sum of all workers' arrays, into `targets`:
EXPORT void mxsimmim_host_sum(void*, void* task) {
  simmim::together(*static_cast<simmim::Task*>(task), simmim::add_up);
}

// The first worker's array, into all others:
EXPORT void mxsimmim_host_copy(void*, void* task) {
  simmim::together(*static_cast<simmim::Task*>(task), simmim::take_first);
}

// The process that was waited for in vain, or 0.
EXPORT int32_t mxsimmim_host_lost() { return simmim::lost; }

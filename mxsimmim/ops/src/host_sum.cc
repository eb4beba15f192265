// Sums over the workers of a host, in memory that all of them see; parallel/shared_memory.py lays it out and calls.
//
// A worker's arrays lie where the others can read and write them. Each worker adds up its part of an array, of all
// workers' arrays, and writes it into them: nothing is sent, and no copy is made. Who waits for the others blocks no
// thread of MXNet's, however many arrays wait, and needs no order among them: a thread of the group goes on with each
// when the last worker has come to it. It waits in the kernel, so that a core computes meanwhile.
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simmim {
namespace {

using Counter = std::atomic<uint32_t>;
using Clock = std::chrono::steady_clock;
static_assert(sizeof(Counter) == 4 && Counter::is_always_lock_free, "the kernel waits for 4 bytes of shared memory");

constexpr int64_t BLOCK = 4096;        // elements that are added up in the cache
constexpr timespec PATIENCE = {1, 0};  // before looking whether the others are alive
constexpr int32_t LATE = -1;

std::atomic<int32_t> lost{0};  // the worker that ended while this one waited for it, or LATE

// What MXNet's engine gives an asynchronous operation to call at its end: CallbackOnComplete of mxnet/engine.h, 1.9.1.
struct Completion {
  void (*call)(void* engine, void* operation, const void* error);
  void *engine, *operation;
};

class Group;

// One array of the workers, and what is done with it each time. As `HostTask` of parallel/shared_memory.py.
struct Task {
  Group* group;
  Counter* arrived;  // two of them, shared
  float* const* arrays;
  int32_t workers, me;
  int64_t size;
  int32_t targets;  // the sum goes into the arrays of so many workers, the first ones
  uint32_t times;   // that this has been done
};

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

// The workers that share a memory, and this one's tasks that wait for the others. It lives as long as the process.
class Group {
 public:
  Group(Counter& bell, const int32_t* processes, int32_t workers, double seconds)
      : bell(bell), processes(processes, processes + workers), limit(seconds) {
    std::thread([this] { serve(); }).detach();
  }

  // Does the work between two meetings: before, all arrays are complete; after, all are done with them. If that cannot
  // be, the array becomes NaN, so that no update is made of it.
  void begin(Task& task, void (*work)(const Task&), const Completion& completion) {
    std::unique_lock<std::mutex> lock(mutex);
    ++task.times;
    waiting.push_back({&task, work, completion, Clock::now(), 0});
    arrive(task, 0);
    go_on(lock);
    if (!waiting.empty()) some.notify_one();
  }

 private:
  struct Waiting {
    Task* task;
    void (*work)(const Task&);
    Completion completion;
    Clock::time_point since;
    int meeting;  // that it waits for: 0, 1, or 2 when it is done
  };

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      some.wait(lock, [this] { return !waiting.empty(); });  // the memory may be gone when nothing waits
      const uint32_t rung = bell;
      go_on(lock);
      if (waiting.empty()) continue;
      lock.unlock();
      const bool quiet = futex(FUTEX_WAIT, rung, &PATIENCE) != 0 && errno == ETIMEDOUT;
      lock.lock();
      if (quiet) look();
    }
  }

  // Goes on with what need not wait any longer.
  void go_on(std::unique_lock<std::mutex>& lock) {
    std::vector<Completion> done;
    for (Waiting& each : waiting) {
      Task& task = *each.task;
      while (each.meeting < 2 && int32_t(task.arrived[each.meeting] - everybody(task)) >= 0)
        if (++each.meeting == 1) {
          each.work(task);
          arrive(task, 1);
        }
      if (each.meeting < 2 && lost) {
        std::fill_n(task.arrays[task.me], task.size, NAN);
        each.meeting = 2;
      }
      if (each.meeting == 2) done.push_back(each.completion);
    }
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](const Waiting& each) { return each.meeting == 2; }),
                  waiting.end());
    lock.unlock();
    for (const Completion& each : done) each.call(each.engine, each.operation, nullptr);
    lock.lock();
  }

  // Sees whether all workers that are waited for are there.
  void look() {
    for (const int32_t process : processes)
      if (!waiting.empty() && kill(process, 0) != 0 && errno == ESRCH) lost = process;
    for (const Waiting& each : waiting)
      if (!lost && limit.count() > 0 && Clock::now() - each.since > limit) lost = LATE;
  }

  static uint32_t everybody(const Task& task) { return task.times * uint32_t(task.workers); }

  void arrive(const Task& task, int meeting) {
    if (task.arrived[meeting].fetch_add(1) + 1 != everybody(task)) return;
    ++bell;
    futex(FUTEX_WAKE, INT32_MAX, nullptr);
  }

  long futex(int operation, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), operation, value, timeout, nullptr, 0);
  }

  Counter& bell;  // shared; rings when all have come to a meeting
  const std::vector<int32_t> processes;
  const std::chrono::duration<double> limit;
  std::mutex mutex;
  std::condition_variable some;
  std::vector<Waiting> waiting;
};

void begin(void* task, void (*work)(const Task&), void* completion) {
  auto& own = *static_cast<Task*>(task);
  own.group->begin(own, work, *static_cast<Completion*>(completion));
}

}  // namespace
}  // namespace simmim

// A group of the workers with these process ids, this one among them, with a counter that is 0 in their memory. All of
// them come within so many seconds; 0: somebody else sees to that, such as runtime/watchdog.py.
EXPORT void* mxsimmim_host_group(void* bell, const int32_t* processes, int32_t workers, double seconds) {
  return new simmim::Group(*static_cast<simmim::Counter*>(bell), processes, workers, seconds);
}

// Asynchronous operations for MXNet's engine, which gives them the last two arguments. The sum of all workers' arrays,
// into `targets`:
EXPORT void mxsimmim_host_sum(void*, void* completion, void* task) { simmim::begin(task, simmim::add_up, completion); }

// The first worker's array, into all others:
EXPORT void mxsimmim_host_copy(void*, void* completion, void* task) {
  simmim::begin(task, simmim::take_first, completion);
}

// The process that was waited for in vain, or 0; -1 if all were there and one has not come.
EXPORT int32_t mxsimmim_host_lost() { return simmim::lost; }

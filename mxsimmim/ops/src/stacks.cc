// The native stack of each thread of this process, which runtime/watchdog.py asks for when it does not go on.
#include <dirent.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int FRAMES = 48;              // of a stack, the newest
constexpr int TURNS = 50, TURN = 2000;  // that a thread gets to answer, and microseconds of each

std::atomic<int> output{-1}, answered{0};

void show(int) {
  const int saved = errno;
  void* frames[FRAMES];
  const int own = 2, count = backtrace(frames, FRAMES);  // this function, and what the kernel returns to from it
  if (count > own) backtrace_symbols_fd(frames + own, count - own, output);
  answered = int(syscall(SYS_gettid));
  errno = saved;
}

void print_name(int file, int thread) {
  char path[64], name[32] = "?\n";
  std::snprintf(path, sizeof path, "/proc/self/task/%d/comm", thread);
  if (FILE* comm = std::fopen(path, "r")) {
    if (!std::fgets(name, sizeof name, comm)) name[0] = '\n', name[1] = 0;
    std::fclose(comm);
  }
  dprintf(file, "native thread %d %s", thread, name);
}

}  // namespace

// Asks one thread after the other, by a signal. Those that block signals, or are stuck in the kernel, say nothing.
EXPORT void mxsimmim_stacks(int32_t file) {
  void* first[1];
  backtrace(first, 1);  // loads what it needs, which a handler must not
  output = file;
  const int number = SIGRTMIN + 8;
  struct sigaction action = {};
  action.sa_handler = show;
  action.sa_flags = SA_RESTART;
  DIR* threads = sigaction(number, &action, nullptr) ? nullptr : opendir("/proc/self/task");
  if (!threads) return;
  while (const dirent* entry = readdir(threads)) {
    const int thread = std::atoi(entry->d_name);
    if (thread <= 0) continue;
    print_name(file, thread);
    answered = 0;
    const bool asked = syscall(SYS_tgkill, getpid(), thread, number) == 0;
    for (int turn = 0; asked && turn < TURNS && answered != thread; ++turn) usleep(TURN);
    if (answered != thread) dprintf(file, "  does not answer\n");
  }
  closedir(threads);
}

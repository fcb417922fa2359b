// The scheduler. A fiber starts threads one after another until one of them has to wait; then another fiber takes over.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks by hand, for x86-64 only"
#endif

extern char emulator_shared_begin[], emulator_shared_end[];
extern "C" __attribute__((weak, visibility("hidden"))) const char* const __start___patchable_function_entries[];
extern "C" __attribute__((weak, visibility("hidden"))) const char* const __stop___patchable_function_entries[];

// Saves the registers that a function must keep, and the stack; goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
  .text
  .hidden emulator_switch
  .globl emulator_switch
emulator_switch:
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
)");

emulator::Uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr int kMostThreads = 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kPage = 4096;

std::string text(const Site& site) {
  return std::string(site.function) + " at " + site.file + ":" + std::to_string(site.line);
}

// ---------------------------------------------------------------------------- fibers

struct Fiber {
  void* saved = nullptr;  // the stack pointer
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;  // the address sanitizer's
};

void enter();

// Also after an error, when a thread's frames are given up.
void restart(Fiber& fiber) {
  char* bottom = static_cast<char*>(const_cast<void*>(fiber.bottom));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom, fiber.size);
#endif
  void** top = reinterpret_cast<void**>(bottom + fiber.size);
  *--top = nullptr;  // where the first function would return to
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.saved = top;
}

std::unique_ptr<Fiber> new_fiber() {
  char* memory = static_cast<char*>(
      mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) std::perror("emulator: stacks"), std::abort();
  auto fiber = std::make_unique<Fiber>();
  fiber->bottom = memory + kPage;
  fiber->size = kStack;
  restart(*fiber);
  return fiber;
}

Fiber host;  // the launching thread's own stack

void landed(Fiber* here) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(here->fake, &bottom, &size);
  if (host.bottom == nullptr) host.bottom = bottom, host.size = size;  // a launch's first switch comes from there
#else
  (void)here;
#endif
}

void go(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake, to->bottom, to->size);
#endif
  emulator_switch(&from->saved, to->saved);
  landed(from);
}

// ---------------------------------------------------------------------------- the machine

// Lanes of a warp that wait for each other.
struct Meeting {
  const char* what;
  unsigned mask, arrived;
  int readers;  // that may still look at the values
  Site site;
  uint64_t values[kWarp];
};

struct Thread {
  Uint3 index;
  int number;
  Fiber* fiber;  // null: not started
  bool done;
  const char* waits_for;  // null: runs or may run
  Site site;              // of what it waits for
  Meeting* held;          // of whose values it may have a pointer
};

struct Machine {
  Shape shape;
  void (*body)(void*);
  void* data;
  std::mt19937 random;
  bool in_order;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  size_t first_ready = 0;
  Thread* current = nullptr;
  Fiber* fiber = nullptr;  // that runs
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::vector<Meeting*> spare;
  std::vector<std::vector<Meeting*>> open;  // of each warp
  std::vector<Thread*> at_barrier;
  int alive = 0;
  std::unique_ptr<char, decltype(&std::free)> dynamic{nullptr, &std::free};
  std::string error;
};
Machine m;

std::string name(const Thread& t) {
  const auto triple = [](Uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "thread " + triple(t.index) + " of block " + triple(blockIdx);
}

// Gives the launch up, for the reason in m.error: back to the launching thread, never to return. What the caller's
// frame owns leaks.
[[noreturn]] void give_up() {
  go(m.fiber, &host);
  std::abort();
}

// Takes the next thread that may run; null where there is none.
Thread* next() {
  const size_t count = m.ready.size() - m.first_ready;
  if (count == 0) return nullptr;
  if (!m.in_order) std::swap(m.ready[m.first_ready], m.ready[m.first_ready + m.random() % count]);
  Thread* t = m.ready[m.first_ready++];
  if (m.first_ready == m.ready.size()) m.ready.clear(), m.first_ready = 0;
  return t;
}

void wake(Thread& t) {
  t.waits_for = nullptr;
  m.ready.push_back(&t);
}

// When nobody can go on: who is missed where.
std::string who_is_missed() {
  const auto waits = [](const Thread& t) { return t.waits_for != nullptr; };
  const Thread& waiting = *std::find_if(m.threads.begin(), m.threads.end(), waits);
  unsigned mask = 0xffffffffu;
  const bool barrier = std::strcmp(waiting.waits_for, "__syncthreads") == 0;
  if (!barrier) mask = waiting.held->mask;
  std::string missed = "a lane that the block does not have";
  for (const Thread& t : m.threads) {
    if (!barrier && (t.number / kWarp != waiting.number / kWarp || (mask >> t.number % kWarp & 1) == 0)) continue;
    if (!t.done && std::strcmp(t.waits_for, waiting.waits_for) == 0) continue;
    missed = name(t) + ", which ";
    missed += t.done ? "has left the kernel" : std::string("waits in ") + t.waits_for + " of " + text(t.site);
    break;
  }
  return std::string(waiting.waits_for) + " in " + text(waiting.site) + ": " + name(waiting) + " waits for ever for " +
         missed;
}

void resume(Thread* t) {
  m.current = t;
  threadIdx = t->index;
}

// Runs other threads until this one has been woken.
void wait(const char* what, Site site) {
  Thread* self = m.current;
  self->waits_for = what;
  self->site = site;
  Thread* t = next();
  if (t == nullptr) {
    m.error = who_is_missed();
    give_up();
  }
  Fiber* from = m.fiber;
  if (t->fiber == nullptr) {
    if (m.idle.empty()) {
      m.fibers.push_back(new_fiber());
      m.idle.push_back(m.fibers.back().get());
    }
    t->fiber = m.idle.back();
    m.idle.pop_back();
  }
  resume(t);
  m.fiber = t->fiber;
  go(from, m.fiber);
}

void release(Thread& t) {
  if (t.held != nullptr && --t.held->readers == 0) m.spare.push_back(t.held);
  t.held = nullptr;
}

// A fiber's whole life: threads that have not started yet, one after another.
void enter() {
  Fiber* self = m.fiber;
  landed(self);
  for (;;) {
    m.body(m.data);
    Thread& t = *m.current;
    t.done = true;
    release(t);
    if (--m.alive == 0) {
      m.idle.push_back(self);
      go(self, &host);
    } else if (Thread* following = next()) {
      resume(following);
      if (following->fiber == nullptr) {
        following->fiber = self;
      } else {
        m.idle.push_back(self);
        m.fiber = following->fiber;
        go(self, m.fiber);
      }
    } else {
      m.error = who_is_missed();
      give_up();
    }
  }
}

// By hand, since the sanitizer would look at what a library function does to the gaps between variables.
void poison(char* begin, const char* end) {
  size_t bytes = static_cast<size_t>(end - begin);
  asm volatile("rep stosb" : "+D"(begin), "+c"(bytes) : "a"(0xff) : "memory");
}

void run_block() {
  poison(emulator_shared_begin, emulator_shared_end);
  poison(m.dynamic.get(), m.dynamic.get() + m.shape.shared);
  m.ready.clear();
  m.first_ready = 0;
  m.at_barrier.clear();
  for (Thread& t : m.threads) {
    t.fiber = nullptr;
    t.done = false;
    t.waits_for = nullptr;
    t.held = nullptr;
    m.ready.push_back(&t);
  }
  m.alive = static_cast<int>(m.threads.size());
  if (m.idle.empty()) {
    m.fibers.push_back(new_fiber());
    m.idle.push_back(m.fibers.back().get());
  }
  Thread* t = next();
  t->fiber = m.idle.back();
  m.idle.pop_back();
  resume(t);
  m.fiber = t->fiber;
  go(&host, m.fiber);
}

void prepare(const Shape& shape) {
  m.shape = shape;
  gridDim = shape.grid;
  blockDim = shape.block;
  const char* seed = std::getenv("DEFTCORE_EMULATE_SEED");
  m.in_order = seed == nullptr || *seed == '\0' || std::strcmp(seed, "0") == 0;
  m.random.seed(m.in_order ? 0 : static_cast<unsigned>(std::strtoul(seed, nullptr, 10)));
  m.dynamic.reset(static_cast<char*>(std::aligned_alloc(16, (shape.shared + 15) / 16 * 16)));
  m.threads.clear();
  for (unsigned z = 0, n = 0; z < shape.block.z; ++z) {
    for (unsigned y = 0; y < shape.block.y; ++y) {
      for (unsigned x = 0; x < shape.block.x; ++x, ++n) {
        m.threads.push_back({{x, y, z}, static_cast<int>(n), nullptr, false, nullptr, {}, nullptr});
      }
    }
  }
  m.open.assign((m.threads.size() + kWarp - 1) / kWarp, {});
}

// After an error nothing of the block is left.
void clean_up() {
  m.idle.clear();
  for (const auto& fiber : m.fibers) {
    restart(*fiber);
    m.idle.push_back(fiber.get());
  }
  m.spare.clear();
  for (const auto& meeting : m.meetings) m.spare.push_back(meeting.get());
}

}  // namespace

void (*on_launch)(const Shape&, void (*)()) = nullptr;

const char* run(const Shape& shape, void (*body)(void*), void* data) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  prepare(shape);
  m.body = body;
  m.data = data;
  m.error.clear();
  host.bottom = nullptr;  // launches may come from several threads
  const uint64_t blocks = static_cast<uint64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  std::vector<uint64_t> order(m.in_order ? 0 : blocks);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (uint64_t i = 0; i < blocks && m.error.empty(); ++i) {
    const uint64_t b = m.in_order ? i : order[i];
    blockIdx = {static_cast<unsigned>(b % shape.grid.x), static_cast<unsigned>(b / shape.grid.x % shape.grid.y),
                static_cast<unsigned>(b / shape.grid.x / shape.grid.y)};
    run_block();
  }
  if (m.error.empty()) return nullptr;
  m.alive = 0;
  clean_up();
  return m.error.c_str();
}

int lane() { return m.current->number % kWarp; }

void* dynamic_shared() { return m.dynamic.get(); }

void sync_threads(Site site) {
  Thread& self = *m.current;
  if (!m.at_barrier.empty()) {
    const Site& first = m.at_barrier.front()->site;
    if (first.line != site.line || std::strcmp(first.file, site.file) != 0) {
      m.error = "__syncthreads in " + text(site) + " by " + name(self) + ", but in " + text(first) + " by " +
                name(*m.at_barrier.front());
      give_up();
    }
  }
  if (m.at_barrier.size() + 1 == m.threads.size()) {
    for (Thread* t : m.at_barrier) wake(*t);
    m.at_barrier.clear();
    return;
  }
  self.site = site;
  m.at_barrier.push_back(&self);
  wait("__syncthreads", site);
}

const uint64_t* meet(const char* what, unsigned mask, uint64_t bits, Site site) {
  Thread& self = *m.current;
  release(self);
  const unsigned mine = 1u << lane();
  auto& open = m.open[static_cast<size_t>(self.number / kWarp)];
  if ((mask & mine) == 0) {
    m.error = std::string(what) + " in " + text(site) + ": " + name(self) + " is not in its own mask";
    give_up();
  }
  Meeting* meeting = nullptr;
  for (Meeting* other : open) {
    if (other->mask == mask && std::strcmp(other->what, what) == 0) {
      meeting = other;
    } else if ((other->mask & mask) != 0) {
      m.error = std::string(what) + " in " + text(site) + " by " + name(self) + ", while lanes that it names wait in " +
                other->what + " of " + text(other->site) + ", or under another mask";
      give_up();
    }
  }
  if (meeting == nullptr) {
    if (m.spare.empty()) {
      m.meetings.push_back(std::make_unique<Meeting>());
      m.spare.push_back(m.meetings.back().get());
    }
    meeting = m.spare.back();
    m.spare.pop_back();
    *meeting = {what, mask, 0, 0, site, {}};
    open.push_back(meeting);
  }
  meeting->arrived |= mine;
  ++meeting->readers;
  meeting->values[lane()] = bits;
  self.held = meeting;
  if (meeting->arrived != mask) {
    wait(what, site);
    return self.held->values;
  }
  open.erase(std::find(open.begin(), open.end(), meeting));
  const size_t first = static_cast<size_t>(self.number / kWarp * kWarp);
  for (unsigned lanes = mask & ~mine; lanes != 0; lanes &= lanes - 1) {
    wake(m.threads[first + static_cast<size_t>(__builtin_ctz(lanes))]);
  }
  return meeting->values;
}

uint64_t bits_of(const char* what, unsigned mask, uint64_t bits, int source, Site site) {
  const uint64_t* values = meet(what, mask, bits, site);
  if (source < 0 || source >= kWarp || (mask >> source & 1) == 0) {
    m.error = std::string(what) + " in " + text(site) + ": " + name(*m.current) + " reads lane " +
              std::to_string(source) + ", which the mask does not name";
    give_up();
  }
  return values[source];
}

// ---------------------------------------------------------------------------- limits

namespace {
// The threads of a kernel's __launch_bounds__, which stand before it as one empty instruction a warp; the compiler
// lists where those begin.
unsigned most_threads(void (*kernel)()) {
  const char* code = reinterpret_cast<const char*>(kernel);
  for (const char* const* first = __start___patchable_function_entries; first < __stop___patchable_function_entries;
       ++first) {
    const auto warps = static_cast<size_t>(code - *first);  // if these are the kernel's
    if (warps == 0 || warps > kMostThreads / kWarp) continue;
    if (std::all_of(*first, code, [](char byte) { return byte == '\x90'; }))
      return static_cast<unsigned>(warps * kWarp);
  }
  return kMostThreads;
}
}  // namespace

Limits& limits_of(void (*kernel)()) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::map<void (*)(), Limits> known;
  const auto found = known.find(kernel);
  return found != known.end() ? found->second : known[kernel] = Limits{most_threads(kernel)};
}

const char* beyond_limits(const Shape& s, void (*kernel)()) {
  const Limits& limits = limits_of(kernel);
  const uint64_t threads = static_cast<uint64_t>(s.block.x) * s.block.y * s.block.z;
  if (threads == 0 || threads > kMostThreads || s.block.z > 64) return "a block has 1 to 1024 threads, 64 along z";
  if (threads > limits.threads) return "more threads than the kernel's __launch_bounds__";
  if (s.grid.x == 0 || s.grid.y == 0 || s.grid.z == 0) return "a grid has at least one block";
  if (s.grid.x > 0x7fffffffu || s.grid.y > 65535 || s.grid.z > 65535) {
    return "a grid has at most 2147483647, 65535 and 65535 blocks along x, y and z";
  }
  if (s.shared > limits.shared_bytes) return "more shared memory than 48 KB, or than the kernel has opted in to";
  return nullptr;
}

// ---------------------------------------------------------------------------- misaligned accesses
//
// The kernels are compiled with checks of every access's alignment, whose finding comes here rather than to the
// sanitizer's own library.

namespace {
struct Finding {
  const char* file;
  uint32_t line, column;
  const struct {
    uint16_t kind, info;
    char name[1];
  }* type;
};
}  // namespace

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(const Finding* finding,
                                                                                            uintptr_t address) {
  char at[32];
  std::snprintf(at, sizeof at, "%#zx", static_cast<size_t>(address));
  m.error = std::string("misaligned or null address ") + at + " as " + finding->type->name + " at " + finding->file +
            ":" + std::to_string(finding->line);
  if (m.alive > 0) {
    m.error += " by " + name(*m.current);
    give_up();
  }
  std::fprintf(stderr, "%s\n", m.error.c_str());
  std::abort();
}

}  // namespace emulator

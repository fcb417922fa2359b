#include "traffic.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <unordered_map>
#include <utility>

namespace traffic {
namespace {

constexpr unsigned kNever = 0xffffffffu;

// When each sector was last seen, by number of block and of launch.
struct Seen {
  std::vector<unsigned> block, launch;
};

struct Memory {
  uintptr_t begin, end;
  Seen read, written;
};

// A warp's access: an instruction, and how often each lane has come there. Where lanes took different ways the turns of
// one may meet other turns of another; the sum changes little.
struct Access {
  uint64_t instruction, turn;
  bool operator==(const Access& other) const { return instruction == other.instruction && turn == other.turn; }
};
struct Hash {
  size_t operator()(const Access& a) const {
    return (a.instruction * 0x9e3779b97f4a7c15u ^ a.turn) * 0xbf58476d1ce4e5b9u;
  }
};

std::vector<Memory> memories;
std::vector<Launch> launches;
emulator::Uint3 block_now;
unsigned blocks = 0;
std::unordered_map<Access, uint64_t, Hash> turns;                  // of (instruction, thread)
std::unordered_map<Access, std::vector<uintptr_t>, Hash> sectors;  // of (instruction and warp, turn)

// The program's functions by address. nm, since kernels have internal linkage, which dladdr does not see.
std::string name_of(void (*kernel)()) {
  static std::map<uintptr_t, std::string> names;
  if (names.empty()) {
    FILE* pipe = popen("nm -C /proc/$PPID/exe", "r");
    char line[4096];
    while (pipe != nullptr && std::fgets(line, sizeof line, pipe) != nullptr) {
      char* rest = nullptr;
      const uintptr_t address = std::strtoull(line, &rest, 16);
      std::string name(rest);
      name = name.substr(std::min<size_t>(name.size(), 3), name.find('\n') - 3);
      for (const std::string space : {"void ", "deftcore::", "cuda::", "(anonymous namespace)::"}) {
        for (size_t at = name.find(space); at != std::string::npos; at = name.find(space)) name.erase(at, space.size());
      }
      names.emplace(address, name);
    }
    if (pipe != nullptr) pclose(pipe);
  }
  const std::string name = names[reinterpret_cast<uintptr_t>(kernel)];
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {  // the first parenthesis outside of template arguments
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

void begin_launch(const emulator::Shape& shape, void (*kernel)()) {
  launches.push_back({name_of(kernel), shape, {}, {}});
  block_now = {kNever, kNever, kNever};
}

void begin_block() {
  block_now = blockIdx;
  ++blocks;
  turns.clear();
  sectors.clear();
}

void count(uintptr_t address, size_t bytes, bool writes, void* instruction) {
  const auto after = std::upper_bound(memories.begin(), memories.end(), address,
                                      [](uintptr_t a, const Memory& m) { return a < m.begin; });
  if (launches.empty() || after == memories.begin() || address >= std::prev(after)->end) return;
  Memory& memory = *std::prev(after);
  if (blockIdx.x != block_now.x || blockIdx.y != block_now.y || blockIdx.z != block_now.z) begin_block();
  Bytes& sum = writes ? launches.back().written : launches.back().read;
  Seen& seen = writes ? memory.written : memory.read;
  sum.asked += static_cast<int64_t>(bytes);
  const uint64_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const uint64_t place = reinterpret_cast<uint64_t>(instruction) << 6 | (writes ? 32u : 0u);
  const uint64_t turn = turns[{place, thread}]++;
  std::vector<uintptr_t>& asked = sectors[{place | thread / emulator::kWarp, turn}];
  for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s) {
    const size_t i = s - memory.begin / kSector;
    if (seen.block[i] != blocks) seen.block[i] = blocks, sum.block += kSector;
    const unsigned launch = static_cast<unsigned>(launches.size());
    if (seen.launch[i] != launch) seen.launch[i] = launch, sum.launch += kSector;
    if (std::find(asked.begin(), asked.end(), s) == asked.end()) asked.push_back(s), sum.warp += kSector;
  }
}

}  // namespace

void watch(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const Seen never{std::vector<unsigned>(bytes / kSector + 2, 0), std::vector<unsigned>(bytes / kSector + 2, 0)};
  Memory memory{begin, begin + bytes, never, never};
  const auto place = std::find_if(memories.begin(), memories.end(), [&](const Memory& m) { return m.begin > begin; });
  memories.insert(place, std::move(memory));
  emulator::on_launch = begin_launch;
}

std::vector<Launch> take() {
  memories.clear();
  return std::exchange(launches, {});
}

}  // namespace traffic

// ---------------------------------------------------------------------------- what the compiler calls

#define DEFTCORE_ACCESS(kind, bytes)                                                           \
  void __tsan_##kind##read##bytes(void* p) {                                                   \
    traffic::count(reinterpret_cast<uintptr_t>(p), bytes, false, __builtin_return_address(0)); \
  }                                                                                            \
  void __tsan_##kind##write##bytes(void* p) {                                                  \
    traffic::count(reinterpret_cast<uintptr_t>(p), bytes, true, __builtin_return_address(0));  \
  }

extern "C" {
DEFTCORE_ACCESS(, 1)
DEFTCORE_ACCESS(, 2)
DEFTCORE_ACCESS(, 4)
DEFTCORE_ACCESS(, 8)
DEFTCORE_ACCESS(, 16)
DEFTCORE_ACCESS(unaligned_, 2)
DEFTCORE_ACCESS(unaligned_, 4)
DEFTCORE_ACCESS(unaligned_, 8)
DEFTCORE_ACCESS(unaligned_, 16)
void __tsan_read_range(void* p, size_t bytes) {
  traffic::count(reinterpret_cast<uintptr_t>(p), bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  traffic::count(reinterpret_cast<uintptr_t>(p), bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

// An op's workspace is laid out by one function, which takes its arrays from a Workspace one after another. Over no
// memory it only counts: so the same function says how many bytes the op needs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deftcore {
namespace {  // a copy per file: the CPU's files are built for several instruction sets

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

class Workspace {
 public:
  explicit Workspace(void* base = nullptr, int64_t alignment = 64)
      : base_(static_cast<char*>(base)), alignment_(alignment) {}

  // `count` elements of T, `alignment` bytes or a multiple from the base; null where there is no memory.
  template <class T>
  T* take(int64_t count) {
    T* mine = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), alignment_);
    return mine;
  }
  int64_t bytes() const { return bytes_; }
  size_t size() const { return static_cast<size_t>(bytes_); }

 private:
  char* base_;
  int64_t alignment_, bytes_ = 0;
};

// Bytes of the arrays that lay_out(Workspace&) takes.
template <class LayOut>
size_t bytes_of(LayOut&& lay_out) {
  Workspace room;
  lay_out(room);
  return room.size();
}

}  // namespace
}  // namespace deftcore

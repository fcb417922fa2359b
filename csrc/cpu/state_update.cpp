#include "state_update.h"

namespace deftcore::cpu {

void DEFTCORE_KERNEL(selective_state_update)(const StateUpdateArgs& args) {
  const int64_t blocks = (args.head_dim + kWidth - 1) / kWidth, rows = args.heads * blocks;
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch_dtype(args.state_dtype, [&](auto s) {
      const int64_t bytes = args.batch * args.heads * args.head_dim * args.states * 8;
      for_range(args.batch * rows, bytes, [&](int64_t i) {
        const int64_t offset = i % blocks * kWidth;
        const Lanes lanes{offset, std::min<int64_t>(args.head_dim - offset, kWidth)};
        update_block<decltype(t), decltype(s)>(args, i / rows, i % rows / blocks, lanes);
      });
    });
  });
}

}  // namespace deftcore::cpu
